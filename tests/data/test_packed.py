import contextlib
import errno
import io
import os
import re
import warnings
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from harness.data import jpegs, packed, packing, stores
from harness.data.jpegs import (
    decode_centre,
    decode_crop,
    decode_jpeg,
    evaluation_pixels,
    pack_image,
    packed_side,
)
from harness.data.packed import PackedImages, read_index
from harness.data.packing import pack_split
from harness.data.pixels import deal, decode_image, sharded_order
from harness.data.preprocessing import Preprocessing
from harness.errors import UserError

LOOK = Preprocessing(32, 0.8, "bilinear", (0.5,) * 3, (0.5,) * 3, packed_side=64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(packing, "CHUNK", 4)
    monkeypatch.setattr(packed, "CHUNK", 4)
    return tmp_path / "pixels"


def photo(width=90, height=60, seed=0, mode="RGB"):
    """A picture as smooth as photographs are."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 6, width // 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image, file_format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def split_of(cells):
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": cells}, features=features)


def in_table(*files):
    return split_of([{"bytes": data, "path": None} for data in files])


def in_folder(folder, *files):
    cells = []
    for k, data in enumerate(files):
        (folder / f"{k}.jpg").write_bytes(data)
        cells.append({"bytes": None, "path": str(folder / f"{k}.jpg")})
    return split_of(cells)


def photos(n=20):
    return [encode(photo(seed=k), quality=90) for k in range(n)]


def pack(dataset, preprocessing=LOOK, **options):
    return pack_split(dataset, "image", preprocessing, name="train", progress=False, **options)


def rgb(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def decibels(a, b):
    error = (np.asarray(a, float) - np.asarray(b, float)) ** 2
    return 10 * np.log10(255**2 / max(error.mean(), 1e-9))


# ---------------------------------------------------------------- one image


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_that_is_small_enough_is_copied_byte_for_byte(mode, options):
    data = encode(photo(mode=mode), **options)
    assert pack_image(data, 60) == (data, 90, 60)


EXIF_ROTATED = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x06\0\0\0\0\0\0"
OTHERS = {
    "png": encode(photo(), "PNG"),
    "large": encode(photo(180, 120), quality=95),
    "turned": encode(photo(60, 90), exif=EXIF_ROTATED),
    "cmyk": encode(photo(mode="CMYK")),
    "rgb in the file": encode(photo(), keep_rgb=True),
    "transparent": encode(photo(mode="RGBA"), "PNG"),
    "palette": encode(photo(mode="P"), "PNG"),
    "webp": encode(photo(), "WEBP", lossless=True),
    "16 bits": encode(Image.fromarray(np.asarray(photo(mode="L")).astype("u2") * 257), "PNG"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_image_becomes_an_upright_jpeg(name):
    data, width, height = pack_image(OTHERS[name], 60)
    assert data != OTHERS[name] and rgb(data).size == (width, height) == (90, 60)
    square = decode_image(io.BytesIO(OTHERS[name]), 60)
    found = np.asarray(rgb(data)).transpose(2, 0, 1)[:, :, 15:75]
    assert decibels(found, square) > 34


@pytest.mark.parametrize(
    ("width", "height", "side", "expected"),
    [(900, 600, 64, (96, 64)), (600, 900, 64, (64, 96)), (1000, 30, 30, (1000, 30)),
     (640, 64, 64, (640, 64)), (66_000, 12, 64, (65_500, 12)), (129, 65, 64, (127, 64)),
     (20, 20, 64, (20, 20))],
)  # fmt: skip
def test_only_what_is_larger_is_shrunk_and_keeps_its_shape(width, height, side, expected):
    data, *size = pack_image(encode(photo(width, height), "PNG"), side)
    assert tuple(size) == expected == rgb(data).size


def test_a_12_bit_or_arithmetic_jpeg_is_named_and_a_damaged_one_too():
    data = encode(photo())
    start = data.index(b"\xff\xc0")
    deep = data[: start + 4] + b"\x0c" + data[start + 5 :]
    for broken in (deep, data[: len(data) // 2], b"", b"junk"):
        with pytest.raises(Exception, match=r".") as error:
            pack_image(broken, 64)
        assert not isinstance(error.value, AssertionError)
    with contextlib.suppress(Exception):  # arithmetic coding: this libjpeg reads it, or says no
        pack_image(data[:start] + b"\xff\xc9" + data[start + 2 :], 64)
    assert pack_image(data + b"more", 64)[0].startswith(data)  # what Pillow reads is read


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(90, 60), (101, 67), (64, 64), (33, 257)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pillow_and_simplejpeg_give_the_same_pixels(size, factor, mode, monkeypatch):
    data = encode(photo(*size, mode=mode), quality=90)
    fast = decode_jpeg(data, *size, factor)
    assert fast.shape == (-(-size[1] // factor), -(-size[0] // factor), 3)
    monkeypatch.setattr(jpegs, "simplejpeg", None)
    assert np.array_equal(fast, decode_jpeg(data, *size, factor))
    assert pack_image(data, 512)[0] == data
    assert jpegs.decoder().startswith("Pillow ")


@pytest.mark.parametrize("box", [(0, 0, 60, 90), (7, 11, 40, 50), (59, 0, 1, 90), (10, 10, 5, 5)])
def test_a_crop_is_torchvisions_resized_crop(box):
    data = encode(photo(), quality=90)
    whole = torch.from_numpy(np.asarray(rgb(data)).copy()).permute(2, 0, 1)
    expected = functional.resized_crop(whole, *box, [32, 32], antialias=True)
    assert torch.equal(decode_crop(data, 90, 60, box, 32), expected)


@pytest.mark.parametrize(("side", "factor"), [(255, 4), (256, 8), (127, 2), (64, 2), (63, 1)])
def test_a_large_crop_is_reduced_while_it_is_decoded(side, factor, monkeypatch):
    data = encode(photo(300, 300), quality=95)
    seen, real = [], jpegs.decode_jpeg
    monkeypatch.setattr(jpegs, "decode_jpeg", lambda *all: seen.append(all[-1]) or real(*all))
    found = decode_crop(data, 300, 300, (20, 31, side, side), 16)
    assert seen == [factor]
    whole = torch.from_numpy(np.asarray(rgb(data)).copy()).permute(2, 0, 1)
    expected = functional.resized_crop(whole, 20, 31, side, side, [16, 16], antialias=True)
    assert decibels(found, expected) > 24  # moved by up to `factor` px, on a very busy picture


@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [(90, 60), (61, 143), (40, 40), (41, 300), (20, 30)], ids=str)
def test_evaluation_is_torchvisions_resize_and_centre_crop(size, turned, filter_name):
    preprocessing = LOOK._replace(packed_side=512, interpolation=filter_name)
    data = encode(photo(*size), exif=EXIF_ROTATED) if turned else encode(photo(*size))
    image = Image.open(io.BytesIO(data))
    image = image.transpose(Image.Transpose.ROTATE_270) if turned else image
    words = getattr(v2.InterpolationMode, filter_name.upper())
    expected = v2.CenterCrop(32)(v2.Resize(preprocessing.stored_size, words)(image))
    found = evaluation_pixels(io.BytesIO(data), preprocessing).permute(1, 2, 0).numpy()
    difference = np.abs(found.astype(int) - np.asarray(expected).astype(int))
    if turned:  # encoded once more
        assert decibels(found, expected) > 30
    elif filter_name == "nearest":  # half a pixel of rounding may choose the neighbour
        assert (difference > 1).mean() < 0.1
    else:
        assert difference.max() <= 1


def test_evaluation_of_what_has_the_right_size_resamples_nothing():
    preprocessing = LOOK._replace(crop_pct=1.0)
    data = encode(photo(48, 32))
    found = decode_centre(data, 48, 32, preprocessing)
    assert np.array_equal(found.permute(1, 2, 0), np.asarray(rgb(data))[:, 8:40])


@pytest.mark.parametrize(
    ("size", "stored", "scale", "side"),
    [(224, 256, 0.08, 832), (224, 256, 0.35, 384), (224, 256, 0, 256), (64, 73, 1, 128)],
)
def test_the_side_is_what_the_smallest_crop_needs(size, stored, scale, side):
    assert packed_side(size, stored, scale) == side
    least = np.sqrt(scale) * side
    assert least >= size or not scale


# ---------------------------------------------------------------- a split


def test_rows_come_as_their_images_alone(tmp_path):
    files = photos(9)
    images = pack(in_folder(tmp_path, *files))
    rows = torch.tensor([8, 0, 3, 3])
    boxes = torch.tensor([[0, 0, 60, 90], [1, 2, 30, 30], [5, 5, 33, 21], [0, 40, 60, 50]])
    assert [side.tolist() for side in images.sizes(rows)] == [[60] * 4, [90] * 4]
    for found, row, box in zip(images.crops(rows, boxes), rows, boxes.tolist(), strict=True):
        assert torch.equal(found, decode_crop(files[row], 90, 60, box, 32))
    for found, row in zip(images.centres(rows), rows, strict=True):
        assert torch.equal(found, evaluation_pixels(io.BytesIO(files[row]), LOOK))
    assert images.shape == (9, 3, 32, 32) and len(images) == 9


def test_the_way_of_nvjpeg_gives_what_the_cpu_gives(tmp_path):
    """On the CPU, by torchvision's decoder of the same call: a level of rounding apart."""
    files = photos(9)
    samples = stores.Samples(pack(in_folder(tmp_path, *files)), torch.arange(9), torch.arange(9))
    index, boxes = torch.tensor([8, 0, 3]), torch.tensor([[0, 0, 60, 90], [1, 2, 30, 30], [5] * 4])
    ours, _ = samples.take(index, torch.device("cpu"), boxes)
    before = stores.store_identity({"train": samples})["decoder"]
    samples.stored.on_gpu = True
    theirs, labels = samples.take(index, torch.device("cpu"), boxes)
    assert (ours.int() - theirs.int()).abs().max() <= 1 and labels.tolist() == [8, 0, 3]
    assert theirs.dtype == torch.uint8 and before.startswith("simplejpeg")
    assert stores.store_identity({"train": samples})["decoder"].startswith("nvJPEG of CUDA")
    with pytest.raises(UserError, match=r"nvJPEG: .*; --jpeg_decoder cpu decodes them"):
        jpegs.decode_crops_on(torch.device("cpu"), [b"no jpeg"], [(0, 0, 1, 1)], 8)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(number):
    images = pack(in_table(*photos(12)))
    rows, boxes = torch.arange(12), torch.tensor([[3, 4, 50, 60]]).expand(12, 4)
    expected = images.crops(rows, boxes)
    images._threads = number
    assert torch.equal(images.crops(rows, boxes), expected)


def test_what_the_table_has_is_not_copied_and_what_changes_is(cache):
    images = pack(in_table(*photos(6), OTHERS["png"]))
    (blob,) = cache.glob("*.jpegs")
    assert 0 < blob.stat().st_size < len(OTHERS["png"]) * 2
    assert (images.entries["offset"][:6] == packed.IN_DATASET).all()
    assert images.entries["offset"][6] == 0
    part = in_table(*photos(9)).select([7, 2])  # with a table of indices
    found = pack(part).centres(torch.tensor([0, 1]))
    expected = [evaluation_pixels(io.BytesIO(photos(9)[k]), LOOK) for k in (7, 2)]
    assert torch.equal(found, torch.stack(expected))


def test_the_second_start_packs_nothing(tmp_path, monkeypatch):
    dataset = in_folder(tmp_path, *photos(6))
    first = pack(dataset)
    monkeypatch.setattr(packing, "pack_image", None)
    again = pack(dataset)
    rows = torch.arange(6)
    assert torch.equal(first.centres(rows), again.centres(rows)) and first.content == again.content


def test_a_store_for_more_pixels_serves_fewer_where_it_has_the_same(tmp_path, cache):
    dataset = in_folder(tmp_path, *photos(6))
    for side, files in ((128, 1), (64, 1), (192, 2), (128, 2)):
        pack(dataset, LOOK._replace(packed_side=side))
        assert len(list(cache.glob("*.index"))) == files
    (tmp_path / "large").mkdir()
    large = in_folder(tmp_path / "large", *(encode(photo(200, 150, k)) for k in range(3)))
    alone = pack(large).centres(torch.arange(3))
    for file in cache.iterdir():
        file.unlink()
    pack(large, LOOK._replace(packed_side=128))
    assert torch.equal(pack(large).centres(torch.arange(3)), alone)


def test_chunks_that_two_processes_packed_are_counted_once(tmp_path, cache, monkeypatch):
    dataset, real = in_folder(tmp_path, *photos(8)), packing._Making._add

    def twice(self, first, entries, *others):
        real(self, first, entries.copy(), *others)
        real(self, first, entries, *others)

    monkeypatch.setattr(packing._Making, "_add", twice)
    images = pack(dataset)
    expected = [evaluation_pixels(io.BytesIO(file), LOOK) for file in photos(8)]
    assert torch.equal(images.centres(torch.arange(8)), torch.stack(expected))


def test_bits_per_pixel_are_part_of_the_store(cache):
    values = np.asarray(photo(mode="L")).astype("u2") * 16
    dataset = in_table(encode(Image.fromarray(values), "PNG"))
    dark, bright = (pack(dataset, bit_depth=bits).centres(torch.tensor([0])) for bits in (16, 12))
    assert bright.float().mean() > 2 * dark.float().mean()
    assert len(list(cache.glob("*.index"))) == 2


# ---------------------------------------------------------------- what goes wrong


def test_a_bad_image_is_named_and_the_rest_is_kept(tmp_path, cache):
    files = photos(20)
    dataset = in_folder(tmp_path, *files)
    (tmp_path / "13.jpg").write_bytes(files[13][:200])
    with pytest.raises(UserError, match=r"cannot read image 13 of split 'train' \(.*13.jpg\)"):
        pack(dataset)
    assert not list(cache.glob("*.index"))
    images = pack(dataset, rows=[0, 1, 2])
    assert images.centres(torch.tensor([0, 2])).shape == (2, 3, 32, 32)
    assert images.entries["length"][13] == 0
    with pytest.raises(UserError, match="cannot read image 13"):
        pack(dataset)
    assert pack_image(files[12], 64)[0] == images.read(12)[0]


def test_an_empty_cell_and_a_missing_file_are_named(tmp_path):
    gone = split_of([{"bytes": None, "path": str(tmp_path / "gone.jpg")}])
    with pytest.raises(UserError, match=r"image 0 of split 'train' .*No such file"):
        pack(gone)
    with pytest.raises(UserError, match="the cell is empty"):
        pack(split_of([None]))


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_making_that_was_killed_goes_on(tmp_path, cache, monkeypatch, capsys, after):
    dataset, done, real = in_folder(tmp_path, *photos(20)), [], pack_image

    def killed(*words):
        done.append(words)
        if len(done) > after * 4:
            raise KeyboardInterrupt
        return real(*words)

    monkeypatch.setattr(packing, "threads", lambda *_: 1)
    monkeypatch.setattr(packing, "pack_image", killed)
    with pytest.raises(KeyboardInterrupt):
        pack(dataset)
    assert not list(cache.glob("*.index")) and not list(cache.glob("*.stopped"))
    (journal,) = [*cache.glob("*.index.packing")] or [None]
    with open(cache / next(cache.glob("*.jpegs.packing")), "ab") as blob:
        blob.write(b"cut off half-way")
    if journal:
        with open(journal, "ab") as lines:
            lines.write(b'00000000 {"first": 16')
    done.clear()
    monkeypatch.setattr(packing, "pack_image", lambda *w: done.append(w) or real(*w))
    images = pack(dataset)
    assert len(done) == 20 - 4 * after
    said = f"{4 * after} of 20 images were packed before" if after else ""
    assert said in capsys.readouterr().out
    expected = [evaluation_pixels(io.BytesIO(file), LOOK) for file in photos(20)]
    assert torch.equal(images.centres(torch.arange(20)), torch.stack(expected))
    assert {file.suffix for file in cache.iterdir()} == {".index", ".jpegs", ".lock"}


def test_a_full_disk_is_one_line_and_the_next_start_goes_on(tmp_path, monkeypatch):
    dataset, real, calls = in_folder(tmp_path, *photos(20)), packing._Making._add, []

    def full(self, *words):
        calls.append(words)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, *words)

    monkeypatch.setattr(packing, "threads", lambda *_: 1)
    monkeypatch.setattr(packing._Making, "_add", full)
    with pytest.raises(UserError, match=r"cannot pack the images of split 'train' to .*No space"):
        pack(dataset)
    assert len(pack(dataset)) == 20 and len(calls) < 9


