"""Views and batches: the same numbers from (seed, step), however the work is shared."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import center_crop, normalize, resized_crop

from harness.cli.flags import AUGMENTS
from harness.counters import generator
from harness.data.batches import Part, Samples, Views, cut_draw, draw_mixing, train_batches
from harness.data.pixels import decode_image
from harness.models.weights import find_weights

CPU = torch.device("cpu")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SIZE, BATCH = 12, 24


def make_views(augment="randaugment", **changes):
    settings = {"padding": 2, "flip_prob": 0.5, "erasing": 0.25, "ops": 2, "magnitude": 9}
    return Views(SIZE, MEAN, STD, augment=augment, **{**settings, **changes})


def random_images(n, seed=0, size=SIZE):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=rng, dtype=torch.uint8)


def same(one, other):
    """Whether two draws, tensors or tuples of them by name, are equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    values = (one.values(), other.values()) if isinstance(one, dict) else (one, other)
    return len(one) == len(other) and all(map(same, *values))


# --- views ---


@pytest.mark.parametrize("augment", AUGMENTS)
def test_draws_are_a_function_of_seed_and_step(augment):
    views = make_views(augment)
    first = views.draw(BATCH, generator(42, "views", 7))
    torch.manual_seed(1)  # the global state has no say
    state = torch.get_rng_state()
    assert same(first, views.draw(BATCH, generator(42, "views", 7)))
    assert torch.equal(state, torch.get_rng_state())
    for other in (generator(42, "views", 8), generator(43, "views", 7)):
        assert not same(first, views.draw(BATCH, other))


@pytest.mark.parametrize(
    ("augment", "changes", "names"),
    [
        ("none", {}, {"erasing"}),
        ("none", {"erasing": 0}, set()),
        ("basic", {}, {"crop", "flip", "erasing"}),
        ("basic", {"padding": 0, "flip_prob": 0, "erasing": 0}, set()),
        ("autoaugment", {"flip_prob": 0}, {"crop", "ops", "erasing"}),
        ("randaugment", {"padding": 0}, {"flip", "ops", "erasing"}),
        ("trivialaugment", {}, {"crop", "flip", "ops", "erasing"}),
        ("basic", {"crop_scale": 0.35}, {"resized", "flip", "erasing"}),
        ("randaugment", {"crop_scale": 0.35, "padding": 0}, {"resized", "flip", "ops", "erasing"}),
        ("none", {"crop_scale": 0.35}, {"erasing"}),
    ],
)
def test_only_what_is_switched_on_is_drawn(augment, changes, names):
    draw = make_views(augment, **changes).draw(BATCH, generator(0, "views", 0))
    assert draw.keys() == names
    lengths = [len(t) for d in draw.values() for t in ([d] if torch.is_tensor(d) else d)]
    assert set(lengths) <= {BATCH}


LARGER = {"stored": 17, "crop_scale": 0.35}


@pytest.mark.parametrize(
    ("augment", "changes"),
    [*((word, {}) for word in AUGMENTS), ("basic", LARGER), ("randaugment", LARGER),
     ("basic", {"stored": 17}), ("none", LARGER)],
)  # fmt: skip
def test_views_of_parts_are_parts_of_the_views(augment, changes):
    views = make_views(augment, flip_prob=0.3, erasing=0.5, **changes)
    images = random_images(BATCH, size=changes.get("stored", SIZE))
    draw = views.draw(BATCH, generator(42, "views", 3))
    whole = views.train(images, draw)
    assert not torch.equal(whole, views.evaluation(images))
    for n in (1, 4, 12):
        for start in range(0, BATCH, n):
            part = slice(start, start + n)
            cut = {name: cut_draw(value, part) for name, value in draw.items()}
            assert torch.equal(views.train(images[part], cut), whole[part])


@pytest.mark.parametrize("augment", AUGMENTS)
def test_what_the_network_takes(augment):
    views, images = make_views(augment), random_images(5)
    before = images.clone()
    batch = views.train(images, views.draw(5, generator(0, "views", 0)))
    assert batch.shape == (5, 3, SIZE, SIZE) and batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last) and batch.isfinite().all()
    assert torch.equal(images, before)


