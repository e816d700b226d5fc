"""init.py: MUNIT's networks, the association rule, every term of Eq. (4), and whole runs."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from helpers import assert_same, error_of, interrupted, noise_folder, odd_pictures
from PIL import Image

import common
import init
from lab import metrics, toy

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = ["--size", "32", "--load", "36", "--object-size", "16", "--min-box", "4", "--batch", "2",
        "--ngf", "4", "--ndf", "4", "--mlp-dim", "8", "--blocks", "1", "--style-dim", "3",
        "--dis-layers", "2", "--dis-scales", "2", "--workers", "0", "--device", "cpu",
        "--log-every", "1"]


def tiny_args(*flags):
    return init.get_args(["--data", ".", *TINY, *flags])


def tiny(*flags):
    """(args, networks and optimisers, a batch of noise), in float64."""
    args = tiny_args(*flags)
    m = init.build(args, CPU)
    for net in nets(m).values():
        net.double()
    (batch,) = init.random_batch(args, CPU)
    return args, m, [t.double() if t.is_floating_point() else t for t in batch]


def nets(m):
    return {name: part for name, part in vars(m).items() if isinstance(part, nn.Module)}


def freeze_adam(m):
    """lr 0: the step leaves its gradients behind but changes nothing."""
    for optimiser in (m.opt_G, m.opt_D):
        optimiser.param_groups[0]["lr"] = 0.0


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def run(*flags):
    init.main([*map(str, flags)])


def run_fails(capsys, *flags):
    return error_of(capsys, init.main, *flags)


@pytest.fixture
def folder(tmp_path):
    """Four pictures of 48 x 40 per split; the first one of each has no box."""
    root = noise_folder(tmp_path / "data")
    boxes = {f"{split}/{i}.png": [{"box": [4, 6, 24, 30], "label": "car"},
                                  {"box": [20, 10, 46, 38], "label": "person"}]
             for split in ("trainA", "trainB", "testA", "testB") for i in (1, 2, 3)}
    (root / "boxes.json").write_text(json.dumps(boxes))
    return root


@pytest.fixture
def trained(folder, tmp_path):
    run("--data", folder, *TINY, "--steps", 2, "--out", tmp_path / "run")
    return tmp_path / "run"


# ---- networks --------------------------------------------------------------------------------


def count(*parts):
    return sum(p.numel() for net in parts for p in net.parameters())


def test_parameter_counts_at_munits_widths():
    m = init.build(init.get_args(["--data", "."]), CPU)
    G = m.G_X
    assert count(G.style_encoder) == 2_764_936 and count(G.content_encoder) == 5_385_856
    assert count(G.mlp) == 1_120_768 and count(G.blocks, G.up) == 5_754_627
    assert (count(G), len(list(G.parameters()))) == (15_026_187, 66)
    assert count(m.D_X) == 3 * 2_757_057 and not hasattr(m, "D_Xo")
    assert set(nets(m)) == {"G_X", "G_Y", "D_X", "D_Y"}  # 46.6 M, as many as MUNIT
    assert [tuple(p.shape[1:]) for p in m.D_X(torch.zeros(2, 3, 120, 120))] == [
        (1, 7, 7), (1, 3, 3), (1, 1, 1)]  # an object's crop: the coarsest scale sees all of it


def test_paper_defaults():
    args = init.get_args(["--data", "."])
    assert (args.size, args.load, args.object_size) == (360, 360, 120) and args.share_discriminator
    assert (args.lambda_g, args.lambda_cg, args.lambda_sg, args.lambda_cyc) == (10, 1, 1, 10)
    assert (args.lambda_o, args.lambda_co, args.lambda_so) == (10, 1, 1)
    assert (args.lr, args.decay_every, args.steps, args.batch) == (1e-4, 100_000, 1_000_000, 1)
    group = init.build(tiny_args(), CPU).opt_G.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.999), 1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 32, 48), (2, 3, 36, 20)])
def test_shapes(shape):
    G = init.Generator(4, 3, 8, 2)
    x = torch.randn(shape)
    c, s = G.content(x), G.style(x)
    assert c.shape == (shape[0], 16, shape[2] // 4, shape[3] // 4) and s.shape == (shape[0], 3)
    y = G.decode(c, s)
    assert y.shape == shape and y.abs().max() <= 1


def reflected(x, layer, pad, stride=1):
    return F.conv2d(F.pad(x, (pad,) * 4, mode="reflect"), layer.weight, layer.bias, stride)


def normalised(x):
    """Instance normalisation, channel by channel."""
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for ch in range(x.shape[1]):
            v = x[b, ch]
            out[b, ch] = (v - v.mean()) / ((v - v.mean()).square().mean() + 1e-5).sqrt()
    return out


def test_decoder_against_a_plain_transcription():
    """The MLP's numbers come shift before scale, layer by layer; no '1 +'; MUNIT's LayerNorm."""
    G = init.Generator(2, 3, 8, 2).double()
    with torch.no_grad():
        for p in G.parameters():
            p.normal_(0, 0.5)
    c, s = torch.randn(2, 8, 5, 4).double(), torch.randn(2, 3).double()
    numbers = G.mlp(s)
    assert numbers.shape == (2, 2 * 2 * 2 * 8)  # blocks x layers x (shift, scale) x channels
    h, at = c, 0
    for block in G.blocks:
        skip = h
        for i, layer in enumerate((block.conv1, block.conv2)):
            shift, scale = numbers[:, at:at + 8], numbers[:, at + 8:at + 16]
            at += 16
            h = normalised(reflected(h, layer, 1)) * scale[..., None, None] + shift[..., None, None]
            h = h.clamp(min=0) if i == 0 else h
        h = skip + h
    for i in (0, 4):
        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        h = reflected(h, G.up[i + 1], 2)
        norm = G.up[i + 2]
        h = torch.stack([(p - p.mean()) / (p.flatten().std() + 1e-5) for p in h])
        h = (h * norm.gamma[:, None, None] + norm.beta[:, None, None]).clamp(min=0)
    torch.testing.assert_close(G.decode(c, s), torch.tanh(reflected(h, G.up[8], 3)))


def test_encoders_against_a_plain_transcription():
    G = init.Generator(2, 3, 8, 1).double()
    x = torch.randn(2, 3, 24, 32).double()
    for norm, net, layers in ((normalised, G.content_encoder, (0, 3, 6)),
                              (lambda h: h, G.style_encoder, (0, 2, 4, 6, 8))):
        h = x
        for i, k in enumerate(layers):
            h = norm(reflected(h, net[k], 3 if i == 0 else 1, 1 if i == 0 else 2)).clamp(min=0)
        if norm is normalised:
            block = net[9].body
            expected = h + normalised(reflected(
                normalised(reflected(h, block[1], 1)).clamp(min=0), block[5], 1))
            torch.testing.assert_close(G.content(x), expected)
        else:
            torch.testing.assert_close(G.style(x), h.mean((2, 3)) @ net[11].weight[:, :, 0, 0].T
                                       + net[11].bias)


def test_discriminator_scales_are_averaged_pictures():
    D = init.Discriminator(4, 2, 3).double()
    x = torch.randn(1, 3, 30, 22).double()
    logits = D(x)
    for net, found in zip(D.scales, logits, strict=True):
        torch.testing.assert_close(found, net(x))
        h, w = x.shape[2:]
        x = torch.stack([torch.stack([  # 3 x 3 windows at every second pixel, edges left out
            x[:, :, max(0, i - 1):i + 2, max(0, j - 1):j + 2].mean((2, 3))
            for j in range(0, w, 2)], -1) for i in range(0, h, 2)], -2)


# ---- style bank and association --------------------------------------------------------------


@pytest.mark.parametrize("content", init.GRANULARITY)
def test_no_coarse_content_ever_gets_a_fine_style(content):
    """Fig. 3. Codes are marked with the granularity they come from."""
    order = {"object": 0, "background": 1, "global": 2}
    for n in (0, 1, 3):
        bank = init.style_bank(torch.zeros(n, 2), torch.ones(1, 2), torch.full((1, 2), 2.0))
        got = Counter(int(init.associate(content, bank, rng(seed))[0]) for seed in range(300))
        allowed = {level for level in order.values() if level >= order[content]}
        assert set(got) == allowed - ({0} if n == 0 else set())
        assert min(got.values()) > 0.7 * 300 / len(got)  # each granularity is equally likely


def test_every_object_of_the_bank_is_used():
    bank = init.style_bank(torch.arange(4.0)[:, None], torch.zeros(0, 1), torch.full((1, 1), 9.0))
    assert {float(init.associate("object", bank, rng(seed))) for seed in range(100)} == {
        0, 1, 2, 3, 9}


def test_bank_of_a_picture_without_objects():
    """No object style; the background is the whole picture."""
    args, m, batch = tiny()
    batch[3][0] = 0
    side = init.encode_styles(m, "X", batch[0], batch[1:4], args)
    empty, other = side.banks
    assert [len(empty[g]) for g in init.GRANULARITY] == [0, 1, 1]
    assert [len(other[g]) for g in init.GRANULARITY] == [2, 1, 1] and side.owner == [1, 1]
    torch.testing.assert_close(empty["background"], empty["global"])
    assert not any(code.requires_grad for bank in side.banks for code in bank.values())
    torch.testing.assert_close(side.o, batch[2][1])  # the crops of the other picture only


def test_background_style_does_not_see_the_objects():
    args, m, batch = tiny()
    batch[1][:, :, 4:20, 6:30] = 0
    before = init.encode_styles(m, "X", batch[0], batch[1:4], args).banks[0]
    batch[0][:, :, 4:20, 6:30] = 1
    after = init.encode_styles(m, "X", batch[0], batch[1:4], args).banks[0]
    assert torch.equal(before["background"], after["background"])
    assert not torch.equal(before["global"], after["global"])


# ---- losses and the step ---------------------------------------------------------------------


def naive_terms(m, batch, args, D_o):
    """Eq. (4) as printed, picture by picture and crop by crop: terms of G and losses of D."""
    def mean_abs(pairs):
        pairs = list(pairs)
        return sum((a - b).abs().sum() for a, b in pairs) / sum(a.numel() for a, _ in pairs)

    def lsgan(maps, target):  # maps: for each sample the logits of every scale
        return sum(torch.stack([(p[k] - target).square().mean() for p in maps]).mean()
                   for k in range(args.dis_scales))

    def flat(o, count):
        return [o[i, j][None] for i in range(len(o)) for j in range(count[i])]

    terms, losses_D = Counter(), Counter()
    pick = rng()
    for S, T, s, t in (("X", "Y", batch[:4], batch[4:]), ("Y", "X", batch[4:], batch[:4])):
        G, H, D = getattr(m, f"G_{S}"), getattr(m, f"G_{T}"), getattr(m, f"D_{T}")
        x, o = [p[None] for p in s[0]], flat(s[2], s[3])
        owner = [i for i, n in enumerate(s[3]) for _ in range(n)]
        z = torch.randn(len(x), args.style_dim, dtype=torch.double)
        sigma = []
        for i in owner:
            bank = {"object": torch.cat([H.style(t[2][i, j][None]) for j in range(t[3][i])]),
                    "background": H.style(t[0][i][None] * t[1][i]),
                    "global": H.style(t[0][i][None])}
            sigma.append(init.associate("object", bank, pick).detach())
        for k, inputs, styles, judge, real in (
                ("g", x, z, D, [p[None] for p in t[0]]),
                ("o", o, sigma, getattr(m, f"D_{T}o") if D_o else D, flat(t[2], t[3]))):
            c = [G.content(v) for v in inputs]
            own = [G.style(v) for v in inputs]
            out = [H.decode(a, b[None]) for a, b in zip(c, styles, strict=True)]
            c_hat, s_hat = [H.content(v) for v in out], [H.style(v) for v in out]
            terms[k] += mean_abs(zip([G.decode(*cs) for cs in zip(c, own, strict=True)], inputs,
                                     strict=True))
            terms[f"c{k}"] += mean_abs(zip(c_hat, c, strict=True))
            terms[f"s{k}"] += mean_abs((a[0], b) for a, b in zip(s_hat, styles, strict=True))
            back = [G.decode(*cs) for cs in zip(c_hat, own, strict=True)]
            terms[f"cyc_{k}"] += mean_abs(zip(back, inputs, strict=True))
            terms[f"adv_{k}"] += lsgan([judge(v) for v in out], 1)
            losses_D[k] += lsgan([judge(v.detach()) for v in out], 0) + lsgan(
                [judge(v) for v in real], 1)
            if k == "o":  # image <-> object, within the domain
                s_g = [G.style(x[i]) for i in owner]
                u = [G.decode(*cs) for cs in zip(c, s_g, strict=True)]
                terms["co"] += mean_abs((G.content(v), a) for v, a in zip(u, c, strict=True))
                terms["so"] += mean_abs((G.style(v), a.detach())
                                        for v, a in zip(u, s_g, strict=True))
                terms["cyc_o"] += mean_abs((G.decode(G.content(v), a), b) for v, a, b in
                                           zip(u, own, o, strict=True))
    return terms, losses_D


@pytest.mark.parametrize("share", [True, False])
def test_every_term_of_the_objective_and_all_gradients(share):
    """Losses, and the gradients that the step leaves in G and D, with unlike numbers of crops."""
    weights = {"g": 9, "cg": 2, "sg": 3, "o": 7, "co": 5, "so": 4}
    args, m, batch = tiny(*([] if share else ["--no-share-discriminator"]), "--lambda-cyc", "6",
                          *(f for k, v in weights.items() for f in (f"--lambda-{k}", str(v))))
    batch[3][0], batch[7][1] = 1, 1  # X: 1 and 2 crops; Y: 2 and 1
    batch[1][:, :, 3:9, 5:20] = batch[5][:, :, 8:30, 8:30] = 0
    freeze_adam(m)
    grads_D = {}

    def keep(optimiser, *_):  # the gradients of each D, before the other half clears them
        grads_D.update({p: p.grad.clone() for p in optimiser.param_groups[0]["params"]
                        if p.grad is not None})

    m.opt_D.register_step_pre_hook(keep)
    torch.manual_seed(5)
    losses = init.train_step(m, batch, args, rng())
    grads = {p: p.grad for p in [*m.G_X.parameters(), *m.G_Y.parameters()]} | grads_D
    torch.manual_seed(5)
    terms, losses_D = naive_terms(m, batch, args, not share)
    assert set(losses) == {*terms, "D_g", "D_o"}
    for name, value in terms.items():
        torch.testing.assert_close(losses[name], value.detach())
    for k, value in losses_D.items():
        torch.testing.assert_close(losses[f"D_{k}"], value.detach())
    total = sum(v * {"adv_g": 1, "adv_o": 1, "cyc_g": 6, "cyc_o": 6, **weights}[k]
                for k, v in terms.items())
    for objective, letter in ((total, "G"), (sum(losses_D.values()), "D")):
        params = [p for name, net in nets(m).items() if name[0] == letter for p in net.parameters()]
        naive = torch.autograd.grad(objective, params, retain_graph=True)
        for p, g in zip(params, naive, strict=True):
            torch.testing.assert_close(grads[p], g, atol=1e-9, rtol=1e-6)


def test_munit_is_the_global_half_of_the_objective():
    args, m, batch = tiny()
    freeze_adam(m)
    munit = tiny_args("--method", "munit")
    torch.manual_seed(5)
    both = init.train_step(m, batch, args, rng())
    torch.manual_seed(5)
    alone = init.train_step(m, [batch[0], batch[4]], munit, rng())
    assert set(alone) == {"g", "cg", "sg", "cyc_g", "adv_g", "D_g"}
    for name, value in alone.items():
        torch.testing.assert_close(value, both[name])


def test_latent_reconstruction_uses_the_encoders_of_the_other_domain():
    calls = []

    def stub(name):
        return SimpleNamespace(
            content=lambda v: calls.append((name, "content", float(v))) or v + 1,
            style=lambda v: calls.append((name, "style", float(v))) or v + 2,
            decode=lambda c, s: calls.append((name, "decode", float(c))) or c + 10 * s)

    x, s, sigma = (torch.tensor(v) for v in (0.0, 3.0, 5.0))
    v = init.reconstruct(x, s, sigma, stub("X"), stub("Y"))
    assert calls == [("X", "content", 0), ("X", "decode", 1), ("Y", "decode", 1)]
    calls.clear()
    init.reconstruction_terms(v, stub("X"), stub("Y"), "g", True)
    assert calls == [("Y", "content", 51), ("Y", "style", 51), ("X", "decode", 52)]


def test_shared_discriminator_is_one_object_and_separate_ones_see_their_own():
    args, m, batch = tiny()
    judged = []
    m.D_Y.register_forward_hook(lambda net, x, out: judged.append(x[0].shape[-1]))
    init.train_step(m, batch, args, rng())
    assert judged == [32, 16] * 2 and set(nets(m)) == {"G_X", "G_Y", "D_X", "D_Y"}
    args, m, batch = tiny("--no-share-discriminator")
    seen = {}
    for name in ("D_X", "D_Y", "D_Xo", "D_Yo"):
        getattr(m, name).register_forward_hook(
            lambda net, x, out, name=name: seen.setdefault(name, set()).add(x[0].shape[-1]))
    init.train_step(m, batch, args, rng())
    assert seen == {"D_X": {32}, "D_Y": {32}, "D_Xo": {16}, "D_Yo": {16}}


def test_every_encoder_sees_a_picture_once(monkeypatch):
    """Two domains: real pictures and translations, crops likewise, and crops in picture style."""
    seen = Counter()
    for name in ("content", "style"):
        original = getattr(init.Generator, name)
        monkeypatch.setattr(init.Generator, name, lambda self, x, name=name, original=original: (
            seen.update({(name, x.shape[-1]): len(x)}) or original(self, x)))
    args, m, batch = tiny()  # 2 pictures and 4 crops per domain
    init.train_step(m, batch, args, rng())
    assert seen == {("content", 32): 8, ("style", 32): 8 + 4,  # and the masked backgrounds
                    ("content", 16): 16 + 8, ("style", 16): 16 + 8}


@pytest.mark.parametrize("flags", [
    ["--amp"], ["--multi-scale", "--size", "64"], ["--lambda-cyc", "0"],
    ["--no-share-discriminator"], ["--method", "munit"]])
def test_variants_train(flags):
    args = tiny_args(*flags)
    m = init.build(args, CPU)
    (batch,) = init.random_batch(args, CPU)
    before = {name: [p.clone() for p in net.parameters()] for name, net in nets(m).items()}
    for step in range(2):
        losses = init.train_step(m, batch, args, rng(step))
        assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())
    assert any("cyc" in name for name in losses) == ("--lambda-cyc" not in flags)
    for name, old in before.items():
        assert all(not torch.equal(a, b) for a, b in zip(old, nets(m)[name].parameters(),
                                                         strict=True)), name


@pytest.mark.parametrize("count_X, count_Y", [(0, 0), (0, 2), (2, 0)])
def test_pictures_without_objects_keep_the_global_terms(count_X, count_Y):
    args, m, batch = tiny("--no-share-discriminator")
    batch[3][:], batch[7][:] = count_X, count_Y
    losses = init.train_step(m, batch, args, rng())
    assert losses["g"] > 0 and losses["adv_g"] > 0 and losses["D_g"] > 0 and losses["D_o"] == 0
    assert (losses["o"] > 0) == (count_X + count_Y > 0)
    assert all(p.grad is not None for p in m.G_X.parameters())


def test_multi_scale_swaps_styles_both_ways():
    """Sec. 3: the half-size picture in the full one's style, and the reverse."""
    args, m, batch = tiny("--multi-scale", "--size", "64")
    assert (args.object_size, args.objects) == (32, 1)
    seen = Counter()
    decode = init.Generator.decode

    def spy(self, c, s):
        seen[tuple(c.shape[-2:])] += 1
        return decode(self, c, s)

    for net in (m.G_X, m.G_Y):
        net.decode = spy.__get__(net)
    init.train_step(m, batch, args, rng())
    # per domain and size: rebuilt, translated, cycle, and Fig. 5 twice
    assert seen == {(16, 16): 10, (8, 8): 10}


