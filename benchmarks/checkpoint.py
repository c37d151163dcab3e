"""A checkpoint: what writing it takes, and what training loses by it, against accelerate's.

    python benchmarks/checkpoint.py

State of ResNet-18 with SGD's momentum and averaged weights, after a step. Ours is hashed, written
beside its final name, synced and renamed, the third last is pruned, and all of it is waited for;
the peer is `accelerator.save_state` of the same (averaged weights registered), which does none of
that. Then train.py itself, in this process, on small batches: how long `Run` holds the loop at a
checkpoint, and by how much the steps between two checkpoints take longer than as many undisturbed
ones (the median step of the half before a checkpoint), which counts a writer that takes a core
from the steps. Both are given as shares of `save_state`'s median time in this run.
"""

import contextlib
import io
import os
import shutil
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from measure import Row, over, parser, read, report, seconds_in_turns
from processes import smooth_noise, write_folder

import train
from harness.models.build import build_model
from harness.training.checkpoint import CheckpointWriter
from harness.training.run import Run
from harness.training.state import gather_tensors
from tricks.ema import ModelEma


class Registered:
    """Averaged weights as `register_for_checkpointing` wants them."""

    def __init__(self, ema):
        self.state_dict, self.load_state_dict = ema.state_dict, ema.load_state_dict


def write_in_turns(folder, rounds):
    """Seconds of writing by each side."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = build_model("resnet18", 10, image_size=32)
    model.to(accelerator.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = ModelEma(accelerator.unwrap_model(model), 0.999)
    accelerator.register_for_checkpointing(Registered(ema))
    model(torch.randn(2, 3, 32, 32, device=accelerator.device)).sum().backward()
    optimizer.step()
    count, writer = iter(range(1, 1000)), CheckpointWriter()  # one, as a run has
    peers = []

    def ours():
        tensors = gather_tensors(accelerator.unwrap_model(model), optimizer.optimizer, ema)
        writer.start(folder / "ours", next(count), tensors, {"step": 1}, keep=2)
        writer.wait()

    def peer():
        peers.append(folder / "peer" / str(next(count)))
        accelerator.save_state(str(peers[-1]))

    def after():
        while len(peers) > 2:
            shutil.rmtree(peers.pop(0))
        os.sync()  # what the peer left to the system does not fall to the next side

    taken = seconds_in_turns({"ours": ours, "save_state": peer}, rounds, after)
    size = sum(file.stat().st_size for file in peers[-1].rglob("*"))
    accelerator.free_memory()
    return taken, size


def stalls(folder, saves, every, batch):
    """[(seconds that Run holds the loop, seconds lost over the interval)] of each checkpoint."""
    holds, steps, saved = [], [], []
    checkpoint, agree = Run._checkpoint, Run.sync_step

    def timed(run, *args, **kwargs):
        start = time.perf_counter()
        checkpoint(run, *args, **kwargs)
        holds.append(time.perf_counter() - start)
        saved.append(len(steps))

    def stamped(run, *args):
        agree(run, *args)
        steps.append(time.perf_counter())

    noise, labels = smooth_noise(512), torch.arange(512) % 10
    write_folder(f"{folder}/noise", {"train": (noise, labels)})
    words = [
        f"--dataset={folder}/noise", f"--batch_size={batch}", f"--checkpointing_steps={every}",
        f"--max_steps={(saves + 1) * every}", f"--output_dir={folder}", "--run_name=run",
        "--report_to=none", "--eval_epochs=100000",
    ]  # fmt: skip
    Run._checkpoint, Run.sync_step = timed, stamped
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(train.read_flags(words))
    finally:
        Run._checkpoint, Run.sync_step = checkpoint, agree
    found = []
    for place, hold in zip(saved[:-1], holds[:-1], strict=True):  # the last one ends the run
        marks = steps[place - 1 : place + every]
        durations = [b - a for a, b in pairwise(marks)]
        quiet = statistics.median(durations[every // 2 :])
        found.append((hold, sum(durations) - len(durations) * quiet))
    return found


def main():
    arg_parser = parser(__doc__, rounds=9)
    arg_parser.add_argument("--every", type=int, default=30, help="steps between checkpoints")
    arg_parser.add_argument("--batch", type=int, default=16, help="images a step")
    args = read(arg_parser)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_DATASETS_CACHE"] = f"{temporary}/cache"
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        taken, size = write_in_turns(Path(temporary), args.rounds)
        every, batch = (6, 2) if args.quick else (args.every, args.batch)
        found = stalls(temporary, args.rounds + 1, every, batch)[1:]  # the first warms up
    usual = statistics.median(taken["save_state"])
    rows = [
        Row("a checkpoint, synced and hashed / save_state",
            over(taken["ours"], taken["save_state"]), 1.3, at_most=True),
        Row("a checkpoint holds training for, of save_state's time",
            [hold / usual for hold, _ in found], 0.3, at_most=True),
        Row("steps lost to a checkpoint, of save_state's time",
            [lost / usual for _, lost in found]),
        Row("save_state, s", taken["save_state"]),
    ]  # fmt: skip
    report(args, rows, f"ResNet-18, momentum, EMA: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
