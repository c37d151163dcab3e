"""Where a training step's time goes: by phase of train.py, by operator, and what bf16 can gain.

    python benchmarks/where_time_goes.py              a minute or two on two cores; on a GPU too
    python benchmarks/where_time_goes.py --phases --batch 512

First train.py itself runs in this process, with clocks around what a step calls: gather (and move),
draw, augment, mix, forward, loss and backward, clip, check and log (`Run`), optimizer, EMA. On a
GPU the device is waited for before and after every phase, so the sum is more than an undisturbed
step, which overlaps them; what a thread does ahead of the loop is marked so, and is not in the sum.

Then, on a CPU, a profile of three steps of ResNet-18 at batch 128 in bf16, by operator; and each
kind of its convolutions, forward and backward, bf16 channels_last against fp32 NCHW: the ratio by
which a step that is mostly convolutions can gain, whatever the script around it does.
"""

import contextlib
import io
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict

import accelerate.optimizer
import torch
from accelerate import Accelerator
from measure import Row, data_flag, parser, read, report, synchronize
from processes import folder_of
from torch.profiler import ProfilerActivity, profile
from train_speed import BATCH, bare

import harness.data.batches
import train
from harness.launch import keep_freed_memory
from harness.training.run import Run
from tricks.ema import ModelEma

# channels in, channels out, pixels a side, kernel, stride
LAYERS = (
    (64, 64, 32, 3, 1), (64, 128, 32, 3, 2), (128, 128, 16, 3, 1), (128, 256, 16, 3, 2),
    (256, 256, 8, 3, 1), (256, 512, 8, 3, 2), (512, 512, 4, 3, 1),
)  # fmt: skip
REPEATS = 4

# phase: (where it is called, the name of the call)
PHASES = {
    "gather": (harness.data.stores.Samples, "take"),
    "draw": (harness.data.batches.Views, "draw"),
    "augment": (harness.data.batches.Views, "train"),
    "backward": (Accelerator, "backward"),
    "clip": (Accelerator, "clip_grad_norm_"),
    "optimizer": (accelerate.optimizer.AcceleratedOptimizer, "step"),
    "EMA": (ModelEma, "update"),
    "check (Run.count, sync_step)": (Run, "sync_step"),
    "log (Run._after_step)": (Run, "_after_step"),
}


class Clocks:
    """Seconds of each phase in each step, once they are put around the calls of train.py."""

    def __init__(self):
        self.steps = [defaultdict(float)]  # the first before the first step
        self.began = []
        self._main = threading.get_ident()

    def around(self, phase, call):
        def timed(*args, **kwargs):
            ahead = threading.get_ident() != self._main
            name = f"{phase}, in a thread ahead" if ahead else phase
            if not ahead:
                synchronize()
            start = time.perf_counter()
            result = call(*args, **kwargs)
            if not ahead:
                synchronize()
            self.steps[-1][name] += time.perf_counter() - start
            return result

        return timed

    def step(self, call):
        def stamped(*args, **kwargs):  # called once at the start of every step
            synchronize()
            self.began.append(time.perf_counter())
            self.steps.append(defaultdict(float))
            return call(*args, **kwargs)

        return stamped


