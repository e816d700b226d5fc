"""INIT: instance-level image-to-image translation, on a complete MUNIT (`--method munit`).

By night a street gets dark, but its cars switch their lights on: one style for a whole picture is
wrong for somebody. MUNIT splits a picture into content (what is where) and a style code of 8
numbers, and translates by decoding the content with a style of the other domain. INIT trains the
same networks on pictures *and* on crops of their objects. A crop may be dressed in any style of
a picture of the other domain: an object's, the background's or the global one. The rule is one-way:
a coarse style may dress finer content, a fine style never dresses coarser content. Boxes are
needed in training only; translation runs the global branch, exactly as in MUNIT.

Z. Shen, M. Huang, J. Shi, X. Xue, T. Huang, "Towards Instance-level Image-to-Image Translation",
CVPR 2019 (no training code was released). X. Huang, M.-Y. Liu, S. Belongie, J. Kautz, "Multimodal
Unsupervised Image-to-Image Translation" (MUNIT), ECCV 2018, and its released code.

SYMBOLS      paper                here              shape
             I, o                 x, o              (B, 3, H, W), (K, 3, 120, 120) in [-1, 1]
             E^c(I) = c_g, c_o    G.content(x)      (B, 256, H/4, W/4)
             E^s(I) = s_g, s_o    G.style(x)        (B, 8)
             G_g, G_o             G.decode(c, s)    (B, 3, H, W); a domain's E and G are one net
             style code bank      style_bank()      {"object": (K, 8), "background", "global"}
             D^g, D^o             D_X, D_Xo         one logit map per scale
             lambda_g ... _so     args.lambda_g ... weights of Eq. (4)

OBJECTIVE    Eq. (1)  I_hat = G_g(E^c(I), E^s(I)),  o_hat = G_o(E^c(o), E^s(o))
             Eq. (2)  c_hat_o = E^c(G_o(c_o, s_g)),  s_hat_o = E^s(G_o(c_o, s_g))
             Eq. (3)  L^k_recon = E |k_hat - k|_1 for k = I, o, c, s
             Eq. (4)  lambda_g L^g + lambda_cg L^cg + lambda_sg L^sg + L_adv^g
                      + lambda_o L^o + lambda_co L^co + lambda_so L^so + L_adv^o, over both domains

CHOICES      the paper gives no lambda, K, schedule or GAN type, and says "based on MUNIT":
             weights 10 (pictures), 1 (c, s, GAN), LSGAN and Adam are those of MUNIT's code, with
             its cycle X -> Y -> X of weight 10 (--lambda-cyc; Eq. (4) omits it, the text has it).
             Eq. (2) has no domain marks: it is used across domains and, within one, between object
             and picture (Fig. 5). The style target is the code that was decoded (s_g).
             Pictures are translated with z ~ N(0, I) as in MUNIT, crops with a style from the bank
             of the other domain's picture: one granularity, then one code, each equally likely.
             Codes of the bank are detached there: like z they are given, else E^s could make
             its own targets easy by forgetting.
             Background style: E^s of the picture with its boxes grey. Background content is never
             decoded (Eq. (4) has no such term). Crops are squeezed to squares.
             "INIT w/ Ds" is one discriminator for both (the default, and the paper's best).
             The object branch shares E and G (Sec. 3); the COCO experiment's separate branch, whose
             G_o inference would never use, is not built.
             MUNIT's code draws z, and decodes, once for D and again for G; here once for both.
             The INIT data set's own layout is not described in the paper: boxes.json instead.

USAGE        python init.py                                   # toy world; --method munit compares
             python init.py --data mydata                     # with mydata/boxes.json, see BOXES
             python init.py --translate day.jpg --weights runs/init-mydata/last.pt --styles 4
EXPECT       python init.py: 13 minutes on one CPU thread. In the style of a reference: object error
             about 25 (copying the reference 48, one change of colours 38), background error 11 (15,
             26). --method munit, as many steps in half the time: 27 and 10.
"""

import argparse
import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
from common import InstanceNorm, Run, UserError, full

BOXES = '{"trainA/NAME.png": [{"box": [x0, y0, x1, y1], "label": "car"}, ...], ...} (or "NAME.png")'

# =============================================================================================
# 1. Configuration
# =============================================================================================

TOY = {"size": 64, "load": 64, "object_size": 32, "min_box": 6, "steps": 1000, "lr": 1e-3,
       "decay_every": 350, "ngf": 16, "ndf": 16, "mlp_dim": 64, "blocks": 2,
       "dis_layers": 3, "dis_scales": 2, "lpips": "random", "workers": 0, "sample_every": 250}


