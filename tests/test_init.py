"""init.py: MUNIT's networks, the association of styles, every term of Eq. (4), and whole runs."""

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from helpers import assert_same, error_of, interrupted, noise_folder, odd_pictures, two_processes
from PIL import Image
from transcriptions import close, instance_norm, parameters, reflect

import common
import init
from lab import metrics, toy

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = ["--size", "32", "--load", "36", "--object-size", "16", "--objects", "2", "--batch", "2",
        "--ngf", "4", "--ndf", "4", "--blocks", "1", "--style-dim", "3", "--dis-layers", "2",
        "--dis-scales", "2", "--workers", "0", "--device", "cpu", "--log-every", "1"]
EQ_4 = ["--lambda-g", "9", "--lambda-cg", "2", "--lambda-sg", "3", "--lambda-o", "7",
        "--lambda-co", "5", "--lambda-so", "4", "--lambda-cyc", "6"]


def tiny_args(*flags):
    return init.get_args(["--data", ".", *TINY, *flags])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, dtype=torch.double):
    return torch.rand(shape, dtype=dtype) * 2 - 1


def scenes(args, dtype=torch.double):
    """Noise in the place of what `Scenes` gives."""
    pictures, objects = (args.batch, 3, 32, 40), (args.batch, args.objects, 3, 16, 16)
    shapes = [pictures, pictures, *[objects, objects, pictures, pictures] * (args.method == "init")]
    return [noise(*shape, dtype=dtype) for shape in shapes]


def modules(nets):
    return {name: net for name, net in vars(nets).items() if isinstance(net, nn.Module)}


def run(*flags):
    init.main([*map(str, flags)])


@pytest.fixture
def folder(tmp_path):
    """Four pictures of 48 x 40 per split; the first one of each has no box."""
    root = noise_folder(tmp_path / "data")
    boxes = {f"{split}/{i}.png": [{"box": [4, 6, 24, 30], "label": "car"},
                                  {"box": [20, 10, 46, 38], "label": "person"}]
             for split in ("trainA", "trainB", "testA", "testB") for i in (1, 2, 3)}
    (root / "boxes.json").write_text(json.dumps(boxes))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of two steps, on data in the folder beside it."""
    root = tmp_path_factory.mktemp("trained")
    noise_folder(root / "data")
    (root / "data/boxes.json").write_text(json.dumps(
        {f"train{side}/{i}.png": [{"box": [4, 6, 24, 30]}] for side in "AB" for i in range(4)}))
    run("--data", root / "data", *TINY, "--steps", 2, "--out", root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "d2n"
    toy.draw("day2night", out, n=8, size=64, n_test=8)
    return out


# ---- configuration and networks -----------------------------------------------------------------


def test_paper_defaults_of_both_settings():
    args = init.get_args(["--data", "."])
    assert (args.setting, args.load, args.size, args.object_size) == ("init", 360, None, 120)
    assert args.share_discriminator and args.objects == 3
    assert (args.lambda_g, args.lambda_cg, args.lambda_sg, args.lambda_cyc) == (10, 1, 1, 10)
    assert (args.lambda_o, args.lambda_co, args.lambda_so) == (10, 1, 1)
    assert (args.lr, args.decay_every, args.steps, args.batch) == (1e-4, 100_000, 1_000_000, 1)
    coco = init.get_args(["--data", ".", "--setting", "coco"])
    assert (coco.size, coco.object_size) == (360, 120) and coco.share_discriminator
    assert init.short_side((1920, 1208), args) == 360
    assert init.short_side((1920, 1208), coco) == 1208
    assert init.resized((1920, 1208), 360) == [572, 360]
    for optimiser in (init.build(tiny_args(), CPU).opt_G, init.build(tiny_args(), CPU).opt_D):
        group, = optimiser.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.5, 0.999), 1e-4)


def test_toy_preset_changes_sizes_and_rates_but_no_term_of_the_objective():
    real, small = init.get_args(["--data", "."]), init.get_args([])
    for name in vars(real):
        if name.startswith("lambda") and name != "lambda_sg" or name in ("setting", "method"):
            assert getattr(real, name) == getattr(small, name), name


def count(*nets):
    return sum(p.numel() for net in nets for p in net.parameters())


def test_the_full_configuration():
    nets = init.build(init.get_args(["--data", "."]), CPU)
    assert count(nets.E_X.content) == 5_385_856 and count(nets.E_X.style) == 2_764_936
    assert count(nets.G_X.mlp) == 1_120_768 and count(nets.G_X) == 1_120_768 + 5_754_627
    assert count(nets.D_X) == 3 * 2_757_057 and set(modules(nets)) == {*init.NAMES}
    assert [tuple(p.shape[1:]) for p in nets.D_X(torch.zeros(2, 3, 120, 120))] == [
        (1, 7, 7), (1, 3, 3), (1, 1, 1)]  # an object's crop: the coarsest scale sees all of it
    c, s = nets.E_Y(torch.zeros(1, 3, 32, 48))
    assert (c.shape, s.shape) == ((1, 256, 8, 12), (1, 8))
    assert nets.G_X(c, s).shape == (1, 3, 32, 48)
    for name, net in modules(nets).items():
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight.numel() > 5000:
                he = math.sqrt(2 / layer.weight[0].numel())
                std = float(layer.weight.detach().std())
                assert std == pytest.approx(0.02 if name[0] == "D" else he, rel=0.05)
                assert not layer.bias.any()


@pytest.mark.parametrize("flags, more", [
    (["--setting", "coco"], {"E_Xo", "G_Xo", "E_Yo", "G_Yo"}),
    (["--no-share-discriminator"], {"D_Xo", "D_Yo"}), (["--method", "munit"], set()),
    (["--method", "munit", "--setting", "coco", "--no-share-discriminator"], set())])
def test_which_networks_are_shared(flags, more):
    nets = init.build(tiny_args(*flags), CPU)
    assert set(modules(nets)) == {*init.NAMES} | more
    held = [{id(p) for p in opt.param_groups[0]["params"]} for opt in (nets.opt_G, nets.opt_D)]
    for name, net in modules(nets).items():
        assert {id(p) for p in net.parameters()} <= held[name[0] == "D"]
    assert sum(map(len, held)) == sum(len([*net.parameters()]) for net in modules(nets).values())


def take(p, x, pad, stride=1):
    """The next convolution of the parameters p, with reflected edges."""
    return F.conv2d(reflect(x, pad) if pad else x, next(p), next(p), stride=stride)


def encoder(params, x, blocks):
    """Content and style encoder by the facts of MUNIT's code."""
    p = iter(params)
    c = instance_norm(take(p, x, 3)).relu()
    for _ in range(2):
        c = instance_norm(take(p, c, 1, 2)).relu()
    for _ in range(blocks):
        h = instance_norm(take(p, c, 1)).relu()
        c = c + instance_norm(take(p, h, 1))
    s = take(p, x, 3).relu()
    for _ in range(4):
        s = take(p, s, 1, 2).relu()
    s = take(p, s.mean((2, 3), keepdim=True), 0)[:, :, 0, 0]
    assert next(p, None) is None
    return c, s


