"""SPADE: semantic image synthesis with spatially-adaptive normalisation (also known as GauGAN).

A generator turns a label map m (here sky, there grass) into a picture x_hat. Usual networks read
m at their first layer, and their normalisation layers wash it away: a region of one label is
uniform, and what is uniform is 0 after normalisation, whichever label it was. SPADE lets m in
*after* each normalisation instead: gamma(m) and beta(m), one number per channel and place, scale
and shift what the layer has normalised. The first layer then need not see m; it may read a random
z, or the style z that an image encoder takes from another picture.

T. Park, M.-Y. Liu, T.-C. Wang, J.-Y. Zhu, "Semantic Image Synthesis with Spatially-Adaptive
Normalization", CVPR 2019 (arXiv 1903.07291). Numbers below are those of chapter 2 in T. Park,
"Machine Learning for Deep Image Manipulation", UC Berkeley 2021.

SYMBOLS      paper                 here              shape
             m                     m (LabelMap)      (B, H, W) label indices, edges
             x, generated x        x, x_hat          (B, 3, H, W) in [-1, 1]
             h^i                   h                 (B, C, H_i, W_i), input of layer i
             gamma^i(m), beta^i(m) gamma, beta       (B, C, H_i, W_i)
             mu^i, sigma^i         inside `norm`     (C)
             z; mu, sigma of q     z; mu, logvar     (B, 256); sigma^2 = e^logvar

OBJECTIVE    Eq. (2.1)  gamma_cyx(m) (h_ncyx - mu_c) / sigma_c + beta_cyx(m)
             Eq. (2.2)  mu_c = mean of h_ncyx over n, y, x
             Eq. (2.3)  sigma_c^2 = mean of h_ncyx^2 - mu_c^2 over n, y, x
             Sec. 2.6   G, E: -E D(m, x_hat) + 10 FM + 10 VGG + 0.05 D_KL(q(z|x) || N(0, 1))
                        D: E max(0, 1 - D(m, x)) + E max(0, 1 + D(m, x_hat))

CHOICES      where the text is silent, or differs from what the authors ran (their released code):
             gamma is 1 + gamma in the code, since it starts near 0; sigma^2 gets 1e-5 more.
             Adam's beta_2 0.999 is 0.9 in the code; the first author confirmed 0.9.
             "Spectral norm on all layers" spares the ends of G and D and all of SPADE's own
             convolutions; "Glorot" is 0.02 times it there, and PyTorch's default elsewhere: that
             is what the code did on GPUs. The text's words: --init glorot.
             D: two scales; the GAN loss is the mean over scales; feature matching has weight 5
             on every activation (10 over two scales); VGG sees [-1, 1] without normalisation.
             The code runs G again for D's update. Here G and D move at once, from one G pass and
             one D pass: a quarter of a step saved, D sees pictures that are one update older.
             KL is summed over z and averaged over pictures; the code sums over a GPU's 4 pictures
             too, which is --lambda-kld 0.2 here. The encoder's style is its mean when translating.
             Table 2.3's other generators were not released; theirs are built from the text so
             that their parameter counts (ADE20K's 151 labels) come out as printed.

USAGE        python spade.py                                  # toy world, a score at the end
             python spade.py --data mydata [--input encoder]  # {train,test}_{img,label}[_inst]
             python spade.py --translate map.png --weights last.pt [--exemplar style.jpg]
EXPECT       python spade.py: about 7 minutes of one CPU core. Colour error about 7 in a picture's
             own style and in another's (mean colour of each class: 36), 15 for a random z (18);
             mIoU about 67 (real pictures 81; flat colours, easy to segment, 76).
"""

import argparse
import functools
import math
import random
import re
from collections import namedtuple
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.distributed.nn.functional import all_reduce
from torch.nn.utils import parametrizations, parametrize

import common
from common import InstanceNorm, Run, UserError, full, rate, shuffled

LAYOUT = ("train_img/ train_label/ (and test_img/ test_label/; optional train_inst/ test_inst/) "
          "with pictures and label maps of the same names, Cityscapes' leftImg8bit/ gtFine/, or "
          "ADE20K's images/ annotations/")
KNOWN = {"ade20k": ("https://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip")}

# =============================================================================================
# 1. Configuration
# =============================================================================================

KINDS = {  # Sec. 2.4, 2.6; label ids as the released networks have them
    # CHOICE (code): ADE20K's maps are used as they are: 0 unknown, 1 to 150 the classes.
    "ade20k": {"labels": 151, "ignore": [0]},
    "cityscapes": {"labels": 35, "edges": True, "size": 512, "height": 256, "load": 512,
                   "upsampling": "more",
                   "ignore": [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 34]},
    "coco": {"labels": 182, "unlabelled": 255, "edges": True, "epochs": 100, "decay_from": 1.0},
    "camvid": {"labels": 11, "unlabelled": 11},
}
TOY = {"labels": 7, "edges": True, "size": 64, "load": 64, "batch": 4, "steps": 1000,
       "input": "encoder", "z": 16, "ngf": 16, "ndf": 16, "hidden": 32, "encoder_side": 64,
       "lr": 1e-3, "init": "glorot", "lambda_vgg": 0.0, "workers": 0, "sample_every": 250,
       "segmenter_steps": 300}
GENERATORS = ("spade", "concat", "hd", "hd-spade", "hd-concat")
UPSAMPLING = {"normal": 5, "more": 6, "most": 7}  # how often a side doubles


