"""Scores of pictures that need no method: FID, LPIPS, SSIM, SIFID, self-similarity, IS and CIS.

    fid(fakes, reals, device, weights=None)               iterables of pictures -> float
    lpips(device, otherwise)                              -> distance(a, b) -> float
    feature_distance(vgg, a, b)                           LPIPS without learned weights -> float
    ssim(a, b)                                            -> (B,) float64, one per pair
    sifid_network(weights, device)                        -> the network of
    sifid(inception, a, b)                                -> float
    self_similarity_network(weights, device)              -> the network of
    self_similarity(vgg, a, b, side=32)                   -> float
    swap_scores(x, x2, x_rec, x_hyb, vgg, name, device)   -> scores of a Swapping Autoencoder
    domain_classifier(files, device, seed, steps=200)     -> (p(domain | pictures), its name), for
    inception_scores(p)                                   -> {"IS": float, "CIS": float}
    with_references(out, test, name, distance, weights)   -> SEGIN's Tab. I, as scores

Pictures are (B, 3, H, W) in [-1, 1]. The weights are fetched once by torch.hub; where that fails a
`UserError` says what to do instead. All files of weights are read with weights_only=True.
torchmetrics is needed by fid and lpips, torch-fidelity by fid (lab/requirements.txt).
"""

import importlib
import itertools
import random
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import AlexNet_Weights, Inception_V3_Weights, VGG16_Weights, inception_v3
from torchvision.models.inception import BasicConv2d
from torchvision.models.vgg import cfgs, make_layers

import common
from common import UserError

FID_WEIGHTS = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
               "weights-inception-2015-12-05-6726825d.pth")


def cached(address):
    """Where torch.hub keeps the file of that address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(address).name


def needed(module, score):
    """That module; `UserError` where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0].replace("_", "-")
        raise UserError(f"--evaluate: {score} needs {package}: pip install -r "
                        "lab/requirements.txt") from None


