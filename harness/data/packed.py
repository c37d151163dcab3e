"""The packed store: a split's images as JPEG bytes with an index, decoded a batch at a time.

For photographs and large sets, whose pixels would not fit a disk and whose random crops shall be
cut from the originals. It is made once per data set, by all processes of a machine together; a
making that was killed goes on where it was. It lies in the cache folder of `datasets`, under
`pixels/`, and may be deleted at any time. Two files: KEY-SIDE.jpegs, the bytes; and
KEY-SIDE.index, where those of each image are, its size and its checksum.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from harness.data.cache import cache_file, reason_of_image, unreadable
from harness.data.formats import open_image
from harness.data.making import lock_of, make_together, threads
from harness.data.pixels import FILTERS, check_pixels, encoded, upright
from harness.errors import UserError
from harness.files import replace_file, sync_folder
from harness.processes import ALONE, from_local_main

try:  # half as fast again as Pillow, and the same pixels
    import simplejpeg
except ImportError:
    simplejpeg = None

PACK_VERSION = 1  # part of the cache key: raise it whenever `pack_image`'s output changes
SIDE_STEP = 64  # px; stored sides are multiples, so that close sizes share a store
QUALITY = 95  # of what is encoded here, without subsampled colours
CHUNK = 64  # images that a thread packs at a time
KEPT_DAYS = 7  # for which a making that was killed may go on
ORIENTATION = 0x0112  # EXIF's tag
ENTRY = np.dtype([
    ("offset", "<u8"),  # in the .jpegs file, or IN_DATASET
    ("length", "<u4"),  # bytes; 0 for an image that can't be read
    ("width", "<u4"), ("height", "<u4"),  # px
    ("crc", "<u4"),  # zlib's crc32 of the bytes
])  # fmt: skip
IN_DATASET = 2**64 - 1  # the data set's own table has the bytes, as they are
NO_OFFSET = ["length", "width", "height", "crc"]  # the fields that are the same wherever bytes lie


def packed_side(size, stored_size, crop_scale) -> int:
    """Px of the shorter side that no crop of `size` px has to be enlarged from.

    stored_size: px of the shorter side that evaluation wants. crop_scale: the least share of the
    area that a random resized crop takes, 0 for none.
    """
    least = max(stored_size, size / math.sqrt(crop_scale) if crop_scale else 0)
    return math.ceil(least / SIDE_STEP) * SIDE_STEP


def decoder() -> str:
    """The name and version of what decodes: another one may give other pixels."""
    if simplejpeg:
        return f"simplejpeg {simplejpeg.__version__}"
    import PIL

    return f"Pillow {PIL.__version__}"


# ---------------------------------------------------------------- one image


def pack_image(data, side, bit_depth=None):
    """An image file's bytes as an upright JPEG whose shorter side has at most `side` px.

    Returns (bytes, width, height). The same bytes for a JPEG in gray or YCbCr colours that is no
    larger and not turned by EXIF. What else Pillow reads is prepared as
    `harness.data.pixels.decode_image` does, shrunk to `side` (Lanczos) and encoded.

    Raises ValueError, or whatever Pillow raises, for what can't be read.
    """
    with warnings.catch_warnings():
        # check_pixels refuses what this only warns of.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with open_image(io.BytesIO(data)) as image:
            check_pixels(image)
            if min(image.size) <= side and _is_plain_jpeg(image) and _decodes(data):
                return data, *image.size
            rgb = upright(image, side, bit_depth)
    if min(rgb.size) > side:
        shrunk = [max(side, round(x * side / min(rgb.size))) for x in rgb.size]
        rgb = rgb.resize(shrunk, Image.Resampling.LANCZOS)
    if max(rgb.size) > 65500:
        raise ValueError(f"{rgb.width}×{rgb.height} px: a JPEG has at most 65,500 px a side")
    file = io.BytesIO()
    rgb.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue(), *rgb.size


def _is_plain_jpeg(image):
    """Whether every decoder gives the same upright RGB pixels: judged by the header."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return False
    if image.mode == "RGB" and image.info.get("adobe_transform") == 0:
        return False  # RGB in the file itself
    try:
        return image.getexif().get(ORIENTATION, 1) in (0, 1)
    except Exception:  # damaged EXIF raises what it likes; the way through Pillow says what holds
        return False


