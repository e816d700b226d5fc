"""lights: photographs of a few clips, each copied in five lights; for pix2pixSC.

    python -m lab.toy.lights DATA OUT [--size W H] [--bars ROWS] [--every N] [--only own]

Where every clip has one layout and one light, a label map gives its light away, and an exemplar is
nothing to learn from. Copies mend that: CLIP@dark/FRAME is the picture of CLIP@own/FRAME in a
simple other light, a clip of its own for `pix2pixsc.py --data OUT`. They also say what the right
answer is, on photographs: the map of CLIP@own/FRAME in the light of CLIP@dark is CLIP@dark/FRAME.

DATA holds {train,val,test}_{img,label} with pictures CLIP_FRAME or CLIP/FRAME. --bars: black rows
at the top and at the bottom, with a label of their own, the next after the largest but 255: what
is black in every light lets a normalised layer see how bright the rest is.
"""
import argparse
import re
from pathlib import Path

import numpy as np
from PIL import Image

import common

LIGHTS = {  # factors of red, green and blue, then a power of what that gives, in [0, 1]
    "own": ((1.0, 1.0, 1.0), 1.0), "dark": ((0.75, 0.8, 0.9), 1.5),
    "bright": ((1.0, 1.0, 1.0), 0.6), "evening": ((1.0, 0.78, 0.55), 1.0),
    "cold": ((0.65, 0.85, 1.0), 1.0)}


def lit(picture, light):
    """A picture (H, W, 3) of bytes in one of LIGHTS."""
    gains, power = LIGHTS[light]
    return ((picture / 255 * gains) ** power * 255).round().astype(np.uint8)


def barred(array, rows, value):
    """An array (H, W, ...) whose first and last rows are `value`."""
    array = array.copy()
    array[:rows] = array[len(array) - rows:] = value
    return array


def draw(data, out, size, rows=0, every=1, lights=tuple(LIGHTS)):
    """Fill the folder `out` from `data` with pictures of `size` (W, H); see the top. every: test
    and val keep one frame in so many. Returns how many labels there are then (pix2pixSC's --labels,
    where 255 is the last). `UserError` if pictures, label maps or one of a pair are missing."""
    folders = [f for f in sorted(Path(data).glob("*_img")) if f.is_dir()]
    if not folders:
        raise common.UserError(f"{data}: found no {{train,val,test}}_{{img,label}}/")
    maps = {}
    for folder in folders:
        labels = folder.with_name(folder.name.removesuffix("img") + "label")
        maps[folder] = common.by_name(common.list_pictures(labels, True), labels)
    ids = set().union(*(np.unique(common.open_ids(m)).tolist() for f in folders
                        for m in maps[f].values()))
    bar = 1 + max(ids - {255}, default=-1)
    for folder in folders:
        pictures = common.by_name(common.list_pictures(folder, True), folder)
        keep = sorted(pictures)[::1 if folder.name == "train_img" else every]
        for name in keep:
            if name not in maps[folder] or not re.search("[/_]", name):
                raise common.UserError(f"{pictures[name]}: expected a name CLIP_FRAME or CLIP/FRAME"
                                       " and a label map of that name")
            clip, frame = re.split(r"/(?=[^/]*$)|_(?=[^/_]*$)", name)
            label = common.open_ids(maps[folder][name], of=pictures[name]).resize(
                size, Image.NEAREST)
            picture = np.asarray(common.open_rgb(pictures[name]).resize(size, Image.BICUBIC))
            for light in lights:
                for kind, array, value in (("img", lit(picture, light), 0),
                                           ("label", np.asarray(label), bar)):
                    split = folder.name.removesuffix("_img")
                    path = Path(out, f"{split}_{kind}", f"{clip}@{light}", f"{frame}.png")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(barred(array, rows, value) if rows else array).save(path)
    return bar + (rows > 0) + (255 in ids)


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m lab.toy.lights", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", help="folder with {train,val,test}_{img,label}")
    p.add_argument("out", help="folder to write")
    p.add_argument("--size", type=int, nargs=2, default=[96, 72], help="width and height")
    p.add_argument("--bars", type=int, default=0, metavar="ROWS", help="black rows, top and bottom")
    p.add_argument("--every", type=int, default=10, help="of test and val, one frame in so many")
    p.add_argument("--only", nargs="+", choices=list(LIGHTS), default=list(LIGHTS))
    args = p.parse_args(argv)
    if Path(args.out).exists():
        raise common.UserError(f"{args.out}: exists, choose a new folder")
    labels = draw(args.data, args.out, tuple(args.size), args.bars, args.every, args.only)
    print(f"{args.out}: --labels {labels}")


if __name__ == "__main__":
    common.entry(main)
