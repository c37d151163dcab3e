import collections
import io
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torchvision.transforms import v2

from harness.data import cache as cache_module
from harness.data.cache import decode_split
from harness.data.pixels import (
    decode_image,
    epoch_order,
    gather,
    gray_depth_note,
    native_size,
)
from harness.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "pixels"


def encode(image, file_format="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def decode(encoded, size):
    return decode_image(io.BytesIO(encoded), size)


def make_split(encoded):
    cells = [None if data is None else {"bytes": data, "path": None} for data in encoded]
    features = datasets.Features({"picture": datasets.Image()})
    return datasets.Dataset.from_dict({"picture": cells}, features=features)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def noisy_split(num_images, size=4):
    return make_split(
        [encode(Image.fromarray(noise(size, size, 3, seed=i))) for i in range(num_images)]
    )


# --- colours ---

PALETTE = Image.new("P", (2, 2), 1)
PALETTE.putpalette([0, 0, 0, 200, 100, 50])
GRAY_16 = Image.fromarray(np.array([[0, 257], [128 * 257, 65535]], dtype=np.uint16))
UNIT = Image.fromarray(np.array([[0.0, 0.2], [0.6, 1.0]], dtype=np.float32))
WIDE = Image.fromarray(np.array([[0.0, 51.0], [153.2, 255.0]], dtype=np.float32))
INTEGER = Image.fromarray(np.array([[0, 257], [128 * 257, 65535]], dtype=np.int32))
CHESS = Image.fromarray(np.array([[True, False], [False, True]]))

COLOURS = {
    "RGB": (encode(Image.new("RGB", (2, 2), (1, 2, 3))), (1, 2, 3)),
    "L": (encode(Image.new("L", (2, 2), 7)), (7, 7, 7)),
    "LA opaque": (encode(Image.new("LA", (2, 2), (7, 255))), (7, 7, 7)),
    "RGBA opaque": (encode(Image.new("RGBA", (2, 2), (1, 2, 3, 255))), (1, 2, 3)),
    "RGBA clear": (encode(Image.new("RGBA", (2, 2), (1, 2, 3, 0))), (255, 255, 255)),
    # 0.2 · colour + 0.8 · white
    "RGBA part": (encode(Image.new("RGBA", (2, 2), (0, 100, 255, 51))), (204, 224, 255)),
    "LA part": (encode(Image.new("LA", (2, 2), (0, 51))), (204, 204, 204)),
    "P": (encode(PALETTE), (200, 100, 50)),
    "P clear": (encode(PALETTE, transparency=1), (255, 255, 255)),
    "RGB clear": (
        encode(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)),
        (255, 255, 255),
    ),
    "CMYK": (encode(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "jpeg"), (255, 0, 0)),
    "YCbCr": (encode(Image.new("YCbCr", (2, 2), (128, 128, 128)), "jpeg"), (128, 128, 128)),
    "GIF": (
        encode(
            Image.new("RGB", (2, 2), (9, 8, 7)),
            "gif",
            save_all=True,
            append_images=[Image.new("RGB", (2, 2), (90, 80, 70))],
        ),
        (9, 8, 7),
    ),
}
GRAYS = {
    "I;16": (encode(GRAY_16), [[0, 1], [128, 255]]),
    "I": (encode(INTEGER, "tiff"), [[0, 1], [128, 255]]),
    "F to 1": (encode(UNIT, "tiff"), [[0, 51], [153, 255]]),
    "F to 255": (encode(WIDE, "tiff"), [[0, 51], [153, 255]]),
    "1": (encode(CHESS), [[255, 0], [0, 255]]),
}


@pytest.mark.parametrize("mode", COLOURS)
def test_colour_modes_become_rgb(mode):
    encoded, colour = COLOURS[mode]
    decoded = decode(encoded, 2)
    assert decoded.dtype == np.uint8 and decoded.shape == (3, 2, 2)
    assert decoded.flags.c_contiguous
    for channel, value in zip(decoded, colour, strict=True):
        np.testing.assert_array_equal(channel, value)


@pytest.mark.parametrize("mode", GRAYS)
def test_gray_modes_keep_their_range(mode):
    encoded, values = GRAYS[mode]
    np.testing.assert_array_equal(decode(encoded, 2), np.broadcast_to(values, (3, 2, 2)))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)),
        Image.fromarray(np.array([[0.0, -0.5]], dtype=np.float32)),
        Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)),
    ],
)
def test_values_without_a_known_range_are_refused(image):
    with pytest.raises(ValueError, match=f"in mode {image.mode}: save it as 8-bit"):
        decode(encode(image, "tiff"), 2)


