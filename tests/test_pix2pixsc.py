"""pix2pixsc.py: every equation against a plain transcription, pairs, and the script in use."""
# ruff: noqa: E741 (I is the paper's name for the exemplar)

import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import assert_same, error_of, interrupted
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import common
import pix2pixsc as sc
from lab import metrics, toy
from lab.toy import clips, disk, world

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--ngf", "2", "--ndf", "2", "--blocks", "1", "--downs", "2", "--batch", "2",
        "--vgg", "random", "--vgg-layers", "3", "--workers", "0", "--device", "cpu", "--log-every",
        "1"]
KINDS = {"ids": "png", "picture": "png", "landmarks": "txt"}
CPU = torch.device("cpu")


def tiny_args(*flags):
    return sc.get_args(["--data", ".", *TINY, "--labels", "3", *flags])


def write_face(path, rng, w=40, h=40):
    """68 plausible landmarks: a jaw, and the rest inside of it."""
    t = np.linspace(0, np.pi, 17)
    jaw = np.stack([w / 2 - 0.4 * w * np.cos(t), h * (0.4 + 0.5 * np.sin(t))], 1)
    rest = rng.uniform(0.3, 0.7, (51, 2)) * (w, h)
    np.savetxt(path, np.concatenate([[[w, h]], jaw, rest]), fmt="%.3f")


def write_data(root, kind="ids", flat=False, clips=("a", "b_c", "d"), frames=4):
    """Small noise clips, each around its own brightness, with label maps of three classes."""
    rng = np.random.default_rng(0)
    for split, (c, clip), f in itertools.product(("train", "test"), enumerate(clips),
                                                 range(frames)):
        image, label = ((root / f"{split}_{what}" / (f"{clip}_{f}" if flat else f"{clip}/{f}"))
                        for what in ("img", "label"))
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(60 * c, 60 * c + 80, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"{image}.png")
        if kind == "landmarks":
            write_face(f"{label}.txt", rng)
        elif kind == "picture":
            Image.fromarray(noise[::-1].copy()).save(f"{label}.png")
        else:
            ids = np.kron(rng.integers(0, 3, (9, 10), dtype=np.uint8), np.ones((4, 4), np.uint8))
            Image.fromarray(ids).save(f"{label}.png")
    return root


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def batch_of(args, seed=0):
    torch.manual_seed(seed)
    return sc.random_batch(args, CPU)


def double(m):
    for net in (m.G, m.D_R, m.D_SC, m.V):
        net.double()
    return m


def double_batch(args):
    x, z, F_I, I, y_S, y_N, consistent = batch_of(args)
    return [x, z.double(), F_I, I.double(), y_S.double(), y_N.double(), consistent]


@pytest.fixture
def float64(monkeypatch):
    """The step with one-hot maps in float64."""
    encode = sc.encode
    monkeypatch.setattr(sc, "encode", lambda label, args: encode(label, args).double())


# ---- networks -------------------------------------------------------------------------------


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("labels, of_G, of_D", [(15, 182_537_347, 2_780_097),
                                                (23, 182_587_523, 2_788_289),
                                                (42, 182_706_691, 2_807_745)])
def test_parameter_counts_of_the_papers_three_tasks(labels, of_G, of_D):
    with torch.device("meta"):
        assert count(sc.Generator(labels)) == of_G
        assert count(sc.PatchGAN(labels + 3, padding=2)) == of_D
        assert count(sc.PatchGAN(6, padding=2)) == 2_767_809


def test_papers_defaults():
    args = sc.get_args(["--data", "."])
    assert (args.lambda_1, args.lambda_2, args.lambda_FM, args.T) == (10, 10, 0, 10)
    assert (args.lr, args.beta1, args.beta2, args.batch, args.size) == (2e-4, 0.5, 0.999, 1, 256)
    assert (args.ngf, args.ndf, args.blocks, args.downs, args.adaptive) == (64, 64, 9, 4, True)
    assert sc.get_args(["--data", ".", "--ablation", "L_SC"]).lambda_2 == 0
    assert sc.get_args(["--data", ".", "--ablation", "L_SCAdv"]).lambda_1 == 0
    assert sc.get_args(["--data", ".", "--ablation", "adaptive"]).adaptive is False


def test_generator_shapes():
    """The layers of App. B.1 at a sixteenth of the width, at the street views' 256x144."""
    G = sc.Generator(5, ngf=4)
    x, I = torch.rand(1, 5, 144, 256), torch.rand(1, 3, 144, 256)
    seen = []
    for layer in G.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[1:])))
    y = G(x, x, I)
    assert y.shape == I.shape and y.abs().max() <= 1
    for shape in ((4, 144, 256), (8, 72, 128), (16, 36, 64), (32, 18, 32), (64, 9, 16)):
        assert shape in seen
    assert sum(isinstance(layer, sc.ResnetBlock) for layer in G.layers) == 9
    with torch.device("meta"):
        assert sc.PatchGAN(6, padding=2)(torch.rand(1, 6, 144, 256)).shape == (1, 1, 21, 35)


