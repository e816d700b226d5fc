"""SEGIN: a sketch becomes a photo whose parts look like the matching parts of a reference photo.

Which shoe does a drawn shoe become? The one in the reference r: its sole where the sketch has a
sole, its laces where the sketch has laces. First, without any learning, every patch of the sketch
x fetches the most similar patch of r in VGG features: a patchwork W(x, r), right in colour, wrong
in shape. Then a network N turns x and W into a photo. No photo of x in the style of r exists to
learn from, so N learns from pairs: the photo y of x is its own reference, and W(x, y) is spoilt
on purpose until it is as wrong as W(x, r) will be.

J. Huang, J. Liao, T. W. S. Kwong, "Semantic Example Guided Image-to-Image Translation",
arXiv 1909.13028v2, 2019.

SYMBOLS      paper                 here              shape
             x, y                  x, y              (B, 3, H, W) in [-1, 1], a sketch, its photo
             r                     r                 (B, 3, H, W), any photo
             Phi(x), Phi(r)        Phi_x, Phi_r      (B, C, h, w), VGG-19's relu4_1: h = H / 8
             delta                 delta             H / h, the side of an image patch
             xi                    xi                (B, h, w), places in r, counted row by row
             W(x, r), W(x, y)      W                 (B, 3, H, W)
             y_hat = N(x, W)       y_hat             (B, 3, H, W) in [-1, 1]
             N_s(x), y_seg         seg, y_seg        (B, 1, H, W) in [0, 1], 1 is foreground
             D(x, y)               D                 (B, 6, H, W) -> logits (B, 1, H', W')

OBJECTIVE    Eq. (1)   xi_i = argmax_j Phi(x)_i . Phi(r)_j / (|Phi(x)_i| |Phi(r)_j|)
             Eq. (2)   W(x, r)_i = r_(xi_i), patch by patch
             Eq. (3)   non-local: y_i = 1/C(x) sum_j F(x_i, x_j) g(x_j)
             Eq. (4)   F(x_i, x_j) = exp(theta(x_i)^T Phi(x_j))
             Eq. (5)   L_recon = |y - N(x, W(x, y))|_1
             Eq. (6)   L_F = |Phi(N(x, W(x, y))) - Phi(y)|_1 at relu3_2
             Eq. (7)   L_GAN = E log D(x, y) + E log(1 - D(x, N(x, W(x, y))))
             Eq. (8)   L_tv = sum_ij sqrt(|Y_(i+1,j) - Y_ij|^2 + |Y_(i,j+1) - Y_ij|^2), Y = y_hat
             Eq. (9)   L_seg = |N_s(x) - y_seg|_1
             Eq. (10)  L_segAtt = |N_s(x) * N(x, W(x, y)) - y_seg * y|_1
             Eq. (11)  L = w1 L_recon + w2 L_F + w3 L_GAN + w4 L_seg + w5 L_segAtt + w6 L_tv

CHOICES      where the text is silent, or contradicts itself (no code was released):
             Eq. (7) as printed judges the photo with x and the answer without: D(N(x, W)). No one
             network can do that; here D sees x beside both.
             Weights: the text says w4 twice (100 and 1) and w3 never: w3 = 1, w4 = 100, as GAN 1
             against L1 100 is pix2pix's. w2 = 5e-6 is for a sum over the feature map; Eq. (8) and
             all other norms are means.
             y_seg: the paper takes TextureGAN's masks for shoes and bags (put them in train_mask/)
             and what is coloured for the rest. Without masks that rule holds here for all, and a
             white sole counts as background.
             N sees x and W (Eqs. 5-10). Sec. III-B says r too; in training r is y, the answer.
             Match: relu4_1, 3x3 descriptors at every place, zeros around; the delta x delta block
             in the middle of the matched patch is copied, so W has no overlaps and no blur. With
             --match-on edges, ours and for a VGG of random weights only, Phi sees gradients.
             Spoiling W(x, y): the text names shifts, repetitions, random matches, colours, noise;
             how strong they are, and how often (each in half of the pictures), is ours.
             Widths 64 to 512; of 6 encoder blocks 4 halve, so that the non-local blocks see 16x16
             places of 256 pixels. Batch norm in both decoders too. U-Net skips for N, none for N_s.
             Adam's decays are pix2pix's; D learns first; rates are constant; no augmentation.

USAGE        python segin.py                                   # toy world, a score at the end
             python segin.py --data edges2shoes      # fetched once; or a folder like pix2pix's
             python segin.py --data faces/ --input grey       # colourisation: x is y in grey
             python segin.py --translate sketch.png --exemplar photo.jpg --weights FILE
EXPECT       python segin.py: 6 minutes of CPU. With a random VGG parts take the reference's hues,
             paler: 70 to 77 % of parts right (W itself 75, majority of W 92: no success), picture
             error 5 grey levels (8 for that majority). L_D 1.24 (chance 1.39): D lives.
"""