def get_args(argv=None):
    """Flags in layers: the papers' defaults < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--method", choices=["init", "munit"], default="init", help="INIT, or its base line")
    add("--multi-scale", action=switch, default=False,
        help="Sec. 3: pictures of half the size are the objects; needs no boxes")
    add("--share-discriminator", action=switch, default=True,
        help="Tab. 3: one D for pictures and objects (w/ Ds), or two (w/o Ds)")
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB",
        help="what --translate and --evaluate do; training always learns both")
    add("--size", type=int, default=360, help="training crop (Sec. 4)")
    add("--load", type=int, default=360, help="pictures' short side before the crop (Sec. 4)")
    add("--object-size", type=int, default=120, help="side of an object's crop (Sec. 4)")
    add("--objects", type=int, default=2, help="at most this many crops per picture and step")
    add("--min-box", type=int, default=20, help="smaller boxes (pixels, short side) are no crops")
    add("--batch", type=int, default=1, help="pairs per step and process (MUNIT)")
    add("--steps", type=int, default=1_000_000, help="updates in all (MUNIT)")
    add("--lr", type=float, default=1e-4, help="Adam's rate (MUNIT)")
    add("--decay-every", type=int, default=100_000, help="steps after which it is halved (MUNIT)")
    add("--ngf", type=int, default=64, help="width of E and G (MUNIT)")
    add("--ndf", type=int, default=64, help="width of D (MUNIT)")
    add("--blocks", type=int, default=4, help="residual blocks of E^c, and of G (MUNIT)")
    add("--style-dim", type=int, default=8, help="numbers in a style code (MUNIT)")
    add("--mlp-dim", type=int, default=256, help="width of the style's MLP (MUNIT)")
    add("--dis-layers", type=int, default=4, help="strided convolutions of D (MUNIT)")
    add("--dis-scales", type=int, default=3, help="scales that D looks at (MUNIT)")
    for name, what, weight in (
            ("g", "pictures", 10), ("cg", "their contents", 1), ("sg", "their styles", 1),
            ("o", "objects", 10), ("co", "their contents", 1), ("so", "their styles", 1)):
        add(f"--lambda-{name}", type=float, default=weight,
            help=f"Eq. (4): weight of the reconstruction of {what}")
    add("--lambda-cyc", type=float, default=10.0,
        help="weight of the cycles X-Y-X and object-picture-object (Fig. 5); 0 leaves them out")
    add("--exemplar", default=None, metavar="IMAGE", help="--translate: take this picture's style")
    add("--styles", type=int, default=1, help="--translate: random styles, side by side")
    add("--lpips", choices=["alex", "random"], default="alex",
        help="--evaluate: the paper's AlexNet, or an untrained VGG that needs no download")
    args = common.parse_flags(p, argv, "init", lambda rough: TOY if rough.data == "toy" else {},
                              run_name)
    if args.multi_scale:
        args.object_size, args.objects = args.size // 2, 1
    sides = {"--size": args.size} | (
        {"--object-size": args.object_size} if args.method == "init" else {})
    # Each strided layer needs two pixels in each direction, each scale halves (and rounds up).
    least = max(16, (2**args.dis_layers - 1) * 2**(args.dis_scales - 1) + 1)
    for flag, side in sides.items():
        if side < least or side % 4:
            raise UserError(f"{flag} {side}: must be a multiple of 4, and at least {least} for "
                            f"--dis-layers {args.dis_layers} --dis-scales {args.dis_scales}"
                            + (" (--multi-scale: half of --size)" if args.multi_scale else ""))
    if args.exemplar and args.styles > 1:
        raise UserError(f"--styles {args.styles}: random styles and --exemplar exclude each other")
    for flag in ("objects", "styles", "decay_every"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    return args


def run_name(args):
    return f"{args.method}-{Path(args.data).name}"


# =============================================================================================
# 2. Networks (MUNIT's)
# =============================================================================================


def conv(a, b, kernel, stride=1):
    """Convolution with reflected edges that keeps H, W, or halves them with kernel 4, stride 2."""
    return nn.Conv2d(a, b, kernel, stride, (kernel - 1) // 2, padding_mode="reflect")


class ResnetBlock(nn.Module):  # same as cut.py: ResnetBlock
    """x + conv(relu(conv(x))), instance-normalised; (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm(channels),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm(channels))

    def forward(self, x):
        return x + self.body(x)