def decoder(params, c, s, blocks):
    """Shift before scale, layer by layer; no '1 +'; MUNIT's layer normalisation."""
    p = iter(params)
    numbers = F.linear(F.linear(s, next(p), next(p)).relu(), next(p), next(p)).relu()
    numbers = list(F.linear(numbers, next(p), next(p)).split(c.shape[1], dim=1))

    def styled(x):
        shift, scale = numbers.pop(0), numbers.pop(0)
        return instance_norm(x) * scale[:, :, None, None] + shift[:, :, None, None]

    for _ in range(blocks):
        h = styled(take(p, c, 1)).relu()
        c = c + styled(take(p, h, 1))
    assert not numbers
    for _ in range(2):
        c = take(p, c.repeat_interleave(2, 2).repeat_interleave(2, 3), 2)
        c = torch.stack([(one - one.mean()) / (one.flatten().std() + 1e-5) for one in c])
        c = (c * next(p)[:, None, None] + next(p)[:, None, None]).relu()
    y = take(p, c, 3).tanh()
    assert next(p, None) is None
    return y


def discriminator(params, x, layers, scales):
    """[logits]: the picture, then its means over 3 x 3 windows at every second pixel."""
    p, logits = iter(params), []
    for scale in range(scales):
        if scale:
            h, w = x.shape[2:]
            x = torch.stack([torch.stack([
                x[:, :, max(0, i - 1):i + 2, max(0, j - 1):j + 2].mean((2, 3))
                for j in range(0, w, 2)], -1) for i in range(0, h, 2)], -2)
        v = x
        for _ in range(layers):
            v = F.leaky_relu(take(p, v, 1, 2), 0.2)
        logits.append(take(p, v, 0))
    assert next(p, None) is None
    return logits


def lively(nets):
    """Float64, weights that saturate nothing, and rates of 0: a step leaves its gradients."""
    for net in modules(nets).values():
        net.double()
        with torch.no_grad():
            for p in net.parameters():
                p.normal_(0, 0.2)
    for optimiser in (nets.opt_G, nets.opt_D):
        optimiser.param_groups[0]["lr"] = 0.0
    return nets


def test_networks_are_their_layer_tables():
    nets = lively(init.build(tiny_args("--blocks", "2", "--dis-scales", "3"), CPU))
    x, s = noise(2, 3, 36, 28), torch.randn(2, 3, dtype=torch.double)
    c, own = nets.E_X(x)
    close([c, own], encoder(parameters(nets.E_X), x, 2))
    close([nets.G_X(c, s)], [decoder(parameters(nets.G_X), c, s, 2)])
    close(nets.D_X(x), discriminator(parameters(nets.D_X), x, 2, 3))


# ---- the bank and the association ---------------------------------------------------------------


def test_the_bank_is_fig_4s_and_constant():
    s_o, s_b, s_g = (noise(n, 3).requires_grad_() for n in (6, 2, 2))
    bank = init.style_bank(s_o, s_b, s_g)
    assert bank.shape == (2, 5, 3) and not bank.requires_grad
    for i in range(2):
        close(bank[i], [*s_o[3 * i:3 * i + 3], s_b[i], s_g[i]], 0, 0)


