"""The one module that a method needs beside itself: what several papers share, or none defines.

    1. Blocks     InstanceNorm, BlurDown, PatchGAN, VGG, init_weights
    2. Pictures   open_rgb, open_ids, to_tensor, to_pil, list_pictures, test_pictures, save_grid
    3. Data sets  find_data (a folder, the toy world, or a name: fetched once), shuffled, rate
    4. Flags      UserError, entry, base_parser, parse_flags
    5. Run        device, seeds, torchrun, log.csv, grids, last.pt, resume, Ctrl-C
"""

import argparse
import contextlib
import glob
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageFont
from tqdm import tqdm

# ==== 1. Blocks shared by several papers ======================================================


def full(x):
    """x in float32, if autocast left it in a shorter format: losses are formed in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class InstanceNorm(nn.Module):
    """(x - mean) / sqrt(var + 1e-5) per picture and channel, (B, C, H, W) -> same (Ulyanov 2016).

    WHY two kernels of one function: on the CPU (256 x 64 x 64, one thread), group norm's backward
    pass takes 20 ms on channels-last maps, batch norm's 2.7; on contiguous ones batch norm's
    forward pass takes 4.2 ms, group norm's 1.1. `nn.InstanceNorm2d` itself returns wrong input
    gradients for batch 1 and a channels-last incoming gradient."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        if x.is_contiguous():
            return F.group_norm(x, self.channels)
        return torch.cat([F.batch_norm(one, None, None, training=True) for one in x.split(1)])


class BlurDown(nn.Module):
    """Anti-aliased downsampling, (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)) (Zhang 2019): the
    filter [1, 2, 1] x [1, 2, 1] / 16 at every second place, after reflection padding."""

    def __init__(self, channels):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = torch.outer(row, row).repeat(channels, 1, 1, 1)  # (C, 1, 3, 3)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.kernel, stride=2, groups=x.shape[1])


class PatchGAN(nn.Module):
    """Discriminator with one logit per overlapping patch (Isola et al. 2017); no sigmoid.

    x (B, in_channels, H, W) -> logits (B, 1, H', W'), 30x30 for 256x256, or 35x35 with `padding` 2.
    n_layers: 3 sees 70x70 pixels (84x84 with `antialias`: BlurDown in place of stride 2).
    norm: makes a layer from a channel count, or None.
    D(x, features=True) returns (logits, [activation of each stage before the last])."""

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


class VGG(nn.Module):
    """Frozen VGG (Simonyan & Zisserman 2015): x (B, 3, H, W) in [-1, 1] -> {tap: activation}.

    taps: names like 'relu4_1'. normalise: map [-1, 1] to ImageNet's mean and deviation first.
    weights: 'imagenet' (VGG-19), 'random' (VGG-19, seeded: a much weaker loss), or a FILE of VGG-19
    or VGG-16 in torchvision's layout; `UserError`. ceil_mode: pooling keeps odd borders."""

    def __init__(self, taps, weights="imagenet", normalise=True, ceil_mode=False):
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        state = {} if weights == "random" else vgg_weights(weights)
        depth = 16 if "features.17.weight" in state else 19  # VGG-19 has an activation there
        layers = make_layers(cfgs["D" if depth == 16 else "E"])
        self.taps, self.normalise, self.names, block, conv = tuple(taps), normalise, {}, 1, 0
        rng = torch.Generator().manual_seed(19)
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = ceil_mode
                block, conv = block + 1, 0
            elif isinstance(layer, nn.ReLU):
                conv += 1
                self.names[i] = f"relu{block}_{conv}"
            elif weights == "random":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=rng)
                nn.init.zeros_(layer.bias)
        if unknown := set(taps) - set(self.names.values()):
            raise UserError(f"--vgg {weights}: VGG-{depth} has no activation {min(unknown)}")
        self.features = layers[: max(i for i in self.names if self.names[i] in taps) + 1]
        for key, tensor in self.features.state_dict().items() if weights != "random" else ():
            given = state.get(f"features.{key}")
            if getattr(given, "shape", None) != tensor.shape:
                raise UserError(f"--vgg {weights}: neither VGG-19 nor VGG-16 as torchvision stores "
                                f"it (missing or of another shape: features.{key})")
            tensor.copy_(given)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)  # gradients flow to x, never to the weights

    def forward(self, x):
        if self.normalise:
            x = ((x + 1) / 2 - self.mean) / self.std
        found = {}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if self.names.get(i) in self.taps:
                found[self.names[i]] = x
        return found


def vgg_weights(weights, network="VGG19", flag="--vgg"):
    """The state dict of a file, or torchvision's of that network for 'imagenet'; `UserError`."""
    if weights != "imagenet":
        state = load_file(weights)
        return state if isinstance(state, dict) else {}
    from torchvision import models

    source = getattr(models, f"{network}_Weights").IMAGENET1K_V1
    try:
        return source.get_state_dict(check_hash=True, weights_only=True)
    except Exception as error:  # no network, a wrong hash, or a broken file in the cache
        cache = Path(torch.hub.get_dir(), "checkpoints", Path(source.url).name)
        raise UserError(f"{flag} imagenet: cannot fetch {source.url} ({error}); put that file at "
                        f"{cache}, or use {flag} FILE or random") from None


def init_weights(net, scheme="normal", gain=0.02):
    """Draw all convolutions and linear layers anew: N(0, gain^2), or 'xavier' times gain."""
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            normed = hasattr(layer, "parametrizations")  # spectral norm: not the quotient
            weight = layer.parametrizations.weight.original if normed else layer.weight
            if scheme == "xavier":
                nn.init.xavier_normal_(weight, gain)
            else:
                nn.init.normal_(weight, 0, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


# ==== 2. Pictures =============================================================================

Image.init()
SUFFIXES = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN
            and kind not in ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")}  # named, not decoded
TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
         5: Image.TRANSPOSE, 6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}
