"""segin.py: every equation against a plain transcription, and the script as its users run it."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from helpers import assert_same, error_of, interrupted, odd_pictures
from PIL import Image

import common
import segin
from lab import metrics, toy
from lab.toy import disk

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--ngf", "4", "--ndf", "4", "--downs", "2", "--batch", "2", "--vgg",
        "random", "--match-layer", "relu2_1", "--workers", "0", "--device", "cpu", "--log-every",
        "1"]
CPU = torch.device("cpu")


def tiny_args(*flags):
    return segin.get_args(["--data", ".", *TINY, *flags])


def run(*flags):
    return segin.main([*map(str, flags)])


def run_fails(capsys, *flags):
    return error_of(capsys, segin.main, *flags)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The toy data set, small: a folder in the sketch / img / mask layout."""
    out = tmp_path_factory.mktemp("toy") / "sketches"
    toy.draw("sketches", out, n=5, size=32, n_test=4)
    return out


@pytest.fixture
def side_by_side(drawn, tmp_path):
    """The same pictures in pix2pix's layout, train/ and val/."""
    for split, name in (("train", "train"), ("test", "val")):
        (tmp_path / "AB" / name).mkdir(parents=True)
        for f in (drawn / f"{split}_sketch").iterdir():
            pair = Image.new("RGB", (64, 32))
            pair.paste(Image.open(f), (0, 0))
            pair.paste(Image.open(drawn / f"{split}_img" / f.name), (32, 0))
            pair.save(tmp_path / "AB" / name / f.name)
    return tmp_path / "AB"


@pytest.fixture(scope="module")
def trained(drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    run("--data", drawn, *TINY, "--steps", 2, "--out", out)
    return out


# ---- configuration and networks ---------------------------------------------------------------


def test_paper_defaults():
    args = segin.get_args(["--data", "."])
    assert (args.size, args.batch, args.epochs, args.lr, args.lr_D) == (256, 5, 20, 2e-4, 1.3e-5)
    assert [getattr(args, f"w{i}") for i in range(1, 7)] == [100, 5e-6, 1, 100, 10, 10]
    assert (args.vgg, args.match_layer, args.match_k, args.match_on) == (
        "imagenet", "relu4_1", 3, "picture")
    assert (args.corrupt, args.corrupt_share, args.corrupt_reach) == (0.5, 0.2, 2)
    assert segin.delta(args) == 8 and segin.multiple(args) == 16


def test_toy_preset_is_small_and_the_weights_stay():
    args = segin.get_args([])
    assert (args.size, args.vgg) == (64, "random")
    assert [args.w1, args.w3, args.w4, args.w5, args.w6] == [100, 1, 100, 10, 10]
    # 64 instead of 256 pixels: a sixteenth of the values in the sum of Eq. (6)
    assert args.w2 == pytest.approx(5e-6 * 16)


@pytest.mark.parametrize("layer, pixels", [("relu1_2", 1), ("relu2_1", 2), ("relu3_4", 4),
                                           ("relu4_1", 8), ("relu5_4", 16)])
def test_delta_is_what_vgg_does(layer, pixels):
    args = tiny_args("--match-layer", layer)
    features = common.VGG([layer], "random")(torch.zeros(1, 3, 32, 32))[layer]
    assert segin.delta(args) == pixels == 32 // features.shape[2]


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts_at_the_papers_widths():
    N = segin.Translator()
    c = [64, 128, 256, 512, 512, 512]
    norm = [2 * n for n in c]
    encoder = 6 * 64 * 9 + sum(a * b * k for a, b, k in zip(
        c[:-1], c[1:], (16, 16, 16, 16, 9), strict=True)) + sum(c) + sum(norm)
    non_local = 3 * (4 * 512 * 256 + 3 * 256 + 512)
    residual = 2 * (2 * (512 * 512 * 9 + 512) + 2 * 2 * 512)
    image = sum(a * b * 9 + 3 * b for a, b in
                ((1024, 512), (768, 256), (384, 128), (192, 64))) + 64 * 3 * 9 + 3
    seg = sum(a * b * 9 + 3 * b for a, b in
              ((512, 512), (512, 256), (256, 128), (128, 64))) + 64 * 9 + 1
    assert count(N) == encoder + non_local + residual + image + seg == 31_292_228
    assert count(segin.Translator(non_local=False)) == count(N) - non_local
    assert count(segin.Translator(multitask=False)) == count(N) - seg
    assert count(segin.build(segin.get_args(["--data", ".", "--vgg", "random", "--ngf", "4",
                                             "--device", "cpu"]), CPU).D) == 2_767_809


def test_the_architecture_of_sec_iii_b2():
    N = segin.Translator()
    layers = list(N.modules())
    assert len(N.encoder) == 6
    for block in N.encoder:
        assert [type(layer) for layer in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    kinds = [type(layer) for layer in N.bottleneck]
    assert kinds == [segin.NonLocal, segin.ResBlock] * 2 + [segin.NonLocal]
    assert not any(isinstance(layer, nn.ConvTranspose2d) for layer in layers)
    D = segin.build(tiny_args(), CPU).D
    assert not any(isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)) for layer in D.modules())
    convs = [layer for layer in D.modules() if isinstance(layer, nn.Conv2d)]
    assert all(hasattr(conv, "parametrizations") for conv in convs) and len(convs) == 5
    assert convs[0].in_channels == 6


def test_the_bottleneck_of_256_pixels_has_16_by_16_places():
    N, seen = segin.Translator(ngf=2), []
    N.bottleneck.register_forward_hook(lambda _, x, y: seen.append(y.shape))
    y_hat, seg = N(torch.zeros(1, 3, 256, 256), torch.zeros(1, 3, 256, 256))
    assert seen == [(1, 16, 16, 16)]
    assert y_hat.shape == (1, 3, 256, 256) and seg.shape == (1, 1, 256, 256)


