"""CUT: unpaired image translation by making patches find their own input (also FastCUT).

A generator turns x (a horse) into y_hat (a zebra) that a discriminator cannot tell from real ones.
What keeps y_hat faithful to x? Every patch of y_hat must be recognisable, among many patches of
the *same* input, as the one that stands at its place: a 256-way classification (InfoNCE) in feature
space, whose features are those that the generator's own encoder computes anyway. With S patches and
a loss of L, log(S) - L bounds from below the mutual information of an output patch and its input
patch. A cycle asks for all of x back, and so for a one-to-one map; this asks only that an output
tells where it came from. No second generator, one direction. FastCUT leaves out the identity term.

T. Park, A. A. Efros, R. Zhang, J.-Y. Zhu, "Contrastive Learning for Unpaired Image-to-Image
Translation", ECCV 2020 (arXiv 2007.15651). Numbers below are those of chapter 3.3 in T. Park,
"Machine Learning for Deep Image Manipulation", UC Berkeley 2021.

SYMBOLS      paper                 here              shape
             x, y                  x, y              (B, 3, H, W) in [-1, 1], unpaired
             y_hat = G(x)          y_hat             (B, 3, H, W)
             G = G_dec(G_enc(x))   G.encode, decoder five feature maps (B, C_l, H_l, W_l)
             H_l, two-layer MLP    H                 (B, S, C_l) -> (B, S, 256), unit rows
             z_hat_l, query v      z_hat             (B, S, 256) per layer, from the output
             z_l, v+ and v-        z                 (B, S, 256) per layer, from the input
             Z^-                   bank_X, bank_Y    (16384, 256) per layer, of earlier pictures
             tau                   tau               0.07

OBJECTIVE    Eq. (3.5)  L_GAN(G, D) = E log D(y) + E log(1 - D(G(x))); least squares in CUT
             Eq. (3.6)  l(v, v+, v-) = -log [e^(v.v+/tau) / (e^(v.v+/tau) + sum_n e^(v.v-_n/tau))]
             Eq. (3.7)  L_PatchNCE(G, H, X) = E_x sum_l sum_s l(z_hat_l^s, z_l^s, z_l^(S \\ s))
             Eq. (3.8)  L_external(G, H, X) = the same with negatives from Z^- (an ablation)
             Eq. (3.9)  L = L_GAN + lambda_X L_PatchNCE(G, H, X) + lambda_Y L_PatchNCE(G, H, Y)

CHOICES      where the text is silent, or differs from what the authors ran (their released code):
             lambda_X = lambda_Y = 1 in the text, but the code averages the two terms: 0.5 each.
             Sums over layers and places in Eq. (3.7) are means in the code: so here.
             Learning rate 0.002 in the text is 0.0002 in the code. Adam's betas and FastCUT's
             150 + 50 epochs are the code's.
             The code's networks downsample by a blur (anti-aliasing), which alone gives the text's
             receptive fields 1, 9, 15, 35, 99; D then sees 84 pixels. With --no-antialias-G they
             are 1, 9, 13, 29, 93: the layers stay those of the text, where the code taps others.
             "RGB pixels" is the picture; the code taps its reflection-padded copy.
             Keys are detached, and the loss of D is halved, in the code.
             The code draws new places for Y; here X and Y share them.
             Data as in CycleGAN; the rate falls with every step, the code's with every epoch.

USAGE        python cut.py                                    # toy world, scores at the end
             python cut.py --data horse2zebra [--mode fastcut]
             python cut.py --translate photo.jpg --weights runs/cut-horse2zebra/last.pt
EXPECT       python cut.py: 6 to 17 minutes of a slow core (3 seeds, 40 test scenes): stripe
             direction error 0.35 (no direction at all 0.61, a checkerboard 0.79), coat error 25
             (copying the input 59), background error 22 (mean colour 41): a dotted tint is left.
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
from common import BlurDown, InstanceNorm, PatchGAN, Run, UserError, full

# ==== 1. Configuration ========================================================================

KNOWN = {name: (f"https://people.eecs.berkeley.edu/~taesung_park/CycleGAN/datasets/{name}.zip",
                f"http://efrosgans.eecs.berkeley.edu/cyclegan/datasets/{name}.zip")
         for name in ("apple2orange", "grumpifycat", "horse2zebra", "maps", "monet2photo",
                      "summer2winter_yosemite")}
MODES = {  # Sec. 3.3.1, Eq. (3.9); the parser's own defaults are CUT's
    "cut": {},
    "fastcut": {"epochs": 200, "decay_from": 0.75, "lambda_X": 10.0, "lambda_Y": 0.0,
                "flip_equivariance": True},
}
TOY = {  # as cyclegan.py's, so that scores stand side by side; no term of Eq. (3.9) differs
    "size": 64, "load": 64, "batch": 2, "steps": 1800,  # minutes on a laptop: small and short, ...
    "ngf": 16, "ndf": 16, "blocks": 4, "lr": 5e-4,      # ... so narrower, shallower and faster
    "antialias_G": False, "init": "normal",             # CycleGAN's own G and first weights
    "patches": 64, "workers": 0, "sample_every": 300}   # a quarter of the 16 x 16 deepest places


def get_args(argv=None):
    """Flags in layers: CUT's defaults < --mode < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--mode", choices=list(MODES), default="cut", help="CUT or FastCUT (Sec. 3.3.1)")
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB", help="which domain is the input")
    add("--size", type=int, default=256, help="training crop (Sec. 3.2.4)")
    add("--load", type=int, help="pictures are resized to this first (286/256 of --size)")
    add("--keep-aspect", action=switch, default=False, help="resize the short side, not to square")
    add("--batch", type=int, default=1, help="pictures per step and process (Sec. 3.3.2)")
    add("--epochs", type=int, default=400, help="passes over the larger domain (FastCUT 200)")
    add("--steps", type=int, help="updates in all; overrides --epochs")
    add("--decay-from", type=float, default=0.5, help="share of the run at --lr (code)")
    add("--lr", type=float, default=2e-4, help="Adam's rate (code)")
    add("--beta1", type=float, default=0.5, help="Adam's first decay (code)")
    add("--ngf", type=int, default=64, help="width of G (code)")
    add("--ndf", type=int, default=64, help="width of D (code)")
    add("--blocks", type=int, default=9, help="residual blocks of G (Sec. 3.3.2)")
    add("--antialias-G", action=switch, default=True, help="blur when down- and upsampling in G")
    add("--antialias-D", action=switch, default=True, help="blur before downsampling in D")
    add("--init", choices=["xavier", "normal"], default="xavier",
        help="first weights: xavier times 0.02 (code), or CycleGAN's N(0, 0.02^2)")
    add("--tau", type=float, default=0.07, help="temperature of Eq. (3.6)")
    add("--lambda-X", type=float, default=0.5, help="weight of Eq. (3.7) on x (code; FastCUT 10)")
    add("--lambda-Y", type=float, default=0.5, help="the same on y, the identity term (code; 0)")
    add("--patches", type=int, default=256, help="places per layer: 1 positive, 255 negatives")
    add("--nce-layers", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="L",
        help="encoder layers of Eq. (3.7), 0 = RGB pixels (Sec. 3.3.2)")
    add("--negatives", choices=["internal", "external", "both"], default="internal",
        help="from the same picture, from the memory bank (Eq. 3.8), or both")
    add("--bank", type=int, default=16384, help="keys per layer in the memory bank (Sec. 3.3.2)")
    add("--momentum", type=float, default=0.999, help="of the bank's networks (Sec. 3.3.2)")
    add("--flip-equivariance", action=switch, default=False, help="FastCUT's augmentation")
    add("--fid-weights", metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        sizes = {"load": round(args.size * 286 / 256)}
        return sizes | MODES[args.mode] | (TOY if args.data == "toy" else {})

    args = common.parse_flags(p, argv, "cut", presets, run_name)
    args.nce_layers = sorted(set(args.nce_layers))
    if args.size < 32 or args.size % 4:
        raise UserError(f"--size {args.size}: must be at least 32 and a multiple of 4")
    if args.patches == 1 and args.negatives == "internal":
        raise UserError("--patches 1: the negatives are the other places, 2 at least")
    if not 0 <= args.nce_layers[0] <= args.nce_layers[-1] <= 4:
        raise UserError(f"--nce-layers {args.nce_layers}: G_enc has layers 0 to 4")
    return args


def run_name(args):
    return f"{args.mode}-{Path(args.data).name}"


# ==== 2. Networks =============================================================================


class ResnetBlock(nn.Module):  # same as cyclegan.py: ResnetBlock
    """x + conv(relu(conv(x))), instance-normalised; (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm(channels),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm(channels))

    def forward(self, x):
        return x + self.body(x)


class ResnetGenerator(nn.Module):
    """CycleGAN's generator, cut into G_enc and G_dec (Sec. 3.3.2); 11.38 M parameters.

    x (B, 3, H, W), H and W multiples of 4 -> (y_hat (B, 3, H, W) in [-1, 1], features). The five
    layers are RGB, both downsampling convolutions, residual block 1 and the middle one (5 of 9).
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

    def encode(self, x):
        """G_enc: x (B, 3, H, W) -> [x, f_1, ..., f_4]; a place of f_l is a patch of x."""
        features = [x]
        for stage in self.encoder:
            features.append(stage(features[-1]))
        return features

    def forward(self, x):
        """x -> (G_dec(G_enc(x)), G_enc(x)): whoever translates x has its features for free."""
        features = self.encode(x)
        return self.decoder(features[-1]), features


class Projector(nn.Module):
    """H_l: for each layer a two-layer MLP with 256 units, then L2 normalisation (Sec. 3.3.2)."""

    def __init__(self, widths, units=256):
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(c, units), nn.ReLU(), nn.Linear(units, units)) for c in widths)

    def forward(self, features, places):
        """z: feature maps [(B, C_l, H_l, W_l)], places {layer: (S_l) indices into H_l * W_l}
        -> [(B, S_l, 256)], one entry per layer of `places`, rows of length 1."""
        z = []
        for mlp, (layer, s) in zip(self.mlps, places.items(), strict=True):
            patches = features[layer].flatten(2)[:, :, s].transpose(1, 2)          # (B, S_l, C_l)
            v = full(mlp(patches))                                                 # (B, S_l, 256)
            # CHOICE (code): + 1e-7, not max(., 1e-7): xavier's first rows are as short as 8e-6
            z.append(v / (v.norm(dim=2, keepdim=True) + 1e-7))
        return z


