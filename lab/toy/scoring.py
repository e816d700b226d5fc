"""What the scores of several data sets share: local means, colour transfer, the form of a score.

Pictures are float arrays (N, 3, H, W) in [-1, 1]. A score is one entry of a run's result.json:
{"name", "value", "better", "trivial": {answer: its value}}. A trivial answer needs no learning,
so a run has shown something only where it is better than all of them.
"""
import numpy as np

GREY_LEVELS = 127.5  # of 0..255, per unit of a picture in [-1, 1]


def as_floats(*arrays):
    """Arrays or CPU tensors of any kind as float64 arrays."""
    return [np.asarray(a, dtype=np.float64) for a in arrays]


def score(name, measure, y_hat, answers, better="lower"):
    """One score: what the function `measure` says of y_hat and of each trivial answer."""
    return {"name": name, "value": float(measure(y_hat)), "better": better,
            "trivial": {answer: float(measure(a)) for answer, a in answers.items()}}


def window_mean(x, radius):
    """Mean over the (2 radius + 1)-pixel square around each pixel, edges repeated; (..., H, W)."""
    side = 2 * radius + 1
    x = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(radius, radius)] * 2, mode="edge")
    for axis in (-2, -1):
        windows = np.lib.stride_tricks.sliding_window_view(x, side, axis=axis)
        x = windows.mean(axis=-1)
    return x


def colour_transfer(x, reference):
    """x with the mean and deviation of the reference's channels, picture by picture."""
    (mean, std), (to_mean, to_std) = (
        (a.mean(axis=(2, 3), keepdims=True), a.std(axis=(2, 3), keepdims=True))
        for a in (x, reference))
    return ((x - mean) / (std + 1e-6) * to_std + to_mean).clip(-1, 1)
