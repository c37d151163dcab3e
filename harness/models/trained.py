"""A trained run, read back: its folder, its network and its data."""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from harness.data.preprocessing import Preprocessing, preprocessing_of
from harness.data.sources import load_data, stored_rows
from harness.data.stored import BUILT_IN
from harness.errors import UserError
from harness.files import has_file
from harness.models.build import rebuild_model
from harness.models.config import DATA_FLAGS, read_config
from harness.models.reading import load_weights
from harness.models.weights import load_state, recipes_of, result_note


class Trained(NamedTuple):
    """A run folder's result: the network is built by `load_model` only."""

    name: str  # the folder's
    folder: Path
    config: dict  # config.json
    preprocessing: Preprocessing
    classes: list[str]  # in the order of the ids
    sha256: str  # of model.safetensors
    note: str = ""  # what is odd about its files

    @property
    def kind(self) -> tuple:
        """Facts that two networks must share for their weights to be averaged."""
        names = ("architecture", "library", "stem", "head", "model_args")
        # As text, since model_args holds lists, which can't be hashed
        preprocessing = self.preprocessing._replace(packed_side=0)
        return (*(str(self.config.get(name)) for name in names), preprocessing)

    @property
    def recipes(self) -> list[dict]:
        """Which images it and its ancestors were trained on: harness.models.weights.recipes_of."""
        return recipes_of(self.config)


def read_trained(path) -> Trained:
    """Read and check config.json; the weights are hashed, but not loaded.

    Raises UserError, on one line, for a path that is not the folder of a finished run.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        reason = "it is a file: give the folder of the run" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {reason}")
    for result_file in (file, folder / "model.safetensors"):
        if not has_file(result_file):
            has_checkpoints = (folder / "checkpoints").is_dir()
            state = "has not finished" if has_checkpoints else "is not the folder of a run"
            raise UserError(f"{folder} {state}: it has no {result_file.name}")
    config = read_config(file)
    classes = config.get("label_names")
    if not isinstance(classes, list) or not classes:
        raise UserError(f"{file} has no label_names: it is not one of this project's")
    if config.get("num_classes") not in (None, len(classes)):
        count = config["num_classes"]
        raise UserError(f"{file}: num_classes is {count}, but label_names has {len(classes)}")
    preprocessing = preprocessing_of(config.get("pretrained_cfg"), file)
    if preprocessing is None:
        raise UserError(f"{file} does not say how images are prepared (pretrained_cfg)")
    preprocessing = preprocessing._replace(packed_side=config.get("packed_side") or 0)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    classes = [str(name) for name in classes]
    note = result_note(folder, config)
    return Trained(folder.resolve().name, folder, config, preprocessing, classes, digest, note)


def load_model(run, state=None) -> nn.Module:
    """The network of a run in eval mode, with its weights or with `state` in their place.

    Raises UserError that names the folder.
    """
    try:
        model = rebuild_model(run.config)
    except UserError as error:
        raise UserError(f"{run.folder}: {error}") from None
    state = load_weights(run.folder) if state is None else state
    load_state(model, state, str(run.folder / "model.safetensors"))
    return model.eval()


def add_to_folder(run, write, failure):
    """Call `write()`, which adds to the folder of a finished run, under the folder's lock.

    Returns whether it succeeded. Where the folder can't be written, or a run is using it, or a file
    in it is damaged, a note on the terminal says so. failure: how that note begins.
    """
    try:
        with open(run.folder / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write()
        return True
    except BlockingIOError:
        print(f"note         {failure}: another process is using the folder")
    except OSError as error:
        print(f"note         {failure}: {error.strerror}")
    except UserError as error:
        print(f"note         {failure}: {error}")
    return False


def data_flags(recipe, **overrides) -> dict:
    """The arguments of load_data for the images of a recipe; `overrides` that are not None win."""
    flags = {name: recipe[name] for name in DATA_FLAGS if name in recipe}
    if flags.get("test_split") == "none":  # training had no test set; a later evaluation may
        del flags["test_split"]
    flags |= {"dataset": dataset_path(recipe)}
    flags |= {name: value for name, value in overrides.items() if value is not None}
    if not flags["dataset"]:
        raise UserError("a run does not say what it was trained on: add --dataset")
    return flags


def seen_before(recipes, data) -> int:
    """How many validation images of `data` were training images of networks with these recipes.

    Only recipes of the same data set count: about other data sets, and weights of unknown origin,
    nothing is known.
    """
    rows = np.zeros(0, np.int64)
    for recipe in recipes:
        if data.val is not None and recipe.get("source") == data.source:
            train = load_data(**data_flags(recipe)).train
            if train.name == data.val.name:
                rows = np.union1d(rows, stored_rows(train))
    return 0 if data.val is None else int(np.isin(stored_rows(data.val), rows).sum())


def dataset_path(recipe) -> str:
    """The data set of a recipe: its name, or the full path if it is a folder."""
    name, source = recipe.get("dataset", ""), recipe.get("source", "")
    is_folder = name not in BUILT_IN and Path(source).is_absolute() and Path(source).is_dir()
    return source if is_folder else name


def check_classes(run, classes, source):
    """Raise UserError, with the difference, unless the network has these classes in this order."""
    if run.classes == classes:
        return
    run_classes, data_classes = run.classes, classes
    if len(run_classes) != len(data_classes):
        difference = f"{len(run_classes)} classes there, {len(data_classes)} here"
    elif sorted(run_classes) == sorted(data_classes):
        pairs = enumerate(zip(run_classes, data_classes, strict=True))
        k, (a, b) = next((k, pair) for k, pair in pairs if pair[0] != pair[1])
        difference = f"the same in another order: class {k} is {a!r} there, {b!r} here"
    else:
        only_run, only_data = (
            ", ".join(repr(name) for name in a if name not in b)[:80]
            for a, b in ((run_classes, data_classes), (data_classes, run_classes))
        )
        difference = f"only there: {only_run or 'none'}; only here: {only_data or 'none'}"
    raise UserError(f"{run.folder} has other classes than {source}: {difference}")
