"""CycleGAN: unpaired image translation by two generators that must undo each other.

G turns horses into zebras, F turns zebras into horses, and a discriminator per domain judges the
results. That alone would let G answer every horse with any zebra. So F must undo what G did, pixel
by pixel, and the other way round: x -> G(x) -> F(G(x)) ~ x and y -> F(y) -> G(F(y)) ~ y.

J.-Y. Zhu, T. Park, P. Isola, A. A. Efros, "Unpaired Image-to-Image Translation using
Cycle-Consistent Adversarial Networks", ICCV 2017 (arXiv 1703.10593). Numbers below are those of
chapter 3.2 in T. Park, "Machine Learning for Deep Image Manipulation", UC Berkeley 2021.

SYMBOLS      paper                 here              shape
             x, y                  x, y              (B, 3, H, W) in [-1, 1], unpaired
             G: X -> Y, F: Y -> X  G, F              (B, 3, H, W) -> (B, 3, H, W)
             G(x), F(y)            y_hat, x_hat      (B, 3, H, W)
             F(G(x))               x_cyc             (B, 3, H, W)
             D_X, D_Y              D_X, D_Y          (B, 3, H, W) -> logits (B, 1, H', W')
             buffer of 50 images   pool_X, pool_Y    x_hat and y_hat of earlier steps
             lambda                lambda_cyc        10

OBJECTIVE    Eq. (3.1)  L_GAN(G, D_Y, X, Y) = E log D_Y(y) + E log(1 - D_Y(G(x)))
             Eq. (3.2)  L_cyc(G, F) = E |F(G(x)) - x|_1 + E |G(F(y)) - y|_1
             Eq. (3.3)  L = L_GAN(G, D_Y, X, Y) + L_GAN(F, D_X, Y, X) + lambda L_cyc(G, F)
             Eq. (3.4)  G*, F* = arg min_(G, F) max_(D_X, D_Y) L
             Sec. 3.2.4 least squares for the logs: G minimises E (D_Y(G(x)) - 1)^2,
                        D_Y minimises E (D_Y(y) - 1)^2 + E D_Y(G(x))^2
             Sec. 3.2.6 L_identity(G, F) = E |G(y) - y|_1 + E |F(x) - x|_1, optional

CHOICES      where the text is silent, or differs from what the authors ran (their released code):
             |.|_1 is the mean over pixels, and the loss of D is halved, in the code: so here.
             The weight of L_identity is not in the text; the code's is lambda / 2 = 5, always on.
             Here it is off, and 5 for the painting -> photo data sets, as the text has it.
             Buffer: the code's, new pictures until it is full, then an old one with p = 1/2.
             Padding, biases and N(0, 0.02^2) weights are the code's. Some of their code blurs
             before sampling: --antialias-G --antialias-D.
             Crops are 256 of 286 pixels (code), and uncropped in the decaying half of a run.
             6 or 9 residual blocks are the text's for 128 and 256 pixels; above 128: 9.

USAGE        python cyclegan.py                                   # toy world, scores at the end
             python cyclegan.py --data horse2zebra
             python cyclegan.py --translate photo.jpg --weights runs/cyclegan-horse2zebra/last.pt
             python cyclegan.py --translate zebra.jpg --weights FILE --direction BtoA  # with F
             python cyclegan.py --ablation all                    # Fig. 3.7: why both terms?
EXPECT       python cyclegan.py: about 3.5 minutes on two CPU cores; x to y: coat error 20 to 23
             (copying the input 59), background 17 to 20 (mean colour 41); F(G(x)) about 14.
"""

import argparse
import functools
import random
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
from PIL import Image

import common
import toy
from common import BlurDown, InstanceNorm, PatchGAN, Run, UserError

LAYOUT = "trainA/ trainB/ (and testA/ testB/) with pictures, or train/A train/B test/A test/B"

# =============================================================================================
# 1. Configuration
# =============================================================================================

ABLATIONS = {  # Tab. 3.4, Tab. 3.5, Fig. 3.7: which terms of Eq. (3.3) are left
    "cycle": ("forward", "backward"), "gan": ("GAN",), "gan+forward": ("GAN", "forward"),
    "gan+backward": ("GAN", "backward"), "none": ("GAN", "forward", "backward"),
}
PAINTINGS = ("monet2photo", "cezanne2photo", "ukiyoe2photo", "vangogh2photo")
TOY = {"size": 64, "load": 64, "batch": 2, "steps": 1800, "lr": 5e-4, "ngf": 16, "ndf": 16,
       "blocks": 4, "antialias_D": True, "workers": 0, "sample_every": 300}


