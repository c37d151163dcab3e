"""Soups: means of weights, and BatchNorm's statistics measured anew."""

import copy
import math

import pytest
import torch
from torch import nn

from tricks.freeze import freeze_except
from tricks.soup import greedy_soup, recompute_batch_norm, uniform_soup


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(5, 2, 1)
    ).append(nn.BatchNorm2d(2))
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 6, 7) + seed)
    return model


def at(value):
    return {"w": torch.tensor([value])}


# --- uniform ------------------------------------------------------------------------------------


def test_uniform_soup_table():
    states = [
        {"w": torch.tensor([[1.0, 2.0]]), "steps": torch.tensor(7)},
        {"w": torch.tensor([[2.0, 4.0]]), "steps": torch.tensor(9)},
        {"w": torch.tensor([[6.0, 0.0]]), "steps": torch.tensor(1)},
    ]
    before = copy.deepcopy(states)
    soup = uniform_soup(states)
    assert list(soup) == ["w", "steps"]
    assert soup["w"].tolist() == [[3.0, 2.0]] and soup["steps"].item() == 7
    soup["w"].zero_(), soup["steps"].zero_()
    assert all(torch.equal(s[k], b[k]) for s, b in zip(states, before, strict=True) for k in b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_soup_of_equal_runs_is_the_run(dtype, count):
    state = make_model().to(dtype).state_dict()
    soup = uniform_soup([state] * count)
    assert soup.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(soup[name], tensor) and soup[name].dtype == tensor.dtype
        assert soup[name].data_ptr() != tensor.data_ptr()


def test_half_precision_is_averaged_in_double():
    # 2048 + 1 is 2048 in fp16: a sum in fp16 would lose all the ones
    states = [{"w": torch.tensor([w], dtype=torch.float16)} for w in (2048.0, *[1.0] * 7)]
    assert uniform_soup(states)["w"].item() == torch.tensor(2055 / 8, dtype=torch.float16).item()


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([], "none"),
        ([at(1.0), {"v": torch.ones(1)}], "states 0 and 1 differ in w, v"),
        ([at(1.0), at(1.0), {**at(1.0), "b": torch.ones(1)}], "states 0 and 2 differ in b"),
        ([at(1.0), {"w": torch.ones(2)}], r"w is torch.float32 of \(1,\).*\(2,\) in state 1"),
        ([at(1.0), {"w": torch.ones(1).double()}], "w is torch.float32.*torch.float64"),
    ],
)
def test_states_that_do_not_mix(states, message):
    with pytest.raises(ValueError, match=message):
        uniform_soup(states)
    with pytest.raises(ValueError, match=message):
        greedy_soup(states, lambda state: 0.0)


# --- greedy -------------------------------------------------------------------------------------


def test_greedy_soup_table():
    # The score is the distance to 10. Alone, ranked: 9 (1), 12 (2), 13 (3), 3 (4), at indices 2,
    # 0, 3, 1. 9 with 12: 10.5, better, kept; with 13: 11.33, worse, left out; with 3: 8, worse.
    calls = []

    def score(state):
        calls.append(round(state["w"].item(), 4))
        return -abs(state["w"].item() - 10)

    soup, chosen = greedy_soup([at(12.0), at(3.0), at(9.0), at(13.0)], score)
    assert chosen == [2, 0] and soup["w"].item() == 10.5
    assert calls == [12, 3, 9, 13, 10.5, 11.3333, 8]


def test_an_equal_score_is_kept_and_an_order_of_equals():
    soup, chosen = greedy_soup([at(1.0), at(2.0), at(6.0)], lambda state: 0.5)
    assert chosen == [0, 1, 2] and soup["w"].item() == 3


def test_one_state_is_its_soup():
    soup, chosen = greedy_soup([at(4.0)], lambda state: -1.0)
    assert chosen == [0] and soup["w"].item() == 4


def test_a_score_of_nan_is_named():
    with pytest.raises(ValueError, match="state 1 is nan"):
        greedy_soup([at(4.0), at(5.0)], lambda state: math.nan if state["w"] == 5 else 1.0)
    with pytest.raises(ValueError, match=r"state 0 \+ 1 is nan"):
        greedy_soup([at(4.0), at(6.0)], lambda state: math.nan if state["w"] == 5 else 1.0)


