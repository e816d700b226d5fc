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
             D_S, D_T              D_S, D_T          (B, 3, H, W) -> logits (B, 1, H', W')
             p(f, x) = argmax f(x) hard_labels(f, x) (B, H, W)
             n_ij                  n                 (N, N): pixels of class i predicted as j

OBJECTIVE    Eq. (3.10) L_task(f_S, X_S, Y_S) = -E sum_k 1[k = y_s] log softmax_k f_S(x_s)
             Eq. (3.11) L_GAN(G_ST, D_T, X_T, X_S) = E log D_T(x_t) + E log(1 - D_T(G_ST(x_s)))
             Eq. (3.12) L_cyc = E |G_TS(G_ST(x_s)) - x_s|_1 + E |G_ST(G_TS(x_t)) - x_t|_1
             Eq. (3.13) L_sem = L_task(f_S, G_TS(X_T), p(f_S, X_T))
                              + L_task(f_S, G_ST(X_S), p(f_S, X_S)), an option
             Eq. (3.14) L = L_task(f_T, G_ST(X_S), Y_S) + both L_GAN + L_cyc
             Eq. (3.15) f_T* = arg min_f_T min_(G_ST, G_TS) max_(D_S, D_T) L

CHOICES      where the text is silent, or differs from what the authors ran (their released code):
             Least squares replace the logs, L_cyc has weight 10: CycleGAN's, as in the code.
             Eq. (3.15) is solved in stages (Sec. 3.4.3), each in a folder of its run: source (f_S),
             pixel (G, D; then all x_s are translated once), target (f_T), oracle.
             f_T starts where f_S started, not from f_S. Last weights count.
             Eq. (3.13) was "left as an idea". --semantic literal: as printed; gated: as in the
             code of the digits, with true y_s, a task model that learns along, and no such term
             before its loss is below 1. Both can hurt (and do on toy data): the judge errs on x_t
             and asks G_TS for pictures in which it reads the same errors.
             Feature adaptation is in the ICML paper and not in the text: --feature-adaptation.
             The printed fwIoU lacks the weight t_i; here as in the code.
             A class that is absent and never predicted has IoU 0 (code), and counts in mIoU.
             Not given: epochs of the CycleGAN (its own 200). Crops of 400 from pictures 1024 wide.

USAGE        python cycada.py                                     # toy world, table at the end
             python cycada.py --data gta2cityscapes               # the layout is in LAYOUT, below
             python cycada.py --data camvid --source-names 0016E5 0006R0 Seq05VD
                 --target-names 0001TP --label-ids 0 1 2 3 4 5 6 7 8 9 10 --class-names sky ...
             python cycada.py --translate photo.jpg --weights runs/cycada-toy/last.pt
EXPECT       python cycada.py: 4.5 minutes of one CPU core; on the target mIoU 5 (source only), 55
             (CyCADA), 74 (oracle), pixel accuracy 11, 87, 95; thin things (grass, trunks) stay bad.
