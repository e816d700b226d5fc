"""Swapping Autoencoder: one code for the layout of a picture, one for its texture; swap and edit.

The encoder E turns a picture into a structure code (a map with few channels) and a texture code (a
vector). The generator G must rebuild the picture from its own two codes, and must paint something
realistic from the structure of one picture and the texture of another. What makes a code
"texture"? A second discriminator looks at small patches only, so it knows nothing of the layout:
it asks whether a patch of the hybrid comes from the same picture as patches of the one that gave
the texture. No labels, no pairs, no domains: one folder.

T. Park, J.-Y. Zhu, O. Wang, J. Lu, E. Shechtman, A. A. Efros, R. Zhang, "Swapping Autoencoder for
Deep Image Manipulation", NeurIPS 2020 (arXiv 2007.00653). Numbers below are those of chapter 4 in
T. Park, "Machine Learning for Deep Image Manipulation", UC Berkeley 2021.

SYMBOLS      paper                 here          shape
             x                     x             (B, 3, H, W) in [-1, 1]
             E(x) = (z_s, z_t)     E(x) -> s, t  (B, 8, H/16, W/16), (B, 2048)
             G(z_s, z_t)           G(s, t)       (B, 3, H, W)
             x^1, x^2              x[i ^ 1], x[i]  neighbours of the batch exchange structure
             D                     D             (B, 3, H, W) -> (B, 1) logits
             D_patch               P             query and reference patches -> (B * 8, 1) logits
             crop, crops           random_crops  (B, 8, 3, 128, 128)

OBJECTIVE    Eq. (4.1)  L_rec = E |x - G(E(x))|_1
             Eq. (4.2)  L_GAN,rec = E -log D(G(E(x)))
             Eq. (4.3)  L_GAN,swap = E -log D(G(z_s^1, z_t^2))
             Eq. (4.4)  L_CooccurGAN = E -log D_patch(crop(G(z_s^1, z_t^2)), crops(x^2))
             Sec. 4.3.4 L_total = L_rec + 0.5 L_GAN,rec + 0.5 L_GAN,swap + L_CooccurGAN

USAGE        python swapae.py
EXPECT       python swapae.py
"""

import argparse
import copy
import functools
import math
import random
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import toy
from common import Run, UserError

LAYOUT = "train/ (and test/) with pictures, or a folder of pictures"

# =============================================================================================
# 1. Configuration
# =============================================================================================

THESIS = {"follow": "thesis"}
TOY = {"size": 64, "batch": 8, "steps": 2500, "lr": 2e-3, "downs": 3, "texture": 128,
       "width_E": 0.5, "width_G": 0.25, "width_D": 0.125, "width_P": 0.25, "patch": 32,
       "code_norm": "rms", "workers": 0, "sample_every": 250}


