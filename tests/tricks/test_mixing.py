"""mixup and CutMix: the pairs, the draws, the blends, and the λ that comes back."""

import itertools
import math

import pytest
import torch
from torchvision.transforms import v2

from tricks.cutmix import box_around, cutmix_batch, draw_cutmix
from tricks.mixup import draw_mixup, mixup_batch, neighbour_pairs

H, W = 32, 48


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_batch(n, height=H, width=W, classes=7):
    """Images whose values are all distinct, channels_last, and one-hot targets."""
    images = torch.arange(n * 3 * height * width, dtype=torch.float32)
    images = images.view(n, 3, height, width).contiguous(memory_format=torch.channels_last)
    return images, torch.eye(classes)[torch.arange(n) % classes]


# --- who is mixed with whom ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, [0]),
        (2, [1, 0]),
        (3, [1, 2, 0]),
        (4, [1, 0, 3, 2]),
        (5, [1, 0, 3, 4, 2]),
        (7, [1, 0, 3, 2, 5, 6, 4]),
    ],
)
def test_neighbour_pairs_table(n, expected):
    pairs = neighbour_pairs(n)
    assert pairs.tolist() == expected
    assert pairs.dtype == torch.int64


@pytest.mark.parametrize("n", range(2, 20))
def test_every_sample_gives_once_and_none_to_itself(n):
    pairs = neighbour_pairs(n)
    assert sorted(pairs.tolist()) == list(range(n))
    assert (pairs != torch.arange(n)).all()


@pytest.mark.parametrize("slices", [1, 2, 3, 4, 6])
def test_mixing_does_not_depend_on_who_shares_the_batch(slices):
    images, targets = make_batch(24, 4, 6)
    whole_images, whole_targets = mixup_batch(images, targets, 0.3, neighbour_pairs(24))
    parts = [
        mixup_batch(x, t, 0.3, neighbour_pairs(len(x)))
        for x, t in zip(images.chunk(slices), targets.chunk(slices), strict=True)
    ]
    assert torch.equal(torch.cat([x for x, _ in parts]), whole_images)
    assert torch.equal(torch.cat([t for _, t in parts]), whole_targets)


def test_an_empty_batch_has_no_pairs():
    with pytest.raises(ValueError, match="got 0"):
        neighbour_pairs(0)


# --- λ ------------------------------------------------------------------------------------------


def largest_cdf_gap(values, cdf):
    """Kolmogorov and Smirnov's statistic."""
    values = sorted(values)
    n = len(values)
    return max(max((i + 1) / n - cdf(v), cdf(v) - i / n) for i, v in enumerate(values))


@pytest.mark.parametrize(
    ("alpha", "cdf"),
    [
        (0.5, lambda x: 2 / math.pi * math.asin(math.sqrt(x))),  # the arcsine distribution
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
    ],
)
def test_lambda_is_beta_distributed(alpha, cdf):
    generator = seeded()
    lams = [draw_mixup(alpha, generator) for _ in range(4000)]
    assert largest_cdf_gap(lams, cdf) < 1.63 / math.sqrt(len(lams))  # p = 0.01


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.2, 10.0])
def test_lambda_moments(alpha):
    generator = seeded(1)
    lams = torch.tensor([draw_mixup(alpha, generator) for _ in range(4000)], dtype=torch.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    assert lams.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 4000))
    assert lams.var().item() == pytest.approx(variance, rel=0.08)
    assert lams.min() >= 0 and lams.max() <= 1