GREY, SIDE = None, None  # --range: black and white of more than 8 bits of grey; --side
TRAINED, SAID = math.inf, {}  # the largest side that training resized pictures to; remarks
SHA256 = {  # of archives, its first 80 bits; from TensorFlow Datasets' url_checksums
    "apple2orange": "845a191e9af8926408ea", "cezanne2photo": "3a6c10ca21f9485862f1",
    "horse2zebra": "a74d9d392eecca9966b5", "iphone2dslr_flower": "8fcb5e374d631b107e1d",
    "maps": "639534f69dbf9f36bef8", "monet2photo": "88f91b00fc228f97c941",
    "summer2winter_yosemite": "167fe1726807a9d22bd1", "ukiyoe2photo": "02a2a2fb5ecf425ca1bf",
    "vangogh2photo": "362c3473e70be0944bda"}
UNPAIRED = "trainA/ trainB/ (and testA/ testB/) with pictures, or train/A train/B test/A test/B"


def remark(kind, text, most=1):
    """Print a text once, and no more than `most` of its kind."""
    said = SAID.setdefault(kind, set())
    if text not in said and len(said) < most:
        said.add(text)
        print(text, file=sys.stderr)


def opened(path, size_only=False):
    """A picture file as an upright `PIL.Image`, or the (width, height) that it has when upright,
    which needs no decoding; `UserError` with its name if that fails."""
    try:
        with open(path, "rb") as file, Image.open(file) as im:  # by its path a grey TIFF garbles
            turn, kind, few = None, im.format, re.search(r"L;([24])\b", str(im.tile))
            if kind != "MPO" and getattr(im, "n_frames", 1) > 1:  # MPO: two in a phone's photo
                remark("pages", f"{path}: the first of {im.n_frames} pages is taken", most=5)
            if kind == "TIFF":
                im.load()  # which turns it, so that its tag is gone
            with contextlib.suppress(Exception):  # damaged EXIF spoils no pixel
                turn = Image.Image.getexif(im).get(274)  # how it was held; PNG's own decodes
            if size_only:
                return im.size[::-1] if turn in (5, 6, 7, 8) else im.size
            im.load()
            im = im.transpose(TURNS[turn]) if turn in TURNS else im
            im.format = kind
            im.info["stretch"] = 255 // (2 ** int(few[1]) - 1) if few else 1  # Pillow's, to 255
            return im
    except Exception as error:  # Pillow's readers raise a dozen types
        raise UserError(f"{path}: no such file" if isinstance(error, FileNotFoundError) else
                        f"{path}: not a readable picture ({error})") from None


def open_rgb(path):
    """Any picture Pillow can read -> upright 8-bit sRGB `PIL.Image`, on white where transparent:
    .info["alpha"]. Of more than 8 bits of grey, --range is black and white, or else 0 and, for
    integers, 65535, for floats 1, or 255 if any exceeds 1; not-a-number is black."""
    im = opened(path)
    if im.mode[0] in "IF":
        grey = np.asarray(im).astype(np.float64)
        known = grey[np.isfinite(grey)] if np.isfinite(grey).any() else np.zeros(1)
        low, high = known.min(), known.max()
        black, white = GREY or (0, 65535 if im.mode[0] == "I" else 255 if high > 1 else 1)
        grey = np.nan_to_num((grey - black) / (white - black) * 255).clip(0, 255).round()
        if len(np.unique(grey)) < 64 or ((grey > 0) & (grey < 255)).mean() < 0.5:
            remark("grey", f"{path}: values from {low:g} to {high:g}, shown from {black:g} to "
                           f"{white:g}; --range LOW HIGH sets that for all", most=5)
        im = Image.fromarray(grey.astype(np.uint8))
    if im.has_transparency_data or im.mode == "P":  # while its palette and key colour are known
        im = im.convert("RGBA" if im.has_transparency_data else "RGB")
    if im.mode in ("RGB", "RGBA", "CMYK") and "icc_profile" in im.info:  # Adobe RGB, Display P3
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile says nothing
            profile = ImageCms.ImageCmsProfile(io.BytesIO(im.info["icc_profile"]))
            if "sRGB" not in ImageCms.getProfileDescription(profile):
                im = ImageCms.profileToProfile(im, profile, ImageCms.createProfile("sRGB"),
                                               outputMode=im.mode.replace("CMYK", "RGB"))
    if im.mode != "RGBA":
        return im.convert("RGB")
    rgb = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im).convert("RGB")
    rgb.info = {"alpha": im.getchannel("A")}
    return rgb


def open_ids(path, hint="", of=None):
    """A map of ids (a palette's are its indices) -> `PIL.Image`, mode L or I. hint: at colours; of:
    the picture whose size, seen upright, it must have."""
    im = opened(path)
    w, h = opened(of, size_only=True) if of else im.size
    lossy = {"JPEG", "MPO", "JPEG2000", "AVIF"} & {
        im.format, str(im.info.get("compression")).upper()}  # a TIFF's
    expect(not lossy, f"{path}: {' '.join(lossy)} changes ids, save label maps as PNG")
    expect(im.mode in ("P", "L", "1") or im.mode[0] == "I",
           f"{path}: expected a map of ids with one channel, found {im.mode} pixels{hint}")
    expect(im.size == (w, h), f"{path}: {im.width}x{im.height} pixels, but {of} has {w}x{h}")
    ids = np.asarray(im) // im.info["stretch"]
    return Image.fromarray(ids.astype(np.int32 if im.mode[0] == "I" else np.uint8))


