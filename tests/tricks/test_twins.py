"""What stands in two files of tricks, as each has to stand alone, does the same in both."""

import inspect

import pytest
import torch
from torch import nn

from tricks import augment, cam, cam_layers, cutmix, freeze, lr_groups, mixup, tta


@pytest.mark.parametrize(("full", "size"), [(40, 16), (16, 40), (7, 7), (300, 1)])
def test_weights_of_resizing(full, size):
    rng = torch.Generator().manual_seed(0)
    length = torch.randint(1, full + 1, (50,), generator=rng).double()
    start = ((full - length) * torch.rand(50, generator=rng)).floor()
    ours = augment._resize_weights(start.clone(), length.clone(), full, size)
    theirs = tta._resize_weights(start, length, full, size)
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=0)


@pytest.mark.parametrize("alpha", [0.001, 0.2, 1.0, 8.0])
def test_draws_from_beta(alpha, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        cutmix, "box_around", lambda row, column, lam, h, w: drawn.append(lam) or (0, 0, 1, 1)
    )
    for seed in range(20):
        cutmix.draw_cutmix(alpha, 32, 32, torch.Generator().manual_seed(seed))
        assert drawn[-1] == mixup.draw_mixup(alpha, torch.Generator().manual_seed(seed))


def test_what_lies_under_a_prefix():
    names = ["a", "a.b", "a.b.c", "ab", "ab.c", "", "b"]
    for name in names:
        for prefix in names:
            assert freeze._under(name, prefix) == lr_groups._under(name, prefix)


@pytest.mark.parametrize("prefix", ["layr1", "x", "layer1.convv"])
def test_the_hint_at_a_prefix_that_matches_nothing(prefix):
    model = nn.Sequential()
    model.add_module("layer1", nn.Sequential())
    model.layer1.add_module("conv", nn.Conv2d(3, 4, 1))
    model.add_module("head", nn.Linear(4, 2))
    hints = []
    for check in (freeze._check_prefixes, lr_groups._check_prefixes):
        with pytest.raises(ValueError, match=prefix) as error:
            check(model, [prefix])
        hints.append(str(error.value).partition(";")[2])
    assert hints[0] == hints[1] and hints[0]


def test_what_class_activation_maps_know_of_a_network():
    """tricks/cam.py and tricks/cam_layers.py have the same helpers, word for word."""
    names = {name for name, item in vars(cam).items() if callable(item) and name.startswith("_")}
    names = {name for name in names if hasattr(cam_layers, name)}
    assert names == {
        "_Grid", "_check_images", "_check_logits", "_evaluating", "_grid_of", "_is_scaled",
        "_like", "_to_grid", "_unwrapped",
    }  # fmt: skip
    for name in names:
        twins = [inspect.getsource(getattr(module, name)) for module in (cam, cam_layers)]
        assert twins[0] == twins[1], name
    assert cam.MAX_PREFIX == cam_layers.MAX_PREFIX
