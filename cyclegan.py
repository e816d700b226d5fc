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
             F(G(x)), G(F(y))      x_cyc, y_cyc      (B, 3, H, W)
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
             when sampling: --antialias-G --antialias-D.
             Crops are 256 of 286 pixels (code), and uncropped in the decaying half of a run, as in
             CUT's code.
             The rate falls with every step; the code's with every epoch.

USAGE        python cyclegan.py                                   # toy world, scores at the end
             python cyclegan.py --data horse2zebra
             python cyclegan.py --translate photo.jpg --weights runs/cyclegan-horse2zebra/last.pt
             python cyclegan.py --translate zebra.jpg --weights FILE --direction BtoA  # with F
EXPECT       python cyclegan.py: 9.5 to 19 minutes of one slow core (3 seeds, 40 test scenes): G(x)
             has a stripe direction error of 0.35 (no direction at all 0.61, a checkerboard 0.79),
             coat error 20 (copying the input 59), background error 18 (mean colour 41).
"""

import argparse
import functools
import math
import random
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
from PIL import Image

import common
from common import BlurDown, InstanceNorm, PatchGAN, Run, UserError, full

# ==== 1. Configuration ========================================================================

KNOWN = {name: (f"https://people.eecs.berkeley.edu/~taesung_park/CycleGAN/datasets/{name}.zip",
                f"http://efrosgans.eecs.berkeley.edu/cyclegan/datasets/{name}.zip")
         for name in ("ae_photos", "apple2orange", "cezanne2photo", "horse2zebra", "maps",
                      "iphone2dslr_flower", "monet2photo", "summer2winter_yosemite",
                      "ukiyoe2photo", "vangogh2photo")}
PAINTINGS = ("monet2photo", "cezanne2photo", "ukiyoe2photo", "vangogh2photo")
TOY = {  # as cut.py's, so that scores stand side by side; no term of Eq. (3.3) differs
    "size": 64, "load": 64, "batch": 2, "steps": 1800,  # minutes on a laptop: small and short, ...
    "ngf": 16, "ndf": 16, "blocks": 4, "lr": 5e-4,      # ... so narrower, shallower and faster
    "antialias_D": True,                                # stripes 5 pixels apart need a fine D
    "workers": 0, "sample_every": 300}


def get_args(argv=None):
    """Flags in layers: the paper's defaults < toy preset < checkpoint < command line."""
    p = common.base_parser(__doc__)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--direction", choices=["AtoB", "BtoA"], default="AtoB",
        help="which domain is x; with --translate or --evaluate which way to go, G's or F's")
    add("--size", type=int, default=256, help="training crop (Sec. 3.2.4)")
    add("--load", type=int, help="pictures are resized to this first (286/256 of --size)")
    add("--keep-aspect", action=switch, default=False, help="resize the short side, not to square")
    add("--batch", type=int, default=1, help="pictures per step and process (Sec. 3.2.4)")
    add("--epochs", type=int, default=200, help="passes over the larger domain (Sec. 3.2.4)")
    add("--steps", type=int, help="updates in all; overrides --epochs")
    add("--decay-from", type=float, default=0.5, help="share of the run at --lr (Sec. 3.2.4)")
    add("--lr", type=float, default=2e-4, help="Adam's rate (Sec. 3.2.4)")
    add("--beta1", type=float, default=0.5, help="Adam's first decay (code)")
    add("--ngf", type=int, default=64, help="width of G and F (code)")
    add("--ndf", type=int, default=64, help="width of D_X and D_Y (code)")
    add("--blocks", type=int, help="residual blocks (Sec. 3.2.4: 6 up to 128 pixels, else 9)")
    add("--antialias-G", action=switch, default=False, help="blur when down- and upsampling in G")
    add("--antialias-D", action=switch, default=False, help="blur before downsampling in D")
    add("--lambda-cyc", type=float, default=10.0, help="lambda of Eq. (3.3) (Sec. 3.2.4)")
    add("--lambda-identity", type=float, default=0.0, help="weight of L_identity (Sec. 3.2.6)")
    add("--pool", type=int, default=50, help="generated pictures kept for D (Sec. 3.2.4)")
    add("--fid-weights", metavar="FILE", help="Inception weights for --evaluate")

    def presets(args):
        identity = {"lambda_identity": 5.0} if Path(args.data).name in PAINTINGS else {}
        sizes = {"blocks": 6 if args.size <= 128 else 9, "load": round(args.size * 286 / 256)}
        return sizes | identity | (TOY if args.data == "toy" else {})

    args = common.parse_flags(p, argv, "cyclegan", presets, run_name, channels_last=False)
    if args.size < 32 or args.size % 4:
        raise UserError(f"--size {args.size}: must be at least 32 and a multiple of 4")
    return args


