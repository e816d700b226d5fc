"""pix2pixSC: pictures from label maps in the style of an exemplar, learned from clips.

G paints label map x in the style of picture I. The true answer is rarely known: no training set
shows every layout in every style. But frames of one clip share a style, and frames of two clips
do not. So a second discriminator learns from real pairs whether two pictures are of one style, and
G must convince it; and the real picture z of label map x is a target whose weight adapts: down to
the pixels where z has I's style, its deep features only where it has not.

M. Wang, G.-Y. Yang, R. Li, R.-Z. Liang, S.-H. Zhang, P. M. Hall, S.-M. Hu, "Example-Guided
Style-Consistent Image Synthesis from Semantic Labeling", CVPR 2019 (arXiv 1906.01314).

SYMBOLS      paper              here           shape
             x = F(z), F(I)     x, F_I         (B, L, H, W) in [0, 1], after `encode`
             z                  z              (B, 3, H, W) in [-1, 1], real picture of x
             I                  I              (B, 3, H, W), the exemplar
             G(x, I, F(I))      y_hat          (B, 3, H, W)
             (y_1^S, y_2^S)     (y_S, I)       real pair of one style
             (y_1^N, y_2^N)     (y_N, I)       real pair of two styles
             D_R, D_SC          D_R, D_SC      -> (B, 1, 35, 35) at 256x256
             L^(i)              V              VGG-19's relu1_1 ... relu5_1
             w_i, 1/M_i         w, deep        (B, 5)

OBJECTIVE    all logarithms are least squares in practice (Sec. 4.1)
             Eq. (3)  sum_i 1/N_i |D_R^i(x, z) - D_R^i(x, G)|_1; of the baseline, Eq. (1), weight 0
             Eq. (4)  L_StdAdv = E log D_R(x, z) + E log(1 - D_R(x, G(x, I, F(I)))); Eq. (2) with I
             Eq. (5)  L_SCAdv = E log D_SC(y_1^S, y_2^S) + E log(1 - D_SC(y_1^N, y_2^N))
                                + E log(1 - D_SC(I, G(x, I, F(I))))
             Eq. (6)  L_SC = sum_i w_i |L^(i)(z) - L^(i)(G(x, I, F(I)))|_1
             Eq. (7)  L = L_StdAdv + lambda_1 L_SCAdv + lambda_2 L_SC
             Eq. (8)  G* = arg min_G max_(D_R, D_SC) L

CHOICES      where the paper is silent, or differs from its authors' released code:
             Norms of Eq. (6) are means in the code, and its 1/32, 1/16, 1/8, 1/4, 1 are exactly
             M_5/M_i: the text's 1/M_i up to one factor. The code uses M_5/M_i always, plus 2 where
             z and I are consistent (here the default); the text's 1 or 1/M_i is --w paper.
             "35x35 PatchGAN" is the size of D's output: three stride-2 layers, padding 2 (code).
             First phase: L_SCAdv is off for G, while D_SC already learns (code).
             All three pairs of D_SC share the exemplar, which comes second; losses of both
             discriminators are halved; G sees them before their update (code).
             A consistent frame is within 10 listed frames (text); the code's window is 300.
             z and I are consistent in 0.3 of the samples (code). Inconsistent: another clip, or
             another group of --groups; the authors looked at each pair.
             The last layer is convolution and tanh (code), not ReLU.
             G's first layer is normalised: a shift of all of I by one colour is invisible to it,
             unless something is the same in every style (the toy clips have black bars).

USAGE        python pix2pixsc.py                                  # toy world, a score at the end
             python pix2pixsc.py --data mydata [--groups FILE]    # {train,test}_{img,label}
             python pix2pixsc.py --translate labels.png --exemplar I.jpg --exemplar-label I.png
                                 --weights runs/pix2pixsc-mydata/last.pt
             Pictures lie in train_img/CLIP/FRAME.jpg or train_img/CLIP_FRAME.jpg, their label maps
             under the same names in train_label. --groups: lines "CLIP GROUP" or "PICTURE GROUP",
             or BDD100K's label file. Faces: --label-kind landmarks, and train_label/CLIP/FRAME.txt
             with a line "width height" and 68 lines "x y", from any detector.
EXPECT       python pix2pixsc.py: about 6 minutes on a busy CPU core; style error about 22 (copying
             the exemplar 53, mean picture 51). Per-pixel accuracy of real pictures 0.94, of the
             mean picture 0.68.
"""

# ruff: noqa: E741 (I is the paper's name for the exemplar)
import argparse
import functools
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

import common
from common import VGG, InstanceNorm, PatchGAN, Run, UserError, full, shuffled

LAYOUT = ("train_img/ train_label/ (and test_img/ test_label/) with CLIP/FRAME or CLIP_FRAME "
          "pictures and label maps of the same names")
KNOWN = {}  # the paper's videos are to be had from their owners only

# =============================================================================================
# 1. Configuration
# =============================================================================================

# Weight of L_SCAdv from an iteration on, first iteration of the decay, last one; in thousands.
SCHEDULES = {
    "paper": ({250: 1.0}, 500, 1000),  # App. C
    "face": ({500: 0.1, 550: 0.3, 600: 0.5, 700: 1.0}, 1500, 1700),  # the authors' three scripts
    "pose": ({600: 0.1, 650: 0.5, 700: 1.0}, 1100, 1300),
    "scene": ({0: 1.0}, 200, 400),
}
ABLATIONS = {  # Tab. 4
    "none": {},
    "L_SC": {"lambda_2": 0.0},
    "L_SCAdv": {"lambda_1": 0.0},
    "adaptive": {"adaptive": False},
}
TOY = {  # random VGG features are alike and weak: two layers, ten times the weight
    "size": 64, "batch": 2, "steps": 1500, "lr": 1e-3, "ngf": 16, "ndf": 16, "blocks": 6,
    "downs": 2, "vgg": "random", "vgg_layers": 2, "lambda_2": 100.0, "same_style": 0.7,
    "workers": 0, "sample_every": 500}
