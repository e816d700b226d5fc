"""Networks that read a picture's label map, and the table that scores what they read.

    DRN26(classes)                                dilated residual network, 20.62 M parameters
    Segmenter(classes)                            a small one, for
    train(sample, classes, device, steps)         trained on real pictures in a minute or so
    segmented(net, pictures, device)              -> label maps
    confusion(found, truth, n_classes)            -> counts
    scores(table)                                 -> mIoU, accuracies, IoU per class

Pictures are (B, 3, H, W) in [-1, 1], label maps (B, H, W) of integers.
"""

import contextlib
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---- the table ----------------------------------------------------------------------------------


def confusion(found, truth, n_classes):
    """(n_classes, n_classes) counts: pixels of class i (row) that were read as j (column).

    found, truth: label maps of one shape. Pixels whose true label is none of 0 ... n_classes - 1
    are left out (-1 and 255 are in use). Tables of several pictures add up. `UserError` if other
    classes were read.
    """
    known = (truth >= 0) & (truth < n_classes)
    read = found[known].long()
    if len(read) and not 0 <= read.min() <= read.max() < n_classes:
        raise common.UserError(f"labels {int(read.min())} to {int(read.max())} were read, expected "
                               f"0 to {n_classes - 1}: a network of other classes?")
    pairs = n_classes * truth[known].long() + read
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)


def scores(table, skip=()):
    """What a table of `confusion` says, as fractions of 1; skip: ids that are no classes.

    {"mIoU", "accuracy" (of pixels), "class accuracy" (mean over the classes that are there), "IoU"
    (a tensor, one per class)}. A class that is only hallucinated has IoU 0 and counts in mIoU; one
    that is neither there nor found has IoU nan and does not count.
    """
    table = table.double()
    right, there = table.diagonal(), table.sum(1)
    IoU = right / (there + table.sum(0) - right)        # 0 / 0 is nan
    IoU[[i for i in skip if i is not None and i < len(IoU)]] = torch.nan
    return {"mIoU": float(IoU.nanmean()), "accuracy": float(right.sum() / table.sum()),
            "class accuracy": float((right / there).nanmean()), "IoU": IoU}


# ---- a small network, trained on the fly --------------------------------------------------------


def conv_block(a, b, stride=1):
    """3x3 convolution, batch norm, ReLU: (B, a, H, W) -> (B, b, H / stride, W / stride)."""
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))


class Segmenter(nn.Module):
    """A small FCN (Long et al. 2015) with skips: x (B, 3, H, W) -> logits (B, classes, H, W).

    The papers take large published networks, one per data set. This one is trained on the real
    pictures at hand, so its figures compare with its own on real pictures only.
    """

    def __init__(self, classes, width=24):
        super().__init__()
        self.down = nn.ModuleList([
            nn.Sequential(conv_block(3, width), conv_block(width, width)),
            nn.Sequential(conv_block(width, 2 * width, 2), conv_block(2 * width, 2 * width)),
            nn.Sequential(conv_block(2 * width, 4 * width, 2), conv_block(4 * width, 4 * width)),
            nn.Sequential(conv_block(4 * width, 4 * width, 2), conv_block(4 * width, 4 * width))])
        self.up = nn.ModuleList([conv_block(8 * width, 2 * width), conv_block(4 * width, width),
                                 conv_block(2 * width, width)])
        self.logits = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        maps = []
        for stage in self.down:
            x = stage(x)
            maps.append(x)
        for stage, skip in zip(self.up, maps[-2::-1], strict=True):
            x = F.interpolate(x, skip.shape[2:])
            x = stage(torch.cat([x, skip], dim=1))
        return self.logits(x)


@torch.enable_grad()
def train(sample, classes, device, steps, seed=0, path=None, batch=8, weights=None):
    """A `Segmenter` in test mode, trained on real pictures, or read from `path` if that is there.

    sample: n -> the n-th training sample, picture (3, H, W) and label map (H, W); labels that are
    not in 0 ... classes - 1 teach nothing. path: also where it is kept; a TorchScript file there
    may be any network. weights: of the classes in the loss. Raises `UserError` for a file that does
    not fit. torch's own generator is left as it was.
    """
    if path and Path(path).exists():
        with contextlib.suppress(RuntimeError):  # not TorchScript
            return torch.jit.load(path, map_location=device).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Segmenter(classes).to(device, memory_format=torch.channels_last)
    if path and Path(path).exists():
        common.load_parts({"segmenter": net}, {"segmenter": common.load_file(path)}, path)
        return net.eval()
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=steps)
    for step in range(steps):
        x, labels = zip(*(sample(step * batch + i) for i in range(batch)), strict=True)
        x, labels = torch.stack(x).to(device), torch.stack(labels).long().to(device)
        labels = torch.where((labels >= 0) & (labels < classes), labels, -1)
        loss = F.cross_entropy(net(x), labels, weights, ignore_index=-1)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    if path:
        common.write_whole(path, partial(torch.save, net.state_dict()))
    return net.eval()


@torch.no_grad()
def segmented(net, pictures, device, batch=8):
    """Label maps (N, H, W) on the CPU that a network in test mode reads from (N, 3, H, W)."""
    return torch.cat([net(x.to(device)).argmax(1).cpu() for x in pictures.split(batch)])


# ---- a large one --------------------------------------------------------------------------------


class DRNBlock(nn.Module):
    """Two dilated 3x3 convolutions with batch norm; `residual`: their input is added."""

    def __init__(self, a, b, stride=1, dilation=1, residual=True):
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(b)
        self.conv2 = nn.Conv2d(b, b, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(b)
        self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)
                                      ) if residual and (a != b or stride > 1) else nn.Identity()
        self.residual = residual

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(y + self.shortcut(x) if self.residual else y, inplace=True)


class DRN26(nn.Module):
    """DRN-C-26, a dilated residual network (Yu et al. 2017), 20.62 M parameters with 19 classes.

    x (B, 3, H, W) in [-1, 1] -> scores (B, classes, H, W). Dilation instead of stride keeps 1/8 of
    the resolution; the last two blocks undo the grid pattern that dilation leaves.
    """

    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            DRNBlock(16, 16), DRNBlock(16, 32, stride=2),                       # 1/2
            DRNBlock(32, 64, stride=2), DRNBlock(64, 64),                       # 1/4
            DRNBlock(64, 128, stride=2), DRNBlock(128, 128),                    # 1/8
            DRNBlock(128, 256, dilation=2), DRNBlock(256, 256, dilation=2),
            DRNBlock(256, 512, dilation=4), DRNBlock(512, 512, dilation=4),
            DRNBlock(512, 512, dilation=2, residual=False),
            DRNBlock(512, 512, residual=False))                                 # (B, 512, H/8, W/8)
        self.score = nn.Conv2d(512, classes, 1)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.score.bias)
        for name, v in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(v).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        x = ((x + 1) / 2 - self.mean) / self.std      # the input range of ImageNet's networks
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.interpolate(self.score(self.blocks(y)), size=x.shape[2:], mode="bilinear",
                             align_corners=True)

    def load_imagenet(self, state):
        """Fill all but the scores from its authors' drn_c_26 file: its layers have our order."""
        ours = [v for k, v in self.state_dict().items() if not k.endswith("tracked")][:-2]
        theirs = [v for k, v in state.items() if not k.startswith("fc.") and "tracked" not in k]
        for mine, v in zip(ours, theirs, strict=True):
            mine.copy_(v.reshape(mine.shape))
