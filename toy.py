"""The toy world: a small savanna drawn from parameters; every translation has a known answer.

A `Scene` is a handful of plain numbers: the hour of the day, the horizon, the colour of the ground,
some trees and tufts, and one or two grazing or walking animals. `sample_scene` draws the numbers,
`render` turns them into a picture. The same scene can be rendered with another coat; then the two
pictures differ in the coat and nowhere else, and each is the true answer to translating the other.

    rng -> sample_scene -> Scene -> paint -> Canvas(colour, light, label) -> render -> RGB picture

`paint` fills three sheets, far things first: what colour a thing has, how much sunlight reaches
it, and what it is (an index into LABELS). A picture is colour x light, which is why light and
shadow cannot depend on the coat. Animals are lists of named `Part`s, tapered tubes with their own
coordinates (s along the axis, v across it). Stripes are drawn in these coordinates, so they follow
the body, and a stripe's place is a function of the silhouette: nothing about them is random.

DATA SETS (in the layout of the real one of the same name)
    horse2zebra         trainA trainB testA testB: A plain coats, B stripes. Training is unpaired
                        (no scene is in both); testA/0007.png and testB/0007.png show one scene.
    horse2zebra_single  the same with one picture per folder, for training on a single pair.
    day2night           trainA trainB testA testB: A day, B night; boxes.json: huts, lanterns and
                        animals, which shine by night. Pictures 2k and 2k+1 of testB share a night.
    synthetic2real      source_img source_label: flat computer graphics with label maps; target_img
                        target_label test_img test_label: other scenes of the same world, as a
                        camera sees them in the evening. Labels are indices into CLASSES.
    scenes              {train,test}_{img,label,inst}: landscapes with their label and instance
                        maps, each in one of six styles (season, hour, colours); test_styles/STYLE/
                        shows every test layout in every style.
    clips               {train,test}_{img,label}/CLIP/FRAME.png: short clips with label maps (ids
                        into LABELS). A clip has one style (hour, season, coat); its frames move.
    sketches            {train,test}_{sketch,img,mask}: outlines, the coloured animal, what is not
                        background. Each part has its own colour. test_truth: the test sketch in
                        the colours of the next test picture, part by part; test_part: the parts.
    textures            train test: shapes on a ground, each in two shades (plain, a rim, rings).
                        test_truth: the shapes of a test picture, painted like the next one.
    digits_single       trainA trainB testA testB: digits in two colours; testAB/0007.png shows the
                        digit of testA/0007.png in the colours of testB/0007.png, testBA the
                        reverse. The rules of MNIST-Single, on digits of Pillow's built-in font.
    digits_multiple     the same with ten digits on a board, by the rules of MNIST-Multiple.

USAGE
    python toy.py horse2zebra --out DIR --n 400 --size 64 --seed 0    # then see DIR/contact.png
    folder = toy.ensure("horse2zebra", 64)                            # drawn once, then reused
    scene = toy.sample_scene(numpy.random.default_rng(0))
    a, b = (toy.render(scene, 64, coat) for coat in ("plain", "zebra"))
"""
import argparse
import colorsys
import json
import math
import os
import re
import shutil
import sys
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

VERSION = 1  # raise it whenever a picture changes: `ensure` then draws its folders again

COATS = ("plain", "zebra")
LABELS = ("sky", "hill", "ground", "trunk", "leaves", "grass", "body", "neck", "head", "ear", "leg",
          "hoof", "muzzle", "eye", "mane", "tail", "water")
COAT_PARTS = ("body", "neck", "head", "ear", "leg")  # the only labels that a coat may change

# The sky's colours, the colours of sunlight and of shade (multipliers, 255 = 1; shade is cooler, as
# outdoors), how high the sun stands (radians) and whether its disc is in the picture.
DAYLIGHT = {
    "dawn": dict(top=(164, 184, 226), low=(255, 206, 182), sun=(255, 230, 212),
                 shade=(126, 122, 152), height=0.45, disc=True),
    "noon": dict(top=(84, 152, 226), low=(204, 228, 244), sun=(255, 252, 243),
                 shade=(118, 128, 150), height=1.15, disc=False),
    "overcast": dict(top=(190, 199, 210), low=(226, 229, 230), sun=(232, 235, 238),
                     shade=(158, 164, 174), height=1.2, disc=False),
    "golden": dict(top=(176, 186, 228), low=(255, 224, 164), sun=(255, 226, 178),
                   shade=(124, 108, 122), height=0.5, disc=True),
}
GROUNDS = ((206, 178, 110), (190, 166, 92), (140, 158, 84), (164, 166, 90), (216, 190, 146))
LEAVES = ((88, 118, 58), (104, 124, 62), (72, 108, 66), (122, 132, 70))
PLAIN = {"chestnut": (164, 88, 48), "bay": (124, 72, 44), "dark brown": (86, 58, 46),
         "tan": (198, 154, 102), "palomino": (218, 178, 112), "grey": (150, 150, 154)}
WHITE, BLACK = (244, 239, 228), (40, 35, 35)  # slightly warm, slightly soft
HAIR, HOOF, MUZZLE, BARK = (52, 40, 36), (58, 50, 46), (70, 58, 54), (104, 82, 62)


# 1. The scene: plain numbers ---------------------------------------------------------------------
# A picture is 1 x 1, x to the right, y downwards; all lengths are fractions of its side.

@dataclass(frozen=True)
class Tree:
    kind: str  # "acacia", "round" or "bush"
    x: float  # the foot
    y: float
    height: float
    leaf: tuple
    form: int  # seed of the crown's clumps


@dataclass(frozen=True)
class Tuft:
    x: float
    y: float
    height: float
    colour: tuple
    tips: tuple  # where the blades end, left to right, in [-1, 1]


@dataclass(frozen=True)
class Animal:
    x: float  # middle of the torso
    y: float  # the line its hooves stand on
    unit: float  # height of the withers; all body coordinates are in these units
    facing: int  # +1 looks right, -1 left
    graze: float  # 0 head up, 1 muzzle at the ground
    phase: float  # of the walk, in radians
    stride: float  # 0 stands, 0.13 walks
    plain: tuple  # colour of its plain coat


@dataclass(frozen=True)
class Scene:
    daylight: str  # a key of DAYLIGHT
    brightness: float
    sun_x: float  # also says where the light comes from
    horizon: float
    ground: tuple
    form: int  # seed of clouds, hills and the ground's patches
    trees: tuple = ()
    tufts: tuple = ()
    animals: tuple = ()


def pick(rng, values):
    """One element of a sequence, each equally likely."""
    return values[int(rng.integers(len(values)))]


def vary(rng, colour, amount):
    """`colour` times a random brightness, plus a little random tint."""
    tinted = np.array(colour) * rng.uniform(1 - amount, 1 + amount) + rng.normal(0, 3, 3)
    return tuple(int(c) for c in tinted.clip(0, 255))


def sample_animal(rng, unit, middle):
    """An animal of that height, nose to tail centred on x = `middle`; large ones stand nearer."""
    graze = rng.uniform(0.8, 1) if rng.random() < 0.4 else rng.uniform(0, 0.3)
    facing = pick(rng, (-1, 1))
    return Animal(
        x=middle - facing * unit * (0.11 + 0.09 * graze),
        y=0.58 + 0.56 * unit + rng.uniform(-0.02, 0.03),
        unit=unit, facing=facing, graze=graze, phase=rng.uniform(0, 2 * math.pi),
        stride=rng.uniform(0, 0.05) if graze > 0.5 else rng.uniform(0.02, 0.13),
        plain=vary(rng, pick(rng, tuple(PLAIN.values())), 0.1))


def sample_scene(rng):
    """A random Scene. `rng`: numpy Generator; equal generators give equal scenes.

    It does not know for which coat it draws, so pictures of either coat have the same distribution
    of everything else.
    """
    horizon = rng.uniform(0.34, 0.5)
    ground = vary(rng, pick(rng, GROUNDS), 0.06)
    trees = []
    for _ in range(rng.integers(2, 6)):
        depth = rng.uniform(0.02, 0.6) ** 1.5
        kind = pick(rng, ("acacia", "acacia", "round", "bush"))
        height = (0.14 + 0.75 * depth) * (0.4 if kind == "bush" else 1) * rng.uniform(0.8, 1.25)
        trees.append(Tree(kind, rng.uniform(-0.05, 1.05), horizon + depth * (1 - horizon), height,
                          vary(rng, pick(rng, LEAVES), 0.12), int(rng.integers(2**31))))
    tufts = []
    for _ in range(rng.integers(8, 18)):
        depth = rng.uniform(0.08, 1.04)
        tufts.append(Tuft(rng.uniform(0, 1), horizon + depth * (1 - horizon),
                          (0.015 + 0.045 * depth) * rng.uniform(0.7, 1.3),
                          vary(rng, ground, 0.14), tuple(sorted(rng.uniform(-0.9, 0.9, 6)))))
    animals = [sample_animal(rng, rng.uniform(0.48, 0.63), rng.uniform(0.43, 0.57))]
    if rng.random() < 0.25:  # a smaller one behind, often half hidden
        animals.append(sample_animal(rng, rng.uniform(0.3, 0.4), pick(rng, (0.15, 0.85))))
    return Scene(pick(rng, tuple(DAYLIGHT)), rng.uniform(0.92, 1.04), rng.uniform(0.05, 0.95),
                 horizon, ground, int(rng.integers(2**31)), tuple(trees), tuple(tufts),
                 tuple(animals))


