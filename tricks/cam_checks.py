"""Whether a class activation map can be trusted: deletion, insertion, randomised weights, heat.

Maps are (n, H, W), as large as the images or masks they are compared with, any float dtype.

    score = lambda images: model(images).softmax(1).gather(1, classes[:, None]).squeeze(1)
    curves = deletion_insertion(score, images, heat)

Deletion and insertion: Petsiuk et al., "RISE", BMVC 2018, https://arxiv.org/abs/1806.07421
Randomised weights: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018,
https://arxiv.org/abs/1810.03292
Heat in a box: the energy-based pointing game of Wang et al., "Score-CAM", CVPRW 2020,
https://arxiv.org/abs/1910.01279
"""

import copy
import difflib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "Curves",
    "deletion_insertion",
    "heat_in_box",
    "heat_in_mask",
    "rank_correlation",
    "reinitialized_copy",
]


class Curves(NamedTuple):
    """The score as pixels are deleted from images, or inserted, hottest first.

    Column s of the curves is the score where s of `steps` shares of the pixels are changed.
    """

    deletion: Tensor  # float32 (n, steps + 1)
    insertion: Tensor  # float32 (n, steps + 1)
    deletion_auc: Tensor  # float32 (n,), the lower the better the map
    insertion_auc: Tensor  # float32 (n,), the higher the better


@torch.no_grad()
def deletion_insertion(
    score: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    baseline: Tensor | float = 0.0,
    insertion_baseline: Tensor | float | None = None,
    steps: int = 50,
) -> Curves:
    """Replace the pixels of images by those of a baseline, hottest first, and the other way round.

    After step s, round(s · H · W / steps) pixels are changed; those of equal heat in reading order.
    The areas under the curves are sums of trapezoids, over shares from 0 to 1.

    score: images (n, C, H, W) -> probabilities of the explained class (n,); called 2 · (steps + 1)
    times. maps: (n, H, W). baseline: the values of deleted pixels, and of the image that pixels are
    inserted into: a number or a tensor that expands to the images. insertion_baseline: another
    image to insert into: RISE deletes to 0, the mean of normalised images, and inserts into blurs.

    Raises ValueError for shapes that don't fit, maps that are not finite, and steps not in
    1 to H · W.

    >>> image, heat = torch.tensor([[[[0.6, 0.4]]]]), torch.tensor([[[2.0, 1.0]]])
    >>> curves = deletion_insertion(lambda images: images.sum((1, 2, 3)), image, heat, steps=2)
    >>> curves.deletion, curves.insertion
    (tensor([[1.0000, 0.4000, 0.0000]]), tensor([[0.0000, 0.6000, 1.0000]]))
    >>> curves.deletion_auc, curves.insertion_auc
    (tensor([0.4500]), tensor([0.5500]))
    """
    _check_maps(maps, (len(images), *images.shape[2:]))
    pixels = maps[0].numel()
    if not 1 <= steps <= pixels:
        raise ValueError(f"steps must be in 1 to {pixels}, the number of pixels, got {steps}")
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1).view(len(images), 1, *images.shape[2:])
    deletion_baseline = torch.as_tensor(baseline).to(images)
    insertion_start = deletion_baseline
    if insertion_baseline is not None:
        insertion_start = torch.as_tensor(insertion_baseline).to(images)

    def curve(start: Tensor, end: Tensor) -> Tensor:
        counts = [round(step * pixels / steps) for step in range(steps + 1)]
        return torch.stack([_scores(score, torch.where(rank < k, end, start)) for k in counts], 1)

    deletion, insertion = curve(images, deletion_baseline), curve(insertion_start, images)
    areas = [torch.trapezoid(values, dx=1 / steps, dim=1) for values in (deletion, insertion)]
    return Curves(deletion, insertion, *areas)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of two maps of each image, equal values sharing a mean rank.

    first, second: (n, ...) of one shape; the result is float64 (n,), in -1 to 1, and nan where a
    map is the same everywhere, as it has no ranks. For the test with randomised weights: maps that
    hardly change when the weights are random don't explain what the network learned.

    >>> trained, drawn = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[10.0, 30.0, 20.0]]])
    >>> rank_correlation(trained, drawn)
    tensor([0.5000], dtype=torch.float64)
    """
    if first.shape != second.shape or first.ndim < 2:
        raise ValueError(
            f"maps must have one shape (n, ...), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    ranks = [_mean_ranks(maps.flatten(1)) for maps in (first, second)]
    a, b = (values - values.mean(1, keepdim=True) for values in ranks)
    lengths = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return ((a * b).sum(1) / lengths).clamp(-1, 1)


def reinitialized_copy(
    model: nn.Module, generator: torch.Generator, names: Iterable[str] | None = None
) -> nn.Module:
    """A deep copy of a network with random weights; the model itself is not touched.

    names: modules (with all parameters inside) and parameters, as in `named_modules` and
    `named_parameters`; None for everything. For the cascade of the paper, name more and more from
    the head down.

    Modules with a `reset_parameters`, as torch's layers have it, are drawn as by their constructor,
    and BatchNorm's statistics are reset; other parameters (tokens, position embeddings, layer
    scales) are drawn from a normal distribution with their own mean and standard deviation. Drawn
    on the CPU: the same generator state gives the same weights for any device the model is on. No
    global random state changes.

    Raises ValueError for a name that is not in the model, with the nearest.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> drawn = reinitialized_copy(model, torch.Generator().manual_seed(0), ["2"])
    >>> [torch.equal(drawn[i].weight, model[i].weight) for i in (0, 2)]
    [True, False]
    """
    if isinstance(names, str):
        raise ValueError(f"names must be a list of names, got {names!r}")
    model = copy.deepcopy(model)
    names = None if names is None else list(names)
    model_names = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    for name in names or ():
        if name not in model_names:
            matches = ", ".join(difflib.get_close_matches(name, model_names, n=3, cutoff=0.0))
            raise ValueError(f"nothing in the model is named {name!r}; the nearest are {matches}")
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item()
    device = next((parameter.device for parameter in model.parameters()), "cpu")
    model.cpu()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, module in reversed(list(model.named_modules())):  # inner ones first, as built
            _redraw(module, name, names)
    return model.to(device)


def heat_in_box(maps: Tensor, boxes: Tensor) -> Tensor:
    """The share of a map's heat that is in a box: Σ in the box / Σ everywhere, float32 (n,).

    maps: (n, H, W); negative values are no heat. boxes: (n, 4), left, top, right, bottom in pixels
    of the map, of any real dtype; a pixel is in the box if its centre, at + 0.5, is. 0 for a map
    without heat. Compare with the box's share of the area, which a constant map would have.

    >>> maps = torch.tensor([[[1.0, 3.0, -5.0], [0.0, 4.0, 0.0]]])
    >>> heat_in_box(maps, torch.tensor([[1, 0, 3, 1]]))
    tensor([0.3750])
    """
    _check_maps(maps, maps.shape)
    if boxes.shape != (len(maps), 4):
        raise ValueError(f"boxes must be ({len(maps)}, 4), got {tuple(boxes.shape)}")
    left, top, right, bottom = boxes.to(maps.device).view(-1, 4, 1).unbind(1)
    if (left > right).any() or (top > bottom).any():
        raise ValueError(
            "boxes must be left, top, right, bottom, and one has an end before a start"
        )
    x, y = (torch.arange(side, device=maps.device) + 0.5 for side in (maps.shape[2], maps.shape[1]))
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return heat_in_mask(maps, rows.unsqueeze(2) & columns.unsqueeze(1))


def heat_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of a map's heat that is under a mask, as `heat_in_box`; masks: bool (n, H, W).

    >>> heat_in_mask(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[False, True]]]))
    tensor([0.7500])
    """
    _check_maps(maps, masks.shape)
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool, got {masks.dtype}")
    heat = maps.float().relu()
    total = heat.sum((1, 2))
    return torch.where(total > 0, (heat * masks).sum((1, 2)) / total, 0.0)


