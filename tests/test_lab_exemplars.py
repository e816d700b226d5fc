"""lab/exemplars.py: the scores of pictures painted after exemplars."""
# ruff: noqa: E741 (I is the paper's name for the exemplar)

import numpy as np
import pytest
import torch
from PIL import Image

import common
import pix2pixsc as sc
from lab import exemplars
from lab.toy import lights


def test_accuracies_against_loops():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, (2, 3, 8, 9))
    truth[truth == 2] = -1  # unlabelled; but found in places: pixels that do not count
    found[found == 4] = truth[truth == 4] = 1  # class 4: in neither
    truth[truth == 3] = 0   # class 3 is only hallucinated: IoU 0
    t, f = truth.ravel(), found.ravel()
    known = t >= 0
    iou = [((f == c) & (t == c) & known).sum() / ((((f == c) | (t == c)) & known).sum())
           for c in (0, 1, 2, 3)]
    assert iou[2] == iou[3] == 0
    recall = [((f == c) & (t == c)).sum() / (t == c).sum() for c in (0, 1)]
    assert exemplars.accuracies(*map(torch.tensor, (found, truth)), 5) == {
        "per-pixel accuracy": pytest.approx(((f == t) & known).sum() / known.sum()),
        "per-class accuracy": pytest.approx(np.mean(recall)), "class IoU": pytest.approx(
            np.mean(iou))}


def test_predicted_maps_may_say_unlabelled(tmp_path, monkeypatch):
    """Truth 1 everywhere, an eighth of it read as the unlabelled id 0: 7/8 are right."""
    label = np.ones((8, 8), np.uint8)
    for name, array in (("x.png", label), ("img.png", label * 9)):
        Image.fromarray(array).save(tmp_path / name)
    label[0] = 0
    Image.fromarray(label).save(tmp_path / "00000.png")
    monkeypatch.setattr(exemplars, "STEPS", 1)
    frame = sc.Frame("x", tmp_path / "img.png", tmp_path / "x.png", "x")
    args = sc.get_args("--data . --labels 3 --size 8 --height 8 --downs 1".split())
    I = torch.zeros(1, 3, 8, 8)
    found = {s["name"]: s["value"] for s in exemplars.scores(
        [(frame, frame)], I, I, [frame], args, 0, tmp_path)}
    for name in ("per-pixel accuracy", "per-class accuracy", "class IoU"):
        assert found[f"{name}, {tmp_path}"] == pytest.approx(7 / 8)


