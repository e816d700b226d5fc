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
             Phi(x)                features          (B, C, h, w), VGG-19's relu4_1: h = H / 8
             delta                 delta             H / h, the side of an image patch
             xi                    xi                (B, h, w), places in r, counted row by row
             W(x, r)               W                 (B, 3, H, W)
             N(x, W), N_s(x)       y_hat, seg        (B, 3, H, W) in [-1, 1]; (B, 1, H, W) in [0, 1]
             y_seg                 y_seg             (B, 1, H, W), 1 is foreground
             D(x, y)               D                 (B, 6, H, W) -> logits (B, 1, H', W')

OBJECTIVE    Eq. (1)   xi_i = argmax_j Phi(x)_i . Phi(r)_j / (|Phi(x)_i| |Phi(r)_j|)
             Eq. (2)   W(x, r)_i = r_(xi_i), patch by patch
             Eq. (3)   non-local: y_i = 1/C(x) sum_j F(x_i, x_j) g(x_j)
             Eq. (4)   F(x_i, x_j) = exp(theta(x_i)^T phi(x_j))
             Eq. (5)   L_recon = |y - N(x, W(x, y))|_1
             Eq. (6)   L_F = |Phi(N(x, W(x, y))) - Phi(y)|_1 at relu3_2
             Eq. (7)   L_GAN = E log D(x, y) + E log(1 - D(x, N(x, W(x, y))))
             Eq. (8)   L_tv = sum_ij sqrt(|Y_(i+1,j) - Y_ij|^2 + |Y_(i,j+1) - Y_ij|^2), Y = y_hat
             Eq. (9)   L_seg = |N_s(x) - y_seg|_1
             Eq. (10)  L_segAtt = |N_s(x) * N(x, W(x, y)) - y_seg * y|_1
             Eq. (11)  w1 L_recon + w2 L_F + w3 L_GAN + w4 L_seg + w5 L_segAtt + w6 L_tv

CHOICES      No code was released; where the text is silent or contradicts itself:
             Match: relu4_1, 3x3 descriptors at every place, zeros around; the delta x delta block
             in the middle of the matched patch is copied, so W has no overlaps and no blur.
             Spoiling W(x, y): each of shift (a fifth of the blocks, by up to 2), repeat (one block
             over a rectangle), random matches (a fifth of them), with probability 1/2 each.
             N sees x and W (Eqs. 5-10), 6 channels; Sec. III-B says r too. N_s has them as well.
             Widths 64 to 512; of 6 encoder blocks 4 halve, so that the non-local blocks see 16x16
             places of 256 pixels. Batch norm in both decoders too. U-Net skips for N, none for N_s.
             Weights: the text says w4 twice (100 and 1) and w3 never: w3 = 1, w4 = 100, as GAN 1
             against L1 100 is pix2pix's. w2 = 5e-6 is for a sum over the feature map; Eq. (8) and
             all other norms are means, and N takes the non-saturating form of Eq. (7).
             Adam's decays are pix2pix's; D learns first; rates are constant; no augmentation.

USAGE        python segin.py                                   # toy world, a score at the end
             python segin.py --data edges2shoes      # fetched once; or a folder like pix2pix's
             python segin.py --translate sketch.png --exemplar photo.jpg --weights FILE
             python segin.py --ablation gan                    # a row of Tab. II
             python -m lab.figures segin match                 # Figs. 3, 4: what matched what
EXPECT       python segin.py: 3.5 minutes of one CPU core; 82 % of the parts get the colour of
             their part in r (W 75 %, r itself 57 %, one colour for all 17 %); part colour error
             about 19 grey levels (W 24, r 35, one colour 47). The toy world's VGG is random, so
             that its match needs --match-on edges; how W looks without it: python -m lab.figures
             segin match --match-on picture.