def get_args(argv=None):
    """Flags in layers: the paper's defaults < data set or toy preset < checkpoint < given."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--size", type=int, default=256, help="width of a training crop (Sec. 2.6)")
    add("--height", type=int, default=None, help="its height, if not square (Cityscapes 512x256)")
    add("--load", type=int, default=286, help="pictures are resized to this width before the crop")
    add("--flip", action=switch, default=True, help="mirror half of the training pictures")
    add("--labels", type=int, default=None, help="label ids are 0 ... N-1 (counted if not given)")
    add("--unlabelled", type=int, default=None, metavar="ID",
        help="id of unlabelled pixels: a channel of its own, not counted by --evaluate")
    add("--ignore", type=int, nargs="*", default=[], metavar="ID",
        help="more ids that --evaluate does not count")
    add("--edges", action=switch, default=False, help="add the borders of *_inst as a channel")
    add("--batch", type=int, default=32, help="pictures per step and process (Sec. 2.6)")
    add("--epochs", type=int, default=200, help="passes over the data (Sec. 2.6; COCO 100)")
    add("--steps", type=int, default=None, help="updates in all; overrides --epochs")
    add("--decay-from", type=float, default=0.5, help="fraction of the run with a constant rate")
    add("--lr", type=float, default=2e-4, help="Adam's rate, before --ttur")
    add("--ttur", action=switch, default=True,
        help="two time scales (Sec. 2.4): G learns at half of --lr, D at twice --lr")
    add("--beta1", type=float, default=0.0, help="Adam's first decay (Sec. 2.4)")
    add("--beta2", type=float, default=0.9, help="Adam's second decay (0.999 in Sec. 2.4)")
    add("--init", choices=["released", "glorot"], default="released",
        help="first weights: as the code left them, or Glorot everywhere (Sec. 2.6)")
    add("--generator", choices=GENERATORS, default="spade",
        help="Tab. 2.3: decoder with SPADE or with concatenation; pix2pixHD++, with either")
    add("--input", choices=["segmap", "random", "encoder"], default="segmap",
        help="Tab. 2.4: what the first layer reads: m, a random z, or E's z (Sec. 2.3, a VAE)")
    add("--ngf", type=int, default=64, help="width of G and E (Tab. 2.3, 2.4: 48, 80)")
    add("--ndf", type=int, default=64, help="width of D (Fig. 2.13)")
    add("--hidden", type=int, default=128, help="channels between m and gamma, beta (Fig. 2.10)")
    add("--kernel", type=int, choices=[1, 3, 5], default=3, help="of convolutions on m (Tab. 2.4)")
    add("--norm", choices=["syncbatch", "batch", "instance"], default="syncbatch",
        help="parameter-free normalisation (Tab. 2.4); sync: over all processes")
    add("--spectral", action=switch, default=True, help="spectral normalisation (Tab. 2.5)")
    add("--upsampling", choices=list(UPSAMPLING), default="normal",
        help="G doubles 5, 6 (Cityscapes) or 7 times")
    add("--z", type=int, default=256, help="length of z (Fig. 2.14)")
    add("--encoder-side", type=int, default=256, help="E sees pictures resized to this square")
    add("--scales", type=int, default=2, help="discriminators, each at half the size of the last")
    add("--d-layers", type=int, default=4, help="of D before the last; Tab. 2.5's deeper D has 5")
    add("--lambda-fm", type=float, default=10.0, help="feature matching; 0 = Tab. 2.5's without")
    add("--lambda-vgg", type=float, default=10.0, help="perceptual loss; 0 = Tab. 2.5's without")
    add("--lambda-kld", type=float, default=0.05, help="KL term of --input encoder (Sec. 2.6)")
    add("--vgg", default="imagenet", help="weights: imagenet, random, or a file")
    add("--exemplar", default=None, metavar="FILE", help="--translate in this picture's style")
    add("--z-seed", type=int, default=0, help="--translate with this random z, without --exemplar")
    add("--inst", default=None, metavar="PATH", help="instance map(s) of --translate, for --edges")
    add("--encoder-weights", default=None, metavar="FILE", help="the authors' latest_net_E.pth")
    add("--segmenter", default=None, metavar="FILE",
        help="segmentation net of --evaluate; trained on the real pictures if FILE is not there")
    add("--segmenter-steps", type=int, default=600, help="updates of that training")
    add("--fid-weights", default=None, metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        return TOY if args.data == "toy" else KINDS.get(kind_of(args.data), {})

    args = common.parse_flags(p, argv, "spade", presets, run_name)
    args.height = args.height or args.size
    multiple = 16 if args.generator.startswith("hd") else 2 ** UPSAMPLING[args.upsampling]
    for flag, value in (("--size", args.size), ("--height", args.height)):
        if value < multiple or value % multiple:
            raise UserError(f"{flag} {value}: must be a multiple of {multiple}")
    if args.batch * args.size * args.height == multiple**2:
        raise UserError(f"--batch 1: G would start from a single place, which cannot be normalised;"
                        f" --batch 2, or a larger --size than {args.size}")
    if args.encoder_side < 8 or args.encoder_side & (args.encoder_side - 1):
        raise UserError(f"--encoder-side {args.encoder_side}: must be a power of two, 8 at least")
    if args.labels is not None and not 1 <= args.labels <= 65536:
        raise UserError(f"--labels {args.labels}: must be between 1 and 65536")
    if args.generator.startswith("hd") and args.input != "segmap":
        raise UserError(f"--generator {args.generator}: reads the label map, so --input segmap")
    if args.exemplar and args.input != "encoder" and not args.encoder_weights:
        raise UserError("--exemplar: only a network trained with --input encoder has a style")
    return args


def run_name(args):
    return f"spade-{Path(args.data).name}"


def kind_of(data):
    """The key of KINDS that a data set's name or folders show, or None."""
    name = Path(data).name.lower()
    if (Path(data) / "gtFine").is_dir():
        return "cityscapes"
    if (Path(data) / "annotations").is_dir() or name.startswith("adechallenge"):
        return "ade20k"
    return next((kind for kind in KINDS if name.startswith(kind)), None)


# =============================================================================================
# 2. Networks
# =============================================================================================


class LabelMap:
    """m: labels (B, H, W), integers below `classes`; edges (B, 0 or 1, H, W), see `border`.

    WHY indices instead of one-hot channels: 35 or 184 channels of zeros cost memory and time. A
    generator asks for each resolution once, so that its layers share the resized map.
    """

    def __init__(self, labels, edges, classes):
        self.labels, self.edges, self.classes, self.cache = labels, edges, classes, {}

    def at(self, h, w):
        """The map at (h, w), nearest neighbour (Fig. 2.10)."""
        if (h, w) == self.labels.shape[1:]:
            return self
        if (h, w) not in self.cache:
            labels = F.interpolate(self.labels[:, None].float(), (h, w))[:, 0].long()
            edges = F.interpolate(self.edges, (h, w)) if self.edges.shape[1] else labels.new_zeros(
                (len(labels), 0, h, w), dtype=self.edges.dtype)
            self.cache[h, w] = LabelMap(labels, edges, self.classes)
        return self.cache[h, w]

    def one_hot(self):
        """(B, classes + edges, H, W) in 0 and 1."""
        if "one_hot" not in self.cache:
            one_hot = F.one_hot(self.labels, self.classes).permute(0, 3, 1, 2)
            self.cache["one_hot"] = torch.cat([one_hot.to(self.edges.dtype), self.edges], dim=1)
        return self.cache["one_hot"]

    def taps(self, k):
        """(B * H * W, k * k) rows of `LabelConv`'s table under a k x k window of every place."""
        if k not in self.cache:
            (h, w), r, rows = self.labels.shape[1:], k // 2, self.classes + 1
            padded = F.pad(self.labels, (r, r, r, r), value=self.classes)  # outside: a row of zeros
            self.cache[k] = torch.stack([padded[:, i:i + h, j:j + w] + rows * (k * i + j)
                                         for i in range(k) for j in range(k)], -1).view(-1, k * k)
        return self.cache[k]


