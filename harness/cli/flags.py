"""Flags: what the scripts share, YAML recipes, and errors that name the nearest valid thing.

Nothing here imports torch, so `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

import yaml

from harness.cli.bounds import BOUNDS, MANY, whole
from harness.cli.strict_yaml import MOST_CHARACTERS, read_yaml
from harness.errors import nearest, shortened

SCRIPTS = Path(__file__).resolve().parents[2]  # where train.py, recipes/ and the others are
OF_ONE_COMMAND = {
    "config", "given", "overwrite", "dry_run", "stop_after", "resume_from_checkpoint",
}  # fmt: skip

STRATEGIES = ("feature_extraction", "staged", "full", "auto")

NAME_BYTES = 255  # of a file or a folder, on every file system in use

MODEL = (
    "a classifier of torchvision or timm (timm/NAME.TAG where both have it), or hf-hub:owner/name"
)

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's

WITH_COMMAS = {
    "indices",
    "member_weights",
    "mean",
    "std",
    "metrics",
    "slice_by",
}  # several in one word

METRICS = ("loss", "acc", "top5", "balanced_acc", "macro_f1", "ece", "auroc", "ap")
IMBALANCE = ("none", "logit_adjustment", "class_weights", "balanced", "sqrt")

AUGMENTS = ("none", "basic", "autoaugment", "randaugment", "trivialaugment")

# Flags that a stage of a fine-tune may have of its own.
STAGE_FLAGS = {
    "warmup_epochs", "layer_decay", "bn_mode", "views", "augment", "crop_scale", "crop_padding",
    "flip", "flip_prob", "randaugment_ops", "randaugment_magnitude", "random_erasing",
    "mixup_alpha", "cutmix_alpha", "mix_prob", "label_smoothing", "imbalance", "imbalance_tau",
}  # fmt: skip

# Flags that change where a run is written and what it tells, never what it computes: the only ones
# that may differ between a checkpoint and the command that resumes it. (A run that met a number
# that is not finite, and stopped, may go on with --nonfinite skip.)
OPERATIONAL = {
    "config", "output_dir", "run_name", "overwrite", "dry_run", "report_to", "project", "group",
    "log_model", "threads", "checkpointing_steps", "max_checkpoints", "resume_from_checkpoint",
    "prepare_data", "stop_after", "metrics", "slice_by", "nonfinite", "verify_cache",
    "gradient_accumulation_steps",
}  # fmt: skip


def run_name(text):
    """An argparse type: a name that is one folder and stays inside `--output_dir`."""
    if not text or text in (".", "..") or any(c in text for c in "/\\\0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder name (no slashes, no NUL)")
    if len(os.fsencode(text)) > NAME_BYTES:
        raise argparse.ArgumentTypeError(
            f"{shortened(text)} is not a folder name: it is longer than {NAME_BYTES} bytes"
        )
    return text


class Switch(argparse.Action):
    """`--name` turns on, `--no_name` turns off; `--name=true` and `--name=false` do as well."""

    def __init__(self, option_strings, dest, default=False, help=None, **_):
        names = [*option_strings, *(f"--no_{o[2:]}" for o in option_strings)]
        super().__init__(names, dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


# Flags of other trainers -> what the flag is called here
ELSEWHERE = {
    "no_wandb": "report_to", "use_wandb": "report_to", "images_dir": "dataset",
    "learning_rate": "lr", "base_lr": "lr", "wd": "weight_decay", "bs": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size", "num_epochs": "epochs", "num_train_epochs": "epochs",
    "max_train_steps": "max_steps", "arch": "model", "model_name": "model",
    "model_name_or_path": "model", "backbone": "model", "pretrained": "weights",
    "dataset_name": "dataset", "data": "dataset", "data_dir": "dataset", "data_path": "dataset",
    "train_dir": "dataset", "image_column_name": "image_column",
    "label_column_name": "label_column", "train_val_split": "val_fraction",
    "img_size": "image_size", "imgsz": "image_size", "resolution": "image_size",
    "opt": "optimizer", "optim": "optimizer",
    "sched": "schedule", "scheduler": "schedule", "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule", "num_warmup_steps": "warmup_epochs",
    "lr_warmup_steps": "warmup_epochs", "lr_warmup_epochs": "warmup_epochs",
    "max_grad_norm": "clip_grad_norm", "clip_grad": "clip_grad_norm", "mixup": "mixup_alpha",
    "cutmix": "cutmix_alpha", "smoothing": "label_smoothing", "aa": "augment",
    "class_weights": "imbalance", "class_weight": "imbalance", "balanced_sampling": "imbalance",
    "weighted_sampler": "imbalance",
    "auto_augment": "augment", "reprob": "random_erasing", "random_erase": "random_erasing",
    "model_ema_decay": "ema_decay", "use_ema": "ema_decay", "model_ema": "ema_decay",
    "checkpoints_total_limit": "max_checkpoints", "resume": "resume_from_checkpoint",
    "output": "output_dir", "tracker_project_name": "project", "amp": "mixed_precision",
    "fp16": "mixed_precision", "bf16": "mixed_precision",
    "grad_accum_steps": "gradient_accumulation_steps", "with_tracking": "report_to",
    "eval_metric": "select_by", "metric_for_best_model": "select_by",
    "drop": "dropout", "print_freq": "logging_steps", "log_interval": "logging_steps",
}  # fmt: skip
UNNEEDED = (
    {  # flags of other trainers, and of versions before, that nothing here needs
        "verify_resume": "it is a command of its own now: python -m harness.training.verify_resume "
        "STEPS accelerate launch train.py [flags]",
    }
    | {
        name: "images are decoded once and augmented in batches: there are no loader workers"
        for name in (
            "workers",
            "num_workers",
            "dataloader_num_workers",
            "preprocessing_num_workers",
        )
    }
    | {
        name: "Accelerate chooses the device; accelerate launch --cpu takes the CPU"
        for name in ("device", "gpu", "gpus", "cuda", "no_cuda", "gpu_ids")
    }
)


def _hint(flag, known):
    """What to say behind an unknown flag; known: names without dashes."""
    name = flag.lstrip("-").replace("-", "_")
    if name in UNNEEDED:
        return f": {UNNEEDED[name]}"
    if ELSEWHERE.get(name) in known:
        return f": here it is --{ELSEWHERE[name]}"
    dashes = "--" if flag.startswith("--") else ""
    return nearest(flag, [f"{dashes}{name}" for name in known])


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or isinstance(action, argparse._HelpAction):
            return action.help
        default = "on" if action.default is True else "off" if action.default is False else None
        return f"{action.help} (default: {default or '%(default)s'})"


class Parser(argparse.ArgumentParser):
    """ArgumentParser with `--config FILE.yaml`, dashes or underscores, and one-line errors."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=_Help, allow_abbrev=False, add_help=True
        )
        self.where = ""  # the recipe being read, named in errors
        self.add_argument(
            "--config",
            metavar="FILE.yaml",
            help="a recipe: flags as `name: value`; the command line wins",
        )

    def error(self, message):
        message = message.replace("argument ", "", 1)
        message = re.sub(r"\S{300,}", lambda word: shortened(word[0]), message)
        self.exit(2, f"{self.prog}: {self.where}{message}\n")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                action,
                f'"{value}" is not one of {", ".join(map(str, action.choices))}'
                f"{nearest(value, action.choices)}",
            )

    def read(self, argv=None):
        """Parse `argv` over the recipe it names, over the defaults.

        Returns the namespace; its attribute `given` maps each flag that is not at its default
        to where it was said (a recipe's path, or "command line").
        """
        if sys.platform == "win32":  # no fork, flock or process signals as the run relies on
            self.error("Windows is not supported; WSL, which is a Linux, runs it")
        argv = [_underscored(a) for a in (sys.argv[1:] if argv is None else argv)]
        argv = [self._switched(word) for word in argv]
        command_line = self._said(argv)
        recipe = argparse.Namespace()
        if getattr(command_line, "config", None):
            self.where = f"{command_line.config}: "
            recipe = self._said(self._recipe_argv(command_line.config))
            self.where = ""
        defaults = {a.dest: a.default for a in self._actions if a.default is not argparse.SUPPRESS}
        given = {name: command_line.config for name in vars(recipe)}
        given |= {name: "command line" for name in vars(command_line) if name != "config"}
        merged = defaults | vars(recipe) | vars(command_line)
        return argparse.Namespace(
            **merged, given={k: v for k, v in given.items() if merged[k] != defaults[k]}
        )

    def _switched(self, word):
        """`--name=true` of a switch, as `wandb sweep` writes it, as --name or --no_name."""
        name, equals, value = word.partition("=")
        switches = {a.dest for a in self._actions if isinstance(a, Switch)}
        if not equals or name[2:] not in switches:
            return word
        if value.lower() not in ("true", "false"):
            self.error(f'{name}: "{value}" is not true or false')
        return name if value.lower() == "true" else f"--no_{name[2:]}"

    def _said(self, argv):
        """Only what `argv` says: argparse fills no default where an attribute exists already."""
        unsaid = object()
        namespace = argparse.Namespace(**{action.dest: unsaid for action in self._actions})
        positional = any(not action.option_strings for action in self._actions)
        parse = self.parse_known_intermixed_args if positional else self.parse_known_args
        namespace, unknown = parse(argv, namespace)
        if unknown:
            options = [o[2:] for a in self._actions for o in a.option_strings if o.startswith("--")]
            names = [word.split("=")[0] for word in unknown if word.startswith("-")]
            if not names:
                self.error(f"unexpected word {unknown[0]}: a value goes behind its flag")
            first, *others = (name + _hint(name, options) for name in dict.fromkeys(names))
            self.error("unknown flag " + "; ".join([first, *others]))
        # No words at all for a positional argument are said by nobody
        said = {k: v for k, v in vars(namespace).items() if v is not unsaid and v not in ([], None)}
        return argparse.Namespace(**said)

    def _recipe_argv(self, path):
        """The recipe as command-line words, so that one set of checks serves both."""
        try:
            beside = SCRIPTS / path  # from another working directory
            file = beside if beside.is_file() and not Path(path).exists() else Path(path)
            with file.open(encoding="utf-8") as opened:
                flags = read_yaml(opened.read(MOST_CHARACTERS + 1)) or {}
        except OSError as error:
            self.error(f"cannot read the recipe: {error.strerror}")
        except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no path at all
            self.error(f"is not YAML: {' '.join(str(error).split())}")
        if not isinstance(flags, dict):
            self.error("a recipe is lines of `flag: value`")
        return self._argv(flags)

    def _argv(self, flags):
        """{"lr": 0.1} as command-line words; names that are no flag are refused."""
        known = {a.dest: a for a in self._actions}
        argv, said = [], set()
        for key, value in flags.items():
            action = known.get(str(key).replace("-", "_"))
            if action is None or key in ("help", "config"):
                self.error(
                    f'unknown flag "{key}"{_hint(str(key), set(known) - {"help", "config"})}'
                )
            if action.dest in said:
                self.error(f'{key}: it is there twice, as "{action.dest}", too')
            said.add(action.dest)
            if isinstance(action, Switch):
                if not isinstance(value, bool):
                    self.error(f'{key}: "{value}" is not true or false')
                argv.append(f"--{'' if value else 'no_'}{action.dest}")
            elif value is False and "no" in (action.choices or ()):
                argv.append(f"--{action.dest}=no")  # an unquoted no is false in YAML
            elif not action.option_strings and value is not None:  # before all that takes several
                argv = [*map(str, value if isinstance(value, list) else [value]), *argv]
            elif isinstance(value, list) and action.dest in WITH_COMMAS:
                argv.append(f"--{action.dest}={','.join(map(str, value))}")
            elif isinstance(value, list) and action.nargs == "+":
                argv += [f"--{action.dest}", *map(str, value)]
            elif isinstance(value, list) and action.type == self.stages:
                argv.append(f"--{action.dest}={json.dumps(value)}")
            elif isinstance(value, (list, dict, bool)):
                hint = (
                    " (off and no are words for false in YAML: write 0)" if value is False else ""
                )
                self.error(f'{key}: "{_in_words(value)}" is not one value{hint}')
            elif value is not None:
                argv.append(f"--{action.dest}={value}")
        return argv

    def stages(self, text):
        """An argparse type: the stages of a fine-tune, YAML (or JSON) text -> a list of dicts.

        Each has "epochs" and "train" ({module prefix: learning rate}), perhaps a "name", and any
        of STAGE_FLAGS, checked as on the command line.
        """
        try:
            stages = read_yaml(text)
        except yaml.YAMLError as error:
            raise argparse.ArgumentTypeError(f"not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(stages, list) or not stages:
            raise argparse.ArgumentTypeError("wants a list of stages, [{epochs: …, train: …}, …]")
        return [self._stage(n, stage) for n, stage in enumerate(stages, start=1)]

    def _stage(self, n, stage):
        known = ("name", "epochs", "train", *sorted(STAGE_FLAGS))
        if not isinstance(stage, dict):
            raise argparse.ArgumentTypeError(f"stage {n}: wants lines of `key: value`")
        for key in stage:
            if key not in known:
                raise argparse.ArgumentTypeError(
                    f'stage {n}: unknown key "{key}"{nearest(key, known)} '
                    f"(a stage has {', '.join(known)})"
                )
        missing = [key for key in ("epochs", "train") if key not in stage]
        if missing:
            raise argparse.ArgumentTypeError(f"stage {n}: {' and '.join(missing)} missing")
        if not isinstance(stage["train"], dict) or not stage["train"]:
            raise argparse.ArgumentTypeError(
                f"stage {n}: train: wants lines of `module: learning rate`, at least one"
            )
        try:
            convert, key, value = BOUNDS["epochs"], "epochs", stage["epochs"]
            epochs = convert(str(value))
            convert, rates = BOUNDS["lr"], {}
            for key, value in stage["train"].items():
                rates[str(key)] = convert(str(value))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"stage {n}: {key}: {error}") from None
        except ValueError:
            raise argparse.ArgumentTypeError(
                f'stage {n}: {key}: "{value}" is not a {convert.__name__}'
            ) from None
        own = {key: value for key, value in stage.items() if key in STAGE_FLAGS}
        before, self.where = self.where, f"{self.where}stage {n}: "
        own = vars(self._said(self._argv(own)))
        self.where = before
        name = {"name": str(stage["name"])} if stage.get("name") else {}
        return {**name, "epochs": epochs, "train": rates, **own}


