"""scenes: landscapes with label and instance maps, each in one of six styles; for SPADE.

    train_img/0000    trees, a pond, an animal in autumn   (test_*, val_*: held-out layouts)
    train_label/0000  sky, hill, ground, grass, tree, animal or water, for each pixel
    train_inst/0000   0, or one number per tree and animal
    test_styles/winter/0000  the layout of test_img/0000 in winter, and so on: the true answers

A label map says nothing of season, hour and colours: that is the style. Ids are of SCENE_CLASSES.
"""
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .disk import STAMP, contact_sheet
from .scoring import GREY_LEVELS, score, window_mean
from .world import (
    COAT_PARTS,
    DAYLIGHT,
    LABELS,
    Canvas,
    Tree,
    Tuft,
    blend,
    choose,
    lit,
    paint_animal,
    paint_backdrop,
    paint_shadows,
    paint_tree,
    paint_tuft,
    sample_scene,
    supersample,
)

# 1. Drawing ---------------------------------------------------------------------------------------

SCENE_CLASSES = {  # what a label map's ids 0, 1, ... stand for, and the LABELS of each
    "sky": ("sky",), "hill": ("hill",), "ground": ("ground",), "grass": ("grass",),
    "tree": ("trunk", "leaves"), "animal": (*COAT_PARTS, "hoof", "muzzle", "eye", "mane", "tail"),
    "water": ("water",)}
SCENE_STYLES = {  # all that a label map does not say
    "spring": dict(daylight="noon", brightness=1.02, sun_x=0.3, ground=(128, 176, 74),
                   leaf=(66, 130, 52), coat=(150, 84, 50), water=(88, 150, 208)),
    "savanna": dict(daylight="golden", brightness=1.0, sun_x=0.75, ground=(222, 176, 96),
                    leaf=(132, 138, 62), coat=(214, 170, 112), water=(118, 128, 110)),
    "autumn": dict(daylight="overcast", brightness=0.98, sun_x=0.5, ground=(160, 124, 78),
                   leaf=(206, 104, 36), coat=(74, 56, 50), water=(92, 104, 104)),
    "winter": dict(daylight="overcast", brightness=1.06, sun_x=0.5, ground=(236, 240, 246),
                   leaf=(58, 84, 82), coat=(118, 98, 84), water=(178, 206, 222)),
    "sunset": dict(daylight="dawn", brightness=0.86, sun_x=0.25, ground=(158, 96, 92),
                   leaf=(84, 60, 84), coat=(70, 44, 52), water=(232, 138, 120)),
    "night": dict(daylight="noon", brightness=0.55, sun_x=0.6, ground=(96, 118, 128),
                  leaf=(54, 84, 96), coat=(196, 196, 204), water=(70, 92, 168))}


class InstanceCanvas(Canvas):
    """A Canvas with a fourth sheet: `thing`'s number where it has painted a label."""

    def __init__(self, size):
        super().__init__(size)
        self.instance, self.thing = Image.new("L", (size, size)), 0
        self._instance = ImageDraw.Draw(self.instance)

    def polygon(self, points, colour=None, light=None, label=None):
        super().polygon(points, colour, light, label)
        if label is not None:
            self._instance.polygon(np.multiply(points, self.size).ravel().tolist(), self.thing)

    def ellipse(self, x, y, rx, ry, colour=None, light=None, label=None):
        super().ellipse(x, y, rx, ry, colour, light, label)
        if label is not None:
            box = [c * self.size for c in (x - rx, y - ry, x + rx, y + ry)]
            self._instance.ellipse(box, self.thing)