class LabelConv(nn.Conv2d):
    """Zero-padded k x k convolution of m's one-hot channels and edges; m -> (B, C, H, W).

    WHY a table: the sum over one-hot channels picks one weight per window place, so a place costs
    k * k look-ups instead of k * k * classes products. The numbers are the same.
    """

    def __init__(self, m_channels, channels, kernel):
        super().__init__(m_channels, channels, kernel, padding=kernel // 2)

    def forward(self, m):
        (b, h, w), k, n = m.labels.shape, self.kernel_size[0], m.classes
        table = F.pad(self.weight[:, :n], (0, 0, 0, 0, 0, 1))             # (C, classes + 1, k, k)
        table = table.permute(2, 3, 1, 0).reshape(-1, self.out_channels)
        out = F.embedding_bag(m.taps(k), table, mode="sum") + self.bias   # (B * H * W, C)
        out = out.view(b, h, w, -1).permute(0, 3, 1, 2)                   # (B, C, H, W)
        if m.edges.shape[1]:
            out = out + F.conv2d(m.edges, self.weight[:, n:], padding=self.padding)
        return out


class SyncBatchNorm(nn.BatchNorm2d):
    """(h - mu) / sigma with the statistics of all processes' batches (Sec. 2.4); no parameters.

    CHOICE (code): sigma^2 + 1e-5. At test time running means stand in for mu and sigma^2.
    """

    def __init__(self, channels):
        super().__init__(channels, affine=False)

    def forward(self, h):
        if not (self.training and dist.is_initialized()):
            return super().forward(h)                # one process: the same function, fused
        h = full(h)
        moments = torch.stack([h.mean((0, 2, 3)), h.square().mean((0, 2, 3))])
        mu, square = all_reduce(moments) / dist.get_world_size()              # Eq. (2.2)
        var = (square - mu.square()).clamp(min=0)                             # Eq. (2.3)
        n = h.numel() // h.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mu, self.momentum)
            self.running_var.lerp_(var * n / max(1, n - 1), self.momentum)
        return (h - mu.view(1, -1, 1, 1)) * (var + self.eps).rsqrt().view(1, -1, 1, 1)


NORMS = {  # of a channel count, all without parameters
    "syncbatch": SyncBatchNorm, "batch": functools.partial(nn.BatchNorm2d, affine=False),
    "instance": InstanceNorm}


class Spade(nn.Module):
    """Spatially-adaptive denormalisation (Fig. 2.10): normalised h (B, C, H, W), m -> (B, C, H, W).

    The caller normalises: a block's main path and its skip read the same (h - mu) / sigma.
    """

    def __init__(self, channels, m_channels, hidden=128, kernel=3):
        super().__init__()
        self.shared = LabelConv(m_channels, hidden, kernel)
        self.gamma_beta = nn.Conv2d(hidden, 2 * channels, kernel, padding=kernel // 2)
        self.channels = channels

    def forward(self, normalised, m):
        m = m.at(*normalised.shape[2:])
        gamma, beta = self.gamma_beta(F.relu(self.shared(m))).chunk(2, dim=1)
        return normalised * (1 + gamma) + beta       # Eq. (2.1); CHOICE (code): 1 + gamma


class Affine(nn.Module):
    """The usual gamma_c and beta_c, the same for all places and maps: for the comparisons."""

    def __init__(self, channels, *_):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.full((channels, 1, 1), v)) for v in (1.0, 0.0))
        self.channels = channels

    def forward(self, normalised, m):
        return normalised * self.gamma + self.beta


class Concat(Affine):
    """Tab. 2.3's alternative to SPADE: `Affine`, with m as further channels for the next layer."""

    def __init__(self, channels, m_channels, *_):
        super().__init__(channels)
        self.channels = channels + m_channels

    def forward(self, normalised, m):
        m = m.at(*normalised.shape[2:]).one_hot()
        return torch.cat([super().forward(normalised, m), m.to(normalised.dtype)], dim=1)


def sn(conv, spectral=True):
    """The layer with its weight divided by its largest singular value (if `spectral`)."""
    return parametrizations.spectral_norm(conv) if spectral else conv


class SpadeBlock(nn.Module):
    """SPADE ResBlk (Fig. 2.11): (B, a, H, W), m -> (B, b, H, W); a learned skip where a != b."""

    def __init__(self, a, b, modulation, norm, spectral):
        super().__init__()
        middle = min(a, b)
        self.norm_0, self.spade_0 = norm(a), modulation(a)
        self.conv_0 = sn(nn.Conv2d(self.spade_0.channels, middle, 3, padding=1), spectral)
        self.norm_1, self.spade_1 = norm(middle), modulation(middle)
        self.conv_1 = sn(nn.Conv2d(self.spade_1.channels, b, 3, padding=1), spectral)
        if a != b:
            self.spade_s = modulation(a)
            self.conv_s = sn(nn.Conv2d(self.spade_s.channels, b, 1, bias=False), spectral)

    def forward(self, h, m):
        normalised = self.norm_0(h)
        skip = self.conv_s(self.spade_s(normalised, m)) if hasattr(self, "conv_s") else h
        h = self.conv_0(F.leaky_relu_(self.spade_0(normalised, m), 0.2))
        h = self.conv_1(F.leaky_relu_(self.spade_1(self.norm_1(h), m), 0.2))
        return skip + h


