"""The two stores of pixels, one interface: decoded squares, or packed JPEGs of whole images."""

from __future__ import annotations

import math
import shutil
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from harness.data.cache import cache_folder, cached, decode_split, image_hashes
from harness.data.jpegs import decoder, evaluation_pixels, packed_side
from harness.data.packed import PackedImages
from harness.data.packing import find_packed, pack_split, packed_bytes, packed_size
from harness.data.pixels import SMALL_SQUARE, deal, decode_image, encoded, gather
from harness.errors import UserError
from harness.processes import ALONE, from_each, machines

MOST_OF_DISK = 1 / 4  # of what is free, that decoded pixels may take unasked
SAMPLED = 16  # images that are packed for an estimate


class Samples(NamedTuple):
    """A split's images and labels: sample i is stored[rows[i]] with labels[i].

    harness.training.features keeps features (N, views, ...) in the place of the pixels.
    """

    stored: torch.Tensor | PackedImages  # uint8 (N, 3, H, W), memory-mapped, or what stands for it
    rows: torch.Tensor  # int64 (n,)
    labels: torch.Tensor  # int64 (n,)
    shares: tuple = ()  # what each machine stores, if not all: int64 arrays of sample numbers

    def sizes(self, index):
        """Heights and widths, int64 (k,) each, of packed samples; None where all are squares."""
        return self.stored.sizes(self.rows[index]) if self.packed else None

    @property
    def packed(self) -> bool:
        return isinstance(self.stored, PackedImages)

    def take(self, index, device, boxes=None):
        """The samples at `index` (int64, CPU) on `device`: images (k, 3, H, W), labels (k,).

        boxes: int64 (k, 4), what to cut out of packed samples; else they are as in evaluation.
        """
        rows, labels, pinned = self.rows[index], self.labels[index], device.type == "cuda"
        if not self.packed:
            images = gather(self.stored, rows)
        elif boxes is None:
            images = self.stored.centres(rows, pinned)
        elif self.stored.on_gpu:
            return self.stored.crops_on(device, rows, boxes), labels.to(device)
        else:
            images = self.stored.crops(rows, boxes, pinned)
        if device.type != "cuda":  # MPS would read the host's memory after it has been freed
            return images.to(device), labels.to(device)
        images, labels = images.pin_memory(), labels.pin_memory()
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def decode_splits(data, preprocessing, accelerator=ALONE, shard=False, **options):
    """{"train": Samples, "val": ..., "test": ...} of the splits that `data` has.

    preprocessing: a Preprocessing. accelerator, whose processes share the work, and options: see
    `harness.data.cache.decode_split`. shard: every machine stores its share of train alone.
    """
    shares = _shares(data.train, preprocessing, accelerator) if shard else ()
    splits = {}
    for role in ("train", "val", "test"):
        if split := getattr(data, role):
            own = {}
            if shares and role == "train":
                own["share"] = split.rows[shares[machines(accelerator)[0]]]
            elif shares and split.dataset is data.train.dataset:  # held out of it
                own["share"] = split.rows
            splits[role] = decode(
                split, data.image_column, preprocessing, accelerator, **own, **options
            )
    if shares:  # all machines speak of the same pixels of train: of all shares
        train = splits["train"]._replace(shares=tuple(shares))
        train.stored.content = "+".join(
            sorted(set(from_each(accelerator, lambda: train.stored.content)))
        )
        splits["train"] = train
    return splits


def decode(split, image_column, preprocessing, accelerator=ALONE, share=None, **options):
    """Samples of one harness.data.sources.Split; see `decode_splits`.

    share: the rows that this machine stores, None for all.
    """
    options |= {"rows": split.rows, "name": split.name, "bit_depth": split.bit_depth}
    options["accelerator"] = accelerator
    if preprocessing.packed_side:
        options |= {"rows": split.rows if share is None else share, "share": share}
        pixels = pack_split(split.dataset, image_column, preprocessing, **options)
    else:
        pixels = decode_split(
            split.dataset, image_column, preprocessing.stored_size,
            interpolation=preprocessing.interpolation, **options,
        )  # fmt: skip
    return Samples(pixels, torch.from_numpy(split.rows), torch.from_numpy(split.labels))


