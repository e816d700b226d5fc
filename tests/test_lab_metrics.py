"""lab/metrics.py: each score against a plain transcription, and what happens without weights."""

import urllib.error

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import common
from common import UserError
from lab import metrics, toy

CPU = torch.device("cpu")
INSTALL = "pip install -r lab/requirements.txt"


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def uniform(*shape, seed=0):
    """Pictures in [-1, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Marker:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder of weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    return tmp_path / "torch/hub/checkpoints"


@pytest.fixture
def offline(monkeypatch):
    def fails(*_, **__):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)


def file_of(weights):
    return weights.url.rpartition("/")[2]


# ---- FID ----------------------------------------------------------------------------------------


def frechet(a, b):
    """Frechet distance of two Gaussians that are fitted to rows of features."""
    def statistics(f):
        return f.mean(0), np.cov(f, rowvar=False)
    (m, s), (n, t) = statistics(a), statistics(b)
    values, vectors = np.linalg.eigh(s)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    return ((m - n) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * cross


class Corners(nn.Module):
    """Four pixels of an 8-bit picture, in [0, 1], in place of the Inception features."""

    num_features = 4

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 299, 299)
        return x[:, :, :2, :2].flatten(1)[:, [0, 3, 5, 9]].double() / 255


@pytest.fixture
def corners(monkeypatch, hub):
    pytest.importorskip("torch_fidelity", reason=INSTALL)
    module = pytest.importorskip("torchmetrics.image.fid", reason=INSTALL)
    real = module.FrechetInceptionDistance
    torch.save({}, hub / metrics.FID_WEIGHTS.rpartition("/")[2])
    monkeypatch.setattr(module, "FrechetInceptionDistance",
                        lambda feature_extractor_weights_path: real(feature=Corners()))


def test_fid_is_the_frechet_distance_of_the_8_bit_pictures(corners):
    fakes, reals = (noise(n, 3, 3, 3, seed=n) for n in (40, 30))
    fakes, reals = (F.interpolate(x.float(), (299, 299)) for x in (fakes / 2, reals / 4 + 0.3))
    value = metrics.fid(fakes.split(7), iter(reals.split(1)), CPU)

    def features(x):  # the corner of a picture of 3x3 blocks is one colour, beyond [-1, 1] clipped
        return ((x[:, [0, 0, 1, 2], 0, 0].clamp(-1, 1) + 1) * 127.5).round().double().numpy() / 255
    expected = frechet(features(fakes), features(reals))
    assert expected > 0.05 and value == pytest.approx(expected, rel=1e-4)


def test_fid_sees_large_pictures_sampled_as_its_authors_do(corners, monkeypatch):
    """Bilinear without antialiasing: of 897 pixels every third, in the middle of three."""
    seen = []
    monkeypatch.setattr(Corners, "forward",
                        lambda self, x: seen.append(x) or torch.eye(4)[:len(x)].double())
    x = uniform(2, 3, 897, 897)
    metrics.fid([x], [x], CPU)
    assert torch.equal(seen[0], metrics.eight_bit(x[:, :, 1::3, 1::3])) and len(seen) == 2


@pytest.mark.parametrize("fakes, reals", [(1, 5), (5, 1), (0, 0)])
def test_fid_needs_two_pictures_on_each_side(corners, fakes, reals):
    with pytest.raises(UserError, match=f"found {fakes} generated and {reals} real"):
        metrics.fid([uniform(1, 3, 8, 8)] * fakes, [uniform(1, 3, 8, 8)] * reals, CPU)


def test_fid_weights(tmp_path, hub, monkeypatch):
    pytest.importorskip("torch_fidelity", reason=INSTALL)
    pytest.importorskip("torchmetrics.image.fid", reason=INSTALL)
    with pytest.raises(UserError, match=r"absent\.pth: No such file"):
        metrics.fid([], [], CPU, str(tmp_path / "absent.pth"))
    torch.save(Marker(tmp_path / "touched"), tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: .*safely"):
        metrics.fid([], [], CPU, str(tmp_path / "evil.pth"))
    kept = hub / metrics.FID_WEIGHTS.rpartition("/")[2]
    (tmp_path / "evil.pth").rename(kept)  # fetched by hand
    with pytest.raises(UserError, match="safely"):
        metrics.fid([], [], CPU)
    assert not (tmp_path / "touched").exists()
    kept.unlink()

    def fetch(address, path):
        assert address == metrics.FID_WEIGHTS
        torch.save(Marker(tmp_path / "touched"), path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(UserError, match="safely"):
        metrics.fid([], [], CPU)
    assert not (tmp_path / "touched").exists()
    kept.unlink()

    def fails(*_, **__):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with pytest.raises(UserError, match="no route to host") as caught:
        metrics.fid([], [], CPU)
    assert metrics.FID_WEIGHTS in str(caught.value) and "--fid-weights" in str(caught.value)


def test_missing_packages_are_one_line():
    with pytest.raises(UserError, match="FID needs no-such-package: pip install -r lab/requ"):
        metrics.needed("no_such_package.part", "FID")


# ---- LPIPS, and SEGIN's Tab. I -------------------------------------------------------------------


def test_feature_distance_is_lpips_without_weights():
    vgg = common.VGG(["relu1_1", "relu2_1"], "random")
    a, b = uniform(2, 3, 8, 8), uniform(2, 3, 8, 8, seed=1)
    total = 0.0
    for name in ("relu1_1", "relu2_1"):
        f, g = (vgg(picture)[name].permute(0, 2, 3, 1).flatten(1, 2) for picture in (a, b))
        for n in range(2):
            total += np.mean([float((u / u.norm() - v / v.norm()).square().sum())
                              for u, v in zip(f[n], g[n], strict=True)]) / 2
    assert metrics.feature_distance(vgg, a, b) == pytest.approx(total, rel=1e-4)
    assert metrics.feature_distance(vgg, a, a) == 0


def test_with_references_counts_pairs_as_the_paper_does(monkeypatch):
    """100 inputs x 19 pairs, 200 x 10 references, every photo as its own reference."""
    n, asked = 210, []
    photos = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 2, 2)

    def out(x, r):
        asked.append((int(x[0, 0, 0, 0]), int(r[0, 0, 0, 0])))
        return 1000 * x + r

    monkeypatch.setattr(metrics, "fid", lambda fakes, reals, *_: len(list(fakes)) - len(reals))
    test = {"x": photos, "y": photos, "r": photos.roll(-1, 0)}
    scores = metrics.with_references(out, test, "LPIPS", lambda a, b: float((a - b).abs().mean()))
    assert [s["name"] for s in scores] == [
        "FID (210 outputs, 210 photos, 299x299)", "LPIPS, diversity (1900 pairs)",
        "LPIPS (ref) (2000 pairs)", "LPIPS (gt) (210 pairs)"]
    assert asked[:n] == [(i, (i + 1) % n) for i in range(n)]
    diversity, references, own = (asked[n:n + 2000], asked[n + 2000:n + 4000], asked[n + 4000:])
    assert all(len({r for x, r in diversity if x == i} - {i}) == 20 for i in range(100))
    assert all(len({r for x, r in references if x == i} - {i}) == 10 for i in range(200))
    assert own == [(i, i) for i in range(n)]
    # two outputs for one input differ as their references do; LPIPS(gt) is |1000 i + i - i|
    assert scores[1]["value"] == pytest.approx(scores[1]["trivial"]["real photos"])
    assert scores[3]["value"] == pytest.approx(1000 * (n - 1) / 2)


def test_fid_asks_for_its_weights_before_any_picture_is_translated(tmp_path):
    test, asked = dict.fromkeys("xyr", uniform(3, 3, 8, 8)), []
    with pytest.raises(UserError, match=r"absent\.pth: No such file|FID needs"):
        metrics.with_references(lambda *xr: asked.append(xr), test, "LPIPS",
                                lambda *pair: asked.append(pair), tmp_path / "absent.pth")
    assert not asked


def test_lpips_reads_alexnets_weights_and_pictures_in_minus_one_to_one(hub, tmp_path, offline):
    pytest.importorskip("torchmetrics", reason=INSTALL)
    with pytest.raises(UserError, match="no route to host.*; --lpips random does"):
        metrics.lpips(CPU, "--lpips random does")
    path = hub / file_of(metrics.AlexNet_Weights.IMAGENET1K_V1)
    torch.save(Marker(tmp_path / "touched"), path)
    with pytest.raises(UserError, match="alexnet.*safely"):
        metrics.lpips(CPU, "or so")
    assert not (tmp_path / "touched").exists()
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    distance = metrics.lpips(CPU, "or so")
    a, b = uniform(2, 1, 3, 64, 64)
    first = distance(a, b)
    assert first > 0 and distance(a, a) == pytest.approx(0, abs=1e-7)
    assert distance(a, b) == pytest.approx(first)  # each call alone, no running mean
    assert distance(torch.cat([a, a]), torch.cat([a, b])) == pytest.approx(first / 2, rel=1e-4)


# ---- SSIM, SIFID, self-similarity ---------------------------------------------------------------


def naive_ssim(a, b):
    """scikit-image's defaults, as a loop: 7x7 windows, sample covariances, RGB mean."""
    a, b, found = a.astype(float), b.astype(float), []
    C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    for k in range(3):
        for y in range(a.shape[1] - 6):
            for x in range(a.shape[2] - 6):
                p, q = (v[k, y:y + 7, x:x + 7].flatten() for v in (a, b))
                (v_p, cov), (_, v_q) = np.cov(p, q)
                found.append((2 * p.mean() * q.mean() + C1) * (2 * cov + C2)
                             / ((p.mean() ** 2 + q.mean() ** 2 + C1) * (v_p + v_q + C2)))
    return np.mean(found)


