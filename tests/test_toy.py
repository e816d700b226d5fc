"""The toy world: deterministic, unpaired, with true answers, and scores that no painter wins."""
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
from lab import toy
from lab.toy import clips, disk, horse2zebra, scoring, world
from lab.toy.__main__ import main
from lab.toy.animals import Tube, animal_parts, place

ROOT = Path(__file__).resolve().parents[1]
N, N_TEST = 6, 12
TRAIN, HELD_OUT = ("train",), ("val", "test")


def folders(kinds, held_out=(), form="{split}{kind}"):
    """{folder: whether it holds n_test pictures} of `kinds`, and of those that train lacks."""
    return {form.format(split=split, kind=kind): split != "train" for split in TRAIN + HELD_OUT
            for kind in (*kinds, *(held_out if split != "train" else ()))}


DATASETS = {  # all but clips and the single pair
    "horse2zebra": folders("AB"), "day2night": folders("AB"),
    **dict.fromkeys(("synthetic2real", "synthetic2real_wide"), {
        f"{split}_{kind}": split in HELD_OUT for kind in ("img", "label")
        for split in ("source", "target", *HELD_OUT)}),
    "scenes": folders(("_img", "_label", "_inst"), [f"_styles/{s}" for s in toy.SCENE_STYLES]),
    "sketches": folders(("_sketch", "_img", "_mask"), ("_truth", "_part")),
    "textures": folders([""], ["_truth"]),
    "digits_single": folders("AB", ("AB", "BA")), "digits_multiple": folders("AB", ("AB", "BA")),
}


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def pictures(folder):
    """(N, 3, H, W) in [-1, 1]."""
    return np.stack([pixels(f) for f in sorted(folder.iterdir())]).transpose(0, 3, 1, 2) / 127.5 - 1


def contents(folder):
    return {name: (folder / name).read_bytes() for name in disk.files_in(folder)}


def held_out_scene(i):
    return toy.sample_scene(np.random.default_rng([0, 2, i]))


def in_both_coats(size, n):
    """Plain and striped pictures of the first test scenes, (n, 3, size, size) in [-1, 1]."""
    return [np.stack([np.asarray(toy.render(held_out_scene(i), size, coat)).transpose(2, 0, 1)
                      / 127.5 - 1 for i in range(n)]) for coat in toy.COATS]


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "lab.toy", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "h2z"
    toy.draw("horse2zebra", out, n=N, size=64, n_test=N_TEST)
    return out


# 1. The world -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [48, 64, 100, 256])
def test_the_two_coats_differ_in_the_coat_only(size):
    for i in range(4):
        scene = held_out_scene(i)
        a, b = (np.asarray(toy.render(scene, size, coat)).astype(int) for coat in toy.COATS)
        mask = toy.coat_mask(scene, size)
        assert a.shape == b.shape == (size, size, 3) and mask.shape == (size, size)
        difference = abs(a - b).max(axis=2)
        assert difference[mask == 0].max() == 0
        assert (difference[mask == 1] > 20).mean() > 0.8


def test_coverage():
    cover = [toy.coat_mask(toy.sample_scene(np.random.default_rng([7, i])), 32).mean()
             for i in range(60)]
    assert 0.18 < np.mean(cover) < 0.25
    assert min(cover) > 0.12 and max(cover) < 0.38
    assert np.std(cover) > 0.02


def test_both_domains_have_the_same_world():
    def statistics(stream):
        scenes = [toy.sample_scene(np.random.default_rng([0, stream, i])) for i in range(400)]
        return np.array([[s.horizon, s.sun_x, len(s.trees) / 8, len(s.animals), s.animals[0].unit,
                          s.animals[0].facing, s.daylight == "noon"] for s in scenes])
    a, b = statistics(0), statistics(1)
    error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / 400)
    assert (abs(a.mean(axis=0) - b.mean(axis=0)) < 4 * error).all()


def test_stripes_are_black_and_white_and_local():
    for i in range(8):
        scene = held_out_scene(i)
        mask = toy.coat_mask(scene, 64) == 1
        inside = mask[:, 1:] & mask[:, :-1]
        values, edges = [], []
        for coat in toy.COATS:
            grey = np.asarray(toy.render(scene, 64, coat).convert("L")).astype(int)
            values.append(grey[mask])
            edges.append(abs(np.diff(grey, axis=1))[inside].mean())
        plain, zebra = values
        assert edges[1] > 4 * edges[0]  # local contrast
        assert zebra.std() > 2 * plain.std()
        assert 0.25 < (zebra < 70).mean() < 0.65  # both modes hold many pixels
        assert (zebra > 110).mean() > 0.25


def test_stripe_period_is_read_off_the_torso():
    """On a mean-sized animal at 64 pixels the torso's stripes are 5 to 7 pixels apart."""
    unit = np.mean([held_out_scene(i).animals[0].unit for i in range(100)])
    animal = dataclasses.replace(held_out_scene(0).animals[0], x=0.5, y=0.9, unit=unit, facing=1)
    scene = dataclasses.replace(held_out_scene(0), animals=(animal,), tufts=(), trees=())
    row, left, right = (0.9 - 0.78 * unit, 0.5 - 0.25 * unit, 0.5 + 0.2 * unit)
    grey = np.asarray(toy.render(scene, 256, "zebra").convert("L")).astype(float)
    line = grey[round(row * 256), round(left * 256):round(right * 256)]
    dark = line < (line.min() + line.max()) / 2
    starts = np.flatnonzero(dark[1:] & ~dark[:-1])
    assert len(starts) >= 2
    assert 5 < np.diff(starts).mean() / 4 < 7