@pytest.mark.parametrize("downs", [1, 3, 5])
def test_shapes_and_ranges(downs):
    N = segin.Translator(4, downs)
    x = torch.randn(2, 3, 32, 64)
    y_hat, seg = N(x, x)
    assert y_hat.shape == x.shape and y_hat.abs().max() <= 1
    assert seg.shape == (2, 1, 32, 64) and 0 <= seg.min() and seg.max() <= 1
    assert segin.Translator(4, downs, multitask=False)(x, x)[1] is None


def test_skips_feed_the_image_and_not_the_segmentation():
    """With a dead bottleneck the output still depends on the input, the segmentation does not."""
    N = segin.Translator(4, 2).eval()
    N.bottleneck.register_forward_hook(lambda _, x, y: torch.zeros_like(y))
    a, b = (N(torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)) for _ in "ab")
    assert not torch.allclose(a[0], b[0], atol=1e-4) and torch.equal(a[1], b[1])


def test_non_local_block_is_eq_3_and_4():
    block = segin.NonLocal(6).double()
    nn.init.normal_(block.out.weight)
    x = noise(2, 6, 3, 4)
    got = block(x)

    def linear(layer, v):
        return layer.weight[:, :, 0, 0] @ v + layer.bias

    for b in range(2):
        columns = x[b].reshape(6, 12)
        for i in range(12):
            F_ij = [torch.exp(linear(block.theta, columns[:, i]) @ linear(block.phi, columns[:, j]))
                    for j in range(12)]
            y_i = sum(f * linear(block.g, columns[:, j]) for j, f in enumerate(F_ij)) / sum(F_ij)
            z_i = columns[:, i] + linear(block.out, y_i)
            assert torch.allclose(got[b].reshape(6, 12)[:, i], z_i, atol=1e-10)


def test_non_local_blocks_start_as_the_identity():
    m = segin.build(tiny_args(), CPU)
    blocks = [layer for layer in m.N.modules() if isinstance(layer, segin.NonLocal)]
    x = torch.randn(2, 32, 4, 4)
    assert len(blocks) == 3
    for block in blocks:
        assert torch.equal(block(x), x)
        assert block.theta.weight.abs().max() > 0  # but it can leave