def eight_bit(x):
    """Pictures in [-1, 1] (clipped if outside) -> bytes, as a saved PNG has them."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()


# ---- sets of pictures ---------------------------------------------------------------------------


@torch.no_grad()
def fid(fakes, reals, device, weights=None):
    """Frechet Inception distance (Heusel et al. 2017) of two sets of pictures, by torchmetrics.

    fakes, reals: iterables of (B, 3, H, W) in [-1, 1], two pictures or more each. Protocol of
    pytorch-fid, which the papers' numbers come from: 8-bit RGB, bilinear to 299x299 without
    antialiasing (so above 299 pixels it samples), 2048 pool features of the TensorFlow Inception.
    weights: its file; downloaded once if not given.
    Raises `UserError` when the weights cannot be had or a set has fewer than two pictures.
    """
    needed("torch_fidelity", "FID")
    FrechetInceptionDistance = needed("torchmetrics.image.fid", "FID").FrechetInceptionDistance
    device = "cpu" if torch.device(device).type == "mps" else device  # sums are float64
    try:
        if weights is None and not (weights := cached(FID_WEIGHTS)).exists():
            weights.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(FID_WEIGHTS, str(weights))
        common.load_file(weights)  # torch-fidelity would unpickle anything
        metric = FrechetInceptionDistance(feature_extractor_weights_path=str(weights)).to(device)
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"--evaluate: no Inception weights for FID ({error}); fetch {FID_WEIGHTS} "
                        "by hand and give --fid-weights FILE") from None
    count = []
    for pictures, real in ((fakes, False), (reals, True)):
        count.append(0)
        for x in pictures:
            x = F.interpolate(eight_bit(x).float(), (299, 299), mode="bilinear")
            metric.update(x.round().byte().to(device), real=real)  # torchmetrics takes bytes
            count[-1] += len(x)
    if min(count) < 2:
        raise UserError(f"--evaluate: FID needs two or more pictures on each side, found "
                        f"{count[0]} generated and {count[1]} real")
    return float(metric.compute())


def inception_scores(p):
    """Inception Score (Salimans et al. 2016) and its conditional form (Huang et al. 2018).

    p (inputs, outputs, classes): p(y | x) of several outputs for each input.
    IS = exp E KL(p(y|x) | p(y)); in CIS p(y) is that of the outputs for one input alone.
    """
    def mean_divergence(marginal):
        return float((p * (p.log() - marginal.log())).nan_to_num(0).sum(2).mean().exp())

    return {"IS": mean_divergence(p.mean((0, 1))), "CIS": mean_divergence(p.mean(1, keepdim=True))}


@torch.enable_grad()
def domain_classifier(files, device, seed, steps=200):
    """(function pictures (B, 3, H, W) -> p(domain | picture) (B, domains), its name).

    files: for each domain a list of training pictures. MUNIT and INIT fine-tune Inception V3. Where
    torchvision's weights are not in torch.hub's folder a small network takes its place, and its
    name says so. torch's own generator is left as it was.
    """
    rng, torch_state = random.Random(seed), torch.random.get_rng_state()
    torch.manual_seed(seed)
    source = Inception_V3_Weights.IMAGENET1K_V1
    if cached(source.url).is_file():
        # transform_input takes ImageNet's mean and deviation back to [-1, 1]: ours are there
        net, side, lr = inception_v3(init_weights=False, transform_input=False), 299, 1e-4
        net.load_state_dict(torchvision_state(source))
        net.fc = nn.Linear(2048, len(files))
        net.eval()  # statistics stay ImageNet's; the auxiliary head is silent
        name = "Inception V3, fine-tuned on the domains"
    else:
        widths, side, lr, layers = (3, 16, 32, 64, 64), 64, 1e-3, []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(a, b, 4, 2, 1, padding_mode="reflect"), nn.ReLU()]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(64, len(files)))
        name = "a SMALL classifier of the domains, no Inception weights at hand"
    net.to(device)

    def resized(x):
        return F.interpolate(x, (side, side), mode="bilinear", antialias=True)

    optimiser = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(steps):
        label = torch.arange(16, device=device) % len(files)
        x = torch.cat([resized(common.to_tensor(common.open_rgb(rng.choice(files[i])))[None])
                       for i in label.tolist()]).to(device)
        optimiser.zero_grad()
        F.cross_entropy(net(x), label).backward()
        optimiser.step()
    torch.random.set_rng_state(torch_state)
    return lambda x: torch.softmax(net(resized(x)), 1).detach(), name


# ---- pairs of pictures --------------------------------------------------------------------------


def lpips(device, otherwise):
    """LPIPS v0.1 with AlexNet (Zhang et al. 2018), by torchmetrics: distance(a, b) -> float.

    The mean over (B, 3, H, W) in [-1, 1]. Raises `UserError`, which ends in `otherwise` (what to do
    instead), when torchvision's AlexNet cannot be had.
    """
    module = needed("torchmetrics.image.lpip", "LPIPS")
    try:
        torchvision_state(AlexNet_Weights.IMAGENET1K_V1)  # torchmetrics would unpickle anything
        metric = module.LearnedPerceptualImagePatchSimilarity(net_type="alex").to(device)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--evaluate: no AlexNet weights for LPIPS ({error}); "
                        f"{otherwise}") from None
    return lambda a, b: float(metric(a.to(device), b.to(device)))


@torch.no_grad()
def feature_distance(vgg, a, b):
    """LPIPS without its learned weights: squared distance of unit feature vectors, a float.

    vgg: `common.VGG` or another network that gives {layer: (B, C, H, W)}. The mean over places and
    pictures of (B, 3, H, W), the sum over layers.
    """
    total = 0.0
    for one, other in zip(vgg(a).values(), vgg(b).values(), strict=True):
        gap = F.normalize(one, dim=1) - F.normalize(other, dim=1)
        total += float(gap.square().sum(dim=1).mean())
    return total


def ssim(a, b):
    """Structural similarity (Wang et al. 2004), (B, 3, H, W) in [-1, 1] -> (B,), float64.

    scikit-image's, on 8-bit pictures: 7x7 uniform windows that lie inside, RGB, covariances of a
    sample (49/48 of a population's), mean over places and channels.
    """
    x, y = eight_bit(a).double(), eight_bit(b).double()

    def mean(f):
        return F.avg_pool2d(f, 7, stride=1)                                # (B, 3, H - 6, W - 6)

    var_x, var_y, cov = (49 / 48 * (mean(f * g) - mean(f) * mean(g))
                         for f, g in ((x, x), (y, y), (x, y)))
    C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    maps = ((2 * mean(x) * mean(y) + C1) * (2 * cov + C2)
            / ((mean(x) ** 2 + mean(y) ** 2 + C1) * (var_x + var_y + C2)))
    return maps.mean(dim=(1, 2, 3))


@torch.no_grad()
def sifid(inception, a, b):
    """Single-image FID (Shaham et al. 2019) of pictures (B, 3, H, W) in [-1, 1], the mean.

    Frechet distance of the two pictures' features before Inception's second pooling, 192 numbers
    per place: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).
    """
    total = 0.0
    for pair in zip(a, b, strict=True):
        f, g = (inception(x[None])[0].flatten(1).cpu().double() for x in pair)
        C_a, C_b = torch.cov(f), torch.cov(g)                              # f: (192, places)
        values, vectors = torch.linalg.eigh(C_a)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
        mixed = torch.linalg.eigvalsh(root @ C_b @ root).clamp(min=0).sqrt().sum()
        total += float((f.mean(1) - g.mean(1)).square().sum() + C_a.trace() + C_b.trace()
                       - 2 * mixed)
    return total / len(a)


def sifid_network(weights, device):
    """torchvision's inception_v3 up to 192 channels, frozen; it takes pictures in [-1, 1].

    weights: 'imagenet', or 'random' (seeded). `UserError` when they cannot be had.
    """
    net = nn.Sequential()
    for name, layer in (("Conv2d_1a_3x3", BasicConv2d(3, 32, kernel_size=3, stride=2)),
                        ("Conv2d_2a_3x3", BasicConv2d(32, 32, kernel_size=3)),
                        ("Conv2d_2b_3x3", BasicConv2d(32, 64, kernel_size=3, padding=1)),
                        ("maxpool1", nn.MaxPool2d(3, 2)),
                        ("Conv2d_3b_1x1", BasicConv2d(64, 80, kernel_size=1)),
                        ("Conv2d_4a_3x3", BasicConv2d(80, 192, kernel_size=3))):
        net.add_module(name, layer)
    return frozen(net, weights, Inception_V3_Weights.IMAGENET1K_V1, "").to(device)


@torch.no_grad()
def self_similarity(vgg, a, b, side=32):
    """Self-similarity distance (Kolkin et al. 2019) of (B, 3, H, W) in [-1, 1], the mean.

    Colours and nine VGG-16 layers at up to side^2 places; D holds the cosine distances between
    all places of a picture, columns scaled to sum 1; places x mean |D_a - D_b|.
    """
    taps = (1, 3, 6, 8, 11, 13, 15, 22, 29)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1).to(a) for v in
                 ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def distances(x):
        size = [min(side, n) for n in x.shape[2:]]
        maps, x = [x], ((x + 1) / 2 - mean) / std
        for i, layer in enumerate(vgg[:taps[-1] + 1]):
            x = layer(x)
            if i in taps:
                maps.append(x)
        f = torch.cat([F.interpolate(f, size, mode="bilinear") for f in maps], dim=1)
        f = F.normalize(f.flatten(2), dim=1)                               # (1, C, places)
        D = 1 - f.transpose(1, 2) @ f
        return D / D.sum(1, keepdim=True)

    gaps = [(distances(p[None]) - distances(q[None])).abs().mean() * min(side, a.shape[2])
            * min(side, a.shape[3]) for p, q in zip(a, b, strict=True)]
    return float(sum(gaps)) / len(a)


def self_similarity_network(weights, device):
    """torchvision's vgg16 up to relu5_3, an `nn.Sequential`, frozen.

    weights: 'imagenet', 'random' (seeded), or a FILE of VGG-16 in torchvision's layout.
    `UserError` when they cannot be had.
    """
    net = make_layers(cfgs["D"][:-1])
    return frozen(net, weights, VGG16_Weights.IMAGENET1K_V1, "features.").to(device)


def style_and_structure(vgg, device):
    """SIFID and the self-similarity distance, functions of two batches; vgg: 'imagenet', 'random'
    or a file of VGG-16, which leaves SIFID's Inception with random weights."""
    inception = sifid_network(vgg if vgg == "imagenet" else "random", device)
    return partial(sifid, inception), partial(self_similarity, self_similarity_network(vgg, device))


