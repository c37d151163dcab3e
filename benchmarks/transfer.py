"""Fine-tuning over networks, sizes, epochs, strategies and seeds, every cell a run of finetune.py.

    python benchmarks/transfer.py                       Flowers102, ResNet-50, three seeds (a GPU)
    python benchmarks/transfer.py --dataset FOLDER --model tf_efficientnet_lite0 --weights FOLDER \
        --sizes 64 128 --epochs 3 10 --strategies full:bn_mode=eval full:bn_mode=train \
        --val_fraction 0.2 --test_split none            to choose by: the test images are not read
    python benchmarks/transfer.py --show                the table of what is there already

A strategy is a --strategy of finetune.py, with flags of its own after a colon. Runs that are there
and finished are not run again, one that was killed goes on. Beside the runs lie results.json (a
record a run), table.md (a row a cell; empty where none of its runs is finished) and transfer.png.
Whatever this script does not know goes to every finetune.py: `--batch_size 64`, say. Only the last
weights are scored. Several data sets or networks share a folder.
"""

import argparse
import hashlib
import json
import re
import statistics
from itertools import product
from pathlib import Path

from measure import Row, json_flags, write_measurement
from training_runs import finish_run

# All layers at one rate, as nothing in it is worth preserving
FROM_SCRATCH = "full:weights=none,layer_decay=1,lr=1e-3"
STRATEGIES = ["feature_extraction", "staged", "full", "auto", FROM_SCRATCH]
CELL = ("dataset", "model", "size", "epochs", "strategy")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="flowers102")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="pixels a side")
    parser.add_argument("--epochs", type=int, nargs="+", default=[30])
    parser.add_argument(
        "--strategies", nargs="+", default=STRATEGIES, metavar="NAME[:FLAG=VALUE,…]"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--config_file", help="of the launcher; unset: one process on all there is")
    parser.add_argument("--show", action="store_true", help="run nothing")
    json_flags(parser)
    args, passed_on = parser.parse_known_args()
    args.output_dir = args.output_dir.resolve()
    return args, passed_on


def main():
    args, passed_on = parse_args()
    name = Path(args.dataset).name
    # seeds outermost, so that a table of all cells is there early
    cells = [
        {"dataset": name, "model": args.model, "size": size, "epochs": epochs, "strategy": strategy}
        for epochs, size, strategy in product(args.epochs, args.sizes, args.strategies)
    ]
    wanted = [{**cell, "seed": seed} for seed, cell in product(args.seeds, cells)]
    for count, record in enumerate(wanted, start=1):
        folder = args.output_dir / run_name(record)
        finished = (folder / "summary.json").exists()
        if not (finished or args.show):
            print(f"{count} of {len(wanted)}: {folder.name}", flush=True)
            finish_run("finetune.py", folder, flags_of(record, args, passed_on), args.config_file)
        if (folder / "summary.json").exists():
            (folder / "cell.json").write_text(json.dumps(record))
        if not (finished or args.show):
            show(args.output_dir, cells)
    print(show(args.output_dir, cells))
    rows = rows_of({cell: runs for cell, runs in by_cell(args.output_dir, cells).items() if runs})
    write_measurement(args, rows, f"flags of every run: {' '.join(passed_on) or 'none'}")


def run_name(record):
    """Readable, and another for every record: the hash is of the strategy's flags."""
    words = [*map(str, (record[key] for key in CELL)), f"s{record['seed']}"]
    flags = hashlib.blake2b(record["strategy"].encode(), digest_size=3).hexdigest()
    words[4] = f"{record['strategy'].partition(':')[0]}_{flags}"
    return re.sub("[^A-Za-z0-9_.]+", "-", "-".join(words))


def flags_of(record, args, passed_on):
    strategy, _, own = record["strategy"].partition(":")
    return [
        f"--dataset={args.dataset}", f"--model={args.model}", f"--weights={args.weights}",
        f"--image_size={record['size']}", f"--epochs={record['epochs']}",
        f"--eval_epochs={record['epochs']}", f"--seed={record['seed']}", f"--strategy={strategy}",
        "--group=transfer", "--checkpointing_steps=1000000", *passed_on,
        *(f"--{flag}" for flag in own.split(",") if flag),
    ]  # fmt: skip


def show(output_dir, cells):
    """Write results.json, table.md and transfer.png of the finished runs, `cells` and others'."""
    output_dir.mkdir(parents=True, exist_ok=True)
    rows = by_cell(output_dir, cells)
    records = [record for done in rows.values() for record in done]
    (output_dir / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    lines = [
        "| images | network | pixels | epochs | strategy | accuracy, mean (min–max), n | of | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, done in sorted(rows.items(), key=lambda row: [*map(str, row[0][:2]), *row[0][2:4]]):
        facts = ["", "", ""]
        if done:
            seconds = statistics.median(run["seconds"] for run in done)
            facts = [in_words(done), done[0]["split"], f"{seconds:,.0f}"]
        lines.append(f"| {' | '.join(map(str, cell))} | {' | '.join(facts)} |")
    text = "\n".join(lines)
    (output_dir / "table.md").write_text(text + "\n")
    draw(output_dir / "transfer.png", {cell: done for cell, done in rows.items() if done})
    return text


def by_cell(output_dir, cells):
    """{cell: the records of its finished runs}, of `cells` and of others that are there."""
    rows = {tuple(cell[key] for key in CELL): [] for cell in cells}
    for file in sorted(output_dir.glob("*/cell.json")):
        result = read(file)
        rows.setdefault(tuple(result[key] for key in CELL), []).append(result)
    return rows


def rows_of(cells):
    for (dataset, model, size, epochs, strategy), done in cells.items():
        cell = f"{dataset}, {model}, {size} px, {epochs} epochs, {strategy}"
        yield Row(f"{cell}: {done[0]['split']} accuracy, %", accuracies(done), mean=True, digits=1)
        yield Row(f"{cell}: training, s", [run["seconds"] for run in done])


def read(file):
    """One finished run, as it stands in results.json."""
    summary = json.loads((file.parent / "summary.json").read_text())
    facts = {key: summary[key] for key in ("split", "accuracy", "seconds", "trained_parameters")}
    return json.loads(file.read_text()) | facts | {"chosen": summary["strategy"]}


def in_words(done):
    values = accuracies(done)
    return f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f}), {len(values)}"


def accuracies(done):
    return [100 * run["accuracy"] for run in done]


def draw(path, rows):
    """A panel for each images, network, size and number of epochs: mean, range and every run."""
    from matplotlib.figure import Figure

    panels = {}
    for cell, done in rows.items():
        panels.setdefault(cell[:4], []).append((cell[4], accuracies(done)))
    if not panels:
        return
    height = sum(0.7 + 0.28 * len(bars) for bars in panels.values())
    figure = Figure(figsize=(9, 0.6 + height), dpi=110, layout="constrained")
    axes = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False,
        height_ratios=[1 + len(bars) for bars in panels.values()],
    )[:, 0]  # fmt: skip
    for ax, (panel, bars) in zip(axes, panels.items(), strict=True):
        for y, (_, values) in enumerate(bars[::-1]):
            mean = statistics.mean(values)
            ax.barh(y, mean, height=0.6, color="#0072B2", alpha=0.35)
            ax.plot(values, [y] * len(values), "o", color="#0072B2", markersize=4)
            ax.text(1, y, f"{mean:.1f}", va="center", color="#333333", fontsize=8)
        ax.set_yticks(range(len(bars)), [name for name, _ in bars[::-1]], fontsize=8)
        images, model, size, epochs = panel
        ax.set_title(f"{images}, {model}, {size} px, {epochs} epochs", loc="left", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("accuracy in %: every run, and their mean")
    figure.savefig(path)


if __name__ == "__main__":
    main()
