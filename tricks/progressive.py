"""Progressive resizing: small images in the first steps, the full size in the last.

Howard et al. for DAWNBench, https://www.fast.ai/posts/2018-08-10-fastai-diu-imagenet.html, 2018;
the ramp as in Tan and Le, "EfficientNetV2", ICML 2021, section 4, https://arxiv.org/abs/2104.00298
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["progressive_size", "resize_batch"]


def progressive_size(
    step: int, total_steps: int, start: int, full: int, until: float = 0.6, multiple: int = 4
) -> int:
    """Pixels a side for optimizer step `step`, counted from 0.

    It grows linearly from `start` at the first step to `full` after the share `until` of all steps,
    and stays at `full`: the last steps, in which the rate is small and BatchNorm's statistics
    settle, see images of the evaluated size. Rounded down to `start` plus a multiple of `multiple`,
    as code and memory are prepared for each new size.

    Raises ValueError unless 1 ≤ start ≤ full, 0 < until ≤ 1, multiple ≥ 1 and 0 ≤ step.

    >>> [progressive_size(step, total_steps=10, start=20, full=32) for step in range(10)]
    [20, 20, 24, 24, 28, 28, 32, 32, 32, 32]
    """
    if not 1 <= start <= full:
        raise ValueError(f"the first size must be in [1, {full}], got {start}")
    if not 0 < until <= 1 or multiple < 1 or step < 0:
        raise ValueError(
            f"until must be in (0, 1], multiple ≥ 1 and step ≥ 0, got {until}, {multiple}, {step}"
        )
    if step >= min(until * total_steps, total_steps - 1):  # the last step is always full
        return full
    grown = (full - start) * step / (until * total_steps)
    return start + int(grown) // multiple * multiple


def resize_batch(images: Tensor, size: int) -> Tensor:
    """Images (n, C, H, W), float, resized to size × size: bilinear, antialiased.

    The memory format and dtype are kept. Images of that size are returned as they are.

    >>> import torch
    >>> resize_batch(torch.arange(16.0).view(1, 1, 4, 4), 2).view(2, 2).round()
    tensor([[ 4.,  5.],
            [10., 11.]])
    """
    if images.shape[-2:] == (size, size):
        return images
    # The CPU has no such kernel in 16 bits
    pixels = images.float() if images.device.type == "cpu" else images
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True).to(images.dtype)
