"""CUT: unpaired image translation by making patches find their own input (also FastCUT, SinCUT).

A generator turns x (a horse) into y_hat (a zebra) that a discriminator cannot tell from real ones.
What keeps y_hat faithful to x? Every patch of y_hat must be recognisable, among many patches of
the *same* input, as the one that stands at its place: a 256-way classification in feature space
whose features are those that the generator's own encoder computes anyway. No second generator, no
cycle, one direction. FastCUT drops the identity term; SinCUT trains on one picture per domain.

T. Park, A. A. Efros, R. Zhang, J.-Y. Zhu, "Contrastive Learning for Unpaired Image-to-Image
Translation", ECCV 2020 (arXiv 2007.15651). Numbers below are those of chapter 3.3 in T. Park,
"Machine Learning for Deep Image Manipulation", UC Berkeley 2021.

SYMBOLS      paper                 here              shape
             x, y                  x, y              (B, 3, H, W) in [-1, 1], unpaired
             y_hat = G(x)          y_hat             (B, 3, H, W)
             G = G_dec(G_enc(x))   G.encode, decoder five feature maps (B, C_l, H_l, W_l)
             H_l, two-layer MLP    H                 (B, S, C_l) -> (B, S, 256), unit rows
             v = z_hat_l^s         q (query)         (B, S, 256), from the output
             v+, v- = z_l          k (keys)          (B, S, 256), from the input
             Z^-                   bank              (16384, 256), keys of earlier pictures
             tau                   args.tau          0.07

OBJECTIVE    Eq. (3.5)  L_GAN(G, D) = E log D(y) + E log(1 - D(G(x))); least squares in CUT
             Eq. (3.6)  l(v, v+, v-) = -log [e^(v.v+/tau) / (e^(v.v+/tau) + sum_n e^(v.v-_n/tau))]
             Eq. (3.7)  L_PatchNCE(G, H, X) = E_x sum_l sum_s l(z_hat_l^s, z_l^s, z_l^(S \\ s))
             Eq. (3.8)  L_external(G, H, X) = the same with negatives from Z^- (an ablation)
             Eq. (3.9)  L_GAN + lambda_X L_PatchNCE(G, H, X) + lambda_Y L_PatchNCE(G, H, Y)

CHOICES      where the text is silent, or differs from what the authors ran (their released code):
             lambda_X = lambda_Y = 1 in the text, but the code averages the two terms: 0.5 each.
             Sums over layers and places in Eq. (3.7) are means in the code: so here.
             Learning rate 0.002 in the text is 0.0002 in the code (0.002 for SinCUT only).
             The code's networks downsample by a blur (anti-aliasing), which alone gives the text's
             receptive fields 1, 9, 15, 35, 99; D then sees 84 pixels. As printed: --no-antialias-G
             --no-antialias-D.
             "RGB pixels" is the picture; the code taps its reflection-padded copy.
             The loss of D is halved in the code; keys are detached in the code.
             SinCUT: 128-pixel crops in 64-pixel tiles (text); the code's 64-pixel crops are
             --size 64. One patch per crop, negatives from the other crops, lambda 4 halved, and a
             pixel identity loss of weight 1 are the code's. The scale is the text's.

USAGE        python cut.py                                    # toy world, a score at the end
             python cut.py --data horse2zebra [--mode fastcut]
             python cut.py --translate photo.jpg --weights runs/cut-horse2zebra/last.pt
EXPECT       python cut.py: about 3.5 minutes on two CPU cores; coat error about 18 (copying the
             input 59, mean coat colour 51), background error about 14 (mean colour 41).
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
from common import BlurDown, InstanceNorm, PatchGAN, Run, UserError

LAYOUT = "trainA/ trainB/ (and testA/ testB/) with pictures, or train/A train/B test/A test/B"

# =============================================================================================
# 1. Configuration
# =============================================================================================

MODES = {  # Sec. 3.3.2; the parser's own defaults are CUT's
    "cut": {},
    "fastcut": {"epochs": 200, "decay_from": 0.75, "lambda_X": 10.0, "lambda_Y": 0.0,
                "flip_equivariance": True},
    "sincut": {"size": 128, "batch": 16, "steps": 100_000, "lr": 2e-3, "beta1": 0.0,
               "beta2": 0.99, "ngf": 10, "ndf": 8, "blocks": 6, "lambda_X": 2.0, "lambda_Y": 2.0,
               "lambda_identity": 1.0, "nce_layers": [0, 1, 3], "patches": 1,
               "negatives": "minibatch"},
}
TOY = {"size": 64, "load": 64, "batch": 2, "steps": 2500, "lr": 1e-3, "ngf": 16, "ndf": 32,
       "blocks": 4, "antialias_G": False, "init": "normal", "patches": 64, "workers": 0,
       "sample_every": 500}
TOY_MODES = {  # what learns fastest in minutes; SinCUT's L1 identity settles CUT's colours early
    "cut": TOY | {"lambda_X": 2.0, "lambda_Y": 2.0, "lambda_identity": 10.0},
    "fastcut": TOY | {"lr": 5e-4, "lambda_X": 2.0},
    "sincut": {"size": 64, "tile": 32, "batch": 4, "steps": 600, "ngf": 4, "ndf": 4,
               "scale": [128, 256], "workers": 0, "sample_every": 100},
}


def get_args(argv=None):
    """Flags in layers: CUT's defaults < --mode < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--mode", choices=list(MODES), default="cut", help="Sec. 3.3.2: cut, fastcut or sincut")
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB", help="which domain is the input")
    add("--size", type=int, default=256, help="training crop (Sec. 3.2.4; SinCUT 128)")
    add("--load", type=int, default=286, help="pictures are resized to this before the crop")
    add("--keep-aspect", action=switch, default=False, help="resize the short side, not to square")
    add("--batch", type=int, default=1, help="pictures per step and process (Sec. 3.3.2)")
    add("--epochs", type=int, default=400, help="passes over the larger domain (FastCUT 200)")
    add("--steps", type=int, default=None, help="updates in all; overrides --epochs")
    add("--decay-from", type=float, default=0.5, help="fraction of the run with a constant rate")
    add("--lr", type=float, default=2e-4, help="Adam's rate (the text's 0.002 is SinCUT's)")
    add("--beta1", type=float, default=0.5, help="Adam's first decay")
    add("--beta2", type=float, default=0.999, help="Adam's second decay")
    add("--ngf", type=int, default=64, help="width of G (SinCUT: an eighth of its width)")
    add("--ndf", type=int, default=64, help="width of D (SinCUT: a quarter of its width)")
    add("--blocks", type=int, default=9, help="residual blocks of G (Sec. 3.3.2; SinCUT 6)")
    add("--antialias-G", action=switch, default=True, help="blur before down- and upsampling in G")
    add("--antialias-D", action=switch, default=True, help="blur before downsampling in D")
    add("--init", choices=["xavier", "normal"], default="xavier",
        help="first weights: xavier times 0.02 (code), or CycleGAN's N(0, 0.02^2)")
    add("--tau", type=float, default=0.07, help="temperature of Eq. (3.6)")
    add("--lambda-X", type=float, default=0.5, help="weight of Eq. (3.7) on x (FastCUT 10)")
    add("--lambda-Y", type=float, default=0.5, help="the same on y: identity; 0 = Fig. 3.24 no id")
    add("--lambda-identity", type=float, default=0.0, help="L1 identity |G(y) - y| (SinCUT's code)")
    add("--lambda-R1", type=float, default=1.0, help="R1 penalty of SinCUT's D (Sec. 3.3.2)")
    add("--patches", type=int, default=256, help="places per layer; 16 = Fig. 3.24's 15 negatives")
    add("--nce-layers", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="L",
        help="encoder layers of Eq. (3.7), 0 = RGB; '4' = Fig. 3.24's last layer only")
    add("--negatives", choices=["internal", "external", "both", "minibatch"], default="internal",
        help="Fig. 3.24: same picture, memory bank (Eq. 3.8), both; minibatch is SinCUT's")
    add("--bank", type=int, default=16384, help="keys per layer in the memory bank (Sec. 3.3.2)")
    add("--momentum", type=float, default=0.999, help="of the bank's encoder (Sec. 3.3.2)")
    add("--flip-equivariance", action=switch, default=False, help="FastCUT's augmentation")
    add("--tile", type=int, default=64, help="SinCUT: what D sees of a crop (Sec. 3.3.2)")
    add("--scale", type=int, nargs=2, default=[384, 1024], metavar="PX",
        help="SinCUT: range of the width that pictures are randomly scaled to (Sec. 3.3.2)")
    add("--figure", choices=["similarity"], help="draw Fig. 3.27 from --weights, and stop")
    add("--fid-weights", default=None, metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        return MODES[args.mode] | (TOY_MODES[args.mode] if args.data == "toy" else {})

    args = common.parse_flags(p, argv, "cut", presets, run_name)
    args.nce_layers = sorted(set(args.nce_layers))
    least = 4 if args.mode != "sincut" else args.tile
    if args.size < 32 or args.size % least:
        raise UserError(f"--size {args.size}: must be at least 32 and a multiple of {least}")
    if args.tile < 16 or args.tile & (args.tile - 1):
        raise UserError(f"--tile {args.tile}: must be a power of two, 16 at least")
    if not 0 < args.scale[0] <= args.scale[1]:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: expected a smaller and a larger "
                        "width")
    if args.negatives == "minibatch" and args.batch * args.patches < 2:
        raise UserError("--batch 1: with one patch per crop the negatives are other crops")
    if max(args.nce_layers) > (4 if args.mode != "sincut" else args.blocks // 2 + 1):
        raise UserError(f"--nce-layers {args.nce_layers}: G_enc has no such layer")
    return args


def run_name(args):
    return f"{args.mode}-{Path(args.data).name}"


# =============================================================================================
# 2. Networks
# =============================================================================================


class ResnetBlock(nn.Module):
    """x + conv(relu(conv(x))), instance-normalised; (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm(channels),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm(channels))

    def forward(self, x):
        return x + self.body(x)


class EncoderDecoder(nn.Module):
    """y_hat = G_dec(G_enc(x)) (Sec. 3.3.1), where G_enc also gives the features of Eq. (3.7)."""

    def encode(self, x):
        """x (B, 3, H, W) -> [x, f_1, ..., f_n], one per stage; the decoder reads the last."""
        features = [x]
        for stage in self.encoder:
            features.append(stage(features[-1]))
        return features

    def forward(self, x):
        """x -> (G(x), G_enc(x)): whoever translates x has its features for free."""
        features = self.encode(x)
        return self.decoder(features[-1]), features

    def patches(self, x, places):
        """The features of x at places {layer: (S_l)}, [(B, S_l, C_l)].

        WHY not `encode` and then pick: layers after the last one asked for are not computed, and
        patches that are picked before the next stage runs send their gradient, a whole map, back
        only when that stage has used up its own, instead of all five maps at once.
        """
        picked = []
        for layer in range(max(places) + 1):
            x = self.encoder[layer - 1](x) if layer > 0 else x
            if layer in places:
                picked.append(pick(x, places[layer]))
        return picked


def pick(feature, places):
    """A feature map (B, C, H, W) at places (S), indices into H * W -> (B, S, C).

    A patch is one place of one feature map: the pixels that this place can see.
    """
    return feature.flatten(2)[:, :, places].transpose(1, 2)


class ResnetGenerator(EncoderDecoder):
    """CycleGAN's generator, cut into G_enc and G_dec (Sec. 3.3.2); 11.38 M parameters.

    x (B, 3, H, W), H and W multiples of 4 -> (y_hat (B, 3, H, W) in [-1, 1], features). The five
    layers are RGB, both downsampling convolutions, residual block 1 and the middle one (5 of 9),
    with receptive fields 1, 9, 15, 35 and 99 pixels if anti-aliased (1, 9, 13, 29, 93 if not).
    """

    multiple = 4

    def __init__(self, ngf=64, blocks=9, antialias=True):
        super().__init__()
        c1, c2, c4, middle = ngf, 2 * ngf, 4 * ngf, (blocks + 1) // 2
        self.widths = [3, c2, c4, c4, c4]

        def relu(channels):
            return [InstanceNorm(channels), nn.ReLU(inplace=True)]

        def down(a, b):  # CHOICE: stride 1, then (after norm and ReLU) a blur; or stride 2
            return nn.Conv2d(a, b, 3, stride=1 if antialias else 2, padding=1)

        def blur(channels):
            return [BlurDown(channels)] if antialias else []

        def up(a, b):
            if antialias:
                return [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(a, b, 3, padding=1)]
            return [nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1)]

        self.encoder = nn.ModuleList([  # every stage ends where a layer of Eq. (3.7) is read
            nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, c1, 7), *relu(c1),
                          down(c1, c2)),                                 # (B, 128, H, W)
            nn.Sequential(*relu(c2), *blur(c2), down(c2, c4)),           # (B, 256, H/2, W/2)
            nn.Sequential(*relu(c4), *blur(c4), ResnetBlock(c4)),        # (B, 256, H/4, W/4)
            nn.Sequential(*[ResnetBlock(c4) for _ in range(1, middle)]),
        ])
        self.decoder = nn.Sequential(
            *[ResnetBlock(c4) for _ in range(middle, blocks)],           # (B, 256, H/4, W/4)
            *up(c4, c2), *relu(c2),                                      # (B, 128, H/2, W/2)
            *up(c2, c1), *relu(c1),                                      # (B, 64, H, W)
            nn.ReflectionPad2d(3), nn.Conv2d(c1, 3, 7), nn.Tanh())       # (B, 3, H, W)


class Projector(nn.Module):
    """H_l: for each layer a two-layer MLP with 256 units, then L2 normalisation (Sec. 3.3.2)."""

    def __init__(self, widths, units=256):
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(c, units), nn.ReLU(), nn.Linear(units, units)) for c in widths)

    def forward(self, patches):
        """Patches [(B, S_l, C_l)], one entry per layer -> [(B, S_l, 256)] with rows of length 1."""
        return [F.normalize(common.full(mlp(p)), dim=2, eps=1e-7)
                for mlp, p in zip(self.mlps, patches, strict=True)]


# ---- SinCUT: StyleGAN2's blocks without style (Sec. 3.3.2, "single image") ---------------------


class EqualConv(nn.Module):
    """Convolution with run-time weight scale 1/sqrt(fan-in); then bias, leaky ReLU, gain sqrt 2."""

    def __init__(self, a, b, kernel, stride=1, activate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(b)) if activate else None
        self.stride, self.padding = stride, kernel // 2 if stride == 1 else 0

    def forward(self, x):
        scale = self.weight[0].numel() ** -0.5
        x = F.conv2d(x, self.weight * scale, self.bias, self.stride, self.padding)
        return x if self.bias is None else F.leaky_relu(x, 0.2) * math.sqrt(2)


class Blur(nn.Module):
    """Zero padding `pad`, then the filter [1, 3, 3, 1] x [1, 3, 3, 1] / 64 at every `stride`.

    (B, C, H, W) -> (B, C, (H + 2 pad - 4) // stride + 1, ...). WHY depthwise: the same numbers as
    one-channel convolutions over B*C pictures, which the authors use, at a tenth of the time.
    """

    def __init__(self, channels, pad, stride=1, gain=1.0):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", gain * torch.outer(row, row).repeat(channels, 1, 1, 1),
                             persistent=False)
        self.pad, self.stride = pad, stride

    def forward(self, x):
        return F.conv2d(x, self.kernel, None, self.stride, self.pad, groups=x.shape[1])


class StyleBlock(nn.Module):
    """StyleGAN2's residual block: two 3x3 convolutions plus a skip, over sqrt 2; maybe halved."""

    def __init__(self, a, b, down=False):
        super().__init__()
        self.body = nn.Sequential(
            EqualConv(a, a, 3),
            *([Blur(a, pad=2), EqualConv(a, b, 3, stride=2)] if down else [EqualConv(a, b, 3)]))
        # WHY stride in the blur: a 1x1 convolution with stride 2 reads only every second place.
        self.skip = nn.Sequential(
            Blur(a, pad=1, stride=2), EqualConv(a, b, 1, activate=False)) if down else nn.Identity()

    def forward(self, x):
        return (self.body(x) + self.skip(x)) / math.sqrt(2)


class StyleUp(nn.Module):
    """StyleGAN2's upsampling layer without style: unit-norm filters (demodulation), transposed
    convolution, blur, noise, bias and leaky ReLU. (B, a, H, W) -> (B, b, 2H, 2W)."""

    def __init__(self, a, b):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, 3, 3))
        self.noise = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(b))
        self.blur = Blur(b, pad=1, gain=4.0)

    def forward(self, x):
        weight = self.weight / math.sqrt(self.weight[0].numel())
        weight = weight * (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)      # (B, b, 2H+1, 2W+1)
        x = self.blur(x)                                                 # (B, b, 2H, 2W)
        x = x + self.noise * torch.randn_like(x[:, :1])
        return F.leaky_relu(x + self.bias.view(1, -1, 1, 1), 0.2) * math.sqrt(2)