"""

import argparse
import colorsys
import functools
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
from common import BlurDown, InstanceNorm, PatchGAN, Run, UserError, full, rate, shuffled

LAYOUT = ("source_img/ source_label/ target_img/ and, for the scores, test_img/ test_label/ and, "
          "for the oracle, target_label/; label maps are one-channel pictures named like theirs. "
          "With --source-names and --target-names: {train,val,test}_{img,label}/")
KNOWN = {}  # GTA5 comes in twenty archives, Cityscapes after registration

# =============================================================================================
# 1. Configuration
# =============================================================================================

MAKES = {  # Sec. 3.4.3: the stages in their order, and the networks that each leaves
    "source": ("f_S",), "pixel": ("G_ST", "G_TS"), "target": ("f_T",), "feature": ("f_feature",),
    "oracle": ("f_oracle",)}
ROWS = {"source only": "f_S", "CyCADA": "f_T", "CyCADA + feature": "f_feature",
        "oracle": "f_oracle"}  # of Tab. 3.7
CITYSCAPES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light",
              "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
              "bus", "train", "motorbike", "bicycle")  # Tab. 3.8
TOY = {"size": 64, "load": 64, "batch": 2, "steps": 1200, "lr": 5e-4, "ngf": 16, "ndf": 16,
       "blocks": 4, "antialias_D": True, "task_model": "small", "task_load": 64, "task_size": 64,
       "task_batch": 8, "task_steps": 300, "task_lr": 0.1, "task_momentum": 0.9,
       "task_decay_from": 0.3, "task_weights": "random", "feature_lr": 1e-2, "feature_steps": 200,
       "feature_width": 64, "workers": 0, "sample_every": 300,
       "class_names": ["sky", "hill", "ground", "trunk", "leaves", "grass", "animal"]}


def get_args(argv=None):
    """Flags in layers: the paper's defaults < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--stages", nargs="+", choices=list(MAKES), default=["source", "pixel", "target", "oracle"],
        help="Sec. 3.4.3: what to run; with --resume a stage finds what earlier ones left")
    add("--source-names", nargs="+", default=None, metavar="PREFIX",
        help="the source is every picture of {train,val,test}_img whose name begins so")
    add("--target-names", nargs="+", default=None, metavar="PREFIX",
        help="the target is every picture whose name begins so: train and val to adapt, test to "
             "score")
    add("--class-names", nargs="+", default=list(CITYSCAPES), metavar="NAME",
        help="of classes 0, 1, ... (Tab. 3.8)")
    add("--label-ids", nargs="+", type=int, default=None, metavar="ID",
        help="what stands for classes 0, 1, ... in the label files; all else is ignored "
             "(0, 1, ... if not given; then only 255 is ignored)")
    # ---- stage pixel
    add("--semantic", choices=["off", "literal", "gated"], default="off",
        help="Eq. (3.13): off (Sec. 3.4.3), as printed, or as in the code of the digits")
    add("--lambda-sem", type=float, default=1.0, help="weight of Eq. (3.13) (code)")
    add("--lambda-cyc", type=float, default=10.0, help="weight of Eq. (3.12) (Sec. 3.2.4)")
    add("--size", type=int, default=400, help="crop of stage pixel (code)")
    add("--load", type=int, default=1024, help="width of pictures in stage pixel (code)")
    add("--batch", type=int, default=1, help="pictures per step and process, pixel (Sec. 3.2.4)")
    add("--epochs", type=int, default=200, help="of stage pixel, over the source (Sec. 3.2.4)")
    add("--steps", type=int, default=None, help="updates of stage pixel; overrides --epochs")
    add("--decay-from", type=float, default=0.5, help="fraction of pixel with a constant rate")
    add("--lr", type=float, default=2e-4, help="Adam's rate in stage pixel (Sec. 3.2.4)")
    add("--beta1", type=float, default=0.5, help="Adam's first decay (code)")
    add("--ngf", type=int, default=64, help="width of G_ST and G_TS (code)")
    add("--ndf", type=int, default=64, help="width of D_S and D_T (code)")
    add("--blocks", type=int, default=9, help="residual blocks of G_ST and G_TS (Sec. 3.2.4)")
    add("--antialias-G", action=switch, default=False, help="blur before down- and upsampling in G")
    add("--antialias-D", action=switch, default=False, help="blur before downsampling in D")
    add("--pool", type=int, default=50, help="generated pictures kept for D (Sec. 3.2.4)")
    # ---- the task models of stages source, target, oracle
    add("--task-model", choices=list(TASK_MODELS), default="fcn8s",
        help="Tab. 3.8: fcn8s is A, drn26 is B; small is for toy data")
    add("--task-weights", default="imagenet", metavar="W",
        help="first weights: imagenet, a file, or random (much weaker)")
    add("--task-load", type=int, default=1024, help="short side for task models (code)")
    add("--task-size", type=int, default=768, help="their crop (code); tests see whole pictures")
    add("--task-batch", type=int, default=2, help="pictures per step and process (code)")
    add("--task-steps", type=int, default=100_000, help="updates of each task model (code)")
    add("--task-lr", type=float, default=1e-3, help="rate of SGD (code)")
    add("--task-momentum", type=float, default=0.99, help="momentum of SGD (code)")
    add("--task-decay-from", type=float, default=1.0, help="fraction with a constant rate (code)")
    # ---- feature adaptation
    add("--feature-adaptation", action=switch, default=False,
        help="after stage target: align the scores of f_T on both domains (ICML paper)")
    add("--feature-lr", type=float, default=1e-5, help="rate of SGD, for f_T and D_feat (code)")
    add("--feature-steps", type=int, default=100_000, help="updates of D_feat (code)")
    add("--feature-width", type=int, default=512, help="channels of D_feat (code)")
    add("--feature-gate", type=float, default=0.6,
        help="f_T learns while D_feat is right more often than this (code)")
    add("--lambda-feature", type=float, default=0.1, help="weight of f_T's adversarial loss (code)")
    # ---- use
    add("--direction", choices=["StoT", "TtoS", "labels"], default="StoT",
        help="--translate: by G_ST, by G_TS, or into a coloured label map by f_T")

    args = common.parse_flags(p, argv, "cycada", lambda a: TOY if a.data == "toy" else {}, run_name)
    if args.size < 32 or args.size % 4:
        raise UserError(f"--size {args.size}: must be at least 32 and a multiple of 4")
    if not 16 <= args.task_size <= args.task_load:
        raise UserError(f"--task-size {args.task_size}: must be from 16 to --task-load "
                        f"{args.task_load}")
    for name in ("task_batch", "task_steps", "feature_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.pool < 0:
        raise UserError(f"--pool {args.pool}: must be 0 (no buffer) or more")
    if args.label_ids and len(args.label_ids) != len(args.class_names):
        raise UserError(f"--label-ids: {len(args.label_ids)} ids for the {len(args.class_names)} "
                        "classes of --class-names")
    if args.feature_adaptation and "feature" not in args.stages:
        args.stages = [*args.stages, "feature"]
    if args.label_ids and not 0 <= min(args.label_ids) <= max(args.label_ids) < 2**16:
        raise UserError(f"--label-ids {args.label_ids}: ids are from 0 to 65535")
    if args.source_names and args.split != "test":
        raise UserError(f"--split {args.split}: with --source-names those pictures are trained on")
    if (args.source_names is None) != (args.target_names is None):
        raise UserError("--source-names and --target-names belong together")
    return args


def run_name(args):
    return f"cycada-{Path(args.data).name}"


# =============================================================================================
# 2. Networks
# =============================================================================================


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
    """CycleGAN's network (Sec. 3.2.4): x (B, 3, H, W) -> (B, 3, H, W) in [-1, 1].

    H and W are multiples of 4. 11.38 M parameters with 9 blocks.
    """

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


def imagenet_normalised(x):
    """[-1, 1] -> the input range of networks that were trained on ImageNet."""
    mean = x.new_tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = x.new_tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return ((x + 1) / 2 - mean) / std


class BilinearUp(nn.Module):
    """Fixed bilinear upsampling as a transposed convolution without padding (Long et al. 2015).

    (B, C, h, w) -> (B, C, f (h + 1), f (w + 1)) for a factor f.
    """

    def __init__(self, factor):
        super().__init__()
        row = 1 - (torch.arange(2 * factor) - (factor - 0.5)).abs() / factor
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)
        self.factor = factor

    def forward(self, x):
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=self.factor, groups=x.shape[1])


class FCN8s(nn.Module):
    """Tab. 3.8 A: VGG16 as a fully convolutional net (Long et al. 2015), 134.35 M parameters.

    x (B, 3, H, W) in [-1, 1], any size -> scores (B, classes, H, W). Coarse scores from 1/32 are
    refined by those of pool4 (1/16) and pool3 (1/8).
    """

    def __init__(self, classes):
        super().__init__()

        def block(*widths):
            convs = [layer for a, b in zip(widths, widths[1:], strict=False)
                     for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(inplace=True))]
            return [*convs, nn.MaxPool2d(2, ceil_mode=True)]

        self.to_pool3 = nn.Sequential(*block(3, 64, 64), *block(64, 128, 128),
                                      *block(128, 256, 256, 256))
        self.to_pool4 = nn.Sequential(*block(256, 512, 512, 512))
        self.to_pool5 = nn.Sequential(*block(512, 512, 512, 512))
        self.head = nn.Sequential(
            nn.Conv2d(512, 4096, 7), nn.ReLU(inplace=True), nn.Dropout2d(0.5),
            nn.Conv2d(4096, 4096, 1), nn.ReLU(inplace=True), nn.Dropout2d(0.5),
            nn.Conv2d(4096, classes, 1))
        self.score_pool4, self.score_pool3 = (nn.Conv2d(c, classes, 1) for c in (512, 256))
        self.up2, self.up8 = BilinearUp(2), BilinearUp(8)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.score_pool4.weight)  # so that training begins with the coarse scores
        nn.init.zeros_(self.score_pool3.weight)

    def forward(self, x):
        h, w = x.shape[2:]
        x = F.pad(imagenet_normalised(x), (99,) * 4)  # room for the unpadded 7x7 of the head
        pool3 = self.to_pool3(x)
        pool4 = self.to_pool4(pool3)
        score = self.up2(self.head(self.to_pool5(pool4)))               # 1/16
        score = score + cropped(self.score_pool4(0.01 * pool4), score, 5)
        score = self.up2(score)                                         # 1/8
        score = score + cropped(self.score_pool3(0.0001 * pool3), score, 9)
        return self.up8(score)[:, :, 31:31 + h, 31:31 + w]              # (B, classes, H, W)

    def load_imagenet(self, state):
        """Fill all but the scores from torchvision's VGG16; its linear layers become the head."""
        convs = [m for m in self.modules() if isinstance(m, nn.Conv2d)][:15]
        names = [k for k in state if k.startswith("features.")] + [
            f"classifier.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")]
        for p, name in zip((p for c in convs for p in (c.weight, c.bias)), names, strict=True):
            p.data.copy_(state[name].reshape(p.shape))


