"""CyCADA: train a segmenter for photographs with the labels of computer graphics.

Labels of synthetic pictures (source) cost nothing, but what is learnt from them fails on real ones
(target). So translate the labelled pictures until they look real, by a CycleGAN that needs no
pairs and no target labels, and train on the translations with the old labels: if the translation
keeps every thing in its place, the labels still fit.

J. Hoffman, E. Tzeng, T. Park, J.-Y. Zhu, P. Isola, K. Saenko, A. A. Efros, T. Darrell, "CyCADA:
Cycle-Consistent Adversarial Domain Adaptation", ICML 2018 (arXiv 1711.03213). Numbers below are
those of chapter 3.4 in T. Park, "Machine Learning for Deep Image Manipulation", Berkeley 2021.

SYMBOLS      paper                 here              shape
             x_s, x_t              x_s, x_t          (B, 3, H, W) in [-1, 1], unpaired
             y_s                   y_s               (B, H, W), classes 0 ... N - 1; 255: ignored
             f_S, f_T              f_S, f_T          (B, 3, H, W) -> scores (B, N, H, W)
             G_S->T, G_T->S        G_ST, G_TS        (B, 3, H, W) -> (B, 3, H, W)
             G_S->T(x_s)           x_st; x_ts        (B, 3, H, W); there and back: x_sts, x_tst
             D_S, D_T              D_S, D_T          (B, 3, H, W) -> logits (B, 1, H', W')
             p(f, x) = argmax f(x) hard_labels(f, x) (B, H, W)
             D_feat                D_feat            scores (B, N, H, W) -> logits (B, 2, H, W)
             n_ij                  n                 (N, N): pixels of class i predicted as j

OBJECTIVE    Eq. (3.10) L_task(f_S, X_S, Y_S) = -E sum_k 1[k = y_s] log softmax_k f_S(x_s)
             Eq. (3.11) L_GAN(G_ST, D_T, X_T, X_S) = E log D_T(x_t) + E log(1 - D_T(G_ST(x_s)))
             Eq. (3.12) L_cyc = E |G_TS(G_ST(x_s)) - x_s|_1 + E |G_ST(G_TS(x_t)) - x_t|_1
             Eq. (3.13) L_sem = L_task(f_S, G_TS(X_T), p(f_S, X_T))
                              + L_task(f_S, G_ST(X_S), p(f_S, X_S)), an option
             Eq. (3.14) L = L_task(f_T, G_ST(X_S), Y_S)                               (stage task)
                          + L_GAN(G_ST, D_T, X_T, X_S) + L_GAN(G_TS, D_S, X_S, X_T)
                          + L_cyc, run as lambda_cyc L_cyc + lambda_sem L_sem        (stage pixel)
             Eq. (3.15) f_T* = arg min_f_T min_(G_ST, G_TS) max_(D_S, D_T) L
             Fig. 3.33  L_GAN(f_T, D_feat, f_S(G_ST(X_S)), X_T), drawn and without an equation, is
                        the ICML paper's: f_T maximises E log D_feat(f_T(x_t)) (stage feature)

CHOICES      where the text is silent, or differs from what the authors ran (their released code):
             Least squares replace the logs, L_cyc has weight 10: CycleGAN's, as in the code.
             Eq. (3.15) is solved in stages (Sec. 3.4.3): source makes f_S, pixel makes G and D,
             task translates every x_s once and makes f_T of that, oracle makes f_T of the target
             and its labels, both from f_S's start, not from f_S; feature goes on with task's f_T,
             until f_T has learnt nothing for |X_S| steps (code). Last weights count.
             Eq. (3.13) was "left as an idea" and is off: --lambda-sem. Where f_S errs on x_t, its
             first term asks G_TS for pictures in which f_S reads the same errors, its second
             forbids G_ST to paint what f_S cannot read, which is what x_t looks like (toy, 600
             steps: mIoU 49 without, 47 with the first alone, 42 with the second, 41 with both).
             Task models see whole pictures, as in the code's scripts; --task-size: mirrored crops
             (code, stage feature: 768). f_S sees pictures --load wide in Eq. (3.13); translations
             are as wide, and enlarged to --task-load for f_T.
             One script of the code has an identity loss and drop-out in G: neither is here.
             Not given: how long the CycleGAN learns. 500,000 steps are 20 epochs of GTA5's 24,966
             pictures; CycleGAN's own 200 epochs would be 5 million.

USAGE        python cycada.py                                     # toy world, table at the end
             python cycada.py --data gta2cityscapes --classes gta5    # folders: LAYOUT, below
             python cycada.py --data gta2cityscapes --stage feature   # or any other one, in turn
             python cycada.py --translate photo.jpg --weights runs/cycada-toy/pixel/last.pt
             python cycada.py --translate photo.jpg --weights runs/cycada-toy/task/last.pt  # labels
EXPECT       python cycada.py: 11 minutes of a slow core (seeds 0 to 2, 60 test pictures): mIoU 26
             to 29 (source only), 58 to 60 (CyCADA), 77 to 78 (oracle; one change of colours 49),
             pixel accuracy 55 to 59, 89, 96 (a constant answer 34); trunks and grass stay bad. D_T
             is near its chance (0.23), D_S wins (0.14).
"""

import argparse
import colorsys
import functools
import json
import math
import random
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
from common import BlurDown, InstanceNorm, PatchGAN, Run, UserError, full

LAYOUT = ("source_img/ source_label/ target_img/ and, for the scores, test_img/ test_label/ and, "
          "for the oracle, target_label/; label maps are one-channel pictures named like theirs")

# ==== 1. Configuration ========================================================================

STAGES = {  # Sec. 3.4.3, in order, and the row that each gives (feature: the ICML paper's)
    "source": "source only", "pixel": "", "task": "CyCADA", "feature": "CyCADA + feature",
    "oracle": "oracle"}
CLASSES = {  # Tab. 3.8's names, ids as in GTA5 and Cityscapes; Tab. 3.7's, as in SYNTHIA
    "gta5": "road=7 sidewalk=8 building=11 wall=12 fence=13 pole=17 traffic_light=19 "
            "traffic_sign=20 vegetation=21 terrain=22 sky=23 person=24 rider=25 car=26 truck=27 "
            "bus=28 train=31 motorbike=32 bicycle=33".split(),
    "synthia": "sky=1 building=2 road=3 sidewalk=4 fence=5 vegetation=6 pole=7 car=8 "
               "traffic_sign=9 pedestrian=10 bicycle=11 lanemarking=12 traffic_light=15".split()}