def run_name(args):
    return f"cyclegan-{Path(args.data).name}"


# ==== 2. Networks =============================================================================


class ResnetBlock(nn.Module):
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
    nets = SimpleNamespace(
        G=ResnetGenerator(args.ngf, args.blocks, args.antialias_G),
        F=ResnetGenerator(args.ngf, args.blocks, args.antialias_G),
        D_X=PatchGAN(3, args.ndf, antialias=args.antialias_D),
        D_Y=PatchGAN(3, args.ndf, antialias=args.antialias_D))
    for net in (nets.G, nets.F, nets.D_X, nets.D_Y):
        common.init_weights(net, "normal", 0.02)
        net.to(device, memory_format=torch.channels_last if args.channels_last
               else torch.contiguous_format)
        if args.compile:
            net.compile()
    adam = functools.partial(torch.optim.Adam, lr=args.lr, betas=(args.beta1, 0.999),
                             fused=device.type in ("cuda", "cpu"))
    nets.opt_G = adam([*nets.G.parameters(), *nets.F.parameters()])
    nets.opt_D = adam([*nets.D_X.parameters(), *nets.D_Y.parameters()])
    nets.pool_X, nets.pool_Y = HistoryBuffer(args.pool, device), HistoryBuffer(args.pool, device)
    return nets


# ==== 3. Losses ===============================================================================

CHANCE = {name: 0.25 for name in ("L_GAN_G", "L_GAN_F", "L_D_X", "L_D_Y")}  # D = 1/2 everywhere


def lsgan(logits, target):
    """Sec. 3.2.4: E (D(.) - target)^2 in place of a log of Eq. (3.1); logits (B, 1, H', W').

    D pulls real pictures towards 1 and translated ones towards 0, G pulls its own towards 1. Why
    not the logs? Where D is sure that y_hat is false, log(1 - sigmoid) is flat, G learns nothing;
    there the square is steepest. The mean runs over all overlapping patches (30 x 30 for 256
    pixels), each judged by its 70 x 70 pixels: D asks for a zebra's coat, not for a zebra.
    """
    return (full(logits) - target).square().mean()                    # Eq. (3.1), one expectation


def cycle_loss(x, x_cyc):
    """One expectation of Eq. (3.2), |F(G(x)) - x|_1 as a mean over pixels; both (B, 3, H, W)."""
    return (full(x_cyc) - x).abs().mean()


def identity_loss(y, G_y):
    """One expectation of L_identity (Sec. 3.2.6), |G(y) - y|_1: what is a y already shall stay."""
    return (full(G_y) - y).abs().mean()


