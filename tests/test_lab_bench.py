"""lab.bench: what it measures, in which order, and beside another checkout."""
import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from common import UserError
from lab import bench

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = '''
import argparse
import time
from types import SimpleNamespace
import torch

def get_args(flags):
    p = argparse.ArgumentParser()
    for name in ("--size", "--batch"):
        p.add_argument(name, type=int)
    for name in ("--data", "--device", "--mode", "--log"):
        p.add_argument(name)
    for name in ("--amp", "--compile", "--channels-last"):
        p.add_argument(name, action=argparse.BooleanOptionalAction, default=False)
    return p.parse_args(flags)

def build(args, device):
    print("built")  # a script may print
    return SimpleNamespace(G=torch.nn.Conv2d(3, 4, 3, bias=False), opt_G=None)

def train_step(nets, x, y, args, rng{more}):
    assert isinstance(rng, torch.Generator) and x.shape == (args.batch, 3, args.size, args.size)
    assert -1 <= x.min() < -0.5 and 0.5 < y.max() <= 1 and x.device.type == "cpu"
    nets.G(x).sum().backward()
    time.sleep({sleep})
    open("steps.txt", "a").write("{name} ")
'''


def checkout(folder, name, sleep, more=""):
    folder.mkdir()
    (folder / "cut.py").write_text(SCRIPT.format(name=name, sleep=sleep, more=more))
    (folder / "common.py").write_text("import torch\ndef pick_device(name):\n"
                                      "    return torch.device(name or 'cpu')\n")
    return folder


@pytest.fixture(scope="module")
def two_sides(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("bench")
    sides = [checkout(tmp / "a", "a", 0.0), checkout(tmp / "b", "b", 0.05, ", average=None")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp)
        flags = ["--data", ".", "--size", "32", "--batch", "2"]
        return bench.measure(sides, "cut", flags, 3), (tmp / "steps.txt").read_text().split()


def test_both_sides_step_in_turn(two_sides):
    rows, steps = two_sides
    assert steps == ["a", "b"] * 5  # one to warm up, three timed, one whose operations are counted
    assert [len(row["seconds"]) for row in rows] == [3, 3]
    assert min(rows[1]["seconds"]) >= 0.05 > rows[0]["s"]


def test_what_a_row_holds(two_sides):
    for row in two_sides[0]:
        forward = 2 * 2 * 3 * 4 * 9 * 30 * 30  # multiply-adds, twice; backward: the weights' alone
        assert row["tflop"] * 1e12 == pytest.approx(2 * forward)
        assert row["params"] == {"G": 3 * 4 * 9} and row["batch"] == 2
        assert row["mib"] > 50 and row["ceiling"] > 0 and row["threads"] >= 1
        assert row["hardware"] and row["torch"] == torch.__version__
        json.dumps(row)


def test_peak_memory_is_read_before_operations_are_counted(monkeypatch):
    step, order = bench.Step.__new__(bench.Step), []
    step.device, step.nets = torch.device("cpu"), argparse.Namespace()
    step.args = argparse.Namespace(batch=1, amp=False, compile=False)
    monkeypatch.setattr(bench, "peak_mib", lambda _: order.append("peak") or 1.0)
    monkeypatch.setattr(bench, "ceiling", lambda *_: 1.0)
    monkeypatch.setattr(step, "run", lambda: order.append("step"))
    step.facts()
    assert order == ["peak", "step"]
    step.args.compile = True  # the counter sees nothing in compiled code
    assert step.facts()["tflop"] is None and order == ["peak", "step", "peak"]


def test_a_script_that_fails_is_one_error(tmp_path, capfd):
    side = checkout(tmp_path / "a", "a", 0)
    with pytest.raises(ValueError, match=r"cut\.py --mode: failed, see above"):
        bench.measure([side], "cut", ["--mode"], 1)
    assert "expected one argument" in capfd.readouterr().err


def test_the_command_line(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(roots, script, flags, steps):
        asked.append((roots, script, flags, steps))
        row = {"s": 0.5, "batch": 2, "mib": 300.0, "tflop": None if "--compile" in flags else 0.1,
               "params": {"G": 1_500_000}, "ceiling": 0.4, "seconds": (0.5, 0.25)}
        return [row] + [row | {"s": 1.0, "seconds": (1.0, 1.0), "mib": 200.0}] * (len(roots) - 1)
    monkeypatch.setattr(bench, "measure", measure)
    side = checkout(tmp_path / "a", "a", 0)
    monkeypatch.setattr(sys, "argv", [
        "bench", "cut", "--modes", "fp32", "amp+compile", "--size", "64", "--against", str(side),
        "--no-channels-last", "--json", str(tmp_path / "rows"), "--steps", "2"])
    bench.main()
    assert [flags for *_, flags, _ in asked] == [
        [*flags, "--data", ".", "--size", "64", "--batch", "1", *mode, "--no-channels-last"]
        for _, flags in bench.ROWS["cut"] for mode in ([], ["--amp", "--compile"])]
    assert {(*roots, steps) for roots, _, _, steps in asked} == {(ROOT, side, 2)}
    head, _, row, compiled, *_ = capsys.readouterr().out.splitlines()
    assert head.count("|") == row.count("|")
    assert row == ("| CUT | fp32 | 0.5 | 4 | 300 | 0.100 | 0.2 | G 1.50 M | 0.4 "
                   "| 1 | 0.50, 0.25 | 0.38 | 200 | 1.50 |")
    assert compiled.startswith("| CUT | amp+compile | 0.5 | 4 | 300 | 0.100 | 0.2 |")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(rows) == 8 and rows[0]["name"] == "CUT" and rows[2]["mode"] == "amp+compile"


def test_an_unknown_method_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "horse"])
    with pytest.raises(UserError, match="no such method: horse; known: cut, sincut"):
        bench.main()


@pytest.mark.parametrize("script", [
    script for script in bench.ROWS if (ROOT / f"{script}.py").exists()])
def test_the_flags_of_every_row_are_the_scripts(script):
    for _, flags in bench.ROWS[script]:
        args = importlib.import_module(script).get_args([*flags, "--data", "."])
        assert Path(args.data).resolve() == Path.cwd()


def test_cycadas_labeller_is_fixed_as_in_training():
    step = bench.Step("cycada", ["--data", ".", "--lambda-sem", "1", "--task-model", "small",
                                 "--task-weights", "random", "--size", "32", "--d-layers", "2",
                                 "--ngf", "2", "--ndf", "2", "--blocks", "1", "--device", "cpu"])
    step.run()
    assert not step.nets.f_S.training
    assert all(p.grad is None and not p.requires_grad for p in step.nets.f_S.parameters())
