"""spade.py: every equation against a plain transcription, and the script as its users run it."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import error_of
from PIL import Image
from torch.nn.utils import parametrize

import common
import spade
from lab import metrics, released, toy

ROOT = Path(__file__).parent.parent
TINY = ["--size", "32", "--load", "36", "--ngf", "4", "--ndf", "4", "--hidden", "6", "--z", "5",
        "--encoder-side", "16", "--labels", "4", "--batch", "2", "--lambda-vgg", "0", "--workers",
        "0", "--device", "cpu", "--log-every", "1"]
CPU = torch.device("cpu")


def tiny_args(*flags):
    return spade.get_args(["--data", ".", *TINY, *flags])


def count(net):
    return sum(p.numel() for p in net.parameters())


def random_map(n=4, b=2, h=8, w=6, edges=0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, n, (b, h, w), generator=rng)
    return spade.LabelMap(labels, torch.randint(0, 2, (b, edges, h, w), generator=rng).double(), n)


@pytest.fixture
def folder(tmp_path):
    """Five training and three test pairs of 40x36 pixels: colour blocks of labels 0 to 3."""
    rng = np.random.default_rng(0)
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 40]])
    for split, n in (("train", 5), ("test", 3)):
        for kind in ("img", "label", "inst"):
            (tmp_path / "data" / f"{split}_{kind}").mkdir(parents=True)
        for i in range(n):
            label = rng.integers(0, 4, (9, 10)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
            picture = (colours[label] + rng.integers(-20, 20, (36, 40, 3))).clip(0, 255)
            data = tmp_path / "data"
            Image.fromarray(label).save(data / f"{split}_label/{i}.png")
            inst = Image.fromarray(label.astype(np.uint16) * 1000 + 5)
            inst.save(data / f"{split}_inst/{i}.png")
            Image.fromarray(picture.astype(np.uint8)).save(data / f"{split}_img/{i}.jpg")
    return tmp_path / "data"


# ---- networks: counts and shapes -------------------------------------------------------------


@pytest.mark.parametrize("flags, millions", [  # Tab. 2.3 and 2.4, with ADE20K's 151 labels
    ([], 96.492483), (["--ngf", "48"], 60.642771), (["--ngf", "80"], 140.682163),
    (["--generator", "concat"], 79.2), (["--generator", "hd-spade"], 236.9),
    (["--generator", "hd-concat"], 195.5), (["--generator", "hd"], 183.0),
    (["--generator", "hd", "--ngf", "48"], 103.0)])
def test_parameter_counts_of_table_2_3(flags, millions):
    args = spade.get_args(["--data", "ade20k", "--no-spectral", *flags])  # which has no parameters
    with torch.device("meta"):
        n = count(spade.generator(args))
    assert n / 1e6 == pytest.approx(millions, abs=0.05 if millions == round(millions, 1) else 1e-9)


@pytest.mark.parametrize("flags, g, d", [
    (["--data", "coco_stuff"], 97_480_899, 5_904_514),
    (["--data", "coco_stuff", "--input", "encoder"], 112_626_883, 5_904_514),
    (["--data", "coco_stuff", "--upsampling", "most", "--size", "512"], 98_515_043, 5_904_514),
    (["--data", "cityscapes"], 93_048_003, 5_601_410),
    (["--data", "cityscapes", "--input", "encoder"], 101_136_579, 5_601_410),
    (["--data", ".", "--labels", "35"], 93_018_051, 5_599_362)])
def test_parameter_counts_of_the_released_networks(flags, g, d):
    args = spade.get_args([*flags, "--no-spectral"])
    with torch.device("meta"):
        G, E = spade.generator(args), spade.Encoder(spectral=False)
        D = spade.MultiscaleDiscriminator(spade.channels(args)[1], args)
    assert (count(G), count(D), count(E)) == (g, d, 10_463_424)
    assert sum(isinstance(net, spade.Spade) for net in G.modules()) == (
        21 if "most" in flags else 18)


def test_paper_defaults_and_data_set_presets():
    args = spade.get_args(["--data", "."])
    assert (args.lr, args.ttur, args.beta1, args.beta2) == (2e-4, True, 0.0, 0.9)
    assert (args.epochs, args.decay_from, args.batch, args.size) == (200, 0.5, 32, 256)
    assert (args.lambda_fm, args.lambda_vgg, args.lambda_kld) == (10, 10, 0.05)
    args = spade.get_args(["--data", "path/to/Cityscapes"])
    assert (args.size, args.height, args.labels, args.edges) == (512, 256, 35, True)
    assert spade.channels(args) == (35, 36) and args.upsampling == "more"
    assert spade.channels(spade.get_args(["--data", "coco"])) == (183, 184)
    assert spade.channels(spade.get_args(["--data", "ade20k"])) == (151, 151)
    assert spade.channels(spade.get_args(["--data", "camvid"])) == (12, 12)


@pytest.mark.parametrize("flags, start", [([], (1, 1)), (["--size", "64"], (1, 2)), (
    ["--size", "64", "--height", "64", "--upsampling", "more"], (1, 1))])
def test_generator_doubles_from_its_start(flags, start):
    args = tiny_args("--height", "32", *flags)
    G = spade.generator(args).train()
    assert G.start == start
    m = random_map(4, 3, args.height, args.size).labels
    m = spade.LabelMap(m, torch.zeros(3, 0, *m.shape[1:]), 4)
    out = G(m)
    assert out.shape == (3, 3, args.height, args.size) and out.abs().max() <= 1
    assert {size for size in m.cache if isinstance(size, tuple)} == {
        (start[0] << i, start[1] << i) for i in range(7) if start[0] << i < args.height}


@pytest.mark.parametrize("name", spade.GENERATORS)
def test_every_generator_paints(name):
    args = tiny_args("--generator", name, "--edges")
    labels, edges, _ = spade.random_batch(args, CPU)
    assert spade.generator(args)(spade.LabelMap(labels, edges, 4)).shape == (2, 3, 32, 32)


def test_discriminator_maps_have_the_released_sizes():
    D = spade.Discriminator(7, 2)
    sizes = [tuple(out.shape[1:3]) for out in D(torch.randn(1, 7, 256, 256))]
    assert sizes == [(2, 129), (4, 65), (8, 33), (16, 34), (1, 35)]
    deeper = spade.Discriminator(7, 2, layers=5)
    assert [s[0].stride[0] for s in deeper.stages[:-1]] == [2, 2, 2, 2, 1]
    for net in (D, deeper):  # spectral normalisation spares the ends
        normalised = [parametrize.is_parametrized(s[0]) for s in net.stages[:-1]]
        assert normalised == [False] + [True] * (len(normalised) - 1)


def test_multiscale_discriminator_pools_the_stacked_input():
    args = tiny_args()
    D = spade.MultiscaleDiscriminator(4, args).double().eval()
    m, x = random_map(4, 2, 32, 32), torch.randn(4, 3, 32, 32).double()
    outs = D(m, x)
    stacked = torch.cat([torch.cat([m.one_hot()] * 2), x], 1)
    pooled = torch.zeros(4, 7, 16, 16).double()
    for i in range(16):
        for j in range(16):
            window = stacked[:, :, max(0, 2 * i - 1):2 * i + 2, max(0, 2 * j - 1):2 * j + 2]
            pooled[:, :, i, j] = window.mean((2, 3))
    for scale, picture, out in zip(D.scales, (stacked, pooled), outs, strict=True):
        for layer, expected in zip(out, scale(picture), strict=True):
            torch.testing.assert_close(layer, expected)


def test_encoder_sees_a_square_and_halves_it_to_4x4():
    E = spade.Encoder(2, 7, 32)
    mu, logvar = E(torch.randn(3, 3, 20, 50))
    assert mu.shape == logvar.shape == (3, 7) and len(E.convs) == 3
    x = torch.randn(1, 3, 20, 50)
    torch.testing.assert_close(E.eval()(x)[0], E(F.interpolate(x, (32, 32), mode="bilinear"))[0])
    assert len(spade.Encoder(1, 7).convs) == 6  # Fig. 2.14
    layers = [layer for layer in E.modules() if isinstance(layer, nn.Linear)]
    assert not any(map(parametrize.is_parametrized, layers))


# ---- label maps ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("edges", [0, 1])
def test_label_conv_is_the_convolution_of_the_one_hot_map(kernel, edges):
    m, conv = random_map(edges=edges), spade.LabelConv(4 + edges, 5, kernel).double()
    expected = F.conv2d(m.one_hot(), conv.weight, conv.bias, padding=kernel // 2)
    out = conv(m)
    torch.testing.assert_close(out, expected)
    g = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, conv.parameters(), g),
                    torch.autograd.grad(expected, conv.parameters(), g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(4, 3), (2, 2), (16, 12), (5, 4)])
def test_label_maps_are_resized_to_nearest_once(size):
    m = random_map(edges=1)
    small = m.at(*size)
    torch.testing.assert_close(small.one_hot(), F.interpolate(m.one_hot(), size))
    assert m.at(*size) is small and m.at(8, 6) is m


def test_border_marks_both_sides():
    im = Image.fromarray(np.array([[7, 7, 7, 9], [7, 7, 7, 9], [7, 7, 7, 7]], dtype=np.uint8))
    expected = [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert spade.border(im)[0].tolist() == expected


# ---- Eqs. 2.1 to 2.3 -------------------------------------------------------------------------


def naive_spade(h, m, layer, kernel=3, eps=1e-5):
    """Eqs. 2.1 to 2.3 with loops over channels; the convolutions on the one-hot map are dense."""
    n, h = layer.channels, h.detach()
    shared = F.relu(F.conv2d(m.one_hot(), layer.shared.weight, layer.shared.bias,
                             padding=kernel // 2))
    both = F.conv2d(shared, layer.gamma_beta.weight, layer.gamma_beta.bias, padding=kernel // 2)
    out = torch.zeros_like(h)
    for c in range(n):
        mu = sum(float(v) for v in h[:, c].flatten()) / h[:, c].numel()
        var = sum(float(v)**2 - mu**2 for v in h[:, c].flatten()) / h[:, c].numel()
        out[:, c] = (1 + both[:, c]) * (h[:, c] - mu) / (var + eps)**0.5 + both[:, n + c]
    return out


@pytest.mark.parametrize("norm", ["syncbatch", "batch"])
def test_spade_is_eqs_2_1_to_2_3(norm):
    h, m = 3 + 2 * torch.randn(2, 3, 8, 6).double(), random_map()
    layer = spade.Spade(3, 4, hidden=5).double()
    torch.testing.assert_close(layer(spade.NORMS[norm](3).double()(h), m), naive_spade(h, m, layer))


def test_instance_normalisation_is_per_picture():
    h = torch.randn(2, 3, 8, 6).double()
    out = spade.NORMS["instance"](3).double()(h)
    for n in range(2):
        for c in range(3):
            v = h[n, c]
            torch.testing.assert_close(out[n, c], (v - v.mean()) / (v.var(correction=0) + 1e-5)**.5)


def test_spade_reduces_to_conditional_batch_norm_for_constant_maps():
    """Sec. 2.3: one label per picture; away from the zero padding gamma and beta are vectors."""
    h, layer = torch.randn(3, 4, 12, 12).double(), spade.Spade(4, 3, hidden=5).double()
    classes = torch.tensor([2, 0, 2])
    m = spade.LabelMap(classes.view(3, 1, 1).expand(3, 12, 12), torch.zeros(3, 0, 12, 12).double(),
                       3)
    out, normalised = layer(spade.SyncBatchNorm(4).double()(h), m), F.batch_norm(
        h, None, None, training=True)
    shared = F.relu(layer.shared.weight.sum((2, 3))[:, classes].t() + layer.shared.bias)
    gamma, beta = (shared @ layer.gamma_beta.weight.sum((2, 3)).t() + layer.gamma_beta.bias).chunk(
        2, dim=1)  # a table of vectors per class: conditional batch norm
    expected = (1 + gamma)[:, :, None, None] * normalised + beta[:, :, None, None]
    torch.testing.assert_close(out[:, :, 2:-2, 2:-2], expected[:, :, 2:-2, 2:-2])


def test_spade_reduces_to_adain_for_one_picture_and_a_constant_map():
    """Sec. 2.3: N = 1 and modulation without places: AdaIN with mean beta, deviation 1 + gamma."""
    h, layer = torch.randn(1, 4, 6, 6).double(), spade.Spade(4, 3, hidden=5, kernel=1).double()
    m = spade.LabelMap(torch.ones(1, 6, 6, dtype=torch.long), torch.zeros(1, 0, 6, 6).double(), 3)
    normalised = spade.SyncBatchNorm(4).double()(h)
    gamma, beta = layer.gamma_beta(F.relu(layer.shared(m))).chunk(2, dim=1)
    expected = common.adain(h, beta[:, :, :1, :1], 1 + gamma[:, :, :1, :1])
    torch.testing.assert_close(layer(normalised, m), expected)


SYNC = """
import os, sys, torch, torch.distributed as dist
import spade
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
h = torch.load(sys.argv[3])[2 * rank:2 * rank + 2].requires_grad_()
norm = spade.SyncBatchNorm(3).double()
out = norm(h)
(out * torch.load(sys.argv[4])[2 * rank:2 * rank + 2]).sum().backward()
torch.save((out.detach(), h.grad, norm.running_mean, norm.running_var), sys.argv[3] + str(rank))
dist.destroy_process_group()
"""


def test_synchronised_statistics_are_those_of_the_whole_batch(tmp_path):
    h, weight = torch.randn(4, 3, 5, 4).double() + 2, torch.randn(4, 3, 5, 4).double()
    torch.save(h, tmp_path / "h")
    torch.save(weight, tmp_path / "w")
    env = dict(os.environ, OMP_NUM_THREADS="1")
    jobs = [subprocess.Popen([sys.executable, "-c", SYNC, str(r), str(tmp_path / "store"),
                              str(tmp_path / "h"), str(tmp_path / "w")], cwd=ROOT, env=env)
            for r in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    parts = [torch.load(tmp_path / f"h{r}") for r in range(2)]
    norm = spade.SyncBatchNorm(3).double()
    h.requires_grad_()
    out = norm(h)
    (out * weight).sum().backward()
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), out.detach())
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), h.grad)
    for _, _, mean, var in parts:
        torch.testing.assert_close(mean, norm.running_mean)
        torch.testing.assert_close(var, norm.running_var)


def test_block_is_fig_2_11():
    """conv_1(lrelu(spade(conv_0(lrelu(spade(h)))))) plus a skip that is learned if widths differ,
    spectrally normalised, without activation."""
    m = random_map()

    def weight(conv):  # W / sigma by its definition: the largest singular value
        w = conv.parametrizations.weight.original
        return w / torch.linalg.matrix_norm(w.flatten(1), 2)

    for b in (3, 5):
        block = spade.SpadeBlock(5, b, lambda c: spade.Spade(c, 4, 6), spade.SyncBatchNorm, True)
        block.double()
        for _ in range(200):  # power iteration converges
            for conv in [block.conv_0, block.conv_1, *([block.conv_s] if b != 5 else [])]:
                assert conv.weight.isfinite().all()
        h = torch.randn(2, 5, 8, 6).double()
        out = block(h, m)
        middle = F.conv2d(F.leaky_relu(naive_spade(h, m, block.spade_0), 0.2), weight(block.conv_0),
                          block.conv_0.bias, padding=1)
        main = F.conv2d(F.leaky_relu(naive_spade(middle, m, block.spade_1), 0.2),
                        weight(block.conv_1), block.conv_1.bias, padding=1)
        skip = h if b == 5 else F.conv2d(naive_spade(h, m, block.spade_s), weight(block.conv_s))
        torch.testing.assert_close(out, skip + main, rtol=1e-5, atol=1e-5)


def test_init_of_the_released_networks():
    """Spectrally normalised layers keep PyTorch's scale; the others get 0.02 times Glorot."""
    torch.manual_seed(0)
    G = spade.generator(spade.get_args(["--data", ".", "--labels", "8", "--ngf", "8"]))
    for scheme, normal, other in (("released", (3 * 9 * 128)**-0.5, 0.02), ("glorot", None, 1.0)):
        spade.init_weights(G, scheme)
        w = G.blocks[0].conv_0.parametrizations.weight.original
        glorot = (2 / (9 * 128 + 9 * 128))**0.5
        assert float(w.detach().std()) == pytest.approx(normal or glorot, rel=0.02)
        w = G.blocks[0].spade_0.gamma_beta.weight
        assert float(w.detach().std()) == pytest.approx(other * (2 / (9 * 128 + 9 * 256))**0.5,
                                                        rel=0.02)
        assert all(float(p.detach().abs().sum()) == 0 for k, p in G.named_parameters()
                   if k.endswith("bias"))


