"""Checks of maps: curves against a slow loop, ranks against scipy, heat counted by hand."""

import copy
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import nn

from tricks.cam_checks import (
    deletion_insertion,
    heat_in_box,
    heat_in_mask,
    rank_correlation,
    reinitialized_copy,
)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def probability(images):
    """Of no use but to be different for every image that is not the same."""
    weights = torch.arange(1.0, images[0].numel() + 1).view(images.shape[1:])
    return (images * weights).flatten(1).mean(1).sigmoid()


# -- deletion and insertion ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 7, 15])
def test_curves_are_their_slow_loop(steps):
    images, maps, blur = torch.rand(3, 2, 3, 5), torch.rand(3, 3, 5), torch.rand(3, 2, 3, 5)
    before = images.clone(), maps.clone()
    curves = deletion_insertion(probability, images, maps, 0.25, blur, steps)
    assert torch.equal(images, before[0]) and torch.equal(maps, before[1])
    for n in range(3):
        places = sorted((-maps[n, i, j], i, j) for i in range(3) for j in range(5))
        expected = {"deletion": [], "insertion": []}
        for step in range(steps + 1):
            deleted, inserted = images[n].clone(), blur[n].clone()
            for _, i, j in places[: round(step * 15 / steps)]:
                deleted[:, i, j] = 0.25
                inserted[:, i, j] = images[n, :, i, j]
            expected["deletion"].append(probability(deleted.unsqueeze(0)).item())
            expected["insertion"].append(probability(inserted.unsqueeze(0)).item())
        for name, values in expected.items():
            torch.testing.assert_close(getattr(curves, name)[n], torch.tensor(values))
            area = sum((a + b) / 2 for a, b in pairwise(values)) / steps
            assert getattr(curves, f"{name}_auc")[n].item() == pytest.approx(area, abs=1e-6)


def test_ends_of_the_curves():
    images, maps = torch.rand(2, 3, 4, 6), torch.randn(2, 4, 6)
    curves = deletion_insertion(probability, images, maps, -1.0, steps=5)
    whole, none = probability(images), probability(torch.full_like(images, -1.0))
    for curve, start, end in ((curves.deletion, whole, none), (curves.insertion, none, whole)):
        assert torch.equal(curve[:, 0], start) and torch.equal(curve[:, -1], end)


def test_a_map_that_knows_beats_one_that_knows_the_opposite():
    """The score is the light in one corner."""
    images, maps = torch.ones(1, 1, 4, 4), torch.zeros(1, 4, 4)
    maps[0, :2, :2] = 1.0

    def corner(images):
        return images[:, 0, :2, :2].mean((1, 2))

    good = deletion_insertion(corner, images, maps, steps=4)
    bad = deletion_insertion(corner, images, -maps, steps=4)
    assert good.deletion.tolist() == [[1, 0, 0, 0, 0]] and bad.deletion.tolist() == [
        [1, 1, 1, 1, 0]
    ]
    assert (good.deletion_auc.item(), good.insertion_auc.item()) == (0.125, 0.875)
    assert (bad.deletion_auc.item(), bad.insertion_auc.item()) == (0.875, 0.125)


def test_equal_heat_goes_in_reading_order():
    images = torch.arange(1.0, 7.0).view(1, 1, 2, 3)
    curves = deletion_insertion(lambda x: x.sum((1, 2, 3)), images, torch.zeros(1, 2, 3), steps=6)
    assert curves.deletion.tolist() == [[21, 20, 18, 15, 11, 6, 0]]


