"""Variants of a script: a row of a paper's table, a planted fault, an exercise, a worked fork.

Each is a few flags or a patch of 1 to 10 lines (a fork: 16) in lab/rows/SCRIPT.txt, applied to a
copy of the script, so that the script itself shows the method alone. A section of that file:

    fault lambda_Y_is_lambda_X: NCE_Y weighted by lambda_X
    test: test_step
    -    L = L_GAN + args.lambda_X * NCE_X + args.lambda_Y * NCE_Y
    +    L = L_GAN + args.lambda_X * NCE_X + args.lambda_X * NCE_Y

KIND NAME: DESCRIPTION, KIND one of row, fault, exercise, fork; where needed `flags:`, `test:`
(pytest -k: which test of tests/test_SCRIPT.py should kill a fault), `file: common.py` (patched in
place of the script). Hunks as in a unified diff, '-', '+' or ' ' and the line verbatim (blank: the
marker alone), a line @@ between two. An empty line ends a section; comments (#) before the first.

    python -m lab.variants list [SCRIPT]
    python -m lab.variants show SCRIPT NAME                          # the diff
    python -m lab.variants run SCRIPT NAME [flags of the script ...]
    python -m lab.variants faults SCRIPT [NAME ...] [--jobs N]       # do the tests see them?
"""

import argparse
import contextlib
import difflib
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common import UserError, entry

ROOT = Path(__file__).parent.parent
PATIENCE = 60  # seconds that a fault's test may take, beyond ten times what it takes without it


@dataclass
class Patch:
    """A section of lab/rows/SCRIPT.txt; hunks: lists of lines with their markers."""
    kind: str
    name: str
    about: str
    flags: list = field(default_factory=list)
    test: str = ""
    file: str = ""
    hunks: list = field(default_factory=list)
    where: str = ""  # file and line of its head, for errors


def load(script):
    """[Patch] of lab/rows/SCRIPT.txt; `UserError` with the line if it is missing or wrong."""
    source, patches, ended = f"lab/rows/{script}.txt", [], True
    if not (ROOT / source).is_file():
        raise UserError(f"{source}: no such file")
    for number, line in enumerate((ROOT / source).read_text().splitlines(), 1):
        where, p = f"{source}, line {number}", patches[-1] if patches else None
        if head := re.fullmatch(r"(row|fault|exercise|fork) ([\w.+-]+): *(\S.*)", line):
            patches.append(Patch(*head.groups(), file=f"{script}.py", where=where))
            ended = False
        elif not line or (line[0] == "#" and not p):
            ended = True
        elif not ended and (line == "@@" or line[0] in "+- "):
            p.hunks += [[]] if line == "@@" or not p.hunks else []
            p.hunks[-1] += [line] if line != "@@" else []
        elif not ended and not p.hunks and re.match(r"flags: *\S|test: *\S|file: common.py$", line):
            key, value = re.split(": *", line, maxsplit=1)
            setattr(p, key, shlex.split(value) if key == "flags" else value)
        else:
            raise UserError(f"{where}: expected KIND NAME: ABOUT, flags:, test:, file: common.py "
                            f"or a hunk's line with its marker (a blank one too), found {line!r}")
    for p in patches:
        changed = sum(max(sum(line[0] == s for line in h) for s in "-+") for h in p.hunks)
        most = 16 if p.kind == "fork" else 10
        wrong = ("not the only one of that name" if [q.name for q in patches].count(p.name) > 1 else
                 "changes nothing" if not p.hunks and not p.flags else
                 "needs hunks and test:" if p.kind == "fault" and not (p.hunks and p.test) else
                 f"changes {changed} lines, more than {most}" if changed > most else
                 "a hunk needs a line that is there ('-' or ' ') and one that changes ('-' or '+')"
                 if any({line[0] for line in h} in ({"+"}, {" "}, set()) for h in p.hunks) else "")
        if wrong:
            raise UserError(f"{p.where}: {p.kind} {p.name}: {wrong}")
    return patches


