"""Fine-tuning a published network: ours, fastai, timm's train.py and scikit-learn, in one run.

    python benchmarks/finetune_peers.py --dataset FOLDER --model tf_efficientnet_lite0 \
        --weights FOLDER --timm_train pytorch-image-models/train.py --fastai_python venv/bin/python

Same images, size, epochs, batch, network and weights; every figure is of the last weights on the
test images. The seconds are those of the whole command, from its start to its end. Sides take
turns, seed by seed; runs that are there are not run again: --output_dir holds a JSON a run and
table.md.

- full, auto, staged, feature_extraction: `accelerate launch finetune.py --strategy …`, its
  defaults otherwise.
- fastai: `vision_learner(…).fine_tune(epochs - 1)`, which trains the head for an epoch before,
  with images resized to 1.5 times the size and `aug_transforms(size, min_scale=0.75)`, as its
  course does. fastai may need an environment of its own: --fastai_python.
- timm: its `train.py` (of --timm_train; in no package) with AdamW, --timm_flags and its own
  augmentation.
- scikit-learn: `LogisticRegression` on the frozen network's features of the unchanged images,
  standardised. No epochs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import Row, json_flags, write_measurement

OURS = ("full", "auto", "staged", "feature_extraction")
SIDES = (*OURS, "fastai", "timm", "scikit-learn")
TIMM_FLAGS = "--opt adamw --lr 5e-4 --weight-decay 0.01 --warmup-epochs 1 --smoothing 0.1"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="whatever finetune.py reads")
    parser.add_argument("--model", required=True, help="one of timm's")
    parser.add_argument("--weights", required=True, help="folder of model.safetensors, config.json")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timm_train", help="path of timm's train.py; unset: timm is left out")
    parser.add_argument("--timm_flags", default=TIMM_FLAGS)
    parser.add_argument("--fastai_python", default=sys.executable)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/finetune_peers"))
    json_flags(parser)
    parser.add_argument("--only", choices=("fastai", "scikit-learn"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    args.output_dir = args.output_dir.resolve()
    images = args.output_dir / "images"
    if args.only:  # in a process of its own, with an interpreter of its own
        side = {"fastai": fastai, "scikit-learn": scikit_learn}[args.only]
        print(json.dumps({"accuracy": side(args, images)}))
        return
    sides = [side for side in args.sides if side != "timm" or args.timm_train]
    if not images.exists():
        write_images(args.dataset, images)
    for seed in args.seeds:
        for side in sides:
            record = args.output_dir / f"{side}-{args.size}-{args.epochs}-s{seed}.json"
            if not record.exists():
                print(f"seed {seed}: {side}", flush=True)
                start = time.perf_counter()
                accuracy = run(side, seed, args, images)
                seconds = time.perf_counter() - start
                facts = {"side": side, "size": args.size, "epochs": args.epochs, "seed": seed}
                record.write_text(json.dumps(facts | {"accuracy": accuracy, "seconds": seconds}))
        print(table(args.output_dir), flush=True)
    setting = f"batches of {args.batch_size}, {args.threads} thread(s) a side; last weights"
    write_measurement(args, list(rows_of(args)), setting)


def write_images(dataset, folder):
    """The encoded bytes of train and test, as FOLDER/SPLIT/CLASS/ROW.jpg (or .png)."""
    from harness.data.sources import load_data

    data, unfinished = load_data(dataset), folder.with_name("images.part")
    for name in ("train", "test"):
        split = getattr(data, name)
        column = split.dataset.select_columns(data.image_column).with_format("arrow")[:]
        for row, label in zip(split.rows.tolist(), split.labels.tolist(), strict=True):
            cell = column[data.image_column][row].as_py()
            encoded = cell["bytes"] or Path(cell["path"]).read_bytes()
            suffix = "jpg" if encoded[:2] == b"\xff\xd8" else "png"
            file = unfinished / name / data.classes[label] / f"{row}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded)
    unfinished.rename(folder)


def run(side, seed, args, images):
    """Accuracy in [0, 1] on the test images, by a process of its own."""
    if side in OURS:
        return ours(side, seed, args, images)
    if side == "timm":
        return timm(seed, args, images)
    python = args.fastai_python if side == "fastai" else sys.executable
    command = [python, __file__, *sys.argv[1:], f"--only={side}", f"--seed={seed}"]
    output = finish(command, args, f"{side}-s{seed}")
    return json.loads(output.strip().splitlines()[-1])["accuracy"]


def finish(command, args, name, **others):
    """What a command printed; it ends this process where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, **others)
    (args.output_dir / f"{name}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def ours(strategy, seed, args, images):
    from training_runs import finish_run

    folder = args.output_dir / "ours" / f"{strategy}-{args.size}-{args.epochs}-s{seed}"
    words = [
        f"--dataset={images}", f"--model={args.model}", f"--weights={args.weights}",
        f"--image_size={args.size}", f"--epochs={args.epochs}", f"--batch_size={args.batch_size}",
        f"--strategy={strategy}", f"--seed={seed}", f"--threads={args.threads}",
        f"--eval_epochs={args.epochs}", "--val_split=none",
    ]  # fmt: skip
    finish_run("finetune.py", folder, words)
    return json.loads((folder / "summary.json").read_text())["accuracy"]


def fastai(args, images):
    import torch
    from fastai.vision.all import (
        CrossEntropyLossFlat,
        ImageDataLoaders,
        Resize,
        accuracy,
        aug_transforms,
        set_seed,
        vision_learner,
    )

    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    loaders = ImageDataLoaders.from_folder(
        images, train="train", valid="test", bs=args.batch_size, num_workers=0,
        item_tfms=Resize(round(1.5 * args.size)),
        batch_tfms=aug_transforms(size=args.size, min_scale=0.75),
    )  # fmt: skip
    learner = vision_learner(
        loaders, args.model, metrics=accuracy, loss_func=CrossEntropyLossFlat(),
        pretrained_cfg_overlay={"file": f"{args.weights}/model.safetensors"},
    )  # fmt: skip
    learner.validate = lambda *others: None  # its epochs score nothing: only the end does
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(args.epochs - 1)
        del learner.validate
        return float(learner.validate()[1])


def timm(seed, args, images):
    output = args.output_dir / "timm"
    command = [
        sys.executable, args.timm_train, f"--data-dir={images}", "--val-split=test",
        f"--model={args.model}", "--pretrained",
        f"--pretrained-path={args.weights}/model.safetensors",
        f"--num-classes={len(os.listdir(images / 'train'))}", f"--img-size={args.size}",
        f"--epochs={args.epochs}", "--cooldown-epochs=0", f"--batch-size={args.batch_size}",
        f"--workers={max(1, args.threads - 1)}", f"--seed={seed}", f"--output={output}",
        f"--experiment=s{seed}-{time.time()}", *args.timm_flags.split(),
    ]  # fmt: skip
    import torch

    command += [] if torch.cuda.is_available() else ["--device", "cpu"]
    finish(command, args, f"timm-s{seed}")
    rows = (max(output.glob(f"s{seed}-*")) / "summary.csv").read_text().splitlines()
    return float(rows[-1].split(",")[rows[0].split(",").index("eval_top1")]) / 100


def scikit_learn(args, images):
    import timm
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(args.threads)
    overlay = {"file": f"{args.weights}/model.safetensors"}
    network = timm.create_model(
        args.model, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
    ).eval()
    config = timm.data.resolve_model_data_config(network)
    config["input_size"] = (3, args.size, args.size)
    transform = timm.data.create_transform(**config)

    def features(split):
        loader = torch.utils.data.DataLoader(ImageFolder(images / split, transform), 32)
        with torch.no_grad():
            batches = [(network(x), y) for x, y in loader]
        return [torch.cat(part).numpy() for part in zip(*batches, strict=True)]

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return probe.fit(*features("train")).score(*features("test"))


def by_cell(folder):
    """{(size, epochs, side): its runs' records}, in the order of the table."""
    cells = {}
    for file in sorted(folder.glob("*-s*.json")):
        record = json.loads(file.read_text())
        key = (record["size"], record["epochs"], SIDES.index(record["side"]))
        cells.setdefault(key, []).append(record)
    return {(size, epochs, SIDES[k]): cells[size, epochs, k] for size, epochs, k in sorted(cells)}


def rows_of(args):
    for (size, epochs, side), records in by_cell(args.output_dir).items():
        images = Path(args.dataset).name
        cell = f"{images}, {args.model}, {size} px, {epochs} epochs, {side}"
        hits = [100 * record["accuracy"] for record in records]
        yield Row(f"{cell}: test accuracy, %", hits, mean=True, digits=1)
        yield Row(f"{cell}: the whole command, s", [record["seconds"] for record in records])


def table(folder):
    """Write table.md; a row for each side, size and number of epochs."""
    lines = [
        "| pixels | epochs | side | test accuracy, mean (min–max), n | s, median (min–max) |",
        "|---|---|---|---|---|",
    ]
    for (size, epochs, side), records in by_cell(folder).items():
        hits = [100 * record["accuracy"] for record in records]
        taken = [record["seconds"] for record in records]
        lines.append(
            f"| {size} | {epochs} | {side} | {statistics.mean(hits):.1f} "
            f"({min(hits):.1f}–{max(hits):.1f}), {len(hits)} | {statistics.median(taken):,.0f} "
            f"({min(taken):,.0f}–{max(taken):,.0f}) |"
        )
    text = "\n".join(lines)
    (folder / "table.md").write_text(text + "\n")
    return text


if __name__ == "__main__":
    main()