def get_args(argv=None):
    """Flags in layers: the paper's defaults < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--ablation", choices=[*ABLATIONS, "all"], default="none",
        help="Tab. 3.4: train with some terms only; all: each in turn, with a table and a strip")
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB",
        help="which domain is x; with --translate or --evaluate which way to go, G's or F's")
    add("--size", type=int, default=256, help="training crop (Sec. 3.2.4)")
    add("--load", type=int, default=None, help="pictures are resized to this before the crop "
                                               "(286/256 of --size if not given)")
    add("--keep-aspect", action=switch, default=False, help="resize the short side, not to square")
    add("--batch", type=int, default=1, help="pictures per step and process (Sec. 3.2.4)")
    add("--epochs", type=int, default=200, help="passes over the larger domain (Sec. 3.2.4)")
    add("--steps", type=int, default=None, help="updates in all; overrides --epochs")
    add("--decay-from", type=float, default=0.5, help="fraction of the run with a constant rate")
    add("--lr", type=float, default=2e-4, help="Adam's rate (Sec. 3.2.4)")
    add("--beta1", type=float, default=0.5, help="Adam's first decay (code)")
    add("--ngf", type=int, default=64, help="width of G and F (code)")
    add("--ndf", type=int, default=64, help="width of D_X and D_Y (code)")
    add("--blocks", type=int, default=None, help="residual blocks of G and F (Sec. 3.2.4: 6 up to "
                                                 "128 pixels, else 9)")
    add("--antialias-G", action=switch, default=False, help="blur before down- and upsampling in G")
    add("--antialias-D", action=switch, default=False, help="blur before downsampling in D")
    add("--lambda-cyc", type=float, default=10.0, help="lambda of Eq. (3.3) (Sec. 3.2.4)")
    add("--lambda-identity", type=float, default=0.0, help="weight of L_identity (Sec. 3.2.6)")
    add("--pool", type=int, default=50, help="generated pictures kept for D (Sec. 3.2.4)")
    add("--fid-weights", default=None, metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        identity = {"lambda_identity": 5.0} if Path(args.data).name in PAINTINGS else {}
        sizes = {"blocks": 6 if args.size <= 128 else 9, "load": round(args.size * 286 / 256)}
        return sizes | identity | (TOY if args.data == "toy" else {})

    args = common.parse_flags(p, argv, "cyclegan", presets, run_name)
    if args.size < 32 or args.size % 4:
        raise UserError(f"--size {args.size}: must be at least 32 and a multiple of 4")
    if args.pool < 0:
        raise UserError(f"--pool {args.pool}: must be 0 (no buffer) or more")
    return args


def run_name(args):
    ablation = "" if args.ablation == "none" else f"-{args.ablation}"
    return f"cyclegan-{Path(args.data).name}{ablation}"


# =============================================================================================
# 2. Networks
# =============================================================================================


class ResnetBlock(nn.Module):  # same as cut.py: ResnetBlock
    """x + conv(relu(conv(x))), instance-normalised; (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm(channels),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm(channels))

    def forward(self, x):
        return x + self.body(x)


class ResnetGenerator(nn.Module):
    """Johnson et al.'s network (Sec. 3.2.4): x (B, 3, H, W) -> (B, 3, H, W) in [-1, 1].

    H and W are multiples of 4. 11.38 M parameters with 9 blocks, 7.84 M with 6.
    """

    multiple = 4

    def __init__(self, ngf=64, blocks=9, antialias=False):
        super().__init__()

        def relu(channels):
            return [InstanceNorm(channels), nn.ReLU(inplace=True)]

        def down(a, b):  # CHOICE: stride 2; or stride 1 and, after norm and ReLU, a blur
            if antialias:
                return [nn.Conv2d(a, b, 3, padding=1), *relu(b), BlurDown(b)]
            return [nn.Conv2d(a, b, 3, stride=2, padding=1), *relu(b)]

        def up(a, b):
            if antialias:
                return [nn.Upsample(scale_factor=2, mode="bilinear"),
                        nn.Conv2d(a, b, 3, padding=1), *relu(b)]
            return [nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1), *relu(b)]

        self.layers = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), *relu(ngf),     # (B, 64, H, W)
            *down(ngf, 2 * ngf),                                         # (B, 128, H/2, W/2)
            *down(2 * ngf, 4 * ngf),                                     # (B, 256, H/4, W/4)
            *[ResnetBlock(4 * ngf) for _ in range(blocks)],
            *up(4 * ngf, 2 * ngf),                                       # (B, 128, H/2, W/2)
            *up(2 * ngf, ngf),                                           # (B, 64, H, W)
            nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())      # (B, 3, H, W)

    def forward(self, x):
        return self.layers(x)


