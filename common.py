"""What the scripts share and no single paper defines.

    1. Errors and flags    UserError, entry, base_parser, parse_flags
    2. Pictures            open_rgb, to_tensor, to_pil, list_pictures, find_split, save_grid
    3. Data sets           find_data: a folder, the toy world, or a known name (downloaded once)
    4. Blocks and losses   InstanceNorm, BlurDown, PatchGAN, VGG19, adain, lsgan, hinge, ...
    5. Run                 run folder, device, seeds, torchrun, log, grids, checkpoints, resume

Everything that has an equation in a paper lives in that paper's script; the exceptions (VGG
features, AdaIN, the PatchGAN and the GAN losses) are shared word for word by several papers.
"""

import argparse
import base64
import csv
import html
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections import Counter
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

# =============================================================================================
# 1. Errors and flags
# =============================================================================================


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit code 2, no traceback."""


def entry(main):
    """Run `main()`; turn a user's mistake, Ctrl-C or a full memory into one line and an exit code.

    Exit codes: 2 for `UserError` and out of memory, 130 for Ctrl-C.
    """
    message = None
    try:
        main()
    except UserError as error:  # a data-loader worker wraps it in a traceback: keep the last line
        message = str(error).strip().splitlines()[-1].removeprefix("common.UserError: ")
    except (MemoryError, RuntimeError) as error:  # CUDA, MPS and the CPU say it each in its way
        known = re.search("out of memory|not enough memory|allocate memory", str(error))
        if not known and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        message = "out of memory: lower --size or --batch, or add --amp"
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if message:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def base_parser(doc):
    """ArgumentParser with the flags that every script spells alike; `doc` is its docstring."""
    p = argparse.ArgumentParser(description=doc.strip().split("\n\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--data", default="toy", help="'toy', a folder, or a known data set's name")
    add("--out", default=None, help="run folder (runs/METHOD-DATA if not given), or the folder "
                                    "for translated pictures")
    add("--seed", type=int, default=0, help="seed of weights, data order and sampling")
    add("--device", default=None, help="cuda, mps or cpu (the first of these if not given)")
    add("--workers", type=int, default=4, help="processes that read pictures")
    add("--amp", action=switch, default=False, help="bfloat16 autocast; losses stay float32")
    add("--compile", action=switch, default=False, help="torch.compile the networks")
    add("--channels-last", action=switch, default=True, help="NHWC memory: faster convolutions")
    add("--resume", action=switch, default=False, help="continue the run folder's last.pt")
    add("--weights", default=None, metavar="FILE", help="our last.pt or the authors' released file")
    add("--translate", default=None, metavar="PATH", help="translate a picture or a folder of them")
    add("--evaluate", action=switch, default=False, help="compute the paper's metric")
    add("--log-every", type=int, default=20, help="steps between rows of log.csv")
    add("--sample-every", type=int, default=1000, help="steps between sample grids")
    return p


def parse_flags(p, argv, method, presets, run_name):
    """Parse in layers: paper defaults < `presets(args)` < saved configuration < command line.

    method: the script's name; presets: function of the roughly parsed args, a dict of defaults.
    run_name: function args -> 'METHOD-DATA', the default run folder's name.
    A configuration is taken from the checkpoint that --weights or --resume names.
    """
    rough, _ = p.parse_known_args(argv)
    p.set_defaults(**presets(rough))
    rough, _ = p.parse_known_args(argv)
    saved = rough.weights
    if rough.resume and not saved and getattr(rough, "ablation", None) != "all":
        saved = Path(rough.out or Path("runs") / run_name(rough)) / "last.pt"
        if not saved.exists():
            raise UserError(f"--resume: no checkpoint at {saved}; start without --resume")
    if saved:
        config = load_checkpoint(saved, method, foreign=True).get("config", {})
        fixed = {"resume", "weights", "translate", "evaluate", "out", "device", "figure"}
        p.set_defaults(**{k: v for k, v in config.items() if k in vars(rough) and k not in fixed})
    args = p.parse_args(argv)
    for name in ("batch", "steps", "epochs", "log_every", "sample_every"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    args.run_folder = args.out or str(Path("runs") / run_name(args))
    return args


def variant(args, name, change):
    """One variant's arguments in --ablation all: --resume goes on where it stopped, if it began."""
    folder = Path(args.run_folder) / name
    return argparse.Namespace(**vars(args) | change | {
        "ablation": name, "run_folder": str(folder),
        "resume": args.resume and (folder / "last.pt").exists()})