# 2. Geometry: tubes with coordinates -------------------------------------------------------------

class Tube:
    """A smooth tapered tube seen from the side: a spine of points with a radius each.

    `points`: (K, 3) rows x, y, radius. `at(s, v)` maps tube coordinates to the plane: s in
    [0, length] along the spine, v in [-1, 1] across it, +1 on the left hand of somebody walking it.
    """

    def __init__(self, points, steps=4):
        p = np.asarray(points, dtype=float)
        p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
        a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]  # Catmull-Rom: passes through every point
        t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
        curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * b - a - 3 * c + d)))
        self.spine = np.concatenate([curve.transpose(1, 0, 2).reshape(-1, 3), p[-2:-1]])
        gap = np.diff(self.spine[:, :2], axis=0)
        step = np.concatenate([gap[:1], gap[:-1] + gap[1:], gap[-1:]])
        self.left = np.stack([-step[:, 1], step[:, 0]], axis=1) / np.hypot(*step.T)[:, None]
        self.s = np.concatenate([[0.0], np.cumsum(np.hypot(*gap.T))])
        self.length = self.s[-1]

    def at(self, s, v):
        """Points (..., 2) at tube coordinates s and v, which broadcast."""
        i = np.searchsorted(self.s, s, side="right").clip(1, len(self.s) - 1)
        t = ((s - self.s[i - 1]) / (self.s[i] - self.s[i - 1]))[..., None]
        centre = self.spine[i - 1] * (1 - t) + self.spine[i] * t
        left = self.left[i - 1] * (1 - t) + self.left[i] * t
        return centre[..., :2] + np.asarray(v)[..., None] * centre[..., 2:] * left

    def outline(self):
        """The whole tube as an outline (M, 2)."""
        out = self.spine[:, 2:] * self.left
        return np.concatenate([self.spine[:, :2] - out, (self.spine[:, :2] + out)[::-1]])

    def strips(self, root, count):
        """`count` nested outlines (M, 2), from s = root to the end; number k has v >= 2k/count - 1.

        Number 0 is all of it. With a root > 0 the start is round, as a muscle grows out of a body.
        """
        v = np.linspace(-1, 1, count + 1)
        s = np.maximum(self.s[:, None], root * (1 + 0.7 * v * v))
        grid = self.at(s, v)  # (N, count + 1, 2)
        return [np.concatenate([grid[:, k], grid[::-1, -1], grid[0, k:][::-1]])
                for k in range(count)]


@dataclass
class Part:
    """A named piece of an animal; `label` is in LABELS, `far` is true on the side away from us."""

    label: str
    tube: Tube
    colour: tuple | None = None  # None: the coat
    far: bool = False
    period: float = 0.0  # of the stripes, in units; 0 has none
    lean: float = 0.0  # how far stripes at the tube's start slope
    root: float = 0.0  # where (s) the part leaves the body: shading and stripes begin there

    def stripes(self):
        """The dark stripes as outlines (K, 2M, 2) in body coordinates."""
        v, end = np.linspace(-1, 1, 9), self.tube.length
        centre = np.arange(self.root + self.period / 2, end, self.period)[:, None]
        taper = 0.55 + 0.45 * np.sin((v + 1) * math.pi / 4) if self.label == "body" else 1.0
        middle = centre - self.lean * v * (1 - centre / end) + 0.2 * self.period * v * v
        half = 0.27 * self.period * taper
        s = np.concatenate([middle - half, (middle + half)[:, ::-1]], axis=1)
        return self.tube.at(s.clip(self.root, end), np.concatenate([v, v[::-1]]))


# Rows of x, y, radius.
BODY = ((-.53, .80, .03), (-.51, .79, .10), (-.44, .77, .175), (-.30, .765, .21),
        (-.10, .735, .215), (.10, .735, .222), (.28, .757, .23), (.41, .765, .185),
        (.485, .765, .12), (.515, .755, .04))
# Rows of x, y, radius, and the share of the stride that the point takes part in.
FORELEG = ((.32, .76, .06, 0), (.335, .66, .10, 0), (.345, .54, .085, .1), (.35, .42, .06, .35),
           (.355, .32, .047, .55), (.352, .20, .034, .75), (.352, .10, .039, .95),
           (.365, .05, .036, 1))
HINDLEG = ((-.385, .84, .07, 0), (-.375, .74, .135, 0), (-.35, .62, .14, .05),
           (-.345, .50, .098, .15), (-.395, .40, .064, .3), (-.425, .32, .052, .45),
           (-.41, .20, .036, .7), (-.405, .10, .041, .95), (-.39, .05, .037, 1))


def leg_parts(joints, phase, animal, far):
    """A leg and its hoof: the foot swings by the sine of the phase, lifts on its way forward."""
    joints = np.array(joints)
    share = joints[:, 3]
    swing = animal.stride * math.sin(phase)
    lift = 0.6 * animal.stride * max(0.0, math.cos(phase))
    bend = 2.4 * lift * share * (1 - share)  # the middle joint gives way while the foot is up
    joints[:, 0] += swing * share + bend + (0.03 if far else -0.02)
    joints[:, 1] += lift * share
    x, y = joints[-1, :2]
    hoof = Tube([(x, y + .015, .036), (x + .004, y - .02, .042), (x + .008, y - .05, .05)])
    leg = Tube(joints[:, :3])
    root = 0.0 if far else 0.11
    return [Part("leg", leg, far=far, period=0.094, root=root), Part("hoof", hoof, HOOF, far=far)]


def along(start, steps):
    """Points x, y, radius of a chain: each step is (length, angle in degrees, radius)."""
    x, y, radius = start
    points = [start]
    for length, angle, radius in steps:
        x += length * math.cos(math.radians(angle))
        y += length * math.sin(math.radians(angle))
        points.append((x, y, radius))
    return points


@lru_cache(maxsize=16)  # shadow, plain and striped pictures share the geometry
def animal_parts(animal):
    """The parts of an animal, far ones first, in body coordinates.

    x forwards, y up, the hooves at y = 0, the withers at y = 1.
    """
    g, phase = animal.graze, animal.phase
    neck_low, neck_high, nose = 42 - 68 * g, 58 - 122 * g, -38 - 34 * g
    neck = Tube(along((.29, .79, .19), [
        (.13, neck_low, .185), (.15, (neck_low + neck_high) / 2, .145),
        (.15, neck_high, .112), (.11, neck_high, .092)]))
    poll = neck.at(neck.length - .02, 0.15)
    head = Tube(along((*poll, .07), [(.07, nose, .098), (.08, nose, .102), (.10, nose, .078),
                                     (.08, nose, .062), (.05, nose, .058), (.03, nose, .03)]))
    muzzle = Tube(along((*head.at(.335, 0), .061), [(.045, nose, .06), (.035, nose, .034)]))
    crown = head.at(.015, .75)
    ears = [Tube(along((*crown, .016), [(.04, nose + tilt, .028), (.05, nose + tilt, .022),
                                        (.04, nose + tilt, .003)])) for tilt in (90, 118)]
    eye = Tube(along((*head.at(.115, .35), .006), [(.006, nose, .014), (.012, nose, .014),
                                                   (.006, nose, .006)]))
    crest = [*neck.at(np.linspace(.13, neck.length - .02, 5), 0.97),
             head.at(.05, .95), head.at(.12, .9)]
    mane = Tube([(*point, r) for point, r in zip(crest, (.01, .032, .04, .042, .038, .03, .008),
                                                 strict=True)])
    sway = 0.05 * math.sin(phase)
    tail = Tube([(-.49, .89, .02), (-.56, .84, .028), (-.60, .70, .034), (-.61 + sway, .54, .046),
                 (-.60 + 2 * sway, .38, .012)])
    quarter = math.pi / 2  # a walk is four beats: each leg a quarter turn after another
    far_legs = (leg_parts(HINDLEG, phase + 2 * quarter, animal, True)
                + leg_parts(FORELEG, phase + 3 * quarter, animal, True))
    near_legs = (leg_parts(HINDLEG, phase, animal, False)
                 + leg_parts(FORELEG, phase + quarter, animal, False))
    return [*far_legs, Part("tail", tail, HAIR), Part("ear", ears[0], far=True, period=.1),
            Part("body", Tube(BODY), period=0.155, lean=0.12), *near_legs,
            Part("neck", neck, period=0.118, root=0.10),
            Part("head", head, period=0.082), Part("muzzle", muzzle, MUZZLE),
            Part("eye", eye, BLACK), Part("mane", mane, HAIR), Part("ear", ears[1], period=.1)]