def _decodes(data):
    """Whether the whole JPEG can be decoded, without a warning; at an eighth, which is quick."""
    if simplejpeg:
        try:
            simplejpeg.decode_jpeg(data, "RGB", min_height=1, min_width=1)
        except ValueError:
            return False
        return True
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "MPO"]) as image:
            image.draft(None, (1, 1))
            image.load()
    except Exception:  # Pillow's readers raise a dozen types for a bad file
        return False
    return True


def decode_jpeg(data, width, height, factor=1):
    """The pixels of a packed JPEG, reduced by 1, 2, 4 or 8 while decoding: uint8 (h, w, 3).

    width, height: px as stored. h and w are height and width over the factor, rounded up.
    """
    if simplejpeg:
        least = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        return simplejpeg.decode_jpeg(data, "RGB", strict=False, **least)
    with Image.open(io.BytesIO(data), formats=["JPEG", "MPO"]) as image:
        if factor > 1:
            image.draft("RGB", (width // factor, height // factor))
        return np.asarray(image.convert("RGB"))


def decode_crop(data, width, height, box, size):
    """A box of a packed JPEG, resized to size × size: uint8 (3, size, size).

    box: top, left, height and width in px of the stored image. Antialiased bilinear. A box of more
    than 2 · size px a side is decoded at a half, a quarter or an eighth, to no less than that, and
    then lies on whole pixels of the reduced image.
    """
    top, left, h, w = box
    factor = next(f for f in (8, 4, 2, 1) if min(h, w) >= 2 * size * f or f == 1)
    pixels = torch.from_numpy(decode_jpeg(data, width, height, factor))
    top, left, h, w = top // factor, left // factor, h // factor, w // factor
    pixels = pixels[top : top + h, left : left + w].permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]


def decode_centre(data, width, height, look):
    """What evaluation shows of a packed JPEG: uint8 (3, size, size).

    The shorter side is resized to look.stored_size and the centre cut out, as by torchvision's
    Resize and CenterCrop. look: a Preprocessing.
    """
    short, size = look.stored_size, look.size
    factor = next(f for f in (8, 4, 2, 1) if min(height, width) >= 2 * short * f or f == 1)
    image = Image.fromarray(decode_jpeg(data, width, height, factor))
    # The sides that torchvision's Resize gives, and where its CenterCrop begins
    wide, tall = (int(short * side / min(width, height)) for side in (width, height))
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    if image.size == (wide, tall):
        image = image.crop((left, top, left + size, top + size))
    else:
        across, down = image.width / wide, image.height / tall
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        image = image.resize((size, size), FILTERS[look.interpolation], box=box)
    return torch.from_numpy(np.array(image).transpose(2, 0, 1))


def evaluation_pixels(file, look, bit_depth=None):
    """What evaluation shows of an image file under look.packed_side: uint8 (3, size, size).

    file: a path, or a binary file object.
    """
    data = file.read() if hasattr(file, "read") else Path(file).read_bytes()
    return decode_centre(*pack_image(data, look.packed_side, bit_depth), look)


# ---------------------------------------------------------------- a split


class PackedImages:
    """The images of a split, in the place of a tensor uint8 (n, 3, size, size).

    Any number of threads may read. Every image is checked when it is read: what is damaged in the
    file is packed again from the data set.
    """

    def __init__(self, file, images, look, bit_depth, name):
        """file: the index. images: see `encoded`. look, bit_depth, name: see `pack_split`."""
        self.look, self.bit_depth, self.name = look, bit_depth, name
        self.shape = torch.Size((len(images), 3, look.size, look.size))
        self.blob = file.with_suffix(".jpegs")
        header, self.entries = read_index(file)
        self.content = header["content"]
        self._file = open(self.blob, "rb")  # noqa: SIM115 - as long as this lives
        self._source = _Source(images)
        self._threads = threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def __len__(self):
        return self.shape[0]

    def sizes(self, rows):
        """Heights and widths of the images `rows`: int64 (n,) each."""
        found = self.entries[rows.numpy()]
        return [torch.from_numpy(found[side].astype(np.int64)) for side in ("height", "width")]

    def crops(self, rows, boxes, pinned=False):
        """Boxes of the images `rows`, resized: uint8 (n, 3, size, size) on the CPU.

        rows: int64 (n,). boxes: int64 (n, 4), top, left, height, width. pinned: in memory that a
        GPU can copy from at once.
        """
        boxes = boxes.tolist()

        def one(k, data, width, height):
            return decode_crop(data, width, height, boxes[k], self.look.size)

        return self._batch(rows, one, pinned)

    def centres(self, rows, pinned=False):
        """What evaluation shows of the images `rows`: uint8 (n, 3, size, size) on the CPU."""

        def one(k, data, width, height):
            return decode_centre(data, width, height, self.look)

        return self._batch(rows, one, pinned)

    def _batch(self, rows, decode, pinned):
        rows = rows.tolist()
        batch = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8, pin_memory=pinned)

        def fill(k):
            with torch.inference_mode():
                batch[k] = decode(k, *self.read(rows[k]))

        if self._threads == 1:
            for k in range(len(rows)):
                fill(k)
        else:
            for _ in _pool(self._threads).map(fill, range(len(rows))):
                pass
        return batch

    def read(self, row):
        """(JPEG bytes, width, height) of an image."""
        entry = self.entries[row]
        if not entry["length"]:  # of another machine's share
            return pack_image(self._source.bytes(row), self._side, self.bit_depth)
        if entry["offset"] == IN_DATASET:
            data = self._source.bytes(row)
        else:
            data = os.pread(self._file.fileno(), int(entry["length"]), int(entry["offset"]))
        if zlib.crc32(data) != entry["crc"]:
            data = self._repaired(row, entry)
        return data, int(entry["width"]), int(entry["height"])

    def _repaired(self, row, entry):
        """The bytes of an image that is damaged in the file, from the data set; mends the file."""
        try:
            data, *_ = pack_image(self._source.bytes(row), self._side, self.bit_depth)
        except Exception as error:  # Pillow's readers raise a dozen types for a bad file
            data, why = b"", reason_of_image(error)
        else:
            why = "it is not the image that was packed"
        if zlib.crc32(data) != entry["crc"]:
            raise UserError(
                f"{self.blob} is damaged at image {row:,} of split '{self.name}', and the data set "
                f"does not have it any more ({why}): delete the file, and start again"
            )
        print(f"{self.blob} is damaged at image {row:,}: packed again", flush=True)
        with contextlib.suppress(OSError):  # read-only: the next run meets it again
            handle = os.open(self.blob, os.O_WRONLY)
            try:
                os.pwrite(handle, data, int(entry["offset"]))
            finally:
                os.close(handle)
        return data

    @property
    def _side(self):
        return int(self.blob.stem.rpartition("-")[2])

    def verify(self, progress=False):
        """Read every image, and mend what is damaged; the others' bytes are what was packed."""
        bar = tqdm(
            total=len(self), desc=f"verifying {self.name}", unit=" images", delay=1, leave=False,
            disable=not progress,
        )  # fmt: skip

        def check(first):
            rows = range(first, min(first + CHUNK, len(self)))
            for row in rows:
                if self.entries[row]["length"]:
                    self.read(row)
            return len(rows)

        with bar:
            for done in _pool(self._threads).map(check, range(0, len(self), CHUNK)):
                bar.update(done)


