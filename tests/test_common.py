"""What the scripts share: pictures, data sets, blocks and losses against naive code, runs."""
import argparse
import csv
import functools
import http.server
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from common import UserError  # noqa: E402

torch.set_num_threads(1)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- 1. errors and flags ------------------------------------------------------------------------


def parser():
    p = common.base_parser("A method.\n\nMore about it.")
    p.add_argument("--lr", type=float, default=0.1, help="rate")
    p.add_argument("--width", type=int, default=64, help="width")
    p.add_argument("--blocks", type=int, default=9, help="blocks")
    p.add_argument("--depth", type=int, default=3, help="depth")
    return p


def flags(*argv):
    def presets(args):
        return {"width": 16, "blocks": 4, "depth": 2} if args.data == "toy" else {}
    return common.parse_flags(parser(), list(argv), "method", presets, lambda a: f"m-{a.data}")


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
    assert args.run_folder == str(Path("runs/m-toy"))
    saved = {"width": 5, "depth": 6, "data": "photos", "gone": 1, "out": "x", "device": "cuda"}
    write_checkpoint(Path("w.pt"), **saved)
    args = flags("--weights", "w.pt", "--depth", "8")
    assert (args.lr, args.width, args.blocks, args.depth) == (0.1, 5, 4, 8)
    assert (args.data, args.out, args.device) == ("photos", None, None)
    assert args.run_folder == str(Path("runs/m-photos")) and not hasattr(args, "gone")
    assert flags("--weights", "w.pt", "--out", "there").run_folder == "there"


def test_resume_reads_the_run_folders_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--resume: no checkpoint at runs.m-toy.last\.pt"):
        flags("--resume")
    write_checkpoint(Path("runs/m-toy/last.pt"), width=5, resume=False)
    args = flags("--resume")
    assert (args.width, args.blocks, args.resume) == (5, 4, True)
    write_checkpoint(Path("mine/last.pt"), width=6)
    assert flags("--resume", "--out", "mine").width == 6


def test_weights_of_the_authors_bring_no_configuration(tmp_path):
    torch.save({"model.1.weight": torch.zeros(2)}, tmp_path / "net.pth")
    assert flags("--weights", str(tmp_path / "net.pth")).width == 16
    torch.save({"method": "other", "config": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: written by other\.py, not by method\.py"):
        flags("--weights", str(tmp_path / "other.pt"))
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    assert flags("--weights", str(tmp_path / "tensor.pt")).width == 16


def test_unknown_and_abbreviated_flags_are_refused(capsys):
    for unknown in ("--widht", "--widt"):
        with pytest.raises(SystemExit) as stop:
            flags(unknown, "3")
        assert stop.value.code == 2
        assert unknown in capsys.readouterr().err


@pytest.mark.parametrize("error, code, text", [
    (UserError("a.png: wrong"), 2, "m.py: error: a.png: wrong\n"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2, "m.py: error: out of memory: lower --size"),
    (MemoryError(), 2, "m.py: error: out of memory: lower --size"),
    (RuntimeError("MPS backend out of memory"), 2, "m.py: error: out of memory: lower --size"),
    (KeyboardInterrupt(), 130, ""),
])
def test_entry_says_it_in_one_line(monkeypatch, capsys, error, code, text):
    def main():
        raise error
    monkeypatch.setattr(sys, "argv", ["/somewhere/m.py"])
    with pytest.raises(SystemExit) as stop:
        common.entry(main)
    out, err = capsys.readouterr()
    assert stop.value.code == code and out == ""
    assert err.startswith(text) and err.count("\n") == (code == 2)


def test_entry_knows_the_cpus_full_memory_and_hides_no_bug(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["m.py"])
    with pytest.raises(SystemExit) as stop:
        common.entry(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert stop.value.code == 2 and "out of memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="must match"):
        common.entry(lambda: torch.ones(2) + torch.ones(3))


# ---- 2. pictures --------------------------------------------------------------------------------


def save(path, array, mode=None, **options):
    im = array if isinstance(array, Image.Image) else Image.fromarray(array)
    assert mode is None or im.mode == mode
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


def test_palette_with_and_without_transparency(tmp_path):
    im = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    im.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert (rgb(save(tmp_path / "p.png", im, "P")) == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
            ).all()
    read = rgb(save(tmp_path / "t.png", im, "P", transparency=1))
    assert (read == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]).all()
    read = rgb(save(tmp_path / "t.gif", im, "P", transparency=1))
    assert (read[0, 1] == 255).all() and (read[0, 2] == [70, 80, 90]).all()


def test_cmyk(tmp_path):
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], np.uint8)
    read = rgb(save(tmp_path / "c.tif", Image.fromarray(ink, "CMYK"), "CMYK"))
    assert (read == [[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]]).all()
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert abs(rgb(save(tmp_path / "c.jpg", flat, "CMYK")) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bit_grey(tmp_path, name):
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    read = rgb(save(tmp_path / name, deep, "I;16"))
    assert (read[0] == np.array([0, 1, 128, 255])[:, None]).all()


def test_integer_and_float_grey(tmp_path):
    deep = np.array([[-5, 0, 257, 65535, 70000]], np.int32)
    read = rgb(save(tmp_path / "i.tif", deep, "I"))
    assert (read[0, :, 0] == [0, 0, 1, 255, 255]).all()
    for name, scale in (("unit.tif", 1), ("byte.tif", 255)):
        values = np.array([[0, 0.2, 1]], np.float32) * scale
        assert (rgb(save(tmp_path / name, values, "F"))[0, :, 2] == [0, 51, 255]).all()


def test_exif_rotation(tmp_path):
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :16] = 200
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: turn a quarter to the right
    read = rgb(save(tmp_path / "e.jpg", picture, exif=exif, quality=95))
    assert read.shape == (32, 16, 3)
    assert read[:15].min() > 190 and read[17:].max() < 10