def test_stripes_follow_the_silhouette():
    """Moving an animal moves its stripes: their place depends on body coordinates alone."""
    one = dataclasses.replace(held_out_scene(1).animals[0], x=0.5)
    two = dataclasses.replace(one, x=0.625, plain=(1, 2, 3))
    for a, b in zip(animal_parts(one), animal_parts(two), strict=True):
        if a.period:
            moved = place(one, a.stripes()) + [0.125, 0]
            assert np.allclose(moved, place(two, b.stripes()))


def test_parts_are_named_and_labelled():
    parts = animal_parts(held_out_scene(0).animals[0])
    names = [part.label for part in parts]
    assert names.count("leg") == 4 and set(names) <= set(toy.LABELS)
    assert {"body", "neck", "head", "ear", "tail", "mane"} <= set(names)
    assert all((part.colour is None) == (part.label in world.COAT_PARTS) for part in parts)
    label = np.asarray(world.paint(held_out_scene(0), 256, "plain").label)
    for name in ("sky", "ground", "leaves", "body", "neck", "head", "leg"):
        assert (label == toy.LABELS.index(name)).any(), name


def test_tube_coordinates():
    tube = Tube([(0, 0, 1), (2, 0, 1), (4, 0, 1)])
    assert tube.length == pytest.approx(4)
    assert np.allclose(tube.at(3, 0.5), [3, 0.5])  # +v is on the left of the walk
    assert np.allclose(tube.at(np.array([1.0, 2.0]), -1), [[1, -1], [2, -1]])


def test_unknown_coat():
    with pytest.raises(ValueError, match="tartan"):
        toy.render(held_out_scene(0), 16, "tartan")


# 2. Data sets -------------------------------------------------------------------------------------


def test_layout(drawn):
    for split, count in (("train", N), ("val", N_TEST), ("test", N_TEST)):
        for domain in "AB":
            names = sorted(f.name for f in (drawn / f"{split}{domain}").iterdir())
            assert names == [f"{i:04d}.png" for i in range(count)]
            with Image.open(drawn / f"{split}{domain}" / names[-1]) as picture:
                assert (picture.mode, picture.size, picture.format) == ("RGB", (64, 64), "PNG")
    assert Image.open(drawn / "contact.png").width > N * 128
    assert sorted(p.name for p in drawn.parent.iterdir()) == ["h2z"]  # no temporary folder is left


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set(name, tmp_path):
    """Its folders; the same seed gives the same bytes, another seed or split does not."""
    n, out = 10 if name == "digits_single" else 2, tmp_path / "out"
    toy.draw(name, out, n=n, size=16, n_test=2)
    first = contents(out)
    assert set(first) - {"contact.png", "toy.json", "boxes.json"} == {
        f"{folder}/{i:04d}.png" for folder, held_out in DATASETS[name].items()
        for i in range(2 if held_out else n)}
    digits = name.startswith("digits")  # in those a larger n changes all pictures
    toy.draw(name, out, n=n if digits else 1, size=16, n_test=2)  # ours: is replaced
    again = contents(out)
    assert len(again) == len(first) if digits else len(again) < len(first)
    same = [f for f in again if "/" in f]
    assert [again[f] for f in same] == [first[f] for f in same]
    toy.draw(name, out, n=1, size=16, n_test=2, seed=1)
    other = contents(out)
    for folder in DATASETS[name]:
        picture = f"{folder}/0000.png"
        if not folder.endswith(("label", "part")):  # those of few pixels may be alike
            assert digits or first[picture] != other[picture]
            if folder.startswith("val"):
                assert digits or first[picture] != first["test" + picture.removeprefix("val")]


def test_digits_of_another_split_or_seed_are_others(tmp_path):
    folders = []
    for seed in (0, 1):
        toy.draw("digits_single", tmp_path / str(seed), n=10, size=28, n_test=10, seed=seed)
        folders += [pictures(tmp_path / str(seed) / split) for split in ("trainA", "valA", "testA")]
    assert all((a != b).any() for i, a in enumerate(folders) for b in folders[:i])


def test_clips(tmp_path):
    toy.draw("clips", tmp_path, n=1, size=16, n_test=1)
    for split in ("train", "val", "test"):
        for kind in ("img", "label"):
            frames = sorted(f.name for f in (tmp_path / f"{split}_{kind}/0000").iterdir())
            assert frames == [f"{t:04d}.png" for t in range(toy.CLIP_FRAMES)]
        if split != "train":
            own = toy.clip_answer(tmp_path, "0000/0003", "0000/0009", split)
            assert (np.asarray(own) == pixels(tmp_path / f"{split}_img/0000/0003.png")).all()
    assert disk.refuse_foreign(tmp_path) is None  # all names are ours


def test_pictures_of_a_seed_stay_what_they_are(drawn):
    """Presets are tuned on them. Whoever means to change a picture changes VERSION and this."""
    means = {"trainA/0000.png": 128.133, "trainB/0005.png": 139.928, "testA/0001.png": 132.019,
             "testB/0011.png": 115.826, "valA/0000.png": 101.462, "valB/0003.png": 133.534}
    found = {name: pixels(drawn / name).mean() for name in means}
    assert found == pytest.approx(means, abs=0.01)