class AdaINBlock(nn.Module):
    """The same, where both normalisations get their mean and deviation from the style."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = conv(channels, channels, 3), conv(channels, channels, 3)

    def forward(self, x, mean1, std1, mean2, std2):
        h = F.relu(common.adain(self.conv1(x), mean1, std1))
        return x + common.adain(self.conv2(h), mean2, std2)


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


class Generator(nn.Module):
    """One domain's encoders E^c, E^s and decoder G, 15.03 M parameters; H, W multiples of 4."""

    def __init__(self, ngf=64, style_dim=8, mlp_dim=256, blocks=4):
        super().__init__()
        c1, c2, c4 = ngf, 2 * ngf, 4 * ngf
        relu = nn.ReLU(inplace=True)
        self.style_encoder = nn.Sequential(  # no normalisation: means and deviations are the style
            conv(3, c1, 7), relu, conv(c1, c2, 4, 2), relu, conv(c2, c4, 4, 2), relu,
            conv(c4, c4, 4, 2), relu, conv(c4, c4, 4, 2), relu,     # (B, 256, H/16, W/16)
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(c4, style_dim, 1), nn.Flatten())
        self.content_encoder = nn.Sequential(
            conv(3, c1, 7), InstanceNorm(c1), relu,                 # (B, 64, H, W)
            conv(c1, c2, 4, 2), InstanceNorm(c2), relu,             # (B, 128, H/2, W/2)
            conv(c2, c4, 4, 2), InstanceNorm(c4), relu,             # (B, 256, H/4, W/4)
            *[ResnetBlock(c4) for _ in range(blocks)])
        self.blocks = nn.ModuleList([AdaINBlock(c4) for _ in range(blocks)])
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2), conv(c4, c2, 5), LayerNorm(c2), relu,
            nn.Upsample(scale_factor=2), conv(c2, c1, 5), LayerNorm(c1), relu,
            conv(c1, 3, 7), nn.Tanh())
        self.mlp = nn.Sequential(nn.Linear(style_dim, mlp_dim), relu, nn.Linear(mlp_dim, mlp_dim),
                                 relu, nn.Linear(mlp_dim, blocks * 4 * c4))

    def content(self, x):
        """E^c: (B, 3, H, W) -> (B, 256, H/4, W/4)."""
        return self.content_encoder(x)

    def style(self, x):
        """E^s: (B, 3, H, W) -> (B, 8)."""
        return self.style_encoder(x)

    def decode(self, c, s):
        """G: content (B, 256, h, w) and style (B, 8) -> (B, 3, 4h, 4w).

        The MLP's output is read block by block: mean, deviation, mean, deviation (MUNIT's order).
        """
        per_block = self.mlp(s)[:, :, None, None].split(4 * c.shape[1], dim=1)
        for block, numbers in zip(self.blocks, per_block, strict=True):
            c = block(c, *numbers.chunk(4, dim=1))
        return self.up(c)


class Discriminator(nn.Module):
    """A PatchGAN for each scale: x (B, 3, H, W) -> [logits (B, 1, H', W')], 8.27 M parameters."""

    def __init__(self, ndf=64, layers=4, scales=3):
        super().__init__()
        widths = [3] + [ndf * 2**i for i in range(layers)]
        self.scales = nn.ModuleList([nn.Sequential(
            *[part for a, b in zip(widths[:-1], widths[1:], strict=True)
              for part in (conv(a, b, 4, 2), nn.LeakyReLU(0.2, inplace=True))],
            nn.Conv2d(widths[-1], 1, 1)) for _ in range(scales)])

    def forward(self, x):
        logits = []
        for i, net in enumerate(self.scales):
            if i > 0:
                x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
            logits.append(net(x))
        return logits


def build(args, device):
    """G_X, G_Y, D_X, D_Y, one Adam for both G and one for all D; D_Xo, D_Yo if not shared."""
    torch.manual_seed(args.seed)
    m = SimpleNamespace()
    m.G_X, m.G_Y = (Generator(args.ngf, args.style_dim, args.mlp_dim, args.blocks) for _ in "XY")
    separate = args.method == "init" and not args.share_discriminator
    for name in ("D_X", "D_Y", *(("D_Xo", "D_Yo") if separate else ())):
        setattr(m, name, Discriminator(args.ndf, args.dis_layers, args.dis_scales))
    nets = dict(vars(m))
    for name, net in nets.items():
        for layer in net.modules():  # CHOICE (code): He's initialisation for G, N(0, 0.02^2) for D
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                if name.startswith("G"):
                    nn.init.kaiming_normal_(layer.weight)
                else:
                    nn.init.normal_(layer.weight, 0, 0.02)
                nn.init.zeros_(layer.bias)
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
        if args.compile:
            for function in ("content", "style", "decode") if name.startswith("G") else ["forward"]:
                setattr(net, function, torch.compile(getattr(net, function)))
    for optimiser, letter in (("opt_G", "G"), ("opt_D", "D")):
        params = [p for name, net in nets.items() if name.startswith(letter)
                  for p in net.parameters()]
        setattr(m, optimiser, torch.optim.Adam(
            params, lr=args.lr, betas=(0.5, 0.999), weight_decay=1e-4,  # CHOICE (code): all three
            fused=device.type in ("cuda", "cpu")))
    return m


