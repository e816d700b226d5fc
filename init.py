"""INIT: instance-level image-to-image translation, on a complete MUNIT (`--method munit`).

By night a street gets dark, but its cars switch their lights on: one style for a whole picture is
wrong for somebody. MUNIT splits a picture into a content (what is where) and a style, a code of 8
numbers, and translates by decoding the content with a style of the other domain. INIT trains the
same networks on pictures *and* on their objects, which may wear any style of a picture of the other
domain: an object's, the background's or the global one. The rule is one-way: a coarse style may
dress finer content, a fine style never dresses coarser content. Boxes are needed in training only:
translation runs the global branch, exactly as in MUNIT.

Z. Shen, M. Huang, J. Shi, X. Xue, T. Huang, "Towards Instance-level Image-to-Image Translation",
CVPR 2019 (no training code was released). X. Huang, M.-Y. Liu, S. Belongie, J. Kautz, "Multimodal
Unsupervised Image-to-Image Translation" (MUNIT), ECCV 2018, and its released code.

SYMBOLS      paper                  here              shape
             I, o                   I_X, o_X          (B, 3, H, W), (B K, 3, 120, 120) in [-1, 1]
             E = (E^c, E^s)         E_X               x -> c (B, 256, H/4, W/4), s (B, 8)
             c_g, s_g, c_o, s_o     c_gX, s_gX, ...   of the picture, and of each object
             So1, So2, .., Sb, Sg   So, Sb, Sg        Fig. 4's bank: (B, K, 8), (B, 1, 8), (B, 1, 8)
             G                      G_X               (c, s) -> (B, 3, H, W)
             E_o, G_o, D^o          E_Xo, G_Xo, D_Xo  of the objects; E_X, G_X, D_X if shared
             D^g                    D_X               (B, 3, H, W) -> a logit map for each scale

OBJECTIVE    Eq. (1)  I_hat = G_g(E^c(I), E^s(I)),  o_hat = G_o(E^c(o), E^s(o))
             Eq. (2)  c_hat_o = E^c(G_o(c_o, s_g)),  s_hat_o = E^s(G_o(c_o, s_g))
             Eq. (3)  L^k_recon = E |k_hat - k|_1 for k = I, o, c, s
             Eq. (4)  min over E, G, max over D of lambda_g L_g + lambda_cg L_cg + lambda_sg L_sg
                      + L_adv_g + lambda_o L_o + lambda_co L_co + lambda_so L_so + L_adv_o,
                      each L summed over the domains X and Y

CHOICES      the paper gives no lambda, K, schedule or GAN type, and says "based on MUNIT":
             Weights 10 (I, o), 1 (c, s, GAN), LSGAN, Adam and its schedule are MUNIT's code's, with
             its cycle X -> Y -> X of weight 10 (--lambda-cyc): Sec. 3 has it, Eq. (4) does not.
             Eq. (2) has no domain marks. Sec. 3 names two modes, X <-> Y and image <-> object: both
             are taken, for objects, and L_co, L_so and the objects' cycle are means over the two,
             Eq. (3) being an expectation. The style's target is the code that was decoded.
             Pictures are translated with z ~ N(0, I) as in MUNIT, objects with a code of the other
             picture's bank, each equally likely. K = 3, as Fig. 4 draws.
             Codes of the bank are constants: like z they are given, else E^s could make its own
             targets easy by forgetting. (Object <-> picture wears the picture's own s_g, which
             learns; as a target it is constant, too.)
             Sb is E^s of the picture with its boxes grey. Background content is never decoded
             (Eq. (4) has no such term).
             Sec. 4 has two settings. `init`: short side 360, no crop named, so whole pictures; the
             size of objects is not named, 120 is the other's. `coco`: crops of 360 from pictures
             of their own size, objects of 120, their E_o and G_o an independent branch.
             Objects are cut from the picture's file, not from its reduced copy, and squeezed to
             squares. (RoI pooling, which Sec. 3 mentions, is not built.) A picture without a usable
             box trains nothing; MUNIT takes all.
             "INIT w/ Ds" is one discriminator for both (the default, and the paper's best).
             MUNIT's code draws z, and decodes, once for D and again for G; here once for both.
             The layout of the INIT data set is not described in the paper: boxes.json instead.

USAGE        python init.py                                   # toy world; --method munit compares
             python init.py --data mydata                     # with mydata/boxes.json, see BOXES
             python init.py --translate day.jpg --weights runs/init-mydata/last.pt --styles 4
EXPECT       python init.py: 10 minutes of a slow core (seeds 0 to 2, test scenes): object error 35,
             26, 26 (one change of colours 37, the reference itself 48), background error 11, 10, 8
             (26, 14). Both adversaries live: L_D_g 1.4 to 1.6, L_D_o 1.6 (chance 2), L_sg 0.7 to
             0.9 (1.6). Shapes are blurred.
"""

