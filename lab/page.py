"""index.html of a run folder: its loss curves and sample grids in one self-contained file.

    python -m lab.page runs/cut-toy        # build it anew, for instance after copying a folder

Training writes it with every sample grid. Beside a loss stands the value that pure chance would
give it (dashed): a dead adversary or an encoder that recovers nothing lies on that line.
"""

import argparse
import base64
import csv
import html
import io
import math
from pathlib import Path

from PIL import Image

import common

STYLE = ("body{font:14px sans-serif;margin:2em}img{max-width:100%}"
         "svg{border:1px solid #ddd;margin:4px}text{font:12px sans-serif}")


def page(folder, step, chance):
    """The page of a run folder (log.csv, samples/step_*.png) as a str of HTML.

    step: updates done. chance: {loss name: value that pure chance gives}. Of the grids, 12 at
    most, evenly spaced over the run, are shown, the newest first; unreadable ones are left out.
    """
    folder = Path(folder)
    title = html.escape(folder.resolve().name)
    parts = [f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
             f"<h1>{title}, step {step}</h1>"]
    for name, points in curves(folder / "log.csv").items():
        parts.append(svg_curve(name, points, chance.get(name)))
    grids = sorted((folder / "samples").glob("step_*.png"))
    shown = {grids[round(i * (len(grids) - 1) / 11)] for i in range(12) if grids}
    for grid in sorted(shown, reverse=True):
        try:
            code = jpeg(grid)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # a picture that a killed or another program left half written
        parts.append(f"<h3>{html.escape(grid.stem)}</h3>\n"
                     f"<img src='data:image/jpeg;base64,{code}'>")
    return "\n".join(parts) + "\n"


def curves(log):
    """{loss name: [(step, value), ...]} of a log.csv; rows that are not whole are left out."""
    found = {}
    if log.exists():
        for row in csv.DictReader(log.read_text(encoding="utf-8").splitlines()):
            for name in list(row)[1:-1]:  # all but step and seconds
                try:
                    point = int(row["step"]), float(row[name])
                except (KeyError, TypeError, ValueError):
                    continue
                if math.isfinite(point[1]):
                    found.setdefault(name, []).append(point)
    return found


def jpeg(path):
    """A picture as base64 text of a JPEG, at most 900 x 1600."""
    raw = io.BytesIO()
    with Image.open(path) as im:
        im = im.convert("RGB")
        im.thumbnail((900, 1600))
        im.save(raw, "JPEG", quality=85)
    return base64.b64encode(raw.getvalue()).decode()


def svg_curve(name, points, chance=None):
    """An <svg> of a loss over the steps, [(step, value), ...]: the ends of both axes are labelled.

    chance: a value that is drawn as a dashed line, inside the range of the axis.
    """
    steps, values = zip(*points, strict=True)
    drawn = values if chance is None else (*values, chance)
    low, high = min(drawn), max(drawn)
    span_x, span_y = max(steps[-1] - steps[0], 1), max(high - low, 1e-12)
    xs = [64 + 316 * (step - steps[0]) / span_x for step in steps]  # the plot: 64..380, 30..170
    ys = [170 - 140 * (value - low) / span_y for value in drawn]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=False))
    label, dashed = f"{html.escape(name)}: {values[-1]:.4g}", ""
    if chance is not None:
        label += f" (dashed, by chance: {chance:.3g})"
        dashed = f"<path d='M64 {ys[-1]:.1f}H380' stroke=#c33 stroke-dasharray='5 4' />"
    return (f"<svg width=400 height=200><text x=64 y=18>{label}</text>"
            "<path d='M64 30V170H380' fill=none stroke=#888 />"
            f"<text x=58 y=34 text-anchor=end>{high:.3g}</text>"
            f"<text x=58 y=174 text-anchor=end>{low:.3g}</text><text x=64 y=188>{steps[0]}</text>"
            f"<text x=380 y=188 text-anchor=end>step {steps[-1]}</text>{dashed}"
            f"<polyline points='{line}' fill=none stroke=steelblue stroke-width=1.5 /></svg>")


def main():
    p = argparse.ArgumentParser(prog="lab.page", description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path, metavar="RUNFOLDER", help="of a training run")
    folder = p.parse_args().folder
    state = common.load_file(folder / "last.pt")
    if not isinstance(state, dict) or "step" not in state:
        raise common.UserError(f"{folder / 'last.pt'}: not a checkpoint of a training run")
    common.write_whole(folder / "index.html", page(folder, state["step"], state.get("chance", {})))
    print(folder / "index.html")


if __name__ == "__main__":
    common.entry(main)
