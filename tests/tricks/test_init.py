"""Kaiming-normal weights: the spread, the seed, and that signals keep their size."""

import math

import pytest
import torch
import torchvision
from torch import nn

from tricks.init import dirac_part_, kaiming_normal_


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def resnet():
    model = torchvision.models.resnet18(num_classes=7)
    kaiming_normal_(model, seeded())
    return model


def test_spread_of_every_layer(resnet):
    seen = 0
    for module in resnet.modules():
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            std = math.sqrt(2 / (module.out_channels * kernel))
        elif isinstance(module, nn.Linear):
            std = 0.01
        else:
            continue
        seen += 1
        n = module.weight.numel()
        assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
        assert abs(module.weight.mean().item()) < 5 * std / math.sqrt(n)
    assert seen == 21


def test_norms_and_biases(resnet):
    for name, parameter in resnet.named_parameters():
        if parameter.ndim == 1:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert (parameter == expected).all(), name


def test_the_convolutions_have_torchvisions_spread(resnet):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torchvision.models.resnet18(num_classes=7)
    for ours, reference in zip(resnet.modules(), theirs.modules(), strict=True):
        if isinstance(ours, nn.Conv2d):
            ratio = (ours.weight.std() / reference.weight.std()).item()
            assert ratio == pytest.approx(1, abs=7 / math.sqrt(2 * ours.weight.numel()))


def test_the_seed_decides_and_the_global_stream_is_untouched():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.Linear(5, 7))
    before = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        kaiming_normal_(model, seeded(seed))
        drawn.append([parameter.detach().clone() for parameter in model.parameters()])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_gradients_keep_their_size_through_thirty_layers():
    layers = [
        layer
        for _ in range(30)
        for layer in (nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"), nn.ReLU())
    ]
    model = nn.Sequential(*layers)
    kaiming_normal_(model, seeded())
    images = torch.randn(2, 64, 6, 8, generator=seeded(1)).requires_grad_()
    outputs = model(images)
    direction = torch.randn(outputs.shape, generator=seeded(2))
    (gradient,) = torch.autograd.grad(outputs, images, direction)
    ratio = (gradient.norm() / direction.norm()).item()
    assert 0.3 < ratio < 3  # torch's default initialisation gives 3e-12


def test_what_has_no_affine_weights_or_is_of_another_kind_is_left_alone():
    model = nn.Sequential(
        nn.BatchNorm2d(5, affine=False), nn.LayerNorm(5, bias=False), nn.Embedding(3, 5)
    )
    embedding = model[2].weight.detach().clone()
    kaiming_normal_(model, seeded())
    assert torch.equal(model[2].weight, embedding)
    assert all(parameter.requires_grad for parameter in model.parameters())
    norm = nn.RMSNorm(5)
    nn.init.constant_(norm.weight, 3)
    kaiming_normal_(norm, seeded())
    assert norm.weight.unique().tolist() == [1]


@pytest.mark.parametrize(("inputs", "outputs", "kernel"), [(3, 5, 3), (5, 3, 3), (4, 4, 1)])
def test_the_first_filters_pass_their_channels_on(inputs, outputs, kernel):
    conv = nn.Conv2d(inputs, outputs, kernel, padding="same", bias=False)
    before = conv.weight.clone()
    dirac_part_(conv)
    x = torch.randn(2, inputs, 6, 7, generator=seeded())
    both = min(inputs, outputs)
    assert torch.equal(conv(x)[:, :both], x[:, :both])
    assert torch.equal(conv.weight[both:], before[both:])
    with pytest.raises(ValueError, match="grouped"):
        dirac_part_(nn.Conv2d(4, 4, 3, groups=2))
