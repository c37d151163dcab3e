"""Whitening: the outputs are uncorrelated, the reference by hand, frozen, refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tricks.whitening import patch_whitening, whiten_conv_


def correlated_images(n=200, size=12):
    """Smooth images whose colours go together, as a photograph's do."""
    generator = torch.Generator().manual_seed(3)
    gray = F.avg_pool2d(torch.randn(n, 1, size + 4, size + 4, generator=generator), 5, 1)
    return 4 * gray + 0.3 * torch.randn(n, 3, size, size, generator=generator)


def second_moments(outputs):
    flat = outputs.double().transpose(0, 1).flatten(1)
    return flat @ flat.T / flat.shape[1]


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_the_outputs_have_no_correlation(kernel):
    images = correlated_images()
    before = second_moments(F.unfold(images, kernel).transpose(0, 1).flatten(1).T.unsqueeze(2))
    outputs = F.conv2d(images, patch_whitening(images, kernel, eps=1e-6))
    moments = second_moments(outputs)
    assert (before - before.diagonal().diag()).abs().max() > 0.5  # there was something to undo
    assert torch.allclose(moments, torch.eye(3 * kernel**2).double(), atol=1e-3)


def test_eps_damps_what_is_faint():
    images = correlated_images()
    values = torch.linalg.eigvalsh(second_moments(F.unfold(images, 2).transpose(1, 2).mT))
    moments = second_moments(F.conv2d(images, patch_whitening(images, 2, eps=0.05)))
    assert torch.allclose(moments.diagonal(), values / (values + 0.05), atol=1e-3)
    assert moments.diagonal()[0] < 0.8 < moments.diagonal()[-1]


def test_the_same_whatever_the_order_and_the_number_a_time():
    images = correlated_images(1200, 6)
    kernels = patch_whitening(images, 2)
    shuffled = images[torch.randperm(1200, generator=torch.Generator().manual_seed(0))]
    assert torch.allclose(kernels, patch_whitening(shuffled, 2), atol=1e-5)
    assert (kernels.flatten(1).abs().max(1).values == kernels.flatten(1).max(1).values).all()


def test_a_layer_with_both_signs_frozen_and_a_bias_that_learns():
    conv = nn.Conv2d(3, 24, 2)
    images = correlated_images()
    whiten_conv_(conv, images)
    assert torch.equal(conv.weight[:12], patch_whitening(images, 2))
    assert torch.equal(conv.weight[12:], -conv.weight[:12])
    assert not conv.weight.requires_grad and conv.bias.requires_grad
    assert not conv.bias.any()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 25, 2),
        nn.Conv2d(3, 24, (2, 1)),
        nn.Conv2d(4, 32, 2, groups=2),
        nn.Conv2d(3, 24, 2, dilation=2),
    ],
    ids=["channels", "square", "groups", "dilation"],
)
def test_a_layer_that_cannot_be_one(conv):
    with pytest.raises(ValueError, match="channels out"):
        whiten_conv_(conv, torch.randn(2, conv.in_channels, 8, 8))


def test_images_that_cannot_be_used():
    with pytest.raises(ValueError, match="5 pixels don't fit images of 4×8"):
        patch_whitening(torch.randn(2, 3, 4, 8), 5)
    with pytest.raises(ValueError, match=r"0 and 0\.0005"):
        patch_whitening(torch.randn(0, 3, 8, 8), 2)
    with pytest.raises(ValueError, match="2 and 0"):
        patch_whitening(torch.randn(2, 3, 8, 8), 2, eps=0)
    with pytest.raises(ValueError, match="not finite"):
        patch_whitening(torch.full((2, 3, 4, 4), float("nan")), 2)


def test_channels_that_are_all_the_same():
    gray = torch.randn(50, 1, 8, 8).expand(-1, 3, -1, -1)
    assert patch_whitening(gray, 2, eps=1e-20).isfinite().all()
