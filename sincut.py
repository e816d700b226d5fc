"""SinCUT: CUT from a single picture per domain, where a dataset is the crops of one picture.

One painting x, one photograph y. A dataset is what random crops at random scales make of them. A
discriminator that sees little of a crop learns the photograph's texture and not its composition;
what keeps the layout of x is CUT's patch classification: every patch of y_hat must be recognisable,
among patches of the whole minibatch, as the one that stands at its place in the input. cut.py tells
the idea and Eq. (3.6) at length; this file is its variant with StyleGAN2's blocks.

T. Park, A. A. Efros, R. Zhang, J.-Y. Zhu, "Contrastive Learning for Unpaired Image-to-Image
Translation", ECCV 2020 (arXiv 2007.15651). Numbers below are those of chapter 3.3 in T. Park,
"Machine Learning for Deep Image Manipulation", UC Berkeley 2021; SinCUT is the end of Sec. 3.3.2.

SYMBOLS      paper                 here              shape
             x, y                  x, y              (B, 3, S, S) crops in [-1, 1], of one width
             y_hat = G(x)          y_hat             (B, 3, S, S)
             G = G_dec(G_enc(x))   G.encode, decoder three feature maps (B, C_l, H_l, W_l)
             H_l, two-layer MLP    H                 (B, 1, C_l) -> (B, 1, 256), unit rows
             z_hat_l, query v      z_hat             (B, 1, 256) per layer, one place per output
             z_l, v+ and v-        z                 (B, 1, 256) per layer, same place of each input
             tau                   tau               0.07

OBJECTIVE    Eq. (3.5)  L_GAN(G, D) = E log D(y) + E log(1 - D(G(x))), non-saturating for G
             Eq. (3.6)  l(v, v+, v-) = -log [e^(v.v+/tau) / (e^(v.v+/tau) + sum_n e^(v.v-_n/tau))]
             Eq. (3.7)  L_PatchNCE(G, H, X) = E_x sum_l l(z_hat_l, z_l, z_l of the other crops)
             Eq. (3.9)  L = L_GAN + lambda_X L_PatchNCE(G, H, X) + lambda_Y L_PatchNCE(G, H, Y)
             Sec. 3.3.2 R1 = lambda_R1 / 2 E |d D(y) / d y|^2, a penalty that D pays

CHOICES      where the text is silent, or differs from what the authors ran (their released code):
             The text has 128-pixel crops in 64-pixel tiles; the code's 64-pixel crops, which D sees
             whole, are --size 64 --tile 64. A step has one width, 384 to 1024, for all crops of a
             picture (text); the code scales each crop's width and height apart, to 1/3 to 1.
             One place per crop and negatives from the other crops are the code's; lambda = 4,
             halved, and a pixel identity |G(y) - y|_1 of weight 1 as well. Keys are detached and
             the sum over layers is a mean (code). X and Y share places; the code draws new ones.
             G keeps StyleGAN2's demodulation, and its noise in translation too (code).
             G's last layer is a leaky ReLU times sqrt 2 and no tanh (code): dark colours have a
             slope of 0.28. D has no minibatch deviation and at most 384 channels (code).
             D's loss is halved and R1 is not (code), so R1 weighs twice what it does elsewhere.
             Adam's rate 0.002, betas 0 and 0.99, and 100,000 steps are the code's; the rate falls
             with every step, the code's with every 6,250.

USAGE        python sincut.py                                # toy pair, scores at the end
             python sincut.py --data mypair                  # one picture in trainA, one in trainB
             python sincut.py --translate painting.jpg --weights runs/sincut-mypair/last.pt
EXPECT       python sincut.py: 34 minutes of CPU on a busy core. The horse wears black and white
             stripes across its body (direction error 0.69, mean colour 0.61, checkerboard 0.82; at
             1,800 steps they lay along it, 0.80), the layout stays, the sky turns half blue.
             D wins: L_D 0.28, L_GAN 1.7 (chance 0.693).
"""