class SinGenerator(EncoderDecoder):
    """SinCUT's G: one block down, six residual blocks, one up (Sec. 3.3.2); 3.07 M parameters.

    x (B, 3, H, W), H and W even -> (y_hat (B, 3, H, W), features). CHOICE (code): no tanh.
    """

    multiple = 2

    def __init__(self, ngf=10, blocks=6):
        super().__init__()
        c, c2, half = 8 * ngf, 16 * ngf, blocks // 2
        self.widths = [3] + [c2] * (half + 1)
        self.encoder = nn.ModuleList([
            nn.Sequential(EqualConv(3, c, 1), StyleBlock(c, c2, down=True)),   # (B, 160, H/2, W/2)
            *[StyleBlock(c2, c2) for _ in range(half)]])
        self.decoder = nn.Sequential(
            *[StyleBlock(c2, c2) for _ in range(half, blocks)],
            StyleUp(c2, c), EqualConv(c, 3, 1))                                # (B, 3, H, W)


class SinDiscriminator(nn.Module):
    """StyleGAN2's D for tiles, without minibatch deviation: x (B, 3, tile, tile) -> (B, 1)."""

    def __init__(self, ndf=8, tile=64):
        super().__init__()
        widths = [min(4 * ndf * 2**i, 48 * ndf) for i in range(int(math.log2(tile)) - 1)]
        last = widths[-1]
        self.body = nn.Sequential(
            EqualConv(3, widths[0], 1),
            *[StyleBlock(a, b, down=True) for a, b in zip(widths, widths[1:], strict=False)],
            EqualConv(last, last, 3))                                          # (B, 384, 4, 4)
        self.hidden = EqualConv(16 * last, last, 1)                            # a linear layer
        self.logit = EqualConv(last, 1, 1, activate=False)
        self.logit_bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x = self.body(x).flatten(1)[:, :, None, None]                          # (B, 6144, 1, 1)
        return self.logit(self.hidden(x)).flatten(1) + self.logit_bias         # (B, 1)


