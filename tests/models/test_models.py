"""Classifiers: every family builds, runs, keeps its keys, and comes back from its JSON."""

import json

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torchvision.transforms.functional import normalize

from harness.errors import UserError
from harness.models import build
from harness.models.names import find_model
from harness.models.weights import clean_state_dict, find_weights, load_state

# name: (image size, the side of the last feature map before the pool at that size).
# One of every family; the small stem up to 64 px where there is one.
FAMILIES = {
    "resnet18": (32, 4),
    "resnext50_32x4d": (32, 4),
    "wide_resnet50_2": (64, 8),
    "densenet121": (32, 4),
    "mobilenet_v2": (32, 2),
    "mobilenet_v3_small": (32, 2),
    "efficientnet_b0": (64, 4),
    "efficientnet_v2_s": (32, 2),
    "convnext_tiny": (32, 4),
    "shufflenet_v2_x0_5": (32, 4),
    "mnasnet0_5": (32, 2),
    "regnet_y_400mf": (32, 2),
    "googlenet": (32, 4),
    "inception_v3": (32, 2),
    "vgg11_bn": (32, 1),
    "alexnet": (64, 1),
    "squeezenet1_1": (64, 3),
    "swin_t": (32, 1),
    "swin_v2_t": (32, 1),
    "vit_b_16": (64, None),
    "maxvit_t": (224, 7),
}
SMALL = [name for name in FAMILIES if build.resolve_stem(name, "auto", 64) == "small"]


