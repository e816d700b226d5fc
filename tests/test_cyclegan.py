"""cyclegan.py: every equation against a plain transcription, and the script as its users run it."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from helpers import (
    assert_moved_alike,
    assert_same,
    error_of,
    interrupted,
    noise_folder,
    odd_pictures,
    two_processes,
)
from PIL import Image
from transcriptions import close, parameters, patchgan, resnet_generator

import common
import cyclegan
from lab import metrics, toy

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--load", "36", "--ngf", "4", "--ndf", "4", "--blocks", "2", "--batch", "2",
        "--pool", "3", "--workers", "0", "--device", "cpu", "--log-every", "1"]
CPU = torch.device("cpu")
NAMES = ("G", "F", "D_X", "D_Y")


def tiny_args(*flags):
    return cyclegan.get_args(["--data", ".", *TINY, *flags])


@pytest.fixture
def folder(tmp_path):
    return noise_folder(tmp_path / "data")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return toy.ensure("horse2zebra", 32, root=tmp_path_factory.mktemp("toy"), n=6)


@pytest.fixture
def toy_folder(drawn, monkeypatch):
    monkeypatch.setattr(cyclegan, "data_folder", lambda args: drawn)
    return drawn


def run(*flags):
    return cyclegan.main([*map(str, flags)])


@pytest.fixture
def trained(folder, tmp_path):
    run("--data", folder, *TINY, "--steps", 2, "--out", tmp_path / "run")
    return tmp_path / "run"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, dtype=torch.double):
    return torch.rand(shape, dtype=dtype) * 2 - 1


# ---- configuration and networks ---------------------------------------------------------------


def test_paper_defaults():
    args = cyclegan.get_args(["--data", "."])
    assert (args.lambda_cyc, args.lambda_identity, args.pool) == (10, 0, 50)
    assert (args.lr, args.beta1, args.batch, args.epochs, args.decay_from) == (2e-4, .5, 1, 200, .5)
    assert (args.size, args.load, args.blocks, args.ngf, args.ndf) == (256, 286, 9, 64, 64)
    assert not args.antialias_G and not args.antialias_D and not args.keep_aspect
    args = cyclegan.get_args(["--data", ".", "--size", "128"])
    assert (args.blocks, args.load) == (6, 143)
    assert cyclegan.get_args(["--data", ".", "--size", "512"]).blocks == 9
    nets = cyclegan.build(tiny_args(), CPU)
    for optimiser in (nets.opt_G, nets.opt_D):
        group, = optimiser.param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.5, 0.999), 1e-8)
        assert group["weight_decay"] == 0


def test_identity_loss_is_on_for_painting_to_photo():
    for data, weight in (("monet2photo", 5), ("x/vangogh2photo", 5), ("horse2zebra", 0)):
        assert cyclegan.get_args(["--data", data]).lambda_identity == weight
    args = cyclegan.get_args(["--data", "monet2photo", "--lambda-identity", "1"])
    assert args.lambda_identity == 1


def test_toy_preset_changes_sizes_and_rates_but_no_term_of_the_objective():
    args = cyclegan.get_args([])
    assert (args.lambda_cyc, args.lambda_identity, args.pool) == (10, 0, 50)


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts_at_the_papers_widths():
    for flags in ([], ["--antialias-G", "--antialias-D"]):
        nets = cyclegan.build(cyclegan.get_args(["--data", ".", *flags]), CPU)
        counts = [count(getattr(nets, name)) for name in NAMES]
        assert counts == [11_378_179] * 2 + [2_764_737] * 2 and sum(counts) == 28_285_832
        assert sum(len(g["params"]) for g in nets.opt_G.param_groups) == 2 * len(
            [*nets.G.parameters()])
    assert count(cyclegan.ResnetGenerator(64, 6)) == 7_837_699
    assert nets.D_X(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    weights = torch.cat([p.flatten() for n, p in nets.G.named_parameters() if "weight" in n])
    assert float(weights.detach().std()) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("antialias", [False, True])
def test_networks_are_their_layer_tables(antialias):
    args = tiny_args("--blocks", "3", *["--antialias-G", "--antialias-D"] * antialias)
    nets = lively(cyclegan.build(args, CPU))
    x = noise(2, 3, 36, 32)
    close([nets.G(x)], [resnet_generator(parameters(nets.G), x, 3, antialias)[0]])
    close([nets.D_X(x)], [patchgan(parameters(nets.D_X), x, antialias)])


# ---- losses and buffer ------------------------------------------------------------------------


def test_losses_one_number_at_a_time():
    a, b = noise(2, 3, 4, 5), noise(2, 3, 4, 5)
    pairs = list(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    for loss in (cyclegan.cycle_loss, cyclegan.identity_loss):
        assert float(loss(a, b)) == pytest.approx(sum(abs(p - q) for p, q in pairs) / 120)
    for target in (0.0, 1.0):
        assert float(cyclegan.lsgan(a, target)) == pytest.approx(
            sum((p - target)**2 for p, _ in pairs) / 120)
    half = cyclegan.lsgan(torch.full((1, 1, 2, 2), 0.25, dtype=torch.bfloat16), 1.0)
    assert half.dtype == torch.float32 and float(half) == 0.5625


def numbered(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def test_buffer_returns_the_first_pictures_as_they_are():
    pool = cyclegan.HistoryBuffer(50, CPU)
    for n in range(25):
        fakes = numbered(2 * n, 2 * n + 1)
        assert torch.equal(pool.exchange(fakes, rng(n)), fakes)
    assert [float(p[0, 0, 0]) for p in pool.pictures] == list(range(50))


def test_full_buffer_swaps_half_of_the_time():
    pool = cyclegan.HistoryBuffer(50, CPU)
    pool.exchange(numbered(*range(50)), rng())
    shown, generator = [], rng(1)
    for n in range(50, 1050):
        before = [float(p[0, 0, 0]) for p in pool.pictures]
        out = float(pool.exchange(numbered(n), generator)[0, 0, 0, 0])
        after = [float(p[0, 0, 0]) for p in pool.pictures]
        shown.append(out)
        if out == n:                       # returned as it is, and not kept
            assert after == before
        else:                              # an older one is shown, the new one has its place
            assert after == [n if b == out else b for b in before]
    kept = sum(out != n for n, out in enumerate(shown, 50))
    assert 440 < kept < 560                # p = 1/2: 500 +- 16


def test_buffer_passes_through_at_size_zero_and_keeps_copies():
    pool = cyclegan.HistoryBuffer(0, CPU)
    assert torch.equal(pool.exchange(numbered(1, 2), rng()), numbered(1, 2))
    assert pool.pictures == []
    pool, fake = cyclegan.HistoryBuffer(2, CPU), numbered(1).clone()
    pool.exchange(fake, rng())
    fake.zero_()
    assert float(pool.pictures[0].sum()) == 12
    larger = torch.ones(1, 3, 4, 4)        # --resume with another --size
    assert torch.equal(pool.exchange(larger, rng()), larger) and len(pool.pictures) == 1


# ---- the step ---------------------------------------------------------------------------------


def lively(nets):
    """Float64, weights that saturate nothing, and rates of 0: a step leaves its gradients."""
    for name in NAMES:
        common.init_weights(getattr(nets, name).double(), "normal", 0.1)
    for optimiser in (nets.opt_G, nets.opt_D):
        optimiser.param_groups[0]["lr"] = 0.0
    return nets


def naive_step(nets, x, y, args, old_X=None, old_Y=None):
    """Losses and gradients as the paper words them, one picture at a time, by transcriptions.

    old_X, old_Y: what the buffers show D instead of x_hat, y_hat.
    """
    p = {name: parameters(getattr(nets, name)) for name in NAMES}
    sums = dict.fromkeys(("L_GAN_G", "L_GAN_F", "L_cyc", "L_identity", "L_D_X", "L_D_Y"), 0)

    def G(a):
        return resnet_generator(p["G"], a, args.blocks, args.antialias_G)[0]

    def F_(b):
        return resnet_generator(p["F"], b, args.blocks, args.antialias_G)[0]

    def D(name, picture):
        return patchgan(p[name], picture, args.antialias_D)

    for i in range(len(x)):
        a, b = x[i:i + 1], y[i:i + 1]
        shown_Y = G(a).detach() if old_Y is None else old_Y[i:i + 1]
        shown_X = F_(b).detach() if old_X is None else old_X[i:i + 1]
        sums["L_GAN_G"] += ((D("D_Y", G(a)) - 1)**2).mean() / len(x)
        sums["L_GAN_F"] += ((D("D_X", F_(b)) - 1)**2).mean() / len(x)
        sums["L_cyc"] += ((F_(G(a)) - a).abs().mean() + (G(F_(b)) - b).abs().mean()) / len(x)
        sums["L_identity"] += ((G(b) - b).abs().mean() + (F_(a) - a).abs().mean()) / len(x)
        for name, real, shown in (("D_Y", b, shown_Y), ("D_X", a, shown_X)):
            sums[f"L_{name}"] += (((D(name, real) - 1)**2).mean()
                                  + (D(name, shown)**2).mean()) / 2 / len(x)
    L = (sums["L_GAN_G"] + sums["L_GAN_F"] + args.lambda_cyc * sums["L_cyc"]
         + args.lambda_identity * sums["L_identity"])
    if not args.lambda_identity:
        del sums["L_identity"]
    return sums, {"G": torch.autograd.grad(L, p["G"] + p["F"]),
                  "D": torch.autograd.grad(sums["L_D_X"] + sums["L_D_Y"], p["D_X"] + p["D_Y"])}


@pytest.mark.parametrize("B, old, flags", [
    (1, False, ["--lambda-cyc", "7"]),
    (3, False, ["--lambda-cyc", "7", "--lambda-identity", "3"]),
    (2, True, ["--lambda-cyc", "0", "--lambda-identity", "3", "--channels-last"]),
    (2, True, ["--lambda-cyc", "7", "--antialias-G", "--antialias-D"])])
def test_step_is_the_objective(B, old, flags):
    """Eq. (3.1) to (3.4): losses and all gradients in float64, with and without old pictures."""
    args = tiny_args("--batch", str(B), *flags)
    nets = lively(cyclegan.build(args, CPU))
    x, y = noise(B, 3, 32, 40), noise(B, 3, 32, 40)
    old_X, old_Y = (noise(B, 3, 32, 40), noise(B, 3, 32, 40)) if old else (None, None)
    if old:  # buffers that always answer with these
        nets.pool_X.exchange = lambda fakes, rng: old_X
        nets.pool_Y.exchange = lambda fakes, rng: old_Y
    expected, grads = naive_step(nets, x, y, args, old_X, old_Y)
    losses = cyclegan.train_step(nets, x, y, args, rng())
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(float(value.detach()), rel=1e-9), name
    for group, names in (("G", "GF"), ("D", ("D_X", "D_Y"))):
        close([p.grad for n in names for p in getattr(nets, n).parameters()], grads[group])


def test_buffers_get_the_translations_of_this_step():
    args = tiny_args()
    nets = cyclegan.build(args, CPU)
    x, y = noise(2, 3, 32, 32, dtype=torch.float32), noise(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        y_hat, x_hat = nets.G(x), nets.F(y)
    cyclegan.train_step(nets, x, y, args, rng())
    close(nets.pool_Y.pictures, list(y_hat), rtol=1e-5, atol=1e-6)
    close(nets.pool_X.pictures, list(x_hat), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flags", [[], ["--amp"], ["--lambda-identity", "5", "--channels-last"]])
def test_every_weight_learns_and_losses_are_float32(flags):
    args = tiny_args(*flags)
    nets = cyclegan.build(args, CPU)
    x, y = noise(2, 3, 32, 32, dtype=torch.float32), noise(2, 3, 32, 32, dtype=torch.float32)
    before = {name: parameters(getattr(nets, name)) for name in NAMES}
    for step in range(3):
        losses = cyclegan.train_step(nets, x, y, args, rng(step))
        assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    for name, old in before.items():
        assert all(not torch.equal(a, b) for a, b in zip(old, getattr(nets, name).parameters(),
                                                         strict=True))
    assert all(p.requires_grad for D in (nets.D_X, nets.D_Y) for p in D.parameters())


def test_chance_is_what_an_undecided_d_gets():
    undecided = torch.full((1, 1, 3, 3), 0.5)
    one, zero = (float(cyclegan.lsgan(undecided, target)) for target in (1.0, 0.0))
    assert cyclegan.CHANCE == {"L_GAN_G": one, "L_GAN_F": one, "L_D_X": (one + zero) / 2,
                               "L_D_Y": (one + zero) / 2}


@pytest.mark.slow
def test_compile_does_not_compile_anew_at_every_step():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    args = tiny_args("--compile", "--pool", "0")
    nets = cyclegan.build(args, CPU)
    x, y = noise(2, 3, 32, 32, dtype=torch.float32), noise(2, 3, 32, 32, dtype=torch.float32)
    graphs = []
    for step in range(4):
        cyclegan.train_step(nets, x, y, args, rng(step))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2] == graphs[3]


# ---- data and runs ----------------------------------------------------------------------------


def recorded(monkeypatch, *flags):
    """What `train` hands to train_step: [(rates of opt_G and opt_D, x, y)]."""
    seen = []

    def train_step(nets, x, y, args, rng):
        seen.append(([o.param_groups[0]["lr"] for o in (nets.opt_G, nets.opt_D)], x, y))
        return {"L_cyc": torch.tensor(1.0)}

    monkeypatch.setattr(cyclegan, "train_step", train_step)
    run(*flags)
    return seen


def test_what_train_applies(folder, tmp_path, monkeypatch):
    """100 epochs at the full rate, 100 falling to zero; crops, then whole pictures; epochs."""
    seen = recorded(monkeypatch, "--data", folder, *TINY, "--epochs", 5, "--batch", 1, "--out",
                    tmp_path / "run", "--direction", "BtoA", "--sample-every", 100)
    assert len(seen) == 20                                          # 5 passes over 4 pictures
    expected = [2e-4] * 10 + [2e-4 * (20 - step) / 11 for step in range(10, 20)]
    for (rates, _, _), rate in zip(seen, expected, strict=True):
        assert rates == pytest.approx([rate, rate])
    files = {side: [common.open_rgb(f) for f in common.find_split(folder, "train", side)]
             for side in "AB"}

    def shown(picture, side, width):
        """Whether a picture is a crop (or its mirror image) of one of the domain's."""
        for f in files[side]:
            whole = common.to_tensor(f.resize((width, width), Image.BICUBIC))
            for i, j in itertools.product(range(width - 31), repeat=2):
                crop = whole[:, i:i + 32, j:j + 32]
                if torch.equal(picture, crop) or torch.equal(picture, crop.flip(2)):
                    return True
        return False

    for step, (_, x, y) in enumerate(seen):
        width = 36 if step < 10 else 32                             # CHOICE (code): late, uncropped
        assert shown(x[0], "B", width) and shown(y[0], "A", width)