def test_no_graph_is_made():
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 1), nn.Flatten(0), nn.Sigmoid())
    curves = deletion_insertion(model, torch.rand(2, 1, 4, 6), torch.rand(2, 4, 6), steps=3)
    assert not any(values.requires_grad for values in curves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be in 1 to 15, the number of pixels, got 0"),
        ({"steps": 16}, "got 16"),
        ({"maps": torch.rand(3, 5, 3)}, r"maps must be .*\(3, 3, 5\), got \(3, 5, 3\)"),
        ({"maps": torch.full((3, 3, 5), torch.nan)}, "finite"),
        ({"score": lambda images: images.mean((2, 3))}, r"score must give \(3,\), got \(3, 2\)"),
    ],
)
def test_curves_refuse_what_does_not_fit(change, message):
    arguments = {
        "score": probability,
        "images": torch.rand(3, 2, 3, 5),
        "maps": torch.rand(3, 3, 5),
    }
    with pytest.raises(ValueError, match=message):
        deletion_insertion(**{**arguments, "steps": 5, **change})


# -- randomised weights --------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_rank_correlation_is_scipys(levels):
    stats = pytest.importorskip("scipy.stats", reason="parity with scipy")
    first, second = (torch.randint(levels, (6, 5, 7)).float() for _ in range(2))
    found = rank_correlation(first, second)
    assert found.dtype == torch.float64 and found.shape == (6,)
    for n in range(6):
        expected = stats.spearmanr(first[n].flatten(), second[n].flatten()).statistic
        assert found[n].item() == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_at_its_ends():
    maps = torch.randn(3, 4, 5)
    torch.testing.assert_close(rank_correlation(maps, maps.exp()), torch.ones(3).double())
    torch.testing.assert_close(rank_correlation(maps, -maps), -torch.ones(3).double())
    assert rank_correlation(maps, maps).max() <= 1
    assert rank_correlation(maps, torch.zeros(3, 4, 5)).isnan().all()
    with pytest.raises(ValueError, match=r"one shape .* got \(3, 4, 5\) and \(2, 4, 5\)"):
        rank_correlation(maps, maps[:2])


def small_vit():
    return torchvision.models.VisionTransformer(
        image_size=16,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        num_classes=3,
    )


