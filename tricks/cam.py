"""Class activation maps: the places in an image that a classifier's answer rests on.

    layer = "layer4"  # or find_layer(model, images), of tricks/cam_layers.py
    with GradCam(model, layer) as cam:
        cams = cam(images, methods=("gradcam", "layercam"))
    heat = upsample_maps(normalize_maps(cams.maps["gradcam"]), images.shape[2:])

The maps of each method are a pure function of the activations A (n, channels, h, w) of a layer and
of the gradients G = ∂y/∂A, of the same shape, of the logit y of one class an image. They are
float32 (n, h, w), neither scaled nor upsampled, and finite where A and G are.

jacobgil's grad-cam 1.5.7, the peer in the tests, differs from the papers as described below, and
sets negative values to 0 in every method.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "CAM_METHODS",
    "Cams",
    "GradCam",
    "eigen_cam",
    "grad_cam",
    "grad_cam_plus_plus",
    "hires_cam",
    "layer_cam",
    "normalize_maps",
    "score_cam",
    "upsample_maps",
]

MAX_PREFIX = 16  # class, distillation and register tokens before those of the patches


# -- methods -------------------------------------------------------------------------------------


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM: channels weighted by their mean gradient, ReLU(Σₖ meanᵢⱼ(Gₖ) · Aₖ).

    Selvaraju et al., ICCV 2017, https://arxiv.org/abs/1610.02391
    Raises ValueError for shapes that differ or are not (n, channels, h, w), as those below.

    >>> activations = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    >>> gradients = torch.tensor([[[[2.0, 4.0]], [[-1.0, -1.0]]]])
    >>> grad_cam(activations, gradients)  # 3 · (1, 2) - 1 · (3, 4)
    tensor([[[0., 2.]]])
    """
    activations, gradients = _checked(activations, gradients)
    return (gradients.mean((2, 3), keepdim=True) * activations).sum(1).relu()


def grad_cam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++: ReLU(Σₖ wₖ Aₖ), wₖ = Σᵢⱼ αᵢⱼ · ReLU(Gᵢⱼ), αᵢⱼ = 1 / (2 + Gᵢⱼ · Σₐᵦ Aₐᵦ).

    Chattopadhyay et al., WACV 2018, https://arxiv.org/abs/1710.11063, equations 7 and 19, where α
    is G² / (2G² + Σ A · G³). They differentiate exp(y): exp(y) cancels in α, and in w is a factor
    of the whole map, left out here, as it overflows. Made for activations ≥ 0; with others α has
    poles, at which it is set to 0. The peer adds 1e-6 to the denominator 2G² + …: where G is about
    1e-3, as in an untrained ResNet-50, its maps differ by up to 5 % of their largest value, and
    where it is 1e-4, its weights are sums of cubes.

    >>> activations = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]]])
    >>> gradients = torch.tensor([[[[2.0, -1.0]], [[0.0, 0.25]]]])
    >>> grad_cam_plus_plus(activations, gradients)  # 2/8 · (1, 2) + ¼/4 · (3, 5)
    tensor([[[0.4375, 0.8125]]])
    """
    activations, gradients = _checked(activations, gradients)
    denominator = 2 + gradients * activations.sum((2, 3), keepdim=True)
    alpha = torch.where(denominator == 0, 0.0, 1 / denominator)
    weights = (alpha * gradients.relu()).sum((2, 3), keepdim=True)
    return (weights * activations).sum(1).relu()


def hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """HiResCAM: Σₖ Gₖ ⊙ Aₖ, with a sign: negative values speak against the class.

    Draelos and Carin, 2020, https://arxiv.org/abs/2011.08891; no ReLU, as in their code. Where one
    linear layer, or a mean and one, follows A, a map's sum is the logit less its bias.

    >>> activations = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    >>> hires_cam(activations, torch.tensor([[[[2.0, 4.0]], [[-1.0, -1.0]]]]))
    tensor([[[-1.,  4.]]])
    """
    activations, gradients = _checked(activations, gradients)
    return (gradients * activations).sum(1)


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM: every position weighted by itself, ReLU(Σₖ ReLU(Gₖ) ⊙ Aₖ).

    Jiang et al., TIP 2021, https://doi.org/10.1109/TIP.2021.3089943
    Also suited to the earlier, finer layers.

    >>> activations = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    >>> layer_cam(activations, torch.tensor([[[[2.0, 4.0]], [[-1.0, -1.0]]]]))
    tensor([[[2., 8.]]])
    """
    activations, gradients = _checked(activations, gradients)
    return (gradients.relu() * activations).sum(1).relu()


