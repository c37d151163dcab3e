"""Making the packed store: once per data set, by all processes of a machine together.

One that was killed goes on where it was.
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
KEPT_DAYS = 7  # for which a making that was killed may go on


def find_packed(dataset, image_column, side, bit_depth=None, share=None):
    """The index of a split's store of this side, which need not be there.

    One of a larger side serves where none of its images is larger than `side`: it has the same
    bytes. Otherwise the pixels would depend on what else lies in the cache.

    share: the rows that are stored, None for all.
    """
    key = (image_column, "packed", PACK_VERSION, *([bit_depth] if bit_depth else ()))
    if share is not None:
        key += ("share", hashlib.blake2b(share.tobytes(), digest_size=8).hexdigest())
    base = cache_file(dataset, *key)
    there = []
    for file in filter(Path.is_file, base.parent.glob(f"{base.name}-*.index")):
        with contextlib.suppress(ValueError):
            there.append((int(file.stem.rpartition("-")[2]), file))
    for its, file in sorted(there):
        if its >= side and not _fault(file) and (its == side or _shortest(file) <= side):
            return file
    return base.with_name(f"{base.name}-{side}.index")


def _shortest(file):
    """The largest of the shorter sides of a store's images, px."""
    _, entries = read_index(file)
    return int(np.minimum(entries["width"], entries["height"]).max(initial=0))


def packed_size(file):
    """The bytes of a store's two files, or None where there is none."""
    try:
        return file.stat().st_size + file.with_suffix(".jpegs").stat().st_size
    except OSError:
        return None


def packed_bytes(images, row, side, bit_depth=None):
    """The bytes that an image takes in the store; 0 where it can't be read. images: `encoded`."""
    try:
        return len(pack_image(Source(images).bytes(row), side, bit_depth)[0])
    except Exception:  # Pillow's readers raise a dozen types; packing names the image
        return 0


def _fault(file):
    """Why a store can't be used: "" if it can, "none" where there is no index."""
    blob = file.with_suffix(".jpegs")
    if not all(has_file(each) for each in (file, blob)):
        return "none"
    try:
        header, _ = read_index(file)
        found = blob.stat().st_size
    except FileNotFoundError:
        return "none"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "its index is damaged"
    return "" if found == header["bytes"] else f"{found:,} bytes instead of {header['bytes']:,}"


class _Job(NamedTuple):
    source: Source
    stored: object  # the rows to be packed, in their order
    side: int
    bit_depth: int | None
    refuse: object  # takes {row: why} of an image that can't be read; raises where it is needed
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
        lambda: find_packed(dataset, image_column, preprocessing.packed_side, bit_depth, share),
    )
    progress = progress and accelerator.is_local_main_process
    stored = range(len(images)) if share is None else share
    job = _Job(Source(images), stored, preprocessing.packed_side, bit_depth, refuse, name, progress)
    making = _Making(file)
    make_together(
        accelerator, file, lambda: _fault(file), lambda: making.begin(len(stored)),
        lambda place, processes: making.share(job, place, processes), lambda _: making.end(job),
        leave=making.leave, made_by="packed", failure=f"cannot pack the images of split '{name}'",
    )  # fmt: skip
    header, _ = read_index(file)
    refuse({int(row): why for row, why in header["bad"].items()})
    packed = PackedImages(file, images, preprocessing, bit_depth, name)
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
        for file in (self.bytes, self.journal, self.stopped):
            has_file(file)
        _remove_left_overs(self.file.parent)
        if self.stopped.is_file():
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
        found, read, end = {}, 0, 0
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
                # A process whose peer was killed and came back may have packed the same images
                found.setdefault(one["first"], one)
                read, end = read + len(text), max(end, one["end"])
        return list(found.values()), read, end

    def end(self, job):
        chunks, _, size = self._chunks()
        chunks.sort(key=lambda one: one["first"])
        packed = np.concatenate([np.zeros(0, ENTRY), *(one["entries"] for one in chunks)])
        if len(packed) != len(job.stored):
            self.journal.unlink()
            raise UserError(f"{self.journal} was damaged while images were packed: start again")
        entries = np.zeros(len(job.source), ENTRY)
        entries[np.asarray(job.stored, dtype=np.int64)] = packed
        bad = {int(row): why for one in chunks for row, why in one["bad"].items()}
        with open(self.bytes, "r+b") as handle:
            os.fsync(handle.fileno())
        os.replace(self.bytes, self.blob)
        sync_folder(self.blob.parent)
        write_index(self.file, entries, bad, size)
        self.journal.unlink()

    def leave(self):
        if self.stopped.is_file():
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