def test_an_object_may_wear_every_style_of_its_own_picture():
    """Fig. 3's first row: object, background, global; each code of the bank is equally likely."""
    bank = (torch.arange(2)[:, None] * 10 + torch.arange(5)[None])[..., None].double()
    seen = Counter()
    for seed in range(400):
        styles = init.associate(bank, rng(seed)).flatten().tolist()
        assert [s // 10 for s in styles] == [0, 0, 0, 1, 1, 1]
        seen.update(styles)
    assert set(seen) == {0, 1, 2, 3, 4, 10, 11, 12, 13, 14}
    assert all(200 < n < 280 for n in seen.values())  # 240 +- 14


# ---- the step -----------------------------------------------------------------------------------


def naive_step(nets, batch, args):
    """Losses of Eq. (4) and gradients as the paper words them: one picture, one object at a time,
    by transcriptions, every code computed anew. Draws what `train_step` draws, in its order."""
    p = {name: parameters(net) for name, net in modules(nets).items()}
    B, K = args.batch, args.objects
    z_X, z_Y = torch.randn(B, 3, dtype=torch.double), torch.randn(B, 3, dtype=torch.double)
    draw = rng(3)
    picks = [torch.randint(K + 2, (B, K), generator=draw) for _ in "XY"]
    I_, o, b = batch[:2], batch[2:4], batch[4:]
    L = Counter()

    def of(name, level):
        return p.get(f"{name}o", p[name]) if level == "o" else p[name]

    def E(d, x, level):
        return encoder(of(f"E_{d}", level), x, args.blocks)

    def G(d, c, s, level):
        return decoder(of(f"G_{d}", level), c, s, args.blocks)

    def judge(d, x, target, level):
        return sum((logits - target).square().mean() for logits in discriminator(
            of(f"D_{d}", level), x, args.dis_layers, args.dis_scales))

    def one(x, d, e, t, level, n):
        """A picture or object x of domain d translated to e in style t; n of them."""
        c, s = E(d, x, level)
        y = G(e, c, t, level)
        c_hat, s_hat = E(e, y, level)
        L[f"L_{level}"] += (G(d, c, s, level) - x).abs().mean() / n
        share = n * (2 if level == "o" else 1)
        L[f"L_c{level}"] += (c_hat - c).abs().mean() / share
        L[f"L_s{level}"] += (s_hat - t).abs().mean() / share
        L[f"L_cyc_{level}"] += (G(d, c_hat, s, level) - x).abs().mean() / share
        L[f"L_adv_{level}"] += judge(e, y, 1, level) / n
        L[f"L_D_{level}"] += judge(e, y.detach(), 0, level) / n
        L[f"L_D_{level}"] += judge(d, x, 1, level) / n
        return c, s

    for k, (d, e, z) in enumerate((("X", "Y", z_Y), ("Y", "X", z_X))):
        for i in range(B):
            x = I_[k][i:i + 1]
            _, s_g = one(x, d, e, z[i:i + 1], "g", B)
            for j in range(K if args.method == "init" else 0):
                pick = int(picks[1 - k][i, j])  # in the other domain's bank
                t = (E(e, o[1 - k][i, pick][None], "o") if pick < K else
                     E(e, (b if pick == K else I_)[1 - k][i:i + 1], "g"))[1].detach()
                own = o[k][i, j][None]
                c, s = one(own, d, e, t, "o", B * K)
                u = G(d, c, s_g, "o")                         # Eq. (2) as printed
                c_hat, s_hat = E(d, u, "o")
                L["L_co"] += (c_hat - c).abs().mean() / (2 * B * K)
                L["L_so"] += (s_hat - s_g.detach()).abs().mean() / (2 * B * K)
                L["L_cyc_o"] += (G(d, c_hat, s, "o") - own).abs().mean() / (2 * B * K)
    if not args.lambda_cyc:
        L.update({name: -value for name, value in L.items() if "cyc" in name})
    weights = {"L_g": 9, "L_cg": 2, "L_sg": 3, "L_o": 7, "L_co": 5, "L_so": 4, "L_adv_g": 1,
               "L_adv_o": 1, "L_cyc_g": args.lambda_cyc, "L_cyc_o": args.lambda_cyc}
    total = sum(weights[name] * value for name, value in L.items() if "D" not in name)
    groups = [[q for name in p if (name[0] == "D") == judges for q in p[name]]
              for judges in (False, True)]
    return L, [torch.autograd.grad(total, groups[0]),
               torch.autograd.grad(sum(v for name, v in L.items() if "D" in name), groups[1])]


@pytest.mark.parametrize("B, flags", [
    (1, []), (2, ["--no-share-discriminator"]), (2, ["--setting", "coco", "--size", "32", "--load",
     "36", "--objects", "3"]), (1, ["--lambda-cyc", "0", "--objects", "1"]),
    (2, ["--method", "munit"])])
def test_step_is_the_objective(B, flags):
    """Eq. (1) to (4): losses and all gradients in float64, every mode, every weight another."""
    args = tiny_args(*EQ_4, "--batch", str(B), *flags)
    nets, batch = lively(init.build(args, CPU)), scenes(args)
    torch.manual_seed(5)
    expected, grads = naive_step(nets, batch, args)
    torch.manual_seed(5)
    losses = init.train_step(nets, batch, args, rng(3))
    assert set(losses) == set(expected)
    for name, value in expected.items():
        close([losses[name].detach()], [value.detach()], 1e-9, 1e-12)
    for judges in (False, True):
        close([q.grad for name, net in modules(nets).items() if (name[0] == "D") == judges
               for q in net.parameters()], grads[judges])


def test_g_is_judged_by_the_d_that_has_just_learnt():
    args = tiny_args()
    nets, batch = lively(init.build(args, CPU)), scenes(args)
    torch.manual_seed(5)
    before = init.train_step(nets, batch, args, rng())
    nets.opt_D.param_groups[0]["lr"] = 0.05
    torch.manual_seed(5)
    after = init.train_step(nets, batch, args, rng())
    assert before["L_D_g"] == after["L_D_g"] and before["L_sg"] == after["L_sg"]
    for name in ("L_adv_g", "L_adv_o"):
        assert abs(after[name] - before[name]) > 0.01 * before[name]


def test_chance_is_what_an_undecided_d_and_a_blind_encoder_get():
    args = tiny_args()
    half = [torch.full((1, 1, 3, 3), 0.5)] * args.dis_scales
    one, zero = float(init.lsgan(half, 1.0)), float(init.lsgan(half, 0.0))
    expected = {"L_adv_g": 2 * one, "L_D_g": 2 * (one + zero), "L_sg": float(
        2 * init.l1(torch.zeros(10**6), torch.randn(10**6)))}
    assert init.chance(tiny_args("--method", "munit")) == pytest.approx(expected, rel=5e-3)
    expected |= {"L_adv_o": expected["L_adv_g"], "L_D_o": expected["L_D_g"]}
    assert init.chance(args) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("flags", [["--amp"], ["--setting", "coco", "--size", "32", "--load", "36",
                                    "--no-share-discriminator"], ["--method", "munit"]])
def test_every_weight_learns_and_losses_are_float32(flags):
    args = tiny_args(*flags)
    nets, batch = init.build(args, CPU), None
    batch = scenes(args, torch.float32)
    before = {name: parameters(net) for name, net in modules(nets).items()}
    for step in range(3):
        losses = init.train_step(nets, batch, args, rng(step))
        assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())
    for name, old in before.items():
        assert all(not torch.equal(a, b) for a, b in zip(old, getattr(nets, name).parameters(),
                                                         strict=True)), name


