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
             (z_s, z_t) = E(x)     s, t = E(x)     (B, 8, H/16, W/16), (B, 2048)
             G(z_s, z_t)           G(s, t)         (B, 3, H, W)
             x^1, x^2              x[i ^ 1], x[i]  neighbours in the batch exchange structure
             D                     D               (B, 3, H, W) -> logits (B, 1)
             D_patch               P               references, queries -> logits (B, 8)
             crop, crops           random_crops    (B, 8, 3, 128, 128)

OBJECTIVE    Eq. (4.1)  L_rec(E, G) = E_x |x - G(E(x))|_1
             Eq. (4.2)  L_GAN,rec(E, G, D) = E_x -log D(G(E(x)))
             Eq. (4.3)  L_GAN,swap(E, G, D) = E_x1,x2 -log D(G(z_s^1, z_t^2))
             Eq. (4.4)  L_CooccurGAN(E, G, D_patch)
                                    = E_x1,x2 -log D_patch(crop(G(z_s^1, z_t^2)), crops(x^2))
             Sec. 4.3.4 L_total = L_rec + 0.5 L_GAN,rec + 0.5 L_GAN,swap + L_CooccurGAN

CHOICES      The default is the authors' released code; --follow thesis sets what the text says:
             N hybrids of a batch of N, weight 1 (text: N/2, weight 0.5; per picture the same).
             Two residual blocks before the upsampling ones (text: four, of unknown widths).
             Demodulation normalises style and weights each by itself (text: StyleGAN2's, jointly).
             Codes have unit length, at every place (text: no word of it).
             E's skips are padded by zeros (text: reflection or nothing, so that the texture code
             cannot know where it is).
             R1 of D_patch weighs a quarter, for gradients to both sets of crops (text: a half, as
             for D). D's Adam makes up for the extra R1 updates like StyleGAN2's (text: plain).
             Without a flag, as in the code: crops are resized to 128 pixels (a quarter of 512,
             which five halvings need); three hidden dense layers, then the logit; the structure
             code is scaled and shifted by the texture code before G's first block; L1 is a mean;
             no moving average of the weights (--ema has one); D and G see different batches.
             E blurs by [1, 2, 1], the others by [1, 3, 3, 1]. Settings: --setting 1024 trains
             768-pixel crops of narrower networks, as released (text: 1024 after 512).

USAGE        python swapae.py                                 # toy world, a score at the end
             python swapae.py --data photos/ --setting mountains
             python swapae.py --translate photo.jpg --exemplar texture.jpg --weights last.pt
             python -m lab.figures swapae grid --weights last.pt  # interpolate, pca, corruptions
EXPECT       python swapae.py: 2,200 steps, 18 minutes on one CPU core (0.48 s each). The colours of
             figures follow the texture picture by step 400, those of the ground later; rims and
             rings mostly stay with the structure. Swap error 32 grey levels of 255 (colour transfer
             35, the picture unchanged 52), reconstruction 13. D and P stay near 0.65, undecided.