def test_rate_is_halved():
    assert [init.rate(step, 10) for step in (0, 9, 10, 19, 20)] == [1, 1, 0.5, 0.5, 0.25]


# ---- data ------------------------------------------------------------------------------------


def test_boxes_follow_resize_crop_and_mirror(tmp_path):
    """The object is the only red thing: crops show red, the background mask hides all of it."""
    for side in "AB":
        (tmp_path / f"train{side}").mkdir()
        picture = np.full((50, 80, 3), 40, dtype=np.uint8)
        picture[12:40, 30:62, 0] = 250
        Image.fromarray(picture).save(tmp_path / f"train{side}/a.png")
    (tmp_path / "boxes.json").write_text(json.dumps({"a.png": [{"box": [30, 12, 62, 40]}]}))
    data = init.Scenes(tmp_path, tiny_args("--objects", "3"))
    counts, widths = Counter(), set()
    for n in range(40):
        x, keep, o, count = data[n][:4]
        assert x.shape == (3, 32, 32) and keep.shape == (1, 32, 32) and o.shape == (3, 3, 16, 16)
        red = (x[0] - x[1]) > 0.8
        assert not (red & (keep[0] == 1)).any()
        assert ((keep[0] == 0) & ~red).float().sum() <= 0.25 * max(1, red.sum())
        assert (o[:count, 0, 4:12, 4:12] > 0.5).all() and (o[count:] == 0).all()
        counts[count] += 1
        widths.add(int(red.any(0).sum()))
        assert_same(list(data[n]), list(data[n]))  # a sample depends on its number alone
    assert set(counts) == {0, 1} and len(widths) > 3  # mostly outside of some crops


