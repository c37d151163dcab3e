"""What keeping features is worth: finetune.py's feature extraction against recomputing them.

    python benchmarks/cached_features.py --dataset FOLDER --model resnet18 --weights runs/x

Both sides are `accelerate launch finetune.py --strategy feature_extraction`, ours with its default
--views, the plain way with --views 0 (the network runs anew for every batch), in turns, a seed a
round. Whatever this script does not know goes to both.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, Row, parser, report

SIDES = {"kept": [], "plain": ["--views=0"]}


def parse_args():
    arg_parser = parser(__doc__, rounds=5)
    arg_parser.add_argument("--epochs", type=int, default=10)
    args, passed_on = arg_parser.parse_known_args()
    if args.quick:
        args.rounds, args.epochs = 1, 2
    return args, passed_on


def run(side, seed, epochs, passed_on, folder):
    """The summary of one run."""
    name = f"{side}-{seed}"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1",
        str(ROOT / "finetune.py"), "--strategy=feature_extraction", "--report_to=none",
        *passed_on, f"--epochs={epochs}", f"--seed={seed}", f"--output_dir={folder}",
        f"--run_name={name}", *SIDES[side],
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}")
    return json.loads((Path(folder) / name / "summary.json").read_text())


def main():
    args, passed_on = parse_args()
    found = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        run("plain", 0, 1, passed_on, folder)  # decodes the images and warms the disk; not counted
        for seed in range(1, args.rounds + 1):
            for side in SIDES:
                found[side].append(run(side, seed, args.epochs, passed_on, folder))
                last = found[side][-1]
                print(f"seed {seed} {side}: {last['accuracy']:.2%}, {last['seconds']:.1f} s",
                      file=sys.stderr)  # fmt: skip
    pairs = list(zip(found["kept"], found["plain"], strict=True))
    epoch = [kept["images_per_second"] / plain["images_per_second"] for kept, plain in pairs]
    total = [plain["seconds"] / kept["seconds"] for kept, plain in pairs]
    rows = [
        Row("an epoch of the head, recomputed / kept", epoch, 20),
        Row("training time, recomputed / kept with the extraction", total, 5),
    ]
    for side, runs in found.items():
        values = [100 * run["accuracy"] for run in runs]
        rows.append(Row(f"test accuracy, {side}, %", values, mean=True, digits=2))
    report(args, rows, f"{' '.join(passed_on)}; {args.epochs} epochs")


if __name__ == "__main__":
    main()