def cropped(x, like, offset):
    """The part of x that begins at (offset, offset) and has the size of `like`."""
    h, w = like.shape[2:]
    return x[:, :, offset:offset + h, offset:offset + w]


class SmallFCN(nn.Module):
    """For toy data: four scales, whose scores are added up; 165 k parameters with 7 classes."""

    def __init__(self, classes):
        super().__init__()

        def block(a, b):
            return nn.Sequential(*[layer for c in (a, b) for layer in (
                nn.Conv2d(c, b, 3, padding=1, bias=False), nn.BatchNorm2d(b),
                nn.ReLU(inplace=True))])

        widths = (3, 16, 32, 64, 64)
        self.blocks = nn.ModuleList(map(block, widths[:-1], widths[1:]))
        self.scores = nn.ModuleList(nn.Conv2d(c, classes, 1) for c in widths[1:])

    def forward(self, x):
        size, total = x.shape[2:], 0.0
        for i, (block, score) in enumerate(zip(self.blocks, self.scores, strict=True)):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if i > 0 else x)
            total = total + F.interpolate(score(x), size=size, mode="bilinear")
        return total                                                    # (B, classes, H, W)


def drn26(classes):
    """Tab. 3.8 B: dilated residual network (Yu et al. 2017), 20.62 M parameters."""
    return common.lab("segmenters", "--task-model drn26").DRN26(classes)


TASK_MODELS = {"fcn8s": FCN8s, "drn26": drn26, "small": SmallFCN}


def task_model(args, device, weights="random"):
    """A new f; the same seed gives f_S, f_T and the oracle the same start."""
    torch.manual_seed(args.seed)
    f = TASK_MODELS[args.task_model](len(args.class_names))
    if weights != "random":
        state = imagenet_state(args)
        try:
            f.load_imagenet(state)
        except (AttributeError, KeyError, RuntimeError, ValueError):
            raise UserError(f"--task-weights {weights}: not the weights of an ImageNet network for "
                            f"--task-model {args.task_model}") from None
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    f = f.to(device, memory_format=layout)
    if args.compile:
        f.forward = torch.compile(f.forward)
    return f


def imagenet_state(args):
    """The state dict that --task-weights names; `UserError` if it cannot be had."""
    if args.task_weights != "imagenet":
        return common.load_file(args.task_weights)
    if args.task_model != "fcn8s":
        raise UserError(f"--task-weights imagenet: there are none to download for --task-model "
                        f"{args.task_model}; give a FILE (drn26: the DRN authors' drn_c_26) or "
                        "random")
    from torchvision.models import VGG16_Weights

    source = VGG16_Weights.IMAGENET1K_V1
    try:
        return source.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a wrong hash
        cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(source.url).name
        raise UserError(f"--task-weights imagenet: cannot download {source.url} ({error}); put "
                        f"that file at {cache}, or use --task-weights FILE or random") from None


class ScoreDiscriminator(nn.Module):
    """D_feat of the ICML paper: scores (B, classes, H, W) -> domain logits (B, 2, H, W), per pixel.

    Class 1 is the source. It remembers its last 100 accuracies, by which f_T's learning is gated.
    """

    def __init__(self, classes, width=512):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(classes, width, 1), nn.Dropout2d(0.5), nn.ReLU(inplace=True),
            nn.Conv2d(width, width // 2, 1), nn.Dropout2d(0.5), nn.ReLU(inplace=True),
            nn.Conv2d(width // 2, 2, 1))
        self.register_buffer("accuracies", torch.zeros(100))  # a buffer: it belongs into last.pt
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, scores):
        return self.layers(scores)

    def remember(self, accuracy):
        """Note one accuracy (0-d) and return the mean of those remembered."""
        self.accuracies[self.seen % 100] = accuracy
        self.seen += 1
        return self.accuracies.sum() / self.seen.clamp(max=100)


def build(args, device, f_S=None):
    """Stage pixel: G_ST, G_TS, D_S, D_T, their Adams and buffers; the task model of --semantic."""
    torch.manual_seed(args.seed)
    nets = {"G_ST": ResnetGenerator(args.ngf, args.blocks, args.antialias_G),
            "G_TS": ResnetGenerator(args.ngf, args.blocks, args.antialias_G),
            "D_S": PatchGAN(3, args.ndf, antialias=args.antialias_D),
            "D_T": PatchGAN(3, args.ndf, antialias=args.antialias_D)}
    for net in nets.values():
        common.init_weights(net, "normal", 0.02)
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, 0.999),
                             fused=device.type in ("cuda", "cpu"))
    m = SimpleNamespace(**nets)
    m.opt_G = adam([*m.G_ST.parameters(), *m.G_TS.parameters()])
    m.opt_D = adam([*m.D_S.parameters(), *m.D_T.parameters()])
    m.pool_S, m.pool_T = HistoryBuffer(args.pool, device), HistoryBuffer(args.pool, device)
    if args.semantic == "literal":  # a fixed judge
        m.judge = (f_S or task_model(args, device)).requires_grad_(False).eval()
    elif args.semantic == "gated":  # a judge that learns along, on real source pictures
        m.judge = task_model(args, device)
        m.opt_judge = torch.optim.Adam(m.judge.parameters(), lr=1e-3)
    if args.compile:
        for net in nets.values():
            net.forward = torch.compile(net.forward)
    return m


