"""What benchmarks do with processes and data sets: launch, watch, weigh, write images."""

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from measure import ROOT
from PIL import Image

PIXELS = 32
POLL_SECONDS = 0.005
WEIGH_SECONDS = 0.25  # reading it walks the page tables: tens of ms for a process of 2 GB


def environment(cache: str) -> dict[str, str]:
    """This process's, without what would steer a launcher, with a cache that is thrown away."""
    steering = ("ACCELERATE_", "OMP_NUM_THREADS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(steering)}
    return {**kept, "HF_DATASETS_CACHE": cache, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}


def by_accelerate(config: str | None = None) -> list[str]:
    """The words of `accelerate launch` on one process, or on those of a configuration."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config:
        return [*command, "--config_file", str(ROOT / "accelerate_configs" / config)]
    return [*command, "--num_processes", "1"]


def launch(flags: dict, output_dir: str, cache: str, launcher: list[str], weigh: bool = False):
    """train.py to its end, started by `launcher`.

    Returns {step: seconds from before the start to its line in metrics.jsonl}, its folder and,
    where asked for, what `Scale` saw. A step counts as done when its first line is in
    metrics.jsonl (see --logging_steps).
    """
    flags = {"output_dir": output_dir, "run_name": "run", "report_to": "none", **flags}
    words = [f"--{name}={value}" for name, value in flags.items()]
    command = [*launcher, str(ROOT / "train.py"), *words]
    folder, log = Path(output_dir) / "run", Path(output_dir) / "log"
    with open(log, "w") as out:
        start = time.time()
        process = subprocess.Popen(
            command, cwd=output_dir, env=environment(cache), stdout=out, stderr=subprocess.STDOUT
        )
        scale = Scale(process.pid) if weigh else None
        try:
            seconds = watch(folder / "metrics.jsonl", process, start)
        finally:
            process.terminate()  # nothing, unless this script is being stopped
            process.wait()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    return seconds, folder, scale


def watch(metrics: Path, process: subprocess.Popen, start: float) -> dict[int, float]:
    """{step: seconds from `start` to the first line of that step in `metrics`}."""
    seconds, size = {}, 0
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if not metrics.exists() or metrics.stat().st_size == size:
            continue
        written = metrics.read_bytes()
        stamp = metrics.stat().st_mtime  # after reading: never before the newest line read
        size = len(written)
        for line in written.splitlines(keepends=True):
            if line.endswith(b"\n"):
                seconds.setdefault(json.loads(line)["step"], stamp - start)
    return seconds


def steady_speed(flags: dict, cache: str, warmup: int, steps: int, launcher: list[str]):
    """Images/s of train.py's steps after the warm-up, and its summary.

    Timed from outside: with --logging_steps equal to the warm-up, train.py adds a line to
    metrics.jsonl after it and after the last step (before it evaluates); the time between the two
    is that of the file's own time stamps. Evaluation and checkpoints are outside of it.
    """
    flags = {
        **flags,
        "max_steps": warmup + steps,
        "logging_steps": warmup,
        "checkpointing_steps": 100_000,  # but the last step's
        "eval_epochs": 100_000,  # but the last step's
        "max_eval_samples": 128,
    }
    with tempfile.TemporaryDirectory() as output_dir:
        seconds, folder, _ = launch(flags, output_dir, cache, launcher)
        summary = json.loads((folder / "summary.json").read_text())
    taken = seconds[warmup + steps] - seconds[warmup]
    return steps * flags["batch_size"] / taken, summary


def run_json(command: list, cache: str, weigh: bool = False):
    """A process to its end; the JSON in its last line of output and, if asked for, a `Scale`."""
    command = [*map(str, command)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=environment(cache), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        scale = Scale(process.pid) if weigh else None
        try:
            output, _ = process.communicate()
        finally:
            process.terminate()
            process.wait()
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)}\n{errors.read()[-3000:]}")
    result = json.loads(output.splitlines()[-1])
    return (result, scale) if weigh else result


class Scale:
    """The peak memory of a process and all it starts, seen every quarter of a second (Linux).

    Counted is PSS: a page that n processes share, such as what forked loader workers inherit or
    the code of torch, counts as 1/n in each. `anonymous` is the part of it that no file is behind:
    a memory-mapped data set is not in it, and can be dropped by the system at any time.
    """

    def __init__(self, pid: int):
        self.pss = self.anonymous = 0
        self._process = psutil.Process(pid)
        threading.Thread(target=self._weigh, daemon=True).start()

    def _weigh(self):
        while True:
            pss = anonymous = 0
            try:
                family = [self._process, *self._process.children(recursive=True)]
                ended = self._process.status() == psutil.STATUS_ZOMBIE
            except psutil.Error:
                ended = True
            if ended:
                return
            for process in family:
                lines = _rollup(process.pid)
                pss += lines.get("Pss", 0)
                anonymous += lines.get("Pss_Anon", 0)
            self.pss, self.anonymous = max(self.pss, pss), max(self.anonymous, anonymous)
            time.sleep(WEIGH_SECONDS)


def _rollup(pid: int) -> dict[str, int]:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return {}
    pairs = [line.split() for line in text.splitlines()[1:]]
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in pairs}


# --- images ---


def smooth_noise(count: int, size: int = PIXELS) -> torch.Tensor:
    """uint8 (count, 3, size, size) that compress about as photographs do."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return (smooth * 255).byte()


def encode(pixels: torch.Tensor) -> list[dict]:
    """uint8 (N, 3, H, W) as PNG files, in the form of the cells of a `datasets` image column."""
    encoded = []
    for image in pixels.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", compress_level=1)
        encoded.append({"bytes": file.getvalue(), "path": None})
    return encoded


def write_folder(folder: str, splits: dict[str, tuple]) -> None:
    """{"train": (uint8 (N, 3, H, W) or encoded cells, labels 0..9)} as parquet, as on the Hub."""
    import datasets  # late, as in harness: HF_DATASETS_CACHE is read when it is imported

    Path(folder).mkdir(parents=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    for split, (images, labels) in splits.items():
        encoded = encode(images) if isinstance(images, torch.Tensor) else images
        rows = {"image": encoded, "label": [int(label) for label in labels]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(f"{folder}/{split}-00000-of-00001.parquet")


def folder_of(data: str, temporary: str, count: int = 10_000) -> tuple[str, str]:
    """The folder of images to use and a word for it: `data`, or `count` images of noise."""
    if data:
        return str(Path(data).resolve()), data
    noise, folder = smooth_noise(count), f"{temporary}/noise"
    labels = torch.arange(count) % 10
    write_folder(folder, {"train": (noise, labels), "test": (noise[:512], labels[:512])})
    return folder, "smooth noise"


def first_images(data: str, count: int, size: int = PIXELS) -> list[Image.Image]:
    """`count` RGB images of one size: the first ones of a folder's train split, or noise."""
    if not data:
        noise = smooth_noise(count, size).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(array) for array in noise]
    import pyarrow.parquet as pq

    table = pq.read_table(sorted(Path(data).rglob("train*.parquet"))[0]).slice(0, count)
    column = next(field.name for field in table.schema if "bytes" in str(field.type))
    rows = table[column].to_pylist()
    return [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in rows]