def test_tensor_and_back(tmp_path):
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    x = common.to_tensor(Image.fromarray(picture))
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1 and x[1, 0, 1] == pytest.approx(2 / 255 - 1)
    assert (np.asarray(common.to_pil(x)) == picture).all()
    wild = torch.tensor([-7.0, 0.0, 7.0]).view(3, 1, 1).requires_grad_()
    assert common.to_pil(wild).getpixel((0, 0)) == (0, 128, 255)


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    whole = save(tmp_path / "whole.jpg", np.random.default_rng(0).integers(
        0, 256, (64, 64, 3), np.uint8)).read_bytes()
    (tmp_path / "short.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    for name, why in (("text.jpg", "not a readable picture"), ("absent.png", "no such file"),
                      ("short.jpg", "truncated"), ("empty.png", "not a readable picture")):
        with pytest.raises(UserError, match=f"{name}.*{why}") as caught:
            common.open_rgb(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1


def test_list_pictures(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no pictures"):
        common.list_pictures(tmp_path)
    with pytest.raises(UserError, match="absent: no such file or folder"):
        common.list_pictures(tmp_path / "absent")
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [f.name for f in common.list_pictures(tmp_path)] == ["a.png", "b.JPG"]
    assert common.list_pictures(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (5, 4), (8, 8), (13, 22), (9, 17)])
def test_same_size(size):
    x = noise(2, 3, *size)
    seen = []

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
        save(source / name, np.full((5 + i, 7, 3), 50 * i, np.uint8))
    common.translate_files(source, out, lambda x: -x)
    assert sorted(f.name for f in out.iterdir()) == ["a.jpg.png", "a.png.png", "b.png"]
    assert rgb(out / "a.png.png").shape == (6, 7, 3) and (rgb(out / "b.png") == 155).all()
    assert str(out) in capsys.readouterr().out
    common.translate_files(source / "a.png", tmp_path / "one", lambda x: x)
    assert [f.name for f in (tmp_path / "one").iterdir()] == ["a.png"]
    assert str(tmp_path / "one/a.png") in capsys.readouterr().out


def test_translation_below_a_file(tmp_path):
    source = save(tmp_path / "a.png", np.full((4, 4, 3), 9, np.uint8))
    with pytest.raises(UserError, match="--out .*: cannot write there"):
        common.translate_files(source, source / "below", lambda x: x)


def test_grid(tmp_path):
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(2, 3, 20, 64)
    common.save_grid(tmp_path / "new/grid.png", {"one": red, "another": -red})
    sheet = rgb(tmp_path / "new/grid.png")
    assert sheet.shape == (18 + 2 * 44 + 4, 2 * 132 + 4, 3)  # small pictures are doubled
    assert (sheet[30, 60] == [255, 0, 0]).all() and (sheet[100, 200] == [0, 255, 255]).all()
    assert (sheet[:18] < 100).any()  # the labels


# ---- 3. data sets -------------------------------------------------------------------------------


def test_find_split_knows_both_layouts(tmp_path):
    for folder in ("one/trainA", "two/train/A"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.png").touch()
        root = tmp_path / folder.split("/")[0]
        assert common.find_split(root, "train", "A", "?") == [tmp_path / folder / "0.png"]
    with pytest.raises(UserError) as caught:
        common.find_split(tmp_path, "test", "B", "pictures in rows")
    for part in (tmp_path / "testB", tmp_path / "test/B", "pictures in rows"):
        assert str(part) in str(caught.value)


def test_find_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetched = []

    def fetch(urls, folder):
        fetched.append((urls, folder))
        return folder
    monkeypatch.setattr(common, "download", fetch)
    find = functools.partial(common.find_data, layout="trainA/", draw_toy=lambda: "drawn")
    assert find("toy") == "drawn"
    assert find("horse2zebra") == Path("datasets/horse2zebra")
    assert fetched == [(common.KNOWN["horse2zebra"], Path("datasets/horse2zebra"))]
    Path("datasets/horse2zebra").mkdir(parents=True)
    assert find("horse2zebra") == Path("datasets/horse2zebra") and len(fetched) == 1
    Path("horse2zebra").mkdir()
    assert find("horse2zebra") == Path("horse2zebra") and len(fetched) == 1
    with pytest.raises(UserError) as caught:
        find("horses")
    for part in ("--data horses", str(Path("datasets/horses")), "trainA/", "toy", "monet2photo"):
        assert part in str(caught.value)


def test_one_process_of_a_machine_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(common, "download", lambda *_: pytest.fail("two processes download"))
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            (tmp_path / "maps").mkdir()
    monkeypatch.setattr(common.time, "sleep", sleep)
    assert common.find_data("maps", "", None, root=tmp_path) == tmp_path / "maps"
    assert len(waits) == 3


def zipped(members, **options):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", **options) as z:
        for name, text in members.items():
            z.writestr(name, text)
    return raw.getvalue()


GOOD = {"trainA/a.png": "A" * 1000, "trainB/b.png": "B"}


def spoilt(offset):
    """A zip with a changed byte in the data of its only member."""
    raw = bytearray(zipped({"trainA/a.png": os.urandom(500) + b"A" * 500},
                           compression=zipfile.ZIP_DEFLATED))
    raw[offset] ^= 0xFF
    return bytes(raw)


FILES = {
    "/good.zip": zipped(GOOD),
    "/topped.zip": zipped({f"set/{name}": text for name, text in GOOD.items()}),
    "/crc.zip": zipped(GOOD).replace(b"A" * 1000, b"A" * 999 + b"x"),
    "/deflate.zip": spoilt(42),
    "/text.zip": b"<html>moved</html>",
    "/slip.zip": zipped({"trainA/a.png": "A", "../escaped": "x"}),
    "/absolute.zip": zipped({"trainA/a.png": "A", "/tmp/escaped-by-absolute-path": "x"}),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        self.server.asked.append(self.path)
        body = FILES.get(self.path.replace("short", "good"))
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
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


@pytest.mark.parametrize("name", ["good", "topped"])
def test_download(server, tmp_path, name):
    root = tmp_path / "datasets"
    assert common.download([f"{server.url}/{name}.zip"], root / "set") == root / "set"
    assert tree(root) == {f"set/{name}": text for name, text in GOOD.items()}
    assert [f.name for f in root.iterdir()] == ["set"]


@pytest.mark.parametrize("bad", ["absent", "short", "crc", "deflate", "text", "slip"])
def test_second_mirror(server, tmp_path, bad):
    common.download([f"{server.url}/{bad}.zip", f"{server.url}/good.zip"], tmp_path / "d/set")
    assert tree(tmp_path) == {f"d/set/{name}": text for name, text in GOOD.items()}
    assert [f.name for f in (tmp_path / "d").iterdir()] == ["set"]


@pytest.mark.parametrize("bad, why", [
    ("absent", "404"), ("short", "got "), ("crc", "CRC"), ("deflate", "zip|invalid|decompress"),
    ("text", "not a zip"), ("slip", "leaves the folder"), ("absolute", "leaves the folder")])
def test_failed_download_leaves_nothing(server, tmp_path, bad, why):
    urls = [f"{server.url}/{bad}.zip", "http://127.0.0.1:1/refused.zip"]
    with pytest.raises(UserError, match=why) as caught:
        common.download(urls, tmp_path / "d/set")
    for part in (*urls, str(tmp_path / "d/set")):
        assert part in str(caught.value)
    assert [f.name for f in tmp_path.rglob("*")] == ["d"]
    assert not Path("/tmp/escaped-by-absolute-path").exists()


def test_download_below_a_file(server, tmp_path):
    (tmp_path / "datasets").touch()
    with pytest.raises(UserError, match="cannot download set"):
        common.download([f"{server.url}/good.zip"], tmp_path / "datasets/set")


def test_a_known_name_is_downloaded_once(server, tmp_path, monkeypatch):
    monkeypatch.setitem(common.KNOWN, "maps", [f"{server.url}/good.zip?once"])
    monkeypatch.setitem(FILES, "/good.zip?once", FILES["/good.zip"])
    for _ in range(2):
        assert common.find_data("maps", "", None, root=tmp_path) == tmp_path / "maps"
    assert server.asked.count("/good.zip?once") == 1


# ---- 4. blocks and losses -----------------------------------------------------------------------


def naive_instance_norm(x):
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            plane = x[b, c]
            mean = plane.sum() / plane.numel()
            variance = ((plane - mean) ** 2).sum() / plane.numel()
            out[b, c] = (plane - mean) / (variance + 1e-5) ** 0.5
    return out


def test_instance_norm():
    norm = common.InstanceNorm(4)
    assert not list(norm.parameters()) and not norm.state_dict()
    for size in ((3, 4, 5, 7), (1, 4, 2, 3)):
        x = noise(*size) * 3 + 1
        assert torch.allclose(norm(x), naive_instance_norm(x), atol=1e-12)


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("incoming", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_instance_norm_gradient_for_one_picture(layout, incoming):
    norm = common.InstanceNorm(4)
    x = (noise(1, 4, 3, 5) * 2).to(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: norm(t).contiguous(memory_format=incoming), x)
    upstream = noise(1, 4, 3, 5, seed=1).to(memory_format=incoming)
    grad, = torch.autograd.grad(norm(x), x, upstream)
    pair = torch.cat([x.detach(), noise(1, 4, 3, 5, seed=2)]).requires_grad_()
    double, = torch.autograd.grad(norm(pair), pair, torch.cat([upstream, upstream]))
    naive, = torch.autograd.grad(naive_instance_norm(x), x, upstream)
    assert torch.allclose(grad, double[:1], atol=1e-12)
    assert torch.allclose(grad, naive, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (2, 3)])
def test_blur_down(size):
    x = noise(2, 3, *size)
    h, w = size
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
    out, activations = thin(noise(2, 3, 64, 64).float(), features=True)
    assert torch.equal(out, thin(noise(2, 3, 64, 64).float()))
    assert [tuple(a.shape) for a in activations] == [(2, 2, 32, 32), (2, 4, 16, 16), (2, 8, 8, 8),
                                                     (2, 16, 7, 7)]
    assert torch.equal(thin.stages[-1](activations[-1]), out)


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
        assert ids[-1] - ids[0] + 1 == field
        assert 0 < ids[0] and ids[-1] < 159


def test_patchgan_options():
    assert len(common.PatchGAN(ndf=2, n_layers=5).stages) == 7
    assert common.PatchGAN(ndf=2, n_layers=5).stages[-1].in_channels == 16
    torch.manual_seed(0)
    D = common.PatchGAN(6, ndf=4, norm=nn.BatchNorm2d, spectral=True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in D.modules()) == 3
    x = noise(2, 6, 32, 32).float()
    for _ in range(200):  # a power iteration each
        D(x)
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 5
    for conv in convs:
        top = torch.linalg.svdvals(conv.weight.detach().flatten(1))[0]
        assert top == pytest.approx(1, abs=0.02)


ALL_TAPS = [f"relu{b}_{i}" for b, n in zip(range(1, 6), (2, 2, 4, 4, 4), strict=True)
            for i in range(1, n + 1)]


@pytest.fixture(scope="module")
def vgg():
    return common.VGG19([f"relu{b}_1" for b in range(1, 6)], "random")


def test_vgg_taps(vgg):
    x = noise(2, 3, 32, 48).float()
    found = vgg(x)
    assert {name: tuple(a.shape) for name, a in found.items()} == {
        "relu1_1": (2, 64, 32, 48), "relu2_1": (2, 128, 16, 24), "relu3_1": (2, 256, 8, 12),
        "relu4_1": (2, 512, 4, 6), "relu5_1": (2, 512, 2, 3)}
    assert all((a >= 0).all() and 0.1 < a.square().mean() < 20 for a in found.values())
    assert len(common.VGG19(["relu2_2"], "random").features) == 9
    with pytest.raises(AssertionError, match="relu3_5"):
        common.VGG19(["relu3_5"], "random")


def test_vgg_random_weights_do_not_depend_on_the_callers_seed(vgg):
    torch.manual_seed(5)
    again = common.VGG19(["relu1_2"], "random")
    for a, b in zip(again.features.parameters(), vgg.features.parameters(), strict=False):
        assert torch.equal(a, b)
    assert again.features[0].weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.1)


def test_vgg_is_frozen_but_lets_gradients_through(vgg):
    x = noise(1, 3, 16, 16).float().requires_grad_()
    sum(a.mean() for a in vgg(x).values()).backward()
    assert x.grad.isfinite().all() and (x.grad != 0).float().mean() > 0.9
    assert all(p.grad is None and not p.requires_grad for p in vgg.parameters())
    assert not vgg.training and not any(a.requires_grad for a in vgg(x.detach()).values())


def test_vgg_normalisation():
    plain = common.VGG19(["relu1_1"], "random", normalise=False)
    ready = common.VGG19(["relu1_1"], "random", normalise=True)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    by_hand = x.clone()
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        by_hand[:, c] = ((x[:, c] + 1) / 2 - mean) / std
    assert torch.allclose(ready(x)["relu1_1"], plain(by_hand)["relu1_1"], atol=1e-5)
    assert not torch.allclose(ready(x)["relu1_1"], plain(x)["relu1_1"], atol=1e-2)


def test_vgg_ceil_mode_keeps_odd_rows():
    x = torch.rand(1, 3, 7, 5)
    shapes = [tuple(common.VGG19(["relu3_1"], "random", ceil_mode=c)(x)["relu3_1"].shape[2:])
              for c in (False, True)]
    assert shapes == [(1, 1), (2, 2)]
    with pytest.raises(RuntimeError):
        common.VGG19(["relu2_1"], "random")(x[..., :1])
    assert common.VGG19(["relu2_1"], "random", ceil_mode=True)(x[..., :1])["relu2_1"].shape[3] == 1


def test_vgg_from_a_file_is_torchvisions(tmp_path):
    from torchvision.models.vgg import cfgs, make_layers
    theirs = make_layers(cfgs["E"][:10]).eval()  # vgg19(weights=None).features up to relu3_4
    torch.save({f"features.{k}": v for k, v in theirs.state_dict().items()}, tmp_path / "vgg.pth")
    x = torch.rand(2, 3, 24, 24) * 2 - 1
    ours = common.VGG19(ALL_TAPS[:8], str(tmp_path / "vgg.pth"), normalise=False)(x)
    assert list(ours) == ALL_TAPS[:8]
    names, t = iter(ALL_TAPS), x
    with torch.no_grad():
        for layer in theirs:
            t = layer(t)
            if isinstance(layer, nn.ReLU):
                assert torch.allclose(ours[next(names)], t, atol=1e-5)
    assert next(names) == "relu4_1"


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, {"features.0.weight": 3},
                                     {"features.0.weight": torch.zeros(64, 3, 5, 5)},
                                     torch.zeros(3), ["features.0.weight"]])