# --- BatchNorm ----------------------------------------------------------------------------------


def test_statistics_equal_those_of_update_bn_where_nothing_drops():
    batches = torch.randn(3, 4, 3, 6, 7, generator=seeded()) * 3 + 1
    model = make_model()
    model[3].p = 0.0  # update_bn has dropout in train mode
    reference = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, reference)
    recompute_batch_norm(model, batches)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_the_mean_of_each_batchs_statistics():
    batches = [
        torch.tensor([[1.0], [3.0]]),
        torch.tensor([[4.0], [8.0]]),
        torch.tensor([[0.0], [6]]),
    ]
    norm = nn.BatchNorm1d(1, momentum=0.1)
    recompute_batch_norm(norm, iter(batches))
    assert norm.running_mean.item() == pytest.approx((2 + 6 + 3) / 3)
    assert norm.running_var.item() == pytest.approx((2 + 8 + 18) / 3)
    assert norm.num_batches_tracked.item() == 3 and norm.momentum == 0.1


def test_dropout_is_off_and_weights_and_the_random_state_stay():
    batches = torch.randn(2, 4, 3, 6, 7, generator=seeded())
    model = make_model()
    again = copy.deepcopy(model)
    weights = [parameter.clone() for parameter in model.parameters()]
    before = torch.get_rng_state()
    recompute_batch_norm(model, batches)
    assert torch.equal(torch.get_rng_state(), before)
    recompute_batch_norm(again, batches)
    assert torch.equal(model[5].running_var, again[5].running_var)
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_modules_mode_comes_back():
    model = make_model()
    freeze_except(model, ["4"])
    model[3].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    old = model[1].running_mean.clone()
    recompute_batch_norm(model, torch.randn(2, 4, 3, 6, 7))
    assert [module.training for module in model.modules()] == modes
    assert not torch.equal(model[1].running_mean, old)  # frozen, and measured all the same


def test_modes_and_momentum_come_back_after_an_error():
    model = make_model().eval()
    with pytest.raises(RuntimeError):
        recompute_batch_norm(model, [torch.randn(4, 2, 6, 7)])
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1


@pytest.mark.parametrize("failure", ["model", "loader", "interrupt"])
def test_a_batch_that_fails_leaves_the_statistics_as_they_were(failure):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    addresses = [buffer.data_ptr() for buffer in model.buffers()]

    def batches():
        yield torch.randn(4, 3, 6, 7, generator=seeded())
        if failure == "loader":
            raise OSError("disk")
        if failure == "interrupt":
            raise KeyboardInterrupt
        yield torch.randn(4, 2, 6, 7)

    with pytest.raises((RuntimeError, OSError, KeyboardInterrupt)):
        recompute_batch_norm(model, batches())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [buffer.data_ptr() for buffer in model.buffers()] == addresses


@pytest.mark.parametrize("pair", [tuple, list])
def test_a_data_loaders_pairs(pair):
    images = torch.randn(3, 4, 3, 6, 7, generator=seeded())
    model, again = make_model(), make_model()
    recompute_batch_norm(model, images)
    recompute_batch_norm(again, [pair((batch, torch.arange(4))) for batch in images])
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_no_batch_is_an_error_that_touches_nothing():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no batch"):
        recompute_batch_norm(model, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_without_statistics_nothing_is_read():
    def never():
        raise AssertionError
        yield

    recompute_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), never())
    recompute_batch_norm(nn.BatchNorm1d(2, track_running_stats=False), never())


def test_a_soup_of_two_runs_gets_statistics_of_its_own():
    states = [make_model(seed).state_dict() for seed in (0, 3)]
    model = make_model()
    model.load_state_dict(uniform_soup(states))
    batch = torch.randn(64, 3, 6, 7, generator=seeded())
    recompute_batch_norm(model, [batch])
    seen = model[0](batch)
    torch.testing.assert_close(model[1].running_mean, seen.mean((0, 2, 3)))
