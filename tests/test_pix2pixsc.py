"""pix2pixsc.py: every equation against a plain transcription, pairs, and the script in use."""
# ruff: noqa: E741 (I is the paper's name for the exemplar)

import itertools
import json
import random
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from helpers import assert_moved_alike, assert_same, error_of, interrupted, two_processes
from PIL import Image
from transcriptions import close, instance_norm, parameters, reflect

import common
import pix2pixsc as sc
from lab import bench, exemplars, figures, metrics, released, toy, variants
from lab.toy import clips

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--ngf", "2", "--ndf", "2", "--blocks", "1", "--downs", "2", "--batch", "2",
        "--vgg", "random", "--vgg-layers", "3", "--workers", "0", "--device", "cpu", "--log-every",
        "1", "--exemplars", "1"]
SUFFIX = {"ids": "png", "picture": "png", "landmarks": "txt"}
CPU = torch.device("cpu")
NAMES = ("G", "D_R", "D_SC")
run = lambda *flags: sc.main([*map(str, flags)])  # noqa: E731


def tiny_args(*flags):
    return sc.get_args(["--data", ".", *TINY, "--height", "32", "--labels", "3", *flags])


def write_face(path, rng, w=40, h=40):
    """68 plausible landmarks: a jaw, and the rest inside of it."""
    t = np.linspace(0, np.pi, 17)
    jaw = np.stack([w / 2 - 0.4 * w * np.cos(t), h * (0.4 + 0.5 * np.sin(t))], 1)
    rest = rng.uniform(0.3, 0.7, (51, 2)) * (w, h)
    np.savetxt(path, np.concatenate([[[w, h]], jaw, rest]), fmt="%.3f")


def write_data(root, kind="ids", flat=False, clips=("a", "b_c", "d"), frames=4):
    """Small noise clips, each around its own brightness, with label maps of three classes."""
    rng = np.random.default_rng(0)
    for split, (c, clip), f in itertools.product(("train", "test"), enumerate(clips),
                                                 range(frames)):
        image, label = ((root / f"{split}_{what}" / (f"{clip}_{f}" if flat else f"{clip}/{f}"))
                        for what in ("img", "label"))
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(60 * c, 60 * c + 80, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"{image}.png")
        if kind == "landmarks":
            write_face(f"{label}.txt", rng)
        elif kind == "picture":
            Image.fromarray(noise[::-1].copy()).save(f"{label}.png")
        else:
            ids = np.kron(rng.integers(0, 3, (9, 10), dtype=np.uint8), np.ones((4, 4), np.uint8))
            Image.fromarray(ids).save(f"{label}.png")
    return root


@pytest.fixture(scope="module")
def noise_data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture(scope="module")
def trained(noise_data, tmp_path_factory):
    """A run of two steps, with 3 labels counted and a height of 28."""
    out = tmp_path_factory.mktemp("run") / "run"
    run("--data", noise_data, *TINY, "--steps", 2, "--out", out)
    return out


@pytest.fixture(scope="module")
def toy_clips(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "clips"
    toy.draw("clips", out, n=3, size=32, n_test=2)
    return out


def batch_of(args, dtype=torch.float32):
    """A mixed batch: x, z, F_I, I, y_S, y_N, consistent."""
    args.height = args.height or args.size
    return [t.to(dtype) if t.is_floating_point() else t for t in bench.clip_batch(args, CPU)]


# ---- configuration and networks -------------------------------------------------------------


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("labels, of_G, of_D", [(15, 182_537_347, 2_780_097),
                                                (23, 182_587_523, 2_788_289),
                                                (42, 182_706_691, 2_807_745)])
def test_parameter_counts_and_shapes_of_the_papers_three_tasks(labels, of_G, of_D):
    with torch.device("meta"):
        assert count(sc.Generator(labels)) == of_G
        D_R, D_SC = sc.Discriminator(labels + 3), sc.Discriminator(6)
        assert (count(D_R), count(D_SC)) == (of_D, 2_767_809)
        y = torch.rand(1, 3, 256, 256)
        logits, maps = D_R(torch.rand(1, labels, 256, 256), y, features=True)
        assert logits.shape == D_SC(y, y).shape == (1, 1, 35, 35)
        assert [tuple(f.shape[1:]) for f in maps] == [(64, 129, 129), (128, 65, 65), (256, 33, 33),
                                                      (512, 34, 34)]
        street = torch.rand(1, 3, 144, 256)
        assert D_SC(street, street).shape == (1, 1, 21, 35)


def test_paper_defaults():
    args = sc.get_args(["--data", "."])
    assert (args.lambda_1, args.lambda_2, args.T, args.exemplars) == (10, 10, 10, 5)
    assert (args.lr, args.beta1, args.batch, args.size, args.same_style) == (2e-4, 0.5, 1, 256, 0.3)
    assert (args.ngf, args.ndf, args.blocks, args.downs, args.vgg_layers) == (64, 64, 9, 4, 5)
    assert (args.w, args.schedule, args.vgg, args.vgg_resize) == ("release", "paper", "imagenet", 0)
    assert [sc.get_args(["--data", ".", "--label-kind", kind]).labels
            for kind in ("ids", "picture", "landmarks")] == [None, 3, 15]
    nets = sc.build(tiny_args("--ngf", "16", "--downs", "3"), CPU)
    for optimiser in (nets.opt_G, nets.opt_D):
        group, = optimiser.param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.5, 0.999), 1e-8)
    assert sc.get_args([]).lambda_1 == 10  # no term of Eq. (7) is off in the toy preset
    assert set(sc.TOY) - set(vars(args)) == set()


def test_weights_start_as_in_appendix_c_and_biases_as_in_the_code():
    nets = sc.build(tiny_args("--ngf", "16", "--downs", "3"), CPU)
    for name in NAMES:
        net = getattr(nets, name)
        weights = torch.cat([p.detach().flatten() for p in net.parameters() if p.dim() == 4])
        assert abs(float(weights.mean())) < 1e-3 and float(weights.std()) == pytest.approx(
            0.02, rel=0.05)
        for layer in net.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.bias.numel() > 8:
                bound = layer.weight[0].numel() ** -0.5             # U(+-1 / sqrt(fan in))
                assert 0.3 * bound < float(layer.bias.detach().abs().mean()) < 0.7 * bound


