"""Where a run is: `checkpoints/step-00001234/`, and how it is written so that nothing is lost.

A checkpoint is a folder of safetensors and one state.json, with a manifest of sizes and sha256
written last. It is written beside its final name, synced and renamed; only then are older ones
pruned. Reading verifies every byte before anything is touched. Nothing is ever unpickled.

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
    """A checkpoint that does not verify; the text says which file and why."""


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; training waits for the copies only.

    One thread writes while another hashes. The copies are the files' bytes and stay allocated for
    the next checkpoint. Python waits for a write at exit, and `wait` is called there if by nobody
    before, so that no failure is lost.
    """

    def __init__(self):
        self._threads = ThreadPoolExecutor(2, "checkpoint")
        self._buffers, self._write = {}, None

    def start(self, root, step, tensors, state, keep, first=None, then=None):
        """Copy the tensors and begin to publish checkpoint `step` under `root`.

        tensors: {"model": {name: tensor}, "ema": ..., "optimizer": ...}, a safetensors file each.
        state: what JSON can hold. keep: how many to prune to afterwards. first, then: functions
        that the writer calls before and after. Waits for the write before, and raises what
        stopped it.
        """
        self.wait()
        self._buffers = {k: as_file(group, self._buffers.get(k)) for k, group in tensors.items()}
        if any(t.is_cuda for group in tensors.values() for t in group.values()):
            torch.cuda.synchronize()
        files = {f"{k}.safetensors": memoryview(b.numpy()) for k, b in self._buffers.items()}
        files["state.json"] = json.dumps(state, indent=1).encode()
        listed = self._threads.submit(_describe, files)  # first: the write waits for it
        self.step = step
        self._write = self._threads.submit(
            _publish, Path(root), step, files, listed, keep, first, then
        )
        atexit.register(self.wait)

    def add(self, function):
        """Call `function` after the write under way, unless that fails; `wait` waits for it."""
        before = self._write

        def call():
            path = before.result() if before else None
            function()
            return path

        self._write = self._threads.submit(call)
        atexit.register(self.wait)

    def done(self):
        """Whether a write has ended that nobody has waited for yet."""
        return self._write is not None and self._write.done()

    def wait(self):
        """Until nothing is being written any more; returns the folder that was.

        Raises what stopped it, once: OSError (disk full, read-only) leaves older ones untouched.
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


def _publish(root, step, files, listed, keep, first, then):
    if first:
        first()
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(".writing-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    final = root / f"step-{step:08d}"
    writing = root / f".writing-{final.name}-{os.getpid()}"
    replaced = root / f".writing-replaced-{os.getpid()}"
    try:
        writing.mkdir()
        for name, data in files.items():
            write_synced(writing / name, data)
        manifest = {"format": FORMAT, "step": step, "files": listed.result()}
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
    # Of those up to this step: later ones are left from before a resume from an older checkpoint
    for old in [p for p in checkpoints(root) if int(p.name[5:]) <= step][:-keep]:
        gone = root / f".writing-pruned-{old.name}-{os.getpid()}"  # never half a checkpoint
        with contextlib.suppress(OSError):
            os.rename(old, gone)
            shutil.rmtree(gone, ignore_errors=True)
    if then:
        then()
    return final


def load_checkpoint(path):
    """Read and verify a checkpoint: ({file stem: {name: CPU tensor}}, state).

    Raises Damaged where anything is missing, of another size or hash, or not what it says it is.
    """
    path = Path(path)
    try:
        for file in path.iterdir():  # a pipe would be waited for
            if not file.is_file():
                raise Damaged(f"{file.name} is no regular file")
        manifest = json.loads((path / "manifest.json").read_bytes())
        listed = manifest["files"]
        if manifest["format"] != FORMAT:
            raise Damaged(f"manifest.json has format {manifest['format']}, this reads {FORMAT}")
        if FOLDER.fullmatch(path.name) and int(path.name[5:]) != manifest["step"]:
            raise Damaged(f"manifest.json is of step {manifest['step']}")
        if "state.json" not in listed or not all(FILE.fullmatch(name) for name in listed):
            raise Damaged("manifest.json lists unexpected files")
        for file in path.iterdir():
            if FILE.fullmatch(file.name) and file.name not in {*listed, "manifest.json"}:
                raise Damaged(f"manifest.json does not list {file.name}")
            if file.is_symlink():
                raise Damaged(f"{file.name} is a link")
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
    except (
        ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError
    ) as error:  # fmt: skip
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
            if path.is_symlink():  # it may lead anywhere; a path that the user gave may be one
                raise Damaged("it is a link")
            return path, *load_checkpoint(path)
        except Damaged as damage:
            say(f"{path} is damaged ({damage}); trying the one before")
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {root} verifies: give another with "
            "--resume_from_checkpoint PATH, or start anew with --overwrite"
        )
    return None


def as_file(tensors, buffer=None):
    """Copy tensors into the bytes of a safetensors file: a vector of uint8 on the CPU.

    buffer: what an earlier call gave, which is written over where the size is the same. Pinned
    where tensors are on a GPU; synchronise before it is read. The copies are contiguous and in
    safetensors' own order: the widest types first, so that everything is aligned.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, sizes, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name in names:
        tensor = tensors[name]
        sizes.append(tensor.numel() * tensor.element_size())
        place = [end, end + sizes[-1]]
        word = _dtype_word(tensor.dtype)
        header[name] = {"dtype": word, "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    if buffer is None or len(buffer) != len(head) + end:
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        buffer = torch.empty(len(head) + end, dtype=torch.uint8, pin_memory=pinned)
    buffer[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for name, place in zip(names, buffer[len(head) :].split(sizes), strict=True):
        tensor = tensors[name].detach()
        place.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=tensor.is_cuda)
    return buffer


@functools.cache
def _dtype_word(dtype):
    """safetensors' word for a type, as "F32"."""
    return json.loads(to_bytes({"": torch.empty(0, dtype=dtype)})[8:])[""]["dtype"]