"""

import argparse
import copy
import functools
import math
import random
import re
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
from common import Run, UserError

LAYOUT = "a folder of pictures, or one with train/ (and test/), or with trainA/ trainB/"

# =============================================================================================
# 1. Configuration
# =============================================================================================

SETTINGS = {  # what the authors ran, per data set (released launchers; Sec. 4.4.8)
    "256": {},
    "512": {"size": 512},
    "mountains": {"size": 512, "lambda_patch_R1": 10.0},
    "1024": {"size": 768, "load": 1024, "downs": 5, "texture": 1536, "patch": 256,
             "width_E": 0.4, "width_G": 0.8},
}
FOLLOW = {
    "code": {},
    "thesis": {"hybrids": "half", "lambda_gan_swap": 0.5, "base_blocks": 4, "code_norm": "none",
               "demodulation": "joint", "skip_padding": "reflect", "lazy_adam": False,
               "lambda_patch_R1": 2.0},  # which is the text's 1: `train_step` halves it
}
ABLATIONS = {"none": {}, "no-cooccurrence": {"lambda_cooccur": 0.0}}
# WHY: 64 pixels in 2,000 steps need other proportions than 256 in 1.6 million. A structure code of
# two channels cannot keep the colours, codes of mean square 1 modulate G strongly from the start
# (so the texture code is used at once), and D_patch must learn in this time, too. Averaged weights
# are steadier where the rate never falls.
TOY = {"size": 64, "batch": 4, "steps": 2200, "downs": 2, "structure": 2, "texture": 128,
       "code_norm": "rms", "noise": False, "width_E": 0.5, "width_G": 0.25, "width_D": 0.0625,
       "width_P": 0.25, "patch": 16, "crops": 4, "lambda_rec": 5.0, "lambda_patch_R1": 0.05,
       "ema": 0.99, "vgg": "random", "lpips": "vgg", "workers": 0, "sample_every": 200}


def get_args(argv=None):
    """Flags in layers: defaults < --setting < --follow < toy < --ablation < checkpoint < flags."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--setting", choices=list(SETTINGS), default="256", help="sizes and widths (Sec. 4.4.8)")
    add("--follow", choices=list(FOLLOW), default="code", help="where they differ, see CHOICES")
    add("--ablation", choices=list(ABLATIONS), default="none", help="train without D_patch")
    add("--size", type=int, default=256, help="training crop, sides in pixels (Sec. 4.4.8)")
    add("--load", type=int, default=None, help="the short side is resized to this (--size)")
    add("--batch", type=int, default=16, help="pictures per update and process, even (4.4.8: 64)")
    add("--images", type=int, default=25_000_000, help="pictures shown to D and G together (code)")
    add("--steps", type=int, default=None, help="pairs of updates, D then G; overrides --images")
    add("--lr", type=float, default=2e-3, help="Adam's rate (Sec. 4.4.8)")
    add("--beta1", type=float, default=0.0, help="Adam's first decay (Sec. 4.4.8)")
    add("--beta2", type=float, default=0.99, help="Adam's second decay (Sec. 4.4.8)")
    add("--lazy-adam", action=switch, default=True, help="D's Adam allows for R1 (StyleGAN2)")
    add("--downs", type=int, default=4, help="halvings from picture to structure (Sec. 4.4.7)")
    add("--structure", type=int, default=8, help="channels of the structure code (Sec. 4.4.7)")
    add("--texture", type=int, default=2048, help="length of the texture code (Sec. 4.4.7)")
    add("--base-blocks", type=int, default=2, help="G's blocks before upsampling (Sec. 4.4.7: 4)")
    for net, what in (("E", "from 32"), ("G", "from 512"), ("D", "up to 512"), ("P", "up to 384")):
        add(f"--width-{net}", type=float, default=1.0, help=f"factor on {net}'s widths, {what}")
    add("--demodulation", choices=["apart", "joint"], default="apart", help="see `StyledConv`")
    add("--code-norm", choices=["unit", "rms", "none"], default="unit",
        help="codes get length 1, or mean square 1 (learns faster), or stay as they are")
    add("--skip-padding", choices=["zero", "reflect"], default="zero", help="of E's skips")
    add("--noise", action=switch, default=True, help="noise injection in G (Sec. 4.4.7)")
    add("--hybrids", choices=["all", "half"], default="all",
        help="of every picture, or the second half (4.4.8), with --lambda-gan-swap 0.5")
    add("--lambda-rec", type=float, default=1.0, help="weight of Eq. (4.1) (Sec. 4.3.4)")
    add("--lambda-gan-rec", type=float, default=0.5, help="weight of Eq. (4.2) (Sec. 4.3.4)")
    add("--lambda-gan-swap", type=float, default=1.0, help="weight of Eq. (4.3) (4.3.4: 0.5)")
    add("--lambda-cooccur", type=float, default=1.0, help="weight of Eq. (4.4) (Sec. 4.3.4)")
    add("--lambda-R1", type=float, default=10.0, help="R1 penalty of D (Sec. 4.4.8)")
    add("--lambda-patch-R1", type=float, default=1.0, help="R1 penalty of P (Sec. 4.4.8)")
    add("--R1-every", type=int, default=16, help="D updates per R1 update; 0: no R1 (StyleGAN2)")
    add("--crops", type=int, default=8, help="patches per picture (Sec. 4.4.8)")
    add("--crop", type=float, nargs=2, default=[1 / 8, 1 / 4], metavar="SHARE",
        help="a patch's sides, as shares of the picture's (Sec. 4.3.3; Fig. 4.6 varies them)")
    add("--patch", type=int, default=128, help="patches are resized to this square, in pixels")
    add("--aggregate", action=switch, default=True, help="average the references' features")
    add("--ema", type=float, default=0.0, help="decay of averaged E and G for use; 0: none")
    add("--exemplar", default=None, metavar="PATH",
        help="--translate: whose texture; a picture or a folder (with --clone: whose structure)")
    add("--alpha", type=float, nargs="+", default=[1.0], help="how far to go to its texture code")
    add("--vector", nargs=2, default=None, metavar="FOLDER",
        help="--translate: add the mean texture code of the first less that of the second")
    add("--pca", type=int, default=None, metavar="K",
        help="--translate: move along --data's K-th principal direction, in deviations")
    add("--mask", default=None, metavar="FILE|X,Y",
        help="--pca: of the structure code, where a picture is white, or similar to pixel X,Y")
    add("--similar", type=float, default=0.5, help="--mask X,Y: least cosine similarity")
    add("--gain", type=float, nargs="+", default=[1.0], help="factors of --vector or --pca")
    add("--clone", type=int, nargs=6, default=None, metavar="PX",
        help="--translate: copy structure from the box X Y W H to TO_X TO_Y")
    add("--vgg", choices=["imagenet", "random"], default="imagenet",
        help="VGG and Inception of the metrics: torchvision's weights, or a random stand-in")
    add("--lpips", choices=["alex", "vgg"], default="alex",
        help="--evaluate: LPIPS, or unweighted distances of --vgg's features")
    add("--fid-weights", default=None, metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        return (SETTINGS[args.setting] | FOLLOW[args.follow] | (TOY if args.data == "toy" else {})
                | ABLATIONS.get(args.ablation, {}))

    args = common.parse_flags(p, argv, "swapae", presets, run_name)
    least, cells = 7 * 2 ** args.downs, 4 * args.size / 2 ** round(math.log2(max(args.size, 1)))
    if args.size < least or args.size % 2 ** args.downs or cells % 1:
        raise UserError(f"--size {args.size}: must be at least {least}, a multiple of "
                        f"{2 ** args.downs}, and shrink to whole places in D (like 128, 192, 256)")
    if args.batch % 2:
        raise UserError(f"--batch {args.batch}: must be even, because neighbours are swapped")
    if args.load and args.load < args.size:
        raise UserError(f"--load {args.load}: must be at least --size {args.size}")
    if args.patch < 8 or args.patch & (args.patch - 1):
        raise UserError(f"--patch {args.patch}: must be a power of two, 8 at least")
    if not 0 < args.crop[0] <= args.crop[1] <= 1:
        raise UserError(f"--crop {args.crop[0]} {args.crop[1]}: expected two shares of a side, the "
                        "smaller one first")
    if args.crops < 1 or args.downs < 1 or args.base_blocks < 1 or args.R1_every < 0:
        raise UserError("--crops, --downs, --base-blocks: must be at least 1; --R1-every: 0")
    for net, low in (("E", 1 / 32), ("G", 1 / 64), ("D", 1 / 64), ("P", 1 / 64)):
        if getattr(args, f"width_{net}") < low:
            raise UserError(f"--width-{net} {getattr(args, f'width_{net}')}: at least {low}")
    if not 0 <= args.ema < 1:
        raise UserError(f"--ema {args.ema}: must lie between 0 and 1")
    if args.clone and (min(args.clone) < 0 or 0 in args.clone[2:4]):
        raise UserError("--clone X Y W H TO_X TO_Y: pixels from 0 on, W and H at least 1")
    if not args.translate:
        for name in ("exemplar", "vector", "pca", "clone", "mask"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name}: needs --translate PATH")
    return args


def run_name(args):
    ablation = "" if args.ablation == "none" else f"-{args.ablation}"
    return f"swapae-{Path(args.data).name}{ablation}"


# =============================================================================================
# 2. Networks
# =============================================================================================
# StyleGAN2's parts, in plain PyTorch. Two habits keep them fast without changing a number. Filters
# are depthwise convolutions, and at stride 2 where only every second place is read. Constant gains
# (sqrt 2 after leaky ReLU, 1/sqrt 2 of a residual sum) multiply the small weights, not the large
# maps, which leaky ReLU allows because it commutes with positive factors. D and P are linear but
# for leaky ReLU, so R1 can differentiate twice.


class EqualConv(nn.Module):
    """Convolution with run-time weight scale 1/sqrt(fan-in); maybe bias, leaky ReLU, gain sqrt 2.

    (B, a, H, W) -> (B, b, ...). pad: zeros, or mirrored pixels with `reflect`. `gain` of forward
    multiplies the result.
    """

    def __init__(self, a, b, kernel, stride=1, pad=0, reflect=False, activate=True, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(b)) if bias else None
        self.stride, self.pad, self.reflect, self.activate = stride, pad, reflect, activate

    def forward(self, x, gain=1.0):
        gain = gain * math.sqrt(2) if self.activate else gain
        if self.reflect:
            x = F.pad(x, (self.pad,) * 4, mode="reflect")
        x = F.conv2d(x, self.weight * (gain * self.weight[0].numel() ** -0.5),
                     None if self.bias is None else self.bias * gain, self.stride,
                     0 if self.reflect else self.pad)
        return F.leaky_relu_(x, 0.2) if self.activate else x  # in place: a map less to keep


class EqualLinear(nn.Module):
    """The same for vectors: (..., a) -> (..., b); the bias starts at `start`."""

    def __init__(self, a, b, activate=False, start=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a))
        self.bias = nn.Parameter(torch.full((b,), start))
        self.activate = activate

    def forward(self, x):
        gain = math.sqrt(2) if self.activate else 1.0
        x = F.linear(x, self.weight * (gain * self.weight.shape[1] ** -0.5), self.bias * gain)
        return F.leaky_relu_(x, 0.2) if self.activate else x