def test_samples_depend_on_seed_and_number_and_every_epoch_shows_all(folder, monkeypatch):
    args = tiny_args()
    data, again = cyclegan.Unpaired(folder, args), cyclegan.Unpaired(folder, args)
    for n in (0, 7, 3):
        close(data[n], again[n], rtol=0, atol=0)
    other = cyclegan.Unpaired(folder, tiny_args("--seed", "1"))
    assert not all(torch.equal(data[n][0], other[n][0]) for n in range(4))
    seen = []
    monkeypatch.setattr(data, "load", lambda path, rng, late: seen.append(path) or torch.zeros(1))
    for n in range(40):
        data[n]
    xs, ys = seen[0::2], seen[1::2]
    assert set(xs[:4]) == set(xs[4:8]) == set(data.X) and xs[:4] != xs[4:8]
    assert set(ys) == set(data.Y) and data.Y[0].parent.name == "trainB"
    assert all(len({y for a, y in zip(xs, ys, strict=True) if a == x}) > 1 for x in data.X)


def test_half_of_the_pictures_are_mirrored_and_keep_aspect_crops_the_long_side(folder):
    args = tiny_args("--load", "32")
    data = cyclegan.Unpaired(folder, args)
    whole = {f: common.to_tensor(common.open_rgb(f).resize((32, 32), Image.BICUBIC))
             for f in data.X}
    upright = sum(any(torch.equal(data[n][0], w) for w in whole.values()) for n in range(200))
    assert 70 < upright < 130                                       # p = 1/2: 100 +- 7
    data = cyclegan.Unpaired(folder, tiny_args("--load", "32", "--keep-aspect"))
    wide = [common.to_tensor(common.open_rgb(f).resize((38, 32), Image.BICUBIC)) for f in data.X]
    crops = [w[:, :, i:i + 32] for w in wide for i in range(7)]
    assert any(torch.equal(data[0][0], c) or torch.equal(data[0][0], c.flip(2)) for c in crops)