def test_vgg_from_a_wrong_file(tmp_path, content):
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"wrong\.pth: not VGG-19 weights.*features\.0\.weight"):
        common.VGG19(["relu1_1"], str(tmp_path / "wrong.pth"))
    with pytest.raises(UserError, match=r"absent\.pth"):
        common.VGG19(["relu1_1"], str(tmp_path / "absent.pth"))


def test_imagenet_weights_without_network(monkeypatch):
    from torchvision.models import VGG19_Weights

    def fails(*_, **__):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(VGG19_Weights, "get_state_dict", fails)
    with pytest.raises(UserError, match="no route to host") as caught:
        common.VGG19(["relu1_1"], "imagenet")
    for part in (VGG19_Weights.IMAGENET1K_V1.url, os.path.join("checkpoints", "vgg19-"), "--vgg"):
        assert part in str(caught.value)


def test_mean_std_and_adain():
    x, style = noise(2, 3, 5, 4), noise(2, 3, 7, 6, seed=1) * 2 + 3
    means, deviations = common.mean_std(x)
    y_means, y_deviations = common.mean_std(style)
    out = common.adain(x, y_means, y_deviations)
    assert means.shape == deviations.shape == (2, 3, 1, 1)
    for b in range(2):
        for c in range(3):
            def naive(plane):
                m = sum(plane.flatten().tolist()) / plane.numel()
                v = sum((p - m) ** 2 for p in plane.flatten().tolist()) / plane.numel()
                return m, math.sqrt(v + 1e-5)
            (m, s), (ym, ys) = naive(x[b, c]), naive(style[b, c])
            assert means[b, c].item() == pytest.approx(m)
            assert deviations[b, c].item() == pytest.approx(s)
            assert torch.allclose(out[b, c], (x[b, c] - m) / s * ys + ym)