# =============================================================================================
# 2. Pictures
# =============================================================================================

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


def open_rgb(path):
    """Any picture Pillow can read -> upright 8-bit RGB `PIL.Image`.

    Grey is repeated over the channels, transparency is laid on white, EXIF rotation is applied.
    16-bit and 32-bit integer grey is divided by 65535; float grey is taken as [0, 1], or as
    [0, 255] if it exceeds 1. Raises `UserError` with the file's name if it cannot be read.
    """
    try:
        with Image.open(path) as im:
            im = ImageOps.exif_transpose(im)
            if im.mode.startswith("I") or im.mode == "F":
                grey = np.asarray(im).astype(np.float64)
                white = 65535 if im.mode != "F" else 255 if grey.max() > 1 else 1
                im = Image.fromarray((grey / white * 255).clip(0, 255).round().astype(np.uint8))
            if im.has_transparency_data:
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            return im.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from None


def open_ids(path, otherwise=""):
    """A map of class or instance ids -> `PIL.Image` of mode L or I; palettes are read as indices.

    Raises `UserError` for a picture of colours (its text ends in `otherwise`, what to do instead),
    or one that cannot be read.
    """
    try:
        with Image.open(path) as im:
            ids, mode = np.asarray(im), im.mode
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from None
    if mode not in ("P", "L", "1") and not mode.startswith("I"):
        raise UserError(f"{path}: expected a map of ids with one channel, found {mode} pixels"
                        + otherwise)
    return Image.fromarray(ids.astype(np.int32 if mode.startswith("I") else np.uint8))


def to_tensor(im):
    """RGB `PIL.Image` -> float tensor (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(im)).permute(2, 0, 1).float() / 127.5 - 1


def to_pil(x):
    """Tensor (3, H, W) in [-1, 1] (clipped if outside) -> RGB `PIL.Image`."""
    x = x.detach().float().cpu().clamp(-1, 1)
    return Image.fromarray(((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def list_pictures(path):
    """Sorted picture files of a folder, or [path] for a file. Raises `UserError` if none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{path}: no pictures in this folder ({', '.join(sorted(SUFFIXES))})")
    return files


def find_split(root, split, side, layout):
    """Pictures of root/trainA (or root/train/A) for split 'train', side 'A'.

    layout: text shown when the folder is missing. Raises `UserError`.
    """
    tried = [Path(root) / f"{split}{side}", Path(root) / split / side]
    for folder in tried:
        if folder.is_dir():
            return list_pictures(folder)
    raise UserError(f"{root}: found neither {tried[0]} nor {tried[1]}; expected {layout}")


def same_size(net, x, multiple):
    """net(x) for x (B, 3, H, W) of any size: padded to a multiple (16 at least), cropped back."""
    h, w = x.shape[2:]
    right, bottom = (max(16, n + -n % multiple) - n for n in (w, h))
    mode = "reflect" if right < w and bottom < h else "replicate"
    return net(F.pad(x, (0, right, 0, bottom), mode=mode))[:, :, :h, :w]


def translate_files(source, out, net):
    """Write net((1, 3, H, W)) of a picture, or of each picture of a folder, to out/NAME.png."""
    files, out = list_pictures(source), Path(out)
    stems = Counter(f.stem for f in files)
    for f in tqdm(files, disable=len(files) == 1):
        name = f.stem if stems[f.stem] == 1 else f.name  # a.jpg and a.png must not collide
        target = out / f"{name}.png"
        if target.resolve() == f.resolve():
            raise UserError(f"--out {out}: {f} would be overwritten, choose another folder")
        picture = to_pil(net(to_tensor(open_rgb(f))[None])[0])
        try:
            out.mkdir(parents=True, exist_ok=True)
            picture.save(target)
        except OSError as error:
            raise UserError(f"--out {out}: cannot write there ({error})") from None
    print(f"{len(files)} translated: {target if len(files) == 1 else out}")


