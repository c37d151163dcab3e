"""What --model and --weights name: torchvision, timm, the Hub's cache; preprocessing of each."""

import json
import re
import types

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants

from harness.cli.bounds import fits
from harness.data.preprocessing import Preprocessing, PreprocessingOptions
from harness.data.stored import IMAGENET_STATISTICS
from harness.errors import UserError
from harness.hub import model_file
from harness.models import build
from harness.models.heads import heads
from harness.models.names import Network, find_model
from harness.models.weights import find_weights, load_pretrained
from harness.training import plan
from tricks.lr_groups import weight_decay_groups


@pytest.mark.parametrize(
    ("spec", "network"),
    [
        ("resnet18", Network("torchvision", "resnet18")),
        ("torchvision/resnet18", Network("torchvision", "resnet18")),
        ("timm/resnet18", Network("timm", "resnet18")),
        ("timm/resnet18.a1_in1k", Network("timm", "resnet18", "a1_in1k")),
        ("resnet18.a1_in1k", Network("timm", "resnet18", "a1_in1k")),  # torchvision has no tags
        ("test_resnet", Network("timm", "test_resnet")),
        ("fastnet_small", Network("own", "fastnet_small")),
    ],
)
def test_names(spec, network):
    assert find_model(spec) == network


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("timm/resnet18.a1_in1", 'no weights a1_in1, did you mean "a1_in1k"'),
        ("torchvision/test_resnet", 'unknown model "test_resnet" in torchvision'),
        ("timm/resnet1", 'in timm, did you mean "resnet18'),
        ("keras/resnet18", 'unknown model "keras/resnet18" in torchvision and timm'),
        (
            "hf-hub:none/here",
            "hf-hub:none/here: config.json is not in the cache and the Hub is out",
        ),
    ],
)
def test_a_name_that_is_none_gets_the_nearest(spec, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        find_model(spec)
    assert "\n" not in str(caught.value)


def test_a_forced_name_builds_that_librarys_network():
    assert type(build.build_model("timm/resnet18", 5, image_size=32)).__module__.startswith("timm")
    config = {"dropout": None, "stem": "standard", "num_classes": 5, "library": "timm"}
    config |= {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 32, 32]}}
    assert type(build.rebuild_model(config)).__module__.startswith("timm")


# -- the Hub's cache -----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Fill the Hub's cache as a download would: fill("owner/name", file=bytes or state)."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    find_model.cache_clear()

    def fill(repo, **files):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        for name, content in files.items():
            name = {"config": "config.json", "safe": "model.safetensors"}.get(
                name, "pytorch_model.bin"
            )
            if name.endswith("json"):
                (snapshot / name).write_text(json.dumps(content))
            elif name.endswith("bin"):
                torch.save(content, snapshot / name)
            else:
                safetensors.torch.save_file(content, snapshot / name)

    return fill


def tiny(classes=1000, **flags):
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=classes, **flags)


def test_timms_default_weights_come_through_its_own_cache(cache):
    cfg = timm.get_pretrained_cfg("test_vit")
    state = tiny().state_dict()
    with pytest.raises(UserError, match=r"could not be loaded.*timm.create_model\('test_vit', pre"):
        find_weights("default", "test_vit")
    cache(cfg.hf_hub_id, safe=state)
    for spec, name in (
        ("default", "test_vit"),
        (cfg.tag.partition(".")[2] or "r160_in1k", "timm/test_vit"),
    ):
        found = find_weights(spec, name)
        assert all(torch.equal(found.state[key], value) for key, value in state.items())
        assert found.label == "timm/test_vit.r160_in1k" and found.stem == "standard"
        assert found.classes[285] == "Egyptian cat" and len(found.classes) == 1000
        preprocessing = Preprocessing(160, cfg.crop_pct, cfg.interpolation, cfg.mean, cfg.std)
        assert found.preprocessing == preprocessing
        assert found.origin == "timm's cfg of test_vit.r160_in1k"
    with pytest.raises(UserError, match="test_vit has no weights r160, did you mean"):
        find_weights("r160", "test_vit")
    without = set(timm.list_models()) - {n.partition(".")[0] for n in timm.list_pretrained()}
    with pytest.raises(UserError, match="has no weights"):
        find_weights("default", min(without))


