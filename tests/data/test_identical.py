"""Images of val and test that are train images, too, are counted and named."""

import json

import numpy as np
import pytest
from PIL import Image

import smallruns
from harness.data import stores
from harness.data.cache import cached
from harness.data.preprocessing import Preprocessing
from harness.data.sources import load_data

LOOK = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def folder(tmp_path):
    """20 images to train on, 10 to test, of which 3 are copies and one of them of another class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for kind in ("a", "b"):
            (tmp_path / split / kind).mkdir(parents=True)
        for n in range(count):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / "ab"[n % 2] / f"{n:02}.jpg", quality=90)
    train, test = tmp_path / "train", tmp_path / "test"
    for copy, original in (("a/00", "a/04"), ("b/01", "b/03"), ("b/03", "a/06")):
        (test / f"{copy}.jpg").write_bytes((train / f"{original}.jpg").read_bytes())
    return tmp_path


@pytest.mark.parametrize("look", [LOOK, LOOK._replace(packed_side=64)], ids=["decoded", "packed"])
def test_copies_are_counted_and_named(folder, look):
    data = load_data(str(folder))
    splits = stores.decode_splits(data, look, progress=False)
    (line,) = stores.identical_images(data, look, splits)
    assert line.startswith("warning: 3 of 10 test images are train images, too, pixel for pixel: ")
    assert "1 of them with another class; test scores will be too good" in line
    assert "0 of 'test' is 2 of 'train'" in line
    (folder / "test/b/03.jpg").unlink()
    data = load_data(str(folder), test_split="none", val_fraction=0.2)
    assert not stores.identical_images(data, look, stores.decode_splits(data, look, progress=False))


def test_of_what_is_held_out_of_train(folder):
    for n in range(3):
        (folder / f"train/a/copy{n}.jpg").write_bytes((folder / "train/a/00.jpg").read_bytes())
    data = load_data(str(folder), val_fraction=0.5, test_split="none")
    (line,) = stores.identical_images(data, LOOK, stores.decode_splits(data, LOOK, progress=False))
    assert "val images are train images, too" in line and "another class" not in line


def test_images_that_cannot_be_read_are_not_alike(folder):
    for name in ("train/a/04", "test/a/00", "test/b/01", "train/b/19"):
        (folder / f"{name}.jpg").write_bytes(b"no image")
    data = load_data(str(folder), bad_images="skip")
    lines = stores.identical_images(data, LOOK, stores.decode_splits(data, LOOK, progress=False))
    assert "1 of 8 test images" in lines[0]


def test_a_store_of_an_older_version_is_used_as_it_is(folder):
    data = load_data(str(folder))
    stores.decode_splits(data, LOOK, progress=False)
    file = cached(data.train.dataset, data.image_column, 16).with_suffix(".json")
    from harness.data.cache import _hash

    written = json.loads(file.read_bytes())
    content = json.loads(written["content"])
    del content["images"]
    text = json.dumps(content)
    file.write_text(json.dumps({"content": text, "hash": _hash(text.encode()).hex()}))
    before = file.read_bytes()
    splits = stores.decode_splits(data, LOOK, progress=False)
    assert file.read_bytes() == before
    assert stores.identical_images(data, LOOK, splits) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "finetune"])
def test_a_run_says_it(folder, tmp_path, capsys, script):
    flags = {"dataset": folder, "batch_size": 8, "epochs": 1, "max_train_samples": None}
    flags |= {"gradient_accumulation_steps": 1, "mix_prob": 0}
    if script == "finetune":
        flags |= {"weights": "none", "strategy": "full", "lr": None}
    smallruns.train(tmp_path / "out", script=script, **flags)
    assert "warning: 3 of 10 test images are train images" in capsys.readouterr().out
