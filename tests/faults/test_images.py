"""A zoo of images: decoded right, or named by split and index; left out where that is asked for."""

import io
import json
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import faulty
import smallruns
from harness.data.pixels import decode_image
from harness.data.sources import load_data
from harness.errors import UserError


def encode(image, file_format="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def picture(seed, size=(20, 16), mode="RGB"):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def bomb(width, height):
    """A PNG that says it is that large, and holds next to nothing."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


RIGHT = picture(0)
TURNED = Image.Exif()
TURNED[0x0112] = 6
GOOD = {  # each is RIGHT, within this mean difference in levels
    "png": (encode(RIGHT), 0),
    "webp": (encode(RIGHT, "webp", lossless=True), 0),
    "bmp": (encode(RIGHT, "bmp"), 0),
    "RGBA opaque": (encode(RIGHT.convert("RGBA")), 0),
    "rotated": (encode(RIGHT.rotate(90, expand=True), exif=TURNED), 0),
    "animated": (encode(RIGHT, "webp", lossless=True, save_all=True,
                        append_images=[picture(1)]), 0),
    "JPEG": (encode(RIGHT, "jpeg", quality=95), 8),
    "CMYK": (encode(RIGHT.convert("CMYK"), "jpeg", quality=95), 8),
    "palette": (encode(RIGHT.quantize(256)), 6),
    "GIF": (encode(RIGHT, "gif"), 20),
}  # fmt: skip
BAD = {
    "truncated": (encode(picture(0, (64, 64)), "jpeg")[:-300], "truncated"),
    "truncated png": (encode(picture(0, (64, 64)))[:-400], "truncated"),
    "empty": (b"", "not an image format"),
    "text": (b"<html>not found</html>", "not an image format"),
    "missing": (None, "the cell is empty"),
    "bomb": (bomb(30_000, 30_000), "900000000 pixels"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_decoded_right(kind):
    data, tolerance = GOOD[kind]
    expected = decode_image(io.BytesIO(GOOD["png"][0]), 16).astype(int)
    decoded = decode_image(io.BytesIO(data), 16).astype(int)
    assert np.abs(decoded - expected).mean() <= tolerance


def test_sixteen_bits_and_gray_and_a_strip():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = decode_image(io.BytesIO(encode(Image.fromarray(ramp))), 16)
    assert np.abs(decoded[0].astype(int) - ramp / 257).max() <= 1
    gray = decode_image(io.BytesIO(encode(picture(2, mode="L"))), 16)
    assert (gray[0] == gray[1]).all() and (gray[1] == gray[2]).all()
    for size in ((1_000_000, 1), (1, 1_000_000)):
        strip = np.full((*size[::-1], 3), 7, np.uint8)
        strip[size[1] // 2, size[0] // 2] = 200
        decoded = decode_image(io.BytesIO(encode(Image.fromarray(strip))), 16)
        assert decoded.shape == (3, 16, 16) and decoded.max() > 7


def refuse_bombs():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((30_000, 30_000), (2**31 - 1, 2**31 - 1), (90_000_000, 1), (1, 90_000_000)):
        for small in (8, 224):
            try:
                decode_image(io.BytesIO(bomb(*size)), small)
            except (ValueError, Image.DecompressionBombError) as error:
                assert "pixels" in str(error)
            else:
                raise AssertionError(size)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    raise SystemExit(0 if grown < 20_000 else 9)  # KiB


@pytest.mark.everyday
def test_bombs_are_refused_from_the_header_with_little_memory():
    process = faulty.context().Process(target=refuse_bombs)
    process.start()
    process.join(60)
    assert process.exitcode == 0


# --- in a data set ---


def make_data(folder, bad, num=60, classes=2):
    """A data set of small images, those numbered in `bad` {split: {row: bytes}} replaced."""
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[f"class{k}" for k in range(classes)]),
        }
    )
    splits = {}
    for split, count in (("train", num), ("test", num // 3)):
        cells = [encode(picture(k)) for k in range(count)]
        for row, data in bad.get(split, {}).items():
            cells[row] = data
        cells = [data if data is None else {"bytes": data, "path": None} for data in cells]
        labels = [k % classes for k in range(count)]
        splits[split] = datasets.Dataset.from_dict(
            {"image": cells, "label": labels}, features=features
        )
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


ROWS = {3: "truncated", 17: "text", 40: "bomb", 41: "missing", 59: "empty"}
FLAGS = {
    "max_train_samples": None, "max_eval_samples": None, "batch_size": 12,
    "gradient_accumulation_steps": 1, "epochs": 2, "logging_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    bad = {
        "train": {row: BAD[kind][0] for row, kind in ROWS.items()},
        "test": {7: BAD["truncated png"][0]},
    }
    return make_data(tmp_path_factory.mktemp("zoo") / "data", bad)


def test_each_bad_image_is_named_by_split_and_index(tmp_path):
    for kind, (content, reason) in BAD.items():
        for split, row in (("train", 11), ("test", 5)):
            folder = make_data(tmp_path / f"{kind}-{split}", {split: {row: content}}, num=30)
            with pytest.raises(UserError, match=f"image {row} of split '{split}'.*{reason}"):
                smallruns.train(tmp_path, dataset=folder, **FLAGS)
            assert not (tmp_path / "run").exists()


@pytest.mark.everyday
def test_bad_images_are_left_out_counted_and_named(data, tmp_path, capsys):
    with pytest.raises(UserError, match=r"split 'train'.*--bad_images skip"):
        smallruns.train(tmp_path / "stop", dataset=data, **FLAGS)
    folder, status = smallruns.train(tmp_path, dataset=data, bad_images="skip", **FLAGS)
    out = capsys.readouterr().out
    assert status == 0
    (line,) = [line for line in out.splitlines() if line.startswith("left out")]
    assert "5 of train, 1 of test can't be read" in line
    assert "train 3 (image file is truncated" in line and "…" in line
    for name in ("summary.json", "config.json"):
        about = json.loads((folder / name).read_text())["data"]
        assert about["splits"] == {"train": 55, "test": 19}
        assert about["left_out"] == {"train": sorted(ROWS), "test": [7]}


def test_what_is_left_is_what_would_be_without_the_bad_ones(data):
    """The rows, whatever is held out or cut; the same again."""
    plain = load_data(str(data), bad_images="skip")
    assert sorted(set(range(60)) - set(plain.train.rows)) == sorted(ROWS)
    for options in ({"val_fraction": 0.2}, {"max_train_samples": 20}):
        first = load_data(str(data), bad_images="skip", **options)
        again = load_data(str(data), bad_images="skip", **options)
        rows = first.train.rows if first.train.stored is None else first.train.stored
        assert not set(rows.tolist()) & set(ROWS)
        assert (first.train.rows == again.train.rows).all()
    assert load_data(str(data), bad_images="stop").bad == {}


def test_black_pixels_of_a_skipping_run_are_not_taken_by_another(data, tmp_path):
    smallruns.train(tmp_path / "skip", dataset=data, bad_images="skip", **FLAGS)
    for _ in range(2):  # the pixels are in the cache now, and must not be used
        with pytest.raises(UserError, match="image 3 of split 'train'"):
            smallruns.train(tmp_path / "stop", dataset=data, **FLAGS)


def test_two_processes_and_a_resume_leave_out_the_same(data, tmp_path):
    flags = {**FLAGS, "dataset": data, "bad_images": "skip", "dropout": 0}
    whole = faulty.start(tmp_path / "whole", processes=2, **flags).done()
    faulty.start(tmp_path / "parts", processes=2, stop_after=3, **flags).done()
    parts = faulty.start(
        tmp_path / "parts", processes=2, resume_from_checkpoint="auto", **flags
    ).done()
    assert smallruns.digest(whole) == smallruns.digest(parts)
    with pytest.raises(UserError, match="bad_images skip"):
        smallruns.train(
            tmp_path / "parts", **{**flags, "bad_images": "stop"}, resume_from_checkpoint="auto"
        )


def test_nothing_left_is_refused(tmp_path):
    every = dict.fromkeys(range(10), BAD["text"][0])
    folder = make_data(tmp_path / "none", {"test": every}, num=30)
    with pytest.raises(UserError, match="none of the 10 images of split 'test' can be read"):
        load_data(str(folder), bad_images="skip")
    odd = dict.fromkeys(range(1, 30, 2), BAD["text"][0])
    folder = make_data(tmp_path / "one", {"train": odd}, num=30)
    with pytest.raises(UserError, match=r"1 of 2 classes have no image .*: class1"):
        load_data(str(folder), bad_images="skip")


def test_the_other_scripts_leave_out_what_training_did(data, tmp_path):
    folder, _ = smallruns.train(tmp_path, dataset=data, bad_images="skip", **FLAGS)
    common = ["--report_to=none", f"--output_dir={tmp_path}"]
    report, status = smallruns.run("ensemble_eval", [str(folder), "--run_name=e", *common])
    assert status == 0 and "19" in (report / "report.json").read_text()
    _, status = smallruns.run("gradcam", [str(folder), "--run_name=g", "--max_images=4", *common])
    assert status == 0