PARSER_STEPS = 300  # updates of the network that parses pictures for Tab. 6


def get_args(argv=None):
    """Flags in layers: the paper's defaults < --ablation < toy preset < checkpoint < command."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--size", type=int, default=256, help="width of a training picture (Sec. 4.1)")
    add("--height", type=int, default=None, help="its height (that of the first picture's shape)")
    add("--batch", type=int, default=1, help="samples per step and process (Sec. 4.1)")
    add("--steps", type=int, default=None, help="updates in all (App. C: 1,000,000)")
    add("--schedule", choices=list(SCHEDULES), default="paper",
        help="phases of App. C, stretched over --steps; or those of the authors' three scripts")
    add("--lr", type=float, default=2e-4, help="Adam's rate (Sec. 4.1)")
    add("--beta1", type=float, default=0.5, help="Adam's first decay (code)")
    add("--beta2", type=float, default=0.999, help="Adam's second decay (code)")
    add("--ngf", type=int, default=64, help="width of G (App. B.1)")
    add("--ndf", type=int, default=64, help="width of D_R and D_SC (App. B.2)")
    add("--blocks", type=int, default=9, help="residual blocks of G (App. B.1)")
    add("--downs", type=int, default=4, help="stride-2 layers of G (App. B.1)")
    add("--lambda-1", type=float, default=10.0, help="weight of L_SCAdv (Sec. 4.1)")
    add("--lambda-2", type=float, default=10.0, help="weight of L_SC (Sec. 4.1)")
    add("--lambda-FM", type=float, default=0.0, help="of Eq. (3), which only pix2pixHD has: 10")
    add("--w", choices=["release", "paper"], default="release", help="weights of Eq. (6): CHOICES")
    add("--adaptive", action=switch, default=True, help="Eq. (6): off = consistent weights always")
    add("--ablation", choices=list(ABLATIONS), default="none", help="Tab. 4: what to leave out")
    add("--vgg", default="imagenet", help="VGG-19 weights: imagenet, random, or a file")
    add("--vgg-layers", type=int, choices=range(1, 6), default=5, metavar="N",
        help="the N of Eq. (6): how many of relu1_1, relu2_1, ..., relu5_1 (code: 5)")
    add("--vgg-resize", action=switch, default=False,
        help="resize pictures lower than 224 to 224x224 before VGG (code)")
    add("--label-kind", choices=["ids", "picture", "landmarks"], default="ids",
        help="F(.): grey or palette maps of class ids, drawings, or text files of 68 landmarks")
    add("--labels", type=int, default=None,
        help="ids: classes (counted if not given); 255 always is the last one")
    add("--unlabelled", type=int, default=None, help="ids: this one does not count in evaluation")
    add("--T", type=int, default=10, help="frames of a clip within this are consistent (Sec. 3.3)")
    add("--groups", default=None, metavar="FILE",
        help="style groups: lines 'CLIP GROUP' or 'PICTURE GROUP', or BDD100K's JSON (Tab. 7)")
    add("--same-style", type=float, default=0.3, help="share of samples whose z has I's style")
    add("--exemplar", default=None, metavar="PATH", help="with --translate: the picture I")
    add("--exemplar-label", default=None, metavar="PATH", help="with --translate: F(I)")
    add("--predicted", default=None, metavar="DIR",
        help="with --evaluate: F(.) of the written pictures, found by a detector of yours")
    add("--fid-weights", default=None, metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        return (TOY if args.data == "toy" else {}) | ABLATIONS.get(args.ablation, {})

    args = common.parse_flags(p, argv, "pix2pixsc", presets, run_name, channels_last=False)
    least = 2**args.downs
    for name in ("size", "height"):
        value = getattr(args, name)
        if value is not None and (value < 2 * least or value % least):
            raise UserError(f"--{name} {value}: must be a multiple of {least}, at least "
                            f"{2 * least}")
    if not 0 <= args.same_style <= 1:
        raise UserError(f"--same-style {args.same_style}: must be between 0 and 1")
    if args.labels is not None and not 1 <= args.labels <= 256:
        raise UserError(f"--labels {args.labels}: must be between 1 and 256")
    if args.T < 1:
        raise UserError(f"--T {args.T}: must be at least 1")
    return args


def run_name(args):
    return f"pix2pixsc-{Path(args.data).name}"


# =============================================================================================
# 2. Networks
# =============================================================================================


# same as cut.py: ResnetBlock
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


class Generator(nn.Module):
    """App. B.1: c7s1-64, d128, d256, d512, d1024, R1024 x 9, u512, u256, u128, u64, c7s1-3.

    x, F_I (B, L, H, W), I (B, 3, H, W), H and W multiples of 16 -> y_hat (B, 3, H, W) in [-1, 1].
    182.7 M parameters for 35 labels. All three inputs enter at the first layer, concatenated:
    there is no style encoder, and F_I tells what is where in I.
    """

    def __init__(self, labels, ngf=64, downs=4, blocks=9):
        super().__init__()
        self.multiple = 2**downs
        widths = [ngf * 2**i for i in range(downs + 1)]                     # 64, 128, ..., 1024

        def relu(channels):
            return [InstanceNorm(channels), nn.ReLU(inplace=True)]

        layers = [nn.ReflectionPad2d(3), nn.Conv2d(2 * labels + 3, ngf, 7), *relu(ngf)]
        for a, b in zip(widths, widths[1:], strict=False):                  # (B, 1024, H/16, W/16)
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), *relu(b)]   # CHOICE (code): zeros
        layers += [ResnetBlock(widths[-1]) for _ in range(blocks)]
        for b, a in zip(widths[::-1], widths[-2::-1], strict=False):        # (B, 64, H, W)
            layers += [nn.ConvTranspose2d(b, a, 3, stride=2, padding=1, output_padding=1), *relu(a)]
        self.layers = nn.Sequential(
            *layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())

    def forward(self, x, F_I, I):
        return self.layers(torch.cat([x, F_I, I], dim=1))


def label_channels(args):
    """L: how many channels x and F(I) have."""
    return {"ids": args.labels, "picture": 3, "landmarks": 1 + len(FACE_CURVES)}[args.label_kind]


def perceptual(args, layers=5):
    """L^(1) ... L^(layers) of Eq. (6). CHOICE (code): VGG is fed [-1, 1], not ImageNet's range."""
    return VGG([f"relu{i + 1}_1" for i in range(layers)], args.vgg, False, ceil_mode=True)


