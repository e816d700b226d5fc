"""A page in the browser: translate, paint and edit with the networks that are there.

    python -m lab.app [--runs runs] [--port 7860]    # needs: pip install -r lab/requirements.txt

It offers every checkpoint below --runs, our last.pt or a file that the authors released, and what
its method can do: translate after a direction, an exemplar or a random style; paint a label map;
swap and edit codes; click into an output of CUT to see where it finds itself in the input; look at
a training run. The scripts do the work: a picture here is the one that --translate writes. Served
to this machine alone, at 127.0.0.1; neither page nor program asks another machine for anything.
"""

import argparse
import base64
import contextlib
import copy
import functools
import html
import importlib
import io
import json
import os
import re
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageOps

import common
from common import UserError
from lab import figures, page, released, toy

try:
    import gradio as gr
except ModuleNotFoundError:  # main() says so
    gr = None

METHODS = {  # script: its function that reads --weights, what the page shows for it, directions
    "cyclegan": ("load_generator", "x way", "AtoB BtoA"), "cut": ("load_generator", "x spot match"),
    "sincut": ("load_generator", "x seed"), "cycada": ("from_weights", "x way", "StoT TtoS"),
    "spade": ("load_networks", "board own I Is seed"), "segin": ("load_networks", "x I Is"),
    "pix2pixsc": ("load_generator", "board own I Is I_map"),
    "egscit": ("load_translator", "x I Is way", "AtoB BtoA"),
    "init": ("load_networks", "x I Is way seed styles", "AtoB BtoA"),
    "swapae": ("load_networks", "x board I Is way axis alpha", "swap texture region")}
SLIDERS = {"seed": ("random style, where there is no exemplar", 0, 100, 1, 0),
           "styles": ("how many", 1, 6, 1, 1),
           "axis": ("of texture, or of structure in the region: principal direction", 1, 8, 1, 1),
           "alpha": ("how far: to the other's texture, or along the direction", -3, 3, 0.05, 1)}
MOST = 4_000_000  # pixels of a picture; larger ones take minutes, and are for --translate
NETWORKS = {}  # the last three: (G and what belongs to it, the flags that its file told, codes)
LOCK, QUIET = threading.RLock(), contextlib.redirect_stdout(open(os.devnull, "w"))

# ---- 1. Checkpoints, and what their scripts make -------------------------------------------------

def checkpoints(runs):
    """Every last.pt and weights file of the authors' (not their E and D) below a folder: [str]."""
    return [str(f) for f in sorted(Path(runs).rglob("*.pt*")) if f.suffix in (".pt", ".pth")
            and f.is_file() and not re.search("_net_[DE]", f.name)]


@functools.lru_cache(maxsize=16)
def parsed(path, _):
    """As `opened`, once for each (path, time of its last change)."""
    state = common.load_file(path)
    method = state.get("method") if isinstance(state, dict) else None
    for name in () if method else ("swapae", "init", "spade", "sincut", "cyclegan", "pix2pixsc"):
        flags = importlib.import_module(name).get_args([])
        with contextlib.suppress(UserError):
            if method is None:
                getattr(released, name)(state, path, *[flags][name not in ("spade", "pix2pixsc"):])
                # two papers have one generator, but CUT's blurs where it strides
                method = "cut" if name == "cyclegan" and "model.7.filt" in state else name
    if method not in METHODS:
        raise UserError(f"{path}: neither a checkpoint of these scripts nor of their authors")
    script, chance = importlib.import_module(method), state.get("chance", {})
    return script, script.get_args(["--weights", path]), chance if "method" in state else None


def opened(path):
    """(script, its flags as of the checkpoint, chance levels or None if released) of a file."""
    if not path or not Path(path).is_file():
        raise UserError(f"{path}: no such file any more" if path else "choose a network first")
    with LOCK, QUIET:
        script, args, chance = parsed(path, os.stat(path).st_mtime_ns)
        common.GREY = args.range  # parsing sets it, once
    return script, copy.copy(args), chance


