"""EGSC-IT: translate a picture into the other domain, in the style of one exemplar of it.

Content is what two domains share, style is what an exemplar has. Each domain has an encoder and a
generator; the encoders' last block and the generators' first are shared, so that both domains
speak of content in one code, c. The exemplar enters as the mean and deviation of its features, by
AdaIN, between c and the generator. So that the styles of different things do not mix, c is first
multiplied by a soft mask: channels that respond to sky then carry the style of sky. The networks F
that give masks and style are pre-trained, one per domain, in a VAE-GAN of its own, and frozen.

L. Ma, X. Jia, S. Georgoulis, T. Tuytelaars, L. Van Gool, "Exemplar Guided Unsupervised
Image-to-Image Translation with Semantic Consistency", ICLR 2019 (arXiv 1805.11145).

SYMBOLS      paper                here               shape
             x_A, x_B             x_A, x_B           (B, 3, H, W) in [-1, 1], unpaired
             E_A, E_B             E_A, E_B, E_last   -> mu (B, C, h, w); E_last is shared
             c_A                  c                  G_first(mu + noise), shared too
             G_A, G_B             G_A, G_B           (B, C, h, w) -> (B, 3, H, W)
             F_A, f_A             F_A, f_A           frozen; (B, C, h, w)
             m_A, eta             feature_mask       (1 - eta) sigma(f_A) + eta; eta = 0.5
             gamma_B, beta_B      style              each (B, C, 1, 1)
             x_AA, x_AB           x_AA, x_AB         reconstruction, translation; x_ABA: cycle
             phi, Gram            V, gram            five maps (B, C_i, H_i W_i); (B, C_i, C_i)

OBJECTIVE    Eq. (1)  gamma_B = delta(f_B), beta_B = mu(f_B)
             Eq. (2)  AdaIN(c_A, gamma_B, beta_B) = gamma_B (c_A - mu(c_A)) / delta(c_A) + beta_B,
                      used on m_A * c_A
             Eq. (3)  L = L_VAE + L_GAN + L_CC of both domains (UNIT's) + L_P
             Eq. (4)  L_P = lambda_c L_c + lambda_s L_s of both directions
             Eq. (5)  L_c = E |phi(x_AB) - phi(x_A)|_1, L_s = E |Gram(x_AB) - Gram(x_B)|_1

CHOICES      where the paper is silent or differs from its authors' released code:
             delta is called variance; AdaIN as it is known takes the deviation: so here. The code
             scales by the mean of f, shifts by its variance, divides by c's: --adain released.
             phi: every VGG channel divided by its L2 norm over the picture (code); without it the
             published weights mean nothing. A channel of norm < 0.01 gives no gradient (code: it
             does). Gram over H W. L_c weighs relu1_1 ... relu5_1 by i/5.
             UNIT's losses, weights and least squares are the code's; |.|_1 is a mean; KL is
             mean(mu^2): the code's z has the noise in it, which adds a constant.
             Noise in z only in training (code: also in use). Masks and style of a cycle are those
             of the original picture (code). A pair is drawn afresh each time (code: kept).
             One D update per 5 of G (code), on pictures that G has just made (code: on others).
             D's LeakyReLUs are where one expects them (code: some twice, and on the logit).
             Digits are not mirrored or cropped; streets and faces are (code: all).
             --vgg digits (default of toy and --small, which do not count on ImageNet weights): phi
             is a small network that the run first teaches, with labels, to name digit, ink and
             paper: a stand-in for ImageNet's labels, kept in last.pt. The rest has no labels.

SSIM         Tab. 2 compares x_AB with the *exemplar* x_B, which shows another digit, and x_BA with
             x_A. Perfect translations score 0.484 and 0.226 there, the exemplar itself 1. Here:
             also SSIM to the true translation, and which share of ink and paper has its colour.

USAGE        python egscit.py                                  # toy digits, scores at the end
             python egscit.py --data mnist-single [--small]    # --small: sized for a CPU
             python egscit.py --data streets --task street     # trainA trainB testA testB
             python egscit.py --translate x.jpg --exemplar y.jpg --direction AtoB --weights last.pt
             python egscit.py --ablation mask                  # a row of Tab. 2
             python -m lab.figures egscit masks --weights last.pt   # or embedding: Fig. 5
EXPECT       python egscit.py: 4,000 steps in 15 minutes on one CPU core, stage 1 in one. SSIM to
             the truth 0.67 and 0.52 (flat paper: 0.50, 0.24). Papers are right first, then digits
             take shape, black ones on white sooner than white ones on black, which stay broken.
             MNIST, --data mnist-single --small --amp --steps 6000: 0.81 and 0.70 after 21 minutes
             (flat paper: 0.52, 0.27).
"""

import argparse
import colorsys
import functools
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

import common
from common import VGG, Run, UserError, mean_std

LAYOUT = ("trainA/ trainB/ (and testA/ testB/) with pictures, or train/A train/B test/A test/B, "
          "or toy-multiple, mnist-single, mnist-multiple")

# =============================================================================================
# 1. Configuration
# =============================================================================================

DIGITS = {"toy": "single", "toy-multiple": "multiple",
          "mnist-single": "single", "mnist-multiple": "multiple"}
TASKS = {  # Sec. 4; weights, sizes and rates are in the authors' scripts only
    "mnist-single": {"size": 28, "downs": 0, "lr": 1e-5, "lambda_c": 10.0, "lambda_s": 1e3},
    "mnist-multiple": {"size": 112, "lr": 1e-5, "lambda_c": 100.0, "lambda_s": 1e4},
    "street": {"size": 512, "height": 256, "batch": 3, "lambda_c": 100.0, "lambda_s": 1e4,
               "mirror": True, "zoom": 0.8},
    "faces": {"size": 128, "lambda_c": 10.0, "lambda_s": 5e3, "mirror": True, "zoom": 0.8},
}
ABLATIONS = {  # Tab. 2
    "none": {},
    "mask": {"eta": 1.0},
    "adain": {"adain": "off"},
    "L_P": {"lambda_c": 0.0, "lambda_s": 0.0},
}
# WHY: in a short run of narrow networks c keeps what reconstruction and cycle do not mind: colours,
# and the sign of the contrast, so that ink and paper swap places in half of the pairs. A dearer
# code (lambda_KL) leaves colours to the style, which has them for free; a stronger D and L_c see
# that a swapped digit is none. D sees colours better without instance norm.
SMALL = {"batch": 8, "steps": 4000, "pretrain": 600, "g_updates": 1, "lr": 1e-3, "ngf": 16,
         "ndf": 32, "d_layers": 3, "d_norm": False, "init": "xavier", "lambda_GAN": 100.0,
         "lambda_KL": 2.0, "lambda_c": 100.0, "vgg": "digits", "workers": 0,
         "sample_every": 500}
