"""cycada.py: every equation against a plain transcription, and the script as its users run it."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_same, error_of
from PIL import Image

import common
import cycada
from lab import segmenters, toy

ROOT = Path(__file__).parent.parent
NAMES = ["sky", "road", "car"]
TINY = ["--size", "32", "--load", "40", "--ngf", "4", "--ndf", "4", "--blocks", "1", "--batch", "2",
        "--pool", "3", "--task-model", "small", "--task-weights", "random", "--task-load", "36",
        "--task-size", "32", "--task-batch", "2", "--workers", "0", "--device", "cpu",
        "--log-every", "1", "--class-names", *NAMES]
STEPS = ["--steps", "4", "--task-steps", "3", "--feature-steps", "3"]


def tiny_args(*flags):
    return cycada.get_args(["--data", ".", *TINY, *flags])


def scene(rng, dark):
    """A noise picture, sky over road with a car, and its label map; ids 0, 1, 2 and 255."""
    label = np.zeros((40, 48), dtype=np.uint8)
    label[20:], label[24:32, 10:30], label[:2] = 1, 2, 255
    picture = rng.integers(0, 60, (40, 48, 3)) + np.array([150, 40, 90])[label % 3][..., None]
    return Image.fromarray((picture // (2 if dark else 1)).astype(np.uint8)), Image.fromarray(label)


def write(folder, splits, rng, count=4, prefix=""):
    for split in splits:
        for kind in ("img", "label"):
            (folder / f"{split}_{kind}").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture, label = scene(rng, split != "source")
            picture.save(folder / f"{split}_img" / f"{prefix}{i}.png")
            label.save(folder / f"{split}_label" / f"{prefix}{i}.png")


def write_all(folder):
    """Four small labelled pictures per split, the target darker; always the same."""
    write(folder, ("source", "target", "test"), np.random.default_rng(0))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_all(tmp_path / "data")


def count(net):
    return sum(p.numel() for p in net.parameters())


def livelier(m):
    for name in ("G_ST", "G_TS", "D_S", "D_T"):
        common.init_weights(getattr(m, name).double(), "normal", 0.1)
    return m


# ---- networks -------------------------------------------------------------------------------


def test_parameter_counts_of_the_papers_networks(monkeypatch):
    m = cycada.build(cycada.get_args(["--data", "."]), torch.device("cpu"))
    assert count(m.G_ST) == count(m.G_TS) == 11_378_179
    assert count(m.D_S) == count(m.D_T) == 2_764_737
    assert count(cycada.ScoreDiscriminator(19)) == 142_082
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda w, **_: w)  # slow for 134 M
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda w, **_: w)
    f = cycada.FCN8s(19)
    assert count(f) == 134_353_017
    vgg = [*f.to_pool3.parameters(), *f.to_pool4.parameters(), *f.to_pool5.parameters()]
    assert sum(p.numel() for p in vgg) == 14_714_688


def test_paper_defaults():
    args = cycada.get_args(["--data", "."])
    assert (args.size, args.load, args.batch, args.lr, args.pool) == (400, 1024, 1, 2e-4, 50)
    assert (args.lambda_cyc, args.semantic, args.blocks, args.epochs) == (10, "off", 9, 200)
    assert (args.task_model, args.task_load, args.task_steps) == ("fcn8s", 1024, 100_000)
    assert (args.task_lr, args.task_momentum, args.task_weights) == (1e-3, 0.99, "imagenet")
    assert (args.feature_lr, args.feature_gate, args.lambda_feature) == (1e-5, 0.6, 0.1)
    assert len(args.class_names) == 19 and args.stages == ["source", "pixel", "target", "oracle"]
    assert "feature" in cycada.get_args(["--data", ".", "--feature-adaptation"]).stages
    assert cycada.get_args([]).class_names == list(toy.CLASSES)


def thin_fcn8s(monkeypatch):
    """FCN8s at 1/32 of its width, so that a test can run it."""
    conv = nn.Conv2d

    def thin(a, b, *rest, **more):
        return conv(a if a == 3 else a // 32, b if b == 5 else b // 32, *rest, **more)

    monkeypatch.setattr(cycada.nn, "Conv2d", thin)
    monkeypatch.setattr(cycada, "isinstance", lambda x, _: isinstance(x, conv), raising=False)
    f = cycada.FCN8s(5)
    monkeypatch.undo()
    return f.eval()


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (96, 41)])
def test_task_models_answer_at_the_size_of_the_picture(monkeypatch, size):
    for f in (thin_fcn8s(monkeypatch), cycada.SmallFCN(5).eval(), cycada.drn26(5).eval()):
        with torch.no_grad():
            assert f(torch.randn(1, 3, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize("skip, stride", [("score_pool3", 8), ("score_pool4", 16)])
def test_fcn8s_scores_stay_in_their_place(monkeypatch, skip, stride):
    """A square moves the scores around itself: the crop offsets 5, 9 and 31 are right."""
    torch.manual_seed(1)  # a draw whose ReLUs are not all dead
    f = thin_fcn8s(monkeypatch)
    nn.init.normal_(getattr(f, skip).weight)
    nn.init.zeros_(f.head[-1].weight)
    for p in f.parameters():
        if p.dim() == 4:  # mirror-symmetric filters, or the response would lean to a side
            p.data += p.data.flip(2)
            p.data += p.data.flip(3)
    errors = []
    for start in range(60, 76, 2):
        x = torch.zeros(1, 3, 176, 176)
        x[..., start:start + 16, start + 20:start + 36] = 1
        with torch.no_grad():
            change = (f(x) - f(torch.zeros_like(x)))[0].abs().sum(0)
        for axis, true in ((1, start + 7.5), (0, start + 27.5)):
            errors.append(float((change.sum(axis) * torch.arange(176)).sum() / change.sum()) - true)
    assert abs(np.mean(errors)) < stride / 4


@pytest.mark.parametrize("factor", [2, 8])
def test_fixed_upsampling_is_bilinear(factor):
    x = torch.rand(1, 3, 6, 7)
    up = cycada.BilinearUp(factor)(x)
    assert up.shape[2:] == (factor * 7, factor * 8)
    edge, inner = factor // 2, F.interpolate(x, scale_factor=factor, mode="bilinear")
    h, w = inner.shape[2:]
    mine = up[:, :, edge:edge + h, edge:edge + w]
    cut = slice(factor, -factor)  # at the border the transposed convolution meets zeros
    torch.testing.assert_close(mine[:, :, cut, cut], inner[:, :, cut, cut])


def test_imagenet_weights_of_vgg16_reach_every_layer_but_the_scores(monkeypatch):
    f = thin_fcn8s(monkeypatch)
    convs = [m for m in f.modules() if isinstance(m, nn.Conv2d)]
    state, at = {}, iter(range(100))
    for conv in convs[:13]:
        i = next(at)
        state[f"features.{i}.weight"] = torch.randn_like(conv.weight)
        state[f"features.{i}.bias"] = torch.randn_like(conv.bias)
    for i, conv in ((0, convs[13]), (3, convs[14])):
        state[f"classifier.{i}.weight"] = torch.randn(len(conv.weight), conv.weight[0].numel())
        state[f"classifier.{i}.bias"] = torch.randn_like(conv.bias)
    state["classifier.6.weight"] = torch.randn(1000, 128)
    last = convs[15].weight.clone()
    f.load_imagenet(state)
    assert torch.equal(convs[3].weight, state["features.3.weight"])
    assert torch.equal(convs[13].weight.flatten(1), state["classifier.0.weight"])
    assert torch.equal(convs[14].bias, state["classifier.3.bias"])
    assert torch.equal(convs[15].weight, last) and not convs[16].weight.any()


def test_torchvisions_vgg16_has_the_layout_we_read():
    from torchvision.models import vgg16

    with torch.device("meta"):
        state = vgg16().state_dict()
        f = cycada.FCN8s(19)
    names = [k for k in state if k.startswith("features.")] + [
        f"classifier.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")]
    ours = [p for m in list(f.modules()) if isinstance(m, nn.Conv2d) for p in (m.weight, m.bias)]
    assert [state[k].numel() for k in names] == [p.numel() for p in ours[:30]]


def test_drn_weights_of_its_authors_reach_every_layer_but_the_scores(tmp_path):
    torch.manual_seed(1)
    theirs = segmenters.DRN26(1000)
    state = {k: torch.randn_like(v) for k, v in theirs.state_dict().items() if "tracked" not in k}
    state["fc.weight"], state["fc.bias"] = state.pop("score.weight"), state.pop("score.bias")
    torch.save(state, tmp_path / "drn.pth")
    args = tiny_args("--task-model", "drn26", "--task-weights", str(tmp_path / "drn.pth"))
    f = cycada.task_model(args, torch.device("cpu"), args.task_weights)
    assert all(torch.equal(f.state_dict()[k], v) for k, v in state.items() if "fc" not in k)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    args.task_weights = str(tmp_path / "other.pth")
    with pytest.raises(common.UserError, match="not the weights"):
        cycada.task_model(args, torch.device("cpu"), args.task_weights)
    args.task_weights = "imagenet"
    with pytest.raises(common.UserError, match="drn_c_26"):
        cycada.task_model(args, torch.device("cpu"), args.task_weights)


# ---- losses and metrics ---------------------------------------------------------------------


def test_task_loss_is_eq_3_10():
    scores = torch.randn(2, 3, 4, 5, dtype=torch.double)
    labels = torch.randint(3, (2, 4, 5))
    labels[0, 1, 2] = labels[1, 3] = 255
    total, known = 0.0, 0
    for b in range(2):
        for i in range(4):
            for j in range(5):
                if labels[b, i, j] != 255:
                    e = [math.exp(float(s)) for s in scores[b, :, i, j]]
                    total -= sum((k == int(labels[b, i, j])) * math.log(e[k] / sum(e))
                                 for k in range(3))
                    known += 1
    assert float(cycada.task_loss(scores, labels)) == pytest.approx(total / known, rel=1e-12)
    assert float(cycada.task_loss(scores, torch.full_like(labels, 255))) == 0


def test_metrics_of_a_hand_computed_three_class_example():
    """Sec. 3.4.3 by hand: t = (4, 3, 3), hits (3, 2, 1), predicted (5, 3, 2)."""
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 255]])
    said = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 2, 0, 2, 1]])
    said[0, 9] = 2
    n = cycada.confusion(said, truth, 3)
    assert n.tolist() == [[3, 1, 0], [1, 2, 0], [1, 0, 2]]
    found = cycada.metrics(n)
    IoU = [3 / (4 + 5 - 3), 2 / (3 + 3 - 2), 2 / (3 + 2 - 2)]
    assert found["IoU"].tolist() == pytest.approx([100 * v for v in IoU])
    assert float(found["mIoU"]) == pytest.approx(100 * sum(IoU) / 3)
    assert float(found["fwIoU"]) == pytest.approx(100 * (4 * IoU[0] + 3 * IoU[1] + 3 * IoU[2]) / 10)
    assert float(found["pixel acc."]) == pytest.approx(70)


def test_metrics_agree_with_torchmetrics():
    pytest.importorskip("torchmetrics", reason="pip install -r lab/requirements.txt")
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    torch.manual_seed(0)
    truth, said = torch.randint(5, (3, 20, 30)), torch.randint(5, (3, 20, 30))
    said = torch.where(torch.rand(truth.shape) < 0.6, truth, said)
    truth[:, :4] = 255
    found = cycada.metrics(cycada.confusion(said, truth, 5))
    for key, metric in (("IoU", MulticlassJaccardIndex(5, average="none", ignore_index=255)),
                        ("mIoU", MulticlassJaccardIndex(5, average="macro", ignore_index=255)),
                        ("fwIoU", MulticlassJaccardIndex(5, average="weighted", ignore_index=255)),
                        ("pixel acc.", MulticlassAccuracy(5, average="micro", ignore_index=255))):
        expected = 100 * metric(said, truth).double()
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-5)


def test_absent_classes_count_as_zero_and_confusions_add_up():
    n = torch.tensor([[5, 0, 0], [5, 10, 0], [0, 0, 0]])
    assert cycada.metrics(n)["IoU"].tolist() == pytest.approx([50, 100 * 10 / 15, 0])
    a, b = torch.randint(3, (2, 4, 4)), torch.randint(3, (2, 4, 4))
    assert torch.equal(cycada.confusion(a, b, 3), cycada.confusion(a[:1], b[:1], 3)
                       + cycada.confusion(a[1:], b[1:], 3))


def test_gap_closed_and_harm_are_told():
    n = {"source only": [[6, 4], [8, 2]], "CyCADA": [[9, 1], [9, 1]], "oracle": [[9, 1], [1, 9]]}
    n = {row: torch.tensor(v) for row, v in n.items()}
    found = {row: cycada.metrics(v) for row, v in n.items()}
    low, ours, high = (float(found[row]["pixel acc."]) for row in n)
    assert cycada.gap_closed(found, "CyCADA", "pixel acc.") == pytest.approx(
        100 * (ours - low) / (high - low)) == pytest.approx(20)
    assert cycada.gap_closed(found, "oracle", "mIoU") is None
    text = cycada.describe(found, n, torch.tensor([10, 10]), ["sky", "pole"])
    assert "gap closed by CyCADA" in text and "pixel acc. 20 %" in text
    assert "harms: pole (14.3 -> 9.1)" in text
    assert "pole (IoU 9.1): 10 % right, 90 % called sky" in text


# ---- the pixel step -------------------------------------------------------------------------


def noise_batch(B=2, size=(32, 40)):
    x_s, x_t = (torch.rand(B, 3, *size, dtype=torch.double) * 2 - 1 for _ in "st")
    return x_s, torch.randint(3, (B, *size)), x_t


def naive_pixel(m, x_s, y_s, x_t, args, judge):
    """Eq. (3.11) to (3.14), one picture at a time, as the text words them; losses, gradients."""
    B = len(x_s)
    losses = dict.fromkeys(
        ("GAN_ST", "cyc_s", "sem_s", "GAN_TS", "cyc_t", "sem_t", "D_T", "D_S"), 0)
    for b in range(B):
        s, t, y = x_s[b:b + 1], x_t[b:b + 1], y_s[b:b + 1]
        fake_t, fake_s = m.G_ST(s), m.G_TS(t)
        losses["GAN_ST"] += ((m.D_T(fake_t) - 1)**2).mean() / B
        losses["GAN_TS"] += ((m.D_S(fake_s) - 1)**2).mean() / B
        losses["cyc_s"] += (m.G_TS(fake_t) - s).abs().mean() / B
        losses["cyc_t"] += (m.G_ST(fake_s) - t).abs().mean() / B
        if judge:
            p_s = y if args.semantic == "gated" else judge(s).argmax(1)
            losses["sem_s"] += F.cross_entropy(judge(fake_t), p_s) / B
            losses["sem_t"] += F.cross_entropy(judge(fake_s), judge(t).argmax(1)) / B
        losses["D_T"] += 0.5 * ((m.D_T(fake_t.detach())**2).mean()
                                + ((m.D_T(t) - 1)**2).mean()) / B
        losses["D_S"] += 0.5 * ((m.D_S(fake_s.detach())**2).mean()
                                + ((m.D_S(s) - 1)**2).mean()) / B
    L = (losses["GAN_ST"] + losses["GAN_TS"] + args.lambda_cyc * (losses["cyc_s"] + losses["cyc_t"])
         + args.lambda_sem * (losses["sem_s"] + losses["sem_t"]))
    Gs, Ds = ([p for net in nets for p in net.parameters()]
              for nets in ((m.G_ST, m.G_TS), (m.D_T, m.D_S)))
    return (losses, torch.autograd.grad(L, Gs),
            torch.autograd.grad(losses["D_T"] + losses["D_S"], Ds))


@pytest.mark.parametrize("semantic", ["off", "literal", "gated"])
@pytest.mark.parametrize("B", [1, 3])
def test_pixel_step_equals_the_naive_one(semantic, B):
    args = tiny_args("--semantic", semantic, "--lambda-sem", "0.7", "--no-channels-last")
    m = livelier(cycada.build(args, torch.device("cpu")))
    x_s, y_s, x_t = noise_batch(B)
    for name in ("opt_G", "opt_D"):
        getattr(m, name).param_groups[0]["lr"] = 0.0
    judge = None
    if semantic != "off":
        m.judge.double()
        for p in m.judge.scores.parameters():  # its loss must be below 1: almost flat scores,
            p.data.mul_(0.01)
        m.judge.scores[0].bias.data = torch.tensor([0.1, 0.0, 0.0], dtype=torch.double)
        judge = copy.deepcopy(m.judge).eval()
    if semantic == "gated":
        y_s = torch.zeros_like(y_s)            # and a class that they slightly prefer
        m.judge.scores[0].bias.data[0] = judge.scores[0].bias.data[0] = 1.0
        m.opt_judge.param_groups[0]["lr"] = 0.0
    losses = cycada.train_step(m, x_s, y_s, x_t, args, torch.Generator().manual_seed(0))
    if semantic == "gated":
        assert losses.pop("judge") <= 1.0
        judge = m.judge                        # its batch norm has seen x_s
    expected, grad_G, grad_D = naive_pixel(m, x_s, y_s, x_t, args, judge)
    for name, loss in losses.items():
        assert float(loss) == pytest.approx(float(expected[name].detach()), rel=1e-8), name
    assert ("sem_s" in losses) == (semantic != "off")
    G = [p for net in (m.G_ST, m.G_TS) for p in net.parameters()]
    D = [p for net in (m.D_T, m.D_S) for p in net.parameters()]
    for p, g in zip([*G, *D], [*grad_G, *grad_D], strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)
    assert all(p.requires_grad for p in D)
    if semantic == "literal":
        assert all(p.grad is None for p in m.judge.parameters())


def test_a_judge_that_guesses_is_not_asked():
    args = tiny_args("--semantic", "gated")
    m = cycada.build(args, torch.device("cpu"))
    before = [p.clone() for p in m.judge.parameters()]
    x_s, y_s, x_t = (t.float() if t.dtype == torch.double else t for t in noise_batch())
    for p in m.judge.scores.parameters():
        p.data.mul_(0)                         # loss log 3 = 1.1
    losses = cycada.train_step(m, x_s, y_s, x_t, args, torch.Generator().manual_seed(0))
    assert losses["judge"] > 1 and losses["sem_s"] == losses["sem_t"] == 0
    after = list(m.judge.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # but it learns


def test_literal_judge_is_f_s_and_stays():
    args = tiny_args("--semantic", "literal")
    f_S = cycada.task_model(args, torch.device("cpu"))
    m = cycada.build(args, torch.device("cpu"), f_S)
    before = copy.deepcopy(f_S.state_dict())
    batch = (t.float() if t.dtype == torch.double else t for t in noise_batch())
    losses = cycada.train_step(m, *batch, args, torch.Generator().manual_seed(0))
    assert losses["sem_s"] > 0 and m.judge is f_S
    assert all(torch.equal(before[k], v) for k, v in f_S.state_dict().items())


def test_rate_and_history_buffer():
    rates = [cycada.rate(step, 200, 0.5) for step in range(200)]
    assert rates[:100] == [1.0] * 100 and rates[-1] == pytest.approx(1 / 101)
    assert cycada.rate(99, 100, 1.0) == 1.0
    pool, rng = cycada.HistoryBuffer(3, torch.device("cpu")), torch.Generator().manual_seed(0)
    first = torch.arange(3.0).view(3, 1, 1, 1)
    assert torch.equal(pool.exchange(first, rng), first)
    later = torch.arange(10.0, 2010.0).view(-1, 1, 1, 1)
    shown = pool.exchange(later, rng)
    assert 0.45 < float((shown == later).float().mean()) < 0.55 and len(pool.pictures) == 3


# ---- feature adaptation ---------------------------------------------------------------------


def feature_parts(args, gate_open=True):
    torch.manual_seed(0)
    f, D = cycada.task_model(args, torch.device("cpu")), cycada.ScoreDiscriminator(3)
    D.seen += 100
    D.accuracies.fill_(1.0 if gate_open else 0.0)
    return cycada.SimpleNamespace(f_T=f, D_feat=D, opt_f=cycada.sgd(f, args, 1e-3),
                                  opt_D=cycada.sgd(D, args, 1e-3))


@pytest.mark.parametrize("gate_open", [True, False])
def test_feature_step_is_gated_by_accuracy(gate_open):
    args = tiny_args("--feature-adaptation")
    m = feature_parts(args, gate_open)
    f, D = ([p.clone() for p in net.parameters()] for net in (m.f_T, m.D_feat))
    averages = [b.clone() for b in m.f_T.buffers()]
    x_s, y_s, x_t = (t.float() if t.dtype == torch.double else t for t in noise_batch())
    losses = cycada.feature_step(m, x_s, y_s, x_t, args)
    changed = [not torch.equal(a, b) for a, b in zip(f, m.f_T.parameters(), strict=True)]
    assert losses["updated"] == gate_open and any(changed) == gate_open
    if not gate_open:
        assert all(torch.equal(a, b) for a, b in zip(averages, m.f_T.buffers(), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(D, m.D_feat.parameters(), strict=True))
    assert (losses["task"] > 0) == (losses["adversarial"] > 0) == gate_open


def test_feature_losses_against_their_definition():
    args = tiny_args("--feature-adaptation", "--lambda-feature", "0.1")
    m = feature_parts(args)
    for layer in m.D_feat.modules():
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
    for group in (*m.opt_f.param_groups, *m.opt_D.param_groups):
        group["lr"] = 0.0
    x_s, y_s, x_t = (t.float() if t.dtype == torch.double else t for t in noise_batch())
    f, D = copy.deepcopy(m.f_T).eval(), copy.deepcopy(m.D_feat)
    losses = cycada.feature_step(m, x_s, y_s, x_t, args)
    p_s, p_t = D(f(x_s).detach()).softmax(1), D(f(x_t).detach()).softmax(1)
    torch.testing.assert_close(losses["D_feat"], -p_s[:, 1].log().mean() - p_t[:, 0].log().mean())
    right = (p_s[:, 1] > 0.5).float().mean() / 2 + (p_t[:, 0] > 0.5).float().mean() / 2
    torch.testing.assert_close(losses["accuracy"], right)
    torch.testing.assert_close(losses["adversarial"], -p_t[:, 1].log().mean())
    torch.testing.assert_close(losses["task"], cycada.task_loss(f.train()(x_s), y_s).detach())
    assert all(p.requires_grad for p in m.D_feat.parameters())


def test_remembered_accuracies():
    D = cycada.ScoreDiscriminator(3)
    assert float(D.remember(torch.tensor(0.8))) == pytest.approx(0.8)
    assert float(D.remember(torch.tensor(0.4))) == pytest.approx(0.6)
    for _ in range(100):
        mean = D.remember(torch.tensor(0.5))
    assert float(mean) == pytest.approx(0.5)


# ---- data -----------------------------------------------------------------------------------


def test_samples_depend_on_seed_and_number_alone(folder):
    args = cycada.get_args(["--data", str(folder), *TINY])
    pairs = {split: cycada.find_pairs(folder, split, args) for split in ("source", "target")}
    for make in (lambda: cycada.Labelled(pairs["source"], args),
                 lambda: cycada.Unpaired(pairs["source"], pairs["target"], args),
                 lambda: cycada.Adaptation(pairs["source"], pairs["target"], args)):
        for n in (0, 9, 3):
            for a, b in zip(make()[n], make()[n], strict=True):
                assert torch.equal(a, b)
                assert a.shape == ((3, 32, 32) if a.dtype == torch.float else (32, 32))
    data = cycada.Labelled(pairs["source"], args)
    assert not torch.equal(data[0][0], data[4][0])


def test_picture_and_label_are_cropped_and_mirrored_together(tmp_path):
    """The picture is its own label map in grey, so they must agree in every crop."""
    label = np.random.default_rng(0).integers(0, 3, (10, 12)).repeat(8, 0).repeat(8, 1)
    for split in ("source", "target"):
        for kind, scale in (("img", 80), ("label", 1)):
            (tmp_path / f"{split}_{kind}").mkdir()
            Image.fromarray((label * scale).astype(np.uint8)).save(
                tmp_path / f"{split}_{kind}/a.png")
    args = cycada.get_args(["--data", str(tmp_path), *TINY, "--task-load", "80", "--load", "96"])
    pairs = cycada.find_pairs(tmp_path, "source", args)
    for data in (cycada.Labelled(pairs, args), cycada.Unpaired(pairs, pairs, args)):
        for n in range(6):
            x, y = data[n][:2]
            assert torch.equal(((x[0] + 1) * 127.5 / 80).round().long(), y)


def test_label_ids_and_ignored(tmp_path, folder):
    ids = np.array([[7, 8], [11, 0]], dtype=np.uint8)
    Image.fromarray(ids).save(tmp_path / "ids.png")
    args = tiny_args("--label-ids", "7", "8", "11")
    assert np.array(cycada.open_label(tmp_path / "ids.png", args)).tolist() == [[0, 1], [2, 255]]
    palette = Image.fromarray(np.array([[0, 1], [2, 255]], dtype=np.uint8))
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "palette.png")
    Image.fromarray(np.array([[0, 1], [2, 255]], dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in ("palette.png", "deep.png"):
        assert np.array(cycada.open_label(tmp_path / name, tiny_args())).tolist() == [[0, 1],
                                                                                      [2, 255]]


def test_domains_by_name_prefix(tmp_path):
    """CamVid's layout: sequences of both domains share the folders."""
    rng = np.random.default_rng(0)
    write(tmp_path, ("train", "test"), rng, 2, "day_")
    write(tmp_path, ("train", "test"), rng, 3, "dusk_")
    write(tmp_path, ("val",), rng, 1, "day2_")
    args = cycada.get_args(["--data", str(tmp_path), *TINY, "--source-names", "day_", "day2_",
                            "--target-names", "dusk_"])
    with pytest.raises(common.UserError, match="two pictures of the source are named day_0"):
        cycada.load_data(tmp_path, args)
    for split in ("img", "label"):
        for f in (tmp_path / f"test_{split}").glob("*"):
            f.rename(f.with_name(f.name.replace("_", "_t")))
    data = cycada.load_data(tmp_path, args)
    names = {split: [f"{p.parent.name}/{p.stem}" for p, _ in pairs]
             for split, pairs in data.items()}
    assert names == {
        "source": ["train_img/day_0", "train_img/day_1", "val_img/day2_0", "test_img/day_t0",
                   "test_img/day_t1"],
        "target": ["train_img/dusk_0", "train_img/dusk_1", "train_img/dusk_2"],
        "test": ["test_img/dusk_t0", "test_img/dusk_t1", "test_img/dusk_t2"]}
    assert all(y.parent.name == x.parent.name.replace("img", "label") and y.name == x.name
               for pairs in data.values() for x, y in pairs)


