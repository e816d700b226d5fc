"""pix2pixSC: pictures from label maps in the style of an exemplar, learned from clips.

G paints label map x in the style of picture I. The true answer is rarely known: no training set
shows every layout in every style. But frames of one clip share a style, and frames of two clips
do not. So a second discriminator learns from real pairs whether two pictures are of one style, and
G must convince it; and the real picture z of label map x is a target whose weight adapts: down to
the pixels where z has I's style, its deep features only where it has not (Fig. 3).

M. Wang, G.-Y. Yang, R. Li, R.-Z. Liang, S.-H. Zhang, P. M. Hall, S.-M. Hu, "Example-Guided
Style-Consistent Image Synthesis from Semantic Labeling", CVPR 2019 (arXiv 1906.01314).

SYMBOLS      paper              here           shape
             x = F(z), F(I)     x, F_I         (B, L, H, W) in [0, 1]
             z; y in Eq. (4)    z              (B, 3, H, W) in [-1, 1], real picture of x
             I                  I              (B, 3, H, W), the exemplar
             G(x, I, F(I))      y_hat          (B, 3, H, W)
             (y_1^S, y_2^S)     (y_S, I)       real pair of one style
             (y_1^N, y_2^N)     (y_N, I)       real pair of two styles
             D_R, D_SC          D_R, D_SC      -> logits (B, 1, 35, 35) at 256x256
             L^(i)              V              VGG's relu1_1 ... relu5_1, (B, C_i, H_i, W_i)
             w_i, 1/M_i         w, inv_M       (B, N), (N)

OBJECTIVE    all logarithms are least squares in practice (Sec. 4.1)
             Eq. (4)  L_StdAdv = E log D_R(x, z) + E log(1 - D_R(x, G(x, I, F(I))))
             Eq. (5)  L_SCAdv = E log D_SC(y_1^S, y_2^S) + E log(1 - D_SC(y_1^N, y_2^N))
                                + E log(1 - D_SC(I, G(x, I, F(I))))
             Eq. (6)  L_SC = sum_i w_i |L^(i)(z) - L^(i)(G(x, I, F(I)))|_1
             Eq. (7)  L = L_StdAdv + lambda_1 L_SCAdv + lambda_2 L_SC
             Eq. (8)  G* = arg min_G max_(D_R, D_SC) L
             Equations 1 to 3 are those of pix2pixHD, a row in lab/rows.

CHOICES      where the text is silent, or differs from what the authors ran (their released code):
             Norms of Eq. (6) are means in the code, and its 1/32, 1/16, 1/8, 1/4, 1 are exactly
             M_5/M_i: the text's 1/M_i up to one factor. The code uses M_5/M_i always, plus 2 where
             z and I are consistent (here the default); the text's 1 or 1/M_i is --w paper.
             "35x35 PatchGAN" is the size of D's output: three stride-2 layers, padding 2 (code).
             First phase: L_SCAdv is off for G, while D_SC already learns (code).
             All three pairs of D_SC share the exemplar, which comes second; losses of both
             discriminators are halved; G is judged by them before their update (code).
             z and I are consistent in 0.3 of the samples (code); App. A takes all exemplars from
             other videos, though w_i = 1 in Sec. 3.2.3 is for those of the same one.
             A consistent frame is within 10 listed frames (text); the code's window is 300.
             Inconsistent: another clip, or another group of --groups; the authors looked at each.
             VGG sees [-1, 1], not ImageNet's range (code); their street views are resized to
             224x224 for it: --vgg-resize. Biases as PyTorch draws them, and a last layer of
             convolution and tanh are the code's.
             G's first layer is normalised: a shift of all of I by one colour is invisible to it,
             unless something is the same in every style (the toy clips have black bars).

USAGE        python pix2pixsc.py                                  # toy world, scores at the end
             python pix2pixsc.py --data mydata [--groups FILE]    # {train,test}_{img,label}
             python pix2pixsc.py --translate labels.png --exemplar I.jpg --exemplar-label I.png
                                 --weights runs/pix2pixsc-mydata/last.pt
EXPECT       python pix2pixsc.py: 6 minutes of one core (seeds 0 to 2, test clips): detail
             correlation 0.39 to 0.40 (best painter 0.38: each label of I as a slope), style error
             22 (9 by noise of the right deviation), picture error 19 to 21 (13). Layouts, coats,
             stripes and the exemplar's light are there, blurred. D_R and D_SC win (0.03, 0.08).
"""

