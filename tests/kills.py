"""Trainings that are killed: in copies of one process, forked, so that torch is imported once.

    python kills.py SCRIPT FOLDER KILLS FLAGS...

An uninterrupted run goes to FOLDER/whole. Runs in FOLDER/run die KILLS times, three of four at a
file operation (open, rename, remove, mkdir, or half-way through a file), one anywhere; each resumes
what the one before has left. One that ends earlier is compared with the uninterrupted, and begun
anew. Exits with 1, and says why, where weights, optimisers, log.csv or scores differ.
"""
import contextlib
import importlib
import json
import os
import random
import shutil
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


def command(script, flags, folder, operation=None, seconds=None):
    """A training in a folder that dies at that file operation, or after that time of the CPU: its
    exit code."""
    def body():
        os.chdir(folder)
        with open("said.txt", "a") as text, contextlib.redirect_stdout(text), \
                contextlib.redirect_stderr(text):
            seen, start = watch(folder, operation), time.process_time()
            if seconds:
                signal.setitimer(signal.ITIMER_PROF, seconds)  # no handler: it ends the process
            resume = ["--resume"] if list(Path("out").rglob("last.pt")) else []
            script.main([*flags, "--out", "out", *resume])
        Path("count").write_text(f"{len(seen)} {time.process_time() - start}")
    return forked(body)


def differences(a, b):
    """What two run folders hold differently: weights, optimisers, rows of log.csv, scores."""
    import torch
    from helpers import assert_same
    from PIL import Image
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
        elif path.suffix == ".png":  # whole; noise that a generator paints may differ
            with Image.open(path) as one, Image.open(other) as two:
                one.load(), two.load()
                if one.size != two.size:
                    found.append(str(other))
    return found + [str(f) for f in b.rglob("*.tmp")]


def warm():
    """What torch imports late, once for all copies."""
    import torch

    import lab.page  # noqa: F401
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.sum().backward()
    torch.optim.Adam([weight]).step()


def main(name, folder, kills, *flags):
    """See above."""
    script, folder, rng, died, ended = importlib.import_module(name), Path(folder), None, 0, 0
    whole, run, rng = folder / "whole", folder / "run", random.Random(name)
    warm()
    for made in (whole, run):
        made.mkdir(parents=True)

    def fail(reason):
        sys.exit(f"{name}: {reason}\n" + (run / "said.txt").read_text()[-1500:])

    if code := command(script, flags, whole):
        sys.exit(f"exit code {code}: " + (whole / "said.txt").read_text()[-1500:])
    count, seconds = (whole / "count").read_text().split()
    while True:
        at = ({"seconds": rng.uniform(0.01, float(seconds))} if died % 4 == 3 else
              {"operation": rng.randint(1, int(count))}) if died < int(kills) else {}
        code = command(script, flags, run, **at)
        if code not in (0, -signal.SIGKILL, -signal.SIGPROF):
            fail(f"{at}: exit code {code}")
        died += code != 0
        if code == 0:
            if found := differences(whole / "out", run / "out"):
                fail("\n".join(found))
            shutil.rmtree(run / "out")
            count, seconds = (run / "count").read_text().split()
            ended += 1
            if not at:
                break
    print(f"{name}: {died} kills, {ended} runs that ended as the uninterrupted one")


if __name__ == "__main__":
    main(*sys.argv[1:])