def build(args, device):
    """G, D, H, their three Adams and, for external negatives, the memory banks."""
    torch.manual_seed(args.seed)
    if args.mode == "sincut":
        G, D = SinGenerator(args.ngf, args.blocks), SinDiscriminator(args.ndf, args.tile)
    else:
        G = ResnetGenerator(args.ngf, args.blocks, args.antialias_G)
        D = PatchGAN(3, args.ndf, antialias=args.antialias_D)
    H = Projector([G.widths[i] for i in args.nce_layers])
    for net in (G, D, H):
        # CHOICE (code): xavier times 0.02; EqualConv keeps its own N(0, 1). WHY a second choice:
        # such small weights give G's and H's first gradients a thousandfold size (rows of q are
        # divided by tiny norms), which Adam's second moment remembers for a thousand steps.
        common.init_weights(net, args.init, 0.02)
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, args.beta2),
                             fused=device.type in ("cuda", "cpu"))
    m = SimpleNamespace(G=G, D=D, H=H, opt_G=adam(G.parameters()), opt_D=adam(D.parameters()),
                        opt_H=adam(H.parameters()))
    if args.negatives in ("external", "both"):
        m.bank_X = MemoryBank(G, H, args).to(device)
        m.bank_Y = MemoryBank(G, H, args).to(device)
    if args.compile:
        G.forward, G.patches = torch.compile(G.forward), torch.compile(G.patches)
        if args.mode != "sincut":  # WHY: R1 differentiates D twice, compiled code only once
            D.forward = torch.compile(D.forward)
    return m


