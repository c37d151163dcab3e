"""Uneven classes: what each kind of --imbalance is worth, on a data set made long-tailed.

    python benchmarks/imbalance.py                                  CIFAR-10, 100:1 and 10:1
    python benchmarks/imbalance.py --dataset FOLDER --script finetune.py --model NAME \
        --weights FOLDER --strategy full --epochs 10 ...            a published network

Train is thinned so that the number of images falls from class to class by a constant factor, from
--most to --most / ratio (Cao et al. 2019, https://arxiv.org/abs/1906.07413); test stays as it is.
Every kind trains with every seed; a run that is there is not run again. "after training" is the
network of "none" with τ log π taken off its logits. Beside the runs lie table.md and results.json:
balanced accuracy on test, and the accuracy on test images as uneven as those of train (recalls
weighed by the classes' shares of train). Whatever this script does not know goes to every run.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from measure import Row, json_flags, write_measurement
from training_runs import finish_run

KINDS = ("none", "logit_adjustment", "class_weights", "balanced", "sqrt")
# The small fast network: about 40 s a run on one core of an EPYC
FAST = {
    "model": "fastnet_small", "batch_size": 128, "lr": 0.5, "weight_decay": 5e-4,
    "augment": "basic",
    "crop_padding": 2, "random_erasing": 0, "mix_prob": 0, "ema_decay": 0, "label_smoothing": 0.1,
    "warmup_epochs": 2, "epochs": 20,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--script", choices=("train.py", "finetune.py"), default="train.py")
    parser.add_argument("--ratios", type=int, nargs="+", default=[100, 10])
    parser.add_argument("--most", type=int, default=1000, help="train images of the first class")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/imbalance"))
    json_flags(parser)
    args, passed_on = parser.parse_known_args()
    args.output_dir = args.output_dir.resolve()
    own = FAST if args.script == "train.py" else {}
    given = {word.partition("=")[0].lstrip("-") for word in passed_on}
    flags = [f"--{name}={value}" for name, value in own.items() if name not in given]
    flags += [*passed_on, "--eval_epochs=1000", "--checkpointing_steps=1000000"]
    for ratio in args.ratios:
        folder = args.output_dir / f"{Path(args.dataset).name}-{args.most}-{ratio}"
        if not folder.exists():
            write_long_tailed(args.dataset, folder, args.most, ratio)
    for seed in args.seeds:
        for ratio in args.ratios:
            data = args.output_dir / f"{Path(args.dataset).name}-{args.most}-{ratio}"
            for kind in args.kinds:
                run = args.output_dir / f"{data.name}-{kind}-s{seed}"
                if not (run / "report.json").exists():
                    print(run.name, flush=True)
                    words = [f"--dataset={data}", f"--imbalance={kind}", f"--seed={seed}"]
                    finish_run(args.script, run, [*words, *flags])
                if not (run / "cell.json").exists():
                    (run / "cell.json").write_text(json.dumps(scores(run, ratio, kind, seed)))
            print(table(args.output_dir), flush=True)
    write_measurement(args, list(rows_of(args.output_dir)), f"{args.script} {' '.join(flags)}")


def write_long_tailed(dataset, folder, most, ratio):
    """Train with most · ratio^(-k / (classes - 1)) images of class k, test as it is, as parquet."""
    from harness.data.sources import load_data

    data = load_data(dataset)
    classes, rng = len(data.classes), np.random.default_rng(0)
    kept = []
    for k in range(classes):
        rows = data.train.rows[data.train.labels == k]
        kept.append(rng.permutation(rows)[: max(1, round(most * ratio ** (-k / (classes - 1))))])
    unfinished = folder.with_name(f"{folder.name}.part")
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, split, rows in (
        ("train", data.train, np.sort(np.concatenate(kept))),
        ("test", data.test, data.test.rows),
    ):
        split.dataset.select(rows).to_parquet(unfinished / f"{name}-00000-of-00001.parquet")
    unfinished.rename(folder)


def scores(run, ratio, kind, seed):
    """One finished run, as it stands in results.json; of "none" with what "after training" gives.

    train: {class: share of train}.
    """
    from harness.data.sources import load_data
    from harness.models.trained import read_trained

    trained = read_trained(run)
    data = load_data(trained.recipes[0]["dataset"])
    shares = np.bincount(data.train.labels, minlength=len(data.classes)) / len(data.train)
    report = json.loads((run / "report.json").read_text())
    recalls = np.array([row["accuracy"] for row in report["by_class"]])
    record = {
        "images": Path(data.name).name.rsplit("-", 2)[0], "ratio": ratio, "kind": kind,
        "seed": seed, "train": len(data.train), "balanced": recalls.mean(),
        "as_train": float(recalls @ shares),
        "seconds": json.loads((run / "summary.json").read_text())["seconds"],
    }  # fmt: skip
    if kind == "none":
        recalls = after_training(trained, data)
        record["after"] = [recalls.mean(), float(recalls @ shares)]
    return record


def after_training(trained, data):
    """The recall of each class when log π is taken off the logits of a finished run."""
    import torch

    from harness.data.stores import decode
    from harness.models.trained import load_model
    from tricks.augment import normalize_batch
    from tricks.logit_adjustment import log_priors, remove_priors

    preprocessing = trained.preprocessing
    samples = decode(data.test, data.image_column, preprocessing)
    model = load_model(trained).eval()
    mean, std, cpu = preprocessing.mean, preprocessing.std, torch.device("cpu")
    logits = []
    with torch.inference_mode():
        for index in torch.arange(len(data.test)).split(256):
            pixels, _ = samples.take(index, cpu)
            logits.append(model(normalize_batch(pixels, mean, std)))
    counts = torch.from_numpy(data.train.labels).bincount(minlength=len(data.classes))
    right = remove_priors(torch.cat(logits), log_priors(counts)).argmax(1) == samples.labels
    return np.array([right[samples.labels == k].double().mean() for k in range(len(data.classes))])


def by_cell(output_dir):
    """(images, ratio, train images, kind, its runs) of the finished runs.

    A run: balanced accuracy, what it gained over the run of "none" with its seed (None where that
    is not there), accuracy on test as uneven as train, seconds.
    """
    records = [json.loads(file.read_text()) for file in sorted(output_dir.glob("*/cell.json"))]
    for images, ratio in sorted({(r["images"], r["ratio"]) for r in records}, key=str):
        cell = [r for r in records if (r["images"], r["ratio"]) == (images, ratio)]
        plain = {r["seed"]: r["balanced"] for r in cell if r["kind"] == "none"}
        rows = {kind: [(r["seed"], r["balanced"], r["as_train"], r["seconds"]) for r in cell
                       if r["kind"] == kind] for kind in KINDS}  # fmt: skip
        rows["after training"] = [
            (r["seed"], *r["after"], r["seconds"]) for r in cell if "after" in r
        ]
        for kind, values in rows.items():
            runs = [(b, b - plain[seed] if seed in plain else None, *more)
                    for seed, b, *more in values]  # fmt: skip
            if runs:
                yield images, ratio, cell[0]["train"], kind, runs


def rows_of(output_dir):
    titles = {
        "balanced accuracy, %": 100, "gain over none, points": 100,
        "accuracy were test as uneven as train, %": 100, "training, s": 1,
    }  # fmt: skip
    for images, ratio, _, kind, runs in by_cell(output_dir):
        for (title, unit), values in zip(titles.items(), zip(*runs, strict=True), strict=True):
            values = [unit * value for value in values if value is not None]
            if values and not (kind == "none" and "gain" in title):
                shown = {"mean": True, "digits": 1} if unit == 100 else {}
                yield Row(f"{images}, {ratio}:1, {kind}: {title}", values, **shown)


def table(output_dir):
    """Write results.json and table.md of the finished runs; returns the table."""
    records = [json.loads(file.read_text()) for file in sorted(output_dir.glob("*/cell.json"))]
    (output_dir / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    lines = [
        "| images | ratio | train | --imbalance | balanced accuracy, mean (min–max) | gain | "
        "as uneven as train | n | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for images, ratio, train, kind, runs in by_cell(output_dir):
        balanced, gains, as_train, seconds = zip(*runs, strict=True)
        facts = [
            images, f"{ratio}:1", f"{train:,}", kind, spread(balanced),
            spread([gain for gain in gains if gain is not None], "+"), spread(as_train),
            len(runs), f"{statistics.median(seconds):,.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, facts))} |")
    text = "\n".join(lines)
    (output_dir / "table.md").write_text(text + "\n")
    return text


def spread(values, sign=""):
    if not values:
        return ""
    mean, low, high = (
        f"{100 * v:{sign}.1f}" for v in (statistics.mean(values), min(values), max(values))
    )
    return f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