@functools.cache
def _pool(number):
    """Threads that decode; each does its image alone, so that as many images are under way."""
    return ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,))


class _Source:
    """The data set's own bytes of its images."""

    def __init__(self, images):
        self._images = images
        (column,) = images.column_names
        # As quick as the table allows: datasets takes ten times as long for a row
        self._column, self._indices = images.data.column(column), None
        if images._indices is not None:
            self._indices = images._indices.column(0)

    def __len__(self):
        return len(self._images)

    def in_table(self, row):
        """Whether the table has the bytes, and not a path."""
        return self._cell(row)["bytes"].is_valid

    def bytes(self, row):
        """Raises ValueError for an empty cell, OSError for a file that can't be read."""
        cell = self._cell(row)
        if not cell.is_valid:
            raise ValueError("the cell is empty")
        if cell["bytes"].is_valid:
            return memoryview(cell["bytes"].as_buffer()).cast("B")
        return Path(cell["path"].as_py()).read_bytes()

    def _cell(self, row):
        if self._indices is not None:
            row = self._indices[row].as_py()
        return self._column[row]


# ---------------------------------------------------------------- the files


def read_index(file):
    """(header, entries of ENTRY, memory-mapped) of an index; ValueError where it is damaged."""
    with open(file, "rb") as opened:
        line = opened.readline(2**27)
    header = json.loads(line)
    count = header["images"]
    if file.stat().st_size != len(line) + count * ENTRY.itemsize:
        raise ValueError("cut short")
    entries = np.memmap(file, ENTRY, "r", offset=len(line), shape=(count,)) if count else []
    if header["hash"] != _hash(entries, header):
        raise ValueError("other bytes")
    return header, entries


