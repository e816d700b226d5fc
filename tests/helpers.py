"""What the tests of several scripts share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common


def noise_folder(folder):
    """trainA, trainB, testA, testB with four small noise pictures each, darker in B."""
    rng = np.random.default_rng(0)
    for split in ("trainA", "trainB", "testA", "testB"):
        (folder / split).mkdir(parents=True)
        for i in range(4):
            low, high = (0, 160) if split.endswith("B") else (90, 256)
            noise = rng.integers(low, high, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / split / f"{i}.png")
    return folder


def odd_pictures(folder):
    """One file per mode that users bring; returns {stem: size as seen upright}."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (33, 50), dtype=np.uint8)
    rgb = rng.integers(0, 256, (45, 31, 3), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey[:1, :2]).save(folder / "tiny.png")
    Image.fromarray(rgb).save(folder / "odd.png")
    Image.fromarray(np.dstack([rgb, rgb[..., 0]])).save(folder / "rgba.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.fromarray(rgb).save(folder / "turned.jpg", exif=exif)
    return {"grey": (50, 33), "tiny": (2, 1), "odd": (31, 45), "rgba": (31, 45), "deep": (50, 33),
            "turned": (45, 31)}


def error_of(capsys, main, *flags):
    """The one-line error of main(flags), checked for exit code 2 and the absence of a traceback."""
    with pytest.raises(SystemExit) as stop:
        common.entry(lambda: main([*map(str, flags)]))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    assert ": error: " in lines[-1]
    return lines[-1]


def interrupted(script, train, step=2):
    """Run train() with Ctrl-C coming in the given training step of the script (a module)."""
    original, calls = script.train_step, []

    def train_step(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), 2)
        return original(*args)

    script.train_step = train_step
    try:
        with pytest.raises(KeyboardInterrupt):
            train()
    finally:
        script.train_step = original
    assert len(calls) == step


def two_processes(script, *flags):
    """Run a script, ours or one of a test, under torchrun with two processes; returns its output.
    """
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(root / script), *map(str, flags)], cwd=root, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_moved_alike(start, one, two, names, share):
    """From the networks `start`, two runs' last.pt moved to the same place, but for rounding."""
    one, two = (torch.load(path, weights_only=True)["parts"] for path in (one, two))
    for net in names:
        moved, apart = 0.0, 0.0
        for key, was in getattr(start, net).state_dict().items():
            if "bias" not in key:  # a bias before a norm gets rounding errors for a gradient
                moved += float((one[net][key] - was).abs().sum())
                apart += float((one[net][key] - two[net][key]).abs().sum())
        assert moved > 0 and apart < share * moved, net


def assert_same(a, b):
    """Two nested structures of a checkpoint are bit-identical."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
