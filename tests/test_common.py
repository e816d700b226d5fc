"""What the scripts share: blocks against naive code, pictures, data sets, flags, runs."""
import argparse
import csv
import functools
import hashlib
import http.server
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import urllib.error
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_same
from PIL import Image

import common
from common import UserError

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
torch.set_num_threads(1)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Marker:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# ---- 1. blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("incoming", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_instance_norm_is_group_norm_in_every_layout(layout, incoming, batch):
    norm = common.InstanceNorm(4)
    assert not list(norm.parameters()) and not norm.state_dict()
    x = (noise(batch, 4, 3, 5) * 3 + 1).to(memory_format=layout).requires_grad_()
    truth = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    upstream = noise(batch, 4, 3, 5, seed=1).to(memory_format=incoming)
    out, expected = norm(x), F.group_norm(truth, 4)
    assert torch.allclose(out, expected, atol=1e-12)
    by_hand = x - x.mean((2, 3), keepdim=True)
    by_hand = by_hand / (by_hand.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(out, by_hand, atol=1e-12)
    out.backward(upstream)
    expected.backward(upstream.contiguous())
    # nn.InstanceNorm2d fails here for one picture and a channels-last incoming gradient
    assert torch.allclose(x.grad, truth.grad, atol=1e-12)


def test_no_script_uses_torchs_instance_norm():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/**/*.py")]:
        code = re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text(encoding="utf-8"))
        assert not re.search(r"\bInstanceNorm2d\b|F\.instance_norm", code), path


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (2, 3)])
def test_blur_down(size):
    x, (h, w) = noise(2, 3, *size), size
    out = torch.zeros(2, 3, (h + 1) // 2, (w + 1) // 2, dtype=x.dtype)

    def mirror(i, n):
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            for di, a in ((-1, 1), (0, 2), (1, 1)):
                for dj, b in ((-1, 1), (0, 2), (1, 1)):
                    out[:, :, i, j] += a * b / 16 * x[:, :, mirror(2 * i + di, h),
                                                      mirror(2 * j + dj, w)]
    assert torch.allclose(common.BlurDown(3).double()(x), out, atol=1e-7)
    assert not common.BlurDown(3).state_dict()


@pytest.mark.parametrize("antialias", [False, True])
def test_patchgan_at_its_defaults(antialias):
    D = common.PatchGAN(antialias=antialias)
    assert sum(p.numel() for p in D.parameters()) == 2_764_737
    thin = common.PatchGAN(ndf=2, antialias=antialias)
    assert thin(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    x = noise(2, 3, 64, 64, dtype=torch.float32)
    out, activations = thin(x, features=True)
    assert torch.equal(out, thin(x))
    assert [tuple(a.shape) for a in activations] == [(2, 2, 32, 32), (2, 4, 16, 16), (2, 8, 8, 8),
                                                     (2, 16, 7, 7)]
    assert torch.equal(thin.stages[-1](activations[-1]), out)
    for stage, (a, now) in enumerate(zip([x, *activations], activations, strict=False)):
        conv = thin.stages[stage][0]  # its layers by hand
        a = F.conv2d(a, conv.weight, conv.bias, 2 if stage < 3 and not antialias else 1, 1)
        a = F.leaky_relu(F.group_norm(a, a.shape[1]) if stage else a, 0.2)
        a = common.BlurDown(a.shape[1])(a) if antialias and stage < 3 else a
        assert torch.allclose(a, now, atol=1e-5)


@pytest.mark.parametrize("n_layers, antialias, field", [(1, False, 16), (2, False, 34),
                                                        (3, False, 70), (3, True, 84)])
def test_receptive_field(n_layers, antialias, field):
    D = common.PatchGAN(ndf=2, n_layers=n_layers, norm=None, antialias=antialias).double()
    x = noise(1, 3, 160, 160).requires_grad_()
    logits = D(x)
    grad, = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], x)
    touched = grad[0].abs().sum(0) > 0
    for places in (touched.any(0), touched.any(1)):
        ids = places.nonzero().flatten()
        assert ids[-1] - ids[0] + 1 == field and 0 < ids[0] and ids[-1] < 159


def test_patchgan_options():
    deep = common.PatchGAN(ndf=2, n_layers=5)
    assert len(deep.stages) == 7 and deep.stages[-1].in_channels == 16
    assert common.PatchGAN(ndf=2, padding=2)(torch.zeros(1, 3, 256, 256)).shape[2:] == (35, 35)
    torch.manual_seed(0)
    D = common.PatchGAN(6, ndf=4, norm=nn.BatchNorm2d, spectral=True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in D.modules()) == 3
    for _ in range(200):  # a power iteration each
        D(noise(2, 6, 32, 32, dtype=torch.float32))
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 5
    for conv in convs:
        top = torch.linalg.svdvals(conv.weight.detach().flatten(1))[0]
        assert top == pytest.approx(1, abs=0.02)


@pytest.fixture(scope="module")
def vgg():
    return common.VGG([f"relu{b}_1" for b in range(1, 6)], "random")


def test_vgg_taps_gradients_and_seed(vgg):
    x = noise(2, 3, 32, 48, dtype=torch.float32).requires_grad_()
    found = vgg(x)
    assert {name: tuple(a.shape) for name, a in found.items()} == {
        "relu1_1": (2, 64, 32, 48), "relu2_1": (2, 128, 16, 24), "relu3_1": (2, 256, 8, 12),
        "relu4_1": (2, 512, 4, 6), "relu5_1": (2, 512, 2, 3)}
    assert all((a >= 0).all() and 0.1 < a.square().mean() < 20 for a in found.values())
    sum(a.mean() for a in found.values()).backward()
    assert x.grad.isfinite().all() and (x.grad != 0).float().mean() > 0.9
    assert all(p.grad is None and not p.requires_grad for p in vgg.parameters())
    assert not vgg.training and not any(a.requires_grad for a in vgg(x.detach()).values())
    torch.manual_seed(5)  # random weights do not depend on the caller's seed
    again = common.VGG(["relu2_2"], "random")
    assert len(again.features) == 9
    for a, b in zip(again.features.parameters(), vgg.features.parameters(), strict=False):
        assert torch.equal(a, b)
    assert again.features[0].weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.1)
    with pytest.raises(UserError, match="--vgg random: VGG-19 has no activation relu3_5"):
        common.VGG(["relu1_1", "relu3_5"], "random")