import functools
import math
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
from common import Run, UserError, full

# ==== 1. Configuration ========================================================================

TOY = {  # no term of the objective differs
    "size": 32, "tile": 32, "scale": [80, 128],     # of a picture 128 wide; D sees whole crops
    "batch": 8, "steps": 3000, "ngf": 4, "ndf": 4,  # minutes on a laptop: small, short, narrow, ...
    "lr": 5e-3,                                     # ... and faster
    "workers": 0, "sample_every": 500}


def get_args(argv=None):
    """Flags in layers: the paper's defaults < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add = p.add_argument
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB", help="which picture is the input")
    add("--size", type=int, default=128, help="training crop (Sec. 3.3.2; the code's is 64)")
    add("--tile", type=int, default=64, help="what D sees of a crop (Sec. 3.3.2)")
    add("--scale", type=int, nargs=2, default=[384, 1024], metavar="PX",
        help="range of the width that pictures are randomly scaled to (Sec. 3.3.2)")
    add("--batch", type=int, default=16, help="crops per step and process (Sec. 3.3.2)")
    add("--steps", type=int, default=100_000, help="updates in all (code)")
    add("--decay-from", type=float, default=0.5, help="share of the run at --lr (code)")
    add("--lr", type=float, default=2e-3, help="Adam's rate (code)")
    add("--ngf", type=int, default=10, help="an eighth of G's first width (code)")
    add("--ndf", type=int, default=8, help="a quarter of D's first width (code)")
    add("--tau", type=float, default=0.07, help="temperature of Eq. (3.6)")
    add("--lambda-X", type=float, default=2.0, help="weight of Eq. (3.7) on x (code)")
    add("--lambda-Y", type=float, default=2.0, help="the same on y, the identity term (code)")
    add("--lambda-identity", type=float, default=1.0, help="weight of |G(y) - y|_1 (code)")
    add("--lambda-R1", type=float, default=1.0, help="weight of R1 (code)")

    def presets(args):
        return TOY if args.data == "toy" else {}

    args = common.parse_flags(p, argv, "sincut", presets, run_name)
    if args.tile < 16 or args.tile & (args.tile - 1):
        raise UserError(f"--tile {args.tile}: must be a power of two, 16 at least")
    if args.size < args.tile or args.size % args.tile:
        raise UserError(f"--size {args.size}: must be a multiple of --tile {args.tile}")
    if not 0 < args.scale[0] <= args.scale[1]:
        raise UserError("--scale {} {}: expected a smaller and a larger width".format(*args.scale))
    if args.batch < 2:
        raise UserError("--batch 1: the negatives are the other crops, 2 at least")
    return args


def run_name(args):
    return f"sincut-{Path(args.data).name}"


# ==== 2. Networks: StyleGAN2's blocks without style (Sec. 3.3.2) ==============================


class EqualConv(nn.Module):
    """Convolution with run-time weight scale 1/sqrt(fan-in); then leaky ReLU with gain sqrt 2."""

    def __init__(self, a, b, kernel, stride=1, bias=True, activate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(b)) if bias else None
        self.stride, self.padding = stride, kernel // 2 if stride == 1 else 0
        self.activate = activate

    def forward(self, x):
        scale = self.weight[0].numel() ** -0.5
        x = F.conv2d(x, self.weight * scale, self.bias, self.stride, self.padding)
        return F.leaky_relu(x, 0.2) * math.sqrt(2) if self.activate else x


class Blur(nn.Module):
    """Zero padding `pad`, then the filter [1, 3, 3, 1] x [1, 3, 3, 1] / 64 at every `stride`.

    (B, C, H, W) -> (B, C, (H + 2 pad - 4) // stride + 1, ...).
    """

    def __init__(self, channels, pad, stride=1, gain=1.0):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", gain * torch.outer(row, row).repeat(channels, 1, 1, 1),
                             persistent=False)  # (C, 1, 4, 4)
        self.pad, self.stride = pad, stride

    def forward(self, x):
        return F.conv2d(x, self.kernel, None, self.stride, self.pad, groups=x.shape[1])


class StyleBlock(nn.Module):
    """StyleGAN2's residual block: two 3x3 convolutions plus a skip, over sqrt 2; maybe halved."""

    def __init__(self, a, b, down=False):
        super().__init__()
        if down:  # the blur before a stride; in the skip it may stride itself, before a 1x1
            self.body = nn.Sequential(EqualConv(a, a, 3), Blur(a, pad=2),
                                      EqualConv(a, b, 3, stride=2))
            self.skip = nn.Sequential(Blur(a, pad=1, stride=2),
                                      EqualConv(a, b, 1, bias=False, activate=False))
        else:
            self.body = nn.Sequential(EqualConv(a, a, 3), EqualConv(a, b, 3))
            self.skip = nn.Identity()

    def forward(self, x):
        return (self.body(x) + self.skip(x)) / math.sqrt(2)


class StyleUp(nn.Module):
    """StyleGAN2's upsampling layer without style: unit-norm filters (demodulation), transposed
    convolution, blur, noise, bias and leaky ReLU. (B, a, H, W) -> (B, b, 2H, 2W)."""

    def __init__(self, a, b):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, 3, 3))
        self.noise = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(b))
        self.blur = Blur(b, pad=1, gain=4.0)

    def forward(self, x):
        weight = self.weight / math.sqrt(self.weight[0].numel())
        weight = weight * (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)      # (B, b, 2H+1, 2W+1)
        x = self.blur(x)                                                 # (B, b, 2H, 2W)
        x = x + self.noise * torch.randn_like(x[:, :1])
        return F.leaky_relu(x + self.bias.view(1, -1, 1, 1), 0.2) * math.sqrt(2)


