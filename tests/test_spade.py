"""spade.py: every equation against a plain transcription, and the script as its users run it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, error_of, interrupted
from PIL import Image
from torch.nn.utils import parametrize
from transcriptions import close, instance_norm

import common
import spade
from lab import figures, metrics, toy
from lab.rows import pix2pixhd
from lab.toy import reading, scenes

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--load", "36", "--ngf", "4", "--ndf", "4", "--hidden", "6", "--z", "5",
        "--doublings", "4", "--labels", "4", "--batch", "2", "--lambda-vgg", "0", "--workers", "0",
        "--device", "cpu", "--log-every", "1"]
STYLED = ["--input", "encoder", "--edges"]
CPU = torch.device("cpu")


def tiny_args(*flags):
    return spade.get_args(["--data", ".", *TINY, *map(str, flags)])


def run(*flags):
    spade.main([*map(str, flags)])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, dtype=torch.double):
    return torch.rand(shape, dtype=dtype) * 2 - 1


def count(net):
    return sum(p.numel() for p in net.parameters())


def random_m(args, b=2, h=None, w=None, dtype=torch.double):
    h, w = h or args.height, w or args.size
    labels = torch.randint(0, spade.m_channels(args) - args.edges, (b, h, w))
    return spade.one_hot(labels, torch.randint(0, 2, (b, int(args.edges), h, w)).to(dtype), args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five training and three test pairs of 40x36 pixels: colour blocks of labels 0 to 3."""
    rng, data = np.random.default_rng(0), tmp_path_factory.mktemp("spade") / "data"
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 40]])
    for split, n in (("train", 5), ("test", 3)):
        for kind in ("img", "label", "inst"):
            (data / f"{split}_{kind}").mkdir(parents=True)
        for i in range(n):
            label = rng.integers(0, 4, (9, 10)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
            picture = (colours[label] + rng.integers(-20, 20, (36, 40, 3))).clip(0, 255)
            Image.fromarray(label).save(data / f"{split}_label/{i}.png")
            inst = Image.fromarray(label.astype(np.uint16) * 1000 + 5)
            inst.save(data / f"{split}_inst/{i}.png")
            Image.fromarray(picture.astype(np.uint8)).save(data / f"{split}_img/{i}.png")
    return data


@pytest.fixture(scope="module")
def trained(folder):
    """The folder of a run of four steps with an encoder."""
    run("--data", folder, *TINY, *STYLED, "--steps", 4, "--out", folder.parent / "run")
    return folder.parent / "run"


# ---- configuration and counts -------------------------------------------------------------------


def test_paper_defaults_and_data_set_presets(monkeypatch):
    args = spade.get_args(["--data", "."])
    assert (args.lr_G, args.lr_D, args.beta2) == (1e-4, 4e-4, 0.9)
    assert (args.epochs, args.decay_from, args.batch, args.size, args.load) == (200, .5, 32, 256,
                                                                                286)
    assert (args.lambda_fm, args.lambda_vgg, args.lambda_kld) == (10, 10, 0.05)
    assert (args.input, args.init, args.vgg, args.vgg_layers) == ("segmap", "released", "imagenet",
                                                                  5)
    assert (args.ngf, args.ndf, args.hidden, args.kernel, args.d_layers) == (64, 64, 128, 3, 4)
    args = spade.get_args(["--data", "path/to/Cityscapes"])
    assert (args.size, args.height, args.load, args.doublings) == (512, 256, 1, 6)  # no crop
    channels = {data: spade.m_channels(spade.get_args(["--data", data]))
                for data in ("cityscapes", "coco", "ade20k", "ADE20K-outdoor", "flickr", "camvid")}
    assert [*channels.values()] == [36, 184, 151, 151, 183, 12]
    lengths = {data: spade.get_args(["--data", data]) for data in channels}
    assert {(a.epochs, a.decay_from) for d, a in lengths.items() if d[:2].lower() in ("ci", "ad")
            } == {(200, 0.5)}
    assert (lengths["coco"].epochs, lengths["coco"].decay_from) == (100, 1)
    assert (lengths["flickr"].epochs, lengths["flickr"].decay_from) == (50, 1)
    monkeypatch.setenv("WORLD_SIZE", "8")      # Sec. 2.6: 32 pictures on eight GPUs
    assert spade.get_args(["--data", "."]).batch == 4
    assert spade.get_args(["--data", ".", "--batch", "3"]).batch == 3
    nets = spade.build(tiny_args(*STYLED), CPU)
    for optimiser, rate, of in ((nets.opt_G, 1e-4, "GE"), (nets.opt_D, 4e-4, "D")):
        group, = optimiser.param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (rate, (0.0, 0.9), 1e-8)
        assert group["weight_decay"] == 0
        assert len(group["params"]) == sum(len([*getattr(nets, n).parameters()]) for n in of)


def test_presets_by_layout_look_where_the_data_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("datasets/streets/gtFine", "rooms/annotations/training", "rooms/annotations/val",
                   "coco_stuff/annotations", "coco_stuff/train_img"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    assert [spade.get_args(["--data", data]).labels for data in (
        "streets", "datasets/streets", "rooms", "coco_stuff")] == [35, 35, 151, 182]


def test_test_pictures_are_evenly_spaced(folder):
    pairs = [spade.find_pairs(folder, "train")[0]] * 11
    pairs = [(*pair[:2], i) for i, pair in enumerate(pairs)]
    seen = []

    class Noted(spade.LabelledPictures):
        def __init__(self, pairs, *rest, **more):
            seen.extend(pair[2] for pair in pairs)
            super().__init__([(*pair[:2], None) for pair in pairs], *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spade, "LabelledPictures", Noted)
        assert len(spade.test_batch(pairs, tiny_args(), limit=6)[0]) == 6
    assert seen == [0, 1, 3, 5, 7, 9]


def test_toy_preset_changes_sizes_and_rates_but_no_term_of_the_objective():
    args = spade.get_args([])
    assert args.lambda_fm == 10 and args.lambda_kld == 0.05
    sums = [sum([*spade.VGG_WEIGHTS.values()][:n]) for n in (5, args.vgg_layers)]
    assert args.lambda_vgg * sums[1] == pytest.approx(10 * sums[0], rel=0.05)


@pytest.mark.parametrize("flags, make, millions", [  # Tab. 2.3, 2.4, with ADE20K's 151 labels
    ([], spade.Generator, 96.492483), (["--ngf", "48"], spade.Generator, 60.642771),
    (["--ngf", "80"], spade.Generator, 140.682163), ([], pix2pixhd.ConcatGenerator, 79.2),
    ([], lambda *a: pix2pixhd.HDGenerator(*a, "spade"), 236.9),
    ([], lambda *a: pix2pixhd.HDGenerator(*a, "concat"), 195.5),
    ([], pix2pixhd.HDGenerator, 183.0), (["--ngf", "48"], pix2pixhd.HDGenerator, 103.0)])
def test_parameter_counts_of_table_2_3(flags, make, millions, monkeypatch):
    for module in (spade, pix2pixhd):       # spectral norm has no parameters, and takes seconds
        monkeypatch.setattr(module, "sn", lambda layer: layer)
    args = spade.get_args(["--data", "ade20k", *flags])
    with torch.device("meta"):
        n = count(make(args, spade.m_channels(args)))
    assert n / 1e6 == pytest.approx(millions, abs=0.05 if millions == round(millions, 1) else 1e-9)


@pytest.mark.parametrize("flags, g, d", [
    (["--data", "coco_stuff"], 97_480_899, 5_904_514),
    (["--data", "coco_stuff", "--input", "encoder"], 112_626_883, 5_904_514),
    (["--data", "coco_stuff", "--doublings", "7", "--size", "512"], 98_515_043, 5_904_514),
    (["--data", "cityscapes"], 93_048_003, 5_601_410),
    (["--data", "cityscapes", "--input", "encoder"], 101_136_579, 5_601_410),
    (["--data", ".", "--labels", "35"], 93_018_051, 5_599_362)])
def test_parameter_counts_of_the_released_networks(flags, g, d, monkeypatch):
    monkeypatch.setattr(spade, "sn", lambda layer: layer)
    args = spade.get_args(flags)
    with torch.device("meta"):
        G, E = spade.generator(args), spade.Encoder()
        D = spade.MultiscaleDiscriminator(spade.m_channels(args), args)
    assert (count(G), count(D), count(E)) == (g, d, 10_463_424)
    assert sum(isinstance(net, spade.Spade) for net in G.modules()) == (
        21 if args.doublings == 7 else 18)


def test_init_of_the_released_networks_and_of_the_text():
    """Spectrally normalised layers keep PyTorch's scale; the others get 0.02 times Glorot."""
    G = spade.generator(spade.get_args(["--data", ".", "--labels", "8", "--ngf", "8"]))
    for scheme, normal, other in (("released", (3 * 9 * 128)**-0.5, 0.02), ("glorot", None, 1.0)):
        spade.init_weights(G, scheme)
        w = G.head.conv_0.parametrizations.weight.original
        glorot = (2 / (9 * 128 + 9 * 128))**0.5
        assert float(w.detach().std()) == pytest.approx(normal or glorot, rel=0.02)
        w = G.head.spade_0.gamma.weight
        assert float(w.detach().std()) == pytest.approx(other * (2 / (9 * 128 + 9 * 128))**0.5,
                                                        rel=0.02)
        assert all(float(p.detach().abs().sum()) == 0 for k, p in G.named_parameters()
                   if k.endswith("bias"))


# ---- transcriptions of the networks, from the figures --------------------------------------------


def lively(nets):
    """Float64, weights that saturate nothing, rates of 0 (a step leaves its gradients), and
    spectral norm's vectors where its iteration would end: at the largest singular value."""
    for name in "GDE":
        for layer in getattr(nets, name, torch.nn.Module()).double().modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                normed = parametrize.is_parametrized(layer)
                w = layer.parametrizations.weight.original if normed else layer.weight
                torch.nn.init.normal_(w, 0, 0.7 / math.sqrt(w[0].numel()))
                if layer.bias is not None:
                    torch.nn.init.normal_(layer.bias, 0, 0.1)
                if normed:
                    u, _, v = torch.linalg.svd(w.detach().flatten(1), full_matrices=False)
                    layer.parametrizations.weight[0]._u.copy_(u[:, 0])
                    layer.parametrizations.weight[0]._v.copy_(v[0])
    if hasattr(nets, "vgg"):
        nets.vgg.double()
    for optimiser in (nets.opt_G, nets.opt_D):
        optimiser.param_groups[0]["lr"] = 0.0
    return nets


def named(net):
    return {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}


def conv(p, name, x, **how):
    """A convolution, its weight divided by the largest singular value where there is one."""
    if (w := p.get(f"{name}.weight")) is None:
        w = p[f"{name}.parametrizations.weight.original"]
        w = w / torch.linalg.matrix_norm(w.flatten(1), 2)
    return F.conv2d(x, w, p.get(f"{name}.bias"), **how)


def nearest(m, h, w):
    rows, columns = ([i * n // to for i in range(to)] for n, to in ((m.shape[2], h),
                                                                    (m.shape[3], w)))
    return m[:, :, rows][:, :, :, columns]


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


def naive_spade(p, name, h, m, kernel=3):
    """Fig. 2.10 and Eqs. (2.1) to (2.3), one channel at a time."""
    m = nearest(m, *h.shape[2:])
    shared = conv(p, f"{name}.shared", m, padding=kernel // 2).clamp(min=0)
    gamma, beta = (conv(p, f"{name}.{n}", shared, padding=kernel // 2) for n in ("gamma", "beta"))
    out = []
    for c in range(h.shape[1]):
        mu = h[:, c].sum() / h[:, c].numel()
        sigma = (((h[:, c]**2 - mu**2).sum() / h[:, c].numel()) + 1e-5)**0.5
        out.append((1 + gamma[:, c]) * (h[:, c] - mu) / sigma + beta[:, c])
    return torch.stack(out, dim=1)


def naive_block(p, name, h, m, kernel):
    """Fig. 2.11: no activation on the skip, which is learnt where the widths differ."""
    skip = h
    if f"{name}.conv_s.parametrizations.weight.original" in p:
        skip = conv(p, f"{name}.conv_s", naive_spade(p, f"{name}.spade_s", h, m, kernel))
    for i in "01":
        h = conv(p, f"{name}.conv_{i}", leaky(naive_spade(p, f"{name}.spade_{i}", h, m, kernel)),
                 padding=1)
    return skip + h


def naive_G(p, m, z, args):
    """Fig. 2.12; which blocks are preceded by a doubling follows from how many there are."""
    names = ["head", "middle_0", "middle_1", "up_0", "up_1", "up_2", "up_3", "up_4"]
    doubled = {4: names[3:7], 5: ["middle_0", *names[3:7]], 6: names[1:7], 7: names[1:]}
    h, w = m.shape[2] >> args.doublings, m.shape[3] >> args.doublings
    if z is None:
        x = conv(p, "fc", nearest(m, h, w), padding=1)
    else:
        x = (z @ p["fc.weight"].t() + p["fc.bias"]).view(len(z), 16 * args.ngf, h, w)
    for name in names[:8 if args.doublings == 7 else 7]:
        if name in doubled[args.doublings]:
            x = nearest(x, 2 * x.shape[2], 2 * x.shape[3])
        x = naive_block(p, name, x, m, args.kernel)
    return conv(p, "to_rgb", leaky(x), padding=1).tanh()


def naive_E(p, x, side):
    """Fig. 2.14: 3x3 convolutions of stride 2, instance norm, slope 0.2; two linear heads."""
    h = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
    for i in range(int(math.log2(side)) - 2):
        h = leaky(instance_norm(conv(p, f"layers.{i}.0", h, stride=2, padding=1)))
    assert h.shape[2:] == (4, 4)
    h = h.flatten(1)
    return [h @ p[f"{n}.weight"].t() + p[f"{n}.bias"] for n in ("mu", "logvar")]


def naive_D(p, m, x, layers):
    """Fig. 2.13 at two scales; the second sees means over windows of up to 3 x 3."""
    outs, x = [], torch.cat([m, x], dim=1)
    for scale in (0, 1):
        if scale:
            h, w = ((n + 1) // 2 for n in x.shape[2:])
            x = torch.stack([torch.stack([
                x[:, :, max(0, 2 * i - 1):2 * i + 2, max(0, 2 * j - 1):2 * j + 2].mean((2, 3))
                for j in range(w)], dim=2) for i in range(h)], dim=2)
        outs.append([leaky(conv(p, f"scales.{scale}.stages.0.0", x, stride=2, padding=2))])
        for i in range(1, layers):
            out = conv(p, f"scales.{scale}.stages.{i}.0", outs[-1][-1], padding=2,
                       stride=2 if i < layers - 1 else 1)
            outs[-1].append(leaky(instance_norm(out)))
        outs[-1].append(conv(p, f"scales.{scale}.stages.{layers}", outs[-1][-1], padding=2))
    return outs


def naive_vgg(p, x, layers):
    """VGG-19's relu1_1, relu2_1, ..., of a picture in [-1, 1] as it is."""
    found, i = [], 0
    for block, convs in enumerate((2, 2, 4, 4, 4)[:layers]):
        for n in range(1 if block == layers - 1 else convs):
            x = F.conv2d(x, p[f"features.{i}.weight"], p[f"features.{i}.bias"], padding=1).clamp(
                min=0)
            found += [x] if n == 0 else []
            i += 2
        x, i = F.max_pool2d(x, 2), i + 1
    return found


NETWORKS = [[], ["--input", "random", "--kernel", "1"], ["--doublings", "5", "--kernel", "5"],
            ["--doublings", "6", "--size", "128", "--height", "64", "--ngf", "2"],
            ["--doublings", "7", "--size", "256", "--height", "128", "--ngf", "2"]]


@pytest.mark.parametrize("flags", NETWORKS, ids=" ".join)
def test_generator_is_its_figures(flags):
    args = tiny_args(*flags)
    nets = lively(spade.build(args, CPU))
    m, z = random_m(args), None if args.input == "segmap" else noise(2, 5)
    close([nets.G(m, z)], [naive_G(named(nets.G), m, z, args)], 1e-7, 1e-9)


@pytest.mark.parametrize("layers", [3, 4, 5])
def test_discriminator_is_its_figure(layers):
    args = tiny_args("--d-layers", layers, "--edges")
    D = lively(spade.build(args, CPU)).D
    m, x = random_m(args, 2, 36, 31), noise(2, 3, 36, 31)
    for scale, naive in zip(D(m, x), naive_D(named(D), m, x, layers), strict=True):
        close(scale, naive, 1e-7, 1e-9)
    D = spade.Discriminator(7, 2)
    sizes = [tuple(out.shape[1:3]) for out in D(torch.zeros(1, 7, 256, 256))]
    assert sizes == [(2, 129), (4, 65), (8, 33), (16, 34), (1, 35)]


@pytest.mark.parametrize("size, side, h, w", [(32, 32, 20, 50), (48, 32, 32, 32), (64, 64, 33, 64)])
def test_encoder_is_its_figure(size, side, h, w):
    nets = lively(spade.build(tiny_args("--input", "encoder", "--size", size, "--height", 32), CPU))
    x = noise(2, 3, h, w)
    close(nets.E(x), naive_E(named(nets.E), x, side), 1e-7, 1e-9)
    assert len(spade.Encoder(1, 7).layers) == len(spade.Encoder(1, 7, 512).layers) == 6


# ---- Eqs. 2.1 to 2.3 -----------------------------------------------------------------------------


def test_spade_is_eqs_2_1_to_2_3_and_paints_with_running_statistics():
    h, layer = 3 + 2 * torch.randn(2, 3, 8, 6).double(), spade.Spade(3, 4, hidden=5).double()
    m = random_m(tiny_args(), 2, 24, 18)
    p = {f"layer.{name}": v for name, v in named(layer).items()}
    close([layer(h, m)], [naive_spade(p, "layer", h, m)])
    close([layer.norm.running_mean], [0.1 * h.mean((0, 2, 3))])  # moved once, as PyTorch's default
    layer.norm.running_mean.fill_(2.0)
    layer.norm.running_var.fill_(9.0)
    layer.eval()
    shared = F.relu(layer.shared(nearest(m, 8, 6)))
    expected = (1 + layer.gamma(shared)) * (h - 2) / (9 + 1e-5)**0.5 + layer.beta(shared)
    close([layer(h, m)], [expected])


def test_spade_reduces_to_conditional_batch_norm_for_constant_maps():
    """Sec. 2.3: one label per picture; away from the zero padding gamma and beta are vectors."""
    h, layer = torch.randn(3, 4, 12, 12).double(), spade.Spade(4, 3, hidden=5).double()
    classes = torch.tensor([2, 0, 2])
    out = layer(h, F.one_hot(classes, 3).double()[:, :, None, None].expand(-1, -1, 12, 12))
    shared = F.relu(layer.shared.weight.sum((2, 3))[:, classes].t() + layer.shared.bias)
    gamma, beta = (shared @ c.weight.sum((2, 3)).t() + c.bias for c in (layer.gamma, layer.beta))
    expected = (1 + gamma)[:, :, None, None] * F.batch_norm(h, None, None, training=True)
    expected = expected + beta[:, :, None, None]  # a table of vectors per class
    close([out[:, :, 2:-2, 2:-2]], [expected[:, :, 2:-2, 2:-2]])


def test_spade_reduces_to_adain_for_one_picture_without_places():
    """Sec. 2.3: N = 1 and modulation without places: AdaIN with mean beta, deviation 1 + gamma."""
    h, layer = torch.randn(1, 4, 6, 6).double(), spade.Spade(4, 3, hidden=5, kernel=1).double()
    m = torch.zeros(1, 3, 6, 6).double()
    m[:, 1] = 1
    shared = F.relu(layer.shared(m))[:, :, :1, :1]
    close([layer(h, m)], [instance_norm(h) * (1 + layer.gamma(shared)) + layer.beta(shared)])


def test_batch_norm_is_synchronised_on_gpus_alone(monkeypatch):
    """Sec. 2.4. PyTorch's synchronised norm has no parameters and the buffers of the other."""
    monkeypatch.setattr(spade.dist, "is_initialized", lambda: True)
    plain = spade.build(tiny_args(), CPU).G
    assert not any(isinstance(n, torch.nn.SyncBatchNorm) for n in plain.modules())

    class Gpu:                                   # stands for cuda where there is none
        type = "cuda"
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch.optim, "Adam", lambda *_, **__: None)
    G = spade.build(tiny_args(), Gpu()).G
    norms = [n for n in G.modules() if isinstance(n, torch.nn.SyncBatchNorm)]
    assert len(norms) == 18 and not any(n.affine for n in norms)
    assert G.state_dict().keys() == plain.state_dict().keys()


# ---- losses --------------------------------------------------------------------------------------


def test_kl_divergence_is_the_closed_form():
    mu, logvar = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    p = torch.distributions.Normal(torch.zeros(3, 2).double(), 1.0)
    close([spade.kl_divergence(mu, logvar)],
          [torch.distributions.kl_divergence(q, p).sum(1).mean()])
    assert spade.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == spade.CHANCE["L_KLD"]


def test_hinge_signs_and_chance():
    """D gains from real above 1 and others below -1, nothing beyond; G gains without bound. The
    last map of a scale counts, and every scale as much as another."""
    for value, real, fake, G in ((-3.0, 4, 0, 3), (0.0, 1, 1, 0), (3.0, 0, 4, -3)):
        outs = [[torch.full((2, 1, 3, 3), 7.0), torch.full((2, 1, 2, 2), value)]] * 2
        assert [float(spade.hinge(outs, True)), float(spade.hinge(outs, False)),
                float(spade.hinge_G(outs))] == [real, fake, G]
    scales = [[torch.full((1, 1, 4, 4), 1.0)], [torch.full((1, 1, 2, 2), -2.0)]]
    assert [float(spade.hinge(scales, True)), float(spade.hinge_G(scales))] == [1.5, 0.5]
    zero = [[torch.zeros(1, 1, 2, 2)]]
    assert spade.CHANCE["L_D"] == float(spade.hinge(zero, True) + spade.hinge(zero, False))


# ---- the step ------------------------------------------------------------------------------------


def naive_step(nets, m, x, args, noise):
    """Losses and gradients of one step as the paper words them, by the transcriptions above."""
    p, losses = {name: named(getattr(nets, name)) for name in "GDE" if hasattr(nets, name)}, {}
    z = None if args.input == "segmap" else noise
    if "E" in p:
        mu, logvar = naive_E(p["E"], x, 32)
        z = mu + noise * logvar.exp().sqrt()
        losses["L_KLD"] = ((mu**2 + logvar.exp() - logvar - 1) / 2).sum() / len(x)
    x_hat = naive_G(p["G"], m, z, args)
    fake, real = (naive_D(p["D"], m, picture, args.d_layers) for picture in (x_hat, x))
    losses["L_GAN"] = -(fake[0][-1].mean() + fake[1][-1].mean()) / 2
    losses["L_FM"] = sum((f - r.detach()).abs().mean() for i in (0, 1)
                         for f, r in zip(fake[i][:-1], real[i][:-1], strict=True)) / 2
    if args.lambda_vgg:
        weights = nets.vgg.state_dict()
        losses["L_VGG"] = sum(w * (a - b).abs().mean() for w, a, b in zip(
            (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), naive_vgg(weights, x_hat, args.vgg_layers),
            naive_vgg(weights, x, args.vgg_layers), strict=False))
    L = (losses["L_GAN"] + args.lambda_fm * losses["L_FM"]
         + args.lambda_vgg * losses.get("L_VGG", 0) + args.lambda_kld * losses.get("L_KLD", 0))
    grads = {name: torch.autograd.grad(L, [*p[name].values()], retain_graph=True)
             for name in "GE" if name in p}
    fake = naive_D(p["D"], m, x_hat.detach(), args.d_layers)
    losses["L_D"] = sum((1 - real[i][-1]).clamp(min=0).mean()
                        + (1 + fake[i][-1]).clamp(min=0).mean() for i in (0, 1)) / 2
    return losses, grads | {"D": torch.autograd.grad(losses["L_D"], [*p["D"].values()])}


@pytest.mark.parametrize("flags", [
    [], [*STYLED, "--lambda-vgg", "5", "--vgg", "random", "--vgg-layers", "2"],
    ["--input", "random", "--d-layers", "3", "--lambda-fm", "0", "--lambda-vgg", "3", "--vgg",
     "random", "--vgg-layers", "5", "--no-channels-last"],
    [*STYLED, "--unlabelled", "255", "--batch", "3"]], ids=" ".join)
def test_step_is_the_objective(flags):
    """Losses and all gradients in float64, every input and term, with weights far apart."""
    args = tiny_args("--lambda-fm", 7, "--lambda-kld", 0.6, *flags)
    nets = lively(spade.build(args, CPU))
    m, x = random_m(args, args.batch), noise(args.batch, 3, 32, 32)
    eps = torch.randn(args.batch, 5, generator=rng(3)).double()
    expected, grads = naive_step(nets, m, x, args, eps)
    losses = spade.train_step(nets, m, x, args, rng(3))
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(float(value.detach()), rel=1e-8), name
    for name in grads:
        close([p.grad for p in getattr(nets, name).parameters()], grads[name], 1e-6, 1e-9)


def test_d_learns_from_the_picture_that_g_was_judged_by():
    """x_hat is not painted anew: one pass of G, whose statistics move once; D still learns."""
    args = tiny_args("--batch", 2)
    nets, seen = spade.build(args, CPU), []
    nets.D.register_forward_pre_hook(lambda D, inputs: seen.append(inputs[1].detach().clone()))
    x = noise(2, 3, 32, 32, dtype=torch.float32)
    spade.train_step(nets, random_m(args, dtype=torch.float32), x, args, rng())
    x_hats = [picture for picture in seen if not torch.equal(picture, x)]
    assert len(seen) == 4 and len(x_hats) == 2 and torch.equal(*x_hats)
    assert int(nets.G.head.spade_0.norm.num_batches_tracked) == 1
    assert all(p.requires_grad for p in nets.D.parameters())


@pytest.mark.parametrize("flags", [STYLED, [*STYLED, "--amp"], ["--input", "random"], []],
                         ids=" ".join)
def test_every_weight_learns_and_losses_are_float32(flags):
    args = tiny_args("--init", "glorot", *flags)
    nets = spade.build(args, CPU)
    m, x = random_m(args, dtype=torch.float32), noise(2, 3, 32, 32, dtype=torch.float32)
    before = {name: named(getattr(nets, name)) for name in "GDE" if hasattr(nets, name)}
    for step in range(2):
        losses = spade.train_step(nets, m, x, args, rng(step))
        assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    for name, old in before.items():
        for key, p in getattr(nets, name).named_parameters():
            # a bias before a norm has no effect, and G's hidden ReLUs may all be off
            assert "bias" in key or not torch.equal(p, old[key]), (name, key)


@pytest.mark.slow
def test_compile_does_not_compile_anew_at_every_step():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    args = tiny_args("--compile")
    nets = spade.build(args, CPU)
    m, x = random_m(args, dtype=torch.float32), noise(2, 3, 32, 32, dtype=torch.float32)
    graphs = []
    for step in range(4):
        spade.train_step(nets, m, x, args, rng(step))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2] == graphs[3]


# ---- the other generators of Tab. 2.3 ------------------------------------------------------------


@pytest.mark.parametrize("make", [
    pix2pixhd.ConcatGenerator, pix2pixhd.HDGenerator,
    lambda *a: pix2pixhd.HDGenerator(*a, "spade"), lambda *a: pix2pixhd.HDGenerator(*a, "concat")])
def test_the_other_generators_learn_and_normalise(make):
    args = tiny_args("--doublings", 4, "--edges", "--init", "glorot")
    G, m = spade.init_weights(make(args, 5), "glorot"), random_m(args, dtype=torch.float32)
    G(m).square().mean().backward()
    assert G(m).shape == (2, 3, 32, 32)
    assert all(p.grad is not None for p in G.parameters())
    assert pix2pixhd.instance_normalised(G)(m).shape == (2, 3, 32, 32)
    assert not any(isinstance(n, torch.nn.BatchNorm2d) for n in G.modules())


def test_concat_hands_m_to_the_convolution():
    m, h = random_m(tiny_args(), 2, 8, 8, torch.float32), torch.randn(2, 3, 4, 4)
    out = pix2pixhd.Concat(3)(h, m)
    close([out[:, 3:], out[:, :3]], [nearest(m, 4, 4), F.batch_norm(h, None, None, training=True)],
          1e-5, 1e-5)


# ---- data ----------------------------------------------------------------------------------------


def test_samples_are_cropped_and_mirrored_alike(folder):
    args = spade.get_args(["--data", str(folder), *TINY, "--edges"])
    pairs = spade.find_pairs(folder, "train", True)
    spade.check_pairs(pairs, args)
    assert [p[0].name for p in pairs] == [f"{i}.png" for i in range(5)]
    data, seen, mirrored = spade.LabelledPictures(pairs, args), set(), 0
    for n in range(10):
        labels, edges, x = data[n]
        assert labels.shape == (32, 32) and edges.shape == (1, 32, 32) and x.shape == (3, 32, 32)
        assert torch.equal(x, data[n][2])  # a function of n
        instances = Image.fromarray(labels.numpy().astype(np.uint8))
        assert torch.equal(edges, spade.border(instances))
        i = common.shuffled(5, common.mix(0, "epoch", n // 5))[n % 5]
        seen.add((n // 5, i))
        big = [Image.open(f).resize((36, 36), how) for f, how in zip(
            pairs[i], (Image.BICUBIC, Image.NEAREST), strict=False)]
        places = [(dx, dy, flip) for dx in range(5) for dy in range(5) for flip in (False, True)
                  if np.array_equal(np.asarray(part := big[1].crop((dx, dy, dx + 32, dy + 32)))[
                      :, ::-1 if flip else 1], labels) and part]
        picture = {tuple(place): np.asarray(big[0].crop((*place[:2], place[0] + 32, place[1] + 32))
                                            )[:, ::-1 if place[2] else 1] for place in places}
        ours = ((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        found = [place for place, p in picture.items() if np.array_equal(p, ours)]
        assert len(found) == 1, n
        mirrored += found[0][2]
    assert len(seen) == 10 and 0 < mirrored < 10
    test = spade.test_batch(pairs, args)
    whole = Image.open(pairs[0][0]).resize((32, 32), Image.BICUBIC)
    close([test[2][0]], [common.to_tensor(whole)], 0, 0)


def test_one_hot_and_unlabelled_ids(folder):
    args = tiny_args("--unlabelled", "255", "0", "--edges")
    assert spade.m_channels(args) == 6
    labels = spade.to_labels(Image.fromarray(np.array([[0, 3], [255, 1]], dtype=np.uint8)), args)
    assert labels.tolist() == [[0, 3], [4, 1]]
    edges = torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]])
    m = spade.one_hot(labels[None], edges, args)
    assert m.shape == (1, 6, 2, 2) and torch.equal(m[:, 5:], edges)
    for y in (0, 1):
        for x in (0, 1):
            assert m[0, :5, y, x].tolist() == [float(i == labels[y, x]) for i in range(5)]
    assert spade.m_channels(tiny_args("--unlabelled", "0")) == 4   # an id among the others


def test_border_marks_both_sides():
    im = Image.fromarray(np.array([[7, 7, 7, 9], [7, 7, 7, 9], [7, 7, 7, 7]], dtype=np.uint8))
    assert spade.border(im)[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]


def test_label_count_is_found(folder, capsys):
    args = tiny_args()
    args.labels = None
    spade.check_pairs(spade.find_pairs(folder, "train"), args)
    assert args.labels == 4 and "--labels 4" in capsys.readouterr().out


def test_layouts_of_cityscapes_and_ade20k(tmp_path):
    city, ade = tmp_path / "city", tmp_path / "ADEChallengeData2016"
    grey, rgb = Image.new("L", (8, 4), 3), Image.new("RGB", (8, 4))
    for split in ("train", "val", "test"):
        for town in ("aachen", "bonn"):
            for folder in ("leftImg8bit", "gtFine"):
                (city / folder / split / town).mkdir(parents=True)
            name = f"{town}_000000_000019"
            rgb.save(city / f"leftImg8bit/{split}/{town}/{name}_leftImg8bit.png")
            for kind in ("labelIds", "instanceIds"):
                grey.save(city / f"gtFine/{split}/{town}/{name}_gtFine_{kind}.png")
            rgb.save(city / f"gtFine/{split}/{town}/{name}_gtFine_color.png")
    for split in ("training", "validation"):
        (ade / "images" / split).mkdir(parents=True)
        (ade / "annotations" / split).mkdir(parents=True)
        rgb.save(ade / f"images/{split}/ADE_1.jpg")
        grey.save(ade / f"annotations/{split}/ADE_1.png")
    for split, theirs in (("train", "train"), ("test", "val")):  # its test maps are blank
        pairs = spade.find_pairs(city, split, edges=True)
        assert [p[1].name[:4] for p in pairs] == ["aach", "bonn"]
        assert all("labelIds" in p[1].name and "instanceIds" in p[2].name for p in pairs)
        assert all(p[0].parts[-3] == theirs for p in pairs)
        assert spade.find_pairs(ade, split)[0][0].name == "ADE_1.jpg"
    assert spade.get_args(["--data", str(city)]).labels == 35
    assert spade.get_args(["--data", str(ade)]).labels == 151


def spoilt(folder, path, spoil):
    """A copy of the folder in which spoil(file) has been done to one file."""
    for f in folder.rglob("*.png"):
        (path / f.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (path / f.relative_to(folder)).write_bytes(f.read_bytes())
    spoil(path)
    return path


@pytest.mark.parametrize("spoil, message", [
    (lambda d: (d / "train_label/2.png").unlink(), "train_img/2.png: has no label map"),
    (lambda d: (d / "train_img/2.png").unlink(), "train_label/2.png: has no picture"),
    (lambda d: (d / "train_inst/2.png").unlink(), "train_img/2.png: has no instance map"),
    (lambda d: Image.new("L", (20, 36)).save(d / "train_label/2.png"),
     "train_label/2.png: 20x36 pixels, but .*train_img/2.png has 40x36"),
    (lambda d: Image.new("L", (40, 36), 77).save(d / "train_label/2.png"),
     "train_label/2.png: label ids \\[77\\] out of range: expected 0 to 3"),
    (lambda d: Image.new("RGB", (40, 36)).save(d / "train_label/2.png"),
     "train_label/2.png: expected a map of ids with one channel, found RGB"),
    (lambda d: (d / "train_label/2.png").write_bytes(b"no"), "train_label/2.png: not a readable"),
    (lambda d: (d / "train_img/2.png").write_bytes(b"no"), "train_img/2.png: not a readable"),
    (lambda d: (d / "train_img").rename(d / "pictures"), "train_label/0.png: has no picture"),
    (lambda d: [(d / f"train_{k}").rename(d / k) for k in ("img", "label")],
     "no train pictures with label maps"),
    (lambda d: Image.new("L", (40, 36), 9).save(d / "test_label/1.png"),
     "test_label/1.png: label ids \\[9\\] out of range")])
def test_bad_data_is_named_before_training(folder, tmp_path, spoil, message):
    data = spoilt(folder, tmp_path / "data", spoil)
    with pytest.raises(common.UserError, match=message):
        run("--data", data, *TINY, "--edges", "--steps", "1", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_pictures_are_never_scored_in_silence(folder, tmp_path, capsys):
    data = spoilt(folder, tmp_path / "data", lambda d: [
        (d / f"test_{k}").rename(d / f"val_{k}") for k in ("img", "label")])
    assert spade.find_pairs(data, "test")[0][0].parent.name == "val_img"
    assert capsys.readouterr().out == ""
    (data / "val_img").rename(data / "other")
    (data / "val_label").rename(data / "more")
    assert spade.find_pairs(data, "test")[0][0].parent.name == "train_img"
    assert "no test pictures: these are training pictures" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="no val pictures"):
        spade.find_pairs(data, "val")


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, constant", [([], 10), (["--decay-from", "1"], 20)])
def test_what_train_applies(folder, tmp_path, monkeypatch, flags, constant):
    """Both rates, constant and then falling from 1 to 1/10; m; a noise of its own for each step."""
    seen = []

    def train_step(nets, m, x, args, rng):
        seen.append([o.param_groups[0]["lr"] for o in (nets.opt_G, nets.opt_D)])
        assert m.shape == (1, 5, 32, 32) and torch.equal(m[:, :4].sum(1), torch.ones(1, 32, 32))
        assert x.shape == (1, 3, 32, 32)
        seen[-1].append(float(torch.rand((), generator=rng)))
        return {"L_D": torch.tensor(1.0)}

    monkeypatch.setattr(spade, "train_step", train_step)
    run("--data", folder, *TINY, "--edges", *flags, "--size", 32, "--epochs", 4, "--batch", 1,
        "--out", tmp_path / "run", "--sample-every", 100)
    factor = np.array([1.0] * constant + [(20 - step) / 10 for step in range(constant, 20)])
    assert np.allclose([s[:2] for s in seen], factor[:, None] * [1e-4, 4e-4], rtol=1e-9)
    assert len({s[2] for s in seen}) == 20


def test_run_folder_and_resumed_run_is_bit_identical(folder, trained, tmp_path):
    rows = (trained / "log.csv").read_text().splitlines()
    assert rows[0] == "step,L_GAN,L_FM,L_D,L_KLD,seconds" and len(rows) == 5
    flags = ["--data", folder, *TINY, *STYLED, "--steps", 4, "--out", tmp_path / "run"]
    interrupted(spade, lambda: run(*flags))
    run(*flags, "--resume")
    a, b = (torch.load(f / "last.pt", weights_only=True) for f in (trained, tmp_path / "run"))
    assert a["step"] == b["step"] == 4
    assert_same(a["parts"], b["parts"])
    grid = Image.open(sorted((trained / "samples").iterdir())[-1])
    assert grid.width == 5 * (128 + 4) + 4       # m, x, own style, another's style, z


@pytest.mark.slow
def test_two_processes_have_the_same_weights(folder, tmp_path):
    """Averaged gradients. On CPUs each takes its own batch statistics, and its own noise."""
    code = ("import sys, torch, common, spade; save = common.Run.save\n"
            "def keep(run):\n"
            "    save(run); torch.save({n: {k: p for k, p in run.parts[n].named_parameters()}\n"
            "        for n in 'GDE'}, run.folder / f'rank{run.rank}.pt')\n"
            "common.Run.save = keep; spade.main(sys.argv[1:])")
    env = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", WORLD_SIZE="2",
               MASTER_PORT=str(20000 + os.getpid() % 20000))
    flags = ["--data", str(folder), *TINY, *STYLED, "--steps", "2", "--out", str(tmp_path / "two")]
    jobs = [subprocess.Popen([sys.executable, "-c", code, *flags], cwd=ROOT,
                             env=dict(env, RANK=str(rank))) for rank in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    first, second = (torch.load(tmp_path / f"two/rank{rank}.pt") for rank in range(2))
    assert_same(first, second)
    start = spade.build(spade.get_args(flags), CPU)
    assert not torch.equal(first["G"]["to_rgb.weight"], start.G.to_rgb.weight)


# ---- translate and evaluate ----------------------------------------------------------------------


def test_an_exemplar_is_resized_as_training_pictures_are(folder, trained, tmp_path, monkeypatch):
    seen, original = [], spade.style
    monkeypatch.setattr(spade, "style", lambda nets, x: seen.append(x) or original(nets, x))
    photo = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    run("--translate", folder / "test_label/0.png", "--weights", trained / "last.pt", "--exemplar",
        tmp_path / "photo.png", "--out", tmp_path / "out")
    small = Image.fromarray(photo).resize((32, 32), Image.BICUBIC)
    close(seen, [common.to_tensor(small)[None]])


def test_maps_to_be_painted_are_resized_to_nearest(folder, trained, tmp_path, monkeypatch):
    seen, original = [], spade.paint
    monkeypatch.setattr(spade, "paint", lambda nets, maps, z, args: (
        seen.append(maps), original(nets, maps, z, args))[1])
    label, inst = (folder / f"test_{kind}/0.png" for kind in ("label", "inst"))
    run("--translate", label, "--weights", trained / "last.pt", "--inst", inst, "--out", tmp_path)
    small, borders = (common.open_ids(f).resize((32, 32), Image.NEAREST) for f in (label, inst))
    assert np.array_equal(seen[0][0][0], np.asarray(small))
    assert torch.equal(seen[0][1][0], spade.border(borders))


def test_translate_is_g_at_the_maps_sizes(folder, trained, tmp_path, capsys):
    last, maps, out = trained / "last.pt", folder / "test_label", tmp_path / "out"
    for name, more in (("z0", []), ("z1", ["--seed", 1]), ("ex", [
            "--exemplar", folder / "test_img/0.png", "--inst", folder / "test_inst"])):
        run("--translate", maps, "--weights", last, "--out", out / name, *more)
        assert [Image.open(f).size for f in sorted((out / name).iterdir())] == [(40, 36)] * 3
    args = spade.get_args(["--data", str(folder), "--weights", str(last)])
    nets = spade.load_networks(args, CPU)
    small = common.open_rgb(folder / "test_img/0.png").resize((args.size, args.height),
                                                              Image.BICUBIC)
    picture = common.to_tensor(small)[None]
    with torch.no_grad():
        z = nets.E.eval()(picture)[0]                                    # the mean, not a sample
        m, _, _ = (t[None] for t in spade.LabelledPictures(
            spade.find_pairs(folder, "test", True), args, augment=False)[1])
        edges = spade.test_batch(spade.find_pairs(folder, "test", True), args)[1][1:2]
        x_hat = nets.G.eval()(spade.one_hot(m, edges, args), z)[0]
    expected = common.to_pil(x_hat).resize((40, 36), Image.BICUBIC)
    paints = {n: np.asarray(Image.open(out / n / "1.png")).astype(int) for n in ("z0", "z1", "ex")}
    apart = np.abs(paints["ex"] - np.asarray(expected))
    assert apart.max() <= 1 and apart.mean() < 0.1 * np.abs(paints["ex"] - paints["z0"]).mean()
    assert np.abs(paints["z0"] - paints["z1"]).max() > 0
    Image.new("L", (9, 9), 200).save(tmp_path / "bad.png")
    line = error_of(capsys, spade.main, "--translate", tmp_path / "bad.png", "--weights", last)
    assert "bad.png: label ids [200] out of range" in line
    img, inst = folder / "test_img", folder / "test_inst"
    for more, where in (([], maps), (["--exemplar", img / "0.png"], img), (["--inst", inst], inst)):
        assert "would be overwritten" in error_of(capsys, spade.main, "--translate", maps,
                                                  "--weights", last, "--out", where, *more)


def test_matrix_has_the_paints_of_every_style(folder, trained, tmp_path):
    figures.main(["spade", "matrix", "--weights", str(trained / "last.pt"), "--data", str(folder),
                  "--out", str(tmp_path), "--device", "cpu"])
    args = spade.get_args(["--data", str(folder), "--weights", str(trained / "last.pt")])
    test = spade.test_batch(spade.find_pairs(folder, "test", True), args)
    nets = spade.load_networks(args, CPU)
    z = spade.style(nets, test[2][:1]).expand(2, -1)
    expected = common.to_pil(spade.paint(nets, [t[1:] for t in test], z, args)[1])
    with Image.open(tmp_path / "matrix.png") as im:   # three rows and two columns of 128 pixels
        tile = im.crop((136, 284, 264, 412)).resize((32, 32), Image.NEAREST)
    assert np.array_equal(np.asarray(tile), np.asarray(expected))


def test_each_answer_has_its_style(folder, trained):
    """Own style: q's mean of the picture itself; another's: of the next; z: one for each map."""
    args = spade.get_args(["--data", str(folder), "--weights", str(trained / "last.pt")])
    nets, test = spade.load_networks(args, CPU), spade.test_batch(
        spade.find_pairs(folder, "test", True), args)
    m = spade.one_hot(*test[:2], args)
    with torch.no_grad():
        nets.G.fc.weight.mul_(100)               # a network of four steps hardly heeds its z
        nets.E.logvar.bias.add_(1)
        mu = torch.cat([nets.E.eval()(x)[0] for x in test[2].split(1)])
        nets.G.eval()
        z = torch.randn(3, 5, generator=rng(args.seed))
        expected = {"own style": mu, "another's style": mu[[1, 2, 0]], "z": z}
        expected = {name: nets.G(m, z) for name, z in expected.items()}
    found = spade.answers(nets, test, args)
    assert [*found] == [*expected] and nets.G.training
    close([spade.style(nets, test[2])], [mu], 1e-4, 1e-6)
    assert float((expected["z"][0] - expected["own style"][0]).abs().max()) > 0.01
    close([*found.values()], [*expected.values()], 1e-4, 1e-5)


def test_evaluate_prints_scores_of_the_painted_test_set(folder, trained, tmp_path, monkeypatch,
                                                        capsys):
    seen, net = {}, tmp_path / "fcn.pt"

    def fid(fakes, reals, device, weights):
        seen.update(fakes=torch.cat(list(fakes)), reals=torch.cat(list(reals)), weights=weights)
        return 12.5

    monkeypatch.setattr(metrics, "fid", fid)
    monkeypatch.setattr(reading, "STEPS", 5)
    for _ in range(2):  # the second time the segmentation network is read
        run("--evaluate", "--weights", trained / "last.pt", "--data", folder, "--segmenter", net,
            "--fid-weights", "w.pth")
    lines = capsys.readouterr().out.splitlines()
    mIoU = [line for line in lines if line.startswith("mIoU")]
    assert mIoU[0] == mIoU[1] and "real pictures" in mIoU[0]
    assert "FID (3 painted, 3 real, 299x299): 12.5 (lower is better)" in lines
    args = spade.get_args(["--data", str(folder), "--weights", str(trained / "last.pt")])
    test = spade.test_batch(spade.find_pairs(folder, "test", True), args)
    own = spade.answers(spade.load_networks(args, CPU), test, args)["own style"]
    assert torch.equal(seen["fakes"], own) and torch.equal(seen["reals"], test[2])
    assert seen["weights"] == "w.pth"


def test_label_scores_by_a_torchscript_network(tmp_path):
    """It reads brightness; what is skipped does not count, what is only found costs."""
    class Reader(torch.nn.Module):
        def forward(self, x):
            return torch.stack([(x[:, 0] < 0).float(), (x[:, 0] >= 0).float(), x[:, 1]], dim=1)

    torch.jit.script(Reader()).save(tmp_path / "net.pt")
    labels = torch.tensor([[[0, 1], [1, 3]]])
    x = torch.tensor([[-1.0, 1], [1, 1]]).expand(1, 3, 2, 2).clone()
    x[:, 1:] = -1
    data = [(labels[0], torch.zeros(0, 2, 2), x[0])]
    x_hat = x.clone()
    x_hat[0, 1, 0, 0], x_hat[0, 0, 0, 1] = 3, -1   # a third class is hallucinated, another swapped
    mIoU, accuracy = reading.label_scores(x_hat, (labels, None, x), data, 3, [255], CPU,
                                             [tmp_path / "net.pt"])
    assert mIoU["trivial"]["real pictures"] == accuracy["trivial"]["real pictures"] == 100
    assert accuracy["value"] == pytest.approx(100 / 3)
    assert mIoU["value"] == pytest.approx(100 * (0 + 1 / 2 + 0) / 3)


def test_toy_run_ends_with_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(toy.DEFAULT_N, "scenes", 6)
    draw = toy.DATASETS["scenes"]
    monkeypatch.setitem(toy.DATASETS, "scenes", lambda *a, **k: draw(*a, **k, n_test=3))
    monkeypatch.setattr(scenes, "SEGMENTER_STEPS", 2)
    run("--steps", 2, "--size", 32, "--load", 32, "--ngf", 4, "--ndf", 4, "--batch", 2, "--device",
        "cpu")
    result = json.loads((tmp_path / "runs/spade-toy/result.json").read_text())
    assert [s["name"] for s in result["scores"]] == [
        "colour error, own style", "colour error, another's style", "colour error, z", "mIoU",
        "accuracy"]
    kept = {f: f.stat().st_mtime for f in Path("datasets/toy").glob("*segmenter*.pt")}
    assert len(kept) == 3
    run("--evaluate", "--weights", "runs/spade-toy/last.pt", "--split", "val")
    assert {f: f.stat().st_mtime for f in kept} == kept


def test_user_errors_are_one_line(folder, trained, tmp_path, capsys):
    def fails(*flags):
        return error_of(capsys, spade.main, *flags)
    line = fails("--data", "nowhere")
    assert "--data nowhere: no such folder" in line and "ade20k" in line
    for flags, message in (
            (["--size", 40], "--size 40: must be a multiple of 16"),
            (["--height", 24], "--height 24: must be a multiple of 16"),
            (["--doublings", 5, "--batch", 1], "--batch 1: G would start"),
            (["--doublings", 7], "--size 32: must be a multiple of 128"),
            (["--labels", 0], "--labels 0")):
        assert message in fails("--data", folder, *TINY, *flags)
    assert "--weights" in fails("--translate", folder / "test_label")
    run("--data", folder, *TINY, "--steps", 1, "--out", tmp_path / "plain")
    assert "--exemplar" in fails("--translate", folder / "test_label", "--exemplar", "x.png",
                                 "--weights", tmp_path / "plain/last.pt")
    assert "5.png: no such file" in fails(
        "--translate", folder / "test_label", "--weights", trained / "last.pt", "--inst",
        folder / "test_label/5.png")
    assert "--inst: only a network trained with --edges" in fails(
        "--translate", folder / "test_label", "--weights", tmp_path / "plain/last.pt", "--inst",
        folder / "test_inst")
    Image.new("L", (9, 8)).save(tmp_path / "0.png")
    assert "0.png: 9x8 pixels, but" in fails(
        "--translate", folder / "test_label/0.png", "--weights", trained / "last.pt", "--inst",
        tmp_path / "0.png", "--out", tmp_path / "out")
    assert "does not fit" in fails("--data", folder, *TINY, *STYLED, "--ngf", 8, "--steps", 5,
                                   "--out", trained, "--resume")


@pytest.mark.slow
def test_learns_the_colours_of_the_labels(folder, tmp_path):
    """A short run paints each label in its colour: far nearer to the truth than one mean colour."""
    run("--data", folder, *TINY, "--steps", 150, "--lr-G", 1e-3, "--lr-D", 4e-3, "--init",
        "glorot", "--batch", 4, "--out", tmp_path / "run", "--log-every", 50)
    args = spade.get_args(["--data", str(folder), "--weights", str(tmp_path / "run/last.pt")])
    test = spade.test_batch(spade.find_pairs(folder, "test"), args)
    x, x_hat = test[2], spade.answers(spade.load_networks(args, CPU), test, args)["G(m)"]
    error, trivial = (x_hat - x).abs().mean(), (x - x.mean((0, 2, 3), keepdim=True)).abs().mean()
    assert error < 0.6 * trivial


# ---- toy/scenes ----------------------------------------------------------------------------------


def test_scenes_layout_scores_and_trivial_answers(tmp_path, monkeypatch):
    toy.draw("scenes", tmp_path / "s", n=4, size=32, n_test=4)
    args = tiny_args("--labels", 7, "--edges")
    pairs, train = (spade.find_pairs(tmp_path / "s", s, edges=True) for s in ("test", "train"))
    assert [len(spade.find_pairs(tmp_path / "s", s)) for s in ("train", "val", "test")] == [4] * 3
    test = labels, _, x = spade.test_batch(pairs, args)
    for pair, label in zip(pairs, labels, strict=True):
        inst, classes = np.asarray(Image.open(pair[2])), list(toy.SCENE_CLASSES)
        things = np.isin(label, [classes.index("tree"), classes.index("animal")])
        assert np.array_equal(inst > 0, things)  # every tree and animal has a number, nothing else
    every = {name: np.stack([np.asarray(Image.open(f)) for f in sorted(
        (tmp_path / "s/test_styles" / name).iterdir())]).transpose(0, 3, 1, 2) / 127.5 - 1
        for name in toy.SCENE_STYLES}
    same = np.array([[np.allclose(p[i], x[i], atol=1e-3) for p in every.values()]
                     for i in range(4)])
    assert (same.sum(1) == 1).all()              # the picture's own style is among them
    other = np.stack([*every.values()])[np.roll(same.argmax(1), -1), np.arange(4)]
    monkeypatch.setattr(scenes, "SEGMENTER_STEPS", 2)
    scores = toy.painted_scene_scores({"own style": x, "another's style": torch.from_numpy(other),
                               "z": torch.from_numpy(every["winter"])}, test,
                              spade.LabelledPictures(train, args), tmp_path / "s")
    assert [s["value"] for s in scores[:3]] == pytest.approx([0, 0, 0], abs=1e-3)
    assert all(v > 10 for s in scores[:3] for k, v in s["trivial"].items() if "class" in k)
    assert scores[3]["value"] == scores[3]["trivial"]["real pictures"]


def test_every_process_draws_a_z_of_its_own(folder, tmp_path, monkeypatch):
    seeds = []

    def train_step(nets, m, x, args, rng):
        seeds.append(rng.initial_seed())
        return {"L_D": torch.tensor(1.0)}

    monkeypatch.setattr(spade, "train_step", train_step)
    run("--data", folder, *TINY, *STYLED, "--steps", 3, "--out", tmp_path / "run")
    assert seeds == [common.mix(0, step, 0) for step in range(3)]    # seed, step, process


def test_a_grid_leaves_the_networks_as_they_were(folder, trained):
    """Each pass in training mode moves batch norm's statistics and spectral norm's vectors."""
    args = spade.get_args(["--data", str(folder), "--weights", str(trained / "last.pt")])
    nets = spade.load_networks(args, CPU)
    test = spade.test_batch(spade.find_pairs(folder, "test", True), args)
    before = {name: {k: v.clone() for k, v in net.state_dict().items()}
              for name, net in vars(nets).items()}
    columns = spade.sample_columns(nets, test, args)
    assert_same({name: dict(net.state_dict()) for name, net in vars(nets).items()}, before)
    assert torch.equal(columns["x"], test[2])
    assert torch.equal(columns["m"], spade.colour_map(test[0]))


def test_more_than_eight_maps_are_painted_in_their_own_styles(folder, trained):
    args = spade.get_args(["--data", str(folder), "--weights", str(trained / "last.pt")])
    nets = spade.load_networks(args, CPU)
    test = spade.test_batch(spade.find_pairs(folder, "test", True), args)
    maps = [t[torch.arange(10) % 3] for t in test[:2]]
    nets.G.fc.weight.data.mul_(100)              # a network of four steps hardly heeds its z
    z = spade.random_styles(10, args)
    found = spade.paint(nets, maps, z, args)
    assert float((found[9] - found[0]).abs().max()) > 1e-3           # one map, two styles
    close([found[8:]], [spade.paint(nets, [t[8:] for t in maps], z[8:], args)], 1e-4, 1e-5)