def _in_words(value):
    """A value of a recipe as it is written there: [0.1, 0.2], {a: 1}."""
    if isinstance(value, list):
        text = f"[{', '.join(map(_in_words, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{k}: {_in_words(v)}' for k, v in value.items())}}}"
    else:
        text = str(value)
    return shortened(text)


def _underscored(word):
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def to_recipe(args):
    """The flags of a run as a plain dict that `--config` reads back, defaults included.

    Without those that say how one command went about it: resumed, stopped early, overwriting.
    """
    return {k: v for k, v in sorted(vars(args).items()) if k not in OF_ONE_COMMAND}


def to_yaml(args) -> bytes:
    """config.yaml: `to_recipe` as YAML."""
    return yaml.safe_dump(to_recipe(args), sort_keys=True, allow_unicode=True).encode()


def bounded(group, name, **words):
    """Declare a number: `--name`, with its line in BOUNDS."""
    group.add_argument(f"--{name}", type=BOUNDS[name], **words)


# fmt: off
def verify_cache(group):
    group.add_argument("--verify_cache", action=Switch, default=False,
                       help="compare all decoded or packed images in the cache with their hashes, "
                       "about a second a GB; else a sample of them")


def data_flags(parser, dataset):
    g = parser.add_argument_group("data")
    g.add_argument(
        "--dataset", default=dataset,
        help="digits, cifar10, cifar100, flowers102, a Hub id, or a local folder "
        "(parquet, save_to_disk, class folders, or images with a table of labels)",
    )
    g.add_argument("--layout", choices=("auto", "classes", "splits"), default="auto",
                   help="of a folder of images. classes: every folder is a class; splits: every "
                   "folder with a split's name is a split")
    g.add_argument("--label_pattern", metavar="REGEX",
                   help="the class is what its one group matches in the path of each image, "
                   "relative to --dataset: '/(cat|dog)[.]' for train/cat.0.jpg")
    g.add_argument("--labels", metavar="FILE",
                   help="a table of the labels (.csv, .tsv, .jsonl, .parquet), or one for each "
                   "split: train=FILE,val=FILE")
    g.add_argument("--file_column", help="of the table; only where it cannot be inferred")
    g.add_argument("--classes", metavar="FILE",
                   help="the names of the classes in order, a line each; unset: in text order, "
                   "whole numbers by value")
    g.add_argument("--empty_classes", choices=("refuse", "drop", "keep"), default="refuse",
                   help="classes without an image in train: stop, leave them out, or keep them")
    bounded(g, "bit_depth",
            help="of 16-bit gray images: 12 where values end at 4095; unset: as the files "
            "say, else 16")
    g.add_argument("--image_column", help="only where it cannot be inferred")
    g.add_argument("--label_column", help="only where it cannot be inferred")
    g.add_argument("--train_split", help="only where it is not called train")
    g.add_argument("--val_split", help="unset: validation, valid, val or dev; none: without")
    g.add_argument("--test_split", help="unset: test; none: without")
    bounded(g, "val_fraction", default=0.0,
            help="hold out this stratified part of train, keep the epoch that is best on "
            "it; 0: train on all, the last weights are the result")
    g.add_argument("--fold", metavar="I/K",
                   help="cross-validation: hold out the I-th of K stratified parts of train; "
                   "ensemble_eval.py scores K such runs as one")
    g.add_argument("--group_column", metavar="NAME",
                   help="a column (patient, video), or folder, each image's own: images with the "
                   "same value stay on one side of --val_fraction and --fold")
    g.add_argument("--group_pattern", metavar="REGEX",
                   help="the same by what its one group matches in the path of each image, "
                   "'/(patient[0-9]+)_'")
    bounded(g, "max_train_samples", help="images; cut for a quick look")
    bounded(g, "max_eval_samples", help="images; cut for a quick look")
    g.add_argument("--pixels", choices=("auto", "decoded", "packed"), default="auto",
                   help="what is kept of the images on the disk. decoded: the pixels of one square "
                   "each; packed: whole images as JPEG, from which crops are cut; auto: as the "
                   "plan says")
    g.add_argument("--prepare_data", action=Switch, default=False,
                   help="decode or pack the images, and stop: the same command without it finds "
                   "them")
    verify_cache(g)
    g.add_argument("--bad_images", choices=("stop", "skip"), default="stop",
                   help="that can't be read: stop and name the first one, or leave them out, "
                   "count and name them (one more pass of decoding, once)")
    return g


