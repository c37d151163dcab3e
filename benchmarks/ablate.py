"""What each trick is worth: a base recipe, plus each trick, minus each trick, over seeds.

    python benchmarks/ablate.py                         crop + flip, plus each trick (a GPU)
    python benchmarks/ablate.py --mode minus            everything on, minus each trick
    python benchmarks/ablate.py --dataset FOLDER --epochs 10 --tricks none mixup ema
    python benchmarks/ablate.py --variant "decay_all: --norm_weight_decay 5e-4"
    python benchmarks/ablate.py --variant "ema: --ema_decay 0.99"     another value for a trick
    python benchmarks/ablate.py --show                  the table of what is there already

Every run is `accelerate launch train.py`. All tricks are off in the base but crop and flip, and a
row changes the flags of its trick alone: what a row says is "this flag, in this recipe". Without
flags that are 13 recipes of 30 epochs on three seeds, 39 runs: with two cores that train 100
images/s, each takes four hours.

A variant is compared with the base's run of the same seed, and a seed's runs follow each other, so
that a machine that drifts slows both. Runs that are there and finished are not run again, one that
was killed is continued, and one that was run with other flags is an error. table.md, table.csv and
ablate.png are written beside the runs after each; the checkpoints of a finished run are removed.

The result is the last epoch's, which alone is evaluated (`--eval_epochs` changes that): of the
averaged weights where EMA is on, else of the raw ones. Whatever this script does not know goes to
every train.py: `--batch_size 64`, say, or `--config FILE`, whose data set, model, epochs and tricks
give way to what is said here.
"""

import argparse
import csv
import json
import math
import re
import shlex
import signal
import statistics
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Row, json_flags, write_measurement
from training_runs import finish_run

from harness.cli.flags import named, to_recipe
from harness.errors import nearest
from train import read_flags

# Every flag that a trick sets, with its value in the plain recipe; and mix_prob, as a --config that
# has it at 0 would make the rows of mixup and CutMix the base once more
PLAIN = {
    "mix_prob": 1,
    "augment": "basic", "random_erasing": 0, "mixup_alpha": 0, "cutmix_alpha": 0, "ema_decay": 0,
    "label_smoothing": 0, "warmup_epochs": 0, "clip_grad_norm": 0,
}  # fmt: skip
TRICKS = {
    "none": {"augment": "none"},
    "basic": {"augment": "basic"},
    "randaugment": {"augment": "randaugment"},
    "autoaugment": {"augment": "autoaugment"},
    "trivialaugment": {"augment": "trivialaugment"},
    "random_erasing": {"random_erasing": 0.25},
    "mixup": {"mixup_alpha": 0.2},
    "cutmix": {"cutmix_alpha": 1.0},
    "mixup+cutmix": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
    # A half-life of 1.8 epochs of CIFAR-10; train.py's 0.9999 takes ten times as long to catch up
    "ema": {"ema_decay": 0.999},
    "label_smoothing": {"label_smoothing": 0.1},
    "warmup": {"warmup_epochs": 5},
    "clip_grad_norm": {"clip_grad_norm": 1.0},
}
FULL = [
    "randaugment", "random_erasing", "mixup+cutmix", "ema", "label_smoothing", "warmup",
    "clip_grad_norm",
]  # fmt: skip
CONFIDENCE = 0.95


def main(argv=None, finish=finish_run):
    args, passed_on = parse_args(argv)
    groups = recipes(args)
    plan = [
        (args.output_dir / f"{name}-s{seed}", {"seed": seed, **flags})
        for seed in args.seeds
        for rows in groups
        for name, _, flags in rows
    ]
    refuse_clashes(plan, passed_on)
    commands = [(folder, command(args, flags, passed_on)) for folder, flags in plan]
    for folder, words in [] if args.show else commands:
        refuse_other_flags(folder, words)
    for count, (folder, words) in enumerate(commands, start=1):
        if args.show or (folder / "summary.json").exists():
            continue
        print(f"{count} of {len(plan)}: {folder.name}", flush=True)
        finish("train.py", folder, words, args.config_file)
        show(args, groups)
    show(args, groups)
    tables, summaries = finished_rows(args, groups)
    if summaries:
        rows = measured(tables, summaries[0]["split"])
        write_measurement(args, list(rows), heading(args, summaries))


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--epochs", type=int, default=30, help="of every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mode", choices=("plus", "minus", "both"), default="plus",
                        help="plus: --base and each trick; minus: --full without each")  # fmt: skip
    parser.add_argument("--base", nargs="+", default=["basic"], metavar="TRICK")
    parser.add_argument("--full", nargs="+", default=FULL, metavar="TRICK")
    parser.add_argument("--tricks", nargs="*", metavar="TRICK",
                        help=f"the rows; unset: all of {', '.join(TRICKS)}")  # fmt: skip
    parser.add_argument("--variant", action="append", default=[], metavar="'NAME: --FLAG VALUE …'",
                        help="a row of your own, or other values for a trick")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--config_file", help="of the launcher; unset: one process on all there is")
    parser.add_argument("--show", action="store_true", help="run nothing")
    json_flags(parser)
    return parser.parse_known_args(argv)