def save_grid(path, columns):
    """Write a labelled PNG: one column per entry of {label: tensor (N, 3, H, W)}, N rows."""
    n, _, h, w = next(iter(columns.values())).shape
    zoom = max(1, 128 // w)  # small pictures are magnified, so that they can be judged
    h, w, bar = h * zoom, w * zoom, 18
    sheet = Image.new("RGB", ((w + 4) * len(columns) + 4, bar + (h + 4) * n + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (label, pictures) in enumerate(columns.items()):
        left = 4 + c * (w + 4)
        draw.text((left, 3), label, fill="black", font=ImageFont.load_default(12))
        for r, picture in enumerate(pictures):
            tile = to_pil(picture).resize((w, h), Image.NEAREST)
            sheet.paste(tile, (left, bar + 2 + r * (h + 4)))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# =============================================================================================
# 3. Data sets
# =============================================================================================

FID_WEIGHTS = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
               "weights-inception-2015-12-05-6726825d.pth")
MIRRORS = ("http://efrosgans.eecs.berkeley.edu/cyclegan/datasets/{}.zip",
           "https://people.eecs.berkeley.edu/~taesung_park/CycleGAN/datasets/{}.zip")
KNOWN = {name: [mirror.format(name) for mirror in MIRRORS] for name in (
    "ae_photos", "apple2orange", "cezanne2photo", "grumpifycat", "horse2zebra",
    "iphone2dslr_flower", "maps", "monet2photo", "summer2winter_yosemite", "ukiyoe2photo",
    "vangogh2photo")}


def find_data(name, layout, draw_toy, root="datasets"):
    """Folder of a data set: 'toy' is drawn, a folder is used, a known name is downloaded once.

    layout: one line that says which files a folder must hold (for the message).
    draw_toy: function that draws the script's toy data set and returns its folder.
    Raises `UserError` that lists the places searched.
    """
    if name == "toy":
        return draw_toy()
    for folder in (Path(name), Path(root) / name):
        if folder.is_dir():
            return folder
    if name in KNOWN:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # torchrun: the first process fetches it
            while not folder.is_dir():
                time.sleep(1)
            return folder
        return download(KNOWN[name], folder)
    raise UserError(f"--data {name}: no such folder (looked for {name} and {folder}); "
                    f"expected {layout}, or one of: toy, {', '.join(KNOWN)}")


def download(urls, folder):
    """Fetch the first zip of `urls` that answers and unpack it into `folder`; returns `folder`.

    The folder appears only when everything was fetched, its CRCs checked and every member found
    to stay inside. Raises `UserError` with the addresses and the folder for doing it by hand.
    """
    errors = []
    for url in urls:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download", dir=folder.parent) as scratch:
                archive = Path(scratch) / "zip"
                with urllib.request.urlopen(url, timeout=30) as answer, open(archive, "wb") as f:
                    total = int(answer.headers.get("Content-Length", 0))
                    with tqdm(desc=url, total=total or None, unit="B", unit_scale=True) as bar:
                        while chunk := answer.read(1 << 20):
                            bar.update(f.write(chunk))
                if total and archive.stat().st_size != total:
                    raise OSError(f"got {archive.stat().st_size} of {total} bytes")
                unzip(archive, Path(scratch) / "files").rename(folder)
            return folder
        except (OSError, HTTPException, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            errors.append(f"{url} ({error})")  # RuntimeError: zipfile's for an encrypted member
    raise UserError(f"cannot download {folder.name}: {'; '.join(errors)}; fetch it by hand and "
                    f"unpack it so that {folder}/trainA exists")


def unzip(archive, folder):
    """Unpack a zip into `folder`; returns it, or the single top folder that most archives have.

    Raises `BadZipFile` for a broken member, and for one that would leave the folder.
    """
    with zipfile.ZipFile(archive) as z:
        for member in z.namelist():
            if not (folder / member).resolve().is_relative_to(folder.resolve()):
                raise zipfile.BadZipFile(f"refused: member {member!r} leaves the folder")
        z.extractall(folder)  # checks every CRC
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


# =============================================================================================
# 4. Blocks and losses shared by several papers
# =============================================================================================


def InstanceNorm(channels):
    """Instance normalisation without parameters, (B, C, H, W) -> same shape (Ulyanov 2016).

    WHY: `nn.InstanceNorm2d` returns wrong input gradients on the CPU (torch 2.13, 2.15) for batch
    1 and a channels-last gradient. One group per channel is the same function, and right.
    """
    return nn.GroupNorm(channels, channels, affine=False)


class BlurDown(nn.Module):
    """Anti-aliased downsampling, (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)) (Zhang 2019).

    Reflection padding, then the filter [1, 2, 1] x [1, 2, 1] / 16 at every second place.
    """

    def __init__(self, channels):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(row, row).repeat(channels, 1, 1, 1),
                             persistent=False)  # (C, 1, 3, 3)

    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.kernel, stride=2, groups=x.shape[1])


class PatchGAN(nn.Module):
    """Discriminator with one logit per overlapping patch (Isola et al. 2017).

    x (B, in_channels, H, W) -> logits (B, 1, H', W'), 30x30 for 256x256; no sigmoid.
    `n_layers` 3 sees 70x70 pixels (84x84 with `antialias`, which downsamples by BlurDown instead
    of stride 2). `norm`: layer of a channel count, or None. `spectral`: spectral normalisation.
    `padding` 2 gives 35x35 logits for 256x256 instead (pix2pixHD, SPADE, pix2pixSC).
    `D(x, features=True)` returns (logits, [activation of each stage before the last]).
    """

    def __init__(self, in_channels=3, ndf=64, n_layers=3, norm=InstanceNorm, spectral=False,
                 antialias=False, padding=1):
        super().__init__()
        wrap = nn.utils.parametrizations.spectral_norm if spectral else (lambda conv: conv)
        widths = [in_channels] + [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        self.stages = nn.ModuleList()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            down = i < n_layers
            self.stages.append(nn.Sequential(
                wrap(nn.Conv2d(a, b, 4, 2 if down and not antialias else 1, padding)),
                *([norm(b)] if i > 0 and norm is not None else []),
                nn.LeakyReLU(0.2, inplace=True),
                *([BlurDown(b)] if down and antialias else [])))
        self.stages.append(wrap(nn.Conv2d(widths[-1], 1, 4, 1, padding)))

    def forward(self, x, features=False):
        activations = []
        for stage in self.stages:
            x = stage(x)
            activations.append(x)
        return (x, activations[:-1]) if features else x


VGG19_WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M",
                512, 512, 512, 512, "M", 512, 512, 512, 512)


class VGG19(nn.Module):
    """Frozen VGG-19 (Simonyan & Zisserman 2015): x (B, 3, H, W) in [-1, 1] -> {tap: activation}.

    taps: names like 'relu4_1'; layers after the last one are not built.
    weights: 'imagenet' (torchvision's, downloaded once), 'random' (seeded, He-initialised: needs
        no download, a much weaker perceptual loss), or a file in torchvision's layout.
    normalise: map [-1, 1] to ImageNet's mean and deviation first; False feeds x as it is.
    ceil_mode: pooling that keeps the last row and column of odd sizes (tiny pictures).
    Raises `UserError` when weights cannot be had. Gradients flow to x, never to the weights.
    """

    def __init__(self, taps, weights="imagenet", normalise=True, ceil_mode=False):
        super().__init__()
        layers, self.names, width, block, conv = [], {}, 3, 1, 1
        for w in VGG19_WIDTHS:
            if w == "M":
                layers.append(nn.MaxPool2d(2, ceil_mode=ceil_mode))
                block, conv = block + 1, 1
            else:
                self.names[len(layers) + 1] = f"relu{block}_{conv}"
                layers += [nn.Conv2d(width, w, 3, padding=1), nn.ReLU(inplace=True)]
                width, conv = w, conv + 1
        unknown = set(taps) - set(self.names.values())
        assert not unknown, f"no such VGG-19 activation: {unknown}"
        self.taps, self.normalise = tuple(taps), normalise
        last = max(i for i, name in self.names.items() if name in self.taps)
        self.features = nn.Sequential(*layers[: last + 1])
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self._fill(weights)
        self.eval().requires_grad_(False)

    def _fill(self, weights):
        if weights == "random":
            rng = torch.Generator().manual_seed(19)
            for conv in self.features:
                if isinstance(conv, nn.Conv2d):
                    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=rng)
                    nn.init.zeros_(conv.bias)
            return
        if weights == "imagenet":
            from torchvision.models import VGG19_Weights

            source = VGG19_Weights.IMAGENET1K_V1
            try:
                state = source.get_state_dict(progress=True, check_hash=True)
            except (OSError, RuntimeError) as error:  # no network, or a wrong hash
                cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(source.url).name
                raise UserError(f"--vgg imagenet: cannot download {source.url} ({error}); put "
                                f"that file at {cache}, or use --vgg FILE or random") from None
        else:
            state = load_file(weights)
            state = state if isinstance(state, dict) else {}
        wanted = {f"features.{k}": v for k, v in self.features.state_dict().items()}
        wrong = [k for k, v in wanted.items() if getattr(state.get(k), "shape", None) != v.shape]
        if wrong:
            raise UserError(f"--vgg {weights}: not VGG-19 weights in torchvision's layout "
                            f"(missing or of another shape: {wrong[0]})")
        self.features.load_state_dict({k.removeprefix("features."): state[k] for k in wanted})

    def forward(self, x):
        if self.normalise:
            x = ((x + 1) / 2 - self.mean) / self.std
        found = {}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if self.names.get(i) in self.taps:
                found[self.names[i]] = x
        return found