def shard_flag(g):
    g.add_argument("--shard_store", action=Switch, default=False,
                   help="several machines: each packs and draws from its own share of the train "
                   "images only, dealt by a fixed rule; the order depends on how many machines "
                   "there are")


def model_flags(parser, model):
    g = parser.add_argument_group("model")
    g.add_argument("--model", default=model, help=MODEL)
    bounded(g, "image_size", help="pixels a side; unset: the weights' own, else the data set's")
    g.add_argument("--stem", choices=("auto", "small", "standard"), default="auto",
                   help="small: 3x3 without max-pool; auto: small up to 64 pixels")
    g.add_argument("--weights", default="none",
                   help="none, default, a torchvision weights name or timm tag, "
                   "hf-hub:owner/name, a run folder, or a file (FILE:KEY for one of several "
                   "states)")
    loading_flags(g)
    g.add_argument("--init", choices=("auto", "kaiming", "own"), default="auto",
                   help="kaiming: normal, fan_out; own: the model's; auto: kaiming for networks "
                   "with BatchNorm")
    bounded(g, "dropout", help="probability before the head, 0: off; unset: the model's own")


def loading_flags(g):
    g.add_argument("--weights_by_order", action=Switch,
                   help="give the file's tensors out in order, whatever their names: only shapes "
                   "are checked")
    g.add_argument("--mean", type=colours("mean"), metavar="R,G,B",
                   help="of pixels in [0, 1]; unset: as the weights say, else the data set's")
    g.add_argument("--std", type=colours("std"), metavar="R,G,B", help="the same")
    g.add_argument("--interpolation", choices=FILTERS,
                   help="of resizing; unset: as the weights say, else bilinear")
    bounded(g, "crop_pct",
            help="what the network sees of the resized side; unset: as the weights say")


