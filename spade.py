"""SPADE: semantic image synthesis with spatially-adaptive normalisation (also known as GauGAN).

A generator turns a label map m (here sky, there grass) into a picture x_hat. Usual networks read
m at their first layer, and their normalisation layers wash it away: a map of one label alone is
uniform, and after instance normalisation that is 0, whichever label it was. SPADE lets m in
*after* each normalisation instead: gamma(m) and beta(m), one number per channel and place, scale
and shift what the layer has normalised. The first layer then need not see m; it may read a random
z, or the style z that an image encoder takes from another picture. Without places, and with one
label per picture, this is conditional batch norm; with a picture for m and N = 1, AdaIN (Sec. 2.3).

T. Park, M.-Y. Liu, T.-C. Wang, J.-Y. Zhu, "Semantic Image Synthesis with Spatially-Adaptive
Normalization", CVPR 2019 (arXiv 1903.07291). Numbers below are those of chapter 2 in T. Park,
"Machine Learning for Deep Image Manipulation", UC Berkeley 2021.

SYMBOLS      paper                 here              shape
             m                     m                 (B, L, H, W) one-hot, and instance edges
             x, generated x        x, x_hat          (B, 3, H, W) in [-1, 1]
             h^i                   h                 (B, C, H_i, W_i), input of layer i
             gamma^i(m), beta^i(m) gamma, beta       (B, C, H_i, W_i)
             mu^i, sigma^i         inside Spade.norm (C)
             z; mu, sigma of q     z; mu, logvar     (B, 256); sigma^2 = e^logvar

OBJECTIVE    Eq. (2.1)  gamma_cyx(m) (h_ncyx - mu_c) / sigma_c + beta_cyx(m)
             Eq. (2.2)  mu_c = mean of h_ncyx over n, y, x
             Eq. (2.3)  sigma_c^2 = mean of h_ncyx^2 - mu_c^2 over n, y, x
             Sec. 2.6   G, E: L_GAN + 10 L_FM + 10 L_VGG + 0.05 L_KLD, L_GAN = -E D(m, x_hat),
                        L_FM and L_VGG as in pix2pixHD, L_KLD = D_KL(q(z|x) || N(0, 1))
                        D: E max(0, 1 - D(m, x)) + E max(0, 1 + D(m, x_hat))

CHOICES      where the text is silent, or differs from what the authors ran (their released code):
             gamma is 1 + gamma in the code, since it starts near 0. sigma^2 gets 1e-5 more here, as
             in the code on one GPU and when painting; on eight it took max(sigma^2, 1e-5).
             Adam's beta_2 0.999 is 0.9 in the code; the first author confirmed 0.9.
             "Spectral norm on all layers" spares the ends of G and D and SPADE's own convolutions
             in the code; "Glorot" is 0.02 times it there, and PyTorch's default elsewhere: that is
             what the code did on GPUs. The text's words: --init glorot.
             "The same multi-scale D" has three scales in pix2pixHD and two in the code. The code's
             GAN loss is the mean over scales; feature matching weighs 10 / 2 on every activation;
             VGG sees [-1, 1] as it is; an instance map's edges are one more channel of m.
             The code paints anew, with the updated G, for D's step. Here D learns from G's x_hat:
             one pass of G less, and its batch statistics move once in a step, not twice.
             KL is summed over z and averaged over pictures; the code sums over a GPU's 4 pictures
             too, which is --lambda-kld 0.2 here. The encoder's style is its mean when painting.
             A falling rate is named for Cityscapes and ADE20K only: COCO-Stuff and Flickr keep it.
             G starts at 8x8 for 256 pixels, as in the code; Fig. 2.12 draws 4x4 (--doublings 6).

USAGE        python spade.py                                  # toy world, scores at the end
             python spade.py --data mydata [--input encoder]  # {train,test}_{img,label[,inst]}
             python spade.py --translate map.png --weights last.pt [--exemplar style.jpg]
EXPECT       python spade.py: 10 minutes of a slow core, 8 for the networks that score it (seeds 0
             to 2): colours 9 grey levels from the truth in the own and in another's style (mean
             colour per class 36), in z's own styles 14 (18); mIoU 60 to 65, below what flat colours
             get (84): grass and far trees are blurred. L_D 1.43 (chance 2), L_KLD 10: z is used.
"""

import argparse
import functools
import math
import os
import random
import re
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils import parametrizations, parametrize

import common
from common import InstanceNorm, Run, UserError, full

# ==== 1. Configuration ========================================================================

KNOWN = {"ade20k": ("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",)}
LAYOUT = ("train_img/ train_label/ (and test_img/ test_label/; optional train_inst/ test_inst/) "
          "with pictures and label maps of the same names, Cityscapes' leftImg8bit/ gtFine/, or "
          "ADE20K's images/ annotations/")
