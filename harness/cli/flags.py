"""The flags of the scripts, group by group; each flag's help text is where the flag is defined.

Nothing here imports torch, so `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from functools import lru_cache

import yaml

from harness.cli.bounds import BOUNDS, MANY, integer
from harness.cli.parser import Parser, Switch, add
from harness.console import words_of
from harness.errors import nearest, shortened

STRATEGIES = ("feature_extraction", "staged", "full", "auto")

NAME_BYTES = 255  # of a file or a folder, on every file system in use

MODEL = (
    "a classifier of torchvision or timm (timm/NAME.TAG where both have it), hf-hub:owner/name, or "
    "fastnet and fastnet_small, for small images"
)

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's

METRICS = ("loss", "acc", "top5", "balanced_acc", "macro_f1", "ece", "auroc", "ap")
IMBALANCE = ("none", "logit_adjustment", "class_weights", "balanced", "sqrt")

OPTIMIZERS = ("sgd", "adamw")  # of both training scripts
AUGMENTS = ("none", "basic", "autoaugment", "randaugment", "trivialaugment")


def run_name(text):
    """An argparse type: a name that is one folder and stays inside `--output_dir`."""
    if not text or text in (".", "..") or any(c in text for c in "/\\\0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder name (no slashes, no NUL)")
    if len(os.fsencode(text)) > NAME_BYTES:
        raise argparse.ArgumentTypeError(
            f"{shortened(text)} is not a folder name: it is longer than {NAME_BYTES} bytes"
        )
    return text


@lru_cache
def named(purpose) -> tuple[str, ...]:
    """The training scripts' flags with this purpose: see harness.cli.parser.add."""
    parser = Parser("")
    data_flags(parser, dataset="")
    model_flags(parser, model="")
    transfer_flags(parser)
    speed_flags(optimization_flags(parser))
    augmentation_flags(parser)
    running_flags(parser)
    output_flags(parser)
    return tuple(parser.named(purpose))


def to_recipe(args):
    """The flags of a run as a plain dict that `--config` reads back, defaults included.

    Left out are flags about one command only: resuming, stopping early, overwriting.
    """
    left_out = {"given", *named("one_command")}
    return {k: v for k, v in sorted(vars(args).items()) if k not in left_out}


def to_yaml(recipe) -> bytes:
    """config.yaml, as bytes. recipe: of `to_recipe`."""
    # in the given order: modules of an unnamed stage name it, and a checkpoint knows the name
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()


def pick(kind, args):
    """The flags of one concern: what a function below the scripts takes instead of all of them.

    kind: a frozen dataclass with a field for each flag, of the same name; `given` and `recipe` are
    what Parser.read and `to_recipe` return. A flag that the script lacks has the field's default.
    """
    values = {**vars(args), "recipe": to_recipe(args)}
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})


def verify_cache(group):
    add(
        group,
        "verify_cache",
        operational=True,
        action=Switch,
        default=False,
        help="compare all decoded or packed images in the cache with their hashes, "
        "about a second a GB; else a sample of them",
    )