TOY = {
    "size": 64, "load": 64, "batch": 2, "steps": 2000,  # minutes on a laptop: small and short, ...
    "ngf": 16, "ndf": 16, "blocks": 4,                  # ... so narrower and shallower
    "antialias_D": True, "d_layers": 2,                 # D sees 40 of 64 pixels, not all of them
    "task_model": "small", "task_weights": "random",    # the same for the task models
    "task_load": 64, "task_size": 64, "task_batch": 8,  # whole toy pictures
    "task_steps": 400, "task_lr": 0.1, "task_momentum": 0.9,  # few steps, so a higher rate, ...
    "task_decay_from": 0.3,                             # ... which falls early
    "feature_lr": 1e-2, "feature_steps": 200,           # likewise
    "workers": 0, "sample_every": 500,                  # small files need no reader of their own
    "classes": ["sky", "hill", "ground", "trunk", "leaves", "grass", "animal"]}


def get_args(argv=None):
    """Flags in layers: the paper's defaults < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--stage", nargs="+", choices=list(STAGES), default=["source", "pixel", "task", "oracle"],
        help="what to run (Sec. 3.4.3); each reads what the ones before it left in the run folder")
    add("--classes", nargs="+", default=["gta5"], metavar="NAME",
        help="gta5 (also Cityscapes), synthia, or the names of ids 0, 1, ..., of which there must "
             "be no others but 255; or name=id, and all other ids are ignored")
    # ---- stage pixel
    add("--lambda-cyc", type=float, default=10.0, help="weight of Eq. (3.12) (Sec. 3.2.4)")
    add("--lambda-sem", type=float, default=0.0, help="weight of Eq. (3.13) (Sec. 3.4.3: 0)")
    add("--size", type=int, default=400, help="crop of stage pixel (ICML paper)")
    add("--load", type=int, default=1024, help="width of pictures in stage pixel (ICML paper)")
    add("--batch", type=int, default=1, help="pictures per step and process in stages pixel (Sec. "
        "3.2.4) and feature (code)")
    add("--steps", type=int, default=500_000, help="updates of stage pixel; the rate falls in the "
        "second half (Sec. 3.2.4)")
    add("--lr", type=float, default=2e-4, help="Adam's rate in stage pixel (Sec. 3.2.4)")
    add("--ngf", type=int, default=64, help="width of G_ST and G_TS (code)")
    add("--ndf", type=int, default=64, help="width of D_S and D_T (code)")
    add("--blocks", type=int, default=9, help="residual blocks of G_ST and G_TS (Sec. 3.2.4)")
    add("--d-layers", type=int, default=3, help="D sees 70 pixels with 3 layers, 34 with 2 (code)")
    add("--antialias-G", action=switch, default=False, help="blur when down- and upsampling in G")
    add("--antialias-D", action=switch, default=False, help="blur before downsampling in D")
    # ---- the task models of stages source, task and oracle
    add("--task-model", choices=list(TASK_MODELS), default="fcn8s",
        help="Tab. 3.8: fcn8s is A, drn26 is B; small is for toy data")
    add("--task-weights", default="imagenet", metavar="W",
        help="first weights: imagenet, a file, or random (much weaker)")
    add("--task-load", type=int, default=1024, help="short side for task models (code)")
    add("--task-size", type=int, help="crops, mirrored at random (whole pictures, as the code)")
    add("--task-batch", type=int, default=2, help="pictures per step and process (code)")
    add("--task-steps", type=int, default=100_000, help="updates of each task model (code)")
    add("--task-lr", type=float, default=1e-3, help="rate of SGD (code)")
    add("--task-momentum", type=float, default=0.99, help="momentum of SGD (code)")
    add("--task-decay-from", type=float, default=1.0, help="fraction with a constant rate (code)")
    # ---- stage feature
    add("--lambda-feature", type=float, default=0.1, help="weight of f_T's adversarial loss (code)")
    add("--feature-lr", type=float, default=1e-5, help="rate of SGD, for f_T and D_feat (code)")
    add("--feature-steps", type=int, default=100_000, help="updates of D_feat (code)")
    add("--feature-gate", type=float, default=0.6,
        help="f_T learns while D_feat is right more often than this (code)")
    # ---- use
    add("--direction", choices=["StoT", "TtoS"], default="StoT",
        help="--translate with the last.pt of stage pixel: by G_ST or by G_TS")

    argv = sys.argv[1:] if argv is None else argv
    rough = p.parse_known_args(argv)[0]
    folder = Path(rough.out or Path("runs", run_name(rough)))
    begun = [f for stage in STAGES if (f := folder / stage / "last.pt").exists()]
    if rough.resume and begun and not rough.weights:  # the flags are in every stage's last.pt
        argv = [*argv, "--weights", str(max(begun, key=lambda f: f.stat().st_mtime))]
    args = common.parse_flags(p, argv, "cycada", lambda a: TOY if a.data == "toy" else {}, run_name)
    args.classes = CLASSES.get(" ".join(args.classes), args.classes)
    if args.size < 32 or args.size % 4:
        raise UserError(f"--size {args.size}: must be at least 32 and a multiple of 4")
    if args.task_size is not None and not 16 <= args.task_size <= args.task_load:
        raise UserError(f"--task-size {args.task_size}: must be from 16 to --task-load "
                        f"{args.task_load}")
    if args.size < 3 * 2**args.d_layers:
        raise UserError(f"--d-layers {args.d_layers}: D has no pixel left of --size {args.size}; "
                        f"expected at most {(args.size // 3).bit_length() - 1}")
    if args.task_weights == "imagenet" and args.task_model != "fcn8s":
        raise UserError(f"--task-weights imagenet: for --task-model {args.task_model} give random "
                        "or, for drn26, a FILE, the DRN authors' drn_c_26")
    class_ids(args)
    return args


def class_ids(args):
    """{class name: its id in label files} in the order of classes 0, 1, ...; `UserError`."""
    ids = {}
    for k, given in enumerate(args.classes):
        name, _, i = given.partition("=")
        i = i or str(k)
        common.expect(i.isdecimal() and int(i) < 65536, f"--classes: {i} is no id; expected names, "
                      "or name=id with ids from 0 to 65535")
        common.expect(k < 255 and name not in ids and int(i) not in ids.values(),
                      "--classes: each name and each id once, 255 at most")
        ids[name] = int(i)
    return ids


def run_name(args):
    return f"cycada-{Path(args.data).name}"


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


class ResnetGenerator(nn.Module):  # same as cyclegan.py: ResnetGenerator
    """CycleGAN's network (Sec. 3.2.4): x (B, 3, H, W) -> (B, 3, H, W) in [-1, 1]; 11.38 M."""

    multiple = 4

    def __init__(self, ngf=64, blocks=9, antialias=False):
        super().__init__()

        def relu(channels):
            return [InstanceNorm(channels), nn.ReLU(inplace=True)]

        def down(a, b):  # CHOICE: stride 2; or stride 1 and, after norm and ReLU, a blur
            if antialias:
                return [nn.Conv2d(a, b, 3, padding=1), *relu(b), BlurDown(b)]
            return [nn.Conv2d(a, b, 3, stride=2, padding=1), *relu(b)]

        def up(a, b):
            if antialias:
                return [nn.Upsample(scale_factor=2, mode="bilinear"),
                        nn.Conv2d(a, b, 3, padding=1), *relu(b)]
            return [nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1), *relu(b)]

        self.layers = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), *relu(ngf),     # (B, 64, H, W)
            *down(ngf, 2 * ngf),                                         # (B, 128, H/2, W/2)
            *down(2 * ngf, 4 * ngf),                                     # (B, 256, H/4, W/4)
            *[ResnetBlock(4 * ngf) for _ in range(blocks)],
            *up(4 * ngf, 2 * ngf),                                       # (B, 128, H/2, W/2)
            *up(2 * ngf, ngf),                                           # (B, 64, H, W)
            nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())      # (B, 3, H, W)

    def forward(self, x):
        return self.layers(x)


