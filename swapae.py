"""Swapping Autoencoder: one code for the layout of a picture, one for its texture; swap and edit.

The encoder E turns a picture into a structure code (a map with few channels) and a texture code (a
vector). The generator G must rebuild the picture from its own two codes, and must paint something
realistic from the structure of one picture and the texture of another. What makes the vector mean
"texture"? A second discriminator sees small patches only, so it knows nothing of the layout: it
asks whether a patch of the hybrid comes from the same picture as some patches of the one that gave
the texture. No labels, no pairs, no domains: one folder. Editing is arithmetic on the codes.

T. Park, J.-Y. Zhu, O. Wang, J. Lu, E. Shechtman, A. A. Efros, R. Zhang, "Swapping Autoencoder for
Deep Image Manipulation", NeurIPS 2020 (arXiv 2007.00653). Numbers below are those of chapter 4 in
T. Park, "Machine Learning for Deep Image Manipulation", UC Berkeley 2021.

SYMBOLS      paper                 here            shape
             x                     x               (B, 3, H, W) in [-1, 1]
             (z_s, z_t) = E(x)     z_s, z_t        (B, 8, H/16, W/16), (B, 2048)
             G(E(x))               x_rec           (B/2, 3, H, W), of the first half of x
             G(z_s^1, z_t^2)       x_hyb           (B, 3, H, W): x is x^2, its neighbour x^1
             D                     D               (B, 3, H, W) -> logits (B, 1)
             D_patch               D_patch         queries, references -> logits (B, 8)
             crop, crops           crops           (B, 3, H, W) -> (B, 8, 3, 128, 128)

OBJECTIVE    Eq. (4.1)  L_rec(E, G) = E_x |x - G(E(x))|_1
             Eq. (4.2)  L_GAN,rec(E, G, D) = E_x -log D(G(E(x)))
             Eq. (4.3)  L_GAN,swap(E, G, D) = E_x1,x2 -log D(G(z_s^1, z_t^2))
             Eq. (4.4)  L_CooccurGAN(E, G, D_patch)
                                    = E_x1,x2 -log D_patch(crop(G(z_s^1, z_t^2)), crops(x^2))
             Sec. 4.3.4 L_total = L_rec + 0.5 L_GAN,rec + 0.5 L_GAN,swap + L_CooccurGAN
             Sec. 4.4.8 D and D_patch minimise E -log D(real) + E -log(1 - D(fake)), and R1 lazily

CHOICES      where the text is silent, or differs from what the authors ran (their released code):
             N hybrids of a batch of N, weight 1 (text: N/2; 0.5 in Sec. 4.3.4, "all 1.0" in 4.4.8).
             Per picture both GAN terms weigh as in Sec. 4.3.4, L_CooccurGAN half as much as there.
             Batch 16 at 256 pixels, 32 for some sets (text: 64 there, 16 above).
             Two residual blocks before the upsampling ones (text: four, of unknown widths).

             Codes have unit length, at every place (text: no word of it), and the structure code is
             scaled and shifted by the texture code before G's first block.
             E's skips are padded by zeros, so a texture code can tell a border (text: reflection or
             none, so that it cannot).
             R1 of D_patch weighs a quarter, for gradients to both sets of crops (text: 1, of which
             StyleGAN2 takes half).
             Crops are resized to 128 pixels (text: to a quarter of the picture, the same at 512);
             "3 dense layers" are hidden ones; the logit's is a fourth. In two launchers the
             references are not averaged, but paired with the queries: --setting church, bedroom.
             No moving average of the weights (--ema has one). D and G see different batches.
             --setting 1024 trains 768-pixel crops of narrower networks (text: 1024 after 512).
             `python -m lab.variants show swapae thesis`: the text as a diff, but for scale and
             shift, E's blur, batches, patches and dense layers. Not here: user studies, the
             detector of Tab. 4.4, and the baselines of Tabs. 4.1 to 4.3.

USAGE        python swapae.py                                 # toy world, scores at the end
             python swapae.py --data photos/ --setting mountains
             python swapae.py --translate photo.jpg --exemplar texture.jpg --weights last.pt
             python -m lab.figures swapae grid --weights last.pt   # interpolate, pca, domains, ...
EXPECT       python swapae.py: 11 to 19 minutes of a core (seeds 0 to 2, 40 test scenes): figure
             and ground take the exemplar's hues, colour error 12 to 16 (copying the structure 36,
             colour transfer 20, in dark and light apart 4), layouts stay, outline error 0.07 to
             0.10 (copying the structure 0.02); but G paints speckle everywhere, also from the true
             answer's codes: the motif is right in 0.31 to 0.33 of the regions (copying the texture
             0.51), so that is no success. L_D 1.28 to 1.35, L_Dpatch 1.29 to 1.33 (chance 1.39).
"""

import argparse
import copy
import functools
import math
import random
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
from common import Run, UserError, expect, full

# ==== 1. Configuration ========================================================================

LAYOUT = "a folder of pictures, or one with train/ (and test/), or with trainA/ trainB/"
SETTINGS = {  # what the authors ran, per data set (released launchers; Sec. 4.4.8)
    "256": {},
    "church": {"aggregate": False},                # to train anew; the released weights are of
    "bedroom": {"aggregate": False, "batch": 32},  # "256": batch 32 (church, AFHQ), 56 (bedroom)
    "512": {"size": 512},                          # FFHQ: squares, where their resize is ours
    "mountains": {"size": 512, "lambda_patch_R1": 10.0},
    "1024": {"size": 768, "load": 1024, "downs": 5, "texture": 1536, "patch": 256,
             "widths": [0.4, 0.8, 1.0, 1.0]},      # FFHQ
}
TOY = {  # the paper's four terms and both penalties; L_rec alone weighs more
    "size": 64, "batch": 4, "steps": 1500, "widths": [0.25, 0.1875, 0.03125, 0.125],  # minutes
    "downs": 3, "structure": 2,  # a place of z_s is 8 pixels wide, a streak 3 by 9; z_t is no mean
                                 # here: 64 pixels leave one place to average (256: nine)
    "texture": 64, "code_norm": "rms",  # at unit length, 64 numbers modulate G 8 times less
    "patch": 16, "crops": 4,     # patches of a quarter of the picture's side (Sec. 4.4.8)
    "lambda_rec": 3.0,           # with 1 (a wider D, weaker penalties) no hues in 500 steps
    "ema": 0.99,                 # evens out the last hundred steps of batches so small
    "load": None, "vgg": "random", "workers": 0, "sample_every": 300}