# --- geometry ---


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (2, lambda image: image[:, ::-1]),
        (3, lambda image: image[::-1, ::-1]),
        (6, lambda image: np.rot90(image, -1)),
        (8, lambda image: np.rot90(image, 1)),
    ],
)
def test_exif_orientation_is_applied(orientation, turned):
    stored = noise(4, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encode(Image.fromarray(stored), exif=exif), 4)
    np.testing.assert_array_equal(decoded, turned(stored).transpose(2, 0, 1))


def test_an_image_of_the_right_size_is_not_resampled():
    stored = noise(5, 5, 3)
    np.testing.assert_array_equal(
        decode(encode(Image.fromarray(stored)), 5), stored.transpose(2, 0, 1)
    )


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (2, 6), (16, 16)])
def test_resizing_equals_torchvisions_resize_and_centre_crop(shape):
    image = Image.fromarray(noise(*shape, 3))
    reference = v2.Compose([v2.Resize(8), v2.CenterCrop(8), v2.PILToTensor()])(image)
    np.testing.assert_array_equal(decode(encode(image), 8), reference.numpy())


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_the_filter_is_the_one_that_is_named(name):
    image = Image.fromarray(noise(21, 21, 3))
    reference = v2.Compose([v2.Resize(8, v2.InterpolationMode(name)), v2.PILToTensor()])(image)
    decoded = decode_image(io.BytesIO(encode(image)), 8, name)
    np.testing.assert_array_equal(decoded, reference.numpy())


def test_a_large_jpeg_is_reduced_without_visible_change():
    smooth = Image.fromarray(noise(12, 20, 3)).resize((400, 240), Image.Resampling.BICUBIC)
    encoded = encode(smooth, "jpeg", quality=95)
    plain = Image.open(io.BytesIO(encoded)).convert("RGB")
    reference = v2.Compose([v2.Resize(24), v2.CenterCrop(24), v2.PILToTensor()])(plain).numpy()
    difference = np.abs(decode(encoded, 24).astype(int) - reference)
    assert difference.mean() < 1.5


def test_native_size():
    def squares(*sizes):
        return make_split([encode(Image.new("L", size)) for size in sizes])

    assert native_size(squares((8, 8), (8, 8)), "picture") == 8
    assert native_size(squares((64, 64)), "picture") == 64
    assert native_size(squares((65, 65)), "picture") is None
    assert native_size(squares((8, 9), (8, 9)), "picture") is None
    assert native_size(squares((8, 8), (9, 9)), "picture") is None
    assert native_size(make_split([b"junk", None]), "picture") is None


# --- the cache ---


def test_decodes_in_order_over_several_blocks(monkeypatch):
    monkeypatch.setattr(cache_module, "BLOCK", 3)
    monkeypatch.setattr(cache_module, "HASHED", 3)
    decoded = decode_split(noisy_split(10), "picture", 4, name="train")
    expected = np.stack([noise(4, 4, 3, seed=i).transpose(2, 0, 1) for i in range(10)])
    assert decoded.dtype == torch.uint8 and decoded.is_contiguous()
    np.testing.assert_array_equal(decoded.numpy(), expected)


def test_the_second_start_does_not_decode(cache, monkeypatch):
    split = noisy_split(5)
    first = decode_split(split, "picture", 4, name="train").clone()
    assert {file.suffix for file in cache.iterdir()} == {".npy", ".json", ".lock"}
    monkeypatch.setattr(cache_module, "_decode", None)
    assert torch.equal(decode_split(split, "picture", 4, name="train"), first)


def test_another_size_selection_filter_or_version_is_another_file(cache, monkeypatch):
    split = noisy_split(5)
    decode_split(split, "picture", 4, name="train")
    decode_split(split, "picture", 3, name="train")
    part = decode_split(split.select([3, 1]), "picture", 4, name="train")
    np.testing.assert_array_equal(part[0].numpy(), noise(4, 4, 3, seed=3).transpose(2, 0, 1))
    bilinear = decode_split(split, "picture", 3, name="train", interpolation="bilinear")
    bicubic = decode_split(split, "picture", 3, name="train", interpolation="bicubic")
    assert not torch.equal(bilinear, bicubic)
    monkeypatch.setattr(cache_module, "DECODE_VERSION", cache_module.DECODE_VERSION + 1)
    decode_split(split, "picture", 4, name="train")
    assert len(list(cache.glob("*.npy"))) == 5