# =============================================================================================
# 3. Losses, and the style bank that they draw from
# =============================================================================================

GRANULARITY = ("object", "background", "global")  # from fine to coarse


def style_bank(s_o, s_b, s_g):
    """The style codes of one picture: s_o (K, 8), K may be 0; s_b, s_g (1, 8) or (0, 8)."""
    return dict(zip(GRANULARITY, (s_o, s_b, s_g), strict=True))


def associate(content, bank, rng):
    """A style (8) from the bank that may dress a content of that granularity (Fig. 3).

    Only its own and coarser granularities are allowed; each that the picture has is equally
    likely, then each of its codes.
    """
    allowed = GRANULARITY[GRANULARITY.index(content):]
    codes = [bank[g] for g in allowed if len(bank[g])]
    codes = codes[int(torch.randint(len(codes), (), generator=rng))]
    return codes[int(torch.randint(len(codes), (), generator=rng))]


def lsgan(logits, real):
    """L_adv for one scale, least squares (MUNIT): logits towards 1 if `real`, else towards 0."""
    return (full(logits) - float(real)).square().mean()


def l1(k_hat, k):
    """Eq. (3): the mean absolute difference."""
    return (full(k_hat) - full(k)).abs().mean()


def reconstruct(x, s, sigma, G_X, G_Y):
    """x of X (pictures, or crops) with its style s: content c, reconstruction, translation.

    sigma (B, 8): the style of Y in which the translation is dressed.
    """
    c = G_X.content(x)
    return SimpleNamespace(x=x, s=s, sigma=sigma, c=c,
                           x_hat=G_X.decode(c, s),                  # Eq. (1)
                           translated=G_Y.decode(c, sigma))


def reconstruction_terms(v, G_X, G_Y, granularity, cycle):
    """L^g, L^cg, L^sg (L^o, L^co, L^so for crops) of a `reconstruct`ion, and the cycle X-Y-X."""
    c_hat, s_hat = G_Y.content(v.translated), G_Y.style(v.translated)  # Eq. (2), across domains
    terms = {granularity: l1(v.x_hat, v.x), f"c{granularity}": l1(c_hat, v.c),
             f"s{granularity}": l1(s_hat, v.sigma)}
    if cycle:
        terms[f"cyc_{granularity}"] = l1(G_X.decode(c_hat, v.s), v.x)
    return terms


def cross_granularity_terms(o, c_o, s_o, s_g, G, granularity, cycle):
    """Fig. 5: objects o in their picture's style s_g, and swapped back into their own style s_o.

    The mirror image, picture content in an object's style, is what Fig. 3 forbids.
    """
    u = G.decode(c_o, s_g)
    c_hat, s_hat = G.content(u), G.style(u)                         # Eq. (2), within a domain
    terms = {f"c{granularity}": l1(c_hat, c_o), f"s{granularity}": l1(s_hat, s_g.detach())}
    if cycle:
        terms[f"cyc_{granularity}"] = l1(G.decode(c_hat, s_o), o)
    return terms


def adversarial_loss(D, fake):
    """L_adv for G: LSGAN, summed over the scales."""
    return sum(lsgan(logits, True) for logits in D(fake))


def discriminator_loss(D, fake, real):
    """L_adv for D, summed over the scales; no layer mixes pictures, so one pass serves both."""
    n = len(fake)
    return sum(lsgan(logits[:n], False) + lsgan(logits[n:], True)
               for logits in D(torch.cat([fake, real])))


def objective(terms, args):
    """Eq. (4) for one domain: terms by name -> their weighted sum."""
    weights = {"g": args.lambda_g, "cg": args.lambda_cg, "sg": args.lambda_sg, "adv_g": 1.0,
               "o": args.lambda_o, "co": args.lambda_co, "so": args.lambda_so, "adv_o": 1.0,
               "cyc_g": args.lambda_cyc, "cyc_o": args.lambda_cyc}
    return sum(weights[name] * term for name, term in terms.items())    # Eq. (4)