def build(args, device):
    """G, F, D_X, D_Y, one Adam for both generators, one for both Ds, and the two buffers."""
    torch.manual_seed(args.seed)
    nets = {"G": ResnetGenerator(args.ngf, args.blocks, args.antialias_G),
            "F": ResnetGenerator(args.ngf, args.blocks, args.antialias_G),
            "D_X": PatchGAN(3, args.ndf, antialias=args.antialias_D),
            "D_Y": PatchGAN(3, args.ndf, antialias=args.antialias_D)}
    for net in nets.values():
        common.init_weights(net, "normal", 0.02)
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, 0.999),
                             fused=device.type in ("cuda", "cpu"))
    m = SimpleNamespace(**nets)
    m.opt_G = adam([*m.G.parameters(), *m.F.parameters()])
    m.opt_D = adam([*m.D_X.parameters(), *m.D_Y.parameters()])
    m.pool_X, m.pool_Y = HistoryBuffer(args.pool, device), HistoryBuffer(args.pool, device)
    if args.compile:
        for net in nets.values():
            net.forward = torch.compile(net.forward)
    return m


# =============================================================================================
# 3. Losses
# =============================================================================================


def cycle_loss(x, x_cyc):
    """One term of Eq. (3.2), |F(G(x)) - x|_1 as a mean over pixels; both (B, 3, H, W)."""
    return (common.full(x_cyc) - x).abs().mean()                      # Eq. (3.2)


def identity_loss(y, G_y):
    """One term of L_identity (Sec. 3.2.6), |G(y) - y|_1: what is a y already shall stay."""
    return (common.full(G_y) - y).abs().mean()


def half_objective(x, y, G, F, D_Y, lambda_GAN, lambda_cyc, lambda_identity):
    """The terms of Eq. (3.3) that G's translation of x enters, as G and F minimise them.

    Called once as it stands, and once with the roles of the domains swapped: (y, x, F, G, D_X).
    A term of weight 0 is not computed. Returns ((GAN, cyc, identity), their weighted sum, y_hat).
    """
    y_hat = G(x)
    GAN = common.lsgan(D_Y(y_hat), True) if lambda_GAN else None      # Eq. (3.1), G's side
    cyc = cycle_loss(x, F(y_hat)) if lambda_cyc else None             # Eq. (3.2), x -> y_hat -> x
    identity = identity_loss(y, G(y)) if lambda_identity else None    # Sec. 3.2.6
    weights = (lambda_GAN, lambda_cyc, lambda_identity)
    terms = (GAN, cyc, identity)
    L = sum(w * term for w, term in zip(weights, terms, strict=True) if w)  # Eq. (3.3), one half
    return terms, L, y_hat.detach()


def discriminator_loss(D_Y, y, y_hat):
    """What D_Y minimises (Sec. 3.2.4): real y towards 1, y_hat (no gradient) towards 0.

    CHOICE (code): halved, so that D learns at half the pace of G.
    """
    # No layer of D mixes pictures, so real and fake can share one pass.
    logits_fake, logits_real = D_Y(torch.cat([y_hat.detach(), y])).split([len(y_hat), len(y)])
    return 0.5 * (common.lsgan(logits_fake, False) + common.lsgan(logits_real, True))  # Eq. (3.1)


class HistoryBuffer:
    """The last `size` generated pictures, so that D does not forget old tricks (Sec. 3.2.4).

    Kept in last.pt: a resumed run needs the same pictures. Each process has its own.
    """

    def __init__(self, size, device):
        self.size, self.device, self.pictures = size, device, []

    def exchange(self, fakes, rng):
        """Fakes (B, 3, H, W) -> what D shall see instead, same shape; rng decides on the CPU.

        Until the buffer is full it keeps and returns each picture. Then half of the pictures
        (p = 1/2 each) are put in the place of an older one, drawn at random, that is returned;
        the other half are returned as they are, and not kept.
        """
        shown = []
        for fake in common.full(fakes.detach()):
            if len(self.pictures) < self.size:
                self.pictures.append(fake.clone())
            elif self.size and torch.rand((), generator=rng) < 0.5:
                i = int(torch.randint(self.size, (), generator=rng))
                fake, self.pictures[i] = self.pictures[i], fake.clone()
            shown.append(fake)
        return torch.stack(shown)

    def state_dict(self):
        return {"pictures": self.pictures}

    def load_state_dict(self, state):
        self.pictures = [picture.to(self.device) for picture in state["pictures"]]