# ---- the match --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
def test_match_is_eq_1(k):
    a, b = noise(2, 5, 4, 6), noise(2, 5, 3, 5, seed=1)
    got = segin.semantic_match(a.float(), b.float(), k)
    assert got.shape == (2, 4, 6) and got.dtype == torch.int64

    def patch(features, i, j):
        padded = F.pad(features, [k // 2] * 4)
        return padded[:, i:i + k, j:j + k].flatten()

    for n in range(2):
        for i in range(4):
            for j in range(6):
                p = patch(a[n], i, j)
                cosines = [float(p @ (q := patch(b[n], u, v)) / (p.norm() * q.norm()))
                           for u in range(3) for v in range(5)]
                assert got[n, i, j] == int(np.argmax(cosines))


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_match_equals_unchunked(chunk):
    a, b = noise(2, 5, 8, 8).float(), noise(2, 5, 8, 8, seed=1).float()
    assert torch.equal(segin.semantic_match(a, b, 3, chunk), segin.semantic_match(a, b, 3))


def test_match_does_not_depend_on_the_length_of_a_feature():
    a, b = noise(1, 5, 4, 4).float(), noise(1, 5, 4, 4, seed=1).float()
    assert torch.equal(segin.semantic_match(7 * a, b, 1), segin.semantic_match(a, b, 1))


def test_rebuild_is_eq_2():
    r, xi = noise(2, 3, 6, 9), torch.randint(6, (2, 4, 5), generator=rng())
    W = segin.rebuild(r, xi, 3)  # r has 2 x 3 blocks of 3 x 3 pixels
    assert W.shape == (2, 3, 12, 15)
    for b in range(2):
        for i in range(4):
            for j in range(5):
                row, column = divmod(int(xi[b, i, j]), 3)
                assert torch.equal(W[b, :, 3 * i:3 * i + 3, 3 * j:3 * j + 3],
                                   r[b, :, 3 * row:3 * row + 3, 3 * column:3 * column + 3])


def test_w_rebuilds_a_picture_from_its_shuffled_blocks():
    """r is x with its blocks permuted; Phi sees one block at a time, so that all are still there.

    This matcher is not the paper's: `auxiliary` takes any.
    """
    x = noise(2, 3, 32, 24).float()
    order = torch.stack([torch.randperm(48, generator=rng(i)) for i in range(2)])
    r = segin.rebuild(x, order.view(2, 8, 6), 4)

    def blocks(picture):
        return F.unfold(picture, 4, stride=4).view(2, 48, 8, 6)

    def match(x, r):
        return segin.semantic_match(blocks(x), blocks(r), k=1)

    assert not torch.equal(r, x) and torch.equal(segin.auxiliary(x, r, match), x)


def test_vgg_match_of_a_picture_with_itself_is_the_picture(drawn):
    x, y, _ = segin.load_pair(segin.find_pairs(drawn, "train", "AtoB")[0], tiny_args())
    for flags in (["--match-layer", "relu3_1"], ["--match-layer", "relu4_1", "--match-k", "1"],
                  ["--match-layer", "relu2_1", "--match-on", "edges", "--match-k", "5"]):
        args = tiny_args(*flags)
        match = segin.SemanticMatch(args)
        W = segin.auxiliary(y[None], y[None], match)
        assert (W - y).abs().mean() < 0.01, flags  # equal patches may trade places
        assert match(y[None], y[None]).shape == (1, *[32 // segin.delta(args)] * 2)


def test_the_match_follows_a_shifted_part():
    """A square that moves by whole blocks is found at its new place."""
    x, r = -torch.ones(1, 3, 64, 64), -torch.ones(1, 3, 64, 64)
    x[:, :, 16:32, 16:32] = 1
    r[:, :, 32:48, 24:40] = 1
    xi = segin.SemanticMatch(tiny_args("--match-layer", "relu3_1"))(x, r)[0]
    assert xi[6, 6] == 10 * 16 + 8  # by four blocks down and two to the right


def test_edges_are_the_gradient_of_all_channels():
    p = torch.zeros(1, 3, 4, 6)
    p[:, 1, :, 3:] = 0.5
    e = segin.edges(p)
    assert e.shape == p.shape
    assert torch.equal(e[0, 0, 0], torch.tensor([1.0, 1, -1, -1, 1, 1]))
    assert torch.equal(segin.edges(torch.ones(1, 3, 4, 4)), torch.ones(1, 3, 4, 4))


# ---- the corruption ---------------------------------------------------------------------------

GRID = torch.arange(32 * 32).view(32, 32)


def test_shift_rate_and_reach():
    changed, steps = [], set()
    for seed in range(60):
        xi = segin.shift_patches(GRID, rng(seed), 0.2, 2)
        changed.append(float((xi != GRID).float().mean()))
        down, right = xi // 32 - GRID // 32, xi % 32 - GRID % 32
        steps |= set(zip(down.flatten().tolist(), right.flatten().tolist(), strict=True))
    assert np.mean(changed) == pytest.approx(0.2 * 24 / 25, abs=0.01)  # 1 of 25 stays
    assert steps == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    assert torch.equal(segin.shift_patches(GRID, rng(), 0.5, 0), GRID)


def test_repeat_is_one_block_over_a_rectangle():
    areas = []
    for seed in range(200):
        xi = segin.repeat_pattern(GRID, rng(seed))
        values, counts = xi.unique(return_counts=True)
        block = values[counts.argmax()]
        at = (xi == block).nonzero()
        if counts.max() > 2:
            # the rectangle, and perhaps the block's own place
            inside = (xi != GRID).nonzero()
            tall, wide = (inside.amax(0) - inside.amin(0) + 1).tolist()
            assert tall <= 16 and wide <= 16 and tall * wide - len(inside) in (0, 1)
            assert len(at) in (len(inside), len(inside) + 1)
        areas.append(int((xi != GRID).sum()))
    assert np.mean(areas) == pytest.approx(8.5**2, rel=0.15)  # sides uniform in 1 ... 16
    assert torch.equal(GRID, torch.arange(1024).view(32, 32))  # not changed in place


def test_random_matches_rate():
    changed, values = [], []
    for seed in range(60):
        xi = segin.random_matches(GRID, rng(seed), 0.2)
        changed.append(float((xi != GRID).float().mean()))
        values.append(xi[xi != GRID])
    assert np.mean(changed) == pytest.approx(0.2, abs=0.01)
    values = torch.cat(values).double()
    assert values.min() >= 0 and values.max() < 1024
    assert float(values.mean()) == pytest.approx(511.5, abs=15)


def test_each_corruption_comes_half_of_the_time(monkeypatch):
    calls = {"shift": 0, "repeat": 0, "lose": 0, "none": 0}
    for name, function in (("shift", "shift_patches"), ("repeat", "repeat_pattern"),
                           ("lose", "random_matches")):
        def mark(xi, *_, name=name):
            calls[name] += 1
            return xi + 1
        monkeypatch.setattr(segin, function, mark)
    args = tiny_args()
    for seed in range(1000):
        calls["none"] += bool(torch.equal(segin.corrupt(GRID, rng(seed), args), GRID))
    for name in ("shift", "repeat", "lose"):
        assert 440 < calls[name] < 560
    assert 80 < calls["none"] < 170  # independent: an eighth


def test_corruption_depends_on_the_seed_alone_and_can_be_switched_off():
    args = tiny_args()
    a, b = (segin.corrupt(GRID, rng(5), args) for _ in "ab")
    assert torch.equal(a, b)
    assert torch.equal(segin.corrupt(GRID, rng(5), tiny_args("--corrupt", "0")), GRID)
    always = tiny_args("--corrupt", "1")
    assert not torch.equal(segin.corrupt(GRID, rng(1), always), segin.corrupt(GRID, rng(2), always))


def test_spoilt_w_matches_each_pair_once_and_spoils_it_afresh():
    calls = []

    def match(x, y):
        calls.append(len(x))
        return torch.arange(64).view(1, 8, 8)  # every block at its own place

    spoilt = segin.SpoiltW(match, tiny_args("--corrupt", "1"))
    x, y = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    pairs = torch.tensor([7, 3])
    first = spoilt(x, y, pairs, torch.tensor([10, 11]))
    again = spoilt(x, y, pairs, torch.tensor([10, 11]))
    other = spoilt(x, y, pairs, torch.tensor([10, 12]))
    assert calls == [1, 1] and first.shape == y.shape
    assert torch.equal(first, again) and torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    untouched = segin.SpoiltW(match, tiny_args("--corrupt", "0"))
    assert torch.equal(untouched(x, y, pairs, torch.tensor([1, 2])), y)


# ---- losses -----------------------------------------------------------------------------------


def test_recon_loss_is_eq_5_as_a_mean():
    y, y_hat = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1)
    total = sum(abs(float(a - b)) for a, b in zip(y.flatten(), y_hat.flatten(), strict=True))
    assert float(segin.recon_loss(y, y_hat)) == pytest.approx(total / y.numel())


def test_feature_loss_is_eq_6_summed_over_maps_averaged_over_pictures():
    a, b = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1)
    sums = [float((a[i] - b[i]).abs().sum()) for i in range(3)]
    assert float(segin.feature_loss(a, b)) == pytest.approx(sum(sums) / 3)
    # at 256 pixels relu3_2 has 256 x 64 x 64 values: 5e-6 times the sum is 5.2 times the mean
    assert 5e-6 * 256 * 64 * 64 == pytest.approx(5.24, abs=0.01)


def test_tv_loss_is_eq_8_as_a_mean():
    y = noise(2, 3, 5, 4)
    total = 0.0
    for n in range(2):
        for i in range(4):
            for j in range(3):
                down, right = y[n, :, i + 1, j] - y[n, :, i, j], y[n, :, i, j + 1] - y[n, :, i, j]
                total += math.sqrt(float(down @ down + right @ right) + 1e-6)
    assert float(segin.tv_loss(y)) == pytest.approx(total / (2 * 4 * 3))


def test_tv_loss_of_a_flat_picture_has_a_gradient():
    y = torch.zeros(1, 3, 4, 4, requires_grad=True)
    segin.tv_loss(y).backward()
    assert torch.isfinite(y.grad).all()


def test_segmentation_loss_is_eq_9_as_a_mean():
    seg, y_seg = noise(2, 1, 4, 4).sigmoid(), (noise(2, 1, 4, 4, seed=1) > 0).double()
    expected = sum(abs(float(a - b)) for a, b in zip(seg.flatten(), y_seg.flatten(), strict=True))
    assert float(segin.segmentation_loss(seg, y_seg)) == pytest.approx(expected / 32)


def test_attention_loss_is_eq_10_as_a_mean():
    seg, y_seg = noise(2, 1, 3, 4).sigmoid(), (noise(2, 1, 3, 4, seed=1) > 0).double()
    y_hat, y = noise(2, 3, 3, 4, seed=2), noise(2, 3, 3, 4, seed=3)
    total = 0.0
    for n in range(2):
        for c in range(3):
            for i in range(3):
                for j in range(4):
                    total += abs(float(seg[n, 0, i, j] * y_hat[n, c, i, j]
                                       - y_seg[n, 0, i, j] * y[n, c, i, j]))
    assert float(segin.attention_loss(seg, y_hat, y_seg, y)) == pytest.approx(total / 72)


def test_total_is_eq_11_with_the_weights_of_the_paper():
    names = ("recon", "F", "GAN", "seg", "segAtt", "tv")
    losses = {name: torch.tensor(float(10**i)) for i, name in enumerate(names)}
    losses["D"] = torch.tensor(1e9)  # not N's
    args = segin.get_args(["--data", "."])
    expected = 100 * 1 + 5e-6 * 10 + 1 * 100 + 100 * 1000 + 10 * 10_000 + 10 * 100_000
    assert float(segin.total_loss(losses, args)) == pytest.approx(expected)


# ---- the training step ------------------------------------------------------------------------


def naive_step(m, x, y, y_seg, W, args):
    """The step again, plainly: D on detached outputs, then N with the D that has learned."""
    y_hat, seg = m.N(x, W)
    real, fake = m.D(torch.cat([x, y], 1)), m.D(torch.cat([x, y_hat.detach()], 1))
    L_D = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean())
    m.opt_D.zero_grad()
    L_D.backward()
    m.opt_D.step()
    found, wanted = m.vgg(y_hat)["relu3_2"], m.vgg(y)["relu3_2"]
    down = y_hat[:, :, 1:, :-1] - y_hat[:, :, :-1, :-1]
    right = y_hat[:, :, :-1, 1:] - y_hat[:, :, :-1, :-1]
    losses = {
        "recon": (y - y_hat).abs().mean(),
        "F": (found - wanted).abs().sum() / len(x),
        "GAN": -torch.sigmoid(m.D(torch.cat([x, y_hat], 1))).log().mean(),
        "tv": ((down**2).sum(1) + (right**2).sum(1) + 1e-6).sqrt().mean(),
        "seg": (seg - y_seg).abs().mean(),
        "segAtt": (seg * y_hat - y_seg * y).abs().mean()}
    total = (args.w1 * losses["recon"] + args.w2 * losses["F"] + args.w3 * losses["GAN"]
             + args.w4 * losses["seg"] + args.w5 * losses["segAtt"] + args.w6 * losses["tv"])
    m.opt_N.zero_grad()
    total.backward()
    m.opt_N.step()
    return {"D": L_D, **losses}


@pytest.mark.parametrize("B", [2, 3])
def test_step_equals_the_naive_one(B):
    args = tiny_args("--batch", str(B), "--no-channels-last", "--lr-D", "0.01")
    one = segin.build(args, CPU)
    for net in (one.N, one.D, one.vgg):
        net.double()
    # Power iteration differs with the number of passes: stopped, both give the same numbers.
    for _ in range(20):
        one.D(torch.zeros(1, 6, 32, 32, dtype=torch.float64))
    one.D.eval()
    other = copy.deepcopy(one)
    other.opt_N = torch.optim.Adam(other.N.parameters(), args.lr, (0.5, 0.999))
    other.opt_D = torch.optim.Adam(other.D.parameters(), args.lr_D, (0.5, 0.999))
    for seed in range(2):
        torch.manual_seed(seed)
        batch = [t.double() for t in segin.random_batch(args, CPU)]
        got = segin.train_step(one, *batch, args)
        expected = naive_step(other, *batch, args)
        assert got.keys() == expected.keys()
        for name in got:
            assert got[name].item() == pytest.approx(expected[name].item(), rel=1e-6), name
    for net in ("N", "D"):
        for a, b in zip(getattr(one, net).parameters(), getattr(other, net).parameters(),
                        strict=True):
            assert torch.allclose(a, b, atol=1e-7), net


def test_gradient_routing():
    args = tiny_args()
    m = segin.build(args, CPU)
    grads = {}

    def watch(learner):
        grads["N" if learner is m.N else "D"] = {
            name: [None if p.grad is None else p.grad.clone() for p in net.parameters()]
            for name, net in (("N", m.N), ("D", m.D), ("vgg", m.vgg), ("match", m.match))}

    for optimiser, net in ((m.opt_D, m.D), (m.opt_N, m.N)):
        optimiser.register_step_pre_hook(lambda *_, net=net: watch(net))
    segin.train_step(m, *segin.random_batch(args, CPU), args)
    assert all(g is None for g in grads["D"]["N"])           # D's step leaves N alone
    assert all(g is not None for g in grads["D"]["D"])
    for was, now in zip(grads["D"]["D"], grads["N"]["D"], strict=True):
        assert torch.equal(was, now)                         # N's step adds nothing to D
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in grads["N"]["N"]) > 20
    for frozen in ("vgg", "match"):
        assert all(g is None for g in grads["N"][frozen])
    assert all(p.requires_grad for p in m.D.parameters())