def generator(params, x, downs, blocks):
    """App. B.1, with the code's paddings: reflected at stride 1, zeros where it samples down."""
    p = iter(params)

    def conv(x, **options):
        return nnf.conv2d(x, next(p), next(p), **options)

    h = instance_norm(conv(reflect(x, 3))).relu()                           # c7s1-64
    for _ in range(downs):                                                  # d128 ... d1024
        h = instance_norm(conv(h, stride=2, padding=1)).relu()
    for _ in range(blocks):                                                 # R1024
        h = h + instance_norm(conv(reflect(instance_norm(conv(reflect(h, 1))).relu(), 1)))
    for _ in range(downs):                                                  # u512 ... u64
        h = nnf.conv_transpose2d(h, next(p), next(p), stride=2, padding=1, output_padding=1)
        h = instance_norm(h).relu()
    y = conv(reflect(h, 3)).tanh()                                          # c7s1-3
    assert next(p, None) is None
    return y


def discriminator(params, x):
    """App. B.2 with the code's strides 2, 2, 2, 1, 1 and a padding of 2."""
    p = iter(params)
    for layer, stride in enumerate((2, 2, 2, 1)):                           # C64-C128-C256-C512
        x = nnf.conv2d(x, next(p), next(p), stride=stride, padding=2)
        x = nnf.leaky_relu(instance_norm(x) if layer > 0 else x, 0.2)
    x = nnf.conv2d(x, next(p), next(p), padding=2)
    assert next(p, None) is None
    return x


def vgg_maps(V, x, n):
    """relu1_1, relu2_1, ... of VGG-19: 2, 2, 4, 4, 4 convolutions, then pooled."""
    p, maps = iter(V.features.state_dict().values()), []
    for convolutions in (2, 2, 4, 4, 4)[:n]:
        for i in range(convolutions if len(maps) < n - 1 else 1):
            x = nnf.conv2d(x, next(p), next(p), padding=1).relu()
            maps += [x] if i == 0 else []
        x = nnf.max_pool2d(x, 2, ceil_mode=True)
    return maps


def lively(nets):
    """Float64, weights that saturate nothing, and rates of 0: a step leaves its gradients."""
    for net in (nets.G, nets.D_R, nets.D_SC, nets.V):
        net.double()
        if net is not nets.V:
            common.init_weights(net, "normal", 0.15)
    for optimiser in (nets.opt_G, nets.opt_D):
        optimiser.param_groups[0]["lr"] = 0.0
    return nets


@pytest.mark.parametrize("downs", [2, 3])
def test_networks_are_their_layer_tables(downs):
    args = tiny_args("--blocks", "2", "--downs", str(downs))
    nets, (x, z, F_I, I, *_) = lively(sc.build(args, CPU)), batch_of(args, torch.double)
    close([nets.G(x, F_I, I)],
          [generator(parameters(nets.G), torch.cat([x, F_I, I], 1), downs, 2)])
    close([nets.D_R(x, z)], [discriminator(parameters(nets.D_R), torch.cat([x, z], 1))])
    close([nets.D_SC(z, I)], [discriminator(parameters(nets.D_SC), torch.cat([z, I], 1))])
    close(nets.V(z).values(), vgg_maps(nets.V, z, 3))


def test_generator_cannot_see_a_shift_of_all_of_I():
    """What the docstring says: the first normalisation removes it."""
    G = sc.Generator(3, 4, 2, 1).double()
    x, F_I, I = (torch.rand(1, c, 16, 16, dtype=torch.double) for c in (3, 3, 3))
    shift = torch.tensor([0.3, -0.2, 0.1], dtype=torch.double).view(1, 3, 1, 1)
    torch.testing.assert_close(G(x, F_I, I), G(x, F_I, I + shift), rtol=1e-4, atol=1e-4)
    assert (G(x, F_I, I) - G(x, F_I, 2 * I)).abs().max() > 1e-2


# ---- losses ---------------------------------------------------------------------------------


def test_semantic_weights_are_those_of_all_five_layers_however_many_are_used():
    """Fig. 3: 1/M_i relative to M_5, by the shapes of VGG's own maps."""
    V = common.VGG(sc.TAPS, "random", normalise=False)
    M = [f[0].numel() for f in V(torch.zeros(1, 3, 48, 64)).values()]
    consistent = torch.tensor([True, False])
    for n in (5, 3, 2, 1):
        deep = torch.tensor([M[4] / m for m in M[:n]])
        assert torch.equal(deep, torch.tensor([1 / 32, 1 / 16, 1 / 8, 1 / 4, 1])[:n])
        flags = ["--vgg-layers", str(n)]
        paper = sc.semantic_weights(consistent, tiny_args("--w", "paper", *flags))
        assert torch.equal(paper, torch.stack([torch.ones(n), deep]))
        code = sc.semantic_weights(consistent, tiny_args(*flags))
        assert torch.equal(code, torch.stack([deep + 2, deep]))


def test_chance_is_what_undecided_ds_get():
    half, third = torch.full((1, 1, 3, 3), 1 / 2), torch.full((1, 1, 3, 3), 1 / 3)
    one, zero = (float(sc.lsgan(half, t)) for t in (1.0, 0.0))
    good, bad = (float(sc.lsgan(third, t)) for t in (1.0, 0.0))
    assert sc.CHANCE == {"L_StdAdv": one, "L_D_R": (one + zero) / 2, "L_SCAdv": pytest.approx(good),
                         "L_D_SC": pytest.approx((good + 2 * bad) / 2)}
    for other in (0.2, 0.5):  # no constant does better with one good pair in three
        other = torch.full((1, 1, 3, 3), other)
        assert (sc.lsgan(other, 1.0) + 2 * sc.lsgan(other, 0.0)) / 2 > (good + 2 * bad) / 2


# ---- the step -------------------------------------------------------------------------------


def naive_step(nets, batch, args, lambda_1):
    """Losses and gradients as the paper words them, one sample at a time, by transcriptions."""
    p = {name: parameters(getattr(nets, name)) for name in NAMES}
    sums = dict.fromkeys(("L_StdAdv", "L_SCAdv", "L_SC", "L_D_R", "L_D_SC"), 0)
    n = len(batch[0])

    def D(name, a, b):
        return discriminator(p[name], torch.cat([a, b], 1))

    for x, z, F_I, I, y_S, y_N, consistent in zip(*(t.split(1) for t in batch), strict=True):
        y_hat = generator(p["G"], torch.cat([x, F_I, I], 1), args.downs, args.blocks)
        shown = y_hat.detach()
        sums["L_StdAdv"] += ((D("D_R", x, y_hat) - 1)**2).mean() / n
        sums["L_SCAdv"] += ((D("D_SC", y_hat, I) - 1)**2).mean() / n
        sums["L_D_R"] += (((D("D_R", x, z) - 1)**2).mean() + (D("D_R", x, shown)**2).mean()) / 2 / n
        sums["L_D_SC"] += (((D("D_SC", y_S, I) - 1)**2).mean() + (D("D_SC", y_N, I)**2).mean()
                           + (D("D_SC", shown, I)**2).mean()) / 2 / n
        if args.vgg_resize:
            y_hat, z = (nnf.interpolate(y, (224, 224), mode="bilinear") for y in (y_hat, z))
        for i, (a, b) in enumerate(zip(vgg_maps(nets.V, y_hat, args.vgg_layers),
                                       vgg_maps(nets.V, z, args.vgg_layers), strict=True)):
            w = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)[i]
            if consistent:
                w = 1 if args.w == "paper" else w + 2
            sums["L_SC"] += w * (a - b).abs().sum() / a.numel() / n
    if not args.lambda_1:
        del sums["L_SCAdv"], sums["L_D_SC"]
    L = (sums["L_StdAdv"] + lambda_1 * sums.get("L_SCAdv", 0) + args.lambda_2 * sums["L_SC"])
    grads = {"G": torch.autograd.grad(L, p["G"]), "D_R": torch.autograd.grad(sums["L_D_R"],
                                                                              p["D_R"])}
    if args.lambda_1:
        grads["D_SC"] = torch.autograd.grad(sums["L_D_SC"], p["D_SC"])
    return sums, grads


