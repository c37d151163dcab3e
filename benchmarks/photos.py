"""Batches of photographs from the packed store against torchvision's and timm's pipelines.

    python benchmarks/photos.py
    python benchmarks/photos.py --images ../shared/data/dogs_vs_cats --rounds 9

A JPEG of 500 × 375 px becomes an augmented, normalised 224 px row of a batch: random resized crop
from 8 %, flip, RandAugment (2 operations, magnitude 9), normalise. On one core; sides take turns:

- ours: `PackedImages.crops` and `Views.train`, draws included, as train.py's batches;
- v1: torchvision.transforms on images that Pillow decodes, one by one, stacked at the end;
- v2: torchvision.transforms.v2 on what torchvision.io decodes, one by one, stacked at the end;
- timm: its create_transform (auto_augment rand-m9-n2) on images that Pillow decodes, as its loader
  does; normalised one by one, or (its prefetcher's way) stacked as uint8 and normalised as a batch.

Also: how many images one core packs; two threads that make two passes against two processes that
make one of them each; and how far crops are from the same crops of the original, in dB, for the
packed store, and for the decoded one, whose squares are 224/0.875 px (its crops lie inside the
square, so only those are compared).
"""

import io
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from measure import Row, over, parser, read, report, seconds_in_turns
from PIL import Image
from timm.data import create_transform
from torchvision import io as tvio
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from harness.counters import SampleStreams
from harness.data import jpegs
from harness.data.batches import Views
from harness.data.packing import pack_split
from harness.data.pixels import decode_image
from harness.data.preprocessing import Preprocessing
from harness.launch import keep_freed_memory
from tricks.augment import draw_resized_crops, normalize_batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, SCALE, BATCH = 224, 0.08, 64
LOOK = Preprocessing(SIZE, 0.875, "bilinear", MEAN, STD)


def main():
    arg_parser = parser(__doc__, rounds=7)
    arg_parser.add_argument(
        "--images", default="", help="a folder of JPEGs; unset: 500×375 px ones"
    )
    arg_parser.add_argument("--number", type=int, default=256, help="images of a round")
    arg_parser.add_argument("--half", type=int, help=argument_of_a_process())
    args = read(arg_parser)
    keep_freed_memory()
    torch.set_num_threads(1)
    files = photographs(args.images, args.number if not args.quick else 16)
    ours = Ours(files)
    if args.half is not None:  # one of two independent processes: its passes, at each line
        ours.crops([args.half])
        print("ready", flush=True)
        for _ in sys.stdin:
            ours.crops([args.half])
            print("done", flush=True)
        return
    rows = speeds("photographs", files, args.rounds, {"v1, Pillow": 1.6, "v2, torchvision.io": 1.2})
    large = photographs("", 4 if args.quick else 16, 3000, 2000)
    rows += speeds("photographs of 3000×2000 px", large, min(args.rounds, 5), {})
    rows += [packing("photographs, copied", files, args.rounds)]
    rows += [packing("photographs of 3000×2000 px, shrunk", large, min(args.rounds, 5))]
    rows += [Row("photographs, two threads / two processes", two_of_each(args, ours, files), 0.95)]
    rows += decibels(files)
    what = args.images or "500×375 px"
    report(args, rows, f"{len(files)} JPEGs ({what}), {jpegs.decoder()}, one core")


def speeds(what, files, rounds, wanted):
    """Rows of the peers' seconds over ours, in one core's turns."""
    ours = Ours(files)
    sides = {"ours": lambda: ours.batches(0, len(files)), **peers(files)}
    seconds = seconds_in_turns(sides, rounds)
    rows = [
        Row(f"{what}, {name} / ours", over(seconds[name], seconds["ours"]), wanted.get(name))
        for name in seconds
        if name != "ours"
    ]
    return [*rows, Row(f"{what}, ours, images/s", [len(files) / s for s in seconds["ours"]])]


