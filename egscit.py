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
             E_A, E_B             E_A, E_B           (B, 3, H, W) -> (B, C, h, w)
             z                    z_A                (B, C, h, w) = E_last(E_A(x_A)), its mean
             c_A                  c_A                (B, C, h, w) = G_first(z_A + noise)
             shared weights       E_last, G_first    last block of E, first of G, of both domains
             G_A, G_B             G_A, G_B           (B, C, h, w) -> (B, 3, H, W)
             D_A, D_B             D_A, D_B           (B, 3, H, W) -> logits (B, 1, H/16, W/16)
             F_A, f_A             F_A, f_A           frozen; (B, C, h, w)
             m_A, eta             m_A, eta           (1 - eta) sigma(f_A) + eta; eta = 0.5
             gamma_B, beta_B      gamma_B, beta_B    (B, C, 1, 1), deviation and mean of f_B
             x_AA, x_AB           x_AA, x_AB         reconstruction, translation; x_ABA: cycle
             VGG, phi, Gram       vgg, phi, gram     five maps (B, C_i, H_i W_i); (B, C_i, C_i)

OBJECTIVE    Eq. (1)  gamma_B = delta(f_B), beta_B = mu(f_B)
             Eq. (2)  AdaIN(c_A, gamma_B, beta_B) = gamma_B (c_A - mu(c_A)) / delta(c_A) + beta_B,
                      used on m_A * c_A
             Eq. (3)  L = L_VAE + L_GAN + L_CC of both domains + L_P; UNIT's, here of A:
                      L_VAE = lambda_rec |x_AA - x_A|_1 + lambda_KL KL(z_A)
                      L_GAN = lambda_GAN (D_A(x_BA) - 1)^2
                      L_CC = lambda_cyc |x_ABA - x_A|_1 + lambda_KL KL(z_AB)
             Eq. (4)  L_P = lambda_c L_c + lambda_s L_s of both directions
             Eq. (5)  L_c = E |phi(x_AB) - phi(x_A)|_1, L_s = E |Gram(x_AB) - Gram(x_B)|_1

CHOICES      where the text is silent, or differs from what the authors ran (their released code):
             delta is called variance; AdaIN as it is known takes the deviation: so here. The code
             scales by f's mean, shifts by its variance, divides by c's: row released_adain.
             phi: every VGG channel divided by its L2 norm over the picture (code); without it the
             published weights mean nothing. Gram over H W, L_c weighs its maps by i/5 (code).
             UNIT's losses, weights and least squares are the code's; |.|_1 is a mean.
             Noise in training only (code: always). A cycle has the masks and the style of the
             original picture (code). A pair is drawn afresh each time (code: kept).
             One D update per 5 of G, D first (code), on the pictures G is then judged by (code:
             fresh ones). Digits are not mirrored or cropped; photographs are (code: all).
             Tab. 2 compares x_AB with the *exemplar* x_B, which shows another digit, and x_BA with
             x_A. Perfect translations score 0.484 and 0.226 there, the exemplar itself 1. Here
             also: SSIM to the true translation, and which share of ink and paper has its colour.
             Not here: Tab. 3 (a segmenter trained on translations) and the supplement.

USAGE        python egscit.py                                  # toy digits, scores at the end
             python egscit.py --data mnist-single [--small]    # --small: sized for a CPU
             python egscit.py --data streets --task street     # trainA trainB testA testB
             python egscit.py --translate x.jpg --exemplar y.jpg --direction AtoB --weights last.pt
             python -m lab.figures egscit masks --weights last.pt   # or embedding: Fig. 5 by PCA
EXPECT       python egscit.py: 9 minutes of a core, 12 of a busy one (seeds 0 to 2, 200 test pairs):
             SSIM to the truth 0.64 to 0.68 and 0.46 to 0.55 (flat paper 0.50, 0.24), papers right
             0.91 to 0.94, inks 0.62 to 0.76. L_P of the truth is reached; what fails is strokes of
             digits in B's rare colours, green ink and red paper (half of B is red on green). Masks
             do nothing there: constant ones score the same. D_A, D_B stay near their chance (0.24,
             0.23; 0.25), as do GAN_A, GAN_B (0.29); in stage 1 all four are at it.
