"""textures: shapes on a ground, painted in two materials; for the Swapping Autoencoder.

    train/0000       brown speckled shapes on a green ground of lying streaks
    test/0000        others: brown shapes of lying streaks on a blue ground of lying streaks
    test_truth/0000  the shapes of test/0000 in the materials of test/0001

A picture is a layout (which places are figure, which are ground) painted in two materials, each a
motif in two shades of a hue. A motif is noise, smoothed over 9 pixels one way and 3 the other, or 3
both ways, brought to one mean and deviation: so the three motifs share all that single pixels tell
and differ in how neighbours go together, Julesz's idea of a texture. Across, they are finer than
the 8 pixels of a structure code's place, and no place of a picture tells their phase, so a swap can
only be judged by statistics: the motif of each region, its mean colour, the outline.
"""
import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .disk import contact_sheet
from .scoring import GREY_LEVELS, as_floats, colour_transfer, score, window_mean
from .world import choose, supersample

# 1. Drawing ---------------------------------------------------------------------------------------

MOTIFS = ("lying", "upright", "speckle")
LONG, SHORT = np.ones(9), np.array([1.0, 2.0, 1.0])  # filters along and across a streak, in pixels
SOFT = 0.02  # of the picture's side, over which an outline fades


@dataclass(frozen=True)
class Material:
    motif: str  # one of MOTIFS
    back: tuple  # RGB, at one end of the motif
    mark: tuple  # RGB, at the other


@dataclass(frozen=True)
class Texture:
    ground: Material  # light
    figure: Material  # dark


def sample_material(rng, figure):
    """A motif in two shades of one hue: dark and saturated for a figure, light for the ground."""
    hue, shades = rng.random(), ((0.9, 0.2), (0.85, 0.65)) if figure else ((0.1, 1.0), (0.55, 0.75))
    back, mark = (tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, *shade))
                  for shade in shades)
    return Material(choose(rng, MOTIFS), back, mark)


def sample_texture(rng):
    """Two materials, ground and figure."""
    return Texture(sample_material(rng, False), sample_material(rng, True))


def sample_layout(rng):
    """[(kind, x, y, radius, turn)]: two to four figures that do not overlap much."""
    figures = []
    for _ in range(int(rng.integers(2, 5))):
        for _ in range(20):
            radius = rng.uniform(0.18, 0.28)
            x, y = rng.uniform(0.15, 0.85, 2)
            if all(math.hypot(x - a, y - b) > 0.8 * (radius + r) for _, a, b, r, _ in figures):
                kind = choose(rng, ("disc", "square", "triangle", "bar"))
                figures.append((kind, x, y, radius, rng.uniform(0, math.pi)))
                break
    return figures


def elevation(layout, size):
    """How far inside a figure (above 0) or outside all (below), in sides: (size, size)."""
    across = (np.arange(size) + 0.5) / size
    heights = []
    for kind, x, y, radius, turn in layout:
        u, v = across[None] - x, across[:, None] - y
        u, v = u * math.cos(turn) + v * math.sin(turn), v * math.cos(turn) - u * math.sin(turn)
        if kind == "disc":
            heights.append(radius - np.hypot(u, v))
        elif kind == "square":
            heights.append(0.8 * radius - np.maximum(abs(u), abs(v)))
        elif kind == "bar":
            heights.append(np.minimum(1.4 * radius - abs(u), 0.5 * radius - abs(v)))
        else:  # triangle: three half-planes
            heights.append(0.6 * radius - np.max([u * math.cos(a) + v * math.sin(a) for a in (
                0, 2 * math.pi / 3, 4 * math.pi / 3)], axis=0))
    return np.max(heights, axis=0)