class SinGenerator(nn.Module):
    """G: one block down, six residual blocks, one up (Sec. 3.3.2); 3.07 M parameters.

    x (B, 3, H, W), H and W even -> (y_hat (B, 3, H, W), G_enc(x)).
    """

    multiple = 2

    def __init__(self, ngf=10):
        super().__init__()
        c, c2 = 8 * ngf, 16 * ngf
        self.widths = [3, c2, c2]
        self.encoder = nn.ModuleList([  # every stage ends where Eq. (3.7) reads a layer (code)
            nn.Sequential(EqualConv(3, c, 1), StyleBlock(c, c2, down=True)),   # (B, 160, H/2, W/2)
            nn.Sequential(StyleBlock(c2, c2), StyleBlock(c2, c2))])            # (B, 160, H/2, W/2)
        self.decoder = nn.Sequential(
            *[StyleBlock(c2, c2) for _ in range(4)],                           # (B, 160, H/2, W/2)
            StyleUp(c2, c), EqualConv(c, 3, 1))                                # (B, 3, H, W)

    def encode(self, x):
        """G_enc: x (B, 3, H, W) -> [x, f_1, f_2]; a place of f_l is a patch of x."""
        features = [x]
        for stage in self.encoder:
            features.append(stage(features[-1]))
        return features

    def forward(self, x):
        features = self.encode(x)
        return self.decoder(features[-1]), features


class SinDiscriminator(nn.Module):
    """StyleGAN2's D for tiles: x (B, 3, tile, tile) -> (B, 1); 5.89 M parameters for 64 pixels."""

    def __init__(self, ndf=8, tile=64):
        super().__init__()
        widths = [min(4 * ndf * 2**i, 48 * ndf) for i in range(int(math.log2(tile)) - 1)]
        last = widths[-1]
        self.body = nn.Sequential(
            EqualConv(3, widths[0], 1),
            *[StyleBlock(a, b, down=True) for a, b in pairwise(widths)],
            EqualConv(last, last, 3),                                          # (B, 384, 4, 4)
            EqualConv(last, last, 4, stride=4),                                # (B, 384, 1, 1)
            EqualConv(last, 1, 1, activate=False))

    def forward(self, x):
        return self.body(x).flatten(1)                                         # (B, 1)


