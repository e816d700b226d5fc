"""sincut.py: every equation against a plain transcription, and the script as its users run it."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, error_of, interrupted, noise_folder, odd_pictures
from PIL import Image, ImageOps
from transcriptions import close, parameters

import common
import sincut
from lab import toy

TINY = ["--size", "32", "--tile", "16", "--ngf", "1", "--ndf", "1", "--scale", "36", "44",
        "--batch", "3", "--workers", "0", "--device", "cpu", "--log-every", "1"]
CPU = torch.device("cpu")


def tiny_args(*flags):
    return sincut.get_args(["--data", ".", *TINY, *map(str, flags)])


@pytest.fixture
def folder(tmp_path):
    """A single pair of noise pictures."""
    rng = np.random.default_rng(0)
    for side in "AB":
        (tmp_path / "pair" / f"train{side}").mkdir(parents=True)
        noise = rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pair" / f"train{side}/one.png")
    return tmp_path / "pair"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return toy.ensure("horse2zebra_single", 64, root=tmp_path_factory.mktemp("toy"))


def run(*flags):
    sincut.main([*map(str, flags)])


@pytest.fixture
def trained(folder, tmp_path):
    run("--data", folder, *TINY, "--steps", 2, "--out", tmp_path / "run")
    return tmp_path / "run"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, dtype=torch.double):
    return torch.rand(shape, dtype=dtype) * 2 - 1


def lively(nets):
    """Float64, weights that saturate nothing and are not 0, and rates of 0: a step leaves its
    gradients."""
    for net, std in ((nets.G, 1.0), (nets.D, 0.6), (nets.H, 0.3)):
        for p in net.double().parameters():
            torch.nn.init.normal_(p, 0, std)
    for optimiser in (nets.opt_G, nets.opt_D, nets.opt_H):
        optimiser.param_groups[0]["lr"] = 0.0
    return nets


# ---- configuration and networks -----------------------------------------------------------------


def test_paper_defaults():
    args = sincut.get_args(["--data", "."])
    assert (args.size, args.tile, args.scale, args.batch) == (128, 64, [384, 1024], 16)
    assert (args.steps, args.decay_from, args.lr, args.tau) == (100_000, 0.5, 2e-3, 0.07)
    assert (args.ngf, args.ndf, args.direction) == (10, 8, "AtoB")
    assert (args.lambda_X, args.lambda_Y, args.lambda_identity, args.lambda_R1) == (2, 2, 1, 1)
    nets = sincut.build(tiny_args(), CPU)
    for optimiser in (nets.opt_G, nets.opt_D, nets.opt_H):
        group, = optimiser.param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.0, 0.99), 1e-8)
        assert group["weight_decay"] == 0


def test_toy_preset_changes_sizes_but_no_term_of_the_objective():
    real, small = sincut.get_args(["--data", "."]), sincut.get_args([])
    for name in ("lambda_X", "lambda_Y", "lambda_identity", "lambda_R1", "tau", "decay_from"):
        assert getattr(real, name) == getattr(small, name), name
    assert small.tile == small.size  # as the released code has it: D sees crops whole
    assert vars(real).keys() >= sincut.TOY.keys()


def test_the_full_configuration():
    nets = sincut.build(sincut.get_args(["--data", "."]), CPU)
    assert [sum(p.numel() for p in net.parameters()) for net in (nets.G, nets.D, nets.H)] == [
        3_068_404, 5_885_473, 280_832]
    x = torch.zeros(2, 3, 64, 64)
    y_hat, features = nets.G(x)
    assert y_hat.shape == x.shape and nets.D(x).shape == (2, 1)
    assert [tuple(f.shape[1:]) for f in features] == [(3, 64, 64), (160, 32, 32), (160, 32, 32)]
    places = {layer: torch.tensor([5]) for layer in range(3)}
    assert [tuple(z.shape) for z in nets.H(features, places)] == [(2, 1, 256)] * 3
    for net in (nets.G, nets.D, nets.H):  # N(0, 1); xavier times 0.02 in H
        for p in net.parameters():
            if p.dim() == 1:
                assert not p.any()
            elif p.numel() > 5000:
                std = 0.02 * math.sqrt(2 / sum(p.shape)) if net is nets.H else 1
                assert float(p.detach().std()) == pytest.approx(std, rel=0.05)


def conv(p, x, stride=1, padding=0, activate=True, bias=True):
    """Weights over the square root of their fan-in; slope 0.2 and gain sqrt 2."""
    weight = next(p)
    x = F.conv2d(x, weight / math.sqrt(weight[0].numel()), None, stride, padding)
    x = x + next(p).view(1, -1, 1, 1) if bias else x
    return torch.where(x > 0, x, 0.2 * x) * 2 ** 0.5 if activate else x


def blur(x, padding):
    x, (h, w) = F.pad(x, [padding] * 4), (n + 2 * padding - 3 for n in x.shape[2:])
    return sum(a * b * x[:, :, i:i + h, j:j + w] for i, a in enumerate((1, 3, 3, 1))
               for j, b in enumerate((1, 3, 3, 1))) / 64


def block(p, x, down=False):
    body = conv(p, x, padding=1)
    if not down:
        return (x + conv(p, body, padding=1)) / 2 ** 0.5
    body = conv(p, blur(body, 2), stride=2)
    return (body + conv(p, blur(x, 1), stride=2, activate=False, bias=False)) / 2 ** 0.5


def encoder(params, x):
    """The layers 0, 2 and 4 of the authors' list, which PatchNCE reads; an iterator over params."""
    p, features = iter(params), [x]
    features.append(block(p, conv(p, x), down=True))
    features.append(block(p, block(p, features[1])))
    return p, features


