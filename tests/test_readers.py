"""What reads files of others is given everything but: a result, or a `UserError` of one line."""

import io
import json
from pathlib import Path

import pytest
import test_common as t
import torch
import torch.nn as nn
from PIL import Image

import common
import init
from common import UserError

hypothesis = pytest.importorskip("hypothesis", reason="pip install -r lab/requirements.txt")
given, st = hypothesis.given, hypothesis.strategies
pytestmark = pytest.mark.slow
settings = hypothesis.settings(max_examples=150, deadline=None, suppress_health_check=[
    hypothesis.HealthCheck.function_scoped_fixture], derandomize=True)


def read(function):
    """What a reader gives, or None with a message of one line."""
    try:
        return function()
    except UserError as error:
        assert len(str(error).splitlines()) == 1


def changed(raw, edits):
    """Bytes with some of them replaced, {share of the length: new byte}, and perhaps cut."""
    raw = bytearray(raw)
    for place, byte in edits.items():
        raw[int(place * (len(raw) - 1))] = byte
    return bytes(raw)


EDITS = st.dictionaries(st.floats(0, 1), st.integers(0, 255), max_size=12)
ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                       st.text(max_size=5), inner, max_size=3), max_leaves=8)


@settings
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]), edits=EDITS,
       end=st.floats(0.1, 1))
def test_pictures(tmp_path, kind, edits, end):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(file, kind)
    raw = changed(file.getvalue(), edits)
    (tmp_path / "x").write_bytes(raw[:int(end * len(raw))])
    picture = read(lambda: common.open_rgb(tmp_path / "x"))
    assert picture is None or picture.mode == "RGB"
    ids = read(lambda: common.open_ids(tmp_path / "x"))
    assert ids is None or ids.mode in "LI"


BOX = st.lists(st.integers(-2, 9), max_size=5) | ANY


@settings
@given(table=ANY | st.fixed_dictionaries({"a.png": ANY}) | st.fixed_dictionaries(
    {"a.png": st.lists(st.fixed_dictionaries({"box": BOX}), max_size=3)}))
def test_boxes(tmp_path, table):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "boxes.json").write_text(json.dumps(table))
    boxes = read(lambda: init.read_boxes(tmp_path, [tmp_path / "a.png"]))
    for x0, y0, x1, y1 in (boxes or {}).get(tmp_path / "a.png", ()):
        assert 0 <= x0 < x1 <= 8 and 0 <= y0 < y1 <= 8


@settings
@given(edits=EDITS)
def test_checkpoints_with_changed_bytes(tmp_path, edits):
    net = nn.Linear(2, 3)
    torch.save({"method": "m", "config": {"lr": 0.1}, "step": 3, "seconds": 1.0, "sums": {},
                "parts": {"net": net.state_dict()}}, path := tmp_path / "x.pt")
    Path(path).write_bytes(changed(path.read_bytes(), edits))
    state = read(lambda: common.load_checkpoint(path, "m"))
    if state:
        read(lambda: common.load_parts({"net": net}, state["parts"], path))
        assert all(p.isfinite().all() for p in net.parameters())


@hypothesis.settings(settings, max_examples=40)
@given(field=st.sampled_from(["config", "parts", "step", "seconds", "sums", "others", "method"]),
       value=ANY | st.fixed_dictionaries({"G": ANY, "opt_G": ANY}))
def test_runs_with_changed_fields(tmp_path_factory, field, value):
    folder = tmp_path_factory.mktemp("run")
    t.tiny_run(folder / "r", 2, log_every=1)
    torch.save(t.states(folder / "r") | {field: value}, folder / "r/last.pt")
    read(lambda: t.tiny_run(folder / "r", 3, resume=True))
