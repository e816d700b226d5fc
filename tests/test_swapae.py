"""swapae.py: every equation against a plain transcription, and the script as its users run it."""

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
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_same, error_of, interrupted, odd_pictures
from PIL import Image

import common
import swapae
from lab import metrics, toy
from lab.toy import textures

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--downs", "2", "--texture", "16", "--width-E", "0.125", "--width-G",
        "0.0625", "--width-D", "0.015625", "--width-P", "0.0625", "--patch", "8", "--crops", "3",
        "--batch", "4", "--workers", "0", "--device", "cpu", "--log-every", "1", "--vgg", "random",
        "--lpips", "vgg"]
CPU = torch.device("cpu")
LOSSES = {"D_real", "D_rec", "D_mix", "P_real", "P_mix", "rec", "GAN_rec", "GAN_swap", "cooccur"}


def tiny_args(*flags):
    return swapae.get_args(["--data", ".", *TINY, *map(str, flags)])


def run(*flags):
    return swapae.main([*map(str, flags)])


def run_fails(capsys, *flags):
    return error_of(capsys, swapae.main, *flags)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def random_batch(args):
    """x_D, x_G: noise, shaped and laid out as in training."""
    return [torch.rand(args.batch, 3, args.size, args.size).mul(2).sub(1).to(
        memory_format=torch.channels_last) for _ in "DG"]


def lively(net, seed=0):
    """All biases and noise weights away from zero, in float64."""
    generator = rng(seed)
    for p in net.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return net.double()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "textures"
    toy.draw("textures", out, n=5, size=32, n_test=4)
    return out


@pytest.fixture(scope="module")
def trained(drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    run("--data", drawn, *TINY, "--steps", 2, "--R1-every", 2, "--out", out)
    return out


@pytest.fixture(scope="module")
def model(trained):
    args = swapae.get_args(["--weights", str(trained / "last.pt"), "--device", "cpu"])
    return swapae.load_networks(args, CPU), args


# ---- configuration ------------------------------------------------------------------------------


def test_defaults_are_the_released_ones():
    args = swapae.get_args(["--data", "."])
    assert (args.size, args.load, args.batch, args.lr, args.beta1, args.beta2) == (
        256, None, 16, 0.002, 0.0, 0.99)
    assert (args.lambda_rec, args.lambda_gan_rec, args.lambda_gan_swap, args.lambda_cooccur) == (
        1.0, 0.5, 1.0, 1.0)
    assert (args.lambda_R1, args.lambda_patch_R1, args.R1_every, args.crops, args.patch) == (
        10.0, 1.0, 16, 8, 128)
    assert args.crop == [1 / 8, 1 / 4] and args.hybrids == "all" and args.ema == 0
    assert args.images // (2 * args.batch) == 781_250  # updates of each side (released launcher)


def test_the_thesis_and_the_settings_change_what_they_say():
    args = swapae.get_args(["--data", ".", "--follow", "thesis"])
    assert (args.hybrids, args.lambda_gan_swap, args.base_blocks, args.demodulation) == (
        "half", 0.5, 4, "joint")
    assert (args.code_norm, args.skip_padding, args.lazy_adam) == ("none", "reflect", False)
    assert swapae.get_args(["--data", ".", "--setting", "mountains"]).lambda_patch_R1 == 10
    big = swapae.get_args(["--data", ".", "--setting", "1024"])
    assert (big.size, big.load, big.downs, big.texture, big.patch) == (768, 1024, 5, 1536, 256)
    toy_args = swapae.get_args([])
    assert toy_args.size == 64 and toy_args.width_G < 1


def test_rates_of_the_two_adams():
    args = tiny_args()
    m = swapae.build(args, CPU)
    g, d = m.opt_G.param_groups[0], m.opt_D.param_groups[0]
    assert (g["lr"], g["betas"]) == (0.002, (0.0, 0.99))
    assert d["lr"] == pytest.approx(0.00188235, rel=1e-5)
    assert d["betas"] == pytest.approx((0.0, 0.990585), rel=1e-5)
    plain = swapae.build(tiny_args("--no-lazy-adam"), CPU).opt_D.param_groups[0]
    assert (plain["lr"], plain["betas"]) == (0.002, (0.0, 0.99))


# ---- filters ------------------------------------------------------------------------------------


def upfirdn(x, taps, up=1, down=1, pad=(0, 0), gain=1.0):
    """Insert zeros, pad, true convolution, keep every down-th: loops over the kernel."""
    B, C, H, W = x.shape
    row = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    kernel = gain * torch.outer(row, row)
    tall = x.new_zeros(B, C, H * up, W * up)
    tall[:, :, ::up, ::up] = x
    h, w = (n * up + pad[0] + pad[1] for n in (H, W))
    wide = x.new_zeros(B, C, h, w)
    wide[:, :, pad[0]:pad[0] + H * up, pad[0]:pad[0] + W * up] = tall
    k = len(taps)
    out = x.new_zeros(B, C, h - k + 1, w - k + 1)
    for i in range(k):
        for j in range(k):
            out += kernel[k - 1 - i, k - 1 - j] * wide[:, :, i:i + h - k + 1, j:j + w - k + 1]
    return out[:, :, ::down, ::down]


@pytest.mark.parametrize("taps, pad, stride, gain", [
    ([1.0, 3.0, 3.0, 1.0], (2, 2), 1, 1.0), ([1.0, 3.0, 3.0, 1.0], (1, 1), 2, 1.0),
    ([1.0, 2.0, 1.0], (1, 0), 2, 1.0), ([1.0, 3.0, 3.0, 1.0], (1, 1), 1, 4.0),
    ([1.0, 2.0, 5.0], (2, 1), 1, 1.0)])
def test_blur_is_upfirdn_with_its_derivatives(taps, pad, stride, gain):
    layer = swapae.Blur(2, taps, pad, stride, gain).double()
    x = noise(2, 2, 7, 6).requires_grad_()
    flipped = taps[::-1]  # a convolution layer correlates
    assert torch.allclose(layer(x), upfirdn(x, flipped, 1, stride, pad, gain), atol=1e-7)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)


def test_blur_mirrors_where_asked():
    layer = swapae.Blur(3, [1.0, 2.0, 1.0], (2, 1), reflect=True).double()
    x = noise(1, 3, 8, 10)
    wide = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (2, 1), (2, 1)), mode="reflect"))
    assert torch.allclose(layer(x), upfirdn(wide, [1.0, 2.0, 1.0]))
    assert layer(x).shape == (1, 3, 9, 11)


def lrelu(x):
    return math.sqrt(2) * F.leaky_relu(x, 0.2)


