"""A script and common.py, copied alone into an empty folder, train, resume and translate."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*flags):
        return subprocess.run([sys.executable, f"{script}.py", *map(str, flags)], cwd=fork,
                              env=clean, text=True, capture_output=True)

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