def with_byte_flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "cut short": lambda npy, index: npy.write_bytes(npy.read_bytes()[:-1]),
    "empty": lambda npy, index: npy.write_bytes(b""),
    "junk": lambda npy, index: npy.write_bytes(b"junk" * 99),
    "an .npz": lambda npy, index: npy.write_bytes(an_npz()),
    "other shape": lambda npy, index: np.save(npy, np.zeros((5, 3, 3, 3), dtype=np.uint8)),
    "zeros": lambda npy, index: npy.write_bytes(npy.read_bytes()[:-240] + bytes(240)),
    "a bit": lambda npy, index: npy.write_bytes(with_byte_flipped(npy.read_bytes(), -20)),
    "no hashes": lambda npy, index: index.unlink(),
    "hashes cut short": lambda npy, index: index.write_bytes(index.read_bytes()[:-9]),
    "a hash": lambda npy, index: index.write_bytes(with_byte_flipped(index.read_bytes(), 30)),
    "nested": lambda npy, index: index.write_text("[" * 200_000),
    "another's hashes": lambda npy, index: index.write_text(index.read_text().replace("a", "b")),
}


def an_npz():
    file = io.BytesIO()
    np.savez(file, np.zeros((5, 3, 4, 4), dtype=np.uint8))
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_made_again_and_it_is_said(cache, damage, capsys):
    split = noisy_split(5)
    first = decode_split(split, "picture", 4, name="train").clone()
    (file,), (index,) = cache.glob("*.npy"), cache.glob("*.json")
    whole = file.read_bytes(), index.read_bytes()
    assert not capsys.readouterr().out
    DAMAGES[damage](file, index)
    assert torch.equal(decode_split(split, "picture", 4, name="train"), first)
    assert (file.read_bytes(), index.read_bytes()) == whole
    said = capsys.readouterr().out
    assert f"{file} is damaged (" in said and said.count("\n") == 1


def test_black_images_are_not_forgotten(cache):
    """Of images that this run does not use; a list of them that is lost is made again."""
    split = make_split([COLOURS["RGB"][0]] * 3 + [b"junk"])
    decode_split(split, "picture", 2, name="train", rows=[0, 1])
    for damage in (lambda file: None, lambda file: file.unlink()):
        damage(*cache.glob("*.json"))
        with pytest.raises(UserError, match="image 3 of split 'train'"):
            decode_split(split, "picture", 2, name="train")
        decode_split(split, "picture", 2, name="train", rows=[0, 1])


def test_a_sample_is_compared_or_everything(cache, monkeypatch, capsys):
    monkeypatch.setattr(cache_module, "HASHED", 1)
    monkeypatch.setattr(cache_module, "SAMPLED", 2)
    split = noisy_split(300)
    first = decode_split(split, "picture", 4, name="train").clone()
    (file,) = cache.glob("*.npy")
    whole = file.read_bytes()
    file.write_bytes(with_byte_flipped(whole, -20))
    assert torch.equal(decode_split(split, "picture", 4, name="train", verify=True), first)
    assert "other bytes in images 299 to 299" in capsys.readouterr().out
    file.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    for _ in range(50):  # each sees the zeros with a probability of 3/4
        decode_split(split, "picture", 4, name="train")
    assert "is damaged" in capsys.readouterr().out and file.read_bytes() == whole


def test_what_killed_processes_left_is_removed_by_a_decoding_of_anything(cache):
    cache.mkdir()
    for name in ("killed", "running"):
        (cache / f"{name}.part").write_bytes(b"half")
    with FileLock(cache / "running.npy.lock"):
        decode_split(noisy_split(2), "picture", 4, name="train")
    assert [file.name for file in cache.glob("*.part")] == ["running.part"]


def test_the_pixels_are_mapped_without_a_warning(recwarn):
    decoded = decode_split(noisy_split(2), "picture", 4, name="train")
    assert decoded.is_contiguous() and not recwarn.list


# --- what the user has to mend ---


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"junk", "not an image format"),
        (encode(Image.fromarray(noise(40, 40, 3)))[:-400], "truncated"),
        (None, "the cell is empty"),
        (encode(Image.new("1", (10_000, 9_000))), "10000×9000 px is over 89,478,485 pixels"),
    ],
)
def test_an_unreadable_image_is_named(cache, bad, reason, recwarn):
    split = make_split([COLOURS["RGB"][0]] * 3 + [bad])
    with pytest.raises(UserError, match=rf"image 3 of split 'test'.*{reason}.*repair it"):
        decode_split(split, "picture", 2, name="test")
    # The index is the one of the whole split.
    with pytest.raises(UserError, match=rf"image 3 of split 'test'.*{reason}"):
        decode_split(split.select([2, 3, 0]), "picture", 2, name="test")
    assert not [file for file in cache.iterdir() if file.suffix != ".lock"]
    assert not recwarn.list