# =============================================================================================
# 3. Losses
# =============================================================================================


def task_loss(scores, labels):
    """Eq. (3.10): mean cross-entropy of scores (B, N, H, W) and labels (B, H, W), 255 left out."""
    total = F.cross_entropy(full(scores), labels, ignore_index=255, reduction="sum")
    return total / (labels != 255).sum().clamp(min=1)  # WHY clamp: a crop may have no label at all


@torch.no_grad()
def hard_labels(f, x):
    """p(f, x) = argmax f(x): (B, 3, H, W) -> (B, H, W)."""
    return f(x).argmax(1)


def lsgan(logits, target):  # same as cyclegan.py: lsgan
    """In place of a log of Eq. (3.11): E (D(.) - target)^2; real is 1, translated 0."""
    return (full(logits) - target).square().mean()


def cycle_loss(x, x_cyc):  # same as cyclegan.py: cycle_loss
    """One term of Eq. (3.12), |G_TS(G_ST(x)) - x|_1 as a mean over pixels; both (B, 3, H, W)."""
    return (full(x_cyc) - x).abs().mean()


def translation_loss(x, G, F, D, args, judge=None, labels=None):
    """All terms of Eq. (3.14) that G's translation of x enters, as G and F minimise them.

    (x_s, G_ST, G_TS, D_T) or (x_t, G_TS, G_ST, D_S). judge, labels: those of Eq. (3.13), if it is
    in use. Returns ([GAN, cyc, sem], their weighted sum, the translation without graph).
    """
    x_hat = G(x)
    GAN = lsgan(D(x_hat), 1.0)                                        # Eq. (3.11), G's side
    cyc = cycle_loss(x, F(x_hat))                                     # Eq. (3.12)
    sem = task_loss(judge(x_hat), labels) if judge else GAN.new_zeros(())  # Eq. (3.13)
    L = GAN + args.lambda_cyc * cyc + args.lambda_sem * sem           # Eq. (3.14)
    return [GAN, cyc, sem], L, x_hat.detach()


def discriminator_loss(D_Y, y, y_hat):
    """What D_Y minimises (Sec. 3.2.4): real y towards 1, y_hat (no gradient) towards 0.

    CHOICE (code): halved, so that D learns at half the pace of G.
    """
    # No layer of D mixes pictures, so real and fake can share one pass.
    logits_fake, logits_real = D_Y(torch.cat([y_hat.detach(), y])).split([len(y_hat), len(y)])
    return 0.5 * (lsgan(logits_fake, 0.0) + lsgan(logits_real, 1.0))


class HistoryBuffer:  # same as cyclegan.py: HistoryBuffer
    """The last `size` generated pictures, so that D does not forget old tricks (Sec. 3.2.4).

    Kept in last.pt: a resumed run needs the same pictures. Each process has its own.
    """

    def __init__(self, size, device):
        self.size, self.device, self.pictures = size, device, []

    def exchange(self, fakes, rng):
        """Fakes (B, 3, H, W) -> what D shall see instead, same shape; rng decides on the CPU.

        Until the buffer is full it keeps and returns each picture. Then half of the pictures
        (p = 1/2 each) are put in the place of an older one, drawn at random, that is returned;
        the other half are returned as they are, and not kept.
        """
        shown = []
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


# =============================================================================================
# 4. Data
# =============================================================================================


def find_pairs(root, split, args, labels=True):
    """[(picture, label map)] of split 'source', 'target' or 'test', by name; [] if there are none.

    'test' are the pictures that are scored, those of --split.
    labels: without them the label map is None. Raises `UserError` that names what is missing.
    """
    folders, names = [args.split if split == "test" else split], [""]
    if args.source_names:
        folders = {"source": ["train", "val", "test"], "target": ["train", "val"],
                   "test": ["test"]}[split]
        names = args.source_names if split == "source" else args.target_names
    pairs = []
    for folder in (Path(root) / f"{name}_img" for name in folders):
        if folder.is_dir():
            files = [f for f in common.list_pictures(folder) if f.name.startswith(tuple(names))]
            maps = folder.with_name(folder.name.replace("_img", "_label"))
            found = {f.stem: f for f in common.list_pictures(maps)} if labels else {}
            for f in files:
                if labels and f.stem not in found:
                    raise UserError(f"{f}: no label map of that name in {maps}")
                pairs.append((f, found.get(f.stem)))
    stems = [f.stem for f, _ in pairs]
    if len(set(stems)) < len(stems):
        twice = next(s for s in stems if stems.count(s) > 1)
        raise UserError(f"{root}: two pictures of the {split} are named {twice}")
    if not pairs and split != "test":
        tried = " ".join(f"{name}_img/" for name in folders)
        begins = f" that begins with {' or '.join(names)}" if args.source_names else ""
        raise UserError(f"{root}: no {split} picture{begins} in {tried}; expected {LAYOUT}")
    return pairs


def open_label(path, args):
    """A label map as an 8-bit Pillow picture of classes, 255 where there is none; `UserError`."""
    ids = np.asarray(common.open_ids(path)).astype(np.int64)
    known = args.label_ids or list(range(len(args.class_names)))
    table = np.full(2**16, 255, dtype=np.uint8)
    table[known] = np.arange(len(known))
    classes = table[ids.clip(0, 2**16 - 1)]
    if not args.label_ids and (wrong := np.unique(ids[(classes == 255) & (ids != 255)])).size:
        raise UserError(f"{path}: ids {wrong[:8].tolist()} are neither one of the {len(known)} "
                        "classes of --class-names nor 255 (ignored); see --label-ids")
    return Image.fromarray(classes)


def crop_pair(picture, label, scale, size, rng):
    """The same random crop, maybe mirrored, of a picture and its label map (or None), resized by
    `scale` (and as much more as the crop needs): (3, size, size) and (size, size)."""
    w, h = (max(size, round(n * scale)) for n in picture.size)
    left, top, mirror = rng.randint(0, w - size), rng.randint(0, h - size), rng.random() < 0.5
    crops = []
    for im, how in ((picture, Image.BICUBIC), (label, Image.NEAREST)):
        if im is not None:
            im = im.resize((w, h), how).crop((left, top, left + size, top + size))
            crops.append(im.transpose(Image.FLIP_LEFT_RIGHT) if mirror else im)
    return [common.to_tensor(crops[0])] + [torch.from_numpy(np.array(im)).long()
                                           for im in crops[1:]]