def bilinear_up(x, f):
    """(B, C, h, w) -> (B, C, f (h + 1), f (w + 1)), beyond the border zeros (Long et al. 2015)."""
    x = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=f, mode="bilinear")
    return x[:, :, f // 2:-f // 2, f // 2:-f // 2]


class FCN8s(nn.Module):
    """Tab. 3.8 A: VGG16 as a fully convolutional net (Long et al. 2015), 134.35 M parameters.

    x (B, 3, H, W) in [-1, 1], any size -> scores (B, classes, H, W). Coarse scores from 1/32 are
    refined by those of pool4 (1/16) and pool3 (1/8).
    """

    def __init__(self, classes):
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__()
        self.features = make_layers(cfgs["D"])  # VGG16's convolutions, under torchvision's names
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True
        self.head = nn.Sequential(
            nn.Conv2d(512, 4096, 7), nn.ReLU(inplace=True), nn.Dropout2d(0.5),
            nn.Conv2d(4096, 4096, 1), nn.ReLU(inplace=True), nn.Dropout2d(0.5),
            nn.Conv2d(4096, classes, 1))
        self.score_pool4, self.score_pool3 = (nn.Conv2d(c, classes, 1) for c in (512, 256))
        for conv in [layer for layer in self.modules() if hasattr(layer, "weight")]:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.score_pool4.weight)  # so that training begins with the coarse scores
        nn.init.zeros_(self.score_pool3.weight)
        for name, v in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(v).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        def cropped(x, like, offset):
            return x[:, :, offset:offset + like.shape[2], offset:offset + like.shape[3]]

        H, W = x.shape[2:]
        x = ((x + 1) / 2 - self.mean) / self.std      # the input range of ImageNet's networks
        x = F.pad(x, (99, 99, 99, 99))                # room for the unpadded 7x7 of the head
        pool3 = self.features[:17](x)                              # (B, 256, h, w), h = H/8 + 25
        pool4 = self.features[17:24](pool3)                             # (B, 512, h/2, w/2)
        pool5 = self.features[24:](pool4)                               # (B, 512, h/4, w/4)
        score = bilinear_up(self.head(pool5), 2)                        # (B, classes, h', w')
        score = score + cropped(self.score_pool4(0.01 * pool4), score, 5)
        score = bilinear_up(score, 2)                                   # (B, classes, h'', w'')
        score = score + cropped(self.score_pool3(0.0001 * pool3), score, 9)
        return bilinear_up(score, 8)[:, :, 31:31 + H, 31:31 + W]        # (B, classes, H, W)

    def load_imagenet(self, state):
        """Fill all but the scores from torchvision's VGG16; its linear layers become the head."""
        self.features.load_state_dict({key.removeprefix("features."): state[key] for key in state
                                       if key.startswith("features.")})
        for ours, theirs in ((self.head[0], "classifier.0"), (self.head[3], "classifier.3")):
            ours.weight.data.copy_(state[f"{theirs}.weight"].view_as(ours.weight))
            ours.bias.data.copy_(state[f"{theirs}.bias"])


class SmallFCN(nn.Module):
    """For toy data: four scales, whose scores are added up; 148 k parameters with 7 classes."""

    def __init__(self, classes):
        super().__init__()

        def conv(a, b):
            return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b),
                    nn.ReLU(inplace=True)]

        widths = (3, 16, 32, 64, 64)
        self.blocks = nn.ModuleList(nn.Sequential(*conv(a, b), *conv(b, b))
                                    for a, b in pairwise(widths))
        self.scores = nn.ModuleList(nn.Conv2d(c, classes, 1) for c in widths[1:])

    def forward(self, x):
        size, total = x.shape[2:], 0.0
        for i, (block, score) in enumerate(zip(self.blocks, self.scores, strict=True)):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if i > 0 else x)
            total = total + F.interpolate(score(x), size=size, mode="bilinear")
        return total                                                    # (B, classes, H, W)


TASK_MODELS = {  # Tab. 3.8 A; B, a dilated residual network (Yu et al. 2017)
    "fcn8s": FCN8s, "small": SmallFCN,
    "drn26": lambda classes: common.lab("segmenters", "--task-model drn26").DRN26(classes)}


def task_model(args, weights="random"):
    """A new f; the same seed gives f_S, f_T and the oracle the same start. `UserError`."""
    torch.manual_seed(args.seed)
    f = TASK_MODELS[args.task_model](len(args.classes))
    if weights != "random":
        state = common.vgg_weights(weights, "VGG16", "--task-weights")
        try:
            f.load_imagenet(state)
        except (AttributeError, KeyError, RuntimeError, ValueError):
            raise UserError(f"--task-weights {weights}: not the weights of an ImageNet network for "
                            f"--task-model {args.task_model}") from None
    if args.compile:
        f.compile()
    return f.to(memory_format=torch.channels_last if args.channels_last
                else torch.contiguous_format)


class ScoreDiscriminator(nn.Module):
    """D_feat (code): scores (B, classes, H, W) -> logits (B, 2, H, W), every pixel on its own."""

    def __init__(self, classes):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(classes, 512, 1), nn.Dropout2d(0.5), nn.ReLU(inplace=True),
            nn.Conv2d(512, 256, 1), nn.Dropout2d(0.5), nn.ReLU(inplace=True),
            nn.Conv2d(256, 2, 1))

    def forward(self, scores):
        return self.layers(scores)