# ruff: noqa: E741 (I is the paper's name for the exemplar)
import argparse
import functools
import json
import random
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw

import common
from common import VGG, InstanceNorm, PatchGAN, Run, UserError, full

# ==== 1. Configuration ========================================================================

LAYOUT = ("train_img/ train_label/ (and test_img/ test_label/) with CLIP/FRAME or CLIP_FRAME "
          "pictures and label maps of the same names")
KNOWN = {}  # the paper's videos are to be had from their owners only
TAPS = [f"relu{i}_1" for i in range(1, 6)]  # L^(1) ... L^(5) of Eq. (6) (code)
# Factor of L_SCAdv from an iteration on, first iteration of the decay, last one; in thousands.
SCHEDULES = {
    "paper": ({250: 1.0}, 500, 1000),  # App. C
    "face": ({500: 0.1, 550: 0.3, 600: 0.5, 700: 1.0}, 1500, 1700),  # the authors' three scripts
    "pose": ({600: 0.1, 650: 0.5, 700: 1.0}, 1100, 1300),
    "scene": ({0: 1.0}, 200, 400),
}
TOY = {
    "size": 64, "batch": 2, "steps": 1500, "lr": 1e-3,   # minutes on a laptop: small and short, ...
    "ngf": 16, "ndf": 16, "blocks": 6, "downs": 2,       # ... so narrower, shallower and faster
    "vgg": "random", "vgg_layers": 2,                    # no download; 1 layer would save a third
    "lambda_2": 100.0, "same_style": 0.7,                # z teaches more often, and more
    "exemplars": 1, "workers": 0, "sample_every": 500}