SMALL_BOARDS = SMALL | {"batch": 4, "lambda_s": 1e4}


def get_args(argv=None):
    """Flags in layers: the code's defaults < task < --small < --ablation < checkpoint < command."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--task", choices=list(TASKS), default=None,
        help="whose sizes and weights (Sec. 4); digits: those of --data, else street")
    add("--small", action=switch, default=False, help="digits: the toy run's settings, for a CPU")
    add("--mnist-root", default="datasets", metavar="DIR", help="where MNIST/raw is or comes")
    add("--ablation", choices=list(ABLATIONS), default="none", help="Tab. 2: what to leave out")
    add("--size", type=int, default=512, help="width of a training picture (code)")
    add("--height", type=int, default=None, help="its height (--size if not given)")
    add("--mirror", action=switch, default=False, help="mirror training pictures at random (code)")
    add("--zoom", type=float, default=1.0, help="least side of crops, at p = 1/2 (code: 0.8)")
    add("--batch", type=int, default=8, help="pictures of each domain per step and process (code)")
    add("--steps", type=int, default=300_000, help="updates of G (code: 5 x 60,000 on digits)")
    add("--pretrain", type=int, default=60_000, help="updates of stage 1, which gives F (code)")
    add("--features", default=None, metavar="FILE",
        help="skip stage 1: F_A, F_B (and V of --vgg digits) are those of this last.pt")
    add("--g-updates", type=int, default=5, help="updates of G for one of D in stage 2 (code)")
    add("--lr", type=float, default=1e-4, help="Adam's rate, times (1 - t/T)^0.9 (code)")
    add("--ngf", type=int, default=64, help="width of E, G and F (code)")
    add("--ndf", type=int, default=64, help="width of D (code)")
    add("--d-layers", type=int, default=4, help="stride-2 layers of D (code)")
    add("--d-norm", action=switch, default=True, help="instance norm in D (code); UNIT has none")
    add("--downs", type=int, default=2, help="stride-2 layers of E, G and F (code: 0 for 28x28)")
    add("--blocks", type=int, default=3, help="residual blocks of E, G and F, shared ones aside")
    add("--init", choices=["released", "xavier"], default="released",
        help="N(0, 0.02^2) cut at 0.04, D xavier (code, there uniform); or all of them xavier")
    add("--eta", type=float, default=0.5, help="Sec. 3.1: least value of a mask (code); 1: no mask")
    add("--adain", choices=["paper", "released", "off"], default="paper", help="Eq. (2): CHOICES")
    add("--lambda-GAN", type=float, default=10.0, help="UNIT's weight of L_GAN")
    add("--lambda-KL", type=float, default=0.1, help="UNIT's weight of the KL terms")
    add("--lambda-rec", type=float, default=100.0, help="UNIT's weight of reconstruction")
    add("--lambda-cyc", type=float, default=100.0, help="UNIT's weight of the cycle")
    add("--lambda-c", type=float, default=10.0, help="Eq. (4): content (code: by task)")
    add("--lambda-s", type=float, default=1e3, help="Eq. (4): style (code: by task)")
    add("--vgg", default="imagenet", help="phi: imagenet, random, or a file of VGG-19 or VGG-16; "
                                          "or digits: a small one trained here to name digits")
    add("--exemplar", default=None, metavar="PATH", help="with --translate: picture of the style")
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB", help="with --translate")

    def presets(args):
        single = DIGITS.get(args.data) == "single"
        task = args.task or ("street" if args.data not in DIGITS else
                             "mnist-single" if single else "mnist-multiple")
        preset = {}
        if args.data in DIGITS and (args.small or args.data.startswith("toy")):
            preset = {"small": True} | (SMALL if single else SMALL_BOARDS)
        return TASKS[task] | preset | ABLATIONS.get(args.ablation, {})

    args = common.parse_flags(p, argv, "egscit", presets, run_name)
    for name, low in (("g_updates", 1), ("pretrain", 1), ("ngf", 1), ("ndf", 1), ("d_layers", 1),
                      ("downs", 0), ("blocks", 0)):
        if getattr(args, name) < low:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(args, name)}: must be at least {low}")
    args.height = args.height or args.size
    args.log_every += -args.log_every % args.g_updates  # every row of log.csv has a loss of D
    for name in ("size", "height"):
        value = getattr(args, name)
        if value < 16 or value % 2**args.downs:
            raise UserError(f"--{name} {value}: must be at least 16 and a multiple of "
                            f"{2**args.downs}")
    for name, low, high in (("eta", 0, 1), ("zoom", 0.1, 1)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} {getattr(args, name)}: must be between {low} and {high}")
    if args.data in DIGITS and (args.height != args.size or args.size % 4):
        raise UserError(f"--size {args.size} --height {args.height}: digits are square, their side "
                        "a multiple of 4")
    if args.exemplar and not args.translate:
        raise UserError("--exemplar: needs --translate PATH")
    for flag, on in (("--vgg digits", args.vgg == "digits"), ("--small", args.small)):
        if on and args.data not in DIGITS:
            raise UserError(f"{flag}: for {', '.join(DIGITS)} only, not for --data {args.data}")
    return args


def run_name(args):
    ablation = "" if args.ablation == "none" else f"-{args.ablation}"
    return f"egscit-{Path(args.data).name}{ablation}"


# =============================================================================================
# 2. Networks
# =============================================================================================


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), no normalisation; (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3))

    def forward(self, x):
        return x + self.body(x)


class Encoder(nn.Module):
    """E_A, E_B without the shared block; F_A, F_B. x (B, 3, H, W) -> (B, C, h, w).

    C = ngf 2^downs, h = H / 2^downs. 231,040 parameters for 28x28, 3,918,976 with two `downs`.
    """

    def __init__(self, ngf=64, downs=2, blocks=3):
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(downs):
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(ngf * 2**i, ngf * 2**(i + 1), 3, 2),
                       nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, *[ResidualBlock(ngf * 2**downs)
                                               for _ in range(blocks)])

    def forward(self, x):
        return self.layers(x)


class Generator(nn.Module):
    """G_A, G_B without the shared block: (B, C, h, w) -> (B, 3, H, W) in [-1, 1]."""

    def __init__(self, ngf=64, downs=2, blocks=3):
        super().__init__()
        layers = [ResidualBlock(ngf * 2**downs) for _ in range(blocks)]
        for i in range(downs, 0, -1):  # Sec. 3.2: transposed convolutions
            layers += [nn.ConvTranspose2d(ngf * 2**i, ngf * 2**(i - 1), 3, 2, 1, 1),
                       nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(ngf, 3, 1), nn.Tanh())

    def forward(self, c):
        return self.layers(c)


class Discriminator(nn.Module):
    """D_A, D_B: x (B, 3, H, W) -> logits (B, 1, H/16, W/16), rounded up; 2,758,849 parameters."""

    def __init__(self, ndf=64, layers=4, norm=True):
        super().__init__()
        widths = [3] + [ndf * 2**i for i in range(layers)]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 4, 2),
                          *([nn.GroupNorm(b, b)] if i > 0 and norm else []),  # instance norm
                          nn.LeakyReLU(0.2, inplace=True))
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)))
        self.logit = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x):
        for stage in self.stages:  # WHY: one more row and column for odd sizes, or 28x28 would end
            h, w = x.shape[2:]     # as 1x1, which instance norm turns into nothing: 14, 7, 4, 2
            x = stage(F.pad(x, (1, 1 + w % 2, 1, 1 + h % 2)))
        return self.logit(x)


class VAE(nn.Module):
    """Stage 1: x -> (reconstruction, mu). Only F is kept (Sec. 3.3)."""

    def __init__(self, ngf=64, downs=2, blocks=3):
        super().__init__()
        self.F = Encoder(ngf, downs, blocks)
        self.E_last, self.G_first = (ResidualBlock(ngf * 2**downs) for _ in range(2))
        self.G = Generator(ngf, downs, blocks)

    def forward(self, x):
        mu = self.E_last(self.F(x))
        return self.G(self.G_first(mu + torch.randn_like(mu))), mu


class DigitVGG(nn.Module):
    """A small stand-in for VGG-19 with taps of the same names: x (B, 3, H, W) -> {tap: map}.

    It learns (`train_digit_vgg`) to name the digit and the colours of ink and paper, as VGG-19
    has learned ImageNet's labels: then its maps tell shapes and colours apart, and L_P can.
    """

    def __init__(self, width=16):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(*([nn.MaxPool2d(2, ceil_mode=True)] if i else []),
                          nn.Conv2d(a, b, 3, padding=1), nn.ReLU())
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)))
        for stage in self.stages:
            nn.init.kaiming_normal_(stage[-2].weight, nonlinearity="relu")
        self.head = nn.Linear(widths[-1], 10 + 3 + 3)

    def forward(self, x):
        found = {}
        for i, stage in enumerate(self.stages, start=1):
            found[f"relu{i}_1"] = x = stage(x)
        return found

    def names(self, x):
        """Logits (B, 10) of the digit, (B, 3) each of red, green, blue in the ink, the paper."""
        return self.head(self.forward(x)["relu5_1"].mean(dim=(2, 3))).split([10, 3, 3], dim=1)


TRANSLATOR = ("E_A", "E_B", "E_last", "G_first", "G_A", "G_B")


def build(args, device):
    """Stage 2: the translator, both D, their Adams, the frozen F_A, F_B, and V (None if unused)."""
    torch.manual_seed(args.seed)
    shape, C = (args.ngf, args.downs, args.blocks), args.ngf * 2**args.downs
    nets = {"E_A": Encoder(*shape), "E_B": Encoder(*shape), "E_last": ResidualBlock(C),
            "G_first": ResidualBlock(C), "G_A": Generator(*shape), "G_B": Generator(*shape),
            "D_A": Discriminator(args.ndf, args.d_layers, args.d_norm),
            "D_B": Discriminator(args.ndf, args.d_layers, args.d_norm),
            "F_A": Encoder(*shape), "F_B": Encoder(*shape)}
    m = with_optimisers(nets, [nets[name] for name in TRANSLATOR], args, device)
    m.F_A.requires_grad_(False)
    m.F_B.requires_grad_(False)
    m.V = perceptual_network(args, device) if args.lambda_c > 0 or args.lambda_s > 0 else None
    return m


def perceptual_network(args, device):
    """V, the layers of phi (Sec. 3.3), frozen."""
    taps = [f"relu{i}_1" for i in range(1, 6)]
    V = DigitVGG() if args.vgg == "digits" else VGG(taps, args.vgg, ceil_mode=True)
    V.to(device, memory_format=layout(args)).requires_grad_(False)
    if args.compile:
        V.forward = torch.compile(V.forward)
    return V


def build_vaes(args, device):
    """Stage 1: a VAE-GAN per domain, V_A and V_B with D_A and D_B; the two share nothing."""
    torch.manual_seed(common.mix(args.seed, "stage 1"))
    shape = args.ngf, args.downs, args.blocks
    nets = {"V_A": VAE(*shape), "V_B": VAE(*shape),
            "D_A": Discriminator(args.ndf, args.d_layers, args.d_norm),
            "D_B": Discriminator(args.ndf, args.d_layers, args.d_norm)}
    return with_optimisers(nets, [nets["V_A"], nets["V_B"]], args, device)


def with_optimisers(nets, generators, args, device):
    """Initialise nets, place them, and add opt_G for `generators` and opt_D for D_A and D_B."""
    for net in nets.values():
        if args.init == "xavier" or isinstance(net, Discriminator):
            common.init_weights(net, "xavier", 1.0)
        else:
            for p in net.parameters():
                if p.dim() == 1:
                    nn.init.zeros_(p)
                else:
                    nn.init.trunc_normal_(p, 0, 0.02, -0.04, 0.04)
        net.to(device, memory_format=layout(args))
        if args.compile:
            net.forward = torch.compile(net.forward)
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(0.5, 0.999),
                             fused=device.type in ("cuda", "cpu"))
    return SimpleNamespace(**nets, opt_G=adam([p for net in generators for p in net.parameters()]),
                           opt_D=adam([*nets["D_A"].parameters(), *nets["D_B"].parameters()]))


def layout(args):
    return torch.channels_last if args.channels_last else torch.contiguous_format


# =============================================================================================
# 3. Losses, and what the content passes: mask and AdaIN
# =============================================================================================


def feature_mask(f, eta):
    """Sec. 3.1: m = (1 - eta) sigma(f) + eta, in (eta, 1), for f (B, C, h, w)."""
    return (1 - eta) * torch.sigmoid(f) + eta


def stylise(c, f_content, f_style, args):
    """AdaIN(m * c, gamma, beta): the mask from the content's picture, the style from the other's.

    All (B, C, h, w); f_style may have another size.
    """
    c, f_style = common.full(c), common.full(f_style)
    if args.eta < 1:
        c = feature_mask(common.full(f_content), args.eta) * c
    if args.adain == "paper":
        beta, gamma = mean_std(f_style)                                     # Eq. (1)
        return common.adain(c, beta, gamma)                                 # Eq. (2)
    if args.adain == "released":  # CHOICE (code): the parts of mean and variance are exchanged
        var_f, mean_f = torch.var_mean(f_style, dim=(2, 3), correction=0, keepdim=True)
        var_c, mean_c = torch.var_mean(c, dim=(2, 3), correction=0, keepdim=True)
        return mean_f * (c - mean_c) / (var_c + 1e-5) + var_f
    return c


def lsgan(logits, real):
    """UNIT's L_GAN, least squares: logits (B, 1, h, w) towards 1 if `real`, else towards 0."""
    return (common.full(logits) - float(real)).square().mean()