class Labelled(torch.utils.data.Dataset):
    """For task models: `self[n]` is the n-th training sample, x (3, c, c) and label (c, c).

    A new shuffle every epoch; a sample depends on (seed, n) alone. The short side of the *label
    map* is resized to --task-load: translations may be smaller than the pictures they come from.
    """

    def __init__(self, pairs, args):
        self.pairs, self.args = pairs, args

    def __getitem__(self, n):
        args, rng = self.args, random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.pairs))
        picture, label = self.pairs[
            shuffled(len(self.pairs), common.mix(args.seed, "epoch", epoch))[i]]
        picture, label = common.open_rgb(picture), open_label(label, args)
        if picture.size != label.size:
            picture = picture.resize(label.size, Image.BICUBIC)
        return crop_pair(picture, label, args.task_load / min(label.size), args.task_size, rng)

    def __len__(self):
        return len(self.pairs)


class Unpaired(torch.utils.data.Dataset):
    """For stage pixel: `self[n]` is the n-th training sample (x_s, y_s, x_t), of --size.

    x_s walks through a new shuffle every epoch, x_t is drawn at random.
    """

    def __init__(self, source, target, args):
        self.source, self.target, self.args = source, target, args

    def __getitem__(self, n):
        args, rng = self.args, random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.source))
        picture, label = self.source[
            shuffled(len(self.source), common.mix(args.seed, "epoch", epoch))[i]]
        picture, label = common.open_rgb(picture), open_label(label, args)
        x_s, y_s = crop_pair(picture, label.resize(picture.size, Image.NEAREST),
                             args.load / picture.width, args.size, rng)
        picture = common.open_rgb(rng.choice(self.target)[0])
        x_t, = crop_pair(picture, None, args.load / picture.width, args.size, rng)
        return x_s, y_s, x_t

    def __len__(self):
        return len(self.source)


class Adaptation(Labelled):
    """For feature adaptation: Labelled's (x, label) of the translated source, and an x_t."""

    def __init__(self, pairs, target, args):
        super().__init__(pairs, args)
        self.target = target

    def __getitem__(self, n):
        rng = random.Random(common.mix(self.args.seed, "target", n))
        picture = common.open_rgb(rng.choice(self.target)[0])
        return *super().__getitem__(n), *crop_pair(
            picture, None, self.args.task_load / min(picture.size), self.args.task_size, rng)