def test_vgg_normalisation_and_ceil_mode():
    plain, ready = (common.VGG(["relu1_1"], "random", normalise=n) for n in (False, True))
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    by_hand = x.clone()
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        by_hand[:, c] = ((x[:, c] + 1) / 2 - mean) / std
    assert torch.allclose(ready(x)["relu1_1"], plain(by_hand)["relu1_1"], atol=1e-5)
    assert not torch.allclose(ready(x)["relu1_1"], plain(x)["relu1_1"], atol=1e-2)
    shapes = [tuple(common.VGG(["relu3_1"], "random", ceil_mode=c)(x[..., :7, :5])["relu3_1"].shape)
              for c in (False, True)]
    assert shapes == [(2, 256, 1, 1), (2, 256, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("config, convs", [("E", (2, 2, 4)), ("D", (2, 2, 3))])
def test_vgg_from_a_file_is_torchvisions(tmp_path, config, convs, dtype):
    from torchvision.models.vgg import cfgs, make_layers
    theirs = make_layers(cfgs[config][:14]).to(dtype).float().eval()  # 14: beyond the fourth pool
    torch.save({f"features.{k}": v.to(dtype) for k, v in theirs.state_dict().items()},
               tmp_path / "vgg.pth")
    taps = [f"relu{b}_{i}" for b, n in enumerate(convs, 1) for i in range(1, n + 1)]
    x = torch.rand(2, 3, 24, 24) * 2 - 1
    ours = common.VGG(taps, str(tmp_path / "vgg.pth"), normalise=False)(x)
    assert list(ours) == taps
    names, t = iter([*taps, "relu4_1"]), x
    with torch.no_grad():
        for layer in theirs[:18 if config == "E" else 17]:
            t = layer(t)
            if isinstance(layer, nn.ReLU):
                assert torch.allclose(ours[next(names)], t, atol=1e-5)
    assert next(names) == "relu4_1"
    if config == "D":
        with pytest.raises(UserError, match=r"vgg\.pth: VGG-16 has no activation relu3_4$"):
            common.VGG(["relu1_1", "relu3_4"], str(tmp_path / "vgg.pth"))


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, {"features.0.weight": 3},
                                     {"features.0.weight": torch.zeros(64, 3, 5, 5)},
                                     torch.zeros(3), ["features.0.weight"]])
def test_vgg_from_a_wrong_file(tmp_path, content):
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"wrong\.pth: neither VGG-19 .*features\.0\.weight"):
        common.VGG(["relu1_1"], str(tmp_path / "wrong.pth"))
    with pytest.raises(UserError, match=r"absent\.pth"):
        common.VGG(["relu1_1"], str(tmp_path / "absent.pth"))


def test_imagenet_weights(tmp_path, monkeypatch):
    from torchvision.models import VGG19_Weights
    url = VGG19_Weights.IMAGENET1K_V1.url
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / Path(url).name
    cached.parent.mkdir(parents=True)
    torch.save(Marker(tmp_path / "touched"), cached)  # a file that somebody put there
    with pytest.raises(UserError, match="--vgg imagenet: cannot fetch"):
        common.VGG(["relu1_1"], "imagenet")
    assert not (tmp_path / "touched").exists()
    state = {f"features.0.{k}": v for k, v in nn.Conv2d(3, 64, 3).state_dict().items()}
    torch.save(state, cached)
    ours = common.VGG(["relu1_1"], "imagenet")
    assert torch.equal(ours.features[0].weight, state["features.0.weight"])

    def fails(*_, **__):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(VGG19_Weights, "get_state_dict", fails)
    with pytest.raises(UserError, match="no route to host") as caught:
        common.VGG(["relu1_1"], "imagenet")
    assert url in str(caught.value) and str(cached) in str(caught.value)


def test_full():
    for dtype, out in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                       (torch.float32, torch.float32), (torch.float64, torch.float64)):
        assert common.full(torch.zeros(1, dtype=dtype)).dtype == out


@pytest.mark.parametrize("spectral", [False, True])
def test_init_weights(spectral):
    torch.manual_seed(0)
    wrap = nn.utils.parametrizations.spectral_norm if spectral else (lambda layer: layer)

    def free(layer):
        return layer.parametrizations.weight.original if spectral else layer.weight
    layers = [nn.Conv2d(32, 64, 3), nn.ConvTranspose2d(64, 32, 4), nn.Linear(200, 100, bias=False)]
    net = nn.Sequential(*map(wrap, layers), nn.BatchNorm2d(3))
    assert common.init_weights(net, "normal", 0.02) is net
    for layer in layers:
        assert free(layer).std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(free(layer).mean().item()) < 1e-3
        assert layer.bias is None or not layer.bias.any()
    common.init_weights(net, "xavier", 0.5)
    for layer, fan in zip(layers, ((32 + 64) * 9, (64 + 32) * 16, 300), strict=True):
        assert free(layer).std().item() == pytest.approx(0.5 * math.sqrt(2 / fan), rel=0.05)
    assert (net[3].weight == 1).all()


# ---- 2. pictures --------------------------------------------------------------------------------


def save(path, picture, mode, **options):
    im = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    assert im.mode == mode
    im.save(path, **options)
    return path


def rgb(path):
    im = common.open_rgb(path)
    assert im.mode == "RGB"
    return np.asarray(im).astype(int)


def test_grey_one_bit_and_alpha(tmp_path):
    grey = np.array([[0, 100, 255], [7, 8, 9]], np.uint8)
    read = rgb(save(tmp_path / "l.png", grey, "L"))
    assert (read == grey[..., None].repeat(3, 2)).all()
    one = Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)
    assert (rgb(save(tmp_path / "1.png", one, "1"))[0, :, 0] == [0, 0, 255]).all()
    la = np.stack([grey, np.full_like(grey, 128)], 2)
    expected = np.round(grey / 255 * 128 + (255 - 128))
    read = rgb(save(tmp_path / "la.png", Image.fromarray(la), "LA"))
    assert abs(read - expected[..., None]).max() <= 1
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, [0, 128, 255]
    read = rgb(save(tmp_path / "rgba.png", rgba, "RGBA"))
    assert abs(read - [[[255, 255, 255], [227, 127, 127], [200, 0, 0]]]).max() <= 1


def test_palette_and_cmyk(tmp_path):
    im = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    im.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    assert (rgb(save(tmp_path / "p.png", im, "P")) == colours).all()
    read = rgb(save(tmp_path / "t.png", im, "P", transparency=1))
    assert (read[0, [0, 2]] == colours[[0, 2]]).all() and (read[0, 1] == 255).all()
    read = rgb(save(tmp_path / "t.gif", im, "P", transparency=1))
    assert (read[0, 1] == 255).all() and (read[0, 2] == colours[2]).all()
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], np.uint8)
    read = rgb(save(tmp_path / "c.tif", Image.fromarray(ink, "CMYK"), "CMYK"))
    assert (read == [[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]]).all()


def test_deep_grey(tmp_path):
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    for name in ("x.png", "x.tif"):
        read = rgb(save(tmp_path / name, deep, "I;16"))
        assert (read[0] == np.array([0, 1, 128, 255])[:, None]).all()
    wild = np.array([[-5, 0, 257, 65535, 70000]], np.int32)
    assert (rgb(save(tmp_path / "i.tif", wild, "I"))[0, :, 0] == [0, 0, 1, 255, 255]).all()
    for scale in (1, 255):
        values = np.array([[0, 0.2, 1]], np.float32) * scale
        assert (rgb(save(tmp_path / "f.tif", values, "F"))[0, :, 2] == [0, 51, 255]).all()


def test_exif_rotation(tmp_path):
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :16] = 200
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: turn a quarter to the right
    read = rgb(save(tmp_path / "e.jpg", picture, "RGB", exif=exif, quality=95))
    assert read.shape == (32, 16, 3) and read[:15].min() > 190 and read[17:].max() < 10


