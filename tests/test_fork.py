"""A script and common.py, copied alone into an empty folder, train, resume and translate."""
import csv
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lab import variants

ROOT = Path(__file__).resolve().parents[1]
ALL = ["--workers", "0", "--device", "cpu", "--log-every", "1", "--sample-every", "1"]
EXEMPLAR = ["--exemplar", "{data}/testB/1.png"]
# script: the layout of its pictures, tiny flags, what to translate, flags that it needs for that
FORKS = {
    "cut": ("unpaired", "--size 32 --load 36 --ngf 4 --ndf 4 --blocks 4 --patches 16", "testA", []),
    "sincut": ("single", "--size 64 --tile 32 --ngf 1 --ndf 1 --scale 64 80 --batch 3", "trainA",
               []),
    "cyclegan": ("unpaired", "--size 32 --load 36 --ngf 4 --ndf 4 --blocks 2", "testA", []),
    "cycada": ("adaptation", "--size 32 --load 40 --ngf 4 --ndf 4 --blocks 1 --task-model small "
               "--task-weights random --task-load 36 --task-size 32 --task-batch 2 --task-steps 2 "
               "--feature-steps 2 --classes sky road car", "test_img", []),
    "spade": ("labelled", "--size 32 --load 36 --ngf 4 --ndf 4 --hidden 6 --z 5 "
              "--labels 4 --batch 2 --lambda-vgg 0", "test_label", []),
    "pix2pixsc": ("labelled", "--size 32 --ngf 2 --ndf 2 --blocks 1 --downs 2 --batch 2 --labels 4 "
                  "--vgg random --vgg-layers 3", "test_label",
                  ["--exemplar", "{data}/test_img/a_1.png", "--exemplar-label",
                   "{data}/test_label/a_1.png"]),
    "swapae": ("unpaired", "--size 32 --downs 2 --texture 16 --widths 0.125 0.0625 0.015625 0.0625 "
               "--patch 8 --crops 3 --batch 4", "testA", EXEMPLAR),
    "egscit": ("unpaired", "--size 32 --height 16 --ngf 4 --ndf 4 --blocks 1 --downs 1 "
               "--pretrain 1 --g-updates 2 --vgg random", "testA", EXEMPLAR),
    "segin": ("sketches", "--size 32 --ngf 4 --ndf 4 --downs 2 --batch 2 --vgg random "
              "--match-layer relu2_1", "test_sketch", ["--exemplar", "{data}/test_img/1.png"]),
    "init": ("unpaired", "--size 32 --load 36 --object-size 16 --ngf 4 --ndf 4 --blocks 1 "
             "--style-dim 3 --dis-layers 2 --dis-scales 2", "testA", []),
}
LAYOUTS = {
    "unpaired": ["trainA", "trainB", "testA", "testB"],
    "single": ["trainA", "trainB"],
    "adaptation": ["source_img", "source_label", "target_img"],
    "labelled": ["train_img", "train_label", "test_img", "test_label"],
    "sketches": ["train_sketch", "train_img", "test_sketch", "test_img"],
}


CLEAN = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}


def draw(root, layout):
    """Noise in the layout of a script: pictures of 80 x 72, label maps of 0, 1, 2."""
    rng = np.random.default_rng(0)
    for folder in LAYOUTS[layout] + ["test_img", "test_label"] * (layout == "adaptation"):
        (root / folder).mkdir(parents=True)
        for i in range(1 if layout == "single" else 4):
            if "label" in folder:
                array = np.kron(rng.integers(0, 3, (9, 10)), np.ones((8, 8))).astype(np.uint8)
            else:
                array = rng.integers(0, 256, (72, 80, 3), dtype=np.uint8)
            name = f"{'ab'[i // 2]}_{i % 2}" if layout == "labelled" else i
            Image.fromarray(array).save(root / folder / f"{name}.png")
    boxes = {f"{side}/{i}.png": [{"box": [10, 8, 60, 50]}] for side in LAYOUTS[layout][:2]
             for i in range(4)}
    (root / "boxes.json").write_text(json.dumps(boxes))  # init.py alone reads it


def test_every_script_is_in_the_table():
    methods = {path.stem for path in ROOT.glob("*.py") if "base_parser" in path.read_text()}
    assert methods - {"common"} <= set(FORKS)