def recipes(args):
    """[[(name, label, flags), …], …]: the plus rows, the minus rows, each after its base."""
    own = dict(variant(text) for text in args.variant)
    tricks = TRICKS | own
    chosen = list(tricks if args.tricks is None else dict.fromkeys([*args.tricks, *own]))
    for name in (*args.base, *args.full, *chosen):
        if name not in tricks:
            sys.exit(f'unknown trick "{name}"{nearest(name, tricks)}')
    groups = []
    if args.mode != "minus":
        title, flags = "+".join(args.base), PLAIN.copy()
        for name in args.base:
            flags |= tricks[name]
        labels = {"none": "no augmentation"}
        rows = [
            (f"{title}+{name}", labels.get(name, f"+ {name}"), flags | tricks[name])
            for name in chosen
        ]
        groups.append([(title, title, flags), *(row for row in rows if row[2] != flags)])
    if args.mode != "plus":
        flags = PLAIN.copy()
        for name in args.full:
            flags |= tricks[name]
        groups.append([("full", "full", flags)])
        for name in chosen:
            mine = tricks[name]
            if mine.items() <= flags.items():
                less = {k: v for k, v in flags.items() if k not in mine}
                less |= {k: PLAIN[k] for k in mine if k in PLAIN}
                groups[-1].append((f"full-{name}", f"− {name}", less))
            elif name in own and name not in TRICKS:
                groups[-1].append((f"full+{name}", f"+ {name}", flags | mine))
    for rows in groups:
        if len(rows) == 1:
            sys.exit(f"--tricks {' '.join(chosen)}: none of them changes {rows[0][0]}")
    return groups


def variant(text):
    """`name: --flag value --switch` -> (name, {flag: value, switch: None})."""
    name, colon, rest = text.partition(":")
    flags, last = {}, None
    for word in shlex.split(rest):
        if word.startswith("--"):
            last, equals, value = word[2:].partition("=")
            last = last.replace("-", "_")
            flags[last] = value if equals else None
        elif last and flags[last] is None:
            flags[last] = word
        else:
            colon = ""
    if not colon or not flags or not re.fullmatch(r"\w[\w.+-]*", name):
        sys.exit(f'--variant "{text}": wants "name: --flag value …", the name of letters, _ . + -')
    return name, flags


def flag_words(flags):
    return [f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items()]


def command(args, flags, passed_on):
    return [
        "--group=ablate", f"--eval_epochs={args.epochs}", *passed_on, f"--dataset={args.dataset}",
        f"--model={args.model}", f"--epochs={args.epochs}", *flag_words(flags),
    ]  # fmt: skip


def refuse_clashes(plan, passed_on):
    """A flag for every run cannot be one that the rows differ in, or that is ours."""
    said = {word.split("=")[0][2:].replace("-", "_") for word in passed_on if word[:2] == "--"}
    own = {"dataset", "model", "epochs", "output_dir", "run_name", "resume_from_checkpoint"}
    for name in sorted(said & (own | plan[0][1].keys())):
        sys.exit(f"--{name} of every run is set by this script: see its --help, --variant say")


def refuse_other_flags(folder, words):
    """Also where train.py knows no such flag: before anything has run."""
    flags = to_recipe(read_flags(words))
    if not (folder / "config.yaml").exists():
        return
    there = yaml.safe_load((folder / "config.yaml").read_text())
    for name in sorted(flags.keys() | there.keys()):
        if name not in named("operational") and flags.get(name) != there.get(name):
            sys.exit(
                f"{folder} was run with {name} {there.get(name)}, this command has "
                f"{flags.get(name)}: choose another --output_dir, or remove that folder"
            )


# ---------------------------------------------------------------- statistics


