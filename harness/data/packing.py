"""Making the packed store: once per data set, by all processes of a machine together.

After a kill, the next run goes on with the images that are missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from harness.data.cache import cache_file, reason_of_image, unreadable
from harness.data.jpegs import pack_image
from harness.data.making import lock_of, make_together, threads
from harness.data.packed import (
    CHUNK,
    ENTRY,
    IN_DATASET,
    PackedImages,
    Source,
    read_index,
    write_index,
)
from harness.data.pixels import encoded
from harness.errors import UserError
from harness.files import has_file, sync_folder
from harness.processes import ALONE, from_local_main

PACK_VERSION = 1  # part of the cache key: raise it whenever `pack_image`'s output changes
KEPT_DAYS = 7  # how long the files of a killed run stay, so that another may go on


def find_packed(dataset, image_column, side, bit_depth=None, share=None):
    """The index of a split's store for this side, whether it exists or not.

    A store of a larger side is used only if none of its images is larger than `side`, as it then
    has the same bytes. If it were used always, the pixels would depend on what is in the cache.

    share: the rows that are stored, None for all.
    """
    key = (image_column, "packed", PACK_VERSION, *([bit_depth] if bit_depth else ()))
    if share is not None:
        key += ("share", hashlib.blake2b(share.tobytes(), digest_size=8).hexdigest())
    base = cache_file(dataset, *key)
    stores = []
    for file in filter(Path.is_file, base.parent.glob(f"{base.name}-*.index")):
        with contextlib.suppress(ValueError):
            stores.append((int(file.stem.rpartition("-")[2]), file))
    for stored_side, file in sorted(stores):
        fits = stored_side >= side and not _fault(file)
        if fits and (stored_side == side or _largest_side(file) <= side):
            return file
    return base.with_name(f"{base.name}-{side}.index")


def _largest_side(file):
    """The shorter side of the image in a store where it is largest, px."""
    _, entries = read_index(file)
    return int(np.minimum(entries["width"], entries["height"]).max(initial=0))


def packed_size(file):
    """The size of a store's two files in bytes, or None where there are none."""
    try:
        return file.stat().st_size + file.with_suffix(".jpegs").stat().st_size
    except OSError:
        return None


def packed_bytes(images, row, side, bit_depth=None):
    """The size of an image in the store in bytes, 0 if it can't be read. images: see `encoded`."""
    try:
        return len(pack_image(Source(images).bytes(row), side, bit_depth)[0])
    except Exception:  # Pillow's readers raise a dozen types; packing names the image
        return 0


def _fault(file):
    """Why a store can't be used; "" if it can, "none" where there is no index."""
    blob = file.with_suffix(".jpegs")
    if not all(map(has_file, (file, blob))):
        return "none"
    try:
        header, _ = read_index(file)
        size = blob.stat().st_size
    except FileNotFoundError:
        return "none"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "its index is damaged"
    return "" if size == header["bytes"] else f"{size:,} bytes instead of {header['bytes']:,}"


class _Job(NamedTuple):
    source: Source
    rows: object  # to pack, in this order
    side: int
    bit_depth: int | None
    refuse: object  # takes {row: reason} of an unreadable image; raises UserError if it is needed
    name: str
    progress: bool