# 3. Painting -------------------------------------------------------------------------------------

class Canvas:
    """Three sheets of size x size: `colour` (RGB), `light` (0 shade, 255 sun), `label` (LABELS)."""

    def __init__(self, size):
        self.size = size
        self.colour = Image.new("RGB", (size, size))
        self.light = Image.new("L", (size, size), 255)
        self.label = Image.new("L", (size, size), 0)
        self._draw = [ImageDraw.Draw(sheet) for sheet in (self.colour, self.light, self.label)]

    def polygon(self, points, colour=None, light=None, label=None):
        """Fill an outline (N, 2) in picture coordinates on the sheets that are given a value."""
        xy = np.multiply(points, self.size).ravel().tolist()
        for draw, value in zip(self._draw, self._values(colour, light, label), strict=True):
            if value is not None:
                draw.polygon(xy, fill=value)

    def ellipse(self, x, y, rx, ry, colour=None, light=None, label=None):
        """Fill an ellipse with its centre at (x, y), as `polygon` does."""
        box = [c * self.size for c in (x - rx, y - ry, x + rx, y + ry)]
        for draw, value in zip(self._draw, self._values(colour, light, label), strict=True):
            if value is not None:
                draw.ellipse(box, fill=value)

    @staticmethod
    def _values(colour, light, label):
        return (None if colour is None else tuple(int(c) for c in colour),
                None if light is None else int(255 * light),
                None if label is None else LABELS.index(label))


def mix(a, b, t):
    """Colour between a (t = 0) and b (t = 1)."""
    return tuple(x + (y - x) * t for x, y in zip(a, b, strict=True))


def sun_direction(scene):
    """Unit vector (right, up, towards us) that points at the sun."""
    height = DAYLIGHT[scene.daylight]["height"]
    v = np.array([math.cos(height) * (2 * scene.sun_x - 1), math.sin(height), 0.45])
    return v / np.linalg.norm(v)


def paint_backdrop(canvas, scene):
    """Sky, clouds, sun, hills and ground: smooth things, for which 64 x 64 numbers are enough."""
    day, rng, size = DAYLIGHT[scene.daylight], np.random.default_rng(scene.form), canvas.size
    y, x = np.mgrid[0:64, 0:64] / 63.0
    top, low, sun = (np.array(day[key], dtype=float) for key in ("top", "low", "sun"))
    sky = top + (low - top) * np.clip(y / scene.horizon, 0, 1)[..., None] ** 1.3
    sun_y = scene.horizon * (1 - 0.75 * math.sin(day["height"]))
    glow = np.exp(-((x - scene.sun_x) ** 2 + (y - sun_y) ** 2) / 0.05)
    glow *= 0.65 if day["disc"] else 0.2
    sky += (np.array([255, 244, 214]) - sky) * glow[..., None]
    for _ in range(rng.integers(2, 6)):
        cx, cy = rng.uniform(0, 1), rng.uniform(0.02, 0.8) * scene.horizon
        width, density = rng.uniform(0.06, 0.16), rng.uniform(0.3, 0.7)
        cloud = np.exp(-((x - cx) / width) ** 2 - ((y - cy) / (0.2 * width)) ** 2)
        sky += ((sun + 20).clip(0, 255) - sky) * density * cloud[..., None]
    canvas.colour.paste(Image.fromarray(sky.clip(0, 255).astype(np.uint8)).resize((size, size)))
    if day["disc"]:
        canvas.ellipse(scene.sun_x, sun_y, 0.035, 0.035, (255, 250, 230))
    for height, haze in ((0.11, 0.72), (0.06, 0.5)):
        xs = np.linspace(0, 1, 40)
        ridge = sum(np.sin(xs * f + rng.uniform(0, 6.3)) / f for f in (4, 7, 13)) * 2.2 + 0.5
        ridge = scene.horizon + 0.01 - height * ridge.clip(0.05, 1.5)
        hill = mix(mix(scene.ground, (96, 116, 118), 0.65), day["low"], haze)
        foot = scene.horizon + 0.02
        canvas.polygon([*zip(xs, ridge, strict=True), (1, foot), (0, foot)], hill, label="hill")
    near = np.array(scene.ground, dtype=float)
    far = np.array(mix(scene.ground, day["low"], 0.4))
    earth = near + (far - near) * ((1 - y) ** 2)[..., None]
    patches = Image.fromarray(rng.normal(0, 1, (12, 5)).astype(np.float32)).resize((64, 64), 3)
    earth *= 1 + 0.045 * np.asarray(patches)[..., None]
    first = round(scene.horizon * size)
    earth = Image.fromarray(earth.clip(0, 255).astype(np.uint8)).resize((size, size - first))
    canvas.colour.paste(earth, (0, first))
    edge = first / size
    canvas.polygon([(0, edge), (1, edge), (1, 1), (0, 1)], light=0.9, label="ground")


def paint_tree(canvas, scene, tree):
    """A trunk and a crown of clumps, dark below and lit towards the sun; hazy when far away."""
    rng, h = np.random.default_rng(tree.form), tree.height
    haze = 0.5 * max(0.0, 1 - (tree.y - scene.horizon) / 0.2)
    low = DAYLIGHT[scene.daylight]["low"]
    bark, leaf = mix(BARK, low, haze), mix(tree.leaf, low, haze)
    lean = rng.uniform(-0.08, 0.08) * h
    if tree.kind == "acacia":
        for dx in (-0.2, 0.02, 0.22):
            trunk = Tube([(tree.x, tree.y, .03 * h), (tree.x + lean, tree.y - .42 * h, .022 * h),
                          (tree.x + lean + dx * h, tree.y - .84 * h, .008 * h)])
            canvas.polygon(trunk.outline(), bark, 0.5, "trunk")
        rise = rng.uniform(-.03, .03, 5) - .07 * np.cos(3.4 * np.array((-.36, .36, -.2, .2, 0)))
        clumps = [(lean + dx * h, (dy - .86) * h, .17 * h, .062 * h)
                  for dx, dy in zip((-.36, .36, -.2, .2, 0), rise, strict=True)]
    elif tree.kind == "round":
        trunk = Tube([(tree.x, tree.y, .045 * h), (tree.x + lean, tree.y - .5 * h, .03 * h)])
        canvas.polygon(trunk.outline(), bark, 0.5, "trunk")
        clumps = [(lean + .2 * h * math.cos(a), (-.68 - .17 * math.sin(a)) * h, r * h, r * h * .9)
                  for a, r in zip(np.arange(6) * 1.05, rng.uniform(.15, .2, 6), strict=True)]
        clumps = sorted(clumps, key=lambda c: c[1]) + [(lean, -.66 * h, .19 * h, .17 * h)]
    else:
        clumps = [(dx * h, -rng.uniform(.35, .6) * h, .5 * h, .42 * h)
                  for dx in (-.6, .6, -.25, .3)]
    sun = sun_direction(scene)
    for x, y, rx, ry in clumps:
        x, y = x + tree.x, y + tree.y
        canvas.ellipse(x, y, rx, ry, leaf, 0.12, "leaves")
        for k in (0.85, 0.62, 0.38):  # brighter and brighter caps, pushed towards the sun
            canvas.ellipse(x + .5 * (1 - k) * rx * sun[0], y - .8 * (1 - k) * ry, k * rx, k * ry,
                           light=1.08 - 0.85 * k)


def paint_tuft(canvas, tuft):
    """A fan of grass blades, as one zigzag outline."""
    x, y, h = tuft.x, tuft.y, tuft.height
    points = [(x - 0.35 * h, y)]
    for tip in tuft.tips:
        points += [(x + tip * h, y - h * (1.1 - 0.5 * abs(tip))), (x + 0.3 * tip * h, y - 0.25 * h)]
    canvas.polygon([*points, (x + 0.35 * h, y)], tuft.colour, 0.8, "grass")


def place(animal, points):
    """Body coordinates (..., 2) to picture coordinates."""
    scale = np.array([animal.facing * animal.unit, -animal.unit])
    return points * scale + np.array([animal.x, animal.y])