def paint_material(material, size, rng):
    """The material all over a picture, floats (size, size, 3) in 0..255; rng: of its noise."""
    rows, columns = {"lying": (SHORT, LONG), "upright": (LONG, SHORT),
                     "speckle": (SHORT, SHORT)}[material.motif]
    grain = rng.standard_normal((size + len(rows) - 1, size + len(columns) - 1))
    for axis, taps in enumerate((rows, columns)):
        windows = np.lib.stride_tricks.sliding_window_view(grain, len(taps), axis)
        grain = windows @ taps / np.linalg.norm(taps)  # the deviation stays 1
    mark = (0.5 + 0.35 * grain).clip(0, 1)[..., None]
    return mark * np.array(material.mark) + (1 - mark) * np.array(material.back)


def render_texture(layout, texture, size, rng):
    """The layout in the texture's two materials, an RGB Pillow picture of size x size pixels."""
    fine = supersample(size)
    inside = (elevation(layout, size * fine) / SOFT + 0.5).clip(0, 1)
    inside = inside.reshape(size, fine, size, fine).mean((1, 3))[..., None]
    picture = (inside * paint_material(texture.figure, size, rng)
               + (1 - inside) * paint_material(texture.ground, size, rng))
    return Image.fromarray(picture.round().astype(np.uint8))


def draw(folder, n, size, seed, n_test=40):
    """Fill `folder` with `n` training pictures, `n_test` for val and for test.

    Layout, texture and noise of picture i depend on seed, split and i only. test_truth/0007.png has
    the layout of test/0007.png, the texture of test/0008.png (the last one takes the first one's)
    and noise of its own.
    """
    if n_test < 2:
        raise ValueError(f"n_test is {n_test}, expected at least 2")
    for split, stream, count in (("train", 20, n), ("val", 36, n_test), ("test", 22, n_test)):
        layouts, looks = (
            [sample(np.random.default_rng([seed, s, i])) for i in range(count)]
            for sample, s in ((sample_layout, stream), (sample_texture, stream + 1)))
        for sub, shift in ((split, 0), (f"{split}_truth", 1))[:1 if split == "train" else 2]:
            (folder / sub).mkdir()
            for i, layout in enumerate(layouts):
                picture = render_texture(layout, looks[(i + shift) % count], size,
                                         np.random.default_rng([seed, stream, i, shift]))
                picture.save(folder / sub / f"{i:04d}.png")
    contact_sheet(folder, [("train", "layouts in materials"), ("test", "other ones"),
                           ("test_truth", "the same layouts in the next one's materials")],
                  folder / "contact.png")


# 2. Scores ----------------------------------------------------------------------------------------


def is_ground(a):
    """Where pictures (N, 3, H, W) are light: their brightest channel is above 0.7 of white."""
    return a.max(axis=1) > 0.4


def regions(y):
    """[(N, H, W)] of figure and of ground, without what is near an outline."""
    share = window_mean(is_ground(y).astype(float), max(1, round(y.shape[-1] * SOFT)))
    return [share < 1e-6, share > 1 - 1e-6]


def motifs(a, region):
    """(orientation, strength) of the motif of each picture in its region, two of (N,).

    With e_x the mean squared difference of pixels two apart in a row, e_y in a column, orientation
    is (e_x - e_y) / (e_x + e_y): about 0.6 for upright streaks, 0 for speckle, -0.6 for lying ones;
    strength is (e_x + e_y)^(1/2).
    """
    grey, energy = a.mean(axis=1), []
    for axis in (2, 1):
        near, far = ((slice(None),) * axis + (s,) for s in (slice(None, -2), slice(2, None)))
        both = region[near] & region[far]
        squares = np.where(both, np.square(grey[far] - grey[near]), 0).sum((1, 2))
        energy.append(squares / both.sum((1, 2)).clip(1))
    e_x, e_y = energy
    return (e_x - e_y) / (e_x + e_y).clip(1e-12), np.sqrt(e_x + e_y)