# ---- the script -----------------------------------------------------------------------------


def run(*flags):
    cycada.main([*map(str, flags)])


def run_fails(capsys, *flags):
    return error_of(capsys, cycada.main, *flags)


def parts(path):
    return torch.load(path, weights_only=True)["parts"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, all stages; the data are those of `folder`."""
    tmp_path = tmp_path_factory.mktemp("trained")
    run("--data", write_all(tmp_path / "data"), *TINY, *STEPS, "--feature-adaptation",
        "--out", tmp_path / "run")
    return tmp_path / "run"


def test_run_folder_and_table(trained, capsys):
    stages = {"source", "pixel", "target", "oracle", "feature"}
    for stage in stages:
        assert {"log.csv", "index.html", "last.pt", "samples"} <= {
            f.name for f in (trained / stage).iterdir()}
    assert sorted(f.name for f in (trained / "translated").iterdir()) == [
        f"{i}.png" for i in range(4)]
    assert set(parts(trained / "last.pt")["finished"]["nets"]) == {
        "f_S", "G_ST", "G_TS", "f_T", "f_oracle", "f_feature"}
    result = json.loads((trained / "result.json").read_text())
    assert (result["method"], result["steps"]) == ("cycada", 3 + 4 + 3 + 3 + 3)
    mIoU, fwIoU, accuracy = result["scores"]
    assert [s["name"] for s in result["scores"]] == ["mIoU", "fwIoU", "pixel acc."]
    assert set(mIoU["trivial"]) == {"source only", "CyCADA", "oracle", "most frequent class"}
    assert set(mIoU["IoU"]) == {"source only", "CyCADA", "CyCADA + feature", "oracle"}
    assert list(mIoU["IoU"]["oracle"]) == NAMES and "gap closed, per cent" in accuracy
    n = torch.tensor(mIoU["confusion, true x predicted"]["CyCADA + feature"])
    assert float(cycada.metrics(n)["mIoU"]) == pytest.approx(mIoU["value"])
    text = (trained / "table.txt").read_text()
    for words in ("source only", "CyCADA + feature", "oracle", "worst classes of CyCADA", "car"):
        assert words in text
    rows = (trained / "pixel/log.csv").read_text().splitlines()
    assert rows[0] == "step,GAN_ST,cyc_s,GAN_TS,cyc_t,D_T,D_S,seconds" and len(rows) == 5


def test_f_t_learns_from_translations_with_the_old_labels(trained, folder, monkeypatch):
    """Stage target sees translated/NAME.png with source_label/NAME.png: Eq. (3.14), first term."""
    args = cycada.get_args(["--data", str(folder), *TINY, "--out", str(trained)])
    finished = cycada.Finished()
    finished.load_state_dict(parts(trained / "last.pt")["finished"])
    pairs = cycada.translated_pairs(cycada.find_pairs(folder, "source", args), finished, args)
    assert [(x.relative_to(trained).as_posix(), y.relative_to(folder).as_posix())
            for x, y in pairs] == [(f"translated/{i}.png", f"source_label/{i}.png")
                                   for i in range(4)]
    G = finished.network("G_ST", args, torch.device("cpu"))
    x = cycada.open_scaled(folder / "source_img/2.png", args.load, "cpu")
    expected = common.to_pil(cycada.translate(G, x, args)[0])
    assert np.array_equal(np.asarray(Image.open(pairs[2][0])), np.asarray(expected))
    a, b = (parts(trained / f"{stage}/last.pt")["f"] for stage in ("source", "target"))
    assert not torch.equal(a["scores.0.weight"], b["scores.0.weight"])


def test_target_labels_reach_the_oracle_and_nothing_else(trained, folder, tmp_path):
    for f in (folder / "target_label").iterdir():
        Image.fromarray(np.zeros((40, 48), dtype=np.uint8)).save(f)
    run("--data", folder, *TINY, *STEPS, "--feature-adaptation", "--out", tmp_path / "other")
    a, b = (parts(r / "last.pt")["finished"]["nets"] for r in (trained, tmp_path / "other"))
    for name in a:
        if name == "f_oracle":
            assert not torch.equal(a[name]["scores.0.weight"], b[name]["scores.0.weight"])
        else:
            assert_same(a[name], b[name])


def interrupted(function, when, train):
    """Ctrl-C in the `when`-th call of one of the script's steps."""
    original, calls = getattr(cycada, function), []

    def step(*args):
        calls.append(1)
        if len(calls) == when and function == "translate":
            raise KeyboardInterrupt  # no training loop is there to catch the signal
        if len(calls) == when:
            os.kill(os.getpid(), 2)
        return original(*args)

    setattr(cycada, function, step)
    try:
        with pytest.raises(KeyboardInterrupt):
            train()
    finally:
        setattr(cycada, function, original)
    assert len(calls) == when


@pytest.mark.parametrize("semantic, stops", [
    ("off", [("translate", 4 * 4 * 2 + 2)]),  # after the grids: while translating the source
    ("gated", [("train_step", 3)]),
    pytest.param("off", [("task_step", 2),    # in stage source
                         ("train_step", 3),
                         ("task_step", 5),    # in stage target
                         ("feature_step", 2)], marks=pytest.mark.slow),
    pytest.param("literal", [("train_step", 2)], marks=pytest.mark.slow)])
def test_resumed_run_is_bit_identical_in_every_stage(folder, tmp_path, semantic, stops):
    flags = ["--data", folder, *TINY, *STEPS, "--semantic", semantic, "--feature-adaptation",
             "--feature-gate", "0"]
    run(*flags, "--out", tmp_path / "whole")
    whole = [parts(f) for f in sorted((tmp_path / "whole").rglob("last.pt"))]
    result = json.loads((tmp_path / "whole/result.json").read_text())
    assert len(whole) == 6
    for n, (function, when) in enumerate(stops):
        out = tmp_path / str(n)
        interrupted(function, when, lambda out=out: run(*flags, "--out", out))
        assert not (out / "result.json").exists()
        run(*flags, "--out", out, "--resume")
        for a, f in zip(whole, sorted(out.rglob("last.pt")), strict=True):
            assert_same(a, parts(f))
        for stage in ("source", "pixel", "target", "feature", "oracle"):
            rows = (out / stage / "log.csv").read_text().split()
            assert [r.split(",")[0] for r in rows[1:]] == [
                str(i + 1) for i in range(4 if stage == "pixel" else 3)]
        again = json.loads((out / "result.json").read_text())
        assert (result["scores"], result["steps"]) == (again["scores"], again["steps"])


def test_stages_one_by_one_equal_all_at_once(trained, folder, tmp_path, capsys):
    flags = ["--data", folder, *TINY, *STEPS, "--out", tmp_path / "steps"]
    run(*flags, "--stages", "source")
    assert "CyCADA" not in (tmp_path / "steps/table.txt").read_text()
    for stages in (["pixel"], ["target"], ["oracle", "feature"]):
        run(*flags, "--stages", *stages, "--resume")
    assert_same(*(parts(r / "last.pt")["finished"]["nets"] for r in (trained, tmp_path / "steps")))
    out = ["--data", folder, *TINY, *STEPS, "--out", tmp_path / "none", "--stages"]
    assert "pixel" in run_fails(capsys, *out, "target")
    assert "f_T is needed" in run_fails(capsys, *out, "feature")
    line = run_fails(capsys, *out, "pixel", "--semantic", "literal")
    assert "f_S is needed" in line and "--stages source" in line


def test_without_labels_there_are_no_scores_or_oracle(folder, tmp_path, capsys):
    for name in ("target_label", "test_label", "test_img"):
        (folder / name).rename(tmp_path / name)
    run("--data", folder, *TINY, *STEPS, "--out", tmp_path / "run")
    assert "no oracle" in capsys.readouterr().out
    assert set(parts(tmp_path / "run/last.pt")["finished"]["nets"]) == {"f_S", "G_ST", "G_TS",
                                                                        "f_T"}
    assert json.loads((tmp_path / "run/result.json").read_text())["scores"] == []


def test_translate_in_all_directions(trained, folder, tmp_path):
    picture = np.random.default_rng(2).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "p.png")
    answers = {}
    for direction in ("StoT", "TtoS", "labels"):
        run("--translate", tmp_path / "p.png", "--weights", trained / "last.pt",
            "--direction", direction, "--out", tmp_path / direction)
        with Image.open(tmp_path / direction / "p.png") as im:
            assert (im.size, im.mode) == ((51, 37), "RGB")
            answers[direction] = np.asarray(im)
    assert not np.array_equal(answers["StoT"], answers["TtoS"])
    assert len(np.unique(answers["labels"].reshape(-1, 3), axis=0)) <= 3