def test_small_boxes_are_neither_object_nor_background(folder):
    args = tiny_args("--min-box", "30")
    _, keep, _, count = init.Scenes(folder, args).load(folder / "trainA/1.png", random.Random(0))
    assert count == 0 and (keep == 0).any()


def test_at_most_so_many_objects_and_none_for_munit(folder):
    data = init.Scenes(folder, tiny_args("--objects", "1", "--load", "32"))
    assert {data[n][3] for n in range(12)} == {0, 1}
    assert len(init.Scenes(folder, tiny_args("--method", "munit"))[0]) == 2
    (folder / "boxes.json").unlink()
    sample = init.Scenes(folder, tiny_args("--multi-scale", "--size", "64"))[0]
    x, keep, o, n = sample[:4]
    assert n == 1 and (keep == 1).all()
    expected = common.to_tensor(common.to_pil(x).resize((32, 32), Image.BILINEAR))
    torch.testing.assert_close(o[0], expected)


@pytest.mark.parametrize("entry, words", [
    ({"box": [4, 6, 50, 30]}, "not inside"), ({"box": [-1, 6, 9, 30]}, "[-1, 6, 9, 30]"),
    ({"box": [4, 6, 4, 30]}, "empty"), ({"box": [9, 6, 4, 30]}, "inverted"),
    ({"box": [4, 6, 9]}, "expected"), ({"label": "car"}, "expected"), ("car", "expected"),
    ({"box": [4, 6, "9", 30]}, "expected")])