@pytest.mark.parametrize("name, gone", [
    ("gan", {"D", "GAN"}), ("recon", {"recon"}), ("F", {"F"}), ("tv", {"tv"}),
    ("nonlocal", set()), ("multitask", {"seg", "segAtt"})])
def test_ablations_of_table_ii(name, gone):
    args = tiny_args("--ablation", name)
    m = segin.build(args, CPU)
    before = copy.deepcopy(m.D.state_dict())
    losses = segin.train_step(m, *segin.random_batch(args, CPU), args)
    everything = {"D", "recon", "F", "GAN", "tv", "seg", "segAtt"}
    assert losses.keys() == everything - gone
    assert all(torch.isfinite(v) for v in losses.values())
    non_local = any(isinstance(layer, segin.NonLocal) for layer in m.N.modules())
    assert non_local == (name != "nonlocal")
    if name == "gan":
        assert_same(dict(before), dict(m.D.state_dict()))


def test_amp_step_is_finite():
    args = tiny_args("--amp")
    m = segin.build(args, CPU)
    losses = segin.train_step(m, *segin.random_batch(args, CPU), args)
    assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())


# ---- data -------------------------------------------------------------------------------------


def test_samples_depend_on_seed_and_number_alone_and_epochs_show_all(drawn):
    data = segin.Pairs(drawn, tiny_args())
    assert len(data) == 5
    x, y, y_seg, pair, seed = data[7]
    again = segin.Pairs(drawn, tiny_args())[7]
    assert torch.equal(x, again[0]) and (pair, seed) == again[3:]
    assert x.shape == y.shape == (3, 32, 32) and y_seg.shape == (1, 32, 32)
    assert sorted(data[n][3] for n in range(5, 10)) == list(range(5))
    assert len({data[n][4] for n in range(20)}) == 20
    assert segin.Pairs(drawn, tiny_args("--seed", "1"))[7][4] != seed


