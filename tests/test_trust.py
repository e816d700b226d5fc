"""Nothing wrong let in, nothing lost: odd pictures, damaged checkpoints, full disks, dead workers.

Kinds of mistakes that users of image-to-image repositories meet; each is mended once, in common.py.
"""

import copy
import functools
import importlib
import os
import signal
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import test_common as t
import torch
import torch.nn as nn
from PIL import Image, ImageCms
from test_readme import SCRIPTS, parser_of

import common
from common import UserError


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(common, "SAID", {})
    for name, value in (("GREY", None), ("SIDE", None), ("TRAINED", common.math.inf)):
        monkeypatch.setattr(common, name, value)


def stored(path, array, turn=None, **how):
    exif = Image.Exif()
    if turn:
        exif[274] = turn
    Image.fromarray(array).save(path, exif=exif, **how)
    return path


@pytest.mark.parametrize("script, flags, said", [
    ("cyclegan", "--data a/monet2photo", "settings: blocks 9, load 286, lambda_identity 5.0"),
    ("egscit", "--data photos", "batch 3, lambda_c 100.0"),
    ("spade", "--data cityscapes --labels 20", "labels 20, edges True"),
    ("cut", "", "settings for toy data, not the paper's: load 64, "),
    ("swapae", "--data pictures", None), ("cut", "--translate a.png", None)])
def test_settings_that_a_name_brings_along_are_said_once(script, flags, said, monkeypatch, capsys):
    module = importlib.import_module(script)
    module.get_args(flags.split())
    printed = capsys.readouterr().out
    assert said in printed and printed.count("\n") == 1 if said else not printed
    monkeypatch.setenv("RANK", "1")  # torchrun's other processes
    module.get_args(flags.split())
    assert not capsys.readouterr().out


# ---- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "tif"])  # Pillow turns the second by itself
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_maps_and_sizes_are_seen_upright(tmp_path, turn, kind):
    ids = np.arange(6, dtype=np.uint8).reshape(2, 3)
    upright = {1: ids, 2: ids[:, ::-1], 3: ids[::-1, ::-1], 4: ids[::-1], 5: ids.T,
               6: np.rot90(ids, -1), 7: ids[::-1, ::-1].T, 8: np.rot90(ids)}[turn]
    path = stored(tmp_path / f"a.{kind}", ids, turn)
    assert np.array_equal(common.open_ids(path), upright)
    assert np.array_equal(np.asarray(common.open_rgb(path))[..., 0], upright)
    assert common.opened(path, size_only=True) == upright.shape[::-1]
    other = stored(tmp_path / "b.png", np.zeros(upright.shape, np.uint8))
    common.open_ids(path, of=other)
    wrong = stored(tmp_path / "c.png", np.zeros(upright.T.shape, np.uint8))
    with pytest.raises(UserError, match=r"c\.png: .x. pixels, but .*a\..* has "):
        common.open_ids(wrong, of=path)


def test_jpeg_label_maps_and_second_names_are_refused(tmp_path):
    stored(tmp_path / "0.jpg", np.zeros((8, 8), np.uint8))
    with pytest.raises(UserError, match="0.jpg: JPEG changes ids"):
        common.open_ids(tmp_path / "0.jpg")
    files = [tmp_path / "a/0.png", tmp_path / "b/0.png", tmp_path / "b/0.jpg"]
    assert common.by_name(files[:2], tmp_path) == {"a/0": files[0], "b/0": files[1]}
    for some, root in ((files[:2], None), (files[1:], tmp_path)):
        with pytest.raises(UserError, match="0.*0.*: two files of one name"):
            common.by_name(some, root)


