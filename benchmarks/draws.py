"""Drawing what a step's batch is augmented with: over processes, and against one torch.Generator.

    python benchmarks/draws.py

The batches of train.py (crop, flip, RandAugment, erasing) for the last of 1 to 256 processes, with
128 images each, of as many images as ImageNet has. They are a pixel large and not augmented, and
the order of the epoch is there, so that what is left is drawing, on one thread. Then the draws of
whole batches by one process, by sample and with one torch.Generator for all of the batch: so did
every process before, whatever its part. As in train.py, malloc keeps what is freed.
"""

from types import SimpleNamespace

import torch
from measure import Row, over, parser, read, report, seconds_in_turns

from harness.counters import SampleStreams, generator
from harness.data.batches import Views, train_batches
from harness.data.stores import Samples
from harness.launch import keep_freed_memory

IMAGES, PART = 1_281_167, 128  # of the data, of a process
STEPS, REPEATS = 30, 4  # of one epoch, and how often that is timed at a time
PROCESSES = [2**k for k in range(9)]


class Draws(Views):
    """Views that draw, and leave the images as they are: drawing alone is timed."""

    def train(self, images, draw):
        return images


VIEWS = Draws(
    32, (0.5,) * 3, (0.25,) * 3, augment="randaugment", padding=4, flip_prob=0.5, erasing=0.25,
    ops=2, magnitude=9,
)  # fmt: skip


def batches_of(split, processes):
    """A function that makes the batches of STEPS steps, of the last process."""
    last = SimpleNamespace(
        device=torch.device("cpu"), process_index=processes - 1, num_processes=processes
    )
    batches = train_batches(
        split, VIEWS, last, batch_size=PART * processes, accumulation=1, seed=0, total_steps=STEPS
    )
    return lambda: [len(list(parts)) for _ in range(REPEATS) for parts in batches(0)]


def by_sample(n):
    def steps():
        for step in range(STEPS * REPEATS):
            VIEWS.draw(n, SampleStreams(0, "views", step, places=torch.arange(n)))

    return steps


def at_once(n):
    def steps():
        for step in range(STEPS * REPEATS):
            VIEWS.draw(n, generator(0, "views", step))

    return steps


def main():
    args = read(parser(__doc__, rounds=15))
    keep_freed_memory()
    torch.set_num_threads(1)
    split = Samples(
        torch.zeros(IMAGES, 3, 1, 1, dtype=torch.uint8), torch.arange(IMAGES),
        torch.zeros(IMAGES, dtype=torch.int64),
    )  # fmt: skip
    most = PROCESSES[-1]
    taken = seconds_in_turns({p: batches_of(split, p) for p in PROCESSES}, args.rounds)
    rows = [
        Row(f"draws of {PART} images, the last of {p} processes / one", over(taken[p], taken[1]),
            1.2, at_most=True)
        for p in PROCESSES[1:]
    ]  # fmt: skip
    rows.append(Row(f"draws of {PART} images, the last of {most} processes, ms a step",
                    [1000 * s / STEPS / REPEATS for s in taken[most]]))  # fmt: skip
    for n in (128,) if args.quick else (128, 512, 1024, PART * most):
        sides = {"by sample": by_sample(n), "at once": at_once(n)}
        taken = seconds_in_turns(sides, args.rounds if n <= 1024 else 1 + args.rounds // 5)
        rows.append(Row(f"draws of {n:,} images: by sample / one torch.Generator",
                        over(taken["by sample"], taken["at once"])))  # fmt: skip
        rows += [
            Row(f"draws of {n:,} images, {name}, ms", [1000 * s / STEPS / REPEATS for s in seconds])
            for name, seconds in taken.items()
        ]
    report(args, rows, f"one thread, {STEPS * REPEATS} steps at a time")


if __name__ == "__main__":
    main()