import argparse
import functools
import json
import math
import os
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
from common import InstanceNorm, Run, UserError, full

BOXES = '{"trainA/NAME.png": [{"box": [x0, y0, x1, y1], "label": "car"}, ...], ...} (or "NAME.png")'

# ==== 1. Configuration ========================================================================

SETTINGS = {"init": {}, "coco": {"size": 360}}  # Sec. 4, Implementation Details
TOY = {  # no term of Eq. (4) differs
    "load": 48, "size": 48, "object_size": 24,          # minutes on a laptop: small, short, ...
    "batch": 2, "steps": 700, "lr": 5e-4, "decay_every": 500,
    "ngf": 12, "ndf": 32, "blocks": 2,                  # ... narrow, but D sees as much as G paints
    "style_dim": 4, "lambda_sg": 5.0,                   # E^s has 700 steps to learn to read z
    "dis_layers": 3, "dis_scales": 2,                   # crops of 24 pixels are too small for more
    "objects": 2, "lpips": "random", "workers": 0, "sample_every": 250}


def get_args(argv=None):
    """Flags in layers: papers' defaults < --setting < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--method", choices=["init", "munit"], default="init", help="INIT, or its base line")
    add("--setting", choices=list(SETTINGS), default="init", help="the paper's two (Sec. 4)")
    add("--share-discriminator", action=switch, default=True,
        help="Tab. 3: one D for pictures and objects (w/ Ds), or two (w/o Ds)")
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB",
        help="what --translate and --evaluate do; training always learns both")
    add("--load", type=int, default=360, help="pictures' short side (coco: their own, Sec. 4)")
    add("--size", type=int, help="training crop (coco: 360), or whole pictures")
    add("--object-size", type=int, default=120, help="side of an object's crop (Sec. 4)")
    add("--objects", type=int, default=3, help="K, crops of each picture (Fig. 4)")
    add("--batch", type=int, default=1, help="pairs per step and process (MUNIT)")
    add("--steps", type=int, default=1_000_000, help="updates in all (MUNIT)")
    add("--lr", type=float, default=1e-4, help="Adam's rate (MUNIT)")
    add("--decay-every", type=int, default=100_000, help="steps after which it is halved (MUNIT)")
    add("--ngf", type=int, default=64, help="width of E and G (MUNIT)")
    add("--ndf", type=int, default=64, help="width of D (MUNIT)")
    add("--blocks", type=int, default=4, help="residual blocks of E^c, and of G (MUNIT)")
    add("--style-dim", type=int, default=8, help="numbers in a style code (MUNIT)")
    add("--dis-layers", type=int, default=4, help="strided convolutions of D (MUNIT)")
    add("--dis-scales", type=int, default=3, help="scales that D looks at (MUNIT)")
    for name, what, weight in (
            ("g", "pictures", 10), ("cg", "pictures' contents", 1), ("sg", "pictures' styles", 1),
            ("o", "objects", 10), ("co", "objects' contents", 1), ("so", "objects' styles", 1)):
        add(f"--lambda-{name}", type=float, default=weight,
            help=f"Eq. (4): weight of the reconstruction of {what}")
    add("--lambda-cyc", type=float, default=10.0,
        help="weight of the cross-cycles X-Y-X and object-picture-object (Fig. 5)")
    add("--exemplar", metavar="PATH", help="--translate: take this picture's style")
    add("--styles", type=int, default=1, help="--translate: random styles, side by side")
    add("--lpips", choices=["alex", "random"], default="alex",
        help="--evaluate: the paper's AlexNet, or an untrained VGG that needs no download")

    def presets(args):
        return SETTINGS[args.setting] | (TOY if args.data == "toy" else {})

    args = common.parse_flags(p, argv, "init", presets, run_name)
    if args.blocks < 1:
        raise UserError(f"--blocks {args.blocks}: at least 1")
    # Each strided layer needs two pixels in each direction, each scale halves (and rounds up).
    least = max(16, (2**args.dis_layers - 1) * 2**(args.dis_scales - 1) + 1)
    for name in ("load", "size", "object_size"):
        side = getattr(args, name)
        if side is not None and (side < least or side % 4):
            raise UserError(f"--{name.replace('_', '-')} {side}: must be a multiple of 4, and at "
                            f"least {least} for --dis-layers {args.dis_layers} --dis-scales "
                            f"{args.dis_scales}")
    if args.batch > 1 and not args.size:
        raise UserError(f"--batch {args.batch}: whole pictures differ in size, give a --size")
    if args.exemplar and args.styles > 1:
        raise UserError(f"--styles {args.styles}: random styles and --exemplar exclude each other")
    return args


def run_name(args):
    return f"{args.method}-{Path(args.data).name}"


# ==== 2. Networks (MUNIT's) ===================================================================


def conv(a, b, kernel, stride=1):
    """Convolution with reflected edges that keeps H, W, or halves them with kernel 4, stride 2."""
    return nn.Conv2d(a, b, kernel, stride, (kernel - 1) // 2, padding_mode="reflect")


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


class Encoder(nn.Module):
    """E: x (B, 3, H, W) -> content c = E^c(x) (B, 256, H/4, W/4), style s = E^s(x) (B, 8).

    H, W multiples of 4; 8.15 M parameters.
    """

    def __init__(self, ngf=64, style_dim=8, blocks=4):
        super().__init__()
        c1, c2, c4 = ngf, 2 * ngf, 4 * ngf
        relu = nn.ReLU(inplace=True)
        self.content = nn.Sequential(
            conv(3, c1, 7), InstanceNorm(c1), relu,                 # (B, 64, H, W)
            conv(c1, c2, 4, 2), InstanceNorm(c2), relu,             # (B, 128, H/2, W/2)
            conv(c2, c4, 4, 2), InstanceNorm(c4), relu,             # (B, 256, H/4, W/4)
            *[ResnetBlock(c4) for _ in range(blocks)])
        self.style = nn.Sequential(  # no normalisation: means and deviations are the style
            conv(3, c1, 7), relu,                                   # (B, 64, H, W)
            conv(c1, c2, 4, 2), relu,                               # (B, 128, H/2, W/2)
            conv(c2, c4, 4, 2), relu,                               # (B, 256, H/4, W/4)
            conv(c4, c4, 4, 2), relu, conv(c4, c4, 4, 2), relu,     # (B, 256, H/16, W/16)
            nn.AdaptiveAvgPool2d(1),                                # Fig. 4's global pooling
            nn.Conv2d(c4, style_dim, 1), nn.Flatten())              # (B, 8)

    def forward(self, x):
        return self.content(x), self.style(x)


def adain(h, mean, std):
    """h (B, C, H, W), each channel with a given mean and deviation, (B, C, 1, 1) (Huang 2017)."""
    var, mu = torch.var_mean(h, dim=(2, 3), correction=0, keepdim=True)   # (B, C, 1, 1)
    return (h - mu) / (var + 1e-5).sqrt() * std + mean


class AdaINBlock(nn.Module):
    """ResnetBlock whose two normalisations get their mean and deviation from the style."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = conv(channels, channels, 3), conv(channels, channels, 3)

    def forward(self, x, mean1, std1, mean2, std2):
        h = F.relu(adain(self.conv1(x), mean1, std1))
        return x + adain(self.conv2(h), mean2, std2)


