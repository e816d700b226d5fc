"""synthetic2real: computer graphics with label maps, and what a camera sees; for CyCADA.

    source_img/0000  flat: one colour per class, two levels  source_label/0000  its classes
                     of light, hard edges
    target_img/0000  another scene of the same world in the  target_label/0000  its classes, never
                     evening: rough, noisy                                      shown to the method
    val_*, test_*    more of the target

The gap between them is a number: 0 gives the graphics the evening's mean colours, 1 saturated ones,
and tints the camera's pictures all the more. At 1 (synthetic2real_wide) what is learnt from the
graphics is worse than a constant answer; at GAP it is right for half of the pixels.

Labels are palette PNGs of indices into CLASSES. They are the truth: a segmenter trained on adapted
source pictures is scored on the labels of test_img.
"""
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from .disk import contact_sheet
from .world import LABELS, paint, render, sample_scene, supersample

CLASSES = ("sky", "hill", "ground", "trunk", "leaves", "grass", "animal")  # of the label maps
# Per class: its one colour in computer graphics at gap 1, and at gap 0; how rough its surface is
# before a camera.
FLAT = ((110, 190, 255), (160, 140, 220), (120, 205, 95), (120, 70, 30), (25, 130, 60),
        (240, 230, 80), (235, 110, 90))
NATURAL = ((202, 177, 143), (201, 163, 98), (170, 137, 70), (107, 80, 53), (86, 85, 45),
           (209, 174, 112), (111, 73, 47))  # what a class looks like under a low sun, on average
GAP = 0.125
ROUGH = (0.02, 0.06, 0.12, 0.12, 0.26, 0.06, 0.06)
EVENING = ((0.94, 0.12, 0.02), (0.04, 0.66, 0.04), (0.10, 0.04, 0.62))  # red, green, blue of RGB
STRAW = (250, 236, 190)


def class_map(canvas, size):
    """The class that fills most of each pixel: uint8 array (size, size) of indices of CLASSES."""
    of_label = [name if name in CLASSES else "animal" for name in LABELS]
    of_label += [None] * (256 - len(of_label))
    sheets = [canvas.label.point([255 * (name == c) for name in of_label]) for c in CLASSES]
    return np.argmax([np.asarray(s.reduce(canvas.size // size)) for s in sheets], axis=0)


def render_graphics(scene, size, rng, gap=GAP):
    """The scene as cheap computer graphics: an RGB picture (size, size), and its label map.

    One colour per class, a little different in every scene, two levels of light, no
    texture, hard edges.
    """
    canvas = paint(scene, size * supersample(size), "plain")
    label = class_map(canvas, size)
    flat = np.array(NATURAL) + gap * (np.array(FLAT) - NATURAL)
    flat = flat * rng.uniform(0.9, 1.1, (len(FLAT), 1)) + rng.normal(0, 6, (len(FLAT), 3))
    sunlit = np.asarray(canvas.light.reduce(canvas.size // size)) > 100
    picture = flat[label] * np.where(sunlit, 1.0, 0.75)[..., None]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), label


def render_camera(scene, size, rng, gap=GAP):
    """The scene as a camera sees it in the evening: an RGB picture (size, size), and its label map.

    Natural colours under a low sun, surfaces with texture, everything tinted; then what the camera
    adds: a soft lens that darkens the corners, and noise.
    """
    scene = replace(scene, daylight="golden")
    label = class_map(paint(scene, size * supersample(size), "plain"), size)
    grain = sum(np.asarray(Image.fromarray(rng.normal(0, 1, (n, n)).astype(np.float32)).resize(
        (size, size), Image.Resampling.BICUBIC)) for n in (size, size // 3))
    picture = np.asarray(render(scene, size)) * (1 + np.array(ROUGH)[label] * grain)[..., None]
    evening = np.eye(3) + gap * (np.array(EVENING) - np.eye(3))
    picture = picture @ (evening.T * rng.uniform(0.85, 1.05))
    picture = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    picture = np.asarray(picture.filter(ImageFilter.GaussianBlur(size / 150))).astype(float)
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    picture = picture * (1 - 0.22 * (x * x + y * y))[..., None] + rng.normal(0, 5, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), label


def draw(folder, n, size, seed, n_test=60, gap=GAP):
    """Fill `folder` with `n` labelled pictures of the source, `n` of the target, `n_test` to choose
    presets on (val) and `n_test` to score.

    Scene i of a split depends on seed, split and i only.
    """
    splits = {"source": (3, n, render_graphics), "target": (4, n, render_camera),
              "val": (31, n_test, render_camera), "test": (5, n_test, render_camera)}
    for split, (stream, count, render_it) in splits.items():
        for kind in ("img", "label"):
            (folder / f"{split}_{kind}").mkdir()
        for i in range(count):
            rng = np.random.default_rng([seed, stream, i])
            scene = sample_scene(rng)  # with high and pale grass: it must be seen at all
            scene = replace(scene, tufts=tuple(replace(t, height=2 * t.height, colour=STRAW)
                                               for t in scene.tufts))
            picture, label = render_it(scene, size, rng, gap)
            label = Image.fromarray(label.astype(np.uint8))
            label.putpalette(np.array(FLAT, dtype=np.uint8).tobytes())
            picture.save(folder / f"{split}_img" / f"{i:04d}.png")
            label.save(folder / f"{split}_label" / f"{i:04d}.png")
    contact_sheet(folder, [
        ("source_img", "computer graphics"), ("source_label", "their labels"),
        ("target_img", "a camera, other scenes"),
        ("target_label", "labels, never shown to the method"),
        ("test_img", "a camera, held out"), ("test_label", "labels, for the scores"),
    ], folder / "contact.png")
