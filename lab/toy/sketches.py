"""sketches: outlines of animals whose parts have colours of their own; for SEGIN.

    test_sketch/0000  black outlines       test_img/0000    the same animal, coloured part by part
    test_mask/0000    white: the animal    test_truth/0000  it in the colours of test_img/0001
    test_part/0000    1 + the index into SKETCH_PARTS; 0: background, outlines, shared pixels

train_* have sketch, img and mask; val_* is as test_*. Each part takes the colour of the reference's
same part, wherever that part is: no single change of colours is right.
"""
import colorsys
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .animals import BLACK, Animal, animal_parts, place
from .disk import contact_sheet
from .scoring import GREY_LEVELS, as_floats, score
from .world import WHITE, Canvas, supersample

# 1. Drawing ---------------------------------------------------------------------------------------

SKETCH_PARTS = ("body", "cloth", "neck", "head", "legs", "hair")
SKETCH_PART = {"leg": "legs", "hoof": "legs", "ear": "head", "muzzle": "head", "eye": "head",
               "mane": "hair", "tail": "hair"}  # names of animal_parts that count as another's


def sample_sketch(rng):
    """A random animal that looks right, like all others (as all shoes of edges2shoes look left),
    and a colour for each of SKETCH_PARTS, no two of them alike: (Animal, (6, 3) array)."""
    unit = rng.uniform(0.48, 0.55)
    animal = Animal(x=0.02 + 0.7 * unit + rng.uniform(0, 0.05), y=rng.uniform(0.83, 0.95),
                    unit=unit, facing=1, graze=rng.uniform(0, 0.3), plain=WHITE,
                    phase=rng.uniform(0, 2 * math.pi), stride=rng.uniform(0.02, 0.13))
    apart = 0
    while apart < 75:  # grey levels, between the two most similar parts
        colours = [colorsys.hsv_to_rgb(h, s, v) for h, s, v in rng.uniform(
            (0, 0.25, 0.55), (1, 0.85, 1), (len(SKETCH_PARTS), 3))]
        colours = np.array(colours) * 255
        gaps = np.linalg.norm(colours[:, None] - colours, axis=2)
        apart = gaps[np.triu_indices(len(colours), 1)].min()
    return animal, colours