def test_discriminator_grid_and_receptive_field():
    with torch.device("meta"):
        D = sc.PatchGAN(6, padding=2)
        logits, maps = D(torch.rand(1, 6, 256, 256), True)
    assert logits.shape == (1, 1, 35, 35)
    assert [tuple(f.shape[1:]) for f in maps] == [(64, 129, 129), (128, 65, 65), (256, 33, 33),
                                                  (512, 34, 34)]
    D = sc.PatchGAN(1, 1, norm=None, padding=2).double()
    for p in D.parameters():
        nn.init.ones_(p)
    x = torch.zeros(1, 1, 160, 160, dtype=torch.double, requires_grad=True)
    out = D(x)
    grad, = torch.autograd.grad(out[0, 0, out.shape[2] // 2, out.shape[3] // 2], x)
    rows = grad[0, 0].abs().sum(1).nonzero().flatten()
    assert len(rows) == rows[-1] - rows[0] + 1 == 70


def test_generator_cannot_see_a_shift_of_all_of_I():
    """What the docstring says: the first normalisation removes it."""
    G = sc.Generator(3, 4, 2, 1).double()
    x, F_I, I = (torch.rand(1, c, 16, 16, dtype=torch.double) for c in (3, 3, 3))
    shift = torch.tensor([0.3, -0.2, 0.1], dtype=torch.double).view(1, 3, 1, 1)
    torch.testing.assert_close(G(x, F_I, I), G(x, F_I, I + shift), rtol=1e-4, atol=1e-4)
    assert (G(x, F_I, I) - G(x, F_I, 2 * I)).abs().max() > 1e-2


def test_weights_start_as_in_appendix_c():
    m = sc.build(tiny_args("--ngf", "16", "--downs", "3"), CPU)
    for net in (m.G, m.D_R, m.D_SC):
        weights = torch.cat([p.detach().flatten() for p in net.parameters() if p.dim() == 4])
        assert abs(float(weights.mean())) < 1e-3 and 0.017 < float(weights.std()) < 0.023


# ---- losses ---------------------------------------------------------------------------------


def test_style_consistency_has_three_terms():
    """Eq. (5) in least squares, term by term and sign by sign."""
    S, N, fake = torch.randn(3, 2, 1, 5, 5, dtype=torch.double)
    expected = 0.0
    for logits, target in ((S, 1.0), (N, 0.0), (fake, 0.0)):
        expected += sum((float(v) - target)**2 for v in logits.flatten()) / logits.numel()
    assert float(sc.style_consistency(S, N, fake)) == pytest.approx(expected / 2, rel=1e-12)
    best = sc.style_consistency(torch.ones(1), torch.zeros(1), torch.zeros(1))
    assert float(best) == 0
    for wrong in ((0, 0, 0), (1, 1, 0), (1, 0, 1)):  # each term alone costs one half
        assert float(sc.style_consistency(*torch.tensor(wrong).float()[:, None])) == 0.5


def features(seed):
    rng = torch.Generator().manual_seed(seed)
    return {f"relu{i}_1": torch.randn(3, c, 64 >> i, 48 >> i, generator=rng, dtype=torch.double)
            for i, c in ((1, 4), (2, 8), (3, 16), (4, 32), (5, 32))}


@pytest.mark.parametrize("flags", [[], ["--w", "paper"], ["--no-adaptive"],
                                   ["--w", "paper", "--no-adaptive"]])
def test_adaptive_semantic_in_a_mixed_batch(flags):
    """Eq. (6) with loops; the weight is each sample's own."""
    args, fake, real = tiny_args(*flags), features(0), features(1)
    consistent = torch.tensor([True, False, True])
    expected = 0.0
    for b in range(3):
        for i, name in enumerate(fake):
            norm = float((fake[name][b] - real[name][b]).abs().sum())
            M = fake[name][b].numel()
            deepest = fake["relu5_1"][b].numel()
            same = bool(consistent[b]) or not args.adaptive
            if args.w == "paper":
                w = 1.0 if same else deepest / M
            else:
                w = deepest / M + (2.0 if same else 0.0)
            expected += w * norm / M
            assert i < 5
    value = sc.adaptive_semantic(fake, real, consistent, args)
    assert float(value) == pytest.approx(expected / 3, rel=1e-6)


def test_semantic_weights_are_those_of_vgg_at_any_size():
    V = common.VGG([f"relu{i}_1" for i in range(1, 6)], "random", normalise=False)
    maps = list(V(torch.zeros(2, 3, 48, 64)).values())
    consistent = torch.tensor([True, False])
    deep = torch.tensor([1 / 32, 1 / 16, 1 / 8, 1 / 4, 1])
    w = sc.semantic_weights(maps, consistent, tiny_args("--w", "paper"))
    assert torch.equal(w[0], torch.ones(5)) and torch.equal(w[1], deep)
    w = sc.semantic_weights(maps, consistent, tiny_args())
    assert torch.equal(w[0], deep + 2) and torch.equal(w[1], deep)
    w = sc.semantic_weights(maps, consistent, tiny_args("--no-adaptive"))
    assert torch.equal(w[0], w[1])


def test_feature_matching():
    a, b = (list(features(s).values()) for s in (0, 1))
    expected = sum(float((x - y).abs().sum()) / x.numel() for x, y in zip(a, b, strict=True))
    b = [y.requires_grad_() for y in b]
    a = [x.requires_grad_() for x in a]
    loss = sc.feature_matching(a, b)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert all(x.grad is not None for x in a) and all(y.grad is None for y in b)


# ---- the step -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, style", [(["--vgg-layers", "5"], 1.0), ([], 0.3), ([], 0.0),
                                          (["--w", "paper"], 1.0),
                                          (["--lambda-FM", "10"], 1.0),
                                          (["--ablation", "L_SC"], 1.0),
                                          (["--ablation", "L_SCAdv"], 1.0)])
def test_step_is_the_gradient_of_the_objective(flags, style, float64):
    """All gradients of one step, against Eqs. (3) to (7) written down in one place."""
    args = tiny_args(*flags, "--lr", "0")
    m = sc.build(args, CPU)
    m.V = m.V or common.VGG(["relu1_1"], "random", normalise=False)
    double(m)
    x, z, F_I, I, y_S, y_N, consistent = batch = double_batch(args)
    losses = sc.train_step(m, *batch, args, None, style=style)
    X, FI = sc.encode(x, args), sc.encode(F_I, args)
    y_hat = m.G(X, FI, I)

    def mse(logits, target):
        return ((logits - target)**2).mean()

    def R(y, features=False):
        return m.D_R(torch.cat([X, y], 1), features)

    def SC(y):
        return m.D_SC(torch.cat([y, I], 1))

    L_R = 0.5 * (mse(R(y_hat.detach()), 0) + mse(R(z), 1))
    L_SC = 0.5 * (mse(SC(y_hat.detach()), 0) + mse(SC(y_S), 1) + mse(SC(y_N), 0))
    L_G = mse(R(y_hat), 1)
    if args.lambda_FM:
        for a, b in zip(R(y_hat, True)[1], R(z, True)[1], strict=True):
            L_G = L_G + args.lambda_FM * (a - b.detach()).abs().mean()
    if args.lambda_1:
        L_G = L_G + style * args.lambda_1 * mse(SC(y_hat), 1)
    if args.lambda_2:
        content = sc.adaptive_semantic(m.V(y_hat), m.V(z), consistent, args)
        L_G = L_G + args.lambda_2 * content
        assert losses["SC"].item() == pytest.approx(content.item(), rel=1e-9)
    assert losses["D_R"].item() == pytest.approx(L_R.item(), rel=1e-9)
    checks = [(m.G, L_G), (m.D_R, L_R)] + ([(m.D_SC, L_SC)] if args.lambda_1 else [])
    for net, loss in checks:
        grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        for p, g in zip(net.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-10)
    if not args.lambda_1:
        assert all(p.grad is None for p in m.D_SC.parameters())