def packing(what, files, rounds):
    """A row: how many images a second one core packs."""
    side, found = jpegs.packed_side(SIZE, LOOK.stored_size, SCALE), []
    for _ in range(rounds):
        start = time.perf_counter()
        for file in files:
            jpegs.pack_image(file, side)
        found.append(len(files) / (time.perf_counter() - start))
    return Row(f"packing {what}, images/s", found)


def argument_of_a_process():
    return "the process is one of two (this script starts them itself)"


def photographs(folder, number, width=500, height=375):
    """Bytes of so many JPEGs: of a folder, or made with details of several sizes."""
    if folder:
        found = sorted(Path(folder).rglob("*.jpg"))
        return [file.read_bytes() for file in found[:number]]
    rng, files = np.random.default_rng(0), []
    for _ in range(number):
        image = sum(
            np.asarray(
                Image.fromarray(
                    rng.integers(0, 256, (height // n, width // n, 3), np.uint8)
                ).resize((width, height), Image.Resampling.BICUBIC), np.float32,
            ) * share
            for n, share in ((60, 0.6), (12, 0.3), (3, 0.1))
        )  # fmt: skip
        file = io.BytesIO()
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


class Ours:
    """Batches as harness.data.batches.train_batches makes them."""

    def __init__(self, files, scale=SCALE):
        preprocessing = LOOK._replace(packed_side=jpegs.packed_side(SIZE, LOOK.stored_size, scale))
        features = datasets.Features({"image": datasets.Image()})
        cells = [{"bytes": file, "path": None} for file in files]
        dataset = datasets.Dataset.from_dict({"image": cells}, features=features)
        self.images = pack_split(dataset, "image", preprocessing, name="bench", progress=False)
        self.images._threads = 1
        self.views = Views(
            SIZE, MEAN, STD, augment="randaugment", padding=0, flip_prob=0.5, erasing=0.0, ops=2,
            magnitude=9, stored=LOOK.stored_size, crop_scale=scale, packed=True,
        )  # fmt: skip

    def crops(self, passes):
        """Read, decode, cut out and resize the images in these passes, whose draws differ."""
        every = torch.arange(len(self.images))
        for k in passes:
            for rows in every.split(BATCH):
                streams = SampleStreams(0, "views", k, places=rows)
                draw = self.views.draw(len(rows), streams, sizes=self.images.sizes(rows))
                self.images.crops(rows, draw["boxes"])

    def batches(self, first, last):
        for start in range(first, last, BATCH):
            rows = torch.arange(start, min(start + BATCH, last))
            streams = SampleStreams(0, "views", 0, places=rows)
            draw = self.views.draw(len(rows), streams, sizes=self.images.sizes(rows))
            self.views.train(self.images.crops(rows, draw["boxes"]), draw)


def peers(files):
    """{name: a function that makes the batches of all images}."""
    crop, policy = (SIZE, (SCALE, 1.0)), {"num_ops": 2, "magnitude": 9}
    one = v1.Compose([
        v1.RandomResizedCrop(*crop), v1.RandomHorizontalFlip(), v1.RandAugment(**policy),
        v1.ToTensor(), v1.Normalize(MEAN, STD),
    ])  # fmt: skip
    two = v2.Compose([
        v2.RandomResizedCrop(*crop, antialias=True), v2.RandomHorizontalFlip(),
        v2.RandAugment(**policy), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    timms = {
        name: create_transform(
            SIZE, is_training=True, auto_augment="rand-m9-n2", scale=(SCALE, 1.0), mean=MEAN,
            std=STD, use_prefetcher=prefetcher, interpolation="bilinear", color_jitter=None,
        )
        for name, prefetcher in (("timm", False), ("timm, prefetcher", True))
    }  # fmt: skip

    def by_pillow(transform, finish=lambda batch: batch):
        def run():
            for start in range(0, len(files), BATCH):
                rows = [
                    torch.as_tensor(transform(Image.open(io.BytesIO(file)).convert("RGB")))
                    for file in files[start : start + BATCH]
                ]
                finish(torch.stack(rows))

        return run

    def by_torchvision():
        buffers = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]

        def run():
            for start in range(0, len(files), BATCH):
                torch.stack([
                    two(tvio.decode_jpeg(buffer, tvio.ImageReadMode.RGB))
                    for buffer in buffers[start : start + BATCH]
                ])  # fmt: skip

        return run

    return {
        "v1, Pillow": by_pillow(one),
        "v2, torchvision.io": by_torchvision(),
        "timm": by_pillow(timms["timm"]),
        "timm, prefetcher": by_pillow(
            timms["timm, prefetcher"], lambda batch: normalize_batch(batch, MEAN, STD)
        ),
    }


def two_of_each(args, ours, files):
    """Seconds of two processes that each decode all images over those of two threads that do both.

    Only what the threads share: reading, decoding, cutting out and resizing.
    """
    command = [sys.executable, __file__, "--number", str(args.number)]
    command += ["--images", args.images] if args.images else []
    command += ["--quick"] if args.quick else []
    processes = [
        subprocess.Popen(
            [*command, "--half", str(half)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for half in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"

    def apart():
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout.readline() == "done\n"

    ours.images._threads = 2
    sides = {"processes": apart, "threads": lambda: ours.crops([0, 1])}
    seconds = seconds_in_turns(sides, 15 * args.rounds)  # of half a second each
    ours.images._threads = 1
    for process in processes:
        process.communicate()
    return over(seconds["processes"], seconds["threads"])


def decibels(files):
    """Of crops from 8 and from 35 %: dB from the same crops of the originals, an image a value."""
    rows = []
    for scale in (0.08, 0.35):
        side = jpegs.packed_side(SIZE, LOOK.stored_size, scale)
        copied, shrunk, squares = [], [], []
        for k, file in enumerate(files[:64]):
            whole = torch.from_numpy(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).copy())
            whole = whole.permute(2, 0, 1)
            data, width, height = jpegs.pack_image(file, side)
            rng = torch.Generator().manual_seed(k)
            box = draw_resized_crops(1, height, width, (scale, 1.0), generator=rng)[0].tolist()
            share = whole.shape[1] / height  # the same crop of the original
            original = [round(x * share) for x in box]
            expected = functional.resized_crop(whole, *original, [SIZE, SIZE], antialias=True)
            found = jpegs.decode_crop(data, width, height, box, SIZE)
            (copied if data is file else shrunk).append(_db(found, expected))
            stored = torch.from_numpy(decode_image(io.BytesIO(file), LOOK.stored_size))
            box = draw_resized_crops(1, *stored.shape[1:], (scale, 1.0), generator=rng)[0].tolist()
            share = min(whole.shape[1:]) / LOOK.stored_size
            edge = [(n - min(whole.shape[1:])) // 2 for n in whole.shape[1:]]
            original = [round(x * share) for x in box]
            original[0], original[1] = original[0] + edge[0], original[1] + edge[1]
            expected = functional.resized_crop(whole, *original, [SIZE, SIZE], antialias=True)
            found = functional.resized_crop(stored, *box, [SIZE, SIZE], antialias=True)
            squares.append(_db(found, expected))
        name = f"dB from the original, crops from {scale:.0%}"
        rows += [Row(f"{name}, packed, copied", copied, 45)] if copied else []
        rows += (
            [Row(f"{name}, packed, shrunk", shrunk, 40 if scale == 0.35 else None)]
            if shrunk
            else []
        )
        rows += [Row(f"{name}, decoded squares", squares)]
    return rows


def _db(a, b):
    error = (a.double() - b.double()).square().mean().clamp(min=0.01)  # 68 dB: equal
    return float(10 * torch.log10(255**2 / error))


if __name__ == "__main__":
    main()