def get_args(argv=None):
    """Flags in layers: the paper's defaults < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--size", type=int, default=256, help="width of a training picture (Sec. 4.1)")
    add("--height", type=int, help="its height (that of the first picture's shape)")
    add("--batch", type=int, default=1, help="samples per step and process (Sec. 4.1)")
    add("--steps", type=int, help="updates in all (App. C: 1,000,000)")
    add("--schedule", choices=list(SCHEDULES), default="paper",
        help="phases of App. C, stretched over --steps; or those of the authors' three scripts")
    add("--lr", type=float, default=2e-4, help="Adam's rate (Sec. 4.1)")
    add("--beta1", type=float, default=0.5, help="Adam's first decay (code)")
    add("--ngf", type=int, default=64, help="width of G (App. B.1)")
    add("--ndf", type=int, default=64, help="width of D_R and D_SC (App. B.2)")
    add("--blocks", type=int, default=9, help="residual blocks of G (App. B.1)")
    add("--downs", type=int, default=4, help="stride-2 layers of G (App. B.1)")
    add("--lambda-1", type=float, default=10.0, help="weight of L_SCAdv (Sec. 4.1)")
    add("--lambda-2", type=float, default=10.0, help="weight of L_SC (Sec. 4.1)")
    add("--w", choices=["release", "paper"], default="release", help="weights of Eq. (6): CHOICES")
    add("--vgg", default="imagenet", help="network of L_SC: imagenet, random, or a FILE")
    add("--vgg-layers", type=int, choices=range(1, 6), default=5, metavar="N",
        help="the N of Eq. (6): how many of relu1_1, relu2_1, ..., relu5_1 (code: 5)")
    add("--vgg-resize", action=switch, default=False,
        help="pictures lower than 224 are resized to 224x224 for VGG (code, street views)")
    add("--label-kind", choices=list(LABEL_SUFFIXES), default="ids",
        help="F(.): maps of class ids, drawings (or .npy), or text files of 68 landmarks")
    add("--labels", type=int, help="L: classes (counted; a 255 is the last), channels of a drawing")
    add("--unlabelled", type=int, help="ids: this one does not count in evaluation")
    add("--T", type=int, default=10, help="frames of a clip within this are consistent (Sec. 3.3)")
    add("--groups", metavar="FILE",
        help="style groups: lines 'CLIP GROUP' or 'PICTURE GROUP', or BDD100K's JSON (Tab. 7)")
    add("--same-style", type=float, default=0.3, help="share of samples whose z has I's style")
    add("--exemplars", type=int, default=5,
        help="exemplars per test map (App. A); with --groups it is one of every group")
    add("--exemplar", metavar="PATH", help="--translate: the picture I")
    add("--exemplar-label", metavar="PATH", help="--translate: F(I)")
    add("--predicted", metavar="DIR",
        help="with --evaluate: F(.) of the written pictures, found by a detector of yours")
    add("--fid-weights", metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        drawing = {"labels": 3} if args.label_kind == "picture" else {}
        return drawing | (TOY if args.data == "toy" else {})

    args = common.parse_flags(p, argv, "pix2pixsc", presets, run_name, channels_last=False)
    if args.label_kind == "landmarks":
        args.labels = 1 + len(FACE_CURVES)
    least = 2 * 2**args.downs
    for flag, low, high in (("T", 1, 1e9), ("labels", 1, 256), ("same_style", 0, 1),
                            ("exemplars", 1, 1e9), ("size", least, 1e9), ("height", least, 1e9)):
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least {low}"
                            + (f" and at most {high}" if high < 1e9 else ""))
        if flag in ("size", "height") and (value or 0) % 2**args.downs:
            raise UserError(f"--{flag} {value}: must be a multiple of {2**args.downs}")
    return args


def run_name(args):
    return f"pix2pixsc-{Path(args.data).name}"


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


class Generator(nn.Module):
    """App. B.1: c7s1-64, d128, d256, d512, d1024, R1024 x 9, u512, u256, u128, u64, c7s1-3.

    x, F_I (B, L, H, W), I (B, 3, H, W), H and W multiples of 16 -> y_hat (B, 3, H, W) in [-1, 1].
    182.7 M parameters for 42 labels. All three inputs enter at the first layer, concatenated:
    there is no style encoder, and F_I tells what is where in I.
    """

    def __init__(self, labels, ngf=64, downs=4, blocks=9):
        super().__init__()
        self.multiple = 2**downs
        widths = [ngf * 2**i for i in range(downs + 1)]                     # 64, 128, ..., 1024

        def relu(channels):
            return [InstanceNorm(channels), nn.ReLU(inplace=True)]

        layers = [nn.ReflectionPad2d(3), nn.Conv2d(2 * labels + 3, ngf, 7), *relu(ngf)]
        for a, b in pairwise(widths):                                       # (B, 1024, H/16, W/16)
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), *relu(b)]   # CHOICE (code): pads 0
        layers += [ResnetBlock(widths[-1]) for _ in range(blocks)]
        for b, a in pairwise(widths[::-1]):                                 # (B, 64, H, W)
            layers += [nn.ConvTranspose2d(b, a, 3, stride=2, padding=1, output_padding=1), *relu(a)]
        self.layers = nn.Sequential(
            *layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())

    def forward(self, x, F_I, I):
        return self.layers(torch.cat([x, F_I, I], dim=1))


class Discriminator(PatchGAN):
    """App. B.2: C64-C128-C256-C512 and one more convolution; each logit sees 70x70 pixels.

    D_R(x, picture): (B, L, H, W), (B, 3, H, W), is the picture a real one of these labels?
    D_SC(picture, I): twice (B, 3, H, W), are they real and of one style? No labels here.
    """

    def __init__(self, channels, ndf=64):
        super().__init__(channels, ndf, padding=2)

    def forward(self, a, b, features=False):
        return super().forward(torch.cat([a, b], dim=1), features)


def build(args, device):
    """G, D_R, D_SC, an Adam for G and one for both Ds, and the frozen VGG."""
    torch.manual_seed(args.seed)
    nets = SimpleNamespace(
        G=Generator(args.labels, args.ngf, args.downs, args.blocks),
        D_R=Discriminator(args.labels + 3, args.ndf), D_SC=Discriminator(3 + 3, args.ndf))
    for net in (nets.G, nets.D_R, nets.D_SC):
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(layer.weight, 0, 0.02)                      # App. C
    nets.V = nn.Identity() if args.lambda_2 == 0 else VGG(
        TAPS[:args.vgg_layers], args.vgg, normalise=False, ceil_mode=True)
    for net in (nets.G, nets.D_R, nets.D_SC, nets.V):
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
        if args.compile:
            net.compile()
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, 0.999),
                             fused=device.type in ("cuda", "cpu"))
    nets.opt_G = adam(nets.G.parameters())
    nets.opt_D = adam([*nets.D_R.parameters(), *nets.D_SC.parameters()])
    return nets


# ==== 3. Losses ===============================================================================

# What Ds that cannot tell would get: D_R says 1/2, D_SC, with one good pair in three, 1/3.
CHANCE = {"L_StdAdv": 1 / 4, "L_SCAdv": 4 / 9, "L_D_R": 1 / 4, "L_D_SC": 1 / 3}


def lsgan(logits, target):  # same as cyclegan.py: lsgan
    """Sec. 4.1: E (D(.) - target)^2 in place of a log of Eq. (4), (5); 1 is yes, 0 is no."""
    return (full(logits) - target).square().mean()


def semantic_weights(consistent, args):
    """w_i of Eq. (6), Fig. 3: consistent (B) booleans -> (B, N); may z teach its colours?

    M_i is the number of elements of layer i. From one of VGG's scales to the next they halve, and
    from the fourth to the fifth they are quartered, at any size; since norms are means here, 1/M_i
    must be taken relative to the deepest, M_5, however many of the five layers are used.
    """
    inv_M = torch.tensor([1 / 32, 1 / 16, 1 / 8, 1 / 4, 1])[:args.vgg_layers].to(consistent.device)
    consistent = consistent[:, None]
    if args.w == "paper":
        return torch.where(consistent, 1.0, inv_M)              # Fig. 3: every detail, or depth
    return torch.where(consistent, inv_M + 2.0, inv_M)          # CHOICE (code): 20 = 10 * 2 more


def semantic_consistency(V, y_hat, z, consistent, args):
    """Eq. (6): w-weighted L1 distances of the features of y_hat and z, both (B, 3, H, W)."""
    if args.vgg_resize and z.shape[2] < 224:
        y_hat, z = (nn.functional.interpolate(y, (224, 224), mode="bilinear") for y in (y_hat, z))
    distances = [(full(a) - full(b)).abs().mean(dim=(1, 2, 3))              # N times (B)
                 for a, b in zip(V(y_hat).values(), V(z).values(), strict=True)]
    w = semantic_weights(consistent, args)                                  # (B, N)
    return (w * torch.stack(distances, dim=1)).sum(dim=1).mean()            # Eq. (6)


# ==== 4. Data =================================================================================


class Frame(NamedTuple):
    name: str  # CLIP/FRAME or CLIP_FRAME
    image: Path
    label: Path
    style: str  # its group, or else its clip


LABEL_SUFFIXES = {"ids": common.SUFFIXES, "picture": common.SUFFIXES | {".npy"},
                  "landmarks": {".txt"}}
DRAWINGS = "; drawings need --label-kind picture"


def find_frames(root, split, args):
    """The Frames of root/{split}_img, clip by clip, in their order in time; `UserError`.

    A clip is a folder (train_img/CLIP/FRAME.png) or, where pictures lie in one folder, what their
    names have before the last '_' (train_img/CLIP_FRAME.png).
    """
    def found(kind, suffixes):
        folder = Path(root, f"{split}_{kind}")
        if not folder.is_dir():
            raise UserError(f"{root}: found no folder {folder}; expected {LAYOUT}")
        return common.by_name(common.list_pictures(folder, True, suffixes), folder)

    def place(name):  # (clip, what orders its frames: 10 comes after 9)
        clip = re.split(r"/(?=[^/]*$)|_(?=[^/_]*$)", name)[0]
        return clip, [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]

    images, labels = found("img", common.SUFFIXES), found("label", LABEL_SUFFIXES[args.label_kind])
    groups, frames = read_groups(args.groups), []
    for name in sorted(images, key=place):
        clip = place(name)[0]
        style = groups.get(name, groups.get(clip)) if args.groups else clip
        if name not in labels:
            raise UserError(f"{images[name]}: has no label file in {split}_label/")
        if style is None and not args.groups.endswith(".json"):
            raise UserError(f"--groups {args.groups}: names neither {name} nor {clip}")
        if style:  # BDD100K has pictures that are of no group
            frames.append(Frame(name, images[name], labels[name], style))
    if not frames:
        raise UserError(f"--groups {args.groups}: names no picture of {split}_img/ (like {name})")
    if len(frames) < len(images):
        print(f"{split}_img/: {len(images) - len(frames)} of {len(images)} are of no group")
    return frames


WEATHER = ("foggy", "overcast", "rainy", "snowy", "clear", "partly cloudy", "undefined")
GROUPS = {"night": "1 1 1 1 1 1 1", "dawn/dusk": "2 12 4 5 6 8", "daytime": "7 3 9 10 11 13"}
TAB_7 = {(weather, time): group for time, groups in GROUPS.items()
         for weather, group in zip(WEATHER, groups.split(), strict=False)}


def read_groups(path):
    """{clip or picture: style group} of a file: lines 'NAME GROUP', or BDD100K's JSON, a list of
    {"name", "attributes": {"weather", "timeofday"}}, where '' is none (Tab. 7); `UserError`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig") if path else ""
        if path and path.endswith(".json"):
            rows = [(row["name"], row["attributes"]) for row in json.loads(text)]
            groups = {name: TAB_7.get((a["weather"], a["timeofday"]), "") for name, a in rows}
        else:
            lines = [line.split("#")[0].strip() for line in text.splitlines()]
            groups = dict(re.split(r"[\s,;]+", line) for line in lines if line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--groups {path}: expected lines 'CLIP GROUP' or 'PICTURE GROUP', or "
                        f"BDD100K's label file ({error})") from None
    return {re.sub(r"\.(png|jpe?g|webp|bmp|tiff?)$", "", name, flags=re.IGNORECASE): group
            for name, group in groups.items()}