def get_args(argv=None):
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--size", type=int, default=256, help="training crop in pixels (Sec. 4.4.8)")
    add("--load", type=int, default=None, help="short side before the crop (as --size)")
    add("--batch", type=int, default=16, help="pictures per update and process, even")
    add("--images", type=int, default=25_000_000, help="pictures in all, D's and G's updates")
    add("--steps", type=int, default=None, help="pairs of a D and a G update; overrides --images")
    add("--lr", type=float, default=2e-3, help="Adam's rate (Sec. 4.4.8)")
    add("--beta1", type=float, default=0.0, help="Adam's first decay (Sec. 4.4.8)")
    add("--beta2", type=float, default=0.99, help="Adam's second decay (Sec. 4.4.8)")
    add("--lazy-adam", action=switch, default=True, help="D's rate and decays for lazy R1")
    add("--downs", type=int, default=4, help="downsampling blocks of E")
    add("--structure", type=int, default=8, help="channels of the structure code")
    add("--texture", type=int, default=2048, help="length of the texture code")
    add("--width-E", type=float, default=1.0, help="width of E")
    add("--width-G", type=float, default=1.0, help="width of G")
    add("--width-D", type=float, default=1.0, help="width of D")
    add("--width-P", type=float, default=1.0, help="width of P")
    add("--base-blocks", type=int, default=2, help="residual blocks before the upsampling ones")
    add("--demodulation", choices=["weight", "joint"], default="weight", help="modulation")
    add("--code-norm", choices=["unit", "rms", "none"], default="unit", help="of the codes")
    add("--skip-padding", choices=["zero", "reflect"], default="zero", help="of E's skips")
    add("--hybrids", choices=["all", "half"], default="all", help="hybrids per batch")
    add("--lambda-rec", type=float, default=1.0, help="weight of Eq. (4.1)")
    add("--lambda-gan-rec", type=float, default=0.5, help="weight of Eq. (4.2)")
    add("--lambda-gan-swap", type=float, default=1.0, help="weight of Eq. (4.3)")
    add("--lambda-cooccur", type=float, default=1.0, help="weight of Eq. (4.4)")
    add("--lambda-R1", type=float, default=10.0, help="R1 penalty of D")
    add("--lambda-patch-R1", type=float, default=1.0, help="R1 penalty of P")
    add("--R1-every", type=int, default=16, help="D updates between R1 updates")
    add("--crops", type=int, default=8, help="patches per picture")
    add("--crop", type=float, nargs=2, default=[1 / 8, 1 / 4], help="range of crop sides")
    add("--patch", type=int, default=128, help="side that crops are resized to")
    add("--aggregate", action=switch, default=True, help="average the reference features")
    add("--ema", type=float, default=0.0, help="decay of the averaged E and G; 0: none")

    def presets(args):
        return TOY if args.data == "toy" else {}

    args = common.parse_flags(p, argv, "swapae", presets, run_name)
    args.load = args.load or args.size
    return args


def run_name(args):
    return f"swapae-{Path(args.data).name}"


# =============================================================================================
# 2. Networks
# =============================================================================================


class EqualConv(nn.Module):
    """Convolution with run-time weight scale 1/sqrt(fan-in); maybe bias, leaky ReLU, gain sqrt 2.

    `gain` of forward multiplies the result. WHY there: a positive factor may move through leaky
    ReLU, and small weights are cheaper to scale than large maps.
    """

    def __init__(self, a, b, kernel, stride=1, activate=True, bias=True, reflect=False, pad=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(b)) if bias or activate else None
        self.stride, self.activate, self.reflect = stride, activate, reflect
        self.pad = pad if pad is not None else kernel // 2 if stride == 1 else 0

    def forward(self, x, gain=1.0):
        gain = gain * math.sqrt(2) if self.activate else gain
        if self.reflect:
            x = F.pad(x, (self.pad,) * 4, mode="reflect")
        weight = self.weight * (gain * self.weight[0].numel() ** -0.5)
        bias = None if self.bias is None else self.bias * gain
        x = F.conv2d(x, weight, bias, self.stride, 0 if self.reflect else self.pad)
        return F.leaky_relu_(x, 0.2) if self.activate else x


class EqualLinear(nn.Module):
    def __init__(self, a, b, activate=False, bias=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a))
        self.bias = nn.Parameter(torch.full((b,), bias))
        self.activate = activate

    def forward(self, x):
        gain = math.sqrt(2) if self.activate else 1.0
        x = F.linear(x, self.weight * (gain * self.weight.shape[1] ** -0.5), self.bias * gain)
        return F.leaky_relu_(x, 0.2) if self.activate else x


