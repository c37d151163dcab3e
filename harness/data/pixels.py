"""Decode once: a split's images become one memory-mapped uint8 tensor, made on the first start.

Decoding costs 20 to 100 times what a whole training batch's augmentation costs, so it is done
once per data set and image size. The result lies in the cache folder of `datasets`, under
`pixels/`, and may be deleted at any time: the next start makes it again.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from harness.counters import generator
from harness.data.formats import open_image
from harness.errors import UserError, nearest
from harness.files import replace_file

WAIT_SILENTLY_S = 10
DECODE_VERSION = 2  # part of the cache key: raise it whenever decode_image's output changes
MAX_PIXELS = 89_478_485  # what Pillow calls a decompression bomb: a quarter GiB as RGB
BLOCK = 256  # images a thread decodes at a time
SMALL_SQUARE = 64  # native sizes up to this many px are trained at as they are

FILTERS = {word.name.lower(): word for word in Image.Resampling}  # "bilinear", "bicubic", ...


def decode_split(
    dataset, image_column, size, *, name, interpolation="bilinear", progress=True, rows=None,
    bit_depth=None,
):  # fmt: skip
    """Decode every image of `dataset` to RGB pixels of one size, or find them in the cache.

    The cache key is the data set's fingerprint, the column, the size, the interpolation and
    `DECODE_VERSION`, so a second start, another process or another run finds the file. Any number
    of processes may call this at once: one of them decodes while the others wait for its lock.

    Args:
        dataset: a `datasets.Dataset`; its rows are decoded in order.
        image_column: the name of its `Image` column.
        size: side of the square result in px, see `decode_image`.
        name: what the split is called in messages.
        interpolation: Pillow's filter, see `decode_image`.
        progress: show a bar when decoding takes more than a second.
        rows: the rows that will be used, None for all; what can't be read among the others is
            left black.
        bit_depth: of 16-bit gray images, see `decode_image`.

    Returns:
        uint8 (len(dataset), 3, size, size), memory-mapped and never to be written to: the
        mapping is read-only, and writing to it kills the process. `gather` copies.

    Raises:
        UserError: an image that can't be read (split, index and file named), no room, or an
            unknown interpolation.
    """
    import datasets  # a second of import that `--help` does not need

    if interpolation not in FILTERS:
        raise UserError(
            f'unknown interpolation "{interpolation}"{nearest(interpolation, FILTERS)}; there are '
            + ", ".join(FILTERS)
        )
    # The fingerprint names the content, after select() too; `datasets` shows it nowhere else.
    recipe = (dataset._fingerprint, image_column, size, interpolation, DECODE_VERSION)
    recipe += (bit_depth,) if bit_depth else ()
    key = hashlib.blake2b(repr(recipe).encode(), digest_size=12).hexdigest()
    file = Path(datasets.config.HF_DATASETS_CACHE) / "pixels" / f"{key}.npy"
    shape = (len(dataset), 3, size, size)
    used = np.ones(len(dataset), bool) if rows is None else np.isin(np.arange(len(dataset)), rows)

    def refuse(bad):
        for row, reason in bad.items():
            if used[row]:
                raise UserError(_unreadable(dataset, image_column, name, row, reason))

    if not _is_whole(file, shape):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _alone(file):
                if not _is_whole(file, shape):  # nobody else made it while we waited
                    decode = partial(
                        decode_image, size=size, interpolation=interpolation, bit_depth=bit_depth
                    )
                    images = _encoded(dataset, image_column)
                    _write_pixels(file, shape, images, decode, refuse, name, progress)
        except OSError as error:
            raise UserError(
                f"cannot write the decoded images of split '{name}' ({np.prod(shape):,} bytes) to "
                f"{file}: {error.strerror or error}; make room, or set HF_DATASETS_CACHE to a "
                "folder that has it"
            ) from error
    refuse(_read_bad(file))  # a file that another run made, which used other rows
    # Mode "r": Linux refuses a copy-on-write mapping that is larger than the memory.
    pixels = np.load(file, mmap_mode="r")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(pixels)


def find_bad(dataset, image_column, *, name, bit_depth=None, progress=True):
    """{row: why} of the images of `dataset` that can't be decoded, with their files' names.

    What was found is kept beside the pixels.

    The first start decodes every image once for it, the next ones read a file. Any number of
    processes may call this at once.
    """
    import datasets

    recipe = (dataset._fingerprint, image_column, "bad", DECODE_VERSION)
    recipe += (bit_depth,) if bit_depth else ()
    key = hashlib.blake2b(repr(recipe).encode(), digest_size=12).hexdigest()
    file = Path(datasets.config.HF_DATASETS_CACHE) / "pixels" / key
    found = _bad_file(file)
    if not found.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _alone(file):
                if not found.exists():
                    images, bad = _encoded(dataset, image_column), {}
                    decode = partial(
                        decode_image, size=8, bit_depth=bit_depth
                    )  # JPEGs at an eighth: fast
                    _decode_all(images, decode, lambda row, pixels: None, bad, name, progress)
                    _write_bad(file, bad)
        except OSError as error:
            raise UserError(
                f"cannot write {found}: {error.strerror or error}; make room, or set "
                "HF_DATASETS_CACHE to a folder that has it"
            ) from error
    bad = _read_bad(file)
    paths = {row: _path(_encoded(dataset, image_column), image_column, row) for row in bad}
    return {row: f"{paths[row]}: {why}" if paths[row] else why for row, why in bad.items()}


def decode_image(file, size, interpolation="bilinear", bit_depth=None):
    """One image file as uint8 RGB (3, size, size): its largest centred square, resized.

    In this order: the EXIF orientation is applied; colours become 8-bit RGB; the largest
    centred square is resized to size×size with one of Pillow's antialiased filters (nothing is
    resampled if the image has that size). That is a resize of the shorter side to `size` and a
    centre crop, in one step. Large JPEGs are first reduced by their decoder to no less than
    2·size, the gap at which Pillow calls the result "almost indistinguishable".

    Transparency is laid on white. Gray of 16 bits is stretched by its real depth, as
    given or as the file says it (PNG's sBIT, TIFF's MaxSampleValue), else 16: 65535 is 255. Mode I
    is read as 16-bit, mode F as 0..1 if no value exceeds 1 and as 0..255 otherwise. CMYK, palette,
    1-bit and the others go the way of Pillow's `convert`. Of an animation, the first frame.

    Args:
        file: a path, or a binary file object.
        size: side of the result in px.
        interpolation: the name of the filter, a key of `FILTERS`.
        bit_depth: of 16-bit gray: 12 for values up to 4095; None for what the file says.

    Raises:
        ValueError: more than `MAX_PIXELS` (found before decoding), or values out of range.
        Exception: whatever Pillow raises for a file it can't read.
    """
    with open_image(file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}×{image.height} px is over {MAX_PIXELS:,} pixels")
        if image.mode.startswith("I"):
            bit_depth = bit_depth or _file_depth(image)  # before loading closes the file
        image.draft(None, (2 * size, 2 * size))
        ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(image, bit_depth)
    if rgb.size != (size, size):
        side = min(rgb.size)
        left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
        box = (left, top, left + side, top + side)
        rgb = rgb.resize((size, size), FILTERS[interpolation], box=box)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def native_size(dataset, image_column):
    """The side in px if the first 32 images are squares of one size up to 64 px, else None.

    Reads headers only. An image that can't be opened is left for `decode_split` to report.
    """
    head = dataset.select(range(min(32, len(dataset))))
    sizes = set()
    for image in _encoded(head, image_column)[:][image_column].to_pylist():
        try:
            with open_image(_source(image)) as opened:
                sizes.add(opened.size)
        except Exception:  # Pillow's readers raise a dozen types, a bomb's among them
            continue
    if len(sizes) != 1:
        return None
    width, height = sizes.pop()
    return width if width == height <= SMALL_SQUARE else None


def gray_depth_note(dataset, image_column):
    """A line for the plan where 16-bit images use few of their bits and no file says so, or None.

    Judged by the first 32 images.
    """
    head, deepest = dataset.select(range(min(32, len(dataset)))), None
    for image in _encoded(head, image_column)[:][image_column].to_pylist():
        try:
            with open_image(_source(image)) as opened:
                if not opened.mode.startswith("I"):
                    continue
                if _file_depth(opened):
                    return None
                deepest = max(deepest or 0, opened.getextrema()[1])
        except Exception:  # as in native_size
            continue
    if deepest is None or deepest >= 4096:
        return None
    bits = max(int(deepest), 1).bit_length()
    return (
        f"warning: the values of the 16-bit images stay under {2**bits:,}, so they are nearly "
        f"black: --bit_depth {bits} stretches them"
    )


def _file_depth(image):
    """The bits that a 16-bit gray image really uses, as its file says it, or None."""
    largest = getattr(image, "tag_v2", {}).get(281)  # TIFF's MaxSampleValue
    if isinstance(largest, tuple):
        largest = max(largest)
    if isinstance(largest, int) and 255 < largest < 2**16:
        return largest.bit_length()
    if image.format == "PNG" and hasattr(image.fp, "seek"):
        place = image.fp.tell()
        image.fp.seek(0)
        start = image.fp.read(4096)
        image.fp.seek(place)
        at = start.find(b"sBIT")
        if 0 < at < len(start) - 5 and 8 < start[at + 4] <= 16:
            return start[at + 4]
    return None


def epoch_order(num_samples, seed, epoch):
    """The order in which epoch `epoch` sees the samples: an int64 permutation, same everywhere."""
    return torch.randperm(num_samples, generator=generator(seed, "order", epoch))


def gather(pixels, rows):
    """The images `rows` (int64, CPU) of `pixels` as one contiguous uint8 (n, 3, S, S) batch."""
    return torch.index_select(pixels, 0, rows)


def _is_whole(file, shape):
    """Whether `file` holds uint8 pixels of `shape`, judged by its header and its length."""
    try:
        pixels = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # missing, cut short, or not .npy at all
        return False
    # Of an .npz, which np.load reads as well, it gives no array
    return isinstance(pixels, np.ndarray) and pixels.shape == shape and pixels.dtype == np.uint8


@contextlib.contextmanager
def _alone(file):
    """Hold the lock of a file; after 10 s of waiting for another process it is said."""
    lock = FileLock(f"{file}.lock")
    try:
        lock.acquire(timeout=WAIT_SILENTLY_S)
    except Timeout:
        print(f"waiting for another process to decode these images ({lock.lock_file})", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _bad_file(file):
    """Where it is said which images of the pixels in `file` could not be decoded."""
    return file.with_name(f"{file.stem}.bad.json")


def _read_bad(file):
    """{row: why} of the images that are black in `file`."""
    try:
        said = json.loads(_bad_file(file).read_bytes())
        return {int(row): str(why) for row, why in said.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, OSError) as error:
        files = _bad_file(file).name.replace("bad.json", "*")
        raise UserError(f"{_bad_file(file)} is damaged ({error}): delete {files}") from None


def _write_bad(file, bad):
    replace_file(_bad_file(file), json.dumps(dict(sorted(bad.items()))).encode())


def _write_pixels(file, shape, images, decode, refuse, name, progress):
    """Decode into a file beside `file` and rename it when it is complete and on the disk.

    refuse: called with {row: why} for an image that can't be read; raises where it is needed.
    """
    part = file.with_suffix(".part")
    num_bytes = int(np.prod(shape))
    if shutil.disk_usage(file.parent).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        pixels = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        with open(part, "r+b") as handle:
            # Take the blocks now: a full disk or quota is an error here, but under a memory
            # map it would be a SIGBUS later.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, os.fstat(handle.fileno()).st_size)
            bad = {}
            _decode_all(images, decode, pixels.__setitem__, bad, name, progress, refuse)
            pixels.flush()
            os.fsync(handle.fileno())
        _bad_file(file).unlink(missing_ok=True)
        if bad:  # first: black pixels are never there without it
            _write_bad(file, bad)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _decode_all(images, decode, keep, bad, name, progress, refuse=lambda bad: None):
    """keep(row, pixels) for all images, in blocks over as many threads as this process has cores.

    images: from `_encoded`. bad: takes {row: why} for those that can't be read, after `refuse`.
    """
    (column,) = images.column_names

    def decode_block(start):
        block = images[start : start + BLOCK][column].to_pylist()
        for row, image in enumerate(block, start):
            try:
                pixels = decode(_source(image))
            except Exception as error:  # Pillow's readers raise a dozen types for a bad file
                refuse({row: _reason(error)})
                bad[row] = _reason(error)
            else:
                keep(row, pixels)
        return len(block)

    has_affinity = hasattr(os, "sched_getaffinity")
    threads = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    bar = tqdm(
        total=len(images),
        desc=f"decoding {name}",
        unit=" images",
        delay=1,
        leave=False,
        disable=not progress,
    )
    with bar, warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        # decode_image refuses what this only warns of.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            for done in pool.map(decode_block, range(0, len(images), BLOCK)):
                bar.update(done)
        except BaseException:  # Ctrl-C too: don't decode the rest before leaving
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _encoded(dataset, image_column):
    """`dataset` with only its image column, given as Arrow structs of `bytes` and `path`."""
    return dataset.select_columns(image_column).with_format("arrow")


def _source(image):
    """What Pillow can open: the struct's bytes, or the path where there are none."""
    if image is None:
        raise ValueError("the cell is empty")
    return io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]