def test_bad_boxes_are_named(folder, tmp_path, capsys, entry, words):
    table = {"trainA/2.png": [{"box": [0, 0, 48, 40]}, entry], "trainB/2.png": []}
    (folder / "boxes.json").write_text(json.dumps(table))
    line = run_fails(capsys, "--data", folder, *TINY, "--out", tmp_path / "r")
    assert "boxes.json" in line and "trainA/2.png" in line and words in line
    assert not (tmp_path / "r").exists()


def test_missing_or_broken_boxes(folder, tmp_path, capsys):
    flags = ["--data", folder, *TINY, "--out", tmp_path / "r"]
    for text, words in (("{", "not readable"), ("[1]", "expected"), ("{}", "no boxes")):
        (folder / "boxes.json").write_text(text)
        assert words in run_fails(capsys, *flags)
    (folder / "boxes.json").unlink()
    line = run_fails(capsys, *flags)
    assert "boxes.json: not found" in line and "--multi-scale" in line and "munit" in line


# ---- toy data --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "d2n"
    toy.draw("day2night", out, n=8, size=64, n_test=8)
    return out


def test_toy_layout_and_boxes(village):
    table = json.loads((village / "boxes.json").read_text())
    assert len(table) == 8 * 6
    for name, things in table.items():
        assert (village / name).exists()
        assert [t["label"] for t in things] == ["hut", "lantern", "animal"]
        for x0, y0, x1, y1 in (t["box"] for t in things):
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
    found = init.read_boxes(village, common.find_split(village, "train", "A"))
    assert len(found) == 8


