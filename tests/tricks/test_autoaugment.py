"""The operations equal torchvision's bit for bit; the draws have torchvision's distribution."""

import math
from collections import Counter

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2.functional._geometry import _affine_grid

from tricks import autoaugment
from tricks.autoaugment import (
    OPERATIONS,
    Ops,
    apply_ops,
    draw_autoaugment,
    draw_randaugment,
    draw_trivialaugment,
)

POLICIES = {
    "cifar10": v2.AutoAugmentPolicy.CIFAR10,
    "imagenet": v2.AutoAugmentPolicy.IMAGENET,
    "svhn": v2.AutoAugmentPolicy.SVHN,
}
DRAWS = {
    "randaugment": draw_randaugment,
    "trivialaugment": draw_trivialaugment,
    "autoaugment": draw_autoaugment,
}
SHAPES = [(3, 32, 32), (3, 32, 48), (3, 31, 33), (1, 9, 8), (3, 1, 7), (3, 5, 1), (1, 2, 9)]
SHAPES += [(3, 2, 2), (3, 3, 3)]
SPACES = {  # torchvision's own tables, with the number of levels they are used with
    "randaugment": (v2.RandAugment()._AUGMENTATION_SPACE, 31),
    "trivialaugment": (v2.TrivialAugmentWide()._AUGMENTATION_SPACE, 31),
    "autoaugment": (v2.AutoAugment()._AUGMENTATION_SPACE, 10),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample_images(channels: int, height: int, width: int) -> torch.Tensor:
    """Random, constant, two-valued and gradient images."""
    shape = (channels, height, width)
    noise = torch.randint(0, 256, (2, *shape), generator=seeded(), dtype=torch.uint8)
    two_values = torch.where(noise[0] < 128, 13, 200).to(torch.uint8)
    across = torch.linspace(0, 255, width).expand(shape).to(torch.uint8)
    through = torch.linspace(20, 230, height * width).view(height, width).expand(shape)
    flat = [torch.full(shape, v, dtype=torch.uint8) for v in (0, 7, 255)]
    return torch.stack([*noise, two_values, across, through.to(torch.uint8), *flat])


def torchvision_op(images: torch.Tensor, name: str, m: float, fill: int | None = None):
    """One operation of torchvision's, on an image or on all images of a batch."""
    transform = v2.RandAugment(fill=fill)
    nearest = v2.InterpolationMode.NEAREST
    return transform._apply_image_or_video_transform(images, name, m, nearest, transform._fill)


def magnitudes(space: str, name: str, height: int, width: int) -> list[float]:
    """All signed magnitudes of an operation, from torchvision's table."""
    table, bins = SPACES[space]
    levels, signed = table[name]
    values = levels(bins, height, width)
    if values is None:
        return [0.0]
    values = [float(value) for value in values]
    return values + [-value for value in values] if signed else values


def bmm_fuses() -> bool:
    """Whether this machine's bmm fuses multiply and add, which torchvision's grid then inherits."""
    theta = torch.tensor([[0.9, 0.3, 1.7], [-0.3, 0.9, 0.1]])
    grid = _affine_grid(theta[None].clone(), w=33, h=31, ow=33, oh=31)
    a, b, c = (theta / torch.tensor([[16.5], [15.5]])).unbind(1)
    x, y = torch.linspace(-16, 16, 33).view(1, -1, 1), torch.linspace(-15, 15, 31).view(-1, 1, 1)
    return not torch.equal(grid[0], a * x + b * y + c)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_and_level_equals_torchvision(name):
    fuses = name in OPERATIONS[1:6] and bmm_fuses()
    compared = 0
    for shape in SHAPES:
        images = sample_images(*shape)
        n = len(images)
        values = {
            m
            for s, (table, _) in SPACES.items()
            if name in table
            for m in magnitudes(s, name, *shape[1:])
        }
        for m in sorted(values):
            ops = Ops(torch.full((n, 1), OPERATIONS.index(name)), torch.full((n, 1), m))
            ours = apply_ops(images, ops).flatten(1)
            theirs = torchvision_op(images, name, m).flatten(1)
            if name == "Contrast" and ours.shape[1] % 16:
                assert (ours[:, -15:].int() - theirs[:, -15:]).abs().max() <= 1
                ours, theirs = ours[:, :-15], theirs[:, :-15]
            if fuses:
                assert (ours != theirs).sum() <= 0.02 * ours.numel()
            else:
                assert torch.equal(ours, theirs), (shape, m)
            compared += 1
    assert compared >= len(SHAPES)


def test_fill_is_torchvisions():
    images = sample_images(3, 12, 17)
    for name in OPERATIONS[1:6]:
        m = 3.0 if "Translate" in name else 0.3 if "Shear" in name else 30.0
        ops = Ops(torch.full((8, 1), OPERATIONS.index(name)), torch.full((8, 1), m))
        theirs = torchvision_op(images, name, m, fill=77)
        assert (apply_ops(images, ops, fill=77) != theirs).float().mean() <= 0.02 * bmm_fuses()


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_slots_follow_each_other(draw):
    images = torch.randint(0, 256, (101, 3, 16, 24), generator=seeded(1), dtype=torch.uint8)
    ops = draw(101, 16, 24, generator=seeded())
    theirs = []
    for image, row, values in zip(images, ops.op.tolist(), ops.magnitude.tolist(), strict=True):
        for op, m in zip(row, values, strict=True):
            image = torchvision_op(image, OPERATIONS[op], m)
        theirs.append(image)
    differ = (apply_ops(images, ops) != torch.stack(theirs)).float().mean()
    assert differ <= 0.02 * bmm_fuses()


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_slice_of_the_batch_is_the_batch_of_the_slice(draw):
    images = torch.randint(0, 256, (37, 3, 15, 20), generator=seeded(), dtype=torch.uint8)
    before = images.clone()
    ops = draw(37, 15, 20, generator=seeded())
    whole = apply_ops(images, ops)
    assert torch.equal(images, before)
    for a, b in [(0, 1), (5, 5), (5, 12), (12, 37)]:
        part = apply_ops(images[a:b], Ops(*(t[a:b] for t in ops)))
        assert torch.equal(part, whole[a:b])


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_in_parts_that_fit_a_cache_as_at_once(draw, monkeypatch):
    images = torch.randint(0, 256, (37, 3, 16, 24), generator=seeded(), dtype=torch.uint8)
    ops = draw(37, 16, 24, generator=seeded())
    whole = apply_ops(images, ops, fill=9)
    for count in (1, 2):
        monkeypatch.setattr(autoaugment, "CACHED", count * images[0].numel())
        assert torch.equal(apply_ops(images, ops, fill=9), whole)


@pytest.mark.parametrize("by", [-30, -24, -23, -1, 0, 1, 23, 24, 30])
@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
def test_a_translation_of_its_own_is_that_of_the_others(name, by):
    images = torch.randint(0, 256, (1, 3, 24, 24), generator=seeded(), dtype=torch.uint8)
    theirs = autoaugment._move(images, [name], [by + 0.3], 9)
    assert torch.equal(autoaugment._shift(images, [name], [by + 0.3], 9), theirs)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_come_from_the_generator_alone(draw):
    state = torch.get_rng_state()
    first, again, other = (draw(50, 32, 32, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.op, other.op)
    assert first.op.dtype == torch.int64 and first.magnitude.dtype == torch.float32


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_samples_with_numbers_of_their_own_are_drawn_alike_in_any_company(draw):
    rows = torch.rand(50, 9, generator=seeded(), dtype=torch.float64)
    whole = draw(50, 32, 32, generator=lambda n, k: rows[:, :k])
    assert len(whole.op.unique(dim=0)) > 10
    for chosen in ([4], [49, 0, 7], list(range(3, 14))):
        ours = draw(len(chosen), 32, 32, generator=lambda n, k, rows=rows[chosen]: rows[:, :k])
        assert all(torch.equal(a, b[chosen]) for a, b in zip(ours, whole, strict=True))


def assert_frequencies(counts: Counter, expected: dict, n: int) -> None:
    """Counts within four standard deviations of n · probability; nothing else was counted."""
    assert set(counts) <= {key for key, p in expected.items() if p > 0}
    assert math.isclose(sum(expected.values()), 1, abs_tol=1e-6)
    for key, p in expected.items():
        assert abs(counts[key] - n * p) <= 4 * math.sqrt(n * p * (1 - p)) + 1e-9, key


def assert_signs(ops: Ops) -> None:
    signed = ops.magnitude[(ops.op <= 9) & (ops.magnitude != 0)]
    assert abs((signed < 0).float().mean() - 0.5) <= 4 * 0.5 / math.sqrt(len(signed))


def test_randaugment_has_torchvisions_distribution():
    n = 20_000
    names = list(SPACES["randaugment"][0])
    ops = draw_randaugment(n, 32, 48, generator=seeded())
    pairs = Counter((OPERATIONS[a], OPERATIONS[b]) for a, b in ops.op.tolist())
    assert_frequencies(pairs, {(a, b): 1 / 14**2 for a in names for b in names}, n)
    assert_signs(ops)
    for name in names:
        drawn = set(ops.magnitude[ops.op == OPERATIONS.index(name)].tolist())
        levels, signed = SPACES["randaugment"][0][name]
        values = levels(31, 32, 48)
        m = 0.0 if values is None else float(values[9])
        assert drawn == ({m, -m} if signed else {m}), name


def test_randaugment_takes_its_numbers():
    ops = draw_randaugment(500, 32, 32, 3, magnitude=4, num_magnitude_bins=11, generator=seeded())
    assert ops.op.shape == (500, 3)
    rotated = ops.magnitude[ops.op == OPERATIONS.index("Rotate")]
    assert set(rotated.abs().tolist()) == {12.0}
    images = sample_images(3, 8, 8)
    assert torch.equal(apply_ops(images, draw_randaugment(8, 8, 8, num_ops=0)), images)
    one = draw_randaugment(500, 8, 8, magnitude=0, num_magnitude_bins=1, generator=seeded())
    assert set(one.magnitude[one.op == OPERATIONS.index("Posterize")].tolist()) == {8.0}


def test_trivialaugment_has_torchvisions_distribution():
    n = 40_000
    names = list(SPACES["trivialaugment"][0])
    ops = draw_trivialaugment(n, 32, 48, generator=seeded())
    assert_frequencies(
        Counter(OPERATIONS[op] for op in ops.op[:, 0].tolist()), {a: 1 / 14 for a in names}, n
    )
    assert_signs(ops)
    for name in names:
        values = ops.magnitude[ops.op == OPERATIONS.index(name)].tolist()
        expected = Counter(magnitudes("trivialaugment", name, 32, 48))
        total = expected.total()
        assert_frequencies(
            Counter(values), {m: count / total for m, count in expected.items()}, len(values)
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_autoaugment_has_torchvisions_distribution(policy):
    n = 20_000
    ops = draw_autoaugment(n, 32, 48, policy, generator=seeded())
    table = SPACES["autoaugment"][0]

    def outcomes(name, probability, level):
        """Signed magnitude and probability of all that one entry of a sub-policy can become."""
        levels, signed = table[name]
        values = levels(10, 32, 48)
        m = 0.0 if values is None else float(values[level])
        done = [(m, 0.5), (-m, 0.5)] if signed and m else [(m, 1.0)]
        return [("Identity", 0.0, 1 - probability)] + [(name, v, probability * p) for v, p in done]

    expected = Counter()
    sub_policies = v2.AutoAugment(POLICIES[policy])._policies
    for first, second in sub_policies:
        for a, m, p in outcomes(*first):
            for b, k, q in outcomes(*second):
                expected[a, m, b, k] += p * q / len(sub_policies)
    drawn = zip(ops.op.tolist(), ops.magnitude.tolist(), strict=True)
    counts = Counter((OPERATIONS[a], m, OPERATIONS[b], k) for (a, b), (m, k) in drawn)
    assert_frequencies(counts, expected, n)


def test_bad_input_is_named():
    images = sample_images(3, 8, 8)
    ops = draw_randaugment(8, 8, 8)
    with pytest.raises(ValueError, match="31"):
        draw_randaugment(8, 8, 8, magnitude=31)
    with pytest.raises(ValueError, match="'cifar11'"):
        draw_autoaugment(8, 8, 8, "cifar11")
    with pytest.raises(ValueError, match="float32"):
        apply_ops(images.float(), ops)
    with pytest.raises(ValueError, match="2, 8, 8"):
        apply_ops(images[:, :2], ops)
    with pytest.raises(ValueError, match="4096, 4096"):
        apply_ops(torch.empty(1, 1, 4096, 4096, dtype=torch.uint8), ops)
    with pytest.raises(ValueError, match="7 images but a draw for 8"):
        apply_ops(images[:7], ops)