@pytest.mark.parametrize("B, lambda_1, flags", [
    (3, 7.0, ["--lambda-2", "3", "--vgg-layers", "5"]),
    (2, 2.0, ["--lambda-2", "30", "--w", "paper", "--channels-last"]),
    (1, 0.0, ["--lambda-2", "3"]),                                          # the first phase
    (2, 0.0, ["--lambda-2", "3", "--lambda-1", "0"]),
    (1, 7.0, ["--lambda-2", "3", "--vgg-layers", "1", "--vgg-resize"])])
def test_step_is_the_objective(B, lambda_1, flags):
    """Eq. (4) to (8): losses and all gradients in float64; consistent pairs and others."""
    args = tiny_args("--batch", str(B), *flags)
    nets, batch = lively(sc.build(args, CPU)), batch_of(args, torch.double)
    expected, grads = naive_step(nets, batch, args, lambda_1)
    losses = sc.train_step(nets, *batch, args, lambda_1)
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-6), name
    for name, naive in grads.items():
        close([q.grad for q in getattr(nets, name).parameters()], naive, rtol=1e-5, atol=1e-9)
    assert args.lambda_1 or all(q.grad is None for q in nets.D_SC.parameters())


def test_step_without_semantic_consistency():
    args = tiny_args("--lambda-2", "0")
    nets, batch = sc.build(args, CPU), batch_of(args)
    assert not list(nets.V.parameters()) and set(sc.train_step(nets, *batch, args, 10.0)) == {
        "L_StdAdv", "L_SCAdv", "L_D_R", "L_D_SC"}


@pytest.mark.parametrize("flags", [[], ["--amp"], ["--label-kind", "landmarks", "--labels", "15"],
                                   ["--channels-last", "--batch", "1"]])
def test_every_weight_learns_and_losses_are_float32(flags):
    """D_SC too while lambda_1 is 0 (the first phase)."""
    args = tiny_args(*flags)
    nets, batch = sc.build(args, CPU), batch_of(args)
    before = {name: parameters(getattr(nets, name)) for name in NAMES}
    for lambda_1 in (0.0, 10.0):
        losses = sc.train_step(nets, *batch, args, lambda_1)
        assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())
        for name, old in before.items():
            assert all(not torch.equal(a, b) for a, b in zip(old, getattr(nets, name).parameters(),
                                                             strict=True))
    assert all(p.requires_grad for D in (nets.D_R, nets.D_SC) for p in D.parameters())
    assert all(p.grad is None and not p.requires_grad for p in nets.V.parameters())


def varied(row):
    """The script with a row of lab/rows applied, as a module, and its flags."""
    module, (texts, flags) = types.ModuleType("varied"), variants.sources("pix2pixsc", row)
    exec(compile(texts["pix2pixsc.py"], "varied.py", "exec"), module.__dict__)
    return module, flags


def test_rows_of_table_4():
    deep = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1]
    near = [w + 2 for w in deep]
    for row, expected in (("not_adaptive", [near, near]), ("never_details", [deep, deep]),
                          ("no_shallow", [near, [0, 0, 0, 1 / 4, 1]]),
                          ("paper_weights", [[1] * 5, deep])):
        module, flags = varied(row)
        w = module.semantic_weights(torch.tensor([True, False]), tiny_args(
            "--vgg-layers", "5", *flags))
        assert torch.equal(w, torch.tensor(expected)), row


def test_row_pix2pixHD_is_equations_1_to_3():
    """G does not see I; three Ds at three scales, and feature matching of weight 10."""
    module, flags = varied("pix2pixHD")
    args = tiny_args(*flags)
    nets, (x, z, F_I, I, *rest) = module.build(args, CPU), batch_of(args, torch.double)
    lively(nets)
    p, in_G = [parameters(D) for D in nets.D_R], parameters(nets.G)
    y_hat = generator(in_G, torch.cat([x, 0 * F_I, 0 * I], 1), 2, 1)
    L_GAN = L_FM = L_D = 0
    for k in range(3):
        fake, real = (nnf.avg_pool2d(torch.cat([x, y], 1), 2**k) for y in (y_hat, z))
        L_GAN = L_GAN + ((discriminator(p[k], fake) - 1)**2).mean()
        L_D = L_D + (((discriminator(p[k], real) - 1)**2).mean()
                     + (discriminator(p[k], fake.detach())**2).mean()) / 2
        with torch.no_grad():
            target = nets.D_R[k](real[:, :3], real[:, 3:], True)[1]
        for a, b in zip(nets.D_R[k](fake[:, :3], fake[:, 3:], True)[1], target, strict=True):
            L_FM = L_FM + (a - b).abs().mean()
    grads = torch.autograd.grad(L_GAN + 10 * L_FM, in_G), torch.autograd.grad(L_D, sum(p, []))
    losses = module.train_step(nets, x, z, F_I, I, *rest, args, args.lambda_1)
    assert losses["L_StdAdv"].item() == pytest.approx(L_GAN.item())
    close([q.grad for q in nets.G.parameters()], grads[0], rtol=1e-5, atol=1e-9)
    close([q.grad for q in nets.D_R.parameters()], grads[1], rtol=1e-5, atol=1e-9)


# ---- training -------------------------------------------------------------------------------


