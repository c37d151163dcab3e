"""An exponential moving average of a model's weights, to evaluate and to save.

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; as used by
Szegedy et al., https://arxiv.org/abs/1512.00567, section 8.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["ModelEma", "decay_at", "half_life"]


def decay_at(step: int, decay: float) -> float:
    """The decay of the update after optimizer step `step`, counted from 0, warmed up.

    min(decay, (1 + step) / (10 + step)): with 0.9999 from the start, a short run would never
    leave its random initial weights. It reaches 0.9 at step 80, 0.99 at 890, 0.999 at 8,990.

    >>> [decay_at(step, 0.999) for step in (0, 80, 8_990, 1_000_000)]
    [0.1, 0.9, 0.999, 0.999]
    """
    if step < 0:
        raise ValueError(f"steps are counted from 0, got {step}")
    return min(decay, (1 + step) / (10 + step))


def half_life(decay: float) -> float:
    """The number of updates after which a weight in the average has halved: ln ½ / ln decay.

    >>> round(half_life(0.9999))
    6931
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay must be in (0, 1), got {decay}")
    return math.log(0.5) / math.log(decay)


class ModelEma:
    """The average a ← d·a + (1 - d)·w of all that a model's forward pass reads.

    Parameters and float buffers (BatchNorm's running statistics belong to the weights they were
    measured with) are averaged, in fp32 at least; integer buffers are copied. Tied weights are
    stored once. It stores one copy of the weights, not a second module, on the model's device.

    Make it when the model has its final device, dtype and memory format, from the model itself and
    not from a DDP or `torch.compile` wrapper. Call `update` after real optimizer steps only, not
    after each microbatch of an accumulated step, nor after a step that was skipped. The decay is a
    function of the step (`decay_at`; `decay` itself with warmup=False), so that nothing but the
    tensors of `state_dict` has to be saved.

    Raises ValueError for a decay outside (0, 1).

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(0.0)
    >>> ema = ModelEma(model, decay=0.999)
    >>> _ = model.weight.data.fill_(1.0)
    >>> ema.update(model, step=0)  # decay_at(0, 0.999) is 0.1
    >>> with ema.applied_to(model):
    ...     print(round(model.weight.item(), 4))
    0.9
    >>> model.weight.item()
    1.0
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {decay}")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0  # the step of the next update, if it is given none
        self._averages = {}
        for name, tensor in _tensors(model).items():
            # In 16 bits a step of (1 - d)·(w - a) would be rounded away.
            is_half = tensor.dtype in (torch.float16, torch.bfloat16)
            dtype = torch.float32 if is_half else tensor.dtype
            self._averages[name] = tensor.detach().to(dtype, copy=True)
        # The names in the model's state dict, each with the name of its average: tied weights have
        # several names there, and buffers that are not persistent have none.
        names = {id(tensor): name for name, tensor in _tensors(model).items()}
        state = model.state_dict(keep_vars=True)
        self._saved = {name: names[id(t)] for name, t in state.items() if id(t) in names}

    @torch.no_grad()
    def update(
        self, model: nn.Module, step: int | None = None, names: Collection[str] | None = None
    ) -> None:
        """Average in the weights of the model after optimizer step `step`, counted from 0.

        step: None for the one after the last update's. That count is not in `state_dict`: with
        warm-up, give the step to the first update after loading. names: the parameters and buffers
        that can have changed, where the others are frozen; None for all.
        """
        step = self.updates if step is None else step
        self.updates = step + 1
        decay = decay_at(step, self.decay) if self.warmup else self.decay
        averages, sources, counters, counts = [], [], [], []
        pairs = self._pairs(model) if names is None else self._some_pairs(model, names)
        for average, tensor in pairs:
            if average.is_floating_point():
                averages.append(average)
                sources.append(tensor.to(average.dtype))
            else:
                counters.append(average)
                counts.append(tensor)
        if averages:
            torch._foreach_lerp_(averages, sources, 1 - decay)  # a + (1 - d)·(w - a)
        if counters:
            torch._foreach_copy_(counters, counts)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Evaluate with the averaged weights; afterwards the raw ones are back, bit for bit."""
        averages, tensors = map(list, zip(*self._pairs(model), strict=True))
        raw = [tensor.detach().clone() for tensor in tensors]
        try:
            with torch.no_grad():
                torch._foreach_copy_(tensors, averages)
            yield model
        finally:
            with torch.no_grad():
                torch._foreach_copy_(tensors, raw)

    def tensors(self) -> dict[str, Tensor]:
        """The averages themselves by name, to be changed in place."""
        return dict(self._averages)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages with the names of the model's own `state_dict`, for its `load_state_dict`.

        So buffers that are not persistent are left out (`tensors` has them), and tied weights are
        listed under each of their names. All are contiguous and none shares memory with another, as
        safetensors requires. They may be the averages themselves: write or clone them before the
        next `update`.
        """
        state, keys = {}, set()
        for name, key in self._saved.items():
            average = self._averages[key].contiguous()
            state[name] = average.clone() if key in keys else average
            keys.add(key)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load averages from `state_dict` or from `tensors`.

        Names that only one of these has may be missing: a tied weight's further names, and buffers
        that are not persistent, which stay as they are. Raises ValueError, with the names, for
        other names or shapes, and changes nothing then.
        """
        optional = self._averages.keys() ^ self._saved.keys()
        averages = {name: self._averages[key] for name, key in self._saved.items()}
        averages = {
            name: average
            for name, average in {**self._averages, **averages}.items()
            if name in state or name not in optional
        }
        _check_same(state, averages, "the loaded average")
        for name, average in self._averages.items():
            if name in state:
                average.copy_(state[name])

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        # Looked up each time, because `model.to()` and `load_state_dict(assign=True)` replace them.
        tensors = _tensors(model)
        _check_same(tensors, self._averages, "the model")
        return [(average, tensors[name]) for name, average in self._averages.items()]

    def _some_pairs(
        self, model: nn.Module, names: Collection[str]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        # A walk over all modules would take longer than a step of a small head
        for name in names:
            module, _, leaf = name.rpartition(".")
            yield self._averages[name], getattr(model.get_submodule(module), leaf)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_same(tensors: dict[str, Tensor], averages: dict[str, Tensor], source: str) -> None:
    strays = sorted(tensors.keys() ^ averages.keys())
    strays = strays or [name for name in averages if tensors[name].shape != averages[name].shape]
    if strays:
        raise ValueError(f"{source} does not fit the average in: {', '.join(strays)}")
