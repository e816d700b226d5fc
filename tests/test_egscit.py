"""egscit.py: every equation against a plain transcription, and the script as its users run it."""

import copy
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_same, error_of, interrupted, noise_folder, odd_pictures
from PIL import Image

import common
import egscit
from lab import metrics, toy

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--height", "16", "--ngf", "4", "--ndf", "4", "--blocks", "1", "--batch",
        "2", "--downs", "1", "--pretrain", "2", "--g-updates", "2", "--vgg", "random", "--workers",
        "0", "--device", "cpu", "--log-every", "1", "--lr", "1e-3"]
SIZES = ["--ngf", "4", "--ndf", "4", "--blocks", "1", "--batch", "2", "--device", "cpu",
         "--log-every", "1"]
CPU = torch.device("cpu")


def tiny_args(*flags):
    return egscit.get_args(["--data", ".", *TINY, *flags])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return noise_folder(tmp_path_factory.mktemp("noise") / "data")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small digits_single, the folder that `toy.ensure` would find."""
    out = tmp_path_factory.mktemp("toy") / "digits"
    toy.draw("digits_single", out, n=60, size=28, n_test=12)
    return out


def run(*flags):
    return egscit.main([*map(str, flags)])


def run_fails(capsys, *flags):
    return error_of(capsys, egscit.main, *flags)


@pytest.fixture(scope="module")
def small_vgg():
    """A small V in place of VGG-19 at full width, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(egscit, "VGG", lambda taps, weights, ceil_mode: egscit.DigitVGG(4))
        yield


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory, small_vgg):
    out = tmp_path_factory.mktemp("trained") / "run"
    run("--data", folder, *TINY, "--steps", 2, "--out", out)
    return out