class Blur(nn.Module):
    """Padding, then the filter taps x taps / sum at every `stride`, times `gain`."""

    def __init__(self, channels, taps, pad, stride=1, gain=1.0, mode="constant"):
        super().__init__()
        row = torch.tensor(taps) / sum(taps)
        self.register_buffer("kernel", gain * torch.outer(row, row).repeat(channels, 1, 1, 1),
                             persistent=False)
        self.pad, self.stride, self.mode = pad, stride, mode

    def forward(self, x):
        low, high = self.pad
        if low == high and self.mode == "constant":
            return F.conv2d(x, self.kernel, None, self.stride, low, groups=x.shape[1])
        x = F.pad(x, (low, high, low, high), mode=self.mode)
        return F.conv2d(x, self.kernel, None, self.stride, groups=x.shape[1])


class DownBlock(nn.Module):
    def __init__(self, a, b, reflect=False, skip_mode="constant"):
        super().__init__()
        taps = [1.0, 2.0, 1.0] if reflect else [1.0, 3.0, 3.0, 1.0]
        self.conv1 = EqualConv(a, a, 3, reflect=reflect)
        self.blur = Blur(a, taps, (2, 1) if reflect else (2, 2), mode="reflect" if reflect else
                         "constant")
        self.conv2 = EqualConv(a, b, 3, stride=2)
        self.skip_blur = Blur(a, taps, (1, 0) if reflect else (1, 1), 2, mode=skip_mode)
        self.skip = EqualConv(a, b, 1, activate=False, bias=False)

    def forward(self, x):
        main = self.conv2(self.blur(self.conv1(x)), 0.5 ** 0.5)
        return main.add_(self.skip(self.skip_blur(x), 0.5 ** 0.5))


def normalised(code, how):
    """Over dimension 1."""
    if how == "none":
        return code
    norm = code.square().sum(1, keepdim=True) if how == "unit" else code.square().mean(
        1, keepdim=True)
    return code * (norm + 1e-8).rsqrt()


class Encoder(nn.Module):
    def __init__(self, widths, downs=4, structure=8, texture=2048, norm="unit", skip_mode="zero"):
        super().__init__()
        self.norm, self.downs = norm, downs
        mode = "constant" if skip_mode == "zero" else "reflect"
        self.from_rgb = EqualConv(3, widths[0], 1)
        self.down = nn.ModuleList(DownBlock(a, b, reflect=True, skip_mode=mode)
                                  for a, b in zip(widths[:downs], widths[1:], strict=False))
        c = widths[downs]
        self.to_structure = nn.Sequential(
            EqualConv(c, c, 1), EqualConv(c, structure, 1, activate=False))
        self.pool = nn.ModuleList(EqualConv(a, b, 3, stride=2)
                                  for a, b in zip(widths[downs:], widths[downs + 1:], strict=False))
        self.to_texture = EqualLinear(widths[-1], texture)

    def forward(self, x):
        x = self.from_rgb(x)
        for block in self.down:
            x = block(x)
        s = self.to_structure(x)
        for conv in self.pool:
            x = conv(x)
        t = self.to_texture(x.mean((2, 3)))
        return normalised(s, self.norm), normalised(t, self.norm)