def test_toy_objects_shine_by_night_and_the_rest_is_dark(village):
    table = json.loads((village / "boxes.json").read_text())
    for i in range(8):
        day, night = (np.asarray(Image.open(village / f"test{s}/{i:04d}.png")).astype(float)
                      for s in "AB")
        inside = np.zeros((64, 64), dtype=bool)
        for x0, y0, x1, y1 in (t["box"] for t in table[f"testA/{i:04d}.png"]):
            inside[y0:y1, x0:x1] = True
        assert table[f"testA/{i:04d}.png"] == table[f"testB/{i:04d}.png"]
        assert night[~inside].max() < 180 and night[inside].max() > 200
        assert day[~inside].mean() > 2 * night[~inside].mean()
        bright = night.max(2) > 190  # what shines, shines in one colour
        hues = night[bright] / night[bright].max(1)[:, None]
        assert np.median(np.ptp(hues, axis=0)) < 0.35


def test_scores_of_the_chosen_split(village, monkeypatch):
    seen = []
    monkeypatch.setattr(toy, "night_scores", lambda x, r, y_hat, y, boxes: seen.append((x, boxes)))
    args = tiny_args("--split", "val")
    args.data, (m, table) = "toy", (init.build(args, CPU),
                                    json.loads((village / "boxes.json").read_text()))
    init.truth_scores(m.G_X, m.G_Y, village, args, CPU)
    (x, boxes), = seen
    assert torch.equal(x[3], common.to_tensor(common.open_rgb(village / "valA/0003.png")))
    assert boxes == [table[f"valA/{i:04d}.png"] for i in range(8)]


