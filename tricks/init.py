"""Initialisation of convolutional networks: Kaiming normal, and filters that pass their input on.

He et al., "Delving Deep into Rectifiers", ICCV 2015, https://arxiv.org/abs/1502.01852
The last layer: Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1,
https://arxiv.org/abs/1706.02677
Passing on: Zagoruyko and Komodakis, "DiracNets", 2017, https://arxiv.org/abs/1706.00388
"""

import torch
from torch import nn

__all__ = ["dirac_part_", "kaiming_normal_"]

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@torch.no_grad()
def kaiming_normal_(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the weights of a ReLU network again, in place.

    Convolutions: N(0, 2 / fan_out) with fan_out = out_channels · kernel area, which keeps the
    gradient's variance through the layers; as in torch and torchvision, a grouped convolution
    counts all its outputs. Normalisations: weight 1, bias 0. Linear layers: N(0, 0.01²), so that
    training starts from nearly equal class probabilities. Biases: 0. Layers of other kinds keep
    their weights, and buffers don't change. Meant for convolutional networks that are trained
    from scratch, not for transformers.

    Draws in the order of `model.modules()` from `generator`, which has to be on the model's
    device: initialise before moving the model, so that every device starts from the same weights.

    >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Linear(64, 10))
    >>> kaiming_normal_(model, torch.Generator().manual_seed(0))
    >>> round(model[0].weight.std().item() / (2 / (64 * 9)) ** 0.5, 1)
    1.0
    >>> model[0].bias.count_nonzero().item(), model[1].weight.unique().item()
    (0, 1.0)
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
        elif isinstance(module, NORMS):
            if module.weight is not None:
                nn.init.ones_(module.weight)
        else:
            continue
        if getattr(module, "bias", None) is not None:  # RMSNorm has none
            nn.init.zeros_(module.bias)


@torch.no_grad()
def dirac_part_(conv: nn.Conv2d) -> None:
    """Make the first filters of a convolution pass their input channels on, in place.

    They are as many as there are input channels (all, if there are fewer filters): 1 at the
    kernel's centre for the filter's own channel, 0 elsewhere. The other filters keep their weights.
    So a network without shortcuts starts like one with shortcuts. Raises ValueError for groups.

    >>> conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    >>> dirac_part_(conv)
    >>> x = torch.randn(1, 2, 4, 4)
    >>> torch.equal(conv(x)[:, :2], x)
    True
    """
    if conv.groups != 1:
        raise ValueError(f"grouped convolutions have no channel to pass on: {conv}")
    nn.init.dirac_(conv.weight[: conv.in_channels])
