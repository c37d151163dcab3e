"""How long a start takes: decoding CIFAR-10 once, reaching the first step after that, --help.

    python benchmarks/startup.py            about 5 minutes on two cores
    python benchmarks/startup.py --quick    600 images, once: does it run?

- decode: a process with an empty cache folder, from before `load_data` to after `decode_split` of
  train and test, 60,000 PNG files in parquet as on the Hub; imports are not in it.
- start: `accelerate launch train.py` with those images already decoded, from before the launcher's
  process is made to the line that train.py adds to metrics.jsonl after its first optimizer step
  (--logging_steps 1), imports of launcher and script included, nothing subtracted. The run is that
  of all the defaults, ended by --stop_after 1. The first one, which writes Python's bytecode and
  fills the disk cache, is not counted.
- help: `python train.py --help`, from before its process is made to its end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from train_speed import (
    PIXELS,
    ROOT,
    environment,
    launch,
    machine,
    smooth_noise,
    spread,
    write_folder,
)

from harness.data import load_data
from harness.pixels import decode_split

SIZES = {"train": 50_000, "test": 10_000}
TRACKERS = ("none", "wandb")  # the default, offline so that no network is in the figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="folder of images; unset: smooth noise")
    parser.add_argument("--rounds", type=int, default=5, help="times each figure is measured")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--decode", metavar="FOLDER", help="that alone, as a round runs it")
    return parser.parse_args()


def read_images(source: str, count: int, split: str):
    """(uint8 (count, 3, 32, 32), labels 0..9) of the folder `source`, or noise without one."""
    if not source:
        return smooth_noise(count), torch.arange(count) % 10
    data = load_data(source)
    stored = getattr(data, split)
    pixels = decode_split(stored.dataset, data.image_column, PIXELS, name=split, progress=False)
    return pixels[:count], stored.labels[:count]


def decode(folder: str) -> dict:
    """Seconds that the first start spends on finding the data and on decoding it."""
    start = time.perf_counter()
    data = load_data(folder)
    found = time.perf_counter()
    for split in (data.train, data.test):
        size = data.image_size
        decode_split(split.dataset, data.image_column, size, name=split.name, progress=False)
    return {"load": found - start, "decode": time.perf_counter() - found}


def time_decode(folder: str, cache: str) -> dict:
    command = [sys.executable, __file__, "--decode", folder]
    done = subprocess.run(command, env=environment(cache), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def time_start(folder: str, cache: str, tracker: str) -> float:
    flags = {"dataset": folder, "logging_steps": 1, "stop_after": 1, "report_to": tracker}
    config = "single_gpu.yaml" if torch.cuda.is_available() else "cpu.yaml"
    with tempfile.TemporaryDirectory() as output_dir:
        return launch(flags, output_dir, cache, config)[0][1]


def time_help() -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, ROOT / "train.py", "--help"], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def main() -> None:
    args = parse_args()
    if args.decode:
        print(json.dumps(decode(args.decode)))
        return
    rounds, share = (1, 0.01) if args.quick else (args.rounds, 1)
    sizes = {split: int(size * share) for split, size in SIZES.items()}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_DATASETS_CACHE"] = f"{temporary}/own"
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        folder = f"{temporary}/cifar10"
        splits = {s: read_images(args.data, count, s) for s, count in sizes.items()}
        write_folder(folder, splits)
        caches = [f"{temporary}/cache{k}" for k in range(rounds)]
        decodes = [time_decode(folder, cache) for cache in caches]
        time_start(folder, caches[-1], "none")
        starts = {t: [] for t in TRACKERS}
        for _ in range(rounds):
            for tracker, seconds in starts.items():
                seconds.append(time_start(folder, caches[-1], tracker))
    helps = [time_help() for _ in range(rounds + 1)][1:]

    print(machine())
    print("\n| figure | seconds, median (min–max) | n |\n|---|---|---|")
    count = f"{sum(sizes.values()):,} images"
    print(f"| {count}: found and decoded once | {spread([sum(d.values()) for d in decodes], 1)} |")
    print(f"| of which decoding | {spread([d['decode'] for d in decodes], 1)} |")
    for tracker, seconds in starts.items():
        print(f"| second start to first step, --report_to {tracker} | {spread(seconds, 1)} |")
    print(f"| train.py --help | {spread(helps, 2)} |")


if __name__ == "__main__":
    main()
