"""FastNet: the network that learns CIFAR-10 in the fewest operations we know of.

Keller Jordan's airbench94 (2024, https://arxiv.org/abs/2404.00498), itself after Tysam's
hlb-CIFAR10 and Page's ResNet-9: a whitening layer that is computed, not learned; three
narrow-to-wide blocks without shortcuts whose filters start by passing their input on; BatchNorm
without a scale; GELU; max-pools early, and a maximum over the remaining pixels.
"""

from __future__ import annotations

from torch import nn

from tricks.init import dirac_part_

WIDTHS = {"fastnet": (64, 256, 256), "fastnet_small": (32, 128, 128)}  # channels of the blocks
KERNEL = 2  # of the whitening layer, pixels a side
NORM_MOMENTUM = 0.4  # of BatchNorm's running statistics: few steps, large batches


class FastNet(nn.Sequential):
    """(N, 3, H, W) -> logits (N, num_classes), of any H and W of at least 9 pixels.

    `whitening` is random until tricks.whitening.whiten_conv_ computes it from images.
    """

    def __init__(self, num_classes, widths=WIDTHS["fastnet"]):
        channels = 2 * 3 * KERNEL**2
        super().__init__()
        self.whitening = nn.Conv2d(3, channels, KERNEL)
        self.whitening.weight.requires_grad_(False)
        self.activation = nn.GELU()
        inputs = (channels, *widths)
        self.layers = nn.Sequential(*(_block(n, m) for n, m in zip(inputs, widths, strict=False)))
        self.pool = GlobalMaxPool()
        self.fc = nn.Linear(widths[-1], num_classes, bias=False)
        # Features are maxima over GELUs: with weights this small, logits start near 0 and any
        # learning rate moves them
        nn.init.normal_(self.fc.weight, std=1 / widths[-1])


class GlobalMaxPool(nn.Module):
    """(N, C, H, W) -> (N, C). AdaptiveMaxPool2d's gradient is not deterministic on a GPU."""

    def forward(self, features):
        return features.amax((2, 3))


def _block(inputs, outputs):
    return nn.Sequential(
        _conv(inputs, outputs), nn.MaxPool2d(2), _norm(outputs), nn.GELU(),
        _conv(outputs, outputs), _norm(outputs), nn.GELU(),
    )  # fmt: skip


def _conv(inputs, outputs):
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    dirac_part_(conv)
    return conv


def _norm(channels):
    norm = nn.BatchNorm2d(channels, momentum=NORM_MOMENTUM)
    norm.weight.requires_grad_(False)
    return norm
