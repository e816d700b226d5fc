"""Trainings that are killed: in copies of one process, forked, so that torch is imported once.

    python kills.py SCRIPT FOLDER KILLS FLAGS...    # in an empty folder that becomes full of files

An uninterrupted run goes to FOLDER/whole. KILLS says when runs in FOLDER/run die: each number at
that file operation (open, rename, remove, mkdir, or half-way through a file), each 'r' at random;
every one resumes what the earlier ones left, the last goes on to the end. Prints how many really
died; exits with 1, and says why, unless both folders then hold the same.
"""
import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def watch(folder, last):
    """Kill this process at its `last`-th file operation below `folder`; returns the counter."""
    folder, seen, fsync = os.path.abspath(folder), [], os.fsync

    def operation(half=None, empty=None):
        seen.append(1)
        if len(seen) == last:
            if half is not None:
                os.ftruncate(half, os.fstat(half).st_size // 2)
            if empty is not None and os.path.exists(empty):
                os.truncate(empty, 0)
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, given):
        opens = event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (opens or event in CHANGES) and isinstance(given[0], (str, os.PathLike)):
            if os.path.abspath(given[0]).startswith(folder):
                operation(empty=given[0] if opens and given[2] & os.O_TRUNC else None)

    def half_written(file):
        operation(half=file)
        fsync(file)

    sys.addaudithook(hook)
    os.fsync = half_written
    return seen


def forked(body):
    """Run body() in a copy of this process: its exit code, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        body()
        os._exit(0)
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(99)


def command(script, flags, out, operation=None, seconds=None):
    """A training that dies at that file operation, or after that time of the CPU."""
    def body():
        with open(out.with_suffix(".txt"), "a") as text, contextlib.redirect_stdout(text), \
                contextlib.redirect_stderr(text):
            seen = watch(Path.cwd(), operation)
            if seconds:
                signal.setitimer(signal.ITIMER_PROF, seconds)  # no handler: it ends the process
            resume = ["--resume"] if list(out.rglob("last.pt")) else []
            script.main([*flags, "--out", str(out), *resume])
        out.with_suffix(".count").write_text(str(len(seen)))
    return forked(body)


def differences(a, b):
    """What two run folders hold differently: weights, optimisers, rows of log.csv, scores."""
    import torch
    from helpers import assert_same
    found = []
    for path in sorted(a.rglob("*")):
        other = b / path.relative_to(a)
        if not other.exists():
            found.append(f"{other} is not there")
        elif path.name == "last.pt":
            states = [torch.load(f, weights_only=True) for f in (path, other)]
            for group in (g for s in states for part in s["parts"].values()
                          for g in part.get("param_groups", ())):
                group["lr"] = None  # set anew before each step, so not after a run that is over
            for part in ("step", "parts", "others"):
                try:
                    assert_same(states[0][part], states[1][part])
                except AssertionError:
                    found.append(f"{other}: {part}")
        elif path.name == "log.csv":
            rows = [[row.split(",")[:-1] for row in f.read_text().splitlines()]
                    for f in (path, other)]
            if rows[0] != rows[1]:
                found.append(f"{other}: {rows[1]}, not {rows[0]}")
        elif path.name == "result.json":
            if len({json.dumps(json.loads(f.read_text()) | {"seconds": 0})
                    for f in (path, other)}) > 1:
                found.append(str(other))
        elif path.suffix == ".png" and path.read_bytes() != other.read_bytes():
            found.append(str(other))
    return found + [str(f) for f in b.rglob("*.tmp")]


def main(name, folder, kills, *flags):
    """See above."""
    script, folder, rng, died = importlib.import_module(name), Path(folder).resolve(), None, 0
    folder.mkdir()
    os.chdir(folder)
    import torch

    import lab.page  # noqa: F401
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(1))  # what torch imports late, once for all copies
    torch.optim.Adam([weight]).zero_grad()
    weight.sum().backward()
    torch.optim.Adam([weight]).step()
    start = time.process_time()
    code = command(script, flags, folder / "whole")
    if code:
        sys.exit(f"exit code {code}: " + (folder / "whole.txt").read_text()[-1500:])
    count, rng = int((folder / "whole.count").read_text()), random.Random(kills)
    span = os.times().children_user + os.times().children_system + time.process_time() - start
    for kill in kills.split(","):
        at = dict(seconds=rng.uniform(0.05, span)) if kill == "r" else dict(
            operation=1 + round(float(kill) * (count - 1)))
        code = command(script, flags, folder / "run", **at)
        if code not in (0, -signal.SIGKILL, -signal.SIGPROF):
            sys.exit(f"{name}, {at}: exit code {code}: "
                     + (folder / "run.txt").read_text()[-1500:])
        died += code != 0
    code = command(script, flags, folder / "run")
    found = differences(folder / "whole", folder / "run") if not code else [f"exit code {code}"]
    print(f"{name}: {count} file operations, {died} of {len(kills.split(','))} kills")
    if found:
        sys.exit("\n".join(found) + (folder / "run.txt").read_text()[-800:])


if __name__ == "__main__":
    main(*sys.argv[1:])