def build(args, device):
    """G, D, H, their three Adams and, for external negatives, the memory banks."""
    torch.manual_seed(args.seed)
    G = ResnetGenerator(args.ngf, args.blocks, args.antialias_G)
    nets = SimpleNamespace(G=G, D=PatchGAN(3, args.ndf, antialias=args.antialias_D),
                           H=Projector([G.widths[layer] for layer in args.nce_layers]))
    for net in (nets.G, nets.D, nets.H):
        common.init_weights(net, args.init, 0.02)
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, 0.999),
                             fused=device.type in ("cuda", "cpu"))
    nets.opt_G, nets.opt_D = adam(nets.G.parameters()), adam(nets.D.parameters())
    nets.opt_H = adam(nets.H.parameters())
    if args.negatives != "internal":
        nets.bank_X = MemoryBank(nets.G, nets.H, args).to(device)
        nets.bank_Y = MemoryBank(nets.G, nets.H, args).to(device)
    if args.compile:
        nets.D.compile()
        G.forward, G.encode = torch.compile(G.forward), torch.compile(G.encode)
    return nets


# ==== 3. Losses ===============================================================================


def lsgan(logits, target):  # same as cyclegan.py: lsgan
    """Least squares in place of a log of Eq. (3.5): E (D(.) - target)^2; logits (B, 1, H', W')."""
    return (full(logits) - target).square().mean()                    # Eq. (3.5), one expectation


