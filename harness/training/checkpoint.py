"""The checkpoints of a run, `checkpoints/step-00001234/`, written so that nothing is lost.

A checkpoint is a folder of safetensors files and one state.json, with a manifest of sizes and
sha256 written last. The folder is written under another name, synced and renamed; only then are
older checkpoints removed. Reading verifies every byte before it returns anything. Nothing is ever
unpickled.

Training waits only while its tensors are copied; a thread writes the copies.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from harness.errors import UserError
from harness.files import sync_folder, to_bytes, write_synced

FORMAT = 1
FOLDER = re.compile(r"step-(\d{8,})")
FILE = re.compile(r"[a-z_]+\.(safetensors|json)")


class Damaged(Exception):
    """A checkpoint that fails the verification; the text says which file and why."""


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; training waits for the copies only.

    One thread writes while another hashes. The copies are the bytes of the files, and their memory
    is used again for the next checkpoint. At exit Python waits for a write under way, and calls
    `wait` if nobody has called it since, so that no failure goes unnoticed.
    """

    def __init__(self):
        self._threads = ThreadPoolExecutor(2, "checkpoint")
        self._buffers, self._write = {}, None

    def start(self, root, step, tensors, state, keep, on_start=None, on_finish=None):
        """Copy the tensors and begin to publish checkpoint `step` under `root`.

        tensors: {"model": {name: tensor}, "ema": ..., "optimizer": ...}, a safetensors file each.
        state: what JSON can hold. keep: how many checkpoints remain afterwards. on_start,
        on_finish: functions that the writing thread calls before and after. Waits for the previous
        write first, and raises the error that stopped it.
        """
        self.wait()
        self._buffers = {k: as_file(group, self._buffers.get(k)) for k, group in tensors.items()}
        if any(t.is_cuda for group in tensors.values() for t in group.values()):
            torch.cuda.synchronize()
        files = {f"{k}.safetensors": memoryview(b.numpy()) for k, b in self._buffers.items()}
        files["state.json"] = json.dumps(state, indent=1).encode()
        entries = self._threads.submit(_describe, files)  # submitted first: the write waits for it
        self.step = step
        self._write = self._threads.submit(
            _publish, Path(root), step, files, entries, keep, on_start, on_finish
        )
        atexit.register(self.wait)

    def add(self, function):
        """Call `function` after the write under way, unless that fails; `wait` waits for both."""
        previous_write = self._write

        def call():
            path = previous_write.result() if previous_write else None
            function()
            return path

        self._write = self._threads.submit(call)
        atexit.register(self.wait)

    def done(self):
        """Whether the last write has ended, and `wait` has not been called since."""
        return self._write is not None and self._write.done()

    def wait(self):
        """Wait until nothing is being written any more; returns the checkpoint's folder, or None.

        Raises the error that stopped the write, once. After an OSError (disk full, read-only) the
        older checkpoints are untouched.
        """
        if self._write is None:
            return None
        futures.wait([self._write])
        write, self._write = self._write, None
        atexit.unregister(self.wait)
        return write.result()


def save_checkpoint(root, step, tensors, state, keep):
    """Publish a checkpoint and wait for it (see `CheckpointWriter.start`); returns its folder."""
    writer = CheckpointWriter()
    writer.start(root, step, tensors, state, keep)
    return writer.wait()


def _describe(files):
    return {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }


def _publish(root, step, files, entries, keep, on_start, on_finish):
    if on_start:
        on_start()
    root.mkdir(parents=True, exist_ok=True)
    for remnant in root.glob(".writing-*"):
        shutil.rmtree(remnant, ignore_errors=True)
    final = root / f"step-{step:08d}"
    writing = root / f".writing-{final.name}-{os.getpid()}"
    replaced = root / f".writing-replaced-{os.getpid()}"
    try:
        writing.mkdir()
        for name, data in files.items():
            write_synced(writing / name, data)
        manifest = {"format": FORMAT, "step": step, "files": entries.result()}
        write_synced(writing / "manifest.json", json.dumps(manifest, indent=1).encode())
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
    # Later checkpoints do not count: they were written before a resume from an older one
    for path in [p for p in checkpoints(root) if int(p.name[5:]) <= step][:-keep]:
        # Renamed first, so that no folder with a checkpoint's name is ever half deleted
        trash = root / f".writing-pruned-{path.name}-{os.getpid()}"
        with contextlib.suppress(OSError):
            os.rename(path, trash)
            shutil.rmtree(trash, ignore_errors=True)
    if on_finish:
        on_finish()
    return final