# ---- losses ----------------------------------------------------------------------------------


def test_kl_divergence_is_the_closed_form_and_the_integral():
    mu, logvar = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    p = torch.distributions.Normal(torch.zeros(3, 2).double(), 1.0)
    expected = torch.distributions.kl_divergence(q, p).sum(1).mean()
    torch.testing.assert_close(spade.kl_divergence(mu, logvar), expected)
    z = torch.linspace(-30, 30, 200001).double()
    q, p = (torch.distributions.Normal(*v) for v in (
        (mu[0, 0], (0.5 * logvar[0, 0]).exp()), (torch.tensor(0.).double(), 1.0)))
    integral = torch.trapezoid(q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z)), z)
    torch.testing.assert_close(spade.kl_divergence(mu[:1, :1], logvar[:1, :1]), integral)
    assert spade.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_reparameterised_samples_have_the_moments_and_pass_gradients():
    mu, logvar = torch.tensor([[1.5]]).double(), torch.tensor([[0.7]]).double()
    mu.requires_grad_(), logvar.requires_grad_()
    z = spade.reparameterise(mu, logvar, torch.randn(100_000, 1).double())
    assert float(z.detach().mean()) == pytest.approx(1.5, abs=0.02)
    assert float(z.detach().var()) == pytest.approx(float(logvar.exp()), rel=0.02)
    z = spade.reparameterise(mu, logvar, torch.tensor([[2.0]]).double())
    grads = torch.autograd.grad(z, [mu, logvar])
    assert float(grads[0]) == 1 and float(grads[1]) == pytest.approx(float((z - mu) / 2))