def to_tensor(im):
    """RGB `PIL.Image` -> float tensor (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(im)).permute(2, 0, 1).float() / 127.5 - 1


def to_pil(x):
    """Tensor (3, H, W) in [-1, 1] (clipped if outside) -> RGB `PIL.Image`."""
    x = x.detach().float().cpu().clamp(-1, 1)
    return Image.fromarray(((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def list_pictures(path, below=False, suffixes=SUFFIXES):
    """Sorted picture files of a folder (below: and of those in it), or [path] for a file, less
    names that begin with a dot or end otherwise (one line counts these); `UserError` if none."""
    path = Path(path)
    if path.is_file():
        return [path]
    expect(path.is_dir(), f"{path}: no such file or folder")
    every = sorted(f for name in glob.iglob("**" if below else "*", root_dir=path, recursive=below)
                   if (f := path / name).is_file())  # glob follows links and skips .names
    files = [f for f in every if f.suffix.lower() in suffixes]
    kinds = "PNG, JPEG or what Pillow reads" if len(suffixes) > 9 else ", ".join(suffixes)
    if others := Counter(f.suffix or f.name for f in every if f.suffix.lower() not in suffixes):
        remark(path, f"{path}: left out " + ", ".join(f"{n} {s}" for s, n in others.items()))
    expect(files, f"{path}: no pictures in this folder ({kinds})")
    return files


def by_name(files, root=None):
    """{name without suffix, or path below root: file}; `UserError` if two files have one name."""
    named = {}
    for f in files:
        key = f.relative_to(root).with_suffix("").as_posix() if root else f.stem
        expect(named.setdefault(key, f) == f, f"{f} and {named[key]}: two files of one name")
    return named


def find_split(root, split, side):
    """Pictures of root/trainA or root/train/A (split 'train', side 'A'); `UserError`."""
    tried = [Path(root, f"{split}{side}"), Path(root, split, side)]
    found = next(filter(Path.is_dir, tried), None)
    expect(found, f"{root}: found neither {tried[0]} nor {tried[1]}; expected {UNPAIRED}")
    return list_pictures(found)


def trained_scale(size):
    """A (width, height), or what training made of it: a phone's photo would fill the memory."""
    return tuple(max(1, round(n * min(1, TRAINED / min(size)))) for n in size)


