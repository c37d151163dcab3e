"""The plan a script prints before it starts, the facts it keeps, the line it ends with."""

from __future__ import annotations

import hashlib

import numpy as np

from harness.cli.tables import facts
from harness.data.listing import few
from harness.data.preprocessing import Preprocessing
from harness.data.sources import load_data
from harness.data.stored import IMAGENET_STATISTICS
from harness.data.stores import store_identity
from harness.metrics import computed
from harness.models import build
from harness.models.names import find_model
from harness.processes import from_local_main
from harness.training import imbalance
from tricks.ema import decay_at, half_life
from tricks.schedule import warmup_cosine, warmup_linear

CROP_PCT = 0.875  # of the stored pixels, what the network sees, where random crops need more


def load(dataset, options, accelerator):
    """The data set of `--dataset` and DataOptions, looked through by one process a machine."""
    return from_local_main(accelerator, lambda: load_data(dataset, **vars(options)))


def sizes(data):
    """{"train": n, ...} of the splits there are."""
    return {r: len(getattr(data, r)) for r in ("train", "val", "test") if getattr(data, r)}


NOTHING_HELD_OUT = "no validation or test images: --val_fraction 0.1 holds some out"


def left_out(data):
    """How many images --bad_images skip left out, and the first of them."""
    bad = [
        f"{split} {row} ({why})" for split, rows in data.bad.items() for row, why in rows.items()
    ]
    counts = ", ".join(f"{len(rows):,} of {split}" for split, rows in data.bad.items())
    return f"{counts} can't be read: {', '.join(bad[:5])}" + (", …" if len(bad) > 5 else "")


UNEVEN = 10  # times the images of the smallest class in the largest: worth a word


def classes_row(data, imbalance):
    """Which column the labels are in, the classes, and how many train images each has."""
    counts = np.bincount(data.train.labels, minlength=len(data.classes))
    names = ", ".join(data.classes[:5]) + (", …" if len(data.classes) > 5 else "")
    row = (
        f"{len(data.classes):,} {data.labels_from}: {names}; train images a class: "
        f"least {counts.min():,}, median {int(np.median(counts)):,}, most {counts.max():,}"
    )
    if counts.max() >= UNEVEN * counts.min():
        row += f"; uneven: {data.classes[counts.argmax()]} has {counts.max():,}"
        row += f", {data.classes[counts.argmin()]} {counts.min():,}"
        if imbalance == "none":
            row += " (--imbalance logit_adjustment makes the rare ones count as much)"
    return row


def left_out_of_means(metrics, data):
    """Notes: classes without an image in a scored split, where AUROC or AP are asked for.

    metrics: names of those that are computed.
    """
    notes, asked = [], {"auroc", "ap"} & set(metrics)
    for split in (data.val, data.test) if asked else ():
        there = np.unique(split.labels) if split is not None else range(len(data.classes))
        without = [name for k, name in enumerate(data.classes) if k not in set(there)]
        if without:
            notes.append(
                f"{' and '.join(sorted(asked))} leave out {len(without):,} of "
                f"{len(data.classes):,} classes, which have no image in '{split.name}': "
                f"{few(without)}"
            )
    return notes


def choose_preprocessing(options, image_size, crop_scale, data, pretrained):
    """How images are prepared: as the weights say of themselves, else by the data set's facts.

    options: PreprocessingOptions. image_size, crop_scale: of the flags. pretrained: from
    harness.models.weights.find_weights. What flags name wins.
    """
    # A random resized crop enlarges what it cuts out, so it cuts from more pixels
    preprocessing = pretrained.preprocessing or Preprocessing(
        size=data.image_size, crop_pct=CROP_PCT if crop_scale else 1.0,
        interpolation="bilinear", mean=data.mean, std=data.std,
    )  # fmt: skip
    return preprocessing._replace(size=image_size or preprocessing.size, **options.given())


def preprocessing_from(options, pretrained, data):
    """Where the preprocessing comes from, in words. options: PreprocessingOptions."""
    imagenets = (data.mean, data.std) == IMAGENET_STATISTICS
    own = "ImageNet's mean and std" if imagenets else "the data set's own mean and std"
    words = pretrained.origin or own
    if pretrained.state and not pretrained.origin:
        words = f"assumed ({words}): nothing beside the weights says how they want images"
    return words + options.as_text()


