"""Tables of labels beside images: which are found, how rows meet files, what is refused."""

import json

import datasets
import pytest

from harness.data.images import load_images
from harness.data.sources import load_data
from harness.errors import UserError

from test_folders import found, make, picture  # isort: skip


def csv(root, name, *rows):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path


def flat(root, folder, number=4):
    make(root, *(f"{folder}/{k}.png" for k in range(number)))


ROWS = ["file_name,label", "0.png,ant", "1.png,ant", "2.png,bee", "3.png,bee"]
TWO = {"ant": 2, "bee": 2}


def test_metadata_in_each_split(tmp_path):
    for split in ("train", "test"):
        flat(tmp_path, split)
        csv(tmp_path / split, "metadata.csv", *ROWS)
    counts, _, notes = found(tmp_path)
    assert counts == {"train": TWO, "test": TWO}
    assert "labels from metadata.csv (file_name → label)" in notes[0]


def test_images_beside_a_table(tmp_path):
    flat(tmp_path, "images")
    csv(tmp_path, "metadata.csv", *(row.replace("0.png", "images/0.png") for row in ROWS))
    assert found(tmp_path)[0] == {"train": TWO}


def test_kaggle(tmp_path):
    """train.csv of ids without suffix, train/ and an unlabelled test/."""
    make(tmp_path, *(f"train/00{k}.png" for k in range(4)), "test/*3.png", "extra.txt")
    csv(tmp_path, "train.csv", "id,label", "000,ant", "001,ant", "002,bee", "003,bee")
    csv(tmp_path, "sample_submission.csv", "id,label", "0,ant")
    counts, left_out, _ = found(tmp_path)
    assert counts == {"train": TWO}
    assert "3 images of test/, which are unlabelled: they can be predicted, not trained on" in (
        left_out
    )


def test_one_folder_of_images_for_train_and_test(tmp_path):
    flat(tmp_path, "images", 6)
    csv(tmp_path, "train.csv", "image_id,species", "0,ant", "1,bee", "2,ant", "3,bee")
    csv(tmp_path, "test.csv", "image_id", "4", "5")
    counts, left_out, _ = found(tmp_path)
    assert counts == {"train": TWO}
    assert any(line.startswith("2 images of images/, which are unlabelled") for line in left_out)


def test_a_table_a_split(tmp_path):
    flat(tmp_path, "images", 6)
    train = csv(tmp_path / "t", "a.csv", "path;kind", "0.png;x", "1.png;y")
    val = csv(tmp_path / "t", "b.jsonl", *(json.dumps({"file": f"{k}.png", "label": v})
                                            for k, v in ((2, "x"), (3, "y"))))  # fmt: skip
    counts, left_out, _ = found(tmp_path, labels=f"train={train},val={val}")
    assert counts == {"train": {"x": 1, "y": 1}, "validation": {"x": 1, "y": 1}}
    assert any(
        line.startswith("2 images without a row: images/4.png, images/5") for line in left_out
    )
    with pytest.raises(UserError, match="holdout is no split"):
        load_images(tmp_path, labels=f"holdout={train}")


def test_numbers_are_classes_by_value_and_ids_are_text(tmp_path):
    make(tmp_path, "images/007.png", "images/7.png", "images/8.png", "images/9.png")
    file = csv(tmp_path, "any.csv", "id,label", "007,10", "7,2", "8,0", "9,2.0")
    data = load_data(str(tmp_path), labels=str(file))
    assert data.classes == ["0", "2", "10"]
    paths = [row["path"].rpartition("/")[2] for row in data.train.dataset.with_format("arrow")[:][
        "image"].to_pylist()]  # fmt: skip
    assert dict(zip(paths, data.train.labels.tolist(), strict=True)) == {
        "007.png": 2, "7.png": 1, "8.png": 0, "9.png": 1,
    }  # fmt: skip


def test_other_columns_are_kept(tmp_path):
    flat(tmp_path, "images")
    (tmp_path / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": f"images/{k}.png", "label": "ab"[k % 2], "box": [k, 0, 5, 5]})
            + "\n"
            for k in range(4)
        )
    )
    dataset = load_images(tmp_path).splits["train"]
    assert dataset["box"][3] == [3, 0, 5, 5]
    assert list(dataset.features) == ["image", "label", "box"]


def test_a_table_over_class_folders(tmp_path):
    make(tmp_path, "ant/*2.png", "bee/*2.png")
    file = csv(tmp_path, "labels.csv", "file,label", "ant/0.png,x", "ant/1.png,y", "bee/0.png,x",
               "bee/1.png,y")  # fmt: skip
    with pytest.raises(UserError, match=r"class folders and labels.csv, and they differ"):
        load_images(tmp_path)
    assert found(tmp_path, labels=str(file))[0] == {"train": {"x": 2, "y": 2}}
    assert found(tmp_path, layout="classes")[0] == {"train": TWO}
    csv(tmp_path, "labels.csv", "file,label", "ant/0.png,ant", "bee/0.png,bee")
    assert found(tmp_path)[0] == {"train": TWO}
    csv(tmp_path, "labels.csv", "word,meaning", "ant,an insect")
    counts, _, notes = found(tmp_path)
    assert counts == {"train": TWO} and "labels.csv is not used" in notes[0]