@contextlib.contextmanager
def remembered(script, args):
    """Inside, the script keeps the last networks (and swapae.py their codes) that it made."""
    name, changed = METHODS[script.__name__][0], os.stat(args.weights).st_mtime_ns
    load, embed = getattr(script, name), getattr(script, "codes_of", None)
    key = args.weights, changed, getattr(args, "direction", None)

    def loader(args, device):
        if key not in NETWORKS:
            before, nets = dict(vars(args)), load(args, device)
            while len(NETWORKS) > 2:
                del NETWORKS[next(iter(NETWORKS))]
            told = {k: v for k, v in vars(args).items() if v != before.get(k)}  # --labels, ...
            NETWORKS[key] = [nets, told]
        vars(args).update(NETWORKS[key][1])
        return NETWORKS[key][0]

    def codes(*given):
        if len(NETWORKS[key]) < 3:
            NETWORKS[key].append(embed(*given))
        return NETWORKS[key][2]

    patches = {name: loader} | ({"codes_of": codes} if embed else {})
    with LOCK, QUIET, mock.patch.multiple(script, **patches):
        torch.manual_seed(args.seed)  # SinCUT's noise
        yield loader


def translated(path, **flags):
    """The RGB `PIL.Image` that a checkpoint's script writes for such flags; `UserError`."""
    script, args, _ = opened(path)
    vars(args).update(flags)
    with remembered(script, args), tempfile.TemporaryDirectory() as args.out:
        script.translate_files(args)
        return common.open_rgb(next(Path(args.out).rglob("*.png")))


def found(path, picture, place):
    """CUT's Fig. 3.27 for a picture file and a place "[across, down]", 0 to 1: [`PIL.Image`]."""
    args, x = opened(path)[1], common.to_tensor(common.open_rgb(picture))[None]
    with LOCK, QUIET, tempfile.TemporaryDirectory() as args.out:
        figures.cut_similarity(args, x, [json.loads(place)[::-1]])
        return [common.open_rgb(Path(args.out, "similarity.png"))]


# ---- 2. Test pictures, label maps, curves --------------------------------------------------------