# =============================================================================================
# 3. Losses
# =============================================================================================


def patch_nce(q, k, tau, bank=None, internal=True):
    """Eq. (3.6) averaged over the places of Eq. (3.7), for one layer.

    q: queries from the *output*, k: keys from the *input*, both (B, S, K) with unit rows, row s of
    both from the same place. bank: (N, K) more keys, of other pictures (Eq. 3.8). internal=False:
    the bank's keys are the only negatives. Returns a scalar; no gradient reaches k or bank.

    WHY the output is the query: it is what must change, so it alone gets a gradient. Detached
    keys are fixed targets; otherwise the encoder could win by making all inputs look alike.
    """
    assert q.shape == k.shape and q.dim() == 3
    k = k.detach()                                            # CHOICE (code)
    if internal:
        logits = q @ k.transpose(1, 2)                        # (B, S, S): row s against all keys
        # The positive of row s is column s: that key comes from the same place. Hence a target of
        # 0, 1, ..., S-1, the diagonal; the other S-1 columns are the negatives z^(S \ s).
        target = torch.arange(q.shape[1], device=q.device).repeat(q.shape[0])
    else:
        logits = (q * k).sum(2, keepdim=True)                 # (B, S, 1): the positive only
        target = torch.zeros(q.shape[0] * q.shape[1], dtype=torch.long, device=q.device)
    if bank is not None:
        logits = torch.cat([logits, q @ bank.t()], dim=2)     # Eq. (3.8): z_tilde from Z^-
    return F.cross_entropy(logits.flatten(0, 1) / tau, target)  # Eq. (3.6), mean over s and x


