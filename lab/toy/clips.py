"""clips: short clips of one style each, with label maps; for pix2pixSC.

    train_img/0000/0000 ... 0011.png    a savanna passes by at noon, a striped animal looks up
    train_label/0000/0000 ... 0011.png  what each of its pixels is, an index into world.LABELS
    test_*, val_*                       clips of other scenes in other styles

A clip has one style (hour, season, coat) and its frames move. Every clip can be drawn in the style
of every other: the true answer to "the label map of this one, the exemplar from that one".
"""
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from .disk import STAMP, contact_sheet
from .scoring import GREY_LEVELS, score
from .world import (
    DAYLIGHT,
    LABELS,
    PLAIN,
    Scene,
    blend,
    choose,
    paint,
    render,
    sample_scene,
    supersample,
    vary,
)

# 1. Drawing ---------------------------------------------------------------------------------------

CLIP_FRAMES = 12
SEASONS = {  # ground, leaves
    "savanna": ((214, 184, 104), (112, 128, 62)), "meadow": ((118, 164, 70), (56, 106, 58)),
    "snow": ((228, 234, 242), (72, 98, 92)), "autumn": ((168, 118, 70), (206, 96, 38)),
    "red earth": ((186, 92, 60), (92, 134, 76)), "heath": ((150, 122, 160), (116, 74, 128)),
}
LABEL_COLOURS = ((150, 190, 235), (130, 150, 150), (190, 170, 120), (100, 70, 50), (60, 120, 60),
                 (140, 180, 70), (220, 90, 60), (230, 140, 60), (240, 190, 80), (160, 60, 120),
                 (150, 50, 40), (40, 40, 60), (200, 120, 160), (255, 255, 255), (90, 40, 110),
                 (20, 20, 20), (80, 140, 200), (0, 0, 0))


@dataclass(frozen=True)
class Style:
    daylight: str
    brightness: float
    sun_x: float
    ground: tuple
    leaf: tuple
    plain: tuple  # the animals' colour, unless the coat is striped
    coat: str


@dataclass(frozen=True)
class Clip:
    scene: Scene  # of the middle frame
    style: Style
    pan: float  # how far near things move per frame, to the right


def sample_clip(rng):
    """A random Clip; its style does not depend on its scene's layout."""
    scene = sample_scene(rng)
    ground, leaf = SEASONS[choose(rng, tuple(SEASONS))]
    style = Style(choose(rng, tuple(DAYLIGHT)), rng.uniform(0.85, 1.04), rng.uniform(0.1, 0.9),
                  vary(rng, ground, 0.08), vary(rng, leaf, 0.1),
                  vary(rng, choose(rng, tuple(PLAIN.values())), 0.1),
                  "zebra" if rng.random() < 0.4 else "plain")
    return Clip(scene, style, rng.uniform(0.015, 0.04) * choose(rng, (-1, 1)))


def clip_scene(clip, frame, style):
    """The Scene of a frame (0 .. CLIP_FRAMES - 1) in a Style: all else is the clip's own."""
    t, scene = frame - (CLIP_FRAMES - 1) / 2, clip.scene

    def moved(x, y):  # near things pass faster; what leaves on one side comes in on the other
        near = 0.3 + 0.7 * (y - scene.horizon) / (1 - scene.horizon)
        return (x + clip.pan * t * near + 0.1) % 1.2 - 0.1

    def walked(a):  # grazes up and down, and turns round in the middle of the clip
        middle = a.x + a.facing * a.unit * (0.11 + 0.09 * a.graze)
        facing = a.facing if t < 0 else -a.facing
        graze = min(1.0, max(0.0, a.graze + 0.4 * math.sin(t)))
        return replace(a, x=middle - facing * a.unit * (0.11 + 0.09 * graze) + 0.01 * abs(t) - 0.03,
                       facing=facing, graze=graze, phase=a.phase + 0.8 * t, plain=style.plain)

    return replace(
        scene, daylight=style.daylight, brightness=style.brightness, sun_x=style.sun_x,
        ground=style.ground, animals=tuple(walked(a) for a in scene.animals),
        trees=tuple(replace(tree, x=moved(tree.x, tree.y), leaf=style.leaf)
                    for tree in scene.trees),
        tufts=tuple(replace(tuft, x=moved(tuft.x, tuft.y),
                            colour=blend(style.ground, style.leaf, 0.5)) for tuft in scene.tufts))