class Blur(nn.Module):
    """Pads (low, high), then filters by taps x taps / sum^2 at every `stride`; times `gain`.

    (B, C, H, W) -> (B, C, (H + low + high - taps) // stride + 1, ...). WHY depthwise: the same
    numbers as one-channel convolutions over B * C pictures, which the authors use, at a tenth of
    the time.
    """

    def __init__(self, channels, taps, pad, stride=1, gain=1.0, reflect=False):
        super().__init__()
        row = torch.tensor(taps) / sum(taps)
        self.register_buffer("kernel", gain * torch.outer(row, row).repeat(channels, 1, 1, 1),
                             persistent=False)
        self.pad, self.stride, self.reflect = pad, stride, reflect

    def forward(self, x):
        (low, high), C = self.pad, x.shape[1]
        if low == high and not self.reflect:
            return F.conv2d(x, self.kernel, None, self.stride, low, groups=C)
        x = F.pad(x, (low, high, low, high), mode="reflect" if self.reflect else "constant")
        return F.conv2d(x, self.kernel, None, self.stride, groups=C)


HALF = math.sqrt(0.5)  # gain of both branches of a residual sum, which keeps its variance


class DownBlock(nn.Module):
    """StyleGAN2's residual block at half the size: (B, a, H, W) -> (B, b, H/2, W/2).

    D and P: zero padding, [1, 3, 3, 1]. E (`reflect`): mirrored pixels, [1, 2, 1]; CHOICE (code):
    but for its skip, where `skip_reflect` says which.
    """

    def __init__(self, a, b, reflect=False, skip_reflect=False):
        super().__init__()
        taps, main, skip = (([1.0, 2.0, 1.0], (2, 1), (1, 0)) if reflect else
                            ([1.0, 3.0, 3.0, 1.0], (2, 2), (1, 1)))
        self.conv1 = EqualConv(a, a, 3, pad=1, reflect=reflect)
        self.blur = Blur(a, taps, main, reflect=reflect)                   # (B, a, H+1, W+1)
        self.conv2 = EqualConv(a, b, 3, stride=2)
        # WHY stride in the blur: a 1x1 convolution with stride 2 reads only every second place.
        self.skip_blur = Blur(a, taps, skip, stride=2, reflect=skip_reflect)
        self.skip = EqualConv(a, b, 1, activate=False, bias=False)

    def forward(self, x):
        main = self.conv2(self.blur(self.conv1(x)), HALF)
        return self.skip(self.skip_blur(x), HALF).add_(main)


class FlatBlock(nn.Module):
    """The same at full size, P's last one: (B, a, H, W) -> (B, b, H, W)."""

    def __init__(self, a, b):
        super().__init__()
        self.conv1 = EqualConv(a, a, 3, pad=1)
        self.conv2 = EqualConv(a, b, 3, pad=1)
        self.skip = EqualConv(a, b, 1, activate=False, bias=False)

    def forward(self, x):
        return self.skip(x, HALF).add_(self.conv2(self.conv1(x), HALF))


def normalised(code, how="unit"):
    """Vectors along dimension 1 -> the same with length 1 (unit) or mean square 1 (rms)."""
    if how == "none":
        return code
    size = code.square().sum(1, keepdim=True) / (1 if how == "unit" else code.shape[1])
    return code * (size + 1e-8).rsqrt()


class Encoder(nn.Module):
    """E: x (B, 3, H, W) -> structure (B, 8, H/16, W/16), texture (B, 2048) (Sec. 4.4.7).

    widths: of `from_rgb`, of each of the `downs` halvings, of the two convolutions that lead to
    the texture code; 30.58 M parameters. H and W need 7 * 2^downs pixels, 112; what does not fill
    a cell of 16 pixels is left out at the right and at the bottom.
    """

    def __init__(self, widths, downs=4, structure=8, texture=2048, norm="unit", skip_reflect=False):
        super().__init__()
        self.norm, self.multiple, c = norm, 2 ** downs, widths[downs]
        pairs = list(zip(widths, widths[1:], strict=False))
        self.from_rgb = EqualConv(3, widths[0], 1)
        self.down = nn.ModuleList(DownBlock(a, b, True, skip_reflect) for a, b in pairs[:downs])
        self.to_structure = nn.Sequential(EqualConv(c, c, 1),
                                          EqualConv(c, structure, 1, activate=False))
        # No padding here, then the average over all places: the texture code knows of none.
        self.pool = nn.Sequential(*[EqualConv(a, b, 3, stride=2) for a, b in pairs[downs:]])
        self.to_texture = EqualLinear(widths[-1], texture)

    def forward(self, x):
        x = self.from_rgb(x)
        for block in self.down:
            x = block(x)                                                   # (B, 512, H/16, W/16)
        s = self.to_structure(x)                                           # (B, 8, H/16, W/16)
        t = self.to_texture(self.pool(x).mean((2, 3)))                     # (B, 2048)
        return normalised(s, self.norm), normalised(t, self.norm)          # CHOICE (code): unit