@pytest.mark.parametrize("draw", [draw_mixup, lambda a, g: draw_cutmix(a, H, W, g)])
def test_a_draw_is_its_generators_and_leaves_the_global_one_alone(draw):
    before = torch.get_rng_state()
    assert draw(0.7, seeded(3)) == draw(0.7, seeded(3))
    assert draw(0.7, seeded(3)) != draw(0.7, seeded(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_a_wrong_alpha_is_named(alpha):
    with pytest.raises(ValueError, match=str(alpha)):
        draw_mixup(alpha)
    with pytest.raises(ValueError, match=str(alpha)):
        draw_cutmix(alpha, H, W)


# --- mixup --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixup_equals_torchvision(n, lam):
    images, targets = make_batch(n)
    expected = v2.MixUp(num_classes=7).transform(
        images, {"lam": lam, "labels": targets, "batch_size": n}
    )
    partner = torch.arange(n).roll(1)
    mixed, soft = mixup_batch(images, targets, lam, partner)
    torch.testing.assert_close(mixed, expected)
    for i in range(n):
        by_hand = [lam * a + (1 - lam) * b for a, b in zip(targets[i], targets[i - 1], strict=True)]
        torch.testing.assert_close(soft[i], torch.stack(by_hand))


def test_mixup_equals_timm():
    mixup = pytest.importorskip("timm.data.mixup", reason="parity with timm").Mixup(
        mixup_alpha=1.0, label_smoothing=0.0, num_classes=7
    )
    images, targets = make_batch(6)
    expected = images.clone()
    mixup._params_per_batch = lambda: (0.3, False)
    expected, expected_targets = mixup(expected, targets.argmax(1))
    mixed, soft = mixup_batch(images, targets, 0.3, torch.arange(6).flip(0))
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(soft, expected_targets)


def mix(trick, images, targets, permutation):
    if trick == "mixup":
        return mixup_batch(images, targets, 0.3, permutation)
    return cutmix_batch(images, targets, (4, 6, 10, 20), permutation)[:2]


@pytest.mark.parametrize("trick", ["mixup", "cutmix"])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_a_blend_keeps(trick, n, dtype):
    images, targets = make_batch(n)
    images = images.to(dtype).contiguous(memory_format=torch.channels_last)
    originals = images.clone(), targets.clone()
    mixed, soft = mix(trick, images, targets, neighbour_pairs(n))

    assert mixed.dtype == dtype and mixed.shape == images.shape
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(n))
    assert torch.equal(images, originals[0]) and torch.equal(targets, originals[1])
    assert mixed.data_ptr() != images.data_ptr()
    if n == 1:
        assert torch.equal(mixed, images) and torch.equal(soft, targets)


@pytest.mark.parametrize("trick", ["mixup", "cutmix"])
def test_targets_that_are_soft_already_stay_distributions(trick):
    images, _ = make_batch(5)
    targets = torch.rand(5, 7, generator=seeded()).softmax(dim=1)
    _, soft = mix(trick, images, targets, neighbour_pairs(5))
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(5))


@pytest.mark.parametrize("trick", ["mixup", "cutmix"])
def test_what_does_not_fit_is_refused(trick):
    images, targets = make_batch(4)
    pairs = neighbour_pairs(4)
    with pytest.raises(ValueError, match=r"targets \(4, classes\).*\(3, 7\)"):
        mix(trick, images, targets[:3], pairs)
    with pytest.raises(ValueError, match=r"permutation \(4,\).*\(3,\)"):
        mix(trick, images, targets, pairs[:3])
    with pytest.raises(ValueError, match="int64"):
        mix(trick, images, targets.long(), pairs)


@pytest.mark.parametrize("lam", [-0.1, 1.1, math.nan])
def test_mixup_refuses_a_lambda_out_of_range(lam):
    with pytest.raises(ValueError, match=str(lam)):
        mixup_batch(*make_batch(2), lam, neighbour_pairs(2))


def test_mixup_refuses_bytes():
    images, targets = make_batch(2)
    with pytest.raises(ValueError, match="uint8"):
        mixup_batch(images.to(torch.uint8), targets, 0.5, neighbour_pairs(2))


# --- CutMix -------------------------------------------------------------------------------------


def test_lambda_equals_the_counted_pixels_for_every_box():
    height, width = 5, 7
    images = torch.tensor([0, 1], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, height, width)
    spans = [
        [(start, end - start) for start in range(side + 1) for end in range(start, side + 1)]
        for side in (height, width)
    ]
    boxes = [(t, left, h, w) for (t, h), (left, w) in itertools.product(*spans)]
    assert len(boxes) == 21 * 36
    for box in boxes:
        pasted, soft, lam = cutmix_batch(images, torch.eye(2), box, torch.tensor([1, 0]))
        foreign = pasted[0, 0].float().mean().item()
        assert lam == pytest.approx(1 - foreign, abs=1e-6)
        torch.testing.assert_close(soft, torch.tensor([[lam, 1 - lam], [1 - lam, lam]]))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("box", [(4, 30, 20, 18), (0, 0, H, W), (31, 47, 1, 1), (3, 3, 0, 0)])
