"""A parser of flags and YAML recipes, whose errors suggest the nearest valid name."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import yaml

from harness.cli.bounds import BOUNDS
from harness.cli.strict_yaml import MOST_CHARACTERS, read_yaml
from harness.errors import nearest, shortened

SCRIPTS = Path(__file__).resolve().parents[2]  # where train.py, recipes/ and the others are


class Switch(argparse.Action):
    """`--name` turns on, `--no_name` turns off; `--name=true` and `--name=false` do as well."""

    def __init__(self, option_strings, dest, default=False, help=None, **_):
        names = [*option_strings, *(f"--no_{o[2:]}" for o in option_strings)]
        super().__init__(names, dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


# Flags of other trainers -> the name of the flag here
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
    {  # flags of other trainers and of older versions that nothing here needs
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


def _hint(flag, flag_names):
    """The end of the error for an unknown flag. flag_names: of all flags, without dashes."""
    name = flag.lstrip("-").replace("-", "_")
    if name in UNNEEDED:
        return f": {UNNEEDED[name]}"
    if ELSEWHERE.get(name) in flag_names:
        return f": here it is --{ELSEWHERE[name]}"
    dashes = "--" if flag.startswith("--") else ""
    return nearest(flag, [f"{dashes}{name}" for name in flag_names])


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=28)

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or isinstance(action, argparse._HelpAction):
            return action.help
        default = "on" if action.default is True else "off" if action.default is False else None
        return f"{action.help} (default: {default or '%(default)s'})"


class _HelpOnRequest(argparse.Action):
    """--help and --help all."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help() if values == "all" else parser.short_help(), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """ArgumentParser with `--config FILE.yaml`, dashes or underscores, and one-line errors."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=_Help, allow_abbrev=False, add_help=False
        )
        options = {"nargs": "?", "choices": ("all",), "metavar": "all"}
        options["help"] = "the flags in common use; all: every flag"
        self.add_argument("-h", "--help", action=_HelpOnRequest, **options).purposes = {"common"}
        self.where = ""  # the recipe being read, named in errors
        options = {"help": "a recipe: flags as `name: value`; the command line wins"}
        add(self, "config", common=True, one_command=True, metavar="FILE.yaml", **options)

    def named(self, purpose) -> list[str]:
        """The flags that were added with this purpose (see `add`), in the order of --help."""
        return [action.dest for action in self._actions if purpose in _purposes(action)]

    def short_help(self) -> str:
        """--help with the common flags only, where there are many flags."""
        rare = [a for a in self._actions if a.option_strings and "common" not in _purposes(a)]
        rare = rare if len(self._actions) > MANY_FLAGS else []
        help_texts = [action.help for action in rare]
        for action in rare:
            action.help = argparse.SUPPRESS
        self.usage = "%(prog)s [--flag value …]"
        text = self.format_help()
        self.usage = None
        for action, help in zip(rare, help_texts, strict=True):
            action.help = help
        note = f"\n--help all has {len(rare)} more flags.\n" if rare else ""
        return text + note

    def error(self, message):
        message = message.replace("argument ", "", 1)
        message = re.sub(r"\S{300,}", lambda match: shortened(match[0]), message)
        self.exit(2, f"{self.prog}: {self.where}{message}\n")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                action,
                f'"{value}" is not one of {", ".join(map(str, action.choices))}'
                f"{nearest(value, action.choices)}",
            )

    def read(self, argv=None):
        """Parse `argv`, which wins over the recipe that it names, and that over the defaults.

        Returns the namespace; its attribute `given` maps each flag that is not at its default
        to the source of its value (a recipe's path, or "command line").
        """
        if sys.platform == "win32":  # it lacks the fork, flock and signals that runs need
            self.error("Windows is not supported; WSL, which is a Linux, runs it")
        argv = [_with_underscores(a) for a in (sys.argv[1:] if argv is None else argv)]
        argv = [self._switched(argument) for argument in argv]
        command_line = self._parse(argv)
        recipe = argparse.Namespace()
        if getattr(command_line, "config", None):
            self.where = f"{command_line.config}: "
            recipe = self._parse(self._recipe_argv(command_line.config))
            self.where = ""
        defaults = {a.dest: a.default for a in self._actions if a.default is not argparse.SUPPRESS}
        sources = {name: command_line.config for name in vars(recipe)}
        sources |= {name: "command line" for name in vars(command_line) if name != "config"}
        values = defaults | vars(recipe) | vars(command_line)
        return argparse.Namespace(
            **values, given={k: v for k, v in sources.items() if values[k] != defaults[k]}
        )

    def _switched(self, argument):
        """`--name=true` of a switch, as `wandb sweep` writes it, as --name or --no_name."""
        name, equals, value = argument.partition("=")
        switches = {a.dest for a in self._actions if isinstance(a, Switch)}
        if not equals or name[2:] not in switches:
            return argument
        if value.lower() not in ("true", "false"):
            self.error(f'{name}: "{value}" is not true or false')
        return name if value.lower() == "true" else f"--no_{name[2:]}"

    def _parse(self, argv):
        """The flags in `argv` alone: argparse fills in no default where the attribute exists."""
        unset = object()
        namespace = argparse.Namespace(**{action.dest: unset for action in self._actions})
        positional = any(not action.option_strings for action in self._actions)
        parse = self.parse_known_intermixed_args if positional else self.parse_known_args
        namespace, unknown = parse(argv, namespace)
        if unknown:
            options = [o[2:] for a in self._actions for o in a.option_strings if o.startswith("--")]
            names = [argument.split("=")[0] for argument in unknown if argument.startswith("-")]
            if not names:
                flag = f", as --images {unknown[0]}" if "images" in options else ""
                self.error(f"unexpected word {unknown[0]}: a value goes behind its flag{flag}")
            first_hint, *hints = (name + _hint(name, options) for name in dict.fromkeys(names))
            self.error("unknown flag " + "; ".join([first_hint, *hints]))
        # An absent positional argument that takes any number of values is an empty list
        values = {
            k: v for k, v in vars(namespace).items() if v is not unset and v not in ([], None)
        }
        return argparse.Namespace(**values)

    def _recipe_argv(self, path):
        """The recipe as command-line words, so that one set of checks serves both."""
        try:
            file = Path(path)
            if not file.exists() and (SCRIPTS / path).is_file():  # from another working directory
                file = SCRIPTS / path
            with file.open(encoding="utf-8") as stream:
                flags = read_yaml(stream.read(MOST_CHARACTERS + 1)) or {}
        except OSError as error:
            self.error(f"cannot read the recipe: {error.strerror}")
        except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an invalid path
            self.error(f"is not YAML: {' '.join(str(error).split())}")
        if not isinstance(flags, dict):
            self.error("a recipe is lines of `flag: value`")
        return self._argv(flags)

    def _argv(self, flags):
        """{"lr": 0.1} as command-line words; unknown names are refused."""
        actions = {a.dest: a for a in self._actions}
        positional, argv, names = [], [], set()
        for key, value in flags.items():
            action = actions.get(str(key).replace("-", "_"))
            if key in NOT_IN_RECIPES:
                self.error(f"{key} is for the command line alone: take it out of the recipe")
            if action is None:
                self.error(f'unknown flag "{key}"{_hint(str(key), set(actions) - NOT_IN_RECIPES)}')
            if action.dest in names:
                self.error(f'{key}: this flag is there twice, also as "{action.dest}"')
            names.add(action.dest)
            words = argv if action.option_strings else positional
            words += self._words(key, action, value)
        return positional + argv  # behind a flag of several values they would be taken for those

    def _words(self, key, action, value):
        """The command-line words of one flag of a recipe. key: its name there, for errors."""
        flag, is_list = f"--{action.dest}", isinstance(value, list)
        if isinstance(action, Switch):
            if not isinstance(value, bool):
                self.error(f'{key}: "{value}" is not true or false')
            return [flag if value else f"--no_{action.dest}"]
        if value is None:
            return []
        if value is False and "no" in (action.choices or ()):  # an unquoted no is false in YAML
            return [f"{flag}=no"]
        if not action.option_strings:
            return list(map(str, value if is_list else [value]))
        if is_list and "commas" in _purposes(action):
            return [f"{flag}={','.join(map(str, value))}"]
        if is_list and action.nargs == "+":
            return [flag, *map(str, value)]
        if is_list and action.type == self.stages:
            return [f"{flag}={json.dumps(value)}"]
        if isinstance(value, list | dict | bool):
            hint = " (off and no are words for false in YAML: write 0)" if value is False else ""
            self.error(f'{key}: "{_as_written(value)}" is not one value{hint}')
        return [f"{flag}={value}"]

    def stages(self, text):
        """An argparse type: the stages of a fine-tune, YAML (or JSON) text -> a list of dicts.

        Each has "epochs" and "train" ({module prefix: learning rate}), perhaps a "name" and any of
        the flags added with stage=True, which are checked as on the command line.
        """
        try:
            stages = read_yaml(text)
        except yaml.YAMLError as error:
            raise argparse.ArgumentTypeError(f"not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(stages, list) or not stages:
            raise argparse.ArgumentTypeError("wants a list of stages, [{epochs: …, train: …}, …]")
        return [self._stage(n, stage) for n, stage in enumerate(stages, start=1)]

    def _stage(self, number, stage):
        stage_flags = self.named("stage")
        keys = ("name", "epochs", "train", *sorted(stage_flags))
        if not isinstance(stage, dict):
            raise argparse.ArgumentTypeError(f"stage {number}: wants lines of `key: value`")
        for key in stage:
            if key not in keys:
                raise argparse.ArgumentTypeError(
                    f'stage {number}: unknown key "{key}"{nearest(key, keys)} '
                    f"(a stage has {', '.join(keys)})"
                )
        missing_keys = [key for key in ("epochs", "train") if key not in stage]
        if missing_keys:
            raise argparse.ArgumentTypeError(
                f"stage {number}: {' and '.join(missing_keys)} missing"
            )
        if not isinstance(stage["train"], dict) or not stage["train"]:
            raise argparse.ArgumentTypeError(
                f"stage {number}: train: wants lines of `module: learning rate`, at least one"
            )
        try:
            convert, key, value = BOUNDS["epochs"], "epochs", stage["epochs"]
            epochs = convert(str(value))
            convert, rates = BOUNDS["lr"], {}
            for key, value in stage["train"].items():
                rates[str(key)] = convert(str(value))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"stage {number}: {key}: {error}") from None
        except ValueError:
            raise argparse.ArgumentTypeError(
                f'stage {number}: {key}: "{value}" is not a {convert.__name__}'
            ) from None
        stage_flags = {key: value for key, value in stage.items() if key in stage_flags}
        outer, self.where = self.where, f"{self.where}stage {number}: "
        stage_flags = vars(self._parse(self._argv(stage_flags)))
        self.where = outer
        name = {"name": str(stage["name"])} if stage.get("name") else {}
        return {**name, "epochs": epochs, "train": rates, **stage_flags}


