"""What the tricks and the house cost: train.py against a bare loop, timm and the usual script.

    python benchmarks/train_speed.py            minutes on two quiet cores
    python benchmarks/train_speed.py --quick    does it run? its figures mean nothing
    python benchmarks/train_speed.py --peers bare timm-best

- ours: `accelerate launch train.py` with its defaults, everything on.
- bare: the same model on ONE synthetic batch that lies on the device, in the precision and with the
  threads that ours reported, channels_last, SGD; no data, augmentation, EMA, clipping or logging.
- timm-best, timm-defaults: timm's loader, Mixup and ModelEmaV3 (timm_script.py), in the precision
  and with the threads of ours and two workers; or as timm's own script has them.
- plain: the usual script (plain_script.py): PIL transforms in a DataLoader, fp32, NCHW.

A round runs them one after the other, each as a process of its own, so that a busy machine slows
all of them: quote the ratios. Only steady steps are timed: --steps of them, after --warmup. The
images of all are decoded beforehand.

Then the peak memory of train.py and of the usual script, each to its end without a launcher:
PSS of the process and its workers (see processes.Scale), which is fair to forked workers, and of
it what no file is behind. Ours evaluates and writes a checkpoint in that time, the script does not.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Row, data_flag, over, parser, read, report
from processes import (
    PIXELS,
    by_accelerate,
    folder_of,
    launch,
    run_json,
    steady_speed,
)

from harness.models.build import build_model

HERE = Path(__file__).resolve().parent
BATCH = 128
PEERS = {  # what is wanted of ours / theirs
    "bare": ("bare loop", 0.95),
    "timm-best": ("timm's parts, best settings", 1.05),
    "timm-defaults": ("timm's parts, defaults", 2.3),
    "plain": ("usual script", 2.3),
}


def parse_args():
    on_gpu = torch.accelerator.is_available()
    arg_parser = parser(__doc__, rounds=3)
    data_flag(arg_parser)
    arg_parser.add_argument(
        "--steps", type=int, default=500 if on_gpu else 16, help="timed, of each"
    )
    arg_parser.add_argument(
        "--warmup", type=int, default=50 if on_gpu else 3, help="steps before them"
    )
    arg_parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    arg_parser.add_argument("--memory_rounds", type=int, default=2, help="0: not weighed")
    arg_parser.add_argument(
        "--workers", type=int, default=8 if on_gpu else 2, help="of timm's best"
    )
    inside = arg_parser.add_argument_group("the bare loop alone, as a round runs it")
    inside.add_argument("--bare", action="store_true", help="print its images/s as JSON")
    inside.add_argument("--precision", choices=("no", "bf16"), default="no")
    inside.add_argument("--threads", type=int, help="unset: torch's own choice")
    args = read(arg_parser)
    if args.quick:
        args.steps, args.warmup, args.memory_rounds = 2, 1, min(args.memory_rounds, 1)
    return args


def run_bare(args) -> dict:
    """The images/s of the bare loop in this process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    step = bare(device, args.precision)

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


def write_arrays(data: str, cache: str, folder: str) -> list[str]:
    """The decoded train images as arrays for the peers; the flags that name them."""
    code = """
import sys, numpy as np
from harness.data.sources import load_data
from harness.data.cache import decode_split
data = load_data(sys.argv[1])
pixels = decode_split(data.train.dataset, data.image_column, 32, name="train", progress=False)
np.save(sys.argv[2] + "/pixels.npy", np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy()))
np.save(sys.argv[2] + "/labels.npy", data.train.labels)
print("{}")
"""
    root = [f"import sys; sys.path.insert(0, {str(HERE.parent)!r})", code]
    run_json([sys.executable, "-c", "\n".join(root), data, folder], cache)
    return ["--pixels", f"{folder}/pixels.npy", "--labels", f"{folder}/labels.npy"]


def peer_command(args, peer: str, arrays: list[str], like: dict) -> list:
    """The command of a peer, in the precision and with the threads of ours."""
    steps = ["--steps", args.steps, "--warmup", args.warmup]
    same = ["--precision", like["precision"], "--threads", like["threads"]]
    if peer == "bare":
        return [sys.executable, __file__, "--bare", *steps, *same]
    if peer == "plain":
        return [sys.executable, HERE / "plain_script.py", *arrays, *steps]
    settings = ["--settings", peer.removeprefix("timm-"), "--workers", args.workers]
    return [sys.executable, HERE / "timm_script.py", *arrays, *steps, *settings, *same]


def weigh(args, data: str, cache: str, arrays: list[str]) -> list[Row]:
    """Peak memory of train.py over that of the usual script."""
    kinds = {"pss": [], "anonymous": []}
    ours_mib = []
    for _ in range(args.memory_rounds):
        flags = {"dataset": data, "batch_size": BATCH, "max_steps": args.warmup + 3,
                 "max_eval_samples": 1000}  # fmt: skip
        with tempfile.TemporaryDirectory() as output:
            *_, ours = launch(flags, output, cache, [sys.executable], weigh=True)
        command = [sys.executable, HERE / "plain_script.py", *arrays, "--steps", args.warmup + 3]
        _, theirs = run_json(command, cache, weigh=True)
        for kind, ratios in kinds.items():
            ratios.append(getattr(ours, kind) / getattr(theirs, kind))
        ours_mib.append(ours.pss / 2**20)
    return [
        Row("peak memory (PSS): train.py / usual script", kinds["pss"], 1.0, at_most=True),
        Row("peak memory without files: train.py / usual script", kinds["anonymous"]),
        Row("peak memory of train.py, MiB", ours_mib),
    ]


def main() -> None:
    args = parse_args()
    if args.bare:
        print(json.dumps(run_bare(args)))
        return
    rates = {"ours": [], **{peer: [] for peer in args.peers}}
    with tempfile.TemporaryDirectory() as folder:
        data, words = folder_of(args.data, folder)
        cache = os.environ.get("HF_DATASETS_CACHE", f"{folder}/cache")
        arrays = write_arrays(data, cache, folder)
        flags = {"dataset": data, "batch_size": BATCH}
        for done in range(args.rounds if args.peers else 0):
            speed, summary = steady_speed(flags, cache, args.warmup, args.steps, by_accelerate())
            rates["ours"].append(speed)
            for peer in args.peers:
                theirs = run_json(peer_command(args, peer, arrays, summary), cache)
                rates[peer].append(theirs["images_per_second"])
            latest = ", ".join(f"{name} {values[-1]:,.1f}" for name, values in rates.items())
            print(f"round {done + 1}: {latest} images/s", file=sys.stderr, flush=True)
        rows = []
        for peer in args.peers:
            figure, wanted = PEERS[peer]
            rows.append(Row(f"train.py / {figure}", over(rates["ours"], rates[peer]), wanted))
        if args.peers:
            rows.append(Row("train.py, images/s", rates["ours"]))
        if args.memory_rounds:
            rows += weigh(args, data, cache, arrays)
    setting = f"ResNet-18 (small stem), batch {BATCH}, {args.steps} steps after {args.warmup}"
    if args.peers:
        setting += f"; ours, bare and timm's best: {summary['precision']}, "
        setting += f"{summary['threads']} threads"
    report(args, rows, f"{setting}; images: {words}")


if __name__ == "__main__":
    main()