PICTURES = 25_000_000  # shown to D and to G together (code; the text is silent)


def get_args(argv=None):
    """Flags in layers: defaults < --setting < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--setting", choices=list(SETTINGS), default="256", help="sizes and widths (Sec. 4.4.8)")
    add("--size", type=int, default=256, help="training crop, sides in pixels (Sec. 4.4.8)")
    add("--load", type=int, help="the short side is resized to this first (--size)")
    add("--batch", type=int, default=16, help="pictures per update and process, even (code)")
    add("--steps", type=int, help="pairs of updates, D then G (code: 25 million pictures in all)")
    add("--downs", type=int, default=4, help="halvings from picture to structure (Sec. 4.4.7)")
    add("--structure", type=int, default=8, help="channels of the structure code (Sec. 4.4.7)")
    add("--texture", type=int, default=2048, help="length of the texture code (Sec. 4.4.7)")
    add("--code-norm", choices=["unit", "rms", "none"], default="unit",
        help="codes get length 1, or mean square 1 (learns faster), or stay as they are")
    add("--widths", type=float, nargs=4, default=[1.0] * 4, metavar="F",
        help="factors on the widths of E, G, D and D_patch")
    add("--lambda-rec", type=float, default=1.0, help="weight of Eq. (4.1) (Sec. 4.3.4)")
    add("--lambda-GAN-rec", type=float, default=0.5, help="weight of Eq. (4.2) (Sec. 4.3.4)")
    add("--lambda-GAN-swap", type=float, default=1.0, help="weight of Eq. (4.3) (4.3.4: 0.5)")
    add("--lambda-cooccur", type=float, default=1.0, help="weight of Eq. (4.4) (Sec. 4.3.4)")
    add("--lambda-R1", type=float, default=10.0, help="R1 penalty of D (Sec. 4.4.8)")
    add("--lambda-patch-R1", type=float, default=1.0, help="R1 penalty of D_patch (Sec. 4.4.8)")
    add("--R1-every", type=int, default=16, help="updates of D per R1 update; 0: none (StyleGAN2)")
    add("--crops", type=int, default=8, help="patches per picture (Sec. 4.4.8)")
    add("--crop", type=float, nargs=2, default=[1 / 8, 1 / 4], metavar="SHARE",
        help="a patch's sides, as shares of the picture's (Sec. 4.3.3; Fig. 4.6); the authors "
        "advise smaller ones where D_patch gets too strong and changes structure")
    add("--patch", type=int, default=128, help="patches are resized to this square, in pixels")
    add("--aggregate", action=switch, default=True, help="average the references' features")
    add("--ema", type=float, default=0.0, help="decay of averaged E and G for use; 0: none")
    add("--exemplar", metavar="PATH", help="--translate: whose texture (--clone: whose structure)")
    add("--vector", nargs=2, metavar="FOLDER",
        help="--translate: add the mean texture code of the first less that of the second")
    add("--pca", type=int, metavar="K",
        help="--translate: move along --data's K-th principal direction, in deviations")
    add("--mask", metavar="FILE|X,Y|all", help="--pca: of the structure code's places: where a "
        "picture is white, or alike to pixel X,Y (after --side); all: of the whole map, for "
        "aligned pictures")
    add("--clone", type=int, nargs=6, metavar="PX",
        help="--translate: copy structure from the box X Y W H to TO_X TO_Y (after --side)")
    add("--alpha", type=float, nargs="+", default=[1.0],
        help="how far to go: to --exemplar's texture, or along --vector or --pca")
    add("--vgg", default="imagenet", metavar="imagenet|random|FILE",
        help="network of the metrics; random and FILE (VGG-16, torchvision's) are stand-ins")
    add("--fid-weights", metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        return SETTINGS[args.setting] | (TOY if args.data == "toy" and not args.weights else {})

    args = common.parse_flags(p, argv, "swapae", presets, run_name)
    cell, levels = 2 ** args.downs, round(math.log2(args.size))
    expect(args.downs >= 1, f"--downs {args.downs}: must be at least 1")
    expect(args.size >= 7 * cell and not args.size % cell and not 4 * args.size % 2 ** levels,
           f"--size {args.size}: must be at least {7 * cell}, a multiple of {cell}, and shrink to "
           "whole places in D (like 128, 192, 256)")
    expect(not args.load or args.load >= args.size,
           f"--load {args.load}: must be at least --size {args.size}")
    expect(not args.batch % 2, f"--batch {args.batch}: must be even: neighbours are swapped")
    expect(args.patch >= 8 and not args.patch & (args.patch - 1),
           f"--patch {args.patch}: must be a power of two, 8 at least")
    expect(0 < args.crop[0] <= args.crop[1] <= 1,
           f"--crop {args.crop}: expected two shares of a side, the smaller one first")
    thinnest = 1 / 32, 1 / 64, 1 / min(512, 2 ** (15 - levels)), 1 / min(384, 4096 / args.patch)
    expect(all(width >= least for width, least in zip(args.widths, thinnest, strict=True)),
           f"--widths {args.widths}: expected at least {thinnest} for E, G, D and D_patch")
    expect(0 <= args.ema < 1, f"--ema {args.ema}: must lie between 0 and 1")
    return args


def run_name(args):
    return f"swapae-{Path(args.data).name}"


# ==== 2. Networks: StyleGAN2's parts (Sec. 4.4.7) =============================================


def leaky(x):
    """Leaky ReLU with slope 0.2 and a gain of sqrt 2, which keeps the variance."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class EqualConv(nn.Module):
    """Convolution with run-time weight scale 1/sqrt(fan-in), maybe a bias and leaky ReLU."""

    def __init__(self, a, b, kernel, stride=1, padding=0, bias=True, activate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(b)) if bias else None
        self.stride, self.padding, self.activate = stride, padding, activate

    def forward(self, x):
        scale = self.weight[0].numel() ** -0.5
        x = F.conv2d(x, self.weight * scale, self.bias, self.stride, self.padding)
        return leaky(x) if self.activate else x


class EqualLinear(nn.Module):
    """The same for vectors: (..., a) -> (..., b); the bias starts at `start`."""

    def __init__(self, a, b, activate=False, start=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a))
        self.bias = nn.Parameter(torch.full((b,), start))
        self.activate = activate

    def forward(self, x):
        x = F.linear(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)
        return leaky(x) if self.activate else x


