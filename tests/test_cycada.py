"""cycada.py: every equation against a plain transcription, and the script as its users run it."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_same, error_of, two_processes
from PIL import Image
from transcriptions import close, parameters, patchgan, resnet_generator

import common
import cycada
from lab import segmenters, toy

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
NAMES = ["sky", "road", "car"]
TINY = ["--size", "32", "--load", "40", "--ngf", "4", "--ndf", "4", "--blocks", "1", "--batch", "2",
        "--task-model", "small", "--task-weights", "random", "--task-load", "36", "--task-size",
        "32", "--task-batch", "2", "--workers", "0", "--device", "cpu", "--log-every", "1",
        "--sample-every", "100", "--classes", *NAMES]
STEPS = ["--steps", "4", "--task-steps", "3", "--feature-steps", "3", "--feature-gate", "0"]
EVERY = ["--stage", "source", "pixel", "task", "feature", "oracle"]
NETS = ("G_ST", "G_TS", "D_S", "D_T")


def tiny_args(*flags):
    return cycada.get_args(["--data", ".", *TINY, *map(str, flags)])


def write_all(folder):
    """Four small labelled noise pictures per split, sky over road with a car, the target darker."""
    rng = np.random.default_rng(0)
    label = np.zeros((40, 48), dtype=np.uint8)
    label[20:], label[24:32, 10:30], label[:2] = 1, 2, 255
    for split in ("source", "target", "test"):
        for kind in ("img", "label"):
            (folder / f"{split}_{kind}").mkdir(parents=True)
        for i in range(4):
            picture = rng.integers(0, 60, (40, 48, 3)) + np.array([150, 40, 90])[label % 3, None]
            picture = (picture // (1 if split == "source" else 2)).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"{split}_img" / f"{i}.png")
            Image.fromarray(np.roll(label, 4 * i, 1)).save(folder / f"{split}_label" / f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_all(tmp_path / "data")


def run(*flags):
    cycada.main([*map(str, flags)])


def parts(path):
    return torch.load(path, weights_only=True)["parts"]


def result(path):
    return json.loads((path / "result.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, all stages; the data are those of `folder`."""
    tmp_path = tmp_path_factory.mktemp("trained")
    run("--data", write_all(tmp_path / "data"), *TINY, *STEPS, *EVERY, "--out", tmp_path / "run")
    return tmp_path / "run"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, dtype=torch.double):
    return torch.rand(shape, dtype=dtype) * 2 - 1


def labels(B, H=32, W=40):
    y = torch.randint(3, (B, H, W))
    y[:, :3], y[0, 5:9] = 255, 255
    return y


# ---- configuration and networks ---------------------------------------------------------------


def test_paper_defaults():
    args = cycada.get_args(["--data", "."])
    assert (args.size, args.load, args.batch, args.lr, args.steps) == (400, 1024, 1, 2e-4, 500_000)
    assert (args.lambda_cyc, args.lambda_sem, args.blocks, args.d_layers) == (10, 0, 9, 3)
    assert (args.ngf, args.ndf, cycada.POOL) == (64, 64, 50)
    assert (args.task_model, args.task_weights, args.task_load) == ("fcn8s", "imagenet", 1024)
    assert (args.task_size, args.task_batch, args.task_steps) == (None, 2, 100_000)
    assert (args.task_lr, args.task_momentum, args.task_decay_from) == (1e-3, 0.99, 1)
    assert (args.feature_lr, args.feature_gate, args.lambda_feature) == (1e-5, 0.6, 0.1)
    assert args.feature_steps == 100_000
    assert args.stage == ["source", "pixel", "task", "oracle"]
    args = tiny_args()
    nets = cycada.build(args, CPU)
    for optimiser in (nets.opt_G, nets.opt_D):
        group, = optimiser.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0)
    group, = cycada.sgd(nets.D_S, cycada.get_args(["--data", "."]), 0.5).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.99, 5e-4)


def test_toy_preset_changes_sizes_and_rates_but_no_term_of_the_objective():
    args = cycada.get_args([])
    assert (args.lambda_cyc, args.lambda_sem, args.lambda_feature) == (10, 0, 0.1)
    assert list(cycada.class_ids(args)) == list(toy.CLASSES)


def test_class_maps():
    """Tab. 3.8: 19 classes under Cityscapes' ids; Tab. 3.7: 13 of SYNTHIA; names; name=id."""
    ids = cycada.class_ids(cycada.get_args(["--data", "."]))
    assert len(ids) == 19 and [*ids.values()] == sorted(ids.values())
    assert (ids["road"], ids["sky"], ids["car"], ids["bicycle"]) == (7, 23, 26, 33)
    ids = cycada.class_ids(cycada.get_args(["--data", ".", "--classes", "synthia"]))
    assert len(ids) == 13 and (ids["sky"], ids["road"], ids["traffic_light"]) == (1, 3, 15)
    assert cycada.class_ids(tiny_args()) == {"sky": 0, "road": 1, "car": 2}
    assert cycada.class_ids(tiny_args("--classes", "a=9", "b=4")) == {"a": 9, "b": 4}


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts_of_the_papers_networks():
    with torch.device("meta"):
        assert count(cycada.ResnetGenerator()) == 11_378_179
        assert count(common.PatchGAN(3, 64, 3)) == 2_764_737
        assert count(cycada.ScoreDiscriminator(19)) == 142_082
        f = cycada.FCN8s(19)
    assert count(f) == 134_353_017 and count(f.features) == 14_714_688
    assert count(cycada.SmallFCN(7)) == 147_548


def thin_fcn8s(monkeypatch):
    """FCN8s at 1/32 of its width, so that a test can run it."""
    conv = nn.Conv2d

    def thin(a, b, *rest, **more):
        return conv(a if a == 3 else a // 32, b if b == 5 else b // 32, *rest, **more)

    monkeypatch.setattr(nn, "Conv2d", thin)
    f = cycada.FCN8s(5)
    monkeypatch.undo()
    return f.eval()


def small_fcn(f, x, training):
    """SmallFCN's layer table: four scales of two 3x3 convolutions, batch norm, ReLU; their 1x1
    scores, enlarged to the picture, are added up. f: state dict; gradients reach its tensors."""
    size, total = x.shape[2:], 0
    for i in range(4):
        x = F.max_pool2d(x, 2, ceil_mode=True) if i else x
        for conv, norm in ((0, 1), (3, 4)):
            x = F.conv2d(x, f[f"blocks.{i}.{conv}.weight"], padding=1)
            name, d = f"blocks.{i}.{norm}.", (0, 2, 3)
            mean, var = ((x.mean(d), x.var(d, correction=0)) if training else
                         (f[name + "running_mean"], f[name + "running_var"]))
            x = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
            x = (x * f[name + "weight"].view(1, -1, 1, 1)
                 + f[name + "bias"].view(1, -1, 1, 1)).relu()
        score = F.conv2d(x, f[f"scores.{i}.weight"], f[f"scores.{i}.bias"])
        total = total + F.interpolate(score, size, mode="bilinear", align_corners=False)
    return total


def up(x, factor):
    """Long et al.'s fixed bilinear transposed convolution, for factors 2 and 8."""
    row = torch.tensor([0.25, 0.75, 0.75, 0.25] if factor == 2 else [
        1 / 16, 3 / 16, 5 / 16, 7 / 16, 9 / 16, 11 / 16, 13 / 16, 15 / 16,
        15 / 16, 13 / 16, 11 / 16, 9 / 16, 7 / 16, 5 / 16, 3 / 16, 1 / 16]).to(x)
    kernel = (row[:, None] * row).repeat(x.shape[1], 1, 1, 1)
    return F.conv_transpose2d(x, kernel, stride=factor, groups=x.shape[1])


def fcn8s(params, x):
    """VGG16-FCN8s of Long et al. as the code has it (thin: same layers, any width)."""
    p = iter(params)

    def conv(x, padding=1):
        return F.conv2d(x, next(p), next(p), padding=padding)

    x = ((x + 1) / 2 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]).view(3, 1, 1)
    (h, w), x, pools = x.shape[2:], F.pad(x, (99, 99, 99, 99)), []
    for convs in (2, 2, 3, 3, 3):
        for _ in range(convs):
            x = conv(x).relu()
        x = F.max_pool2d(x, 2, ceil_mode=True)
        pools.append(x)
    score = conv(conv(conv(x, 0).relu(), 0).relu(), 0)
    for pool, scale, offset in ((pools[3], 0.01, 5), (pools[2], 0.0001, 9)):
        score, skip = up(score, 2), conv(pool * scale, 0)
        score = score + skip[:, :, offset:offset + score.shape[2], offset:offset + score.shape[3]]
    assert next(p, None) is None
    return up(score, 8)[:, :, 31:31 + h, 31:31 + w]