@pytest.mark.slow
def test_compile_does_not_compile_anew_at_every_step():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    args = tiny_args("--compile")
    nets, batch, graphs = init.build(args, CPU), scenes(args, torch.float32), []
    for step in range(4):
        init.train_step(nets, batch, args, rng(step))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2] == graphs[3]


# ---- data ---------------------------------------------------------------------------------------


def marked(root, size=(80, 50), box=(30, 12, 62, 40), k=1):
    """Grey pictures whose only red thing, the object, has stripes, and blue on its left."""
    for side in "AB":
        (root / f"train{side}").mkdir(parents=True)
        picture = np.full((size[1], size[0], 3), 40, dtype=np.uint8)
        thing = picture[box[1]:box[3], box[0]:box[2]]
        thing[:, ::4, 1] = thing[:, 1::4, 1] = 120
        thing[..., 0], thing[:, :9, 2] = 250, 200
        for i in range(k):
            Image.fromarray(picture + np.uint8(i)).save(root / f"train{side}/{i}.png")
    (root / "boxes.json").write_text(json.dumps(
        {f"train{side}/{i}.png": [{"box": box}] for side in "AB" for i in range(k)}))
    return common.open_rgb(root / "trainA/0.png")


def test_a_name_alone_is_one_pictures_key(tmp_path, capsys):
    marked(tmp_path)
    (tmp_path / "boxes.json").write_text(json.dumps({"0.png": [{"box": [30, 12, 62, 40]}]}))
    line = error_of(capsys, init.main, "--data", tmp_path, *TINY)
    assert "0.png is" in line and "trainA/0.png and" in line and "trainB/0.png" in line


def test_a_box_stays_usable_when_it_is_mirrored(tmp_path):
    """6 (1208 - 164.4 - (1208 - 184.4)) is 119.99..., 6 (184.4 - 164.4) is 120."""
    for side in "AB":
        (tmp_path / f"train{side}").mkdir()
        Image.new("RGB", (1208, 40)).save(tmp_path / f"train{side}/{side}.png")
    (tmp_path / "boxes.json").write_text(json.dumps(
        {f"{side}.png": [{"box": [164.4, 2, 184.4, 32]}] for side in "AB"}))
    data = init.Scenes(tmp_path, tiny_args("--object-size", "120"))
    assert {len(data[n]) for n in range(12)} == {6}


def test_test_pictures_are_brought_to_the_size_of_training(tmp_path):
    for side in "AB":
        (tmp_path / f"test{side}").mkdir()
        Image.new("RGB", (90, 60)).save(tmp_path / f"test{side}/0.png")
    for flags, shape in ((("--size", "16"), (36, 56)), (("--size", "48"), (48, 72))):
        found = init.test_pictures(tmp_path, tiny_args(*flags), CPU)
        assert found["x"].shape == found["y"].shape == (1, 3, *shape)


def test_coco_is_tested_at_the_pictures_own_size(tmp_path):
    """As it is trained: crops of pictures that are not reduced."""
    for side in "AB":
        (tmp_path / f"test{side}").mkdir()
        Image.new("RGB", (120, 80)).save(tmp_path / f"test{side}/0.png")
    args = tiny_args("--setting", "coco")
    assert common.TRAINED < 80
    assert init.test_pictures(tmp_path, args, CPU)["x"].shape == (1, 3, 80, 120)


def test_boxes_follow_mirror_resize_and_crop(tmp_path):
    """Objects are cut from the file, at its own sharpness; the background hides all of them."""
    im = marked(tmp_path)
    data, widths, mirrored = init.Scenes(tmp_path, tiny_args("--objects", "3")), set(), Counter()
    small = im.resize((56, 36), Image.BILINEAR)          # 80 x 50, short side 36: multiples of 4
    whole = common.to_tensor(small)
    crop = common.to_tensor(im.resize((16, 16), Image.BILINEAR, (30, 12, 62, 40)))
    for n in range(40):
        I_X, I_Y, o_X, o_Y, b_X, b_Y = data[n]
        assert_same(data[n], data[n])                    # a sample depends on its number alone
        for I_d, o_d, b_d in ((I_X, o_X, b_X), (I_Y, o_Y, b_Y)):
            assert I_d.shape == b_d.shape == (3, 32, 32) and o_d.shape == (3, 3, 16, 16)
            turned = not torch.equal(o_d[0], crop)
            mirrored[turned] += 1
            shown = I_d.flip(2) if turned else I_d       # a crop of the picture, bilinear
            assert any((shown - whole[:, i:i + 32, j:j + 32]).abs().max() < 0.02
                       for i in range(5) for j in range(25))
            torch.testing.assert_close(o_d, (crop.flip(2) if turned else crop).expand(3, 3, 16, 16),
                                       rtol=0, atol=0.02)
            red = I_d[0] - I_d[1] > 0.2                  # resizing blurs edges by that much
            assert not (b_d[0] - b_d[1] > 0.2).any() and (b_d[:, red] == 0).all()
            seen = (b_d == I_d).all(0)
            assert (~seen).sum() <= 1.3 * red.sum() + 4 and seen.any()
            widths.add(int(red.any(0).sum()))
    assert len(widths) > 3 and 25 < mirrored[True] < 55  # 40 +- 4.5