def generator(params, x):
    """One block down, six blocks, one layer up, 1x1; noise from torch's generator."""
    p, features = encoder(params, x)
    h = features[2]
    for _ in range(4):
        h = block(p, h)
    (B, c, height, width), weight, strength, bias = h.shape, next(p), next(p), next(p)
    weight = weight / weight[0].numel() ** 0.5
    weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
    spread = h.new_zeros(B, c, 2 * height + 3, 2 * width + 3)  # a transposed convolution by hand
    spread[:, :, 2:-2:2, 2:-2:2] = h
    h = 4 * blur(F.conv2d(spread, weight.flip(2, 3)), 1)
    h = h + strength * torch.randn(B, 1, 2 * height, 2 * width, dtype=h.dtype)
    h = h + bias.view(1, -1, 1, 1)
    y_hat = conv(p, torch.where(h > 0, h, 0.2 * h) * 2 ** 0.5)
    assert next(p, None) is None
    return y_hat, features


def discriminator(params, x):
    """1x1, blocks that halve down to 4x4, 3x3, two linear layers; no minibatch deviation."""
    p = iter(params)
    x = conv(p, x)
    while x.shape[2] > 4:
        x = block(p, x, down=True)
    x = conv(p, x, padding=1).flatten(1)
    weight, bias = next(p).flatten(1), next(p)
    x = x @ weight.t() / weight.shape[1] ** 0.5 + bias
    x = torch.where(x > 0, x, 0.2 * x) * 2 ** 0.5
    weight, bias = next(p).flatten(1), next(p)
    assert next(p, None) is None
    return x @ weight.t() / weight.shape[1] ** 0.5 + bias


def test_generator_is_its_layer_table():
    nets, x = lively(sincut.build(tiny_args(), CPU)), noise(2, 3, 18, 20)
    up, = (m for m in nets.G.modules() if isinstance(m, sincut.StyleUp))
    for strength in (0.0, 0.7):
        torch.nn.init.constant_(up.noise, strength)
        torch.manual_seed(3)
        y_hat, features = nets.G(x)
        torch.manual_seed(3)
        naive, naive_features = generator(parameters(nets.G), x)
        close([y_hat, *features], [naive, *naive_features])
    close(nets.G.encode(x), naive_features)
    assert not torch.equal(nets.G(x)[0], nets.G(x)[0])  # new noise in every pass
    assert float(y_hat.detach().abs().max()) > 1        # no tanh


@pytest.mark.parametrize("tile", [16, 64])
def test_discriminator_is_its_layer_table(tile):
    nets = lively(sincut.build(tiny_args("--size", 64, "--tile", tile), CPU))
    x = noise(3, 3, tile, tile)
    close([nets.D(x)], [discriminator(parameters(nets.D), x)])