@pytest.mark.parametrize("size", [(64, 64), (33, 50)])
def test_networks_are_their_layer_tables(monkeypatch, size):
    f, x = thin_fcn8s(monkeypatch), noise(2, 3, *size, dtype=torch.float32)
    assert not f.score_pool4.weight.any() and not f.score_pool3.weight.any()
    for skip, scale in ((f.score_pool4, 100.0), (f.score_pool3, 10_000.0)):
        nn.init.normal_(skip.weight, 0, scale)  # they begin at 0
        nn.init.normal_(skip.bias)
    with torch.no_grad():
        assert f(x).shape == (2, 5, *size)
        close([f(x)], [fcn8s(f.parameters(), x)], rtol=1e-3, atol=1e-3)
    f = lively_f(cycada.SmallFCN(5))
    for training in (False, True):
        close([f.train(training)(x.double())], [small_fcn(f.state_dict(), x.double(), training)])
    nets = lively(cycada.build(tiny_args("--blocks", 3), CPU))
    x = noise(2, 3, 36, 32)
    close([nets.G_ST(x)], [resnet_generator(parameters(nets.G_ST), x, 3, False)[0]])
    close([nets.D_T(x)], [patchgan(parameters(nets.D_T), x, False)])
    nets = cycada.build(tiny_args("--d-layers", 2, "--antialias-D", "--antialias-G"), CPU)
    assert len(nets.D_S.stages) == len(nets.D_T.stages) == 4  # two halve, one does not, the logits
    assert all(any(isinstance(m, common.BlurDown) for m in net.modules())
               for net in (nets.G_ST, nets.G_TS, nets.D_S, nets.D_T))
    D = cycada.ScoreDiscriminator(3).double().eval()
    x, p = noise(2, 3, 4, 5), parameters(D)
    h = F.conv2d(F.conv2d(x, p[0], p[1]).relu(), p[2], p[3]).relu()
    close([D(x)], [F.conv2d(h, p[4], p[5])])
    assert [m.p for m in D.modules() if isinstance(m, nn.Dropout2d)] == [0.5, 0.5]


@pytest.mark.parametrize("path", ["head", "pool4", "pool3"])
def test_fcn8s_puts_the_scores_of_every_path_exactly_in_their_place(path):
    """Pools and head replaced by means over what they see, the picture by its own coordinates: a
    bilinear net returns them, if padding 99 and the offsets 5, 9 and 31 are right."""
    with torch.device("meta"):
        f = cycada.FCN8s(3)
    layers = [nn.Identity() for _ in range(31)]
    layers[16], layers[23], layers[30] = (nn.AvgPool2d(n, ceil_mode=True) for n in (8, 2, 2))
    f.features, f.mean, f.std = nn.Sequential(*layers), torch.zeros(1), torch.ones(1)
    f.head = nn.AvgPool2d(7, 1)
    f.score_pool4, f.score_pool3 = (nn.AvgPool2d(1) for _ in "43")
    for name, scale in (("head", 1), ("pool4", 0.01), ("pool3", 0.0001)):
        part, on = getattr(f, name if name == "head" else f"score_{name}"), name == path
        part.register_forward_hook(lambda m, i, out, by=on / scale: out * by)
    n = 352
    y, x = torch.meshgrid(torch.arange(n).double(), torch.arange(n).double(), indexing="ij")
    picture = torch.stack([y, x, y + x])[None]
    middle = slice(170, 182)  # no cell that reaches there sees the padding
    close([f(picture)[..., middle, middle]], [((picture + 1) / 2)[..., middle, middle]])


def test_imagenet_weights_of_vgg16_reach_every_layer_but_the_scores(monkeypatch):
    f = thin_fcn8s(monkeypatch)
    state = {f"features.{k}": torch.randn_like(v) for k, v in f.features.state_dict().items()}
    for i, conv in ((0, f.head[0]), (3, f.head[3])):
        state[f"classifier.{i}.weight"] = torch.randn(len(conv.weight), conv.weight[0].numel())
        state[f"classifier.{i}.bias"] = torch.randn_like(conv.bias)
    state["classifier.6.weight"], last = torch.randn(1000, 128), f.head[6].weight.clone()
    f.load_imagenet(state)
    assert_same(dict(f.features.state_dict()),
                {k.removeprefix("features."): v for k, v in state.items() if "features" in k})
    assert torch.equal(f.head[0].weight.flatten(1), state["classifier.0.weight"])
    assert torch.equal(f.head[3].weight.flatten(1), state["classifier.3.weight"])
    assert torch.equal(f.head[3].bias, state["classifier.3.bias"])
    assert torch.equal(f.head[6].weight, last) and not f.score_pool4.weight.any()


def test_weights_that_fit_no_task_model_are_refused(tmp_path, monkeypatch):
    from torchvision.models import VGG16_Weights, vgg16

    with torch.device("meta"):  # torchvision's file has our layout
        theirs, ours = vgg16().state_dict(), cycada.FCN8s(19)
    for key, value in ours.features.state_dict().items():
        assert theirs[f"features.{key}"].shape == value.shape
    assert theirs["classifier.0.weight"].numel() == ours.head[0].weight.numel()
    state = {k: torch.randn_like(v) for k, v in segmenters.DRN26(3).state_dict().items()
             if "tracked" not in k}
    state["fc.weight"], state["fc.bias"] = state.pop("score.weight"), state.pop("score.bias")
    torch.save(state, tmp_path / "drn.pth")
    args = tiny_args("--task-model", "drn26", "--task-weights", tmp_path / "drn.pth")
    f = cycada.task_model(args, args.task_weights)
    assert all(torch.equal(f.state_dict()[k], v) for k, v in state.items() if "fc" not in k)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    args.task_weights = str(tmp_path / "other.pth")
    with pytest.raises(common.UserError, match="not the weights"):
        cycada.task_model(args, args.task_weights)
    for model in ("drn26", "small"):  # now, and not after stage pixel
        with pytest.raises(common.UserError, match=f"--task-model {model} give .*drn_c_26"):
            tiny_args("--task-model", model, "--task-weights", "imagenet")
    asked = {}

    def fetch(self, **how):
        asked.update(how)
        raise OSError("no network")

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", fetch)
    with pytest.raises(common.UserError, match="cannot fetch .*vgg16.*no network"):
        cycada.task_model(tiny_args("--task-model", "fcn8s"), "imagenet")
    assert asked == {"check_hash": True, "weights_only": True}


# ---- losses and metrics -----------------------------------------------------------------------


def test_losses_one_number_at_a_time():
    scores, y = noise(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    y[0, 1, 2] = y[1, 3] = 255
    expected = []
    for b, i, j in np.ndindex(2, 4, 5):
        if y[b, i, j] != 255:
            e = scores[b, :, i, j].exp()
            expected.append(-float((e[y[b, i, j]] / e.sum()).log()))
    assert float(cycada.task_loss(scores, y)) == pytest.approx(np.mean(expected), rel=1e-12)
    assert float(cycada.task_loss(scores, torch.full_like(y, 255))) == 0
    logits = noise(2, 2, 4, 5)
    for domain, sign in ((0, 1), (1, -1)):  # two classes: a logistic regression of the difference
        odds = sign * (logits[:, 0] - logits[:, 1])
        close([cycada.domain_loss(logits, domain)], [(1 + (-odds).exp()).log().mean()])
    a, b = noise(2, 3, 4, 5), noise(2, 3, 4, 5)
    close([cycada.cycle_loss(a, b), cycada.lsgan(a, 1.0), cycada.lsgan(a, 0.0)],
          [(a - b).abs().sum() / 120, ((a - 1)**2).sum() / 120, (a**2).sum() / 120])


def test_metrics_of_a_hand_computed_three_class_example():
    """Sec. 3.4.3 by hand: t = (4, 3, 3), hits (3, 2, 2), predicted (5, 3, 2)."""
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 255]])
    said = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 2, 0, 2, 1]])
    n = cycada.confusion(said, truth, 3)
    assert n.tolist() == [[3, 1, 0], [1, 2, 0], [1, 0, 2]]
    found, IoU = cycada.metrics(n, "abc"), [3 / (4 + 5 - 3), 2 / (3 + 3 - 2), 2 / (3 + 2 - 2)]
    assert [float(found[f"IoU of {k}"]) for k in "abc"] == pytest.approx([100 * v for v in IoU])
    assert float(found["mIoU"]) == pytest.approx(100 * sum(IoU) / 3)
    assert float(found["fwIoU"]) == pytest.approx(100 * (4 * IoU[0] + 3 * IoU[1] + 3 * IoU[2]) / 10)
    assert float(found["pixel acc."]) == pytest.approx(70)
    n = torch.tensor([[5, 0, 0], [5, 10, 0], [0, 0, 0]])  # absent and not predicted: 0, and counts
    found = cycada.metrics(n, "abc")
    assert [float(found[f"IoU of {k}"]) for k in "abc"] == pytest.approx([50, 100 * 10 / 15, 0])
    assert float(found["mIoU"]) == pytest.approx((50 + 100 * 10 / 15) / 3)


