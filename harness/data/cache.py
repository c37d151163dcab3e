"""Decode once: a split's images become one memory-mapped uint8 tensor, made on the first start.

Decoding costs 20 to 100 times what a whole training batch's augmentation costs, so it is done
once per data set and image size, by all processes of a machine together. The result lies in the
cache folder of `datasets`, under `pixels/`, and may be deleted at any time: the next start makes
it again. It has two files: KEY.npy, the pixels; and KEY.json, a hash for every HASHED images, and
which images could not be read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from harness.data.making import lock_of, make_together, threads
from harness.data.pixels import FILTERS, decode_image, encoded, image_file
from harness.errors import UserError, nearest
from harness.files import has_file, replace_file
from harness.processes import ALONE

DECODE_VERSION = 2  # part of the cache key: raise it whenever decode_image's output changes
BLOCK = 256  # images a thread decodes at a time
HASHED = 16  # images under one hash; BLOCK is a multiple of it
HASH_BYTES = 8
SAMPLED = 64  # hashes that each start compares with the pixels


def decode_split(
    dataset, image_column, size, *, name, interpolation="bilinear", progress=True, rows=None,
    bit_depth=None, accelerator=ALONE, verify=False,
):  # fmt: skip
    """Decode every image of `dataset` to RGB pixels of one size, or find them in the cache.

    The cache key is the data set's fingerprint, the column, the size, the interpolation and
    `DECODE_VERSION`, so a second start, another process or another run finds the files. Any number
    of runs may call this at once: one of them decodes while the others wait for its lock. A damaged
    file is made again, and a line says so.

    Args:
        dataset: a `datasets.Dataset`; its rows are decoded in order.
        image_column: the name of its `Image` column.
        size: side of the square result in px, see `decode_image`.
        name: what the split is called in messages.
        interpolation: Pillow's filter, see `decode_image`.
        progress: show a bar, on one process of each machine, when it takes more than a second.
        rows: the rows that will be used, None for all. An image outside of them that can't be read
            becomes black.
        bit_depth: of 16-bit gray images, see `decode_image`.
        accelerator: all its processes call this, and those of one machine share the work. Without
            it this process does all.
        verify: compare all hashes of a file from the cache with its pixels, not only SAMPLED.

    Returns:
        uint8 (len(dataset), 3, size, size), memory-mapped and never to be written to: the
        mapping is read-only, and writing to it kills the process. `gather` copies.

    Raises:
        UserError: an image that can't be read (the message names split, index and file), a full
            disk, or an unknown interpolation.
    """
    if interpolation not in FILTERS:
        raise UserError(
            f'unknown interpolation "{interpolation}"{nearest(interpolation, FILTERS)}; there are '
            + ", ".join(FILTERS)
        )
    file = cached(dataset, image_column, size, interpolation, bit_depth)
    shape = (len(dataset), 3, size, size)
    used = np.ones(len(dataset), bool) if rows is None else np.isin(np.arange(len(dataset)), rows)

    def refuse(bad):
        for row, reason in bad.items():
            if used[row]:
                raise UserError(unreadable(dataset, image_column, name, row, reason))

    decode = partial(decode_image, size=size, interpolation=interpolation, bit_depth=bit_depth)
    progress = progress and accelerator.is_local_main_process
    job = _Job(encoded(dataset, image_column), decode, refuse, name, progress)
    _make(file, shape, job, accelerator, verify)
    refuse(_read_index(file)["bad"])  # another run may have made the file, and used other rows
    # Mode "r": Linux refuses a copy-on-write mapping that is larger than the memory.
    pixels = np.load(file, mmap_mode="r")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(pixels)


def cached(dataset, image_column, size, interpolation="bilinear", bit_depth=None):
    """The file that `decode_split` makes, whether it exists or not."""
    key = (image_column, size, interpolation, DECODE_VERSION, *([bit_depth] if bit_depth else ()))
    return cache_file(dataset, *key).with_suffix(".npy")


def image_hashes(dataset, image_column, size, interpolation="bilinear", bit_depth=None):
    """uint64 (n,): a hash of each decoded image of a data set; None where there are no hashes.

    The arguments are those that `decode_split` was called with. Images have one hash if they are
    the same, pixel for pixel; images that can't be read have 0.
    """
    index = _read_index(cached(dataset, image_column, size, interpolation, bit_depth))
    if index is None or index["images"] is None or len(index["images"]) != len(dataset):
        return None
    hashes = index["images"].copy()
    hashes[list(index["bad"])] = 0
    return hashes


def find_bad(dataset, image_column, *, name, bit_depth=None, progress=True):
    """{row: reason} of the images of `dataset` that can't be decoded, with their files' names.

    The first start decodes every image once to find them, later ones read the result from a file.
    Any number of processes may call this at once.
    """
    key = (image_column, "bad", DECODE_VERSION, *([bit_depth] if bit_depth else ()))
    file, images = cache_file(dataset, *key), encoded(dataset, image_column)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with lock_of(file):
            index = _read_index(file)
            if index is None:
                decode = partial(decode_image, size=8, bit_depth=bit_depth)  # JPEGs at an eighth
                job = _Job(images, decode, lambda bad: None, name, progress)
                _write_index(file, _decode(job, lambda row, pixels: None))
                index = _read_index(file)
    except OSError as error:
        raise UserError(
            f"cannot write {file}.json: {error.strerror or error}; make room, or set "
            "HF_DATASETS_CACHE to a folder that has it"
        ) from error
    paths = {row: _path(images, image_column, row) for row in index["bad"]}
    return {
        row: f"{paths[row]}: {reason}" if paths[row] else reason
        for row, reason in index["bad"].items()
    }


# ---------------------------------------------------------------- the files


def cache_file(dataset, *key):
    """The file in the cache, without a suffix, for a data set and what `key` says of it."""
    # The fingerprint stands for the content, after select() too. No public attribute has it.
    key = repr((dataset._fingerprint, *key)).encode()
    name = hashlib.blake2b(key, digest_size=12).hexdigest()
    return cache_folder() / name


def cache_folder():
    """Where the decoded and the packed images are kept."""
    import datasets  # a second of import that `--help` does not need

    return Path(datasets.config.HF_DATASETS_CACHE) / "pixels"


def _read_index(file):
    """{"bad": {row: reason}, "hashes": [bytes], "images": uint64 (n,)} of a file of pixels.

    None where there is no index, or a damaged one. "images" is None in files of older versions.
    """
    if not has_file(file.with_suffix(".json")):
        return None
    try:
        written = json.loads(file.with_suffix(".json").read_bytes())
        content = written["content"]
        if written["hash"] != _hash(content.encode()).hex():
            return None
        content = json.loads(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    joined, bad = bytes.fromhex(content["hashes"]), content["bad"]
    hashes = [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]
    images = content.get("images")
    return {
        "hashes": hashes,
        "bad": {int(row): reason for row, reason in bad.items()},
        "images": None if images is None else np.frombuffer(bytes.fromhex(images), "<u8"),
    }


def _write_index(file, outcome):
    """outcome: an _Outcome of all images."""
    hashes = b"".join(digest for _, digest in sorted(outcome.hashes.items()))
    images = b"".join(digests for _, digests in sorted(outcome.images.items()))
    content = json.dumps(
        {
            "hashes": hashes.hex(),
            "bad": dict(sorted(outcome.bad.items())),
            "images": images.hex(),
        }
    )
    written = {"content": content, "hash": _hash(content.encode()).hex()}
    replace_file(file.with_suffix(".json"), json.dumps(written).encode())


def _hash(data):
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def _fault(file, shape, verify):
    """Why the pixels in `file` can't be used; "" if they can, "none" where there is no file."""
    if not has_file(file):
        return "none"
    try:
        pixels = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return "cut short, or not an .npy file"
    # np.load reads .npz files as well, and gives no array for them
    if not isinstance(pixels, np.ndarray) or pixels.shape != shape or pixels.dtype != np.uint8:
        return "other pixels"
    index = _read_index(file)
    starts = range(0, len(pixels), HASHED)
    if index is None or len(index["hashes"]) != len(starts):
        return "its file of hashes is missing or damaged"
    numbers = range(len(starts))
    if not verify:
        numbers = sorted(random.SystemRandom().sample(numbers, min(SAMPLED, len(numbers))))
    with ThreadPoolExecutor(threads()) as pool:
        hashes = pool.map(lambda k: _hash(pixels[starts[k] : starts[k] + HASHED]), numbers)
        for k, digest in zip(numbers, hashes, strict=True):
            if digest != index["hashes"][k]:
                return f"other bytes in images {starts[k]:,} to {starts[k] + HASHED - 1:,}"
    return ""