class Pairs:
    """Sec. 3.3: random pairs of frames that share a style, and that do not.

    Frames of different clips differ. Frames of one clip within T are consistent; what is further
    apart is neither, nobody knows. A style group (T None) says it all.
    """

    def __init__(self, frames, args):
        self.frames, self.T, self.members = frames, None if args.groups else args.T, {}
        for i, frame in enumerate(frames):
            self.members.setdefault(frame.style, []).append(i)

    def draw(self, rng, i, consistent):
        """A random frame that is, or is not, consistent with frame i; not i itself, unless it is
        alone in its style."""
        style = self.frames[i].style
        if not consistent and len(self.members) > 1:
            j = i
            while self.frames[j].style == style:
                j = rng.randrange(len(self.frames))
            return j
        family = self.members[style]
        if self.T is not None:                                              # Sec. 3.3: T = 10
            at = family.index(i)
            family = family[max(0, at - self.T):at + self.T + 1]
        return rng.choice([j for j in family if j != i] or [i])


class Clips(torch.utils.data.Dataset):
    """`self[n]`: the n-th training sample (x, z, F_I, I, y_S, y_N, consistent).

    x, F_I (L, H, W); pictures (3, H, W) in [-1, 1]; consistent: whether z has I's style. All are
    mirrored, or none. z walks through a new shuffle of all frames every epoch. A sample depends on
    (seed, n) alone.
    """

    def __init__(self, frames, args):
        self.frames, self.args, self.pairs = frames, args, Pairs(frames, args)
        self.size = args.size, args.height
        if not 1 < (styles := len(self.pairs.members)) < len(frames):
            raise UserError(f"--data {args.data}: {len(frames)} pictures of {styles} style(s); two "
                            "styles are needed, and two pictures of one: name them CLIP_FRAME or "
                            "CLIP/FRAME, or give --groups FILE")

    def __getitem__(self, n):
        args, rng = self.args, random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.frames))
        z = common.shuffled(len(self.frames), common.mix(args.seed, "epoch", epoch))[i]
        consistent = rng.random() < args.same_style
        I = self.pairs.draw(rng, z, consistent)
        y_S, y_N = self.pairs.draw(rng, I, True), self.pairs.draw(rng, I, False)
        x, F_I = (F(self.frames[i].label, args, self.size) for i in (z, I))
        z, I, y_S, y_N = (picture(self.frames[i].image, self.size) for i in (z, I, y_S, y_N))
        sample = [x, z, F_I, I, y_S, y_N]
        sample = [t.flip(2) for t in sample] if rng.random() < 0.5 else sample
        return *sample, torch.tensor(consistent)


