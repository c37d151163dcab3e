"""From an image file to RGB pixels of one size; the order in which an epoch shows images."""

import hashlib
import io

import numpy as np
import torch
from PIL import Image, ImageOps

from harness.counters import generator, splitmix64
from harness.data.formats import open_image

MAX_PIXELS = 89_478_485  # Pillow calls more a decompression bomb: a quarter GiB as RGB
SMALL_SQUARE = 64  # native sizes up to this many px are trained at as they are
SAMPLED = 64  # images whose bytes stand for all

FILTERS = {kind.name.lower(): kind for kind in Image.Resampling}  # "bilinear", "bicubic", ...


def decode_image(file, size, interpolation="bilinear", bit_depth=None):
    """One image file as uint8 RGB (3, size, size): its largest centred square, resized.

    In this order: the EXIF orientation is applied; colours become 8-bit RGB; the largest
    centred square is resized to size×size with one of Pillow's antialiased filters (an image of
    that size already is not resampled). In one step, this is a resize of the shorter side to `size`
    and a centre crop. Large JPEGs are first reduced by their decoder to no less than 2·size; Pillow
    calls the result of such a gap "almost indistinguishable".

    Transparent images get a white background. 16-bit gray is stretched by its real depth: the
    given one, else the one in the file (PNG's sBIT, TIFF's MaxSampleValue), else 16, by which 65535
    becomes 255. Mode I is read as 16-bit, mode F as 0..1 if no value exceeds 1 and as 0..255
    otherwise. CMYK, palette, 1-bit and other modes are converted by Pillow's `convert`. The first
    frame stands for an animation.

    Args:
        file: a path, or a binary file object.
        size: side of the result in px.
        interpolation: the name of the filter, a key of `FILTERS`.
        bit_depth: of 16-bit gray: 12 for values up to 4095; None for the depth in the file.

    Raises:
        ValueError: more than `MAX_PIXELS` (checked before decoding), or values out of range.
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


def upright(image, min_side, bit_depth=None):
    """An open Pillow image in RGB, turned as its EXIF orientation says.

    min_side: px of the shorter side that are needed; a large JPEG is reduced by its decoder to no
    less than twice that. Colours and errors: see `decode_image`.
    """
    check_pixels(image)
    if image.mode.startswith("I"):
        bit_depth = bit_depth or _file_depth(image)  # before loading closes the file
    image.draft(None, (2 * min_side, 2 * min_side))
    ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image, bit_depth)


def check_pixels(image):
    """Raise ValueError for an image whose header says more than `MAX_PIXELS`."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}×{image.height} px is over {MAX_PIXELS:,} pixels")


def native_size(dataset, image_column):
    """The side in px if the first 32 images are squares of one size up to 64 px, else None.

    Reads headers only. Images that can't be opened are skipped: harness.data.cache reports them.
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
    """A warning for the plan if 16-bit images use few of their bits and no file says so, or None.

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
    """The number of bits that a 16-bit gray image really uses, if its file says it, or None."""
    largest = getattr(image, "tag_v2", {}).get(281)  # TIFF's MaxSampleValue
    if isinstance(largest, tuple):
        largest = max(largest)
    if isinstance(largest, int) and 255 < largest < 2**16:
        return largest.bit_length()
    if image.format == "PNG" and hasattr(image.fp, "seek"):
        position = image.fp.tell()
        image.fp.seek(0)
        head = image.fp.read(4096)
        image.fp.seek(position)
        chunk = head.find(b"sBIT")
        if 0 < chunk < len(head) - 5 and 8 < head[chunk + 4] <= 16:
            return head[chunk + 4]
    return None


def epoch_order(num_samples, seed, epoch):
    """The order of the samples in an epoch: an int64 permutation, the same on every machine."""
    return torch.randperm(num_samples, generator=generator(seed, "order", epoch))


def deal(rows, machines):
    """The samples that each machine stores: int64 arrays of indices into `rows`, one per machine.

    rows: int64 (n,), rows of the stored split. They are dealt by a fixed hash of their numbers, so
    that every share is a random part of the data set. The sizes of shares differ by at most one.
    """
    order = np.argsort(splitmix64(rows.astype(np.uint64)), kind="stable")
    return [np.sort(order[machine::machines]) for machine in range(machines)]


def sharded_order(shares, seed, epoch, batch_size, accumulation):
    """The order of an epoch in which each machine sees only its own share: int64 (n,).

    shares: of `deal`, one per machine. Every batch takes the same number of samples from each
    share, in the order in which batches are cut: accumulation × machines × the samples that a
    machine sees at once.
    """
    share_size = batch_size // len(shares)
    batches = sum(map(len, shares)) // batch_size
    orders = []
    for machine, share in enumerate(shares):
        order = torch.randperm(len(share), generator=generator(seed, "order", epoch, machine))
        samples = torch.from_numpy(share)[order[: batches * share_size]]
        orders.append(samples.view(batches, accumulation, 1, share_size // accumulation))
    return torch.cat(orders, dim=2).flatten()


def gather(pixels, rows):
    """The images `rows` (int64, CPU) of `pixels` as one contiguous uint8 (n, 3, S, S) batch."""
    return torch.index_select(pixels, 0, rows)


def encoded(dataset, image_column):
    """`dataset` with its image column alone, as Arrow structs of `bytes` and `path`."""
    return dataset.select_columns(image_column).with_format("arrow")


def content_of(dataset, image_column):
    """[images, sha256 of how many bytes each has, and of SAMPLED of them]: of every copy the same.

    None where the table has paths, and not the images themselves.
    """
    import pyarrow.compute as pc

    empty, elsewhere = -1, -2  # where a cell has no bytes: it is null, or it has a path
    column, parts = dataset.data.column(image_column), [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        lengths = pc.binary_length(pc.struct_field(chunk, "bytes")).cast("int64")
        lengths = lengths.fill_null(elsewhere).to_numpy(zero_copy_only=False)
        parts.append(np.where(chunk.is_valid().to_numpy(zero_copy_only=False), lengths, empty))
    lengths = np.concatenate(parts)
    rows = np.arange(len(lengths))
    if dataset._indices is not None:
        rows = dataset._indices.column(0).to_numpy()
        lengths = lengths[rows]
    if (lengths == elsewhere).any():
        return None
    digest = hashlib.sha256(lengths.tobytes())
    # of some images the bytes, too: bitmaps and raw pixels all have the same length
    for row in rows[:: max(1, -(-len(rows) // SAMPLED))].tolist():
        if column[row].is_valid:
            digest.update(column[row]["bytes"].as_buffer())
    return [len(lengths), digest.hexdigest()]


def image_file(image):
    """The struct's bytes as a file, or its path where it has no bytes: both for Pillow to open."""
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
    # A copy, of RGB images too: the file behind `image` will be closed.
    return image.convert("RGB")