def _hash(entries, header):
    facts = {name: header[name] for name in ("images", "bytes", "bad", "content")}
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    digest.update(entries)
    return digest.hexdigest()


def _write_index(file, entries, bad, size):
    content = hashlib.blake2b(digest_size=16)
    for name in NO_OFFSET:
        content.update(np.ascontiguousarray(entries[name]))
    header = {
        "images": len(entries), "bytes": size, "bad": {str(row): bad[row] for row in sorted(bad)},
        "content": content.hexdigest(),
    }  # fmt: skip
    header["hash"] = _hash(entries, header)
    replace_file(file, json.dumps(header).encode() + b"\n" + entries.tobytes())


def _fault(file):
    """Why a store can't be used: "" if it can, "none" where there is no index."""
    try:
        header, _ = read_index(file)
        found = file.with_suffix(".jpegs").stat().st_size
    except FileNotFoundError:
        return "none"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "its index is damaged"
    return "" if found == header["bytes"] else f"{found:,} bytes instead of {header['bytes']:,}"


def find_packed(dataset, image_column, side, bit_depth=None, share=None):
    """The index of a split's store: the smallest there is of at least `side`, else a new name.

    share: the rows that are stored, None for all.
    """
    key = (image_column, "packed", PACK_VERSION, *([bit_depth] if bit_depth else ()))
    if share is not None:
        key += ("share", hashlib.blake2b(share.tobytes(), digest_size=8).hexdigest())
    base = cache_file(dataset, *key)
    there = []
    for file in base.parent.glob(f"{base.name}-*.index"):
        with contextlib.suppress(ValueError):
            there.append((int(file.stem.rpartition("-")[2]), file))
    fits = [(its, file) for its, file in sorted(there) if its >= side]
    for _, file in fits:
        if not _fault(file):
            return file
    return base.with_name(f"{base.name}-{side}.index")


def packed_size(file):
    """The bytes of a store's two files, or None where there is none."""
    try:
        return file.stat().st_size + file.with_suffix(".jpegs").stat().st_size
    except OSError:
        return None


def image_bytes(images, row):
    """The bytes of an image as the data set has it: 0 where it has none. images: see `encoded`."""
    (cell,) = images[row : row + 1][images.column_names[0]].to_pylist()
    if cell is None:
        return 0
    if cell["bytes"] is not None:
        return len(cell["bytes"])
    with contextlib.suppress(OSError, TypeError):
        return os.stat(cell["path"]).st_size
    return 0


# ---------------------------------------------------------------- making it


