"""An update of averaged weights: ModelEma against timm's ModelEmaV3 and a loop over the state.

    python benchmarks/ema.py

ResNet-50, fp32, all parameters and buffers, threads as torch has them. timm's is given its fastest
way, foreach, which is its default. The loop is that of many tutorials: over `state_dict`, a tensor
at a time. Each side averages the same model with the same decay into a copy of its own.
"""

import torch
from measure import Row, over, parser, read, report, seconds_in_turns
from timm.utils import ModelEmaV3
from torchvision.models import resnet50

from tricks.ema import ModelEma

DECAY = 0.999


@torch.no_grad()
def loop(average, model):
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].mul_(DECAY).add_(value, alpha=1 - DECAY)
        else:
            average[name].copy_(value)


def main():
    arg_parser = parser(__doc__, rounds=15)
    arg_parser.add_argument("--updates", type=int, default=10, help="a side and round")
    args = read(arg_parser)
    updates = 1 if args.quick else args.updates
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = resnet50(weights=None).to(device, memory_format=torch.channels_last)
    own = ModelEma(model, DECAY, warmup=False)
    package = ModelEmaV3(model, DECAY)
    average = {name: value.clone() for name, value in model.state_dict().items()}

    def times(update):
        return lambda: [update() for _ in range(updates)]

    taken = seconds_in_turns(
        {
            "ours": times(lambda: own.update(model, step=10**6)),
            "timm": times(lambda: package.update(model)),
            "loop": times(lambda: loop(average, model)),
        },
        args.rounds,
    )
    rows = [
        Row("EMA of ResNet-50: ours / timm ModelEmaV3", over(taken["timm"], taken["ours"]), 1.0),
        Row("EMA of ResNet-50: ours / per-parameter loop", over(taken["loop"], taken["ours"]), 3),
    ]
    report(args, rows, f"{device.type}, {torch.get_num_threads()} threads, {updates} updates")


if __name__ == "__main__":
    main()
