"""lab/toy/digits.py: digits, boards, MNIST's test pairs, scores, and which way L_P points."""

import os

import numpy as np
import pytest
import torch
from helpers import assert_same

import common
import egscit
from lab import metrics, toy
from lab.toy import digits as toy_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small digits_single."""
    out = tmp_path_factory.mktemp("toy") / "digits"
    toy.draw("digits_single", out, n=10, size=28, n_test=12)
    return out


def drawn(n):
    return toy.drawn_digits(n, 28, np.random.default_rng(0))


def as_bytes(x):
    """(3, H, W) in [-1, 1] -> (H, W, 3) bytes."""
    return ((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def test_toy_digits_are_varied_and_readable():
    masks, labels = drawn(100)
    assert len({m.tobytes() for m in masks[labels == 0]}) == 10
    assert masks.mean((1, 2)).min() > 0.03 and masks.mean((1, 2)).max() < 0.45
    edge = np.concatenate([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]])
    assert edge.mean() < 0.02  # strokes do not leave the picture


def test_toy_boards(tmp_path):
    toy.draw("digits_multiple", tmp_path / "boards", n=2, size=64, n_test=2)
    ab, b = ([np.asarray(common.open_rgb(f)) for f in common.list_pictures(
        tmp_path / "boards" / f"test{d}")] for d in ("AB", "B"))
    for answer, exemplar in zip(ab, b, strict=True):
        assert answer.shape == (64, 64, 3) and len(np.unique(answer.reshape(-1, 3), axis=0)) == 11
        assert (np.unique(answer.reshape(-1, 3), axis=0)
                == np.unique(exemplar.reshape(-1, 3), axis=0)).all()
    with pytest.raises(ValueError, match="multiple"):
        toy.draw("digits_multiple", tmp_path / "x", n=1, size=65)


def test_the_authors_test_pairs(monkeypatch):
    """Their draws, in the order of their script, one by one."""
    masks = drawn(100)[0]
    monkeypatch.setattr(egscit, "mnist", lambda args, split: (masks, None))
    found = egscit.test_set(egscit.get_args(["--data", "mnist-single"]), 30)
    rng, order_A, order_B = np.random.RandomState(0), list(range(100)), list(range(100))
    rng.shuffle(order_A)
    rng.shuffle(order_B)
    of_A = [rng.uniform() for _ in range(100)]
    of_B = [rng.uniform() for _ in range(100)]
    R, G, B = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for i in range(30):
        black = of_A[i] < 0.5
        ink_A, paper_A = ((0, 0, 0), (255,) * 3) if black else ((255,) * 3, (0, 0, 0))
        ink_B, paper_B = [(R, G), (G, R), (R, B), (B, R), (G, B), (B, G)][int(6 * of_B[i])]
        for name, order, ink, paper in (("x_A", order_A, ink_A, paper_A),
                                        ("x_B", order_B, ink_B, paper_B),
                                        ("x_AB", order_A, ink_B, paper_B),
                                        ("x_BA", order_B, ink_A, paper_A)):
            picture, mask = as_bytes(found[name][i]), masks[order[i]]
            assert (picture[mask] == ink).all() and (picture[~mask] == paper).all()


@pytest.mark.skipif("MNIST_ROOT" not in os.environ, reason="MNIST_ROOT: a folder with MNIST/raw")
def test_trivial_scores_of_the_authors_test_pairs():
    """On MNIST itself: what Tab. 2's protocol gives to answers that need no network."""
    args = egscit.get_args(["--data", "mnist-single", "--mnist-root", os.environ["MNIST_ROOT"]])
    test = egscit.test_set(args, 1000)
    for way, ceiling, paper in (("AB", (0.484, 0.086), (0.52, 0.513)),
                                ("BA", (0.226, 0.129), (0.27, 0.281))):
        truth, exemplar = test[f"x_{way}"], test[f"x_{way[1]}"]
        to_exemplar = metrics.ssim(truth, exemplar)
        assert float(to_exemplar.mean()) == pytest.approx(ceiling[0], abs=1e-3)
        assert float(to_exemplar.std()) == pytest.approx(ceiling[1], abs=1e-3)
        flat = toy_digits.paper_colour(exemplar)
        assert float(metrics.ssim(flat, truth).mean()) == pytest.approx(paper[0], abs=2e-3)
        assert float(metrics.ssim(flat, exemplar).mean()) == pytest.approx(paper[1], abs=2e-3)


def naive_ssim(a, b):
    """scikit-image's defaults, as a loop: 7x7 windows, sample covariances, RGB mean; bytes."""
    a, b, found = a.astype(float), b.astype(float), []
    C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    for k in range(3):
        for y in range(a.shape[0] - 6):
            for x in range(a.shape[1] - 6):
                p, q = (v[y:y + 7, x:x + 7, k].flatten() for v in (a, b))
                (v_p, cov), (_, v_q) = np.cov(p, q)
                found.append((2 * p.mean() * q.mean() + C1) * (2 * cov + C2)
                             / ((p.mean() ** 2 + q.mean() ** 2 + C1) * (v_p + v_q + C2)))
    return np.mean(found)


