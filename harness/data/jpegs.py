"""One image of the packed store: an upright JPEG, and the crops that are decoded from it."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

from harness.data.formats import open_image
from harness.data.pixels import FILTERS, check_pixels, upright
from harness.errors import UserError, reason_of

try:  # half as fast again as Pillow, and the same pixels
    import simplejpeg
except ImportError:
    simplejpeg = None

SIDE_STEP = 64  # px; stored sides are multiples, so that close sizes share a store
MOST_PX = 65500  # a side of a JPEG
QUALITY = 95  # of the JPEGs that are encoded here, without subsampled colours
ORIENTATION = 0x0112  # EXIF's tag


def packed_side(size, stored_size, crop_scale) -> int:
    """Px of the shorter side at which no crop has to be enlarged to `size` px.

    stored_size: px of the shorter side that evaluation needs. crop_scale: the least share of the
    area that a random resized crop takes, 0 without such crops.
    """
    min_side = max(stored_size, size / math.sqrt(crop_scale) if crop_scale else 0)
    return math.ceil(min_side / SIDE_STEP) * SIDE_STEP


def decoder(on_gpu=False) -> str:
    """The name and version of the decoder: another one may give other pixels.

    on_gpu: the decoder of training's crops on a GPU.
    """
    if on_gpu:
        return f"nvJPEG of CUDA {torch.version.cuda}, torchvision {torchvision.__version__}"
    if simplejpeg:
        return f"simplejpeg {simplejpeg.__version__}"
    return f"Pillow {PIL.__version__}"


def pack_image(data, side, bit_depth=None):
    """An image file's bytes as an upright JPEG whose shorter side has at most `side` px.

    Returns (bytes, width, height). A JPEG in gray or YCbCr colours that is no larger, and that EXIF
    does not turn, keeps its bytes. Any other image is prepared as by
    `harness.data.pixels.decode_image`, shrunk to `side` (Lanczos) and encoded.

    Raises ValueError, or whatever Pillow raises, for an image that can't be read.
    """
    with warnings.catch_warnings():
        # check_pixels refuses the images that this warns of.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with open_image(io.BytesIO(data)) as image:
            check_pixels(image)
            if min(image.size) <= side and _is_plain_jpeg(image) and _decodes(data):
                return data, *image.size
            rgb = upright(image, side, bit_depth)
    if min(rgb.size) > side:
        shrunk = [max(side, round(x * side / min(rgb.size))) for x in rgb.size]
        rgb = rgb.resize(shrunk, Image.Resampling.LANCZOS)
    if max(rgb.size) > MOST_PX:
        rgb = rgb.resize([min(x, MOST_PX) for x in rgb.size], Image.Resampling.LANCZOS)
    file = io.BytesIO()
    rgb.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue(), *rgb.size


def _is_plain_jpeg(image):
    """Whether every decoder gives the same upright RGB pixels: judged by the header."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return False
    if image.mode == "RGB" and image.info.get("adobe_transform") == 0:
        return False  # RGB in the file itself
    try:
        return image.getexif().get(ORIENTATION, 1) in (0, 1)
    except Exception:  # damaged EXIF raises many types; Pillow then decides how the image stands
        return False


def _decodes(data):
    """Whether the whole JPEG can be decoded without a warning; it is read at an eighth."""
    if simplejpeg:
        try:
            simplejpeg.decode_jpeg(data, "RGB", min_height=1, min_width=1)
        except ValueError:
            return False
        return True
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "MPO"]) as image:
            image.draft(None, (1, 1))
            image.load()
    except Exception:  # Pillow's readers raise a dozen types for a bad file
        return False
    return True


def decode_jpeg(data, width, height, factor=1):
    """The pixels of a packed JPEG, reduced by 1, 2, 4 or 8 while decoding: uint8 (h, w, 3).

    width, height: px as stored. h and w are height and width over the factor, rounded up.
    """
    if simplejpeg:
        sides = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        return simplejpeg.decode_jpeg(data, "RGB", strict=False, **sides)
    with Image.open(io.BytesIO(data), formats=["JPEG", "MPO"]) as image:
        if factor > 1:
            image.draft("RGB", (width // factor, height // factor))
        return np.asarray(image.convert("RGB"))


def decode_crop(data, width, height, box, size):
    """A box of a packed JPEG, resized to size × size: uint8 (3, size, size).

    box: top, left, height and width in px of the stored image. The resize is bilinear with
    antialiasing. A large box is decoded at a half, a quarter or an eighth, if its sides still have
    2 · size px then; its edges are rounded to whole pixels of the reduced image.
    """
    top, left, h, w = box
    factor = next(f for f in (8, 4, 2, 1) if min(h, w) >= 2 * size * f or f == 1)
    pixels = torch.from_numpy(decode_jpeg(data, width, height, factor))
    top, bottom, left, right = (round(x / factor) for x in (top, top + h, left, left + w))
    pixels = pixels[top:bottom, left:right].permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]


def decode_crops_on(device, files, boxes, size):
    """As decode_crop, but for many images at once, by the nvJPEG decoder of a CUDA device.

    files: the JPEGs' bytes. boxes: (top, left, height, width) of each. Returns uint8
    (n, 3, size, size) on the device. Images are decoded at full size; the pixels depend on the
    versions of nvJPEG and of the driver. Raises UserError for images that nvJPEG can't decode.
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # "cpu" works too: for tests

    data = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    batch = torch.empty(len(files), 3, size, size, dtype=torch.uint8, device=device)
    try:
        images = decode_jpeg(data, ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        raise UserError(f"nvJPEG: {reason_of(error)}; --jpeg_decoder cpu decodes them") from None
    for out, image, (top, left, h, w) in zip(batch, images, boxes, strict=True):
        crop = image[:, top : top + h, left : left + w].unsqueeze(0).float()
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        out.copy_(crop[0].round_().clamp_(0, 255))
    return batch


def decode_centre(data, width, height, preprocessing):
    """The pixels of a packed JPEG for evaluation: uint8 (3, size, size).

    The shorter side is resized to stored_size and the centre cut out, as by torchvision's
    Resize and CenterCrop. preprocessing: a Preprocessing.
    """
    short, size = preprocessing.stored_size, preprocessing.size
    factor = next(f for f in (8, 4, 2, 1) if min(height, width) >= 2 * short * f or f == 1)
    image = Image.fromarray(decode_jpeg(data, width, height, factor))
    # The sides after torchvision's Resize, and the corner of its CenterCrop
    wide, tall = (int(short * side / min(width, height)) for side in (width, height))
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    if image.size == (wide, tall):
        image = image.crop((left, top, left + size, top + size))
    else:
        across, down = width / factor / wide, height / factor / tall
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        image = image.resize((size, size), FILTERS[preprocessing.interpolation], box=box)
    return torch.from_numpy(np.array(image).transpose(2, 0, 1))


def evaluation_pixels(file, preprocessing, bit_depth=None):
    """The pixels of an image file for evaluation with a packed store: uint8 (3, size, size).

    file: a path, or a binary file object.
    """
    data = file.read() if hasattr(file, "read") else Path(file).read_bytes()
    return decode_centre(*pack_image(data, preprocessing.packed_side, bit_depth), preprocessing)