class StyledConv(nn.Module):
    """Convolution modulated by the texture code, then noise, bias, leaky ReLU, gain sqrt 2.

    x (B, a, H, W), t (B, texture) -> (B, b, H, W), or (B, b, 2H, 2W) with `up`. A linear layer
    makes a scale s of every input channel from t. Demodulation keeps the variance at 1:
    joint   StyleGAN2: each output channel is divided by the length of its weights times s.
    apart   CHOICE (code): s is brought to a mean square of 1, the weights to unit length.
    none    for the RGB layer, which has neither noise nor leaky ReLU.
    WHY scaled maps instead of weights for each picture: the same product, as one convolution.
    """

    def __init__(self, a, b, texture, kernel=3, up=False, demodulation="apart", noise=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, kernel, kernel))
        self.noise = nn.Parameter(torch.zeros(1)) if noise else None
        self.bias = nn.Parameter(torch.zeros(b))
        self.style = EqualLinear(texture, a, start=1.0)
        self.blur = Blur(b, [1.0, 3.0, 3.0, 1.0], (1, 1), gain=4.0) if up else None
        self.demodulation = demodulation

    def forward(self, x, t, gain=1.0, rng=None):
        """rng: CPU generator of noise that is the same for all pictures; None: fresh noise."""
        activate = self.demodulation != "none"
        gain = gain * math.sqrt(2) if activate else gain
        s, weight = self.style(t), self.weight * self.weight[0].numel() ** -0.5
        if self.demodulation == "apart":
            s = s * (s.square().mean(1, keepdim=True) + 1e-8).rsqrt()
            weight = weight * (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        x = x * s[:, :, None, None]
        if self.blur is None:
            x = F.conv2d(x, weight * gain, None, 1, weight.shape[-1] // 2)
        else:
            x = F.conv_transpose2d(x, (weight * gain).transpose(0, 1), None, 2)  # (B, b, 2H+1, ...)
            x = self.blur(x)                                                     # (B, b, 2H, 2W)
        if self.demodulation == "joint":
            length = s.square() @ weight.square().sum((2, 3)).t()                # (B, b)
            x = x * (length + 1e-8).rsqrt()[:, :, None, None]
        shift = (self.bias * gain).view(1, -1, 1, 1)
        if self.noise is not None:
            noise = (torch.randn_like(x[:, :1]) if rng is None else
                     torch.randn(1, 1, *x.shape[2:], generator=rng).to(x))
            shift = shift + noise * (self.noise * gain)
        x = x + shift
        return F.leaky_relu_(x, 0.2) if activate else x


class StyledBlock(nn.Module):
    """G's residual block: (B, a, H, W) -> (B, b, H, W), or (B, b, 2H, 2W) with `up`.

    CHOICE (code): the skip of an upsampling block that changes its width has a bias and leaky
    ReLU; it is upsampled bilinearly, which is the blur of the main branch but for the border.
    """

    def __init__(self, a, b, texture, up=False, **options):
        super().__init__()
        self.up = up
        self.conv1 = StyledConv(a, b, texture, up=up, **options)
        self.conv2 = StyledConv(b, b, texture, **options)
        self.skip = EqualConv(a, b, 1, activate=up, bias=up) if a != b or not up else None

    def forward(self, x, t, rng=None):
        skip = x * HALF if self.skip is None else self.skip(x, HALF)
        if self.up:
            skip = F.interpolate(skip, scale_factor=2.0, mode="bilinear")
        return skip.add_(self.conv2(self.conv1(x, t, rng=rng), t, HALF, rng))


class Generator(nn.Module):
    """G: structure (B, 8, h, w), texture (B, 2048) -> (B, 3, 16h, 16w) (Sec. 4.4.7).

    head, up: widths of the blocks before upsampling, and of those that upsample; 25.06 M
    parameters. The last layer is linear and unbounded.
    """

    def __init__(self, head, up, structure=8, texture=2048, norm="unit", demodulation="apart",
                 noise=True):
        super().__init__()
        self.norm, widths = norm, [structure, *head, *up]
        options = {"demodulation": demodulation, "noise": noise}
        self.scale, self.shift = (EqualLinear(texture, structure) for _ in range(2))
        self.blocks = nn.ModuleList(
            StyledBlock(a, b, texture, up=i >= len(head), **options)
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)))
        self.to_rgb = StyledConv(widths[-1], 3, texture, 1, demodulation="none", noise=False)

    def forward(self, s, t, rng=None):
        """rng: see `StyledConv`."""
        # again, because an edited code has another length
        s, t = normalised(s, self.norm), normalised(t, self.norm)
        x = s * self.scale(t)[:, :, None, None] + self.shift(t)[:, :, None, None]
        for block in self.blocks:
            x = block(x, t, rng)                                           # (B, 128, 16h, 16w)
        return self.to_rgb(x, t)


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
        self.down = nn.Sequential(*[DownBlock(a, b) for a, b in
                                    zip(widths, widths[1:], strict=False)])
        self.last = EqualConv(last, last, 3, pad=1)                        # (B, 512, 4, 4)
        self.dense = nn.Sequential(EqualLinear(last * cells, last, activate=True),
                                   EqualLinear(last, 1))

    def forward(self, x):
        return self.dense(self.last(self.down(self.from_rgb(x))).flatten(1))


class PatchDiscriminator(nn.Module):
    """P: are queries and references patches of one picture? (Fig. 4.10); 24.52 M parameters.

    `features`: (B, T, 3, patch, patch) -> (B, T, 1536); `compare`: two of these -> logits (B, T).
    """

    def __init__(self, patch=128, width=1.0, aggregate=True):
        super().__init__()
        self.aggregate = aggregate
        widths = [int(min(384, 2 ** (12 - i)) * width)
                  for i in range(round(math.log2(patch)), 1, -1)]
        last = widths[-1]
        self.from_rgb = EqualConv(3, widths[0], 3, pad=1)
        self.down = nn.Sequential(*[DownBlock(a, b) for a, b in
                                    zip(widths, widths[1:], strict=False)])
        self.block = FlatBlock(last, 2 * last)                             # (B T, 768, 4, 4)
        self.last = EqualConv(2 * last, last, 3)                           # (B T, 384, 2, 2)
        units = [2 * 4 * last, *(int(n * width) for n in (2048, 2048, 1024)), 1]
        self.dense = nn.Sequential(*[EqualLinear(a, b, activate=b > 1) for a, b in
                                     zip(units, units[1:], strict=False)])

    def features(self, patches):
        x = self.block(self.down(self.from_rgb(patches.flatten(0, 1))))
        return self.last(x).flatten(1).unflatten(0, patches.shape[:2])

    def compare(self, references, queries):
        if self.aggregate:  # Sec. 4.4.8; if not, query j is compared with reference j alone
            references = references.mean(1, keepdim=True).expand_as(queries)
        return self.dense(torch.cat([references, queries], dim=2)).squeeze(2)


def encoder(args):
    widths = [min(args.texture, round(32 * 2 ** i * args.width_E)) for i in range(args.downs + 3)]
    return Encoder(widths, args.downs, args.structure, args.texture, args.code_norm,
                   args.skip_padding == "reflect")


def generator(args):
    up = [int(min(512, 128 * 2 ** (args.downs - i)) * args.width_G) for i in range(args.downs + 1)]
    head = [max(args.structure, round((i + 1) / args.base_blocks * up[0]))
            for i in range(args.base_blocks)]
    return Generator(head, up[1:], args.structure, args.texture, args.code_norm,
                     args.demodulation, args.noise)