class Blur(nn.Module):  # same as sincut.py: Blur
    """Zero padding `pad`, then the filter [1, 3, 3, 1] x [1, 3, 3, 1] / 64 at every `stride`.

    (B, C, H, W) -> (B, C, (H + 2 pad - 4) // stride + 1, ...). WHY depthwise: the authors filter
    B * C pictures of one channel, which takes three to eight times as long on a CPU.
    """

    def __init__(self, channels, pad, stride=1, gain=1.0):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", gain * torch.outer(row, row).repeat(channels, 1, 1, 1),
                             persistent=False)  # (C, 1, 4, 4)
        self.pad, self.stride = pad, stride

    def forward(self, x):
        return F.conv2d(x, self.kernel, None, self.stride, self.pad, groups=x.shape[1])


class EncoderBlock(nn.Module):
    """E's residual block: (B, a, H, W) -> (B, b, H/2, W/2), mirrored at the border.

    CHOICE (code): blurs by [1, 2, 1], and its skip is padded by zeros, at the top and the left.
    """

    def __init__(self, a, b):
        super().__init__()
        self.conv1, self.conv2 = EqualConv(a, a, 3), EqualConv(a, b, 3, stride=2)
        self.skip = EqualConv(a, b, 1, bias=False, activate=False)
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(row, row).repeat(a, 1, 1, 1), persistent=False)

    def blur(self, x, stride=1):
        return F.conv2d(x, self.kernel, None, stride, groups=x.shape[1])

    def forward(self, x):
        main = self.conv1(F.pad(x, (1, 1, 1, 1), mode="reflect"))              # (B, a, H, W)
        main = self.blur(F.pad(main, (2, 1, 2, 1), mode="reflect"))            # (B, a, H+1, W+1)
        skip = self.blur(F.pad(x, (1, 0, 1, 0)), stride=2)                     # (B, a, H/2, W/2)
        return (self.conv2(main) + self.skip(skip)) / math.sqrt(2)             # (B, b, H/2, W/2)


class ResBlock(nn.Module):
    """D's and D_patch's: (B, a, H, W) -> (B, b, H/2, W/2), or (B, b, H, W) with down=False."""

    def __init__(self, a, b, down=True):
        super().__init__()
        self.conv1 = EqualConv(a, a, 3, padding=1)
        self.blur = Blur(a, pad=2) if down else nn.Identity()                  # (B, a, H+1, W+1)
        self.conv2 = EqualConv(a, b, 3, stride=2) if down else EqualConv(a, b, 3, padding=1)
        # a 1x1 convolution with stride 2 reads every second place, so its blur need do no more
        self.blur_skip = Blur(a, pad=1, stride=2) if down else nn.Identity()   # (B, a, H/2, W/2)
        self.skip = EqualConv(a, b, 1, bias=False, activate=False)

    def forward(self, x):
        main = self.conv2(self.blur(self.conv1(x)))
        return (main + self.skip(self.blur_skip(x))) / math.sqrt(2)


def normalised(code, how="unit"):
    """Vectors along dimension 1 -> the same with length 1 (unit) or mean square 1 (rms)."""
    if how == "none":
        return code
    size = code.square().sum(1, keepdim=True) / (1 if how == "unit" else code.shape[1])
    return code * (size + 1e-8).rsqrt()


class Encoder(nn.Module):
    """E: x (B, 3, H, W) -> z_s (B, 8, H/16, W/16), z_t (B, 2048) (Fig. 4.9); 30.58 M parameters.

    widths: of `from_rgb`, of each of the `downs` halvings, of the two convolutions that lead to
    the texture code. H and W need 7 * 2^downs pixels, 112; what does not fill a cell of 16 pixels
    is left out at the right and at the bottom.
    """

    def __init__(self, widths, downs=4, structure=8, texture=2048, norm="unit"):
        super().__init__()
        self.norm, self.multiple = norm, 2 ** downs  # a cell's side in pixels
        pairs, c = list(pairwise(widths)), widths[downs]
        self.from_rgb = EqualConv(3, widths[0], 1)
        self.down = nn.Sequential(*[EncoderBlock(a, b) for a, b in pairs[:downs]])
        self.to_structure = nn.Sequential(EqualConv(c, c, 1),
                                          EqualConv(c, structure, 1, activate=False))
        # no padding here, then the mean over all places
        self.pool = nn.Sequential(*[EqualConv(a, b, 3, stride=2) for a, b in pairs[downs:]])
        self.to_texture = EqualLinear(widths[-1], texture)

    def forward(self, x):
        x = self.down(self.from_rgb(x))                                    # (B, 512, H/16, W/16)
        z_s = self.to_structure(x)                                         # (B, 8, H/16, W/16)
        z_t = self.to_texture(self.pool(x).mean((2, 3)))                   # (B, 2048)
        return normalised(z_s, self.norm), normalised(z_t, self.norm)      # CHOICE (code): unit


class StyledConv(nn.Module):
    """3x3 convolution modulated by the texture code, then noise, bias and leaky ReLU.

    x (B, a, H, W), z_t (B, texture) -> (B, b, H, W), or (B, b, 2H, 2W) with `up`. A linear layer
    makes a style, a scale of every input channel, from z_t. Demodulation keeps the variance at 1;
    CHOICE (code): the style gets a mean square of 1 and the weights unit length, each by itself.
    WHY scaled maps instead of weights for each picture: the same product, as one convolution.
    """

    def __init__(self, a, b, texture, up=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, 3, 3))
        self.noise = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(b))
        self.style = EqualLinear(texture, a, start=1.0)
        self.blur = Blur(b, pad=1, gain=4.0) if up else None

    def forward(self, x, z_t, rng=None):
        """rng: CPU generator of noise that is the same for all pictures; None: fresh noise."""
        style, weight = self.style(z_t), self.weight / math.sqrt(self.weight[0].numel())
        style = style * (style.square().mean(1, keepdim=True) + 1e-8).rsqrt()              # (B, a)
        weight = weight * (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        x = x * style[:, :, None, None]
        if self.blur is None:
            x = F.conv2d(x, weight, padding=1)                                   # (B, b, H, W)
        else:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)          # (B, b, 2H+1, ...)
            x = self.blur(x)                                                     # (B, b, 2H, 2W)
        noise = (torch.randn_like(x[:, :1]) if rng is None else
                 torch.randn(1, 1, *x.shape[2:], generator=rng).to(x))           # (B, 1, ...)
        return leaky(x + self.noise * noise + self.bias.view(1, -1, 1, 1))


class ToRGB(nn.Module):
    """Modulated 1x1 convolution without demodulation or noise; x (B, a, H, W) -> (B, 3, H, W)."""

    def __init__(self, a, texture):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, a, 1, 1)), nn.Parameter(torch.zeros(3))
        self.style = EqualLinear(texture, a, start=1.0)

    def forward(self, x, z_t):
        x = x * self.style(z_t)[:, :, None, None]
        return F.conv2d(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)