def build(args, device):
    """G, D_R, D_SC, their Adams, and the frozen VGG-19 (None if nothing reads it)."""
    torch.manual_seed(args.seed)
    L = label_channels(args)
    G = Generator(L, args.ngf, args.downs, args.blocks)
    D_R = PatchGAN(L + 3, args.ndf, padding=2)  # App. B.2: C64-C128-C256-C512, and one more
    D_SC = PatchGAN(3 + 3, args.ndf, padding=2)  # convolution; 70x70 pixels each, 35x35 logits
    V = perceptual(args, args.vgg_layers) if args.lambda_2 > 0 else None
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    for net in (G, D_R, D_SC):
        common.init_weights(net, "normal", 0.02).to(device, memory_format=layout)  # App. C
    if V is not None:
        V.to(device, memory_format=layout)
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, args.beta2),
                             fused=device.type in ("cuda", "cpu"))
    m = SimpleNamespace(G=G, D_R=D_R, D_SC=D_SC, V=V, opt_G=adam(G.parameters()),
                        opt_D_R=adam(D_R.parameters()), opt_D_SC=adam(D_SC.parameters()))
    if args.compile:  # WHY not D: compiled code cannot go backwards twice, as `train_step` does
        G.forward = torch.compile(G.forward)
        if V is not None:
            V.forward = torch.compile(V.forward)
    return m


# =============================================================================================
# 3. Losses
# =============================================================================================


def lsgan(logits, target):  # same as cyclegan.py: lsgan
    """In place of a log of Eq. (4), (5) (Sec. 4.1): E (D(.) - target)^2; 1 is yes, 0 is no."""
    return (full(logits) - target).square().mean()


def style_consistency(consistent, inconsistent, fake):
    """Eq. (5), D_SC's side, from its logits of (y_S, I), (y_N, I) and (y_hat, I).

    One kind of pair is to be recognised, two are to be refused: real pictures in two styles, and
    a painted one however well its style fits. CHOICE (code): half of the sum.
    """
    return 0.5 * (lsgan(consistent, 1.0)                                    # Eq. (5), first term
                  + lsgan(inconsistent, 0.0)                                # Eq. (5), second term
                  + lsgan(fake, 0.0))                                       # Eq. (5), third term


def semantic_weights(features, consistent, args):
    """w_i of Eq. (6) for each sample, (B, layers): decided by whether (z, I) are consistent.

    features: [(B, C_i, H_i, W_i)], shallow to deep; consistent: (B) booleans. With --w paper 1 or
    M_N/M_i, where M_i is the number of elements of layer i and N the deepest (the norms are means,
    so 1/M_i needs the factor M_N to have a meaning); with --w release M_N/M_i, plus 2 or nothing.
    """
    M = torch.tensor([f[0].numel() for f in features], dtype=torch.float32)
    deep = (M[-1] / M).to(consistent.device)              # 1/32, 1/16, 1/8, 1/4, 1
    same = (consistent | (not args.adaptive)).float()[:, None]
    return same + (1 - same) * deep if args.w == "paper" else deep + 2 * same


def adaptive_semantic(fake, real, consistent, args):
    """Eq. (6): w-weighted L1 distances of VGG features, summed over layers, mean over samples.

    fake, real: {name: (B, C_i, H_i, W_i)} of y_hat and of z.
    """
    fake, real = list(fake.values()), list(real.values())
    distances = torch.stack([(full(a) - full(b)).abs().mean(dim=(1, 2, 3))
                             for a, b in zip(fake, real, strict=True)], dim=1)      # (B, layers)
    w = semantic_weights(fake, consistent, args)
    return (w * distances).sum(dim=1).mean()                                # Eq. (6)


def feature_matching(fake, real):
    """Eq. (3): the L1 distance of D's activations, a mean over each layer; real is fixed."""
    return sum((full(a) - full(b).detach()).abs().mean()
               for a, b in zip(fake, real, strict=True))                    # Eq. (3)


# =============================================================================================
# 4. Data
# =============================================================================================


class Frame(NamedTuple):
    name: str  # CLIP/FRAME or CLIP_FRAME
    image: Path
    label: Path
    clip: str
    number: int  # place in its clip
    group: str | None = None


def find_frames(root, split, args):
    """The Frames of root/{split}_img, clip by clip, in their order in time.

    A clip is a folder (train_img/CLIP/FRAME.png) or, where pictures lie in one folder, what their
    names have before the last '_' (train_img/CLIP_FRAME.png). Raises `UserError`.
    """
    folders = [Path(root) / f"{split}_{kind}" for kind in ("img", "label")]
    if missing := [str(f) for f in folders if not f.is_dir()]:
        raise UserError(f"{root}: found no folder {' and no '.join(missing)}; expected {LAYOUT}")

    def stem(f, folder):
        return f.relative_to(folder).with_suffix("").as_posix()

    suffixes = {".txt"} if args.label_kind == "landmarks" else common.SUFFIXES
    labels = {stem(f, folders[1]): f for f in sorted(folders[1].rglob("*"))
              if f.suffix.lower() in suffixes}
    images = {stem(f, folders[0]): f for f in folders[0].rglob("*")
              if f.suffix.lower() in common.SUFFIXES}
    if not images:
        raise UserError(f"{folders[0]}: no pictures in this folder; expected {LAYOUT}")
    clips = {}
    for name in sorted(images):
        if name not in labels:
            raise UserError(f"{images[name]}: has no label file {folders[1] / name}"
                            f"{'.txt' if args.label_kind == 'landmarks' else '.png'}")
        clips.setdefault(re.split(r"/(?=[^/]*$)|_(?=[^/_]*$)", name)[0], []).append(name)
    frames = []
    for clip in sorted(clips):
        clips[clip].sort(key=lambda n: [(t, int(d or 0)) for t, d in re.findall(r"(\D*)(\d*)", n)])
        frames += [Frame(n, images[n], labels[n], clip, i) for i, n in enumerate(clips[clip])]
    return with_groups(frames, args.groups) if args.groups else frames


