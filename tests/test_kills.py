"""Killed anywhere, at any time, a training loses nothing: kills.py says how."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import test_common as t
from test_fork import FORKS, draw

from lab import tables, toy, variants

FILE = Path(kills.__file__)
TINY = ["--workers", "0", "--device", "cpu", "--log-every", "1", "--sample-every", "1"]


def main(argv):
    """What kills.py runs as the script test_kills: a toy world is drawn, a line learns."""
    p = argparse.ArgumentParser()
    p.add_argument("--out")
    p.add_argument("--resume", action="store_true")
    args = p.parse_args(argv)
    folder = toy.ensure("horse2zebra_single", 16, n=1)
    assert toy.disk.is_complete(folder, toy.disk.describe("horse2zebra_single", 1, 16, 0))
    run = t.tiny_run(args.out, 8, log_every=1, grid_every=1, resume=args.resume)
    run.finish([{"name": "error", "value": float(run.parts["G"].bias), "better": "lower"}])


def killed(tmp_path, script, times, *flags):
    """AssertionError unless so many kills leave what none leaves."""
    done = subprocess.run(
        [sys.executable, FILE, script, tmp_path / script, *map(str, (times, *flags))], text=True,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout, end="")
    assert done.stdout.startswith(f"{script}: {times} kills")


def test_ten_kills_of_a_small_training(tmp_path):
    killed(tmp_path, "test_kills", 10)


@pytest.mark.parametrize("fault", [
    ("    os.replace(scratch, path)", "    Path(path).write_bytes(scratch.read_bytes())"),
    (" and int(n[0]) <= self.step", "")])
@pytest.mark.slow
def test_the_kills_find_what_would_lose_something(tmp_path, fault):
    """Files written in place, rows written twice: planted into a copy."""
    for folder in ("tests", "lab"):
        (tmp_path / folder).symlink_to(FILE.parent.parent / folder)
    (tmp_path / "copy").mkdir()
    text = (FILE.parent.parent / "common.py").read_text()
    assert text.count(fault[0]) == 1
    (tmp_path / "copy/common.py").write_text(text.replace(*fault))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path / 'copy')!r}, "
         f"{str(FILE.parent)!r}]; import common, kills; kills.main(*sys.argv[1:])", "test_kills",
         tmp_path / "runs", "120"], text=True, capture_output=True)
    assert done.returncode == 1 and "test_kills: " in done.stderr, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", FORKS)
def test_twenty_kills_of_every_script(tmp_path, script):
    """At file operations all over a run, in all its stages, and at random."""
    layout, tiny, _, _ = FORKS[script]
    draw(tmp_path / "data", layout)
    flags = ["--steps", "6", *tiny.split(), *TINY]
    if script == "swapae":
        flags += ["--R1-every", "4"]
    if script == "egscit":
        flags += ["--pretrain", "3"]
    killed(tmp_path, script, 20, "--data", tmp_path / "data", *flags)


@pytest.mark.slow
def test_ten_kills_of_a_table(tmp_path, monkeypatch):
    """python -m lab.tables at its file operations; its child dies with it, as when power is cut."""
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "data", "unpaired")
    flags = ["--data", str(tmp_path / "data"), "--steps", "4", *FORKS["cut"][1].split(), *TINY]
    row = tables.Row("CUT")
    monkeypatch.setitem(tables.TABLES, "x", tables.Table("cut", "", [row], "error", flags))

    def series(name):
        made = tables.Series("x")
        made.results = tmp_path / name / "results"
        made.folder = tmp_path / name / "runs"
        return made

    def measure(name, operation=None):
        def body():
            started = variants.start

            def start(*given, **how):
                child = started(*given, **how)
                (tmp_path / "child").write_text(str(child.pid))
                return child
            variants.start = start
            kills.watch(tmp_path / name, operation)
            assert series(name).measure(row, 0) is None
        (tmp_path / "child").unlink(missing_ok=True)
        code = kills.forked(body)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if code:
                os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
        return code

    assert measure("whole") == 0
    codes = [measure("run", 1 + i) for i in range(10)]
    assert codes.count(-signal.SIGKILL) >= 5 and set(codes) <= {0, -signal.SIGKILL}
    assert measure("run") == 0
    assert not kills.differences(tmp_path / "whole/runs/CUT-0", tmp_path / "run/runs/CUT-0")
    one, two = (json.loads((tmp_path / name / "results/CUT-0.json").read_text()) | {"seconds": 0}
                for name in ("whole", "run"))
    assert one == two and not [*tmp_path.rglob("*.tmp")]