def test_what_file_managers_leave_does_no_harm(tmp_path, monkeypatch):
    folder = toy.ensure("horse2zebra", 16, tmp_path, n=1)
    for name in (".DS_Store", "trainA/.DS_Store", "testB/Thumbs.db"):
        (folder / name).write_bytes(b"left behind")
    monkeypatch.setattr(disk, "published", None)  # nothing is drawn anew
    assert toy.ensure("horse2zebra", 16, tmp_path, n=1) == folder
    monkeypatch.undo()
    (folder / "trainA/mine.txt").write_text("not drawn")
    with pytest.raises(common.UserError, match=r"--data toy: .* holds other files \(trainA/mine"):
        common.find_data("toy", "", {}, lambda: toy.ensure("horse2zebra", 16, tmp_path, n=1))


def test_files_of_a_test_pair_differ_in_the_coat_only(drawn):
    for stream, split in ((2, "test"), (30, "val")):
        for i in range(N_TEST):
            a, b = (pixels(drawn / f"{split}{domain}" / f"{i:04d}.png") for domain in "AB")
            scene = toy.sample_scene(np.random.default_rng([0, stream, i]))
            changed, mask = (a != b).any(axis=2), toy.coat_mask(scene, 64)
            assert not changed[mask == 0].any()
            assert changed.sum() > 0.9 * (mask == 1).sum()


def test_no_scene_is_in_two_splits(drawn):
    scenes = [toy.sample_scene(np.random.default_rng([0, stream, i]))
              for stream in (0, 1, 2, 30) for i in range(N_TEST)]
    assert len({repr(dataclasses.replace(s, trees=())) for s in scenes}) == len(scenes)
    sky = [tuple(pixels(drawn / split / f"{i:04d}.png")[:8].ravel())
           for split in ("trainA", "trainB", "valA", "testA") for i in range(N)]
    assert len(set(sky)) == 4 * N


def test_single_pair(tmp_path):
    folder = toy.ensure("horse2zebra_single", 64, root=tmp_path)
    files = {name for name in contents(folder) if "/" in name}
    assert files == {f"{s}{d}/0000.png" for s in ("train", "val", "test") for d in "AB"}
    train, test, truth = (pixels(folder / s / "0000.png") for s in ("trainA", "testA", "testB"))
    assert (train == test).all() and 0.1 < (test != truth).any(axis=2).mean() < 0.4
    with pytest.raises(ValueError, match="single pair"):
        toy.draw("horse2zebra_single", tmp_path / "two", n=2)


@pytest.mark.parametrize("name, n_test, says", [
    ("horse2zebra", 0, "n_test is 0"), ("sketches", 1, "n_test is 1"),
    ("textures", 1, "n_test is 1"), ("day2night", 3, "even")])
