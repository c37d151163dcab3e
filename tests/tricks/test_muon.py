"""Muon: torch's own as the reference, SGD for the rest, groups, determinism."""

import pytest
import torch
from torch import nn

from tricks.muon import Muon, muon_groups, orthogonalize


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(8, 32), (32, 8), (16, 16), (1, 5)])
def test_singular_values_come_near_one_and_vectors_stay(rows, columns):
    one = matrix(rows, columns)
    other = orthogonalize(one, steps=5)
    assert other.shape == one.shape and other.dtype == one.dtype
    values = torch.linalg.svdvals(other)
    assert values.min() > 0.3 and values.max() < 1.3
    u, _, v = torch.linalg.svd(one, full_matrices=False)
    rotated = u.T @ other @ v.T  # diagonal where the singular vectors are the same
    assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-4


def test_more_steps_lift_smaller_singular_values():
    few, many = (torch.linalg.svdvals(orthogonalize(matrix(16, 16, 1), s)).min() for s in (1, 5))
    assert few < many


def test_zeros_and_other_shapes():
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        orthogonalize(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("nesterov", [False, True])
def test_directions_are_those_of_torchs_muon(nesterov):
    """torch.optim.Muon keeps the norm free, iterates in bfloat16 and has another scale."""
    ours, theirs = (nn.Parameter(matrix(12, 20)) for _ in range(2))
    mine = Muon([ours], lr=0.1, momentum=0.8, nesterov=nesterov, orthogonal=True)
    torchs = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.0, momentum=0.8, nesterov=nesterov, ns_steps=3
    )
    for step in range(4):
        gradient = matrix(12, 20, seed=step + 1)
        with torch.no_grad():
            ours.mul_(len(ours) ** 0.5 / ours.norm())  # what its step begins with
            before = ours.clone(), theirs.clone()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
        moves = [
            (was - now.detach()).flatten() for was, now in zip(before, (ours, theirs), strict=True)
        ]
        assert torch.cosine_similarity(*moves, dim=0) > 0.999, step


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_other_groups_are_torchs_sgd_to_the_last_digit(momentum, nesterov):
    nesterov = nesterov and momentum > 0
    models = [nn.Linear(5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    arguments = {"lr": 0.3, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.01}
    optimizers = [
        Muon(models[0].parameters(), orthogonal=False, **arguments),
        torch.optim.SGD(models[1].parameters(), **arguments),
    ]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            model(matrix(7, 5, seed=step)).square().mean().backward()
            optimizer.step()
    assert torch.allclose(models[0].weight, models[1].weight, atol=1e-6, rtol=0)
    assert torch.allclose(models[0].bias, models[1].bias, atol=1e-6, rtol=0)


def test_filters_are_moved_by_their_rate_from_a_fixed_norm():
    conv = nn.Conv2d(6, 4, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer = Muon(conv.parameters(), lr=0.0, orthogonal=True)
    conv(torch.randn(2, 6, 5, 5)).square().sum().backward()
    optimizer.step()
    assert conv.weight.norm().item() == pytest.approx(2.0)  # √4, the number of filters
    optimizer.param_groups[0]["lr"] = 0.5
    before = conv.weight.detach().clone()
    optimizer.step()
    moved = (before - conv.weight.detach()).reshape(4, -1) / 0.5
    assert torch.linalg.svdvals(moved).max() < 1.3


def test_parameters_without_a_gradient_stay():
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    optimizer = Muon(layers.parameters(), lr=0.1, orthogonal=False)
    layers[0](torch.ones(1, 3)).sum().backward()
    before = layers[1].weight.clone()
    optimizer.step(lambda: torch.zeros(()))
    assert torch.equal(layers[1].weight, before) and layers[1].weight not in optimizer.state


def test_state_goes_out_and_comes_back():
    def run(steps, state=None, weights=None):
        conv = nn.Conv2d(2, 3, 3)
        conv.load_state_dict(weights or {"weight": torch.ones(3, 2, 3, 3), "bias": torch.ones(3)})
        groups = muon_groups([{"name": "all", "params": list(conv.parameters())}], nn.Linear(1, 1))
        optimizer = Muon(groups, lr=0.1)
        if state:
            optimizer.load_state_dict(state)
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(step))
            conv(x).square().mean().backward()
            optimizer.step()
        return conv.state_dict(), optimizer.state_dict()

    through, _ = run(range(6))
    weights, state = run(range(3))
    resumed, _ = run(range(3, 6), state, weights)
    assert all(torch.equal(resumed[name], through[name]) for name in through)


def test_groups_hold_each_parameter_once():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8), nn.Linear(8, 2))
    position = nn.Parameter(torch.zeros(1, 4, 8))
    groups = [
        {"name": "weight", "params": [p for p in model.parameters() if p.ndim > 1] + [position],
         "weight_decay": 0.1, "lr": 0.5},
        {"name": "norm_and_bias", "params": [p for p in model.parameters() if p.ndim < 2],
         "weight_decay": 0.0, "lr": 2.0},
    ]  # fmt: skip
    cut = muon_groups(groups, model[3])
    assert [g["name"] for g in cut] == ["weight (muon)", "weight", "norm_and_bias"]
    assert [p.shape for p in cut[0]["params"]] == [(8, 3, 3, 3), (8, 8)]
    assert cut[0]["orthogonal"] and cut[0]["weight_decay"] == 0 and cut[0]["lr"] == 0.5
    assert {id(p) for p in cut[1]["params"]} == {id(model[3].weight), id(position)}
    assert cut[1]["weight_decay"] == 0.1 and not cut[1]["orthogonal"]
    assert sum(len(g["params"]) for g in cut) == len(list(model.parameters())) + 1