def test_partners_and_masks_go_together(drawn):
    for n in range(5):
        x, y, y_seg, pair, _ = segin.Pairs(drawn, tiny_args())[n]
        for kind, tensor in (("sketch", x), ("img", y)):
            expected = common.to_tensor(common.open_rgb(drawn / f"train_{kind}/{pair:04d}.png"))
            assert torch.equal(tensor, expected)
        mask = np.asarray(Image.open(drawn / f"train_mask/{pair:04d}.png")) > 127
        assert np.array_equal(y_seg[0].bool().numpy(), mask)


def test_side_by_side_pairs_are_the_same_data(drawn, side_by_side):
    one, other = (segin.Pairs(f, tiny_args()) for f in (drawn, side_by_side))
    for n in range(5):
        assert torch.equal(one[n][0], other[n][0]) and torch.equal(one[n][1], other[n][1])
        assert (one[n][2] != other[n][2]).float().mean() < 0.02  # the mask comes from the photo
    back = segin.Pairs(side_by_side, tiny_args("--direction", "BtoA"))
    assert torch.equal(back[0][0], other[0][1]) and torch.equal(back[0][1], other[0][0])
    assert len(segin.find_pairs(side_by_side, "test", "AtoB")) == 4  # val/ stands in for test/
    args = tiny_args("--split", "val")
    assert torch.equal(segin.test_pictures(side_by_side, args, CPU)["x"],
                       segin.test_pictures(drawn, tiny_args(), CPU)["x"])


def test_foreground_is_what_is_not_white(tmp_path):
    """A JPEG's nearly-white counts as white, pale colours do not."""
    picture = np.full((32, 64, 3), 252, dtype=np.uint8)
    picture[8:16, 40:48] = 255, 255, 200
    (tmp_path / "train").mkdir()
    Image.fromarray(picture).save(tmp_path / "train/a.png")
    y_seg = segin.Pairs(tmp_path, tiny_args())[0][2]
    assert y_seg.sum() == 64 and y_seg[0, 8:16, 8:16].all()


def test_masks_of_side_by_side_pairs(side_by_side):
    (side_by_side / "train_mask").mkdir()
    for f in (side_by_side / "train").iterdir():
        mask = Image.new("L", (16, 16))
        mask.paste(255, (0, 0, 8, 16))
        mask.save(side_by_side / "train_mask" / f.name)
    y_seg = segin.Pairs(side_by_side, tiny_args())[0][2]
    assert y_seg[0, :, :16].all() and not y_seg[0, :, 16:].any()


def test_test_references_are_other_photos(drawn):
    args = tiny_args()
    show = segin.test_pictures(drawn, args, CPU)
    assert torch.equal(show["r"], show["y"].roll(-2, dims=0))  # half of the four away
    args.data = "toy"
    assert torch.equal(segin.test_pictures(drawn, args, CPU)["r"],
                       show["y"].roll(-1, dims=0))
    few = segin.test_pictures(drawn, args, CPU, limit=2)
    assert torch.equal(few["x"], show["x"][[0, 2]]) and torch.equal(few["r"], show["y"][[1, 3]])


