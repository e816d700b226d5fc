"""digits_single, digits_multiple: toy MNIST-Single and MNIST-Multiple; for EGSC-IT.

Also what the pictures of MNIST and of the toy share: test pairs, scores, and a small stand-in for
VGG-19, which is taught to name drawn digits.

    testA/0000   a black 7 on white (or white on black)  testB/0000   a red 2 on green
    testAB/0000  a red 7 on green                        testBA/0000  a black 2 on white

multiple: the same with ten digits on a board. train and val: as there (train without AB and BA).
The rules of colours and boards are those of the paper (Sec. 4, in egscit.py); the digits are of
Pillow's built-in font. Nothing in A matches anything in B.
"""
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import common

from .disk import contact_sheet
from .scoring import score


def drawn_digits(n, size, rng):
    """n digits of Pillow's built-in font, as varied as handwriting: masks (n, size, size), labels.

    Size, weight, slant, width, rotation and place vary. The labels go 0, 1, ..., 9, 0, ...
    """
    masks, times = np.zeros((n, size, size), dtype=bool), 4
    for i in range(n):
        side = size * times
        letter = Image.new("L", (side, side))
        font = ImageFont.load_default(rng.uniform(0.8, 1.05) * side)
        ImageDraw.Draw(letter).text((side / 2, side / 2), str(i % 10), 255, font, anchor="mm",
                                    stroke_width=round(rng.uniform(0, 0.045) * side))
        turn, slant = rng.uniform(-0.3, 0.3), rng.uniform(-0.25, 0.25)
        cos, sin = math.cos(turn), math.sin(turn)
        back = np.array([(cos, -sin), (sin, cos)]) @ [(1 / rng.uniform(0.7, 1.15), slant), (0, 1)]
        middle = side / 2 + rng.uniform(-0.07, 0.07, 2) * side
        shift = side / 2 - back @ middle
        letter = letter.transform((side, side), Image.AFFINE,
                                  (*back[0], shift[0], *back[1], shift[1]), Image.BILINEAR)
        masks[i] = np.asarray(letter.reduce(times)) > 127.5
    return masks, np.arange(n) % 10


def draw_single(folder, n, size, seed, n_test=200):
    """Fill `folder` with single digits: `n` per domain to train, `n_test` for val and for test.

    testAB and testBA hold the true translations of testA with the exemplar of the same name in
    testB, and the reverse.
    """
    from egscit import digit_colours, paint_digits  # here: no other data set needs that script

    def pictures(split, count, stream):
        masks, colours = {}, {}
        for domain in "AB":
            rng = np.random.default_rng([seed, stream, "AB".index(domain)])
            masks[domain], labels = drawn_digits(count, size, rng)
            colours[domain] = digit_colours(labels, domain, split, rng)
            order = rng.permutation(count)
            masks[domain] = masks[domain][order]
            colours[domain] = [c[order] for c in colours[domain]]
        return lambda shape, style: paint_digits(masks[shape], *colours[style])

    save(folder, {"train": pictures("train", n, 20), "val": pictures("val", n_test, 38),
                  "test": pictures("test", n_test, 21)})


