"""mixup and CutMix on a batch: ours against torchvision's v2 MixUp and CutMix in collate.

    python benchmarks/mix.py

Both start from the samples of a batch, float images of 3×32×32 and labels, and end in mixed images
and soft targets; steps alternate between mixup and CutMix. The peer is torchvision's documented
way: `RandomChoice([CutMix, MixUp])` on what `default_collate` makes of a list of samples. Ours is
what train.py does: gather the rows of one tensor, `draw_mixing`, mix. The second row is the mixing
alone, of a batch that is already together on both sides. As in train.py, malloc keeps what a step
frees, for both sides.
"""

import torch
import torch.nn.functional as F
from measure import Row, over, parser, read, report, seconds_in_turns
from torch.utils.data import default_collate
from torchvision.transforms import v2

from harness.data.batches import Mixing, draw_mixing
from harness.launch import keep_freed_memory

CLASSES, PIXELS, ALPHA = 10, 32, 1.0


def main():
    arg_parser = parser(__doc__, rounds=15)
    arg_parser.add_argument("--batch", type=int, default=128)
    arg_parser.add_argument("--steps", type=int, default=20, help="a side and round")
    args = read(arg_parser)
    keep_freed_memory()
    steps = 2 if args.quick else args.steps
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = torch.rand(8 * args.batch, 3, PIXELS, PIXELS)
    labels = torch.arange(len(images)) % CLASSES
    rows = torch.randperm(len(images))[: args.batch]
    samples = [(images[row], int(labels[row])) for row in rows]
    batch, marks = images[rows], labels[rows]
    # train.py's batches are channels_last when they are mixed
    own_batch = batch.contiguous(memory_format=torch.channels_last)
    peers = [f(alpha=ALPHA, num_classes=CLASSES) for f in (v2.MixUp, v2.CutMix)]

    def own(gathered):
        for step in range(steps):
            x, y = own_batch, marks
            if gathered:
                x, y = images.index_select(0, rows), labels[rows]
            mixing = Mixing(ALPHA, 0, 1.0) if step % 2 else Mixing(0, ALPHA, 1.0)
            draw_mixing(mixing, PIXELS, rng)(x, F.one_hot(y, CLASSES).float())

    def peer(collated):
        for step in range(steps):
            x, y = default_collate(samples) if collated else (batch, marks)
            peers[step % 2](x, y)

    taken = seconds_in_turns(
        {
            "ours, gathered": lambda: own(True),
            "peer, collated": lambda: peer(True),
            "ours, alone": lambda: own(False),
            "peer, alone": lambda: peer(False),
        },
        args.rounds,
    )
    report(
        args,
        [
            Row(
                "mixup + CutMix from samples: ours / torchvision v2 in collate",
                over(taken["peer, collated"], taken["ours, gathered"]),
                2,
            ),
            Row(
                "mixup + CutMix alone: ours / torchvision v2",
                over(taken["peer, alone"], taken["ours, alone"]),
                1,
            ),
        ],
        f"batch {args.batch}, {PIXELS} px, {torch.get_num_threads()} threads, {steps} steps",
    )


if __name__ == "__main__":
    main()
