"""Data sets on disk: drawn in a scratch folder beside their place, moved there when they are whole.

A finished folder holds a stamp, toy.json, which says what it is. So it can be told from a folder
that is older, damaged or somebody else's: the first two are drawn again, the last is refused.
"""
import glob
import json
import math
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

VERSION = 3  # raise it whenever a picture changes or is added: folders are then drawn again
STAMP = "toy.json"  # written last
KINDS = "[AB]|AB|BA|_(img|label|inst|sketch|mask|truth|part)"
OURS = re.compile(rf"((train|val|test|source|target)({KINDS})?(/\d{{4,}})?|(val|test)_styles"
                  r"/[a-z]+)/\d{4,}\.png|contact\.png|boxes\.json|toy\.json")
STALE = 3600  # seconds without a new file, after which a scratch folder's process must be dead


def describe(name, n, size, seed):
    """What identifies a drawn data set; ValueError when a number makes no sense."""
    for key, value, least in (("n", n, 1), ("size", size, 16), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{key} is {value}, expected at least {least}")
    return dict(world=VERSION, name=name, n=n, size=size, seed=seed)


def files_in(folder):
    """Every file below `folder`, as relative paths with forward slashes, but for what the file
    managers of macOS and Windows leave where one has looked."""
    return (f.relative_to(folder).as_posix() for f in folder.rglob("*") if not f.is_dir()
            and f.name[0] != "." and f.name.lower() not in ("thumbs.db", "desktop.ini"))


def is_complete(folder, description):
    """Whether `folder` holds that data set, drawn by this version of the world, no file lost."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        return {**stamp, **description} == stamp == {
            **stamp, "files": sum(1 for _ in files_in(folder))}
    except (OSError, ValueError, TypeError):  # no stamp, or not one of ours
        return False


def refuse_foreign(folder, stamped=True):
    """ValueError if `folder` holds files not drawn here, which must not be overwritten.

    stamped: whether files that have our names count as drawn here only if there is a stamp.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder")
    for name in files_in(folder) if folder.exists() else ():
        if not OURS.fullmatch(name) or stamped and not (folder / STAMP).exists():
            raise ValueError(f"{folder} holds other files ({name}), choose a new or empty folder")


@contextmanager
def published(out, description, stamped=True):
    """Gives an empty folder to draw in, which becomes `out` if all goes well; else no change.

    An older data set in `out` is replaced; but where another process has put the same one there in
    the meantime, that one stays. Raises ValueError (see `refuse_foreign`), OSError.
    """
    out = Path(os.path.abspath(out))
    refuse_foreign(out, stamped)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(out)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        yield new
        stamp = {**description, "files": 1 + sum(1 for _ in files_in(new))}
        (new / STAMP).write_text(json.dumps(stamp) + "\n")
        if out.exists() and not is_complete(out, stamp):
            with suppress(FileNotFoundError):  # another process has just moved it away
                out.rename(old)
        try:
            new.rename(out)  # fails where there are files
        except OSError:
            if not is_complete(out, stamp):
                if old.exists() and not out.exists():
                    old.rename(out)
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_stale(out):
    """Remove what killed processes have left of drawing `out`."""
    for scratch in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        with suppress(OSError):  # its process lives and has just removed it
            ours = {f.name for f in scratch.iterdir()} <= {"new", "old"}
            newest = max(f.stat().st_mtime for f in (scratch, *scratch.rglob("*")))
            if ours and time.time() - newest > STALE:
                shutil.rmtree(scratch, ignore_errors=True)


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