def scaled(layer):
    return layer.weight / math.sqrt(layer.weight[0].numel())


@pytest.mark.parametrize("encoder", [False, True])
def test_down_block_is_stylegan2s(encoder):
    """Every factor where the text puts it: filter, convolution, bias, activation, sum / sqrt 2."""
    block = lively(swapae.DownBlock(3, 5, reflect=encoder))
    x, taps = noise(2, 3, 12, 8), [1.0, 2.0, 1.0] if encoder else [1.0, 3.0, 3.0, 1.0]

    def bias(layer):
        return layer.bias.view(1, -1, 1, 1)

    mode = "reflect" if encoder else "constant"
    y = lrelu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode), scaled(block.conv1)) + bias(block.conv1))
    y = (upfirdn(F.pad(y, (2, 1, 2, 1), mode), taps) if encoder else upfirdn(y, taps, pad=(2, 2)))
    y = lrelu(F.conv2d(y, scaled(block.conv2), stride=2) + bias(block.conv2))
    skip = upfirdn(x, taps, pad=(1, 0) if encoder else (1, 1))
    skip = F.conv2d(skip, scaled(block.skip), stride=2)
    assert torch.allclose(block(x), (y + skip) / math.sqrt(2), atol=1e-7)
    assert block(x).shape == (2, 5, 6, 4)


def test_d_block_is_twice_differentiable():
    block = lively(swapae.DownBlock(2, 2))
    x = noise(1, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(block, x)
    assert torch.autograd.gradgradcheck(block, x)
    weight = block.conv1.weight

    def slope(weight):
        y = torch.func.functional_call(block, {"conv1.weight": weight}, (x,))
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, weight)


def test_encoder_skips_are_zero_padded_or_mirrored():
    a, b = (swapae.DownBlock(2, 2, True, reflect).double() for reflect in (False, True))
    b.load_state_dict(a.state_dict())
    x = noise(1, 2, 16, 16)
    differ = (a(x) - b(x)).abs().sum((0, 1)) > 1e-9
    assert differ[0].all() and differ[:, 0].all() and not differ[1:, 1:].any()


# ---- modulated convolution ----------------------------------------------------------------------


@pytest.mark.parametrize("demodulation", ["apart", "joint", "none"])
@pytest.mark.parametrize("up", [False, True])
def test_styled_conv_is_a_loop_over_pictures(demodulation, up):
    """Each picture gets its own weights here; the layer never makes them."""
    layer = lively(swapae.StyledConv(4, 3, 6, up=up, demodulation=demodulation))
    x, t, generator = noise(3, 4, 5, 7), noise(3, 6, seed=1), rng(5)
    result = layer(x, t, gain=0.7, rng=generator)
    size = [2 * n if up else n for n in (5, 7)]
    grain = torch.randn(1, 1, *size, generator=rng(5)).double()
    style = F.linear(t, layer.style.weight / math.sqrt(6), layer.style.bias)
    for i in range(3):
        s, w = style[i], layer.weight / math.sqrt(4 * 9)
        if demodulation == "apart":
            s = s / (s.square().mean() + 1e-8).sqrt()
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        w = w * s.view(1, 4, 1, 1)
        if demodulation == "joint":
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            y = F.conv_transpose2d(x[i:i + 1], w.transpose(0, 1), stride=2)
            y = upfirdn(y, [1.0, 3.0, 3.0, 1.0], pad=(1, 1), gain=4.0)
        else:
            y = F.conv2d(x[i:i + 1], w, padding=1)
        y = y + layer.noise * grain + layer.bias.view(1, -1, 1, 1)
        y = y if demodulation == "none" else lrelu(y)
        assert torch.allclose(result[i:i + 1], 0.7 * y, atol=1e-7)


@pytest.mark.parametrize("demodulation", ["apart", "joint"])
def test_demodulated_variance_is_one(demodulation):
    layer = swapae.StyledConv(64, 32, 16, demodulation=demodulation)
    x, t = torch.randn(4, 64, 40, 40, generator=rng()), 5 * torch.randn(4, 16, generator=rng(1))
    with torch.no_grad():
        y = layer(x, t) / math.sqrt(2)
    y = torch.where(y < 0, y / 0.2, y)[:, :, 2:-2, 2:-2]     # before leaky ReLU, without borders
    assert abs(float(y.var()) - 1) < 0.03
    untamed = swapae.StyledConv(64, 32, 16, demodulation="none", noise=False)
    assert float(untamed(x, t).detach().var()) > 5


def test_noise_is_fresh_per_picture_or_seeded_for_all():
    layer = swapae.StyledConv(2, 2, 4)
    layer.noise.data.fill_(1.0)
    x, t = torch.zeros(2, 2, 8, 8), torch.zeros(2, 4)
    fresh, seeded = layer(x, t), layer(x, t, rng=rng(3))
    assert not torch.equal(fresh[0], fresh[1])
    assert torch.equal(seeded[0], seeded[1]) and torch.equal(seeded, layer(x, t, rng=rng(3)))
    assert torch.equal(fresh[:, 0], fresh[:, 1])             # one map for all channels


def test_styled_blocks_sum_two_branches():
    up = lively(swapae.StyledBlock(4, 2, 3, up=True))
    x, t = noise(1, 4, 5, 5), noise(1, 3)
    skip = lrelu(F.conv2d(x, scaled(up.skip)) + up.skip.bias.view(1, -1, 1, 1))
    skip = F.interpolate(skip, scale_factor=2, mode="bilinear", align_corners=False)
    generator = rng(2)
    main = up.conv2(up.conv1(x, t, rng=generator), t, rng=generator)
    assert torch.allclose(up(x, t, rng(2)), (main + skip) / math.sqrt(2))
    assert swapae.StyledBlock(4, 4, 3, up=True).skip is None
    flat = swapae.StyledBlock(4, 4, 3)
    assert flat.skip.bias is None and not flat.skip.activate


def test_bilinear_upsampling_is_the_blur_away_from_the_border():
    x = noise(1, 1, 6, 6)
    a = F.interpolate(x, scale_factor=2.0, mode="bilinear")
    b = upfirdn(x, [1.0, 3.0, 3.0, 1.0], up=2, pad=(2, 1), gain=4.0)
    assert torch.allclose(a[:, :, 1:-1, 1:-1], b[:, :, 1:-1, 1:-1])


# ---- networks -----------------------------------------------------------------------------------


