"""How images become what a network sees."""

from __future__ import annotations

from typing import NamedTuple

from harness.data.pixels import FILTERS
from harness.errors import UserError


class Preprocessing(NamedTuple):
    """How images become what a network sees.

    The shorter side is resized to `stored_size`, the centre of `size` is cut out, and its pixels
    in [0, 1] are normalised.
    """

    size: int  # px a side that the network sees
    crop_pct: float  # the part of the resized side that this is, in (0, 1]
    interpolation: str  # a key of harness.data.pixels.FILTERS
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]

    @property
    def stored_size(self) -> int:
        """Pixels a side to which images are resized before the centre crop."""
        return round(self.size / self.crop_pct)


def preprocessing_of(cfg, file) -> Preprocessing | None:
    """The preprocessing in timm's words, or None where one of them is missing."""
    checks = {
        "input_size": lambda v: v[0] == 3 and v[1] == v[2] > 0 and isinstance(v[2], int),
        "crop_pct": lambda v: 0 < v <= 1,
        "interpolation": lambda v: v in FILTERS,
        "mean": lambda v: len(v) == 3 and all(abs(float(x)) < float("inf") for x in v),
        "std": lambda v: len(v) == 3 and all(0 < float(x) < float("inf") for x in v),
    }
    if not isinstance(cfg, dict) or any(cfg.get(key) is None for key in checks):
        return None
    for key, check in checks.items():
        try:
            fits = check(cfg[key])
        except (TypeError, ValueError, LookupError):
            fits = False
        if not fits:
            raise UserError(f"{file}: pretrained_cfg has no usable {key}: {cfg[key]!r}")
    mean, std = (tuple(float(x) for x in cfg[key]) for key in ("mean", "std"))
    return Preprocessing(
        cfg["input_size"][2], float(cfg["crop_pct"]), cfg["interpolation"], mean, std
    )
