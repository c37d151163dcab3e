"""Parquet files: the split of each, and whether they hold images."""

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
    """({split: datasets.Dataset}, lines on what is left out) of parquet files in a folder.

    None where the parquet files hold no images and there are image files: then they may be tables
    of labels. config: a configuration that README.md names, or a folder in `folder`. image_column:
    the one of several columns of bytes that holds the images.
    """
    import datasets

    for file in files:
        if is_lfs_pointer(folder / file):
            raise UserError(f"{folder / file} is a Git LFS pointer, not the file: git lfs pull")
    if re.search(r"[][*?]|::", str(folder)):
        raise UserError(
            f"{folder}: the library datasets takes [ ] * ? or :: in a path for a pattern: rename "
            "the folder"
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
    elif card.get("dataset_info") and not tree.total:  # the card may say the classes
        with _bars_if_large([folder / file for file in files]):
            return _with_images(dict(datasets.load_dataset(str(folder))), image_column), []
    else:
        splits = parquet_splits(files)
    data_files = {split: [str(folder / file) for file in names] for split, names in splits.items()}
    with _bars_if_large([Path(file) for paths in data_files.values() for file in paths]):
        loaded = dict(datasets.load_dataset("parquet", data_files=data_files))
    beside = [f"{counted(tree.total, 'image')} beside the parquet files"] if tree.total else []
    return _with_images(loaded, image_column), beside


@contextlib.contextmanager
def _bars_if_large(files):
    """Progress bars of `datasets` for large files only, as they call local files downloads."""
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
    """The parquet files below a folder, relative to it, without those named as tables of labels."""
    tables = ("metadata.parquet", "labels.parquet")
    return [
        f"{folder.path}/{name}".lstrip("/")
        for folder in tree.walk()
        for name in folder.tables
        if name.lower().endswith(".parquet") and name.lower() not in tables
    ]


def parquet_splits(files) -> dict[str, list[str]]:
    """{split: files} by the names of files, else of folders; all are train if no name has a split.

    >>> parquet_splits(["data/train-00000-of-00001.parquet", "extra-00000-of-00001.parquet"])
    {'train': ['data/train-00000-of-00001.parquet'], 'extra': ['extra-00000-of-00001.parquet']}

    Raises UserError where only some names have a split, a shard is missing, or two folders hold
    files of the same names, as configurations do.
    """
    splits: dict[str | None, list[str]] = {}
    names: dict[tuple, str] = {}
    shards: dict[tuple, set[int]] = {}
    for file in files:
        *folders, name = Path(file).with_suffix("").parts
        shard = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(-[0-9a-f]+)?", name)
        stem = shard[1] if shard else name
        by_folder = next(filter(None, map(split_of, reversed(folders))), None)
        split = SPLIT_WORDS.get(stem.lower()) or (None if shard else split_of(stem)) or by_folder
        split = split or (shard[1] if shard else None)
        splits.setdefault(split, []).append(file)
        key = (split, name)
        if key in names and "=" not in file:
            configs = [Path(path).parts[0] for path in (names[key], file)]
            raise UserError(
                f"{names[key]} and {file} are both of split '{split or 'train'}': give one of the "
                f"folders, as --dataset FOLDER:{configs[0]} or FOLDER:{configs[1]}"
            )
        names[key] = file
        if shard:
            key = (tuple(folders), shard[1], int(shard[3]))
            shards.setdefault(key, set()).add(int(shard[2]))
    for (folders, stem, number), numbers in shards.items():
        missing = set(range(number)) - numbers
        if missing:
            path = Path(*folders, f"{stem}-{min(missing):05d}-of-{number:05d}.parquet")
            raise UserError(f"{path} is missing: {len(numbers)} of {number} parts are there")
    if None in splits and len(splits) > 1:
        split, examples = next(item for item in splits.items() if item[0])
        raise UserError(
            f"{few(splits[None])} names no split, as {examples[0]} does ({split}): rename it after "
            "a split, or take it out"
        )
    splits = {split or "train": paths for split, paths in splits.items()}
    standard = [split for split in ("train", "validation", "test") if split in splits]
    return {split: splits[split] for split in dict.fromkeys([*standard, *splits])}


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
    """The front matter of the folder's README.md, as on the Hub; empty without one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        card = yaml.safe_load(front[1]) if front else {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


def _configured(folder, config, configs) -> dict[str, list[str]]:
    """{split: parquet files} of a configuration in the README.md of a data set."""
    from datasets import data_files

    by_name = {c["config_name"]: c for c in configs if isinstance(c, dict) and "config_name" in c}
    default = [name for name, c in by_name.items() if c.get("default")]
    name = config or (default or list(by_name) if len(by_name) == 1 or default else [None])[0]
    if name not in by_name:
        hint = f"there is no configuration {config}" if config else "add a configuration"
        raise UserError(f"--dataset {folder}: {hint}, {folder}:NAME, of {', '.join(by_name)}")
    base = folder / by_name[name].get("data_dir", "")
    patterns = data_files.sanitize_patterns(by_name[name].get("data_files", "**/*.parquet"))
    splits = {}
    for split, pattern in patterns.items():
        paths = data_files.DataFilesList.from_local_or_remote(pattern, base_path=str(base))
        splits[str(split)] = [path for path in paths if path.endswith(".parquet")]
    splits = {split: paths for split, paths in splits.items() if paths}
    if not splits:
        raise UserError(f"configuration {name} of {folder} has no parquet files")
    if "data_files" not in by_name[name]:
        relative = [str(Path(path).relative_to(folder)) for path in splits["train"]]
        return parquet_splits(relative)
    return splits


def _with_images(splits, column=None):
    """The splits; without a column of type Image, one column that may hold images gets this type.

    That is `column`, if it is of structs or bytes; else the only struct of bytes and path; else the
    only column of bytes.
    """
    import datasets

    features = next(iter(splits.values())).features
    if any(isinstance(kind, datasets.Image) for kind in features.values()):
        return splits
    structs = [n for n, k in features.items() if isinstance(k, dict) and {*k} == {"bytes", "path"}]
    binary = [n for n, k in features.items() if getattr(k, "dtype", "").endswith("binary")]
    columns = [column] if column in structs + binary else structs or binary
    if len(columns) != 1:
        return splits
    cast = datasets.Image()
    return {name: split.cast_column(columns[0], cast) for name, split in splits.items()}