def test_hinge_signs():
    """D gains from real above 1 and fake below -1, nothing beyond; G gains without bound."""
    logits = torch.tensor([-3.0, 0.0, 3.0])
    assert [float(spade.hinge(p, True)) for p in logits] == [4, 1, 0]
    assert [float(spade.hinge(p, False)) for p in logits] == [0, 1, 4]
    assert [float(spade.hinge_generator(p)) for p in logits] == [3, 0, -3]


def test_feature_matching_is_a_sum_of_means_and_detaches_real():
    def features():
        return [[torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(3)] for _ in range(2)]

    fakes, reals = features(), features()
    loss = spade.feature_matching(fakes, reals)
    expected = sum(float((f - r).abs().sum()) / f.numel() for a, b in zip(fakes, reals, strict=True)
                   for f, r in zip(a, b, strict=True)) / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(f.grad is not None for scale in fakes for f in scale)
    assert all(r.grad is None for scale in reals for r in scale)


def test_perceptual_loss_weights_and_gradient():
    vgg = common.VGG(spade.VGG_TAPS, "random", normalise=False)
    x_hat, x = (torch.rand(1, 3, 32, 32, requires_grad=True) for _ in range(2))
    loss = spade.perceptual(vgg, x_hat, x)
    a, b = vgg(x_hat), vgg(x)
    expected = sum(w * float((a[f"relu{i}_1"] - b[f"relu{i}_1"]).abs().mean().detach())
                   for i, w in enumerate((1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), start=1))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert x_hat.grad.abs().sum() > 0 and x.grad is None