class StyledBlock(nn.Module):
    """G's residual block: (B, a, H, W) -> (B, b, H, W), or (B, b, 2H, 2W) with `up`.

    CHOICE (code): the skip of an upsampling block that changes its width has a bias and leaky
    ReLU; it is upsampled bilinearly, which is the blur of the main branch but for the border.
    """

    def __init__(self, a, b, texture, up=False):
        super().__init__()
        self.up = up
        self.conv1, self.conv2 = StyledConv(a, b, texture, up), StyledConv(b, b, texture)
        self.skip = nn.Identity() if up and a == b else EqualConv(a, b, 1, bias=up, activate=up)

    def forward(self, x, z_t, rng=None):
        skip = self.skip(x)
        if self.up:
            skip = F.interpolate(skip, scale_factor=2.0, mode="bilinear")
        return (self.conv2(self.conv1(x, z_t, rng), z_t, rng) + skip) / math.sqrt(2)


class Generator(nn.Module):
    """G: z_s (B, 8, h, w), z_t (B, 2048) -> (B, 3, 16h, 16w) (Fig. 4.9); 25.06 M parameters.

    head, up: widths of the blocks before upsampling, and of those that upsample. The last layer is
    linear and unbounded.
    """

    def __init__(self, head, up, structure=8, texture=2048, norm="unit"):
        super().__init__()
        self.norm, widths = norm, [structure, *head, *up]
        self.scale, self.shift = (EqualLinear(texture, structure) for _ in range(2))
        self.blocks = nn.ModuleList(StyledBlock(a, b, texture, up=i >= len(head))
                                    for i, (a, b) in enumerate(pairwise(widths)))
        self.to_rgb = ToRGB(widths[-1], texture)

    def forward(self, z_s, z_t, rng=None):
        """rng: see `StyledConv`."""
        # again, because an edited code has another length
        z_s, z_t = normalised(z_s, self.norm), normalised(z_t, self.norm)
        x = z_s * self.scale(z_t)[:, :, None, None] + self.shift(z_t)[:, :, None, None]
        for block in self.blocks:
            x = block(x, z_t, rng)                                   # at last (B, 128, 16h, 16w)
        return self.to_rgb(x, z_t)


class Discriminator(nn.Module):
    """D: StyleGAN2's, without minibatch deviation; x (B, 3, size, size) -> logits (B, 1).

    28.86 M parameters at 256 pixels.
    """

    def __init__(self, size=256, width=1.0):
        super().__init__()
        levels = round(math.log2(size))                                    # 768 counts as 1024
        widths = [int(min(512, 2 ** (15 - i)) * width) for i in range(levels, 1, -1)]
        last, cells = widths[-1], (4 * size // 2 ** levels) ** 2
        self.from_rgb = EqualConv(3, widths[0], 1)
        self.down = nn.Sequential(*[ResBlock(a, b) for a, b in pairwise(widths)])
        self.last = EqualConv(last, last, 3, padding=1)
        self.dense = nn.Sequential(EqualLinear(last * cells, last, activate=True),
                                   EqualLinear(last, 1))

    def forward(self, x):
        x = self.last(self.down(self.from_rgb(x)))                         # (B, 512, 4, 4)
        return self.dense(x.flatten(1))                                    # (B, 1)


class PatchDiscriminator(nn.Module):
    """D_patch: are queries and references patches of one picture? (Fig. 4.10); 24.52 M parameters.

    `features`: (B, T, 3, patch, patch) -> (B, T, 1536); the network of a pair takes two of these.
    """

    def __init__(self, patch=128, width=1.0, aggregate=True):
        super().__init__()
        self.aggregate = aggregate
        levels = round(math.log2(patch))
        widths = [int(min(384, 2 ** (12 - i)) * width) for i in range(levels, 1, -1)]
        last = widths[-1]
        self.from_rgb = EqualConv(3, widths[0], 3, padding=1)
        self.down = nn.Sequential(*[ResBlock(a, b) for a, b in pairwise(widths)])
        self.block = ResBlock(last, 2 * last, down=False)                  # (B T, 768, 4, 4)
        self.last = EqualConv(2 * last, last, 3)                           # (B T, 384, 2, 2)
        units = [2 * 4 * last, *(int(n * width) for n in (2048, 2048, 1024)), 1]
        self.dense = nn.Sequential(*[EqualLinear(a, b, activate=b > 1) for a, b in pairwise(units)])

    def features(self, patches):
        x = self.block(self.down(self.from_rgb(patches.flatten(0, 1))))
        return self.last(x).flatten(1).unflatten(0, patches.shape[:2])

    def forward(self, queries, references):
        """Features (B, T, 1536) of both -> logits (B, T), one for each query."""
        if self.aggregate:  # Sec. 4.4.8; if not, query j is compared with reference j alone
            references = references.mean(1, keepdim=True).expand_as(queries)
        # CHOICE (code): references come first here, though Eq. (4.4) names the query first
        return self.dense(torch.cat([references, queries], dim=2)).squeeze(2)


def build(args, device):
    """E, G, D, D_patch, their two Adams and, with --ema, the averaged E and G."""
    torch.manual_seed(args.seed)
    width_E, width_G, width_D, width_patch = args.widths
    widths = [min(args.texture, round(32 * 2 ** i * width_E)) for i in range(args.downs + 3)]
    top, *up = [int(min(512, 128 * 2 ** (args.downs - i)) * width_G) for i in range(args.downs + 1)]
    blocks = 2                                             # before upsampling; CHOICE (code)
    head = [max(args.structure, round((i + 1) / blocks * top)) for i in range(blocks)]
    codes = args.structure, args.texture, args.code_norm
    nets = SimpleNamespace(E=Encoder(widths, args.downs, *codes), G=Generator(head, up, *codes),
                           D=Discriminator(args.size, width_D),
                           D_patch=PatchDiscriminator(args.patch, width_patch, args.aggregate))
    for net in vars(nets).values():
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
    if args.ema:
        nets.E_ema, nets.G_ema = (copy.deepcopy(n).requires_grad_(False) for n in (nets.E, nets.G))
    lr, beta2 = 0.002, 0.99                                # Sec. 4.4.8
    adam = functools.partial(torch.optim.Adam, fused=device.type in ("cuda", "cpu"))
    nets.opt_G = adam([*nets.E.parameters(), *nets.G.parameters()], lr, (0.0, beta2))
    # StyleGAN2: with R1's, 17 updates count as 16
    c = args.R1_every / (args.R1_every + 1) if args.R1_every else 1.0
    nets.opt_D = adam([*nets.D.parameters(), *nets.D_patch.parameters()], lr * c, (0.0, beta2 ** c))
    if args.compile:  # WHY not D and D_patch: R1 differentiates them twice, compiled code only once
        nets.E.forward, nets.G.forward = map(torch.compile, (nets.E.forward, nets.G.forward))
    return nets


# ==== 3. Losses ===============================================================================


def non_saturating(logits, real):  # same as sincut.py: non_saturating
    """-log D(.) for what shall be real, -log(1 - D(.)) for what is not; logits (B, ...)."""
    return F.softplus(-full(logits) if real else full(logits)).mean()  # Eq. (4.2), (4.3), (4.4)


def crops(x, args, rng):
    """crops of Eq. (4.4): (B, 3, H, W) -> (B, T, 3, patch, patch); rng: CPU generator.

    T = --crops patches, width and height drawn one by one from --crop, shares of a side, the place
    and a mirror at random; each is resized to --patch pixels, bilinearly. CHOICE (code): samples
    reach from edge to edge of the patch, so at the picture's border half a pixel is blended with
    zero.
    """
    B, T, (low, high), side = len(x), args.crops, args.crop, args.patch
    mirror = 1 - 2 * (torch.rand(B * T, generator=rng) < 0.5).float()
    sides = low + (high - low) * torch.rand(B * T, 2, generator=rng)       # width, height
    middle = (2 * torch.rand(B * T, 2, generator=rng) - 1) * (1 - sides)   # in [-1, 1]
    across = torch.linspace(-1, 1, side)
    columns = middle[:, :1] + across * (sides[:, 0] * mirror)[:, None]     # (B T, side)
    rows = middle[:, 1:] + across * sides[:, 1:]                           # (B T, side)
    grid = torch.stack([columns[:, None].expand(-1, side, -1),
                        rows[:, :, None].expand(-1, -1, side)], dim=3)     # (B T, side, side, 2)
    # the T patches of a picture are sampled as one that is T times as high
    tall = F.grid_sample(x, grid.view(B, T * side, side, 2).to(x), align_corners=False)
    return tall.unflatten(2, (T, side)).transpose(1, 2)


def squared_slope(logits, *inputs):
    """Mean over pictures of |d logits / d input|^2, summed over the inputs (B, ...)."""
    grads = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return sum(grad.square().flatten(1).sum(1).mean() for grad in grads)


CHANCE = {"L_D": 2 * math.log(2), "L_Dpatch": 2 * math.log(2)} | dict.fromkeys(
    ("L_GAN_rec", "L_GAN_swap", "L_Cooccur"), math.log(2))  # D and D_patch = 1/2 everywhere


# ==== 4. Data =================================================================================


def find_pictures(root, split):
    """Files of root/SPLIT, or of root/SPLITA and root/SPLITB together; [] if there are none."""
    for names in ([split], [f"{split}A", f"{split}B"]):
        if all(Path(root, name).is_dir() for name in names):
            return [f for name in names for f in common.list_pictures(Path(root, name))]
    return []


def training_files(root):
    """The pictures of train/, trainA/ and trainB/, or of the folder itself; `UserError`."""
    files = find_pictures(root, "train") or common.list_pictures(root)
    expect(len(files) > 1, f"{root}: one picture, but swapping needs two; expected {LAYOUT}")
    return files


def resized(file, args, rng=None):
    """The short side becomes --load; then a square of --size, in the middle or drawn by `rng`.

    -> (3, size, size) in [-1, 1]. With rng, half of them are mirrored (CHOICE: code).
    """
    im, size = common.open_rgb(file), args.size
    zoom = (args.load or size) / min(im.size)
    w, h = (max(size, round(side * zoom)) for side in im.size)
    place = (rng.random(), rng.random()) if rng else (0.5, 0.5)
    left, top = round((w - size) * place[0]), round((h - size) * place[1])
    im = im.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))
    if rng and rng.random() < 0.5:
        im = im.transpose(Image.FLIP_LEFT_RIGHT)
    return common.to_tensor(im)