def load_checkpoint(path):
    """Read and verify a checkpoint: ({file stem: {name: CPU tensor}}, state).

    Raises Damaged where a file is missing, has another size or hash, or holds something else than
    its name says.
    """
    path = Path(path)
    try:
        for file in path.iterdir():  # reading a pipe would wait forever
            if not file.is_file():
                raise Damaged(f"{file.name} is no regular file")
        manifest = json.loads((path / "manifest.json").read_bytes())
        entries = manifest["files"]
        if manifest["format"] != FORMAT:
            raise Damaged(f"manifest.json has format {manifest['format']}, this reads {FORMAT}")
        if FOLDER.fullmatch(path.name) and int(path.name[5:]) != manifest["step"]:
            raise Damaged(f"manifest.json is of step {manifest['step']}")
        if "state.json" not in entries or not all(FILE.fullmatch(name) for name in entries):
            raise Damaged("manifest.json lists unexpected files")
        for file in path.iterdir():
            if FILE.fullmatch(file.name) and file.name not in {*entries, "manifest.json"}:
                raise Damaged(f"manifest.json does not list {file.name}")
            if file.is_symlink():
                raise Damaged(f"{file.name} is a link")
        tensors, state = {}, None
        for name, expected in entries.items():
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
    except (
        ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError
    ) as error:  # fmt: skip
        raise Damaged(f"{type(error).__name__}: {error}") from None
    return tensors, state


def checkpoints(root):
    """The published checkpoint folders under `root`, oldest first, by step number."""
    root = Path(root)
    folders = [p for p in root.iterdir() if FOLDER.fullmatch(p.name)] if root.is_dir() else []
    return sorted(folders, key=lambda p: int(p.name[5:]))


def newest_valid(root, say):
    """(path, tensors, state) of the newest checkpoint that verifies, or None where there are none.

    `say(line)` is called for every damaged one that is passed over. Raises UserError where there
    are checkpoints but none verifies: a run never starts from scratch silently.
    """
    folders = checkpoints(root)
    for path in reversed(folders):
        try:
            if path.is_symlink():  # it may lead anywhere; only a path from the user may be a link
                raise Damaged("it is a link")
            return path, *load_checkpoint(path)
        except Damaged as damage:
            say(f"{path} is damaged ({damage}); trying the one before")
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {root} verifies: give another with "
            "--resume_from_checkpoint PATH, or start anew with --overwrite"
        )
    return None


def as_file(tensors, buffer=None):
    """Copy tensors into the bytes of a safetensors file: a vector of uint8 on the CPU.

    buffer: the result of an earlier call, which is overwritten where its size is the same. Where
    tensors are on a GPU the result is in pinned memory: synchronise before reading it. The copies
    are contiguous and in safetensors' own order, the widest types first, so that everything is
    aligned.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, sizes, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name in names:
        tensor = tensors[name]
        sizes.append(tensor.numel() * tensor.element_size())
        offsets = [end, end + sizes[-1]]
        dtype = _dtype_name(tensor.dtype)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    if buffer is None or len(buffer) != len(head) + end:
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        buffer = torch.empty(len(head) + end, dtype=torch.uint8, pin_memory=pinned)
    buffer[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for name, section in zip(names, buffer[len(head) :].split(sizes), strict=True):
        tensor = tensors[name].detach()
        section.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=tensor.is_cuda)
    return buffer


@functools.cache
def _dtype_name(dtype):
    """safetensors' name of a type, such as "F32"."""
    return json.loads(to_bytes({"": torch.empty(0, dtype=dtype)})[8:])[""]["dtype"]
