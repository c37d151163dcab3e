"""The preprocessing of images: resize, centre crop and normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from harness.cli.bounds import fits, range_of
from harness.data.pixels import FILTERS
from harness.errors import UserError, shortened


class Preprocessing(NamedTuple):
    """How an image file becomes the input of a network.

    The shorter side is resized to `stored_size`, the centre of `size` is cut out, and its pixels
    in [0, 1] are normalised. With packed_side, images come from the packed store
    (harness.data.packed), which holds them whole, the shorter side reduced to at most that many px;
    without it, from the decoded store (harness.data.cache), which holds squares of `stored_size`.
    """

    size: int  # px a side that the network sees
    crop_pct: float  # `size` as a part of the resized shorter side, in (0, 1]
    interpolation: str  # a key of harness.data.pixels.FILTERS
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    packed_side: int = 0  # px, or 0 for the decoded store

    def as_list(self) -> list:
        """The fields as JSON reads them back; without a packed_side of 0, as in older runs."""
        values = [list(v) if isinstance(v, tuple) else v for v in self]
        return values if self.packed_side else values[:-1]

    @property
    def stored_size(self) -> int:
        """Pixels a side to which images are resized before the centre crop."""
        return round(self.size / self.crop_pct)


@dataclass(frozen=True)
class PreprocessingOptions:
    """The flags of preprocessing; None where the weights decide."""

    crop_pct: float | None = None
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def given(self) -> dict:
        """The options that are not None, by the names of Preprocessing's fields."""
        values = {
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "mean": self.mean and tuple(self.mean),
            "std": self.std and tuple(self.std),
        }
        return {name: value for name, value in values.items() if value is not None}

    def as_text(self) -> str:
        """`; --mean, --std as given`, or nothing."""
        flags = ", ".join(f"--{name}" for name in self.given())
        return f"; {flags} as given" if flags else ""


def preprocessing_of(cfg, file) -> Preprocessing | None:
    """The preprocessing in a pretrained_cfg of timm, or None where one of its keys is missing."""
    three = "three numbers, each"
    checks = {
        "input_size": (
            lambda v: v[0] == 3 and v[1] == v[2] and len(v) == 3 and fits("image_size", v[2]),
            f"[3, n, n] with n {range_of('image_size')}",
        ),
        "crop_pct": (lambda v: fits("crop_pct", v), range_of("crop_pct")),
        "interpolation": (lambda v: v in FILTERS, f"one of {', '.join(FILTERS)}"),
        "mean": (lambda v: _are_three("mean", v), f"{three} {range_of('mean')}"),
        "std": (lambda v: _are_three("std", v), f"{three} {range_of('std')}"),
    }
    if not isinstance(cfg, dict) or any(cfg.get(key) is None for key in checks):
        return None
    for key, (check, requirement) in checks.items():
        try:
            usable = check(cfg[key])
        except (TypeError, LookupError):
            usable = False
        if not usable:
            raise UserError(
                f"{file}: pretrained_cfg has no usable {key}: {shortened(repr(cfg[key]))}; it has "
                f"to be {requirement}"
            )
    mean, std = (tuple(float(x) for x in cfg[key]) for key in ("mean", "std"))
    return Preprocessing(
        cfg["input_size"][2], float(cfg["crop_pct"]), cfg["interpolation"], mean, std
    )


def _are_three(name, values):
    """Whether there are three values, all within the bounds of the flag `name`."""
    return len(values) == 3 and all(fits(name, value) for value in values)