def multilayer_nce(q, k, args, bank=None):
    """Eq. (3.7): the mean over layers of `patch_nce` for lists of queries and keys."""
    if args.negatives == "minibatch":  # SinCUT: patches of all the crops are one set
        q, k = ([z.flatten(0, 1)[None] for z in zs] for zs in (q, k))
    external, internal = bank.keys() if bank else [None] * len(q), args.negatives != "external"
    losses = [patch_nce(q_l, k_l, args.tau, bank_l, internal)
              for q_l, k_l, bank_l in zip(q, k, external, strict=True)]
    return torch.stack(losses).mean()                         # Eq. (3.7), sum over l


class MemoryBank(nn.Module):
    """Z^- of Eq. (3.8): keys of earlier pictures, from a moving-averaged G_enc and H (MoCo).

    CHOICE: one bank per domain; Eq. (3.9) with lambda_Y needs negatives from Y as well.
    """

    def __init__(self, G, H, args):
        super().__init__()
        self.encoder = copy.deepcopy(G).requires_grad_(False)
        self.encoder.decoder = nn.Identity()  # only the encoder half is averaged
        self.H = copy.deepcopy(H).requires_grad_(False)
        self.momentum, self.layers = args.momentum, len(args.nce_layers)
        for i in range(self.layers):
            keys = F.normalize(torch.randn(args.bank, 256), dim=1)
            self.register_buffer(f"keys_{i}", keys)
        self.register_buffer("oldest", torch.zeros(self.layers, dtype=torch.long))

    def keys(self):
        """[(N, 256)] per layer."""
        return [getattr(self, f"keys_{i}") for i in range(self.layers)]

    @torch.no_grad()
    def update(self, G, H, x, places):
        """Average the networks, then replace the oldest keys by those of x (B, 3, H, W)."""
        for mine, theirs in ((self.encoder.encoder, G.encoder), (self.H, H)):
            for p, new in zip(mine.parameters(), theirs.parameters(), strict=True):
                p.lerp_(new, 1 - self.momentum)
        fresh = self.H(self.encoder.patches(x, places))
        for i, (bank, z) in enumerate(zip(self.keys(), fresh, strict=True)):
            z = z.flatten(0, 1)[:len(bank)]                   # (B * S_l, 256)
            bank[(self.oldest[i] + torch.arange(len(z), device=z.device)) % len(bank)] = z
            self.oldest[i] = (self.oldest[i] + len(z)) % len(bank)


def r1_penalty(logits, y):
    """R1 (Mescheder et al. 2018): mean over pictures of |d D(y) / d y|^2 / 2; y needs a graph."""
    grad, = torch.autograd.grad(logits.sum(), y, create_graph=True)
    return grad.square().sum(dim=(1, 2, 3)).mean() / 2


def sample_places(features, layers, patches, rng):
    """{layer: (S_l) indices into H_l * W_l}: `patches` distinct places (all, if there are fewer).

    The same for every picture of the batch; query and key must share them.
    """
    areas = {layer: features[layer][0, 0].numel() for layer in layers}
    return {layer: torch.randperm(area, generator=rng)[:patches].to(features[layer].device)
            for layer, area in areas.items()}


def mirrored(places, features):
    """The same places in left-right mirrored maps: FastCUT's "features are flipped back"."""
    widths = {layer: features[layer].shape[3] for layer in places}
    return {layer: ids + widths[layer] - 1 - 2 * (ids % widths[layer])
            for layer, ids in places.items()}


# =============================================================================================
# 4. Data
# =============================================================================================


class Unpaired(torch.utils.data.Dataset):
    """`self[n]`: the n-th training sample (x, y), two (3, size, size) tensors in [-1, 1].

    x walks through a new shuffle of its domain every epoch, y is drawn at random, so that no pair
    recurs. A sample depends on (seed, n) alone. Resize to --load, random crop, mirror at random;
    CHOICE (code): in the decaying part of a run pictures are resized to the crop, not cropped.
    """

    def __init__(self, root, args, samples=None):
        sides = "AB" if args.direction == "AtoB" else "BA"
        self.X, self.Y = (common.find_split(root, "train", side, LAYOUT) for side in sides)
        self.args, self.samples = args, samples

    def __getitem__(self, n):
        rng = random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.X))
        x = self.X[shuffled(len(self.X), common.mix(self.args.seed, "epoch", epoch))[i]]
        y = rng.choice(self.Y)
        late = self.samples is not None and n >= self.args.decay_from * self.samples
        return self.load(x, rng, late), self.load(y, rng, late)

    def load(self, path, rng, late):
        size, side = self.args.size, self.args.size if late else max(self.args.load, self.args.size)
        im = common.open_rgb(path)
        w, h = im.size
        short = side / min(w, h) if self.args.keep_aspect else None  # CHOICE (code): not kept
        w, h = (round(w * short), round(h * short)) if short else (side, side)
        left, top = rng.randint(0, w - size), rng.randint(0, h - size)
        im = im.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))
        return common.to_tensor(im if rng.random() < 0.5 else im.transpose(Image.FLIP_LEFT_RIGHT))

    def __len__(self):
        return max(len(self.X), len(self.Y))