def transfer_flags(parser):
    g = parser.add_argument_group("transfer")
    g.add_argument("--strategy", choices=STRATEGIES, default="staged",
                   help="feature_extraction: a new head on the frozen network; staged: unfrozen "
                   "from the head down; full: everything from the first step; auto: measures, "
                   "then chooses. Each has epochs and rates of its own where --epochs and --lr "
                   "are unset")
    g.add_argument("--head", choices=("linear", "mlp"), default="linear",
                   help="mlp: Dropout 0.5, Linear 256, ReLU, Dropout 0.3, Linear")
    g.add_argument("--stages", type=parser.stages, metavar="YAML",
                   help="of staged: a list of {epochs: …, train: {module: lr}}, best in a recipe; "
                   "unset: head; + last blocks; everything")
    bounded(g, "layer_decay",
            help="factor on a block's learning rate for each block between it and the "
            "end; 1: off; unset: 0.75 for full, 1 for staged")
    g.add_argument("--bn_mode", choices=("auto", "eval", "train", "all"), default="auto",
                   help="which BatchNorm layers adapt their statistics. eval: none; train: those "
                   "of trained parts; all: those of frozen parts too; auto: none of a pretrained "
                   "network, those of trained parts from scratch")
    bounded(g, "views", default=2,
            help="augmented views of each image whose features are kept while only the "
            "head trains; 1: no augmentation; 0: the network runs anew every step")


