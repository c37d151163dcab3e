"""Files that are whole or not there, their bytes, and names that every system takes."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import safetensors.torch


def write_synced(path, data):
    """Write bytes and force them to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path, data):
    """Write bytes beside `path`, sync, and rename over it: readers see the old or the new file."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.writing")
    try:
        write_synced(beside, data)
        os.replace(beside, path)
        sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync_folder(path):
    """Force a folder's entries to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def to_bytes(tensors, metadata=None):
    """Tensors as the bytes of a safetensors file (CPU, contiguous, metadata {"format": "pt"}).

    One key of metadata and no more: safetensors writes several in a random order, and then the
    same tensors would not be the same bytes.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    return safetensors.torch.save(tensors, metadata=metadata or {"format": "pt"})


def is_lfs_pointer(file) -> bool:
    """Whether a path or an open binary file is the note that Git LFS leaves in a file's place."""
    start = b"version https://git-lfs"
    if hasattr(file, "read"):
        file.seek(0)
        return file.read(len(start)) == start
    with open(file, "rb") as opened:
        return opened.read(len(start)) == start


def file_name(text, most=80):
    """The text as part of a file's name: letters, digits, _ . - only, of at most so many bytes."""
    safe = re.sub(r"[^\w.-]+", "_", text).strip("._").encode()[:most].decode(errors="ignore")
    return safe or "unnamed"