def l1(a, b):
    """Mean |a - b|: reconstruction of a VAE and of a cycle."""
    return (common.full(a) - b).abs().mean()


def kl(mu):
    """KL divergence of N(mu, I) from N(0, I), a mean over all, without UNIT's constant 1/2."""
    return common.full(mu).square().mean()


def phi(V, x):
    """Five maps (B, C_i, H_i W_i) of V, each channel divided by its L2 norm over the picture.

    WHY detach: the gradient is divided by the norm, too. One channel that is all but dead in one
    picture can make it 10,000 times the usual one, and ruin a good run in a single step; such a
    channel is compared, but not learned from. A dead channel stays zero.
    """
    maps = [common.full(f).flatten(2) for f in V(x).values()]
    maps = [torch.where(f.detach().norm(dim=2, keepdim=True) < 1e-2, f.detach(), f) for f in maps]
    return [F.normalize(f, dim=2, eps=1e-6) for f in maps]


def gram(f):
    """(B, C, n) -> (B, C, C): inner products of channels over n, the number of places."""
    with torch.autocast(f.device.type, enabled=False):  # a loss stays in float32
        return f @ f.transpose(1, 2) / f.shape[2]


def content_loss(phi_AB, phi_A):
    """L_c of Eq. (5): L1 distances of the maps, the deeper the more: weights 1/5, 2/5, ..., 1."""
    n = len(phi_AB)
    return sum(i / n * (a - b).abs().mean()
               for i, (a, b) in enumerate(zip(phi_AB, phi_A, strict=True), start=1))  # Eq. (5)


