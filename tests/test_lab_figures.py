"""lab/figures.py: every teaching figure is drawn from a small run, and shows what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_of, noise_folder
from PIL import Image

import common
import cut
import egscit
import segin
import swapae
from lab import figures, metrics, toy
from lab.toy.digits import DigitVGG

CPU = torch.device("cpu")
SHARED = ["--size", "32", "--batch", "2", "--workers", "0", "--device", "cpu"]
CUT = [*SHARED, "--load", "36", "--ngf", "4", "--ndf", "4", "--blocks", "2", "--patches", "16"]
SEGIN = [*SHARED, "--ngf", "4", "--ndf", "4", "--downs", "2", "--vgg", "random", "--match-layer",
         "relu2_1"]
SWAPAE = [*SHARED, "--downs", "2", "--texture", "16", "--widths", "0.125", "0.0625", "0.015625",
          "0.0625", "--patch", "8", "--crops", "3", "--vgg", "random"]
EGSCIT = [*SHARED, "--height", "16", "--ngf", "4", "--ndf", "4", "--blocks", "1", "--downs", "1",
          "--pretrain", "1", "--vgg", "random"]
SPADE = [*SHARED, "--load", "36", "--ngf", "8", "--hidden", "6", "--labels", "4"]


def draw(*flags):
    figures.main([*map(str, flags)])


def columns_of(path, side=32):
    """Number of columns of a grid of small pictures, each magnified four times."""
    return (Image.open(path).width - 4) / (4 * side + 4)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return noise_folder(tmp_path_factory.mktemp("noise") / "data")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The toy sketches and textures, small."""
    root = tmp_path_factory.mktemp("toy")
    for name in ("sketches", "textures"):
        toy.draw(name, root / name, n=5, size=32, n_test=4)
    return root


def trained(script, flags, data, out):
    script.main([*flags, "--data", str(data), "--steps", "1", "--out", str(out)])
    return out / "last.pt"


@pytest.fixture(scope="module")
def swapae_run(drawn, tmp_path_factory):
    return trained(swapae, SWAPAE, drawn / "textures", tmp_path_factory.mktemp("run") / "swapae")


@pytest.fixture(scope="module")
def egscit_run(noise, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(egscit, "VGG", lambda taps, weights, ceil_mode: DigitVGG(4))
        return trained(egscit, EGSCIT, noise, tmp_path_factory.mktemp("run") / "egscit")


# ---- what several figures need ------------------------------------------------------------------


def test_mark_paints_the_pixels_of_a_place():
    picture = torch.zeros(3, 48, 96)
    marked = figures.mark(picture, [(0, 0), (2, 7)], 4, 8)  # cells of 12 x 12 pixels
    assert picture.abs().sum() == 0
    assert marked[:, 6, 6].tolist() == [1, -1, -1] and marked[:, 30, 90].tolist() == [-1, -1, 1]
    assert (marked.abs().sum(0) > 0).sum() == 2 * 3 * 3


def test_as_pictures_enlarges_without_blending():
    p = figures.as_pictures(torch.tensor([[[[0.0, 1.0]]]]), (4, 6))
    assert p.shape == (1, 3, 4, 6)
    assert (p[..., :3] == -1).all() and (p[..., 3:] == 1).all()


def test_principal_axes_come_in_order_and_fill_the_range():
    rng = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 400, generator=rng)
    samples = 5 * a[:, None] * torch.eye(20)[3] + b[:, None] * torch.eye(20)[7] + 2
    places = figures.principal(samples, 2)
    assert places.amin(0).tolist() == [0, 0]
    assert places.amax(0).tolist() == pytest.approx([1, 1])
    for axis, values in zip(places.t(), (a, b), strict=True):
        assert abs(float(torch.corrcoef(torch.stack([axis, values]))[0, 1])) > 0.99
    assert torch.equal(places, figures.principal(samples, 2))  # no chance in it
    assert torch.isfinite(figures.principal(torch.ones(5, 4), 2)).all()


# ---- the figures --------------------------------------------------------------------------------


def test_every_figure_is_documented_and_tested():
    text = "".join(f.read_text(encoding="utf-8") for f in Path(__file__).parent.glob("test_*.py"))
    for script, figure in figures.FIGURES:
        assert f"    {script} {figure} " in figures.__doc__
        assert f'"{figure}"' in text


