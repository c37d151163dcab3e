"""Which parameters decay, and that each trainable one is in exactly one group."""

import math

import pytest
import torch
import torchvision
from torch import nn

from tricks.lr_groups import check_groups, weight_decay_groups


def make_model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.LayerNorm((5, 6)),  # its weight has two dimensions, and is still a norm's
        nn.Linear(6, 2),
    )


def names_by_group(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}


def test_table():
    model = make_model()
    groups = weight_decay_groups(model, 5e-4, norm_weight_decay=1e-5)
    assert names_by_group(model, groups) == {
        "weight": ["0.weight", "3.weight"],
        "norm_and_bias": ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.bias"],
    }
    assert [group["weight_decay"] for group in groups] == [5e-4, 1e-5]


def test_the_norms_are_spared_by_default():
    assert weight_decay_groups(make_model(), 5e-4)[1]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "vit_b_32", "swin_t", "vgg11_bn"]
)
def test_every_parameter_of_torchvisions_models_once(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=7)
    groups = weight_decay_groups(model, 5e-4)
    check_groups(model, groups)
    spared = names_by_group(model, groups)["norm_and_bias"]
    matrices = [
        f"{n}.weight" for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)
    ]
    assert matrices and not set(matrices) & set(spared)


def test_an_optimizer_takes_them_and_decays_only_the_weights():
    model = make_model()
    optimizer = torch.optim.SGD(weight_decay_groups(model, 0.5), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.5 if name in ("0.weight", "3.weight") else 1.0
        assert torch.equal(parameter, before[name] * factor), name


def test_frozen_ones_are_left_out_and_tied_ones_are_there_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    groups = weight_decay_groups(model, 0.1)
    check_groups(model, groups)
    assert names_by_group(model, groups) == {
        "weight": ["0.weight"],
        "norm_and_bias": ["0.bias", "1.bias"],
    }


def test_no_group_is_empty():
    groups = weight_decay_groups(nn.Linear(2, 2, bias=False), 0.1)
    assert [group["name"] for group in groups] == ["weight"]
    with pytest.raises(ValueError, match="no trainable parameter"):
        weight_decay_groups(make_model().requires_grad_(False), 0.1)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_decay_that_is_none(value):
    with pytest.raises(ValueError, match=str(value)):
        weight_decay_groups(make_model(), value)
    with pytest.raises(ValueError, match=str(value)):
        weight_decay_groups(make_model(), 0.1, value)


def test_every_kind_of_stray_is_named():
    model = make_model()
    model[3].requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check_groups(model, [{"params": trainable}])
    with pytest.raises(ValueError, match=r"missing: 0\.weight, 0\.bias$"):
        check_groups(model, [{"params": trainable[2:]}])
    with pytest.raises(ValueError, match=r"repeated: 0\.weight$"):
        check_groups(model, [{"params": trainable}, {"params": trainable[:1]}])
    with pytest.raises(ValueError, match=r"frozen: 3\.bias$"):
        check_groups(model, [{"params": [*trainable, model[3].bias]}])
    with pytest.raises(ValueError, match=r"not the model's: \(2, 9\)$"):
        check_groups(model, [{"params": [*trainable, nn.Parameter(torch.zeros(2, 9))]}])