def test_scores_of_known_answers(digits):
    test = egscit.test_set(egscit.get_args(["--data", str(digits), "--task", "mnist-single"]), 12)
    x, exemplar, truth = test["x_A"], test["x_B"], test["x_AB"]
    scores = {s["name"]: s for s in toy.digit_scores({
        "": truth, "copy the input": x, "copy the exemplar": exemplar, "the truth": truth})}
    to_truth, to_exemplar = scores["SSIM to the truth"], scores["SSIM to the exemplar (Tab. 2)"]
    assert to_truth["value"] == pytest.approx(1) and to_truth["sd"] == pytest.approx(0, abs=1e-9)
    assert float(metrics.ssim(truth[:1], exemplar[:1])) == pytest.approx(
        naive_ssim(as_bytes(truth[0]), as_bytes(exemplar[0])))
    # the paper's measure prefers a copy of the exemplar, another digit, to the perfect answer
    assert to_exemplar["trivial"]["copy the exemplar"] == pytest.approx(1)
    assert to_exemplar["value"] == to_exemplar["trivial"]["the truth"] < 0.8
    assert scores["ink accuracy"]["value"] == scores["paper accuracy"]["value"] == 1
    for name, ink, paper in (("the exemplar's paper", 0, 1), ("copy the input", 0, 0)):
        assert scores["ink accuracy"]["trivial"][name] == ink
        assert scores["paper accuracy"]["trivial"][name] == paper


def test_pixel_accuracy_by_hand():
    green, red = torch.tensor([-1.0, 1, -1])[:, None, None], torch.tensor([1.0, -1, -1])
    truth = green.repeat(1, 4, 4)
    truth[:, 1, :3] = red[:, None]  # three pixels of ink, thirteen of paper
    y = truth.clone()
    y[:, 1, 0] = green[:, 0, 0]                          # lost
    y[:, 1, 1] = torch.tensor([0.5, -0.7, -0.9])         # nearest to red: right
    y[:, 3, 3] = torch.tensor([-1, -0.5, 0.7])           # blue paper: wrong
    ink, paper = toy_digits.pixel_accuracy(y[None], truth[None])
    assert ink == pytest.approx(2 / 3) and paper == pytest.approx(12 / 13)
    assert (toy_digits.paper_colour(truth[None])[0] == green).all()


@pytest.mark.slow
def test_L_P_points_at_the_truth(tmp_path, digits, capsys):
    """With --vgg digits and the weights of the preset: the truth has the least L_P of all answers
    but the exemplar itself, which has the right colours and another digit."""
    vgg = toy.digit_vgg(root=tmp_path)
    assert "taught" in capsys.readouterr().out
    assert_same(vgg.state_dict(), toy.digit_vgg(root=tmp_path).state_dict())  # kept
    assert not any(p.requires_grad for p in vgg.parameters())
    args = egscit.get_args([])
    test = egscit.test_set(egscit.get_args(["--data", str(digits), "--task", "mnist-single"]), 12)
    for way in ("AB", "BA"):
        x, exemplar, truth = test[f"x_{way[0]}"], test[f"x_{way[1]}"], test[f"x_{way}"]
        paper = toy_digits.paper_colour(truth)
        ink = (truth != paper).any(1, keepdim=True)
        colour = torch.stack([t[:, m[0]][:, :1, None] for t, m in zip(truth, ink, strict=True)])
        L_P = toy.perceptual_scores(vgg, {
            "": truth, "copy the input": x, "copy the exemplar": exemplar, "flat paper": paper,
            "swapped": torch.where(ink, paper, colour)}, args)[2]
        others = {k: v for k, v in L_P["trivial"].items() if k != "copy the exemplar"}
        assert L_P["value"] < 0.9 * min(others.values()), others
    args = egscit.get_args(["--data", "toy-multiple"])  # boards need other weights
    (tmp_path / "boards").mkdir()
    toy_digits.draw_multiple(tmp_path / "boards", 4, 112, 0, n_test=6)
    test = egscit.test_set(egscit.get_args(
        ["--data", str(tmp_path / "boards"), "--task", "mnist-multiple"]), 6)
    for way in ("AB", "BA"):
        answers = {"": test[f"x_{way}"], "copy the input": test[f"x_{way[0]}"],
                   "copy the exemplar": test[f"x_{way[1]}"]}
        L_P = toy.perceptual_scores(vgg, answers, args)[2]
        assert L_P["value"] < 0.9 * L_P["trivial"]["copy the input"], L_P