@pytest.mark.parametrize("setting, size, shape", [
    ("init", None, (3, 36, 56)), ("coco", None, (3, 48, 80)), ("init", 64, (3, 64, 64)),
    ("coco", 32, (3, 32, 32)), ("coco", 64, (3, 64, 64))])
def test_settings_of_the_crop(tmp_path, setting, size, shape):
    """Whole pictures, at their own size too; a crop larger than the picture enlarges it."""
    marked(tmp_path)
    args = tiny_args("--setting", setting)
    args.size = size
    sample = init.Scenes(tmp_path, args)[0]
    assert [tuple(t.shape) for t in sample] == [shape] * 2 + [(2, 3, 16, 16)] * 2 + [shape] * 2


def test_each_picture_once_an_epoch_in_both_domains(tmp_path, monkeypatch):
    marked(tmp_path, k=3)
    (tmp_path / "trainB/2.png").unlink()
    data, orders = init.Scenes(tmp_path, tiny_args()), {"A": [], "B": []}
    monkeypatch.setattr(data, "load", lambda path, rng: orders[path.parent.name[-1]].append(
        path.stem) or (path,))
    for n in range(12):
        data[n]
    for side, k in (("A", 3), ("B", 2)):
        epochs = [orders[side][i:i + k] for i in range(0, 12, k)]
        assert all(sorted(e) == list("012"[:k]) for e in epochs) and len({*map(str, epochs)}) > 1
    assert len(data) == 3


def test_pictures_without_usable_boxes_train_munit_only(folder, capsys):
    data = init.Scenes(folder, tiny_args())
    assert "trainA: 1 of 4 pictures have no usable box" in capsys.readouterr().out
    assert {side: len(files) for side, files in data.files.items()} == {"A": 3, "B": 3}
    data = init.Scenes(folder, tiny_args("--method", "munit"))
    assert len(data) == 4 and [part.shape for part in data[0]] == [(3, 32, 32)] * 2
    boxes = [(0, 0, 19, 40), (5, 5, 25, 25), (0, 0, 40, 19)]        # 120 / 6 = 20
    data.args.object_size = 120
    assert data.objects(boxes) == [(5, 5, 25, 25)]


@pytest.mark.parametrize("entry, words", [
    ({"box": [4, 6, 50, 30]}, "not inside"), ({"box": [-1, 6, 9, 30]}, "[-1, 6, 9, 30]"),
    ({"box": [4, 6, 4, 30]}, "empty"), ({"box": [9, 6, 4, 30]}, "inverted"),
    ({"box": [4, 6, 9]}, "expected"), ({"label": "car"}, "expected"), ("car", "expected"),
    ({"box": [4, 6, "9", 30]}, "expected"), (None, "expected"), (7, "expected")])
def test_bad_boxes_are_named(folder, tmp_path, capsys, entry, words):
    table = {"trainA/2.png": [{"box": [0, 0, 48, 40]}, entry], "trainB/2.png": []}
    (folder / "boxes.json").write_text(json.dumps(table))
    line = error_of(capsys, init.main, "--data", folder, *TINY, "--out", tmp_path / "r")
    assert "boxes.json" in line and "trainA/2.png" in line and words in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("text, words", [
    ('{"trainA/2.png": null}', "found None"), ('{"trainA/2.png": true}', "found True"),
    ("[" * 99999, "not readable"), ("7", "not readable"),
    ('{"trainA/2.png": [{"box": [0.1, 0.2, 0.5, 1]}]}', "boxes in shares of 1")])
def test_tables_of_boxes_that_are_none(folder, tmp_path, capsys, text, words):
    (folder / "boxes.json").write_text(text)
    line = error_of(capsys, init.main, "--data", folder, *TINY, "--out", tmp_path / "r")
    assert "boxes.json" in line and words in line


def test_missing_or_broken_boxes(folder, tmp_path, capsys):
    flags = ["--data", folder, *TINY, "--out", tmp_path / "r"]
    for text, words in (("{", "not readable"), ("[1]", "expected"), ("{}", "no usable boxes")):
        (folder / "boxes.json").write_text(text)
        assert words in error_of(capsys, init.main, *flags)
    (folder / "boxes.json").unlink()
    line = error_of(capsys, init.main, *flags)
    assert "boxes.json: not found" in line and "munit" in line


# ---- toy data -----------------------------------------------------------------------------------


def pictures(folder):
    return np.stack([np.asarray(Image.open(f)).astype(float) for f in sorted(folder.iterdir())])


def test_toy_boxes_hold_what_shines_by_night_and_the_rest_is_dark(village):
    table = json.loads((village / "boxes.json").read_text())
    assert len(table) == 8 * 6 and all((village / name).exists() for name in table)
    assert all([t["label"] for t in things] == ["hut", "lantern", "animal"]
               for things in table.values())
    inside = toy.inside_boxes(village, "test")
    for i, (day, night) in enumerate(zip(pictures(village / "testA"), pictures(village / "testB"),
                                         strict=True)):
        boxes = table[f"testA/{i:04d}.png"]
        assert boxes == table[f"testB/{i:04d}.png"]
        expected = np.zeros((64, 64), dtype=bool)
        for x0, y0, x1, y1 in (thing["box"] for thing in boxes):
            expected[y0:y1, x0:x1] = True
        assert (inside[i] == expected).all()
        assert night[~inside[i]].max() < 180 and night[inside[i]].max() > 200
        assert day[~inside[i]].mean() > 2 * night[~inside[i]].mean()