def build(args, device):
    """E, G, D, P, their two Adams and, with --ema, the averaged E and G."""
    torch.manual_seed(args.seed)
    m = SimpleNamespace(E=encoder(args), G=generator(args),
                        D=Discriminator(args.size, args.width_D),
                        P=PatchDiscriminator(args.patch, args.width_P, args.aggregate))
    for net in vars(m).values():
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
    if args.ema:
        m.E_ema, m.G_ema = (copy.deepcopy(net).requires_grad_(False) for net in (m.E, m.G))
    adam = functools.partial(torch.optim.Adam, fused=device.type in ("cuda", "cpu"))
    m.opt_G = adam([*m.E.parameters(), *m.G.parameters()], args.lr, (args.beta1, args.beta2))
    # CHOICE (StyleGAN2, code): R1 adds an update to every 16, so each counts as 16/17 of one.
    c = args.R1_every / (args.R1_every + 1) if args.lazy_adam and args.R1_every else 1.0
    m.opt_D = adam([*m.D.parameters(), *m.P.parameters()], args.lr * c,
                   (args.beta1 ** c, args.beta2 ** c))
    if args.compile:  # WHY not D and P: R1 differentiates them twice, compiled code only once
        m.E.forward, m.G.forward = torch.compile(m.E.forward), torch.compile(m.G.forward)
    return m


# =============================================================================================
# 3. Losses
# =============================================================================================


def non_saturating(logits, real):
    """-log D or -log D_patch of logits (B, ...) if `real`, else -log(1 - D); the mean."""
    logits = common.full(logits)
    return F.softplus(-logits if real else logits).mean()                 # Eqs. (4.2) to (4.4)


def random_crops(x, args, rng):
    """crops of Eq. (4.4): (B, 3, H, W) -> (B, crops, 3, patch, patch); rng: CPU generator.

    Width and height are drawn one by one from --crop, the place and a mirror at random; each patch
    is resized bilinearly. CHOICE (code): samples reach from edge to edge of the patch, so at the
    picture's border half a pixel is blended with zero.
    """
    n, (low, high), side = len(x) * args.crops, args.crop, args.patch
    mirror = 1 - 2 * (torch.rand(n, generator=rng) < 0.5).float()
    sides = low + (high - low) * torch.rand(n, 2, generator=rng)           # width, height
    middle = (2 * torch.rand(n, 2, generator=rng) - 1) * (1 - sides)       # in [-1, 1]
    across = torch.linspace(-1, 1, side)
    columns = middle[:, :1] + across * (sides[:, 0] * mirror)[:, None]     # (n, side)
    rows = middle[:, 1:] + across * sides[:, 1:]
    grid = torch.stack([columns[:, None].expand(-1, side, -1),
                        rows[:, :, None].expand(-1, -1, side)], dim=3)     # (n, side, side, 2)
    # All patches of a picture are one tall picture, so that the picture need not be repeated.
    tall = F.grid_sample(x, grid.view(len(x), -1, side, 2).to(x), align_corners=False)
    return tall.unflatten(2, (args.crops, side)).transpose(1, 2)


def r1_penalty(logits, *inputs):
    """R1 (Mescheder et al. 2018): mean over pictures of |d logits / d input|^2 / 2, summed over
    inputs (B, ...) that need a graph."""
    grads = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return sum(grad.square().flatten(1).sum(1).mean() / 2 for grad in grads)


# =============================================================================================
# 4. Data
# =============================================================================================


def find_pictures(root, split):
    """Files of root/SPLIT, or of root/SPLITA and root/SPLITB together; [] if there are none."""
    for names in ([split], [f"{split}A", f"{split}B"]):
        if all((Path(root) / name).is_dir() for name in names):
            return [f for name in names for f in common.list_pictures(Path(root) / name)]
    return []


def training_files(root):
    """The pictures of train/, trainA/ and trainB/, or of the folder itself; `UserError`."""
    files = find_pictures(root, "train") or common.list_pictures(root)
    if len(files) < 2:
        raise UserError(f"{root}: one picture, but swapping needs two; expected {LAYOUT}")
    return files


def test_files(root, split):
    """The pictures of that split; where there is no test split, the training ones, and a line."""
    if files := find_pictures(root, split):
        return files
    if split != "test":
        raise UserError(f"{root}: no {split} pictures; expected {LAYOUT}")
    print(f"{root} has no test pictures: these are training pictures")
    return training_files(root)


def resized(file, args, rng=None):
    """The short side becomes --load; then a square of --size, in the middle or drawn by `rng`.

    -> (3, size, size) in [-1, 1]. With rng, half of them are mirrored (CHOICE: code).
    """
    im, size = common.open_rgb(file), args.size
    zoom = (args.load or size) / min(im.size)
    w, h = (max(size, round(side * zoom)) for side in im.size)
    place = rng.random() if rng else 0.5, rng.random() if rng else 0.5
    left, top = round((w - size) * place[0]), round((h - size) * place[1])
    im = im.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))
    if rng and rng.random() < 0.5:
        im = im.transpose(Image.FLIP_LEFT_RIGHT)
    return common.to_tensor(im)


class Pictures(torch.utils.data.Dataset):
    """`self[n]`: the n-th sample of the run, one picture for D's update and one for G's.

    Walks through a new shuffle of the files every epoch; depends on (seed, n) alone. Where an
    epoch ends inside a batch, a picture can meet itself, which is common only in tiny folders.
    """

    def __init__(self, root, args):
        self.files, self.args = training_files(root), args

    def __getitem__(self, n):
        return tuple(self.picture(2 * n + i) for i in (0, 1))

    def picture(self, n):
        epoch, i = divmod(n, len(self.files))
        order = common.shuffled(len(self.files), common.mix(self.args.seed, "epoch", epoch))
        rng = random.Random(common.mix(self.args.seed, n))
        return resized(self.files[order[i]], self.args, rng)

    def __len__(self):
        return len(self.files)


# =============================================================================================
# 5. One training step
# =============================================================================================


def rebuild_and_swap(m, x, args):
    """x (B, 3, H, W) -> rec (B/2), mix (B, or B/2 with --hybrids half), owners of mix's textures.

    rec[i] = G(s_i, t_i) for the first half; mix[i] = G(s_(i xor 1), t_i): neighbours exchange
    structure, so mix[i] must carry the texture of x[i]. One pass of E serves both, one of G too.
    """
    half, hybrids = len(x) // 2, len(x) if args.hybrids == "all" else len(x) // 2
    s, t = m.E(x)
    swapped = s.unflatten(0, (half, 2)).flip(1).flatten(0, 1)
    s, t = torch.cat([s[:half], swapped[-hybrids:]]), torch.cat([t[:half], t[-hybrids:]])
    rec, mix = common.full(m.G(s, t)).split([half, hybrids])
    return rec, mix, x[-hybrids:]


