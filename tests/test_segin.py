"""segin.py: every equation against a plain transcription, and the script as its users run it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import assert_same, error_of, interrupted, odd_pictures, two_processes
from PIL import Image
from transcriptions import close, parameters

import common
import segin
from lab import metrics, toy

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--ngf", "4", "--ndf", "4", "--downs", "2", "--batch", "2", "--vgg",
        "random", "--match-layer", "relu2_1", "--workers", "0", "--device", "cpu", "--log-every",
        "1"]
CPU = torch.device("cpu")


def tiny_args(*flags):
    return segin.get_args(["--data", ".", *TINY, *flags])


def run(*flags):
    segin.main([*map(str, flags)])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=torch.double):
    return torch.rand(*shape, generator=rng(seed), dtype=dtype) * 2 - 1


def batch(B=2, dtype=torch.double):
    """x, y, y_seg, W of noise, as `train_step` takes them."""
    x, y, W = (noise(B, 3, 32, 32, seed=i, dtype=dtype) for i in range(3))
    return x, y, (noise(B, 1, 32, 32, seed=3) > 0).to(dtype), W


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


# ---- configuration and networks -----------------------------------------------------------------


def test_paper_defaults():
    args = segin.get_args(["--data", "."])
    assert (args.size, args.batch, args.epochs, args.lr, args.lr_D) == (256, 5, 20, 2e-4, 1.3e-5)
    assert [getattr(args, f"w{i}") for i in range(1, 7)] == [100, 5e-6, 1, 100, 10, 10]
    assert (args.vgg, args.match_layer, args.match_k, args.match_on, args.match_zoom) == (
        "imagenet", "relu4_1", 3, "picture", 1)
    assert (args.corrupt, args.input, segin.multiple(args)) == (0.5, "sketch", 16)
    assert segin.multiple(tiny_args("--match-layer", "relu4_1")) == 8  # of delta here, not of N
    nets = segin.build(tiny_args(), CPU)
    for optimiser, lr in ((nets.opt_N, 2e-4), (nets.opt_D, 1.3e-5)):
        group, = optimiser.param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (lr, (0.5, 0.999), 1e-8)
        assert group["weight_decay"] == 0


def test_toy_preset_changes_sizes_and_rates_but_no_term_of_the_objective():
    real, small = segin.get_args(["--data", "."]), segin.get_args([])
    for name in ("w1", "w4", "w5", "w6", "corrupt", "input"):
        assert getattr(real, name) == getattr(small, name), name
    # 64 instead of 256 pixels: a sixteenth of the values in the sum of Eq. (6)
    assert small.w2 == pytest.approx(5e-6 * 16) and small.w3 > 0


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_the_full_configuration():
    args = segin.get_args(["--data", ".", "--vgg", "random", "--device", "cpu"])
    nets = segin.build(args, CPU)
    assert [count(nets.N), count(nets.D)] == [31_292_228, 2_767_809]
    for p in [*nets.N.parameters(), *nets.D.parameters()]:
        if p.dim() == 4 and p.numel() > 100_000 and p.abs().max() > 0:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.05)
    seen = []
    nets.N.bottleneck.register_forward_hook(lambda _, x, y: seen.append(y.shape))
    with torch.no_grad():
        y_hat, seg = nets.N.eval()(torch.zeros(1, 3, 256, 256), torch.zeros(1, 3, 256, 256))
        assert nets.match(y_hat, y_hat).shape == (1, 32, 32)
        assert nets.D(torch.cat([y_hat, y_hat], dim=1)).shape == (1, 1, 30, 30)
    assert seen == [(1, 512, 16, 16)]
    assert y_hat.shape == (1, 3, 256, 256) and seg.shape == (1, 1, 256, 256)


def naive_N(params, x, W, downs):
    """(y_hat, seg) by Sec. III-B2 and IV: six blocks of convolution, batch norm, ReLU, of which
    `downs` halve; three non-local layers with two residual blocks between; two decoders."""
    p = iter(params)

    def conv(h, stride=1, padding=1):
        return F.conv2d(h, next(p), next(p), stride=stride, padding=padding)

    def norm(h):
        h = h - h.mean((0, 2, 3), keepdim=True)
        h = h / (h.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        return h * next(p)[:, None, None] + next(p)[:, None, None]

    def non_local(h):
        theta, Phi, g = (conv(h, padding=0).flatten(2) for _ in range(3))
        F_ij = torch.einsum("bci,bcj->bij", theta, Phi).exp()                # Eq. (4)
        y = torch.einsum("bij,bcj->bci", F_ij, g) / F_ij.sum(2)[:, None]     # Eq. (3)
        return h + conv(y.unflatten(2, h.shape[2:]), padding=0)

    def residual(h):
        return h + norm(conv(norm(conv(h)).relu()))

    def up(h):
        return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    h, skips = torch.cat([x, W], dim=1), []
    for i in range(6):
        h = norm(conv(h, stride=2 if 1 <= i <= downs else 1)).relu()
        skips.append(h)
    h = non_local(residual(non_local(residual(non_local(h)))))
    y_hat = seg = h
    for i in reversed(range(downs)):
        y_hat = norm(conv(torch.cat([up(y_hat), skips[i]], dim=1))).relu()
    y_hat = conv(y_hat).tanh()
    for _ in range(downs):
        seg = norm(conv(up(seg))).relu()
    seg = conv(seg).sigmoid()
    assert next(p, None) is None
    return y_hat, seg


def naive_D(params, xy):
    """The 70x70 PatchGAN, slope 0.2, no norm of activations; every weight over its largest singular
    value. A convolution's parameters come as (bias, weight)."""
    p = iter(params)
    for layer in range(5):
        bias, weight = next(p), next(p)
        weight = weight / torch.linalg.matrix_norm(weight.flatten(1), 2)
        xy = F.conv2d(xy, weight, bias, stride=2 if layer < 3 else 1, padding=1)
        xy = torch.where(xy > 0, xy, 0.2 * xy) if layer < 4 else xy
    assert next(p, None) is None
    return xy