def data_flags(parser, dataset):
    g = parser.add_argument_group("data")
    add(
        g,
        "dataset",
        common=True,
        default=dataset,
        help="digits, cifar10, cifar100, flowers102, a Hub id, or a local folder "
        "(parquet, save_to_disk, class folders, or images with a table of labels)",
    )
    add(
        g,
        "layout",
        data=True,
        choices=("auto", "classes", "splits"),
        default="auto",
        help="how to read a folder of images. classes: every folder is a class; splits: every "
        "folder with a split's name is a split",
    )
    add(
        g,
        "label_pattern",
        common=True,
        data=True,
        metavar="REGEX",
        help="its one group matches the class in the path of each image, "
        "under --dataset: '/(cat|dog)[.]' for cat.0.jpg and train/cat.0.jpg",
    )
    add(
        g,
        "labels",
        data=True,
        metavar="FILE",
        help="a table of the labels (.csv, .tsv, .jsonl, .parquet), or one for each "
        "split: train=FILE,val=FILE",
    )
    add(
        g,
        "file_column",
        data=True,
        help="the table's column of file names; only where it cannot be inferred",
    )
    add(
        g,
        "classes",
        data=True,
        metavar="FILE",
        help="the names of the classes in order, one a line; unset: sorted as text, "
        "whole numbers by value",
    )
    add(
        g,
        "empty_classes",
        data=True,
        choices=("refuse", "drop", "keep"),
        default="refuse",
        help="classes without an image in train: stop, leave them out, or keep them",
    )
    add(
        g,
        "bit_depth",
        data=True,
        help="bits in use of 16-bit gray images: 12 where values end at 4095; unset: as the files "
        "say, else 16",
    )
    add(g, "image_column", data=True, help="only where it cannot be inferred")
    add(g, "label_column", data=True, help="only where it cannot be inferred")
    add(g, "train_split", data=True, help="only where it is not called train")
    add(g, "val_split", data=True, help="unset: validation, valid, val or dev; none: without")
    add(g, "test_split", data=True, help="unset: test; none: without")
    add(
        g,
        "val_fraction",
        common=True,
        data=True,
        default=0.0,
        help="hold out this stratified part of train, keep the epoch that is best on "
        "it; 0: train on all, the last weights are the result",
    )
    add(
        g,
        "fold",
        data=True,
        metavar="I/K",
        help="cross-validation: hold out the I-th of K stratified parts of train; "
        "ensemble_eval.py scores K such runs as one",
    )
    add(
        g,
        "group_column",
        data=True,
        metavar="NAME",
        help="a column (patient, video), or folder for each image's folder: images with the "
        "same value stay on the same side of --val_fraction and --fold",
    )
    add(
        g,
        "group_pattern",
        data=True,
        metavar="REGEX",
        help="the same, with the value that its one group matches in the path of each image: "
        "'/(patient[0-9]+)_'",
    )
    add(g, "max_train_samples", common=True, data=True, help="images of train; for a quick look")
    add(g, "max_eval_samples", common=True, help="the same for val and test")
    add(
        g,
        "pixels",
        choices=("auto", "decoded", "packed"),
        default="auto",
        help="the form in which images are cached on the disk. decoded: the pixels of one square "
        "each; packed: whole images as JPEG, from which crops are cut; auto: the "
        "plan says which",
    )
    add(
        g,
        "jpeg_decoder",
        choices=("cpu", "nvjpeg"),
        default="cpu",
        help="what decodes packed training images. nvjpeg: the GPU, where few cores feed it; its "
        "pixels differ in some bits on another version of CUDA",
    )
    add(
        g,
        "prepare_data",
        operational=True,
        action=Switch,
        default=False,
        help="decode or pack the images, and stop: the same command without it finds them",
    )
    verify_cache(g)
    add(
        g,
        "bad_images",
        data=True,
        choices=("stop", "skip"),
        default="stop",
        help="images that can't be read. stop: end and name the first one; skip: leave them out, "
        "count and name them (one more pass of decoding, once)",
    )
    return g


def shard_flag(g):
    add(
        g,
        "shard_store",
        action=Switch,
        default=False,
        help="several machines: each packs and draws from its own share of the train "
        "images only, dealt by a fixed rule; the order depends on how many machines "
        "there are",
    )


def model_flags(parser, model):
    g = parser.add_argument_group("model")
    add(g, "model", common=True, default=model, help=MODEL)
    add(
        g,
        "image_size",
        common=True,
        help="pixels a side; unset: the weights' own, else the data set's",
    )
    add(
        g,
        "stem",
        choices=("auto", "small", "standard"),
        default="auto",
        help="small: 3x3 without max-pool; auto: small up to 64 pixels",
    )
    add(
        g,
        "weights",
        common=True,
        default="none",
        help="none, default, a torchvision weights name or timm tag, "
        "hf-hub:owner/name, a folder (of a run, or as timm has it), or a file (FILE:KEY for one of "
        "several states)",
    )
    loading_flags(g)
    add(
        g,
        "init",
        choices=("auto", "kaiming", "own"),
        default="auto",
        help="kaiming: normal, fan_out; own: the model's; auto: kaiming for networks "
        "with BatchNorm",
    )
    add(g, "dropout", help="probability before the head, 0: off; unset: the model's own")


def loading_flags(g):
    add(
        g,
        "weights_by_order",
        action=Switch,
        help="give the file's tensors out in order, whatever their names: only shapes are checked",
    )
    add(
        g,
        "mean",
        commas=True,
        type=colours("mean"),
        metavar="R,G,B",
        help="of pixels in [0, 1]; unset: as the weights say, else the data set's",
    )
    add(g, "std", commas=True, type=colours("std"), metavar="R,G,B", help="the same")
    add(
        g,
        "interpolation",
        choices=FILTERS,
        help="filter for resizing; unset: as the weights say, else bilinear",
    )
    add(
        g,
        "crop_pct",
        help="share of the resized side that the network sees; unset: as the weights say",
    )


