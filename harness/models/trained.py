"""A trained run, read back: what its folder says of it, its network, and its data."""

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
    """A run folder's result: the network is built only when it is asked for (`load_model`)."""

    name: str  # the folder's
    folder: Path
    config: dict  # config.json
    preprocessing: Preprocessing
    classes: list[str]  # in the order of the ids
    sha256: str  # of model.safetensors
    note: str = ""  # what is odd about its files

    @property
    def kind(self) -> tuple:
        """What two networks have to share for their weights to be averaged."""
        names = ("architecture", "library", "stem", "head", "model_args")
        # model_args has lists in it: its text can be hashed
        preprocessing = self.preprocessing._replace(packed_side=0)
        return (*(str(self.config.get(name)) for name in names), preprocessing)

    @property
    def recipes(self) -> list[dict]:
        """What it, and what it came from, was trained on: see harness.models.weights.recipes_of."""
        return recipes_of(self.config)


def read_trained(path) -> Trained:
    """Read and check config.json; the weights are hashed, and not yet read.

    Raises UserError, on one line, for what is not the folder of a finished run.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        known = "it is a file: give the folder of the run" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {known}")
    for needed in (file, folder / "model.safetensors"):
        if not has_file(needed):
            begun = (folder / "checkpoints").is_dir()
            why = "has not finished" if begun else "is not the folder of a run"
            raise UserError(f"{folder} {why}: it has no {needed.name}")
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


def load_model(trained, state=None) -> nn.Module:
    """The network of a run in eval mode, with its weights or with `state` in their place.

    Raises UserError that names the folder.
    """
    try:
        model = rebuild_model(trained.config)
    except UserError as error:
        raise UserError(f"{trained.folder}: {error}") from None
    state = load_weights(trained.folder) if state is None else state
    load_state(model, state, str(trained.folder / "model.safetensors"))
    return model.eval()


def add_to_folder(trained, write, lost):
    """`write()` into the folder of a finished run, under its lock: a run that goes on there wins.

    Returns whether it is there; where the folder can't be written, or is in use, or has a damaged
    file, a note on the terminal says so. lost: what is not there then, in words.
    """
    try:
        with open(trained.folder / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write()
        return True
    except BlockingIOError:
        print(f"note         {lost}: another process is using the folder")
    except OSError as error:
        print(f"note         {lost}: {error.strerror}")
    except UserError as error:
        print(f"note         {lost}: {error}")
    return False


def data_flags(recipe, **asked) -> dict:
    """What load_data needs for the images of a recipe; what is `asked` for (not None) wins."""
    flags = {name: recipe[name] for name in DATA_FLAGS if name in recipe}
    if flags.get("test_split") == "none":  # training did without, which is no reason to
        del flags["test_split"]
    flags |= {"dataset": dataset_path(recipe)}
    flags |= {name: value for name, value in asked.items() if value is not None}
    if not flags["dataset"]:
        raise UserError("a run does not say what it was trained on: add --dataset")
    return flags


def seen_before(recipes, data) -> int:
    """How many validation images of `data` networks with these recipes were trained on.

    Of the same data set alone: of another one, or weights of unknown origin, nothing is known.
    """
    seen = np.zeros(0, np.int64)
    for recipe in recipes:
        if data.val is not None and recipe.get("source") == data.source:
            theirs = load_data(**data_flags(recipe)).train
            if theirs.name == data.val.name:
                seen = np.union1d(seen, stored_rows(theirs))
    return 0 if data.val is None else int(np.isin(stored_rows(data.val), seen).sum())


def dataset_path(recipe) -> str:
    """The data set of a recipe: its name, or the folder it really was where the name was a path."""
    name, source = recipe.get("dataset", ""), recipe.get("source", "")
    found = name not in BUILT_IN and Path(source).is_absolute() and Path(source).is_dir()
    return source if found else name


def check_classes(trained, classes, source):
    """Raise UserError, with the difference, unless the network has these classes in this order."""
    if trained.classes == classes:
        return
    ours, theirs = trained.classes, classes
    if len(ours) != len(theirs):
        why = f"{len(ours)} classes there, {len(theirs)} here"
    elif sorted(ours) == sorted(theirs):
        k = next(k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        why = f"the same in another order: class {k} is {ours[k]!r} there, {theirs[k]!r} here"
    else:
        there, here = (
            ", ".join(repr(name) for name in a if name not in b)[:80]
            for a, b in ((ours, theirs), (theirs, ours))
        )
        why = f"only there: {there or 'none'}; only here: {here or 'none'}"
    raise UserError(f"{trained.folder} has other classes than {source}: {why}")