def optimization_flags(parser, optimizers=("sgd", "adamw")):
    g = parser.add_argument_group("optimization")
    bounded(g, "batch_size", default=128,
            help="images one optimizer step sees, over all processes and accumulation")
    bounded(g, "gradient_accumulation_steps", default=1,
            help="parts the batch is cut into on each process; 1: off")
    bounded(g, "epochs", default=100, help="passes over train")
    bounded(g, "max_steps", help="optimizer steps; overrides --epochs")
    g.add_argument("--optimizer", choices=optimizers, default="sgd", help="update rule")
    bounded(g, "lr", default=0.1, help="peak learning rate")
    bounded(g, "momentum", default=0.9, help="of sgd and muon; beta1 of adamw")
    g.add_argument("--nesterov", action=Switch, default=True,
                   help="Nesterov momentum of sgd and muon")
    bounded(g, "weight_decay", default=5e-4, help="of weights; 0: off")
    bounded(g, "norm_weight_decay", default=0.0, help="of norms and biases; 0: off")
    bounded(g, "warmup_epochs", default=5.0,
            help="epochs of linear warm-up before the cosine; 0: off")
    g.add_argument("--nonfinite", choices=("stop", "skip"), default="stop",
                   help="at a loss or gradient that is not finite; skip: no process updates, up to "
                   "10 steps in a row; without a fused optimizer (fp16) the host then waits for "
                   "the device at every step")
    bounded(g, "clip_grad_norm", default=1.0, help="L2 norm; 0: off")
    bounded(g, "ema_decay", default=0.9999,
            help="of the averaged weights; warmed up as min(d, (1+t)/(10+t)); 0: off")
    bounded(g, "label_smoothing", default=0.1, help="mass spread over all classes; 0: off")
    g.add_argument("--imbalance", choices=IMBALANCE, default="none",
                   help="for uneven classes. logit_adjustment: the log of their "
                   "shares is added to the logits in the loss; class_weights: the loss is weighed "
                   "by inverse frequency; balanced: every class comes equally often; sqrt: by the "
                   "square root of its images")
    bounded(g, "imbalance_tau", default=1.0,
            help="τ of logit_adjustment: 1 for classes that count equally, 0: off")
    return g