def style_loss(phi_AB, gram_B):
    """L_s of Eq. (5): L1 distances of Gram matrices; gram_B are the exemplar's."""
    return sum((gram(a) - b).abs().mean() for a, b in zip(phi_AB, gram_B, strict=True))  # Eq. (5)


# =============================================================================================
# 4. Data
# =============================================================================================

# The rules of MNIST-Single and MNIST-Multiple (Sec. 4). A digit is a mask: True where there is ink.

GREYS = np.array([(0, 0, 0), (255, 255, 255)], np.uint8)
PRIMARIES = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
INKS_AND_PAPERS = np.array([(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)])  # into PRIMARIES
CELLS = 4  # a board has 4 x 4 of them


def digit_colours(labels, domain, split, rng):
    """Colours of single digits: labels (N,) -> ink, paper, two arrays (N, 3) of bytes.

    Domain "A": black on white or white on black. "B": two different ones of red, green and blue;
    but in the split "train" the digits 5 to 9 are always red on green.
    """
    if domain == "A":
        ink = rng.integers(2, size=len(labels))
        return GREYS[ink], GREYS[1 - ink]
    pair = rng.integers(len(INKS_AND_PAPERS), size=len(labels))
    if split == "train":
        pair = np.where(np.asarray(labels) >= 5, 0, pair)
    return tuple(PRIMARIES[INKS_AND_PAPERS[pair]].swapaxes(0, 1))


def paint_digits(masks, ink, paper):
    """Masks (N, H, W), ink and paper (N, 3) -> pictures of two colours each, (N, H, W, 3) bytes."""
    return np.where(masks[..., None], ink[:, None, None], paper[:, None, None])


def board_colours(domain, rng):
    """Colours of one board: inks (10, 3), one per digit class, and paper (3,), bytes.

    Domain "A": all ink black and the paper white, or the reverse. "B": the paper black or white;
    class k has the hue k / 10, with saturation and value 0.5, each changed by up to 40 %.
    """
    paper = rng.integers(2)
    if domain == "A":
        return np.repeat(GREYS[1 - paper][None], 10, axis=0), GREYS[paper]
    inks = [colorsys.hsv_to_rgb(k / 10, *(0.5 * rng.uniform(0.6, 1.4, 2))) for k in range(10)]
    return np.round(np.array(inks) * 255).astype(np.uint8), GREYS[paper]


def board_layout(members, rng):
    """A board without colours: which mask shows class k, and in which cell: two arrays (10,).

    members: for each class, the indices of the masks that show it.
    """
    return (np.array([rng.choice(indices) for indices in members]),
            rng.permutation(CELLS**2)[:10])


def paint_board(masks, layout, inks, paper):
    """masks (N, h, w), a `board_layout` and its `board_colours` -> (4 h, 4 w, 3) bytes."""
    h, w = masks.shape[1:]
    board = np.tile(paper, (CELLS * h, CELLS * w, 1))
    for index, cell, ink in zip(*layout, inks, strict=True):
        row, column = divmod(cell, CELLS)
        board[row * h:(row + 1) * h, column * w:(column + 1) * w][masks[index]] = ink
    return board


# A domain has a length and picture(i, rng): its i-th training picture, (3, H, W) in [-1, 1].


class Pictures:
    """A domain that fits into memory: bytes (N, H, W, 3)."""

    def __init__(self, array):
        self.array = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, 3, 1)))

    def picture(self, i, rng):
        return unit(self.array[i])

    def __len__(self):
        return len(self.array)


class Boards:
    """A domain of MNIST-Multiple: 60,000 boards, each drawn when it is asked for."""

    def __init__(self, masks, labels, domain):
        self.masks, self.domain = masks, domain
        self.members = [np.flatnonzero(labels == k) for k in range(10)]

    def picture(self, i, rng):
        rng = np.random.default_rng([ord(self.domain), i])
        return unit(torch.from_numpy(paint_board(
            self.masks, board_layout(self.members, rng),
            *board_colours(self.domain, rng))).permute(2, 0, 1))

    def __len__(self):
        return 60_000


class Photos:
    """A domain of picture files, of any size, mirrored and cropped at random (code)."""

    def __init__(self, files, args):
        self.files, self.args = files, args

    def picture(self, i, rng):
        im = fitted(self.files[i], self.args)
        if self.args.mirror and rng.random() < 0.5:
            im = im.transpose(Image.FLIP_LEFT_RIGHT)
        if self.args.zoom < 1 and rng.random() < 0.5:
            share = rng.uniform(self.args.zoom, 1)
            w, h = share * im.width, share * im.height
            left, top = rng.uniform(0, im.width - w), rng.uniform(0, im.height - h)
            im = im.resize(im.size, Image.BILINEAR, box=(left, top, left + w, top + h))
        return common.to_tensor(im)

    def __len__(self):
        return len(self.files)