def test_ssim_against_a_loop():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 3, 12, 10), dtype=np.uint8)
    b = (a * 0.7 + rng.integers(0, 60, a.shape)).astype(np.uint8)
    a[0, 1], b[0, 1] = 0, 255  # constant channels, as digits have
    x, y = (torch.from_numpy(v).float() / 127.5 - 1 for v in (a, b))
    assert metrics.ssim(x, y).tolist() == pytest.approx([naive_ssim(*p) for p in
                                                         zip(a, b, strict=True)])
    assert metrics.ssim(x, x).tolist() == pytest.approx([1, 1])


def test_sifid_is_the_frechet_distance_of_places():
    class Few(nn.Module):
        def forward(self, x):
            return x[:, :, ::2, ::2]

    a, b = uniform(2, 3, 16, 16).double(), uniform(2, 3, 16, 16, seed=1).double() * 0.5 + 0.3
    truth = np.mean([frechet(*(p[:, ::2, ::2].flatten(1).t().numpy() for p in pair))
                     for pair in zip(a, b, strict=True)])
    assert metrics.sifid(Few(), a, b) == pytest.approx(truth, rel=1e-6)
    net = metrics.sifid_network("random", CPU)
    x = uniform(1, 3, 64, 64)
    assert net(x).shape[1] == 192 and abs(metrics.sifid(net, x, x)) < 1e-6
    assert not any(p.requires_grad for p in net.parameters()) and not net.training