class Projector(nn.Module):  # same as cut.py: Projector
    """H_l: for each layer a two-layer MLP with 256 units, then L2 normalisation (Sec. 3.3.2)."""

    def __init__(self, widths, units=256):
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(c, units), nn.ReLU(), nn.Linear(units, units)) for c in widths)

    def forward(self, features, places):
        """z: feature maps [(B, C_l, H_l, W_l)], places {layer: (S_l) indices into H_l * W_l}
        -> [(B, S_l, 256)], one entry per layer of `places`, rows of length 1."""
        z = []
        for mlp, (layer, s) in zip(self.mlps, places.items(), strict=True):
            patches = features[layer].flatten(2)[:, :, s].transpose(1, 2)          # (B, S_l, C_l)
            v = full(mlp(patches))                                                 # (B, S_l, 256)
            # CHOICE (code): + 1e-7, not max(., 1e-7): xavier's first rows are as short as 8e-6
            z.append(v / (v.norm(dim=2, keepdim=True) + 1e-7))
        return z


def build(args, device):
    """G, D, H and their three Adams."""
    torch.manual_seed(args.seed)
    G, D = SinGenerator(args.ngf), SinDiscriminator(args.ndf, args.tile)
    H = Projector(G.widths)
    common.init_weights(H, "xavier", 0.02)  # EqualConv keeps its own N(0, 1)
    for net in (G, D, H):
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(0.0, 0.99),
                             fused=device.type in ("cuda", "cpu"))
    if args.compile:  # not D: R1 differentiates it twice, and compiled code can only once
        G.forward, G.encode = torch.compile(G.forward), torch.compile(G.encode)
    return SimpleNamespace(G=G, D=D, H=H, opt_G=adam(G.parameters()), opt_D=adam(D.parameters()),
                           opt_H=adam(H.parameters()))


# ==== 3. Losses ===============================================================================


def non_saturating(logits, real):
    """-log D(.) for what shall be real, -log(1 - D(.)) for what is not; logits (N, 1)."""
    return F.softplus(-full(logits) if real else full(logits)).mean()  # Eq. (3.5), one expectation


def patch_nce(z_hat, z, tau):
    """Eq. (3.7): z_hat, z are lists of (B, 1, 256), one place of every output and every input.

    The B crops of a step are one set: a crop's own key is the positive, the others' are negatives.
    """
    terms = []
    for v, v_plus in zip(z_hat, z, strict=True):
        logits = v[:, 0] @ v_plus[:, 0].detach().t() / tau             # (B, B), CHOICE (code)
        terms.append(F.cross_entropy(logits, torch.arange(len(v), device=v.device)))  # Eq. (3.6)
    return torch.stack(terms).mean()                                   # Eq. (3.7), sum over l


def r1_penalty(logits, y):
    """R1 (Mescheder et al. 2018): mean over pictures of |d D(y) / d y|^2 / 2; y needs a graph."""
    grad, = torch.autograd.grad(logits.sum(), y, create_graph=True)    # (N, 3, tile, tile)
    return grad.square().sum(dim=(1, 2, 3)).mean() / 2


def tiles(x, side):
    """(B, C, H, W) -> (B * H/side * W/side, C, side, side): D never sees a whole crop.

    With one real picture, a D that sees much of it would ask G to paint that very picture.
    """
    x = x.unfold(2, side, side).unfold(3, side, side)      # (B, C, H/side, W/side, side, side)
    return x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def chance(args):
    """What a D that says 1/2 everywhere and an H that gives all crops one vector would get."""
    nce = math.log(args.batch)
    return {"L_GAN": math.log(2), "L_D": math.log(2), "NCE_X": nce, "NCE_Y": nce}