"""

import argparse
import colorsys
import functools
import os
import random
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from torch.nn import functional

import common
from common import VGG, Run, UserError, full

# ==== 1. Configuration ========================================================================

DIGITS = {"toy": "single", "toy-multiple": "multiple",
          "mnist-single": "single", "mnist-multiple": "multiple"}
STREET = {"size": 512, "batch": 3, "lambda_c": 100.0, "lambda_s": 1e4}  # half as high
TASKS = {  # Sec. 4; weights, rates and most sizes are in the authors' scripts only
    "mnist-single": {"size": 28, "downs": 0, "lr": 1e-5, "lambda_c": 10.0, "lambda_s": 1e3},
    "mnist-multiple": {"size": 112, "lr": 1e-5, "lambda_c": 100.0, "lambda_s": 1e4},
    "street": STREET,                                                      # GTA5 <-> BDD
    "cityscapes": STREET | {"lambda_c": 500.0, "lambda_s": 1e3},           # GTA5 <-> Cityscapes
    "faces": {"size": 128, "lambda_c": 10.0, "lambda_s": 5e3},
}
SMALL = {  # a CPU's share; no term of Eq. (3) differs
    "small": True,
    "steps": 1600, "pretrain": 300, "batch": 4,            # short: so D learns in every step, ...
    "g_updates": 1, "ngf": 32, "ndf": 32,                  # ... narrow, at fifty times the rate
    # WHY: 1e-3 is as good, but one seed of five had a saturated G_B for 300 steps (L_D_B 0.02) and
    # was ill for 1,100; with 5e-4 none of five
    "lr": 5e-4,
    "d_layers": 3, "d_norm": False, "init": "xavier",      # D keeps absolute colours
    # WHY: with UNIT's 0.1, digits that are to be darker than their paper and were brighter, or the
    # reverse, break up (SSIM to the truth on val 0.56, 0.47; with 2 0.63, 0.50; with 10 0.66, 0.54;
    # with 30 0.60, 0.49; ngf 16 and lr 1e-3)
    "lambda_KL": 10.0,
    # WHY: with UNIT's 10, ink and paper still change places in half of the pairs after 1,000 steps
    # (SSIM to the truth 0.44 and 0.33 on val; ngf 16, lambda_KL 0.1)
    "lambda_GAN": 100.0,
    # WHY: with these weights L_P of the truth (20), of the input (26) and of exchanged colours (28)
    # on --vgg digits are near those that a real VGG-16 has with the authors' weights (19, 26, 22)
    "vgg": "digits", "lambda_c": 30.0, "lambda_s": 3e3,
    "workers": 0, "sample_every": 400}
SMALL_BOARDS = SMALL | {
    "ngf": 16, "lambda_KL": 0.1,                           # 16 times the pixels; UNIT's
    # WHY: a board's L_c and L_s are 5 and 60 times smaller than a digit's. With SMALL's weights L_P
    # of the truth is 1.3, of the input 1.1; with these 15 and 22 (val). The code, too, has larger
    # ones for boards (ten times both)
    "lambda_c": 300.0, "lambda_s": 6e4}


def get_args(argv=None):
    """Flags in layers: the code's < --task's < --small's < the checkpoint's < the command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--task", choices=list(TASKS),
        help="whose sizes and weights (Sec. 4); digits: those of --data, else street")
    add("--small", action=switch, help="digits: settings for a CPU (--data toy: yes, others: no)")
    add("--mnist-root", default="datasets", metavar="DIR", help="where MNIST/raw is or comes")
    add("--size", type=int, default=512, help="width of a training picture (code)")
    add("--height", type=int, help="its height (streets: half of --size, else --size)")
    add("--batch", type=int, default=8, help="pictures of each domain per step and process (code)")
    add("--steps", type=int, help="updates of G (code: --g-updates for each training pair)")
    add("--pretrain", type=int, help="updates of stage 1, which gives F (code: one for each pair)")
    add("--features", metavar="FILE", help="skip stage 1: F_A, F_B of a run's last.pt")
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
    add("--lambda-GAN", type=float, default=10.0, help="L_GAN: UNIT's lambda_0")
    add("--lambda-KL", type=float, default=0.1, help="all KL terms: UNIT's lambda_1 = lambda_3")
    add("--lambda-rec", type=float, default=100.0, help="reconstruction: UNIT's lambda_2")
    add("--lambda-cyc", type=float, default=100.0, help="cycle: UNIT's lambda_4")
    add("--lambda-c", type=float, default=10.0, help="Eq. (4): content (code: by task)")
    add("--lambda-s", type=float, default=1e3, help="Eq. (4): style (code: by task)")
    add("--vgg", default="imagenet", help="phi: imagenet, random, or a FILE of VGG-19 or VGG-16; or"
                                          " digits: a small one, which is taught here, once, with "
                                          "labels, to name drawn digits and their colours")
    add("--exemplar", metavar="PATH", help="--translate: picture of the style")
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB", help="--translate: which way")

    def presets(args):
        digits = DIGITS.get(args.data)
        task = args.task or (f"mnist-{digits}" if digits else "street")
        small = args.data.startswith("toy") if args.small is None else args.small
        preset = {"single": SMALL, "multiple": SMALL_BOARDS}.get(digits) if small else None
        return {"task": task} | TASKS[task] | (preset or {})

    args = common.parse_flags(p, argv, "egscit", presets, run_name)
    street = args.task in ("street", "cityscapes")
    args.height = args.height or (args.size // 2 if street else args.size)
    common.TRAINED = min(args.size, args.height)  # of the short side, as --side
    cell = 2**args.downs
    least = max(16, 2 * cell)
    if min(args.size, args.height) < least or args.size % cell or args.height % cell:
        raise UserError(f"--size {args.size} --height {args.height}: must be at least {least} and "
                        f"multiples of {cell}")
    if args.data in DIGITS and not args.translate and args.height != args.size:
        raise UserError(f"--data {args.data}: digits are square, not {args.size}x{args.height}")
    if args.data in ("mnist-single", "mnist-multiple") and args.split == "val":
        raise UserError(f"--split val: {args.data} has train and test only")
    if args.d_norm and max(args.size, args.height) <= 2**args.d_layers:
        raise UserError(f"--d-layers {args.d_layers}: D's last map would be one place, which "
                        "--d-norm turns into nothing")
    if args.small and args.data not in DIGITS and not (args.translate or args.evaluate):
        raise UserError(f"--small: for {', '.join(DIGITS)} only, not for --data {args.data}")
    return args


def run_name(args):
    return f"egscit-{Path(args.data).name}"


# ==== 2. Networks =============================================================================


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
        for i in range(downs):                                                # (B, 64, H, W)
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(ngf * 2**i, ngf * 2**(i + 1), 3, 2),
                       nn.LeakyReLU(0.2, inplace=True)]
        layers += [ResidualBlock(ngf * 2**downs) for _ in range(blocks)]      # (B, 256, H/4, W/4)
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Generator(nn.Module):
    """G_A, G_B without the shared block: (B, C, h, w) -> (B, 3, H, W) in [-1, 1]."""

    def __init__(self, ngf=64, downs=2, blocks=3):
        super().__init__()
        layers = [ResidualBlock(ngf * 2**downs) for _ in range(blocks)]       # (B, 256, H/4, W/4)
        for i in range(downs, 0, -1):  # Sec. 3.2: transposed convolutions
            # output_padding 1: one of the two ways to H and W; the code's is the mirrored one
            layers += [nn.ConvTranspose2d(ngf * 2**i, ngf * 2**(i - 1), 3, 2, 1, 1),
                       nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(ngf, 3, 1), nn.Tanh())  # (B, 3, H, W)

    def forward(self, c):
        return self.layers(c)


