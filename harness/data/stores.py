"""Two stores of pixels with one interface: decoded squares, or packed JPEGs of whole images."""

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

DISK_SHARE = 1 / 4  # of the free space that decoded pixels may take under --pixels auto
SAMPLED = 16  # images that are packed to estimate the size of a store


class Samples(NamedTuple):
    """A split's images and labels: sample i is stored[rows[i]] with labels[i].

    harness.training.features stores features (N, views, ...) instead of pixels.
    """

    stored: torch.Tensor | PackedImages  # uint8 (N, 3, H, W), memory-mapped; or packed images
    rows: torch.Tensor  # int64 (n,)
    labels: torch.Tensor  # int64 (n,)
    shares: tuple = ()  # int64 arrays: the samples that each machine stores; () if all store all

    def sizes(self, index):
        """Heights and widths, int64 (k,) each, of packed samples; None where all are squares."""
        return self.stored.sizes(self.rows[index]) if self.packed else None

    @property
    def packed(self) -> bool:
        return isinstance(self.stored, PackedImages)

    def take(self, index, device, boxes=None):
        """The samples at `index` (int64, CPU) on `device`: images (k, 3, H, W), labels (k,).

        boxes: int64 (k, 4), to cut out of packed samples; None for the pixels of evaluation.
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

    preprocessing: a Preprocessing. accelerator (its processes share the work) and options: see
    `harness.data.cache.decode_split`. shard: every machine stores only its share of train.
    """
    shares = _shares(data.train, preprocessing, accelerator) if shard else ()
    splits = {}
    for role in ("train", "val", "test"):
        if split := getattr(data, role):
            sharding = {}
            if shares and role == "train":
                sharding["share"] = split.rows[shares[machines(accelerator)[0]]]
            elif shares and split.dataset is data.train.dataset:  # held out of train
                sharding["share"] = split.rows
            splits[role] = decode(
                split, data.image_column, preprocessing, accelerator, **sharding, **options
            )
    if shares:  # all machines give train the same content: that of all shares together
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

    The side is `stored_size`, of which the network sees the centre; with packed_side, it is the
    side that the network sees. file: a path, or a binary file object. Raises whatever a reader of
    images raises for a bad file.
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

    splits: of `decode_splits`. Images of decoded stores are compared by their hashes, those of
    packed stores by the checksums and sizes of the JPEGs. Stores of older versions, which have no
    hashes, and stores of one machine's share are not compared.
    """
    keys = {role: _image_keys(data, role, preprocessing, splits[role]) for role in splits}
    train, lines = keys.pop("train"), []
    if train is None:
        return []
    order = train.argsort(kind="stable")
    for role, held_out in keys.items():
        if held_out is None:
            continue
        positions = np.searchsorted(train, held_out, sorter=order).clip(max=len(train) - 1)
        twins = order[positions]
        repeats = np.flatnonzero((train[twins] == held_out) & (held_out != 0))
        if len(repeats):
            split, source = getattr(data, role), data.train
            relabelled = int((split.labels[repeats] != source.labels[twins[repeats]]).sum())
            pairs = [(int(split.rows[k]), int(source.rows[twins[k]])) for k in repeats[:SHOWN]]
            shown = ", ".join(f"{a} of '{split.name}' is {b} of '{source.name}'" for a, b in pairs)
            lines.append(
                f"warning: {len(repeats):,} of {len(split):,} {role} images are train images, too, "
                f"pixel for pixel: {shown}{', …' if len(repeats) > SHOWN else ''}"
                + (f"; {relabelled:,} of them with another class" if relabelled else "")
                + f"; {role} scores will be too good"
            )
    return lines


def _image_keys(data, role, preprocessing, samples):
    """uint64 (n,): equal for identical images, 0 for unreadable ones; None without hashes."""
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
    """The line of `--prepare_data` on the files that `decode_splits` has made or found."""
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
    return f"{_size(sum(sizes))} in {folder}; the same command without --prepare_data trains"


def _shares(split, preprocessing, accelerator):
    """The samples that each machine stores, see `deal`; UserError where they can't be shared."""
    _, number, processes = machines(accelerator)
    if not preprocessing.packed_side:
        raise UserError("--shard_store is for packed pixels: add --pixels packed")
    if processes * number != accelerator.num_processes:
        raise UserError("--shard_store needs the same number of processes on each machine")
    return deal(split.rows, number)


