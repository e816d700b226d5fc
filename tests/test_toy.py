"""The toy world: deterministic, unpaired, and with a true answer that differs in the coat only."""
import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import toy  # noqa: E402

N, N_TEST = 6, 12


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in toy.files_in(folder)}


def held_out_scene(i):
    return toy.sample_scene(np.random.default_rng([0, 2, i]))



def command(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "toy.py"), *map(str, arguments)],
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "h2z"
    toy.horse2zebra(out, n=N, size=64, seed=0, n_test=N_TEST)
    return out


def test_layout(drawn):
    for split, count in (("trainA", N), ("trainB", N), ("testA", N_TEST), ("testB", N_TEST)):
        names = sorted(f.name for f in (drawn / split).iterdir())
        assert names == [f"{i:04d}.png" for i in range(count)]
        with Image.open(drawn / split / names[-1]) as picture:
            assert (picture.mode, picture.size, picture.format) == ("RGB", (64, 64), "PNG")
    assert Image.open(drawn / "contact.png").width > N * 128
    assert sorted(p.name for p in drawn.parent.iterdir()) == ["h2z"]  # no temporary folder is left


def test_same_seed_gives_the_same_bytes_another_seed_does_not(drawn, tmp_path):
    toy.horse2zebra(tmp_path / "again", n=N, size=64, seed=0, n_test=N_TEST)
    assert contents(tmp_path / "again") == contents(drawn)
    toy.horse2zebra(tmp_path / "other", n=1, size=64, seed=1, n_test=1)
    other = (tmp_path / "other/trainA/0000.png").read_bytes()
    assert other != (drawn / "trainA/0000.png").read_bytes()


def test_scene_i_does_not_depend_on_n(drawn, tmp_path):
    toy.horse2zebra(tmp_path / "few", n=2, size=64, seed=0, n_test=1)
    few, many = contents(tmp_path / "few"), contents(drawn)
    for name in ("trainA/0001.png", "trainB/0001.png", "testA/0000.png", "testB/0000.png"):
        assert few[name] == many[name]


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


def test_files_of_a_test_pair_differ_in_the_coat_only(drawn):
    for i in range(N_TEST):
        a, b = (pixels(drawn / split / f"{i:04d}.png") for split in ("testA", "testB"))
        changed = (a != b).any(axis=2)
        mask = toy.coat_mask(held_out_scene(i), 64)
        assert not changed[mask == 0].any()
        assert changed.sum() > 0.9 * (mask == 1).sum()


def test_coverage():
    cover = [toy.coat_mask(toy.sample_scene(np.random.default_rng([7, i])), 64).mean()
             for i in range(100)]
    assert 0.18 < np.mean(cover) < 0.25
    assert min(cover) > 0.12 and max(cover) < 0.38
    assert np.std(cover) > 0.02


def test_no_scene_is_in_two_splits(drawn):
    scenes = [toy.sample_scene(np.random.default_rng([0, split, i]))
              for split, count in ((0, N), (1, N), (2, N_TEST)) for i in range(count)]
    assert len({repr(dataclasses.replace(s, trees=())) for s in scenes}) == len(scenes)
    sky = [tuple(pixels(drawn / split / f"{i:04d}.png")[:8].ravel())
           for split in ("trainA", "trainB", "testA") for i in range(N)]
    assert len(set(sky)) == 3 * N


def test_both_domains_have_the_same_world():
    def statistics(split):
        scenes = [toy.sample_scene(np.random.default_rng([0, split, i])) for i in range(400)]
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
    for a, b in zip(toy.animal_parts(one), toy.animal_parts(two), strict=True):
        if a.period:
            moved = toy.place(one, a.stripes()) + [0.125, 0]
            assert np.allclose(moved, toy.place(two, b.stripes()))


def test_parts_are_named_and_labelled():
    animal = held_out_scene(0).animals[0]
    parts = toy.animal_parts(animal)
    names = [part.label for part in parts]
    assert names.count("leg") == 4 and set(names) <= set(toy.LABELS)
    assert {"body", "neck", "head", "ear", "tail", "mane"} <= set(names)
    assert all((part.colour is None) == (part.label in toy.COAT_PARTS) for part in parts)
    label = np.asarray(toy.paint(held_out_scene(0), 256, "plain").label)
    for name in ("sky", "ground", "leaves", "body", "neck", "head", "leg"):
        assert (label == toy.LABELS.index(name)).any(), name


def test_tube_coordinates():
    tube = toy.Tube([(0, 0, 1), (2, 0, 1), (4, 0, 1)])
    assert tube.length == pytest.approx(4)
    assert np.allclose(tube.at(3, 0.5), [3, 0.5])  # +v is on the left of the walk
    assert np.allclose(tube.at(np.array([1.0, 2.0]), -1), [[1, -1], [2, -1]])