def test_bad_numbers(name, n_test, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        toy.draw(name, tmp_path / "out", n=1, size=16, n_test=n_test)
    with pytest.raises(ValueError, match="multiple of 4"):
        toy.draw("digits_multiple", tmp_path / "out", n=1, size=30)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "s2r"
    toy.draw("synthetic2real", out, n=4, size=64, n_test=3)
    return out


def test_synthetic2real_labels_are_true(real):
    """In the graphics a class has one hue, so classes can be read off the picture; a label map says
    for every pixel what fills most of it."""
    for i in range(4):
        with Image.open(real / f"source_label/{i:04d}.png") as palette:
            assert palette.mode == "P"
        label = pixels(real / f"source_label/{i:04d}.png")
        picture = pixels(real / f"source_img/{i:04d}.png")
        assert 0 <= label.min() and label.max() < len(toy.CLASSES)
        assert {toy.CLASSES.index(c) for c in ("sky", "ground", "animal")} <= set(np.unique(label))
        for k in np.unique(label):
            colours = picture[label == k] / picture[label == k].max(axis=1, keepdims=True)
            assert colours.std(axis=0).max() < 0.02  # its light has two levels, its hue is one
    canvas = world.paint(held_out_scene(0), 128, "plain")
    fine = np.array([name if name in toy.CLASSES else "animal" for name in toy.LABELS])[
        np.asarray(canvas.label)]
    coarse = toy.synthetic2real.class_map(canvas, 64)
    for y, x in ((0, 0), (30, 30), (50, 20), (63, 63)):
        block = fine[2 * y:2 * y + 2, 2 * x:2 * x + 2].ravel().tolist()
        assert block.count(toy.CLASSES[coarse[y, x]]) == max(map(block.count, block))


def test_synthetic2real_domains_share_the_world_but_not_the_look(real):
    shares = [np.mean([np.bincount(pixels(real / f"{split}_label/{i:04d}.png").ravel(),
                                   minlength=len(toy.CLASSES)) / 64**2 for i in range(4)], axis=0)
              for split in ("source", "target")]
    assert np.abs(shares[0] - shares[1]).max() < 0.12
    flat, camera = (np.mean([pixels(real / f"{split}_img/{i:04d}.png") for i in range(4)],
                            axis=(0, 1, 2)) for split in ("source", "target"))
    assert np.abs(flat - camera).max() > 30
    rough = [np.median([np.abs(np.diff(pixels(real / f"{split}_img/{i:04d}.png"), axis=1))
                        for i in range(4)]) for split in ("source", "target")]
    assert rough[0] == 0 and rough[1] > 2


# 3. On disk ---------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """horse2zebra with two test pictures, to be drawn faster."""
    monkeypatch.setitem(toy.DATASETS, "horse2zebra", partial(horse2zebra.draw, n_test=2))


def test_ensure_draws_once(tmp_path, few):
    folder = toy.ensure("horse2zebra", 16, root=tmp_path, n=2, seed=3)
    assert folder == tmp_path / "toy" / "horse2zebra-16-n2-s3"
    picture = folder / "trainA/0000.png"
    before = picture.stat().st_mtime_ns, picture.stat().st_ino
    assert toy.ensure("horse2zebra", 16, root=tmp_path, n=2, seed=3) == folder
    assert (picture.stat().st_mtime_ns, picture.stat().st_ino) == before
    assert toy.ensure("horse2zebra", 16, root=tmp_path, n=2, seed=4) != folder
    with pytest.raises(ValueError, match="zebra2giraffe.*horse2zebra"):
        toy.ensure("zebra2giraffe", 64, root=tmp_path)


def test_ensure_default_name(tmp_path, monkeypatch):
    asked = []

    def fill(folder, n, size, seed):
        assert not list(folder.iterdir())
        asked.append((n, size, seed))
    monkeypatch.setitem(toy.DATASETS, "horse2zebra", fill)
    assert toy.ensure("horse2zebra", 64, root=tmp_path) == tmp_path / "toy" / "horse2zebra-64"
    assert asked == [(400, 64, 0)]


def test_ensure_redraws_what_is_half_written_damaged_or_old(tmp_path, monkeypatch, few):
    arguments = dict(name="horse2zebra", size=16, root=tmp_path, n=2, seed=0)
    half = tmp_path / "toy" / "horse2zebra-16-n2-s0"
    (half / "trainA").mkdir(parents=True)
    (half / "trainA" / "0000.png").write_bytes(b"half")
    whole = contents(toy.ensure(**arguments))
    assert len(whole) == 2 + 2 + 4 * 2 + 2
    (half / "testB" / "0001.png").unlink()
    assert contents(toy.ensure(**arguments)) == whole
    for stamp in ("", "[]", "{}", "null"):
        (half / "toy.json").write_text(stamp)
        assert not disk.is_complete(half, {})
    assert contents(toy.ensure(**arguments)) == whole
    monkeypatch.setattr(disk, "VERSION", disk.VERSION + 1)
    assert contents(toy.ensure(**arguments))["toy.json"] != whole["toy.json"]
    assert [p.name for p in half.parent.iterdir()] == [half.name]


def test_what_a_killed_process_left_is_removed_but_not_what_a_living_one_writes(tmp_path):
    dead, alive, foreign = (tmp_path / f".out.{name}.tmp" for name in ("dead", "alive", "foreign"))
    for scratch, sub in ((dead, "new"), (alive, "new"), (foreign, "notes")):
        (scratch / sub / "trainA").mkdir(parents=True)
        (scratch / sub / "trainA" / "0000.png").write_bytes(b"half")
        for path in (scratch, *scratch.rglob("*")):
            os.utime(path, (time.time() - 2 * disk.STALE,) * 2)
    os.utime(alive / "new" / "trainA" / "0000.png")
    toy.draw("horse2zebra", tmp_path / "out", n=1, size=16, n_test=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [alive.name, foreign.name, "out"]


@pytest.mark.parametrize("old", [False, True])
def test_ensure_twice_at_once_keeps_the_first(old, tmp_path, monkeypatch, few):
    """Both callers find nothing (or an old one) and draw; the slower one keeps what the faster one
    has put there."""
    if old:
        with monkeypatch.context() as past:
            past.setattr(disk, "VERSION", 1)
            toy.ensure("horse2zebra", 16, root=tmp_path, n=1)
    both_started, inodes = threading.Barrier(2), []
    sheet = disk.contact_sheet

    def wait_for_each_other(*arguments):
        both_started.wait(timeout=20)
        if threading.current_thread() is threads[1]:
            threads[0].join()
        sheet(*arguments)

    def call():
        folder = toy.ensure("horse2zebra", 16, root=tmp_path, n=1)
        inodes.append((folder / "trainA/0000.png").stat().st_ino)

    monkeypatch.setattr(horse2zebra, "contact_sheet", wait_for_each_other)
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inodes) == 2 and inodes[0] == inodes[1]
    assert [p.name for p in (tmp_path / "toy").iterdir()] == ["horse2zebra-16-n1-s0"]


def test_two_that_finish_together(tmp_path, monkeypatch):
    """Another process puts its own there between our look and our rename."""
    out, description = tmp_path / "out", disk.describe("x", 1, 16, 0)
    with disk.published(out, description) as one, disk.published(out, description) as other:
        for folder in (one, other):
            (folder / "contact.png").write_bytes(b"same")
    assert set(contents(out)) == {"contact.png", "toy.json"}
    rename = Path.rename

    def fails(self, target):
        if self.name == "new":
            raise OSError("no such luck")
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no such luck"), disk.published(
            out, disk.describe("y", 1, 16, 0)) as folder:
        (folder / "contact.png").write_bytes(b"new")
    assert contents(out)["contact.png"] == b"same"  # the old one is back in its place
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch):
    out = tmp_path / "out"
    toy.draw("horse2zebra", out, n=1, size=16, n_test=1)
    before = contents(out)

    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(horse2zebra, "contact_sheet", fail)
    with pytest.raises(OSError, match="disk full"):
        toy.draw("horse2zebra", out, n=2, size=16, n_test=1)
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_command_line(tmp_path):
    out = tmp_path / "deep" / "out"
    done = command("textures", "--out", out, "--n", 2, "--size", 16, "--seed", 5)
    assert done.returncode == 0 and done.stderr == ""
    assert str(out) in done.stdout and str(out / "contact.png") in done.stdout
    assert len(list((out / "train").iterdir())) == 2
    main(["textures", "--out", str(out), "--n", "1", "--size", "16"])
    assert len(list((out / "train").iterdir())) == 1  # ours is replaced, no stale picture stays