def draw_multiple(folder, n, size, seed, n_test=60):
    """Fill `folder` with boards of ten digits, as `draw_single` does."""
    from egscit import CELLS

    if size % CELLS:
        raise ValueError(f"size is {size}, expected a multiple of {CELLS}")

    def pictures(count, stream):
        rng = np.random.default_rng([seed, stream])
        return boards(*drawn_digits(400, size // CELLS, rng), count, rng)

    save(folder, {"train": pictures(n, 22), "val": pictures(n_test, 39),
                  "test": pictures(n_test, 23)})


def boards(masks, labels, n, rng):
    """n pairs of boards: a function (shapes' domain, colours' domain) -> pictures (H, W, 3)."""
    from egscit import board_colours, board_layout, paint_board

    members = [np.flatnonzero(labels == k) for k in range(10)]
    drawn = [{d: (board_layout(members, rng), *board_colours(d, rng)) for d in "AB"}
             for _ in range(n)]
    return lambda shape, style: [paint_board(masks, b[shape][0], *b[style][1:]) for b in drawn]


def save(folder, splits):
    """Fill `folder` from {split: function (shapes' domain, colours' domain) -> pictures}."""
    for split, pictures in splits.items():
        for shape, style in ("AA", "BB") if split == "train" else ("AA", "BB", "AB", "BA"):
            sub = folder / (split + (shape if shape == style else shape + style))
            sub.mkdir()
            for i, picture in enumerate(pictures(shape, style)):
                Image.fromarray(picture).save(sub / f"{i:04d}.png")
    contact_sheet(folder, [("trainA", "black and white"), ("trainB", "colours, other digits"),
                           ("testA", "black and white"), ("testB", "exemplars, other digits"),
                           ("testAB", "testA in the colours of testB"),
                           ("testBA", "testB in those of testA")], folder / "contact.png")


# ---- test pairs of MNIST: x_AB shows x_A's digits in x_B's colours, x_BA the reverse -------------


def board_pairs(masks, labels, n):
    """{'x_A', 'x_B', 'x_AB', 'x_BA'}: n test pairs of MNIST-Multiple, lists of (H, W, 3) bytes."""
    pictures = boards(masks, labels, n, np.random.default_rng(0))
    return {f"x_{name}": pictures(name[0], name[-1]) for name in ("A", "B", "AB", "BA")}


def released_pairs(masks, labels, n):
    """The first n test pairs of the authors' MNIST-Single, from all 10,000 test masks; as above.

    Their script drew with numpy's old generator, seed 0: two shuffles, then two colour draws.
    """
    from egscit import GREYS, INKS_AND_PAPERS, PRIMARIES, paint_digits

    rng = np.random.RandomState(0)
    order_A, order_B = list(range(len(masks))), list(range(len(masks)))
    rng.shuffle(order_A)
    rng.shuffle(order_B)
    white = (rng.uniform(size=len(masks)) >= 0.5).astype(int)[:n]
    pair = INKS_AND_PAPERS[np.floor(6 * rng.uniform(size=len(masks))).astype(int)[:n]]
    shapes = {"A": masks[order_A[:n]], "B": masks[order_B[:n]]}
    colours = {"A": (GREYS[white], GREYS[1 - white]),
               "B": (PRIMARIES[pair[:, 0]], PRIMARIES[pair[:, 1]])}
    return {f"x_{name}": paint_digits(shapes[name[0]], *colours[name[-1]])
            for name in ("A", "B", "AB", "BA")}


# ---- scores -------------------------------------------------------------------------------------


def packed(pictures):
    """(N, 3, H, W) in [-1, 1] -> one whole number a pixel, (N, H W): red, green, blue, 24 bits."""
    bytes_ = ((pictures + 1) * 127.5).round().clamp(0, 255).flatten(2).long()
    red, green, blue = bytes_.unbind(1)
    return red << 16 | green << 8 | blue


def unpacked(colours):
    """The reverse of `packed` for (...) -> (..., 3), in [-1, 1]."""
    return torch.stack([colours >> 16, colours >> 8 & 255, colours & 255], dim=-1) / 127.5 - 1


def paper_colour(pictures):
    """The most frequent colour of each picture, everywhere: (N, 3, H, W) -> same."""
    colour = unpacked(packed(pictures).mode(dim=1).values)
    return colour[:, :, None, None].expand_as(pictures).contiguous()


def pixel_accuracy(pictures, truth):
    """(ink, paper): shares of their pixels whose nearest palette colour is the true one.

    (N, 3, H, W) in [-1, 1]. The palette is black, white, red, green, blue and the colours of the
    truth; paper is where the truth has its most frequent colour. Means over all such pixels.
    """
    codes, known = packed(truth), torch.tensor([0, 0xFFFFFF, 0xFF0000, 0xFF00, 0xFF])
    right = []
    for x, code in zip(pictures.flatten(2), codes, strict=True):
        palette = torch.cat([code, known]).unique()
        nearest = torch.cdist(x.T, unpacked(palette)).argmin(1)
        right.append(palette[nearest] == code)
    right, paper = torch.stack(right), codes == codes.mode(dim=1, keepdim=True).values
    return float(right[~paper].float().mean()), float(right[paper].float().mean())


def digit_scores(answers):
    """SSIM to the truth and to the exemplar (Tab. 2), ink and paper accuracy.

    answers: {name: (N, 3, H, W) in [-1, 1]}, the translation's "", and "the truth", "copy the
    input", "copy the exemplar".
    """
    from lab import metrics

    truth, exemplar = answers["the truth"], answers["copy the exemplar"]
    answers = answers | {"the exemplar's paper": paper_colour(exemplar)}
    trivial = {name: answer for name, answer in answers.items() if name}
    scores = []
    for name, other in (("SSIM to the truth", truth), ("SSIM to the exemplar (Tab. 2)", exemplar)):
        scores.append(score(name, lambda a, b=other: metrics.ssim(a, b).mean(), answers[""],
                            trivial, "higher"))
        scores[-1]["sd"] = float(metrics.ssim(answers[""], other).std(correction=0))
    if all(len(code.unique()) <= 16 for code in packed(truth)):  # digits, not photographs
        right = {name: pixel_accuracy(answer, truth) for name, answer in answers.items()}
        for i, name in enumerate(("ink accuracy", "paper accuracy")):
            scores.append({"name": name, "value": right[""][i], "better": "higher",
                           "trivial": {k: v[i] for k, v in right.items() if k}})
    return scores


@torch.no_grad()
def perceptual_scores(vgg, answers, args):
    """L_c and L_s of EGSC-IT's Eq. (5), and L_P, of answers {name: (N, 3, H, W)}, the
    translation's "".

    Where L_P of the truth is not below that of the input, it teaches not to translate.
    """
    from egscit import content_loss, phi, style_loss

    device, found = next(vgg.parameters()).device, {name: [] for name in answers}
    for one in zip(*answers.values(), strict=True):  # picture by picture: they may be large
        maps = {name: phi(vgg, y[None].to(device)) for name, y in zip(answers, one, strict=True)}
        for name, phi_y in maps.items():
            L_c = float(content_loss(phi_y, maps["copy the input"]))
            L_s = float(style_loss(phi_y, maps["copy the exemplar"]))
            found[name].append((L_c, L_s, args.lambda_c * L_c + args.lambda_s * L_s))
    means = {name: np.mean(values, axis=0).tolist() for name, values in found.items()}
    return [{"name": loss, "value": means[""][i], "better": "lower",
             "trivial": {name: mean[i] for name, mean in means.items() if name}}
            for i, loss in enumerate(("L_c", "L_s", "L_P"))]


# ---- a stand-in for VGG-19 ----------------------------------------------------------------------


class DigitVGG(nn.Module):
    """Five layers with the names of VGG-19's taps: x (B, 3, H, W) -> {tap: map}.

    Only two poolings, so that relu5_1 of a 28-pixel digit has 7 x 7 places, as VGG-19's has of a
    board of 112; and further layers behind it, as VGG-19 has, so that relu5_1 itself need not
    name the digit. Else Gram matrices of relu5_1 ask for the exemplar's digit.
    """

    def __init__(self, width=16):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(*([nn.MaxPool2d(2, ceil_mode=True)] if i in (1, 2) else []),
                          nn.Conv2d(a, b, 3, padding=1), nn.ReLU())
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)))
        self.more = nn.Sequential(*(layer for _ in range(2) for layer in (
            nn.Conv2d(widths[-1], widths[-1], 3, 2, padding=1), nn.ReLU())))
        self.head = nn.Linear(widths[-1], 10 + 3 + 3)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x):
        found = {}
        for i, stage in enumerate(self.stages, start=1):
            found[f"relu{i}_1"] = x = stage(x)
        return found

    def names(self, x):
        """Logits (B, 10) of the digit, (B, 3) each of red, green, blue in the ink, the paper."""
        last = self.more(self.forward(x)["relu5_1"])
        return self.head(last.mean(dim=(2, 3))).split([10, 3, 3], dim=1)