def pack_split(
    dataset, image_column, preprocessing, *, name, rows=None, bit_depth=None, accelerator=ALONE,
    share=None, verify=False, progress=True,
):  # fmt: skip
    """Pack every image of `dataset`, or find the store in the cache: PackedImages.

    Any number of runs may call this at once: one of them packs while the others wait for its lock.

    Args:
        dataset: a `datasets.Dataset`.
        image_column: the name of its `Image` column.
        preprocessing: a Preprocessing with its packed_side.
        name: what the split is called in messages.
        rows: the rows that will be used, None for all. An image outside of them that can't be read
            is left out.
        bit_depth: of 16-bit gray images, see `harness.data.pixels.decode_image`.
        share: the rows that this machine stores, None for all. Another row is packed anew each
            time it is read.
        accelerator: all its processes call this, and those of one machine share the work.
        verify: compare all bytes with their checksums now, not only when they are read.
        progress: show a bar, on one process of each machine, when it takes more than a second.

    Raises UserError for an image that can't be read (the message names split, index and file), or a
    full disk.
    """
    used = np.ones(len(dataset), bool) if rows is None else np.isin(np.arange(len(dataset)), rows)

    def refuse(bad):
        for row, reason in bad.items():
            if used[row]:
                raise UserError(unreadable(dataset, image_column, name, row, reason))

    images = encoded(dataset, image_column)
    # A run that starts while another one makes a larger store makes a store of its own
    file = from_local_main(
        accelerator,
        lambda: find_packed(dataset, image_column, preprocessing.packed_side, bit_depth, share),
    )
    progress = progress and accelerator.is_local_main_process
    job = _Job(
        Source(images), range(len(images)) if share is None else share, preprocessing.packed_side,
        bit_depth, refuse, name, progress,
    )  # fmt: skip
    making = _Making(file)
    make_together(
        accelerator, file, lambda: _fault(file), lambda: making.begin(len(job.rows)),
        lambda rank, processes: making.pack_share(job, rank, processes), lambda _: making.end(job),
        leave=making.leave, made_by="packed", failure=f"cannot pack the images of split '{name}'",
    )  # fmt: skip
    header, _ = read_index(file)
    refuse({int(row): reason for row, reason in header["bad"].items()})
    packed = PackedImages(file, images, preprocessing, bit_depth, name)
    if verify and accelerator.is_local_main_process:
        packed.verify(progress)
    return packed