def test_cutmix_equals_torchvision(n, box):
    images, targets = make_batch(n)
    top, left, height, width = box
    params = {"box": (left, top, left + width, top + height), "labels": None, "batch_size": n}
    expected = v2.CutMix(num_classes=7).transform(images, params)
    pasted, _, _ = cutmix_batch(images, targets, box, torch.arange(n).roll(1))
    assert torch.equal(pasted, expected)


@pytest.mark.parametrize(
    ("centre", "lam", "box"),
    [
        ((16, 24), 0.75, (8, 12, 16, 24)),  # half of each side
        ((16, 24), 0.0, (0, 0, 32, 48)),  # the whole image
        ((16, 24), 1.0, (16, 24, 0, 0)),  # nothing
        ((0, 0), 0.75, (0, 0, 8, 12)),  # three quarters are cut off at a corner
        ((31, 47), 0.75, (23, 35, 9, 13)),
        ((0, 47), 0.0, (0, 23, 16, 25)),
    ],
)
def test_box_table(centre, lam, box):
    assert box_around(*centre, lam, H, W) == box


def test_unclipped_boxes_leave_lambda():
    for lam in torch.linspace(0, 1, 41).tolist():
        _, _, height, width = box_around(500, 750, lam, 1000, 1500)
        assert 1 - height * width / 1_500_000 == pytest.approx(lam, abs=2e-3)


def test_drawn_boxes_lie_in_the_image_and_reach_every_pixel():
    generator, covered = seeded(), torch.zeros(H, W, dtype=torch.bool)
    for _ in range(400):
        (top, left, height, width), lam = draw_cutmix(1.0, H, W, generator)
        assert 0 <= top <= top + height <= H and 0 <= left <= left + width <= W
        assert lam == 1 - height * width / (H * W)
        covered[top : top + height, left : left + width] = True
    assert covered.all()


@pytest.mark.parametrize("alpha", [0.01, 0.2, 4.0])
def test_the_box_is_drawn_with_the_same_beta_as_mixups_lambda(alpha):
    for seed in range(20):
        generator = seeded(seed)
        lam = draw_mixup(alpha, generator)
        row, column = (int(torch.randint(side, (), generator=generator)) for side in (H, W))
        box, _ = draw_cutmix(alpha, H, W, seeded(seed))
        assert box == box_around(row, column, lam, H, W)


def test_mean_lambda_equals_torchvisions():
    generator, theirs = seeded(), v2.CutMix(alpha=1.0, num_classes=7)
    image = torch.zeros(1, 3, H, W)
    ours = [draw_cutmix(1.0, H, W, generator)[1] for _ in range(2000)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = [theirs.make_params([image])["lam_adjusted"] for _ in range(2000)]
    # s.d. of the difference 0.24·√(2/2000) = 0.008; torchvision rounds sides down to even, 1 %
    assert sum(ours) / 2000 == pytest.approx(sum(expected) / 2000, abs=0.03)


@pytest.mark.parametrize("box", [(-1, 0, 4, 4), (0, -1, 4, 4), (30, 0, 3, 4), (0, 45, 4, 4)])
def test_a_box_that_leaves_the_image_is_refused(box):
    with pytest.raises(ValueError, match="32×48"):
        cutmix_batch(*make_batch(2), box, neighbour_pairs(2))


def test_sides_are_not_swapped():
    box = (0, 0, 4, 40)  # fits 32×48, not 48×32
    cutmix_batch(*make_batch(2), box, neighbour_pairs(2))
    with pytest.raises(ValueError, match="48×32"):
        cutmix_batch(*make_batch(2, W, H), box, neighbour_pairs(2))


@pytest.mark.parametrize(("height", "width"), [(0, 4), (4, 0)])
def test_no_box_for_an_image_without_pixels(height, width):
    with pytest.raises(ValueError, match=f"{height}×{width}"):
        draw_cutmix(1.0, height, width)
