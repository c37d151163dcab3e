"""What the tricks and the house cost: train.py against a bare loop and against the usual script.

    python benchmarks/train_speed.py            about 12 minutes on two quiet cores
    python benchmarks/train_speed.py --quick    does it run? its figures mean nothing

- ours: `accelerate launch train.py` with its defaults, everything on.
- bare: the same model on ONE synthetic batch that lies on the device, in the precision and with the
  threads that ours reported, channels_last, SGD; no data, augmentation, EMA, clipping or logging.
- plain: the usual script: PIL transforms in a DataLoader, fp32, NCHW, mixup, label smoothing,
  clipping, an EMA loop over state_dict. Its images are decoded beforehand, as ours are.

A round runs the three one after the other, each as a process of its own, so that a busy machine
slows all of them: quote the ratios. Only steady steps are timed: --steps of them, after --warmup.
Ours is timed from outside: with --logging_steps equal to --warmup, train.py adds a line to
metrics.jsonl after the warm-up and after the last step (before it evaluates), and the time between
the two is that of the file's own time stamps. Evaluation and checkpoints are outside of it.
"""

import argparse
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.data import load_data
from harness.models import build_model
from harness.pixels import decode_split

ROOT = Path(__file__).resolve().parents[1]
BATCH, PIXELS = 128, 32
PEERS = {"bare": "train.py / bare loop", "plain": "train.py / usual script"}
POLL_SECONDS = 0.005


def parse_args() -> argparse.Namespace:
    on_gpu = torch.accelerator.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="folder of images; unset: smooth noise")
    parser.add_argument("--rounds", type=int, default=5, help="times that all three are run")
    parser.add_argument("--steps", type=int, default=500 if on_gpu else 30, help="timed, of each")
    parser.add_argument("--warmup", type=int, default=50 if on_gpu else 5, help="steps before them")
    parser.add_argument("--quick", action="store_true", help="one round of 2 steps: a smoke test")
    inside = parser.add_argument_group("one peer alone, as a round runs it")
    inside.add_argument("--peer", choices=PEERS, help="print its images/s as JSON")
    inside.add_argument("--precision", choices=("no", "bf16"), default="no", help="of bare")
    inside.add_argument("--threads", type=int, help="of bare; unset: torch's own choice")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps, args.warmup = 1, 2, 1
    return args


# --- ours ---


def environment(cache: str) -> dict[str, str]:
    """This process's, without what would steer a launcher, with a cache that is thrown away."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "OMP_"))}
    return {**kept, "HF_DATASETS_CACHE": cache, "WANDB_MODE": "offline"}


def launch(flags: dict, output_dir: str, cache: str, config: str | None = None):
    """`accelerate launch train.py` to its end: {step: seconds since the start}, its folder.

    A step counts as done when its first line is in metrics.jsonl (see --logging_steps).
    """
    flags = {"output_dir": output_dir, "run_name": "run", **flags}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    if config:
        command += ["--config_file", str(ROOT / "accelerate_configs" / config)]
    command += [str(ROOT / "train.py"), *(f"--{name}={value}" for name, value in flags.items())]
    folder, log = Path(output_dir) / "run", Path(output_dir) / "log"
    with open(log, "w") as out:
        start = time.time()
        process = subprocess.Popen(
            command, cwd=output_dir, env=environment(cache), stdout=out, stderr=subprocess.STDOUT
        )
        try:
            seconds = watch(folder / "metrics.jsonl", process, start)
        finally:
            process.terminate()  # nothing, unless this script is being stopped
            process.wait()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    return seconds, folder


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


def run_ours(args: argparse.Namespace, data: str, cache: str) -> dict:
    flags = {
        "dataset": data,
        "batch_size": BATCH,
        "max_steps": args.warmup + args.steps,
        "logging_steps": args.warmup,
        "checkpointing_steps": 100_000,  # but the last step's
        "eval_epochs": 100_000,  # but the last step's
        "max_eval_samples": 128,
        "report_to": "none",
    }
    with tempfile.TemporaryDirectory() as output_dir:
        seconds, folder = launch(flags, output_dir, cache)
        summary = json.loads((folder / "summary.json").read_text())
    taken = seconds[args.warmup + args.steps] - seconds[args.warmup]
    return {
        "images_per_second": args.steps * BATCH / taken,
        "precision": summary["precision"],
        "threads": summary["threads"],
    }


# --- the peers ---


def run_peer(args: argparse.Namespace) -> dict:
    """The images/s of one peer in this process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    make = {"bare": partial(bare, precision=args.precision), "plain": partial(plain, args.data)}
    step = make[args.peer](device)

    def run(steps):
        for _ in range(steps):
            step()
        if device.type != "cpu":
            torch.accelerator.synchronize()

    run(args.warmup)
    start = time.perf_counter()
    run(args.steps)
    return {"images_per_second": args.steps * BATCH / (time.perf_counter() - start)}