def test_timms_weights_fit_another_size_and_other_classes(cache):
    """Positions are resized as timm does it."""
    state = tiny().state_dict()
    cache(timm.get_pretrained_cfg("test_vit").hf_hub_id, safe=state)
    model = build.build_model("test_vit", 7, image_size=64)
    loaded = load_pretrained(model, find_weights("default", "test_vit"))
    assert "resized as timm does: pos_embed" in loaded.text and loaded.head_is_new
    theirs = timm.create_model("test_vit", pretrained=True, num_classes=7, img_size=64)
    for key, value in theirs.state_dict().items():
        assert key.startswith("head.") or torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("kind", ["safe", "bin"])
def test_a_model_of_the_hub(cache, kind):
    cfg = {
        "input_size": [3, 96, 96], "interpolation": "bilinear", "crop_pct": 0.9, "num_classes": 3,
        "mean": [0.1] * 3, "std": [0.2] * 3,
    }  # fmt: skip
    config = {
        "architecture": "test_vit", "num_classes": 3, "label_names": ["a", "b", "c"],
        "pretrained_cfg": cfg, "model_args": {"class_token": False, "global_pool": "avg"},
    }  # fmt: skip
    state = tiny(3, class_token=False, global_pool="avg").state_dict()
    cache("owner/name", config=config, **{kind: state})
    spec = "hf-hub:owner/name"
    network = find_model(spec)
    assert network[:4] == ("timm", "test_vit", None, spec)
    found = find_weights("default", spec)
    assert found.classes == ["a", "b", "c"] and found.preprocessing.size == 96
    assert found.origin.endswith("config.json")
    model = build.build_model(spec, 3, image_size=96)
    assert not load_pretrained(model, found, ["a", "b", "c"]).head_is_new
    # A run's folder says how to build it again
    written = build.model_config(
        network.name, "abc", 96, cfg["mean"], cfg["std"], stem="standard", library="timm",
        arguments=network.arguments,
    )  # fmt: skip
    assert build.rebuild_model(written).state_dict().keys() == model.state_dict().keys()
    # Its weights alone, for a network of the same name
    assert find_weights(spec, "timm/test_vit").label == spec
    with pytest.raises(UserError, match="holds a test_vit: add --model test_vit"):
        find_weights(spec, "test_resnet")
    model_file(spec, "config.json").write_text(json.dumps({"model_type": "bert"}))
    find_model.cache_clear()
    with pytest.raises(UserError, match="does not say its architecture"):
        find_model(spec)


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained", "num_classes", "features_only"])
def test_a_config_can_t_have_timm_read_files(cache, key):
    cache("owner/evil", config={"architecture": "test_vit", "model_args": {key: "/tmp/x"}})
    with pytest.raises(UserError, match=f"model_args has {key}"):
        find_model("hf-hub:owner/evil")


@pytest.mark.parametrize("size", [224, 256])
def test_weights_of_another_image_size_say_which(tmp_path, size):
    """Where timm can't resize what depends on it."""
    theirs = build.build_model("pit_ti_224", 13, image_size=size)
    torch.save(theirs.state_dict(), tmp_path / "pit.pth")
    found = find_weights(str(tmp_path / "pit.pth"), "pit_ti_224")
    model = build.build_model("pit_ti_224", 10, image_size=128)
    words = rf"another shape: pos_embed .*\. These weights need --image_size {size}$"
    with pytest.raises(UserError, match=words):
        load_pretrained(model, found)
    found.state["pos_embed"] = torch.ones(1, 5)  # of no size
    with pytest.raises(
        UserError, match=r"another shape: pos_embed \(1, 5\) for \(1, 64, 15, 15\)$"
    ):
        load_pretrained(model, found)


# -- preprocessing -------------------------------------------------------------------------------


def test_a_bare_file_for_a_timm_name_takes_its_cfg(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "vit.pth")
    found = find_weights(str(tmp_path / "vit.pth"), "test_vit")
    assert found.preprocessing.size == 160
    assert found.origin == "timm's cfg of test_vit, whose weights they may be"