def naive_Phi(params, x):
    """VGG's relu3_2 of a picture in [-1, 1]."""
    p = iter(params)
    mean, std = (torch.tensor(v).view(3, 1, 1).to(x.dtype)  # the network has them as float32
                 for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    h = ((x + 1) / 2 - mean) / std
    for convs in (2, 2, 2):
        for _ in range(convs):
            h = F.conv2d(h, next(p), next(p), padding=1).relu()
        relu, h = h, F.max_pool2d(h, 2)
    return relu


def lively(nets):
    """Float64, weights that saturate nothing, power iterations that have converged and stay, and
    rates of 0: a step leaves its gradients."""
    for net in (nets.N, nets.D, nets.Phi, nets.match):
        net.double()
    for net in (nets.N, nets.D):
        common.init_weights(net, "normal", 0.1)
    for module in nets.D.modules():
        if hasattr(module, "_power_method"):
            continue
        if hasattr(module, "parametrizations"):
            norm, original = module.parametrizations.weight[0], module.parametrizations.weight
            norm._power_method(original.original.detach().flatten(1), 1000)
    nets.D.eval()
    for optimiser in (nets.opt_N, nets.opt_D):
        optimiser.param_groups[0]["lr"] = 0.0
    return nets


@pytest.mark.parametrize("downs", [1, 2, 4])
def test_networks_are_their_layer_tables(downs):
    nets = lively(segin.build(tiny_args("--downs", str(downs)), CPU))
    x, W = noise(2, 3, 32, 48), noise(2, 3, 32, 48, seed=1)
    y_hat, seg = nets.N(x, W)
    assert y_hat.shape == x.shape and seg.shape == (2, 1, 32, 48)
    close([y_hat, seg], naive_N(parameters(nets.N), x, W, downs))
    xy = torch.cat([x, W], dim=1)
    close([nets.D(xy)], [naive_D(parameters(nets.D), xy)])
    close([nets.Phi(x)["relu3_2"]], [naive_Phi(parameters(nets.Phi), x)])


def test_non_local_blocks_start_as_the_identity():
    nets = segin.build(tiny_args(), CPU)
    blocks = [layer for layer in nets.N.modules() if isinstance(layer, segin.NonLocal)]
    x = torch.randn(2, 32, 4, 4)
    assert len(blocks) == 3
    for block in blocks:
        assert torch.equal(block(x), x)
        assert block.theta.weight.abs().max() > 0  # but it can leave


# ---- the match ----------------------------------------------------------------------------------


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


def test_match_in_slices_of_4096_rows():
    a, b = noise(1, 3, 80, 80).float(), noise(1, 3, 4, 4, seed=1).float()
    whole = torch.einsum("cn,cm->nm", F.normalize(a[0].flatten(1), dim=0),
                         F.normalize(b[0].flatten(1), dim=0)).argmax(1)
    assert torch.equal(segin.semantic_match(a, b, 1).flatten(), whole)


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


@pytest.mark.parametrize("flags, side", [
    (["--match-layer", "relu3_1"], 8), (["--match-layer", "relu4_1", "--match-k", "1"], 4),
    (["--match-layer", "relu3_1", "--match-zoom", "2"], 16),
    (["--match-layer", "relu2_1", "--match-on", "edges", "--match-k", "5"], 16)])
def test_a_picture_matched_with_itself_is_itself(drawn, flags, side):
    args = tiny_args(*flags)
    _, y, _ = segin.load_pair(segin.find_pairs(drawn, "train", args)[0], args)
    match = segin.SemanticMatch(args)
    assert match(y[None], y[None]).shape == (1, side, side)
    W = segin.auxiliary(y[None], y[None], match)
    assert (W - y).abs().mean() < 0.01  # equal patches may trade places


def test_the_match_follows_a_shifted_part():
    """A square that moves by whole blocks is found at its new place."""
    x, r = -torch.ones(1, 3, 64, 64), -torch.ones(1, 3, 64, 64)
    x[:, :, 16:32, 16:32] = 1
    r[:, :, 32:48, 24:40] = 1
    xi = segin.SemanticMatch(tiny_args("--match-layer", "relu3_1"))(x, r)[0]
    assert xi[6, 6] == 10 * 16 + 8  # by four blocks down and two to the right


def test_what_phi_sees():
    p = torch.zeros(1, 3, 4, 6)
    p[:, 1, :, 3:] = 0.5
    e = segin.edges(p)
    assert e.shape == p.shape and torch.equal(e[0, 0, 0], torch.tensor([1.0, 1, -1, -1, 1, 1]))
    assert torch.equal(segin.edges(torch.ones(1, 3, 4, 4)), torch.ones(1, 3, 4, 4))
    flags = ["--match-layer", "relu3_1", "--match-zoom"]
    match, zoomed = (segin.SemanticMatch(tiny_args(*flags, n)) for n in "12")
    assert torch.equal(match.shown(p), p)
    assert torch.equal(zoomed.shown(p), F.interpolate(p, (8, 12), mode="bicubic"))


# ---- spoiling -----------------------------------------------------------------------------------

GRID = torch.arange(32 * 32).view(32, 32)


def test_shifts_are_smooth_and_reach_a_fifth():
    down, right = [], []
    for seed in range(60):
        xi = segin.shift_patches(GRID, rng(seed))
        down.append(xi // 32 - GRID // 32)
        right.append(xi % 32 - GRID % 32)
    for steps in (torch.stack(down), torch.stack(right)):
        inside = steps[:, 7:-7, 7:-7]                    # nothing is held back by the border
        assert 5 <= inside.max() <= 6 and -6 <= inside.min() <= -5
        assert abs(float(inside.double().mean())) < 0.3 and float(inside.double().std()) > 1.5
        assert inside.diff(dim=1).abs().max() <= 2 and inside.diff(dim=2).abs().max() <= 2
        assert all((inside.diff(dim=d) == 0).double().mean() > 0.3 for d in (1, 2))
    assert not torch.equal(down[0], right[0])
    assert all(0 <= segin.shift_patches(GRID, rng(s)).min() for s in range(5))


def test_repeat_is_one_block_over_a_rectangle():
    areas = []
    for seed in range(200):
        xi = segin.repeat_pattern(GRID, rng(seed))
        values, counts = xi.unique(return_counts=True)
        inside = (xi != GRID).nonzero()
        if counts.max() > 2:  # the rectangle, perhaps around the block's own place
            tall, wide = (inside.amax(0) - inside.amin(0) + 1).tolist()
            assert tall <= 16 and wide <= 16 and tall * wide - len(inside) in (0, 1)
            assert int((xi == values[counts.argmax()]).sum()) in (len(inside), len(inside) + 1)
        areas.append(len(inside))
    assert np.mean(areas) == pytest.approx(8.5**2, rel=0.15)  # sides uniform in 1 ... 16
    assert torch.equal(GRID, torch.arange(1024).view(32, 32))  # not changed in place


def test_a_tenth_of_the_matches_is_random():
    found = torch.stack([segin.random_matches(GRID, rng(seed)) for seed in range(60)])
    lost = found[found != GRID.expand_as(found)].double()
    assert len(lost) / found.numel() == pytest.approx(0.1, abs=0.01)
    assert lost.min() >= 0 and 1000 < lost.max() < 1024
    assert float(lost.mean()) == pytest.approx(511.5, abs=15)


def test_each_way_of_spoiling_comes_half_of_the_time(monkeypatch):
    """Each alone, with probability --corrupt; tint and noise change colours as they should."""
    calls = {"shift_patches": 0, "repeat_pattern": 0, "random_matches": 0, "tint": 0, "noise": 0}
    for name in list(calls)[:3]:
        def mark(xi, rng, name=name):
            calls[name] += 1
            return xi
        monkeypatch.setattr(segin, name, mark)
    y, own, args, kinds, tints = noise(3, 32, 32).float() / 4, torch.arange(64).view(8, 8), \
        tiny_args(), set(), []
    for seed in range(400):
        before = dict(calls)
        W = segin.spoil(y, own, rng(seed), args)
        gap = (W - y).reshape(3, 8, 4, 8, 4).transpose(2, 3)             # (3, 8, 8, 4, 4)
        noisy = bool((gap != 0).double().mean() > 0.9)
        calls["noise"] += noisy
        if noisy:
            assert float(gap.flatten(3).std(dim=3).mean()) == pytest.approx(0.1, abs=0.02)
        tinted = (gap.flatten(3).mean(3).abs().amax(0) > 0.15)           # (8, 8), which blocks
        calls["tint"] += bool(tinted.any())
        if tinted.any() and not noisy:
            tints.append(float((gap.abs().amax((0, 3, 4)) > 0).double().mean()))
            assert (gap.flatten(3).std(dim=3) < 1e-5).double().mean() > 0.9  # a block, one colour
        kinds.add(tuple(calls[name] - before[name] for name in calls))
    assert all(160 < n < 240 for n in calls.values()), calls
    assert len(kinds) == 32                                              # independent of each other
    assert np.mean(tints) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(segin.spoil(y, own, rng(1), tiny_args("--corrupt", "0")), y)


def test_spoilt_w_matches_each_pair_once_and_spoils_it_afresh():
    calls = []

    def match(x, y):
        calls.append(len(x))
        return torch.arange(64).view(1, 8, 8)  # every block at its own place

    spoilt = segin.SpoiltW(match, tiny_args("--corrupt", "1"))
    x, y = noise(2, 3, 32, 32).float(), noise(2, 3, 32, 32, seed=1).float()
    pairs = torch.tensor([7, 3])
    first = spoilt(x, y, pairs, torch.tensor([10, 11]))
    again = spoilt(x, y, pairs, torch.tensor([10, 11]))
    other = spoilt(x, y, pairs, torch.tensor([10, 12]))
    assert calls == [1, 1] and first.shape == y.shape and first.abs().max() <= 1
    assert torch.equal(first, again) and torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    untouched = segin.SpoiltW(match, tiny_args("--corrupt", "0"))
    assert torch.equal(untouched(x, y, pairs, torch.tensor([1, 2])), y)


# ---- the step -----------------------------------------------------------------------------------


def naive_step(nets, x, y, y_seg, W, args):
    """Losses and gradients of one step as the paper words them; (losses, {net: gradients})."""
    N, D, Phi = (parameters(net) for net in (nets.N, nets.D, nets.Phi))
    y_hat, seg = naive_N(N, x, W, args.downs)

    def judge(picture):
        return 1 / (1 + (-naive_D(D, torch.cat([x, picture], dim=1))).exp())

    L_D = -(judge(y).log().mean() + (1 - judge(y_hat.detach())).log().mean())
    tv = 0
    for i in range(31):
        for j in range(31):
            down, right = y_hat[:, :, i + 1, j] - y_hat[:, :, i, j], \
                y_hat[:, :, i, j + 1] - y_hat[:, :, i, j]
            tv = tv + ((down**2).sum(1) + (right**2).sum(1) + 1e-6).sqrt().sum()
    losses = {
        "L_D": L_D, "L_GAN": -judge(y_hat).log().mean(),
        "L_recon": (y - y_hat).abs().sum() / y.numel(),
        "L_F": (naive_Phi(Phi, y_hat) - naive_Phi(Phi, y)).abs().sum() / len(x),
        "L_tv": tv / (len(x) * 31 * 31), "L_seg": (seg - y_seg).abs().sum() / seg.numel(),
        "L_segAtt": (seg * y_hat - y_seg * y).abs().sum() / y.numel()}
    L = (args.w1 * losses["L_recon"] + args.w2 * losses["L_F"] + args.w3 * losses["L_GAN"]
         + args.w4 * losses["L_seg"] + args.w5 * losses["L_segAtt"] + args.w6 * losses["L_tv"])
    return losses, {"N": torch.autograd.grad(L, N), "D": torch.autograd.grad(L_D, D)}


@pytest.mark.parametrize("B, flags", [
    (2, []), (3, ["--downs", "4", "--no-channels-last"]),
    *((2, [f"--w{i}", "0"]) for i in (1, 2, 3, 4, 5, 6))])
def test_step_is_the_objective(B, flags):
    """Eq. (3) to (11): losses and all gradients in float64, six weights apart, each of them 0."""
    weights = [f for i, w in enumerate((3, 0.01, 7, 2, 1.3, 0.7), 1) for f in (f"--w{i}", str(w))]
    args = tiny_args(*weights, *flags)
    nets = lively(segin.build(args, CPU))
    expected, grads = naive_step(nets, *batch(B), args)
    losses = segin.train_step(nets, *batch(B), args)
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(float(value.detach()), rel=1e-8), name
    for name in "ND":
        close([p.grad for p in getattr(nets, name).parameters()], grads[name], 1e-6, 1e-8)
    assert all(p.grad is None for net in (nets.Phi, nets.match) for p in net.parameters())


def test_chance_is_the_loss_of_a_d_that_says_one_half():
    zero = torch.zeros(2, 1, 3, 3)
    assert segin.CHANCE["L_GAN"] == pytest.approx(float(-segin.log_D(zero)))
    assert segin.CHANCE["L_D"] == pytest.approx(float(-segin.log_D(zero) - segin.log_D(-zero)))
    assert float(segin.log_D(torch.tensor([200.0]))) == 0 and math.isfinite(
        segin.log_D(torch.tensor([-200.0])))


def test_n_is_judged_by_the_d_that_has_just_learnt():
    nets = segin.build(tiny_args("--lr-D", "0.1"), CPU)
    x, y, y_seg, W = batch(dtype=torch.float32)
    with torch.no_grad():
        y_hat, _ = nets.N(x, W)
        before = float(-segin.log_D(nets.D(torch.cat([x, y_hat], dim=1))))
    L_GAN = float(segin.train_step(nets, x, y, y_seg, W, tiny_args())["L_GAN"].detach())
    with torch.no_grad():
        after = float(-segin.log_D(nets.D.eval()(torch.cat([x, y_hat], dim=1))))
    assert L_GAN == pytest.approx(after, rel=1e-2) and abs(L_GAN - before) > 0.05 * before


@pytest.mark.parametrize("flags", [[], ["--amp"]])
def test_every_weight_learns_and_losses_are_float32(flags):
    args = tiny_args(*flags)
    nets = segin.build(args, CPU)
    before = {name: parameters(getattr(nets, name)) for name in "ND"}
    for _ in range(3):
        losses = segin.train_step(nets, *batch(dtype=torch.float32), args)
        assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    for name, old in before.items():
        assert all(not torch.equal(a, b) for a, b in zip(old, getattr(nets, name).parameters(),
                                                         strict=True))


# ---- data ---------------------------------------------------------------------------------------


def test_samples_depend_on_seed_and_number_alone_and_epochs_show_all(drawn):
    data = segin.Pairs(drawn, tiny_args())
    assert len(data) == 5
    x, y, y_seg, pair, seed = data[7]
    again = segin.Pairs(drawn, tiny_args())[7]
    assert torch.equal(x, again[0]) and (pair, seed) == again[3:]
    assert x.shape == y.shape == (3, 32, 32) and y_seg.shape == (1, 32, 32)
    assert sorted(data[n][3] for n in range(5, 10)) == list(range(5))
    assert [data[n][3] for n in range(5)] != [data[n][3] for n in range(5, 10)]
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


def test_pairs_are_resized_bicubically(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)
    files = [tmp_path / "x.png", tmp_path / "y.png"]
    for picture, file in zip(noise, files, strict=True):
        Image.fromarray(picture).save(file)
    pair = segin.load_pair((*files, None), tiny_args())[:2]
    for picture, tensor in zip(noise, pair, strict=True):
        expected = Image.fromarray(picture).resize((32, 32), Image.BICUBIC)
        assert torch.equal(tensor, common.to_tensor(expected))


def test_side_by_side_pairs_are_the_same_data(drawn, side_by_side):
    one, other = (segin.Pairs(f, tiny_args()) for f in (drawn, side_by_side))
    for n in range(5):
        assert torch.equal(one[n][0], other[n][0]) and torch.equal(one[n][1], other[n][1])
        assert (one[n][2] != other[n][2]).float().mean() < 0.02  # the mask comes from the photo
    back = segin.Pairs(side_by_side, tiny_args("--direction", "BtoA"))
    assert torch.equal(back[0][0], other[0][1]) and torch.equal(back[0][1], other[0][0])
    assert len(segin.find_pairs(side_by_side, "test", tiny_args())) == 4  # val/ stands in for test/


def test_grey_input_is_the_photo_without_colour(drawn, tmp_path):
    """--input grey needs photos alone, and leaves sketches unread."""
    (tmp_path / "train").symlink_to(drawn / "train_img")
    args = tiny_args("--input", "grey")
    for x, y, y_seg, pair, _ in (segin.Pairs(f, args)[2] for f in (tmp_path, drawn)):
        photo = Image.open(drawn / f"train_img/{pair:04d}.png").convert("RGB")
        grey = np.asarray(photo, dtype=float) @ (0.299, 0.587, 0.114)
        assert np.abs((x.numpy() + 1) * 127.5 - grey).max() < 1.01
        assert torch.equal(y, common.to_tensor(photo))
        assert (y_seg[0].numpy() != (np.asarray(photo).min(2) < 242)).mean() < 0.02


def test_foreground_is_what_is_not_white_and_a_mask_says_more(tmp_path):
    """A JPEG's nearly-white counts as white, pale colours do not."""
    picture = np.full((32, 64, 3), 252, dtype=np.uint8)
    picture[8:16, 40:48] = 255, 255, 200
    (tmp_path / "train").mkdir()
    Image.fromarray(picture).save(tmp_path / "train/a.png")
    y_seg = segin.Pairs(tmp_path, tiny_args())[0][2]
    assert y_seg.sum() == 64 and y_seg[0, 8:16, 8:16].all()
    (tmp_path / "train_mask").mkdir()
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, :8] = 255
    Image.fromarray(mask).save(tmp_path / "train_mask/a.png")
    y_seg = segin.Pairs(tmp_path, tiny_args())[0][2]
    assert y_seg[0, :, :16].all() and not y_seg[0, :, 16:].any()


def test_test_references_are_other_photos(drawn, side_by_side, tmp_path, capsys):
    args = tiny_args()
    show = segin.test_pictures(drawn, args, CPU)
    assert torch.equal(show["r"], show["y"].roll(-2, dims=0))  # half of the four away
    assert torch.equal(segin.test_pictures(side_by_side, tiny_args("--split", "val"), CPU)["x"],
                       show["x"])
    args.data = "toy"
    assert torch.equal(segin.test_pictures(drawn, args, CPU)["r"], show["y"].roll(-1, dims=0))
    few = segin.test_pictures(drawn, args, CPU, limit=2)
    assert torch.equal(few["x"], show["x"][[0, 2]]) and torch.equal(few["r"], show["y"][[1, 3]])
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
    monkeypatch.setattr(common, "download", lambda *a: asked.append(a) or side_by_side)
    monkeypatch.chdir(tmp_path)
    for name in ("edges2shoes", "edges2handbags"):
        args = segin.get_args(["--data", name, *TINY])
        assert len(segin.Pairs(segin.data_folder(args), args)) == 5
        place = f"http://efrosgans.eecs.berkeley.edu/pix2pix/datasets/{name}.tar.gz"
        assert asked[-1] == ((place,), Path("datasets", name))  # `download` tries https first


# ---- runs ---------------------------------------------------------------------------------------


def test_what_train_applies(drawn, tmp_path, monkeypatch):
    """Constant rates, one per network; every pair twice; W(x, y) by the match, spoilt by the seed
    of its sample."""
    seen, args = [], tiny_args()

    class Match(torch.nn.Module):  # a match that differs from pair to pair
        def __init__(self, args):
            super().__init__()

        def forward(self, x, r):
            step = int((x < 0).sum()) + 7 * int((r < 0).sum())
            return (torch.arange(256) + step).remainder(256).view(1, 16, 16).repeat(len(x), 1, 1)

    def train_step(nets, x, y, y_seg, W, args):
        rates = [o.param_groups[0]["lr"] for o in (nets.opt_N, nets.opt_D)]
        seen.append((rates, x, y, y_seg, W))
        return {"L_D": torch.tensor(1.0)}

    monkeypatch.setattr(segin, "train_step", train_step)
    monkeypatch.setattr(segin, "SemanticMatch", Match)
    run("--data", drawn, *TINY, "--epochs", 2, "--out", tmp_path / "run")
    assert [s[0] for s in seen] == [[2e-4, 1.3e-5]] * 4  # two steps for five pairs
    data, match = segin.Pairs(drawn, args), segin.SemanticMatch(args)
    for n in range(8):
        x, y, y_seg, _, seed = data[n]
        xi = match(x[None], y[None])[0]
        expected = x, y, y_seg, segin.spoil(y, xi, rng(seed), args)
        for got, tensor in zip(seen[n // 2][1:], expected, strict=True):
            assert torch.equal(got[n % 2], tensor)


def test_run_folder(trained):
    files = {str(f.relative_to(trained)) for f in trained.rglob("*") if f.is_file()}
    assert files - {"lock"} == {"config.json", "log.csv", "index.html", "last.pt", "result.json",
                                "samples/step_000000.png", "samples/step_000002.png"}
    rows = (trained / "log.csv").read_text().splitlines()
    assert len(rows) == 3
    assert rows[0] == "step,L_D,L_GAN,L_recon,L_F,L_tv,L_seg,L_segAtt,seconds"
    grid = Image.open(trained / "samples/step_000002.png")
    assert grid.width == 6 * (4 * 32 + 4) + 4  # x, r, W, N, N_s, y, magnified four times
    assert torch.load(trained / "last.pt", weights_only=True)["parts"].keys() == {
        "N", "D", "opt_N", "opt_D"}


@pytest.mark.parametrize("flags", [[], ["--match-on", "edges", "--input", "grey"]])
def test_resumed_run_is_bit_identical(drawn, tmp_path, flags):
    flags = ["--data", drawn, *TINY, *flags, "--steps", 5]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(segin, lambda: run(*flags, "--out", tmp_path / "parts"), step=3)
    run(*flags, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 5
    assert_same(a["parts"], b["parts"])


@pytest.mark.slow
def test_two_processes_hold_the_same_weights_and_see_different_pairs(drawn, tmp_path):
    """Not those of one process with the doubled batch: batch norm stays each process's own."""
    (tmp_path / "go.py").write_text(
        "import os, sys, torch, common, segin\n"
        "step, rank = segin.train_step, os.environ['RANK']\n"
        "def spy(nets, x, *more):\n"
        "    losses = step(nets, x, *more)\n"
        "    weights = [list(net.parameters()) for net in (nets.N, nets.D)]\n"
        f"    torch.save([x, weights], {str(tmp_path)!r} + '/' + rank)\n"
        "    return losses\n"
        "segin.train_step = spy\n"
        "common.entry(segin.main)\n")
    two_processes(tmp_path / "go.py", "--data", drawn, *TINY, "--steps", 2, "--out",
                  tmp_path / "run")
    (x, weights), (other, weights_other) = (
        torch.load(tmp_path / rank, weights_only=False) for rank in "01")
    assert_same([[p.data for p in net] for net in weights],
                [[p.data for p in net] for net in weights_other])
    assert not torch.equal(x, other)


@pytest.mark.slow
def test_compile_does_not_compile_anew_at_every_step():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    args = tiny_args("--compile")
    nets, graphs = segin.build(args, CPU), []
    for _ in range(4):
        segin.train_step(nets, *batch(dtype=torch.float32), args)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2] == graphs[3]


# ---- translate, evaluate ------------------------------------------------------------------------


def test_translate_keeps_every_size_and_is_n_of_x_and_w(trained, drawn, tmp_path):
    sizes = odd_pictures(tmp_path / "in")
    flags = ["--weights", trained / "last.pt", "--exemplar"]
    run("--translate", tmp_path / "in", *flags, drawn / "test_img/0000.png", "--out",
        tmp_path / "out")
    assert {f.stem: Image.open(f).size for f in (tmp_path / "out").iterdir()} == sizes
    run("--translate", drawn / "test_sketch/0001.png", *flags, drawn / "test_img", "--out",
        tmp_path / "refs")
    assert sorted(f.name for f in (tmp_path / "refs").iterdir()) == [
        "0000", "0001", "0002", "0003"]  # a folder per reference
    nets = segin.load_networks(segin.get_args(["--weights", str(trained / "last.pt")]), CPU)
    x, r = (common.to_tensor(common.open_rgb(drawn / d))[None]
            for d in ("test_sketch/0001.png", "test_img/0003.png"))
    with torch.no_grad():
        expected = nets.N(x, segin.auxiliary(x, r, nets.match))[0]
    expected = np.asarray(common.to_pil(expected[0]), dtype=int)
    got = np.asarray(Image.open(tmp_path / "refs/0003/0001.png"), dtype=int)
    assert np.abs(got - expected).max() <= 1


def test_a_sketch_on_clear_paper_and_files_that_stay(trained, drawn, tmp_path, capsys):
    """The alpha of a sketch is its ink, not the photo's; references are not painted over."""
    sketch = np.array(common.open_rgb(drawn / "test_sketch/0001.png"))
    ink = 255 - sketch.min(2, keepdims=True)
    (tmp_path / "in").mkdir()
    Image.fromarray(np.concatenate([sketch, ink], 2)).save(tmp_path / "in/a.png")
    flags = ["--weights", trained / "last.pt", "--exemplar"]
    run("--translate", tmp_path / "in", *flags, drawn / "test_img/0000.png", "--out",
        tmp_path / "out")
    assert Image.open(tmp_path / "out/a.png").mode == "RGB"
    for name in ("a.png", "a.bmp"):
        (tmp_path / "refs").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "refs" / name)
        out = tmp_path / "refs" if name == "a.png" else tmp_path / "other"
        line = error_of(capsys, segin.main, "--translate", tmp_path / "in", *flags,
                        tmp_path / "refs", "--out", out)
        assert ("would be overwritten" if name == "a.png" else "two files of one name") in line


def test_a_broken_picture_stops_neither_the_others_nor_later_references(trained, drawn, tmp_path,
                                                                        capsys):
    for name in ("in/a.png", "in/b.png", "refs/0.png", "refs/1.png", "refs/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((drawn / "test_img/0000.png").read_bytes())
    for name in ("in/a.png", "refs/1.png"):
        (tmp_path / name).write_bytes(b"broken")
    line = error_of(capsys, segin.main, "--translate", tmp_path / "in", "--weights",
                    trained / "last.pt", "--exemplar", tmp_path / "refs", "--out", tmp_path / "out")
    assert "1 of 2 not translated" in line and "a.png" in line
    assert {f.relative_to(tmp_path / "out").as_posix()
            for f in (tmp_path / "out").rglob("*.png")} == {"0/b.png", "2/b.png"}


def test_a_network_of_grey_pictures_sees_grey(trained, drawn, tmp_path, monkeypatch):
    seen, original = [], segin.translate
    monkeypatch.setattr(segin, "translate", lambda nets, x, r, args: seen.append(x) or original(
        nets, x, r, args))
    run("--translate", drawn / "test_img/0000.png", "--weights", trained / "last.pt", "--exemplar",
        drawn / "test_img/0001.png", "--out", tmp_path, "--input", "grey")
    grey = common.open_rgb(drawn / "test_img/0000.png").convert("L").convert("RGB")
    close([seen[0][0]], [common.to_tensor(grey)], 0, 1.1 / 127.5)


def test_a_mask_that_is_not_white_is_refused(drawn, tmp_path):
    photo, mask = drawn / "test_img/0000.png", tmp_path / "m.png"
    ones = np.zeros((32, 32), np.uint8)
    for value, share in ((0, 0), (255, 0.25), (1, None)):
        ones[:16, :16] = value
        Image.fromarray(ones).save(mask)
        if share is None:
            with pytest.raises(common.UserError, match=r"m\.png: white is foreground.* 1 of 255"):
                segin.load_pair((photo, photo, mask), tiny_args())
        else:
            assert segin.load_pair((photo, photo, mask), tiny_args())[2].mean() == share


def test_a_mask_of_any_colour_and_ground_has_the_photos_shape(drawn, tmp_path):
    """White, green of a palette, or white on clear ground: the same foreground."""
    photo, file = drawn / "test_img/0000.png", tmp_path / "m.png"
    figure, clear = Image.new("L", (16, 16)), Image.new("RGBA", (16, 16), "white")
    figure.paste(255, (0, 0, 16, 4))
    green = figure.convert("P")
    green.putpalette([0, 0, 0] * 255 + [0, 255, 0])
    clear.putalpha(figure)
    for mask in (figure, green, clear):
        mask.save(file)
        y_seg = segin.load_pair((photo, photo, file), tiny_args())[2]
        assert y_seg.shape == (1, 32, 32) and y_seg[0, :8].all() and not y_seg[0, 8:].any()
    Image.new("L", (32, 16), 255).save(file)
    with pytest.raises(common.UserError, match=r"m\.png: 32x16, but its photo is 32x32"):
        segin.load_pair((photo, photo, file), tiny_args())


def test_translation_leaves_training_alone_and_takes_any_matcher(drawn):
    args = tiny_args()
    nets, show = segin.build(args, CPU), segin.test_pictures(drawn, args, CPU)
    before = {key: value.clone() for key, value in nets.N.state_dict().items()}
    nets.match = lambda x, r: torch.zeros(len(x), 8, 8, dtype=torch.int64)
    _, W, _ = segin.translate(nets, show["x"], show["r"], args)
    assert nets.N.training
    assert_same(before, dict(nets.N.state_dict()))
    assert torch.equal(W, show["r"][:, :, :4, :4].repeat(1, 1, 8, 8))


def test_evaluate(trained, drawn, tmp_path, monkeypatch, capsys):
    """Tab. I on a folder; on toy data the run's own scores again."""
    monkeypatch.setattr(metrics, "fid", lambda fakes, reals, *_: 12.5)
    run("--evaluate", "--weights", trained / "last.pt", "--data", drawn, "--lpips", "vgg")
    said = capsys.readouterr().out
    assert "FID (4 outputs, 4 photos, 299x299): 12.5" in said
    assert "VGG distance (random), diversity (8 pairs)" in said  # 3 references: 2 pairs of 4 inputs
    assert "(ref) (12 pairs)" in said and "(gt) (4 pairs)" in said
    monkeypatch.setattr(segin, "data_folder", lambda args: drawn)
    run(*TINY, "--steps", 1, "--out", tmp_path / "run")
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    capsys.readouterr()
    run("--evaluate", "--weights", tmp_path / "run/last.pt")
    said = capsys.readouterr().out
    assert len(scores) == 6 and scores[0]["name"] == "parts right"
    for score in scores:  # to rounding: a diversity of 1e-5 is mostly that
        value = float(said.split(f"{score['name']}: ")[1].split()[0])
        assert value == pytest.approx(score["value"], rel=1e-3, abs=1e-6)


def test_toy_diversity_lies_between_a_reference_and_the_own_photo(drawn):
    x, y, r = segin.test_pictures(drawn, tiny_args(), CPU).values()
    asked = []
    scores = toy.reference_scores(lambda x, r: asked.append(r) or ((x + r) / 2, r), x, y, r, drawn)
    assert_same(asked, [r, y])
    vgg = common.VGG([f"relu{i}_1" for i in range(1, 5)], "random")
    assert scores[-1]["value"] == metrics.feature_distance(vgg, (x + r) / 2, (x + y) / 2)
    assert scores[-1]["trivial"]["the references"] == metrics.feature_distance(vgg, r, y)


def test_user_errors_are_one_line(drawn, trained, side_by_side, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs/ comes there

    def fails(*flags):
        return error_of(capsys, segin.main, *flags)

    weights = trained / "last.pt"
    line = fails("--data", tmp_path / "nowhere")
    assert "nowhere" in line and "train_sketch" in line and "edges2handbags" in line
    (tmp_path / "empty").mkdir()
    assert "train_sketch" in fails("--data", tmp_path / "empty", *TINY)
    for flags, said in ((["--size", 34], "--size 34"), (["--match-k", 4], "--match-k 4"),
                        (["--match-zoom", 4], "--match-zoom 4: must divide 2"),
                        (["--corrupt", 2], "--corrupt 2")):
        assert said in fails("--data", drawn, *TINY, *flags)
    assert "--weights" in fails("--translate", drawn, "--exemplar", drawn)
    assert "--exemplar" in fails("--translate", drawn, "--weights", weights)
    Image.new("RGB", (63, 32)).save(side_by_side / "train/odd.png")
    assert "odd.png" in fails("--data", side_by_side, *TINY, "--steps", 3)
    state = torch.load(weights, weights_only=True)
    torch.save(state | {"method": "cut"}, tmp_path / "other.pt")
    assert "cut.py" in fails("--evaluate", "--weights", tmp_path / "other.pt")

    def no_network(*_, **__):
        raise OSError("no route")
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", no_network)
    assert "--lpips vgg" in fails("--evaluate", "--data", drawn, "--weights", weights)


def test_bad_partners_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs/ comes there
    toy.draw("sketches", folder := tmp_path / "a", n=2, size=32, n_test=2)

    def fails(*flags):
        return error_of(capsys, segin.main, "--data", folder, *TINY, *flags)

    (folder / "train_mask/0001.png").unlink()
    assert "0001 has no mask of that name in train_mask" in fails()
    Image.new("RGB", (32, 16)).save(folder / "train_sketch/0000.png")
    Image.new("L", (32, 32)).save(folder / "train_mask/0001.png")
    line = fails("--steps", 2)
    assert "0000.png" in line and "32x16" in line
    (folder / "train_sketch/0001.png").unlink()
    assert "0001 has no sketch" in fails()


# ---- learning -----------------------------------------------------------------------------------


def test_columns_of_a_grid(drawn):
    """The mask black and white, and each reference beside its own patchwork."""
    args = tiny_args()
    nets, show = segin.build(args, CPU), segin.test_pictures(drawn, args, CPU)
    y_hat, W, seg = segin.translate(nets, show["x"], show["r"], args)
    expected = {"x": show["x"], "r": show["r"], "W(x, r)": W, "N(x, W)": y_hat,
                "N_s(x)": 2 * seg.repeat(1, 3, 1, 1) - 1, "own photo y": show["y"]}
    columns = segin.sample_columns(nets, show, args)
    assert [*columns] == [*expected]
    close([*columns.values()], [*expected.values()])