class _Making:
    """The files of a store that is being made, to which several processes add.

    KEY-SIDE.jpegs.packing gets the bytes, in the order in which they come. KEY-SIDE.index.packing
    gets a line for each chunk of images in it, so that a later run can go on with the others.
    """

    def __init__(self, file):
        self.file, self.blob = file, file.with_suffix(".jpegs")
        self.bytes = self.blob.with_name(f"{self.blob.name}.packing")
        self.journal = file.with_name(f"{file.name}.packing")
        # Made by a process that fails, so that the others stop, too
        self.stopped = file.with_name(f"{file.name}.stopped")
        self._adding = threading.Lock()

    def begin(self, count):
        """Prepare the files, and keep what an earlier run has packed. count: images to pack."""
        for file in (self.bytes, self.journal, self.stopped):
            has_file(file)
        _remove_left_overs(self.file.parent)
        if self.stopped.is_file():
            self.stopped.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)
        chunks, *ends = self._chunks()
        for file, end in zip((self.journal, self.bytes), ends, strict=True):
            with open(file, "ab") as handle:
                handle.truncate(end)  # removes a last line that was cut off, and its images
        if packed := sum(len(chunk["entries"]) for chunk in chunks):
            print(f"{packed:,} of {count:,} images were packed before: going on", flush=True)

    def pack_share(self, job, rank, processes):
        """Pack every `processes`-th of the missing chunks, from number `rank` on."""
        chunks, *_ = self._chunks()
        packed = {chunk["first"] for chunk in chunks}
        missing = [k for k in range(0, len(job.rows), CHUNK) if k not in packed]
        bar = tqdm(
            total=len(job.rows), initial=CHUNK * len(packed), desc=f"packing {job.name}",
            unit=" images", delay=1, leave=False, disable=not job.progress,
        )  # fmt: skip
        with bar, ThreadPoolExecutor(threads(processes)) as pool:
            try:
                share = missing[rank::processes]
                for count in pool.map(lambda start: self._pack(job, start), share):
                    bar.update(min(count * processes, bar.total - bar.n))
            except BaseException:  # Ctrl-C too
                with contextlib.suppress(OSError):  # the disk may be full
                    self.stopped.touch()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _pack(self, job, start):
        """Pack the chunk that begins at number `start` of the job's rows; returns its length."""
        if self.stopped.exists():
            return 0
        rows = [int(row) for row in job.rows[start : start + CHUNK]]
        entries, bad, jpegs, end = np.zeros(len(rows), ENTRY), {}, [], 0
        for k, row in enumerate(rows):
            try:
                data = job.source.bytes(row)
                packed, width, height = pack_image(data, job.side, job.bit_depth)
            except Exception as error:  # Pillow's readers raise a dozen types for a bad file
                job.refuse({row: reason_of_image(error)})
                bad[row] = reason_of_image(error)
                continue
            offset = end
            if packed is data and job.source.in_table(row):
                offset = IN_DATASET
            else:
                jpegs.append(bytes(packed))
                end += len(packed)
            entries[k] = (offset, len(packed), width, height, zlib.crc32(packed))
        self._add(start, entries, bad, b"".join(jpegs))
        return len(rows)

    def _add(self, chunk_start, entries, bad, data):
        """Add a chunk: its bytes to the one file, and its line to the other."""
        # The threads of a process share its flock, so they need a lock of their own
        with self._adding, open(self.bytes, "r+b") as blob, open(self.journal, "ab") as journal:
            fcntl.flock(blob, fcntl.LOCK_EX)
            start = blob.seek(0, os.SEEK_END)
            entries["offset"][entries["offset"] != IN_DATASET] += np.uint64(start)
            blob.write(data)
            blob.flush()
            line = {
                "first": chunk_start,
                "end": start + len(data),
                "entries": entries.tobytes().hex(),
                "bad": bad,
            }
            text = json.dumps(line).encode()
            journal.write(b"%08x %s\n" % (zlib.crc32(text), text))

    def _chunks(self):
        """(chunks in the journal, the length of their lines, the length of their images' bytes)."""
        chunks, length, end = {}, 0, 0
        with (
            contextlib.suppress(OSError, ValueError, KeyError),
            open(self.journal, "rb") as journal,
        ):
            size = self.bytes.stat().st_size
            for text in journal:  # a last line may be cut off
                check, _, content = text.rstrip(b"\n").partition(b" ")
                if int(check, 16) != zlib.crc32(content):
                    break
                chunk = json.loads(content)
                if chunk["end"] > size:
                    break
                chunk["entries"] = np.frombuffer(bytes.fromhex(chunk["entries"]), ENTRY)
                # After a kill and a restart, two processes may have packed the same chunk
                chunks.setdefault(chunk["first"], chunk)
                length, end = length + len(text), max(end, chunk["end"])
        return list(chunks.values()), length, end

    def end(self, job):
        """Complete the store: write its index and give the files their names."""
        chunks, _, size = self._chunks()
        chunks.sort(key=lambda chunk: chunk["first"])
        packed = np.concatenate([np.zeros(0, ENTRY), *(chunk["entries"] for chunk in chunks)])
        if len(packed) != len(job.rows):
            self.journal.unlink()
            raise UserError(f"{self.journal} was damaged while images were packed: start again")
        entries = np.zeros(len(job.source), ENTRY)
        entries[np.asarray(job.rows, dtype=np.int64)] = packed
        bad = {int(row): reason for chunk in chunks for row, reason in chunk["bad"].items()}
        with open(self.bytes, "r+b") as handle:
            os.fsync(handle.fileno())
        os.replace(self.bytes, self.blob)
        sync_folder(self.blob.parent)
        write_index(self.file, entries, bad, size)
        self.journal.unlink()

    def leave(self):
        """Remove the mark of a failure, so that the next run can start."""
        if self.stopped.is_file():
            self.stopped.unlink(missing_ok=True)


def _remove_left_overs(folder):
    """Delete the unfinished files of killed runs to which nothing was added for days."""
    for file in folder.glob("*.packing"):
        with contextlib.suppress(OSError):
            old = time.time() - file.stat().st_mtime > KEPT_DAYS * 86400
            index = file.with_name(file.name.rpartition(".")[0]).with_suffix(".index")
            if old and (lock := lock_of(index, wait=False)):
                file.unlink(missing_ok=True)
                lock.release()