def test_cut_similarity(noise, tmp_path, capsys):
    weights = trained(cut, CUT, noise, tmp_path / "run")
    draw("cut", "similarity", "--weights", weights)
    path = tmp_path / "run/similarity.png"
    assert f"wrote {path}" in capsys.readouterr().out
    im = Image.open(path)
    assert im.width == 6 * (2 * 43 + 4) + 4 and np.asarray(im).std() > 10  # --load 36, shown twice
    colours = {colour for _, colour in im.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours  # the queries


def test_cut_coats(tmp_path, monkeypatch):
    toy.draw("horse2zebra", tmp_path / "data", n=2, size=32, n_test=3)
    monkeypatch.setattr(cut, "data_folder", lambda args: tmp_path / "data")
    weights, texts = trained(cut, CUT, "toy", tmp_path / "run"), []
    text = figures.ImageDraw.ImageDraw.text
    monkeypatch.setattr(figures.ImageDraw.ImageDraw, "text", lambda self, xy, words, *more: (
        texts.append(words), text(self, xy, words, *more)))
    draw("cut", "coats", "--weights", weights)
    assert Image.open(tmp_path / "run/coats.png").width == 3 * 180
    differences = [int(t.split(" by ")[1].rstrip("%")) for t in texts]
    assert [t[0] for t in texts] == ["x", "G", "y"]
    assert differences[2] == 0 < differences[0] <= 100 and 0 < differences[1] <= 100


def test_segin_match(drawn, tmp_path, capsys):
    weights, data = trained(segin, SEGIN, drawn / "sketches", tmp_path / "run"), drawn / "sketches"
    draw("segin", "match", "--data", data, *SEGIN, "--out", tmp_path)  # without training
    draw("segin", "match", "--data", data, "--weights", weights)
    assert columns_of(tmp_path / "match.png") == 8
    assert columns_of(tmp_path / "run/match.png") == 9
    said = capsys.readouterr().out
    assert "match: " in said and "N: " in said and "32x32 picture on cpu" in said
    places = Image.open(tmp_path / "match.png").crop((4 + 2 * 132, 20, 4 + 2 * 132 + 128, 148))
    assert len(places.getcolors()) == 16 * 16  # each place of r has a colour of its own
    draw("segin", "references", "--data", data, "--weights", weights)
    assert columns_of(tmp_path / "run/references.png") == 2 + 4  # there are four test pictures


@pytest.mark.parametrize("name, columns", [("grid", 7), ("pca", 7), ("interpolate", 7),
                                           ("domains", 5), ("corruptions", 5)])
def test_swapae(swapae_run, drawn, noise, tmp_path, capsys, monkeypatch, name, columns):
    if name == "interpolate":  # the distances themselves are shown by corruptions
        monkeypatch.setattr(metrics, "style_and_structure",
                            lambda vgg, device: [lambda a, b: 0.0] * 2)
    data, painted, paint = noise if name == "domains" else drawn / "textures", [], swapae.paint
    monkeypatch.setattr(swapae, "paint", lambda *given: painted.append(given[2]) or paint(*given))
    draw("swapae", name, "--weights", swapae_run, "--data", data, "--out", tmp_path)
    assert columns_of(tmp_path / f"{name}.png") == columns  # grid: three and four test pictures
    said = capsys.readouterr().out
    if name in ("pca", "domains"):  # one code a column, each another
        assert len(painted) == columns - 1 and " test pictures" in said
        assert len({tuple(z_t.flatten().tolist()) for z_t in painted}) == len(painted)
    assert ("alpha 0.5: " in said) == (name == "interpolate")
    assert ("hybrid: " in said and "embedding: " in said) == (name == "grid")
    assert ("cosine of the first axis" in said) == (name == "domains")
    assert ("noise: " in said) == (name == "corruptions")
    if name == "corruptions":
        sifid, structure = said.split("original: ")[1].split("\n")[0].split()
        assert float(sifid) < 1e-3 and float(structure) < 1e-5


def test_corruptions_move_the_distances_as_in_fig_4_19():
    """Shift and rotation move self-similarity more than blur and noise do; SIFID the reverse."""
    scenes = [toy.render(toy.sample_scene(np.random.default_rng([5, i])), 96) for i in range(3)]
    x = torch.stack([common.to_tensor(scene) for scene in scenes])
    inception = metrics.sifid_network("random", CPU)
    vgg = metrics.self_similarity_network("random", CPU)
    style, structure = {}, {}
    for name, change in figures.CORRUPTIONS.items():
        y = change(x)
        assert y.shape == x.shape and float(y.abs().max()) <= 1.001
        style[name] = metrics.sifid(inception, x, y)
        structure[name] = metrics.self_similarity(vgg, x, y)
    assert structure["original"] < 1e-6 and style["original"] < 1e-4
    assert min(structure[k] for k in ("shift", "rotation")) > max(
        structure[k] for k in ("blur", "noise"))
    assert min(style[k] for k in ("blur", "noise")) > max(style[k] for k in ("shift", "rotation"))


@pytest.mark.parametrize("name, files", [("masks", ["masks_AB.png", "masks_BA.png"]),
                                         ("embedding", ["embedding.png"])])
def test_egscit(egscit_run, noise, tmp_path, name, files):
    draw("egscit", name, "--weights", egscit_run, "--data", noise, "--out", tmp_path)
    for file in files:
        with Image.open(tmp_path / file) as im:
            assert im.width > 200 and len(im.getcolors(1 << 20)) > 10


def test_spade_uniform(tmp_path, capsys):
    """Fig. 2.3: convolution and then normalisation forgets the label; SPADE keeps it."""
    draw("spade", "uniform", "--data", ".", *SPADE, "--out", tmp_path)
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if "grey" in line)
    spread = {name: float(text.split()[0]) for name, text in said.items()}
    assert max(spread["hd"], spread["hd-concat"]) < 0.01
    assert min(spread["spade"], spread["hd-spade"]) > 5
    assert columns_of(tmp_path / "uniform.png") == 1 + len(spread)


# ---- mistakes -----------------------------------------------------------------------------------


def test_mistakes_are_one_line(swapae_run, drawn, tmp_path, capsys):
    line = error_of(capsys, figures.main, "cut", "match")
    assert "cut match: no such figure" in line and "segin match" in line
    for script, figure in figures.FIGURES:
        if (script, figure) not in {("spade", "uniform"), ("segin", "match")}:
            line = error_of(capsys, figures.main, script, figure, "--data", drawn / "textures",
                            "--device", "cpu")
            assert "--weights FILE" in line
    assert "written by swapae.py" in error_of(capsys, figures.main, "cut", "similarity",
                                              "--weights", swapae_run)
    (tmp_path / "file").write_text("")
    assert "cannot write there" in error_of(
        capsys, figures.main, "swapae", "grid", "--weights", swapae_run, "--data",
        drawn / "textures", "--out", tmp_path / "file")