def build(args, device):
    """Stage pixel: G_ST, G_TS, D_S, D_T, an Adam for both G, one for both D, and two buffers."""
    torch.manual_seed(args.seed)
    nets = SimpleNamespace(
        G_ST=ResnetGenerator(args.ngf, args.blocks, args.antialias_G),
        G_TS=ResnetGenerator(args.ngf, args.blocks, args.antialias_G),
        D_S=PatchGAN(3, args.ndf, args.d_layers, antialias=args.antialias_D),
        D_T=PatchGAN(3, args.ndf, args.d_layers, antialias=args.antialias_D))
    for net in (nets.G_ST, nets.G_TS, nets.D_S, nets.D_T):
        common.init_weights(net, "normal", 0.02)
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
        if args.compile:
            net.compile()
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(0.5, 0.999),
                             fused=device.type in ("cuda", "cpu"))
    nets.opt_G = adam([*nets.G_ST.parameters(), *nets.G_TS.parameters()])
    nets.opt_D = adam([*nets.D_S.parameters(), *nets.D_T.parameters()])
    nets.pool_S, nets.pool_T = HistoryBuffer(POOL, device), HistoryBuffer(POOL, device)
    return nets


# ==== 3. Losses ===============================================================================

POOL = 50  # generated pictures kept for D (Sec. 3.2.4)
CHANCE = {"L_GAN_ST": 0.25, "L_GAN_TS": 0.25, "L_D_S": 0.25, "L_D_T": 0.25,  # D = 1/2 everywhere
          "L_D_feat": math.log(2), "L_GAN_feat": math.log(2), "accuracy": 0.5}
SOURCE, TARGET = 1, 0  # the two classes of D_feat


def task_loss(scores, y):
    """Eq. (3.10): scores (B, N, H, W), labels y (B, H, W); a mean over pixels, 255 left out."""
    total = F.cross_entropy(full(scores), y, ignore_index=255, reduction="sum")
    return total / (y != 255).sum().clamp(min=1)      # Eq. (3.10); a crop may have no label at all


@torch.no_grad()
def hard_labels(f, x):
    """p(f, x) = argmax f(x): (B, 3, H, W) -> (B, H, W)."""
    return f(x).argmax(1)


def lsgan(logits, target):  # same as cyclegan.py: lsgan
    """In place of a log of Eq. (3.11): E (D(.) - target)^2; real is 1, translated 0."""
    return (full(logits) - target).square().mean()                    # Eq. (3.11), one expectation


def cycle_loss(x, x_cyc):  # same as cyclegan.py: cycle_loss
    """One expectation of Eq. (3.12), |G_TS(G_ST(x)) - x|_1 as a mean over pixels."""
    return (full(x_cyc) - x).abs().mean()


def domain_loss(logits, domain):
    """Fig. 3.33, feature level: -E log D_feat(domain | .); logits (B, 2, H, W), over all pixels."""
    return -full(logits).log_softmax(1)[:, domain].mean()


class HistoryBuffer:  # same as cyclegan.py: HistoryBuffer
    """The last `size` generated pictures, so that D does not forget old tricks (Sec. 3.2.4)."""

    def __init__(self, size, device):
        self.size, self.device, self.pictures = size, device, []

    def exchange(self, fakes, rng):
        """Fakes (B, 3, H, W) -> what D shall see, same shape: half of them older ones, if full."""
        shown = []
        if self.pictures and self.pictures[0].shape != fakes.shape[1:]:
            self.pictures = []  # --resume with another --size
        for fake in full(fakes.detach()):
            if len(self.pictures) < self.size:
                self.pictures.append(fake.clone())
            elif self.size and torch.rand((), generator=rng) < 0.5:
                i = int(torch.randint(self.size, (), generator=rng))
                fake, self.pictures[i] = self.pictures[i], fake.clone()
            shown.append(fake)
        return torch.stack(shown)

    def state_dict(self):
        return {"pictures": self.pictures}

    def load_state_dict(self, state):
        self.pictures = [picture.to(self.device) for picture in state["pictures"]]


class Gate:
    """CHOICE (code): f_T learns from D_feat only while that can tell the domains apart, which is to
    say while the mean of its last 100 accuracies is above --feature-gate."""

    def __init__(self):
        self.accuracies, self.seen, self.last_update = [], 0, 0  # the steps: all, f_T's last one

    def opens(self, accuracy, least):
        """Note an accuracy (0-d); whether f_T may learn."""
        if dist.is_initialized():  # all processes must come to the same decision
            dist.all_reduce(accuracy)
            accuracy /= dist.get_world_size()
        self.accuracies = [*self.accuracies[-99:], float(accuracy)]
        self.seen += 1
        opened = sum(self.accuracies) / len(self.accuracies) > least
        self.last_update = self.seen if opened else self.last_update
        return opened

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        self.accuracies = [float(accuracy) for accuracy in state["accuracies"]]
        self.seen, self.last_update = int(state["seen"]), int(state["last_update"])


# ==== 4. Data =================================================================================


def find_pairs(root, split, args, labelled):
    """[(picture, its label map)] of SPLIT_img/ and SPLIT_label/, by name, every label map checked;
    None for the label maps if there is no such folder, unless `labelled`; `UserError`."""
    folder, maps = Path(root, f"{split}_img"), Path(root, f"{split}_label")
    if lacking := [f for f in (folder, maps) if not f.is_dir() and (labelled or f == folder)]:
        raise UserError(f"{root}: no {lacking[0].name}/; expected {LAYOUT}")
    labels = common.by_name(common.list_pictures(maps)) if maps.is_dir() else {}
    pairs = [(f, labels.get(name)) for name, f in common.by_name(
        common.list_pictures(folder)).items()]
    for picture, label in pairs if maps.is_dir() else ():
        if label is None:
            raise UserError(f"{picture}: no label map of that name in {maps}")
        a, b = open_label(label, args).size  # a wrong one shall be found now, not after hours
        w, h = common.opened(picture, size_only=True)
        if abs(w * b - h * a) > 0.02 * h * a:  # some data sets are a few rows off
            raise UserError(f"{label}: {a}x{b} pixels, but {picture} has {w}x{h}")
    return pairs


def load_data(args):
    """{'source', 'target', 'test': [(picture, label map)]}; 'test' are the pictures of --split.
    The target's label maps are the oracle's, and nobody else's."""
    root = data_folder(args)
    scored = Path(root, f"{args.split}_img").is_dir()
    return {"source": find_pairs(root, "source", args, True),
            "target": find_pairs(root, "target", args, False),
            "test": find_pairs(root, args.split, args, True) if scored else []}


