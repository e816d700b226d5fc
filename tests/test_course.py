"""docs/COURSE.md: its exercises are there, in their order; they and all rows of tables run."""

import csv
import re
import shlex
import types
from pathlib import Path

import pytest
from test_fork import ALL, FORKS, draw

from lab import variants

ROOT = Path(__file__).parent.parent
COURSE = (ROOT / "docs/COURSE.md").read_text(encoding="utf-8")
ORDER = "cyclegan cut sincut spade pix2pixsc segin egscit init swapae cycada".split()
RUNS = re.findall(r"`python -m lab\.variants run (\w+) ([\w.+-]+)([^`]*)`",
                  COURSE.replace("\n", " "))
EXERCISES = {(script, p.name): p for script in ORDER for p in variants.load(script)
             if p.kind == "exercise"}
ROWS = [(script, p.name) for script in ORDER for p in variants.load(script) if p.kind == "row"]


def test_methods_come_in_their_order_with_two_exercises_each():
    heads = re.findall(r"^### (\w+)\.py", COURSE, re.MULTILINE)
    assert heads == ORDER
    assert len(re.findall(r"^## Week \d", COURSE, re.MULTILINE)) == 6
    for script, part in zip(ORDER, re.split(r"^### ", COURSE, flags=re.MULTILINE)[1:], strict=True):
        own = [name for other, name, _ in RUNS if other == script and f"run {script} {name}" in
               part.replace("\n", " ")]
        assert len(set(own)) >= 2, script


def test_every_exercise_is_in_the_course_and_every_command_is_a_variant():
    assert set(EXERCISES) <= {(script, name) for script, name, _ in RUNS}
    for script, name, _ in RUNS:
        assert name in [p.name for p in variants.load(script)], f"{script} {name}"


@pytest.mark.slow
@pytest.mark.parametrize("script, name", dict.fromkeys([*((s, n) for s, n, _ in RUNS), *ROWS]))
def test_runs_a_few_steps(script, name, tmp_path, monkeypatch):
    """With the flags of the command and tiny networks, on noise."""
    layout, tiny, *_ = FORKS[script]
    draw(tmp_path / "data", layout)
    given = next((shlex.split(flags) for s, n, flags in RUNS if (s, n) == (script, name)), [])
    patch = next(p for p in variants.load(script) if p.name == name)
    own = {flag for flag in patch.flags if flag.startswith("--")}
    if "--data" in own:
        pytest.skip(f"{name} asks for a data set of its own")
    flags = shlex.split(tiny)
    for flag in own & set(flags):  # the exercise's own value is what it is about
        at = flags.index(flag)
        end = next((i for i in range(at + 1, len(flags)) if flags[i].startswith("--")), len(flags))
        del flags[at:end]
    if script == "cycada" and "--stage" in given:
        at = given.index("--stage")
        end = next((i for i in range(at + 1, len(given)) if given[i].startswith("--")), len(given))
        flags += given[at:end]
    run(tmp_path, monkeypatch, script, name, "--data", tmp_path / "data", *flags, *ALL,
        "--steps", 2)
    logs = [*(tmp_path / "run").rglob("log.csv")]
    assert logs or "oracle" in name  # this needs labels of the target, which are not drawn
    for log in logs:
        rows = csv.DictReader(log.read_text().splitlines())
        assert all(value not in ("nan", "inf") for row in rows for value in row.values())


@pytest.mark.slow
def test_the_hidden_message_is_scored_with_and_without_noise(tmp_path, monkeypatch, capsys):
    run(tmp_path, monkeypatch, "cyclegan", "hidden_message", "--steps", 1,
        *"--size 32 --ngf 4 --ndf 4 --blocks 1".split())
    stdout = capsys.readouterr().out
    for answer in ("F(y)", "F(G(x))", "F(G(x) + noise)"):
        assert re.search(rf"^{re.escape(answer)}: coat error: \d", stdout, re.MULTILINE)


def run(folder, monkeypatch, script, name, *flags):
    """A variant's main(), its runs and data sets in a folder."""
    texts, own = variants.sources(script, name)
    assert texts["common.py"] == (ROOT / "common.py").read_text()
    module = types.ModuleType(script)
    monkeypatch.chdir(folder)
    exec(compile(texts[f"{script}.py"], f"{script}.py", "exec"), module.__dict__)
    module.main([*own, *map(str, flags), "--out", "run", "--device", "cpu"])
