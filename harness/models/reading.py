"""Reading any program's file of weights: its content decides, not its suffix. Nothing is unpickled.

Trainers store a state under different names, alone or beside other values. Where a file holds
several states, the plan names the one that was read, and FILE:KEY reads another.
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
MOST_LEVELS = 4  # of nested dicts in which a state is looked for


class Weights(NamedTuple):
    """A state, and which part of its file it is ("" where the file holds nothing else)."""

    state: dict[str, torch.Tensor]
    description: str = ""


def load_weights(path) -> dict[str, torch.Tensor]:
    """The state in a run folder or a file: see `read_weights`."""
    return read_weights(path).state


def read_weights(spec) -> Weights:
    """The state in a run folder or in any program's file, of safetensors or torch.save.

    spec: a path, or FILE:KEY with the name of the state in the file, KEY.KEY for a nested one.
    Raises UserError that names the file; for a file that would have to be unpickled, with the line
    of Python that turns it into safetensors.
    """
    path, key = _path_and_key(str(spec))
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
        return Weights(_state_at(content, key, path), f"its {key}")
    return _state_in(content, path)


def _path_and_key(spec):
    """(path, key or None) of FILE:KEY; a file whose own name has a colon is a file."""
    file, colon, key = spec.rpartition(":")
    if colon and not Path(spec).exists() and Path(file).is_file():
        return Path(file), key
    return Path(spec), None


def _content(path):
    """The file's content: a dict of tensors, or any other plain values that torch.save wrote."""
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
    except Exception as error:  # torch raises six kinds of them for damaged files
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
    """The command that turns a file with Python objects into one of plain tensors."""
    new = f"{path.with_suffix('')}.safetensors"
    # All tensors, each under the path of its keys: the state is chosen when the file is read
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
    """The state to read from a file's content."""
    if _is_state(content):
        return Weights(_tensors(content), _average_note(content))
    states = {key: _inner(value) for key, value in _items(content)}
    states = {key: inner for key, inner in states.items() if inner}
    usual_keys = [key for key in (*AVERAGED, *RAW) if key in states]
    if not usual_keys and len(states) > 1:
        keys = ", ".join(map(str, states))
        raise UserError(f"{path} holds several states: choose one, {path}:KEY with {keys}")
    if not states:
        keys = ", ".join(str(key) for key, _ in _items(content)[:5])
        raise UserError(
            f"{path} is not a state dict (names of tensors)" + (f": it has {keys}" if keys else "")
        )
    chosen_key = (usual_keys or list(states))[0]
    description = f"its {chosen_key}"
    if chosen_key in AVERAGED:
        description += " (averaged weights)"
    other_keys = [str(key) for key in states if key != chosen_key]
    if other_keys:
        description += f"; also there: {', '.join(other_keys)} ({path}:{other_keys[0]})"
    return Weights(states[chosen_key], description)


def _inner(value, depth=1):
    """A value that is a state, or the state it holds under one of the usual names; else None."""
    if _is_state(value):
        return _tensors(value)
    for key in (*AVERAGED, *RAW) if depth < MOST_LEVELS and isinstance(value, dict) else ():
        if state := _inner(value.get(key), depth + 1):
            return state
    return None


def _state_at(content, key, path):
    """The state under a key, KEY.KEY for a nested one, or under a prefix of the names."""
    value = content
    flat = content if _is_state(content) else None
    with contextlib.suppress(UserError):
        flat = flat or _state_in(content, path).state
    for prefix in (key, f"module.{key}") if flat else ():
        if substate := under_prefix(flat, prefix):
            return substate
    for level in [key] if isinstance(content, dict) and key in content else key.split("."):
        if not isinstance(value, dict) or level not in value:
            keys = [str(k) for k, v in _items(value) if isinstance(v, dict)]
            keys = ", ".join(keys or dict.fromkeys(name.partition(".")[0] for name in flat or {}))
            raise UserError(f"{path} has no {key}: there are {keys or 'no others'}")
        value = value[level]
    state = _inner(value)
    if not state:
        raise UserError(f"{path}: {key} is not a state dict (names of tensors)")
    return state


def under_prefix(state, prefix) -> dict[str, torch.Tensor]:
    """The entries of a state whose names begin with PREFIX., without the prefix."""
    start = f"{prefix}."
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


def _is_state(value):
    """Whether a value is a dict of tensors, but for a few plain values (an epoch, an accuracy)."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    plain_values = [item for item in value.values() if not torch.is_tensor(item)]
    usable = all(item is None or isinstance(item, int | float | str) for item in plain_values)
    return usable and len(value) > 2 * len(plain_values)


def _tensors(state):
    return {
        key: value for key, value in state.items() if torch.is_tensor(value) and key not in COUNTERS
    }


def _average_note(state):
    counts = [state[key] for key in COUNTERS if key in state]
    return f"averaged over {int(counts[0])} updates" if counts else ""


def _items(value):
    return list(value.items()) if isinstance(value, dict) else []
