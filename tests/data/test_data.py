import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

import smallruns
from harness import hub
from harness.data import stored
from harness.data.cache import decode_split
from harness.data.parts import stratified_order
from harness.data.pixels import content_of
from harness.data.sources import load_data
from harness.data.stored import BUILT_IN, BuiltIn
from harness.errors import UserError

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def png(value):
    buffer = io.BytesIO()
    Image.new("L", (6, 6), value).save(buffer, format="png")
    return buffer.getvalue()


def test_a_copy_elsewhere_has_the_same_content_and_other_images_have_not(tmp_path):
    rows = make([0, 1, 2] * 4)
    rows.to_parquet(tmp_path / "a" / "train-00000-of-00001.parquet")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    first, copy, saved = (load_data(tmp_path / name).content for name in ("a", "b", "saved"))
    assert first == copy == saved and first["train"][0] == 12
    others = rows.select([*range(11), 0])
    assert content_of(others, "picture") != content_of(rows, "picture")
    one_length = [
        Dataset.from_dict({"picture": [{"bytes": k * 9, "path": None}] * 5}) for k in (b"a", b"b")
    ]
    assert content_of(one_length[0], "picture") != content_of(one_length[1], "picture")
    shuffled = rows.shuffle(seed=3)
    assert content_of(shuffled, "picture") == content_of(shuffled.flatten_indices(), "picture")
    images = {"picture": [{"bytes": None, "path": "/a.png"}]}
    paths = Dataset.from_dict(images, features=Features({"picture": datasets.Image()}))
    assert content_of(paths, "picture") is None


def make(labels, *, start=0, label_type=None, **more):
    """A data set whose image i is plain gray of value start + i."""
    label_type = label_type or ClassLabel(names=NAMES)
    images = [{"bytes": png(start + i), "path": None} for i in range(len(labels))]
    features = {"picture": datasets.Image(), "kind": label_type}
    features |= {name: Value("string") for name in more}
    columns = {"picture": images, "kind": labels, **more}
    return Dataset.from_dict(columns, features=Features(features))