def picture(path, size):
    """(3, H, W) in [-1, 1] of a picture file, resized to size (W, H)."""
    return common.to_tensor(common.open_rgb(path).resize(size, Image.BICUBIC))


def F(path, args, size=None):
    """The paper's F(.): the label map of a picture, from its label file -> (L, H, W) in [0, 1].

    F is a detector (or a patient human) that came before; what it found lies in files: class ids,
    one channel each (255 is the last); a drawing, or bytes of L x H x W in .npy; 68 landmarks of a
    face. size: (W, H) to be resized to, by nearest neighbours (code), or None: the file's own.
    """
    if args.label_kind == "ids":
        im = common.open_ids(path, DRAWINGS)
        ids = np.asarray(im.resize(size or im.size, Image.NEAREST)).astype(np.int64)  # (H, W)
        ids[ids == 255] = args.labels - 1
        if ids.min() < 0 or ids.max() >= args.labels:
            raise UserError(f"{path}: holds the ids {np.unique(ids).tolist()}; --labels "
                            f"{args.labels} allows 0 to {args.labels - 1}, and 255")
        maps = nn.functional.one_hot(torch.from_numpy(ids), args.labels)    # (H, W, L)
        return maps.permute(2, 0, 1).float()
    if args.label_kind == "landmarks":
        points, own = read_landmarks(path)
        size = size or own
        return torch.from_numpy(face_map(points * (np.array(size) / own), size)) / 255
    maps = read_drawing(path, args)                                         # (L, H, W)
    if size is not None:
        maps = nn.functional.interpolate(maps[None], size[::-1], mode="nearest-exact")[0]
    return maps / 255


