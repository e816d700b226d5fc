"""Plain transcriptions of layer tables, written from the papers' tables and not from our modules.

They take a network's parameters in order (weight, bias, weight, bias, ...) and use functions only,
so that a norm, a slope, a skip or a padding that differs shows, as no parameter count would.
"""

import torch
import torch.nn.functional as F


def parameters(net):
    """Leaf copies of a network's parameters, in order."""
    return [p.detach().clone().requires_grad_() for p in net.parameters()]


def instance_norm(x):
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) / ((x - mean).square().mean((2, 3), keepdim=True) + 1e-5).sqrt()


def reflect(x, n):
    return F.pad(x, (n, n, n, n), mode="reflect")


def blur_down(x):
    """[1, 2, 1] x [1, 2, 1] / 16 at every second place, reflected at the border."""
    x, (h, w) = reflect(x, 1), x.shape[2:]
    return sum(a * b * x[:, :, i:i + h:2, j:j + w:2]
               for i, a in enumerate((1, 2, 1)) for j, b in enumerate((1, 2, 1))) / 16


def resnet_generator(params, x, blocks, antialias):
    """CycleGAN's and CUT's generator -> (picture, the five feature maps that CUT reads)."""
    p, features = iter(params), [x]

    def conv(x, **options):
        return F.conv2d(x, next(p), next(p), **options)

    h = instance_norm(conv(reflect(x, 3))).relu()                          # 7x7
    for _ in range(2):                                                     # two times down
        h = conv(h, stride=1 if antialias else 2, padding=1)
        features.append(h)
        h = instance_norm(h).relu()
        h = blur_down(h) if antialias else h
    for block in range(1, blocks + 1):
        skip = h
        h = instance_norm(conv(reflect(h, 1))).relu()
        h = skip + instance_norm(conv(reflect(h, 1)))
        if block in (1, (blocks + 1) // 2):
            features.append(h)
    for _ in range(2):                                                     # two times up
        if antialias:
            h = conv(F.interpolate(h, scale_factor=2, mode="bilinear"), padding=1)
        else:
            h = F.conv_transpose2d(h, next(p), next(p), stride=2, padding=1, output_padding=1)
        h = instance_norm(h).relu()
    y = conv(reflect(h, 3)).tanh()
    assert next(p, None) is None
    return y, features


def patchgan(params, x, antialias):
    """The 70x70 PatchGAN: 4x4 convolutions, three of them halving, slope 0.2, no norm in the
    first and the last layer."""
    p = iter(params)
    for layer in range(4):
        halves = layer < 3
        x = F.conv2d(x, next(p), next(p), stride=2 if halves and not antialias else 1, padding=1)
        x = F.leaky_relu(instance_norm(x) if layer > 0 else x, 0.2)
        x = blur_down(x) if halves and antialias else x
    x = F.conv2d(x, next(p), next(p), padding=1)
    assert next(p, None) is None
    return x


def close(ours, naive, rtol=1e-7, atol=1e-10):
    """Two lists of tensors, as equal as float64 leaves them."""
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