def swap_scores(x, x2, x_rec, x_hyb, vgg, name, device):
    """Scores of reconstructions x_rec of x and of hybrids x_hyb of x in the texture of x2.

    Pictures (N, 3, H, W); name: what they are. vgg: 'imagenet', or 'random' or a file of VGG-16,
    which stand in for LPIPS's and the self-similarity's network.
    """
    if vgg == "imagenet":
        label, distance = "LPIPS", lpips(device, "--vgg random or FILE is a stand-in")
    else:
        taps = common.VGG([f"relu{i}_1" for i in range(1, 6)], vgg).to(device)
        label = f"distance of VGG features ({Path(vgg).name})"
        distance = partial(feature_distance, taps)
    style, structure = style_and_structure(vgg, device)

    def apart(a, b):
        pairs = list(zip(a.split(1), b.split(1), strict=True))
        return sum(distance(*pair) for pair in pairs) / len(pairs)

    found = [("reconstruction " + label, apart(x_rec, x), "another picture", apart(x2, x)),
             ("reconstruction L1, of [-1, 1]", float((x_rec - x).abs().mean()), "another picture",
              float((x2 - x).abs().mean())),
             ("SIFID of swaps to the texture" + " (random)" * (vgg != "imagenet"),
              style(x_hyb, x2), "copy the structure", style(x, x2)),
             (f"self-similarity distance of swaps to the structure ({Path(vgg).name})",
              structure(x_hyb, x), "copy the texture", structure(x2, x))]
    return [{"name": f"{what}, {name}", "value": value, "better": "lower",
             "trivial": {answer: trivial}} for what, value, answer, trivial in found]


