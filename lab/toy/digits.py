"""digits_single, digits_multiple: toy MNIST-Single and MNIST-Multiple; for EGSC-IT.

    testA/0000   a black 7 on white (or white on black)  testB/0000   a red 2 on green
    testAB/0000  a red 7 on green                        testBA/0000  a black 2 on white

multiple: the same with ten digits on a board. train and val: as there (train without AB and BA).
The rules of colours and boards are those of the paper (Sec. 4, in egscit.py); the digits are of
Pillow's built-in font. Nothing in A matches anything in B.
"""
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .disk import contact_sheet


def drawn_digits(n, size, rng):
    """n digits of Pillow's built-in font, as varied as handwriting: masks (n, size, size), labels.

    Size, weight, slant, width, rotation and place vary. The labels go 0, 1, ..., 9, 0, ...
    """
    masks, times = np.zeros((n, size, size), dtype=bool), 4
    for i in range(n):
        side = size * times
        letter = Image.new("L", (side, side))
        font = ImageFont.load_default(rng.uniform(0.8, 1.05) * side)
        ImageDraw.Draw(letter).text((side / 2, side / 2), str(i % 10), 255, font, anchor="mm",
                                    stroke_width=round(rng.uniform(0, 0.045) * side))
        turn, slant = rng.uniform(-0.3, 0.3), rng.uniform(-0.25, 0.25)
        cos, sin = math.cos(turn), math.sin(turn)
        back = np.array([(cos, -sin), (sin, cos)]) @ [(1 / rng.uniform(0.7, 1.15), slant), (0, 1)]
        middle = side / 2 + rng.uniform(-0.07, 0.07, 2) * side
        shift = side / 2 - back @ middle
        letter = letter.transform((side, side), Image.AFFINE,
                                  (*back[0], shift[0], *back[1], shift[1]), Image.BILINEAR)
        masks[i] = np.asarray(letter.reduce(times)) > 127.5
    return masks, np.arange(n) % 10


def draw_single(folder, n, size, seed, n_test=200):
    """Fill `folder` with single digits: `n` per domain to train, `n_test` for val and for test.

    testAB and testBA hold the true translations of testA with the exemplar of the same name in
    testB, and the reverse.
    """
    from egscit import digit_colours, paint_digits  # here: no other data set needs that script

    def pictures(split, count, stream):
        masks, colours = {}, {}
        for domain in "AB":
            rng = np.random.default_rng([seed, stream, "AB".index(domain)])
            masks[domain], labels = drawn_digits(count, size, rng)
            colours[domain] = digit_colours(labels, domain, split, rng)
            order = rng.permutation(count)
            masks[domain] = masks[domain][order]
            colours[domain] = [c[order] for c in colours[domain]]
        return lambda shape, style: paint_digits(masks[shape], *colours[style])

    save(folder, {"train": pictures("train", n, 20), "val": pictures("val", n_test, 38),
                  "test": pictures("test", n_test, 21)})


def draw_multiple(folder, n, size, seed, n_test=60):
    """Fill `folder` with boards of ten digits, as `draw_single` does."""
    from egscit import CELLS, board_colours, board_layout, paint_board

    if size % CELLS:
        raise ValueError(f"size is {size}, expected a multiple of {CELLS}")

    def pictures(count, stream):
        rng = np.random.default_rng([seed, stream])
        masks, labels = drawn_digits(400, size // CELLS, rng)
        members = [np.flatnonzero(labels == k) for k in range(10)]
        boards = [{d: (board_layout(members, rng), *board_colours(d, rng)) for d in "AB"}
                  for _ in range(count)]
        return lambda shape, style: [paint_board(masks, b[shape][0], *b[style][1:])
                                     for b in boards]

    save(folder, {"train": pictures(n, 22), "val": pictures(n_test, 39),
                  "test": pictures(n_test, 23)})


def save(folder, splits):
    """Fill `folder` from {split: function (shapes' domain, colours' domain) -> pictures}."""
    for split, pictures in splits.items():
        for shape, style in ("AA", "BB") if split == "train" else ("AA", "BB", "AB", "BA"):
            sub = folder / (split + (shape if shape == style else shape + style))
            sub.mkdir()
            for i, picture in enumerate(pictures(shape, style)):
                Image.fromarray(picture).save(sub / f"{i:04d}.png")
    contact_sheet(folder, [("trainA", "black and white"), ("trainB", "colours, other digits"),
                           ("testA", "black and white"), ("testB", "exemplars, other digits"),
                           ("testAB", "testA in the colours of testB"),
                           ("testBA", "testB in those of testA")], folder / "contact.png")
