"""Folders of small images, made for a test, and what is read from them."""

import io
import os
from collections import Counter

import numpy as np
from PIL import Image

from harness.data import formats
from harness.data.images import load_images


def picture(number, kind="PNG"):
    """The bytes of a small image that no other number gives."""
    file = io.BytesIO()
    pixels = np.full((8, 8, 3), number % 251, np.uint8)
    pixels[0, 0] = number // 251 % 251
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def make(root, *paths):
    """Files at these paths: an image, or text where the name says so; "a/b*3.png" is three."""
    number = sum(len(files) for _, _, files in os.walk(root))
    for path in paths:
        start, star, rest = path.partition("*")
        count, _, suffix = rest.partition(".") if star else ("1", "", "")
        for k in range(int(count)):
            file = root / (f"{start}{k}.{suffix}" if star else path)
            file.parent.mkdir(parents=True, exist_ok=True)
            number += 1
            if file.suffix.lower() in formats.image_suffixes():
                file.write_bytes(picture(number))
            else:
                file.write_text(f"text {number}")
    return root


def found(root, **options):
    """({split: {class: images}}, what was left out, notes)."""
    stored = load_images(root, **options)
    counts = {}
    for split, dataset in stored.splits.items():
        names = dataset.features["label"].names
        counts[split] = dict(Counter(names[k] for k in dataset["label"]))
    return counts, stored.left_out, stored.notes