BDD_WEATHER = ("foggy", "overcast", "rainy", "snowy", "clear", "partly cloudy")
BDD_GROUPS = {"night": {weather: "1" for weather in (*BDD_WEATHER, "undefined")},  # Tab. 7
              "dawn/dusk": dict(zip(BDD_WEATHER, "2 12 4 5 6 8".split(), strict=True)),
              "daytime": dict(zip(BDD_WEATHER, "7 3 9 10 11 13".split(), strict=True))}


def with_groups(frames, path):
    """Frames with their style groups from a file; those of BDD100K that have none are left out.

    A text file must name the clip or the picture of every frame. BDD100K's JSON is a list of
    {"name", "attributes": {"weather", "timeofday"}}.
    """
    try:
        text = Path(path).read_text()
        if bdd := path.endswith(".json"):
            rows = [(r["name"], r["attributes"]) for r in json.loads(text)]
            groups = {name: BDD_GROUPS.get(a["timeofday"], {}).get(a["weather"])
                      for name, a in rows}
        else:
            lines = [line.split("#")[0] for line in text.splitlines()]
            groups = dict(re.split(r"[\s,;]+", line.strip()) for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--groups {path}: cannot be read ({error})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--groups {path}: expected lines 'CLIP GROUP' or 'PICTURE GROUP', or "
                        "BDD100K's label file") from None
    groups = {re.sub(r"\.(png|jpe?g)$", "", name): group for name, group in groups.items()}
    found = [f._replace(group=groups.get(f.name) or groups.get(f.clip)) for f in frames]
    if bad := [f for f in found if f.group is None and not bdd]:
        raise UserError(f"--groups {path}: names neither {bad[0].name} nor {bad[0].clip}")
    return [f for f in found if f.group is not None]


class Pairs:
    """Sec. 3.3: which frames share a style, and random pairs that do or do not."""

    def __init__(self, frames, T):
        self.frames, self.T, self.members = frames, T, {}
        for i, f in enumerate(frames):
            self.members.setdefault(f.group or f.clip, []).append(i)

    def consistent(self, i, j):
        """True: one style. False: two. None: far apart in one clip, so nobody knows.

        A style group says it all; without groups, frames of one clip within T are consistent, and
        frames of different clips are not.
        """
        a, b = self.frames[i], self.frames[j]
        if a.group is not None:
            return a.group == b.group
        return (abs(a.number - b.number) <= self.T or None) if a.clip == b.clip else False

    def draw(self, rng, i, same):
        """A random frame that is (same) or is not consistent with frame i, and not i itself.

        A frame that is alone in its style is its own companion.
        """
        f = self.frames[i]
        near = self.members[f.group or f.clip]
        if f.group is None:  # a clip's frames stand in a row
            near = near[max(0, f.number - self.T):f.number + self.T + 1]
        if same and len(near) == 1:
            return i
        while True:
            j = rng.choice(near) if same else rng.randrange(len(self.frames))
            if j != i and self.consistent(i, j) is same:
                return j


class Clips(torch.utils.data.Dataset):
    """`self[n]`: the n-th training sample (x, z, F_I, I, y_S, y_N, consistent).

    Label maps are (C, H, W) bytes, see `encode`; pictures (3, H, W) in [-1, 1]; consistent says
    whether z has I's style. All are mirrored, or none. A sample depends on (seed, n) alone.
    """

    def __init__(self, frames, args):
        self.frames, self.args, self.pairs = frames, args, Pairs(frames, args.T)
        self.size = picture_size(frames, args)
        if len(self.pairs.members) < 2:
            raise UserError(f"--data {args.data}: all pictures are of one style "
                            f"({next(iter(self.pairs.members))}); two clips or groups are needed")
        if len(self.pairs.members) == len(frames):
            raise UserError(f"--data {args.data}: no two pictures are of one style; name them "
                            "CLIP_FRAME or CLIP/FRAME, or give --groups FILE")

    def __getitem__(self, n):
        rng = random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.frames))
        z = shuffled(len(self.frames), common.mix(self.args.seed, "epoch", epoch))[i]
        same = rng.random() < self.args.same_style
        I = self.pairs.draw(rng, z, same)
        y_S, y_N = self.pairs.draw(rng, I, True), self.pairs.draw(rng, I, False)
        x, F_I = (read_label(self.frames[i].label, self.args, self.size) for i in (z, I))
        z, I, y_S, y_N = (read_image(self.frames[i].image, self.size)
                          for i in (z, I, y_S, y_N))
        sample = [x, z, F_I, I, y_S, y_N]
        if rng.random() < 0.5:
            sample = [t.flip(2) for t in sample]
        return *sample, torch.tensor(same)


def picture_size(frames, args):
    """(W, H) of all pictures: --size and --height, or the height that the first picture's shape
    asks for, rounded to G's multiple."""
    w, h = common.open_rgb(frames[0].image).size
    least = 2**args.downs
    return args.size, args.height or max(2, round(args.size * h / w / least)) * least


def read_image(path, size):
    """(3, H, W) in [-1, 1] of a picture file, resized to size (W, H)."""
    return common.to_tensor(common.open_rgb(path).resize(size, Image.BICUBIC))


open_ids = functools.partial(common.open_ids, otherwise="; colours need --label-kind picture")