class StyledConv(nn.Module):
    def __init__(self, a, b, texture, kernel=3, up=False, demodulation="weight", activate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, kernel, kernel))
        self.style = EqualLinear(texture, a, bias=1.0)
        self.noise = nn.Parameter(torch.zeros(1)) if activate else None
        self.bias = nn.Parameter(torch.zeros(b))
        self.blur = Blur(b, [1.0, 3.0, 3.0, 1.0], (1, 1), gain=4.0) if up else None
        self.demodulation = demodulation if activate else None

    def forward(self, x, t, gain=1.0, rng=None):
        s = self.style(t)                                                  # (B, a)
        weight = self.weight * self.weight[0].numel() ** -0.5
        after = None
        if self.demodulation == "weight":
            s = s * (s.square().mean(1, keepdim=True) + 1e-8).rsqrt()
            weight = weight * (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        elif self.demodulation == "joint":
            after = (s.square() @ weight.square().sum((2, 3)).t() + 1e-8).rsqrt()
        gain = gain * math.sqrt(2) if self.noise is not None else gain
        x = x * s[:, :, None, None]
        if self.blur is not None:
            x = self.blur(F.conv_transpose2d(x, (weight * gain).transpose(0, 1), stride=2))
        else:
            x = F.conv2d(x, weight * gain, None, 1, weight.shape[-1] // 2)
        if after is not None:
            x = x * after[:, :, None, None]
        bias = (self.bias * gain).view(1, -1, 1, 1)
        if self.noise is None:
            return x + bias
        if rng is None:
            noise = torch.randn_like(x[:, :1])
        else:
            noise = torch.randn(1, 1, *x.shape[2:], generator=rng).to(x)
        x = x + torch.addcmul(bias, noise, self.noise * gain)
        return F.leaky_relu_(x, 0.2)


class StyledBlock(nn.Module):
    def __init__(self, a, b, texture, up=False, demodulation="weight"):
        super().__init__()
        self.up = up
        self.conv1 = StyledConv(a, b, texture, up=up, demodulation=demodulation)
        self.conv2 = StyledConv(b, b, texture, demodulation=demodulation)
        if not up or a != b:
            self.skip = EqualConv(a, b, 1, activate=up, bias=up)

    def forward(self, x, t, rng=None):
        half = 0.5 ** 0.5
        skip = self.skip(x, half) if hasattr(self, "skip") else x * half
        if self.up:
            skip = F.interpolate(skip, scale_factor=2, mode="bilinear")
        return self.conv2(self.conv1(x, t, rng=rng), t, half, rng) + skip


class Generator(nn.Module):
    def __init__(self, widths, base_blocks=2, structure=8, texture=2048, norm="unit",
                 demodulation="weight"):
        super().__init__()
        self.norm = norm
        self.scale = EqualLinear(texture, structure)
        self.shift = EqualLinear(texture, structure)
        head = [structure] + [max(structure, round((i + 1) / base_blocks * widths[0]))
                              for i in range(base_blocks)]
        self.head = nn.ModuleList(
            StyledBlock(a, b, texture, demodulation=demodulation)
            for a, b in zip(head, head[1:], strict=False))
        self.up = nn.ModuleList(
            StyledBlock(a, b, texture, True, demodulation)
            for a, b in zip(widths, widths[1:], strict=False))
        self.to_rgb = StyledConv(widths[-1], 3, texture, 1, activate=False)

    def forward(self, s, t, rng=None):
        s, t = normalised(s, self.norm), normalised(t, self.norm)
        x = s * self.scale(t)[:, :, None, None] + self.shift(t)[:, :, None, None]
        for block in self.head:
            x = block(x, t, rng)
        for block in self.up:
            x = block(x, t, rng)
        return self.to_rgb(x, t)


class Discriminator(nn.Module):
    def __init__(self, size=256, width=1.0):
        super().__init__()
        levels = round(math.log2(size))
        widths = [int(min(512, 2 ** (15 - i)) * width) for i in range(levels, 1, -1)]
        last, cells = widths[-1], 4 * size // 2 ** levels
        self.from_rgb = EqualConv(3, widths[0], 1)
        self.down = nn.ModuleList(DownBlock(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.last = EqualConv(last, last, 3)
        self.dense = EqualLinear(last * cells ** 2, last, activate=True)
        self.logit = EqualLinear(last, 1)

    def forward(self, x):
        x = self.from_rgb(x)
        for block in self.down:
            x = block(x)
        return self.logit(self.dense(self.last(x).flatten(1)))


class PatchBlock(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.conv1 = EqualConv(a, a, 3)
        self.conv2 = EqualConv(a, b, 3)
        self.skip = EqualConv(a, b, 1, activate=False, bias=False)

    def forward(self, x):
        return self.conv2(self.conv1(x), 0.5 ** 0.5).add_(self.skip(x, 0.5 ** 0.5))


class PatchDiscriminator(nn.Module):
    def __init__(self, patch=128, width=1.0, aggregate=True):
        super().__init__()
        self.aggregate = aggregate
        levels = round(math.log2(patch))
        widths = [int(min(384, 2 ** (12 - i)) * width) for i in range(levels, 1, -1)]
        last = widths[-1]
        self.from_rgb = EqualConv(3, widths[0], 3)
        self.down = nn.ModuleList(DownBlock(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.block = PatchBlock(last, 2 * last)
        self.last = EqualConv(2 * last, last, 3, pad=0)
        units = [8 * last] + [int(n * width) for n in (2048, 2048, 1024)] + [1]
        self.pair = nn.Sequential(*[EqualLinear(a, b, activate=b > 1) for a, b in
                                    zip(units, units[1:], strict=False)])

    def features(self, patches):
        x = self.from_rgb(patches.flatten(0, 1))
        for block in self.down:
            x = block(x)
        return self.last(self.block(x)).flatten(1).view(*patches.shape[:2], -1)

    def compare(self, reference, query):
        if self.aggregate:
            reference = reference.mean(1, keepdim=True).expand_as(query)
        return self.pair(torch.cat([reference, query], 2)).flatten(0, 1)


def build(args, device):
    torch.manual_seed(args.seed)
    E, G = encoder(args), generator(args)
    D = Discriminator(args.size, args.width_D)
    P = PatchDiscriminator(args.patch, args.width_P, args.aggregate)
    for net in (E, G, D, P):
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
    adam = functools.partial(torch.optim.Adam, fused=device.type in ("cuda", "cpu"))
    c = args.R1_every / (args.R1_every + 1) if args.lazy_adam and args.R1_every else 1.0
    m = SimpleNamespace(E=E, G=G, D=D, P=P)
    m.opt_G = adam([*E.parameters(), *G.parameters()], args.lr, (args.beta1, args.beta2))
    m.opt_D = adam([*D.parameters(), *P.parameters()], args.lr * c,
                   (args.beta1 ** c, args.beta2 ** c))
    return m


def encoder(args):
    widths = [min(args.texture, round(2 ** (5 + i) * args.width_E)) for i in range(args.downs + 3)]
    return Encoder(widths, args.downs, args.structure, args.texture, args.code_norm,
                   args.skip_padding)


def generator(args):
    widths = [int(min(512, 128 * 2 ** (args.downs - i)) * args.width_G)
              for i in range(args.downs + 1)]
    return Generator(widths, args.base_blocks, args.structure, args.texture, args.code_norm,
                     args.demodulation)


# =============================================================================================
# 3. Losses
# =============================================================================================


def r1_penalty(logits, *inputs):
    """Sum over inputs of the mean over pictures of |d logits / d input|^2 / 2."""
    grads = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return sum(g.square().flatten(1).sum(1).mean() / 2 for g in grads)


def random_crops(x, count, low, high, side, rng):
    n = len(x) * count
    flip = torch.where(torch.rand(n, 1, generator=rng) < 0.5, -1.0, 1.0)
    scale = low + (high - low) * torch.rand(n, 2, generator=rng)        # of width and height
    offset = (2 * torch.rand(n, 2, generator=rng) - 1) * (1 - scale)
    across = torch.linspace(-1, 1, side)
    h = (across * scale[:, :1] * flip + offset[:, :1])[:, None, :].expand(-1, side, -1)
    v = (across * scale[:, 1:] + offset[:, 1:])[:, :, None].expand(-1, -1, side)
    grid = torch.stack([h, v], 3).view(len(x), count * side, side, 2).to(x)
    patches = F.grid_sample(x, grid, align_corners=False)
    return patches.unflatten(2, (count, side)).transpose(1, 2)


# =============================================================================================
# 4. Data
# =============================================================================================


class Pictures(torch.utils.data.Dataset):
    def __init__(self, files, args):
        self.files, self.args = files, args

    def __getitem__(self, n):
        return self.picture(2 * n), self.picture(2 * n + 1)

    def picture(self, n):
        rng = random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.files))
        order = shuffled(len(self.files), common.mix(self.args.seed, "epoch", epoch))
        im = common.open_rgb(self.files[order[i]])
        size, zoom = self.args.size, self.args.load / min(im.size)
        w, h = (max(size, round(side * zoom)) for side in im.size)
        left, top = rng.randint(0, w - size), rng.randint(0, h - size)
        im = im.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))
        return common.to_tensor(im if rng.random() < 0.5 else im.transpose(Image.FLIP_LEFT_RIGHT))

    def __len__(self):
        return len(self.files)


@functools.lru_cache(maxsize=4)
def shuffled(n, seed):
    """A permutation of range(n) that depends on the seed alone."""
    return random.Random(seed).sample(range(n), n)


def random_batch(args, device):
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    shape = (args.batch, 3, args.size, args.size)
    return [torch.rand(shape).mul(2).sub(1).to(device, memory_format=layout) for _ in "DG"]


# =============================================================================================
# 5. One training step
# =============================================================================================


def train_step(m, x_D, x_G, args, rng, average=lambda *nets: None, step=0):
    losses = d_step(m, x_D, args, rng, average)
    if args.R1_every and (step + 1) % args.R1_every == 0:
        losses |= r1_step(m, x_D, args, rng, average)
    losses |= g_step(m, x_G, args, rng, average)
    return {name: loss.detach() for name, loss in losses.items()}


def codes_to_pictures(m, x, args):
    s, t = m.E(x)
    half = len(x) // 2
    hybrids = len(x) if args.hybrids == "all" else half
    swapped = s.unflatten(0, (half, 2)).flip(1).flatten(0, 1)
    if args.hybrids == "half":
        swapped, t_mix = swapped[half:], t[half:]
    else:
        t_mix = t
    out = m.G(torch.cat([s[:half], swapped]), torch.cat([t[:half], t_mix]))
    return out[:half], out[half:], x[-hybrids:]


def crops_of(x, args, rng):
    return random_crops(x, args.crops, *args.crop, args.patch, rng)


def d_step(m, x, args, rng, average):
    with torch.no_grad():
        rec, mix, x_t = codes_to_pictures(m, x, args)
    real, fake_rec, fake_mix = m.D(torch.cat([x, rec, mix])).split([len(x), len(rec), len(mix)])
    gan = common.non_saturating
    losses = {"D_real": gan(real, True), "D_rec": gan(fake_rec, False),
              "D_mix": gan(fake_mix, False)}
    L = losses["D_real"] + 0.5 * losses["D_rec"] + 0.5 * losses["D_mix"]
    if args.lambda_cooccur > 0:
        patches = torch.cat([crops_of(p, args, rng) for p in (x_t, x_t, mix)])
        reference, query, fake = m.P.features(patches).chunk(3)
        losses["P_real"] = gan(m.P.compare(reference, query), True)
        losses["P_mix"] = gan(m.P.compare(reference, fake), False)
        L = L + losses["P_real"] + losses["P_mix"]
    m.opt_D.zero_grad(set_to_none=True)
    L.backward()
    average(m.D, m.P)
    m.opt_D.step()
    return losses


def r1_step(m, x, args, rng, average):
    x = x.detach().requires_grad_()
    R1 = r1_penalty(m.D(x), x)
    m.opt_D.zero_grad(set_to_none=True)
    (args.lambda_R1 * args.R1_every * R1).backward()
    losses = {"R1": R1.detach()}
    if args.lambda_cooccur > 0:
        reference, query = (crops_of(x.detach(), args, rng).detach().requires_grad_()
                            for _ in range(2))
        logits = m.P.compare(m.P.features(reference), m.P.features(query))
        R1 = 0.5 * r1_penalty(logits, reference, query)
        (args.lambda_patch_R1 * args.R1_every * R1).backward()
        losses["patch_R1"] = R1.detach()
    average(m.D, m.P)
    m.opt_D.step()
    return losses


def g_step(m, x, args, rng, average):
    for net in (m.D, m.P):
        net.requires_grad_(False)
    rec, mix, x_t = codes_to_pictures(m, x, args)
    half = len(rec)
    losses = {"rec": (common.full(rec) - x[:half]).abs().mean()}           # Eq. (4.1)
    gan = common.non_saturating
    real_rec, real_mix = m.D(torch.cat([rec, mix])).split([half, len(mix)])
    losses["GAN_rec"] = gan(real_rec, True)                                 # Eq. (4.2)
    losses["GAN_swap"] = gan(real_mix, True)                                # Eq. (4.3)
    L = (args.lambda_rec * losses["rec"] + args.lambda_gan_rec * losses["GAN_rec"]
         + args.lambda_gan_swap * losses["GAN_swap"])
    if args.lambda_cooccur > 0:
        with torch.no_grad():
            reference = m.P.features(crops_of(x_t, args, rng))
        query = m.P.features(crops_of(mix, args, rng))
        losses["cooccur"] = gan(m.P.compare(reference, query), True)        # Eq. (4.4)
        L = L + args.lambda_cooccur * losses["cooccur"]
    m.opt_G.zero_grad(set_to_none=True)
    L.backward()
    average(m.E, m.G)
    m.opt_G.step()
    for net in (m.D, m.P):
        net.requires_grad_(True)
    return losses


# =============================================================================================
# 6. Training loop
# =============================================================================================


def data_folder(args):
    return common.find_data(args.data, LAYOUT, lambda: toy.ensure("textures", args.size))


def train(args):
    run = Run("swapae", args)
    root = data_folder(args)
    data = Pictures(common.list_pictures(root / "train" if (root / "train").is_dir() else root),
                    args)
    total = args.steps or args.images // (2 * args.batch * run.world)
    m = build(args, run.device)
    run.resume_or_start(vars(m))
    show = common.list_pictures(root / "test")[:7]
    show = torch.stack([common.to_tensor(common.open_rgb(f)) for f in show]).to(run.device)
    for step, (x_D, x_G) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(grid(m, show))
        run.log(train_step(m, x_D, x_G, args, run.rng(), run.average_gradients, step))
    run.save_samples(grid(m, show))
    scores = []
    if args.data == "toy":
        scores = truth_scores(m, root, args, run.device)
    run.finish(scores)


@torch.no_grad()
def truth_scores(m, root, args, device):
    x, y = (torch.stack([common.to_tensor(common.open_rgb(f)) for f in common.list_pictures(root / d)])
            for d in ("test", "test_truth"))
    s, t = m.E(x)
    y_hat = m.G(s, t.roll(-1, 0), torch.Generator().manual_seed(0)).clamp(-1, 1)
    rec = m.G(s, t, torch.Generator().manual_seed(0)).clamp(-1, 1)
    return toy.texture_scores(x, x.roll(-1, 0), y_hat, y) + [
        {"name": "rec", "value": float((rec - x).abs().mean() * 127.5), "better": "lower"}]


@torch.no_grad()
def grid(m, x):
    s, t = m.E(x)
    rng = lambda: torch.Generator().manual_seed(0)
    out = {"structure": torch.cat([torch.ones_like(x[:1]), x]),
           "rec": torch.cat([torch.ones_like(x[:1]), m.G(s, t, rng())])}
    for i in range(len(x)):
        out[f"texture {i}"] = torch.cat([x[i:i + 1], m.G(s, t[i:i + 1].expand(len(s), -1), rng())])
    return out


def main(argv=None):
    train(get_args(argv))


if __name__ == "__main__":
    common.entry(main)