def on_meta(*flags):
    """The networks without memory, at full width."""
    args = swapae.get_args(["--data", ".", *flags])
    with torch.device("meta"):
        return swapae.build(args, torch.device("meta")), args


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("flags, counts", [
    ([], (30_584_872, 25_064_743, 28_859_521, 24_522_145)),
    (["--size", "128"], (30_584_872, 25_064_743, 28_384_513, 24_522_145)),
    (["--setting", "512"], (30_584_872, 25_064_743, 28_978_241, 24_522_145)),
    (["--setting", "1024"], (18_501_329, 19_913_160, 27_172_897, 24_529_169))])
def test_parameter_counts_are_the_released_ones(flags, counts):
    m, _ = on_meta(*flags)
    assert tuple(count(getattr(m, name)) for name in "EGDP") == counts


@pytest.mark.parametrize("side", [(256, 256), (512, 512), (256, 384), (112, 240)])
def test_code_shapes_of_full_networks(side):
    m, _ = on_meta()
    x = torch.empty(2, 3, *side, device="meta")
    s, t = m.E(x)
    assert s.shape == (2, 8, side[0] // 16, side[1] // 16) and t.shape == (2, 2048)
    assert m.G(s, t).shape == x.shape
    if side == (256, 256):
        assert m.D(x).shape == (2, 1)


def test_patch_features_have_the_released_size():
    m, args = on_meta()
    f = m.P.features(torch.empty(2, 8, 3, 128, 128, device="meta"))
    assert f.shape == (2, 8, 1536) and m.P.compare(f, f).shape == (2, 8)
    assert [layer.weight.shape[0] for layer in m.P.dense] == [2048, 2048, 1024, 1]


def test_four_base_blocks_on_request():
    m, _ = on_meta("--follow", "thesis")
    assert len(m.G.blocks) == 8
    assert [len(b.conv1.weight) for b in m.G.blocks] == [128, 256, 384, 512, 512, 512, 256, 128]


def test_codes_have_unit_length_or_are_left_alone():
    x = torch.rand(2, 3, 48, 48, generator=rng()) * 2 - 1
    s, t = swapae.encoder(tiny_args())(x)
    assert torch.allclose(s.norm(dim=1), torch.ones(2, 12, 12), atol=1e-4)
    assert torch.allclose(t.norm(dim=1), torch.ones(2), atol=1e-4)
    raw, _ = swapae.encoder(tiny_args("--code-norm", "none"))(x)
    assert float(raw.detach().norm(dim=1).std()) > 0.01
    G = swapae.generator(tiny_args())
    with torch.no_grad():  # an edited code is brought back to length 1
        assert torch.allclose(G(3 * s, 5 * t, rng()), G(s, t, rng()), atol=1e-5)


def test_texture_code_does_not_see_positions():
    """A periodic texture, shifted: the texture code stays, the structure code moves along."""
    torch.manual_seed(0)
    E = swapae.Encoder([8, 16, 32, 32, 32, 32, 32], texture=32, skip_reflect=True).eval()
    colours = torch.tensor([[0.9, -0.6, -0.7], [-0.8, -0.5, 0.6]])[:, :, None, None]
    tile = colours + 0.3 * F.interpolate(noise(2, 3, 10, 10).float(), scale_factor=4)
    wide = tile.repeat(1, 1, 8, 8)                           # the period is no multiple of 16
    with torch.no_grad():
        (s, t), (s_moved, moved) = E(wide[:, :, :256, :256]), E(wide[:, :, 16:272, 16:272])
    between = float((t[0] - t[1]).norm())
    assert float((t - moved).norm(dim=1).max()) < 0.05 * between
    assert torch.allclose(s[:, :, 4:-4, 4:-4], s_moved[:, :, 3:-5, 3:-5], atol=1e-4)


def test_structure_codes_are_local():
    E = swapae.encoder(tiny_args())
    x = torch.rand(1, 3, 96, 96, generator=rng()) * 2 - 1
    y = x.clone()
    y[:, :, :, 80:] = 0
    with torch.no_grad():
        (a, _), (b, _) = E(x), E(y)
    same = (a - b).abs().amax((0, 1)) < 1e-6
    assert same[:, :16].all() and not same[:, 20:].any()


def test_references_are_averaged_and_their_order_does_not_matter():
    P = lively(swapae.PatchDiscriminator(8, 1 / 16))
    r, q = noise(2, 3, 3, 8, 8), noise(2, 3, 3, 8, 8, seed=1)
    f, g = P.features(r), P.features(q)
    logits = P.compare(f, g)
    for i in range(2):
        for j in range(3):
            pair = torch.cat([f[i].mean(0), g[i, j]])
            assert torch.allclose(logits[i, j], P.dense(pair)[0])
    assert torch.allclose(logits, P.compare(f.flip(1), g))
    P.aggregate = False
    assert torch.allclose(P.compare(f, g)[1, 2], P.dense(torch.cat([f[1, 2], g[1, 2]]))[0])
    assert not torch.allclose(P.compare(f, g), P.compare(f.flip(1), g))


# ---- losses -------------------------------------------------------------------------------------


def test_crops_have_the_sides_and_bounds_of_sec_4_3_3():
    """A picture that holds its own coordinates tells where each patch was taken."""
    args = tiny_args("--crops", 4, "--patch", 16)
    H, W = 160, 320
    v, u = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W, indexing="ij")
    x = torch.stack([u, v, torch.zeros_like(u)]).expand(2, 3, H, W)
    shares, mirrored, aspects = [], [], []
    for seed in range(150):
        patches = swapae.random_crops(x, args, rng(seed))
        assert patches.shape == (2, 4, 3, 16, 16)
        inner = patches[..., 1:-1, 1:-1].flatten(0, 1)     # without the blended border
        across, down = inner[:, 0, 7], inner[:, 1, :, 7]
        assert 0 < float(across.min()) and float(across.max()) < 1
        assert 0 < float(down.min()) and float(down.max()) < 1
        width, height = ((c[:, -1] - c[:, 0]) * 15 / 13 for c in (across, down))
        assert (height > 0).all()                           # mirrored left-right only
        mirrored += (width < 0).tolist()
        shares += [*width.abs().tolist(), *height.tolist()]
        aspects += (width.abs() / height).tolist()
    assert 1 / 8 - 1e-3 < min(shares) < 0.13 and 0.245 < max(shares) < 1 / 4 + 1e-3
    assert abs(np.mean(shares) - 3 / 16) < 0.003
    assert 0.45 < np.mean(mirrored) < 0.55 and min(aspects) < 0.6 and max(aspects) > 1.7