def paint_animal(canvas, scene, animal, coat):
    """Paint each part, its stripes if `coat` is "zebra", and its light (a Lambert cylinder)."""
    sun = sun_direction(scene)
    fine = max(8, canvas.size // 28)  # strips of light: enough that their steps cannot be seen
    for part in animal_parts(animal):
        thick = part.label in ("body", "neck")
        strips = part.tube.strips(part.root, fine if thick else fine * 2 // 3)
        base = part.colour or (animal.plain if coat == "plain" else WHITE)
        canvas.polygon(place(animal, strips[0]), base, label=part.label)
        if part.period:  # in every coat: a stripe's rounded edge may reach a pixel past the tube,
            for outline in place(animal, part.stripes()):  # and silhouettes must be the same
                canvas.polygon(outline, BLACK if coat == "zebra" else base, label=part.label)
        across = part.tube.left[len(part.tube.left) // 2] * (animal.facing, 1)
        for k, outline in enumerate(strips):
            v = (2 * k + 1) / len(strips) - 1
            towards_sun = v * (across @ sun[:2]) + math.sqrt(1 - v * v) * sun[2]
            light = (0.1 + 0.95 * max(0.0, towards_sun)) * (0.3 if part.far else 1)
            canvas.polygon(place(animal, outline), light=min(1.0, light))


def paint_shadows(canvas, scene):
    """Shadows on the ground: the animals' own outlines, laid down away from the sun."""
    sun = sun_direction(scene)
    slope = np.clip(-sun[0] / sun[1], -0.9, 0.9)
    for tree in scene.trees:
        h = tree.height
        canvas.ellipse(tree.x + .3 * slope * h, tree.y, .36 * h, .035 * h, light=0.25)
    for animal in scene.animals:
        canvas.ellipse(animal.x + 0.2 * slope * animal.unit, animal.y, .52 * animal.unit,
                       .045 * animal.unit, light=0.2)
        for part in animal_parts(animal):
            if part.label in ("hoof", "eye", "muzzle"):
                continue  # their shadows are lost among the others
            points = place(animal, part.tube.outline())
            height = animal.y - points[:, 1]
            flat = np.stack([points[:, 0] + slope * height, animal.y - 0.1 * height], axis=1)
            canvas.polygon(flat, light=0.2)


def paint(scene, size, coat):
    """A Canvas of size x size with the scene on it, far things first."""
    if coat not in COATS:
        raise ValueError(f"coat is {coat!r}, expected one of {', '.join(COATS)}")
    canvas = Canvas(size)
    paint_backdrop(canvas, scene)
    paint_shadows(canvas, scene)
    for thing in sorted([*scene.trees, *scene.tufts, *scene.animals], key=lambda thing: thing.y):
        if isinstance(thing, Animal):
            paint_animal(canvas, scene, thing, coat)
        elif isinstance(thing, Tree):
            paint_tree(canvas, scene, thing)
        else:
            paint_tuft(canvas, thing)
    return canvas


def supersample(size):
    """How many times finer than the picture to paint: 4 for small pictures, 2 from 256 pixels."""
    return max(2, min(4, 512 // size))


def render(scene, size, coat="plain"):
    """The scene as an RGB Pillow picture of size x size pixels; coat: "plain" or "zebra".

    Box filtering keeps each pixel's colour inside the pixel: a coat changes no pixel outside of it.
    """
    times = supersample(size)
    return lit(paint(scene, size * times, coat), scene, times)


def lit(canvas, scene, times):
    """The picture of a painted Canvas: colour x light, reduced `times` times."""
    day = DAYLIGHT[scene.daylight]
    light = canvas.light.filter(ImageFilter.GaussianBlur(canvas.size * 0.005))
    ramp = np.linspace(day["shade"], day["sun"], 256) * scene.brightness  # (256 levels of light, 3)
    ramp = ramp.clip(0, 255).astype(np.uint8)
    tint = Image.merge("RGB", [light.point(channel.tolist()) for channel in ramp.T])
    return ImageChops.multiply(canvas.colour, tint).reduce(times)


def coat_mask(scene, size):
    """How much of each pixel is coat, as `render` sees it: float32 array (size, size) in [0, 1]."""
    times = supersample(size)
    label = np.asarray(paint(scene, size * times, "plain").label)
    coat = np.isin(label, [LABELS.index(name) for name in COAT_PARTS])
    return coat.reshape(size, times, size, times).mean(axis=(1, 3), dtype=np.float32)


# 4. Data sets on disk ----------------------------------------------------------------------------

STAMP = "toy.json"  # written last: says what a folder holds and that it is whole
KINDS = "[AB]|AB|BA|_(img|label|inst|sketch|mask|truth|part)"
OURS = re.compile(rf"((train|test|source|target)({KINDS})?(/\d{{4,}})?|test_styles/[a-z]+)/\d{{4,}}"
                  r"\.png|contact\.png|boxes\.json|toy\.json")


def describe(name, n, size, seed):
    """What identifies a drawn data set; ValueError when a number makes no sense."""
    for key, value, least in (("n", n, 1), ("size", size, 16), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{key} is {value}, expected at least {least}")
    return dict(world=VERSION, name=name, n=n, size=size, seed=seed)


def files_in(folder):
    """Every file below `folder`, as relative paths with forward slashes."""
    return (f.relative_to(folder).as_posix() for f in folder.rglob("*") if not f.is_dir())


def is_complete(folder, description):
    """Whether `folder` holds that data set, drawn by this version of the world, no file lost."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        return stamp == {**description, "files": sum(1 for _ in files_in(folder))}
    except (OSError, ValueError):
        return False


def refuse_foreign(folder, stamped=True):
    """ValueError if `folder` holds files not drawn here, which must not be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder")
    for name in files_in(folder) if folder.exists() else ():
        if not OURS.fullmatch(name) or stamped and not (folder / STAMP).exists():
            raise ValueError(f"{folder} holds other files ({name}), choose a new or empty folder")


def sibling(folder):
    """A new name next to `folder`, so that a rename moves one onto the other in one step."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextmanager
def published(out, description):
    """Gives a temporary folder to draw in, which becomes `out` if all goes well; else no change.

    An older data set of ours in `out` is replaced, except that when another process drew the same
    one in the meantime, the first one stays. Raises ValueError (foreign files), OSError.
    """
    out = Path(os.path.abspath(out))
    refuse_foreign(out)
    had_one, had_it = out.exists(), is_complete(out, description)
    out.parent.mkdir(parents=True, exist_ok=True)
    new, old = sibling(out), sibling(out)
    new.mkdir()
    try:
        yield new
        stamp = {**description, "files": 1 + sum(1 for _ in files_in(new))}
        (new / STAMP).write_text(json.dumps(stamp) + "\n")
        if had_it or not is_complete(out, description):
            if had_one:
                os.rename(out, old)
            os.rename(new, out)
    except OSError:
        if not is_complete(out, description):  # else another process was faster by a hair
            if old.exists() and not out.exists():
                os.rename(old, out)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def contact_sheet(folder, rows, path, columns=8):
    """Save a picture of samples: one row of files per (sub-folder, caption) pair in `rows`."""
    names = sorted(f.name for f in (folder / rows[0][0]).iterdir())
    columns = min([columns] + [len(list((folder / split).iterdir())) for split, _ in rows])
    size = Image.open(folder / rows[0][0] / names[0]).width
    tile = min(256, size * math.ceil(160 / size))  # whole multiples keep small pixels square
    gap, strip, font = 4, 22, ImageFont.load_default(14)
    width, height = gap + columns * (tile + gap), gap + len(rows) * (tile + strip)
    sheet = Image.new("RGB", (max(400, width), height), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (split, caption) in enumerate(rows):
        top = r * (tile + strip)
        draw.text((gap, top + 3), f"{split}: {caption}", fill=(40, 40, 40), font=font)
        for c in range(columns):
            picture = Image.open(folder / split / f"{c:04d}.png")
            grow = Image.Resampling.NEAREST if tile >= size else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((tile, tile), grow), (gap + c * (tile + gap), top + strip))
    sheet.save(path)


def horse2zebra(out, n=400, size=64, seed=0, n_test=40):
    """Draw the unpaired data set plain coats (A) / zebra stripes (B) into the folder `out`.

    Writes RGB PNGs of size x size pixels: trainA and trainB (`n` each, no scene in common), testA
    and testB (`n_test` each; equal names show the same scene), and contact.png, a sheet of samples.
    Scene i of a split depends on seed, split and i only: a larger n adds pictures, changes none.
    Raises ValueError for numbers out of range and for an `out` that holds other files; OSError.
    """
    if n_test < 1:
        raise ValueError(f"n_test is {n_test}, expected at least 1")
    draw_coats(out, describe("horse2zebra", n, size, seed), {
        "trainA": (0, n, "plain"), "trainB": (1, n, "zebra"),
        "testA": (2, n_test, "plain"), "testB": (2, n_test, "zebra")})


def horse2zebra_single(out, n=1, size=256, seed=0):
    """One picture per domain, for training on a single pair: trainA and trainB show different
    scenes; testA repeats trainA's picture and testB is its true answer. Like `horse2zebra`."""
    if n != 1:
        raise ValueError(f"n is {n}, expected 1: this data set is a single pair")
    draw_coats(out, describe("horse2zebra_single", n, size, seed), {
        "trainA": (2, 1, "plain"), "trainB": (1, 1, "zebra"),
        "testA": (2, 1, "plain"), "testB": (2, 1, "zebra")})


def draw_coats(out, description, folders):
    """Fill `out` with {sub-folder: (number of the scenes' stream, how many, coat)}."""
    captions = ("plain coats", "zebra stripes, other scenes", "plain coats",
                "the same scenes, striped: the true answers")
    with published(out, description) as folder:
        for sub, (stream, count, coat) in folders.items():
            (folder / sub).mkdir()
            for i in range(count):
                scene = sample_scene(np.random.default_rng([description["seed"], stream, i]))
                render(scene, description["size"], coat).save(folder / sub / f"{i:04d}.png")
        contact_sheet(folder, list(zip(folders, captions, strict=True)), folder / "contact.png")


def window_mean(x, radius):
    """Mean over the (2 radius + 1)-pixel square around each pixel, edges repeated; (..., H, W)."""
    side = 2 * radius + 1
    x = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(radius, radius)] * 2, mode="edge")
    for axis in (-2, -1):
        windows = np.lib.stride_tricks.sliding_window_view(x, side, axis=axis)
        x = windows.mean(axis=-1)
    return x


def coat_scores(x, y_hat, y):
    """Scores of translations y_hat of plain pictures x against their true answers y.

    All are float arrays (N, 3, H, W) in [-1, 1]; scores are in grey levels of 0..255, lower is
    better. On the coat (where x and y differ) the local mean and the local deviation, in windows of
    about one and a half stripes, are compared: stripes count, their exact places do not. Elsewhere
    y equals x, and the plain difference is taken. Returns [{"name", "value", "better", "trivial"}],
    with what the trivial answers would get: copy x; paint the coat in its mean colour; answer the
    mean colour of all y everywhere. No trivial answer is good at both.
    """
    x, y_hat, y = (np.asarray(a, dtype=np.float64) for a in (x, y_hat, y))
    coat = np.abs(x - y).max(axis=1) > 0  # (N, H, W)
    radius = max(1, round(x.shape[-1] * 0.05))

    def local(a):
        mean = window_mean(a, radius)
        return mean, np.sqrt(np.maximum(window_mean(a * a, radius) - mean * mean, 0))

    def on_coat(a):
        return sum(np.abs(one - other).mean(axis=1)[coat].mean()
                   for one, other in zip(local(a), local(y), strict=True)) * 127.5

    def elsewhere(a):
        return np.abs(a - y).mean(axis=1)[~coat].mean() * 127.5

    spread = y.transpose(1, 0, 2, 3)  # (3, N, H, W)
    painted = np.where(coat[:, None], spread[:, coat].mean(axis=1)[:, None, None], x)
    flat = np.broadcast_to(y.mean(axis=(0, 2, 3))[:, None, None], y.shape)
    answers = {"copy the input": x, "mean coat colour": painted, "mean colour": flat}
    return [{"name": name, "value": float(score(y_hat)), "better": "lower",
             "trivial": {answer: float(score(a)) for answer, a in answers.items()}}
            for name, score in (("coat error", on_coat), ("background error", elsewhere))]


# Data set synthetic2real: computer graphics, and what a camera sees -------------------------------

CLASSES = ("sky", "hill", "ground", "trunk", "leaves", "grass", "animal")  # of the label maps
# Per class: its one colour in computer graphics; how rough its surface is before a camera.
FLAT = ((110, 190, 255), (160, 140, 220), (120, 205, 95), (120, 70, 30), (25, 130, 60),
        (240, 230, 80), (235, 110, 90))
ROUGH = (0.02, 0.06, 0.12, 0.12, 0.26, 0.06, 0.06)
EVENING = ((0.94, 0.12, 0.02), (0.04, 0.66, 0.04), (0.10, 0.04, 0.62))  # red, green, blue of RGB
STRAW = (250, 236, 190)


def class_map(canvas, size):
    """The class that fills most of each pixel: uint8 array (size, size) of indices of CLASSES."""
    of_label = [name if name in CLASSES else "animal" for name in LABELS]
    of_label += [None] * (256 - len(of_label))
    sheets = [canvas.label.point([255 * (name == c) for name in of_label]) for c in CLASSES]
    return np.argmax([np.asarray(s.reduce(canvas.size // size)) for s in sheets], axis=0)


def render_graphics(scene, size, rng):
    """The scene as cheap computer graphics: an RGB picture (size, size), and its label map.

    One saturated colour per class, a little different in every scene, two levels of light, no
    texture, hard edges.
    """
    canvas = paint(scene, size * supersample(size), "plain")
    label = class_map(canvas, size)
    flat = np.array(FLAT) * rng.uniform(0.9, 1.1, (len(FLAT), 1)) + rng.normal(0, 6, (len(FLAT), 3))
    lit = np.asarray(canvas.light.reduce(canvas.size // size)) > 100
    picture = flat[label] * np.where(lit, 1.0, 0.75)[..., None]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), label


def render_camera(scene, size, rng):
    """The scene as a camera sees it in the evening: an RGB picture (size, size), and its label map.

    Natural colours under a low sun, surfaces with texture, everything tinted; then what the camera
    adds: a soft lens that darkens the corners, and noise.
    """
    scene = replace(scene, daylight="golden")
    label = class_map(paint(scene, size * supersample(size), "plain"), size)
    grain = sum(np.asarray(Image.fromarray(rng.normal(0, 1, (n, n)).astype(np.float32)).resize(
        (size, size), Image.Resampling.BICUBIC)) for n in (size, size // 3))
    picture = np.asarray(render(scene, size)) * (1 + np.array(ROUGH)[label] * grain)[..., None]
    picture = picture @ (np.array(EVENING).T * rng.uniform(0.85, 1.05))
    picture = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    picture = np.asarray(picture.filter(ImageFilter.GaussianBlur(size / 150))).astype(float)
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    picture = picture * (1 - 0.22 * (x * x + y * y))[..., None] + rng.normal(0, 5, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), label


def synthetic2real(out, n=300, size=64, seed=0, n_test=60):
    """Draw labelled computer graphics (source) and evening photographs (target) into `out`.

    Writes source_img and target_img (`n` each, no scene in common), test_img (`n_test` more of the
    target), and a *_label folder for each: palette PNGs of equal names with indices of CLASSES.
    Scene i of a split depends on seed, split and i only. Raises as `horse2zebra` does.
    """
    description = describe("synthetic2real", n, size, seed)
    folders = {"source": (3, n, render_graphics), "target": (4, n, render_camera),
               "test": (5, n_test, render_camera)}
    captions = ("computer graphics", "their labels", "a camera, other scenes",
                "labels, never shown to the method", "a camera, held out", "labels, for the scores")
    with published(out, description) as folder:
        for split, (stream, count, draw) in folders.items():
            for kind in ("img", "label"):
                (folder / f"{split}_{kind}").mkdir()
            for i in range(count):
                rng = np.random.default_rng([seed, stream, i])
                scene = sample_scene(rng)  # with high and pale grass: it must be seen at all
                scene = replace(scene, tufts=tuple(replace(t, height=2 * t.height, colour=STRAW)
                                                   for t in scene.tufts))
                picture, label = draw(scene, size, rng)
                label = Image.fromarray(label.astype(np.uint8))
                label.putpalette(np.array(FLAT, dtype=np.uint8).tobytes())
                picture.save(folder / f"{split}_img" / f"{i:04d}.png")
                label.save(folder / f"{split}_label" / f"{i:04d}.png")
        rows = [f"{split}_{kind}" for split in folders for kind in ("img", "label")]
        contact_sheet(folder, list(zip(rows, captions, strict=True)), folder / "contact.png")


# Label maps and styles, for semantic image synthesis ---------------------------------------------

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
        day, low = DAYLIGHT[style["daylight"]], mix(style["ground"], style["leaf"], 0.5)
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
                ripple = mix(style["water"], day["low"], 0.5)
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


def scenes(out, n=600, size=64, seed=0, n_test=40):
    """Draw landscapes for semantic image synthesis into the folder `out`.

    Writes {train,test}_img (RGB), _label (ids of SCENE_CLASSES) and _inst (0, or one number per
    tree and animal); each picture has a style of its own. test_styles/STYLE/NNNN.png is the true
    answer for test layout NNNN in that style. contact.png is a sheet of samples. Picture i depends
    on seed, split and i only. Raises ValueError (numbers, an `out` with other files), OSError.
    """
    if n_test < 1:
        raise ValueError(f"n_test is {n_test}, expected at least 1")
    names = list(SCENE_STYLES)
    with published(out, describe("scenes", n, size, seed)) as folder:
        for stream, (split, count) in enumerate((("train", n), ("test", n_test)), start=3):
            subs = [f"{split}_{kind}" for kind in ("img", "label", "inst")]
            subs += [f"test_styles/{name}" for name in names] if split == "test" else []
            for sub in subs:
                (folder / sub).mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng([seed, stream, i])
                own, draw = pick(rng, names), styled_scene(rng)
                for sub, sheet in zip(subs, draw(own, size), strict=False):
                    sheet.save(folder / sub / f"{i:04d}.png")
                for sub in subs[3:]:
                    draw(Path(sub).name, size)[0].save(folder / sub / f"{i:04d}.png")
        rows = [("train_img", "each in one of six styles"), ("test_img", "held-out layouts")]
        rows += [(f"test_styles/{name}", "the same layouts") for name in names]
        contact_sheet(folder, rows, folder / "contact.png")


def scene_scores(answers, label, folder, mean_colours):
    """Scores of pictures painted from the test label maps of a `scenes` folder.

    answers: {"own style": x, "another's style": x, "z": x}, each (N, 3, H, W) in [-1, 1] for the
    N test layouts in order: in the style of the layout's own picture, in the style of the next
    layout's picture, and in no style in particular. label: (N, H, W). mean_colours: (classes, 3),
    what the trivial answer paints each class with. A colour error is the mean absolute difference,
    in grey levels, of colours averaged over 5x5 pixels of 64, so that colours count and texture
    does not; for "z" it is that to the nearest style. Returns [{"name", "value", "better",
    "trivial"}]; lower is better.
    """
    files = sorted((Path(folder) / "test_img").iterdir())

    def load(sub):
        return np.stack([np.asarray(Image.open(Path(folder) / sub / f.name)) for f in files]
                        ).transpose(0, 3, 1, 2) / 127.5 - 1

    own, every = load("test_img"), np.stack([load(f"test_styles/{s}") for s in SCENE_STYLES])
    style = np.abs(every - own).mean(axis=(2, 3, 4)).argmin(axis=0)      # of each test picture
    following = np.roll(style, -1)
    truths = {"own style": own, "another's style": every[following, np.arange(len(own))]}
    flat = np.asarray(mean_colours)[label].transpose(0, 3, 1, 2)
    radius = max(1, own.shape[-1] // 32)

    def error(x, truth):
        x, truth = (window_mean(np.asarray(a, dtype=np.float64), radius) for a in (x, truth))
        return np.abs(x - truth).mean(axis=(1, 2, 3)) * 127.5            # (N,)

    def score(name, x):
        if name in truths:
            return float(error(x, truths[name]).mean())
        return float(np.min([error(x, e) for e in every], axis=0).mean())

    wrong = {"own style": truths["another's style"], "another's style": own}
    return [{"name": f"colour error, {name}", "value": score(name, x), "better": "lower",
             "trivial": {"mean colour per class": score(name, flat)} | (
                 {"the true picture in the other style": score(name, wrong[name])}
                 if name in wrong else {})} for name, x in answers.items()]


# ---- clips: one style per clip, frames that move -------------------------------------------------

CLIP_FRAMES = 12
SEASONS = {  # ground, leaves
    "savanna": ((214, 184, 104), (112, 128, 62)), "meadow": ((118, 164, 70), (56, 106, 58)),
    "snow": ((228, 234, 242), (72, 98, 92)), "autumn": ((168, 118, 70), (206, 96, 38)),
    "red earth": ((186, 92, 60), (92, 134, 76)), "heath": ((150, 122, 160), (116, 74, 128)),
}
LABEL_COLOURS = ((150, 190, 235), (130, 150, 150), (190, 170, 120), (100, 70, 50), (60, 120, 60),
                 (140, 180, 70), (220, 90, 60), (230, 140, 60), (240, 190, 80), (160, 60, 120),
                 (150, 50, 40), (40, 40, 60), (200, 120, 160), (255, 255, 255), (90, 40, 110),
                 (20, 20, 20), (0, 0, 0))


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
    ground, leaf = SEASONS[pick(rng, tuple(SEASONS))]
    style = Style(pick(rng, tuple(DAYLIGHT)), rng.uniform(0.85, 1.04), rng.uniform(0.1, 0.9),
                  vary(rng, ground, 0.08), vary(rng, leaf, 0.1),
                  vary(rng, pick(rng, tuple(PLAIN.values())), 0.1),
                  "zebra" if rng.random() < 0.4 else "plain")
    return Clip(scene, style, rng.uniform(0.015, 0.04) * pick(rng, (-1, 1)))


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
        tufts=tuple(replace(tuft, x=moved(tuft.x, tuft.y), colour=mix(style.ground, style.leaf, .5))
                    for tuft in scene.tufts))


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


def clips(out, n=40, size=64, seed=0, n_test=8):
    """Draw `n` training and `n_test` test clips of CLIP_FRAMES frames into the folder `out`.

    {train,test}_img hold RGB pictures, {train,test}_label palette PNGs of ids into LABELS, both as
    CLIP/FRAME.png. Raises like `horse2zebra`.
    """
    if n_test < 1:
        raise ValueError(f"n_test is {n_test}, expected at least 1")
    with published(out, describe("clips", n, size, seed)) as folder:
        for stream, (split, count) in enumerate((("train", n), ("test", n_test))):
            for c in range(count):
                clip = sample_clip(np.random.default_rng([seed, stream, c]))
                for kind in ("img", "label"):
                    (folder / f"{split}_{kind}" / f"{c:04d}").mkdir(parents=True)
                for t in range(CLIP_FRAMES):
                    name = f"{c:04d}/{t:04d}.png"
                    clip_picture(clip, t, size, clip.style).save(folder / f"{split}_img" / name)
                    clip_label(clip, t, size).save(folder / f"{split}_label" / name)
        rows = [(f"train_{kind}/{c:04d}", f"a clip's {what}") for c in range(min(n, 4))
                for kind, what in (("img", "frames"), ("label", "label maps"))]
        contact_sheet(folder, rows, folder / "contact.png")


def clip_answer(folder, x, exemplar):
    """The true answer to label map x ('CLIP/FRAME') in the style of an exemplar's clip.

    folder: drawn by `clips`; both names are of its test split. Returns an RGB Pillow picture.
    """
    stamp = json.loads((Path(folder) / STAMP).read_text())
    of_x, of_exemplar = (sample_clip(np.random.default_rng([stamp["seed"], 1, int(c)]))
                         for c in (Path(x).parts[0], Path(exemplar).parts[0]))
    return clip_picture(of_x, int(Path(x).stem), stamp["size"], of_exemplar.style)


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
    return float(np.mean(errors)) * 127.5


# ---- sketches: animals whose parts have colours of their own ------------------------------------

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


def sketches(out, n=400, size=64, seed=0, n_test=40):
    """Draw the pairs sketch / coloured animal into the folder `out`, like `horse2zebra`.

    train_* have `n`, test_* `n_test` pictures: sketch, img, mask (255 is the animal). For scoring,
    test_truth/0007.png shows the animal of test_sketch/0007.png, each part in the colour it has in
    test_img/0008.png (the last takes the first's), and test_part the parts of `paint_sketch`.
    """
    if n_test < 2:
        raise ValueError(f"n_test is {n_test}, expected at least 2")

    def figure(stream, i):
        return sample_sketch(np.random.default_rng([seed, stream, i]))

    with published(out, describe("sketches", n, size, seed)) as folder:
        for sub in ("train_sketch", "train_img", "train_mask", "test_sketch", "test_img",
                    "test_mask", "test_truth", "test_part"):
            (folder / sub).mkdir()
        for split, stream, count in (("train", 6, n), ("test", 7, n_test)):
            for i in range(count):
                animal, colours = figure(stream, i)
                x, y, part = paint_sketch(animal, colours, size)
                inside = (np.asarray(y) < 250).any(axis=2)
                files = {"sketch": x, "img": y, "mask": Image.fromarray(inside).convert("L")}
                if split == "test":
                    other = figure(stream, (i + 1) % n_test)[1]
                    files |= {"truth": paint_sketch(animal, other, size)[1],
                              "part": Image.fromarray(part.astype(np.uint8))}
                for kind, picture in files.items():
                    picture.save(folder / f"{split}_{kind}" / f"{i:04d}.png")
        contact_sheet(folder, [("train_sketch", "inputs"), ("train_img", "their photos"),
                               ("test_sketch", "inputs"), ("test_img", "their own photos"),
                               ("test_truth", "in the colours of the next one's parts")],
                      folder / "contact.png")


def sketch_scores(x, y_hat, truth, part, r, W):
    """Scores of translations y_hat of sketches x, with references r, against their true answers.

    All are float arrays (N, 3, H, W) in [-1, 1], W a patchwork of r (its auxiliary picture), but
    part (N, H, W), which is `paint_sketch`'s. A part's colour is its mean over four or more pixels.
    "part colour error": its distance to the truth's, in grey levels. "parts right": the share of
    parts whose colour is nearer to the truth's colour of this part than to any other part's.
    Returns [{"name", "value", "better", "trivial"}]; the trivial answers are r and W themselves,
    the sketch tinted in its truth's overall colour (global control at its best), and in the mean
    colour of all truths.
    """
    x, y_hat, truth, r, W = (np.asarray(a, dtype=np.float64) for a in (x, y_hat, truth, r, W))
    inside = np.asarray(part) > 0
    each = np.stack([t[:, m].mean(axis=1) for t, m in zip(truth, inside, strict=True)])
    answers = {"W itself": W, "copy the reference": r}
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
        return np.mean(error) * 127.5, np.mean(right)

    def whole(a):
        return np.abs(a - truth).mean() * 127.5

    return [{"name": name, "value": float(score(y_hat)), "better": better,
             "trivial": {answer: float(score(a)) for answer, a in answers.items()}}
            for name, better, score in (
                ("part colour error", "lower", lambda a: parts(a)[0]),
                ("parts right", "higher", lambda a: parts(a)[1]),
                ("picture error", "lower", whole))]


# Data set day2night: objects that shine by themselves --------------------------------------------
# By night the landscape keeps its contrasts and loses its light: everything takes the tint of the
# sky. Objects do not: windows and lanterns glow and coats reflect, in a colour of their own that
# says nothing about the sky's. So no single change of colours is right for both.

NIGHT_SKIES = {"blue": (62, 84, 158), "violet": (122, 60, 132), "green": (44, 112, 96)}
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
    return Night(vary(rng, pick(rng, tuple(NIGHT_SKIES.values())), 0.1),
                 vary(rng, pick(rng, tuple(GLOWS.values())), 0.04))


def sample_village(rng):
    """(Scene with one pale animal, Things): a savanna with a hut and a lantern."""
    scene, side = sample_scene(rng), pick(rng, (-1, 1))
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


def day2night(out, n=400, size=64, seed=0, n_test=40):
    """Draw day (A) and night (B) pictures of villages into `out`, with the objects' boxes.

    Like `horse2zebra`, and boxes.json: {"trainA/0000.png": [{"box": [x0, y0, x1, y1], "label"}]}.
    Every night has its own sky and its own glow. testB/0002.png and testB/0003.png show two scenes
    in one night (and so on): each is a reference for the style of the other.
    """
    if n_test < 2 or n_test % 2:
        raise ValueError(f"n_test is {n_test}, expected an even number")
    folders = {"trainA": (10, n, False, "day"), "trainB": (11, n, True, "night, other scenes"),
               "testA": (12, n_test, False, "day"),
               "testB": (12, n_test, True, "the same scenes by night: the true answers")}
    with published(out, describe("day2night", n, size, seed)) as folder:
        boxes = {}
        for sub, (stream, count, dark, _) in folders.items():
            (folder / sub).mkdir()
            for i in range(count):
                scene, things = sample_village(np.random.default_rng([seed, stream, i]))
                pair = i // 2 if sub == "testB" else i
                night = sample_night(np.random.default_rng([seed, stream + 10, pair]))
                name = f"{sub}/{i:04d}.png"
                render_village(scene, things, size, night if dark else None).save(folder / name)
                boxes[name] = village_boxes(scene, things, size)
        (folder / "boxes.json").write_text(json.dumps(boxes) + "\n")
        contact_sheet(folder, [(sub, row[3]) for sub, row in folders.items()],
                      folder / "contact.png")


def night_scores(x, reference, y_hat, y, boxes):
    """Scores of translations y_hat of day pictures x against the true nights y.

    All (N, 3, H, W) in [-1, 1]; `reference` shows another scene in y's night; boxes: N lists as in
    boxes.json. Scores are mean absolute differences in grey levels of 0..255, inside the boxes and
    outside of them; the trivial answers are the input, the reference, and one change of colours
    for the whole picture: the input with the mean and deviation of the reference's channels.
    Returns [{"name", "value", "better", "trivial"}].
    """
    x, reference, y_hat, y = (np.asarray(a, dtype=np.float64) for a in (x, reference, y_hat, y))
    inside = np.zeros(x[:, 0].shape, dtype=bool)
    for mask, objects in zip(inside, boxes, strict=True):
        for x0, y0, x1, y1 in (thing["box"] for thing in objects):
            mask[y0:y1, x0:x1] = True

    def statistics(a):
        return a.mean(axis=(2, 3), keepdims=True), a.std(axis=(2, 3), keepdims=True)

    (mean, std), (to_mean, to_std) = statistics(x), statistics(reference)
    recoloured = ((x - mean) / (std + 1e-6) * to_std + to_mean).clip(-1, 1)
    answers = {"copy the input": x, "copy the reference": reference,
               "one change of colours": recoloured}
    return [{"name": name, "better": "lower",
             "value": float(np.abs(y_hat - y).mean(axis=1)[where].mean() * 127.5),
             "trivial": {answer: float(np.abs(a - y).mean(axis=1)[where].mean() * 127.5)
                         for answer, a in answers.items()}}
            for name, where in (("object error", inside), ("background error", ~inside))]


# Data set textures: layout and material, drawn independently --------------------------------------
# A picture is a layout (which places are figure, which are ground) painted in two materials (each a
# motif in two shades of a hue). They run along the outline, so that every picture tells where they
# belong, whatever its own: a layout in other materials is one definite picture, the true answer to
# "the structure of this one, the texture of that one".

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
    return Material(pick(rng, MOTIFS), back, mark)


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
                kind = pick(rng, ("disc", "square", "triangle", "bar"))
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


def textures(out, n=800, size=64, seed=0, n_test=40):
    """Draw pictures of layouts in materials into `out`, like `horse2zebra`: train/ and test/.

    test_truth/0007.png has the layout of test/0007.png and the texture of test/0008.png (the last
    one takes the first one's).
    """
    if n_test < 2:
        raise ValueError(f"n_test is {n_test}, expected at least 2")

    def drawn(stream, i, other):
        layout = sample_layout(np.random.default_rng([seed, stream, i]))
        return render_texture(layout, sample_texture(np.random.default_rng(
            [seed, stream + 1, other])), size)

    with published(out, describe("textures", n, size, seed)) as folder:
        for sub, stream, count, shift in (("train", 20, n, 0), ("test", 22, n_test, 0),
                                          ("test_truth", 22, n_test, 1)):
            (folder / sub).mkdir()
            for i in range(count):
                drawn(stream, i, (i + shift) % count).save(folder / sub / f"{i:04d}.png")
        contact_sheet(folder, [("train", "layouts in materials"), ("test", "other ones"),
                               ("test_truth", "the same layouts in the next one's materials")],
                      folder / "contact.png")


def texture_scores(x, exemplar, y_hat, y):
    """Scores of swaps y_hat (structure of x, texture of exemplar) against their true answers y.

    All are float arrays (N, 3, H, W) in [-1, 1]; scores are mean absolute differences in grey
    levels of 0..255, lower is better: "swap error" of the pictures, "palette error" of their means
    over a rim's width, "pattern error" of what these means leave. The trivial answers are x, the
    exemplar, and x with the mean and deviation of the exemplar's colour channels.
    Returns [{"name", "value", "better", "trivial"}].
    """
    x, exemplar, y_hat, y = (np.asarray(a, dtype=np.float64) for a in (x, exemplar, y_hat, y))
    radius = max(1, round(x.shape[-1] * RIM / 2))

    def statistics(a):
        return a.mean(axis=(2, 3), keepdims=True), a.std(axis=(2, 3), keepdims=True)

    (mean, std), (to_mean, to_std) = statistics(x), statistics(exemplar)
    answers = {"copy the structure": x, "copy the texture": exemplar,
               "colour transfer": ((x - mean) / (std + 1e-6) * to_std + to_mean).clip(-1, 1)}

    def whole(a):
        return a

    def palette(a):
        return window_mean(a, radius)

    def pattern(a):
        return a - palette(a)

    return [{"name": f"{name} error", "better": "lower",
             "value": float(np.abs(part(y_hat) - part(y)).mean() * 127.5),
             "trivial": {answer: float(np.abs(part(a) - part(y)).mean() * 127.5)
                         for answer, a in answers.items()}}
            for name, part in (("swap", whole), ("palette", palette), ("pattern", pattern))]


# Data sets digits_single, digits_multiple: by the rules of MNIST-Single and MNIST-Multiple --------
# A digit is a mask: True where there is ink. Both the toy sets and the real ones use these rules.

GREYS = np.array([(0, 0, 0), (255, 255, 255)], np.uint8)
PRIMARIES = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
INKS_AND_PAPERS = np.array([(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)])  # into PRIMARIES
CELLS = 4  # a board has 4 x 4 of them


def digit_colours(labels, domain, split, rng):
    """Colours of single digits: labels (N,) -> ink, paper, two arrays (N, 3) of bytes.

    Domain "A": black on white or white on black. "B": two different ones of red, green and blue;
    but in the split "train" the digits 5 to 9 are always red on green.
    """
    if domain == "A":
        ink = rng.integers(2, size=len(labels))
        return GREYS[ink], GREYS[1 - ink]
    pair = rng.integers(len(INKS_AND_PAPERS), size=len(labels))
    if split == "train":
        pair = np.where(np.asarray(labels) >= 5, 0, pair)
    return tuple(PRIMARIES[INKS_AND_PAPERS[pair]].swapaxes(0, 1))


def paint_digits(masks, ink, paper):
    """Masks (N, H, W), ink and paper (N, 3) -> pictures of two colours each, (N, H, W, 3) bytes."""
    return np.where(masks[..., None], ink[:, None, None], paper[:, None, None])


def board_colours(domain, rng):
    """Colours of one board: inks (10, 3), one per digit class, and paper (3,), bytes.

    Domain "A": all ink black and the paper white, or the reverse. "B": the paper black or white;
    class k has the hue k / 10, with saturation and value 0.5, each changed by up to 40 %.
    """
    paper = rng.integers(2)
    if domain == "A":
        return np.repeat(GREYS[1 - paper][None], 10, axis=0), GREYS[paper]
    inks = [colorsys.hsv_to_rgb(k / 10, *(0.5 * rng.uniform(0.6, 1.4, 2))) for k in range(10)]
    return np.round(np.array(inks) * 255).astype(np.uint8), GREYS[paper]


def board_layout(members, rng):
    """A board without colours: which mask shows class k, and in which cell: two arrays (10,).

    members: for each class, the indices of the masks that show it.
    """
    return (np.array([rng.choice(indices) for indices in members]),
            rng.permutation(CELLS**2)[:10])


def paint_board(masks, layout, inks, paper):
    """masks (N, h, w), a `board_layout` and its `board_colours` -> (4 h, 4 w, 3) bytes."""
    h, w = masks.shape[1:]
    board = np.tile(paper, (CELLS * h, CELLS * w, 1))
    for index, cell, ink in zip(*layout, inks, strict=True):
        row, column = divmod(cell, CELLS)
        board[row * h:(row + 1) * h, column * w:(column + 1) * w][masks[index]] = ink
    return board


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


def digits_single(out, n=2000, size=28, seed=0, n_test=200):
    """Draw the toy MNIST-Single into the folder `out`, like `horse2zebra`.

    Nothing in A matches anything in B; testAB and testBA hold the true translations of testA with
    the exemplar of the same name in testB, and the reverse.
    """
    if n_test < 1:
        raise ValueError(f"n_test is {n_test}, expected at least 1")

    def pictures(split, count, stream):
        masks, colours = {}, {}
        for domain in "AB":
            rng = np.random.default_rng([seed, stream, "AB".index(domain)])
            masks[domain], labels = drawn_digits(count, size, rng)
            colours[domain] = digit_colours(labels, domain, split, rng)
            order = rng.permutation(count)
            masks[domain] = masks[domain][order]
            colours[domain] = [c[order] for c in colours[domain]]
        for shape, style in ("AA", "BB", "AB", "BA") if split == "test" else ("AA", "BB"):
            name = shape if shape == style else shape + style
            yield split + name, paint_digits(masks[shape], *colours[style])

    draw_digits(out, describe("digits_single", n, size, seed),
                lambda: [*pictures("train", n, 20), *pictures("test", n_test, 21)])


def digits_multiple(out, n=600, size=112, seed=0, n_test=60):
    """Draw the toy MNIST-Multiple into the folder `out`, like `digits_single`."""
    if n_test < 1 or size % CELLS:
        raise ValueError(f"n_test is {n_test} and size {size}, expected at least 1 and a multiple "
                         f"of {CELLS}")

    def pictures(split, count, stream):
        rng = np.random.default_rng([seed, stream])
        masks, labels = drawn_digits(400, size // CELLS, rng)
        members = [np.flatnonzero(labels == k) for k in range(10)]
        boards = [{d: (board_layout(members, rng), *board_colours(d, rng)) for d in "AB"}
                  for _ in range(count)]
        for shape, style in ("AA", "BB", "AB", "BA") if split == "test" else ("AA", "BB"):
            name = shape if shape == style else shape + style
            yield split + name, [paint_board(masks, b[shape][0], *b[style][1:]) for b in boards]

    draw_digits(out, describe("digits_multiple", n, size, seed),
                lambda: [*pictures("train", n, 22), *pictures("test", n_test, 23)])


def draw_digits(out, description, folders):
    """Fill `out` with the (sub-folder, pictures) pairs that the function `folders` returns."""
    captions = {"trainA": "black and white", "trainB": "colours, other digits",
                "testA": "black and white", "testB": "exemplars, other digits",
                "testAB": "testA in the colours of testB", "testBA": "testB in those of testA"}
    with published(out, description) as folder:
        for sub, pictures in folders():
            (folder / sub).mkdir()
            for i, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / sub / f"{i:04d}.png")
        contact_sheet(folder, list(captions.items()), folder / "contact.png")


DATASETS = {"horse2zebra": horse2zebra, "horse2zebra_single": horse2zebra_single,
            "synthetic2real": synthetic2real, "scenes": scenes, "clips": clips,
            "sketches": sketches, "day2night": day2night, "textures": textures,
            "digits_single": digits_single, "digits_multiple": digits_multiple}
DEFAULT_N = {"horse2zebra": 400, "horse2zebra_single": 1, "synthetic2real": 300, "scenes": 600,
             "clips": 40, "sketches": 400, "day2night": 400, "textures": 800,
             "digits_single": 2000, "digits_multiple": 600}


def ensure(name, size, root="datasets", n=None, seed=0):
    """The folder root/toy/NAME-SIZE with that data set, drawn now unless it is there already.

    The folder's name gets -nN-sSEED when these are not the defaults. A folder that is incomplete or
    from another version of the world is drawn again. Processes may call this at the same time.
    Returns a Path. Raises ValueError (unknown name, bad numbers, foreign files), OSError.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}, expected one of: {', '.join(DATASETS)}")
    n = DEFAULT_N[name] if n is None else n
    description = describe(name, n, size, seed)
    suffix = "" if (n, seed) == (DEFAULT_N[name], 0) else f"-n{n}-s{seed}"
    folder = Path(root) / "toy" / f"{name}-{size}{suffix}"
    if not is_complete(folder, description):
        if folder.exists() and not (folder / STAMP).exists():
            refuse_foreign(folder, stamped=False)
            leftover = sibling(folder)
            os.rename(folder, leftover)
            shutil.rmtree(leftover)
        DATASETS[name](folder, n=n, size=size, seed=seed)
    return folder


# 5. By hand --------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, with its complaints on one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv=None):
    parser = Parser(prog="toy.py", description="Draw a data set of the toy world.")
    parser.add_argument("name", help=f"one of: {', '.join(DATASETS)}")
    parser.add_argument("--out", help="folder to draw into (default: datasets/toy/NAME-SIZE)")
    parser.add_argument("--n", type=int, help="training pictures per domain (400), or clips (40)")
    parser.add_argument("--size", type=int, default=64, help="pixels, at least 16")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes")
    args = parser.parse_args(argv)
    try:
        if args.name not in DATASETS or args.out is None:
            out = ensure(args.name, args.size, n=args.n, seed=args.seed)
        else:
            out = Path(args.out)
            n = DEFAULT_N[args.name] if args.n is None else args.n
            DATASETS[args.name](out, n=n, size=args.size, seed=args.seed)
    except ValueError as problem:
        parser.error(str(problem))
    except OSError as problem:
        parser.error(f"cannot write {args.out or problem.filename}: {problem.strerror}")
    print(f"{args.name}: {out}\nsamples: {out / 'contact.png'}")


if __name__ == "__main__":
    sys.exit(main())
