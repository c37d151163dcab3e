"""What transfer learning is worth: feature extraction, staged, full, and from scratch, over seeds.

    python benchmarks/transfer.py                       Flowers102, ResNet-50, three seeds (a GPU)
    python benchmarks/transfer.py --dataset FOLDER --model resnet18 --weights runs/x --sizes 64 128
                                                        runs/x: trained with --stem standard
    python benchmarks/transfer.py --show                the table of what is there already

Every row is `accelerate launch finetune.py` with one strategy and the seeds; runs that are there
and finished are not run again. table.md and transfer.png are written beside the runs after each.
Whatever this script does not know goes to every finetune.py: `--batch_size 64`, say.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

from training_runs import finish_run

# The three stages of recipes/flowers102_resnet50.yaml, every rate times ten: those are made for
# ImageNet's features, and others may have further to go
TENFOLD = [
    {"name": "head", "epochs": 5, "train": {"head": 1e-2}},
    {"name": "layer4, head", "epochs": 10, "train": {"layer4": 1e-3, "head": 1e-2}},
    {
        "name": "everything",
        "epochs": 15,
        "train": {
            "conv1": 1e-5, "bn1": 1e-5, "layer1": 1e-4, "layer2": 1e-4, "layer3": 5e-4,
            "layer4": 1e-3, "head": 5e-3,
        },
    },
]  # fmt: skip
STRATEGIES = {
    "feature extraction": ["--strategy=feature_extraction"],
    "staged": ["--strategy=staged"],
    "staged, rates × 10": ["--strategy=staged", f"--stages={json.dumps(TENFOLD)}"],
    "full": ["--strategy=full"],
    # All layers at one rate, as nothing in it is worth preserving
    "from scratch": ["--strategy=full", "--weights=none", "--layer_decay=1", "--lr=1e-3"],
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="flowers102")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="default", help="of all rows but the last")
    parser.add_argument("--stem", default="standard")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="pixels a side")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--epochs", type=int, default=30, help="of every row")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--config_file", help="of the launcher; unset: one process on all there is")
    parser.add_argument("--show", action="store_true", help="run nothing")
    return parser.parse_known_args()


def main():
    args, passed_on = parse_args()
    if not args.model.startswith(("resnet", "resnext", "wide_resnet")):
        del STRATEGIES["staged, rates × 10"]  # its stages are ResNet's
    plan = [(size, s, n) for n in args.seeds for size in args.sizes for s in STRATEGIES]
    for count, (size, strategy, seed) in enumerate(plan, start=1):
        folder = args.output_dir / run_name(size, strategy, seed)
        if args.show or (folder / "summary.json").exists():
            continue
        print(f"{count} of {len(plan)}: {folder.name}", flush=True)
        words = [
            f"--dataset={args.dataset}", f"--model={args.model}", f"--weights={args.weights}",
            f"--stem={args.stem}", f"--image_size={size}", f"--seed={seed}",
            f"--epochs={args.epochs}", "--group=transfer", *STRATEGIES[strategy], *passed_on,
        ]  # fmt: skip
        finish_run("finetune.py", folder, words, args.config_file)
        show(args)
    show(args)


def run_name(size, strategy, seed):
    return f"{re.sub('[^a-z0-9]+', '_', strategy)}-{size}px-s{seed}"


def show(args):
    """Write and print the table of the runs that are finished, and draw it."""
    rows = []
    for size in args.sizes:
        for strategy in STRATEGIES:
            files = [
                args.output_dir / run_name(size, strategy, seed) / "summary.json"
                for seed in args.seeds
            ]
            done = [read(file, args) for file in files if file.exists()]
            if done:
                rows.append((size, strategy, done))
    if not rows:
        return
    splits = rows[0][2][0]["data"]["splits"]
    sizes = ", ".join(f"{count:,} {name}" for name, count in splits.items())
    lines = [
        f"{args.model}, {Path(args.dataset).name} ({sizes}), {args.epochs} epochs, "
        f"weights {Path(args.weights).name}",
        "",
        "| pixels | strategy | test accuracy, mean ± s.d. (n) | trained parameters | time, s |",
        "|---|---|---|---|---|",
    ]
    for size, strategy, done in rows:
        trained = statistics.median(run["trained_parameters"] for run in done)
        seconds = statistics.median(run["seconds"] for run in done)
        lines.append(
            f"| {size} | {strategy} | {words(accuracies(done))} | {trained:,.0f} | {seconds:,.0f} |"
        )
    text = "\n".join(lines)
    (args.output_dir / "table.md").write_text(text + "\n")
    print(text, flush=True)
    draw(args.output_dir / "transfer.png", rows, f"{lines[0]}")


def read(file, args):
    """A finished run's summary; the script ends where it is another experiment's."""
    summary = json.loads(file.read_text())
    flags = json.loads((file.parent / "config.json").read_text())["flags"]
    for name in ("dataset", "model", "epochs"):
        if flags[name] != getattr(args, name):
            sys.exit(
                f"{file.parent} was run with {name} {flags[name]}: choose another --output_dir"
            )
    if summary["split"] != "test":
        sys.exit(f"{file.parent} has no test accuracy: {args.dataset} needs a test split")
    return summary


def accuracies(done):
    return [100 * run["accuracy"] for run in done]


def deviation(values):
    return statistics.stdev(values) if len(values) > 1 else math.nan


def words(values):
    return f"{statistics.mean(values):.1f} ± {deviation(values):.1f} % ({len(values)})"


def draw(path, rows, title):
    """A panel a size: mean, s.d. and every run."""
    import textwrap

    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(size for size, _, _ in rows))
    figure = Figure(figsize=(9, 1.2 + 1.9 * len(sizes)), dpi=110, layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 90)), fontsize=10)
    axes = figure.subplots(len(sizes), 1, sharex=True, squeeze=False)[:, 0]
    for ax, size in zip(axes, sizes, strict=True):
        mine = [(name, accuracies(done)) for s, name, done in rows if s == size][::-1]
        for y, (_, values) in enumerate(mine):
            mean = statistics.mean(values)
            spread = deviation(values) if len(values) > 1 else 0
            ax.barh(y, mean, xerr=spread, height=0.6, color="#0072B2", alpha=0.35, capsize=4)
            ax.plot(values, [y] * len(values), "o", color="#0072B2", markersize=4)
            ax.text(1, y, f"{mean:.1f} ", va="center", color="#333333")
        ax.set_yticks(range(len(mine)), [name for name, _ in mine])
        ax.set_title(f"{size} px", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("test accuracy in %: every run, their mean, ± one standard deviation")
    figure.savefig(path)


if __name__ == "__main__":
    main()