def test_pictures_of_the_chosen_split(drawn, tmp_path, capsys):
    val = segin.test_pictures(drawn, tiny_args("--split", "val"), CPU)
    expected = [common.to_tensor(common.open_rgb(drawn / f"val_img/{i:04d}.png")) for i in range(4)]
    assert torch.equal(val["y"], torch.stack(expected)) and not capsys.readouterr().out
    for kind in ("sketch", "img"):
        (tmp_path / f"train_{kind}").symlink_to(drawn / f"train_{kind}")
    assert len(segin.test_pictures(tmp_path, tiny_args(), CPU)["x"]) == 5
    assert "these are training pictures" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="no val pictures"):
        segin.test_pictures(tmp_path, tiny_args("--split", "val"), CPU)


def test_pix2pix_sets_are_fetched_by_name(side_by_side, tmp_path, monkeypatch):
    asked = []

    def download(addresses, folder):
        asked.append((addresses, folder))
        return side_by_side

    monkeypatch.setattr(common, "download", download)
    monkeypatch.chdir(tmp_path)
    for name in ("edges2shoes", "edges2handbags"):
        args = segin.get_args(["--data", name, *TINY])
        assert len(segin.Pairs(segin.data_folder(args), args)) == 5
    assert [str(folder) for _, folder in asked] == ["datasets/edges2shoes",
                                                    "datasets/edges2handbags"]
    place = "://efrosgans.eecs.berkeley.edu/pix2pix/datasets/edges2shoes.tar.gz"
    assert asked[0][0] == ("https" + place, "http" + place)


def test_random_batch_is_shaped_like_training(drawn):
    args = tiny_args()
    x, y, y_seg, W = segin.random_batch(args, CPU)
    assert x.shape == y.shape == W.shape == (2, 3, 32, 32) and y_seg.shape == (2, 1, 32, 32)
    assert set(y_seg.unique().tolist()) == {0.0, 1.0}


# ---- runs -------------------------------------------------------------------------------------


def test_run_folder(trained):
    files = {str(f.relative_to(trained)) for f in trained.rglob("*") if f.is_file()}
    assert files == {"config.json", "log.csv", "index.html", "last.pt", "result.json",
                     "samples/step_000000.png", "samples/step_000002.png"}
    rows = (trained / "log.csv").read_text().splitlines()
    assert rows[0] == "step,D,recon,F,GAN,tv,seg,segAtt,seconds" and len(rows) == 3
    grid = Image.open(trained / "samples/step_000002.png")
    assert grid.width == 6 * (4 * 32 + 4) + 4  # x, r, W, N, N_s, y, magnified four times
    assert torch.load(trained / "last.pt", weights_only=True)["parts"].keys() == {
        "N", "D", "opt_N", "opt_D"}


@pytest.mark.parametrize("flags", [[], ["--ablation", "multitask", "--match-on", "edges"]])
def test_resumed_run_is_bit_identical(drawn, tmp_path, flags):
    flags = ["--data", drawn, *TINY, *flags, "--steps", 5]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(segin, lambda: run(*flags, "--out", tmp_path / "parts"), step=3)
    run(*flags, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 5
    assert_same(a["parts"], b["parts"])


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_see_different_pairs(drawn, tmp_path):
    """Not those of one process with the doubled batch: on the CPU batch norm stays per process."""
    flags = ["--data", str(drawn), *TINY, "--steps", "2"]
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", "segin.py", *flags, "--out", str(tmp_path / "two")],
                         cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr
    parts = torch.load(tmp_path / "two/last.pt", weights_only=True)["parts"]
    run(*flags, "--out", tmp_path / "one")
    alone = torch.load(tmp_path / "one/last.pt", weights_only=True)["parts"]
    assert not torch.equal(parts["N"]["to_image.0.weight"], alone["N"]["to_image.0.weight"])


# ---- translate, evaluate ----------------------------------------------------------------------


def test_translate_keeps_every_size(trained, drawn, tmp_path):
    sizes = odd_pictures(tmp_path / "in")
    run("--translate", tmp_path / "in", "--weights", trained / "last.pt", "--exemplar",
        drawn / "test_img/0000.png", "--out", tmp_path / "out")
    written = {f.stem: Image.open(f).size for f in (tmp_path / "out").iterdir()}
    assert written == sizes


def test_translate_is_n_of_x_and_w(trained, drawn, tmp_path):
    run("--translate", drawn / "test_sketch/0001.png", "--weights", trained / "last.pt",
        "--exemplar", drawn / "test_img", "--out", tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "0000", "0001", "0002", "0003"]  # a folder per reference
    args = segin.get_args(["--weights", str(trained / "last.pt")])
    m = segin.load_networks(args, CPU)
    x, r = (common.to_tensor(common.open_rgb(drawn / d))[None]
            for d in ("test_sketch/0001.png", "test_img/0003.png"))
    with torch.no_grad():
        expected = m.N(x, segin.auxiliary(x, r, m.match))[0]
    expected = np.asarray(common.to_pil(expected[0]), dtype=int)
    got = np.asarray(Image.open(tmp_path / "out/0003/0001.png"), dtype=int)
    assert np.abs(got - expected).max() <= 1


def test_translation_leaves_training_mode_and_statistics_alone(drawn):
    args = tiny_args()
    m = segin.build(args, CPU)
    show = segin.test_pictures(drawn, args, CPU)
    before = copy.deepcopy(m.N.state_dict())
    segin.translate(m, show["x"], show["r"], args)
    assert m.N.training
    assert_same(dict(before), dict(m.N.state_dict()))


def test_any_matcher_will_do(drawn):
    args = tiny_args()
    m = segin.build(args, CPU)
    show = segin.test_pictures(drawn, args, CPU)
    m.match = lambda x, r: torch.zeros(len(x), 8, 8, dtype=torch.int64)
    _, W, _ = segin.translate(m, show["x"], show["r"], args)
    assert torch.equal(W, show["r"][:, :, :4, :4].repeat(1, 1, 8, 8))


def test_evaluate_prints_table_one(trained, drawn, monkeypatch, capsys):
    seen = {}

    def fid(fakes, reals, device, weights):
        seen.update(fakes=list(fakes), reals=list(reals))
        return 12.5

    monkeypatch.setattr(metrics, "fid", fid)
    run("--evaluate", "--weights", trained / "last.pt", "--data", drawn, "--lpips", "vgg")
    said = capsys.readouterr().out
    assert "FID (4 outputs, 4 photos, 299x299): 12.5" in said
    assert len(seen["fakes"]) == len(seen["reals"]) == 4
    assert "VGG distance (random), diversity (8 pairs)" in said  # 3 references: 2 pairs of 4 inputs
    assert "(ref) (12 pairs)" in said and "(gt) (4 pairs)" in said


def test_table_one_counts_pairs_as_the_paper_does(monkeypatch):
    """100 inputs x 19 pairs, 200 x 10 references, every photo as its own reference."""
    n, asked = 210, []
    photos = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 2, 2)

    def translate(m, x, r, args):
        asked.append((int(x[0, 0, 0, 0]), int(r[0, 0, 0, 0])))
        return (1000 * x + r,)

    monkeypatch.setattr(segin, "translate", translate)
    monkeypatch.setattr(segin, "perceptual", lambda *_: lambda a, b: float((a - b).abs().mean()))
    monkeypatch.setattr(metrics, "fid", lambda *_: 0.0)
    test = {"x": photos, "y": photos, "r": photos.roll(-1, 0)}
    scores = segin.table_one(SimpleNamespace(), test, tiny_args(), CPU)
    assert [s["name"] for s in scores] == [
        "FID (210 outputs, 210 photos, 299x299)", "LPIPS, diversity (1900 pairs)",
        "LPIPS (ref) (2000 pairs)", "LPIPS (gt) (210 pairs)"]
    diversity, references, own = (asked[n:n + 2000], asked[n + 2000:n + 4000], asked[n + 4000:])
    assert all(len({r for x, r in diversity if x == i} - {i}) == 20 for i in range(100))
    assert all(len({r for x, r in references if x == i} - {i}) == 10 for i in range(200))
    assert own == [(i, i) for i in range(n)]
    # LPIPS(gt) compares with the photo itself: |1000 i + i - i|
    assert scores[3]["value"] == pytest.approx(1000 * (n - 1) / 2)


