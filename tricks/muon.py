"""Muon: momentum whose update of each matrix or filter bank is orthogonalised.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon; convolutions and the fixed norm as in "airbench94_muon",
https://github.com/KellerJordan/cifar10-airbench
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Muon", "muon_groups", "orthogonalize"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # chosen for the largest slope at 0, not for convergence


def orthogonalize(matrix: Tensor, steps: int = 3, eps: float = 1e-7) -> Tensor:
    """Replace the singular values of a matrix by numbers near 1: U S Vᵀ → about U Vᵀ.

    Newton-Schulz iteration of the quintic a·x + b·x³ + c·x⁵, which drives all but the smallest
    singular values into about [0.7, 1.2] (in 5 steps; in 3 those under a tenth of the norm stay
    smaller). matrix: float (rows, columns). Returns the same shape and dtype; computed in float32
    on a CPU, in bfloat16 elsewhere. A matrix of zeros stays one.

    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    >>> orthogonalize(matrix, steps=5).diagonal().sub(1).abs().max() < 0.35
    tensor(True)
    """
    if matrix.ndim != 2:
        raise ValueError(f"expected a matrix, got the shape {tuple(matrix.shape)}")
    a, b, c = COEFFICIENTS
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    x = x / (x.norm() + eps)  # no singular value is above 1
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(Optimizer):
    """SGD with momentum; in groups with "orthogonal": True every update is orthogonalised.

        m ← μ·m + g        u = g + μ·m (Nesterov), or m
        orthogonal:  w ← w · √rows / |w|,  w ← w - lr · orthogonalize(u)
        others:      SGD as torch's, with its weight decay

    An orthogonal parameter is treated as a matrix (outputs, all other dimensions). Its norm is set
    before each step, unless it is 0, so that a rate has the same effect at any time. Weight decay
    would have none, and has to be 0 there. `muon_groups` makes the groups. torch.optim.Muon is for
    matrices only, and leaves all other parameters to a second optimizer.

    The attribute `found_inf` may be set, as on torch's fused optimizers, to a float tensor without
    dimensions on the parameters' device: a step for which it is 1 changes nothing, even if
    gradients are NaN, and the host does not wait for its value.

    params: parameters or groups. lr: of groups that have none; μ = momentum in [0, 1).
    orthogonal: of groups without that key. `Muon(model.parameters())` alone is refused: it does not
    tell which matrix is the head's, and plain SGD for all is not Muon.

    Raises ValueError where neither a group nor `orthogonal` says which parameters are
    orthogonalised, for a rate, momentum or decay that is negative, and for an orthogonal parameter
    of fewer than two dimensions.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> groups = muon_groups([{"name": "all", "params": model.parameters()}], head=model[2])
    >>> optimizer = Muon(groups, lr=0.5)
    >>> model(torch.randn(8, 4)).square().sum().backward()
    >>> optimizer.step()
    >>> [group["orthogonal"] for group in optimizer.param_groups]
    [True, False]
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.24,
        momentum: float = 0.6,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        orthogonal: bool | None = None,
    ) -> None:
        params = list(params)
        has_key = any(isinstance(group, dict) and "orthogonal" in group for group in params)
        if params and orthogonal is None and not has_key:
            raise ValueError(
                "Muon is not told which parameters to orthogonalise: give it the groups of "
                "muon_groups([{'params': model.parameters()}], head), or orthogonal=True or False "
                "for all parameters"
            )
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
            "orthogonal": bool(orthogonal),
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do; ValueError as in the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["lr"] < 0 or not 0 <= group["momentum"] < 1 or group["weight_decay"] < 0:
            raise ValueError(
                f"lr and weight_decay must be ≥ 0 and momentum in [0, 1), got {group['lr']}, "
                f"{group['weight_decay']} and {group['momentum']}"
            )
        if group["orthogonal"] and any(p.ndim < 2 for p in group["params"]):
            raise ValueError("an orthogonal parameter needs two dimensions or more")
        if group["orthogonal"] and group["weight_decay"]:
            raise ValueError("weight_decay does nothing to weights whose norm is fixed")

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; closure, as in torch's optimizers, computes the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        copies = [] if self.found_inf is None else self._copies()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            updates = self._updates(parameters, group)
            if group["orthogonal"]:
                for parameter, update in zip(parameters, updates, strict=True):
                    rows = len(parameter)
                    norm = parameter.norm()
                    parameter.mul_(torch.where(norm > 0, rows**0.5 / norm, 1.0))
                    update = orthogonalize(update.reshape(rows, -1)).view(update.shape)
                    parameter.sub_(update, alpha=group["lr"])
            else:
                torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        for tensor, old in copies:
            tensor.copy_(torch.where(self.found_inf > 0, old, tensor))
        return loss

    def _copies(self) -> list[tuple[Tensor, Tensor]]:
        """(tensor, a copy of its values) of every tensor that a step changes."""
        tensors = []
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            tensors += parameters
            tensors += [self._buffer(p) for p in parameters] if group["momentum"] else []
        return [(tensor, tensor.clone()) for tensor in tensors]

    def _buffer(self, parameter: Tensor) -> Tensor:
        """The momentum of a parameter: zeros before its first step."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _updates(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> Sequence[Tensor]:
        """The momentum's updates, in new tensors; buffers are kept in the state."""
        gradients = [p.grad for p in parameters]
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        if not group["momentum"]:
            return gradients
        buffers = [self._buffer(parameter) for parameter in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        if not group["nesterov"]:
            return buffers
        return torch._foreach_add(gradients, buffers, alpha=group["momentum"])


def muon_groups(groups: Iterable[dict[str, Any]], head: nn.Module) -> list[dict[str, Any]]:
    """Split each parameter group in two: one to orthogonalise, and one for SGD.

    Filters and matrices, of four and two dimensions, are orthogonalised, except for those of
    `head`, whose rows are classes, and those with one number a row (gains). Their group is named
    "NAME (muon)", has "orthogonal": True and no weight decay; the other has "orthogonal": False and
    keeps its name and all other settings.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> groups = muon_groups([{"name": "all", "params": list(model.parameters())}], model[2])
    >>> [(group["name"], len(group["params"])) for group in groups]
    [('all (muon)', 1), ('all', 3)]
    """
    head_ids = {id(parameter) for parameter in head.parameters()}
    split_groups = []
    for group in groups:
        params = list(group["params"])
        muon_params = [
            p for p in params if p.ndim in (2, 4) and p.numel() > len(p) and id(p) not in head_ids
        ]
        muon_ids = {id(p) for p in muon_params}
        sgd_params = [p for p in params if id(p) not in muon_ids]
        changes = {"name": f"{group.get('name', '')} (muon)".strip(), "params": muon_params}
        changes |= {"orthogonal": True, "weight_decay": 0.0}
        split_groups += [{**group, **changes}] if muon_params else []
        split_groups += [{**group, "params": sgd_params, "orthogonal": False}] if sgd_params else []
    return split_groups