def _scores(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    scores = score(images)
    if scores.shape != images.shape[:1]:
        raise ValueError(f"score must give ({len(images)},), got {tuple(scores.shape)}")
    return scores.float()


def _check_maps(maps: Tensor, shape: tuple[int, ...]) -> None:
    if maps.ndim != 3 or 0 in maps.shape or maps.shape != shape:
        raise ValueError(f"maps must be (n, H, W), here {tuple(shape)}, got {tuple(maps.shape)}")
    if not maps.isfinite().all():
        raise ValueError("maps must be finite")


def _mean_ranks(values: Tensor) -> Tensor:
    """Each value's rank in its row, from 0, float64; equal ones have the mean of their ranks."""
    values = values.double()
    sorted_values = values.sort(dim=1).values
    smaller, upto = (
        torch.searchsorted(sorted_values, values, right=right) for right in (False, True)
    )
    return (smaller + upto - 1).double() / 2


def _redraw(module: nn.Module, name: str, names: list[str] | None) -> None:
    """Draw a module's own parameters again, as far as they are under one of the names."""
    parameters = {
        f"{name}.{key}".lstrip("."): tensor
        for key, tensor in module.named_parameters(recurse=False)
    }
    selection = [tensor for key, tensor in parameters.items() if _is_under(key, names)]
    reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
    if reset is not None and len(selection) == len(parameters) and _is_under(name, names):
        reset()
        return
    for tensor in selection:
        if tensor.is_floating_point():
            values = tensor.float()
            tensor.copy_(values.mean() + values.std(correction=0) * torch.randn_like(values))


def _is_under(name: str, names: list[str] | None) -> bool:
    return names is None or any(name == outer or name.startswith(f"{outer}.") for outer in names)