def test_groups_of_a_generator_and_of_gains():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
    model.gain = nn.Parameter(torch.ones(8, 1, 1, 1))
    cut = muon_groups([{"name": "all", "params": model.parameters()}], model[2])
    assert [tuple(p.shape) for p in cut[0]["params"]] == [(8, 3, 3, 3)]
    assert sum(len(g["params"]) for g in cut) == len(list(model.parameters()))


def test_weights_that_are_all_zero_begin_to_move():
    layer = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = Muon(layer.parameters(), lr=0.1, orthogonal=True)
    layer(matrix(3, 4)).sub(1).square().sum().backward()
    optimizer.step()
    assert layer.weight.isfinite().all() and layer.weight.any()


def test_a_group_added_later_is_checked():
    optimizer = Muon(nn.Linear(2, 2).parameters(), orthogonal=False)
    with pytest.raises(ValueError, match="two dimensions"):
        optimizer.add_param_group({"params": [torch.zeros(3)], "orthogonal": True})


@pytest.mark.parametrize(
    "parameters",
    [
        lambda model: model.parameters(),
        lambda model: model.named_parameters(),
        lambda model: [{"params": model.parameters(), "lr": 0.1}],
    ],
    ids=["parameters", "named_parameters", "groups"],
)
def test_nothing_to_orthogonalise_is_no_silent_sgd(parameters):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"which parameters to orthogonalise.*muon_groups"):
        Muon(parameters(model), lr=0.1)
    assert not any(g["orthogonal"] for g in Muon(parameters(model), orthogonal=False).param_groups)


def test_groups_without_a_filter_are_told_to_be_sgds():
    head = nn.Linear(8, 2)
    (group,) = muon_groups([{"name": "all", "params": head.parameters()}], head)
    assert not Muon([group], lr=0.1).param_groups[0]["orthogonal"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1.0}, "-1.0"),
        ({"momentum": 1.0}, "1.0"),
        ({"weight_decay": -0.1}, "-0.1"),
        ({"orthogonal": True, "weight_decay": 0.1}, "norm is fixed"),
    ],
)
def test_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        Muon([nn.Parameter(torch.ones(2, 2))], **{"orthogonal": False} | arguments)


def test_a_vector_cannot_be_orthogonal():
    with pytest.raises(ValueError, match="two dimensions"):
        Muon([nn.Parameter(torch.ones(2))], orthogonal=True)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_a_withheld_step_changes_nothing_and_others_are_as_ever(momentum):
    """found_inf as fused optimizers have it: the third of four steps is NaN and left out."""
    results = []
    for withholds in (False, True):
        layer = nn.Linear(4, 3)
        with torch.no_grad():
            layer.weight.copy_(matrix(3, 4))
            layer.bias.zero_()
        groups = [{"params": [layer.weight], "orthogonal": True}, {"params": [layer.bias]}]
        optimizer = Muon(groups, lr=0.1, momentum=momentum)
        for step in range(4):
            if step == 2 and not withholds:
                continue
            scale = float("nan") if step == 2 else 1.0
            layer.weight.grad = matrix(3, 4, step + 1) * scale
            layer.bias.grad = matrix(1, 3, step + 1)[0] * scale
            if withholds:
                optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
        moments = [state["momentum_buffer"] for state in optimizer.state.values() if state]
        results.append([layer.weight.detach(), layer.bias.detach(), *moments])
    assert len(results[0]) == (4 if momentum else 2)
    assert all(map(torch.equal, *results))


def test_a_first_step_that_is_withheld_leaves_no_momentum():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([weight], momentum=0.5, orthogonal=False)
    weight.grad, optimizer.found_inf = torch.full((2, 2), float("nan")), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.zeros(2, 2))
