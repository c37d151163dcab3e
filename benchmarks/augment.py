"""Batched augmentation against torchvision's, image by image: images/s and ratios, one core.

    python benchmarks/augment.py
    python benchmarks/augment.py --batch 128 --rounds 20 --data train-00000-of-00001.parquet

Each pipeline is crop + flip + policy + normalise + random erasing. Ours starts from a uint8 batch
and ends in a normalised channels_last one, draws included. The peers start from decoded PIL images
("PIL", torchvision.transforms) or uint8 tensors ("tensors", torchvision.transforms.v2) and end in a
stacked batch. Ours and the peers take turns in every round, so that a busy machine slows all of
them: quote the ratios.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tricks.augment import (
    crop_batch,
    draw_crops,
    draw_erasing,
    draw_flips,
    erase_batch,
    flip_batch,
    normalize_batch,
)
from tricks.autoaugment import (
    apply_ops,
    draw_autoaugment,
    draw_randaugment,
    draw_trivialaugment,
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
NUM_IMAGES = 512  # what a peer goes through in a round; ours goes through OURS times as many
OURS = 8

POLICIES = {
    "RandAugment(2, 9)": (draw_randaugment, lambda v: v.RandAugment(2, 9)),
    "TrivialAugmentWide": (draw_trivialaugment, lambda v: v.TrivialAugmentWide()),
    "AutoAugment (CIFAR-10)": (
        draw_autoaugment,
        lambda v: v.AutoAugment(v.AutoAugmentPolicy.CIFAR10),
    ),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512], help="batch sizes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--rounds", type=int, default=10, help="times each pipeline is timed")
    parser.add_argument("--data", help="parquet file of encoded images; default: smooth noise")
    return parser.parse_args()


def load_images(path: str | None) -> list[Image.Image]:
    """NUM_IMAGES RGB images of one size."""
    if path is None:
        coarse = torch.rand(NUM_IMAGES, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)
        return [Image.fromarray(a) for a in (smooth * 255).byte().permute(0, 2, 3, 1).numpy()]
    import pyarrow.parquet as pq

    table = pq.read_table(path).slice(0, NUM_IMAGES)
    column = next(field.name for field in table.schema if "bytes" in str(field.type))
    return [
        Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table[column].to_pylist()
    ]


def augment_batches(images: torch.Tensor, batch: int, draw_ops, generator: torch.Generator) -> None:
    height, width = images.shape[-2:]
    for part in images.split(batch):
        n = len(part)
        part = crop_batch(part, draw_crops(n, 4, generator), 4)
        part = flip_batch(part, draw_flips(n, generator=generator))
        part = apply_ops(part, draw_ops(n, height, width, generator=generator))
        part = normalize_batch(part, MEAN, STD)
        erase_batch(part, draw_erasing(n, height, width, generator=generator))


def torchvision_pipeline(v, policy, size: tuple[int, int]):
    steps = [v.RandomCrop(size, padding=4), v.RandomHorizontalFlip(), policy]
    steps += [v.ToTensor() if v is v1 else v.ToDtype(torch.float32, scale=True)]
    return v.Compose([*steps, v.Normalize(MEAN, STD), v.RandomErasing(p=0.25)])


def augment_each(images, transform) -> None:
    torch.stack([transform(image) for image in images])


def rates(runs: dict[str, tuple[Callable[[], None], int]], rounds: int) -> dict[str, list[float]]:
    """Images/s of each run (what it does, on how many images) in each round, taking turns."""
    measured = {name: [] for name in runs}
    for done in range(rounds + 1):
        for name, (work, count) in runs.items():
            start = time.perf_counter()
            work()
            if done:  # the first round warms up
                measured[name].append(count / (time.perf_counter() - start))
    return measured


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    pictures = load_images(args.data)
    tensors = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    many = tensors.repeat(OURS, 1, 1, 1)
    size = tuple(tensors.shape[-2:])
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    print(f"torch {torch.__version__}, {args.threads} thread(s), {size[0]}×{size[1]} px\n")
    print("| pipeline | batch | peer | ours, images/s | peer, images/s | ratio (min–max) | n |")
    print("|---|---|---|---|---|---|---|")
    for (name, (draw_ops, policy)), batch in product(POLICIES.items(), args.batch):
        pil, v2_tensors = (torchvision_pipeline(v, policy(v), size) for v in (v1, v2))
        runs = {
            "ours": (partial(augment_batches, many, batch, draw_ops, generator), len(many)),
            "PIL": (partial(augment_each, pictures, pil), len(pictures)),
            "tensors": (partial(augment_each, tensors, v2_tensors), len(tensors)),
        }
        measured = rates(runs, args.rounds)
        ours = measured.pop("ours")
        for peer, theirs in measured.items():
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            print(
                f"| {name} | {batch} | {peer} | {statistics.median(ours):,.0f} "
                f"| {statistics.median(theirs):,.0f} | {statistics.median(ratios):.1f} "
                f"({min(ratios):.1f}–{max(ratios):.1f}) | {len(ratios)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