# ---- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("B", [2, 5])
def test_patch_nce_is_eq_3_6(B):
    """Digit by digit: the positive is a crop's own key, the negatives are those of the others."""
    z_hat, z = ([F.normalize(torch.randn(B, 1, 8, dtype=torch.double), dim=2) for _ in range(3)]
                for _ in "ab")
    layers = []
    for v, keys in zip(z_hat, z, strict=True):
        for b in range(B):
            e = [math.exp(float(v[b, 0] @ keys[n, 0]) / 0.3) for n in range(B)]
            layers.append(-math.log(e[b] / (e[b] + sum(e[:b]) + sum(e[b + 1:]))))
    assert float(sincut.patch_nce(z_hat, z, 0.3)) == pytest.approx(np.mean(layers), rel=1e-9)


def test_keys_get_no_gradient():
    v, key = (noise(4, 1, 8).requires_grad_() for _ in "ab")
    sincut.patch_nce([v], [key], 0.07).backward()
    assert v.grad.abs().sum() > 0 and key.grad is None


def test_chance_is_the_loss_of_answers_that_are_all_alike():
    alike = [torch.ones(3, 1, 256) / 16] * 3
    values = sincut.chance(tiny_args())
    assert values["NCE_X"] == values["NCE_Y"]
    assert values["NCE_X"] == pytest.approx(float(sincut.patch_nce(alike, alike, 0.07)), rel=1e-5)
    zero = [float(sincut.non_saturating(torch.zeros(2, 1), real)) for real in (True, False)]
    assert [values["L_GAN"], 2 * values["L_D"]] == pytest.approx([zero[0], sum(zero)])


def test_r1_against_a_known_gradient():
    """D(y) = sum a y^2 has the gradient 2 a y, and the penalty's own gradient in a is 4 a y^2."""
    y, a = noise(3, 2, 4, 4).requires_grad_(), noise(2, 4, 4).requires_grad_()
    penalty = sincut.r1_penalty((a * y ** 2).sum((1, 2, 3)).view(3, 1), y)
    close([penalty], [sum((2 * a * one).square().sum() / 2 for one in y) / 3])
    close(torch.autograd.grad(penalty, a), [4 * a * y.square().mean(0)])


def test_tiles_cut_a_crop_without_rest():
    x = noise(2, 3, 32, 48)
    expected = [x[b, :, i:i + 16, j:j + 16]
                for b in range(2) for i in (0, 16) for j in (0, 16, 32)]
    close([sincut.tiles(x, 16)], [torch.stack(expected)], 0, 0)
    close([sincut.tiles(x[..., :32], 32)], [x[..., :32]], 0, 0)


# ---- data ---------------------------------------------------------------------------------------


def as_bytes(crop):
    return common.to_pil(crop).tobytes()


def crops_of(picture, width, size):
    """Every crop, and every mirrored one, of a picture scaled to a width: {bytes: mirrored}."""
    scaled = picture.resize((width, round(width * picture.height / picture.width)), Image.BILINEAR)
    windows = [scaled.crop((i, j, i + size, j + size)) for i in range(scaled.width - size + 1)
               for j in range(scaled.height - size + 1)]
    return {ImageOps.mirror(w).tobytes(): True for w in windows} | {
        w.tobytes(): False for w in windows}


def test_crops_of_a_step_share_a_width_and_half_of_all_are_mirrored(folder):
    data = sincut.SinglePair(folder, tiny_args("--scale", 36, 40))
    mirrored, seen = [], set()
    for i in (0, 1):
        picture, widths = common.open_rgb(folder / f"train{'AB'[i]}/one.png"), []
        known = {w: crops_of(picture, w, 32) for w in range(36, 41)}
        for n in range(60):
            key = as_bytes(data[n][i])
            width, = (w for w, crops in known.items() if key in crops)
            widths.append(width)
            mirrored.append(known[width][key])
            seen.add(key)
        assert widths[::3] == widths[1::3] == widths[2::3]     # one a step
        assert set(widths) == {*known}
    assert 40 < sum(mirrored) < 80 and len(seen) > 100         # of 120
    assert all(torch.equal(a, b) for a, b in zip(data[7], data[7], strict=True))