# =============================================================================================
# 4. Data
# =============================================================================================


def read_boxes(root, files):
    """{file: [(x0, y0, x1, y1), ...]} for pictures that have objects, from root/boxes.json.

    A picture's key is its path below root, or its name. Raises `UserError` for a box that does not
    lie inside its picture, is empty or inverted.
    """
    path, found = Path(root) / "boxes.json", {}
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected {BOXES}; --multi-scale and --method munit "
                        "need no boxes") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); expected {BOXES}") from None
    for file in files:
        key = Path(file).relative_to(root).as_posix()
        key = key if key in table else Path(file).name
        for entry in table.get(key, []) if isinstance(table, dict) else [table]:
            try:
                x0, y0, x1, y1 = box = entry["box"]
                with Image.open(file) as im:  # the header only
                    w, h = im.size
                if not (0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h):
                    raise UserError(f"{path}: {key}: box {box} is empty, inverted or not inside "
                                    f"the picture ({w} x {h})")
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}: {key}: found {entry}; expected {BOXES}") from None
            except OSError:
                common.open_rgb(file)  # says what is wrong with it
            found.setdefault(file, []).append((x0, y0, x1, y1))
    if not found:
        raise UserError(f"{path}: no boxes for any picture like {files[0]}; expected {BOXES}")
    return found


class Scenes(torch.utils.data.Dataset):
    """`self[n]`: the n-th training sample, for each domain in turn
         x (3, size, size), a picture in [-1, 1], and with objects, that is unless --method munit
         keep (1, size, size), 0 inside boxes, o (K, 3, object_size, object_size), count <= K.

    Of the K = --objects crops only the first `count` are filled. x of X walks through a new shuffle
    of its domain every epoch, the one of Y is drawn at random. A sample depends on (seed, n) alone.
    """

    def __init__(self, root, args):
        self.args, self.boxes = args, {}
        self.X, self.Y = (common.find_split(root, "train", side) for side in "AB")
        if args.method == "init" and not args.multi_scale:
            for files in (self.X, self.Y):
                self.boxes |= read_boxes(root, files)

    def __getitem__(self, n):
        rng = random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.X))
        x = self.X[common.shuffled(len(self.X), common.mix(self.args.seed, "epoch", epoch))[i]]
        return *self.load(x, rng), *self.load(rng.choice(self.Y), rng)

    def load(self, path, rng):
        """Short side to --load, a random crop of --size, mirrored half of the time."""
        args, im = self.args, common.open_rgb(path)
        zoom = max(args.load, args.size) / min(im.size)
        w, h = (max(args.size, round(side * zoom)) for side in im.size)
        left, top = rng.randint(0, w - args.size), rng.randint(0, h - args.size)
        mirror = rng.random() < 0.5
        boxes = [(x0 * w / im.width - left, y0 * h / im.height - top,
                  x1 * w / im.width - left, y1 * h / im.height - top)
                 for x0, y0, x1, y1 in self.boxes.get(path, ())]
        im = im.resize((w, h), Image.BICUBIC).crop((left, top, left + args.size, top + args.size))
        if mirror:
            im = im.transpose(Image.FLIP_LEFT_RIGHT)
            boxes = [(args.size - x1, y0, args.size - x0, y1) for x0, y0, x1, y1 in boxes]
        objects = self.objects(im, boxes, rng) if args.method == "init" else ()
        return common.to_tensor(im), *objects

    def objects(self, im, boxes, rng):
        """keep, o and count of a training crop and its boxes, which may reach over its edges."""
        args, crops = self.args, []
        keep = torch.ones(1, args.size, args.size)
        if args.multi_scale:  # Sec. 3: the half-size picture in the object's place
            crops = [(0, 0, args.size, args.size)]
        for box in boxes:
            x0, y0, x1, y1 = inside = [min(max(round(v), 0), args.size) for v in box]
            keep[:, y0:y1, x0:x1] = 0
            area = (box[2] - box[0]) * (box[3] - box[1])
            # CHOICE: what is too small, or mostly outside, is not an object, but no background
            if min(x1 - x0, y1 - y0) >= args.min_box and (x1 - x0) * (y1 - y0) >= 0.5 * area:
                crops.append(inside)
        crops = rng.sample(crops, min(len(crops), args.objects))
        o = torch.zeros(args.objects, 3, args.object_size, args.object_size)
        for i, box in enumerate(crops):
            o[i] = common.to_tensor(im.resize((args.object_size,) * 2, Image.BILINEAR, box))
        return keep, o, len(crops)

    def __len__(self):
        return max(len(self.X), len(self.Y))