def test_command_line_takes_the_data_set_s_own_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["horse2zebra_single", "--out", "out"])
    assert Image.open("out/trainA/0000.png").size == (256, 256)
    main(["horse2zebra_single", "--size", "16"])
    assert Image.open("datasets/toy/horse2zebra_single-16/trainA/0000.png").size == (16, 16)


@pytest.mark.parametrize("arguments, says", [
    (["zebra2giraffe"], "horse2zebra"),
    (["zebra2giraffe", "--n", "3"], "horse2zebra"),
    (["horse2zebra", "--size", "15"], "size is 15"),
    (["horse2zebra", "--n", "0"], "n is 0"),
    (["horse2zebra", "--n", "many"], "--n"),
    (["horse2zebra", "--seed", "-1"], "seed is -1"),
    (["horse2zebra", "--colour", "red"], "--colour"),
    ([], "name"),
])
def test_bad_arguments(arguments, says, tmp_path, capsys):
    if "horse2zebra" in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    complaint = capsys.readouterr().err
    assert stop.value.code == 2
    assert complaint.startswith("lab.toy: error: ") and complaint.count("\n") == 1
    assert says in complaint and not (tmp_path / "out").exists()


def test_bad_out(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "real" / "trainA").mkdir(parents=True)  # our file names, but not drawn here
    (tmp_path / "real" / "trainA" / "0000.png").write_bytes(b"a real photo")
    before = contents(tmp_path)
    for out in ("file", "file/below", "mine", "real"):
        with pytest.raises(SystemExit) as stop:
            main(["horse2zebra", "--out", str(tmp_path / out), "--n", "1", "--size", "16"])
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.out == ""
        assert said.err.startswith("lab.toy: error: ") and said.err.count("\n") == 1
        assert str(tmp_path / out) in said.err
        assert contents(tmp_path) == before


# 4. Scores ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    return in_both_coats(64, 40)


def test_window_mean_against_a_loop():
    x = np.random.default_rng(0).normal(size=(2, 5, 6))
    padded = np.pad(x, [(0, 0), (2, 2), (2, 2)], mode="edge")
    got = scoring.window_mean(x, 2)
    for i in range(5):
        for j in range(6):
            np.testing.assert_allclose(got[:, i, j], padded[:, i:i + 5, j:j + 5].mean((1, 2)))


def test_colour_transfer():
    x, reference = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 2, 3, 8, 8))
    got = scoring.colour_transfer(x, 0.5 * reference)
    np.testing.assert_allclose(got.mean((2, 3)), 0.5 * reference.mean((2, 3)), atol=1e-4)
    np.testing.assert_allclose(got.std((2, 3)), 0.5 * reference.std((2, 3)), atol=1e-4)


def test_stripe_directions_of_plane_waves():
    """Clean stripes at an angle give a unit vector at twice that angle, whatever their contrast."""
    y, x = np.mgrid[:64, :64]
    for angle in (0.0, 0.4, np.pi / 2, 2.5):
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / 6)
        for contrast in (1.0, 0.4):
            picture = np.broadcast_to(contrast * wave, (1, 3, 64, 64))
            middle = horse2zebra.stripe_directions(picture)[:, 0, 8:-8, 8:-8]
            want = np.array([np.cos(2 * angle), np.sin(2 * angle)])[:, None, None]
            assert np.abs(middle - want).max() < 0.1
    assert np.abs(horse2zebra.stripe_directions(np.full((1, 3, 64, 64), 0.3))).max() == 0
    checks = np.broadcast_to(np.where((x + y) % 2, 0.5, -0.5), (1, 3, 64, 64))
    assert np.abs(horse2zebra.stripe_directions(checks)[..., 4:-4, 4:-4]).max() < 1e-6


def test_coat_scores_of_known_answers(pairs):
    x, y = pairs
    x, y = x[:8], y[:8]
    truth = toy.coat_scores(x, y, y)
    names = ["stripe direction error", "coat error", "background error"]
    assert [s["name"] for s in truth] == names and all(s["better"] == "lower" for s in truth)
    assert all(s["value"] == 0 for s in truth)
    direction, coat, background = toy.coat_scores(x, x, y)
    for score in (direction, coat, background):
        assert score["value"] == score["trivial"]["copy the input"]
    assert direction["value"] > 0.8 and coat["value"] > 40 and background["value"] == 0
    assert toy.coat_scores(y, x, x)[0]["name"] == "coat error"  # plain answers have no stripes
    paler = toy.coat_scores(x, y + 2 / 127.5, y)
    assert [s["value"] for s in paler] == [pytest.approx(v, abs=1e-5) for v in (0, 2, 2)]