@pytest.mark.parametrize("changes", [LARGER, {"stored": 17}, {"crop_scale": 0.35}])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_what_the_network_takes_of_larger_images(augment, changes):
    views = make_views(augment, **changes)
    images = random_images(5, size=changes.get("stored", SIZE))
    before = images.clone()
    for batch in (
        views.train(images, views.draw(5, generator(0, "views", 0))),
        views.evaluation(images),
    ):
        assert batch.shape == (5, 3, SIZE, SIZE) and batch.dtype == torch.float32
        assert batch.is_contiguous(memory_format=torch.channels_last) and batch.isfinite().all()
    assert torch.equal(images, before)


def as_pixels(images):
    """What `Views.train` makes of uint8 images that nothing else is done to."""
    return normalize(images.float() / 255, MEAN, STD)


def test_a_random_resized_crop_is_torchvisions_of_the_same_box():
    views, images = make_views("basic", flip_prob=0, erasing=0, **LARGER), random_images(64, 1, 17)
    draw = views.draw(64, generator(0, "views", 0))
    batch = views.to_pixels(views.train(images, draw))
    for image, box, view in zip(images, draw["resized"].tolist(), batch, strict=True):
        top, left, height, width = box
        assert 0 <= top <= 17 - height and 0 <= left <= 17 - width
        assert height * width / 17**2 > 0.35 - 0.06  # whole pixels: √0.35 · 17 is 10.06 a side
        expected = resized_crop(image, *box, [SIZE, SIZE], antialias=True)
        assert (view.int() - expected.int()).abs().max() <= 1  # it rounds twice
    assert len(draw["resized"].unique(dim=0)) > 50


@pytest.mark.parametrize("stored", range(SIZE, SIZE + 6))
def test_without_a_resized_crop_the_centre_is_taken(stored):
    images = random_images(5, size=stored)
    centre = center_crop(images, [SIZE, SIZE])
    views, whole = make_views("basic", stored=stored), make_views("basic")
    torch.testing.assert_close(views.evaluation(images), as_pixels(centre))
    assert torch.equal(views.evaluation(images), whole.evaluation(centre))
    draw = views.draw(5, generator(0, "views", 0))
    assert same(draw, whole.draw(5, generator(0, "views", 0)))
    assert torch.equal(views.train(images, draw), whole.train(centre, draw))
    plain = make_views("none", stored=stored, crop_scale=0.35, erasing=0)
    assert torch.equal(plain.train(images, {}), views.evaluation(images))


def test_fewer_pixels_stored_than_seen_are_refused():
    with pytest.raises(ValueError, match="at least the size, 12, got 11"):
        make_views(stored=11)