import functools
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
from PIL import Image
from torch.nn import functional

import common
from common import PatchGAN, Run, UserError, full

# ==== 1. Configuration ========================================================================

LAYOUT = ("train/ (and test/ or val/) with side-by-side pairs like pix2pix's, or train_sketch/ "
          "train_img/ (and test_sketch/ test_img/); optional masks in train_mask/, by name")
KNOWN = {name: (f"http://efrosgans.eecs.berkeley.edu/pix2pix/datasets/{name}.tar.gz",)
         for name in ("edges2shoes", "edges2handbags")}  # Sec. IV; from pix2pix (Isola 2017)
LAYERS = [f"relu{block}_{conv}" for block, convs in enumerate((2, 2, 4, 4, 4), start=1)
          for conv in range(1, convs + 1)]
TOY = {  # no term of Eq. (11) differs, and w1, w3 to w6 are as for the paper's data
    "size": 64, "batch": 4, "steps": 500,               # minutes on a laptop: small and short, ...
    "ngf": 16, "ndf": 32, "lr": 1e-3, "lr_D": 2e-4,     # ... so narrower and faster
    "downs": 2, "w2": 8e-5,      # the bottleneck has 16x16 places; 1/16 of the values in the sum
    "vgg": "random", "match_on": "edges",               # needs no file, and sees lines alone
    "match_layer": "relu3_1", "match_k": 5,             # blocks of 4 pixels
    "workers": 0, "sample_every": 250}