def test_style_of_pictures_that_follow_their_exemplars_or_not():
    level = torch.linspace(-0.8, 0.8, 4).repeat_interleave(3).view(12, 1, 1, 1)
    I, styles = level + 0.02 * torch.randn(12, 3, 8, 8), [str(i // 3) for i in range(12)]
    light, nearest = exemplars.style(level + 0.02 * torch.randn(12, 3, 8, 8), I, styles).values()
    assert light > 0.99 and nearest == 1
    light, nearest = exemplars.style(I.roll(6, 0), I, styles).values()
    assert light < 0 and nearest == 0


@pytest.fixture
def clips(tmp_path):
    """Two clips of three grey frames of 8 x 6 pixels, 100 to 120, with labels 0 to 2."""
    for split in ("train", "test"):
        for clip, frame in ((c, f) for c in "ab" for f in range(3)):
            for kind, array in (("img", np.full((6, 8, 3), 100 + 10 * frame, np.uint8)),
                                ("label", np.full((6, 8), frame, np.uint8))):
                folder = tmp_path / "own" / f"{split}_{kind}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"{clip}_{frame}.png")
    return tmp_path / "own"


def test_copies_in_other_lights(clips, tmp_path):
    flags = "--size 8 6 --bars 1 --every 2".split()
    lights.main([str(clips), str(tmp_path / "lit"), *flags])

    def read(sub):
        return np.asarray(Image.open(tmp_path / "lit" / sub)).astype(int)
    for split, frames in (("train", "a0 a1 a2 b0 b1 b2"), ("test", "a0 a2 b1")):
        names = {f"{f[0]}@{light}/{f[1]}.png" for light in lights.LIGHTS for f in frames.split()}
        for kind in ("img", "label"):
            folder = tmp_path / "lit" / f"{split}_{kind}"
            assert {f.relative_to(folder).as_posix() for f in folder.glob("*/*")} == names
    assert (read("train_label/b@dark/2.png") == np.array([3, 2, 2, 2, 2, 3])[:, None]).all()
    picture = read("train_img/a@own/1.png")
    assert (picture[1:5] == 110).all() and (picture[[0, 5]] == 0).all()
    dark = (110 / 255 * np.array([0.75, 0.8, 0.9])) ** 1.5 * 255
    assert np.abs(read("train_img/a@dark/1.png")[3, 3] - dark).max() <= 0.5
    assert (read("train_img/a@bright/1.png")[3] > 110).all()
    with pytest.raises(common.UserError, match="lit: exists"):
        lights.main([str(clips), str(tmp_path / "lit")])
    with pytest.raises(common.UserError, match="found no"):
        lights.main([str(tmp_path / "lit/train_img"), str(tmp_path / "x")])
    label = np.full((6, 8), 2, np.uint8)
    label[:, 3:] = 255                                    # unlabelled: no number for bars
    Image.fromarray(label).save(clips / "train_label/a_0.png")
    assert lights.draw(clips, tmp_path / "odd", (5, 6), rows=1) == 5     # 0 to 2, bars, 255
    assert set(np.unique(read("../odd/train_label/a@own/0.png"))) == {2, 3, 255}
    (clips / "train_label/a_1.png").unlink()
    with pytest.raises(common.UserError, match="a_1.png: expected a name CLIP_FRAME"):
        lights.main([str(clips), str(tmp_path / "y")])


def test_a_copy_is_the_truth_for_its_clip_in_that_light(clips, tmp_path, monkeypatch):
    """x of clip a in its own light, I of a in the dark: x's own dark copy is right, and only it."""
    lights.main([str(clips), str(tmp_path / "lit"), "--size", "8", "8"])
    args = sc.get_args(f"--data {tmp_path}/lit --labels 3 --size 8 --height 8 --downs 1".split())
    frames = {f.name: f for f in sc.find_frames(tmp_path / "lit", "train", args)}
    x, I = frames["a@own/1"], frames["a@dark/2"]
    truth = exemplars.in_the_light_of(x, I)
    assert truth == frames["a@dark/1"].image
    for other in ("a@own/2", "b@dark/2"):                 # no other light; another clip
        assert exemplars.in_the_light_of(x, frames[other]) is None
    monkeypatch.setattr(exemplars, "STEPS", 1)
    y = sc.picture(truth, (8, 8))
    name = "distance to x's photograph in I's light, grey levels"

    def distance(*pictures):
        pairs = [(x, I), (x, frames["b@dark/2"])]
        found = exemplars.scores(pairs, torch.stack(pictures), torch.zeros(2, 3, 8, 8),
                                 list(frames.values()), args)
        return {s["name"]: s["value"] for s in found}[name]
    assert distance(y, y + 1) == 0                        # the second pair has no known answer
    assert distance(y + 0.1, y) == pytest.approx(12.75, rel=1e-4)


def test_faces_are_scored_by_eyes_and_endpoints(tmp_path):
    """Tab. 5 and 2: a change at an eye counts, elsewhere not; points that are 0.05 off."""
    rng = np.random.default_rng(0)
    table = np.concatenate([[[64, 64]], rng.uniform(20, 44, (68, 2))])
    np.savetxt(tmp_path / "x.txt", table)
    eye = [int(v) for v in table[37:43].mean(0)]
    table[1:] += [0.03 * 64, 0.04 * 64]
    np.savetxt(tmp_path / "00000.txt", table)
    picture = tmp_path / "x.png"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture)
    pairs = [(sc.Frame("x", picture, tmp_path / "x.txt", "x"),) * 2]
    I = sc.picture(picture, (64, 64))[None]
    elsewhere, at_eye = I.clone(), I.clone()
    elsewhere[:, :, :10] = 0                                                # the top is no eye
    at_eye[:, :, eye[1], eye[0]] += 1
    args = sc.get_args(["--data", ".", "--label-kind", "landmarks", "--size", "64",
                        "--height", "64", "--vgg", "random"])
    for y_hat, changed in ((I, False), (elsewhere, False), (at_eye, True)):
        *_, eyes, endpoints = exemplars.scores(pairs, y_hat, I, [], args, None, tmp_path)
        assert eyes["name"] == "VGG distance of eyes (random)" and (eyes["value"] > 0) is changed
        assert endpoints["value"] == pytest.approx(0.05, rel=1e-3)


def test_a_patch_around_an_eye_has_50_pixels_of_256(tmp_path):
    table = np.full((69, 2), 64.0)
    table[1:] = (20, 40)
    table[43:49] = (90, 70)
    np.savetxt(tmp_path / "x.txt", table[:])
    table[0] = (128, 128)
    np.savetxt(tmp_path / "x.txt", table)
    pairs, sides = [(sc.Frame("x", None, tmp_path / "x.txt", "x"),) * 2], []

    class V(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("nothing", torch.zeros(1))

        def forward(self, x):
            sides.append(x)
            return {"relu1_1": x}

    x, y = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="xy")
    picture = torch.stack([x, y, x])[None]
    assert exemplars.eyes(picture, picture, pairs, V()) == 0
    first, second = sides[0]
    assert first.shape == (3, 25, 25)                                  # round(128 * 50 / 256)
    assert abs(float(first[0].mean()) - 20) <= 1 and abs(float(first[1].mean()) - 40) <= 1
    assert abs(float(second[0].mean()) - 90) <= 1 and abs(float(second[1].mean()) - 70) <= 1