def test_self_similarity_is_the_text_transcribed():
    vgg = metrics.self_similarity_network("random", CPU)
    a, b = (uniform(1, 3, 48, 48, seed=i) for i in (0, 1))
    vectors = []
    for x in (a, b):
        maps, y = [x], ((x + 1) / 2 - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
                        ) / torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        for i, layer in enumerate(vgg[:30]):
            y = layer(y.clone())
            if i in (1, 3, 6, 8, 11, 13, 15, 22, 29):
                maps.append(y)
        vectors.append(torch.cat([F.interpolate(f, (4, 4), mode="bilinear") for f in maps],
                                 dim=1)[0].flatten(1).t().double())
    D = []
    for v in vectors:
        d = torch.tensor([[1 - float(F.cosine_similarity(p, q, dim=0)) for q in v] for p in v])
        D.append(d / d.sum(0, keepdim=True))
    truth = float((D[0] - D[1]).abs().mean() * 16)
    assert metrics.self_similarity(vgg, a, b, side=4) == pytest.approx(truth, rel=1e-3)
    assert metrics.self_similarity(vgg, a, a, side=4) < 1e-6


def test_networks_are_torchvisions_first_layers(hub, tmp_path, offline):
    """Filled from torchvision's files they compute what torchvision's networks compute."""
    torch.manual_seed(0)
    theirs = torchvision.models.inception_v3(weights=None, init_weights=False,
                                             transform_input=False).eval()
    torch.save(theirs.state_dict(), hub / file_of(metrics.Inception_V3_Weights.IMAGENET1K_V1))
    net, x = metrics.sifid_network("imagenet", CPU), uniform(1, 3, 80, 80)
    y = x
    for name, layer in theirs.named_children():
        if name == "maxpool2":
            break
        y = layer(y)
    torch.testing.assert_close(net(x), y)
    theirs = torchvision.models.vgg16(weights=None, init_weights=False).eval().features[:30]
    state = {f"features.{k}": v for k, v in theirs.state_dict().items()}
    torch.save(state, tmp_path / "vgg16.pth")
    vgg = metrics.self_similarity_network(str(tmp_path / "vgg16.pth"), CPU)
    torch.testing.assert_close(vgg[:30](x), theirs(x.clone()))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: not .*VGG16"):
        metrics.self_similarity_network(str(tmp_path / "other.pth"), CPU)
    with pytest.raises(UserError, match="cannot download .*vgg16.*--vgg random"):
        metrics.self_similarity_network("imagenet", CPU)


# ---- Inception Score ----------------------------------------------------------------------------