@pytest.mark.parametrize("script", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "cut")) for name in FORKS])
def test_fork(script, tmp_path):
    if not (ROOT / f"{script}.py").exists():
        pytest.skip(f"there is no {script}.py")
    layout, tiny, source, needed = FORKS[script]
    fork, data = tmp_path / "fork", tmp_path / "data"
    fork.mkdir()
    for name in (f"{script}.py", "common.py"):
        shutil.copy(ROOT / name, fork)
    draw(data, layout)

    def run(*flags):
        return subprocess.run([sys.executable, f"{script}.py", *map(str, flags)], cwd=fork,
                              env=CLEAN, text=True, capture_output=True)

    def succeeds(*flags):
        done = run(*flags)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    toy = run()
    line = f"{script}.py: error: --data toy needs the folder lab/ of the repository"
    assert (toy.returncode, toy.stderr.strip().splitlines()[-1]) == (2, line)
    assert "Traceback" not in toy.stderr
    assert sorted(f.name for f in fork.iterdir()) == sorted(["common.py", f"{script}.py"])

    flags = ["--data", data, *tiny.split(), *ALL, "--out", "run"]
    stages = ["--stage", "source", "pixel", "task"] if script == "cycada" else []
    succeeds(*flags, "--steps", 2, *stages[:2])
    succeeds(*flags, "--steps", 3, *stages, "--resume")
    saved = list((fork / "run").rglob("last.pt"))
    assert 3 in [torch.load(f, weights_only=True)["step"] for f in saved]
    assert list((fork / "run").rglob("samples/step_*.png"))
    assert list((fork / "run").rglob("log.csv")) and not list((fork / "run").rglob("index.html"))

    weights = fork / "run/last.pt" if (fork / "run/last.pt").exists() else saved[0]
    picture = sorted((data / source).iterdir())[0]
    succeeds("--translate", picture, "--weights", weights, "--out", "painted", "--device", "cpu",
             *[flag.format(data=data) for flag in needed])
    painted = list((fork / "painted").rglob("*.png"))
    assert painted and Image.open(painted[0]).size == (80, 72)


# ---- docs/fork.md -----------------------------------------------------------------------------


def test_the_worked_fork_trains_alone_and_is_cut_where_its_loss_weighs_nothing(tmp_path):
    """The patch of docs/fork.md, on cut.py and common.py in an empty folder: 20 steps."""
    draw(tmp_path / "data", "unpaired")
    logs = {}
    for name, variant, steps, weight in (("fork", "relations", 20, ["--lambda-R", "2"]),
                                         ("off", "relations", 3, ["--lambda-R", "0"]),
                                         ("cut", None, 3, [])):
        folder = tmp_path / name
        folder.mkdir()
        for file, text in variants.sources("cut", variant)[0].items():
            (folder / file).write_text(text)
        flags = ["--data", tmp_path / "data", *FORKS["cut"][1].split(), *ALL, "--out", "run",
                 "--sample-every", "20", "--steps", steps, *weight]
        done = subprocess.run([sys.executable, "cut.py", *map(str, flags)], cwd=folder, env=CLEAN,
                              text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-3000:]
        with open(folder / "run/log.csv") as file:
            logs[name] = list(csv.DictReader(file))
    assert len(logs["fork"]) == 20 and all(float(row["L_R"]) > 0 for row in logs["fork"])
    for name in ("L_D", "L_GAN", "NCE_X", "NCE_Y"):
        off, cut = ([row[name] for row in logs[log]] for log in ("off", "cut"))
        assert off == cut
        assert logs["fork"][2][name] != cut[2]  # and where it weighs something, it acts


def test_relations_of_one_picture_with_itself_are_kept():
    """relation_loss against its definition, one row of similarities at a time."""
    fork = types.ModuleType("fork")
    exec(compile(variants.sources("cut", "relations")[0]["cut.py"], "fork.py", "exec"),
         fork.__dict__)
    torch.manual_seed(0)
    z, z_hat = ([torch.nn.functional.normalize(torch.randn(2, S, 8).double(), dim=2)
                 for S in (5, 3)] for _ in "ab")
    total = 0.0
    for v, v_hat in zip(z, z_hat, strict=True):
        rows = [(torch.softmax(v[b] @ v[b, s] / 0.5, 0), torch.softmax(v_hat[b] @ v_hat[b, s] / 0.5,
                                                                      0))
                for b in range(2) for s in range(v.shape[1])]
        total += sum((p * (p.log() - q.log())).sum() for p, q in rows) / len(rows) / 2
    assert fork.relation_loss(z_hat, z, 0.5).item() == pytest.approx(total.item())
    assert fork.relation_loss(z, z, 0.5).item() == pytest.approx(0, abs=1e-12)


def test_fork_md_shows_the_patch():
    text = (ROOT / "docs/fork.md").read_text()
    patch = next(p for p in variants.load("cut") if p.name == "relations")
    for line in [line for hunk in patch.hunks for line in hunk if line[1:].strip()]:
        assert line in text.split("\n"), line
