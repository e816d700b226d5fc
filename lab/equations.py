"""docs/EQUATIONS.md: every numbered equation, where it is computed, which tests and faults know it.

    python -m lab.equations            # the page
    python -m lab.equations --write    # to docs/EQUATIONS.md

lab/equations.txt is the list. A section begins with `SCRIPT.py: PAPER`; an entry of it:

    Eq. (3.2): its statement in words
    test: functions of tests/test_SCRIPT.py that compare it with a plain transcription
    fault: planted faults of lab/rows/SCRIPT.txt that break it, beyond those found (see below)

In the place of a tag in the script, `row: NAME` sends to that variant's patch, and `none: WHY` says
why there is no line. A tag is a comment `# Eq. (n)` behind the code that computes the equation. A
fault counts as one of this equation if it changes a statement with its tag, or names it. Faults
whose test is none of the entry's do not count.
"""

import argparse
import ast
import functools
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

from common import UserError, entry
from lab.variants import ROOT, apply, load

PAGE = ROOT / "docs/EQUATIONS.md"
NUMBERS = re.compile(r"Eq\. \([\d.]+\)(?:, \([\d.]+\))*")


@dataclass
class Equation:
    """An entry of lab/equations.txt, with the places (lines) and faults that were found."""
    script: str
    paper: str
    number: str
    words: str
    tests: list = field(default_factory=list)
    faults: list = field(default_factory=list)
    row: str = ""
    none: str = ""
    places: list = field(default_factory=list)  # (file, line)


def numbers(text):
    """{"3.8", ...} of all `Eq. (3.8)` and `Eq. (4), (5)` in a text."""
    return {n for found in NUMBERS.findall(text) for n in re.findall(r"\(([\d.]+)\)", found)}


@functools.cache
def tags(source):
    """{line: numbers} of the comments that say what their line computes."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if (token.type == tokenize.COMMENT and token.line.strip() != token.string
                and re.match(r"# (?:[^.;,]*: )?Eq\. \(", token.string)):
            found[token.start[0]] = numbers(token.string)
    return found


def changed_lines(patch, source):
    """Lines of a source that a patch takes out."""
    lines = source.split("\n")
    apply(patch, source)  # says in one line which patch no longer applies
    for hunk in patch.hunks:
        old = [line for line in hunk if line[0] in "- "]
        first = next(i for i in range(len(lines))
                     if lines[i:i + len(old)] == [line[1:] for line in old])
        yield from (first + i + 1 for i, line in enumerate(old) if line[0] == "-")


@functools.cache
def statements(source):
    """[(first, last line)] of all statements that hold no other."""
    return [(node.lineno, node.end_lineno) for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.stmt) and not hasattr(node, "body")]


def broken_by(patch, source):
    """Numbers of the equations whose tagged statements a fault changes, or that it names."""
    found, tagged = numbers(patch.about), tags(source)
    if patch.file != "common.py":
        for line in changed_lines(patch, source):
            for first, last in statements(source):
                if first <= line <= last:
                    found |= set().union(*(tagged.get(n, ()) for n in range(first, last + 1)))
    return found


def kills(patch, tests):
    """Is one of these tests selected by the fault's `test:`, a pytest -k of words and "or"?"""
    return any(word in test for word in patch.test.split(" or ") for test in tests)


def listed():
    """[Equation] of lab/equations.txt as it stands; `UserError` with the line if it is wrong."""
    found, script, paper = [], None, None
    for number, line in enumerate((ROOT / "lab/equations.txt").read_text().splitlines(), 1):
        if head := re.fullmatch(r"(\w+)\.py: (.+)", line):
            script, paper = head.groups()
        elif (head := re.fullmatch(r"Eq\. \(([\d.]+)\): (.+)", line)) and script:
            found.append(Equation(script, paper, *head.groups()))
        elif (head := re.fullmatch(r"(test|fault|row|none): (.+)", line)) and found:
            key, value = head[1] + "s" * (head[1] in ("test", "fault")), head[2]
            setattr(found[-1], key, value.split() if key.endswith("s") else value)
        elif line and line[0] != "#":
            raise UserError(f"lab/equations.txt, line {number}: expected SCRIPT.py: PAPER, "
                            f"Eq. (n): WORDS, test:, fault:, row: or none:, found {line!r}")
    return found


def equations():
    """[Equation] with their places and all their faults."""
    found = listed()
    for e in found:
        source = (ROOT / f"{e.script}.py").read_text()
        e.places = [(f"{e.script}.py", n) for n, tag in tags(source).items() if e.number in tag]
        if e.row:
            file, inside = f"lab/rows/{e.script}.txt", False
            for n, line in enumerate((ROOT / file).read_text().splitlines(), 1):
                inside = line.startswith(f"row {e.row}:") or inside and line != ""
                if inside and line[0] == "+" and e.number in numbers(line):
                    e.places.append((file, n))
        e.faults = [p.name for p in load(e.script) if p.kind == "fault" and (
            p.name in e.faults or e.number in broken_by(p, source) and kills(p, e.tests))]
    return found


def page():
    """The text of docs/EQUATIONS.md."""
    found = equations()
    here = [e for e in found if not e.none]
    lines = ["# Equations", "",
             "Every numbered equation of the papers, file by file, with the lines that compute it, "
             "the tests that", "compare it with a plain transcription, and the planted faults: "
             "wrong lines that these tests must", "notice (`python -m lab.variants faults cut`). "
             f"{len(found)} entries, {len(here)} of them computed here, "
             f"{len({(e.script, t) for e in found for t in e.tests})} tests,",
             f"{len({(e.script, f) for e in found for f in e.faults})} faults. What a paper says "
             "without a number is tagged `Sec.` in its script.", "",
             "Written by `python -m lab.equations --write` from "
             "[lab/equations.txt](../lab/equations.txt), the tags in", "the scripts and "
             "[lab/rows](../lab/rows)."]
    for script in dict.fromkeys(e.script for e in found):
        own = [e for e in found if e.script == script]
        lines += ["", f"## {script}.py", "",
                  f"{own[0].paper}. Tests: [test_{script}.py](../tests/test_{script}.py).", ""]
        for e in own:
            where = ", ".join(f"[{Path(file).name}:{n}](../{file}#L{n})" for file, n in e.places)
            lines.append(f"- **Eq. ({e.number})**, {where or e.none}: {e.words}. "
                         + f"*Tests:* {', '.join(e.tests)}. " * bool(e.tests)
                         + f"*Faults that die:* {', '.join(e.faults)}." * bool(e.faults))
    return "\n".join(lines) + "\n"


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m lab.equations", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--write", action="store_true", help="write docs/EQUATIONS.md")
    if p.parse_args(argv).write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


if __name__ == "__main__":
    entry(main)
