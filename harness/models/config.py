"""Reading config.json, a run's or timm's, with types and ranges checked.

A missing key is no error here: the code that needs it looks for it. A wrong value is one: the error
is one line with the key, its value and what it has to be. Numbers have the bounds of the flags.
"""

from __future__ import annotations

import json

from harness.cli.bounds import BOUNDS, fits, range_of
from harness.cli.flags import named
from harness.errors import UserError, reason_of, shortened
from harness.files import has_file
from harness.models.heads import HEADS

MOST_BYTES = 16 * 2**20  # 21,000 classes with long names are 1 MB
MOST_LEVELS = 20  # of nested objects and lists; a run's file has 4

DATA_FLAGS = named("data")  # a run's flags for the images it was trained on
NUMBERS = set(DATA_FLAGS) & set(BOUNDS)


def _number(name):
    return lambda value: fits(name, value), range_of(name)


def _one_of(*choices):
    return lambda value: value in choices, f"one of {', '.join(choices)}"


TEXT = (lambda value: isinstance(value, str), "text")
OBJECT = (lambda value: isinstance(value, dict), "an object")
OBJECTS = (
    lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value),
    "a list of objects",
)
# key -> (whether its value can be used, what it has to be); null counts as a missing key
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
# The same for the keys in "flags", in "data" and in each ancestor
RECIPE_KEYS = {name: _number(name) if name in NUMBERS else TEXT for name in DATA_FLAGS}
RECIPE_KEYS |= {"dataset": TEXT, "source": TEXT}


def read_config(file) -> dict:
    """config.json as a dict, empty where there is none.

    Preprocessing ("pretrained_cfg") is checked by harness.data.preprocessing.preprocessing_of.
    """
    if not has_file(file):
        return {}
    try:
        with file.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES} bytes")
        config = json.loads(content)
        _check_levels(config)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({reason_of(error)})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object")
    _check(config, KEYS, file)
    for section in ("flags", "data"):
        _check(config.get(section) or {}, RECIPE_KEYS, f"{file}: {section}")
    for ancestor in config.get("ancestors") or []:
        _check(ancestor, RECIPE_KEYS, f"{file}: ancestors")
    return config


def _check(values, keys, source):
    for key, (usable, requirement) in keys.items():
        if values.get(key) is not None and not usable(values[key]):
            raise UserError(
                f"{source}: {key} is {shortened(repr(values[key]))}: it has to be {requirement}"
            )


def _check_levels(value):
    """Raise ValueError where objects and lists are nested deeper than MOST_LEVELS."""
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        lists = [item.values() if isinstance(item, dict) else item for item in level
                 if isinstance(item, dict | list)]  # fmt: skip
        level = [item for items in lists for item in items]
    if level:
        raise ValueError(f"more than {MOST_LEVELS} levels of objects and lists")
