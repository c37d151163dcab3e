"""What a packed store of a million images costs: at the start, in memory, and from a cold disk.

    python benchmarks/large.py
    python benchmarks/large.py --images 1300000 --rounds 5

- start: `pack_split` on a store that is there, of so many images minus one of 2,000, in seconds.
  The index is real and whole; the bytes are those of 2,000 images over and over.
- memory: what a process has taken more (unique set size) after an epoch's order, the start and 50
  batches.
- cold: a batch of random images from a file that is not in memory (dropped from the page cache
  before each), over the bare reads of the same bytes in the same order.
- less memory than data: images/s of 30 batches where nine tenths of the file are dropped again and
  again, over those of a file in memory.
- draws: seconds a process for one step of a shared order, as the last of 64 processes (8 machines
  of 8) that take 128 images each, over those of one process alone with 128.
"""

import os
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import psutil
import pyarrow
import torch
from measure import Row, over, parser, read, report
from photos import LOOK, MEAN, SIZE, STD, photographs

from harness.counters import SampleStreams
from harness.data import packed, packing
from harness.data.batches import Views
from harness.data.jpegs import packed_side
from harness.data.making import threads
from harness.data.pixels import epoch_order

FEW, BATCH = 2000, 64
LOOK = LOOK._replace(packed_side=packed_side(SIZE, LOOK.stored_size, 0.08))


def main():
    arg_parser = parser(__doc__, rounds=5)
    arg_parser.add_argument("--images", type=int, default=1_300_000)
    args = read(arg_parser)
    number = 20_000 if args.quick else args.images
    files = photographs("", 100 if args.quick else 500)
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk, and not in memory
        datasets.config.HF_DATASETS_CACHE = folder
        few, many = (store(files, n) for n in (FEW, number))
        rows = [
            Row(
                f"start, {number:,} images minus {FEW:,}, s",
                starts(few, many, args.rounds),
                5,
                True,
            )
        ]
        memory = [grown(few), grown(many)]
        rows += [Row(f"memory, {number:,} images minus {FEW:,}, MB", [memory[1] - memory[0]])]
        rows += [Row("cold batch / bare reads", cold(many, args.rounds), 1.5, True)]
        rows += [Row("nine tenths dropped / in memory, images/s", scarce(few, args.rounds), 0.8)]
    rows += [Row("draws, one of 64 processes / one alone", draws(number, args.rounds), 1.2, True)]
    report(args, rows, f"batch {BATCH}, 500×375 px, {threads()} threads")


def store(files, number):
    """A data set of so many images that has its store: the files over and over."""
    paths = pyarrow.array([f"/there/{k % len(files)}.jpg" for k in range(number)])
    cells = pyarrow.StructArray.from_arrays(
        [pyarrow.nulls(number, pyarrow.binary()), paths], ["bytes", "path"]
    )
    dataset = datasets.Dataset(
        datasets.table.InMemoryTable(pyarrow.table({"image": cells})),
        info=datasets.DatasetInfo(features=datasets.Features({"image": datasets.Image()})),
        fingerprint=f"{number:016x}",
    )
    index = packing.find_packed(dataset, "image", LOOK.packed_side)
    index.parent.mkdir(parents=True, exist_ok=True)

    one = np.zeros(len(files), packed.ENTRY)
    one["length"] = [len(file) for file in files]
    one["offset"] = np.cumsum(one["length"]) - one["length"]
    one["width"], one["height"] = 500, 375
    one["crc"] = [zlib.crc32(file) for file in files]
    entries = one[np.arange(number) % len(files)]
    copies = -(-min(number, FEW) // len(files))  # of the bytes, so that a batch is not one page
    size = sum(map(len, files))
    entries["offset"] += (np.arange(number) // len(files) % copies * size).astype(np.uint64)
    with open(index.with_suffix(".jpegs"), "wb") as blob:
        for _ in range(copies):
            blob.write(b"".join(files))
        os.fsync(blob.fileno())
    packed.write_index(index, entries, {}, copies * size)
    return dataset


def opened(dataset):
    return packing.pack_split(dataset, "image", LOOK, name="bench", progress=False)


def starts(few, many, rounds):
    def seconds(dataset):
        start = time.perf_counter()
        opened(dataset)
        return time.perf_counter() - start

    return [seconds(many) - seconds(few) for _ in range(rounds)]


def random_rows(images, k):
    order = epoch_order(len(images), 0, k)
    return order[: BATCH * 50].split(BATCH)


def grown(dataset):
    """MB that this process has more after the start and 50 batches; a new process each."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        before = psutil.Process().memory_full_info().uss
        images = opened(dataset)
        images._threads = 1
        for rows in random_rows(images, 0):
            images.centres(rows)
        after = psutil.Process().memory_full_info().uss
        os.write(writing, str((after - before) / 1e6).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return float(os.read(reading, 100))


def drop(images, part=1.0):
    """Drop a part of the file from the page cache."""
    handle = images._file.fileno()
    os.posix_fadvise(handle, 0, int(part * images.blob.stat().st_size), os.POSIX_FADV_DONTNEED)


def cold(dataset, rounds):
    images, found = opened(dataset), []
    for k in range(rounds):
        rows = random_rows(images, k)[0]
        seconds = []
        for work in (lambda rows=rows: bare(images, rows), lambda rows=rows: images.centres(rows)):
            drop(images)
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        # Decoding is the same where the file is in memory: what is left is what the disk costs
        start = time.perf_counter()
        images.centres(rows)
        warm = time.perf_counter() - start
        found.append(max(seconds[1] - warm, seconds[0]) / seconds[0])
    return found


def bare(images, rows):
    """Read the same bytes with as many threads, and do nothing with them."""
    entries = [images.entries[row] for row in rows.tolist()]
    handle = images._file.fileno()
    with ThreadPoolExecutor(threads()) as pool:
        list(pool.map(lambda e: os.pread(handle, int(e["length"]), int(e["offset"])), entries))


def scarce(dataset, rounds):
    images, found = opened(dataset), []
    for k in range(rounds):
        seconds = []
        for part in (0.0, 0.9):
            start = time.perf_counter()
            for rows in random_rows(images, k)[:30]:
                if part:
                    drop(images, part)
                images.centres(rows)
            seconds.append(time.perf_counter() - start)
        found.append(seconds[0] / seconds[1])
    return found


def draws(number, rounds):
    views = Views(SIZE, MEAN, STD, augment="randaugment", padding=0, flip_prob=0.5, erasing=0.25,
                  ops=2, magnitude=9, crop_scale=0.08, packed=True)  # fmt: skip

    def step(place, order):
        start = time.perf_counter()
        places = torch.arange(place * 128, place * 128 + 128)
        sizes = [torch.full((128,), side) for side in (375, 500)]
        assert len(order[places]) == 128
        views.draw(128, SampleStreams(0, "views", 7, places=places), sizes=sizes)
        return time.perf_counter() - start

    order = epoch_order(number, 0, 0)
    step(0, order)
    sides = [
        [sum(step(place, order) for _ in range(20)) for _ in range(rounds)] for place in (63, 0)
    ]
    return over(*sides)


if __name__ == "__main__":
    main()
