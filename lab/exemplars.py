"""Scores of pictures painted after exemplars: pix2pixSC's Tabs. 2, 5, 6, and one for its Tab. 3.

There the paper asks people which picture has the exemplar's style. In their stead: does y_hat's
light follow I's, and which clip (or group) has the colours that are nearest to y_hat's?
"""
import random
from pathlib import Path

import torch

import common
import pix2pixsc as sc
from lab import segmenters

STEPS = 300  # updates of the network that reads label maps, in the place of the paper's DANet


def scores(pairs, y_hat, z, frames, args, unlabelled=None, predicted=None):
    """What --evaluate prints of y_hat and z (N, 3, H, W) of `pairs`; frames: training ones.

    unlabelled: the id that does not count. predicted: folder of F(y_hat), label files 00000, ...
    """
    size, device = (args.size, args.height), common.pick_device(args.device)
    I = torch.stack([sc.picture(f.image, size) for _, f in pairs])  # noqa: E741
    answers = {"": y_hat, "z, in its own style": z, "copy the exemplar": I,
               "mean picture": z.mean(0, keepdim=True).expand_as(z)}
    values = {who: style(p, I, [f.style for _, f in pairs]) for who, p in answers.items()}
    if copies := [(i, path) for i, pair in enumerate(pairs) if (path := in_the_light_of(*pair))]:
        those, y = [i for i, _ in copies], torch.stack([sc.picture(f, size) for _, f in copies])
        for who, p in answers.items():
            values[who]["distance to x's photograph in I's light, grey levels"] = float(
                (p[those] - y).abs().mean() * 127.5)
    files, found = [Path(str(predicted), f"{i:05d}") for i in range(len(z))], {}
    if args.label_kind == "landmarks":
        V = common.VGG(sc.TAPS, args.vgg, normalise=False, ceil_mode=True).to(device)
        for who, p in answers.items():
            values[who][f"VGG distance of eyes ({args.vgg})"] = eyes(p, I, pairs, V)
        if predicted:
            a, b = (landmarks(paths) for paths in ([f.with_suffix(".txt") for f in files],
                                                   [x.label for x, _ in pairs]))
            found["label endpoint distance"] = float((a - b).norm(dim=2).mean())  # LEPE, Tab. 2
    elif args.label_kind == "ids":
        def ids(paths):
            return torch.stack([sc.F(path, args, size).argmax(0) for path in paths])

        def counted(x):
            return x if unlabelled is None else x.masked_fill(x == unlabelled, -1)

        def sample(n):
            f = random.Random(n).choice(frames)
            label, seen = counted(ids([f.label])[0]), sc.picture(f.image, size)
            return (seen, label) if n % 2 else (seen.flip(2), label.flip(1))

        x = counted(ids([x.label for x, _ in pairs]))
        net, skip = segmenters.train(sample, args.labels, device, STEPS, batch=4), [unlabelled]
        for who, p in answers.items():
            values[who] |= accuracies(segmenters.segmented(net, p, device), x, args.labels, skip)
        if predicted:
            found = accuracies(ids([f.with_suffix(".png") for f in files]), x, args.labels, skip)
    elif predicted:
        raise common.UserError("--predicted: drawings have no label error")
    values[""] |= {f"{name}, {predicted}": value for name, value in found.items()}
    return [{"name": name, "value": value, "better": "lower" if "distance" in name else "higher",
             "trivial": {who: v[name] for who, v in values.items() if who and name in v}}
            for name, value in values[""].items()]


def in_the_light_of(x, exemplar):
    """The file of x's photograph in the exemplar's light, where both frames are copies that
    `lab.toy.lights` has made of one clip; else None."""
    (clip, light), (other, its_light) = (f.name.rpartition("/")[0].rpartition("@")[::2]
                                         for f in (x, exemplar))
    same = clip and clip == other and light != its_light
    return x.image.parents[1] / f"{clip}@{its_light}" / x.image.name if same else None


def style(pictures, exemplars, styles):
    """Two scores of pictures (N, 3, H, W) after exemplars, whose clips or groups are `styles`: the
    correlation of their brightness, and how often the nearest style, by means and deviations of
    the channels, is the exemplar's."""
    a, b = (torch.cat([p.mean((2, 3)), p.std((2, 3))], 1) for p in (pictures, exemplars))  # (N, 6)
    names = sorted(set(styles))
    own = torch.tensor([names.index(s) for s in styles])
    centres = torch.stack([b[own == i].mean(0) for i in range(len(names))])
    light = torch.stack([p[:, :3].mean(1) for p in (a, b)])                                # (2, N)
    light = torch.corrcoef(light)[0, 1].nan_to_num() if len(a) > 1 else 0
    hits = torch.cdist(a, centres).argmin(1) == own
    return {"brightness, correlation with I's": float(light),
            f"nearest style is I's, of {len(names)}": float(hits.float().mean())}


def accuracies(found, truth, classes, skip=()):
    """Tab. 6: are the labels x (N, H, W) found in y_hat? skip: ids that are no classes."""
    table = segmenters.scores(segmenters.confusion(found, truth, classes), skip)
    return {"per-pixel accuracy": table["accuracy"], "per-class accuracy": table["class accuracy"],
            "class IoU": table["mIoU"]}


def landmarks(paths):
    """Points (N, 68, 2) of landmark files, in parts of their pictures' sides."""
    return torch.stack([torch.tensor(p / own) for p, own in map(sc.read_landmarks, paths)])


@torch.no_grad()
def eyes(pictures, exemplars, pairs, V):
    """Tab. 5: distance of VGG features, a mean over its layers, of y_hat's eyes and I's: patches,
    50 pixels of 256. CHOICE: VGG sees [-1, 1] as in Eq. (6); the paper does not say."""
    def patches(p, paths):
        side, hw, found = round(p.shape[3] * 50 / 256), torch.tensor(p.shape[2:]), []
        for picture, points in zip(p, landmarks(paths), strict=True):
            for eye in (points[36:42], points[42:48]):                        # dlib's order
                at = (eye.mean(0).flip(0) * hw - side / 2).clamp(min=0).minimum(hw - side).int()
                found.append(picture[:, at[0]:at[0] + side, at[1]:at[1] + side])
        return V(torch.stack(found).to(next(V.buffers()).device))
    a, b = (patches(p, [pair[i].label for pair in pairs])
            for i, p in enumerate((pictures, exemplars)))
    return float(sum((a[tap] - b[tap]).abs().mean() for tap in a)) / len(a)