def digit_vgg(root="datasets", steps=600, batch=64):
    """A `DigitVGG` that was taught to name drawn digits, frozen: the same one on every machine but
    for rounding; kept in root/toy, and taught (half a minute) only if it is not there."""
    file = Path(root, "toy", "digit_vgg-1.pt")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        V = DigitVGG()
    if file.exists():
        V.load_state_dict(common.load_file(file))
        return V.requires_grad_(False)
    masks, labels = map(torch.from_numpy, drawn_digits(3000, 28, np.random.default_rng(0)))
    rng, palette = torch.Generator().manual_seed(1), torch.tensor(
        [(0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]).float()
    adam, bce = torch.optim.Adam(V.parameters(), lr=2e-3), F.binary_cross_entropy_with_logits
    for step in range(steps):
        adam.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        i, ink = (torch.randint(n, (batch,), generator=rng) for n in (len(masks), 5))
        paper = (ink + torch.randint(1, 5, (batch,), generator=rng)) % 5
        ink, paper = palette[ink], palette[paper]                       # (B, 3) in [0, 1]
        ink[::4] = torch.rand(len(ink[::4]), 3, generator=rng)          # boards have other colours
        x = torch.where(masks[i][:, None], ink[:, :, None, None], paper[:, :, None, None]) * 2 - 1
        digit, of_ink, of_paper = V.names(x)
        loss = F.cross_entropy(digit, labels[i]) + bce(of_ink, ink) + bce(of_paper, paper)
        adam.zero_grad()
        loss.backward()
        adam.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    common.write_whole(file, partial(torch.save, V.state_dict()))
    right = (digit.argmax(1) == labels[i]).float().mean()
    print(f"--vgg digits: no ImageNet weights; phi is a small network that was taught here to name "
          f"drawn digits and colours ({right:.2f} of the last digits right), kept as {file}")
    return V.requires_grad_(False)
