"""egscit.py: every equation against a plain transcription, and the script as its users run it."""

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
from helpers import assert_same, error_of, interrupted, noise_folder, odd_pictures
from PIL import Image

import common
import egscit
import toy

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
    """A small toy/digits_single and the datasets folder that `toy.ensure` would find."""
    out = tmp_path_factory.mktemp("toy") / "digits"
    toy.digits_single(out, n=60, size=28, n_test=12)
    return out


def run(*flags):
    return egscit.main([*map(str, flags)])


def run_fails(capsys, *flags):
    return error_of(capsys, egscit.main, *flags)


@pytest.fixture(scope="module")
def small_vgg():
    """A small V in place of VGG-19 at full width, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "VGG19_WIDTHS",
                      (4, "M", 4, "M", 8, "M", 8, "M", 8))
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
    assert differ == {"data", "small", "run_folder"}
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
    w = torch.cat([p.flatten() for p in m.E_A.parameters() if p.dim() > 1])
    assert w.abs().max() <= 0.04 and float(w.std()) == pytest.approx(0.02 * 0.8796, rel=0.02)
    assert all((p == 0).all() for p in m.E_A.parameters() if p.dim() == 1)
    first = m.D_A.stages[0][0].weight  # Glorot: variance 2 / (fan in + fan out)
    assert float(first.std()) == pytest.approx((2 / (16 * (3 + 64))) ** 0.5, rel=0.1)


def test_digit_vgg_has_vggs_taps_and_map_sizes():
    found = egscit.DigitVGG()(torch.zeros(1, 3, 28, 28))
    sizes = [f.shape[2] for f in common.VGG19(list(found), "random", ceil_mode=True)(
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
    monkeypatch.setattr(common, "lsgan", lambda logits, real: calls.append(("gan", logits)) or 1.0)
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
                                 lambda *nets: None, lambda: torch.autocast("cpu", enabled=False))
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
    losses = egscit.update_discriminators(m, x_A, x_B, fake_A, fake_B, args, lambda *nets: None,
                                          lambda: torch.autocast("cpu", enabled=False))
    wanted = 0.5 * ((m.D_A(x_A) - 1).square().mean() + m.D_A(fake_A).square().mean())
    assert float(losses["D_A"]) == pytest.approx(float(wanted))
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
    assert all(torch.isfinite(v) for v in losses.values())