def dark_and_light(content, x, reference):
    """The content with the reference's mean and deviation of colours: inside the dark pixels of x
    those of its dark pixels, inside the light ones those of its light ones."""
    painted = np.zeros_like(content)
    for light in (False, True):
        here, there = ((is_ground(a) == light)[:, None] for a in (x, reference))
        (mean, std), (to_mean, to_std) = (moments(a, part) for a, part in
                                          ((content, here), (reference, there)))
        painted += here * ((content - mean) / (std + 1e-6) * to_std + to_mean)
    return painted.clip(-1, 1)


def moments(a, part):
    """Mean and deviation of each channel (N, 3, 1, 1) where part (N, 1, H, W) is true."""
    n = part.sum((2, 3), keepdims=True).clip(1)
    mean = np.where(part, a, 0).sum((2, 3), keepdims=True) / n
    return mean, np.sqrt((part * np.square(a - mean)).sum((2, 3), keepdims=True) / n)


def texture_scores(x, exemplar, y_hat, y):
    """Scores of swaps y_hat (structure of x, texture of exemplar) against their true answers y.

    All are float arrays (N, 3, H, W) in [-1, 1]; a region is figure or ground of y. "motif right":
    the share of regions whose orientation is on the truth's side of +- 0.3 and whose strength is at
    least half of the truth's. "colour error": of the regions' mean colours, in grey levels of
    0..255. "outline error": the share of pixels, averaged over 3 x 3, that are dark where y is
    light or light where it is dark. Returns [{"name", "value", "better", "trivial"}].
    """
    x, exemplar, y_hat, y = as_floats(x, exemplar, y_hat, y)
    figure_and_ground = regions(y)

    def class_of(orientation):
        return (orientation > 0.3).astype(int) - (orientation < -0.3)

    def motif_right(a):
        right = []
        for region in figure_and_ground:
            (found, strength), (truth, least) = motifs(a, region), motifs(y, region)
            right.append((class_of(found) == class_of(truth)) & (strength >= least / 2))
        return np.mean(right)

    def colour_error(a):
        return GREY_LEVELS * np.mean([np.abs(moments(a, r[:, None])[0] - moments(y, r[:, None])[0])
                                      for r in figure_and_ground])

    def outline_error(a):
        return (is_ground(window_mean(a, 1)) != is_ground(window_mean(y, 1))).mean()

    noise = np.random.default_rng(0).standard_normal(x[:, :1].shape)
    answers = {"copy the structure": x, "copy the texture": exemplar,
               "colour transfer": colour_transfer(x, exemplar),
               "colour transfer in dark and light": dark_and_light(x, x, exemplar),
               "flat colours in dark and light": dark_and_light(0 * x, x, exemplar),
               "noise in dark and light": dark_and_light(noise + 0 * x, x, exemplar)}
    return [score("motif right", motif_right, y_hat, answers, "higher"),
            score("colour error", colour_error, y_hat, answers),
            score("outline error", outline_error, y_hat, answers)]


def swap_scores(folder, split, hybrid):
    """`texture_scores` of hybrid(structures, textures) on a split of a drawn folder, float arrays
    (N, 3, H, W) in [-1, 1]; each picture gets the texture of the next one.

    In which code does an error sit? The last scores take one code, or both, from the true answer:
    what is wrong with the truth's structure code must be the texture code's fault, and the reverse.
    """
    x, y = (np.stack([np.asarray(Image.open(f), np.float32) for f in sorted(
        (folder / f"{split}{kind}").glob("*.png"))]).transpose(0, 3, 1, 2) / 127.5 - 1
        for kind in ("", "_truth"))
    x2 = np.roll(x, -1, axis=0)
    scores = texture_scores(x, x2, hybrid(x, x2), y)
    for codes, pair in (("structure code", (y, x2)), ("texture code", (x, y)), ("codes", (y, y))):
        scores += [s | {"name": f"{s['name']}, truth's {codes}", "trivial": {}}
                   for s in texture_scores(x, x2, hybrid(*pair), y)[:2]]
    return scores