class LayerNorm(nn.Module):
    """One mean and deviation per picture, a scale and shift per channel; (B, C, H, W) -> same.

    CHOICE (code): the unbiased deviation, eps added to it, not to the variance; scales that begin
    uniform in (0, 1). Unlike instance normalisation it leaves the channels' relative means, which
    carry the style.
    """

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
        scale = self.gamma.view(-1, 1, 1) / (std + 1e-5)           # (B, C, 1, 1)
        return torch.addcmul(self.beta.view(-1, 1, 1) - mean * scale, x, scale)


class Decoder(nn.Module):
    """G: content c (B, 256, h, w), style s (B, 8) -> (B, 3, 4h, 4w) in [-1, 1]; 6.88 M parameters.

    A multilayer perceptron of the style gives the AdaIN layers their means and deviations, block by
    block: mean, deviation, mean, deviation (MUNIT's order).
    """

    def __init__(self, ngf=64, style_dim=8, blocks=4):
        super().__init__()
        c1, c2, c4 = ngf, 2 * ngf, 4 * ngf
        relu = nn.ReLU(inplace=True)
        self.mlp = nn.Sequential(nn.Linear(style_dim, c4), relu, nn.Linear(c4, c4), relu,
                                 nn.Linear(c4, blocks * 4 * c4))    # (B, 4096)
        self.blocks = nn.ModuleList([AdaINBlock(c4) for _ in range(blocks)])
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2), conv(c4, c2, 5), LayerNorm(c2), relu,  # (B, 128, 2h, 2w)
            nn.Upsample(scale_factor=2), conv(c2, c1, 5), LayerNorm(c1), relu,  # (B, 64, 4h, 4w)
            conv(c1, 3, 7), nn.Tanh())                                          # (B, 3, 4h, 4w)

    def forward(self, c, s):
        per_block = self.mlp(s)[:, :, None, None].split(4 * c.shape[1], dim=1)
        for block, numbers in zip(self.blocks, per_block, strict=True):
            c = block(c, *numbers.chunk(4, dim=1))                  # (B, 256, h, w)
        return self.up(c)


class Discriminator(nn.Module):
    """A PatchGAN for each scale: x (B, 3, H, W) -> [logits (B, 1, H', W')], 8.27 M parameters."""

    def __init__(self, ndf=64, layers=4, scales=3):
        super().__init__()
        widths = [3] + [ndf * 2**i for i in range(layers)]
        self.scales = nn.ModuleList([nn.Sequential(
            *[part for a, b in pairwise(widths)
              for part in (conv(a, b, 4, 2), nn.LeakyReLU(0.2, inplace=True))],
            nn.Conv2d(widths[-1], 1, 1)) for _ in range(scales)])

    def forward(self, x):
        logits = []
        for i, net in enumerate(self.scales):
            if i > 0:
                x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
            logits.append(net(x))
        return logits


