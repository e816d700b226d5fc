"""The papers' teaching figures, drawn from a trained network.

    python -m lab.figures SCRIPT FIGURE --weights FILE [--data D] [--out DIR] [flags of the script]

FILE is the script's last.pt, whose flags are taken over; pictures are the test ones of --data. A
figure is written beside FILE, or into DIR. What there is, and which figure of the paper it is like
(spade uniform and segin match also draw without --weights, from networks that are not trained):

    cut similarity      Fig. 3.27: where does a patch of G(x) find itself in x?
    cut coats           Fig. 3.28: the coats' grey levels in x, G(x) and y (toy data)
    spade uniform       Fig. 2.3: maps of one label, which normalisation washes away
    spade matrix        Fig. 2.1, 2.9: label maps in rows, styles in columns
    pix2pixsc matrix    Figs. 12, 14, 16: label maps in rows, exemplars in columns
    segin match         Figs. 3, 4: which block of the reference went where
    segin references    Fig. 5: three sketches, each by six references
    swapae grid         Fig. 4.4: structures in rows, textures in columns
    swapae interpolate  Figs. 4.6, 4.7: from one texture code to another's
    swapae pca          Fig. 4.14: along the principal directions of the texture codes
    swapae domains      Fig. 4.18: is the first of them the domain?
    swapae corruptions  Fig. 4.19: what each distance notices
    egscit masks        Sec. 3.1: the most contrasted channels of the feature masks
    egscit embedding    Fig. 5, but by PCA alone: real pictures and translations on two axes
"""

import argparse
import importlib
import math
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import common
from common import UserError

# ---- what several figures need ------------------------------------------------------------------


def save(args, name, draw):
    """Write NAME.png; draw: columns for `common.save_grid`, or a function of the path."""
    folder = Path(args.out or (Path(args.weights).parent if args.weights else args.run_folder))
    path = folder / f"{name}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if callable(draw):
            draw(path)
        else:
            common.save_grid(path, draw)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there ({error})") from None
    print(f"wrote {path}")