def mean_std(x, eps=1e-5):
    """Per picture and channel mean and deviation: (B, C, H, W) -> two of (B, C, 1, 1)."""
    var, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    return mean, (var + eps).sqrt()


def adain(content, mean, std):
    """Adaptive instance normalisation (Huang & Belongie 2017): content (B, C, H, W) takes the
    given mean and deviation, both (B, C, 1, 1)."""
    m, s = mean_std(content)
    return (content - m) / s * std + mean


def full(x):
    """x in float32, if autocast left it in a shorter format: losses are formed in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def lsgan(logits, real):
    """Least-squares GAN loss (Mao et al. 2017): mean (p - 1)^2 if `real`, else mean p^2."""
    return (full(logits) - float(real)).square().mean()


def non_saturating(logits, real):
    """Non-saturating logistic loss (Goodfellow et al. 2014): -log sigmoid(p), or of -p if fake."""
    return F.softplus(-full(logits) if real else full(logits)).mean()


def hinge(logits, real):
    """Hinge loss of a discriminator (Lim & Ye 2017): mean max(0, 1 - p), or 1 + p if fake."""
    return F.relu(1 - full(logits) if real else 1 + full(logits)).mean()


def hinge_generator(logits):
    """The generator's side of `hinge`: -mean p."""
    return -full(logits).mean()