def test_toy_pairs_share_a_night(village):
    sky = [np.asarray(Image.open(village / f"testB/{i:04d}.png"))[:4] for i in range(8)]
    sky = [v.mean((0, 1)) / v.mean((0, 1)).sum() for v in sky]
    same = [np.abs(sky[i] - sky[i + 1]).sum() for i in (0, 2, 4, 6)]
    other = [np.abs(sky[i] - sky[i + 1]).sum() for i in (1, 3, 5)]
    assert max(same) < 0.08 < max(other)


def test_toy_scores_by_hand(tmp_path):
    x, y = np.zeros((1, 3, 8, 8)), np.zeros((1, 3, 8, 8))
    y[:, :, 2:4, 2:4], y[:, :, 6:] = 1, -1
    boxes = [[{"box": [2, 2, 4, 4], "label": "hut"}]]
    inside, outside = toy.night_scores(x, y, y, y, boxes)
    assert (inside["name"], inside["value"]) == ("object error", 0)
    assert inside["trivial"]["copy the input"] == pytest.approx(127.5)
    assert outside["trivial"]["copy the input"] == pytest.approx(127.5 * 16 / 60)
    assert outside["trivial"]["copy the reference"] == 0 == outside["value"]
    with pytest.raises(ValueError, match="n_test"):
        toy.draw("day2night", tmp_path / "nowhere", n=1, n_test=3)