def test_trivial_answers_to_the_coat_have_the_values_that_were_measured(pairs):
    x, y = pairs
    moved = toy.coat_scores(x, np.roll(y, 1, axis=3), y)
    direction = moved[0]["trivial"]
    assert moved[0]["value"] == pytest.approx(0.16, abs=0.03)
    for answer, value in {"mean coat colour": 0.79, "checkerboard": 0.79, "noise": 0.69,
                          "vertical bars": 0.73, "mean colour": 0.61}.items():
        assert direction[answer] == pytest.approx(value, abs=0.03), answer
    coat = moved[1]["trivial"]
    assert coat["checkerboard"] == pytest.approx(18.2, abs=0.5)  # a score that a painter can win
    assert coat["mean coat colour"] == pytest.approx(50.6, abs=0.5)
    assert coat["vertical bars"] == pytest.approx(19.7, abs=0.5)
    assert coat["noise"] == pytest.approx(19.8, abs=0.5)
    assert moved[1]["value"] == pytest.approx(8.4, abs=0.5)


def test_no_pattern_without_the_coat_s_directions_comes_near_the_truth(pairs):
    """Painters who know the silhouette and the mean colour, and more patterns than are listed."""
    x, y = (a[:12] for a in pairs)
    coat = horse2zebra.coat_of(x, y)
    mean = horse2zebra.pixels(y, coat).mean(axis=0)[:, None, None]
    v, u = np.mgrid[:64, :64]
    waves = {f"{k} pixels": np.where((u // k + v // k) % 2, 1, -1) for k in (1, 2, 3, 4)}
    waves |= {f"bars at {a:.1f}": np.sign(np.sin(2 * np.pi / 6 * (u * np.cos(a) + v * np.sin(a))))
              for a in np.arange(0, np.pi, 0.4)}
    for name, wave in waves.items():
        painted = np.where(coat[:, None], (mean + 0.4 * wave).clip(-1, 1), x)
        assert horse2zebra.stripe_direction_error(painted, y, coat) > 0.55, name
    another = np.where(coat[:, None], np.roll(y, 1, axis=0), x)  # another zebra's stripes
    assert horse2zebra.stripe_direction_error(another, y, coat) > 0.55


def test_coat_score_forgives_the_place_of_a_stripe_but_not_its_absence(pairs):
    x, y = (a[:8] for a in pairs)
    coat = np.abs(x - y).max(axis=1, keepdims=True) > 0
    moved = np.where(coat, np.roll(y, 2, axis=3), x)
    direction, coat_error, _ = toy.coat_scores(x, moved, y)
    assert direction["value"] < 0.5 * min(direction["trivial"].values())
    assert coat_error["value"] < 0.8 * min(coat_error["trivial"].values())
    assert np.abs(moved - y)[np.broadcast_to(coat, y.shape)].mean() * 127.5 > 40  # pixel by pixel


@pytest.mark.parametrize("size", [64, 128, 192])
def test_single_scores_mean_the_same_at_every_size(size):
    found = []
    for x, y in zip(*in_both_coats(size, 2), strict=True):
        moved = toy.single_scores(x, np.roll(y, size // 64, axis=2), y)
        found.append([moved[0]["value"], *(moved[0]["trivial"][answer] for answer in (
            "mean colour", "mean coat colour", "checkerboard", "vertical bars"))])
    assert np.mean(found, axis=0) == pytest.approx([0.15, 0.59, 0.78, 0.78, 0.66], abs=0.06)
    if size == 64:
        x, y = in_both_coats(size, 1)
        assert toy.single_scores(x[0], x[0], y[0]) == toy.coat_scores(x, x, y)


def test_coat_pixels(pairs):
    x, y = (a[:4] for a in pairs)
    found = toy.coat_pixels(x, -y, y)
    assert list(found) == ["x", "G(x)", "y"]
    assert (found["G(x)"] == -found["y"]).all()
    place = np.argwhere(horse2zebra.coat_of(x, y))[100]
    for name, picture in (("x", x), ("y", y)):
        assert found[name].shape == (horse2zebra.coat_of(x, y).sum(), 3)
        assert (found[name][100] == picture[place[0], :, place[1], place[2]]).all()
    assert found["y"].std() > 1.3 * found["x"].std()  # black and white against one colour


def sketches_of(folder):
    """x, y, truth (N, 3, H, W) and part (N, H, W) of the drawn sketches' test split."""
    x, y, truth = (pictures(folder / f"test_{kind}") for kind in ("sketch", "img", "truth"))
    return x, y, truth, np.stack([pixels(f) for f in sorted((folder / "test_part").iterdir())])


def test_a_sketchs_truth_has_its_shape_and_its_references_colours(tmp_path):
    toy.draw("sketches", tmp_path / "t", n=1, size=64, n_test=4)
    x, y, truth, part = sketches_of(tmp_path / "t")
    assert (x[:, 0][part > 0] > 0.99).all() and (x < -0.5).any()  # pure pixels hold no line
    for i in range(4):
        other = (i + 1) % 4
        assert ((y[i] < 0.95).any(0) == (truth[i] < 0.95).any(0)).mean() > 0.999  # own shape
        seen = 0
        for k in range(1, 7):
            here, there = part[i] == k, part[other] == k
            if here.sum() >= 12 and there.sum() >= 12:
                seen += 1
                gap = np.abs(truth[i][:, here].mean(1) - y[other][:, there].mean(1)).max() * 127.5
                assert gap < 25, toy.SKETCH_PARTS[k - 1]  # shading differs a little
        assert seen >= 4
        assert np.abs(truth[i] - y[i])[:, part[i] > 0].mean() * 127.5 > 20


def test_sketch_scores_of_known_answers(tmp_path):
    toy.draw("sketches", tmp_path / "t", n=1, size=64, n_test=6)
    x, y, truth, part = sketches_of(tmp_path / "t")
    r, W = np.roll(y, -1, axis=0), (x + np.roll(y, -1, axis=0)) / 2
    best = {s["name"]: s for s in toy.sketch_scores(x, truth, truth, part, r, W)}
    assert list(best) == ["parts right", "part colour error", "picture error"]
    assert best["part colour error"]["value"] == best["picture error"]["value"] == 0
    assert best["parts right"]["value"] == 1
    for name, score in best.items():
        for answer, value in score["trivial"].items():  # no trivial answer comes near
            assert value < 0.9 if name == "parts right" else value > 6, (name, answer)
            if "colour" in answer and name == "parts right":
                assert value < 0.4
    for score in toy.sketch_scores(x, W, truth, part, r, W):
        assert score["value"] == score["trivial"]["W itself"]
    # the majority finds a colour that holds most of a part, and not that of a large minority
    mixed = truth.copy()
    mixed[:, :, ::3] = truth[::-1, :, ::3]
    score = toy.sketch_scores(x, truth, truth, part, r, mixed)[0]
    assert score["trivial"]["majority of W in each part"] > 0.95
    # the global tint is right, the parts are not: colours of two parts swapped everywhere
    swapped = truth.copy()
    for n in range(6):
        one, two = truth[n][:, part[n] == 1].mean(1), truth[n][:, part[n] == 5].mean(1)
        swapped[n][:, part[n] == 1], swapped[n][:, part[n] == 5] = two[:, None], one[:, None]
    right = toy.sketch_scores(x, swapped, truth, part, r, W)[0]["value"]
    assert 0.55 < right < 0.75  # two of five or six
    darker = toy.sketch_scores(x, truth - 4 / 127.5, truth, part, r, W)
    assert darker[1]["value"] == pytest.approx(4) and darker[0]["value"] == 1


@pytest.fixture(scope="module")
def perfect(pairs, tmp_path_factory):
    """What the truth gets on every data set that has trivial answers: {name: scores}."""
    root = tmp_path_factory.mktemp("perfect")
    for name in ("scenes", "sketches", "day2night", "textures"):
        toy.draw(name, root / name, n=1, size=32 if name == "scenes" else 64, n_test=4)
    s, k, d, t = (root / name for name in ("scenes", "sketches", "day2night", "textures"))
    own = pictures(s / "test_img")
    label = np.stack([pixels(f) for f in sorted((s / "test_label").iterdir())])
    means = np.array([own.transpose(0, 2, 3, 1)[label == c].mean(axis=0)
                      if (label == c).any() else np.zeros(3) for c in range(7)])
    every = np.stack([pictures(s / "test_styles" / style) for style in toy.SCENE_STYLES])
    style = np.abs(every - own).mean(axis=(2, 3, 4)).argmin(axis=0)
    another = every[np.roll(style, -1), np.arange(4)]
    part = np.stack([pixels(f) for f in sorted((k / "test_part").iterdir())])
    reference = np.roll(pictures(k / "test_img"), -1, axis=0)
    night = pictures(d / "testB")
    texture, swapped = pictures(t / "test"), pictures(t / "test_truth")
    return {
        "horse2zebra": toy.coat_scores(*(a[:4] for a in (pairs[0], pairs[1], pairs[1]))),
        "scenes": toy.scene_scores({"own style": own, "another's style": another, "z": every[2]},
                                   label, s, means),
        "sketches": toy.sketch_scores(
            pictures(k / "test_sketch"), pictures(k / "test_truth"), pictures(k / "test_truth"),
            part, reference, np.roll(reference, 2, axis=3)),
        "day2night": toy.night_scores(pictures(d / "testA"), night[np.arange(4) ^ 1], night, night,
                                      toy.inside_boxes(d, "test")),
        "textures": toy.texture_scores(texture, np.roll(texture, -1, axis=0), swapped, swapped)}


PERFECT = ["horse2zebra", "scenes", "sketches", "day2night", "textures"]


@pytest.mark.parametrize("name", PERFECT)
def test_the_truth_beats_every_trivial_answer(name, perfect):
    for score in perfect[name]:
        sign = 1 if score["better"] == "lower" else -1
        best = min(sign * v for v in score["trivial"].values())
        assert score["value"] == (0 if sign == 1 else 1)
        if score["name"] == "background error" and name == "horse2zebra":
            assert best == 0  # there the input is the truth
        else:
            assert sign * score["value"] < best - 0.1 * abs(best)


@pytest.mark.parametrize("name", PERFECT)
def test_no_trivial_answer_is_best_on_all_scores(name, perfect):
    """Except the majority of W, which is told where a sketch's parts are."""
    best = []
    for score in perfect[name]:
        sign = 1 if score["better"] == "lower" else -1
        lowest = min(sign * v for v in score["trivial"].values())
        best.append({a for a, v in score["trivial"].items() if sign * v == lowest})
    assert set.intersection(*best) <= ({"majority of W in each part"} if name == "sketches"
                                       else set())


def test_clip_style_error_tells_the_truth_from_trivial_answers(tmp_path):
    (tmp_path / "toy.json").write_text(json.dumps({"seed": 0, "size": 32}))
    films = [clips.sample_clip(np.random.default_rng([0, 1, c])) for c in range(4)]
    names = [(f"{c:04d}/0003", f"{(c + 1) % 4:04d}/0008") for c in range(4)]

    def answers(pairs):
        return np.stack([np.asarray(toy.clip_answer(tmp_path, *pair)) for pair in pairs]
                        ).transpose(0, 3, 1, 2) / 127.5 - 1
    truth, own, exemplar = (answers(pairs) for pairs in (
        names, [(x, x) for x, _ in names], [(e, e) for _, e in names]))
    label = np.stack([np.asarray(clips.clip_label(film, 3, 32)) for film in films])
    assert toy.clip_style_error(label, truth, truth) == 0
    for answer in (own, exemplar, np.broadcast_to(truth.mean((2, 3), keepdims=True), truth.shape)):
        assert toy.clip_style_error(label, answer, truth) > 15


def test_clip_details_and_style_against_loops():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 6, 7))
    labels[0, 0, :4] = 5  # too few pixels to count in the style error
    a, b = rng.uniform(-1, 1, (2, 2, 3, 6, 7))
    errors, correlations = [], []
    for n in range(2):
        of_a, of_b = [], []
        for i, c in itertools.product(np.unique(labels[n]), range(3)):
            one, other = (p[n, c][labels[n] == i] for p in (a, b))
            if i < 3:
                errors.append(abs(one.mean() - other.mean()) + abs(one.std() - other.std()))
            of_a.extend(one - one.mean())
            of_b.extend(other - other.mean())
        correlations.append(np.corrcoef(of_a, of_b)[0, 1])
    assert toy.clip_style_error(labels, a, b) == pytest.approx(127.5 * np.mean(errors))
    assert toy.clip_style_error(labels, b, b) == 0
    assert clips.clip_details(labels, a, b) == pytest.approx(np.mean(correlations))


def test_clip_painters():
    """Each label's colours from the exemplar: mean, deviation, slope; its places, stretched."""
    rows = np.linspace(-0.5, 0.5, 8)[:, None].repeat(8, 1)
    exemplar = np.stack([rows, 0 * rows, rows.T])[None]  # a slope down, none, one across
    ids = np.zeros((1, 8, 8), int)
    ids[:, :, 6:] = 1                                                       # what it does not have
    z = np.stack([rows * 0 + 0.25] * 3)[None]
    answers = {name: clips.painted(ids, np.zeros((1, 8, 8), int), exemplar, z, fill)[0]
               for name, fill in clips.PAINTERS.items()}
    for painted in answers.values():
        assert np.allclose(painted[:, :, 6:], 0.25)
    assert np.allclose(answers["each label's mean colour"][:, :, :6], 0)
    assert np.allclose(np.abs(answers["and noise"][0, :, :6]), rows.std())
    assert np.allclose(answers["and slope"][0, :, :6], rows[:, :6])
    assert np.allclose(answers["each label, stretched"][2, :, 5], 0.5)


def test_scores_look_at_pictures_alone(tmp_path):
    for name in ("scenes", "day2night", "textures"):
        toy.draw(name, tmp_path / name, n=1, size=32, n_test=2)
    for folder in [f for f in tmp_path.rglob("*") if f.is_dir()]:
        (folder / ".DS_Store").write_bytes(b"left by a file manager")
    assert len(toy.inside_boxes(tmp_path / "day2night", "test")) == 2
    assert len(toy.true_nights(tmp_path / "day2night", "test")) == 2
    assert toy.swap_scores(tmp_path / "textures", "test", lambda x, x2: x)
    assert toy.scene_scores({"z": np.zeros((2, 3, 32, 32))}, np.zeros((2, 32, 32), int),
                            tmp_path / "scenes", np.zeros((7, 3)))


def test_scores_of_val_are_those_of_val(tmp_path):
    toy.draw("scenes", tmp_path, n=1, size=32, n_test=2)
    for split, value in (("val", 0), ("test", 1)):
        own = {"own style": pictures(tmp_path / "val_img")}
        label = np.stack([pixels(f) for f in sorted((tmp_path / f"{split}_label").iterdir())])
        scores = toy.scene_scores(own, label, tmp_path, np.zeros((7, 3)), split)
        assert (scores[0]["value"] > 1) == value


def test_copies_of_nights_are_other_pairs_nights():
    """Two scenes share a night; one night everywhere is as far from the others as they are."""
    level = np.array([0.0, 0.0, 1.0, 1.0])                              # scenes 0, 1 and 2, 3
    nights = np.broadcast_to(level.reshape(4, 1, 1, 1, 1), (4, 2, 3, 8, 8))
    inside = np.zeros((4, 8, 8), bool)
    inside[:, 2:4] = True
    scores = toy.night_diversity(np.zeros((4, 3, 8, 8)), nights, nights, inside)
    for score in scores[1::2]:
        assert score["value"] == 0
        assert score["trivial"]["copies of nights"] == pytest.approx(2 * 127.5)