def t_coverage(t, df):
    """The chance that Student's t of `df` degrees of freedom lies in [-t, t].

    Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964, 26.7.3 and 26.7.4.
    """
    odd, angle = df % 2, math.atan(t / math.sqrt(df))
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for k in range(odd, df - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def t_quantile(coverage, df):
    """The t for which `t_coverage(t, df)` is `coverage`, by halving the range of its angle."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if t_coverage(math.tan(middle) * math.sqrt(df), df) < coverage:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(df)


def t_interval(values):
    """Student's interval of the mean of at least two values."""
    mean, n = statistics.mean(values), len(values)
    half = t_quantile(CONFIDENCE, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def compare(base, runs):
    """A row's figures, of the summaries {seed: summary} of the base and of the variant.

    Accuracies and differences in points, time as a ratio; None for what is not known, an
    interval from one pair, or from equal differences, say.
    """
    accuracies = [100 * run["accuracy"] for run in runs.values()]
    pairs = [seed for seed in runs if seed in base]
    differences = [100 * (runs[seed]["accuracy"] - base[seed]["accuracy"]) for seed in pairs]
    # equal differences, of a few images each, happen with two seeds: an interval without width
    varies = len(pairs) > 1 and max(differences) - min(differences) > 1e-9
    low, high = t_interval(differences) if varies else (None, None)
    ratios = [
        runs[seed]["seconds"] / base[seed]["seconds"]
        for seed in pairs
        if machine(runs[seed]) == machine(base[seed])
    ]
    return {
        "n": len(runs),
        "accuracy": statistics.mean(accuracies),
        "sd": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "pairs": len(pairs),
        "difference": statistics.mean(differences) if pairs else None,
        "low": low,
        "high": high,
        "excludes_0": low is not None and (low > 0 or high < 0),
        "seconds": statistics.median(run["seconds"] for run in runs.values()),
        "time": statistics.median(ratios) if ratios else None,
        "time_min": min(ratios, default=None),
        "time_max": max(ratios, default=None),
        "seeds": list(runs),
        "accuracies": accuracies,
        "differences": differences,
        "times": ratios,
    }


def machine(run):
    """What must be the same for two runs' times to be compared."""
    kind = f"{run['processes']} × {run['device'].split(':')[0]}"
    threads = f", {run['threads']} threads" if kind.endswith("cpu") else ""
    return f"{kind}{threads}, {'fp32' if run['precision'] == 'no' else run['precision']}"


# ---------------------------------------------------------------- table and chart


def show(args, groups):
    """Write and print the table of the runs that are finished, and draw it."""
    tables, summaries = finished_rows(args, groups)
    if not summaries:
        print(f"no run is finished in {args.output_dir}")
        return
    title = heading(args, summaries)
    text = "\n".join([title, "", *markdown(tables, summaries[0]["split"]), ""])
    text += "\n" + "\n".join(f"- {line}" for line in notes(tables, summaries))
    (args.output_dir / "table.md").write_text(text + "\n")
    write_csv(args.output_dir / "table.csv", tables)
    print(text, flush=True)
    draw(args.output_dir / "ablate.png", tables, title, summaries[0]["split"])


def finished_rows(args, groups):
    """The rows of each table, of the runs that are finished, and those runs' summaries."""
    tables = []
    for rows in groups:
        done = [(*row, finished(args, row[0])) for row in rows]
        base = done[0][3]
        tables.append([
            {"recipe": name, "label": label, "base": rows[0][0], **compare(base, runs),
             "flags": " ".join(flag_words(changed(flags, rows[0][2])))}
            for name, label, flags, runs in done if runs
        ])  # fmt: skip
    summaries = [run for rows in groups for row in rows for run in finished(args, row[0]).values()]
    return tables, summaries


def measured(tables, split):
    """The rows of a results file."""
    for rows in tables:
        for row in rows:
            label = row["label"]
            yield Row(f"{label}: {split} accuracy, %", row["accuracies"], mean=True, digits=2)
            if row["recipe"] != row["base"] and row["differences"]:
                name = f"{label}, difference to {row['base']}, points"
                interval = None if row["low"] is None else (row["low"], row["high"])
                yield Row(name, row["differences"], mean=True, digits=2, interval=interval)
            if row["recipe"] != row["base"] and row["times"]:
                yield Row(f"{label}: training time over that of {row['base']}", row["times"])


def changed(flags, base):
    return {name: value for name, value in flags.items() if base.get(name, flags) != value}


def finished(args, name):
    """{seed: summary} of a recipe's runs that are there; the script ends where one has no score."""
    runs = {}
    for seed in args.seeds:
        file = args.output_dir / f"{name}-s{seed}" / "summary.json"
        if file.exists():
            runs[seed] = json.loads(file.read_text())
            if runs[seed]["accuracy"] is None:
                sys.exit(f"{file.parent} has no accuracy: {args.dataset} has no test split, and "
                         "without --val_fraction no validation split")  # fmt: skip
    return runs


def heading(args, summaries):
    splits = summaries[0]["data"]["splits"]
    sizes = ", ".join(f"{count:,} {name}" for name, count in splits.items())
    machines = "; ".join(sorted({machine(run) for run in summaries}))
    return (
        f"{args.model}, {Path(args.dataset).name} ({sizes}), {summaries[0]['epochs']:g} epochs, "
        f"{machines}"
    )


def markdown(tables, split):
    yield f"| recipe | {split} accuracy, mean ± s.d. (n) | difference | 95 % interval | time |"
    yield "|---|---|---|---|---|"
    for rows in tables:
        for row in rows:
            spread = "" if row["sd"] is None else f" ± {row['sd']:.2f}"
            cells = [row["label"], f"{row['accuracy']:.2f}{spread} % ({row['n']})"]
            if row["recipe"] == row["base"]:
                cells += ["", "", f"{row['seconds']:,.0f} s"]
            else:
                cells += [difference_words(row), interval_words(row), time_words(row)]
            yield f"| {' | '.join(cells)} |"


def difference_words(row):
    if row["difference"] is None:
        return "–"
    return f"{row['difference']:+.2f}{' *' if row['excludes_0'] else ''}"


def interval_words(row):
    return "–" if row["low"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}"


def time_words(row):
    if row["time"] is None:
        return "–"
    spread = f" ({row['time_min']:.2f}–{row['time_max']:.2f})" if row["pairs"] > 1 else ""
    return f"× {row['time']:.2f}{spread}"


def notes(tables, summaries):
    """What has to be known to read the table, a line each."""
    rows = [row for rows in tables for row in rows]
    tested = sum(row["low"] is not None and row["recipe"] != row["base"] for row in rows)
    yield (
        "difference: to the base, the row without one above it, in points, mean over the seeds "
        "that both have; its interval is Student's, of the differences seed by seed"
    )
    if tested:
        yield (
            "*: the interval leaves out 0. Where nothing has an effect that still happens to one "
            f"row in 20: of the {tested} tested here expect {tested * (1 - CONFIDENCE):.2g}"
        )
    split = summaries[0]["split"]
    images = summaries[0]["data"]["splits"][split]
    error = max(math.sqrt(row["accuracy"] * (100 - row["accuracy"]) / images) for row in rows)
    yield (
        f"{images:,} {split} images: the sampling error of one accuracy is up to {error:.2f} "
        "points (one s.d.); the intervals are of seeds on these very images and leave it out"
    )
    yield (
        "time: seconds of training and evaluation; of the rows below the base the ratio to it, "
        "seed by seed, median (min–max)"
    )
    if len({run["weights"] for run in summaries}) > 1:
        yield "accuracy is that of the averaged weights where EMA is on, elsewhere of the raw ones"


def write_csv(path, tables):
    """One line a recipe; an empty cell is not known, several values are set apart by spaces."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [key for key in tables[0][0] if key != "label"],
                                extrasaction="ignore")  # fmt: skip
        writer.writeheader()
        for rows in tables:
            for row in rows:
                writer.writerow({
                    key: " ".join(map(str, value)) if isinstance(value, list) else value
                    for key, value in row.items()
                })  # fmt: skip


def draw(path, tables, title, split):
    """A panel a base: each recipe's difference to it, sorted, with interval and every seed."""
    import textwrap

    from matplotlib.figure import Figure

    panels = [(rows[0], [row for row in rows[1:] if row["pairs"]]) for rows in tables if rows]
    panels = [(base, sorted(rows, key=lambda row: row["difference"])) for base, rows in panels]
    panels = [(base, rows) for base, rows in panels if rows]
    if not panels:
        return
    heights = [len(rows) + 0.6 for _, rows in panels]
    figure = Figure(figsize=(9, 1.3 + 0.36 * sum(heights) + 0.3 * len(panels)), dpi=110,
                    layout="constrained")  # fmt: skip
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize=10)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for ax, (base, rows) in zip(axes, panels, strict=True):
        ax.axvline(0, color="#777777", linewidth=1)
        for y, row in enumerate(rows):
            colour = "#0072B2" if row["excludes_0"] else "#777777"
            if row["low"] is not None:
                ax.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2)
            below = [y - 0.24] * row["pairs"]
            ax.plot(row["differences"], below, "o", color=colour, markersize=4, alpha=0.4,
                    markeredgewidth=0)  # fmt: skip
            ax.plot([row["difference"]], [y], "o", color=colour, markersize=7)
            beside(ax, y, f"{row['difference']:+.2f}", time_words(row).split(" (")[0])
        beside(ax, len(rows) - 0.2, "points", "time")
        ax.set_yticks(range(len(rows)), [row["label"] for row in rows])
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_title(f"{base['label']}: {base['accuracy']:.2f} %", loc="left", fontsize=10)
        ax.grid(axis="x", alpha=0.25)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[-1].set_xlabel(
        f"difference in {split} accuracy, points: every seed, their mean, 95 % interval "
        "(blue: leaves out 0)"
    )
    figure.savefig(path)


def beside(ax, y, *words):
    """Text in columns to the right of a row."""
    for place, word in enumerate(words):
        ax.text(1.06 + 0.09 * place, y, word, transform=ax.get_yaxis_transform(), ha="right",
                va="center", fontsize=9, color="#333333")  # fmt: skip


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # kills the run; it writes a checkpoint first
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    main()