def test_true_nights_are_the_test_scenes_in_other_pairs_nights(village):
    """With as many nights as pairs, the last one of a scene is its own."""
    nights, own = toy.true_nights(village, "test", 4), pictures(village / "testB")
    assert nights.shape == (8, 4, 3, 64, 64)
    np.testing.assert_allclose((nights[:, 3] + 1) * 127.5, own.transpose(0, 3, 1, 2), atol=1e-6)
    sky = nights[:, :, :, :4].mean((3, 4))
    close([torch.tensor(sky[2, 0])], [torch.tensor(sky[4, 3])], 0.2, 0.05)


def test_toy_pictures_are_drawn_as_large_as_they_are_scored(tmp_path, monkeypatch):
    def ensure(name, size):
        toy.draw(name, tmp_path / str(size), n=1, size=size, n_test=2)
        return tmp_path / str(size)

    monkeypatch.setattr(toy, "ensure", ensure)
    for flags, side in ((["--size", "64"], 64), (["--load", "52"], 52)):
        args = init.get_args(flags)
        root = init.data_folder(args)
        assert init.test_pictures(root, args, CPU)["x"].shape == (2, 3, side, side)
        assert toy.inside_boxes(root, "test").shape == (2, side, side)


def test_toy_scores_by_hand():
    x, y = np.zeros((1, 3, 8, 8)), np.zeros((1, 3, 8, 8))
    y[:, :, 2:4, 2:4], y[:, :, 6:] = 1, -1
    inside = np.zeros((1, 8, 8), dtype=bool)
    inside[:, 2:4, 2:4] = True
    objects, background = toy.night_scores(x, y, y, y, inside)
    assert (objects["name"], objects["value"]) == ("object error", 0)
    assert objects["trivial"]["copy the input"] == pytest.approx(127.5)
    assert background["trivial"]["copy the input"] == pytest.approx(127.5 * 16 / 60)
    assert background["trivial"]["copy the reference"] == 0 == background["value"]
    # two nights of +-1 inside; outputs of 0 and 1 there, of 0 and 0 outside, where nights are 0
    nights = np.zeros((1, 2, 3, 8, 8))
    nights[0, 0, :, 2:4, 2:4], nights[0, 1, :, 2:4, 2:4] = 1, -1
    several = np.zeros((1, 2, 3, 8, 8))
    several[0, 1, :, 2:4, 2:4] = 1
    scores = {s["name"]: s for s in toy.night_diversity(x, several, nights, inside)}
    assert scores["object diversity"]["value"] == pytest.approx(127.5)
    assert scores["object diversity"]["trivial"]["true nights"] == pytest.approx(255)
    # E|a - b| = (1 + 1 + 0 + 2) / 4, E|a - a'| = 1, E|b - b'| = 2
    assert scores["object distance to nights"]["value"] == pytest.approx((2 * 1 - 1 - 2) * 127.5)
    assert scores["background diversity"]["value"] == 0
    assert scores["background distance to nights"]["value"] == 0


def test_true_nights_are_nearest_to_true_nights(village):
    x = pictures(village / "testA").transpose(0, 3, 1, 2) / 127.5 - 1
    nights, inside = toy.true_nights(village, "test", 4), toy.inside_boxes(village, "test")
    for score in toy.night_diversity(x, nights[:, ::-1], nights, inside)[1::2]:
        assert score["value"] < 0.3 * min(score["trivial"].values())


# ---- runs ---------------------------------------------------------------------------------------


def test_what_train_applies(folder, tmp_path, monkeypatch):
    """Both rates, halved every so many steps; what the step gets."""
    seen = []

    def train_step(nets, batch, args, rng):
        seen.append([o.param_groups[0]["lr"] for o in (nets.opt_G, nets.opt_D)])
        assert [tuple(t.shape) for t in batch] == [(2, 3, 32, 32)] * 2 + [(2, 2, 3, 16, 16)] * 2 + [
            (2, 3, 32, 32)] * 2
        return {"L_g": torch.tensor(1.0)}

    monkeypatch.setattr(init, "train_step", train_step)
    run("--data", folder, *TINY, "--steps", 7, "--decay-every", 3, "--out", tmp_path / "run")
    assert np.allclose(seen, [[1e-4 * f] * 2 for f in (1, 1, 1, .5, .5, .5, .25)], rtol=1e-9)


def test_run_folder(trained):
    files = {str(f.relative_to(trained)) for f in trained.rglob("*") if f.name != "lock"
             and f.is_file()}
    assert files == {"config.json", "log.csv", "index.html", "last.pt", "result.json",
                     "samples/step_000000.png", "samples/step_000002.png"}
    rows = (trained / "log.csv").read_text().splitlines()
    assert rows[0] == ("step,L_g,L_cg,L_sg,L_adv_g,L_cyc_g,L_D_g,L_o,L_co,L_so,L_adv_o,L_cyc_o,"
                       "L_D_o,seconds") and len(rows) == 3


@pytest.mark.parametrize("flags", [["--setting", "coco", "--decay-every", "2"],
                                   ["--method", "munit"]])
def test_resumed_run_is_bit_identical(folder, tmp_path, flags):
    flags = ["--data", folder, *flags, *TINY, "--steps", 4]
    run(*flags, "--out", tmp_path / "whole")
    interrupted(init, lambda: run(*flags, "--out", tmp_path / "parts"), step=2)
    run(*flags, "--out", tmp_path / "parts", "--resume")
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["step"] == b["step"] == 4
    assert_same(a["parts"], b["parts"])