def info_nce(v, v_plus, tau, bank=None, internal=True):
    """Eq. (3.6) averaged over the places s of Eq. (3.7), for one layer; a scalar.

    v: queries from the *output*, v_plus: keys from the *input*, both (B, S, K) with unit rows, row
    s of both from the same place. A key is the positive of its own place and a negative of all
    others. bank: (N, K) more negatives, of other pictures (Eq. 3.8). internal=False: only those.
    """
    # CHOICE (code): keys are constants; the paper is silent. So the loss moves the output towards
    # the input, and never the input's features towards the output.
    v_plus = v_plus.detach()
    if internal:
        logits = v @ v_plus.transpose(1, 2)                   # (B, S, S): row s against all keys
        # The positive of row s is column s: that key comes from the same place. Hence a target of
        # 0, 1, ..., S-1, the diagonal; the other S-1 columns are the negatives z^(S \ s).
        target = torch.arange(v.shape[1], device=v.device).repeat(v.shape[0])   # (B * S)
    else:
        logits = (v * v_plus).sum(dim=2, keepdim=True)        # (B, S, 1): the positive only
        target = torch.zeros(v.shape[0] * v.shape[1], dtype=torch.long, device=v.device)
    if bank is not None:
        logits = torch.cat([logits, v @ bank.detach().t()], dim=2)  # Eq. (3.8): z_tilde from Z^-
    # tau: v . v+ lies in [-1, 1], so without it e^(v.v+) could not stand out among 255 others
    return F.cross_entropy(logits.flatten(0, 1) / tau, target)      # Eq. (3.6), mean over s and x