def describe_run(args, machine, data, model, preprocessing, total, rows):
    """What is about to happen, a fact a line.

    args: all flags, since those that are not at their defaults are told. machine: words of
    make_accelerator, and "weights". preprocessing: Preprocessing. total: steps. rows: {name: words}
    that only the script knows, with its "lr".
    """
    per_epoch, rest = divmod(len(data.train), args.batch_size)
    about = build.describe(model)
    network = find_model(args.model)
    accumulation = args.gradient_accumulation_steps
    processes = machine["processes"]
    part = args.batch_size // (processes * accumulation)
    larger = preprocessing.stored_size != preprocessing.size
    stored = f" from {preprocessing.stored_size}×{preprocessing.stored_size}" if larger else ""
    colours = ", ".join(
        f"{m:.3g}±{s:.3g}" for m, s in zip(preprocessing.mean, preprocessing.std, strict=True)
    )
    rows = {
        "data": (data.name if data.name == data.source else f"{data.name} ({data.source})")
        + ": "
        + ", ".join(f"{n:,} {role}" for role, n in sizes(data).items())
        + f"; {len(data.classes)} classes"
        + ("" if data.val or data.test else f"; {NOTHING_HELD_OUT}"),
        "classes": classes_row(data, args.imbalance),
        **({"left out": left_out(data)} if data.bad else {}),
        "images": f"{preprocessing.size}×{preprocessing.size}{stored} "
        + f"{preprocessing.interpolation}, {colours}; {augmentation(args)}",
        "model": f"{network.name} ({network.library}), {about['parameters']:,} parameters, "
        + f"head {about['head']}; "
        + machine["weights"],
        "steps": f"{total:,} = {total / per_epoch:.4g} epochs of {per_epoch}"
        + (f" ({rest} images an epoch don't fill a batch)" if rest else ""),
        "batch": f"{args.batch_size} = {processes} processes × {accumulation} accumulation"
        + f" × {part}",
        **rows,
        "ema": _ema(args.ema_decay, per_epoch, total),
        "precision": machine["precision"],
        "device": f"{machine['device']}, {machine['threads']} CPU threads a process",
    }
    notes = [*data.notes, *left_out_of_means(computed(args.metrics, args.select_by), data)]
    read = [("left out", line) for line in data.left_out] + [("note", n) for n in notes]
    rest = len(data.train) % args.batch_size
    if rest > len(data.train) / 5:
        words = f"warning: every epoch leaves out {rest:,} of {len(data.train):,} train images"
        read.append(("note", f"{words}, as --batch_size {args.batch_size} does not divide them"))
    rows = [*rows.items(), *_given(args.given, vars(args))]
    place = 2  # behind the data and its classes
    return facts([*rows[:place], *read, *rows[place:]])


SCHEDULES = {"cosine": warmup_cosine, "linear": warmup_linear}  # of --schedule