def shapes_only(name, classes=7, **flags):
    """A model without memory, on the meta device. regnet computes its widths, so it gets memory."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        return build.build_model(name, classes, **flags)


def device_of(model):
    return next(model.parameters()).device


def shapes(model):
    return {key: value.shape for key, value in model.state_dict().items()}


def tiny(classes=7, **flags):
    return build.build_model("shufflenet_v2_x0_5", classes, image_size=32, **flags)


LARGE = ("densenet121", "efficientnet_v2_s", "inception_v3", "maxvit_t", "swin_v2_t", "vit_b_16")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.sweep) if n in LARGE else n for n in FAMILIES]
)
def test_every_family_builds_runs_and_is_rebuilt(name):
    size, side = FAMILIES[name]
    model = shapes_only(name, image_size=size)
    assert model.training
    seen = []
    for module in model.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    if name.startswith(("densenet", "shufflenet", "mobilenet_v2", "mnasnet")):  # pool in forward
        last = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][-1]
        last.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    for training in (True, False):
        model.train(training)
        assert model(torch.zeros(2, 3, size, size, device=device_of(model))).shape == (2, 7)
    assert side is None or seen[-1] == side

    where, last = build.head(model)
    assert last.weight.shape[0] == 7 and model.get_submodule(where) is last
    assert where == [key for key in model.state_dict() if key.endswith("weight")][-1][:-7]

    stem = build.resolve_stem(name, "auto", size)
    classes = list("abcdefg")
    config = build.model_config(name, classes, size, (0.5,) * 3, (0.2,) * 3, stem=stem)
    with device_of(model):
        again = build.rebuild_model(json.loads(json.dumps(config)))
    load_state(again, model.state_dict())


@pytest.mark.parametrize("size", [9, 20, 32, 33, 64])
def test_fastnet_builds_runs_and_is_rebuilt(size):
    torch.manual_seed(0)  # of 40 seeds one starts at 1.1 at 64 px
    model = build.build_model("fastnet_small", 7, image_size=size)
    logits = model(torch.randn(4, 3, size, size))
    assert logits.shape == (4, 7) and logits.abs().max() < 1  # it starts near equal odds
    where, last = build.head(model)
    assert where == "fc" and last.weight.shape == (7, 128)
    config = build.model_config("fastnet_small", list("abcdefg"), size, (0.5,) * 3, (0.2,) * 3,
                                 stem="standard", library="own")  # fmt: skip
    load_state(build.rebuild_model(json.loads(json.dumps(config))), model.state_dict())
    names = [name for block in build.blocks(model, "fastnet_small") for name in block]
    held = [
        n for n, _ in model.named_parameters() if sum(n.startswith(f"{x}.") for x in names) == 1
    ]
    assert held == [n for n, _ in model.named_parameters()]


def test_fastnet_starts_whitened_and_passing_on():
    model = build.build_model("fastnet", 10, image_size=32)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen[0] == "whitening.weight" and len(frozen) == 7  # and BatchNorm's scales
    assert build.initialise(model, "auto") == "own"
    images = torch.randn(300, 3, 32, 32)
    build.whiten(model, lambda n: images[:n])
    outputs = model.whitening(images).transpose(0, 1).flatten(1)[:12]
    assert torch.allclose(outputs @ outputs.T / outputs.shape[1], torch.eye(12), atol=0.02)
    x = torch.rand(2, 256, 8, 8)
    assert torch.equal(model.layers[2][0](x), x)
    build.whiten(shapes_only("resnet18", image_size=32), None)  # others are left alone


def test_fastnet_is_named_in_errors_and_has_no_small_stem(tmp_path):
    with pytest.raises(UserError, match='did you mean "fastnet"'):
        build.build_model("fasnet", 10, image_size=32)
    assert build.resolve_stem("fastnet", "auto", 32) == "standard"
    with pytest.raises(UserError, match="fastnet"):
        build.build_model("fastnet", 10, image_size=8)
    model = build.build_model("fastnet", 10, image_size=32, dropout=0.3)
    assert build.head(model)[1].p == 0.3


def test_the_first_size_has_to_be_one_that_the_network_runs_at():
    model = build.build_model("fastnet", 10, image_size=32)
    assert build.check_start_size(model, "fastnet", None, 32) == 32
    assert build.check_start_size(model, "fastnet", 20, 32) == 20 and model.training
    with pytest.raises(UserError, match="--start_size 8: fastnet does not run at that size"):
        build.check_start_size(model, "fastnet", 8, 32)
    with pytest.raises(UserError, match="--start_size 33 is above the image size, 32"):
        build.check_start_size(model, "fastnet", 33, 32)


def test_one_image_and_one_place_are_too_few_for_batch_norm():
    model = build.build_model("resnet18", 10, image_size=16)  # 1 × 1 at the end, with this stem
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="one image a forward pass"):
        build.check_microbatch(model, 1, 8)
    build.check_microbatch(model, 2, 8)
    build.check_microbatch(model, 1, 64)
    build.check_microbatch(model.eval(), 1, 8)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_every_torchvision_classifier_has_a_family():
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) >= 80
    for name in names:
        assert build.resolve_stem(name, "standard", 224) == "standard"
        assert find_model(name).library == "torchvision"


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", SMALL)
def test_small_stem_is_one_3x3_convolution_of_stride_1(name):
    model = shapes_only(name, image_size=64)
    convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (convolution.kernel_size, convolution.stride) == ((3, 3), (1, 1))
    with device_of(model):
        standard = torchvision.models.get_model(name, num_classes=7)
    convolution = next(m for m in standard.modules() if isinstance(m, nn.Conv2d))
    assert convolution.stride > (1, 1)
    assert shapes(model).keys() <= shapes(standard).keys()  # some have auxiliary heads there
    assert build.resolve_stem(name, "auto", 65) == "standard"
    kernel = build.family_of(name).stem_kernel
    assert convolution.kernel_size == (kernel, kernel)


def test_resnet18_with_the_small_stem_is_the_cifar_network():
    model = shapes_only("resnet18", 10, image_size=32)
    facts = {"parameters": 11_173_962, "trainable": 11_173_962, "head": "fc: 512 → 10"}
    assert build.describe(model) == facts
    model.fc.requires_grad_(False)
    assert build.describe(model)["trainable"] == 11_173_962 - 5130


def test_the_check_draws_nothing_and_changes_nothing():
    torch.manual_seed(0)
    ours = build.build_model("mobilenet_v3_small", 7, image_size=32, stem="standard")
    after = torch.rand(3)
    torch.manual_seed(0)
    plain = torchvision.models.mobilenet_v3_small(num_classes=7)
    assert torch.equal(after, torch.rand(3))
    for key, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize(
    "name, size, said",
    [
        ("alexnet", 32, "--image_size 64"),
        ("vgg11_bn", 16, "--image_size 32"),
        ("maxvit_t", 64, "--image_size 224"),
        ("vit_b_16", 100, "--image_size 96"),
    ],
)
def test_a_size_that_does_not_run_names_the_nearest_that_does(name, size, said):
    with pytest.raises(UserError, match=f"{name}.* {size} px: .*{said}$"):
        shapes_only(name, image_size=size)


@pytest.mark.parametrize(
    "name, said",
    [("resnet19", "resnet18|resnet10|resnet1"), ("Resnet18", "resnet18"), ("zzzz", "zzzz")],
)
def test_an_unknown_model_names_the_nearest(name, said):
    with pytest.raises(UserError, match=said) as error:
        build.build_model(name, 7, image_size=32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["fcn_resnet50", "quantized_resnet18", "raft_small"])
def test_what_is_no_classifier_is_unknown(name):
    with pytest.raises(UserError, match="unknown model"):
        find_model(name)


@pytest.mark.parametrize("name", ["vgg11_bn", "vit_b_16", "swin_t", "squeezenet1_1", "alexnet"])
def test_small_stem_is_refused_where_there_is_none(name):
    with pytest.raises(UserError, match=r"--stem small.*resnet"):
        build.build_model(name, 7, image_size=64, stem="small")


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1"])
def test_dropout_acts_in_training_only_and_changes_no_key(name):
    torch.manual_seed(0)
    plain = build.build_model(name, 7, image_size=64, dropout=0.0)
    heavy = build.build_model(name, 7, image_size=64, dropout=0.9)
    assert shapes(heavy) == shapes(plain)
    load_state(heavy, plain.state_dict())
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), heavy.eval()(images))
        for model in (plain, heavy):
            model.train()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()  # so that only dropout tells training from evaluation
        assert torch.equal(plain(images), plain(images))
        assert not torch.equal(heavy(images), heavy(images))


def test_dropout_none_is_the_models_own():
    def rate(dropout):
        model = shapes_only("efficientnet_b0", image_size=32, dropout=dropout)
        return model.classifier[0].p

    assert (rate(None), rate(0.0), rate(0.4)) == (0.2, 0.0, 0.4)
    vgg = shapes_only("vgg11_bn", image_size=32, dropout=0.3)
    assert {m.p for m in vgg.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert type(tiny(dropout=0.0).fc) is nn.Linear
    head = shapes_only("maxvit_t", image_size=224, dropout=0.3).classifier[5]  # has no bias
    assert head.p == 0.3 and head.bias is None and "dropout=0.3" in repr(head)


def test_dropout_zeroes_a_share_of_the_heads_input():
    head = tiny(dropout=0.25).fc
    nn.init.ones_(head.weight), nn.init.zeros_(head.bias)
    torch.manual_seed(0)
    kept = head(torch.ones(200, head.in_features)).mean() / head.in_features
    assert kept.item() == pytest.approx(1, abs=0.01)
    head.p = 1.0
    assert not head(torch.ones(2, head.in_features)).any()


def kinds(module):
    return [(type(m).__name__, getattr(m, "p", None)) for m in module]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("resnet18", "fc: 512 → 256 → 7"),
        ("vgg11_bn", "classifier.6: 4096 → 256 → 7"),
        ("mobilenet_v3_small", "classifier.3: 1024 → 256 → 7"),
        ("vit_b_16", "heads.head: 768 → 256 → 7"),
        pytest.param("maxvit_t", "classifier.5: 512 → 256 → 7", marks=pytest.mark.sweep),
    ],
)
def test_an_mlp_takes_the_place_of_the_last_layer(name, line):
    size = FAMILIES[name][0]
    linear = shapes_only(name, image_size=size)
    model = shapes_only(name, image_size=size, head="mlp")
    assert build.describe(model)["head"] == line
    where, last = build.head(model)
    assert where == build.head(linear)[0] and last is model.get_submodule(where)
    assert kinds(last) == [
        ("Dropout", 0.5), ("Linear", None), ("ReLU", None), ("Dropout", 0.3), ("Linear", None)
    ]  # fmt: skip
    assert model(torch.zeros(2, 3, size, size, device=device_of(model))).shape == (2, 7)
    assert {device_of(model)} == {p.device for p in model.parameters()}
    others = {key: shape for key, shape in shapes(model).items() if not key.startswith(where)}
    assert others.items() <= shapes(linear).items()
    config = build.model_config(
        name, list("abcdefg"), size, (0.5,) * 3, (0.2,) * 3, stem=build.resolve_stem(
            name, "auto", size
        ), head="mlp",
    )  # fmt: skip
    with device_of(model):
        load_state(build.rebuild_model(json.loads(json.dumps(config))), model.state_dict())


def test_what_an_mlp_cannot_be():
    with pytest.raises(UserError, match="squeezenet1_1's last layer is a Conv2d"):
        shapes_only("squeezenet1_1", image_size=64, head="mlp")
    with pytest.raises(UserError, match="--dropout with --head mlp: resnet18 has no dropout"):
        shapes_only("resnet18", image_size=32, head="mlp", dropout=0.3)
    with pytest.raises(UserError, match='unknown head "mpl"'):
        shapes_only("resnet18", image_size=32, head="mpl")


def test_dropout_leaves_the_mlps_own():
    model = shapes_only("mobilenet_v3_small", image_size=32, head="mlp", dropout=0.1)
    assert [m.p for m in model.classifier.modules() if isinstance(m, nn.Dropout)] == [0.1, 0.5, 0.3]
    model = shapes_only("resnet18", image_size=32, head="mlp", dropout=0.0)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.3]


# -- blocks --------------------------------------------------------------------------------------


def owners(model, found):
    """For each parameter, in the model's order, the numbers of the blocks it is in."""
    return {
        name: [
            i
            for i, block in enumerate(found)
            for prefix in block
            if name == prefix or name.startswith(f"{prefix}.")
        ]
        for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("name", "head"),
    [*((name, "linear") for name in FAMILIES), ("vgg11_bn", "mlp"), ("googlenet", "mlp")],
)
def test_blocks_hold_every_parameter_once_from_the_input_to_the_head(name, head):
    model = shapes_only(name, image_size=FAMILIES[name][0], head=head)
    found = build.blocks(model, name)
    numbers = owners(model, found)
    assert {len(number) for number in numbers.values()} == {1}
    order = [number for [number] in numbers.values()]
    assert order == sorted(order) and len(found) >= 5
    assert found[-1] == (build.head(model)[0],)
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    assert numbers[f"{first}.weight"] == [0]
    # none is of norms and biases alone
    matrices = {numbers[key][0] for key, p in model.named_parameters() if p.ndim > 1}
    assert matrices == set(range(len(found)))


