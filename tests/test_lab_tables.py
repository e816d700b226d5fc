"""lab/tables.py: what is run with which flags, recorded, kept and continued; the verdicts."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from helpers import error_of

from lab import tables, variants
from lab.tables import Row, Series, Table, verdict

ROOT = Path(__file__).parent.parent
FAKE = '''import argparse, json, signal, sys, time
from pathlib import Path
p = argparse.ArgumentParser()
for flag in ("--steps", "--seed", "--sleep", "--fail-at"):
    p.add_argument(flag, type=int, default=0)
p.add_argument("--out")
p.add_argument("--device")
p.add_argument("--resume", action="store_true")
args = p.parse_args()
out, signs = Path(args.out), []
out.mkdir(parents=True, exist_ok=True)
for n in (signal.SIGINT, signal.SIGTERM):
    signal.signal(n, lambda *_: signs.append(1))
step = int((out / "last.pt").read_text()) if args.resume else 0
print("from step", step)
while step < args.steps:
    (out / "last.pt").write_text(str(step := step + 1))
    time.sleep(args.sleep / 1000)
    if signs:
        sys.exit(130)
    if step == args.fail_at:
        sys.exit("out of luck")
scores = [{"name": "error", "value": 1.5 * args.seed + 0.25, "better": "lower", "sd": 1,
           "trivial": {"copy": 9.0}}, {"name": "gain", "value": args.steps, "better": "higher"}]
(out / "result.json").write_text(json.dumps(
    {"method": "fake", "data": "toy", "steps": args.steps, "seconds": 36.0, "scores": scores}))
'''
VARIANTS = '''row worse: ten more
-scores = [{"name": "error", "value": 1.5 * args.seed + 0.25, "better": "lower", "sd": 1,
+scores = [{"name": "error", "value": 1.5 * args.seed + 10.25, "better": "lower", "sd": 1,

row slow: waits
flags: --sleep 20

row unlucky: fails
flags: --fail-at 3
'''


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A tree with a script that writes result.json, run from an empty folder; lab(rows, ...)."""
    root = tmp_path / "tree"
    (root / "lab/rows").mkdir(parents=True)
    (root / "fake.py").write_text(FAKE)
    (root / "common.py").write_text("""UserError = entry = pick_device = None
def write_whole(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
""")
    (root / "lab/rows/fake.txt").write_text(VARIANTS)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(variants, "ROOT", root)

    def table(*rows, **more):
        made = Table("fake", "Tab. 0", list(rows), "error", ["--steps", "20"], **more)
        monkeypatch.setattr(tables, "TABLES", {"fake.tab": made})
        return root

    return table


def run(*flags):
    return tables.main(["fake.tab", "--device", "cpu", *map(str, flags)])


# ---- measuring --------------------------------------------------------------------------------


def test_contents_of_a_result(lab):
    root = lab(Row("Full"), Row("Worse, by 10", "worse", ["--sleep", "1"]))
    run("--seeds", 3)
    folder = root / "lab/results/fake.tab"
    assert sorted(p.name for p in folder.iterdir()) == ["Full-3.json", "Worse_by_10-3.json"]
    record = json.loads((folder / "Worse_by_10-3.json").read_text())
    patched = tables.without_words(FAKE.replace("+ 0.25", "+ 10.25")) + tables.without_words(
        (root / "common.py").read_text())
    cpu = record.pop("cpu")
    assert isinstance(cpu, str) and cpu
    assert record == {
        "table": "fake.tab", "row": "Worse, by 10", "seed": 3, "steps": 20, "seconds": 36.0,
        "flags": ["--steps", "20", "--sleep", "1", "--device", "cpu"],
        "scores": [{"name": "error", "value": 14.75, "better": "lower", "trivial": {"copy": 9.0}},
                   {"name": "gain", "value": 20, "better": "higher", "trivial": {}}],
        "source": hashlib.sha256(patched.encode()).hexdigest()[:12],
        "torch": torch.__version__, "threads": 1}
    assert Path("runs/tables/fake.tab/Worse_by_10-3/last.pt").read_text() == "20"


def test_results_are_kept_and_again_forgets_them(lab, capsys):
    root = lab(Row("Full"))
    run("--seeds", 0)
    path = root / "lab/results/fake.tab/Full-0.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"seconds": 1}))
    run("--seeds", 0, 1)
    assert json.loads(path.read_text())["seconds"] == 1
    assert (path.parent / "Full-1.json").exists()
    assert "Measured with other" not in capsys.readouterr().out
    with open(root / "common.py", "a") as f:
        f.write("# newer words\n\n# ==== 2. Pictures\nx = 1\n")
    run("--seeds", 0, 1)
    assert "Measured with other" not in capsys.readouterr().out
    (root / "common.py").write_text("newer = 1\n")
    run("--seeds", 0, 1)
    assert "Measured with other code or flags than today's: Full seed 0, Full seed 1" in (
        capsys.readouterr().out)
    run("--seeds", 0, "--again")
    assert json.loads(path.read_text())["seconds"] == 36
    assert "from step 0" in Path("runs/tables/fake.tab/Full-0.log").read_text()
    assert capsys.readouterr().out.count("Measured with other") == 0


