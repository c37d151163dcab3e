"""The plan a script prints before it starts, the facts it keeps, the line it ends with."""

from __future__ import annotations

import hashlib

from harness import models
from harness.data import load_data
from tricks.ema import half_life
from tricks.schedule import warmup_cosine


def load(args):
    """The data set that the flags name."""
    return load_data(
        args.dataset,
        image_column=args.image_column,
        label_column=args.label_column,
        train_split=args.train_split,
        val_split=args.val_split,
        test_split=args.test_split,
        val_fraction=args.val_fraction,
        max_train_samples=args.max_train_samples,
        max_eval_samples=args.max_eval_samples,
        seed=args.seed,
    )


def sizes(data):
    """{"train": n, ...} of the splits there are."""
    return {r: len(getattr(data, r)) for r in ("train", "val", "test") if getattr(data, r)}


def text(args, machine, data, model, size, total, warmup):
    """What is about to happen, a fact a line."""
    steps_per_epoch = len(data.train) // args.batch_size
    about = models.describe(model)
    accumulation = args.gradient_accumulation_steps
    processes = machine["processes"]
    part = args.batch_size // (processes * accumulation)
    points = (0, warmup, total // 2, total * 3 // 4, total - 1)
    rates = ", ".join(
        f"{args.lr * warmup_cosine(s, total, warmup):.3g} at {s}" for s in sorted(set(points))
    )
    rows = {
        "data": f"{data.name} ({data.source}): "
        + ", ".join(f"{n:,} {role}" for role, n in sizes(data).items())
        + f"; {len(data.classes)} classes",
        "images": f"{size}×{size}; {_augmentation(args)}",
        "model": f"{args.model}, {about['parameters']:,} parameters, head {about['head']}; "
        + machine["weights"],
        "steps": f"{total:,} = {total / steps_per_epoch:.4g} epochs of {steps_per_epoch}"
        + f" ({len(data.train) % args.batch_size} images an epoch don't fill a batch)",
        "batch": f"{args.batch_size} = {processes} processes × {accumulation} accumulation"
        + f" × {part}",
        "lr": f"{args.optimizer}: {rates}",
        "ema": _ema(args, steps_per_epoch, total),
        "precision": machine["precision"],
        "device": f"{machine['device']}, {machine['threads']} CPU threads a process",
    }
    wanted = round(args.warmup_epochs * len(data.train) / args.batch_size)
    if warmup < wanted:
        rows["lr"] += f"; warm-up cut from {wanted:,} to {warmup:,} steps, half of this short run"
    return "\n".join(f"{name:<12} {value}" for name, value in [*rows.items(), *_given(args)])


def _given(args):
    """The flags that are not at their defaults, a row for each place where they were said."""
    rows = []
    for place in dict.fromkeys(args.given.values()):
        said = [f"{n} {getattr(args, n)}" for n, where in args.given.items() if where == place]
        rows.append(("flags", f"{', '.join(said)} ({place})"))
    return rows or [("flags", "all at their defaults")]


def _augmentation(args):
    words = [args.augment]
    words += [f"erasing {args.random_erasing:g}"] if args.random_erasing else []
    mixed = {"mixup": args.mixup_alpha, "CutMix": args.cutmix_alpha} if args.mix_prob else {}
    words += [f"{name} α {alpha:g}" for name, alpha in mixed.items() if alpha]
    words += [f"smoothing {args.label_smoothing:g}"] if args.label_smoothing else []
    return ", ".join(words)


def _ema(args, steps_per_epoch, total):
    if not args.ema_decay:
        return "off"
    steps = half_life(args.ema_decay)
    epochs = steps / steps_per_epoch
    line = f"decay {args.ema_decay}, half-life {steps:,.0f} steps = {epochs:.1f} epochs"
    if steps > 0.2 * total:
        line += f"; that is {steps / total:.0%} of the run: a smaller --ema_decay would follow it"
    return line


def result_config(args, data, size, job_type):
    """config.json: all that another script needs to use the result."""
    library = models.library_of(args.model)
    return {
        **models.model_config(
            args.model, data.classes, size, data.mean, data.std,
            stem=models.resolve_stem(args.model, args.stem, size, library),
            dropout=args.dropout, library=library,
        ),
        "job_type": job_type,
        "dataset": data.name,
        "data": {"source": data.source, "splits": sizes(data)},
        "metric": "top-1 accuracy",
    }  # fmt: skip


def identity(data, size):
    """Facts about the data that a resumed run must share with the one it continues."""
    labels = hashlib.sha256()
    for split in (data.train, data.val, data.test):
        if split is not None:
            labels.update(split.rows.tobytes() + split.labels.tobytes())
    return {"data_sha256": labels.hexdigest(), "pixels": size, "split_sizes": sizes(data)}


def closing(summary, folder, tracked):
    """The last lines: what came out, and where it is."""
    split, accuracy = summary["split"], summary["accuracy"]
    score = "nothing was evaluated" if accuracy is None else f"{split} accuracy {accuracy:.2%}"
    if summary["best_epoch"]:
        score += f" with the weights of epoch {summary['best_epoch']}, the best on val"
    return (
        f"\n{score} ({summary['weights']} weights) after {summary['steps']:,} steps, "
        f"{summary['seconds']:.0f} s\n"
        f"result       {folder}/model.safetensors, config.json, summary.json\n"
        f"curves       {folder}/curves.png, train_batch.png, metrics.jsonl\n"
        f"tracked run  {tracked}"
    )
