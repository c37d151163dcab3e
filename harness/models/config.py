"""config.json of a run's folder, or timm's: read, with types and ranges checked.

What it lacks is left to whoever needs it; what it has is right, or the file is refused in one line
that names the key, its value and what it has to be. Numbers have the bounds of the flags.
"""

from __future__ import annotations

import json

from harness.cli.bounds import BOUNDS, fits, range_of
from harness.cli.flags import named
from harness.errors import UserError, reason_of, shortened
from harness.files import has_file
from harness.models.heads import HEADS

MOST_BYTES = 16 * 2**20  # 21,000 classes with long names are 1 MB
MOST_LEVELS = 20  # of objects and lists in each other; a run's have 4

DATA_FLAGS = named("data")  # of a run, which say which images it was trained on
NUMBERS = set(DATA_FLAGS) & set(BOUNDS)


def _number(name):
    return lambda value: fits(name, value), range_of(name)


def _one_of(*words):
    return lambda value: value in words, f"one of {', '.join(words)}"


TEXT = (lambda value: isinstance(value, str), "text")
OBJECT = (lambda value: isinstance(value, dict), "an object")
OBJECTS = (
    lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value),
    "a list of objects",
)
# key -> (whether its value can be used, what it has to be); null is as good as no key
KEYS = {
    "architecture": TEXT,
    "library": TEXT,
    "num_classes": _number("num_classes"),
    "stem": _one_of("small", "standard"),
    "head": _one_of(*HEADS),
    "dropout": _number("dropout"),
    "packed_side": _number("image_size"),
    "model_args": OBJECT,
    "dataset": TEXT,
    "data": OBJECT,
    "flags": OBJECT,
    "ancestors": OBJECTS,
}
# The same of "flags", of "data", and of each ancestor
RECIPE_KEYS = {name: _number(name) if name in NUMBERS else TEXT for name in DATA_FLAGS}
RECIPE_KEYS |= {"dataset": TEXT, "source": TEXT}


def read_config(file) -> dict:
    """config.json as a dict, empty where there is none.

    Preprocessing ("pretrained_cfg") is checked by harness.data.preprocessing.preprocessing_of.
    """
    if not has_file(file):
        return {}
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES} bytes")
        config = json.loads(content)
        _check_levels(config)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({reason_of(error)})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object")
    _check(config, KEYS, file)
    for part in ("flags", "data"):
        _check(config.get(part) or {}, RECIPE_KEYS, f"{file}: {part}")
    for ancestor in config.get("ancestors") or []:
        _check(ancestor, RECIPE_KEYS, f"{file}: ancestors")
    return config


def _check(values, keys, where):
    for key, (usable, wanted) in keys.items():
        if values.get(key) is not None and not usable(values[key]):
            raise UserError(
                f"{where}: {key} is {shortened(repr(values[key]))}: it has to be {wanted}"
            )


def _check_levels(value):
    """ValueError where more than MOST_LEVELS objects and lists are in each other."""
    inside = [value]
    for _ in range(MOST_LEVELS + 1):
        lists = [item.values() if isinstance(item, dict) else item for item in inside
                 if isinstance(item, dict | list)]  # fmt: skip
        inside = [item for items in lists for item in items]
    if inside:
        raise ValueError(f"more than {MOST_LEVELS} levels of objects and lists")
