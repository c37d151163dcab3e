"""The learning rate as a function of the step: literal points, torch's schedulers, the ends."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from tricks.schedule import set_lr, warmup_cosine, warmup_linear


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.1),  # the first step already learns
        (4, 0.5),
        (9, 1.0),  # the peak, after 9 warm-up steps
        (59, 0.5),  # half-way down
        (34, 0.8535533905932737),  # a quarter: (1 + √½) / 2
        (109, 0.0),  # the end, which no step reaches
    ],
)
def test_points(step, factor):
    assert warmup_cosine(step, total_steps=109, warmup_steps=9) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(("total", "warmup"), [(50, 10), (50, 1), (51, 50), (7, 3)])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_equals_torchs_schedulers(total, warmup, final):
    base = 0.4
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    linear = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=final * base)
    reference = lr_scheduler.SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
    for step in range(total):
        ours = base * warmup_cosine(step, total, warmup, final)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-7), step
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.1), (9, 1.0), (34, 0.75), (59, 0.5), (109, 0.0)]
)
def test_points_of_the_line(step, factor):
    assert warmup_linear(step, total_steps=109, warmup_steps=9) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(("total", "warmup", "final"), [(50, 10, 0.0), (7, 3, 0.1), (9, 0, 0.0)])
def test_the_line_equals_torchs_schedulers(total, warmup, final):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    up = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    down = lr_scheduler.LinearLR(optimizer, 1.0, final, total_iters=total - warmup)
    reference = lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[warmup])
    for step in range(total):
        ours = 0.4 * warmup_linear(step, total, warmup, final)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-7), step
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_linear])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 1), (100, 0), (100, 5), (9, 9)])
def test_shape(total, warmup, schedule):
    factors = [schedule(step, total, warmup) for step in range(total)]
    peak = min(warmup, total - 1)
    assert all(0 < factor <= 1 for factor in factors)  # no step is wasted on a rate of 0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if warmup < total:
        assert factors[warmup] == 1.0


def test_the_last_step_is_close_to_the_final_factor():
    assert 0 < warmup_cosine(999, 1000, 50) < 1e-5
    assert warmup_cosine(1000, 1000, 50, final_factor=0.25) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 10, 11), "11"),
        ((0, 10, -1), "-1"),
        ((-1, 10, 2), "-1"),
        ((11, 10, 2), "11"),
        ((0, 10, 2, 1.5), "1.5"),
        ((0, 10, 2, math.nan), "nan"),
    ],
)
def test_what_is_out_of_range_is_named(arguments, named):
    with pytest.raises(ValueError, match=f"got {named}"):
        warmup_cosine(*arguments)


def make_optimizer():
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.5, 0.25)]
    return torch.optim.SGD(groups)


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_groups_keep_their_ratio_and_factors_do_not_compound():
    optimizer = make_optimizer()
    set_lr(optimizer, 0.0)
    assert rates(optimizer) == [0.0, 0.0]
    set_lr(optimizer, 0.5)
    assert rates(optimizer) == [0.25, 0.125]
    set_lr(optimizer, 1.0)
    assert rates(optimizer) == [0.5, 0.25]


def test_the_base_survives_the_optimizers_state_dict():
    optimizer, resumed = make_optimizer(), make_optimizer()
    set_lr(optimizer, 0.125)
    resumed.load_state_dict(optimizer.state_dict())
    set_lr(resumed, 0.5)
    assert rates(resumed) == [0.25, 0.125]


@pytest.mark.parametrize("initial", [None, 0.5])
def test_rates_that_are_tensors_are_set_in_place(initial):
    """A compiled step and a captured graph read the tensor that they have seen."""
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=torch.tensor(0.5))
    (group,) = optimizer.param_groups
    if initial:
        group["initial_lr"] = initial  # a number, as after loading
    rate = group["lr"]
    for factor, expected in ((0.5, 0.25), (0.0, 0.0), (0.125, 0.0625), (1.0, 0.5)):
        set_lr(optimizer, factor)
        assert group["lr"] is rate and rate.item() == expected
    assert float(group["initial_lr"]) == 0.5


def test_groups_that_share_a_tensor_of_a_rate():
    """torch's default for all groups is one tensor: each would scale it again."""
    groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}]
    optimizer = torch.optim.Adam(groups, lr=torch.tensor(0.5))
    for factor in (0.5, 0.25):
        set_lr(optimizer, factor)
        assert [float(lr) for lr in rates(optimizer)] == [0.5 * factor] * 2


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf])
def test_a_factor_that_is_no_factor(factor):
    optimizer = make_optimizer()
    with pytest.raises(ValueError, match=str(factor)):
        set_lr(optimizer, factor)
    assert rates(optimizer) == [0.5, 0.25]
