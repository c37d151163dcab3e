"""What the network sees: training views, evaluation views, mixing, the batches of a step."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from harness.counters import generator
from harness.data.pixels import decode_split, epoch_order, gather
from harness.errors import UserError
from tricks import augment, autoaugment
from tricks.cutmix import cutmix_batch, draw_cutmix
from tricks.mixup import draw_mixup, mixup_batch, neighbour_pairs
from tricks.tta import tta_views


class Samples(NamedTuple):
    """A split, decoded: sample i is pixels[rows[i]] with labels[i].

    harness.training.features keeps features (N, views, ...) in the place of the pixels.
    """

    pixels: torch.Tensor  # uint8 (N, 3, H, W), memory-mapped, of the whole stored split
    rows: torch.Tensor  # int64 (n,)
    labels: torch.Tensor  # int64 (n,)

    def take(self, index, device):
        """The samples at `index` (int64, CPU) on `device`: images (k, 3, H, W), labels (k,)."""
        images, labels = gather(self.pixels, self.rows[index]), self.labels[index]
        if device.type != "cuda":  # MPS would read the host's memory after it has been freed
            return images.to(device), labels.to(device)
        images, labels = images.pin_memory(), labels.pin_memory()
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def decode_splits(data, size, progress, interpolation="bilinear"):
    """{"train": Samples, "val": ..., "test": ...} of the splits that `data` has.

    size: side of the stored pixels in px. interpolation: see `harness.data.pixels.decode_image`.
    """
    return {
        role: decode(split, data.image_column, size, progress, interpolation)
        for role in ("train", "val", "test")
        if (split := getattr(data, role)) is not None
    }


def decode(split, image_column, size, progress, interpolation="bilinear"):
    """Samples of one harness.data.sources.Split; see `decode_splits`."""
    pixels = decode_split(
        split.dataset, image_column, size, name=split.name, interpolation=interpolation,
        progress=progress, rows=split.rows, bit_depth=split.bit_depth,
    )  # fmt: skip
    return Samples(pixels, torch.from_numpy(split.rows), torch.from_numpy(split.labels))


class Part(NamedTuple):
    """The slice of a step's batch that one forward pass of one process sees, on its device."""

    images: torch.Tensor  # uint8 (n, 3, H, W), or kept features (n, views, ...)
    labels: torch.Tensor  # int64 (n,)
    draw: dict  # what the training views drew for these images


class Views:
    """Batches of uint8 pixels -> what the network takes: whole batches, every sample its own draw.

    augment: a word of flags.AUGMENTS. padding: pixels of the random crop, 0 for none. flip_prob
    and erasing: probabilities. alternating: `train_batches` hands `draw` the flips, drawn once an
    image. ops and magnitude: RandAugment's. mean and std: a number a channel. size: pixels a side
    that the network sees; stored: of the images that come in, None for `size`. crop_scale: the
    least share of the area in a random resized crop, which takes the place of the padded crop; 0:
    the padded crop. Without a resized crop, larger images are cut to their centre.

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
    ):
        self.size, self.mean, self.std = size, mean, std
        self.augment, self.padding, self.flip_prob = augment, padding, flip_prob
        self.erasing, self.ops, self.magnitude = erasing, ops, magnitude
        self.alternating = alternating
        self.stored, self.crop_scale = stored or size, crop_scale
        if self.stored < size:
            raise ValueError(f"stored must be at least the size, {size}, got {stored}")

    def draw(self, n, rng, flips=None):
        """Draw for a whole batch of n, on the CPU: tensors (or tuples of them) of length n.

        flips: bool (n,), what is mirrored, instead of a draw.
        """
        size, draw = self.size, {}
        if self.augment != "none" and self.crop_scale:
            draw["resized"] = augment.draw_resized_crops(
                n, self.stored, self.stored, (self.crop_scale, 1.0), generator=rng
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


def make_views(args, look):
    """The Views of these flags, for images prepared as `look`, a Preprocessing, says."""
    return Views(
        look.size, look.mean, look.std, augment=args.augment, flip_prob=args.flip_prob,
        padding=look.size // 8 if args.crop_padding is None else args.crop_padding,
        erasing=args.random_erasing, ops=args.randaugment_ops,
        magnitude=args.randaugment_magnitude, stored=look.stored_size, crop_scale=args.crop_scale,
        alternating=args.flip == "alternating",
    )  # fmt: skip


def scored_views(kind, size, seed):
    """tricks.tta's views of `--tta`, or None for none; a kind that is none is a UserError."""
    if kind == "none":
        return None
    try:
        return tta_views(kind, size, seed)
    except ValueError as error:
        raise UserError(f"--tta: {error}") from None