def steps(text, numbers):
    return [(f"{text}.{n}",) for n in numbers]


RESNET = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",), ("fc",)]
BLOCKS = {
    "resnet50": RESNET,
    "vit_b_16": [
        ("class_token", "conv_proj", "encoder.pos_embedding"),
        *[(f"encoder.layers.encoder_layer_{n}",) for n in range(11)],
        ("encoder.layers.encoder_layer_11", "encoder.ln"),
        ("heads.head",),
    ],
    "vgg16": [
        *steps("features", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
        *steps("classifier", (0, 3, 6)),
    ],
    "densenet121": [
        ("features.conv0", "features.norm0"),
        ("features.denseblock1",),
        ("features.transition1",),
        ("features.denseblock2",),
        ("features.transition2",),
        ("features.denseblock3",),
        ("features.transition3",),
        ("features.denseblock4", "features.norm5"),
        ("classifier",),
    ],
    "mobilenet_v3_small": [*steps("features", range(13)), *steps("classifier", (0, 3))],
    "convnext_tiny": [
        *steps("features", range(7)),
        ("features.7", "classifier.0"),
        ("classifier.2",),
    ],
    "swin_t": [*steps("features", range(7)), ("features.7", "norm"), ("head",)],
    "regnet_y_400mf": [("stem",), *steps("trunk_output", ("block1", "block2", "block3", "block4")),
                       ("fc",)],
    "maxvit_t": [("stem",), *steps("blocks", range(3)), ("blocks.3", "classifier.2"),
                 ("classifier.3",), ("classifier.5",)],
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of(name):
    model = shapes_only(name, image_size=FAMILIES.get(name, (32,))[0])
    assert build.blocks(model, name) == BLOCKS[name]


def test_initialise_says_what_it_did():
    model = tiny()
    before = model.state_dict()["conv1.0.weight"].clone()
    assert build.initialise(model, "own") == "own"
    assert torch.equal(model.state_dict()["conv1.0.weight"], before)
    assert build.initialise(model, "auto", torch.Generator().manual_seed(0)) == "kaiming"
    drawn = model.state_dict()["conv1.0.weight"].clone()
    assert not torch.equal(drawn, before)
    build.initialise(model, "kaiming", torch.Generator().manual_seed(0))
    assert torch.equal(model.state_dict()["conv1.0.weight"], drawn)
    assert build.initialise(shapes_only("convnext_tiny", image_size=32)) == "own"
    assert build.initialise(nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(3))) == "own"  # maxvit


def test_a_foreign_config_is_refused():
    config = build.model_config("resnet18", "ab", 32, (0.5,) * 3, (0.2,) * 3, stem="small")
    for key in ("architecture", "num_classes", "pretrained_cfg", "stem", "dropout", "library"):
        with pytest.raises(UserError, match=key):
            build.rebuild_model({k: v for k, v in config.items() if k != key})
    with pytest.raises(UserError, match="resnet18"):
        build.rebuild_model(config | {"architecture": "resnet81"})


def test_the_config_says_how_images_are_prepared_and_which_head():
    facts = {"stem": "small", "crop_pct": 7 / 8, "interpolation": "bicubic"}
    config = build.model_config("resnet18", "ab", 32, (0.5,) * 3, (0.2,) * 3, **facts)
    cfg = config["pretrained_cfg"]
    assert (cfg["crop_pct"], cfg["interpolation"], config["head"]) == (0.875, "bicubic", "linear")
    plain = build.model_config("resnet18", "ab", 32, (0.5,) * 3, (0.2,) * 3, stem="small")
    cfg = plain["pretrained_cfg"]
    assert (cfg["crop_pct"], cfg["interpolation"]) == (1.0, "bilinear")
    del plain["head"]  # as older folders have it
    with torch.device("meta"):
        assert type(build.rebuild_model(plain).fc) is nn.Linear


class Seen(Exception):
    """What the first convolution of a network was about to take."""


def first_input(model, images):
    def stop(module, inputs):
        raise Seen(inputs[0])

    next(m for m in model.modules() if isinstance(m, nn.Conv2d)).register_forward_pre_hook(stop)
    with pytest.raises(Seen) as seen:
        model(images)
    return seen.value.args[0]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_published_weights_that_expect_other_colours_than_their_metadata_says(name):
    """torchvision's own model, as its builder makes it for published weights, on its transforms."""
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    published = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, transform_input=True, init_weights=False)
        ours = build.build_model(name, 7, image_size=96, stem="standard")
    normalised = normalize(images, published.mean, published.std)
    expected = first_input(theirs, normalised)
    mean, std = build.family_of(name).colours
    torch.testing.assert_close(first_input(ours, normalize(images, mean, std)), expected)
    assert not torch.allclose(normalised, expected, atol=0.1)