class Discriminator(nn.Module):
    """D_A, D_B: x (B, 3, H, W) -> logits (B, 1, H/16, W/16), rounded up; 2,758,849 parameters.

    CHOICE: LeakyReLU where one expects it (code: in places twice, and on the logit).
    """

    def __init__(self, ndf=64, layers=4, norm=True):
        super().__init__()
        widths = [3] + [ndf * 2**i for i in range(layers)]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 4, 2),
                          *([nn.GroupNorm(b, b)] if i > 0 and norm else []),  # affine IN (code)
                          nn.LeakyReLU(0.2, inplace=True))
            for i, (a, b) in enumerate(pairwise(widths)))
        self.logit = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x):
        for stage in self.stages:
            # WHY: one more row and column for odd sizes (code), or 28x28 would end as 1x1, which
            # instance norm turns into nothing; so: 14, 7, 4, 2
            h, w = x.shape[2:]
            x = stage(functional.pad(x, (1, 1 + w % 2, 1, 1 + h % 2)))
        return self.logit(x)


class VAE(nn.Module):
    """Stage 1: x -> (reconstruction, z). Only F is kept (Sec. 3.3)."""

    def __init__(self, ngf=64, downs=2, blocks=3):
        super().__init__()
        self.F = Encoder(ngf, downs, blocks)
        self.E_last, self.G_first = (ResidualBlock(ngf * 2**downs) for _ in range(2))
        self.G = Generator(ngf, downs, blocks)

    def forward(self, x, noise=True):
        z = self.E_last(self.F(x))                                            # (B, C, h, w)
        c = self.G_first(z + torch.randn_like(z) if noise else z)             # (B, C, h, w)
        return self.G(c), z


def build(args, device, with_vgg=True):
    """Stage 2: the translator, both D, their Adams, and frozen: F_A, F_B and the layers of phi."""
    torch.manual_seed(args.seed)
    shape, C = (args.ngf, args.downs, args.blocks), args.ngf * 2**args.downs
    nets = SimpleNamespace(
        E_A=Encoder(*shape), E_B=Encoder(*shape), E_last=ResidualBlock(C),
        G_A=Generator(*shape), G_B=Generator(*shape), G_first=ResidualBlock(C),
        D_A=Discriminator(args.ndf, args.d_layers, args.d_norm),
        D_B=Discriminator(args.ndf, args.d_layers, args.d_norm),
        F_A=Encoder(*shape), F_B=Encoder(*shape))
    add_optimisers(nets, [nets.E_A, nets.E_B, nets.E_last, nets.G_first, nets.G_A, nets.G_B],
                   args, device)
    nets.F_A.requires_grad_(False)
    nets.F_B.requires_grad_(False)
    if with_vgg:
        if args.vgg == "digits":
            vgg = common.lab("toy", "--vgg digits").digit_vgg()
        else:  # CHOICE: torchvision's weights (code: Caffe's). ceil_mode (code): 28, 14, 7, 4, 2
            # places a side, or a map of relu5_1 would be 1x1
            vgg = VGG([f"relu{i}_1" for i in range(1, 6)], args.vgg, ceil_mode=True)  # Sec. 3.3
        nets.vgg = vgg.to(device, memory_format=layout(args))
        if args.compile:
            nets.vgg.forward = torch.compile(nets.vgg.forward)
    return nets