# ---- the step --------------------------------------------------------------------------------


def naive_losses(m, labels, edges, x, args, noise):
    """The losses of one step as the paper words them, with separate passes: (L_G, L_D, by name)."""
    n, losses = spade.channels(args)[0], {}

    def label_map():
        return spade.LabelMap(labels, edges, n)

    z = noise
    if args.input == "encoder":
        mu, logvar = m.E(x)
        z = mu + noise * logvar.exp().sqrt()
        losses["KLD"] = ((mu**2 + logvar.exp() - logvar - 1) / 2).sum() / len(x)
    x_hat = m.G(label_map(), z)
    fake, real, constant = (m.D(label_map(), p) for p in (x_hat, x, x_hat.detach()))
    losses["GAN"] = -(fake[0][-1].mean() + fake[1][-1].mean()) / 2
    losses["FM"] = sum((f - r.detach()).abs().mean() for i in (0, 1)
                       for f, r in zip(fake[i][:-1], real[i][:-1], strict=True)) / 2
    losses["D"] = sum(F.relu(1 - real[i][-1]).mean() + F.relu(1 + constant[i][-1]).mean()
                      for i in (0, 1)) / 2
    L_G = losses["GAN"] + args.lambda_fm * losses["FM"]
    if args.lambda_vgg > 0:
        losses["VGG"] = spade.perceptual(m.vgg, x_hat, x)
        L_G = L_G + args.lambda_vgg * losses["VGG"]
    if args.input == "encoder":
        L_G = L_G + args.lambda_kld * losses["KLD"]
    return L_G, losses["D"], losses


@pytest.mark.parametrize("flags", [[], ["--input", "encoder", "--lambda-vgg", "10", "--vgg",
                                         "random", "--edges"], ["--input", "random"]])
def test_step_has_the_losses_and_gradients_of_the_paper(flags):
    """float64, without spectral norm: separate passes would move its vectors further."""
    args = tiny_args(*flags)
    m = spade.build(args, CPU)
    for name, net in vars(m).items():
        if isinstance(net, nn.Module):
            net.double()
            if name != "vgg":
                spade.init_weights(net, "glorot")
                for layer in list(net.modules()):
                    if parametrize.is_parametrized(layer):
                        parametrize.remove_parametrizations(layer, "weight")
    for optimiser in (m.opt_G, m.opt_D):
        optimiser.param_groups[0]["lr"] = 0.0  # leaves its gradients behind, changes nothing
    m.opt_G.param_groups[0]["params"] = [*m.G.parameters(), *(m.E.parameters() if hasattr(m, "E")
                                                              else [])]
    m.opt_D.param_groups[0]["params"] = list(m.D.parameters())
    labels, edges, x = (t.double() if t.is_floating_point() else t
                        for t in spade.random_batch(args, CPU))
    noise = torch.randn(2, args.z, generator=torch.Generator().manual_seed(3)).double()
    rng = torch.Generator().manual_seed(3)
    twin = copy.deepcopy({k: v for k, v in vars(m).items() if isinstance(v, nn.Module)})
    losses = spade.train_step(m, labels, edges, x, args, rng)
    L_G, L_D, expected = naive_losses(SimpleNamespace(**twin), labels, edges, x, args,
                                      None if args.input == "segmap" else noise)
    assert set(losses) == set(expected)
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name].detach())
    for name, loss in (("G", L_G), ("D", L_D), ("E", L_G)):
        if name in twin:
            grads = torch.autograd.grad(loss, twin[name].parameters(), retain_graph=True)
            for p, g in zip(getattr(m, name).parameters(), grads, strict=True):
                torch.testing.assert_close(p.grad, g)


def test_both_networks_move_once_and_the_input_does_not():
    args = tiny_args("--input", "encoder")
    m = spade.build(args, CPU)
    batch = spade.random_batch(args, CPU)
    before = {name: copy.deepcopy(getattr(m, name).state_dict()) for name in "GDE"}
    x = batch[2].clone()
    spade.train_step(m, *batch, args, torch.Generator().manual_seed(0))
    assert torch.equal(x, batch[2])
    for name in "GDE":
        moved = [k for k, p in getattr(m, name).named_parameters()
                 if not torch.equal(p, before[name][k])]
        assert len(moved) > len(before[name]) / 4
    vectors = [k for k in before["G"] if k.endswith("0._u")]
    state = m.G.state_dict()
    assert vectors and not torch.equal(state[vectors[0]], before["G"][vectors[0]])
    assert int(state["blocks.0.norm_0.num_batches_tracked"]) == 1  # one pass of G per step


def test_any_batch_size_is_the_mean_over_pictures():
    """With instance norm pictures are independent: gradients of two are the mean of each one's."""
    args = tiny_args("--norm", "instance", "--no-spectral", "--init", "glorot", "--size", "64")
    m = spade.build(args, CPU)
    m.G.double(), m.D.double()
    for optimiser in (m.opt_G, m.opt_D):
        optimiser.param_groups[0]["lr"] = 0.0
    labels, edges, x = spade.random_batch(args, CPU)
    edges, x = edges.double(), x.double()

    def gradient(part):
        spade.train_step(m, labels[part], edges[part], x[part], args, torch.Generator())
        return torch.cat([p.grad.flatten() for net in (m.G, m.D) for p in net.parameters()])

    both = gradient(slice(0, 2))
    torch.testing.assert_close(both, (gradient(slice(0, 1)) + gradient(slice(1, 2))) / 2)