def _remove_left_overs(folder):
    """Delete the unfinished files of killed processes: those whose lock nobody holds."""
    for part_file in folder.glob("*.part"):
        if lock := lock_of(part_file.with_suffix(".npy"), wait=False):
            part_file.unlink(missing_ok=True)
            lock.release()


# ---------------------------------------------------------------- decoding, by several processes


class _Job(NamedTuple):
    """What there is to decode."""

    images: object  # see harness.data.pixels.encoded
    decode: object  # a file -> uint8 (3, size, size)
    refuse: object  # takes {row: reason} of an unreadable image; raises UserError if it is needed
    name: str
    progress: bool


class _Outcome(NamedTuple):
    """The outcome of decoding some of the images."""

    hashes: dict  # {first row of HASHED images: the hash of their pixels}
    images: dict  # {first row of HASHED images: the hashes of the single images, joined}
    bad: dict  # {row: reason}


def _make(file, shape, job, accelerator, verify):
    """Make sure that `file` holds the pixels: each machine's processes decode them, or wait."""
    part_file = file.with_suffix(".part")

    def begin():
        _remove_left_overs(file.parent)
        _allocate(part_file, shape)

    def make_share(rank, processes):
        return _decode_part(part_file, job, rank, processes)

    def end(outcomes):
        total = _Outcome({}, {}, {})
        for outcome in outcomes:
            total.hashes.update(outcome.hashes)
            total.images.update(outcome.images)
            total.bad.update(outcome.bad)
        with open(part_file, "r+b") as handle:
            os.fsync(handle.fileno())
        _write_index(file, total)
        os.replace(part_file, file)

    make_together(
        accelerator, file, lambda: _fault(file, shape, verify), begin, make_share, end,
        leave=lambda: part_file.unlink(missing_ok=True), made_by="decoded",
        failure=f"cannot write the decoded images of split '{job.name}' ({np.prod(shape):,} bytes)",
    )  # fmt: skip