def test_phases():
    """App. C: off for a quarter, on, and in the second half the rate falls to zero."""
    phases = [sc.phase(step, 1000, "paper") for step in range(1000)]
    assert [s for s, _ in phases] == [0.0] * 250 + [1.0] * 750
    rates = [r for _, r in phases]
    assert rates[:501] == [1.0] * 501 and rates[-1] == pytest.approx(1 / 500)
    assert np.allclose(np.diff(rates[500:]), -1 / 500)
    assert [sc.phase(s, 1700, "face")[0] for s in (499, 500, 550, 600, 700)] == [0, .1, .3, .5, 1]
    assert [sc.phase(s, 1300, "pose") for s in (599, 600, 650, 700, 1200)] == [
        (0, 1), (.1, 1), (.5, 1), (1, 1), (1, .5)]
    assert sc.phase(0, 400, "scene") == (1.0, 1.0) and sc.phase(300, 400, "scene") == (1.0, 0.5)


@pytest.mark.parametrize("flags, lambdas, rates", [
    ([], [0, 0, 7, 7, 7, 7, 7, 7], [1, 1, 1, 1, 1, .75, .5, .25]),
    (["--schedule", "scene"], [7] * 8, [1, 1, 1, 1, 1, .75, .5, .25])])
def test_what_train_applies(noise_data, tmp_path, monkeypatch, flags, lambdas, rates):
    """Rates and lambda_1 of every step, for G and both Ds, and whole batches."""
    seen = []

    def train_step(nets, *batch_and_args):
        *batch, args, lambda_1 = batch_and_args
        seen.append((lambda_1, [o.param_groups[0]["lr"] for o in (nets.opt_G, nets.opt_D)], batch))
        return {"L_SC": torch.tensor(1.0)}

    monkeypatch.setattr(sc, "train_step", train_step)
    run("--data", noise_data, *TINY, "--steps", 8, "--lambda-1", 7, "--out", tmp_path / "run",
        "--sample-every", 100, *flags)
    assert [lambda_1 for lambda_1, *_ in seen] == lambdas
    for (_, found, batch), rate in zip(seen, rates, strict=True):
        assert found == pytest.approx([2e-4 * rate] * 2)
        assert [tuple(t.shape[1:]) for t in batch] == [
            (c, 28, 32) for c in (3, 3, 3, 3, 3, 3)] + [()] and len(batch[0]) == 2


def test_run_folder(trained):
    assert json.loads((trained / "config.json").read_text())["labels"] == 3
    rows = (trained / "log.csv").read_text().splitlines()
    assert rows[0] == "step,L_StdAdv,L_D_R,L_SCAdv,L_D_SC,L_SC,seconds" and len(rows) == 3
    parts = torch.load(trained / "last.pt", weights_only=True)["parts"]
    assert set(parts) == {"G", "D_R", "D_SC", "opt_G", "opt_D"}             # VGG is no part
    grid = Image.open(trained / "samples/step_000002.png")
    assert grid.width == 4 * (4 * 32 + 4) + 4                               # x, I, G, z of x


def test_resumed_run_is_bit_identical(noise_data, tmp_path):
    flags = ["--data", noise_data, *TINY, "--steps", 4]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(sc, lambda: run(*flags, "--out", tmp_path / "parts"))
    run("--data", noise_data, "--workers", 0, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 4
    assert_same(a["parts"], b["parts"])


@pytest.mark.slow
def test_compile_does_not_compile_anew_at_every_step():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    args, graphs = tiny_args("--compile"), []
    nets, batch = sc.build(args, CPU), batch_of(args)
    for _ in range(4):
        sc.train_step(nets, *batch, args, 10.0)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2] == graphs[3]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(noise_data, tmp_path):
    flags = ["--data", str(noise_data), *TINY, "--steps", "3", "--labels", "3", "--height", "28"]
    two_processes("pix2pixsc.py", *flags, "--out", tmp_path / "two")
    run(*flags, "--batch", 4, "--out", tmp_path / "one")
    start = sc.build(sc.get_args(flags), CPU)
    assert_moved_alike(start, tmp_path / "one/last.pt", tmp_path / "two/last.pt", NAMES, 0.02)


# ---- pairs ----------------------------------------------------------------------------------


def frames_of(clips, groups=None):
    """clips: {name: number of frames}."""
    return [sc.Frame(f"{c}/{i}", Path(c), Path(), (groups or {}).get(c, c))
            for c, n in clips.items() for i in range(n)]


@pytest.mark.parametrize("seed", range(30))
def test_pairs_never_mix(seed):
    """Random clips, windows and groups: what is drawn as one style is one, and never as two."""
    rng = random.Random(seed)
    clips = {f"clip{c}": rng.randint(1, 25) for c in range(rng.randint(2, 6))}
    groups = {c: str(i % 2) for i, c in enumerate(clips)} if seed % 2 else None
    frames, T = frames_of(clips, groups), rng.randint(1, 12)
    pairs = sc.Pairs(frames, tiny_args("--T", str(T), *["--groups", "x"] * bool(groups)))
    for _ in range(60):
        i = rng.randrange(len(frames))
        same, other = pairs.draw(rng, i, True), pairs.draw(rng, i, False)
        assert frames[same].style == frames[i].style != frames[other].style
        if not groups:
            assert abs(same - i) <= T
        assert same != i or [f.style for f in frames].count(frames[i].style) == 1


def test_every_consistent_frame_is_drawn_and_none_beyond_T():
    frames = frames_of({"a": 30, "b": 5})
    pairs, rng = sc.Pairs(frames, tiny_args()), random.Random(0)            # T = 10
    assert {pairs.draw(rng, 15, True) for _ in range(2000)} == set(range(5, 26)) - {15}
    assert {pairs.draw(rng, 2, True) for _ in range(2000)} == set(range(13)) - {2}
    assert {pairs.draw(rng, 15, False) for _ in range(2000)} == set(range(30, 35))
    assert sc.Pairs(frames[:30], tiny_args()).draw(rng, 3, False) != 3      # one style only


@pytest.fixture
def opened(monkeypatch):
    """Files that a sample reads, in the place of their contents."""
    seen = []
    monkeypatch.setattr(sc, "picture", lambda path, size: seen.append(path) or torch.zeros(3, 1, 1))
    monkeypatch.setattr(sc, "F", lambda path, *_: seen.append(path) or torch.zeros(1, 1, 1))
    return seen


def test_samples_keep_their_promises(noise_data, opened):
    """x and F_I belong to z and I; y_S, y_N and the flag are right; every epoch shows all z."""
    args = tiny_args("--T", "2", "--same-style", "0.25")
    data = sc.Clips(sc.find_frames(noise_data, "train", args), args)
    flags, targets = [], []
    for n in range(60):
        opened.clear()
        flags.append(bool(data[n][-1]))
        x, F_I, z, I, y_S, y_N = opened
        assert (x.stem, x.parent.name) == (z.stem, z.parent.name)
        assert (F_I.stem, F_I.parent.name) == (I.stem, I.parent.name)
        assert (z.parent == I.parent) is flags[-1]
        assert y_S.parent == I.parent != y_N.parent
        if flags[-1]:
            assert 0 < abs(int(z.stem) - int(I.stem)) <= 2
        targets.append(z)
    assert 5 < sum(flags) < 25                                              # p = 1/4: 15 +- 3.4
    assert set(targets[:12]) == set(targets[12:24]) and targets[:12] != targets[12:24]
    assert len(set(targets)) == 12


