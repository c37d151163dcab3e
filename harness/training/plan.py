"""The plan that a script prints first, the facts that its result keeps, its last lines."""

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
    """The data set of `--dataset`, read by one process of each machine. options: DataOptions."""
    return from_local_main(accelerator, lambda: load_data(dataset, **vars(options)))


def sizes(data):
    """{"train": n, ...} of the splits there are."""
    return {r: len(getattr(data, r)) for r in ("train", "val", "test") if getattr(data, r)}


NOTHING_HELD_OUT = "no validation or test images: --val_fraction 0.1 holds some out"


def unreadable_images(data):
    """How many images --bad_images skip left out, and the first of them."""
    images = [
        f"{split} {row} ({reason})"
        for split, rows in data.bad.items()
        for row, reason in rows.items()
    ]
    counts = ", ".join(f"{len(rows):,} of {split}" for split, rows in data.bad.items())
    return f"{counts} can't be read: {', '.join(images[:5])}" + (", …" if len(images) > 5 else "")


UNEVEN = 10  # times the smallest class's images in the largest, from which the plan says so


def classes_row(data, imbalance_kind):
    """Which column the labels are in, the classes, and how many train images each has.

    imbalance_kind: of --imbalance.
    """
    counts = np.bincount(data.train.labels, minlength=len(data.classes))
    names = ", ".join(data.classes[:5]) + (", …" if len(data.classes) > 5 else "")
    row = (
        f"{len(data.classes):,} {data.labels_from}: {names}; train images a class: "
        f"least {counts.min():,}, median {int(np.median(counts)):,}, most {counts.max():,}"
    )
    if counts.max() >= UNEVEN * counts.min():
        row += f"; uneven: {data.classes[counts.argmax()]} has {counts.max():,}"
        row += f", {data.classes[counts.argmin()]} {counts.min():,}"
        if imbalance_kind == "none":
            row += " (--imbalance logit_adjustment makes the rare ones count as much)"
    return row


def notes_on_metrics(metrics, data):
    """Notes on the classes that AUROC and AP leave out, having no image in a scored split.

    metrics: names of those that are computed.
    """
    notes, class_means = [], {"auroc", "ap"} & set(metrics)
    for split in (data.val, data.test) if class_means else ():
        labels = np.unique(split.labels) if split is not None else range(len(data.classes))
        absent_names = [name for k, name in enumerate(data.classes) if k not in set(labels)]
        if absent_names:
            verb = "leave" if len(class_means) > 1 else "leaves"
            notes.append(
                f"{' and '.join(sorted(class_means))} {verb} out {len(absent_names):,} of "
                f"{len(data.classes):,} classes, which have no image in '{split.name}': "
                f"{few(absent_names)}"
            )
    return notes


def choose_preprocessing(options, image_size, crop_scale, data, pretrained):
    """The Preprocessing of images: the one that the weights come with, else the data set's.

    options: PreprocessingOptions. image_size, crop_scale: of the flags. pretrained: from
    harness.models.weights.find_weights. Flags overrule both.
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
    statistics = "ImageNet's mean and std" if imagenets else "the data set's own mean and std"
    text = pretrained.origin or statistics
    if pretrained.state and not pretrained.origin:
        text = f"assumed ({text}): nothing beside the weights says how they want images"
    return text + options.as_text()


def describe_run(args, machine, data, model, preprocessing, total, rows):
    """The plan as text: what is about to happen, one fact on each line.

    args: all flags, because the plan lists those that are not at their defaults. machine: the rows
    of make_accelerator, and "weights". preprocessing: Preprocessing. total: steps. rows:
    {name: text} of what only the script knows, "lr" among them.
    """
    per_epoch, rest = divmod(len(data.train), args.batch_size)
    about = build.describe(model)
    network = find_model(args.model)
    accumulation = args.gradient_accumulation_steps
    processes = machine["processes"]
    microbatch_size = args.batch_size // (processes * accumulation)
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
        **({"left out": unreadable_images(data)} if data.bad else {}),
        "images": f"{preprocessing.size}×{preprocessing.size}{stored} "
        + f"{preprocessing.interpolation}, {colours}; {augmentation(args)}",
        "model": f"{network.name} ({network.library}), {about['parameters']:,} parameters, "
        + f"head {about['head']}; "
        + machine["weights"],
        "steps": f"{total:,} = {total / per_epoch:.4g} epochs of {per_epoch}"
        + (f" ({rest} images an epoch don't fill a batch)" if rest else ""),
        "batch": f"{args.batch_size} = {processes} processes × {accumulation} accumulation"
        + f" × {microbatch_size}",
        **rows,
        "ema": _ema(args.ema_decay, per_epoch, total),
        "precision": machine["precision"],
        "device": f"{machine['device']}, {machine['threads']} CPU threads a process",
    }
    notes = [*data.notes, *notes_on_metrics(computed(args.metrics, args.select_by), data)]
    remarks = [("left out", line) for line in data.left_out] + [("note", n) for n in notes]
    if rest > len(data.train) / 5:
        warning = f"warning: every epoch leaves out {rest:,} of {len(data.train):,} train images"
        reason = f"as --batch_size {args.batch_size} does not divide them"
        remarks.append(("note", f"{warning}, {reason}"))
    rows = [*rows.items(), *_flag_rows(args.given, vars(args))]
    position = 2  # behind the data and its classes
    return facts([*rows[:position], *remarks, *rows[position:]])


SCHEDULES = {"cosine": warmup_cosine, "linear": warmup_linear}  # of --schedule


def rates(options, steps_per_epoch, total, warmup):
    """The learning rate at the points of its schedule.

    options: OptimizerOptions. steps_per_epoch: with the fraction that doesn't fill a batch. total,
    warmup: steps.
    """
    schedule = SCHEDULES[options.schedule]
    points = (0, warmup, total // 2, total * 3 // 4, total - 1)
    text = ", ".join(
        f"{options.lr * schedule(s, total, warmup):.3g} at {s}" for s in sorted(set(points))
    )
    full_warmup = round(options.warmup_epochs * steps_per_epoch)
    if warmup < full_warmup:
        text += f"; warm-up cut from {full_warmup:,} to {warmup:,} steps, half of this short run"
    group_rates = {"the head": options.head_lr, "norms and biases": options.bias_lr}
    text += "".join(f"; {group} from {rate:g}" for group, rate in group_rates.items() if rate)
    return f"{options.optimizer}: {text}"


def _flag_rows(sources, values):
    """The flags that are not at their defaults, one row for each source: a recipe, the command.

    sources: {flag: source}. values: {flag: value}.
    """
    rows = []
    for source in dict.fromkeys(sources.values()):
        flags = [f"{name} {values[name]}" for name in sources if sources[name] == source]
        rows.append(("flags", f"{', '.join(flags)} ({source})"))
    return rows or [("flags", "all at their defaults")]


def augmentation(options):
    """What is drawn for every image in every epoch, in words. options: BatchOptions."""
    texts = [options.augment]
    if options.augment != "none" and options.crop_scale:
        texts += [f"random resized crop from {options.crop_scale:.0%}"]
    if options.augment != "none" and options.flip == "alternating":
        texts += ["alternating flips"]
    texts += [f"erasing {options.random_erasing:g}"] if options.random_erasing else []
    alphas = {"mixup": options.mixup_alpha, "CutMix": options.cutmix_alpha}
    if options.mix_prob:
        texts += [f"{name} α {alpha:g}" for name, alpha in alphas.items() if alpha]
    texts += [f"smoothing {options.label_smoothing:g}"] if options.label_smoothing else []
    if options.imbalance != "none":
        texts += [imbalance.describe(options.imbalance, options.imbalance_tau)]
    return ", ".join(texts)


def _ema(decay, steps_per_epoch, total):
    if not decay:
        return "off"
    final_decay = decay_at(total - 1, decay)
    note = f", in the end {final_decay:.4g} (warm-up)" if final_decay < decay else ""
    steps = half_life(final_decay)
    epochs = steps / steps_per_epoch
    return f"decay {decay}{note}: half-life {steps:,.0f} steps = {epochs:.1f} epochs"


def result_config(
    model, dropout, data, preprocessing, stem, job_type, pretrained, head="linear"
):  # fmt: skip
    """config.json: all that another script needs to use the result.

    model, dropout: of the flags. preprocessing: Preprocessing. stem: as resolved. pretrained: the
    weights that training started from. head: "linear" or "mlp".
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
            **({"content": data.content} if data.content else {}),
        },
        "metric": "top-1 accuracy",
        "ancestors": list(pretrained.recipes),
    }  # fmt: skip