def test_folders_are_listed_without_what_is_no_picture(tmp_path, capsys):
    for name in ("b.png", "a.JPG", ".DS_Store", "._a.jpg", "Thumbs.db", "notes.txt", "more.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [f.name for f in common.list_pictures(tmp_path)] == ["a.JPG", "b.png"]
    common.list_pictures(tmp_path)
    assert capsys.readouterr().err == f"{tmp_path}: left out 1 .db, 2 .txt\n"


@pytest.mark.parametrize("values, said", [
    (np.linspace(0, 4095, 3072).astype(np.uint16), True),       # 12 bits in 16: nearly black
    (np.linspace(0, 3000, 3072).astype(np.float32), True),      # heights
    (np.linspace(-1000, 2000, 3072).astype(np.int32), True),    # Hounsfield units
    (np.linspace(0, 65535, 3072).astype(np.uint16), False), (np.linspace(0, 1, 3072), False)])
def test_deep_greys_have_one_range_or_a_word_is_said(tmp_path, capsys, monkeypatch, values, said):
    holes = values.astype(np.float32).reshape(48, 64)
    path = tmp_path / "a.tif"
    Image.fromarray(values.reshape(48, 64).astype("float32") if values.dtype == float
                    else values.reshape(48, 64)).save(path)
    common.open_rgb(path)
    common.open_rgb(path)
    assert capsys.readouterr().err.count("--range LOW HIGH sets") == said
    monkeypatch.setattr(common, "GREY", (float(values.min()), float(values.max())))
    grey = np.asarray(common.open_rgb(path))[..., 0]
    assert grey.min() == 0 and grey.max() == 255 and len(np.unique(grey)) == 256
    holes[0, :3] = np.nan
    Image.fromarray(holes).save(path)
    assert (np.asarray(common.open_rgb(path))[0, :3] == 0).all()


def test_damaged_tags_are_no_obstacle(tmp_path):
    ids = np.zeros((2, 3), np.uint8)
    turn = struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    resolution = struct.pack("<HHI", 282, 2, 4) + b"72 \0"  # a text
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + turn + resolution + bytes(4)
    Image.fromarray(ids).save(tmp_path / "a.jpg", exif=exif)
    assert common.open_rgb(tmp_path / "a.jpg").size == (2, 3)


def test_side_resizes_bicubically_there_and_back(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    monkeypatch.setattr(common, "SIDE", 20)
    common.translate_files(tmp_path / "a.png", tmp_path / "out", lambda x: x)
    small = Image.fromarray(noise).resize((30, 20), Image.BICUBIC)
    written = np.asarray(Image.open(tmp_path / "out/a.png")).astype(int)
    assert np.abs(written - np.asarray(small.resize((90, 60), Image.BICUBIC))).max() <= 2


def exchanged_profile():
    """An ICC profile whose red is sRGB's blue, and the reverse: its table of tags names them so."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for a, b in ((b"rXYZ", b"????"), (b"bXYZ", b"rXYZ"), (b"????", b"bXYZ")):
        profile = profile.replace(a, b, 1)
    return profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


def test_colours_of_another_profile_become_srgb(tmp_path):
    """As an Adobe RGB or Display P3 photograph; sRGB's own and a broken one change nothing."""
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, seen in ((exchanged_profile(), rgb[..., ::-1]), (srgb, rgb), (b"broken", rgb)):
        path = stored(tmp_path / "a.png", rgb, icc_profile=profile)
        read = np.asarray(common.open_rgb(path)).astype(int)
        assert np.abs(read - seen).max() <= 1
    alpha = np.full((8, 8, 1), 255, np.uint8)
    alpha[:4] = 0
    path = stored(tmp_path / "b.png", np.concatenate([rgb, alpha], 2),
                  icc_profile=exchanged_profile())
    read = np.asarray(common.open_rgb(path)).astype(int)
    assert (read[:4] == 255).all() and np.abs(read[4:] - rgb[4:, :, ::-1]).max() <= 1


@pytest.mark.parametrize("side", [None, 10])
def test_what_was_transparent_is_so_again(tmp_path, monkeypatch, side):
    rgba = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    monkeypatch.setattr(common, "SIDE", side)
    stored(tmp_path / "a.png", rgba)
    common.translate_files(tmp_path / "a.png", tmp_path / "out", lambda x: torch.cat([x, -x], 3))
    written = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert written.shape == (20, 60, 4)
    assert (written[..., 3] == np.tile(rgba[..., 3], (1, 2))).all()
    rgba[..., 3] = 255
    for name, opaque in (("b.png", rgba), ("c.png", rgba[..., :3])):
        stored(tmp_path / name, opaque)
        common.translate_files(tmp_path / name, tmp_path / "out", lambda x: x)
        assert Image.open(tmp_path / "out" / name).mode == "RGB"


def test_palettes_and_key_colours_keep_their_profile(tmp_path):
    rgb = np.array([[(200, 40, 30), (9, 9, 9)]] * 2, np.uint8)
    palette = Image.fromarray(rgb).quantize(2)
    palette.save(tmp_path / "p.png", icc_profile=exchanged_profile())
    Image.fromarray(rgb).save(tmp_path / "k.png", icc_profile=exchanged_profile(),
                              transparency=(9, 9, 9))
    for name, second in (("p.png", (9, 9, 9)), ("k.png", (255, 255, 255))):
        read = np.asarray(common.open_rgb(tmp_path / name)).astype(int)[0]
        assert np.abs(read - [(30, 40, 200), second]).max() <= 1, name


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_damaged_exif_spoils_no_pixel(tmp_path, kind):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (4, 3), "red").save(tmp_path / f"a.{kind}", exif=exif.tobytes()[:10])
    assert common.open_rgb(tmp_path / f"a.{kind}").size == (4, 3)
    assert common.opened(tmp_path / f"a.{kind}", size_only=True) == (4, 3)


@pytest.mark.parametrize("name, how", [("a.jp2", {"quality_layers": [40]}), ("a.avif", {}), (
    "a.tif", {"compression": "jpeg"})])
def test_maps_in_other_lossy_formats_are_refused(tmp_path, name, how):
    try:
        Image.new("L", (64, 64)).save(tmp_path / name, **how)
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow does not write {name}: {error}")
    with pytest.raises(UserError, match=f"{name}: (JPEG|JPEG2000|AVIF) changes ids"):
        common.open_ids(tmp_path / name)
    Image.new("L", (64, 64)).save(tmp_path / "b.tif", compression="tiff_lzw")
    assert np.asarray(common.open_ids(tmp_path / "b.tif")).max() == 0


def test_a_folder_of_pictures_that_cannot_be_read_says_what_is_there(tmp_path, capsys):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    with pytest.raises(UserError, match="no pictures in this folder"):
        common.list_pictures(tmp_path, suffixes={".png"})
    assert "left out 1 .HEIC" in capsys.readouterr().err


def test_pictures_never_share_an_output(tmp_path):
    for name in ("1.jpg", "1.png", "1.jpg.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    common.translate_files(tmp_path, tmp_path / "out", lambda x: x)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "1.jpg.png", "1.jpg.png.png", "1.png.png"]


def test_floats_that_are_not_finite_do_not_set_the_range(tmp_path):
    Image.fromarray(np.float32([[0, np.inf], [-np.inf, 1]])).save(tmp_path / "a.tif")
    assert np.asarray(common.open_rgb(tmp_path / "a.tif"))[..., 0].tolist() == [[0, 255], [0, 255]]


def test_a_jpeg_by_another_name_is_no_map(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(UserError, match="a.png: JPEG changes ids"):
        common.open_ids(tmp_path / "a.png")


def test_what_pillow_only_knows_by_name_is_no_picture(tmp_path):
    for name in ("a.png", "features.h5", "clip.mpg", "x.ps"):
        Image.new("L", (8, 8)).save(tmp_path / name, format="PNG")
    assert [f.name for f in common.list_pictures(tmp_path)] == ["a.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_linked_folders_are_walked(tmp_path):
    stored_in = tmp_path / "store/clip2"
    stored_in.mkdir(parents=True)
    Image.new("L", (8, 8)).save(stored_in / "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/clip2").symlink_to(stored_in)
    (tmp_path / "data/.hidden").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "data/.hidden/b.png")
    assert common.list_pictures(tmp_path / "data", below=True) == [tmp_path / "data/clip2/a.png"]
    assert common.has_pictures(tmp_path / "data")


def test_grids_of_photographs_have_the_scale_of_training(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "TRAINED", 30)
    for side in "AB":
        (tmp_path / f"test{side}").mkdir()
        for i in range(5):
            Image.new("L", (120, 90), i).save(tmp_path / f"test{side}/{i}.png")
    args = types.SimpleNamespace(split="test", direction="AtoB", size=16)
    found = common.test_pictures(tmp_path, args, "cpu", limit=2)
    assert found["x"].shape == (2, 3, 30, 40)
    assert ((found["x"][:, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 2]  # evenly spaced
    assert common.test_pictures(tmp_path, args, "cpu", square=True)["y"].shape == (5, 3, 16, 16)


def test_nothing_is_written_where_one_would_be_overwritten(tmp_path):
    for name in ("a.jpg", "b.PNG"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(UserError, match="b.png would be overwritten"):
        common.translate_files(tmp_path, tmp_path, lambda x: x)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.jpg", "b.PNG"]


def test_training_does_not_take_weights_in_silence(tmp_path):
    with pytest.raises(UserError, match="--weights: read by --translate and --evaluate"):
        t.tiny_run(tmp_path / "r", 2, weights="a/last.pt")


def test_a_name_beyond_the_console(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in/\u5199.png")
    code = "import common; common.entry(lambda: common.translate_files('in', 'out', lambda x: x))"
    console = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0",
                            "PYTHONPATH": os.path.dirname(common.__file__)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env=console)
    assert done.returncode == 0 and "1 translated" in done.stdout, done.stderr


def test_pages_after_the_first_are_counted(tmp_path, capsys):
    pages = [Image.new("RGB", (9, 9), colour) for colour in ("red", "green", "blue")]
    for name in ("a.tif", "b.gif", "c.webp"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        assert common.open_rgb(tmp_path / name).getpixel((4, 4))[1:] <= (9, 9)
        assert f"{name}: the first of 3 pages is taken" in capsys.readouterr().err
    pages[0].save(tmp_path / "d.tif")
    common.open_rgb(tmp_path / "d.tif")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("side, seen", [(None, (90, 60)), (20, (30, 20)), (120, (180, 120))])
def test_side_is_what_the_net_sees_and_the_answer_has_the_pictures_size(tmp_path, monkeypatch, side,
                                                                        seen):
    ramp = np.linspace(0, 255, 90)[None, :, None].repeat(60, 0).repeat(3, 2).astype(np.uint8)
    path, sizes = stored(tmp_path / "a.jpg", np.rot90(ramp).copy(), turn=6), []
    monkeypatch.setattr(common, "SIDE", side)

    def net(x):
        sizes.append(x.shape)
        return torch.cat([x, -x], dim=3)  # two answers side by side
    common.translate_files(path, tmp_path / "out", net)
    assert sizes == [(1, 3, *seen[::-1])]
    answer = np.asarray(Image.open(tmp_path / "out/a.png")).astype(float)
    assert answer.shape == (60, 180, 3)
    assert abs(answer[:, :90] - ramp).max() < 16 and abs(answer[:, 90:] - 255 + ramp).max() < 16


def test_a_photo_beyond_the_scale_of_training_is_named_once(tmp_path, monkeypatch, capsys):
    for i in range(3):
        stored(tmp_path / f"{i}.png", np.zeros((65, 130, 3), np.uint8))
    for trained, side, said in ((33, None, 0), (32, None, 1), (32, 64, 0)):
        monkeypatch.setattr(common, "SAID", {})
        monkeypatch.setattr(common, "TRAINED", trained)
        monkeypatch.setattr(common, "SIDE", side)
        common.translate_files(tmp_path, tmp_path / "out", lambda x: x)
        err = capsys.readouterr().err
        assert err.count("0.png: more than twice the scale of the training; --side 32") == said
        assert err.count("--side") == said


def test_the_scale_of_training_is_that_of_the_flags(tmp_path, monkeypatch):
    import sincut
    for flags, scale in (((), 32), (("--size", "64", "--tile", "64"), 64)):
        sincut.get_args(["--data", "x", *flags, "--scale", "20", str(scale)])
        assert common.TRAINED == max(scale, 128 if not flags else 64) and common.SIDE is None
    t.flags("--side", "90")
    assert common.SIDE == 90


def test_one_broken_picture_does_not_stop_the_others(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(3):
        stored(tmp_path / f"in/{i}.png", np.full((4, 4, 3), 60 * i, np.uint8))
    (tmp_path / "in/1.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="1 of 3 not translated: .*1.png: not a readable picture"):
        common.translate_files(tmp_path / "in", tmp_path / "out", lambda x: x)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["0.png", "2.png"]
    assert capsys.readouterr().out.startswith("2 translated")


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 5}])
def test_weights_as_others_wrap_them(tmp_path, wrap):
    state = nn.Linear(2, 3).state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    t.assert_same(common.load_file(tmp_path / "w.pth"), dict(state))


def test_safetensors_are_named_and_compressed_archives_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="w.safetensors: .*; safetensors: convert it with"):
        common.load_file(tmp_path / "w.safetensors")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data/0", bytes(9_000_000))
    with pytest.raises(UserError, match="bomb.pt: a compressed archive"):
        common.load_file(tmp_path / "bomb.pt")


@pytest.mark.parametrize("sums", [{"L": 3}, {"L": (1, "x")}, {"L": (1, float("inf"))}])
def test_damaged_sums_are_named(tmp_path, sums):
    t.tiny_run(tmp_path / "r", 2)
    torch.save(t.states(tmp_path / "r") | {"sums": sums}, tmp_path / "r/last.pt")
    with pytest.raises(UserError, match="last.pt: run does not fit"):
        t.tiny_run(tmp_path / "r", 4, resume=True)


@pytest.mark.parametrize("name, value", [
    ("config", None), ("parts", [1]), ("step", None), ("step", "3"), ("seconds", "1"),
    ("sums", None)])
def test_damaged_fields_are_named(tmp_path, name, value):
    path = t.write_checkpoint(tmp_path / "x.pt")
    state = torch.load(path, weights_only=True)
    torch.save(state | {name: value}, path)
    with pytest.raises(UserError, match=f"x.pt: damaged, its '{name}'"):
        common.load_checkpoint(path, "method")


def spoilt(change):
    """A net with a used Adam, and its checkpoint after change(state of the optimiser)."""
    net = nn.Linear(2, 3)
    opt = torch.optim.Adam(net.parameters(), 0.1, fused=True)
    net(torch.ones(1, 2)).sum().backward()
    opt.step()
    state = opt.state_dict()
    change(state)
    return opt, state


@pytest.mark.parametrize("change", [
    lambda s: s["state"][0].update(exp_avg=torch.zeros(3)),
    lambda s: s["state"][1].update(exp_avg_sq=torch.zeros(())),
    lambda s: s["state"][0].update(step=torch.zeros(7)),
    lambda s: s["state"][0].update(exp_avg=5),
    lambda s: s["param_groups"][0].update(params=[0]),
    lambda s: s.pop("state"), lambda s: s.update(param_groups=3)])
def test_states_that_would_corrupt_memory_are_refused(change):
    opt, state = spoilt(change)
    with pytest.raises(UserError, match="x.pt: opt does not fit the flags"):
        common.load_parts({"opt": opt}, {"opt": state}, "x.pt")


@pytest.mark.parametrize("of_file, ours", [
    (torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last)])
def test_adam_goes_on_in_another_memory_layout_and_reads_no_foreign_memory(of_file, ours):
    """As from a GPU (NHWC) to a CPU: fused Adam walks the memory in the order of the weights'."""
    def begun(layout):
        torch.manual_seed(0)
        net = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        return net, torch.optim.Adam(net.parameters(), 0.1, fused=True)

    def steps(net, opt, n):
        for i in range(n):
            torch.manual_seed(i)
            opt.zero_grad()
            net(torch.randn(2, 3, 5, 5)).square().sum().backward()
            opt.step()
        return net.weight.detach().clone()

    (net, opt), (other, opt_other) = begun(of_file), begun(ours)
    steps(net, opt, 3)
    state, shrunk = (copy.deepcopy({"net": net.state_dict(), "opt": opt.state_dict()})
                     for _ in range(2))
    common.load_parts({"net": other, "opt": opt_other}, state, "x.pt")
    assert torch.allclose(steps(other, opt_other, 3), steps(net, opt, 3), atol=1e-5)
    shrunk["opt"]["state"][0]["exp_avg"] = torch.zeros(1, 1, 1, 1).expand(4, 3, 3, 3)  # 4 bytes
    common.load_parts({"net": other, "opt": opt_other}, shrunk, "x.pt")
    assert opt_other.state[other.weight]["exp_avg"].untyped_storage().nbytes() == 4 * 108


def test_a_file_does_not_choose_the_rates():
    opt, state = spoilt(lambda s: s["param_groups"][0].update(lr=1e9, fused=None))
    common.load_parts({"opt": opt}, {"opt": state}, "x.pt")
    assert opt.param_groups[0]["lr"] == 0.1 and opt.param_groups[0]["fused"] is True


def test_weights_that_are_not_finite_are_refused():
    net = nn.Linear(2, 3)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    state["bias"][1] = torch.nan
    with pytest.raises(UserError, match="x.pt: G holds numbers that are not finite"):
        common.load_parts({"G": net}, {"G": state}, "x.pt")
    opt, state = spoilt(lambda s: s["state"][0]["exp_avg"].fill_(torch.nan))
    with pytest.raises(UserError, match="x.pt: opt holds numbers that are not finite"):
        common.load_parts({"opt": opt}, {"opt": state}, "x.pt")


def test_weights_of_others_that_are_not_finite_are_refused(tmp_path):
    torch.save({"model.1.weight": torch.tensor([1.0, torch.inf])}, tmp_path / "G.pth")
    with pytest.raises(UserError, match="G.pth: holds numbers that are not finite"):
        common.load_file(tmp_path / "G.pth")


def test_a_last_step_that_spoils_the_weights_is_not_saved(tmp_path):
    def spoil(run):
        if run.step == 9:
            run.parts["G"].weight.data[0, 0] = torch.inf
    with pytest.raises(UserError, match="G is not finite at step 10: lower --lr"):
        t.tiny_run(tmp_path / "r", 10, each=spoil)
    assert t.states(tmp_path / "r")["step"] == 8

    def freeze(run):  # finite weights that would never move again
        if run.step == 9:
            run.parts["opt_G"].state[run.parts["G"].weight]["exp_avg_sq"].fill_(torch.inf)
    with pytest.raises(UserError, match="opt_G is not finite at step 10"):
        t.tiny_run(tmp_path / "s", 10, each=freeze)


def test_flags_of_a_checkpoint_pass_through_the_parser(tmp_path):
    def parsed(own=False, **config):
        p = common.base_parser("x")
        p.add_argument("--mode", choices=["a", "b"], default="a", help="x")
        p.add_argument("--layers", type=int, nargs="+", default=[1], help="x")
        p.add_argument("--groups", metavar="FILE", help="x")
        p.add_argument("--mask", metavar="FILE|X,Y|all", help="x")
        args = vars(p.parse_args(common.saved_flags(p, config, "w.pt", own)))
        return {name: value for name, value in args.items() if value != p.get_default(name)}
    good = {"mode": "b", "layers": [2, 3], "amp": True, "seed": 5, "data": "-maps",
            "range": [-1.0, 2.0]}
    assert parsed(**good) == good and parsed(amp=False) == {}
    paths = {"groups": "/etc/x", "mask": "/etc/x", "split": "val"}  # others are scored on test
    risky = paths | {"workers": 9, "compile": True, "out": "/x", "gone": 1}
    assert parsed(**risky, data="d/e") == {"data": "d/e"}  # only read, and what figures show
    assert parsed(own=True, **risky) == paths
    for wrong in ({"layers": [1, "--out=/x"]}, {"layers": [1, "-h"]}, {"mode": "c"},
                  {"layers": ["x"]}, {"seed": 0.5}, {"log_every": "x"}):
        with pytest.raises(UserError, match=f"w.pt: its .*--{[*wrong][0].replace('_', '-')}"):
            parsed(**wrong)


# ---- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_said_in_one_line_and_keeps_the_old_checkpoint(tmp_path, monkeypatch, call):
    t.tiny_run(tmp_path / "r", 4)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(common.os, call, full)
    with pytest.raises(UserError, match="--out .*r: cannot write there .*No space left"):
        t.tiny_run(tmp_path / "r", 8, resume=True)
    monkeypatch.undo()
    assert t.states(tmp_path / "r")["step"] == 4 and not list(tmp_path.rglob("*.tmp"))


def test_a_log_that_somebody_has_edited_is_no_obstacle(tmp_path):
    t.tiny_run(tmp_path / "r", 10)
    log = tmp_path / "r/log.csv"
    log.write_text(log.read_text() + "\n# lower --lr here\n4.0,1,1,1\n12;3;4\n")
    t.tiny_run(tmp_path / "r", 20, resume=True)
    assert [row[0] for row in t.log_rows(tmp_path / "r")] == ["5", "10", "15", "20"]


def test_resume_takes_no_other_runs_flags_and_no_file_of_yours(tmp_path):
    t.tiny_run(tmp_path / "r", 4)
    (tmp_path / "r/notes.tmp").write_text("mine")
    (tmp_path / "r/samples/step_000004.png.tmp").write_text("half")
    t.tiny_run(tmp_path / "r", 6, resume=True)
    assert [f.name for f in tmp_path.rglob("*.tmp")] == ["notes.tmp"]
    (tmp_path / "r/last.pt").rename(tmp_path / "o.pt")
    (tmp_path / "r/last.pt").symlink_to(tmp_path / "o.pt")  # kept on another disk
    given = ["--resume", "--out", str(tmp_path / "r"), "--weights"]
    parse = functools.partial(common.parse_flags, common.base_parser("x"), method="tiny",
                              presets=lambda args: {}, run_name=lambda args: "x")
    assert parse([*given, str(tmp_path / "r/last.pt")]).resume and parse(given[:-1]).resume
    with pytest.raises(UserError, match="--weights: --resume goes on from the run folder's own"):
        parse([*given, str(tmp_path / "o.pt")])


def test_a_folder_that_cannot_be_renamed_is_named(tmp_path, monkeypatch):
    t.tiny_run(tmp_path / "r", 4)

    def busy(*_):
        raise OSError(16, "Device or resource busy")
    monkeypatch.setattr(common.Path, "rename", busy)
    with pytest.raises(UserError, match="r: cannot be kept under another name .*busy.*--resume"):
        t.tiny_run(tmp_path / "r", 4)


def test_a_log_that_cannot_be_written_stops_the_run_after_saving(tmp_path):
    def remove(run):
        if run.step == 3:
            (tmp_path / "r/log.csv").mkdir()
    with pytest.raises(UserError, match="--out .*r: cannot write there"):
        t.tiny_run(tmp_path / "r", 9, each=remove, grid_every=0)
    assert t.states(tmp_path / "r")["step"] == 5


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "index.html").write_text("mine")
    (tmp_path / "style.css").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not a run's .*style.css"):
        t.tiny_run(tmp_path, 2)
    assert (tmp_path / "index.html").read_text() == "mine"
    (tmp_path / "style.css").unlink()
    (tmp_path / "config.json").write_text("mine")  # a site's, by names that a run has too
    with pytest.raises(UserError, match="not a run's .config.json, index.html"):
        t.tiny_run(tmp_path, 2)
    assert (tmp_path / "config.json").read_text() == "mine" and not (tmp_path / "lock").exists()
    (tmp_path / "tidy").mkdir()
    (tmp_path / "tidy/.DS_Store").write_text("of a file manager")
    t.tiny_run(tmp_path / "tidy", 2)


@pytest.mark.skipif(os.name == "nt", reason="other locks")
def test_a_second_run_in_one_folder_is_refused(tmp_path):
    (tmp_path / "r").mkdir()
    code = ("import fcntl, sys; f = open('r/lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="--out .*r: another run is writing there"):
            t.tiny_run(tmp_path / "r", 2)
        other.stdin.close()
    t.tiny_run(tmp_path / "r", 2)  # the lock ends with its process


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no such signal here")
def test_a_dead_worker_is_said_in_one_line_after_saving(tmp_path):
    process = t.start(tmp_path, """
        import multiprocessing
        def kill(run):
            if run.step == 5:
                [os.kill(w.pid, 7) for w in multiprocessing.active_children()]
        t.common.entry(lambda: t.tiny_run("run", 40, t.Samples(seconds=0.05), kill, workers=1))
    """)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("tiny.py: error: --workers: a process that reads")
    assert t.states(tmp_path / "run")["step"] >= 6


def test_a_closed_pipe_ends_quietly(tmp_path):
    root = str(Path(common.__file__).parent)
    code = (f"import sys; sys.path.insert(0, {root!r}); import common; "
            "common.entry(lambda: [print('x' * 999) for _ in range(999)])")
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1


# ---- several processes --------------------------------------------------------------------------


def ranks(folder, body, processes=2):
    """(exit code, lines of errors) of a program under torchrun."""
    process = t.start(folder, body, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                      "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0")
    err = process.communicate(timeout=300)[1]
    return process.returncode, [line for line in err.splitlines() if "tiny.py: error: " in line]


OWN = """
    rank = int(os.environ["RANK"])

    class History:  # as a pool of pictures: no module, each process's own
        seen = []

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = [*state["seen"]]

    def train(total, resume=False, each=lambda run: None):
        run = t.common.Run("tiny", t.tiny_args("run", resume=resume, log_every=1))
        net, history = torch.nn.BatchNorm1d(3), History()
        opt = torch.optim.SGD(net.parameters(), 0.1)
        run.resume_or_start({"net": net, "opt": opt, "history": history})
        for _, (x, _) in run.steps(t.Samples(bad=BAD.get(rank)), total):
            opt.zero_grad()
            loss = net(x).square().sum()
            loss.backward()
            opt.step()
            history.seen = [*history.seen, x[0]]
            run.log({"L_G": loss, "L_max": torch.tensor(1.0 + rank)})
            each(run)
        run.save()
        torch.save((net.state_dict(), history.seen), f"{rank}-{resume}.pt")
"""


def test_every_process_gets_back_what_is_its_own(tmp_path):
    assert ranks(tmp_path, OWN + """
    BAD = {}
    train(3)
    train(5, resume=True)
    """) == (0, [])
    three, five = ([torch.load(tmp_path / f"{rank}-{resume}.pt") for rank in (0, 1)]
                   for resume in (False, True))
    for (_, before), (_, after) in zip(three, five, strict=True):
        assert len(before) == 3 and len(after) == 5
        t.assert_same(after[:3], before)
    assert not torch.equal(five[0][0]["running_mean"], five[1][0]["running_mean"])
    assert torch.equal(five[0][0]["weight"], five[1][0]["weight"])
    assert [row[2] for row in t.log_rows(tmp_path / "run")] == ["1.5"] * 5  # the mean of all
    saved = t.states(tmp_path / "run")
    t.assert_same(saved["others"][0]["net"]["running_mean"], five[1][0]["running_mean"])
    assert sorted(saved["others"][0]) == ["history", "net", "run"]
    assert "weight" not in saved["others"][0]["net"]  # what is equal is stored once


@pytest.mark.slow
def test_more_processes_than_before_go_on(tmp_path):
    """Who was not there begins with what the first had; with fewer, too."""
    for processes, total, resume in ((2, 3, False), (3, 4, True)):
        assert ranks(tmp_path, OWN + f"""
    BAD = {{}}
    train({total}, {resume})
    """, processes) == (0, [])
    three = [torch.load(tmp_path / f"{rank}-False.pt")[1] for rank in range(2)]
    four = [torch.load(tmp_path / f"{rank}-True.pt")[1] for rank in range(3)]
    t.assert_same([history[:3] for history in four], [three[0], three[1], three[0]])
    assert [len(history) for history in four] == [4, 4, 4]
    assert len(t.states(tmp_path / "run")["others"]) == 2


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_in_one_line_after_saving(tmp_path):
    code, lines = ranks(tmp_path, OWN + """
    BAD = {1: 14}                 # of the second process alone, in step 3
    t.common.entry(lambda: train(9))
    """)
    assert code == 1  # torchrun's own
    assert lines == ["tiny.py: error: photos/broken.png: no such file"]
    assert t.states(tmp_path / "run")["step"] == 3


@pytest.mark.slow
def test_a_stop_of_one_process_is_everyones(tmp_path):
    _, lines = ranks(tmp_path, OWN + """
    BAD = {}
    def stop(run):
        if rank == 1 and run.step == 4:
            run._interrupt()
    t.common.entry(lambda: train(9, each=stop))
    """)
    assert lines == [] and t.states(tmp_path / "run")["step"] == 5


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_in_one_line(tmp_path):
    _, lines = ranks(tmp_path, OWN + """
    BAD = {}
    def die(run):
        if rank == 1 and run.step == 4:
            os._exit(1)
    t.common.entry(lambda: train(9, each=die))
    """)
    assert lines in ([], ["tiny.py: error: another process of this run has ended; --resume goes "
                          "on"])


# ---- flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_absurd_numbers_are_refused_in_one_line(script, monkeypatch, capsys):
    """Every flag of every script that takes a number; what passes is a number in its limits."""
    module, refused = importlib.import_module(script), 0
    parser = parser_of(script, monkeypatch)
    monkeypatch.undo()
    for action in parser._actions:
        sample = action.default if action.type is None else action.type("1")
        if type(sample) not in (int, float):
            continue
        for value in ("-1", "nan", "1e30", "0", "-inf", "99999999999999999999", "x"):
            words = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
            with pytest.raises((SystemExit, UserError)) as stop:
                common.check_numbers(parser, module.get_args([action.option_strings[0], *words]))
                raise UserError("fine")
            text = str(stop.value) if stop.type is UserError else capsys.readouterr().err.strip()
            assert "\n" not in text and "Traceback" not in text
            refused += text != "fine"
            assert text != "fine" or value == "0" or action.dest in ("alpha", "range"), (
                f"{action.option_strings[0]} {value}")
    assert refused > 60


def test_the_scale_of_training_is_that_of_load(monkeypatch):
    import cyclegan
    cyclegan.get_args(["--data", "x", "--size", "64", "--load", "300"])
    assert common.TRAINED == 300