def test_samples_depend_on_seed_and_number_alone_and_are_mirrored_together(tmp_path):
    """A picture that is its own label stays in step with it."""
    root = write_data(tmp_path / "data")
    for f in (root / "train_img").rglob("*.png"):
        label = Image.open(str(f).replace("_img", "_label"))
        label.point(lambda v: v * 100).convert("RGB").save(f)
    args = tiny_args("--size", "40", "--height", "36")
    frames, upright = sc.find_frames(root, "train", args), 0
    for n in range(40):
        x, z, F_I, I, *_ = sample = sc.Clips(frames, args)[n]
        for a, b in zip(sample, sc.Clips(frames, args)[n], strict=True):
            assert torch.equal(a, b)
        for label, picture in ((x, z), (F_I, I)):
            assert torch.equal(((picture[0] + 1) * 1.275).round().long(), label.argmax(0))
        upright += any(torch.equal(sc.picture(f.image, (40, 36)), z) for f in frames)
    assert 8 < upright < 32                                                 # p = 1/2
    other = sc.Clips(frames, tiny_args("--size", "40", "--height", "36", "--seed", "1"))
    assert not all(torch.equal(other[n][1], sc.Clips(frames, args)[n][1]) for n in range(5))


# ---- layouts, labels, groups ----------------------------------------------------------------


def test_folders_and_flat_names_give_the_same_clips(tmp_path):
    for flat in (False, True):
        frames = sc.find_frames(write_data(tmp_path / str(flat), flat=flat, frames=12), "train",
                                tiny_args())
        assert [f.style for f in frames] == ["a"] * 12 + ["b_c"] * 12 + ["d"] * 12
        assert [int(f.image.stem.split("_")[-1]) for f in frames] == 3 * [*range(12)]  # 10 after 9
        assert all(f.image.stem == f.label.stem for f in frames)


def test_groups_of_clips_and_pictures(tmp_path):
    def styles(root, text, name="g.txt"):
        (tmp_path / name).write_text(text)
        return [f.style for f in sc.find_frames(root, "train",
                                                tiny_args("--groups", str(tmp_path / name)))]
    flat = write_data(tmp_path / "d", flat=True)
    assert styles(flat, "a day  # comment\nb_c,day\n\nd_0.JPG dusk\nd night\n") == [
        "day"] * 8 + ["dusk"] + ["night"] * 3
    folders = write_data(tmp_path / "f", clips=("0", "1"))
    assert styles(folders, "0 day\n1 dusk\n0/2.png rain") == [
        "day", "day", "rain", "day"] + ["dusk"] * 4  # a frame named as a clip
    with pytest.raises(common.UserError, match="names neither d_0 nor d"):
        styles(flat, "a day\nb_c dusk\n")
    rows = [{"name": f"a_{i}.jpg", "attributes": {"weather": w, "timeofday": t}} for i, (w, t) in
            enumerate([("clear", "night"), ("undefined", "daytime"), ("foggy", "dawn/dusk")])]
    assert styles(flat, json.dumps(rows), "bdd.json") == ["1", "2"]         # others have no group


def test_bdd100k_groups_are_table_7():
    table = {2: ("foggy", "dawn/dusk"), 3: ("overcast", "daytime"), 4: ("rainy", "dawn/dusk"),
             5: ("snowy", "dawn/dusk"), 6: ("clear", "dawn/dusk"), 7: ("foggy", "daytime"),
             8: ("partly cloudy", "dawn/dusk"), 9: ("rainy", "daytime"), 10: ("snowy", "daytime"),
             11: ("clear", "daytime"), 12: ("overcast", "dawn/dusk"),
             13: ("partly cloudy", "daytime")}
    expected = {key: str(group) for group, key in table.items()}
    expected |= {(weather, "night"): "1" for weather in sc.WEATHER}
    assert sc.TAB_7 == expected


def test_size_follows_the_first_pictures_shape_and_labels_are_counted(data, capsys):
    frames = sc.find_frames(data, "train", tiny_args())

    def completed(*flags):
        args = sc.get_args(["--data", ".", *TINY, *flags])
        sc.complete(args, frames)
        return args.size, args.height, args.labels
    assert completed("--size", "40") == (40, 36, 3) and "--labels 3" in capsys.readouterr().out
    assert completed("--size", "64") == (64, 56, 3)
    assert completed("--size", "64", "--height", "32", "--labels", "9") == (64, 32, 9)
    with pytest.raises(common.UserError, match=r"0.png: holds the ids \[0, 1, 2\]; --labels 2"):
        completed("--labels", "2")
    Image.fromarray(np.full((36, 40), 255, np.uint8)).save(data / "train_label/a/0.png")
    assert completed() == (32, 28, 4)
    Image.fromarray(np.full((36, 40), 300, np.uint16)).save(data / "train_label/a/0.png")
    with pytest.raises(common.UserError, match=r"0.png: holds the ids \[300\]"):
        completed()


def test_label_maps_of_all_modes_give_the_same_ids(tmp_path):
    ids = np.random.default_rng(0).integers(0, 3, (20, 24), dtype=np.uint8)
    grey = Image.fromarray(ids)
    palette = grey.convert("P")
    palette.putpalette([c for i in range(256) for c in (i, 255 - i, 7)])
    for name, im in (("L", grey), ("P", palette), ("I", Image.fromarray(ids.astype(np.uint16)))):
        im.save(tmp_path / f"{name}.png")
        x = sc.F(tmp_path / f"{name}.png", tiny_args())
        assert x.shape == (3, 20, 24) and torch.equal(x.sum(0), torch.ones(20, 24))
        assert np.array_equal(x.argmax(0).numpy(), ids)
    small = sc.F(tmp_path / "L.png", tiny_args(), (12, 10)).argmax(0).numpy()
    assert np.array_equal(small, np.asarray(grey.resize((12, 10), Image.NEAREST)))
    ids[5] = 255
    Image.fromarray(ids).save(tmp_path / "255.png")
    assert (sc.F(tmp_path / "255.png", tiny_args("--labels", "4")).argmax(0)[5] == 3).all()


def test_pictures_are_resized_bicubically(noise_data):
    path = noise_data / "train_img/a/0.png"
    expected = common.to_tensor(Image.open(path).resize((32, 28), Image.BICUBIC))
    assert torch.equal(sc.picture(path, (32, 28)), expected)


