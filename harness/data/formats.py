"""Which files are images, and the one place that opens them."""

from __future__ import annotations

import contextlib
import functools

from PIL import Image, UnidentifiedImageError

from harness.files import is_lfs_pointer

# Formats of Pillow that are not opened, each with its reason. A test fails for every format of the
# tested Pillow that nobody has considered yet.
REFUSED = {
    "EPS": "a program that Ghostscript would run",
    "WMF": "vector drawings, which Windows alone renders",
    "BUFR": "weather data, which Pillow only identifies",
    "GRIB": "weather data, which Pillow only identifies",
    "HDF5": "a container, which Pillow only identifies",
    "MPEG": "a video, which Pillow only identifies",
    "IPTC": "captions without an image of their own",
    "FITS": "measurements whose range is not known",
}
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
PHOTOS_ELSEWHERE = {  # suffix -> what reads them
    ".heic": "pip install pillow-heif", ".heif": "pip install pillow-heif",
    ".jxl": "save them as PNG", ".svg": "drawings: save them as PNG",
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"),
                    "raw camera files: save them as JPEG or PNG"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm"), "videos"),
}  # fmt: skip


@functools.cache
def opened_formats() -> tuple[str, ...]:
    """The names of the formats that are opened, Pillow's and its installed plug-ins'."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in Image.OPEN if name not in REFUSED)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of files that are taken for images, in lower case and with the dot."""
    formats = {*opened_formats(), "MPO"}  # which the reader of JPEGs opens
    suffixes = Image.registered_extensions()
    return frozenset(suffix for suffix, name in suffixes.items() if name in formats)


def open_image(file):
    """As `Image.open`, but only for formats that are not refused.

    Raises what `Image.open` raises, and ValueError for a Git LFS pointer in the place of an image.
    """
    try:
        return Image.open(file, formats=opened_formats())
    except UnidentifiedImageError:
        if is_lfs_pointer(file):
            raise ValueError("a Git LFS pointer, not the image: git lfs pull") from None
        raise


def why_left_out(suffix) -> str:
    """Why files of this suffix are left out, in a few words; "" where they are not images."""
    kind = Image.registered_extensions().get(suffix)
    if kind in REFUSED:
        return f"{kind}: {REFUSED[kind]}"
    if suffix in ARCHIVES:
        return "an archive: unpack it"
    return PHOTOS_ELSEWHERE.get(suffix, "")
