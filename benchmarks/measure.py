"""What every benchmark does: sides in turns, rows with what is wanted of them, their table."""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # harness and tricks, from wherever the script is run


class Row(NamedTuple):
    """One figure: a value a round, and what its median should be at least, or at most."""

    figure: str
    values: list[float]
    wanted: float | None = None  # None: shown for what it is
    at_most: bool = False

    def met(self) -> bool:
        median = statistics.median(self.values)
        return median <= self.wanted if self.at_most else median >= self.wanted


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """The flags of every benchmark; add its own, then call `read`."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--rounds", type=int, default=rounds, help="times that each side is timed")
    made.add_argument("--quick", action="store_true", help="one small round: does it run?")
    made.add_argument("--json", metavar="FILE", help="write the rows there, too")
    return made


def data_flag(made: argparse.ArgumentParser) -> None:
    made.add_argument("--data", default="", help="folder of images; unset: smooth noise")


def read(made: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    args = made.parse_args(argv)
    if args.quick:
        args.rounds = 1
    return args


def synchronize(device: torch.device | None = None) -> None:
    if (device is None or device.type != "cpu") and torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds_in_turns(
    sides: dict[str, Callable[[], None]], rounds: int, after: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each side in each round. Sides take turns, every other round backwards.

    A round before the first warms up and is not counted. after: done after each, untimed.
    """
    taken = {name: [] for name in sides}
    for done in range(rounds + 1):
        for name in list(sides) if done % 2 else reversed(sides):
            synchronize()
            start = time.perf_counter()
            sides[name]()
            synchronize()
            if done:
                taken[name].append(time.perf_counter() - start)
            after()
    return taken


def over(above: list[float], below: list[float]) -> list[float]:
    """Round by round, above / below."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: list[float], digits: int | None = None) -> str:
    """`median (min–max) | n`, two cells of a table."""
    if digits is None:
        middle = abs(statistics.median(values))
        digits = 0 if middle >= 100 else 1 if middle >= 10 else 2 if middle >= 0.1 else 3
    low, middle, high = (
        f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low}–{high}) | {len(values)}"


def table(rows: list[Row]) -> str:
    lines = ["| figure | median (min–max) | n | wanted | met |", "|---|---|---|---|---|"]
    for row in rows:
        wanted, met = "", ""
        if row.wanted is not None:
            wanted = f"{'≤' if row.at_most else '≥'} {row.wanted:g}"
            met = "yes" if row.met() else "**no**"
        lines.append(f"| {row.figure} | {spread(row.values)} | {wanted} | {met} |")
    return "\n".join(lines)


def report(args: argparse.Namespace, rows: list[Row], setting: str) -> None:
    """Print machine, setting and rows; write the rows as JSON where --json asks for it."""
    print(f"{machine()}\n{setting}\n\n{table(rows)}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps([row._asdict() for row in rows], indent=1))


def read_rows(file: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(file.read_text())]


def machine() -> str:
    """The processor and the versions, in a line."""
    cpuinfo = Path("/proc/cpuinfo")
    named = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [f"{named[1] if named else platform.processor()}, {cores} cores"]
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    words += [f"{name} {version(name)}" for name in ("torch", "torchvision", "accelerate")]
    return "; ".join([*words, f"Python {platform.python_version()}"])
