"""Where a training step's time goes on a CPU, and how much faster bf16 can be there.

    python benchmarks/where_time_goes.py    about a minute on two cores

First a profile of three steps of ResNet-18 at batch 128 in bf16, by operator; then each kind of
its convolutions, forward and backward, bf16 channels_last against fp32 NCHW: the ratio by which a
step that is mostly convolutions can gain, whatever the script around it does.
"""

import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from train_speed import BATCH, bare, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.launch import _keep_freed_memory

# channels in, channels out, pixels a side, kernel, stride
LAYERS = (
    (64, 64, 32, 3, 1), (64, 128, 32, 3, 2), (128, 128, 16, 3, 1), (128, 256, 16, 3, 2),
    (256, 256, 8, 3, 1), (256, 512, 8, 3, 2), (512, 512, 4, 3, 1),
)  # fmt: skip
REPEATS = 4


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


def main():
    _keep_freed_memory()
    print(machine())
    profile_steps()
    print("\n| convolution | bf16 channels_last, ms | fp32 NCHW, ms | ratio |\n|---|---|---|---|")
    for layer in LAYERS:
        ours = milliseconds(layer, torch.bfloat16, torch.channels_last)
        theirs = milliseconds(layer, torch.float32, torch.contiguous_format)
        name = "{}→{}, {} px, {}×{}/{}".format(*layer[:4], layer[3], layer[4])
        print(f"| {name} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |")


if __name__ == "__main__":
    main()