def pictures(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- configuration and networks ---------------------------------------------------------------


def test_defaults_are_the_authors():
    args = egscit.get_args(["--data", "."])  # street views
    assert (args.size, args.height, args.batch, args.lr, args.downs) == (512, 256, 3, 1e-4, 2)
    assert (args.lambda_c, args.lambda_s, args.mirror, args.zoom) == (100, 1e4, True, 0.8)
    assert (args.lambda_GAN, args.lambda_KL, args.lambda_rec, args.lambda_cyc) == (
        10, 0.1, 100, 100)
    assert (args.eta, args.g_updates, args.ngf, args.ndf, args.blocks) == (0.5, 5, 64, 64, 3)
    assert (args.steps, args.pretrain, args.vgg) == (300_000, 60_000, "imagenet")


@pytest.mark.parametrize("flags, expected", [
    (["--data", "mnist-single"], (28, 28, 0, 8, 1e-5, 10, 1e3, False)),
    (["--data", "mnist-multiple"], (112, 112, 2, 8, 1e-5, 100, 1e4, False)),
    (["--data", ".", "--task", "faces"], (128, 128, 2, 8, 1e-4, 10, 5e3, True))])
def test_tasks(flags, expected):
    args = egscit.get_args(flags)
    assert (args.size, args.height, args.downs, args.batch, args.lr, args.lambda_c, args.lambda_s,
            args.mirror) == expected


def test_small_presets_and_ablations():
    toy_args, mnist = (egscit.get_args(["--data", d, *f]) for d, f in (
        ("toy", []), ("mnist-single", ["--small"])))
    differ = {k for k, v in vars(toy_args).items() if v != getattr(mnist, k)}
    assert differ == {"data", "run_folder"}
    assert toy_args.vgg == "digits" and toy_args.ngf < 64
    assert egscit.get_args(["--data", "toy-multiple"]).size == 112
    assert egscit.get_args(["--ablation", "mask"]).eta == 1
    assert egscit.get_args(["--ablation", "adain"]).adain == "off"
    no_L_P = egscit.get_args(["--ablation", "L_P"])
    assert (no_L_P.lambda_c, no_L_P.lambda_s) == (0, 0)
    assert egscit.build(no_L_P, CPU).V is None


def count(*nets):
    return sum(p.numel() for net in nets for p in net.parameters())


@pytest.mark.parametrize("downs, E, G, block, total, stage_1", [
    (0, 231_040, 221_763, 73_856, 1_053_318, 600_515),
    (2, 3_918_976, 3_909_507, 1_180_160, 18_017_286, 10_188_803)])
def test_parameter_counts_at_the_authors_widths(downs, E, G, block, total, stage_1):
    args = egscit.get_args(["--data", ".", "--downs", str(downs), "--ablation", "L_P"])
    m = egscit.build(args, CPU)
    assert count(m.E_A) == count(m.E_B) == count(m.F_A) == count(m.F_B) == E
    assert count(m.G_A) == G and count(m.E_last) == count(m.G_first) == block
    assert count(*(getattr(m, name) for name in egscit.TRANSLATOR)) == total
    assert count(egscit.VAE(64, downs)) == stage_1
    assert count(m.D_A) == count(m.D_B) == 2_758_849


@pytest.mark.parametrize("size, logits", [((28, 28), (2, 2)), ((112, 112), (7, 7)),
                                          ((128, 128), (8, 8)), ((256, 512), (16, 32))])
def test_discriminator_maps(size, logits):
    D = egscit.Discriminator(4)
    assert D(torch.zeros(1, 3, *size)).shape == (1, 1, *logits)


@pytest.mark.parametrize("downs, size", [(0, (28, 28)), (2, (16, 32))])
def test_shapes(downs, size):
    E, G = egscit.Encoder(4, downs, 1), egscit.Generator(4, downs, 1)
    x = pictures(2, 3, *size)
    c = E(x)
    assert c.shape == (2, 4 * 2**downs, size[0] >> downs, size[1] >> downs)
    y = G(c)
    assert y.shape == x.shape and y.abs().max() < 1


def test_released_initialisation():
    m = egscit.build(egscit.get_args(["--data", ".", "--ngf", "32", "--ablation", "L_P"]), CPU)
    w = torch.cat([p.detach().flatten() for p in m.E_A.parameters() if p.dim() > 1])
    assert w.abs().max() <= 0.04 and float(w.std()) == pytest.approx(0.02 * 0.8796, rel=0.02)
    assert all((p == 0).all() for p in m.E_A.parameters() if p.dim() == 1)
    first = m.D_A.stages[0][0].weight.detach()  # Glorot: variance 2 / (fan in + fan out)
    assert float(first.std()) == pytest.approx((2 / (16 * (3 + 64))) ** 0.5, rel=0.1)


def test_digit_vgg_has_vggs_taps_and_map_sizes():
    found = egscit.DigitVGG()(torch.zeros(1, 3, 28, 28))
    sizes = [f.shape[2] for f in common.VGG(list(found), "random", ceil_mode=True)(
        torch.zeros(1, 3, 28, 28)).values()]
    assert list(found) == [f"relu{i}_1" for i in range(1, 6)]
    assert [f.shape[2] for f in found.values()] == sizes == [28, 14, 7, 4, 2]


# ---- masks, AdaIN, losses ---------------------------------------------------------------------


def test_mask_is_between_eta_and_one():
    f = noise(2, 3, 4, 5) * 20
    m = egscit.feature_mask(f, 0.5)
    assert 0.5 <= m.min() < 0.51 and 0.99 < m.max() <= 1
    assert (egscit.feature_mask(f * 0, 0.5) == 0.75).all()
    assert (egscit.feature_mask(f, 1) == 1).all()
    assert torch.allclose(egscit.feature_mask(f, 0), torch.sigmoid(f))
    i = (1, 2, 3, 4)
    assert float(m[i]) == pytest.approx(0.5 / (1 + math.exp(-float(f[i]))) + 0.5)


def naive_stylise(c, f_content, f_style, eta, adain):
    out = torch.empty_like(c)
    for b in range(len(c)):
        for k in range(c.shape[1]):
            m = (1 - eta) / (1 + torch.exp(-f_content[b, k])) + eta
            masked = m * c[b, k]
            mu_c, var_c = masked.mean(), ((masked - masked.mean()) ** 2).mean()
            mu_f = f_style[b, k].mean()
            var_f = ((f_style[b, k] - mu_f) ** 2).mean()
            if adain == "paper":
                gamma, beta = (var_f + 1e-5).sqrt(), mu_f                       # Eq. (1)
                out[b, k] = gamma * (masked - mu_c) / (var_c + 1e-5).sqrt() + beta
            elif adain == "released":
                out[b, k] = mu_f * (masked - mu_c) / (var_c + 1e-5) + var_f
            else:
                out[b, k] = masked
    return out


@pytest.mark.parametrize("adain", ["paper", "released", "off"])
@pytest.mark.parametrize("eta", [0.5, 0.0, 1.0])
def test_stylise_is_eq_1_and_2_on_masked_content(adain, eta):
    c, f_content, f_style = noise(2, 3, 5, 4), noise(2, 3, 5, 4, seed=1), noise(2, 3, 7, 6, seed=2)
    out = egscit.stylise(c, f_content, 3 * f_style + 1, SimpleNamespace(eta=eta, adain=adain))
    assert torch.allclose(out, naive_stylise(c, f_content, 3 * f_style + 1, eta, adain))


def test_stylised_content_has_the_exemplars_mean_and_deviation():
    c, f = noise(2, 3, 5, 4), 4 * noise(2, 3, 9, 9, seed=1) - 2
    out = egscit.stylise(c, c, f, SimpleNamespace(eta=0.5, adain="paper"))
    for got, wanted in zip(common.mean_std(out), common.mean_std(f), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-3)
    args = SimpleNamespace(eta=1.0, adain="paper")  # no mask: scale and shift of c are forgotten
    assert torch.allclose(egscit.stylise(5 * c + 3, c, f, args), egscit.stylise(c, c, f, args),
                          atol=1e-3)


def test_kl_is_zero_at_zero_mean_and_grows_with_it():
    assert egscit.kl(torch.zeros(2, 3, 4, 4)) == 0
    mu = noise(2, 3, 4, 4)
    assert float(egscit.kl(mu)) == pytest.approx(sum(float(v) ** 2 for v in mu.flatten()) / 96)


def test_phi_has_unit_channels_and_dead_ones_stay_zero():
    maps = {"a": noise(2, 3, 4, 5), "b": noise(2, 2, 1, 3)}
    maps["a"][1, 2] = 0
    for f, found in zip(maps.values(), egscit.phi(lambda x: maps, None), strict=True):
        for b in range(2):
            for k in range(f.shape[1]):
                norm = f[b, k].square().sum().sqrt()
                assert torch.allclose(found[b, k], f[b, k].flatten() / max(norm, 1e-6))
    assert (egscit.phi(lambda x: maps, None)[0][1, 2] == 0).all()


def test_a_nearly_dead_channel_of_phi_is_compared_but_gives_no_gradient():
    """Else one such channel makes the gradient 1/norm times the usual one: here 10^8 times."""
    f, weights = noise(1, 2, 4, 5), noise(1, 2, 20, seed=1)
    f[0, 1] *= 1e-8 / f[0, 1].norm()
    f.requires_grad_()
    found, = egscit.phi(lambda x: {"a": f}, None)
    assert float(found[0, 1].detach().norm()) == pytest.approx(1e-2)        # 1e-8 over 1e-6
    (weights * found).sum().backward()
    assert (f.grad[0, 1] == 0).all()
    alive = f[0, 0].detach().flatten()
    n, w = alive.norm(), weights[0, 0]
    expected = (w - (w @ alive) * alive / n ** 2) / n
    assert torch.allclose(f.grad[0, 0].flatten(), expected)


def test_content_and_style_losses_are_eq_5():
    a, b = ([noise(2, n + 1, n + 2, seed=s + n) for n in range(5)] for s in (0, 10))
    L_c, L_s = 0.0, 0.0
    for i in range(5):
        C, n = a[i].shape[1:]
        L_c += (i + 1) / 5 * sum(abs(float(a[i][s, k, p] - b[i][s, k, p])) for s in range(2)
                                 for k in range(C) for p in range(n)) / (2 * C * n)
        for s in range(2):
            for j in range(C):
                for k in range(C):
                    G_a, G_b = (sum(float(x[i][s, j, p] * x[i][s, k, p]) for p in range(n)) / n
                                for x in (a, b))
                    L_s += abs(G_a - G_b) / (2 * C * C)
    grams = [egscit.gram(f) for f in b]
    assert float(egscit.content_loss(a, b)) == pytest.approx(L_c)
    assert float(egscit.style_loss(a, grams)) == pytest.approx(L_s)
    assert egscit.content_loss(a, a) == 0 and egscit.style_loss(b, grams) == 0


def test_gram_of_phi_has_a_diagonal_of_one_over_places():
    f, = egscit.phi(lambda x: {"a": noise(2, 3, 4, 5)}, None)
    assert torch.allclose(egscit.gram(f).diagonal(dim1=1, dim2=2),
                          torch.full((2, 3), 1 / 20, dtype=torch.float64))


# ---- one step ---------------------------------------------------------------------------------


def test_flows_call_the_right_parts(monkeypatch):
    """Fig. 3: which network sees what, for the content of A with an exemplar of B."""
    calls = []

    def spy(name, result):
        def net(x):
            calls.append((name, x if isinstance(x, str) else None))
            return result
        return net

    def stylise(c, f_content, f_style, args):
        calls.append(("stylise", c, f_content, f_style))
        return f"{f_content}{f_style}"

    m = SimpleNamespace(E_last=lambda x: x, G_first=lambda x: x, V=None)
    monkeypatch.setattr(egscit, "stylise", stylise)
    monkeypatch.setattr(egscit, "encode", lambda x, E, m: E(x))
    monkeypatch.setattr(egscit, "content", lambda mu, m: f"c of {mu}")
    monkeypatch.setattr(egscit, "kl", lambda mu: calls.append(("kl", mu)) or 1.0)
    monkeypatch.setattr(egscit, "l1", lambda a, b: calls.append(("l1", a, b)) or 1.0)
    monkeypatch.setattr(egscit, "lsgan", lambda logits, real: calls.append(("gan", logits)) or 1.0)
    args = SimpleNamespace(lambda_rec=1, lambda_KL=10, lambda_GAN=100, lambda_cyc=1000)
    parts = [spy(*p) for p in (("E_A", "mu_A"), ("E_B", "mu_AB"), ("G_A", "a"), ("G_B", "b"),
                               ("D_B", "logits"))]
    _, L, x_AB = egscit.half_objective("x_A", "f_A", "f_B", None, *parts, m, args)
    assert x_AB == "b" and L == 1 + 10 + 100 + 1000 + 10
    assert calls == [("E_A", "x_A"),
                     ("stylise", "c of mu_A", "f_A", "f_A"), ("G_A", "f_Af_A"),
                     ("stylise", "c of mu_A", "f_A", "f_B"), ("G_B", "f_Af_B"),
                     ("E_B", "b"),
                     ("stylise", "c of mu_AB", "f_A", "f_A"), ("G_A", "f_Af_A"),
                     ("l1", "a", "x_A"), ("kl", "mu_A"), ("l1", "a", "x_A"), ("kl", "mu_AB"),
                     ("D_B", "b"), ("gan", "logits")]


def naive_losses(m, x_A, x_B, args):
    """All terms of Eq. (3) for both directions, plainly, without noise."""
    def code(E, x):
        return m.E_last(E(x))

    def maps(x):
        return [f.flatten(2) / f.flatten(2).norm(dim=2, keepdim=True).clamp_min(1e-6)
                for f in m.V(x).values()]

    total, f_A, f_B = 0, m.F_A(x_A), m.F_B(x_B)
    for x, y, f, f_y, E, E_y, G, G_y, D_y in (
            (x_A, x_B, f_A, f_B, m.E_A, m.E_B, m.G_A, m.G_B, m.D_B),
            (x_B, x_A, f_B, f_A, m.E_B, m.E_A, m.G_B, m.G_A, m.D_A)):
        mu = code(E, x)
        rec = G(naive_stylise(m.G_first(mu), f, f, args.eta, args.adain))
        translation = G_y(naive_stylise(m.G_first(mu), f, f_y, args.eta, args.adain))
        mu_2 = code(E_y, translation)
        cycle = G(naive_stylise(m.G_first(mu_2), f, f, args.eta, args.adain))
        total += 100 * (rec - x).abs().mean() + 100 * (cycle - x).abs().mean()
        total += args.lambda_KL * (mu.square().mean() + mu_2.square().mean())
        total += 10 * (D_y(translation) - 1).square().mean()
        for i, (a, b, c) in enumerate(zip(maps(translation), maps(x), maps(y), strict=True)):
            n = a.shape[2]
            total += args.lambda_c * (i + 1) / 5 * (a - b).abs().mean()
            total += args.lambda_s * (a @ a.mT / n - c @ c.mT / n).abs().mean()
    return total


@pytest.mark.parametrize("flags", [[], ["--adain", "released"], ["--ablation", "mask"],
                                   ["--lambda-c", "3", "--lambda-s", "7"]])
def test_step_equals_the_naive_one(flags, monkeypatch, small_vgg):
    """Gradients of the translator in float64, noise switched off."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    args = tiny_args("--no-channels-last", "--init", "xavier", *flags)
    m = egscit.build(args, CPU)
    for net in vars(m).values():
        if isinstance(net, torch.nn.Module):
            net.double()
    x_A, x_B = (pictures(2, 3, 16, 32, seed=s).double() for s in (1, 2))
    parameters = [p for name in egscit.TRANSLATOR for p in getattr(m, name).parameters()]
    wanted = torch.autograd.grad(naive_losses(m, x_A, x_B, args), parameters)
    m.opt_G.step = lambda: None
    egscit.train_step(m, x_A, x_B, args, None)
    for p, g in zip(parameters, wanted, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-6, atol=1e-9)
    assert max(float(g.abs().max()) for g in wanted) > 1e-3


def test_gradient_routing(small_vgg):
    args = tiny_args()
    m = egscit.build(args, CPU)
    before = {name: copy.deepcopy(part.state_dict()) for name, part in vars(m).items()
              if isinstance(part, torch.nn.Module)}
    losses = egscit.train_step(m, *egscit.random_batch(args, CPU), args, None, judge=False)
    assert not any("D_" in name for name in losses)
    for name in ("F_A", "F_B", "V"):  # frozen: no gradient ever reaches them
        assert all(p.grad is None for p in getattr(m, name).parameters())
    for name in ("D_A", "D_B"):  # they only judged
        assert all(p.grad is None for p in getattr(m, name).parameters())
    for name in egscit.TRANSLATOR:
        assert all(p.grad is not None for p in getattr(m, name).parameters()), name
    grads = {name: [p.grad.clone() for p in getattr(m, name).parameters()]
             for name in egscit.TRANSLATOR}
    egscit.update_discriminators(m, *[pictures(2, 3, 16, 32, seed=s) for s in range(4)], args,
                                 lambda: torch.autocast("cpu", enabled=False))
    for name in egscit.TRANSLATOR:  # D's update leaves them alone
        assert all(torch.equal(p.grad, g) for p, g in
                   zip(getattr(m, name).parameters(), grads[name], strict=True))
    for name, state in before.items():
        same = all(torch.equal(v, getattr(m, name).state_dict()[k]) for k, v in state.items())
        assert same == (name in ("F_A", "F_B", "V")), name


def test_d_sees_real_as_one_and_fake_as_zero(small_vgg):
    args = tiny_args()
    m = egscit.build(args, CPU)
    m.D_A = torch.nn.Conv2d(3, 1, 1)
    m.opt_D = SimpleNamespace(zero_grad=lambda set_to_none: None, step=lambda: None)
    x_A, x_B, fake_A, fake_B = (pictures(2, 3, 16, 32, seed=s) for s in range(4))
    losses = egscit.update_discriminators(m, x_A, x_B, fake_A, fake_B, args,
                                          lambda: torch.autocast("cpu", enabled=False))
    wanted = 0.5 * ((m.D_A(x_A) - 1).square().mean() + m.D_A(fake_A).square().mean())
    assert float(losses["D_A"]) == pytest.approx(wanted.item())
    grad, = torch.autograd.grad(10 * wanted, m.D_A.weight)
    assert torch.allclose(m.D_A.weight.grad, grad)


def test_shared_blocks_are_shared_objects(small_vgg):
    """The optimiser holds each shared weight once, and either direction trains it."""
    args = tiny_args()
    m = egscit.build(args, CPU)
    held = [id(p) for group in m.opt_G.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert {id(p) for p in [*m.E_last.parameters(), *m.G_first.parameters()]} <= set(held)
    for E in (m.E_A, m.E_B):
        m.E_last.zero_grad()
        egscit.encode(pictures(1, 3, 16, 32), E, m).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.E_last.parameters())


def test_pretraining_step_trains_two_separate_vae_gans():
    args = tiny_args()
    vaes = egscit.build_vaes(args, CPU)
    x_A, x_B = egscit.random_batch(args, CPU)
    torch.manual_seed(0)
    losses = egscit.pretrain_step(vaes, x_A, x_B, args)
    assert set(losses) == {f"{n}_{d}" for n in ("rec", "KL", "GAN", "D") for d in "AB"}
    again = egscit.build_vaes(args, CPU)  # another x_B: A learns the same
    torch.manual_seed(0)
    egscit.pretrain_step(again, x_A, x_A, args)
    assert_same(vaes.V_A.state_dict(), again.V_A.state_dict())
    assert not torch.equal(vaes.V_B.G.layers[-2].weight, again.V_B.G.layers[-2].weight)


def test_rate_falls_to_zero():
    assert egscit.rate(0, 10) == 1 and egscit.rate(5, 10) == pytest.approx(0.5**0.9)
    assert 0 < egscit.rate(9, 10) < 0.2


def test_amp_step_is_finite(small_vgg):
    args = tiny_args("--amp")
    m = egscit.build(args, CPU)
    losses = egscit.train_step(m, *egscit.random_batch(args, CPU), args, None)
    assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())


# ---- data -------------------------------------------------------------------------------------


def drawn(n=400):
    return toy.drawn_digits(n, 28, np.random.default_rng(0))


def colours_of(picture):
    """Distinct colours of (H, W, 3), the most frequent first."""
    values, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    return [tuple(v) for v in values[np.argsort(-counts)]]


def test_single_digits_domain_a():
    labels = drawn()[1]
    ink, paper = egscit.digit_colours(labels, "A", "train", np.random.default_rng(0))
    assert (ink.astype(int) + paper == 255).all() and set(ink.flatten()) == {0, 255}
    assert (ink == ink[:, :1]).all() and 0.4 < (ink[:, 0] == 0).mean() < 0.6


@pytest.mark.parametrize("split", ["train", "test"])
def test_single_digits_domain_b(split):
    labels = np.arange(6000) % 10
    ink, paper = egscit.digit_colours(labels, "B", split, np.random.default_rng(0))
    pairs = [(*i, *p) for i, p in zip(ink, paper, strict=True)]
    assert all(sorted(x) == [0, 0, 255] for x in [*ink.tolist(), *paper.tolist()])
    assert (ink != paper).any(1).all() and len(set(pairs)) == 6  # ordered pairs
    red_on_green = np.array([p == (255, 0, 0, 0, 255, 0) for p in pairs])
    if split == "train":
        assert red_on_green[labels >= 5].all()
        assert abs(red_on_green.mean() - (0.5 + 0.5 / 6)) < 0.03
    rest = [p for p, label in zip(pairs, labels, strict=True) if split == "test" or label < 5]
    for style in set(pairs):
        assert abs(rest.count(style) / len(rest) - 1 / 6) < 0.03


def test_test_pairs_of_the_chosen_split(digits, folder, capsys):
    val = egscit.test_set(egscit.get_args(["--data", str(digits), "--task", "mnist-single",
                                           "--split", "val"]))
    assert val.keys() == {"x_A", "x_B", "x_AB", "x_BA"}
    for name in ("A", "AB"):
        wanted = np.asarray(Image.open(digits / f"val{name}/0005.png")).transpose(2, 0, 1)
        assert np.array_equal(val[f"x_{name}"][5].numpy(), wanted)
    assert not capsys.readouterr().out
    with pytest.raises(common.UserError, match="valA"):
        egscit.test_set(egscit.get_args(["--data", str(folder), *TINY, "--split", "val"]))


def test_painted_digits_have_two_colours_in_their_places():
    masks, labels = drawn(20)
    ink, paper = egscit.digit_colours(labels, "B", "test", np.random.default_rng(0))
    for picture, mask, i, p in zip(egscit.paint_digits(masks, ink, paper), masks, ink, paper,
                                   strict=True):
        assert picture.dtype == np.uint8 and len(colours_of(picture)) == 2
        assert (picture[mask] == i).all() and (picture[~mask] == p).all()


@pytest.mark.parametrize("domain", "AB")
def test_boards_show_every_class_once_in_its_colour(domain):
    masks, labels = drawn(50)
    members, rng = [np.flatnonzero(labels == k) for k in range(10)], np.random.default_rng(3)
    for _ in range(5):
        picks, cells = layout = egscit.board_layout(members, rng)
        inks, paper = egscit.board_colours(domain, rng)
        board = egscit.paint_board(masks, layout, inks, paper)
        assert board.shape == (112, 112, 3) and len(set(cells)) == 10 and max(cells) < 16
        assert labels[picks].tolist() == list(range(10))
        for cell in range(16):
            row, column = divmod(cell, 4)
            tile = board[row * 28:row * 28 + 28, column * 28:column * 28 + 28]
            if cell in cells:
                k = cells.tolist().index(cell)
                assert (tile[masks[picks[k]]] == inks[k]).all()
                assert (tile[~masks[picks[k]]] == paper).all()
            else:
                assert (tile == paper).all()
        assert tuple(paper) in ((0, 0, 0), (255, 255, 255))
        if domain == "A":
            assert (inks == 255 - paper).all()
        else:
            hsv = np.array([Image.new("RGB", (1, 1), tuple(map(int, c))).convert("HSV").getpixel(
                (0, 0)) for c in inks]) / 255
            gap = np.abs(hsv[:, 0] - np.arange(10) / 10)
            assert np.minimum(gap, 1 - gap).max() < 0.03
            assert 0.28 <= hsv[:, 1:].min() and hsv[:, 1:].max() <= 0.72


def test_toy_digits_and_their_answers(digits):
    a, b, ab, ba = (egscit.read(common.list_pictures(digits / f"test{d}"))
                    for d in ("A", "B", "AB", "BA"))
    assert len(common.list_pictures(digits / "trainA")) == 60
    for x, y, xy, yx in zip(a, b, ab, ba, strict=True):
        for shape, style, answer in ((x, y, xy), (y, x, yx)):
            assert len(colours_of(answer)) == 2
            assert set(colours_of(answer)) == set(colours_of(style))
            ink = (shape != np.array(colours_of(shape)[0])).any(2)
            assert ((answer != np.array(colours_of(answer)[0])).any(2) == ink).all()


def test_toy_digits_are_varied_and_readable():
    masks, labels = drawn(100)
    zeros = masks[labels == 0]
    assert len({m.tobytes() for m in zeros}) == 10
    assert masks.mean((1, 2)).min() > 0.03 and masks.mean((1, 2)).max() < 0.45
    edge = np.concatenate([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]])
    assert edge.mean() < 0.02  # strokes do not leave the picture


def test_toy_boards(tmp_path):
    toy.draw("digits_multiple", tmp_path / "boards", n=2, size=64, n_test=2)
    ab, b = (egscit.read(common.list_pictures(tmp_path / "boards" / f"test{d}"))
             for d in ("AB", "B"))
    for answer, exemplar in zip(ab, b, strict=True):
        assert answer.shape == (64, 64, 3) and len(colours_of(answer)) == 11
        assert set(colours_of(answer)) == set(colours_of(exemplar))
    with pytest.raises(ValueError, match="multiple"):
        toy.draw("digits_multiple", tmp_path / "x", n=1, size=65)


def test_mnist_single_is_made_by_the_rules(monkeypatch):
    masks, labels = drawn()
    monkeypatch.setattr(egscit, "mnist", lambda args, split: (masks, labels))
    args = egscit.get_args(["--data", "mnist-single"])
    A, B = egscit.train_domains(args)
    assert len(A) == len(B) == 400
    rng = np.random.default_rng(0)
    order_A, order_B = rng.permutation(400), rng.permutation(400)
    for i in range(40):
        a, b = (((d.picture(i, None) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
                for d in (A, B))
        assert set(colours_of(a)) == {(0, 0, 0), (255, 255, 255)}
        assert ((a != np.array(colours_of(a)[0])).any(2) == masks[order_A[i]]).all()
        if labels[order_B[i]] >= 5:
            assert colours_of(b) == [(0, 255, 0), (255, 0, 0)]


def test_the_authors_test_pairs(monkeypatch):
    """Their draws, in the order of their script, one by one."""
    masks = drawn(100)[0]
    found, rng = egscit.released_pairs(masks, n=30), np.random.RandomState(0)
    order_A, order_B = list(range(100)), list(range(100))
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
            mask = masks[order[i]]
            assert (found[name][i][mask] == ink).all() and (found[name][i][~mask] == paper).all()


@pytest.mark.skipif("MNIST_ROOT" not in os.environ, reason="MNIST_ROOT: a folder with MNIST/raw")
def test_trivial_scores_of_the_authors_test_pairs():
    """On MNIST itself: what Tab. 2's protocol gives to answers that need no network."""
    args = egscit.get_args(["--data", "mnist-single", "--mnist-root", os.environ["MNIST_ROOT"]])
    test = egscit.test_set(args)
    for way, ceiling, paper in (("AB", (0.484, 0.086), (0.52, 0.513)),
                                ("BA", (0.226, 0.129), (0.27, 0.281))):
        truth, exemplar = test[f"x_{way}"], test[f"x_{way[1]}"]
        to_exemplar = ssim(truth, exemplar)
        assert float(to_exemplar.mean()) == pytest.approx(ceiling[0], abs=1e-3)
        assert float(to_exemplar.std()) == pytest.approx(ceiling[1], abs=1e-3)
        flat = egscit.paper_colour(exemplar).expand_as(exemplar).contiguous()
        assert float(ssim(flat, truth).mean()) == pytest.approx(paper[0], abs=2e-3)
        assert float(ssim(flat, exemplar).mean()) == pytest.approx(paper[1], abs=2e-3)


def test_mnist_multiple_is_drawn_by_index(monkeypatch):
    monkeypatch.setattr(egscit, "mnist", lambda args, split: drawn())
    A, B = egscit.train_domains(egscit.get_args(["--data", "mnist-multiple"]))
    assert len(A) == len(B) == 60_000 and A.picture(7, None).shape == (3, 112, 112)
    assert torch.equal(A.picture(7, None), A.picture(7, None))
    assert not torch.equal(A.picture(7, None), A.picture(8, None))
    pairs = egscit.board_pairs(*drawn(), n=2)
    assert set(colours_of(pairs["x_AB"][0])) == set(colours_of(pairs["x_B"][0]))
    assert set(colours_of(pairs["x_BA"][1])) == {(0, 0, 0), (255, 255, 255)}


def test_samples_depend_on_seed_and_number_alone_and_exemplars_vary(folder):
    args = tiny_args("--mirror", "--zoom", "0.8")
    data = [egscit.Unpaired(*egscit.train_domains(egscit.get_args(
        ["--data", str(folder), *TINY, "--mirror", "--zoom", "0.8"])), args) for _ in "12"]
    assert_same(data[0][5], data[1][5])
    assert data[0][0][0].shape == (3, 16, 32)
    class Numbers:
        def picture(self, i, rng):
            return i

        def __len__(self):
            return 10

    pairs = [egscit.Unpaired(Numbers(), Numbers(), args)[n] for n in range(60)]
    for epoch in range(6):  # every x_A once an epoch
        assert {a for a, _ in pairs[epoch * 10:epoch * 10 + 10]} == set(range(10))
    assert len({b for a, b in pairs if a == 3}) > 1  # with another exemplar


def test_photos_are_cut_to_shape_and_mirrored(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:30], wide[:, 30:40] = (255, 0, 0), (0, 0, 255)  # the middle: red, then blue
    Image.fromarray(wide).save(tmp_path / "a.png")
    args = SimpleNamespace(size=20, height=20, mirror=True, zoom=1.0)
    photos, seen = egscit.Photos([tmp_path / "a.png"], args), set()
    for seed in range(8):
        x = photos.picture(0, random.Random(seed))
        assert x.shape == (3, 20, 20)
        seen.add("red" if x[0, 10, 4] > 0.9 else "blue" if x[2, 10, 4] > 0.9 else "?")
    assert seen == {"red", "blue"}


# ---- the measure of Tab. 2 --------------------------------------------------------------------


def ssim(a, b):
    return metrics.ssim(egscit.unit(a), egscit.unit(b))


def naive_ssim(a, b):
    """scikit-image's defaults, as a loop: 7x7 windows, sample covariances, RGB mean."""
    a, b, found = a.astype(float), b.astype(float), []
    C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    for k in range(3):
        for y in range(a.shape[1] - 6):
            for x in range(a.shape[2] - 6):
                p, q = (v[k, y:y + 7, x:x + 7].flatten() for v in (a, b))
                (v_p, cov), (_, v_q) = np.cov(p, q)
                found.append((2 * p.mean() * q.mean() + C1) * (2 * cov + C2)
                             / ((p.mean() ** 2 + q.mean() ** 2 + C1) * (v_p + v_q + C2)))
    return np.mean(found)


def test_scores_of_known_answers(digits):
    test = egscit.test_set(egscit.get_args(["--data", str(digits), "--task", "mnist-single"]))
    x, exemplar, truth = test["x_A"], test["x_B"], test["x_AB"]
    scores = {s["name"]: s for s in egscit.digit_scores(truth, x, exemplar, truth)}
    to_truth, to_exemplar = scores["SSIM to the truth"], scores["SSIM to the exemplar (Tab. 2)"]
    assert to_truth["value"] == pytest.approx(1) and to_truth["sd"] == pytest.approx(0, abs=1e-9)
    wanted = [naive_ssim(a.numpy(), b.numpy()) for a, b in zip(truth[:3], exemplar[:3],
                                                              strict=True)]
    assert ssim(truth[:3], exemplar[:3]).tolist() == pytest.approx(wanted)
    # the paper's measure prefers a copy of the exemplar, another digit, to the perfect answer
    assert to_exemplar["trivial"]["copy the exemplar"] == pytest.approx(1)
    assert to_exemplar["value"] == to_exemplar["trivial"]["the truth"] < 0.8
    assert scores["ink accuracy"]["value"] == scores["paper accuracy"]["value"] == 1
    for name, ink, paper in (("the exemplar's paper", 0, 1), ("copy the input", 0, 0)):
        assert scores["ink accuracy"]["trivial"][name] == ink
        assert scores["paper accuracy"]["trivial"][name] == paper


def test_pixel_accuracy_by_hand():
    green, red = (torch.tensor(c, dtype=torch.uint8)[:, None, None] for c in ((0, 255, 0),
                                                                             (255, 0, 0)))
    truth = green.repeat(1, 4, 4)
    truth[:, 1, :3] = red[:, 0]  # three pixels of ink, thirteen of paper
    y = truth.clone()
    y[:, 1, 0] = green[:, 0, 0]                                   # lost
    y[:, 1, 1] = torch.tensor([200, 40, 10], dtype=torch.uint8)   # nearest to red: right
    y[:, 3, 3] = torch.tensor([0, 60, 220], dtype=torch.uint8)    # blue paper: wrong
    ink, paper = egscit.pixel_accuracy(y[None], truth[None])
    assert ink == pytest.approx(2 / 3) and paper == pytest.approx(12 / 13)
    assert (egscit.paper_colour(truth[None])[0] == green).all()


# ---- the script as its users run it -----------------------------------------------------------


def checkpoint(out):
    return torch.load(out / "last.pt", weights_only=True)


def test_run_folder(trained):
    for f in ("config.json", "log.csv", "index.html", "last.pt", "result.json",
              "samples/step_000000.png", "samples/step_000002.png", "features/last.pt",
              "features/log.csv"):
        assert (trained / f).stat().st_size > 0, f
    head = (trained / "log.csv").read_text().splitlines()[0].split(",")
    assert {"rec_AB", "KL_AB", "cyc_AB", "KL_cyc_AB", "GAN_AB", "c_AB", "s_AB", "D_A"} <= set(head)
    scores = json.loads((trained / "result.json").read_text())["scores"]
    assert [s["name"] for s in scores] == [f"x_{w}: {n} distance" for w in ("AB", "BA")
                                           for n in ("content", "style")]
    assert scores[0]["trivial"]["copy the input"] == 0 == scores[1]["trivial"]["copy the exemplar"]
    parts = checkpoint(trained)["parts"]
    stage_1 = checkpoint(trained / "features")["parts"]["V_A"]
    for name, weight in parts["F_A"].items():  # frozen since stage 1
        assert torch.equal(weight, stage_1[f"F.{name}"])


def same_weights(a, b):
    a, b = checkpoint(a), checkpoint(b)
    assert a["step"] == b["step"]
    assert_same(a["parts"], b["parts"])


@pytest.mark.parametrize("stage", ["pretrain_step", "train_step"])
def test_resumed_run_is_bit_identical(folder, tmp_path, small_vgg, stage, monkeypatch):
    flags = ["--data", folder, *TINY, "--pretrain", 3, "--steps", 3]
    run(*flags, "--out", tmp_path / "whole")
    if stage == "pretrain_step":
        original = egscit.train_step
        monkeypatch.setattr(egscit, "train_step", egscit.pretrain_step)
        monkeypatch.setattr(egscit, "pretrain_step", lambda *a: egscit.train_step(*a))
        interrupted(egscit, lambda: run(*flags, "--out", tmp_path / "cut"))
        monkeypatch.setattr(egscit, "pretrain_step", egscit.train_step)
        monkeypatch.setattr(egscit, "train_step", original)
        assert checkpoint(tmp_path / "cut" / "features")["step"] == 2
    else:
        interrupted(egscit, lambda: run(*flags, "--out", tmp_path / "cut"))
        assert checkpoint(tmp_path / "cut")["step"] == 2
    run(*flags, "--out", tmp_path / "cut", "--resume")
    same_weights(tmp_path / "whole", tmp_path / "cut")
    same_weights(tmp_path / "whole" / "features", tmp_path / "cut" / "features")


def test_stage_1_can_be_reused(folder, trained, tmp_path, small_vgg):
    run("--data", folder, *TINY, "--steps", 1, "--features", trained / "last.pt", "--out",
        tmp_path / "run")
    assert not (tmp_path / "run/features").exists()
    run("--data", folder, *TINY, "--steps", 1, "--features", trained / "features/last.pt", "--out",
        tmp_path / "again")                                  # the file that stage 1 itself wrote
    same_weights(tmp_path / "run", tmp_path / "again")
    for name in ("F_A", "F_B"):
        assert_same(checkpoint(tmp_path / "run")["parts"][name],
                    checkpoint(trained)["parts"][name])


def test_a_run_without_L_P_has_its_scores(folder, tmp_path, small_vgg):
    run("--data", folder, *TINY, "--steps", 1, "--ablation", "L_P", "--out", tmp_path / "run")
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    assert [s["name"] for s in scores] == [f"x_{way}: {kind} distance" for way in ("AB", "BA")
                                           for kind in ("content", "style")]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(folder, tmp_path):
    """Weights after one step of each stage, without noise or normalisation over the batch."""
    code = ("import sys, torch, common, egscit\n"
            "egscit.VGG = lambda taps, weights, ceil_mode: egscit.DigitVGG(4)\n"
            "torch.randn_like = torch.zeros_like\n"
            "common.entry(egscit.main)\n")
    script = tmp_path / "script.py"
    script.write_text(code)
    flags = ["--data", str(folder), *TINY, "--pretrain", "1", "--steps", "1", "--no-d-norm"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                    "--master_port=29517", script, *flags, "--out", str(tmp_path / "two")],
                   check=True, env=environment, capture_output=True)
    subprocess.run([sys.executable, script, *flags, "--batch", "4", "--out",
                    str(tmp_path / "one")], check=True, env=environment, capture_output=True)
    one, two = (checkpoint(tmp_path / n)["parts"] for n in ("one", "two"))
    for net in ("E_A", "G_B", "D_A", "F_B"):
        for name, weight in one[net].items():
            assert torch.allclose(weight, two[net][name], atol=1e-4), (net, name)


