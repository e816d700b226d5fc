"""horse2zebra: animals with plain coats (A) and with stripes (B); for CycleGAN, CUT and SinCUT.

    trainA/0000  a grey animal under clouds   trainB/0000  a striped animal by noon, another scene
    testA/0000   a dark brown one at dawn     testB/0000   the same picture, but for the coat
    valA, valB   as testA and testB, of scenes of their own

Training is unpaired: no scene is in both domains. A test pair is one scene in two coats, so each
picture is the true answer to translating the other. horse2zebra_single is the same with one picture
per folder, for training on a single pair.
"""
import numpy as np
from PIL import Image

from .disk import contact_sheet
from .scoring import GREY_LEVELS, as_floats, score, window_mean
from .world import render, sample_scene

# 1. Drawing ---------------------------------------------------------------------------------------


def draw(folder, n, size, seed, n_test=40):
    """Fill `folder` with `n` training pictures per domain, `n_test` pairs for val and for test.

    Scene i of a split depends on seed, split and i only: a larger n adds pictures, changes none.
    """
    draw_coats(folder, size, seed, {
        "trainA": (0, n, "plain"), "trainB": (1, n, "zebra"),
        "valA": (30, n_test, "plain"), "valB": (30, n_test, "zebra"),
        "testA": (2, n_test, "plain"), "testB": (2, n_test, "zebra")})


def draw_single(folder, n, size, seed):
    """One picture per folder: trainA and trainB show different scenes; testA repeats trainA's
    picture and testB is its true answer. valA and valB: a pair that is not trained on."""
    if n != 1:
        raise ValueError(f"n is {n}, expected 1: this data set is a single pair")
    draw_coats(folder, size, seed, {
        "trainA": (2, 1, "plain"), "trainB": (1, 1, "zebra"),
        "valA": (30, 1, "plain"), "valB": (30, 1, "zebra"),
        "testA": (2, 1, "plain"), "testB": (2, 1, "zebra")})


def draw_coats(folder, size, seed, splits):
    """Fill `folder` with {sub-folder: (number of the scenes' stream, how many, coat)}."""
    for sub, (stream, count, coat) in splits.items():
        (folder / sub).mkdir()
        for i in range(count):
            scene = sample_scene(np.random.default_rng([seed, stream, i]))
            render(scene, size, coat).save(folder / sub / f"{i:04d}.png")
    contact_sheet(folder, [("trainA", "plain coats"), ("trainB", "zebra stripes, other scenes"),
                           ("testA", "plain coats"),
                           ("testB", "the same scenes, striped: the true answers")],
                  folder / "contact.png")


# 2. Scores ----------------------------------------------------------------------------------------

AMPLITUDES = (0.2, 0.3, 0.4, 0.5, 0.6)  # of painted patterns; the coats' own deviation is 0.46
SIDE = 64  # pixels at which stripes are judged; a body's are 5 to 6 of these apart
FAINT = 1e-3  # squared slope per such pixel, of values in [-1, 1], below which there are no stripes


def reduced(sheets):
    """(N, H, W) averaged to (N, SIDE, SIDE), so that a score means the same from SIDE pixels on."""
    side = min(SIDE, sheets.shape[-1])
    return np.stack([np.asarray(Image.fromarray(sheet.astype(np.float32)).resize(
        (side, side), Image.Resampling.BOX)) for sheet in sheets]).astype(np.float64)


def stripe_directions(a):
    """Which way stripes run, and how clearly: (N, 3, H, W) -> (2, N, SIDE, SIDE).

    The structure tensor T of the grey picture, as the vector (Txx - Tyy, 2 Txy) / (Txx + Tyy): its
    length is 1 in clean stripes and 0 where no direction is preferred; its angle is twice theirs,
    so that a stripe turned by half a turn is the same. It does not see contrast or colour.
    """
    grey = reduced(a.mean(axis=1))
    p = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")  # blurred by [1, 2, 1] / 4, both ways
    p = (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]) / 4
    grey = (p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]) / 4
    dy, dx = np.gradient(grey, axis=(1, 2))
    xx, yy, xy = (window_mean(product, 2) for product in (dx * dx, dy * dy, dx * dy))
    return np.stack([xx - yy, 2 * xy]) / (xx + yy + FAINT)


