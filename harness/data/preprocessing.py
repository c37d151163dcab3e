"""How images become what a network sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from harness.cli.bounds import fits, range_of
from harness.data.pixels import FILTERS
from harness.errors import UserError, shortened


class Preprocessing(NamedTuple):
    """How images become what a network sees.

    The shorter side is resized to `stored_size`, the centre of `size` is cut out, and its pixels
    in [0, 1] are normalised. Where they come from: with packed_side from the packed store
    (harness.data.packed), which keeps images whole up to so many px of the shorter side; without
    from the decoded store (harness.data.cache), which keeps squares of `stored_size`.
    """

    size: int  # px a side that the network sees
    crop_pct: float  # the part of the resized side that this is, in (0, 1]
    interpolation: str  # a key of harness.data.pixels.FILTERS
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    packed_side: int = 0  # px, or 0 for the decoded store

    def as_list(self) -> list:
        """As JSON gives it back; as it was before there was a packed store, where that is not."""
        values = [list(v) if isinstance(v, tuple) else v for v in self]
        return values if self.packed_side else values[:-1]

    @property
    def stored_size(self) -> int:
        """Pixels a side to which images are resized before the centre crop."""
        return round(self.size / self.crop_pct)


@dataclass(frozen=True)
class PreprocessingOptions:
    """What flags say of the preprocessing; None for what they leave to the weights."""

    crop_pct: float | None = None
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def given(self) -> dict:
        """Those that are not None, by the names of Preprocessing."""
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
    """The preprocessing in timm's words, or None where one of them is missing."""
    three = "three numbers, each"
    checks = {
        "input_size": (
            lambda v: v[0] == 3 and v[1] == v[2] and len(v) == 3 and fits("image_size", v[2]),
            f"[3, n, n] with n {range_of('image_size')}",
        ),
        "crop_pct": (lambda v: fits("crop_pct", v), range_of("crop_pct")),
        "interpolation": (lambda v: v in FILTERS, f"one of {', '.join(FILTERS)}"),
        "mean": (lambda v: _three("mean", v), f"{three} {range_of('mean')}"),
        "std": (lambda v: _three("std", v), f"{three} {range_of('std')}"),
    }
    if not isinstance(cfg, dict) or any(cfg.get(key) is None for key in checks):
        return None
    for key, (check, wanted) in checks.items():
        try:
            usable = check(cfg[key])
        except (TypeError, LookupError):
            usable = False
        if not usable:
            raise UserError(
                f"{file}: pretrained_cfg has no usable {key}: {shortened(repr(cfg[key]))}; it has "
                f"to be {wanted}"
            )
    mean, std = (tuple(float(x) for x in cfg[key]) for key in ("mean", "std"))
    return Preprocessing(
        cfg["input_size"][2], float(cfg["crop_pct"]), cfg["interpolation"], mean, std
    )


def _three(name, values):
    return len(values) == 3 and all(fits(name, value) for value in values)
