"""What malloc costs a training step on a CPU: page faults of freed and fetched activations.

    python benchmarks/malloc.py [--rounds 4] [--precision bf16]

Both sides train ResNet-18 on one synthetic batch of 128, each in a process of its own, in turn:
one as it is, one after `harness.launch.keep_freed_memory()`.
"""

import json
import resource
import subprocess
import sys
import time

import torch
from measure import Row, parser, read, report
from train_speed import BATCH, bare

from harness.launch import keep_freed_memory

STEPS = 8


def measure(precision, keep):
    """Images/s, page faults a step and peak memory of one process."""
    if keep:
        keep_freed_memory()
    step = bare(torch.device("cpu"), precision)
    for _ in range(2):
        step()
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(STEPS):
        step()
    taken, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "speed": STEPS * BATCH / taken,
        "faults": (usage.ru_minflt - faults) / STEPS,
        "memory": usage.ru_maxrss / 1024,
    }


def main():
    arg_parser = parser(__doc__, rounds=4)
    arg_parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    arg_parser.add_argument(
        "--side", choices=("as it is", "kept"), help="one side, as a round runs it"
    )
    args = read(arg_parser)
    if args.side:
        print(json.dumps(measure(args.precision, args.side == "kept")))
        return
    found = {"kept": [], "as it is": []}
    for _ in range(args.rounds):
        command = [sys.executable, __file__, "--precision", args.precision, "--side"]
        for side, measured in found.items():
            measured.append(json.loads(subprocess.check_output([*command, side])))
    pairs = list(zip(*found.values(), strict=True))
    rows = [
        Row(f"freed memory kept / as it is: {title}", [k[name] / p[name] for k, p in pairs])
        for name, title in (("speed", "images/s"), ("memory", "peak memory"))
    ]
    for side, measured in found.items():
        rows.append(Row(f"page faults a step, {side}", [m["faults"] for m in measured]))
    report(args, rows, f"ResNet-18, batch {BATCH}, {args.precision}")


if __name__ == "__main__":
    main()
