"""Needs a GPU, and is skipped elsewhere: every script's step there is the CPU's, in bfloat16 too.

    pytest tests/test_gpu.py -rP      # prints how far losses and gradients are apart
"""

import pytest
import torch

from lab import bench

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCRIPTS = [*bench.ROWS]
SIZE = {"sincut": [], "init": ["--size", "128", "--batch", "1"]}
# G's first batch norm, over 2 x 4 x 4 places, multiplies rounding: in float32 the gradients of `fc`
# are 0.0034 of their length away from float64's on the CPU, and cosines on an H100 were 0.969
DOUBLE = {"spade"}
# the code's N(0, 0.02^2) makes pictures of one grey (deviation 0.0006), which D's instance norm
# divides by theirs: what bfloat16 rounds off then turns the gradients (cosines 0.52 to 0.98)
INIT = {"egscit": ["--init", "xavier"]}
NOISE = {"sincut", "init", "egscit", "swapae"}  # draw noise, compiled code other noise


def doubled(step, monkeypatch):
    """The same step in float64."""
    for net in vars(step.nets).values():
        if isinstance(net, torch.nn.Module):
            net.double()
    step.batch = [t.double() if t.is_floating_point() else t for t in step.batch]
    monkeypatch.setattr(step.module, "full", lambda x: x)
    return step


def first_step(script, device, *flags, change=lambda step: step):
    """(losses by name, {network: its gradient as a float64 vector}) of a step from seed 0."""
    name, own = bench.ROWS[script][-1 if script in ("init", "spade") else 0]
    size = SIZE.get(script, ["--size", "128", "--batch", "2"])
    torch.manual_seed(0)
    step = change(bench.Step(script, [*own, *size, "--data", ".", "--device", device, *flags]))
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_step_is_that_of_the_CPU(script, exact, monkeypatch):
    change = {"change": lambda step: doubled(step, monkeypatch)} if script in DOUBLE else {}
    apart, cosines = compare(script, *(first_step(script, device, **change)
                                       for device in ("cpu", "cuda")))
    assert apart < 1e-3 and min(cosines.values()) > 0.999


@pytest.mark.parametrize("script", SCRIPTS)
def test_amp_is_near_fp32(script):
    flags = INIT.get(script, [])
    apart, cosines = compare(script, first_step(script, "cuda", *flags),
                             first_step(script, "cuda", "--amp", *flags))
    assert apart < 0.05 and min(cosines.values()) > 0.9


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s not in NOISE])
def test_inductor_changes_nothing(script, exact):
    """--compile, with the backend that users get."""
    apart, cosines = compare(script, first_step(script, "cuda"),
                             first_step(script, "cuda", "--compile"))
    assert apart < 1e-3 and min(cosines.values()) > 0.999