def test_equal_runs_are_made_once(lab, monkeypatch):
    """The same code, flags and seed in another table: its result counts; else it is run."""
    root = lab(Row("Full"), Row("The same"), Row("Longer", None, ["--sleep", "1"]))
    run("--seeds", 3, "--jobs", 1)
    folder = root / "lab/results/fake.tab"
    records = {p.stem: json.loads(p.read_text()) for p in folder.iterdir()}
    assert records["The_same-3"] == records["Full-3"] | {"row": "The same"}
    assert not Path("runs/tables/fake.tab/The_same-3.log").exists()
    assert Path("runs/tables/fake.tab/Longer-3.log").exists()
    monkeypatch.setattr(tables, "TABLES", tables.TABLES | {"fake.other": Table(
        "fake", "Tab. 1", [Row("Full again")], "error", ["--steps", "20"])})
    tables.main(["fake.other", "--device", "cpu", "--seeds", "3", "4"])
    again = json.loads((root / "lab/results/fake.other/Full_again-3.json").read_text())
    assert again == records["Full-3"] | {"table": "fake.other", "row": "Full again"}
    assert [p.name for p in Path("runs/tables/fake.other").glob("*.log")] == ["Full_again-4.log"]
    tables.main(["fake.other", "--device", "cpu", "--seeds", "3", "--again"])
    assert Path("runs/tables/fake.other/Full_again-3.log").exists()


def test_a_gpu_is_named(lab, monkeypatch, capsys):
    root = lab(Row("Full"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    tables.main(["fake.tab", "--device", "cuda:1", "--seeds", "0"])
    tables.main(["fake.tab", "--device", "cpu", "--seeds", "0", "1"])
    record = json.loads((root / "lab/results/fake.tab/Full-0.json").read_text())
    assert record["gpu"] == "GPU of cuda:1" and record["flags"][-1] == "cuda:1"
    assert "seeds 0 1, CPU and GPU of cuda:1, mean" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_unless_the_code_has_changed(lab):
    root = lab(Row("Full"))
    log = Path("runs/tables/fake.tab/Full-0.log")
    series = Series("fake.tab")
    source, flags = series.source(Row("Full"))

    def left_behind(key):
        log.with_suffix("").mkdir(parents=True, exist_ok=True)
        (log.with_suffix("") / "last.pt").write_text("7")
        log.write_text(key)

    for key, step in ((f"{source} {' '.join(flags)}\n", 7), (f"{source} --steps 30\n", 0),
                      (f"0123456789ab {' '.join(flags)}\n", 0), ("", 0)):
        left_behind(key)
        assert series.measure(Row("Full"), 0) is None
        assert log.read_text() == f"{source} {' '.join(flags)}\nfrom step {step}\n"
    assert (root / "lab/results/fake.tab/Full-0.json").exists()


def test_quick_is_a_tenth_and_kept_apart(lab, capsys):
    root = lab(Row("Full"))
    run("--seeds", 0, "--quick")
    assert not (root / "lab/results").exists()
    record = json.loads(Path("runs/tables/fake.tab-quick/Full-0.json").read_text())
    assert record["steps"] == 2 and record["flags"] == ["--steps", "2", "--device", "cpu"]
    assert "fake.py --steps 2, seeds 0" in capsys.readouterr().out


def test_a_failing_row_is_shown_and_the_others_go_on(lab, capsys):
    root = lab(Row("Bad luck", "unlucky"), Row("Full"), Row("Odd", flags=["--no-such-flag"]),
               claims=[("Full", "Bad luck", "luck helps")])
    with pytest.raises(SystemExit) as stop:
        run("--seeds", 0, "--jobs", 1)
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert "Bad luck, seed 0: exit code 1" in err and "out of luck" in err
    assert "unrecognized arguments: --no-such-flag" in err and "Traceback" not in err
    assert [p.name for p in (root / "lab/results/fake.tab").iterdir()] == ["Full-0.json"]
    assert "| Bad luck (not run) |" in out and "- not run: luck helps (Full before Bad luck" in out


def test_ctrl_c_leaves_whole_results_and_the_same_command_goes_on(lab, tmp_path):
    """By a signal to the runner alone: it hands it on, and waits while the scripts save."""
    root = lab(Row("Full"), Row("Slow", "slow"))
    code = f"""
import sys; sys.modules["torch"] = type(sys)("torch"); sys.modules["torch"].__version__ = "2"
from lab import tables as t, variants as v
v.ROOT = v.Path({str(root)!r})
t.TABLES = {{"fake.tab": t.Table("fake", "", [t.Row("Full"), t.Row("Slow", "slow")], "error",
                                 ["--steps", "100"])}}
t.main(["fake.tab", "--seeds", "0", "--device", "cpu"])
"""
    log, result = Path("runs/tables/fake.tab/Slow-0.log"), root / "lab/results/fake.tab/Slow-0.json"
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{ROOT}"}
    child = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE)
    last, deadline = log.with_suffix("") / "last.pt", time.monotonic() + 30
    while not (last.exists() and last.read_text() > "0") and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    err = child.communicate(timeout=30)[1].decode()
    assert child.returncode != 0 and "stopped; the same command goes on" in err
    assert not result.exists() and not list(root.rglob("*.tmp"))
    step = int(last.read_text())
    assert 0 < step < 100
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0
    assert json.loads(result.read_text())["steps"] == 100
    assert log.read_text().splitlines()[1:] == ["from step 0", f"from step {step}"]


def test_user_errors_are_one_line(lab, capsys):
    root = lab(Row("Full"), Row("Worse", "worse"), Row("Lost", "lost"))
    assert "no variant 'lost', found worse, slow" in error_of(capsys, tables.main, "fake.tab")
    assert "no table 'other', found fake.tab" in error_of(capsys, tables.main, "other")
    lab(Row("Full"), Row("Worse", "worse"))
    (root / "fake.py").write_text("print('rewritten')\n")
    assert "row worse no longer applies" in error_of(capsys, tables.main, "fake.tab")
    assert not Path("runs").exists()  # said before anything is trained


# ---- reporting --------------------------------------------------------------------------------


@pytest.mark.parametrize("better, worse, direction, expected", [
    ([1, 2, 3], [4, 5, 6], "lower", "shows"), ([1, 2, 3], [4, 5, 6], "higher", "does not show"),
    ([1, 2, 4], [3, 5, 6], "lower", "undecided"), ([1, 2, 3], [3, 5, 6], "lower", "undecided"),
    ([4, 5, 6], [3, 2, 1], "higher", "shows"), ([], [1, 2, 3], "lower", "not run"),
    ([1, 2, float("nan")], [4, 5, 6], "lower", "undecided"),
    ([float("nan"), 1, 2], [4, 5, 6], "lower", "undecided"),
    ([1, 2, 3], [float("nan"), 5, 6], "lower", "undecided")])
def test_verdict(better, worse, direction, expected):
    assert verdict(better, worse, direction) == expected


def test_markdown(lab, capsys):
    lab(Row("Full", paper={"FID": 45.5}), Row("Worse", "worse", paper={"IoU": 0.1}),
        claims=[("Full", "Worse", "ten is much"), ("Worse", "Full", "or not"),
                ("Full", "Worse", "it gains", "gain")])
    run()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "fake.tab, Tab. 0: fake.py --steps 20, seeds 0 1 2, CPU, mean (least to most); (lower), "
        "(higher): which is better", "",
        "| row | error (lower) | gain (higher) | paper: FID | paper: IoU |",
        "|---|---|---|---|---|",
        "| Full | 1.75 (0.25 to 3.25) | 20 (20 to 20) | 45.5 |  |",
        "| Worse | 11.8 (10.2 to 13.2) | 20 (20 to 20) |  | 0.1 |",
        "| copy | 9 |  |  |  |", "",
        "- shows, by chance 1 in 20: ten is much (Full before Worse, error)",
        "- does not show, by chance 1 in 20: or not (Worse before Full, error)",
        "- undecided: it gains (Full before Worse, gain)"]
    tables.main([])
    assert capsys.readouterr().out.splitlines() == [
        "fake.tab  Tab. 0; 6 results, 0.1 hours", "    Full: seeds 0 1 2", "    Worse: seeds 0 1 2"]