class HistoryBuffer:
    """The last `size` generated pictures, so that D does not forget old tricks (Sec. 3.2.4).

    Kept in last.pt: a resumed run needs the same pictures. Under torchrun each process has its own,
    and last.pt holds them all.
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
        if self.pictures and self.pictures[0].shape != fakes.shape[1:]:
            self.pictures = []  # --resume with another --size
        for fake in full(fakes.detach()):
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


# ==== 4. Data =================================================================================


class Unpaired(torch.utils.data.Dataset):
    """`self[n]`: the n-th training sample (x, y), two (3, size, size) tensors in [-1, 1].

    x walks through a new shuffle of its domain every epoch, y is drawn at random, so that pairs
    are not fixed. A sample depends on (seed, n) alone. Resize to --load, random crop, mirror;
    CHOICE (code): in the decaying part of a run pictures are resized to the crop, not cropped.
    """

    def __init__(self, root, args):
        sides = "AB" if args.direction == "AtoB" else "BA"
        self.X, self.Y = (common.find_split(root, "train", side) for side in sides)
        self.args, self.samples = args, math.inf  # `train` says how many the run will take

    def __getitem__(self, n):
        rng = random.Random(common.mix(self.args.seed, n))
        epoch, i = divmod(n, len(self.X))
        x = self.X[common.shuffled(len(self.X), common.mix(self.args.seed, "epoch", epoch))[i]]
        y = rng.choice(self.Y)
        late = n >= self.args.decay_from * self.samples
        return self.load(x, rng, late), self.load(y, rng, late)

    def load(self, path, rng, late):
        size, side = self.args.size, self.args.size if late else max(self.args.load, self.args.size)
        im = common.open_rgb(path)
        w, h = side, side                      # CHOICE (code): squeezed to a square
        if self.args.keep_aspect:
            w, h = (round(n * side / min(im.size)) for n in im.size)
        left, top = rng.randint(0, w - size), rng.randint(0, h - size)
        im = im.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))
        return common.to_tensor(im if rng.random() < 0.5 else im.transpose(Image.FLIP_LEFT_RIGHT))

    def __len__(self):
        return max(len(self.X), len(self.Y))


def data_folder(args):
    def draw_toy():
        return common.lab("toy", "--data toy").ensure("horse2zebra", args.size)
    return common.find_data(args.data, common.UNPAIRED, KNOWN, draw_toy)


# ==== 5. One training step ====================================================================


def train_step(nets, x, y, args, rng):
    """One update of G and F, then one of D_X and D_Y, on x, y (B, 3, H, W); losses by name.

    rng: CPU generator for the buffers. CHOICE (code): G and F first, so that the Ds learn from the
    very y_hat and x_hat of this pass; new ones from the updated G would cost another pass.
    """
    G, F, D_X, D_Y = nets.G, nets.F, nets.D_X, nets.D_Y
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=args.amp)

    # ---- arg min over G and F: fool both Ds, and undo each other ------------------------------
    for D in (D_X, D_Y):
        D.requires_grad_(False)                       # they judge here, and learn below
    with autocast():
        y_hat = G(x)                                                  # (B, 3, H, W)
        x_hat = F(y)                                                  # (B, 3, H, W)
        x_cyc = F(y_hat)                                              # (B, 3, H, W), should be x
        y_cyc = G(x_hat)                                              # (B, 3, H, W), should be y
        L_GAN_G = lsgan(D_Y(y_hat), 1.0)                              # Eq. (3.1), what G minimises
        L_GAN_F = lsgan(D_X(x_hat), 1.0)                              # Eq. (3.1), what F minimises
    L_cyc = cycle_loss(x, x_cyc) + cycle_loss(y, y_cyc)               # Eq. (3.2)
    L = L_GAN_G + L_GAN_F + args.lambda_cyc * L_cyc                   # Eq. (3.3)
    losses = {"L_GAN_G": L_GAN_G, "L_GAN_F": L_GAN_F, "L_cyc": L_cyc}
    if args.lambda_identity > 0:
        with autocast():
            L_identity = identity_loss(y, G(y)) + identity_loss(x, F(x))  # Sec. 3.2.6
        L = L + args.lambda_identity * L_identity
        losses["L_identity"] = L_identity
    nets.opt_G.zero_grad()
    L.backward()
    nets.opt_G.step()                                                 # Eq. (3.4), arg min

    # ---- arg max over D_X and D_Y: tell real pictures from translated ones, new and old -------
    for D in (D_X, D_Y):
        D.requires_grad_(True)
    with autocast():
        # CHOICE (code): halved, to slow D down; under Adam, which does not see the scale of a
        # loss, it changes the logged number alone.
        L_D_Y = (lsgan(D_Y(y), 1.0) + lsgan(D_Y(nets.pool_Y.exchange(y_hat, rng)), 0.0)) / 2
        L_D_X = (lsgan(D_X(x), 1.0) + lsgan(D_X(nets.pool_X.exchange(x_hat, rng)), 0.0)) / 2
    nets.opt_D.zero_grad()
    (L_D_Y + L_D_X).backward()
    nets.opt_D.step()                                                 # Eq. (3.4), arg max
    return losses | {"L_D_Y": L_D_Y, "L_D_X": L_D_X}


# ==== 6. Training loop ========================================================================


def train(args):
    run = Run("cyclegan", args, CHANCE)
    root = data_folder(args)
    data = Unpaired(root, args)
    group = args.batch * run.world
    total = args.steps or args.epochs * max(1, len(data) // group)
    data.samples = total * group
    show = common.test_pictures(root, args, run.device, limit=6)
    nets = build(args, run.device)
    run.resume_or_start(vars(nets))
    for step, (x, y) in run.steps(data, total):
        if step % args.sample_every == 0:
            run.save_samples(sample_columns(nets, show, args))
        for optimiser in (nets.opt_G, nets.opt_D):                    # Sec. 3.2.4
            optimiser.param_groups[0]["lr"] = args.lr * common.rate(step, total, args.decay_from)
        run.log(train_step(nets, x, y, args, run.rng()))
    run.save_samples(sample_columns(nets, show, args))
    run.finish(truth_scores(nets, root, args, run.device) if args.data == "toy" else [])


# ==== 7. Translate and evaluate ===============================================================


@torch.no_grad()
def translate(G, x, args):
    """G(x) for x (N, 3, H, W) of any size, in [-1, 1], one picture at a time: padded to G's
    multiple, cropped back."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        return torch.cat([common.same_size(G, one, G.multiple).float().clamp(-1, 1)
                          for one in x.split(1)])