def eigen_cam(activations: Tensor) -> Tensor:
    """Eigen-CAM: the positions' projection on the first right singular vector, O v₁, O = U Σ Vᵀ.

    O: (h·w, channels), of one image. It uses no class and no gradient. The decomposition leaves the
    sign open: it is chosen so that the value of largest magnitude is positive. For activations ≥ 0,
    all values are ≥ 0. (The sign of the mean activation would mean nothing after a LayerNorm, where
    that mean is about 0.)

    Muhammad and Yeasin, IJCNN 2020, https://arxiv.org/abs/2008.00299, which does not centre O. The
    peer subtracts each channel's mean over the positions, and leaves the sign to chance: 5 of an
    untrained ConvNeXt's 8 maps had the other one.

    >>> eigen_cam(torch.tensor([[[[3.0, 1.5, 6.0]], [[4.0, 2.0, 8.0]]]]))
    tensor([[[ 5.0000,  2.5000, 10.0000]]])
    """
    activations, _ = _checked(activations, activations)
    n, _, height, width = activations.shape
    left_vectors, values, _ = torch.linalg.svd(activations.flatten(2).mT, full_matrices=False)
    maps = left_vectors[:, :, 0] * values[:, :1]
    extreme = maps.gather(1, maps.abs().argmax(1, keepdim=True))
    return torch.where(extreme < 0, -maps, maps).view(n, height, width)


@torch.no_grad()
def score_cam(
    activations: Tensor,
    images: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    batch_size: int = 64,
) -> Tensor:
    """Score-CAM: channels weighted by the score of the image masked by each, without gradients.

        ReLU(Σₖ αₖ Aₖ), α = softmax over k of score(image · scaled(upsampled(Aₖ)))

    Wang et al., CVPRW 2020, https://arxiv.org/abs/1910.01279, algorithm 1; the score of a baseline,
    which it subtracts, cancels in the softmax. Each mask is scaled to [0, 1]; a constant channel
    has mask 0. Unlike the paper's code, the peer upsamples with align_corners=True.

    images: (n, C, H, W), as the network takes them. score: a function of masked images
    (m, C, H, W), in the dtype of the images, and of the numbers of their images, int64 (m,); it
    returns the class's logits (m,), or (m, k) for k classes, and then maps are (n, k, h, w).
    Costs n · channels forward passes, in batches of `batch_size`: 512 an image for ResNet-18, 2,048
    for ResNet-50. Raises ValueError also for a batch_size < 1.

    >>> activations = torch.tensor([[[[9.0, 0.0]], [[0.0, 8.0]]]])
    >>> images = torch.tensor([[[[0.0, 2.0]]]])
    >>> bright = lambda masked, samples: masked.sum((1, 2, 3)) * 100
    >>> score_cam(activations, images, bright)  # the second channel shows the bright pixel
    tensor([[[0., 8.]]])
    """
    activations, _ = _checked(activations, activations)
    if batch_size < 1:
        raise ValueError(f"batch_size must be ≥ 1, got {batch_size}")
    if images.ndim != 4 or len(images) != len(activations):
        raise ValueError(
            f"images must be (n, C, H, W) with n = {len(activations)}, got {tuple(images.shape)}"
        )
    n, channels = activations.shape[:2]
    scores = []
    for index in torch.arange(n * channels, device=images.device).split(batch_size):
        masks = upsample_maps(activations.flatten(0, 1)[index], images.shape[2:])
        samples = index // channels
        masked_images = images[samples] * normalize_maps(masks).unsqueeze(1).to(images.dtype)
        scores.append(score(masked_images, samples).float())
    scores = torch.cat(scores)
    weights = scores.view(n, channels, *scores.shape[1:]).softmax(1)
    if weights.ndim == 2:
        return (weights[:, :, None, None] * activations).sum(1).relu()
    columns = [(w[:, :, None, None] * activations).sum(1).relu() for w in weights.unbind(2)]
    return torch.stack(columns, dim=1)


GRADIENT_METHODS = {
    "gradcam": grad_cam,
    "gradcam++": grad_cam_plus_plus,
    "hirescam": hires_cam,
    "layercam": layer_cam,
}
CAM_METHODS = (*GRADIENT_METHODS, "eigencam", "scorecam")


def normalize_maps(maps: Tensor) -> Tensor:
    """Scale each map so that its least value is 0 and its largest 1: float32 (..., h, w).

    A constant map, zero or not, becomes 0; a map with a NaN becomes NaN. In a signed map (hirescam,
    eigencam) zero ends up somewhere in between: `maps.relu()` first keeps what speaks for the
    class.

    >>> normalize_maps(torch.tensor([[[2.0, 3.0, 6.0]], [[0.0, 0.0, 0.0]]]))
    tensor([[[0.0000, 0.2500, 1.0000]],
    <BLANKLINE>
            [[0.0000, 0.0000, 0.0000]]])
    """
    maps = maps.float()
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high == low, 0.0, (maps - low) / (high - low))