def test_feature_distance_is_lpips_without_weights():
    vgg = common.VGG(["relu1_1", "relu2_1"], "random")
    a, b = noise(2, 3, 8, 8).float(), noise(2, 3, 8, 8, seed=1).float()
    total = 0.0
    for name in ("relu1_1", "relu2_1"):
        f, g = vgg(a)[name], vgg(b)[name]
        places = f.shape[2] * f.shape[3]
        for n in range(2):
            for i in range(f.shape[2]):
                for j in range(f.shape[3]):
                    u, v = f[n, :, i, j], g[n, :, i, j]
                    total += float((u / u.norm() - v / v.norm()).square().sum()) / places / 2
    assert metrics.feature_distance(vgg, a, b) == pytest.approx(total, rel=1e-4)
    assert metrics.feature_distance(vgg, a, a) == 0


def test_lpips_is_the_papers_metric_given_alexnets_weights(monkeypatch):
    pytest.importorskip("torchmetrics", reason="pip install -r lab/requirements.txt")
    state = torchvision.models.alexnet(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict",
                        lambda *_, **__: state)
    distance = segin.perceptual(tiny_args(), CPU)
    a, b = (noise(1, 3, 64, 64, seed=i).float().clamp(-1, 1) for i in (0, 1))
    first = distance(a, b)
    assert first > 0 and distance(a, a) == pytest.approx(0, abs=1e-7)
    assert distance(a, b) == pytest.approx(first)  # each call alone, no running mean