def test_direction_and_pictures_smaller_than_a_crop(folder):
    data = sincut.SinglePair(folder, tiny_args("--scale", "4", "8"))
    other = sincut.SinglePair(folder, tiny_args("--scale", "4", "8", "--direction", "BtoA"))
    assert data[0][0].shape == (3, 32, 32)                 # never smaller than a crop
    known = crops_of(common.open_rgb(folder / "trainB/one.png"), 32, 32)
    assert as_bytes(data[0][1]) in known and as_bytes(other[0][0]) in known


# ---- the step -----------------------------------------------------------------------------------


def naive_step(nets, x, y, args, seed):
    """Losses and gradients of one step as paper and code word them, by transcriptions, tile by tile
    and crop by crop, every feature computed anew. Float64; (losses, {net: gradients})."""
    p = {name: parameters(getattr(nets, name)) for name in "GDH"}
    draw, places = rng(seed), []
    for height, width in ((32, 48), (16, 24), (16, 24)):   # one place a layer, for all crops
        places.append(int(torch.randint(height * width, (1,), generator=draw)))
    torch.manual_seed(seed)
    y_hat, y_same = generator(p["G"], x)[0], generator(p["G"], y)[0]

    def cut_up(pictures):
        return [pictures[b:b + 1, :, i:i + 16, j:j + 16] for b in range(len(pictures))
                for i in (0, 16) for j in (0, 16, 32)]

    def minus_log_D(pictures, real):
        """-log D or -log(1 - D), the mean over tiles."""
        logits = torch.cat([discriminator(p["D"], tile) for tile in cut_up(pictures)])
        return -(logits.sigmoid() if real else 1 - logits.sigmoid()).log().mean()

    def nce(source, output):
        total = 0
        for i, (keys, queries) in enumerate(zip(encoder(p["G"], source)[1],
                                                encoder(p["G"], output)[1], strict=True)):
            w1, b1, w2, b2 = p["H"][4 * i:4 * i + 4]
            rows = []
            for features in (queries, keys):
                vectors = features[:, :, places[i] // features.shape[3],
                                   places[i] % features.shape[3]]
                vectors = (vectors @ w1.t() + b1).relu() @ w2.t() + b2
                rows.append(vectors / (vectors.square().sum(1, keepdim=True).sqrt() + 1e-7))
            for b in range(len(source)):
                e = torch.stack([(rows[0][b] @ key.detach() / args.tau).exp() for key in rows[1]])
                total = total - (e[b] / e.sum()).log() / len(source)
        return total / 3

    R1 = 0
    for tile in cut_up(y):
        tile = tile.clone().requires_grad_()
        slope, = torch.autograd.grad(discriminator(p["D"], tile).sum(), tile, create_graph=True)
        R1 = R1 + slope.square().sum() / 2 / len(cut_up(y))
    losses = {"L_D": (minus_log_D(y, True) + minus_log_D(y_hat.detach(), False)) / 2, "R1": R1,
              "L_GAN": minus_log_D(y_hat, True), "NCE_X": nce(x, y_hat), "NCE_Y": nce(y, y_same),
              "L_identity": (y_same - y).abs().mean()}
    weights = {"L_GAN": 1, "NCE_X": args.lambda_X, "NCE_Y": args.lambda_Y,
               "L_identity": args.lambda_identity}
    L = sum(weight * losses[name] for name, weight in weights.items())
    grads = torch.autograd.grad(L, p["G"] + p["H"])
    return losses, {"D": torch.autograd.grad(losses["L_D"] + args.lambda_R1 * R1, p["D"]),
                    "G": grads[:len(p["G"])], "H": grads[len(p["G"]):]}


@pytest.mark.parametrize("B, flags", [(3, []), (2, ["--no-channels-last"])])
def test_step_is_the_objective(B, flags):
    """Eq. (3.5) to (3.9) and R1: losses and all gradients in float64, all weights apart."""
    args = tiny_args("--lambda-X", 3, "--lambda-Y", 0.7, "--lambda-identity", 1.3,
                     "--lambda-R1", 0.4, "--tau", 0.2, *flags)
    nets, seed = lively(sincut.build(args, CPU)), 3
    x, y = noise(B, 3, 32, 48), noise(B, 3, 32, 48)
    expected, grads = naive_step(nets, x, y, args, seed)
    torch.manual_seed(seed)
    losses = sincut.train_step(nets, x, y, args, rng(seed))
    assert list(losses) == list(expected)
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(float(value.detach()), rel=1e-9), name
    for name in "GDH":
        assert all(p.grad.any() for p in getattr(nets, name).parameters())
        close([p.grad for p in getattr(nets, name).parameters()], grads[name])