def random_batch(args, device):
    """[a batch of noise], shaped and laid out as in training; for lab/bench.py."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    batch = []
    for _ in "XY":
        x = torch.rand(args.batch, 3, args.size, args.size).mul(2).sub(1)
        batch.append(x.to(device, memory_format=layout))
        if args.method == "init":
            batch += [torch.ones_like(x[:, :1], device=device), torch.rand(
                args.batch, args.objects, 3, *[args.object_size] * 2, device=device).mul(2).sub(1),
                torch.full((args.batch,), args.objects)]
    return [batch]


# =============================================================================================
# 5. One training step
# =============================================================================================


def encode_styles(m, domain, x, objects, args):
    """One domain in this step: pictures x, crops o, their styles, the bank of every picture.

    objects: nothing, or keep, o, count of `Scenes`. Crops of the whole batch are stacked, so that
    they pass the networks as one batch: o (N, 3, h, w), the picture of each is owner (N).
    """
    G, D = getattr(m, f"G_{domain}"), getattr(m, f"D_{domain}")
    side = SimpleNamespace(G=G, D=D, D_o=getattr(m, f"D_{domain}o", D), x=x, s_g=G.style(x),
                           o=x[:0])
    if objects:
        keep, o, count = objects[0], objects[1], objects[2].tolist()
        side.owner = [i for i, n in enumerate(count) for _ in range(n)]
        side.o = torch.cat([crops[:n] for crops, n in zip(o, count, strict=True)]).contiguous(
            memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
        side.s_o = G.style(side.o) if side.owner else side.s_g[:0]
        with torch.no_grad():  # CHOICE: the bank's codes are given, like z
            s_b = side.s_g[:0] if args.multi_scale else G.style(x * keep)
        side.banks = [style_bank(s_o, s_b[i:i + 1], side.s_g[i:i + 1].detach())
                      for i, s_o in enumerate(side.s_o.detach().split(count))]
    return side


def train_step(m, batch, args, rng):
    """One update of every D and one of both G on a batch of `Scenes`: Eq. (4).

    Returns losses by name, summed over the domains. rng: CPU generator for the style association.
    """
    autocast = functools.partial(torch.autocast, batch[0].device.type, torch.bfloat16,
                                 enabled=args.amp)
    n = len(batch) // 2
    with autocast():  # an encoder sees a real picture once; its code serves both halves
        X = encode_styles(m, "X", batch[0], batch[1:n], args)
        Y = encode_styles(m, "Y", batch[n], batch[n + 1:], args)
    names = ["", "c", "s", "adv_", "D_"] + ["cyc_"] * (args.lambda_cyc > 0)
    losses = {name + k: torch.zeros((), device=batch[0].device)
              for k in ("go" if args.method == "init" else "g") for name in names}
    m.opt_G.zero_grad(set_to_none=True)
    # WHY halves: the terms of S -> T need nothing of T but its networks and its (detached) codes,
    # so the maps of one half are freed before the other half makes its own.
    for S, T in ((X, Y), (Y, X)):
        with autocast():
            z = torch.randn_like(S.s_g)
            views = {"g": reconstruct(S.x, S.s_g, z, S.G, T.G)}
            if len(S.o):  # Fig. 3: a crop's style comes from the picture paired with its own
                sigma = torch.stack([associate("object", T.banks[i], rng) for i in S.owner])
                views["o"] = reconstruct(S.o, S.s_o, sigma, S.G, T.G)

        # ---- D of T: real towards 1, translations towards 0; they are detached -----------------
        m.opt_D.zero_grad(set_to_none=True)
        for k, D, real in (("g", T.D, T.x), ("o", T.D_o, T.o)):
            if k in views and len(real):
                with autocast():
                    L = discriminator_loss(D, views[k].translated.detach(), real)
                L.backward()
                losses[f"D_{k}"] = losses[f"D_{k}"] + L.detach()
        judges = list(dict.fromkeys([T.D, T.D_o]))  # one, if they are shared
        for p in (p for D in judges for p in D.parameters() if p.grad is None):
            p.grad = torch.zeros_like(p)  # no crops here, but perhaps in another process
        m.opt_D.step()

        # ---- both G: reconstruct, and fool the new D -------------------------------------------
        for D in judges:
            D.requires_grad_(False)
        terms = []
        with autocast():
            for k, D in (("g", T.D), ("o", T.D_o)):
                if k in views:
                    terms.append(reconstruction_terms(views[k], S.G, T.G, k, args.lambda_cyc > 0))
                    terms.append({f"adv_{k}": adversarial_loss(D, views[k].translated)})
            if "o" in views:
                terms.append(cross_granularity_terms(
                    S.o, views["o"].c, S.s_o, S.s_g[S.owner], S.G, "o", args.lambda_cyc > 0))
                if args.multi_scale:  # Sec. 3: between scales, styles go both ways
                    terms.append(cross_granularity_terms(
                        S.x, views["g"].c, S.s_g, S.s_o, S.G, "g", args.lambda_cyc > 0))
        sum(objective(part, args) for part in terms).backward()
        for D in judges:
            D.requires_grad_(True)
        for part in terms:
            for name, term in part.items():
                losses[name] = losses[name] + term.detach()
    m.opt_G.step()
    return losses


# =============================================================================================
# 6. Training loop
# =============================================================================================


def rate(step, decay_every):
    """Learning-rate factor: halved every `decay_every` steps (MUNIT)."""
    return 0.5 ** (step // decay_every)


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("day2night", args.size)

    return common.find_data(args.data, common.UNPAIRED, {}, draw_toy)


def train(args):
    run = Run("init", args)
    root = data_folder(args)
    data = Scenes(root, args)
    show = show_pictures(root, args, run.device)
    m = build(args, run.device)
    run.resume_or_start(vars(m))
    if args.data == "toy":
        print("toy preset instead of the papers' settings: "
              + ", ".join(f"{k} {v}" for k, v in TOY.items()))
    for step, batch in run.steps(data, args.steps):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(m, show, args))
        for optimiser in (m.opt_G, m.opt_D):
            optimiser.param_groups[0]["lr"] = args.lr * rate(step, args.decay_every)
        run.log(train_step(m, batch, args, run.rng()))
    run.save_samples(sample_columns(m, show, args))
    run.finish(truth_scores(*networks(m, args), root, args, run.device))


# =============================================================================================
# 7. Translate and evaluate
# =============================================================================================


def networks(m, args):
    """(source's, target's) networks of --direction."""
    return (m.G_X, m.G_Y) if args.direction == "AtoB" else (m.G_Y, m.G_X)


@torch.no_grad()
def translate(G_X, G_Y, x, styles, args):
    """Pictures x (1, 3, H, W) of any size in styles (N, 8) of Y -> (N, 3, H, W) in [-1, 1].

    The content is encoded once. This is the global branch: boxes are not needed (Sec. 3).
    """
    def net(padded):
        c = G_X.content(padded)
        return torch.cat([G_Y.decode(c, s[None]) for s in styles])

    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        return common.same_size(net, x, 4).float().clamp(-1, 1)


def random_styles(n, args, device, seed):
    """n codes (n, 8) from N(0, I), the same on every device."""
    rng = torch.Generator().manual_seed(common.mix(args.seed, seed))
    return torch.randn(n, args.style_dim, generator=rng).to(device)


def show_pictures(root, args, device):
    """What sample grids show: pictures x and the reference of each; on toy data the truth y too."""
    test = common.test_pictures(root, args, device, limit=None if args.data == "toy" else 6)
    if args.data == "toy":
        return {k: v[::7] for k, v in (test | {"reference": same_night(test["y"])}).items()}
    return {"x": test["x"],
            "reference": test["y"][torch.arange(len(test["x"])) % len(test["y"])]}


def same_night(y):
    """For each of the toy world's test nights another scene in the same night."""
    return y[torch.arange(len(y)) ^ 1]


