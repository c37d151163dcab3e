"""The place of a data set: built in, on the Hub, or a folder of images, of parquet, or saved."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from harness.data.images import Stored, load_images
from harness.data.listing import scan
from harness.data.options import DEFAULT_OF_FOLDERS, DataOptions, check_no_folder_flags
from harness.data.parquet import load_parquet, parquet_files
from harness.errors import UserError, nearest
from harness.hub import hub_answers

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class BuiltIn:
    """A data set with a short name; `splits` are the sizes for which results are published."""

    id: str  # on the Hub, or a folder of this repository
    splits: dict[str, int]
    revision: str | None = None
    label_column: str | None = None  # None where there is only one
    statistics: tuple = IMAGENET_STATISTICS  # mean and std of the train pixels in 0..1


BUILT_IN = {
    "digits": BuiltIn(
        id=str(Path(__file__).resolve().parents[2] / "data" / "digits"),
        splits={"train": 1437, "test": 360},
        statistics=((0.3054,) * 3, (0.3760,) * 3),
    ),
    "cifar10": BuiltIn(
        id="uoft-cs/cifar10",
        revision="0b2714987fa478483af9968de7c934580d0bb9a2",
        splits={"train": 50_000, "test": 10_000},
        statistics=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
    "cifar100": BuiltIn(
        id="uoft-cs/cifar100",
        splits={"train": 50_000, "test": 10_000},
        label_column="fine_label",
        statistics=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ),
    "flowers102": BuiltIn(
        id="Donghyun99/Oxford-Flower-102",
        revision="7e43fe37eeb9278138ab0bd2d0abb10d0f703d09",
        splits={"train": 1020, "validation": 1020, "test": 6149},
    ),
}


def find_stored(name, built_in, options) -> Stored:
    """The stored splits of a data set, with their source."""
    path, config = _local(name)
    if built_in:
        check_no_folder_flags(name, options)
    if built_in and Path(built_in.id).is_absolute():
        return _load_folder(Path(built_in.id), None, DataOptions()).at(built_in.id)
    if built_in:
        source = f"{built_in.id}@{built_in.revision[:7]}" if built_in.revision else built_in.id
        splits = _load_from_hub(built_in.id, built_in.revision, built_in.label_column)
        return Stored(splits, source=source)
    if path is not None:
        return _load_folder(path, config, options).at(str(path.resolve()))
    if Path(name).expanduser().exists():
        raise UserError(
            f"--dataset {name} is a file: give the folder that it is in (an archive: unpack it)"
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", name):
        check_no_folder_flags(name, options)
        return Stored(_load_from_hub(name, None, None), source=name)
    if "/" in name:
        raise UserError(f"--dataset {name}: there is no such folder")
    raise UserError(
        f'unknown data set "{name}"{nearest(name, BUILT_IN)} (built in are {", ".join(BUILT_IN)}; '
        "others are a Hub id, owner/name, or a folder)"
    )


def _local(name):
    """(folder, configuration or None) where `name` is a folder or folder:config, else (None, …)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    folder, colon, config = name.rpartition(":")
    if colon and config and "/" not in config and Path(folder).expanduser().is_dir():
        return Path(folder).expanduser(), config
    return None, None


def _load_folder(folder, config, options) -> Stored:
    """The splits of a local folder, whose files say which kind it is."""
    import datasets

    saved = [n for n in ("dataset_dict.json", "state.json") if _is_saved(folder / n)]
    try:
        if saved:
            check_no_folder_flags(folder, options)
            return Stored(_load_saved_folder(folder, saved[0]))
        tree = scan(folder)
        files = parquet_files(tree)
        if files and (not tree.total or options.of_folders() == DEFAULT_OF_FOLDERS):
            result = load_parquet(folder, config, tree, files, options.image_column)
            if result:
                check_no_folder_flags(folder, options)
                splits, left_out = result
                return Stored(splits, left_out=left_out)
        if config:
            raise UserError(
                f"--dataset {folder}:{config}: folders of images have no configurations"
            )
        return load_images(
            folder, tree, label_column=options.label_column, **options.of_folders(),
            choose=lambda names: options.chosen(names).values(),
        )  # fmt: skip
    except UserError:
        raise
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        lines = str(error.__cause__ or error).split("\n")
        if "onfig name is missing" in lines[0]:
            raise UserError(
                f"--dataset {folder}: add a configuration, {folder}:NAME. {' '.join(lines[:2])}"
            ) from error
        blocked = getattr(error, "filename", None)
        if blocked and not Path(str(blocked)).resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"cannot write {blocked}: {error.strerror}; set HF_DATASETS_CACHE to a folder that "
                "can be written to"
            ) from error
        raise UserError(
            f"cannot read a data set from {folder}: {lines[0]} (expected: parquet files named "
            "train-*.parquet, a save_to_disk folder, or one folder of images per class)"
        ) from error


