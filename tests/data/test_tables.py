"""Tables of labels beside images: which are found, how rows meet files, what is refused."""

import json
import os

import datasets
import pytest
from imagefolders import found, make, picture

from harness.data.images import load_images
from harness.data.sources import load_data
from harness.errors import UserError


def csv(root, name, *rows):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path


ROWS = ["file_name,label", "0.png,ant", "1.png,ant", "2.png,bee", "3.png,bee"]
TWO = {"ant": 2, "bee": 2}


def test_metadata_in_each_split(tmp_path):
    for split in ("train", "test"):
        make(tmp_path, f"{split}/*4.png")
        csv(tmp_path / split, "metadata.csv", *ROWS)
    counts, _, notes = found(tmp_path)
    assert counts == {"train": TWO, "test": TWO}
    assert "labels from metadata.csv (file_name → label)" in notes[0]


def test_images_beside_a_table(tmp_path):
    make(tmp_path, "images/*4.png")
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
    make(tmp_path, "images/*6.png")
    csv(tmp_path, "train.csv", "image_id,species", "0,ant", "1,bee", "2,ant", "3,bee")
    csv(tmp_path, "test.csv", "image_id", "4", "5")
    counts, left_out, _ = found(tmp_path)
    assert counts == {"train": TWO}
    assert any(line.startswith("2 images of images/, which are unlabelled") for line in left_out)