NAMES = ("E_X", "G_X", "D_X", "E_Y", "G_Y", "D_Y")


def build(args, device):
    """E, G, D of X and of Y, one Adam for all E and G, one for all D; further networks for the
    objects, named E_Xo and so on, where they do not share these."""
    torch.manual_seed(args.seed)
    makers = {"E": lambda: Encoder(args.ngf, args.style_dim, args.blocks),
              "G": lambda: Decoder(args.ngf, args.style_dim, args.blocks),
              "D": lambda: Discriminator(args.ndf, args.dis_layers, args.dis_scales)}
    independent = ["E", "G"] * (args.setting == "coco") + ["D"] * (not args.share_discriminator)
    objects = [f"{name}o" for name in NAMES if args.method == "init" and name[0] in independent]
    nets = {name: makers[name[0]]() for name in (*NAMES, *objects)}
    for name, net in nets.items():
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                if name[0] == "D":  # CHOICE (code): N(0, 0.02^2), and He's for the others
                    nn.init.normal_(layer.weight, 0, 0.02)
                else:
                    nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
        if args.compile:
            net.compile()

    def adam(letters):  # CHOICE (code): betas and weight decay
        params = [p for name, net in nets.items() if name[0] in letters for p in net.parameters()]
        return torch.optim.Adam(params, lr=args.lr, betas=(0.5, 0.999), weight_decay=1e-4,
                                fused=device.type in ("cuda", "cpu"))

    return SimpleNamespace(**nets, opt_G=adam("EG"), opt_D=adam("D"))


# ==== 3. Losses, and the style code bank ======================================================


def l1(k_hat, k):
    """Eq. (3), one expectation, |.|_1 as a mean over all numbers; k is a picture, c or s."""
    return (full(k_hat) - full(k)).abs().mean()                       # Eq. (3)


def lsgan(logits, target):
    """L_adv of Eq. (4), one expectation, by least squares (MUNIT); summed over D's scales.

    logits: [(B, 1, H', W')]. D pulls real pictures towards 1 and translated ones towards 0, G pulls
    its own towards 1.
    """
    return sum((full(scale) - target).square().mean() for scale in logits)


def chance(args):
    """What a D that says 1/2 everywhere would get, and an E^s that reads nothing (0 for every z).
    """
    gan = {"L_adv_g": 0.5 * args.dis_scales, "L_D_g": float(args.dis_scales)}
    if args.method == "init":
        gan |= {"L_adv_o": gan["L_adv_g"], "L_D_o": gan["L_D_g"]}
    return gan | {"L_sg": 2 * math.sqrt(2 / math.pi)}


def style_bank(s_o, s_b, s_g):
    """Fig. 4's style code bank of each picture, constants: So1 .. SoK, Sb, Sg (B, K + 2, 8).

    s_o (B K, 8): of the objects; s_b, s_g (B, 8): of the background, of the entire picture.
    """
    So, Sb, Sg = s_o.unflatten(0, (len(s_g), -1)), s_b[:, None], s_g[:, None]
    return torch.cat([So, Sb, Sg], dim=1).detach()


def associate(bank, rng):
    """Fig. 3 for objects, the finest content: a style of each of K objects, any code of the bank.

    bank (B, K + 2, 8) -> (B K, 8). (Background content could wear Sb and Sg, a picture's Sg alone.)
    """
    B, codes = bank.shape[:2]
    picked = torch.randint(codes, (B, codes - 2), generator=rng)      # (B, K)
    return bank[torch.arange(B)[:, None], picked].flatten(0, 1)


# ==== 4. Data =================================================================================


def read_boxes(root, files):
    """{file: [(x0, y0, x1, y1), ...]} for pictures that have boxes, from root/boxes.json.

    A picture's key is its path below root, or its name. Raises `UserError` for a box that does not
    lie inside its picture, is empty or inverted.
    """
    path, found, owners = Path(root) / "boxes.json", {}, {}
    try:
        table = dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected {BOXES}; --method munit needs none") from None
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); expected {BOXES}") from None
    for file in files:
        name = os.fsencode(Path(file).relative_to(root).as_posix()).decode(errors="replace")
        key = name if name in table else Path(name).name  # UTF-8, whatever the locale is
        entries = table.get(key, [])
        if entries and owners.setdefault(key, file) != file:
            raise UserError(f"{path}: {key} is {owners[key]} and {file}; expected {BOXES}")
        w, h = common.opened(file, size_only=True) if entries else (0, 0)
        for entry in entries if isinstance(entries, list) else [entries]:
            try:
                x0, y0, x1, y1 = box = entry["box"]
                if not (0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h):
                    raise UserError(f"{path}: {key}: box {box} is empty, inverted or not inside "
                                    f"the picture ({w} x {h})")
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}: {key}: found {entry}; expected {BOXES}") from None
            found.setdefault(file, []).append((x0, y0, x1, y1))
    if found and max(side for boxes in found.values() for box in boxes for side in box) <= 1:
        raise UserError(f"{path}: boxes in shares of 1, in pixels are expected: {BOXES}")
    return found