def build_vaes(args, device):
    """Stage 1: a VAE-GAN per domain, VAE_A with D_A and VAE_B with D_B; the two share nothing."""
    torch.manual_seed(common.mix(args.seed, "stage 1"))
    shape = args.ngf, args.downs, args.blocks
    nets = SimpleNamespace(VAE_A=VAE(*shape), VAE_B=VAE(*shape),
                           D_A=Discriminator(args.ndf, args.d_layers, args.d_norm),
                           D_B=Discriminator(args.ndf, args.d_layers, args.d_norm))
    add_optimisers(nets, [nets.VAE_A, nets.VAE_B], args, device)
    return nets


def add_optimisers(nets, generators, args, device):
    """Draw and place all weights; add opt_G for `generators` and opt_D for D_A and D_B."""
    for net in vars(nets).values():
        if args.init == "xavier" or isinstance(net, Discriminator):
            common.init_weights(net, "xavier", 1.0)
        else:
            for p in net.parameters():
                if p.dim() > 1:
                    nn.init.trunc_normal_(p, 0, 0.02, -0.04, 0.04)
                else:
                    nn.init.zeros_(p)
        net.to(device, memory_format=layout(args))
        if args.compile:
            net.forward = torch.compile(net.forward)
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(0.5, 0.999),
                             fused=device.type in ("cuda", "cpu"))
    nets.opt_G = adam([p for net in generators for p in net.parameters()])
    nets.opt_D = adam([*nets.D_A.parameters(), *nets.D_B.parameters()])
    nets.D_A.requires_grad_(False)  # but in `update_discriminators`
    nets.D_B.requires_grad_(False)


def layout(args):
    return torch.channels_last if args.channels_last else torch.contiguous_format


# ==== 3. Losses, and what the content passes: mask and AdaIN ==================================


def mask(f, eta):
    """Sec. 3.1: m = (1 - eta) sigma(f) + eta, in (eta, 1), for f (B, C, h, w)."""
    return (1 - eta) * torch.sigmoid(full(f)) + eta


def mu(f):
    """Mean over places, (B, C, h, w) -> (B, C, 1, 1)."""
    return full(f).mean(dim=(2, 3), keepdim=True)


def delta(f):
    """Deviation over places, (B, C, h, w) -> (B, C, 1, 1); eps 1e-5 is Huang & Belongie's."""
    return (full(f).var(dim=(2, 3), correction=0, keepdim=True) + 1e-5).sqrt()


def adain(c, gamma, beta):
    """c (B, C, h, w) with the deviation gamma and the mean beta, (B, C, 1, 1)."""
    return gamma * (c - mu(c)) / delta(c) + beta                                # Eq. (2)


def lsgan(logits, target):  # same as cyclegan.py: lsgan
    """UNIT's L_GAN by least squares: E (D(.) - target)^2; logits (B, 1, h, w)."""
    return (full(logits) - target).square().mean()


def l1(a, b):
    """Mean |a - b|, the |.|_1 of reconstruction, cycle, L_c and L_s."""
    return (full(a) - b).abs().mean()


def kl(z):
    """Twice the KL divergence of N(z, I) from N(0, I), a mean over all (code, whose z is noisy: a
    constant more). CHOICE: once per encoding (UNIT's text counts that of x_A twice)."""
    return full(z).square().mean()


def phi(vgg, x):
    """Five maps (B, C_i, H_i W_i) of vgg, each channel divided by its L2 norm over the picture.

    WHY detach: the gradient is divided by the norm, too. One channel that is all but dead in one
    picture can make it 10,000 times the usual one, and ruin a good run in a single step; such a
    channel (norm < 0.01) is compared, but not learned from. A dead one stays zero (eps: the code's
    is 1e-12).
    """
    maps = [full(f).flatten(2) for f in vgg(x).values()]
    maps = [torch.where(f.detach().norm(dim=2, keepdim=True) < 1e-2, f.detach(), f) for f in maps]
    return [functional.normalize(f, dim=2, eps=1e-6) for f in maps]


def gram(f):
    """(B, C, n) -> (B, C, C): inner products of channels over n, the number of places."""
    return f @ f.transpose(1, 2) / f.shape[2]


def content_loss(phi_AB, phi_A):
    """L_c of Eq. (5): L1 distances of the five maps, the deeper the more."""
    weights = 1/5, 2/5, 3/5, 4/5, 1
    return sum(w * l1(a, b) for w, a, b in zip(weights, phi_AB, phi_A, strict=True))  # Eq. (5), L_c


def style_loss(phi_AB, phi_B):
    """L_s of Eq. (5): L1 distances of Gram matrices, x_AB's from the exemplar's."""
    return sum(l1(gram(a), gram(b)) for a, b in zip(phi_AB, phi_B, strict=True))  # Eq. (5), L_s