def test_a_table_a_split(tmp_path):
    make(tmp_path, "images/*6.png")
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
    make(tmp_path, "images/*4.png")
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
    "two labels": (["file,label", "0.png,a", "0.png,b", "1.png,a"], "twice, with 'a' and 'b'"),
    "rows without files": (
        ["file,label", "x.png,a", "y.png,b", "0.png,a"], "2 of 3 rows have no image",
    ),
    "fractions": (["file,label", "0.png,0.5", "1.png,1"], "'label' .* holds 0.5"),
    "several labels": (["file,label,class", "0.png,a,b"], "columns label, class"),
    "several columns": (["file,a,b", "0.png,1,2"], "the columns a, b and none called label"),
    "no file column": (["what,label", "x,a"], "no column of file names"),
    "no header": (["0.png,a", "1.png,b"], "no line of column names: it begins with 0.png"),
    "ragged": (["file,label", "", "0.png"], "line 3: 1 cells under 2 columns"),
    "two columns of one name": (["file,label,label", "0.png,a,b"], "two columns called label"),
    "no labels": (["file", "0.png", "1.png"], "gives no label to any image of train"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_tables_that_are_refused(tmp_path, name):
    make(tmp_path, "images/*4.png")
    rows, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        load_images(tmp_path, labels=str(csv(tmp_path, "t.csv", *rows)))


def test_a_broken_line_of_json_is_named(tmp_path):
    make(tmp_path, "images/*4.png")
    csv(tmp_path, "metadata.jsonl", '{"file_name": "0.png", "label": "a"}', "", "{oh")
    with pytest.raises(UserError, match=r"metadata.jsonl, line 3: not a JSON object"):
        load_images(tmp_path)


FORMS = {
    "utf-16": ("utf-16", "file,label\n0.png,ä\n1.png,b\n"),
    "byte order mark": ("utf-8-sig", "file,label\n0.png,ä\n1.png,b\n"),
    "semicolons": ("utf-8", 'file;label;x\r\n0.png;ä;"1,5"\r\n1.png;b;2\r\n'),
    "tabs": ("utf-8", "file\tlabel\n0.png\tä\n1.png\tb\n"),
    "numbered rows": ("utf-8", ",file,species\n0,0.png,ä\n1,1.png,b\n"),
    "fractions beside": ("utf-8", "file,weight,species\n0.png,0.5,ä\n1.png,1.5,b\n"),
    "line ends in a cell": ("utf-8", 'file,label,words\n0.png,ä,"two\nlines"\n1.png,b,\n'),
    "an absolute path": ("utf-8", "file,label\nROOT/images/0.png,ä\nROOT/images/1.png,b\n"),
    "of another machine": ("utf-8", "file,label\n/x/NAME/images/0.png,ä\nC:\\a\\images\\1.png,b\n"),
    "up and down": ("utf-8", "file,label\nimages/../images/0.png,ä\n./images//1.png,b\n"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["metadata.csv", "Labels.CSV"])
def test_forms_of_a_table(tmp_path, form, name):
    make(tmp_path, "images/*2.png")
    encoding, text = FORMS[form]
    text = text.replace("ROOT", str(tmp_path)).replace("NAME", tmp_path.name)
    (tmp_path / name).write_text(text, encoding=encoding, newline="")
    counts, left_out, _ = found(tmp_path)
    assert counts == {"train": {"ä": 1, "b": 1}} and not left_out


def test_a_row_of_one_split_is_no_image_of_another(tmp_path):
    """data/train/0.png is not here: test/0.png is another image."""
    make(tmp_path, "test/*4.png", "train/4.png", "train/5.png", "train/6.png", "train/7.png")
    rows = [f"/data/train/{k}.png,{'ab'[k % 2]}" for k in (3, 4, 5, 6, 7)]
    counts, left_out, _ = found(tmp_path, labels=str(csv(tmp_path, "t.csv", "file,label", *rows)))
    assert counts == {"train": {"a": 2, "b": 2}}
    assert "1 row of t.csv without an image: /data/train/3.png" in left_out
    rows = [row.removeprefix("/data/") for row in rows]
    again = found(tmp_path, labels=str(csv(tmp_path, "t.csv", "file,label", *rows)))
    assert again[0] == counts


def test_a_table_outside_of_the_folder(tmp_path):
    make(tmp_path / "images", "*2.png")
    rows = ["file,label", "../images/0.png,a", "../images/1.png,b"]
    file = csv(tmp_path, "labels/t.csv", *rows)
    assert found(tmp_path / "images", labels=str(file))[0] == {"train": {"a": 1, "b": 1}}


def test_large_numbers_stay_apart(tmp_path):
    make(tmp_path, "images/*2.png")
    large = 2**53
    csv(tmp_path, "metadata.csv", "file,label", f"0.png,{large}", f"1.png,{large + 1}")
    assert found(tmp_path)[0] == {"train": {str(large): 1, str(large + 1): 1}}


def test_two_tables_that_both_may_be_the_right_one(tmp_path):
    make(tmp_path, "images/*4.png")
    csv(tmp_path, "metadata.csv", *ROWS)
    csv(tmp_path, "labels.csv", *ROWS)
    with pytest.raises(UserError, match=r"has the tables .*metadata.csv.* --labels FILE"):
        load_images(tmp_path)
    assert found(tmp_path, labels=str(tmp_path / "labels.csv"))[0] == {"train": TWO}


def test_two_tables_without_labels_are_counted_both(tmp_path):
    make(tmp_path, "images/*9.png")
    csv(tmp_path, "train.csv", *ROWS)
    csv(tmp_path, "val.csv", "file_name", "4.png")
    csv(tmp_path, "test.csv", "file_name", "5.png", "6.png")
    counts, left_out, _ = found(tmp_path)
    assert counts == {"train": TWO}
    assert left_out[:2] == [
        "2 images without a row: images/7.png, images/8.png",
        "3 images of images/, which are unlabelled: they can be predicted, not trained on",
    ]


def test_a_table_in_another_unicode_form(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    make(tmp_path, f"{decomposed}/0.png", "b/1.png")
    rows = [f"{decomposed}/0.png,{composed}", "b/1.png,b"]
    csv(tmp_path, "metadata.csv", "file_name,label", *rows)
    counts, left_out, notes = found(tmp_path)
    assert counts == {"train": {composed: 1, "b": 1}} and not left_out
    assert notes == ["labels from metadata.csv (file_name → label)"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_column": "x"}, "--label_column x: .* has no table of labels"),
        ({"file_column": "x"}, "--file_column x: .* has no table of labels"),
        ({"layout": "classes", "label_pattern": "(a)"}, "--layout and --label_pattern both say"),
        ({"layout": "splits", "labels": "t.csv"}, "--layout and --labels both say"),
        ({"labels": "t.csv", "label_pattern": "(a)"}, "--labels and --label_pattern both say"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path, options, words):
    make(tmp_path, "ant/*2.png", "bee/*2.png")
    with pytest.raises(UserError, match=words):
        load_data(str(tmp_path), **options)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("options", [{"classes": "c.txt"}, {"labels": "t.csv"}])
def test_flags_of_image_folders_elsewhere(tmp_path, kind, options):
    columns = {"image": [{"bytes": picture(k), "path": None} for k in range(2)], "label": [0, 1]}
    table = datasets.Dataset.from_dict(columns)
    if kind == "saved":
        table.save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        table.to_parquet(tmp_path / "set" / "train-0.parquet")
    with pytest.raises(UserError, match=f"--{next(iter(options))} is for folders of images"):
        load_data(str(tmp_path / "set"), **options)
    with pytest.raises(UserError, match="there is no such folder"):
        load_data("./no_such_folder", **options)


def rows(head, *cells):
    return [head, *cells]


BOTH = {"ant": 2, "bee": 2}
ONE = {"ant": 1, "bee": 1}
CLASSES = ("ant/*2.png", "bee/*2.png")
TREES = {
    "tables of splits over class folders": (
        ["images/ant/*3.png", "images/bee/*3.png"],
        {"train.csv": rows("file_name,label", "images/ant/0.png,ant", "images/ant/1.png,ant",
                           "images/bee/0.png,bee", "images/bee/1.png,bee"),
         "test.csv": rows("file_name,label", "images/ant/2.png,ant", "images/bee/2.png,bee")},
        {"train": BOTH, "test": ONE},
    ),
    "numbers for the names of folders": (
        [*CLASSES], {"train.csv": rows("f,Label,ClassName", "ant/0.png,0,ant", "bee/0.png,1,bee"),
                     "test.csv": rows("f,Label,ClassName", "ant/1.png,0,ant", "bee/1.png,1,bee")},
        {"train": ONE, "test": ONE},
    ),
    "a table for a flat test": (
        ["train/ant/*2.png", "train/bee/*2.png", "test/*2.png"],
        {"test.csv": rows("file_name,label", "test/0.png,ant", "1.png,bee")},
        {"train": BOTH, "test": ONE},
    ),
    "a table for all, with a flat test": (
        ["train/ant/*1.png", "train/bee/*1.png", "test/*2.png"],
        {"metadata.csv": rows("file_name,label", "train/ant/0.png,ant", "train/bee/0.png,bee",
                              "test/0.png,ant", "test/1.png,bee")},
        {"train": ONE, "test": ONE},
    ),
    "a table in train, class folders in test": (
        ["train/*4.png", "test/ant/*1.png", "test/bee/*1.png"],
        {"train/metadata.csv": ROWS}, {"train": BOTH, "test": ONE},
    ),
    "a column of splits": (
        ["images/*4.png"],
        {"metadata.csv": rows("file_name,label,split", "0.png,ant,train", "1.png,bee,Train",
                              "2.png,ant,test", "3.png,bee,val")},
        {"train": ONE, "validation": {"bee": 1}, "test": {"ant": 1}},
    ),
    "a column is_train": (
        ["images/*4.png"],
        {"metadata.csv": rows("file_name,label,is_train", "0.png,ant,1", "1.png,bee,1",
                              "2.png,ant,0", "3.png,bee,0")},
        {"train": ONE, "test": ONE},
    ),
    "a column of splits over class folders": (
        [*CLASSES], {"metadata.csv": rows("file_name,split", "ant/0.png,train", "ant/1.png,test",
                                          "bee/0.png,train", "bee/1.png,test")},
        {"train": ONE, "test": ONE},
    ),
    "splits below images": (
        ["data/images/train/*2.png", "data/images/test/2.png", "data/images/test/3.png"],
        {"metadata.csv": rows("id,label", "0,ant", "1,bee", "2,ant", "3,bee")},
        {"train": ONE, "test": ONE},
    ),
    "ids that are images of test": (
        ["images/*2.png", "test/8.png", "test/9.png"],
        {"train.csv": rows("id,label", "0,ant", "1,bee", "9,bee")}, {"train": ONE},
    ),
    "a test table with other columns": (
        ["train/*2.png", "test/*2.png"],
        {"train.csv": rows("file,label,age", "0.png,ant,1", "1.png,bee,2"),
         "test.csv": rows("file,age", "0.png,1", "1.png,2")}, {"train": ONE},
    ),
    "a column that says what the folders say": (
        ["Train/0/*1.png", "Train/1/*1.png", "Test/*2.png"],
        {"Train.csv": rows("Width,ClassId,Path", "5,0,Train/0/0.png", "5,1,Train/1/0.png"),
         "Test.csv": rows("Width,ClassId,Path", "5,0,Test/0.png", "5,1,Test/1.png")},
        {"train": {"0": 1, "1": 1}, "test": {"0": 1, "1": 1}},
    ),
    "captions beside class folders": (
        [*CLASSES], {"metadata.csv": rows("file_name,text", "ant/0.png,an ant", "ant/1.png,two",
                                          "bee/0.png,a bee", "bee/1.png,bees")}, {"train": BOTH},
    ),
    "a column of another name": (
        ["images/*2.png"], {"labels.csv": rows("id_code,diagnosis", "0,ant", "1,bee")},
        {"train": ONE},
    ),
    "blank labels of test": (
        ["train/*2.png", "test/*2.png"],
        {"train.csv": rows("file,label", "0.png,ant", "1.png,bee"),
         "test.csv": rows("file,label", "0.png,", "1.png,")}, {"train": ONE},
    ),
    "zero-padded names": (
        ["images/*2.png"], {"labels.csv": rows("id,label", "0,001", "1,010")},
        {"train": {"001": 1, "010": 1}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_tables_and_folders_together(tmp_path, name):
    paths, tables, counts = TREES[name]
    make(tmp_path, *paths)
    for table, lines in tables.items():
        csv(tmp_path, table, *lines)
    assert found(tmp_path)[0] == counts
    images = sum(len(files) for _, _, files in os.walk(tmp_path)) - len(tables)
    stored = load_images(tmp_path)
    left_out = sum(
        int(line.split()[0]) for line in stored.left_out if " images" in line or " image " in line
    )
    assert images == left_out + sum(map(len, stored.splits.values())), stored.left_out


MORE_TREES = {
    "words of a split": (
        ["images/*6.png"],
        {"t.csv": rows("file,label,Usage", "0.png,a,Training", "1.png,b,Training",
                       "2.png,a,PublicTest", "3.png,b,PrivateTest", "4.png,b,", "5.png,a,unused")},
        {"labels": "t.csv"}, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}},
        ["2 images of no split by column Usage: images/4.png, images/5.png"],
    ),
    "is_train of yes and no": (
        ["images/*3.png"],
        {"t.csv": rows("file,label,is_train", "0.png,a,yes", "1.png,b,Yes", "2.png,a,no")},
        {"labels": "t.csv"}, {"train": {"a": 1, "b": 1}, "test": {"a": 1}}, [],
    ),
    "train.csv with a split of its own": (
        ["images/*3.png"],
        {"train.csv": rows("file,label,is_valid", "0.png,a,0", "1.png,b,0", "2.png,a,1")},
        {}, {"train": {"a": 1, "b": 1}, "validation": {"a": 1}}, [],
    ),
    "test.csv without labels over class folders": (
        ["train/ant/*1.png", "train/bee/*1.png", "test/ant/*1.png", "test/bee/*1.png"],
        {"test.csv": rows("file,width", "ant/0.png,5", "bee/0.png,6")},
        {}, {"train": ONE, "test": ONE}, [],
    ),
    "a stray image beside the classes of a split": (
        ["train/*2.png", "val/ant/*1.png", "val/bee/*1.png", "val/overview.png"],
        {"train.csv": rows("file,label", "0.png,ant", "1.png,bee")},
        {}, {"train": ONE, "validation": ONE}, ["1 image without a row: val/overview.png"],
    ),
    "one image in two tables without labels": (
        ["images/*5.png"],
        {"train.csv": rows("file,label", "0.png,ant", "1.png,bee"),
         "val.csv": rows("file", "1.png", "2.png"), "test.csv": rows("file", "2.png", "3.png")},
        {}, {"train": ONE}, ["1 image without a row: images/4.png", "2 images of images/, which"],
    ),
    "spaces before quotes": (
        ["images/*3.png"],
        {"t.csv": rows("file, label", '0.png, "ant"', "1.png, ant", "2.png, bee")},
        {"labels": "t.csv"}, {"train": {"ant": 2, "bee": 1}}, [],
    ),
    "a table of a part of class folders": (
        [*CLASSES], {"test.csv": rows("file,label", "ant/1.png,ant", "bee/1.png,bee")},
        {}, {"train": ONE, "test": ONE}, [],
    ),
    "a table for test over CLASS/SPLIT": (
        ["ant/train/*1.png", "bee/train/*1.png", "ant/test/*1.png", "bee/test/*1.png"],
        {"test.csv": rows("file,label", "ant/test/0.png,ant", "bee/test/0.png,bee")},
        {}, {"train": ONE, "test": ONE}, [],
    ),
    "masks beside train": (
        ["train/*2.png", "test/*1.png", "masks/*2.png"],
        {"train.csv": rows("file,label", "train/0.png,ant", "train/1.png,bee")},
        {}, {"train": ONE}, ["2 images without a row: masks/0.png"],
    ),
    "a logo beside splits": (
        ["train/*4.png", "test/a.png", "logo.png"],
        {"train.csv": rows("file,label", "0.png,ant", "1.png,bee"),
         "val.csv": rows("file,label", "2.png,ant", "3.png,bee")},
        {}, {"train": ONE, "validation": ONE}, ["1 image without a row: logo.png"],
    ),
    "decomposed names of files": (
        ["images/cafe\u0301.png", "images/b.png"],
        {"t.csv": rows("file,label", "caf\u00e9.png,ant", "b.png,bee")},
        {"labels": "t.csv"}, {"train": ONE}, [],
    ),
    "a list with a space": (
        ["images/*4.png"], {"a.csv": [*ROWS[:1], "0.png,ant", "1.png,bee"],
                            "b.csv": [*ROWS[:1], "2.png,ant", "3.png,bee"]},
        {"labels": "train=a.csv, val=b.csv"}, {"train": ONE, "validation": ONE}, [],
    ),
    "images and masks": (
        ["i/*2.png", "m/*2.png"],
        {"t.csv": rows("image,mask,label", "i/0.png,m/1.png,ant", "i/1.png,m/0.png,bee")},
        {"labels": "t.csv"}, {"train": ONE}, ["2 images without a row: m/0.png, m/1.png"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE_TREES)
def test_what_tables_say_of_splits_and_images(tmp_path, name):
    paths, tables, options, counts, left_out = MORE_TREES[name]
    make(tmp_path, *paths)
    for table, lines in tables.items():
        csv(tmp_path, table, *lines)
    found_counts, found_left_out, _ = found(tmp_path, **options)
    assert found_counts == counts
    for line in left_out:
        assert any(one.startswith(line) for one in found_left_out), found_left_out


BAD_TREES = {
    "swapped names": (
        [*CLASSES], "file_name,label",
        ["ant/0.png,bee", "ant/1.png,bee", "bee/0.png,ant", "bee/1.png,ant"],
        "has class folders and metadata.csv, and they differ",
    ),
    "neither yes nor no": (
        ["images/*2.png"], "file_name,label,is_train", ["0.png,a,1", "1.png,b,"],
        "column 'is_train' of .* says '', neither yes nor no",
    ),
    "a row number called id": (
        ["images/*3.png"], "id,image_name,label", ["0,2.png,ant", "1,1.png,bee", "2,0.png,ant"],
        "names other files in column 'id' than in 'image_name'|than in 'id'",
    ),
    "parts that are no classes": (
        ["part_1/*2.png", "part_2/*2.png"], "file_name,label",
        ["part_1/0.png,a", "part_1/1.png,b", "part_2/0.png,a", "part_2/1.png,b"],
        "has class folders and metadata.csv, and they differ",
    ),
    "which of several columns": (
        [*CLASSES], "file_name,kind,origin",
        ["ant/0.png,x,y", "ant/1.png,x,y", "bee/0.png,x,y", "bee/1.png,x,z"],
        "columns kind, origin and none called label",
    ),
    "each has other images": (
        [*CLASSES, "more/*1.png"], "file_name,label", ["ant/0.png,ant", "more/0.png,more"],
        "class folders",
    ),
    "two columns of splits": (
        ["images/*2.png"], "file_name,label,split,is_train", ["0.png,a,train,1", "1.png,b,test,1"],
        "says the split in the columns split and is_train",
    ),
    "a column of splits against the folders": (
        ["train/*2.png", "test/8.png"], "file_name,label,split",
        ["train/0.png,a,train", "train/1.png,b,train", "test/8.png,a,train"],
        "is of split 'train' by column split .* but its folder says another",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TREES)
def test_tables_and_folders_that_differ(tmp_path, name):
    paths, head, lines, words = BAD_TREES[name]
    make(tmp_path, *paths)
    csv(tmp_path, "metadata.csv", head, *lines)
    if name == "each has other images":
        (tmp_path / "more" / "deep").mkdir()
        (tmp_path / "more" / "0.png").rename(tmp_path / "0.png")
        csv(tmp_path, "metadata.csv", head, "ant/0.png,ant", "0.png,bee")
    with pytest.raises(UserError, match=words):
        load_images(tmp_path)


def test_a_table_in_one_of_two_folders(tmp_path):
    make(tmp_path, "data/images/*2.png", "docs/figure.png")
    csv(tmp_path, "data/train.csv", "file,label", "0.png,ant", "1.png,bee")
    with pytest.raises(UserError, match=r"has class folders and train.csv, and they differ"):
        load_images(tmp_path)
    assert found(tmp_path, labels="data/train.csv")[0] == {"train": ONE}


def test_a_table_of_another_name_is_pointed_at(tmp_path):
    make(tmp_path, *CLASSES)
    csv(tmp_path, "skin.csv", *ROWS)
    notes = found(tmp_path)[2]
    assert notes == ["not read: skin.csv; --labels skin.csv takes the labels from it"]


def test_equal_rows_and_empty_labels(tmp_path):
    make(tmp_path, "images/*4.png")
    file = csv(tmp_path, "t.csv", "file,label", "0.png,a", "0.png,a", "1.png,b", "2.png,")
    counts, left_out, _ = found(tmp_path, labels=str(file))
    assert counts == {"train": {"a": 1, "b": 1}}
    assert "1 image without a label in t.csv: images/2.png" in left_out


def test_a_pointer_is_called_one(tmp_path):
    make(tmp_path, "images/*4.png")
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
    assert data.image_column == ("image" if kind == "paths" else "picture")
    assert data.image_size == 8
    assert data.train.labels.tolist() == [0, 1, 0, 1]


def test_other_parquet_files_beside_images(tmp_path):
    """They are no reason to leave the listing to anybody else."""
    make(tmp_path, "train/ant/x/*2.png", "train/bee/y/*2.png", "train/bee/my-test-1.png")
    datasets.Dataset.from_dict({"vector": [[0.5]]}).to_parquet(tmp_path / "embeddings.parquet")
    data = load_data(str(tmp_path))
    assert data.classes == ["ant", "bee"] and len(data.train) == 5
    assert "1 .parquet: not images" in data.left_out


def test_images_beside_parquet_files_are_counted(tmp_path):
    table = {"image": [picture(k) for k in range(2)], "label": [0, 1]}
    make(tmp_path, "preview/*3.png")
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "train-0.parquet")
    assert load_data(str(tmp_path)).left_out == ["3 images beside the parquet files"]


@pytest.mark.parametrize("columns", [
    {"file_name": ["train/ant/0.png"], "blurry": [0]}, {"path": ["train/ant/0.png"], "md5": [b"x"]},
    {"path": ["train/ant/0.png"], "box": [{"x": 1}]},
])  # fmt: skip
@pytest.mark.parametrize("card", ["", "---\ndataset_info:\n  x: 1\n---\n"])
def test_parquet_files_about_images_do_not_overrule_class_folders(tmp_path, columns, card):
    make(tmp_path, "train/ant/*2.png", "train/bee/*2.png", "test/ant/*1.png")
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "quality.parquet")
    if card:
        (tmp_path / "README.md").write_text(card)
    data = load_data(str(tmp_path))
    assert data.classes == ["ant", "bee"] and (len(data.train), len(data.test)) == (4, 1)
    assert any("quality.parquet" in note for note in data.notes)


def test_parquet_folders_of_configurations_and_missing_shards(tmp_path):
    def write(name, labels):
        table = {"image": [picture(k) for k in range(2)], "label": labels}
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / name)

    write("fine/train-00000-of-00001.parquet", [0, 1])
    write("coarse/train-00000-of-00001.parquet", ["x", "y"])
    with pytest.raises(UserError, match=r"FOLDER:coarse or FOLDER:fine|FOLDER:fine or"):
        load_data(str(tmp_path))
    assert load_data(f"{tmp_path}:coarse").classes == ["x", "y"]
    with pytest.raises(UserError, match="there is no such folder or configuration"):
        load_data(f"{tmp_path}:medium")
    write("part/train-00001-of-00003-0123abcd.parquet", [0, 1])
    with pytest.raises(UserError, match=r"train-00000-of-00003.parquet is missing: 1 of 3"):
        load_data(f"{tmp_path}:part")


def test_a_configured_folder_is_read_anew(tmp_path):
    card = "---\nconfigs:\n- config_name: a\n  data_files: a/*.parquet\n---\n"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "a").mkdir()
    for number in (2, 3):
        table = {"image": [picture(k) for k in range(number)], "label": list(range(number))}
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / "a" / "train.parquet")
        assert len(load_data(str(tmp_path)).train) == number


def test_what_is_not_used_of_a_saved_folder_is_said(tmp_path):
    table = datasets.Dataset.from_dict({"image": [picture(k) for k in range(2)], "label": [0, 1]})
    table = table.cast_column("image", datasets.Image())
    datasets.DatasetDict(train=table, extra=table).save_to_disk(tmp_path / "set")
    data = load_data(str(tmp_path / "set"))
    assert data.left_out == ["2 images of split 'extra', which is not used"]
    (tmp_path / "set" / "extra").rename(tmp_path / "outside")
    (tmp_path / "set" / "extra").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link that leads outside"):
        load_data(str(tmp_path / "set"))


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json"])
def test_each_damage_of_a_saved_folder_is_one_line(tmp_path, file):
    table = datasets.Dataset.from_dict({"image": [picture(k) for k in range(2)], "label": [0, 1]})
    table = table.cast_column("image", datasets.Image())
    table.cast_column("label", datasets.ClassLabel(names=["a", "b"])).save_to_disk(tmp_path)
    whole = json.loads((tmp_path / file).read_text())
    for key in whole:
        for value in ("absent", None, 5, [], {}, "x", [5]):
            damaged = {k: v for k, v in whole.items() if k != key}
            damaged |= {} if value == "absent" else {key: value}
            (tmp_path / file).write_text(json.dumps(damaged))
            try:
                load_data(str(tmp_path))
            except UserError as error:
                assert "\n" not in str(error)


def test_which_split_a_parquet_file_is_of(tmp_path):
    table = datasets.Dataset.from_dict({"image": [picture(k) for k in range(2)], "label": [0, 1]})
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev", "extra-00000-of-00001"):
        table.to_parquet(tmp_path / "data" / f"{name}.parquet")
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.val), data.test) == (4, 2, None)
    assert len(load_data(str(tmp_path), train_split="extra").train) == 2
    table.to_parquet(tmp_path / "data" / "more.parquet")
    with pytest.raises(UserError, match=r"more.parquet names no split, as data/dev.parquet does"):
        load_data(str(tmp_path))


def test_one_of_two_columns_of_bytes(tmp_path):
    pictures = [picture(k) for k in range(2)]
    table = datasets.Dataset.from_dict({"image": pictures, "mask": pictures, "label": [0, 1]})
    table.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="no columns of images"):
        load_data(str(tmp_path))
    assert load_data(str(tmp_path), image_column="image").image_column == "image"


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
        ({"age": [1, 2], "size": [1, 2]}, "columns age, size and none called label"),
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
