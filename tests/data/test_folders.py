"""Folders of images: every layout, what is left out, and what is refused, in a tree made here."""

import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagefolders import found, make, picture
from PIL import Image

from harness.data import formats
from harness.data.folders import read_folder, split_of
from harness.data.images import load_images
from harness.data.listing import Images, count_left_out, scan
from harness.data.sources import load_data
from harness.errors import UserError

THREE = {"ant": 2, "bee": 2}
LAYOUTS = {
    "classes": (["ant/*2.png", "bee/*2.png"], {"train": THREE}),
    "splits": (
        ["train/ant/*2.png", "train/bee/*2.png", "val/ant/*1.png", "test/bee/*3.png"],
        {"train": THREE, "validation": {"ant": 1}, "test": {"bee": 3}},
    ),
    "wrapped classes": (["archive/ant/*2.png", "archive/bee/*2.png"], {"train": THREE}),
    "wrapped splits": (
        ["a/Training/ant/*2.png", "a/Training/bee/*2.png", "a/eval/ant/*1.png"],
        {"train": THREE, "test": {"ant": 1}},
    ),
    "words": (
        ["seg_train/ant/*2.png", "seg_train/bee/*2.png", "seg_test1/ant/*1.png"],
        {"train": THREE, "test": {"ant": 1}},
    ),
    "a class called test": (
        ["train/ant/*2.png", "train/test/*2.png", "test/test/*1.png"],
        {"train": {"ant": 2, "test": 2}, "test": {"test": 1}},
    ),
    "class, then split": (
        ["ant/train/*2.png", "bee/train/*2.png", "ant/test/*1.png", "bee/val/*1.png"],
        {"train": THREE, "test": {"ant": 1}, "validation": {"bee": 1}},
    ),
    "deeper": (["ant/x/y/*1.png", "ant/*1.png", "bee/x/*2.png"], {"train": THREE}),
    "flat test beside classes": (["ant/*2.png", "bee/*2.png", "test1/*2.png"], {"train": THREE}),
    "a flat test beside splits": (
        ["train/ant/*2.png", "train/bee/*2.png", "test/*2.png"], {"train": THREE},
    ),
    "a class called train": (
        ["bus/*1.png", "car/*1.png", "train/*1.png"], {"train": {"bus": 1, "car": 1, "train": 1}}
    ),
    "numbers are text": (
        ["0/*1.png", "2/*1.png", "10/*1.png"], {"train": {"0": 1, "10": 1, "2": 1}}
    ),
    "other suffixes": (
        ["ant/a.PPM", "ant/a.TGA", "bee/*1.webp", "bee/b.JPG"], {"train": THREE},
    ),
    "a split in a folder of its name": (
        ["seg_train/seg_train/ant/*2.png", "seg_train/seg_train/bee/*2.png",
         "seg_test/seg_test/ant/*1.png"],
        {"train": THREE, "test": {"ant": 1}},
    ),
    "hidden things": (
        ["ant/*2.png", "ant/._0.png", "bee/*2.png", ".git/x/a.png", "__MACOSX/ant/0.png",
         ".ipynb_checkpoints/c/a.png", "ant/Thumbs.db", "ant/.ipynb_checkpoints/0.png"],
        {"train": THREE},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    paths, wanted = LAYOUTS[name]
    counts, left_out, notes = found(make(tmp_path, *paths))
    assert counts == wanted
    assert bool(left_out) == name.startswith(("flat", "a flat"))
    if left_out:
        assert "unlabelled" in left_out[0] and left_out[0].startswith("2 images of test")
    if name == "a class called train":
        assert notes == ["train is a class here, not a split"]
    if name == "numbers are text":
        assert load_data(str(tmp_path)).classes == ["0", "10", "2"]


REFUSED = {
    "flat splits": (["train/*3.png", "test/*2.png"], "no table of labels.*--label_pattern"),
    "unlabelled alone": (["unlabeled/*3.png", "inference/*2.png"], "without class folders inside"),
    "a table of another name": (
        ["images/*3.png", "skin_metadata.csv"],
        "--labels FILE .there is skin_metadata.csv",
    ),
    "one class": (["*3.png"], "no class folders.*the folder of one class"),
    "nothing": (["a/b.txt", "c.zip"], r"has no images.*1 .zip: an archive: unpack it"),
    "several data sets": (
        ["one/train/ant/0.png", "one/test/ant/1.png", "two/train/ant/0.png"],
        "2 data sets with splits of their own, one, two",
    ),
    "only some hold splits": (["ant/train/0.png", "bee/0.png"], "ant/ holds .* but bee does not"),
    "test with classes, no train": (
        ["ant/*2.png", "bee/*2.png", "test/ant/0.png"],
        "test/ holds class folders, but there is no",
    ),
    "two train folders": (["train/ant/0.png", "Training/ant/1.png"], "both the split 'train'"),
    "a class that train lacks": (
        ["train/ant/0.png", "train/bee/1.png", "test/Ant/0.png"],
        r"'Ant'.*\(train has ant\)",
    ),
    "a mistyped class": (
        ["train/dog/0.png", "train/cat/1.png", "test/dgo/0.png"],
        r"'dgo'.*\(train has dog\)",
    ),
    "another class in test": (
        ["train/ant/0.png", "test/cow/0.png"],
        "'cow', which train does not have",
    ),
    "more loose than sorted": (["ant/0.png", "bee/0.png", "*3.png"], "3 outside of them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_in_the_users_words(tmp_path, name):
    paths, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as error:
        load_images(make(tmp_path, *paths))
    assert "ClassLabel" not in str(error.value) and "column" not in str(error.value)


def test_layout_overrules(tmp_path):
    make(tmp_path, "train/a/*2.png", "train/b/*2.png", "other/*1.png")
    assert set(found(tmp_path)[0]["train"]) == {"a", "b"}
    assert found(tmp_path, layout="classes")[0] == {"train": {"train": 4, "other": 1}}
    counts, left_out, _ = found(tmp_path, layout="splits")
    assert counts == {"train": {"a": 2, "b": 2}}
    assert left_out == ["1 image outside of the class folders: other/0.png"]
    make(tmp_path / "flat", "bus/*1.png", "car/*1.png")
    with pytest.raises(UserError, match="--layout splits"):
        load_images(tmp_path / "flat", layout="splits")


def test_a_split_that_is_not_used_may_have_other_classes(tmp_path):
    make(tmp_path, "train/ant/*2.png", "train/bee/*2.png", "test/cow/*2.png")
    with pytest.raises(UserError, match=r"which train does not have.*--test_split none"):
        load_data(str(tmp_path))
    data = load_data(str(tmp_path), test_split="none")
    assert data.classes == ["ant", "bee"] and data.test is None
    assert data.left_out == ["2 images of split 'test', not asked for"]


def test_another_split_may_be_train(tmp_path):
    make(tmp_path, "train/ant/*2.png", "train/bee/*2.png", "test/ant/*1.png", "test/bee/*1.png")
    data = load_data(str(tmp_path), train_split="test", test_split="none")
    assert len(data.train) == 2 and data.left_out == ["4 images of split 'train', not asked for"]


def test_a_quick_look_keeps_images_of_every_class(tmp_path):
    make(tmp_path, *(f"{name}/*4.png" for name in "abcdef"))
    for empty in ("refuse", "drop"):
        with pytest.raises(UserError, match="--max_train_samples 3 keeps images of only 3 of 6"):
            load_data(str(tmp_path), max_train_samples=3, empty_classes=empty)
    assert len(load_data(str(tmp_path), max_train_samples=3, empty_classes="keep").classes) == 6


def test_links_are_followed_and_loops_refused(tmp_path):
    store = make(tmp_path / "store", "x/*2.png", "y/*2.png")
    root = tmp_path / "set"
    root.mkdir()
    (root / "ant").symlink_to(store / "x")
    (root / "bee").symlink_to(store / "y")
    assert found(root)[0] == {"train": THREE}
    (root / "ant" / "again.png").symlink_to(store / "x" / "0.png")
    counts, left_out, _ = found(root)
    assert counts == {"train": THREE} and left_out == ["1 image of train that links reach twice"]
    (store / "y" / "broken.png").symlink_to(tmp_path / "nowhere")
    assert "1 broken link: bee/broken.png" in found(root)[1]
    os.mkfifo(store / "y" / "pipe.png")
    (store / "y" / "self").symlink_to(store / "y" / "self")
    left_out = set(found(root)[1])
    assert "2 broken links: bee/broken.png, bee/self" in left_out
    assert "1 special file: bee/pipe.png" in left_out
    (root / "bee" / "copy.png").symlink_to(store / "x" / "0.png")
    with pytest.raises(UserError, match="are the same file, of two classes"):
        load_images(root)
    (store / "y" / "copy.png").unlink()
    (store / "y" / "loop").symlink_to(root)
    with pytest.raises(UserError, match="is a link to a folder that it lies in"):
        load_images(root)


def test_one_image_in_two_splits_is_refused(tmp_path):
    make(tmp_path, "train/ant/*2.png", "train/bee/*2.png", "test/bee/9.png")
    os.link(tmp_path / "train" / "ant" / "0.png", tmp_path / "test" / "bee" / "0.png")
    with pytest.raises(UserError, match="1 image of split 'test' is in split 'train' too"):
        load_images(tmp_path)


def test_names_of_classes(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    make(tmp_path, f"train/{composed}/0.png", f"test/{decomposed}/0.png", "train/b/0.png")
    counts = found(tmp_path)[0]
    assert counts == {"train": {"b": 1, composed: 1}, "test": {composed: 1}}
    make(tmp_path / "case", "Cat/0.png", "cat/1.png")
    counts, _, notes = found(tmp_path / "case")
    assert counts == {"train": {"Cat": 1, "cat": 1}} and "Cat and cat are two" in notes[0]


def test_an_order_of_the_classes(tmp_path):
    root = make(tmp_path / "set", "ant/0.png", "bee/0.png", "cow/0.png")
    file = tmp_path / "classes.txt"
    file.write_text("cow\nant\n\nbee\n")
    assert load_data(str(root), classes=str(file)).classes == ["cow", "ant", "bee"]
    file.write_text("cow\nant\nbee\ndog\n")
    with pytest.raises(UserError, match=r"1 of 4 classes have no image .*dog.*--empty_classes"):
        load_data(str(root), classes=str(file))
    kept = load_data(str(root), classes=str(file), empty_classes="keep")
    assert kept.classes == ["cow", "ant", "bee", "dog"]
    dropped = load_data(str(root), classes=str(file), empty_classes="drop")
    assert dropped.classes == ["cow", "ant", "bee"]
    assert sorted(dropped.train.labels) == [0, 1, 2]
    file.write_text("cow\nant\n")
    with pytest.raises(UserError, match="bee is missing"):
        load_data(str(root), classes=str(file))


def test_what_is_left_out_is_counted_with_the_reason(tmp_path):
    make(tmp_path, "ant/*2.png", "bee/*2.png", "bee/*3.heic", "a.eps", "notes.txt", "0.png")
    _, left_out, _ = found(tmp_path)
    assert "1 image outside of the class folders: 0.png" in left_out
    assert "1 .eps: EPS: a program that Ghostscript would run" in left_out
    assert "1 .txt: not images" in left_out
    if ".heic" not in formats.image_suffixes():
        assert "3 .heic: pip install pillow-heif" in left_out


def test_file_names_decide_nothing(tmp_path):
    make(tmp_path, "ant/my-train-0.png", "ant/test_1.png", "bee/val.png")
    assert found(tmp_path)[0] == {"train": {"ant": 2, "bee": 1}}
    assert split_of("contest") is None and split_of("train_test") is None


# -- --label_pattern -----------------------------------------------------------------------------


def test_a_pattern_reads_the_class(tmp_path):
    make(tmp_path, "train/cat.*3.png", "train/dog.*3.png", "train/zebra.png", "test1/*2.png")
    counts, left_out, _ = found(tmp_path, label_pattern="/(cat|dog)[.]")
    assert counts == {"train": {"cat": 3, "dog": 3}}
    assert any("1 of train that --label_pattern does not match: train/zebra" in t for t in left_out)
    assert any(t.startswith("2 images of test1/, which are unlabelled") for t in left_out)
    for pattern, words in (
        ("cat|dog", "has 0 groups"), ("(a)(b)", "has 2 groups"), ("(", "--label_pattern"),
        ("/(zebra)", "under half"), ("/(cow)", "matches no train image's path under"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            load_images(tmp_path, label_pattern=pattern)


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        (["IMG_*3.jpg", "DSC_*3.jpg"], None),
        (["WhatsApp Image *3.jpg", "Screenshot_*3.png", "PXL_*2.jpg", "photo*2.jpg"], None),
        (["cat_*3.jpg", "IMG_*3.jpg"], None),  # one class is none
        (["cat_*3.jpg", "dog_*3.jpg", "IMG_*3.jpg"], "/(cat|dog)"),
        (["cat_*2.jpg", "dog_*2.jpg", "img*6.jpg"], None),  # a pattern for the smaller part
        (["imgur_*2.jpg", "dscx_*2.jpg"], "/(imgur|dscx)"),
    ],
)
def test_what_cameras_call_their_files_is_no_class(tmp_path, files, pattern):
    make(tmp_path, *files)
    with pytest.raises(UserError, match="no class folders") as refused:
        load_images(tmp_path)
    suggested = re.findall(r"as '(/[^']+)' here", str(refused.value))
    assert [p.partition("(?!")[0] for p in suggested] == ([pattern] if pattern else [])
    assert "two classes by it" not in str(refused.value)


def test_suggested_classes_that_differ_in_case_alone_are_named(tmp_path):
    make(tmp_path, "Cat_*3.jpg", "cat_*3.jpg", "dog_*3.jpg")
    with pytest.raises(UserError, match=r"here \(Cat and cat are two classes by it: spell"):
        load_images(tmp_path)


def test_a_flat_folder_is_refused_with_a_pattern_that_reads_it(tmp_path):
    make(tmp_path, "cat.*3.jpg", "dog_*2.jpg")
    with pytest.raises(UserError, match="--label_pattern reads it from them") as refused:
        load_images(tmp_path)
    (pattern,) = re.findall(r"as '(/[^']+)' here", str(refused.value))
    assert pattern == r"/(cat|dog)(?![^\W\d_])"
    for regex in (pattern, "(cat|dog)[._]", "/(cat|dog)", "^(cat|dog)"):
        counts, _, _ = found(tmp_path, label_pattern=regex)
        assert counts == {"train": {"cat": 3, "dog": 2}}


def test_the_pattern_tells_words_apart_that_begin_alike(tmp_path):
    make(tmp_path, "狗*3.png", "狗熊*2.png", "café*4.png", "caf*5.png")
    with pytest.raises(UserError) as refused:
        load_images(tmp_path)
    (pattern,) = re.findall(r"as '(/[^']+)' here", str(refused.value))
    counts, _, _ = found(tmp_path, label_pattern=pattern)
    assert counts == {"train": {"狗": 3, "狗熊": 2, "café": 4, "caf": 5}}


@pytest.mark.parametrize("names", [["a.*9.jpg"], ["1.jpg", "2.jpg"], [f"{c}.jpg" for c in "abcd"]])
def test_no_pattern_is_made_up_where_names_say_nothing(tmp_path, names):
    make(tmp_path, *names)
    with pytest.raises(UserError, match=r"as '/\(cat\|dog\)\[\.\]'"):
        load_images(tmp_path)


# -- formats -------------------------------------------------------------------------------------


def test_every_format_of_pillow_is_judged():
    """One that a new Pillow brings has to be looked at: is it opened, or in formats.REFUSED?"""
    Image.init()
    opened = {
        "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FLI", "FTEX", "GBR", "GIF", "ICNS",
        "ICO", "IM", "IMT", "JPEG", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PNG",
        "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM",
        "XVTHUMB", "HEIF", "FPX", "MIC",
    }  # fmt: skip
    assert set(Image.OPEN) <= opened | set(formats.REFUSED)
    assert not set(formats.opened_formats()) & set(formats.REFUSED)
    assert {".jpg", ".png", ".avif", ".webp", ".tga", ".ppm", ".jp2"} <= formats.image_suffixes()
    assert not {".eps", ".wmf", ".h5", ".pdf", ".mpg"} & formats.image_suffixes()


def test_a_refused_format_is_not_opened_under_another_suffix(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(Exception, match="cannot identify"):
        formats.open_image(tmp_path / "a.png")


# -- hashes --------------------------------------------------------------------------------------


def test_what_changed_is_seen_and_what_moved_is_the_same(tmp_path):
    first = make(tmp_path / "first", "ant/*2.png", "bee/*2.png")
    before = load_images(first)

    def changed(stored):
        return (
            stored.content != before.content,
            stored.splits["train"]._fingerprint != before.splits["train"]._fingerprint,
        )

    assert changed(load_images(first)) == (False, False)
    second = tmp_path / "second"
    first.rename(second)
    assert changed(load_images(second)) == (False, True)  # decoded anew, the same run
    second.rename(first)
    assert changed(load_images(first)) == (False, False)
    (first / "ant" / "0.png").write_bytes(picture(9) + b"longer")
    assert changed(load_images(first)) == (True, True)
    (first / "ant" / "0.png").rename(first / "bee" / "9.png")
    assert changed(load_images(first)) == (True, True)


# -- everything adds up --------------------------------------------------------------------------

NAMES = st.sampled_from(
    ["ant", "Bee", "train", "test", "val", "valid_set", "x", "10", ".hidden", "unlabeled", "images"]
)
FILES = st.sampled_from(["a.png", "b.jpg", "c.webp", "train.png", "d.txt", "e.heic", ".f.png"])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    paths=st.lists(st.tuples(st.lists(NAMES, max_size=4), FILES), min_size=1, max_size=25),
    layout=st.sampled_from(["auto", "classes", "splits"]),
)
def test_images_classes_and_what_is_left_out_add_up(tmp_path_factory, paths, layout):
    root = tmp_path_factory.mktemp("tree")
    for folders, file in paths:
        place = root.joinpath(*folders)
        place.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(b"")  # the tree is read, no file is opened
    visible = [
        path.relative_to(root)
        for path in root.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
    ]
    images = {p.as_posix() for p in visible if p.suffix in (".png", ".jpg", ".webp")}
    tree = scan(root)
    assert set(Images.of(tree).paths) == images and tree.total == len(images)
    try:
        listing = read_folder(root, tree, layout)
        count_left_out(listing, tree, root)
    except UserError as error:
        assert "\n" not in str(error)
        return
    taken = [path for split in listing.splits.values() for path in split.paths]
    assert len(taken) == len(set(taken)) and set(taken) <= images
    for split in listing.splits.values():
        for path, label in zip(split.paths, split.labels, strict=True):
            assert label in path.split("/")[:-1]
    first_number = [int(line.split()[0].replace(",", "")) for line in listing.left_out]
    files = sum(first_number)
    assert len(taken) + files == len(visible), (listing.left_out, sorted(images))


def test_pointers_of_git_lfs_are_called_so(tmp_path):
    make(tmp_path, "ant/*2.png", "bee/*2.png")
    (tmp_path / "ant" / "0.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="a Git LFS pointer, not the image: git lfs pull"):
        formats.open_image(tmp_path / "ant" / "0.png")
    (bad,) = load_data(str(tmp_path), bad_images="skip").bad["train"].values()
    assert "Git LFS pointer" in bad


def test_a_cache_that_cannot_be_written_is_called_so(tmp_path, monkeypatch):
    import datasets

    make(tmp_path / "set", "a.png")
    rows = {"image": [{"bytes": picture(k), "path": None} for k in range(2)], "label": [0, 1]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "train-0.parquet")
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"cannot write .*file.*; set HF_DATASETS_CACHE"):
        load_data(str(tmp_path / "set"))
