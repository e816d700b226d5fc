"""The toy world: data sets that are drawn in seconds, in the layout of the real ones of that name.

Every picture is drawn from parameters, so the true answer to every translation is known, and each
data set has scores that compare with it. `val` folders mirror those of `test` with other scenes:
settings are chosen on val, reported on test.

    DATA SET            FOR              FOLDERS, WHERE X IS train, val, test
    horse2zebra         CycleGAN, CUT    XA plain coats, XB stripes
    horse2zebra_single  SinCUT           the same, one picture each
    synthetic2real      CyCADA           source_*, target_*, val_*, test_*: img, label; also _wide
    scenes              SPADE            X_img X_label X_inst; test_styles/STYLE, val_styles/STYLE
    clips               pix2pixSC        X_img/CLIP X_label/CLIP
    sketches            SEGIN            X_sketch X_img X_mask; test_truth test_part, val_*
    day2night           INIT             XA day, XB night; boxes.json
    textures            Swapping AE      X; test_truth, val_truth
    digits_single       EGSC-IT          XA black and white, XB colours; testAB testBA, valAB valBA
    digits_multiple     EGSC-IT          the same, ten digits on a board

Each is a module that draws it and scores answers; world.py is what they share: read it first.

    python -m lab.toy horse2zebra --out DIR --n 400 --size 64 --seed 0  # then see DIR/contact.png
    folder = toy.ensure("horse2zebra", 64)                              # drawn once, then reused
"""
from functools import partial
from pathlib import Path

from . import (
    clips,
    day2night,
    digits,
    disk,
    horse2zebra,
    scenes,
    sketches,
    synthetic2real,
    textures,
)
from .clips import CLIP_FRAMES, clip_answer, clip_scores, clip_style_error
from .day2night import inside_boxes, night_diversity, night_scores, true_nights
from .digits import (
    board_pairs,
    digit_scores,
    digit_vgg,
    drawn_digits,
    perceptual_scores,
    released_pairs,
)
from .horse2zebra import coat_pixels, coat_scores, single_scores
from .scenes import SCENE_CLASSES, SCENE_STYLES, painted_scene_scores, scene_scores
from .sketches import SKETCH_PARTS, reference_scores, sketch_scores
from .synthetic2real import CLASSES, FLAT
from .textures import swap_scores, texture_scores
from .world import COATS, LABELS, coat_mask, render, sample_scene

__all__ = ["CLASSES", "CLIP_FRAMES", "COATS", "DATASETS", "DEFAULT_N", "DEFAULT_SIZE", "FLAT",
           "LABELS", "SCENE_CLASSES", "SCENE_STYLES", "SKETCH_PARTS", "board_pairs", "clip_answer",
           "clip_scores", "clip_style_error", "coat_mask", "coat_pixels", "coat_scores",
           "digit_scores", "digit_vgg", "draw", "drawn_digits", "ensure", "inside_boxes",
           "night_diversity", "night_scores", "painted_scene_scores", "perceptual_scores",
           "reference_scores", "released_pairs", "render", "sample_scene", "scene_scores",
           "single_scores", "sketch_scores", "swap_scores", "texture_scores", "true_nights"]

# Functions (folder, n, size, seed, n_test) that fill an empty folder; n: training pictures (or
# clips) per domain, n_test: those of val and of test, which has a default.
DATASETS = {"horse2zebra": horse2zebra.draw, "horse2zebra_single": horse2zebra.draw_single,
            "synthetic2real": synthetic2real.draw, "scenes": scenes.draw, "clips": clips.draw,
            "synthetic2real_wide": partial(synthetic2real.draw, gap=1.0),
            "sketches": sketches.draw, "day2night": day2night.draw, "textures": textures.draw,
            "digits_single": digits.draw_single, "digits_multiple": digits.draw_multiple}
DEFAULT_N = {"horse2zebra": 400, "horse2zebra_single": 1, "synthetic2real": 300, "scenes": 600,
             "synthetic2real_wide": 300,
             "clips": 40, "sketches": 400, "day2night": 400, "textures": 800,
             "digits_single": 2000, "digits_multiple": 600}
DEFAULT_SIZE = dict.fromkeys(DATASETS, 64) | {"horse2zebra_single": 256, "digits_single": 28,
                                              "digits_multiple": 112}


def draw(name, out, n=None, size=None, seed=0, stamped=True, **more):
    """Draw a data set into the folder `out`: RGB PNGs of size x size pixels, and contact.png.

    n, size: None for the data set's own. more: n_test, of the data sets that have it. What `out`
    held of a data set drawn before is replaced (stamped: only if it was finished). Raises
    ValueError (unknown name, bad numbers, foreign files in `out`), OSError; `out` then stays as it
    was.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}, expected one of: {', '.join(DATASETS)}")
    n = DEFAULT_N[name] if n is None else n
    size = DEFAULT_SIZE[name] if size is None else size
    if more.get("n_test", 1) < 1:
        raise ValueError(f"n_test is {more['n_test']}, expected at least 1")
    with disk.published(out, disk.describe(name, n, size, seed), stamped) as folder:
        DATASETS[name](folder, n=n, size=size, seed=seed, **more)


def ensure(name, size, root="datasets", n=None, seed=0):
    """The folder root/toy/NAME-SIZE with that data set, drawn now unless it is there already.

    The folder's name gets -nN-sSEED when these are not the defaults. A folder that is incomplete or
    from another version of the world is drawn again. Processes may call this at the same time.
    Returns a Path. Raises as `draw` does.
    """
    n = DEFAULT_N.get(name) if n is None else n
    suffix = "" if (n, seed) == (DEFAULT_N.get(name), 0) else f"-n{n}-s{seed}"
    folder = Path(root) / "toy" / f"{name}-{size}{suffix}"
    if name not in DATASETS or not disk.is_complete(folder, disk.describe(name, n, size, seed)):
        draw(name, folder, n=n, size=size, seed=seed, stamped=False)
    return folder