@pytest.mark.slow
def test_two_processes_end_with_equal_weights(folder, tmp_path):
    flags = ["--data", str(folder), *TINY, "--batch", "1", "--no-share-discriminator",
             "--steps", "3", "--out", str(tmp_path / "two")]
    (tmp_path / "go.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, common, init
build, built = init.build, []
init.build = lambda *a: built.append(build(*a)) or built[-1]
def main():
    init.main(sys.argv[1:])
    torch.save({{k: getattr(built[0], k).state_dict() for k in ("E_X", "G_Y", "D_X", "D_Yo")}},
               {str(tmp_path)!r} + "/" + os.environ["RANK"])
common.entry(main)
""")
    two_processes(tmp_path / "go.py", *flags)
    assert_same(*(torch.load(tmp_path / rank, weights_only=True) for rank in "01"))


# ---- translate and evaluate ---------------------------------------------------------------------


def translated(trained, picture, s):
    """What G_Y paints of a picture file in style s, by transcriptions; 0..255."""
    parts = {k: list(v.values()) for k, v in
             torch.load(trained / "last.pt", weights_only=True)["parts"].items() if k[:3] != "opt"}
    c, _ = encoder(parts["E_X"], common.to_tensor(common.open_rgb(picture))[None], 1)
    return np.asarray(common.to_pil(decoder(parts["G_Y"], c, s, 1)[0])).astype(int)


def test_translate_keeps_every_size_and_needs_no_boxes(trained, tmp_path):
    sizes = odd_pictures(tmp_path / "in")
    run("--translate", tmp_path / "in", "--weights", trained / "last.pt", "--out", tmp_path / "out")
    written = {f.stem: Image.open(f) for f in (tmp_path / "out").iterdir()}
    assert {stem: im.size for stem, im in written.items()} == sizes


def test_styles_stand_side_by_side_and_an_exemplar_gives_its_own(trained, tmp_path):
    data = trained.parent / "data"
    flags = ["--translate", data / "testA/1.png", "--weights", trained / "last.pt"]
    run(*flags, "--styles", 3, "--out", tmp_path / "three")
    three = np.asarray(Image.open(tmp_path / "three/1.png")).astype(int)
    assert three.shape == (40, 3 * 48, 3)
    args = init.get_args(["--weights", str(trained / "last.pt")])
    for i, s in enumerate(init.random_styles(3, args, CPU, "translate")):
        expected = translated(trained, data / "testA/1.png", s[None])
        assert np.abs(three[:, 48 * i:48 * i + 48] - expected).max() <= 1
    run(*flags, "--exemplar", data / "testB/2.png", "--out", tmp_path / "ref")
    im = Image.open(data / "testB/2.png").resize((44, 36), Image.BILINEAR)  # short side: --load
    state = torch.load(trained / "last.pt", weights_only=True)["parts"]
    _, s = encoder(list(state["E_Y"].values()), common.to_tensor(im)[None], 1)
    expected = translated(trained, data / "testA/1.png", s)
    assert np.abs(np.asarray(Image.open(tmp_path / "ref/1.png")) - expected).max() <= 1


def test_an_exemplar_is_not_painted_over(trained, tmp_path, capsys):
    before = (trained.parent / "data/testB/0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(before)
    line = error_of(capsys, init.main, "--translate", trained.parent / "data/testA/0.png",
                    "--weights", trained / "last.pt", "--exemplar", tmp_path / "0.png", "--out",
                    tmp_path)
    assert "would be overwritten" in line and (tmp_path / "0.png").read_bytes() == before


def test_direction_swaps_the_networks(trained):
    parts = torch.load(trained / "last.pt", weights_only=True)["parts"]
    for flags, order in (([], "XY"), (["--direction", "BtoA"], "YX")):
        args = init.get_args(["--weights", str(trained / "last.pt"), *flags])
        for pair, d in zip(init.oriented(init.load_networks(args, CPU), args), order, strict=True):
            for net, name in zip(pair, "EG", strict=True):
                assert_same(dict(net.state_dict()), dict(parts[f"{name}_{d}"]))


def test_evaluate_names_its_networks(trained, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(metrics, "domain_classifier", partial(metrics.domain_classifier, steps=5))
    seen, protocol = [], init.diversity_scores

    def spy(outputs, real, files, *more):
        seen.extend(outputs := list(outputs)[:2])
        assert real.shape == (4, 3, 36, 44) and [f[0].parent.name[-1] for f in files] == ["A", "B"]
        return protocol(outputs, real, files, *more)

    monkeypatch.setattr(init, "diversity_scores", spy)
    run("--evaluate", "--weights", trained / "last.pt", "--data", trained.parent / "data",
        "--lpips", "random")
    out = capsys.readouterr().out
    assert "diversity, LPIPS-style distance of an UNTRAINED VGG (2 inputs x 19 pairs)" in out
    assert "real pictures:" in out and "CIS (a SMALL classifier of the domains" in out
    assert [tuple(several.shape) for several in seen] == [(20, 3, 36, 44)] * 2  # short side --load
    assert not torch.equal(seen[0][0], seen[0][1])


def test_diversity_pairs_neighbours_and_mixes_the_real_ones(monkeypatch):
    """One grey level per picture: distances and p(domain | picture) can be read off."""
    def grey(*levels):
        return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)

    def classify(x):
        return torch.stack([x[:, 0, 0, 0], 1 - x[:, 0, 0, 0]], 1)

    monkeypatch.setattr(metrics, "lpips", lambda device, otherwise: (
        lambda a, b: float((a - b).abs().mean())))
    monkeypatch.setattr(metrics, "domain_classifier", lambda files, device, seed: (classify, "c"))
    outputs = [grey(0.1, 0.4, 0.2), grey(0.9, 0.9, 0.8)]
    scores = init.diversity_scores(iter(outputs), grey(0.0, 0.5, 1.0), [], CPU, tiny_args())
    assert scores[0]["name"] == "diversity, LPIPS (2 inputs x 2 pairs)"
    assert scores[0]["value"] == pytest.approx((0.3 + 0.2 + 0.0 + 0.1) / 4)
    assert scores[0]["trivial"]["real pictures"] in (pytest.approx(0.5), pytest.approx(0.75))
    expected = metrics.inception_scores(torch.stack([classify(x) for x in outputs]))
    assert {s["name"]: s["value"] for s in scores[1:]} == {
        f"{name} (c)": value for name, value in expected.items()}


def test_lpips_without_weights_is_one_line(trained, monkeypatch, capsys):
    pytest.importorskip("torchmetrics", reason="pip install -r lab/requirements.txt")

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", no_network)
    line = error_of(capsys, init.main, "--evaluate", "--weights", trained / "last.pt", "--data",
                    trained.parent / "data")
    assert "--lpips random" in line and "no network" in line


def test_toy_scores_are_of_the_chosen_split_and_a_copier_gets_the_trivial_ones(village):
    args = tiny_args("--split", "val", "--load", "64")
    args.data, nets = "toy", init.build(args, CPU)
    nets.E_X.content, nets.G_Y = nn.Identity(), lambda c, s: c
    scores = init.truth_scores(nets, village, args, CPU)
    assert [s["name"] for s in scores] == [
        "object error", "background error", "object diversity", "object distance to nights",
        "background diversity", "background distance to nights"]
    day, night = (pictures(village / f"val{side}") for side in "AB")
    inside = toy.inside_boxes(village, "val")
    for score, where in zip(scores[:2], (inside, ~inside), strict=True):
        assert score["value"] == pytest.approx(score["trivial"]["copy the input"], abs=1e-3)
        expected = np.abs(day - night).mean(3)[where].mean()
        assert score["value"] == pytest.approx(expected, abs=1e-2)
    assert scores[2]["value"] == pytest.approx(0, abs=1e-6)


def test_user_errors_are_one_line(trained, tmp_path, capsys):
    def fails(*flags):
        return error_of(capsys, init.main, *flags)
    data = trained.parent / "data"
    assert "nowhere" in fails("--data", tmp_path / "nowhere")
    for flags in (["--size", 34], ["--load", 12], ["--load", 48, "--dis-layers", 6],
                  ["--object-size", 0], ["--object-size", 12], ["--objects", 0], ["--styles", 0],
                  ["--decay-every", 0], ["--steps", 0]):
        assert flags[0] in fails("--data", data, *TINY, *flags)
    assert "--batch 2" in fails("--data", data, "--batch", 2)
    assert "--styles" in fails("--data", data, "--styles", 2, "--exemplar", "a.png")
    assert "--weights" in fails("--translate", data / "testA")
    torch.save({"a": {"mlp.model.0.fc.weight": torch.zeros(4, 3)}}, tmp_path / "part.pt")
    assert "MUNIT" in fails("--translate", data / "testA/0.png", "--weights", tmp_path / "part.pt")
    state = torch.load(trained / "last.pt", weights_only=True)
    torch.save(state | {"method": "cut"}, tmp_path / "other.pt")
    assert "cut.py" in fails("--evaluate", "--weights", tmp_path / "other.pt")
    assert "none.png" in fails("--translate", data / "testA", "--weights", trained / "last.pt",
                               "--exemplar", tmp_path / "none.png")


# ---- learning -----------------------------------------------------------------------------------


def test_the_reference_is_another_scene_of_the_same_night(village):
    args = tiny_args("--split", "val", "--load", "64")
    args.data, nets = "toy", init.build(args, CPU)
    nets.E_X.content, nets.G_Y = nn.Identity(), lambda c, s: c
    night = pictures(village / "valB")
    gap = np.abs(night[np.arange(8) ^ 1] - night).mean(3)
    inside = toy.inside_boxes(village, "val")
    scores = init.truth_scores(nets, village, args, CPU)
    for score, where in zip(scores[:2], (inside, ~inside), strict=True):
        assert score["trivial"]["copy the reference"] == pytest.approx(gap[where].mean(), abs=1e-2)
    assert gap[inside].mean() > 10


def test_a_grid_paints_by_the_other_domains_g_and_rebuilds_by_the_own():
    args = tiny_args("--direction", "BtoA")
    nets = init.build(args, CPU)
    nets.E_Y.content = nn.Identity()
    nets.G_X, nets.G_Y = (lambda c, s, by=by: c * by + 0 * s.sum() for by in (0.5, 0.25))
    show = {"x": noise(2, 3, 32, 32).float(), "reference": noise(2, 3, 32, 32).float()}
    columns = init.sample_columns(nets, show, args)
    for name in ("reference style", "style 1", "style 2", "style 3"):
        close([columns[name]], [show["x"] / 2])
    close([columns["x rebuilt"]], [show["x"] / 4])


def test_a_box_too_small_to_learn_from_is_hidden_all_the_same(tmp_path):
    picture = np.full((48, 48, 3), 40, np.uint8)
    picture[22:24, 22:24] = (250, 0, 0)
    for side in "AB":
        (tmp_path / f"train{side}").mkdir()
        Image.fromarray(picture).save(tmp_path / f"train{side}/0.png")
    boxes = [{"box": [0, 0, 20, 20]}, {"box": [22, 22, 24, 24]}]       # 6 * 2 < --object-size 16
    (tmp_path / "boxes.json").write_text(json.dumps({f"train{s}/0.png": boxes for s in "AB"}))
    data = init.Scenes(tmp_path, tiny_args())
    for n in range(10):
        I_X, _, _, _, b_X, _ = data[n]
        red = I_X[0] - I_X[1] > 0.5
        assert red.any() and (b_X[:, red] == 0).all()