REFUSED = {
    "two labels": (["file,label", "0.png,a", "0.png,b", "1.png,a"], "twice, with the labels 'a'"),
    "rows without files": (
        ["file,label", "x.png,a", "y.png,b", "0.png,a"], "2 of 3 rows have no image",
    ),
    "fractions": (["file,label", "0.png,0.5", "1.png,1"], "'label' .* holds 0.5"),
    "several labels": (["file,label,class", "0.png,a,b"], "columns label, class"),
    "several columns": (["file,a,b", "0.png,1,2"], "no column called label, and 2 others"),
    "no file column": (["what,label", "0.png,a"], "no column of file names"),
    "ragged": (["file,label", "0.png"], "line 2: 1 cells under 2 columns"),
    "no labels": (["file", "0.png", "1.png"], "gives no label to any image of train"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_tables_that_are_refused(tmp_path, name):
    flat(tmp_path, "images")
    rows, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        load_images(tmp_path, labels=str(csv(tmp_path, "t.csv", *rows)))


def test_equal_rows_and_empty_labels(tmp_path):
    flat(tmp_path, "images")
    file = csv(tmp_path, "t.csv", "file,label", "0.png,a", "0.png,a", "1.png,b", "2.png,")
    counts, left_out, _ = found(tmp_path, labels=str(file))
    assert counts == {"train": {"a": 1, "b": 1}}
    assert "1 image without a label in t.csv: images/2.png" in left_out


def test_a_pointer_is_called_one(tmp_path):
    flat(tmp_path, "images")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "t.csv").write_text(pointer)
    with pytest.raises(UserError, match="Git LFS pointer"):
        load_images(tmp_path, labels=str(tmp_path / "t.csv"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train-0.parquet").write_text(pointer)
    with pytest.raises(UserError, match="Git LFS pointer"):
        load_data(str(tmp_path / "hub"))


# -- parquet -------------------------------------------------------------------------------------

BYTES = [picture(k) for k in range(4)]
PARQUET_IMAGES = {
    "struct": [{"bytes": b, "path": None} for b in BYTES],
    "bytes": BYTES,
    "paths": [f"pictures/{k}.png" for k in range(4)],
}


@pytest.mark.parametrize("kind", PARQUET_IMAGES)
def test_parquet_without_the_type_image(tmp_path, kind):
    make(tmp_path, "pictures/*4.png")
    columns = {"picture": PARQUET_IMAGES[kind], "label": [0, 1, 0, 1]}
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train-0.parquet")
    data = load_data(str(tmp_path))
    assert data.image_column == "picture" and data.image_size == 8
    assert data.train.labels.tolist() == [0, 1, 0, 1]


def test_a_folder_with_configurations(tmp_path):
    for config, labels in (("one", [0, 1]), ("two", [1, 0])):
        (tmp_path / config).mkdir()
        datasets.Dataset.from_dict(
            {"image": BYTES[:2], "label": labels}, features=datasets.Features(
                image=datasets.Image(), label=datasets.Value("int64"))
        ).to_parquet(tmp_path / config / "train-0.parquet")  # fmt: skip
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(f"- config_name: {c}\n  data_files: {c}/*.parquet\n" for c in ("one", "two"))
        + "---\n"
    )
    assert load_data(f"{tmp_path}:two").train.labels.tolist() == [1, 0]
    with pytest.raises(UserError, match=r"add a configuration"):
        load_data(str(tmp_path))


LABELS = {
    "named wins over ClassLabel": (
        {"label": ["x", "y"], "kind": datasets.ClassLabel(names=["a", "b"])},
        ["x", "y"],
    ),
    "whole floats": ({"label": [2.0, 10.0]}, ["2", "10"]),
    "booleans": ({"target": [True, False]}, ["false", "true"]),
    "the only one": ({"species": ["b", "a"], "weight": [0.5, 0.7]}, ["a", "b"]),
}


def arrow(columns):
    values = {n: [0, 1] if isinstance(v, datasets.ClassLabel) else v for n, v in columns.items()}
    dataset = datasets.Dataset.from_dict({"image": BYTES[:2], **values})
    dataset = dataset.cast_column("image", datasets.Image())
    for name, kind in columns.items():
        if isinstance(kind, datasets.ClassLabel):
            dataset = dataset.cast_column(name, kind)
    return dataset


@pytest.mark.parametrize("name", LABELS)
def test_the_column_of_labels(tmp_path, name):
    columns, classes = LABELS[name]
    arrow(columns).to_parquet(tmp_path / "train-0.parquet")
    assert load_data(str(tmp_path)).classes == classes


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": [0.5, 1.0], "age": [1, 2]}, "column 'label' holds 0.5"),
        ({"labels": [[1], [2]], "age": [1, 2]}, "several labels an image are not supported"),
        ({"label": [0, 1], "class": [1, 2]}, "columns label, class"),
        ({"age": [1, 2], "size": [1, 2]}, "there are 2 columns of labels"),
        ({"weight": [0.5, 0.1]}, "there are no columns of labels"),
        ({"label": [None, 1]}, "1 of 2 images of split 'train' have no label"),
    ],
)
def test_no_other_column_is_taken(tmp_path, columns, words):
    arrow(columns).to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=words) as error:
        load_data(str(tmp_path))
    assert "--val_split" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("dataset_dict.json", "{}", "has no splits"),
        ("dataset_dict.json", '{"splits": "train"}', "splits is 'train'"),
        ("dataset_dict.json", '{"splits": ["../other"]}', "which is no folder in it"),
        ("dataset_dict.json", "[" * 100_000, "can't be read"),
        ("train/state.json", "{}", "has no _data_files"),
        ("train/state.json", '{"_data_files": [{"filename": "../../x"}]}', "names the file"),
        ("train/state.json", '{"_data_files": [{"filename": "x.arrow"}]}', "x.arrow is missing"),
        ("train/state.json", '{"_data_files": [1]}', "names the file None"),
    ],
)
def test_a_damaged_saved_folder(tmp_path, file, text, words):
    saved = datasets.DatasetDict(train=arrow({"label": [0, 1]}))
    saved.save_to_disk(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=words):
        load_data(str(tmp_path))