def upsample_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (..., h, w) as large as the image, size = (H, W), bilinear: float32 (..., H, W).

    With align_corners=False, so that a value is at the centre of the pixels it was pooled from.

    >>> upsample_maps(torch.tensor([[[0.0, 4.0]]]), (1, 4))
    tensor([[[0., 1., 3., 4.]]])
    """
    flat = maps.float().reshape(-1, 1, *maps.shape[-2:])
    large = F.interpolate(flat, size=tuple(size), mode="bilinear", align_corners=False)
    return large.view(*maps.shape[:-2], *large.shape[-2:])


def _checked(activations: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    if activations.ndim != 4 or activations.shape != gradients.shape:
        raise ValueError(
            "activations and gradients must have one shape (n, channels, h, w), got "
            f"{tuple(activations.shape)} and {tuple(gradients.shape)}"
        )
    return activations.detach().float(), gradients.detach().float()


# -- the positions in an output --------------------------------------------------------------------


class _Grid(NamedTuple):
    """The positions in an output: h × w of them, after `prefix` tokens."""

    dim: int  # of the height: 2 in (n, c, h, w), 1 in (n, h, w, c) and (n, tokens, c)
    height: int
    width: int
    prefix: int = 0


@lru_cache
def _grid_of(shape: torch.Size, image_shape: torch.Size) -> _Grid | None:
    """The positions of an output, or None where it has none."""
    n, _, height, width = image_shape
    grids = []
    if len(shape) == 4 and shape[0] == n:
        _, dim1, dim2, dim3 = shape
        if _is_scaled((dim2, dim3), (height, width), max_loss=math.inf):
            grids.append(_Grid(2, dim2, dim3))
        if dim3 > 1 and _is_scaled((dim1, dim2), (height, width), max_loss=1):
            grids.append(_Grid(1, dim1, dim2))
    elif len(shape) == 3 and shape[0] == n:
        strides = range(1, max(height, width) + 1)
        down = [(height // stride, width // stride) for stride in strides]
        up = [(-(-height // stride), -(-width // stride)) for stride in strides]
        for h, w in down + up:
            if 0 <= shape[1] - h * w <= MAX_PREFIX:
                grids.append(_Grid(1, h, w, shape[1] - h * w))
    grids = [grid for grid in grids if grid.height * grid.width > 1]

    def misfit(grid: _Grid) -> tuple[int, float]:
        return grid.prefix, abs(math.log(grid.height * width / (grid.width * height)))

    return min(grids, key=misfit, default=None)


def _is_scaled(sides: tuple[int, int], full: tuple[int, int], max_loss: float) -> bool:
    """Whether a stride turns the image's sides into these; unpadded edges cost both the same."""
    for stride in range(1, max(full) + 1):
        losses = [full_side / stride - side for full_side, side in zip(full, sides, strict=True)]
        if min(losses) > -1 and max(losses) < max_loss and abs(losses[0] - losses[1]) < 1:
            return True
    return False


def _to_grid(output: Tensor, grid: _Grid) -> Tensor:
    """(n, channels, h, w) of an output."""
    if output.ndim == 3:
        output = output[:, grid.prefix :].unflatten(1, (grid.height, grid.width))
    return output if grid.dim == 2 else output.permute(0, 3, 1, 2)


# -- the network ---------------------------------------------------------------------------------


class Cams(NamedTuple):
    """The result of `GradCam`: maps by method, and the classes they explain."""

    maps: dict[str, Tensor]  # float32 (n, h, w), or (n, k, h, w) for k classes an image
    logits: Tensor  # float32 (n, classes)
    classes: Tensor  # int64 (n,) or (n, k)