def bare(device: torch.device, precision: str):
    """A function that makes a step on one synthetic batch."""
    torch.backends.cudnn.benchmark = True  # these two as train.py has them
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = build_model("resnet18", 10, image_size=PIXELS)
    model.to(device, memory_format=torch.channels_last)
    fused = device.type == "cuda"
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True, fused=fused
    )
    images = torch.randn(BATCH, 3, PIXELS, PIXELS, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH, device=device) % 10

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Pictures(Dataset):
    """Decoded images in memory, handed out as PIL images, as torchvision's CIFAR10 does."""

    def __init__(self, folder, transform):
        data = load_data(folder)
        pixels = decode_split(data.train.dataset, data.image_column, PIXELS, name="train")
        self.pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.transform = data.train.labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def plain(folder: str, device: torch.device):
    """A function that makes a step of the usual script."""
    torch.manual_seed(0)
    steps = [transforms.RandomCrop(PIXELS, padding=4), transforms.RandomHorizontalFlip()]
    steps += [transforms.RandAugment(), transforms.ToTensor()]
    steps += [transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))]
    pictures = Pictures(folder, transforms.Compose([*steps, transforms.RandomErasing(0.25)]))
    loader = DataLoader(
        pictures, BATCH, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    model = build_model("resnet18", 10, image_size=PIXELS).to(device)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)

    def endless():
        while True:
            yield from loader

    batches = endless()
    mixup = torch.distributions.Beta(0.2, 0.2)

    def step():
        images, labels = (part.to(device, non_blocking=True) for part in next(batches))
        lam, order = mixup.sample().item(), torch.randperm(BATCH, device=device)
        logits = model(lam * images + (1 - lam) * images[order])
        loss = lam * criterion(logits, labels) + (1 - lam) * criterion(logits, labels[order])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    average[name].mul_(0.9999).add_(value, alpha=0.0001)
                else:
                    average[name].copy_(value)

    return step


def launch_peer(args: argparse.Namespace, peer: str, data: str, cache: str, like: dict) -> dict:
    """`run_peer` in a process of its own, bare with the precision and threads of ours."""
    command = [sys.executable, __file__, "--peer", peer, "--data", data]
    command += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
    if peer == "bare":
        command += ["--precision", like["precision"], "--threads", str(like["threads"])]
    done = subprocess.run(command, env=environment(cache), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- data, words ---


def smooth_noise(count: int) -> torch.Tensor:
    """uint8 (count, 3, 32, 32) that compress about as photographs do."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, size=PIXELS, mode="bicubic").clamp(0, 1)
    return (smooth * 255).byte()


def write_folder(folder: str, splits: dict[str, tuple]) -> None:
    """{"train": (uint8 (N, 3, H, W), labels 0..9)} as PNG in parquet, in the Hub's layout."""
    import datasets  # late, as in harness: HF_DATASETS_CACHE is read when it is imported

    Path(folder).mkdir(parents=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    for split, (pixels, labels) in splits.items():
        encoded = []
        for image in pixels.permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            encoded.append({"bytes": file.getvalue(), "path": None})
        rows = {"image": encoded, "label": [int(label) for label in labels]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(f"{folder}/{split}-00000-of-00001.parquet")


def spread(values: list[float], digits: int) -> str:
    """`median (min–max) | n`, two cells of a table."""
    low, middle, high = (
        f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low}–{high}) | {len(values)}"


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


def main() -> None:
    args = parse_args()
    if args.peer:
        print(json.dumps(run_peer(args)))
        return
    rates = {"ours": [], **{peer: [] for peer in PEERS}}
    with tempfile.TemporaryDirectory() as folder:
        data, images = str(Path(args.data).resolve()), args.data
        if not args.data:
            data, images = f"{folder}/noise", "smooth noise"
            noise = smooth_noise(10_000)
            labels = torch.arange(len(noise)) % 10
            write_folder(data, {"train": (noise, labels), "test": (noise[:512], labels[:512])})
        cache = f"{folder}/cache"
        for done in range(args.rounds):
            ours = run_ours(args, data, cache)
            rates["ours"].append(ours["images_per_second"])
            for peer in PEERS:
                theirs = launch_peer(args, peer, data, cache, like=ours)
                rates[peer].append(theirs["images_per_second"])
            latest = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in rates.items())
            print(f"round {done + 1}: {latest} images/s", file=sys.stderr, flush=True)

    print(f"{machine()}; images: {images}")
    print(f"ours and bare: {ours['precision']}, {ours['threads']} threads; plain: fp32")
    print(f"ResNet-18 (small stem), batch {BATCH}, {args.steps} steps after {args.warmup}\n")
    print("| figure | ours, images/s | peer, images/s | ratio (min–max) | n |")
    print("|---|---|---|---|---|")
    for peer, figure in PEERS.items():
        ratios = [a / b for a, b in zip(rates["ours"], rates[peer], strict=True)]
        print(
            f"| {figure} | {statistics.median(rates['ours']):,.0f} "
            f"| {statistics.median(rates[peer]):,.0f} | {spread(ratios, digits=2)} |"
        )


if __name__ == "__main__":
    main()