KINDS = {  # Sec. 2.4, 2.6, by how a data set's name begins; ids as the released networks have them
    # CHOICE (code): ADE20K's maps are used as they are: 0 unknown, 1 to 150 the classes.
    "ade20k": {"labels": 151, "unlabelled": [0]},  # ADE20K-outdoor, too
    "cityscapes": {"labels": 35, "edges": True, "size": 512, "height": 256, "load": 1,
                   "doublings": 6,
                   "unlabelled": [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 34]},
    "coco": {"labels": 182, "unlabelled": [255], "edges": True, "epochs": 100, "decay_from": 1.0},
    "flickr": {"labels": 182, "unlabelled": [255], "epochs": 50, "decay_from": 1.0},
    "camvid": {"labels": 11, "unlabelled": [11]},  # ours: not in the text, nothing released
}
TOY = {  # no term of the objective differs
    "labels": 7, "edges": True, "input": "encoder",
    "size": 64, "load": 1, "batch": 4, "steps": 700,     # minutes on a laptop: small and short, ...
    "ngf": 16, "ndf": 16, "hidden": 32, "z": 16,         # ... so narrower and ...
    "lr_G": 5e-4, "lr_D": 2e-3, "init": "glorot",        # ... faster
    "doublings": 4, "d_layers": 3,                       # G starts at 4x4, D sees 34 pixels
    "vgg": "random", "vgg_layers": 2, "lambda_vgg": 150.0,  # two layers weigh as much as all five
    "workers": 0, "sample_every": 350}


