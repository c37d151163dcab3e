"""Make data/digits from scikit-learn's digits: `python data/digits/make_digits.py`.

Needs scikit-learn, which nothing else in this repository does. A second run with the same
versions writes the same bytes.
"""

import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def png_bytes(pixels):
    """A uint8 (8, 8) array as the bytes of a grayscale PNG."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def main():
    digits = load_digits()
    # The originals count ink on a 4×4 grid, 0 to 16.
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=360, stratify=digits.target, random_state=0
    )
    features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])})
    for split, rows in (("train", train), ("test", test)):
        images = [{"bytes": png_bytes(pixels[row]), "path": None} for row in rows]
        columns = {"image": images, "label": digits.target[rows].tolist()}
        file = Path(__file__).with_name(f"{split}-00000-of-00001.parquet")
        Dataset.from_dict(columns, features=features).to_parquet(file)
    scaled = pixels[train] / 255
    print(f"train {len(train)}, test {len(test)}; mean {scaled.mean():.4f}, std {scaled.std():.4f}")


if __name__ == "__main__":
    main()