CHANCE = dict.fromkeys(("GAN_A", "GAN_B", "L_D_A", "L_D_B"), 0.25)  # a D of 1/2 everywhere

# ==== 4. Data =================================================================================

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
    """Masks (N, H, W), ink and paper (N, 3) -> pictures of two colours each, (N, H, W, 3) bytes; or
    (H, W), (3,) -> one, (H, W, 3)."""
    return np.where(masks[..., None], ink[..., None, None, :], paper[..., None, None, :])


def board_colours(domain, rng):
    """Colours of one board: inks (10, 3), one per digit class, and paper (3,), bytes.

    Domain "A": all ink black and the paper white, or the reverse. "B": the paper black or white;
    class k has the hue k / 10, with saturation and value 0.5, each changed by up to 40 % (the
    code's files were also stretched to full contrast, an accident of how they were saved).
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


class Digits:
    """A domain of MNIST-Single or MNIST-Multiple; pictures are painted when they are asked for."""

    def __init__(self, masks, labels, domain, boards):
        rng = np.random.default_rng(ord(domain))
        order = rng.permutation(len(masks))  # A and B in orders of their own
        self.masks, self.domain, self.boards = masks[order], domain, boards
        self.members = [np.flatnonzero(labels[order] == k) for k in range(10)]
        self.ink, self.paper = digit_colours(labels[order], domain, "train", rng)

    def picture(self, i, rng):
        if self.boards:
            own = np.random.default_rng([ord(self.domain), i])
            board = board_layout(self.members, own), *board_colours(self.domain, own)
            return common.to_tensor(paint_board(self.masks, *board))
        return common.to_tensor(paint_digits(self.masks[i], self.ink[i], self.paper[i]))

    def __len__(self):
        return len(self.masks)


class Photos:
    """A domain of picture files; photographs are mirrored and cropped at random (code)."""

    def __init__(self, files, args):
        self.files, self.args = files, args

    def picture(self, i, rng):
        im = fitted(self.files[i], self.args)
        if self.args.data not in DIGITS:
            if rng.random() < 0.5:
                im = im.transpose(Image.FLIP_LEFT_RIGHT)
            if rng.random() < 0.5:
                share = rng.uniform(0.8, 1)
                w, h = share * im.width, share * im.height
                left, top = rng.uniform(0, im.width - w), rng.uniform(0, im.height - h)
                im = im.resize(im.size, Image.BILINEAR, box=(left, top, left + w, top + h))
        return common.to_tensor(im)

    def __len__(self):
        return len(self.files)


def fitted(path, args):
    """A picture file at the training size: the middle of it, in that shape, resized."""
    return ImageOps.fit(common.open_rgb(path), (args.size, args.height), Image.BICUBIC)


def data_folder(args):
    """The folder of --data, drawn if need be; None for MNIST."""
    if args.data in ("mnist-single", "mnist-multiple"):
        return None

    def draw_toy():
        toy = common.lab("toy", f"--data {args.data}")
        return toy.ensure(f"digits_{DIGITS[args.data]}", args.size)

    layouts = f"{common.UNPAIRED}, or toy-multiple, mnist-single, mnist-multiple"
    return common.find_data("toy" if args.data in DIGITS else args.data, layouts, {}, draw_toy)


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


class Unpaired(torch.utils.data.Dataset):
    """`self[n]`: the n-th training sample (x_A, x_B), two (3, H, W) tensors in [-1, 1].

    x_A walks through a new shuffle of its domain every epoch; x_B, its exemplar, is drawn at
    random (Sec. 1: an arbitrary one). A sample depends on (seed, n) alone.
    """

    def __init__(self, args):
        self.seed, root = args.seed, data_folder(args)
        if root:
            self.A, self.B = (Photos(common.find_split(root, "train", d), args) for d in "AB")
        else:
            boards, (masks, labels) = args.data == "mnist-multiple", mnist(args, "train")
            self.A, self.B = (Digits(masks, labels, d, boards) for d in "AB")

    def __getitem__(self, n):
        rng = random.Random(common.mix(self.seed, n))
        epoch, i = divmod(n, len(self.A))
        i = common.shuffled(len(self.A), common.mix(self.seed, "epoch", epoch))[i]
        return self.A.picture(i, rng), self.B.picture(rng.randrange(len(self.B)), rng)


def test_set(args, limit):
    """{'x_A': (N, 3, H, W) in [-1, 1], 'x_B': ..., and where known 'x_AB', 'x_BA'}; `UserError`.

    Pair i is (x_A[i], x_B[i]), one the exemplar of the other; x_AB and x_BA are the true answers.
    limit: the first so many of MNIST (single: the authors' own pairs), of a folder evenly spaced.
    """
    if args.data in ("mnist-single", "mnist-multiple"):
        toy = common.lab("toy", "a test with known answers")
        pairs = toy.released_pairs if args.data == "mnist-single" else toy.board_pairs
        return {name: torch.stack([common.to_tensor(picture) for picture in pictures])
                for name, pictures in pairs(*mnist(args, "test"), limit).items()}
    root, files = data_folder(args), {}
    for name in ("A", "B", "AB", "BA"):
        if len(name) == 1 or Path(root, f"{args.split}{name}").is_dir():
            files[f"x_{name}"] = common.find_split(root, args.split, name)
    n = min(map(len, files.values()))
    chosen = [i * n // min(n, limit) for i in range(min(n, limit))]
    return {name: torch.stack([common.to_tensor(fitted(paths[i], args)) for i in chosen])
            for name, paths in files.items()}


# ==== 5. One training step of each stage ======================================================


def pretrain_step(nets, x_A, x_B, args):
    """Stage 1 (Sec. 3.3): one update of D_A and D_B, then one of both VAEs; losses by name."""
    VAE_A, VAE_B, D_A, D_B = nets.VAE_A, nets.VAE_B, nets.D_A, nets.D_B
    autocast = functools.partial(torch.autocast, x_A.device.type, torch.bfloat16, enabled=args.amp)
    with autocast():
        x_AA, z_A = VAE_A(x_A)                           # (B, 3, H, W), (B, C, h, w)
        x_BB, z_B = VAE_B(x_B)
    losses = update_discriminators(nets, x_A, x_B, x_AA, x_BB, args, autocast)
    with autocast():
        GAN_A, GAN_B = lsgan(D_A(x_AA), 1.0), lsgan(D_B(x_BB), 1.0)
    rec_A, rec_B, KL_A, KL_B = l1(x_AA, x_A), l1(x_BB, x_B), kl(z_A), kl(z_B)
    L = (args.lambda_rec * (rec_A + rec_B) + args.lambda_KL * (KL_A + KL_B)
         + args.lambda_GAN * (GAN_A + GAN_B))
    nets.opt_G.zero_grad()
    L.backward()
    nets.opt_G.step()
    return losses | {"rec_A": rec_A, "KL_A": KL_A, "GAN_A": GAN_A,
                     "rec_B": rec_B, "KL_B": KL_B, "GAN_B": GAN_B}


def update_discriminators(nets, x_A, x_B, fake_A, fake_B, args, autocast):
    """One update of D_A and D_B, which are frozen elsewhere; pictures (B, 3, H, W), real ones
    towards 1, fakes (detached) towards 0."""
    D_A, D_B = nets.D_A.requires_grad_(True), nets.D_B.requires_grad_(True)
    with autocast():
        L_D_A = (lsgan(D_A(x_A), 1.0) + lsgan(D_A(fake_A.detach()), 0.0)) / 2
        L_D_B = (lsgan(D_B(x_B), 1.0) + lsgan(D_B(fake_B.detach()), 0.0)) / 2
    nets.opt_D.zero_grad()
    (args.lambda_GAN * (L_D_A + L_D_B)).backward()       # halves and weight: code's; Adam ignores
    nets.opt_D.step()
    D_A.requires_grad_(False)
    D_B.requires_grad_(False)
    return {"L_D_A": L_D_A, "L_D_B": L_D_B}


def train_step(nets, x_A, x_B, args, update_D=True):
    """Stage 2: if `update_D` one update of D_A and D_B, then one of the translator.

    x_A, x_B (B, 3, H, W), each the exemplar of the other; returns losses by name. F_A, F_B and vgg
    stay as they are.
    """
    E_A, E_B, G_A, G_B, D_A, D_B = nets.E_A, nets.E_B, nets.G_A, nets.G_B, nets.D_A, nets.D_B
    autocast = functools.partial(torch.autocast, x_A.device.type, torch.bfloat16, enabled=args.amp)

    def encode(E, x):  # the last block is shared
        return nets.E_last(E(x))                                         # (B, C, h, w)

    def content(z):    # so is the generators' first; the noise is the VAE's
        return nets.G_first(z + torch.randn_like(z))                     # (B, C, h, w)

    with autocast():
        # ---- masks and style, by the frozen F ---------------------------------------------------
        f_A, f_B = nets.F_A(x_A), nets.F_B(x_B)                          # (B, C, h, w)
        m_A, m_B = mask(f_A, args.eta), mask(f_B, args.eta)              # (B, C, h, w)
        gamma_A, beta_A = delta(f_A), mu(f_A)                            # Eq. (1); (B, C, 1, 1)
        gamma_B, beta_B = delta(f_B), mu(f_B)                            # Eq. (1)
        # ---- the four flows of Fig. 3, all pictures (B, 3, H, W) --------------------------------
        z_A, z_B = encode(E_A, x_A), encode(E_B, x_B)
        c_A, c_B = content(z_A), content(z_B)
        x_AA = G_A(adain(m_A * c_A, gamma_A, beta_A))
        x_BB = G_B(adain(m_B * c_B, gamma_B, beta_B))
        x_AB = G_B(adain(m_A * c_A, gamma_B, beta_B))
        x_BA = G_A(adain(m_B * c_B, gamma_A, beta_A))
        # ---- and back. CHOICE (code): mask and style are the original's, not F(x_AB)'s ----------
        z_AB, z_BA = encode(E_B, x_AB), encode(E_A, x_BA)
        x_ABA = G_A(adain(m_A * content(z_AB), gamma_A, beta_A))
        x_BAB = G_B(adain(m_B * content(z_BA), gamma_B, beta_B))

    losses = update_discriminators(nets, x_A, x_B, x_BA, x_AB, args, autocast) if update_D else {}
    with autocast():
        GAN_A, GAN_B = lsgan(D_A(x_BA), 1.0), lsgan(D_B(x_AB), 1.0)
        phi_A, phi_B, phi_AB, phi_BA = (phi(nets.vgg, x) for x in (x_A, x_B, x_AB, x_BA))
    rec_A, rec_B, cyc_A, cyc_B = l1(x_AA, x_A), l1(x_BB, x_B), l1(x_ABA, x_A), l1(x_BAB, x_B)
    KL_A, KL_B, KL_AB, KL_BA = kl(z_A), kl(z_B), kl(z_AB), kl(z_BA)
    L_c_A, L_s_A = content_loss(phi_AB, phi_A), style_loss(phi_AB, phi_B)        # of x_AB
    L_c_B, L_s_B = content_loss(phi_BA, phi_B), style_loss(phi_BA, phi_A)        # of x_BA
    L_VAE_A = args.lambda_rec * rec_A + args.lambda_KL * KL_A
    L_VAE_B = args.lambda_rec * rec_B + args.lambda_KL * KL_B
    L_GAN_A, L_GAN_B = args.lambda_GAN * GAN_A, args.lambda_GAN * GAN_B
    L_CC_A = args.lambda_cyc * cyc_A + args.lambda_KL * KL_AB
    L_CC_B = args.lambda_cyc * cyc_B + args.lambda_KL * KL_BA
    L_P = (args.lambda_c * L_c_A + args.lambda_s * L_s_A
           + args.lambda_c * L_c_B + args.lambda_s * L_s_B)                      # Eq. (4)
    L = L_VAE_A + L_GAN_A + L_CC_A + L_VAE_B + L_GAN_B + L_CC_B + L_P            # Eq. (3)
    nets.opt_G.zero_grad()
    L.backward()
    nets.opt_G.step()
    return losses | {"GAN_A": GAN_A, "rec_A": rec_A, "KL_A": KL_A, "cyc_A": cyc_A, "KL_AB": KL_AB,
                     "GAN_B": GAN_B, "rec_B": rec_B, "KL_B": KL_B, "cyc_B": cyc_B, "KL_BA": KL_BA,
                     "L_c_A": L_c_A, "L_s_A": L_s_A, "L_c_B": L_c_B, "L_s_B": L_s_B}


# ==== 6. Training loop ========================================================================


def set_rate(nets, lr, step, total):
    """CHOICE (code): lr (1 - t/T)^0.9, for both optimisers."""
    for optimiser in (nets.opt_G, nets.opt_D):
        optimiser.param_groups[0]["lr"] = lr * (1 - step / total) ** 0.9


def pretrain(nets, data, show, args):
    """Stage 1 (Sec. 3.3), a run of its own in the folder features/; fills nets.F_A and nets.F_B.

    With --resume it goes on where it stopped.
    """
    folder, total = Path(args.run_folder) / "features", args.pretrain or len(data.A)
    own = {"run_folder": str(folder), "weights": None,
           "resume": args.resume and (folder / "last.pt").exists()}
    run = Run("egscit", argparse.Namespace(**vars(args) | own), CHANCE)
    vaes = build_vaes(args, run.device)
    run.resume_or_start(vars(vaes))
    if run.step < total:
        print(f"stage 1: F_A and F_B learn as encoders of two VAE-GANs, in {folder}")
        for step, (x_A, x_B) in run.steps(data, total):
            set_rate(vaes, args.lr, step, total)
            run.log(pretrain_step(vaes, x_A, x_B, args))
        with torch.no_grad():
            x_A, x_B = show["x_A"].to(run.device), show["x_B"].to(run.device)
            run.save_samples({"x_A": x_A, "x_AA": vaes.VAE_A(x_A, noise=False)[0],
                              "x_B": x_B, "x_BB": vaes.VAE_B(x_B, noise=False)[0]})
    nets.F_A.load_state_dict(vaes.VAE_A.F.state_dict())
    nets.F_B.load_state_dict(vaes.VAE_B.F.state_dict())


def saved_parts(nets):
    """What last.pt holds: all but the layers of phi."""
    return {name: part for name, part in vars(nets).items() if name != "vgg"}


def train(args):
    run = Run("egscit", args, CHANCE)
    data = Unpaired(args)
    show, nets = show_set(data, args), build(args, run.device)
    run.resume_or_start(saved_parts(nets))
    if run.step == 0 and args.features:
        state = common.load_checkpoint(args.features, "egscit")
        common.expect(state["step"] > 0 and "F_A" in state["parts"], f"--features {args.features}: "
                      "expected the last.pt of a run whose stage 1 is over")
        common.load_parts({"F_A": nets.F_A, "F_B": nets.F_B}, state["parts"], args.features)
    elif run.step == 0:
        run.save()  # WHY now: a stop during stage 1 can then be resumed
        pretrain(nets, data, show, args)
    total = args.steps or args.g_updates * len(data.A)
    for step, (x_A, x_B) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(nets, show, args))
        set_rate(nets, args.lr, step, total)
        run.log(train_step(nets, x_A, x_B, args, step % args.g_updates == 0))
    run.save_samples(sample_columns(nets, show, args))
    scores = []
    if run.rank == 0:
        try:
            scores = all_scores(nets, args)
        except UserError as error:  # no test pictures; or MNIST without the folder lab/
            print(f"no scores: {error}")
    run.finish(scores)


# ==== 7. Translate and evaluate ===============================================================


@torch.no_grad()
def translate(nets, x, y, args, way="AB"):
    """x (B, 3, H, W) in the style of the exemplar y (B, 3, H', W'), of any sizes, in [-1, 1].

    CHOICE: without noise, so that one pair has one translation.
    """
    if way == "AB":
        E_x, F_x, F_y, G_y = nets.E_A, nets.F_A, nets.F_B, nets.G_B
    else:
        E_x, F_x, F_y, G_y = nets.E_B, nets.F_B, nets.F_A, nets.G_A

    def net(x):  # padded to a multiple of 2^downs
        c = nets.G_first(nets.E_last(E_x(x)))
        return G_y(adain(mask(F_x(x), args.eta) * c, gamma, beta))

    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        f_y = F_y(y)
        gamma, beta = delta(f_y), mu(f_y)
        return common.same_size(net, x, 2**args.downs).float().clamp(-1, 1)


def translated(nets, test, args, way):
    """Translations (N, 3, H, W) of a test set, on the CPU, in portions of 40,000 pixels.

    The authors' were saved stretched to full contrast, each by itself; these are not.
    """
    x, y = (test[f"x_{domain}"] for domain in way)
    device, portion = next(nets.G_A.parameters()).device, max(1, 40_000 // x[0, 0].numel())
    return torch.cat([translate(nets, a.to(device), b.to(device), args, way).cpu()
                      for a, b in zip(x.split(portion), y.split(portion), strict=True)])


def show_set(data, args):
    """A few test pictures for the grids, or training pictures if there are none."""
    limit = 12 if args.size <= 32 else 6
    try:
        return test_set(args, limit)
    except UserError as error:
        print(f"grids show training pictures: {error}")
        pairs = zip(*(data[i] for i in range(limit)), strict=True)
        return dict(zip(("x_A", "x_B"), map(torch.stack, pairs), strict=True))


def sample_columns(nets, test, args):
    """Columns of a sample grid, as in Fig. 4: both directions with their true answers."""
    columns = {"x_A": test["x_A"], "x_B": test["x_B"]}
    for way in ("AB", "BA"):
        columns[f"x_{way}"] = translated(nets, test, args, way)
        if f"x_{way}" in test:
            columns[f"true x_{way}"] = test[f"x_{way}"]
    return columns


def all_scores(nets, args):
    """Scores of both directions on the test set: those of digits where the truth is known; L_P."""
    test, scores = test_set(args, 1000 if args.data == "mnist-single" else 200), []
    for way in ("AB", "BA"):
        x, exemplar = (test[f"x_{domain}"] for domain in way)
        answers = {"": translated(nets, test, args, way), "copy the input": x,
                   "copy the exemplar": exemplar}
        if f"x_{way}" in test:
            answers["the truth"] = test[f"x_{way}"]
            found = common.lab("toy", "the score of digits").digit_scores(answers)
        else:
            found = []
        found += common.lab("toy", "the score of L_P").perceptual_scores(nets.vgg, answers, args)
        scores += [score | {"name": f"x_{way}: {score['name']}"} for score in found]
    return scores


def load_translator(args, device, with_vgg=False):
    """The networks of --weights."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script")
    state, nets = common.load_checkpoint(args.weights, "egscit"), build(args, device, with_vgg)
    common.load_parts({name: part for name, part in saved_parts(nets).items()
                       if not name.startswith(("opt", "D"))}, state["parts"], args.weights)
    return nets


def translate_files(args):
    """Translate --translate (a picture or a folder of them) in the style of --exemplar, to PNG."""
    if args.exemplar is None:
        raise UserError("--translate needs --exemplar PATH as well, a picture of the other domain")
    device = common.pick_device(args.device)
    nets, way = load_translator(args, device), args.direction.replace("to", "")
    exemplar = common.to_tensor(fitted(args.exemplar, args))[None].to(device)
    common.translate_files(args.translate, args.out or "translated",
                           lambda x: translate(nets, x.to(device), exemplar, args, way),
                           keep=[args.exemplar])


def evaluate(args):
    """Tab. 2 for --weights: SSIM as mean and deviation over the test pairs, accuracies, L_P."""
    nets = load_translator(args, common.pick_device(args.device), with_vgg=True)
    common.print_scores(all_scores(nets, args))


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
