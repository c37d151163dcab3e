"""Views: torchvision's crops, airbench's shifts, draws that belong to the sample."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from tricks.tta import GAMMA, _draw_boxes, _mix, _uniforms, average_views, tta_views


def numbered(n=3, channels=2, height=12, width=15):
    """Images whose values are all distinct."""
    images = torch.arange(n * channels * height * width, dtype=torch.float32)
    return images.view(n, channels, height, width)


def random_images(*shape):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def seen(kind, images, size, seed=0, index=None):
    index = torch.arange(len(images)) if index is None else index
    return {view.name: view.apply(images, index) for view in tta_views(kind, size, seed)}


KINDS = [
    "none",
    "flip",
    "shift",
    "crops:1",
    "crops:3",
    "crops:5",
    "crops:10",
    "random:1",
    "random:5",
]
COUNTS = [1, 2, 6, 1, 3, 5, 10, 1, 5]


@pytest.mark.parametrize(("kind", "count"), list(zip(KINDS, COUNTS, strict=True)))
@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (2, 1, 21, 16), (1, 3, 19, 23)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_every_view_of_a_kind(kind, count, shape, dtype):
    views = tta_views(kind, 16)
    assert len(views) == count == len({view.name for view in views})
    assert sum(view.weight for view in views) == pytest.approx(1) and views[0].weight > 0
    images = random_images(*shape).to(dtype)
    before = images.clone()
    for view in views:
        result = view.apply(images, torch.arange(len(images)))
        assert result.shape == (*shape[:2], 16, 16) and result.dtype == dtype
        again = view.apply(images, torch.arange(len(images)))
        assert torch.equal(result, again)
    assert torch.equal(images, before)


def test_none_and_flip():
    images = numbered(height=12, width=12)
    assert torch.equal(seen("none", images, 12)["centre"], images)
    both = seen("flip", images, 12)
    assert list(both) == ["centre", "centre, mirrored"]
    assert torch.equal(both["centre, mirrored"], images.flip(-1))
    larger = numbered(height=12, width=17)
    assert torch.equal(seen("none", larger, 8)["centre"], larger[:, :, 2:10, 4:12])


def test_shifts_are_airbenchs():
    images = numbered(height=9, width=9)
    padded = F.pad(images, (1,) * 4, "reflect")
    expected = {
        "centre": images,
        "down right": padded[:, :, 0:9, 0:9],
        "up left": padded[:, :, 2:11, 2:11],
    }
    found = seen("shift", images, 9)
    assert len(found) == 6
    for name, moved in expected.items():
        assert torch.equal(found[name], moved)
        assert torch.equal(found[f"{name}, mirrored"], moved.flip(-1))


def test_shifts_weigh_as_in_airbench():
    views = tta_views("shift", 9)
    logits = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    p = dict(zip([view.name for view in views], logits.softmax(2), strict=True))

    def mirror(name):
        return 0.5 * p[name] + 0.5 * p[f"{name}, mirrored"]

    expected = 0.5 * mirror("centre") + 0.5 * (mirror("down right") + mirror("up left")) / 2
    found = average_views(logits, [view.weight for view in views]).exp()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("height", "width"), [(12, 16), (14, 12), (10, 10)])
def test_crops_are_torchvisions(height, width):
    images = numbered(height=height, width=width)
    places = ["upper left", "upper right", "lower left", "lower right", "centre"]
    found = seen("crops:10", images, 8)
    theirs = TF.ten_crop(images, [8, 8])
    for place, expected in zip(places, theirs[:5], strict=True):
        assert torch.equal(found[place], expected)
    # torchvision mirrors the image and then crops it: its left is our right
    swapped = [places[k] for k in (1, 0, 3, 2, 4)]
    for place, expected in zip(swapped, theirs[5:], strict=True):
        assert torch.equal(found[f"{place}, mirrored"], expected)
    for n in range(1, 6):
        few = seen(f"crops:{n}", images, 8)
        assert list(few) == ["centre", *places][:n]
        assert all(torch.equal(few[place], found[place]) for place in few)


def test_crops_without_room_reflect_an_eighth():
    images = numbered(height=16, width=16)
    padded = F.pad(images, (2,) * 4, "reflect")
    found = seen("crops:5", images, 16)
    assert torch.equal(found["centre"], images)
    assert torch.equal(found["upper left"], padded[:, :, :16, :16])
    assert torch.equal(found["upper right"], padded[:, :, :16, 4:])
    assert torch.equal(found["lower left"], padded[:, :, 4:, :16])
    assert torch.equal(found["lower right"], padded[:, :, 4:, 4:])
    # A side with room is not padded
    tall = numbered(height=20, width=16)
    upper = F.pad(tall, (2, 2, 0, 0), "reflect")[:, :, :16, :16]
    assert torch.equal(seen("crops:2", tall, 16)["upper left"], upper)


# --- random views -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(40, 3, 24, 24), (40, 1, 31, 26)])
def test_a_random_view_is_a_resized_crop(dtype, shape):
    images = random_images(*shape).to(dtype)
    index = torch.arange(40) * 7
    (found,) = seen("random:1", images, 20, seed=3, index=index).values()
    boxes, flips = _draw_boxes(3, 0, index, *shape[2:])
    assert flips.any() and not flips.all()
    for image, result, box, flip in zip(images, found, boxes.tolist(), flips, strict=True):
        top, left, h, w = box
        crop = image[None, :, top : top + h, left : left + w].float()
        expected = F.interpolate(crop, size=(20, 20), mode="bilinear", antialias=True)[0]
        expected = expected.flip(-1) if flip else expected
        limit = 0.51 if dtype == torch.uint8 else 1e-3
        assert (result.float() - expected).abs().max() <= limit
    with torch.autocast("cpu", torch.bfloat16):
        (cast,) = seen("random:1", images, 20, seed=3, index=index).values()
    assert torch.equal(cast, found)


def test_a_sample_is_seen_alike_in_every_batch():
    images = random_images(11, 3, 16, 16)
    index = torch.arange(100, 111)
    whole = seen("random:3", images, 16, index=index)
    order = torch.tensor([7, 2, 10, 2])
    part = seen("random:3", images[order], 16, index=index[order])
    for name, view in whole.items():
        assert torch.equal(part[name], view[order])
    one, two, three = whole.values()
    assert not torch.equal(one, two) and not torch.equal(two, three)
    other = seen("random:3", images, 16, seed=1, index=index)
    assert not any(torch.equal(other[name], whole[name]) for name in whole)
    more = seen("random:5", images, 16, index=index)  # more views add to those there are
    assert all(torch.equal(more[name], whole[name]) for name in whole)


def test_random_views_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    seen("random:2", random_images(3, 3, 16, 16), 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_boxes_lie_inside_and_have_the_promised_sizes():
    boxes, flips = _draw_boxes(0, 1, torch.arange(20_000), 200, 300)
    top, left, h, w = boxes.unbind(1)
    assert min(top.min(), left.min()) == 0
    assert (top + h).max() == 200 and (left + w).max() == 300
    assert flips.double().mean().item() == pytest.approx(0.5, abs=0.015)
    square, _ = _draw_boxes(0, 1, torch.arange(20_000), 1000, 1000)
    h, w = square[:, 2].double(), square[:, 3].double()
    inside = (h < 1000) & (w < 1000)  # not cut
    area, ratio = (h * w / 1e6)[inside], (w / h)[inside]
    assert area.min() >= 0.349 and area.max() <= 1
    assert ratio.min() >= 0.748 and ratio.max() <= 1.337  # sides are whole
    assert (area < 0.5).double().mean() * inside.double().mean() == pytest.approx(
        0.15 / 0.65, abs=0.01
    )
    assert ratio.log().mean().item() == pytest.approx(0, abs=0.01)


def test_a_draw_is_splitmix64():
    """Its published outputs for the seeds 0 and 1234567, by (value >> 11) / 2⁵³."""
    published = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
    }
    for seed, outputs in published.items():
        states = torch.tensor(seed) + torch.arange(1, 4) * GAMMA
        assert [value % 2**64 for value in _mix(states).tolist()] == outputs


def test_draws_are_uniform_and_unrelated():
    assert _uniforms(0, 0, torch.zeros(1).long(), 3).all()  # the hash of 0 would be 0
    index = torch.arange(4000)
    draws = torch.cat([_uniforms(seed, view, index, 3) for seed in (0, 1) for view in (0, 1)])
    assert draws.min() >= 0 and draws.max() < 1 and draws.dtype == torch.float64
    for row in draws:
        ranks = row.sort().values
        gap = (ranks - (index + 0.5) / 4000).abs().max() + 0.5 / 4000
        assert gap < 1.95 / math.sqrt(4000)  # Kolmogorov and Smirnov, p = 0.001
    correlation = torch.corrcoef(torch.cat([draws, draws.roll(1, 1)]))
    off = correlation - torch.eye(len(correlation))
    assert off.abs().max() < 4.5 / math.sqrt(4000)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 5])
def test_any_whole_number_is_a_seed(seed):
    draws = _uniforms(seed, 0, torch.arange(9), 2)
    assert draws.unique().numel() == 18


# --- averages -----------------------------------------------------------------------------------


def test_average_views_table():
    views = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.3, 0.7], [0.1, 0.9]]]).log()
    found = average_views(views + torch.tensor([[[3.0]], [[-50.0]]]))
    assert found.dtype == torch.float64
    torch.testing.assert_close(
        found.exp(), torch.tensor([[0.6, 0.4], [0.3, 0.7]]).double(), rtol=0, atol=1e-6
    )
    weighted = average_views(views, [0.25, 0.75]).exp()
    torch.testing.assert_close(
        weighted[:, 0], torch.tensor([0.45, 0.2]).double(), rtol=0, atol=1e-6
    )


def test_one_view_and_a_weight_of_zero():
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(average_views(logits[:1]), logits[0].double().log_softmax(1))
    assert torch.equal(average_views(logits, [0, 1, 0]), logits[1].double().log_softmax(1))
    torch.testing.assert_close(average_views(logits, [0.5, 0, 0.5]), average_views(logits[[0, 2]]))


def test_far_logits_stay_finite():
    logits = torch.tensor([[[3000.0, 0.0, -3000.0]]] * 2)
    found = average_views(logits)
    assert found.isfinite().all() and found.tolist() == [[0.0, -3000.0, -6000.0]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "2 views"),
        ([0.5, 0.6], "sum 1"),
        ([1.5, -0.5], "-0.5"),
        ([math.nan, 1.0], "nan"),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises(ValueError, match=message):
        average_views(torch.zeros(2, 3, 4), weights)


def test_logits_that_are_none():
    logits = torch.zeros(2, 3, 4)
    logits[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match="view 1"):
        average_views(logits)
    for shape in [(3, 4), (0, 3, 4), (2, 0, 4)]:
        with pytest.raises(ValueError, match="views, samples, classes"):
            average_views(torch.zeros(shape))


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flips", "'flips'; did you mean 'flip'"),
        ("crops", "'crops'; did you mean 'crops:"),
        ("crop:5", "did you mean 'crops:5'"),
        ("rand:8", "did you mean 'random:8'"),
        ("crops:7", "1 to 5, or 10, got 'crops:7'"),
        ("crops:0", "'crops:0'"),
        ("random:0", "'random:0'"),
        ("random:-2", "'random:-2'"),
        ("random:x", "'random:x'; did you mean"),
        ("flip:2", "'flip:2'; did you mean 'flip'"),
        ("", "''; none, flip, shift, crops:N or random:N"),
        ("everything", "none, flip, shift"),
    ],
)
def test_kinds_that_are_none(kind, message):
    with pytest.raises(ValueError, match=message):
        tta_views(kind, 32)


def test_images_too_small():
    index = torch.arange(1)
    for kind in KINDS:
        for view in tta_views(kind, 16):
            with pytest.raises(ValueError, match="size 16"):
                view.apply(torch.zeros(1, 3, 20, 15), index)
    with pytest.raises(ValueError, match="side of 1 is too small"):
        tta_views("shift", 1)[2].apply(torch.zeros(1, 3, 1, 1), index)
    with pytest.raises(ValueError, match="got 0"):
        tta_views("none", 0)


@pytest.mark.parametrize("index", [torch.arange(2), torch.zeros(3), torch.zeros(3, 1).long()])
def test_an_index_that_is_none(index):
    with pytest.raises(ValueError, match="index must be int64 of shape"):
        tta_views("random:1", 8)[0].apply(torch.zeros(3, 1, 8, 8), index)