def phases(data, batch, steps):
    """[{phase: seconds}] of train.py's steps, and what is not in any phase as "the rest"."""
    clocks, saved = Clocks(), []

    def replace(owner, name, new):
        saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    for phase, (owner, name) in PHASES.items():
        replace(owner, name, clocks.around(phase, getattr(owner, name)))
    replace(Run, "count", clocks.around("check (Run.count, sync_step)", Run.count))
    draw, build = train.draw_mixing, train.build.build_model

    def draw_mixing(*args):
        return clocks.around("mix", clocks.around("mix", draw)(*args))

    def build_model(*args, **kwargs):
        model = build(*args, **kwargs)
        model.forward = clocks.around("forward", model.forward)
        return model

    replace(train, "draw_mixing", draw_mixing)
    replace(train.build, "build_model", build_model)
    # The rate is set once, before everything else that a step does
    replace(train, "set_lr", clocks.step(train.set_lr))
    with tempfile.TemporaryDirectory() as output:
        words = [f"--dataset={data}", f"--output_dir={output}", f"--batch_size={batch}",
                 f"--max_steps={steps}", "--eval_epochs=100000", "--max_eval_samples=64",
                 "--checkpointing_steps=100000", "--report_to=none"]  # fmt: skip
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                train.main(train.read_flags(words))
        finally:
            for owner, name, old in reversed(saved):
                setattr(owner, name, old)
    # A step's entry ends with the next batch, gathered and drawn at the end of the loop's turn.
    # The first steps warm up, the last one evaluates and writes.
    found = []
    for k in range(min(3, steps - 2), steps - 1):
        whole = clocks.began[k + 1] - clocks.began[k]
        parts = dict(clocks.steps[k + 1])
        inside = sum(s for name, s in parts.items() if "ahead" not in name)
        found.append({**parts, "the rest": whole - inside, "step": whole})
    return found


def print_phases(found):
    names = list(dict.fromkeys(name for step in found for name in step))
    whole = statistics.median(step["step"] for step in found)
    print(f"\n| phase | ms (median of {len(found)} steps) | share |\n|---|---|---|")
    for name in names:
        middle = statistics.median(step.get(name, 0.0) for step in found)
        print(f"| {name} | {1000 * middle:.2f} | {middle / whole:.1%} |")


def profile_steps():
    step = bare(torch.device("cpu"), "bf16")
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            step()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    print("\n| operator | share of three steps |\n|---|---|")
    for event in events[:8]:
        print(f"| {event.key} | {event.self_cpu_time_total / total:.1%} |")


def milliseconds(layer, dtype, memory_format):
    """The shortest forward plus backward of one convolution."""
    inputs, outputs, side, kernel, stride = layer
    conv = torch.nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    conv = conv.to(dtype=dtype, memory_format=memory_format)
    images = torch.randn(BATCH, inputs, side, side, dtype=dtype)
    images = images.to(memory_format=memory_format).requires_grad_()
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        out = conv(images)
        out.backward(torch.ones_like(out))
        taken.append(time.perf_counter() - start)
    return 1000 * min(taken)


def operators():
    """Print what the operators take of a step; returns a row a kind of convolution."""
    keep_freed_memory()
    profile_steps()
    rows = []
    for layer in LAYERS:
        ours = milliseconds(layer, torch.bfloat16, torch.channels_last)
        theirs = milliseconds(layer, torch.float32, torch.contiguous_format)
        name = "convolution {}→{}, {} px, {}×{}/{}".format(*layer[:4], layer[3], layer[4])
        rows.append(Row(f"{name}: fp32 NCHW / bf16 channels_last", [theirs / ours]))
        rows.append(Row(f"{name}: bf16 channels_last, ms", [ours]))
    return rows


def main():
    arg_parser = parser(__doc__, rounds=1)
    data_flag(arg_parser)
    arg_parser.add_argument("--phases", action="store_true", help="the phases only")
    arg_parser.add_argument("--batch", type=int, default=BATCH)
    arg_parser.add_argument("--steps", type=int, help="of train.py; unset: 15, with a GPU 100")
    args = read(arg_parser)
    on_gpu = torch.cuda.is_available()
    steps = 4 if args.quick else args.steps or (100 if on_gpu else 15)
    batch = 16 if args.quick else args.batch
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("HF_DATASETS_CACHE", f"{temporary}/cache")
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        data, words = folder_of(args.data, temporary, count=max(2000, 2 * batch))
        found = phases(data, batch, steps)
    share = [
        sum(step.get(name, 0.0) for name in ("forward", "backward")) / step["step"]
        for step in found
    ]  # fmt: skip
    rows = [Row("forward and backward, share of a step of train.py", share)]
    print_phases(found)
    if not (args.phases or args.quick or on_gpu):
        rows += operators()
    report(args, rows, f"ResNet-18, batch {batch}, {words}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