def apply(patch, text):
    """The text of patch.file, patched; `UserError` if old lines are not there exactly once."""
    lines = text.split("\n")
    for hunk in patch.hunks:
        old, new = ([line[1:] for line in hunk if line[0] in signs] for signs in ("- ", "+ "))
        places = [i for i in range(len(lines)) if lines[i:i + len(old)] == old]
        if len(places) != 1:
            what = repr(old[0].strip()) + (f" with {len(old) - 1} more below" if old[1:] else "")
            raise UserError(f"{patch.where.split(',')[0]}: {patch.kind} {patch.name} no longer "
                            f"applies: {what} found {len(places)} times in {patch.file}")
        lines[places[0]:places[0] + len(old)] = new
    return "\n".join(lines)


def sources(script, name=None):
    """({file: text} of the script and common.py with a variant applied, the variant's flags)."""
    patches = {p.name: p for p in load(script)} if name else {None: Patch("row", "", "")}
    if name not in patches:
        raise UserError(f"lab/rows/{script}.txt: no variant {name!r}, found {', '.join(patches)}")
    texts = {file: (ROOT / file).read_text() for file in (f"{script}.py", "common.py")}
    if (patch := patches[name]).hunks:
        texts[patch.file] = apply(patch, texts[patch.file])
    return texts, patch.flags


def start(script, name, flags, folder, shared=(), env=None, **how):
    """Popen of a variant written to folder (common.py too if patched): shared, own, given flags."""
    texts, own = sources(script, name)
    for file in (f"{script}.py", "common.py"):
        if file != "common.py" or texts[file] != (ROOT / file).read_text():
            Path(folder, file).write_text(texts[file])
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen([sys.executable, f"{folder}/{script}.py", *shared, *own, *flags],
                            env={**os.environ, "PYTHONPATH": paths, **(env or {})}, **how)


def run(script, name, flags):
    """Run a script with a variant (or None) and flags in the current folder; its exit code."""
    with tempfile.TemporaryDirectory() as folder, start(script, name, flags, folder) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        while child.returncode is None:
            with contextlib.suppress(KeyboardInterrupt):  # the script gets it too, and saves
                child.wait()
        signal.signal(signal.SIGTERM, before)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def tested(log, tree, arguments):
    """In a process of its own: pytest's exit code for the tests of a tree, what it says in log."""
    os.setsid()  # a group that can be killed with what the test has started
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    for number in (1, 2):  # what the test's own children print, too
        os.dup2(sys.stdout.fileno(), number)
    os.chdir(tree)
    for name in [n for n in sys.modules if re.match(r"(common|lab|helpers)\b", n)]:
        del sys.modules[name]  # the tree's own are to be imported
    sys.path[:] = [str(tree)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    os._exit(sys.modules["pytest"].main(
        ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *arguments]))


