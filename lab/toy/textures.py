"""textures: shapes on a ground, painted in two materials; for the Swapping Autoencoder.

    train/0000       dark discs with red rings on a plain green ground       (val, test: other ones)
    test/0000        dark bars with a blue rim on a ringed pink ground
    test_truth/0000  the shapes of test/0000 in the materials of test/0001   (val_truth: of val)

A picture is a layout (which places are figure, which are ground) painted in two materials (each a
motif in two shades of a hue). They run along the outline, so that every picture tells where they
belong, whatever its own: a layout in other materials is one definite picture, the true answer to
"the structure of this one, the texture of that one".
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

MOTIFS = ("plain", "rim", "rings")
RIM = 0.09  # width of a rim or ring, as a share of the picture's side: 5.8 pixels of 64
SOFT = 0.06  # over which an outline fades


@dataclass(frozen=True)
class Material:
    motif: str  # one of MOTIFS
    back: tuple  # RGB of the material
    mark: tuple  # RGB of its motif


@dataclass(frozen=True)
class Texture:
    ground: Material  # light
    figure: Material  # dark


def sample_material(rng, figure):
    """A motif in two shades of one hue: dark and saturated for a figure, light for the ground."""
    hue, shades = rng.random(), ((0.9, 0.35), (0.9, 0.8)) if figure else ((0.2, 1.0), (0.5, 0.65))
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


def paint_material(material, depth):
    """The material at a distance `depth` (H, W) from the outline: floats (H, W, 3) in 0..255."""
    mark = {"plain": np.zeros_like(depth), "rim": ((RIM - depth) / SOFT + 0.5).clip(0, 1),
            "rings": 0.5 + 0.5 * np.cos(depth / RIM * math.pi)}[material.motif][..., None]
    return mark * np.array(material.mark) + (1 - mark) * np.array(material.back)


def render_texture(layout, texture, size):
    """The layout in the texture's two materials, an RGB Pillow picture of size x size pixels."""
    height = elevation(layout, size * supersample(size))
    inside = (height / SOFT + 0.5).clip(0, 1)[..., None]
    picture = (inside * paint_material(texture.figure, height.clip(0))
               + (1 - inside) * paint_material(texture.ground, (-height).clip(0)))
    return Image.fromarray(picture.round().astype(np.uint8)).reduce(supersample(size))


def draw(folder, n, size, seed, n_test=40):
    """Fill `folder` with `n` training pictures, `n_test` for val and for test.

    Layout and texture of picture i depend on seed, split and i only. test_truth/0007.png has the
    layout of test/0007.png and the texture of test/0008.png (the last one takes the first one's).
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
                picture = render_texture(layout, looks[(i + shift) % count], size)
                picture.save(folder / sub / f"{i:04d}.png")
    contact_sheet(folder, [("train", "layouts in materials"), ("test", "other ones"),
                           ("test_truth", "the same layouts in the next one's materials")],
                  folder / "contact.png")


# 2. Scores ----------------------------------------------------------------------------------------

def texture_scores(x, exemplar, y_hat, y):
    """Scores of swaps y_hat (structure of x, texture of exemplar) against their true answers y.

    All are float arrays (N, 3, H, W) in [-1, 1]; scores are mean absolute differences in grey
    levels of 0..255, lower is better: "swap error" of the pictures, "palette error" of their means
    over a rim's width, "pattern error" of what these means leave. The trivial answers are x, the
    exemplar, and x with the mean and deviation of the exemplar's colour channels.
    Returns [{"name", "value", "better", "trivial"}].
    """
    x, exemplar, y_hat, y = as_floats(x, exemplar, y_hat, y)
    radius = max(1, round(x.shape[-1] * RIM / 2))
    answers = {"copy the structure": x, "copy the texture": exemplar,
               "colour transfer": colour_transfer(x, exemplar)}

    def palette(a):
        return window_mean(a, radius)

    def error_of(part):
        return lambda a: np.abs(part(a) - part(y)).mean() * GREY_LEVELS

    return [score("swap error", error_of(lambda a: a), y_hat, answers),
            score("palette error", error_of(palette), y_hat, answers),
            score("pattern error", error_of(lambda a: a - palette(a)), y_hat, answers)]