def test_gradient_routing():
    """D_SC's step sees y_hat detached; nobody optimises I, z or VGG; G alone gets its losses."""
    args = tiny_args()
    m = sc.build(args, CPU)
    batch = batch_of(args)
    for t in batch:
        if t.is_floating_point():
            t.requires_grad_()
    when = {}
    for name in ("G", "D_R", "D_SC"):
        step = getattr(m, f"opt_{name}").step

        def spy(*a, name=name, step=step):
            when[name] = {n: [p.grad is not None for p in getattr(m, n).parameters()]
                          for n in ("G", "D_R", "D_SC")}
            return step(*a)

        getattr(m, f"opt_{name}").step = spy
    sc.train_step(m, *batch, args, None)
    assert list(when) == ["D_R", "D_SC", "G"]
    assert all(when["D_R"]["D_R"]) and not any(when["D_R"]["D_SC"]) and not any(when["D_R"]["G"])
    assert all(when["D_SC"]["D_SC"]) and not any(when["D_SC"]["G"])
    assert all(when["G"]["G"])
    assert all(p.grad is None and not p.requires_grad for p in m.V.parameters())
    # I, z, y_S, y_N: leaves of a graph in this test only; the step must leave no trace in D's
    grads = [p.grad.clone() for p in m.D_SC.parameters()]
    for name in ("G", "D_R", "D_SC"):
        getattr(m, f"opt_{name}").param_groups[0]["lr"] = 0.0
    sc.train_step(m, *batch, args, None, style=0.0)
    before = [p.grad.clone() for p in m.D_SC.parameters()]
    sc.train_step(m, *batch, args, None, style=1.0)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, m.D_SC.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))


def test_first_phase_hides_D_SC_from_G_but_trains_it():
    args = tiny_args()
    batch, after = batch_of(args), {}
    for style in (0.0, 1.0):
        m = sc.build(args, CPU)
        start = [p.clone() for p in m.D_SC.parameters()]
        sc.train_step(m, *batch, args, None, style=style)
        assert not all(torch.equal(a, b) for a, b in zip(start, m.D_SC.parameters(), strict=True))
        after[style] = torch.cat([p.flatten() for p in m.G.parameters()])
    without = sc.build(tiny_args("--ablation", "L_SCAdv"), CPU)
    sc.train_step(without, *batch, tiny_args("--ablation", "L_SCAdv"), None)
    torch.testing.assert_close(torch.cat([p.flatten() for p in without.G.parameters()]), after[0.0])
    assert not torch.equal(after[0.0], after[1.0])


def test_phases():
    """App. C: off for a quarter, on, and in the second half the rate falls to zero."""
    phases = [sc.phase(step, 1000, "paper") for step in range(1000)]
    assert [s for s, _ in phases] == [0.0] * 250 + [1.0] * 750
    rates = [r for _, r in phases]
    assert rates[:501] == [1.0] * 501 and rates[-1] == pytest.approx(1 / 500)
    assert np.allclose(np.diff(rates[500:]), -1 / 500)
    assert [sc.phase(s, 1700, "face")[0] for s in (499, 500, 550, 600, 700)] == [0, .1, .3, .5, 1]
    assert sc.phase(0, 400, "scene") == (1.0, 1.0)
    assert sc.phase(300, 400, "scene")[1] == 0.5
    assert sc.phase(3, 4, "paper")[1] == 0.5


@pytest.mark.parametrize("flags", [["--amp"], ["--batch", "1"], ["--vgg-resize", "--batch", "1"],
                                   ["--label-kind", "landmarks"], ["--label-kind", "picture"],
                                   ["--no-channels-last", "--batch", "3"]])
