"""The toy world: a small savanna drawn from parameters; every translation has a known answer.

A `Scene` is a handful of plain numbers: the hour of the day, the horizon, the colour of the ground,
some trees and tufts, and one or two grazing or walking animals. `sample_scene` draws the numbers,
`render` turns them into a picture. The same scene can be rendered with another coat; then the two
pictures differ in the coat and nowhere else, and each is the true answer to translating the other.

    rng -> sample_scene -> Scene -> paint -> Canvas(colour, light, label) -> render -> RGB picture

`paint` fills three sheets, far things first: what colour a thing has, how much sunlight reaches
it, and what it is (an index into LABELS). A picture is colour x light, which is why light and
shadow cannot depend on the coat.

    scene = sample_scene(numpy.random.default_rng(0))
    a, b = (render(scene, 64, coat) for coat in ("plain", "zebra"))
"""
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .animals import BLACK, Animal, Tube, animal_parts, place

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
WHITE, BARK = (244, 239, 228), (104, 82, 62)


# 1. The scene: plain numbers ----------------------------------------------------------------------
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


def choose(rng, values):
    """One element of a sequence, each equally likely."""
    return values[int(rng.integers(len(values)))]


def vary(rng, colour, amount):
    """`colour` times a random brightness, plus a little random tint."""
    tinted = np.array(colour) * rng.uniform(1 - amount, 1 + amount) + rng.normal(0, 3, 3)
    return tuple(int(c) for c in tinted.clip(0, 255))


def sample_animal(rng, unit, middle):
    """An animal of that height, nose to tail centred on x = `middle`; large ones stand nearer."""
    graze = rng.uniform(0.8, 1) if rng.random() < 0.4 else rng.uniform(0, 0.3)
    facing = choose(rng, (-1, 1))
    return Animal(
        x=middle - facing * unit * (0.11 + 0.09 * graze),
        y=0.58 + 0.56 * unit + rng.uniform(-0.02, 0.03),
        unit=unit, facing=facing, graze=graze, phase=rng.uniform(0, 2 * math.pi),
        stride=rng.uniform(0, 0.05) if graze > 0.5 else rng.uniform(0.02, 0.13),
        plain=vary(rng, choose(rng, tuple(PLAIN.values())), 0.1))


def sample_scene(rng):
    """A random Scene. `rng`: numpy Generator; equal generators give equal scenes.

    It does not know for which coat it draws, so pictures of either coat have the same distribution
    of everything else.
    """
    horizon = rng.uniform(0.34, 0.5)
    ground = vary(rng, choose(rng, GROUNDS), 0.06)
    trees = []
    for _ in range(rng.integers(2, 6)):
        depth = rng.uniform(0.02, 0.6) ** 1.5
        kind = choose(rng, ("acacia", "acacia", "round", "bush"))
        height = (0.14 + 0.75 * depth) * (0.4 if kind == "bush" else 1) * rng.uniform(0.8, 1.25)
        trees.append(Tree(kind, rng.uniform(-0.05, 1.05), horizon + depth * (1 - horizon), height,
                          vary(rng, choose(rng, LEAVES), 0.12), int(rng.integers(2**31))))
    tufts = []
    for _ in range(rng.integers(8, 18)):
        depth = rng.uniform(0.08, 1.04)
        tufts.append(Tuft(rng.uniform(0, 1), horizon + depth * (1 - horizon),
                          (0.015 + 0.045 * depth) * rng.uniform(0.7, 1.3),
                          vary(rng, ground, 0.14), tuple(sorted(rng.uniform(-0.9, 0.9, 6)))))
    animals = [sample_animal(rng, rng.uniform(0.48, 0.63), rng.uniform(0.43, 0.57))]
    if rng.random() < 0.25:  # a smaller one behind, often half hidden
        animals.append(sample_animal(rng, rng.uniform(0.3, 0.4), choose(rng, (0.15, 0.85))))
    return Scene(choose(rng, tuple(DAYLIGHT)), rng.uniform(0.92, 1.04), rng.uniform(0.05, 0.95),
                 horizon, ground, int(rng.integers(2**31)), tuple(trees), tuple(tufts),
                 tuple(animals))


# 2. Painting --------------------------------------------------------------------------------------

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


def blend(a, b, t):
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
        hill = blend(blend(scene.ground, (96, 116, 118), 0.65), day["low"], haze)
        foot = scene.horizon + 0.02
        canvas.polygon([*zip(xs, ridge, strict=True), (1, foot), (0, foot)], hill, label="hill")
    near = np.array(scene.ground, dtype=float)
    far = np.array(blend(scene.ground, day["low"], 0.4))
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
    bark, leaf = blend(BARK, low, haze), blend(tree.leaf, low, haze)
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
