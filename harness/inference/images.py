"""The images that predict.py classifies, and their labels where these are known."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness.data.columns import find_image_column
from harness.data.listing import find_files
from harness.data.options import DataOptions
from harness.data.pixels import image_file
from harness.data.stored import BUILT_IN, find_stored
from harness.errors import UserError, nearest
from harness.models.trained import read_trained


class Images(NamedTuple):
    """Images in order. Image k is called `names[k]`; `read(k)` gives what a decoder can open."""

    names: list[str]
    read: Any  # int -> a path, or a binary file object; raises ValueError for an empty cell
    labels: torch.Tensor | None  # int64 (n,), or None where they are not known
    source: str  # as text, for the plan
    bit_depth: int | None = None  # of 16-bit gray images

    def __len__(self):
        return len(self.names)


def runs_and_paths(inputs):
    """(Trained of the inputs that are folders of finished runs, the other inputs: image paths).

    Raises UserError where the first input is not a run, and for runs whose classes differ.
    """
    runs = [read_trained(path) for path in inputs if _is_run(path)]
    if not inputs or not _is_run(inputs[0]):
        if inputs:
            read_trained(inputs[0])  # says why it is not a run
        raise UserError("give the folder of a trained run, then images: predict.py runs/x photos/")
    for run in runs[1:]:
        if run.classes != runs[0].classes:
            raise UserError(f"{run.folder} has other classes than {runs[0].folder}")
    return runs, [path for path in inputs if not _is_run(path)]


def _is_run(path):
    folder = Path(path)
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def find_images(paths, options, run) -> Images:
    """The images that paths name, or a split of --dataset.

    options: SplitOptions. run: a Trained, for its classes.
    """
    if bool(paths) == bool(options.dataset):
        raise UserError("give images (files, folders, patterns), or --dataset with --split")
    if not options.dataset:
        for flag in ("split", "image_column", "label_column"):
            if getattr(options, flag):
                raise UserError(f"--{flag} has no effect here: it is for --dataset")
        files = find_files(paths)
        return Images(
            [str(file) for file in files], files.__getitem__,
            labels_of_folders(files, paths, run.classes), f"{len(files):,} files",
            run.recipes[0].get("bit_depth"),
        )  # fmt: skip
    stored = find_stored(options.dataset, BUILT_IN.get(options.dataset), DataOptions())
    name = options.split or next(iter(stored.splits))
    if name not in stored.splits:
        raise UserError(
            f"--split {name}: there is no such split{nearest(name, stored.splits)} "
            f"(the splits are {', '.join(stored.splits)})"
        )
    split = stored.splits[name]
    column = find_image_column(split.features, options.image_column)
    return of_dataset(
        split, column, range(len(split)), labels_of_column(split, options.label_column, run),
        f"split '{name}' of {stored.source}", run.recipes[0].get("bit_depth"),
    )  # fmt: skip


def of_dataset(dataset, image_column, rows, labels, source, bit_depth=None) -> Images:
    """The rows of a data set; each is called by the path in its cell, or else by its number."""
    cells = dataset.select_columns(image_column).with_format("arrow")
    rows, paths = [int(row) for row in rows], []
    for start in range(0, len(rows), 1000):
        column = cells.select(rows[start : start + 1000]).with_format("arrow")[:][image_column]
        paths += column.combine_chunks().field("path").to_pylist()

    read = partial(_read_cell, cells, image_column, rows)
    names = [path or f"row {row}" for path, row in zip(paths, rows, strict=True)]
    return Images(names, read, labels, source, bit_depth)


def _read_cell(cells, image_column, rows, k):
    # no closure: Images are pickled for other processes
    return image_file(cells[rows[k] : rows[k] + 1][image_column].to_pylist()[0])


def labels_of_folders(files, paths, classes):
    """int64 (n,) where every file lies below a folder with the name of a class, else None.

    Only the folders in `paths` and those below them count.
    """
    numbers = {name: k for k, name in enumerate(classes)}
    roots = {Path(path).expanduser() for path in paths}
    labels = []
    for file in files:
        names = []
        for folder in file.parents:
            names.append(folder.name)
            if folder in roots:
                break
        matches = [numbers[name] for name in names if name in numbers]
        if not matches:
            return None
        labels.append(matches[0])
    return torch.tensor(labels)


def labels_of_column(dataset, label_column, run):
    """int64 (n,) where the data set's labels are all classes of the run, else None.

    label_column: of the flag, or None.
    """
    if label_column and label_column not in dataset.features:
        raise UserError(
            f"--label_column {label_column}: there is no such column"
            f"{nearest(label_column, dataset.features)}"
        )
    column = label_column or run.recipes[0].get("label_column") or run.config.get("label_column")
    column = column or next((c for c in ("label", "labels", "fine_label") if c in dataset.features),
                            None)  # fmt: skip
    if column not in dataset.features:
        return None
    names = getattr(dataset.features[column], "names", None)
    numbers = {name: k for k, name in enumerate(run.classes)}
    values = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    if names is not None:
        values = [names[v] if v is not None and 0 <= v < len(names) else None for v in values]
    labels = [numbers.get(str(value)) for value in values]
    if None in labels:
        if label_column:
            k = labels.index(None)
            raise UserError(
                f"--label_column {label_column}: {values[k]!r} of row {k} is not a class of the run"
            )
        return None
    return torch.tensor(labels)
