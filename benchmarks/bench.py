"""All benchmarks, each a process of its own, and one table of what they found.

    make bench                       or with DATA=folder, QUICK=1
    python benchmarks/bench.py --only ema mix
    python benchmarks/bench.py --data FOLDER --json         a results file for each part

Each part prints its own report as it ends; the table of all figures is printed at the end. A part
that fails is named there, and the exit status is then 1. The images of --data (a folder of parquet
files in the Hub's layout, as of CIFAR-10) are decoded once for all parts, in a temporary cache.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results
from measure import ROOT, machine

# part: (its flags, whether it takes --data)
PARTS = {
    "augment": (["--rounds", "4"], True),
    "input_epoch": (["--rounds", "3", "--max_images", "10000"], True),
    "train_speed": (["--rounds", "3", "--steps", "10"], True),
    "listing": ([], False),
    "photos": ([], False),
    "ema": ([], False),
    "bookkeeping": ([], False),
    "draws": ([], False),
    "mix": ([], False),
    "gradcam": (["--rounds", "5"], False),
    "ensemble": (["--rounds", "3", "--max_eval_samples", "1000"], True),
    "cached_features": (["--rounds", "3"], False),
    "checkpoint": ([], False),
    "resume": (["--rounds", "3"], True),
    "startup": ([], True),
    "where_time_goes": (["--phases"], True),
}
# Feature extraction takes the flags of finetune.py: digits are at hand, weights need not be
FEATURES = ["--dataset=digits", "--model=resnet18", "--weights=none", "--image_size=64"]
FEATURES += ["--max_train_samples=600", "--max_eval_samples=100"]


def main():
    arg_parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg_parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                      help=f"some of: {', '.join(PARTS)}")  # fmt: skip
    arg_parser.add_argument("--data", default="", help="folder of images; unset: smooth noise")
    arg_parser.add_argument("--quick", action="store_true", help="does everything run?")
    arg_parser.add_argument("--json", nargs="?", const=str(results.FOLDER), metavar="FOLDER",
                      help="of the results files; without FOLDER benchmarks/results")  # fmt: skip
    args = arg_parser.parse_args()
    if args.json and args.quick and Path(args.json).resolve() == results.FOLDER:
        arg_parser.error("--quick --json wants another FOLDER: its figures mean nothing")
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as temporary:
        cache = os.environ.get("HF_DATASETS_CACHE", f"{temporary}/cache")
        environment = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        for part in args.only:
            flags, takes_data = PARTS[part]
            written = Path(temporary) / part
            written.mkdir()
            command = [sys.executable, str(ROOT / "benchmarks" / f"{part}.py")]
            command += ["--json", str(written)]
            command += ["--quick"] if args.quick else flags
            command += ["--data", args.data] if args.data and takes_data else []
            command += FEATURES if part == "cached_features" else []
            print(f"\n## {part}\n", flush=True)
            start = time.time()
            status = subprocess.run(command, env=environment).returncode
            print(f"\n({time.time() - start:.0f} s)", flush=True)
            if status:
                failed.append(part)
            else:
                (file,) = written.glob("*.json")
                rows += results.read(written)[0]["rows"]
                if args.json:
                    Path(args.json).mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, args.json)
    print(f"\n## All\n\n{machine()}\n\n{results.table(rows)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
