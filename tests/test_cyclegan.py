"""cyclegan.py: every equation against a plain transcription, and the script as its users run it."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import assert_same, error_of, interrupted, noise_folder, odd_pictures
from PIL import Image

import common
import cyclegan
import toy

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--load", "36", "--ngf", "4", "--ndf", "4", "--blocks", "2", "--batch", "2",
        "--pool", "3", "--workers", "0", "--device", "cpu", "--log-every", "1"]
CPU = torch.device("cpu")


def tiny_args(*flags):
    return cyclegan.get_args(["--data", ".", *TINY, *flags])


@pytest.fixture
def folder(tmp_path):
    return noise_folder(tmp_path / "data")


def run(*flags):
    return cyclegan.main([*map(str, flags)])


def run_fails(capsys, *flags):
    return error_of(capsys, cyclegan.main, *flags)


@pytest.fixture
def trained(folder, tmp_path):
    out = tmp_path / "run"
    run("--data", folder, *TINY, "--steps", 2, "--out", out)
    return out


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- configuration and networks ---------------------------------------------------------------


def test_paper_defaults():
    args = cyclegan.get_args(["--data", "."])
    assert (args.lambda_cyc, args.lambda_identity, args.pool) == (10, 0, 50)
    assert (args.lr, args.beta1, args.batch, args.epochs, args.decay_from) == (2e-4, .5, 1, 200, .5)
    assert (args.size, args.load, args.blocks, args.ngf, args.ndf) == (256, 286, 9, 64, 64)
    assert not args.antialias_G and not args.antialias_D
    args = cyclegan.get_args(["--data", ".", "--size", "128"])
    assert (args.blocks, args.load) == (6, 143)
    assert cyclegan.get_args(["--data", ".", "--size", "512"]).blocks == 9


def test_identity_loss_is_on_for_painting_to_photo():
    assert cyclegan.get_args(["--data", "monet2photo"]).lambda_identity == 5
    assert cyclegan.get_args(["--data", "x/vangogh2photo"]).lambda_identity == 5
    assert cyclegan.get_args(["--data", "horse2zebra"]).lambda_identity == 0
    args = cyclegan.get_args(["--data", "monet2photo", "--lambda-identity", "1"])
    assert args.lambda_identity == 1


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts_at_the_papers_widths():
    for flags in ([], ["--antialias-G", "--antialias-D"]):
        m = cyclegan.build(cyclegan.get_args(["--data", ".", *flags]), CPU)
        counts = [count(getattr(m, name)) for name in ("G", "F", "D_X", "D_Y")]
        assert counts == [11_378_179] * 2 + [2_764_737] * 2 and sum(counts) == 28_285_832
        assert sum(len(g["params"]) for g in m.opt_G.param_groups) == 2 * len([*m.G.parameters()])
    assert count(cyclegan.ResnetGenerator(64, 6)) == 7_837_699


@pytest.mark.parametrize("antialias", [False, True])
def test_generator_shapes(antialias):
    G = cyclegan.ResnetGenerator(4, 2, antialias)
    for shape in ((1, 3, 64, 48), (2, 3, 32, 36)):
        y = G(torch.randn(shape))
        assert y.shape == shape and y.abs().max() <= 1


def test_discriminators_see_70_pixels_in_30_by_30_patches():
    m = cyclegan.build(cyclegan.get_args(["--data", "."]), CPU)
    assert m.D_X(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


# ---- losses -----------------------------------------------------------------------------------


def test_cycle_loss_is_eq_3_2():
    x, x_cyc = (torch.rand(2, 3, 4, 5, dtype=torch.double) for _ in "xy")
    total = sum(abs(float(x[b, c, i, j] - x_cyc[b, c, i, j]))
                for b in range(2) for c in range(3) for i in range(4) for j in range(5))
    assert float(cyclegan.cycle_loss(x, x_cyc)) == pytest.approx(total / 120)
    assert float(cyclegan.cycle_loss(x, x)) == 0


def test_identity_loss_of_identity_generators_is_zero():
    y = torch.rand(2, 3, 8, 8)
    same = nn.Identity()
    terms, L, y_hat = cyclegan.half_objective(y, y, same, same, None, 0, 0, 5.0)
    assert terms[:2] == (None, None) and float(terms[2]) == 0 == float(L)
    assert torch.equal(y_hat, y)
    off = cyclegan.identity_loss(y, y + 0.25)
    assert float(off) == pytest.approx(0.25)


def test_gan_losses_are_those_of_sec_3_2_4():
    D = nn.Conv2d(3, 1, 3).double()
    y, y_hat = (torch.randn(2, 3, 6, 6, dtype=torch.double, requires_grad=True) for _ in "xy")
    expected = 0.5 * (((D(y) - 1)**2).mean() + (D(y_hat)**2).mean())
    L = cyclegan.discriminator_loss(D, y.detach(), y_hat)
    torch.testing.assert_close(L, expected)
    L.backward()
    assert y_hat.grad is None  # detached: D's loss is none of G's business
    terms, L, _ = cyclegan.half_objective(y, y, nn.Identity(), None, D, 1.0, 0, 0)
    torch.testing.assert_close(terms[0], ((D(y) - 1)**2).mean())
    torch.testing.assert_close(L, terms[0])


# ---- the buffer -------------------------------------------------------------------------------


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


def test_buffer_of_size_zero_passes_through():
    pool = cyclegan.HistoryBuffer(0, CPU)
    assert torch.equal(pool.exchange(numbered(1, 2), rng()), numbered(1, 2))
    assert pool.pictures == []


def test_buffer_is_not_changed_from_outside():
    pool = cyclegan.HistoryBuffer(2, CPU)
    fake = numbered(1).clone()
    pool.exchange(fake, rng())
    fake.zero_()
    assert float(pool.pictures[0].sum()) == 12


# ---- the step ---------------------------------------------------------------------------------


def double(m):
    for net in (m.G, m.F, m.D_X, m.D_Y):
        net.double()
        common.init_weights(net, "normal", 0.1)  # livelier than 0.02
    for optimiser in (m.opt_G, m.opt_D):
        optimiser.param_groups[0]["lr"] = 0.0    # the step leaves its gradients behind
    return m


def naive_step(m, x, y, args):
    """Losses and gradients as the paper words them, one picture at a time, all in one sum."""
    G, F, D_X, D_Y = (copy.deepcopy(net) for net in (m.G, m.F, m.D_X, m.D_Y))
    B, left, sums = len(x), cyclegan.ABLATIONS[args.ablation], {}

    def add(name, value):
        sums[name] = sums.get(name, 0) + value / B

    for a, b in ((x[i:i + 1], y[i:i + 1]) for i in range(B)):
        if "GAN" in left:
            add("GAN_G", ((D_Y(G(a)) - 1)**2).mean())
            add("GAN_F", ((D_X(F(b)) - 1)**2).mean())
            add("D_Y", 0.5 * (((D_Y(b) - 1)**2).mean() + (D_Y(G(a).detach())**2).mean()))
            add("D_X", 0.5 * (((D_X(a) - 1)**2).mean() + (D_X(F(b).detach())**2).mean()))
        if "forward" in left:
            add("cyc_x", (F(G(a)) - a).abs().mean())
        if "backward" in left:
            add("cyc_y", (G(F(b)) - b).abs().mean())
        if args.lambda_identity:
            add("identity_y", (G(b) - b).abs().mean())
            add("identity_x", (F(a) - a).abs().mean())
    weights = {"cyc_x": args.lambda_cyc, "cyc_y": args.lambda_cyc, "GAN_G": 1, "GAN_F": 1,
               "identity_x": args.lambda_identity, "identity_y": args.lambda_identity}
    L = sum(weights[name] * value for name, value in sums.items() if name in weights)
    grads = {"G": torch.autograd.grad(L, [*G.parameters(), *F.parameters()], allow_unused=True)}
    if "GAN" in left:
        grads["D"] = torch.autograd.grad(sums["D_X"] + sums["D_Y"],
                                         [*D_X.parameters(), *D_Y.parameters()])
    return sums, grads


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("flags", [[], ["--lambda-identity", "5"], ["--ablation", "cycle"],
                                   ["--ablation", "gan"], ["--ablation", "gan+forward"],
                                   ["--ablation", "gan+backward", "--no-channels-last"],
                                   ["--antialias-G", "--antialias-D"]])
def test_step_equals_the_naive_one(B, flags):
    args = tiny_args("--batch", str(B), *flags)
    m = double(cyclegan.build(args, CPU))
    x, y = (torch.rand(B, 3, 32, 40, dtype=torch.double) * 2 - 1 for _ in "xy")
    expected, grads = naive_step(m, x, y, args)
    losses = cyclegan.train_step(m, x, y, args, rng())
    assert set(losses) == set(expected)
    for name in expected:
        assert float(losses[name]) == pytest.approx(float(expected[name].detach()), rel=1e-9), name
    for nets, names in (("G", "GF"), ("D", ("D_X", "D_Y"))):
        if nets in grads:
            params = [p for name in names for p in getattr(m, name).parameters()]
            for p, g in zip(params, grads[nets], strict=True):
                torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10)


def test_gradient_routing():
    args = tiny_args("--lambda-identity", "5")
    m = cyclegan.build(args, CPU)
    x, y = cyclegan.random_batch(args, CPU)
    seen = []

    def average(*nets):
        seen.append((nets, {name: [p.grad is not None for p in getattr(m, name).parameters()]
                            for name in ("G", "F", "D_X", "D_Y")}))

    cyclegan.train_step(m, x, y, args, rng(), average)
    (first, grads), (second, _) = seen
    assert first == (m.G, m.F) and second == (m.D_X, m.D_Y)
    assert all(grads["G"] + grads["F"]) and not any(grads["D_X"] + grads["D_Y"])
    assert all(p.requires_grad for net in (m.D_X, m.D_Y) for p in net.parameters())


def test_d_learns_from_the_buffer():
    """With a buffer full of black pictures D_Y meets some of them instead of y_hat."""
    args = tiny_args("--batch", "1", "--pool", "1")
    x, y = cyclegan.random_batch(args, CPU)
    seen = set()
    for seed in range(8):
        m = cyclegan.build(args, CPU)
        m.pool_Y.pictures = [torch.full((3, 32, 32), -1.0)]
        with torch.no_grad():
            fresh = cyclegan.discriminator_loss(m.D_Y, y, m.G(x))
            old = cyclegan.discriminator_loss(m.D_Y, y, m.pool_Y.pictures[0][None])
        D_Y = cyclegan.train_step(m, x, y, args, rng(seed))["D_Y"]
        is_old = bool((D_Y - old).abs() < (D_Y - fresh).abs())
        torch.testing.assert_close(D_Y, old if is_old else fresh)
        seen.add(is_old)
    assert seen == {True, False}


@pytest.mark.parametrize("flags", [["--amp"], ["--ablation", "cycle"], ["--ablation", "gan"]])
def test_variants_train(flags):
    args = tiny_args(*flags)
    m = cyclegan.build(args, CPU)
    x, y = cyclegan.random_batch(args, CPU)
    before = {name: [p.clone() for p in getattr(m, name).parameters()]
              for name in ("G", "F", "D_X", "D_Y")}
    for step in range(3):
        losses = cyclegan.train_step(m, x, y, args, rng(step))
        assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    for name, old in before.items():
        moved = [not torch.equal(a, b) for a, b in zip(old, getattr(m, name).parameters(),
                                                       strict=True)]
        assert all(moved) if name in "GF" or "cycle" not in flags else not any(moved)


def test_rate_is_constant_then_falls_to_zero():
    rates = [cyclegan.rate(epoch, 200, 0.5) for epoch in range(200)]
    assert rates[:101] == [1.0] * 100 + [100 / 101]
    assert rates[-1] == pytest.approx(1 / 101)
    assert np.allclose(np.diff(rates[100:]), -1 / 101)


# ---- runs -------------------------------------------------------------------------------------


def test_run_folder(trained):
    files = {str(f.relative_to(trained)) for f in trained.rglob("*") if f.is_file()}
    assert files == {"config.json", "log.csv", "index.html", "last.pt", "result.json",
                     "samples/step_000000.png", "samples/step_000002.png"}
    rows = (trained / "log.csv").read_text().splitlines()
    assert rows[0] == "step,GAN_G,cyc_x,GAN_F,cyc_y,D_Y,D_X,seconds" and len(rows) == 3
    grid = Image.open(trained / "samples/step_000002.png")
    assert grid.width == 6 * (2 * 48 + 4) + 4  # x G(x) F(G(x)) y F(y) G(F(y)), magnified twice


@pytest.mark.parametrize("flags", [[], ["--lambda-identity", "5", "--ablation", "gan+forward"]])
def test_resumed_run_is_bit_identical(folder, tmp_path, flags):
    flags = ["--data", folder, *TINY, *flags, "--steps", 5]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(cyclegan, lambda: run(*flags, "--out", tmp_path / "parts"), step=3)
    run(*flags, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 5
    assert len(a["parts"]["pool_Y"]["pictures"]) == 3  # full, so that old pictures were shown
    assert_same(a["parts"], b["parts"])


def test_two_processes_equal_one_with_the_doubled_batch(folder, tmp_path):
    """With no buffer, since every process has its own."""
    flags = ["--data", str(folder), *TINY, "--pool", "0", "--steps", "3", "--epochs", "1"]
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", "cyclegan.py", *flags, "--out",
                          str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr
    run(*flags, "--batch", 4, "--out", tmp_path / "one")
    one, two = (torch.load(tmp_path / n / "last.pt", weights_only=True)["parts"]
                for n in ("one", "two"))
    start = cyclegan.build(cyclegan.get_args(flags), CPU)
    for net in ("G", "F", "D_X", "D_Y"):
        moved, apart = 0.0, 0.0
        for key, was in getattr(start, net).state_dict().items():
            if "bias" not in key:  # a bias before a norm gets rounding errors for a gradient
                moved += float((one[net][key] - was).abs().sum())
                apart += float((one[net][key] - two[net][key]).abs().sum())
        assert moved > 0 and apart < 0.01 * moved, net


def test_ablation_all_writes_a_table_and_strips(tmp_path, monkeypatch, capsys):
    toy.horse2zebra(tmp_path / "toy", n=6, size=32, n_test=6)
    monkeypatch.setattr(cyclegan, "data_folder", lambda args: tmp_path / "toy")
    run(*TINY, "--ablation", "all", "--steps", 2, "--out", tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        *cyclegan.ABLATIONS, "ablation.md", "ablation_x.png", "ablation_y.png"}
    table = (tmp_path / "run/ablation.md").read_text().splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in table] == [
        "variant", "---|---|---|---|---|---|---", "cycle alone", "GAN alone", "GAN + forward",
        "GAN + backward", "CycleGAN", "copy the input", "mean coat colour", "mean colour"]
    assert table[-1] in capsys.readouterr().out
    result = json.loads((tmp_path / "run/gan/result.json").read_text())
    assert f"| {result['scores'][0]['value']:.3g} |" in table[3]
    config = json.loads((tmp_path / "run/gan/config.json").read_text())
    assert config["ablation"] == "gan"
    strip = Image.open(tmp_path / "run/ablation_y.png")
    assert strip.width == 6 * (128 + 4) + 4  # the input and five variants


def test_ablation_all_of_photographs_has_no_truth(folder, tmp_path):
    run("--data", folder, *TINY, "--ablation", "all", "--steps", 1, "--out", tmp_path / "run")
    assert (tmp_path / "run/ablation_x.png").exists()
    assert not (tmp_path / "run/ablation.md").exists()
    whole = torch.load(tmp_path / "run/gan/last.pt", weights_only=True)
    shutil.rmtree(tmp_path / "run/gan")                      # as if stopped after the first variant
    run("--data", folder, *TINY, "--ablation", "all", "--steps", 1, "--out", tmp_path / "run",
        "--resume")
    assert {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()} == {*cyclegan.ABLATIONS}
    for net in ("G", "F"):
        again = torch.load(tmp_path / "run/gan/last.pt", weights_only=True)
        assert_same(again["parts"][net], whole["parts"][net])


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
        loaded = cyclegan.load_generator(args, CPU)
        assert_same(dict(loaded.state_dict()), dict(parts[net]))


def released_state(G, antialias=False, statistics=False):
    """G's weights under the keys of the authors' latest_net_G_A.pth."""
    convs = [layer for layer in G.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    blocks = sum(isinstance(layer, cyclegan.ResnetBlock) for layer in G.modules())
    first, down = (12, [1, 4, 8]) if antialias else (10, [1, 4, 7])
    body = [f"{first + b}.conv_block.{i}" for b in range(blocks) for i in (1, 5)]
    after = first + blocks
    up = [after + 1, after + 5, after + 9] if antialias else [after, after + 3, after + 7]
    state = {}
    for name, conv in zip([*down, *body, *up], convs, strict=True):
        state[f"model.{name}.weight"], state[f"model.{name}.bias"] = conv.weight, conv.bias
        if antialias and name in (4, 8):
            state[f"model.{name + 3}.filt"] = torch.ones(conv.out_channels, 1, 3, 3)
        if statistics and name == 1:
            state["model.2.running_mean"] = torch.zeros(conv.out_channels)
            state["model.2.running_var"] = torch.ones(conv.out_channels)
    return {key: value.detach().clone() for key, value in state.items()}


def test_released_key_names_at_full_width():
    assert {"model.1.weight", "model.7.weight", "model.10.conv_block.1.weight",
            "model.18.conv_block.5.bias", "model.19.weight", "model.22.bias",
            "model.26.weight"} < released_state(cyclegan.ResnetGenerator()).keys()


@pytest.mark.parametrize("antialias, statistics", [(False, False), (False, True), (True, False)])
def test_loads_the_authors_generators(folder, tmp_path, antialias, statistics):
    G = cyclegan.ResnetGenerator(4, 3, antialias)
    path = tmp_path / "latest_net_G_A.pth"
    torch.save(released_state(G, antialias, statistics), path)
    run("--translate", folder / "testA/0.png", "--weights", path, "--out", tmp_path / "out")
    x = common.to_tensor(common.open_rgb(folder / "testA/0.png"))[None]
    expected = np.asarray(common.to_pil(G(x)[0]), dtype=int)
    assert np.abs(np.asarray(Image.open(tmp_path / "out/0.png")) - expected).max() <= 1


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_evaluate_prints_fid_of_the_direction(trained, folder, monkeypatch, capsys, direction):
    seen = {}

    def fid(fakes, reals, device, weights):
        seen.update(fakes=torch.cat(list(fakes)), reals=torch.cat(list(reals)), weights=weights)
        return 12.5

    monkeypatch.setattr(common, "fid", fid)
    run("--evaluate", "--weights", trained / "last.pt", "--data", folder, "--fid-weights", "w.pth",
        "--direction", direction)
    assert "FID (4 translated, 4 real, 299x299): 12.5" in capsys.readouterr().out
    dark = seen["reals"].mean() < -0.2
    assert bool(dark) == (direction == "AtoB")  # B is the darker domain


def test_evaluate_on_toy_data(tmp_path, monkeypatch, capsys):
    toy.horse2zebra(tmp_path / "toy", n=4, size=32, n_test=4)
    monkeypatch.setattr(cyclegan, "data_folder", lambda args: tmp_path / "toy")
    run(*TINY, "--steps", 1, "--out", tmp_path / "run")
    trained = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    for direction, first in (("AtoB", 0), ("BtoA", 3)):
        capsys.readouterr()
        run("--evaluate", "--weights", tmp_path / "run/last.pt", "--direction", direction)
        assert f"coat error: {trained[first]['value']:.4g} " in capsys.readouterr().out


def test_user_errors_are_one_line(folder, trained, tmp_path, capsys):
    line = run_fails(capsys, "--data", tmp_path / "nowhere")
    assert "nowhere" in line and "trainA" in line
    assert "--size 34" in run_fails(capsys, "--data", folder, *TINY, "--size", 34)
    assert "--pool -1" in run_fails(capsys, "--data", folder, *TINY, "--pool", -1)
    assert "--weights" in run_fails(capsys, "--translate", folder / "testA")
    torch.save({"model.1.weight": torch.zeros(4, 3, 7, 7)}, tmp_path / "part.pth")
    assert "released" in run_fails(capsys, "--translate", folder / "testA/0.png", "--weights",
                                   tmp_path / "part.pth")
    state = torch.load(trained / "last.pt", weights_only=True)
    torch.save(state | {"method": "cut"}, tmp_path / "other.pt")
    assert "cut.py" in run_fails(capsys, "--evaluate", "--weights", tmp_path / "other.pt")
    for side in "AB":
        for i in (1, 2, 3):
            (folder / f"test{side}/{i}.png").unlink()
    assert "two or more" in run_fails(capsys, "--evaluate", "--data", folder,
                                      "--weights", trained / "last.pt")
