"""cut.py: every equation against a plain transcription, and the script as its users run it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_moved_alike,
    assert_same,
    error_of,
    interrupted,
    noise_folder,
    odd_pictures,
    two_processes,
)
from PIL import Image
from transcriptions import close, parameters, patchgan, resnet_generator

import common
import cut
from lab import metrics, toy

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--load", "36", "--ngf", "4", "--ndf", "4", "--blocks", "4", "--batch", "2",
        "--patches", "16", "--bank", "40", "--workers", "0", "--device", "cpu", "--log-every", "1"]
CPU = torch.device("cpu")


def tiny_args(*flags):
    return cut.get_args(["--data", ".", *TINY, *flags])


@pytest.fixture
def folder(tmp_path):
    return noise_folder(tmp_path / "data")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return toy.ensure("horse2zebra", 32, root=tmp_path_factory.mktemp("toy"), n=6)


def run(*flags):
    cut.main([*map(str, flags)])


@pytest.fixture
def trained(folder, tmp_path):
    run("--data", folder, *TINY, "--steps", 2, "--out", tmp_path / "run")
    return tmp_path / "run"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, dtype=torch.double):
    return torch.rand(shape, dtype=dtype) * 2 - 1


# ---- configuration and networks -----------------------------------------------------------------


def test_paper_defaults_of_the_modes():
    args = cut.get_args(["--data", "."])
    assert (args.lambda_X, args.lambda_Y, args.tau, args.patches) == (0.5, 0.5, 0.07, 256)
    assert (args.epochs, args.decay_from, args.batch, args.lr, args.beta1) == (400, .5, 1, 2e-4, .5)
    assert (args.ngf, args.ndf, args.blocks, args.size, args.load) == (64, 64, 9, 256, 286)
    assert args.antialias_G and args.antialias_D and args.init == "xavier"
    assert (args.nce_layers, args.negatives) == ([0, 1, 2, 3, 4], "internal")
    assert (args.bank, args.momentum, args.flip_equivariance) == (16384, 0.999, False)
    fast = cut.get_args(["--data", ".", "--mode", "fastcut"])
    assert (fast.lambda_X, fast.lambda_Y, fast.flip_equivariance) == (10, 0, True)
    assert (fast.epochs, fast.decay_from, fast.lr) == (200, 0.75, 2e-4)
    assert cut.get_args(["--data", ".", "--size", "512"]).load == 572
    short = cut.get_args(["--epochs=3"])  # of toy data, whose preset counts steps
    assert (short.steps, short.epochs, cut.get_args([]).steps) == (None, 3, 1800)
    assert cut.get_args(["--epochs", "3", "--steps", "9"]).steps == 9
    with pytest.raises(common.UserError, match="--patches 1: the negatives are the other places"):
        cut.get_args(["--patches", "1"])
    nets = cut.build(tiny_args(), CPU)
    for optimiser in (nets.opt_G, nets.opt_D, nets.opt_H):
        group, = optimiser.param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.5, 0.999), 1e-8)
        assert group["weight_decay"] == 0


def test_toy_preset_changes_sizes_and_rates_but_no_term_of_the_objective():
    for mode in ("cut", "fastcut"):
        real, small = (cut.get_args(["--mode", mode, *data]) for data in (["--data", "."], []))
        for name in ("lambda_X", "lambda_Y", "tau", "nce_layers", "negatives", "flip_equivariance"):
            assert getattr(real, name) == getattr(small, name), name


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_the_full_configuration():
    nets = cut.build(cut.get_args(["--data", "."]), CPU)
    assert [count(net) for net in (nets.G, nets.D, nets.H)] == [11_378_179, 2_764_737, 560_384]
    x = torch.zeros(1, 3, 64, 64)
    y_hat, features = nets.G(x)
    assert y_hat.shape == x.shape
    assert [tuple(f.shape[1:]) for f in features] == [
        (3, 64, 64), (128, 64, 64), (256, 32, 32), (256, 16, 16), (256, 16, 16)]
    places = cut.sample_places(features, [0, 1, 2, 3, 4], 256, rng())
    assert [tuple(z.shape) for z in nets.H(features, places)] == [(1, 256, 256)] * 5
    for net in (nets.G, nets.D, nets.H):      # xavier times 0.02
        for p in net.parameters():
            if p.dim() == 4 or p.dim() == 2:
                area = p[0, 0].numel() if p.dim() == 4 else 1
                std = 0.02 * math.sqrt(2 / ((p.shape[0] + p.shape[1]) * area))
                if p.numel() > 5000:
                    assert float(p.detach().std()) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("antialias", [True, False])
def test_networks_are_their_layer_tables(antialias):
    nets = lively(cut.build(tiny_args("--blocks", "5", *NO_ANTIALIAS * (not antialias)), CPU))
    x = noise(2, 3, 36, 32)
    y_hat, features = nets.G(x)
    naive, naive_features = resnet_generator(parameters(nets.G), x, 5, antialias)
    close([y_hat, *features], [naive, *naive_features])
    close(nets.G.encode(x), naive_features)
    close([nets.D(x)], [patchgan(parameters(nets.D), x, antialias)])


NO_ANTIALIAS = ["--no-antialias-G", "--no-antialias-D"]


@pytest.mark.parametrize("antialias, fields", [(True, [1, 9, 15, 35, 99]),
                                               (False, [1, 9, 13, 29, 93])])
def test_receptive_fields(antialias, fields):
    """Sec. 3.3.2 names 1, 9, 15, 35, 99; the norm, which sees everything, is left out, and the
    ReLUs, which hide some places."""
    G = cut.ResnetGenerator(1, 9, antialias).double()
    for module in G.modules():
        if isinstance(module, (common.InstanceNorm, torch.nn.ReLU)):
            module.forward = lambda x: x
    x = noise(1, 3, 128, 128).requires_grad_()
    for feature, field in zip(G.encode(x), fields, strict=True):
        grad, = torch.autograd.grad(feature[0, :, feature.shape[2] // 2, feature.shape[3] // 2]
                                    .sum(), x, retain_graph=True)
        rows = grad.abs().sum((0, 1, 3)).nonzero().flatten()
        assert int(rows[-1] - rows[0]) + 1 == field


def test_projector_divides_by_the_norm_plus_1e_7():
    """Rows as short as xavier's first ones (1e-7 to 1e-5), where max(norm, 1e-7) would differ."""
    H = cut.Projector([3, 4]).double()
    features, places = [noise(2, 3, 4, 5), noise(2, 4, 2, 2)], {0: torch.tensor([7, 0, 19]),
                                                                1: torch.tensor([3, 1])}
    for scale in (1.0, 1e-6, 1e-7):
        with torch.no_grad():
            H.mlps[0][2].weight.normal_(0, 0.1 * scale)
            H.mlps[0][2].bias.zero_()
        for i, (layer, z) in enumerate(zip(places, H(features, places), strict=True)):
            w1, b1, w2, b2 = H.mlps[i].parameters()
            for b in range(2):
                for row, s in zip(z[b], places[layer].tolist(), strict=True):
                    width = features[layer].shape[3]
                    patch = features[layer][b, :, s // width, s % width]
                    v = w2 @ (w1 @ patch + b1).clamp(min=0) + b2
                    torch.testing.assert_close(row, v / (v.square().sum().sqrt() + 1e-7),
                                               rtol=1e-9, atol=1e-12)
                    if i == 0 and scale == 1e-7:  # the case that tells the two forms apart
                        assert 1e-9 < float(v.detach().norm()) < 1e-5
                        assert float(row.detach().norm()) < 0.99


# ---- losses -------------------------------------------------------------------------------------


def naive_l(v, positive, negatives, tau):
    """Eq. (3.6), digit by digit."""
    e = [math.exp(float(v @ k) / tau) for k in negatives]
    p = math.exp(float(v @ positive) / tau)
    return -math.log(p / (p + sum(e)))


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


@pytest.mark.parametrize("B, S", [(1, 1), (1, 5), (3, 16)])
def test_info_nce_is_eq_3_6(B, S):
    v, k = unit(B, S, 8), unit(B, S, 8)
    expected = np.mean([naive_l(v[b, s], k[b, s], [k[b, j] for j in range(S) if j != s], 0.3)
                        for b in range(B) for s in range(S)])
    assert float(cut.info_nce(v, k, 0.3)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("negatives", ["internal", "external", "both"])
def test_patch_nce_is_eq_3_7_and_with_a_bank_eq_3_8(negatives):
    z_hat, z = [unit(2, s, 8) for s in (5, 3)], [unit(2, s, 8) for s in (5, 3)]
    keys = [unit(11, 8), unit(7, 8)]
    bank = None if negatives == "internal" else type("Bank", (), {"keys": lambda self: keys})()
    args = tiny_args("--negatives", negatives, "--tau", "0.2")
    expected = np.mean([np.mean([
        naive_l(v[b, s], k[b, s],
                [k[b, j] for j in range(len(k[b])) if negatives != "external" and j != s]
                + (list(more) if bank else []), 0.2)
        for b in range(2) for s in range(len(k[b]))])
        for v, k, more in zip(z_hat, z, keys, strict=True)])
    assert float(cut.patch_nce(z_hat, z, args, bank)) == pytest.approx(expected, rel=1e-9)


def test_keys_and_bank_get_no_gradient():
    v, k, bank = (unit(*shape).requires_grad_() for shape in ((1, 4, 8), (1, 4, 8), (5, 8)))
    cut.info_nce(v, k, 0.07, bank).backward()
    assert v.grad.abs().sum() > 0 and k.grad is None and bank.grad is None


def test_chance_is_the_loss_of_features_that_are_all_alike():
    alike = torch.ones(1, 16, 256) / 16
    for negatives, bank in (("internal", None), ("external", torch.ones(40, 256) / 16),
                            ("both", torch.ones(40, 256) / 16)):
        args = tiny_args("--negatives", negatives)
        loss = cut.info_nce(alike, alike, 0.07, bank, negatives != "external")
        assert cut.chance(args)["NCE_X"] == cut.chance(args)["NCE_Y"]
        assert cut.chance(args)["NCE_X"] == pytest.approx(float(loss), rel=1e-5)
    assert cut.chance(args)["L_GAN"] == float(cut.lsgan(torch.tensor(0.5), 1.0))
    assert cut.chance(args)["L_D"] == float(cut.lsgan(torch.tensor(0.5), 0.0))


def test_places_are_distinct_and_all_if_there_are_fewer():
    features = [torch.randn(2, 3, 4, 6), torch.randn(2, 3, 9, 9), torch.randn(2, 3, 2, 2)]
    places = cut.sample_places(features, [0, 2], 9, rng())
    assert {layer: len(s) for layer, s in places.items()} == {0: 9, 2: 4}
    assert all(len(set(s.tolist())) == len(s) for s in places.values())
    assert max(places[0]) < 24 and not torch.equal(
        places[0], cut.sample_places(features, [0, 2], 9, rng(1))[0])


def test_memory_bank_is_a_queue_filled_by_the_averaged_networks():
    args = tiny_args("--negatives", "external", "--momentum", "0.9")
    nets = cut.build(args, CPU)
    bank, x = nets.bank_X, torch.randn(2, 3, 32, 32)
    before = [parameters(net) for net in (bank.G.encoder, bank.H)]
    with torch.no_grad():
        for p in [*nets.G.parameters(), *nets.H.parameters()]:
            p.add_(1.0)
    old = [keys.clone() for keys in bank.keys()]
    places = cut.sample_places(bank.G.encode(x), args.nce_layers, args.patches, rng(3))
    bank.update(nets.G, nets.H, x, places)
    for net, was in zip((bank.G.encoder, bank.H), before, strict=True):
        close(list(net.parameters()), [0.9 * p + 0.1 * (p + 1.0) for p in was], 1e-5, 1e-5)
    for fresh, keys, was in zip(bank.H(bank.G.encode(x), places), bank.keys(), old, strict=True):
        close([keys[:32], keys[32:]], [fresh.flatten(0, 1), was[32:]], 0, 0)
    kept = [keys.clone() for keys in bank.keys()]
    bank.update(nets.G, nets.H, x, places)
    assert bank.oldest.tolist() == [24] * 5  # 64 keys through a bank of 40
    for keys, was in zip(bank.keys(), kept, strict=True):
        assert torch.equal(keys[24:32], was[24:32]) and not torch.equal(keys[:24], was[:24])
    assert not any(p.requires_grad for p in bank.parameters())


# ---- the step -----------------------------------------------------------------------------------


def lively(nets):
    """Float64, weights that saturate nothing, and rates of 0: a step leaves its gradients."""
    for net in (nets.G, nets.D, nets.H):
        common.init_weights(net.double(), "normal", 0.1)
    for optimiser in (nets.opt_G, nets.opt_D, nets.opt_H):
        optimiser.param_groups[0]["lr"] = 0.0
    return nets


def naive_step(nets, x, y, args, seed):
    """Losses and gradients of one step as the paper words them, one picture at a time, by
    transcriptions, every feature computed anew. Float64; returns (losses, {net: gradients})."""
    p = {name: parameters(getattr(nets, name)) for name in "GDH"}
    draw = torch.Generator().manual_seed(seed)
    flip = args.flip_equivariance and bool(torch.rand((), generator=draw) < 0.5)
    sides = [(32, 40), (32, 40), (16, 20), (8, 10), (8, 10)]
    if not args.antialias_G:
        sides[1:3] = [(16, 20), (8, 10)]
    places = {layer: torch.randperm(sides[layer][0] * sides[layer][1], generator=draw)[:16]
              for layer in args.nce_layers}

    def mirror(picture):
        return picture.flip(3) if flip else picture

    def G(picture):
        return resnet_generator(p["G"], picture, args.blocks, args.antialias_G)

    def D(picture):
        return patchgan(p["D"], picture, args.antialias_D)

    def embed(features):
        """{layer: (S, 256)}: the MLP of every layer at the places, row by row of length 1."""
        rows = {}
        for i, layer in enumerate(args.nce_layers):
            w1, b1, w2, b2 = p["H"][4 * i:4 * i + 4]
            width = features[layer].shape[3]
            patches = torch.stack([features[layer][0, :, s // width, s % width]
                                   for s in places[layer].tolist()])
            v = (patches @ w1.t() + b1).relu() @ w2.t() + b2
            rows[layer] = v / (v.square().sum(1, keepdim=True).sqrt() + 1e-7)
        return rows

    def nce(source, output, bank):
        z_hat = embed([mirror(f) for f in G(output)[1]])
        z, total = embed(G(source)[1]), 0
        for i, layer in enumerate(args.nce_layers):
            for s in range(16):
                negatives = [z[layer][j] for j in range(16)
                             if j != s and args.negatives != "external"]
                negatives += list(bank.keys()[i]) if bank is not None else []
                v, scores = z_hat[layer][s], []
                for key in [z[layer][s], *negatives]:
                    scores.append(v @ key.detach() / args.tau)
                e = torch.stack(scores).exp()
                total = total - (e[0] / e.sum()).log() / 16
        return total / len(args.nce_layers)

    banks = getattr(nets, "bank_X", None), getattr(nets, "bank_Y", None)
    losses = dict.fromkeys(("L_D", "L_GAN", "NCE_X", "NCE_Y"), 0)
    for a, b in ((x[i:i + 1], y[i:i + 1]) for i in range(len(x))):
        y_hat = G(mirror(a))[0]
        losses["L_D"] += ((D(b) - 1)**2).mean() / 2 + (D(y_hat.detach())**2).mean() / 2
        losses["L_GAN"] += ((D(y_hat) - 1)**2).mean()
        losses["NCE_X"] += nce(a, y_hat, banks[0])
        losses["NCE_Y"] += nce(b, G(mirror(b))[0], banks[1]) if args.lambda_Y else 0
    losses = {name: value / len(x) for name, value in losses.items()}
    L = (losses["L_GAN"] + args.lambda_X * losses["NCE_X"] + args.lambda_Y * losses["NCE_Y"])
    grads = torch.autograd.grad(L, p["G"] + p["H"])
    if not args.lambda_Y:
        del losses["NCE_Y"]
    return losses, {"D": torch.autograd.grad(losses["L_D"], p["D"]),
                    "G": grads[:len(p["G"])], "H": grads[len(p["G"]):]}


@pytest.mark.parametrize("B, flags", [
    (1, []), (3, ["--lambda-Y", "0"]), (2, ["--flip-equivariance"]),
    (2, ["--flip-equivariance", "--lambda-Y", "0", *NO_ANTIALIAS, "--no-channels-last"]),
    (2, ["--negatives", "external"]), (1, ["--negatives", "both", "--nce-layers", "4", "2"])])
def test_step_is_the_objective(B, flags):
    """Eq. (3.5) to (3.9): losses and all gradients in float64, every mode, two weights apart."""
    args = tiny_args("--lambda-X", "3", "--lambda-Y", "0.7", "--tau", "0.2", *flags)
    nets, seed = lively(cut.build(args, CPU)), 3
    if args.negatives != "internal":      # banks of their own, so that none can stand for another
        for bank in (nets.bank_X.double(), nets.bank_Y.double()):
            for keys in bank.keys():
                keys.copy_(unit(*keys.shape))
    x, y = noise(B, 3, 32, 40), noise(B, 3, 32, 40)
    expected, grads = naive_step(nets, x, y, args, seed)
    losses = cut.train_step(nets, x, y, args, rng(seed))
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(float(value.detach()), rel=1e-9), name
    for name in "GDH":
        close([p.grad for p in getattr(nets, name).parameters()], grads[name])


def test_half_of_fastcuts_steps_are_mirrored():
    args = tiny_args("--mode", "fastcut")
    nets = lively(cut.build(args, CPU))
    x, y = noise(1, 3, 32, 32), noise(1, 3, 32, 32)
    with torch.no_grad():
        plain = float(cut.lsgan(nets.D(nets.G(x)[0]), 1.0))
        other = float(cut.lsgan(nets.D(nets.G(x.flip(3))[0]), 1.0))
    seen = [float(cut.train_step(nets, x, y, args, rng(seed))["L_GAN"]) for seed in range(40)]
    mirrored = [abs(s - other) < 1e-9 for s in seen]
    assert all(m or abs(s - plain) < 1e-9 for m, s in zip(mirrored, seen, strict=True))
    assert 10 < sum(mirrored) < 30                          # p = 1/2: 20 +- 3


def test_the_banks_get_the_keys_of_their_own_domain_after_the_update():
    args = tiny_args("--negatives", "external", "--momentum", "0")
    nets = cut.build(args, CPU)
    x, y = noise(2, 3, 32, 32, dtype=torch.float32), noise(2, 3, 32, 32, dtype=torch.float32)
    cut.train_step(nets, x, y, args, rng())
    places = cut.sample_places(nets.G.encode(x), args.nce_layers, args.patches, rng())
    with torch.no_grad():
        for bank, picture in ((nets.bank_X, x), (nets.bank_Y, y)):
            for keys, z in zip(bank.keys(), nets.H(nets.G.encode(picture), places), strict=True):
                torch.testing.assert_close(keys[:32], z.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_g_is_judged_by_the_d_that_has_just_learnt():
    args = tiny_args()
    nets = cut.build(args, CPU)
    nets.opt_D.param_groups[0]["lr"] = 0.1
    x, y = noise(2, 3, 32, 32, dtype=torch.float32), noise(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        y_hat = nets.G(x)[0]
        before = float(cut.lsgan(nets.D(y_hat), 1.0))
    L_GAN = float(cut.train_step(nets, x, y, args, rng())["L_GAN"])
    with torch.no_grad():
        assert L_GAN == pytest.approx(float(cut.lsgan(nets.D(y_hat), 1.0)), rel=1e-3)
    assert abs(L_GAN - before) > 0.01 * before


@pytest.mark.parametrize("flags", [[], ["--amp"], ["--mode", "fastcut"], ["--negatives", "both"],
                                   ["--nce-layers", "4", "--negatives", "external"]])
def test_every_weight_learns_and_losses_are_float32(flags):
    args = tiny_args(*flags)
    nets = cut.build(args, CPU)
    x, y = noise(2, 3, 32, 32, dtype=torch.float32), noise(2, 3, 32, 32, dtype=torch.float32)
    before = {name: parameters(getattr(nets, name)) for name in "GDH"}
    for step in range(3):
        losses = cut.train_step(nets, x, y, args, rng(step))
        assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    for name, old in before.items():
        assert all(not torch.equal(a, b) for a, b in zip(old, getattr(nets, name).parameters(),
                                                         strict=True))


def test_similarities_are_float32_with_amp(monkeypatch):
    """v . v+ / tau up to 14 has steps of 1/16 in bfloat16."""
    args, inside = tiny_args("--amp"), []
    nets, patch_nce = cut.build(args, CPU), cut.patch_nce

    def spy(z_hat, z, args, bank):
        inside.append(torch.is_autocast_enabled("cpu") or z[0].dtype != torch.float32)
        return patch_nce(z_hat, z, args, bank)
    monkeypatch.setattr(cut, "patch_nce", spy)
    x = noise(2, 3, 32, 32, dtype=torch.float32)
    cut.train_step(nets, x, x, args, rng())
    assert inside == [False, False]


@pytest.mark.slow
def test_compile_does_not_compile_anew_at_every_step():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    args = tiny_args("--compile")
    nets = cut.build(args, CPU)
    x, y = noise(2, 3, 32, 32, dtype=torch.float32), noise(2, 3, 32, 32, dtype=torch.float32)
    graphs = []
    for step in range(4):
        cut.train_step(nets, x, y, args, rng(step))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2] == graphs[3]


# ---- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, constant, total", [([], 10, 20), (["--mode", "fastcut"], 15, 20)])
def test_what_train_applies(folder, tmp_path, monkeypatch, flags, constant, total):
    """All three rates: constant, then falling to zero, from half or three quarters of the run."""
    seen = []

    def train_step(nets, x, y, args, rng):
        seen.append([o.param_groups[0]["lr"] for o in (nets.opt_G, nets.opt_D, nets.opt_H)])
        assert x.shape == y.shape == (1, 3, 32, 32)
        return {"NCE_X": torch.tensor(1.0)}

    monkeypatch.setattr(cut, "train_step", train_step)
    run("--data", folder, *TINY, *flags, "--epochs", 5, "--batch", 1, "--out", tmp_path / "run",
        "--sample-every", 100)
    expected = [2e-4] * constant + [2e-4 * (total - step) / (total - constant + 1)
                                    for step in range(constant, total)]
    assert np.allclose(seen, [[rate] * 3 for rate in expected], rtol=1e-9)


def test_run_folder(trained):
    rows = (trained / "log.csv").read_text().splitlines()
    assert rows[0] == "step,L_D,L_GAN,NCE_X,NCE_Y,seconds" and len(rows) == 3
    assert json.loads((trained / "config.json").read_text())["ngf"] == 4


@pytest.mark.parametrize("flags", [["--mode", "fastcut"], ["--negatives", "both"]])
def test_resumed_run_is_bit_identical(folder, tmp_path, flags):
    flags = ["--data", folder, *TINY, *flags, "--steps", 4]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(cut, lambda: run(*flags, "--out", tmp_path / "parts"))
    run(*flags, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 4
    assert_same(a["parts"], b["parts"])


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(folder, tmp_path):
    flags = ["--data", str(folder), *TINY, "--steps", "3", "--epochs", "1"]
    two_processes("cut.py", *flags, "--out", tmp_path / "two")
    run(*flags, "--batch", 4, "--out", tmp_path / "one")
    start = cut.build(cut.get_args(flags), CPU)
    assert_moved_alike(start, tmp_path / "one/last.pt", tmp_path / "two/last.pt", "GDH", 0.01)


# ---- translate and evaluate ---------------------------------------------------------------------


def test_translate_keeps_every_size_and_is_g(trained, tmp_path):
    sizes = odd_pictures(tmp_path / "in")
    picture = np.random.default_rng(2).integers(0, 256, (32, 36, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "in/p.png")
    run("--translate", tmp_path / "in", "--weights", trained / "last.pt", "--out", tmp_path / "out")
    written = {f.stem: Image.open(f) for f in (tmp_path / "out").iterdir()}
    assert {stem: im.size for stem, im in written.items()} == sizes | {"p": (36, 32)}
    params = list(torch.load(trained / "last.pt", weights_only=True)["parts"]["G"].values())
    x = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    y = resnet_generator(params, x, 4, True)[0][0]
    expected = ((y + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(written["p"]) - expected).max() <= 1


def test_evaluate_prints_fid_of_the_translated_test_set(trained, folder, monkeypatch, capsys):
    seen = {}

    def fid(fakes, reals, device, weights):
        seen.update(fakes=torch.cat(list(fakes)), reals=torch.cat(list(reals)), weights=weights)
        return 12.5

    monkeypatch.setattr(metrics, "fid", fid)
    run("--evaluate", "--weights", trained / "last.pt", "--data", folder, "--fid-weights", "w.pth")
    assert "FID (4 translated, 4 real" in capsys.readouterr().out and seen["weights"] == "w.pth"
    reals = torch.stack([common.to_tensor(common.open_rgb(f).resize((32, 32), Image.BICUBIC))
                         for f in common.find_split(folder, "test", "B")])
    assert seen["fakes"].shape == (4, 3, 32, 32)
    close([seen["reals"]], [reals])


def test_a_generator_that_copies_scores_as_copying(drawn):
    def copies(x):
        return x, []
    copies.multiple = 4
    for score in cut.truth_scores(copies, drawn, cut.get_args(TINY), CPU):
        assert score["value"] == pytest.approx(score["trivial"]["copy the input"], abs=1e-3)


def test_user_errors_are_one_line(folder, trained, tmp_path, capsys):
    def fails(*flags):
        return error_of(capsys, cut.main, *flags)
    line = fails("--data", tmp_path / "nowhere")
    assert "nowhere" in line and "trainA" in line and "horse2zebra" in line
    (tmp_path / "half").mkdir()
    line = fails("--data", tmp_path / "half", *TINY)
    assert "trainA" in line and "testB" in line
    assert "--size 34" in fails("--data", folder, *TINY, "--size", 34)
    assert "--nce-layers" in fails("--data", folder, *TINY, "--nce-layers", 5)
    assert "last.pt" in fails("--data", folder, *TINY, "--resume", "--out", tmp_path / "none")
    assert "--weights" in fails("--translate", folder / "testA")
    assert "does not fit" in fails("--data", folder, *TINY, "--ngf", 8, "--steps", 5, "--out",
                                   trained, "--resume")
    torch.save(torch.load(trained / "last.pt", weights_only=True) | {"method": "spade"},
               tmp_path / "other.pt")
    assert "spade.py" in fails("--translate", folder / "testA", "--weights", tmp_path / "other.pt")


@pytest.mark.slow
def test_learns_stripes(tmp_path, monkeypatch):
    """The default run, on validation scenes: its stripes are a quarter nearer to the truth than
    those of the best painter, who draws none; coat and background beat a flat one."""
    folder = toy.ensure("horse2zebra", 64, root=tmp_path)
    monkeypatch.setattr(cut, "data_folder", lambda args: folder)
    run("--out", tmp_path / "run", "--device", "cpu", "--split", "val")
    stripes, coat, background = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    assert stripes["value"] < 0.75 * min(stripes["trivial"].values())
    assert coat["value"] < coat["trivial"]["mean coat colour"]
    assert background["value"] < 0.75 * background["trivial"]["mean colour"]


def test_a_grid_shows_every_picture_beside_its_own_translation():
    class Half(torch.nn.Module):
        multiple = 4

        def forward(self, x):
            return x / 2, []

    x, y = noise(2, 3, 32, 32).float(), noise(2, 3, 32, 32).float()
    columns = cut.sample_columns(Half(), {"x": x, "y": y}, tiny_args())
    assert [*columns] == ["x", "G(x)", "y", "G(y)"]
    close([*columns.values()], [x, x / 2, y, y / 2])


def test_an_epoch_is_a_pass_over_the_larger_domain(folder):
    (folder / "trainA/3.png").unlink()
    for direction in ("AtoB", "BtoA"):
        assert len(cut.Unpaired(folder, tiny_args("--direction", direction))) == 4
