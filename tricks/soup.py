"""Average the weights of several networks of one architecture: one network, and one forward pass.

Networks fine-tuned from the same weights lie in one basin, and their mean is often better than the
best of them. Those trained from different random weights do not: their mean is of no use.

Wortsman et al., "Model soups", ICML 2022, https://arxiv.org/abs/2203.05482
BatchNorm's statistics: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
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

    Floating tensors are averaged in float64 and cast back; others (BatchNorm's counters) are those
    of the first state. The soup of equal states is that state, bit for bit. The states don't
    change. BatchNorm's statistics are of no use before `recompute_batch_norm`.

    Raises ValueError with the names or shapes that differ, and where there is no state.

    >>> soup = uniform_soup([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}])
    >>> soup["w"]
    tensor([2., 4.])
    """
    _check_states(states)
    soup = {}
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            mean = tensor.double()
            for number, state in enumerate(states[1:], start=2):
                mean = mean + (state[name].double() - mean) / number  # equal ones add exactly 0
            soup[name] = mean.to(tensor.dtype, copy=True)
        else:
            soup[name] = tensor.clone()
    return soup


def greedy_soup(
    states: Sequence[State], score: Callable[[dict[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """Add networks to a soup, the best first, each kept if the score does not fall.

    score: higher is better, such as the accuracy on images that no member was trained on, after
    `recompute_batch_norm`. It is called 2 · states - 1 times. Returns the soup and the numbers of
    the states in it, in the order of adding. Raises ValueError as `uniform_soup`, and
    for a score that is NaN.

    >>> states = [{"w": torch.tensor([w])} for w in (0.0, 5.0, 2.0)]
    >>> soup, ingredients = greedy_soup(states, score=lambda state: -abs(state["w"].item() - 1))
    >>> soup["w"].item(), ingredients
    (1.0, [0, 2])
    """
    _check_states(states)

    def soup_of(indices: list[int]) -> dict[str, Tensor]:
        return uniform_soup([states[index] for index in indices])

    ingredients = greedy_ingredients(len(states), lambda indices: score(soup_of(indices)))
    return soup_of(ingredients), ingredients


def greedy_ingredients(count: int, score: Callable[[list[int]], float]) -> list[int]:
    """The numbers of the networks, of `count`, that `greedy_soup` chooses by a score of numbers.

    For callers that cache the scores of soups, or never hold all networks' weights in memory.
    Raises ValueError for a count below 1 and for a score that is NaN.

    >>> greedy_ingredients(3, score=lambda numbers: 0 in numbers and 2 in numbers)
    [0, 1, 2]
    >>> greedy_ingredients(3, score=lambda numbers: -len(numbers) - (numbers[0] != 1))
    [1]
    """
    if count < 1:
        raise ValueError(f"a soup needs one network at least, got {count}")

    def score_of(indices: list[int]) -> float:
        value = score(indices)
        if value != value:
            raise ValueError(f"the score of state {' + '.join(map(str, indices))} is {value}")
        return value

    scores = [score_of([index]) for index in range(count)]
    order = sorted(range(count), key=lambda index: -scores[index])
    ingredients, best = order[:1], scores[order[0]]
    for index in order[1:]:
        value = score_of([*ingredients, index])
        if value >= best:
            ingredients, best = [*ingredients, index], value
    return ingredients


@torch.no_grad()
def recompute_batch_norm(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> None:
    """Measure BatchNorm's running statistics again, in place: their mean over `batches`.

    batches: the model's inputs, usually training images, of equal size (each counts the same), on
    the model's device; of a tuple or list, such as a data loader's (images, labels), the model gets
    the first item. All other modules are in eval mode meanwhile, and every module has its own mode
    again afterwards: in `torch.optim.swa_utils.update_bn` dropout is active, and frozen parts end
    in train mode. `batches` is not read if the model has no such statistics. Several processes need
    the same batches. Raises ValueError where there is no batch. After an error, in the model or in
    `batches`, the statistics are as before.

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
        first_batch = next(batches)
    except StopIteration:
        raise ValueError("no batch to measure BatchNorm's statistics on") from None
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    statistics = [buffer for norm in norms for buffer in norm.buffers()]
    copies = [buffer.clone() for buffer in statistics]
    try:
        for module in modes:
            module.training = False  # and not eval(), which a module may have overridden
        for norm in norms:
            norm.training = True
            norm.momentum = None  # a cumulative average
            norm.reset_running_stats()
        for batch in chain([first_batch], batches):
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    except BaseException:  # an interrupt too
        for buffer, value in zip(statistics, copies, strict=True):
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
    reference = states[0]
    for index, state in enumerate(states[1:], start=1):
        strays = [name for name in [*reference, *state] if (name in reference) != (name in state)]
        if strays:
            raise ValueError(f"states 0 and {index} differ in {', '.join(strays)}")
        for name, tensor in reference.items():
            kinds = [f"{t.dtype} of {tuple(t.shape)}" for t in (tensor, state[name])]
            if kinds[0] != kinds[1]:
                raise ValueError(f"{name} is {kinds[0]} in state 0, {kinds[1]} in state {index}")