def test_crop_values_are_bilinear_samples_of_the_window():
    args = tiny_args("--crops", 2, "--patch", 8)
    x, generator = noise(2, 3, 40, 24), rng(4)
    patches = swapae.random_crops(x, args, rng(4))
    flip = torch.rand(4, generator=generator) < 0.5
    share = 1 / 8 + torch.rand(4, 2, generator=generator) / 8
    centre = (2 * torch.rand(4, 2, generator=generator) - 1) * (1 - share)
    pixels = F.pad(x, (1, 1, 1, 1))                          # zeros beyond the border
    for k in range(4):
        for row in range(8):
            for column in range(8):
                a, b = (2 * i / 7 - 1 for i in (column, row))
                a = -a if flip[k] else a
                u = ((centre[k, 0] + share[k, 0] * a + 1) * 24 - 1) / 2 + 1
                v = ((centre[k, 1] + share[k, 1] * b + 1) * 40 - 1) / 2 + 1
                i, j = int(v), int(u)
                p, q = float(v) - i, float(u) - j
                window = pixels[k // 2, :, i:i + 2, j:j + 2]
                value = ((1 - p) * (1 - q) * window[:, 0, 0] + (1 - p) * q * window[:, 0, 1]
                         + p * (1 - q) * window[:, 1, 0] + p * q * window[:, 1, 1])
                found = patches[k // 2, k % 2, :, row, column]
                assert torch.allclose(found, value, atol=1e-5)


def test_r1_is_half_the_mean_squared_gradient():
    W = noise(5, 12)
    x, y = noise(3, 3, 2, 2).requires_grad_(), noise(3, 3, 2, 2, seed=1).requires_grad_()

    def net(x, y):
        return (W @ x.flatten(1).t()).tanh().sum(0) * y.flatten(1).square().sum(1)

    expected = 0
    for i in range(3):
        for k in range(2):
            pair = [v[i:i + 1].detach().requires_grad_() for v in (x, y)]
            grad, = torch.autograd.grad(net(*pair), pair[k])
            expected = expected + grad.square().sum() / 3 / 2
    assert torch.allclose(swapae.r1_penalty(net(x, y), x, y), expected)


def test_r1_reaches_the_weights_of_d_as_finite_differences_say():
    D = lively(swapae.Discriminator(8, 1 / 128))
    x = noise(2, 3, 8, 8).requires_grad_()
    weight = D.down[0].conv1.weight
    swapae.r1_penalty(D(x), x).backward()
    step = 1e-5 * noise(*weight.shape, seed=3)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step
        values.append(float(swapae.r1_penalty(D(x), x).detach()))
        with torch.no_grad():
            weight -= sign * step
    assert (values[0] - values[1]) / 2 == pytest.approx(float((weight.grad * step).sum()), rel=1e-4)


# ---- one training step --------------------------------------------------------------------------


class Labels(nn.Module):
    """Codes and pictures that say where they come from."""

    def forward(self, *inputs):
        if len(inputs) == 1:
            ids = inputs[0][:, 0, 0, 0]
            return ids.view(-1, 1, 1, 1).expand(-1, 1, 2, 2), ids.view(-1, 1)
        s, t = inputs
        return torch.cat([s, t.view(-1, 1, 1, 1).expand_as(s), s], dim=1)


@pytest.mark.parametrize("hybrids, expected", [
    ("all", [(1, 0), (0, 1), (3, 2), (2, 3)]), ("half", [(3, 2), (2, 3)])])
def test_half_is_rebuilt_and_neighbours_are_swapped(hybrids, expected):
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    m, args = SimpleNamespace(E=Labels(), G=Labels()), SimpleNamespace(hybrids=hybrids)
    rec, mix, x_t = swapae.rebuild_and_swap(m, x, args)
    pairs = [[(int(p[0, 0, 0]), int(p[1, 0, 0])) for p in pictures] for pictures in (rec, mix)]
    assert pairs == [[(0, 0), (1, 1)], expected]             # (structure of, texture of)
    assert [int(p[0, 0, 0]) for p in x_t] == [texture for _, texture in expected]


def sp(v):
    return torch.log1p(torch.exp(v)).mean()


@pytest.mark.parametrize("flags", [[], ["--hybrids", "half", "--lambda-gan-swap", "0.5"],
                                   ["--no-aggregate"]])
def test_step_equals_the_naive_one(flags):
    """Losses and all new weights of an R1 step, against plain autograd with nothing shared."""
    args = tiny_args("--no-noise", "--R1-every", 1, *flags)
    m, n = (swapae.build(args, CPU) for _ in range(2))
    for k in (m, n):
        for name in "EGDP":
            getattr(k, name).double()
    x_D, x_G = (noise(4, 3, 32, 32, seed=seed).clamp(-1, 1) for seed in (7, 8))
    losses = swapae.train_step(m, x_D, x_G, args, rng(3))
    generator, expected = rng(3), {}

    def pictures(x):
        rec = n.G(*(code[:2] for code in n.E(x)))
        s, t = n.E(x)
        mix = n.G(s[[1, 0, 3, 2]], t)
        return (rec, mix[2:], x[2:]) if args.hybrids == "half" else (rec, mix, x)

    def pair(references, queries):
        return n.P.compare(n.P.features(references), n.P.features(queries))

    def crops(x):
        return swapae.random_crops(x, args, generator)

    rec, mix, x_t = (p.detach() for p in pictures(x_D))
    ref, real, fake = crops(x_t), crops(x_t), crops(mix)
    expected |= {"D_real": sp(-n.D(x_D)), "D_rec": sp(n.D(rec)), "D_mix": sp(n.D(mix)),
                 "P_real": sp(-pair(ref, real)), "P_mix": sp(pair(ref, fake))}
    n.opt_D.zero_grad()
    sum(v * (0.5 if k in ("D_rec", "D_mix") else 1) for k, v in expected.items()).backward()
    n.opt_D.step()
    x = x_D.clone().requires_grad_()
    ref, real = (crops(x_t).requires_grad_() for _ in range(2))
    g, = torch.autograd.grad(n.D(x).sum(), x, create_graph=True)
    h = torch.autograd.grad(pair(ref, real).sum(), (ref, real), create_graph=True)
    n.opt_D.zero_grad()
    expected["R1"] = g.square().sum() / 4 / 2
    expected["R1_P"] = sum(v.square().sum() for v in h) / len(x_t) / 4
    (10 * expected["R1"] + expected["R1_P"]).backward()
    n.opt_D.step()
    rec, mix, x_t = pictures(x_G)
    ref, fake = crops(x_t), crops(mix)
    expected |= {"rec": (rec - x_G[:2]).abs().mean(), "GAN_rec": sp(-n.D(rec)),
                 "GAN_swap": sp(-n.D(mix)), "cooccur": sp(-pair(ref, fake))}
    n.opt_G.zero_grad()
    (expected["rec"] + 0.5 * expected["GAN_rec"] + args.lambda_gan_swap * expected["GAN_swap"]
     + expected["cooccur"]).backward()
    n.opt_G.step()
    assert losses.keys() == expected.keys() == LOSSES | {"R1", "R1_P"}
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-6), name
    for name in "EGDP":
        for a, b in zip(getattr(m, name).parameters(), getattr(n, name).parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_gradient_routing():
    args = tiny_args()
    m = swapae.build(args, CPU)
    grads = []

    def watch(*_):
        grads.append({name: [None if p.grad is None else p.grad.clone()
                             for p in getattr(m, name).parameters()] for name in "EGDP"})

    m.opt_D.register_step_pre_hook(watch)
    m.opt_G.register_step_pre_hook(watch)
    swapae.train_step(m, *random_batch(args), args, rng())
    first, last = grads
    for name in "EG":                                       # D's step leaves E and G alone
        assert all(g is None for g in first[name])
        assert all(g is not None for g in last[name])
    for name in "DP":                                       # G's step adds nothing to D and P
        assert all(g is not None for g in first[name])
        assert_same(first[name], last[name])


def test_r1_comes_every_16th_step():
    args = tiny_args()
    m, batch = swapae.build(args, CPU), random_batch(args)
    found = {step for step in (0, 14, 15, 16, 31)
             if "R1" in swapae.train_step(m, *batch, args, rng(), step=step)}
    assert found == {15, 31}
    never = tiny_args("--R1-every", 0)
    assert swapae.train_step(m, *batch, never, rng(), step=15).keys() == LOSSES


def test_without_cooccurrence_p_is_not_trained():
    args = tiny_args("--ablation", "no-cooccurrence", "--R1-every", 1)
    m = swapae.build(args, CPU)
    before = {k: v.clone() for k, v in m.P.state_dict().items()}
    losses = swapae.train_step(m, *random_batch(args), args, rng())
    assert losses.keys() == LOSSES - {"P_real", "P_mix", "cooccur"} | {"R1"}
    assert_same(before, dict(m.P.state_dict()))


def test_ema_is_the_running_mean():
    args = tiny_args("--ema", 0.75)
    m = swapae.build(args, CPU)
    start = m.G.to_rgb.weight.detach().clone()
    swapae.train_step(m, *random_batch(args), args, rng())
    assert torch.allclose(m.G_ema.to_rgb.weight, 0.75 * start + 0.25 * m.G.to_rgb.weight)
    assert swapae.in_use(m).G is m.G_ema
    assert swapae.in_use(swapae.build(tiny_args(), CPU)).E is not None


def test_amp_step_is_finite():
    args = tiny_args("--amp", "--R1-every", 1)
    m = swapae.build(args, CPU)
    losses = swapae.train_step(m, *random_batch(args), args, rng())
    assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())


@pytest.mark.slow
def test_reconstruction_is_learned(drawn):
    """Four pictures, L1 alone: better than each one's mean colour after 60 updates."""
    args = tiny_args("--lambda-gan-rec", 0, "--lambda-gan-swap", 0, "--ablation",
                     "no-cooccurrence", "--lr", 0.01, "--width-G", 0.125, "--no-noise",
                     "--R1-every", 0)
    m = swapae.build(args, CPU)
    x = swapae.test_pictures(drawn, args, CPU)
    x = torch.cat([x[:2], x[:2]])                            # the first half is rebuilt
    for step in range(60):
        losses = swapae.train_step(m, x, x, args, rng(step), step=step)
    flat = x.mean((2, 3), keepdim=True)
    assert float(losses["rec"]) < 0.8 * float((flat - x).abs().mean())


# ---- data ---------------------------------------------------------------------------------------


def test_samples_depend_on_seed_and_number_alone_and_epochs_show_all(drawn):
    args = tiny_args()
    data, again = (swapae.Pictures(drawn, args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(data[3], again[3], strict=True))
    assert not torch.equal(data[3][0], data[3][1]) and data[0][0].shape == (3, 32, 32)
    seen = {min(tuple(p.flatten().tolist()), tuple(p.flip(2).flatten().tolist()))
            for n in range(5) for p in data[n]}              # ten pictures: two epochs of five
    assert len(seen) == 5


def test_short_side_is_resized_then_cropped(tmp_path):
    rows = np.zeros((60, 120, 3), np.uint8)
    rows[:, 60:] = 255
    Image.fromarray(rows).save(tmp_path / "a.png")
    args = tiny_args("--load", 40)
    x = swapae.resized(tmp_path / "a.png", args)
    assert x.shape == (3, 32, 32)
    assert float(x[:, :, :14].mean()) < -0.9 and float(x[:, :, 18:].mean()) > 0.9  # the middle
    shares = {round(float((swapae.resized(tmp_path / "a.png", args, random.Random(i))
                           > 0).float().mean()), 2) for i in range(30)}
    assert {0.0, 1.0} <= shares and len(shares) > 4          # both ends of a landscape are seen


def test_folders_that_are_understood(drawn, tmp_path, capsys):
    assert len(swapae.training_files(drawn)) == 5 and len(swapae.test_files(drawn, "test")) == 4
    assert len(swapae.training_files(drawn / "test")) == 4   # pictures without sub-folders
    for side in "AB":
        (tmp_path / f"train{side}").mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / f"train{side}/1.png")
    assert len(swapae.training_files(tmp_path)) == 2 == len(swapae.test_files(tmp_path, "test"))
    assert "these are training pictures" in capsys.readouterr().out
    assert swapae.test_files(drawn, "val")[3] == drawn / "val/0003.png"
    with pytest.raises(common.UserError, match="no val pictures"):
        swapae.test_files(tmp_path, "val")


# ---- training loop ------------------------------------------------------------------------------


def test_run_folder(trained):
    files = {str(f.relative_to(trained)) for f in trained.rglob("*") if f.is_file()}
    assert files == {"config.json", "log.csv", "index.html", "last.pt", "result.json",
                     "samples/step_000000.png", "samples/step_000002.png"}
    rows = (trained / "log.csv").read_text().splitlines()
    assert set(rows[0].split(",")) >= LOSSES and len(rows) == 3
    assert torch.load(trained / "last.pt", weights_only=True)["parts"].keys() == {
        "E", "G", "D", "P", "opt_G", "opt_D"}


@pytest.mark.parametrize("flags", [[], ["--ema", "0.9", "--follow", "thesis"]])
def test_resumed_run_is_bit_identical(drawn, tmp_path, flags):
    flags = ["--data", drawn, *TINY, *flags, "--steps", 4, "--R1-every", 2]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(swapae, lambda: run(*flags, "--out", tmp_path / "parts"), step=3)
    run(*flags, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 4
    assert_same(a["parts"], b["parts"])


def test_every_row_of_the_log_has_all_columns(drawn, tmp_path):
    run("--data", drawn, *TINY, "--steps", 3, "--R1-every", 2, "--out", tmp_path / "run")
    head, *rows = [line.split(",") for line in (tmp_path / "run/log.csv").read_text().splitlines()]
    assert set(head) == LOSSES | {"step", "R1", "R1_P", "seconds"}
    assert [len(row) for row in rows] == [len(head)] * 3
    r1 = [float(row[head.index("R1")]) for row in rows]
    assert r1[0] == 0 and r1[1] > 0 and r1[2] == r1[1]      # the latest one


def test_evenly_spaced_pictures(drawn):
    files = [drawn / f"train/000{i}.png" for i in range(5)]
    args = tiny_args()
    two = swapae.opened(files, args, CPU, 2)
    assert torch.equal(two, swapae.opened([files[0], files[2]], args, CPU))
    assert len(swapae.opened(files, args, CPU, 9)) == 5


@pytest.mark.slow
def test_two_processes_run_and_see_more_pictures(drawn, tmp_path):
    flags = ["--data", str(drawn), *TINY, "--batch", "2", "--steps", "2"]
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", "swapae.py", *flags, "--out",
                          str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr
    parts = torch.load(tmp_path / "two/last.pt", weights_only=True)["parts"]
    run(*flags, "--out", tmp_path / "one")
    alone = torch.load(tmp_path / "one/last.pt", weights_only=True)["parts"]
    assert not torch.equal(parts["G"]["to_rgb.weight"], alone["G"]["to_rgb.weight"])


# ---- editing ------------------------------------------------------------------------------------


def test_codes_and_pictures_of_any_size(model):
    m, args = model
    for h, w in ((28, 28), (5, 70), (33, 50), (64, 41)):
        x = torch.rand(2, 3, h, w, generator=rng()) * 2 - 1
        s, t = swapae.embed(m, x, args)
        assert s.shape == (2, 8, *(max(7, -(-n // 4)) for n in (h, w))) and t.shape == (2, 16)
        assert swapae.paint(m, s, t, args, (h, w)).shape == x.shape
        assert swapae.swap(m, x, torch.rand(1, 3, 60, 31), args).shape == x.shape


def test_swap_takes_structure_and_texture_from_where_it_says(model):
    m, args = model
    x, y = (torch.rand(1, 3, 32, 32, generator=rng(i)) * 2 - 1 for i in (0, 1))
    with torch.no_grad():
        (s, t), (_, other) = m.E(x), m.E(y)
        for alpha in (0.0, 0.3, 1.0):
            code = (1 - alpha) * t + alpha * other
            truth = m.G(s, code, rng(args.seed)).clamp(-1, 1)
            assert torch.allclose(swapae.swap(m, x, y, args, alpha), truth, atol=1e-5)
    assert torch.equal(swapae.swap(m, x, y, args), swapae.swap(m, x, y, args))  # noise stays


def test_attribute_is_the_difference_of_means():
    a, b = noise(10, 6), noise(7, 6, seed=1)
    assert torch.allclose(swapae.attribute(a, b)[0], a.mean(0) - b.mean(0))


def test_principal_directions_of_a_known_cloud():
    basis = torch.linalg.qr(noise(5, 5))[0]
    codes = noise(4000, 5, seed=2) * torch.tensor([3.0, 2.0, 0.1, 0.1, 0.1]) @ basis.t() + 7
    directions, deviations = swapae.principal_directions(codes, 2)
    assert torch.allclose((directions @ basis[:, :2]).abs(), torch.eye(2).double(), atol=0.05)
    assert torch.allclose(deviations, torch.tensor([3.0, 2.0]).double(), rtol=0.05)
    assert torch.allclose(directions @ directions.t(), torch.eye(2).double(), atol=1e-9)
    assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_region_edits_and_clones_change_their_cells_only():
    s, direction = noise(1, 4, 6, 7), noise(4, seed=1)
    mask = torch.zeros(1, 1, 6, 7).double()
    mask[..., 2:4, 1:3] = 1
    edited = swapae.edit_region(s, direction, mask)
    for row in range(6):
        for column in range(7):
            inside = 2 <= row < 4 and 1 <= column < 3
            expected = s[0, :, row, column] + (direction if inside else 0)
            assert torch.allclose(edited[0, :, row, column], expected)
    source = noise(1, 4, 5, 5, seed=2)
    moved = swapae.clone(s, source, (1, 2, 3, 2), (4, 0))
    assert torch.equal(moved[:, :, 0:2, 4:7], source[:, :, 2:4, 1:4])
    moved[:, :, 0:2, 4:7] = s[:, :, 0:2, 4:7]
    assert torch.equal(moved, s)
    assert swapae.clone(s, source, (3, 3, 9, 9), (6, 5)).shape == s.shape  # cut at both borders


def test_a_white_mask_covers_pictures_of_odd_size(model, tmp_path):
    m, args = model
    Image.new("L", (41, 35), 255).save(tmp_path / "white.png")
    args.mask, x = str(tmp_path / "white.png"), torch.zeros(1, 3, 35, 41)
    mask = swapae.mask_of(swapae.embed(m, x, args)[0], x, args, 4)
    args.mask = None
    assert mask.shape == (1, 1, 9, 11) and (mask == 1).all()


def test_similarity_mask_is_the_cosine():
    s = noise(1, 3, 4, 5)
    mask = swapae.similarity_mask(s, 1, 2, 0.3)
    for row in range(4):
        for column in range(5):
            cosine = F.cosine_similarity(s[0, :, 1, 2], s[0, :, row, column], dim=0)
            assert bool(mask[0, 0, row, column]) == bool(cosine >= 0.3)


def test_an_edit_of_one_corner_leaves_the_far_corner(model):
    """Isolated local editing: no layer of G normalises over places (Sec. 4.4.7)."""
    m, args = model
    s, t = swapae.embed(m, torch.rand(1, 3, 160, 160) * 2 - 1, args)
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., :4, :4] = 1
    a = swapae.paint(m, s, t, args)
    b = swapae.paint(m, swapae.edit_region(s, torch.ones(8), mask), t, args)
    changed = (a - b).abs().amax((0, 1)) > 1e-6
    assert changed[:12, :12].any() and not changed[80:, 80:].any()


# ---- commands -----------------------------------------------------------------------------------


def test_translate_keeps_every_size(trained, drawn, tmp_path):
    sizes = odd_pictures(tmp_path / "in")
    run("--translate", tmp_path / "in", "--weights", trained / "last.pt", "--exemplar",
        drawn / "test/0000.png", "--out", tmp_path / "out")
    assert {f.stem: Image.open(f).size for f in (tmp_path / "out").iterdir()} == sizes


def pictures(folder, args):
    return swapae.opened(common.list_pictures(folder), args, CPU)


def opened(path):
    return common.to_tensor(common.open_rgb(path))[None]


def test_exemplars_alphas_vectors_and_directions(trained, drawn, model, tmp_path):
    m, args = model
    flags = ["--translate", drawn / "test/0001.png", "--weights", trained / "last.pt"]
    x = opened(drawn / "test/0001.png")

    def written(*extra, name="0001.png"):
        run(*flags, *extra, "--out", tmp_path / "out")
        return opened(tmp_path / "out" / name)

    s, t = swapae.embed(m, x, args)
    other = opened(drawn / "test/0002.png")
    strip = written("--exemplar", drawn / "test/0002.png", "--alpha", 0, 0.5)
    truth = torch.cat([swapae.swap(m, x, other, args, a) for a in (0.0, 0.5)], dim=3)
    assert torch.allclose(strip, truth, atol=1 / 127)
    assert torch.allclose(written("--exemplar", drawn / "test", name="0002/0001.png"),
                          swapae.swap(m, x, other, args), atol=1 / 127)
    codes = {d: swapae.texture_codes(m, pictures(drawn / d, args), args)
             for d in ("train", "test")}
    step = codes["train"].mean(0) - codes["test"].mean(0)
    assert torch.allclose(written("--vector", drawn / "train", drawn / "test", "--gain", 2),
                          swapae.paint(m, s, t + 2 * step, args), atol=1 / 127)
    directions, deviations = swapae.principal_directions(codes["train"], 2)
    assert torch.allclose(written("--pca", 2, "--gain", -1),
                          swapae.paint(m, s, t - deviations[1] * directions[1], args),
                          atol=1 / 127)


def test_regions_and_clones(trained, drawn, model, tmp_path):
    m, args = model
    flags = ["--translate", drawn / "test/0001.png", "--weights", trained / "last.pt", "--out",
             tmp_path / "out"]
    x = opened(drawn / "test/0001.png")
    s, t = swapae.embed(m, x, args)
    white = np.zeros((32, 32), np.uint8)
    white[8:16, :10] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    run(*flags, "--pca", 1, "--mask", tmp_path / "mask.png", "--gain", 3)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:4, :2], mask[..., 2:4, 2] = 1, 0.5          # half of the third cell is white
    codes = swapae.structure_codes(m, pictures(drawn / "train", args), args)
    directions, deviations = swapae.principal_directions(codes, 1)
    edited = swapae.edit_region(s, 3 * deviations[0] * directions[0], mask)
    assert torch.allclose(opened(tmp_path / "out/0001.png"), swapae.paint(m, edited, t, args),
                          atol=1 / 127)
    run(*flags, "--pca", 1, "--mask", "9,17", "--similar", 0.2)
    mask = swapae.similarity_mask(s, 4, 2, 0.2)
    edited = swapae.edit_region(s, deviations[0] * directions[0], mask)
    assert torch.allclose(opened(tmp_path / "out/0001.png"), swapae.paint(m, edited, t, args),
                          atol=1 / 127)
    assert swapae.boxes_of([5, 0, 2, 5, 9, 3], s, s, 4) == ((1, 0, 1, 2), (2, 0))  # cells touched
    run(*flags, "--clone", 0, 4, 8, 12, 20, 0, "--exemplar", drawn / "test/0003.png")
    source, _ = swapae.embed(m, opened(drawn / "test/0003.png"), args)
    edited = swapae.clone(s, source, (0, 1, 2, 3), (5, 0))
    assert torch.allclose(opened(tmp_path / "out/0001.png"), swapae.paint(m, edited, t, args),
                          atol=1 / 127)


def test_evaluate_prints_the_papers_metrics(trained, drawn, monkeypatch, capsys):
    shown = {}

    def fid(fakes, reals, device, weights):
        shown.update(fakes=len(list(fakes)), reals=len(list(reals)))
        return 12.5

    monkeypatch.setattr(metrics, "fid", fid)
    run("--evaluate", "--weights", trained / "last.pt", "--data", drawn, "--vgg", "random",
        "--lpips", "vgg")
    out = capsys.readouterr().out
    for words in ("reconstruction VGG distance (random) (4 pictures)", "reconstruction L1",
                  "SIFID of swaps to the texture (random weights)", "copy the structure",
                  "self-similarity distance of swaps to the structure", "embedding, seconds on cpu",
                  "hybrid, seconds on cpu", "FID (4 swaps, 4 structure pictures"):
        assert words in out, words
    assert shown == {"fakes": 4, "reals": 4}


def test_user_errors_are_one_line(drawn, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last, picture = trained / "last.pt", drawn / "test/0000.png"
    assert "--size 100" in run_fails(capsys, "--data", drawn, "--size", 100)
    assert "--batch 3" in run_fails(capsys, "--batch", 3)
    assert "--patch 100" in run_fails(capsys, "--patch", 100)
    assert "--crop" in run_fails(capsys, "--crop", 0.5, 0.25)
    assert "--load" in run_fails(capsys, "--load", 20)
    assert "--ema" in run_fails(capsys, "--ema", 1)
    assert "--width-E 0.01: at least" in run_fails(capsys, "--width-E", 0.01)
    assert "no such folder" in run_fails(capsys, "--data", "nowhere")
    (tmp_path / "one").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "one/a.png")
    assert "swapping needs two" in run_fails(capsys, "--data", "one", *TINY)
    assert "--weights FILE is needed" in run_fails(capsys, "--translate", picture, "--exemplar",
                                                   picture)
    edit = ["--translate", picture, "--weights", last]
    assert "needs one of" in run_fails(capsys, *edit)
    assert "needs one of" in run_fails(capsys, *edit, "--pca", 1, "--exemplar", picture)
    assert "--mask" in run_fails(capsys, *edit, "--exemplar", picture, "--mask", "1,1")
    assert "directions 1 to 8" in run_fails(capsys, *edit, "--pca", 9, "--mask", "1,1")
    assert "5 codes have directions 1 to 4" in run_fails(capsys, *edit, "--pca", 5)
    assert "directions 1 to 4" in run_fails(capsys, *edit, "--pca", 0)
    for box in ((-8, 0, 16, 16, 0, 0), (0, 0, 0, 8, 0, 0)):
        assert "--clone X Y" in run_fails(capsys, *edit, "--clone", *box)
    assert "starts outside" in run_fails(capsys, *edit, "--clone", 0, 0, 8, 8, 0, 32)
    for flag, value in (("--exemplar", picture), ("--pca", 1), ("--mask", "1,1")):
        assert f"{flag}: needs --translate" in run_fails(capsys, flag, value)
    assert "outside" in run_fails(capsys, *edit, "--pca", 1, "--mask", "99,1")
    Image.new("L", (9, 9)).save(tmp_path / "mask.png")
    assert "9x9 pixels" in run_fails(capsys, *edit, "--pca", 1, "--mask", "mask.png")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    assert "neither a checkpoint" in run_fails(capsys, "--translate", picture, "--exemplar",
                                               picture, "--weights", tmp_path / "other.pt")
    import torchvision

    for weights in (torchvision.models.VGG16_Weights, torchvision.models.Inception_V3_Weights):
        def offline(*_, **__):
            raise OSError("no network")
        monkeypatch.setattr(weights.IMAGENET1K_V1.value.__class__, "get_state_dict", offline,
                            raising=False)
        monkeypatch.setattr(weights, "get_state_dict", offline)
    message = run_fails(capsys, "--evaluate", "--weights", last, "--data", drawn, "--vgg",
                        "imagenet")
    assert "cannot download" in message and "--vgg random" in message


# ---- toy/textures -------------------------------------------------------------------------------


def test_textures_layout_and_determinism(drawn, tmp_path):
    for split, n in (("train", 5), ("test", 4), ("test_truth", 4)):
        names = sorted(f.name for f in (drawn / split).iterdir())
        assert names == [f"{i:04d}.png" for i in range(n)]
        assert Image.open(drawn / split / names[0]).size == (32, 32)
    toy.draw("textures", tmp_path / "again", n=2, size=32, n_test=4)
    for name in ("train/0001.png", "test/0003.png", "test_truth/0003.png"):
        assert (tmp_path / "again" / name).read_bytes() == (drawn / name).read_bytes()
    with pytest.raises(ValueError, match="n_test"):
        toy.draw("textures", tmp_path / "bad", n_test=1)


def test_elevation_is_positive_inside_and_falls_by_one_per_side():
    disc = textures.elevation([("disc", 0.5, 0.5, 0.25, 0.0)], 256)
    assert (disc > 0).mean() == pytest.approx(math.pi * 0.25 ** 2, abs=1e-3)
    assert disc[128, 128] == pytest.approx(0.25, abs=0.01) and disc[128, 0] == pytest.approx(
        -0.25, abs=0.01)
    square, bar, triangle = (textures.elevation([(kind, 0.5, 0.5, 0.25, 0.0)], 256) > 0
                             for kind in ("square", "bar", "triangle"))
    assert square.mean() == pytest.approx(0.4 ** 2, abs=4e-3)
    assert bar.mean() == pytest.approx(0.7 * 0.25, abs=4e-3)
    assert triangle.mean() == pytest.approx(3 * math.sqrt(3) * 0.15 ** 2, abs=4e-3)
    two = [("disc", 0.3, 0.3, 0.2, 0.0), ("bar", 0.7, 0.7, 0.2, 0.4)]
    assert np.array_equal(textures.elevation(two, 64), np.maximum(textures.elevation(two[:1], 64),
                                                                  textures.elevation(two[1:], 64)))


def test_the_truth_has_ones_layout_and_the_others_materials():
    layout = textures.sample_layout(np.random.default_rng(1))
    height = textures.elevation(layout, 256).reshape(128, 2, 128, 2).mean((1, 3))
    assert 0.05 < (height > 0).mean() < 0.6
    motifs = set()
    for seed in range(4):
        texture = textures.sample_texture(np.random.default_rng(seed))
        picture = np.asarray(textures.render_texture(layout, texture, 128)).astype(float)
        for where, material in ((height > textures.SOFT, texture.figure),
                                (height < -textures.SOFT, texture.ground)):
            back, mark = np.array(material.back), np.array(material.mark)
            share = ((picture[where] - back) @ (mark - back)) / np.square(mark - back).sum()
            assert np.abs(back + share[:, None] * (mark - back) - picture[where]).max() < 1.5
            assert share.min() > -0.1 and share.max() < 1.1  # between its two colours
            assert (share.max() < 0.1) == (material.motif == "plain")
            motifs.add(material.motif)
    assert motifs == set(textures.MOTIFS)


def test_motifs_run_along_the_outline():
    depth = np.linspace(0, 6 * textures.RIM, 601)[None]           # 100 samples per rim width
    mark = {m: textures.paint_material(textures.Material(m, (0, 0, 0), (1, 1, 1)), depth)[0, :, 0]
            for m in textures.MOTIFS}
    assert (mark["plain"] == 0).all()
    assert mark["rim"][0] == 1 and mark["rim"][100] == pytest.approx(0.5)
    assert (mark["rim"][100 + round(50 * textures.SOFT / textures.RIM) + 1:] == 0).all()
    assert mark["rings"][::100] == pytest.approx([1, 0] * 3 + [1])


def test_texture_scores_of_known_answers(drawn):
    x, y = (swapae.stacked(drawn, d, CPU).numpy() for d in ("test", "test_truth"))
    exemplar = np.roll(x, -1, axis=0)
    perfect = toy.texture_scores(x, exemplar, y, y)
    assert [s["name"] for s in perfect] == ["swap error", "palette error", "pattern error"]
    assert all(s["value"] == 0 and min(s["trivial"].values()) > 3 for s in perfect)
    copied = toy.texture_scores(x, exemplar, x, y)
    assert all(s["value"] == pytest.approx(s["trivial"]["copy the structure"]) for s in copied)
    pale = toy.texture_scores(x, exemplar, y * 0.5, y)      # what is linear in y, halved
    assert pale[2]["value"] == pytest.approx(
        np.abs(y - textures.window_mean(y, round(32 * textures.RIM / 2))).mean() / 2 * 127.5)
    even = toy.texture_scores(x, exemplar, y + 0.25, y)     # a wrong tone everywhere
    assert even[1]["value"] == pytest.approx(0.25 * 127.5)
    assert even[2]["value"] == pytest.approx(0, abs=1e-6)
    assert copied[0]["value"] == pytest.approx(np.abs(x - y).mean() * 127.5)