def stripe_direction_error(y_hat, y, coat):
    """Distance of the `stripe_directions` of two (N, 3, H, W), averaged over the coat (N, H, W)."""
    distance = np.linalg.norm(stripe_directions(y_hat) - stripe_directions(y), axis=0)
    return np.average(distance, weights=reduced(coat))


def coat_scores(x, y_hat, y):
    """Scores of translations y_hat of plain pictures x against their true answers y.

    All are (N, 3, H, W) in [-1, 1], lower is better. The coat is where x and y differ.
    "stripe direction error": the distance of `stripe_directions` on the coat; no such score if y's
    are plain, which have no direction. The truth moved by 1/64 of the side has 0.16, a picture
    without any direction 0.6, and a wrong one more than that.
    "coat error": the difference of the local mean and of the local deviation on the coat, in
    windows of about one and a half stripes, in grey levels of 0..255: the right amount of black and
    white, whatever its pattern. A checkerboard has it too, so this score never stands alone.
    "background error": the difference elsewhere, where y equals x, so that copying is right.
    The trivial answers know the coat's place and mean colour and paint it plain, as a checkerboard
    of pixels, as salt-and-pepper noise or in vertical bars (in the contrast that is best for their
    coat error); or copy x; or answer the mean colour of all y everywhere. None is good at all of
    them. Returns [{"name", "value", "better", "trivial"}].
    """
    x, y_hat, y = as_floats(x, y_hat, y)
    coat, radius = coat_of(x, y), max(1, round(x.shape[-1] * 0.05))

    def direction_error(a):
        return stripe_direction_error(a, y, coat)

    def local(a):
        mean = window_mean(a, radius)
        return mean, np.sqrt(np.maximum(window_mean(a * a, radius) - mean * mean, 0))

    local_y = local(y)

    def coat_error(a):
        return sum(np.abs(one - other).mean(axis=1)[coat].mean()
                   for one, other in zip(local(a), local_y, strict=True)) * GREY_LEVELS

    def background_error(a):
        return np.abs(a - y).mean(axis=1)[~coat].mean() * GREY_LEVELS

    mean_coat = pixels(y, coat).mean(axis=0)[:, None, None]

    def painted(pattern):
        return np.where(coat[:, None], (mean_coat + pattern).clip(-1, 1), x)

    answers = {"copy the input": x, "mean coat colour": painted(0.0),
               "mean colour": np.broadcast_to(y.mean(axis=(0, 2, 3))[:, None, None], y.shape)}
    for name, pattern in patterns(len(x), x.shape[-1]).items():
        answers[name] = min((painted(a * pattern) for a in AMPLITUDES), key=coat_error)
    striped = pixels(y, coat).std() > pixels(x, coat).std()  # black and white, or brown
    return [score("stripe direction error", direction_error, y_hat, answers),
            score("coat error", coat_error, y_hat, answers),
            score("background error", background_error, y_hat, answers)][not striped:]


def patterns(n, size):
    """What a painter without an idea of stripes may put on a coat: {name: -1 or 1, (..., H, W)}."""
    y, x = np.mgrid[:size, :size]
    rng, width = np.random.default_rng(0), max(1, round(size / 32))
    return {"checkerboard": np.where((x + y) % 2, 1, -1),
            "noise": rng.choice([-1, 1], (n, 1, size, size)),
            "vertical bars": np.where(x // width % 2, 1, -1)}


def single_scores(x, y_hat, y):
    """`coat_scores` for horse2zebra_single, of one picture: (3, H, W) or (1, 3, H, W), 64 to 256
    pixels wide. Values mean the same at each size."""
    return coat_scores(*(a.reshape(1, 3, *a.shape[-2:]) for a in as_floats(x, y_hat, y)))


def coat_pixels(x, y_hat, y):
    """The coats' pixels, to compare their distributions: {"x", "G(x)", "y": (n, 3) in [-1, 1]}."""
    x, y_hat, y = as_floats(x, y_hat, y)
    coat = coat_of(x, y)
    return {"x": pixels(x, coat), "G(x)": pixels(y_hat, coat), "y": pixels(y, coat)}


def coat_of(x, y):
    """Where the coat is: (N, H, W) bool."""
    return np.abs(x - y).max(axis=1) > 0


def pixels(a, where):
    """The pixels of a (N, 3, H, W) at the true places of where (N, H, W): (n, 3)."""
    return a.transpose(0, 2, 3, 1)[where]