def patch_nce(z_hat, z, args, bank=None):
    """Eq. (3.7), or with a bank Eq. (3.8): the mean over layers of `info_nce`.

    z_hat, z: lists of (B, S_l, 256), queries and keys of every layer.
    """
    external = bank.keys() if bank else [None] * len(z)
    terms = [info_nce(v, v_plus, args.tau, more, internal=args.negatives != "external")
             for v, v_plus, more in zip(z_hat, z, external, strict=True)]
    return torch.stack(terms).mean()                          # Eq. (3.7), sum over l


def chance(args):
    """What a D that says 1/2 everywhere and an H that gives all patches one vector would get."""
    negatives = {"internal": args.patches - 1, "external": args.bank,
                 "both": args.patches - 1 + args.bank}[args.negatives]
    nce = math.log(1 + negatives)
    return {"L_GAN": 0.25, "L_D": 0.25, "NCE_X": nce, "NCE_Y": nce}


def sample_places(features, layers, patches, rng):
    """{layer: (S_l) indices into H_l * W_l}: `patches` distinct places (all, if there are fewer).

    The same for every picture of the batch; query and key must share them.
    """
    areas = {layer: features[layer][0, 0].numel() for layer in layers}
    return {layer: torch.randperm(area, generator=rng)[:patches].to(features[layer].device)
            for layer, area in areas.items()}


class MemoryBank(nn.Module):
    """Z^- of Eq. (3.8): keys of earlier pictures, from a moving-averaged G_enc and H (MoCo).

    CHOICE: one bank per domain; Eq. (3.9) with lambda_Y needs negatives from Y as well. Under
    torchrun each process fills its own, and last.pt holds them all.
    """

    def __init__(self, G, H, args):
        super().__init__()
        self.G, self.H = copy.deepcopy(G).requires_grad_(False), copy.deepcopy(H)
        self.G.decoder = nn.Identity()  # only the encoder half is averaged
        self.H.requires_grad_(False)
        self.momentum = args.momentum
        for i in range(len(H.mlps)):
            self.register_buffer(f"keys_{i}", F.normalize(torch.randn(args.bank, 256), dim=1))
        self.register_buffer("oldest", torch.zeros(len(H.mlps), dtype=torch.long))

    def keys(self):
        """[(N, 256)] per layer."""
        return [getattr(self, f"keys_{i}") for i in range(len(self.H.mlps))]

    @torch.no_grad()
    def update(self, G, H, x, places):
        """Average the networks, then replace the oldest keys by those of x (B, 3, H, W)."""
        for mine, theirs in ((self.G.encoder, G.encoder), (self.H, H)):
            for p, new in zip(mine.parameters(), theirs.parameters(), strict=True):
                p.lerp_(new, 1 - self.momentum)
        fresh = self.H(self.G.encode(x), places)
        for i, (bank, z) in enumerate(zip(self.keys(), fresh, strict=True)):
            z = z.flatten(0, 1)[:len(bank)]                   # (B * S_l, 256)
            bank[(self.oldest[i] + torch.arange(len(z), device=z.device)) % len(bank)] = z
            self.oldest[i] = (self.oldest[i] + len(z)) % len(bank)


