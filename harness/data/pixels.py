"""What an image file becomes: RGB pixels of one size."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps

from harness.counters import generator, splitmix64
from harness.data.formats import open_image

MAX_PIXELS = 89_478_485  # what Pillow calls a decompression bomb: a quarter GiB as RGB
SMALL_SQUARE = 64  # native sizes up to this many px are trained at as they are

FILTERS = {word.name.lower(): word for word in Image.Resampling}  # "bilinear", "bicubic", ...


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
        rgb = upright(image, size, bit_depth)
    if rgb.size != (size, size):
        side = min(rgb.size)
        left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
        box = (left, top, left + side, top + side)
        rgb = rgb.resize((size, size), FILTERS[interpolation], box=box)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def upright(image, least, bit_depth=None):
    """An opened image as an RGB one of Pillow, turned as its EXIF orientation says.

    least: px of the shorter side that are needed; a large JPEG is reduced by its decoder to no
    less than twice that. Colours and errors: see `decode_image`.
    """
    check_pixels(image)
    if image.mode.startswith("I"):
        bit_depth = bit_depth or _file_depth(image)  # before loading closes the file
    image.draft(None, (2 * least, 2 * least))
    ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image, bit_depth)


def check_pixels(image):
    """ValueError for an image of more than `MAX_PIXELS`, by its header."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}×{image.height} px is over {MAX_PIXELS:,} pixels")


def native_size(dataset, image_column):
    """The side in px if the first 32 images are squares of one size up to 64 px, else None.

    Reads headers only. An image that can't be opened is left for harness.data.cache to report.
    """
    head = dataset.select(range(min(32, len(dataset))))
    sizes = set()
    for image in encoded(head, image_column)[:][image_column].to_pylist():
        try:
            with open_image(image_file(image)) as opened:
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
    for image in encoded(head, image_column)[:][image_column].to_pylist():
        try:
            with open_image(image_file(image)) as opened:
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


def deal(rows, machines):
    """The samples that each of so many machines stores: int64 arrays of places in `rows`.

    rows: int64 (n,), rows of the stored split. They are dealt by a fixed hash of their numbers, so
    that every share is a random part of the data set, of the same size give or take one.
    """
    order = np.argsort(splitmix64(rows.astype(np.uint64)), kind="stable")
    return [np.sort(order[machine::machines]) for machine in range(machines)]


def sharded_order(shares, seed, epoch, batch_size, accumulation):
    """The order of an epoch in which each machine sees its own share alone: int64 (n,).

    shares: of `deal`, one a machine. Every batch takes as many of each share; they lie in it as
    the parts of a batch are cut, accumulation × machines × what a machine sees at once.
    """
    each = batch_size // len(shares)
    batches = sum(map(len, shares)) // batch_size
    orders = []
    for machine, share in enumerate(shares):
        own = torch.randperm(len(share), generator=generator(seed, "order", epoch, machine))
        own = torch.from_numpy(share)[own[: batches * each]]
        orders.append(own.view(batches, accumulation, 1, each // accumulation))
    return torch.cat(orders, dim=2).flatten()


def gather(pixels, rows):
    """The images `rows` (int64, CPU) of `pixels` as one contiguous uint8 (n, 3, S, S) batch."""
    return torch.index_select(pixels, 0, rows)


def encoded(dataset, image_column):
    """`dataset` with only its image column, given as Arrow structs of `bytes` and `path`."""
    return dataset.select_columns(image_column).with_format("arrow")


def image_file(image):
    """What Pillow can open: the struct's bytes, or the path where there are none."""
    if image is None:
        raise ValueError("the cell is empty")
    return io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]


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