# ---- the tables themselves --------------------------------------------------------------------


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_are_sound(name):
    table, series = tables.TABLES[name], Series(name, quick=True)
    labels = [row.label for row in table.rows]
    assert name.startswith(f"{table.script}.") and (
        "--steps" in table.flags or name.endswith(".toy"))
    assert len({series.files(row, 0)[0].name.lower() for row in table.rows}) == len(labels)
    for better, worse, words, *score in table.claims:
        assert better in labels and worse in labels and better != worse and words and len(score) < 2


@pytest.mark.parametrize("name, row", [
    pytest.param(name, row, id=f"{name}-{row.label}")
    for name, table in tables.TABLES.items() for row in table.rows])
def test_rows_flags_are_flags_of_the_patched_script(name, row):
    script = tables.TABLES[name].script
    module = types.ModuleType(script)
    module.__file__ = f"{script}.py"
    source = variants.sources(script, row.variant)[0][f"{script}.py"]
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    args = module.get_args([*Series(name).source(row)[1], "--out", "x"])
    assert args.data in ("toy", "toy-multiple", "mnist-single")


def test_the_hours_that_are_left_go_by_steps(lab, capsys, monkeypatch):
    """A table of 20 steps takes a tenth of the toy run's time, which has 200."""
    lab(Row("Full"), Row("Worse", "worse"))
    monkeypatch.setitem(tables.TABLES, "fake.toy", Table("fake", "toy", [Row("default")], ""))
    folder = Series("fake.toy").results
    folder.mkdir(parents=True)
    (folder / "default-0.json").write_text(json.dumps(
        {"row": "default", "seed": 0, "seconds": 36000, "steps": 200}))
    tables.main([])
    assert "6 of three seeds are left, about 6.0 hours" in capsys.readouterr().out