def trained(model):
    """Values that no constructor would give, BatchNorm's statistics among them."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "num_batches" not in name:
                tensor.copy_(torch.rand_like(tensor) + 2)
    return model


@pytest.mark.parametrize(
    "make", [lambda: torchvision.models.resnet18(num_classes=3), small_vit], ids=["resnet", "vit"]
)
def test_a_copy_is_drawn_anew_and_the_model_is_not(make):
    model = trained(make()).eval()
    model.requires_grad_(False)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    one, same, other = (
        reinitialized_copy(model, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), random)
    differing = 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(one.state_dict()[name], same.state_dict()[name])
        if tensor.is_floating_point():
            assert not torch.equal(one.state_dict()[name], tensor), name
        differing += not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert differing > 10 and not one.training
    assert not any(parameter.requires_grad for parameter in one.parameters())
    images = torch.randn(2, 3, 16, 16)
    assert one(images).isfinite().all()


def test_as_the_constructor_draws():
    model = nn.Sequential(nn.Linear(50, 40), nn.BatchNorm1d(40), nn.Linear(40, 3))
    drawn = reinitialized_copy(trained(model), torch.Generator().manual_seed(0))
    bound = 50**-0.5  # of nn.Linear's uniform distribution
    assert drawn[0].weight.abs().max() <= bound and drawn[0].weight.abs().mean() > bound / 3
    assert torch.equal(drawn[1].running_var, torch.ones(40))
    assert torch.equal(drawn[1].weight, torch.ones(40))
    attention = nn.MultiheadAttention(8, 2)  # sets its inner layer's bias to 0 after that is built
    drawn = reinitialized_copy(trained(attention), torch.Generator().manual_seed(0))
    assert not drawn.out_proj.bias.any() and drawn.in_proj_weight.any()


def test_named_parts_only_in_a_cascade():
    model = trained(torchvision.models.resnet18(num_classes=3))
    for names in (["fc"], ["fc", "layer4"], ["fc", "layer4.1.conv2", "layer4.0.bn1"]):
        drawn = reinitialized_copy(model, torch.Generator().manual_seed(0), names).state_dict()
        for name, tensor in model.state_dict().items():
            inside = any(name.startswith(f"{outer}.") for outer in names)
            is_drawn = inside and tensor.is_floating_point()
            assert torch.equal(drawn[name], tensor) != is_drawn, name


def test_a_parameter_by_name():
    model = trained(small_vit())
    drawn = reinitialized_copy(model, torch.Generator().manual_seed(0), ["encoder.pos_embedding"])
    changed = [
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(drawn.state_dict()[name], tensor)
    ]
    assert changed == ["encoder.pos_embedding"]
    values = drawn.encoder.pos_embedding
    assert abs(values.mean() - 2.5) < 0.3 and 0.1 < values.std() < 0.6


def test_refuses_names_that_are_not_the_models():
    model, generator = nn.Sequential(nn.Linear(2, 2)), torch.Generator()
    with pytest.raises(ValueError, match=r"named '0.wight'; the nearest are 0.weight"):
        reinitialized_copy(model, generator, ["0.wight"])
    with pytest.raises(ValueError, match="must be a list"):
        reinitialized_copy(model, generator, "0")


# -- heat ----------------------------------------------------------------------------------------


def test_heat_in_boxes_and_masks_by_hand():
    maps = torch.arange(1.0, 13.0).view(1, 3, 4).repeat(3, 1, 1)  # 78 in all
    maps[2] = -maps[2]
    boxes = torch.tensor([[1, 0, 3, 2], [0, 0, 4, 3], [0, 0, 4, 3]])
    expected = torch.tensor([(2 + 3 + 6 + 7) / 78, 1.0, 0.0])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.testing.assert_close(heat_in_box(maps.to(dtype), boxes), expected)
    torch.testing.assert_close(
        heat_in_box(maps, boxes.double() + 0.49), torch.tensor([18 / 78, 1, 0])
    )
    masks = torch.zeros(3, 3, 4, dtype=torch.bool)
    masks[0, 2, 3] = masks[1, 0, 0] = masks[2] = True
    torch.testing.assert_close(heat_in_mask(maps, masks), torch.tensor([12 / 78, 1 / 78, 0]))


def test_heat_in_a_box_is_that_under_its_mask_and_adds_up():
    maps = torch.rand(5, 6, 9)
    left = heat_in_box(maps, torch.tensor([[0, 0, 4, 6]] * 5))
    right = heat_in_box(maps, torch.tensor([[4, 0, 9, 6]] * 5))
    torch.testing.assert_close(left + right, torch.ones(5))
    mask = torch.zeros(5, 6, 9, dtype=torch.bool)
    mask[:, :, :4] = True
    assert torch.equal(heat_in_mask(maps, mask), left)
    even = heat_in_box(torch.ones(1, 6, 9), torch.tensor([[2, 1, 5, 4]]))
    assert even.item() == pytest.approx(9 / 54)  # the share of the area
    assert heat_in_box(maps[:1], torch.tensor([[3, 3, 3, 5]])).item() == 0  # an empty box


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda maps: heat_in_box(maps, torch.zeros(3, 4)),
            r"boxes must be \(2, 4\), got \(3, 4\)",
        ),
        (
            lambda maps: heat_in_box(maps, torch.tensor([[3, 0, 1, 2]] * 2)),
            "left, top, right, bottom",
        ),
        (lambda maps: heat_in_box(maps[0], torch.zeros(2, 4)), r"maps must be \(n, H, W\)"),
        (lambda maps: heat_in_mask(maps, torch.ones(2, 3, 4)), "masks must be bool"),
        (lambda maps: heat_in_mask(maps, torch.ones(2, 4, 3) > 0), "maps must be"),
        (lambda maps: heat_in_mask(maps / 0, maps > 0), "finite"),
    ],
)
def test_heat_refuses_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(2, 3, 4))
