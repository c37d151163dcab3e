"""What `--model` names: a network of torchvision, of timm, of the Hub or this project's own."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import NamedTuple

from harness.errors import UserError, nearest
from harness.hub import PREFIX, model_file
from harness.models import fastnet
from harness.models.config import read_config

LIBRARIES = ("torchvision", "timm")


class Network(NamedTuple):
    """An architecture, and which published weights of it are meant."""

    library: str  # "own", "torchvision" or "timm"
    name: str  # as the library has it
    tag: str | None = None  # of timm's weights; None for its default ones
    hub: str | None = None  # "hf-hub:owner/name", where it comes from there
    arguments: dict = {}  # noqa: RUF012 - of timm's constructor, never changed


@lru_cache
def find_model(spec, library=None) -> Network:
    """The network that a name means.

    spec: torchvision's name or timm's, which may have the tag of its weights (NAME.TAG);
    torchvision/NAME and timm/NAME, where both have it (torchvision wins a bare name);
    hf-hub:owner/name, whose config.json says what it is. library: "torchvision" or "timm", for one
    of them alone.

    Raises UserError that gives the nearest name.
    """
    if spec.startswith(PREFIX) and library is None:
        return _on_hub(spec)
    owner, slash, rest = spec.partition("/")
    name = spec
    if slash and owner in LIBRARIES:
        name, library = rest, owner
    if name in fastnet.WIDTHS and library in (None, "own"):
        return Network("own", name)
    import torchvision  # late: it takes seconds, which what only reads predictions can do without

    known = torchvision.models.list_models(module=torchvision.models)
    if name in known and library != "timm":
        return Network("torchvision", name)
    import timm

    plain, _, tag = name.partition(".")
    if library != "torchvision" and timm.is_model(plain):
        tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{plain}.*")]
        if tag and tag not in tags:
            raise UserError(f"timm's {plain} has no weights {tag}{_of(tag, tags)}")
        return Network("timm", plain, tag or None)
    hint = nearest(name, [*fastnet.WIDTHS, *known]) if library != "timm" else ""
    hint = hint or (nearest(plain, timm.list_models()) if library != "torchvision" else "")
    raise UserError(f'unknown model "{name}" in {library or "torchvision and timm"}{hint}')


def check_arguments(arguments, where) -> dict:
    """The "model_args" of a config.json, for timm's constructor; UserError for what it is not for.

    Such as a file to load, which timm would unpickle, or the classes, which the head says.
    """
    import timm

    own = {*inspect.signature(timm.create_model).parameters, "num_classes", "in_chans"}
    for key, value in (arguments or {}).items():
        items = value if isinstance(value, list) else [value]
        plain = all(item is None or isinstance(item, bool | int | float | str) for item in items)
        if key in own or "pretrained" in key or "features" in key or not plain:
            raise UserError(f"{where}: model_args has {key}, which is not for a constructor")
    return dict(arguments or {})


def _on_hub(spec):
    file = model_file(spec, "config.json")
    config = read_config(file)
    if not config.get("architecture"):
        raise UserError(f"{spec} does not say its architecture: its config.json is not timm's")
    library = config.get("library")
    network = find_model(config["architecture"], library if library in LIBRARIES else "timm")
    if library == "own":
        network = find_model(config["architecture"])
    arguments = check_arguments(config.get("model_args"), f"{spec}: config.json")
    return network._replace(hub=spec, arguments=arguments)


def _of(word, known):
    return nearest(word, known) or (f": it has {', '.join(known)}" if known else ": it has none")