def fitted(path, args):
    """A picture file at the training size: the middle of it, in that shape, resized."""
    return ImageOps.fit(common.open_rgb(path), (args.size, args.height), Image.BICUBIC)


def unit(x):
    """Bytes -> float in [-1, 1]."""
    return x.float() / 127.5 - 1


def data_folder(args):
    """The folder of --data, drawn or downloaded if need be; None for MNIST."""
    if args.data.startswith("mnist-"):
        return None
    if args.data in DIGITS:
        toy = common.lab("toy", f"--data {args.data}")
        return toy.ensure(f"digits_{DIGITS[args.data]}", args.size)
    return common.find_data(args.data, LAYOUT, {}, None)


def mnist(args, split):
    """MNIST by torchvision as masks (N, 28, 28), True for ink (> 127.5), and labels (N,)."""
    from torchvision.datasets import MNIST

    if args.size != (own := 28 if args.data == "mnist-single" else 112):
        raise UserError(f"--size {args.size}: pictures of {args.data} have {own}x{own} pixels")
    last = Path(args.mnist_root) / "MNIST/raw/t10k-labels-idx1-ubyte"
    while int(os.environ.get("LOCAL_RANK", 0)) > 0 and not last.exists():
        time.sleep(1)  # torchrun: the first process fetches it
    try:
        data = MNIST(args.mnist_root, train=split == "train", download=not last.exists())
    except (OSError, RuntimeError) as error:
        raise UserError(f"--mnist-root {args.mnist_root}: no MNIST/raw there, and torchvision "
                        f"cannot download it ({' '.join(str(error).split())})") from None
    return data.data.numpy() > 127.5, data.targets.numpy()


def train_domains(args):
    """The training pictures of A and of B (Sec. 4)."""
    root = data_folder(args)
    if args.data in DIGITS and root:  # toy digits: small enough to be read once
        return [Pictures(read(common.find_split(root, "train", d, LAYOUT))) for d in "AB"]
    if root:
        return [Photos(common.find_split(root, "train", d, LAYOUT), args) for d in "AB"]
    masks, labels = mnist(args, "train")
    if args.data == "mnist-multiple":
        return [Boards(masks, labels, d) for d in "AB"]
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(masks)) for _ in "AB"]
    return [Pictures(paint_digits(masks[order], *digit_colours(
        labels[order], d, "train", rng))) for d, order in zip("AB", orders, strict=True)]


def read(files):
    """Picture files of one size -> bytes (N, H, W, 3)."""
    return np.stack([np.asarray(common.open_rgb(f)) for f in files])


def test_set(args, limit=None):
    """{'x_A': bytes (N, 3, H, W), 'x_B': ...} of the test split; x_AB and x_BA where known.

    Pair i is (x_A[i], x_B[i]), one the exemplar of the other; x_AB and x_BA are the true answers.
    MNIST: 1000 pairs. limit: the first so many of MNIST, of a folder evenly spaced ones.
    """
    root = data_folder(args)
    if args.data == "mnist-single":
        found = released_pairs(mnist(args, "test")[0])
    elif args.data == "mnist-multiple":
        found = board_pairs(*mnist(args, "test"))
    else:
        split = args.split
        if split == "test" and not any((root / d).is_dir() for d in ("testA", "test/A")):
            print(f"{root} has no test pictures: these are training pictures")
            split = "train"
        files = {f"x_{d}": common.find_split(root, split, d, LAYOUT) for d in "AB"}
        files |= {f"x_{d}": common.list_pictures(root / f"{split}{d}") for d in ("AB", "BA")
                  if (root / f"{split}{d}").is_dir()}
        n = min(map(len, files.values()))
        chosen = slice(0, n, max(1, n // limit) if limit else 1)
        found = {name: np.stack([np.asarray(fitted(f, args)) for f in fs[:n][chosen][:limit]])
                 for name, fs in files.items()}
    return {name: torch.from_numpy(np.moveaxis(a, 3, 1).copy())[:limit]
            for name, a in found.items()}


def released_pairs(masks, n=1000):
    """The first test pairs of the authors' MNIST-Single, from all 10,000 test masks.

    Their script drew with numpy's old generator, seed 0: two shuffles, then two colour draws.
    """
    rng = np.random.RandomState(0)
    order_A, order_B = list(range(len(masks))), list(range(len(masks)))
    rng.shuffle(order_A)
    rng.shuffle(order_B)
    white = (rng.uniform(size=len(masks)) >= 0.5).astype(int)[:n]
    pair = INKS_AND_PAPERS[np.floor(6 * rng.uniform(size=len(masks))).astype(int)[:n]]
    shapes = {"A": masks[order_A[:n]], "B": masks[order_B[:n]]}
    colours = {"A": (GREYS[white], GREYS[1 - white]),
               "B": (PRIMARIES[pair[:, 0]], PRIMARIES[pair[:, 1]])}
    return {f"x_{name}": paint_digits(shapes[name[0]], *colours[name[-1]])
            for name in ("A", "B", "AB", "BA")}


def board_pairs(masks, labels, n=1000):
    """Test pairs of MNIST-Multiple: each board in its own colours, and in the other's."""
    rng, members = np.random.default_rng(0), [np.flatnonzero(labels == k) for k in range(10)]
    boards = [{d: (board_layout(members, rng), *board_colours(d, rng)) for d in "AB"}
              for _ in range(n)]
    return {f"x_{name}": np.stack([paint_board(masks, b[name[0]][0], *b[name[-1]][1:])
                                   for b in boards]) for name in ("A", "B", "AB", "BA")}


class Unpaired(torch.utils.data.Dataset):
    """`self[n]`: the n-th training sample (x_A, x_B), two (3, H, W) tensors in [-1, 1].

    x_A walks through a new shuffle of its domain every epoch; x_B, its exemplar, is drawn at
    random (Sec. 1: an arbitrary one). A sample depends on (seed, n) alone.
    """

    def __init__(self, A, B, args):
        self.A, self.B, self.args = A, B, args

    def __getitem__(self, n):
        rng = random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.A))
        i = common.shuffled(len(self.A), common.mix(self.args.seed, "epoch", epoch))[i]
        return self.A.picture(i, rng), self.B.picture(rng.randrange(len(self.B)), rng)


def random_batch(args, device):
    """(x_A, x_B) of noise, shaped and laid out as in training; for lab/bench.py."""
    shape = (args.batch, 3, args.height, args.size)
    return [torch.rand(shape).mul(2).sub(1).to(device, memory_format=layout(args)) for _ in "AB"]


