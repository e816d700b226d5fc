"""egscit.py: every equation against a plain transcription, and the script as its users run it."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, error_of, interrupted, noise_folder, odd_pictures
from PIL import Image
from transcriptions import close, instance_norm, parameters, reflect

import common
import egscit
from lab import toy, variants
from lab.toy import digits as toy_digits

ROOT = Path(__file__).parent.parent
SHARED = ["--ngf", "4", "--ndf", "4", "--blocks", "1", "--batch", "2", "--workers", "0", "--device",
          "cpu", "--log-every", "1"]
TINY = [*SHARED, "--size", "32", "--height", "16", "--downs", "1", "--pretrain", "2", "--g-updates",
        "2", "--vgg", "random", "--lr", "1e-3"]
CPU = torch.device("cpu")
TRANSLATOR = ("E_A", "E_B", "E_last", "G_first", "G_A", "G_B")


def tiny_args(*flags):
    return egscit.get_args(["--data", ".", *TINY, *flags])


def run(*flags):
    return egscit.main([*map(str, flags)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return noise_folder(tmp_path_factory.mktemp("noise") / "data")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small digits_single, the folder that `toy.ensure` would find."""
    out = tmp_path_factory.mktemp("toy") / "digits"
    toy.draw("digits_single", out, n=60, size=28, n_test=12)
    return out


@pytest.fixture(scope="module")
def small_vgg():
    """A small network in place of VGG-19 at full width, which would take most of the time, and in
    place of a taught one."""
    with pytest.MonkeyPatch.context() as patch:
        def random_one(*_, **__):
            with torch.random.fork_rng([]):
                torch.manual_seed(5)
                return toy_digits.DigitVGG(4).requires_grad_(False)
        patch.setattr(egscit, "VGG", random_one)
        patch.setattr(toy, "digit_vgg", random_one)
        yield


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory, small_vgg):
    out = tmp_path_factory.mktemp("trained") / "run"
    run("--data", folder, *TINY, "--steps", 2, "--out", out)
    return out


@pytest.fixture(scope="module")
def digit_run(digits, tmp_path_factory, small_vgg):
    """The toy default, shrunk."""
    out = tmp_path_factory.mktemp("digits") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "ensure", lambda name, size: digits)
        run(*SHARED, "--pretrain", 2, "--steps", 2, "--out", out)
    return out


def noise(*shape, seed=0, dtype=torch.double):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def rows_of(out):
    """log.csv as {column: [values]}."""
    head, *rows = (out / "log.csv").read_text().splitlines()
    return dict(zip(head.split(","), zip(*(map(float, r.split(",")) for r in rows), strict=True),
                    strict=True))


# ---- configuration and networks ---------------------------------------------------------------


def test_defaults_are_the_authors():
    args = egscit.get_args(["--data", "."])  # street views
    assert (args.size, args.height, args.batch, args.lr, args.downs) == (512, 256, 3, 1e-4, 2)
    assert (args.lambda_c, args.lambda_s, args.vgg, args.d_norm) == (100, 1e4, "imagenet", True)
    assert (args.lambda_GAN, args.lambda_KL, args.lambda_rec, args.lambda_cyc) == (10, .1, 100, 100)
    assert (args.eta, args.g_updates, args.ngf, args.ndf, args.blocks) == (0.5, 5, 64, 64, 3)
    assert (args.steps, args.pretrain, args.init) == (None, None, "released")
    group, = egscit.build(tiny_args(), CPU, with_vgg=False).opt_D.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.5, 0.999), 0)


@pytest.mark.parametrize("flags, expected", [
    (["--data", "mnist-single"], (28, 28, 0, 8, 1e-5, 10, 1e3)),
    (["--data", "mnist-multiple"], (112, 112, 2, 8, 1e-5, 100, 1e4)),
    (["--data", ".", "--task", "cityscapes"], (512, 256, 2, 3, 1e-4, 500, 1e3)),
    (["--data", ".", "--task", "faces"], (128, 128, 2, 8, 1e-4, 10, 5e3))])
def test_tasks(flags, expected):
    args = egscit.get_args(flags)
    assert (args.size, args.height, args.downs, args.batch, args.lr, args.lambda_c,
            args.lambda_s) == expected


def test_the_small_preset_is_that_of_toy_and_mnist_and_keeps_the_terms():
    toy_args, mnist = (egscit.get_args(["--data", d, *f]) for d, f in (
        ("toy", []), ("mnist-single", ["--small"])))
    differ = {k for k, v in vars(toy_args).items() if v != getattr(mnist, k)}
    assert differ == {"data", "run_folder"}
    assert toy_args.vgg == "digits" and toy_args.ngf < 64
    paper = egscit.get_args(["--data", "mnist-single"])
    for name in ("eta", "lambda_rec", "lambda_cyc", "downs", "blocks"):
        assert getattr(toy_args, name) == getattr(paper, name)
    assert toy_args.lambda_s / toy_args.lambda_c == paper.lambda_s / paper.lambda_c
    boards = egscit.get_args(["--data", "toy-multiple"])
    assert boards.size == 112 and (toy_args.lambda_KL, boards.lambda_KL) == (10, paper.lambda_KL)


def count(*nets):
    return sum(p.numel() for net in nets for p in net.parameters())


@pytest.mark.parametrize("downs, E, G, block, total, stage_1", [
    (0, 231_040, 221_763, 73_856, 1_053_318, 600_515),
    (2, 3_918_976, 3_909_507, 1_180_160, 18_017_286, 10_188_803)])