def test_unknown_coat():
    with pytest.raises(ValueError, match="tartan"):
        toy.render(held_out_scene(0), 16, "tartan")


def test_ensure_draws_once(tmp_path):
    folder = toy.ensure("horse2zebra", 16, root=tmp_path, n=2, seed=3)
    assert folder == tmp_path / "toy" / "horse2zebra-16-n2-s3"
    picture = folder / "trainA/0000.png"
    before = picture.stat().st_mtime_ns, picture.stat().st_ino
    assert toy.ensure("horse2zebra", 16, root=tmp_path, n=2, seed=3) == folder
    assert (picture.stat().st_mtime_ns, picture.stat().st_ino) == before
    assert toy.ensure("horse2zebra", 16, root=tmp_path, n=2, seed=4) != folder


def test_ensure_default_name(tmp_path, monkeypatch):
    def draw(out, n, size, seed):
        out.mkdir(parents=True)
        assert (n, size, seed) == (400, 64, 0)
    monkeypatch.setitem(toy.DATASETS, "horse2zebra", draw)
    assert toy.ensure("horse2zebra", 64, root=tmp_path) == tmp_path / "toy" / "horse2zebra-64"


def test_ensure_redraws_what_is_half_written_damaged_or_old(tmp_path, monkeypatch):
    arguments = dict(name="horse2zebra", size=16, root=tmp_path, n=2, seed=0)
    half = tmp_path / "toy" / "horse2zebra-16-n2-s0"
    (half / "trainA").mkdir(parents=True)
    (half / "trainA" / "0000.png").write_bytes(b"half")
    (tmp_path / "toy" / ".horse2zebra-16-n2-s0.dead.tmp").mkdir()  # of a killed process
    whole = contents(toy.ensure(**arguments))
    assert len(whole) == 2 + 2 + 40 + 40 + 2
    (half / "testB" / "0003.png").unlink()
    assert contents(toy.ensure(**arguments)) == whole
    monkeypatch.setattr(toy, "VERSION", toy.VERSION + 1)
    assert contents(toy.ensure(**arguments))["toy.json"] != whole["toy.json"]


def test_ensure_twice_at_once_keeps_the_first(tmp_path, monkeypatch):
    """Both callers find nothing and draw; the slower one keeps what the faster one published."""
    both_started, inodes = threading.Barrier(2), []
    sheet = toy.contact_sheet

    def wait_for_each_other(*arguments):
        both_started.wait(timeout=20)
        sheet(*arguments)

    def call():
        folder = toy.ensure("horse2zebra", 16, root=tmp_path, n=1)
        inodes.append((folder / "trainA/0000.png").stat().st_ino)

    monkeypatch.setattr(toy, "contact_sheet", wait_for_each_other)
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inodes) == 2 and inodes[0] == inodes[1]
    assert [p.name for p in (tmp_path / "toy").iterdir()] == ["horse2zebra-16-n1-s0"]


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch):
    out = tmp_path / "out"
    toy.horse2zebra(out, n=1, size=16, n_test=1)
    before = contents(out)

    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(toy, "contact_sheet", fail)
    with pytest.raises(OSError, match="disk full"):
        toy.horse2zebra(out, n=2, size=16, n_test=1)
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_command_line(tmp_path):
    out = tmp_path / "deep" / "out"
    done = command("horse2zebra", "--out", out, "--n", 2, "--size", 16, "--seed", 5)
    assert done.returncode == 0 and done.stderr == ""
    assert str(out) in done.stdout and str(out / "contact.png") in done.stdout
    assert len(list((out / "trainB").iterdir())) == 2
    assert command("horse2zebra", "--out", out, "--n", 1, "--size", 16).returncode == 0
    assert len(list((out / "trainB").iterdir())) == 1  # ours is replaced, no stale picture stays


