"""What segmentation networks read in pictures that were painted from label maps: mIoU, accuracy."""
import torch

from lab import segmenters

STEPS = 600  # of a network's training


def mean_colours(data, classes):
    """(pixels (classes + 1), mean colour (classes + 1, 3)) of each label in 200 samples data[n] =
    (labels, edges, x); what is beyond the classes has the last place."""
    labels, _, x = zip(*(data[n] for n in range(min(len(data), 200))), strict=True)
    labels, x = torch.stack(labels).flatten(), torch.stack(x).transpose(0, 1).flatten(1)
    count = torch.bincount(labels, minlength=classes + 1)
    sums = [torch.bincount(labels, channel.double(), classes + 1) for channel in x]
    return count, torch.stack(sums, dim=1).float() / count.clamp(min=1)[:, None]


def label_scores(x_hat, test, data, classes, skip, device, files=(None,), steps=None,
                 balanced=False):
    """mIoU and accuracy in % of pictures x_hat (N, 3, H, W) painted for test = (labels (N, H, W),
    edges, x), beside those of x itself and of maps painted in the mean colour of each label.

    They are means over as many networks as there are `files`: a TorchScript file, or what
    `segmenters.train` has kept or will keep there, with the file's place for a seed, from samples
    data[n] = (labels, edges, x). skip: ids that do not count. balanced: rare labels weigh more in
    that training.
    """
    labels, _, x = test

    def counted(labels):
        ids = torch.tensor([min(i, classes) for i in skip], dtype=torch.long)
        return torch.where(torch.isin(labels, ids), -1, labels)

    def sample(n):
        labels, _, x = data[n]
        return x, counted(labels)

    count, means = mean_colours(data, classes)
    weights = (count[:classes] + 1).float().rsqrt().to(device)
    found = {"painted": x_hat, "real pictures": x,
             "mean colour per class": means[labels].permute(0, 3, 1, 2)}
    rows = {key: [] for key in found}
    for seed, file in enumerate(files):
        net = segmenters.train(sample, classes, device, steps or STEPS, seed, file,
                               weights=weights / weights.mean() if balanced else None)
        for key, pictures in found.items():
            table = segmenters.confusion(segmenters.segmented(net, pictures, device),
                                         counted(labels), classes)
            rows[key].append(segmenters.scores(table, skip))
    for key in rows:
        IoU = 100 * torch.stack([row["IoU"] for row in rows[key]]).nanmean(0)
        print(f"IoU per class, {key}: {' '.join(f'{v:.0f}' for v in IoU.tolist())}")

    def mean(key, name):
        return 100 * sum(row[name] for row in rows[key]) / len(files)

    return [{"name": name, "value": mean("painted", name), "better": "higher",
             "trivial": {key: mean(key, name) for key in [*rows][1:]}}
            for name in ("mIoU", "accuracy")]
