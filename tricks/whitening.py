"""Whitening: a first convolution whose outputs are uncorrelated, computed from images, not learned.

Coates and Ng, "Learning Feature Representations with K-Means", 2012, section 2.2; as the first
layer of a network: Page, "How to Train Your ResNet", part 8, 2019; frozen, with both signs: Keller
Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, https://arxiv.org/abs/2404.00498
"""

import torch
from torch import Tensor, nn

__all__ = ["patch_whitening", "whiten_conv_"]


def patch_whitening(images: Tensor, kernel_size: int, eps: float = 5e-4) -> Tensor:
    """Kernels that whiten the patches of images: float32 (C · k², C, k, k), k = `kernel_size`.

    They are the eigenvectors vᵢ of the patches' second moments, as torch.linalg.eigh gives them,
    each over √(λᵢ + eps): a convolution with them gives outputs of mean square λ / (λ + eps), which
    are uncorrelated with each other. The first kernels see fine detail, where the variance is
    least, the last ones brightness. eigh leaves the sign open: it is chosen so that the largest
    weight is positive.

    images: float (n, C, H, W), normalised to about mean 0; a few thousand are enough. Computed in
    float64, on the images' device; on the CPU for MPS, which has no float64. Raises ValueError for
    no images, images smaller than a patch, values that are not finite, and an eps of 0 or less.

    >>> images = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> outputs = nn.functional.conv2d(images, patch_whitening(images, 2))
    >>> outputs = outputs.transpose(0, 1).flatten(1)
    >>> (outputs @ outputs.T / outputs.shape[1] - torch.eye(12)).abs().max() < 1e-3
    tensor(True)
    """
    channels, height, width = images.shape[1:]
    if not len(images) or eps <= 0:
        raise ValueError(f"whitening needs images and an eps above 0, got {len(images)} and {eps}")
    if not 1 <= kernel_size <= min(height, width):
        raise ValueError(f"patches of {kernel_size} pixels don't fit images of {height}×{width}")
    device = images.device
    images = images.cpu() if device.type == "mps" else images
    size = channels * kernel_size**2
    moments = torch.zeros(size, size, dtype=torch.float64, device=images.device)
    count = 0
    for chunk in images.split(500):  # all patches at once would be kernel_size² times the images
        patches = nn.functional.unfold(chunk.double(), kernel_size)  # (n, size, places)
        patches = patches.transpose(0, 1).flatten(1)
        moments += patches @ patches.T
        count += patches.shape[1]
    if not moments.isfinite().all():
        raise ValueError("the images are not finite")
    values, vectors = torch.linalg.eigh(moments / count)  # columns, the smallest value first
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    kernels = (vectors * largest.sign() / (values.clamp(min=0) + eps).sqrt()).T
    return kernels.reshape(size, channels, kernel_size, kernel_size).float().to(device)


@torch.no_grad()
def whiten_conv_(conv: nn.Conv2d, images: Tensor, eps: float = 5e-4) -> None:
    """Make `conv` whiten the patches of images, in place, and freeze its weight.

    Its kernels are those of `patch_whitening` and their negatives, so that an activation function
    loses neither sign. A bias is set to 0 and stays trainable.

    images: float (n, C, H, W), as the network will see them. Raises ValueError unless conv has
    square kernels, no groups or dilation and 2 · C · k² output channels.

    >>> conv = nn.Conv2d(3, 24, 2)
    >>> whiten_conv_(conv, torch.randn(9, 3, 8, 8))
    >>> torch.equal(conv.weight[12:], -conv.weight[:12]), conv.weight.requires_grad
    (True, False)
    """
    size = conv.in_channels * conv.kernel_size[0] ** 2
    square = conv.kernel_size[0] == conv.kernel_size[1]
    plain = conv.groups == 1 and conv.dilation == (1, 1)
    if not square or not plain or conv.out_channels != 2 * size:
        raise ValueError(f"whitening needs square kernels and {2 * size} channels out, got {conv}")
    kernels = patch_whitening(images, conv.kernel_size[0], eps)
    conv.weight.copy_(torch.cat((kernels, -kernels)))
    conv.weight.requires_grad_(False)
    if conv.bias is not None:
        conv.bias.zero_()