def test_the_colours_of_all_that_timm_publishes_are_within_the_bounds():
    published = [timm.get_pretrained_cfg(name) for name in timm.list_pretrained()]
    assert len(published) > 1000
    for cfg in published:
        assert all(fits("mean", value) for value in cfg.mean), cfg
        assert all(fits("std", value) for value in cfg.std), cfg


def test_flags_override_and_the_origin_is_said(tmp_path):
    data = types.SimpleNamespace(image_size=32, mean=(0.4,) * 3, std=(0.2,) * 3)
    torch.save(build.build_model("resnet18", 5, image_size=32).state_dict(), tmp_path / "a.pth")
    bare = find_weights(str(tmp_path / "a.pth"), "resnet18")
    unset = PreprocessingOptions()
    assert plan.choose_preprocessing(unset, None, 0.0, data, bare) == Preprocessing(
        32, 1.0, "bilinear", data.mean, data.std
    )
    assert plan.preprocessing_from(unset, bare, data).startswith(
        "assumed (the data set's own mean and std)"
    )
    scratch = find_weights("none", "resnet18")
    assert plan.preprocessing_from(unset, scratch, data) == "the data set's own mean and std"
    unknown = types.SimpleNamespace(mean=IMAGENET_STATISTICS[0], std=IMAGENET_STATISTICS[1])
    assert plan.preprocessing_from(unset, scratch, unknown) == "ImageNet's mean and std"
    options = PreprocessingOptions(0.5, "bicubic", [0.1] * 3, [0.3] * 3)
    wanted = Preprocessing(48, 0.5, "bicubic", (0.1,) * 3, (0.3,) * 3)
    assert plan.choose_preprocessing(options, 48, 0.0, data, bare) == wanted
    words = plan.preprocessing_from(options, bare, data)
    assert words.endswith("; --crop_pct, --interpolation, --mean, --std as given")


def test_another_way_to_cut_is_said(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: torch.nn.Linear(1, 1))
    modes = {name: timm.get_pretrained_cfg(name).crop_mode for name in timm.list_pretrained()}
    found = find_weights("default", next(name for name, mode in modes.items() if mode == "squash"))
    assert found.origin.endswith("(crop_mode squash there, center here)")


# -- blocks and decay ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "first", "last"),
    [
        ("timm/resnet18", 6, "conv1", "layer4"),
        ("test_vit", 8, "cls_token", "blocks.5"),
        ("convnext_atto", 6, "stem", "stages.3"),
        ("swin_tiny_patch4_window7_224", 6, "patch_embed", "layers.3"),
        ("tf_efficientnet_lite0", 9, "conv_stem", "blocks.6"),
        ("deit_tiny_distilled_patch16_224", 14, "cls_token", "blocks.11"),
    ],
)
def test_blocks_of_timm_are_those_of_its_group_matcher(name, number, first, last):
    model = build.build_model(name, 5, image_size=224)
    found = build.blocks(model, name)
    assert len(found) == number and found[0][0] == first and last in found[-2]
    assert found[-1] == tuple(name for name, _ in heads(model))
    parameters = [
        parameter
        for block in found
        for part in block
        for parameter, _ in model.named_parameters()
        if f"{parameter}.".startswith(f"{part}.")
    ]
    assert sorted(parameters) == sorted(name for name, _ in model.named_parameters())
    ours = {n: k for k, block in enumerate(found[:-1]) for p in block for n, _ in
            model.named_parameters() if f"{n}.".startswith(f"{p}.")}  # fmt: skip
    theirs = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert all(theirs[n] in (k, k + 1) for n, k in ours.items())  # norms go with what is before


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("test_vit", "cls_token"),
        ("test_vit", "pos_embed"),
        ("swin_tiny_patch4_window7_224", "relative_position_bias_table"),
        ("swin_t", "relative_position_bias_table"),  # torchvision's says nothing itself
        ("levit_conv_128s", "attention_biases"),
    ],
)
def test_tables_of_positions_do_not_decay(name, word):
    model = build.build_model(name, 5, image_size=224)
    groups = {g["name"]: {id(p) for p in g["params"]} for g in weight_decay_groups(model, 0.1)}
    tables = [p for n, p in model.named_parameters() if word in n]
    assert tables and all(id(p) in groups["norm_and_bias"] for p in tables)
