"""lab/segmenters.py: the table by hand and by loops, the small network, DRN-26 layer by layer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from lab import segmenters

CPU = torch.device("cpu")


def test_scores_by_hand():
    """Rows are the truth: t = (4, 3, 3), hits (3, 2, 2), found (5, 3, 2)."""
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 255, -1]])
    found = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 2, 0, 2, 1, 2]])
    table = segmenters.confusion(found, truth, 3)
    assert table.tolist() == [[3, 1, 0], [1, 2, 0], [1, 0, 2]]
    scores = segmenters.scores(table)
    IoU = [3 / (4 + 5 - 3), 2 / (3 + 3 - 2), 2 / (3 + 2 - 2)]
    assert scores["IoU"].tolist() == pytest.approx(IoU)
    assert scores["mIoU"] == pytest.approx(np.mean(IoU))
    assert scores["accuracy"] == pytest.approx(0.7)
    assert scores["class accuracy"] == pytest.approx((3 / 4 + 2 / 3 + 2 / 3) / 3)


def test_a_hallucinated_class_counts_and_one_in_neither_does_not():
    table = torch.tensor([[6, 0, 2, 0], [0, 8, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = segmenters.scores(table)
    assert scores["IoU"][:3].tolist() == [0.75, 1, 0] and scores["IoU"][3].isnan()
    assert scores["mIoU"] == pytest.approx((0.75 + 1 + 0) / 3)
    assert scores["class accuracy"] == pytest.approx((0.75 + 1) / 2)  # of those that are there
    assert scores["accuracy"] == pytest.approx(14 / 16)


def test_ids_that_are_no_classes_and_classes_that_are_not_ours():
    table = torch.tensor([[7, 0, 1], [0, 0, 0], [0, 0, 4]])
    table[0, 1] = 2                                       # the second is only hallucinated
    assert segmenters.scores(table)["mIoU"] == pytest.approx((0.7 + 0 + 0.8) / 3)
    assert segmenters.scores(table, [1, 255, None])["mIoU"] == pytest.approx((0.7 + 0.8) / 2)
    with pytest.raises(common.UserError, match="labels 0 to 3 were read, expected 0 to 2: a netw"):
        segmenters.confusion(torch.tensor([0, 3, 9]), torch.tensor([1, 1, 255]), 3)


def test_tables_add_up_and_take_bytes():
    found, truth = torch.randint(0, 4, (2, 3, 9, 7), dtype=torch.uint8,
                                 generator=torch.Generator().manual_seed(0))
    truth[0, :2] = 255
    table = segmenters.confusion(found, truth, 4)
    assert torch.equal(table, sum(segmenters.confusion(f, t, 4) for f, t in
                                  zip(found, truth, strict=True)))
    for i in range(4):
        for j in range(4):
            assert table[i, j] == ((truth == i) & (found == j)).sum()


def sample(n):
    """Blocks of three colours; label 7 is none of the classes and shows a fourth."""
    rng = np.random.default_rng(n)
    label = rng.choice([0, 1, 2, 7], (4, 4)).repeat(8, 0).repeat(8, 1)
    colours = np.zeros((8, 3))
    colours[[0, 1, 2]] = [[0.8, -0.8, -0.8], [-0.8, 0.8, -0.8], [-0.8, -0.8, 0.8]]
    picture = colours[label] + rng.normal(0, 0.1, (32, 32, 3))
    return torch.from_numpy(picture).permute(2, 0, 1).float(), torch.from_numpy(label)


def test_segmenter_learns_reads_and_is_kept(tmp_path):
    before = torch.random.get_rng_state()
    path = tmp_path / "new/fcn.pt"
    net = segmenters.train(sample, 3, CPU, steps=30, path=path)
    assert torch.equal(before, torch.random.get_rng_state()) and not net.training
    x, truth = (torch.stack(part) for part in zip(*map(sample, range(1000, 1009)), strict=True))
    found = segmenters.segmented(net, x, CPU)
    assert found.shape == truth.shape and found.max() <= 2
    assert segmenters.scores(segmenters.confusion(found, truth, 3))["accuracy"] > 0.95
    again = segmenters.train(None, 3, CPU, steps=0, path=path)
    assert torch.equal(segmenters.segmented(again, x, CPU), found)
    with pytest.raises(common.UserError, match="fcn.pt: segmenter does not fit"):
        segmenters.train(None, 4, CPU, steps=0, path=path)
    (tmp_path / "bad.pt").write_text("no weights")
    with pytest.raises(common.UserError, match="bad.pt"):
        segmenters.train(None, 3, CPU, steps=0, path=tmp_path / "bad.pt")


@pytest.mark.parametrize("size", [(32, 32), (20, 36), (17, 9)])
def test_segmenter_answers_at_the_size_of_the_picture(size):
    with torch.no_grad():
        assert segmenters.Segmenter(5).eval()(torch.zeros(1, 3, *size)).shape == (1, 5, *size)


def test_drn26_layer_by_layer():
    """A plain transcription: strides, dilations, what is added and what is not."""
    torch.manual_seed(0)
    net = segmenters.DRN26(5).double().eval()
    assert sum(p.numel() for p in segmenters.DRN26(19).parameters()) == 20_623_331
    x = torch.rand(1, 3, 40, 48, dtype=torch.double) * 2 - 1

    def conv(y, conv, norm, stride=1, dilation=1):
        kernel = conv.weight.shape[2]
        y = F.conv2d(y, conv.weight, None, stride, dilation * (kernel // 2), dilation)
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    y = (x / 2 + 0.5 - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    y = F.relu(conv(y, net.conv1, net.bn1))
    plan = [(1, 1), (2, 1), (2, 1), (1, 1), (2, 1), (1, 1), (1, 2), (1, 2), (1, 4), (1, 4), (1, 2),
            (1, 1)]
    for i, (block, (stride, dilation)) in enumerate(zip(net.blocks, plan, strict=True)):
        out = conv(F.relu(conv(y, block.conv1, block.bn1, stride, dilation)), block.conv2,
                   block.bn2, 1, dilation)
        if i < 10:
            skip = y if out.shape == y.shape else conv(y, *block.shortcut, stride)
            out = out + skip
        y = F.relu(out)
    assert y.shape == (1, 512, 5, 6)
    y = F.conv2d(y, net.score.weight, net.score.bias)
    y = F.interpolate(y, (40, 48), mode="bilinear", align_corners=True)
    with torch.no_grad():
        torch.testing.assert_close(net(x), y, rtol=1e-6, atol=1e-6)