def sample_columns(m, show, args):
    """Columns of a sample grid: x, the reference, x in its style and in random ones, x rebuilt."""
    G_X, G_Y = networks(m, args)
    columns, x = {"x": show["x"], "reference": show["reference"]}, show["x"]
    with torch.no_grad():
        styles = [G_Y.style(r[None]) for r in show["reference"]]
        own = [G_X.style(p[None]) for p in x]
    columns["reference style"] = torch.cat([translate(G_X, G_Y, p[None], s, args)
                                            for p, s in zip(x, styles, strict=True)])
    if "y" in show:
        columns["truth"] = show["y"]
    for i in (1, 2, 3):
        s = random_styles(1, args, x.device, i)
        columns[f"style {i}"] = torch.cat([translate(G_X, G_Y, p[None], s, args) for p in x])
    columns["x rebuilt"] = torch.cat([translate(G_X, G_X, p[None], s, args)
                                      for p, s in zip(x, own, strict=True)])
    return columns


@torch.no_grad()
def truth_scores(G_X, G_Y, root, args, device):
    """Scores against the toy world's true nights, each in the style of a reference; else []."""
    if args.data != "toy" or args.direction == "BtoA":
        return []
    toy = common.lab("toy", "--data toy")
    test = common.test_pictures(root, args, device)
    reference = same_night(test["y"])
    y_hat = torch.cat([translate(G_X, G_Y, x[None], G_Y.style(r[None]), args)
                       for x, r in zip(test["x"], reference, strict=True)])
    table = json.loads((Path(root) / "boxes.json").read_text())
    boxes = [table[f"{args.split}A/{i:04d}.png"] for i in range(len(y_hat))]
    return toy.night_scores(test["x"].cpu(), reference.cpu(), y_hat.cpu(), test["y"].cpu(), boxes)