def tried(script, test, changed, timeout=None):
    """Run a test in a copy of the tree with files {name: text} changed: (pytest's exit code or None
    after timeout seconds, the test that failed or what else went wrong, seconds).

    WHY a fork: it has torch and pytest loaded; importing them anew takes 5 s of CPU each time."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        tree, log, begin = Path(scratch, "tree"), Path(scratch, "log"), time.monotonic()
        shutil.copytree(ROOT, tree, ignore=lambda folder, names: [
            n for n in names if n == "__pycache__" or Path(folder) == ROOT
            and not re.fullmatch(r"lab|tests|pyproject\.toml|\w+\.py", n)])
        for file, text in changed.items():
            (tree / file).write_text(text)
        child = multiprocessing.get_context("fork").Process(
            target=tested, args=(log, tree, [f"tests/test_{script}.py", "-k", test]))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            os.killpg(child.pid, signal.SIGKILL)  # with what the test has started
            child.join()
            return None, "timeout", timeout
        text = log.read_text(errors="replace").strip()
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", text, re.MULTILINE)
    code = child.exitcode if failed or child.exitcode != 1 else 3  # 1: pytest could not start
    reasons = failed or re.findall("^E  +(.+)$", text, re.MULTILINE) or [text.split("\n")[-1]]
    return code, reasons[-1], time.monotonic() - begin


def faults(script, names=(), jobs=1):
    """Run each fault's test with it, print what came of that; the survivors' names. `UserError` if
    a test selects none or fails without a fault, or a fault does not apply or stops pytest."""
    import pytest  # noqa: F401 (what every test needs, loaded once, for the forks)
    import torch._dynamo  # noqa: F401
    import torchvision  # noqa: F401

    chosen = {p.name: p for p in load(script) if p.kind == "fault"}
    if missing := set(names) - set(chosen):
        raise UserError(f"lab/rows/{script}.txt: no fault {', '.join(sorted(missing))}")
    chosen, clean, found = [chosen[name] for name in names or chosen], {}, {}

    def attempt(p):
        try:
            text = apply(p, (ROOT / p.file).read_text())
            compile(text, p.file, "exec")
        except (UserError, SyntaxError) as error:
            return 2, str(error), 0
        return tried(script, p.test, {p.file: text}, 10 * clean[p.test] + PATIENCE)

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        tests = sorted({p.test for p in chosen})
        unpatched = pool.map(lambda test: tried(script, test, {}), tests)
        for test, (code, what, clean[test]) in zip(tests, unpatched, strict=True):
            if code:
                what = "selects no test" if code == 5 else f"does not pass without a fault: {what}"
                raise UserError(f"tests/test_{script}.py -k '{test}' {what}")
        for p, (code, what, seconds) in zip(chosen, pool.map(attempt, chosen), strict=True):
            # pytest's 1: a test failed; 2: a file cannot be imported; 3 to 5: no test ran
            found[p.name] = {None: "killed by", 1: "killed by", 0: "SURVIVES"}.get(code, "BROKEN:")
            print(f"{p.name}: {found[p.name]} {what if code != 0 else p.test} in {seconds:.0f} s",
                  flush=True)
    print(f"{[*found.values()].count('killed by')} of {len(found)} killed")
    if "BROKEN:" in found.values():
        raise UserError(f"lab/rows/{script}.txt: broken faults, see above")
    return [name for name in found if found[name] == "SURVIVES"]


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m lab.variants", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = p.add_subparsers(dest="command", required=True)
    add = {name: parts.add_parser(name).add_argument for name in ("list", "show", "run", "faults")}
    for name, argument in add.items():
        argument("script", nargs="?" if name == "list" else None)
    add["show"]("name")
    add["run"]("name")
    add["run"]("flags", nargs=argparse.REMAINDER)
    add["faults"]("names", nargs="*", metavar="NAME")
    add["faults"]("--jobs", type=int, default=1, help="tests at a time")
    args = p.parse_args(argv)
    if args.command == "list":
        for script in [args.script] if args.script else sorted(
                f.stem for f in (ROOT / "lab/rows").glob("*.txt")):
            print(f"{script}.py", *(f"{p.kind} {p.name}: {p.about} {shlex.join(p.flags)}".rstrip()
                                    for p in load(script)), sep="\n  ")
    elif args.command == "show":
        texts, flags = sources(args.script, args.name)
        print(f"{args.name}: {shlex.join(flags) or 'no flags'}")
        for file, text in texts.items():
            old = (ROOT / file).read_text().splitlines(True)
            sys.stdout.writelines(difflib.unified_diff(old, text.splitlines(True), file, file))
    elif args.command == "run":
        sys.exit(run(args.script, args.name, args.flags))
    elif faults(args.script, args.names, args.jobs):
        sys.exit(1)


if __name__ == "__main__":
    entry(main)