def samples(path, most=8):
    """Up to `most` inputs and exemplars of a checkpoint's test data, evenly spaced: two lists of
    files, empty without data; label maps are those of the exemplars."""
    script, args, chance = opened(path)
    pairs, places = [], [Path(folder, args.data) for folder in (".", "datasets")]
    with LOCK, QUIET, contextlib.suppress(UserError):
        if chance is not None and (args.data[:3] == "toy" or any(p.is_dir() for p in places)):
            root, method = script.data_folder(args), script.__name__
            split = "test" if any(Path(root).glob("test*")) else "train"
            if method == "pix2pixsc":
                pairs = [(f.label, f.image) for f in script.find_frames(root, split, args)]
            elif method == "spade":
                pairs = [(m, x) for x, m, _ in script.find_pairs(root, split, args.edges)]
            elif method == "segin":  # sketches of their own, not beside the photo in one file
                pairs = [(x, y) for x, y, _ in script.find_pairs(root, split, args) if x]
            elif method == "swapae":
                pairs = [(x, x) for x in script.find_pictures(root, split)]
            elif method == "cycada":
                data = script.load_data(args)
                pairs = [(x, x) for x, _ in data["source"] + data["target"]]
            else:
                pairs = [(x, x) for s in "AB" for x in common.find_split(root, split, s)]
    pairs = [pairs[i * len(pairs) // most] for i in range(most)] if len(pairs) > most else pairs
    return [x for x, _ in pairs], [y for _, y in pairs]


def palette(path):
    """[[id, class name (a line of the data's classes.txt), [r, g, b, a]], ...]; `UserError`."""
    script, args, _ = opened(path)
    if getattr(args, "label_kind", "ids") != "ids":
        raise UserError(f"{path}: --label-kind {args.label_kind} is for --translate alone")
    with remembered(script, args) as load:
        load(args, common.pick_device(args.device))  # the authors' files tell --labels
    listed = next((f for root in (".", "datasets") if (f := Path(root, args.data, "classes.txt"))
                   .is_file()), None)
    names = (listed.read_text("utf-8-sig", "replace").split("\n") if listed else []
             if args.data != "toy" else [*toy.SCENE_CLASSES] if script.__name__ == "spade"
             else [*toy.LABELS, "bars"])
    names = {i: name for i, name in enumerate(names) if name and i < args.labels}
    ids = [*range(args.labels), *(getattr(args, "unlabelled", None) or [])][:256]
    colours = importlib.import_module("spade").colour_map(torch.tensor([[ids]]))[0, :, 0].t()
    return [[i, names.get(i, f"class {i}" if i < args.labels else "unlabelled"), [*colour, 255]]
            for i, colour in zip(ids, (colours * 127 + 128).int().tolist(), strict=True)]


def board(ids, colours, under=None):
    """What the map of app.js shows: ids (H, W), a palette, a `PIL.Image` below; `UserError`."""
    ids, raw = np.asarray(ids), io.BytesIO()
    if ids.min() < 0 or ids.max() > 255:
        raise UserError(f"the map has ids from {ids.min()} to {ids.max()}; painted are 0 to 255")
    if under:
        under.save(raw, "PNG")
    under, ids64 = (base64.b64encode(data).decode() for data in (
        raw.getvalue(), ids.astype(np.uint8).tobytes()))
    return json.dumps({"w": ids.shape[1], "h": ids.shape[0], "ids": ids64, "palette": colours,
                       "under": under and f"data:image/png;base64,{under}"})


def region(picture):
    """An empty map of a region over a `PIL.Image`, for app.js."""
    small = ImageOps.contain(picture, (512, 512), Image.NEAREST)
    return board(np.zeros(small.size[::-1]), [[0, "as it is", [0, 0, 0, 0]],
                                              [1, "region", [220, 38, 38, 120]]], small)


def ids_of(value):
    """The ids (H, W), bytes, that the map of app.js sent; ValueError if they are not whole."""
    given = json.loads(value)
    return np.frombuffer(base64.b64decode(given["ids"]), np.uint8).reshape(given["h"], given["w"])


def shown(file, colours=None):
    """A picture file as RGB `PIL.Image`, or a map of ids with the colours of a palette."""
    if colours is None:
        return common.open_rgb(file)
    ids = Image.fromarray(np.asarray(common.open_ids(file)).clip(0, 255).astype(np.uint8))
    table = {i: colour[:3] for i, _, colour in colours}
    ids.putpalette([c for i in range(256) for c in table.get(i, [128] * 3)])
    return ids


def checked(file):
    """A file, unless it is an unreadable or too large picture: `UserError`; None stays None."""
    if file and np.prod(common.opened(file, size_only=True)) > MOST:
        raise UserError(f"{file}: more than {MOST:,} pixels, which is for --translate alone")
    return file


def curves(path):
    """All curves and grids of the run that a checkpoint lies in, as HTML."""
    folder, chance = Path(path).parent, opened(path)[2] or {}
    done = [points[-1][0] for points in page.curves(folder / "log.csv").values()]
    return page.page(folder, max(done, default="?"), chance).split("</style>")[-1]


# ---- 3. The page ---------------------------------------------------------------------------------

def answer(path, x, value, exemplar, exemplar_map, way, seed, styles, axis, alpha):
    """The picture for what stands in the page, or None where its input is missing."""
    method = opened(path)[0].__name__
    painted = "own" in METHODS[method][1]
    flags = {"translate": checked(x), "exemplar": checked(exemplar), "seed": int(seed),
             "exemplar_label": exemplar_map, "styles": int(styles), "alpha": [alpha]}
    if not (value if painted else x):
        return [None]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "map.png")
        if painted:
            Image.fromarray(ids_of(value)).save(file)
            flags["translate"] = file
        elif method != "swapae":
            flags |= {"direction": way} if way else {}
        elif way != "swap":
            flags |= {"exemplar": None, "pca": int(axis)}
            if way == "region":
                mask = Image.fromarray(ids_of(value) * 255)
                mask.resize(common.opened(x, size_only=True), Image.NEAREST).save(file)
                flags["mask"] = str(file)
        return [translated(path, **flags)]


def interface(runs):
    """The page over the checkpoints below a folder: a `gr.Blocks`."""
    # Pictures arrive as they are: gradio would make 8-bit RGB of them, and raise where they are not
    gr.Image.preprocess = lambda self, payload: payload and payload.path
    parts = {}
    tile = {"elem_classes": "picture", "format": "png", "buttons": ["download", "fullscreen"]}
    drop = tile | {"type": "filepath", "sources": ["upload", "clipboard"]}
    shelf = {"columns": 4, "height": "auto", "format": "png", "buttons": [],
             "allow_preview": False, "elem_classes": "shelf"}

    def part(kind, name, label, **options):
        parts[name] = kind(label=label, elem_id=name, **options)
        return parts[name]

    def look():
        if not (files := checkpoints(runs)):
            raise UserError(f"no network below {runs}/ yet: python cut.py makes one in minutes")
        return [gr.update(value=files[0], choices=[
            (str(Path(f).relative_to(runs)).removesuffix("/last.pt"), f) for f in files])]

    def choose(path):
        """What each part of the page holds for a checkpoint, and whether it is seen."""
        (script, args, chance), (xs, Is) = opened(path), samples(path)
        _, show, *ways = METHODS[script.__name__]
        kind, ways = script.__name__, " ".join(ways).split()
        hide = {"segmap": "I Is seed", "random": "I Is"}.get(getattr(args, "input", ""), "") * (
            kind == "spade") + " Is" * (not Is) + " spot match" * (chance is None) + " way" * (
            chance is None and kind != "init")
        show = {*show.split(), *["xs"] * bool(xs)} - {*hide.split()}
        show |= {"middle"} if show & {"I", "way", "seed"} else set()
        colours = palette(path) if "own" in show else None
        more = {name: {"value": slider[-1]} for name, slider in SLIDERS.items()}
        more |= dict.fromkeys(("x", "I", "I_map", "match"), {"value": None})
        more["seed"] = {"value": min(args.seed, SLIDERS["seed"][2])}
        if Is and kind not in ("spade", "init"):  # those have random styles, too
            more |= {"I": {"value": shown(Is[-1])},
                     "I_map": {"value": shown(xs[-1], colours) if colours else None}}
        if colours:
            more["board"] = {"value": board(common.open_ids(xs[0]) if xs else np.full(
                (args.height or args.size, args.size), colours[0][0]), colours)}
        elif xs:
            more |= {"x": {"value": shown(xs[0])}, "board": {"value": region(shown(xs[0]))}}
        for name, items, of in (("xs", xs, colours), ("Is", Is, None)):
            more[name] = {"value": [shown(item, of).convert("RGB") for item in items],
                          "selected_index": None}
        way = getattr(args, "direction", ways[0]) if ways else None
        more["way"] = {"choices": ways, "value": way}
        return [gr.update(visible=name in show, **more.get(name, {})) for name in parts] + [
            None, time.time()]

    def pick(path, event: gr.SelectData):
        """A test picture or map, or an exemplar, was clicked."""
        item, image = (files[event.index] for files in samples(path))
        colours = palette(path) if "own" in METHODS[opened(path)[0].__name__][1] else None
        if event.target.elem_id == "Is":
            labels = colours and shown(item, colours)
            return [gr.skip(), gr.skip(), shown(image), labels, time.time()]
        now = board(common.open_ids(item), colours) if colours else region(shown(item))
        return [None if colours else shown(item), now, gr.skip(), gr.skip(), time.time()]

    with gr.Blocks(title="lab.app", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        choice = gr.Dropdown([], label="network (reload to look again)", elem_id="network")
        message, turn = gr.HTML(elem_id="message"), gr.State(0)
        js = Path(__file__).with_name("app.js").read_text(encoding="utf-8")
        with gr.Tab("Picture"), gr.Row():
            with gr.Column():
                x = part(gr.Image, "x", "input", height=380, **drop)
                sheet = part(gr.HTML, "board", None, html_template="", js_on_load=js)
                xs = part(gr.Gallery, "xs", "test pictures", **shelf)
                own = part(gr.UploadButton, "own", "Open a label map")
            with gr.Column() as parts["middle"]:
                I = part(gr.Image, "I", "exemplar", height=240, **drop)  # noqa: E741 (the paper's)
                I_map = part(gr.Image, "I_map", "its label map", height=200, **drop)
                Is = part(gr.Gallery, "Is", "exemplars", **shelf)
                values = [part(gr.Radio, "way", "direction", choices=[])]
                values += [part(gr.Slider, name, label, minimum=low, maximum=high, step=step)
                           for name, (label, low, high, step, _) in SLIDERS.items()]
            with gr.Column():
                out = gr.Image(label="output", interactive=False, elem_id="out", height=380, **tile)
                spot = part(gr.HTML, "spot", None, js_on_load=js, html_template="Click into the "
                            "output: where in the input is that patch?")
                match = part(gr.Image, "match", "CUT, Fig. 3.27", interactive=False, **tile)
        with gr.Tab("Training") as tab:
            training, timer = gr.HTML(elem_id="curves"), gr.Timer(15, active=False)

        def when(trigger, work, inputs, outputs, lost=None, **options):
            """On a trigger: work(*inputs) to the outputs; its time, or what went wrong, is said."""
            @functools.wraps(work)
            def event(*given):
                start = time.perf_counter()
                try:
                    return *work(*given), f"{time.perf_counter() - start:.2f} s"
                except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
                    text = re.sub(rf"{re.escape(demo.GRADIO_CACHE)}/\w+/", "", str(error))
                    return *(lost or [gr.skip()] * len(outputs)), (
                        f"<b class=error>{html.escape(text.strip().splitlines()[-1])}</b>")
            trigger(event, inputs, [*outputs, message], api_visibility="private", **options)

        when(demo.load, look, [], [choice])
        when(choice.change, choose, [choice], [*parts.values(), out, turn])
        for gallery in (xs, Is):
            when(gallery.select, pick, [choice], [x, sheet, I, I_map, turn])
        when(own.upload, lambda path, file: [
            board(common.open_ids(checked(file)), palette(path)), time.time()],
            [choice, own], [sheet, turn])
        when(x.input, lambda x: [x and region(common.open_rgb(checked(x))), time.time()], [x],
             [sheet, turn], [None, None])
        for changed in (turn.change, *(p.input for p in (sheet, I, I_map, *values))):
            when(changed, answer, [choice, x, sheet, I, I_map, *values], [out],
                 [None], trigger_mode="always_last", show_progress="hidden")
        when(spot.click, found, [choice, x, spot], [match])
        for trigger in (tab.select, timer.tick):
            when(trigger, lambda path: [curves(path)], [choice], [training], show_progress="hidden")
        tab.select(lambda: gr.Timer(active=True), None, timer)
    return demo


def main(argv=None):
    p = argparse.ArgumentParser("python -m lab.app", argparse.SUPPRESS, __doc__.split("\n")[0])
    p.add_argument("--runs", default="runs", metavar="DIR", help="folder of the run folders")
    p.add_argument("--port", type=int, default=7860, help="of 127.0.0.1")
    args = p.parse_args(argv)
    if gr is None:
        raise UserError("lab.app needs gradio: pip install -r lab/requirements.txt")
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware as Hosts

    torch.hub.download_url_to_file = mock.Mock(side_effect=OSError("lab.app fetches nothing"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        interface(args.runs).launch(
            server_name="127.0.0.1", server_port=args.port, quiet=True, ssr_mode=False,
            max_file_size="20mb", footer_links=[], css_paths=Path(__file__).with_name("app.css"),
            head="<meta http-equiv=Content-Security-Policy content=\"default-src 'self' "
                 "'unsafe-inline' 'unsafe-eval' data: blob:\">",
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            app_kwargs={"middleware": [Middleware(Hosts, allowed_hosts=["127.0.0.1"])]})


if __name__ == "__main__":
    common.entry(main)