def read_drawing(path, args):
    """A drawing's channels as bytes (L, H, W); `UserError` if it has not --labels of them."""
    try:
        maps = (np.load(path) if Path(path).suffix == ".npy"
                else np.array(common.open_rgb(path)).transpose(2, 0, 1))
        if maps.ndim != 3 or maps.dtype != np.uint8 or len(maps) != args.labels:
            raise ValueError(f"{maps.dtype} of shape {maps.shape}")
    except (AttributeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path}: expected bytes, --labels {args.labels} x height x width "
                        f"({error})") from None
    return torch.from_numpy(maps)


def complete(args, frames):
    """Sets --height (by the first picture's shape, a multiple of G's) and, for ids, --labels, where
    they were not given. Maps of ids are all read: wrong ones are told before training."""
    w, h = common.open_rgb(frames[0].image).size
    least = 2**args.downs
    args.height = args.height or max(2, round(args.size * h / w / least)) * least
    if args.label_kind == "ids":
        ids = set().union(*(np.unique(common.open_ids(f.label, DRAWINGS, f.image)).tolist()
                            for f in frames))
        if args.labels is None:
            args.labels = min(256, max(ids - {255}, default=0) + 1 + (255 in ids))
            print(f"--labels {args.labels}: the largest id plus one{', and 255' * (255 in ids)}")
        if 255 in ids and args.labels <= 255 and args.labels - 1 in ids:
            raise UserError(f"--labels {args.labels}: 255 takes the last channel, but id "
                            f"{args.labels - 1} is there, too: --labels {args.labels + 1}")
        if args.unlabelled == 255 and 255 in ids:
            args.unlabelled = args.labels - 1                               # what F makes of it
        if not ids <= {*range(args.labels), 255}:
            for frame in frames:
                F(frame.label, args)                                        # tells which it is


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


def own_size(path, args):
    """(W, H) of a label file."""
    if args.label_kind == "landmarks":
        return read_landmarks(path)[1]
    if Path(path).suffix == ".npy":
        return tuple(read_drawing(path, args).shape[:0:-1])
    return common.opened(path, size_only=True)


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


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("clips", args.size)
    return common.find_data(args.data, LAYOUT, KNOWN, draw_toy)


# ==== 5. One training step ====================================================================


def train_step(nets, x, z, F_I, I, y_S, y_N, consistent, args, lambda_1):
    """One update of G, then one of D_R and D_SC, on a batch of `Clips`; losses by name.

    lambda_1: --lambda-1, or less of it in the first phase (App. C). CHOICE (code): G first, so that
    the Ds learn from the very y_hat of this pass.
    """
    G, D_R, D_SC, V = nets.G, nets.D_R, nets.D_SC, nets.V
    autocast = functools.partial(torch.autocast, z.device.type, torch.bfloat16, enabled=args.amp)

    # ---- arg min over G: a real picture of x's labels, in I's style, and z as far as styles agree
    D_R.requires_grad_(False)
    D_SC.requires_grad_(False)                      # they judge here, and learn below
    L_SCAdv = L_SC = torch.zeros((), device=z.device)
    with autocast():
        y_hat = G(x, F_I, I)                                                # (B, 3, H, W)
        L_StdAdv = lsgan(D_R(x, y_hat), 1.0)                                # Eq. (4), for G
        if args.lambda_1 > 0:
            L_SCAdv = lsgan(D_SC(y_hat, I), 1.0)                            # Eq. (5), for G
        if args.lambda_2 > 0:
            L_SC = semantic_consistency(V, y_hat, z, consistent, args)      # Eq. (6)
    L = L_StdAdv + lambda_1 * L_SCAdv + args.lambda_2 * L_SC                # Eq. (7)
    nets.opt_G.zero_grad()
    L.backward()
    nets.opt_G.step()                                                       # Eq. (8), arg min

    # ---- arg max over D_R and D_SC: real or painted, one style or two ---------------------------
    D_R.requires_grad_(True)
    D_SC.requires_grad_(True)
    y_hat = y_hat.detach()
    L_D_SC = torch.zeros((), device=z.device)
    with autocast():                                # CHOICE (code): both halved
        L_D_R = (lsgan(D_R(x, z), 1.0) + lsgan(D_R(x, y_hat), 0.0)) / 2     # Eq. (4), for D_R
        if args.lambda_1 > 0:
            L_D_SC = (lsgan(D_SC(y_S, I), 1.0)                              # Eq. (5), first term
                      + lsgan(D_SC(y_N, I), 0.0)                            # Eq. (5), second term
                      + lsgan(D_SC(y_hat, I), 0.0)) / 2                     # Eq. (5), third term
    nets.opt_D.zero_grad()
    (L_D_R + L_D_SC).backward()
    nets.opt_D.step()                                                       # Eq. (8), arg max
    losses = {"L_StdAdv": L_StdAdv, "L_D_R": L_D_R}
    if args.lambda_1 > 0:
        losses |= {"L_SCAdv": L_SCAdv, "L_D_SC": L_D_SC}
    return losses | {"L_SC": L_SC} if args.lambda_2 > 0 else losses


