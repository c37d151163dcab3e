"""An epoch of input from a `datasets` data set: ours against `with_transform` rows in a DataLoader.

    python benchmarks/input_epoch.py

The second epoch on: decoded once and caches warm on our side, workers alive on the other. Ours is
the input of train.py: order, draws, gather, augmentation of batches (`train_batches` and `Views`,
crop, flip, RandAugment, normalise, erasing), in one process with the threads of all cores. The
peer is the documented way of `datasets`: `with_transform` with torchvision's transforms on the
rows' PIL images, and a shuffling DataLoader with as many persistent workers as cores. Both end in
float batches on the CPU; nothing is trained, so all cores are the input's.
"""

import os
import tempfile
import time

import torch
from accelerate import Accelerator
from measure import Row, data_flag, over, parser, read, report
from processes import PIXELS, folder_of
from resume import LOOK, MEAN, STD, collate, transform_rows
from torch.utils.data import DataLoader

from harness.data.batches import Views, train_batches
from harness.data.sources import load_data
from harness.data.stores import decode_splits
from harness.launch import keep_freed_memory

BATCHES = 128, 512


def main():
    arg_parser = parser(__doc__, rounds=4)
    data_flag(arg_parser)
    arg_parser.add_argument("--max_images", type=int, default=20_000, help="of the train split")
    args = read(arg_parser)
    keep_freed_memory()
    if args.quick:
        args.max_images = 640
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("HF_DATASETS_CACHE", f"{temporary}/cache")
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        folder, words = folder_of(args.data, temporary, args.max_images)
        data = load_data(folder, test_split="none", max_train_samples=args.max_images)
        split = decode_splits(data, LOOK, progress=False)["train"]
        for batch in BATCHES:
            images = len(data.train) // batch * batch
            ours, peer = seconds(args.rounds, data, split, batch, cores)
            what = f"an epoch of input, batch {batch}"
            rows += [
                Row(f"{what}: ours / with_transform rows in a DataLoader", over(peer, ours), 10),
                Row(f"{what}, ours, images/s", [images / s for s in ours]),
                Row(f"{what}, with_transform, images/s", [images / s for s in peer]),
            ]
    report(args, rows, f"{words}, {len(data.train):,} images, {cores} cores")


def seconds(rounds, data, split, batch, cores):
    """The times of an epoch on both sides, (ours, the peer's), a number for each of the rounds."""
    views = Views(PIXELS, MEAN, STD, augment="randaugment", padding=4, flip_prob=0.5,
                  erasing=0.25, ops=2, magnitude=9)  # fmt: skip
    per_epoch = len(data.train) // batch
    steps = train_batches(
        split, views, Accelerator(cpu=True), batch_size=batch, seed=0, accumulation=1,
        total_steps=per_epoch * (rounds + 1),
    )(0)  # fmt: skip
    stored = data.train.dataset.select(data.train.rows)
    loader = DataLoader(
        stored.with_transform(transform_rows(data.image_column, data.label_column)), batch,
        shuffle=True, drop_last=True, num_workers=cores, persistent_workers=True,
        collate_fn=collate,
    )  # fmt: skip

    def ours():
        for _ in range(per_epoch):
            for part in next(steps):
                assert part.images.dtype == torch.float32

    def peer():
        assert sum(1 for _ in loader) == per_epoch

    taken = []
    for _ in range(rounds + 1):
        for work in (ours, peer):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return taken[2::2], taken[3::2]  # the first epoch warms up


if __name__ == "__main__":
    main()