class GradCam:
    """Class activation maps of a classifier, which stays as it was.

    layer: the module to take maps from, or its name; tricks/cam_layers.py finds the usual one. It
    returns a tensor (n, c, h, w), or (n, h, w, c) as Swin does, or tokens (n, prefix + h · w, c),
    with h · w > 1 in the proportions of the images; where it runs more than once in a pass, its
    last output counts. The attribute `layer` is its name.

    Frozen weights, `torch.no_grad`, in-place ReLUs and wrappers by DDP, DataParallel or
    `torch.compile` (it runs uncompiled) make no difference. The model runs in eval mode, so that
    images are independent, on its own device and in its own dtype; after each call every module has
    its own mode again. No `.grad` is written, and the hook is removed after the block, also after
    an error.

    Raises ValueError for an unknown layer, with the nearest names.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5))
    >>> images = torch.randn(2, 3, 8, 12)
    >>> with GradCam(model, "1") as cam:
    ...     cams = cam(images, methods=("gradcam", "hirescam"))
    ...     all_classes = cam(images, torch.arange(5).expand(2, 5))
    >>> {method: tuple(maps.shape) for method, maps in cams.maps.items()}
    {'gradcam': (2, 4, 6), 'hirescam': (2, 4, 6)}
    >>> tuple(all_classes.maps["gradcam"].shape)
    (2, 5, 4, 6)
    """

    def __init__(self, model: nn.Module, layer: str | nn.Module) -> None:
        self.model = _unwrapped(model)
        self.layer = _layer_name(self.model, layer)
        self._handle = self._outputs = None  # outputs: a list while a pass is captured
        self._entered = self._with_graph = False

    def __enter__(self) -> "GradCam":
        self._entered = True
        return self

    def __exit__(self, *error: object) -> None:
        self._entered = False
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(
        self,
        images: Tensor,
        classes: Tensor | None = None,
        methods: Sequence[str] = ("gradcam",),
        *,
        against: Tensor | None = None,
        batch_size: int = 64,
    ) -> Cams:
        """Maps (n, h, w) of one class an image, by each method, from one pass forward and one back.

        images: (n, C, H, W), normalised as the network expects, square or not. classes: int64
        (n,), or None for the predicted ones; or (n, k) for maps (n, k, h, w) of k classes an image,
        each of which costs a backward pass, from the logits to the layer. against, of the shape of
        classes: explain logit[classes] - logit[against], why this class rather than that one.
        methods: of `CAM_METHODS`. batch_size: that of `score_cam`, by far the most expensive.

        Raises ValueError for invalid arguments, for a layer that gives no positions or that the
        logits don't depend on, and for a model that gives no logits (n, classes); RuntimeError
        outside of the block.
        """
        if not self._entered:
            raise RuntimeError("use GradCam in a block: with GradCam(model, layer) as cam")
        _check_images(images)
        _check_methods(methods)
        if self._handle is None:
            module = self.model.get_submodule(self.layer)
            self._handle = module.register_forward_hook(self._capture)
        with _evaluating(self.model):
            images = _like(self.model, images)
            output, logits = self._forward(images, any(m in GRADIENT_METHODS for m in methods))
            grid = _grid_of(output.shape, images.shape)
            if grid is None:
                shape = tuple(output.shape)
                raise ValueError(f"layer {self.layer!r} gives {shape}, which has no positions")
            classes = logits.argmax(1) if classes is None else classes.to(logits.device)
            explain = _explainer(classes, against, logits)
            maps = self._gradient_maps(output, explain(logits), grid, methods)
            activations = _to_grid(output.detach(), grid)
            if "eigencam" in methods:
                eigen_maps = eigen_cam(activations).unsqueeze(1)
                maps["eigencam"] = eigen_maps.repeat(1, explain(logits).shape[1], 1, 1)
            if "scorecam" in methods:
                maps["scorecam"] = score_cam(
                    activations,
                    images,
                    lambda masked, samples: explain(self.model(masked).float(), samples),
                    batch_size,
                )
        if classes.ndim == 1:
            maps = {method: class_maps.squeeze(1) for method, class_maps in maps.items()}
        return Cams({method: maps[method] for method in methods}, logits.detach(), classes)

    def _forward(self, images: Tensor, with_graph: bool) -> tuple[Tensor, Tensor]:
        """The layer's output, a leaf, and the logits; between them, a graph if wanted."""
        self._outputs, self._with_graph = [], with_graph
        try:
            with torch.no_grad():  # up to the layer
                logits = self.model(images.clone())  # which may start in place
            outputs = self._outputs
        finally:
            self._outputs = None
        _check_logits(self.model, logits, len(images))
        if not outputs:
            raise ValueError(f"layer {self.layer!r} does not run when the model does")
        return outputs[-1], logits.float()

    def _capture(self, module: nn.Module, args: tuple, output: object) -> Tensor | None:
        if self._outputs is None:
            return None
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            raise ValueError(f"layer {self.layer!r} gives a {kind}, and maps are made of tensors")
        output = output.detach()
        if self._with_graph:
            torch.set_grad_enabled(True)  # until `_forward` leaves its block
            output.requires_grad_()
        self._outputs[:] = [output]
        return output.clone()  # the next layer may work in place

    def _gradient_maps(
        self, output: Tensor, logits: Tensor, grid: _Grid, methods: Sequence[str]
    ) -> dict[str, Tensor]:
        """Maps (n, k, h, w) of the sums of k columns of logits, by each method with gradients."""
        functions = {name: GRADIENT_METHODS[name] for name in methods if name in GRADIENT_METHODS}
        if not functions:
            return {}
        maps = {name: [] for name in functions}
        activations = _to_grid(output, grid)
        columns = logits.sum(0).unbind()  # images are independent: ∂Σy/∂A holds each one's gradient
        for number, column in enumerate(columns, start=1):
            gradient = None
            if column.requires_grad:
                (gradient,) = torch.autograd.grad(
                    column, output, retain_graph=number < len(columns), allow_unused=True
                )
            if gradient is None:
                raise ValueError(f"the logits don't depend on layer {self.layer!r}")
            for name, function in functions.items():
                maps[name].append(function(activations, _to_grid(gradient, grid)))
        return {name: torch.stack(class_maps, dim=1) for name, class_maps in maps.items()}