def evaluation_image(file, preprocessing, bit_depth=None):
    """One image file as it is stored for evaluation: uint8 (3, side, side) on the CPU.

    The side is `stored_size`, of which the network sees the centre, or with packed_side what it
    sees. file: a path, or a binary file object. Raises whatever a reader raises for a bad file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by its header
        if preprocessing.packed_side:
            return evaluation_pixels(file, preprocessing, bit_depth)
        pixels = decode_image(
            file, preprocessing.stored_size, preprocessing.interpolation, bit_depth
        )
    return torch.from_numpy(pixels)


SHOWN = 3  # pairs of identical images in a warning


def identical_images(data, preprocessing, splits) -> list[str]:
    """Warnings for images of val and test that are in train as well, pixel for pixel.

    splits: of `decode_splits`. Decoded stores are compared by their images' hashes, packed ones by
    the checksums and sizes of the JPEGs. Stores of older versions, which have no hashes, and those
    that hold a machine's share are passed by.
    """
    keys = {role: _image_keys(data, role, preprocessing, splits[role]) for role in splits}
    train, warnings = keys.pop("train"), []
    if train is None:
        return []
    order = train.argsort(kind="stable")
    for role, theirs in keys.items():
        if theirs is None:
            continue
        at = np.searchsorted(train, theirs, sorter=order).clip(max=len(train) - 1)
        twins = order[at]
        found = np.flatnonzero((train[twins] == theirs) & (theirs != 0))
        if len(found):
            own, ours = getattr(data, role), data.train
            other = int((own.labels[found] != ours.labels[twins[found]]).sum())
            pairs = [(int(own.rows[k]), int(ours.rows[twins[k]])) for k in found[:SHOWN]]
            shown = ", ".join(f"{a} of '{own.name}' is {b} of '{ours.name}'" for a, b in pairs)
            warnings.append(
                f"warning: {len(found):,} of {len(own):,} {role} images are train images, too, "
                f"pixel for pixel: {shown}{', …' if len(found) > SHOWN else ''}"
                + (f"; {other:,} of them with another class" if other else "")
                + f"; {role} scores will be too good"
            )
    return warnings


def _image_keys(data, role, preprocessing, samples):
    """uint64 (n,) of a split's samples, equal for identical images, 0 for none; or None."""
    split = getattr(data, role)
    if samples.shares:
        return None
    if samples.packed:
        entries = samples.stored.entries[split.rows]
        sides = entries["width"].astype("u8") * 65_537 + entries["height"]
        mixed = entries["length"].astype("u8") * np.uint64(2_654_435_761) + sides
        return (entries["crc"].astype("u8") << np.uint64(32)) ^ mixed
    hashes = image_hashes(
        split.dataset, data.image_column, preprocessing.stored_size, preprocessing.interpolation,
        split.bit_depth,
    )  # fmt: skip
    return None if hashes is None else hashes[split.rows]


def describe_prepared(data, splits):
    """What `--prepare_data` says of the files that `decode_splits` made or found."""
    files = {
        samples.stored.blob if samples.packed else id(getattr(data, role).dataset): samples.stored
        for role, samples in splits.items()
    }
    sizes = [
        packed_size(pixels.blob.with_suffix(".index")) if isinstance(pixels, PackedImages)
        else pixels.nbytes
        for pixels in files.values()
    ]  # fmt: skip
    folder = cache_folder()
    return f"{_in_words(sum(sizes))} in {folder}; the same command without --prepare_data trains"


def _shares(split, preprocessing, accelerator):
    """Of `deal`, for the machines that there are."""
    _, number, processes = machines(accelerator)
    if not preprocessing.packed_side:
        raise UserError("--shard_store is for packed pixels: add --pixels packed")
    if processes * number != accelerator.num_processes:
        raise UserError("--shard_store wants as many processes on each machine")
    return deal(split.rows, number)


