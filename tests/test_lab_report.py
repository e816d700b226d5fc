"""lab/report.py: the committed pages are what the results say, and say it rightly."""

import json

import pytest

from common import UserError
from lab import report, tables, variants
from lab.tables import Row, Table


def test_pages_are_not_stale():
    """`python -m lab.tables --write` was run after the last result, text or line of a script."""
    for path, text in report.pages().items():
        assert path.read_text(encoding="utf-8") == text, path.name


def test_every_table_and_script_is_in_the_results():
    assert set(report.ORDER) == set(report.METHODS) == {t.script for t in tables.TABLES.values()}
    text = report.results()
    for name in tables.TABLES:
        assert text.count(f"### `python -m lab.tables {name}`") == 1


def record(folder, seed, value, better="lower"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"default-{seed}.json").write_text(json.dumps({
        "row": "default", "seed": seed, "seconds": 120 + 60 * seed, "steps": 7, "source": "x",
        "flags": ["--device", "cpu"], "scores": [{"name": "error", "value": value, "better": better,
                                                  "trivial": {"copy": 4.0, "paint": 2.0}}]}))


@pytest.mark.parametrize("better, values, beaten, best", [
    ("lower", (1.0, 1.5), True, ("paint", 2.0)), ("lower", (1.0, 2.0), False, ("paint", 2.0)),
    ("lower", (1.0, 3.0), False, ("paint", 2.0)), ("higher", (5.0, 6.0), True, ("copy", 4.0)),
    ("higher", (5.0, 3.0), False, ("copy", 4.0))])
def test_a_run_succeeds_if_every_seed_beats_every_painter(tmp_path, monkeypatch, better, values,
                                                          beaten, best):
    monkeypatch.setattr(tables.variants, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "TABLES", {
        f"{s}.toy": Table(s, "toy", [Row("default")], "") for s in report.ORDER})
    for seed, value in enumerate(values):
        record(tmp_path / "lab/results/cut.toy", seed, value, better)
    records = report.measured("cut.toy")["default"]
    assert report.against_painters(records) == ("error", sum(values) / 2, best, beaten)
    row = next(line for line in report.methods(dict.fromkeys(report.ORDER, 9)).splitlines()
               if "cut.py](cut" in line)
    assert f"error {sum(values) / 2:.3g} (2 seeds)" in row and f"; {best[0]} {best[1]:.3g} |" in row
    assert ("no success" in row) == (not beaten)
    assert "| 9 | 2 | error" in row  # lines, and the fastest run's minutes
    assert report.methods(dict.fromkeys(report.ORDER, 9)).count("not run") == 9


def test_a_painter_of_any_seed_counts():
    """As f_S of cycada.py, which is another one in each seed."""
    records = [{"scores": [{"name": "mIoU", "value": value, "better": "higher",
                            "trivial": {"source only": other, "oracle": 90}}]}
               for value, other in ((58, 29), (59, 58.5))]
    assert report.against_painters(records) == ("mIoU", 58.5, ("source only", 58.5), False)


def test_bench_rows(tmp_path):
    path = tmp_path / "bench.jsonl"
    assert report.bench(path) == ""
    row = {"name": "CUT", "mode": "fp32", "hardware": "a card", "threads": 1, "s": 2.0, "mib": 300,
           "tflop": None}
    path.write_text("".join(json.dumps(row | {"s": s, "tflop": t}) + "\n"
                            for s, t in ((2.0, None), (1.5, 0.25))))
    lines = report.bench(path).splitlines()
    assert lines[2:] == ["| a card | 1 | CUT | fp32 | 1.5 | 300 | 0.250 |"]


def test_readme_without_its_marks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "ROOT", tmp_path)
    monkeypatch.setattr(report, "results", str)
    for script in report.ORDER:
        (tmp_path / f"{script}.py").write_text("")
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(UserError, match="README.md"):
        report.pages()
