"""What every benchmark does: sides in turns, rows with what is wanted of them, their record."""

import argparse
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import results
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # harness and tricks, from wherever the script is run


class Row(NamedTuple):
    """One figure: a value a round, and what its median should be at least, or at most."""

    figure: str
    values: list[float]
    wanted: float | None = None  # None: shown for what it is
    at_most: bool = False
    mean: bool = False  # of trainings with several seeds the mean counts, else the median
    digits: int | None = None  # decimals shown; None: by the size of the number
    interval: tuple[float, float] | None = None  # of 95 %

    def summary(self) -> dict:
        """The row as it stands in a results file: see results.py."""
        name, centre = ("mean", statistics.mean) if self.mean else ("median", statistics.median)
        numbers = {"min": min(self.values), name: centre(self.values), "max": max(self.values)}
        row = {"figure": self.figure, "n": len(self.values)}
        row |= {key: float(f"{number:.6g}") for key, number in numbers.items()}
        row |= {"interval": list(self.interval)} if self.interval else {}
        row |= {} if self.wanted is None else {"wanted": self.wanted}
        row |= {"at_most": True} if self.wanted is not None and self.at_most else {}
        return row | ({} if self.digits is None else {"digits": self.digits})

    def met(self) -> bool:
        return results.met(self.summary())


# Packages whose versions a results file names, where they were imported
PACKAGES = {
    "torch": "torch", "torchvision": "torchvision", "accelerate": "accelerate", "timm": "timm",
    "kornia": "kornia", "grad-cam": "pytorch_grad_cam", "torchmetrics": "torchmetrics",
    "simplejpeg": "simplejpeg", "datasets": "datasets",
}  # fmt: skip


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """The flags of every benchmark; add its own, then call `read`."""
    arg_parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    arg_parser.add_argument(
        "--rounds", type=int, default=rounds, help="times that each side is timed"
    )
    arg_parser.add_argument("--quick", action="store_true", help="one small round: does it run?")
    json_flags(arg_parser)
    return arg_parser


def json_flags(arg_parser: argparse.ArgumentParser) -> None:
    arg_parser.add_argument(
        "--json", nargs="?", const=str(results.FOLDER), metavar="FILE",
        help="write the measurement there, too; a folder, or without FILE benchmarks/results: "
        "with a name that says benchmark, date and machine",
    )  # fmt: skip
    arg_parser.add_argument(
        "--note", action="append", default=[], help="for the measurement: what shared the machine …"
    )


def data_flag(arg_parser: argparse.ArgumentParser) -> None:
    arg_parser.add_argument("--data", default="", help="folder of images; unset: smooth noise")


def read(arg_parser: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    args = arg_parser.parse_args(argv)
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

    A round before the first warms up and is not counted. after: called after each side, untimed.
    """
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(sides):
            synchronize()
            start = time.perf_counter()
            sides[name]()
            synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
            after()
    return seconds


def over(above: list[float], below: list[float]) -> list[float]:
    """Round by round, above / below."""
    return [a / b for a, b in zip(above, below, strict=True)]


def table(rows: list[Row]) -> str:
    return results.table([row.summary() for row in rows])


def report(args: argparse.Namespace, rows: list[Row], setting: str) -> None:
    """Print machine, setting and rows; write the measurement where --json asks for it."""
    print(f"{machine()}\n{setting}\n\n{table(rows)}", flush=True)
    write_measurement(args, rows, setting)


def write_measurement(args: argparse.Namespace, rows: list[Row], setting: str) -> None:
    """Write the measurement where --json asks for it."""
    if args.json:
        record = measurement(rows, setting, args.note)
        file = Path(args.json)
        if file.is_dir():
            if file.resolve() == results.FOLDER and getattr(args, "quick", False):
                sys.exit("--quick --json wants a FILE: its figures mean nothing")
            file = file / file_name(record, file)
        results.write(file, record)
        print(f"written to {file}", file=sys.stderr)


def measurement(rows: list[Row], setting: str, notes: list[str] = ()) -> dict:
    """The content of a results file, for the script that is running."""
    from harness.training.folder import git_commit

    return {
        "benchmark": Path(sys.argv[0]).stem, "command": command(sys.argv),
        "date": date.today().isoformat(), "machine": processor(), "versions": versions(),
        "commit": git_commit(), "setting": setting, "rows": [row.summary() for row in rows],
        "notes": list(notes),
    }  # fmt: skip


def command(argv: list[str]) -> str:
    """`python benchmarks/NAME.py …` without --json, --note and the folders of this machine."""
    omitted = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    json_flags(omitted)
    words = [f"benchmarks/{Path(argv[0]).name}"]
    for word in omitted.parse_known_args(argv[1:])[1]:
        flag, equals, value = word.rpartition("=")
        words.append(f"{flag}{equals}{without_folders(value)}")
    return f"python {shlex.join(words)}"


def shown(words: list[str]) -> str:
    """Flags and their values in a line, without the folders of this machine."""
    return shlex.join(without_folders(word) for word in words)


def without_folders(word: str) -> str:
    """The last name of a path on this machine; a path in the repository from its root."""
    path = Path(word).resolve()
    if not path.exists():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name or word


def file_name(record: dict, folder: Path) -> str:
    """benchmark-date-machine.json, with a number where that file exists. record: a measurement."""
    facts = record["machine"]
    maker = r"\(\w+\)|@.*|\b(amd|intel|nvidia|processor|cpu|core|\d+-core)\b"
    words = re.sub(maker, " ", (facts["gpu"] or facts["processor"]).lower())
    stem = "-".join([record["benchmark"], record["date"], *re.findall(r"[\w.]+", words)])
    names = [f"{stem}.json", *(f"{stem}-{k}.json" for k in range(2, 100))]
    return next(name for name in names if not (folder / name).exists())


def processor() -> dict:
    """The machine, as a results file names it."""
    from harness.launch import computes_bf16

    cpuinfo = Path("/proc/cpuinfo")
    model = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": model[1] if model else platform.processor(), "cores": cores,
        "bf16": computes_bf16(not torch.cuda.is_available()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def versions() -> dict:
    packages = {name: version(name) for name, module in PACKAGES.items() if module in sys.modules}
    return {"Python": platform.python_version(), **packages}


def machine() -> str:
    """The processor and the versions, in a line."""
    facts = processor()
    words = [f"{facts['processor']}, {facts['cores']} cores"]
    words += [facts["gpu"]] if facts["gpu"] else []
    words += [f"{name} {version(name)}" for name in ("torch", "torchvision", "accelerate")]
    return "; ".join([*words, f"Python {platform.python_version()}"])