# =============================================================================================
# 5. One training step of each stage
# =============================================================================================


def pretrain_step(m, x_A, x_B, args):
    """Stage 1: one update of both VAEs and their discriminators. Returns losses by name."""
    autocast = functools.partial(torch.autocast, x_A.device.type, torch.bfloat16, enabled=args.amp)
    losses, fakes = {}, []
    m.opt_G.zero_grad(set_to_none=True)
    for d, x, V, D in (("A", x_A, m.V_A, m.D_A), ("B", x_B, m.V_B, m.D_B)):
        D.requires_grad_(False)
        with autocast():
            x_hat, mu = V(x)
            judged = D(x_hat)
        rec, divergence, GAN = l1(x_hat, x), kl(mu), lsgan(judged, True)
        (args.lambda_rec * rec + args.lambda_KL * divergence + args.lambda_GAN * GAN).backward()
        losses |= {f"rec_{d}": rec, f"KL_{d}": divergence, f"GAN_{d}": GAN}
        fakes.append(x_hat)
        D.requires_grad_(True)
    m.opt_G.step()
    losses |= update_discriminators(m, x_A, x_B, *fakes, args, autocast)
    return {name: loss.detach() for name, loss in losses.items()}


def encode(x, E, m):
    """x -> mu (B, C, h, w): a domain's own encoder, then the shared last block."""
    return m.E_last(E(x))


def content(mu, m, noise=True):
    """mu -> c (B, C, h, w): the noise of the VAE, then the generators' shared first block."""
    return m.G_first(mu + torch.randn_like(mu) if noise else mu)


def half_objective(x_A, f_A, f_B, maps, E_A, E_B, G_A, G_B, D_B, m, args):
    """The terms of Eq. (3) that the content of x_A enters, with x_B as exemplar.

    Called once as it stands, and once with the roles of the domains swapped. maps: phi(x_A), and
    the Gram matrices of x_B; or None. Returns ({name: term}, their weighted sum, x_AB).
    """
    mu = encode(x_A, E_A, m)
    c = content(mu, m)
    x_AA = G_A(stylise(c, f_A, f_A, args))                   # Fig. 3: reconstruction flow
    x_AB = G_B(stylise(c, f_A, f_B, args))                   # Fig. 3: translation flow
    mu_AB = encode(x_AB, E_B, m)
    x_ABA = G_A(stylise(content(mu_AB, m), f_A, f_A, args))  # CHOICE (code): f_A, not F_B(x_AB)
    terms = {"rec": l1(x_AA, x_A), "KL": kl(mu), "cyc": l1(x_ABA, x_A), "KL_cyc": kl(mu_AB),
             "GAN": lsgan(D_B(x_AB), True)}
    L = (args.lambda_rec * terms["rec"] + args.lambda_KL * terms["KL"]             # L_VAE
         + args.lambda_GAN * terms["GAN"]                                          # L_GAN
         + args.lambda_cyc * terms["cyc"] + args.lambda_KL * terms["KL_cyc"])      # L_CC, Eq. (3)
    if maps:
        phi_A, gram_B = maps
        phi_AB = phi(m.V, x_AB)
        terms |= {"c": content_loss(phi_AB, phi_A), "s": style_loss(phi_AB, gram_B)}
        L = L + args.lambda_c * terms["c"] + args.lambda_s * terms["s"]            # Eq. (4)
    return terms, L, x_AB


def train_step(m, x_A, x_B, args, rng, judge=True):
    """Stage 2: one update of the translator and, if `judge`, one of D_A and D_B.

    Returns losses by name. F_A, F_B and V stay as they are.
    rng is not used: the only random choice is noise, from torch's own generator.
    """
    autocast = functools.partial(torch.autocast, x_A.device.type, torch.bfloat16, enabled=args.amp)
    maps = None, None
    with torch.no_grad(), autocast():
        f_A, f_B = m.F_A(x_A), m.F_B(x_B)
        if m.V is not None:  # once for content and style of both directions
            phi_A, phi_B = ([p.detach() for p in phi(m.V, x)] for x in (x_A, x_B))
            maps = (phi_A, [gram(p) for p in phi_B]), (phi_B, [gram(p) for p in phi_A])
    for D in (m.D_A, m.D_B):
        D.requires_grad_(False)  # they judge here, and learn below
    m.opt_G.zero_grad(set_to_none=True)
    # WHY two backward passes: the halves share weights but no activations, so the first half's can
    # be freed before the second half's are made. The gradients add up.
    with autocast():
        terms_A, L, x_AB = half_objective(x_A, f_A, f_B, maps[0], m.E_A, m.E_B, m.G_A, m.G_B,
                                          m.D_B, m, args)
    L.backward()
    with autocast():
        terms_B, L, x_BA = half_objective(x_B, f_B, f_A, maps[1], m.E_B, m.E_A, m.G_B, m.G_A,
                                          m.D_A, m, args)
    L.backward()
    for D in (m.D_A, m.D_B):
        D.requires_grad_(True)
    m.opt_G.step()
    losses = {f"{name}_{way}": loss for way, terms in (("AB", terms_A), ("BA", terms_B))
              for name, loss in terms.items()}
    if judge:
        losses |= update_discriminators(m, x_A, x_B, x_BA, x_AB, args, autocast)
    return {name: loss.detach() for name, loss in losses.items()}


def update_discriminators(m, x_A, x_B, fake_A, fake_B, args, autocast):
    """One step of D_A and D_B: real pictures towards 1, fakes (no gradient) towards 0."""
    losses = {}
    m.opt_D.zero_grad(set_to_none=True)
    for name, D, fake, real in (("D_A", m.D_A, fake_A, x_A), ("D_B", m.D_B, fake_B, x_B)):
        with autocast():  # no layer of D mixes pictures, so real and fake can share one pass
            of_fake, of_real = D(torch.cat([common.full(fake.detach()), real])).split(len(real))
        losses[name] = 0.5 * (lsgan(of_fake, False) + lsgan(of_real, True))
        (args.lambda_GAN * losses[name]).backward()
    m.opt_D.step()
    return losses


# =============================================================================================
# 6. Training loop
# =============================================================================================


def rate(step, total):
    """Learning-rate factor at a step of a stage (code)."""
    return (1 - step / total) ** 0.9