def mark(picture, points, h, w):
    """A copy of a picture (3, H, W), a red and a blue square at its places of an h x w grid."""
    picture = picture.clone()
    H, W = picture.shape[1:]
    half = max(1, H // 48)
    for (r, c), colour in zip(points, ([1.0, -1, -1], [-1.0, -1, 1]), strict=False):
        top, left = int((r + 0.5) * H / h), int((c + 0.5) * W / w)
        area = picture[:, max(0, top - half):top + half + 1, max(0, left - half):left + half + 1]
        area.copy_(torch.tensor(colour).view(3, 1, 1).expand_as(area))
    return picture


def as_pictures(values, size):
    """Values in [0, 1] on a coarse grid (B, 1 or 3, h, w) -> pictures (B, 3, H, W) in [-1, 1]."""
    return F.interpolate(values.float(), tuple(size)).expand(-1, 3, -1, -1) * 2 - 1


def principal(samples, count):
    """Samples (n, C) on their `count` principal axes, each stretched to [0, 1]: (n, count)."""
    torch.manual_seed(0)  # the axes are found by random projections
    samples = samples - samples.mean(0)
    places = samples @ torch.pca_lowrank(samples, count, center=False, niter=4)[2]
    low, high = places.amin(0), places.amax(0)
    return (places - low) / (high - low).clamp(min=1e-12)


def print_time(name, work, size, device):
    """The best time of five of work(), a function that gives a tensor."""
    seconds = []
    for _ in range(6):  # the first one warms up
        start = time.perf_counter()
        work().sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    print(f"{name}: {1000 * min(seconds[1:]):.1f} ms for one {size} picture on {device.type}")


# ---- CUT -----------------------------------------------------------------------------------------


@torch.no_grad()
def cut_similarity(args, pictures=None, places=((0.5, 0.5), (0.2, 0.2))):
    """G(x) and x with queries; exp(v . v- / tau) of each to all places of x, over its maximum; the
    features of x and of G(x) by their three principal components. pictures: x (N, 3, H, W) if not
    test pictures; places: one or two, (down, across) from 0 to 1."""
    import cut

    device = common.pick_device(args.device)
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of cut.py")
    nets, state = cut.build(args, device), common.load_checkpoint(args.weights, "cut")
    common.load_parts({"G": nets.G, "H": nets.H}, state["parts"], args.weights)
    layer, columns = min(args.nce_layers, key=lambda i: abs(i - 3)), {}  # residual block 1
    mlp = nets.H.mlps[args.nce_layers.index(layer)]
    if pictures is None:
        pictures = common.test_pictures(cut.data_folder(args), args, device, limit=4)["x"]
    for x in pictures.to(device).split(1):
        y_hat = cut.translate(nets.G, x, args)
        maps = [nets.G.encode(p)[layer] for p in (y_hat, x)]
        h, w = maps[0].shape[2:]
        q, k = (F.normalize(mlp(f[0].flatten(1).t()), dim=1) for f in maps)  # (h * w, 256)
        points = [(int(r * h), int(c * w)) for r, c in places]        # an animal's side, the sky
        row = {name: mark(p[0], points, h, w)[None] for name, p in (("G(x), queries", y_hat),
                                                                   ("x", x))}
        for name, (r, c) in zip(("similarity, red", "similarity, blue"), points, strict=False):
            v = ((q[r * w + c] @ k.t()) / args.tau).exp()             # inside Eq. (3.6)
            row[name] = as_pictures((v / v.max()).view(1, 1, h, w), x.shape[2:])
        for name, pca in zip(("PCA of x", "PCA of G(x)"),
                             principal(torch.cat([k, q]), 3).split(h * w), strict=True):
            row[name] = as_pictures(pca.t().view(1, 3, h, w), x.shape[2:])
        for name, picture in row.items():
            columns.setdefault(name, []).append(picture)
    save(args, "similarity", {name: torch.cat(column) for name, column in columns.items()})


@torch.no_grad()
def cut_coats(args, bins=16, side=160):
    """How much of the coats has which grey level, in x, G(x) and y: has G matched y's distribution?

    The paper's Fig. 3.28 compares how many pixels are zebra; here their place is known.
    """
    import cut

    toy, device = common.lab("toy", "cut coats"), common.pick_device(args.device)
    if args.weights is None or args.data != "toy":
        raise UserError("cut coats needs --weights FILE and --data toy: it compares with the truth")
    G = cut.load_generator(args, device)
    test = common.test_pictures(cut.data_folder(args), args, device)
    coats = toy.coat_pixels(test["x"].cpu(), cut.translate(G, test["x"], args).cpu(),
                            test["y"].cpu())
    shares = {name: torch.histc(torch.as_tensor(rgb).float().mean(1), bins, -1, 1) / len(rgb)
              for name, rgb in coats.items()}
    sheet, top = Image.new("RGB", (3 * (side + 20), side + 40), "white"), float(
        torch.stack([*shares.values()]).max())
    draw = ImageDraw.Draw(sheet)
    for column, (name, share) in enumerate(shares.items()):
        left, distance = column * (side + 20) + 10, float((share - shares["y"]).abs().sum() / 2)
        draw.text((left, 4), f"{name}: differs from y by {distance:.0%}", "black")
        for i, part in enumerate(share.tolist()):
            level, width = round(255 * (i + 0.5) / bins), side // bins
            draw.rectangle((left + i * width, 30 + side * (1 - part / top), left + (i + 1) * width,
                            30 + side), (level,) * 3, "black")
    save(args, "coats", sheet.save)


# ---- SPADE ---------------------------------------------------------------------------------------


@torch.no_grad()
def spade_uniform(args):
    """What is painted for maps of one single label? One row per label; the columns are fresh
    generators with instance normalisation and Glorot's weights (the argument needs no training), or
    the one of --weights.

    Printed for each: the mean difference, in grey levels, between the pictures of two labels. 0:
    the label was washed away.
    """
    import spade
    from lab.rows import pix2pixhd as hd

    args.labels, columns = args.labels or 4, {}
    labels = torch.arange(min(args.labels, 8)).view(-1, 1, 1).expand(-1, args.height, args.size)
    maps = labels, torch.zeros(len(labels), int(args.edges), args.height, args.size)
    fresh = {"spade": spade.Generator, "concat": hd.ConcatGenerator, "hd": hd.HDGenerator,
             "hd-spade": lambda *of: hd.HDGenerator(*of, "spade"),
             "hd-concat": lambda *of: hd.HDGenerator(*of, "concat")}
    if not args.weights:  # channels-last, the CPU's means are off by 1e-5, and sigma is 3e-3 here
        args.input, args.channels_last = "segmap", False
    for name in ["G"] if args.weights else fresh:
        torch.manual_seed(args.seed)
        nets = (spade.load_networks(args, common.pick_device(args.device)) if args.weights else
                SimpleNamespace(G=hd.instance_normalised(spade.init_weights(
                    fresh[name](args, spade.m_channels(args)), "glorot"))))
        for layer in nets.G.modules() if not args.weights else ():
            for _ in range(20 if hasattr(layer, "parametrizations") else 0):
                layer.weight  # noqa: B018, a power iteration: spectral norm meets the new weights
        z = spade.random_styles(1, args)
        columns[name] = p = spade.paint(nets, maps, z if z is None else z.expand(len(labels), -1),
                                        args)
        gaps = [(p[i] - p[j]).abs().mean() for i in range(len(p)) for j in range(i)]
        print(f"{name}: {float(sum(gaps) / len(gaps) * 127.5):.3g} grey levels between labels")
    save(args, "uniform", {"m": spade.colour_map(labels)} | columns)


def spade_matrix(args):
    """Label maps in rows, styles in columns: those of test pictures, which stand in the first row,
    where there is an encoder; else random ones (Fig. 2.9)."""
    import spade

    if args.weights is None:
        raise UserError("spade matrix needs --weights FILE")
    nets = spade.load_networks(args, common.pick_device(args.device))
    pairs = spade.find_pairs(spade.data_folder(args), args.split, args.edges)
    labels, edges, x = spade.test_batch(pairs, args, limit=8)
    n, styled = len(x) // 2, hasattr(nets, "E")  # the first n for style, the others for maps
    z = spade.style(nets, x[:n]) if styled else spade.random_styles(n, args)
    if z is None:
        raise UserError("spade matrix: a network of --input segmap has no styles")
    top = x[:n].split(1) if styled else [torch.ones_like(x[:1])] * n
    columns = {"m": torch.cat([torch.ones_like(x[:1]), spade.colour_map(labels)[n:]])}
    for i, style in enumerate(z.split(1)):
        p = spade.paint(nets, (labels[n:], edges[n:]), style.expand(len(x) - n, -1), args)
        columns[f"style {i}"] = torch.cat([top[i], p])
    save(args, "matrix", columns)


# ---- pix2pixSC -----------------------------------------------------------------------------------


def pix2pixsc_matrix(args, count=5):
    """Test label maps in rows, exemplars of different clips in columns, the exemplars on top."""
    import pix2pixsc

    device, root = common.pick_device(args.device), pix2pixsc.data_folder(args)
    G, frames = pix2pixsc.load_generator(args, device), pix2pixsc.find_frames(
        root, args.split, args)
    pix2pixsc.complete(args, frames)
    size = args.size, args.height
    chosen = [next(f for f in frames if f.style == style)
              for style in sorted({f.style for f in frames})][:count]
    maps = [pix2pixsc.coloured(pix2pixsc.F(f.label, args, size), args) for f in chosen]
    columns = {"x": torch.stack([torch.ones_like(maps[0]), *maps])}
    for i, exemplar in enumerate(chosen):
        y_hat = pix2pixsc.translated(G, [(f, exemplar) for f in chosen], args, device)
        columns[f"I {i}"] = torch.cat([pix2pixsc.picture(exemplar.image, size)[None], y_hat])
    save(args, "matrix", columns)


# ---- SEGIN ---------------------------------------------------------------------------------------


@torch.no_grad()
def segin_match(args):
    """Every place of r has a colour; "match" shows x in the colours of the places it took its
    blocks from. Then what training sees: x with its own photo, and that match spoilt.

    With --weights the output too. Prints the time of the match and of N.
    """
    import segin

    device = common.pick_device(args.device)
    show = segin.test_pictures(segin.data_folder(args), args, device, limit=6)
    nets = segin.load_networks(args, device) if args.weights else segin.build(args, device)
    x, r, y = show["x"], show["r"], show["y"]
    xi, own = nets.match(x, r), nets.match(x, y)
    block, places = x.shape[-1] // xi.shape[-1], torch.linspace(0, 1, xi.shape[-1], device=device)
    across, down = places.expand(len(places), -1), places[:, None].expand(-1, len(places))
    places = as_pictures(torch.stack([across, down, 1 - across])[None], x.shape[2:]).expand_as(x)
    spoilt = torch.stack([segin.spoil(a, b.cpu(), torch.Generator().manual_seed(i), args)
                          for i, (a, b) in enumerate(zip(y, own, strict=True))])
    W = segin.rebuild(r, xi, block)
    columns = {"x": x, "r": r, "places of r": places, "match": segin.rebuild(places, xi, block),
               "W(x, r)": W}
    if args.weights:
        columns["N(x, W)"] = segin.translate(nets, x, r, args)[0]
    save(args, "match", columns | {"own photo y": y, "W(x, y)": segin.rebuild(y, own, block),
                                   "spoilt": spoilt})
    nets.N.eval()
    for name, work in (("match", lambda: segin.auxiliary(x[:1], r[:1], nets.match)),
                       ("N", lambda: nets.N(x[:1], W[:1])[0])):
        print_time(name, work, f"{args.size}x{args.size}", device)


@torch.no_grad()
def segin_references(args):
    """Three sketches, each by the six references above them, beside their own photos."""
    import segin

    device = common.pick_device(args.device)
    nets = segin.load_networks(args, device)
    show = segin.test_pictures(segin.data_folder(args), args, device, limit=6)
    x, y = show["x"][::2], show["y"][::2]
    blank = torch.ones_like(x[:1])
    columns = {"x": torch.cat([blank, x]), "own photo y": torch.cat([blank, y])}
    for i, r in enumerate(show["r"].split(1), 1):
        y_hat = [segin.translate(nets, one, r, args)[0] for one in x.split(1)]
        columns[f"reference {i}"] = torch.cat([r, *y_hat])
    save(args, "references", columns)


# ---- Swapping Autoencoder ------------------------------------------------------------------------


def swapae_shown(args):
    """The script, its networks, six test pictures, the data folder and the device."""
    import swapae

    device = common.pick_device(args.device)
    nets, root = swapae.load_networks(args, device), swapae.data_folder(args)
    show, kind = swapae.scored_pictures(root, args, device, limit=6)
    print(f"{len(show)} {kind}")
    return swapae, nets, show, root, device


def swapae_grid(args):
    """Each of six structures with its own texture and with each of the six; prints the times of
    embedding a picture and of making a hybrid (Tab. 4.1)."""
    swapae, nets, show, *_ = swapae_shown(args)
    save(args, "grid", swapae.swap_grid(nets, show, show, args))
    for name, work in (("embedding", lambda: swapae.embed(nets, show[:1], args)[1]),
                       ("hybrid", lambda: swapae.swap(nets, show[:1], show[1:2], args))):
        print_time(name, work, f"{show.shape[3]}x{show.shape[2]}", show.device)


def swapae_interpolate(args):
    """The texture code on its way to the next one (Fig. 4.6, right); prints both distances."""
    swapae, nets, show, _, device = swapae_shown(args)
    other, columns = show.roll(-1, dims=0), {"structure": show}
    columns |= {f"alpha {a:g}": swapae.swap(nets, show, other, args, a)
                for a in (0.0, 0.25, 0.5, 0.75, 1.0)}
    columns["texture"] = other
    save(args, "interpolate", columns)
    print_distances(columns, "texture", args, device)


def swapae_moved(swapae, nets, show, steps, args):
    """Columns: the pictures, then each with {name: step} added to their texture codes."""
    z_s, z_t = swapae.embed(nets, show, args)
    return {"picture": show} | {name: swapae.paint(nets, z_s, z_t + step, args, show.shape[2:])
                                for name, step in steps.items()}


def swapae_pca(args):
    """Two deviations to both sides, along the three strongest directions of the texture codes."""
    swapae, nets, show, root, device = swapae_shown(args)
    z_t = swapae.codes_of(nets, swapae.training_files(root), args, device)[1]
    steps = {f"PCA {k + 1}: {gain:+d}": gain * deviation * direction for k, (direction, deviation)
             in enumerate(zip(*swapae.principal_directions(z_t, 3), strict=True))
             for gain in (-2, 2)}
    save(args, "pca", swapae_moved(swapae, nets, show, steps, args))


def swapae_domains(args):
    """Three pictures of either domain along the first direction of trainA's and trainB's texture
    codes; prints its cosine with the difference of the domains' mean codes (by chance about 0)."""
    swapae, nets, _, root, device = swapae_shown(args)
    files = [common.find_split(root, "train", side) for side in "AB"]
    z_A, z_B = (swapae.codes_of(nets, side, args, device)[1] for side in files)
    directions, deviations = swapae.principal_directions(torch.cat([z_A, z_B]), 1)
    cosine = F.cosine_similarity(swapae.attribute(z_B, z_A), directions)
    steps = {f"first axis: {gain:+d}": gain * cosine.sign() * deviations[0] * directions
             for gain in (-2, -1, 1, 2)}
    show = torch.cat([swapae.middle_squares(
        common.find_split(root, args.split, side), args, device, 3) for side in "AB"])
    save(args, "domains", swapae_moved(swapae, nets, show, steps, args))
    print(f"cosine of the first axis and B's mean less A's: {float(cosine.abs()):.3g}")


def swapae_corruptions(args):
    """Pictures that are shifted, turned, blurred, noisy; prints both distances to the original."""
    _, _, show, _, device = swapae_shown(args)
    columns = {name: change(show) for name, change in CORRUPTIONS.items()}
    save(args, "corruptions", columns)
    print_distances(columns, "original", args, device)


def print_distances(columns, texture, args, device):
    """SIFID of each column to that named `texture`, self-similarity distance to the first one."""
    from lab import metrics

    style, structure = metrics.style_and_structure(args.vgg, device)
    print(f"SIFID to the {texture} picture, self-similarity distance to the first column "
          f"(--vgg {args.vgg})")
    for name, pictures in columns.items():
        print(f"{name}: {style(columns[texture], pictures):.4g} "
              f"{structure(next(iter(columns.values())), pictures):.4g}")


def shift(x, part=8):
    """Moves pictures by an eighth of their sides, mirroring what enters."""
    h, w = (n // part for n in x.shape[2:])
    return F.pad(x, (w, 0, h, 0), mode="reflect")[:, :, :x.shape[2], :x.shape[3]]


def rotate(x, degrees=20):
    """Turns pictures, mirroring what enters."""
    a = math.radians(degrees)
    turn = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]])
    grid = F.affine_grid(turn.expand(len(x), 2, 3).to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def blur(x, radius=2):
    """Two box filters of 2 radius + 1 pixels."""
    for _ in range(2):
        x = F.avg_pool2d(F.pad(x, (radius,) * 4, mode="reflect"), 2 * radius + 1, 1)
    return x


def white_noise(x, deviation=0.3):
    """x plus Gaussian noise, the same at every call; clipped to [-1, 1]."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (x + deviation * noise.to(x)).clamp(-1, 1)


CORRUPTIONS = {"original": lambda x: x, "shift": shift, "rotation": rotate, "blur": blur,
               "noise": white_noise}


# ---- EGSC-IT -------------------------------------------------------------------------------------


@torch.no_grad()
def egscit_masks(args, channels=3):
    """x_A, the most contrasted channels of its mask (black: eta, white: 1), the exemplar, x_AB; and
    the same from B to A."""
    import egscit

    device = common.pick_device(args.device)
    nets, test = egscit.load_translator(args, device), egscit.test_set(args, 6)
    for way, F_x in (("AB", nets.F_A), ("BA", nets.F_B)):
        x = test[f"x_{way[0]}"].to(device)
        masks = egscit.mask(F_x(x), args.eta)
        chosen = masks.std(dim=(2, 3)).mean(0).argsort(descending=True)[:channels]
        columns = {f"x_{way[0]}": x}
        for i in chosen.tolist():
            shown = (masks[:, i:i + 1] - args.eta) / max(1 - args.eta, 1e-6)
            columns[f"m_{way[0]}, {i}"] = as_pictures(shown, x.shape[2:])
        columns[f"x_{way[1]}"] = test[f"x_{way[1]}"]
        columns[f"x_{way}"] = egscit.translated(nets, test, args, way)
        save(args, f"masks_{way}", columns)


def egscit_embedding(args, side=360):
    """Real pictures (red dots) and translations (blue crosses) on their two main axes (PCA alone:
    the paper's Fig. 5 is a t-SNE of such axes)."""
    import egscit

    nets = egscit.load_translator(args, common.pick_device(args.device))
    test = egscit.test_set(args, 200)
    sheet = Image.new("RGB", (2 * side, side + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for column, way in enumerate(("AB", "BA")):
        real, made = test[f"x_{way[1]}"], egscit.translated(nets, test, args, way)
        together = torch.cat([real, made])
        if args.size > 112:  # hundreds of photographs at full size do not fit into memory
            together = F.interpolate(together, (32, 32), mode="area")
        places = principal(together.flatten(1), 2) * (side - 24) + 12
        places = places + torch.tensor([column * side, 20])
        draw.text((column * side + 12, 4), f"x_{way[1]}: red dots, x_{way}: blue crosses", "black")
        for x, y in places[:len(real)].tolist():
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), "red")
        for x, y in places[len(real):].tolist():
            draw.line((x - 2, y - 2, x + 2, y + 2), "blue")
            draw.line((x - 2, y + 2, x + 2, y - 2), "blue")
    save(args, "embedding", sheet.save)


# ---- the command ---------------------------------------------------------------------------------

FIGURES = {  # (script, figure): function of that script's flags
    ("cut", "similarity"): cut_similarity,
    ("cut", "coats"): cut_coats,
    ("spade", "uniform"): spade_uniform,
    ("spade", "matrix"): spade_matrix,
    ("pix2pixsc", "matrix"): pix2pixsc_matrix,
    ("segin", "match"): segin_match,
    ("segin", "references"): segin_references,
    ("swapae", "grid"): swapae_grid,
    ("swapae", "interpolate"): swapae_interpolate,
    ("swapae", "pca"): swapae_pca,
    ("swapae", "domains"): swapae_domains,
    ("swapae", "corruptions"): swapae_corruptions,
    ("egscit", "masks"): egscit_masks,
    ("egscit", "embedding"): egscit_embedding,
}


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m lab.figures", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("script")
    p.add_argument("figure")
    for flag, meaning in (("weights", "the script's last.pt"), ("data", "as for the script"),
                          ("out", "folder of the figure (that of --weights)")):
        p.add_argument(f"--{flag}", help=meaning)
    given, flags = p.parse_known_args(argv)
    if (figure := FIGURES.get((given.script, given.figure))) is None:
        raise UserError(f"{given.script} {given.figure}: no such figure; there are: "
                        + ", ".join(" ".join(names) for names in FIGURES))
    for flag in ("weights", "data", "out"):
        if (value := getattr(given, flag)) is not None:
            flags += [f"--{flag}", value]
    figure(importlib.import_module(given.script).get_args(flags))


if __name__ == "__main__":
    common.entry(main)