def open_label(path, args):
    """A label map as an 8-bit Pillow picture of classes, 255 where there is none; `UserError`."""
    ids = np.asarray(common.open_ids(path)).astype(np.int64)
    known = list(class_ids(args).values())
    table = np.full(2**16 + 1, 255, dtype=np.uint8)
    table[known] = np.arange(len(known))
    classes = table[ids.clip(-1, 2**16)]  # both ends are the last entry: no class
    strict = not any("=" in name for name in args.classes)
    if strict and (wrong := np.unique(ids[(classes == 255) & (ids != 255)])).size:
        raise UserError(f"{path}: ids {wrong[:8].tolist()} are neither one of the {len(known)} "
                        "classes of --classes nor 255 (ignored); name=id ignores all others")
    return Image.fromarray(classes)


def resized(images, w, h, size, rng):
    """Pictures and label maps at w x h, as tensors (3, H, W) and (H, W); with a size the same
    random crop of them, mirrored at random."""
    left, top, mirror = 0, 0, False
    if size:
        left, top, mirror = rng.randint(0, w - size), rng.randint(0, h - size), rng.random() < 0.5
    tensors = []
    for im in images:
        im = im.resize((w, h), Image.BICUBIC if im.mode == "RGB" else Image.NEAREST)
        im = im.crop((left, top, left + (size or w), top + (size or h)))
        im = im.transpose(Image.FLIP_LEFT_RIGHT) if mirror else im
        tensors.append(common.to_tensor(im) if im.mode == "RGB"
                       else torch.from_numpy(np.array(im)).long())
    return tensors


class Unpaired(torch.utils.data.Dataset):
    """For stage pixel: `self[n]` is the n-th training sample, x_s and x_t (3, size, size).

    x_s walks through a new shuffle every epoch, x_t is drawn at random.
    """

    def __init__(self, source, target, args):
        self.source, self.target = ([x for x, _ in pairs] for pairs in (source, target))
        self.args = args

    def __getitem__(self, n):
        args, rng = self.args, random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.source))
        order = common.shuffled(len(self.source), common.mix(args.seed, "epoch", epoch))
        sample = []
        for path in (self.source[order[i]], rng.choice(self.target)):
            im = common.open_rgb(path)
            scale = max(args.load / im.width, args.size / min(im.size))
            w, h = (round(n * scale) for n in im.size)
            sample += resized([im], w, h, args.size, rng)
        return sample


class Labelled(torch.utils.data.Dataset):
    """For task models: `self[n]` is the n-th training sample, x (3, h, w) and y (h, w).

    A new shuffle every epoch; a sample depends on (seed, n) alone. The short side of the *label
    map* becomes --task-load: translations may be smaller than the pictures they come from.
    target: for stage feature, pictures of which each sample gets one at random, x_t (3, h, w).
    """

    def __init__(self, pairs, args, target=()):
        self.pairs, self.args, self.target = pairs, args, target
        # (w, h) of the first label map and of the first x_t
        self.first = [common.opened(f, size_only=True) for f in (pairs[0][1], *target[:1])]

    def tensors(self, images, first, rng):
        # CHOICE: whole pictures take the first one's shape, as those of a batch must agree
        w, h = images[-1].size if self.args.task_size else first
        w, h = (round(n * self.args.task_load / min(w, h)) for n in (w, h))
        return resized(images, w, h, self.args.task_size, rng)

    def __getitem__(self, n):
        args, rng = self.args, random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.pairs))
        order = common.shuffled(len(self.pairs), common.mix(args.seed, "epoch", epoch))
        picture, label = self.pairs[order[i]]
        picture, label = common.open_rgb(picture), open_label(label, args)
        sample = self.tensors([picture, label], self.first[0], rng)
        if self.target:
            sample += self.tensors([common.open_rgb(rng.choice(self.target))], self.first[1], rng)
        return sample

    def __len__(self):
        return len(self.pairs)


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("synthetic2real", args.size)
    # GTA5 comes in twenty archives, Cityscapes after registration: no name is known
    return common.find_data(args.data, LAYOUT, {}, draw_toy)


# ==== 5. One training step ====================================================================


def train_step(nets, x_s, x_t, args, rng):
    """Stage pixel: one update of G_ST and G_TS, then one of D_S and D_T; losses by name.

    rng: CPU generator for the buffers. As in cyclegan.py, but for Eq. (3.13).
    """
    G_ST, G_TS, D_S, D_T = nets.G_ST, nets.G_TS, nets.D_S, nets.D_T
    autocast = functools.partial(torch.autocast, x_s.device.type, torch.bfloat16, enabled=args.amp)

    # ---- arg min over G_ST and G_TS: fool both Ds, and undo each other ------------------------
    for D in (D_S, D_T):
        D.requires_grad_(False)                       # they judge here, and learn below
    with autocast():
        x_st = G_ST(x_s)                                              # (B, 3, H, W)
        x_ts = G_TS(x_t)                                              # (B, 3, H, W)
        x_sts = G_TS(x_st)                                            # (B, 3, H, W), should be x_s
        x_tst = G_ST(x_ts)                                            # (B, 3, H, W), should be x_t
        L_GAN_ST = lsgan(D_T(x_st), 1.0)                              # Eq. (3.11), for G_ST
        L_GAN_TS = lsgan(D_S(x_ts), 1.0)                              # Eq. (3.11), for G_TS
    L_cyc = cycle_loss(x_s, x_sts) + cycle_loss(x_t, x_tst)           # Eq. (3.12)
    losses, L_sem = {"L_GAN_ST": L_GAN_ST, "L_GAN_TS": L_GAN_TS, "L_cyc": L_cyc}, 0.0
    if args.lambda_sem > 0:                           # f_S shall read the same before and after
        f_S = nets.f_S
        with autocast():
            L_sem_T = task_loss(f_S(x_ts), hard_labels(f_S, x_t))     # Eq. (3.13), first term
            L_sem_S = task_loss(f_S(x_st), hard_labels(f_S, x_s))     # Eq. (3.13), second term
        L_sem = L_sem_T + L_sem_S
        losses |= {"L_sem_T": L_sem_T, "L_sem_S": L_sem_S}
    L = (L_GAN_ST + L_GAN_TS + args.lambda_cyc * L_cyc                # Eq. (3.14) less f_T's term,
         + args.lambda_sem * L_sem)                                   # and Eq. (3.13), the option
    nets.opt_G.zero_grad()
    L.backward()
    nets.opt_G.step()                                                 # Eq. (3.15), min over both G

    # ---- arg max over D_S and D_T: tell real pictures from translated ones, new and old -------
    for D in (D_S, D_T):
        D.requires_grad_(True)
    shown_T, shown_S = nets.pool_T.exchange(x_st, rng), nets.pool_S.exchange(x_ts, rng)
    with autocast():                                  # CHOICE (code): halved, which Adam ignores
        L_D_T = (lsgan(D_T(x_t), 1.0) + lsgan(D_T(shown_T), 0.0)) / 2         # Eq. (3.11), for D_T
        L_D_S = (lsgan(D_S(x_s), 1.0) + lsgan(D_S(shown_S), 0.0)) / 2         # Eq. (3.11), for D_S
    nets.opt_D.zero_grad()
    (L_D_T + L_D_S).backward()
    nets.opt_D.step()                                                 # Eq. (3.15), max over both D
    return losses | {"L_D_T": L_D_T, "L_D_S": L_D_S}