def paint_sketch(animal, colours, size):
    """(sketch, photo, part): two RGB pictures and an array (size, size) of 1 + the index into
    SKETCH_PARTS, 0 for the background and for every pixel that an outline or two parts share."""
    times, fine = supersample(size), 8
    canvas, piece = Canvas(size * times), Image.new("L", (size * times,) * 2)
    part, lines = piece.copy(), np.zeros((size * times,) * 2, dtype=bool)
    pieces = []
    for p in animal_parts(animal):
        name = SKETCH_PART.get(p.label, p.label)
        if p.label != "eye":
            pieces.append((name, p.tube.strips(p.root, fine), 0.45 if p.far else 1))
        if name == "body":  # the cloth lies on its back; v = 1 is the spine
            s, v = np.linspace(0.34, 0.62, 9) * p.tube.length, np.linspace(-0.3, 1.04, fine + 1)
            grid = p.tube.at(s[:, None], v)
            pieces.append(("cloth", [np.concatenate([grid[:, k], grid[::-1, -1]])
                                     for k in range(fine)], 1))
    for number, (name, strips, near) in enumerate(pieces, start=1):
        outline = place(animal, strips[0])
        xy, index = (outline * canvas.size).ravel().tolist(), SKETCH_PARTS.index(name)
        for sheet, value in ((piece, number), (part, index + 1)):
            ImageDraw.Draw(sheet).polygon(xy, fill=value)
        for k, strip in enumerate(strips):  # darker below
            canvas.polygon(place(animal, strip), colours[index], near * (0.45 + 0.55 * k / fine))
    number = np.asarray(piece).astype(int)
    lines[:, 1:] |= np.diff(number, axis=1) != 0
    lines[1:] |= np.diff(number, axis=0) != 0
    thick = Image.fromarray(lines).convert("L").filter(ImageFilter.MaxFilter(2 * (times // 2) + 1))
    light = canvas.light.point([150 + int(0.412 * v) for v in range(256)])  # soft: 150 ... 255
    photo = ImageChops.multiply(canvas.colour, Image.merge("RGB", [light] * 3))
    photo.paste("white", mask=part.point(lambda v: 255 * (v == 0)))
    photo.paste(BLACK, mask=thick)
    sketch = ImageChops.invert(thick).convert("RGB")
    blocks = np.where(np.asarray(thick) > 0, 0, np.asarray(part)).reshape(size, times, size, times)
    pure = blocks.min(axis=(1, 3)) == blocks.max(axis=(1, 3))
    return sketch.reduce(times), photo.reduce(times), np.where(pure, blocks[:, 0, :, 0], 0)


def draw(folder, n, size, seed, n_test=40):
    """Fill `folder` with `n` training pairs sketch / photo, `n_test` for val and for test.

    Picture i depends on seed, split and i only; *_truth/0007.png also on picture 8 (of the last
    one: on the first), whose colours it has.
    """
    if n_test < 2:
        raise ValueError(f"n_test is {n_test}, expected at least 2")
    for split, stream, count in (("train", 6, n), ("val", 34, n_test), ("test", 7, n_test)):
        figures = [sample_sketch(np.random.default_rng([seed, stream, i])) for i in range(count)]
        for i, (animal, colours) in enumerate(figures):
            sketch, photo, part = paint_sketch(animal, colours, size)
            inside = (np.asarray(photo) < 250).any(axis=2)
            files = {"sketch": sketch, "img": photo, "mask": Image.fromarray(inside).convert("L")}
            if split != "train":
                others = figures[(i + 1) % count][1]
                files |= {"truth": paint_sketch(animal, others, size)[1],
                          "part": Image.fromarray(part.astype(np.uint8))}
            for kind, picture in files.items():
                (folder / f"{split}_{kind}").mkdir(exist_ok=True)
                picture.save(folder / f"{split}_{kind}" / f"{i:04d}.png")
    contact_sheet(folder, [("train_sketch", "inputs"), ("train_img", "their photos"),
                           ("test_sketch", "inputs"), ("test_img", "their own photos"),
                           ("test_truth", "in the colours of the next one's parts")],
                  folder / "contact.png")


# 2. Scores ----------------------------------------------------------------------------------------

def majority(x, W, part):
    """A painter who is told where the parts are: each part of x in the commonest colour, whatever
    its shade, of W's pixels there; white paper and black lines have no vote."""
    answer = x.copy()
    for a, picture, where in zip(answer, (W + 1) / 2, part, strict=True):
        for k in range(1, len(SKETCH_PARTS) + 1):
            seen = picture[:, where == k]
            seen = seen[:, (seen.min(axis=0) < 0.95) & (seen.max(axis=0) > 0.25)]
            tints = (seen / np.maximum(seen.max(axis=0), 1e-6) * 5).round()
            kinds, votes = np.unique(tints, axis=1, return_counts=True)
            if votes.size:
                chosen = (tints == kinds[:, votes.argmax(), None]).all(axis=0)
                a[:, where == k] = seen[:, chosen].mean(axis=1, keepdims=True) * 2 - 1
    return answer


def sketch_scores(x, y_hat, truth, part, r, W):
    """Scores of translations y_hat of sketches x, with references r, against their true answers.

    All are float arrays (N, 3, H, W) in [-1, 1], W a patchwork of r (its auxiliary picture), but
    part (N, H, W), which is `paint_sketch`'s. A part's colour is its mean over four or more pixels.
    "part colour error": its distance to the truth's, in grey levels. "parts right": the share of
    parts whose colour is nearer to the truth's colour of this part than to any other part's.
    Returns [{"name", "value", "better", "trivial"}]; the trivial answers are r and W themselves,
    the majority of W in each part, the sketch tinted in its truth's overall colour (global control
    at its best), and in the mean colour of all truths.
    """
    x, y_hat, truth, r, W = as_floats(x, y_hat, truth, r, W)
    inside = np.asarray(part) > 0
    each = np.stack([t[:, m].mean(axis=1) for t, m in zip(truth, inside, strict=True)])
    answers = {"majority of W in each part": majority(x, W, part), "W itself": W,
               "copy the reference": r}
    for answer, colour in (("one colour per picture", each), ("mean colour", each.mean(axis=0))):
        flat = np.broadcast_to(np.asarray(colour).reshape(-1, 3, 1, 1), x.shape)
        answers[answer] = np.where(inside[:, None], flat, x)

    def parts(a):
        error, right = [], []
        for picture, true, where in zip(a, truth, part, strict=True):
            masks = [where == k for k in range(1, len(SKETCH_PARTS) + 1)]
            masks = [m for m in masks if m.sum() >= 4]
            found, want = (np.stack([p[:, m].mean(axis=1) for m in masks])
                           for p in (picture, true))
            gaps = np.abs(found[:, None] - want).mean(axis=2)  # [part of a, part of truth]
            error += gaps.diagonal().tolist()
            right += (gaps.argmin(axis=1) == np.arange(len(gaps))).tolist()
        return np.mean(error) * GREY_LEVELS, np.mean(right)

    def whole(a):
        return np.abs(a - truth).mean() * GREY_LEVELS

    return [score("parts right", lambda a: parts(a)[1], y_hat, answers, better="higher"),
            score("part colour error", lambda a: parts(a)[0], y_hat, answers),
            score("picture error", whole, y_hat, answers)]


def reference_scores(answer, x, y, r, folder, split="test"):
    """Scores of a method answer(x, r) -> (y_hat, W), on pictures x, y, r (N, 3, H, W) of a split of
    a drawn folder: those of `sketch_scores`, and three of what a sketch's own photo y gives as its
    reference: its picture error and its distance to y, and ("diversity") its distance to y_hat.

    Distances are those of a random VGG's features, LPIPS without learned weights, whatever VGG the
    method itself uses.
    """
    import common
    from lab import metrics

    def drawn(kind):
        return np.stack([np.asarray(Image.open(f))
                         for f in common.list_pictures(folder / f"{split}_{kind}")])

    vgg = common.VGG([f"relu{i}_1" for i in range(1, 5)], "random")
    truth = drawn("truth").transpose(0, 3, 1, 2) / GREY_LEVELS - 1
    (y_hat, W), (own, W_own) = answer(x, r), answer(x, y)

    def far(a, b):
        return metrics.feature_distance(vgg, a, b)

    def wrong(a):
        return float((a - y).abs().mean() * GREY_LEVELS)

    return [*sketch_scores(x, y_hat, truth, drawn("part"), r, W),
            {"name": "own photo as reference: picture error", "better": "lower",
             "value": wrong(own), "trivial": {"W itself": wrong(W_own)}},
            {"name": "own photo as reference: VGG distance", "better": "lower",
             "value": far(own, y), "trivial": {"W itself": far(W_own, y)}},
            {"name": "diversity: VGG distance between outputs for two references",
             "better": "higher", "value": far(y_hat, own),
             "trivial": {"the references": far(r, y), "one answer": 0.0}}]