def letterboxed(picture, colour):
    """The picture with a bar of that colour above and below, as in films.

    WHY: pix2pixSC normalises its input; only what always is black tells it how bright a style is.
    """
    w, h = picture.size
    for top in (0, h - h // 16):
        picture.paste(colour, (0, top, w, top + h // 16))
    return picture


def clip_picture(clip, frame, size, style):
    """A frame in a Style, RGB."""
    return letterboxed(render(clip_scene(clip, frame, style), size, style.coat), (0, 0, 0))


def clip_label(clip, frame, size):
    """Its label map: palette picture of ids into LABELS (bars: one more), equal in all styles."""
    scene = clip_scene(clip, frame, clip.style)
    times = supersample(size)
    ids = np.asarray(paint(scene, size * times, "plain").label)
    label = Image.fromarray(np.ascontiguousarray(ids[times // 2::times, times // 2::times]), "L")
    label = label.convert("P")
    label.putpalette([c for colour in LABEL_COLOURS for c in colour])
    return letterboxed(label, len(LABELS))


STREAMS = {"train": 0, "val": 33, "test": 1}  # of clips: clip c depends on seed, split and c only


def draw(folder, n, size, seed, n_test=8):
    """Fill `folder` with `n` training clips of CLIP_FRAMES frames, `n_test` for val and for test.

    *_img hold RGB pictures, *_label palette PNGs of ids into LABELS, both as CLIP/FRAME.png.
    """
    for split, count in (("train", n), ("val", n_test), ("test", n_test)):
        for c in range(count):
            clip = sample_clip(np.random.default_rng([seed, STREAMS[split], c]))
            for kind in ("img", "label"):
                (folder / f"{split}_{kind}" / f"{c:04d}").mkdir(parents=True)
            for t in range(CLIP_FRAMES):
                name = f"{c:04d}/{t:04d}.png"
                clip_picture(clip, t, size, clip.style).save(folder / f"{split}_img" / name)
                clip_label(clip, t, size).save(folder / f"{split}_label" / name)
    contact_sheet(folder, [(f"train_{kind}/{c:04d}", f"a clip's {what}") for c in range(min(n, 4))
                           for kind, what in (("img", "frames"), ("label", "label maps"))],
                  folder / "contact.png")


# 2. Scores ----------------------------------------------------------------------------------------

def clip_answer(folder, x, exemplar, split="test"):
    """The true answer to label map x ('CLIP/FRAME') in the style of an exemplar's clip.

    folder: a drawn one; both names are of its `split`. Returns an RGB Pillow picture.
    """
    stamp = json.loads((Path(folder) / STAMP).read_text())
    of_x, of_exemplar = (sample_clip(np.random.default_rng([stamp["seed"], STREAMS[split], int(c)]))
                         for c in (Path(x).parts[0], Path(exemplar).parts[0]))
    return clip_picture(of_x, int(Path(x).stem), stamp["size"], of_exemplar.style)


def read(folder, split, names):
    """(label maps (N, H, W) of ids, pictures (N, 3, H, W) in [-1, 1]) of frames of a split."""
    def stack(kind):
        return np.stack([np.asarray(Image.open(Path(folder, f"{split}_{kind}", f"{name}.png")))
                         for name in names])
    return stack("label"), as_pictures(stack("img"))


def as_pictures(rgb):
    """Bytes (N, H, W, 3) -> pictures (N, 3, H, W) in [-1, 1]."""
    return np.moveaxis(np.asarray(rgb), 3, 1) / GREY_LEVELS - 1


def clip_scores(folder, pairs, y_hat, split="test"):
    """What y_hat (N, 3, H, W), pictures of `pairs` [(x, exemplar)] of frames, is worth.

    Beside it stand painters that know what G is given, x, I and F(I), and each label's usual
    colour: they match colours at will, but not what happens inside a label. So details come first.
    """
    (label, z), (F_I, exemplar) = (read(folder, split, names) for names in zip(*pairs, strict=True))
    y = as_pictures([np.asarray(clip_answer(folder, *pair, split)) for pair in pairs])
    answers = {"copy the exemplar": exemplar, "mean picture": np.broadcast_to(z.mean(0), z.shape)}
    answers |= {name: painted(label, F_I, exemplar, z, fill) for name, fill in PAINTERS.items()}
    return [score("detail correlation", lambda a: clip_details(label, a, y), y_hat, answers,
                  "higher"),
            score("style error", lambda a: clip_style_error(label, a, y), y_hat,
                  answers | {"z, in its own style": z}),
            score("picture error", lambda a: np.abs(a - y).mean() * GREY_LEVELS, y_hat,
                  answers | {"z, in its own style": z})]


def noisy(colours, _, to):
    """The mean of colours (n, 3) for all of `to`, and noise of their deviation."""
    signs = np.random.default_rng(len(to)).choice((-1.0, 1.0), (len(to), 1))
    return colours.mean(0) + colours.std(0) * signs


def sloping(colours, at, to):
    """Colours (n, 3), at rows and columns (n, 2), as a straight slope from top to bottom."""
    a, b = (np.stack([np.ones(len(p)), p[:, 0] - p[:, 0].mean()], 1) for p in (at, to))
    return b @ np.linalg.lstsq(a, colours, rcond=None)[0]


def stretched(colours, at, to):
    """Colours (n, 3) of the places `at`, stretched over the box around `to`."""
    a, b = ((p - p.min(0)) / np.maximum(np.ptp(p, 0), 1) for p in (at, to))
    parts = np.array_split(b, 1 + len(a) * len(b) // 10**6)  # all at once would fill the memory
    return colours[np.concatenate([np.square(p[:, None] - a).sum(2).argmin(1) for p in parts])]


PAINTERS = {"each label's mean colour": lambda colours, at, to: colours.mean(0),
            "and noise": noisy, "and slope": sloping, "each label, stretched": stretched}


def painted(label, exemplar_label, exemplar, z, fill):
    """Label maps (N, H, W) painted label by label from its pixels in the exemplar, by one of the
    PAINTERS; in a label's mean colour in all z where the exemplar has none of it. (N, 3, H, W)."""
    usual = {i: np.moveaxis(z, 1, 3)[label == i].mean(0) for i in np.unique(label)}
    found = np.zeros(z.shape)
    for n, (ids, theirs) in enumerate(zip(label, exemplar_label, strict=True)):
        for i in np.unique(ids):
            here, there = ids == i, theirs == i
            colours = usual[i] if not there.any() else fill(
                exemplar[n][:, there].T, np.argwhere(there), np.argwhere(here))
            found[n][:, here] = np.atleast_2d(colours).T  # (3, pixels) or (3, 1)
    return found


def clip_details(labels, y_hat, y):
    """Do stripes, shading and clouds stand where they should? Correlation of y_hat and y when the
    mean colour of every label of each picture is taken away; the mean over pictures."""
    found = []
    for label, a, b in zip(*(np.asarray(v, dtype=float) for v in (labels, y_hat, y)), strict=True):
        a, b = a.copy(), b.copy()
        for i in np.unique(label):
            for v in (a, b):
                v[:, label == i] -= v[:, label == i].mean(1, keepdims=True)
        found.append((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-12))
    return float(np.mean(found))


def clip_style_error(labels, y_hat, y):
    """How far the colours of y_hat are from those of the true answers y, label by label.

    labels (N, H, W) ids, y_hat and y (N, 3, H, W) in [-1, 1]. Mean over all labels of all pictures
    (of 8 pixels or more) of the difference of the mean and of the deviation, in grey levels.
    """
    errors = []
    for label, a, b in zip(*(np.asarray(v) for v in (labels, y_hat, y)), strict=True):
        for i in np.unique(label):
            if (label == i).sum() >= 8:
                one, other = a[:, label == i], b[:, label == i]
                errors.append(np.abs(one.mean(1) - other.mean(1)).mean()
                              + np.abs(one.std(1) - other.std(1)).mean())
    return float(np.mean(errors)) * GREY_LEVELS