def test_metrics_agree_with_torchmetrics():
    pytest.importorskip("torchmetrics", reason="pip install -r lab/requirements.txt")
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    truth, said = torch.randint(5, (3, 20, 30)), torch.randint(5, (3, 20, 30))
    said = torch.where(torch.rand(truth.shape) < 0.6, truth, said)
    truth[:, :4] = 255
    found = cycada.metrics(cycada.confusion(said, truth, 5), "abcde")
    found["IoU"] = torch.stack([found[f"IoU of {k}"] for k in "abcde"])
    for key, metric in (("IoU", MulticlassJaccardIndex(5, average="none", ignore_index=255)),
                        ("mIoU", MulticlassJaccardIndex(5, average="macro", ignore_index=255)),
                        ("fwIoU", MulticlassJaccardIndex(5, average="weighted", ignore_index=255)),
                        ("pixel acc.", MulticlassAccuracy(5, average="micro", ignore_index=255))):
        close([found[key]], [100 * metric(said, truth).double()], rtol=1e-5, atol=1e-5)


def test_the_row_of_a_network_that_is_always_right(folder):
    args, truth = cycada.get_args(["--data", str(folder), *TINY]), {}
    pairs = cycada.load_data(args)["test"]
    for picture, y in pairs:
        x = cycada.picture_tensor(picture)
        truth[x.sum().item()] = np.array(Image.open(y)).astype(int) % 255

    def f(x):  # scores of the picture's own label map
        y = torch.from_numpy(truth[x.sum().item()])
        return F.one_hot(y, 3).permute(2, 0, 1)[None].float()

    f.eval, args.task_load = (lambda: f), 40
    row = {s["name"]: s for s in cycada.row_of_table(f, pairs, args, CPU)}
    assert list(row) == ["mIoU", "fwIoU", "pixel acc.", "IoU of sky", "IoU of road", "IoU of car"]
    assert [s["value"] for s in row.values()] == [100] * 6
    known = [sum(int((y == k).sum()) for y in truth.values()) for k in range(3)]
    known[0] -= sum(2 * 48 for _ in pairs)                             # the ignored rows
    most = row["pixel acc."]["trivial"]["most frequent class"]
    assert most == pytest.approx(100 * max(known) / sum(known))


# ---- the steps --------------------------------------------------------------------------------


def lively(nets):
    """Float64, weights that saturate nothing, and rates of 0: a step leaves its gradients."""
    for name in NETS:
        common.init_weights(getattr(nets, name).double(), "normal", 0.1)
    for optimiser in (nets.opt_G, nets.opt_D):
        optimiser.param_groups[0]["lr"] = 0.0
    return nets


def lively_f(f):
    """Float64, and a batch norm that differs from the identity in all its numbers."""
    for p in (*f.parameters(), *f.buffers()):
        if p.dim() == 1:
            p.data.uniform_(0.2, 0.9)
    return f.double()


def cross_entropy(scores, y):
    """Eq. (3.10), with the sum over k written out; 255 is left out."""
    softmax = scores.exp() / scores.exp().sum(1, keepdim=True)
    known = (y != 255).double()
    total = sum(-((y == k) * softmax[:, k].log()).sum() for k in range(scores.shape[1]))
    return total / known.sum().clamp(min=1)


def naive_step(nets, x_s, x_t, args, old_S, old_T):
    """Eq. (3.11) to (3.14) as the text words them, one picture at a time, by transcriptions: losses
    and gradients. old_S, old_T: what the buffers show D."""
    p = {name: parameters(getattr(nets, name)) for name in NETS}
    f_S = dict(nets.f_S.state_dict()) if args.lambda_sem else None
    losses, B = dict.fromkeys(("L_GAN_ST", "L_GAN_TS", "L_cyc", "L_sem_T", "L_sem_S", "L_D_T",
                               "L_D_S"), 0), len(x_s)

    def G(name, x):
        return resnet_generator(p[name], x, args.blocks, args.antialias_G)[0]

    def D(name, x):
        return patchgan(p[name], x, args.antialias_D)

    def f(x):
        return small_fcn(f_S, x, False)

    for b in range(B):
        s, t = x_s[b:b + 1], x_t[b:b + 1]
        fake_t, fake_s = G("G_ST", s), G("G_TS", t)
        losses["L_GAN_ST"] += ((D("D_T", fake_t) - 1)**2).mean() / B
        losses["L_GAN_TS"] += ((D("D_S", fake_s) - 1)**2).mean() / B
        losses["L_cyc"] += ((G("G_TS", fake_t) - s).abs().mean()
                            + (G("G_ST", fake_s) - t).abs().mean()) / B
        if f_S:
            losses["L_sem_T"] += cross_entropy(f(fake_s), f(t).argmax(1)) / B
            losses["L_sem_S"] += cross_entropy(f(fake_t), f(s).argmax(1)) / B
        losses["L_D_T"] += ((D("D_T", t) - 1)**2).mean() / 2 / B
        losses["L_D_S"] += ((D("D_S", s) - 1)**2).mean() / 2 / B
        losses["L_D_T"] += (D("D_T", old_T[b:b + 1])**2).mean() / 2 / B
        losses["L_D_S"] += (D("D_S", old_S[b:b + 1])**2).mean() / 2 / B
    L = (losses["L_GAN_ST"] + losses["L_GAN_TS"] + args.lambda_cyc * losses["L_cyc"]
         + args.lambda_sem * (losses["L_sem_T"] + losses["L_sem_S"]))
    if not f_S:
        del losses["L_sem_T"], losses["L_sem_S"]
    return (losses, torch.autograd.grad(L, p["G_ST"] + p["G_TS"]),
            torch.autograd.grad(losses["L_D_S"] + losses["L_D_T"], p["D_S"] + p["D_T"]))


@pytest.mark.parametrize("B, flags", [
    (1, []), (3, ["--lambda-sem", "0.7"]), (2, ["--lambda-cyc", "0", "--channels-last"]),
    (2, ["--lambda-sem", "3", "--antialias-G", "--antialias-D", "--channels-last"])])
def test_pixel_step_is_the_objective(B, flags):
    """Eq. (3.11) to (3.14): losses and all gradients in float64; two weights, none like another."""
    args = tiny_args("--lambda-cyc", "7", *flags)
    nets = lively(cycada.build(args, CPU))
    x_s, x_t, old_S, old_T = (noise(B, 3, 32, 40) for _ in range(4))
    if args.lambda_sem:
        nets.f_S = lively_f(cycada.task_model(args).eval().requires_grad_(False))
        with torch.no_grad():  # no class is preferred: the labels differ from place to place
            nets.f_S.scores[0].bias -= nets.f_S(x_t).mean((0, 2, 3))
            assert len(nets.f_S(x_t).argmax(1).unique()) > 1
        before = {k: v.clone() for k, v in nets.f_S.state_dict().items()}
    nets.pool_S.exchange, nets.pool_T.exchange = (lambda x, rng: old_S), (lambda x, rng: old_T)
    expected, grad_G, grad_D = naive_step(nets, x_s, x_t, args, old_S, old_T)
    losses = cycada.train_step(nets, x_s, x_t, args, rng())
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(float(value.detach()), rel=1e-9), name
    close([p.grad for n in ("G_ST", "G_TS") for p in getattr(nets, n).parameters()], grad_G)
    close([p.grad for n in ("D_S", "D_T") for p in getattr(nets, n).parameters()], grad_D)
    assert all(p.requires_grad for D in (nets.D_S, nets.D_T) for p in D.parameters())
    if args.lambda_sem:  # a fixed labeller
        assert all(p.grad is None for p in nets.f_S.parameters())
        assert_same(before, dict(nets.f_S.state_dict()))