def train_step(m, x_D, x_G, args, rng, step=0):
    """One update of D and P on x_D, one of E and G on x_G, both (B, 3, H, W); losses by name.

    rng: CPU generator of the crops, the same in all processes.
    step: counts from 0; every --R1-every-th step has an R1 update of D and P between the two.
    """
    losses, gan = {}, non_saturating
    autocast = functools.partial(torch.autocast, x_D.device.type, torch.bfloat16, enabled=args.amp)
    cooccur = args.lambda_cooccur > 0

    # ---- D and P: E and G are used as they are, without a graph --------------------------------
    with autocast(), torch.no_grad():
        rec, mix, owners = rebuild_and_swap(m, x_D, args)
    m.opt_D.zero_grad(set_to_none=True)
    with autocast():  # no layer of D mixes pictures, so all can share one pass
        real, fake_rec, fake_mix = m.D(torch.cat([x_D, rec, mix])).split(
            [len(x_D), len(rec), len(mix)])
    losses |= {"D_real": gan(real, True), "D_rec": gan(fake_rec, False),
               "D_mix": gan(fake_mix, False)}
    # CHOICE (code): both kinds of fakes weigh the same, though there are twice as many hybrids.
    (losses["D_real"] + 0.5 * losses["D_rec"] + 0.5 * losses["D_mix"]).backward()
    if cooccur:  # the same references serve the real pair and the fake one
        with autocast():
            patches = torch.cat([random_crops(p, args, rng) for p in (owners, owners, mix)])
            references, real, fake = m.P.features(patches).chunk(3)
            losses["P_real"] = gan(m.P.compare(references, real), True)
            losses["P_mix"] = gan(m.P.compare(references, fake), False)
        (losses["P_real"] + losses["P_mix"]).backward()
    m.opt_D.step()

    # ---- R1, on the same pictures; CHOICE (code): an update of its own -------------------------
    if args.R1_every and (step + 1) % args.R1_every == 0:
        m.opt_D.zero_grad(set_to_none=True)
        x = x_D.detach().requires_grad_()
        losses["R1"] = r1_penalty(m.D(x), x)
        (args.R1_every * args.lambda_R1 * losses["R1"]).backward()
        if cooccur:
            references, queries = (random_crops(owners, args, rng).requires_grad_() for _ in "rq")
            logits = m.P.compare(m.P.features(references), m.P.features(queries))
            losses["R1_P"] = 0.5 * r1_penalty(logits, references, queries)  # CHOICE (code): 0.5
            (args.R1_every * args.lambda_patch_R1 * losses["R1_P"]).backward()
        m.opt_D.step()

    # ---- E and G --------------------------------------------------------------------------------
    with autocast():
        rec, mix, owners = rebuild_and_swap(m, x_G, args)
    losses["rec"] = (rec - x_G[:len(rec)]).abs().mean()                       # Eq. (4.1)
    with autocast():
        fooled_rec, fooled_mix = m.D(torch.cat([rec, mix])).split([len(rec), len(mix)])
    losses["GAN_rec"] = gan(fooled_rec, True)                                 # Eq. (4.2)
    losses["GAN_swap"] = gan(fooled_mix, True)                                # Eq. (4.3)
    # WHY stop at the pictures: D's and P's weights must get no gradient here, and the maps of one
    # are freed before the other makes its own. The last lines hand the gradient on to E and G.
    grad_rec, grad_mix = torch.autograd.grad(
        args.lambda_gan_rec * losses["GAN_rec"] + args.lambda_gan_swap * losses["GAN_swap"],
        [rec, mix])
    if cooccur:
        with autocast():
            with torch.no_grad():
                references = m.P.features(random_crops(owners, args, rng))
            queries = m.P.features(random_crops(mix, args, rng))
            losses["cooccur"] = gan(m.P.compare(references, queries), True)   # Eq. (4.4)
        grad_mix = grad_mix + torch.autograd.grad(args.lambda_cooccur * losses["cooccur"], mix)[0]
    m.opt_G.zero_grad(set_to_none=True)
    torch.autograd.backward([args.lambda_rec * losses["rec"], rec, mix],      # Sec. 4.3.4, L_total
                            [None, grad_rec, grad_mix])
    m.opt_G.step()
    if args.ema:
        for name in "EG":
            nets = getattr(m, f"{name}_ema"), getattr(m, name)
            for mean, new in zip(*(net.parameters() for net in nets), strict=True):
                mean.lerp_(new.detach(), 1 - args.ema)
    return {name: loss.detach() for name, loss in losses.items()}


# =============================================================================================
# 6. Training loop
# =============================================================================================


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("textures", args.size)

    return common.find_data(args.data, LAYOUT, {}, draw_toy)