class _Job(NamedTuple):
    source: _Source
    stored: object  # the rows to be packed, in their order
    side: int
    bit_depth: int | None
    refuse: object  # takes {row: why} of an image that can't be read; raises where it is needed
    name: str
    progress: bool


def pack_split(
    dataset, image_column, look, *, name, rows=None, bit_depth=None, accelerator=ALONE,
    share=None, verify=False, progress=True,
):  # fmt: skip
    """Pack every image of `dataset`, or find the store in the cache: PackedImages.

    Any number of runs may call this at once: one of them packs while the others wait for its lock.

    Args:
        dataset: a `datasets.Dataset`.
        image_column: the name of its `Image` column.
        look: a Preprocessing with its packed_side.
        name: what the split is called in messages.
        rows: the rows that will be used, None for all; what can't be read among the others is
            left out.
        bit_depth: of 16-bit gray images, see `harness.data.pixels.decode_image`.
        share: the rows that this machine stores, None for all; others that are asked for are
            packed each time anew.
        accelerator: whose processes all call this, and share the work on each machine.
        verify: compare all bytes with their checksums now, and not when they are read.
        progress: show a bar, on one process of each machine, when it takes more than a second.

    Raises UserError for an image that can't be read (split, index and file named), or no room.
    """
    used = np.ones(len(dataset), bool) if rows is None else np.isin(np.arange(len(dataset)), rows)

    def refuse(bad):
        for row, reason in bad.items():
            if used[row]:
                raise UserError(unreadable(dataset, image_column, name, row, reason))

    images = encoded(dataset, image_column)
    # A run that begins while another makes a larger store is content with its own
    file = from_local_main(
        accelerator,
        lambda: find_packed(dataset, image_column, look.packed_side, bit_depth, share),
    )
    progress = progress and accelerator.is_local_main_process
    stored = range(len(images)) if share is None else share
    job = _Job(_Source(images), stored, look.packed_side, bit_depth, refuse, name, progress)
    making = _Making(file)
    make_together(
        accelerator, file, lambda: _fault(file), lambda: making.begin(len(stored)),
        lambda place, processes: making.share(job, place, processes), lambda _: making.end(job),
        leave=making.leave, failure=f"cannot pack the images of split '{name}'",
    )  # fmt: skip
    header, _ = read_index(file)
    refuse({int(row): why for row, why in header["bad"].items()})
    packed = PackedImages(file, images, look, bit_depth, name)
    if verify and accelerator.is_local_main_process:
        packed.verify(progress)
    return packed