# ---- weights ------------------------------------------------------------------------------------


def torchvision_state(source):
    """The state dict of a torchvision weights entry, without running code that a file may hold."""
    if cached(source.url).is_file():
        return common.load_file(cached(source.url))
    return source.get_state_dict(progress=True, check_hash=True, weights_only=True)


def frozen(net, weights, source, prefix):
    """`net` in test mode without gradients, filled from `source`, a file, or at random."""
    if weights == "random":
        rng = torch.Generator().manual_seed(16)
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=rng)
        return net.eval().requires_grad_(False)
    if weights == "imagenet":
        try:
            state = torchvision_state(source)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--vgg imagenet: cannot download {source.url} ({error}); put that "
                            f"file at {cached(source.url)}, or use --vgg random") from None
    else:
        state = common.load_file(weights)
    wanted = net.state_dict()
    try:  # old files lack the counters of BatchNorm
        net.load_state_dict({k: state[prefix + k] for k in wanted
                             if prefix + k in state or not k.endswith("num_batches_tracked")})
    except (KeyError, RuntimeError, TypeError):
        raise UserError(f"--vgg {weights}: not {source} weights in torchvision's "
                        "layout") from None
    return net.eval().requires_grad_(False)


# ---- SEGIN's Tab. I -----------------------------------------------------------------------------


def with_references(out, test, name, distance, weights=None):
    """FID, and the mean distance of outputs among themselves, to their reference, to the photo.

    out(x, r) -> y_hat, test: {"x", "y", "r"}, (N, 3, H, W) each. References are other test photos,
    spread evenly. Diversity: 19 pairs of outputs, each for the next of 20 references, for 100
    inputs. (ref), CHOICE: "200 image pairs are tested with 10 references" is read as 200 inputs,
    each with 10. (gt): each photo is its own reference. A smaller test set gives fewer pairs.
    """
    x, y, r = (list(test[key].split(1)) for key in "xyr")
    n = len(x)
    if n < 3:
        raise UserError("--evaluate: at least three test pairs are needed")

    def references(i, count):
        count = min(count, n - 1)
        return [y[(i + 1 + k * (n - 1) // count) % n] for k in range(count)]

    def score(kind, pairs, better="lower"):
        values = [distance(a, b) for a, b in pairs]
        return {"name": f"{name}{kind} ({len(values)} pairs)", "better": better,
                "value": sum(values) / len(values)}

    # One by one, and first: `fid` asks for no output before it has its weights.
    frechet = fid((out(x[i], r[i]).cpu() for i in range(n)), y, y[0].device, weights)
    chosen = [(i, references(i, 20)) for i in range(min(100, n))]
    diversity = score(", diversity", (pair for i, refs in chosen for pair in itertools.pairwise(
        [out(x[i], one) for one in refs])), "higher")
    real = score("", (pair for _, refs in chosen for pair in itertools.pairwise(refs)))
    return [{"name": f"FID ({n} outputs, {n} photos, 299x299)", "better": "lower",
             "value": frechet},
            diversity | {"trivial": {"real photos": real["value"]}},
            score(" (ref)", ((out(x[i], one), one) for i in range(min(200, n))
                             for one in references(i, 10))),
            score(" (gt)", ((out(x[i], y[i]), y[i]) for i in range(n)))]