def task_step(f, opt, x, y, args):
    """Stages source, task, oracle: one update of f on x (B, 3, H, W) and labels y (B, H, W)."""
    f.train()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        scores = f(x)                                                 # (B, N, H, W)
    L_task = task_loss(scores, y)                     # Eq. (3.14), first term, where x is G_ST(x_s)
    opt.zero_grad()
    L_task.backward()
    opt.step()                                                        # Eq. (3.15), arg min over f_T
    return {"L_task": L_task}


def feature_step(nets, x_st, y_s, x_t, args):
    """Stage feature: f_T's scores shall not tell the domains apart; losses by name.

    x_st: translated source pictures, y_s their labels. One update of D_feat; then, only while
    D_feat can tell the domains apart (else there is nothing to learn from it), one of f_T against
    D_feat and one on the labels. CHOICE (code): f_T is in training mode throughout, so that batch
    norm averages both domains, and drop-out is on.
    """
    f_T, D_feat = nets.f_T.train(), nets.D_feat.train()
    autocast = functools.partial(torch.autocast, x_t.device.type, torch.bfloat16, enabled=args.amp)

    # ---- D_feat: are these the scores of a source picture? -------------------------------------
    with autocast():
        with torch.no_grad():  # CHOICE (code): f_T's scores of x_st, where Fig. 3.33 has f_S's
            scores_s, scores_t = f_T(x_st), f_T(x_t)                  # (B, N, H, W) each
        logits_s, logits_t = D_feat(scores_s), D_feat(scores_t)       # (B, 2, H, W) each
    # CHOICE (code): a mean over both domains, not the sum of two expectations
    L_D_feat = (domain_loss(logits_s, SOURCE) + domain_loss(logits_t, TARGET)) / 2
    nets.opt_D.zero_grad()
    L_D_feat.backward()
    nets.opt_D.step()
    accuracy = ((logits_s.argmax(1) == SOURCE).float().mean()
                + (logits_t.argmax(1) == TARGET).float().mean()) / 2
    losses = {"L_D_feat": L_D_feat, "accuracy": accuracy, "L_task": task_loss(scores_s, y_s),
              "L_GAN_feat": domain_loss(logits_t, SOURCE)}
    if not nets.gate.opens(accuracy, args.feature_gate):
        return losses | {"updated": torch.zeros_like(accuracy)}

    # ---- f_T: target scores shall look like the source's, and source labels still be found -----
    D_feat.requires_grad_(False)
    with autocast():
        L_GAN_feat = domain_loss(D_feat(f_T(x_t)), SOURCE)            # Fig. 3.33, labels flipped
    nets.opt_f.zero_grad()
    (args.lambda_feature * L_GAN_feat).backward()
    nets.opt_f.step()
    D_feat.requires_grad_(True)
    losses |= {"L_GAN_feat": L_GAN_feat, "updated": torch.ones_like(accuracy)}
    return losses | task_step(f_T, nets.opt_f, x_st, y_s, args)


# ==== 6. Training loop ========================================================================


def train(args):
    """The stages one after another, each an ordinary run in a folder of its own; then the table."""
    args.weights = None if args.resume else args.weights  # they gave the flags
    run, data = Run("cycada", args), load_data(args)
    if args.data != "toy" and args.task_weights == "random":
        print("--task-weights random: without ImageNet's weights, task models stay far weaker")
    stages = [stage for stage in STAGES if stage in args.stage]
    chain = ["source"] * (args.lambda_sem > 0) + ["pixel", "task", "feature"]  # each reads the last
    if not args.resume:
        set_aside(stages, run)
    for stage in stages:
        learn = {"pixel": train_pixel, "feature": train_feature}.get(stage, train_task)
        total = {"pixel": args.steps, "feature": args.feature_steps}.get(stage, args.task_steps)
        if stage == "oracle" and data["target"][0][1] is None:
            print("no label maps of the target's training pictures: no oracle")
        elif not args.resume or result_of(stage, args)["steps"] < total:
            set_aside(chain[chain.index(stage) + 1:] if stage in chain else [], run)  # outdated
            learn(stage, data, args)
    report(run, args)


def set_aside(stages, run):
    """Give what these stages have learnt other names before a --resume can take it for done: all
    of it or, where another run is writing, nothing (`UserError`)."""
    if run.rank == 0:  # the others wait in `begin`
        folders = [f for f in map(run.folder.joinpath, stages) if (f / "last.pt").exists()]
        for folder in folders:
            common.locked(folder).close()
        for folder in folders:
            common.set_aside(folder)


def begin(stage, args, batch):
    """The Run of a stage, with a folder, a batch and a --resume of its own."""
    last = Path(args.run_folder, stage, "last.pt")
    own = argparse.Namespace(**vars(args) | {
        "run_folder": str(last.parent), "batch": batch, "resume": args.resume and last.exists()})
    run = Run("cycada", own, CHANCE | {"L_task": math.log(len(args.classes))})
    run.config["batch"] = args.batch  # as given: any stage's last.pt serves --resume
    if run.rank == 0:
        print(f"---- stage {stage} ----", flush=True)
    if run.world > 1:
        dist.barrier()  # what the first process has written of earlier stages is there
    return run


def network(path, name, args, device):
    """G_ST, G_TS, f_S or f_T from a stage's last.pt, for use: built by its flags; `UserError`."""
    if not Path(path).exists():
        raise UserError(f"{path}: not there; --stage {Path(path).parent.name} comes first")
    state = common.load_checkpoint(path, "cycada")
    its = argparse.Namespace(**vars(args) | {flag: state["config"].get(flag) for flag in (
        "ngf", "blocks", "antialias_G", "task_model", "classes")})
    if name[0] == "f" and its.classes != args.classes:
        raise UserError(f"{path}: its --classes were {its.classes}, now they are {args.classes}")
    net = (ResnetGenerator(its.ngf, its.blocks, its.antialias_G) if name[0] == "G"
           else task_model(its))
    common.load_parts({name: net}, state["parts"], path)
    return net.to(device).eval().requires_grad_(False)


def sgd(net, args, lr):
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=args.task_momentum,
                           weight_decay=5e-4)  # (code)