def _reason(error):
    unknown = isinstance(error, UnidentifiedImageError)  # Pillow's text shows a memory address
    text = str(error).partition("\n")[0] or type(error).__name__
    return "not an image format Pillow knows" if unknown else text


def _unreadable(dataset, image_column, name, row, reason):
    """One line that lets the user find the bad image: the index is the one before any cut."""
    path = _path(_encoded(dataset, image_column), image_column, row)
    path = f" ({path})" if path else ""
    if dataset._indices is not None:
        row = dataset._indices.column(0)[row].as_py()
    return (
        f"cannot read image {row} of split '{name}'{path}: {reason}; mend it, or leave such "
        "images out of training with --bad_images skip"
    )


def _path(images, image_column, row):
    """The file of an image, as far as the data set knows it, or None."""
    (image,) = images[row : row + 1][image_column].to_pylist()
    return image["path"] if image else None


def _to_rgb(image, bit_depth=None):
    """A Pillow image in any mode as 8-bit RGB. bit_depth: see `decode_image`."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        if image.mode != "F":
            values = values / ((2 ** (bit_depth or 16) - 1) / 255)
        elif values.max() <= 1:
            values = values * 255
        if not (values.min() >= 0 and values.max() <= 255):  # NaN included
            low, high = image.getextrema()
            raise ValueError(
                f"values from {low} to {high} in mode {image.mode}: save it as "
                "8-bit, or say its --bit_depth"
            )
        return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    # A copy even of RGB: the file behind `image` is about to be closed.
    return image.convert("RGB")