def train(args):
    run = Run("swapae", args)
    root = data_folder(args)
    data = Pictures(root, args)
    total = args.steps or max(1, args.images // (2 * args.batch * run.world))
    show = test_pictures(root, args, run.device, limit=6)
    m = build(args, run.device)
    run.resume_or_start(vars(m))
    if args.data == "toy":
        preset = ", ".join(f"{k} {v}" for k, v in TOY.items())
        print(f"toy preset instead of the paper's settings: {preset}")
    r1 = {}  # of the latest R1 update, so that every row of the log has these columns
    if args.R1_every:
        r1 = dict.fromkeys(["R1", "R1_P"][:2 if args.lambda_cooccur else 1], torch.zeros(()))
    for step, (x_D, x_G) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(swap_grid(in_use(m), show, show[:5], args))
        losses = train_step(m, x_D, x_G, args, run.rng(), step)
        r1 |= {name: losses.pop(name) for name in r1 if name in losses}
        run.log(losses | r1)
    run.save_samples(swap_grid(in_use(m), show, show[:5], args))
    run.finish(truth_scores(in_use(m), root, args, run.device) if args.data == "toy" else [])


# =============================================================================================
# 7. Translate, edit, evaluate
# =============================================================================================


def in_use(m):
    """The E and G to translate with: the averaged ones of --ema, if there are any."""
    return SimpleNamespace(E=getattr(m, "E_ema", m.E), G=getattr(m, "G_ema", m.G))


# ---- Editing codes (Sec. 4.4.5, 4.4.6): pure functions of tensors ------------------------------


def padded(x, E):
    """x (B, 3, H, W) -> at least 7 cells of E each way, whole cells; more at right and bottom."""
    h, w = x.shape[2:]
    right, bottom = (max(7 * E.multiple, n + -n % E.multiple) - n for n in (w, h))
    return F.pad(x, (0, right, 0, bottom), "reflect" if right < w and bottom < h else "replicate")


@torch.no_grad()
def embed(m, x, args):
    """x (B, 3, H, W) of any size -> structure (B, 8, h, w), texture (B, 2048)."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        s, t = m.E(padded(x, m.E))
    return s.float(), t.float()


@torch.no_grad()
def paint(m, s, t, args, size=None):
    """G(s, t) in [-1, 1], cut to size (H, W); one texture code serves any number of structures.

    WHY a seeded generator: the noise stays the same from edit to edit, so only the edit shows.
    """
    rng = torch.Generator().manual_seed(args.seed)
    with torch.autocast(s.device.type, torch.bfloat16, enabled=args.amp):
        x = m.G(s, t.expand(len(s), -1), rng)
    h, w = size or x.shape[2:]
    return x[:, :, :h, :w].float().clamp(-1, 1)


def swap(m, x, texture, args, alpha=1.0):
    """The structure of x (B, 3, H, W) in the texture of another (1 or B, 3, H', W'), same size.

    alpha: how far to go from the texture code of x (0) to the other's (1), Fig. 4.7.
    """
    s, t = embed(m, x, args)
    return paint(m, s, t.lerp(embed(m, texture, args)[1], alpha), args, x.shape[2:])


def attribute(t_plus, t_minus):
    """Two groups of texture codes (N, C), (M, C) -> the direction (1, C) from one to the other."""
    return t_plus.mean(0, keepdim=True) - t_minus.mean(0, keepdim=True)


def principal_directions(codes, count):
    """Codes (N, C) -> directions (count, C) of length 1, strongest first, deviations (count).

    Their largest component is positive, so that a direction has one sign only.
    """
    centred = codes.cpu().double() - codes.cpu().double().mean(0)
    values, vectors = torch.linalg.eigh(centred.t() @ centred / len(codes))
    vectors = vectors.flip(1)[:, :count].t()
    sign = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    return (vectors * sign).to(codes), values.flip(0)[:count].clamp(min=0).sqrt().to(codes)


def edit_region(s, direction, mask):
    """Adds a direction (C) to the structure s (B, C, h, w) where mask (B or 1, 1, h, w) is 1."""
    return s + mask * direction.view(1, -1, 1, 1)


def similarity_mask(s, row, column, least=0.5):
    """Cells whose structure resembles that of cell (row, column): (B, 1, h, w) of 0 and 1."""
    s = normalised(s)
    return ((s * s[:, :, row:row + 1, column:column + 1]).sum(1, keepdim=True) >= least).to(s)


def clone(s, source, box, to):
    """s (B, C, h, w) with the box (left, top, width, height) of source's cells put at `to`
    (left, top); what would leave either map is dropped."""
    (left, top, width, height), (x, y) = box, to
    width = max(0, min(width, source.shape[3] - left, s.shape[3] - x))
    height = max(0, min(height, source.shape[2] - top, s.shape[2] - y))
    s = s.clone()
    s[:, :, y:y + height, x:x + width] = source[:, :, top:top + height, left:left + width]
    return s


# ---- Commands -----------------------------------------------------------------------------------


def load_networks(args, device):
    """E and G from --weights: a checkpoint of this script, or the file of the authors."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script or the authors' file")
    state = common.load_file(args.weights)
    if isinstance(state, dict) and "method" in state:
        m = SimpleNamespace(E=encoder(args), G=generator(args))
        ema = "_ema" if args.ema else ""
        common.load_parts(vars(m), {k: state["parts"].get(k + ema) for k in "EG"}, args.weights)
    else:
        released = common.lab("released", "--weights with a released file")
        m = SimpleNamespace(**dict(zip("EG", released.swapae(state, args.weights), strict=True)))
    for net in vars(m).values():
        net.to(device).eval()
    return m