def test_parameter_counts_at_the_authors_widths(downs, E, G, block, total, stage_1):
    nets = egscit.build(egscit.get_args(["--data", ".", "--downs", str(downs)]), CPU, False)
    assert count(nets.E_A) == count(nets.E_B) == count(nets.F_A) == count(nets.F_B) == E
    assert count(nets.G_A) == G and count(nets.E_last) == count(nets.G_first) == block
    assert count(*(getattr(nets, name) for name in TRANSLATOR)) == total
    held = [p for group in nets.opt_G.param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == total and len({id(p) for p in held}) == len(held)
    assert count(egscit.VAE(64, downs)) == stage_1
    assert count(nets.D_A) == count(nets.D_B) == 2_758_849
    assert not any(p.requires_grad for F_ in (nets.F_A, nets.F_B) for p in F_.parameters())


@pytest.mark.parametrize("size, logits", [((28, 28), (2, 2)), ((112, 112), (7, 7)),
                                          ((128, 128), (8, 8)), ((256, 512), (16, 32))])
def test_discriminator_maps(size, logits):
    assert egscit.Discriminator(4)(torch.zeros(1, 3, *size)).shape == (1, 1, *logits)


def test_released_initialisation():
    nets = egscit.build(egscit.get_args(["--data", ".", "--ngf", "32"]), CPU, False)
    for net in (nets.E_A, nets.F_B, nets.G_A):
        w = torch.cat([p.detach().flatten() for p in net.parameters() if p.dim() > 1])
        assert w.abs().max() <= 0.04 and float(w.std()) == pytest.approx(0.02 * 0.8796, rel=0.02)
        assert all((p == 0).all() for p in net.parameters() if p.dim() == 1)
    first = nets.D_A.stages[0][0].weight.detach()  # Glorot: variance 2 / (fan in + fan out)
    assert float(first.std()) == pytest.approx((2 / (16 * (3 + 64))) ** 0.5, rel=0.1)


# Transcriptions of the layer tables: p is an iterator over a network's parameters.


def naive_block(p, x):
    h = F.conv2d(reflect(x, 1), next(p), next(p)).relu()
    return x + F.conv2d(reflect(h, 1), next(p), next(p))


def naive_encoder(p, x, downs, blocks):
    x = F.leaky_relu(F.conv2d(reflect(x, 3), next(p), next(p)), 0.2)
    for _ in range(downs):
        x = F.leaky_relu(F.conv2d(reflect(x, 1), next(p), next(p), stride=2), 0.2)
    for _ in range(blocks):
        x = naive_block(p, x)
    return x


def naive_generator(p, c, downs, blocks):
    for _ in range(blocks):
        c = naive_block(p, c)
    for _ in range(downs):
        c = F.leaky_relu(F.conv_transpose2d(c, next(p), next(p), 2, 1, 1), 0.2)
    return F.conv2d(c, next(p), next(p)).tanh()


def naive_discriminator(p, x, layers, norm):
    for layer in range(layers):
        h, w = x.shape[2:]
        x = F.conv2d(F.pad(x, (1, 1 + w % 2, 1, 1 + h % 2)), next(p), next(p), stride=2)
        if norm and layer > 0:
            x = instance_norm(x) * next(p)[:, None, None] + next(p)[:, None, None]
        x = F.leaky_relu(x, 0.2)
    return F.conv2d(x, next(p), next(p))


def naive_vgg(p, x):
    maps = []
    for layer in range(5):
        x = F.conv2d(x, next(p), next(p), padding=1).relu()
        maps.append(x)
        x = F.max_pool2d(x, 2, ceil_mode=True) if layer in (0, 1) else x
    return maps


def lively(nets):
    """Float64, weights that saturate nothing, and rates of 0: a step leaves its gradients."""
    rng = torch.Generator().manual_seed(0)  # goes on: A's networks and B's must not be alike
    for net in (n for n in vars(nets).values() if isinstance(n, torch.nn.Module)):
        for p in net.double().parameters():
            p.data = torch.randn(p.shape, generator=rng, dtype=torch.double) * 0.2 + 0.1 * (
                p.dim() == 1)
    for optimiser in (nets.opt_G, nets.opt_D):
        optimiser.param_groups[0]["lr"] = 0.0
    return nets


@pytest.mark.parametrize("downs, blocks, layers, norm", [(0, 3, 3, False), (2, 2, 4, True)])
def test_networks_are_their_layer_tables(downs, blocks, layers, norm):
    args = tiny_args("--downs", str(downs), "--blocks", str(blocks), "--d-layers", str(layers),
                     *["--no-d-norm"] * (not norm))
    nets, x = lively(egscit.build(args, CPU, False)), noise(2, 3, 28, 20)
    c = nets.E_B(x)
    assert c.shape == (2, 4 * 2**downs, 28 >> downs, 20 >> downs)
    close([c], [naive_encoder(iter(parameters(nets.E_B)), x, downs, blocks)])
    close([nets.G_A(c)], [naive_generator(iter(parameters(nets.G_A)), c, downs, blocks)])
    close([nets.D_B(x)], [naive_discriminator(iter(parameters(nets.D_B)), x, layers, norm)])
    close([nets.E_last(c)], [naive_block(iter(parameters(nets.E_last)), c)])


# ---- masks, AdaIN, losses ---------------------------------------------------------------------


def test_mask_is_between_eta_and_one():
    f = noise(2, 3, 4, 5) * 20
    m, i = egscit.mask(f, 0.3), (1, 2, 3, 4)
    assert float(m[i]) == pytest.approx(0.7 / (1 + math.exp(-float(f[i]))) + 0.3)
    assert 0.3 <= m.min() < 0.31 and 0.99 < m.max() <= 1
    assert (egscit.mask(f, 1) == 1).all()


def naive_adain(c, f, released=False):
    """Eq. (1) and (2), channel by channel; released: as the code mixes them up."""
    out = torch.empty_like(c)
    for b in range(c.shape[0]):
        for k in range(c.shape[1]):
            mean_c, mean_f = c[b, k].mean(), f[b, k].mean()
            var_c = (c[b, k] - mean_c).square().mean() + 1e-5
            var_f = (f[b, k] - mean_f).square().mean() + 1e-5
            out[b, k] = (mean_f * (c[b, k] - mean_c) / var_c + var_f if released else
                         var_f.sqrt() * (c[b, k] - mean_c) / var_c.sqrt() + mean_f)
    return out


def test_adain_is_eq_1_and_2_and_its_rows_are_tab_2s():
    c, f = 3 * noise(2, 3, 5, 4) + 1, 4 * noise(2, 3, 7, 6, seed=1) - 2
    close([egscit.adain(c, egscit.delta(f), egscit.mu(f))], [naive_adain(c, f)])
    for row, expected in (("released_adain", naive_adain(c, f, released=True)), ("no_adain", c),
                          ("unit", c)):
        module = types.ModuleType("row")
        texts, _ = variants.sources("egscit", row)
        exec(compile(texts["egscit.py"], row, "exec"), module.__dict__)
        close([module.adain(c, module.delta(f), module.mu(f))], [expected])


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


def naive_L_P(x_AB, x_A, x_B):
    """(L_c, L_s) of Eq. (5) from five raw maps each, number by number where that is quick."""
    L_c, L_s = 0, 0
    for i, maps in enumerate(zip(x_AB, x_A, x_B, strict=True), start=1):
        a, b, c = (f.flatten(2) / f.flatten(2).square().sum(2, keepdim=True).sqrt().clamp_min(1e-6)
                   for f in maps)
        L_c = L_c + i / 5 * (a - b).abs().mean()
        grams = [torch.stack([torch.stack([(row * other).sum() / len(row) for row in one
                                           for other in one]) for one in f]) for f in (a, c)]
        L_s = L_s + (grams[0] - grams[1]).abs().mean()
    return L_c, L_s


def test_content_and_style_losses_are_eq_5():
    a, b, c = ([noise(2, n + 1, n + 2, 3, seed=s + n) for n in range(5)] for s in (0, 10, 20))
    phi_a, phi_b, phi_c = (egscit.phi(lambda x: dict(enumerate(x)), maps) for maps in (a, b, c))
    L_c, L_s = naive_L_P(a, b, c)
    assert float(egscit.content_loss(phi_a, phi_b)) == pytest.approx(float(L_c))
    assert float(egscit.style_loss(phi_a, phi_c)) == pytest.approx(float(L_s))
    assert egscit.content_loss(phi_a, phi_a) == 0 and egscit.style_loss(phi_b, phi_b) == 0
    diagonal = egscit.gram(phi_a[3]).diagonal(dim1=1, dim2=2)               # 5 x 3 places
    assert torch.allclose(diagonal, torch.full((2, 4), 1 / 15, dtype=torch.double))


# ---- one step of each stage -------------------------------------------------------------------


def naive_nets(nets, args):
    """({name: parameters}, {name: function}) of all networks, by the transcriptions above."""
    p = {k: parameters(n) for k, n in vars(nets).items() if isinstance(n, torch.nn.Module)}
    shape = args.downs, args.blocks
    kinds = {"E": lambda p, x: naive_encoder(p, x, *shape),
             "F": lambda p, x: naive_encoder(p, x, *shape),
             "G": lambda p, x: naive_generator(p, x, *shape),
             "D": lambda p, x: naive_discriminator(p, x, args.d_layers, args.d_norm),
             "v": naive_vgg}
    kinds = {k: naive_block if k in ("E_last", "G_first") else kinds.get(k[0]) for k in p}
    return p, SimpleNamespace(**{
        k: lambda x, k=k: kinds[k](iter(p[k]), x) for k in p if kinds[k]})


def naive_losses(n, x_A, x_B, args, seed):
    """All terms of Eq. (3) by name, as the paper words them, and the losses of D_A and D_B."""
    def noisy(z):
        return z + torch.randn(z.shape, dtype=torch.double)

    def style(f_content, c, f_style):
        masked = ((1 - args.eta) * torch.sigmoid(f_content) + args.eta) * c
        return naive_adain(masked, f_style)

    torch.manual_seed(seed)
    f_A, f_B = n.F_A(x_A), n.F_B(x_B)
    z_A, z_B = n.E_last(n.E_A(x_A)), n.E_last(n.E_B(x_B))
    c_A, c_B = n.G_first(noisy(z_A)), n.G_first(noisy(z_B))
    x_AB, x_BA = n.G_B(style(f_A, c_A, f_B)), n.G_A(style(f_B, c_B, f_A))
    z_AB, z_BA = n.E_last(n.E_B(x_AB)), n.E_last(n.E_A(x_BA))
    x_ABA = n.G_A(style(f_A, n.G_first(noisy(z_AB)), f_A))
    x_BAB = n.G_B(style(f_B, n.G_first(noisy(z_BA)), f_B))
    maps = {k: n.vgg(x) for k, x in (("A", x_A), ("B", x_B), ("AB", x_AB), ("BA", x_BA))}
    L_c_A, L_s_A = naive_L_P(maps["AB"], maps["A"], maps["B"])
    L_c_B, L_s_B = naive_L_P(maps["BA"], maps["B"], maps["A"])
    return {"rec_A": (n.G_A(style(f_A, c_A, f_A)) - x_A).abs().mean(),
            "rec_B": (n.G_B(style(f_B, c_B, f_B)) - x_B).abs().mean(),
            "KL_A": (z_A**2).mean(), "KL_B": (z_B**2).mean(),
            "KL_AB": (z_AB**2).mean(), "KL_BA": (z_BA**2).mean(),
            "cyc_A": (x_ABA - x_A).abs().mean(), "cyc_B": (x_BAB - x_B).abs().mean(),
            "GAN_A": ((n.D_A(x_BA) - 1)**2).mean(), "GAN_B": ((n.D_B(x_AB) - 1)**2).mean(),
            "L_c_A": L_c_A, "L_s_A": L_s_A, "L_c_B": L_c_B, "L_s_B": L_s_B,
            "L_D_A": ((n.D_A(x_A) - 1)**2).mean() / 2 + (n.D_A(x_BA.detach())**2).mean() / 2,
            "L_D_B": ((n.D_B(x_B) - 1)**2).mean() / 2 + (n.D_B(x_AB.detach())**2).mean() / 2}


WEIGHTS = ["--lambda-GAN", "2", "--lambda-KL", "0.7", "--lambda-rec", "3", "--lambda-cyc", "5",
           "--lambda-c", "11", "--lambda-s", "130", "--no-channels-last"]


@pytest.mark.parametrize("flags, update_D", [
    ([], True), (["--eta", "0.2", "--no-d-norm"], False), (["--eta", "1", "--downs", "0"], True),
    (["--lambda-c", "0", "--lambda-s", "0"], True)])
def test_step_is_the_objective(flags, update_D, small_vgg):
    """Eq. (1) to (5): losses and all gradients in float64, with noise, every weight another."""
    args = tiny_args(*WEIGHTS, *flags)
    nets = lively(egscit.build(args, CPU))
    x_A, x_B = noise(2, 3, 16, 20, seed=1), noise(2, 3, 16, 20, seed=2)
    p, functions = naive_nets(nets, args)
    terms = naive_losses(functions, x_A, x_B, args, 3)
    L = (3 * (terms["rec_A"] + terms["rec_B"]) + 5 * (terms["cyc_A"] + terms["cyc_B"])
         + 0.7 * (terms["KL_A"] + terms["KL_B"] + terms["KL_AB"] + terms["KL_BA"])
         + 2 * (terms["GAN_A"] + terms["GAN_B"])
         + args.lambda_c * (terms["L_c_A"] + terms["L_c_B"])
         + args.lambda_s * (terms["L_s_A"] + terms["L_s_B"]))
    expected = torch.autograd.grad(L, [q for name in TRANSLATOR for q in p[name]],
                                   retain_graph=True)
    torch.manual_seed(3)
    losses = egscit.train_step(nets, x_A, x_B, args, update_D)
    left_out = {"L_D_A", "L_D_B"} if not update_D else set()
    assert set(losses) == set(terms) - left_out
    for name in losses:
        assert losses[name].item() == pytest.approx(terms[name].item(), rel=1e-9), name
    close([q.grad for name in TRANSLATOR for q in getattr(nets, name).parameters()], expected,
          1e-6, 1e-9)
    for name in ("D_A", "D_B"):  # D's update, if any, is the plain one; G's leaves no gradient
        found = [q.grad for q in getattr(nets, name).parameters()]
        if update_D:
            close(found, torch.autograd.grad(2 * terms[f"L_{name}"], p[name]), 1e-6, 1e-9)
        else:
            assert found == [None] * len(found)
    for name in ("F_A", "F_B", "vgg"):
        assert all(q.grad is None for q in getattr(nets, name).parameters())


@pytest.mark.parametrize("downs", ["0", "1"])
def test_stage_1_is_two_vae_gans(downs):
    args = tiny_args(*WEIGHTS, "--downs", downs)
    vaes = lively(egscit.build_vaes(args, CPU))
    x = {"A": noise(2, 3, 16, 20, seed=1), "B": noise(2, 3, 16, 20, seed=2)}
    p, L, expected = {}, 0, {}
    torch.manual_seed(3)
    for d in "AB":
        p[d] = parameters(getattr(vaes, f"VAE_{d}"))
        p[f"D_{d}"] = parameters(getattr(vaes, f"D_{d}"))
        q = iter(p[d])
        z = naive_encoder(q, x[d], args.downs, 1)
        z = naive_block(q, z)
        c = naive_block(q, z + torch.randn(z.shape, dtype=torch.double))
        x_hat = naive_generator(q, c, args.downs, 1)
        assert next(q, None) is None

        def D(picture, d=d):
            return naive_discriminator(iter(p[f"D_{d}"]), picture, args.d_layers, True)
        expected |= {f"rec_{d}": (x_hat - x[d]).abs().mean(), f"KL_{d}": (z**2).mean(),
                     f"GAN_{d}": ((D(x_hat) - 1)**2).mean(),
                     f"L_D_{d}": ((D(x[d]) - 1)**2 + D(x_hat.detach())**2).mean() / 2}
        L = L + 3 * expected[f"rec_{d}"] + 0.7 * expected[f"KL_{d}"] + 2 * expected[f"GAN_{d}"]
    torch.manual_seed(3)
    losses = egscit.pretrain_step(vaes, x["A"], x["B"], args)
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-9), name
    grads = torch.autograd.grad(L, p["A"] + p["B"], retain_graph=True)
    close([q.grad for V in (vaes.VAE_A, vaes.VAE_B) for q in V.parameters()], grads, 1e-6, 1e-9)
    for d in "AB":
        close([q.grad for q in getattr(vaes, f"D_{d}").parameters()],
              torch.autograd.grad(2 * expected[f"L_D_{d}"], p[f"D_{d}"]), 1e-6, 1e-9)