def get_args(argv=None):
    """Flags in layers: the paper's defaults < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add = p.add_argument
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB",
        help="side-by-side pairs: which half is the sketch, the left one (AtoB) or the right one")
    add("--input", choices=["sketch", "grey"], default="sketch",
        help="what x is: the photo's sketch, or the photo in grey (Sec. IV, CelebA)")
    add("--size", type=int, default=256, help="pictures are resized to this square (Sec. IV)")
    add("--batch", type=int, default=5, help="pairs per step and process (Sec. IV)")
    add("--epochs", type=int, default=20, help="passes over the pairs (Sec. IV; small sets 12)")
    add("--steps", type=int, help="updates in all; overrides --epochs")
    add("--lr", type=float, default=2e-4, help="Adam's rate for N (Sec. IV)")
    add("--lr-D", type=float, default=1.3e-5, help="Adam's rate for D (Sec. IV)")
    add("--ngf", type=int, default=64, help="width of N's first block (the text is silent)")
    add("--ndf", type=int, default=64, help="width of D's first stage (the text is silent)")
    add("--downs", type=int, choices=[1, 2, 3, 4], default=4,
        help="how many of N's six encoder blocks halve, from the second on")
    add("--w1", type=float, default=100.0, help="weight of L_recon, Eq. (5) (Sec. IV)")
    add("--w2", type=float, default=5e-6, help="weight of L_F, a sum per map, Eq. (6) (Sec. IV)")
    add("--w3", type=float, default=1.0, help="weight of L_GAN, Eq. (7) (see CHOICES)")
    add("--w4", type=float, default=100.0, help="weight of L_seg, Eq. (9) (Sec. IV)")
    add("--w5", type=float, default=10.0, help="weight of L_segAtt, Eq. (10) (Sec. IV)")
    add("--w6", type=float, default=10.0, help="weight of L_tv, Eq. (8) (Sec. IV)")
    add("--vgg", default="imagenet", help="Phi: imagenet, random, or a FILE of VGG-19 or VGG-16")
    add("--match-layer", choices=LAYERS, metavar="reluB_C", default="relu4_1",
        help="Phi of Eq. (1); a relu3 halves the blocks")
    add("--match-k", type=int, default=3, help="side of a feature patch in Eq. (1), odd")
    add("--match-zoom", type=int, default=1,
        help="Phi sees pictures this many times larger: finer places in small ones")
    add("--match-on", choices=["picture", "edges"], default="picture",
        help="what Phi sees of x and r; edges, for a random VGG: the gradient's magnitude")
    add("--corrupt", type=float, default=0.5, help="probability of each way to spoil W(x, y)")
    add("--exemplar", metavar="PATH", help="--translate: the reference r, or several")
    add("--lpips", choices=["alex", "vgg"], default="alex",
        help="--evaluate: the paper's AlexNet LPIPS, or unweighted distances of --vgg's features")
    add("--fid-weights", metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        return TOY if args.data == "toy" else {}

    args = common.parse_flags(p, argv, "segin", presets, run_name)
    if args.match_k % 2 == 0:
        raise UserError(f"--match-k {args.match_k}: must be odd, so that a patch has a middle")
    stride = 2 ** (int(args.match_layer[4]) - 1)
    if args.match_zoom < 1 or stride % args.match_zoom:
        raise UserError(f"--match-zoom {args.match_zoom}: must divide {stride}, the pixels per "
                        f"place of {args.match_layer}")
    if args.size < 32 or args.size % multiple(args):
        raise UserError(f"--size {args.size}: must be at least 32 and a multiple of "
                        f"{multiple(args)}")
    if not 0 <= args.corrupt <= 1:
        raise UserError(f"--corrupt {args.corrupt}: must lie between 0 and 1")
    return args


def run_name(args):
    return f"segin-{Path(args.data).name}"


def multiple(args):
    """Sides of pictures are multiples of this: of N's halvings, and of delta."""
    return max(2**args.downs, 2 ** (int(args.match_layer[4]) - 1) // args.match_zoom)


# ==== 2. Networks =============================================================================

# ---- The semantic match S (Sec. III-A): no learning, outside of the training graph --------------


def semantic_match(Phi_x, Phi_r, k=3):
    """xi (B, h, w): for every place of x the most similar place of r, counted row by row.

    Phi_x (B, C, h, w), Phi_r (B, C, h', w'). A patch is the k x k window around a place. One matrix
    product of unit vectors, of which 4096 rows are held at a time.
    """
    B, _, h, w = Phi_x.shape
    patches_x, patches_r = (                                 # (B, C k k, h w), (B, C k k, h' w')
        functional.normalize(functional.unfold(Phi.float(), k, padding=k // 2), dim=1)
        for Phi in (Phi_x, Phi_r))
    xi = [(rows @ patches_r).argmax(dim=2)                                      # Eq. (1)
          for rows in patches_x.transpose(1, 2).split(4096, dim=1)]
    return torch.cat(xi, dim=1).view(B, h, w)


def rebuild(r, xi, delta):
    """W (B, 3, h delta, w delta): block xi_i of r at place i; r (B, 3, H', W'), xi (B, h, w)."""
    B, h, w = xi.shape
    blocks = functional.unfold(r, delta, stride=delta)                # (B, 3 delta^2, h' w')
    columns = xi.reshape(B, 1, h * w).expand(-1, blocks.shape[1], -1)    # (B, 3 delta^2, h w)
    matched = blocks.gather(2, columns)                      # Eq. (2): column i is column xi_i of r
    return functional.fold(matched, (h * delta, w * delta), delta, stride=delta)


class SemanticMatch(nn.Module):
    """The paper's matcher, match(x, r) -> xi (B, h, w), for pictures (B, 3, H, W) in [-1, 1].

    Anything else with this signature can take its place (Fig. 10 tries SIFT flow, deep image
    analogy and PixelNN); N does not know where its W comes from.
    """

    def __init__(self, args):
        super().__init__()
        self.Phi, self.args = common.VGG([args.match_layer], args.vgg), args

    @torch.no_grad()
    def forward(self, x, r):
        Phi_x, Phi_r = (self.Phi(self.shown(picture))[self.args.match_layer] for picture in (x, r))
        return semantic_match(Phi_x, Phi_r, self.args.match_k)

    def shown(self, picture):
        """What Phi sees of a picture (B, 3, H, W)."""
        # CHOICE: with an untrained Phi a white patch of a sketch is most like r's white background;
        # lines are all that a sketch and a photo share, so such a Phi is shown lines only.
        picture = edges(picture) if self.args.match_on == "edges" else picture
        if self.args.match_zoom == 1:
            return picture
        return functional.interpolate(picture, scale_factor=self.args.match_zoom, mode="bicubic")


def edges(picture):
    """Gradient magnitude over all channels, dark on white: (B, 3, H, W) -> same, in [-1, 1]."""
    p = functional.pad(picture, (1, 1, 1, 1), mode="replicate")
    right, down = p[:, :, 1:-1, 2:] - p[:, :, 1:-1, :-2], p[:, :, 2:, 1:-1] - p[:, :, :-2, 1:-1]
    size = (right.square() + down.square()).sum(dim=1, keepdim=True).sqrt()
    size = size / size.amax(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    return (1 - 2 * size).expand_as(picture)


def auxiliary(x, r, match):
    """W(x, r) (B, 3, H, W) for x and r of one size; `match` is any match(x, r) -> xi."""
    xi = match(x, r)                                                     # (B, h, w)
    return rebuild(r, xi, x.shape[-1] // xi.shape[-1])                   # delta = H / h


# ---- The translation network N (Sec. III-B2) ----------------------------------------------------


def conv_block(a, b, halve=False):
    """Convolution, batch norm, ReLU: (B, a, H, W) -> (B, b, H, W), or half of H and W."""
    return nn.Sequential(nn.Conv2d(a, b, 4, 2, 1) if halve else nn.Conv2d(a, b, 3, 1, 1),
                         nn.BatchNorm2d(b), nn.ReLU(inplace=True))


class NonLocal(nn.Module):
    """Embedded-Gaussian non-local block (Wang et al. 2018): (B, C, H, W) -> same.

    Residual, with a last layer that `build` sets to zero: the identity until training moves it.
    theta, Phi and g are 1x1 convolutions: this Phi is that of Eq. (4), not VGG.
    """

    def __init__(self, channels):
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 2, 1)
        self.Phi = nn.Conv2d(channels, channels // 2, 1)
        self.g = nn.Conv2d(channels, channels // 2, 1)
        self.out = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x):
        theta, Phi, g = (f(x).flatten(2) for f in (self.theta, self.Phi, self.g))  # (B, C/2, HW)
        scores = full(theta.transpose(1, 2) @ Phi)           # (B, HW, HW), row i against all j
        F_over_C = torch.softmax(scores, dim=2)              # Eq. (4), exp(.), over its sum C(x)
        y = g @ F_over_C.transpose(1, 2).to(g.dtype)         # Eq. (3), (B, C/2, HW)
        return x + self.out(y.view(len(x), -1, *x.shape[2:]))


class ResBlock(nn.Module):
    """x + two 3x3 convolutions of x, batch-normalised; (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(conv_block(channels, channels),
                                  nn.Conv2d(channels, channels, 3, padding=1),
                                  nn.BatchNorm2d(channels))

    def forward(self, x):
        return x + self.body(x)


class Translator(nn.Module):
    """N: x and W, both (B, 3, H, W) -> y_hat (B, 3, H, W) and N_s's seg (B, 1, H, W).

    H and W are multiples of 2^downs. 31.3 M parameters at full width.
    """

    def __init__(self, ngf=64, downs=4):
        super().__init__()
        c = [ngf, 2 * ngf, 4 * ngf, 8 * ngf, 8 * ngf, 8 * ngf]
        self.encoder = nn.ModuleList([
            conv_block(6, c[0]),                                         # (B, 64, H, W)
            conv_block(c[0], c[1], halve=downs >= 1),                    # (B, 128, H/2, W/2)
            conv_block(c[1], c[2], halve=downs >= 2),                    # (B, 256, H/4, W/4)
            conv_block(c[2], c[3], halve=downs >= 3),                    # (B, 512, H/8, W/8)
            conv_block(c[3], c[4], halve=downs >= 4),                    # (B, 512, H/16, W/16)
            conv_block(c[4], c[5])])                                     # (B, 512, H/16, W/16)
        self.bottleneck = nn.Sequential(
            NonLocal(c[5]), ResBlock(c[5]), NonLocal(c[5]), ResBlock(c[5]), NonLocal(c[5]))
        # "Upsample + conv" instead of transposed convolutions avoids checkerboards (Sec. IV).
        stages = list(pairwise([c[5], *c[:downs][::-1]]))      # 512 512 256 128 64
        self.image = nn.ModuleList(conv_block(a + b, b) for a, b in stages)  # b more from a skip
        self.to_image = nn.Sequential(nn.Conv2d(c[0], 3, 3, padding=1), nn.Tanh())
        self.up = nn.Upsample(scale_factor=2)
        self.segmentation = nn.Sequential(
            *[layer for a, b in stages for layer in (self.up, conv_block(a, b))],
            nn.Conv2d(c[0], 1, 3, padding=1), nn.Sigmoid())

    def forward(self, x, W):
        h, skips = torch.cat([x, W], dim=1), []                          # (B, 6, H, W)
        for block in self.encoder:
            h = block(h)
            skips.append(h)
        h = self.bottleneck(h)                                           # (B, 512, H/16, W/16)
        y_hat = h
        for block, skip in zip(self.image, skips[len(self.image) - 1::-1], strict=True):
            y_hat = block(torch.cat([self.up(y_hat), skip], dim=1))      # (B, 512, H/8, W/8), ...
        return self.to_image(y_hat), self.segmentation(h)


def build(args, device):
    """N, D, their Adams, and two frozen things: Phi of Eq. (6) and the matcher."""
    torch.manual_seed(args.seed)
    nets = SimpleNamespace(
        N=Translator(args.ngf, args.downs),
        D=PatchGAN(6, args.ndf, norm=None, spectral=True),  # x and y; spectral norm (Sec. III-B2)
        Phi=common.VGG(["relu3_2"], args.vgg), match=SemanticMatch(args))
    common.init_weights(nets.N, "normal", 0.02)
    common.init_weights(nets.D, "normal", 0.02)
    for layer in nets.N.modules():
        if isinstance(layer, NonLocal):
            nn.init.zeros_(layer.out.weight)
    for net in vars(nets).values():
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
    adam = functools.partial(torch.optim.Adam, betas=(0.5, 0.999),
                             fused=device.type in ("cuda", "cpu"))
    nets.opt_N = adam(nets.N.parameters(), lr=args.lr)
    nets.opt_D = adam(nets.D.parameters(), lr=args.lr_D)
    if args.compile:
        nets.N.compile()
        nets.D.compile()
    return nets


# ==== 3. Losses ===============================================================================

CHANCE = {"L_D": 2 * math.log(2), "L_GAN": math.log(2)}  # D = 1/2 everywhere


def log_D(logits):
    """E log D, where D = sigmoid(logits); log_D(-logits) is E log(1 - D). (B, 1, H', W')."""
    return functional.logsigmoid(full(logits)).mean()                    # Eq. (7), one expectation


def recon_loss(y, y_hat):
    """Both (B, 3, H, W); the mean over all values."""
    return (y - full(y_hat)).abs().mean()                                # Eq. (5)


def feature_loss(Phi_y_hat, Phi_y):
    """Activations (B, 256, H/4, W/4) at relu3_2. CHOICE: a sum over each map, which is what
    w2 = 5e-6 is made for (at 256 pixels 5e-6 times the sum is 5.2 times the mean)."""
    return (full(Phi_y_hat) - full(Phi_y)).abs().sum(dim=(1, 2, 3)).mean()   # Eq. (6)


def tv_loss(y_hat, eps=1e-6):
    """Total variation of (B, 3, H, W); |.| is the length of an RGB difference.

    CHOICE: the mean over places, not the sum. WHY eps: a root has no slope at 0.
    """
    y_hat = full(y_hat)
    down = y_hat[:, :, 1:, :-1] - y_hat[:, :, :-1, :-1]                  # (B, 3, H - 1, W - 1)
    right = y_hat[:, :, :-1, 1:] - y_hat[:, :, :-1, :-1]
    return (down.square().sum(1) + right.square().sum(1) + eps).sqrt().mean()    # Eq. (8)


def segmentation_loss(seg, y_seg):
    """Both (B, 1, H, W) in [0, 1]."""
    return (full(seg) - y_seg).abs().mean()                              # Eq. (9)


def attention_loss(seg, y_hat, y_seg, y):
    """Pictures (B, 3, H, W) inside their masks (B, 1, H, W); the mean over all values."""
    return (full(seg) * full(y_hat) - y_seg * y).abs().mean()            # Eq. (10)


# ==== 4. Data =================================================================================


def find_pairs(root, split, args):
    """[(sketch or None, photo, mask or None)] of root's split; without a sketch the photo is a
    side-by-side pair, or with --input grey all that is needed. Raises `UserError`."""
    names = ("test", "val") if split == "test" else (split,)  # pix2pix's sets have only val
    found = [d for name in names for d in (f"{name}_img", name) if Path(root, d).is_dir()]
    if not found:
        raise UserError(f"{root}: no {split} pictures; expected {LAYOUT}")
    photos, name = common.list_pictures(Path(root, found[0])), found[0].removesuffix("_img")

    def partners(kind):
        files = common.by_name(common.list_pictures(Path(root, f"{name}_{kind}")))
        if alone := {f.stem for f in photos} - files.keys():
            raise UserError(f"{root}: {min(alone)} has no {kind} of that name in {name}_{kind}")
        return files

    sketches = partners("sketch") if found[0] != name and args.input == "sketch" else {}
    masks = partners("mask") if Path(root, f"{name}_mask").is_dir() else {}
    return [(sketches.get(f.stem), f, masks.get(f.stem)) for f in photos]


def load_pair(files, args):
    """One entry of `find_pairs` -> x, y (3, size, size) in [-1, 1] and y_seg (1, size, size)."""
    sketch, photo, mask = files
    y = common.open_rgb(photo)
    if args.input == "grey":
        x = y.convert("L").convert("RGB")
    elif sketch:
        x = common.open_rgb(sketch)
        if x.size != y.size:
            raise UserError(f"{sketch}: {x.width}x{x.height}, but {photo} is {y.width}x{y.height}")
    else:
        w, h = y.size
        if w % 2:
            raise UserError(f"{photo}: {w} pixels wide; a side-by-side pair has an even width")
        halves = y.crop((0, 0, w // 2, h)), y.crop((w // 2, 0, w, h))
        x, y = halves if args.direction == "AtoB" else halves[::-1]
    (w, h), size = y.size, (args.size, args.size)
    x, y = (common.to_tensor(im.resize(size, Image.BICUBIC)) for im in (x, y))
    if mask is None:  # CHOICE: coloured is foreground (Sec. IV); a JPEG's white is not quite 1
        return x, y, (y.amin(dim=0, keepdim=True) < 0.9).float()
    m = common.open_rgb(mask)
    if abs(m.width * h / (m.height * w) - 1) > 0.02:
        raise UserError(f"{mask}: {m.width}x{m.height}, but its photo is {w}x{h}, another shape")
    m.putalpha(m.info.get("alpha", 255))  # what is clear is shown white, and is no foreground
    m = common.to_tensor(m.resize(size, Image.NEAREST))                  # (4, size, size)
    y_seg = torch.minimum(m[:3].amax(dim=0, keepdim=True), m[3:])        # (1, size, size)
    if -1 < y_seg.max() <= 0:
        raise UserError(f"{mask}: white is foreground, but nothing in it is brighter than "
                        f"{round((float(y_seg.max()) + 1) * 127.5)} of 255")
    return x, y, (y_seg > 0).float()


class Pairs(torch.utils.data.Dataset):
    """`self[n]`: the n-th training sample (x, y, y_seg, number of the pair, seed of its spoiling).

    Every epoch is a new shuffle. A sample depends on (seed, n) alone.
    """

    def __init__(self, root, args):
        self.files, self.args = find_pairs(root, "train", args), args

    def __getitem__(self, n):
        epoch, i = divmod(n, len(self.files))
        i = common.shuffled(len(self.files), common.mix(self.args.seed, "epoch", epoch))[i]
        return *load_pair(self.files[i], self.args), i, common.mix(self.args.seed, "spoil", n)

    def __len__(self):
        return len(self.files)


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("sketches", args.size)
    return common.find_data(args.data, LAYOUT, KNOWN, draw_toy)


# ---- Self-supervision (Sec. III-B1, Fig. 4): W(x, y), as wrong as W(x, r) will be ---------------
# The match xi (h, w) of a sketch with its own photo is moved: "patch shifting, repeating patterns,
# and random matches"; then colours are: "inconsistencies in the color", "noise" (Sec. I).


def shift_patches(xi, rng):
    """Every place takes the match of another, up to a fifth of the picture away, and neighbours
    move alike. WHY alike: r's parts lie elsewhere, and there W(x, r) takes whole parts of it."""
    h, w = xi.shape
    coarse = torch.rand(1, 2, 4, 4, generator=rng) * 2 - 1                 # sixteen pulls
    rows, columns = functional.interpolate(coarse, (h, w), mode="bilinear")[0] / 5  # (h, w), each
    rows = (torch.arange(h)[:, None] + (rows * h).round().long()).clamp(0, h - 1)
    columns = (torch.arange(w) + (columns * w).round().long()).clamp(0, w - 1)
    return xi[rows, columns]


def repeat_pattern(xi, rng):
    """The match of one place, all over a rectangle of up to half the sides."""
    def draw(n):
        return int(torch.randint(n, (), generator=rng))

    h, w = xi.shape
    tall, wide = 1 + draw(max(1, h // 2)), 1 + draw(max(1, w // 2))
    top, left, xi = draw(h - tall + 1), draw(w - wide + 1), xi.clone()
    xi[top:top + tall, left:left + wide] = xi[draw(h), draw(w)].item()
    return xi


def random_matches(xi, rng):
    """A tenth of the places matches any place."""
    h, w = xi.shape
    lost = torch.rand(h, w, generator=rng) < 0.1
    return torch.where(lost, torch.randint(h * w, (h, w), generator=rng), xi)


def spoil(y, xi, rng, args):
    """W(x, y) (3, H, W) from y (3, H, W) and the match xi (h, w), spoilt; rng: CPU generator."""
    shift, repeat, lose, tint, noise = (torch.rand(5, generator=rng) < args.corrupt).tolist()
    xi = shift_patches(xi, rng) if shift else xi
    xi = repeat_pattern(xi, rng) if repeat else xi
    xi = random_matches(xi, rng) if lose else xi
    W = rebuild(y[None], xi[None].to(y.device), y.shape[-1] // xi.shape[-1])   # (1, 3, H, W)
    if tint:  # a tenth of the places, each in a colour of its own
        colour = torch.randn(1, 3, *xi.shape, generator=rng) * 0.5
        colour = colour * (torch.rand(1, 1, *xi.shape, generator=rng) < 0.1)
        W = W + functional.interpolate(colour, W.shape[2:]).to(W.device)
    if noise:
        W = W + 0.1 * torch.randn(W.shape, generator=rng).to(W.device)
    return W[0].clamp(-1, 1)


class SpoiltW:
    """spoilt(x, y, pairs, seeds) -> W(x, y) (B, 3, H, W), spoilt afresh in every call.

    The match of a pair never changes, so it is computed once and kept, as 4 h w bytes, one picture
    at a time: then it does not depend on the batch that it came in.
    """

    def __init__(self, match, args):
        self.match, self.args, self.kept = match, args, {}

    def __call__(self, x, y, pairs, seeds):
        W = []
        for i, (pair, seed) in enumerate(zip(pairs.tolist(), seeds.tolist(), strict=True)):
            if pair not in self.kept:
                self.kept[pair] = self.match(x[i:i + 1], y[i:i + 1])[0].to("cpu", torch.int32)
            rng = torch.Generator().manual_seed(seed)
            W.append(spoil(y[i], self.kept[pair].long(), rng, self.args))
        return torch.stack(W)


# ==== 5. One training step ====================================================================


def train_step(nets, x, y, y_seg, W, args):
    """One update of D, then one of N, on x, y, W (B, 3, H, W), y_seg (B, 1, H, W); losses by name.

    W is W(x, y), spoilt. CHOICE: D first, so that N is judged by a D that has seen this y_hat.
    """
    N, D, Phi = nets.N, nets.D, nets.Phi
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=args.amp)
    with autocast():
        y_hat, seg = N(x, W)                                 # (B, 3, H, W), (B, 1, H, W)

    # ---- D: (x, y) is real, (x, y_hat) is fake; y_hat is detached, so N learns nothing here ---
    D.requires_grad_(True)
    with autocast():
        real = D(torch.cat([x, y], dim=1))                   # (B, 1, H', W')
        fake = D(torch.cat([x, y_hat.detach()], dim=1))      # (B, 1, H', W')
    L_D = -(log_D(real) + log_D(-fake))                      # Eq. (7), what D maximises
    nets.opt_D.zero_grad()
    L_D.backward()
    nets.opt_D.step()

    # ---- N: rebuild y, fool the new D, and find the foreground --------------------------------
    D.requires_grad_(False)
    with autocast():
        fake = D(torch.cat([x, y_hat], dim=1))               # (B, 1, H', W')
        Phi_y_hat = Phi(y_hat)["relu3_2"]                    # (B, 256, H/4, W/4)
        with torch.no_grad():
            Phi_y = Phi(y)["relu3_2"]
    L_recon = recon_loss(y, y_hat)                           # Eq. (5)
    L_F = feature_loss(Phi_y_hat, Phi_y)                     # Eq. (6)
    L_GAN = -log_D(fake)       # Eq. (7); CHOICE: N maximises log D(x, y_hat), the steep form
    L_tv = tv_loss(y_hat)                                    # Eq. (8)
    L_seg = segmentation_loss(seg, y_seg)                    # Eq. (9)
    L_segAtt = attention_loss(seg, y_hat, y_seg, y)          # Eq. (10)
    L = (args.w1 * L_recon + args.w2 * L_F + args.w3 * L_GAN
         + args.w4 * L_seg + args.w5 * L_segAtt + args.w6 * L_tv)        # Eq. (11)
    nets.opt_N.zero_grad()
    L.backward()
    nets.opt_N.step()
    return {"L_D": L_D, "L_GAN": L_GAN, "L_recon": L_recon, "L_F": L_F, "L_tv": L_tv,
            "L_seg": L_seg, "L_segAtt": L_segAtt}


# ==== 6. Training loop ========================================================================


def train(args):
    run = Run("segin", args, CHANCE)
    root = data_folder(args)
    data = Pairs(root, args)
    total = args.steps or args.epochs * max(1, len(data) // (args.batch * run.world))
    show = test_pictures(root, args, run.device, limit=6)
    nets = build(args, run.device)
    run.resume_or_start({name: getattr(nets, name) for name in ("N", "D", "opt_N", "opt_D")})
    spoilt = SpoiltW(nets.match, args)
    for step, (x, y, y_seg, pairs, seeds) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(nets, show, args))
        W = spoilt(x, y, pairs, seeds)                                   # (B, 3, H, W)
        run.log(train_step(nets, x, y, y_seg, W, args))
    run.save_samples(sample_columns(nets, show, args))
    run.finish(truth_scores(nets, root, args, run.device) if args.data == "toy" else [])


# ==== 7. Translate and evaluate ===============================================================


@torch.no_grad()
def translate(nets, x, r, args):
    """y_hat, W(x, r), seg for one size of x and r, (B, 3, H, W), multiples of `multiple(args)`.

    Batch norm uses the statistics gathered in training. N is left in the mode it was in.
    """
    W, training = auxiliary(x, r, nets.match), nets.N.training
    nets.N.eval()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        y_hat, seg = nets.N(x, W)
    nets.N.train(training)
    return full(y_hat).clamp(-1, 1), W, full(seg)


def test_pictures(root, args, device, limit=None):
    """{'x', 'y', 'r'}: (N, 3, size, size) each, of the split --split.

    Where there is neither test nor val, the training pictures stand in, and a printed line says so.
    limit: that many, evenly spaced. r is another photo of them: on toy data the next one, for which
    the truth is drawn; else half the list away, because neighbours are often alike.
    """
    split = args.split
    if split == "test" and not any(Path(root, d).is_dir()
                                   for d in ("test", "val", "test_img", "val_img")):
        print(f"{root} has no test pictures: these are training pictures")
        split = "train"
    files = find_pairs(root, split, args)
    away = 1 if args.data == "toy" else max(1, len(files) // 2)
    chosen = range(0, len(files), max(1, len(files) // limit) if limit else 1)[:limit]
    x, y, _ = zip(*(load_pair(files[i], args) for i in chosen), strict=True)
    r = [load_pair(files[(i + away) % len(files)], args)[1] for i in chosen]
    return {name: torch.stack(found).to(device)
            for name, found in (("x", x), ("y", y), ("r", r))}


def sample_columns(nets, show, args):
    """Columns of a sample grid: x, r, W(x, r), the output, its mask; the own photo y to compare."""
    y_hat, W, seg = translate(nets, show["x"], show["r"], args)
    return {"x": show["x"], "r": show["r"], "W(x, r)": W, "N(x, W)": y_hat,
            "N_s(x)": seg.expand(-1, 3, -1, -1) * 2 - 1, "own photo y": show["y"]}


def truth_scores(nets, root, args, device):
    """Scores against the toy world's true answers, beside the trivial ones'."""
    toy, test = common.lab("toy", "--data toy"), test_pictures(root, args, "cpu")

    def answer(x, r):  # one picture at a time
        found = [translate(nets, a[None].to(device), b[None].to(device), args)
                 for a, b in zip(x, r, strict=True)]
        return [torch.cat(column).cpu() for column in zip(*found, strict=True)][:2]

    return toy.reference_scores(answer, test["x"], test["y"], test["r"], root, args.split)


def load_networks(args, device):
    """N from --weights (a checkpoint of this script) and the matcher."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script")
    state = common.load_checkpoint(args.weights, "segin")
    N = Translator(args.ngf, args.downs)
    common.load_parts({"N": N}, state["parts"], args.weights)
    return SimpleNamespace(N=N.to(device).eval(), match=SemanticMatch(args).to(device))


def translate_files(args):
    """Translate --translate, a picture or a folder, by --exemplar; one folder per reference."""
    if args.exemplar is None:
        raise UserError("--exemplar FILE is needed: the reference photo, or a folder of them")
    device = common.pick_device(args.device)
    nets, out, errors = load_networks(args, device), Path(args.out or "translated"), []
    references = common.by_name(common.list_pictures(args.exemplar))

    def net(x, r):  # WHY resized: in training, too, both were squeezed into one square
        if args.input == "grey":  # as `load_pair` makes x of y
            x = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
            x = x.expand(-1, 3, -1, -1)
        r = functional.interpolate(r, x.shape[2:], mode="bicubic", antialias=True).clamp(-1, 1)
        return translate(nets, x, r, args)[0]

    for name, file in references.items():
        try:
            r = common.to_tensor(common.open_rgb(file))[None].to(device)
            by_r = functools.partial(net, r=r)
            common.translate_files(
                args.translate, out if len(references) == 1 else out / name,
                lambda x, by_r=by_r: common.same_size(by_r, x.to(device), multiple(args)),
                references.values(), alpha=False)  # a sketch on clear paper: its alpha is its ink
        except UserError as error:  # of one picture, or one reference
            errors.append(error)
    if errors:
        raise errors[0]


def evaluate(args):
    """Tab. I: FID, and LPIPS of outputs among themselves, to their reference, to the photo."""
    device = common.pick_device(args.device)
    nets, root = load_networks(args, device), data_folder(args)
    scores = truth_scores(nets, root, args, device) if args.data == "toy" else []
    if args.data != "toy" or args.fid_weights:
        metrics, test = common.lab("metrics", "--evaluate"), test_pictures(root, args, device)
        if args.lpips == "alex":
            name, distance = "LPIPS", metrics.lpips(
                device, "--lpips vgg measures with --vgg's features, not comparable with Tab. I")
        else:
            vgg = common.VGG([f"relu{i}_1" for i in range(1, 6)], args.vgg).to(device)
            name = f"VGG distance ({args.vgg})"
            distance = functools.partial(metrics.feature_distance, vgg)
        scores += metrics.with_references(lambda x, r: translate(nets, x, r, args)[0],
                                          test, name, distance, args.fid_weights)
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