def transfer_flags(parser):
    g = parser.add_argument_group("transfer")
    add(
        g,
        "strategy",
        common=True,
        choices=STRATEGIES,
        default="staged",
        help="feature_extraction: a new head on the frozen network; staged: unfrozen "
        "from the head down; full: everything from the first step; auto: measures, "
        "then chooses. Each has epochs and rates of its own where --epochs and --lr "
        "are unset",
    )
    add(
        g,
        "head",
        common=True,
        choices=("linear", "mlp"),
        default="linear",
        help="mlp: Dropout 0.5, Linear 256, ReLU, Dropout 0.3, Linear",
    )
    add(
        g,
        "stages",
        type=parser.stages,
        metavar="YAML",
        help="for staged: a list of {epochs: …, train: {module: lr}}, best in a recipe; "
        "unset: head; + last blocks; everything",
    )
    add(
        g,
        "layer_decay",
        stage=True,
        help="factor on a block's learning rate for each block between it and the "
        "end; 1: off; unset: 0.75 for full, 1 for staged",
    )
    add(
        g,
        "bn_mode",
        stage=True,
        choices=("auto", "eval", "train", "all"),
        default="auto",
        help="which BatchNorm layers adapt their statistics. eval: none; train: those "
        "of trained parts; all: those of frozen parts too; auto: none of a pretrained "
        "network, those of trained parts from scratch",
    )
    add(
        g,
        "views",
        stage=True,
        default=2,
        help="augmented views of each image whose features are kept while only the "
        "head trains; 1: no augmentation; 0: the network runs anew every step",
    )


def optimization_flags(parser, optimizers=OPTIMIZERS):
    g = parser.add_argument_group("optimization")
    add(
        g,
        "batch_size",
        common=True,
        default=128,
        help="images one optimizer step sees, over all processes and accumulation",
    )
    add(
        g,
        "gradient_accumulation_steps",
        operational=True,
        default=1,
        help="parts the batch is cut into on each process; 1: off",
    )
    add(g, "epochs", common=True, default=100, help="passes over train")
    add(g, "max_steps", help="optimizer steps; overrides --epochs")
    add(g, "optimizer", common=True, choices=optimizers, default="sgd", help="update rule")
    add(g, "lr", common=True, default=0.1, help="peak learning rate")
    add(g, "momentum", default=0.9, help="of sgd and muon; beta1 of adamw")
    add(g, "nesterov", action=Switch, default=True, help="Nesterov momentum of sgd and muon")
    add(g, "weight_decay", default=5e-4, help="of weights; 0: off")
    add(g, "norm_weight_decay", default=0.0, help="of norms and biases; 0: off")
    add(
        g,
        "warmup_epochs",
        stage=True,
        default=5.0,
        help="epochs of linear warm-up before the cosine; 0: off",
    )
    add(
        g,
        "nonfinite",
        operational=True,
        choices=("stop", "skip"),
        default="stop",
        help="at a loss or gradient that is not finite. skip: no process updates its weights, "
        "up to 10 steps in a row; without a fused optimizer (fp16) the host then waits for "
        "the device at every step",
    )
    add(g, "clip_grad_norm", default=1.0, help="L2 norm; 0: off")
    add(
        g,
        "ema_decay",
        common=True,
        default=0.9999,
        help="of the averaged weights; warmed up as min(d, (1+t)/(10+t)); 0: off",
    )
    add(
        g,
        "label_smoothing",
        common=True,
        stage=True,
        default=0.1,
        help="mass spread over all classes; 0: off",
    )
    add(
        g,
        "imbalance",
        common=True,
        stage=True,
        choices=IMBALANCE,
        default="none",
        help="for uneven classes. logit_adjustment: the log of their "
        "shares is added to the logits in the loss; class_weights: the loss is weighed "
        "by inverse frequency; balanced: every class comes equally often; sqrt: by the "
        "square root of its images",
    )
    add(
        g,
        "imbalance_tau",
        stage=True,
        default=1.0,
        help="τ of logit_adjustment: 1 for classes that count equally, 0: off",
    )
    return g


