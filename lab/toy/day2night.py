"""day2night: villages by day and by night, with objects that shine by themselves; for INIT.

    trainA/0000  a hut, a lantern, a pale animal by day     trainB/0000  another village by night
    testA/0000   a village by day                           testB/0000   the same one by night
    valA, valB   as testA and testB                         boxes.json   where the objects are

By night the landscape keeps its contrasts and loses its light: everything takes the tint of the
sky. Objects do not: windows and lanterns glow and coats reflect, in a colour of their own that
says nothing about the sky's. So no single change of colours is right for both. Pictures 2k and
2k + 1 of testB (and of valB) share a night: each is a reference for the style of the other.
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .animals import HOOF, animal_parts, place
from .disk import STAMP, contact_sheet
from .scoring import GREY_LEVELS, as_floats, colour_transfer, score
from .world import (
    COAT_PARTS,
    DAYLIGHT,
    LABELS,
    choose,
    paint,
    sample_animal,
    sample_scene,
    supersample,
    vary,
)

# 1. Drawing ---------------------------------------------------------------------------------------

NIGHT_SKIES = {"blue": (62, 84, 158), "violet": (122, 60, 132), "green": (44, 112, 96)}
STREAMS = {"trainA": 10, "trainB": 11, "valA": 35, "valB": 35, "testA": 12, "testB": 12}
GLOWS = {"amber": (255, 196, 64), "cyan": (120, 240, 255), "rose": (255, 112, 128)}


@dataclass(frozen=True)
class Night:
    sky: tuple  # tint of everything that has no light of its own
    glow: tuple  # of windows, lanterns and reflecting coats


@dataclass(frozen=True)
class Thing:
    kind: str  # "hut" or "lantern"
    x: float  # the foot
    y: float
    height: float
    wall: tuple


def sample_night(rng):
    """A random Night: sky and glow are drawn independently."""
    return Night(vary(rng, choose(rng, tuple(NIGHT_SKIES.values())), 0.1),
                 vary(rng, choose(rng, tuple(GLOWS.values())), 0.04))


def sample_village(rng):
    """(Scene with one pale animal, Things): a savanna with a hut and a lantern."""
    scene, side = sample_scene(rng), choose(rng, (-1, 1))
    xs = 0.5 + side * np.array((-0.25, 0.25, 0.03)) + rng.uniform(-0.05, 0.05, 3)
    things = (Thing("hut", xs[0], rng.uniform(0.62, 0.84), rng.uniform(0.34, 0.46),
                    vary(rng, (206, 178, 140), 0.12)),
              Thing("lantern", xs[2], rng.uniform(0.78, 0.95), rng.uniform(0.36, 0.5), HOOF))
    animal = sample_animal(rng, rng.uniform(0.3, 0.36), xs[1])
    animal = replace(animal, y=rng.uniform(0.8, 0.94), plain=vary(rng, (244, 240, 232), 0.04))
    return replace(scene, trees=tuple(t for t in scene.trees if t.y < scene.horizon + 0.12),
                   animals=(animal,)), things


def outlines_of(thing):
    """[(outline (N, 2), colour by day, whether it glows by night)], back to front."""
    x, y, h = thing.x, thing.y, thing.height
    def box(left, bottom, right, top):
        return [(x + u * h, y - v * h) for u, v in ((left, bottom), (left, top), (right, top),
                                                    (right, bottom))]
    if thing.kind == "lantern":
        return [(box(-.03, 0, .03, .7), thing.wall, False),
                (box(-.11, .7, .11, .95), (176, 186, 190), True),
                (box(-.15, .92, .15, 1), thing.wall, False)]
    roof = [(x - .56 * h, y - .52 * h), (x, y - h), (x + .56 * h, y - .52 * h)]
    return [(box(-.44, 0, .44, .56), thing.wall, False), (roof, (136, 96, 60), False),
            (box(-.09, 0, .13, .36), (84, 62, 48), False),
            (box(-.36, .16, -.15, .4), (96, 112, 128), True),
            (box(.19, .16, .38, .4), (96, 112, 128), True)]


def village_boxes(scene, things, size):
    """The objects as [{"box": [x0, y0, x1, y1], "label"}], whole pixels, clipped to the picture."""
    found = [(t.kind, np.concatenate([points for points, *_ in outlines_of(t)])) for t in things]
    found += [("animal", np.concatenate([place(animal, part.tube.outline())
                                         for part in animal_parts(animal)]))
              for animal in scene.animals]
    boxes = []
    for label, points in found:
        low, high = (points.clip(0, 1) * size).min(0), (points.clip(0, 1) * size).max(0)
        boxes.append({"box": [*map(int, np.floor(low)), *map(int, np.ceil(high))], "label": label})
    return boxes


def render_village(scene, things, size, night=None):
    """The village by day, or in a Night, as an RGB Pillow picture of size x size pixels."""
    times = supersample(size)
    canvas = paint(scene, size * times, "plain")
    day = DAYLIGHT[scene.daylight]
    light = np.asarray(canvas.light.filter(ImageFilter.GaussianBlur(canvas.size * 0.005))) / 255.0
    shade, sun = np.array(day["shade"]), np.array(day["sun"]) * scene.brightness
    picture = np.asarray(canvas.colour) * (shade + (sun - shade) * light[..., None]) / 255
    if night:
        grey = picture.mean(axis=2, keepdims=True) / 255
        coat = np.isin(np.asarray(canvas.label), [LABELS.index(name) for name in COAT_PARTS])
        shine = (0.55 + 0.6 * light[..., None]) * np.array(night.glow)
        picture = np.where(coat[..., None], shine, (0.06 + 1.2 * grey**2.2) * np.array(night.sky))
    sheet = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(sheet)
    for thing in sorted(things, key=lambda thing: thing.y):
        for points, colour, glows in outlines_of(thing):
            if night:
                grey = np.mean(colour) / 255
                colour = night.glow if glows else (0.06 + 1.2 * grey**2.2) * np.array(night.sky)
            else:
                colour = np.array(colour) * sun / 255
            draw.polygon(np.multiply(points, canvas.size).ravel().tolist(),
                         fill=tuple(int(c) for c in np.clip(colour, 0, 255)))
    return sheet.reduce(times)


def draw(folder, n, size, seed, n_test=40):
    """Fill `folder` with `n` training pictures by day and `n` by night, no village in common, and
    `n_test` pairs for val and for test.

    boxes.json: {"trainA/0000.png": [{"box": [x0, y0, x1, y1], "label"}]}. Picture i depends on
    seed, split and i only; every night has its own sky and its own glow.
    """
    if n_test < 2 or n_test % 2:
        raise ValueError(f"n_test is {n_test}, expected an even number")
    boxes = {}
    for sub, stream in STREAMS.items():
        (folder / sub).mkdir()
        for i in range(n if sub.startswith("train") else n_test):
            scene, things = sample_village(np.random.default_rng([seed, stream, i]))
            pair = i if sub == "trainB" else i // 2
            night = sample_night(np.random.default_rng([seed, stream + 10, pair]))
            name = f"{sub}/{i:04d}.png"
            picture = render_village(scene, things, size, night if sub.endswith("B") else None)
            picture.save(folder / name)
            boxes[name] = village_boxes(scene, things, size)
    (folder / "boxes.json").write_text(json.dumps(boxes) + "\n")
    contact_sheet(folder, [("trainA", "day"), ("trainB", "night, other scenes"), ("testA", "day"),
                           ("testB", "the same scenes by night: the true answers")],
                  folder / "contact.png")


# 2. Scores ----------------------------------------------------------------------------------------

def inside_boxes(root, split):
    """(N, H, W): which pixels of a split's pictures lie in a box."""
    table, inside = json.loads((Path(root) / "boxes.json").read_text(encoding="utf-8")), []
    for file in sorted(Path(root, f"{split}A").glob("*.png")):
        with Image.open(file) as im:
            inside.append(np.zeros((im.height, im.width), dtype=bool))
        for x0, y0, x1, y1 in (thing["box"] for thing in table[f"{split}A/{file.name}"]):
            inside[-1][y0:y1, x0:x1] = True
    return np.stack(inside)