def styled_scene(rng):
    """A random layout: function style name -> (picture, label map, instance map), given a size."""
    scene = sample_scene(rng)
    tufts = scene.tufts[::2]
    pond = None
    if rng.random() < 0.65:
        y = scene.horizon + (1 - scene.horizon) * rng.uniform(0.2, 0.85)
        pond = rng.uniform(0.1, 0.9), y, rng.uniform(0.25, 0.45), rng.uniform(0.05, 0.09)

    def draw(name, size):
        style, times = SCENE_STYLES[name], supersample(size)
        look = {key: style[key] for key in ("daylight", "brightness", "sun_x", "ground")}
        day, low = DAYLIGHT[style["daylight"]], blend(style["ground"], style["leaf"], 0.5)
        restyled = replace(
            scene, **look, trees=tuple(replace(t, leaf=style["leaf"]) for t in scene.trees),
            tufts=tuple(replace(t, colour=low, height=1.8 * t.height) for t in tufts),
            animals=tuple(replace(a, plain=style["coat"]) for a in scene.animals))
        canvas = InstanceCanvas(size * times)
        paint_backdrop(canvas, restyled)
        if pond:
            x, y, rx, ry = pond
            canvas.ellipse(x, y, rx, ry, style["water"], 1.0, "water")
            for k, dy in ((0.7, -0.35), (0.8, 0.15), (0.5, 0.6)):  # ripples that mirror the sky
                ripple = blend(style["water"], day["low"], 0.5)
                canvas.ellipse(x, y + dy * ry, k * rx, 0.12 * ry, ripple)
        paint_shadows(canvas, restyled)
        for thing in sorted([*restyled.trees, *restyled.tufts, *restyled.animals],
                            key=lambda thing: thing.y):
            if isinstance(thing, Tuft):
                canvas.thing = 0
                paint_tuft(canvas, thing)
                continue
            canvas.thing = 1 + (restyled.trees + restyled.animals).index(thing)
            if isinstance(thing, Tree):
                paint_tree(canvas, restyled, thing)
            else:
                paint_animal(canvas, restyled, thing, "plain")
        classes = np.zeros(len(LABELS), dtype=np.uint8)
        for i, members in enumerate(SCENE_CLASSES.values()):
            classes[[LABELS.index(label) for label in members]] = i
        centre = slice(times // 2, None, times)
        maps = (np.asarray(sheet)[centre, centre] for sheet in (canvas.label, canvas.instance))
        label, instance = maps
        return (lit(canvas, restyled, times), Image.fromarray(classes[label]),
                Image.fromarray(instance))

    return draw


def draw(folder, n, size, seed, n_test=40):
    """Fill `folder` with `n` training layouts, `n_test` for val and `n_test` for test.

    Each picture has a style of its own; the layouts of val and test are also there in every style.
    Picture i depends on seed, split and i only.
    """
    names = list(SCENE_STYLES)
    for split, stream, count in (("train", 3, n), ("val", 32, n_test), ("test", 4, n_test)):
        subs = [f"{split}_{kind}" for kind in ("img", "label", "inst")]
        subs += [] if split == "train" else [f"{split}_styles/{name}" for name in names]
        for sub in subs:
            (folder / sub).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([seed, stream, i])
            own, render_in = choose(rng, names), styled_scene(rng)
            for sub, sheet in zip(subs, render_in(own, size), strict=False):
                sheet.save(folder / sub / f"{i:04d}.png")
            for sub in subs[3:]:
                render_in(Path(sub).name, size)[0].save(folder / sub / f"{i:04d}.png")
    contact_sheet(folder, [("train_img", "each in one of six styles"),
                           ("test_img", "held-out layouts"),
                           *((f"test_styles/{name}", "the same layouts") for name in names)],
                  folder / "contact.png")


# 2. Scores ----------------------------------------------------------------------------------------

SEGMENTER_STEPS = 700


def painted_scene_scores(answers, test, data, root, split="test", device="cpu"):
    """`scene_scores`, and mIoU and accuracy of the first answer by three small networks that learnt
    from the real pictures and are kept beside the folder.

    test: (labels (N, H, W), edges, x (N, 3, H, W)) of the split; data[n]: the same of a training
    sample.
    """
    from .reading import label_scores, mean_colours  # PyTorch, which drawing does without

    classes, world = len(SCENE_CLASSES), zlib.crc32((Path(root) / STAMP).read_bytes())
    kept = [f"{root}-{world:08x}-{SEGMENTER_STEPS}-segmenter{seed}.pt" for seed in range(3)]
    colours = mean_colours(data, classes)[1].numpy()
    return scene_scores(answers, test[0].numpy(), root, colours, split) + label_scores(
        next(iter(answers.values())), test, data, classes, [], device, kept, SEGMENTER_STEPS,
        balanced=True)


def scene_scores(answers, label, folder, mean_colours, split="test"):
    """Scores of pictures painted from the label maps of a split of a `scenes` folder.

    answers: {"own style": x, "another's style": x, "z": x}, each (N, 3, H, W) in [-1, 1] for the
    N layouts in order: in the style of the layout's own picture, in the style of the next
    layout's picture, and in no style in particular ("G(m)": G has none). label: (N, H, W).
    mean_colours: (classes, 3), what a trivial answer paints each class with. A colour error is the
    mean absolute difference, in grey levels, of colours averaged over 5x5 pixels of 64, so that
    colours count and texture does not; for the last two it is that to the nearest style. Returns
    [{"name", "value", "better", "trivial"}]; lower is better.
    """
    files = sorted((Path(folder) / f"{split}_img").glob("*.png"))

    def load(sub):
        return np.stack([np.asarray(Image.open(Path(folder) / sub / f.name)) for f in files]
                        ).transpose(0, 3, 1, 2) / 127.5 - 1

    own = load(f"{split}_img")
    every = np.stack([load(f"{split}_styles/{style}") for style in SCENE_STYLES])
    style = np.abs(every - own).mean(axis=(2, 3, 4)).argmin(axis=0)  # of each picture
    another = every[np.roll(style, -1), np.arange(len(own))]
    flat = np.asarray(mean_colours)[label].transpose(0, 3, 1, 2)
    radius = max(1, own.shape[-1] // 32)

    def error(x, truth):
        x, truth = (window_mean(np.asarray(a, dtype=np.float64), radius) for a in (x, truth))
        return np.abs(x - truth).mean(axis=(1, 2, 3)) * GREY_LEVELS  # (N,)

    measures = {"own style": lambda x: error(x, own).mean(),
                "another's style": lambda x: error(x, another).mean(),
                "z": lambda x: np.min([error(x, e) for e in every], axis=0).mean()}
    measures["G(m)"] = measures["z"]
    trivial = {"own style": {"the true picture in the other style": another},
               "another's style": {"the true picture in the other style": own,
                                   "copy the exemplar": np.roll(own, -1, axis=0)},
               "z": {}, "G(m)": {}}
    return [score(f"colour error, {name}", measures[name], x,
                  {"mean colour per class": flat} | trivial[name]) for name, x in answers.items()]
