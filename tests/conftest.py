"""Every test starts from the same random numbers, in whatever order and company it runs."""

import functools
import random
import signal

import numpy as np
import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored,
if hasattr(signal, "SIGHUP"):                             # jobs under nohup with this one
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def compiled_quickly(request, monkeypatch):
    """Tests of --compile count graphs; what C++ compilers make of them takes minutes a script."""
    if "compile" in request.node.name:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