def test_inception_scores_against_a_loop():
    p = torch.softmax(noise(3, 4, 2), 2)

    def divergence(a, b):
        return sum(float(u) * np.log(float(u) / float(v)) for u, v in zip(a, b, strict=True))

    IS = np.mean([divergence(p[i, j], p.mean((0, 1))) for i in range(3) for j in range(4)])
    CIS = np.mean([divergence(p[i, j], p[i].mean(0)) for i in range(3) for j in range(4)])
    scores = metrics.inception_scores(p)
    assert scores["IS"] == pytest.approx(np.exp(IS)) and scores["CIS"] == pytest.approx(np.exp(CIS))
    sure = torch.eye(2)[None].repeat(5, 1, 1)  # both domains from every input
    assert metrics.inception_scores(sure) == {"IS": pytest.approx(2), "CIS": pytest.approx(2)}


def two_domains(folder):
    files = []
    for i in range(2):
        (folder / "AB"[i]).mkdir(parents=True)
        for n in range(3):
            picture = uniform(3, 24, 30, seed=n) * 0.3 + (0.5, -0.5)[i]
            common.to_pil(picture).save(folder / "AB"[i] / f"{n}.png")
        files.append(common.list_pictures(folder / "AB"[i]))
    return files


def test_inception_is_used_when_its_weights_are_at_hand(hub, tmp_path, monkeypatch):
    seen = []

    class Inception(nn.Module):
        def __init__(self, init_weights, transform_input):
            super().__init__()
            assert not transform_input  # pictures are in [-1, 1] already, see below
            self.first, self.fc = nn.Linear(3, 2048), nn.Linear(2048, 1000)

        def forward(self, x):
            seen.append(x.detach())
            return self.fc(self.first(x.mean((2, 3))))

    monkeypatch.setattr(metrics, "inception_v3", Inception)
    weights = metrics.Inception_V3_Weights.IMAGENET1K_V1
    torch.save(Inception(False, False).state_dict(), hub / file_of(weights))
    before = torch.random.get_rng_state()
    classify, name = metrics.domain_classifier(two_domains(tmp_path), CPU, 0, steps=2)
    assert name.startswith("Inception V3") and torch.equal(before, torch.random.get_rng_state())
    assert seen[0].shape == (16, 3, 299, 299)
    assert seen[0][::2].mean() > 0.4 and seen[0][1::2].mean() < -0.4  # the two domains, as they are
    x = uniform(2, 3, 40, 40)
    assert torch.allclose(classify(x).sum(1), torch.ones(2)) and classify(x).shape == (2, 2)
    torch.save(Marker(tmp_path / "touched"), hub / file_of(weights))
    with pytest.raises(UserError, match="inception.*safely"):
        metrics.domain_classifier(two_domains(tmp_path / "again"), CPU, 0, steps=1)
    assert not (tmp_path / "touched").exists()


def test_torchvisions_inception_takes_what_we_feed_it():
    """transform_input is made for ImageNet's mean and deviation, and leads from there to ours."""
    with torch.device("meta"):
        net = torchvision.models.inception_v3(weights=None, init_weights=False,
                                              transform_input=True)
    x = uniform(2, 3, 5, 5)
    normalise = metrics.Inception_V3_Weights.IMAGENET1K_V1.transforms()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (normalise.mean, normalise.std))
    torch.testing.assert_close(net._transform_input(((x + 1) / 2 - mean) / std), x)


def test_small_classifier_tells_day_from_night(hub, tmp_path):
    toy.draw("day2night", tmp_path / "d2n", n=8, size=64, n_test=8)
    files = [common.find_split(tmp_path / "d2n", "train", side) for side in "AB"]
    classify, name = metrics.domain_classifier(files, CPU, 0, steps=40)
    assert "SMALL" in name
    for i, side in enumerate("AB"):
        files = common.find_split(tmp_path / "d2n", "test", side)
        x = torch.stack([common.to_tensor(common.open_rgb(f)) for f in files])
        assert (classify(x)[:, i] > 0.5).all()


def test_references_are_spread_over_the_test_set(monkeypatch):
    """Neighbours are often frames of one video, or colours of one shoe."""
    n, asked = 41, {}
    photos = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 2, 2)

    def out(x, r):
        asked.setdefault(int(x[0, 0, 0, 0]), []).append(int(r[0, 0, 0, 0]))
        return x

    monkeypatch.setattr(metrics, "fid", lambda outputs, *_: 0.0 * len([*outputs]))
    metrics.with_references(out, {"x": photos, "y": photos, "r": photos.roll(-1, 0)}, "LPIPS",
                            lambda a, b: 0.0)
    own, *rest = asked[0]
    spread = [1 + 2 * k for k in range(20)] + [1 + 4 * k for k in range(10)]
    assert own == 1 and rest == [*spread, 0]