def test_run_folder(trained):
    rows = (trained / "log.csv").read_text().splitlines()
    assert rows[0] == "step,L_GAN_G,L_GAN_F,L_cyc,L_D_Y,L_D_X,seconds" and len(rows) == 3
    grid = Image.open(trained / "samples/step_000002.png")
    assert grid.width == 6 * (2 * 43 + 4) + 4  # x G(x) F(G(x)) y F(y) G(F(y)): --load 36, twice


@pytest.mark.parametrize("flags", [[], ["--lambda-identity", "5"]])
def test_resumed_run_is_bit_identical(folder, tmp_path, flags):
    flags = ["--data", folder, *TINY, *flags, "--steps", 5]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(cyclegan, lambda: run(*flags, "--out", tmp_path / "parts"), step=3)
    run(*flags, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 5
    assert len(a["parts"]["pool_Y"]["pictures"]) == 3  # full, so that old pictures were shown
    assert_same(a["parts"], b["parts"])


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(folder, tmp_path):
    """With no buffer, since every process has its own."""
    flags = ["--data", str(folder), *TINY, "--pool", "0", "--steps", "3", "--epochs", "1"]
    two_processes("cyclegan.py", *flags, "--out", tmp_path / "two")
    run(*flags, "--batch", 4, "--out", tmp_path / "one")
    start = cyclegan.build(cyclegan.get_args(flags), CPU)
    assert_moved_alike(start, tmp_path / "one/last.pt", tmp_path / "two/last.pt", NAMES, 0.01)


# ---- translate and evaluate -------------------------------------------------------------------


def test_translate_keeps_every_size(trained, tmp_path):
    sizes = odd_pictures(tmp_path / "in")
    run("--translate", tmp_path / "in", "--weights", trained / "last.pt", "--out", tmp_path / "out")
    written = {f.stem: Image.open(f) for f in (tmp_path / "out").iterdir()}
    assert {stem: im.size for stem, im in written.items()} == sizes


@pytest.mark.parametrize("trained_as", ["AtoB", "BtoA"])
def test_direction_picks_g_or_f(folder, tmp_path, trained_as):
    """Without --direction the way that was trained as x to y; with it, from that domain."""
    run("--data", folder, *TINY, "--direction", trained_as, "--steps", 1, "--out", tmp_path / "run")
    weights = tmp_path / "run/last.pt"
    parts = torch.load(weights, weights_only=True)["parts"]
    other = {"AtoB": "BtoA", "BtoA": "AtoB"}[trained_as]
    for flags, net in (([], "G"), (["--direction", trained_as], "G"),
                       (["--direction", other], "F")):
        args = cyclegan.get_args(["--weights", str(weights), *flags])
        assert_same(dict(cyclegan.load_generator(args, CPU).state_dict()), dict(parts[net]))


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_evaluate_prints_fid_of_the_direction(trained, folder, monkeypatch, capsys, direction):
    seen = {}

    def fid(fakes, reals, device, weights):
        seen.update(fakes=torch.cat(list(fakes)), reals=torch.cat(list(reals)), weights=weights)
        return 12.5

    monkeypatch.setattr(metrics, "fid", fid)
    run("--evaluate", "--weights", trained / "last.pt", "--data", folder, "--fid-weights", "w.pth",
        "--direction", direction)
    assert "FID (4 translated, 4 real" in capsys.readouterr().out and seen["weights"] == "w.pth"
    assert seen["fakes"].shape == seen["reals"].shape == (4, 3, 32, 32)
    dark = seen["reals"].mean() < -0.2
    assert bool(dark) == (direction == "AtoB")  # B is the darker domain


def test_scores_of_generators_that_copy(toy_folder):
    """G = F = identity: the score of copying, in both directions, and cycles without a loss."""
    nets = cyclegan.build(cyclegan.get_args(TINY), CPU)
    nets.G = nets.F = nn.Identity()
    nets.G.multiple = 4
    scores = cyclegan.truth_scores(nets, toy_folder, cyclegan.get_args(TINY), CPU)
    assert [s["name"] for s in scores] == [
        "stripe direction error", "coat error", "background error", "F(y): coat error",
        "F(y): background error", "F(G(x)) error", "G(F(y)) error"]
    for s in scores[:5]:
        assert s["value"] == pytest.approx(s["trivial"]["copy the input"], abs=1e-3)
    assert scores[5]["value"] == pytest.approx(0, abs=1e-4)


def test_toy_run_scores_and_evaluate_agrees(toy_folder, tmp_path, capsys):
    run(*TINY, "--steps", 1, "--out", tmp_path / "run")
    trained = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    capsys.readouterr()
    run("--evaluate", "--weights", tmp_path / "run/last.pt")
    assert f"stripe direction error: {trained[0]['value']:.4g} " in capsys.readouterr().out


def test_user_errors_are_one_line(folder, trained, tmp_path, capsys):
    def fails(*flags):
        return error_of(capsys, cyclegan.main, *flags)
    line = fails("--data", tmp_path / "nowhere")
    assert "nowhere" in line and "trainA" in line and "horse2zebra" in line
    assert "--size 34" in fails("--data", folder, *TINY, "--size", 34)
    assert "--pool -1" in fails("--data", folder, *TINY, "--pool", -1)
    assert "--weights" in fails("--translate", folder / "testA")
    state = torch.load(trained / "last.pt", weights_only=True)
    torch.save(state | {"method": "cut"}, tmp_path / "other.pt")
    assert "cut.py" in fails("--evaluate", "--weights", tmp_path / "other.pt")


@pytest.mark.slow
def test_learns_stripes(tmp_path, monkeypatch):
    """The default run, on validation scenes: its stripes are a quarter nearer to the truth than
    those of the best painter, who draws none; coat and background beat a flat one."""
    folder = toy.ensure("horse2zebra", 64, root=tmp_path)
    monkeypatch.setattr(cyclegan, "data_folder", lambda args: folder)
    run("--out", tmp_path / "run", "--device", "cpu", "--split", "val")
    stripes, coat, background, *_ = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    assert stripes["value"] < 0.75 * min(stripes["trivial"].values())
    assert coat["value"] < coat["trivial"]["mean coat colour"]
    assert background["value"] < 0.75 * background["trivial"]["mean colour"]


def times(by):
    """A picture times a factor: what was done to it can be read off it."""
    def G(x):
        return by * x
    G.multiple = 4
    return G


def test_grids_and_scores_go_there_and_back(toy_folder):
    """The columns of Fig. 3.3, and both cycles' errors in grey levels of 0..255."""
    args = cyclegan.get_args(TINY)
    nets = cyclegan.build(args, CPU)
    nets.G, nets.F = times(0.5), times(0.25)
    x, y = common.test_pictures(toy_folder, args, CPU).values()
    columns = cyclegan.sample_columns(nets, {"x": x, "y": y}, args)
    expected = {"x": x, "G(x)": x / 2, "F(G(x))": x / 8, "y": y, "F(y)": y / 4, "G(F(y))": y / 8}
    assert [*columns] == [*expected]
    close([*columns.values()], [*expected.values()])
    scores = {s["name"]: s["value"] for s in cyclegan.truth_scores(nets, toy_folder, args, CPU)}
    for name, z in (("F(G(x)) error", x), ("G(F(y)) error", y)):
        assert scores[name] == pytest.approx(float(z.abs().mean()) * 7 / 8 * 127.5, rel=1e-4)


def test_an_epoch_is_a_pass_over_the_larger_domain(folder):
    (folder / "trainA/3.png").unlink()
    for direction in ("AtoB", "BtoA"):
        assert len(cyclegan.Unpaired(folder, tiny_args("--direction", direction))) == 4