def test_buffers_get_the_translations_of_this_step():
    args = tiny_args()
    nets = cycada.build(args, CPU)
    x_s, x_t = noise(2, 3, 32, 32, dtype=torch.float32), noise(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        x_st, x_ts = nets.G_ST(x_s), nets.G_TS(x_t)
    cycada.train_step(nets, x_s, x_t, args, rng())
    close(nets.pool_T.pictures, list(x_st), rtol=1e-5, atol=1e-6)
    close(nets.pool_S.pictures, list(x_ts), rtol=1e-5, atol=1e-6)
    assert nets.pool_S.size == nets.pool_T.size == 50


def test_history_buffer_swaps_half_of_the_time():
    pool = cycada.HistoryBuffer(3, CPU)
    first = torch.arange(3.0).view(3, 1, 1, 1)
    assert torch.equal(pool.exchange(first, rng()), first)
    later = torch.arange(10.0, 2010.0).view(-1, 1, 1, 1)
    shown = pool.exchange(later, rng())
    assert 0.45 < float((shown == later).float().mean()) < 0.55 and len(pool.pictures) == 3


def gradients(optimiser):
    """A list that gets the gradients of every step of an optimiser."""
    steps, params = [], [p for group in optimiser.param_groups for p in group["params"]]
    optimiser.register_step_pre_hook(
        lambda *_: steps.append([p.grad.clone() for p in params]) and None)
    return steps


def test_task_step_is_eq_3_10():
    args = tiny_args()
    f = lively_f(cycada.task_model(args))
    opt, x, y = cycada.sgd(f, args, 0.0), noise(3, 3, 32, 40), labels(3)
    leaves = {k: v.detach().clone().requires_grad_(v.dtype == torch.double)
              for k, v in f.state_dict().items()}
    expected = cross_entropy(small_fcn(leaves, x, True), y)
    loss, = cycada.task_step(f.eval(), opt, x, y, args).values()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-9)
    names = [name for name, _ in f.named_parameters()]
    close([p.grad for p in f.parameters()],
          torch.autograd.grad(expected, [leaves[name] for name in names]))


def feature_nets(args, **rates):
    f_T = lively_f(cycada.task_model(args))
    D_feat = cycada.ScoreDiscriminator(3).double()
    for layer in D_feat.modules():
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
    return cycada.SimpleNamespace(
        f_T=f_T, D_feat=D_feat, opt_f=cycada.sgd(f_T, args, rates.get("f", 0.0)),
        opt_D=cycada.sgd(D_feat, args, rates.get("D", 0.0)), gate=cycada.Gate())


def test_feature_step_is_its_objective():
    """Fig. 3.33: D_feat, then f_T against the new D_feat, then f_T on the labels."""
    args = tiny_args("--lambda-feature", "0.3", "--feature-gate", "0")
    nets = feature_nets(args, D=0.01)
    x_s, x_t, y_s = noise(2, 3, 32, 40), noise(2, 3, 32, 40), labels(2)
    names = [name for name, _ in nets.f_T.named_parameters()]
    f = {k: v.detach().clone().requires_grad_(k in names) for k, v in nets.f_T.state_dict().items()}
    D = parameters(nets.D_feat)
    steps_f, steps_D = gradients(nets.opt_f), gradients(nets.opt_D)
    losses = cycada.feature_step(nets, x_s, y_s, x_t, args)

    def p_source(D, scores):
        h = F.conv2d(F.conv2d(scores, D[0], D[1]).relu(), D[2], D[3]).relu()
        return F.conv2d(h, D[4], D[5]).softmax(1)[:, 1]

    with torch.no_grad():
        scores_s, scores_t = small_fcn(f, x_s, True), small_fcn(f, x_t, True)
    p_s, p_t = p_source(D, scores_s), p_source(D, scores_t)
    L_D_feat = -(p_s.log().mean() + (1 - p_t).log().mean()) / 2
    accuracy = ((p_s > 0.5).double().mean() + (p_t < 0.5).double().mean()) / 2
    new_D = parameters(nets.D_feat)
    L_GAN_feat = -p_source(new_D, small_fcn(f, x_t, True)).log().mean()
    L_task = cross_entropy(small_fcn(f, x_s, True), y_s)
    for name, value in (("L_D_feat", L_D_feat), ("L_GAN_feat", L_GAN_feat), ("L_task", L_task)):
        assert float(losses[name].detach()) == pytest.approx(float(value.detach()), rel=1e-9), name
    assert float(losses["accuracy"]) == pytest.approx(float(accuracy)) and losses["updated"] == 1
    close(steps_D[0], torch.autograd.grad(L_D_feat, D))
    leaves = [f[name] for name in names]
    close(steps_f[0], torch.autograd.grad(0.3 * L_GAN_feat, leaves))
    close(steps_f[1], torch.autograd.grad(L_task, leaves))
    assert len(steps_D) == 1 and len(steps_f) == 2
    assert all(p.requires_grad for p in nets.D_feat.parameters())


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_feature_step_is_gated(gate):
    """f_T learns only while D_feat can tell the domains apart; D_feat learns in any case."""
    args = tiny_args("--feature-gate", gate)
    nets = feature_nets(args, f=0.01, D=0.01)
    f, D = parameters(nets.f_T), parameters(nets.D_feat)
    losses = cycada.feature_step(nets, noise(2, 3, 32, 40), labels(2), noise(2, 3, 32, 40), args)
    changed = [not torch.equal(a, b) for a, b in zip(f, nets.f_T.parameters(), strict=True)]
    assert losses["updated"] == (gate == 0) and all(changed) == any(changed) == (gate == 0)
    assert all(not torch.equal(a, b) for a, b in zip(D, nets.D_feat.parameters(), strict=True))
    assert losses["L_GAN_feat"] > 0 and losses["L_task"] > 0  # looked at, not learnt from
    assert nets.gate.last_update == (gate == 0)
    moved = nets.f_T.blocks[0][1].num_batches_tracked           # CHOICE (code): training mode
    assert moved == (4 if gate == 0 else 2)


def test_the_gate_is_the_mean_of_the_last_100_accuracies():
    gate, again = cycada.Gate(), cycada.Gate()
    assert gate.opens(torch.tensor(0.8), 0.7) and not gate.opens(torch.tensor(0.4), 0.65)
    assert not gate.opens(torch.tensor(0.6), 0.61) and gate.last_update == 1
    for _ in range(99):
        gate.opens(torch.tensor(0.5), 1.0)
    assert (gate.seen, len(gate.accuracies)) == (102, 100)
    again.load_state_dict(gate.state_dict())                          # as --resume does
    for g in (gate, again):
        assert g.opens(torch.tensor(0.5), 0.499) and not g.opens(torch.tensor(0.5), 0.501)
        assert (g.seen, g.last_update) == (104, 103)


@pytest.mark.parametrize("flags", [["--lambda-sem", "1"], ["--amp", "--lambda-sem", "1"]])
def test_every_weight_learns_and_losses_are_float32(flags):
    args = tiny_args(*flags)
    nets = cycada.build(args, CPU)
    nets.f_S = cycada.task_model(args).eval().requires_grad_(False)
    x_s, x_t = noise(2, 3, 32, 32, dtype=torch.float32), noise(2, 3, 32, 32, dtype=torch.float32)
    before = {name: parameters(getattr(nets, name)) for name in NETS}
    for step in range(3):
        losses = cycada.train_step(nets, x_s, x_t, args, rng(step))
        assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    for name, old in before.items():
        assert all(not torch.equal(a, b) for a, b in zip(old, getattr(nets, name).parameters(),
                                                         strict=True))


def test_chance_is_what_an_undecided_d_gets():
    undecided = torch.full((1, 1, 3, 3), 0.5)
    one, zero = (float(cycada.lsgan(undecided, target)) for target in (1.0, 0.0))
    pixels = {name: one for name in ("L_GAN_ST", "L_GAN_TS")} | {
        name: (one + zero) / 2 for name in ("L_D_S", "L_D_T")}
    half = float(cycada.domain_loss(torch.zeros(1, 2, 3, 3), cycada.SOURCE))
    assert cycada.CHANCE == pytest.approx(pixels | {"L_D_feat": half, "L_GAN_feat": half,
                                                    "accuracy": 0.5})


# ---- data -------------------------------------------------------------------------------------


