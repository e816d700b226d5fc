"""cut.py: every equation against a plain transcription, and the script as its users run it."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_same, error_of, interrupted, noise_folder, odd_pictures
from PIL import Image

import common
import cut
import toy

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--load", "36", "--ngf", "4", "--ndf", "4", "--blocks", "4", "--batch", "2",
        "--patches", "16", "--bank", "40", "--workers", "0", "--device", "cpu", "--log-every", "1"]
TINY_SIN = ["--mode", "sincut", "--size", "64", "--tile", "32", "--ngf", "1", "--ndf", "1",
            "--scale", "64", "80", "--batch", "3", "--workers", "0", "--device", "cpu"]


def tiny_args(*flags):
    return cut.get_args(["--data", ".", *TINY, *flags])


@pytest.fixture
def folder(tmp_path):
    return noise_folder(tmp_path / "data")


@pytest.fixture
def single(tmp_path):
    """One picture per domain, for SinCUT."""
    rng = np.random.default_rng(0)
    for split in ("trainA", "trainB"):
        (tmp_path / "single" / split).mkdir(parents=True)
        noise = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "single" / split / "one.png")
    return tmp_path / "single"


def double(m):
    for net in (m.G, m.D, m.H):
        net.double()
    return m


def freeze_adam(m):
    """lr 0: the step leaves its gradients behind but changes nothing."""
    for optimiser in (m.opt_G, m.opt_D, m.opt_H):
        optimiser.param_groups[0]["lr"] = 0.0


# ---- networks -------------------------------------------------------------------------------


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts_at_the_papers_widths():
    for flags in ([], ["--no-antialias-G", "--no-antialias-D"]):
        m = cut.build(cut.get_args(["--data", ".", *flags]), torch.device("cpu"))
        assert (count(m.G), count(m.D), count(m.H)) == (11_378_179, 2_764_737, 560_384)
    m = cut.build(cut.get_args(["--data", ".", "--mode", "sincut"]), torch.device("cpu"))
    assert (count(m.G), count(m.D), count(m.H)) == (3_068_404, 5_885_473, 280_832)


def test_paper_defaults_of_the_modes():
    args = cut.get_args(["--data", "."])
    assert (args.tau, args.patches, args.bank, args.momentum) == (0.07, 256, 16384, 0.999)
    assert (args.epochs, args.lr, args.batch, args.blocks, args.size) == (400, 2e-4, 1, 9, 256)
    assert (args.lambda_X, args.lambda_Y, args.flip_equivariance) == (0.5, 0.5, False)
    args = cut.get_args(["--data", ".", "--mode", "fastcut"])
    assert (args.lambda_X, args.lambda_Y, args.flip_equivariance) == (10, 0, True)
    assert args.epochs == 200
    args = cut.get_args(["--data", ".", "--mode", "sincut"])
    assert (args.size, args.tile, args.batch, args.scale) == (128, 64, 16, [384, 1024])
    assert cut.get_args(["--data", ".", "--mode", "fastcut", "--lambda-X", "3"]).lambda_X == 3


@pytest.mark.parametrize("antialias, sizes", [(True, (1, 9, 15, 35, 99)),
                                              (False, (1, 9, 13, 29, 93))])
def test_receptive_fields_of_the_five_layers(antialias, sizes):
    """The text's 1, 9, 15, 35, 99 hold for the anti-aliased encoder (norms and ReLUs removed)."""
    G = cut.ResnetGenerator(2, 9, antialias).double()
    for module in list(G.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.GroupNorm, nn.ReLU)):
                setattr(module, name, nn.Identity())
    for p in G.parameters():
        nn.init.ones_(p)  # no cancellation
    x = torch.zeros(1, 3, 160, 160, dtype=torch.double, requires_grad=True)
    for feature, size in zip(G.encode(x), sizes, strict=True):
        middle = feature[0, :, feature.shape[2] // 2, feature.shape[3] // 2].sum()
        grad, = torch.autograd.grad(middle, x, retain_graph=True)
        rows = grad[0].abs().sum((0, 2)).nonzero().flatten()
        assert len(rows) == rows[-1] - rows[0] + 1 == size


@pytest.mark.parametrize("shape", [(1, 3, 64, 48), (2, 3, 32, 36)])
def test_generator_shapes_and_features(shape):
    for G in (cut.ResnetGenerator(4, 4), cut.ResnetGenerator(4, 4, antialias=False)):
        y, features = G(torch.randn(shape))
        assert y.shape == shape and y.abs().max() <= 1
        assert [f.shape[1] for f in features] == G.widths == [3, 8, 16, 16, 16]
    G = cut.SinGenerator(1, 6)
    y, features = G(torch.randn(shape))
    assert y.shape == shape and [f.shape[1] for f in features] == G.widths == [3, 16, 16, 16, 16]


def test_sincut_at_full_size():
    """Sec. 3.3.2: 128-pixel crops, four 64-pixel tiles each for D, whole pictures at test time."""
    args = cut.get_args(["--data", ".", "--mode", "sincut", "--batch", "2", "--device", "cpu"])
    m = cut.build(args, torch.device("cpu"))
    x, y = cut.random_batch(args, torch.device("cpu"))
    assert x.shape == (2, 3, 128, 128)
    out, features = m.G(x)
    assert out.shape == x.shape
    assert [tuple(features[i].shape[1:]) for i in args.nce_layers] == [
        (3, 128, 128), (160, 64, 64), (160, 64, 64)]
    assert m.D(cut.tiles(out, 64)).shape == (8, 1)
    losses = cut.train_step(m, x, y, args, torch.Generator().manual_seed(0))
    assert set(losses) == {"D", "R1", "GAN", "NCE_X", "NCE_Y", "identity"}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_patches_are_the_features_at_the_places():
    G = cut.ResnetGenerator(4, 4).double()
    x = torch.randn(2, 3, 16, 24, dtype=torch.double)
    features = G.encode(x)
    places = {0: torch.tensor([7, 0, 383]), 2: torch.tensor([95, 1]), 3: torch.tensor([5])}
    for picked, (layer, ids) in zip(G.patches(x, places), places.items(), strict=True):
        assert picked.shape == (2, len(ids), G.widths[layer])
        for s, place in enumerate(ids):
            row, col = divmod(int(place), features[layer].shape[3])
            torch.testing.assert_close(picked[:, s], features[layer][:, :, row, col])
    calls = []
    for i, stage in enumerate(G.encoder):
        stage.register_forward_hook(lambda *_, i=i: calls.append(i))
    G.patches(x, places)
    assert calls == [0, 1, 2]  # nothing after the last layer asked for


def test_projector_is_an_mlp_per_layer_with_unit_rows():
    H = cut.Projector([3, 5]).double()
    patches = [torch.randn(2, 4, 3).double(), torch.randn(2, 7, 5).double()]
    for layer, z in enumerate(H(patches)):
        a, b = H.mlps[layer][0], H.mlps[layer][2]
        v = torch.relu(patches[layer] @ a.weight.t() + a.bias) @ b.weight.t() + b.bias
        torch.testing.assert_close(z, v / v.square().sum(2, keepdim=True).sqrt())
        assert z.shape == (2, patches[layer].shape[1], 256)


# ---- StyleGAN2's parts ----------------------------------------------------------------------


@pytest.mark.parametrize("pad, stride, gain", [(2, 1, 1.0), (1, 2, 1.0), (1, 1, 4.0)])
def test_blur_against_a_direct_loop(pad, stride, gain):
    x = torch.randn(2, 3, 7, 6, dtype=torch.double)
    blur = cut.Blur(3, pad, stride, gain).double()
    row = [1, 3, 3, 1]
    padded = F.pad(x, (pad,) * 4)
    out = blur(x)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            expected = sum(row[a] * row[b] * padded[:, :, stride * i + a, stride * j + b]
                           for a in range(4) for b in range(4)) * gain / 64
            torch.testing.assert_close(out[:, :, i, j], expected)


def test_blur_is_twice_differentiable():
    x = torch.randn(1, 2, 4, 4, dtype=torch.double, requires_grad=True)
    blur = cut.Blur(2, 1, 2).double()
    assert torch.autograd.gradgradcheck(lambda x: blur(x).square(), x)


def test_style_up_has_unit_norm_filters_and_the_right_geometry():
    up = cut.StyleUp(3, 2).double()
    x = torch.randn(1, 3, 4, 5, dtype=torch.double)
    weight = up.weight / up.weight.square().sum((1, 2, 3), keepdim=True).sqrt()
    # transposed convolution by hand: every input pixel stamps its 3x3 filter at twice its place
    stamped = torch.zeros(1, 2, 9, 11, dtype=torch.double)
    for i in range(4):
        for j in range(5):
            stamped[0, :, 2 * i:2 * i + 3, 2 * j:2 * j + 3] += torch.einsum(
                "oikl,i->okl", weight, x[0, :, i, j])
    expected = F.leaky_relu(up.blur(stamped), 0.2) * math.sqrt(2)
    torch.testing.assert_close(up(x), expected, rtol=1e-6, atol=1e-6)
    nn.init.constant_(up.noise, 0.5)
    assert not torch.equal(up(x), up(x))  # fresh noise every time


def test_equal_conv_scale():
    conv = cut.EqualConv(4, 3, 3).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.double)
    expected = F.conv2d(x, conv.weight / math.sqrt(36), padding=1)
    torch.testing.assert_close(conv(x), F.leaky_relu(expected, 0.2) * math.sqrt(2))