# ==== 4. Data =================================================================================


class Unpaired(torch.utils.data.Dataset):  # same as cyclegan.py: Unpaired
    """`self[n]`: the n-th training sample (x, y), two (3, size, size) tensors in [-1, 1].

    x walks through a new shuffle of its domain every epoch, y is drawn at random, so that pairs
    are not fixed. A sample depends on (seed, n) alone. Resize to --load, random crop, mirror;
    CHOICE (code): in the decaying part of a run pictures are resized to the crop, not cropped.
    """

    def __init__(self, root, args):
        sides = "AB" if args.direction == "AtoB" else "BA"
        self.X, self.Y = (common.find_split(root, "train", side) for side in sides)
        self.args, self.samples = args, math.inf  # `train` says how many the run will take

    def __getitem__(self, n):
        rng = random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.X))
        x = self.X[common.shuffled(len(self.X), common.mix(self.args.seed, "epoch", epoch))[i]]
        y = rng.choice(self.Y)
        late = n >= self.args.decay_from * self.samples
        return self.load(x, rng, late), self.load(y, rng, late)

    def load(self, path, rng, late):
        size, side = self.args.size, self.args.size if late else max(self.args.load, self.args.size)
        im = common.open_rgb(path)
        w, h = side, side                      # CHOICE (code): squeezed to a square
        if self.args.keep_aspect:
            w, h = (round(n * side / min(im.size)) for n in im.size)
        left, top = rng.randint(0, w - size), rng.randint(0, h - size)
        im = im.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))
        return common.to_tensor(im if rng.random() < 0.5 else im.transpose(Image.FLIP_LEFT_RIGHT))

    def __len__(self):
        return max(len(self.X), len(self.Y))


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("horse2zebra", args.size)
    return common.find_data(args.data, common.UNPAIRED, KNOWN, draw_toy)


# ==== 5. One training step ====================================================================


def train_step(nets, x, y, args, rng):
    """One update of D, then one of G and H, on x, y (B, 3, H, W); losses by name.

    rng: CPU generator for the flip and the places. CHOICE (code): D first, so that G is judged by a
    D that has just seen this very y_hat, which is painted once, for both updates.
    """
    G, D, H = nets.G, nets.D, nets.H
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=args.amp)
    flip = args.flip_equivariance and bool(torch.rand((), generator=rng) < 0.5)

    def mirrored(pictures):  # FastCUT: in half of the steps G sees, and paints, mirrored pictures
        return pictures.flip(3) if flip else pictures

    with autocast():
        y_hat, features = G(mirrored(x))                              # (B, 3, H, W), 5 maps
        places = sample_places(features, args.nce_layers, args.patches, rng)  # {layer: (S_l)}

    # ---- D: real y towards 1, y_hat towards 0 (detached: G learns nothing here) ---------------
    D.requires_grad_(True)
    with autocast():
        L_D = (lsgan(D(y), 1.0) + lsgan(D(y_hat.detach()), 0.0)) / 2  # Eq. (3.5), what D minimises
    nets.opt_D.zero_grad()
    L_D.backward()
    nets.opt_D.step()

    # ---- G and H: fool the new D, and be recognised patch by patch ----------------------------
    D.requires_grad_(False)

    def nce(source, features, output, bank):
        """Eq. (3.7): every patch of output = G(source) is to find its place in source."""
        with autocast():
            with torch.no_grad():  # keys: G's pass made the features, but of a mirrored source
                z = H(G.encode(source) if flip else features, places)     # [(B, S_l, 256)]
            # The queries pass the same encoder. Its weights learn from them too, so G_enc gets its
            # gradient twice: as the way to y_hat, and as the eye that looks at y_hat.
            z_hat = H([mirrored(f) for f in G.encode(output)], places)    # [(B, S_l, 256)]
        return patch_nce(z_hat, z, args, bank)        # outside: v . v+ / tau wants float32

    bank_X, bank_Y = getattr(nets, "bank_X", None), getattr(nets, "bank_Y", None)
    with autocast():
        L_GAN = lsgan(D(y_hat), 1.0)                                  # Eq. (3.5), what G minimises
    NCE_X = nce(x, features, y_hat, bank_X)                           # Eq. (3.7) on X
    NCE_Y = torch.zeros((), device=x.device)
    if args.lambda_Y > 0:                             # G(y) should be y, as far as patches can tell
        with autocast():
            y_same, features = G(mirrored(y))                         # (B, 3, H, W), 5 maps
        NCE_Y = nce(y, features, y_same, bank_Y)                      # Eq. (3.7) on Y
    L = L_GAN + args.lambda_X * NCE_X + args.lambda_Y * NCE_Y         # Eq. (3.9)
    nets.opt_G.zero_grad()
    nets.opt_H.zero_grad()
    L.backward()
    nets.opt_G.step()
    nets.opt_H.step()
    for bank, picture in ((bank_X, x), (bank_Y, y)):
        if bank is not None:
            bank.update(G, H, picture, places)
    losses = {"L_D": L_D, "L_GAN": L_GAN, "NCE_X": NCE_X}
    return losses | {"NCE_Y": NCE_Y} if args.lambda_Y > 0 else losses