def train_pixel(stage, data, args):
    """A CycleGAN between the domains."""
    run = begin(stage, args, args.batch)
    nets = build(args, run.device)
    if args.lambda_sem > 0:
        nets.f_S = network(Path(args.run_folder, "source/last.pt"), "f_S", args, run.device)
    run.resume_or_start({name: part for name, part in vars(nets).items() if name != "f_S"})
    for step, (x_s, x_t) in run.steps(Unpaired(data["source"], data["target"], args), args.steps):
        if step % args.sample_every == 0:
            run.save_samples(pixel_columns(nets, data, args, run.device))
        for optimiser in (nets.opt_G, nets.opt_D):                    # Sec. 3.2.4
            optimiser.param_groups[0]["lr"] = args.lr * common.rate(step, args.steps, 0.5)
        run.log(train_step(nets, x_s, x_t, args, run.rng()))
    run.save_samples(pixel_columns(nets, data, args, run.device))
    run.finish([])


def train_task(stage, data, args):
    """Stages source, task and oracle differ in what they learn from, and in nothing else."""
    run, name = begin(stage, args, args.task_batch), "f_S" if stage == "source" else "f_T"
    pairs = data["target" if stage == "oracle" else "source"]
    if stage == "task":
        pairs = translated_pairs(pairs, args, run)                    # (G_ST(X_S), Y_S)
    f = task_model(args, args.task_weights).to(run.device)
    opt, total = sgd(f, args, args.task_lr), args.task_steps
    run.resume_or_start({name: f, "opt": opt})
    for step, (x, y) in run.steps(Labelled(pairs, args), total):
        if step % args.sample_every == 0:
            run.save_samples(label_columns({name: f}, data, args, run.device))
        opt.param_groups[0]["lr"] = args.task_lr * common.rate(step, total, args.task_decay_from)
        run.log(task_step(f, opt, x, y, args))
    run.save_samples(label_columns({name: f}, data, args, run.device))
    run.finish(row_of_table(f, data["test"], args, run.device))


def train_feature(stage, data, args):
    """f_T goes on, on translated source and on target pictures."""
    run = begin(stage, args, args.batch)
    f_T = network(Path(args.run_folder, "task/last.pt"), "f_T", args, run.device)
    f_T.requires_grad_(True)
    pairs = translated_pairs(data["source"], args, run)
    torch.manual_seed(args.seed)
    D_feat = ScoreDiscriminator(len(args.classes)).to(run.device)
    nets = SimpleNamespace(f_T=f_T, D_feat=D_feat, opt_f=sgd(f_T, args, args.feature_lr),
                           opt_D=sgd(D_feat, args, args.feature_lr), gate=Gate())
    run.resume_or_start(vars(nets))
    samples = Labelled(pairs, args, [picture for picture, _ in data["target"]])
    for step, (x_st, y_s, x_t) in run.steps(samples, args.feature_steps):
        if step - nets.gate.last_update >= len(samples):              # CHOICE (code)
            print(f"stopped at step {step}: f_T has learnt nothing for {len(samples)} steps, as "
                  "D_feat cannot tell the domains apart")
            break
        if step % args.sample_every == 0:
            run.save_samples(label_columns({"f_T": f_T}, data, args, run.device))
        run.log(feature_step(nets, x_st, y_s, x_t, args))
    run.save_samples(label_columns({"f_T": f_T}, data, args, run.device))
    run.finish(row_of_table(f_T, data["test"], args, run.device))


@torch.no_grad()
def translated_pairs(source, args, run):
    """(G_ST(X_S), Y_S) of Eq. (3.14): every x_s as pixel/translated/NAME.png, made once and made
    anew if G_ST or x_s is newer or it is not --load wide, with its old label map."""
    weights = Path(args.run_folder, "pixel/last.pt")
    folder, G_ST = weights.parent / "translated", network(weights, "G_ST", args, run.device)
    pairs = [(folder / f"{picture.stem}.png", label) for picture, label in source]
    folder.mkdir(exist_ok=True)
    for n in range(run.rank, len(source), run.world):
        file_s, file_st = source[n][0], pairs[n][0]
        newest = max(f.stat().st_mtime for f in (weights, file_s))
        if (not file_st.exists() or file_st.stat().st_mtime < newest
                or common.opened(file_st, size_only=True)[0] != args.load):
            x_s = picture_tensor(file_s, args.load).to(run.device)    # (1, 3, H, W)
            x_st = common.to_pil(translate(G_ST, x_s, args)[0])
            common.write_whole(file_st, functools.partial(x_st.save, format="PNG"))
    return pairs


# ==== 7. Translate and evaluate ===============================================================