def _explainer(classes: Tensor, against: Tensor | None, logits: Tensor) -> Callable[..., Tensor]:
    """A function of logits and their images' numbers that returns the explained ones (m, k)."""
    n, count = logits.shape
    for name, value in (("classes", classes), ("against", against)):
        if value is None:
            continue
        is_shaped = value.ndim in (1, 2) and len(value) == n and 0 not in value.shape
        if value.dtype != torch.int64 or not is_shaped:
            raise ValueError(
                f"{name} must be int64 of shape ({n},) or ({n}, k), got {value.dtype} of "
                f"{tuple(value.shape)}"
            )
        if value.shape != classes.shape:
            raise ValueError(
                f"against must have the shape of classes, {tuple(classes.shape)}, got "
                f"{tuple(value.shape)}"
            )
        if not ((value >= 0) & (value < count)).all():
            low, high = int(value.min()), int(value.max())
            raise ValueError(f"{name} must be in [0, {count}), got {low} to {high}")
    class_columns = classes.view(n, -1)
    against_columns = None if against is None else against.to(logits.device).view(n, -1)

    def explain(logits: Tensor, samples: Tensor | slice = slice(None)) -> Tensor:
        difference = logits.gather(1, class_columns[samples])
        if against_columns is not None:
            difference = difference - logits.gather(1, against_columns[samples])
        return difference

    return explain


def _layer_name(model: nn.Module, layer: str | nn.Module) -> str:
    modules = {name: child for name, child in model.named_modules(remove_duplicate=False) if name}
    if isinstance(layer, str):
        if layer in modules:
            return layer
        matches = difflib.get_close_matches(layer, modules, n=5, cutoff=0.0)
        raise ValueError(f"no layer is named {layer!r}; the nearest are {', '.join(matches)}")
    if not isinstance(layer, nn.Module):
        raise ValueError(f"layer must be a module or its name, got {layer!r}")
    for name, module in modules.items():
        if module is layer:
            return name
    raise ValueError(f"the {type(layer).__name__} given as layer is not in the model")


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = model._orig_mod
        else:
            return model


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, uncompiled, with gradients; after it each module has its own mode again.

    Modes are set one by one: `train` and `eval` may be overridden, and also change children.
    """
    training = [module for module in model.modules() if module.training]
    is_compiled = any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
    # Asking for the stance imports torch._dynamo, which takes seconds
    stance = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
    try:
        for module in training:
            module.training = False
        with stance, torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _like(model: nn.Module, images: Tensor) -> Tensor:
    """The images in the dtype and on the device of the model's weights, and no inference tensor."""
    images = images.detach()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            images = images.to(parameter.device, parameter.dtype)
            break
    return images.clone() if images.is_inference() else images


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(
            f"images must be floats (n, C, H, W), got {images.dtype} of {tuple(images.shape)}"
        )


def _check_methods(methods: Sequence[str]) -> None:
    if isinstance(methods, str) or not methods:
        raise ValueError(f"methods must be a list of names, got {methods!r}")
    for method in methods:
        if method not in CAM_METHODS:
            matches = difflib.get_close_matches(method, CAM_METHODS, n=1)
            hint = (
                f"did you mean {matches[0]!r}?"
                if matches
                else f"there are {', '.join(CAM_METHODS)}"
            )
            raise ValueError(f"no method is named {method!r}; {hint}")


def _check_logits(model: nn.Module, logits: object, n: int) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        kind = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"{type(model).__name__} must give logits ({n}, classes), got {kind}")
