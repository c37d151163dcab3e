"""Small functions of every step and report against their peers: soft cross-entropy and ECE.

    python benchmarks/losses.py

The soft cross-entropy, forward and backward, against torch's F.cross_entropy on the same soft
targets: one kernel, so what is measured is the cost of our checks. The expected calibration error
against torchmetrics', with its checks of arguments, as it is by default; both return a number.
"""

import torch
import torch.nn.functional as F
from measure import Row, over, parser, read, report, seconds_in_turns
from torchmetrics.functional.classification import multiclass_calibration_error

from tricks.calibration import expected_calibration_error
from tricks.label_smoothing import soft_cross_entropy

BINS = 15


def loss_sides(samples, classes, repeats):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, classes, generator=generator).requires_grad_()
    targets = torch.rand(samples, classes, generator=generator).softmax(1)

    def times(loss):
        return lambda: [torch.autograd.grad(loss(logits, targets), logits) for _ in range(repeats)]

    return {"ours": times(soft_cross_entropy), "peer": times(F.cross_entropy)}


def ece_sides(samples, classes, repeats):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(samples, classes, generator=generator).mul(3).softmax(1)
    labels = torch.randint(classes, (samples,), generator=generator)

    def ours():
        for _ in range(repeats):
            expected_calibration_error(probabilities, labels, BINS)

    def peer():
        for _ in range(repeats):
            multiclass_calibration_error(probabilities, labels, classes, BINS).item()

    return {"ours": ours, "peer": peer}


CASES = [
    ("soft cross-entropy of 128 × 10: ours / F.cross_entropy", loss_sides, 128, 10, 200),
    ("soft cross-entropy of 256 × 1,000: ours / F.cross_entropy", loss_sides, 256, 1000, 20),
    ("ECE of 10,000 × 10: ours / torchmetrics", ece_sides, 10_000, 10, 20),
    ("ECE of 10,000 × 100: ours / torchmetrics", ece_sides, 10_000, 100, 5),
]


def main():
    args = read(parser(__doc__, rounds=15))
    rows = []
    for figure, sides, samples, classes, repeats in CASES:
        repeats = 1 if args.quick else repeats
        taken = seconds_in_turns(sides(samples, classes, repeats), args.rounds)
        # 0.95: the checks of shapes are a few microseconds of 150
        wanted = 0.95 if sides is loss_sides else 1.0
        rows.append(Row(figure, over(taken["peer"], taken["ours"]), wanted))
    report(args, rows, f"CPU, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