def test_r1_against_a_known_gradient():
    y = torch.randn(3, 2, 4, 4, dtype=torch.double, requires_grad=True)
    a = torch.randn(2, 4, 4, dtype=torch.double, requires_grad=True)
    logits = (a * y**2).sum((1, 2, 3))  # d/dy = 2 a y
    penalty = cut.r1_penalty(logits, y)
    torch.testing.assert_close(penalty, ((2 * a * y)**2).sum((1, 2, 3)).mean() / 2)
    grad, = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(grad, (4 * a * y**2).sum(0) / 3)


def test_tiles_cut_without_mixing():
    x = torch.arange(2 * 3 * 4 * 8).view(2, 3, 4, 8)
    t = cut.tiles(x, 4)
    assert t.shape == (4, 3, 4, 4)
    assert torch.equal(t[0], x[0, :, :, :4]) and torch.equal(t[1], x[0, :, :, 4:])
    assert torch.equal(t[3], x[1, :, :, 4:])


# ---- losses ---------------------------------------------------------------------------------


def naive_l(v, positive, negatives, tau):
    """Eq. (3.6), digit by digit."""
    e = [math.exp(float(v @ k) / tau) for k in negatives]
    p = math.exp(float(v @ positive) / tau)
    return -math.log(p / (p + sum(e)))


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("S", [1, 5, 16])
def test_patch_nce_is_eq_3_6_and_3_7(B, S):
    q, k = unit(B, S, 8), unit(B, S, 8)
    expected = np.mean([naive_l(q[b, s], k[b, s], [k[b, j] for j in range(S) if j != s], 0.07)
                        for b in range(B) for s in range(S)])
    assert float(cut.patch_nce(q, k, 0.07)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("internal", [True, False])
def test_external_negatives_are_eq_3_8(internal):
    q, k, bank = unit(2, 5, 8), unit(2, 5, 8), unit(11, 8)
    expected = np.mean([
        naive_l(q[b, s], k[b, s], [k[b, j] for j in range(5) if internal and j != s] + list(bank),
                0.07) for b in range(2) for s in range(5)])
    got = float(cut.patch_nce(q, k, 0.07, bank, internal))
    assert got == pytest.approx(expected, rel=1e-9)


def test_multilayer_mean_and_minibatch_negatives():
    q, k = [unit(3, s, 8) for s in (4, 6)], [unit(3, s, 8) for s in (4, 6)]
    args = tiny_args()
    each = [cut.patch_nce(a, b, args.tau) for a, b in zip(q, k, strict=True)]
    torch.testing.assert_close(cut.multilayer_nce(q, k, args), sum(each) / 2)
    args = tiny_args("--negatives", "minibatch")
    q, k = [unit(3, 1, 8)], [unit(3, 1, 8)]
    expected = np.mean([naive_l(q[0][i, 0], k[0][i, 0], [k[0][j, 0] for j in range(3) if j != i],
                                0.07) for i in range(3)])
    assert float(cut.multilayer_nce(q, k, args)) == pytest.approx(expected, rel=1e-9)


def test_patch_nce_gives_keys_and_bank_no_gradient():
    q, k, bank = unit(1, 4, 8).requires_grad_(), unit(1, 4, 8).requires_grad_(), unit(5, 8)
    cut.patch_nce(q, k, 0.07, bank).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None


def test_places_are_distinct_shared_and_mirrored():
    features = [torch.randn(2, 3, 4, 6), torch.randn(2, 3, 9, 9), torch.randn(2, 3, 2, 2)]
    places = cut.sample_places(features, [0, 2], 9, torch.Generator().manual_seed(0))
    assert {layer: len(p) for layer, p in places.items()} == {0: 9, 2: 4}  # all, if fewer
    assert all(len(set(p.tolist())) == len(p) for p in places.values())
    for layer, m in cut.mirrored(places, features).items():
        assert torch.equal(cut.pick(features[layer], places[layer]),
                           cut.pick(features[layer].flip(3), m))


def test_memory_bank_is_a_queue_filled_by_the_averaged_networks():
    args = tiny_args("--negatives", "external", "--momentum", "0.9")
    m = cut.build(args, torch.device("cpu"))
    bank, x = m.bank_X, torch.randn(2, 3, 32, 32)
    before = [p.clone() for p in bank.encoder.encoder.parameters()]
    with torch.no_grad():
        for p in m.G.parameters():
            p.add_(1.0)
    old = [keys.clone() for keys in bank.keys()]
    places = cut.sample_places(bank.encoder.encode(x), args.nce_layers, args.patches,
                               torch.Generator().manual_seed(3))
    bank.update(m.G, m.H, x, places)
    for p, was in zip(bank.encoder.encoder.parameters(), before, strict=True):
        torch.testing.assert_close(p, 0.9 * was + 0.1 * (was + 1.0))
    for fresh, keys, was in zip(bank.H(bank.encoder.patches(x, places)), bank.keys(), old,
                                strict=True):
        torch.testing.assert_close(keys[:32], fresh.flatten(0, 1))
        assert torch.equal(keys[32:], was[32:])
    kept = [keys.clone() for keys in bank.keys()]
    bank.update(m.G, m.H, x, places)
    assert bank.oldest.tolist() == [24] * 5  # 64 keys through a bank of 40
    for keys, was in zip(bank.keys(), kept, strict=True):
        assert torch.equal(keys[24:32], was[24:32]) and not torch.equal(keys[:24], was[:24])


# ---- the step -------------------------------------------------------------------------------


def naive_step(m, x, y, args, places, flip):
    """Losses and gradients of one CUT step as the paper words it: one picture at a time, every
    feature computed anew, separate passes of D. Float64; returns (losses, gradients)."""
    G, D, H = (copy.deepcopy(net) for net in (m.G, m.D, m.H))
    B, layers = len(x), args.nce_layers

    def project(picture, back=False):
        features = G.encode(picture[None])
        return [F.normalize(H.mlps[i]((features[layer].flip(3) if back else features[layer])
                                      .flatten(2)[0].t()[places[layer]]), dim=1, eps=1e-7)
                for i, layer in enumerate(layers)]

    def nce(source, target):
        q = project(target, back=flip)
        k = [z.detach() for z in project(source)]
        total = 0
        for a, b in zip(q, k, strict=True):
            S = (a @ b.t()) / args.tau
            total = total + sum(-S[s, s] + S[s].exp().sum().log() for s in range(len(S))) / len(S)
        return total / len(layers)

    outs = [G((x[b].flip(2) if flip else x[b])[None])[0][0] for b in range(B)]
    L_D = sum(0.5 * ((D(outs[b].detach()[None])**2).mean() + ((D(y[b][None]) - 1)**2).mean())
              for b in range(B)) / B
    grad_D = torch.autograd.grad(L_D, list(D.parameters()))
    L_GAN = sum(((D(outs[b][None]) - 1)**2).mean() for b in range(B)) / B
    L_X = sum(nce(x[b], outs[b]) for b in range(B)) / B
    L_G = L_GAN + args.lambda_X * L_X
    losses = {"D": L_D, "GAN": L_GAN, "NCE_X": L_X}
    if args.lambda_Y:
        idts = [G((y[b].flip(2) if flip else y[b])[None])[0][0] for b in range(B)]
        losses["NCE_Y"] = sum(nce(y[b], idts[b]) for b in range(B)) / B
        L_G = L_G + args.lambda_Y * losses["NCE_Y"]
    grads = torch.autograd.grad(L_G, [*G.parameters(), *H.parameters()], allow_unused=True)
    return losses, grad_D, grads


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("flags", [[], ["--lambda-Y", "0", "--lambda-X", "10"],
                                   ["--flip-equivariance"], ["--nce-layers", "4"],
                                   ["--no-antialias-G", "--no-antialias-D", "--no-channels-last"]])
def test_step_equals_the_naive_one(B, flags):
    args = tiny_args("--batch", str(B), *flags)
    m = double(cut.build(args, torch.device("cpu")))
    for net in (m.G, m.D):
        common.init_weights(net, "normal", 0.1)  # livelier than 0.02
    freeze_adam(m)
    x, y = (torch.rand(B, 3, 32, 40, dtype=torch.double) * 2 - 1 for _ in "xy")
    seed = 3
    losses = cut.train_step(m, x, y, args, torch.Generator().manual_seed(seed))
    rng = torch.Generator().manual_seed(seed)
    flip = args.flip_equivariance and bool(torch.rand((), generator=rng) < 0.5)
    assert flip == args.flip_equivariance  # seed 3 flips
    features = m.G.encode(x)
    places = cut.sample_places(features, args.nce_layers, args.patches, rng)
    expected, grad_D, grads = naive_step(m, x, y, args, places, flip)
    assert set(losses) == set(expected)
    for name in expected:
        assert float(losses[name]) == pytest.approx(float(expected[name].detach()), rel=1e-9), name
    for p, g in zip(m.D.parameters(), grad_D, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10)
    for p, g in zip([*m.G.parameters(), *m.H.parameters()], grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10)


def test_gradient_routing():
    args = tiny_args()
    m = cut.build(args, torch.device("cpu"))
    x, y = cut.random_batch(args, torch.device("cpu"))
    seen = {}

    def average(*nets):
        seen[len(seen)] = {name: [p.grad is not None for p in getattr(m, name).parameters()]
                           for name in "GDH"}

    cut.train_step(m, x, y, args, torch.Generator().manual_seed(0), average)
    assert all(seen[0]["D"]) and not any(seen[0]["G"] + seen[0]["H"])  # after D's backward
    assert all(seen[1]["G"]) and all(seen[1]["H"])                     # after G's and H's
    assert all(p.requires_grad for p in m.D.parameters())
    grads = [p.grad.clone() for p in m.D.parameters()]
    freeze_adam(m)
    cut.train_step(m, x, y, args, torch.Generator().manual_seed(0))
    fresh = [p.grad for p in m.D.parameters()]
    assert not all(torch.equal(a, b) for a, b in zip(grads, fresh, strict=True))
    with torch.no_grad():  # only D's own two terms are in D's gradient, not the G step's
        y_hat = m.G(x)[0]
    L_D = 0.5 * (m.D(y_hat).square().mean() + (m.D(y) - 1).square().mean())
    for g, expected in zip(fresh, torch.autograd.grad(L_D, list(m.D.parameters())), strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("flags", [["--negatives", "external"], ["--negatives", "both"],
                                   ["--patches", "16"], ["--lambda-Y", "0"], ["--amp"],
                                   ["--nce-layers", "4", "--negatives", "external"]])
def test_ablations_of_fig_3_24_train(flags):
    args = tiny_args(*flags)
    m = cut.build(args, torch.device("cpu"))
    x, y = cut.random_batch(args, torch.device("cpu"))
    before = [p.clone() for p in [*m.G.parameters(), *m.D.parameters(), *m.H.parameters()]]
    for step in range(2):
        losses = cut.train_step(m, x, y, args, torch.Generator().manual_seed(step))
        assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    after = [*m.G.parameters(), *m.D.parameters(), *m.H.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rate_is_constant_then_linear():
    rates = [cut.rate(step, 400, 0.5) for step in range(400)]
    assert rates[:200] == [1.0] * 200 and rates[200] == 200 / 201
    assert rates[-1] == pytest.approx(1 / 201)
    assert np.allclose(np.diff(rates[200:]), -1 / 201)
    assert cut.rate(149, 200, 0.75) == 1 and cut.rate(199, 200, 0.75) == pytest.approx(1 / 51)


# ---- data -----------------------------------------------------------------------------------


def test_unpaired_samples_depend_on_seed_and_number_alone(folder):
    args = cut.get_args(["--data", str(folder), *TINY])
    data, again = cut.Unpaired(folder, args), cut.Unpaired(folder, args)
    for n in (0, 7, 3):
        for a, b in zip(data[n], again[n], strict=True):
            assert a.shape == (3, 32, 32) and torch.equal(a, b)
            assert -1 <= a.min() and a.max() <= 1
    assert not torch.equal(data[0][0], data[4][0])
    other = cut.Unpaired(folder, cut.get_args(["--data", str(folder), *TINY, "--seed", "1"]))
    assert not all(torch.equal(data[n][0], other[n][0]) for n in range(4))


def test_every_epoch_shows_every_input_once_and_directions_swap(folder, monkeypatch):
    args = cut.get_args(["--data", str(folder), *TINY])
    data = cut.Unpaired(folder, args)
    seen = []
    monkeypatch.setattr(data, "load", lambda path, rng, late: seen.append(path) or torch.zeros(1))
    for n in range(8):
        data[n]
    xs = seen[0::2]
    assert set(xs[:4]) == set(xs[4:]) == set(data.X) and xs[:4] != xs[4:]
    assert {p.parent.name for p in seen[1::2]} == {"trainB"}
    back = cut.Unpaired(folder, cut.get_args(["--data", str(folder), *TINY, "--direction", "BtoA"]))
    assert back.X[0].parent.name == "trainB" and back.Y[0].parent.name == "trainA"


def test_late_pictures_are_resized_not_cropped(folder):
    args = cut.get_args(["--data", str(folder), *TINY, "--decay-from", "0.5"])
    data = cut.Unpaired(folder, args, samples=8)
    x = data[4][0]
    whole = [common.to_tensor(common.open_rgb(f).resize((32, 32), Image.BICUBIC)) for f in data.X]
    assert any(torch.equal(x, w) or torch.equal(x, w.flip(2)) for w in whole)


def test_keep_aspect(folder):
    args = cut.get_args(["--data", str(folder), *TINY, "--load", "32", "--keep-aspect"])
    data = cut.Unpaired(folder, args, samples=1)
    whole = [common.open_rgb(f) for f in data.X]
    whole = [common.to_tensor(w.resize((38, 32), Image.BICUBIC)) for w in whole]
    crops = [w[:, :, i:i + 32] for w in whole for i in range(7)]
    assert any(torch.equal(data[0][0], c) or torch.equal(data[0][0], c.flip(2)) for c in crops)


def test_sincut_crops_share_a_scale_within_a_step(single):
    args = cut.get_args(["--data", str(single), *TINY_SIN])
    data = cut.SinglePair(single, args)
    widths = []
    crop = data.crop
    data.crop = lambda i, width, rng: widths.append(width) or crop(i, width, rng)
    for n in range(9):
        assert all(c.shape == (3, 64, 64) for c in data[n])
    steps = [set(widths[i:i + 6:2]) for i in (0, 6, 12)]
    assert all(len(s) == 1 for s in steps) and len(set.union(*steps)) > 1
    assert all(64 <= w <= 80 for w in widths)
    assert data.scaled(0, 10).height >= 64  # never smaller than a crop


def test_sincut_wants_one_picture(folder):
    with pytest.raises(common.UserError, match="one picture per domain, found 4"):
        cut.SinglePair(folder, cut.get_args(["--data", str(folder), *TINY_SIN]))


# ---- the script -----------------------------------------------------------------------------


def run(*flags):
    cut.main([*map(str, flags)])


def run_fails(capsys, *flags):
    return error_of(capsys, cut.main, *flags)


@pytest.fixture
def trained(folder, tmp_path):
    out = tmp_path / "run"
    run("--data", folder, *TINY, "--steps", 2, "--out", out)
    return out


def test_run_folder(trained):
    files = {str(f.relative_to(trained)) for f in trained.rglob("*") if f.is_file()}
    assert files == {"config.json", "log.csv", "index.html", "last.pt", "result.json",
                     "samples/step_000000.png", "samples/step_000002.png"}
    assert json.loads((trained / "config.json").read_text())["ngf"] == 4
    rows = (trained / "log.csv").read_text().splitlines()
    assert rows[0] == "step,D,GAN,NCE_X,NCE_Y,seconds" and len(rows) == 3


@pytest.mark.parametrize("flags", [[], ["--flip-equivariance"], ["--negatives", "both"]])
def test_resumed_run_is_bit_identical(folder, tmp_path, flags):
    common_flags = ["--data", folder, *TINY, *flags]
    run(*common_flags, "--steps", 4, "--out", tmp_path / "whole")
    interrupted(cut, lambda: run(*common_flags, "--steps", 4, "--out", tmp_path / "parts"))
    run(*common_flags, "--steps", 4, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 4
    assert_same(a["parts"], b["parts"])
    steps = [row.split(",")[0] for row in (tmp_path / "parts/log.csv").read_text().split()]
    assert steps == ["step", "1", "2", "3", "4"]


def test_resumed_sincut_is_bit_identical(single, tmp_path):
    common_flags = ["--data", single, *TINY_SIN]
    run(*common_flags, "--steps", 3, "--out", tmp_path / "whole")
    interrupted(cut, lambda: run(*common_flags, "--steps", 3, "--out", tmp_path / "parts"))
    run(*common_flags, "--steps", 3, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert_same(a["parts"], b["parts"])


def test_two_processes_equal_one_with_the_doubled_batch(folder, tmp_path):
    flags = ["--data", str(folder), *TINY, "--steps", "3", "--epochs", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", "cut.py", *flags, "--out", str(tmp_path / "two")],
                         cwd=ROOT, env=env, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    run(*flags, "--batch", 4, "--out", tmp_path / "one")
    one, two = (torch.load(tmp_path / n / "last.pt", weights_only=True)["parts"]
                for n in ("one", "two"))
    start = cut.build(cut.get_args(flags), torch.device("cpu"))
    for net in "GDH":
        moved, apart = 0.0, 0.0
        for key, was in getattr(start, net).state_dict().items():
            if "bias" not in key:  # a bias before a norm gets rounding errors for a gradient
                moved += float((one[net][key] - was).abs().sum())
                apart += float((one[net][key] - two[net][key]).abs().sum())
        assert moved > 0 and apart < 0.01 * moved, net


def test_translate_keeps_every_size(trained, tmp_path):
    sizes = odd_pictures(tmp_path / "in")
    run("--translate", tmp_path / "in", "--weights", trained / "last.pt", "--out", tmp_path / "out")
    written = {f.stem: Image.open(f) for f in (tmp_path / "out").iterdir()}
    assert {stem: im.size for stem, im in written.items()} == sizes
    assert {im.mode for im in written.values()} == {"RGB"}
    run("--translate", tmp_path / "in/odd.png", "--weights", trained / "last.pt",
        "--out", tmp_path / "alone")
    assert (tmp_path / "alone/odd.png").read_bytes() == (tmp_path / "out/odd.png").read_bytes()


def test_translate_is_g(trained, tmp_path):
    picture = np.random.default_rng(2).integers(0, 256, (32, 36, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "p.png")
    run("--translate", tmp_path / "p.png", "--weights", trained / "last.pt",
        "--out", tmp_path / "out")
    G = cut.ResnetGenerator(4, 4)
    G.load_state_dict(torch.load(trained / "last.pt", weights_only=True)["parts"]["G"])
    with torch.no_grad():
        y = G(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1)[0][0]
    expected = ((y + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(tmp_path / "out/p.png")) - expected).max() <= 1


def released_state(G):
    """G's weights under the keys of the authors' latest_net_G.pth, blur kernels included."""
    convs = [layer for layer in G.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    blocks = sum(isinstance(layer, cut.ResnetBlock) for layer in G.modules())
    antialias = not any(isinstance(layer, nn.ConvTranspose2d) for layer in convs)
    first, down = (12, [1, 4, 8]) if antialias else (10, [1, 4, 7])
    body = [f"{first + b}.conv_block.{i}" for b in range(blocks) for i in (1, 5)]
    after = first + blocks  # 21 for nine anti-aliased blocks
    up = [after + 1, after + 5, after + 9] if antialias else [after, after + 3, after + 7]
    state = {}
    for name, conv in zip([*down, *body, *up], convs, strict=True):
        state[f"model.{name}.weight"], state[f"model.{name}.bias"] = conv.weight, conv.bias
        if antialias and name in (4, 8):
            state[f"model.{name + 3}.filt"] = torch.ones(conv.out_channels, 1, 3, 3)
    return {key: value.detach().clone() for key, value in state.items()}


def test_released_key_names_at_full_width():
    """The layout that the authors' nine-block generators have."""
    keys = released_state(cut.ResnetGenerator()).keys()
    assert {"model.1.weight", "model.7.filt", "model.11.filt", "model.12.conv_block.1.weight",
            "model.20.conv_block.5.bias", "model.22.weight", "model.26.bias",
            "model.30.weight"} < keys
    keys = released_state(cut.ResnetGenerator(antialias=False)).keys()
    assert {"model.7.weight", "model.18.conv_block.5.bias", "model.19.weight", "model.22.bias",
            "model.26.weight"} < keys


@pytest.mark.parametrize("antialias", [True, False])
def test_loads_the_authors_generators(tmp_path, antialias):
    G = cut.ResnetGenerator(4, 6, antialias)
    torch.save(released_state(G), tmp_path / "latest_net_G.pth")
    args = cut.get_args(["--data", ".", "--weights", str(tmp_path / "latest_net_G.pth")])
    loaded = cut.load_generator(args, torch.device("cpu"))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x)[0], G(x)[0])


def test_loads_the_authors_sincut_generator(tmp_path):
    G = cut.SinGenerator(1)
    for p in G.parameters():
        nn.init.normal_(p)
    nn.init.zeros_(G.decoder[3].noise)
    p, names = list(G.parameters()), ["encoder.convs.1.0.weight", "encoder.convs.1.1.bias"]
    down = ["conv1.0.weight", "conv1.1.bias", "conv2.0.kernel", "conv2.1.weight", "conv2.2.bias",
            "skip.0.kernel", "skip.1.weight"]
    flat = ["conv1.0.weight", "conv1.1.bias", "conv2.0.weight", "conv2.1.bias"]
    names += [f"encoder.convs.2.{n}" for n in down]
    names += [f"{half}.convs.{i}.{n}" for half, ids in (("encoder", (3, 4, 5)),
                                                        ("decoder", (0, 1, 2)))
              for i in ids for n in flat]
    names += ["decoder.convs.3.conv.weight", "decoder.convs.3.conv.blur.kernel",
              "decoder.convs.3.noise.weight", "decoder.convs.3.activate.bias",
              "decoder.convs.4.0.weight", "decoder.convs.4.1.bias"]
    state, values = {}, iter(p)
    for name in names:
        value = torch.ones(4, 4) if "kernel" in name else next(values).detach()
        if "bias" in name:
            value = value.view(1, -1, 1, 1)
        state[name] = value[None] if name == "decoder.convs.3.conv.weight" else value
    torch.save(state, tmp_path / "G.pth")
    args = cut.get_args(["--data", ".", "--weights", str(tmp_path / "G.pth")])
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(cut.load_generator(args, torch.device("cpu"))(x)[0], G(x)[0])


def test_similarity_figure(trained, folder):
    run("--figure", "similarity", "--weights", trained / "last.pt", "--data", folder)
    figure = np.asarray(Image.open(trained / "similarity.png"))
    assert figure.ndim == 3 and figure.std() > 10


def test_evaluate_prints_fid_of_the_translated_test_set(trained, folder, monkeypatch, capsys):
    seen = {}

    def fid(fakes, reals, device, weights):
        seen.update(fakes=torch.cat(list(fakes)), reals=torch.cat(list(reals)), weights=weights)
        return 12.5

    monkeypatch.setattr(common, "fid", fid)
    run("--evaluate", "--weights", trained / "last.pt", "--data", folder, "--fid-weights", "w.pth")
    assert "FID (4 translated, 4 real, 299x299): 12.5" in capsys.readouterr().out
    assert seen["fakes"].shape == seen["reals"].shape == (4, 3, 32, 32)
    assert seen["weights"] == "w.pth"


def test_user_errors_are_one_line(folder, trained, tmp_path, capsys):
    line = run_fails(capsys, "--data", tmp_path / "nowhere")
    assert "nowhere" in line and "trainA" in line and "horse2zebra" in line
    (tmp_path / "empty/trainA").mkdir(parents=True)
    (tmp_path / "empty/trainB").mkdir()
    assert "no pictures" in run_fails(capsys, "--data", tmp_path / "empty", *TINY)
    (tmp_path / "half").mkdir()
    line = run_fails(capsys, "--data", tmp_path / "half", *TINY)
    assert "trainA" in line and "testB" in line
    assert "--size 34" in run_fails(capsys, "--data", folder, *TINY, "--size", 34)
    for flags in (["--batch", 0], ["--steps", -1], ["--tile", 48], ["--scale", 9, 3],
                  ["--negatives", "minibatch", "--batch", 1, "--patches", 1]):
        line = run_fails(capsys, "--data", folder, *TINY, *flags)
        assert flags[0] in line or "--batch 1" in line
    assert "--nce-layers" in run_fails(capsys, "--data", folder, *TINY, "--nce-layers", 5)
    assert "last.pt" in run_fails(capsys, "--data", folder, *TINY, "--resume",
                                  "--out", tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "file" in run_fails(capsys, "--data", folder, *TINY, "--out", tmp_path / "file/run")
    assert "--weights" in run_fails(capsys, "--translate", folder / "testA")
    assert "overwritten" in run_fails(capsys, "--translate", folder / "testA", "--out",
                                      folder / "testA", "--weights", trained / "last.pt")
    one = tmp_path / "one"
    for side in "AB":
        (one / f"test{side}").mkdir(parents=True)
        (folder / f"test{side}/0.png").rename(one / f"test{side}/0.png")
    assert "two or more" in run_fails(capsys, "--evaluate", "--data", one,
                                      "--weights", trained / "last.pt")
    assert "--weights" in run_fails(capsys, "--figure", "similarity", "--data", folder)


def test_bad_pictures_are_named(folder, trained, tmp_path, capsys):
    (folder / "trainA/0.png").write_text("not a picture")
    assert "0.png" in run_fails(capsys, "--data", folder, *TINY, "--steps", 4,
                                "--out", tmp_path / "r1")
    whole = (folder / "testA/1.png").read_bytes()
    (folder / "testA/1.png").write_bytes(whole[:len(whole) // 2])
    assert "1.png" in run_fails(capsys, "--translate", folder / "testA/1.png", "--weights",
                                trained / "last.pt")


def test_bad_checkpoints_are_refused(folder, trained, tmp_path, capsys):
    picture = folder / "testA/0.png"
    state = torch.load(trained / "last.pt", weights_only=True)
    torch.save(state | {"method": "spade"}, tmp_path / "other.pt")
    assert "spade.py" in run_fails(capsys, "--translate", picture, "--weights",
                                   tmp_path / "other.pt")
    data = (trained / "last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:len(data) // 2])
    assert "truncated" in run_fails(capsys, "--translate", picture, "--weights",
                                    tmp_path / "cut.pt")
    torch.save({"model.1.weight": torch.zeros(4, 3, 7, 7)}, tmp_path / "part.pth")
    assert "released" in run_fails(capsys, "--translate", picture, "--weights",
                                   tmp_path / "part.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    assert "released" in run_fails(capsys, "--translate", picture, "--weights",
                                   tmp_path / "tensor.pth")
    assert "does not fit" in run_fails(capsys, "--data", folder, *TINY, "--ngf", 8, "--steps", 5,
                                       "--out", trained, "--resume")


# ---- learning -------------------------------------------------------------------------------


def test_learns_the_toy_world(tmp_path, monkeypatch, capsys):
    """A twelfth of the toy run: the coat is a quarter closer to the truth than the best trivial
    answer, while the background is a quarter closer than the mean colour."""
    toy.horse2zebra(tmp_path / "toy", n=100, n_test=10)
    monkeypatch.setattr(cut, "data_folder", lambda args: tmp_path / "toy")
    run("--steps", 200, "--out", tmp_path / "run", "--device", "cpu")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["method"], result["data"], result["steps"]) == ("cut", "toy", 200)
    coat, background = result["scores"]
    assert coat["value"] < 0.75 * min(coat["trivial"].values())
    assert background["value"] < 0.75 * background["trivial"]["mean colour"]
    assert "coat error" in capsys.readouterr().out
