"""What the network sees: training views, evaluation views, mixing, the batches of a step."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, starmap
from typing import NamedTuple

import torch

from harness.counters import SampleStreams, generator
from harness.data.pixels import epoch_order, sharded_order
from harness.errors import UserError
from tricks import augment, autoaugment
from tricks.balanced_sampling import class_shares, weighted_order
from tricks.cutmix import cutmix_batch, draw_cutmix
from tricks.mixup import draw_mixup, mixup_batch, neighbour_pairs
from tricks.tta import tta_views

# The rule by which a batch is drawn, as checkpoints name it: a checkpoint of another rule would go
# on with other draws. Whoever changes the rule renames it, see harness.training.state.CONTINUED_BY
DRAWS = "by sample"


# --imbalance: a class's share of an epoch is in proportion to so much a power of its images
SHARE_POWER = {"balanced": 0.0, "sqrt": 0.5}


class Part(NamedTuple):
    """The slice of a step's batch that one forward pass of one process sees, on its device."""

    # augmented and normalised (n, 3, H, W), float32; or kept features (n, ...)
    images: torch.Tensor
    labels: torch.Tensor  # int64 (n,)


class Views:
    """Batches of uint8 pixels -> what the network takes: whole batches, every sample its own draw.

    augment: a word of flags.AUGMENTS. padding: pixels of the random crop, 0 for none. flip_prob
    and erasing: probabilities. alternating: `train_batches` hands `draw` the flips, drawn once an
    image. ops and magnitude: RandAugment's. mean and std: a number a channel. size: pixels a side
    that the network sees; stored: of the images that come in, None for `size`. packed: images come
    from the packed store, cut by the boxes of the draw. crop_scale: the least share of the area in
    a random resized crop, which takes the place of the padded crop; 0: the padded crop. Without a
    resized crop, larger images are cut to their centre.

    Raises ValueError where fewer pixels are stored than seen.
    """

    def __init__(
        self,
        size,
        mean,
        std,
        *,
        augment,
        padding,
        flip_prob,
        erasing,
        ops,
        magnitude,
        alternating=False,
        stored=None,
        crop_scale=0.0,
        packed=False,
    ):
        self.size, self.mean, self.std = size, mean, std
        self.augment, self.padding, self.flip_prob = augment, padding, flip_prob
        self.erasing, self.ops, self.magnitude = erasing, ops, magnitude
        self.alternating = alternating
        self.stored, self.crop_scale, self.packed = stored or size, crop_scale, packed
        if self.stored < size:
            raise ValueError(f"stored must be at least the size, {size}, got {stored}")

    def draw(self, n, rng, flips=None, sizes=None):
        """Draw for n samples, on the CPU: tensors (or tuples of them) of length n.

        rng: harness.counters.SampleStreams of them, or a torch.Generator. flips: bool (n,), what
        is mirrored, instead of a draw. sizes: heights and widths of packed images, int64 (n,)
        each; "boxes" of the draw are for `Samples.take`.
        """
        size, draw = self.size, {}
        if self.augment != "none" and self.crop_scale:
            height, width = sizes if self.packed else (self.stored, self.stored)
            draw["boxes" if self.packed else "resized"] = augment.draw_resized_crops(
                n, height, width, (self.crop_scale, 1.0), generator=rng
            )
        elif self.augment != "none" and self.padding:
            draw["crop"] = augment.draw_crops(n, self.padding, rng)
        if self.augment != "none" and self.flip_prob:
            draws = augment.draw_flips(n, self.flip_prob, rng)
            draw["flip"] = draws if flips is None else flips
        if self.augment == "randaugment":
            draw["ops"] = autoaugment.draw_randaugment(
                n, size, size, self.ops, self.magnitude, generator=rng
            )
        elif self.augment == "trivialaugment":
            draw["ops"] = autoaugment.draw_trivialaugment(n, size, size, generator=rng)
        elif self.augment == "autoaugment":
            policy = "cifar10" if size <= 64 else "imagenet"
            draw["ops"] = autoaugment.draw_autoaugment(n, size, size, policy, generator=rng)
        if self.erasing:
            draw["erasing"] = augment.draw_erasing(n, size, size, self.erasing, generator=rng)
        return draw

    def train(self, images, draw):
        """The augmented, normalised batch (n, 3, size, size), float32, channels_last."""
        with torch.inference_mode():  # of many small operations an eighth is autograd's bookkeeping
            if "resized" in draw:
                images = augment.resized_crop_batch(images, draw["resized"], self.size)
            images = self._centre(images)
            if "crop" in draw:
                images = augment.crop_batch(images, draw["crop"], self.padding)
            if "flip" in draw:
                images = augment.flip_batch(images, draw["flip"])
            if "ops" in draw:
                images = autoaugment.apply_ops(images, draw["ops"])
        # Outside, because a network keeps its input for the backward pass
        images = augment.normalize_batch(images, self.mean, self.std)
        if "erasing" in draw:
            images = augment.erase_batch(images, draw["erasing"])
        return images

    def evaluation(self, images):
        """The centre of the images, normalised; nothing drawn."""
        return augment.normalize_batch(self._centre(images), self.mean, self.std)

    def _centre(self, images):
        start = round((images.shape[-1] - self.size) / 2)  # as torchvision's center_crop
        return images[..., start : start + self.size, start : start + self.size]

    def to_pixels(self, images):
        """Back from normalised to uint8 pixels on the CPU, for pictures."""
        images = images.float().cpu()
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for every image in every epoch. Each is a flag's name."""

    augment: str
    flip: str
    flip_prob: float
    crop_padding: int | None
    crop_scale: float
    randaugment_ops: int
    randaugment_magnitude: int
    random_erasing: float