@functools.lru_cache(maxsize=2)
def shuffled(n, seed):
    """A permutation of range(n) that depends on the seed alone."""
    return random.Random(seed).sample(range(n), n)


class SinglePair(torch.utils.data.Dataset):
    """SinCUT: `self[n]` is a random crop (3, size, size) of each domain's one picture.

    The crops of one step share a scale: a random width from --scale (Sec. 3.3.2).
    """

    def __init__(self, root, args, samples=None):
        sides = "AB" if args.direction == "AtoB" else "BA"
        self.pictures = []
        for side in sides:
            files = common.find_split(root, "train", side, LAYOUT)
            if len(files) > 1:
                raise UserError(f"{files[0].parent}: --mode sincut trains on one picture per "
                                f"domain, found {len(files)}")
            self.pictures.append(common.open_rgb(files[0]))
        self.args = args

    def __getitem__(self, n):
        step_rng = random.Random(common.mix(self.args.seed, "scale", n // self.args.batch))
        rng = random.Random(common.mix(self.args.seed, n))
        return tuple(self.crop(i, step_rng.randint(*self.args.scale), rng) for i in (0, 1))

    def crop(self, i, width, rng):
        im, size = self.scaled(i, width), self.args.size
        left, top = rng.randint(0, im.width - size), rng.randint(0, im.height - size)
        im = im.crop((left, top, left + size, top + size))
        return common.to_tensor(im if rng.random() < 0.5 else im.transpose(Image.FLIP_LEFT_RIGHT))

    @functools.lru_cache(maxsize=4)  # noqa: B019 (one data set per run)
    def scaled(self, i, width):
        im = self.pictures[i]
        zoom = max(width / im.width, self.args.size / im.width, self.args.size / im.height)
        return im.resize((round(im.width * zoom), round(im.height * zoom)), Image.BICUBIC)


def random_batch(args, device):
    """(x, y) of noise, shaped and laid out as in training; for bench.py."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    shape = (args.batch, 3, args.size, args.size)
    return [torch.rand(shape).mul(2).sub(1).to(device, memory_format=layout) for _ in "xy"]


def tiles(x, side):
    """(B, C, H, W) -> (B * H/side * W/side, C, side, side): SinCUT's D never sees a whole crop.

    WHY: with one real picture, a D that sees much of it would ask G to paint that very picture.
    """
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // side, side, w // side, side)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, side, side)


# =============================================================================================
# 5. One training step
# =============================================================================================


def train_step(m, x, y, args, rng, average=lambda *nets: None):
    """One update of D, then one of G and H, on x, y (B, 3, H, W); returns losses by name.

    rng: CPU generator for the sampled places and the flip. average: gradients over processes.
    """
    G, D, H, sincut, losses = m.G, m.D, m.H, args.mode == "sincut", {}
    gan = common.non_saturating if sincut else common.lsgan
    seen_by_D = functools.partial(tiles, side=args.tile) if sincut else lambda picture: picture
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=args.amp)
    identity = args.lambda_Y > 0 or args.lambda_identity > 0

    # ---- forward: y_hat = G(x), G(y) for the identity terms, and the keys ---------------------
    B, source = len(x), torch.cat([x, y]) if identity else x
    flip = args.flip_equivariance and bool(torch.rand((), generator=rng) < 0.5)
    with autocast():
        out, features = G(source.flip(3) if flip else source)  # FastCUT: G sees a mirrored input
        places = sample_places(features, args.nce_layers, args.patches, rng)
        q_places = mirrored(places, features) if flip else places
        with torch.no_grad():                # keys are fixed targets, see `patch_nce`
            # Both pictures pass the same encoder: sharing makes q and k comparable. G(x) has
            # computed the input's features already (the authors' code does it again, a tenth of
            # a step); only FastCUT's keys, from the upright input, are new half of the time.
            k = H(G.patches(source, places) if flip
                  else [pick(features[i], places[i]) for i in args.nce_layers])
    y_hat, features = out[:B], None          # WHY None: maps that only the keys read are freed

    # ---- D: real y towards 1, y_hat towards 0; y_hat is detached, so G gets no gradient -------
    fake, real = seen_by_D(y_hat.detach()), seen_by_D(y).detach().requires_grad_(sincut)
    with autocast():  # no layer of D mixes pictures, so real and fake can share one pass
        logits_fake, logits_real = D(torch.cat([fake, real])).split([len(fake), len(real)])
    losses["D"] = 0.5 * (gan(logits_fake, False) + gan(logits_real, True))    # Eq. (3.5), D's side
    L_D = losses["D"]
    if sincut:
        losses["R1"] = r1_penalty(logits_real, real)
        L_D = L_D + args.lambda_R1 * losses["R1"]
    m.opt_D.zero_grad(set_to_none=True)
    L_D.backward()
    average(D)
    m.opt_D.step()

    # ---- G and H: fool the new D, and be recognised patch by patch ----------------------------
    with autocast():
        losses["GAN"] = gan(D(seen_by_D(y_hat)), True)                        # Eq. (3.5), G's side
    # WHY stop at y_hat: D's weights must get no gradient here, and D's maps are freed before the
    # encoder makes its own. The last line of this part hands the gradient on to G.
    grad_GAN, = torch.autograd.grad(losses["GAN"], y_hat)
    with autocast():
        q = H(G.patches(out, q_places))      # [(B or 2 B, S_l, 256)], with gradients
    banks = getattr(m, "bank_X", None), getattr(m, "bank_Y", None)
    losses["NCE_X"] = multilayer_nce([z[:B] for z in q], [z[:B] for z in k], args, banks[0])
    L_content = args.lambda_X * losses["NCE_X"]
    if args.lambda_Y > 0:                    # y itself is the input, G(y) the output
        losses["NCE_Y"] = multilayer_nce([z[B:] for z in q], [z[B:] for z in k], args, banks[1])
        L_content = L_content + args.lambda_Y * losses["NCE_Y"]
    if args.lambda_identity > 0:
        losses["identity"] = (common.full(out[B:]) - y).abs().mean()
        L_content = L_content + args.lambda_identity * losses["identity"]
    m.opt_G.zero_grad(set_to_none=True)
    m.opt_H.zero_grad(set_to_none=True)
    torch.autograd.backward([L_content, y_hat], [None, grad_GAN])  # Eq. (3.9), L_GAN from y_hat on
    average(G, H)
    m.opt_G.step()
    m.opt_H.step()
    for bank, picture in zip(banks, (x, y), strict=True):
        if bank is not None:
            bank.update(G, H, picture, places)
    return {name: loss.detach() for name, loss in losses.items()}


# =============================================================================================
# 6. Training loop
# =============================================================================================


def rate(step, total, decay_from):
    """Learning-rate factor: 1, then linearly towards 0 over the rest of the run (Sec. 3.2.4)."""
    constant = int(decay_from * total)
    return 1.0 if step < constant else (total - step) / (total - constant + 1)


def data_folder(args):
    name = "horse2zebra_single" if args.mode == "sincut" else "horse2zebra"
    size = 256 if args.mode == "sincut" else args.size
    return common.find_data(args.data, LAYOUT, lambda: toy.ensure(name, size))


def train(args):
    run = Run("cut", args)
    root = data_folder(args)
    dataset = SinglePair if args.mode == "sincut" else Unpaired
    data = dataset(root, args)
    group = args.batch * run.world
    total = args.steps or args.epochs * max(1, len(data) // group)
    data.samples = total * group
    show = test_pictures(root, args, run.device, limit=6)
    m = build(args, run.device)
    run.resume_or_start(vars(m))
    if args.data == "toy":
        preset = ", ".join(f"{k} {v}" for k, v in TOY_MODES[args.mode].items())
        print(f"toy preset instead of the paper's settings: {preset}")
    for step, (x, y) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(m.G, show, args))
        for optimiser in (m.opt_G, m.opt_D, m.opt_H):
            optimiser.param_groups[0]["lr"] = args.lr * rate(step, total, args.decay_from)
        run.log(train_step(m, x, y, args, run.rng(), run.average_gradients))
    run.save_samples(sample_columns(m.G, show, args))
    run.finish(truth_scores(m.G, root, args, run.device) if args.data == "toy" else [])


# =============================================================================================
# 7. Translate, evaluate, look inside
# =============================================================================================


@torch.no_grad()
def translate(G, x, args):
    """G(x) for x (B, 3, H, W) of any size, in [-1, 1]: padded to G's multiple, cropped back."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        return common.same_size(lambda padded: G(padded)[0], x, G.multiple).float().clamp(-1, 1)


def test_pictures(root, args, device, limit=None, square=False):
    """{'x': (N, 3, H, W), 'y': ...} of the test split (of the training split if there is none).

    limit: that many, evenly spaced. square: resized to --size x --size, for the paper's
    evaluation; otherwise to the first picture's size, because a grid has one size.
    """
    split = "test" if any((Path(root) / d).is_dir() for d in ("testA", "test/A")) else "train"
    found = {}
    for name, side in zip("xy", "AB" if args.direction == "AtoB" else "BA", strict=True):
        files = common.find_split(root, split, side, LAYOUT)
        every = max(1, len(files) // limit) if limit else 1  # neighbours are often video frames
        pictures = [common.open_rgb(f) for f in files[::every][:limit]]
        size = (args.size, args.size) if square else pictures[0].size
        found[name] = torch.stack([common.to_tensor(p.resize(size, Image.BICUBIC))
                                   for p in pictures]).to(device)
    return found


def sample_columns(G, show, args):
    """Columns of a sample grid: x, G(x), and where there are as many y: y, G(y)."""
    x, y = show["x"], show["y"]
    columns = {"x": x, "G(x)": torch.cat([translate(G, p[None], args) for p in x])}
    if len(x) == len(y) and args.lambda_Y > 0:
        columns |= {"y": y, "G(y)": torch.cat([translate(G, p[None], args) for p in y])}
    return columns


def truth_scores(G, root, args, device):
    """Scores against the toy world's true answers, beside the trivial ones'."""
    test = test_pictures(root, args, device)
    y_hat = torch.cat([translate(G, p[None], args) for p in test["x"]])
    return toy.coat_scores(test["x"].cpu(), y_hat.cpu(), test["y"].cpu())


def load_generator(args, device):
    """G from --weights: our checkpoint (its flags were read by `get_args`) or the authors' file."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script or the authors' file")
    state = common.load_file(args.weights)
    if isinstance(state, dict) and "method" in state:
        G = build(args, torch.device("cpu")).G
        common.load_parts({"G": G}, state["parts"], args.weights)
    else:
        G = released_generator(state, args.weights)
    return G.to(device).eval()


def released_generator(state, path):
    """The authors' latest_net_G.pth -> G. Widths are read from the shapes.

    Their layers come in the order of ours, so tensors are matched by position, without the fixed
    blur kernels; single dimensions (1, C, 1, 1) are dropped.
    """
    try:
        tensors = [v for k, v in state.items() if not k.endswith(("filt", "kernel"))]
        if "encoder.convs.1.0.weight" in state:
            G = SinGenerator(len(state["encoder.convs.1.0.weight"]) // 8)
        else:
            blocks = sum(k.endswith("conv_block.1.weight") for k in state)
            G = ResnetGenerator(len(state["model.1.weight"]), blocks, "model.7.filt" in state)
        for p, t in zip(list(G.parameters()), tensors, strict=True):
            if p.squeeze().shape != t.squeeze().shape:
                raise ValueError("another layer")
            p.data.copy_(t.reshape(p.shape))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: neither a checkpoint of cut.py nor a generator released by the "
                        "authors (latest_net_G.pth)") from None
    return G


def translate_files(args):
    """Translate --translate (a picture or a folder of them), each at its own size, to PNG."""
    device = common.pick_device(args.device)
    G = load_generator(args, device)
    torch.manual_seed(args.seed)  # SinCUT's G adds noise
    common.translate_files(args.translate, args.out or "translated",
                           lambda x: translate(G, x.to(device), args))


def evaluate(args):
    """FID of the translated test pictures at --size x --size; on toy data the truth scores."""
    device = common.pick_device(args.device)
    G = load_generator(args, device)
    root = data_folder(args)
    scores = truth_scores(G, root, args, device) if args.data == "toy" else []
    if args.data != "toy" or args.fid_weights:
        test = test_pictures(root, args, "cpu", square=True)
        if min(map(len, test.values())) < 2:
            raise UserError(f"--evaluate: FID needs two or more pictures per domain in {root}")
        y_hat = (translate(G, p[None].to(device), args).cpu() for p in test["x"])
        value = common.fid(y_hat, test["y"].split(1), device, args.fid_weights)
        scores.append({"name": f"FID ({len(test['x'])} translated, {len(test['y'])} real, "
                               "299x299)", "value": value, "better": "lower"})
    common.print_scores(scores)


def similarity_figure(args):
    """Fig. 3.27: where does a patch of G(x) find itself in x? Written as similarity.png.

    Columns: G(x) and x with two query points; exp(v . v- / tau) of each point to all places of x,
    over its maximum; the features of x and of G(x) by their three principal components.
    """
    device = common.pick_device(args.device)
    state = common.load_checkpoint(args.weights, "cut") if args.weights else None
    if state is None:
        raise UserError("--figure similarity: --weights with a last.pt of this script is needed")
    m = build(args, device)
    common.load_parts({"G": m.G, "H": m.H}, state["parts"], args.weights)
    layer = min(range(len(args.nce_layers)), key=lambda i: abs(args.nce_layers[i] - 3))  # block 1
    columns = {}
    for x in test_pictures(data_folder(args), args, device, limit=4)["x"]:
        with torch.no_grad():
            y_hat = translate(m.G, x[None], args)
            maps = [m.G.encode(p)[args.nce_layers[layer]] for p in (y_hat, x[None])]
            h, w = maps[0].shape[2:]
            everywhere = torch.arange(h * w, device=device)
            q, k = (F.normalize(m.H.mlps[layer](pick(f, everywhere)), dim=2)[0]
                    for f in maps)                                    # (h * w, 256)
        points = [(h // 2, w // 2), (h // 5, w // 5)]                 # an animal's side, the sky
        row = {"G(x), queries": mark(y_hat[0], points, h, w), "x": mark(x, points, h, w)}
        for name, (r, c) in zip(("similarity, red", "similarity, blue"), points, strict=True):
            v = ((q[r * w + c] @ k.t()) / args.tau).exp()             # inside Eq. (3.6)
            row[name] = as_picture((v / v.max()).view(1, h, w).expand(3, h, w), x.shape[1:])
        both = torch.cat([k, q])
        both = (both - both.mean(0)) @ torch.pca_lowrank(both, 3)[2]
        both = (both - both.amin(0)) / (both.amax(0) - both.amin(0))
        for name, pca in zip(("PCA of x", "PCA of G(x)"), both.split(h * w), strict=True):
            row[name] = as_picture(pca.t().view(3, h, w), x.shape[1:])
        for name, picture in row.items():
            columns.setdefault(name, []).append(picture)
    path = Path(args.out or Path(args.weights).parent) / "similarity.png"
    common.save_grid(path, {name: torch.stack(column) for name, column in columns.items()})
    print(f"wrote {path}")


def mark(picture, points, h, w):
    """A copy of a picture (3, H, W) with a red and a blue square at places of an h x w grid."""
    picture = picture.clone().cpu()
    H, W = picture.shape[1:]
    half = max(1, H // 48)
    for (r, c), colour in zip(points, ([1, -1, -1], [-1, -1, 1]), strict=True):
        top, left = int((r + 0.5) * H / h), int((c + 0.5) * W / w)
        area = picture[:, max(0, top - half):top + half + 1, max(0, left - half):left + half + 1]
        area.copy_(torch.tensor(colour).view(3, 1, 1).expand_as(area))
    return picture


def as_picture(values, size):
    """Values in [0, 1] on a coarse grid (3, h, w) -> picture (3, H, W) in [-1, 1]."""
    return F.interpolate(values[None].float(), size=tuple(size)).cpu()[0] * 2 - 1


# =============================================================================================
# 8. Main
# =============================================================================================


def main(argv=None):
    args = get_args(argv)
    if args.translate:
        translate_files(args)
    elif args.figure:
        similarity_figure(args)
    elif args.evaluate:
        evaluate(args)
    else:
        train(args)


if __name__ == "__main__":
    common.entry(main)