def random_batch(args, device):
    """(x_s, y_s, x_t) of noise, shaped and laid out as in stage pixel; to measure a step."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    shape = (args.batch, 3, args.size, args.size)
    x_s, x_t = (torch.rand(shape).mul(2).sub(1).to(device, memory_format=layout) for _ in "st")
    y_s = torch.randint(len(args.class_names), (args.batch, args.size, args.size), device=device)
    return x_s, y_s, x_t


# =============================================================================================
# 5. One training step
# =============================================================================================


def task_step(f, opt, x, labels, args):
    """One update of a task model on x (B, 3, H, W), labels (B, H, W): Eq. (3.14), first term."""
    f.train()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        loss = task_loss(f(x), labels)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    return {"task": loss.detach()}


def train_step(m, x_s, y_s, x_t, args, rng):
    """Stage pixel: one update of G_ST and G_TS, then one of D_S and D_T: Eq. (3.15) without f_T.

    Returns losses by name. rng: CPU generator for the buffers.
    """
    G_ST, G_TS, D_S, D_T = m.G_ST, m.G_TS, m.D_S, m.D_T
    autocast = functools.partial(torch.autocast, x_s.device.type, torch.bfloat16, enabled=args.amp)
    losses = {}

    # ---- who says what a picture shows? -------------------------------------------------------
    judge, p_s, p_t = None, None, None
    if args.semantic == "literal":           # f_S, fixed, before and after translation
        judge = m.judge
        with autocast():
            p_s, p_t = hard_labels(judge, x_s), hard_labels(judge, x_t)
    elif args.semantic == "gated":
        m.judge.requires_grad_(True)
        losses["judge"] = task_step(m.judge, m.opt_judge, x_s, y_s, args)["task"]
        m.judge.requires_grad_(False).eval()
        if losses["judge"] <= 1.0:           # a judge that is still guessing is not asked
            judge, p_s = m.judge, y_s        # CHOICE (code): the true labels of the source
            with autocast():
                p_t = hard_labels(judge, x_t)

    # ---- G_ST and G_TS: fool both D, and undo each other --------------------------------------
    for D in (D_S, D_T):
        D.requires_grad_(False)              # they judge here, and learn below
    m.opt_G.zero_grad(set_to_none=True)
    # WHY two backward passes: the halves share weights but no activations, so the first half's
    # can be freed before the second half's are made. The gradients add up in both G.
    with autocast():
        terms_s, L, hat_t = translation_loss(x_s, G_ST, G_TS, D_T, args, judge, p_s)
    L.backward()
    with autocast():
        terms_t, L, hat_s = translation_loss(x_t, G_TS, G_ST, D_S, args, judge, p_t)
    L.backward()
    m.opt_G.step()
    names = ("GAN_ST", "cyc_s", "sem_s", "GAN_TS", "cyc_t", "sem_t")
    losses |= {name: loss for name, loss in zip(names, (*terms_s, *terms_t), strict=True)
               if args.semantic != "off" or not name.startswith("sem")}

    # ---- D_S and D_T: tell real pictures from those of this and of earlier generators ---------
    for D in (D_S, D_T):
        D.requires_grad_(True)
    m.opt_D.zero_grad(set_to_none=True)
    for name, D, real, fake, pool in (("D_T", D_T, x_t, hat_t, m.pool_T),
                                      ("D_S", D_S, x_s, hat_s, m.pool_S)):
        with autocast():
            losses[name] = discriminator_loss(D, real, pool.exchange(fake, rng))  # Eq. (3.11)
        losses[name].backward()
    m.opt_D.step()
    return {name: loss.detach() for name, loss in losses.items()}


def feature_step(m, x_s, y_s, x_t, args):
    """Feature adaptation (ICML paper): f_T's scores shall not tell the domains apart.

    x_s: translated source pictures, y_s their labels, x_t target pictures. One update of D_feat;
    then, only while D_feat can tell the domains apart (else there is nothing to learn from it),
    one of f_T against D_feat and one on the source's labels.
    """
    f, D = m.f_T.eval(), m.D_feat.train()  # WHY eval: looking must not change batch norm's averages
    autocast = functools.partial(torch.autocast, x_s.device.type, torch.bfloat16, enabled=args.amp)

    def domain_loss(scores, domain):
        logits = full(D(scores))
        labels = torch.full_like(logits[:, 0], domain, dtype=torch.long)
        return F.cross_entropy(logits, labels), (logits.argmax(1) == domain).float().mean()

    with torch.no_grad(), autocast():
        scores_s, scores_t = f(x_s), f(x_t)
    with autocast():
        loss_s, right_s = domain_loss(scores_s, 1)
        loss_t, right_t = domain_loss(scores_t, 0)
    losses = {"D_feat": loss_s + loss_t, "accuracy": (right_s + right_t) / 2}
    m.opt_D.zero_grad(set_to_none=True)
    losses["D_feat"].backward()
    m.opt_D.step()
    if dist.is_initialized():  # all processes must come to the same decision
        dist.all_reduce(losses["accuracy"])
        losses["accuracy"] /= dist.get_world_size()
    losses["updated"] = (D.remember(losses["accuracy"]) > args.feature_gate).float()
    losses["adversarial"] = losses["task"] = torch.zeros((), device=x_s.device)
    if losses["updated"]:
        D.requires_grad_(False)
        with autocast():
            losses["adversarial"], _ = domain_loss(f(x_t), 1)  # the flipped label: "source"
        m.opt_f.zero_grad(set_to_none=True)
        (args.lambda_feature * losses["adversarial"]).backward()
        D.requires_grad_(True)
        m.opt_f.step()
        losses |= task_step(f, m.opt_f, x_s, y_s, args)
    return {name: loss.detach() for name, loss in losses.items()}


# =============================================================================================
# 6. Training loop
# =============================================================================================


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("synthetic2real", args.size)

    return common.find_data(args.data, LAYOUT, KNOWN, draw_toy)


class Finished:
    """What the stages that are through have left; it is what the run's last.pt holds.

    steps: {stage: its steps}; nets: {name: state dict} of the networks in MAKES.
    """

    def __init__(self):
        self.steps, self.nets = {}, {}

    def add(self, stage, steps, **nets):
        self.steps[stage] = steps
        for name, net in nets.items():
            self.nets[name] = {k: v.cpu().clone() for k, v in net.state_dict().items()}

    def network(self, name, args, device):
        """One of the networks, ready for use; `UserError` if its stage was not run."""
        if name not in self.nets:
            stage = next(stage for stage, names in MAKES.items() if name in names)
            raise UserError(f"--stages {stage}: {name} is needed and was not trained yet (a run "
                            "goes on with --resume)")
        net = (ResnetGenerator(args.ngf, args.blocks, args.antialias_G) if name.startswith("G")
               else task_model(args, torch.device("cpu")))
        common.load_parts({name: net}, self.nets, args.weights or args.run_folder)
        return net.to(device).eval()

    def state_dict(self):
        return {"steps": dict(self.steps), "nets": dict(self.nets)}

    def load_state_dict(self, state):
        self.steps, self.nets = dict(state["steps"]), dict(state["nets"])


def train(args):
    """The stages one after another, each with a Run of its own in a folder of this one."""
    run, finished = Run("cycada", args), Finished()
    data = load_data(data_folder(args), args)
    run.resume_or_start({"finished": finished})
    run.save()
    if args.data == "toy":
        preset = ", ".join(f"{k} {v}" for k, v in TOY.items() if k != "class_names")
        print(f"toy preset instead of the paper's settings: {preset}")
    elif args.task_weights == "random":
        print("--task-weights random: without ImageNet's weights, task models stay far weaker")
    train_stage = {"pixel": train_pixel, "feature": train_feature}
    for name in MAKES:
        if name in finished.steps or name not in args.stages:
            continue
        if name == "oracle" and not data["target"][0][1]:
            print("no label maps of the target's training pictures: no oracle")
            continue
        if run.rank == 0:
            print(f"---- stage {name} ----", flush=True)
        stage = train_stage.get(name, train_task)(name, finished, data, args, run.device)
        run.step, run.seconds = run.step + stage.step, run.seconds + stage.seconds
        run.save()
    scores = []
    if data["test"] and set(ROWS.values()) & finished.nets.keys():
        nets = {row: finished.network(name, args, run.device) for row, name in ROWS.items()
                if name in finished.nets}
        run.save_samples(label_columns(nets, data["test"], args, run.device))
        text, scores = table(nets, data["test"], args, run.device)
        if run.rank == 0:
            print(text)
            (run.folder / "table.txt").write_text(text + "\n")
    run.finish(scores)


def load_data(root, args):
    """{'source', 'target', 'test': [(picture, label map)]}, every label map checked.

    The target's label maps are None if there are none; they train the oracle and nothing else.
    """
    data, splits = {}, {"source": "source", "target": "target", "test": args.split}
    if args.source_names:
        splits = {"source": "train", "target": "train", "test": "test"}
    for split, folder in splits.items():
        there = split == "source" or (Path(root) / f"{folder}_label").is_dir()
        data[split] = find_pairs(root, split, args, there)
        for _, label in data[split] if there else ():
            open_label(label, args)  # a wrong one shall be found now, not after hours
    if data["test"] and not data["test"][0][1]:
        raise UserError(f"{root}: test pictures without label maps; expected {LAYOUT}")
    return data


def open_stage(name, args, parts, batch):
    """A Run in the stage's own folder; resumed if it was begun."""
    folder = Path(args.run_folder) / name
    begun = args.resume and (folder / "last.pt").exists()
    stage = Run("cycada", argparse.Namespace(**vars(args) | {
        "run_folder": str(folder), "resume": begun, "batch": batch}))
    stage.resume_or_start(parts)
    return stage


def left(stage, data, total):
    """The stage's steps that are left."""
    return stage.steps(data, total) if stage.step < total else []


def sgd(net, args, lr):
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=args.task_momentum, weight_decay=5e-4)


def train_task(name, finished, data, args, device):
    """Stages source, target and oracle differ only in what they train on."""
    pairs = {"source": data["source"], "oracle": data["target"]}.get(name)
    if name == "target":
        pairs = translated_pairs(data["source"], finished, args)
    f = task_model(args, device, args.task_weights)
    opt, total = sgd(f, args, args.task_lr), args.task_steps
    stage = open_stage(name, args, {"f": f, "opt": opt}, args.task_batch)
    show = functools.partial(label_columns, {MAKES[name][0]: f}, data["test"] or data["target"],
                             args, device)
    for step, (x, labels) in left(stage, Labelled(pairs, args), total):
        if step % args.sample_every == 0:
            stage.save_samples(show())
        opt.param_groups[0]["lr"] = args.task_lr * rate(step, total, args.task_decay_from)
        stage.log(task_step(f, opt, x, labels, args))
    stage.save_samples(show())
    finished.add(name, stage.step, **{MAKES[name][0]: f})
    return stage