def test_variants_train(flags):
    args = tiny_args(*flags)
    m = sc.build(args, CPU)
    before = [p.clone() for net in (m.G, m.D_R, m.D_SC) for p in net.parameters()]
    for step in range(2):
        losses = sc.train_step(m, *batch_of(args, step), args, None)
        assert set(losses) == {"StdAdv", "D_R", "SCAdv", "D_SC", "SC"}
        assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())
    after = [p for net in (m.G, m.D_R, m.D_SC) for p in net.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_operations_can_be_counted():
    """bench.py counts them; and weightless terms cost nothing."""
    counts = {}
    for flags, style in (([], 1.0), ([], 0.0), (["--lambda-1", "0"], 1.0),
                         (["--lambda-2", "0"], 1.0)):
        args = tiny_args(*flags)
        m, batch = sc.build(args, CPU), batch_of(args)
        with FlopCounterMode(display=False) as counter:
            sc.train_step(m, *batch, args, None, style=style)
        counts[(*flags, style)] = counter.get_total_flops()
    assert counts["--lambda-1", "0", 1.0] < counts[0.0,] < counts[1.0,]
    assert counts["--lambda-2", "0", 1.0] < counts[1.0,] / 2


# ---- pairs ----------------------------------------------------------------------------------


def frames_of(clips, groups=None):
    """clips: {name: number of frames}."""
    return [sc.Frame(f"{c}/{i}", Path(), Path(), c, i, (groups or {}).get(c))
            for c, n in clips.items() for i in range(n)]


@pytest.mark.parametrize("seed", range(40))
def test_pairs_never_mix(seed):
    """Random clips, windows and groups: what is drawn as one style is one, and never as two."""
    rng = random.Random(seed)
    clips = {f"clip{c}": rng.randint(1, 25) for c in range(rng.randint(2, 6))}
    groups = {c: str(i % 2) for i, c in enumerate(clips)} if seed % 2 else None
    frames, T = frames_of(clips, groups), rng.randint(1, 12)
    pairs = sc.Pairs(frames, T)
    for _ in range(60):
        i = rng.randrange(len(frames))
        a = frames[i]
        for same in (True, False):
            j = pairs.draw(rng, i, same)
            b = frames[j]
            if groups:
                assert (groups[a.clip] == groups[b.clip]) is same
            elif same:
                assert a.clip == b.clip and abs(a.number - b.number) <= T
            else:
                assert a.clip != b.clip
            assert j != i or (same and sum(pairs.consistent(i, k) is True
                                           for k in range(len(frames))) == 1)
            assert pairs.consistent(i, j) is same is pairs.consistent(j, i)


def test_every_consistent_frame_is_drawn():
    frames = frames_of({"a": 30, "b": 5})
    pairs, rng = sc.Pairs(frames, 10), random.Random(0)
    assert {pairs.draw(rng, 15, True) for _ in range(2000)} == set(range(5, 26)) - {15}
    assert {pairs.draw(rng, 2, True) for _ in range(2000)} == set(range(13)) - {2}
    assert {pairs.draw(rng, 15, False) for _ in range(2000)} == set(range(30, 35))
    assert pairs.consistent(0, 11) is None  # one clip, far apart: neither


def test_samples_keep_their_promises(data, monkeypatch):
    """x and F_I belong to z and I; y_S, y_N and the flag are right; all by (seed, n) alone."""
    args = sc.get_args(["--data", str(data), *TINY, "--labels", "3", "--T", "2",
                        "--same-style", "0.5"])
    frames = sc.find_frames(data, "train", args)
    clips = sc.Clips(frames, args)
    for a, b in zip(clips[5], sc.Clips(frames, args)[5], strict=True):
        assert torch.equal(a, b)
    seen = []
    monkeypatch.setattr(sc, "read_image",
                        lambda path, size: seen.append(path) or torch.zeros(3, 1, 1))
    monkeypatch.setattr(sc, "read_label",
                        lambda path, args, size: seen.append(path) or torch.zeros(1, 1, 1))
    flags = []
    for n in range(60):
        seen.clear()
        same = bool(clips[n][-1])
        flags.append(same)
        x, F_I, z, I, y_S, y_N = seen
        assert (x.stem, x.parent.name) == (z.stem, z.parent.name)
        assert (F_I.stem, F_I.parent.name) == (I.stem, I.parent.name)
        assert (z.parent == I.parent) is same
        assert y_S.parent == I.parent != y_N.parent
        if same:
            assert 0 < abs(int(z.stem) - int(I.stem)) <= 2
    assert 15 < sum(flags) < 45


def test_every_epoch_shows_every_target_once(data, monkeypatch):
    args = sc.get_args(["--data", str(data), *TINY, "--labels", "3"])
    clips = sc.Clips(sc.find_frames(data, "train", args), args)
    seen = []
    draw = clips.pairs.draw
    clips.pairs.draw = lambda rng, i, same: seen.append(i) or draw(rng, i, same)
    for n in range(24):
        clips[n]
    targets = seen[0::3]
    assert sorted(targets[:12]) == sorted(targets[12:]) == list(range(12))
    assert targets[:12] != targets[12:]


def test_mirrored_together(tmp_path):
    """A picture that is its own label stays in step with it."""
    root = write_data(tmp_path / "data")
    for f in (root / "train_img").rglob("*.png"):
        label = Image.open(str(f).replace("_img", "_label"))
        label.point(lambda v: v * 100).convert("RGB").save(f)
    args = sc.get_args(["--data", str(root), *TINY, "--labels", "3", "--size", "40",
                        "--height", "36"])
    clips = sc.Clips(sc.find_frames(root, "train", args), args)
    for n in range(12):
        x, z, F_I, I, *_ = clips[n]
        for label, picture in ((x, z), (F_I, I)):
            assert torch.equal(((picture[:1] + 1) * 1.275).round().byte(), label)


# ---- layouts, labels, groups ----------------------------------------------------------------


def test_folders_and_flat_names_give_the_same_clips(tmp_path):
    args = tiny_args()
    for flat in (False, True):
        root = write_data(tmp_path / str(flat), flat=flat, frames=12)
        frames = sc.find_frames(root, "train", args)
        assert [(f.clip, f.number) for f in frames] == [
            (c, i) for c in ("a", "b_c", "d") for i in range(12)]
        assert [int(f.image.stem.split("_")[-1]) for f in frames[:12]] == list(range(12))
        assert all(f.image.stem == f.label.stem for f in frames)  # 10 comes after 9, not after 1


def test_size_follows_the_first_pictures_shape(tmp_path):
    frames = sc.find_frames(write_data(tmp_path), "train", tiny_args())
    assert sc.picture_size(frames, tiny_args("--size", "40")) == (40, 36)
    assert sc.picture_size(frames, tiny_args("--size", "64")) == (64, 56)
    assert sc.picture_size(frames, tiny_args("--size", "64", "--height", "32")) == (64, 32)


def test_style_groups_of_clips_and_pictures(tmp_path):
    frames = sc.find_frames(write_data(tmp_path / "d", flat=True), "train", tiny_args())
    (tmp_path / "g.txt").write_text("a day  # comment\nb_c,day\n\nd_0 dusk\nd night\n")
    groups = [f.group for f in sc.with_groups(frames, str(tmp_path / "g.txt"))]
    assert groups == ["day"] * 8 + ["dusk"] + ["night"] * 3
    folders = sc.find_frames(write_data(tmp_path / "f", clips=("0", "1")), "train", tiny_args())
    (tmp_path / "g.txt").write_text("0 day\n1 dusk\n0/2.png rain")  # a frame named like a clip
    groups = [f.group for f in sc.with_groups(folders, str(tmp_path / "g.txt"))]
    assert groups == ["day", "day", "rain", "day"] + ["dusk"] * 4
    (tmp_path / "g.txt").write_text("a day\nb_c dusk\n")
    with pytest.raises(common.UserError, match="names neither d_0 nor d"):
        sc.with_groups(frames, str(tmp_path / "g.txt"))


def test_bdd100k_groups_are_table_7(tmp_path):
    table = {1: ("clear", "night"), 2: ("foggy", "dawn/dusk"), 3: ("overcast", "daytime"),
             4: ("rainy", "dawn/dusk"), 5: ("snowy", "dawn/dusk"), 6: ("clear", "dawn/dusk"),
             7: ("foggy", "daytime"), 8: ("partly cloudy", "dawn/dusk"), 9: ("rainy", "daytime"),
             10: ("snowy", "daytime"), 11: ("clear", "daytime"), 12: ("overcast", "dawn/dusk"),
             13: ("partly cloudy", "daytime"), None: ("undefined", "daytime")}
    rows = [{"name": f"p{g}.jpg", "attributes": {"weather": w, "timeofday": t, "scene": "x"}}
            for g, (w, t) in table.items()]
    rows.append({"name": "q.jpg", "attributes": {"weather": "snowy", "timeofday": "night"}})
    (tmp_path / "bdd.json").write_text(json.dumps(rows))
    frames = [sc.Frame(n, Path(), Path(), n, 0) for n in (*(f"p{g}" for g in table), "q")]
    found = {f.name: f.group for f in sc.with_groups(frames, str(tmp_path / "bdd.json"))}
    assert found == {f"p{g}": str(g) for g in table if g} | {"q": "1"}


def test_label_maps_of_all_modes_give_the_same_ids(tmp_path):
    ids = np.random.default_rng(0).integers(0, 3, (20, 24), dtype=np.uint8)
    ids[0, :3] = 0, 1, 2
    grey = Image.fromarray(ids)
    palette = grey.convert("P")
    palette.putpalette([c for i in range(256) for c in (i, 255 - i, 7)])
    deep = Image.fromarray(ids.astype(np.uint16))
    for name, im in (("L", grey), ("P", palette), ("I", deep)):
        im.save(tmp_path / f"{name}.png")
        label = sc.read_label(tmp_path / f"{name}.png", tiny_args())
        assert label.dtype == torch.uint8 and np.array_equal(label[0].numpy(), ids)
    one_hot = sc.encode(label[None], tiny_args())
    assert one_hot.shape == (1, 3, 20, 24) and torch.equal(one_hot.sum(1), torch.ones(1, 20, 24))
    assert torch.equal(one_hot.argmax(1)[0], label[0].long())
    ids[5] = 255
    Image.fromarray(ids).save(tmp_path / "255.png")
    assert (sc.read_label(tmp_path / "255.png", tiny_args("--labels", "4"))[0, 5] == 3).all()


def test_labels_are_counted(tmp_path, capsys):
    args = sc.get_args(["--data", ".", *TINY])
    root = write_data(tmp_path)
    sc.check_labels(sc.find_frames(root, "train", args), args)
    assert args.labels == 3 and "--labels 3" in capsys.readouterr().out
    args.labels = None
    Image.fromarray(np.full((36, 40), 255, np.uint8)).save(root / "train_label/a/0.png")
    sc.check_labels(sc.find_frames(root, "train", args), args)
    assert args.labels == 4
    args.labels = None
    Image.fromarray(np.full((36, 40), 300, np.uint16)).save(root / "train_label/a/0.png")
    with pytest.raises(common.UserError, match=r"0.png: holds the ids \[300\]"):
        sc.check_labels(sc.find_frames(root, "train", args), args)


def test_face_map_is_a_sketch_and_l1_distances():
    rng = np.random.default_rng(0)
    points = rng.uniform(3, 20, (68, 2))
    channels = sc.face_map(points, (24, 30))
    assert channels.shape == (15, 30, 24) and channels.dtype == np.uint8
    assert set(np.unique(channels[0])) == {0, 255}
    union = np.zeros((30, 24), bool)
    for distance in channels[1:]:
        on = np.argwhere(distance == 0)  # the curve, and what lies within 2 pixels of it
        assert len(on)
        union |= distance == 0
        for r, c in ((0, 0), (29, 23), (12, 7)):
            nearest = min(abs(a - r) + abs(b - c) for a, b in on)
            assert nearest / 3 <= distance[r, c] <= (nearest + 4) / 3 + 1
    assert not (channels[0] > 0)[~union].any()


def test_upper_outline_mirrors_the_jaw():
    t = np.linspace(0, np.pi, 17)
    jaw = np.stack([50 - 30 * np.cos(t), 50 + 30 * np.sin(t)], 1)
    sketch = sc.face_map(np.concatenate([jaw, np.full((51, 2), 50.0)]), (100, 100))[0]
    rows = np.argwhere(sketch > 0)[:, 0]
    assert rows.max() == 80 and rows.min() == 30  # two thirds as high above as below


# ---- the script -----------------------------------------------------------------------------


def run(*flags):
    sc.main([*map(str, flags)])


def run_fails(capsys, *flags):
    return error_of(capsys, sc.main, *flags)


@pytest.fixture
def trained(data, tmp_path):
    run("--data", data, *TINY, "--steps", 2, "--out", tmp_path / "run")
    return tmp_path / "run"


def test_run_folder(trained):
    files = {str(f.relative_to(trained)) for f in trained.rglob("*") if f.is_file()}
    assert files == {"config.json", "log.csv", "index.html", "last.pt", "result.json",
                     "samples/step_000000.png", "samples/step_000002.png"}
    assert json.loads((trained / "config.json").read_text())["labels"] == 3
    rows = (trained / "log.csv").read_text().splitlines()
    assert rows[0] == "step,StdAdv,D_R,SCAdv,D_SC,SC,seconds" and len(rows) == 3
    parts = torch.load(trained / "last.pt", weights_only=True)["parts"]
    assert set(parts) == {"G", "D_R", "D_SC", "opt_G", "opt_D_R", "opt_D_SC"}  # VGG is no part


@pytest.mark.parametrize("kind, flat", [("ids", True), ("picture", False), ("landmarks", True)])
def test_trains_translates_and_evaluates_every_kind(kind, flat, tmp_path, capsys):
    root, out = write_data(tmp_path / "data", kind, flat), tmp_path / "run"
    run("--data", root, *TINY, "--label-kind", kind, "--steps", 2, "--out", out)
    name = "a_0" if flat else "a/0"
    label = root / f"test_label/{name}.{KINDS[kind]}"
    run("--translate", label, "--weights", out / "last.pt", "--out", tmp_path / "t", "--exemplar",
        root / "test_img" / f"{name}.png".replace("a", "d"), "--exemplar-label",
        str(label).replace("test_label/a", "test_label/d"))
    expected = (40, 40) if kind == "landmarks" else (40, 36)
    assert Image.open(tmp_path / "t" / f"{label.stem}.png").size == expected


def test_resumed_run_is_bit_identical(data, tmp_path):
    flags = ["--data", data, *TINY, "--steps", 4]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(sc, lambda: run(*flags, "--out", tmp_path / "parts"))
    run("--data", data, "--workers", 0, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 4
    assert_same(a["parts"], b["parts"])


RANK = """
import sys, torch, common, pix2pixsc
save = common.Run.save
def keep(run):
    save(run)
    states = {n: run.parts[n].state_dict() for n in ("G", "D_R", "D_SC")}
    torch.save(states, run.folder / f"rank{run.rank}.pt")
common.Run.save = keep
pix2pixsc.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(data, tmp_path):
    flags = ["--data", str(data), *TINY, "--steps", "3", "--labels", "3"]
    env = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", WORLD_SIZE="2",
               MASTER_PORT=str(20000 + os.getpid() % 20000))
    two = [sys.executable, "-c", RANK, *flags, "--out", str(tmp_path / "two")]
    jobs = [subprocess.Popen(two, cwd=ROOT, env=dict(env, RANK=str(rank))) for rank in range(2)]
    run(*flags, "--batch", 4, "--out", tmp_path / "one")
    assert [job.wait() for job in jobs] == [0, 0]
    first, second = (torch.load(tmp_path / f"two/rank{rank}.pt") for rank in range(2))
    assert_same(first, second)
    one = torch.load(tmp_path / "one/last.pt", weights_only=True)["parts"]
    start = sc.build(sc.get_args(flags), CPU)
    for net in ("G", "D_R", "D_SC"):
        moved, apart = 0.0, 0.0
        for key, was in getattr(start, net).state_dict().items():
            if "bias" not in key:  # a bias before a norm gets rounding errors for a gradient
                moved += float((one[net][key] - was).abs().sum())
                apart += float((one[net][key] - first[net][key]).abs().sum())
        assert moved > 0 and apart < 0.02 * moved, net


def test_translate_is_g_at_the_label_maps_size(trained, data, tmp_path):
    ids = np.random.default_rng(0).integers(0, 3, (21, 35), dtype=np.uint8)
    (tmp_path / "maps").mkdir()
    Image.fromarray(ids).save(tmp_path / "maps/odd.png")
    Image.fromarray(ids[:1, :2]).save(tmp_path / "maps/tiny.png")
    Image.fromarray(np.tile(ids, (2, 2))[:24, :36]).save(tmp_path / "maps/even.png")
    exemplar = ["--exemplar", data / "test_img/d/1.png", "--exemplar-label",
                data / "test_label/d/1.png"]
    run("--translate", tmp_path / "maps", *exemplar, "--weights", trained / "last.pt",
        "--out", tmp_path / "out")
    sizes = {f.stem: Image.open(f).size for f in (tmp_path / "out").iterdir()}
    assert sizes == {"odd": (35, 21), "tiny": (2, 1), "even": (36, 24)}
    G = sc.Generator(3, 2, 2, 1)
    G.load_state_dict(torch.load(trained / "last.pt", weights_only=True)["parts"]["G"])
    args = tiny_args()
    x, F_I = (sc.encode(sc.read_label(p, args, (36, 24))[None], args)
              for p in (tmp_path / "maps/even.png", exemplar[3]))
    with torch.no_grad():
        y = G(x, F_I, sc.read_image(exemplar[1], (36, 24))[None])[0]
    written = np.asarray(Image.open(tmp_path / "out/even.png")).astype(int)
    expected = ((y + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(written - expected).max() <= 1


def released_state(G, blocks, downs):
    """G's weights under the keys of the authors' latest_net_G.pth."""
    first_block = 4 + 3 * downs
    after = first_block + blocks
    names = [f"model.{1 + 3 * i}" for i in range(downs + 1)]
    names += [f"model.{first_block + b}.conv_block.{i}" for b in range(blocks) for i in (1, 5)]
    names += [f"model.{after + 3 * i}" for i in range(downs + 1)]
    names[-1] = f"model.{after + 3 * downs + 1}"
    convs = [layer for layer in G.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    return {f"{name}.{kind}": getattr(conv, kind).detach().clone()
            for name, conv in zip(names, convs, strict=True) for kind in ("weight", "bias")}


def test_released_key_names_at_full_width():
    with torch.device("meta"):
        state = released_state(sc.Generator(15), 9, 4)
    assert {"model.1.weight", "model.13.bias", "model.16.conv_block.1.weight",
            "model.24.conv_block.5.bias", "model.25.weight", "model.34.bias",
            "model.38.weight"} < state.keys() and len(state) == 56
    assert state["model.1.weight"].shape == (64, 33, 7, 7)
    assert state["model.25.weight"].shape == (1024, 512, 3, 3)


@pytest.mark.parametrize("kind, L", [("ids", 5), ("picture", 3), ("landmarks", 15)])
def test_loads_the_authors_generators(tmp_path, kind, L):
    G = sc.Generator(L, 4, 3, 2)
    torch.save(released_state(G, 2, 3), tmp_path / "G.pth")
    args = sc.get_args(["--data", ".", "--weights", str(tmp_path / "G.pth"), "--label-kind", kind])
    loaded = sc.load_generator(args, CPU)
    x, I = torch.rand(1, L, 32, 32), torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(x, x, I), G(x, x, I)) and loaded.multiple == 8


def test_accuracies_against_loops():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, (2, 3, 8, 9))
    truth[truth == 2] = 3  # class 2 does not occur, but is found in places: IoU 0
    found[found == 4] = truth[truth == 4] = 1  # class 4: in neither
    t, f = truth.ravel(), found.ravel()
    known = t != 3
    there = [c for c in range(5) if ((t == c) & known).any()]
    either = [c for c in range(5) if (((t == c) | (f == c)) & known).any()]
    assert (there, either) == ([0, 1], [0, 1, 2, 3])
    of_class = [((f == c) & (t == c) & known).sum() / ((t == c) & known).sum() for c in there]
    iou = [((f == c) & (t == c) & known).sum() / ((((f == c) | (t == c)) & known).sum())
           for c in either]
    args = tiny_args("--labels", "5", "--unlabelled", "3")
    found, truth = (torch.tensor(v, dtype=torch.uint8) for v in (found, truth))
    assert sc.accuracies(found, truth, args) == {
        "per-pixel accuracy": pytest.approx(((f == t) & known).sum() / known.sum()),
        "per-class accuracy": pytest.approx(np.mean(of_class)),
        "class IoU": pytest.approx(np.mean(iou))}
    assert set(sc.accuracies(truth, truth, tiny_args("--labels", "5")).values()) == {1.0}


def test_endpoint_error():
    truth = np.random.default_rng(0).uniform(0, 1, (2, 68, 2))
    assert sc.endpoint_error(truth, truth) == 0
    assert sc.endpoint_error(truth + [0.03, 0.04], truth) == pytest.approx(0.05)


def test_patches_show_the_same_thing(tmp_path):
    ids = np.zeros((40, 60), np.uint8)
    ids[5:15, 40:56] = 1
    ids[0, 0] = 2  # too small to count
    Image.fromarray(ids).save(tmp_path / "l.png")
    frame = sc.Frame("a/0", tmp_path / "i.png", tmp_path / "l.png", "a", 0)
    centres = sc.patch_centres(frame, tiny_args(), (60, 40))
    assert set(centres) == {0, 1} and ids[tuple(int(c) for c in centres[0])] == 0
    assert abs(centres[1][0] - 9.5) <= 1 and abs(centres[1][1] - 47.5) <= 1
    picture = torch.arange(40 * 60).float().view(1, 40, 60).expand(3, -1, -1)
    assert torch.equal(sc.patch(picture, centres[1], 10), picture[:, 4:14, 42:52])
    assert sc.patch(picture, (0, 59), 10).shape == (3, 10, 10)
    write_face(tmp_path / "f.txt", np.random.default_rng(0))
    frame = frame._replace(label=tmp_path / "f.txt")
    eyes = sc.patch_centres(frame, tiny_args("--label-kind", "landmarks"), (80, 80))
    points = np.loadtxt(tmp_path / "f.txt")[1:]
    assert eyes["right eye"] == pytest.approx(2 * points[36:42].mean(0)[::-1])


def test_evaluate(trained, data, tmp_path, monkeypatch, capsys):
    seen = {}

    def fid(fakes, reals, device, weights):
        seen.update(fakes=torch.cat(list(fakes)), reals=torch.cat(list(reals)))
        return 12.5

    monkeypatch.setattr(sc, "PARSER_STEPS", 2)
    monkeypatch.setattr(metrics, "fid", fid)
    flags = ["--evaluate", "--weights", trained / "last.pt", "--data", data]
    run(*flags, "--out", tmp_path / "e", "--vgg", "random")
    text = capsys.readouterr().out
    for name in ("per-pixel accuracy", "class IoU", "VGG distance of patches (random)"):
        assert name in text
    assert "FID (12 pictures, 299x299): 12.5" in text
    assert seen["fakes"].shape == seen["reals"].shape == (12, 3, 28, 32)
    assert len(list((tmp_path / "e").iterdir())) == 12
    test = sc.Tests(data, tiny_args(), CPU)
    assert all(x.clip != exemplar.clip for x, exemplar in test.pairs)
    for i, (x, _) in enumerate(test.pairs):  # a perfect detector
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / f"p/{i:05d}.png").write_bytes(x.label.read_bytes())
    run(*flags, "--out", tmp_path / "e", "--vgg", "random", "--predicted", tmp_path / "p")
    assert f"per-pixel accuracy, {tmp_path / 'p'}: 1 " in capsys.readouterr().out


def test_user_errors_are_one_line(data, trained, tmp_path, capsys):
    tiny = ["--data", data, *TINY]
    assert "train_img" in run_fails(capsys, "--data", tmp_path / "nowhere")
    (tmp_path / "empty/train_img").mkdir(parents=True)
    assert "train_label" in run_fails(capsys, "--data", tmp_path / "empty", *TINY)
    (tmp_path / "empty/train_label").mkdir()
    assert "no pictures" in run_fails(capsys, "--data", tmp_path / "empty", *TINY)
    for flags in (["--size", 33], ["--height", 4], ["--same-style", 2], ["--labels", 0],
                  ["--T", 0], ["--batch", 0]):
        assert flags[0] in run_fails(capsys, *tiny, *flags)
    line = run_fails(capsys, *tiny, "--labels", 2)
    assert "ids [2]" in line and ".png" in line and "--labels 2" in line
    one = write_data(tmp_path / "one", clips=("a",))
    assert "one style" in run_fails(capsys, "--data", one, *TINY)
    alone = write_data(tmp_path / "alone", frames=1)
    assert "--groups FILE" in run_fails(capsys, "--data", alone, *TINY)
    assert "no such" in run_fails(capsys, *tiny, "--groups", tmp_path / "none").lower()
    (tmp_path / "g.json").write_text("{}")
    (tmp_path / "bad.json").write_text("[1]")
    assert "bad.json" in run_fails(capsys, *tiny, "--groups", tmp_path / "bad.json")
    label = data / "test_label/a/0.png"
    flags = ["--translate", label, "--weights", trained / "last.pt"]
    assert "--exemplar PATH" in run_fails(capsys, *flags)
    assert "--exemplar-label PATH" in run_fails(capsys, *flags, "--exemplar", label)
    flags += ["--exemplar", data / "test_img/a/0.png", "--exemplar-label", label]
    assert "overwritten" in run_fails(capsys, *flags, "--out", label.parent)
    assert "--weights" in run_fails(capsys, "--translate", label)
    wrong = [*flags[:-1], data / "test_img/a/0.png"]
    assert "found RGB pixels" in run_fails(capsys, *wrong)
    torch.save({"model.1.weight": torch.zeros(4, 9, 7, 7)}, tmp_path / "part.pth")
    assert "of the authors" in run_fails(capsys, *flags, "--weights", tmp_path / "part.pth")
    (data / "train_label/a/0.png").write_text("no picture")
    assert "0.png" in run_fails(capsys, *tiny)
    (data / "train_label/a/0.png").unlink()
    assert "has no label file" in run_fails(capsys, *tiny)


def test_bad_landmarks_are_named(tmp_path, capsys):
    root = write_data(tmp_path / "data", "landmarks")
    (root / "train_label/a/0.txt").write_text("40 40\n1 2\n")
    line = run_fails(capsys, "--data", root, *TINY, "--label-kind", "landmarks", "--steps", 9,
                     "--out", tmp_path / "r")
    assert "0.txt" in line and "68 lines" in line


# ---- the toy world's clips --------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_clips(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "clips"
    toy.draw("clips", out, n=3, size=32, n_test=2)
    return out


def test_toy_layout(toy_clips):
    names = [f"{t:04d}.png" for t in range(toy.CLIP_FRAMES)]
    for split, count in (("train", 3), ("test", 2), ("val", 2)):
        for kind, mode in (("img", "RGB"), ("label", "P")):
            folder = toy_clips / f"{split}_{kind}"
            assert sorted(f.name for f in folder.iterdir()) == [f"{c:04d}" for c in range(count)]
            for clip in folder.iterdir():
                assert sorted(f.name for f in clip.iterdir()) == names
                assert (Image.open(clip / names[0]).mode, Image.open(clip / names[0]).size) == (
                    mode, (32, 32))
    assert disk.is_complete(toy_clips, disk.describe("clips", 3, 32, 0))
    frames = sc.find_frames(toy_clips, "train", sc.get_args([]))
    assert [f.name for f in frames] == [f"{c:04d}/{t:04d}" for c in range(3) for t in range(12)]


def test_toy_clips_move_and_keep_their_style():
    drawn = [clips.sample_clip(np.random.default_rng([5, i])) for i in range(30)]
    assert len({c.style for c in drawn}) == 30
    assert {c.style.coat for c in drawn} == set(toy.COATS)
    assert {c.style.daylight for c in drawn} == set(world.DAYLIGHT)
    for clip in drawn[:5]:
        labels = [np.asarray(clips.clip_label(clip, t, 32)) for t in range(toy.CLIP_FRAMES)]
        changed = [(a != b).mean() for a, b in itertools.pairwise(labels)]
        assert min(changed) > 0.01
        assert (labels[0] != labels[-1]).mean() > 0.1


def test_toy_style_never_touches_the_label_map():
    drawn = [clips.sample_clip(np.random.default_rng([6, i])) for i in range(6)]
    for a, b in itertools.pairwise(drawn):
        label = np.asarray(clips.clip_label(a, 4, 32))
        same = dataclasses.replace(a, style=b.style)
        assert np.array_equal(label, np.asarray(clips.clip_label(same, 4, 32)))
        pictures = [np.asarray(clips.clip_picture(a, 4, 32, c.style)).astype(float)
                    for c in (a, b)]
        assert np.abs(pictures[0] - pictures[1]).mean() > 5
        bars = label == len(toy.LABELS)
        assert bars[:2].all() and bars[-2:].all() and bars.sum() == 4 * 32
        assert pictures[0][bars].max() == 0


def test_toy_answers(toy_clips):
    own = toy.clip_answer(toy_clips, "0001/0003", "0001/0009")
    assert own.tobytes() == Image.open(toy_clips / "test_img/0001/0003.png").tobytes()
    other = toy.clip_answer(toy_clips, "0001/0003", "0000/0009")
    assert other.tobytes() != own.tobytes()
    assert other.tobytes() == toy.clip_answer(toy_clips, "0001/0003", "0000/0001").tobytes()
    test = sc.Tests(toy_clips, sc.get_args([*TINY, "--split", "val"]), CPU, limit=2)
    (x, exemplar), _ = test.pairs
    assert x.image.is_relative_to(toy_clips / "val_img") and exemplar.clip != x.clip
    answer = toy.clip_answer(toy_clips, x.name, exemplar.name, "val")
    assert torch.equal(test.answers()[0], common.to_tensor(answer))


def test_toy_style_error_against_loops():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 6, 7))
    labels[0, 0, :4] = 5  # too few pixels to count
    a, b = rng.uniform(-1, 1, (2, 2, 3, 6, 7))
    errors = []
    for n in range(2):
        for i in range(3):
            one, other = ([p[n, c][labels[n] == i] for c in range(3)] for p in (a, b))
            errors.append(sum(abs(u.mean() - v.mean()) + abs(u.std() - v.std())
                              for u, v in zip(one, other, strict=True)) / 3 * 127.5)
    assert toy.clip_style_error(labels, a, b) == pytest.approx(np.mean(errors))
    assert toy.clip_style_error(labels, b, b) == 0


# ---- learning -------------------------------------------------------------------------------


@pytest.mark.slow
def test_learns_to_paint_new_layouts_in_the_exemplars_colours(tmp_path):
    """Two flat colours per clip, rectangles that move, black bars. Where x and F(I) differ, G is
    nearer to the truth than the exemplar is, and than the mean picture."""
    rng = np.random.default_rng(0)
    styles = np.concatenate([rng.integers(20, 236, (12, 2, 3)), np.zeros((12, 1, 3), int)], 1)
    for split, clip, frame in itertools.product(("train", "test"), range(12), range(6)):
        ids = np.zeros((32, 32), np.uint8)
        for row, column in rng.integers(0, 20, (2, 2)):
            ids[row:row + 12, column:column + 12] = 1
        ids[:3] = ids[-3:] = 2
        for kind, values in (("img", styles[clip][ids].astype(np.uint8)), ("label", ids)):
            path = tmp_path / f"{split}_{kind}/{clip}/{frame}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
    args = sc.get_args([
        "--data", str(tmp_path), "--labels", "3", "--size", "32", "--ngf", "8", "--ndf", "8",
        "--downs", "2", "--blocks", "2", "--batch", "4", "--lr", "3e-3", "--vgg", "random",
        "--vgg-layers", "1", "--lambda-2", "100", "--same-style", "0.7", "--steps", "200",
        "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run")])
    G = sc.train(args)
    test = sc.Tests(tmp_path, args, CPU)
    x = test.labels()[:, 0]
    F_I = torch.stack([sc.read_label(f.label, args, (32, 32))[0] for _, f in test.pairs])
    truth = torch.stack([torch.from_numpy(styles[int(f.clip)][label.numpy()]).permute(2, 0, 1)
                         for label, (_, f) in zip(x, test.pairs, strict=True)]) / 127.5 - 1
    differs = (x != F_I)[:, None].expand_as(truth)

    def error(answer):
        return (answer - truth)[differs].abs().mean().item()

    best = min(error(test.images(1)), error(truth.mean(0, keepdim=True).expand_as(truth)))
    assert error(test.translated(G)) < 0.93 * best
