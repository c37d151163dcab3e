"""Progressive resizing: sizes by the step, literal and at the ends; torch's own resize."""

import pytest
import torch
import torch.nn.functional as F

from tricks.progressive import progressive_size, resize_batch


def test_sizes():
    sizes = [progressive_size(step, 100, start=24, full=64, until=0.5, multiple=8)
             for step in range(100)]  # fmt: skip
    assert sizes[:10] == [24] * 10 and sizes[10] == 32 and sizes[49] == 56
    assert sizes[50:] == [64] * 50
    assert sizes == sorted(sizes) and set(sizes) == {24, 32, 40, 48, 56, 64}


@pytest.mark.parametrize("total", [1, 2, 3, 200])
def test_the_first_and_the_last_step(total):
    sizes = [progressive_size(step, total, 20, 32) for step in range(total)]
    assert sizes[0] == (32 if total == 1 else 20)
    assert sizes[-1] == 32


def test_a_size_that_does_not_grow():
    assert {progressive_size(step, 9, 32, 32) for step in range(9)} == {32}


@pytest.mark.parametrize(
    "arguments",
    [{"start": 0}, {"start": 33}, {"until": 0.0}, {"until": 1.1}, {"multiple": 0}, {"step": -1}],
)
def test_refused(arguments):
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        progressive_size(**{"step": 0, "total_steps": 9, "start": 20, "full": 32, **arguments})


def test_images_are_resized_and_keep_their_format():
    images = torch.rand(3, 3, 10, 10).contiguous(memory_format=torch.channels_last)
    small = resize_batch(images, 7)
    assert small.shape == (3, 3, 7, 7)
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(small.mean((2, 3)), images.mean((2, 3)), atol=0.03)
    reference = F.interpolate(images.contiguous(), 7, mode="bilinear", antialias=True)
    assert torch.allclose(small, reference, atol=1e-6)
    assert resize_batch(images, 10) is images


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    images = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    small = resize_batch(images, 7)
    assert small.dtype == dtype and torch.equal(small, resize_batch(images.float(), 7).to(dtype))
