"""What is where: from the name of a data set to its splits, columns, classes and labels."""

import hashlib
import json
import re
import socket
import threading
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import torch

from harness.counters import generator
from harness.data.folders import SPLIT_WORDS, counted, few, scan, split_of
from harness.data.formats import image_suffixes
from harness.data.images import Stored, load_images
from harness.data.pixels import find_bad, gray_depth_note, native_size
from harness.data.tables import class_values, find_label
from harness.errors import UserError, nearest
from harness.files import is_lfs_pointer

if TYPE_CHECKING:
    from datasets import Dataset  # otherwise imported late: a second that `--help` does not need

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SPLIT_NAMES = {
    "train": ("train",),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class BuiltIn:
    """A data set known by a short name; `splits` are the sizes its numbers are quoted for."""

    id: str  # on the Hub, or a folder of this repository
    splits: dict[str, int]
    revision: str | None = None
    label_column: str | None = None  # only where there are several
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


@dataclass(frozen=True)
class Split:
    """Some rows of a stored split. Sample i is row `rows[i]` of `dataset`, its label `labels[i]`.

    A train split and the validation split held out of it share one `dataset`, so that it is
    decoded once whatever the fraction and the seed are.
    """

    name: str  # as stored, for messages: a held-out validation split has the name of its source
    dataset: "Dataset" = field(repr=False)
    rows: np.ndarray = field(repr=False)  # int64 (n,)
    labels: np.ndarray = field(repr=False)  # int64 (n,), indices into Data.classes
    stored: np.ndarray | None = field(default=None, repr=False)  # rows before a cut, if there was
    bit_depth: int | None = None  # of 16-bit gray images, see harness.data.pixels.decode_image

    def __len__(self):
        return len(self.rows)


@dataclass(frozen=True)
class Data:
    """A data set ready to be decoded (`harness.data.pixels.decode_split`)."""

    name: str  # what the user asked for
    source: str  # where it really came from: id@revision, or a folder
    classes: list[str]
    image_column: str
    label_column: str
    train: Split
    val: Split | None
    test: Split | None
    image_size: int  # px: the images' own size where all are the same small square, else 224
    mean: tuple[float, float, float]  # of pixels in 0..1
    std: tuple[float, float, float]
    bad: dict[str, dict[int, str]] = field(default_factory=dict)  # left out: split, row, why
    notes: list[str] = field(default_factory=list)  # what the plan says of how it was read
    left_out: list[str] = field(default_factory=list)  # what lies there and was not taken
    content: dict[str, list] = field(default_factory=dict)  # see harness.data.images


@dataclass(frozen=True)
class DataOptions:
    """What besides its name says which images of a data set are used, and as what.

    Each is the flag of that name; see `load_data`.
    """

    image_column: str | None = None  # None: the only column of images
    label_column: str | None = None  # None: see harness.data.tables.find_label
    train_split: str | None = None  # None: "train"
    val_split: str | None = None  # None: the one there is, if any; "none" to do without
    test_split: str | None = None  # the same
    val_fraction: float = 0.0  # the part of train to hold out, stratified, in [0, 1)
    max_train_samples: int | None = None  # keep so many of train, stratified; None for all
    max_eval_samples: int | None = None  # the same for validation and test
    seed: int = 42  # decides which samples are held out and kept; nothing else does
    bad_images: str = "stop"  # "skip" leaves images that can't be read out, before any part is cut
    bit_depth: int | None = None  # of 16-bit gray images; None: as the file says, else 16
    empty_classes: str = "refuse"  # of classes without a train image: "refuse", "drop" or "keep"
    # of folders of images, see harness.data.images.load_images
    layout: str = "auto"
    label_pattern: str | None = None
    labels: str | None = None
    file_column: str | None = None
    classes: str | None = None

    def of_folders(self) -> dict:
        """Those that only folders of images have."""
        names = ("layout", "label_pattern", "labels", "file_column", "classes")
        return {name: getattr(self, name) for name in names}

    def chosen(self, names) -> dict[str, str | None]:
        """The stored split that is train, that is val (or None) and that is test (or None)."""
        wanted = {role: getattr(self, f"{role}_split") for role in SPLIT_NAMES}
        return _choose_splits(names, wanted)


DEFAULT_OF_FOLDERS = DataOptions().of_folders()


def load_data(dataset, **options) -> Data:
    """Find a data set, its columns and its splits, and check every label.

    dataset: a built-in name (`BUILT_IN`), a Hub id (`owner/name`, or `owner/name:config`), or a
    folder (or `folder:config`): parquet in the Hub's layout, `save_to_disk`, or images in class
    folders or beside a table. options: of `DataOptions`.

    Raises UserError for anything that is the user's to mend, on one line.
    """
    options = DataOptions(**options)
    _check_options(options)
    built_in = BUILT_IN.get(dataset)
    found = _load(dataset, built_in, options)
    stored = found.splits
    if built_in:
        _check_sizes(dataset, stored, built_in.splits)
    else:
        built_in = _copied_built_in(dataset, stored)
    chosen = options.chosen(stored)
    if options.val_fraction and chosen["val"]:
        raise UserError(
            f"--val_fraction is {options.val_fraction}, but {dataset} has the validation split "
            f"'{chosen['val']}': leave --val_fraction out, or pass --val_split none"
        )
    features = stored[chosen["train"]].features
    image_column = _find_image_column(features, options.image_column)
    asked = found.label_column or options.label_column or (built_in and built_in.label_column)
    label_column = _find_label_column(features, asked, image_column)
    values, classes = _find_classes(stored[chosen["train"]], label_column)
    splits = {}
    for role, name in chosen.items():
        if name is None:
            splits[role] = None
            continue
        _check_split(name, stored[name], features, image_column, label_column)
        labels = _read_labels(name, role, stored[name], label_column, values)
        splits[role] = Split(
            name, stored[name], np.arange(len(labels)), labels, bit_depth=options.bit_depth
        )
    bad = {}
    if options.bad_images == "skip":
        for role, split in splits.items():
            unreadable = split and find_bad(
                split.dataset, image_column, name=split.name, bit_depth=options.bit_depth
            )
            if unreadable:
                bad[split.name] = unreadable
                splits[role] = _leave_out(split, unreadable)
    notes = list(found.notes)
    if not options.bit_depth and (note := gray_depth_note(splits["train"].dataset, image_column)):
        notes.append(note)
    if options.empty_classes == "drop":
        splits, classes, dropped = _without_empty(splits, classes)
        notes += [f"--empty_classes drop: {dropped:,} without a train image"] if dropped else []
    elif options.empty_classes == "refuse":
        _check_every_class(splits["train"], classes)
    if len(classes) < 2:
        raise UserError(f"{dataset} has 1 class, {classes[0]}: there is nothing to tell apart")
    if options.val_fraction:
        splits["train"], splits["val"] = _hold_out(
            splits["train"], options.val_fraction, classes, options.seed
        )
    mean, std = built_in.statistics if built_in else IMAGENET_STATISTICS
    train = cut(splits["train"], options.max_train_samples, options.seed)
    if options.empty_classes != "keep" and len(np.unique(train.labels)) < len(classes):
        raise UserError(
            f"--max_train_samples {options.max_train_samples} keeps images of only "
            f"{len(np.unique(train.labels))} of {len(classes)} classes: keep more"
        )
    return Data(
        name=dataset,
        source=found.source,
        classes=classes,
        image_column=image_column,
        label_column=label_column,
        train=train,
        val=cut(splits["val"], options.max_eval_samples, options.seed),
        test=cut(splits["test"], options.max_eval_samples, options.seed),
        image_size=native_size(stored[chosen["train"]], image_column) or 224,
        mean=mean,
        std=std,
        bad=bad,
        notes=notes,
        left_out=found.left_out,
        content={name: found.content[name] for name in chosen.values() if name in found.content},
    )


def _check_options(options):
    if not 0 <= options.val_fraction < 1:
        raise UserError(
            f"--val_fraction is {options.val_fraction}: it must be at least 0 and below 1"
        )
    for flag in ("max_train_samples", "max_eval_samples"):
        count = getattr(options, flag)
        if count is not None and count < 1:
            raise UserError(f"--{flag} is {count}: it must be at least 1 (leave it out for all)")
    says = [
        f"--{name}"
        for name in ("layout", "labels", "label_pattern")
        if getattr(options, name) not in (None, "auto")
    ]
    if len(says) > 1:
        raise UserError(f"{' and '.join(says)} both say the classes: give one of them")


def _without_empty(splits, classes):
    """The splits and classes without those that have no train image, and how many there were."""
    counts = np.bincount(splits["train"].labels, minlength=len(classes))
    kept = np.flatnonzero(counts)
    places = np.full(len(classes), -1)
    places[kept] = np.arange(len(kept))
    for role, split in splits.items():
        if split is None:
            continue
        labels = places[split.labels]
        if labels.min(initial=0) < 0:
            name = classes[int(split.labels[labels.argmin()])]
            raise UserError(
                f"--empty_classes drop: split '{split.name}' has images of {name!r}, of which "
                "train has none"
            )
        splits[role] = replace(split, labels=labels)
    return splits, [classes[k] for k in kept], len(classes) - len(kept)


def stratified_order(labels, seed):
    """An order of the samples of which every beginning has the classes in proportion.

    The j-th of the n_c samples of class c, shuffled, is put at (j + ½) / n_c; so the first k
    hold each class k · n_c / n times, give or take one, and a larger k only adds to them.

    >>> labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
    >>> np.bincount(labels[stratified_order(labels, seed=0)[:3]]).tolist()
    [2, 1]
    """
    shuffled = torch.randperm(len(labels), generator=generator(seed, "split")).numpy()
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    first = np.repeat(np.cumsum(counts) - counts, counts)  # where the class of each starts
    place = (np.arange(len(labels)) - first + 0.5) / np.repeat(counts, counts)
    # Ties (all of them in a balanced set) fall in the order of the shuffle, not of the classes.
    position = np.empty(len(labels), dtype=np.float64)
    position[by_class] = place
    return shuffled[np.argsort(position[shuffled], kind="stable")]


# --- where the data is ---


def _load(name, built_in, options) -> Stored:
    """The stored splits of a data set, and where they came from."""
    path, config = _local(name)
    if built_in:
        _check_no_folder_flags(name, options)
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
        _check_no_folder_flags(name, options)
        return Stored(_load_from_hub(name, None, None), source=name)
    if "/" in name:
        raise UserError(f"--dataset {name}: there is no such folder")
    raise UserError(
        f'unknown data set "{name}"{nearest(name, BUILT_IN)} (built in are {", ".join(BUILT_IN)}; '
        "others are a Hub id, owner/name, or a folder)"
    )


def _check_no_folder_flags(name, options):
    given = [f for f, value in options.of_folders().items() if value != DEFAULT_OF_FOLDERS[f]]
    if given:
        raise UserError(f"--{given[0]} is for folders of images, which {name} is not")


def _local(name):
    """(folder, configuration or None) where `name` is a folder or folder:config, else (None, …)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    before, colon, config = name.rpartition(":")
    if colon and config and "/" not in config and Path(before).expanduser().is_dir():
        return Path(before).expanduser(), config
    return None, None


def _load_folder(folder, config, options) -> Stored:
    """The splits of a local folder; what kind of folder it is, is seen by looking at it."""
    import datasets

    saved = [n for n in ("dataset_dict.json", "state.json") if (folder / n).is_file()]
    try:
        if saved:
            _check_no_folder_flags(folder, options)
            return Stored(_load_saved_folder(folder, saved[0]))
        tree = scan(folder)
        parquet = parquet_files(tree)
        if parquet and (not tree.total or options.of_folders() == DEFAULT_OF_FOLDERS):
            found = _load_parquet(folder, config, tree, parquet, options)
            if found:
                return found
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
            f"cannot read a data set from {folder}: {lines[0]} (wanted: parquet files named "
            "train-*.parquet, a save_to_disk folder, or one folder of images per class)"
        ) from error


def _load_parquet(folder, config, tree, files, options) -> Stored | None:
    """The splits of parquet files, None where they hold no images and others lie there."""
    import datasets
    import pyarrow.parquet

    for file in files:
        if is_lfs_pointer(folder / file):
            raise UserError(f"{folder / file} is a Git LFS pointer, not the file: git lfs pull")
    if re.search(r"[][*?]|::", str(folder)):
        raise UserError(
            f"{folder}: datasets takes [ ] * ? or :: in a path for a pattern: rename it"
        )
    if config or _says_configurations(folder):
        splits = dict(datasets.load_dataset(str(folder), config))
    else:
        schema = pyarrow.parquet.read_schema(folder / files[0])
        first = pyarrow.parquet.ParquetFile(folder / files[0]).iter_batches(1)
        texts = [str(value) for row in next(first, ()) or () for value in row.to_pylist()]
        if tree.total and not _may_hold_images(schema, texts):
            return None
        named = parquet_splits(files)
        named = {split: [str(folder / file) for file in its] for split, its in named.items()}
        splits = dict(datasets.load_dataset("parquet", data_files=named))
    _check_no_folder_flags(folder, options)
    splits, named = _with_images(splits, folder, options.image_column)
    beside = tree.total - named
    return Stored(
        splits, left_out=[f"{counted(beside, 'image')} beside the parquet files"] if beside else []
    )


def _says_configurations(folder):
    """Whether a README.md says how the files are to be read, as on the Hub."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return bool(front and re.search(r"^(configs|dataset_info):", front[1], re.MULTILINE))


def _may_hold_images(schema, texts):
    import pyarrow

    return any(
        pyarrow.types.is_struct(kind) or "binary" in str(kind) for kind in schema.types
    ) or any(Path(text).suffix.lower() in image_suffixes() for text in texts)


def parquet_files(tree) -> list[str]:
    """The parquet files below a folder, relative to it, that are no tables of labels."""
    tables = ("metadata.parquet", "labels.parquet")
    return [
        f"{folder.path}/{name}".lstrip("/")
        for folder in tree.walk()
        for name in folder.tables
        if name.lower().endswith(".parquet") and name.lower() not in tables
    ]


def parquet_splits(files) -> dict[str, list[str]]:
    """{split: files} by the files' names, or else their folders'; all are train where none says.

    >>> parquet_splits(["data/train-00000-of-00002.parquet", "extra-00000-of-00001.parquet"])
    {'train': ['data/train-00000-of-00002.parquet'], 'extra': ['extra-00000-of-00001.parquet']}
    """
    found: dict[str | None, list[str]] = {}
    for file in files:
        *folders, name = Path(file).with_suffix("").parts
        part = re.fullmatch(r"(.+)-\d{5}-of-\d{5}", name)
        split = SPLIT_WORDS.get(part[1].lower(), part[1]) if part else split_of(name)
        split = split or next(filter(None, map(split_of, reversed(folders))), None)
        found.setdefault(split, []).append(file)
    if None in found and len(found) > 1:
        split, others = next(item for item in found.items() if item[0])
        raise UserError(
            f"{few(found[None])} names no split, as {others[0]} does ({split}): rename it to one, "
            "or take it out"
        )
    named = {split or "train": its for split, its in found.items()}
    first = [split for split in ("train", "validation", "test") if split in named]
    return {split: named[split] for split in dict.fromkeys([*first, *named])}


def _with_images(splits, folder, given=None):
    """(splits, how many files they name): with a column of type Image, if one can be made one.

    That is the only struct of bytes and path, the only column of bytes, or the only column of
    paths of images relative to the folder; or of these the given one.
    """
    import datasets

    features = next(iter(splits.values())).features
    if any(isinstance(kind, datasets.Image) for kind in features.values()):
        return splits, 0
    structs = [n for n, k in features.items() if isinstance(k, dict) and {*k} == {"bytes", "path"}]
    binary = [n for n, k in features.items() if getattr(k, "dtype", "").endswith("binary")]
    first = next(iter(splits.values()))[:1]
    texts = [
        name
        for name, kind in features.items()
        if getattr(kind, "dtype", "").endswith("string")
        and Path((first[name] or [""])[0] or "").suffix.lower() in image_suffixes()
    ]
    candidates = structs or binary or texts
    if given in structs + binary + texts:
        candidates = [given]
    if len(candidates) != 1:
        return splits, 0
    (column,) = candidates
    if column in texts:
        return _paths_as_images(splits, column, folder)
    cast = {name: split.cast_column(column, datasets.Image()) for name, split in splits.items()}
    return cast, 0


def _paths_as_images(splits, column, folder):
    import datasets

    root, made, every = folder.resolve(), {}, set()
    for name, split in splits.items():
        paths = []
        for value in split[column]:
            path = (root / value).resolve() if value else None
            if path is None or not path.is_relative_to(root):
                raise UserError(
                    f"column '{column}' of {folder} names {value!r}, which is not in it"
                )
            paths.append(str(path))
        replaced = split.remove_columns(column).add_column(column, paths)
        made[name] = replaced.cast_column(column, datasets.Image())
        every.update(paths)
    return made, len(every)


def _load_saved_folder(folder, kind):
    """{split: Dataset} as `save_to_disk` wrote them; nothing outside of the folder is read."""
    if kind == "state.json":
        return {"train": _load_saved(folder, "train")}
    names = _json(folder / kind, "splits", list)
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{folder / kind} names the split {name!r}, which is no folder in it")
    return {name: _load_saved(folder / name, name) for name in names}


def _json(file, key, kind):
    """`key` of a JSON object in a file, if it is of that kind."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"has no {key}" if isinstance(error, (KeyError, TypeError)) else "can't be read"
        raise UserError(f"{file} {why}: not as save_to_disk wrote it") from None
    if not isinstance(value, kind):
        raise UserError(f"{file}: {key} is {str(value)[:40]!r}: not as save_to_disk wrote it")
    return value


def _load_saved(folder, name):
    """One split as `save_to_disk` wrote it."""
    import datasets

    # No rows are saved as no file, which `datasets` can't read again.
    files = _json(folder / "state.json", "_data_files", list)
    if not files:
        raise UserError(f"split '{name}' is empty")
    for file in files:
        part = file.get("filename") if isinstance(file, dict) else None
        if not isinstance(part, str) or Path(part).name != part:
            raise UserError(f"{folder / 'state.json'} names the file {part!r}, which is none in it")
        if not (folder / part).is_file():
            raise UserError(f"{folder / part} is missing")
    dataset = datasets.Dataset.load_from_disk(folder)
    # Its own says how it was made (paths, a function), not what came out: decoded pixels are kept
    # by it, and those of a set that was made anew would be the old ones.
    found = [(folder / file["filename"]).stat() for file in files]
    content = repr((dataset._fingerprint, [(f.st_size, f.st_mtime_ns) for f in found]))
    dataset._fingerprint = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    return dataset


def _load_from_hub(name, revision, label_column):
    """The splits of a Hub data set: from the network, or else from the local cache."""
    import datasets

    hub_id, _, config = name.partition(":")
    was_offline = datasets.config.HF_HUB_OFFLINE
    offline = was_offline or not _hub_answers(datasets.config.HF_ENDPOINT)
    # Without a network `datasets` would retry for 24 s before it looks into its cache.
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
        at = f" --revision {revision}" if revision else ""
        column = f" --label_column {label_column}" if label_column else ""
        raise UserError(
            f"{name} is not in the local cache and the Hub is out of reach (nor is there a folder "
            f"of that name). Where there is network, `hf download {hub_id} --repo-type dataset{at} "
            f"--local-dir {folder}` fetches it; then pass that folder: --dataset ./{folder}{column}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def _hub_answers(endpoint):
    """Whether something listens at the Hub, or at the proxy before it; at most 3 s."""
    hub = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(hub.scheme)
    bypassed = not proxy or urllib.request.proxy_bypass(hub.hostname)
    at = hub if bypassed else urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = at.port or (443 if at.scheme == "https" else 80)
    answers = []

    def connect():
        try:
            socket.create_connection((at.hostname, port), timeout=HUB_TIMEOUT_S).close()
            answers.append(True)
        except OSError:
            pass

    # In a thread, because looking up the host's address knows no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return bool(answers)


def _check_sizes(name, stored, sizes):
    """A built-in data set has the published splits, or its numbers would mean something else."""
    for split, size in sizes.items():
        found = len(stored[split]) if split in stored else 0
        if found != size:
            raise UserError(
                f"split '{split}' of {name} has {found:,} images, but should have {size:,}: "
                "delete the copy in the cache of datasets and fetch it again"
            )


def _copied_built_in(dataset, stored):
    """The built-in that a folder is a local copy of, going by its name and its sizes, or None.

    So that `--dataset ./cifar10`, which the error without a network recommends, is trained on
    with the same normalisation and labels as `--dataset cifar10`.
    """
    sizes = {name: len(split) for name, split in stored.items()}
    folder = Path(dataset).resolve().name.lower()
    for name, known in BUILT_IN.items():
        if folder in (name, known.id.rpartition("/")[2].lower()) and sizes == known.splits:
            return known
    return None


# --- splits and columns ---


def _choose_splits(stored, wanted):
    """{"train": name, "val": name or None, "test": name or None} of the stored splits."""
    chosen = {}
    for role, name in wanted.items():
        if name is None or (name == "none" and role != "train"):
            continue
        name = name if name in stored else SPLIT_WORDS.get(name.lower(), name)
        if name not in stored:
            raise UserError(
                f"--{role}_split {name}: there is no such split{nearest(name, stored)} "
                f"(the splits are {', '.join(stored)})"
            )
        if name in chosen.values():
            raise UserError(f"--{role}_split {name}: that split already has another use")
        chosen[role] = name
    for role, names in SPLIT_NAMES.items():
        if wanted[role] is None:
            left = [name for name in names if name in stored and name not in chosen.values()]
            chosen[role] = left[0] if left else None
        else:
            chosen.setdefault(role, None)  # "none"
    if chosen["train"] is None:
        raise UserError(
            f"there is no split 'train': name one with --train_split ({', '.join(stored)})"
        )
    return {role: chosen[role] for role in SPLIT_NAMES}


def _find_image_column(features, given):
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    return _find_column(features, given, images, "--image_column", "of images")


def _find_label_column(features, given, image_column):
    """The given column; the one that is called label; the only ClassLabel, integer or string one.

    A column called label (or labels, class, target, category) wins over all others, whatever its
    type. No column of another type is taken unless it is called so or given.
    """

    others = {name: kind for name, kind in features.items() if name != image_column}
    if given:
        return _find_column(features, given, list(others), "--label_column", "of labels")
    kinds = {name: _kind_of_label(feature) for name, feature in others.items()}
    found = find_label("the data set", kinds)
    return found or _find_column(features, None, [], "--label_column", "of labels")


def _kind_of_label(feature):
    """What `find_label` wants to know of a column."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return "classes"
    plain = isinstance(feature, datasets.Value) and re.fullmatch(
        r"u?int\d+|(large_)?string", feature.dtype
    )
    return "plain" if plain else "other"


def _find_column(features, given, candidates, flag, kind):
    """The given column if it is a candidate, or the only candidate."""
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    if given and given not in features:
        near = nearest(given, features)
        raise UserError(
            f"{flag} {given}: there is no such column{near} (the columns are {columns})"
        )
    if given and given not in candidates:
        raise UserError(f"{flag} {given}: the column is not {kind}; the columns are {columns}")
    if not given and len(candidates) != 1:
        count = len(candidates) or "no"
        raise UserError(
            f"there are {count} columns {kind}: name one with {flag}; the columns are {columns}"
        )
    return given or candidates[0]


def _type_name(feature):
    """What a user knows the column's type as: images, classes, int64, string."""
    kind = type(feature).__name__
    if kind == "Value":
        return feature.dtype
    return {"Image": "images", "ClassLabel": "classes"}.get(kind, kind)


# --- labels ---


def _check_split(name, split, features, image_column, label_column):
    """A split has images, and the columns and classes of train."""
    if len(split) == 0:
        raise UserError(f"split '{name}' is empty")
    for column in (image_column, label_column):
        if column not in split.features:
            raise UserError(
                f"split '{name}' has no column '{column}'; its columns are "
                + ", ".join(split.features)
            )
        if _kind(split.features[column]) != _kind(features[column]):
            raise UserError(
                f"column '{column}' is {_type_name(features[column])} in train, but "
                f"{_type_name(split.features[column])} in split '{name}'"
            )
    train_names = getattr(features[label_column], "names", None)
    if getattr(split.features[label_column], "names", None) != train_names:
        raise UserError(f"the classes of split '{name}' are not those of train, or in other order")


def _kind(feature):
    """What two splits must share: Image, ClassLabel, whole numbers of any width, text."""
    name = _type_name(feature)
    return "text" if "string" in name else re.sub(r"^u?int\d+$", "whole", name)


def _find_classes(train, label_column):
    """The stored values of the classes in order, and the classes' names."""
    feature = train.features[label_column]
    if hasattr(feature, "names"):
        return list(range(feature.num_classes)), list(feature.names)
    values = sorted(_values(train, label_column).unique().drop_null().to_pylist())
    return values, [str(value) for value in values]


def _values(dataset, column):
    """The labels as Arrow values: whole numbers or text; floats and booleans become these.

    Raises UserError for lists and for numbers that are not whole.
    """
    import pyarrow
    import pyarrow.compute

    stored = _arrow_column(dataset, column)
    if pyarrow.types.is_integer(stored.type):
        return stored
    if _type_name(dataset.features[column]).endswith("string"):
        empty = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(stored), "")
        return pyarrow.compute.if_else(empty, pyarrow.scalar(None, stored.type), stored)
    return pyarrow.array(class_values(f"column '{column}'", stored.to_pylist()))