@pytest.mark.parametrize(
    ("name", "resized", "filter_name"),
    [("resnet50", 232, "bilinear"), ("efficientnet_b0", 256, "bicubic")],
)
@pytest.mark.parametrize(
    ("shape", "detail", "tolerance"),
    [((300, 400), 150, 2), ((400, 300), 150, 2), ((2, 3), 1, 0), ((3, 2), 1, 0)],
)
def test_evaluation_is_torchvisions_own_preprocessing(
    name, resized, filter_name, shape, detail, tolerance, monkeypatch
):
    """Decoded at the stored size, then the evaluation view: of random values `detail` px apart.

    torchvision rounds the longer side and its crop to whole pixels, which ours does not, so of
    300×400 the two lie part of a pixel apart. Where the sides divide (2×3 stands for twice and
    three times the resized side), all is equal.
    """
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *a, **k: {})
    look = find_weights("default", name).preprocessing
    assert (look.stored_size, look.size, look.interpolation) == (resized, 224, filter_name)
    height, width = (side * resized if side < 10 else side for side in shape)
    rough = random_images(1, size=800)[0, :, : height // detail, : width // detail]
    photo = Image.fromarray((rough // 2 + 64).permute(1, 2, 0).numpy())
    photo = photo.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    photo.save(file, "png")
    pixels = torch.from_numpy(decode_image(file, look.stored_size, look.interpolation))
    views = Views(look.size, look.mean, look.std, augment="none", padding=0, flip_prob=0, ops=1,
                  erasing=0, magnitude=0, stored=look.stored_size)  # fmt: skip
    [view] = views.evaluation(pixels.unsqueeze(0))
    weights = torchvision.models.get_model_weights(name).DEFAULT
    expected = weights.transforms()(photo)
    levels = (view - expected).abs() * torch.tensor(look.std).view(-1, 1, 1) * 255
    assert expected.std() > 0.2 and levels.max().round() <= tolerance


def test_to_pixels_undoes_the_normalisation_exactly():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    for mean, std in ((MEAN, STD), ((0.0, 0.5, 1.0), (1.0, 0.05, 0.3))):
        views = Views(16, mean, std, augment="none", padding=0, flip_prob=0, erasing=0, ops=1,
                      magnitude=0)  # fmt: skip
        pixels = views.to_pixels(views.evaluation(levels))
        assert pixels.dtype == torch.uint8 and torch.equal(pixels, levels)
    wild = torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert make_views().to_pixels(wild.bfloat16()).flatten(1).unique().tolist() == [0, 255]


# --- mixing ---


def kind_of(mix):
    """What a drawn mixing does to a pair: leave, blend or paste."""
    pair = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, SIZE, SIZE)
    images, targets = mix(pair, torch.eye(2))
    if torch.equal(images, pair) and torch.equal(targets, torch.eye(2)):
        return "none"
    share = targets[0, 1].item()
    assert images[0].mean().item() == pytest.approx(share, abs=1e-5)
    return "cutmix" if images[0].unique().numel() == 2 else "mixup"


def count_mixing(mixup_alpha, cutmix_alpha, prob, steps):
    """How often each kind is drawn; alphas of 100 keep λ near a half, where they differ."""
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for step in range(steps):
        rng = generator(0, "mixing", step)
        kinds[kind_of(draw_mixing(mixup_alpha, cutmix_alpha, prob, SIZE, rng))] += 1
    return kinds


def test_mixup_and_cutmix_have_even_odds():
    steps = 4000
    kinds = count_mixing(100, 100, 1.0, steps)
    assert kinds["none"] == 0
    assert abs(kinds["mixup"] - steps / 2) < 4 * math.sqrt(steps / 4)


def test_mix_prob_is_the_part_of_the_steps_that_mix():
    steps = 2000
    kinds = count_mixing(100, 100, 0.5, steps)
    assert abs(kinds["none"] - steps / 2) < 4 * math.sqrt(steps / 4)
    assert abs(kinds["mixup"] - kinds["cutmix"]) < 4 * math.sqrt(steps / 2)


@pytest.mark.parametrize(
    ("mixup_alpha", "cutmix_alpha", "prob", "only"),
    [(100, 100, 0, "none"), (0, 0, 1, "none"), (100, 0, 1, "mixup"), (0, 100, 1, "cutmix")],
)
def test_mixing_of_one_kind(mixup_alpha, cutmix_alpha, prob, only):
    assert count_mixing(mixup_alpha, cutmix_alpha, prob, 50)[only] == 50


def test_mixing_is_a_function_of_the_step_and_of_pairs():
    images, targets = random_images(BATCH).float(), torch.eye(BATCH)
    for step in range(8):
        mix, again = (draw_mixing(0.2, 1.0, 1.0, SIZE, generator(1, "mixing", step)) for _ in "ab")
        whole = mix(images, targets)
        assert same(whole, again(images, targets))
        for start in range(0, BATCH, 6):
            part = slice(start, start + 6)
            assert same([t[part] for t in whole], mix(images[part], targets[part]))


# --- batches ---

SAMPLES, SEED, TOTAL = 107, 5, 10  # 4 batches of 24 an epoch, 11 samples left over


def make_split():
    """Sample i has label i, and its number in its first pixel."""
    pixels = random_images(SAMPLES + 3, seed=1)
    rows = torch.randperm(SAMPLES + 3, generator=torch.Generator().manual_seed(2))[:SAMPLES]
    pixels[rows, 0, 0, 0] = torch.arange(SAMPLES, dtype=torch.uint8)
    return Samples(pixels, rows, torch.arange(SAMPLES))


def run_batches(
    processes=1, accumulation=1, first=0, total=TOTAL, device=CPU, seed=SEED, **changes
):
    """[step][process] -> Parts, as every process of a run would get them."""
    split, views = make_split(), make_views(**changes)
    runs = []
    for rank in range(processes):
        accelerator = SimpleNamespace(device=device, process_index=rank, num_processes=processes)
        batches = train_batches(split, views, accelerator, batch_size=BATCH, seed=seed,
                                accumulation=accumulation, total_steps=total)  # fmt: skip
        runs.append(list(batches(first)))
    return list(zip(*runs, strict=True))


def join(step):
    """The parts of one step as the whole batch: by turn of accumulation, then by process."""
    parts = [part for turn in zip(*step, strict=True) for part in turn]
    names = parts[0].draw
    return Part(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        {name: [torch.cat(t) for t in zip(*(tensors(p.draw[name]) for p in parts), strict=True)]
         for name in names},
    )  # fmt: skip


def tensors(draw):
    return [draw] if torch.is_tensor(draw) else list(draw)


def test_a_batch_is_a_slice_of_the_epochs_order():
    steps = [join(step) for step in run_batches()]
    assert len(steps) == TOTAL
    for batch in steps:
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.labels)
    epochs = [torch.cat([b.labels for b in steps[k : k + 4]]).tolist() for k in (0, 4, 8)]
    for labels in epochs:
        assert len(set(labels)) == len(labels)  # every sample at most once an epoch
    assert [len(labels) for labels in epochs] == [96, 96, 48]
    assert epochs[0] != epochs[1] and set(epochs[0]) != set(epochs[1])
    assert not same(steps[0].draw, steps[4].draw)  # the same place in two epochs
    assert not torch.equal(steps[0].labels, join(run_batches(seed=6, total=1)[0]).labels)


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 3)])
def test_the_whole_batch_does_not_depend_on_who_shares_it(processes, accumulation):
    alone, shared = run_batches(), run_batches(processes, accumulation)
    assert len(alone) == len(shared)
    for one, several in zip(alone, shared, strict=True):
        assert [len(parts) for parts in several] == [accumulation] * processes
        n = BATCH // (processes * accumulation)
        assert {len(p.labels) for parts in several for p in parts} == {n}
        assert same(join(one), join(several))


