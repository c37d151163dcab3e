"""recipes/cifar10_fast.yaml against airbench94 on the same machine, in turns.

    git clone https://github.com/KellerJordan/cifar10-airbench PATH
    python benchmarks/fast.py --airbench PATH/airbench94_muon.py --data FOLDER
    python benchmarks/fast.py --airbench PATH/airbench94_muon.py --data FOLDER --full

The peer's file is run as it is on a GPU. Without one, the words in it that ask for CUDA, half
precision and compilation are taken out (fp32, channels_last), nothing else. Both train on the same
images in batches of 2,000, the peer for 200 steps, ours for 225.

Without --full, ours trains a run of --steps steps, whose image sizes grow as in the whole run, and
the peer a third as many, which are all alike, each after one that warms up (ours the smallest, so
the others weigh more). The ratio of their means, times 225 / 200, is that of the whole trainings
without the evaluation (six views of the test images), which is alike. With --full
both train to the end: seconds as each reports them, and the accuracies with six views.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from measure import ROOT, Row, data_flag, over, parser, read, report
from processes import by_accelerate, launch

from harness.data.cache import decode_split
from harness.data.sources import load_data

ON_GPU = torch.cuda.is_available()
RECIPE = ROOT / "recipes" / "cifar10_fast.yaml"
PEERS_STEPS = 200  # 8 epochs of 25
# What has to go from the file for a machine without CUDA
CUDA_WORDS = {
    '"cuda"': '"cpu"',
    ".cuda()": "",
    ".half()": ".float()",
    "G.bfloat16()": "G.clone()",
    "@torch.compile\n": "",
    'model.compile(mode="max-autotune")': "",
    "fused=True": "fused=None",
    "torch.cuda.Event(enable_timing=True)": "Clock()",
    "torch.cuda.synchronize()": "None",
}


class Clock:
    """A CUDA event, where there is none: when it was recorded, and milliseconds to another."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Clock") -> float:
        return 1e3 * (other.at - self.at)


def stored_images(data: str, folder: Path) -> None:
    """Write the two files that airbench reads instead of downloading the images."""
    loaded = load_data(data)
    folder.mkdir()
    for role in ("train", "test"):
        split = getattr(loaded, role)
        pixels = decode_split(split.dataset, loaded.image_column, 32, name=split.name)
        images = pixels[torch.from_numpy(split.rows)].permute(0, 2, 3, 1).contiguous()
        stored = {
            "images": images, "labels": torch.from_numpy(split.labels), "classes": loaded.classes,
        }  # fmt: skip
        torch.save(stored, folder / f"{role}.pt")


class Enough(Exception):
    pass


def run_airbench(file: str, steps: int | None) -> dict:
    """In a process of its own, in the folder that holds cifar10/: the time, and the accuracy.

    steps: seconds of each so many steps after the first one; None: train to the end.
    """
    text = Path(file).read_text()
    if not ON_GPU:
        for word, instead in CUDA_WORDS.items():
            if word not in text:
                sys.exit(f"{file} is not the airbench94_muon.py that this script knows: no {word}")
            text = text.replace(word, instead)
    names = {"__name__": "airbench", "Clock": Clock}
    sys.argv = [file]
    exec(compile(text, file, "exec"), names)
    model = names["CifarNet"]().to("cuda" if ON_GPU else "cpu", memory_format=torch.channels_last)
    if ON_GPU:
        model.compile(mode="max-autotune")
        names["main"]("warmup", model)
    stamps, step = [], names["Muon"].step

    def timed(optimizer):
        step(optimizer)
        stamps.append(time.perf_counter())
        if steps and len(stamps) > steps:
            raise Enough

    names["Muon"].step = timed
    seconds = []  # as it prints them at the end of a run
    names["print_training_details"] = lambda variables, is_final_entry: seconds.append(
        variables["time_seconds"]
    )
    try:
        accuracy = names["main"](0, model)
    except Enough:
        return {"seconds": (stamps[-1] - stamps[0]) / steps}
    return {"seconds": seconds[-1], "accuracy": accuracy}


def airbench(args: argparse.Namespace, folder: str) -> dict:
    words = [sys.executable, str(Path(__file__).resolve()), "--airbench", args.airbench, "--peer"]
    words += [] if args.full else ["--steps", str(max(args.steps // 3, 2))]
    run = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(words)}\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def ours(args: argparse.Namespace, data: str, cache: str) -> dict:
    flags = {"config": RECIPE, "dataset": data}
    if not args.full:
        flags |= {"max_steps": args.steps, "logging_steps": 1, "max_eval_samples": 100}
    with tempfile.TemporaryDirectory() as output_dir:
        seconds, folder, _ = launch(flags, output_dir, cache, by_accelerate())
        summary = json.loads((folder / "summary.json").read_text())
    if args.full:
        return {"seconds": summary["seconds"], "accuracy": summary["scores"]["test/acc_tta"]}
    # The first step's own time: it and the others begin when the one before is done
    per_step = (seconds[args.steps] - seconds[1]) / (args.steps - 1)
    return {"seconds": per_step}


def main() -> None:
    arg_parser = parser(__doc__, rounds=3)
    data_flag(arg_parser)
    arg_parser.add_argument("--airbench", required=True, help="airbench94_muon.py of a clone")
    arg_parser.add_argument("--steps", type=int, default=200 if ON_GPU else 12, help="of ours")
    arg_parser.add_argument(
        "--full", action="store_true", help="train to the end, and compare accuracies"
    )
    arg_parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = read(arg_parser)
    if args.peer:
        print(json.dumps(run_airbench(args.airbench, None if args.full else args.steps)))
        return
    if not args.data:
        arg_parser.error("--data is needed: noise teaches nothing")
    args.airbench, data = str(Path(args.airbench).resolve()), str(Path(args.data).resolve())
    args.steps = 5 if args.quick else args.steps
    results = {"ours": [], "airbench94": []}
    with tempfile.TemporaryDirectory() as folder:
        stored_images(data, Path(folder) / "cifar10")
        cache = str(Path(folder) / "cache")
        for number in range(args.rounds):
            sides = {
                "ours": lambda: ours(args, data, cache),
                "airbench94": lambda: airbench(args, folder),
            }
            for name in list(sides) if number % 2 else reversed(sides):
                results[name].append(sides[name]())
                print(f"round {number + 1}, {name}: {results[name][-1]}", file=sys.stderr)
    seconds = {name: [r["seconds"] for r in runs] for name, runs in results.items()}
    what = "training and six views" if args.full else "a step"
    ratios, wanted = over(*seconds.values()), 1.5 if ON_GPU else 0.8
    if args.full:
        rows = [Row(f"{what}: ours / airbench94", ratios, wanted, at_most=True)]
    else:
        steps = yaml.safe_load(RECIPE.read_text())["epochs"] * 25
        whole = [ratio * steps / PEERS_STEPS for ratio in ratios]
        rows = [
            Row("a step: ours / airbench94", ratios),
            Row(
                f"{steps} of our steps / {PEERS_STEPS} of airbench94's", whole, wanted, at_most=True
            ),
        ]
    rows += [Row(f"{what}, {name}, s", values) for name, values in seconds.items()]
    if args.full:
        rows += [
            Row(f"accuracy with six views, {name}, %", [100 * r["accuracy"] for r in runs])
            for name, runs in results.items()
        ]
    report(
        args,
        rows,
        f"`recipes/cifar10_fast.yaml`, {'to the end' if args.full else f'{args.steps} steps'}",
    )


if __name__ == "__main__":
    main()