def identity(data, preprocessing, splits):
    """Facts about the data that a resumed run must share with the one it continues.

    preprocessing: Preprocessing. splits: {role: Samples}.
    """
    return {**data_identity(data, preprocessing), "store": store_identity(splits)}


def data_identity(data, preprocessing):
    """The facts of `identity` that are known before the images are decoded."""
    labels = hashlib.sha256()
    for split in (data.train, data.val, data.test):
        if split is not None:
            labels.update(split.rows.tobytes() + split.labels.tobytes())
    return {
        **({"content": data.content} if data.content else {}),  # first: its error says the most
        "data_sha256": labels.hexdigest(),
        "pixels": preprocessing._replace(packed_side=0).as_list(),
        "split_sizes": sizes(data),
    }


WORSE_THAN_PROBE = 0.03  # accuracy of a result under that of the probe: a warning from here on


def under_probe(summary):
    """A line where a result is well under the linear probe of its first features, else ""."""
    accuracy, probe = summary["accuracy"], summary.get("probe")
    if accuracy is None or not probe or accuracy >= probe["accuracy"] - WORSE_THAN_PROBE:
        return ""
    points = (probe["accuracy"] - accuracy) * 100
    return (
        f"note         {points:.1f} points under a linear probe of the features it began with "
        f"({probe['accuracy']:.1%} of {probe['of']} images): training made them worse; lower "
        "rates or fewer --epochs may help\n"
    )


def _time_text(seconds):
    """What a run spent its seconds on, and those before it. seconds: {"training": 3.2, …}."""
    texts = {name: f"{name} {value:.0f} s" for name, value in seconds.items()}
    setup = ", ".join(texts[name] for name in ("start", "decoding") if name in texts)
    run = f"{texts['training']}, {texts['evaluation']}"
    return f"{run}; before that {setup}" if setup else run


def closing(summary, folder, tracked):
    """The last lines of a script: the score, and where the files are.

    tracked: where the run is tracked; "" on other machines than the first, which have no files.
    """
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
    weights = f"{summary['weights']} weights"
    score += f" ({weights})" if accuracy is not None else f"; the result is the {weights}"
    text = (
        f"\n{score} after {summary['steps']:,} steps, "
        f"{summary['seconds']:.0f} s ({_time_text(summary['seconds_of'])})\n"
        f"{under_probe(summary)}"
    )
    if not tracked:
        return f"{text}result       on the first machine, in its {folder}"
    return (
        f"{text}result       {folder}/model.safetensors, config.json, summary.json\n"
        f"curves       {folder}/curves.png, train_batch.png, metrics.jsonl\n"
        f"report       {folder}/report.html, README.md"
        + (", report.md, mistakes.csv\n" if accuracy is not None else "\n")
        + f"tracked run  {tracked}"
    )