def _as_written(value):
    """A value as a recipe writes it: [0.1, 0.2], {a: 1}."""
    if isinstance(value, list):
        text = f"[{', '.join(map(_as_written, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{k}: {_as_written(v)}' for k, v in value.items())}}}"
    else:
        text = str(value)
    return shortened(text)


def _with_underscores(argument):
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


NOT_IN_RECIPES = {"help", "config"}  # no flags of a recipe
PURPOSES = ("common", "operational", "one_command", "data", "stage", "commas")
MANY_FLAGS = 40  # of a script with more, --help shows the common ones only


def add(group, name, type=None, **options):
    """Declare the flag `--name` and its purposes; a number gets its type from BOUNDS.

    common=True: --help shows it, where a script has many flags; --help all shows every flag.
    operational=True: it changes where a run is written and what it reports, never what it computes,
    so it may differ between a checkpoint and the command that resumes it. one_command=True: the
    same, and config.yaml leaves it out. data=True: it decides which images a run sees. stage=True:
    a stage of a fine-tune may have its own value. commas=True: several values in one argument. The
    other options are argparse's.
    """
    purposes = {purpose for purpose in PURPOSES if options.pop(purpose, False)}
    purposes |= {"operational"} if "one_command" in purposes else set()
    if type is None and name in BOUNDS and "action" not in options and "choices" not in options:
        type, options["metavar"] = BOUNDS[name], options.get("metavar", "N")
    if type is not None:
        options["type"] = type
    group.add_argument(f"--{name}", **options).purposes = purposes


def _purposes(action):
    return getattr(action, "purposes", ())  # --help and positional arguments have none