def speed_flags(group):
    """What gets from scratch to an accuracy in few steps, in the group of optimization_flags."""
    g = group
    g.add_argument("--schedule", choices=("cosine", "linear"), default="cosine",
                   help="how the rate falls after the warm-up; linear: for few epochs")
    bounded(g, "head_lr", help="peak learning rate of the last layer's weights; unset: --lr")
    bounded(g, "bias_lr", help="peak learning rate of norms and biases; unset: --lr")
    bounded(g, "start_size",
            help="pixels a side in the first step, growing to the full size over 60 %% of "
            "the steps; unset: off")
    g.add_argument("--tta", default="none", metavar="VIEWS",
                   help="the result is scored over several views, too: flip, shift, crops:N, "
                   "random:N; none: off")


def augmentation_flags(parser):
    g = parser.add_argument_group("augmentation")
    g.add_argument("--augment", choices=AUGMENTS, default="randaugment",
                   help="basic: crop + flip; the others add their operations to it")
    bounded(g, "flip_prob", default=0.5, help="horizontal flip; 0: off")
    g.add_argument("--flip", choices=("random", "alternating"), default="random",
                   help="alternating: drawn once an image, then every epoch the other way")
    bounded(g, "crop_scale", default=0.0,
            help="random resized crop of at least this share of the area; 0: the padded "
            "crop instead")
    bounded(g, "crop_padding", help="pixels; 0: no random crop; unset: an eighth of the image")
    bounded(g, "randaugment_ops", default=2, help="operations an image")
    bounded(g, "randaugment_magnitude", default=9, help="strength, 0 to 30")
    bounded(g, "random_erasing", default=0.25, help="probability; 0: off")
    bounded(g, "mixup_alpha", default=0.2, help="Beta parameter; 0: off")
    bounded(g, "cutmix_alpha", default=1.0, help="Beta parameter; 0: off")
    bounded(g, "mix_prob", default=1.0,
            help="part of the steps that mix (mixup or CutMix at even odds); 0: off")


def ensemble_flags(parser):
    g = parser.add_argument_group("members")
    g.add_argument("members", nargs="*", metavar="RUN", help="folders of trained runs")
    g.add_argument("--average", choices=("probabilities", "logits"), default="probabilities",
                   help="what the members' average is of")
    g.add_argument("--member_weights", type=shares, metavar="W,W,…",
                   help="one a member, scaled to the sum 1; unset: fitted on validation images")
    g.add_argument("--soup", action=Switch, default=True,
                   help="average the weights, too, of members that share an architecture")
    g.add_argument("--tta", default="none", metavar="VIEWS",
                   help="none, flip, shift, crops:N, random:N; several with commas: the first is "
                   "what the combinations see, each is compared with none")
    g = parser.add_argument_group("data (unset: as the members were trained)")
    g.add_argument("--dataset", help="where the data set is now, or another one of the same "
                   "classes")
    g.add_argument("--image_column", help="only where it has another name than in training")
    g.add_argument("--label_column", help="only where it has another name than in training")
    g.add_argument("--split", choices=("test", "val"),
                   help="scored images; unset: test where there is one, else val")
    g.add_argument("--max_eval_samples", type=whole(2, MANY), help="images; cut for a quick look")
    verify_cache(g)