@torch.no_grad()
def translate(G, x, args):  # same as cyclegan.py: translate
    """G(x) for x (N, 3, H, W) of any size, in [-1, 1], one picture at a time: padded to G's
    multiple, cropped back."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        return torch.cat([common.same_size(G, one, G.multiple).float().clamp(-1, 1)
                          for one in x.split(1)])


@torch.no_grad()
def segment(f, x, args, size=None):
    """Classes (B, H, W) of pictures x (B, 3, H, W), which f sees with a short side of --task-load.

    size: (H, W) of the answer, if not that of x.
    """
    f.eval()
    scale, size = args.task_load / min(x.shape[2:]), size or x.shape[2:]
    if scale != 1:
        x = F.interpolate(x, size=[round(n * scale) for n in x.shape[2:]], mode="bicubic",
                          antialias=True)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        scores = full(f(x))                                           # (B, N, H', W')
    return F.interpolate(scores, size=size, mode="bilinear").argmax(1)


def picture_tensor(path, width=None):
    """A picture as (1, 3, H, W), resized to a width."""
    im = common.open_rgb(path)
    width = width or im.width
    return common.to_tensor(im.resize((width, round(im.height * width / im.width)),
                                      Image.BICUBIC))[None]


def shown(pairs, width):
    """Six of the pairs, evenly spaced as neighbours are often frames of one video, and their
    pictures (n, 3, H, W), all of the first one's size."""
    n = min(6, len(pairs))
    pairs = [pairs[i * len(pairs) // n] for i in range(n)]
    x = [picture_tensor(picture, width) for picture, _ in pairs]
    return pairs, torch.cat([F.interpolate(one, x[0].shape[2:], mode="bilinear") for one in x])


def colours(y, N):
    """Label maps (B, H, W) -> pictures (B, 3, H, W) in [-1, 1]: a hue per class, black for 255."""
    palette = [colorsys.hsv_to_rgb((0.58 + 0.618 * k) % 1, 0.75 - 0.3 * (k % 2),
                                   0.95 - 0.25 * (k % 3)) for k in range(N)]
    palette = torch.tensor([*palette, (0, 0, 0)]) * 2 - 1
    return palette[y.cpu().clamp(max=N)].permute(0, 3, 1, 2)


def label_columns(nets, data, args, device):
    """Columns of a sample grid: x_t, label maps by each of the nets, and the truth, which is for
    the eye alone."""
    (pairs, x), N = shown(data["test"] or data["target"], args.load), len(args.classes)
    columns = {"x_t": x} | {name: colours(segment(f, x.to(device), args), N)
                            for name, f in nets.items()}
    if pairs[0][1]:
        size = (x.shape[3], x.shape[2])
        truth = [open_label(y, args).resize(size, Image.NEAREST) for _, y in pairs]
        columns["truth"] = colours(torch.from_numpy(np.stack(truth)).long(), N)
    return columns


def pixel_columns(nets, data, args, device):
    """Columns of a sample grid, as in Fig. 3.34: both domains, translated, and back again."""
    (_, x_s), (_, x_t) = (shown(data[side], args.load) for side in ("source", "target"))
    rows = min(len(x_s), len(x_t))
    x_t = F.interpolate(x_t, x_s.shape[2:], mode="bilinear")          # a grid has one size
    x_s, x_t = x_s[:rows].to(device), x_t[:rows].to(device)
    x_st, x_ts = translate(nets.G_ST, x_s, args), translate(nets.G_TS, x_t, args)
    return {"x_s": x_s, "G_ST(x_s)": x_st, "G_TS(G_ST(x_s))": translate(nets.G_TS, x_st, args),
            "x_t": x_t, "G_TS(x_t)": x_ts, "G_ST(G_TS(x_t))": translate(nets.G_ST, x_ts, args)}


def confusion(predicted, y, N):
    """n_ij of Sec. 3.4.3, (N, N): pixels of class i predicted as j; label 255 is left out."""
    known = y != 255
    return torch.bincount(N * y[known] + predicted[known], minlength=N * N).view(N, N)


def metrics(n, names):
    """Sec. 3.4.3 from n (N, N): {'mIoU', 'fwIoU', 'pixel acc.', 'IoU of NAME'} in per cent."""
    n = n.double()
    t, n_ii = n.sum(1), n.diagonal()
    # CHOICE (code): fwIoU has the weight t_i that the print lacks; a class that is neither there
    # nor predicted has IoU 0, and counts in mIoU
    IoU = 100 * n_ii / (t + n.sum(0) - n_ii).clamp(min=1)
    return {"mIoU": IoU.mean(), "fwIoU": (t * IoU).sum() / t.sum(),
            "pixel acc.": 100 * n_ii.sum() / t.sum(),
            **{f"IoU of {name}": v for name, v in zip(names, IoU, strict=True)}}


def row_of_table(f, pairs, args, device):
    """The scores of f on the test pictures: a row of Tab. 3.7, beside a constant answer's."""
    if not pairs:
        return []
    names = class_ids(args)
    n = torch.zeros(len(names), len(names), dtype=torch.long)
    for picture, label in pairs:
        y = torch.from_numpy(np.array(open_label(label, args))).long()[None]          # (1, H, W)
        x = picture_tensor(picture).to(device)                                     # (1, 3, H, W)
        n += confusion(segment(f, x, args, y.shape[1:]).cpu(), y, len(names))
    constant = torch.zeros_like(n)
    constant[:, n.sum(1).argmax()] = n.sum(1)
    trivial = metrics(constant, names)
    return [{"name": name, "value": float(value), "better": "higher",
             "trivial": {"most frequent class": float(trivial[name])}}
            for name, value in metrics(n, names).items()]


def result_of(stage, args):
    """The result.json of a stage, or one of no steps."""
    path, nothing = Path(args.run_folder, stage, "result.json"), {"steps": 0, "seconds": 0.0}
    return json.loads(path.read_text()) if path.exists() else nothing | {"scores": []}


def report(run, args):
    """Tab. 3.7: the scores of the last stage that was asked for (the oracle's only if it was alone)
    beside those of all others in the run folder: printed, and kept as result.json."""
    found = {stage: result_of(stage, args) for stage in STAGES}
    run.step = sum(found[stage]["steps"] for stage in {*args.stage})
    run.seconds = sum(found[stage]["seconds"] for stage in {*args.stage})
    scored = [stage for stage in ("feature", "task", "source", "oracle")
              if stage in args.stage and found[stage]["scores"]]
    if not scored:
        return run.finish([])
    table = found[scored[0]]["scores"]
    for score in table:
        score["trivial"] |= {STAGES[stage]: its["value"] for stage in STAGES if stage != scored[0]
                             for its in found[stage]["scores"] if its["name"] == score["name"]}
    if run.rank == 0:
        print(f"---- {STAGES[scored[0]]}, beside all others ----")
    run.finish(table)


def from_weights(args, device):
    """(name, network) of --weights: f_S or f_T; of stage pixel G_ST, or --direction TtoS's G_TS."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: the last.pt of a stage")
    parts = common.load_checkpoint(args.weights, "cycada")["parts"]
    wanted = ["G_TS" if args.direction == "TtoS" else "G_ST", "f_S", "f_T"]
    name = next((name for name in wanted if name in parts), "f_T")
    return name, network(args.weights, name, args, device)


def translate_files(args):
    """Translate --translate (a picture or a folder of them), each at its own size, to PNG: by G, or
    with the weights of a task model into coloured label maps."""
    device = common.pick_device(args.device)
    name, net = from_weights(args, device)
    common.TRAINED = math.inf  # a short side; but `segment` resizes, and --load is a width
    if name[0] == "f" and args.side:
        raise UserError("--side: task models see --task-load, and answer at the picture's size")

    def answer(x):
        if name[0] == "f":
            return colours(segment(net, x.to(device), args), len(args.classes))
        h, w = x.shape[2:]
        scale = max(args.load / w, args.size / min(h, w))  # of Unpaired
        if scale < 0.5 and not args.side:
            common.remark("side", f"{w}x{h} pixels: more than twice the scale of the training; "
                                  f"--side {round(min(h, w) * scale)} is it")
        return translate(net, x.to(device), args)

    common.translate_files(args.translate, args.out or "translated", answer)


def evaluate(args):
    """A row of Tab. 3.7 for the task model in --weights, on the test pictures of --data."""
    device = common.pick_device(args.device)
    name, f = from_weights(args, device)
    if name[0] == "G":
        raise UserError("--evaluate: expected the --weights of a stage that trains a task model, "
                        "not of pixel")
    pairs = find_pairs(data_folder(args), args.split, args, True)
    common.print_scores(row_of_table(f, pairs, args, device))


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
