"""swapae.py: every equation against a plain transcription, and the script as its users run it."""

import math
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, error_of, interrupted, odd_pictures, two_processes
from PIL import Image
from transcriptions import close, parameters

import common
import swapae
from lab import metrics, toy, variants
from lab.toy import textures

ROOT = Path(__file__).parent.parent
WIDTHS = ["--widths", "0.125", "0.0625", "0.015625", "0.0625"]
TINY = ["--size", "32", "--downs", "2", "--texture", "16", *WIDTHS, "--patch", "8", "--crops", "3",
        "--batch", "4", "--workers", "0", "--device", "cpu", "--log-every", "1", "--vgg", "random"]
CPU = torch.device("cpu")
NETS = ("E", "G", "D", "D_patch")
LOSSES = {"L_D", "L_Dpatch", "L_rec", "L_GAN_rec", "L_GAN_swap", "L_Cooccur"}


def tiny_args(*flags):
    return swapae.get_args(["--data", ".", *TINY, *map(str, flags)])


def run(*flags):
    return swapae.main([*map(str, flags)])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


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
    """Three steps, an R1 update in the second."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run("--data", drawn, *TINY, "--steps", 3, "--R1-every", 2, "--out", out)
    return out


@pytest.fixture(scope="module")
def model(trained):
    args = swapae.get_args(["--weights", str(trained / "last.pt"), "--device", "cpu"])
    return swapae.load_networks(args, CPU), args


# ---- transcriptions: parameters in order, functions only ----------------------------------------


def lrelu(x):
    return torch.where(x > 0, x, 0.2 * x) * 2 ** 0.5


def conv(p, x, stride=1, padding=0, bias=True, activate=True):
    """Weights over the square root of their fan-in; slope 0.2 and gain sqrt 2."""
    weight = next(p)
    x = F.conv2d(x, weight / math.sqrt(weight[0].numel()), None, stride, padding)
    x = x + next(p).view(1, -1, 1, 1) if bias else x
    return lrelu(x) if activate else x


def linear(p, x, activate=False):
    weight = next(p)
    x = x @ weight.t() / math.sqrt(weight.shape[1]) + next(p)
    return lrelu(x) if activate else x


def upfirdn(x, taps, down=1, pad=(0, 0), gain=1.0):
    """Pad by zeros, true convolution, keep every down-th: loops over the kernel."""
    row = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    kernel, k = gain * torch.outer(row, row), len(taps)
    x = F.pad(x, (*pad, *pad))
    h, w = (n - k + 1 for n in x.shape[2:])
    return sum(kernel[k - 1 - i, k - 1 - j] * x[:, :, i:i + h, j:j + w]
               for i in range(k) for j in range(k))[:, :, ::down, ::down]


E_TAPS, TAPS = [1.0, 2.0, 1.0], [1.0, 3.0, 3.0, 1.0]


def encoder_block(p, x):
    main = conv(p, F.pad(x, (1, 1, 1, 1), mode="reflect"))
    main = conv(p, upfirdn(F.pad(main, (2, 1, 2, 1), mode="reflect"), E_TAPS), stride=2)
    skip = conv(p, upfirdn(x, E_TAPS, pad=(1, 0)), stride=2, bias=False, activate=False)
    return (main + skip) / math.sqrt(2)


def res_block(p, x, down=True):
    main = conv(p, x, padding=1)
    main = conv(p, upfirdn(main, TAPS, pad=(2, 2)), stride=2) if down else conv(p, main, padding=1)
    x = upfirdn(x, TAPS, pad=(1, 1)) if down else x
    skip = conv(p, x, 2 if down else 1, bias=False, activate=False)
    return (main + skip) / math.sqrt(2)


def length_one(code):
    return code / (code.square().sum(1, keepdim=True) + 1e-8).sqrt()


def encoder(params, x, downs=2):
    p = iter(params)
    x = conv(p, x)
    for _ in range(downs):
        x = encoder_block(p, x)
    z_s = conv(p, conv(p, x), activate=False)
    for _ in range(2):
        x = conv(p, x, stride=2)
    z_t = linear(p, x.mean((2, 3)))
    assert next(p, None) is None
    return length_one(z_s), length_one(z_t)


def styled(p, x, z_t, up, seed):
    """Each picture gets its own weights here; the layer never makes them. seed: of noise that all
    pictures share; None: fresh noise from torch's own generator."""
    weight, strength, bias = next(p), next(p), next(p)
    style, results = linear(p, z_t), []
    for x_i, s in zip(x.split(1), style, strict=True):
        s = s / (s.square().mean() + 1e-8).sqrt()
        w = weight / math.sqrt(weight[0].numel())
        w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt() * s.view(1, -1, 1, 1)
        if up:
            y = F.conv_transpose2d(x_i, w.transpose(0, 1), stride=2)
            results.append(upfirdn(y, TAPS, pad=(1, 1), gain=4.0))
        else:
            results.append(F.conv2d(x_i, w, padding=1))
    y = torch.cat(results)
    grain = (torch.randn(len(y), 1, *y.shape[2:], dtype=y.dtype) if seed is None else
             torch.randn(1, 1, *y.shape[2:], generator=seed).to(y))
    return lrelu(y + strength * grain + bias.view(1, -1, 1, 1))


def generator(params, z_s, z_t, downs=2, seed=None):
    p, z_s, z_t = iter(params), length_one(z_s), length_one(z_t)
    scale, shift = linear(p, z_t), linear(p, z_t)
    x = z_s * scale[:, :, None, None] + shift[:, :, None, None]
    for block in range(2 + downs):
        up = block >= 2
        main = styled(p, styled(p, x, z_t, up, seed), z_t, False, seed)
        if main.shape[1] != x.shape[1] or not up:
            x = conv(p, x, bias=up, activate=up)
        if up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = (main + x) / math.sqrt(2)
    weight, bias = next(p), next(p)
    x = x * linear(p, z_t)[:, :, None, None]
    x = F.conv2d(x, weight / math.sqrt(weight.shape[1])) + bias.view(1, -1, 1, 1)
    assert next(p, None) is None
    return x


def discriminator(params, x):
    p, x = iter(params), x
    x = conv(p, x)
    while x.shape[2] > 4:
        x = res_block(p, x)
    x = linear(p, linear(p, conv(p, x, padding=1).flatten(1), activate=True))
    assert next(p, None) is None
    return x


def patch_discriminator(params, queries, references, aggregate=True):
    """Patches (T, 3, 8, 8) of one picture and T of another -> T logits, pair by pair."""
    def features(x):
        p = iter(params)
        x = conv(p, x, padding=1)
        while x.shape[2] > 4:
            x = res_block(p, x)
        x = conv(p, res_block(p, x, down=False)).flatten(1)
        return x, list(p)

    (q, dense), (r, _) = features(queries), features(references)
    logits = []
    for j in range(len(q)):
        x, p = torch.cat([r.mean(0) if aggregate else r[j], q[j]]), iter(dense)
        for _ in range(3):
            x = linear(p, x, activate=True)
        logits.append(linear(p, x))
        assert next(p, None) is None
    return torch.cat(logits)


