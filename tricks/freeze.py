"""Train some parts of a network and freeze the others, with their statistics and dropout.

`requires_grad = False` stops the optimizer, not the layer. In train mode a frozen BatchNorm
normalises by the batch and moves its running statistics, and a frozen dropout drops, so the
"frozen" features change in every step (https://github.com/pytorch/pytorch/issues/86590); and eval
mode ends at the next `model.train()`. Here frozen modules are in eval mode and stay there.

Frozen features: Yosinski et al., "How transferable are features in deep neural networks?",
NeurIPS 2014, https://arxiv.org/abs/1411.1792
The head first, then the rest: Kumar et al., "Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution", ICLR 2022, https://arxiv.org/abs/2202.10054
"""

import difflib
import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import accumulate, chain, combinations

import torch
from torch import nn

__all__ = ["freeze_except", "frozen_digest", "unfreeze"]

BatchNorm = nn.modules.batchnorm._BatchNorm
NORM_MODES = ("auto", "eval", "train")


def freeze_except(model: nn.Module, trained: Iterable[str], norm_mode: str = "auto") -> None:
    """Train the parts named in `trained` and freeze the rest of the model, in place.

    Names are those of `named_modules` and `named_parameters`: "layer4" is everything in layer4, and
    not layer40; "class_token" is that parameter. Earlier calls have no effect on the result, so the
    stages of a fine-tuning are calls with more and more names.

    Parameters: those under a name require a gradient, all others don't, and lose their `grad`,
    which would be clipped and applied. A tied parameter is trained if any of its names is.

    Modules: the model is in train mode, except that frozen modules are in eval mode and stay
    there in every later `train()` of the model, of a wrapper around it, of a copy and of an
    unpickled copy. A module is frozen if it has parameters and trains none of them. A module
    without parameters (dropout, stochastic depth) follows the next layer in its parent, in order of
    registration: a dropout before a frozen layer is off, one before the trained head is on. Without
    a next layer it follows the previous one, without any other layer its parent; under one of the
    names it is always on.

    BatchNorm: with "auto" like every module; with "eval" all of them keep their statistics, also
    in trained parts, where their weights and biases still train; with "train" all of them update
    their statistics, also in frozen parts.

    Freeze before the optimizer and DistributedDataParallel read `requires_grad`, and after
    whatever replaces modules, as `SyncBatchNorm.convert_sync_batchnorm` does.

    Raises ValueError, and changes nothing, where `trained` is empty, a name is not the model's, a
    name is inside another one, no parameter is under any name, and for an unknown `norm_mode`.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    >>> freeze_except(model, ["3"])
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['3.weight', '3.bias']
    >>> [part.training for part in model.train()]
    [False, False, True, True]
    """
    if norm_mode not in NORM_MODES:
        raise ValueError(f"norm_mode must be one of {', '.join(NORM_MODES)}, got {norm_mode!r}")
    if isinstance(trained, str):
        raise ValueError(f"trained must be a list of names, got {trained!r}")
    prefixes = list(trained)
    _check_prefixes(model, prefixes)
    trainable = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(_under(name, prefix) for prefix in prefixes)
    }
    if not trainable:
        raise ValueError(f"no parameter to train in {', '.join(prefixes)}")

    unfreeze(model)
    for parameter in model.parameters():
        if id(parameter) not in trainable:
            parameter.requires_grad_(False)
            parameter.grad = None
    placements = list(_placements(model, prefixes))
    train_modules = {
        module for module, frozen in placements if not frozen
    }  # a shared module may also be frozen
    eval_modules = {module for module, frozen in placements if frozen} - train_modules
    norms = {module for module in model.modules() if isinstance(module, BatchNorm)}
    if norm_mode == "eval":
        eval_modules |= norms
    elif norm_mode == "train":
        eval_modules -= norms
    for module in eval_modules:
        # A partial, not a closure: it can be copied and pickled with its module.
        module.train = partial(_stay_in_eval, module)
    model.train()