def _allocate(part_file, shape):
    """Make the file in full size: if the disk filled up later, the memory map would get SIGBUS."""
    if shutil.disk_usage(part_file.parent).free < int(np.prod(shape)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    np.lib.format.open_memmap(part_file, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(part_file, "r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, os.fstat(handle.fileno()).st_size)


def _decode_part(part_file, job, rank, processes):
    """Decode one process's share of the images into the file."""
    pixels = np.lib.format.open_memmap(part_file, mode="r+")
    try:
        outcome = _decode(job, pixels.__setitem__, rank, processes, part_file.exists, pixels)
    except BaseException:
        part_file.unlink(missing_ok=True)  # so that the other processes stop, too
        raise
    pixels.flush()
    return outcome


def _decode(job, store, rank=0, processes=1, keep_going=lambda: True, pixels=None):
    """Call store(row, pixels) for the images of every `processes`-th block, from number `rank` on.

    Returns an _Outcome. Uses as many threads as this process has cores. keep_going: called before
    each block; False ends the work. pixels: the array that `store` fills, to be hashed.
    """
    import xxhash  # comes with `datasets`, which is imported late, too

    (column,), total = job.images.column_names, len(job.images)
    outcome = _Outcome({}, {}, {})

    def decode_block(start):
        if not keep_going():
            return 0
        block = job.images[start : start + BLOCK][column].to_pylist()
        for row, image in enumerate(block, start):
            try:
                decoded = job.decode(image_file(image))
            except Exception as error:  # Pillow's readers raise a dozen types for a bad file
                job.refuse({row: reason_of_image(error)})
                outcome.bad[row] = reason_of_image(error)
            else:
                store(row, decoded)
        if pixels is not None:
            for row in range(start, start + len(block), HASHED):
                outcome.hashes[row] = _hash(pixels[row : row + HASHED])
                digests = [xxhash.xxh3_64_intdigest(image) for image in pixels[row : row + HASHED]]
                outcome.images[row] = np.array(digests, "<u8").tobytes()
        return len(block)

    bar = tqdm(
        total=total, desc=f"decoding {job.name}", unit=" images", delay=1, leave=False,
        disable=not job.progress,
    )  # fmt: skip
    with bar, warnings.catch_warnings(), ThreadPoolExecutor(threads(processes)) as pool:
        # decode_image refuses the images that this warns of.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            for count in pool.map(decode_block, range(rank * BLOCK, total, processes * BLOCK)):
                bar.update(min(count * processes, total - bar.n))
        except BaseException:  # Ctrl-C too: don't decode the rest before leaving
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return outcome


# ---------------------------------------------------------------- messages


def reason_of_image(error):
    """Why an image can't be read, for the user, from what a reader of images raised."""
    unknown = isinstance(error, UnidentifiedImageError)  # Pillow's text shows a memory address
    text = str(error).partition("\n")[0] or type(error).__name__
    return "not an image format Pillow knows" if unknown else text


def unreadable(dataset, image_column, name, row, reason):
    """One line by which the user finds the bad image: its index is the one before any cut."""
    path = _path(encoded(dataset, image_column), image_column, row)
    path = f" ({path})" if path else ""
    if dataset._indices is not None:
        row = dataset._indices.column(0)[row].as_py()
    return (
        f"cannot read image {row} of split '{name}'{path}: {reason}; repair it, or leave such "
        "images out of training with --bad_images skip"
    )


def _path(images, image_column, row):
    """The path of an image, or None where the data set has none."""
    (image,) = images[row : row + 1][image_column].to_pylist()
    return image["path"] if image else None