# ==== 4. Data =================================================================================


class SinglePair(torch.utils.data.Dataset):
    """`self[n]` is a random crop (3, size, size) of each domain's one picture, in [-1, 1].

    A step's crops of one picture share a scale: a random width from --scale (Sec. 3.3.2).
    """

    def __init__(self, root, args):
        self.args, self.pictures = args, []
        for side in "AB" if args.direction == "AtoB" else "BA":
            files = common.find_split(root, "train", side)
            if len(files) > 1:
                raise UserError(f"{files[0].parent}: SinCUT trains on one picture per domain, "
                                f"found {len(files)}")
            self.pictures.append(common.open_rgb(files[0]))

    def __getitem__(self, n):
        step_rng = random.Random(common.mix(self.args.seed, "scale", n // self.args.batch))
        rng = random.Random(common.mix(self.args.seed, n))
        return tuple(self.crop(i, step_rng.randint(*self.args.scale), rng) for i in (0, 1))

    def crop(self, i, width, rng):
        im, size = self.scaled(i, width), self.args.size
        left, top = rng.randint(0, im.width - size), rng.randint(0, im.height - size)
        im = im.crop((left, top, left + size, top + size))
        return common.to_tensor(im if rng.random() < 0.5 else im.transpose(Image.FLIP_LEFT_RIGHT))

    @functools.lru_cache(maxsize=4)  # noqa: B019 (one data set per run)
    def scaled(self, i, width):
        im = self.pictures[i]
        zoom = max(width / im.width, self.args.size / im.width, self.args.size / im.height)
        return im.resize((round(im.width * zoom), round(im.height * zoom)), Image.BILINEAR)


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("horse2zebra_single", 128)
    return common.find_data(args.data, common.UNPAIRED, {}, draw_toy)


# ==== 5. One training step ====================================================================


def train_step(nets, x, y, args, rng):
    """One update of D, then one of G and H, on crops x, y (B, 3, S, S); losses by name.

    rng: CPU generator for the places. CHOICE (code): D first, as in cut.py.
    """
    G, D, H = nets.G, nets.D, nets.H
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=args.amp)

    with autocast():
        y_hat, features_x = G(x)                                       # (B, 3, S, S), 3 maps
        y_same, features_y = G(y)                                      # G(y) should be y
    places = {layer: torch.randint(f[0, 0].numel(), (1,), generator=rng).to(x.device)
              for layer, f in enumerate(features_x)}                   # {layer: (1)}

    # ---- D: tell tiles of y from tiles of y_hat, with a flat slope at the real ones -----------
    D.requires_grad_(True)
    real = tiles(y, args.tile).requires_grad_()                        # (N, 3, tile, tile)
    with autocast():
        logits_real = D(real)                                          # (N, 1)
        logits_fake = D(tiles(y_hat.detach(), args.tile))              # (N, 1)
    L_D = (non_saturating(logits_real, True) + non_saturating(logits_fake, False)) / 2  # Eq. (3.5)
    R1 = r1_penalty(logits_real, real)                                 # Sec. 3.3.2
    nets.opt_D.zero_grad()
    (L_D + args.lambda_R1 * R1).backward()
    nets.opt_D.step()

    # ---- G and H: fool the new D, and be recognised among the crops ---------------------------
    D.requires_grad_(False)
    with autocast():
        L_GAN = non_saturating(D(tiles(y_hat, args.tile)), True)       # Eq. (3.5), what G minimises
        with torch.no_grad():                                          # keys, [(B, 1, 256)]
            z_x, z_y = H(features_x, places), H(features_y, places)
        z_hat_x, z_hat_y = H(G.encode(y_hat), places), H(G.encode(y_same), places)
    NCE_X = patch_nce(z_hat_x, z_x, args.tau)                          # Eq. (3.7) on X
    NCE_Y = patch_nce(z_hat_y, z_y, args.tau)                          # Eq. (3.7) on Y
    L_identity = (full(y_same) - y).abs().mean()                       # CHOICE (code)
    L = (L_GAN + args.lambda_X * NCE_X + args.lambda_Y * NCE_Y         # Eq. (3.9)
         + args.lambda_identity * L_identity)
    nets.opt_G.zero_grad()
    nets.opt_H.zero_grad()
    L.backward()
    nets.opt_G.step()
    nets.opt_H.step()
    return {"L_D": L_D, "R1": R1, "L_GAN": L_GAN, "NCE_X": NCE_X, "NCE_Y": NCE_Y,
            "L_identity": L_identity}


# ==== 6. Training loop ========================================================================


def train(args):
    run = Run("sincut", args, chance(args))
    root = data_folder(args)
    data = SinglePair(root, args)
    show = common.test_pictures(root, args, run.device, limit=1)
    nets = build(args, run.device)
    run.resume_or_start(vars(nets))
    for step, (x, y) in run.steps(data, args.steps):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(nets.G, show, args))
        for optimiser in (nets.opt_G, nets.opt_D, nets.opt_H):
            optimiser.param_groups[0]["lr"] = args.lr * common.rate(step, args.steps,
                                                                    args.decay_from)
        run.log(train_step(nets, x, y, args, run.rng()))
    run.save_samples(sample_columns(nets.G, show, args))
    run.finish(truth_scores(nets.G, root, args, run.device) if args.data == "toy" else [])


