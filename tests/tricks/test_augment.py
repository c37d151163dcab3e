"""Crop, flip, resized crop, erase, normalise: torchvision's results and distributions."""

from collections import Counter

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from tricks.augment import (
    _erase_at_once,
    _erase_each,
    _resize_at_once,
    crop_batch,
    draw_crops,
    draw_erasing,
    draw_flips,
    draw_resized_crops,
    erase_batch,
    flip_batch,
    normalize_batch,
    resized_crop_batch,
)

SHAPES = [(1, 3, 32, 32), (7, 3, 32, 48), (5, 1, 31, 33), (3, 3, 1, 7)]
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=seeded(5), dtype=torch.uint8)


def assert_same_distribution(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Kolmogorov–Smirnov on each column of two (n, k) samples, at a significance under 1e-3."""
    for a, b in zip(ours.double().T, theirs.double().T, strict=True):
        points = torch.cat((a, b)).sort().values
        cdf_a, cdf_b = (
            torch.searchsorted(x.sort().values, points, right=True) / len(x) for x in (a, b)
        )
        assert (cdf_a - cdf_b).abs().max() < 2.0 * (1 / len(a) + 1 / len(b)) ** 0.5


def most_common(boxes) -> tuple[int, ...]:
    return Counter(tuple(box) for box in boxes).most_common(1)[0][0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("padding", "fill"), [(4, 0), (1, 9), (0, 0)])
def test_crop_equals_pad_then_crop(shape, padding, fill):
    images = random_images(*shape)
    before = images.clone()
    n, _, height, width = shape
    offsets = draw_crops(n, padding, seeded())
    offsets[0] = 2 * padding  # the far end of the range
    padded = TF.pad(images, [padding], fill=fill)
    expected = [
        TF.crop(x, top, left, height, width)
        for x, (top, left) in zip(padded, offsets.tolist(), strict=True)
    ]
    cropped = crop_batch(images, offsets, padding, fill)
    assert torch.equal(cropped, torch.stack(expected))
    assert cropped.is_contiguous() and torch.equal(images, before)


def test_crop_offsets_are_uniform():
    offsets = draw_crops(9_000, 4, seeded())
    for column in offsets.T:
        counts = column.bincount(minlength=9)
        assert len(counts) == 9
        assert (counts - 1000).abs().max() < 4 * 1000**0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_mirrors_what_was_drawn(shape):
    images = random_images(*shape)
    before = images.clone()
    flips = draw_flips(shape[0], generator=seeded(3))
    expected = [TF.horizontal_flip(x) if f else x for x, f in zip(images, flips, strict=True)]
    assert torch.equal(flip_batch(images, flips), torch.stack(expected))
    assert torch.equal(images, before)
    assert torch.equal(flip_batch(images, torch.ones(shape[0], dtype=torch.bool)), images.flip(-1))


@pytest.mark.parametrize("flips", [torch.tensor([True]), torch.ones(8).bool(), torch.tensor(True)])
def test_a_flip_for_each_image(flips):
    """One flip for nine images would mirror all of them, or none."""
    with pytest.raises(ValueError, match=r"9 images need flips \(9,\), got \("):
        flip_batch(random_images(9, 3, 4, 5), flips)
    assert flip_batch(random_images(0, 3, 4, 5), draw_flips(0)).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_flip_probability(p):
    assert abs(draw_flips(10_000, p, seeded()).float().mean() - p) <= 4 * (p * (1 - p) / 1e4) ** 0.5


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 48), {}),
        ((9, 7), {"scale": (0.5, 1.0)}),  # small: rounding matters
        ((20, 60), {"scale": (0.3, 1.0), "ratio": (0.5, 2.0)}),  # often nothing fits
    ],
)
def test_resized_crops_have_torchvisions_distribution(size, options):
    boxes = draw_resized_crops(20_000, *size, **options, generator=seeded())
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8, **options)
    image = torch.empty(3, *size)
    drawn = [list(transform.make_params([image]).values()) for _ in range(3_000)]
    assert_same_distribution(boxes, torch.tensor(drawn))


@pytest.mark.parametrize("size", [(10, 40), (40, 10), (300, 320)])
def test_resized_crop_falls_back_to_torchvisions_central_box(size):
    options = {"scale": (1.0, 1.0), "ratio": (0.5, 2.0)}  # no box fits, or hardly ever
    transform = v2.RandomResizedCrop(8, **options)
    torch.manual_seed(0)
    theirs = [transform.make_params([torch.empty(3, *size)]).values() for _ in range(50)]
    ours = draw_resized_crops(50, *size, **options, generator=seeded())
    assert most_common(ours.tolist()) == most_common(theirs)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((40, 3, 32, 48), 32), ((20, 1, 31, 33), 40), ((20, 3, 64, 40), 24), ((3, 3, 160, 200), 50)],
)
def test_resized_crop_equals_interpolation(shape, size):
    images = random_images(*shape)
    before = images.clone()
    boxes = draw_resized_crops(shape[0], *shape[2:], generator=seeded())
    boxes[0] = torch.tensor([0, 0, *shape[2:]])
    boxes[1] = torch.tensor([shape[2] - 1, shape[3] - 1, 1, 1])
    each, at_once = (f(images, boxes, size) for f in (resized_crop_batch, _resize_at_once))
    exact, native = (
        torch.stack(
            [
                TF.resized_crop(x, *box, [size, size], antialias=True)
                for x, box in zip(source, boxes.tolist(), strict=True)
            ]
        )
        for source in (images.float(), images)
    )
    halfway = ((exact - exact.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(at_once[~halfway], exact.round().to(torch.uint8)[~halfway])
    assert halfway.float().mean() < 0.05
    assert torch.equal(each, native)  # on a CPU; a GPU gets the other
    assert (at_once.int() - native.int()).abs().max() <= 1
    assert each.shape == (*shape[:2], size, size) and torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_resized_crops_of_floats_keep_their_dtype_on_both_paths(dtype):
    images = (random_images(9, 3, 20, 28).double() / 255 - 0.4).to(dtype)
    boxes = draw_resized_crops(9, 20, 28, generator=seeded())
    each, at_once = (f(images, boxes, 16) for f in (resized_crop_batch, _resize_at_once))
    assert each.dtype == at_once.dtype == dtype
    exact = torch.stack(
        [
            TF.resized_crop(x, *box, [16, 16], antialias=True)
            for x, box in zip(images.double(), boxes.tolist(), strict=True)
        ]
    )
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-14 if dtype == torch.float64 else 2e-6}
    for resized in (each, at_once):
        torch.testing.assert_close(resized.double(), exact, **rounding)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool])
def test_a_resized_crop_of_other_numbers_is_refused(dtype):
    with pytest.raises(ValueError, match=f"uint8 or floating point, got {dtype}"):
        resized_crop_batch(torch.zeros(1, 3, 8, 8, dtype=dtype), torch.tensor([[0, 0, 8, 8]]), 8)


def test_gradients_pass_through_a_resized_crop():
    boxes = draw_resized_crops(5, 20, 28, generator=seeded())
    gradients = []
    for resize in (resized_crop_batch, _resize_at_once):
        images = random_images(5, 3, 20, 28).float().requires_grad_()
        resize(images, boxes, 16).square().sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-2)


def test_a_crop_of_its_own_size_is_unchanged():
    images = random_images(4, 3, 24, 30)
    boxes = torch.tensor([[0, 6, 24, 24], [0, 0, 24, 24], [0, 3, 24, 24], [0, 1, 24, 24]])
    expected = torch.stack(
        [images[i, :, :, left : left + 24] for i, left in enumerate((6, 0, 3, 1))]
    )
    assert torch.equal(resized_crop_batch(images, boxes, 24), expected)


@pytest.mark.parametrize(
    ("size", "options"),
    [((32, 48), {}), ((8, 8), {}), ((12, 40), {"scale": (0.5, 1.0), "ratio": (0.3, 3.3)})],
)
def test_erasing_has_torchvisions_distribution(size, options):
    n = 20_000
    boxes = draw_erasing(n, *size, p=1.0, **options, generator=seeded())
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor(size)).all()
    torch.manual_seed(0)
    transform = v2.RandomErasing(p=1.0, **options)
    drawn = []
    for _ in range(3_000):
        box = transform.make_params([torch.empty(3, *size)])
        fits = box["v"] is not None
        drawn.append([box[key] * fits for key in "ijhw"])
    assert_same_distribution(boxes, torch.tensor(drawn))


def test_erasing_probability():
    boxes = draw_erasing(10_000, 32, 32, p=0.25, generator=seeded())
    erased = (boxes[:, 2] * boxes[:, 3] > 0).float().mean()
    assert abs(erased - 0.25) < 4 * (0.25 * 0.75 / 10_000) ** 0.5
    assert not draw_erasing(100, 32, 32, p=0.0).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["uint8", "float", "channels_last"])
def test_erase_equals_torchvision(shape, kind):
    images = random_images(*shape)
    if kind != "uint8":
        images = images.float() - 100
    if kind == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    boxes = draw_erasing(shape[0], *shape[2:], p=0.7, generator=seeded(1))
    erased = erase_batch(images, boxes, value=3.0)
    value = torch.tensor(3.0).to(images.dtype)
    expected = [TF.erase(x, *box, value) for x, box in zip(images, boxes.tolist(), strict=True)]
    assert torch.equal(erased, torch.stack(expected))
    assert torch.equal(_erase_at_once(images.clone(), boxes, 3.0), erased)  # as on a GPU
    assert erased.dtype == images.dtype and erased.stride() == images.stride()
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "box",
    [[-1, 1, 3, 2], [2, 3, 9, 9], [0, -2, 2, 3], [-2, -2, 9, 9], [6, 6, 2, 2], [-3, 0, 2, 4],
     [1, 1, -1, 3], [3, 4, -2, -2]],
)  # fmt: skip
def test_only_what_of_a_box_is_inside_is_erased_on_both_paths(box):
    images = torch.arange(1.0, 41.0).view(2, 1, 4, 5)
    top, left, height, width = box
    expected = images.clone()
    for y in range(4):
        for x in range(5):
            if top <= y < top + height and left <= x < left + width:
                expected[0, 0, y, x] = 0.5
    boxes = torch.tensor([box, [0, 0, 0, 0]])
    for erase in (_erase_each, _erase_at_once):
        assert torch.equal(erase(images.clone(), boxes, 0.5), expected), erase
    assert torch.equal(erase_batch(images, boxes, 0.5), expected)


@pytest.mark.parametrize("erase", [_erase_each, _erase_at_once])
def test_what_is_erased_has_no_gradient(erase):
    images = random_images(5, 3, 8, 9).float().requires_grad_()
    boxes = draw_erasing(5, 8, 9, p=0.8, generator=seeded(1))
    erased = erase(images.clone(), boxes, 300.0)
    erased.square().sum().backward()
    inside = erased.detach() == 300
    assert inside.any()
    assert torch.equal(images.grad, torch.where(inside, 0, 2 * images.detach()))


@pytest.mark.parametrize("shape", SHAPES)
def test_normalize_equals_torchvision(shape):
    images = random_images(*shape)
    mean, std = MEAN[: shape[1]], STD[: shape[1]]
    expected = TF.normalize(TF.to_dtype(images, torch.float32, scale=True), mean, std)
    normalized = normalize_batch(images, mean, std)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalized, expected, rtol=0, atol=1e-6)
    half = normalize_batch(images, mean, std, torch.bfloat16)
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, normalized.bfloat16())


def test_a_slice_of_the_batch_is_the_batch_of_the_slice():
    images = random_images(11, 3, 20, 28)
    crops, flips = draw_crops(11, 3, seeded()), draw_flips(11, generator=seeded())
    boxes = draw_resized_crops(11, 20, 28, generator=seeded())
    erasing = draw_erasing(11, 20, 28, p=0.8, generator=seeded())

    def augment(rows: slice) -> list[torch.Tensor]:
        part = images[rows]
        return [
            crop_batch(part, crops[rows], 3),
            flip_batch(part, flips[rows]),
            resized_crop_batch(part, boxes[rows], 16),
            erase_batch(part, erasing[rows], 7),
        ]

    whole = augment(slice(0, 11))
    for a, b in [(0, 1), (3, 8), (8, 11)]:
        for part, full in zip(augment(slice(a, b)), whole, strict=True):
            assert torch.equal(part, full[a:b])


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: draw_crops(20, 4, g),
        lambda g: draw_flips(20, generator=g),
        lambda g: draw_resized_crops(20, 32, 32, generator=g),
        lambda g: draw_erasing(20, 32, 32, p=0.5, generator=g),
    ],
    ids=["crops", "flips", "resized_crops", "erasing"],
)
def test_draws_come_from_the_generator_alone(draw):
    state = torch.get_rng_state()
    first, again, other = draw(seeded()), draw(seeded()), draw(seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def of_samples(chosen, width=40):
    """A generator that is a function: it gives sample i the numbers of row i of one table."""
    rows, columns = torch.rand(20, width, generator=seeded(), dtype=torch.float64), [0]

    def numbers(n, k):
        assert n == len(chosen)
        columns.append(columns[-1] + k)
        return rows[chosen, columns[-2] : columns[-1]]

    return numbers


@pytest.mark.parametrize(
    "draw",
    [
        lambda n, g: draw_crops(n, 4, g),
        lambda n, g: draw_flips(n, generator=g),
        lambda n, g: draw_resized_crops(n, 32, 32, generator=g),
        lambda n, g: draw_erasing(n, 32, 32, p=0.5, generator=g),
    ],
    ids=["crops", "flips", "resized_crops", "erasing"],
)
def test_samples_with_numbers_of_their_own_are_drawn_alike_in_any_company(draw):
    whole = draw(20, of_samples(list(range(20))))
    assert len(whole.unique(dim=0)) > 1
    for chosen in ([4], [19, 0, 7], list(range(3, 14))):
        assert torch.equal(draw(len(chosen), of_samples(chosen)), whole[chosen])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"scale .*\(0.5, 0.1\)"):
        draw_resized_crops(2, 8, 8, scale=(0.5, 0.1))
    with pytest.raises(ValueError, match=r"ratio .*\(0, 1\)"):
        draw_erasing(2, 8, 8, ratio=(0, 1))
    with pytest.raises(ValueError, match=r"std .*\(0.2, 0.0, 0.2\)"):
        normalize_batch(random_images(2, 3, 8, 8), MEAN, (0.2, 0.0, 0.2))
    with pytest.raises(ValueError, match=r"uint8, got torch.float32"):
        normalize_batch(torch.rand(2, 3, 8, 8), MEAN, MEAN)


@pytest.mark.parametrize("offset", [-1, 5])
def test_a_crop_drawn_for_another_padding(offset):
    """It would show pixels of another image."""
    offsets = torch.tensor([[0, 4], [offset, 2]])
    with pytest.raises(ValueError, match="from 0 to 4"):
        crop_batch(random_images(2, 3, 8, 8), offsets, 2)
    assert crop_batch(random_images(0, 3, 8, 8), offsets[:0], 2).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("box", [[-1, 0, 4, 4], [0, 5, 4, 4], [5, 0, 4, 4], [0, 0, 0, 4]])
def test_a_box_that_is_not_inside(box):
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        resized_crop_batch(random_images(2, 3, 8, 8), torch.tensor([[0, 0, 8, 8], box]), 8)


def test_autocast_changes_no_pixel():
    images, boxes = random_images(8, 3, 40, 40), draw_resized_crops(8, 40, 40, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        found = _resize_at_once(images, boxes, 32)
    assert torch.equal(found, _resize_at_once(images, boxes, 32))
