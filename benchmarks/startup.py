"""How long a start takes: decoding CIFAR-10 once, reaching the first step after that, --help.

    python benchmarks/startup.py            minutes on two cores
    python benchmarks/startup.py --quick    600 images, once: does it run?

- decode: a process with an empty cache folder, from before `load_data` to after `decode_split` of
  train and test, 60,000 PNG files in parquet as on the Hub; imports are not in it.
- start: train.py with those images already decoded, from before its process (or the launcher's) is
  made to the line that train.py adds to metrics.jsonl after its first optimizer step
  (--logging_steps 1), all imports included, nothing subtracted. The run is that of all the
  defaults, ended by --stop_after 1. The first one, which writes Python's bytecode and fills the
  disk cache, is not counted.
- against: plain_script.py, started in the same way, from before its process is made to the line
  that it prints after its first step. It has its images as arrays, which takes least, or as rows of
  a `datasets` data set in its cache.
- a bare step: torch and torchvision imported, the network built, one step on a synthetic batch in
  fp32 (train_speed.py's bare loop): what no script on them can be faster than.
- help: `python train.py --help`, from before its process is made to its end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from measure import ROOT, Row, data_flag, over, parser, read, report
from processes import (
    PIXELS,
    by_accelerate,
    environment,
    launch,
    run_json,
    smooth_noise,
    write_folder,
)

from harness.data.cache import decode_split
from harness.data.sources import load_data

SIZES = {"train": 50_000, "test": 10_000}

BARE = """
import torch
from train_speed import bare
bare(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"), "no")()
print("step", flush=True)
"""


def parse_args() -> argparse.Namespace:
    arg_parser = parser(__doc__, rounds=3)
    data_flag(arg_parser)
    arg_parser.add_argument("--decodes", type=int, default=2, help="times that all is decoded")
    arg_parser.add_argument("--decode", metavar="FOLDER", help="that alone, as a round runs it")
    args = read(arg_parser)
    if args.quick:
        args.decodes = 1
    return args


def read_images(source: str, count: int, split: str):
    """(uint8 (count, 3, 32, 32), labels 0..9) of the folder `source`, or noise without one."""
    if not source:
        return smooth_noise(count), torch.arange(count) % 10
    data = load_data(source)
    stored = getattr(data, split)
    pixels = decode_split(stored.dataset, data.image_column, PIXELS, name=split, progress=False)
    return pixels[:count], torch.as_tensor(stored.labels[:count])


def decode(folder: str) -> dict:
    """Seconds that the first start spends on finding the data and on decoding it."""
    start = time.perf_counter()
    data = load_data(folder)
    found = time.perf_counter()
    for split in (data.train, data.test):
        size = data.image_size
        decode_split(split.dataset, data.image_column, size, name=split.name, progress=False)
    return {"load": found - start, "decode": time.perf_counter() - found}


def start_ours(folder: str, cache: str, launcher: list[str], tracker: str = "none") -> float:
    flags = {"dataset": folder, "logging_steps": 1, "stop_after": 1, "report_to": tracker}
    with tempfile.TemporaryDirectory() as output_dir:
        return launch(flags, output_dir, cache, launcher)[0][1]


def start_plain(images: list, cache: str, launcher: list[str]) -> float:
    """Seconds until the usual script says what the loss of its first step was."""
    script = str(ROOT / "benchmarks" / "plain_script.py")
    return seconds_until("loss ", [*launcher, script, *images, "--steps", "1"], cache)


def seconds_until(word: str, command: list[str], cache: str) -> float:
    """Seconds until the command prints a line that begins with the word."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, cwd=ROOT / "benchmarks",
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith(word):
                taken = time.perf_counter() - start
                break
        else:
            sys.exit(f"{' '.join(command)} made no step")
        process.stdout.read()
    return taken


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
    sizes = {split: int(size * (0.01 if args.quick else 1)) for split, size in SIZES.items()}
    config = "single_gpu.yaml" if torch.cuda.is_available() else "cpu.yaml"
    accelerate, python = by_accelerate(config), [sys.executable]
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("HF_DATASETS_CACHE", f"{temporary}/own")
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        folder = f"{temporary}/cifar10"
        splits = {s: read_images(args.data, count, s) for s, count in sizes.items()}
        write_folder(folder, splits)
        pixels, labels = splits["train"]
        np.save(f"{temporary}/pixels.npy", np.ascontiguousarray(pixels.permute(0, 2, 3, 1)))
        np.save(f"{temporary}/labels.npy", np.asarray(labels))
        arrays = ["--pixels", f"{temporary}/pixels.npy", "--labels", f"{temporary}/labels.npy"]
        rows_of = ["--dataset", folder]
        caches = [f"{temporary}/cache{k}" for k in range(args.decodes)]
        command = [sys.executable, __file__, "--decode", folder]
        decodes = [run_json(command, cache) for cache in caches]
        cache = caches[-1]
        sides = {
            "ours": lambda: start_ours(folder, cache, accelerate),
            "ours, wandb": lambda: start_ours(folder, cache, accelerate, "wandb"),
            "plain": lambda: start_plain(arrays, cache, accelerate),
            "ours by python": lambda: start_ours(folder, cache, python),
            "plain by python": lambda: start_plain(arrays, cache, python),
            "bare by python": lambda: seconds_until("step", [sys.executable, "-c", BARE], cache),
            "rows by python": lambda: start_plain(rows_of, cache, python),
        }
        taken = {side: [] for side in sides}
        for done in range(args.rounds if args.quick else args.rounds + 1):
            for side, start in sides.items():
                seconds = start()
                if done or args.quick:  # the first writes bytecode and fills caches
                    taken[side].append(seconds)
    helps = [time_help() for _ in range(args.rounds + 1)][1:]

    whole = [sum(d.values()) for d in decodes]
    second = "second start to first step"
    rows = [
        Row(f"{second}, accelerate launch: train.py / usual script, images as arrays",
            over(taken["ours"], taken["plain"]), 0.7, at_most=True),
        Row(f"{second}, python: train.py / usual script, images as arrays",
            over(taken["ours by python"], taken["plain by python"]), 0.7, at_most=True),
        Row(f"{second}, python: train.py / usual script, `datasets` rows",
            over(taken["ours by python"], taken["rows by python"]), 0.7, at_most=True),
        Row(f"{second}, python: a bare step / usual script, images as arrays",
            over(taken["bare by python"], taken["plain by python"])),
        Row(f"{second}, --report_to none, s", taken["ours"], 12, at_most=True),
        Row(f"{second}, --report_to wandb, s", taken["ours, wandb"], 12, at_most=True),
        Row(f"{sum(sizes.values()):,} images found and decoded once, s", whole, 30, at_most=True),
        Row("decoding alone, of the same images, s", [d["decode"] for d in decodes]),
        Row("train.py --help, s", helps, 1.5, at_most=True),
    ]  # fmt: skip
    report(args, rows, f"images: {args.data or 'smooth noise'}")


if __name__ == "__main__":
    main()