def get_args(argv=None):
    """Flags in layers: paper's defaults < data set or toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--size", type=int, default=256, help="width of a training crop (Sec. 2.6)")
    add("--height", type=int, help="its height, if not square (Cityscapes 512x256)")
    add("--load", type=int, help="width before the crop (286/256 of --size; 1: no crop)")
    add("--labels", type=int, help="label ids are 0 ... N-1 (counted if not given)")
    add("--unlabelled", type=int, nargs="*", default=[], metavar="ID", help="ids that --evaluate "
        "does not count; those beyond the labels share a channel of their own")
    add("--edges", action=switch, default=False, help="add the borders of *_inst as a channel")
    add("--batch", type=int, default=32, help="pictures per step and process (32 in all: Sec. 2.6)")
    add("--epochs", type=int, default=200, help="passes over the data (Sec. 2.6)")
    add("--steps", type=int, help="updates in all; overrides --epochs")
    add("--decay-from", type=float, default=0.5, help="fraction of the run with a constant rate")
    add("--lr-G", type=float, default=1e-4, help="Adam's rate for G and E (Sec. 2.4)")
    add("--lr-D", type=float, default=4e-4, help="Adam's rate for D: two time scales (Sec. 2.4)")
    add("--beta2", type=float, default=0.9, help="Adam's second decay (0.999 in Sec. 2.4)")
    add("--init", choices=["released", "glorot"], default="released",
        help="first weights: as the code left them, or Glorot everywhere (Sec. 2.6)")
    add("--input", choices=["segmap", "random", "encoder"], default="segmap",
        help="Tab. 2.4: what the first layer reads: m, a random z, or E's z (Sec. 2.3, a VAE)")
    add("--ngf", type=int, default=64, help="width of G and E (Tab. 2.3, 2.4: 48, 80)")
    add("--ndf", type=int, default=64, help="width of D (Fig. 2.13)")
    add("--hidden", type=int, default=128, help="channels between m and gamma, beta (Fig. 2.10)")
    add("--kernel", type=int, choices=[1, 3, 5], default=3, help="of convolutions on m (Tab. 2.4)")
    add("--doublings", type=int, choices=[4, 5, 6, 7], default=5,
        help="how often G doubles its first side (Cityscapes 6, 512 pixels 7)")
    add("--z", type=int, default=256, help="length of z (Fig. 2.14)")
    add("--d-layers", type=int, default=4, help="of D before the last; Tab. 2.5's deeper D has 5")
    add("--lambda-fm", type=float, default=10.0, help="weight of L_FM (Tab. 2.5: 0)")
    add("--lambda-vgg", type=float, default=10.0, help="weight of L_VGG (Tab. 2.5: 0)")
    add("--lambda-kld", type=float, default=0.05, help="weight of L_KLD, --input encoder")
    add("--vgg", default="imagenet", help="network of L_VGG: imagenet, random, or a FILE")
    add("--vgg-layers", type=int, choices=range(1, 6), default=5, help="the first of its layers")
    add("--exemplar", metavar="FILE", help="--translate in this picture's style (else z of --seed)")
    add("--inst", metavar="PATH", help="instance map(s) of --translate, for --edges")
    add("--segmenter", metavar="FILE", help="--evaluate by this TorchScript network, or by our own,"
        " kept in FILE; pictures in [-1, 1] -> scores (B, labels, H, W)")
    add("--fid-weights", metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        def holds(sub):                                     # where `find_data` looks
            return any(Path(root, args.data, sub).is_dir() for root in ("", "datasets"))

        name = ("cityscapes" if holds("gtFine") else "ade20k" if holds("annotations/training")
                else Path(args.data).name.lower())
        kind = TOY if args.data == "toy" and not args.translate else next(
            (KINDS[kind] for kind in KINDS if name.startswith(kind)), {})
        share = max(1, 32 // int(os.environ.get("WORLD_SIZE", 1)))   # torchrun: 32 pictures in all
        return {"batch": share, "load": round(args.size * 286 / 256)} | kind

    args = common.parse_flags(p, argv, "spade", presets, run_name)
    args.height = args.height or args.size
    for flag, value in (("--size", args.size), ("--height", args.height)):
        if value % 2**args.doublings:
            raise UserError(f"{flag} {value}: must be a multiple of {2**args.doublings}")
    if args.batch * args.size * args.height == 4**args.doublings:
        raise UserError(f"--batch 1: G would start from a single place, which cannot be normalised;"
                        f" --batch 2, or a larger --size than {args.size}")
    if args.side:
        raise UserError("--side: maps are painted at the size of training, whatever theirs is")
    if args.labels is not None and not 1 <= args.labels <= 65536:
        raise UserError(f"--labels {args.labels}: must be between 1 and 65536")
    return args


def run_name(args):
    return f"spade-{Path(args.data).name}"


# ==== 2. Networks =============================================================================


class Spade(nn.Module):
    """SPADE (Fig. 2.10): h (B, C, H_i, W_i), m (B, L, H, W) -> (B, C, H_i, W_i).

    CHOICE (code): m is one-hot. A table of weights per label and place of the window computes the
    same; measured on one CPU thread (batch 2, 128 pixels, a quarter of the width) it takes as much
    memory, with 184 channels 4.3 s instead of 8.6 for a step, with 7 channels 3.0 instead of 2.2.
    """

    def __init__(self, channels, m_channels, hidden=128, kernel=3):
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(channels, affine=False)  # when painting: its running mu, sigma
        self.shared = conv(m_channels, hidden)
        self.gamma = conv(hidden, channels)
        self.beta = conv(hidden, channels)

    def forward(self, h, m):
        m = F.interpolate(m, h.shape[2:]) if m.shape[2:] != h.shape[2:] else m  # nearest neighbour
        shared = F.relu(self.shared(m))                                   # (B, 128, H_i, W_i)
        gamma, beta = self.gamma(shared), self.beta(shared)               # (B, C, H_i, W_i) each
        normalised = self.norm(h)               # (h - mu) / sigma: Eq. (2.2), Eq. (2.3)
        return (1 + gamma) * normalised + beta  # Eq. (2.1); CHOICE (code): 1 + gamma


def sn(conv):
    """The layer with its weight divided by its largest singular value (Sec. 2.4)."""
    return parametrizations.spectral_norm(conv)


class SpadeBlock(nn.Module):
    """SPADE ResBlk (Fig. 2.11): h (B, a, H_i, W_i), m -> (B, b, H_i, W_i)."""

    def __init__(self, a, b, spade):
        super().__init__()
        middle, self.skip_is_learned = min(a, b), a != b
        self.spade_0, self.conv_0 = spade(a), sn(nn.Conv2d(a, middle, 3, padding=1))
        self.spade_1, self.conv_1 = spade(middle), sn(nn.Conv2d(middle, b, 3, padding=1))
        if self.skip_is_learned:                      # the dashed box; CHOICE (code): 1x1, no bias
            self.spade_s, self.conv_s = spade(a), sn(nn.Conv2d(a, b, 1, bias=False))

    def forward(self, h, m):
        skip = self.conv_s(self.spade_s(h, m)) if self.skip_is_learned else h
        h = self.conv_0(F.leaky_relu(self.spade_0(h, m), 0.2))            # (B, min(a, b), H_i, W_i)
        h = self.conv_1(F.leaky_relu(self.spade_1(h, m), 0.2))            # (B, b, H_i, W_i)
        return skip + h


class Generator(nn.Module):
    """The decoder of SPADE ResBlks (Fig. 2.12): m (B, L, H, W), z (B, 256) or None ->
    x_hat (B, 3, H, W); 96.5 M parameters with ADE20K's 151 labels."""

    def __init__(self, args, m_channels):
        super().__init__()
        spade = functools.partial(Spade, m_channels=m_channels, hidden=args.hidden,
                                  kernel=args.kernel)
        c, n = 16 * args.ngf, args.doublings
        self.start, self.doublings = (args.height >> n, args.size >> n), n
        if args.input == "segmap":
            self.fc = nn.Conv2d(m_channels, c, 3, padding=1)
        else:
            self.fc = nn.Linear(args.z, c * self.start[0] * self.start[1])
        self.head = SpadeBlock(c, c, spade)
        self.middle_0 = SpadeBlock(c, c, spade)
        self.middle_1 = SpadeBlock(c, c, spade)
        self.up_0 = SpadeBlock(c, c // 2, spade)
        self.up_1 = SpadeBlock(c // 2, c // 4, spade)
        self.up_2 = SpadeBlock(c // 4, c // 8, spade)
        self.up_3 = SpadeBlock(c // 8, c // 16, spade)
        if n == 7:
            self.up_4 = SpadeBlock(c // 16, c // 32, spade)
        self.to_rgb = nn.Conv2d(c // 32 if n == 7 else c // 16, 3, 3, padding=1)

    def forward(self, m, z=None):
        def up(h):
            return F.interpolate(h, scale_factor=2)   # nearest neighbour

        if z is None:
            h = self.fc(F.interpolate(m, self.start))                     # (B, 1024, H/32, W/32)
        else:
            h = self.fc(z).unflatten(1, (-1, *self.start))
        h = self.head(h, m)
        h = self.middle_0(up(h) if self.doublings >= 5 else h, m)         # (B, 1024, H/16, W/16)
        h = self.middle_1(up(h) if self.doublings >= 6 else h, m)
        h = self.up_0(up(h), m)                                           # (B, 512, H/8, W/8)
        h = self.up_1(up(h), m)                                           # (B, 256, H/4, W/4)
        h = self.up_2(up(h), m)                                           # (B, 128, H/2, W/2)
        h = self.up_3(up(h), m)                                           # (B, 64, H, W)
        if self.doublings == 7:
            h = self.up_4(up(h), m)           # (B, 32, H, W): 7 doublings; those above are of 5
        return torch.tanh(self.to_rgb(F.leaky_relu(h, 0.2)))              # (B, 3, H, W)


class Encoder(nn.Module):
    """q(z|x) (Fig. 2.14): x (B, 3, H, W) -> mu, logvar (B, 256); 10.46 M parameters.

    x is resized to a square, then halved until it is 4x4. CHOICE: the square of the code is 256,
    which makes the six layers of the text; for less it is the largest power of two within --size.
    """

    def __init__(self, ngf=64, z=256, size=256):
        super().__init__()
        self.side = min(256, 2 ** int(math.log2(size)))
        widths = [3, *(ngf * min(2**i, 8) for i in range(int(math.log2(self.side)) - 2))]
        self.layers = nn.Sequential(*[
            nn.Sequential(sn(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False)), InstanceNorm(b),
                          nn.LeakyReLU(0.2)) for a, b in pairwise(widths)])
        self.mu, self.logvar = nn.Linear(16 * widths[-1], z), nn.Linear(16 * widths[-1], z)

    def forward(self, x):
        if x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear")
        h = self.layers(x).flatten(1)                                     # (B, 512 * 4 * 4)
        return full(self.mu(h)), full(self.logvar(h))


class Discriminator(nn.Module):
    """One scale (Fig. 2.13): m, x stacked, (B, L + 3, H, W) -> [activation of each layer, logits].

    A 70x70 PatchGAN. CHOICE (code): with a padding of 2 its maps have the sides 129, 65, 33, 34, 35
    for 256 pixels; the layer that the deeper D has more is a fourth one of stride 2.
    """

    def __init__(self, in_channels, ndf=64, layers=4):
        super().__init__()
        widths = [ndf * min(2**i, 8) for i in range(layers)]
        self.stages = nn.ModuleList([nn.Sequential(
            nn.Conv2d(in_channels, ndf, 4, stride=2, padding=2), nn.LeakyReLU(0.2, inplace=True))])
        for i, (a, b) in enumerate(pairwise(widths), start=2):
            self.stages.append(nn.Sequential(
                sn(nn.Conv2d(a, b, 4, stride=2 if i < layers else 1, padding=2, bias=False)),
                InstanceNorm(b), nn.LeakyReLU(0.2, inplace=True)))
        self.stages.append(nn.Conv2d(widths[-1], 1, 4, padding=2))

    def forward(self, x):
        outs = []
        for stage in self.stages:
            x = stage(x)
            outs.append(x)
        return outs


class MultiscaleDiscriminator(nn.Module):
    """D: m (B, L, H, W), x (B, 3, H, W) -> for each scale, the finest first, what a `Discriminator`
    returns."""

    def __init__(self, m_channels, args, scales=2):   # CHOICE (code): 2, where pix2pixHD has 3
        super().__init__()
        self.scales = nn.ModuleList(Discriminator(m_channels + 3, args.ndf, args.d_layers)
                                    for _ in range(scales))

    def forward(self, m, x):
        pyramid = [torch.cat([m, x], dim=1)]
        for _ in self.scales[1:]:
            pyramid.append(F.avg_pool2d(pyramid[-1], 3, 2, 1, count_include_pad=False))
        return [D(level) for D, level in zip(self.scales, pyramid, strict=True)]


def m_channels(args):
    """How many channels m has: the labels, maybe one for the unlabelled, maybe the edges."""
    return args.labels + any(i >= args.labels for i in args.unlabelled) + args.edges


def init_weights(net, scheme):
    """First weights, in place: 'glorot' (Sec. 2.6), or 'released', which is 0.02 times Glorot, but
    PyTorch's U(+-1/sqrt(fan-in)) in spectrally normalised layers; biases 0.

    CHOICE: the code asks for the former everywhere but misses those layers once a network is on a
    GPU. The function is the same (their scale is divided out), Adam's relative step is not.
    """
    common.init_weights(net, "xavier", 1.0 if scheme == "glorot" else 0.02)
    for layer in net.modules():
        if scheme == "released" and parametrize.is_parametrized(layer):
            nn.init.kaiming_uniform_(layer.parametrizations.weight.original, math.sqrt(5))
    return net


def generator(args):
    return Generator(args, m_channels(args))


def build(args, device):
    """G, D, maybe E and VGG-19, and the two Adams (E learns with G)."""
    torch.manual_seed(args.seed)
    nets = SimpleNamespace(G=generator(args), D=MultiscaleDiscriminator(m_channels(args), args))
    if args.input == "encoder":
        nets.E = Encoder(args.ngf, args.z, args.size)
    for net in vars(nets).values():
        init_weights(net, args.init)
    if args.lambda_vgg > 0:  # CHOICE (code): pictures in [-1, 1] as they are
        nets.vgg = common.VGG([*VGG_WEIGHTS][:args.vgg_layers], args.vgg, normalise=False)
    if dist.is_initialized() and device.type == "cuda":  # Sec. 2.4; PyTorch has it for GPUs only:
        nets.G = nn.SyncBatchNorm.convert_sync_batchnorm(nets.G)  # on CPUs each takes its own mu
    for net in vars(nets).values():
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
        if args.compile:
            net.compile()
    adam = functools.partial(torch.optim.Adam, betas=(0.0, args.beta2),              # Sec. 2.4
                             fused=device.type in ("cuda", "cpu"))
    E = nets.E.parameters() if args.input == "encoder" else []
    nets.opt_G = adam([*nets.G.parameters(), *E], lr=args.lr_G)
    nets.opt_D = adam(nets.D.parameters(), lr=args.lr_D)
    return nets


# ==== 3. Losses ===============================================================================

CHANCE = {"L_GAN": 0.0, "L_D": 2.0, "L_KLD": 0.0}  # D = 0 everywhere; a z that tells nothing of x
VGG_WEIGHTS = {"relu1_1": 1 / 32, "relu2_1": 1 / 16, "relu3_1": 1 / 8, "relu4_1": 1 / 4,
               "relu5_1": 1.0}  # pix2pixHD's


def hinge(outs, real):
    """D's hinge loss (Sec. 2.6), one expectation: E max(0, 1 - D) of real pictures, E max(0, 1 + D)
    of others. outs: what D returns; CHOICE (code): the mean over scales, where pix2pixHD sums."""
    sign = -1 if real else 1
    return torch.stack([F.relu(1 + sign * full(scale[-1])).mean() for scale in outs]).mean()


def hinge_G(outs):
    """G's side of it (Sec. 2.6): -E D."""
    return torch.stack([-full(scale[-1]).mean() for scale in outs]).mean()


def feature_matching(fake, real):
    """pix2pixHD's L_FM: mean over scales of the sum over layers of mean |D^j(fake) - D^j(real)|.

    fake, real: what D returns; the logits do not count, and no gradient reaches `real`.
    """
    layers = [(full(f) - full(r).detach()).abs().mean()
              for fakes, reals in zip(fake, real, strict=True)
              for f, r in zip(fakes[:-1], reals[:-1], strict=True)]
    return torch.stack(layers).sum() / len(fake)


def perceptual(vgg, x_hat, x):
    """pix2pixHD's L_VGG: sum over layers of weight * mean |V(x_hat) - V(x)|; constant in x."""
    with torch.no_grad():
        target = vgg(x)
    return torch.stack([VGG_WEIGHTS[layer] * (full(v) - full(target[layer])).abs().mean()
                        for layer, v in vgg(x_hat).items()]).sum()


def kl_divergence(mu, logvar):
    """L_KLD (Sec. 2.6): D_KL(N(mu, e^logvar) || N(0, 1)), summed over z, mean over pictures."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(dim=1).mean()


# ==== 4. Data =================================================================================

PLACES = [  # of pictures, label maps, instance maps; and what they call our splits
    ("{}_img/*", "{}_label/*", "{}_inst/*", {"train": "train", "test": "test", "val": "val"}),
    ("{}_img/*", "{}_label/*", "{}_inst/*", {"test": "val"}),  # where there is no other
    ("leftImg8bit/{}/*/*", "gtFine/{}/*/*_labelIds.png", "gtFine/{}/*/*_instanceIds.png",
     {"train": "train", "test": "val", "val": "val"}),  # the maps of its own test split are blank
    ("images/{}/*", "annotations/{}/*", "annotations_instance/{}/*",
     {"train": "training", "test": "validation", "val": "validation"})]


def find_pairs(root, split, edges=False):
    """[(picture, label map, instance map or None)] of a split, by name; `UserError` if unmatched.

    Where there is no test split, the training pictures stand in, and a printed line says so.
    """
    for image, label, inst, names in PLACES:
        files = [[f for f in sorted(Path(root).glob(place.format(names.get(split))))
                  if f.suffix.lower() in common.SUFFIXES and f.name[0] != "."]
                 for place in (image, label, inst)]
        found = [{re.sub("_(leftImg8bit|gtFine_.*)$", "", name): f
                  for name, f in common.by_name(part).items()} for part in files]
        if found[0] or found[1]:
            images, labels, insts = found
            for have, other, what in ((images, labels, "label map"), (labels, images, "picture"),
                                      (images, insts if edges else images, "instance map")):
                if lonely := sorted(have.keys() - other.keys()):
                    raise UserError(f"{have[lonely[0]]}: has no {what} of that name ({len(lonely)} "
                                    f"without in {split})")
            return [(images[k], labels[k], insts[k] if edges else None) for k in images]
    if split == "test":
        pairs = find_pairs(root, "train", edges)
        print(f"{root} has no test pictures: these are training pictures")
        return pairs
    raise UserError(f"{root}: no {split} pictures with label maps; expected {LAYOUT}")


def check_pairs(pairs, args):
    """Before training: sizes agree and ids are in range; fills in args.labels if it is None."""
    def look(pair):
        maps = [common.open_ids(ids, of=pair[0]) for ids in filter(None, pair[1:])]
        return np.unique(np.asarray(maps[0])).tolist()

    with ThreadPool(max(1, args.workers)) as pool:  # Pillow decodes outside the interpreter's lock
        found = pool.map(look, pairs, chunksize=8)
    if args.labels is None:
        args.labels = 1 + max({i for ids in found for i in ids} - {*args.unlabelled}, default=0)
        if args.labels > 200:
            raise UserError(f"{pairs[0][1].parent}: ids up to {args.labels - 1}; give --labels N, "
                            "and --unlabelled 255 if 255 marks unlabelled pixels")
        print(f"--labels {args.labels}: the ids found in {len(pairs)} label maps")
    for pair, ids in zip(pairs, found, strict=True):
        check_ids(pair[1], ids, args)


def check_ids(path, ids, args):
    """`UserError` if a map has ids that are neither below --labels nor --unlabelled."""
    if wrong := [i for i in ids if not 0 <= i < args.labels and i not in args.unlabelled]:
        raise UserError(f"{path}: label ids {wrong[:8]} out of range: expected 0 to "
                        f"{args.labels - 1} (--labels), or --unlabelled {args.unlabelled}")


def to_labels(im, args):
    """A checked map of ids -> (H, W); what is beyond the labels is unlabelled, and shares an id."""
    return torch.from_numpy(np.array(im).astype(np.int64)).clamp(max=args.labels)


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
    CHOICE (code): the aspect ratio is not kept. augment=False: in order, at the training size.
    """

    def __init__(self, pairs, args, augment=True):
        self.pairs, self.args, self.augment = pairs, args, augment

    def __getitem__(self, n):
        args, rng = self.args, random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.pairs))
        if self.augment:
            i = common.shuffled(len(self.pairs), common.mix(args.seed, "epoch", epoch))[i]
        image, label, inst = self.pairs[i]
        w, h = args.size, args.height
        big = max(args.load, w) if self.augment else w
        big = big, round(h * big / w)
        left, top = rng.randint(0, big[0] - w), rng.randint(0, big[1] - h)
        mirror = self.augment and rng.random() < 0.5

        def fit(im, method):
            im = im.resize(big, method).crop((left, top, left + w, top + h))
            return im.transpose(Image.FLIP_LEFT_RIGHT) if mirror else im

        edges = torch.zeros(0, h, w)
        if args.edges:
            edges = border(fit(common.open_ids(inst), Image.NEAREST))
        return (to_labels(fit(common.open_ids(label), Image.NEAREST), args), edges,
                common.to_tensor(fit(common.open_rgb(image), Image.BICUBIC)))

    def __len__(self):
        return len(self.pairs)


def one_hot(labels, edges, args):
    """m (B, L, H, W) of labels (B, H, W) and edges (B, 0 or 1, H, W), made where they are used."""
    m = edges.new_zeros(len(labels), m_channels(args) - args.edges, *labels.shape[1:])
    m = torch.cat([m.scatter_(1, labels[:, None], 1.0), edges], dim=1)
    return m.contiguous(memory_format=torch.channels_last) if args.channels_last else m


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("scenes", args.size)
    return common.find_data(args.data, LAYOUT, KNOWN, draw_toy)


# ==== 5. One training step ====================================================================


def train_step(nets, m, x, args, rng):
    """One update of G and E, then one of D, on m (B, L, H, W), x (B, 3, H, W); losses by name.

    rng: CPU generator of the noise in z.
    """
    G, D = nets.G, nets.D
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=args.amp)

    # ---- G and E: fool D, and come near to x in the features of D and of VGG --------------------
    D.requires_grad_(False)                               # it judges here, and learns below
    z, L_VGG, L_KLD = None, torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    if args.input != "segmap":
        z = torch.randn(len(x), args.z, generator=rng).to(x)              # (B, 256) from p(z)
    with autocast():
        if args.input == "encoder":                                       # Fig. 2.15: x's own style
            mu, logvar = nets.E(x)                                        # (B, 256) each
            z = mu + (logvar / 2).exp() * z                               # z ~ q(z|x)
            L_KLD = kl_divergence(mu, logvar)
        x_hat = G(m, z)                                                   # (B, 3, H, W)
        fake = D(m, x_hat)                                # [[4 activations, logits]] of two scales
        with torch.no_grad():
            real = D(m, x)
        if args.lambda_vgg > 0:
            L_VGG = perceptual(nets.vgg, x_hat, x)
    L_GAN, L_FM = hinge_G(fake), feature_matching(fake, real)
    L = (L_GAN + args.lambda_fm * L_FM + args.lambda_vgg * L_VGG          # Sec. 2.6
         + args.lambda_kld * L_KLD)
    nets.opt_G.zero_grad()
    L.backward()
    nets.opt_G.step()

    # ---- D: real above 1, painted below -1 (x_hat detached: G learns nothing here) --------------
    D.requires_grad_(True)
    with autocast():
        L_D = hinge(D(m, x), real=True) + hinge(D(m, x_hat.detach()), real=False)    # Sec. 2.6
    nets.opt_D.zero_grad()
    L_D.backward()
    nets.opt_D.step()
    losses = {"L_GAN": L_GAN, "L_FM": L_FM, "L_D": L_D}
    losses |= {"L_VGG": L_VGG} if args.lambda_vgg > 0 else {}
    return losses | ({"L_KLD": L_KLD} if args.input == "encoder" else {})


# ==== 6. Training loop ========================================================================


def rate(step, total, decay_from):
    """Factor of both rates: 1, then linearly to 0 (Sec. 2.6). CHOICE: it falls with every step, as
    the code's did with every epoch: from 1 in the first of the decaying ones to 1/n in the n-th."""
    constant = int(decay_from * total)
    return 1.0 if step < constant else (total - step) / (total - constant)


def train(args):
    root = data_folder(args)
    pairs, held_out = (find_pairs(root, split, args.edges) for split in ("train", args.split))
    check_pairs(pairs, args)  # before `Run`, which keeps a copy of args: may set args.labels
    check_pairs(held_out, args)
    run = Run("spade", args, CHANCE)
    data = LabelledPictures(pairs, args)
    total = args.steps or args.epochs * max(1, len(data) // (args.batch * run.world))
    show = test_batch(held_out, args, limit=6)
    nets = build(args, run.device)
    run.resume_or_start({name: part for name, part in vars(nets).items() if name != "vgg"})
    for step, (labels, edges, x) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(nets, show, args))
        factor = rate(step, total, args.decay_from)
        nets.opt_G.param_groups[0]["lr"] = factor * args.lr_G
        nets.opt_D.param_groups[0]["lr"] = factor * args.lr_D
        # not run.rng(), which all processes share: each is to draw a z of its own
        rng = torch.Generator().manual_seed(common.mix(args.seed, step, run.rank))
        run.log(train_step(nets, one_hot(labels, edges, args), x, args, rng))
    run.save_samples(sample_columns(nets, show, args))
    run.finish(truth_scores(nets, root, args, run.device)
               if args.data == "toy" and run.rank == 0 else [])


# ==== 7. Translate and evaluate ===============================================================


def test_batch(pairs, args, limit=None):
    """labels (N, H, W), edges, x (N, 3, H, W) at the training size; limit: evenly spaced ones."""
    n = min(limit or len(pairs), len(pairs))
    data = LabelledPictures([pairs[i * len(pairs) // n] for i in range(n)], args, augment=False)
    return [torch.stack(part) for part in zip(*(data[i] for i in range(n)), strict=True)]


@torch.no_grad()
def paint(nets, maps, z, args):
    """G(m, z) (N, 3, H, W) on the CPU, in test mode, for maps = (labels (N, H, W), edges, ...) and
    z (N, 256) or None."""
    device, pictures = next(nets.G.parameters()).device, []
    nets.G.eval()
    for i in range(0, len(maps[0]), 8):
        part = slice(i, i + 8)
        m = one_hot(maps[0][part].to(device), maps[1][part].to(device), args)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            x_hat = nets.G(m, None if z is None else z[part].to(device))
        pictures.append(x_hat.float().cpu())
    nets.G.train()
    return torch.cat(pictures)


@torch.no_grad()
def style(nets, x):
    """The mean of q(z|x) for pictures (N, 3, H, W) -> (N, 256) on the CPU; test mode."""
    device = next(nets.E.parameters()).device
    nets.E.eval()
    mu = torch.cat([nets.E(picture.to(device))[0].cpu() for picture in x.split(1)])
    nets.E.train()
    return mu


def random_styles(n, args):
    """n different z from the prior N(0, 1) (Fig. 2.9), or None where G reads none."""
    rng = torch.Generator().manual_seed(args.seed)
    return None if args.input == "segmap" else torch.randn(n, args.z, generator=rng)


def answers(nets, test, args):
    """{style: G(m)} for test = (labels, edges, x): in x's own style, in that of the next x, in a
    random one for each map, as far as G has styles."""
    styles = {"z" if args.input != "segmap" else "G(m)": random_styles(len(test[2]), args)}
    if hasattr(nets, "E"):
        mu = style(nets, test[2])
        styles = {"own style": mu, "another's style": mu.roll(-1, 0)} | styles
    return {name: paint(nets, test, z, args) for name, z in styles.items()}


def sample_columns(nets, show, args):
    """Columns of a sample grid: m, x, and G(m) in the styles there are."""
    return {"m": colour_map(show[0]), "x": show[2]} | answers(nets, show, args)


def colour_map(labels):
    """Labels (N, H, W) as pictures (N, 3, H, W): well-spread hues, alternately light and dark."""
    i = torch.arange(int(labels.max()) + 1)
    hue = (i * 0.618 % 1)[:, None] + torch.tensor([0, 1 / 3, 2 / 3])
    colours = 0.8 * torch.cos(2 * math.pi * hue) + 0.2 * (-1.0) ** i[:, None]
    return colours.clamp(-1, 1)[labels].permute(0, 3, 1, 2)


def load_networks(args, device):
    """G (and E) from --weights: our checkpoint, or the authors' released files."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script or the authors' file")
    state = common.load_file(args.weights)
    if isinstance(state, dict) and "method" in state:
        nets = SimpleNamespace(G=generator(args))
        if args.input == "encoder":
            nets.E = Encoder(args.ngf, args.z, args.size)
        common.load_parts(vars(nets), state["parts"], args.weights)
    else:
        nets = common.lab("released", "a file of the authors'").spade(state, args.weights, args)
    for net in vars(nets).values():
        net.to(device)
    return nets


def translate_files(args):
    """Paint --translate (a label map or a folder of them) to PNGs of the maps' own sizes.

    CHOICE (code): G works at the size it was trained for. Maps are resized to it (nearest), the
    picture back (bicubic).
    """
    device = common.pick_device(args.device)
    nets = load_networks(args, device)
    if args.inst and not args.edges:
        raise UserError("--inst: only a network trained with --edges reads an instance map")
    if args.exemplar and not hasattr(nets, "E"):
        raise UserError("--exemplar: only a network trained with --input encoder has a style")
    z, size = random_styles(1, args), (args.size, args.height)
    if args.exemplar:  # resized as in training: E's own resizing would alias a large photo
        x = common.open_rgb(args.exemplar).resize(size, Image.BICUBIC)
        z = style(nets, common.to_tensor(x)[None])

    def picture(f):
        labels, edges = common.open_ids(f), torch.zeros(1, 0, args.height, args.size)
        check_ids(f, np.unique(np.asarray(labels)).tolist(), args)
        if args.edges:                                            # without --inst: of the labels
            inst = Path(args.inst or f)
            inst = common.open_ids(inst / f.name if inst.is_dir() else inst, of=f)
            edges = border(inst.resize(size, Image.NEAREST))[None]
        small = to_labels(labels.resize(size, Image.NEAREST), args)
        painted = paint(nets, (small[None], edges), z, args)[0]
        return common.to_pil(painted).resize(labels.size, Image.BICUBIC)

    keep = [f for p in (args.exemplar, args.inst) if p for f in common.list_pictures(p)]
    files, out = common.list_pictures(args.translate), args.out or "translated"
    common.paint_files(files, out, picture, keep)


def truth_scores(nets, root, args, device):
    """Scores against the toy world's true answers, beside the trivial ones'."""
    pairs, held_out = (find_pairs(root, split, args.edges) for split in ("train", args.split))
    test = test_batch(held_out, args)
    return common.lab("toy", "--data toy").painted_scene_scores(
        answers(nets, test, args), test, LabelledPictures(pairs, args), root, args.split, device)


def evaluate(args):
    """mIoU, pixel accuracy, FID (Sec. 2.4) at the training size; on toy data the true scores.

    Each picture is painted in its own style, as in the code; without E, with a z of its own.
    """
    device = common.pick_device(args.device)
    nets, root = load_networks(args, device), data_folder(args)
    if args.data == "toy":
        return common.print_scores(truth_scores(nets, root, args, device))
    pairs, held_out = (find_pairs(root, split, args.edges) for split in ("train", args.split))
    check_pairs(held_out, args)
    test = test_batch(held_out, args)
    x = test[2]
    z = style(nets, x) if hasattr(nets, "E") else random_styles(len(x), args)
    x_hat = paint(nets, test, z, args)
    common.print_scores(common.lab("toy.reading", "--evaluate").label_scores(
        x_hat, test, LabelledPictures(pairs, args), args.labels, args.unlabelled, device,
        [args.segmenter]))
    fid = common.lab("metrics", "--evaluate").fid  # last, for its network may have to be fetched
    value = fid(x_hat.split(8), x.split(8), device, args.fid_weights)
    common.print_scores([{"name": f"FID ({len(x)} painted, {len(x)} real, 299x299)",
                          "value": value, "better": "lower"}])


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
