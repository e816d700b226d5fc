"""The other generators of SPADE's Tab. 2.3 and 2.5, for the rows of lab/rows/spade.txt.

    ConcatGenerator(args, m_channels)             decoder w/ Concat
    HDGenerator(args, m_channels)                 pix2pixHD++: m enters at the first layer
    HDGenerator(args, m_channels, "spade")        and by SPADE after every convolution
    HDGenerator(args, m_channels, "concat")       and as further channels of every block's input

They were not released. CHOICE: they are built from the text (Sec. 2.4) so that their parameter
counts with ADE20K's 151 labels come out as printed: 79, 183, 237 and 195 M.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import InstanceNorm
from spade import Generator, Spade, SpadeBlock, sn


class Norm(nn.Module):
    """The usual normalisation, deaf to m: gamma_c and beta_c are the same for all places."""

    def __init__(self, channels, *_, **__):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, h, m):
        return self.norm(h)


class Concat(Norm):
    """Tab. 2.3's alternative to SPADE: `Norm`, with m as further channels for the next layer."""

    def forward(self, h, m):
        return torch.cat([self.norm(h), F.interpolate(m, h.shape[2:]).to(h.dtype)], dim=1)


class ConcatGenerator(Generator):
    """SPADE's decoder with `Concat` in place of `Spade`, and convolutions that much wider."""

    def __init__(self, args, m_channels):
        super().__init__(args, m_channels)
        for block in self.children():
            if isinstance(block, SpadeBlock):
                for name in [name for name, _ in block.named_children() if name[:5] == "spade"]:
                    conv = getattr(block, name.replace("spade", "conv"))
                    setattr(block, name, Concat(conv.in_channels))
                    setattr(block, name.replace("spade", "conv"), sn(nn.Conv2d(
                        conv.in_channels + m_channels, conv.out_channels, conv.kernel_size,
                        padding=conv.padding, bias=conv.bias is not None)))


class HDBlock(nn.Module):
    """pix2pixHD's residual block, h + norm(conv(relu(norm(conv(h)))))."""

    def __init__(self, c, norm, m_channels):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode="reflect")
        self.conv_0, self.norm_0 = sn(conv(c + m_channels, c)), norm(c)
        self.conv_1, self.norm_1 = sn(conv(c, c)), norm(c)
        self.concat = m_channels > 0

    def forward(self, h, m):
        skip = h
        if self.concat:  # CHOICE: once per block, which gives the printed 195 M
            h = torch.cat([h, F.interpolate(m, h.shape[2:]).to(h.dtype)], dim=1)
        h = F.relu(self.norm_0(self.conv_0(h), m))
        return skip + self.norm_1(self.conv_1(h), m)


class HDGenerator(nn.Module):
    """Four layers down, nine blocks, four up; m (B, L, H, W) -> (B, 3, H, W). See the top."""

    def __init__(self, args, m_channels, joined="first"):
        super().__init__()
        norm = (partial(Spade, m_channels=m_channels, hidden=args.hidden, kernel=args.kernel)
                if joined == "spade" else Norm)
        widths = [args.ngf * 2**i for i in range(5)]
        pairs = list(zip(widths, widths[1:], strict=False))
        self.convs = nn.ModuleList([
            nn.Conv2d(m_channels, widths[0], 7, padding=3, padding_mode="reflect"),
            *(sn(nn.Conv2d(a, b, 3, 2, 1)) for a, b in pairs),
            *(sn(nn.ConvTranspose2d(b, a, 3, 2, 1, 1)) for a, b in reversed(pairs))])
        self.norms = nn.ModuleList(norm(conv.out_channels) for conv in self.convs)
        more = m_channels if joined == "concat" else 0
        self.blocks = nn.ModuleList(HDBlock(widths[4], norm, more) for _ in range(9))
        self.to_rgb = nn.Conv2d(widths[0], 3, 7, padding=3, padding_mode="reflect")

    def forward(self, m, z=None):
        h = m
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = F.relu(norm(conv(h), m))                  # (B, 1024, H/16, W/16) after five
            if i == 4:
                for block in self.blocks:
                    h = block(h, m)
        return torch.tanh(self.to_rgb(h))


def instance_normalised(net):
    """The network with `InstanceNorm` in place of every batch norm (and of its gamma_c, beta_c)."""
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, InstanceNorm(layer.num_features))
    return net