# ==== 6. Training loop ========================================================================


def phase(step, total, schedule):
    """(factor of lambda_1, factor of the learning rate) at a step of a run (App. C).

    The paper's three phases: L_SCAdv off; on; on with a rate that falls linearly to zero.
    """
    starts, decay, end = SCHEDULES[schedule]
    at = step * end / total                         # in thousands of the full run's iterations
    factor = next((starts[s] for s in sorted(starts, reverse=True) if at >= s), 0.0)
    return factor, min(1.0, (end - at) / (end - decay))


def train(args):
    root = data_folder(args)
    frames = find_frames(root, "train", args)
    complete(args, frames)  # before `Run`, which keeps a copy of args: this sets some of them
    run = Run("pix2pixsc", args, CHANCE)
    data, show = Clips(frames, args), test_pairs(root, args, limit=6)
    total = args.steps or SCHEDULES[args.schedule][2] * 1000
    nets = build(args, run.device)
    run.resume_or_start({name: part for name, part in vars(nets).items() if name != "V"})
    for step, batch in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(nets.G, show, root, args, run.device))
        factor, rate = phase(step, total, args.schedule)                    # App. C
        for optimiser in (nets.opt_G, nets.opt_D):
            optimiser.param_groups[0]["lr"] = args.lr * rate
        run.log(train_step(nets, *batch, args, factor * args.lambda_1))
    run.save_samples(sample_columns(nets.G, show, root, args, run.device))
    run.finish(truth_scores(nets.G, root, args, run.device) if args.data == "toy" else [])


# ==== 7. Translate and evaluate ===============================================================


@torch.no_grad()
def translate(G, x, F_I, I, args):
    """G(x, I, F(I)) for one x, F_I (1, L, H, W) and I (1, 3, H, W) of any one size."""
    L = x.shape[1]
    at_least = 1 if min(x.shape[2:]) > G.multiple else 2  # G's smallest map is padded by 1
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        return common.same_size(lambda padded: G(*padded.split([L, L, 3], dim=1)),
                                torch.cat([x, F_I, I], 1), at_least * G.multiple).float()


def test_pairs(root, args, limit=None):
    """[(x's Frame, I's Frame)] of --split: every map with --exemplars pictures of other styles, or
    with one of each group (App. A). limit: that many maps, evenly spaced, with one exemplar."""
    split = args.split
    if split == "test" and not Path(root, "test_img").is_dir():
        print(f"{root} has no test pictures: these are training pictures")
        split = "train"
    frames = find_frames(root, split, args)
    pairs, found = Pairs(frames, args), []
    if len(pairs.members) == 1:
        print(f"{root}: {split} has one style only, so exemplars have that of the map itself")
    for k in range(n := min(limit or len(frames), len(frames))):
        i = k * len(frames) // n
        rng = random.Random(common.mix("exemplar", i))
        drawn = ([rng.choice(group) for group in pairs.members.values()] if args.groups else
                 [pairs.draw(rng, i, False) for _ in range(args.exemplars)])
        found += [(frames[i], frames[j]) for j in ([drawn[k % len(drawn)]] if limit else drawn)]
    return found


def translated(G, pairs, args, device):
    """G(x, I, F(I)) of pairs of frames, (N, 3, H, W) on the CPU."""
    size = args.size, args.height
    return torch.cat([translate(G, *(t[None].to(device) for t in (
        F(x.label, args, size), F(I.label, args, size), picture(I.image, size))), args).cpu()
        for x, I in pairs])