@pytest.mark.parametrize("flags", [[], ["--amp"]])
def test_every_weight_learns_but_the_frozen_and_losses_are_float32(flags, small_vgg, monkeypatch):
    args, grams = tiny_args(*flags, "--init", "xavier"), []
    nets, gram = egscit.build(args, CPU), egscit.gram
    monkeypatch.setattr(egscit, "gram", lambda f: grams.append(
        (f.dtype, torch.is_autocast_enabled("cpu"))) or gram(f))
    before = {k: parameters(n) for k, n in vars(nets).items() if isinstance(n, torch.nn.Module)}
    x_A, x_B = noise(2, 3, 16, 32, dtype=torch.float), noise(2, 3, 16, 32, dtype=torch.float)
    for _ in range(2):
        losses = egscit.train_step(nets, x_A, x_B, args)
        assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())
    assert set(grams) == {(torch.float32, False)}
    for name, old in before.items():
        moved = [not torch.equal(a, b) for a, b in zip(old, getattr(nets, name).parameters(),
                                                       strict=True)]
        assert not any(moved) if name in ("F_A", "F_B", "vgg") else all(moved), name


def test_g_is_judged_by_the_d_that_has_just_learnt(small_vgg):
    args = tiny_args("--init", "xavier")
    nets = egscit.build(args, CPU)
    nets.opt_D.param_groups[0]["lr"] = 0.05
    x_A, x_B = noise(2, 3, 16, 32, dtype=torch.float), noise(2, 3, 16, 32, dtype=torch.float)
    losses = []
    for update_D in (False, True):  # the translator of both steps is the same
        torch.manual_seed(0)
        nets.opt_G.step = lambda: None
        losses.append(egscit.train_step(nets, x_A, x_B, args, update_D)["GAN_B"].item())
    torch.manual_seed(0)
    after = egscit.train_step(nets, x_A, x_B, args, False)["GAN_B"].item()
    assert losses[1] == pytest.approx(after, rel=1e-3) and abs(after - losses[0]) > 1e-3


