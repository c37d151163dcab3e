"""What malloc costs a training step on a CPU: page faults of freed and fetched activations.

    python benchmarks/malloc.py [--rounds 4] [--precision bf16]

Both sides train ResNet-18 on one synthetic batch of 128, each in a process of its own, in turn:
one as it is, one after `harness.launch._keep_freed_memory()`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from train_speed import BATCH, bare, machine, spread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.launch import _keep_freed_memory

STEPS = 8


def measure(precision, keep):
    """Images/s, page faults a step and peak memory of one process."""
    if keep:
        _keep_freed_memory()
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--side", choices=("as it is", "kept"), help="one side, as a round runs it")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.precision, args.side == "kept")))
        return
    rounds = []
    for _ in range(args.rounds):
        command = [sys.executable, __file__, "--precision", args.precision, "--side"]
        rounds.append(
            [json.loads(subprocess.check_output([*command, s])) for s in ("kept", "as it is")]
        )
    print(f"{machine()}; {args.precision}")
    print("\n| figure | kept / as it is, median (min–max) | n |\n|---|---|---|")
    for name, title in (("speed", "images/s"), ("memory", "peak memory")):
        print(f"| {title} | {spread([k[name] / p[name] for k, p in rounds], 2)} |")
    for side, title in enumerate(("kept", "as it is")):
        print(f"| page faults a step, {title} | {spread([r[side]['faults'] for r in rounds], 0)} |")


if __name__ == "__main__":
    main()
