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

# The name of the rule by which the random numbers of a batch are drawn. Checkpoints carry it: a run
# that is resumed under another rule would draw other numbers. Whoever changes the rule renames it,
# see harness.training.state.CONTINUED_BY
DRAWS = "by sample"


# --imbalance: a class's share of an epoch is proportional to this power of its number of images
SHARE_POWER = {"balanced": 0.0, "sqrt": 0.5}


class Microbatch(NamedTuple):
    """The slice of a step's batch for one forward pass of one process, on its device."""

    # augmented and normalised (n, 3, H, W), float32; or stored features (n, ...)
    images: torch.Tensor
    labels: torch.Tensor  # int64 (n,)


class Views:
    """Turns whole batches of uint8 pixels into the network's input, with draws for each sample.

    Args:
        size: px a side that the network sees.
        mean, std: one number per channel.
        augment: one of flags.AUGMENTS.
        padding: px around the image for the random crop, 0 for no such crop.
        flip_prob, erasing: probabilities.
        ops, magnitude: RandAugment's.
        alternating: `train_batches` gives the flips to `draw`; an image's first one is drawn, and
            then every epoch mirrors it the other way.
        stored: px a side of the images that come in, None for `size`.
        crop_scale: the least share of the area that a random resized crop takes; it replaces the
            padded crop. 0 for the padded crop. Without a resized crop, larger images are cut to
            their centre.
        packed: the images come from the packed store, already cut to the boxes of the draw.

    Raises ValueError where `stored` is below `size`.
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

        rng: harness.counters.SampleStreams of these samples, or a torch.Generator. flips: bool
        (n,), which of them are mirrored, instead of a draw. sizes: heights and widths of packed
        images, int64 (n,) each; "boxes" of the draw are for `Samples.take`.
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
        with torch.inference_mode():  # autograd's bookkeeping would be an eighth of the time
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
        """The centre of the images, normalised, without random draws."""
        return augment.normalize_batch(self._centre(images), self.mean, self.std)

    def _centre(self, images):
        start = round((images.shape[-1] - self.size) / 2)  # as torchvision's center_crop
        return images[..., start : start + self.size, start : start + self.size]

    def to_pixels(self, images):
        """Normalised images as uint8 pixels on the CPU again, for pictures."""
        images = images.float().cpu()
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Augmentation:
    """The flags that say what is drawn for every image in every epoch."""

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
    """The flags that say how the images of a batch are mixed."""

    mixup_alpha: float
    cutmix_alpha: float
    mix_prob: float

    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


@dataclass(frozen=True)
class BatchOptions(Augmentation, Mixing):
    """The flags that say how images become a batch with targets and weights."""

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
    """The views of `--tta`, see tricks.tta; None for "none". UserError for an unknown kind."""
    if kind == "none":
        return None
    try:
        return tta_views(kind, size, seed)
    except ValueError as error:
        raise UserError(f"--tta: {error}") from None


def draw_mixing(options, size, rng):
    """Draw the mixing of one step: a function (images, targets) -> (images, targets).

    options: Mixing. A step is mixed with probability `mix_prob`. Where both alphas are above 0,
    mixup and CutMix are equally likely. One draw serves the whole step, in which neighbours in the
    batch are mixed.
    """
    mix_draw, cutmix_draw = torch.rand(2, generator=rng).tolist()
    if mix_draw >= options.mix_prob or not options.mixes():
        return lambda images, targets: (images, targets)
    if options.cutmix_alpha and (not options.mixup_alpha or cutmix_draw < 0.5):
        box, _ = draw_cutmix(options.cutmix_alpha, size, size, rng)
        return lambda x, y: cutmix_batch(x, y, box, neighbour_pairs(len(x)))[:2]
    lam = draw_mixup(options.mixup_alpha, rng)
    return lambda x, y: mixup_batch(x, y, lam, neighbour_pairs(len(x)))


def row_order(labels, seed, epoch, imbalance="none"):
    """The order in which an epoch shows the rows, int64 (n,). It depends on the arguments alone.

    labels: int64 (n,). imbalance: the flag; "balanced" and "sqrt" show rare classes more often.
    """
    if imbalance not in SHARE_POWER:
        return epoch_order(len(labels), seed, epoch)
    labels = labels.cpu()
    shares = class_shares(labels.bincount(), SHARE_POWER[imbalance])
    return weighted_order(labels, shares, generator(seed, "order", epoch))


def train_batches(
    split, views, accelerator, *, batch_size, accumulation, seed, total_steps, imbalance="none"
):
    """A function of the first step. It gives each step's batch, as an iterator of Microbatches.

    The order of an epoch is `row_order` (or, where machines have shares, a permutation of each
    share), and a sample's draws are a function of (seed, step, position in the whole batch). The
    batch is cut into accumulation × processes microbatches of one size, and each process draws
    for its own. So neither order nor draws depend on the number of processes. A microbatch is made
    when it is asked for; with CUDA two are made in advance, in a thread and on a stream of its own.
    """
    device, rank = accelerator.device, accelerator.process_index
    processes = accelerator.num_processes
    n = batch_size // (accumulation * processes)
    per_epoch = len(split.labels) // batch_size
    # The positions of this process's samples in the whole batch, one row per microbatch
    positions = torch.arange(batch_size).view(accumulation, processes, n)[:, rank]
    order = {}  # of the epoch that was last used
    first_flips = None
    if views.alternating:
        rng = generator(seed, "flips")
        first_flips = augment.draw_flips(len(split.labels), views.flip_prob, rng)

    def make_microbatch(step, index):
        epoch, batch = divmod(step, per_epoch)
        if epoch not in order:
            order.clear()
            order[epoch] = (
                sharded_order(split.shares, seed, epoch, batch_size, accumulation)
                if split.shares
                else row_order(split.labels, seed, epoch, imbalance)
            )
        rows = order[epoch][batch * batch_size + positions[index]]
        flips = None
        if first_flips is not None:
            flips = augment.alternate_flips(first_flips[rows], epoch)
        streams = SampleStreams(seed, "views", step, places=positions[index])
        draw = views.draw(n, streams, flips, split.sizes(rows))
        images, labels = split.take(rows, device, draw.get("boxes"))
        return Microbatch(views.train(images, draw), labels)

    def from_step(first_step):
        steps = range(first_step, total_steps)
        arguments = ((step, index) for step in steps for index in range(accumulation))
        # On a CPU a thread would take a core; MPS crashes where two threads issue work
        apply = _starmap_ahead if device.type == "cuda" else starmap
        microbatches = apply(make_microbatch, arguments)
        for _ in steps:
            yield islice(microbatches, accumulation)

    return from_step


def _starmap_ahead(function, arguments):
    """As itertools.starmap, two results in advance, of a function that makes CUDA tensors.

    A small network's step is short: while it runs, the host prepares the next microbatches.
    """
    stream = torch.cuda.Stream()

    def call(values):
        with torch.cuda.stream(stream):
            return function(*values), stream.record_event()

    with ThreadPoolExecutor(max_workers=1) as pool:
        futures = deque(pool.submit(call, values) for values in islice(arguments, 2))
        while futures:
            tensors, event = futures.popleft().result()
            futures.extend(pool.submit(call, values) for values in islice(arguments, 1))
            consumer = torch.cuda.current_stream()
            consumer.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(consumer)  # else its memory could be reused too early
            yield tensors
