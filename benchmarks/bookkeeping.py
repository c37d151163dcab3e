"""What a run does beside its steps: digests of frozen parts, BatchNorm's averages over processes.

    python benchmarks/bookkeeping.py

ResNet-50, its head trained and the rest frozen. A stage of ten epochs: with a digest before it and
after each epoch, and with one before and one after it, as finetune.py has it. And its BatchNorm
statistics, averaged over the processes as one vector, written back a tensor at a time and in one
call.
"""

import torch
from measure import Row, over, parser, read, report, seconds_in_turns
from torchvision.models import resnet50

from harness.training.state import write_back
from tricks.freeze import freeze_except, frozen_digest

EPOCHS = 10


def main():
    arg_parser = parser(__doc__, rounds=15)
    args = read(arg_parser)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = resnet50(weights=None).to(device, memory_format=torch.channels_last)
    freeze_except(model, ["fc"])
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    buffers = [b for m in norms for b in (m.running_mean, m.running_var)]
    vector = torch.cat([b.flatten() for b in buffers])
    epochs, repeats = (1, 1) if args.quick else (EPOCHS, 100)

    def digests(number):
        return lambda: [frozen_digest(model) for _ in range(number)]

    def loop():
        for buffer, piece in zip(buffers, vector.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(piece.view_as(buffer))

    rounds = max(args.rounds // 3, 1)  # they take seconds
    digest = seconds_in_turns({"every": digests(epochs + 1), "once": digests(2)}, rounds)
    written = seconds_in_turns(
        {
            "loop": lambda: [loop() for _ in range(repeats)],
            "one call": lambda: [write_back(buffers, vector) for _ in range(repeats)],
        },
        args.rounds,
    )
    rows = [
        Row("frozen_digest of ResNet-50, ms", [500 * s for s in digest["once"]]),
        Row(
            f"digests of a stage of {epochs} epochs: every epoch / once a stage",
            over(digest["every"], digest["once"]), 1.0,
        ),
        Row(
            "BatchNorm statistics of ResNet-50 written back: a loop / one call",
            over(written["loop"], written["one call"]), 1.0,
        ),
        Row("BatchNorm statistics of ResNet-50 written back in one call, ms",
            [1000 * s / repeats for s in written["one call"]]),
    ]  # fmt: skip
    report(args, rows, f"{device.type}, {torch.get_num_threads()} threads, {len(buffers)} buffers")


if __name__ == "__main__":
    main()
