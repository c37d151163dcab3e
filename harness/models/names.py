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
    hf-hub:owner/name, whose config.json names the network. library: "torchvision" or "timm", to
    look in that one only.

    Raises UserError with the nearest name for an unknown one.
    """
    if spec.startswith(PREFIX) and library is None:
        return _on_hub(spec)
    owner, slash, bare_name = spec.partition("/")
    name = spec
    if slash and owner in LIBRARIES:
        name, library = bare_name, owner
    if name in fastnet.WIDTHS and library in (None, "own"):
        return Network("own", name)
    import torchvision  # here, as it takes seconds that reading predictions should not cost

    torchvision_names = torchvision.models.list_models(module=torchvision.models)
    if name in torchvision_names and library != "timm":
        return Network("torchvision", name)
    import timm

    plain, _, tag = name.partition(".")
    if library != "torchvision" and timm.is_model(plain):
        tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{plain}.*")]
        if tag and tag not in tags:
            raise UserError(f"timm's {plain} has no weights {tag}{_hint(tag, tags)}")
        return Network("timm", plain, tag or None)
    hint = nearest(name, [*fastnet.WIDTHS, *torchvision_names]) if library != "timm" else ""
    hint = hint or (nearest(plain, timm.list_models()) if library != "torchvision" else "")
    raise UserError(f'unknown model "{name}" in {library or "torchvision and timm"}{hint}')


def check_arguments(arguments, source) -> dict:
    """The "model_args" of a config.json, checked, for timm's constructor.

    Raises UserError for arguments that are not the network's own, such as a file to load, which
    timm would unpickle, or the number of classes, which config.json names elsewhere.
    """
    import timm

    reserved_names = {*inspect.signature(timm.create_model).parameters, "num_classes", "in_chans"}
    for key, value in (arguments or {}).items():
        items = value if isinstance(value, list) else [value]
        plain = all(item is None or isinstance(item, bool | int | float | str) for item in items)
        if key in reserved_names or "pretrained" in key or "features" in key or not plain:
            raise UserError(f"{source}: model_args has {key}, which is not for a constructor")
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


def _hint(tag, tags):
    return nearest(tag, tags) or (f": it has {', '.join(tags)}" if tags else ": it has none")