class _Making:
    """The files of a store that is being made, which several processes add to.

    KEY-SIDE.jpegs.packing takes the bytes, in whatever order they come; KEY-SIDE.index.packing a
    line for each chunk of images that is in there, so that who finds the two goes on with the rest.
    """

    def __init__(self, file):
        self.file, self.blob = file, file.with_suffix(".jpegs")
        self.bytes = self.blob.with_name(f"{self.blob.name}.packing")
        self.journal = file.with_name(f"{file.name}.packing")
        self.stopped = file.with_name(f"{file.name}.stopped")  # one process has: the others leave
        self._adding = threading.Lock()

    def begin(self, count):
        _remove_left_overs(self.file.parent)
        self.stopped.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)
        chunks, *ends = self._chunks()
        for file, end in zip((self.journal, self.bytes), ends, strict=True):
            with open(file, "ab") as handle:
                handle.truncate(end)  # of a last line and its images that were cut off
        if done := sum(len(one["entries"]) for one in chunks):
            print(f"{done:,} of {count:,} images were packed before: going on", flush=True)

    def share(self, job, place, processes):
        """Pack every `processes`-th chunk from `place` that is not there yet."""
        chunks, *_ = self._chunks()
        done = {one["first"] for one in chunks}
        firsts = [k for k in range(0, len(job.stored), CHUNK) if k not in done]
        bar = tqdm(
            total=len(job.stored), initial=CHUNK * len(done), desc=f"packing {job.name}",
            unit=" images", delay=1, leave=False, disable=not job.progress,
        )  # fmt: skip
        with bar, ThreadPoolExecutor(threads(processes)) as pool:
            try:
                own = firsts[place::processes]
                for packed in pool.map(lambda first: self._pack(job, first), own):
                    bar.update(min(packed * processes, bar.total - bar.n))
            except BaseException:  # Ctrl-C too
                with contextlib.suppress(OSError):  # of a disk that is full
                    self.stopped.touch()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _pack(self, job, first):
        if self.stopped.exists():
            return 0
        rows = [int(row) for row in job.stored[first : first + CHUNK]]
        entries, bad, parts, place = np.zeros(len(rows), ENTRY), {}, [], 0
        for k, row in enumerate(rows):
            try:
                data = job.source.bytes(row)
                packed, width, height = pack_image(data, job.side, job.bit_depth)
            except Exception as error:  # Pillow's readers raise a dozen types for a bad file
                job.refuse({row: reason_of_image(error)})
                bad[row] = reason_of_image(error)
                continue
            offset = place
            if packed is data and job.source.in_table(row):
                offset = IN_DATASET
            else:
                parts.append(bytes(packed))
                place += len(packed)
            entries[k] = (offset, len(packed), width, height, zlib.crc32(packed))
        self._add(first, entries, bad, b"".join(parts))
        return len(rows)

    def _add(self, first, entries, bad, data):
        # flock is between processes, and the threads of one share it
        with self._adding, open(self.bytes, "r+b") as blob, open(self.journal, "ab") as journal:
            fcntl.flock(blob, fcntl.LOCK_EX)
            start = blob.seek(0, os.SEEK_END)
            entries["offset"][entries["offset"] != IN_DATASET] += np.uint64(start)
            blob.write(data)
            blob.flush()
            line = {"first": first, "end": start + len(data), "entries": entries.tobytes().hex(),
                    "bad": bad}  # fmt: skip
            text = json.dumps(line).encode()
            journal.write(b"%08x %s\n" % (zlib.crc32(text), text))

    def _chunks(self):
        """(the lines of the journal, their bytes, and those of the images they speak of)."""
        found, read, end = [], 0, 0
        with (
            contextlib.suppress(OSError, ValueError, KeyError),
            open(self.journal, "rb") as journal,
        ):
            size = self.bytes.stat().st_size
            for text in journal:  # a last line may be cut off
                check, _, content = text.rstrip(b"\n").partition(b" ")
                if int(check, 16) != zlib.crc32(content):
                    break
                one = json.loads(content)
                if one["end"] > size:
                    break
                one["entries"] = np.frombuffer(bytes.fromhex(one["entries"]), ENTRY)
                found.append(one)
                read, end = read + len(text), max(end, one["end"])
        return found, read, end

    def end(self, job):
        chunks, _, size = self._chunks()
        chunks.sort(key=lambda one: one["first"])
        packed = np.concatenate([np.zeros(0, ENTRY), *(one["entries"] for one in chunks)])
        if len(packed) != len(job.stored):
            raise UserError(f"{self.journal} was damaged while images were packed: start again")
        entries = np.zeros(len(job.source), ENTRY)
        entries[np.asarray(job.stored, dtype=np.int64)] = packed
        bad = {int(row): why for one in chunks for row, why in one["bad"].items()}
        with open(self.bytes, "r+b") as handle:
            os.fsync(handle.fileno())
        os.replace(self.bytes, self.blob)
        sync_folder(self.blob.parent)
        _write_index(self.file, entries, bad, size)
        self.journal.unlink()

    def leave(self):
        self.stopped.unlink(missing_ok=True)


def _remove_left_overs(folder):
    """Delete what makings had begun that nobody has gone on with for days."""
    for part in folder.glob("*.packing"):
        with contextlib.suppress(OSError):
            old = time.time() - part.stat().st_mtime > KEPT_DAYS * 86400
            index = part.with_name(part.name.rpartition(".")[0]).with_suffix(".index")
            if old and (lock := lock_of(index, wait=False)):
                part.unlink(missing_ok=True)
                lock.release()