def test_drawings_have_any_number_of_channels(tmp_path):
    """23 for poses, as bytes in .npy; 3 in a picture; both are resized to the nearest."""
    maps = np.random.default_rng(0).integers(0, 256, (23, 20, 24), dtype=np.uint8)
    np.save(tmp_path / "pose.npy", maps)
    args = tiny_args("--label-kind", "picture", "--labels", "23")
    assert torch.equal(sc.F(tmp_path / "pose.npy", args), torch.from_numpy(maps) / 255)
    assert torch.equal(sc.F(tmp_path / "pose.npy", args, (12, 10)),
                       torch.from_numpy(maps[:, 1::2, 1::2]) / 255)
    Image.fromarray(maps[:3].transpose(1, 2, 0)).save(tmp_path / "3.png")
    args = tiny_args("--label-kind", "picture")
    assert torch.equal(sc.F(tmp_path / "3.png", args), torch.from_numpy(maps[:3]) / 255)
    with pytest.raises(common.UserError, match=r"pose.npy: .* \(uint8 of shape \(23, 20, 24"):
        sc.F(tmp_path / "pose.npy", args)
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "zip.npz", maps)
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    for name in ("empty.npy", "zip.npy"):
        with pytest.raises(common.UserError, match=f"{name}: expected bytes, --labels 3 x height"):
            sc.F(tmp_path / name, args)


def test_face_map_is_a_sketch_and_l1_distances():
    points = np.random.default_rng(0).uniform(3, 20, (68, 2))
    channels = sc.face_map(points, (24, 30))
    assert channels.shape == (15, 30, 24) and channels.dtype == np.uint8
    assert set(np.unique(channels[0])) == {0, 255}
    union = np.zeros((30, 24), bool)
    for distance in channels[1:]:
        on = np.argwhere(distance == 0)  # the curve, and what lies within 2 pixels of it
        assert len(on)
        union |= distance == 0
        for r, c in ((0, 0), (29, 23), (12, 7)):
            nearest = min(abs(a - r) + abs(b - c) for a, b in on)
            assert nearest / 3 <= distance[r, c] <= (nearest + 4) / 3 + 1
    assert not (channels[0] > 0)[~union].any()
    t = np.linspace(0, np.pi, 17)  # the upper outline mirrors the jaw, two thirds as high
    jaw = np.stack([50 - 30 * np.cos(t), 50 + 30 * np.sin(t)], 1)
    sketch = sc.face_map(np.concatenate([jaw, np.full((51, 2), 50.0)]), (100, 100))[0]
    rows = np.argwhere(sketch > 0)[:, 0]
    assert rows.max() == 80 and rows.min() == 30


# ---- translate and evaluate -----------------------------------------------------------------


@pytest.mark.parametrize("kind, flat", [("picture", False), ("landmarks", True)])
def test_trains_and_translates_every_kind(kind, flat, tmp_path):
    root, out = write_data(tmp_path / "data", kind, flat), tmp_path / "run"
    run("--data", root, *TINY, "--label-kind", kind, "--steps", 1, "--out", out)
    name = "a_0" if flat else "a/0"
    label = root / f"test_label/{name}.{SUFFIX[kind]}"
    run("--translate", label, "--weights", out / "last.pt", "--out", tmp_path / "t", "--exemplar",
        root / "test_img" / f"{name}.png".replace("a", "d"), "--exemplar-label",
        str(label).replace("test_label/a", "test_label/d"))
    expected = (40, 40) if kind == "landmarks" else (40, 36)
    assert Image.open(tmp_path / "t" / f"{label.stem}.png").size == expected