def test_ids_keep_their_values_in_every_one_channel_format(tmp_path):
    ids = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    palette = Image.fromarray(ids, "P")
    palette.putpalette([7] * 768)
    for picture, mode, truth in ((ids, "L", ids), (palette, "P", ids), (ids > 0, "1", ids > 0),
                                 (ids.astype(np.uint16) * 257, "I;16", ids * 257.)):
        read = common.open_ids(save(tmp_path / "ids.png", picture, mode))
        assert np.array_equal(np.asarray(read), truth), mode
    save(tmp_path / "colours.png", Image.new("RGB", (2, 2)), "RGB")
    with pytest.raises(UserError, match="colours.png: expected .* one channel, found RGB pix"):
        common.open_ids(tmp_path / "colours.png")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_ids_of_a_grey_PNG_of_any_depth(tmp_path, bits):
    """Pillow stretches 2 and 4 bits of grey to 0 ... 255, and writes no such files."""
    ids = np.random.default_rng(0).integers(0, min(2**bits, 300), (5, 7))
    rows = [f"{''.join(f'{v:0{bits}b}' for v in row):0<{-(-7 * bits // 8) * 8}}" for row in ids]
    data = zlib.compress(b"".join(b"\0" + int(r, 2).to_bytes(len(r) // 8, "big") for r in rows))
    header = struct.pack(">IIBBBBB", 7, 5, bits, 0, 0, 0, 0)
    (tmp_path / "ids.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))
        for kind, d in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))))
    assert np.array_equal(np.asarray(common.open_ids(tmp_path / "ids.png")), ids)