def _read_labels(name, role, split, label_column, values):
    """int64 (n,): the place of each row's label among `values`."""
    import pyarrow
    import pyarrow.compute

    stored, values = _values(split, label_column), pyarrow.array(values)
    without = f", or leave the split out: --{role}_split none" if role != "train" else ""
    if stored.null_count:
        rows = np.flatnonzero(pyarrow.compute.is_null(stored).to_numpy())
        raise UserError(
            f"{len(rows):,} of {len(stored):,} images of split '{name}' have no label (image "
            f"{', '.join(map(str, rows[:3]))}): give them one or take them out{without}"
        )
    if stored.type != values.type:  # int8 beside int64, string beside large_string
        stored = stored.cast(values.type)
    places = pyarrow.compute.index_in(stored, values)
    if places.null_count:
        row = pyarrow.compute.index(pyarrow.compute.is_null(places), True).as_py()
        value = stored[row].as_py()
        span = f"0 to {len(values) - 1}" if isinstance(value, int) else "those of train"
        raise UserError(
            f"image {row} of split '{name}' has the label {value!r}, but the classes are {span}: "
            f"correct it{without}"
        )
    return places.to_numpy().astype(np.int64)


def _arrow_column(dataset, column):
    """A column as Arrow values, without a Python object per row."""
    return dataset.select_columns(column).with_format("arrow")[:][column]


