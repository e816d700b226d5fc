"""Animals as tapered tubes with coordinates: geometry, no light and no pixels.

An animal is a list of named `Part`s, each a `Tube` with its own coordinates (s along the axis, v
across it). Stripes are drawn in these coordinates, so they follow the body, and a stripe's place is
a function of the silhouette: nothing about them is random.

    Animal (plain numbers) -> animal_parts -> [Part(label, Tube)], in body coordinates
    place: body coordinates -> picture coordinates (1 x 1, x to the right, y downwards)
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLACK = (40, 35, 35)  # slightly warm, slightly soft
HAIR, HOOF, MUZZLE = (52, 40, 36), (58, 50, 46), (70, 58, 54)


# 1. Tubes -----------------------------------------------------------------------------------------

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


# 2. Animals ---------------------------------------------------------------------------------------

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


@dataclass
class Part:
    """A named piece; `label` is in world.LABELS, `far` is true on the side away from us."""

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


def place(animal, points):
    """Body coordinates (..., 2) to picture coordinates."""
    scale = np.array([animal.facing * animal.unit, -animal.unit])
    return points * scale + np.array([animal.x, animal.y])
