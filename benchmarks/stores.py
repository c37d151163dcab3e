"""What crops from the whole images are worth: fine-tuning from the packed and the decoded store.

    python benchmarks/stores.py --dataset FOLDER --model tf_efficientnet_lite0 --weights FOLDER
    python benchmarks/stores.py --show                  the table of what is there already

Every run is `accelerate launch finetune.py --strategy full --bn_mode eval`; runs that are there and
finished are not run again, and one that was killed goes on. table.md is written beside the runs
after each: accuracy of the last weights (mean and range over seeds) on the test images, or on val
where there are none. Whatever this script does not know goes to every finetune.py.
"""

import argparse
import json
import statistics
from itertools import product
from pathlib import Path

from measure import Row, json_flags, write_measurement
from training_runs import finish_run


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="flowers102")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128], help="pixels a side")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.35, 0.08])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/stores"))
    parser.add_argument("--show", action="store_true", help="run nothing")
    json_flags(parser)
    return parser.parse_known_args()


def main():
    args, others = parse_args()
    folder = args.output_dir.resolve()
    for seed, size, scale, store in product(
        args.seeds, args.sizes, args.scales, ("packed", "decoded")
    ):
        run = folder / f"{size}px-{scale:g}-{store}-seed{seed}"
        if not args.show and not (run / "summary.json").exists():
            words = ["--strategy=full", "--bn_mode=eval", f"--image_size={size}"]
            words += [f"--crop_scale={scale:g}", f"--pixels={store}", f"--seed={seed}"]
            words += [f"--dataset={args.dataset}", f"--model={args.model}"]
            words += [f"--epochs={args.epochs}", "--report_to=none", *others]
            finish_run("finetune.py", run, words)
            table(folder, args)
    print(table(folder, args))
    write_measurement(args, list(rows_of(folder, args)), f"flags of every run: {' '.join(others)}")


def accuracies(folder, size, scale, args):
    """{store: {seed: accuracy in %}} of the finished runs, and {seed: difference}."""
    found = {"packed": {}, "decoded": {}}
    for store, seed in product(found, args.seeds):
        file = folder / f"{size}px-{scale:g}-{store}-seed{seed}" / "summary.json"
        if file.exists():
            found[store][seed] = 100 * json.loads(file.read_text())["accuracy"]
    both = sorted(found["packed"].keys() & found["decoded"].keys())
    return found, {seed: found["packed"][seed] - found["decoded"][seed] for seed in both}


def table(folder, args):
    lines = ["| size | crops from | packed | decoded | difference |", "|---|---|---|---|---|"]
    for size, scale in product(args.sizes, args.scales):
        found, apart = accuracies(folder, size, scale, args)
        cells = [_spread(list(values.values())) for values in (*found.values(), apart)]
        lines.append(f"| {size} px | {scale:.0%} | {' | '.join(cells)} |")
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    (folder / "table.md").write_text(text + "\n")
    return text


def rows_of(folder, args):
    for size, scale in product(args.sizes, args.scales):
        found, apart = accuracies(folder, size, scale, args)
        cell = f"{Path(args.dataset).name}, {args.model}, {size} px, crops from {scale:.0%}"
        titles = {f"{store}: accuracy, %": values for store, values in found.items()}
        for title, values in (titles | {"packed minus decoded, points": apart}).items():
            if values:
                yield Row(f"{cell}, {title}", list(values.values()), mean=True, digits=1)


def _spread(values):
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.1f} ({low:.1f} to {high:.1f}), n = {len(values)}"


if __name__ == "__main__":
    main()