def test_toy_is_drawn_once_and_the_same(tmp_path, village):
    folder = toy.ensure("day2night", 16, root=tmp_path, n=2)
    assert toy.ensure("day2night", 16, root=tmp_path, n=2) == folder
    toy.draw("day2night", tmp_path / "again", n=2, size=64, n_test=2)
    for name in ("trainA/0001.png", "testB/0001.png"):
        assert (tmp_path / "again" / name).read_bytes() == (village / name).read_bytes()


# ---- runs ------------------------------------------------------------------------------------


def test_run_folder(trained):
    files = {str(f.relative_to(trained)) for f in trained.rglob("*") if f.is_file()}
    assert files == {"config.json", "log.csv", "index.html", "last.pt", "result.json",
                     "samples/step_000000.png", "samples/step_000002.png"}
    rows = (trained / "log.csv").read_text().splitlines()
    assert rows[0] == ("step,g,cg,sg,adv_g,D_g,cyc_g,o,co,so,adv_o,D_o,cyc_o,seconds")
    assert len(rows) == 3 and all(row.count(",") == rows[0].count(",") for row in rows)


@pytest.mark.parametrize("flags", [[], ["--no-share-discriminator", "--decay-every", "2"],
                                   ["--method", "munit"]])
def test_resumed_run_is_bit_identical(folder, tmp_path, flags):
    flags = ["--data", folder, *TINY, *flags, "--steps", 4]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(init, lambda: run(*flags, "--out", tmp_path / "parts"), step=2)
    run(*flags, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 4
    assert_same(a["parts"], b["parts"])


@pytest.mark.slow
def test_processes_agree_when_only_one_has_objects(folder, tmp_path):
    """Batch 1 of two: some steps have no crops in one process; both must end with equal weights."""
    flags = ["--data", str(folder), *TINY, "--batch", "1", "--no-share-discriminator",
             "--steps", "4", "--out", str(tmp_path / "two")]
    (tmp_path / "go.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, common, init
build, built = init.build, []
init.build = lambda *a: built.append(build(*a)) or built[-1]
def main():
    init.main(sys.argv[1:])
    torch.save({{k: getattr(built[0], k).state_dict() for k in ("G_X", "D_X", "D_Xo", "D_Yo")}},
               {str(tmp_path)!r} + "/" + os.environ["RANK"])
common.entry(main)
""")
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", str(tmp_path / "go.py"), *flags],
                         capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr
    assert_same(*(torch.load(tmp_path / rank, weights_only=True) for rank in "01"))


# ---- translate and evaluate ------------------------------------------------------------------


def test_translate_keeps_every_size_and_needs_no_boxes(trained, tmp_path):
    sizes = odd_pictures(tmp_path / "in")
    run("--translate", tmp_path / "in", "--weights", trained / "last.pt", "--out", tmp_path / "out")
    written = {f.stem: Image.open(f) for f in (tmp_path / "out").iterdir()}
    assert {stem: im.size for stem, im in written.items()} == sizes


def test_styles_stand_side_by_side_and_an_exemplar_gives_its_own(trained, folder, tmp_path):
    flags = ["--translate", folder / "testA/1.png", "--weights", trained / "last.pt", "--device",
             "cpu"]
    run(*flags, "--styles", 3, "--out", tmp_path / "three")
    three = np.asarray(Image.open(tmp_path / "three/1.png")).astype(int)
    assert three.shape == (40, 3 * 48, 3)
    run(*flags, "--out", tmp_path / "one")
    one = np.asarray(Image.open(tmp_path / "one/1.png")).astype(int)
    assert np.abs(three[:, :48] - one).max() <= 1 < np.abs(three[:, 48:96] - one).max()
    run(*flags, "--exemplar", folder / "testB/2.png", "--out", tmp_path / "ref")
    args = init.get_args(["--weights", str(trained / "last.pt"), "--data", str(folder)])
    G_X, G_Y = init.load_generators(args, CPU)
    im = Image.open(folder / "testB/2.png").resize((43, 36), Image.BICUBIC)  # short side: --load
    s = G_Y.style(common.to_tensor(im)[None])
    x = common.to_tensor(common.open_rgb(folder / "testA/1.png"))[None]
    expected = np.asarray(common.to_pil(G_Y.decode(G_X.content(x), s)[0])).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "ref/1.png")) - expected).max() <= 1


def test_direction_swaps_the_networks(trained):
    parts = torch.load(trained / "last.pt", weights_only=True)["parts"]
    for flags, order in (([], ("G_X", "G_Y")), (["--direction", "BtoA"], ("G_Y", "G_X"))):
        args = init.get_args(["--weights", str(trained / "last.pt"), *flags])
        for net, name in zip(init.load_generators(args, CPU), order, strict=True):
            assert_same(dict(net.state_dict()), dict(parts[name]))


def test_evaluate_names_its_networks(trained, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(init, "INPUTS", 2)
    monkeypatch.setattr(metrics, "domain_classifier", partial(metrics.domain_classifier, steps=5))
    flags = ["--evaluate", "--weights", trained / "last.pt", "--data", folder]
    run(*flags, "--lpips", "random")
    out = capsys.readouterr().out
    assert "diversity, LPIPS-style distance of an UNTRAINED VGG (2 inputs x 19 pairs)" in out
    assert "real pictures:" in out
    assert "CIS (a SMALL classifier of the domains" in out
    values = [float(line.split("): ")[1].split()[0]) for line in out.splitlines() if "IS (" in line]
    assert len(values) == 2 and all(1 <= v <= 2 for v in values)


def test_lpips_without_weights_is_one_line(trained, folder, monkeypatch, capsys):
    pytest.importorskip("torchmetrics", reason="pip install -r lab/requirements.txt")

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", no_network)
    line = run_fails(capsys, "--evaluate", "--weights", trained / "last.pt", "--data", folder)
    assert "--lpips random" in line and "no network" in line


def test_evaluate_on_toy_data_repeats_the_score(village, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(init, "data_folder", lambda args: village)
    monkeypatch.setattr(init, "INPUTS", 1)
    monkeypatch.setattr(metrics, "domain_classifier", partial(metrics.domain_classifier, steps=5))
    run("--data", "toy", *TINY[2:], "--size", 32, "--steps", 1, "--out", tmp_path / "run")
    trained = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    capsys.readouterr()
    run("--evaluate", "--weights", tmp_path / "run/last.pt")
    out = capsys.readouterr().out
    assert [s["name"] for s in trained] == ["object error", "background error"]
    for s in trained:
        assert f"{s['name']}: {s['value']:.4g} " in out


def test_user_errors_are_one_line(folder, trained, tmp_path, capsys):
    assert "nowhere" in run_fails(capsys, "--data", tmp_path / "nowhere")
    for flags in (["--size", 34], ["--size", 16, "--dis-layers", 4], ["--object-size", 12],
                  ["--objects", 0], ["--styles", 0], ["--decay-every", 0], ["--steps", 0]):
        line = run_fails(capsys, "--data", folder, *TINY, *flags)
        assert flags[0] in line
    assert "--multi-scale" in run_fails(capsys, "--data", folder, *TINY, "--multi-scale",
                                        "--dis-scales", 4)
    assert "--styles" in run_fails(capsys, "--data", folder, "--styles", 2, "--exemplar", "a.png")
    assert "--weights" in run_fails(capsys, "--translate", folder / "testA")
    torch.save({"a": {"mlp.model.0.fc.weight": torch.zeros(4, 3)}}, tmp_path / "part.pt")
    assert "MUNIT" in run_fails(capsys, "--translate", folder / "testA/0.png", "--weights",
                                tmp_path / "part.pt")
    state = torch.load(trained / "last.pt", weights_only=True)
    torch.save(state | {"method": "cut"}, tmp_path / "other.pt")
    assert "cut.py" in run_fails(capsys, "--evaluate", "--weights", tmp_path / "other.pt")
    assert "none.png" in run_fails(capsys, "--translate", folder / "testA", "--weights",
                                   trained / "last.pt", "--exemplar", tmp_path / "none.png")
    (folder / "trainB/1.png").write_text("not a picture")
    assert "1.png" in run_fails(capsys, "--data", folder, *TINY, "--out", tmp_path / "r")


# ---- learning ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_learns_the_toy_world(tmp_path, monkeypatch):
    """A tenth of the toy run at half the size: every reconstruction improves; objects are closer
    to the truth than the reference's, the background than after one change of colours."""
    toy.draw("day2night", tmp_path / "toy", n=20, size=32, n_test=4)
    monkeypatch.setattr(init, "data_folder", lambda args: tmp_path / "toy")
    run("--size", 32, "--load", 32, "--object-size", 16, "--min-box", 3, "--steps", 100,
        "--dis-layers", 2, "--ngf", 8, "--ndf", 8, "--device", "cpu", "--lr", 2e-3,
        "--log-every", 10, "--out", tmp_path / "run")
    rows = [line.split(",") for line in (tmp_path / "run/log.csv").read_text().splitlines()]
    first, last = (dict(zip(rows[0], map(float, row), strict=True)) for row in (rows[1], rows[-1]))
    for name in ("g", "cg", "cyc_g", "o", "co"):
        assert last[name] < 0.8 * first[name], name
    objects, background = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    assert objects["value"] < 0.95 * objects["trivial"]["copy the reference"]
    assert background["value"] < 0.95 * background["trivial"]["one change of colours"]