def test_g_is_judged_by_the_d_that_has_just_learnt():
    args = tiny_args()
    nets = sincut.build(args, CPU)
    nets.opt_D.param_groups[0]["lr"] = 0.1
    x, y = noise(3, 3, 32, 32, dtype=torch.float32), noise(3, 3, 32, 32, dtype=torch.float32)

    def judged(pictures):
        with torch.no_grad():
            return float(sincut.non_saturating(nets.D(sincut.tiles(pictures, 16)), True))

    y_hat = nets.G(x)[0].detach()
    before = judged(y_hat)
    L_GAN = float(sincut.train_step(nets, x, y, args, rng())["L_GAN"].detach())
    assert L_GAN == pytest.approx(judged(y_hat), rel=1e-3)
    assert abs(L_GAN - before) > 0.01 * before


@pytest.mark.parametrize("flags", [[], ["--amp"]])
def test_every_weight_learns_and_losses_are_formed_in_float32(flags, monkeypatch):
    def patch_nce(z_hat, z, tau):
        assert not torch.is_autocast_enabled("cpu")  # which would round v . v+ to three digits
        assert all(v.dtype == torch.float32 for v in [*z_hat, *z])
        return original(z_hat, z, tau)

    original = sincut.patch_nce
    monkeypatch.setattr(sincut, "patch_nce", patch_nce)
    args = tiny_args(*flags)
    nets = sincut.build(args, CPU)
    x, y = noise(3, 3, 32, 32, dtype=torch.float32), noise(3, 3, 32, 32, dtype=torch.float32)
    before = {name: parameters(getattr(nets, name)) for name in "GDH"}
    for step in range(3):
        losses = sincut.train_step(nets, x, y, args, rng(step))
        assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    for name, old in before.items():
        assert all(not torch.equal(a, b) for a, b in zip(old, getattr(nets, name).parameters(),
                                                         strict=True))


@pytest.mark.slow
def test_compile_does_not_compile_anew_at_every_step():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    args = tiny_args("--compile")
    nets = sincut.build(args, CPU)
    x, y = noise(3, 3, 32, 32, dtype=torch.float32), noise(3, 3, 32, 32, dtype=torch.float32)
    graphs = []
    for step in range(4):
        sincut.train_step(nets, x, y, args, rng(step))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2] == graphs[3]


# ---- runs ---------------------------------------------------------------------------------------


def test_what_train_applies(folder, tmp_path, monkeypatch):
    """All three rates: constant for half of the run, then falling to zero."""
    seen = []

    def train_step(nets, x, y, args, rng):
        seen.append([o.param_groups[0]["lr"] for o in (nets.opt_G, nets.opt_D, nets.opt_H)])
        assert x.shape == y.shape == (3, 3, 32, 32) and isinstance(rng, torch.Generator)
        return {"NCE_X": torch.tensor(1.0)}

    monkeypatch.setattr(sincut, "train_step", train_step)
    run("--data", folder, *TINY, "--steps", 20, "--out", tmp_path / "run", "--sample-every", 100)
    expected = [2e-3] * 10 + [2e-3 * (20 - step) / 11 for step in range(10, 20)]
    assert np.allclose(seen, [[rate] * 3 for rate in expected], rtol=1e-9)


def test_run_folder(trained):
    rows = (trained / "log.csv").read_text().splitlines()
    assert rows[0] == "step,L_D,R1,L_GAN,NCE_X,NCE_Y,L_identity,seconds" and len(rows) == 3
    assert json.loads((trained / "config.json").read_text())["tile"] == 16