def sample_columns(G, pairs, root, args, device):
    """Columns of a sample grid: z, which has another style than I, is not the answer to be had."""
    size = args.size, args.height
    columns = {"x": [coloured(F(x.label, args, size), args) for x, _ in pairs],
               "I": [picture(I.image, size) for _, I in pairs],
               "G(x, I, F(I))": translated(G, pairs, args, device),
               "z of x": [picture(x.image, size) for x, _ in pairs]}
    if args.data == "toy":
        answer = common.lab("toy", "--data toy").clip_answer
        columns["true answer"] = [common.to_tensor(answer(root, x.name, I.name, args.split))
                                  for x, I in pairs]
    return {name: torch.stack([*column]) for name, column in columns.items()}


def coloured(x, args):
    """A label map for looking at: (L, H, W) in [0, 1] -> (3, H, W) in [-1, 1]."""
    if args.label_kind == "ids":
        i = torch.arange(args.labels)[:, None]
        palette = torch.cos(i * 2.4 + torch.tensor([0.0, 2.1, 4.2])) * (1 - 0.3 * (i % 3 == 2))
        return palette[x.argmax(0)].permute(2, 0, 1)
    drawing = args.label_kind == "picture" and len(x) > 2
    return 2 * (x[:3] if drawing else x[:1].expand(3, -1, -1)) - 1


def truth_scores(G, root, args, device):
    """Scores against the toy world's true answers, beside those of answers without learning."""
    pairs = test_pairs(root, args)
    return common.lab("toy", "--data toy").clip_scores(
        root, [(x.name, I.name) for x, I in pairs], translated(G, pairs, args, device).numpy(),
        args.split)


def load_generator(args, device):
    """G from --weights: our checkpoint (its flags were read by `get_args`) or the authors' file."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script or the authors' file")
    state = common.load_file(args.weights)
    if isinstance(state, dict) and "method" in state:
        G = Generator(args.labels, args.ngf, args.downs, args.blocks)
        common.load_parts({"G": G}, state["parts"], args.weights)
    else:
        G = common.lab("released", "a file of the authors'").pix2pixsc(state, args.weights, args)
    return G.to(device).eval()


def translate_files(args):
    """Paint --translate, a label map or a folder of them, in the style of --exemplar, to PNG."""
    device = common.pick_device(args.device)
    G, out = load_generator(args, device), args.out or "translated"
    if args.exemplar is None or args.exemplar_label is None:
        raise UserError("--translate needs --exemplar PATH and --exemplar-label PATH as well")
    if args.label_kind == "ids":
        common.open_ids(args.exemplar_label, DRAWINGS, args.exemplar)       # of one size
    files = common.list_pictures(args.translate, suffixes=LABEL_SUFFIXES[args.label_kind])

    def painted(f):
        own = own_size(f, args)
        size = common.at_side(own, f)
        x, F_I = F(f, args, size), F(args.exemplar_label, args, size)
        given = x, F_I, picture(args.exemplar, size)
        y = translate(G, *(t[None].to(device) for t in given), args)
        return common.to_pil(y[0]).resize(own, Image.BICUBIC)

    common.paint_files(files, out, painted, keep=[args.exemplar, args.exemplar_label])


def evaluate(args):
    """Tabs. 1, 2, 5 and 6 on the test pairs; their pictures are written, for detectors of yours."""
    device = common.pick_device(args.device)
    G, root = load_generator(args, device), data_folder(args)
    frames, out = find_frames(root, "train", args), Path(args.out or "evaluated")
    complete(args, frames)
    pairs = test_pairs(root, args)
    y_hat = translated(G, pairs, args, device)
    for i, y in enumerate(y_hat):
        common.write_whole(out / f"{i:05d}.png",
                           functools.partial(common.to_pil(y).save, format="PNG"))
    print(f"pictures: {out}")
    z = torch.stack([picture(x.image, (args.size, args.height)) for x, _ in pairs])
    scores = truth_scores(G, root, args, device) if args.data == "toy" else []
    scores += common.lab("exemplars", "--evaluate").scores(
        pairs, y_hat, z, frames, args, args.unlabelled, args.predicted)
    common.print_scores(scores)                     # FID may fail, where its network is not at hand
    if args.data != "toy" or args.fid_weights:
        fid = common.lab("metrics", "--evaluate").fid
        value = fid(y_hat.split(1), z.split(1), device, args.fid_weights)
        common.print_scores([{"name": f"FID ({len(z)} painted, {len(z)} real)", "value": value,
                              "better": "lower"}])


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
