"""docs/EQUATIONS.md: every numbered equation has its line, its tests and its faults."""

import ast
import re
from pathlib import Path

import pytest

from lab import equations, variants
from lab.equations import UserError

ROOT = Path(__file__).parent.parent
FOUND = equations.equations()
SCRIPTS = list(dict.fromkeys(e.script for e in FOUND))
# How many the texts have; the texts themselves are not in this repository.
COUNTS = {("spade",): ("2.", 3), ("cyclegan", "cut", "cycada"): ("3.", 15), ("swapae",): ("4.", 4),
          ("pix2pixsc",): ("", 8), ("segin",): ("", 11), ("egscit",): ("", 5), ("init",): ("", 4)}


def of(*scripts):
    return [e for e in FOUND if e.script in scripts]


@pytest.mark.parametrize("scripts", COUNTS)
def test_every_number_of_every_paper_is_listed_once(scripts):
    prefix, count = COUNTS[scripts]
    assert [e.number for e in sorted(of(*scripts), key=lambda e: float(e.number.split(".")[-1]))
            ] == [f"{prefix}{n}" for n in range(1, count + 1)]
    assert {e.number for e in of("sincut")} == {e.number for e in of("cut")}
    assert {*SCRIPTS} == {p.stem for p in ROOT.glob("*.py")} - {"common"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_tags_and_list_agree(script):
    source = (ROOT / f"{script}.py").read_text()
    tagged = set().union(*equations.tags(source).values())
    assert tagged == {e.number for e in of(script) if not e.row and not e.none}
    assert equations.numbers(source) <= tagged  # what the docstring says is on a line, too
    for e in of(script):
        assert bool(e.places) != bool(e.none), e


@pytest.mark.parametrize("script", SCRIPTS)
def test_named_tests_and_faults_exist_and_belong_together(script):
    tree = ast.parse((ROOT / f"tests/test_{script}.py").read_text())
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    faults = {p.name: p for p in variants.load(script) if p.kind == "fault"}
    for e in of(script):
        assert set(e.tests) <= tests and all(t.startswith("test_") for t in e.tests), e.number
        assert bool(e.tests) != bool(e.none) and len(e.tests) == len(set(e.tests)), e.number
        for name in e.faults:
            assert equations.kills(faults[name], e.tests), f"{e.number}: {name}"
        # a row is a patch itself, which no fault can be planted in
        assert e.faults or e.row or e.none, f"{script}.py, Eq. ({e.number}): no fault breaks it"
    for e in equations.listed():
        assert e.script != script or set(e.faults) <= set(faults), e.number


def test_the_page_is_what_would_be_written():
    assert equations.PAGE.read_text(encoding="utf-8") == equations.page(), \
        "python -m lab.equations --write"


def test_tags_are_behind_code_and_broken_statements_are_found():
    source = ("x = 1  # no term of Eq. (9)\n# Eq. (8): a heading\ny = f(x,\n      2)"
              "  # Eq. (1), (2)\nz = 3  # h: Eq. (3)\n")
    assert equations.tags(source) == {4: {"1", "2"}, 5: {"3"}}
    patch = variants.Patch("fault", "f", "Eq. (7) left out", file="a.py", hunks=[["-y = f(x,"]])
    assert equations.broken_by(patch, source) == {"1", "2", "7"}
    patch.file = "common.py"
    assert equations.broken_by(patch, source) == {"7"}


def test_a_mistake_in_the_list_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "lab").mkdir()
    monkeypatch.setattr(equations, "ROOT", tmp_path)
    for text, line in (("Eq. (1): before a script", 1), ("a.py: A\nEq. 1: no brackets", 2),
                       ("a.py: A\nEq. (1): b\ntests: t", 3)):
        (tmp_path / "lab/equations.txt").write_text(text)
        with pytest.raises(UserError, match=f"lab/equations.txt, line {line}: expected"):
            equations.listed()
    monkeypatch.undo()
    equations.main([])
    out = capsys.readouterr().out
    assert out == equations.page()
    assert len(re.findall(r"^- \*\*Eq\. \(", out, re.MULTILINE)) == len(FOUND)