# ==== 6. Training loop ========================================================================


def train(args):
    run = Run("cut", args, chance(args))
    root = data_folder(args)
    data = Unpaired(root, args)
    group = args.batch * run.world
    total = args.steps or args.epochs * max(1, len(data) // group)
    data.samples = total * group
    show = common.test_pictures(root, args, run.device, limit=6)
    nets = build(args, run.device)
    run.resume_or_start(vars(nets))
    for step, (x, y) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(nets.G, show, args))
        for optimiser in (nets.opt_G, nets.opt_D, nets.opt_H):
            optimiser.param_groups[0]["lr"] = args.lr * common.rate(step, total, args.decay_from)
        run.log(train_step(nets, x, y, args, run.rng()))
    run.save_samples(sample_columns(nets.G, show, args))
    run.finish(truth_scores(nets.G, root, args, run.device) if args.data == "toy" else [])


# ==== 7. Translate and evaluate ===============================================================


@torch.no_grad()
def translate(G, x, args):
    """G(x) for x (N, 3, H, W) of any size, in [-1, 1], one picture at a time: padded to G's
    multiple, cropped back."""
    def y_hat(padded):
        return G(padded)[0]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        return torch.cat([common.same_size(y_hat, one, G.multiple).float().clamp(-1, 1)
                          for one in x.split(1)])


def sample_columns(G, show, args):
    """Columns of a sample grid: x, G(x), and where there are as many y: y, G(y)."""
    x, y = show["x"], show["y"]
    columns = {"x": x, "G(x)": translate(G, x, args)}
    if len(x) == len(y) and args.lambda_Y > 0:
        columns |= {"y": y, "G(y)": translate(G, y, args)}
    return columns


def truth_scores(G, root, args, device):
    """Scores against the toy world's true answers, beside the trivial ones'."""
    toy, test = common.lab("toy", "--data toy"), common.test_pictures(root, args, device)
    y_hat = translate(G, test["x"], args)
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
        G = common.lab("released", "a file of the authors'").cut(state, args.weights)
    return G.to(device).eval()


def translate_files(args):
    """Translate --translate (a picture or a folder of them), each at its own size, to PNG."""
    device = common.pick_device(args.device)
    G = load_generator(args, device)
    common.translate_files(args.translate, args.out or "translated",
                           lambda x: translate(G, x.to(device), args))


def evaluate(args):
    """FID of the translated test pictures at --size x --size; on toy data the true scores."""
    device = common.pick_device(args.device)
    G, root = load_generator(args, device), data_folder(args)
    scores = truth_scores(G, root, args, device) if args.data == "toy" else []
    if args.data != "toy" or args.fid_weights:
        metrics = common.lab("metrics", "--evaluate")
        test = common.test_pictures(root, args, device, square=True)
        y_hat = translate(G, test["x"], args)
        value = metrics.fid(y_hat.split(1), test["y"].split(1), device, args.fid_weights)
        scores.append({"name": f"FID ({len(test['x'])} translated, {len(test['y'])} real)",
                       "value": value, "better": "lower"})
    common.print_scores(scores)


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