# -- timm ----------------------------------------------------------------------------------------


def test_timm_models_by_name_at_their_size():
    pytest.importorskip("timm")
    assert find_model("resnet10t").library == "timm"
    assert find_model("resnet18").library == "torchvision"
    model = build.build_model("resnet18", 7, image_size=48, library="timm", dropout=0.5)
    assert type(model).__module__.startswith("timm.") and model.drop_rate == 0.5
    assert build.head(model) == ("fc", model.fc)
    model = build.build_model("vit_tiny_patch16_224", 7, image_size=48)
    assert model(torch.zeros(2, 3, 48, 48)).shape == (2, 7)
    with pytest.raises(UserError, match="timm's resnet10t could not be loaded"):
        find_weights("default", "resnet10t")
    with pytest.raises(UserError, match="timm's resnet10t has none"):
        build.build_model("resnet10t", 7, image_size=32, stem="small")
    assert build.resolve_stem("mixer_s32_224", "auto", 32) == "standard"
    facts = {"stem": "standard", "library": "timm"}
    config = build.model_config(
        "vit_tiny_patch16_224", "abcdefg", 48, (0.5,) * 3, (0.2,) * 3, **facts
    )
    load_state(build.rebuild_model(config), model.state_dict())


TIMM_BLOCKS = {
    "resnet10t": RESNET,
    "vit_tiny_patch16_224": [
        ("cls_token", "pos_embed", "patch_embed"),
        *steps("blocks", range(11)),
        ("blocks.11", "norm"),
        ("head",),
    ],
    "convnext_atto": [
        ("stem",),
        *steps("stages", range(3)),
        ("stages.3", "head.norm"),
        ("head.fc",),
    ],
    "mobilenetv3_small_050": [
        ("conv_stem", "bn1"),
        *steps("blocks", range(6)),
        ("conv_head",),
        ("classifier",),
    ],
}