@pytest.mark.parametrize("flags", [
    ["--generator", "concat"], ["--generator", "hd"], ["--generator", "hd-spade"],
    ["--generator", "hd-concat"], ["--input", "random"], ["--kernel", "1"], ["--kernel", "5"],
    ["--norm", "batch"], ["--norm", "instance", "--size", "64"], ["--no-spectral"],
    ["--d-layers", "5"], ["--lambda-fm", "0"], ["--no-ttur"]], ids=" ".join)
def test_every_comparison_of_tables_2_3_to_2_5_trains(flags):
    args = tiny_args(*flags)
    m = spade.build(args, CPU)
    batch = spade.random_batch(args, CPU)
    before = [p.clone() for p in m.G.parameters()]
    losses = spade.train_step(m, *batch, args, torch.Generator().manual_seed(0))
    assert set(losses) == {"GAN", "FM", "D"} - ({"FM"} if "--lambda-fm" in flags else set())
    assert all(torch.isfinite(loss) for loss in losses.values())
    moved = [not torch.equal(p, q) for p, q in zip(m.G.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2


def test_amp_step_is_finite_and_close():
    args = tiny_args("--init", "glorot", "--input", "encoder")
    losses = []
    for flags in ([], ["--amp"]):
        args = tiny_args("--init", "glorot", "--input", "encoder", *flags)
        m = spade.build(args, CPU)
        torch.manual_seed(0)
        losses.append(spade.train_step(m, *spade.random_batch(args, CPU), args,
                                       torch.Generator().manual_seed(0)))
    for name in losses[0]:
        assert float(losses[1][name]) == pytest.approx(float(losses[0][name]), rel=0.2, abs=0.2)


# ---- data ------------------------------------------------------------------------------------


def test_pairs_and_samples(folder):
    args = spade.get_args(["--data", str(folder), *TINY, "--edges"])
    pairs = spade.find_pairs(folder, "train", True)
    spade.check_pairs(pairs, args)
    assert [p.image.name for p in pairs] == [f"{i}.jpg" for i in range(5)]
    data = spade.LabelledPictures(pairs, args)
    seen = set()
    for n in range(5):
        labels, edges, x = data[n]
        assert labels.shape == (32, 32) and edges.shape == (1, 32, 32) and x.shape == (3, 32, 32)
        assert torch.equal(x, data[n][2])  # a function of n
        instances = Image.fromarray(labels.numpy().astype(np.uint8))
        assert torch.equal(edges, spade.border(instances))  # cropped and mirrored alike
        seen.add(tuple(labels.flatten().tolist()))
        red = x[:, labels == 0].mean(1)
        assert red[0] > 0.2 and red[1] < 0  # the picture went with its labels
    assert len(seen) == 5  # one epoch shows each pair once


def test_unlabelled_ids_become_the_last_channel(folder):
    label = np.array(Image.open(folder / "train_label/0.png"))
    label[:5] = 255
    Image.fromarray(label).save(folder / "train_label/0.png")
    pairs = spade.find_pairs(folder, "train")
    args = spade.get_args(["--data", str(folder), *TINY])
    with pytest.raises(common.UserError, match="train_label/0.png: label ids 255 out of "
                                               "range: expected 0 to 3 .*--unlabelled"):
        spade.check_pairs(pairs, args)
    args = spade.get_args(["--data", str(folder), *TINY, "--unlabelled", "255"])
    spade.check_pairs(pairs, args)
    labels = spade.to_labels(common.open_ids(pairs[0].label), args)
    assert labels.max() == 4 and (labels == 4).sum() == 5 * 40 and spade.channels(args) == (5, 5)
    assert (spade.counted(labels, args) == -1).sum() == 5 * 40
    args = spade.get_args(["--data", str(folder), *TINY, "--unlabelled", "0", "--ignore", "2"])
    labels = spade.to_labels(common.open_ids(folder / "train_label/1.png"), args)
    assert spade.channels(args) == (4, 4)  # an id among the others: a channel as any
    assert torch.equal(spade.counted(labels, args) == -1, (labels == 0) | (labels == 2))


def test_label_count_is_found(folder, capsys):
    flags = [f for i, f in enumerate(TINY) if "--labels" not in TINY[max(0, i - 1):i + 1]]
    args = spade.get_args(["--data", str(folder), *flags])
    spade.check_pairs(spade.find_pairs(folder, "train"), args)
    assert args.labels == 4 and "--labels 4" in capsys.readouterr().out


def test_other_layouts(tmp_path):
    city, ade = tmp_path / "cityscapes", tmp_path / "ADEChallengeData2016"
    grey, rgb = Image.new("L", (8, 4), 3), Image.new("RGB", (8, 4))
    for split in ("train", "val"):
        for town in ("aachen", "bonn"):
            (city / "leftImg8bit" / split / town).mkdir(parents=True)
            (city / "gtFine" / split / town).mkdir(parents=True)
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
    for split in ("train", "test"):
        pairs = spade.find_pairs(city, split, edges=True)
        assert [p.label.name[:4] for p in pairs] == ["aach", "bonn"]
        assert all("labelIds" in p.label.name and "instanceIds" in p.inst.name for p in pairs)
        assert spade.find_pairs(ade, split)[0].image.name == "ADE_1.jpg"
    assert spade.get_args(["--data", str(city)]).labels == 35
    assert spade.get_args(["--data", str(ade)]).labels == 151


@pytest.mark.parametrize("spoil, message", [
    (lambda d: (d / "train_label/2.png").unlink(), r"train_img/2.jpg: has no file of that name"),
    (lambda d: (d / "train_img/2.jpg").unlink(), r"train_label/2.png: has no file of that name"),
    (lambda d: Image.new("L", (20, 36)).save(d / "train_label/2.png"),
     r"train_label/2.png: 20x36 pixels, but .*train_img/2.jpg has 40x36"),
    (lambda d: Image.new("L", (40, 36), 77).save(d / "train_label/2.png"),
     r"train_label/2.png: label ids 77 out of range: expected 0 to 3"),
    (lambda d: Image.new("RGB", (40, 36)).save(d / "train_label/2.png"),
     r"train_label/2.png: expected a map of ids with one channel, found RGB"),
    (lambda d: (d / "train_label/2.png").write_bytes(b"not a picture"),
     r"train_label/2.png: not a readable picture"),
    (lambda d: (d / "train_img").rename(d / "pictures"), r"no train pictures with label maps"),
    (lambda d: Image.new("L", (40, 36), 9).save(d / "test_label/1.png"),
     r"test_label/1.png: label ids 9 out of range")])
def test_bad_data_is_named_before_training(folder, tmp_path, spoil, message):
    spoil(folder)
    with pytest.raises(common.UserError, match=message):
        spade.main(["--data", str(folder), *TINY, "--steps", "1", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, message", [
    (["--size", "40"], "--size 40: must be a multiple of 32"),
    (["--height", "48"], "--height 48: must be a multiple of 32"),
    (["--batch", "1"], "--batch 1: G would start"),
    (["--upsampling", "most"], "--size 32: must be a multiple of 128"),
    (["--encoder-side", "24"], "power of two"), (["--labels", "0"], "--labels 0"),
    (["--generator", "hd", "--input", "random"], "--generator hd"),
    (["--exemplar", "x.png"], "--exemplar")])
def test_bad_flags(flags, message):
    with pytest.raises(common.UserError, match=message):
        tiny_args(*flags)


def test_maps_keep_palette_indices_and_16_bits(tmp_path):
    ids = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    palette = Image.fromarray(ids).convert("P")
    palette = Image.fromarray(ids, mode="P") if palette.getpixel((1, 1)) != 3 else palette
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    palette.save(tmp_path / "p.png")
    assert np.asarray(common.open_ids(tmp_path / "p.png")).tolist() == ids.tolist()
    Image.fromarray(ids.astype(np.uint16) * 20000).save(tmp_path / "i.png")
    assert np.asarray(common.open_ids(tmp_path / "i.png")).tolist() == (ids * 20000.).tolist()


# ---- the script as its users run it ----------------------------------------------------------


def test_train_resume_translate_evaluate(folder, tmp_path, capsys, monkeypatch):
    flags = ["--data", str(folder), *TINY, "--input", "encoder", "--edges", "--batch", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    spade.main([*flags, "--steps", "4", "--decay-from", "1", "--out", str(whole)])
    spade.main([*flags, "--steps", "2", "--decay-from", "1", "--out", str(parts)])
    spade.main([*flags, "--steps", "4", "--decay-from", "1", "--out", str(parts), "--resume"])
    a, b = (torch.load(run / "last.pt", weights_only=True)["parts"] for run in (whole, parts))
    for name in a:
        for x, y in zip(flat(a[name]), flat(b[name]), strict=True):
            assert torch.equal(x, y), name
    assert (whole / "log.csv").read_text().splitlines()[0] == "step,KLD,GAN,FM,D,seconds"
    grid = Image.open(sorted((whole / "samples").iterdir())[-1])
    assert grid.width > 6 * 128
    last = str(whole / "last.pt")

    out = tmp_path / "out"
    maps = str(folder / "test_label")
    for name, more in (("z0", []), ("z1", ["--z-seed", "1"]),
                       ("ex", ["--exemplar", str(folder / "test_img/0.jpg"), "--inst",
                               str(folder / "test_inst")])):
        spade.main(["--translate", maps, "--weights", last, "--out", str(out / name), "--device",
                    "cpu", *more])
        pictures = [Image.open(f) for f in sorted((out / name).iterdir())]
        assert [p.size for p in pictures] == [(40, 36)] * 3  # the maps' size
    paints = [np.asarray(Image.open(out / name / "0.png")).astype(int) for name in ("z0", "z1")]
    assert np.abs(paints[0] - paints[1]).max() > 0
    with pytest.raises(common.UserError, match="out of range"):
        Image.new("L", (9, 9), 200).save(tmp_path / "bad.png")
        spade.main(["--translate", str(tmp_path / "bad.png"), "--weights", last])
    with pytest.raises(common.UserError, match="would be overwritten"):
        spade.main(["--translate", maps + "/0.png", "--weights", last, "--out", maps])

    capsys.readouterr()
    net, seen = str(tmp_path / "fcn.pt"), {}

    def fid(fakes, reals, device, weights):
        seen.update(fakes=torch.cat(list(fakes)), reals=torch.cat(list(reals)), weights=weights)
        return 12.5

    monkeypatch.setattr(metrics, "fid", fid)
    for _ in range(2):  # the second time the segmentation network is read
        spade.main(["--evaluate", "--weights", last, "--data", str(folder), "--segmenter", net,
                    "--segmenter-steps", "30", "--fid-weights", "w.pth"])
    lines = capsys.readouterr().out.splitlines()
    mIoU = [line for line in lines if line.startswith("mIoU")]
    assert mIoU[0] == mIoU[1] and "real pictures" in mIoU[0]
    assert "FID (3 painted, 3 real, 299x299): 12.5 (lower is better)" in lines
    args = spade.get_args(["--data", str(folder), "--weights", last])
    m = spade.load_networks(args, CPU)
    labels, edges, x = spade.test_batch(spade.find_pairs(folder, "test", True), args)
    z = spade.style(m, x, CPU)
    torch.testing.assert_close(seen["fakes"], spade.synthesise(m, labels, edges, z, args, CPU))
    assert torch.equal(seen["reals"], x) and seen["weights"] == "w.pth"



RANK = """
import sys, torch, common, spade
save = common.Run.save
def keep(run):
    save(run)
    torch.save({n: run.parts[n].state_dict() for n in "GD"}, run.folder / f"rank{run.rank}.pt")
common.Run.save = keep
spade.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(folder, tmp_path):
    """Synchronised statistics and averaged gradients: the same weights on both, and on one."""
    flags = ["--data", str(folder), *TINY, "--size", "64", "--load", "64", "--height", "32",
             "--steps", "2", "--init", "glorot", "--batch"]
    env = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", WORLD_SIZE="2",
               MASTER_PORT=str(20000 + os.getpid() % 20000))
    two = [sys.executable, "-c", RANK, *flags, "1", "--out", str(tmp_path / "two")]
    jobs = [subprocess.Popen(two, cwd=ROOT, env=dict(env, RANK=str(rank))) for rank in range(2)]
    spade.main([*flags, "2", "--out", str(tmp_path / "one")])
    assert [job.wait() for job in jobs] == [0, 0]
    first, second = (torch.load(tmp_path / f"two/rank{rank}.pt") for rank in range(2))
    one = torch.load(tmp_path / "one/last.pt", weights_only=True)["parts"]
    start = spade.build(spade.get_args([*flags, "2"]), CPU)
    for net in "GD":
        moved = apart = 0.0
        for key, was in getattr(start, net).state_dict().items():
            if was.is_floating_point():
                assert torch.equal(first[net][key], second[net][key]), key
            if key.endswith(("weight", "original")):
                moved += float((one[net][key] - was).abs().sum())
                apart += float((one[net][key] - first[net][key]).abs().sum())
        assert moved > 0 and apart < 0.02 * moved, (net, apart / moved)


def flat(state):
    if torch.is_tensor(state):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(
        state, (list, tuple)) else []
    return [t for v in values for t in flat(v)]


def test_checkpoint_holds_spectral_norm_exactly(tmp_path):
    """No moving average anywhere: a loaded network computes the very same numbers."""
    args = tiny_args("--input", "encoder")
    m = spade.build(args, CPU)
    batch = spade.random_batch(args, CPU)
    for i in range(2):
        spade.train_step(m, *batch, args, torch.Generator().manual_seed(i))
    args.run_folder = str(tmp_path)
    run = common.Run("spade", args)
    run.resume_or_start({k: v for k, v in vars(m).items()})
    run.save()
    args = spade.get_args(["--data", ".", "--weights", str(tmp_path / "last.pt")])
    loaded = spade.load_networks(args, CPU)
    z = spade.style(loaded, batch[2], CPU)
    pictures = [spade.synthesise(net, *batch[:2], z, args, CPU) for net in (m, loaded)]
    torch.testing.assert_close(pictures[0], pictures[1], rtol=1e-5, atol=1e-5)
    state = torch.load(tmp_path / "last.pt", weights_only=True)["parts"]["G"]
    for key, value in m.G.state_dict().items():
        assert torch.equal(state[key], value)
    assert not any(parametrize.is_parametrized(layer) for layer in loaded.G.modules())  # folded


def official_names(G, E):
    """State dicts as the authors' code saves them: old spectral norm, gamma apart from beta."""
    def old(key):
        return (key.replace("parametrizations.weight.original", "weight_orig")
                .replace("parametrizations.weight.0._", "weight_"))

    states = {}, {}
    for key, value in G.state_dict().items():
        key = old(key)
        for i, name in enumerate(released.SPADE_BLOCKS):
            key = key.replace(f"blocks.{i}.", name + ".")
        key = key.replace("to_rgb", "conv_img")
        for j in "01s":
            key = key.replace(f"spade_{j}.shared", f"norm_{j}.mlp_shared.0")
            key = key.replace(f"spade_{j}.gamma_beta", f"norm_{j}.mlp_gamma")
            key = key.replace(f"norm_{j}.running", f"norm_{j}.param_free_norm.running")
            key = key.replace(f"norm_{j}.num", f"norm_{j}.param_free_norm.num")
        if "mlp_gamma" in key:
            gamma, beta = value.chunk(2)
            states[0][key], states[0][key.replace("gamma", "beta")] = gamma, beta
            continue
        states[0][key] = value
        if "norm_0.param_free" in key and key.split(".")[0] + ".conv_s.weight_orig" in {
                old(k).replace(f"blocks.{i}.", n + ".") for k in G.state_dict()
                for i, n in enumerate(released.SPADE_BLOCKS)}:
            states[0][key.replace("norm_0", "norm_s")] = value
    for key, value in E.state_dict().items():
        key = old(key).replace("mu.", "fc_mu.").replace("logvar.", "fc_var.")
        for i in range(6):
            key = key.replace(f"convs.{i}.", f"layer{i + 1}.0.")
        states[1][key] = value
    return states


@pytest.mark.parametrize("tracked", [True, False])
def test_released_weights_load(tmp_path, tracked):
    """The authors' layout with its own names; the picture is the one that the same weights paint
    when they are ours. Key names and shapes are those listed for the COCO generator."""
    flags = ["--data", ".", "--labels", "4", "--input", "encoder", "--ngf", "2", "--hidden", "6",
             "--size", "32", "--encoder-side", "16", "--z", "5"]
    args = spade.get_args(flags)
    torch.manual_seed(1)
    G = spade.init_weights(spade.generator(args), "glorot")
    E = spade.init_weights(spade.Encoder(2, 5, 16), "glorot")
    states = official_names(G, E)
    assert {"head_0.conv_0.weight_u", "up_3.norm_s.param_free_norm.running_var", "fc_mu.weight",
            "up_0.norm_s.mlp_beta.bias", "conv_img.weight", "layer2.0.weight_v"} <= {
                *states[0], *states[1]}
    for state, name in zip(states, "GE", strict=True):
        torch.save({k: v for k, v in state.items() if tracked or "num_batches" not in k},
                   tmp_path / f"{name}.pth")
    given = spade.get_args(["--data", ".", "--labels", "4", "--size", "32", "--device", "cpu",
                            "--weights", str(tmp_path / "G.pth"), "--encoder-weights",
                            str(tmp_path / "E.pth")])
    m = spade.load_networks(given, CPU)
    labels, edges, x = spade.random_batch(spade.get_args(["--data", ".", *TINY]), CPU)
    ours = SimpleNamespace(G=G.eval(), E=E.eval())
    for part in (m, ours):
        part.z = spade.style(part, x, CPU)
    torch.testing.assert_close(m.z, ours.z)
    torch.testing.assert_close(spade.synthesise(m, labels, edges, m.z, given, CPU),
                               spade.synthesise(ours, labels, edges, ours.z, args, CPU))
    torch.save({"x": torch.zeros(3)}, tmp_path / "G.pth")
    with pytest.raises(common.UserError, match="neither a checkpoint"):
        spade.load_networks(given, CPU)


def test_released_key_names():
    """The full-size generator's renamed keys are the 234 minus norm_s' statistics."""
    args = spade.get_args(["--data", "coco"])
    with torch.device("meta"):
        G, E = spade.generator(args), spade.Encoder()
    states = official_names(G, E)
    assert len(states[0]) == 234 and len(states[1]) == 22
    renamed = released.spade_names(states[0])
    expected = {k: v.shape for k, v in G.state_dict().items() if "num_batches" not in k}
    assert {k: v.shape for k, v in renamed.items()} == expected


def test_label_scores_of_the_real_pictures_and_of_noise(folder):
    """The segmentation network is trained on the training pairs and reads the test pictures."""
    args = spade.get_args(["--data", str(folder), *TINY, "--segmenter-steps", "40", "--ignore",
                           "3", "--segmenter", str(folder.parent / "fcn.pt")])
    pairs = spade.find_pairs(folder, "train")
    test = labels, _, x = spade.test_batch(spade.find_pairs(folder, "test"), args)
    mIoU, accuracy = spade.label_scores(None, x, test, pairs, args, CPU)
    assert (mIoU["name"], accuracy["name"]) == ("mIoU", "accuracy")
    assert accuracy["value"] == accuracy["trivial"]["real pictures"] > 80  # four colours: easy
    assert mIoU["value"] == mIoU["trivial"]["real pictures"]
    flat = accuracy["trivial"]["mean colour per class"]
    assert flat > 60 and flat != accuracy["value"]
    mIoU, accuracy = spade.label_scores(None, torch.zeros_like(x), test, pairs, args, CPU)
    counts = torch.bincount(labels[labels != 3])  # at best all pixels have one label
    assert accuracy["value"] <= 100 * float(counts.max() / counts.sum()) + 0.01


def test_without_test_pictures_training_pictures_are_announced(folder, capsys):
    for kind in ("img", "label"):
        (folder / f"test_{kind}").rename(folder / f"val_{kind}")
    assert spade.find_pairs(folder, "test")[0].image.parent.name == "val_img"
    assert capsys.readouterr().out == ""
    (folder / "val_img").rename(folder / "other")
    assert spade.find_pairs(folder, "test")[0].image.parent.name == "train_img"
    assert "no test pictures: these are training pictures" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="no val pictures"):
        spade.find_pairs(folder, "val")


@pytest.mark.slow
def test_learns_the_colours_of_the_labels(folder, tmp_path):
    """A short run paints each label in its colour: far nearer to the truth than one mean colour."""
    spade.main(["--data", str(folder), *TINY, "--steps", "150", "--lr", "2e-3", "--ngf", "4",
                "--out", str(tmp_path / "run"), "--sample-every", "1000", "--log-every", "50",
                "--batch", "4"])
    args = spade.get_args(["--data", str(folder), "--weights", str(tmp_path / "run/last.pt"),
                           "--device", "cpu"])
    m = spade.load_networks(args, CPU)
    labels, edges, x = spade.test_batch(spade.find_pairs(folder, "test"), args)
    x_hat = spade.synthesise(m, labels, edges, None, args, CPU)
    error, trivial = (x_hat - x).abs().mean(), (x - x.mean((0, 2, 3), keepdim=True)).abs().mean()
    assert error < 0.6 * trivial


def test_toy_run_ends_with_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(toy.DEFAULT_N, "scenes", 6)
    draw = toy.DATASETS["scenes"]
    monkeypatch.setitem(toy.DATASETS, "scenes", lambda *a, **k: draw(*a, **k, n_test=3))
    spade.main(["--steps", "2", "--size", "32", "--load", "32", "--ngf", "4", "--ndf", "4",
                "--batch", "2", "--segmenter-steps", "2", "--device", "cpu"])
    result = json.loads((tmp_path / "runs/spade-toy/result.json").read_text())
    assert [s["name"] for s in result["scores"]] == [
        "colour error, own style", "colour error, another's style", "colour error, z", "mIoU",
        "accuracy"]
    for split in ("test", "val"):
        spade.main(["--evaluate", "--weights", "runs/spade-toy/last.pt", "--segmenter-steps", "2",
                    "--split", split])


def test_errors_are_one_line(capsys):
    line = error_of(capsys, spade.main, "--data", "nowhere")
    assert "--data nowhere: no such folder" in line and "ade20k" in line


# ---- toy/scenes ------------------------------------------------------------------------------


def test_scenes_layout_and_truth(tmp_path):
    toy.draw("scenes", tmp_path / "s", n=4, size=32, n_test=3)
    pairs = spade.find_pairs(tmp_path / "s", "test", edges=True)
    val = spade.find_pairs(tmp_path / "s", "val", edges=True)
    assert len(val) == 3 and val[0].image.parent.name == "val_img"
    assert len(pairs) == 3 and len(spade.find_pairs(tmp_path / "s", "train", edges=True)) == 4
    own, styles = [], {}
    for i, pair in enumerate(pairs):
        label, inst = (np.asarray(Image.open(f)) for f in pair[1:])
        assert label.max() < len(toy.SCENE_CLASSES)
        classes = list(toy.SCENE_CLASSES)
        things = np.isin(label, [classes.index("tree"), classes.index("animal")])
        assert np.array_equal(inst > 0, things)  # every tree and animal has a number, nothing else
        own.append(np.asarray(Image.open(pair.image)))
        for name in toy.SCENE_STYLES:
            styles.setdefault(name, []).append(
                np.asarray(Image.open(tmp_path / "s/test_styles" / name / f"{i:04d}.png")))
    for i, picture in enumerate(own):  # the picture's own style is among them
        assert sum(np.array_equal(picture, styles[name][i]) for name in styles) == 1


def test_scene_scores_know_the_truth_from_trivial_answers(tmp_path):
    toy.draw("scenes", tmp_path / "s", n=1, size=32, n_test=6)
    args = spade.get_args(["--data", str(tmp_path / "s"), *TINY, "--labels", "7"])
    labels, _, x = spade.test_batch(spade.find_pairs(tmp_path / "s", "test"), args)
    folders = {name: tmp_path / "s/test_styles" / name for name in toy.SCENE_STYLES}
    stack = {name: np.stack([np.asarray(Image.open(f)) for f in sorted(sub.iterdir())]).transpose(
        0, 3, 1, 2) / 127.5 - 1 for name, sub in folders.items()}
    every = np.stack(list(stack.values()))
    mine = np.abs(every - x.numpy()).mean((2, 3, 4)).argmin(0)
    other = every[np.roll(mine, -1), np.arange(6)]
    colours = np.zeros((7, 3))
    scores = toy.scene_scores({"own style": x.numpy(), "another's style": other,
                               "z": stack["winter"]}, labels.numpy(), tmp_path / "s", colours)
    assert [s["value"] for s in scores] == pytest.approx([0, 0, 0], abs=1e-3)
    assert all(v > 10 for s in scores for k, v in s["trivial"].items() if "class" in k)