# -- save_to_disk -------------------------------------------------------------------------------


def _is_saved(file):
    """Whether a file says that `save_to_disk` wrote its folder; other state.json files do not."""
    if file.name == "state.json":
        return file.is_file() and (file.parent / "dataset_info.json").is_file()
    return file.is_file()


def _load_saved_folder(folder, kind):
    """{split: Dataset} as `save_to_disk` wrote them; reads nothing outside of the folder."""
    if kind == "state.json":
        return {"train": _load_saved(folder, "train")}
    names = _json(folder / kind, "splits", list)
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{folder / kind} names the split {name!r}, which is no folder in it")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder / name} is a link that leads outside of {folder}")
    return {name: _load_saved(folder / name, name) for name in names}


def _json(file, key, kind):
    """The value of `key` in a JSON file; UserError unless it is of the type `kind`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fault = f"has no {key}" if isinstance(error, (KeyError, TypeError)) else "can't be read"
        raise UserError(f"{file} {fault}: not as save_to_disk wrote it") from None
    if not isinstance(value, kind):
        raise UserError(f"{file}: {key} is {str(value)[:40]!r}: not as save_to_disk wrote it")
    return value


def _load_saved(folder, name):
    """One split as `save_to_disk` wrote it."""
    import datasets

    # A split without rows is saved without a file, and `datasets` can't read that
    files = _json(folder / "state.json", "_data_files", list)
    if not files:
        raise UserError(f"split '{name}' is empty")
    for file in files:
        file_name = file.get("filename") if isinstance(file, dict) else None
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise UserError(
                f"{folder / 'state.json'} names the file {file_name!r}, which is not in the folder"
            )
        if not (folder / file_name).is_file():
            raise UserError(f"{folder / file_name} is missing")
    try:
        dataset = datasets.Dataset.load_from_disk(folder)
        dataset.with_format("arrow")[:1]  # reads without decoding, which --bad_images is for
    except Exception as error:  # every kind of damage raises another type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder} is not as save_to_disk wrote it: {reason}") from error
    # The fingerprint is the cache key of decoded pixels. The one of `datasets` says how a data set
    # was made (paths, a function), not its content: if it is made anew, old pixels would be used.
    stats = [(folder / file["filename"]).stat() for file in files]
    content = repr((dataset._fingerprint, [(s.st_size, s.st_mtime_ns) for s in stats]))
    dataset._fingerprint = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    return dataset


# -- the Hub ------------------------------------------------------------------------------------


def _load_from_hub(name, revision, label_column):
    """The splits of a Hub data set: from the network, or else from the local cache."""
    import datasets

    hub_id, _, config = name.partition(":")
    was_offline = datasets.config.HF_HUB_OFFLINE
    offline = was_offline or not hub_answers(datasets.config.HF_ENDPOINT)
    # Without a network, `datasets` would retry for 24 s before it looks into its cache
    datasets.config.HF_HUB_OFFLINE = offline
    try:
        return dict(datasets.load_dataset(hub_id, config or None, revision=revision))
    except Exception as error:  # a dozen types from three libraries, all of them about this id
        reason = str(error).partition("\n")[0]
        if "Config name is missing" in reason or "There are multiple" in reason:
            detail = " ".join(str(error).split("\n")[:2])
            raise UserError(
                f"--dataset {name}: add a configuration, {name}:NAME. {detail}"
            ) from error
        if not offline and not isinstance(error, ConnectionError):
            raise UserError(f"cannot load {name} from the Hub: {reason}") from error
        folder = hub_id.rpartition("/")[2]
        commit = f" --revision {revision}" if revision else ""
        column = f" --label_column {label_column}" if label_column else ""
        raise UserError(
            f"{name} is not in the local cache and the Hub is out of reach (nor is there a folder "
            f"of that name). Where there is a network, `hf download {hub_id} --repo-type dataset"
            f"{commit} --local-dir {folder}` fetches it; then pass that folder: --dataset "
            f"./{folder}{column}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def check_sizes(name, stored, sizes):
    """Raise UserError unless a built-in data set has its published sizes, which results rely on."""
    for split, size in sizes.items():
        count = len(stored[split]) if split in stored else 0
        if count != size:
            raise UserError(
                f"split '{split}' of {name} has {count:,} images, but should have {size:,}: "
                "delete the copy in the cache of datasets and fetch it again"
            )


def copied_built_in(dataset, stored):
    """The built-in data set of which a folder is a copy, judged by name and sizes, or None.

    So `--dataset ./cifar10`, which the error without a network recommends, has the same
    normalisation and labels as `--dataset cifar10`.
    """
    sizes = {name: len(split) for name, split in stored.items()}
    folder = Path(dataset).resolve().name.lower()
    for name, built_in in BUILT_IN.items():
        if folder in (name, built_in.id.rpartition("/")[2].lower()) and sizes == built_in.splits:
            return built_in
    return None