@pytest.mark.slow
def test_compile_does_not_compile_anew_at_every_step(small_vgg):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    args = tiny_args("--compile")
    nets, graphs = egscit.build(args, CPU), []
    x_A, x_B = noise(2, 3, 16, 32, dtype=torch.float), noise(2, 3, 16, 32, dtype=torch.float)
    for _ in range(4):
        egscit.train_step(nets, x_A, x_B, args)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2] == graphs[3]


# ---- data -------------------------------------------------------------------------------------


def drawn(n=400):
    return toy.drawn_digits(n, 28, np.random.default_rng(0))


def colours_of(picture):
    """Distinct colours of (H, W, 3), the most frequent first."""
    values, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    return [tuple(v) for v in values[np.argsort(-counts)]]


def as_bytes(x):
    """(3, H, W) in [-1, 1] -> (H, W, 3) bytes."""
    return ((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def test_single_digits_domain_a():
    ink, paper = egscit.digit_colours(drawn()[1], "A", "train", np.random.default_rng(0))
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


def test_mnist_is_painted_by_the_rules(monkeypatch):
    masks, labels = drawn()
    monkeypatch.setattr(egscit, "mnist", lambda args, split: (masks, labels))
    data = egscit.Unpaired(egscit.get_args(["--data", "mnist-single"]))
    assert len(data.A) == len(data.B) == 400
    seen = {d: {m.tobytes(): n for m, n in zip(masks, labels, strict=True)} for d in "AB"}
    orders = {"A": [], "B": []}
    for i in range(40):
        for d, domain in (("A", data.A), ("B", data.B)):
            picture = as_bytes(domain.picture(i, None))
            ink = (picture != np.array(colours_of(picture)[0])).any(2)
            orders[d].append(ink.tobytes())
            label = seen[d][ink.tobytes()]                          # one of the masks, as it is
            if d == "A":
                assert set(colours_of(picture)) == {(0, 0, 0), (255, 255, 255)}
            elif label >= 5:
                assert colours_of(picture) == [(0, 255, 0), (255, 0, 0)]
    assert orders["A"] != orders["B"]
    boards = egscit.Unpaired(egscit.get_args(["--data", "mnist-multiple"]))
    one, again, other = (boards.B.picture(i, None) for i in (7, 7, 8))
    assert one.shape == (3, 112, 112) and torch.equal(one, again) and not torch.equal(one, other)


def test_toy_digits_and_their_answers(digits):
    args = egscit.get_args(["--data", str(digits), "--task", "mnist-single"])
    test = egscit.test_set(args, 200)
    assert len(common.list_pictures(digits / "trainA")) == 60 and len(test["x_A"]) == 12
    for pictures in zip(*(test[f"x_{d}"] for d in ("A", "B", "AB", "BA")), strict=True):
        x, y, xy, yx = map(as_bytes, pictures)
        for shape, style, answer in ((x, y, xy), (y, x, yx)):
            assert len(colours_of(answer)) == 2
            assert set(colours_of(answer)) == set(colours_of(style))
            ink = (shape != np.array(colours_of(shape)[0])).any(2)
            assert ((answer != np.array(colours_of(answer)[0])).any(2) == ink).all()


def test_test_pairs_of_the_chosen_split(digits, folder):
    val = egscit.test_set(egscit.get_args(["--data", str(digits), "--task", "mnist-single",
                                           "--split", "val"]), 6)
    assert val.keys() == {"x_A", "x_B", "x_AB", "x_BA"} and len(val["x_A"]) == 6
    for name in ("A", "AB"):  # 12 pictures: every other
        wanted = np.asarray(Image.open(digits / f"val{name}/0010.png"))
        assert np.array_equal(as_bytes(val[f"x_{name}"][5]), wanted)
    with pytest.raises(common.UserError, match="valA"):
        egscit.test_set(egscit.get_args(["--data", str(folder), *TINY, "--split", "val"]), 6)


def test_samples_depend_on_seed_and_number_alone_and_exemplars_vary(folder):
    args = egscit.get_args(["--data", str(folder), *TINY])
    data = [egscit.Unpaired(args) for _ in "12"]
    assert_same(data[0][5], data[1][5])
    assert data[0][0][0].shape == (3, 16, 32)
    for d in data[0].A, data[0].B:
        d.picture = lambda i, rng: i
    pairs = [data[0][n] for n in range(60)]
    for epoch in range(15):  # every x_A once an epoch
        assert {a for a, _ in pairs[epoch * 4:epoch * 4 + 4]} == set(range(4))
    assert {b for a, b in pairs if a == 3} == set(range(4))  # with every exemplar


def test_pictures_are_fitted_bicubically(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    im = egscit.fitted(tmp_path / "noise.png", SimpleNamespace(size=16, height=16))
    wanted = Image.fromarray(noise).resize((16, 16), Image.BICUBIC)
    assert np.abs(np.asarray(im).astype(int) - np.asarray(wanted)).max() <= 1


def test_photos_are_cut_to_shape_mirrored_and_zoomed_and_digits_are_not(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:30], wide[:, 30:40] = (255, 0, 0), (0, 0, 255)  # the middle: red, then blue
    Image.fromarray(wide).save(tmp_path / "a.png")
    for data, expected in ((".", {("red", True), ("red", False), ("blue", True), ("blue", False)}),
                           ("toy", {("red", True)})):
        photos = egscit.Photos([tmp_path / "a.png"], SimpleNamespace(size=20, height=20, data=data))
        seen = set()
        for seed in range(20):
            x = photos.picture(0, random.Random(seed))
            assert x.shape == (3, 20, 20)
            half = 255 * (x[0, 10] + 1) / 2 if x[0, 10, 2] > 0.9 else 255 * (x[2, 10] + 1) / 2
            seen.add(("red" if x[0, 10, 2] > 0.9 else "blue",
                      bool(half[9] > 254 and half[10] < 1)))  # the seam is in the middle, sharp
        assert seen == expected


# ---- scores -----------------------------------------------------------------------------------


def test_perceptual_scores_are_eq_5_picture_by_picture():
    args = tiny_args("--lambda-c", "7", "--lambda-s", "30")
    vgg, (y, x, exemplar) = toy_digits.DigitVGG(2).double(), (noise(3, 3, 16, 16, seed=s)
                                                              for s in range(3))
    scores = toy.perceptual_scores(vgg, {
        "": y, "copy the input": x, "copy the exemplar": exemplar}, args)
    p = parameters(vgg)
    L = [naive_L_P(*(naive_vgg(iter(p), v[i:i + 1]) for v in (y, x, exemplar))) for i in range(3)]
    L_c, L_s = (float(sum(one).detach()) / 3 for one in zip(*L, strict=True))
    assert [s["name"] for s in scores] == ["L_c", "L_s", "L_P"]
    assert [s["value"] for s in scores] == pytest.approx([L_c, L_s, 7 * L_c + 30 * L_s], rel=1e-5)
    assert scores[0]["trivial"]["copy the input"] == 0 == scores[1]["trivial"]["copy the exemplar"]


# ---- the script as its users run it -----------------------------------------------------------


def checkpoint(out):
    return torch.load(out / "last.pt", weights_only=True)


def test_what_train_applies(folder, tmp_path, monkeypatch, small_vgg):
    """Rates of both stages and both optimisers, how often D learns, and how long it all takes."""
    seen = {"pretrain_step": [], "train_step": []}

    def recorder(name):
        def step(nets, x_A, x_B, args, *update_D):
            rates = [o.param_groups[0]["lr"] for o in (nets.opt_G, nets.opt_D)]
            seen[name].append((*rates, *update_D))
            assert x_A.shape == x_B.shape == (1, 3, 16, 32)
            return {"rec_A": torch.tensor(1.0)}
        return step

    for name in seen:
        monkeypatch.setattr(egscit, name, recorder(name))
    flags = [*TINY[:TINY.index("--pretrain")], "--vgg", "random", "--batch", "1", "--lr", "0.01"]
    run("--data", folder, *flags, "--out", tmp_path / "run")
    assert len(seen["pretrain_step"]) == 4 and len(seen["train_step"]) == 20 == 5 * 4  # 4 pairs
    for name, total in (("pretrain_step", 4), ("train_step", 20)):
        expected = [0.01 * (1 - t / total) ** 0.9 for t in range(total)]
        assert [rates[0] for rates in seen[name]] == pytest.approx(expected)
        assert [rates[1] for rates in seen[name]] == pytest.approx(expected)
    assert [s[2] for s in seen["train_step"]] == [t % 5 == 0 for t in range(20)]


@pytest.mark.parametrize("flags, size", [
    ([], (512, 256)), (["--size", "128"], (128, 64)), (["--height", "512"], (512, 512)),
    (["--task", "faces"], (128, 128)), (["--task", "cityscapes", "--size", "256"], (256, 128))])
def test_streets_are_half_as_high_as_wide(flags, size):
    args = egscit.get_args(["--data", "streets", *flags])
    assert (args.size, args.height) == size and common.TRAINED == min(size)


def test_mnist_has_no_val_and_a_name_like_it_is_a_folder(folder, tmp_path):
    with pytest.raises(common.UserError, match="--split val: mnist-single has train and test"):
        egscit.get_args(["--data", "mnist-single", "--split", "val"])
    shutil.copytree(folder, tmp_path / "mnist-photos")
    assert egscit.data_folder(tiny_args("--data", str(tmp_path / "mnist-photos"))).is_dir()


def test_a_map_of_one_place_cannot_be_padded():
    with pytest.raises(common.UserError, match="--size 16 --height 16: must be at least 32 and"):
        tiny_args("--size", "16", "--height", "16", "--downs", "4", "--no-d-norm")
    args = tiny_args("--size", "32", "--height", "32", "--downs", "4")
    E_A = egscit.build(args, CPU, False).E_A
    assert E_A(noise(1, 3, 32, 32, dtype=torch.float32)).shape[3] == 2


def test_a_D_of_one_place_cannot_be_normalised():
    for flags in (["--size", "16", "--height", "16"], ["--size", "32", "--d-layers", "5"]):
        with pytest.raises(common.UserError, match="--d-layers"):
            tiny_args(*flags)
        tiny_args(*flags, "--no-d-norm")


def test_a_row_without_an_update_of_D_repeats_its_latest_loss(folder, tmp_path, small_vgg):
    run("--data", folder, *TINY, "--g-updates", 3, "--log-every", 1, "--steps", 5,
        "--out", tmp_path / "run")
    L_D = rows_of(tmp_path / "run")["L_D_A"]
    assert L_D[0] == L_D[1] == L_D[2] != L_D[3] == L_D[4]


def test_run_folder(trained):
    for f in ("config.json", "index.html", "result.json", "samples/step_000000.png",
              "samples/step_000002.png", "features/last.pt", "features/log.csv"):
        assert (trained / f).stat().st_size > 0, f
    names = [f"{n}_{d}" for d in "AB" for n in ("rec", "KL", "cyc", "GAN", "L_c", "L_s", "L_D")]
    assert set(rows_of(trained)) == {"step", "seconds", "KL_AB", "KL_BA", *names}
    scores = json.loads((trained / "result.json").read_text())["scores"]
    assert [s["name"] for s in scores] == [f"x_{way}: {n}" for way in ("AB", "BA")
                                           for n in ("L_c", "L_s", "L_P")]
    parts = checkpoint(trained)["parts"]
    stage_1 = checkpoint(trained / "features")["parts"]
    for d in "AB":
        for name, weight in parts[f"F_{d}"].items():  # frozen since stage 1
            assert torch.equal(weight, stage_1[f"VAE_{d}"][f"F.{name}"])


def same_weights(a, b):
    a, b = checkpoint(a), checkpoint(b)
    assert a["step"] == b["step"]
    assert_same(a["parts"], b["parts"])


@pytest.mark.parametrize("stage", ["pretrain_step", "train_step"])
def test_resumed_run_is_bit_identical(folder, tmp_path, small_vgg, stage, monkeypatch):
    flags = ["--data", folder, *TINY, "--pretrain", 3, "--steps", 3]
    run(*flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        if stage == "pretrain_step":  # `interrupted` stops at the second call of train_step
            script = SimpleNamespace(train_step=egscit.pretrain_step)
            patch.setattr(egscit, "pretrain_step", lambda *a: script.train_step(*a))
        else:
            script = egscit
        interrupted(script, lambda: run(*flags, "--out", tmp_path / "parts"))
    at = tmp_path / "parts" / ("features" if stage == "pretrain_step" else "")
    assert checkpoint(at)["step"] == 2
    run(*flags, "--out", tmp_path / "parts", "--resume")
    same_weights(tmp_path / "whole", tmp_path / "parts")
    same_weights(tmp_path / "whole" / "features", tmp_path / "parts" / "features")


def test_stage_1_can_be_reused(folder, trained, tmp_path, small_vgg):
    run("--data", folder, *TINY, "--steps", 1, "--features", trained / "last.pt", "--out",
        tmp_path / "run")
    assert not (tmp_path / "run/features").exists()
    for name in ("F_A", "F_B"):
        assert_same(checkpoint(tmp_path / "run")["parts"][name],
                    checkpoint(trained)["parts"][name])


def test_a_folder_without_test_pictures_is_trained_and_not_scored(folder, tmp_path, small_vgg,
                                                                  capsys):
    for d in "AB":
        (tmp_path / "data" / f"train{d}").mkdir(parents=True)
        for f in (folder / f"train{d}").iterdir():
            (tmp_path / "data" / f"train{d}" / f.name).write_bytes(f.read_bytes())
    run("--data", tmp_path / "data", *TINY, "--steps", 1, "--out", tmp_path / "run")
    said = capsys.readouterr().out
    assert "grids show training pictures" in said and "no scores: " in said and "testA" in said
    assert json.loads((tmp_path / "run/result.json").read_text())["scores"] == []
    assert "testA" in error_of(capsys, egscit.main, "--evaluate", "--data", tmp_path / "data",
                               "--weights", tmp_path / "run/last.pt")


def test_mnist_without_lab_is_trained_and_not_scored(tmp_path, monkeypatch, capsys, small_vgg):
    def no_lab(module, needed_by):
        raise common.UserError(f"{needed_by} needs the folder lab/ of the repository")

    monkeypatch.setattr(egscit, "mnist", lambda args, split: drawn(40))
    monkeypatch.setattr(common, "lab", no_lab)
    run("--data", "mnist-single", *SHARED, "--vgg", "random", "--pretrain", 1, "--steps", 1,
        "--out", tmp_path / "run")
    assert "no scores: a test with known answers needs the folder lab/" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/result.json").read_text())["scores"] == []


def test_result_has_trivial_answers_and_deviations_and_evaluate_repeats_it(
        digit_run, digits, monkeypatch, capsys):
    scores = json.loads((digit_run / "result.json").read_text())["scores"]
    assert len(scores) == 14 and scores[0]["name"] == "x_AB: SSIM to the truth"
    assert scores[0]["trivial"]["the truth"] == pytest.approx(1) and scores[0]["sd"] > 0
    assert [s["name"] for s in scores if "the truth" not in s["trivial"]] == []
    monkeypatch.setattr(toy, "ensure", lambda name, size: digits)
    capsys.readouterr()
    run("--evaluate", "--weights", digit_run / "last.pt", "--device", "cpu")
    printed = capsys.readouterr().out
    for s in scores:
        spread = f" +- {s['sd']:.3g}" if "sd" in s else ""
        assert f"{s['name']}: {s['value']:.4g}{spread} ({s['better']}" in printed


def test_boards_train_and_are_scored(tmp_path, monkeypatch, small_vgg):
    toy.draw("digits_multiple", tmp_path / "boards", n=3, size=64, n_test=2)
    monkeypatch.setattr(toy, "ensure", lambda name, size: tmp_path / "boards")
    run("--data", "toy-multiple", *SHARED, "--size", 64, "--pretrain", 1, "--steps", 1, "--out",
        tmp_path / "run")
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
            assert im.size == size and im.mode == ("RGBA" if stem == "rgba" else "RGB")


def test_translate_is_the_flow_of_its_direction_without_noise(trained, small_vgg):
    args = egscit.get_args(["--weights", str(trained / "last.pt"), "--device", "cpu",
                            "--translate", "x.png"])
    nets = egscit.load_translator(args, CPU)
    n = naive_nets(nets, args)[1]
    x, y = noise(1, 3, 16, 32, dtype=torch.float), noise(1, 3, 16, 32, seed=1, dtype=torch.float)
    for way, E, F_x, F_y, G in (("AB", n.E_A, n.F_A, n.F_B, n.G_B),
                                ("BA", n.E_B, n.F_B, n.F_A, n.G_A)):
        c = n.G_first(n.E_last(E(x)))
        masked = (0.5 / (1 + torch.exp(-F_x(x))) + 0.5) * c
        got = egscit.translate(nets, x, y, args, way)
        close([got], [G(naive_adain(masked, F_y(y))).detach()], 1e-4, 1e-5)
        both = egscit.translated(nets, {"x_A": torch.cat([x, y]), "x_B": torch.cat([y, x])}, args,
                                 way)
        i = int(way == "BA")  # the pair whose content is x
        close([both[i:i + 1]], [got], 1e-5, 1e-6)


def test_user_errors_are_one_line(trained, folder, tmp_path, capsys, monkeypatch, small_vgg):
    def fails(*flags):
        return error_of(capsys, egscit.main, "--device", "cpu", *flags)

    assert "multiples of 4" in fails("--data", folder, "--size", 30)
    assert "--eta 2" in fails("--data", folder, "--eta", 2)
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
    begun = torch.load(trained / "last.pt", weights_only=True) | {"step": 0}  # amid stage 1
    torch.save(begun, tmp_path / "begun.pt")
    for early in (tmp_path / "begun.pt", trained / "features/last.pt"):
        assert "expected the last.pt of a run whose stage 1 is over" in fails(
            "--data", folder, *TINY, "--features", early, "--out", tmp_path / "y")

    def refuse(*args, **kwargs):
        raise RuntimeError("Error downloading x:\nno network\n")  # as torchvision's: several lines
    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    message = fails("--data", "mnist-single", "--small", "--mnist-root", tmp_path)
    assert str(tmp_path) in message and "(Error downloading x: no network)" in message
    assert "toy-multiple, mnist-single" in fails("--data", "mnist")
    for flag, value in (("--ngf", 0), ("--downs", -1), ("--blocks", -1), ("--pretrain", 0)):
        assert f"{flag} {value}: " in fails("--data", folder, flag, value)
    assert "digits are square" in fails("--height", 40)
    assert "multiple of 4" in fails("--data", "toy-multiple", "--size", 30, "--downs", 0)
    assert "have 28x28 pixels" in fails("--data", "mnist-single", "--small", "--size", 32)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(folder, tmp_path):
    """Weights after one step of each stage, without noise or normalisation over the batch."""
    code = ("import sys, torch, common, egscit\nfrom lab.toy.digits import DigitVGG\n"
            "def vgg(*_, **__):\n    torch.manual_seed(5)\n"
            "    return DigitVGG(4).requires_grad_(False)\n"
            "egscit.VGG, torch.randn_like = vgg, torch.zeros_like\n"
            "common.entry(egscit.main)\n")
    script = tmp_path / "script.py"
    script.write_text(code)
    flags = ["--data", str(folder), *TINY, "--pretrain", "1", "--steps", "1", "--no-d-norm"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, launcher, more in (
            ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], []),
            ("one", [], ["--batch", "4"])):
        subprocess.run([sys.executable, *launcher, script, *flags, *more, "--out",
                        str(tmp_path / name)], check=True, env=environment, capture_output=True)
    one, two = (checkpoint(tmp_path / n)["parts"] for n in ("one", "two"))
    for net in ("E_A", "G_B", "D_A", "F_B"):
        for name, weight in one[net].items():
            assert torch.allclose(weight, two[net][name], atol=1e-4), (net, name)


@pytest.mark.slow
def test_learns_the_toy_world(digits, tmp_path, monkeypatch, small_vgg):
    """100 steps: pictures are rebuilt, and papers take the exemplar's colour (by chance: 1/3)."""
    monkeypatch.setattr(toy, "ensure", lambda name, size: digits)
    run("--ngf", 8, "--ndf", 8, "--blocks", 2, "--pretrain", 60, "--steps", 100, "--lr", 2e-3,
        "--device", "cpu", "--out", tmp_path / "run")
    scores = {s["name"]: s for s in json.loads(
        (tmp_path / "run/result.json").read_text())["scores"]}
    assert scores["x_AB: paper accuracy"]["value"] > 0.7
    assert scores["x_BA: paper accuracy"]["value"] > 0.7
    last = {name: values[-1] for name, values in rows_of(tmp_path / "run").items()}
    assert last["rec_A"] < 0.15 and last["rec_B"] < 0.15  # of 2; at first 0.6


def test_boards_of_mnist_have_every_class_in_its_own_hue(monkeypatch):
    masks, labels = drawn()
    monkeypatch.setattr(egscit, "mnist", lambda args, split: (masks, labels))
    data = egscit.Unpaired(egscit.get_args(["--data", "mnist-multiple"]))
    for domain in (data.A, data.B):  # each in an order of its own
        for k, indices in enumerate(domain.members):
            of_k = {mask.tobytes() for mask in masks[labels == k]}
            assert len(indices) == 40 and {domain.masks[i].tobytes() for i in indices} == of_k


def test_a_grid_shows_each_translation_beside_its_truth(monkeypatch):
    monkeypatch.setattr(egscit, "translated", lambda nets, test, args, way: test[f"x_{way[0]}"] / 2)
    test = {f"x_{name}": noise(2, 3, 8, 8, seed=i) for i, name in enumerate(("A", "B", "AB", "BA"))}
    columns = egscit.sample_columns(None, test, None)
    assert [*columns] == ["x_A", "x_B", "x_AB", "true x_AB", "x_BA", "true x_BA"]
    close([*columns.values()], [test["x_A"], test["x_B"], test["x_A"] / 2, test["x_AB"],
                                test["x_B"] / 2, test["x_BA"]])


def test_photos_are_zoomed_by_a_fifth_at_most(tmp_path):
    """Crops have 0.8 to 1 of the sides (code): a bar of half the width has 0.5 to 0.625 of it."""
    bar = np.zeros((40, 40, 3), np.uint8)
    bar[:, 10:30] = 255
    Image.fromarray(bar).save(tmp_path / "a.png")
    photos = egscit.Photos([tmp_path / "a.png"], SimpleNamespace(size=40, height=40, data="."))
    shares = [float((photos.picture(0, random.Random(seed)) + 1).mean()) / 2 for seed in range(200)]
    assert 0.45 < min(shares) and 0.6 < max(shares) < 0.65
