"""Anybody's file of weights: its state found by content, whatever its suffix. Nothing is unpickled.

Trainers write a state under names of their own, with or without what else they keep. Which of
several states was taken is said, and FILE:KEY takes another.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from harness.errors import UserError, reason_of
from harness.files import has_file, is_lfs_pointer, written_digest

# Under which names trainers put a state, in the order in which they are taken: averaged weights
# first, as they are what those trainers evaluate.
AVERAGED = (
    "state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "ema_model",
    "model_averaged", "params_ema", "shadow",
)  # fmt: skip
RAW = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params",
    "module",
)  # fmt: skip
COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel, beside the weights
DEEPEST = 4  # states in dicts in each other


class Weights(NamedTuple):
    """A state, and where in its file it was, in words ("" where there was nothing else)."""

    state: dict[str, torch.Tensor]
    words: str = ""


def load_weights(path) -> dict[str, torch.Tensor]:
    """The state in a run folder or a file: see `read_weights`."""
    return read_weights(path).state


def read_weights(spec) -> Weights:
    """The state in a run folder or in anybody's file, safetensors or what torch.save wrote.

    spec: a path, or FILE:KEY with the name under which it stands there, KEY.KEY for one inside
    another. Raises UserError that names the file; for one that would have to be unpickled, with
    the line of Python that turns it into safetensors.
    """
    path, key = _parted(str(spec))
    if key == "":
        raise UserError(f"{spec} names no state behind the colon")
    if path.is_dir():
        path = path / "model.safetensors"
    if not has_file(path):
        raise UserError(f"no weights at {path}")
    if is_lfs_pointer(path):
        raise UserError(f"{path} is a Git LFS pointer, not the file: git lfs pull")
    content = _content(path)
    if key:
        return Weights(_at(content, key, path), f"its {key}")
    return _state_in(content, path)


def _parted(spec):
    """(path, key or None) of FILE:KEY; a file whose own name has a colon is a file."""
    file, colon, key = spec.rpartition(":")
    if colon and not Path(spec).exists() and Path(file).is_file():
        return Path(file), key
    return Path(spec), None


def _content(path):
    """What is in the file: a dict of tensors, or whatever else torch.save wrote of plain values."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] == b"{" and start[:2] != b"PK":  # the length of a header, and its JSON
            data = path.read_bytes()
            written_digest(path, data)
            return safetensors.torch.load(data)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a foreign file: torch alone raises six kinds for damaged ones
        objects = re.search(r"GLOBAL (\S+)", str(error))
        if not objects:
            raise unreadable(path, error) from None
        raise UserError(
            f"{path} holds Python objects ({objects[1]}), which could run code: nothing in it was "
            f"run. If you trust its author, {_to_safetensors(path)}"
        ) from None


def unreadable(path, error) -> UserError:
    """The error for a file that a reader could not read."""
    return UserError(
        f"{path} can't be read as plain tensors, and nothing in it was run ({reason_of(error)})"
    )


def _to_safetensors(path):
    """The command that turns a file with objects in it into one of plain tensors."""
    new = f"{path.with_suffix('')}.safetensors"
    # All tensors, under the names of all that they are in: what is taken of them is said later
    code = (
        "import torch, safetensors.torch as s; "
        "tensors = lambda x, names=(): {'.'.join(names): x.detach().clone().contiguous()} "
        "if torch.is_tensor(x) else {k: v for name, y in (x if isinstance(x, dict) "
        "else x.state_dict() if hasattr(x, 'state_dict') else {}).items() "
        "for k, v in tensors(y, (*names, str(name))).items()}; "
        f"found = tensors(torch.load({json.dumps(str(path))}, 'cpu', weights_only=False)); "
        f"found or exit('no tensors in it'); s.save_file(found, {json.dumps(new)})"
    )
    return f"python -c {shlex.quote(code)} writes {new}"


def _state_in(content, path):
    """The state to take of all that a file holds."""
    if _is_state(content):
        return Weights(_tensors(content), _counted(content))
    found = {key: _inner(value) for key, value in _items(content)}
    found = {key: inner for key, inner in found.items() if inner}
    known = [key for key in (*AVERAGED, *RAW) if key in found]
    if not known and len(found) > 1:
        raise UserError(
            f"{path} holds several states: choose one, {path}:KEY with {', '.join(map(str, found))}"
        )
    if not found:
        keys = ", ".join(str(key) for key, _ in _items(content)[:5])
        raise UserError(
            f"{path} is not a state dict (names of tensors)" + (f": it has {keys}" if keys else "")
        )
    taken = (known or list(found))[0]
    words = f"its {taken}"
    if taken in AVERAGED:
        words += " (averaged weights)"
    others = [str(key) for key in found if key != taken]
    if others:
        words += f"; also there: {', '.join(others)} ({path}:{others[0]})"
    return Weights(found[taken], words)


def _inner(value, depth=1):
    """The state that a value is, or that it holds under one of the known names; else None."""
    if _is_state(value):
        return _tensors(value)
    for key in (*AVERAGED, *RAW) if depth < DEEPEST and isinstance(value, dict) else ():
        if state := _inner(value.get(key), depth + 1):
            return state
    return None


def _at(content, key, path):
    """The state that stands under a key, KEY.KEY for one inside another, or under a prefix."""
    value = content
    flat = content if _is_state(content) else None
    with contextlib.suppress(UserError):
        flat = flat or _state_in(content, path).state
    for prefix in (key, f"module.{key}") if flat else ():
        if under := under_prefix(flat, prefix):
            return under
    for word in [key] if isinstance(content, dict) and key in content else key.split("."):
        if not isinstance(value, dict) or word not in value:
            there = [str(k) for k, v in _items(value) if isinstance(v, dict)]
            there = ", ".join(there or dict.fromkeys(name.partition(".")[0] for name in flat or {}))
            raise UserError(f"{path} has no {key}: there are {there or 'no others'}")
        value = value[word]
    state = _inner(value)
    if not state:
        raise UserError(f"{path}: {key} is not a state dict (names of tensors)")
    return state


def under_prefix(state, prefix) -> dict[str, torch.Tensor]:
    """What of a state stands under PREFIX., without it."""
    start = f"{prefix}."
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


def _is_state(value):
    """Whether all names are of tensors, but for a few of plain values (an epoch, an accuracy)."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    others = [one for one in value.values() if not torch.is_tensor(one)]
    plain = all(one is None or isinstance(one, int | float | str) for one in others)
    return plain and len(value) > 2 * len(others)


def _tensors(state):
    return {
        key: value for key, value in state.items() if torch.is_tensor(value) and key not in COUNTERS
    }


def _counted(state):
    counts = [state[key] for key in COUNTERS if key in state]
    return f"averaged over {int(counts[0])} updates" if counts else ""


def _items(value):
    return list(value.items()) if isinstance(value, dict) else []