def train_pixel(name, finished, data, args, device):
    """Stage pixel: a CycleGAN between the domains; then every x_s is translated, once."""
    f_S = finished.network("f_S", args, device) if args.semantic == "literal" else None
    m = build(args, device, f_S)
    samples = Unpaired(data["source"], data["target"], args)
    parts = {k: part for k, part in vars(m).items() if k != "judge" or args.semantic == "gated"}
    stage = open_stage(name, args, parts, args.batch)
    total = args.steps or args.epochs * max(1, len(samples) // (args.batch * stage.world))
    for step, (x_s, y_s, x_t) in left(stage, samples, total):
        if step % args.sample_every == 0:
            stage.save_samples(pixel_columns(m, data, args, device))
        for optimiser in (m.opt_G, m.opt_D):
            optimiser.param_groups[0]["lr"] = args.lr * rate(step, total, args.decay_from)
        stage.log(train_step(m, x_s, y_s, x_t, args, stage.rng()))
    stage.save_samples(pixel_columns(m, data, args, device))
    for picture, _ in data["source"][stage.rank::stage.world]:
        x = open_scaled(picture, args.load, device)
        common.to_pil(translate(m.G_ST, x, args)[0]).save(translated(picture, args))
    finished.add(name, stage.step, G_ST=m.G_ST, G_TS=m.G_TS)
    return stage


def train_feature(name, finished, data, args, device):
    """Feature adaptation (ICML paper): f_T goes on, on translated source and target pictures."""
    f = finished.network("f_T", args, device)
    torch.manual_seed(args.seed)
    D = ScoreDiscriminator(len(args.class_names), args.feature_width).to(device)
    m = SimpleNamespace(f_T=f, D_feat=D, opt_f=sgd(f, args, args.feature_lr),
                        opt_D=sgd(D, args, args.feature_lr))
    stage = open_stage(name, args, vars(m), args.task_batch)
    samples = Adaptation(translated_pairs(data["source"], finished, args), data["target"], args)
    show = functools.partial(label_columns, {"f_feature": f}, data["test"] or data["target"],
                             args, device)
    for step, (x_s, y_s, x_t) in left(stage, samples, args.feature_steps):
        if step % args.sample_every == 0:
            stage.save_samples(show())
        stage.log(feature_step(m, x_s, y_s, x_t, args))
    stage.save_samples(show())
    finished.add(name, stage.step, f_feature=f)
    return stage


def translated(picture, args):
    """Where the translation of a source picture is kept: translated/NAME.png of the run."""
    folder = Path(args.run_folder) / "translated"
    folder.mkdir(exist_ok=True)
    return folder / f"{picture.stem}.png"


def translated_pairs(source, finished, args):
    """(G_ST(X_S), Y_S) of Eq. (3.14): the translations on disk, with the old labels."""
    if "pixel" not in finished.steps:
        raise UserError("--stages pixel: its translated pictures are needed and were not made yet "
                        "(a run goes on with --resume)")
    return [(translated(picture, args), label) for picture, label in source]


# =============================================================================================
# 7. Translate and evaluate
# =============================================================================================


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
        scores = full(f(x))
    return F.interpolate(scores, size=size, mode="bilinear").argmax(1)


def open_scaled(path, width, device):
    """A picture as (1, 3, H, W), resized to a width."""
    im = common.open_rgb(path)
    im = im.resize((width, round(im.height * width / im.width)), Image.BICUBIC)
    return common.to_tensor(im)[None].to(device)


def colours(labels, args):
    """Label maps (B, H, W) -> pictures (B, 3, H, W) in [-1, 1]: a hue per class, black for 255."""
    N = len(args.class_names)
    palette = [colorsys.hsv_to_rgb((0.58 + 0.618 * k) % 1, 0.75 - 0.3 * (k % 2),
                                   0.95 - 0.25 * (k % 3)) for k in range(N)]
    if args.data == "toy":
        flat = common.lab("toy", "--data toy").FLAT
        palette = [[v / 255 for v in colour] for colour in flat]
    palette = torch.tensor([*palette, (0, 0, 0)], device=labels.device) * 2 - 1
    return palette[labels.clamp(max=N)].permute(0, 3, 1, 2)


def shown(pairs, limit=6):
    """That many pairs, evenly spaced: neighbours are often frames of one video."""
    return pairs[::max(1, len(pairs) // limit)][:limit]


def label_columns(nets, pairs, args, device):
    """Columns of a sample grid: target pictures, label maps by each of the nets, and the truth,
    which is for the eye alone."""
    columns, pairs = {}, shown(pairs)
    first = common.open_rgb(pairs[0][0]).size
    x = torch.cat([common.to_tensor(common.open_rgb(f).resize(first, Image.BICUBIC))[None]
                   for f, _ in pairs]).to(device)
    columns["x_t"] = x
    for name, f in nets.items():
        columns[name] = torch.cat([colours(segment(f, p[None], args), args) for p in x])
    if pairs[0][1]:
        truth = [np.array(open_label(y, args).resize(first, Image.NEAREST)) for _, y in pairs]
        columns["truth"] = colours(torch.from_numpy(np.stack(truth)).long(), args)
    return columns


def pixel_columns(m, data, args, device):
    """Columns of a sample grid, as in Fig. 3.34: both domains, translated, and back again."""
    columns, first = {}, None
    for x_name, G, G_back, split in (("x_s", "G_ST", "G_TS", "source"),
                                     ("x_t", "G_TS", "G_ST", "target")):
        x = [common.open_rgb(f) for f, _ in shown(data[split])]
        first = first or (args.load, round(args.load * x[0].height / x[0].width))
        x = torch.stack([common.to_tensor(p.resize(first, Image.BICUBIC)) for p in x]).to(device)
        there = torch.cat([translate(getattr(m, G), p[None], args) for p in x])
        back = torch.cat([translate(getattr(m, G_back), p[None], args) for p in there])
        columns |= {x_name: x, f"{G}({x_name})": there, f"{G_back}({G}({x_name}))": back}
    rows = min(map(len, columns.values()))
    return {name: column[:rows] for name, column in columns.items()}


def confusion(predicted, labels, N):
    """n_ij of Sec. 3.4.3, (N, N): pixels of class i predicted as j; label 255 is left out."""
    known = labels != 255
    return torch.bincount(N * labels[known] + predicted[known], minlength=N * N).view(N, N)


def metrics(n):
    """Sec. 3.4.3 from n (N, N): {'IoU': (N), 'mIoU', 'fwIoU', 'pixel acc.'} in per cent."""
    n = n.double()
    t, hit = n.sum(1), n.diagonal()
    # CHOICE (code): a class that is neither there nor predicted has IoU 0, and counts in mIoU.
    IoU = 100 * hit / (t + n.sum(0) - hit).clamp(min=1)
    return {"IoU": IoU, "mIoU": IoU.mean(), "fwIoU": (t * IoU).sum() / t.sum(),
            "pixel acc.": 100 * hit.sum() / t.sum()}


def table(nets, pairs, args, device):
    """Tab. 3.7 and 3.8 on the test pictures for {row: network}: (text, scores for result.json)."""
    names, N = args.class_names, len(args.class_names)
    n = {row: torch.zeros(N, N, dtype=torch.long) for row in nets}
    for picture, label in pairs:
        x = common.to_tensor(common.open_rgb(picture))[None].to(device)
        y = torch.from_numpy(np.array(open_label(label, args))).long()[None]
        for row, f in nets.items():
            n[row] += confusion(segment(f, x, args, y.shape[1:]).cpu(), y, N)
    t = next(iter(n.values())).sum(1)
    trivial = torch.zeros(N, N, dtype=torch.long)
    trivial[:, t.argmax()] = t
    found = {row: metrics(counts) for row, counts in (n | {"most frequent class": trivial}).items()}
    return describe(found, n, t, names), scores_of(found, n, names)


def gap_closed(found, row, key):
    """How much of the way from source only to the oracle a row has gone, in per cent, or None."""
    low, high = (found[r][key] if r in found else None for r in ("source only", "oracle"))
    if low is None or high is None or not row.startswith("CyCADA") or high <= low:
        return None
    return float(100 * (found[row][key] - low) / (high - low))


def describe(found, n, t, names):
    """The table as text: a line per class and metric, the gap closed, the worst classes."""
    rows, lines = list(n), []
    wide = max(len(name) for name in (*names, "pixel acc.")) + 2
    lines.append(" " * wide + "".join(f"{row:>18}" for row in rows))
    for k, name in enumerate(names):
        values = "".join(f"{found[row]['IoU'][k]:18.1f}" for row in rows)
        lines.append(f"{name:<{wide}}{values}" + ("" if t[k] else "   (absent)"))
    for key in ("mIoU", "fwIoU", "pixel acc."):
        lines.append(f"{key:<{wide}}" + "".join(f"{found[row][key]:18.1f}" for row in rows))
    for row in rows:
        gaps = {key: gap_closed(found, row, key) for key in ("mIoU", "fwIoU", "pixel acc.")}
        if None not in gaps.values():
            lines.append(f"gap closed by {row}: "
                         + ", ".join(f"{key} {gap:.0f} %" for key, gap in gaps.items()))
        if row.startswith("CyCADA") and "source only" in rows:
            before, after = found["source only"]["IoU"], found[row]["IoU"]
            worse = [f"{name} ({before[k]:.1f} -> {after[k]:.1f})"
                     for k, name in enumerate(names) if after[k] < before[k] - 0.05]
            lines.append(f"classes that {row} harms: " + (", ".join(worse) or "none"))
        if row.startswith("CyCADA"):
            lines.append(f"worst classes of {row}:")
            present = [k for k in found[row]["IoU"].argsort().tolist() if t[k]]
            for k in present[:3]:
                share = 100 * n[row][k] / t[k]
                called = [f"{share[j]:.0f} % called {names[j]}"
                          for j in share.argsort(descending=True).tolist() if j != k][:2]
                lines.append(f"  {names[k]} (IoU {found[row]['IoU'][k]:.1f}): "
                             + ", ".join([f"{share[k]:.0f} % right", *called]))
    return "\n".join(lines)


def scores_of(found, n, names):
    """The scores of result.json: of the last CyCADA row (else the first), beside all others."""
    ours = [row for row in n if row.startswith("CyCADA")] or list(n)
    scores = [{"name": key, "value": float(found[ours[-1]][key]), "better": "higher",
               "trivial": {row: float(found[row][key]) for row in found if row != ours[-1]},
               "gap closed, per cent": gap_closed(found, ours[-1], key)}
              for key in ("mIoU", "fwIoU", "pixel acc.")]
    scores[0]["IoU"] = {row: dict(zip(names, found[row]["IoU"].tolist(), strict=True)) for row in n}
    scores[0]["confusion, true x predicted"] = {row: counts.tolist() for row, counts in n.items()}
    return scores


def load_finished(args):
    """The networks in --weights, a last.pt of a whole run (its flags were read by `get_args`)."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: the last.pt of a run")
    finished = Finished()
    state = common.load_checkpoint(args.weights, "cycada")
    if "finished" not in state["parts"]:
        raise UserError(f"{args.weights}: of a single stage; expected the last.pt one folder up")
    common.load_parts({"finished": finished}, state["parts"], args.weights)
    return finished


def translate_files(args):
    """Translate --translate (a picture or a folder of them), each at its own size, to PNG."""
    device = common.pick_device(args.device)
    name = {"StoT": "G_ST", "TtoS": "G_TS", "labels": "f_T"}[args.direction]
    net = load_finished(args).network(name, args, device)

    def answer(x):
        if args.direction == "labels":
            return colours(segment(net, x.to(device), args), args)
        return translate(net, x.to(device), args)

    common.translate_files(args.translate, args.out or "translated", answer)


def evaluate(args):
    """The table of Sec. 3.4.3 for the networks in --weights, on the test pictures of --data."""
    device, finished = common.pick_device(args.device), load_finished(args)
    data = load_data(data_folder(args), args)
    nets = {row: finished.network(name, args, device) for row, name in ROWS.items()
            if name in finished.nets}
    if not data["test"] or not nets:
        found = f"no {args.split}_img/ in {args.data}" if nets else "no task model"
        raise UserError(f"--evaluate: {found}; expected {LAYOUT}")
    text, scores = table(nets, data["test"], args, device)
    print(text)
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