@dataclass(frozen=True)
class StoreOptions:
    """The flags of the store: its kind, its decoder, the crops, and how it is made."""

    pixels: str
    jpeg_decoder: str
    augment: str
    crop_scale: float
    stages: list[dict] | None = None  # of a fine-tuning run, which may have crops of their own
    shard_store: bool = False
    verify_cache: bool = False
    prepare_data: bool = False

    def least_crop_scale(self) -> float:
        """The least share of the area that a random crop takes in any stage; 0 for none."""
        flags = {"augment": self.augment, "crop_scale": self.crop_scale}
        stages = [flags, *(flags | stage for stage in self.stages or [])]
        scales = [stage["crop_scale"] for stage in stages if stage["augment"] != "none"]
        return min((scale for scale in scales if scale), default=0.0)


def choose_store(options, data, preprocessing):
    """(`preprocessing` with the packed_side of the store to use, the plan's line on the store).

    options: StoreOptions. `--pixels` says which store; auto is decoded where images are small
    squares, and where there is no random resized crop and the decoded pixels exist already or take
    at most a quarter of the free disk; otherwise it is packed.
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
    kind, reason = options.pixels, "as --pixels says"
    if kind == "auto" and data.image_size <= SMALL_SQUARE:
        kind, reason = "decoded", "the images are small squares"
    elif kind == "auto" and scale:
        kind, reason = "packed", "random crops are cut from the whole images"
    elif kind == "auto":
        complete = all(file.exists() for file in decoded_files)
        free = _free(decoded_files[0].parent)
        kind, reason = "decoded", "no random crop needs more"
        if not complete and decoded_bytes > DISK_SHARE * free:
            kind = "packed"
            reason = f"decoded they would take {_size(decoded_bytes)} of {_size(free)} free"
    if kind == "decoded" and jpeg_decoder != "cpu":
        raise UserError(f"--jpeg_decoder {jpeg_decoder} is for packed pixels, --pixels packed")
    if kind == "decoded":
        squares = f"squares {preprocessing.stored_size} px a side"
        line = f"decoded, {_size(decoded_bytes)} of {squares}: {reason}"
        return preprocessing._replace(packed_side=0), line
    if jpeg_decoder == "nvjpeg":
        reason += "; training decodes on the GPU, not the same bits on another version of CUDA"
    side = packed_side(preprocessing.size, preprocessing.stored_size, scale)
    size = _packed_size(splits, data.image_column, side)
    line = f"packed, {size} of JPEGs, shorter side up to {side} px: {reason}"
    return preprocessing._replace(packed_side=side), line


def _packed_size(splits, image_column, side):
    """The size of the splits' packed stores as text: of their files, else estimated."""
    total, complete = 0, True
    for split in splits:
        size = packed_size(find_packed(split.dataset, image_column, side, split.bit_depth))
        if size is None:
            complete, images = False, encoded(split.dataset, image_column)
            rows = range(0, len(images), max(1, len(images) // SAMPLED))
            sampled = [packed_bytes(images, row, side, split.bit_depth) for row in rows]
            size = sum(sampled) * len(images) / max(1, len(sampled))
        total += size
    return _size(total) if complete else f"about {_size(total)}"


def _free(folder):
    """Free bytes of the disk on which a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(number):
    """A number of bytes as text: "28.8 kB"."""
    unit = min(max(int(math.log(max(number, 1), 1000)), 0), 4)
    return f"{number / 1000**unit:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}"


def store_identity(splits):
    """The store and all that determines its pixels: a resumed run must have the same.

    splits: {role: Samples}.
    """
    if not any(samples.packed for samples in splits.values()):
        return "decoded"
    shares = splits["train"].shares
    content = {role: samples.stored.content for role, samples in splits.items()}
    version = decoder(splits["train"].stored.on_gpu)
    return {"packed": content, "decoder": version} | ({"shares": len(shares)} if shares else {})