class Scenes(torch.utils.data.Dataset):
    """`self[n]`: the n-th training sample, I_X, I_Y (3, H, W) in [-1, 1]; with --method init also
    o_X, o_Y (K, 3, object_size, object_size), and b_X, b_Y: I_X, I_Y with all boxes grey.

    Each domain is walked through in a new shuffle every epoch (MUNIT). A sample depends on (seed,
    n) alone.
    """

    def __init__(self, root, args):
        self.args, self.boxes = args, {}
        self.files = {side: common.find_split(root, "train", side) for side in "AB"}
        if args.method == "init":
            self.boxes = read_boxes(root, [f for files in self.files.values() for f in files])
            for side, files in self.files.items():
                self.files[side] = [f for f in files if self.objects(self.boxes.get(f, ()))]
                if left := len(files) - len(self.files[side]):
                    print(f"train{side}: {left} of {len(files)} pictures have no usable box")
                if not self.files[side]:
                    raise UserError(f"{Path(root, 'boxes.json')}: no usable boxes for any picture "
                                    f"like {files[0]}; expected {BOXES}")

    def objects(self, boxes):
        """CHOICE: a box that would be magnified more than six times is no object to learn from."""
        return [box for box in boxes
                if 6 * min(box[2] - box[0], box[3] - box[1]) >= self.args.object_size]

    def __getitem__(self, n):
        rng, found = random.Random(common.mix(self.args.seed, n)), []
        for side, files in self.files.items():
            epoch, i = divmod(n, len(files))
            order = common.shuffled(len(files), common.mix(self.args.seed, side, epoch))
            found.append(self.load(files[order[i]], rng))
        return [part for pair in zip(*found, strict=True) for part in pair]

    def load(self, path, rng):
        """I, o, b of a picture, or I alone: mirrored half of the time, resized, cropped."""
        args, im, boxes = self.args, common.open_rgb(path), self.boxes.get(path, ())
        usable = self.objects(boxes)
        if rng.random() < 0.5:
            im = im.transpose(Image.FLIP_LEFT_RIGHT)
            boxes, usable = ([(im.width - x1, y0, im.width - x0, y1) for x0, y0, x1, y1 in some]
                             for some in (boxes, usable))
        w, h = resized(im.size, short_side(im.size, args))
        W, H = (args.size, args.size) if args.size else (w, h)
        left, top = rng.randint(0, w - W), rng.randint(0, h - H)
        crop = im.resize((w, h), Image.BILINEAR).crop((left, top, left + W, top + H))
        I_d = common.to_tensor(crop)                                  # (3, H, W)
        if args.method == "munit":
            return (I_d,)
        side = args.object_size
        chosen = rng.choices(usable, k=args.objects)
        o_d = torch.stack([common.to_tensor(im.resize((side, side), Image.BILINEAR, box))
                           for box in chosen])                        # (K, 3, side, side)
        b_d = I_d.clone()
        for x0, y0, x1, y1 in boxes:                                  # what they touch is hidden
            x0, x1 = (v * w / im.width - left for v in (x0, x1))
            y0, y1 = (v * h / im.height - top for v in (y0, y1))
            b_d[:, max(0, math.floor(y0)):max(0, math.ceil(y1)),
                max(0, math.floor(x0)):max(0, math.ceil(x1))] = 0
        return I_d, o_d, b_d

    def __len__(self):
        return max(map(len, self.files.values()))


def short_side(size, args):
    """To what the short side of a picture of that size is brought: Sec. 4's two settings."""
    return max(args.size or 0, min(size) if args.setting == "coco" else args.load)


def resized(size, side):
    """The size (width, height) of a picture whose short side becomes `side`; multiples of 4."""
    return [max(4, round(n * side / min(size) / 4) * 4) for n in size]


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("day2night", max(args.load, args.size or 0))
    return common.find_data(args.data, common.UNPAIRED, {}, draw_toy)


# ==== 5. One training step ====================================================================


def cross_cycle(x, c, s, t, E, G, G_back, cycle):
    """Fig. 5's cycle between granularities, and between domains: swap the style, swap it back.

    Content c of x (pictures or objects, with their own style s) is dressed in a style t, (B, 8).
    E, G: networks of the domain that t belongs to; G_back: of the one that x is from.
    Returns the dressed x (B, 3, H, W), and [L_c, L_s, L_cyc] (3).
    """
    u = G(c, t)                                                       # (B, 3, H, W)
    c_hat, t_hat = E(u)                                               # Eq. (2)
    L_cyc = l1(G_back(c_hat, s), x) if cycle else torch.zeros((), device=x.device)
    return u, torch.stack([l1(c_hat, c), l1(t_hat, t.detach()), L_cyc])


