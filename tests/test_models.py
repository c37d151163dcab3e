"""Classifiers: every family builds, runs, keeps its keys, and comes back from its JSON."""

import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from harness import models
from harness.errors import UserError

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
SMALL = [name for name in FAMILIES if models.resolve_stem(name, "auto", 64) == "small"]


def shapes_only(name, classes=7, **flags):
    """A model without memory, on the meta device. regnet computes its widths, so it gets memory."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        return models.build_model(name, classes, **flags)


def device_of(model):
    return next(model.parameters()).device


def shapes(model):
    return {key: value.shape for key, value in model.state_dict().items()}


def tiny(classes=7, **flags):
    return models.build_model("shufflenet_v2_x0_5", classes, image_size=32, **flags)


def filled(model, start=1.0):
    """The state of a model with every floating-point tensor set to a value of its own."""
    state = model.state_dict()
    return {
        key: torch.full_like(v, start + i) if v.is_floating_point() else v.clone()
        for i, (key, v) in enumerate(state.items())
    }


@pytest.mark.parametrize("name", FAMILIES)
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

    where, last = models.head(model)
    assert last.weight.shape[0] == 7 and model.get_submodule(where) is last
    assert where == [key for key in model.state_dict() if key.endswith("weight")][-1][:-7]

    stem = models.resolve_stem(name, "auto", size)
    classes = list("abcdefg")
    config = models.model_config(name, classes, size, (0.5,) * 3, (0.2,) * 3, stem=stem)
    with device_of(model):
        again = models.rebuild_model(json.loads(json.dumps(config)))
    models.load_state(again, model.state_dict())


def test_every_torchvision_classifier_has_a_family():
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) >= 80
    for name in names:
        assert models.resolve_stem(name, "standard", 224) == "standard"
        assert models.library_of(name) == "torchvision"


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
    assert models.resolve_stem(name, "auto", 65) == "standard"


def test_resnet18_with_the_small_stem_is_the_cifar_network():
    model = shapes_only("resnet18", 10, image_size=32)
    facts = {"parameters": 11_173_962, "trainable": 11_173_962, "head": "fc: 512 → 10"}
    assert models.describe(model) == facts
    model.fc.requires_grad_(False)
    assert models.describe(model)["trainable"] == 11_173_962 - 5130


def test_the_check_draws_nothing_and_changes_nothing():
    torch.manual_seed(0)
    ours = models.build_model("mobilenet_v3_small", 7, image_size=32, stem="standard")
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
        models.build_model(name, 7, image_size=32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["fcn_resnet50", "quantized_resnet18", "raft_small"])
def test_what_is_no_classifier_is_unknown(name):
    with pytest.raises(UserError, match="unknown model"):
        models.library_of(name)


@pytest.mark.parametrize("name", ["vgg11_bn", "vit_b_16", "swin_t", "squeezenet1_1", "alexnet"])
def test_small_stem_is_refused_where_there_is_none(name):
    with pytest.raises(UserError, match=r"--stem small.*resnet"):
        models.build_model(name, 7, image_size=64, stem="small")


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1"])
def test_dropout_acts_in_training_only_and_changes_no_key(name):
    torch.manual_seed(0)
    plain = models.build_model(name, 7, image_size=64, dropout=0.0)
    heavy = models.build_model(name, 7, image_size=64, dropout=0.9)
    assert shapes(heavy) == shapes(plain)
    models.load_state(heavy, plain.state_dict())
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


def test_initialise_says_what_it_did():
    model = tiny()
    before = model.state_dict()["conv1.0.weight"].clone()
    assert models.initialise(model, "own") == "own"
    assert torch.equal(model.state_dict()["conv1.0.weight"], before)
    assert models.initialise(model, "auto", torch.Generator().manual_seed(0)) == "kaiming"
    drawn = model.state_dict()["conv1.0.weight"].clone()
    assert not torch.equal(drawn, before)
    models.initialise(model, "kaiming", torch.Generator().manual_seed(0))
    assert torch.equal(model.state_dict()["conv1.0.weight"], drawn)
    assert models.initialise(shapes_only("convnext_tiny", image_size=32)) == "own"
    assert models.initialise(nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(3))) == "own"  # maxvit


def test_a_foreign_config_is_refused():
    config = models.model_config("resnet18", "ab", 32, (0.5,) * 3, (0.2,) * 3, stem="small")
    for key in ("architecture", "num_classes", "pretrained_cfg", "stem", "dropout", "library"):
        with pytest.raises(UserError, match=key):
            models.rebuild_model({k: v for k, v in config.items() if k != key})
    with pytest.raises(UserError, match="resnet18"):
        models.rebuild_model(config | {"architecture": "resnet81"})


# -- weights -------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """What DDP and torch.compile do to the names of a state."""

    def __init__(self, module, name):
        super().__init__()
        self.add_module(name, module)


def test_saved_names_are_the_plain_models_and_tensors_contiguous(tmp_path):
    model = tiny().to(memory_format=torch.channels_last)
    wrapped = Wrapper(Wrapper(model, "_orig_mod"), "module")
    state = models.clean_state_dict(wrapped)
    assert state.keys() == model.state_dict().keys()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    read = models.load_weights(tmp_path)  # a run folder
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_load_state_knows_prefixes_on_both_sides(prefix):
    model = tiny()
    state = filled(model)
    models.load_state(model, {prefix + key: value for key, value in state.items()})
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    models.load_state(Wrapper(model, "_orig_mod"), {k: v + 1 for k, v in state.items()})
    assert all(torch.equal(value, state[key] + 1) for key, value in model.state_dict().items())


def test_a_state_that_does_not_fit_names_keys_and_changes_nothing():
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = filled(model)
    for key in [key for key in state if key.startswith("stage2.0")]:
        del state[key]
    state |= {"conv9.weight": torch.ones(1), "fc.weight": torch.ones(7, 3)}
    with pytest.raises(UserError) as error:
        models.load_state(model, state, "old.pth")
    said = str(error.value)
    assert said.startswith(
        "old.pth does not fit ShuffleNetV2: missing: stage2.0.branch1.0.weight, "
    )
    assert "more; unexpected: conv9.weight; another shape: fc.weight (7, 3) for (7, 1024)" in said
    assert "\n" not in said and len(said) < 300
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_older_files_lack_batch_counters_and_use_older_names():
    model = shapes_only("densenet121", image_size=32)
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    for word in ("norm", "conv"):
        for i in "12":
            old = {k.replace(f".{word}{i}.", f".{word}.{i}."): v for k, v in old.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    models.load_state(model, old)
    model = shapes_only("vit_b_16", image_size=32)
    old = {
        k.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v
        for k, v in model.state_dict().items()
    }
    assert old.keys() != model.state_dict().keys()
    models.load_state(model, old)


class Hostile:
    """An object whose unpickling writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_hostile_file_is_refused_and_nothing_in_it_runs(tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()  # it would
    marker.unlink()
    torch.save({"fc.weight": Hostile(marker)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(marker), protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(UserError, match=f"{name}.*nothing in it was run") as error:
            models.load_weights(tmp_path / name)
        assert "\n" not in str(error.value)
    # And in torchvision's cache, whose files torch.hub would by default unpickle freely.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    torch.save({"fc.weight": Hostile(marker)}, cached)
    with pytest.raises(UserError, match="could not be loaded"):
        models.resolve_weights("IMAGENET1K_V1", "resnet18")
    assert not marker.exists()


def test_bad_weight_files_are_named(tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 no")
    (tmp_path / "notes.txt").write_text("hello")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    torch.save({0: torch.ones(2)}, tmp_path / "numbered.pth")
    (tmp_path / "empty").mkdir()
    names = "torn.safetensors torn.pth notes.txt list.pth numbered.pth empty absent.pth"
    for name in names.split():
        with pytest.raises(UserError, match=name) as error:
            models.load_weights(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_a_pth_file_of_tensors_is_read(tmp_path, nested):
    state = {"fc.weight": torch.arange(6.0).reshape(2, 3)}
    torch.save(state if nested is None else {nested: state, "epoch": 3}, tmp_path / "w.pth")
    assert torch.equal(models.load_weights(tmp_path / "w.pth")["fc.weight"], state["fc.weight"])


def test_a_head_of_another_size_is_replaced_and_said(tmp_path):
    other = tiny(5)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(filled(other), path)
    model = tiny(7)
    new = model.fc.weight.clone()
    said = models.load_pretrained(model, str(tmp_path), "shufflenet_v2_x0_5")
    assert said == f"weights {tmp_path}; head fc is new: 5 classes there, 7 here"
    assert torch.equal(model.fc.weight, new)
    assert model.conv1[0].weight.unique().item() == 1.0
    assert models.load_pretrained(tiny(5), str(path), "shufflenet_v2_x0_5") == f"weights {path}"
    assert models.load_pretrained(model, "none", "shufflenet_v2_x0_5") == "no pretrained weights"
    with pytest.raises(UserError, match="another shape"):
        wider = models.build_model("shufflenet_v2_x1_0", 7, image_size=32)
        models.load_pretrained(wider, str(path), "shufflenet_v2_x1_0")


def test_published_weights_come_from_torchvisions_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "googlenet"
    file = Path(torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1.url).name
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    published = torchvision.models.googlenet(num_classes=1000, init_weights=False)
    torch.save(filled(published), tmp_path / "hub/checkpoints" / file)
    model = models.build_model(name, 7, image_size=224)
    said = models.load_pretrained(model, "default", name)
    assert said.startswith("weights GoogLeNet_Weights.IMAGENET1K_V1; head fc is new: 1000 classes")
    assert model.conv1.conv.weight.unique().item() == 1.0


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="IMAGENET1K_V9, did you mean"):
        models.resolve_weights("IMAGENET1K_V9", "resnet50")

    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"ResNet18_Weights\.IMAGENET1K_V1.*unreachable") as error:
        models.resolve_weights("default", "resnet18")
    assert str(tmp_path / "hub/checkpoints/resnet18-f37072fd.pth") in str(error.value)


# -- timm ----------------------------------------------------------------------------------------


def test_timm_models_by_name_at_their_size():
    pytest.importorskip("timm")
    assert models.library_of("resnet10t") == "timm"
    assert models.library_of("resnet18") == "torchvision"
    model = models.build_model("resnet18", 7, image_size=48, library="timm", dropout=0.5)
    assert type(model).__module__.startswith("timm.") and model.drop_rate == 0.5
    assert models.head(model) == ("fc", model.fc)
    model = models.build_model("vit_tiny_patch16_224", 7, image_size=48)
    assert model(torch.zeros(2, 3, 48, 48)).shape == (2, 7)
    with pytest.raises(UserError, match="timm's resnet10t takes a run folder or a file"):
        models.load_pretrained(model, "default", "resnet10t")
    with pytest.raises(UserError, match="timm's resnet10t has none"):
        models.build_model("resnet10t", 7, image_size=32, stem="small")
    facts = {"stem": "standard", "library": "timm"}
    config = models.model_config(
        "vit_tiny_patch16_224", "abcdefg", 48, (0.5,) * 3, (0.2,) * 3, **facts
    )
    models.load_state(models.rebuild_model(config), model.state_dict())


def test_timm_loads_a_standard_resnet_from_its_folder(tmp_path):
    timm = pytest.importorskip("timm")
    model = models.build_model("resnet18", 7, image_size=64, stem="standard", dropout=0.2).eval()
    config = models.model_config(
        "resnet18", "abcdefg", 64, (0.5,) * 3, (0.2,) * 3, stem="standard", dropout=0.2
    )
    safetensors.torch.save_file(models.clean_state_dict(model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images))
    assert theirs.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