def speed_flags(group):
    """Flags to reach an accuracy from scratch in few steps, in the group of optimization_flags."""
    g = group
    add(
        g,
        "schedule",
        choices=("cosine", "linear"),
        default="cosine",
        help="how the rate falls after the warm-up; linear: for few epochs",
    )
    add(g, "head_lr", help="peak learning rate of the last layer's weights; unset: --lr")
    add(g, "bias_lr", help="peak learning rate of norms and biases; unset: --lr")
    add(
        g,
        "start_size",
        help="pixels a side in the first step, growing to the full size over 60 %% of "
        "the steps; unset: off",
    )
    add(
        g,
        "tta",
        default="none",
        metavar="VIEWS",
        help="the result is scored over several views, too: flip, shift, crops:N, "
        "random:N; none: off",
    )


def augmentation_flags(parser):
    g = parser.add_argument_group("augmentation")
    add(
        g,
        "augment",
        common=True,
        stage=True,
        choices=AUGMENTS,
        default="randaugment",
        help="basic: crop + flip; the others add their operations to it",
    )
    add(g, "flip_prob", stage=True, default=0.5, help="horizontal flip; 0: off")
    add(
        g,
        "flip",
        stage=True,
        choices=("random", "alternating"),
        default="random",
        help="alternating: drawn once an image, then every epoch the other way",
    )
    add(
        g,
        "crop_scale",
        common=True,
        stage=True,
        default=0.0,
        help="random resized crop of at least this share of the area; 0: the padded crop instead",
    )
    add(
        g,
        "crop_padding",
        stage=True,
        help="pixels; 0: no random crop; unset: an eighth of the image",
    )
    add(g, "randaugment_ops", stage=True, default=2, help="operations an image")
    add(g, "randaugment_magnitude", stage=True, default=9, help="strength, 0 to 30")
    add(g, "random_erasing", stage=True, default=0.25, help="probability; 0: off")
    add(g, "mixup_alpha", common=True, stage=True, default=0.2, help="Beta parameter; 0: off")
    add(g, "cutmix_alpha", common=True, stage=True, default=1.0, help="Beta parameter; 0: off")
    add(
        g,
        "mix_prob",
        stage=True,
        default=1.0,
        help="part of the steps that mix (mixup or CutMix at even odds); 0: off",
    )


def ensemble_flags(parser):
    g = parser.add_argument_group("members")
    g.add_argument("members", nargs="*", metavar="RUN", help="folders of trained runs")
    add(
        g,
        "average",
        choices=("probabilities", "logits"),
        default="probabilities",
        help="what is averaged over the members",
    )
    add(
        g,
        "member_weights",
        commas=True,
        type=shares,
        metavar="W,W,…",
        help="one a member, scaled to the sum 1; unset: fitted on validation images",
    )
    add(
        g,
        "soup",
        action=Switch,
        default=True,
        help="average the weights, too, of members that share an architecture",
    )
    add(
        g,
        "tta",
        default="none",
        metavar="VIEWS",
        help="none, flip, shift, crops:N, random:N; several with commas: "
        "combinations use the first, each is compared with none",
    )
    g = parser.add_argument_group("data (unset: as the members were trained)")
    add(g, "dataset", help="where the data set is now, or another one of the same classes")
    add(g, "image_column", help="only where it has another name than in training")
    add(g, "label_column", help="only where it has another name than in training")
    add(
        g,
        "split",
        choices=("test", "val"),
        help="scored images; unset: test where there is one, else val",
    )
    add(
        g,
        "max_eval_samples",
        type=integer(2, MANY),
        metavar="N",
        help="scored images; for a quick look",
    )
    verify_cache(g)


def predict_flags(parser):
    g = parser.add_argument_group("networks and images")
    g.add_argument(
        "inputs",
        nargs="*",
        metavar="RUN [RUN …] PATH…",
        help="folders of trained runs, then image files, folders, or patterns in quotes",
    )
    add(g, "dataset", help="instead of paths: a Hub id or a folder, as for training")
    add(g, "split", help="of --dataset, by its own name; unset: the first")
    add(g, "image_column", help="only where it cannot be inferred")
    add(
        g,
        "label_column",
        help="unset: as in training; where it holds the run's classes, predictions are scored",
    )
    g = parser.add_argument_group("predictions")
    add(
        g,
        "tta",
        default="none",
        metavar="VIEWS",
        help="none, flip, shift, crops:N, random:N: the average over several views of each image",
    )
    add(g, "top_k", default=5, help="classes of each image that are written")
    add(g, "min_probability", help="of the likeliest class, under which to abstain")
    add(
        g,
        "coverage",
        help="give each image a set of classes; at least this share of the sets holds the "
        "right class; needs the run's data set, for its held-out images",
    )
    add(
        g,
        "sets",
        choices=("threshold", "adaptive"),
        default="threshold",
        help="threshold: the smallest sets on average; adaptive: larger for hard images",
    )
    add(g, "format", choices=("csv", "jsonl", "parquet"), default="csv", help="of the file")


