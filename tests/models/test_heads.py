"""Heads: found in every family, all of them, and new ones start at a loss of ln(classes)."""

import math

import pytest
import torch
import torch.nn.functional as F

from harness.counters import generator
from harness.models import build
from harness.models.heads import head, heads, last_layers, start_heads, trial_heads
from harness.models.weights import find_weights, load_pretrained

SIZES = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "googlenet": 32,
    "mobilenet_v3_small": 32, "regnet_y_400mf": 32, "resnet18": 32, "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 64, "swin_t": 32, "vgg11_bn": 32, "vit_b_32": 32,
    "tf_efficientnet_lite0": 32, "beit_base_patch16_224": 32, "deit_tiny_distilled_patch16_224": 32,
    "dpn48b": 64, "levit_conv_128s": 224, "caformer_s18": 32, "test_vit2": 32,
    "nf_resnet26": 32,
    "swinv2_cr_tiny_ns_224": 224, "test_convnext": 32,
}  # fmt: skip


def images(n, size):
    return torch.randn(n, 3, size, size, generator=generator(0, "images"))


SLOW = {"swinv2_cr_tiny_ns_224", "vgg11_bn", "vit_b_32", "alexnet", "dpn48b"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in SIZES]
)
def test_a_new_head_starts_at_the_loss_of_a_guess(name):
    """And learns: no part of it stays at zero."""
    size, labels = SIZES[name], torch.arange(8) % 12
    torch.manual_seed(0)
    model = build.build_model(name, 12, image_size=size, stem="standard")
    with torch.no_grad():
        for _, module in heads(model):  # as some constructors draw it
            for parameter in module.parameters():
                parameter.uniform_(-1, 1)
    how = start_heads(model, size, generator(0, "head"))
    assert how == ("N(0, 0.01)" if name == "squeezenet1_1" else "zero")
    assert model.training
    loss = F.cross_entropy(model(images(8, size)), labels)
    assert abs(loss.item() - math.log(12)) < 0.15
    gradients = torch.autograd.grad(loss, [layer.weight for layer in last_layers(model)])
    assert all(gradient.any() for gradient in gradients)


def test_an_mlp_keeps_its_inner_layers():
    model = build.build_model("resnet18", 12, image_size=32, head="mlp")
    inner = head(model)[1][1].weight.clone()
    start_heads(model, 32)
    assert torch.equal(head(model)[1][1].weight, inner) and inner.any()
    assert not head(model)[1][-1].weight.any()


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        ("levit_conv_128s", ["head.linear", "head_dist.linear"]),  # its "classifier" is one alone
        ("repvit_m1", ["head.head.l", "head.head_dist.l"]),  # which reset_classifier leaves away
        ("iformer_m_distilled", ["head.head.l", "head.head_dist.l"]),
        ("caformer_s18", ["head.fc.fc2"]),
        ("resnetv2_18", ["head.fc"]),
    ],
)
def test_all_heads_of_a_timm_network_are_found(name, names):
    model = build.build_model(name, 5, image_size=224)
    assert [name for name, _ in heads(model)] == names
    assert build.blocks(model, name, "timm")[-1] == tuple(names)


def test_weights_of_other_classes_leave_all_heads_new(tmp_path):
    """The second head of a distilled network, too."""
    theirs = build.build_model("timm/repvit_m1", 9, image_size=32)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = build.build_model("timm/repvit_m1", 5, image_size=32)
    loaded = load_pretrained(model, find_weights(str(tmp_path / "theirs.pth"), "timm/repvit_m1"))
    assert loaded.head_is_new and "head.head.l and head.head_dist.l is new" in loaded.text
    start_heads(model, 32)
    loss = F.cross_entropy(model(images(8, 32)), torch.arange(8) % 5)
    assert abs(loss.item() - math.log(5)) < 1e-5


def test_trial_heads_tell_images_apart_and_leave_no_trace():
    model = build.build_model("test_resnet", 5, image_size=32).eval()
    start_heads(model, 32)
    with torch.no_grad():
        assert not model(images(2, 32)).any()
        with trial_heads(model):
            one, other = model(images(2, 32))
            assert not torch.equal(one, other)
        assert not model(images(2, 32)).any()