def true_nights(root, split, count=4):
    """Every scene of a split in the nights of `count` other pairs: (N, count, 3, H, W)."""
    stamp = json.loads((Path(root) / STAMP).read_text())
    seed, size, stream = stamp["seed"], stamp["size"], STREAMS[f"{split}B"]
    n, pictures = len(list(Path(root, f"{split}B").glob("*.png"))), []
    nights = [sample_night(np.random.default_rng([seed, stream + 10, k])) for k in range(n // 2)]
    for i in range(n):
        village = sample_village(np.random.default_rng([seed, stream, i]))
        for k in range(i // 2 + 1, i // 2 + 1 + count):
            pictures.append(render_village(*village, size, nights[k % len(nights)]))
    pictures = np.stack([np.asarray(p) for p in pictures]).transpose(0, 3, 1, 2)
    return pictures.reshape(n, count, 3, size, size) / GREY_LEVELS - 1


def night_scores(x, reference, y_hat, y, inside):
    """Scores of translations y_hat of day pictures x against the true nights y.

    All (N, 3, H, W) in [-1, 1]; `reference` shows another scene in y's night; inside: the boxes,
    (N, H, W). Scores are mean absolute differences in grey levels of 0..255, inside the boxes and
    outside of them; the trivial answers are the input, the reference, its mean colour, and one
    change of colours for the whole picture: the input with the mean and deviation of the
    reference's channels. Returns [{"name", "value", "better", "trivial"}].
    """
    x, reference, y_hat, y = as_floats(x, reference, y_hat, y)
    answers = {"copy the input": x, "copy the reference": reference,
               "mean colour": np.broadcast_to(reference.mean((2, 3), keepdims=True), x.shape),
               "one change of colours": colour_transfer(x, reference)}

    def error_in(where):
        return lambda a: np.abs(a - y).mean(axis=1)[where].mean() * GREY_LEVELS

    return [score("object error", error_in(inside), y_hat, answers),
            score("background error", error_in(~inside), y_hat, answers)]


def night_diversity(x, several, nights, inside):
    """Scores of several translations of each x in random styles, (N, S, 3, H, W), against the same
    scenes in several true nights (N, T, 3, H, W).

    Diversity: the mean difference of two outputs for one scene, in grey levels, inside the boxes
    and outside of them; `better` says higher, as Tab. 3 has it, but what exceeds that of true
    nights is no virtue, for noise does.
    Distance to nights: the energy distance of outputs and true nights, pixel by pixel, 0 for equal
    distributions alone; its trivial answers are one change of colours, towards each of the nights
    of other scenes, and those nights themselves. Returns [{"name", "value", "better", "trivial"}].
    """
    x, several, nights = as_floats(x, several, nights)
    others = np.roll(nights, 2, axis=0)
    painted = np.stack([colour_transfer(x, others[:, t]) for t in range(others.shape[1])], axis=1)
    answers = {"one change of colours": painted, "copies of nights": others}

    def apart(a, b, where):
        """Mean difference of a picture of a (N, S, ...) and another one of b."""
        gaps = [np.abs(a[:, i] - b[:, j]).mean(axis=1)[where].mean() * GREY_LEVELS
                for i in range(a.shape[1]) for j in range(b.shape[1]) if a is not b or i < j]
        return np.mean(gaps)

    scores = []
    for name, where in (("object", inside), ("background", ~inside)):
        within = apart(nights, nights, where)
        scores.append({"name": f"{name} diversity", "value": float(apart(several, several, where)),
                       "better": "higher", "trivial": {"true nights": float(within)}})
        scores.append(score(
            f"{name} distance to nights",
            lambda a, where=where, within=within:
            2 * apart(a, nights, where) - apart(a, a, where) - within, several, answers))
    return scores