def fid(fakes, reals, device, weights=None):
    """Frechet Inception distance (Heusel et al. 2017) of pictures in [-1, 1], by torchmetrics.

    fakes, reals: iterables of (B, 3, H, W). Protocol: 8-bit RGB, bilinear to 299x299, 2048 pool
    features of the TensorFlow Inception; weights: its file, downloaded once if not given.
    Raises `UserError` when the weights cannot be had.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if weights:
        load_file(weights)  # torch-fidelity would unpickle anything
    device = "cpu" if device.type == "mps" else device  # sums are float64
    try:
        metric = FrechetInceptionDistance(feature_extractor_weights_path=weights).to(device)
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"--evaluate: no Inception weights for FID ({error}); fetch {FID_WEIGHTS} "
                        "by hand and give --fid-weights FILE") from None
    for pictures, real in ((fakes, False), (reals, True)):
        for x in pictures:
            metric.update(((x.clamp(-1, 1) + 1) * 127.5).round().byte().to(device), real=real)
    return float(metric.compute())


def lpips(device, otherwise):
    """LPIPS v0.1 with AlexNet (Zhang et al. 2018), by torchmetrics: distance(a, b) -> float.

    The mean over (B, 3, H, W) in [-1, 1]. Raises `UserError`, which ends in `otherwise` (what to do
    instead), when torchvision's AlexNet cannot be had.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex").to(device)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--evaluate: no AlexNet weights for LPIPS ({error}); "
                        f"{otherwise}") from None
    return lambda a, b: float(metric(a, b))


@torch.no_grad()
def feature_distance(vgg, a, b):
    """LPIPS without its learned weights: squared distance of unit feature vectors, a float.

    The mean over places and pictures of (B, 3, H, W), the sum over vgg's layers.
    """
    total = 0.0
    for one, other in zip(vgg(a).values(), vgg(b).values(), strict=True):
        gap = F.normalize(one, dim=1) - F.normalize(other, dim=1)
        total += float(gap.square().sum(dim=1).mean())
    return total