def mixes(args):
    """Whether these flags mix images at all."""
    return args.mix_prob > 0 and (args.mixup_alpha > 0 or args.cutmix_alpha > 0)


def draw_mixing(mixup_alpha, cutmix_alpha, prob, size, rng):
    """This step's mixing, as a function (images, targets) -> (images, targets).

    With probability `prob` the step mixes, by mixup or CutMix at even odds where both alphas are
    above 0. One draw a step; who is mixed with whom is a matter of neighbours in the batch.
    """
    mixes, cuts = torch.rand(2, generator=rng).tolist()
    if mixes >= prob or not (mixup_alpha or cutmix_alpha):
        return lambda images, targets: (images, targets)
    if cutmix_alpha and (not mixup_alpha or cuts < 0.5):
        box, _ = draw_cutmix(cutmix_alpha, size, size, rng)
        return lambda x, y: cutmix_batch(x, y, box, neighbour_pairs(len(x)))[:2]
    lam = draw_mixup(mixup_alpha, rng)
    return lambda x, y: mixup_batch(x, y, lam, neighbour_pairs(len(x)))


def train_batches(split, views, accelerator, *, batch_size, accumulation, seed, total_steps):
    """A function of the first step -> iterator over the steps' batches, each a list of Parts.

    The order of an epoch is permutation(seed, epoch) and the draws are made for the whole batch
    from (seed, step); then the batch is cut into accumulation × processes equal parts, so neither
    depends on how many share the work. With CUDA, a thread keeps two batches ahead of it.
    """
    device, rank = accelerator.device, accelerator.process_index
    processes = accelerator.num_processes
    n = batch_size // (accumulation * processes)
    per_epoch = len(split.labels) // batch_size
    order = {}  # of one epoch, the last one used
    first = None
    if views.alternating:
        first = augment.draw_flips(len(split.labels), views.flip_prob, generator(seed, "flips"))

    def parts_of(step):
        epoch, place = divmod(step, per_epoch)
        if epoch not in order:
            order.clear()
            order[epoch] = epoch_order(len(split.labels), seed, epoch)
        rows = order[epoch][place * batch_size : (place + 1) * batch_size]
        flips = None if first is None else augment.alternate_flips(first[rows], epoch)
        draw = views.draw(batch_size, generator(seed, "views", step), flips)
        parts = []
        for turn in range(accumulation):
            start = (turn * processes + rank) * n
            mine = slice(start, start + n)
            images, labels = split.take(rows[mine], device)
            parts.append(Part(images, labels, {k: cut_draw(v, mine) for k, v in draw.items()}))
        return parts

    def from_step(first):
        # On a CPU gathering is 0.1 % of a step, and a thread would take a core; MPS crashes where
        # two threads issue work
        if device.type != "cuda":
            yield from map(parts_of, range(first, total_steps))
            return
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = [pool.submit(parts_of, s) for s in range(first, min(first + 2, total_steps))]
            for step in range(first, total_steps):
                parts = ahead.pop(0).result()
                if step + 2 < total_steps:
                    ahead.append(pool.submit(parts_of, step + 2))
                yield parts

    return from_step


def cut_draw(draw, part):
    """The draws of a slice of a batch."""
    if isinstance(draw, torch.Tensor):
        return draw[part]
    return type(draw)(*(tensor[part] for tensor in draw))