def test_evaluate_on_toy_data_repeats_the_runs_scores(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(segin, "data_folder", lambda args: drawn)
    run(*TINY, "--steps", 1, "--out", tmp_path / "run")
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    capsys.readouterr()
    run("--evaluate", "--weights", tmp_path / "run/last.pt")
    said = capsys.readouterr().out
    for score in scores:
        assert f"{score['name']}: {score['value']:.4g} " in said


def test_user_errors_are_one_line(drawn, trained, side_by_side, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs/ comes there
    weights = trained / "last.pt"
    line = run_fails(capsys, "--data", tmp_path / "nowhere")
    assert "nowhere" in line and "train_sketch" in line
    (tmp_path / "empty").mkdir()
    assert "train_sketch" in run_fails(capsys, "--data", tmp_path / "empty", *TINY)
    for flags, said in ((["--size", 34], "--size 34"), (["--downs", 6], "--downs 6"),
                        (["--match-k", 4], "--match-k 4"), (["--corrupt", 2], "--corrupt 2"),
                        (["--corrupt-share", -1], "--corrupt-share -1"),
                        (["--corrupt-reach", -1], "--corrupt-reach -1"),
                        (["--match-chunk", 0], "--match-chunk 0"),
                        (["--match-layer", "relu6_1"], "relu6_1")):
        assert said in run_fails(capsys, "--data", drawn, *TINY, *flags)
    assert "--weights" in run_fails(capsys, "--translate", drawn, "--exemplar", drawn)
    assert "--exemplar" in run_fails(capsys, "--translate", drawn, "--weights", weights)
    Image.new("RGB", (63, 32)).save(side_by_side / "train/odd.png")
    assert "odd.png" in run_fails(capsys, "--data", side_by_side, *TINY, "--steps", 3)
    state = torch.load(weights, weights_only=True)
    torch.save(state | {"method": "cut"}, tmp_path / "other.pt")
    assert "cut.py" in run_fails(capsys, "--evaluate", "--weights", tmp_path / "other.pt")

    def no_network(*_, **__):
        raise OSError("no route")
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", no_network)
    monkeypatch.setattr(metrics, "fid", lambda *_: 0.0)
    assert "--lpips vgg" in run_fails(capsys, "--evaluate", "--data", drawn, "--weights", weights)


def test_bad_partners_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs/ comes there
    toy.draw("sketches", tmp_path / "a", n=2, size=32, n_test=2)
    folder = tmp_path / "a"
    (folder / "train_mask/0001.png").unlink()
    assert "0001 has no mask" in run_fails(capsys, "--data", folder, *TINY)
    Image.new("RGB", (32, 16)).save(folder / "train_sketch/0000.png")
    Image.new("L", (32, 32)).save(folder / "train_mask/0001.png")
    line = run_fails(capsys, "--data", folder, *TINY, "--steps", 2)
    assert "0000.png" in line and "32x16" in line
    (folder / "train_sketch/0001.png").unlink()
    assert "0001 is in only one of" in run_fails(capsys, "--data", folder, *TINY)


# ---- the toy data set ----------------------------------------------------------------------------


def toy_arrays(folder, n=4):
    def stack(kind):
        return np.stack([np.asarray(Image.open(folder / f"test_{kind}/{i:04d}.png").convert("RGB"))
                         .transpose(2, 0, 1) / 127.5 - 1 for i in range(n)])

    part = np.stack([np.asarray(Image.open(folder / f"test_part/{i:04d}.png")) for i in range(n)])
    return stack("sketch"), stack("img"), stack("truth"), part


def test_sketches_layout_and_determinism(drawn, tmp_path):
    kinds = {"train": ("sketch", "img", "mask"), "test": ("sketch", "img", "mask", "truth", "part")}
    for split, names in kinds.items():
        for kind in names:
            files = sorted(f.name for f in (drawn / f"{split}_{kind}").iterdir())
            assert files == [f"{i:04d}.png" for i in range(5 if split == "train" else 4)]
    toy.draw("sketches", tmp_path / "few", n=1, size=32, n_test=4)
    for name in ("train_img/0000.png", "test_truth/0003.png"):
        assert (tmp_path / "few" / name).read_bytes() == (drawn / name).read_bytes()
    assert disk.refuse_foreign(drawn) is None  # every file is one of ours
    with pytest.raises(ValueError, match="n_test"):
        toy.draw("sketches", tmp_path / "one", n=1, n_test=1)


def test_the_truth_has_the_sketchs_shape_and_the_references_colours(tmp_path):
    toy.draw("sketches", tmp_path / "t", n=1, size=64, n_test=4)
    x, y, truth, part = toy_arrays(tmp_path / "t")
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


def test_sketch_lines_stand_where_parts_meet(drawn):
    x, y, truth, part = toy_arrays(drawn)
    assert (x[:, 0][part > 0] > 0.99).mean() == 1  # pure pixels hold no line
    assert np.array_equal(x[:, 0], x[:, 1]) and (x < -0.5).any()


def test_sketch_scores_of_known_answers(tmp_path):
    toy.draw("sketches", tmp_path / "t", n=1, size=64, n_test=6)
    x, y, truth, part = toy_arrays(tmp_path / "t", 6)
    r, W = np.roll(y, -1, axis=0), (x + np.roll(y, -1, axis=0)) / 2
    best = {s["name"]: s for s in toy.sketch_scores(x, truth, truth, part, r, W)}
    assert best["part colour error"]["value"] == best["picture error"]["value"] == 0
    assert best["parts right"]["value"] == 1
    for name, score in best.items():
        for answer, value in score["trivial"].items():  # no trivial answer comes near
            assert value < 0.8 if name == "parts right" else value > 8, (name, answer)
            if "colour" in answer and name == "parts right":
                assert value < 0.4
    for score in toy.sketch_scores(x, W, truth, part, r, W):
        assert score["value"] == score["trivial"]["W itself"]
    # the global tint is right, the parts are not: colours of two parts swapped everywhere
    swapped = truth.copy()
    for n in range(6):
        one, two = truth[n][:, part[n] == 1].mean(1), truth[n][:, part[n] == 5].mean(1)
        swapped[n][:, part[n] == 1], swapped[n][:, part[n] == 5] = two[:, None], one[:, None]
    right = toy.sketch_scores(x, swapped, truth, part, r, W)[1]["value"]
    assert 0.55 < right < 0.75  # two of five or six
    darker = toy.sketch_scores(x, truth - 4 / 127.5, truth, part, r, W)
    assert darker[0]["value"] == pytest.approx(4) and darker[1]["value"] == 1


# ---- learning ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_learns_the_toy_world(tmp_path, monkeypatch):
    """150 steps repair the patchwork W and beat every trivial answer by a wide margin."""
    toy.draw("sketches", tmp_path / "toy", n=60, size=32, n_test=8)
    monkeypatch.setattr(segin, "data_folder", lambda args: tmp_path / "toy")
    run("--size", 32, "--steps", 150, "--device", "cpu", "--ngf", 12, "--ndf", 8, "--lr", 2e-3,
        "--match-layer", "relu2_1", "--w2", 0, "--out", tmp_path / "run")
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    error = next(s for s in scores if s["name"] == "picture error")
    assert error["value"] < 0.7 * min(error["trivial"].values())
