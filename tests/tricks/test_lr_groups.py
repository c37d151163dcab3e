"""Which parameters decay and how fast each learns; each trainable one is in exactly one group."""

import math

import pytest
import torch
import torchvision
from torch import nn

from tricks.lr_groups import (
    check_groups,
    layer_decay_rates,
    prefix_groups,
    weight_decay_groups,
)


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


def test_a_bias_of_two_dimensions_and_a_scale_of_one_are_spared():
    model = nn.Module()
    model.kernel = nn.Parameter(torch.zeros(2, 2))
    model.bias = nn.Parameter(torch.zeros(2, 2))
    model.scale = nn.Parameter(torch.zeros(2))
    assert names_by_group(model, weight_decay_groups(model, 0.1)) == {
        "weight": ["kernel"],
        "norm_and_bias": ["bias", "scale"],
    }


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


# --- a rate for each part -----------------------------------------------------------------------


def test_table_of_prefixes():
    model = make_model()
    rates = {"3": 0.1, "0": 0.01, "1": 0.02, "2.bias": 0.03, "2.weight": 0.04}
    groups = prefix_groups(model, rates, 5e-4, norm_weight_decay=1e-5)
    assert names_by_group(model, groups) == {
        "3": ["3.weight"],
        "3 (norm, bias)": ["3.bias"],
        "0": ["0.weight"],
        "0 (norm, bias)": ["0.bias"],
        "1 (norm, bias)": ["1.weight", "1.bias"],
        "2.bias (norm, bias)": ["2.bias"],
        "2.weight (norm, bias)": ["2.weight"],
    }
    rows = [(group["label"], group["lr"], group["weight_decay"]) for group in groups]
    assert rows == [
        ("3", 0.1, 5e-4),
        ("3", 0.1, 1e-5),
        ("0", 0.01, 5e-4),
        ("0", 0.01, 1e-5),
        ("1", 0.02, 1e-5),
        ("2.bias", 0.03, 1e-5),
        ("2.weight", 0.04, 1e-5),
    ]
    assert all(len(group) == 5 for group in groups)
    assert prefix_groups(model, rates, 5e-4)[1]["weight_decay"] == 0.0


def test_prefixes_end_at_dots():
    model = nn.ModuleDict({f"layer{i}": nn.Linear(2, 2, bias=False) for i in (4, 40)})
    groups = prefix_groups(model, {"layer4": 0.1, "layer40": 0.2}, 0.0)
    assert names_by_group(model, groups) == {
        "layer4": ["layer4.weight"],
        "layer40": ["layer40.weight"],
    }


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "vit_b_32", "swin_t", "vgg11_bn"]
)
def test_prefixes_of_torchvisions_models_hold_what_weight_decay_groups_hold(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=7)
    parts = list(dict.fromkeys(n.partition(".")[0] for n, _ in model.named_parameters()))
    assert name != "vit_b_32" or "class_token" in parts
    groups = prefix_groups(model, layer_decay_rates(parts, 0.1, 0.5), 5e-4)
    check_groups(model, groups)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in weight_decay_groups(model, 5e-4)[0]["params"]}
    names = names_by_group(model, groups)
    for group in groups:
        assert {n.partition(".")[0] for n in names[group["name"]]} == {group["label"]}


