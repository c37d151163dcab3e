"""Which layer maps are taken from, in networks of every kind."""

import pytest
import torch
from small_networks import (
    images_of,
    resnet18,
    small_cnn,
    small_maxvit,
    small_swin,
    small_vit,
    state_of,
)
from torch import nn

from harness.models.build import FAMILIES, build_model, family_of
from tricks.cam import CAM_METHODS, GradCam
from tricks.cam_layers import find_layer, spatial_layers

CHEAP = CAM_METHODS[:-1]  # Score-CAM runs the network once for every channel


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# family: what builds it, the layer, its positions from images of a height and width
QUICK = ("resnet", "mobilenet", "shufflenet", "squeezenet", "vit", "swin")
LARGE = ("alexnet", "convnext", "inception", "resnext", "swin v2", "vgg", "wide_resnet")
LAYERS = {
    "alexnet": ("alexnet", "features.11", (3, 5), (64, 96)),
    "convnext": ("convnext_tiny", "features", (2, 3), (64, 96)),
    "densenet": ("densenet121", "features", (2, 3), (64, 96)),
    "efficientnet": ("efficientnet_b0", "features", (2, 3), (64, 96)),
    "googlenet": ("googlenet", "inception5b", (2, 3), (64, 96)),
    "inception": ("inception_v3", "Mixed_7c", (1, 2), (96, 128)),
    "maxvit": (small_maxvit, "blocks.1", (4, 4), (32, 32)),
    "mnasnet": ("mnasnet0_5", "layers", (2, 3), (64, 96)),
    "mobilenet": ("mobilenet_v3_small", "features", (2, 3), (64, 96)),
    "mobilenet v2": ("mobilenet_v2", "features", (3, 2), (96, 64)),
    "regnet": ("regnet_y_400mf", "trunk_output", (2, 3), (64, 96)),
    "resnet": ("resnet18", "layer4", (3, 2), (96, 64)),
    "resnext": ("resnext50_32x4d", "layer4", (2, 3), (64, 96)),
    "shufflenet": ("shufflenet_v2_x0_5", "conv5", (2, 3), (64, 96)),
    "squeezenet": ("squeezenet1_1", "classifier.2", (3, 5), (64, 96)),
    "swin": ("swin_t", "norm", (2, 3), (64, 96)),
    "swin v2": ("swin_v2_t", "norm", (3, 2), (96, 64)),
    "vgg": ("vgg11", "features.19", (4, 6), (64, 96)),
    "vit": (small_vit, "encoder.layers.encoder_layer_2.ln_1", (4, 4), (32, 32)),
    "wide_resnet": ("wide_resnet50_2", "layer4", (2, 3), (64, 96)),
}


def test_every_family_is_in_the_table():
    assert {key.split()[0] for key in LAYERS} == FAMILIES.keys()
    for key, (name, *_) in LAYERS.items():
        assert callable(name) or family_of(name) is FAMILIES[key.split()[0]]


@pytest.mark.parametrize(
    "family",
    [
        family
        if family in QUICK
        else pytest.param(family, marks=pytest.mark.sweep if family in LARGE else pytest.mark.slow)
        for family in LAYERS
    ],
)
def test_the_layer_of_every_torchvision_family(family):
    make, layer, positions, size = LAYERS[family]
    if callable(make):
        model = make()
    else:
        model = build_model(make, 5, image_size=max(size), stem="standard").eval()
    before, images = state_of(model), images_of(2, *size)
    assert find_layer(model, images) == layer
    with GradCam(model, layer) as cam:
        seen = cam(images, torch.tensor([1, 4]), CHEAP)
    for method, maps in seen.maps.items():
        assert maps.shape == (2, *positions) and maps.isfinite().all(), method
    found = [found for found in spatial_layers(model, images) if found.name == layer]
    assert found[0].reach > 0.7 and (found[0].height, found[0].width) == positions
    assert state_of(model) == before


TIMM = [
    ("resnet10t", {}, (64, 96), "layer4", (2, 3)),
    ("convnext_atto", {}, (64, 96), "stages", (2, 3)),
    ("efficientnet_b0", {}, (64, 96), "bn2", (2, 3)),
    ("mobilenetv3_small_050", {}, (64, 96), "blocks", (2, 3)),
    pytest.param("vgg11", {}, (64, 96), "features.19", (4, 6), marks=pytest.mark.sweep),
    ("vit_tiny_patch16_224", {"img_size": (64, 96)}, (64, 96), "blocks.11.norm1", (4, 6)),
    (
        "deit_tiny_distilled_patch16_224",
        {"img_size": (64, 96)},
        (64, 96),
        "blocks.11.norm1",
        (4, 6),
    ),
    ("mixer_s32_224", {"img_size": 64}, (64, 64), "norm", (2, 2)),  # a mean over tokens
    ("swinv2_tiny_window8_256", {"img_size": (64, 96)}, (64, 96), "norm", (2, 3)),
]