# =============================================================================================
# 4. Data
# =============================================================================================


class Unpaired(torch.utils.data.Dataset):  # same as cut.py: Unpaired
    """`self[n]`: the n-th training sample (x, y), two (3, size, size) tensors in [-1, 1].

    x walks through a new shuffle of its domain every epoch, y is drawn at random, so that no pair
    recurs. A sample depends on (seed, n) alone. Resize to --load, random crop, mirror at random;
    CHOICE (code): in the decaying part of a run pictures are resized to the crop, not cropped.
    """

    def __init__(self, root, args, samples=None):
        sides = "AB" if args.direction == "AtoB" else "BA"
        self.X, self.Y = (common.find_split(root, "train", side, LAYOUT) for side in sides)
        self.args, self.samples = args, samples

    def __getitem__(self, n):
        rng = random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.X))
        x = self.X[shuffled(len(self.X), common.mix(self.args.seed, "epoch", epoch))[i]]
        y = rng.choice(self.Y)
        late = self.samples is not None and n >= self.args.decay_from * self.samples
        return self.load(x, rng, late), self.load(y, rng, late)

    def load(self, path, rng, late):
        size, side = self.args.size, self.args.size if late else max(self.args.load, self.args.size)
        im = common.open_rgb(path)
        w, h = im.size
        short = side / min(w, h) if self.args.keep_aspect else None  # CHOICE (code): not kept
        w, h = (round(w * short), round(h * short)) if short else (side, side)
        left, top = rng.randint(0, w - size), rng.randint(0, h - size)
        im = im.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))
        return common.to_tensor(im if rng.random() < 0.5 else im.transpose(Image.FLIP_LEFT_RIGHT))

    def __len__(self):
        return max(len(self.X), len(self.Y))


@functools.lru_cache(maxsize=2)
def shuffled(n, seed):  # same as cut.py: shuffled
    """A permutation of range(n) that depends on the seed alone."""
    return random.Random(seed).sample(range(n), n)


