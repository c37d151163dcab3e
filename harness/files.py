"""Files that are written completely or not at all, their bytes, and names for every system."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

import safetensors.torch

from harness.errors import UserError

DIGEST = "tensors_sha256"  # in the metadata of a result, and in its config.json


def has_file(path) -> bool:
    """Whether there is a file; raises UserError for a folder, a pipe or a device of that name.

    It is called before any file of a run is read, since reading a pipe would wait for ever.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file: move it away")
    return path.exists()


def write_synced(path, data):
    """Write bytes and force them to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path, data):
    """Write bytes beside `path`, sync, and rename over it: readers see the old or the new file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
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

    There is only one key of metadata: safetensors writes several in a random order, and then the
    same tensors would not give the same bytes.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    return safetensors.torch.save(tensors, metadata=metadata or {"format": "pt"})


def result_bytes(tensors):
    """(the bytes of a safetensors file whose metadata has the hash of its tensors, that hash)."""
    data = to_bytes(tensors)
    digest = _tensors_digest(data)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = {"__metadata__": {"format": "pt", DIGEST: digest}} | {
        name: entry for name, entry in header.items() if name != "__metadata__"
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :], digest


def written_digest(path, data):
    """The hash in the metadata of a safetensors file's bytes, or None; see `result_bytes`.

    Raises UserError where the tensors differ from those that were hashed.
    """
    size = int.from_bytes(data[:8], "little")
    digest = json.loads(data[8 : 8 + size]).get("__metadata__", {}).get(DIGEST)
    if digest is not None and digest != _tensors_digest(data):
        raise UserError(f"{path} is damaged: its tensors are not those that were written")
    return digest


def _tensors_digest(data):
    """sha256 of the names, types and shapes of a safetensors file, and of the numbers in it."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(memoryview(data)[8 + size :])
    return digest.hexdigest()


def is_lfs_pointer(file) -> bool:
    """Whether a path or an open binary file is the note that Git LFS leaves in a file's place."""
    start = b"version https://git-lfs"
    if hasattr(file, "read"):
        file.seek(0)
        return file.read(len(start)) == start
    with open(file, "rb") as stream:
        return stream.read(len(start)) == start


def file_name(text, limit=80):
    """The text as part of a file's name: letters, digits, _ . - only, at most `limit` bytes."""
    safe = re.sub(r"[^\w.-]+", "_", text).strip("._").encode()[:limit].decode(errors="ignore")
    return safe or "unnamed"