@dataclass(frozen=True)
class StoreOptions:
    """Which store of pixels is asked for, and the random crops that it must serve."""

    pixels: str
    jpeg_decoder: str
    augment: str
    crop_scale: float
    stages: list[dict] | None = None  # of a fine-tune, which may have crops of their own

    def least_crop_scale(self) -> float:
        """The least share of the area that a random crop takes in any stage; 0 for none."""
        whole = {"augment": self.augment, "crop_scale": self.crop_scale}
        stages = [whole, *(whole | stage for stage in self.stages or [])]
        scales = [stage["crop_scale"] for stage in stages if stage["augment"] != "none"]
        return min((scale for scale in scales if scale), default=0.0)


def choose_store(options, data, preprocessing):
    """(`preprocessing` with the packed_side of the store that is used, what it is and why).

    options: StoreOptions. By `--pixels`; auto: decoded where images are small squares, or where no
    resized crop is on and the decoded pixels are there already or fit a quarter of the free disk;
    else packed.
    """
    splits = [split for split in (data.train, data.val, data.test) if split]
    splits = list({id(split.dataset): split for split in splits}.values())
    scale, jpeg_decoder = options.least_crop_scale(), options.jpeg_decoder
    decoded_files = [
        cached(split.dataset, data.image_column, preprocessing.stored_size,
               preprocessing.interpolation, split.bit_depth)
        for split in splits
    ]  # fmt: skip
    decoded_bytes = sum(len(split.dataset) for split in splits) * 3 * preprocessing.stored_size**2
    kind, why = options.pixels, "as asked"
    if kind == "auto" and data.image_size <= SMALL_SQUARE:
        kind, why = "decoded", "the images are small squares"
    elif kind == "auto" and scale:
        kind, why = "packed", "random crops are cut from the whole images"
    elif kind == "auto":
        there, free = all(file.exists() for file in decoded_files), _free(decoded_files[0].parent)
        kind, why = "decoded", "no random crop wants more"
        if not there and decoded_bytes > MOST_OF_DISK * free:
            kind = "packed"
            why = f"decoded they would take {_in_words(decoded_bytes)} of {_in_words(free)} free"
    if kind == "decoded" and jpeg_decoder != "cpu":
        raise UserError(f"--jpeg_decoder {jpeg_decoder} is for packed pixels, --pixels packed")
    if kind == "decoded":
        words = (
            f"decoded, {_in_words(decoded_bytes)} of squares {preprocessing.stored_size} px a side"
        )
        return preprocessing._replace(packed_side=0), f"{words}: {why}"
    if jpeg_decoder == "nvjpeg":
        why += "; training decodes on the GPU, not the same bits on another version of CUDA"
    side = packed_side(preprocessing.size, preprocessing.stored_size, scale)
    words = f"packed, {_packed_words(splits, data.image_column, side)}"
    return preprocessing._replace(
        packed_side=side
    ), f"{words} of JPEGs, shorter side up to {side} px: {why}"


def _packed_words(splits, image_column, side):
    """The bytes of the splits' packed stores: of files that are there, else an estimate."""
    total, there = 0, True
    for split in splits:
        size = packed_size(find_packed(split.dataset, image_column, side, split.bit_depth))
        if size is None:
            there, images = False, encoded(split.dataset, image_column)
            rows = range(0, len(images), max(1, len(images) // SAMPLED))
            sampled = [packed_bytes(images, row, side, split.bit_depth) for row in rows]
            size = sum(sampled) * len(images) / max(1, len(sampled))
        total += size
    return _in_words(total) if there else f"about {_in_words(total)}"


def _free(folder):
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _in_words(number):
    unit = min(max(int(math.log(max(number, 1), 1000)), 0), 4)
    return f"{number / 1000**unit:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}"


def store_identity(splits):
    """What a run must share with the one it continues: the store, and all that gives its pixels.

    splits: {role: Samples}.
    """
    if not any(samples.packed for samples in splits.values()):
        return "decoded"
    shares = splits["train"].shares
    content = {role: samples.stored.content for role, samples in splits.items()}
    by = decoder(splits["train"].stored.on_gpu)
    return {"packed": content, "decoder": by} | ({"shares": len(shares)} if shares else {})