def init_weights(net, scheme="normal", gain=0.02):
    """Draw all convolutions and linear layers anew: N(0, gain^2), or 'xavier' times gain."""
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            kept = getattr(layer, "parametrizations", None)  # spectral norm: not the quotient
            weight = kept.weight.original if kept else layer.weight
            if scheme == "xavier":
                nn.init.xavier_normal_(weight, gain)
            else:
                nn.init.normal_(weight, 0, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


# =============================================================================================
# 5. Run: the run folder and everything that is not the method
# =============================================================================================


def load_file(path):
    """`torch.load` on the CPU with `weights_only=True`; `UserError` if that is not possible."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a broken file can raise anything
        raise UserError(f"{path}: truncated, or not a file that can be loaded safely "
                        f"({type(error).__name__})") from None


def load_checkpoint(path, method, foreign=False):
    """A checkpoint written by `Run.save`, as a dict; `UserError` if another script wrote it.

    foreign: return {} for a file that none of our scripts wrote, like the authors' weights.
    """
    state = load_file(path)
    if not isinstance(state, dict) or "method" not in state:
        if foreign:
            return {}
        raise UserError(f"{path}: not a checkpoint of {method}.py")
    if state["method"] != method:
        raise UserError(f"{path}: written by {state['method']}.py, not by {method}.py")
    return state


def load_parts(parts, states, path):
    """Fill {name: module or optimiser} from the state dicts of a checkpoint; `UserError`."""
    for name, part in parts.items():
        try:
            part.load_state_dict(states[name])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{path}: {name} does not fit the flags ({reason[:160]})") from None


def pick_device(name=None):
    """`torch.device` of that name, or the first of cuda, mps, cpu that is there; `UserError`."""
    if name is None:
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one GPU per process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, ImportError, RuntimeError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def mix(*numbers):
    """A 63-bit seed that depends on all the numbers, in order."""
    return random.Random(repr(numbers)).getrandbits(63)


def ignore_interrupts(_):
    """Leave Ctrl-C to the main process, which finishes its step with the workers alive."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Run:
    """One training run: device, processes, folder, log, grids, checkpoints, progress.

        run = Run("cut", args)
        run.resume_or_start({"G": G, "opt_G": opt_G})        # what last.pt holds
        for step, batch in run.steps(dataset, total):        # `step` updates are already done
            ...
            run.log({"L_GAN": loss})                         # 0-d tensors
        run.finish(scores)

    All randomness is a function of (seed, step, process): the dataset is asked for sample numbers,
    never drawn from at random; `run.rng()` is a CPU generator equal on all processes; torch's own
    generator is seeded anew each step, differently on each. So a resumed run needs no stored
    generator state and is bit-identical on the CPU to one that never stopped, and N processes see
    what one process with the N-fold batch would see.
    """

    def __init__(self, method, args):
        self.method, self.args, self.step, self.seconds = method, args, 0, 0.0
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(args.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        if self.world > 1 and not dist.is_initialized():  # a second run of one process
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        torch.manual_seed(args.seed)
        self.folder, self.sums, self.stop = Path(args.run_folder), {}, False
        self.config = {k: v for k, v in vars(args).items() if k != "run_folder"}

    # ---- folder, resume ------------------------------------------------------------------

    def resume_or_start(self, parts):
        """Keep `parts` ({name: module or optimiser}) for saving; with --resume, fill them.

        Without --resume a run folder that already holds a run is kept under another name.
        """
        self.parts, last = parts, self.folder / "last.pt"
        if self.args.resume:
            state = load_checkpoint(last, self.method)
            load_parts(parts, state["parts"], last)
            self.step, self.seconds = state["step"], state["seconds"]
            self.sums = state.get("sums", {})
        if self.rank == 0:
            try:
                if last.exists() and not self.args.resume:
                    names = (f"{self.folder.name}.{n}" for n in itertools.count(1))
                    kept = next(k for k in map(self.folder.with_name, names) if not k.exists())
                    self.folder.rename(kept)
                    print(f"the run that was in {self.folder} is kept in {kept}")
                (self.folder / "samples").mkdir(parents=True, exist_ok=True)
                config = json.dumps(self.config, indent=1)
                (self.folder / "config.json").write_text(config + "\n")
                self._trim_log()
            except (OSError, ValueError) as error:  # ValueError: '.' cannot be renamed
                raise UserError(f"--out {self.folder}: cannot write there ({error})") from None
        if self.world > 1:
            dist.barrier()

    def save(self):
        """Write last.pt so that a crash at any moment leaves the old or the new file, whole."""
        self._means()  # raises if the weights may be spoilt
        if self.rank == 0:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            scratch = self.folder / "last.pt.tmp"
            with open(scratch, "wb") as f:
                torch.save({"method": self.method, "config": self.config, "step": self.step,
                            "seconds": self.seconds, "sums": self.sums, "parts": states}, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(scratch, self.folder / "last.pt")
        self.saved = time.perf_counter()

    # ---- the loop ------------------------------------------------------------------------

    def rng(self):
        """CPU `torch.Generator` for this step's choices, the same on every process."""
        return torch.Generator().manual_seed(mix(self.args.seed, self.step))

    def steps(self, dataset, total):
        """Yield (step, batch on the device) for the updates that are left of `total`.

        `dataset[n]` must be the n-th sample of the whole run. Process r of w takes samples
        r * batch ... of each group of w * batch. Ctrl-C saves after the step and exits; last.pt
        is also written with each sample grid, every five minutes, and at the end.
        """
        if self.step >= total:
            print(f"nothing left to do: {self.folder} is at step {self.step} of {total}; "
                  "a larger --steps or --epochs goes on")
            return
        batch, group = self.args.batch, self.args.batch * self.world
        starts = range(self.step * group + self.rank * batch, total * group, group)
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=(range(n, n + batch) for n in starts),
            num_workers=self.args.workers, worker_init_fn=ignore_interrupts,
            pin_memory=self.device.type == "cuda")
        self.bar = tqdm(total=total, initial=self.step, disable=self.rank > 0, unit="step",
                        mininterval=0.2 if sys.stderr.isatty() else 20, dynamic_ncols=True)
        before = signal.signal(signal.SIGINT, self._interrupt)
        self.saved = time.perf_counter()
        start = self.saved - self.seconds
        layouts = {4: torch.channels_last} if self.args.channels_last else {}
        try:
            for tensors in loader:
                torch.manual_seed(mix(self.args.seed, self.step, self.rank))
                yield self.step, [t.to(self.device, non_blocking=True, memory_format=layouts.get(
                    t.dim(), torch.preserve_format)) for t in tensors]
                self.step += 1
                self.bar.update()
                self.seconds = time.perf_counter() - start
                if self.step % self.args.log_every == 0 or self.step == total:
                    self._write_log(group)
                if self.stop or time.perf_counter() - self.saved > 300:
                    self.save()
                if self.stop:
                    self.bar.close()
                    print(f"\nstopped at step {self.step} of {total}; the same command with "
                          "--resume goes on", file=sys.stderr)
                    raise KeyboardInterrupt
        except UserError:  # an unreadable picture, met between two steps: keep the rest
            self.save()
            raise
        finally:
            self.bar.close()
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, *_):
        if self.stop:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.stop = True

    def average_gradients(self, *nets):
        """Mean of the gradients over all processes, in place (call between backward and step)."""
        if self.world == 1:
            return
        grads = [p.grad for net in nets for p in net.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads]) / self.world
        dist.all_reduce(flat)
        for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view_as(g))

    # ---- log, pictures, result ---------------------------------------------------------------

    def log(self, losses):
        """Add one step's losses ({name: 0-d tensor}); kept on the device until a row is due."""
        for name, loss in losses.items():
            total, n = self.sums.get(name, (0, 0))
            self.sums[name] = total + loss.detach(), n + 1

    def _means(self):
        """{name: mean loss since the last row of log.csv}; `UserError` if one is not finite."""
        means = {name: float(total) / n for name, (total, n) in self.sums.items()}
        if bad := [name for name, value in means.items() if not math.isfinite(value)]:
            raise UserError(f"{bad[0]} is not finite at step {self.step}: lower --lr, or leave out "
                            f"--amp; {self.folder / 'last.pt'} is from before")
        return means

    def _write_log(self, group):
        means, self.sums = self._means(), {}
        self.bar.set_postfix_str(
            " ".join(f"{k} {v:.3f}" for k, v in means.items())
            + f" | {self.step * group / self.seconds:.3g} pictures/s", refresh=False)
        if self.rank == 0:
            with open(self.folder / "log.csv", "a") as f:
                if f.tell() == 0:
                    print("step", *means, "seconds", sep=",", file=f)
                values = [f"{value:.6g}" for value in means.values()]
                print(self.step, *values, f"{self.seconds:.2f}", sep=",", file=f)

    def _trim_log(self):
        """After --resume: drop the rows that lie beyond the checkpoint."""
        path = self.folder / "log.csv"
        if path.exists():
            lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
            path.write_text("".join(lines[:1] + [line for line in lines[1:]
                                                 if int(line.split(",")[0]) <= self.step]))

    def save_samples(self, columns):
        """Write samples/step_NNNNNN.png ({label: (N, 3, H, W)}), index.html and last.pt."""
        if self.rank == 0:
            save_grid(self.folder / "samples" / f"step_{self.step:06d}.png", columns)
            self._write_page()
        self.save()

    def _write_page(self):
        """index.html: loss curves as inline SVG and at most 12 grids, all in one file."""
        title = html.escape(self.folder.name)
        parts = [f"<!doctype html><meta charset=utf-8><title>{title}</title><style>body{{font:14px "
                 "sans-serif;margin:2em}img{max-width:100%}svg{border:1px solid #ddd;margin:4px}"
                 f"</style><h1>{title}, step {self.step}</h1>"]
        log = self.folder / "log.csv"
        rows = list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []
        for name in list(rows[0])[1:-1] if rows else ():  # all but step and seconds
            parts.append(svg_curve(name, [(int(r["step"]), float(r[name])) for r in rows]))
        grids = sorted((self.folder / "samples").glob("step_*.png"))
        for i in sorted({round(i * (len(grids) - 1) / 11) for i in range(12)}):
            jpeg = io.BytesIO()
            with Image.open(grids[i]) as im:
                im.thumbnail((900, 1600))
                im.save(jpeg, "JPEG", quality=85)
            code = base64.b64encode(jpeg.getvalue()).decode()
            parts.append(f"<h3>{grids[i].stem}</h3><img src='data:image/jpeg;base64,{code}'>")
        (self.folder / "index.html").write_text("\n".join(parts))

    def finish(self, scores):
        """Write result.json and print the scores beside the trivial answers'.

        scores: [{"name", "value", "better": "higher"|"lower", "trivial": {answer: value}}].
        """
        if self.rank > 0:
            return
        result = {"method": self.method, "data": self.args.data, "steps": self.step,
                  "seconds": round(self.seconds, 1), "scores": scores}
        (self.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        print_scores(scores)
        print(f"{self.step} steps, {self.seconds:.0f} s; pictures and curves: "
              f"{self.folder / 'index.html'}")


def print_scores(scores):
    """One line per score: 'name: value +- sd (lower is better; answer: value, ...)'."""
    for s in scores:
        others = "; ".join(f"{k}: {v:.4g}" for k, v in s.get("trivial", {}).items())
        spread = f" +- {s['sd']:.3g}" if "sd" in s else ""
        print(f"{s['name']}: {s['value']:.4g}{spread} ({s['better']} is better"
              + (f"; {others})" if others else ")"))


def save_ablation(folder, rows):
    """{variant: scores} as a Markdown table in folder/ablation.md, printed too.

    One column per score, the first score's trivial answers below. Nothing where there are none.
    """
    scores = next(iter(rows.values()))
    if not scores:  # no truth outside the toy world
        return
    lines = ["| variant | " + " | ".join(f"{s['name']} ({s['better']})" for s in scores) + " |",
             "|---" * (len(scores) + 1) + "|"]
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(
            f"{s['value']:.3g}" + (f" +- {s['sd']:.2g}" if "sd" in s else "") for s in row) + " |")
    for answer in scores[0].get("trivial", {}):
        values = (s.get("trivial", {}).get(answer) for s in scores)
        lines.append(f"| {answer} | " + " | ".join("" if v is None else f"{v:.3g}"
                                                   for v in values) + " |")
    path = Path(folder) / "ablation.md"
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}:\n\n{path.read_text()}")


def svg_curve(name, points, width=360, height=160):
    """A labelled line of (step, value) points as an <svg> element."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    span_x, span_y = max(xs[-1] - xs[0], 1), max(high - low, 1e-12)
    line = " ".join(f"{10 + (x - xs[0]) / span_x * (width - 20):.1f},"
                    f"{height - 10 - (y - low) / span_y * (height - 40):.1f}"
                    for x, y in points)
    return (f"<svg width={width} height={height}><text x=10 y=18 font-size=13>{html.escape(name)}: "
            f"{ys[-1]:.4g} (from {low:.3g} to {high:.3g})</text><polyline points='{line}' "
            "fill=none stroke=steelblue stroke-width=1.5 /></svg>")
