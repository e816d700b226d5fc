"""Needs a GPU, and is skipped elsewhere: every script's step there is the CPU's, in bfloat16 too.

    pytest tests/test_gpu.py -rP      # prints how far losses and gradients are apart
"""

import pytest
import torch

from lab import bench

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCRIPTS = [*bench.ROWS]
SIZE = {"sincut": [], "init": ["--size", "128", "--batch", "1"]}
NOISE = {"sincut", "init", "egscit", "swapae"}  # draw noise, compiled code other noise


def first_step(script, device, *flags):
    """(losses by name, {network: its gradient as a float64 vector}) of a step from seed 0."""
    name, own = bench.ROWS[script][-1 if script in ("init", "spade") else 0]
    size = SIZE.get(script, ["--size", "128", "--batch", "2"])
    torch.manual_seed(0)
    step = bench.Step(script, [*own, *size, "--data", ".", "--device", device, *flags])
    torch.manual_seed(1)
    losses = {k: float(v) for k, v in step.run().items()}
    grads = {}
    for k, net in vars(step.nets).items():
        if isinstance(net, torch.nn.Module):
            found = [p.grad.flatten().double().cpu() for p in net.parameters()
                     if p.grad is not None]
            if found:
                grads[k] = torch.cat(found)
    return losses, grads


def compare(script, a, b):
    """Print and return (largest difference of losses in shares of 1 + |loss|, cosines of
    gradients by network) of two first steps."""
    (losses, grads), (others, other_grads) = a, b
    assert losses.keys() == others.keys() and grads.keys() == other_grads.keys() and grads
    apart = {k: abs(losses[k] - others[k]) / (1 + abs(losses[k])) for k in losses}
    cosines = {k: float(torch.cosine_similarity(grads[k], other_grads[k], dim=0)) for k in grads}
    worst = max(apart, key=apart.get)
    print(f"{script}: {worst} {losses[worst]:.5g} against {others[worst]:.5g}; cosines "
          + ", ".join(f"{k} {v:.5f}" for k, v in cosines.items()))
    return apart[worst], cosines


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
    """Noise drawn where pictures are would differ by device and type of number."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape).to(x))


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def known(script, why):
    """Seen on an H100 with torch 2.11, and not explained: the test runs, and may fail."""
    return pytest.param(script, marks=pytest.mark.xfail(reason=why))


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "spade"] + [
    known("spade", "cosine 0.969 of G's gradients, although all losses agree to 1e-5")])
def test_step_is_that_of_the_CPU(script, exact):
    apart, cosines = compare(script, first_step(script, "cpu"), first_step(script, "cuda"))
    assert apart < 1e-3 and min(cosines.values()) > 0.999


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "egscit"] + [
    known("egscit", "cosines 0.69 to 0.84 of E's gradients, GAN_A off by 1.9 %")])
def test_amp_is_near_fp32(script):
    apart, cosines = compare(script, first_step(script, "cuda"),
                             first_step(script, "cuda", "--amp"))
    assert apart < 0.05 and min(cosines.values()) > 0.9


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s not in NOISE])
def test_inductor_changes_nothing(script, exact):
    """--compile, with the backend that users get."""
    apart, cosines = compare(script, first_step(script, "cuda"),
                             first_step(script, "cuda", "--compile"))
    assert apart < 1e-3 and min(cosines.values()) > 0.999