def predict_flags(parser):
    g = parser.add_argument_group("networks and images")
    g.add_argument("inputs", nargs="*", metavar="RUN [RUN …] PATH…",
                   help="folders of trained runs, then image files, folders, or patterns in quotes")
    g.add_argument("--dataset", help="instead of paths: a Hub id or a folder, as for training")
    g.add_argument("--split", help="of --dataset, by its own name; unset: the first")
    g.add_argument("--image_column", help="only where it cannot be inferred")
    g.add_argument("--label_column", help="unset: as in training; where it holds the run's "
                   "classes, predictions are scored")
    g = parser.add_argument_group("predictions")
    g.add_argument("--tta", default="none", metavar="VIEWS", help="none, flip, shift, crops:N, "
                   "random:N: the average over several views of each image")
    bounded(g, "top_k", default=5, help="classes of each image that are written")
    bounded(g, "min_probability", help="of the likeliest class, under which to abstain")
    bounded(g, "coverage", help="give each image a set of classes that holds the right one at "
            "least so often; wants the run's data set, for its held-out images")
    g.add_argument("--sets", choices=("threshold", "adaptive"), default="threshold",
                   help="threshold: the smallest sets on average; adaptive: larger for hard images")
    g.add_argument("--format", choices=("csv", "jsonl", "parquet"), default="csv",
                   help="of the predictions")


def export_flags(parser):
    g = parser.add_argument_group("export")
    g.add_argument("run", nargs="?", metavar="RUN", help="folder of a trained run")
    g.add_argument("--to", choices=("onnx", "torch", "timm", "hub"), default="onnx",
                   help="onnx and torch: one graph from uint8 pixels to probabilities; timm: a "
                   "folder for timm.create_model; hub: the same, and --push")
    g.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32",
                   help="of onnx; the others are judged on held-out images")
    bounded(g, "max_accuracy_drop", default=1.0,
            help="points that fp16 and int8 may lose, else nothing is written")
    g.add_argument("--dataset", help="where the data set is now, whose held-out images check the "
                   "export; unset: as in training, made-up images where that is gone")
    g.add_argument("--license", help="for the card's metadata, as apache-2.0; unset: left out")
    g.add_argument("--push", metavar="OWNER/NAME", help="upload the folder of --to hub; never "
                   "without this flag")
    g.add_argument("--private", action=Switch, default=True, help="who may see what is pushed")


def cam_flags(parser):
    g = parser.add_argument_group("network")
    g.add_argument("run", nargs="?", metavar="RUN", help="folder of a trained run")
    g.add_argument("--model", help=f"instead of a run: {MODEL}")
    g.add_argument("--weights",
                   help="of --model, as for finetune.py; unset: its default ones")
    loading_flags(g)
    g = parser.add_argument_group("images (unset: of the run's own data set)")
    g.add_argument("--images", nargs="+", metavar="PATH",
                   help="image files, folders, or patterns in quotes")
    g.add_argument("--skip_bad", action=Switch, help="leave out, and name, images that can't be "
                   "read")
    g.add_argument("--dataset", help="where the data set is now, or another one of the same "
                   "classes")
    g.add_argument("--image_column", help="only where it has another name than in training")
    g.add_argument("--label_column", help="only where it has another name than in training")
    g.add_argument("--region_column", help="of a box [left, top, right, bottom] in pixels or a "
                   "mask: --check measures the heat in it")
    g.add_argument("--split", choices=("train", "val", "test"),
                   help="unset: val where there is one, else test")
    g.add_argument("--indices", type=numbers, metavar="N,N,…", help="just these of the split")
    g.add_argument("--only", choices=("all", "wrong", "right"),
                   help="unset: all, as many of both as there are")
    bounded(g, "max_images", help="unset: 16 of a split, all of --images")
    g = parser.add_argument_group("maps")
    g.add_argument("--method", default="gradcam",
                   help="gradcam, gradcam++, hirescam, layercam, eigencam, scorecam; several with "
                   "commas stand side by side")
    g.add_argument("--layer", help="a module's name; unset: the last one that still has places")
    g.add_argument("--target", default="predicted",
                   help="the class to explain: predicted, true, a name or a number")
    g.add_argument("--contrast", action=Switch,
                   help="the true class and the predicted one side by side")
    g.add_argument("--all_classes", action=Switch, help="every class, the likeliest 8 are drawn")
    g.add_argument("--check", action=Switch,
                   help="deletion and insertion, a re-initialised network, heat in the region")
    g = parser.add_argument_group("pictures")
    bounded(g, "alpha", default=0.6, help="of the hottest place")
    g.add_argument("--colormap", default="inferno", help="one of matplotlib's")