def test_samples_depend_on_seed_and_number_and_every_epoch_shows_all(folder, monkeypatch):
    args = cycada.get_args(["--data", str(folder), *TINY])
    data = cycada.load_data(args)
    target = [x for x, _ in data["target"]]
    for make in (lambda: cycada.Unpaired(data["source"], data["target"], args),
                 lambda: cycada.Labelled(data["source"], args),
                 lambda: cycada.Labelled(data["source"], args, target)):
        for n in (0, 9, 3):
            close(make()[n], make()[n], rtol=0, atol=0)
            assert all(a.shape == ((3, 32, 32) if a.dtype == torch.float else (32, 32))
                       for a in make()[n])
    seen, open_rgb = [], common.open_rgb
    monkeypatch.setattr(common, "open_rgb", lambda f: seen.append(f) or open_rgb(f))
    for samples in (cycada.Unpaired(data["source"], data["target"], args),
                    cycada.Labelled(data["source"], args, target)):
        seen.clear()
        for n in range(40):
            samples[n]
        xs, ts = seen[0::2], seen[1::2]
        assert set(xs[:4]) == set(xs[4:8]) == {x for x, _ in data["source"]} and xs[:4] != xs[4:8]
        assert set(ts) == set(target)
        assert all(len({t for s, t in zip(xs, ts, strict=True) if s == x}) > 1 for x in set(xs))


def test_picture_and_label_stay_together(tmp_path):
    """The picture is its own label map in grey, so they must agree: in crops, half of them
    mirrored, and in whole pictures, which are not."""
    label = np.random.default_rng(0).integers(0, 3, (10, 12)).repeat(8, 0).repeat(8, 1)
    for name, array in (("x.png", label * 80), ("y.png", label)):
        Image.fromarray(array.astype(np.uint8)).save(tmp_path / name)
    for crop, size in ((32, (32, 32)), (None, (80, 96))):
        args = tiny_args("--task-load", 80)
        args.task_size = crop
        samples, mirrored = cycada.Labelled([(tmp_path / "x.png", tmp_path / "y.png")], args), 0
        for n in range(60):
            x, y = samples[n]
            assert torch.equal(((x[0] + 1) * 127.5 / 80).round().long(), y)
            assert y.shape == size
            crops = torch.from_numpy(label).unfold(0, size[0], 1).unfold(1, size[1], 1)
            mirrored += not bool((crops == y).all(-1).all(-1).any())
        assert 15 < mirrored < 45 if crop else mirrored == 0          # p = 1/2: 30 +- 4


def test_sizes(tmp_path):
    """Widths become --load in stage pixel, short sides of label maps --task-load for task models;
    whole pictures all take the first one's shape."""
    for name, size in (("a", (96, 48)), ("b", (90, 50))):
        Image.new("RGB", size).save(tmp_path / f"x{name}.png")
        Image.new("L", size).save(tmp_path / f"y{name}.png")
    small = [(tmp_path / "xa.png", tmp_path / "yb.png"), (tmp_path / "xb.png", tmp_path / "ya.png")]
    seen, resized = [], cycada.resized
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cycada, "resized", lambda *a: seen.append(a[1:4]) or resized(*a))
        args = tiny_args("--load", 64)
        cycada.Unpaired(small[:1], small[1:], args)[0]
        assert seen == [(64, 32, 32), (64, 36, 32)]
        args.task_size, args.task_load = 32, 40
        cycada.Labelled(small[:1], args)[0]
        args.task_size = None
        shapes = {x.shape for n in range(4) for x in [cycada.Labelled(small, args)[n][0]]}
    assert seen[2] == (72, 40, 32) and shapes == {(3, 40, 72)}