def unfreeze(model: nn.Module) -> None:
    """Train all of the model: every parameter requires a gradient, every module is in train mode.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> freeze_except(model, ["2"])
    >>> unfreeze(model)
    >>> all(parameter.requires_grad for parameter in model.parameters()), model[1].training
    (True, True)
    """
    for module in model.modules():
        if _is_pinned(module):
            del module.train
    model.requires_grad_(True)
    model.train()


def frozen_digest(model: nn.Module) -> str:
    """A hash, in hex, of everything that `freeze_except` froze, to compare before and after.

    It covers names, dtypes, shapes and bits of the parameters that require no gradient and of the
    buffers of modules kept in eval mode, above all BatchNorm's running statistics. Equal values
    have equal digests on any device and in any memory format. The host waits for tensors on a GPU:
    call it twice a stage, not once a step.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> freeze_except(model, ["2"])
    >>> before = frozen_digest(model)
    >>> _ = model.train()(torch.randn(8, 3))
    >>> frozen_digest(model) == before
    True
    >>> model[1].running_mean[0] += 1e-6
    >>> frozen_digest(model) == before
    False
    """
    tensors = {
        name: tensor for name, tensor in model.named_parameters() if not tensor.requires_grad
    }
    for name, module in model.named_modules():
        if _is_pinned(module):
            tensors.update(module.named_buffers(name, recurse=False))
    digest = hashlib.sha256()  # twice as fast as blake2b where the CPU has instructions for it
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())  # numpy has no bfloat16
    return digest.hexdigest()


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces a frozen module's `train`; modules inside it may still go to train mode."""
    type(module).train(module, mode)
    module.training = False
    return module


def _is_pinned(module: nn.Module) -> bool:
    train = vars(module).get("train")
    return isinstance(train, partial) and train.func is _stay_in_eval


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _check_prefixes(model: nn.Module, prefixes: list[str]) -> None:
    if not prefixes:
        raise ValueError("trained is empty: name the parts to train")
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)} - {""}
    # the names of parameters, and of the modules that contain them
    names = [
        path
        for name, _ in model.named_parameters(remove_duplicate=False)
        for path in accumulate(name.split("."), "{}.{}".format)
    ]
    for prefix in prefixes:
        if prefix not in modules and prefix not in names:
            matches = difflib.get_close_matches(prefix, names, n=1)
            children = ", ".join(dict.fromkeys(name for name in names if "." not in name))
            hint = f"did you mean {matches[0]!r}?" if matches else f"it has {children}"
            raise ValueError(f"nothing in the model is named {prefix!r}; {hint}")
    for a, b in combinations(prefixes, 2):
        if _under(a, b) or _under(b, a):
            raise ValueError(f"{a!r} and {b!r} overlap: give the outer one alone")


def _placements(
    module: nn.Module, prefixes: list[str], name: str = "", frozen: bool = False
) -> Iterator[tuple[nn.Module, bool]]:
    """Each module, once for each of its names, and whether it is frozen under that name."""
    yield module, frozen
    children = list(module.named_children())
    layers = [_frozen_layers(child) for _, child in children]
    for index, (key, child) in enumerate(children):
        inner = f"{name}.{key}" if name else key
        if any(_under(inner, prefix) for prefix in prefixes):
            is_frozen = False
        elif layers[index]:
            is_frozen = all(layers[index])
        else:
            is_frozen = [*chain(*layers[index:]), *reversed([*chain(*layers[:index])]), frozen][0]
        yield from _placements(child, prefixes, inner, is_frozen)


def _frozen_layers(module: nn.Module) -> list[bool]:
    """For each module inside with parameters of its own, in order: whether none is trained."""
    parameter_lists = [list(submodule.parameters(recurse=False)) for submodule in module.modules()]
    return [
        not any(parameter.requires_grad for parameter in parameters)
        for parameters in parameter_lists
        if parameters
    ]