class Generator(nn.Module):
    """The decoder of SPADE ResBlks (Fig. 2.12): m (B, H, W), z (B, z) or None -> (B, 3, H, W).

    96.5 M parameters with ADE20K's 151 labels. `modulation`: Spade, or Concat for Tab. 2.3.
    """

    def __init__(self, args, m_channels, modulation):
        super().__init__()

        def block(a, b):
            return SpadeBlock(a, b, lambda c: modulation(c, m_channels, args.hidden, args.kernel),
                              NORMS[args.norm], args.spectral)

        doublings, c = UPSAMPLING[args.upsampling], 16 * args.ngf
        self.start = args.height >> doublings, args.size >> doublings
        widths = [c, c, c, c, c // 2, c // 4, c // 8, c // 16]
        self.doubles = [False, True, doublings > 5, True, True, True, True]  # before each block
        if doublings == 7:
            widths, self.doubles = widths + [c // 32], self.doubles + [True]
        self.blocks = nn.ModuleList(block(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.fc = (LabelConv(m_channels, c, 3) if args.input == "segmap"
                   else nn.Linear(args.z, c * self.start[0] * self.start[1]))
        self.to_rgb = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, m, z=None):
        if z is None:
            h = self.fc(m.at(*self.start))                                # (B, 1024, H/32, W/32)
        else:
            h = self.fc(z).view(len(z), -1, *self.start)
        for block, double in zip(self.blocks, self.doubles, strict=True):
            h = block(F.interpolate(h, scale_factor=2) if double else h, m)
        return torch.tanh(self.to_rgb(F.leaky_relu(h, 0.2)))              # (B, 3, H, W)


class HDBlock(nn.Module):
    """pix2pixHD's residual block, h + norm(conv(relu(norm(conv(h))))), normalised as told."""

    def __init__(self, c, modulation, norm, spectral, m_channels=0):
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode="reflect")
        self.conv_0 = sn(conv(c + m_channels, c), spectral)
        self.conv_1 = sn(conv(c, c), spectral)
        self.norm_0, self.norm_1 = norm(c), norm(c)
        self.join_0, self.join_1 = modulation(c), modulation(c)
        self.concat = m_channels > 0

    def forward(self, h, m):
        skip = h
        if self.concat:
            h = torch.cat([h, m.at(*h.shape[2:]).one_hot().to(h.dtype)], dim=1)
        h = F.relu(self.join_0(self.norm_0(self.conv_0(h)), m))
        return skip + self.join_1(self.norm_1(self.conv_1(h)), m)


class HDGenerator(nn.Module):
    """pix2pixHD++ (Tab. 2.3): four layers down, nine blocks, four up; m (B, H, W) -> (B, 3, H, W).

    m enters at the first layer; --generator hd-spade: also by SPADE after every normalisation;
    hd-concat: also by concatenation. CHOICE: once per block, which gives the printed 195 M.
    """

    def __init__(self, args, m_channels):
        super().__init__()
        norm, spectral, c = NORMS[args.norm], args.spectral, args.ngf

        def join(channels):
            kind = Spade if args.generator == "hd-spade" else Affine
            return kind(channels, m_channels, args.hidden, args.kernel)

        self.first = nn.Conv2d(m_channels, c, 7, padding=3, padding_mode="reflect")
        widths = [c, 2 * c, 4 * c, 8 * c, 16 * c]
        self.down = nn.ModuleList(sn(nn.Conv2d(a, b, 3, 2, 1), spectral)
                                  for a, b in zip(widths, widths[1:], strict=False))
        self.up = nn.ModuleList(sn(nn.ConvTranspose2d(b, a, 3, 2, 1, 1), spectral)
                                for a, b in reversed(list(zip(widths, widths[1:], strict=False))))
        sites = widths + widths[-2::-1]                       # where a layer is normalised
        self.norms = nn.ModuleList(norm(a) for a in sites)
        self.joins = nn.ModuleList(join(a) for a in sites)
        extra = m_channels if args.generator == "hd-concat" else 0
        self.blocks = nn.ModuleList(HDBlock(16 * c, join, norm, spectral, extra) for _ in range(9))
        self.to_rgb = nn.Conv2d(c, 3, 7, padding=3, padding_mode="reflect")

    def forward(self, m, z=None):
        layers = [self.first, *self.down, *self.up]
        h = m.one_hot()
        for i, (layer, norm, join) in enumerate(zip(layers, self.norms, self.joins, strict=True)):
            h = F.relu(join(norm(layer(h)), m))               # (B, 1024, H/16, W/16) after 5
            if i == 4:
                for block in self.blocks:
                    h = block(h, m)
        return torch.tanh(self.to_rgb(h))


class Encoder(nn.Module):
    """q(z|x) (Fig. 2.14): x (B, 3, H, W) -> mu, logvar (B, z); 10.46 M parameters.

    x is resized to a square, then halved (6 times from 256) until it is 4x4.
    """

    def __init__(self, ngf=64, z=256, side=256, spectral=True):
        super().__init__()
        self.side, halvings = side, int(math.log2(side)) - 2
        widths = [3] + [ngf * min(2**i, 8) for i in range(halvings)]
        self.convs = nn.ModuleList(sn(nn.Conv2d(a, b, 3, 2, 1, bias=False), spectral)
                                   for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(map(InstanceNorm, widths[1:]))
        self.mu, self.logvar = (nn.Linear(16 * widths[-1], z) for _ in range(2))

    def forward(self, x):
        if x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear")
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        x = x.flatten(1)                                                  # (B, 8192)
        return full(self.mu(x)), full(self.logvar(x))


class Discriminator(nn.Module):
    """One scale (Fig. 2.13): (m, x) stacked, (B, C, H, W) -> [activation of each layer, logits].

    70x70 PatchGAN whose padding of 2 makes maps one pixel larger than half: 129, 65, 33, 34, 35.
    """

    def __init__(self, in_channels, ndf=64, layers=4, spectral=True):
        super().__init__()
        widths = [in_channels] + [ndf * min(2**i, 8) for i in range(layers)]
        self.stages = nn.ModuleList([nn.Sequential(
            nn.Conv2d(widths[0], widths[1], 4, 2, 2), nn.LeakyReLU(0.2, inplace=True))])
        for i in range(1, layers):
            conv = nn.Conv2d(widths[i], widths[i + 1], 4, 2 if i < layers - 1 else 1, 2, bias=False)
            self.stages.append(nn.Sequential(sn(conv, spectral), InstanceNorm(widths[i + 1]),
                                             nn.LeakyReLU(0.2, inplace=True)))
        self.stages.append(nn.Conv2d(widths[-1], 1, 4, 1, 2))

    def forward(self, x):
        outs = []
        for stage in self.stages:
            x = stage(x)
            outs.append(x)
        return outs


class MultiscaleDiscriminator(nn.Module):
    """D: m, x (B, 3, H, W) -> [outputs of a `Discriminator`] for each scale, the finest first.

    x may hold several batches for the same m, one after the other, as fake and real.
    """

    def __init__(self, m_channels, args):
        super().__init__()
        self.scales = nn.ModuleList(
            Discriminator(m_channels + 3, args.ndf, args.d_layers, args.spectral)
            for _ in range(args.scales))

    def forward(self, m, x):
        x = torch.cat([m.one_hot().repeat(len(x) // len(m.labels), 1, 1, 1), x], dim=1)
        outs = []
        for i, scale in enumerate(self.scales):
            if i > 0:
                x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
            outs.append(scale(x))
        return outs


def apart(args):
    """Whether unlabelled pixels have an id beyond the labels: then a last channel is theirs."""
    return args.unlabelled is not None and args.unlabelled >= args.labels


def channels(args):
    """(one-hot channels, channels of m in all)."""
    return args.labels + apart(args), args.labels + apart(args) + args.edges


def generator(args):
    """G for --generator."""
    if args.labels is None:
        raise UserError("--labels N is needed: how many label ids are there?")
    m_channels = channels(args)[1]
    if args.generator.startswith("hd"):
        return HDGenerator(args, m_channels)
    return Generator(args, m_channels, Spade if args.generator == "spade" else Concat)


def init_weights(net, scheme):
    """First weights, in place. 'glorot' (Sec. 2.6), or 'released': 0.02 times Glorot, except for
    spectrally normalised layers, which keep PyTorch's U(+-1/sqrt(fan-in)); biases 0.

    CHOICE: the code asks for the former everywhere but misses those layers once a network is on a
    GPU. The function is the same (their scale is divided out), Adam's relative step is not.
    """
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            normalised = parametrize.is_parametrized(layer)
            if scheme == "glorot":
                weight = layer.parametrizations.weight.original if normalised else layer.weight
                nn.init.xavier_normal_(weight)
            elif not normalised:
                nn.init.xavier_normal_(layer.weight, 0.02)
    return net


def build(args, device):
    """G, D, maybe E and VGG-19, and the two Adams (E learns with G)."""
    torch.manual_seed(args.seed)
    m = SimpleNamespace(G=generator(args), D=MultiscaleDiscriminator(channels(args)[1], args))
    if args.input == "encoder":
        m.E = Encoder(args.ngf, args.z, args.encoder_side, args.spectral)
    for net in vars(m).values():
        init_weights(net, args.init)
    if args.lambda_vgg > 0:  # CHOICE (code): pictures in [-1, 1] as they are
        m.vgg = common.VGG(VGG_TAPS, args.vgg, normalise=False)
    for net in vars(m).values():
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, args.beta2),
                             fused=device.type in ("cuda", "cpu"))
    m.opt_G = adam([*m.G.parameters(), *(m.E.parameters() if args.input == "encoder" else [])])
    m.opt_D = adam(m.D.parameters())
    if args.compile:
        m.G.forward, m.D.forward = torch.compile(m.G.forward), torch.compile(m.D.forward)
    return m


# =============================================================================================
# 3. Losses
# =============================================================================================

VGG_TAPS = {"relu1_1": 1 / 32, "relu2_1": 1 / 16, "relu3_1": 1 / 8, "relu4_1": 1 / 4,
            "relu5_1": 1.0}


def hinge(logits, real):
    """D's side of Sec. 2.6, the hinge loss: mean max(0, 1 - D) if `real`, else max(0, 1 + D)."""
    return F.relu(1 - full(logits) if real else 1 + full(logits)).mean()


def hinge_generator(logits):
    """G's side of Sec. 2.6: -mean D."""
    return -full(logits).mean()


def feature_matching(fakes, reals):
    """pix2pixHD's feature matching: mean over scales of sum over layers of mean |fake - real|.

    fakes, reals: [[activation (B, C, H, W)]] per scale and layer, the logits left out. Reals are
    targets: no gradient reaches them.
    """
    losses = [(full(fake) - full(real).detach()).abs().mean()
              for scales in zip(fakes, reals, strict=True)
              for fake, real in zip(*scales, strict=True)]
    return torch.stack(losses).sum() / len(fakes)


def perceptual(vgg, x_hat, x):
    """Sum over VGG_TAPS of weight * mean |V(x_hat) - V(x)|; no gradient reaches x."""
    with torch.no_grad():
        targets = vgg(x)
    return torch.stack([weight * (full(v) - full(targets[tap])).abs().mean()
                        for (tap, v), weight in zip(vgg(x_hat).items(), VGG_TAPS.values(),
                                                    strict=True)]).sum()


def kl_divergence(mu, logvar):
    """Sec. 2.6: D_KL(N(mu, e^logvar) || N(0, 1)), summed over z, mean over pictures."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()


def reparameterise(mu, logvar, noise):
    """z ~ q(z|x) as a function of mu and logvar, so that gradients reach them (Sec. 2.6)."""
    return mu + (0.5 * logvar).exp() * noise


# =============================================================================================
# 4. Data
# =============================================================================================

Pair = namedtuple("Pair", "image label inst")  # three paths; inst is None if there is none
FOLDERS = [  # pictures, label maps, instance maps, for {split}; tried in this order
    ("{}_img", "{}_label", "{}_inst"),
    ("leftImg8bit/{}", "gtFine/{}", "gtFine/{}"),
    ("images/{}", "annotations/{}", "annotations_instance/{}")]
SPLITS = {"train": ("train", "training"), "test": ("test", "val", "validation"),
          "val": ("val", "validation")}  # the first that is there
SUFFIX = re.compile("_(leftImg8bit|gtFine_(labelIds|instanceIds))$")


def find_pairs(root, split, edges=False):
    """[Pair] of 'train', 'test' or 'val', sorted by name; `UserError` for what does not match.

    Where there is no test split, the training pictures stand in, and a printed line says so.
    """
    for name in SPLITS[split]:
        for folders in FOLDERS:
            image, label, inst = (Path(root) / f.format(name) for f in folders)
            if image.is_dir() and label.is_dir():
                return match(image, label, inst if edges else None)
    if split == "test":
        pairs = find_pairs(root, "train", edges)
        print(f"{root} has no test pictures: these are training pictures")
        return pairs
    raise UserError(f"{root}: no {split} pictures with label maps; expected {LAYOUT}")


def match(image, label, inst):
    """Files of the three folders, paired by name."""
    def named(folder, pattern="."):
        files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in common.SUFFIXES]
        if any("_gtFine_" in f.name for f in files):
            files = [f for f in files if pattern in f.name]
        return {SUFFIX.sub("", f.stem): f for f in files}

    images, labels = named(image), named(label, "labelIds")
    insts = named(inst, "instanceIds") if inst else {}
    if not images:
        raise UserError(f"{image}: no pictures in this folder")
    groups = [(images, labels, label), (labels, images, image)]
    groups += [(images, insts, inst)] if inst else []
    for have, other, folder in groups:
        if lonely := sorted(have.keys() - other.keys()):
            raise UserError(f"{have[lonely[0]]}: has no file of that name in {folder}"
                            + (f" ({len(lonely)} such files)" if len(lonely) > 1 else ""))
    return [Pair(images[k], labels[k], insts.get(k)) for k in sorted(images)]


def check_pairs(pairs, args):
    """Before training: sizes agree and ids are in range; fills in args.labels if it is None."""
    def look(pair):
        maps = [common.open_ids(f) for f in pair[1:] if f]
        try:
            with Image.open(pair.image) as im:
                size = im.size
        except OSError as error:
            raise UserError(f"{pair.image}: not a readable picture ({error})") from None
        for path, found in zip(pair[1:], maps, strict=False):
            if found.size != size:
                raise UserError(f"{path}: {found.width}x{found.height} pixels, but {pair.image} "
                                f"has {size[0]}x{size[1]}")
        return np.unique(np.asarray(maps[0])).tolist()

    with ThreadPool(max(1, args.workers)) as pool:  # Pillow decodes outside the interpreter's lock
        found = list(pool.imap(look, pairs, chunksize=8))
    if args.labels is None:
        args.labels = 1 + max({i for ids in found for i in ids} - {args.unlabelled}, default=0)
        if args.labels > 200:
            raise UserError(f"{pairs[0].label.parent}: ids up to {args.labels - 1}; give --labels "
                            "N, and --unlabelled 255 if 255 marks unlabelled pixels")
        print(f"--labels {args.labels}: the ids found in {len(pairs)} label maps")
    for pair, ids in zip(pairs, found, strict=True):
        check_ids(pair.label, ids, args)


def check_ids(path, ids, args):
    """`UserError` if a map has ids that are neither below --labels nor --unlabelled."""
    if wrong := sorted(i for i in ids if not 0 <= i < args.labels and i != args.unlabelled):
        raise UserError(f"{path}: label ids {', '.join(map(str, wrong[:8]))} out of range: "
                        f"expected 0 to {args.labels - 1} (--labels {args.labels})"
                        + (f" or {args.unlabelled} (--unlabelled)" if args.unlabelled is not None
                           else "; does --unlabelled ID mark them?"))


def to_labels(im, args):
    """Map of ids -> (H, W) tensor of one-hot channels."""
    labels = torch.from_numpy(np.array(im).astype(np.int64))
    return torch.where(labels == args.unlabelled, args.labels, labels) if apart(args) else labels


def border(im):
    """Instance map -> (1, H, W): 1 where a pixel's instance differs from a neighbour's, else 0."""
    inst = torch.from_numpy(np.array(im).astype(np.int64))
    edges = torch.zeros(1, *inst.shape)
    down, right = inst[1:] != inst[:-1], inst[:, 1:] != inst[:, :-1]
    for part, differs in ((edges[0, 1:], down), (edges[0, :-1], down),
                          (edges[0, :, 1:], right), (edges[0, :, :-1], right)):
        part[differs] = 1
    return edges


class LabelledPictures(torch.utils.data.Dataset):
    """`self[n]`: the n-th training sample: labels (H, W), edges (0 or 1, H, W), x (3, H, W).

    Walks through a new shuffle of the pairs every epoch; a sample depends on (seed, n) alone.
    Resize (pictures bicubic, maps nearest), random crop, mirror, the same for all three.
    """

    def __init__(self, pairs, args, augment=True):
        self.pairs, self.args, self.augment = pairs, args, augment

    def __getitem__(self, n):
        args, rng = self.args, random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.pairs))
        if self.augment:
            i = shuffled(len(self.pairs), common.mix(args.seed, "epoch", epoch))[i]
        pair = self.pairs[i]
        w, h = args.size, args.height
        big = max(args.load, w) if self.augment else w  # CHOICE (code): aspect ratio not kept
        big = big, round(h * big / w)
        left, top = rng.randint(0, big[0] - w), rng.randint(0, big[1] - h)
        mirror = self.augment and args.flip and rng.random() < 0.5

        def fit(im, method):
            im = im.resize(big, method).crop((left, top, left + w, top + h))
            return im.transpose(Image.FLIP_LEFT_RIGHT) if mirror else im

        edges = torch.zeros(0, h, w)
        if args.edges:
            edges = border(fit(common.open_ids(pair.inst), Image.NEAREST))
        return (to_labels(fit(common.open_ids(pair.label), Image.NEAREST), args), edges,
                common.to_tensor(fit(common.open_rgb(pair.image), Image.BICUBIC)))

    def __len__(self):
        return len(self.pairs)


def random_batch(args, device):
    """(labels, edges, x) of noise, shaped and laid out as in training; for measuring a step."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    shape = args.batch, args.height, args.size
    x = torch.rand(shape[0], 3, *shape[1:]).mul(2).sub(1).to(device, memory_format=layout)
    return (torch.randint(0, args.labels, shape).to(device),
            torch.zeros(shape[0], int(args.edges), *shape[1:]).to(device), x)


# =============================================================================================
# 5. One training step
# =============================================================================================


def train_step(m, labels, edges, x, args, rng):
    """One update of G (with E) and of D on labels (B, H, W), edges and pictures x (B, 3, H, W).

    Both move from one forward pass of G and one of D. Returns losses by name.
    rng: CPU generator of the noise in z.
    """
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=args.amp)
    label_map, losses, L_KLD = LabelMap(labels, edges, channels(args)[0]), {}, []
    m.opt_G.zero_grad(set_to_none=True)      # WHY so early: the last step's gradients, as large as
    m.opt_D.zero_grad(set_to_none=True)      # the weights, are gone before G's maps are made

    # ---- forward: z if there is one, x_hat = G(m, z) ------------------------------------------
    z = None
    if args.input != "segmap":
        z = torch.randn(len(x), args.z, generator=rng).to(x)
    with autocast():
        if args.input == "encoder":          # Fig. 2.15: the style of x itself
            mu, logvar = m.E(x)
            z = reparameterise(mu, logvar, z)
            losses["KLD"] = kl_divergence(mu, logvar)
            L_KLD = [args.lambda_kld * losses["KLD"]]
        x_hat = m.G(label_map, z)

    # ---- what G's losses say about each pixel of x_hat ----------------------------------------
    # WHY stop at x_hat: VGG's maps are freed before D makes its own, D's weights get no gradient
    # from G's losses, and D's update below reads the same pass with x_hat as a constant.
    leaf = full(x_hat.detach()).requires_grad_()   # collects the gradient in leaf.grad
    if args.lambda_vgg > 0:
        with autocast():
            losses["VGG"] = perceptual(m.vgg, leaf, x)
        (args.lambda_vgg * losses["VGG"]).backward()
    with autocast():  # no layer of D mixes pictures, so fake and real can share one pass
        outs = m.D(label_map, torch.cat([leaf, x]))
    fakes, reals = ([[layer[half] for layer in scale] for scale in outs]
                    for half in (slice(len(x)), slice(len(x), None)))

    def over_scales(loss, side, *real):      # CHOICE (code): the mean, where pix2pixHD sums
        return torch.stack([loss(scale[-1], *real) for scale in side]).mean()

    losses["GAN"] = over_scales(hinge_generator, fakes)
    L_G = losses["GAN"]
    if args.lambda_fm > 0:
        losses["FM"] = feature_matching([s[:-1] for s in fakes], [s[:-1] for s in reals])
        L_G = L_G + args.lambda_fm * losses["FM"]
    L_G.backward(inputs=[leaf], retain_graph=True)

    # ---- D: real above 1, fake below -1 -------------------------------------------------------
    losses["D"] = over_scales(hinge, fakes, False) + over_scales(hinge, reals, True)
    losses["D"].backward(inputs=list(m.D.parameters()))
    m.opt_D.step()

    # ---- G and E: the gradient goes on from x_hat ---------------------------------------------
    del outs, fakes, reals
    grad = leaf.grad.to(x_hat.dtype)
    torch.autograd.backward([x_hat, *L_KLD], [grad, *[None] * len(L_KLD)])
    m.opt_G.step()
    return {name: loss.detach() for name, loss in losses.items()}


# =============================================================================================
# 6. Training loop
# =============================================================================================


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("scenes", args.size)

    return common.find_data(args.data, LAYOUT, KNOWN, draw_toy)


def train(args):
    root = data_folder(args)
    pairs, held_out = (find_pairs(root, split, args.edges) for split in ("train", args.split))
    check_pairs(pairs, args)
    check_pairs(held_out, args)
    run = Run("spade", args)
    data = LabelledPictures(pairs, args)
    group = args.batch * run.world
    total = args.steps or args.epochs * max(1, len(data) // group)
    show = test_batch(held_out, args, limit=6)
    m = build(args, run.device)
    run.resume_or_start({name: part for name, part in vars(m).items() if name != "vgg"})
    if args.data == "toy":
        preset = ", ".join(f"{k} {v}" for k, v in TOY.items())
        print(f"toy preset instead of the paper's settings: {preset}")
    for step, (labels, edges, x) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(m, show, args, run.device))
        factor = rate(step, total, args.decay_from) * args.lr          # Sec. 2.6
        m.opt_G.param_groups[0]["lr"] = factor * (0.5 if args.ttur else 1)
        m.opt_D.param_groups[0]["lr"] = factor * (2 if args.ttur else 1)
        rng = torch.Generator().manual_seed(common.mix(args.seed, step, run.rank))
        run.log(train_step(m, labels, edges, x, args, rng))
    run.save_samples(sample_columns(m, show, args, run.device))
    run.finish(truth_scores(m, root, args, run.device)
               if args.data == "toy" and run.rank == 0 else [])


# =============================================================================================
# 7. Translate, evaluate, look inside
# =============================================================================================


def test_batch(pairs, args, limit=None):
    """labels (N, H, W), edges, x (N, 3, H, W) at the training size; limit: evenly spaced ones."""
    every = max(1, len(pairs) // limit) if limit else 1
    data = LabelledPictures(pairs[::every][:limit], args, augment=False)
    return [torch.stack(part) for part in zip(*(data[i] for i in range(len(data))), strict=True)]


@torch.no_grad()
def synthesise(m, labels, edges, z, args, device, batch=8):
    """Pictures (N, 3, H, W) on the CPU for maps (N, H, W) and z (N, z) or None; test mode."""
    m.G.eval()
    pictures = []
    for i in range(0, len(labels), batch):
        part = LabelMap(labels[i:i + batch].to(device), edges[i:i + batch].to(device),
                        channels(args)[0])
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            x_hat = m.G(part, None if z is None else z[i:i + batch].to(device))
        pictures.append(x_hat.float().cpu())
    m.G.train()
    return torch.cat(pictures)


@torch.no_grad()
def style(m, x, device):
    """The mean of q(z|x) for pictures (N, 3, H, W) -> (N, z) on the CPU; test mode."""
    m.E.eval()  # WHY: in training mode every call would move spectral norm's vectors
    z = torch.cat([m.E(p[None].to(device))[0].cpu() for p in x])
    m.E.train()
    return z


def random_style(n, seed, args):
    """n times one z from the prior N(0, 1), or None where G reads none."""
    if args.input == "segmap":
        return None
    z = torch.randn(1, args.z, generator=torch.Generator().manual_seed(common.mix("z", seed)))
    return z.expand(n, -1)


def random_styles(n, args):
    """n different z from the prior, or None where G reads none."""
    if args.input == "segmap":
        return None
    return torch.cat([random_style(1, seed, args) for seed in range(n)])


def sample_columns(m, show, args, device):
    """Columns of a sample grid: m, x, and G(m) in the styles there are."""
    labels, edges, x = show
    paint = functools.partial(synthesise, m, labels, edges, args=args, device=device)
    columns = {"m": colour_map(labels), "x": x}
    if args.input == "segmap":
        return columns | {"G(m)": paint(None)}
    if args.input == "encoder":
        z = style(m, x, device)
        columns |= {"style of x": paint(z), "style of next x": paint(z.roll(-1, 0))}
    return columns | {f"z {seed}": paint(random_style(len(x), seed, args)) for seed in (0, 1)}


def colour_map(labels):
    """Labels (N, H, W) as pictures (N, 3, H, W): well-spread hues, alternately light and dark."""
    i = torch.arange(int(labels.max()) + 1)
    hue = (i * 0.618 % 1)[:, None] + torch.tensor([0, 1 / 3, 2 / 3])
    colours = 0.8 * torch.cos(2 * math.pi * hue) + 0.2 * (-1.0) ** i[:, None]
    return colours.clamp(-1, 1)[labels].permute(0, 3, 1, 2)


# ---- your own label maps -----------------------------------------------------------------------


def load_networks(args, device):
    """G (and E) from --weights in test mode: our checkpoint, or the authors' released files."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script or the authors' file")
    state, m = common.load_file(args.weights), SimpleNamespace()
    if isinstance(state, dict) and "method" in state:
        m.G = generator(args)
        parts = {"G": m.G}
        if args.input == "encoder":
            m.E = parts["E"] = Encoder(args.ngf, args.z, args.encoder_side, args.spectral)
        common.load_parts(parts, state["parts"], args.weights)
    else:
        released = common.lab("released", "--weights with the authors' file")
        m.G = released.spade(state, args.weights, args)
        if args.encoder_weights:
            m.E = released.spade_encoder(common.load_file(args.encoder_weights),
                                         args.encoder_weights)
    for net in vars(m).values():
        net.to(device).eval().requires_grad_(False)
        for layer in list(net.modules()):  # WHY: W / sigma is then computed once, not every call
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight")
    return m


def translate_files(args):
    """Paint --translate (a label map or a folder of them) to PNGs of the maps' own sizes.

    CHOICE (code): G works at the size it was trained for. Maps are resized to it (nearest), the
    picture back (bicubic).
    """
    device = common.pick_device(args.device)
    m = load_networks(args, device)
    z = random_style(1, args.z_seed, args)
    if args.exemplar:
        if not hasattr(m, "E"):
            raise UserError("--exemplar: needs the image encoder, give --encoder-weights FILE")
        z = style(m, common.to_tensor(common.open_rgb(args.exemplar))[None], device)
    files, out = common.list_pictures(args.translate), Path(args.out or "translated")
    insts = common.list_pictures(args.inst) if args.inst else []
    insts = dict(zip([f.stem for f in (insts if len(insts) > 1 else files)], insts, strict=False))
    size = args.size, args.height
    for f in files:
        labels = common.open_ids(f)
        check_ids(f, np.unique(np.asarray(labels)).tolist(), args)
        edges = torch.zeros(0, args.height, args.size)
        if args.edges:  # without instance maps, borders between labels are what is known
            if insts and f.stem not in insts:
                raise UserError(f"--inst {args.inst}: no map named {f.stem}")
            inst = common.open_ids(insts[f.stem]) if insts else labels
            edges = border(inst.resize(size, Image.NEAREST))
        small = to_labels(labels.resize(size, Image.NEAREST), args)
        picture = common.to_pil(synthesise(m, small[None], edges[None], z, args, device)[0])
        target = out / f"{f.stem}.png"
        if target.resolve() == f.resolve():
            raise UserError(f"--out {out}: {f} would be overwritten, choose another folder")
        try:
            out.mkdir(parents=True, exist_ok=True)
            picture.resize(labels.size, Image.BICUBIC).save(target)
        except OSError as error:
            raise UserError(f"--out {out}: cannot write there ({error})") from None
    print(f"{len(files)} painted: {target if len(files) == 1 else out}")


# ---- scores --------------------------------------------------------------------------------------


def counted(labels, args):
    """Labels with -1 where --evaluate does not count: unlabelled and --ignore."""
    skip = {*args.ignore, args.labels if apart(args) else args.unlabelled} - {None}
    return torch.where(torch.isin(labels, torch.tensor([*skip], dtype=torch.long)), -1, labels)


def mean_colours(pairs, args):
    """(classes, 3): the mean colour of each label over the training pictures."""
    labels, _, x = test_batch(pairs, args, limit=200)
    n = channels(args)[0]
    count = torch.bincount(labels.flatten(), minlength=n).clamp(min=1)
    return torch.stack([torch.bincount(labels.flatten(), x[:, c].flatten(), minlength=n) / count
                        for c in range(3)], dim=1)


def label_scores(m, x_hat, test, pairs, args, device):
    """mIoU and accuracy in % of pictures x_hat painted from the test maps, beside real ones and
    flat, by a small segmentation network that is trained on the real pictures `pairs`."""
    segmenters, data = common.lab("segmenters", "--evaluate"), LabelledPictures(pairs, args)
    labels, _, x = test
    print(f"segmentation network: {args.segmenter or 'a small FCN'}, trained on the real pictures")

    def sample(n):
        labels, _, x = data[n]
        return x, counted(labels, args)

    net = segmenters.train(sample, args.labels, device, args.segmenter_steps, args.seed,
                           args.segmenter)
    flat = mean_colours(pairs, args)[labels].permute(0, 3, 1, 2)
    rows = [segmenters.scores(segmenters.confusion(segmenters.segmented(net, p, device),
                                                   counted(labels, args), args.labels))
            for p in (x_hat, x, flat)]
    return [{"name": name, "value": 100 * rows[0][name], "better": "higher",
             "trivial": {"real pictures": 100 * rows[1][name],
                         "mean colour per class": 100 * rows[2][name]}}
            for name in ("mIoU", "accuracy")]


def truth_scores(m, root, args, device):
    """Scores against the toy world's true answers, beside the trivial ones'."""
    pairs, held_out = (find_pairs(root, split, args.edges) for split in ("train", args.split))
    test = labels, edges, x = test_batch(held_out, args)
    paint = functools.partial(synthesise, m, labels, edges, args=args, device=device)
    answers = {"z": paint(random_styles(len(x), args))}
    if args.input == "encoder":
        z = style(m, x, device)
        answers = {"own style": paint(z), "another's style": paint(z.roll(-1, 0))} | answers
    scores = common.lab("toy", "--data toy").scene_scores(
        answers, labels.numpy(), root, mean_colours(pairs, args).numpy(), args.split)
    return scores + label_scores(m, next(iter(answers.values())), test, pairs, args, device)


def evaluate(args):
    """mIoU, pixel accuracy, FID (Sec. 2.4) at the training size; on toy data the truth scores.

    With --input encoder each picture is painted in its own style, as the code does.
    """
    device = common.pick_device(args.device)
    m = load_networks(args, device)
    root = data_folder(args)
    if args.data == "toy":
        common.print_scores(truth_scores(m, root, args, device))
        return
    pairs, held_out = (find_pairs(root, split, args.edges) for split in ("train", args.split))
    check_pairs(held_out, args)
    test = labels, edges, x = test_batch(held_out, args)
    z = style(m, x, device) if hasattr(m, "E") else random_styles(len(x), args)
    x_hat = synthesise(m, labels, edges, z, args, device)
    common.print_scores(label_scores(m, x_hat, test, pairs, args, device))
    fid = common.lab("metrics", "--evaluate").fid  # last, for its network may have to be fetched
    value = fid(x_hat.split(8), x.split(8), device, args.fid_weights)
    common.print_scores([{"name": f"FID ({len(x)} painted, {len(x)} real, 299x299)",
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