@pytest.mark.parametrize(("name", "options", "size", "layer", "positions"), TIMM)
def test_the_layer_of_timms_networks(name, options, size, layer, positions):
    timm = pytest.importorskip("timm", reason="timm's networks are optional to users")
    model = timm.create_model(name, pretrained=False, num_classes=5, **options)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else [heads]:
        nn.init.normal_(head.weight)  # some start at zero
    images = images_of(1, *size)
    assert find_layer(model, images) == layer
    with GradCam(model, layer) as cam:
        maps = cam(images, methods=("hirescam",)).maps["hirescam"]
    assert maps.shape == (1, *positions)
    assert maps.ne(0).float().mean() > 0.7


def test_the_positions_of_a_vits_last_block_get_no_gradient():
    """Only its class token is read; the norm before its attention still sees the patches."""
    model, images = small_vit(), images_of(2, 32, 32)
    reach = {layer.name: layer.reach for layer in spatial_layers(model, images)}
    assert reach["encoder.layers.encoder_layer_2.ln_1"] == 1
    assert reach["encoder.layers"] == reach["encoder"] == 0
    with GradCam(model, "encoder.layers") as cam:
        assert not cam(images).maps["gradcam"].any()


def test_a_head_of_zeros_hides_no_layer():
    """torchvision's vit starts with one: no logit depends on anything."""
    model = small_vit()
    nn.init.zeros_(model.heads.head.weight)
    assert find_layer(model, images_of(1, 32, 32)) == "encoder.layers.encoder_layer_2.ln_1"
    # Of a convolution, too
    head = nn.Conv2d(4, 5, 1)
    nn.init.zeros_(head.weight)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), head)
    assert find_layer(model.append(nn.Flatten()), images_of(1)) == "1"


def test_candidates_with_their_shapes():
    """In the order of the pass; the outermost of those that give the same; no shared ReLU."""
    layers = {layer.name: layer for layer in spatial_layers(resnet18(), images_of(3, 64, 96))}
    names = list(layers)
    assert names[0] == "conv1" and names[-1] == "layer4" and "layer4.1" not in names
    assert layers["layer3"][1:] == (256, 4, 6, 1.0, False) and layers["maxpool"].is_pool
    assert not any(name.endswith("relu") for name in names if name != "relu")
    assert not {"avgpool", "fc"} & set(names)

    swin = {layer.name: layer[1:4] for layer in spatial_layers(small_swin(), images_of(1, 32, 48))}
    assert swin["norm"] == (16, 4, 6) and "permute" not in swin  # the same values, permuted


def test_a_pool_is_no_layer_and_neither_is_an_image():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.normalize = nn.InstanceNorm2d(3)
            self.conv, self.pool = nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2)
            self.drop, self.fc = nn.Dropout2d(), nn.Linear(24, 5)

        def forward(self, x):
            return self.fc(self.drop(self.pool(self.conv(self.normalize(x)).relu())).flatten(1))

    layers = spatial_layers(Net(), images_of(2, 8, 12))
    assert [(layer.name, layer.is_pool) for layer in layers] == [("conv", False), ("pool", True)]
    assert find_layer(Net(), images_of(2, 8, 12)) == "conv"


def test_the_norm_before_an_in_place_relu_is_not_the_relu():
    """Both give one tensor; the second changes what is in it."""
    model = small_cnn()
    names = [layer.name for layer in spatial_layers(model, images_of(1))]
    assert names == ["0", "1", "2", "3", "4"]
    assert find_layer(model, images_of(1)) == "4"


def test_a_network_without_positions():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 12, 9), nn.ReLU(), nn.Linear(9, 5))
    with pytest.raises(ValueError, match="no layer with positions") as error:
        find_layer(model, images_of(2, 8, 12))
    assert "\n" not in str(error.value)
    assert spatial_layers(model, images_of(2, 8, 12)) == []


def test_the_search_leaves_no_trace():
    """Also under no_grad, with frozen weights, in training mode and compiled."""
    for make in (small_cnn, small_vit, small_swin):
        model = make().train().requires_grad_(False)
        before, images = state_of(model), images_of(2, 32, 32)
        expected = spatial_layers(model, images)
        with torch.no_grad():
            assert spatial_layers(model, images) == expected
        with torch.inference_mode():
            assert spatial_layers(torch.compile(model), images + 0) == expected
        assert state_of(model) == before


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="images must be floats"):
        find_layer(small_cnn(), torch.zeros(2, 3, 8, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must give logits \(1, classes\), got \(1, 6, 16, 24\)"):
        find_layer(nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1)), images_of(2))