@pytest.mark.parametrize("read", [common.open_rgb, common.open_ids])
def test_files_that_are_no_pictures_are_named(tmp_path, read):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    whole = save(tmp_path / "whole.png", grey, "L").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[:len(whole) // 2])
    for name, why in (("text.png", "not a readable picture"), ("absent.png", "no such file"),
                      ("short.png", "truncated"), ("empty.png", "not a readable picture")):
        with pytest.raises(UserError, match=f"{name}.*{why}") as caught:
            read(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1


def test_tensor_and_back():
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    x = common.to_tensor(Image.fromarray(picture))
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1 and x[1, 0, 1] == pytest.approx(2 / 255 - 1)
    assert (np.asarray(common.to_pil(x)) == picture).all()
    wild = torch.tensor([-7.0, 0.0, 7.0]).view(3, 1, 1).requires_grad_()
    assert common.to_pil(wild).getpixel((0, 0)) == (0, 128, 255)


def test_list_pictures_and_find_split(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no pictures"):
        common.list_pictures(tmp_path)
    with pytest.raises(UserError, match="absent: no such file or folder"):
        common.list_pictures(tmp_path / "absent")
    for folder in ("one/trainA", "two/train/A"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("b.JPG", "a.png", "notes.txt"):
            (tmp_path / folder / name).touch()
        found = common.find_split(tmp_path / folder.split("/")[0], "train", "A")
        assert found == [tmp_path / folder / name for name in ("a.png", "b.JPG")]
    notes = tmp_path / "one/trainA/notes.txt"
    assert common.list_pictures(notes) == [notes]
    with pytest.raises(UserError) as caught:
        common.find_split(tmp_path, "test", "B")
    for part in (tmp_path / "testB", tmp_path / "test/B", common.UNPAIRED):
        assert str(part) in str(caught.value)


def test_the_split_that_is_shown_and_scored(tmp_path, capsys):
    for folder, n in (("trainA", 1), ("trainB", 1), ("testA", 7), ("testB", 7), ("valA", 2),
                      ("valB", 2)):
        (tmp_path / folder).mkdir()
        for i in range(n):
            colour = (10 * i, 50 * (folder[-1] == "B"), 200 if folder[0] == "v" else 0)
            save(tmp_path / folder / f"{i}.png", Image.new("RGB", (12 + i, 8), colour), "RGB")

    def bytes_of(direction="AtoB", split="test", **options):
        args = argparse.Namespace(split=split, direction=direction, size=6)
        found = common.test_pictures(tmp_path, args, torch.device("cpu"), **options)
        return {k: (x.shape, ((x[:, :, 0, 0] + 1) * 127.5).round().int()) for k, x in found.items()}
    shape, x = bytes_of()["x"]
    assert shape == (7, 3, 8, 12) and x[:, 0].tolist() == [0, 10, 20, 30, 40, 50, 60]
    shape, y = bytes_of(limit=3, square=True)["y"]
    assert shape == (3, 3, 6, 6) and y[:, 0].tolist() == [0, 20, 40] and (y[:, 1] == 50).all()
    assert (bytes_of("BtoA")["x"][1][:, 1] == 50).all()
    shape, x = bytes_of(split="val")["x"]
    assert shape[0] == 2 and (x[:, 2] == 200).all() and capsys.readouterr().out == ""
    for folder in ("testA", "testB"):
        (tmp_path / folder).rename(tmp_path / f"no-{folder}")
    assert bytes_of()["x"][0][0] == 1
    assert "pictures A: these are training pictures" in capsys.readouterr().out
    (tmp_path / "no-testA").rename(tmp_path / "testA")  # one side is better than none
    assert (bytes_of()["x"][0][0], bytes_of()["y"][0][0]) == (7, 1)
    assert "pictures A" not in (said := capsys.readouterr().out) and "pictures B: these are" in said
    with pytest.raises(UserError, match="found neither"):
        bytes_of(split="dev")


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (5, 4), (8, 8), (13, 22), (9, 17)])
def test_same_size(size):
    x, seen = noise(2, 3, *size), []

    def identity(padded):
        seen.append(padded.shape[2:])
        return padded
    assert torch.equal(common.same_size(identity, x, 4), x)
    assert seen[0] == tuple(max(16, -(-n // 4) * 4) for n in size)
    kernel = noise(3, 3, 3, 3, seed=1)
    out = common.same_size(lambda p: F.conv2d(p, kernel, padding=1), x, 4)
    expected = F.conv2d(x, kernel, padding=1)
    assert out.shape == x.shape
    assert torch.allclose(out[:, :, :-1, :-1], expected[:, :, :-1, :-1])


def test_translated_pictures_get_names_that_do_not_collide(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "deep/out"
    source.mkdir()
    for i, name in enumerate(("a.jpg", "a.png", "b.bmp")):
        save(source / name, np.full((5 + i, 7, 3), 50 * i, np.uint8), "RGB")
    common.translate_files(source, out, lambda x: -x)
    assert sorted(f.name for f in out.iterdir()) == ["a.jpg.png", "a.png.png", "b.png"]
    assert rgb(out / "a.png.png").shape == (6, 7, 3) and (rgb(out / "b.png") == 155).all()
    assert str(out) in capsys.readouterr().out
    common.translate_files(source / "a.png", tmp_path / "one", lambda x: x)
    assert [f.name for f in (tmp_path / "one").iterdir()] == ["a.png"]
    assert str(tmp_path / "one/a.png") in capsys.readouterr().out
    with pytest.raises(UserError, match="--out .*: cannot write there"):
        common.translate_files(source / "a.png", source / "a.png/below", lambda x: x)
    with pytest.raises(UserError, match="a.png would be overwritten"):
        common.translate_files(source / "a.png", source, lambda x: x)


def test_grid(tmp_path):
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(2, 3, 20, 64)
    common.save_grid(tmp_path / "new/grid.png", {"one": red, "another": -red})
    sheet = rgb(tmp_path / "new/grid.png")
    assert sheet.shape == (18 + 2 * 44 + 4, 2 * 132 + 4, 3)  # small pictures are doubled
    assert (sheet[30, 60] == [255, 0, 0]).all() and (sheet[100, 200] == [0, 255, 255]).all()
    assert (sheet[:18] < 100).any()  # the labels


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    common.write_whole(tmp_path / "a", "früher\n")

    def crash(file):
        file.write(b"half")
        file.flush()
        assert (tmp_path / "a").read_bytes() == "früher\n".encode()
        raise OSError("full")
    with pytest.raises(UserError, match="cannot write there .full"):
        common.write_whole(tmp_path / "a", crash)
    assert (tmp_path / "a").read_bytes() == "früher\n".encode() and not list(tmp_path.glob("*.tmp"))
    common.write_whole(tmp_path / "a", lambda file: file.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("held", [1, 2, 3])
def test_a_file_that_a_virus_scanner_holds_is_tried_again(tmp_path, monkeypatch, held):
    tries, pauses, real = [], [], common.os.replace

    def replace(*names):
        tries.append(names)
        if len(tries) <= held:
            raise PermissionError("held")
        real(*names)
    monkeypatch.setattr(common.os, "replace", replace)
    monkeypatch.setattr(common.time, "sleep", pauses.append)
    if held < 3:
        common.write_whole(tmp_path / "a", "text")
        assert (tmp_path / "a").read_text() == "text"
    else:
        with pytest.raises(UserError, match="cannot write there .held"):
            common.write_whole(tmp_path / "a", "text")
        assert not list(tmp_path.iterdir())
    assert len(tries) == min(held + 1, 3) and pauses == [0.1, 1][:held]


# ---- 3. data sets -------------------------------------------------------------------------------


KNOWN = {"maps": ("https://a/maps.zip",), "horse2zebra": ("https://b/x.zip", "https://c/x.zip")}
FIND = functools.partial(common.find_data, layout="trainA/", known=KNOWN, draw_toy=lambda: "drawn")


def test_find_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetched = []
    monkeypatch.setattr(common, "download", lambda urls, f: fetched.append((urls, f)) or f)
    assert FIND("toy") == "drawn"
    assert FIND("horse2zebra") == Path("datasets/horse2zebra")
    assert fetched.pop() == (KNOWN["horse2zebra"], Path("datasets/horse2zebra"))
    for folder in ("datasets/horse2zebra", "horse2zebra"):
        Path(folder, "trainA").mkdir(parents=True)
        FIND("horse2zebra")
        assert fetched.pop() == (KNOWN["horse2zebra"], Path("datasets/horse2zebra"))
        Path(folder, "trainA/a.jpg").touch()  # a folder without pictures is in nobody's way
        assert FIND("horse2zebra") == Path(folder) and not fetched
        Path(folder, "trainA/a.jpg").rename("a.jpg")
    with pytest.raises(UserError) as caught:
        FIND("horses")
    for part in ("--data horses", str(Path("datasets/horses")), "trainA/", "toy", "maps"):
        assert part in str(caught.value)


def test_one_process_of_a_machine_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(common, "download", lambda *_: pytest.fail("two processes download"))
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            (tmp_path / "maps").mkdir()
            (tmp_path / "maps/a.png").touch()
    monkeypatch.setattr(common.time, "sleep", sleep)
    assert FIND("maps", root=tmp_path) == tmp_path / "maps" and len(waits) == 3


def packed(members, kind="zip", link=None, level=None):
    raw = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED if level else 0, True, level) as z:
            for name, text in members.items():
                z.writestr(name, text)
    else:
        with tarfile.open(fileobj=raw, mode="w:gz") as t:
            for name, text in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                t.addfile(member, io.BytesIO(text.encode()))
            if link:
                member = tarfile.TarInfo("trainA/link")
                member.type, member.linkname = tarfile.SYMTYPE, link
                t.addfile(member)
    return raw.getvalue()


GOOD = {"trainA/a.png": "A" * 1000, "trainB/b.png": "B"}
TOPPED = {f"set/{name}": text for name, text in GOOD.items()}
OUTSIDE = GOOD | {"../escaped": "x"}
ABSOLUTE = GOOD | {"/tmp/escaped-by-absolute-path": "x"}
with zipfile.ZipFile(LZMA := io.BytesIO(), "w", zipfile.ZIP_LZMA) as z:
    z.writestr("trainA/a.png", bytes(range(256)) * 9)
LZMA = LZMA.getvalue()[:60] + bytes(20) + LZMA.getvalue()[80:]  # another error than zlib's
FILES = {
    "/good.zip": packed(GOOD), "/good.tar.gz": packed(GOOD, "tar"),
    "/topped.zip": packed(TOPPED), "/topped.tgz": packed(TOPPED, "tar"),
    "/crc.zip": packed(GOOD).replace(b"A" * 1000, b"A" * 999 + b"x"),
    "/crc.tar.gz": bytes(b ^ (i == 60) for i, b in enumerate(packed(GOOD, "tar"))),
    "/text.zip": b"<html>moved</html>", "/text.tar.gz": b"<html>moved</html>",
    "/slip.tar.gz": packed(OUTSIDE, "tar"), "/absolute.tar.gz": packed(ABSOLUTE, "tar"),
    "/bomb.zip": packed(GOOD | {"trainA/c.png": "0" * 9_000_000}, level=9),
    "/bomb.tar.gz": packed(GOOD | {"trainA/c.png": "0" * 9_000_000}, "tar"),
    "/readme.zip": packed({"set/readme.txt": "moved"}), "/lzma.zip": LZMA,
    "/link.tar.gz": packed(GOOD, "tar", "/etc"), "/slip.zip": packed(OUTSIDE),
    "/absolute.zip": packed(ABSOLUTE)}
BAD = ["absent.zip", "short.zip", "crc.zip", "text.zip", "short.tar.gz", "crc.tar.gz",
       "text.tar.gz", "slip.tar.gz", "link.tar.gz", "bomb.zip", "bomb.tar.gz", "readme.zip",
       "lzma.zip", "many.zip"]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        self.server.asked.append(self.path)
        body = FILES.get(self.path.replace("short", "good").replace("many", "good"))
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", "many" if "many" in self.path else str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if "short" in self.path else body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as it:
        it.asked = []
        threading.Thread(target=it.serve_forever, daemon=True).start()
        it.url = f"http://127.0.0.1:{it.server_port}"
        yield it
        it.shutdown()


def tree(folder):
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", ["good.zip", "good.tar.gz", "topped.zip", "topped.tgz"])
def test_download(server, tmp_path, name):
    root = tmp_path / "datasets"
    assert common.download([f"{server.url}/{name}"], root / "set") == root / "set"
    assert tree(root) == TOPPED
    assert [f.name for f in root.iterdir()] == ["set"]


@pytest.mark.parametrize("bad", BAD)
def test_second_mirror(server, tmp_path, bad):
    common.download([f"{server.url}/{bad}", f"{server.url}/good.zip"], tmp_path / "set")
    assert tree(tmp_path) == TOPPED and [f.name for f in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("bad", BAD)
def test_failed_download_leaves_nothing(server, tmp_path, bad):
    urls = [f"{server.url}/{bad}", "http://127.0.0.1:1/refused.zip"]
    with pytest.raises(UserError, match="cannot fetch set: .*fetch it by hand") as caught:
        common.download(urls, tmp_path / "d/set")
    for part in (*urls, str(tmp_path / "d/set")):
        assert part in str(caught.value)
    assert [f.name for f in tmp_path.rglob("*")] == ["d"]


@pytest.mark.parametrize("name", ["slip.zip", "absolute.zip", "absolute.tar.gz"])
def test_members_that_are_skipped_or_kept_inside(server, tmp_path, name):
    common.download([f"{server.url}/{name}"], tmp_path / "d/set")
    assert TOPPED.items() <= tree(tmp_path / "d").items() and not (tmp_path / "escaped").exists()
    assert not Path("/tmp/escaped-by-absolute-path").exists()


def test_https_is_tried_first_and_a_pinned_checksum_counts(server, tmp_path, monkeypatch, capsys):
    asked, address = [], f"{server.url}/good.zip"

    def fetch(address, *rest, **more):
        asked.append(address)
        return real(address, *rest, **more)
    real = torch.hub.download_url_to_file
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    common.download([address], tmp_path / "set")
    assert asked == [address.replace("http:", "https:"), address]
    assert f"fetching {address}, of which no checksum is known\n" in capsys.readouterr().out
    right = hashlib.sha256(FILES["/good.zip"]).hexdigest()
    monkeypatch.setattr(common, "SHA256", {"good": right[:20]})
    common.download([address], tmp_path / "right")
    assert f"fetching {address}\n" in capsys.readouterr().out
    monkeypatch.setattr(common, "SHA256", {"good": right[1:21]})
    with pytest.raises(UserError, match="invalid hash value"):
        common.download([address], tmp_path / "wrong")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["right", "set"]


def test_what_is_pinned_can_be_fetched():
    import cyclegan
    named = {Path(a).stem for archives in cyclegan.KNOWN.values() for a in archives}
    assert set(common.SHA256) <= named and len(set(common.SHA256.values())) == 9
    assert all(re.fullmatch("[0-9a-f]{20}", digest) for digest in common.SHA256.values())


def test_an_empty_folder_is_no_obstacle(server, tmp_path):
    (tmp_path / "set").mkdir()
    common.download([f"{server.url}/good.zip"], tmp_path / "set")
    assert tree(tmp_path) == TOPPED


def test_a_known_name_is_downloaded_once(server, tmp_path):
    known = {"maps": (f"{server.url}/absent.zip", f"{server.url}/good.tar.gz")}
    before = server.asked.count("/good.tar.gz")
    for _ in range(2):
        assert FIND("maps", known=known, root=tmp_path) == tmp_path / "maps"
    assert server.asked.count("/good.tar.gz") == before + 1
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot fetch maps"):
        FIND("maps", known=known, root=tmp_path / "file")


def test_shuffled_rate_and_mix():
    assert sorted(common.shuffled(9, 1)) == list(range(9)) != common.shuffled(9, 1)
    assert common.shuffled(9, 1) == common.shuffled(9, 1) != common.shuffled(9, 2)
    assert [common.rate(s, 10, 0.5) for s in (0, 4, 5, 6, 9)] == [1, 1, 5 / 6, 4 / 6, 1 / 6]
    assert [common.rate(s, 10, 1) for s in (0, 9)] == [1, 1]
    assert common.mix(1, 2) == common.mix(1, 2) != common.mix(2, 1)
    assert 0 <= common.mix(0) < 2**63 and common.mix(1, "epoch", 2) != common.mix(1, 2)
    assert common.mix(7, "epoch", 3) == 3220216745766059909  # the same everywhere


def test_lab_is_imported_where_it_is(monkeypatch):
    assert common.lab("page", "index.html").__name__ == "lab.page"
    for missing, error in (("lab", "needs the folder lab/ of the repository"),
                           ("lab.metrics", "needs the folder lab/ of the repository"),
                           ("scipy", "needs scipy: pip install -r lab/requirements.txt")):
        def fails(_, name=missing):
            raise ModuleNotFoundError(name=name)
        monkeypatch.setattr(common.importlib, "import_module", fails)
        with pytest.raises(UserError, match=f"^--evaluate {error}$"):
            common.lab("metrics", "--evaluate")


# ---- 4. flags and errors ------------------------------------------------------------------------


def flags(*argv, **options):
    p = common.base_parser("A method.\n\nMore about it.")
    p.add_argument("--lr", type=float, default=0.1, help="rate")
    for name, value in (("--width", 64), ("--blocks", 9), ("--depth", 3), ("--passes", None)):
        p.add_argument(name, type=int, default=value, help=name)

    def presets(args):
        return ({"width": 16, "blocks": 4, "depth": 2, "passes": 1} if args.data == "toy" else {})
    return common.parse_flags(p, list(argv), "method", presets, lambda a: f"m-{a.data}", **options)


def write_checkpoint(path, **config):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"method": "method", "config": config, "step": 3, "seconds": 0.0, "sums": {},
                "parts": {}}, path)
    return path


def test_flags_come_in_layers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = flags("--data", "photos")
    assert (args.lr, args.width, args.blocks, args.depth) == (0.1, 64, 9, 3)
    args = flags("--depth", "7")
    assert (args.lr, args.width, args.blocks, args.depth) == (0.1, 16, 4, 7)
    assert args.run_folder == str(Path("runs/m-toy")) and args.split == "test"
    saved = {"width": 5, "depth": 6, "data": "photos", "gone": 1, "out": "x", "device": "cuda"}
    write_checkpoint(Path("w.pt"), **saved)
    args = flags("--weights", "w.pt", "--depth", "8")
    assert (args.lr, args.width, args.blocks, args.depth) == (0.1, 5, 9, 8)  # of photos: no preset
    assert (args.data, args.out, args.device) == ("photos", None, None)
    assert args.run_folder == str(Path("runs/m-photos")) and not hasattr(args, "gone")
    assert flags("--weights", "w.pt", "--out", "there").run_folder == "there"
    with pytest.raises(UserError, match=r"--resume: no checkpoint at runs.m-toy.last\.pt"):
        flags("--resume")
    for here in (".", "./", "photos/.."):
        assert Path(flags("--data", here).data).resolve() == tmp_path
    assert flags("--data", ".").run_folder == str(Path(f"runs/m-{tmp_path}"))  # of a whole name
    write_checkpoint(Path("runs/m-toy/last.pt"), width=5, resume=False)
    args = flags("--resume")
    assert (args.width, args.blocks, args.resume) == (5, 4, True)
    write_checkpoint(Path("mine/last.pt"), width=6)
    assert flags("--resume", "--out", "mine").width == 6
    assert flags().passes == 1
    write_checkpoint(Path("n.pt"), passes=None, data="photos")  # not the toy preset's number
    assert flags("--weights", "n.pt").passes is None
    assert flags("--weights", "n.pt", "--passes", "7").passes == 7
    for content in ({"model.1.weight": torch.zeros(2)}, torch.zeros(2)):  # the authors' file
        torch.save(content, "net.pth")
        assert flags("--weights", "net.pth").width == 16


def test_channels_last_is_the_methods_choice_on_the_cpu_alone(monkeypatch):
    for given in (True, False):
        assert flags("--device", "cpu", channels_last=given).channels_last is given
        assert flags("--channels-last", channels_last=given).channels_last is True
        assert flags("--no-channels-last", channels_last=given).channels_last is False
        monkeypatch.setattr(common, "pick_device", lambda _: torch.device("cuda:0"))
        assert flags(channels_last=given).channels_last is True
        monkeypatch.undo()


def test_flags_that_are_refused(capsys):
    for wrong in (["--widht", "3"], ["--widt", "3"], ["--split", "train"], ["--log-every", "1e3"],
                  ["--workers", "x"], ["--range", "1"]):
        with pytest.raises(SystemExit) as stop:
            flags(*wrong)
        assert stop.value.code == 2
        assert len(lines := capsys.readouterr().err.splitlines()) == 1 and wrong[0] in lines[0]
    for wrong in (["--log-every", "0"], ["--lr", "nan"], ["--lr", "inf"], ["--lr", "1e30"],
                  ["--lr", "-1"], ["--seed", "-1"], ["--seed", "9" * 20], ["--workers", "999"]):
        with pytest.raises(UserError, match=f"{wrong[0]} .*: expected a number from [01] to "):
            flags(*wrong)
    with pytest.raises(UserError, match="--range 2 1: a smaller and a larger"):
        flags("--range", "2", "1")


@pytest.mark.parametrize("error, code, text", [
    (UserError("a.png: wrong"), 2, "m.py: error: a.png: wrong\n"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2, "m.py: error: out of memory: lower --size"),
    (MemoryError(), 2, "m.py: error: out of memory: lower --size"),
    (RuntimeError("MPS backend out of memory"), 2, "m.py: error: out of memory: lower --size"),
    (KeyboardInterrupt(), 130, "")])
def test_entry_says_it_in_one_line(monkeypatch, capsys, error, code, text):
    def main():
        raise error
    monkeypatch.setattr(sys, "argv", ["/somewhere/m.py"])
    with pytest.raises(SystemExit) as stop:
        common.entry(main)
    out, err = capsys.readouterr()
    assert stop.value.code == code and out == ""
    assert err.startswith(text) and err.count("\n") == (code == 2)


def test_entry_knows_the_cpus_full_memory_and_hides_no_bug(capsys):
    with pytest.raises(SystemExit) as stop:
        common.entry(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert stop.value.code == 2 and "out of memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="must match"):
        common.entry(lambda: torch.ones(2) + torch.ones(3))
    common.entry(lambda: None)


# ---- 5. run -------------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset):
    """Sample n is a function of n and takes `seconds`; `bad` is an unreadable picture."""

    def __init__(self, bad=None, dtype=torch.float32, seconds=0):
        self.bad, self.dtype, self.seconds, self.asked = bad, dtype, seconds, []

    def __getitem__(self, n):
        self.asked.append(n)
        time.sleep(self.seconds)
        if n == self.bad:
            common.open_rgb("photos/broken.png")
        x = noise(3, seed=n, dtype=self.dtype)
        return x, x.sum() + torch.tensor(0.1 * n, dtype=self.dtype).sin()


def tiny_args(folder, **changes):
    return argparse.Namespace(**{
        "data": "toy", "seed": 0, "device": "cpu", "workers": 0, "batch": 2, "log_every": 5,
        "channels_last": True, "resume": False, "run_folder": str(folder)} | changes)


def tiny_run(folder, total, samples=None, each=lambda run: None, grid_every=4, chance=None,
             **changes):
    """Train a line with dropout-like noise, so that torch's generator counts too."""
    run = common.Run("tiny", tiny_args(folder, **changes), chance)
    G = nn.Linear(3, 1)
    opt = torch.optim.Adam(G.parameters(), 0.05)
    run.resume_or_start({"G": G, "opt_G": opt})
    for step, (x, y) in run.steps(samples or Samples(), total):
        if grid_every and step % grid_every == 0:
            run.save_samples({"x": torch.zeros(1, 3, 8, 8) + step / total})
        loss = (G(x)[:, 0] * torch.rand(len(x)) - y + torch.rand((), generator=run.rng())).square()
        opt.zero_grad()
        loss.mean().backward()
        opt.step()
        run.log({"L_G": loss.mean(), "L_max": loss.max()})
        each(run)
    run.save()
    return run


def states(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def log_rows(folder):
    with open(Path(folder) / "log.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["step", "L_G", "L_max", "seconds"]
    return [row[:-1] for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 22 steps that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    tiny_run(folder, 22)
    return folder


def ends_like(folder, whole):
    """A run that is resumed ends bit-identical to one that was never stopped."""
    tiny_run(folder, 22, resume=True)
    for part in ("step", "parts"):
        assert_same(states(folder)[part], states(whole)[part])
    assert not list(Path(folder).rglob("*.tmp"))


@pytest.mark.parametrize("stops", [(7,), (5, 6, 21)])
def test_resumed_run_is_the_uninterrupted_one(whole, tmp_path, stops):
    def interrupt(run):
        if run.step + 1 in stops:
            signal.raise_signal(signal.SIGINT)
    for i, stop in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            tiny_run(tmp_path / "run", 22, each=interrupt, resume=i > 0)
        assert states(tmp_path / "run")["step"] == stop
    ends_like(tmp_path / "run", whole)
    assert log_rows(tmp_path / "run") == log_rows(whole)
    assert [row[0] for row in log_rows(whole)] == ["5", "10", "15", "20", "22"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_killed_run_repeats_what_it_had_not_saved(whole, tmp_path):
    folder = tmp_path / "run"

    class Killed(Exception):
        pass

    def kill(run):
        if run.step == 10:
            raise Killed
    with pytest.raises(Killed):
        tiny_run(folder, 22, each=kill)
    assert states(folder)["step"] == 8 and [r[0] for r in log_rows(folder)] == ["5", "10"]
    (folder / "last.pt.tmp").write_text("of a crash")
    with open(folder / "log.csv", "a") as f:
        f.write("1")  # a torn row
    (folder / "samples/step_000004.png").write_bytes(b"half a picture")
    (folder / "samples/step_000003.png.tmp").write_text("which no one will write again")
    seen = []
    shutil.copytree(folder, tmp_path / "copy")
    tiny_run(tmp_path / "copy", 22, each=lambda run: seen.append(log_rows(run.folder)), resume=True)
    assert [r[0] for r in seen[0]] == ["5"]
    ends_like(folder, whole)
    assert log_rows(folder) == log_rows(whole)


def test_a_loss_more_begins_another_log(tmp_path, capsys):
    """As --resume --lambda-Y 1 after a run without: no row under the names of others."""
    tiny_run(tmp_path / "run", 5)

    def more(run):
        run.log({"L_more": torch.tensor(2.0)})
    tiny_run(tmp_path / "run", 15, each=more, resume=True)
    assert (tmp_path / "run/log.csv.1").read_text().startswith("step,L_G,L_max,seconds\n5,")
    head, *rows = (tmp_path / "run/log.csv").read_text().split()
    assert head == "step,L_G,L_max,L_more,seconds" and [r[:2] for r in rows] == ["10", "15"]
    assert all(row.split(",")[3] == "2" for row in rows)
    assert "is kept in" in capsys.readouterr().out


def test_an_empty_log_is_no_obstacle(tmp_path):
    tiny_run(tmp_path / "run", 3, log_every=100)
    (tmp_path / "run/log.csv").write_text("")
    tiny_run(tmp_path / "run", 5, resume=True)
    assert [row[0] for row in log_rows(tmp_path / "run")] == ["5"]


def test_every_sample_is_asked_for_once_and_in_order(tmp_path, capsys):
    samples = Samples()
    run = tiny_run(tmp_path / "run", 5, samples, batch=3)
    assert samples.asked == list(range(15)) and run.step == 5
    before = states(tmp_path / "run")
    tiny_run(tmp_path / "run", 5, samples, batch=3, resume=True)
    assert "nothing left to do" in capsys.readouterr().out and len(samples.asked) == 15
    assert_same(states(tmp_path / "run")["parts"], before["parts"])


def test_log_and_bar(tmp_path, monkeypatch):
    """A row is the mean over the steps that had the loss; the bar says what chance would give."""
    seen, texts = [], []
    monkeypatch.setattr(common.tqdm, "set_postfix_str", lambda _, text, **__: texts.append(text))

    def each(run):
        seen.append(float(run.sums["L_max"][0]))
        run.log({"L_G": torch.tensor(6.0)} if run.step % 2 else {})
    tiny_run(tmp_path / "run", 7, grid_every=0, each=each, log_every=3, chance={"L_max": 0.693})
    first, *_, last = log_rows(tmp_path / "run")
    assert first[0] == "3" and float(first[2]) == pytest.approx(seen[2] / 3, rel=1e-4)
    assert last[0] == "7" and float(last[2]) == pytest.approx(seen[6], rel=1e-4)
    assert re.fullmatch(r"L_G \d+\.\d{3} L_max \d+\.\d{3} \(chance 0\.693\) \| .* pictures/s",
                        texts[0]) and len(texts) == 3


def test_pictures_get_the_layout_that_was_asked_for(tmp_path):
    class Pictures(torch.utils.data.Dataset):
        def __getitem__(self, n):
            return torch.zeros(3, 4, 5), torch.zeros(4, 5), torch.tensor(n)
    for wanted in (True, False):
        run = common.Run("tiny", tiny_args(tmp_path / str(wanted), channels_last=wanted))
        run.resume_or_start({})
        for _, (x, label, n) in run.steps(Pictures(), 1):
            assert x.is_contiguous(memory_format=LAYOUTS[wanted]) and x.shape == (2, 3, 4, 5)
            assert label.shape == (2, 4, 5) and n.tolist() == [0, 1]


def test_an_earlier_run_is_kept(tmp_path):
    for n in range(3):
        tiny_run(tmp_path / "run", n + 1)
    assert [states(tmp_path / name)["step"] for name in ("run.1", "run.2", "run")] == [1, 2, 3]
    (tmp_path / "run/last.pt").unlink()
    tiny_run(tmp_path / "run", 1)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert len(log_rows(tmp_path / "run")) == 1
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*file.run: cannot write there"):
        tiny_run(tmp_path / "file/run", 1)


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(tmp_path):
    def explode(run):
        if run.step == 2:
            run.log({"L_G": torch.tensor(math.inf)})
    for grid_every, saved in ((4, 0), (3, 0)):
        with pytest.raises(UserError, match="L_G is not finite at step .*--lr.*last.pt"):
            tiny_run(tmp_path / "run", 8, each=explode, grid_every=grid_every)
        assert states(tmp_path / "run")["step"] == saved


def test_result_and_scores(tmp_path, capsys):
    run = tiny_run(tmp_path / "run", 3)
    scores = [{"name": "error", "value": 1.5, "better": "lower", "trivial": {"copy": 2.25}},
              {"name": "FID", "value": 30.0, "better": "lower", "sd": 0.5}]
    run.finish(scores)
    out = capsys.readouterr().out
    assert "error: 1.5 (lower is better; copy: 2.25)\nFID: 30 +- 0.5 (lower is better)\n" in out
    assert str(tmp_path / "run") in out
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result.pop("seconds") >= 0
    assert result == {"method": "tiny", "data": "toy", "steps": 3, "scores": scores}
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["batch"] == 2 and "run_folder" not in config
    assert states(tmp_path / "run")["config"] == config


def test_pick_device():
    assert common.pick_device("cpu") == torch.device("cpu")
    assert common.pick_device().type == (
        "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    for name in ("gpu", "hpu", "privateuseone"):
        with pytest.raises(UserError, match=f"--device {name}: ") as caught:
            common.pick_device(name)
        assert len(str(caught.value).splitlines()) == 1


def test_checkpoints_that_are_refused(tmp_path):
    good = write_checkpoint(tmp_path / "good.pt")
    assert common.load_checkpoint(good, "method")["step"] == 3
    for name, content in (("empty.pt", b""), ("text.pt", b"hello"), ("zeros.pt", bytes(99))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: truncated, or not a file") as caught:
            common.load_checkpoint(tmp_path / name, "method")
        assert len(str(caught.value).splitlines()) == 1
    for path, why in ((tmp_path, "directory"), (tmp_path / "no.pt", r"no\.pt: No such file"),
                      (good, r"good\.pt: written by method\.py, not by cut\.py")):
        with pytest.raises(UserError, match=why):
            common.load_checkpoint(path, "cut")
    for content in ({"weight": torch.zeros(1)}, torch.zeros(1), [1]):
        torch.save(content, tmp_path / "foreign.pt")
        with pytest.raises(UserError, match=r"foreign\.pt: not a checkpoint of method\.py"):
            common.load_checkpoint(tmp_path / "foreign.pt", "method")
        assert common.load_checkpoint(tmp_path / "foreign.pt", "method", foreign=True) == {}


@pytest.mark.parametrize("new_format", [True, False])
def test_cut_and_malicious_checkpoints(tmp_path, new_format):
    state = {"method": "method", "parts": {"G": nn.Linear(2, 2).state_dict()}}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=new_format)
    raw = (tmp_path / "x.pt").read_bytes()
    for end in [*range(0, len(raw) - 1, len(raw) // 60), len(raw) - 1]:
        (tmp_path / "x.pt").write_bytes(raw[:end])
        with pytest.raises(UserError, match=r"x\.pt: "):
            common.load_checkpoint(tmp_path / "x.pt", "method")
    torch.save({"method": "method", "config": Marker(tmp_path / "touched")}, tmp_path / "evil.pt",
               _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match=r"evil\.pt: .*safely"):
        common.load_checkpoint(tmp_path / "evil.pt", "method")
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)["config"].close()
    assert (tmp_path / "touched").exists()  # it would have worked


def test_parts_that_do_not_fit():
    net = nn.Linear(2, 3)
    state = {"G": net.state_dict()}
    common.load_parts({"G": nn.Linear(2, 3)}, state, "x.pt")
    for parts, states_ in (({"G": nn.Linear(2, 4)}, state), ({"D": net}, state),
                           ({"G": net}, {"G": 3}), ({"G": net}, {"G": {}})):
        with pytest.raises(UserError, match=r"x\.pt: [GD] does not fit the flags"):
            common.load_parts(parts, states_, "x.pt")


# ---- processes of their own: signals, workers, torchrun


def start(folder, body, *launcher):
    (folder / "tiny.py").write_text(f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}, "
                                    f"{str(ROOT / 'tests')!r}]\nimport torch\n"
                                    "import test_common as t\n" + textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, *launcher, "tiny.py"], cwd=folder, text=True, stdout=-1, stderr=-1,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """Under nohup a closed terminal does not end a run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = tiny_run(tmp_path / "run", 3, each=lambda run: signal.raise_signal(signal.SIGHUP))
        assert run.step == 3 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name, workers, send", [  # terminals and `timeout` tell the workers too
    ("SIGINT", "spawn", os.killpg), ("SIGHUP", "fork", os.killpg), ("SIGTERM", "fork", os.kill),
    ("SIGTERM", "fork", os.killpg), ("SIGTERM", "spawn", os.killpg)])
def test_a_stop_saves_and_says_how_to_go_on(whole, tmp_path, name, workers, send):
    process = start(tmp_path, f"""
        def main():
            torch.multiprocessing.set_start_method("{workers}")  # spawn: inherits no handler
            t.tiny_run("run", 22, t.Samples(seconds=0.03), log_every=1, workers=1)
        if __name__ == "__main__":
            t.common.entry(main)
    """)
    log = tmp_path / "run/log.csv"
    while not log.exists() or len(log.read_text().splitlines()) < 7:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    send(process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=120)
    step = states(tmp_path / "run")["step"]
    assert process.returncode == 130 and 6 <= step < 22
    assert f"stopped at step {step} of 22; the same command with --resume goes on" in err
    assert "Traceback" not in err
    ends_like(tmp_path / "run", whole)


@pytest.mark.parametrize("where", ["torch.save", "os.replace"])
def test_a_kill_while_saving_leaves_the_earlier_checkpoint(whole, tmp_path, where):
    process = start(tmp_path, f"""
        calls = []
        def killed(what, *rest):
            calls.append(str(what).endswith("last.pt.tmp") or isinstance(what, dict))
            if sum(calls) == 3:
                if "{where}" == "torch.save":
                    rest[0].write(b"half a checkpoint")
                    rest[0].flush()
                os.kill(os.getpid(), t.signal.SIGKILL)
            return real(what, *rest)
        real, {where} = {where}, killed
        t.tiny_run("run", 22)
    """)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "run/last.pt.tmp").exists()
    assert states(tmp_path / "run")["step"] == 4  # the third save is that of step 8
    ends_like(tmp_path / "run", whole)
    assert log_rows(tmp_path / "run") == log_rows(whole)


@pytest.mark.parametrize("flaw, code, last, saved", [
    ("t.Samples(bad=13)", 2, "tiny.py: error: photos/broken.png: no such file", 6),
    ("t.Samples(seconds='x')", 1, "TypeError: 'str' object cannot be interpreted as an integer", 0),
    ("each=lambda run: run.step < 5 or 1 / 0", 1, "ZeroDivisionError: division by zero", 4)])
def test_what_goes_wrong_beside_a_worker_ends_the_run(tmp_path, flaw, code, last, saved):
    process = start(tmp_path, f"""
        t.common.entry(lambda: t.tiny_run("run", 22, {flaw}, workers=1))
    """)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == code and err.strip().splitlines()[-1] == last
    assert ("Traceback" in err) == (code == 1) and states(tmp_path / "run")["step"] == saved


def train_two_players(folder, batch):
    """G and D step in turn; G's loss leaves gradients in D that D's step must not use."""
    samples = Samples(dtype=torch.float64)
    run = common.Run("tiny", tiny_args(folder, seed=1, batch=batch))
    G, D = nn.Linear(3, 1).double(), nn.Linear(1, 1).double()
    opts = {"opt_G": torch.optim.SGD(G.parameters(), 0.05),
            "opt_D": torch.optim.SGD(D.parameters(), 0.02)}
    run.resume_or_start({"G": G, "D": D} | opts)
    kept = []
    for _, (x, y) in run.steps(samples, 6):
        opts["opt_D"].zero_grad()
        (D(G(x).detach())[:, 0] - y).square().mean().backward()
        opts["opt_D"].step()
        opts["opt_G"].zero_grad()
        out = D(G(x))[:, 0] * torch.rand((), generator=run.rng(), dtype=torch.float64)
        before = [p.grad.clone() for p in D.parameters()]
        (out - y).square().mean().backward()
        own = [p.grad.clone() for p in D.parameters()]  # D's mean of before, and this process's
        opts["opt_G"].step()
        assert all(torch.equal(p.grad, g) for p, g in zip(D.parameters(), own, strict=True))
        kept.append([g - b for g, b in zip(own, before, strict=True)])
    run.save_samples({"x": torch.zeros(1, 3, 8, 8)})
    run.finish([])
    return [p.detach() for net in (G, D) for p in net.parameters()], samples.asked, kept


def test_two_processes_do_what_one_with_the_double_batch_does(tmp_path):
    process = start(tmp_path, """
        found = t.train_two_players("run", 2)
        torch.save((*found, torch.rand(())), os.environ["RANK"] + ".pt")
    """, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
        "--rdzv_endpoint=127.0.0.1:0")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    (weights, asked, kept, own), (others_weights, others, others_kept, others_own) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert asked == [4 * i + j for i in range(6) for j in (0, 1)]
    assert others == [4 * i + j for i in range(6) for j in (2, 3)]
    assert own != others_own and out.count("curves and grids") == 1
    assert not torch.equal(kept[0][0], others_kept[0][0])  # G's step averaged G's gradients alone
    assert_same(weights, others_weights)
    for one, both in zip(train_two_players(tmp_path / "one", 4)[0], weights, strict=True):
        assert torch.allclose(one, both, rtol=1e-12, atol=1e-12)


def test_pictures_per_second_counts_the_batch(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(common.tqdm, "set_postfix_str", lambda _, text, **__: texts.append(text))
    run = tiny_run(tmp_path / "run", 6, grid_every=0, batch=3, log_every=6)
    said = float(re.search(r"\| (\S+) pictures/s", texts[-1])[1])
    assert said == pytest.approx(6 * 3 / run.seconds, rel=0.01)