def colours(name):
    """An argparse type: three numbers with commas, or one for all, in the bounds of `name`."""

    def convert(text):
        values = [BOUNDS[name](word) for word in text.split(",")]
        if len(values) not in (1, 3):
            raise argparse.ArgumentTypeError(f"{shortened(text)} is not one number or three")
        return values * (3 // len(values))

    convert.__name__ = "numbers"
    return convert


def numbers(text):
    """An argparse type: whole numbers of at least 0, with commas."""
    return [BOUNDS["indices"](word) for word in text.split(",")]


def names(text):
    """An argparse type: words with commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def metric_names(text):
    """An argparse type: names of METRICS, with commas."""
    found = names(text)
    for name in found:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(
                f'"{shortened(name)}" is not one of {", ".join(METRICS)}{nearest(name, METRICS)}'
            )
    return found


def shares(text):
    """An argparse type: numbers of at least 0, not all 0, scaled to the sum 1."""
    values = [BOUNDS["member_weights"](word) for word in text.split(",")]
    if not sum(values):
        raise argparse.ArgumentTypeError(f"{text}: at least one must be above 0")
    return [value / sum(values) for value in values]


def running_flags(parser, precision=True, trains=True):
    g = parser.add_argument_group("running")
    if precision:
        g.add_argument("--mixed_precision", choices=("auto", "no", "bf16", "fp16"), default="auto",
                       help="auto: what the launcher says, else bf16 where the device computes it")
    bounded(g, "threads", help="CPU threads a process; unset: all cores, shared"
            + (". A resumed run keeps its own" if trains else ""))
    bounded(g, "seed", default=42, help="of everything random")
    g.add_argument("--dry_run", action=Switch, help="print the plan and stop")


def folder_flags(parser, name):
    g = parser.add_argument_group("output")
    g.add_argument("--output_dir", default="runs", help="folder that holds the runs")
    g.add_argument("--run_name", type=run_name, help=f"unset: {name}")
    return g


def report_flags(parser, project, name="DATASET-MODEL-sSEED"):
    g = folder_flags(parser, name)
    g.add_argument("--report_to", default="wandb", help="wandb,tensorboard or none")
    g.add_argument("--project", default=project, help="the trackers' project")
    g.add_argument("--group", help="the trackers' group, for runs that belong together")
    return g


def output_flags(parser, project):
    g = report_flags(parser, project)
    g.add_argument("--overwrite", action=Switch, help="replace the run of that name")
    g.add_argument("--log_model", action=Switch, help="upload the result as a W&B artifact")
    bounded(g, "logging_steps", default=50,
            help="steps between metrics, which are written once an epoch at least")
    g.add_argument("--metrics", type=metric_names, metavar="NAME,NAME,…",
                   help="what evaluations compute besides loss and acc: top5, balanced_acc, "
                   "macro_f1, ece, auroc, ap (average precision)")
    g.add_argument("--select_by", choices=METRICS, default="acc",
                   help="the metric whose best epoch on val is the result")
    g.add_argument("--slice_by", type=names, metavar="NAME,NAME,…",
                   help="the report has the accuracy by group: columns of the data set, or "
                   "brightness, size, aspect of the images")
    bounded(g, "eval_epochs", default=1,
            help="epochs between evaluations; the last epoch is always evaluated")
    bounded(g, "checkpointing_steps", default="epoch",
            help="optimizer steps between checkpoints, or epoch")
    bounded(g, "max_checkpoints", default=2, help="newest ones kept")
    g.add_argument("--resume_from_checkpoint", metavar="auto|PATH",
                   help="auto: continue this run from its newest valid checkpoint, or begin; a "
                   "path: of one, checkpoints/step-*")
    bounded(g, "stop_after",
            help="optimizer steps, then a checkpoint and exit 0; the schedule is that of "
            "the whole run")
    g.add_argument("--deterministic", action=Switch,
                   help="algorithms that give the same bits every time, on a GPU too; slower there")
