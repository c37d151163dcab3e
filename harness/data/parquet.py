"""Parquet files: which are of which split, and whether they hold images."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import yaml

from harness.data.folders import SPLIT_WORDS, split_of
from harness.data.formats import open_image
from harness.data.listing import counted, few
from harness.errors import UserError
from harness.files import is_lfs_pointer

LARGE = 2**30  # bytes of parquet, which take more than seconds to read


def load_parquet(folder, config, tree, files, image_column=None):
    """({split: datasets.Dataset}, what was left out) of parquet files in a folder.

    None where they hold no images and there are image files, which they may name: then they are
    tables. config: a configuration that a README.md names, or a folder in it. image_column: which
    of several columns of bytes holds the images.
    """
    import datasets

    for file in files:
        if is_lfs_pointer(folder / file):
            raise UserError(f"{folder / file} is a Git LFS pointer, not the file: git lfs pull")
    if re.search(r"[][*?]|::", str(folder)):
        raise UserError(
            f"{folder}: datasets takes [ ] * ? or :: in a path for a pattern: rename it"
        )
    card = _card(folder)
    if card.get("configs"):
        splits = _configured(folder, config, card["configs"])
    elif config:
        inside = [file for file in files if file.startswith(f"{config}/")]
        if not inside:
            raise UserError(
                f"--dataset {folder}:{config}: there is no such folder or configuration"
            )
        splits = parquet_splits(inside)
    elif not any(map(holds_image, (folder / file for file in files))) and tree.total:
        return None
    elif card.get("dataset_info") and not tree.total:  # it may say the classes
        with _bars_if_large([folder / file for file in files]):
            return _with_images(dict(datasets.load_dataset(str(folder))), image_column), []
    else:
        splits = parquet_splits(files)
    named = {split: [str(folder / file) for file in its] for split, its in splits.items()}
    with _bars_if_large([Path(file) for its in named.values() for file in its]):
        loaded = dict(datasets.load_dataset("parquet", data_files=named))
    beside = [f"{counted(tree.total, 'image')} beside the parquet files"] if tree.total else []
    return _with_images(loaded, image_column), beside


@contextlib.contextmanager
def _bars_if_large(files):
    """Progress bars of `datasets`, which call local files downloads, only where it takes long."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    size = sum(file.stat().st_size for file in files if file.exists())
    if size < LARGE:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def parquet_files(tree) -> list[str]:
    """The parquet files below a folder, relative to it, that are no tables of labels by name."""
    tables = ("metadata.parquet", "labels.parquet")
    return [
        f"{folder.path}/{name}".lstrip("/")
        for folder in tree.walk()
        for name in folder.tables
        if name.lower().endswith(".parquet") and name.lower() not in tables
    ]


def parquet_splits(files) -> dict[str, list[str]]:
    """{split: files} by the files' names, or else their folders'; all are train where none says.

    >>> parquet_splits(["data/train-00000-of-00001.parquet", "extra-00000-of-00001.parquet"])
    {'train': ['data/train-00000-of-00001.parquet'], 'extra': ['extra-00000-of-00001.parquet']}

    Raises UserError where only some names say it, a shard is missing, or two folders hold files of
    the same names, as configurations do.
    """
    found: dict[str | None, list[str]] = {}
    names: dict[tuple, str] = {}
    shards: dict[tuple, set[int]] = {}
    for file in files:
        *folders, name = Path(file).with_suffix("").parts
        part = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(-[0-9a-f]+)?", name)
        stem = part[1] if part else name
        by_folder = next(filter(None, map(split_of, reversed(folders))), None)
        split = SPLIT_WORDS.get(stem.lower()) or (None if part else split_of(stem)) or by_folder
        split = split or (part[1] if part else None)
        found.setdefault(split, []).append(file)
        key = (split, name)
        if key in names and "=" not in file:
            one, other = (Path(path).parts[0] for path in (names[key], file))
            raise UserError(
                f"{names[key]} and {file} are both of split '{split or 'train'}': give one of the "
                f"folders, as --dataset FOLDER:{one} or FOLDER:{other}"
            )
        names[key] = file
        if part:
            shards.setdefault((tuple(folders), part[1], int(part[3])), set()).add(int(part[2]))
    for (folders, stem, number), there in shards.items():
        missing = set(range(number)) - there
        if missing:
            path = Path(*folders, f"{stem}-{min(missing):05d}-of-{number:05d}.parquet")
            raise UserError(f"{path} is missing: {len(there)} of {number} parts are there")
    if None in found and len(found) > 1:
        split, others = next(item for item in found.items() if item[0])
        raise UserError(
            f"{few(found[None])} names no split, as {others[0]} does ({split}): rename it to one, "
            "or take it out"
        )
    named = {split or "train": its for split, its in found.items()}
    first = [split for split in ("train", "validation", "test") if split in named]
    return {split: named[split] for split in dict.fromkeys([*first, *named])}


def holds_image(file) -> bool:
    """Whether the first row of a parquet file has an image in it."""
    import pyarrow

    try:
        opened = pyarrow.parquet.ParquetFile(file)
        if b'"_type": "Image"' in (opened.schema_arrow.metadata or {}).get(b"huggingface", b""):
            return True
        row = next(opened.iter_batches(1), None)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} can't be read: {str(error).splitlines()[0]}") from None
    for value in row.to_pylist()[0].values() if row else ():
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            try:
                open_image(io.BytesIO(data)).close()
                return True
            except (OSError, ValueError):
                continue
    return False


def _card(folder) -> dict:
    """What the front matter of a README.md says, as on the Hub."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        card = yaml.safe_load(front[1]) if front else {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


def _configured(folder, config, configs) -> dict[str, list[str]]:
    """{split: parquet files} of a configuration that the README.md of a data set has."""
    from datasets import data_files

    known = {c["config_name"]: c for c in configs if isinstance(c, dict) and "config_name" in c}
    default = [name for name, c in known.items() if c.get("default")]
    name = config or (default or list(known) if len(known) == 1 or default else [None])[0]
    if name not in known:
        hint = f"there is no configuration {config}" if config else "add a configuration"
        raise UserError(f"--dataset {folder}: {hint}, {folder}:NAME, of {', '.join(known)}")
    base = folder / known[name].get("data_dir", "")
    patterns = data_files.sanitize_patterns(known[name].get("data_files", "**/*.parquet"))
    found = {}
    for split, its in patterns.items():
        paths = data_files.DataFilesList.from_local_or_remote(its, base_path=str(base))
        found[str(split)] = [path for path in paths if path.endswith(".parquet")]
    found = {split: paths for split, paths in found.items() if paths}
    if not found:
        raise UserError(f"configuration {name} of {folder} has no parquet files")
    if "data_files" not in known[name]:
        relative = [str(Path(path).relative_to(folder)) for path in found["train"]]
        return parquet_splits(relative)
    return found


def _with_images(splits, given=None):
    """The splits, with what can be a column of images as one, where none is of that type.

    That is the only struct of bytes and path, or the only column of bytes, or the given one.
    """
    import datasets

    features = next(iter(splits.values())).features
    if any(isinstance(kind, datasets.Image) for kind in features.values()):
        return splits
    structs = [n for n, k in features.items() if isinstance(k, dict) and {*k} == {"bytes", "path"}]
    binary = [n for n, k in features.items() if getattr(k, "dtype", "").endswith("binary")]
    columns = [given] if given in structs + binary else structs or binary
    if len(columns) != 1:
        return splits
    cast = datasets.Image()
    return {name: split.cast_column(columns[0], cast) for name, split in splits.items()}