def read_label(path, args, size=None):
    """A label file as bytes (C, H, W), resized to size (W, H); at its own size if not given."""
    if args.label_kind == "landmarks":
        points, own = read_landmarks(path)
        return torch.from_numpy(face_map(points * (np.array(size or own) / own), size or own))
    if args.label_kind == "picture":
        im = common.open_rgb(path)
        im = im.resize(size, Image.BILINEAR) if size else im
        return torch.from_numpy(np.array(im)).permute(2, 0, 1)
    im = open_ids(path)
    ids = np.asarray(im.resize(size, Image.NEAREST) if size else im).astype(np.int64)
    ids = np.where(ids == 255, args.labels - 1, ids)
    if ids.min() < 0 or ids.max() >= args.labels:
        raise UserError(f"{path}: holds the ids {np.unique(ids).tolist()}; --labels {args.labels} "
                        f"allows 0 to {args.labels - 1}, and 255")
    return torch.from_numpy(ids.astype(np.uint8))[None]


def check_labels(frames, args):
    """Before training: sets args.labels if it was not given, and finds ids out of range."""
    if args.label_kind == "ids":
        found = {f.label: set(np.unique(open_ids(f.label)).tolist()) for f in frames}
        ids = set.union(*found.values())
        if args.labels is None:
            args.labels = max(ids - {255}, default=0) + 1 + (255 in ids)
            print(f"--labels {args.labels}: the largest id plus one"
                  + (", and one for 255" if 255 in ids else ""))
        for path, ids in found.items():
            if wrong := sorted(v for v in ids - {255} if not 0 <= v < min(args.labels, 256)):
                raise UserError(f"{path}: holds the ids {wrong}; --labels {args.labels} allows 0 "
                                f"to {args.labels - 1}, and 255")


def encode(label, args):
    """F(.) as the networks see it: bytes (B, C, H, W) -> (B, L, H, W) in [0, 1].

    F is a property of the data set: class ids become one channel each, drawings stay as they are.
    """
    if args.label_kind == "ids":
        return F.one_hot(label[:, 0].long(), args.labels).permute(0, 3, 1, 2).float()
    return label.float() / 255


# F(.) of faces: 68 landmarks (dlib's order), joined to 14 curves; 68 to 82 are the mirrored jaw.
FACE_CURVES = [[*range(17)], [16, *range(82, 67, -1), 0], [*range(17, 22)], [*range(22, 27)],
               [*range(27, 31)], [*range(31, 36)], [36, 37, 38, 39], [39, 40, 41, 36],
               [42, 43, 44, 45], [45, 46, 47, 42], [*range(48, 55)], [54, 55, 56, 57, 58, 59, 48],
               [60, 61, 62, 63, 64], [64, 65, 66, 67, 60]]


def read_landmarks(path):
    """A text file, 'W H' and 68 lines 'x y' in pixels -> points (68, 2), size (W, H)."""
    try:
        table = np.loadtxt(path)
        if table.shape != (69, 2) or table[0].min() < 1 or not np.isfinite(table).all():
            raise ValueError(f"a table of {table.shape}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a line 'width height' of the picture and 68 lines 'x y' "
                        f"({error})") from None
    return table[1:], tuple(int(v) for v in table[0])


def face_map(points, size):
    """Landmarks (68, 2) -> bytes (15, H, W): the sketch, and the distance to each of its curves.

    CHOICE (code): the upper outline of the face is the jaw, mirrored in the line between its ends
    (two thirds as high); distances are L1, over 3. Its curves are splines, here lines.
    """
    jaw, axis = points[:17], points[16] - points[0]
    across = jaw - points[0]
    across = across - np.outer(across @ axis, axis) / max(axis @ axis, 1e-6)
    points = np.concatenate([points, (jaw - 5 / 3 * across)[1:16]])
    sketch, maps = Image.new("L", size), []
    for curve in FACE_CURVES:
        line = Image.new("L", size)
        for sheet in (sketch, line):
            ImageDraw.Draw(sheet).line([tuple(points[i]) for i in curve], 255, 1)
        distance = np.where(np.asarray(line) > 0, 0.0, 1e6)
        for axis in (0, 1):  # L1 distance: the nearest along one axis, then along the other
            place = np.expand_dims(np.arange(distance.shape[axis]), 1 - axis)
            ahead = np.minimum.accumulate(distance - place, axis) + place
            back = np.flip(np.minimum.accumulate(np.flip(distance + place, axis), axis), axis)
            distance = np.minimum(ahead, back - place)
        maps.append(distance / 3)
    return np.stack([np.asarray(sketch), *maps]).clip(0, 255).astype(np.uint8)