def middle_squares(files, args, device, limit=1000):
    """Files, at most `limit`, evenly spaced -> (N, 3, size, size), cut from the middle."""
    n = min(limit, len(files))
    return torch.stack([resized(files[i * len(files) // n], args) for i in range(n)]).to(device)


class Pictures(torch.utils.data.Dataset):
    """`self[n]`: the n-th sample of the run, one picture for D's update and one for G's.

    Walks through a new shuffle of the files every epoch; depends on (seed, n) alone. Where an
    epoch ends inside a batch, a picture can meet itself, which is common only in tiny folders.
    """

    def __init__(self, root, args):
        self.files, self.args = training_files(root), args

    def __getitem__(self, n):
        return self.picture(2 * n), self.picture(2 * n + 1)

    def picture(self, n):
        epoch, i = divmod(n, len(self.files))
        order = common.shuffled(len(self.files), common.mix(self.args.seed, "epoch", epoch))
        rng = random.Random(common.mix(self.args.seed, n))
        return resized(self.files[order[i]], self.args, rng)


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("textures", args.size)
    return common.find_data(args.data, LAYOUT, {}, draw_toy)


# ==== 5. One training step ====================================================================


def rebuild_and_swap(nets, x):
    """x (B, 3, H, W) -> x_rec (B/2, 3, H, W) of its first half, x_hyb and x^2 (B, 3, H, W).

    Neighbours exchange structure: the hybrid i has the structure of x^1 = x[i xor 1] and must carry
    the texture of x^2 = x[i]. CHOICE (code): a hybrid for every picture (text: B/2).
    """
    half, other = len(x) // 2, torch.arange(len(x), device=x.device) ^ 1
    z_s, z_t = nets.E(x)                                           # (B, 8, h, w), (B, 2048)
    x_rec = nets.G(z_s[:half], z_t[:half])                         # (B/2, 3, H, W)
    x2 = x                                                         # the row thesis: half of them
    x_hyb = nets.G(z_s[other], z_t)                                # (B, 3, H, W)
    return full(x_rec), full(x_hyb), x2


def discriminator_loss(nets, x, args, rng):
    """What D and D_patch minimise (Sec. 4.4.8), on x (B, 3, H, W): L_D, L_Dpatch."""
    D, D_patch = nets.D, nets.D_patch
    with torch.no_grad():                                          # E and G are used as they are
        x_rec, x_hyb, x2 = rebuild_and_swap(nets, x)
    # CHOICE (code): both kinds of fakes weigh the same, though there are twice as many hybrids
    L_D = (non_saturating(D(x), True)                              # logits (B, 1)
           + 0.5 * non_saturating(D(x_rec), False)                 # (B/2, 1)
           + 0.5 * non_saturating(D(x_hyb), False))                # (B, 1)
    references = D_patch.features(crops(x2, args, rng))            # (B, 8, 1536), for both below
    real = D_patch.features(crops(x2, args, rng))                  # (B, 8, 1536)
    fake = D_patch.features(crops(x_hyb, args, rng))               # (B, 8, 1536)
    L_Dpatch = (non_saturating(D_patch(real, references), True)    # logits (B, 8)
                + non_saturating(D_patch(fake, references), False))
    return L_D, L_Dpatch


def r1_loss(nets, x, args, rng):
    """R1 (Mescheder et al. 2018) of D on x (B, 3, H, W), of D_patch on crops of x."""
    D, D_patch = nets.D, nets.D_patch
    queries = crops(x, args, rng).requires_grad_()                 # (B, 8, 3, 128, 128)
    references = crops(x, args, rng).requires_grad_()              # (B, 8, 3, 128, 128)
    x = x.detach().requires_grad_()
    R1 = squared_slope(D(x), x) / 2                                # Sec. 4.4.8, as in StyleGAN2
    logits = D_patch(D_patch.features(queries), D_patch.features(references))  # (B, 8)
    R1_patch = squared_slope(logits, queries, references) / 4      # CHOICE (code): half of that
    return R1, R1_patch


def generator_loss(nets, x, args, rng):
    """What E and G minimise, on x (B, 3, H, W): L_total, and its four terms by name."""
    D, D_patch = nets.D, nets.D_patch
    x_rec, x_hyb, x2 = rebuild_and_swap(nets, x)                   # (B/2, ...), (B, ...) twice
    L_rec = (x_rec - x[:len(x_rec)]).abs().mean()                  # Eq. (4.1); CHOICE: a mean
    L_GAN_rec = non_saturating(D(x_rec), True)                     # Eq. (4.2)
    L_GAN_swap = non_saturating(D(x_hyb), True)                    # Eq. (4.3)
    queries = D_patch.features(crops(x_hyb, args, rng))            # (B, 8, 1536)
    references = D_patch.features(crops(x2, args, rng))            # (B, 8, 1536), needs no graph
    L_Cooccur = non_saturating(D_patch(queries, references), True)  # Eq. (4.4)
    L_total = (args.lambda_rec * L_rec + args.lambda_GAN_rec * L_GAN_rec  # Sec. 4.3.4
               + args.lambda_GAN_swap * L_GAN_swap + args.lambda_cooccur * L_Cooccur)
    return L_total, {"L_rec": L_rec, "L_GAN_rec": L_GAN_rec, "L_GAN_swap": L_GAN_swap,
                     "L_Cooccur": L_Cooccur}


def train_step(nets, x_D, x_G, args, rng, step=0):
    """One update of D and D_patch on x_D, one of E and G on x_G, both (B, 3, H, W); losses by name.

    rng: CPU generator of the crops, the same in all processes.
    step: counts from 0; after every R1_every-th update of D comes one for R1 alone.
    """
    autocast = functools.partial(torch.autocast, x_D.device.type, torch.bfloat16, enabled=args.amp)

    # ---- D and D_patch: E and G are used as they are, without a graph -------------------------
    for net in (nets.D, nets.D_patch):
        net.requires_grad_(True)
    with autocast():
        L_D, L_Dpatch = discriminator_loss(nets, x_D, args, rng)
    nets.opt_D.zero_grad()
    (L_D + L_Dpatch).backward()
    nets.opt_D.step()
    losses = {"L_D": L_D, "L_Dpatch": L_Dpatch}

    # ---- R1, on the same pictures; CHOICE (code): an update of its own ------------------------
    if args.R1_every and (step + 1) % args.R1_every == 0:
        R1, R1_patch = r1_loss(nets, x_D, args, rng)
        nets.opt_D.zero_grad()
        (args.R1_every * (args.lambda_R1 * R1 + args.lambda_patch_R1 * R1_patch)).backward()
        nets.opt_D.step()
        losses |= {"R1": R1, "R1_patch": R1_patch}

    # ---- E and G: rebuild x, fool the new D, and keep the company of x^2's patches ------------
    for net in (nets.D, nets.D_patch):
        net.requires_grad_(False)
    with autocast():
        L_total, terms = generator_loss(nets, x_G, args, rng)
    nets.opt_G.zero_grad()
    L_total.backward()
    nets.opt_G.step()
    if args.ema:
        for mean, net in ((nets.E_ema, nets.E), (nets.G_ema, nets.G)):
            for p, new in zip(mean.parameters(), net.parameters(), strict=True):
                p.lerp_(new.detach(), 1 - args.ema)
    return losses | terms


# ==== 6. Training loop ========================================================================


def train(args):
    run = Run("swapae", args, CHANCE)
    root = data_folder(args)
    data = Pictures(root, args)
    total = args.steps or max(1, PICTURES // (2 * args.batch * run.world))
    show, kind = scored_pictures(root, args, run.device, limit=6)
    print(f"sample grids show {kind}")
    nets = build(args, run.device)
    run.resume_or_start(vars(nets))
    for step, (x_D, x_G) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(swap_grid(in_use(nets), show, show[:4], args))
        losses = train_step(nets, x_D, x_G, args, run.rng(), step)
        run.log({"R1": None, "R1_patch": None} | losses)  # so that every row has the latest
    run.save_samples(swap_grid(in_use(nets), show, show[:4], args))
    run.finish(truth_scores(in_use(nets), root, args, run.device) if args.data == "toy" else [])


# ==== 7. Translate, edit, evaluate ============================================================


def in_use(nets):
    """The E and G to translate with: the averaged ones of --ema, if there are any."""
    return SimpleNamespace(E=getattr(nets, "E_ema", nets.E), G=getattr(nets, "G_ema", nets.G))


@torch.no_grad()
def embed(nets, x, args):
    """x (B, 3, H, W) of any size, padded to whole cells and 7 of them -> z_s, z_t of E(x)."""
    (h, w), cell = x.shape[2:], nets.E.multiple
    right, bottom = (max(7 * cell, n + -n % cell) - n for n in (w, h))
    mode = "reflect" if right < w and bottom < h else "replicate"
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        z_s, z_t = nets.E(F.pad(x, (0, right, 0, bottom), mode=mode))
    return z_s.float(), z_t.float()


@torch.no_grad()
def paint(nets, z_s, z_t, args, size):
    """G(z_s, z_t) in [-1, 1], cut to size (H, W); one z_t serves any number of z_s.

    WHY a seeded generator: the noise stays the same from edit to edit, so only the edit shows.
    """
    rng = torch.Generator().manual_seed(args.seed)
    with torch.autocast(z_s.device.type, torch.bfloat16, enabled=args.amp):
        x = nets.G(z_s, z_t.expand(len(z_s), -1), rng)
    return x[:, :, :size[0], :size[1]].float().clamp(-1, 1)


def swap(nets, x1, x2, args, alpha=1.0):
    """The structure of x1 (B, 3, H, W) in the texture of x2 (1 or B, 3, H', W'), x1's size.

    alpha: how far to go from x1's own texture code (0) to that of x2 (1), Fig. 4.7.
    """
    z_s, z_t = embed(nets, x1, args)
    return paint(nets, z_s, z_t.lerp(embed(nets, x2, args)[1], alpha), args, x1.shape[2:])


# ---- Editing codes (Sec. 4.4.5, 4.4.6, 4.4.9): pure functions of tensors ------------------------


def attribute(z_plus, z_minus):
    """Two groups of texture codes (N, C), (M, C) -> the direction (1, C) from z_minus to z_plus."""
    return z_plus.mean(0, keepdim=True) - z_minus.mean(0, keepdim=True)


def principal_directions(codes, count):
    """Codes (N, C) -> directions (count, C) of length 1, strongest first, deviations (count).

    Their largest component is positive, so that a direction has one sign only.
    """
    centred = codes.cpu().double() - codes.cpu().double().mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    directions, values = directions[:count], values[:count] / math.sqrt(len(codes))
    sign = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    return (directions * sign).to(codes), values.to(codes)


def similarity_mask(z_s, row, column, least=0.5):
    """Cells whose structure has a cosine of `least` with that of cell (row, column): (B, 1, h, w)
    of 0 and 1. CHOICE: 0.5 (Sec. 4.4.6 has no number)."""
    z_s = normalised(z_s)
    cosine = (z_s * z_s[:, :, row:row + 1, column:column + 1]).sum(1, keepdim=True)
    return (cosine >= least).to(z_s)


def clone(z_s, source, box, to):
    """z_s (B, C, h, w) with the box (left, top, width, height) of source's cells put at `to`
    (left, top); what would leave either map is dropped."""
    (left, top, width, height), (x, y) = box, to
    width = max(0, min(width, source.shape[3] - left, z_s.shape[3] - x))
    height = max(0, min(height, source.shape[2] - top, z_s.shape[2] - y))
    z_s = z_s.clone()
    z_s[:, :, y:y + height, x:x + width] = source[:, :, top:top + height, left:left + width]
    return z_s


# ---- Commands -----------------------------------------------------------------------------------


def load_networks(args, device):
    """E and G from --weights: a checkpoint of this script, or the file of the authors."""
    expect(args.weights, "--weights FILE is needed: a last.pt of this script or the authors' file")
    state = common.load_file(args.weights)
    if isinstance(state, dict) and "method" in state:
        nets = in_use(build(args, torch.device("cpu")))
        ema = "_ema" if args.ema else ""
        common.load_parts(vars(nets), {k: state["parts"].get(k + ema) for k in "EG"}, args.weights)
    else:
        released = common.lab("released", "a file of the authors'")
        nets = SimpleNamespace(**dict(zip("EG", released.swapae(state, args.weights), strict=True)))
    nets.E.to(device).eval()
    nets.G.to(device).eval()
    return nets


def codes_of(nets, files, args, device):
    """Files -> z_s (N, C, h, w), z_t (N, C') of at most 1000 of them (code: 5000), at --size."""
    squares = middle_squares(files, args, "cpu").split(8)
    pairs = [embed(nets, x.to(device), args) for x in squares]
    return tuple(torch.cat(codes) for codes in zip(*pairs, strict=True))


def principal_edit(nets, args, device):
    """--pca K: one deviation along --data's K-th direction. Of texture codes: (1, C); of structure
    codes, for --mask: (1, C, 1, 1) of their places, or (1, C, h, w) of whole maps. CHOICE: of those
    no region (Sec. 4.4.9: the flattened code, masked by the user's)."""
    z_s, z_t = codes_of(nets, training_files(data_folder(args)), args, device)
    samples, shape = z_t, (1, -1)
    if args.mask == "all":
        samples, shape = z_s.flatten(1), (1, *z_s.shape[1:])
    elif args.mask:
        samples, shape = z_s.permute(0, 2, 3, 1).flatten(0, 2), (1, -1, 1, 1)
    most = min(samples.shape[1], len(samples) - 1)
    if not 1 <= args.pca <= most:
        raise UserError(f"--pca {args.pca}: {len(samples)} codes have directions 1 to {most}")
    directions, deviations = principal_directions(samples, args.pca)
    return (directions[-1] * deviations[-1]).view(shape)


def picture_at_side(path):
    """A picture (3, H, W) at the scale that --side gives to those that are translated."""
    im = common.open_rgb(path)
    return common.to_tensor(im.resize(common.at_side(im.size, path), Image.BICUBIC))


def mask_of(z_s, x, args, cell):
    """--mask -> (1, 1, h, w) over the cells of z_s, for the picture x (1, 3, H, W)."""
    (H, W), (h, w) = x.shape[2:], z_s.shape[2:]
    if args.mask == "all":
        if (h, w) != (args.size // cell,) * 2:
            raise UserError(f"--mask all: {W}x{H} pixels, but the map is of {args.size} each way")
        return torch.ones_like(z_s[:1, :1])
    if re.fullmatch(r"\d+,\d+", args.mask):
        column, row = map(int, args.mask.split(","))
        expect(row < H and column < W, f"--mask {args.mask}: outside of a picture of {W}x{H}")
        return similarity_mask(z_s, row // cell, column // cell)
    white = picture_at_side(args.mask).mean(0)[None, None] / 2 + 0.5
    if white.shape[2:] != (H, W):
        raise UserError(f"--mask {args.mask}: {white.shape[3]}x{white.shape[2]} pixels, but the "
                        f"picture has {W}x{H}")
    white = F.pad(white, (0, w * cell - W, 0, h * cell - H), mode="replicate")
    return F.avg_pool2d(white, cell).to(z_s)


def cells_of(pixels, source, z_s, cell):
    """--clone's X Y W H TO_X TO_Y -> ((left, top, width, height), (x, y)): all cells touched."""
    X, Y, W, H, to_X, to_Y = pixels
    left, top, x, y = (n // cell for n in (X, Y, to_X, to_Y))
    width, height = math.ceil((X + W) / cell) - left, math.ceil((Y + H) / cell) - top
    if (min(pixels) < 0 or 0 in pixels[2:4] or left >= source.shape[3] or top >= source.shape[2]
            or x >= z_s.shape[3] or y >= z_s.shape[2]):
        raise UserError(f"--clone {' '.join(map(str, pixels))}: expected X Y W H TO_X TO_Y, pixels "
                        f"inside the picture, W and H at least 1")
    return (left, top, width, height), (x, y)


def translate_files(args):
    """Edit --translate, a picture or a folder; several --alpha give strips (--clone has none)."""
    edits = args.clone or args.exemplar, args.vector, args.pca is not None
    if [*map(bool, edits)].count(True) != 1 or args.mask and args.pca is None:
        raise UserError("--translate needs one of --exemplar, --vector, --pca (perhaps with "
                        "--mask), --clone")
    device = common.pick_device(args.device)
    nets, exemplar, direction = load_networks(args, device), None, None
    if args.exemplar:
        exemplar = embed(nets, picture_at_side(args.exemplar)[None].to(device), args)
    if args.vector:
        direction = attribute(*(codes_of(nets, common.list_pictures(folder), args, device)[1]
                                for folder in args.vector))
    if args.pca is not None:
        direction = principal_edit(nets, args, device)

    def edited(x):
        x, cell = x.to(device), nets.E.multiple
        z_s, z_t = embed(nets, x, args)
        if args.clone:
            source = exemplar[0] if exemplar else z_s
            codes = [(clone(z_s, source, *cells_of(args.clone, source, z_s, cell)), z_t)]
        elif args.mask:
            mask = mask_of(z_s, x, args, cell)
            codes = [(z_s + alpha * mask * direction, z_t) for alpha in args.alpha]
        elif exemplar:
            codes = [(z_s, z_t.lerp(exemplar[1], alpha)) for alpha in args.alpha]
        else:
            codes = [(z_s, z_t + alpha * direction) for alpha in args.alpha]
        return torch.cat([paint(nets, *pair, args, x.shape[2:]) for pair in codes], dim=3)

    common.translate_files(args.translate, args.out or "translated", edited,
                           keep=[path for path in (args.exemplar, args.mask) if path])


def scored_pictures(root, args, device, limit=1000):
    """(N, 3, size, size) of --split, evenly spaced, and what they are. Where a folder has no test
    pictures they are training pictures, and are called so."""
    if files := find_pictures(root, args.split):
        return middle_squares(files, args, device, limit), f"{args.split} pictures"
    if args.split != "test":
        raise UserError(f"{root}: no {args.split} pictures; expected {LAYOUT}")
    return middle_squares(training_files(root), args, device, limit), "TRAINING pictures"


def structure_pictures(z_s, size):
    """z_s (N, C, h, w), places as colours: their three principal components, (N, 3, H, W)."""
    samples = z_s.permute(0, 2, 3, 1).flatten(0, 2)                        # (N h w, C)
    parts = samples @ principal_directions(samples, 3)[0].t()              # (N h w, 3)
    low, high = parts.amin(0), parts.amax(0)
    parts = F.pad((parts - low) / (high - low).clamp(min=1e-12), (0, 3 - parts.shape[1]), value=0.5)
    parts = parts.unflatten(0, (len(z_s), *z_s.shape[2:])).permute(0, 3, 1, 2)
    return F.interpolate(parts, tuple(size)) * 2 - 1


def swap_grid(nets, structures, textures, args):
    """Fig. 4.4 as columns: structures, their codes, reconstructions, a column per texture (top)."""
    (z_s, own), z_t = embed(nets, structures, args), embed(nets, textures, args)[1]
    blank, size = torch.ones_like(structures[:1]), structures.shape[2:]
    columns = {"structure": [blank, structures], "z_s": [blank, structure_pictures(z_s, size)],
               "own texture": [blank, paint(nets, z_s, own, args, size)]}
    for i, x2 in enumerate(textures):
        columns[f"texture {i + 1}"] = [x2[None], paint(nets, z_s, z_t[i:i + 1], args, size)]
    return {label: torch.cat(column) for label, column in columns.items()}


# ---- Scores (Sec. 4.4.2, 4.4.4, 4.4.10) ---------------------------------------------------------


def truth_scores(nets, root, args, device):
    """Scores of swaps against the toy world's true answers, and in which code an error sits."""
    def hybrid(x1, x2):  # arrays (N, 3, H, W)
        pairs = zip(torch.tensor(x1).split(8), torch.tensor(x2).split(8), strict=True)
        return torch.cat([swap(nets, p.to(device), q.to(device), args).cpu()
                          for p, q in pairs]).numpy()
    return common.lab("toy", "--data toy").swap_scores(Path(root), args.split, hybrid)


def evaluate(args):
    """Reconstruction, and both distances and FID of swaps of the test pictures."""
    device, metrics = common.pick_device(args.device), common.lab("metrics", "--evaluate")
    nets, root = load_networks(args, device), data_folder(args)
    scores = truth_scores(nets, root, args, device) if args.data == "toy" else []
    x, kind = scored_pictures(root, args, device)
    expect(len(x) > 1, f"--evaluate: two or more test pictures are needed in {root}")
    x2 = x.roll(-1 if args.data == "toy" else -(len(x) // 2), dims=0)  # neighbours may be frames
    x_rec = torch.cat([swap(nets, p, p, args) for p in x.split(1)])    # in its own texture
    x_hyb = torch.cat([swap(nets, p, q, args)
                       for p, q in zip(x.split(1), x2.split(1), strict=True)])
    scores += metrics.swap_scores(x, x2, x_rec, x_hyb, args.vgg, f"{len(x)} {kind}", device)
    common.print_scores(scores)
    if args.data != "toy" or args.fid_weights:  # last, because its network may have to be fetched
        value = metrics.fid(x_hyb.split(1), x.split(1), device, args.fid_weights)
        common.print_scores([{"name": f"FID of swaps ({len(x)} {kind}, 299x299)", "value": value,
                              "better": "lower"}])


# ==== 8. Main =================================================================================


def main(argv=None):
    args = get_args(argv)
    if args.translate:
        translate_files(args)
    elif args.evaluate:
        evaluate(args)
    else:
        train(args)


if __name__ == "__main__":
    common.entry(main)
