"""The packed store: a split's images as JPEG bytes with an index, decoded a batch at a time.

It is for photographs and large sets, whose pixels would not fit a disk and whose random crops are
cut from the original images. harness.data.packing makes it; it may be deleted at any time. It has
two files in the cache folder of `datasets`, under `pixels/`: KEY-SIDE.jpegs, the bytes; and
KEY-SIDE.index, which says where the bytes of each image are, its size and its checksum.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from harness.data.cache import reason_of_image
from harness.data.jpegs import decode_centre, decode_crop, decode_crops_on, pack_image
from harness.data.making import threads
from harness.errors import UserError
from harness.files import replace_file

CHUNK = 64  # images that a thread packs or verifies at a time
ENTRY = np.dtype([
    ("offset", "<u8"),  # in the .jpegs file, or IN_DATASET
    ("length", "<u4"),  # bytes; 0 for an image that can't be read
    ("width", "<u4"), ("height", "<u4"),  # px
    ("crc", "<u4"),  # zlib's crc32 of the bytes
])  # fmt: skip
IN_DATASET = 2**64 - 1  # the offset of an image whose bytes are in the table of the data set
NO_OFFSET = ["length", "width", "height", "crc"]  # fields that do not depend on where bytes lie


def read_index(file):
    """(header, memory-mapped entries of type ENTRY) of an index; ValueError if it is damaged."""
    with open(file, "rb") as handle:
        line = handle.readline(2**27)
    header = json.loads(line)
    count = header["images"]
    if file.stat().st_size != len(line) + count * ENTRY.itemsize:
        raise ValueError("cut short")
    entries = np.memmap(file, ENTRY, "r", offset=len(line), shape=(count,))
    if header["hash"] != _hash(entries, header):
        raise ValueError("other bytes")
    return header, entries


def _hash(entries, header):
    facts = {name: header[name] for name in ("images", "bytes", "bad", "content")}
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    digest.update(entries)
    return digest.hexdigest()


def write_index(file, entries, bad, size):
    """Write an index. bad: {row: reason} of unreadable images. size: bytes of the .jpegs file."""
    content = hashlib.blake2b(digest_size=16)
    for name in NO_OFFSET:
        content.update(np.ascontiguousarray(entries[name]))
    header = {
        "images": len(entries), "bytes": size, "bad": {str(row): bad[row] for row in sorted(bad)},
        "content": content.hexdigest(),
    }  # fmt: skip
    header["hash"] = _hash(entries, header)
    replace_file(file, json.dumps(header).encode() + b"\n" + entries.tobytes())


class PackedImages:
    """The images of a split; used instead of a tensor uint8 (n, 3, size, size).

    Any number of threads may read. Every image is checked when it is read; one that is damaged in
    the file is packed again from the data set. on_gpu: whether crops come from `crops_on`.
    """

    on_gpu = False

    def __init__(self, file, images, preprocessing, bit_depth, name):
        """file: the index. images: see `encoded`. preprocessing and so on: see `pack_split`."""
        self.preprocessing, self.bit_depth, self.name = preprocessing, bit_depth, name
        self.shape = torch.Size((len(images), 3, preprocessing.size, preprocessing.size))
        self.blob = file.with_suffix(".jpegs")
        header, self.entries = read_index(file)
        self.content = header["content"]
        self._file = open(self.blob, "rb")  # noqa: SIM115 - as long as this lives
        self._source = Source(images)
        self._threads = threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def __len__(self):
        return self.shape[0]

    def sizes(self, rows):
        """Heights and widths of the images `rows`: int64 (n,) each."""
        entries = self.entries[rows.numpy()]
        return [torch.from_numpy(entries[side].astype(np.int64)) for side in ("height", "width")]

    def crops(self, rows, boxes, pinned=False):
        """Boxes of the images `rows`, resized: uint8 (n, 3, size, size) on the CPU.

        rows: int64 (n,). boxes: int64 (n, 4), top, left, height, width. pinned: whether to use
        page-locked memory, which copies to a GPU faster.
        """
        boxes = boxes.tolist()

        def decode(k, data, width, height):
            return decode_crop(data, width, height, boxes[k], self.preprocessing.size)

        return self._batch(rows, decode, pinned)

    def crops_on(self, device, rows, boxes):
        """As `crops`, but decoded on a CUDA device, where the result stays."""
        entries = self.entries[rows.numpy()].tolist()
        files = [self._read(row, *e)[0] for row, e in zip(rows.tolist(), entries, strict=True)]
        return decode_crops_on(device, files, boxes.tolist(), self.preprocessing.size)

    def centres(self, rows, pinned=False):
        """The images `rows` as evaluation sees them: uint8 (n, 3, size, size) on the CPU."""

        def decode(k, data, width, height):
            return decode_centre(data, width, height, self.preprocessing)

        return self._batch(rows, decode, pinned)

    def _batch(self, rows, decode, pinned):
        entries, rows = self.entries[rows.numpy()].tolist(), rows.tolist()
        batch = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8, pin_memory=pinned)

        queue = iter(range(len(rows)))

        def fill(_):  # each thread takes the next image from the queue
            with torch.inference_mode():
                for k in queue:
                    batch[k] = decode(k, *self._read(rows[k], *entries[k]))

        if self._threads == 1:
            fill(0)
        else:
            list(_pool(self._threads).map(fill, range(self._threads)))
        return batch

    def read(self, row):
        """(JPEG bytes, width, height) of an image."""
        return self._read(row, *self.entries[row].item())

    def _read(self, row, offset, length, width, height, crc):
        if not length:  # in another machine's share
            return pack_image(self._source.bytes(row), self._side, self.bit_depth)
        if offset == IN_DATASET:
            data = self._source.bytes(row)
        else:
            data = os.pread(self._file.fileno(), length, offset)
        if zlib.crc32(data) != crc:
            data = self._repaired(row, offset, crc)
        return data, width, height

    def _repaired(self, row, offset, crc):
        """The bytes of an image that is damaged in the file, packed again; repairs the file."""
        try:
            data, *_ = pack_image(self._source.bytes(row), self._side, self.bit_depth)
        except Exception as error:  # Pillow's readers raise a dozen types for a bad file
            data, reason = b"", reason_of_image(error)
        else:
            reason = "the image has changed since it was packed"
        if zlib.crc32(data) != crc:
            raise UserError(
                f"{self.blob} is damaged at image {row:,} of split '{self.name}', and the data set "
                f"does not have it any more ({reason}): delete the file, and start again"
            )
        print(f"{self.blob} is damaged at image {row:,}: packed again", flush=True)
        with contextlib.suppress(OSError):  # a read-only file stays damaged for the next run
            handle = os.open(self.blob, os.O_WRONLY)
            try:
                os.pwrite(handle, data, offset)
            finally:
                os.close(handle)
        return data

    @property
    def _side(self):
        return int(self.blob.stem.rpartition("-")[2])

    def verify(self, progress=False):
        """Read every image, which checks its bytes, and repair the damaged ones."""
        bar = tqdm(
            total=len(self), desc=f"verifying {self.name}", unit=" images", delay=1, leave=False,
            disable=not progress,
        )  # fmt: skip

        def check(start):
            rows = range(start, min(start + CHUNK, len(self)))
            for row in rows:
                if self.entries[row]["length"]:
                    self.read(row)
            return len(rows)

        with bar:
            for count in _pool(self._threads).map(check, range(0, len(self), CHUNK)):
                bar.update(count)


@functools.cache
def _pool(number):
    """Threads that decode; each image has one thread, so that all threads decode at once."""
    return ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,))


class Source:
    """The bytes of images as the data set has them."""

    def __init__(self, images):
        self._images = images
        (column,) = images.column_names
        # Straight from the table: `datasets` takes ten times as long for a row
        self._column, self._indices = images.data.column(column), None
        if images._indices is not None:
            self._indices = images._indices.column(0)

    def __len__(self):
        return len(self._images)

    def in_table(self, row):
        """Whether the table has the image's bytes, and not a path."""
        return self._cell(row)["bytes"].is_valid

    def bytes(self, row):
        """The bytes of an image; ValueError for an empty cell, OSError for an unreadable file."""
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