@pytest.mark.parametrize("real", [True, False])
def test_gan_losses(real):
    p = noise(2, 1, 3, 4) * 3
    each = p.flatten().tolist()
    naive = {
        common.lsgan: [(v - (1 if real else 0)) ** 2 for v in each],
        common.non_saturating: [-math.log(1 / (1 + math.exp(-v if real else v))) for v in each],
        common.hinge: [max(0, 1 - v) if real else max(0, 1 + v) for v in each]}
    for loss, values in naive.items():
        assert loss(p, real).item() == pytest.approx(sum(values) / len(values), rel=1e-6)
        assert loss(p.bfloat16(), real).dtype == torch.float32
    assert common.hinge_generator(p).item() == pytest.approx(-sum(each) / len(each), rel=1e-6)
    assert common.non_saturating(torch.tensor([-200.0]), True).item() == pytest.approx(200)


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


def frechet(a, b):
    def statistics(f):
        return f.mean(0), np.cov(f, rowvar=False)
    (m, s), (n, t) = statistics(a), statistics(b)
    values, vectors = np.linalg.eigh(s)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    return ((m - n) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * cross


class Corners(nn.Module):
    """Four pixels of an 8-bit picture, in [0, 1], in place of the Inception features."""

    num_features = 4

    def forward(self, x):
        assert x.dtype == torch.uint8
        return x[:, :, :2, :2].flatten(1)[:, [0, 3, 5, 9]].double() / 255


def test_fid_is_the_frechet_distance_of_the_8_bit_pictures(monkeypatch):
    import torchmetrics.image.fid as module
    real = module.FrechetInceptionDistance
    monkeypatch.setattr(module, "FrechetInceptionDistance",
                        lambda feature_extractor_weights_path: real(feature=Corners()))
    fakes, reals = noise(40, 3, 4, 4).float() / 2, noise(30, 3, 4, 4, seed=1).float() / 4 + 0.3
    value = common.fid(fakes.split(7), iter(reals.split(1)), torch.device("cpu"))

    def features(x):
        eight_bit = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
        return Corners()(eight_bit).numpy()
    expected = frechet(features(fakes), features(reals))
    assert expected > 0.05 and value == pytest.approx(expected, rel=1e-4)


def test_fid_weights(tmp_path, monkeypatch):
    import torchmetrics.image.fid as module
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"absent\.pth: No such file"):
        common.fid([], [], cpu, str(tmp_path / "absent.pth"))
    torch.save(Marker(tmp_path / "touched"), tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: .*safely"):
        common.fid([], [], cpu, str(tmp_path / "evil.pth"))
    assert not (tmp_path / "touched").exists()

    def fails(**_):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(module, "FrechetInceptionDistance", fails)
    with pytest.raises(UserError, match="no route to host") as caught:
        common.fid([], [], cpu)
    assert common.FID_WEIGHTS in str(caught.value) and "--fid-weights" in str(caught.value)


# ---- 5. run -------------------------------------------------------------------------------------


class Marker:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


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


def tiny_run(folder, total, samples=None, each=lambda run: None, lr=0.05, grid_every=4, **changes):
    """Train a line with dropout-like noise, so that torch's generator counts too."""
    run = common.Run("tiny", tiny_args(folder, **changes))
    G = nn.Linear(3, 1).to(changes.get("dtype"))
    opt = torch.optim.Adam(G.parameters(), lr)
    run.resume_or_start({"G": G, "opt_G": opt})
    for step, (x, y) in run.steps(samples or Samples(), total):
        if grid_every and step % grid_every == 0:
            run.save_samples({"x": torch.zeros(1, 3, 8, 8) + step / total})
        loss = (G(x)[:, 0] * torch.rand(len(x)) - y + torch.rand((), generator=run.rng())).square()
        opt.zero_grad()
        loss.mean().backward()
        run.average_gradients(G)
        opt.step()
        run.log({"L_G": loss.mean(), "L_max": loss.max()})
        each(run)
    run.save()
    return run


def states(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        for i, j in zip(a, b, strict=True):
            assert_same(i, j)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def log_rows(folder):
    with open(Path(folder) / "log.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header[0] == "step" and header[-1] == "seconds"
    return [row[:-1] for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 22 steps that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    tiny_run(folder, 22)
    return folder


@pytest.mark.parametrize("stops", [(7,), (5, 6, 21)])
def test_resumed_run_is_the_uninterrupted_one(whole, tmp_path, stops):
    folder = tmp_path / "run"

    def interrupt(run):
        if run.step + 1 in stops:
            signal.raise_signal(signal.SIGINT)
    for i in range(len(stops)):
        with pytest.raises(KeyboardInterrupt):
            tiny_run(folder, 22, each=interrupt, resume=i > 0)
        assert states(folder)["step"] == stops[i]
    tiny_run(folder, 22, resume=True)
    for part in ("step", "parts"):
        assert_same(states(folder)[part], states(whole)[part])
    assert log_rows(folder) == log_rows(whole)
    assert [row[0] for row in log_rows(whole)] == ["5", "10", "15", "20", "22"]


def test_a_killed_run_repeats_what_it_had_not_saved(whole, tmp_path):
    folder, text = tmp_path / "run", "last.pt.tmp of a crash"

    class Killed(Exception):
        pass

    def kill(run):
        if run.step == 10:
            raise Killed
    with pytest.raises(Killed):
        tiny_run(folder, 22, each=kill)
    assert states(folder)["step"] == 8 and [r[0] for r in log_rows(folder)] == ["5", "10"]
    (folder / "last.pt.tmp").write_text(text)
    with open(folder / "log.csv", "a") as f:
        f.write("1")  # a torn row
    rows = []
    tiny_run(folder, 22, each=lambda run: rows.append(log_rows(folder)), resume=True)
    assert [r[0] for r in rows[0]] == ["5"]
    assert_same(states(folder)["parts"], states(whole)["parts"])
    assert log_rows(folder) == log_rows(whole)
    assert not (folder / "last.pt.tmp").exists()


def test_an_empty_log_is_no_obstacle(tmp_path):
    tiny_run(tmp_path / "run", 3, log_every=100)
    (tmp_path / "run/log.csv").write_text("")
    tiny_run(tmp_path / "run", 5, resume=True)
    assert [row[0] for row in log_rows(tmp_path / "run")] == ["5"]
    assert (tmp_path / "run/log.csv").read_text().startswith("step,L_G,L_max,seconds\n")


def test_every_sample_is_asked_for_once_and_in_order(tmp_path):
    samples = Samples()
    run = tiny_run(tmp_path / "run", 5, samples, batch=3)
    assert samples.asked == list(range(15)) and run.step == 5


def test_log_is_the_mean_of_the_steps(tmp_path):
    seen = []
    tiny_run(tmp_path / "run", 7, grid_every=0, each=lambda run: seen.append(
        float(run.sums["L_G"][0])), log_every=3)
    steps = [seen[0], seen[1] - seen[0], seen[2] - seen[1]]
    (first, value, _), *_, last = log_rows(tmp_path / "run")
    assert first == "3" and float(value) == pytest.approx(sum(steps) / 3, rel=1e-4)
    assert last[0] == "7" and float(last[1]) == pytest.approx(seen[6], rel=1e-4)


def test_a_loss_of_every_other_step_is_averaged_over_its_own_steps(tmp_path):
    def also(run):
        if run.step % 2:
            run.log({"R1": torch.tensor(6.0)})
    tiny_run(tmp_path / "run", 5, each=also)
    assert float(log_rows(tmp_path / "run")[0][3]) == 6


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


def test_an_earlier_run_is_kept(tmp_path, capsys):
    for n in range(3):
        tiny_run(tmp_path / "run", n + 1)
    capsys.readouterr()
    assert [states(tmp_path / name)["step"] for name in ("run.1", "run.2", "run")] == [1, 2, 3]
    (tmp_path / "run/last.pt").unlink()
    tiny_run(tmp_path / "run", 1)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert len(log_rows(tmp_path / "run")) == 1


def test_nothing_left_to_do(tmp_path, capsys):
    tiny_run(tmp_path / "run", 4)
    before = states(tmp_path / "run")
    samples = Samples()
    tiny_run(tmp_path / "run", 4, samples, resume=True)
    assert "nothing left to do" in capsys.readouterr().out and samples.asked == []
    assert_same(states(tmp_path / "run")["parts"], before["parts"])


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(tmp_path):
    def explode(run):
        if run.step == 2:
            run.log({"L_G": torch.tensor(math.inf)})
    for grid_every, saved in ((4, 0), (3, 0)):
        with pytest.raises(UserError, match="L_G is not finite at step .*--lr.*last.pt"):
            tiny_run(tmp_path / "run", 8, each=explode, grid_every=grid_every)
        assert states(tmp_path / "run")["step"] == saved


def test_unwritable_run_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*file.run: cannot write there"):
        tiny_run(tmp_path / "file/run", 1)


def test_result_and_scores(tmp_path, capsys):
    run = tiny_run(tmp_path / "run", 3)
    scores = [{"name": "error", "value": 1.5, "better": "lower", "trivial": {"copy": 2.25}},
              {"name": "FID", "value": 30.0, "better": "lower"}]
    run.finish(scores)
    out = capsys.readouterr().out
    assert "error: 1.5 (lower is better; copy: 2.25)\nFID: 30 (lower is better)\n" in out
    assert str(tmp_path / "run/index.html") in out
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result.pop("seconds") >= 0
    assert result == {"method": "tiny", "data": "toy", "steps": 3, "scores": scores}
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["batch"] == 2 and "run_folder" not in config
    assert states(tmp_path / "run")["config"] == config


def test_page_is_one_self_contained_file(tmp_path):
    run = tiny_run(tmp_path / "a <b>", 34, grid_every=2, log_every=10)
    run.save_samples({"x": torch.zeros(1, 3, 8, 8)})
    page = (tmp_path / "a <b>/index.html").read_text()
    assert len(list((tmp_path / "a <b>/samples").glob("step_*.png"))) == 18
    sources = re.findall(r"(?:src|href)\s*=\s*['\"]?([^'\" >]*)", page)
    assert len(sources) == 12 and all(s.startswith("data:image/jpeg;base64,") for s in sources)
    assert "http" not in page and "url(" not in page and "<script" not in page
    curves = re.findall(r"<svg.*?</svg>", page)
    assert [re.search(">(L_[a-z]+):", c, re.I)[1] for c in curves] == ["L_G", "L_max"]
    for curve in curves:
        points = re.search("points='(.*?)'", curve)[1].split()
        assert len(points) == 4
        assert all(0 <= float(v) <= 360 for point in points for v in point.split(","))
    assert "a &lt;b&gt;" in page and "<b>" not in page
    assert "step_000000" in page and "step_000034" in page


def test_mix():
    assert common.mix(1, 2) == common.mix(1, 2) != common.mix(2, 1)
    assert 0 <= common.mix(0) < 2**63 and common.mix(1, "epoch", 2) != common.mix(1, 2)
    assert common.mix(7, "epoch", 3) == 3220216745766059909  # the same everywhere


def test_pick_device():
    assert common.pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "", "hpu", "privateuseone"):
        with pytest.raises(UserError, match=f"--device {name}: ") as caught:
            common.pick_device(name)
        assert len(str(caught.value).splitlines()) == 1


# ---- checkpoints


def test_checkpoints_that_are_refused(tmp_path):
    good = write_checkpoint(tmp_path / "good.pt")
    assert common.load_checkpoint(good, "method")["step"] == 3
    raw = good.read_bytes()
    for name, content in (("half.pt", raw[:len(raw) // 2]), ("byte.pt", raw[:-1]),
                          ("empty.pt", b""), ("text.pt", b"hello"), ("zeros.pt", bytes(99))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: truncated, or not a file") as caught:
            common.load_checkpoint(tmp_path / name, "method")
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"good\.pt: written by method\.py, not by cut\.py"):
        common.load_checkpoint(good, "cut")
    with pytest.raises(UserError, match=r"absent\.pt: No such file"):
        common.load_checkpoint(tmp_path / "absent.pt", "method")
    with pytest.raises(UserError, match="directory"):
        common.load_checkpoint(tmp_path, "method")
    for content in ({"weight": torch.zeros(1)}, torch.zeros(1), [1]):
        torch.save(content, tmp_path / "foreign.pt")
        with pytest.raises(UserError, match=r"foreign\.pt: not a checkpoint of method\.py"):
            common.load_checkpoint(tmp_path / "foreign.pt", "method")


@pytest.mark.parametrize("new_format", [True, False])
def test_any_cut_of_a_checkpoint_is_refused(tmp_path, new_format):
    torch.save({"method": "method", "parts": {"G": nn.Linear(2, 2).state_dict()}},
               tmp_path / "x.pt", _use_new_zipfile_serialization=new_format)
    raw = (tmp_path / "x.pt").read_bytes()
    for end in range(0, len(raw) - 1, len(raw) // 60):
        (tmp_path / "x.pt").write_bytes(raw[:end])
        with pytest.raises(UserError, match=r"x\.pt: "):
            common.load_checkpoint(tmp_path / "x.pt", "method")


@pytest.mark.parametrize("new_format", [True, False])
def test_a_malicious_checkpoint_is_not_unpickled(tmp_path, new_format):
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


def test_resume_refuses_other_flags(tmp_path):
    tiny_run(tmp_path / "run", 2)
    run = common.Run("tiny", tiny_args(tmp_path / "run", resume=True))
    with pytest.raises(UserError, match="G does not fit the flags"):
        run.resume_or_start({"G": nn.Linear(4, 1)})


# ---- processes of their own: signals, workers, torchrun


SCRIPT = """import os, sys
sys.path[:0] = [{!r}, {!r}]
import torch
import test_common as t
"""


def script(folder, body):
    (folder / "tiny.py").write_text(SCRIPT.format(str(ROOT), str(ROOT / "tests"))
                                    + textwrap.dedent(body))
    return [sys.executable, str(folder / "tiny.py")]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def start(command, folder):
    return subprocess.Popen(command, cwd=folder, env=environment(), text=True, stdout=-1, stderr=-1,
                            start_new_session=True)


def wait_for_step(folder, step, process):
    log = folder / "run/log.csv"
    for _ in range(3000):
        if log.exists() and len(log.read_text().splitlines()) > step:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    pytest.fail(f"no step {step}")


def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path):
    process = start(script(tmp_path, """
        def main():
            torch.multiprocessing.set_start_method("spawn")  # as on macOS: inherits no handler
            t.tiny_run("run", 22, t.Samples(seconds=0.03), log_every=1, workers=1)
        if __name__ == "__main__":
            t.common.entry(main)
    """), tmp_path)
    wait_for_step(tmp_path, 6, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    out, err = process.communicate(timeout=60)
    step = states(tmp_path / "run")["step"]
    assert process.returncode == 130 and 6 <= step < 22
    assert f"stopped at step {step} of 22; the same command with --resume goes on" in err
    assert "Traceback" not in err
    tiny_run(tmp_path / "run", 22, resume=True)
    assert_same(states(tmp_path / "run")["parts"], states(whole)["parts"])


@pytest.mark.parametrize("where", ["torch.save", "os.replace"])
def test_a_kill_while_saving_leaves_the_earlier_checkpoint(whole, tmp_path, where):
    process = start(script(tmp_path, f"""
        calls = []
        def killed(state, *rest):
            calls.append(state)
            if len(calls) == 3:
                if "{where}" == "torch.save":
                    rest[0].write(b"half a checkpoint")
                    rest[0].flush()
                os.kill(os.getpid(), t.signal.SIGKILL)
            return real(state, *rest)
        real, {where} = {where}, killed
        t.tiny_run("run", 22)
    """), tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "run/last.pt.tmp").exists()
    assert states(tmp_path / "run")["step"] == 4  # the third save is that of step 8
    tiny_run(tmp_path / "run", 22, resume=True)
    assert_same(states(tmp_path / "run")["parts"], states(whole)["parts"])
    assert log_rows(tmp_path / "run") == log_rows(whole)


def test_an_unreadable_picture_in_a_worker_is_one_line(tmp_path):
    done = subprocess.run(script(tmp_path, """
        def main():
            t.tiny_run("run", 22, t.Samples(bad=13), workers=1)
        t.common.entry(main)
    """), cwd=tmp_path, env=environment(), text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.endswith("tiny.py: error: photos/broken.png: no such file\n")
    assert "Traceback" not in done.stderr
    assert states(tmp_path / "run")["step"] == 6


def test_two_processes_do_what_one_with_the_double_batch_does(tmp_path):
    script(tmp_path, """
        samples = t.Samples(dtype=torch.float64)
        run = t.common.Run("tiny", t.tiny_args("run", seed=1))
        G = torch.nn.Linear(3, 1).double()
        opt = torch.optim.SGD(G.parameters(), 0.05)
        run.resume_or_start({"G": G, "opt_G": opt})
        gradients = []
        for _, (x, y) in run.steps(samples, 6):
            opt.zero_grad()
            (G(x)[:, 0] * torch.rand((), generator=run.rng()) - y).square().mean().backward()
            run.average_gradients(G)
            opt.step()
            gradients.append([p.grad.clone() for p in G.parameters()])
        run.save_samples({"x": torch.zeros(1, 3, 8, 8)})
        run.finish([])
        torch.save((samples.asked, gradients, torch.rand(())), f"{run.rank}.pt")
    """)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "tiny.py"],
        cwd=tmp_path, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    (asked, grads, own), (others, other_grads, other_own) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert asked == [4 * i + j for i in range(6) for j in (0, 1)]
    assert others == [4 * i + j for i in range(6) for j in (2, 3)]
    assert own != other_own
    assert_same(grads, other_grads)
    assert done.stdout.count("pictures and curves") == 1

    run = common.Run("tiny", tiny_args(tmp_path / "one", seed=1, batch=4))
    G = nn.Linear(3, 1).double()
    opt = torch.optim.SGD(G.parameters(), 0.05)
    run.resume_or_start({"G": G, "opt_G": opt})
    for step, (x, y) in run.steps(Samples(dtype=torch.float64), 6):
        opt.zero_grad()
        (G(x)[:, 0] * torch.rand((), generator=run.rng()) - y).square().mean().backward()
        opt.step()
        for p, mean in zip(G.parameters(), grads[step], strict=True):
            assert torch.allclose(p.grad, mean, rtol=1e-12, atol=1e-12)
    assert step == 5


def test_ids_keep_their_values_in_every_one_channel_format(tmp_path):
    ids = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    Image.fromarray(ids).save(tmp_path / "grey.png")
    palette = Image.fromarray(ids, "P")
    palette.putpalette([7] * 768)
    palette.save(tmp_path / "palette.png")
    Image.fromarray(ids.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(ids > 0).save(tmp_path / "bits.png")
    for name, truth in (("grey", ids), ("palette", ids), ("deep", ids * 257.), ("bits", ids > 0)):
        assert np.array_equal(np.asarray(common.open_ids(tmp_path / f"{name}.png")), truth), name
    Image.new("RGB", (2, 2)).save(tmp_path / "colours.png")
    with pytest.raises(UserError, match="colours.png: expected .* one channel, found RGB .*; try"):
        common.open_ids(tmp_path / "colours.png", "; try this")
    with pytest.raises(UserError, match="absent.png: no such file"):
        common.open_ids(tmp_path / "absent.png")
    (tmp_path / "broken.png").write_text("text")
    with pytest.raises(UserError, match="broken.png: not a readable picture"):
        common.open_ids(tmp_path / "broken.png")


def test_ablation_table(tmp_path, capsys):
    row = [{"name": "error", "value": 12.345, "better": "lower", "trivial": {"copy": 59.31}},
           {"name": "IoU", "value": 0.5, "better": "higher"}]
    common.save_ablation(tmp_path, {"all": row, "without L": row[::-1]})
    text = (tmp_path / "ablation.md").read_text()
    assert text.splitlines() == ["| variant | error (lower) | IoU (higher) |", "|---|---|---|",
                                 "| all | 12.3 | 0.5 |", "| without L | 0.5 | 12.3 |",
                                 "| copy | 59.3 |  |"]
    assert text in capsys.readouterr().out
    common.save_ablation(tmp_path / "none", {"all": []})
    assert not (tmp_path / "none").exists()