@dataclass(frozen=True)
class Mixing:
    """How images of a batch are mixed. Each is a flag's name."""

    mixup_alpha: float
    cutmix_alpha: float
    mix_prob: float

    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


@dataclass(frozen=True)
class BatchOptions(Augmentation, Mixing):
    """What makes a batch, its targets and their weights of the images. Each is a flag's name."""

    label_smoothing: float
    imbalance: str
    imbalance_tau: float


def make_views(options, preprocessing):
    """The Views of an Augmentation, for images prepared as a Preprocessing says."""
    padding = preprocessing.size // 8 if options.crop_padding is None else options.crop_padding
    return Views(
        preprocessing.size, preprocessing.mean, preprocessing.std,
        augment=options.augment, flip_prob=options.flip_prob, padding=padding,
        erasing=options.random_erasing, ops=options.randaugment_ops,
        magnitude=options.randaugment_magnitude, crop_scale=options.crop_scale,
        stored=preprocessing.stored_size,
        alternating=options.flip == "alternating", packed=bool(preprocessing.packed_side),
    )  # fmt: skip


def scored_views(kind, size, seed):
    """tricks.tta's views of `--tta`, or None for none; a kind that is none is a UserError."""
    if kind == "none":
        return None
    try:
        return tta_views(kind, size, seed)
    except ValueError as error:
        raise UserError(f"--tta: {error}") from None


def draw_mixing(options, size, rng):
    """This step's mixing, as a function (images, targets) -> (images, targets).

    options: Mixing. With probability `mix_prob` the step mixes, by mixup or CutMix at even odds
    where both alphas are above 0. One draw a step; neighbours in the batch are mixed.
    """
    mixes, cuts = torch.rand(2, generator=rng).tolist()
    if mixes >= options.mix_prob or not options.mixes():
        return lambda images, targets: (images, targets)
    if options.cutmix_alpha and (not options.mixup_alpha or cuts < 0.5):
        box, _ = draw_cutmix(options.cutmix_alpha, size, size, rng)
        return lambda x, y: cutmix_batch(x, y, box, neighbour_pairs(len(x)))[:2]
    lam = draw_mixup(options.mixup_alpha, rng)
    return lambda x, y: mixup_batch(x, y, lam, neighbour_pairs(len(x)))


def row_order(labels, seed, epoch, imbalance="none"):
    """The rows of an epoch in order, int64 (n,): a function of nothing but these.

    labels: int64 (n,). imbalance: of the flag; "balanced" and "sqrt" show rare classes more often.
    """
    if imbalance not in SHARE_POWER:
        return epoch_order(len(labels), seed, epoch)
    labels = labels.cpu()
    shares = class_shares(labels.bincount(), SHARE_POWER[imbalance])
    return weighted_order(labels, shares, generator(seed, "order", epoch))


def train_batches(
    split, views, accelerator, *, batch_size, accumulation, seed, total_steps, imbalance="none"
):
    """A function of the first step -> iterator over the steps' batches, each an iterator of Parts.

    The order of an epoch is `row_order` (or, where machines have shares, a permutation of each
    share), and a sample's draws are a function of (seed, step, its place in the whole batch). The
    batch is cut into accumulation × processes equal parts, and each process draws for its own, so
    neither depends on how many share the work. Parts are made when they are asked for; with CUDA
    two ahead, in a thread and on a stream of their own.
    """
    device, rank = accelerator.device, accelerator.process_index
    processes = accelerator.num_processes
    n = batch_size // (accumulation * processes)
    per_epoch = len(split.labels) // batch_size
    # The places of this process's samples in the whole batch, a row a part
    places = torch.arange(batch_size).view(accumulation, processes, n)[:, rank]
    order = {}  # of one epoch, the last one used
    first_flips = None
    if views.alternating:
        rng = generator(seed, "flips")
        first_flips = augment.draw_flips(len(split.labels), views.flip_prob, rng)

    def part_of(step, turn):
        epoch, batch = divmod(step, per_epoch)
        if epoch not in order:
            order.clear()
            order[epoch] = (
                sharded_order(split.shares, seed, epoch, batch_size, accumulation)
                if split.shares
                else row_order(split.labels, seed, epoch, imbalance)
            )
        rows = order[epoch][batch * batch_size + places[turn]]
        flips = None
        if first_flips is not None:
            flips = augment.alternate_flips(first_flips[rows], epoch)
        streams = SampleStreams(seed, "views", step, places=places[turn])
        draw = views.draw(n, streams, flips, split.sizes(rows))
        images, labels = split.take(rows, device, draw.get("boxes"))
        return Part(views.train(images, draw), labels)

    def from_step(first):
        steps = range(first, total_steps)
        places = ((step, turn) for step in steps for turn in range(accumulation))
        # On a CPU a thread would take a core; MPS crashes where two threads issue work
        make = _two_ahead if device.type == "cuda" else starmap
        parts = make(part_of, places)
        for _ in steps:
            yield islice(parts, accumulation)

    return from_step


def _two_ahead(function, arguments):
    """As itertools.starmap, for a function that makes tensors on a CUDA device.

    A small network's step is short: while it is under way, the host prepares the next parts.
    """
    stream = torch.cuda.Stream()

    def make(each):
        with torch.cuda.stream(stream):
            return function(*each), stream.record_event()

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = deque(pool.submit(make, each) for each in islice(arguments, 2))
        while ahead:
            made, event = ahead.popleft().result()
            ahead.extend(pool.submit(make, each) for each in islice(arguments, 1))
            here = torch.cuda.current_stream()
            here.wait_event(event)
            for tensor in made:
                tensor.record_stream(here)  # else its memory could be another's too early
            yield made