@pytest.mark.parametrize("name", TIMM_BLOCKS)
def test_blocks_of_timms(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    found = build.blocks(model, name)
    assert found == TIMM_BLOCKS[name]
    assert all(len(number) == 1 for number in owners(model, found).values())


def test_an_mlp_in_timms_model():
    pytest.importorskip("timm")
    model = build.build_model("convnext_atto", 7, image_size=32, head="mlp")
    assert build.describe(model)["head"] == "head.fc: 320 → 256 → 7"
    assert build.blocks(model, "convnext_atto") == TIMM_BLOCKS["convnext_atto"]


def test_timm_loads_a_standard_resnet_from_its_folder(tmp_path):
    timm = pytest.importorskip("timm")
    model = build.build_model("resnet18", 7, image_size=64, stem="standard", dropout=0.2).eval()
    config = build.model_config(
        "resnet18", "abcdefg", 64, (0.5,) * 3, (0.2,) * 3, stem="standard", dropout=0.2
    )
    safetensors.torch.save_file(clean_state_dict(model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images))
    assert theirs.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]


def test_a_strided_convolution_of_one_pixel_has_the_gradient_of_fp32_in_bf16():
    """oneDNN fills taps that see only padding with memory that nobody wrote: often NaN."""
    torch.manual_seed(0)
    model = build.build_model("test_resnet", 10, image_size=16).train()
    torch.nn.init.ones_(model.layer4[0].bn2.weight)  # timm's 0 lets no gradient through
    images, junk = torch.randn(24, 3, 16, 16), [torch.full((50_000,), torch.nan) for _ in range(20)]
    del junk
    convolution = model.get_submodule("layer4.0.conv1")  # stride 2 on one pixel
    for _ in range(20):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images).float().square().mean().backward()
        gradient = convolution.weight.grad
        assert gradient[..., 1, 1].abs().max() > 0 and gradient.isfinite().all()
        beside = gradient.clone()
        beside[..., 1, 1] = 0
        assert not beside.any()
    with torch.no_grad():
        one = torch.randn(2, convolution.in_channels, 1, 1)
        plain = torch.nn.functional.conv2d(one, convolution.weight, stride=2, padding=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            padded = convolution(one)
    torch.testing.assert_close(padded.float(), plain, atol=0.02, rtol=0.02)