def test_what_nobody_goes_on_with_is_removed(tmp_path, cache):
    cache.mkdir()
    old, new = cache / "a-64.jpegs.packing", cache / "b-64.jpegs.packing"
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (0, 0))
    pack(in_folder(tmp_path, *photos(2)))
    assert new.exists() and not old.exists()


@pytest.mark.parametrize("damage", ["a bit", "zeros"])
def test_a_damaged_image_is_packed_again_where_it_is_read(tmp_path, cache, capsys, damage):
    dataset = in_folder(tmp_path, *photos(6))
    images = pack(dataset)
    good = images.centres(torch.arange(6))
    (blob,) = cache.glob("*.jpegs")
    content = bytearray(blob.read_bytes())
    place, length = (int(images.entries[3][name]) for name in ("offset", "length"))
    before = bytes(content)
    if damage == "a bit":
        content[place + length // 2] ^= 4
    else:
        content[place : place + length] = bytes(length)
    blob.write_bytes(content)
    again = pack(dataset)
    assert torch.equal(again.centres(torch.arange(6)), good)
    assert "is damaged at image 3: packed again" in capsys.readouterr().out
    assert blob.read_bytes() == before
    blob.write_bytes(content)
    pack(dataset, verify=True)
    assert blob.read_bytes() == before
    blob.write_bytes(content)
    (tmp_path / "3.jpg").write_bytes(photos(9)[8])
    with pytest.raises(UserError, match="is damaged at image 3 of split 'train', and the data set"):
        pack(dataset).centres(torch.arange(6))


@pytest.mark.parametrize("damage", ["blob cut", "blob gone", "index cut", "index bit", "header"])
def test_damaged_files_are_made_anew(tmp_path, cache, capsys, damage):
    dataset = in_folder(tmp_path, *photos(6))
    good = pack(dataset).centres(torch.arange(6))
    (blob,), (index,) = cache.glob("*.jpegs"), cache.glob("*.index")
    content = index.read_bytes()
    if damage == "blob cut":
        os.truncate(blob, 1000)
    elif damage == "blob gone":
        blob.unlink()
    elif damage == "index cut":
        index.write_bytes(content[:-1])
    elif damage == "index bit":
        index.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        index.write_bytes(b"[" * 200_000 + b"\n" + content)
    assert torch.equal(pack(dataset).centres(torch.arange(6)), good)
    said = capsys.readouterr().out
    assert ("is damaged" in said) == (damage != "blob gone")
    assert read_index(index)[0]["images"] == 6


@pytest.mark.parametrize("suffix", ["index", "jpegs", "index.packing", "jpegs.packing", "stopped"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_folder_or_pipe_in_the_place_of_a_file_is_named(tmp_path, cache, kind, suffix):
    dataset = in_folder(tmp_path, *photos(3))
    pack(dataset)
    (index,) = cache.glob("*.index")
    if suffix in ("index", "jpegs"):
        place = index.with_suffix(f".{suffix}")
        place.unlink()
    else:
        index.unlink()  # so that it is made anew
        place = index.with_name(f"{index.stem}.{'index.' if suffix == 'stopped' else ''}{suffix}")
    place.mkdir() if kind == "folder" else os.mkfifo(place)
    with pytest.raises(UserError, match=f"{re.escape(str(place))} is not a file: move it away"):
        pack(dataset)
    place.rmdir() if kind == "folder" else place.unlink()
    assert len(pack(dataset)) == 3


def test_a_bomb_is_refused_by_its_header():
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="10000×10000 px is over"):
            pack_image(file.getvalue(), 64)


# ---------------------------------------------------------------- which store


def data_of(dataset, image_size=224):
    split = SimpleNamespace(dataset=dataset, bit_depth=None)
    return SimpleNamespace(
        train=split, val=None, test=None, image_size=image_size, image_column="image"
    )


def choose(dataset, image_size=224, **flags):
    values = {"pixels": "auto", "augment": "basic", "crop_scale": 0.0, **flags}
    preprocessing = LOOK._replace(packed_side=0)
    preprocessing, words = stores.choose_store(
        stores.StoreOptions(jpeg_decoder="cpu", **values),
        data_of(dataset, image_size),
        preprocessing,
    )
    return preprocessing.packed_side, words


def test_the_store_is_chosen_by_what_the_crops_need(tmp_path, monkeypatch):
    dataset = in_folder(tmp_path, *photos(6))
    assert choose(dataset)[0] == 0
    assert choose(dataset, crop_scale=0.25)[0] == 64
    assert choose(dataset, crop_scale=0.08)[0] == 128
    assert choose(dataset, crop_scale=0.08, augment="none")[0] == 0
    assert choose(dataset, crop_scale=0.08, image_size=32)[0] == 0
    assert (
        choose(dataset, crop_scale=0.5, stages=[{"crop_scale": 0.08}, {"augment": "none"}])[0]
        == 128
    )
    assert choose(dataset, pixels="packed")[0] == 64
    assert choose(dataset, pixels="decoded", crop_scale=0.08)[0] == 0
    monkeypatch.setattr(stores, "_free", lambda folder: 20_000)
    side, words = choose(dataset)
    assert side == 64 and words == (
        f"packed, about {sum(map(len, photos(6))) / 1000:.3g} kB of JPEGs, shorter side up "
        "to 64 px: decoded they would take 28.8 kB of 20 kB free"
    )
    pack(dataset)
    assert "packed, " in choose(dataset)[1] and "about" not in choose(dataset)[1]


def test_decoded_pixels_that_are_there_are_used(tmp_path, monkeypatch):
    from harness.data.cache import decode_split

    dataset = in_folder(tmp_path, *photos(6))
    monkeypatch.setattr(stores, "_free", lambda folder: 20_000)
    decode_split(dataset, "image", LOOK.stored_size, name="train", progress=False)
    assert choose(dataset)[0] == 0


def test_packed_images_stand_for_a_tensor(tmp_path):
    images = pack(in_folder(tmp_path, *photos(6)))
    samples = stores.Samples(images, torch.tensor([4, 2]), torch.tensor([1, 0]))
    assert samples.packed and isinstance(images, PackedImages)
    cpu = torch.device("cpu")
    pixels, labels = samples.take(torch.tensor([1]), cpu)
    assert torch.equal(pixels[0], images.centres(torch.tensor([2]))[0]) and labels.tolist() == [0]
    box = torch.tensor([[0, 0, 40, 40]])
    pixels, _ = samples.take(torch.tensor([0]), cpu, box)
    assert torch.equal(pixels, images.crops(torch.tensor([4]), box))


# ---------------------------------------------------------------- shares of machines


@pytest.mark.parametrize("machines", [1, 2, 3, 8])
def test_shares_are_fixed_even_parts_of_the_rows(machines):
    rows = np.sort(np.random.default_rng(0).choice(10_000, 1001, replace=False))
    shares = deal(rows, machines)
    assert sorted(np.concatenate(shares).tolist()) == list(range(1001))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if machines > 1:  # not by place: neighbours are of different machines as often as not
        assert not np.array_equal(shares[0], np.arange(len(shares[0])) * machines)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("machines", "processes"), [(2, 1), (2, 2), (4, 2)])
def test_every_process_gets_its_own_machines_images(machines, processes, accumulation):
    shares, batch = deal(np.arange(101), machines), 16
    order = sharded_order(shares, 3, 5, batch, accumulation)
    assert len(order) == 101 // batch * batch == len(order.unique())
    parts = order.view(-1, accumulation, machines * processes, batch // machines // processes
                       // accumulation)  # fmt: skip
    for process in range(machines * processes):
        own = shares[process // processes]
        assert np.isin(parts[:, :, process].flatten(), own).all()
    assert not torch.equal(order, sharded_order(shares, 3, 6, batch, accumulation))
    assert torch.equal(order, sharded_order(shares, 3, 5, batch, accumulation))


def test_a_share_alone_is_packed_and_other_rows_can_be_read(tmp_path, cache):
    files = photos(12)
    dataset, share = in_folder(tmp_path, *files), np.array([1, 4, 5, 9, 11])
    images = pack(dataset, rows=share, share=share)
    assert (images.entries["length"] > 0).nonzero()[0].tolist() == share.tolist()
    (blob,) = cache.glob("*.jpegs")
    assert blob.stat().st_size == sum(len(files[k]) for k in share)
    every = torch.stack([evaluation_pixels(io.BytesIO(file), LOOK) for file in files])
    assert torch.equal(images.centres(torch.arange(12)), every)
    pack(dataset)
    assert len(list(cache.glob("*.index"))) == 2