def _check_every_class(train, classes):
    counts = np.bincount(train.labels, minlength=len(classes))
    missing = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise UserError(
            f"{len(missing)} of {len(classes)} classes have no image among the {len(train):,} of "
            f"split '{train.name}': {shown}; --empty_classes drop leaves these classes out, "
            "--empty_classes keep keeps them"
        )


# --- parts of a split ---


def _leave_out(split, bad):
    """The split without its rows `bad`, {row: why}."""
    rows = np.setdiff1d(split.rows, list(bad))
    if not len(rows):
        row, why = next(iter(bad.items()))
        raise UserError(
            f"none of the {len(bad):,} images of split '{split.name}' can be read "
            f"(image {row}: {why})"
        )
    return replace(split, rows=rows, labels=split.labels[rows])


def _hold_out(train, fraction, classes, seed):
    """`train` as (train, val), with every class in both."""
    num_val = round(fraction * len(train))
    order = stratified_order(train.labels, seed)
    # Sorted, so that the pixels are read from the disk in order.
    val_rows, train_rows = np.sort(order[:num_val]), np.sort(order[num_val:])
    val, rest = (
        replace(train, rows=train.rows[rows], labels=train.labels[rows])
        for rows in (val_rows, train_rows)
    )
    for part, left_with in ((val, "validation"), (rest, "training")):
        counts = np.bincount(part.labels, minlength=len(classes))
        if counts.min() == 0:
            worst = int(counts.argmin())
            have = int((train.labels == worst).sum())
            raise UserError(
                f"--val_fraction {fraction} holds out {num_val:,} of {len(train):,} images and "
                f"leaves {left_with} none of class '{classes[worst]}' (which has {have}): "
                "too few to stratify, choose another fraction"
            )
    return rest, val


def cut(split, max_samples, seed):
    """The first of a split's samples in a seeded stratified order, if it has too many."""
    if split is None or max_samples is None or max_samples >= len(split):
        return split
    kept = np.sort(stratified_order(split.labels, seed)[:max_samples])
    # A data set of its own, so that a quick look at ImageNet does not decode all of it.
    dataset = split.dataset.select(split.rows[kept])
    stored = stored_rows(split)[kept]
    return replace(
        split,
        dataset=dataset,
        rows=np.arange(max_samples),
        labels=split.labels[kept],
        stored=stored,
    )


def stored_rows(split):
    """The numbers of a split's samples in the stored split, before any cut: int64 (n,)."""
    return split.rows if split.stored is None else split.stored
