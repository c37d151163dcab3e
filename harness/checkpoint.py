"""Where a run is: `checkpoints/step-00001234/`, and how it is written so that nothing is lost.

A checkpoint is a folder of safetensors and one state.json, with a manifest of sizes and sha256
written last. It is written beside its final name, synced and renamed; only then are older ones
pruned. Reading verifies every byte before anything is touched. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from harness.errors import UserError

FORMAT = 1
FOLDER = re.compile(r"step-(\d{8,})")
FILE = re.compile(r"[a-z_]+\.(safetensors|json)")


class Damaged(Exception):
    """A checkpoint that does not verify; the text says which file and why."""


def save_checkpoint(root, step, tensors, state, keep):
    """Publish checkpoint `step` under `root`, then prune to the newest `keep`.

    tensors: {"model": {name: tensor}, "ema": ..., "optimizer": ...}, one safetensors file each.
    state: what JSON can hold. Raises OSError (disk full, read-only) with the older ones untouched.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(".writing-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    final = root / f"step-{step:08d}"
    writing = root / f".writing-{final.name}-{os.getpid()}"
    replaced = root / f".writing-replaced-{os.getpid()}"
    try:
        writing.mkdir()
        files = {f"{name}.safetensors": to_bytes(t) for name, t in tensors.items()}
        files["state.json"] = json.dumps(state, indent=1).encode()
        manifest = {
            "format": FORMAT,
            "step": step,
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in files.items()
            },
        }
        files["manifest.json"] = json.dumps(manifest, indent=1).encode()
        for name, data in files.items():
            write_synced(writing / name, data)
        sync_folder(writing)
        if final.exists():  # the same step again, after a resume from an earlier checkpoint
            os.rename(final, replaced)
        os.rename(writing, final)
        sync_folder(root)
    except BaseException:
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        shutil.rmtree(writing, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    # Of those up to this step: later ones are left from before a resume from an older checkpoint
    for old in [p for p in checkpoints(root) if int(p.name[5:]) <= step][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path):
    """Read and verify a checkpoint: ({file stem: {name: CPU tensor}}, state).

    Raises Damaged where anything is missing, of another size or hash, or not what it says it is.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        listed = manifest["files"]
        if manifest["format"] != FORMAT:
            raise Damaged(f"manifest.json has format {manifest['format']}, this reads {FORMAT}")
        if FOLDER.fullmatch(path.name) and int(path.name[5:]) != manifest["step"]:
            raise Damaged(f"manifest.json is of step {manifest['step']}")
        if "state.json" not in listed or not all(FILE.fullmatch(name) for name in listed):
            raise Damaged("manifest.json lists unexpected files")
        tensors, state = {}, None
        for name, expected in listed.items():
            data = (path / name).read_bytes()
            if len(data) != expected["bytes"]:
                raise Damaged(f"{name} has {len(data)} bytes instead of {expected['bytes']}")
            if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise Damaged(f"{name} has another sha256 than the manifest says")
            if name == "state.json":
                state = json.loads(data)
            else:
                tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
    except OSError as error:
        missing = Path(error.filename or path).name
        raise Damaged(f"{missing}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None
    return tensors, state


def checkpoints(root):
    """The published checkpoint folders under `root`, oldest first, by step number."""
    root = Path(root)
    found = [p for p in root.iterdir() if FOLDER.fullmatch(p.name)] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_valid(root, say):
    """(path, tensors, state) of the newest checkpoint that verifies, or None where there are none.

    Every damaged one passed over is named through `say(line)`. Raises UserError where there are
    checkpoints but none verifies: never "from scratch" silently.
    """
    found = checkpoints(root)
    for path in reversed(found):
        try:
            return path, *load_checkpoint(path)
        except Damaged as damage:
            say(f"{path} is damaged ({damage}); trying the one before")
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {root} verifies: give another with "
            "--resume_from_checkpoint PATH, or start anew with --overwrite"
        )
    return None


def to_bytes(tensors, metadata=None):
    """Tensors as the bytes of a safetensors file (CPU, contiguous, metadata {"format": "pt"}).

    One key of metadata and no more: safetensors writes several in a random order, and then the
    same tensors would not be the same bytes.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    return safetensors.torch.save(tensors, metadata=metadata or {"format": "pt"})


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