def opened(files, args, device, limit=1000):
    """Files, at most `limit`, evenly spaced -> (N, 3, size, size), cut from the middle."""
    n = min(limit, len(files))
    files = [files[i * len(files) // n] for i in range(n)]
    return torch.stack([resized(f, args) for f in files]).to(device)


def texture_codes(m, pictures, args):
    """(N, 3, H, W) -> (N, 2048), a few at a time."""
    return torch.cat([embed(m, x, args)[1] for x in pictures.split(8)])


def structure_codes(m, pictures, args):
    """(N, 3, H, W) -> (N * h * w, 8): every place is a sample."""
    return torch.cat([embed(m, x, args)[0].permute(0, 2, 3, 1).flatten(0, 2)
                      for x in pictures.split(8)])


def direction_of(m, args, device):
    """What --vector or --pca adds to a code, (1, C)."""
    if args.vector:
        return attribute(*(texture_codes(m, opened(common.list_pictures(folder), args, device),
                                         args) for folder in args.vector))
    pictures = opened(training_files(data_folder(args)), args, device)
    codes = (structure_codes if args.mask else texture_codes)(m, pictures, args)
    most = min(codes.shape[1], len(codes) - 1)
    if not 1 <= args.pca <= most:
        raise UserError(f"--pca {args.pca}: {len(codes)} codes have directions 1 to {most}")
    directions, deviations = principal_directions(codes, args.pca)
    return directions[-1:] * deviations[-1]


def mask_of(s, x, args, multiple):
    """--mask -> (1, 1, h, w) over the cells of s, for the picture x (1, 3, H, W)."""
    if re.fullmatch(r"\d+,\d+", args.mask):
        column, row = map(int, args.mask.split(","))
        if row >= x.shape[2] or column >= x.shape[3]:
            raise UserError(f"--mask {args.mask}: outside of a picture of "
                            f"{x.shape[3]}x{x.shape[2]}")
        return similarity_mask(s, row // multiple, column // multiple, args.similar)
    white = common.to_tensor(common.open_rgb(args.mask)).mean(0)[None, None] / 2 + 0.5
    if white.shape[2:] != x.shape[2:]:
        raise UserError(f"--mask {args.mask}: {white.shape[3]}x{white.shape[2]} pixels, but the "
                        f"picture has {x.shape[3]}x{x.shape[2]}")
    h, w = (n * multiple for n in s.shape[2:])
    white = F.pad(white, (0, w - white.shape[3], 0, h - white.shape[2]), mode="replicate")
    return F.avg_pool2d(white, multiple).to(s)


def boxes_of(pixels, source, s, multiple):
    """--clone's X Y W H TO_X TO_Y -> ((left, top, width, height), (x, y)): all cells touched."""
    left, top, x, y = (pixels[i] // multiple for i in (0, 1, 4, 5))
    width, height = (-(-(pixels[i] + pixels[i + 2]) // multiple) - first
                     for i, first in ((0, left), (1, top)))
    for place, here in (((left, top), source), ((x, y), s)):
        if place[0] >= here.shape[3] or place[1] >= here.shape[2]:
            raise UserError(f"--clone {' '.join(map(str, pixels))}: starts outside of a picture of "
                            f"{here.shape[3]}x{here.shape[2]} cells of {multiple} pixels")
    return (left, top, width, height), (x, y)


def translate_files(args):
    """Edit --translate, a picture or a folder; several --alpha or --gain give strips side by side.

    --exemplar: the texture of another picture (a folder: each in turn, a folder of outputs each).
    """
    if sum(map(bool, (args.exemplar and not args.clone, args.vector, args.pca is not None,
                       args.clone))) != 1:
        raise UserError("--translate needs one of --exemplar, --vector, --pca, --clone")
    if args.mask and args.pca is None:
        raise UserError("--mask: chooses where --pca moves the structure code")
    device = common.pick_device(args.device)
    m, out = load_networks(args, device), Path(args.out or "translated")
    cell = m.E.multiple
    exemplars = [None]
    if args.exemplar:
        exemplars = common.list_pictures(args.exemplar)
    direction = direction_of(m, args, device) if args.vector or args.pca is not None else None
    for file in exemplars:
        other = file and embed(m, common.to_tensor(common.open_rgb(file))[None].to(device), args)

        def edit(x, other=other):
            x = x.to(device)
            s, t = embed(m, x, args)
            if args.clone:
                source = other[0] if other else s
                edits = [(clone(s, source, *boxes_of(args.clone, source, s, cell)), t)]
            elif args.mask:
                mask = mask_of(s, x, args, cell)
                edits = [(edit_region(s, gain * direction, mask), t) for gain in args.gain]
            elif direction is not None:
                edits = [(s, t + gain * direction) for gain in args.gain]
            else:
                edits = [(s, t.lerp(other[1], alpha)) for alpha in args.alpha]
            return torch.cat([paint(m, *codes, args, x.shape[2:]) for codes in edits], dim=3)

        alone = [f.stem for f in exemplars if f].count(file and file.stem) < 2
        name = "" if len(exemplars) == 1 else file.stem if alone else file.name.replace(".", "-")
        common.translate_files(args.translate, out / name, edit)


# ---- Pictures of many swaps ----------------------------------------------------------------------


def test_pictures(root, args, device, limit=1000):
    """(N, 3, size, size) of `test_files`, evenly spaced."""
    return opened(test_files(root, args.split), args, device, limit)


def swap_grid(m, structures, textures, args):
    """Fig. 4.4 as columns: structures, reconstructions, then a column per texture (top row)."""
    (s, own), t = embed(m, structures, args), embed(m, textures, args)[1]
    blank = torch.ones_like(structures[:1])
    columns = {"structure": [blank, structures], "own texture": [blank, paint(m, s, own, args)]}
    for i, picture in enumerate(textures):
        columns[f"texture {i + 1}"] = [picture[None], paint(m, s, t[i:i + 1], args)]
    return {label: torch.cat(column) for label, column in columns.items()}


# ---- Metrics (Sec. 4.4.2, 4.4.4, 4.4.11) ---------------------------------------------------------


def texture_and_structure(args, device):
    """SIFID and the self-similarity distance, each a function of two batches -> float."""
    metrics = common.lab("metrics", "--evaluate")
    return (functools.partial(metrics.sifid, metrics.sifid_network(args.vgg, device)),
            functools.partial(metrics.self_similarity,
                              metrics.self_similarity_network(args.vgg, device)))


def stacked(root, folder, device):
    files = common.list_pictures(Path(root) / folder)
    return torch.stack([common.to_tensor(common.open_rgb(f)) for f in files]).to(device)


def truth_scores(m, root, args, device):
    """Scores of swaps with the next picture's texture against the toy world's true answers."""
    toy = common.lab("toy", "--data toy")
    x, y = (stacked(root, f"{args.split}{kind}", device) for kind in ("", "_truth"))
    other = x.roll(-1, dims=0)
    y_hat = torch.cat([swap(m, *pair, args) for pair in zip(x.split(1), other.split(1),
                                                            strict=True)])
    again = torch.cat([swap(m, p, p, args) for p in x.split(1)])
    flat = x.mean((2, 3), keepdim=True)
    scores = toy.texture_scores(*(p.cpu() for p in (x, other, y_hat, y)))
    scores.append({"name": "reconstruction error", "better": "lower",
                   "value": float((again - x).abs().mean() * 127.5),
                   "trivial": {"mean colour": float((flat - x).abs().mean() * 127.5)}})
    return scores


def evaluate(args):
    """Reconstruction, time, and both distances and FID of swaps of the test pictures."""
    device = common.pick_device(args.device)
    m, root = load_networks(args, device), data_folder(args)
    scores = truth_scores(m, root, args, device) if args.data == "toy" else []
    x = test_pictures(root, args, device)
    if len(x) < 2:
        raise UserError(f"--evaluate: two or more test pictures are needed in {root}")
    away = 1 if args.data == "toy" else len(x) // 2       # neighbours are often video frames
    other, metrics = x.roll(-away, dims=0), common.lab("metrics", "--evaluate")
    sifid, self_similarity = texture_and_structure(args, device)
    if args.lpips == "alex":
        distance = metrics.lpips(device, "--lpips vgg measures with --vgg's features instead")
    else:
        vgg = common.VGG([f"relu{i}_1" for i in range(1, 6)], args.vgg).to(device)
        distance = functools.partial(metrics.feature_distance, vgg)
    again, mix, seconds = [], [], {"embedding": [], "hybrid": []}
    for p, q in zip(x.split(1), other.split(1), strict=True):
        start = time.perf_counter()
        s, t = embed(m, p, args)
        t[0, 0].item()                                                     # waits for a GPU
        seconds["embedding"].append(time.perf_counter() - start)
        again.append(paint(m, s, t, args))
        again[-1][0, 0, 0, 0].item()
        start = time.perf_counter()
        mix.append(swap(m, p, q, args))
        mix[-1][0, 0, 0, 0].item()
        seconds["hybrid"].append(time.perf_counter() - start)
    again, mix = torch.cat(again), torch.cat(mix)
    name = "LPIPS" if args.lpips == "alex" else f"VGG distance ({args.vgg})"
    n, kind = len(x), f"{args.vgg} weights"
    pairs = list(zip(x.split(1), other.split(1), again.split(1), strict=True))
    scores += [
        {"name": f"reconstruction {name} ({n} pictures)", "better": "lower",
         "value": statistics.mean(distance(r, p) for p, _, r in pairs),
         "trivial": {"another picture": statistics.mean(distance(q, p) for p, q, _ in pairs)}},
        {"name": "reconstruction L1, of [-1, 1]", "better": "lower",
         "value": float((again - x).abs().mean()),
         "trivial": {"another picture": float((other - x).abs().mean())}},
        {"name": f"SIFID of swaps to the texture ({kind})", "better": "lower",
         "value": sifid(mix, other),
         "trivial": {"copy the structure": sifid(x, other)}},
        {"name": f"self-similarity distance of swaps to the structure ({kind})", "better": "lower",
         "value": self_similarity(mix, x),
         "trivial": {"copy the texture": self_similarity(other, x)}}]
    for what, times in seconds.items():
        scores.append({"name": f"{what}, seconds on {device.type}", "better": "lower",
                       "value": statistics.median(times)})
    common.print_scores(scores)
    if args.data != "toy" or args.fid_weights:  # last, because its network may have to be fetched
        value = metrics.fid(mix.split(1), x.split(1), device, args.fid_weights)
        common.print_scores([{"name": f"FID ({n} swaps, {n} structure pictures, 299x299)",
                              "value": value, "better": "lower"}])


# =============================================================================================
# 8. Main
# =============================================================================================


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