def sample_columns(nets, show, args):
    """Columns of a sample grid, as in Fig. 3.3: x, G(x), F(G(x)) and y, F(y), G(F(y))."""
    rows = min(len(show["x"]), len(show["y"]))
    x, y = show["x"][:rows], show["y"][:rows]
    y_hat, x_hat = translate(nets.G, x, args), translate(nets.F, y, args)
    return {"x": x, "G(x)": y_hat, "F(G(x))": translate(nets.F, y_hat, args),
            "y": y, "F(y)": x_hat, "G(F(y))": translate(nets.G, x_hat, args)}


def truth_scores(nets, root, args, device):
    """Scores of G and F against the true answers of the toy world, and what is lost on the way
    round."""
    toy, test = common.lab("toy", "--data toy"), common.test_pictures(root, args, device)
    x, y = test["x"], test["y"]
    y_hat, x_hat = translate(nets.G, x, args), translate(nets.F, y, args)
    scores = toy.coat_scores(x.cpu(), y_hat.cpu(), y.cpu())
    scores += [score | {"name": f"F(y): {score['name']}"}
               for score in toy.coat_scores(y.cpu(), x_hat.cpu(), x.cpu())]
    for name, start, back in (("F(G(x))", x, translate(nets.F, y_hat, args)),
                              ("G(F(y))", y, translate(nets.G, x_hat, args))):
        error = (back - start).abs().mean() * 127.5
        scores.append({"name": f"{name} error", "value": float(error), "better": "lower"})
    return scores


def load_generator(args, device):
    """The network of --direction from --weights: our checkpoint or one the authors released."""
    if args.weights is None:
        raise UserError("--weights FILE is needed: a last.pt of this script or the authors' file")
    state = common.load_file(args.weights)
    if isinstance(state, dict) and "method" in state:
        name = "G" if args.direction == state["config"]["direction"] else "F"
        net = getattr(build(args, torch.device("cpu")), name)
        common.load_parts({name: net}, state["parts"], args.weights)
    else:
        net = common.lab("released", "a file of the authors'").cyclegan(state, args.weights)
    return net.to(device).eval()


def translate_files(args):
    """Translate --translate (a picture or a folder of them), each at its own size, to PNG."""
    device = common.pick_device(args.device)
    G = load_generator(args, device)
    common.translate_files(args.translate, args.out or "translated",
                           lambda x: translate(G, x.to(device), args))


def evaluate(args):
    """FID of the translated test pictures at --size x --size; on toy data the true scores."""
    device = common.pick_device(args.device)
    G, root = load_generator(args, device), data_folder(args)
    scores = []
    if args.data == "toy":
        test = common.test_pictures(root, args, device)
        y_hat = translate(G, test["x"], args)
        scores = common.lab("toy", "--data toy").coat_scores(test["x"].cpu(), y_hat.cpu(),
                                                             test["y"].cpu())
    if args.data != "toy" or args.fid_weights:
        metrics = common.lab("metrics", "--evaluate")
        test = common.test_pictures(root, args, device, square=True)
        y_hat = translate(G, test["x"], args)
        value = metrics.fid(y_hat.split(1), test["y"].split(1), device, args.fid_weights)
        scores.append({"name": f"FID ({len(test['x'])} translated, {len(test['y'])} real)",
                       "value": value, "better": "lower"})
    common.print_scores(scores)


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