def train_step(nets, batch, args, rng):
    """One update of D_X, D_Y and one of E and G of both domains; losses by name.

    batch: what `Scenes` gives. rng: CPU generator for the association of styles. CHOICE (code): D
    first, as in MUNIT, so that G is judged by a D that has just seen this very translation.
    """
    E_X, G_X, D_X, E_Y, G_Y, D_Y = (getattr(nets, name) for name in NAMES)
    E_Xo, G_Xo, D_Xo, E_Yo, G_Yo, D_Yo = (getattr(nets, f"{name}o", getattr(nets, name))
                                          for name in NAMES)          # shared or independent
    autocast = functools.partial(torch.autocast, batch[0].device.type, torch.bfloat16,
                                 enabled=args.amp)
    cross = functools.partial(cross_cycle, cycle=args.lambda_cyc > 0)
    I_X, I_Y, *objects = batch                                        # (B, 3, H, W)
    L_o = L_co = L_so = L_cyc_o = L_adv_o = L_D_o = torch.zeros((), device=I_X.device)

    # ---- global level: rebuild pictures, translate them and back ------------------------------
    with autocast():
        (c_gX, s_gX), (c_gY, s_gY) = E_X(I_X), E_Y(I_Y)               # (B, 256, H/4, W/4), (B, 8)
        L_g = l1(G_X(c_gX, s_gX), I_X) + l1(G_Y(c_gY, s_gY), I_Y)     # Eq. (1)
        z_X, z_Y = torch.randn_like(s_gX), torch.randn_like(s_gY)     # (B, 8)
        I_XY, to_Y = cross(I_X, c_gX, s_gX, z_Y, E_Y, G_Y, G_X)       # (B, 3, H, W)
        I_YX, to_X = cross(I_Y, c_gY, s_gY, z_X, E_X, G_X, G_Y)
        L_cg, L_sg, L_cyc_g = to_Y + to_X

    # ---- instance level: the same with objects, and with styles from the bank -----------------
    if objects:
        (o_X, o_Y), (b_X, b_Y) = (part.flatten(0, 1) for part in objects[:2]), objects[2:]
        with autocast():
            (c_oX, s_oX), (c_oY, s_oY) = E_Xo(o_X), E_Yo(o_Y)         # (B K, 256, h, w), (B K, 8)
            L_o = l1(G_Xo(c_oX, s_oX), o_X) + l1(G_Yo(c_oY, s_oY), o_Y)  # Eq. (1)
            with torch.no_grad():
                s_bX, s_bY = E_X.style(b_X), E_Y.style(b_Y)           # (B, 8)
            t_X = associate(style_bank(s_oX, s_bX, s_gX), rng)        # (B K, 8)
            t_Y = associate(style_bank(s_oY, s_bY, s_gY), rng)
            o_XY, to_Y = cross(o_X, c_oX, s_oX, t_Y, E_Yo, G_Yo, G_Xo)   # X <-> Y
            o_YX, to_X = cross(o_Y, c_oY, s_oY, t_X, E_Xo, G_Xo, G_Yo)
            of = torch.arange(len(o_X)) // args.objects               # whose object it is
            _, in_X = cross(o_X, c_oX, s_oX, s_gX[of], E_Xo, G_Xo, G_Xo)  # object <-> picture
            _, in_Y = cross(o_Y, c_oY, s_oY, s_gY[of], E_Yo, G_Yo, G_Yo)
            L_co, L_so, L_cyc_o = (to_Y + to_X + in_X + in_Y) / 2     # the mean of the two modes

    # ---- max over D: real towards 1, translations towards 0 -----------------------------------
    judges = (D_X, D_Y, D_Xo, D_Yo)
    for D in judges:
        D.requires_grad_(True)
    with autocast():
        L_D_g = (lsgan(D_X(I_X), 1.0) + lsgan(D_X(I_YX.detach()), 0.0)
                 + lsgan(D_Y(I_Y), 1.0) + lsgan(D_Y(I_XY.detach()), 0.0))
        if objects:
            L_D_o = (lsgan(D_Xo(o_X), 1.0) + lsgan(D_Xo(o_YX.detach()), 0.0)
                     + lsgan(D_Yo(o_Y), 1.0) + lsgan(D_Yo(o_XY.detach()), 0.0))
    nets.opt_D.zero_grad()
    (L_D_g + L_D_o).backward()
    nets.opt_D.step()                                                 # Eq. (4), max

    # ---- min over E and G: all of the above, and fool the new D -------------------------------
    for D in judges:
        D.requires_grad_(False)
    with autocast():
        L_adv_g = lsgan(D_X(I_YX), 1.0) + lsgan(D_Y(I_XY), 1.0)
        if objects:
            L_adv_o = lsgan(D_Xo(o_YX), 1.0) + lsgan(D_Yo(o_XY), 1.0)
    L = (args.lambda_g * L_g + args.lambda_cg * L_cg + args.lambda_sg * L_sg + L_adv_g
         + args.lambda_o * L_o + args.lambda_co * L_co + args.lambda_so * L_so + L_adv_o  # Eq. (4)
         + args.lambda_cyc * (L_cyc_g + L_cyc_o))                     # Sec. 3, cross-cycle
    nets.opt_G.zero_grad()
    L.backward()
    nets.opt_G.step()                                                 # Eq. (4), min
    losses = {"L_g": L_g, "L_cg": L_cg, "L_sg": L_sg, "L_adv_g": L_adv_g, "L_cyc_g": L_cyc_g,
              "L_D_g": L_D_g}
    if objects:
        losses |= {"L_o": L_o, "L_co": L_co, "L_so": L_so, "L_adv_o": L_adv_o, "L_cyc_o": L_cyc_o,
                   "L_D_o": L_D_o}
    return losses


