"""Images in one file, and train.py on them where `datasets` is not installed.

    python benchmarks/one_file.py FOLDER images.npz     18 MB for 60,000 images of CIFAR-10 as JPEG

The file holds the bytes of the encoded images as they are (as JPEG, say) and their labels.
"""

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure  # noqa: F401 - so that the harness is found
import numpy as np
import torch
from PIL import Image

import harness.training.plan
import harness.training.record
from harness.data.pixels import SMALL_SQUARE, decode_image
from harness.data.preprocessing import Preprocessing
from harness.data.sources import Data, Split, cut, load_data
from harness.data.stored import BUILT_IN
from harness.data.stores import Samples
from harness.errors import UserError

MOST_MEGABYTES = 20
STATISTICS = BUILT_IN["cifar10"].statistics


class Packed:
    """The encoded images of a split: what a `datasets.Dataset` is to `Split`, as far as needed."""

    def __init__(self, images: list[bytes]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows) -> "Packed":
        return Packed([self.images[row] for row in rows])


def write_packed(file: Path, classes: list[str], splits: dict[str, tuple]) -> None:
    """splits: {"train": (encoded images, labels), "test": ...}; compressed, as headers repeat."""
    arrays = {"classes": np.array(classes)}
    for name, (images, labels) in splits.items():
        arrays[f"{name}_bytes"] = np.frombuffer(b"".join(images), np.uint8)
        arrays[f"{name}_ends"] = np.cumsum([len(image) for image in images])
        arrays[f"{name}_labels"] = np.asarray(labels, np.int64)
    np.savez_compressed(file, **arrays)


def pack(folder: str, file: Path) -> None:
    """Write the images of a folder (of whatever kind train.py reads) as they lie there."""
    data, splits = load_data(folder), {}
    for name in ("train", "test"):
        split = getattr(data, name)
        column = split.dataset.select_columns(data.image_column).with_format("arrow")[:]
        cells = [column[data.image_column][row].as_py() for row in split.rows.tolist()]
        images = [cell["bytes"] or Path(cell["path"]).read_bytes() for cell in cells]
        splits[name] = images, split.labels
    write_packed(file, data.classes, splits)
    megabytes = file.stat().st_size / 1e6
    print(
        f"{file}: {megabytes:.1f} MB, " + ", ".join(f"{len(v[1]):,} {k}" for k, v in splits.items())
    )
    if megabytes > MOST_MEGABYTES:
        sys.exit(f"that is over {MOST_MEGABYTES} MB: pack smaller images, or fewer")


def load_packed(
    file: str, max_train_samples=None, max_eval_samples=None, seed=42, **others
) -> Data:
    """In the place of harness.data.sources.load_data."""
    with np.load(file) as arrays:  # refuses pickles
        classes, splits = arrays["classes"].tolist(), {}
        for name, most in (("train", max_train_samples), ("test", max_eval_samples)):
            pieces = np.split(arrays[f"{name}_bytes"], arrays[f"{name}_ends"][:-1])
            images, labels = Packed([piece.tobytes() for piece in pieces]), arrays[f"{name}_labels"]
            splits[name] = cut(Split(name, images, np.arange(len(labels)), labels), most, seed)
    width, height = Image.open(io.BytesIO(splits["train"].dataset.images[0])).size
    side = width if width == height <= SMALL_SQUARE else 224
    return Data(
        name=file, source=file, classes=classes, image_column="", label_column="labels",
        train=splits["train"], val=None, test=splits["test"], image_size=side,
        mean=STATISTICS[0], std=STATISTICS[1],
    )  # fmt: skip


def decode_packed(data: Data, preprocessing: Preprocessing, *others, **options) -> dict:
    """In the place of harness.data.stores.decode_splits."""

    def decode(image):
        return torch.from_numpy(
            decode_image(io.BytesIO(image), preprocessing.stored_size, preprocessing.interpolation)
        )

    splits = {}
    with ThreadPoolExecutor() as pool:
        for name in ("train", "test"):
            split = getattr(data, name)
            pixels = torch.stack(list(pool.map(decode, split.dataset.images)))
            rows, labels = torch.from_numpy(split.rows), torch.from_numpy(split.labels)
            splits[name] = Samples(pixels, rows, labels)
    return splits


def train_on_packed():
    """The module train.py, whose --dataset is now a packed file, and which draws no pictures."""
    import train
    from harness.training import opening

    harness.training.plan.load_data = load_packed
    opening.choose_store = lambda options, data, preprocessing: (preprocessing, "decoded in memory")
    opening.decode_splits = decode_packed
    opening.identical_images = lambda *args: []
    opening.report_writer = lambda *args: None
    train.save_train_batch = lambda *args: None  # these want matplotlib
    harness.training.record.save_curves = lambda *args: None
    return train


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: one_file.py FOLDER FILE.npz")
    try:
        pack(sys.argv[1], Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"one_file.py: {error}")