def random_batch(args, device):
    """A batch of noise, shaped and laid out as in training; for measuring a step."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    shape = args.batch, 3, args.height or args.size, args.size

    def picture():
        return torch.rand(shape).mul(2).sub(1).to(device, memory_format=layout)

    def label():
        channels = 1 if args.label_kind == "ids" else label_channels(args)
        top = args.labels if args.label_kind == "ids" else 256
        return torch.randint(0, top, (shape[0], channels, *shape[2:]), dtype=torch.uint8).to(device)

    consistent = (torch.arange(args.batch) % 2 == 0).to(device)
    return [label(), picture(), label(), *(picture() for _ in range(3)), consistent]


# =============================================================================================
# 5. One training step
# =============================================================================================


def train_step(m, x, z, F_I, I, y_S, y_N, consistent, args, rng, style=1.0):
    """One update of D_R, D_SC and G on a batch of `Clips`; returns losses by name.

    style: this phase's factor of lambda_1 (App. C). rng is not used: the step makes no random
    choice.
    """
    G, D_R, D_SC, V, losses, B = m.G, m.D_R, m.D_SC, m.V, {}, len(z)
    autocast = functools.partial(torch.autocast, z.device.type, torch.bfloat16, enabled=args.amp)
    x, F_I = encode(x, args), encode(F_I, args)

    # ---- forward ------------------------------------------------------------------------------
    m.opt_G.zero_grad(set_to_none=True)  # WHY here: D's and VGG's maps take the place of G's grads
    with autocast():
        y_hat = full(G(x, F_I, I))
    # WHY a leaf: no discriminator loss can reach G; each loss of G leaves its gradient here, and
    # its graph is freed before the next one is built. The last part hands the sum on to G.
    fake = y_hat.detach().requires_grad_()

    # ---- D_R: (x, z) towards 1, (x, y_hat) towards 0 --------------------------------------------
    # Each discriminator looks at each picture once; its logits serve G's loss, then its own. No
    # layer mixes pictures, so real and fake share a pass.
    with autocast():
        logits, maps = D_R(torch.cat([torch.cat([x, fake], 1), torch.cat([x, z], 1)]), True)
    losses["StdAdv"] = L_G = lsgan(logits[:B], 1.0)                         # Eq. (4), G's side
    if args.lambda_FM > 0:
        losses["FM"] = feature_matching([f[:B] for f in maps], [f[B:] for f in maps])
        L_G = L_G + args.lambda_FM * losses["FM"]                           # Eq. (1)
    torch.autograd.backward(L_G, inputs=[fake], retain_graph=True)
    losses["D_R"] = 0.5 * (lsgan(logits[:B], 0.0)                           # Eq. (4), D_R's side;
                           + lsgan(logits[B:], 1.0))                        # so reads Eq. (2)
    update(losses["D_R"], D_R, m.opt_D_R)

    # ---- D_SC: (y_S, I) towards 1, (y_N, I) and (y_hat, I) towards 0 ----------------------------
    if args.lambda_1 > 0:
        with autocast():
            logits = D_SC(torch.cat([torch.cat([y, I], 1) for y in (fake, y_S, y_N)]))
        of_fake, of_S, of_N = logits.split(B)
        losses["SCAdv"] = lsgan(of_fake, 1.0)                               # Eq. (5), G's side
        if style > 0:
            torch.autograd.backward(style * args.lambda_1 * losses["SCAdv"], inputs=[fake],
                                    retain_graph=True)
        losses["D_SC"] = style_consistency(of_S, of_N, of_fake)             # Eq. (5), D_SC's side
        update(losses["D_SC"], D_SC, m.opt_D_SC)

    # ---- VGG: y_hat towards z, as far as their styles agree -------------------------------------
    if args.lambda_2 > 0:
        def scaled(y):
            small = args.vgg_resize and y.shape[2] < 224
            return F.interpolate(y, (224, 224), mode="bilinear") if small else y

        with autocast():
            losses["SC"] = adaptive_semantic(V(scaled(fake)), V(scaled(z)), consistent, args)
        torch.autograd.backward(args.lambda_2 * losses["SC"], inputs=[fake])

    # ---- G --------------------------------------------------------------------------------------
    y_hat.backward(fake.grad)                                               # Eq. (7)
    m.opt_G.step()                                                          # Eq. (8)
    return {name: loss.detach() for name, loss in losses.items()}


def update(loss, net, optimiser):
    """One step of a discriminator; only its own weights get a gradient."""
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss, inputs=list(net.parameters()))
    optimiser.step()                                                        # Eq. (8)


# =============================================================================================
# 6. Training loop
# =============================================================================================


def phase(step, total, schedule):
    """(factor of L_SCAdv, factor of the learning rate) at a step of a run (App. C).

    The paper's three phases: L_SCAdv off; on; on with a rate that falls linearly to zero.
    """
    starts, decay, end = SCHEDULES[schedule]
    at = step * end / total  # in thousands of the full run's iterations
    style = next((starts[s] for s in sorted(starts, reverse=True) if at >= s), 0.0)
    return style, min(1.0, (end - at) / (end - decay))


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("clips", args.size)

    return common.find_data(args.data, LAYOUT, KNOWN, draw_toy)


def train(args):
    root = data_folder(args)
    frames = find_frames(root, "train", args)
    check_labels(frames, args)
    run = Run("pix2pixsc", args)
    data = Clips(frames, args)
    total = args.steps or SCHEDULES[args.schedule][2] * 1000
    show = Tests(root, args, run.device, limit=6)
    m = build(args, run.device)
    run.resume_or_start({name: part for name, part in vars(m).items() if name != "V"})
    if args.data == "toy":
        preset = ", ".join(f"{k} {v}" for k, v in TOY.items())
        print(f"toy preset instead of the paper's settings: {preset}")
    for step, batch in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(show.columns(m.G))
        style, rate = phase(step, total, args.schedule)
        for optimiser in (m.opt_G, m.opt_D_R, m.opt_D_SC):
            optimiser.param_groups[0]["lr"] = args.lr * rate
        run.log(train_step(m, *batch, args, run.rng(), style))
    run.save_samples(show.columns(m.G))
    scores = []
    if args.data == "toy" and run.rank == 0:
        test = Tests(root, args, run.device)
        y_hat = test.translated(m.G)
        scores = truth_scores(test, y_hat, root) + label_scores(test, y_hat, frames)
    run.finish(scores)
    return m.G


# =============================================================================================
# 7. Translate, evaluate, compare
# =============================================================================================


@torch.no_grad()
def translate(G, x, F_I, I, args):
    """G(x, I, F(I)) for encoded x, F_I (B, L, H, W) and I (B, 3, H, W) of any one size."""
    L = x.shape[1]
    at_least_two = 1 if min(x.shape[2:]) > G.multiple else 2  # G's smallest map is padded by 1
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        return common.same_size(lambda padded: G(*padded.split([L, L, 3], dim=1)),
                                torch.cat([x, F_I, I], 1), at_least_two * G.multiple).float()


class Tests:
    """Fixed pairs of the split --split (the training split, and a printed line, if there is no test
    split): each frame's x with an exemplar of another style. limit: that many, evenly spaced."""

    def __init__(self, root, args, device, limit=None):
        split = args.split
        if split == "test" and not (Path(root) / "test_img").is_dir():
            print(f"{root} has no test pictures: these are training pictures")
            split = "train"
        self.args, self.device, self.root = args, device, root
        frames = find_frames(root, split, args)
        pairs, n = Pairs(frames, args.T), len(frames)
        chosen = range(0, n, max(1, n // limit) if limit else 1)[:limit]
        other = len(pairs.members) > 1  # else: another frame, of the one style that there is
        exemplars = [pairs.draw(random.Random(common.mix("exemplar", i)), i, False) if other
                     else (i + n // 2) % n for i in chosen]
        self.pairs = [(frames[i], frames[j]) for i, j in zip(chosen, exemplars, strict=True)]
        self.size = picture_size(frames, args)

    def labels(self):
        """x of all pairs, bytes (N, C, H, W)."""
        return torch.stack([read_label(f.label, self.args, self.size) for f, _ in self.pairs])

    def images(self, which):
        """(N, 3, H, W): the real pictures z of x (which = 0) or the exemplars I (1)."""
        return torch.stack([read_image(pair[which].image, self.size) for pair in self.pairs])

    def translated(self, G):
        """G(x, I, F(I)) of all pairs, (N, 3, H, W), on the CPU."""
        outputs = []
        for x, exemplar in self.pairs:
            maps = (encode(read_label(f.label, self.args, self.size)[None].to(self.device),
                           self.args) for f in (x, exemplar))
            I = read_image(exemplar.image, self.size)[None].to(self.device)
            outputs.append(translate(G, *maps, I, self.args).cpu())
        return torch.cat(outputs)

    def answers(self):
        """The toy world's true answers, (N, 3, H, W)."""
        toy = common.lab("toy", "--data toy")
        return torch.stack([common.to_tensor(toy.clip_answer(
            self.root, x.name, exemplar.name, self.args.split)) for x, exemplar in self.pairs])

    def columns(self, G):
        """Columns of a sample grid; the last one is the truth, or z, which has another style."""
        last = (("true answer", self.answers()) if self.args.data == "toy"
                else ("z of x", self.images(0)))
        return {"x": torch.stack([coloured(x, self.args) for x in self.labels()]),
                "I": self.images(1), "G(x, I, F(I))": self.translated(G), last[0]: last[1]}


def coloured(label, args):
    """A label map for looking at: bytes (C, H, W) -> (3, H, W) in [-1, 1]."""
    if args.label_kind != "ids":
        return label[:3].expand(3, -1, -1) / 127.5 - 1 if len(label) < 15 else (
            1 - label[:1].expand(3, -1, -1) / 127.5)
    i = torch.arange(256).float()[:, None]
    palette = torch.cos(i * 2.4 + torch.tensor([0.0, 2.1, 4.2])) * (1 - 0.3 * (i % 3 == 2).float())
    return palette[label[0].long()].permute(2, 0, 1)


def truth_scores(test, y_hat, root):
    """Style error against the toy world's true answers, beside the trivial answers'."""
    x, y = test.labels()[:, 0], test.answers()

    def error(answer):
        toy = common.lab("toy", "--data toy")
        return toy.clip_style_error(x, answer.expand_as(y), y)

    return [{"name": "style error", "value": error(y_hat), "better": "lower",
             "trivial": {"copy the exemplar": error(test.images(1)),
                         "mean picture": error(test.images(0).mean(0, keepdim=True)),
                         "z, in its own style": error(test.images(0))}}]


def label_scores(test, y_hat, frames):
    """Tab. 6: are the labels x found in y_hat? Beside what is found in other pictures."""
    segmenters, args = common.lab("segmenters", "--evaluate"), test.args

    def sample(n):  # a small segmentation network stands in for the paper's DANet
        f = random.Random(n).choice(frames)
        x, z = read_label(f.label, args, test.size)[0], read_image(f.image, test.size)
        x = counted(x, args)
        return (z, x) if n % 2 else (z.flip(2), x.flip(1))

    net = segmenters.train(sample, args.labels, test.device, PARSER_STEPS, batch=4)
    x, z = test.labels()[:, 0], test.images(0)
    answers = {"": y_hat, "real pictures z": z, "copy the exemplar": test.images(1),
               "mean picture": z.mean(0, keepdim=True).expand_as(z)}
    values = {name: accuracies(segmenters.segmented(net, p, test.device), x, args)
              for name, p in answers.items()}
    return [{"name": name, "value": values[""][name], "better": "higher",
             "trivial": {other: values[other][name] for other in answers if other}}
            for name in values[""]]


def counted(label, args):
    """Label maps of bytes as integers, -1 where --unlabelled says that pixels do not count."""
    label = label.long()
    return label if args.unlabelled is None else label.masked_fill(label == args.unlabelled, -1)


def accuracies(found, truth, args):
    """Tab. 6 from maps of ids (N, H, W): per-pixel and per-class accuracy, mean class IoU."""
    segmenters = common.lab("segmenters", "--evaluate")
    found = segmenters.scores(segmenters.confusion(found, counted(truth, args), args.labels))
    return {"per-pixel accuracy": found["accuracy"], "per-class accuracy": found["class accuracy"],
            "class IoU": found["mIoU"]}


def endpoint_error(found, truth):
    """LEPE of Tab. 2: the mean distance of points (N, 68, 2), in fractions of the picture."""
    return float(np.linalg.norm(np.asarray(found) - np.asarray(truth), axis=-1).mean())


def patch_centres(frame, args, size):
    """{name: (row, column)} of Tab. 5's patches: the eyes, or the middle of each class."""
    if args.label_kind == "landmarks":
        points, own = read_landmarks(frame.label)
        points = points * (np.array(size) / own)
        return {name: tuple(points[first:first + 6].mean(0)[::-1])
                for name, first in (("right eye", 36), ("left eye", 42))}
    if args.label_kind == "picture":
        return {"middle": (size[1] / 2, size[0] / 2)}
    ids, centres = read_label(frame.label, args, size)[0].numpy(), {}
    for i in np.unique(ids):
        places = np.argwhere(ids == i)
        if len(places) >= 0.02 * ids.size:  # the pixel of this class nearest to their mean
            distance = np.abs(places - places.mean(0)).sum(1)
            centres[int(i)] = tuple(places[distance.argmin()])
    return centres


@torch.no_grad()
def patch_distance(test, pictures, V):
    """Tab. 5: mean L1 distance of VGG features between a patch of a picture and of its exemplar.

    The patches are 50 pixels of 256 wide and show the same thing, wherever it stands in each.
    """
    side, distances = max(2, round(test.size[0] * 50 / 256)), []
    for (x, exemplar), y, I in zip(test.pairs, pictures, test.images(1), strict=True):
        ours, theirs = (patch_centres(f, test.args, test.size) for f in (x, exemplar))
        names = [n for n in ours if n in theirs]
        if names:
            a, b = (torch.stack([patch(p, centres[n], side) for n in names]).to(test.device)
                    for p, centres in ((y, ours), (I, theirs)))
            distances += [(f - g).abs().mean() for f, g in
                          zip(V(a).values(), V(b).values(), strict=True)]
    return float(torch.stack(distances).mean()) if distances else float("nan")


def patch(picture, centre, side):
    """The side x side pixels of a picture (3, H, W) around a centre, moved inside if need be."""
    top, left = (int(min(max(0, c - side / 2), n - side))
                 for c, n in zip(centre, picture.shape[1:], strict=True))
    return picture[:, top:top + side, left:left + side]


def load_generator(args, device):
    """G from --weights: our checkpoint (its flags were read by `get_args`) or the authors' file."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script or the authors' file")
    state = common.load_file(args.weights)
    if isinstance(state, dict) and "method" in state:
        G = Generator(label_channels(args), args.ngf, args.downs, args.blocks)
        common.load_parts({"G": G}, state["parts"], args.weights)
    else:
        released = common.lab("released", "--weights with the authors' file")
        G = released.pix2pixsc(state, args.weights, args)
    return G.to(device).eval()


def translate_files(args):
    """Paint --translate, a label map or a folder of them, in the style of --exemplar, to PNG."""
    device = common.pick_device(args.device)
    G = load_generator(args, device)
    for flag in ("exemplar", "exemplar_label"):
        if getattr(args, flag) is None:
            raise UserError(f"--translate needs --{flag.replace('_', '-')} PATH as well")
    source, out = Path(args.translate), Path(args.out or "translated")
    if source.is_dir() and args.label_kind == "landmarks":
        files = sorted(source.glob("*.txt"))
        if not files:
            raise UserError(f"{source}: no landmark files (*.txt) in this folder")
    else:
        files = [source] if args.label_kind == "landmarks" else common.list_pictures(source)
    for f in files:
        x = read_label(f, args)
        size = (x.shape[2], x.shape[1])
        F_I, I = read_label(args.exemplar_label, args, size), read_image(args.exemplar, size)
        target = out / f"{f.stem}.png"
        if target.resolve() in (f.resolve(), Path(args.exemplar).resolve()):
            raise UserError(f"--out {out}: {target} would be overwritten, choose another folder")
        y_hat = translate(G, *(encode(v[None].to(device), args) for v in (x, F_I)),
                          I[None].to(device), args)
        save_picture(y_hat[0], target)
    print(f"{len(files)} translated: {target if len(files) == 1 else out}")


def save_picture(picture, target):
    """Write a picture (3, H, W) in [-1, 1] as PNG, making its folder; `UserError` if it cannot."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        common.to_pil(picture).save(target)
    except OSError as error:
        raise UserError(f"--out {target.parent}: cannot write there ({error})") from None


def evaluate(args):
    """Tabs. 1, 2, 5, 6 on the test pairs; their pictures are written, for detectors of yours."""
    device = common.pick_device(args.device)
    G = load_generator(args, device)
    root = data_folder(args)
    test = Tests(root, args, device)
    y_hat, names = test.translated(G), [f"{i:05d}" for i in range(len(test.pairs))]
    out = Path(args.out or "evaluated")
    for name, y in zip(names, y_hat, strict=True):
        save_picture(y, out / f"{name}.png")
    scores = truth_scores(test, y_hat, root) if args.data == "toy" else []
    if args.label_kind == "ids":
        scores += label_scores(test, y_hat, find_frames(root, "train", args))
    if args.predicted:
        scores += predicted_scores(test, [Path(args.predicted) / name for name in names])
    V = perceptual(args).to(device)
    scores.append({"name": f"VGG distance of patches ({args.vgg})", "better": "lower",
                   "value": patch_distance(test, y_hat, V),
                   "trivial": {"z, in its own style": patch_distance(test, test.images(0), V)}})
    common.print_scores(scores)
    print(f"pictures: {out}")
    if args.data != "toy" or args.fid_weights:
        fid = common.lab("metrics", "--evaluate").fid
        value = fid(y_hat.split(1), test.images(0).split(1), device, args.fid_weights)
        common.print_scores([{"name": f"FID ({len(y_hat)} pictures, 299x299)", "value": value,
                              "better": "lower"}])


def predicted_scores(test, paths):
    """Tab. 2 or 6 from label files that a detector wrote for the translated pictures."""
    args = test.args
    if args.label_kind == "landmarks":
        found, truth = ([p / np.array(own) for p, own in map(read_landmarks, files)] for files in (
            [f.with_suffix(".txt") for f in paths], [x.label for x, _ in test.pairs]))
        return [{"name": "label endpoint error", "value": endpoint_error(found, truth),
                 "better": "lower"}]
    if args.label_kind == "picture":
        raise UserError("--predicted: drawings (--label-kind picture) have no label error")
    found = torch.stack([read_label(f.with_suffix(".png"), args, test.size)[0] for f in paths])
    return [{"name": f"{name}, {args.predicted}", "value": value, "better": "higher"}
            for name, value in accuracies(found, test.labels()[:, 0], args).items()]


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