# ==== 6. Training loop ========================================================================


def train(args):
    run = Run("init", args, chance(args))
    root = data_folder(args)
    data = Scenes(root, args)
    show = show_pictures(root, args, run.device)
    nets = build(args, run.device)
    run.resume_or_start(vars(nets))
    for step, batch in run.steps(data, args.steps):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(nets, show, args))
        for optimiser in (nets.opt_G, nets.opt_D):
            optimiser.param_groups[0]["lr"] = args.lr * 0.5 ** (step // args.decay_every)
        run.log(train_step(nets, batch, args, run.rng()))
    run.save_samples(sample_columns(nets, show, args))
    run.finish(truth_scores(nets, root, args, run.device))


# ==== 7. Translate and evaluate ===============================================================


def oriented(nets, args):
    """(E, G) of the domain that --direction starts from, (E, G) of the other."""
    X, Y = (nets.E_X, nets.G_X), (nets.E_Y, nets.G_Y)
    return (X, Y) if args.direction == "AtoB" else (Y, X)


@torch.no_grad()
def translate(E_X, G_Y, x, styles, args):
    """Pictures x (1, 3, H, W) of any size in styles (N, 8) of Y -> (N, 3, H, W) in [-1, 1].

    The content is encoded once. This is the global branch: boxes are not needed (Sec. 3).
    """
    def net(padded):
        c = E_X.content(padded)
        return torch.cat([G_Y(c, s[None]) for s in styles])

    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        return common.same_size(net, x, 4).float().clamp(-1, 1)


def random_styles(n, args, device, seed):
    """n codes (n, 8) from N(0, I), the same on every device."""
    rng = torch.Generator().manual_seed(common.mix(args.seed, seed))
    return torch.randn(n, args.style_dim, generator=rng).to(device)


def test_pictures(root, args, device, limit=None):
    """As common.test_pictures, but of the size that training sees."""
    return common.test_pictures(root, args, device, limit, fit=lambda size: resized(
        size, short_side(size, args)))


def show_pictures(root, args, device):
    """What sample grids show: pictures x and the reference of each; on toy data the truth y too."""
    if args.data == "toy":
        test = test_pictures(root, args, device)
        test["reference"] = test["y"][torch.arange(len(test["y"])) ^ 1]  # another scene, same night
        return {name: pictures[::7] for name, pictures in test.items()}
    x, y = test_pictures(root, args, device, limit=6).values()
    return {"x": x, "reference": y[torch.arange(len(x)) % len(y)]}


@torch.no_grad()
def sample_columns(nets, show, args):
    """Columns of a sample grid: x, the reference, x in its style and in random ones, x rebuilt."""
    (E_X, G_X), (E_Y, G_Y) = oriented(nets, args)
    xs = show["x"].split(1)

    def column(G, styles):
        return torch.cat([translate(E_X, G, x, s, args) for x, s in zip(xs, styles, strict=True)])

    columns = {"x": show["x"], "reference": show["reference"],
               "reference style": column(G_Y, map(E_Y.style, show["reference"].split(1)))}
    if "y" in show:
        columns["truth"] = show["y"]
    for i in (1, 2, 3):
        s = random_styles(1, args, show["x"].device, i)
        columns[f"style {i}"] = column(G_Y, [s] * len(xs))
    return columns | {"x rebuilt": column(G_X, map(E_X.style, xs))}


def truth_scores(nets, root, args, device):
    """Toy data: scores against the true nights, in the style of a reference and in random ones."""
    if args.data != "toy" or args.direction == "BtoA":
        return []
    toy, test = common.lab("toy", "--data toy"), test_pictures(root, args, device)
    (E_X, _), (E_Y, G_Y) = oriented(nets, args)
    x, y = test["x"], test["y"]
    reference = y[torch.arange(len(y)) ^ 1]                           # another scene, same night
    with torch.no_grad():
        styles = E_Y.style(reference).split(1)
    y_hat = torch.cat([translate(E_X, G_Y, one, s, args)
                       for one, s in zip(x.split(1), styles, strict=True)])
    several = torch.stack([translate(E_X, G_Y, one, random_styles(4, args, device, i), args)
                           for i, one in enumerate(x.split(1))])      # (N, 4, 3, H, W)
    inside, nights = toy.inside_boxes(root, args.split), toy.true_nights(root, args.split)
    x, reference, y_hat, y, several = (t.cpu() for t in (x, reference, y_hat, y, several))
    return (toy.night_scores(x, reference, y_hat, y, inside)
            + toy.night_diversity(x, several, nights, inside))


def load_networks(args, device):
    """E and G of both domains from --weights: our checkpoint or MUNIT's released file.

    args.style_dim becomes that of the file.
    """
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script or MUNIT's gen_*.pt")
    state = common.load_file(args.weights)
    if isinstance(state, dict) and "method" in state:
        nets = build(args, torch.device("cpu"))
        parts = {name: net for name, net in vars(nets).items() if name in NAMES}
        common.load_parts(parts, state["parts"], args.weights)
    else:
        parts = common.lab("released", "a file of MUNIT's").init(state, args.weights)
        args.style_dim = parts["G_X"].mlp[0].in_features
    return SimpleNamespace(**{name: net.to(device).eval() for name, net in parts.items()})


def translate_files(args):
    """Translate --translate (a picture or a folder), each at its own size, to PNG.

    With --styles N a PNG shows N random styles side by side; with --exemplar, that picture's.
    """
    device = common.pick_device(args.device)
    (E_X, _), (E_Y, G_Y) = oriented(load_networks(args, device), args)
    if args.setting == "coco":
        common.TRAINED = math.inf  # it has learnt from pictures of their own size
    styles = random_styles(args.styles, args, device, "translate")
    if args.exemplar:
        im = common.open_rgb(args.exemplar)
        side = max(16, short_side(im.size, args))
        im = im.resize(resized(im.size, side), Image.BILINEAR)
        with torch.no_grad():
            styles = E_Y.style(common.to_tensor(im)[None].to(device))
    common.translate_files(args.translate, args.out or "translated", lambda x: torch.cat(
        list(translate(E_X, G_Y, x.to(device), styles, args)), dim=2)[None],
        keep=[args.exemplar] if args.exemplar else ())


def diversity_scores(outputs, real, files, device, args):
    """Sec. 4.2: LPIPS between neighbours of several outputs (S, 3, H, W) for each input, IS, CIS.

    real: (N, 3, H, W); files: training pictures of each domain, for the classifier of IS and CIS.
    """
    metrics, name = common.lab("metrics", "--evaluate"), "LPIPS"
    if args.lpips == "alex":
        distance = metrics.lpips(device, "--lpips random measures with an untrained VGG")
    else:
        name, taps = f"{name}-style distance of an UNTRAINED VGG", ("relu1_2", "relu2_2", "relu3_4",
                                                                    "relu4_4")
        vgg = common.VGG(taps, "random", ceil_mode=True).to(device)
        distance = functools.partial(metrics.feature_distance, vgg)

    def diversity(pictures):  # pair by pair: VGG's maps of large pictures are large
        ones = pictures.split(1)
        return sum(map(distance, ones[:-1], ones[1:])) / (len(ones) - 1)

    classify, classifier = metrics.domain_classifier(files, device, args.seed)
    found, p = zip(*[(diversity(several), classify(several)) for several in outputs], strict=True)
    mixed = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
    trivial = {"real pictures": diversity(mixed)} if len(real) > 1 else {}
    return [{"name": f"diversity, {name} ({len(p)} inputs x {len(p[0]) - 1} pairs)",
             "value": sum(found) / len(found), "better": "higher", "trivial": trivial},
            *({"name": f"{key} ({classifier})", "value": value, "better": "higher"}
              for key, value in metrics.inception_scores(torch.stack(p)).items())]


@torch.no_grad()
def evaluate(args):
    """Sec. 4.2 with 100 inputs x 19 pairs in random styles; on toy data the true scores too."""
    device = common.pick_device(args.device)
    nets, root = load_networks(args, device), data_folder(args)
    (E_X, _), (_, G_Y) = oriented(nets, args)
    test = test_pictures(root, args, device, limit=100)
    outputs = (translate(E_X, G_Y, x, random_styles(20, args, device, i), args)
               for i, x in enumerate(test["x"].split(1)))             # (20, 3, H, W) each
    files = [common.find_split(root, "train", side) for side in "AB"]
    common.print_scores(truth_scores(nets, root, args, device)
                        + diversity_scores(outputs, test["y"], files, device, args))


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