def test_the_path_of_an_unreadable_image_is_named(tmp_path):
    file = tmp_path / "cat.png"
    file.write_bytes(b"junk")
    split = datasets.Dataset.from_dict({"picture": [str(file)]}).cast_column(
        "picture", datasets.Image()
    )
    with pytest.raises(UserError, match=r"image 0 of split 'train' \(.*cat.png\)"):
        decode_split(split, "picture", 2, name="train")


def test_an_unknown_filter_is_named(cache):
    with pytest.raises(UserError, match=r'"bicubik", did you mean "bicubic".*lanczos'):
        decode_split(noisy_split(1), "picture", 4, name="train", interpolation="bicubik")
    assert not cache.exists()


def test_no_room_names_the_file_and_the_bytes(cache, monkeypatch):
    usage = collections.namedtuple("Usage", "free")
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage(free=5 * 48 - 1))
    with pytest.raises(UserError, match=rf"\(240 bytes\) to {cache}/\w+\.npy: No space left"):
        decode_split(noisy_split(5), "picture", 4, name="train")
    assert not list(cache.glob("*.npy"))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(UserError, match="set HF_DATASETS_CACHE"):
        decode_split(noisy_split(1), "picture", 4, name="train")


# --- order and batches ---


def test_epoch_order_is_a_function_of_seed_and_epoch():
    order = epoch_order(101, seed=3, epoch=7)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(101))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(order, epoch_order(101, seed=3, epoch=7))
    assert torch.equal(torch.get_rng_state(), before)
    others = [epoch_order(101, seed=3, epoch=8), epoch_order(101, seed=4, epoch=7)]
    assert not any(torch.equal(order, other) for other in others)
    # Seed and epoch are not merely added up.
    assert not torch.equal(epoch_order(101, 1, 2), epoch_order(101, 2, 1))


def test_epoch_order_is_the_same_on_every_machine():
    assert epoch_order(8, seed=42, epoch=0).tolist() == [1, 3, 2, 0, 4, 5, 6, 7]


def test_positions_are_uniform_over_epochs():
    first = torch.stack([epoch_order(5, 0, epoch)[0] for epoch in range(2000)])
    # 400 each; six standard deviations are 107.
    assert (first.bincount(minlength=5) - 400).abs().max() < 107


def test_gather_is_a_contiguous_copy():
    decoded = decode_split(noisy_split(6), "picture", 4, name="train")
    rows = torch.tensor([5, 0, 5])
    batch = gather(decoded, rows)
    assert batch.shape == (3, 3, 4, 4) and batch.dtype == torch.uint8 and batch.is_contiguous()
    assert torch.equal(batch, decoded[rows])
    batch.zero_()
    assert decoded[5].any()


def gray(values, depth=None):
    """A 16-bit PNG of these values; depth: of its sBIT chunk, which Pillow writes nowhere."""
    file = io.BytesIO()
    Image.fromarray(np.array(values, np.uint16)).save(file, "PNG")
    data = file.getvalue()
    if depth:
        chunk = b"sBIT" + bytes([depth])
        data = data[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + (
            data[33:]
        )  # fmt: skip
    return io.BytesIO(data)


@pytest.mark.parametrize(
    ("depth_in_file", "given", "white"), [(None, None, 16), (12, None, 255), (None, 12, 255)]
)
def test_twelve_bits_in_sixteen(depth_in_file, given, white):
    file = gray(np.full((8, 8), 4095), depth_in_file)
    assert decode_image(file, 8, bit_depth=given).max() == white


def test_a_tiff_may_say_its_largest_value():
    file = io.BytesIO()
    image = Image.fromarray(np.full((8, 8), 1023, np.uint16))
    image.save(file, "TIFF", tiffinfo={281: 1023})
    assert decode_image(file, 8).max() == 255


def test_nearly_black_images_are_told(tmp_path):
    def of(value, depth=None):
        cells = [{"bytes": gray(np.full((8, 8), value), depth).getvalue(), "path": None}] * 2
        dataset = datasets.Dataset.from_dict({"image": cells})
        return gray_depth_note(dataset.cast_column("image", datasets.Image()), "image")

    assert "stay under 4,096" in of(4095) and "--bit_depth 12" in of(4000)
    assert of(4096) is None and of(900, depth=10) is None
    with pytest.raises(ValueError, match="values from 4096"):
        decode_image(gray(np.full((8, 8), 4096)), 8, bit_depth=12)