def load_generators(args, device):
    """(source's, target's) networks from --weights: our checkpoint or MUNIT's released file.

    args.style_dim becomes that of the file.
    """
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script or MUNIT's gen_*.pt")
    state = common.load_file(args.weights)
    if isinstance(state, dict) and "method" in state:
        m = build(args, torch.device("cpu"))
        common.load_parts({k: getattr(m, k) for k in ("G_X", "G_Y")}, state["parts"], args.weights)
    else:
        released = common.lab("released", "--weights with a released file")
        m = SimpleNamespace(**dict(zip(("G_X", "G_Y"), released.init(state, args.weights),
                                       strict=True)))
        args.style_dim = m.G_X.mlp[0].in_features
    return [net.to(device).eval() for net in networks(m, args)]


def translate_files(args):
    """Translate --translate (a picture or a folder), each at its own size, to PNG.

    With --styles N a PNG shows N random styles side by side; with --exemplar, that picture's.
    """
    device = common.pick_device(args.device)
    G_X, G_Y = load_generators(args, device)
    if args.exemplar:
        im = common.open_rgb(args.exemplar)
        zoom = args.load / min(im.size)
        im = im.resize([max(16, round(side * zoom)) for side in im.size], Image.BICUBIC)
        with torch.no_grad():
            styles = G_Y.style(common.to_tensor(im)[None].to(device))
    else:
        styles = random_styles(args.styles, args, device, "translate")
    common.translate_files(args.translate, args.out or "translated", lambda x: torch.cat(
        list(translate(G_X, G_Y, x.to(device), styles, args)), dim=2)[None])


INPUTS, PAIRS = 100, 19  # Sec. 4.2


@torch.no_grad()
def evaluate(args):
    """Sec. 4.2: LPIPS diversity, IS and CIS of translations in random styles; toy: truth scores."""
    device = common.pick_device(args.device)
    G_X, G_Y = load_generators(args, device)
    root = data_folder(args)
    scores = truth_scores(G_X, G_Y, root, args, device)
    metrics = common.lab("metrics", "--evaluate")
    if args.lpips == "alex":
        distance_name = "LPIPS"
        distance = metrics.lpips(device, "--lpips random measures with an untrained VGG")
    else:
        distance_name = "LPIPS-style distance of an UNTRAINED VGG"
        distance = functools.partial(metrics.feature_distance, common.VGG(
            ("relu1_2", "relu2_2", "relu3_4", "relu4_4"), "random", ceil_mode=True).to(device))
    classify, classifier_name = metrics.domain_classifier(
        [common.find_split(root, "train", side) for side in "AB"], device, args.seed)
    test = common.test_pictures(root, args, device, square=True)

    def mean_distance(a, b):  # pair by pair: VGG's maps of large pictures are large
        return sum(distance(*pair) for pair in zip(a.split(1), b.split(1), strict=True)) / len(a)

    lpips, p = [], []
    for i, x in enumerate(test["x"][:INPUTS]):
        y_hat = translate(G_X, G_Y, x[None], random_styles(PAIRS + 1, args, device, i), args)
        lpips.append(mean_distance(y_hat[:-1], y_hat[1:]))  # 19 neighbours among 20 outputs
        p.append(classify(y_hat))
    p = torch.stack(p)                                              # (inputs, 20, domains)
    protocol = f"{len(p)} inputs x {PAIRS} pairs"
    real = test["y"][torch.randperm(len(test["y"]), generator=torch.Generator().manual_seed(0))]
    trivial = {"real pictures": mean_distance(real[:-1], real[1:])} if len(real) > 1 else {}
    scores.append({"name": f"diversity, {distance_name} ({protocol})", "trivial": trivial,
                   "value": sum(lpips) / len(lpips), "better": "higher"})
    for name, value in metrics.inception_scores(p).items():
        scores.append({"name": f"{name} ({classifier_name})", "value": value, "better": "higher"})
    common.print_scores(scores)


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