def test_pictures(root, args, device, limit=None, square=False, fit=trained_scale):
    """{'x': (N, 3, H, W), 'y': ...} of the split --split, on the device; of training pictures, and
    a line says so, where there is no test split. limit: that many, evenly spaced. square: resized
    to --size x --size, as papers evaluate, else to what fit makes of the first one's size."""
    found = {}
    for name, side in zip("xy", "AB" if args.direction == "AtoB" else "BA", strict=True):
        split = args.split
        if split == "test" and not any(Path(root, f"test{s}{side}").is_dir() for s in ("", "/")):
            print(f"{root} has no test pictures {side}: these are training pictures")
            split = "train"
        files = find_split(root, split, side)
        n = min(limit or len(files), len(files))  # neighbours are often video frames
        size = (args.size, args.size) if square else fit(opened(files[0], size_only=True))
        found[name] = torch.stack([to_tensor(open_rgb(files[i * len(files) // n]).resize(
            size, Image.BICUBIC)) for i in range(n)]).to(device)
    return found


def same_size(net, x, multiple):
    """net(x) for x (B, 3, H, W) of any size: padded to a multiple (16 at least), cropped back."""
    h, w = x.shape[2:]
    right, bottom = (max(16, n + -n % multiple) - n for n in (w, h))
    mode = "reflect" if right < w and bottom < h else "replicate"
    return net(F.pad(x, (0, right, 0, bottom), mode=mode))[:, :, :h, :w]


def at_side(size, path):
    """(width, height) at which a picture of that size is translated: its own, or by --side."""
    if not SIDE and min(size) > 2 * TRAINED:
        remark("side", f"{path}: more than twice the scale of the training; --side {TRAINED} is it")
    return tuple(max(1, round(n * (SIDE or min(size)) / min(size))) for n in size)


def translate_files(source, out, net, keep=(), alpha=True):
    """Write net((1, 3, H, W)) of a picture, or of each of a folder, to out/NAME.png, transparent
    where that was. With --side it sees them smaller; what it gives (or several abreast) grows back.
    """
    def paint(path):
        im = open_rgb(path)
        w, h = at_side(im.size, path)
        y = to_pil(net(to_tensor(im.resize((w, h), Image.BICUBIC))[None])[0])
        y = y.resize((y.width // w * im.width, im.height), Image.BICUBIC)
        if alpha and (a := im.info.get("alpha")) and a.getextrema()[0] < 255:
            y.putalpha(Image.fromarray(np.tile(a, y.width // im.width)))
        return y

    paint_files(list_pictures(source), out, paint, keep)


def paint_files(files, out, paint, keep=()):
    """Write paint(file), a `PIL.Image`, of each file to out/NAME.png, which is none of `files` and
    `keep`; what cannot be read or painted (`UserError`) is raised when the others are done."""
    out, stems, errors = Path(out), Counter(f.stem.lower() for f in files), []
    targets = [out / f"{f.stem if stems[f.stem.lower()] == 1 else f.name}.png" for f in files]
    if len({str(target).lower() for target in targets}) < len(files):  # a.jpg, a.png, a.jpg.png
        targets = [out / f"{f.name}.png" for f in files]
    sources = {str(Path(f).resolve()).lower() for f in (*files, *keep)}  # macOS: a.PNG is a.png
    for target in targets:  # before the first is written
        expect(str(target.resolve()).lower() not in sources,
               f"--out {out}: {target} would be overwritten")
    for f, target in zip(tqdm(files, disable=len(files) == 1), targets, strict=True):
        try:
            picture = paint(f)
        except UserError as error:
            errors.append(error)
            continue
        write_whole(target, partial(picture.save, format="PNG"))
    if len(files) > len(errors):
        print(f"{len(files) - len(errors)} translated: {target if len(files) == 1 else out}")
    if errors:
        raise UserError(f"{len(errors)} of {len(files)} not translated: {errors[0]}")


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
        for r, x in enumerate(pictures):
            sheet.paste(to_pil(x).resize((w, h), Image.NEAREST), (left, bar + 2 + r * (h + 4)))
    write_whole(path, partial(sheet.save, format="PNG"))


def write_whole(path, content):
    """Write a text, or what the function content(file) writes: a crash leaves the old file or the
    new one, never half of it; `UserError` if the disk is full or the folder cannot be written."""
    scratch = Path(f"{path}.tmp")
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "wb") as f:
            if isinstance(content, str):
                f.write(content.encode(errors="surrogateescape"))  # names of any bytes
            else:
                content(f)
            f.flush()
            os.fsync(f.fileno())
        for wait in (0.1, 1, None):  # Windows: a virus scanner may hold either for a moment
            try:
                os.replace(scratch, path)
                break
            except PermissionError:
                if wait is None:
                    raise
                time.sleep(wait)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        raise UserError(f"--out {scratch.parent}: cannot write there ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


# ==== 3. Data sets ============================================================================


def lab(module, user):
    """The module lab.NAME, which only the whole repository has; `UserError` if it is not there."""
    try:
        return importlib.import_module(f"lab.{module}")
    except ModuleNotFoundError as error:
        if error.name in ("lab", f"lab.{module}"):
            raise UserError(f"{user} needs the folder lab/ of the repository") from None
        raise UserError(f"{user} needs {error.name}: pip install -r lab/requirements.txt") from None


def find_data(name, layout, known, draw_toy, root="datasets"):
    """Folder of a data set: 'toy' is drawn by draw_toy(), a folder is used, a name that is known,
    {name: (address of a zip or tar.gz, ...)}, is fetched once; `UserError` with the layout."""
    if name == "toy":
        try:
            return draw_toy()
        except ValueError as error:  # files that are not ours, where it would draw
            raise UserError(f"--data toy: {error}") from None
    for folder in (Path(name), Path(root, name)):
        if folder.is_dir() and (name not in known or has_pictures(folder)):
            return folder
    expect(name in known, f"--data {name}: no such folder (looked for {name} and {folder}); "
                          f"expected {layout}, or one of: {', '.join(['toy', *known])}")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        return download(known[name], folder)
    while not has_pictures(folder):  # torchrun: the first process of a machine fetches it
        time.sleep(1)
    return folder


def has_pictures(folder):
    """Whether a picture lies anywhere below the folder."""
    return any(Path(name).suffix.lower() in SUFFIXES
               for name in glob.iglob("**", root_dir=folder, recursive=True))


def set_aside(path):
    """Give a file or folder another name, NAME.1 or the first that is free, and say so."""
    names = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    try:
        kept = path.rename(next(name for name in names if not name.exists()))
    except OSError as error:  # a mount point
        raise UserError(f"{path}: cannot be kept under another name ({error}); --resume goes on, "
                        "or give another --out") from None
    print(f"what was in {path} is kept in {kept}")


def download(addresses, folder):
    """Fetch the first archive that answers, https before http, and unpack it into `folder`, less a
    single top folder; returns that once all members are there and their checksums right, or a
    `UserError` names the addresses, for doing it by hand."""
    errors, secure = [], [re.sub("^http:", "https:", address) for address in addresses]
    for address in dict.fromkeys((*secure, *addresses)):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for left in folder.parent.glob(".download*"):  # of a killed process
                if time.time() - left.stat().st_mtime > 86400:
                    shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".download", dir=folder.parent) as scratch:
                archive, files = Path(scratch, Path(address).name), Path(scratch, "files")
                known, zipped = SHA256.get(archive.stem), archive.suffix == ".zip"
                print(f"fetching {address}" + ", of which no checksum is known" * (not known))
                torch.hub.download_url_to_file(address, str(archive), hash_prefix=known)
                sizes = ([m.file_size for m in zipfile.ZipFile(archive).infolist()] if zipped
                         else [m.size for m in tarfile.open(archive)])
                if sum(sizes) > 100 * archive.stat().st_size + 2**20:  # pictures hardly shrink
                    raise OSError(f"would unpack to {sum(sizes)} bytes")
                shutil.unpack_archive(archive, files, filter=None if zipped else "data")  # no links
                if not has_pictures(files):
                    raise OSError("no pictures in it")
                top, *others = files.iterdir()
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if empty: Windows renames onto no folder
                return (files if others or not top.is_dir() else top).rename(folder)
        except Exception as error:  # network, disk and three archive libraries: a dozen types
            if has_pictures(folder):  # another run, or another machine, was faster
                return folder
            errors.append(f"{address} ({' '.join(str(error).split()) or type(error).__name__})")
    raise UserError(f"cannot fetch {folder.name}: {'; '.join(errors)}; fetch it by hand and unpack "
                    f"it as {folder}")


@lru_cache(maxsize=4)
def shuffled(n, seed):
    """A permutation of range(n) that depends on the seed alone."""
    return random.Random(seed).sample(range(n), n)


def rate(step, total, decay_from):
    """Learning-rate factor: 1, then from decay_from * total on linearly towards 0."""
    constant = int(decay_from * total)
    return 1.0 if step < constant else (total - step) / (total - constant + 1)


# ==== 4. Flags and errors =====================================================================


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit code 2, no traceback."""


def expect(fine, message):
    """`UserError` with that message unless it is fine."""
    if not fine:
        raise UserError(message)


def entry(main):
    """Run `main()`; a user's mistake or full memory is one line and exit code 2, Ctrl-C 130."""
    try:
        with contextlib.suppress(AttributeError):  # no console, or a notebook's
            sys.stdout.reconfigure(errors="backslashreplace")  # Windows: names beyond cp1252
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:  # a data-loader worker wraps it in a traceback: keep the last line
        lines = str(error).strip().splitlines()
        lines = lines[-1:] if "Traceback" in str(error) else lines
        message = " ".join(lines).removeprefix("common.UserError: ")
        time.sleep(9 * (os.environ.get("RANK", "0") != "0"))  # torchrun: the first one says it
    except BrokenPipeError:  # who read the output is gone, as after `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:  # CUDA, MPS and the CPU say it each in its way
        lost = dist.is_initialized() and re.search("peer|Connection|NCCL", str(error))
        if not lost and not re.search("of memory|enough memory|ate memory|MemoryE", repr(error)):
            raise
        message = ("another process of this run has ended; --resume goes on" if lost else
                   "out of memory: lower --size, --batch or, to translate, --side, or add --amp")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


COUNTS = """batch steps epochs size side height load ngf ndf tile d_layers patches bank hidden z
    texture structure log_every sample_every objects crops styles style_dim dis_layers
    dis_scales decay_every pretrain g_updates task_batch task_steps task_load
    feature_steps""".split()
LIMITS = dict.fromkeys(COUNTS, (1, 10**8)) | dict.fromkeys(("beta1", "beta2"), (0, 0.9999)) | {
    "seed": (0, 2**63 - 1), "workers": (0, 256), "decay_from": (0, 1), "eta": (0, 1),
    "downs": (0, 16), "tau": (1e-6, 1e6), "range": (-1e9, 1e9), "alpha": (-1e9, 1e9)}


def check_numbers(p, args):
    """`UserError` if a number is not finite, negative, or 0 where it counts something."""
    for action in p._actions:
        given, flag = getattr(args, action.dest, None), action.option_strings[0]
        low, high = LIMITS.get(action.dest, (0, 1e9))
        for value in given if isinstance(given, (list, tuple)) else [given]:
            expect(type(value) not in (int, float) or low <= value <= high,
                   f"{flag} {value}: expected a number from {low:g} to {high:g}")


def base_parser(doc):
    """ArgumentParser with the flags that every script spells alike; `doc` is its docstring."""
    p = argparse.ArgumentParser(  # no usage: an error is one line
        description=doc.strip().split("\n\n")[0], allow_abbrev=False, usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--data", default="toy", help="'toy', a folder, or a known data set's name",
        type=lambda name: name if Path(name).name else os.path.abspath(name))  # "." has none
    add("--out", help="run folder (runs/METHOD-DATA if not given), or that of translated pictures")
    add("--seed", type=int, default=0, help="seed of weights, data order and sampling")
    add("--device", help="cuda, mps or cpu (the first of these that is there)")
    add("--workers", type=int, default=4, help="processes that read pictures")
    add("--amp", action=switch, default=False, help="bfloat16 autocast; losses stay float32")
    add("--compile", action=switch, default=False, help="torch.compile the networks")
    add("--channels-last", action=switch, help="NHWC memory (a GPU: yes; CPU: where faster)")
    add("--resume", action=switch, default=False, help="continue the run folder's last.pt")
    add("--weights", metavar="FILE", help="our last.pt or the authors' file, not to train")
    add("--translate", metavar="PATH", help="translate a picture or a folder of them")
    add("--side", type=int, metavar="N", help="translate as if the short side had N pixels")
    add("--evaluate", action=switch, default=False, help="compute the paper's metric")
    add("--split", choices=["test", "val"], default="test", help="pictures that are scored")
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="deep greys' black and white")
    add("--log-every", type=int, default=20, help="steps between rows of log.csv")
    add("--sample-every", type=int, default=1000, help="steps between sample grids")
    return p


def parse_flags(p, argv, method, presets, run_name, channels_last=True):
    """Parse in layers: paper defaults < presets(args) < saved configuration < command line.

    presets: args -> {flag: default}. The saved configuration is that of --weights or --resume.
    run_name: args -> 'METHOD-DATA'. channels_last: whether it is faster on the CPU (lab.bench)."""
    argv, words, config = sys.argv[1:] if argv is None else argv, [], {}
    rough = p.parse_known_args(argv)[0]
    saved, folder = rough.weights, Path(rough.out or Path("runs", run_name(rough)))
    if rough.resume and not saved:
        saved = folder / "last.pt"
        expect(saved.exists(), f"--resume: no checkpoint at {saved}; start without --resume")
    expect(not rough.resume or Path(saved).parent.resolve().is_relative_to(folder.resolve()),
           "--weights: --resume goes on from the run folder's own last.pt")
    if saved:
        config = load_checkpoint(saved, method, foreign=True).get("config", {})
        words = saved_flags(p, config, saved, own=rough.resume)
    preset = presets(p.parse_known_args([*words, *argv])[0])  # that of the saved --data
    preset = {name: value for name, value in preset.items() if value != p.get_default(name)}
    p.set_defaults(**preset)
    args = p.parse_args([*words, *argv])
    flags = {word.partition("=")[0] for word in argv}
    if "--epochs" in flags and "--steps" not in flags:
        args.steps = None  # the toy preset's, or the checkpoint's
    check_numbers(p, args)
    trains = args.resume or not (args.translate or args.evaluate or args.weights)
    if preset and trains and os.environ.get("RANK", "0") == "0":
        toy = " for toy data, not the paper's" * (args.data.split("-")[0] == "toy")
        print(f"settings{toy}: "
              + ", ".join(f"{name} {getattr(args, name)}" for name in preset))
    low, high = args.range or (0, 1)
    expect(low < high, f"--range {low:g} {high:g}: a smaller and a larger value")
    trained = max(np.max(vars(args).get(name) or 0) for name in ("size", "load", "scale"))
    trained = trained if config or not saved else math.inf  # not known of the authors' files
    globals().update(GREY=args.range, SIDE=args.side, TRAINED=trained)
    if args.channels_last is None:
        args.channels_last = channels_last or pick_device(args.device).type != "cpu"
    args.run_folder = args.out or str(Path("runs", run_name(args)))
    return args


def saved_flags(p, config, source, own):
    """The flags of a checkpoint that shape networks and data, as words for the parser, which has
    tried them; own: of the run itself, which scores what it scored, and whose paths are trusted."""
    fixed, words = {"help", "resume", "weights", "translate", "side", "evaluate", "out", "device",
                    "workers", "compile", "channels_last", *["split"] * (not own)}, []
    for action in p._actions:
        value, flag = config.get(action.dest), action.option_strings
        if action.dest in fixed or value is None or (
                re.match("FILE|PATH|FOLDER|DIR", str(action.metavar)) and not own):
            continue
        items = value if isinstance(value, (list, tuple)) else ()
        expect(not any(isinstance(item, str) and item[:1] == "-" for item in items),
               f"{source}: its flags: {flag[0]} {value}"[:200])
        words += ([flag[-(value is False)]] if isinstance(value, bool) else
                  [flag[0], *map(str, value)] if isinstance(value, (list, tuple)) else
                  [f"{flag[0]}={value}"])
    p.error = lambda message: expect(False, f"{source}: its flags: {message}"[:200])
    p.parse_args(words)
    del p.error
    return words


# ==== 5. Run: the run folder and everything that is not the method ============================


def load_file(path):
    """`torch.load` on the CPU with `weights_only=True`; `UserError` if that is not possible."""
    try:
        bomb = zipfile.is_zipfile(path) and 2 * os.path.getsize(path) + 2**20 < sum(
            member.file_size for member in zipfile.ZipFile(path).infolist())
        state = None if bomb else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a broken file can raise anything
        hint = "; safetensors: convert it with torch.save" * (Path(path).suffix == ".safetensors")
        raise UserError(f"{path}: truncated, or not a file that can be loaded safely "
                        f"({type(error).__name__}{hint})") from None
    expect(not bomb, f"{path}: a compressed archive, not a file that torch.save wrote")
    if isinstance(state, dict):  # as training frameworks, DataParallel and torch.compile wrap it
        inner = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
        state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key) if isinstance(key, str) else key: v
                 for key, v in inner.items()}
        expect("method" in state or finite(state), f"{path}: holds numbers that are not finite")
    return state


def load_checkpoint(path, method, foreign=False):
    """A checkpoint written by `Run.save`, as a dict; `UserError` if another script wrote it, or
    none of ours did, like the authors' weights (foreign: then {})."""
    state = load_file(path)
    if not isinstance(state, dict) or "method" not in state:
        expect(foreign, f"{path}: not a checkpoint of {method}.py")
        return {}
    writer = state["method"]
    expect(writer == method, f"{path}: written by {writer}.py, not by {method}.py")
    for name, kind in {"config": dict, "parts": dict, "step": int, "seconds": float,
                       "sums": dict}.items():
        expect(isinstance(state.get(name), kind),
               f"{path}: damaged, its {name!r} is no {kind.__name__}")
    return state


def finite(state):
    """Whether all numbers of a state dict are finite, however deep they lie."""
    if torch.is_tensor(state):
        return not state.is_floating_point() or bool(state.isfinite().all())
    inner = state.values() if isinstance(state, dict) else state
    return not isinstance(state, (dict, list, tuple)) or all(map(finite, inner))


def load_parts(parts, states, path, others=(), rank=0):
    """Fill {name: module or optimiser} from state dicts (others: later processes'); `UserError`."""
    for name, part in parts.items():
        try:
            own = others[rank - 1].get(name, {}) if 0 < rank <= len(others) else {}
            state = states[name] | own if own else states[name]
            if isinstance(part, torch.optim.Optimizer):  # a file does not choose the rates
                groups = zip(part.state_dict()["param_groups"], state["param_groups"], strict=True)
                state = {"state": state["state"],
                         "param_groups": [mine | {"params": its["params"]} for mine, its in groups]}
            expect(finite(state), f"{path}: {name} holds numbers that are not finite")
            part.load_state_dict(state)
            for p, held in getattr(part, "state", {}).items():  # of an optimiser
                for key, t in held.items():
                    if t.shape != (() if key == "step" else p.shape):  # torch does not look
                        raise ValueError(f"{key} has the shape {tuple(t.shape)}")
                    if key != "step":  # WHY: fused Adam reads raw memory, in the order of p's
                        held[key] = torch.empty_like(p).copy_(t)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{path}: {name} does not fit the flags ({reason[:160]})") from None


def pick_device(name=None):
    """`torch.device` of that name, or the GPU if there is one, or the CPU; `UserError`."""
    name = str(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one GPU per process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, ImportError, RuntimeError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def mix(*numbers):
    """A 63-bit seed that depends on all the numbers, in order."""
    return random.Random(repr(numbers)).getrandbits(63)


STOPS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
OWN_FILES = {"lock", "config.json", "log.csv", "samples", "last.pt", "index.html", "result.json"}


def start_worker(grey, _):
    """Leave Ctrl-C to the main process, which finishes its step with the workers alive."""
    globals()["GREY"] = grey
    for stop in {*STOPS} - {signal.SIGTERM}:  # by which the main process ends a worker
        signal.signal(stop, signal.SIG_IGN)


def locked(folder):
    """An open file that no other process can lock before this one ends; `UserError` if one has."""
    file = open(folder / "lock", "a")  # a file of that name that is not ours stays as it is
    try:
        if os.name == "nt":
            msvcrt = importlib.import_module("msvcrt")
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            os.lockf(file.fileno(), os.F_TLOCK, 0)
    except (BlockingIOError, PermissionError):
        raise UserError(f"--out {folder}: another run is writing there") from None
    except OSError as error:  # a file system without locks, as some Lustre and FUSE
        remark("lock", f"{folder}: cannot be locked ({error}); start no second run there")
    return file


class Run:
    """One training run.

        run = Run("cut", args, chance={"D": 0.25})           # chance: what a coin would get
        run.resume_or_start({"G": G, "opt_G": opt_G})        # what last.pt holds
        for step, batch in run.steps(dataset, total):        # `step` updates are already done
            run.log({"L_GAN": loss})                         # 0-d tensors
        run.finish(scores)

    A resumed run ends, on the CPU, bit-identical to one that never stopped: all randomness is a
    function of (seed, step, process). `run.rng()` is equal on all processes, torch's own generator
    not. Under torchrun every optimiser steps on the mean of all processes' gradients, as one with
    the N-fold batch would, wherever the loss is a mean over independent pictures. History buffers,
    memory banks and statistics are each process's own, and last.pt holds them all."""

    def __init__(self, method, args, chance=None):
        self.method, self.args, self.chance = method, args, chance or {}
        self.folder, self.device = Path(args.run_folder), pick_device(args.device)
        self.step, self.seconds, self.sums, self.stop, self.head = 0, 0.0, {}, False, ""
        self.config = {k: v for k, v in vars(args).items() if k != "run_folder"}
        expect(args.resume or not getattr(args, "weights", None), "--weights: read by --translate "
               "and --evaluate; a training starts anew, or goes on with --resume")
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        if self.world > 1:
            if not dist.is_initialized():  # else it is a second run of one process
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.hosts = dist.new_group(backend="gloo")  # words among CPUs, no GPU waits for them
        torch.manual_seed(args.seed)

    def resume_or_start(self, parts):
        """Keep `parts` ({name: module or optimiser}) for saving; with --resume, fill them; without,
        a run that the folder already holds is kept under another name."""
        self.parts, last = parts, self.folder / "last.pt"
        for part in parts.values():
            if isinstance(part, torch.optim.Optimizer) and self.world > 1:
                part.register_step_pre_hook(self._average_gradients)
        if self.args.resume:
            state = load_checkpoint(last, self.method)
            load_parts(parts | {"run": self}, state["parts"] | {"run": state}, last,
                       state.get("others", []), self.rank)
        if self.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                others = {f.name.removesuffix(".tmp") for f in self.folder.glob("[!.]*")}
                others -= OWN_FILES if "lock" in others else set()  # what a run makes first
                expect(last.exists() or not others, f"--out {self.folder}: holds files that are "
                       f"not a run's ({', '.join(sorted(others))[:60]})")
                self.lock = locked(self.folder)
                if last.exists() and not self.args.resume:
                    if os.name == "nt":  # renames no folder with an open file
                        self.lock.close()
                    set_aside(self.folder)  # its lock moves along and is held until the next is
                    self.folder.mkdir()
                    self.lock = locked(self.folder)
                for half in self.folder.rglob("*.tmp"):  # of a process that was killed
                    if half.stem in OWN_FILES or half.stem[:5] == "step_":
                        half.unlink()
                write_whole(self.folder / "config.json", json.dumps(self.config, indent=1) + "\n")
                if (log := self.folder / "log.csv").exists():  # drop what the checkpoint lacks
                    rows = log.read_text(encoding="utf-8").splitlines(True)
                    self.head = rows[0].strip() if rows else ""
                    write_whole(log, "".join(rows[:1] + [
                        row for row in rows[1:] if row[-1] == "\n"
                        and (n := re.match(r"\d+(?=,)", row)) and int(n[0]) <= self.step]))
            except (OSError, ValueError) as error:  # ValueError: '.' cannot be renamed
                raise UserError(f"--out {self.folder}: cannot write there ({error})") from None
        if self.world > 1:
            dist.barrier()

    def _average_gradients(self, optimiser, *_):
        """Before a step: the mean over all processes of the gradients it is about to use."""
        params = [p for group in optimiser.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads]) / self.world
        dist.all_reduce(flat)
        for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view_as(g))

    def _expect_finite(self, name, finite):
        expect(finite, f"{name} is not finite at step {self.step}: lower --lr, or leave out --amp; "
                       f"{self.folder / 'last.pt'} is from before")

    def save(self):
        """Write last.pt, all processes together; `UserError`, and the old one stays, if the weights
        are spoilt."""
        self._means()
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        own = {"run": {"sums": self.sums}}
        for name, part in self.parts.items():
            shared = dict(part.named_parameters()) if isinstance(part, nn.Module) else {}
            self._expect_finite(name, finite(parts[name]))
            if not isinstance(part, torch.optim.Optimizer):
                own[name] = {k: v for k, v in parts[name].items() if k not in shared}
        others = self._gathered(own)[1:]
        if self.rank == 0:
            write_whole(self.folder / "last.pt", partial(torch.save, {
                "method": self.method, "config": self.config, "chance": self.chance,
                "step": self.step, "seconds": self.seconds, "sums": self.sums, "parts": parts,
                "others": others}))
        self.saved = time.perf_counter()

    def load_state_dict(self, state):
        """Go on where a last.pt, or this process's share of one, was written; see load_parts."""
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.sums = {str(k): (float(total), int(n)) for k, (total, n) in state["sums"].items()}

    def _gathered(self, mine):
        """What the processes give, as a list on every one of them, on the CPU."""
        if self.world == 1:
            return [mine]
        torch.save(mine, file := io.BytesIO())
        dist.all_gather_object(every := [None] * self.world, file.getvalue(), self.hosts)
        return [torch.load(io.BytesIO(given), "cpu", weights_only=True) for given in every]

    def rng(self):
        """CPU `torch.Generator` for this step's choices, the same on every process."""
        return torch.Generator().manual_seed(mix(self.args.seed, self.step))

    def steps(self, dataset, total):
        """Yield (step, batch on the device) for the updates that are left of `total`.

        `dataset[n]` is the n-th sample of the run; process r of w takes samples r * batch ... of
        each group of w * batch. last.pt is written with each grid, every five minutes, at the end,
        after Ctrl-C (SIGTERM, SIGHUP), and before an error that is not the step's own."""
        if self.step >= total:
            print(f"nothing left to do: {self.step} of {total} steps are done (--steps, --epochs)")
            return
        batch, group = self.args.batch, self.args.batch * self.world
        starts = range(self.step * group + self.rank * batch, total * group, group)
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=(range(n, n + batch) for n in starts),
            num_workers=self.args.workers, worker_init_fn=partial(start_worker, GREY),
            pin_memory=self.device.type == "cuda")
        self.bar = tqdm(total=total, initial=self.step, disable=self.rank > 0, unit="step",
                        mininterval=0.2 if sys.stderr.isatty() else 20, dynamic_ncols=True)
        before = {stop: signal.signal(stop, self._interrupt) for stop in STOPS
                  if signal.getsignal(stop) != signal.SIG_IGN}  # nohup: a closed terminal is fine
        self.saved = time.perf_counter()
        start = self.saved - self.seconds
        layouts = {4: torch.channels_last} if self.args.channels_last else {}
        try:
            batches, begun = iter(loader), self.step
            if self.args.workers and hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a dead worker: not amid a step
            while True:
                error = None
                try:
                    if self.step > begun and (self.step % self.args.log_every == 0
                                              or self.step == total):
                        self._write_log(group)
                    if self.step < total:
                        tensors = next(batches)
                except Exception as caught:  # an unreadable picture, a full disk, a dead worker
                    error = caught
                self._save_if_due(error, total)
                if self.step == total:
                    break
                torch.manual_seed(mix(self.args.seed, self.step, self.rank))
                yield self.step, [t.to(self.device, non_blocking=self.device.type == "cuda",
                                       memory_format=layouts.get(t.dim(), torch.preserve_format))
                                  for t in tensors]
                self.step += 1
                self.bar.update()
                self.seconds = time.perf_counter() - start
        finally:
            self.bar.close()
            for stop, handler in before.items():
                signal.signal(stop, handler)

    def _save_if_due(self, error, total):
        """Between steps; what a process has met (3), its signal (2) or clock (1) is all's."""
        if re.search(r"DataLoader worker \(pid|Pin memory thread", str(error)):
            error = None if self.stop else UserError(  # `timeout` stops all processes of a run
                "--workers: a process that reads pictures was killed, out of memory?")
        todo = 3 if error else 2 if self.stop else int(time.perf_counter() - self.saved > 300)
        todo, told = max(self._gathered((todo, str(error or ""))))
        if todo:
            self.save()
        if todo == 3:
            raise error or UserError(told)
        if todo == 2:
            self.bar.close()
            if self.rank == 0:
                print(f"\nstopped at step {self.step} of {total}; the same command with "
                      "--resume goes on", file=sys.stderr)
            raise KeyboardInterrupt

    def _interrupt(self, *_):
        if self.stop:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.stop = True

    def log(self, losses):
        """Add one step's losses ({name: 0-d tensor}); kept on the device until a row is due. Where
        a step has no such loss, None: a row without any repeats the latest."""
        for name, loss in losses.items():
            total, n = self.sums.get(name, (0.0, 0))
            if loss is not None:
                total, n = (total if n else 0.0) + loss.detach(), n + 1
            self.sums[name] = total, n

    def _means(self):
        """{name: mean loss of all since the last row of log.csv}; `UserError` if not finite."""
        every = self._gathered({k: float(total) / max(n, 1) for k, (total, n) in self.sums.items()})
        means = {name: sum(mean[name] for mean in every) / self.world for name in every[0]}
        for name, value in means.items():
            self._expect_finite(name, math.isfinite(value))
        return means

    def _write_log(self, group):
        means = self._means()
        self.sums = {name: (mean, 0) for name, mean in means.items()}
        chance = {name: f" (chance {value:.3g})" for name, value in self.chance.items()}
        texts = [f"{name} {value:.3f}{chance.get(name, '')}" for name, value in means.items()]
        texts.append(f"| {self.step * group / self.seconds:.3g} pictures/s")
        self.bar.set_postfix_str(" ".join(texts), refresh=False)
        if self.rank == 0:
            log, head = self.folder / "log.csv", ",".join(["step", *means, "seconds"])
            values = [f"{value:.6g}" for value in means.values()]
            try:
                if self.head not in ("", head):  # --resume with another loss
                    set_aside(log)
                self.head = head
                with open(log, "a", encoding="utf-8") as f:
                    if f.tell() == 0:
                        print(head, file=f)
                    print(self.step, *values, f"{self.seconds:.2f}", sep=",", file=f)
            except OSError as error:
                raise UserError(f"--out {self.folder}: cannot write there ({error})") from None

    def save_samples(self, columns):
        """Write last.pt, samples/step_NNNNNN.png ({label: (N, 3, H, W)}) and index.html."""
        self.save()
        if self.rank == 0:
            save_grid(self.folder / "samples" / f"step_{self.step:06d}.png", columns)
            with contextlib.suppress(UserError):  # a script on its own has no page
                page = lab("page", "index.html").page(self.folder, self.step, self.chance)
                write_whole(self.folder / "index.html", page)

    def finish(self, scores):
        """Write result.json and print the scores, {"name", "value", "better", "trivial": {...}}."""
        if self.rank == 0:
            result = {"method": self.method, "data": self.args.data, "steps": self.step,
                      "seconds": round(self.seconds, 1), "scores": scores}
            write_whole(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
            print_scores(scores)
            print(f"{self.step} steps, {self.seconds:.0f} s; curves and grids are in {self.folder}")


def print_scores(scores):
    """One line per score: 'name: value +- sd (lower is better; answer: value, ...)'."""
    for s in scores:
        spread = f" +- {s['sd']:.3g}" if "sd" in s else ""
        trivial = "".join(f"; {k}: {v:.4g}" for k, v in s.get("trivial", {}).items())
        print(f"{s['name']}: {s['value']:.4g}{spread} ({s['better']} is better{trivial})")