def test_an_optimizer_steps_each_part_by_its_rate():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(prefix_groups(model, {"0": 0.25, "1": 0.5}, 0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        step = {"0": 0.25, "1": 0.5}[name[0]]
        torch.testing.assert_close(parameter.detach(), before[name] - step)


def test_frozen_ones_have_no_group_and_need_no_rate():
    model = make_model()
    model[0].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    groups = prefix_groups(model, {"3": 0.1, "2": 0.1, "1": 0.1}, 0.1)
    check_groups(model, groups)
    assert [group["name"] for group in groups] == ["3", "2 (norm, bias)", "1 (norm, bias)"]


def test_a_tied_one_has_the_rate_of_its_first_name_that_has_one():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5))
    model[2].weight = model[0].weight
    groups = prefix_groups(model, {"2": 0.2, "1": 0.1, "0": 0.3}, 0.0)
    check_groups(model, groups)
    assert names_by_group(model, groups) == {
        "2 (norm, bias)": ["2.bias"],
        "1": ["1.weight"],
        "1 (norm, bias)": ["1.bias"],
        "0": ["0.weight"],
    }
    groups = prefix_groups(model, {"2": 0.2, "1": 0.1}, 0.0)
    check_groups(model, groups)
    assert names_by_group(model, groups)["2"] == ["0.weight"]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"0": 0.1, "1": 0.1, "2": 0.1}, r"no rate for: 3\.weight, 3\.bias$"),
        ({"0.bias": 0.1, "1": 0.1, "2": 0.1, "3": 0.1}, r"no rate for: 0\.weight$"),
        ({}, r"no rate for: 0\.weight, 0\.bias, 1\.weight"),
        ({"3.wieght": 0.1}, r"'3\.wieght'; did you mean '3\.weight'\?"),
        ({"head": 0.1}, r"'head'; it has 0, 1, 2, 3"),
        ({"4": 0.1}, "'4'"),  # a module without parameters
        ({"": 0.1}, "''"),
        ({"3": 0.1, "3.bias": 0.1}, r"'3' and '3\.bias' overlap"),
        ({"3.bias": 0.1, "0": 0.1, "3": 0.1}, r"'3\.bias' and '3' overlap"),
        ({"0": 0.1, "3": 0.0}, r"'3'.*got 0\.0"),
        ({"0": -0.1}, r"'0'.*got -0\.1"),
        ({"0": math.inf}, "'0'.*got inf"),
        ({"0": math.nan}, "'0'.*got nan"),
    ],
)
def test_rates_that_do_not_fit(rates, message):
    with pytest.raises(ValueError, match=message):
        prefix_groups(make_model().append(nn.ReLU()), rates, 0.1)


def test_a_rate_for_what_is_frozen():
    model = make_model()
    model[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'1'.*frozen"):
        prefix_groups(model, {str(i): 0.1 for i in range(4)}, 0.1)
    with pytest.raises(ValueError, match="no trainable parameter"):
        prefix_groups(model.requires_grad_(False), {}, 0.1)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_decay_of_prefixes_that_is_none(value):
    rates = {str(i): 0.1 for i in range(4)}
    with pytest.raises(ValueError, match=str(value)):
        prefix_groups(make_model(), rates, value)
    with pytest.raises(ValueError, match=str(value)):
        prefix_groups(make_model(), rates, 0.1, value)


# --- rates that fall towards the input ----------------------------------------------------------


def test_layer_decay():
    rates = layer_decay_rates(["stem", "body", "neck", "head"], lr=0.3, decay=0.8)
    assert list(rates) == ["stem", "body", "neck", "head"]
    stem, body, neck, head = rates.values()
    assert head == 0.3
    assert (neck, body, stem) == pytest.approx((0.24, 0.192, 0.1536), rel=1e-12)
    assert layer_decay_rates(["a", "b"], 0.3, 1) == {"a": 0.3, "b": 0.3}
    assert layer_decay_rates(["head"], 0.3, 0.1) == {"head": 0.3}


@pytest.mark.parametrize(
    ("blocks", "lr", "decay", "message"),
    [
        ([], 0.1, 0.5, r"\[\]"),
        (["a", "b", "a"], 0.1, 0.5, "'a', 'b', 'a'"),
        (["a"], 0.0, 0.5, r"got 0\.0"),
        (["a"], math.inf, 0.5, "got inf"),
        (["a"], math.nan, 0.5, "got nan"),
        (["a"], 0.1, 0.0, r"got 0\.0"),
        (["a"], 0.1, 1.25, r"got 1\.25"),
        (["a"], 0.1, math.nan, "got nan"),
    ],
)
def test_a_layer_decay_that_is_none(blocks, lr, decay, message):
    with pytest.raises(ValueError, match=message):
        layer_decay_rates(blocks, lr, decay)