def train_digit_vgg(V, args, device, steps=1200, batch=64):
    """Teach a `DigitVGG` to name digits, inks and papers, on the CPU about 20 s. In place.

    Both domains' pictures are among its own: any colour of both sets stands on any other.
    """
    if args.data.startswith("mnist"):
        masks, labels = mnist(args, "train")
    else:
        toy = common.lab("toy", f"--data {args.data}")
        masks, labels = toy.drawn_digits(3000, 28, np.random.default_rng(0))
    masks, labels = torch.from_numpy(masks), torch.from_numpy(labels)
    colours = torch.from_numpy(np.concatenate([GREYS, PRIMARIES])).float() / 255
    if DIGITS[args.data] == "multiple":
        inks = [board_colours("B", np.random.default_rng(i))[0] for i in range(20)]
        colours = torch.cat([colours[:2], torch.from_numpy(np.concatenate(inks)).float() / 255])
    rng = torch.Generator().manual_seed(common.mix(args.seed, "vgg"))

    def draw(high):
        return torch.randint(high, (batch,), generator=rng)

    adam = torch.optim.Adam(V.requires_grad_(True).parameters(), lr=2e-3)
    bce = F.binary_cross_entropy_with_logits
    for step in range(steps):
        adam.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        i, ink = draw(len(masks)), draw(len(colours))
        paper = (ink + 1 + draw(len(colours) - 1)) % len(colours)
        x = torch.where(masks[i][:, None], *(colours[c][:, :, None, None] for c in (ink, paper)))
        x = (x * 2 - 1).to(device, memory_format=layout(args))
        digit, of_ink, of_paper = V.names(x)
        right = digit.argmax(1).cpu() == labels[i]
        loss = (F.cross_entropy(digit, labels[i].to(device)) + bce(of_ink, colours[ink].to(device))
                + bce(of_paper, colours[paper].to(device)))
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
    V.requires_grad_(False)
    print(f"--vgg digits: no ImageNet weights; phi is a small network that was taught here to name "
          f"digits and colours (last batch: {right.float().mean():.2f} of the digits right)")


def pretrain(m, data, args):
    """Stage 1 (Sec. 3.3), in the folder features/ of the run; fills m.F_A and m.F_B.

    With --resume it goes on where it stopped.
    """
    folder = Path(args.run_folder) / "features"
    run = Run("egscit", argparse.Namespace(**vars(args) | {
        "run_folder": str(folder), "resume": args.resume and (folder / "last.pt").exists()}))
    vaes = build_vaes(args, run.device)
    run.resume_or_start(vars(vaes))
    test = test_set(args, 6)
    show = {d: unit(test[d]).to(run.device) for d in ("x_A", "x_B")}
    if run.step < args.pretrain:
        print(f"stage 1: F_A and F_B learn as encoders of two VAE-GANs, in {folder}")
        for step, (x_A, x_B) in run.steps(data, args.pretrain):
            set_rate(vaes, args.lr * rate(step, args.pretrain))
            run.log(pretrain_step(vaes, x_A, x_B, args))
        with torch.no_grad():
            run.save_samples({"x_A": show["x_A"], "x_AA": vaes.V_A(show["x_A"])[0],
                              "x_B": show["x_B"], "x_BB": vaes.V_B(show["x_B"])[0]})
        print(f"stage 1: {run.step} steps, {run.seconds:.0f} s")
    m.F_A.load_state_dict(vaes.V_A.F.state_dict())
    m.F_B.load_state_dict(vaes.V_B.F.state_dict())


def set_rate(m, lr):
    for optimiser in (m.opt_G, m.opt_D):
        optimiser.param_groups[0]["lr"] = lr


def saved_parts(m, args):
    """What last.pt holds: all but a V that is not ours."""
    own = m.V is not None and args.vgg == "digits"
    return {name: part for name, part in vars(m).items() if name != "V" or own}


def train(args):
    """Both stages, then the scores."""
    run = Run("egscit", args)
    data, show = Unpaired(*train_domains(args), args), test_set(args, 12 if args.size <= 32 else 6)
    m = build(args, run.device)
    run.resume_or_start(saved_parts(m, args))
    if args.small:
        print("small preset instead of the authors' settings: " + ", ".join(
            f"{k} {getattr(args, k)}" for k in SMALL_BOARDS))
    if run.step == 0 and args.features:
        reuse_features(m, args)
    elif run.step == 0:
        if m.V is not None and args.vgg == "digits" and not args.resume:
            train_digit_vgg(m.V, args, run.device)
        run.save()  # WHY now: a stop during stage 1 can then be resumed
        pretrain(m, data, args)
    for step, (x_A, x_B) in run.steps(data, args.steps):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(m, show, args))
        set_rate(m, args.lr * rate(step, args.steps))
        run.log(train_step(m, x_A, x_B, args, run.rng(), step % args.g_updates == 0))
    run.save_samples(sample_columns(m, show, args))
    scores = []
    if run.rank == 0:
        try:
            scores = all_scores(m, args)
        except UserError as error:  # without the folder lab/ MNIST can be trained on, not scored
            print(f"no scores: {error}")
    run.finish(scores)


def reuse_features(m, args):
    """--features: F_A, F_B and a V taught there from a run's last.pt; or F_A and F_B from the one
    of its features/, which stage 1 wrote. Widths must be the same."""
    parts, found = saved_parts(m, args), common.load_checkpoint(args.features, "egscit")["parts"]
    for d in "AB":
        if f"V_{d}" in found:
            found[f"F_{d}"] = {name.removeprefix("F."): value for name, value
                               in found[f"V_{d}"].items() if name.startswith("F.")}
    if "V" in parts and "V" not in found:
        raise UserError(f"--features {args.features}: it holds no network of --vgg digits; give "
                        "the last.pt of a run with that flag")
    common.load_parts({name: parts[name] for name in ("F_A", "F_B", "V") if name in parts}, found,
                      args.features)


# =============================================================================================
# 7. Translate and evaluate
# =============================================================================================


def direction(m, way):
    """(E, F of the content, F of the style, G) for the way 'AB' or 'BA'."""
    return (m.E_A, m.F_A, m.F_B, m.G_B) if way == "AB" else (m.E_B, m.F_B, m.F_A, m.G_A)


@torch.no_grad()
def translate(m, x, exemplar, args, way="AB"):
    """x (B, 3, H, W) in the style of exemplar (B, 3, H', W'), of any sizes, in [-1, 1].

    CHOICE: without noise, z = mu, so that one pair has one translation.
    """
    E, F_content, F_style, G = direction(m, way)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        f_style = F_style(exemplar)
        return common.same_size(
            lambda x: G(stylise(content(encode(x, E, m), m, noise=False), F_content(x), f_style,
                                args)), x, 2**args.downs).float().clamp(-1, 1)