def random_batch(args, device):  # same as cut.py: random_batch
    """(x, y) of noise, shaped and laid out as in training; for bench.py."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    shape = (args.batch, 3, args.size, args.size)
    return [torch.rand(shape).mul(2).sub(1).to(device, memory_format=layout) for _ in "xy"]


# =============================================================================================
# 5. One training step
# =============================================================================================


def train_step(m, x, y, args, rng, average=lambda *nets: None):
    """One update of G and F, then one of D_X and D_Y, on x, y (B, 3, H, W): Eq. (3.4).

    Returns losses by name. rng: CPU generator for the buffers. average: gradients over processes.
    """
    G, F, D_X, D_Y, left = m.G, m.F, m.D_X, m.D_Y, ABLATIONS[args.ablation]
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=args.amp)
    use_GAN = float("GAN" in left)
    forward = args.lambda_cyc if "forward" in left else 0.0
    backward = args.lambda_cyc if "backward" in left else 0.0

    # ---- G and F: fool both D, and undo each other --------------------------------------------
    for D in (D_X, D_Y):
        D.requires_grad_(False)              # they judge here, and learn below
    m.opt_G.zero_grad(set_to_none=True)
    # WHY two backward passes: the halves of Eq. (3.3) share weights but no activations, so the
    # first half's can be freed before the second half's are made. The gradients add up in G and F.
    with autocast():
        terms_x, L, y_hat = half_objective(x, y, G, F, D_Y, use_GAN, forward,
                                           args.lambda_identity)
    L.backward()
    with autocast():
        terms_y, L, x_hat = half_objective(y, x, F, G, D_X, use_GAN, backward,
                                           args.lambda_identity)
    L.backward()
    average(G, F)
    m.opt_G.step()
    names = ("GAN_G", "cyc_x", "identity_y", "GAN_F", "cyc_y", "identity_x")
    losses = {name: loss for name, loss in zip(names, (*terms_x, *terms_y), strict=True)
              if loss is not None}

    # ---- D_X and D_Y: tell real pictures from those of this and of earlier generators ---------
    for D in (D_X, D_Y):
        D.requires_grad_(True)
    if use_GAN:
        m.opt_D.zero_grad(set_to_none=True)
        for name, D, real, fake, pool in (("D_Y", D_Y, y, y_hat, m.pool_Y),
                                          ("D_X", D_X, x, x_hat, m.pool_X)):
            with autocast():
                losses[name] = discriminator_loss(D, real, pool.exchange(fake, rng))
            losses[name].backward()
        average(D_X, D_Y)
        m.opt_D.step()
    return {name: loss.detach() for name, loss in losses.items()}


# =============================================================================================
# 6. Training loop
# =============================================================================================


def rate(step, total, decay_from):  # same as cut.py: rate
    """Learning-rate factor: 1, then linearly towards 0 over the rest of the run (Sec. 3.2.4)."""
    constant = int(decay_from * total)
    return 1.0 if step < constant else (total - step) / (total - constant + 1)


def data_folder(args):
    return common.find_data(args.data, LAYOUT, lambda: toy.ensure("horse2zebra", args.size))


def train(args):
    """Train and score; returns (the scores, the last grid's columns)."""
    run = Run("cyclegan", args)
    root = data_folder(args)
    data = Unpaired(root, args)
    group = args.batch * run.world
    total = args.steps or args.epochs * max(1, len(data) // group)
    data.samples = total * group
    show = test_pictures(root, args, run.device, limit=6)
    m = build(args, run.device)
    run.resume_or_start(vars(m))
    if args.data == "toy":
        preset = ", ".join(f"{k} {v}" for k, v in TOY.items())
        print(f"toy preset instead of the paper's settings: {preset}")
    for step, (x, y) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(m, show, args))
        for optimiser in (m.opt_G, m.opt_D):
            optimiser.param_groups[0]["lr"] = args.lr * rate(step, total, args.decay_from)
        run.log(train_step(m, x, y, args, run.rng(), run.average_gradients))
    columns = sample_columns(m, show, args)
    run.save_samples(columns)
    scores = truth_scores(m, root, args, run.device) if args.data == "toy" else []
    run.finish(scores)
    return scores, columns


def train_ablations(args):
    """Tab. 3.4, Tab. 3.5 and Fig. 3.7: every variant for the same steps; a table and a strip."""
    folder, rows, strips = Path(args.run_folder), {}, {}
    for name in ABLATIONS:
        label = {"none": "CycleGAN", "cycle": "cycle alone", "gan": "GAN alone"}.get(
            name, name.replace("gan+", "GAN + "))
        print(f"---- {label} ----", flush=True)
        rows[label], columns = train(common.variant(args, name, {}))
        for x, y_hat in (("x", "G(x)"), ("y", "F(y)")):
            strips.setdefault(x, {x: columns[x]})[label] = columns[y_hat]
    for x, strip in strips.items():
        common.save_grid(folder / f"ablation_{x}.png", strip)
    print(f"\nwrote {folder}/ablation_x.png and ablation_y.png")
    common.save_ablation(folder, rows)


# =============================================================================================
# 7. Translate and evaluate
# =============================================================================================


@torch.no_grad()
def translate(G, x, args):
    """G(x) for x (B, 3, H, W) of any size, in [-1, 1]: padded to G's multiple, cropped back."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        return common.same_size(G, x, G.multiple).float().clamp(-1, 1)


def translate_all(G, pictures, args):
    """`translate` of (N, 3, H, W), one picture at a time: a large test set fits anywhere."""
    return torch.cat([translate(G, picture[None], args) for picture in pictures])


def test_pictures(root, args, device, limit=None, square=False):  # same as cut.py: test_pictures
    """{'x': (N, 3, H, W), 'y': ...} of the test split (of the training split if there is none).

    limit: that many, evenly spaced. square: resized to --size x --size, for the paper's
    evaluation; otherwise to the first picture's size, because a grid has one size.
    """
    split = "test" if any((Path(root) / d).is_dir() for d in ("testA", "test/A")) else "train"
    found = {}
    for name, side in zip("xy", "AB" if args.direction == "AtoB" else "BA", strict=True):
        files = common.find_split(root, split, side, LAYOUT)
        every = max(1, len(files) // limit) if limit else 1  # neighbours are often video frames
        pictures = [common.open_rgb(f) for f in files[::every][:limit]]
        size = (args.size, args.size) if square else pictures[0].size
        found[name] = torch.stack([common.to_tensor(p.resize(size, Image.BICUBIC))
                                   for p in pictures]).to(device)
    return found


def sample_columns(m, show, args):
    """Columns of a sample grid, as in Fig. 3.3: x, G(x), F(G(x)) and y, F(y), G(F(y))."""
    rows = min(len(show["x"]), len(show["y"]))
    x, y = show["x"][:rows], show["y"][:rows]
    y_hat, x_hat = translate_all(m.G, x, args), translate_all(m.F, y, args)
    return {"x": x, "G(x)": y_hat, "F(G(x))": translate_all(m.F, y_hat, args),
            "y": y, "F(y)": x_hat, "G(F(y))": translate_all(m.G, x_hat, args)}


def truth_scores(m, root, args, device):
    """Scores of both directions against the toy world's true answers, and of both cycles."""
    test, scores = test_pictures(root, args, device), []
    for x, y, G, F, ways in (("x", "y", m.G, m.F, ("x to y", "F(G(x))")),
                             ("y", "x", m.F, m.G, ("y to x", "G(F(y))"))):
        y_hat = translate_all(G, test[x], args)
        for score in toy.coat_scores(test[x].cpu(), y_hat.cpu(), test[y].cpu()):
            scores.append(score | {"name": f"{ways[0]}: {score['name']}"})
        error = (translate_all(F, y_hat, args) - test[x]).abs().mean() * 127.5
        scores.append({"name": f"{ways[1]} error", "value": float(error), "better": "lower"})
    return scores


def load_generator(args, device):
    """The network of --direction from --weights: our checkpoint or one the authors released."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script or the authors' file")
    state = common.load_file(args.weights)
    if isinstance(state, dict) and "method" in state:
        net = "G" if args.direction == state["config"]["direction"] else "F"
        m = build(args, torch.device("cpu"))
        common.load_parts({net: getattr(m, net)}, state["parts"], args.weights)
        return getattr(m, net).to(device).eval()
    return released_generator(state, args.weights).to(device).eval()


def released_generator(state, path):
    """The authors' latest_net_G_A.pth (or horse2zebra.pth, ...) -> ResnetGenerator.

    One file holds one direction. Their layers come in the order of ours, so tensors are matched
    by position, without what older files keep beside the weights: blur kernels, statistics of
    instance normalisation. Widths are read from the shapes.
    """
    try:
        extra = ("filt", "running_mean", "running_var", "num_batches_tracked")
        tensors = [v for k, v in state.items() if not k.endswith(extra)]
        blocks = sum(k.endswith("conv_block.1.weight") for k in state)
        G = ResnetGenerator(len(state["model.1.weight"]), blocks, "model.7.filt" in state)
        for p, t in zip(list(G.parameters()), tensors, strict=True):
            if p.shape != t.shape:
                raise ValueError("another layer")
            p.data.copy_(t)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: neither a checkpoint of cyclegan.py nor a generator released by "
                        "the authors (latest_net_G_A.pth)") from None
    return G


def translate_files(args):
    """Translate --translate (a picture or a folder of them), each at its own size, to PNG."""
    device = common.pick_device(args.device)
    G = load_generator(args, device)
    common.translate_files(args.translate, args.out or "translated",
                           lambda x: translate(G, x.to(device), args))


def evaluate(args):
    """FID of the translated test pictures at --size x --size; on toy data the truth scores."""
    device = common.pick_device(args.device)
    G = load_generator(args, device)
    root = data_folder(args)
    scores = []
    if args.data == "toy":
        test = test_pictures(root, args, device)
        y_hat = translate_all(G, test["x"], args)
        scores = toy.coat_scores(test["x"].cpu(), y_hat.cpu(), test["y"].cpu())
    if args.data != "toy" or args.fid_weights:
        test = test_pictures(root, args, "cpu", square=True)
        if min(map(len, test.values())) < 2:
            raise UserError(f"--evaluate: FID needs two or more pictures per domain in {root}")
        y_hat = (translate(G, p[None].to(device), args).cpu() for p in test["x"])
        value = common.fid(y_hat, test["y"].split(1), device, args.fid_weights)
        scores.append({"name": f"FID ({len(test['x'])} translated, {len(test['y'])} real, "
                               "299x299)", "value": value, "better": "lower"})
    common.print_scores(scores)


# =============================================================================================
# 8. Main
# =============================================================================================


def main(argv=None):
    args = get_args(argv)
    if args.translate:
        translate_files(args)
    elif args.evaluate:
        evaluate(args)
    elif args.ablation == "all":
        train_ablations(args)
    else:
        train(args)


if __name__ == "__main__":
    common.entry(main)