"""

import argparse
import functools
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
from common import PatchGAN, Run, UserError

LAYOUT = ("train/ (and test/ or val/) with side-by-side pairs like pix2pix's, or train_sketch/ "
          "train_img/ (and test_sketch/ test_img/); optional masks in train_mask/, by name")
KNOWN = {name: tuple(f"{scheme}://efrosgans.eecs.berkeley.edu/pix2pix/datasets/{name}.tar.gz"
                     for scheme in ("https", "http"))
         for name in ("edges2shoes", "edges2handbags")}  # Sec. IV; from pix2pix (Isola 2017)

# =============================================================================================
# 1. Configuration
# =============================================================================================

ABLATIONS = {  # Tab. II: name -> what is changed
    "none": {}, "gan": {"w3": 0.0}, "recon": {"w1": 0.0}, "F": {"w2": 0.0}, "tv": {"w6": 0.0},
    "nonlocal": {"non_local": False}, "multitask": {"multitask": False},
}
TOY = {"size": 64, "batch": 4, "steps": 500, "lr": 1e-3, "lr_D": 2e-4,
       "ngf": 16, "ndf": 32, "downs": 2, "vgg": "random", "match_layer": "relu3_1", "match_k": 5,
       "match_on": "edges", "w2": 8e-5, "workers": 0, "sample_every": 250}


def get_args(argv=None):
    """Flags in layers: the paper's defaults < --ablation < toy preset < checkpoint < command."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB",
        help="side-by-side pairs: which half is the sketch, the left one (AtoB) or the right one")
    add("--ablation", choices=list(ABLATIONS), default="none", help="Tab. II: train without this")
    add("--size", type=int, default=256, help="pictures are resized to this square (Sec. IV)")
    add("--batch", type=int, default=5, help="pairs per step and process (Sec. IV)")
    add("--epochs", type=int, default=20, help="passes over the pairs (Sec. IV; small sets 12)")
    add("--steps", type=int, default=None, help="updates in all; overrides --epochs")
    add("--lr", type=float, default=2e-4, help="Adam's rate for N (Sec. IV)")
    add("--decay-from", type=float, default=1.0, help="fraction of the run with constant rates")
    add("--lr-D", type=float, default=1.3e-5, help="Adam's rate for D (Sec. IV)")
    add("--beta1", type=float, default=0.5, help="Adam's first decay (the text is silent)")
    add("--ngf", type=int, default=64, help="width of N's first block (the text is silent)")
    add("--ndf", type=int, default=64, help="width of D's first stage (the text is silent)")
    add("--downs", type=int, default=4, help="how many of N's six encoder blocks halve")
    add("--non-local", action=switch, default=True, help="the three non-local blocks (Tab. II)")
    add("--multitask", action=switch, default=True, help="the segmentation decoder (Tab. II)")
    add("--w1", type=float, default=100.0, help="weight of L_recon, Eq. (5) (Sec. IV)")
    add("--w2", type=float, default=5e-6, help="weight of L_F, a sum per map, Eq. (6) (Sec. IV)")
    add("--w3", type=float, default=1.0, help="weight of L_GAN, Eq. (7) (see CHOICES)")
    add("--w4", type=float, default=100.0, help="weight of L_seg, Eq. (9) (Sec. IV)")
    add("--w5", type=float, default=10.0, help="weight of L_segAtt, Eq. (10) (Sec. IV)")
    add("--w6", type=float, default=10.0, help="weight of L_tv, Eq. (8) (Sec. IV)")
    add("--vgg", default="imagenet", help="imagenet, random, or a file of VGG-19 or VGG-16")
    add("--match-layer", default="relu4_1", help="Phi of Eq. (1); relu3_1 halves the blocks")
    add("--match-k", type=int, default=3, help="side of a feature patch in Eq. (1), odd")
    add("--match-on", choices=["picture", "edges"], default="picture",
        help="what Phi sees of x and r; edges, for a random VGG: the gradient's magnitude")
    add("--match-chunk", type=int, default=4096, help="rows of Eq. (1)'s matrix held at a time")
    add("--corrupt", type=float, default=0.5, help="probability of each way to spoil W(x, y)")
    add("--corrupt-share", type=float, default=0.2, help="share of blocks shifted, or rematched")
    add("--corrupt-reach", type=int, default=2, help="how far a block is shifted, in blocks")
    add("--exemplar", default=None, metavar="PATH", help="--translate: the reference r, or several")
    add("--lpips", choices=["alex", "vgg"], default="alex",
        help="--evaluate: the paper's AlexNet LPIPS, or unweighted distances of --vgg's features")
    add("--fid-weights", default=None, metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        return (TOY if args.data == "toy" else {}) | ABLATIONS.get(args.ablation, {})

    args = common.parse_flags(p, argv, "segin", presets, run_name)
    if not 1 <= args.downs <= 5:
        raise UserError(f"--downs {args.downs}: of six encoder blocks 1 to 5 can halve")
    if args.size < 32 or args.size % multiple(args):
        raise UserError(f"--size {args.size}: must be at least 32 and a multiple of "
                        f"{multiple(args)}")
    if args.match_k < 1 or args.match_k % 2 == 0:
        raise UserError(f"--match-k {args.match_k}: must be odd, so that a patch has a middle")
    if args.match_chunk < 1:
        raise UserError(f"--match-chunk {args.match_chunk}: must be at least 1")
    for flag, value in (("corrupt", args.corrupt), ("corrupt-share", args.corrupt_share),
                        ("decay-from", args.decay_from)):
        if not 0 <= value <= 1:
            raise UserError(f"--{flag} {value}: must lie between 0 and 1")
    if args.corrupt_reach < 0:
        raise UserError(f"--corrupt-reach {args.corrupt_reach}: must be 0 or more")
    return args


def run_name(args):
    ablation = "" if args.ablation == "none" else f"-{args.ablation}"
    return f"segin-{Path(args.data).name}{ablation}"


LAYERS = [f"relu{block}_{conv}" for block, convs in enumerate((2, 2, 4, 4, 4), start=1)
          for conv in range(1, convs + 1)]


def delta(args):
    """delta of Eq. (2): pixels per place of Phi, 1, 2, 4, 8 or 16 in VGG-19."""
    if args.match_layer not in LAYERS:
        raise UserError(f"--match-layer {args.match_layer}: VGG-19 has {LAYERS[0]} to {LAYERS[-1]}")
    return 2 ** (int(args.match_layer[4]) - 1)


def multiple(args):
    """Sides of pictures are multiples of this, for N and for the match."""
    return max(2 ** args.downs, delta(args))


# =============================================================================================
# 2. Networks
# =============================================================================================

# ---- The semantic match S (Sec. III-A): no learning, outside of the training graph --------------


def semantic_match(features_x, features_r, k=3, chunk=4096):
    """xi (B, h, w): for every place of x the most similar place of r, counted row by row.

    features: Phi(x) (B, C, h, w) and Phi(r) (B, C, h', w'). A patch is a k x k window around a
    place. One matrix product of unit vectors; `chunk` rows of its (h w, h' w') results are held
    at a time: 512x512 pictures need 64 MiB at relu4_1, 256 MiB at relu3_1.
    """
    B, _, h, w = features_x.shape
    patches_x, patches_r = (F.normalize(F.unfold(f.float(), k, padding=k // 2), dim=1)
                            for f in (features_x, features_r))          # (B, C k k, h w)
    rows = patches_x.transpose(1, 2).split(chunk, dim=1)
    xi = torch.cat([(part @ patches_r).argmax(dim=2) for part in rows], dim=1)   # Eq. (1)
    return xi.view(B, h, w)


def rebuild(r, xi, delta):
    """W (B, 3, h delta, w delta): block xi_i of r at place i; r (B, 3, H', W'), xi (B, h, w)."""
    B, h, w = xi.shape
    blocks = F.unfold(r, delta, stride=delta)                           # (B, 3 delta^2, h' w')
    matched = blocks.gather(2, xi.reshape(B, 1, h * w).expand(-1, blocks.shape[1], -1))  # Eq. (2)
    return F.fold(matched, (h * delta, w * delta), delta, stride=delta)


class SemanticMatch(nn.Module):
    """The paper's matcher, match(x, r) -> xi (B, h, w), for pictures (B, 3, H, W) in [-1, 1].

    Anything else with this signature can take its place (Fig. 10 tries SIFT flow, deep image
    analogy and PixelNN); N does not know where its W comes from.
    """

    def __init__(self, args):
        super().__init__()
        self.vgg = common.VGG([args.match_layer], args.vgg)
        self.layer, self.args = args.match_layer, args

    @torch.no_grad()
    def forward(self, x, r):
        # CHOICE: with an untrained Phi a white patch of a sketch is most like r's white background;
        # lines are all that a sketch and a photo share, so such a Phi is shown lines only.
        see = edges if self.args.match_on == "edges" else lambda picture: picture
        return semantic_match(self.vgg(see(x))[self.layer], self.vgg(see(r))[self.layer],
                              self.args.match_k, self.args.match_chunk)


def edges(picture):
    """Gradient magnitude over all channels, dark on white: (B, 3, H, W) -> same, in [-1, 1]."""
    p = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    right, down = p[:, :, 1:-1, 2:] - p[:, :, 1:-1, :-2], p[:, :, 2:, 1:-1] - p[:, :, :-2, 1:-1]
    size = (right.square() + down.square()).sum(dim=1, keepdim=True).sqrt()
    size = size / size.amax(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    return (1 - 2 * size).expand_as(picture)


def auxiliary(x, r, match):
    """W(x, r) (B, 3, H, W) for x and r of one size; `match` is any match(x, r) -> xi."""
    xi = match(x, r)
    return rebuild(r, xi, x.shape[-1] // xi.shape[-1])


# ---- The translation network N (Sec. III-B2) ----------------------------------------------------


def conv_block(a, b, stride=1):
    """Convolution, batch norm, ReLU: (B, a, H, W) -> (B, b, H / stride, W / stride)."""
    return nn.Sequential(nn.Conv2d(a, b, 4 if stride == 2 else 3, stride, padding=1),
                         nn.BatchNorm2d(b), nn.ReLU(inplace=True))


class NonLocal(nn.Module):
    """Embedded-Gaussian non-local block (Wang et al. 2018): (B, C, H, W) -> same.

    Residual, with a last layer that `build` sets to zero: the identity until training moves it.
    """

    def __init__(self, channels):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.out = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x):
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        # exp(theta^T phi) over its sum C(x) is a softmax over j.               (B, HW, HW)
        affinity = torch.softmax(common.full(theta.transpose(1, 2) @ phi), dim=2)  # Eq. (4)
        y = g @ affinity.transpose(1, 2).to(g.dtype)                               # Eq. (3)
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
    """N: x and W, both (B, 3, H, W) -> (y_hat (B, 3, H, W), seg (B, 1, H, W) or None).

    H and W are multiples of 2^downs. 31.3 M parameters at full width.
    """

    def __init__(self, ngf=64, downs=4, non_local=True, multitask=True):
        super().__init__()
        c = [ngf * min(2**i, 8) for i in range(6)]                      # 64 128 256 512 512 512
        strides = [1] + [2] * downs + [1] * (5 - downs)
        self.encoder = nn.ModuleList(conv_block(a, b, stride) for a, b, stride in zip(
            [6, *c], c, strides, strict=False))  # (B, 64, H, W), (B, 128, H/2, W/2), ...
        self.downs, last = downs, c[-1]

        def attend():
            return [NonLocal(last)] if non_local else []

        self.bottleneck = nn.Sequential(                                # (B, 512, H/16, W/16)
            *attend(), ResBlock(last), *attend(), ResBlock(last), *attend())
        # "Upsample + conv" instead of transposed convolutions avoids checkerboards (Sec. IV).
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        widths = c[:downs][::-1]                                        # 512 256 128 64
        self.image = nn.ModuleList(conv_block(a + b, b) for a, b in zip(  # b more from the skip
            [last, *widths], widths, strict=False))
        self.to_image = nn.Sequential(nn.Conv2d(c[0], 3, 3, padding=1), nn.Tanh())
        self.segmentation = None
        if multitask:
            stages = []
            for a, b in zip([last, *widths], widths, strict=False):
                stages += [nn.Upsample(scale_factor=2, mode="nearest"), conv_block(a, b)]
            self.segmentation = nn.Sequential(
                *stages, nn.Conv2d(c[0], 1, 3, padding=1), nn.Sigmoid())

    def forward(self, x, W):
        h, skips = torch.cat([x, W], dim=1), []
        for i, block in enumerate(self.encoder):
            h = block(h)
            if i < self.downs:
                skips.append(h)
        shared = h = self.bottleneck(h)
        for block in self.image:
            h = block(torch.cat([self.up(h), skips.pop()], dim=1))
        seg = self.segmentation(shared) if self.segmentation is not None else None
        return self.to_image(h), seg


def build(args, device):
    """N, D, their Adams, and two frozen things: VGG for Eq. (6) and the matcher."""
    torch.manual_seed(args.seed)
    N = Translator(args.ngf, args.downs, args.non_local, args.multitask)
    D = PatchGAN(6, args.ndf, norm=None, spectral=True)  # D(x, y) sees both
    for net in (N, D):
        common.init_weights(net, "normal", 0.02)
    for layer in N.modules():
        if isinstance(layer, NonLocal):
            nn.init.zeros_(layer.out.weight)
    m = SimpleNamespace(N=N, D=D, vgg=common.VGG(["relu3_2"], args.vgg),
                        match=SemanticMatch(args))
    for net in (N, D, m.vgg, m.match):
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
    adam = functools.partial(torch.optim.Adam, betas=(args.beta1, 0.999),
                             fused=device.type in ("cuda", "cpu"))
    m.opt_N, m.opt_D = adam(N.parameters(), lr=args.lr), adam(D.parameters(), lr=args.lr_D)
    if args.compile:
        N.forward, D.forward = torch.compile(N.forward), torch.compile(D.forward)
    return m


# =============================================================================================
# 3. Losses
# =============================================================================================


def non_saturating(logits, real):
    """-log sigmoid(logits) of D's logits if `real`, else -log(1 - sigmoid(logits)); the mean."""
    logits = common.full(logits)
    return F.softplus(-logits if real else logits).mean()               # Eq. (7)


def recon_loss(y, y_hat):
    """Both (B, 3, H, W); the mean over all values."""
    return (y - common.full(y_hat)).abs().mean()                        # Eq. (5)


def feature_loss(features_y_hat, features_y):
    """Activations at relu3_2. CHOICE: a sum over each map, which is what w2 = 5e-6 is made for
    (at 256 pixels 5e-6 times the sum is 5.2 times the mean), and the mean over the batch."""
    gap = (common.full(features_y_hat) - common.full(features_y)).abs()
    return gap.sum(dim=(1, 2, 3)).mean()                                # Eq. (6)


def tv_loss(y_hat, eps=1e-6):
    """Total variation, the same in every direction; |.| is the length of an RGB difference.

    CHOICE: the mean over places, not the sum. WHY eps: a root has no slope at 0.
    """
    y_hat = common.full(y_hat)
    down = y_hat[:, :, 1:, :-1] - y_hat[:, :, :-1, :-1]
    right = y_hat[:, :, :-1, 1:] - y_hat[:, :, :-1, :-1]
    squares = down.square().sum(dim=1) + right.square().sum(dim=1)
    return (squares + eps).sqrt().mean()                                # Eq. (8)


def segmentation_loss(seg, y_seg):
    """Both (B, 1, H, W) in [0, 1]."""
    return (common.full(seg) - y_seg).abs().mean()                      # Eq. (9)


def attention_loss(seg, y_hat, y_seg, y):
    """Pictures inside their masks; the mean over all values."""
    return (common.full(seg) * common.full(y_hat) - y_seg * y).abs().mean()  # Eq. (10)


def total_loss(losses, args):
    """The weighted sum of those of {name: loss} that N minimises."""
    weights = {"recon": args.w1, "F": args.w2, "GAN": args.w3, "seg": args.w4, "segAtt": args.w5,
               "tv": args.w6}
    return sum(w * losses[name] for name, w in weights.items() if name in losses)  # Eq. (11)


# =============================================================================================
# 4. Data
# =============================================================================================


def find_pairs(root, split, direction):
    """[(sketch, photo, mask or None)] of root's split 'train' or 'test'; a side-by-side file comes
    as (file, None, ...). Raises `UserError`."""
    root = Path(root)
    for name in ("test", "val") if split == "test" else (split,):  # pix2pix's sets have only val
        masks = {f.stem: f for f in common.list_pictures(root / f"{name}_mask")} if (
            root / f"{name}_mask").is_dir() else None
        if (root / f"{name}_img").is_dir():
            photos = common.list_pictures(root / f"{name}_img")
            sketches = {f.stem: f for f in common.list_pictures(root / f"{name}_sketch")}
            if alone := sketches.keys() ^ {f.stem for f in photos}:
                raise UserError(f"{root}: {min(alone)} is in only one of {name}_sketch and "
                                f"{name}_img; partners have the same name")
            found = [(sketches[f.stem], f) for f in photos]
        elif (root / name).is_dir():
            found = [(f, None) for f in common.list_pictures(root / name)]
        else:
            continue
        if masks is not None and (alone := {x.stem for x, _ in found} - masks.keys()):
            raise UserError(f"{root}: {min(alone)} has no mask in {name}_mask")
        return [(x, y, masks and masks[x.stem]) for x, y in found]
    raise UserError(f"{root}: no {split} pictures; expected {LAYOUT}")


def load_pair(files, args):
    """One entry of `find_pairs` -> x, y (3, size, size) in [-1, 1] and y_seg (1, size, size)."""
    first, second, mask = files
    x = common.open_rgb(first)
    if second is None:
        w, h = x.size
        if w % 2:
            raise UserError(f"{first}: {w} pixels wide; a side-by-side pair has an even width")
        halves = x.crop((0, 0, w // 2, h)), x.crop((w // 2, 0, w, h))
        x, y = halves if args.direction == "AtoB" else halves[::-1]
    else:
        y = common.open_rgb(second)
        if x.size != y.size:
            raise UserError(f"{first}: {x.width}x{x.height}, but {second} is {y.width}x{y.height}")
    size = args.size, args.size
    x, y = (common.to_tensor(im.resize(size, Image.BICUBIC)) for im in (x, y))
    if mask is None:  # Sec. IV: coloured regions are the foreground; a JPEG's white is not quite 1
        return x, y, (y.amin(dim=0, keepdim=True) < 0.9).float()
    mask = common.to_tensor(common.open_rgb(mask).resize(size, Image.NEAREST))
    return x, y, (mask[:1] > 0).float()


class Pairs(torch.utils.data.Dataset):
    """`self[n]`: the n-th training sample (x, y, y_seg, number of the pair, seed of its spoiling).

    Every epoch is a new shuffle. A sample depends on (seed, n) alone.
    """

    def __init__(self, root, args):
        self.files, self.args = find_pairs(root, "train", args.direction), args

    def __getitem__(self, n):
        epoch, i = divmod(n, len(self.files))
        i = common.shuffled(len(self.files), common.mix(self.args.seed, "epoch", epoch))[i]
        return *load_pair(self.files[i], self.args), i, common.mix(self.args.seed, "spoil", n)

    def __len__(self):
        return len(self.files)


# ---- Self-supervision (Sec. III-B1, Fig. 4): W(x, y), as wrong as W(x, r) will be ---------------


def shift_patches(xi, rng, share, reach):
    """A share of the places of xi (h, w) takes the match of a place up to `reach` away."""
    h, w = xi.shape
    moved = torch.rand(h, w, generator=rng) < share
    row, column = (torch.randint(-reach, reach + 1, (h, w), generator=rng) for _ in "rc")
    row = (row + torch.arange(h)[:, None]).clamp(0, h - 1)
    column = (column + torch.arange(w)).clamp(0, w - 1)
    return torch.where(moved, xi[row, column], xi)


def repeat_pattern(xi, rng):
    """The match of one place of xi (h, w), all over a rectangle of up to half the sides."""
    def draw(n):
        return int(torch.randint(n, (), generator=rng))

    h, w = xi.shape
    tall, wide = 1 + draw(max(1, h // 2)), 1 + draw(max(1, w // 2))
    top, left, xi = draw(h - tall + 1), draw(w - wide + 1), xi.clone()
    xi[top:top + tall, left:left + wide] = xi[draw(h), draw(w)].item()
    return xi


def random_matches(xi, rng, share):
    """A share of the places of xi (h, w) matches any place."""
    h, w = xi.shape
    lost = torch.rand(h, w, generator=rng) < share
    return torch.where(lost, torch.randint(h * w, (h, w), generator=rng), xi)


def corrupt(xi, rng, args):
    """Sec. III-B1: "patch shifting, repeating patterns, and random matches with a certain
    possibility", of a match xi (h, w) of a picture with itself; rng: CPU generator."""
    shift, repeat, lose = (torch.rand(3, generator=rng) < args.corrupt).tolist()
    xi = shift_patches(xi, rng, args.corrupt_share, args.corrupt_reach) if shift else xi
    xi = repeat_pattern(xi, rng) if repeat else xi
    return random_matches(xi, rng, args.corrupt_share) if lose else xi


class SpoiltW:
    """spoilt(x, y, pairs, seeds) -> W(x, y) (B, 3, H, W), corrupted afresh in every call.

    The match of a pair never changes, so it is computed once and kept, as 4 h w bytes. WHY one
    picture at a time: then it does not depend on the batch it came in, and a resumed run, which
    starts with nothing kept, computes the same.
    """

    def __init__(self, match, args):
        self.match, self.args, self.kept = match, args, {}

    def __call__(self, x, y, pairs, seeds):
        found = []
        for i, (pair, seed) in enumerate(zip(pairs.tolist(), seeds.tolist(), strict=True)):
            if pair not in self.kept:
                self.kept[pair] = self.match(x[i:i + 1], y[i:i + 1])[0].to("cpu", torch.int32)
            rng = torch.Generator().manual_seed(seed)
            found.append(corrupt(self.kept[pair].long(), rng, self.args))
        xi = torch.stack(found)
        return rebuild(y, xi.to(y.device), y.shape[-1] // xi.shape[-1])


def random_batch(args, device):
    """(x, y, y_seg, W) of noise, shaped and laid out as in training; for lab/bench.py."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    x, y, W = (torch.rand(args.batch, 3, args.size, args.size).mul(2).sub(1) for _ in "xyW")
    return [t.to(device, memory_format=layout) for t in (x, y, (y[:, :1] > 0).float(), W)]


# =============================================================================================
# 5. One training step
# =============================================================================================


def train_step(m, x, y, y_seg, W, args, rng=None):
    """One update of D, then one of N, on x, y, W (B, 3, H, W), y_seg (B, 1, H, W).

    W is W(x, y), corrupted. Returns losses by name. A term of weight 0 is not computed. rng is
    not needed: nothing is drawn here.
    """
    N, D, losses = m.N, m.D, {}
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=args.amp)
    with autocast():
        y_hat, seg = N(x, W)

    # ---- D: (x, y) is real, (x, y_hat) is fake; y_hat is detached, so N gets no gradient ------
    if args.w3:
        with autocast():  # no layer of D mixes pictures, so real and fake can share one pass
            pairs = torch.cat([torch.cat([x, x]), torch.cat([y_hat.detach(), y])], dim=1)
            logits_fake, logits_real = D(pairs).split([len(x), len(x)])
        losses["D"] = (non_saturating(logits_fake, False)
                       + non_saturating(logits_real, True))             # Eq. (7), D's side
        m.opt_D.zero_grad(set_to_none=True)
        losses["D"].backward()
        m.opt_D.step()

    # ---- N: rebuild y, fool the new D, and find the foreground --------------------------------
    if args.w1:
        losses["recon"] = recon_loss(y, y_hat)
    if args.w2:
        with autocast():
            found = m.vgg(y_hat)["relu3_2"]
            with torch.no_grad():
                wanted = m.vgg(y)["relu3_2"]
        losses["F"] = feature_loss(found, wanted)
    if args.w3:
        D.requires_grad_(False)              # it judges here, and learned above
        with autocast():
            logits = D(torch.cat([x, y_hat], dim=1))
        losses["GAN"] = non_saturating(logits, True)                    # Eq. (7), N's side
    if args.w6:
        losses["tv"] = tv_loss(y_hat)
    if seg is not None:
        losses["seg"] = segmentation_loss(seg, y_seg)
        losses["segAtt"] = attention_loss(seg, y_hat, y_seg, y)
    m.opt_N.zero_grad(set_to_none=True)
    total_loss(losses, args).backward()
    D.requires_grad_(True)
    m.opt_N.step()
    return {name: loss.detach() for name, loss in losses.items()}


# =============================================================================================
# 6. Training loop
# =============================================================================================


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("sketches", args.size)

    return common.find_data(args.data, LAYOUT, KNOWN, draw_toy)


def train(args):
    run = Run("segin", args)
    root = data_folder(args)
    data = Pairs(root, args)
    total = args.steps or args.epochs * max(1, len(data) // (args.batch * run.world))
    show = test_pictures(root, args, run.device, limit=6)
    m = build(args, run.device)
    if run.world > 1 and run.device.type == "cuda":  # statistics of all processes' pictures
        m.N = nn.SyncBatchNorm.convert_sync_batchnorm(m.N)
    run.resume_or_start({name: getattr(m, name) for name in ("N", "D", "opt_N", "opt_D")})
    if args.data == "toy":
        preset = ", ".join(f"{k} {v}" for k, v in TOY.items())
        print(f"toy preset instead of the paper's settings: {preset}")
    spoilt = SpoiltW(m.match, args)
    for step, (x, y, y_seg, pairs, seeds) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(m, show, args))
        for optimiser, lr in ((m.opt_N, args.lr), (m.opt_D, args.lr_D)):
            optimiser.param_groups[0]["lr"] = lr * common.rate(step, total, args.decay_from)
        W = spoilt(x, y, pairs, seeds)
        run.log(train_step(m, x, y, y_seg, W, args, run.rng()))
    run.save_samples(sample_columns(m, show, args))
    run.finish(truth_scores(m, root, args, run.device) if args.data == "toy" else [])


# =============================================================================================
# 7. Translate and evaluate
# =============================================================================================


@torch.no_grad()
def translate(m, x, r, args):
    """(y_hat, W(x, r), seg or None) for one size of x and r, (B, 3, H, W), sides as `multiple`.

    Batch norm uses the statistics gathered in training. N is left in the mode it was in.
    """
    W, training = auxiliary(x, r, m.match), m.N.training
    m.N.eval()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        y_hat, seg = m.N(x, W)
    m.N.train(training)
    return y_hat.float().clamp(-1, 1), W, None if seg is None else seg.float()


def translate_all(m, X, R, args):
    """y_hat and W of (N, 3, H, W) each, one pair at a time: a large test set fits anywhere."""
    found = [translate(m, x[None], r[None], args)[:2] for x, r in zip(X, R, strict=True)]
    return [torch.cat(column) for column in zip(*found, strict=True)]


def test_pictures(root, args, device, limit=None):
    """{'x', 'y', 'r'}: (N, 3, size, size) each, of the split --split.

    Where there is neither test nor val, the training pictures stand in, and a printed line says so.
    limit: that many, evenly spaced. r is another photo of them: on toy data the next one, for which
    the truth is drawn; else half the list away, because neighbours are often alike.
    """
    split = args.split
    if split == "test" and not any((Path(root) / d).is_dir()
                                   for d in ("test", "val", "test_img", "val_img")):
        print(f"{root} has no test pictures: these are training pictures")
        split = "train"
    files = find_pairs(root, split, args.direction)
    away = 1 if args.data == "toy" else max(1, len(files) // 2)
    chosen = range(0, len(files), max(1, len(files) // limit) if limit else 1)[:limit]
    pairs = [load_pair(files[i], args) for i in chosen]
    others = [load_pair(files[(i + away) % len(files)], args)[1] for i in chosen]
    return {"x": torch.stack([p[0] for p in pairs]).to(device),
            "y": torch.stack([p[1] for p in pairs]).to(device), "r": torch.stack(others).to(device)}


def sample_columns(m, show, args):
    """Columns of a sample grid: x, r, W(x, r), the output, its mask; the own photo y to compare."""
    y_hat, W, seg = translate(m, show["x"], show["r"], args)
    columns = {"x": show["x"], "r": show["r"], "W(x, r)": W, "N(x, W)": y_hat}
    if seg is not None:
        columns["N_s(x)"] = seg.expand(-1, 3, -1, -1) * 2 - 1
    return columns | {"own photo y": show["y"]}


def truth_scores(m, root, args, device):
    """Scores against the toy world's true answers, beside the trivial ones'."""
    toy, metrics = common.lab("toy", "--data toy"), common.lab("metrics", "--data toy")
    test = test_pictures(root, args, device)

    def drawn(kind):
        return torch.stack([common.to_tensor(common.open_rgb(f))
                            for f in common.list_pictures(root / f"{args.split}_{kind}")])

    truth, part = drawn("truth"), ((drawn("part")[:, 0] + 1) * 127.5).round()
    x, y, r, truth = (t.to(device) for t in (test["x"], test["y"], test["r"], truth))
    y_hat, W = translate_all(m, x, r, args)
    scores = toy.sketch_scores(*(t.cpu() for t in (x, y_hat, truth, part, r, W)))
    far = functools.partial(metrics.feature_distance, scoring_vgg(args, device))
    scores.append({"name": "distance to the truth in VGG features", "better": "lower",
                   "value": far(y_hat, truth), "trivial": {"W itself": far(W, truth)}})
    again, W_own = translate_all(m, x, y, args)
    scores.append({"name": "own photo as reference: picture error", "better": "lower",
                   "value": float((again - y).abs().mean() * 127.5),
                   "trivial": {"W itself": float((W_own - y).abs().mean() * 127.5)}})
    other, _ = translate_all(m, x, r.roll(1, dims=0), args)
    scores.append({"name": "diversity: distance between outputs for two references",
                   "better": "higher", "value": far(y_hat, other),
                   "trivial": {"the references": far(r, r.roll(1, dims=0)), "one answer": 0.0}})
    return scores


def scoring_vgg(args, device):
    """VGG-19 of --vgg with the five layers that LPIPS reads (its own are one convolution on)."""
    return common.VGG([f"relu{i}_1" for i in range(1, 6)], args.vgg).to(device)


def load_networks(args, device):
    """N from --weights (a checkpoint of this script) and the matcher."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script")
    state = common.load_checkpoint(args.weights, "segin")
    N = Translator(args.ngf, args.downs, args.non_local, args.multitask)
    common.load_parts({"N": N}, state["parts"], args.weights)
    return SimpleNamespace(N=N.to(device).eval(), match=SemanticMatch(args).to(device))


def translate_files(args):
    """Translate --translate, a picture or a folder, by --exemplar; one folder per reference."""
    if args.exemplar is None:
        raise UserError("--exemplar FILE is needed: the reference photo, or a folder of them")
    device = common.pick_device(args.device)
    m, references = load_networks(args, device), common.list_pictures(args.exemplar)
    for file in references:
        r = common.to_tensor(common.open_rgb(file))[None].to(device)

        def net(x, r=r):  # WHY resized: in training, too, both were squeezed into one square
            r = F.interpolate(r, x.shape[2:], mode="bicubic", antialias=True).clamp(-1, 1)
            return translate(m, x, r, args)[0]

        out = Path(args.out or "translated")
        common.translate_files(
            args.translate, out if len(references) == 1 else out / file.stem,
            lambda x, net=net: common.same_size(net, x.to(device), multiple(args)))


def perceptual(args, device):
    """distance(a, b) -> float for --evaluate; `UserError` if AlexNet's weights cannot be had."""
    metrics = common.lab("metrics", "--evaluate")
    if args.lpips == "vgg":
        return functools.partial(metrics.feature_distance, scoring_vgg(args, device))
    return metrics.lpips(
        device, "--lpips vgg measures with --vgg's features, not comparable with Tab. I")


def evaluate(args):
    """Tab. I: FID, and LPIPS of outputs among themselves, to their reference, to the photo."""
    device = common.pick_device(args.device)
    m, root = load_networks(args, device), data_folder(args)
    scores = truth_scores(m, root, args, device) if args.data == "toy" else []
    if args.data != "toy" or args.fid_weights:
        scores += table_one(m, test_pictures(root, args, "cpu"), args, device)
    common.print_scores(scores)


def table_one(m, test, args, device, inputs=100, samples=20, ref_inputs=200, references=10):
    """The four columns of Tab. I, as scores. References are other test photos, spread evenly.

    Diversity: 19 pairs of outputs, each for the next of 20 references, for 100 inputs. LPIPS(ref):
    200 inputs with 10 references each. LPIPS(gt): each photo as its own reference. A smaller test
    set gives fewer.
    """
    n, distance = len(test["x"]), perceptual(args, device)
    if n < 3:
        raise UserError("--evaluate: at least three test pairs are needed")

    def mean(values):
        return sum(values) / len(values)

    def out(i, photo):
        return translate(m, test["x"][i:i + 1].to(device), photo.to(device), args)[0]

    def others(i, count):
        count = min(count, n - 1)
        return [test["y"][j:j + 1] for j in
                ((i + 1 + k * (n - 1) // count) % n for k in range(count))]

    fakes = [out(i, test["r"][i:i + 1]).cpu() for i in range(n)]
    between, to_reference, to_photo = [], [], []
    for i in range(min(inputs, n)):
        made = [out(i, r) for r in others(i, samples)]
        between += [distance(a, b) for a, b in zip(made, made[1:], strict=False)]
    for i in range(min(ref_inputs, n)):
        to_reference += [distance(out(i, r), r.to(device)) for r in others(i, references)]
    for i in range(n):
        y = test["y"][i:i + 1]
        to_photo.append(distance(out(i, y), y.to(device)))
    name = "LPIPS" if args.lpips == "alex" else f"VGG distance ({args.vgg})"
    fid = common.lab("metrics", "--evaluate").fid(
        fakes, test["y"].split(1), device, args.fid_weights)
    return [{"name": f"FID ({n} outputs, {n} photos, 299x299)", "value": fid, "better": "lower"},
            {"name": f"{name}, diversity ({len(between)} pairs)", "value": mean(between),
             "better": "higher"},
            {"name": f"{name} (ref) ({len(to_reference)} pairs)", "value": mean(to_reference),
             "better": "lower"},
            {"name": f"{name} (gt) ({n} pairs)", "value": mean(to_photo), "better": "lower"}]


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