@pytest.mark.parametrize("first", [1, 4, 6, TOTAL])
def test_a_resumed_run_gets_the_batches_it_would_have_got(first):
    through, resumed = run_batches(), run_batches(first=first)
    assert len(resumed) == TOTAL - first
    for one, other in zip(through[first:], resumed, strict=True):
        assert same(join(one), join(other))


def test_the_thread_that_works_ahead_keeps_the_order():
    """On another device than the CPU; "meta" has no values, but draws and sizes are there."""
    for first in (0, 3, TOTAL - 1, TOTAL):
        plain, ahead = (
            run_batches(first=first),
            run_batches(first=first, device=torch.device("meta")),
        )
        assert len(plain) == len(ahead) == TOTAL - first
        for one, other in zip(plain, ahead, strict=True):
            assert same(join(one).draw, join(other).draw)
            assert other[0][0].images.device.type == "meta"


def test_alternating_flips_show_every_image_both_ways_in_two_epochs():
    per_epoch = SAMPLES // BATCH
    steps = [join(step) for step in run_batches(processes=2, total=4 * per_epoch, alternating=True)]
    seen = [{} for _ in range(4)]  # of every epoch: sample -> whether it was mirrored
    for number, batch in enumerate(steps):
        flips = batch.draw["flip"][0].tolist()
        seen[number // per_epoch] |= dict(zip(batch.labels.tolist(), flips, strict=True))
    compared = 0
    for epoch in range(3):
        both = seen[epoch].keys() & seen[epoch + 1].keys()
        assert all(seen[epoch][i] != seen[epoch + 1][i] for i in both)
        compared += len(both)
    assert compared > SAMPLES
    assert 0.3 < sum(seen[0].values()) / len(seen[0]) < 0.7


def test_alternating_flips_leave_every_other_draw_as_it_is():
    for one, other in zip(run_batches(), run_batches(alternating=True), strict=True):
        (one,), (other,) = one[0], other[0]
        assert not torch.equal(one.draw.pop("flip"), other.draw.pop("flip"))
        assert same(one.draw, other.draw)