def export_flags(parser):
    g = parser.add_argument_group("export")
    g.add_argument("run", nargs="?", metavar="RUN", help="folder of a trained run")
    add(
        g,
        "to",
        choices=("onnx", "torch", "timm", "hub"),
        default="onnx",
        help="onnx and torch: one graph from uint8 pixels to probabilities; timm: a "
        "folder for timm.create_model; hub: the same, and --push",
    )
    add(
        g,
        "precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="of the ONNX file; fp16 and int8 are checked on held-out images",
    )
    add(
        g,
        "max_accuracy_drop",
        default=1.0,
        help="points that fp16 and int8 may lose, else nothing is written",
    )
    add(
        g,
        "dataset",
        help="where the data set is now, whose held-out images check the "
        "export; unset: as in training, or made-up images where it is gone",
    )
    add(g, "license", help="for the card's metadata, as apache-2.0; unset: left out")
    add(
        g,
        "push",
        metavar="OWNER/NAME",
        help="upload the folder of --to hub; never without this flag",
    )
    add(g, "private", action=Switch, default=True, help="push a model that only its owner can see")


def cam_flags(parser):
    g = parser.add_argument_group("network")
    g.add_argument("run", nargs="?", metavar="RUN", help="folder of a trained run")
    add(g, "model", help=f"instead of a run: {MODEL}")
    add(g, "weights", help="of --model, as for finetune.py; unset: its default ones")
    loading_flags(g)
    g = parser.add_argument_group("images (unset: of the run's own data set)")
    add(g, "images", nargs="+", metavar="PATH", help="image files, folders, or patterns in quotes")
    add(g, "skip_bad", action=Switch, help="leave out, and name, images that can't be read")
    add(g, "dataset", help="where the data set is now, or another one of the same classes")
    add(g, "image_column", help="only where it has another name than in training")
    add(g, "label_column", help="only where it has another name than in training")
    add(
        g,
        "region_column",
        help="a column with a box [left, top, right, bottom] in pixels or a "
        "mask: --check measures the heat in it",
    )
    add(
        g,
        "split",
        choices=("train", "val", "test"),
        help="unset: val where there is one, else test",
    )
    add(
        g,
        "indices",
        commas=True,
        type=numbers,
        metavar="N,N,…",
        help="only these images of the split",
    )
    add(
        g,
        "only",
        choices=("all", "wrong", "right"),
        help="unset: all; of a split, as many wrong as right ones where there are enough",
    )
    add(g, "max_images", help="unset: 16 of a split, all of --images")
    g = parser.add_argument_group("maps")
    add(
        g,
        "method",
        default="gradcam",
        help="gradcam, gradcam++, hirescam, layercam, eigencam, scorecam; several with "
        "commas stand side by side",
    )
    add(g, "layer", help="a module's name; unset: the last one with a spatial output")
    add(
        g,
        "target",
        default="predicted",
        help="the class to explain: predicted, true, a name or a number",
    )
    add(g, "contrast", action=Switch, help="the true class and the predicted one side by side")
    add(g, "all_classes", action=Switch, help="every class, the likeliest 8 are drawn")
    add(
        g,
        "check",
        action=Switch,
        help="deletion and insertion, a re-initialised network, heat in the region",
    )
    g = parser.add_argument_group("pictures")
    add(g, "alpha", default=0.6, help="opacity of the hottest place")
    add(g, "colormap", default="inferno", help="one of matplotlib's")