@pytest.mark.parametrize("arguments, says", [
    (["zebra2giraffe"], "horse2zebra"),
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
        toy.main(arguments)
    complaint = capsys.readouterr().err
    assert stop.value.code == 2
    assert complaint.startswith("toy.py: error: ") and complaint.count("\n") == 1
    assert says in complaint and not (tmp_path / "out").exists()


def test_bad_out(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "real" / "trainA").mkdir(parents=True)  # our file names, but not drawn here
    (tmp_path / "real" / "trainA" / "0000.png").write_bytes(b"a real photo")
    before = contents(tmp_path)
    for out in ("file", "file/below", "mine", "real"):
        failed = command("horse2zebra", "--out", tmp_path / out, "--n", 1, "--size", 16)
        assert failed.returncode == 2 and failed.stdout == ""
        assert failed.stderr.startswith("toy.py: error: ") and failed.stderr.count("\n") == 1
        assert str(tmp_path / out) in failed.stderr
        assert contents(tmp_path) == before


# ---- scores -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    scenes = [held_out_scene(i) for i in range(8)]
    return [np.stack([np.asarray(toy.render(s, 64, coat)).transpose(2, 0, 1) / 127.5 - 1
                      for s in scenes]) for coat in ("plain", "zebra")]


def test_window_mean_against_a_loop():
    x = np.random.default_rng(0).normal(size=(2, 5, 6))
    padded = np.pad(x, [(0, 0), (2, 2), (2, 2)], mode="edge")
    got = toy.window_mean(x, 2)
    for i in range(5):
        for j in range(6):
            np.testing.assert_allclose(got[:, i, j], padded[:, i:i + 5, j:j + 5].mean((1, 2)))


def test_coat_scores_of_known_answers(pairs):
    x, y = pairs
    coat, background = toy.coat_scores(x, y, y)
    assert coat["value"] == background["value"] == 0  # the truth
    coat, background = toy.coat_scores(x, x, y)
    assert coat["value"] == coat["trivial"]["copy the input"] > 40
    assert background["value"] == background["trivial"]["copy the input"] == 0
    shifted = toy.coat_scores(x, y + 2 / 127.5, y)
    assert shifted[0]["value"] == pytest.approx(2) and shifted[1]["value"] == pytest.approx(2)
    # no trivial answer is good at both
    for answer in coat["trivial"]:
        assert coat["trivial"][answer] > 40 or background["trivial"][answer] > 25


def test_coat_score_forgives_the_place_of_a_stripe_but_not_its_absence(pairs):
    x, y = pairs
    coat = np.abs(x - y).max(axis=1, keepdims=True) > 0
    moved = np.where(coat, np.roll(y, 2, axis=3), x)
    value = toy.coat_scores(x, moved, y)[0]["value"]
    trivial = toy.coat_scores(x, moved, y)[0]["trivial"]
    assert value < 0.5 * min(trivial.values())
    assert np.abs(moved - y)[np.broadcast_to(coat, y.shape)].mean() * 127.5 > 40  # pixel by pixel


def test_single_pair(tmp_path):
    folder = toy.ensure("horse2zebra_single", 64, root=tmp_path)
    files = {name for name in contents(folder) if "/" in name}
    assert files == {f"{split}/0000.png" for split in ("trainA", "trainB", "testA", "testB")}
    train, test, truth = (pixels(folder / s / "0000.png") for s in ("trainA", "testA", "testB"))
    assert (train == test).all() and 0.1 < (test != truth).any(axis=2).mean() < 0.4
    with pytest.raises(ValueError, match="single pair"):
        toy.horse2zebra_single(tmp_path / "two", n=2)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "s2r"
    toy.synthetic2real(out, n=4, size=64, seed=0, n_test=3)
    return out


def test_synthetic2real_layout_and_determinism(real, tmp_path):
    for split, count in (("source", 4), ("target", 4), ("test", 3)):
        for kind, mode in (("img", "RGB"), ("label", "P")):
            names = sorted(f.name for f in (real / f"{split}_{kind}").iterdir())
            assert names == [f"{i:04d}.png" for i in range(count)]
            with Image.open(real / f"{split}_{kind}" / names[-1]) as picture:
                assert (picture.mode, picture.size) == (mode, (64, 64))
    toy.synthetic2real(tmp_path / "again", n=4, size=64, seed=0, n_test=3)
    assert contents(tmp_path / "again") == contents(real)
    toy.synthetic2real(tmp_path / "few", n=1, size=64, seed=0, n_test=1)
    few, many = contents(tmp_path / "few"), contents(real)
    for name in ("source_img/0000.png", "target_label/0000.png", "test_img/0000.png"):
        assert few[name] == many[name]


def test_synthetic2real_labels_are_true(real):
    """In the graphics a class has one hue, so classes can be read off the picture; a label map says
    for every pixel what fills most of it."""
    for i in range(4):
        label = pixels(real / f"source_label/{i:04d}.png")
        picture = pixels(real / f"source_img/{i:04d}.png")
        assert 0 <= label.min() and label.max() < len(toy.CLASSES)
        assert {toy.CLASSES.index(c) for c in ("sky", "ground", "animal")} <= set(np.unique(label))
        for k in np.unique(label):
            colours = picture[label == k] / picture[label == k].max(axis=1, keepdims=True)
            assert colours.std(axis=0).max() < 0.02  # its light has two levels, its hue is one
    canvas = toy.paint(held_out_scene(0), 128, "plain")
    fine = np.array([name if name in toy.CLASSES else "animal" for name in toy.LABELS])[
        np.asarray(canvas.label)]
    coarse = toy.class_map(canvas, 64)
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
