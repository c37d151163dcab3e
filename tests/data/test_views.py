"""Views and batches: the same numbers from (seed, step), however the work is shared."""

import io
import math
import time
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import center_crop, normalize, resized_crop

import pretend_gpu
from harness.cli.flags import AUGMENTS
from harness.counters import SampleStreams, generator
from harness.data import batches
from harness.data.batches import Mixing, Views, draw_mixing, train_batches
from harness.data.pixels import decode_image
from harness.data.stores import Samples
from harness.models.weights import find_weights
from harness.training.features import CachedViews

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


def streams(step=0, seed=42, places=range(BATCH)):
    return SampleStreams(seed, "views", step, places=torch.tensor(list(places)))


# --- views ---


@pytest.mark.parametrize("augment", AUGMENTS)
def test_draws_are_a_function_of_seed_and_step(augment):
    views = make_views(augment)
    first = views.draw(BATCH, streams(7))
    torch.manual_seed(1)  # the global state has no say
    state = torch.get_rng_state()
    assert same(first, views.draw(BATCH, streams(7)))
    assert torch.equal(state, torch.get_rng_state())
    for other in (streams(8), streams(7, seed=43)):
        assert not same(first, views.draw(BATCH, other))


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("changes", [{}, {"stored": 17, "crop_scale": 0.35}], ids=["", "larger"])
def test_unequal_parts_are_drawn_as_the_whole(augment, changes):
    views = make_views(augment, **changes)
    whole = views.draw(BATCH, streams(7))
    for start, stop in ((0, 1), (1, 8), (8, 19), (19, BATCH)):
        part = views.draw(stop - start, streams(7, places=range(start, stop)))
        assert same(part, {k: _cut(v, slice(start, stop)) for k, v in whole.items()})


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
            cut = {name: _cut(value, part) for name, value in draw.items()}
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
    preprocessing = find_weights("default", name).preprocessing
    assert (preprocessing.stored_size, preprocessing.size, preprocessing.interpolation) == (
        resized,
        224,
        filter_name,
    )
    height, width = (side * resized if side < 10 else side for side in shape)
    rough = random_images(1, size=800)[0, :, : height // detail, : width // detail]
    photo = Image.fromarray((rough // 2 + 64).permute(1, 2, 0).numpy())
    photo = photo.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    photo.save(file, "png")
    pixels = torch.from_numpy(
        decode_image(file, preprocessing.stored_size, preprocessing.interpolation)
    )
    views = Views(preprocessing.size, preprocessing.mean, preprocessing.std, augment="none",
                  padding=0, flip_prob=0, ops=1, erasing=0, magnitude=0,
                  stored=preprocessing.stored_size)  # fmt: skip
    [view] = views.evaluation(pixels.unsqueeze(0))
    weights = torchvision.models.get_model_weights(name).DEFAULT
    expected = weights.transforms()(photo)
    levels = (view - expected).abs() * torch.tensor(preprocessing.std).view(-1, 1, 1) * 255
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
        kinds[kind_of(draw_mixing(Mixing(mixup_alpha, cutmix_alpha, prob), SIZE, rng))] += 1
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
        rngs = (generator(1, "mixing", step) for _ in "ab")
        mix, again = (draw_mixing(Mixing(0.2, 1.0, 1.0), SIZE, rng) for rng in rngs)
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


class Untouched:
    """Views that draw as others do, and give back what they should do in the place of doing it."""

    def __init__(self, views):
        self.draw, self.alternating = views.draw, views.alternating
        self.flip_prob = getattr(views, "flip_prob", 0)

    def train(self, images, draw):
        return images, draw


class Whole(NamedTuple):
    """A batch as it would be on one process, in one part."""

    images: torch.Tensor
    labels: torch.Tensor
    draw: dict


def run_batches(
    processes=1, accumulation=1, first=0, total=TOTAL, device=CPU, seed=SEED, batch_size=BATCH,
    views=None, **changes,
):  # fmt: skip
    """[step][process] -> Parts, as every process of a run would get them."""
    split, views = make_split(), views or Untouched(make_views(**changes))
    runs = []
    for rank in range(processes):
        accelerator = SimpleNamespace(device=device, process_index=rank, num_processes=processes)
        batches = train_batches(split, views, accelerator, batch_size=batch_size, seed=seed,
                                accumulation=accumulation, total_steps=total)  # fmt: skip
        runs.append([list(parts) for parts in batches(first)])
    return list(zip(*runs, strict=True))


def join(step):
    """The parts of one step as the whole batch: by turn of accumulation, then by process."""
    parts = [part for turn in zip(*step, strict=True) for part in turn]
    images, draws = zip(*(part.images for part in parts), strict=True)
    return Whole(
        torch.cat(images),
        torch.cat([part.labels for part in parts]),
        {name: [torch.cat(t) for t in zip(*(tensors(draw[name]) for draw in draws), strict=True)]
         for name in draws[0]},
    )  # fmt: skip


def _cut(draw, part):
    if isinstance(draw, torch.Tensor):
        return draw[part]
    return type(draw)(*(tensor[part] for tensor in draw))


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


SHARED = [(p, a, BATCH) for p in (1, 2, 4) for a in (1, 2, 3)]
SHARED += [(5, 1, 30), (3, 5, 105), (1, 7, 35), (7, 1, 7)]  # odd batches and parts


@pytest.mark.parametrize(("processes", "accumulation", "batch_size"), SHARED)
@pytest.mark.parametrize("alternating", [False, True])
def test_the_whole_batch_does_not_depend_on_who_shares_it(
    processes, accumulation, batch_size, alternating
):
    how = {"batch_size": batch_size, "alternating": alternating}
    alone, shared = run_batches(**how), run_batches(processes, accumulation, **how)
    assert len(alone) == len(shared) == TOTAL
    views = make_views(alternating=alternating)
    for one, several in zip(alone, shared, strict=True):
        assert [len(parts) for parts in several] == [accumulation] * processes
        n = batch_size // (processes * accumulation)
        assert {len(p.labels) for parts in several for p in parts} == {n}
        assert same(join(one), join(several))
        seen = [views.train(*part.images) for parts in one for part in parts]
        cut = [views.train(*p.images) for turn in zip(*several, strict=True) for p in turn]
        assert torch.equal(torch.cat(seen), torch.cat(cut))


@pytest.mark.parametrize(("processes", "accumulation", "batch_size"), SHARED)
def test_a_process_draws_for_its_own_images_only(processes, accumulation, batch_size):
    views, drawn = make_views(), []
    real = views.draw
    views.draw = lambda n, *others: drawn.append(n) or real(n, *others)
    run_batches(processes, accumulation, total=3, batch_size=batch_size, views=views)
    assert drawn == [batch_size // processes // accumulation] * 3 * processes * accumulation


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (4, 1), (1, 3), (2, 3), (3, 2)])
def test_pairs_are_mixed_as_in_the_whole_batch(processes, accumulation):
    alone, shared = run_batches(total=4), run_batches(processes, accumulation, total=4)
    kinds = set()
    for step, (one, several) in enumerate(zip(alone, shared, strict=True)):
        mix = draw_mixing(Mixing(100, 100, 1.0), SIZE, generator(SEED, "mixing", step))
        kinds.add(kind_of(mix))
        whole = mix(one[0][0].images[0].float(), one[0][0].labels.view(-1, 1).float())
        mixed = [
            mix(part.images[0].float(), part.labels.view(-1, 1).float())
            for turn in zip(*several, strict=True) for part in turn
        ]  # fmt: skip
        assert same(whole, [torch.cat(t) for t in zip(*mixed, strict=True)])
    assert kinds == {"mixup", "cutmix"}


def test_features_of_a_batch_show_the_same_views_whoever_shares_it():
    views = Untouched(CachedViews(3))
    one, several = (run_batches(*how, views=views) for how in ((), (2, 3)))
    assert all(same(join(a), join(b)) for a, b in zip(one, several, strict=True))
    assert {int(v) for step in one for v in join(step).draw["view"][0]} == {0, 1, 2}


@pytest.mark.parametrize("first", [1, 4, 6, TOTAL])
def test_a_resumed_run_gets_the_batches_it_would_have_got(first):
    through, resumed = run_batches(), run_batches(first=first)
    assert len(resumed) == TOTAL - first
    for one, other in zip(through[first:], resumed, strict=True):
        assert same(join(one), join(other))


class Number(int):
    def record_stream(self, stream):
        pass


@pytest.fixture
def two_ahead(monkeypatch):
    """What prepares parts for a GPU, without one."""
    pretend_gpu.pretend_streams(monkeypatch)
    return lambda make, numbers: batches._starmap_ahead(make, ((Number(k),) for k in numbers))


def test_the_thread_keeps_the_order_and_is_two_ahead(two_ahead):
    begun, ended = [], []

    def make(number):
        begun.append(number)
        return [number]

    for (number,) in two_ahead(make, range(20)):
        ended.append(number)
        time.sleep(0.01)
        assert len(begun) == min(len(ended) + 2, 20)
    assert begun == ended == list(range(20))
    assert list(two_ahead(make, [])) == []


def test_what_the_thread_raises_comes_at_its_place(two_ahead):
    def make(number):
        if number == 3:
            raise ZeroDivisionError
        return [number]

    seen = []
    with pytest.raises(ZeroDivisionError):
        for (number,) in two_ahead(make, range(9)):
            seen.append(number)
    assert seen == [0, 1, 2]


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
        one, other = join(one).draw, join(other).draw
        assert not torch.equal(one.pop("flip")[0], other.pop("flip")[0])
        assert same(one, other)