# ==== 7. Translate and evaluate ===============================================================


@torch.no_grad()
def translate(G, x, args):  # same as cut.py: translate
    """G(x) for x (N, 3, H, W) of any size, in [-1, 1], one picture at a time."""
    def y_hat(padded):
        return G(padded)[0]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        return torch.cat([common.same_size(y_hat, one, G.multiple).float().clamp(-1, 1)
                          for one in x.split(1)])


def sample_columns(G, show, args):
    """Columns of a sample grid: x, G(x), y, G(y)."""
    return {"x": show["x"], "G(x)": translate(G, show["x"], args),
            "y": show["y"], "G(y)": translate(G, show["y"], args)}


def truth_scores(G, root, args, device):
    """Scores of the toy pair against its true answer, beside the trivial ones'."""
    toy, test = common.lab("toy", "--data toy"), common.test_pictures(root, args, device)
    y_hat = translate(G, test["x"], args)
    return toy.single_scores(test["x"].cpu(), y_hat.cpu(), test["y"].cpu())


def load_generator(args, device):
    """G from --weights: our checkpoint (its flags were read by `get_args`) or the authors' file."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script or the authors' file")
    state = common.load_file(args.weights)
    if isinstance(state, dict) and "method" in state:
        G = build(args, torch.device("cpu")).G
        common.load_parts({"G": G}, state["parts"], args.weights)
    else:
        G = common.lab("released", "a file of the authors'").sincut(state, args.weights)
    torch.manual_seed(args.seed)  # G adds noise
    return G.to(device).eval()


def translate_files(args):
    """Translate --translate (a picture or a folder of them), each at its own size, to PNG."""
    device = common.pick_device(args.device)
    G = load_generator(args, device)
    common.translate_files(args.translate, args.out or "translated",
                           lambda x: translate(G, x.to(device), args))


def evaluate(args):
    """The toy pair's true scores; with one picture per domain there is no other metric here."""
    if args.data != "toy":
        raise UserError("--evaluate: one picture has no FID; look at it (--translate)")
    device = common.pick_device(args.device)
    G = load_generator(args, device)
    common.print_scores(truth_scores(G, data_folder(args), args, device))


# ==== 8. Main =================================================================================


def main(argv=None):
    args = get_args(argv)
    if args.translate:
        translate_files(args)
    elif args.evaluate:
        evaluate(args)
    else:
        train(args)


if __name__ == "__main__":
    common.entry(main)