def translated(m, test, args, way):
    """Translations of a test set as bytes (N, 3, H, W).

    CHOICE: rounded; the authors' were stretched to full contrast, each by itself.
    """
    device, chunk = next(m.G_A.parameters()).device, max(1, 50 * 28**2 // test["x_A"][0, 0].numel())
    pairs = zip(*(test[f"x_{d}"].split(chunk) for d in way), strict=True)
    return torch.cat([((translate(m, *(unit(t).to(device) for t in pair), args, way) + 1) * 127.5)
                      .round().byte().cpu() for pair in pairs])


def sample_columns(m, test, args):
    """Columns of a sample grid, as in Fig. 4: both directions with their true answers."""
    columns = {"x_A": test["x_A"], "x_B": test["x_B"]}
    for way in ("AB", "BA"):
        columns[f"x_{way}"] = translated(m, test, args, way)
        if f"x_{way}" in test:
            columns[f"true x_{way}"] = test[f"x_{way}"]
    return {name: unit(x) for name, x in columns.items()}


def packed(pictures):
    """Bytes (N, 3, H, W) -> one whole number a pixel, (N, H W): red, green, blue in 24 bits."""
    red, green, blue = pictures.flatten(2).long().unbind(1)
    return red << 16 | green << 8 | blue


def unpacked(colours):
    """The reverse of `packed` for (...) -> (..., 3), as floats."""
    return torch.stack([colours >> 16, colours >> 8 & 255, colours & 255], dim=-1).float()


def paper_colour(pictures):
    """The most frequent colour of each picture: bytes (N, 3, H, W) -> (N, 3, 1, 1)."""
    return unpacked(packed(pictures).mode(dim=1).values)[:, :, None, None].byte()


def pixel_accuracy(pictures, truth):
    """(ink, paper): shares of their pixels whose nearest palette colour is the true one.

    Bytes (N, 3, H, W). The palette is black, white, red, green, blue and the colours of the truth;
    paper is where the truth has its most frequent colour. Means over all such pixels.
    """
    codes, known = packed(truth), torch.tensor([0, 0xFFFFFF, 0xFF0000, 0xFF00, 0xFF])
    right = []
    for x, code in zip(pictures.flatten(2), codes, strict=True):
        palette = torch.cat([code, known]).unique()
        nearest = torch.cdist(x.T.float(), unpacked(palette)).argmin(1)
        right.append(palette[nearest] == code)
    right, paper = torch.stack(right), codes == codes.mode(dim=1, keepdim=True).values
    return float(right[~paper].float().mean()), float(right[paper].float().mean())


def all_scores(m, args):
    """Scores of both directions on the test set: digit_scores, or Eq. (5) where no truth is known.

    A list of {"name", "value", "sd", "better", "trivial"}; SSIM and its "sd" are over the pairs.
    """
    test, scores, V = test_set(args), [], m.V
    if V is None and not {"x_AB", "x_BA"} <= test.keys():  # L_P may be off, but not its scores
        V = perceptual_network(args, next(m.G_A.parameters()).device)
    for way in ("AB", "BA"):
        y, (x, exemplar) = translated(m, test, args, way), (test[f"x_{d}"] for d in way)
        if f"x_{way}" in test:
            found = digit_scores(y, x, exemplar, test[f"x_{way}"])
        else:
            found = perceptual_scores(V, y, x, exemplar)
        scores += [s | {"name": f"x_{way}: {s['name']}"} for s in found]
    return scores


def digit_scores(y, x, exemplar, truth):
    """SSIM to the truth and to the exemplar, ink and paper accuracy, with trivial answers.

    All are bytes (N, 3, H, W): translations y of x in the style of the exemplar, and their truth.
    """
    def ssim(a, b):
        return metrics.ssim(unit(a), unit(b))

    metrics = common.lab("metrics", "the score of digits")
    answers = {"": y, "the truth": truth, "copy the input": x, "copy the exemplar": exemplar,
               "the exemplar's paper": paper_colour(exemplar).expand_as(x).contiguous()}
    names = ["SSIM to the truth", "SSIM to the exemplar (Tab. 2)"]
    values = {answer: [ssim(a, truth), ssim(a, exemplar)] for answer, a in answers.items()}
    if all(len(code.unique()) <= 16 for code in packed(truth)):  # digits, not photographs
        names += ["ink accuracy", "paper accuracy"]
        for answer, a in answers.items():
            values[answer] += map(torch.tensor, pixel_accuracy(a, truth))
    scores = []
    for i, name in enumerate(names):
        score = {"name": name, "value": float(values[""][i].mean()), "better": "higher",
                 "trivial": {k: float(v[i].mean()) for k, v in values.items() if k}}
        scores.append(score | ({"sd": float(values[""][i].std(correction=0))} if i < 2 else {}))
    return scores


@torch.no_grad()
def perceptual_scores(V, y, x, exemplar):
    """Eq. (5)'s content distance to x and style distance to the exemplar; bytes (N, 3, H, W)."""
    device = next(V.parameters()).device

    def distances(a):
        sums = torch.zeros(2)
        for one in zip(a.split(1), x.split(1), exemplar.split(1), strict=True):
            of_a, of_x, of_exemplar = (phi(V, unit(t).to(device)) for t in one)
            sums += torch.stack([content_loss(of_a, of_x),
                                 style_loss(of_a, [gram(f) for f in of_exemplar])]).cpu()
        return (sums / len(a)).tolist()

    values = {"": distances(y), "copy the input": distances(x),
              "copy the exemplar": distances(exemplar)}
    return [{"name": name, "value": values[""][i], "better": "lower",
             "trivial": {k: v[i] for k, v in values.items() if k}}
            for i, name in enumerate(("content distance", "style distance"))]


def load_translator(args, device):
    """The networks of --weights, but for phi."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script")
    args = argparse.Namespace(**vars(args) | {"lambda_c": 0.0, "lambda_s": 0.0})
    state, m = common.load_checkpoint(args.weights, "egscit"), build(args, device)
    common.load_parts({name: part for name, part in saved_parts(m, args).items()
                       if not name.startswith(("opt", "D"))}, state["parts"], args.weights)
    return m


def translate_files(args):
    """Translate --translate (a picture or a folder of them) in the style of --exemplar, to PNG."""
    if args.exemplar is None:
        raise UserError("--translate needs --exemplar PATH as well, a picture of the other domain")
    device = common.pick_device(args.device)
    m, way = load_translator(args, device), args.direction.replace("to", "")
    exemplar = common.to_tensor(fitted(args.exemplar, args))[None].to(device)
    common.translate_files(args.translate, args.out or "translated",
                           lambda x: translate(m, x.to(device), exemplar, args, way))


def evaluate(args):
    """Tab. 2 for --weights: SSIM as mean and deviation over the test pairs, and accuracies."""
    common.print_scores(all_scores(load_translator(args, common.pick_device(args.device)), args))


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