def save(folder, **splits):
    """The splits as parquet in the Hub's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def save_images(folder, labels, start=0):
    for i, label in enumerate(labels):
        (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (folder / NAMES[label] / f"{start + i:03d}.png").write_bytes(png(start + i))


TRAIN, TEST = [0, 1, 2] * 4, [2, 1, 0]


def make_folder(kind, folder):
    train, test = make(TRAIN), make(TEST, start=100)
    if kind == "parquet":
        save(folder, train=train, test=test)
    elif kind == "data/ subfolder":
        save(folder / "data", train=train, test=test)
        (folder / "README.md").write_text("# A card\n")
        Image.new("L", (3, 3)).save(folder / "data" / "banner.png")
    elif kind == "save_to_disk":
        DatasetDict(train=train, test=test).save_to_disk(folder)
    elif kind == "class folders":
        save_images(folder / "train", TRAIN)
        save_images(folder / "test", TEST, start=100)
    elif kind == "save_to_disk, no splits":
        train.save_to_disk(folder)
    else:
        assert kind == "class folders, no splits"
        save_images(folder, TRAIN)
    return str(folder)


KINDS = ["parquet", "data/ subfolder", "save_to_disk", "class folders"]
KINDS_WITHOUT_SPLITS = ["save_to_disk, no splits", "class folders, no splits"]


# --- kinds of data sets ---


@pytest.mark.parametrize("kind", KINDS + KINDS_WITHOUT_SPLITS)
def test_every_kind_of_folder(kind, tmp_path):
    folder = make_folder(kind, tmp_path / "my data")
    loaded = load_data(folder)
    assert loaded.classes == NAMES
    assert loaded.source == folder
    assert loaded.image_size == 6
    assert loaded.val is None
    assert (loaded.test is None) == (kind in KINDS_WITHOUT_SPLITS)
    for split, labels, start in ((loaded.train, TRAIN, 0), (loaded.test, TEST, 100)):
        if split is None:
            continue
        assert split.labels.dtype == np.int64
        pixels = decode_split(split.dataset, loaded.image_column, 6, name=split.name)
        # The gray value says which image it is, whatever order the folder was read in.
        values = pixels[split.rows, 0, 0, 0].tolist()
        found = dict(zip(values, split.labels.tolist(), strict=True))
        assert found == {start + i: label for i, label in enumerate(labels)}


def test_local_files_are_no_downloads(tmp_path, capfd):
    folder = make_folder("parquet", tmp_path / "named")
    load_data(str(folder))
    shown = capfd.readouterr().err
    assert "Downloading" not in shown and "Generating" not in shown
    assert datasets.is_progress_bar_enabled()


def test_class_folders_may_have_the_names_of_splits(tmp_path):
    for name in ("dev", "val"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "test_1.png").write_bytes(png(1))
    with pytest.raises(UserError, match="dev/, val/ without class folders inside, and no table"):
        load_data(str(tmp_path / "set"))
    loaded = load_data(str(tmp_path / "set"), layout="classes")
    assert loaded.classes == ["dev", "val"] and len(loaded.train) == 2 and loaded.val is None


@pytest.mark.parametrize(
    "names", [("Train", "TEST"), ("Training", "Testing"), ("TRAIN", "Evaluation")]
)
def test_split_folders_in_other_words(tmp_path, names):
    """`datasets` makes one train split of them."""
    for name, labels, start in zip(names, (TRAIN, TEST), (0, 100), strict=True):
        save_images(tmp_path / "set" / name, labels, start)
        (tmp_path / "set" / name / "cover.png").write_bytes(png(7))
    loaded = load_data(str(tmp_path / "set"))
    assert (len(loaded.train), len(loaded.test)) == (len(TRAIN), len(TEST))
    assert loaded.classes == NAMES
    save_images(tmp_path / "set" / "test", TEST)
    with pytest.raises(UserError, match=rf"{names[1]}/ and test/ are both the split 'test'"):
        load_data(str(tmp_path / "set"))


def test_bad_images_are_named_by_their_files(tmp_path):
    save_images(tmp_path / "set", TRAIN)
    bad = tmp_path / "set" / "bee" / "004.png"
    bad.write_bytes(b"text")
    for _ in range(2):  # found, and read from where it was kept
        ((_, why),) = load_data(str(tmp_path / "set"), bad_images="skip").bad["train"].items()
        assert why.startswith(f"{bad}: ") and len(why) > len(f"{bad}: ")


def test_images_that_were_replaced_in_a_saved_set(tmp_path):
    """Made in the same way of the same names: to `datasets` it is the same set."""
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    found = []
    for value in (10, 200):
        for path in paths:
            Path(path).write_bytes(png(value))
        made = Dataset.from_dict({"picture": paths, "kind": [0, 1, 2, 0]}).cast(
            Features({"picture": datasets.Image(), "kind": ClassLabel(names=NAMES)})
        )
        made.save_to_disk(tmp_path / f"set {value}")
        dataset = load_data(str(tmp_path / f"set {value}")).train.dataset
        found.append(decode_split(dataset, "picture", 6, name="train")[0, 0, 0, 0].item())
    assert found == [10, 200]


def test_digits(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    loaded = load_data("digits")
    assert (len(loaded.train), loaded.val, len(loaded.test)) == (1437, None, 360)
    assert loaded.classes == list("0123456789")
    assert (loaded.image_column, loaded.label_column) == ("image", "label")
    assert loaded.image_size == 8
    pixels = decode_split(loaded.train.dataset, "image", 8, name="train")
    # Ink in sixteenths; the mean and deviation of the table are those of the train pixels.
    assert set(pixels.unique().tolist()) == {round(ink * 255 / 16) for ink in range(17)}
    scaled = pixels.double() / 255
    assert loaded.mean == pytest.approx([scaled.mean().item()] * 3, abs=1e-4)
    assert loaded.std == pytest.approx([scaled.std().item()] * 3, abs=1e-4)
    counts = np.bincount(np.concatenate([loaded.train.labels, loaded.test.labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # scikit-learn's


def test_a_built_in_set_of_another_size_is_refused(tmp_path, monkeypatch):
    folder = save(tmp_path / "set", train=make(TRAIN), test=make(TEST))
    for splits, message in (
        ({"train": 12, "test": 4}, "split 'test' of mine has 3 images, but should have 4"),
        ({"train": 12, "validation": 5}, "split 'validation' of mine has 0 .* should have 5"),
    ):
        monkeypatch.setitem(BUILT_IN, "mine", BuiltIn(id=folder, splits=splits))
        with pytest.raises(UserError, match=message):
            load_data("mine")


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match='unknown data set "cifr10", did you mean "cifar10"'):
        load_data("cifr10")
    with pytest.raises(UserError, match="no such folder"):
        load_data("./nowhere/at/all")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"takes \[ \] \* \? or :: in a path for a pattern"):
        load_data(make_folder("parquet", tmp_path / "my [best] data"))
    with pytest.raises(UserError, match="is a file"):
        load_data(str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no images: expected CLASS"):
        load_data(str(tmp_path / "empty"))
    (tmp_path / "empty" / "train-00000-of-00001.parquet").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"empty.*can't be read"):
        load_data(str(tmp_path / "empty"))


# --- the Hub ---


def test_without_network_the_cache_is_used(tmp_path, cache):
    folder = Path(save(tmp_path / "set", train=make(TRAIN), test=make(TEST)))
    files = {split: str(folder / f"{split}-00000-of-00001.parquet") for split in ("train", "test")}
    Parquet(dataset_name="bugs", hash="0123abc", data_files=files).download_and_prepare()
    (cache / "bugs").rename(cache / "someone___bugs")  # as if it had come from the Hub
    (config,) = (cache / "someone___bugs").iterdir()
    config.rename(config.with_name("default"))
    loaded = load_data("someone/bugs")
    assert (loaded.source, len(loaded.train), len(loaded.test)) == ("someone/bugs", 12, 3)


def test_without_network_or_cache_the_message_says_how_to_fetch_it(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(stored, "hub_answers", lambda endpoint: False)
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_data("cifar100")
    assert time.perf_counter() - began < 3
    message = str(caught.value)
    assert "`hf download uoft-cs/cifar100 --repo-type dataset --local-dir cifar100`" in message
    assert "--dataset ./cifar100 --label_column fine_label" in message
    assert "\n" not in message
    assert datasets.config.HF_HUB_OFFLINE is False
    with pytest.raises(UserError, match="--revision 7e43fe37eeb9"):
        load_data("flowers102")


def test_whether_the_hub_answers(monkeypatch):
    def never_answers(*args, **kwargs):
        time.sleep(0.5)
        raise OSError

    for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert hub.hub_answers(f"http://127.0.0.1:{port}")
        # Behind a proxy the Hub's own name need not be known here.
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert hub.hub_answers("https://hub.invalid")
    assert not hub.hub_answers("https://hub.invalid")
    monkeypatch.delenv("https_proxy")
    # A name server that never answers.
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(socket, "create_connection", never_answers)
    began = time.perf_counter()
    assert not hub.hub_answers("https://huggingface.co")
    assert time.perf_counter() - began < 0.4


# --- splits ---


def test_validation_splits(tmp_path):
    folder = save(
        tmp_path / "set", train=make(TRAIN), validation=make(TEST), test=make([0, 1, 2, 0])
    )
    loaded = load_data(folder)
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (12, 3, 4)
    loaded = load_data(folder, val_split="none", test_split="none", val_fraction=0.25)
    assert (len(loaded.train), len(loaded.val), loaded.test) == (9, 3, None)
    loaded = load_data(folder, train_split="test", test_split="validation", val_split="train")
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (4, 12, 3)
    # A split that is asked for in one role is not taken for another.
    assert load_data(folder, train_split="test").test is None

    with pytest.raises(UserError, match="has the validation split 'validation'"):
        load_data(folder, val_fraction=0.25)
    message = (
        r'--test_split tset: .* did you mean "test"\? \(the splits are train, validation, test\)'
    )

    with pytest.raises(UserError, match=message):
        load_data(folder, test_split="tset")
    with pytest.raises(UserError, match="--test_split train: that split already has another use"):
        load_data(folder, train_split="train", test_split="train")
    only_test = save(tmp_path / "other", test=make(TEST))
    with pytest.raises(UserError, match=r"no split 'train': name one with --train_split \(test\)"):
        load_data(only_test)


def test_val_fraction_is_stratified_seeded_and_shares_the_pixels(tmp_path):
    folder = save(tmp_path / "set", train=make([0] * 20 + [1] * 40 + [2] * 10))
    loaded = load_data(folder, val_fraction=0.1)
    assert np.bincount(loaded.val.labels).tolist() == [2, 4, 1]
    assert np.bincount(loaded.train.labels).tolist() == [18, 36, 9]
    rows = np.concatenate([loaded.train.rows, loaded.val.rows])
    assert np.sort(rows).tolist() == list(range(70))
    assert loaded.train.dataset is loaded.val.dataset
    all_labels = np.repeat([0, 1, 2], [20, 40, 10])
    np.testing.assert_array_equal(all_labels[loaded.val.rows], loaded.val.labels)
    again, other = load_data(folder, val_fraction=0.1), load_data(folder, val_fraction=0.1, seed=7)
    assert again.val.rows.tolist() == loaded.val.rows.tolist() != other.val.rows.tolist()


def test_max_samples(tmp_path):
    folder = save(tmp_path / "set", train=make(TRAIN * 5), test=make(TEST * 5, start=100))
    loaded = load_data(folder, val_fraction=0.2, max_train_samples=7, max_eval_samples=5)
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (7, 5, 5)
    assert len(loaded.train.dataset) == 7  # no more than that is decoded
    assert np.bincount(loaded.train.labels).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])
    pixels = decode_split(loaded.test.dataset, "picture", 6, name="test")
    for row, label in zip(loaded.test.rows, loaded.test.labels, strict=True):
        assert (TEST * 5)[int(pixels[row, 0, 0, 0]) - 100] == label
    assert len(load_data(folder, max_train_samples=1000).train) == 60
    more = load_data(folder, val_fraction=0.2, max_train_samples=8)
    decoded = [
        set(decode_split(part.train.dataset, "picture", 6, name="train")[:, 0, 0, 0].tolist())
        for part in (loaded, more)
    ]
    assert decoded[0] < decoded[1]


def test_every_beginning_of_the_stratified_order_is_stratified():
    labels = np.repeat([0, 1, 3], [50, 30, 7])  # class 2 has none
    order = stratified_order(labels, seed=1)
    assert np.sort(order).tolist() == list(range(87))
    for k in range(1, 88):
        counts = np.bincount(labels[order[:k]], minlength=4)
        assert np.abs(counts - k * np.array([50, 30, 0, 7]) / 87).max() < 1.5
    # In a balanced set no class comes first as a rule.
    firsts = {int(np.arange(10)[stratified_order(np.arange(10), seed)[0]]) for seed in range(50)}
    assert len(firsts) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 1.0}, "--val_fraction is 1.0"),
        ({"val_fraction": float("nan")}, "--val_fraction is nan"),
        ({"val_fraction": -0.1}, "--val_fraction is -0.1"),
        ({"max_train_samples": 0}, "--max_train_samples is 0"),
        ({"max_eval_samples": -3}, "--max_eval_samples is -3"),
        ({"val_fraction": 0.1}, r"holds out 1 of 12 .* leaves validation none of class 'ant'"),
        ({"val_fraction": 0.95}, r"holds out 11 of 12 .* leaves training none of class"),
    ],
)
def test_impossible_numbers(tmp_path, arguments, message):
    folder = save(tmp_path / "set", train=make(TRAIN))
    if arguments == {"val_fraction": 0.1}:
        message = r"holds out 1 of 12 images and leaves validation none of class '(ant|bee)'"
    with pytest.raises(UserError, match=message):
        load_data(folder, **arguments)


# --- columns and labels ---


@pytest.mark.parametrize(
    ("label_type", "train", "classes"),
    [
        (Value("int64"), [10, 9, 200, 9], ["9", "10", "200"]),
        (Value("uint8"), [7, 5, 7, 6], ["5", "6", "7"]),
        (Value("string"), ["bee", "ant", "cat", "ant"], ["ant", "bee", "cat"]),
        (Value("large_string"), ["bee", "ant", "cat", "ant"], ["ant", "bee", "cat"]),
    ],
)
def test_plain_labels_become_classes(tmp_path, label_type, train, classes):
    folder = save(
        tmp_path / "set",
        train=make(train, label_type=label_type),
        test=make(train[:2], label_type=label_type),
    )
    loaded = load_data(folder)
    assert loaded.classes == classes
    assert [classes[label] for label in loaded.train.labels] == [str(value) for value in train]
    assert [classes[label] for label in loaded.test.labels] == [str(value) for value in train[:2]]


def test_columns_are_found_by_type_or_named(tmp_path):
    folder = save(tmp_path / "set", train=make(TRAIN, note=["x", "y"] * 6))
    assert load_data(folder).label_column == "kind"  # a ClassLabel goes before a string
    assert load_data(folder, label_column="note").classes == ["x", "y"]
    columns = r"the columns are picture \(images\), kind \(classes\), note \(string\)"
    with pytest.raises(UserError, match=rf"--image_column pictre.*\"picture\".*{columns}"):
        load_data(folder, image_column="pictre")
    with pytest.raises(UserError, match=rf"--image_column kind: .* not hold images.*{columns}"):
        load_data(folder, image_column="kind")
    with pytest.raises(UserError, match=rf"--label_column picture: .* not hold labels.*{columns}"):
        load_data(folder, label_column="picture")

    two = make(["a"] * 12, label_type=Value("string"), note=["x", "y"] * 6)
    with pytest.raises(UserError, match=r"columns kind, note .*name one with --label_column"):
        load_data(save(tmp_path / "two", train=two))
    with pytest.raises(UserError, match=r"there are no columns .* name one with --label_column"):
        load_data(save(tmp_path / "none", train=make(TRAIN).remove_columns("kind")))
    with pytest.raises(UserError, match=r"there are no columns .* name one with --image_column"):
        load_data(save(tmp_path / "blind", train=make(TRAIN).remove_columns("picture")))


STRING = Value("string")
BAD_LABELS = {
    "minus one": (
        make(TRAIN),
        make([0, 1, -1]),
        "image 2 of split 'test' has the label -1, .*0 to 2",
    ),
    "null": (make(TRAIN), make([0, None]), "1 of 2 images of split 'test' have no label .image 1"),
    "unknown": (
        make(["ant", "bee"], label_type=STRING),
        make(["ant", "eel"], label_type=STRING),
        "image 1 of split 'test' has the label 'eel'.*--test_split none",
    ),
    "missing class": (
        make([0, 2]),
        make(TEST),
        "1 of 3 classes have no image among the 2 of split 'train': bee",
    ),
    "empty": (make(TRAIN), make([]), "split 'test' is empty"),
    "empty train": (make([]), make(TEST), "split 'train' is empty"),
    "no column": (make(TRAIN), make(TEST).rename_column("kind", "sort"), "no column 'kind'"),
    "other type": (
        make(TRAIN),
        make(["a"], label_type=STRING),
        "'kind' is classes in train, but string in split 'test'",
    ),
    "text beside numbers": (
        make([1, 2], label_type=Value("int64")),
        make(["1", "2"], label_type=STRING),
        "'kind' is int64 in train, but string in split 'test'",
    ),
    "one class": (
        make([0, 0], label_type=ClassLabel(names=["ant"])),
        make([0], label_type=ClassLabel(names=["ant"])),
        "has 1 class, ant: there is nothing to tell apart",
    ),
    "other order": (
        make(TRAIN),
        make(TEST, label_type=ClassLabel(names=NAMES[::-1])),
        "classes of split 'test' are not those of train",
    ),
}


def test_labels_of_another_width(tmp_path):
    folder = save(
        tmp_path / "set",
        train=make([0, 300, 7], label_type=Value("int64")),
        test=make([7, 0], label_type=Value("int8")),
        validation=make([300], label_type=Value("uint16")),
    )
    loaded = load_data(folder)
    assert loaded.test.labels.tolist() == [1, 0] and loaded.val.labels.tolist() == [2]


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_splits_are_named(tmp_path, case):
    train, test, message = BAD_LABELS[case]
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=message) as caught:
        load_data(str(tmp_path / "set"))
    assert "\n" not in str(caught.value)


# --- processes ---

START = """
import json, sys
from harness.data.sources import load_data
from harness.data.cache import decode_split
found = {}
for folder in sys.argv[1:]:
    loaded = load_data(folder, val_fraction=0.25, max_train_samples=6)
    for split in (loaded.train, loaded.val):
        pixels = decode_split(split.dataset, loaded.image_column, 5, name=split.name)
        chosen = pixels[split.rows].flatten(1)[:, 0].tolist()
        found[f"{folder} {len(split)}"] = [split.dataset._fingerprint, chosen]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_processes_agree_and_share_one_cache(tmp_path, cache):
    folders = [make_folder(kind, tmp_path / kind) for kind in KINDS + KINDS_WITHOUT_SPLITS]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "PYTHONPATH": str(smallruns.ROOT)}
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", START, *folders],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    found = [json.loads(start.communicate(timeout=120)[0]) for start in starts]
    assert found[0] == found[1]
    assert len(found[0]) == 2 * len(folders)
    # A third start, later and in another process, finds every file.
    made = sorted((cache / "pixels").glob("*.npy"))
    times = [file.stat().st_mtime_ns for file in made]
    assert len(made) == len({fingerprint for fingerprint, _ in found[0].values()})
    for folder in folders:
        loaded = load_data(folder, val_fraction=0.25, max_train_samples=6)
        for split in (loaded.train, loaded.val):
            decode_split(split.dataset, loaded.image_column, 5, name=split.name)
    assert sorted((cache / "pixels").glob("*.npy")) == made
    assert [file.stat().st_mtime_ns for file in made] == times


def test_a_local_copy_of_a_built_in_is_normalised_and_labelled_as_it(tmp_path):

    for name in ("digits", "mine"):
        (tmp_path / name).mkdir()
        for file in Path(BUILT_IN["digits"].id).glob("*.parquet"):
            shutil.copy(file, tmp_path / name)
    built_in, copy, other = (
        load_data(str(name)) for name in ("digits", tmp_path / "digits", tmp_path / "mine")
    )
    assert (copy.mean, copy.std) == (built_in.mean, built_in.std)
    assert other.mean != built_in.mean  # by another name it is anybody's


def test_rows_are_those_of_the_stored_split_after_a_cut():
    from harness.data.sources import Split, cut, stored_rows

    dataset = datasets.Dataset.from_dict({"x": list(range(3))})
    split = Split("test", dataset, np.arange(3), np.array([0, 1, 1]))
    for number in (1, 2):  # neighbours are selected as a slice, without indices
        kept = cut(split, number, seed=0)
        assert kept.dataset["x"][:] == stored_rows(kept).tolist()