@pytest.fixture(scope="module")
def digit_run(digits, tmp_path_factory):
    """The toy default, shrunk: own V, both stages, scores; in its own working folder."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(toy, "ensure", lambda name, size: digits)
        patch.setattr(egscit.train_digit_vgg, "__defaults__", (3, 8))
        run(*SIZES, "--pretrain", 2, "--steps", 2, "--out", home / "none")
    return home / "none"


def test_ablations_on_one_stage_1(digit_run, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "ensure", lambda name, size: digits)
    parts = checkpoint(digit_run)["parts"]
    for name in ("mask", "L_P"):
        run("--ablation", name, *SIZES, "--steps", 1, "--features", digit_run / "last.pt", "--out",
            tmp_path / name)
        found = checkpoint(tmp_path / name)["parts"]
        assert not (tmp_path / name / "features").exists()
        assert_same(found["F_A"], parts["F_A"])
        if name == "L_P":
            assert "V" not in found
        else:
            assert_same(found["V"], parts["V"])


def test_result_has_trivial_answers_and_deviations(digit_run):
    scores = json.loads((digit_run / "result.json").read_text())["scores"]
    assert len(scores) == 8 and scores[0]["name"] == "x_AB: SSIM to the truth"
    assert scores[0]["trivial"]["the truth"] == pytest.approx(1) and scores[0]["sd"] > 0
    assert all(s["better"] == "higher" for s in scores)


def test_evaluate_repeats_the_runs_scores(digit_run, digits, monkeypatch, capsys):
    monkeypatch.setattr(toy, "ensure", lambda name, size: digits)
    capsys.readouterr()
    run("--evaluate", "--weights", digit_run / "last.pt", "--device", "cpu")
    printed = capsys.readouterr().out
    for s in json.loads((digit_run / "result.json").read_text())["scores"]:
        spread = f" +- {s['sd']:.3g}" if "sd" in s else ""
        assert f"{s['name']}: {s['value']:.4g}{spread} (higher" in printed
    assert "+- " in printed


def test_mnist_without_lab_is_trained_and_not_scored(tmp_path, monkeypatch, capsys):
    def no_lab(module, needed_by):
        raise common.UserError(f"{needed_by} needs the folder lab/ of the repository")

    monkeypatch.setattr(egscit, "mnist", lambda args, split: drawn(40))
    monkeypatch.setattr(egscit.train_digit_vgg, "__defaults__", (2, 4))
    monkeypatch.setattr(common, "lab", no_lab)
    run("--data", "mnist-single", "--small", *SIZES, "--pretrain", 1, "--steps", 1, "--out",
        tmp_path / "run")
    assert "no scores: the score of digits needs the folder lab/" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/result.json").read_text())["scores"] == []
    assert checkpoint(tmp_path / "run")["step"] == 1


def test_boards_train_and_are_scored(tmp_path, monkeypatch):
    toy.draw("digits_multiple", tmp_path / "boards", n=3, size=112, n_test=2)
    monkeypatch.setattr(toy, "ensure", lambda name, size: tmp_path / "boards")
    monkeypatch.setattr(egscit.train_digit_vgg, "__defaults__", (2, 4))
    run("--data", "toy-multiple", *SIZES, "--pretrain", 1, "--steps", 1, "--out", tmp_path / "run")
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    for s in scores:  # two boards, every colour of which is in the palette
        if "truth" in s["name"] or "accuracy" in s["name"]:
            assert s["trivial"]["the truth"] == pytest.approx(1), s["name"]
    assert scores[2]["trivial"]["the exemplar's paper"] == 0


@pytest.mark.parametrize("way", ["AtoB", "BtoA"])
def test_translate_keeps_every_size(trained, tmp_path, way):
    sizes = odd_pictures(tmp_path / "in")
    run("--translate", tmp_path / "in", "--exemplar", tmp_path / "in/odd.png", "--direction", way,
        "--weights", trained / "last.pt", "--out", tmp_path / "out", "--device", "cpu")
    for stem, size in sizes.items():
        with Image.open(tmp_path / "out" / f"{stem}.png") as im:
            assert im.size == size and im.mode == "RGB"


def test_translate_is_the_deterministic_flow_of_its_direction(trained, folder, small_vgg):
    args = egscit.get_args(["--weights", str(trained / "last.pt"), "--device", "cpu"])
    m = egscit.load_translator(args, CPU)
    x, y = pictures(1, 3, 16, 32), pictures(1, 3, 16, 32, seed=1)
    args.adain = "paper"
    for way, E, F_x, F_y, G in (("AB", m.E_A, m.F_A, m.F_B, m.G_B),
                                ("BA", m.E_B, m.F_B, m.F_A, m.G_A)):
        with torch.no_grad():
            c = m.G_first(m.E_last(E(x)))
            wanted = G(naive_stylise(c, F_x(x), F_y(y), 0.5, "paper"))
        got = egscit.translate(m, x, y, args, way)
        assert torch.allclose(got, wanted, atol=1e-5)
        assert torch.equal(got, egscit.translate(m, x, y, args, way))
        assert not torch.equal(got, egscit.translate(m, x, -y, args, way))


@pytest.mark.slow
def test_digit_vgg_learns_to_name(monkeypatch, capsys):
    """30 steps on drawn digits: papers are named, most of the loss is gone."""
    args = egscit.get_args(["--data", "toy"])
    torch.manual_seed(0)
    V = egscit.DigitVGG()
    egscit.train_digit_vgg(V, args, CPU, steps=60, batch=32)
    masks, labels = drawn(60)
    palette = np.concatenate([egscit.GREYS, egscit.PRIMARIES])
    ink, paper = palette[labels % 5], palette[(labels + 1 + labels // 5) % 5]
    x = torch.from_numpy(np.moveaxis(egscit.paint_digits(masks, ink, paper), 3, 1).copy())
    named = (V.names(egscit.unit(x))[2] > 0).numpy()
    assert (named == (paper > 127)).all(1).mean() > 0.8  # by chance: 0.2
    assert all(not p.requires_grad for p in V.parameters())
    assert "no ImageNet weights" in capsys.readouterr().out


def test_user_errors_are_one_line(trained, folder, tmp_path, capsys, monkeypatch):
    def fails(*flags):
        return run_fails(capsys, "--device", "cpu", *flags)

    assert "multiple of 4" in fails("--data", folder, "--size", 30)
    assert "--eta 2" in fails("--data", folder, "--eta", 2)
    assert "--vgg digits" in fails("--data", folder, "--vgg", "digits")
    assert "--small: for toy" in fails("--data", folder, "--small")
    assert "found neither" in fails("--data", tmp_path, "--vgg", "random")
    assert "--exemplar" in fails("--translate", "x.png", "--weights", trained / "last.pt")
    assert "--weights FILE" in fails("--translate", "x.png", "--exemplar", "y.png")
    assert "--weights FILE" in fails("--evaluate")
    assert "no such file" in fails("--translate", tmp_path / "no.png", "--exemplar",
                                   tmp_path / "no.png", "--weights", trained / "last.pt")
    broken = tmp_path / "broken.pt"
    broken.write_bytes((trained / "last.pt").read_bytes()[:1000])
    assert "truncated" in fails("--evaluate", "--weights", broken)
    torch.save({"method": "cut"}, broken)
    assert "written by cut.py" in fails("--evaluate", "--weights", broken)
    message = fails("--data", folder, *TINY, "--ngf", "8", "--features", trained / "last.pt",
                    "--out", tmp_path / "x", "--steps", "1")
    assert "F_A does not fit" in message
    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    message = fails("--data", "mnist-single", "--small", "--mnist-root", tmp_path)
    assert str(tmp_path) in message and "(Error downloading x: no network)" in message
    assert "toy-multiple, mnist-single" in fails("--data", "mnist")
    for flag, value in (("--ngf", 0), ("--downs", -1), ("--blocks", -1), ("--pretrain", 0)):
        assert f"{flag} {value}: must be" in fails("--data", folder, flag, value)
    assert "digits are square" in fails("--height", 40)
    assert "digits are square" in fails("--data", "toy-multiple", "--size", 30, "--downs", 0)
    assert "--translate" in fails("--exemplar", "x.png")
    assert "--vgg digits" in fails("--features", trained / "last.pt", "--out", tmp_path / "y")
    assert "have 28x28 pixels" in fails("--data", "mnist-single", "--small", "--size", 32)


def refuse(*args, **kwargs):
    raise RuntimeError("Error downloading x:\nno network\n")  # as torchvision's: several lines


@pytest.mark.slow
def test_learns_the_toy_world(digits, tmp_path, monkeypatch):
    """100 steps: pictures are rebuilt, and papers take the exemplar's colour (by chance: 1/3)."""
    monkeypatch.setattr(toy, "ensure", lambda name, size: digits)
    monkeypatch.setattr(egscit.train_digit_vgg, "__defaults__", (200, 32))
    run("--ngf", 8, "--ndf", 8, "--blocks", 2, "--pretrain", 60, "--steps", 100, "--lr", 2e-3,
        "--device", "cpu", "--out", tmp_path / "run")
    scores = {s["name"]: s for s in json.loads(
        (tmp_path / "run/result.json").read_text())["scores"]}
    assert scores["x_AB: paper accuracy"]["value"] > 0.7
    assert scores["x_BA: paper accuracy"]["value"] > 0.7
    head, *_, last = (tmp_path / "run/log.csv").read_text().splitlines()
    row = dict(zip(head.split(","), last.split(","), strict=True))
    assert float(row["rec_AB"]) < 0.15 and float(row["rec_BA"]) < 0.15  # of 2; at first 0.6
