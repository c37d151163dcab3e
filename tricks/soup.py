"""Average the weights of several networks of one architecture: one network, and one forward pass.

Networks fine-tuned from the same weights lie in one basin, and their mean is often better than the
best of them. Those trained from different random weights do not: their mean is of no use.

Wortsman et al., "Model soups", ICML 2022, https://arxiv.org/abs/2203.05482
BatchNorm anew: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
Generalization", UAI 2018, https://arxiv.org/abs/1803.05407
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

__all__ = ["greedy_ingredients", "greedy_soup", "recompute_batch_norm", "uniform_soup"]

BatchNorm = nn.modules.batchnorm._BatchNorm
State = Mapping[str, Tensor]


def uniform_soup(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of networks' weights, of state dicts with the same names, shapes and dtypes.

    Floating tensors are averaged in float64 and cast back; others (BatchNorm's counters) are the
    first's. The soup of equal states is that state, bit for bit. The states are left as they are.
    BatchNorm's statistics are of no use before `recompute_batch_norm`.

    Raises ValueError with the names or shapes that differ, and where there is no state.

    >>> soup = uniform_soup([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}])
    >>> soup["w"]
    tensor([2., 4.])
    """
    _check_states(states)
    soup = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            mean = first.double()
            for number, state in enumerate(states[1:], start=2):
                mean = mean + (state[name].double() - mean) / number  # equal ones add exactly 0
            soup[name] = mean.to(first.dtype, copy=True)
        else:
            soup[name] = first.clone()
    return soup


def greedy_soup(
    states: Sequence[State], score: Callable[[dict[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """Add networks to a soup, the best first, each kept if the score does not fall.

    score: higher is better; the accuracy on images that no member was trained on, say, after
    `recompute_batch_norm`. It is called 2 · states - 1 times. Returns the soup and the numbers of
    the states in it, in the order in which they came in. Raises ValueError as `uniform_soup`, and
    for a score that is NaN.

    >>> states = [{"w": torch.tensor([w])} for w in (0.0, 5.0, 2.0)]
    >>> soup, chosen = greedy_soup(states, score=lambda state: -abs(state["w"].item() - 1))
    >>> soup["w"].item(), chosen
    (1.0, [0, 2])
    """
    _check_states(states)

    def soup_of(indices: list[int]) -> dict[str, Tensor]:
        return uniform_soup([states[index] for index in indices])

    chosen = greedy_ingredients(len(states), lambda indices: score(soup_of(indices)))
    return soup_of(chosen), chosen


def greedy_ingredients(count: int, score: Callable[[list[int]], float]) -> list[int]:
    """Which of `count` networks `greedy_soup` takes, for a score of their numbers.

    For those who keep the scores of soups, or more than one network's weights nowhere at once.
    Raises ValueError for a count below 1 and for a score that is NaN.

    >>> greedy_ingredients(3, score=lambda numbers: 0 in numbers and 2 in numbers)
    [0, 1, 2]
    >>> greedy_ingredients(3, score=lambda numbers: -len(numbers) - (numbers[0] != 1))
    [1]
    """
    if count < 1:
        raise ValueError(f"a soup needs one network at least, got {count}")

    def checked(indices: list[int]) -> float:
        value = score(indices)
        if value != value:
            raise ValueError(f"the score of state {' + '.join(map(str, indices))} is {value}")
        return value

    scores = [checked([index]) for index in range(count)]
    ranked = sorted(range(count), key=lambda index: -scores[index])
    chosen, best = ranked[:1], scores[ranked[0]]
    for index in ranked[1:]:
        value = checked([*chosen, index])
        if value >= best:
            chosen, best = [*chosen, index], value
    return chosen


@torch.no_grad()
def recompute_batch_norm(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> None:
    """Measure BatchNorm's running statistics anew: the mean over `batches` of each one's, in place.

    batches: what the model takes, training images above all, of equal size (each counts the
    same); of a tuple or list, a data loader's (images, labels) say, the first is given to the
    model. They have to be where the model is. All else is in eval mode meanwhile, and every
    module's own mode comes back: in `torch.optim.swa_utils.update_bn` dropout drops, and frozen
    parts are in train mode afterwards. Nothing is read if the model has no such statistics. Several
    processes have to be given the same batches. Raises ValueError where there is no batch. Whatever
    fails, in the model or in `batches`, leaves the statistics as they were.

    >>> norm = nn.BatchNorm1d(1)
    >>> batches = torch.tensor([[[1.0], [3.0]], [[4.0], [8.0]]])
    >>> recompute_batch_norm(norm.eval(), batches)
    >>> norm.running_mean.item(), norm.running_var.item(), norm.training
    (4.0, 5.0, False)
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return
    batches = iter(batches)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError("no batch to measure BatchNorm's statistics on") from None
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    statistics = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in statistics]
    try:
        for module in modes:
            module.training = False  # and not eval(), which a module may have overridden
        for norm in norms:
            norm.training = True
            norm.momentum = None  # a cumulative average
            norm.reset_running_stats()
        for batch in chain([first], batches):
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    except BaseException:  # an interrupt too
        for buffer, value in zip(statistics, before, strict=True):
            buffer.copy_(value)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _check_states(states: Sequence[State]) -> None:
    if not states:
        raise ValueError("a soup needs one state at least, got none")
    first = states[0]
    for index, state in enumerate(states[1:], start=1):
        strays = [name for name in [*first, *state] if (name in first) != (name in state)]
        if strays:
            raise ValueError(f"states 0 and {index} differ in {', '.join(strays)}")
        for name, tensor in first.items():
            one, other = ((t.dtype, tuple(t.shape)) for t in (tensor, state[name]))
            if one != other:
                raise ValueError(
                    f"{name} is {one[0]} of {one[1]} in state 0, {other[0]} of {other[1]} in "
                    f"state {index}"
                )