def rates(options, steps_per_epoch, total, warmup):
    """The learning rate at the points of its schedule.

    options: OptimizerOptions. steps_per_epoch: with the fraction that doesn't fill a batch. total,
    warmup: steps.
    """
    schedule = SCHEDULES[options.schedule]
    points = (0, warmup, total // 2, total * 3 // 4, total - 1)
    words = ", ".join(
        f"{options.lr * schedule(s, total, warmup):.3g} at {s}" for s in sorted(set(points))
    )
    wanted = round(options.warmup_epochs * steps_per_epoch)
    if warmup < wanted:
        words += f"; warm-up cut from {wanted:,} to {warmup:,} steps, half of this short run"
    others = {"the head": options.head_lr, "norms and biases": options.bias_lr}
    words += "".join(f"; {what} from {rate:g}" for what, rate in others.items() if rate)
    return f"{options.optimizer}: {words}"


def _given(given, values):
    """The flags that are not at their defaults, a row for each place where they were said."""
    rows = []
    for source in dict.fromkeys(given.values()):
        flags = [f"{name} {values[name]}" for name, where in given.items() if where == source]
        rows.append(("flags", f"{', '.join(flags)} ({source})"))
    return rows or [("flags", "all at their defaults")]


def augmentation(options):
    """What is drawn for every image in every epoch, in words. options: BatchOptions."""
    facts = [options.augment]
    if options.augment != "none" and options.crop_scale:
        facts += [f"random resized crop from {options.crop_scale:.0%}"]
    if options.augment != "none" and options.flip == "alternating":
        facts += ["alternating flips"]
    facts += [f"erasing {options.random_erasing:g}"] if options.random_erasing else []
    mixed = {"mixup": options.mixup_alpha, "CutMix": options.cutmix_alpha}
    if options.mix_prob:
        facts += [f"{name} α {alpha:g}" for name, alpha in mixed.items() if alpha]
    facts += [f"smoothing {options.label_smoothing:g}"] if options.label_smoothing else []
    if options.imbalance != "none":
        facts += [imbalance.in_words(options.imbalance, options.imbalance_tau)]
    return ", ".join(facts)


def _ema(decay, steps_per_epoch, total):
    if not decay:
        return "off"
    last = decay_at(total - 1, decay)
    held = f", in the end {last:.4g} (warm-up)" if last < decay else ""
    steps = half_life(last)
    epochs = steps / steps_per_epoch
    return f"decay {decay}{held}: half-life {steps:,.0f} steps = {epochs:.1f} epochs"


def result_config(
    model, dropout, data, preprocessing, stem, job_type, pretrained, head="linear"
):  # fmt: skip
    """config.json: all that another script needs to use the result.

    model, dropout: of the flags. preprocessing: Preprocessing. stem: as resolved. pretrained: what
    it started from. head: "linear" or "mlp".
    """
    network = find_model(model)
    return {
        **build.model_config(
            network.name, data.classes, preprocessing.size, preprocessing.mean, preprocessing.std,
            stem=stem, dropout=dropout, head=head,
            library=network.library, arguments=network.arguments,
            crop_pct=preprocessing.crop_pct, interpolation=preprocessing.interpolation,
        ),
        **({"packed_side": preprocessing.packed_side} if preprocessing.packed_side else {}),
        "job_type": job_type,
        "dataset": data.name,
        "data": {
            "source": data.source, "splits": sizes(data),
            "left_out": {split: list(rows) for split, rows in data.bad.items()},
        },
        "metric": "top-1 accuracy",
        "ancestors": list(pretrained.recipes),
    }  # fmt: skip


def identity(data, preprocessing, splits):
    """Facts about the data that a resumed run must share with the one it continues.

    preprocessing: Preprocessing. splits: {role: Samples}.
    """
    labels = hashlib.sha256()
    for split in (data.train, data.val, data.test):
        if split is not None:
            labels.update(split.rows.tobytes() + split.labels.tobytes())
    return {
        **({"content": data.content} if data.content else {}),  # first: it says the most
        "data_sha256": labels.hexdigest(),
        "pixels": preprocessing._replace(packed_side=0).as_list(),
        "store": store_identity(splits),
        "split_sizes": sizes(data),
    }


WORSE_THAN_PROBE = 0.03  # a result so far under the probe of its features is worth a word


def under_probe(summary):
    """The line for a result well under the linear probe of the features it began with, or ""."""
    accuracy, probe = summary["accuracy"], summary.get("probe")
    if accuracy is None or not probe or accuracy >= probe["accuracy"] - WORSE_THAN_PROBE:
        return ""
    less = (probe["accuracy"] - accuracy) * 100
    return (
        f"note         {less:.1f} points under a linear probe of the features it began with "
        f"({probe['accuracy']:.1%} of {probe['of']} images): training lost what they knew; lower "
        "rates or fewer --epochs may keep it\n"
    )


def _parts_of_time(seconds):
    """What the seconds of a run were, and those before it: {"training": 3.2, …} in words."""
    words = {name: f"{name} {value:.0f} s" for name, value in seconds.items()}
    before = ", ".join(words[name] for name in ("start", "decoding") if name in words)
    during = f"{words['training']}, {words['evaluation']}"
    return f"{during}; before that {before}" if before else during


def closing(summary, folder, tracked):
    """The last lines: what came out, and where it is."""
    split, accuracy = summary["split"], summary["accuracy"]
    score = (
        f"nothing was evaluated ({NOTHING_HELD_OUT})"
        if accuracy is None
        else f"{split} accuracy {accuracy:.2%}"
    )
    splits = summary["data"]["splits"]
    if accuracy is not None:
        score += f" of {splits[split]:,} images, trained on {splits['train']:,}"
    averaged = summary["scores"].get(f"{split}/acc_tta")
    score += f"; {averaged:.2%} over several views" if averaged is not None else ""
    if summary["best_epoch"]:
        score += f"; epoch {summary['best_epoch']}, the best on {splits['val']:,} val images"
    return (
        f"\n{score} ({summary['weights']} weights) after {summary['steps']:,} steps, "
        f"{summary['seconds']:.0f} s ({_parts_of_time(summary['seconds_of'])})\n"
        f"{under_probe(summary)}"
        f"result       {folder}/model.safetensors, config.json, summary.json\n"
        f"curves       {folder}/curves.png, train_batch.png, metrics.jsonl\n"
        f"report       {folder}/report.html, README.md"
        + (", report.md, mistakes.csv\n" if accuracy is not None else "\n")
        + f"tracked run  {tracked}"
    )