def test_evaluate_prints_the_table_of_the_run(trained, folder, capsys):
    capsys.readouterr()
    run("--evaluate", "--weights", trained / "last.pt", "--data", folder, "--device", "cpu")
    said = capsys.readouterr().out
    assert (trained / "table.txt").read_text() in said and "mIoU: " in said
    for kind in ("img", "label"):
        (folder / f"test_{kind}").rename(folder / f"val_{kind}")
    run("--evaluate", "--weights", trained / "last.pt", "--data", folder, "--device", "cpu",
        "--split", "val")
    assert (trained / "table.txt").read_text() in capsys.readouterr().out


RANK = """
import os, sys, torch, common, cycada
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
    """torchrun: all stages end with the same weights on both, translations and table are there."""
    flags = ["--data", str(folder), *TINY, *STEPS, "--feature-adaptation", "--feature-gate", "0"]
    (tmp_path / "ranks.py").write_text(RANK)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", str(tmp_path / "ranks.py"), *flags, "--out",
                           str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "two/translated").iterdir())) == 4
    assert done.stdout.count("worst classes of CyCADA:") == 1
    seen = set()
    for stage in ("source", "pixel", "target", "oracle", "feature"):
        first, second = (torch.load(tmp_path / f"two/{stage}/rank{rank}.pt") for rank in range(2))
        for name in first:
            for key, value in first[name].items():
                if "running" not in key and key not in ("accuracies", "seen"):
                    assert torch.equal(value, second[name][key]), (stage, name, key)
            seen.add(name)
    assert {"f", "G_ST", "G_TS", "D_S", "D_T", "f_T", "D_feat"} <= seen


def test_user_errors_are_one_line(folder, trained, tmp_path, capsys):
    line = run_fails(capsys, "--data", tmp_path / "nowhere")
    assert "nowhere" in line and "source_img" in line
    (tmp_path / "empty").mkdir()
    line = run_fails(capsys, "--data", tmp_path / "empty", *TINY)
    assert "no source picture" in line and "test_label" in line
    assert "begins with x" in run_fails(capsys, "--data", folder, *TINY, "--source-names", "x",
                                        "--target-names", "y")
    for flags, words in (
            (["--size", 34], "--size 34"), (["--task-size", 99], "--task-size 99"),
            (["--task-steps", 0], "--task-steps 0"), (["--pool", -1], "--pool -1"),
            (["--label-ids", 1, 2], "2 ids for the 3 classes"),
            (["--source-names", "a"], "belong together"),
            (["--source-names", "a", "--target-names", "b", "--split", "val"], "--split val")):
        assert words in run_fails(capsys, "--data", folder, *TINY, *flags)
    picture = folder / "source_img/0.png"
    assert "--weights" in run_fails(capsys, "--translate", picture)
    assert "one folder up" in run_fails(capsys, "--translate", picture, "--weights",
                                        trained / "pixel/last.pt")
    torch.save({"x": 1}, tmp_path / "other.pt")
    assert "not a checkpoint" in run_fails(capsys, "--translate", picture, "--weights",
                                           tmp_path / "other.pt")
    assert "does not fit" in run_fails(capsys, "--translate", picture, "--ngf", 8, "--weights",
                                       trained / "last.pt")
    assert "last.pt" in run_fails(capsys, "--data", folder, *TINY, "--resume", "--out",
                                  tmp_path / "none")


def test_bad_data_is_named_before_training(folder, tmp_path, capsys):
    out = ["--data", folder, *TINY, *STEPS, "--out", tmp_path / "run"]
    label = folder / "source_label/1.png"
    good = label.read_bytes()
    ids = np.array(Image.open(label))
    Image.fromarray(np.where(ids == 2, 9, ids).astype(np.uint8)).save(label)
    line = run_fails(capsys, *out)
    assert "source_label/1.png" in line and "[9]" in line and "--label-ids" in line
    Image.fromarray(ids).convert("RGB").save(label)
    assert "one channel" in run_fails(capsys, *out)
    label.write_bytes(good[:len(good) // 2])
    assert "1.png" in run_fails(capsys, *out)
    label.unlink()
    line = run_fails(capsys, *out)
    assert "source_img/1.png" in line and "no label map" in line
    assert not (tmp_path / "run").exists()


# ---- learning -------------------------------------------------------------------------------


@pytest.mark.slow
def test_learns_the_toy_world(tmp_path, monkeypatch):
    """A fraction of the toy run, at 32x32: CyCADA is well above source only and the trivial
    answer, and the oracle above CyCADA."""
    toy.draw("synthetic2real", tmp_path / "toy", n=60, size=32, n_test=12)
    monkeypatch.setattr(cycada, "data_folder", lambda args: tmp_path / "toy")
    run("--steps", 200, "--task-steps", 60, "--blocks", 2, "--out", tmp_path / "run",
        "--device", "cpu", "--size", 32, "--load", 32, "--task-size", 32, "--task-load", 32,
        "--sample-every", 1000)
    result = json.loads((tmp_path / "run/result.json").read_text())
    scores = {s["name"]: s for s in result["scores"]}
    accuracy = scores["pixel acc."]
    assert accuracy["value"] > accuracy["trivial"]["source only"] + 10
    assert accuracy["value"] > accuracy["trivial"]["most frequent class"] + 10
    assert accuracy["trivial"]["oracle"] > accuracy["value"]