def colours(name):
    """An argparse type: three numbers with commas, or one for all, in the bounds of `name`."""

    def convert(text):
        values = [BOUNDS[name](number) for number in text.split(",")]
        if len(values) not in (1, 3):
            raise argparse.ArgumentTypeError(f"{shortened(text)} is not one number or three")
        return values * (3 // len(values))

    convert.__name__ = "numbers"
    return convert


def numbers(text):
    """An argparse type: whole numbers of at least 0, with commas."""
    return [BOUNDS["indices"](number) for number in text.split(",")]


def metric_names(text):
    """An argparse type: names of METRICS, with commas."""
    names = words_of(text)
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(
                f'"{shortened(name)}" is not one of {", ".join(METRICS)}{nearest(name, METRICS)}'
            )
    return names


def shares(text):
    """An argparse type: numbers of at least 0, not all 0, scaled to the sum 1."""
    values = [BOUNDS["member_weights"](number) for number in text.split(",")]
    if not sum(values):
        raise argparse.ArgumentTypeError(f"{text}: at least one must be above 0")
    return [value / sum(values) for value in values]


def running_flags(parser, precision=True, trains=True):
    g = parser.add_argument_group("running")
    if precision:
        add(
            g,
            "mixed_precision",
            common=True,
            choices=("auto", "no", "bf16", "fp16"),
            default="auto",
            help="auto: what the launcher says, else bf16 where the device computes it",
        )
    add(
        g,
        "threads",
        operational=True,
        help="CPU threads a process; unset: all cores, shared"
        + (". A resumed run keeps its own" if trains else ""),
    )
    add(g, "seed", common=True, data=True, default=42, help="of everything random")
    add(g, "dry_run", common=True, one_command=True, action=Switch, help="print the plan and stop")


def folder_flags(parser, name):
    g = parser.add_argument_group("output")
    add(
        g,
        "output_dir",
        common=True,
        operational=True,
        default="runs",
        help="folder that holds the runs",
    )
    add(g, "run_name", common=True, operational=True, type=run_name, help=f"unset: {name}")
    return g


def report_flags(parser, name="DATASET-MODEL-sSEED"):
    g = folder_flags(parser, name)
    add(
        g,
        "report_to",
        common=True,
        operational=True,
        default="wandb",
        help="wandb,tensorboard or none",
    )
    add(
        g,
        "project",
        operational=True,
        default="image-classification",
        help="the trackers' project",
    )
    add(g, "group", operational=True, help="the trackers' group, for runs that belong together")
    return g


def output_flags(parser):
    g = report_flags(parser)
    add(
        g,
        "overwrite",
        common=True,
        one_command=True,
        action=Switch,
        help="replace the run of that name",
    )
    add(g, "log_model", operational=True, action=Switch, help="upload the result as a W&B artifact")
    add(
        g,
        "logging_steps",
        default=50,
        help="steps between metrics, which are written once an epoch at least",
    )
    add(
        g,
        "metrics",
        operational=True,
        commas=True,
        type=metric_names,
        metavar="NAME,NAME,…",
        help=f"what evaluations compute besides loss and acc: {', '.join(METRICS[2:])} (average "
        "precision)",
    )
    add(
        g,
        "select_by",
        choices=METRICS,
        default="acc",
        help="the epoch with the best value of this metric on val is the result",
    )
    add(
        g,
        "slice_by",
        operational=True,
        commas=True,
        type=words_of,
        metavar="NAME,NAME,…",
        help="groups by which the report gives the accuracy: columns of the data set, or "
        "brightness, size, aspect of the images",
    )
    add(
        g,
        "eval_epochs",
        default=1,
        help="epochs between evaluations; the last epoch is always evaluated",
    )
    add(
        g,
        "checkpointing_steps",
        operational=True,
        default="epoch",
        help="optimizer steps between checkpoints, or epoch",
    )
    add(g, "max_checkpoints", operational=True, default=2, help="newest ones kept")
    add(
        g,
        "keep_checkpoints",
        operational=True,
        choices=("final", "all"),
        default="final",
        help="once the run is finished and its result is on the disk. final: keep only the "
        "result; all: the newest checkpoints, too",
    )
    add(
        g,
        "resume_from_checkpoint",
        common=True,
        one_command=True,
        metavar="auto|PATH",
        help="auto: continue this run from its newest valid checkpoint, or start it; a "
        "path: continue from this one, checkpoints/step-*",
    )
    add(
        g,
        "stop_after",
        one_command=True,
        help="optimizer steps, then a checkpoint and exit 0; the schedule is that of the whole run",
    )
    add(
        g,
        "deterministic",
        action=Switch,
        help="algorithms that give the same bits every time, on a GPU too; slower there",
    )