def test_resumed_run_is_bit_identical(folder, tmp_path):
    flags = ["--data", folder, *TINY, "--steps", 4]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(sincut, lambda: run(*flags, "--out", tmp_path / "parts"))
    run(*flags, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 4
    assert_same(a["parts"], b["parts"])


# ---- translate and evaluate ---------------------------------------------------------------------


def test_translate_keeps_every_size(trained, tmp_path):
    sizes = odd_pictures(tmp_path / "in")
    run("--translate", tmp_path / "in", "--weights", trained / "last.pt", "--out", tmp_path / "out")
    assert {f.stem: Image.open(f).size for f in (tmp_path / "out").iterdir()} == sizes


def test_translate_is_g_with_the_seeds_noise(trained, folder, tmp_path):
    state = torch.load(trained / "last.pt", weights_only=True)
    noise_weight, = (key for key in state["parts"]["G"] if key.endswith("noise"))
    state["parts"]["G"][noise_weight].fill_(0.3)
    torch.save(state, tmp_path / "noisy.pt")
    run("--translate", folder / "trainA", "--weights", tmp_path / "noisy.pt", "--seed", 5,
        "--out", tmp_path / "out")
    x = common.to_tensor(common.open_rgb(folder / "trainA/one.png"))[None]
    torch.manual_seed(5)
    y_hat = generator(list(state["parts"]["G"].values()), x)[0][0].clamp(-1, 1)
    expected = ((y_hat + 1) * 127.5).round().permute(1, 2, 0).numpy()
    written = np.asarray(Image.open(tmp_path / "out/one.png"))
    assert np.abs(written - expected).max() <= 1 and written.std() > 5


def test_toy_run_and_evaluate_print_the_true_scores(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sincut, "data_folder", lambda args: drawn)
    run(*TINY, "--steps", 1, "--lr", 0, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "settings for toy data, not the paper's: size 32" in printed
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    run("--evaluate", "--weights", tmp_path / "run/last.pt")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(scores) == 3
    for line, score in zip(lines, scores, strict=True):
        assert line.startswith(f"{score['name']}: {score['value']:.4g} ") and line in printed


def test_a_generator_that_copies_scores_as_copying(drawn):
    def copies(x):
        return x, []
    copies.multiple = 2
    for score in sincut.truth_scores(copies, drawn, sincut.get_args(TINY), CPU):
        assert score["value"] == pytest.approx(score["trivial"]["copy the input"], abs=1e-3)


def test_user_errors_are_one_line(folder, trained, tmp_path, capsys):
    def fails(*flags):
        return error_of(capsys, sincut.main, *flags)
    line = fails("--data", tmp_path / "nowhere")
    assert "nowhere" in line and "trainA" in line
    several = noise_folder(tmp_path / "several")
    line = fails("--data", several, *TINY, "--steps", 1, "--out", tmp_path / "none")
    assert "several/trainA" in line and "one picture per domain, found 4" in line
    assert not (tmp_path / "none").exists()
    for flags in (["--tile", 48], ["--tile", 8], ["--size", 24], ["--size", 16, "--tile", 32],
                  ["--scale", 9, 3], ["--scale", 0, 3], ["--batch", 1], ["--batch", 0]):
        assert f"{flags[0]} {flags[1]}" in fails("--data", folder, *TINY, *flags)
    assert "last.pt" in fails("--data", folder, *TINY, "--resume", "--out", tmp_path / "none")
    assert "--weights" in fails("--translate", folder / "trainA")
    assert "one picture has no FID" in fails("--evaluate", "--weights", trained / "last.pt")
    assert "does not fit" in fails("--data", folder, *TINY, "--ngf", 2, "--steps", 5, "--out",
                                   trained, "--resume")
    torch.save({"model.1.weight": torch.zeros(1)}, tmp_path / "cut.pth")
    assert "generator released by the authors" in fails(
        "--translate", folder / "trainA", "--weights", tmp_path / "cut.pth")


def test_a_grid_shows_both_pictures_beside_their_translations():
    class Half(torch.nn.Module):
        multiple = 2

        def forward(self, x):
            return x / 2, []

    x, y = noise(1, 3, 32, 32).float(), noise(1, 3, 32, 32).float()
    columns = sincut.sample_columns(Half(), {"x": x, "y": y}, tiny_args())
    assert [*columns] == ["x", "G(x)", "y", "G(y)"]
    close([*columns.values()], [x, x / 2, y, y / 2])