def test_label_ids_and_ignored(tmp_path):
    ids = np.array([[7, 8], [11, 0]], dtype=np.uint8)
    Image.fromarray(ids).save(tmp_path / "ids.png")
    args = tiny_args("--classes", "a=7", "b=8", "c=11")
    assert np.array(cycada.open_label(tmp_path / "ids.png", args)).tolist() == [[0, 1], [2, 255]]
    palette = Image.fromarray(np.array([[0, 1], [2, 255]], dtype=np.uint8))
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "palette.png")
    Image.fromarray(np.array([[0, 1], [2, 255]], dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in ("palette.png", "deep.png"):
        assert np.array(cycada.open_label(tmp_path / name, tiny_args())).tolist() == [[0, 1],
                                                                                      [2, 255]]


def test_a_map_of_another_shape_is_refused(folder, capsys):
    flags = ["--data", folder, *TINY, *STEPS, "--stage", "source"]
    for size, fine in (((96, 80), True), ((48, 39), False), ((40, 48), False)):
        Image.fromarray(np.zeros(size[::-1], np.uint8)).save(folder / "test_label/2.png")
        args = cycada.get_args([*map(str, flags)])
        if fine:
            assert len(cycada.load_data(args)["test"]) == 4
        else:
            line = error_of(capsys, cycada.main, *flags)
            assert "test_label/2.png" in line and "{}x{} pixels".format(*size) in line


@pytest.mark.parametrize("classes", [("road=3", "road=12"), ("a=1", "b=1"),
                                     [f"c{i}" for i in range(256)]])
def test_classes_and_ids_are_given_once(classes):
    with pytest.raises(common.UserError, match="--classes: each name and each id once"):
        tiny_args("--classes", *classes)


def test_known_classes_are_a_list_of_their_own():
    assert len(tiny_args("--classes", "gta5").classes) == 19
    assert tiny_args("--classes", "gta5", "extra").classes == ["gta5", "extra"]


def test_negative_ids_are_no_class(tmp_path):
    Image.fromarray(np.array([[-1, 0], [1, 70000]], dtype=np.int32)).save(tmp_path / "a.tif")
    some = tiny_args("--classes", "sky=0", "road=1")
    assert np.asarray(cycada.open_label(tmp_path / "a.tif", some)).tolist() == [[255, 0], [1, 255]]
    with pytest.raises(common.UserError, match=r"a\.tif: ids \[-1, 70000\]"):
        cycada.open_label(tmp_path / "a.tif", tiny_args())


def test_a_crop_larger_than_the_short_side_squeezes_nothing(tmp_path, monkeypatch):
    Image.new("RGB", (96, 48)).save(tmp_path / "wide.png")
    seen, original = [], cycada.resized
    monkeypatch.setattr(cycada, "resized", lambda images, w, h, size, rng: seen.append(
        (w, h)) or original(images, w, h, size, rng))
    pairs = [(tmp_path / "wide.png", None)]
    cycada.Unpaired(pairs, pairs, tiny_args("--load", "40", "--size", "32"))[0]
    assert seen == [(64, 32)] * 2                                     # not 40 x 32


def test_a_stage_of_other_classes_is_refused(trained, folder, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    line = error_of(capsys, cycada.main, "--data", folder, *TINY, *STEPS, "--stage", "feature",
                    "--classes", "sky", "car", "road", "--out", tmp_path / "run")
    assert "task/last.pt: its --classes were ['sky', 'road', 'car']" in line


def test_truth_of_the_grid_has_the_labels_own_colours(tmp_path):
    """Label maps are resized by nearest neighbours; between ids 0 and 2 there is no 1."""
    pairs = []
    for i, size in enumerate((48, 72)):
        Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(tmp_path / f"x{i}.png")
        ids = np.zeros((size, size), np.uint8)
        ids[::3] = 2
        Image.fromarray(ids).save(tmp_path / f"y{i}.png")
        pairs.append((tmp_path / f"x{i}.png", tmp_path / f"y{i}.png"))
    columns = cycada.label_columns({}, {"test": pairs, "target": []}, tiny_args(), "cpu")
    assert columns["truth"].shape == columns["x_t"].shape == (2, 3, 40, 40)      # --load
    known = cycada.colours(torch.tensor([[[0, 2]]]), 7)[0, :, 0].T                # (2, 3)
    assert torch.cdist(columns["truth"].movedim(1, 3).reshape(-1, 3), known).min(1)[0].max() == 0


# ---- runs -------------------------------------------------------------------------------------


def test_what_train_applies(folder, tmp_path, monkeypatch):
    """Stages in the paper's order; rates; which pictures and labels each stage gets."""
    seen = []

    def pixel(nets, x_s, x_t, args, rng):
        lr = [o.param_groups[0]["lr"] for o in (nets.opt_G, nets.opt_D)]
        seen.append(("pixel", lr, x_s, x_t))
        return {"L_cyc": torch.tensor(1.0)}

    def task(f, opt, x, y, args):
        seen.append(("task", opt.param_groups[0]["lr"], x, y))
        return {"L_task": torch.tensor(1.0)}

    def feature(nets, x, y, x_t, args):
        lr = [o.param_groups[0]["lr"] for o in (nets.opt_f, nets.opt_D)]
        seen.append(("feature", lr, x, x_t))
        if len(seen) < 35:
            nets.gate.last_update += 1
        return {"L_task": torch.tensor(1.0)}

    for name, step in (("train_step", pixel), ("task_step", task), ("feature_step", feature),
                       ("translate", lambda G, x, args: torch.zeros_like(x))):
        monkeypatch.setattr(cycada, name, step)
    run("--data", folder, *TINY, "--steps", 10, "--task-steps", 8, "--task-decay-from", "0.5",
        "--feature-steps", 90, "--feature-lr", "0.3", "--task-lr", "0.1", "--task-batch", 3, *EVERY,
        "--out", tmp_path / "run")
    assert [s[0] for s in seen[:26]] == ["task"] * 8 + ["pixel"] * 10 + ["task"] * 8
    assert [s[1] for s in seen[8:18]] == [pytest.approx([rate, rate]) for rate in (
        [2e-4] * 5 + [2e-4 * (10 - step) / 6 for step in range(5, 10)])]
    task_rates = [0.1] * 4 + [0.1 * (8 - step) / 5 for step in range(4, 8)]
    for stage in (seen[:8], seen[18:26], seen[-8:]):
        assert [s[1] for s in stage] == pytest.approx(task_rates)
        assert all(s[2].shape == (3, 3, 32, 32) for s in stage)
    # CHOICE (code): an epoch (4 pictures) without an update ends stage feature, at 8 + 4 steps
    features = [s for s in seen if s[0] == "feature"]
    assert len(features) == 8 + 4 and all(s[1] == [0.3, 0.3] for s in features)
    assert all(s[2].shape == (2, 3, 32, 32) for s in features)        # --batch
    last = torch.load(tmp_path / "run/feature/last.pt", weights_only=True)
    assert last["step"] == 12
    source, target, translation = (float(np.std([np.array(Image.open(f)) / 127.5 for f in (
        where).iterdir()])) for where in (folder / "source_img", folder / "target_img",
                                          tmp_path / "run/pixel/translated"))
    assert translation < 0.01 < 0.15 < target < 0.28 < 0.36 < source  # they tell the domains apart
    for steps, spread, column in ((seen[:8], source, 2), (seen[8:18], source, 2),
                                  (seen[8:18], target, 3), (seen[18:26], translation, 2),
                                  (features, translation, 2), (features, target, 3),
                                  (seen[-8:], target, 2)):
        assert abs(float(torch.cat([s[column] for s in steps]).std()) - spread) < 0.05


def test_sgd_is_the_codes():
    """p <- p - lr v with v <- momentum v + gradient + 0.0005 p, twice."""
    layer = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.fill_(2.0)
    opt = cycada.sgd(layer, tiny_args("--task-momentum", "0.9"), 0.1)
    p, v = 2.0, 0.0
    for gradient in (3.0, -1.0):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        opt.step()
        v = 0.9 * v + gradient + 0.0005 * p
        p -= 0.1 * v
    assert float(layer.weight.detach()) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("antialias", [False, True])
def test_D_has_a_pixel_left_down_to_three_cells(antialias):
    flags = ["--antialias-D"] * antialias
    for size, layers in ((48, 4), (52, 4), (36, 3), (64, 4)):
        D = cycada.build(tiny_args("--size", size, "--d-layers", layers, *flags), CPU).D_S
        assert min(D(noise(1, 3, size, size, dtype=torch.float32)).shape[2:]) >= 1
        with pytest.raises(common.UserError, match=f"expected at most {layers}"):
            tiny_args("--size", size, "--d-layers", layers + 1, *flags)


def test_grids_show_six_pictures_evenly_spaced(folder):
    args = cycada.get_args(["--data", str(folder), *TINY])
    source = cycada.load_data(args)["source"]
    for n, places in ((17, [0, 2, 5, 8, 11, 14]), (11, [0, 1, 3, 5, 7, 9]), (4, [0, 1, 2, 3])):
        pairs = [(source[i % 4][0], i) for i in range(n)]
        chosen, x = cycada.shown(pairs, 40)
        assert [i for _, i in chosen] == places and len(x) == len(places) and x.shape[3] == 40


def test_run_folder_and_table(trained):
    for stage in EVERY[1:]:
        names = {f.name for f in (trained / stage).iterdir()}
        assert {"log.csv", "index.html", "last.pt", "samples", "result.json"} <= names
    assert {stage: set(parts(trained / stage / "last.pt")) for stage in EVERY[1:]} == {
        "source": {"f_S", "opt"}, "task": {"f_T", "opt"}, "oracle": {"f_T", "opt"},
        "pixel": {*NETS, "opt_G", "opt_D", "pool_S", "pool_T"},
        "feature": {"f_T", "D_feat", "opt_f", "opt_D", "gate"}}
    whole, rows = result(trained), {s: result(trained / s)["scores"] for s in EVERY[1:]}
    assert (whole["method"], whole["steps"]) == ("cycada", 3 + 4 + 3 + 3 + 3)
    for k, score in enumerate(whole["scores"]):
        assert score["value"] == rows["feature"][k]["value"]
        assert score["trivial"] == rows["feature"][k]["trivial"] | {
            "source only": rows["source"][k]["value"], "CyCADA": rows["task"][k]["value"],
            "oracle": rows["oracle"][k]["value"]}
    log = (trained / "pixel/log.csv").read_text().splitlines()
    assert log[0] == "step,L_GAN_ST,L_GAN_TS,L_cyc,L_D_T,L_D_S,seconds" and len(log) == 5
    assert Image.open(trained / "pixel/samples/step_000004.png").width > 6 * 40


def test_every_picture_is_translated_once_by_the_newest_generator(trained, folder, tmp_path):
    args = cycada.get_args(["--data", str(folder), *TINY, "--out", str(tmp_path)])
    (tmp_path / "pixel").mkdir()
    weights = shutil.copy(trained / "pixel/last.pt", tmp_path / "pixel")
    source, process = cycada.load_data(args)["source"], common.Run("cycada", args)
    pairs = cycada.translated_pairs(source, args, process)
    assert [(x.name, y) for x, y in pairs] == [(f"{i}.png", folder / f"source_label/{i}.png")
                                               for i in range(4)]
    G = list(parts(weights)["G_ST"].values())
    x = cycada.picture_tensor(source[2][0], 40)                               # --load
    x = F.pad(x, (0, 0, 0, 3), mode="reflect")                        # 40 x 33: not a multiple of 4
    expected = common.to_pil(resnet_generator(G, x, 1, False)[0][0, :, :33])
    made = np.asarray(Image.open(pairs[2][0])).astype(int)
    assert made.shape == (33, 40, 3) and np.abs(made - np.asarray(expected)).max() <= 1
    for name, age in ((0, -10), (1, 10)):  # one older, one newer than G_ST
        Image.new("RGB", (40, 1)).save(pairs[name][0])
        os.utime(pairs[name][0], (Path(weights).stat().st_mtime + age,) * 2)
    cycada.translated_pairs(source, args, process)
    assert [Image.open(pairs[i][0]).size for i in (0, 1)] == [(40, 33), (40, 1)]
    assert pairs[0][0].parent == Path(weights).parent / "translated"  # set aside with its G_ST
    os.utime(source[1][0], (Path(weights).stat().st_mtime + 20,) * 2)  # another x_s of that name
    cycada.translated_pairs(source, args, process)
    assert Image.open(pairs[1][0]).size == (40, 33)
    args.load = 44                                                    # --resume with another one
    cycada.translated_pairs(source, args, process)
    assert {Image.open(x).size for x, _ in pairs} == {(44, 37)}


def test_target_labels_reach_the_oracle_and_nothing_else(trained, folder, tmp_path):
    for f in (folder / "target_label").iterdir():
        Image.fromarray(np.zeros((40, 48), dtype=np.uint8)).save(f)
    run("--data", folder, *TINY, *STEPS, *EVERY, "--out", tmp_path / "other")
    for stage in EVERY[1:]:
        a, b = (parts(r / stage / "last.pt") for r in (trained, tmp_path / "other"))
        if stage == "oracle":
            assert not torch.equal(a["f_T"]["scores.0.weight"], b["f_T"]["scores.0.weight"])
        else:
            assert_same(a, b)


def test_stages_one_by_one_equal_all_at_once(trained, folder, tmp_path, capsys):
    flags = ["--data", folder, *TINY, *STEPS, "--out", tmp_path / "steps", "--stage"]
    for stage in EVERY[1:]:
        run(*flags, stage)
        assert_same(*(parts(r / stage / "last.pt") for r in (trained, tmp_path / "steps")))
    assert result(tmp_path / "steps")["steps"] == 3
    out = ["--data", folder, *TINY, *STEPS, "--out", tmp_path / "none", "--stage"]
    for stage, first in (("task", "pixel"), ("feature", "task"), ("pixel", "source")):
        line = error_of(capsys, cycada.main, *out, stage, "--lambda-sem", 1)
        assert f"none/{first}/last.pt" in line and f"--stage {first} comes first" in line


def interrupted(function, train):
    """Ctrl-C in the second call of one of the script's steps."""
    original, calls = getattr(cycada, function), []

    def step(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), 2)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cycada, function, step)
        train()
    assert len(calls) == 2


@pytest.mark.parametrize("function, stage", [("task_step", "source"), ("train_step", "pixel"),
                                             ("feature_step", "feature")])
def test_resumed_run_is_bit_identical(trained, folder, tmp_path, function, stage):
    """Interrupted in a stage, the same command goes on there, and leaves alone what is done."""
    stages = EVERY[:EVERY.index(stage) + 1]
    flags = ["--data", folder, *TINY, *STEPS, *(["--stage", stage] if stage == "feature" else
                                                stages), "--out", tmp_path / "run"]
    if stage == "feature":
        for name in ("task", "pixel"):
            (tmp_path / "run" / name).mkdir(parents=True)
            shutil.copy(trained / name / "last.pt", tmp_path / "run" / name)
    interrupted(function, lambda: run(*flags))
    assert not (tmp_path / "run/result.json").exists()
    done = [tmp_path / "run" / s / "last.pt" for s in stages[1:-1]]
    before = [f.stat().st_mtime_ns for f in done if f.exists()]
    run("--data", folder, "--resume", "--out", tmp_path / "run", "--device", "cpu", "--stage",
        *(stages[1:] if stage != "feature" else [stage]))             # other flags: from last.pt
    assert before == [f.stat().st_mtime_ns for f in done if f.exists()]
    assert_same(*(parts(r / stage / "last.pt") for r in (trained, tmp_path / "run")))
    rows = (tmp_path / "run" / stage / "log.csv").read_text().split()
    assert [r.split(",")[0] for r in rows[1:]] == [str(i + 1) for i in range(len(rows) - 1)]
    scores = (result(r / stage)["scores"] for r in (trained, tmp_path / "run"))
    assert next(scores) == next(scores)


def steps_and_seeds(folder):
    """{stage, also one that is set aside: (steps done, --seed)}."""
    lasts = {f.parent.name: torch.load(f, weights_only=True) for f in folder.glob("*/last.pt")}
    return {name: (last["step"], last["config"]["seed"]) for name, last in lasts.items()}


def test_a_second_run_takes_nothing_of_the_first_for_its_own(trained, folder, tmp_path):
    """Stopped in stage pixel and resumed, it ends as one that had the folder for itself."""
    shutil.copytree(trained, tmp_path / "run")
    flags = ["--data", folder, *TINY, *STEPS, "--seed", 1, "--stage"]
    stages = ["source", "pixel", "task", "oracle"]
    interrupted("train_step", lambda: run(*flags, *stages, "--out", tmp_path / "run"))
    first = {f"{stage}.1": (4 if stage == "pixel" else 3, 0) for stage in EVERY[1:]}
    assert steps_and_seeds(tmp_path / "run") == first | {"source": (3, 1), "pixel": (2, 1)}
    run("--data", folder, "--resume", "--out", tmp_path / "run", "--device", "cpu", "--workers", 0)
    assert steps_and_seeds(tmp_path / "run") == first | {
        "source": (3, 1), "pixel": (4, 1), "task": (3, 1), "oracle": (3, 1)}
    run(*flags, *stages, "--out", tmp_path / "alone")
    assert result(tmp_path / "run")["scores"] == result(tmp_path / "alone")["scores"]


def test_what_goes_on_outdates_the_stages_that_read_it(trained, folder, tmp_path):
    """Two more steps of pixel, stopped in stage task: it and feature begin with the new G_ST."""
    shutil.copytree(trained, tmp_path / "run")
    resume = ["--data", folder, "--resume", "--out", tmp_path / "run", "--device", "cpu",
              "--workers", 0]
    interrupted("task_step", lambda: run(*resume, *EVERY, "--steps", 6))
    kept = {"source": (3, 0), "oracle": (3, 0), "pixel": (6, 0), "task.1": (3, 0),
            "feature.1": (3, 0)}
    assert steps_and_seeds(tmp_path / "run") == kept | {"task": (2, 0)}
    run(*resume)
    assert steps_and_seeds(tmp_path / "run") == kept | {"task": (3, 0), "feature": (3, 0)}
    shutil.copytree(tmp_path / "run/pixel", tmp_path / "new/pixel")
    run("--data", folder, *TINY, *STEPS, "--stage", "task", "feature", "--out", tmp_path / "new")
    for stage in ("task", "feature"):
        assert_same(*(parts(tmp_path / r / stage / "last.pt") for r in ("run", "new")))
    run(*resume, "--task-steps", 4, *EVERY[:2], "task")               # and feature reads task
    assert steps_and_seeds(tmp_path / "run") == kept | {
        "source": (4, 0), "task": (4, 0), "feature.2": (3, 0)}


def test_what_is_refused_leaves_all_stages_in_place(trained, folder, tmp_path, capsys, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    before, flags = {*tmp_path.rglob("*")}, ["--data", folder, *TINY, *STEPS, *EVERY, "--out",
                                             tmp_path / "run"]
    line = error_of(capsys, cycada.main, *flags, "--weights", trained / "pixel/last.pt")
    assert "--weights: read by --translate and --evaluate" in line

    def locked(folder, original=common.locked):
        common.expect(folder.name != "oracle", "another run")
        return original(folder)

    monkeypatch.setattr(common, "locked", locked)
    assert "another run" in error_of(capsys, cycada.main, *flags)
    assert {*tmp_path.rglob("*")} == before


def test_resume_takes_the_flags_of_the_run_that_was_stopped(trained, folder, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for age, stage in enumerate(("oracle", "task", "pixel")):         # pixel is the newest
        path = tmp_path / "run" / stage / "last.pt"
        state = torch.load(path, weights_only=True)
        state["config"] |= {"lambda_cyc": age, "stage": [stage]}
        torch.save(state, path)
        os.utime(path, (2e9 + age,) * 2)
    flags = ["--data", str(folder), "--resume", "--out", str(tmp_path / "run")]
    args = cycada.get_args(flags)
    assert (args.lambda_cyc, args.stage) == (2, ["pixel"])
    assert cycada.get_args([*flags, "--stage", "task"]).lambda_cyc == 2


def test_a_resumed_run_begins_its_later_stages(trained, folder, tmp_path):
    (tmp_path / "run/source").mkdir(parents=True)
    for name in ("last.pt", "result.json"):
        shutil.copy(trained / "source" / name, tmp_path / "run/source")
    run("--data", folder, "--resume", "--out", tmp_path / "run", "--device", "cpu", "--stage",
        "source", "pixel")
    assert_same(*(parts(r / "pixel/last.pt") for r in (trained, tmp_path / "run")))


def test_semantic_labels_are_those_of_stage_source(trained, folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cycada, "train_step", lambda nets, *_: seen.append(nets) or {
        "L_cyc": torch.tensor(1.0)})
    (tmp_path / "source").mkdir()
    shutil.copy(trained / "source/last.pt", tmp_path / "source")
    run("--data", folder, *TINY, "--steps", 1, "--lambda-sem", 1, "--stage", "pixel", "--out",
        tmp_path)
    assert_same(dict(seen[0].f_S.state_dict()), dict(parts(trained / "source/last.pt")["f_S"]))
    assert not seen[0].f_S.training and not any(p.requires_grad for p in seen[0].f_S.parameters())
    assert "f_S" not in parts(tmp_path / "pixel/last.pt")


def test_without_target_labels_there_is_no_oracle(folder, tmp_path, capsys):
    for name in ("target_label", "test_label", "test_img"):
        (folder / name).rename(tmp_path / name)
    run("--data", folder, *TINY, *STEPS, "--out", tmp_path / "run", "--stage", "source", "oracle")
    assert "no oracle" in capsys.readouterr().out and not (tmp_path / "run/oracle").exists()
    assert result(tmp_path / "run")["scores"] == []


# ---- translate and evaluate -------------------------------------------------------------------


def test_translate_by_the_network_of_the_stage(trained, tmp_path):
    picture = np.random.default_rng(2).integers(0, 256, (36, 52, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "p.png")
    x = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    for direction, name in (("StoT", "G_ST"), ("TtoS", "G_TS")):
        run("--translate", tmp_path / "p.png", "--weights", trained / "pixel/last.pt",
            "--direction", direction, "--out", tmp_path / direction)
        G = list(parts(trained / "pixel/last.pt")[name].values())
        y = resnet_generator(G, x, 1, False)[0][0]
        made = np.asarray(Image.open(tmp_path / direction / "p.png")).astype(int)
        assert np.abs(made - ((y + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 1
    for stage, name in (("source", "f_S"), ("task", "f_T")):
        run("--translate", tmp_path / "p.png", "--weights", trained / stage / "last.pt", "--out",
            tmp_path / stage)
        f = parts(trained / stage / "last.pt")[name]
        y = cycada.colours(small_fcn(f, x, False).argmax(1), 3)[0]    # 36 pixels: --task-load
        made = np.asarray(Image.open(tmp_path / stage / "p.png")).astype(int)
        same = np.abs(made - ((y + 1) * 127.5).permute(1, 2, 0).numpy()).max(2) <= 1
        assert same.mean() > 0.99                                     # but for ties


def test_a_picture_far_above_the_scale_of_the_training_is_remarked_on(trained, tmp_path, capsys,
                                                                      monkeypatch):
    """Training makes pictures 40 wide and their short sides at least 32: --load, --size."""
    for size, side in (((100, 90), 36), ((90, 100), 40), ((100, 66), 32), ((75, 70), 0)):
        monkeypatch.setattr(common, "SAID", {})
        Image.new("RGB", size).save(tmp_path / "p.png")
        flags = ["--translate", tmp_path / "p.png", "--out", tmp_path / "out", "--weights"]
        run(*flags, trained / "pixel/last.pt")
        said = capsys.readouterr().err
        assert (f"--side {side} is it" if side else "") in said and bool(side) == ("--side" in said)
        run(*flags, trained / "pixel/last.pt", "--side", side or 32)
        run(*flags, trained / "task/last.pt")                         # `segment` resizes
        assert "--side" not in capsys.readouterr().err


def test_label_maps_are_made_at_the_pictures_own_size(trained, folder, tmp_path, capsys):
    flags = ["--translate", folder / "test_img/0.png", "--out", tmp_path, "--weights"]
    for net in ("task", "pixel"):
        flags_of = [*flags, trained / net / "last.pt", "--side", 20]
        if net == "task":
            assert "--side: task models" in error_of(capsys, cycada.main, *flags_of)
        else:
            run(*flags_of)
            assert Image.open(tmp_path / "0.png").size == (48, 40)


def test_evaluate_prints_the_row_of_the_run(trained, folder, capsys):
    for kind in ("img", "label"):
        (folder / f"test_{kind}").rename(folder / f"val_{kind}")
        shutil.rmtree(folder / f"source_{kind}")                     # not needed to score
    run("--evaluate", "--weights", trained / "task/last.pt", "--data", folder, "--device", "cpu",
        "--split", "val")
    said = capsys.readouterr().out
    for score in result(trained / "task")["scores"]:
        assert re.search(rf"^{score['name']}: {score['value']:.4g} ", said, re.MULTILINE)


RANK = """
import sys, torch, common, cycada
save = common.Run.save
def keep(run):
    save(run)
    states = {n: part.state_dict() for n, part in run.parts.items() if hasattr(part, "parameters")}
    torch.save(states, run.folder / f"rank{run.rank}.pt")
common.Run.save = keep
cycada.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_agree(folder, tmp_path):
    """torchrun: all stages end with the same weights on both, all pictures are translated."""
    (tmp_path / "ranks.py").write_text(RANK)
    printed = two_processes(tmp_path / "ranks.py", "--data", folder, *TINY, *STEPS, *EVERY, "--out",
                            tmp_path / "two")
    assert len(list((tmp_path / "two/pixel/translated").iterdir())) == 4
    assert printed.count("beside all others") == 1
    start, seen = cycada.build(tiny_args(), CPU), set()
    for stage in EVERY[1:]:
        first, second = (torch.load(tmp_path / f"two/{stage}/rank{rank}.pt") for rank in range(2))
        for name in first:
            for key, value in first[name].items():
                if "running" not in key:
                    assert torch.equal(value, second[name][key]), (stage, name, key)
            seen.add(name)
            if name in NETS:  # and they have learnt at all
                assert not torch.equal(next(iter(first[name].values())),
                                       next(getattr(start, name).parameters()))
    assert seen == {*NETS, "f_S", "f_T", "D_feat"}


@pytest.mark.slow
def test_compile_does_not_compile_anew_at_every_step():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    args = tiny_args("--compile")
    nets = cycada.build(args, CPU)
    x = noise(2, 3, 32, 32, dtype=torch.float32)
    graphs = []
    for step in range(4):
        cycada.train_step(nets, x, x, args, rng(step))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2] == graphs[3]


def test_user_errors_are_one_line(folder, trained, tmp_path, capsys):
    def fails(*flags):
        return error_of(capsys, cycada.main, *flags)
    line = fails("--data", tmp_path / "nowhere")
    assert "nowhere" in line and "source_img" in line
    (tmp_path / "empty").mkdir()
    line = fails("--data", tmp_path / "empty", *TINY)
    assert "no source_img/" in line and "test_label" in line
    for flags, words in (
            (["--size", 34], "--size 34"), (["--task-size", 99], "--task-size 99"),
            (["--task-steps", 0], "--task-steps 0"), (["--d-layers", 0], "--d-layers 0"),
            (["--d-layers", 9], "--d-layers 9"),
            (["--classes", "a=x"], "x is no id"), (["--classes", "a=70000"], "70000 is no id")):
        assert words in fails("--data", folder, *TINY, *flags)
    picture = folder / "source_img/0.png"
    assert "--weights" in fails("--translate", picture)
    torch.save({"x": 1}, tmp_path / "other.pt")
    assert "not a checkpoint" in fails("--translate", picture, "--weights", tmp_path / "other.pt")
    assert "not of pixel" in fails("--evaluate", "--weights", trained / "pixel/last.pt", "--data",
                                   folder)
    assert "last.pt" in fails("--data", folder, *TINY, "--resume", "--out", tmp_path / "none")


def test_bad_data_is_named_before_training(folder, tmp_path, capsys):
    def fails():
        return error_of(capsys, cycada.main, "--data", folder, *TINY, *STEPS, "--out",
                        tmp_path / "run")
    label = folder / "source_label/1.png"
    good, ids = label.read_bytes(), np.array(Image.open(label))
    Image.fromarray(np.where(ids == 2, 9, ids).astype(np.uint8)).save(label)
    line = fails()
    assert "source_label/1.png" in line and "[9]" in line and "name=id" in line
    Image.fromarray(ids).convert("RGB").save(label)
    assert "one channel" in fails()
    label.write_bytes(good[:len(good) // 2])
    assert "1.png" in fails()
    label.unlink()
    line = fails()
    assert "source_img/1.png" in line and "no label map" in line
    assert not (tmp_path / "run").exists()


def test_the_constant_answer_is_what_the_truth_has_most_of(folder):
    """Also where f says something else everywhere."""
    args = cycada.get_args(["--data", str(folder), *TINY])
    pairs = cycada.load_data(args)["test"]

    def f(x):
        return F.one_hot(torch.full(x.shape[2:], 2), 3).permute(2, 0, 1)[None].float()

    f.eval = lambda: f
    row = {s["name"]: s for s in cycada.row_of_table(f, pairs, args, CPU)}
    known = np.concatenate([np.array(Image.open(y)).ravel() for _, y in pairs])
    share = np.bincount(known[known != 255]) / (known != 255).sum()
    assert row["pixel acc."]["value"] == pytest.approx(100 * share[2])
    assert row["pixel acc."]["trivial"]["most frequent class"] == pytest.approx(100 * share.max())


def test_the_grid_of_stage_pixel_goes_there_and_back(folder):
    class Times(torch.nn.Module):
        multiple = 4

        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return self.by * x

    args = cycada.get_args(["--data", str(folder), *TINY])
    nets, data = cycada.SimpleNamespace(G_ST=Times(0.5), G_TS=Times(0.25)), cycada.load_data(args)
    columns = cycada.pixel_columns(nets, data, args, CPU)
    x_s, x_t = columns["x_s"], columns["x_t"]
    assert [*columns] == ["x_s", "G_ST(x_s)", "G_TS(G_ST(x_s))", "x_t", "G_TS(x_t)",
                          "G_ST(G_TS(x_t))"]
    close([*columns.values()], [x_s, x_s / 2, x_s / 8, x_t, x_t / 4, x_t / 8])