def bilinear(position, n, dtype):
    """Rows that read n pixels at positions in [-1, 1]; zero beyond the border."""
    pixel = ((position.to(dtype) + 1) * n - 1) / 2
    return (1 - (pixel[:, None] - torch.arange(n)).abs()).clamp(min=0)


def naive_crops(x, args, draw):
    """(B, 3, H, W) -> (B, T, 3, patch, patch), each patch as a product of two matrices."""
    n, (low, high) = len(x) * args.crops, args.crop
    flip = torch.rand(n, generator=draw) < 0.5
    share = low + (high - low) * torch.rand(n, 2, generator=draw)
    centre = (2 * torch.rand(n, 2, generator=draw) - 1) * (1 - share)
    a, patches = torch.linspace(-1, 1, args.patch), []
    for k in range(n):
        u = centre[k, 0] + a * (share[k, 0] * (-1 if flip[k] else 1))
        v = centre[k, 1] + a * share[k, 1]
        columns, rows = (bilinear(at, side, x.dtype) for at, side in
                         ((u, x.shape[3]), (v, x.shape[2])))
        patches.append(rows @ x[k // args.crops] @ columns.t())
    return torch.stack(patches).unflatten(0, (len(x), args.crops))


# ---- configuration and networks -----------------------------------------------------------------


def test_defaults_are_the_released_ones():
    args = swapae.get_args(["--data", "."])
    assert (args.size, args.load, args.batch, args.ema) == (256, None, 16, 0)
    assert (args.lambda_rec, args.lambda_GAN_rec, args.lambda_GAN_swap, args.lambda_cooccur) == (
        1.0, 0.5, 1.0, 1.0)
    assert (args.lambda_R1, args.lambda_patch_R1, args.R1_every, args.crops, args.patch) == (
        10.0, 1.0, 16, 8, 128)
    assert args.crop == [1 / 8, 1 / 4] and args.aggregate and args.code_norm == "unit"
    settings = {name: swapae.get_args(["--data", ".", "--setting", name])
                for name in swapae.SETTINGS}
    assert settings["mountains"].lambda_patch_R1 == 10 and settings["mountains"].size == 512
    assert not settings["church"].aggregate and not settings["bedroom"].aggregate
    assert settings["bedroom"].batch == 32
    big = settings["1024"]
    assert (big.size, big.load, big.downs, big.texture, big.patch) == (768, 1024, 5, 1536, 256)


def test_rates_of_the_two_adams():
    """StyleGAN2's lazy regularisation: 16 updates of D and one for R1 count as 16."""
    nets = swapae.build(tiny_args(), CPU)
    (g,), (d,) = nets.opt_G.param_groups, nets.opt_D.param_groups
    assert (g["lr"], g["betas"], g["eps"], g["weight_decay"]) == (0.002, (0.0, 0.99), 1e-8, 0)
    assert d["lr"] == pytest.approx(0.00188235, rel=1e-5) and d["weight_decay"] == 0
    assert d["betas"] == pytest.approx((0.0, 0.990585), rel=1e-5)
    alone = swapae.build(tiny_args("--R1-every", 0), CPU).opt_D.param_groups[0]
    assert (alone["lr"], alone["betas"]) == (0.002, (0.0, 0.99))
    for optimiser, names in ((g, "EG"), (d, ("D", "D_patch"))):
        ours = {id(p) for name in names for p in getattr(nets, name).parameters()}
        assert ours == {id(p) for p in optimiser["params"]}


def test_toy_preset_changes_sizes_and_one_weight_but_leaves_out_no_term():
    real, small = swapae.get_args(["--data", "."]), swapae.get_args([])
    for name in ("lambda_GAN_rec", "lambda_GAN_swap", "lambda_cooccur", "lambda_R1",
                 "lambda_patch_R1", "R1_every", "crop", "aggregate"):
        assert getattr(real, name) == getattr(small, name), name
    assert vars(real).keys() >= swapae.TOY.keys()


def on_meta(*flags):
    """The networks without memory, at full width."""
    args = swapae.get_args(["--data", ".", *flags])
    with torch.device("meta"):
        return swapae.build(args, torch.device("meta"))


@pytest.mark.parametrize("flags, counts", [
    ([], (30_584_872, 25_064_743, 28_859_521, 24_522_145)),
    (["--size", "128"], (30_584_872, 25_064_743, 28_384_513, 24_522_145)),
    (["--setting", "512"], (30_584_872, 25_064_743, 28_978_241, 24_522_145)),
    (["--setting", "1024"], (18_501_329, 19_913_160, 27_172_897, 24_529_169))])
def test_parameter_counts_are_the_released_ones(flags, counts):
    nets = on_meta(*flags)
    assert tuple(sum(p.numel() for p in getattr(nets, name).parameters())
                 for name in NETS) == counts


@pytest.mark.parametrize("side", [(256, 256), (512, 512), (256, 384), (112, 240)])
def test_code_shapes_of_full_networks(side):
    nets = on_meta()
    x = torch.empty(2, 3, *side, device="meta")
    z_s, z_t = nets.E(x)
    assert z_s.shape == (2, 8, side[0] // 16, side[1] // 16) and z_t.shape == (2, 2048)
    assert nets.G(z_s, z_t).shape == x.shape
    if side == (256, 256):
        f = nets.D_patch.features(torch.empty(2, 8, 3, 128, 128, device="meta"))
        assert nets.D(x).shape == (2, 1) and f.shape == (2, 8, 1536)
        assert nets.D_patch(f, f).shape == (2, 8)


def test_first_weights_are_unit_normal_with_biases_of_zero_and_styles_of_one():
    nets = swapae.build(tiny_args("--widths", 1, 0.5, 0.25, 0.5), CPU)
    for name in NETS:
        for key, p in getattr(nets, name).named_parameters():
            if p.dim() == 1:
                assert (p == (1 if key.endswith("style.bias") else 0)).all(), key
            elif p.numel() > 5000:
                assert float(p.detach().std()) == pytest.approx(1, rel=0.05), key


def test_networks_are_their_layer_tables():
    nets, x = swapae.build(tiny_args(), CPU), noise(3, 3, 36, 32)
    for name in NETS:
        lively(getattr(nets, name))
    p = {name: parameters(getattr(nets, name)) for name in NETS}
    z_s, z_t = nets.E(x)
    close([z_s, z_t], encoder(p["E"], x))
    z_s, z_t = 3 * z_s, 0.2 * z_t                            # G takes them back to unit length
    torch.manual_seed(5)
    fresh = nets.G(z_s, z_t)
    torch.manual_seed(5)
    close([fresh], [generator(p["G"], z_s, z_t)])
    close([nets.G(z_s, z_t, rng(4))], [generator(p["G"], z_s, z_t, seed=rng(4))])
    assert not torch.equal(fresh, nets.G(z_s, z_t))
    close([nets.D(x[:, :, :32])], [discriminator(p["D"], x[:, :, :32])])
    queries, references = noise(2, 4, 3, 8, 8), noise(2, 4, 3, 8, 8, seed=1)
    f, g = (nets.D_patch.features(v) for v in (queries, references))
    for nets.D_patch.aggregate in (True, False):
        expected = [patch_discriminator(p["D_patch"], q, r, nets.D_patch.aggregate)
                    for q, r in zip(queries, references, strict=True)]
        close([nets.D_patch(f, g)], [torch.stack(expected)])


def test_codes_have_the_length_that_is_asked_for():
    code = noise(2, 5, 3, 3)
    assert torch.allclose(swapae.normalised(code).square().sum(1), torch.ones(2, 3, 3).double())
    assert torch.allclose(swapae.normalised(code, "rms").square().mean(1),
                          torch.ones(2, 3, 3).double())
    assert swapae.normalised(code, "none") is code
    args = tiny_args("--code-norm", "rms", "--texture", 12)
    nets = swapae.build(args, CPU)
    z_s, z_t = nets.E(noise(1, 3, 32, 32, dtype=torch.float32))
    assert torch.allclose(z_s.square().mean(1), torch.ones(1, 8, 8), atol=1e-4)
    assert torch.allclose(z_t.square().mean(1), torch.ones(1), atol=1e-4)
    assert nets.G.norm == "rms"


def test_demodulated_variance_is_one():
    layer = swapae.StyledConv(64, 32, 16)
    x, z_t = torch.randn(4, 64, 40, 40, generator=rng()), 5 * torch.randn(4, 16, generator=rng(1))
    with torch.no_grad():
        y = layer(x, z_t) / math.sqrt(2)
    y = torch.where(y < 0, y / 0.2, y)[:, :, 2:-2, 2:-2]     # before leaky ReLU, without borders
    assert abs(float(y.var()) - 1) < 0.03


def test_bilinear_upsampling_is_the_blur_away_from_the_border():
    x, wide = noise(1, 1, 6, 6), torch.zeros(1, 1, 12, 12).double()
    wide[:, :, ::2, ::2] = x
    a = F.interpolate(x, scale_factor=2.0, mode="bilinear")
    b = upfirdn(wide, TAPS, pad=(2, 1), gain=4.0)
    assert torch.allclose(a[:, :, 1:-1, 1:-1], b[:, :, 1:-1, 1:-1])


def test_d_is_twice_differentiable():
    block = lively(swapae.ResBlock(2, 2))
    x = noise(1, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(block, x) and torch.autograd.gradgradcheck(block, x)
    D, x = lively(swapae.Discriminator(8, 1 / 128)), noise(2, 3, 8, 8).requires_grad_()
    weight, values = D.down[0].conv1.weight, []
    swapae.squared_slope(D(x), x).backward()                 # as finite differences say
    step = 1e-5 * noise(*weight.shape, seed=3)
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step
        values.append(float(swapae.squared_slope(D(x), x).detach()))
        with torch.no_grad():
            weight -= sign * step
    assert (values[0] - values[1]) / 2 == pytest.approx(float((weight.grad * step).sum()), rel=1e-4)


# ---- losses -------------------------------------------------------------------------------------


def test_crops_have_the_sides_and_bounds_of_sec_4_3_3():
    """A picture that holds its own coordinates tells where each patch was taken."""
    args, (H, W) = tiny_args("--crops", 4, "--patch", 16), (160, 320)
    v, u = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W, indexing="ij")
    x = torch.stack([u, v, torch.zeros_like(u)]).expand(2, 3, H, W)
    shares, mirrored, aspects = [], [], []
    for seed in range(150):
        patches = swapae.crops(x, args, rng(seed))
        assert patches.shape == (2, 4, 3, 16, 16)
        inner = patches[..., 1:-1, 1:-1].flatten(0, 1)       # without the blended border
        across, down = inner[:, 0, 7], inner[:, 1, :, 7]
        assert 0 < float(across.min()) and float(across.max()) < 1
        assert 0 < float(down.min()) and float(down.max()) < 1
        width, height = ((c[:, -1] - c[:, 0]) * 15 / 13 for c in (across, down))
        assert (height > 0).all()                            # mirrored left-right only
        mirrored += (width < 0).tolist()
        shares += [*width.abs().tolist(), *height.tolist()]
        aspects += (width.abs() / height).tolist()
    assert 1 / 8 - 1e-3 < min(shares) < 0.13 and 0.245 < max(shares) < 1 / 4 + 1e-3
    assert abs(np.mean(shares) - 3 / 16) < 0.003
    assert 0.45 < np.mean(mirrored) < 0.55 and min(aspects) < 0.6 and max(aspects) > 1.7


def test_crop_values_are_bilinear_samples_of_the_window():
    args, x = tiny_args("--crops", 2, "--crop", 0.2, 0.5), noise(2, 3, 40, 24)
    close([swapae.crops(x, args, rng(4))], [naive_crops(x, args, rng(4))], 1e-6, 1e-6)


def test_chance_is_what_a_coin_gets():
    half, chance = torch.zeros(2, 3), swapae.CHANCE
    coin = float(swapae.non_saturating(half, True))
    assert coin == float(swapae.non_saturating(half, False))
    assert chance.keys() == LOSSES - {"L_rec"}
    assert chance["L_D"] == chance["L_Dpatch"] == pytest.approx(2 * coin)
    assert chance["L_Cooccur"] == chance["L_GAN_swap"] == chance["L_GAN_rec"] == pytest.approx(coin)


# ---- one training step --------------------------------------------------------------------------


def softplus(v):
    return torch.log1p(torch.exp(v)).mean()


def naive_step(nets, x_D, x_G, args, seed, r1):
    """Losses and gradients of one step as the paper words them, by transcriptions, everything
    computed anew. Returns losses, gradients of D and D_patch, of R1, and of E and G."""
    p = {name: parameters(getattr(nets, name)) for name in NETS}
    draw, losses = rng(seed), {}

    def pictures(x):
        half, other = len(x) // 2, [i ^ 1 for i in range(len(x))]
        x_rec = generator(p["G"], *(code[:half] for code in encoder(p["E"], x)))
        return x_rec, generator(p["G"], encoder(p["E"], x)[0][other], encoder(p["E"], x)[1])

    def D(x):
        return discriminator(p["D"], x)

    def D_patch(queries, references):
        return torch.stack([patch_discriminator(p["D_patch"], *pair, args.aggregate)
                            for pair in zip(queries, references, strict=True)])

    def crops(x):
        return naive_crops(x, args, draw)

    x_rec, x_hyb = (fake.detach() for fake in pictures(x_D))
    references, real, fake = crops(x_D), crops(x_D), crops(x_hyb)
    losses["L_D"] = softplus(-D(x_D)) + 0.5 * softplus(D(x_rec)) + 0.5 * softplus(D(x_hyb))
    losses["L_Dpatch"] = softplus(-D_patch(real, references)) + softplus(D_patch(fake, references))
    both = p["D"] + p["D_patch"]
    grads = [torch.autograd.grad(losses["L_D"] + losses["L_Dpatch"], both)]
    if r1:
        x = x_D.clone().requires_grad_()
        pair = [crops(x_D).requires_grad_() for _ in range(2)]
        slope, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
        slopes = torch.autograd.grad(D_patch(*pair).sum(), pair, create_graph=True)
        losses["R1"] = slope.square().sum() / len(x) / 2
        losses["R1_patch"] = sum(s.square().sum() for s in slopes) / len(x) / 4
        penalty = args.lambda_R1 * losses["R1"] + args.lambda_patch_R1 * losses["R1_patch"]
        grads.append(torch.autograd.grad(16 * penalty, both, allow_unused=True,  # the last biases
                                         materialize_grads=True))
    x_rec, x_hyb = pictures(x_G)
    losses["L_rec"] = (x_rec - x_G[:len(x_rec)]).abs().mean()
    losses["L_GAN_rec"], losses["L_GAN_swap"] = softplus(-D(x_rec)), softplus(-D(x_hyb))
    losses["L_Cooccur"] = softplus(-D_patch(crops(x_hyb), crops(x_G)))
    L_total = (args.lambda_rec * losses["L_rec"] + args.lambda_GAN_rec * losses["L_GAN_rec"]
               + args.lambda_GAN_swap * losses["L_GAN_swap"]
               + args.lambda_cooccur * losses["L_Cooccur"])
    return losses, [*grads, torch.autograd.grad(L_total, p["E"] + p["G"])]


@pytest.mark.parametrize("step, flags", [
    (15, []), (14, ["--no-aggregate", "--no-channels-last", "--batch", "2"]),
    (31, ["--lambda-cooccur", "0", "--crop", "0.1", "0.6"]), (15, ["--R1-every", "0"])])
def test_step_is_the_objective(step, flags):
    """Eq. (4.1) to (4.4), Sec. 4.3.4 and 4.4.8: losses and all gradients of all updates in float64,
    with noise, all weights apart."""
    args = tiny_args("--lambda-rec", 3, "--lambda-GAN-rec", 0.7, "--lambda-GAN-swap", 1.3,
                     "--lambda-cooccur", 0.45, "--lambda-R1", 2.1, "--lambda-patch-R1", 0.6, *flags)
    nets, found = swapae.build(args, CPU), []
    for name in NETS:
        lively(getattr(nets, name))
    for optimiser in (nets.opt_D, nets.opt_G):               # a rate of 0: same weights throughout
        optimiser.param_groups[0]["lr"] = 0.0
        optimiser.register_step_pre_hook(lambda o, *_: found.append(
            [torch.zeros_like(p) if p.grad is None else p.grad.clone()
             for p in o.param_groups[0]["params"]]))
    x_D, x_G = (noise(args.batch, 3, 32, 32, seed=s).clamp(-1, 1) for s in (7, 8))
    torch.manual_seed(2)
    expected, grads = naive_step(nets, x_D, x_G, args, 3, r1=args.R1_every and step in (15, 31))
    torch.manual_seed(2)
    losses = swapae.train_step(nets, x_D, x_G, args, rng(3), step)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(float(value.detach()), rel=1e-6), name
    for ours, theirs in zip(found, grads, strict=True):
        close(ours, theirs, 1e-5, 1e-8)


def test_every_weight_learns_and_losses_are_float32():
    for flags in ([], ["--amp"]):
        args = tiny_args(*flags)
        nets = swapae.build(args, CPU)
        before = {name: parameters(getattr(nets, name)) for name in NETS}
        for step in (14, 15):
            losses = swapae.train_step(nets, *random_batch(args), args, rng(step), step)
            assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())
        assert losses.keys() == LOSSES | {"R1", "R1_patch"}
        for name, old in before.items():
            for (key, new), was in zip(getattr(nets, name).named_parameters(), old, strict=True):
                assert not torch.equal(new, was), f"{name}.{key}"


def test_g_is_judged_by_the_d_that_has_just_learnt():
    args = tiny_args()
    nets = swapae.build(args, CPU)
    nets.opt_D.param_groups[0]["lr"], nets.opt_G.param_groups[0]["lr"] = 0.1, 0.0
    x = random_batch(args)
    losses = swapae.train_step(nets, *x, args, rng())
    nets.opt_D.param_groups[0]["lr"] = 0.0
    again = swapae.train_step(nets, *x, args, rng())         # all weights as they were left
    first, second = ({name: float(v.detach()) for name, v in k.items()} for k in (losses, again))
    assert first["L_GAN_rec"] == pytest.approx(second["L_GAN_rec"], rel=1e-3)
    assert abs(first["L_D"] - second["L_D"]) > 0.05


def test_ema_is_the_running_mean():
    args = tiny_args("--ema", 0.75)
    nets = swapae.build(args, CPU)
    start = {name: parameters(getattr(nets, name)) for name in "EG"}
    swapae.train_step(nets, *random_batch(args), args, rng())
    for name, old in start.items():
        new = parameters(getattr(nets, name))
        close(list(getattr(nets, f"{name}_ema").parameters()),
              [0.75 * a + 0.25 * b for a, b in zip(old, new, strict=True)], 1e-5, 1e-6)
    assert swapae.in_use(nets).G is nets.G_ema and swapae.in_use(nets).E is nets.E_ema
    plain = swapae.build(tiny_args(), CPU)
    assert swapae.in_use(plain).G is plain.G


def test_the_row_thesis_is_the_text():
    """lab/rows: N/2 hybrids of weight 0.5, StyleGAN2's demodulation, four blocks, batch 64."""
    texts, flags = variants.sources("swapae", "thesis")
    thesis = ModuleType("thesis")
    exec(texts["swapae.py"], thesis.__dict__)
    args = thesis.get_args(["--data", ".", *flags])
    assert (args.batch, args.lambda_GAN_rec, args.lambda_GAN_swap, args.code_norm) == (
        64, 0.5, 0.5, "none")
    args = thesis.get_args(["--data", ".", *flags, *TINY])
    nets, x = thesis.build(args, CPU), random_batch(args)
    assert len(nets.G.blocks) == 4 + args.downs
    x_rec, x_hyb, x2 = thesis.rebuild_and_swap(nets, x[0])
    assert len(x_rec) == len(x_hyb) == 2 and torch.equal(x2, x[0][2:])
    losses = thesis.train_step(nets, *x, args, rng(), 15)
    assert all(torch.isfinite(v) for v in losses.values()) and "R1_patch" in losses
    layer, y, z_t = lively(thesis.StyledConv(4, 3, 6)), noise(3, 4, 5, 7), noise(3, 6, seed=1)
    layer.noise.data.zero_()
    style = F.linear(z_t, layer.style.weight / math.sqrt(6), layer.style.bias)
    for i in range(3):                                       # each picture with its own weights
        w = layer.weight / 6 * style[i].view(1, 4, 1, 1)
        w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected = lrelu(F.conv2d(y[i:i + 1], w, padding=1) + layer.bias.view(1, -1, 1, 1))
        close([layer(y, z_t)[i:i + 1]], [expected], 1e-6, 1e-8)


@pytest.mark.slow
def test_compile_does_not_compile_anew_at_every_step():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    args, graphs = tiny_args("--compile"), []
    nets = swapae.build(args, CPU)
    for step in range(4):
        swapae.train_step(nets, *random_batch(args), args, rng(step), step)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2] == graphs[3]


# ---- data ---------------------------------------------------------------------------------------


def test_samples_depend_on_seed_and_number_alone_and_epochs_show_all(drawn):
    args = tiny_args()
    data, again = (swapae.Pictures(drawn, args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(data[3], again[3], strict=True))
    assert not torch.equal(data[3][0], data[3][1]) and data[0][0].shape == (3, 32, 32)
    seen = [tuple(p.flatten().tolist()) for n in range(5) for p in data[n]]   # two epochs of five
    upright = {min(a, tuple(torch.tensor(a).view(3, 32, 32).flip(2).flatten().tolist()))
               for a in seen}
    assert len(upright) == 5 and len(set(seen)) > 5          # some of them mirrored


def test_short_side_is_resized_then_cropped_and_mirrored(tmp_path):
    rows = np.zeros((60, 120, 3), np.uint8)
    rows[:, 60:] = 255
    Image.fromarray(rows).save(tmp_path / "a.png")
    args = tiny_args("--load", 40)
    x = swapae.resized(tmp_path / "a.png", args)
    assert x.shape == (3, 32, 32)
    assert float(x[:, :, :14].mean()) < -0.9 and float(x[:, :, 18:].mean()) > 0.9  # the middle
    scaled = Image.fromarray(rows).resize((80, 40), Image.BICUBIC).crop((24, 4, 56, 36))
    assert torch.equal(x, common.to_tensor(scaled))
    drawn = [swapae.resized(tmp_path / "a.png", args, random.Random(i)) for i in range(40)]
    shares = {round(float((p > 0).float().mean()), 2) for p in drawn}
    assert {0.0, 1.0} <= shares and len(shares) > 4          # both ends of a landscape are seen
    rising = [float(p[:, :, -1].mean() - p[:, :, 0].mean()) for p in drawn]
    assert min(rising) < -1 < 1 < max(rising)


def test_folders_that_are_understood(drawn, tmp_path):
    assert len(swapae.training_files(drawn)) == 5
    assert len(swapae.training_files(drawn / "test")) == 4   # pictures without sub-folders
    args = tiny_args()
    x, kind = swapae.scored_pictures(drawn, args, CPU, limit=2)
    files = sorted((drawn / "test").iterdir())
    assert kind == "test pictures"
    assert torch.equal(x, torch.stack([swapae.resized(files[i], args) for i in (0, 2)]))
    for side in "AB":
        (tmp_path / f"train{side}").mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / f"train{side}/1.png")
    assert len(swapae.training_files(tmp_path)) == 2
    assert swapae.scored_pictures(tmp_path, args, CPU)[1] == "TRAINING pictures"
    args.split = "val"
    assert swapae.scored_pictures(drawn, args, CPU)[1] == "val pictures"
    with pytest.raises(common.UserError, match="no val pictures"):
        swapae.scored_pictures(tmp_path, args, CPU)


# ---- training loop ------------------------------------------------------------------------------


def test_what_train_applies(drawn, tmp_path, monkeypatch):
    """Two different batches a step, the step's number, constant rates, the step's own generator."""
    seen = []

    def train_step(nets, x_D, x_G, args, rng, step):
        rates = [o.param_groups[0]["lr"] for o in (nets.opt_G, nets.opt_D)]
        seen.append((step, *rates, rng.initial_seed()))
        assert x_D.shape == x_G.shape == (4, 3, 32, 32) and not torch.equal(x_D, x_G)
        return {"L_rec": torch.tensor(1.0)} | ({"R1": torch.tensor(2.0)} if step == 1 else {})

    monkeypatch.setattr(swapae, "train_step", train_step)
    monkeypatch.setattr(swapae, "PICTURES", 33)              # 33 // (2 * 4): four steps
    run("--data", drawn, *TINY, "--out", tmp_path / "run", "--sample-every", 100)
    assert [s[:3] for s in seen] == [(i, 0.002, pytest.approx(0.002 * 16 / 17)) for i in range(4)]
    assert len({s[3] for s in seen}) == 4
    head, *rows = [r.split(",") for r in (tmp_path / "run/log.csv").read_text().splitlines()]
    assert [float(r[head.index("R1")]) for r in rows] == [0, 2, 2, 2]  # the latest one


def test_run_folder(trained):
    files = {str(f.relative_to(trained)) for f in trained.rglob("*") if f.is_file()}
    assert files - {"lock"} == {"config.json", "log.csv", "index.html", "last.pt", "result.json",
                                "samples/step_000000.png", "samples/step_000003.png"}
    rows = [row.split(",") for row in (trained / "log.csv").read_text().splitlines()]
    assert set(rows[0]) == LOSSES | {"step", "R1", "R1_patch", "seconds"} and len(rows) == 4
    assert all(len(row) == len(rows[0]) for row in rows)
    assert torch.load(trained / "last.pt", weights_only=True)["parts"].keys() == {
        *NETS, "opt_G", "opt_D"}


def test_resumed_run_is_bit_identical(drawn, tmp_path):
    flags = ["--data", drawn, *TINY, "--R1-every", 2, "--ema", 0.9, "--steps", 4]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(swapae, lambda: run(*flags, "--out", tmp_path / "parts"), step=3)
    run(*flags, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 4
    assert_same(a["parts"], b["parts"])


@pytest.mark.slow
def test_two_processes_average_their_gradients(drawn, tmp_path):
    """Each has pictures and noise of its own; both end with the same weights, as last.pt and a
    second one that every process writes show, and not with those of one process."""
    (tmp_path / "both.py").write_text(
        "import os, sys, torch, swapae\n"
        "finish = swapae.Run.finish\n"
        "def keep(run, scores):\n"
        "    torch.save(run.parts['G'].state_dict(), sys.argv[-1] + os.environ['RANK'])\n"
        "    finish(run, scores)\n"
        "swapae.Run.finish = keep\n"
        "swapae.main(sys.argv[1:-1])\n")
    flags = ["--data", str(drawn), *TINY, "--batch", "2", "--steps", "2"]
    two_processes(tmp_path / "both.py", *flags, "--out", tmp_path / "two", tmp_path / "G")
    first, second = (torch.load(tmp_path / f"G{rank}", weights_only=True) for rank in "01")
    assert_same(dict(first), dict(second))
    run(*flags, "--out", tmp_path / "one")
    alone = torch.load(tmp_path / "one/last.pt", weights_only=True)["parts"]["G"]
    assert not torch.equal(first["to_rgb.weight"], alone["to_rgb.weight"])


# ---- editing ------------------------------------------------------------------------------------


def picture_of(path):
    return common.to_tensor(common.open_rgb(path))[None]


def written_by(trained, picture, folder):
    """A function: flags -> the picture that --translate writes with them."""
    def written(*flags):
        run("--translate", picture, "--weights", trained / "last.pt", "--data",
            picture.parent.parent, *flags, "--out", folder)
        return picture_of(folder / picture.name)
    return written


def test_codes_and_pictures_of_any_size(model):
    nets, args = model
    for h, w in ((28, 28), (5, 70), (33, 50), (64, 41)):
        x = torch.rand(2, 3, h, w, generator=rng()) * 2 - 1
        z_s, z_t = swapae.embed(nets, x, args)
        assert z_s.shape == (2, 8, *(max(7, -(-n // 4)) for n in (h, w))) and z_t.shape == (2, 16)
        assert swapae.paint(nets, z_s, z_t, args, (h, w)).shape == x.shape
        assert swapae.swap(nets, x, torch.rand(1, 3, 60, 31), args).shape == x.shape


def test_swap_takes_structure_and_texture_from_where_it_says(model):
    nets, args = model
    x, y = (torch.rand(1, 3, 32, 32, generator=rng(i)) * 2 - 1 for i in (0, 1))
    p = {name: parameters(getattr(nets, name)) for name in "EG"}
    (z_s, z_t), (_, other) = encoder(p["E"], x), encoder(p["E"], y)
    for alpha in (0.0, 0.3, 1.0):
        truth = generator(p["G"], z_s, (1 - alpha) * z_t + alpha * other, seed=rng(args.seed))
        close([swapae.swap(nets, x, y, args, alpha)], [truth.clamp(-1, 1)], 1e-4, 1e-4)
    assert torch.equal(swapae.swap(nets, x, y, args), swapae.swap(nets, x, y, args))  # same noise


def test_principal_directions_of_a_known_cloud():
    basis = torch.linalg.qr(noise(5, 5))[0]
    codes = noise(4000, 5, seed=2) * torch.tensor([3.0, 2.0, 0.1, 0.1, 0.1]) @ basis.t() + 7
    directions, deviations = swapae.principal_directions(codes, 2)
    assert torch.allclose((directions @ basis[:, :2]).abs(), torch.eye(2).double(), atol=0.05)
    assert torch.allclose(deviations, torch.tensor([3.0, 2.0]).double(), rtol=0.05)
    assert torch.allclose(directions @ directions.t(), torch.eye(2).double(), atol=1e-9)
    assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_clone_and_similarity_mask_choose_their_cells():
    z_s, source = noise(1, 4, 6, 7), noise(1, 4, 5, 5, seed=2)
    moved = swapae.clone(z_s, source, (1, 2, 3, 2), (4, 0))
    assert torch.equal(moved[:, :, 0:2, 4:7], source[:, :, 2:4, 1:4])
    moved[:, :, 0:2, 4:7] = z_s[:, :, 0:2, 4:7]
    assert torch.equal(moved, z_s)
    assert swapae.clone(z_s, source, (3, 3, 9, 9), (6, 5)).shape == z_s.shape  # cut at both borders
    mask = swapae.similarity_mask(z_s, 1, 2, 0.3)
    for row in range(6):
        for column in range(7):
            cosine = F.cosine_similarity(z_s[0, :, 1, 2], z_s[0, :, row, column], dim=0)
            assert bool(mask[0, 0, row, column]) == bool(cosine >= 0.3)


def test_an_edit_of_one_corner_leaves_the_far_corner(model):
    """Isolated local editing: no layer of G normalises over places (Sec. 4.4.7)."""
    nets, args = model
    z_s, z_t = swapae.embed(nets, torch.rand(1, 3, 160, 160) * 2 - 1, args)
    edited = z_s.clone()
    edited[..., :4, :4] += 1
    a, b = (swapae.paint(nets, s, z_t, args, (160, 160)) for s in (z_s, edited))
    changed = (a - b).abs().amax((0, 1)) > 1e-6
    assert changed[:12, :12].any() and not changed[80:, 80:].any()


def test_structure_pictures_show_principal_components():
    z_s = noise(3, 8, 4, 5)
    shown = swapae.structure_pictures(z_s, (8, 10))
    assert shown.shape == (3, 3, 8, 10)
    assert float(shown.min()) == -1 and float(shown.max()) == pytest.approx(1)
    samples = z_s.permute(0, 2, 3, 1).flatten(0, 2)
    values = torch.linalg.svd(samples - samples.mean(0), full_matrices=False)[2][:3]
    colours = shown[:, :, ::2, ::2].permute(0, 2, 3, 1).flatten(0, 2)
    for k in range(3):
        pair = torch.stack([colours[:, k], samples @ values[k]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) == pytest.approx(1)
    assert swapae.structure_pictures(z_s[:, :2], (4, 5)).shape == (3, 3, 4, 5)  # two channels


# ---- commands -----------------------------------------------------------------------------------


def test_translate_keeps_every_size(trained, drawn, tmp_path):
    sizes = odd_pictures(tmp_path / "in")
    run("--translate", tmp_path / "in", "--weights", trained / "last.pt", "--exemplar",
        drawn / "test/0000.png", "--out", tmp_path / "out")
    assert {f.stem: Image.open(f).size for f in (tmp_path / "out").iterdir()} == sizes


def test_exemplars_alphas_vectors_and_directions(trained, drawn, model, tmp_path):
    nets, args = model
    written = written_by(trained, drawn / "test/0001.png", tmp_path / "out")
    x, other = (picture_of(drawn / f"test/000{i}.png") for i in (1, 2))
    (z_s, z_t), (_, z_t2) = (swapae.embed(nets, p, args) for p in (x, other))

    def painted(*codes):
        return torch.cat([swapae.paint(nets, *pair, args, (32, 32)) for pair in codes], dim=3)

    close([written("--exemplar", drawn / "test/0002.png", "--alpha", 0, 0.5)],
          [painted((z_s, z_t), (z_s, (z_t + z_t2) / 2))], 0, 1 / 127)
    z = {d: torch.cat([swapae.embed(nets, picture_of(f), args)[1]
                       for f in sorted((drawn / d).iterdir())]) for d in ("train", "test")}
    step = z["train"].mean(0, keepdim=True) - z["test"].mean(0, keepdim=True)
    close([written("--vector", drawn / "train", drawn / "test", "--alpha", 20)],
          [painted((z_s, z_t + 20 * step))], 0, 1 / 127)
    directions, deviations = swapae.principal_directions(z["train"], 2)
    close([written("--pca", 2, "--alpha", -9)],
          [painted((z_s, z_t - 9 * deviations[1] * directions[1]))], 0, 1 / 127)


def test_regions_and_clones(trained, drawn, model, tmp_path):
    nets, args = model
    written = written_by(trained, drawn / "test/0001.png", tmp_path / "out")
    z_s, z_t = swapae.embed(nets, picture_of(drawn / "test/0001.png"), args)
    maps = torch.cat([swapae.embed(nets, picture_of(f), args)[0]
                      for f in sorted((drawn / "train").iterdir())])
    directions, deviations = swapae.principal_directions(maps.permute(0, 2, 3, 1).flatten(0, 2), 1)
    step = (deviations[0] * directions[0]).view(1, 8, 1, 1)

    def painted(z_s):
        return swapae.paint(nets, z_s, z_t, args, (32, 32))

    white = np.zeros((32, 32), np.uint8)
    white[8:16, :10] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:4, :2], mask[..., 2:4, 2] = 1, 0.5           # half of the third cell is white
    close([written("--pca", 1, "--mask", tmp_path / "mask.png", "--alpha", 3)],
          [painted(z_s + 3 * mask * step)], 0, 1 / 127)
    mask = swapae.similarity_mask(z_s, 4, 2)
    close([written("--pca", 1, "--mask", "9,17")], [painted(z_s + mask * step)], 0, 1 / 127)
    directions, deviations = swapae.principal_directions(maps.flatten(1), 2)  # Fig. 4.12
    close([written("--pca", 2, "--mask", "all")],
          [painted(z_s + (deviations[1] * directions[1]).view(1, 8, 8, 8))], 0, 1 / 127)
    assert swapae.cells_of([5, 0, 2, 5, 9, 3], z_s, z_s, 4) == ((1, 0, 1, 2), (2, 0))  # touched
    source, _ = swapae.embed(nets, picture_of(drawn / "test/0003.png"), args)
    close([written("--clone", 0, 4, 8, 12, 20, 0, "--exemplar", drawn / "test/0003.png")],
          [painted(swapae.clone(z_s, source, (0, 1, 2, 3), (5, 0)))], 0, 1 / 127)
    args.mask, x = str(tmp_path / "odd.png"), torch.zeros(1, 3, 35, 41)
    Image.new("L", (41, 35), 255).save(args.mask)
    mask = swapae.mask_of(swapae.embed(nets, x, args)[0], x, args, 4)
    args.mask = None
    assert mask.shape == (1, 1, 9, 11) and (mask == 1).all()  # to the padded border


def copies(shows):
    """E keeps the picture as both codes; G shows one of them."""
    def E(x):
        return x, x.flatten(1)

    def G(z_s, z_t, rng):
        return z_s if shows == "structure" else z_t.view_as(z_s)

    E.multiple = 1
    return SimpleNamespace(E=E, G=G)


@pytest.mark.parametrize("shows", ["structure", "texture"])
def test_evaluate_of_networks_that_copy(drawn, monkeypatch, capsys, shows):
    """Every distance is 0 for the picture that it compares with, and the other one's otherwise."""
    shown, found = {}, {}

    def fid(fakes, reals, device, weights):
        shown.update(fakes=torch.cat(list(fakes)), reals=torch.cat(list(reals)), weights=weights)
        return 12.5

    monkeypatch.setattr(metrics, "fid", fid)
    monkeypatch.setattr(common, "print_scores",
                        lambda scores: found.update({s["name"]: s for s in scores}))
    monkeypatch.setattr(swapae, "load_networks", lambda *_: copies(shows))
    run("--evaluate", "--data", drawn, *TINY, "--fid-weights", "w.pth")
    x, x2 = (torch.stack([picture_of(drawn / f"test/000{i}.png")[0] for i in order])
             for order in ((0, 1, 2, 3), (2, 3, 0, 1)))
    close([shown["fakes"], shown["reals"]], [x if shows == "structure" else x2, x])
    assert shown["weights"] == "w.pth" and "FID of swaps (4 test pictures, 299x299)" in found
    value = {name.split(",")[0].split(" (")[0]: s for name, s in found.items()}
    assert all(name.endswith(", 4 test pictures") for name in found if "FID of swaps (" not in name)
    assert value["reconstruction L1"]["value"] == 0 < value["reconstruction L1"]["trivial"][
        "another picture"]
    assert value["reconstruction distance of VGG features"]["value"] == pytest.approx(0, abs=1e-5)
    style, structure = (value[f"{name} to the {kind}"] for name, kind in (
        ("SIFID of swaps", "texture"), ("self-similarity distance of swaps", "structure")))
    zero, other = (structure, style) if shows == "structure" else (style, structure)
    assert zero["value"] == pytest.approx(0, abs=1e-3) and min(zero["trivial"].values()) > 0.01
    assert other["value"] == pytest.approx(min(other["trivial"].values()))


def test_side_holds_for_exemplars_and_masks_too(trained, drawn, tmp_path):
    for name in ("photo", "mask", "exemplar"):
        Image.new("RGB", (90, 60), "white").save(tmp_path / f"{name}.png")
    edit = ["--translate", tmp_path / "photo.png", "--weights", trained / "last.pt", "--side", 32,
            "--data", drawn, "--out", tmp_path / "out"]
    seen, original = [], swapae.embed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swapae, "embed", lambda nets, x, args: seen.append(x.shape[2:]) or original(
            nets, x, args))
        run(*edit, "--exemplar", tmp_path / "exemplar.png")
    assert seen == [(32, 48)] * 2
    run(*edit, "--pca", 1, "--mask", tmp_path / "mask.png")
    assert Image.open(tmp_path / "out/photo.png").size == (90, 60)


def test_a_setting_does_not_enlarge_the_toy_world():
    args = swapae.get_args(["--setting", "1024"])
    assert (args.size, args.load, args.downs) == (64, None, 3)


def test_user_errors_are_one_line(drawn, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fails(*flags):
        return error_of(capsys, swapae.main, *flags)

    last, picture = trained / "last.pt", drawn / "test/0000.png"
    for flag, value in (("--size", 100), ("--batch", 3), ("--patch", 100), ("--load", 20),
                        ("--ema", 1), ("--downs", 0), ("--crops", 0), ("--R1-every", -1)):
        assert f"{flag} {value}" in fails("--data", drawn, flag, value)
    assert "--crop " in fails("--crop", 0.5, 0.25)
    assert "--widths" in fails("--widths", 0.001, 1, 1, 1)
    for widths in ((1, 1, 1 / 1024, 1), (1, 1, 1, 1 / 512)):           # a D of no channels
        assert "--widths" in fails("--size", 32, "--downs", 2, "--patch", 8, "--widths", *widths)
    assert "no such folder" in fails("--data", "nowhere")
    (tmp_path / "one").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "one/a.png")
    assert "swapping needs two" in fails("--data", "one", *TINY)
    assert "--weights FILE is needed" in fails("--translate", picture, "--exemplar", picture)
    edit = ["--translate", picture, "--weights", last, "--data", drawn]
    for flags in ([], ["--pca", 1, "--exemplar", picture],
                  ["--exemplar", picture, "--mask", "1,1"]):
        assert "needs one of" in fails(*edit, *flags)
    assert "directions 1 to 8" in fails(*edit, "--pca", 9, "--mask", "1,1")
    assert "5 codes have directions 1 to 4" in fails(*edit, "--pca", 5)
    for box in ((-8, 0, 16, 16, 0, 0), (0, 0, 0, 8, 0, 0), (0, 0, 8, 8, 0, 32)):
        assert "--clone" in fails(*edit, "--clone", *box)
    assert "outside" in fails(*edit, "--pca", 1, "--mask", "99,1")
    Image.new("L", (9, 9)).save(tmp_path / "mask.png")
    assert "9x9 pixels" in fails(*edit, "--pca", 1, "--mask", "mask.png")
    Image.new("RGB", (48, 32)).save(tmp_path / "wide.png")
    assert "--mask all: 48x32" in fails("--translate", "wide.png", "--weights", last, "--pca", 1,
                                        "--mask", "all")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    assert "neither a checkpoint" in fails("--translate", picture, "--exemplar", picture,
                                           "--weights", tmp_path / "other.pt")
    assert "mask.png" in fails("--evaluate", "--weights", last, "--data", drawn, "--vgg",
                               "mask.png")


# ---- toy/textures -------------------------------------------------------------------------------


def test_textures_layout_and_determinism(drawn, tmp_path):
    for split, n in (("train", 5), ("test", 4), ("test_truth", 4)):
        names = sorted(f.name for f in (drawn / split).iterdir())
        assert names == [f"{i:04d}.png" for i in range(n)]
        assert Image.open(drawn / split / names[0]).size == (32, 32)
    toy.draw("textures", tmp_path / "again", n=2, size=32, n_test=4)
    for name in ("train/0001.png", "test/0003.png", "test_truth/0003.png"):
        assert (tmp_path / "again" / name).read_bytes() == (drawn / name).read_bytes()


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


def test_motifs_differ_in_nothing_that_single_pixels_tell():
    """One mean, one deviation, between the two shades; only neighbours tell a motif (Julesz)."""
    for motif, sign in (("lying", -1), ("upright", 1), ("speckle", 0)):
        material = textures.Material(motif, (10, 20, 30), (110, 220, 30))
        grain = textures.paint_material(material, 256, np.random.default_rng(1)).transpose(2, 0, 1)
        assert np.allclose(grain.mean((1, 2)), (60, 120, 30), atol=4)
        assert grain.std((1, 2)) == pytest.approx((30, 60, 0), abs=3)
        assert grain[0].min() >= 10 and grain[0].max() <= 110
        (orientation,), _ = textures.motifs(grain[None], np.ones((1, 256, 256), bool))
        assert orientation == pytest.approx(0.55 * sign, abs=0.05)


def test_the_truth_has_ones_layout_and_the_others_materials(tmp_path):
    toy.draw("textures", tmp_path / "t", n=1, size=64, n_test=6)
    y = np.stack([picture_of(f)[0].numpy() for f in sorted((tmp_path / "t/test_truth").iterdir())])
    for i in range(6):
        layout = textures.sample_layout(np.random.default_rng([0, 22, i]))
        look = textures.sample_texture(np.random.default_rng([0, 23, (i + 1) % 6]))
        inside = textures.elevation(layout, 64) > 0
        assert 0.05 < inside.mean() < 0.6 and (textures.is_ground(y)[i] == ~inside).mean() > 0.95
        for region, material in zip(textures.regions(y[i:i + 1]), (look.figure, look.ground),
                                    strict=True):
            (orientation,), _ = textures.motifs(y[i:i + 1], region)
            assert textures.MOTIFS[1 + (orientation < 0.3) - 2 * (orientation < -0.3)] == (
                material.motif)
            mean = textures.moments(y[i:i + 1], region[:, None])[0].ravel() * 127.5 + 127.5
            assert np.abs(mean - np.add(material.back, material.mark) / 2).max() < 20


def test_texture_scores_of_known_answers(drawn):
    folder = drawn.parent / "scored"
    toy.draw("textures", folder, n=1, size=64, n_test=12)
    x, y = (np.stack([picture_of(f)[0].numpy() for f in sorted((folder / d).iterdir())])
            for d in ("test", "test_truth"))
    x2 = np.roll(x, -1, axis=0)
    perfect, copied, faint, shifted = (
        {s["name"]: s for s in toy.texture_scores(x, x2, answer, y)}
        for answer in (y, x, y.mean((2, 3), keepdims=True) + 0.1 * y, y + 0.1))
    for name, best in (("motif right", 1), ("colour error", 0), ("outline error", 0)):
        assert perfect[name]["value"] == best
        assert copied[name]["value"] == copied[name]["trivial"]["copy the structure"]
    assert perfect["motif right"]["trivial"]["flat colours in dark and light"] == 0
    assert max(perfect["motif right"]["trivial"].values()) < 0.7
    assert faint["motif right"]["value"] == 0                # right orientations, too weak
    assert shifted["colour error"]["value"] == pytest.approx(12.75)
    assert shifted["motif right"]["value"] == 1
    scores = toy.swap_scores(folder, "test", lambda structures, textures: structures)
    assert [s["name"] for s in scores][3:] == [
        f"{score}, truth's {codes}" for codes in ("structure code", "texture code", "codes")
        for score in ("motif right", "colour error")]
    assert scores[0]["value"] == copied["motif right"]["value"] == scores[5]["value"]
    assert scores[3]["value"] == 1


def test_the_grid_of_networks_that_copy(drawn):
    """Fig. 4.4: own codes give the structure's picture back, a column's texture is at its top."""
    x = torch.cat([picture_of(drawn / f"test/000{i}.png") for i in range(4)])
    for shows in ("structure", "texture"):
        columns = swapae.swap_grid(copies(shows), x[:3], x[2:], tiny_args())
        assert [*columns] == ["structure", "z_s", "own texture", "texture 1", "texture 2"]
        close([columns["structure"][1:], columns["own texture"][1:]], [x[:3], x[:3]])
        for i in (2, 3):
            column = columns[f"texture {i - 1}"]
            assert torch.equal(column[0], x[i])
            close([column[1:]], [x[:3] if shows == "structure" else x[[i] * 3]])