def test_translate_is_g_at_the_label_maps_size(trained, noise_data, tmp_path):
    ids = np.random.default_rng(0).integers(0, 3, (21, 35), dtype=np.uint8)
    (tmp_path / "maps").mkdir()
    Image.fromarray(ids).save(tmp_path / "maps/odd.png")
    Image.fromarray(ids[:1, :2]).save(tmp_path / "maps/tiny.png")
    Image.fromarray(np.tile(ids, (2, 2))[:24, :36]).save(tmp_path / "maps/even.png")
    exemplar = ["--exemplar", noise_data / "test_img/d/1.png", "--exemplar-label",
                noise_data / "test_label/d/1.png"]
    run("--translate", tmp_path / "maps", *exemplar, "--weights", trained / "last.pt",
        "--out", tmp_path / "out")
    sizes = {f.stem: Image.open(f).size for f in (tmp_path / "out").iterdir()}
    assert sizes == {"odd": (35, 21), "tiny": (2, 1), "even": (36, 24)}
    args = tiny_args("--weights", str(trained / "last.pt"))
    x, F_I = (sc.F(p, args, (36, 24))[None] for p in (tmp_path / "maps/even.png", exemplar[3]))
    with torch.no_grad():
        y = sc.load_generator(args, CPU)(x, F_I, sc.picture(exemplar[1], (36, 24))[None])[0]
    written = np.asarray(Image.open(tmp_path / "out/even.png")).astype(int)
    expected = ((y + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(written - expected).max() <= 1

    run("--translate", tmp_path / "maps/even.png", *exemplar, "--weights", trained / "last.pt",
        "--side", 16, "--out", tmp_path / "small")  # G sees 24x16, and what it paints grows back
    x, F_I = (sc.F(p, args, (24, 16))[None] for p in (tmp_path / "maps/even.png", exemplar[3]))
    with torch.no_grad():
        y = sc.load_generator(args, CPU)(x, F_I, sc.picture(exemplar[1], (24, 16))[None])[0]
    small = ((y + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(small).resize((36, 24), Image.BICUBIC)).astype(int)
    written = np.asarray(Image.open(tmp_path / "small/even.png")).astype(int)
    assert np.abs(written - expected).max() <= 2  # bicubic weights of a rounding


def released_state(G, blocks, downs):
    """G's weights under the keys of the authors' latest_net_G.pth."""
    first_block = 4 + 3 * downs
    after = first_block + blocks
    names = [f"model.{1 + 3 * i}" for i in range(downs + 1)]
    names += [f"model.{first_block + b}.conv_block.{i}" for b in range(blocks) for i in (1, 5)]
    names += [f"model.{after + 3 * i}" for i in range(downs)] + [f"model.{after + 3 * downs + 1}"]
    convs = [layer for layer in G.modules() if isinstance(layer, (torch.nn.Conv2d,
                                                                  torch.nn.ConvTranspose2d))]
    return {f"{name}.{kind}": getattr(conv, kind).detach().clone()
            for name, conv in zip(names, convs, strict=True) for kind in ("weight", "bias")}


def test_released_key_names_at_full_width():
    with torch.device("meta"):
        state = released_state(sc.Generator(15), 9, 4)
    assert {"model.1.weight", "model.13.bias", "model.24.conv_block.5.bias", "model.34.bias",
            "model.38.weight"} < state.keys() and len(state) == 56
    assert state["model.25.weight"].shape == (1024, 512, 3, 3)


@pytest.mark.parametrize("kind, L", [("ids", 42), ("picture", 23), ("landmarks", 15)])
def test_loads_the_authors_generators_of_all_three_tasks(tmp_path, kind, L):
    G = sc.Generator(L, 4, 3, 2)
    torch.save(released_state(G, 2, 3), tmp_path / "G.pth")
    args = sc.get_args(["--data", ".", "--weights", str(tmp_path / "G.pth"), "--label-kind", kind])
    loaded = sc.load_generator(args, CPU)
    x, I = torch.rand(1, L, 32, 32), torch.rand(1, 3, 32, 32)
    assert args.labels == L and torch.equal(loaded(x, x, I), G(x, x, I)) and loaded.multiple == 8
    with pytest.raises(common.UserError, match="for --label-kind landmarks"):
        args.label_kind = "landmarks"
        released.pix2pixsc(released_state(sc.Generator(5, 4, 3, 2), 2, 3), "G.pth", args)


def test_exemplars_of_the_test_maps(noise_data, tmp_path):
    """App. A: 5 of other clips for each map, or one of each group; grids show one each."""
    pairs = sc.test_pairs(noise_data, tiny_args("--exemplars", "5"))
    assert len(pairs) == 12 * 5 and all(x.style != I.style for x, I in pairs)
    assert all(x.image.parent.parent.name == "test_img" for x, _ in pairs)
    assert pairs == sc.test_pairs(noise_data, tiny_args("--exemplars", "5"))
    assert len(sc.test_pairs(noise_data, tiny_args("--exemplars", "5"), limit=3)) == 3
    (tmp_path / "g.txt").write_text("a day\nb_c day\nd dusk\n")
    pairs = sc.test_pairs(noise_data, tiny_args("--groups", str(tmp_path / "g.txt")))
    assert [I.style for _, I in pairs] == ["day", "dusk"] * 12


def test_training_pictures_are_never_scored_in_silence(data, capsys):
    (data / "test_img").rename(data / "away")
    assert sc.test_pairs(data, tiny_args())[0][0].image.parent.parent.name == "train_img"
    assert "these are training pictures" in capsys.readouterr().out


def test_evaluate(trained, noise_data, tmp_path, monkeypatch, capsys):
    seen = {}

    def fid(fakes, reals, device, weights):
        seen.update(fakes=torch.cat(list(fakes)), reals=torch.cat(list(reals)))
        return 12.5

    monkeypatch.setattr(exemplars, "STEPS", 2)
    monkeypatch.setattr(metrics, "fid", fid)
    for i, (x, _) in enumerate(sc.test_pairs(noise_data, tiny_args())):     # a perfect detector
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / f"p/{i:05d}.png").write_bytes(x.label.read_bytes())
    run("--evaluate", "--weights", trained / "last.pt", "--data", noise_data, "--out",
        tmp_path / "e", "--predicted", tmp_path / "p")
    text = capsys.readouterr().out
    for name in ("per-pixel accuracy", "class IoU", "brightness", "nearest style is I's, of 3"):
        assert name in text
    assert "FID (12 painted, 12 real): 12.5" in text
    assert f"per-pixel accuracy, {tmp_path / 'p'}: 1 " in text
    assert seen["fakes"].shape == seen["reals"].shape == (12, 3, 28, 32)
    assert len(list((tmp_path / "e").iterdir())) == 12


def test_matrix_of_maps_and_exemplars(trained, noise_data, tmp_path):
    figures.main(["pix2pixsc", "matrix", "--weights", str(trained / "last.pt"), "--data",
                  str(noise_data), "--out", str(tmp_path)])
    sheet = Image.open(tmp_path / "matrix.png")                             # 3 clips, and a margin
    assert sheet.width == 4 * (4 * 32 + 4) + 4 and sheet.height == 18 + 4 * (4 * 28 + 4) + 4


def test_255_and_the_last_label(tmp_path, capsys):
    """255 takes the last channel, which no other id may have; --unlabelled 255 goes along."""
    data = write_data(tmp_path / "data")
    ids = np.full((36, 40), 255, np.uint8)
    ids[:9] = 2
    Image.fromarray(ids).save(data / "train_label/a/0.png")
    line = error_of(capsys, sc.main, "--data", data, *TINY, "--labels", 3)
    assert "--labels 3: 255 takes the last channel, but id 2 is there, too: --labels 4" in line
    args = sc.get_args(["--data", str(data), *TINY, "--labels", "4", "--unlabelled", "255"])
    sc.complete(args, sc.find_frames(data, "train", args))
    assert args.unlabelled == 3


def test_groups_that_name_no_picture(tmp_path, capsys):
    data = write_data(tmp_path / "data")
    rows = [{"name": f"{c}/{f}.png", "attributes": {"weather": "clear", "timeofday": time}}
            for c, time in (("a", "night"), ("d", "daytime")) for f in range(4)]
    (tmp_path / "some.json").write_text(json.dumps(rows))
    args = sc.get_args(["--data", str(data), *TINY, "--groups", str(tmp_path / "some.json")])
    assert len(sc.find_frames(data, "train", args)) == 8
    assert "train_img/: 4 of 12 are of no group" in capsys.readouterr().out
    (tmp_path / "some.json").write_text(json.dumps([r | {"name": "0.jpg"} for r in rows]))
    with pytest.raises(common.UserError, match="names no picture of train_img/"):
        sc.find_frames(data, "train", args)


def test_a_grid_shows_every_group(tmp_path):
    data = write_data(tmp_path / "data")
    (tmp_path / "groups.txt").write_text("a dawn\nb_c noon\nd night\n")
    args = sc.get_args(["--data", str(data), *TINY, "--groups", str(tmp_path / "groups.txt")])
    assert len(sc.test_pairs(data, args)) == 12 * 3
    styles = [I.style for _, I in sc.test_pairs(data, args, limit=6)]
    assert styles == ["dawn", "noon", "night"] * 2


def test_a_drawing_of_one_channel_can_be_looked_at():
    args = tiny_args("--label-kind", "picture", "--labels", "1")
    close([sc.coloured(torch.full((1, 4, 5), 0.75), args)], [torch.full((3, 4, 5), 0.5)])


def test_one_style_in_the_test_split_is_said(tmp_path, capsys):
    data = write_data(tmp_path / "data")
    for clip in ("b_c", "d"):
        for kind in ("img", "label"):
            shutil.rmtree(data / f"test_{kind}/{clip}")
    args = sc.get_args(["--data", str(data), *TINY])
    assert len(sc.test_pairs(data, args)) == 4 * args.exemplars
    assert "test has one style only" in capsys.readouterr().out


def test_an_exemplar_and_its_map_are_of_one_size(noise_data, trained, tmp_path, capsys):
    Image.new("L", (40, 30)).save(tmp_path / "low.png")
    label = noise_data / "test_label/a/0.png"
    flags = ["--translate", label, "--weights", trained / "last.pt", "--exemplar",
             noise_data / "test_img/a/0.png", "--exemplar-label"]
    assert "low.png: 40x30 pixels" in error_of(capsys, sc.main, *flags, tmp_path / "low.png")
    assert "would be overwritten" in error_of(capsys, sc.main, *flags, noise_data /
                                              "test_label/a/1.png", "--translate",
                                              noise_data / "train_label/a/1.png", "--out",
                                              noise_data / "test_label/a")


@pytest.mark.parametrize("kind", ["ids", "picture", "landmarks"])
def test_own_size_of_label_files(tmp_path, kind):
    data = write_data(tmp_path / "data", kind)
    args = tiny_args("--label-kind", kind, "--labels", {"landmarks": "15"}.get(kind, "3"))
    path = next((data / "test_label/a").iterdir())
    assert sc.own_size(path, args) == tuple(sc.F(path, args).shape[:0:-1])
    np.save(tmp_path / "a.npy", np.zeros((3, 20, 31), np.uint8))
    if kind == "picture":
        assert sc.own_size(tmp_path / "a.npy", args) == (31, 20)


def test_user_errors_are_one_line(data, trained, tmp_path, capsys):
    def fails(*flags):
        return error_of(capsys, sc.main, *flags)
    tiny = ["--data", data, *TINY]
    assert "train_img" in fails("--data", tmp_path / "nowhere")
    (tmp_path / "empty/train_img").mkdir(parents=True)
    assert "train_img: no pictures" in fails("--data", tmp_path / "empty", *TINY)
    (data / "train_img/a/0.png").rename(tmp_path / "empty/train_img/0.png")
    assert "train_label" in fails("--data", tmp_path / "empty", *TINY)
    Image.new("RGB", (40, 38)).save(data / "train_img/a/0.png")
    assert "40x36 pixels, but" in fails(*tiny)                              # its map is lower
    Image.new("RGB", (40, 36)).save(data / "train_img/a/0.png")
    for flags in (["--size", 33], ["--height", 4], ["--same-style", 2], ["--labels", 0],
                  ["--T", 0], ["--batch", 0], ["--exemplars", 0]):
        assert flags[0] in fails(*tiny, *flags)
    assert "of 1 style" in fails("--data", write_data(tmp_path / "one", clips=("a",)), *TINY)
    alone = write_data(tmp_path / "alone", frames=1)
    assert "--groups FILE" in fails("--data", alone, *TINY)
    assert "no such" in fails(*tiny, "--groups", tmp_path / "none").lower()
    (tmp_path / "bad.json").write_text("[1]")
    assert "bad.json" in fails(*tiny, "--groups", tmp_path / "bad.json")
    label = data / "test_label/a/0.png"
    flags = ["--translate", label, "--weights", trained / "last.pt"]
    assert "--exemplar-label PATH" in fails(*flags, "--exemplar", label)
    flags += ["--exemplar", data / "test_img/a/0.png", "--exemplar-label", label]
    assert "overwritten" in fails(*flags, "--out", label.parent)
    assert "--weights" in fails("--translate", label)
    assert "no such file" in fails(*flags, "--translate", tmp_path / "none.png")
    assert "no pictures in this folder" in fails(*flags, "--translate", trained)
    assert fails(*flags[:-1], data / "test_img/a/0.png").endswith(
        "found RGB pixels; drawings need --label-kind picture")
    torch.save({"model.1.weight": torch.zeros(4, 9, 7, 7)}, tmp_path / "part.pth")
    assert "of the authors" in fails(*flags, "--weights", tmp_path / "part.pth")
    (data / "train_label/a/0.png").write_text("no picture")
    assert "0.png" in fails(*tiny)
    (data / "train_label/a/0.png").unlink()
    assert "has no label file" in fails(*tiny)
    faces = write_data(tmp_path / "faces", "landmarks")
    (faces / "train_label/a/0.txt").write_text("40 40\n1 2\n")
    line = fails("--data", faces, *TINY, "--label-kind", "landmarks", "--steps", 9)
    assert "0.txt" in line and "68 lines" in line


# ---- the toy world's clips --------------------------------------------------------------------


def test_toy_run_scores_the_test_clips(toy_clips, tmp_path, monkeypatch):
    monkeypatch.setattr(sc, "data_folder", lambda args: toy_clips)
    run(*TINY, "--steps", 1, "--out", tmp_path / "run", "--split", "val")
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    assert [s["name"] for s in scores] == ["detail correlation", "style error", "picture error"]
    args = sc.get_args([*TINY, "--weights", str(tmp_path / "run/last.pt")])
    pairs = [(x.name, I.name) for x, I in sc.test_pairs(toy_clips, args)]
    truth = np.stack([np.asarray(toy.clip_answer(toy_clips, *pair, "val")) for pair in pairs])
    perfect = toy.clip_scores(toy_clips, pairs, clips.as_pictures(truth), "val")
    assert [s["value"] for s in perfect] == pytest.approx([1, 0, 0])
    for s in perfect:
        assert all(v < 0.8 if s["better"] == "higher" else v > 5 for v in s["trivial"].values())
    best = [{a for a, v in s["trivial"].items() if v == (max if s["better"] == "higher" else min)(
        s["trivial"].values())} for s in perfect]
    assert not set.intersection(*best)                                      # no painter wins all
    grid = Image.open(tmp_path / "run/samples/step_000001.png")
    assert grid.width == 5 * (4 * 32 + 4) + 4                               # with the true answer


def test_a_grid_shows_the_maps_own_picture_and_maps_from_the_whole_split(noise_data):
    args = tiny_args("--exemplars", "1")
    pairs = sc.test_pairs(noise_data, args, limit=3)
    assert [x.name for x, _ in pairs] == ["a/0", "b_c/0", "d/0"]     # of 12, evenly spaced
    G = sc.Generator(3, 4, 2, 1)
    columns = sc.sample_columns(G, pairs, noise_data, args, CPU)
    size = args.size, args.height
    for name, i in (("I", 1), ("z of x", 0)):
        expected = torch.stack([sc.picture(pair[i].image, size) for pair in pairs])
        assert torch.equal(columns[name], expected), name
