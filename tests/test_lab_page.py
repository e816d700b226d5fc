"""lab.page: one self-contained file, curves with axes and chance, grids newest first."""
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
from common import UserError
from lab import page


def run_folder(folder, grids, rows):
    (folder / "samples").mkdir(parents=True)
    for step in grids:
        Image.new("RGB", (20, 10), (step, 0, 0)).save(folder / f"samples/step_{step:06d}.png")
    (folder / "log.csv").write_text("step,L_GAN,R1 <i>,seconds\n" + "".join(rows))
    return folder


def test_page_is_one_self_contained_file_of_twelve_grids(tmp_path):
    folder = run_folder(tmp_path / "a <b>", range(0, 36, 2), ["2,0.5,7,0.1\n", "4,0.25,9,0.2\n"])
    text = page.page(folder, 35, {})
    sources = re.findall(r"(?:src|href)\s*=\s*['\"]?([^'\" >]*)", text)
    assert len(sources) == 12 and all(s.startswith("data:image/jpeg;base64,") for s in sources)
    assert "http" not in text and "url(" not in text and "<script" not in text
    assert "<h1>a &lt;b&gt;, step 35</h1>" in text and "<b>" not in text
    assert ">R1 &lt;i&gt;: 9<" in text and "<i>" not in text
    shown = [int(s) for s in re.findall(r"<h3>step_(\d+)</h3>", text)]
    assert shown == sorted(shown, reverse=True) and shown[0] == 34 and shown[-1] == 0


def curve(text, name):
    svg = next(s for s in re.findall("<svg.*?</svg>", text) if f">{name}:" in s)
    points = [tuple(map(float, p.split(","))) for p in
              re.search("points='(.*?)'", svg)[1].split()]
    return svg, points, re.findall(r"<text[^>]*>([^<]*)<", svg)


def test_curves_have_axes(tmp_path):
    folder = run_folder(tmp_path / "run", [], ["20,0.5,7,1\n", "40,0.25,7,2\n", "80,1.5,7,3\n"])
    svg, points, texts = curve(page.page(folder, 80, {}), "L_GAN")
    assert texts == ["L_GAN: 1.5", "1.5", "0.25", "20", "step 80"] and "dash" not in svg
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x0, y1, x2, y2) == (64, 170, 380, 30)  # the ends of the axes
    assert x1 == pytest.approx(64 + 316 / 3, abs=0.1) and y0 == pytest.approx(142, abs=0.1)
    _, flat, texts = curve(page.page(folder, 80, {}), "R1 &lt;i&gt;")
    assert {y for _, y in flat} == {170} and texts[1:3] == ["7", "7"]


@pytest.mark.parametrize("chance, ends, height", [(0.75, ["1", "0.5"], 100), (2, ["2", "0.5"], 30),
                                                  (0, ["1", "0"], 170)])
def test_the_chance_line_is_inside_the_axis(tmp_path, chance, ends, height):
    folder = run_folder(tmp_path / "run", [], ["1,1,7,1\n", "2,0.5,7,2\n"])
    text = page.page(folder, 2, {"L_GAN": chance, "other": 3})
    svg, points, texts = curve(text, "L_GAN")
    assert f"d='M64 {height:.1f}H380' stroke=#c33 stroke-dasharray" in svg
    assert texts[:3] == [f"L_GAN: 0.5 (dashed, by chance: {chance})", *ends]
    assert all(30 <= y <= 170 for _, y in points) and text.count("dasharray") == 1


def test_what_cannot_be_read_is_left_out(tmp_path):
    folder = run_folder(tmp_path / "run", [1, 2, 3], ["1,1,7,1\n", "2,nan,\n", "3,2,8,3\n", "4,"])
    half = (folder / "samples/step_000002.png").read_bytes()[:40]
    (folder / "samples/step_000002.png").write_bytes(half)
    (folder / "samples/step_000009.png").write_text("no picture")
    (folder / "samples/step_<img src=x>.png").write_bytes(
        (folder / "samples/step_000001.png").read_bytes())
    text = page.page(folder, 4, {})
    assert re.findall("<h3>(.*)</h3>", text) == ["step_&lt;img src=x&gt;", "step_000003",
                                                 "step_000001"]
    assert len(curve(text, "L_GAN")[1]) == 2
    (folder / "log.csv").unlink()
    assert "<svg" not in page.page(folder, 4, {})
    (folder / "log.csv").write_text("")
    assert "<svg" not in page.page(folder, 4, {})


def test_the_command_builds_the_page_anew(tmp_path, monkeypatch, capsys):
    folder = run_folder(tmp_path / "run", [5], ["1,1,7,1\n"])
    torch.save({"method": "cut", "step": 7, "chance": {"L_GAN": 0.25}}, folder / "last.pt")
    monkeypatch.setattr(sys, "argv", ["page", str(folder)])
    page.main()
    assert capsys.readouterr().out.strip() == str(folder / "index.html")
    assert (folder / "index.html").read_text() == page.page(folder, 7, {"L_GAN": 0.25})
    torch.save([1], folder / "last.pt")
    with pytest.raises(UserError, match="last.pt: not a checkpoint"):
        page.main()
    (folder / "last.pt").unlink()
    with pytest.raises(UserError, match="last.pt: No such file"):
        page.main()


def test_training_writes_it_beside_the_grids(tmp_path):
    from test_common import tiny_run
    tiny_run(tmp_path / "run", 6, log_every=2, chance={"L_G": 0.5})
    text = (tmp_path / "run/index.html").read_text(encoding="utf-8")
    assert re.findall("<h3>(.*)</h3>", text) == ["step_000004", "step_000000"]
    assert "by chance: 0.5" in curve(text, "L_G")[0]
    state = torch.load(Path(tmp_path, "run/last.pt"), weights_only=True)
    assert state["chance"] == {"L_G": 0.5} and common.load_checkpoint(
        tmp_path / "run/last.pt", "tiny")["step"] == 6
