"""Weights: what is known of them, that nothing is unpickled, and what of them is loaded."""

import json
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torchvision.transforms.functional import pil_modes_mapping

from harness.data.pixels import FILTERS
from harness.data.preprocessing import Preprocessing
from harness.errors import UserError
from harness.models import build
from harness.models.reading import load_weights
from harness.models.weights import (
    Pretrained,
    clean_state_dict,
    find_weights,
    load_pretrained,
    load_state,
)


def tiny(classes=7, **flags):
    return build.build_model("shufflenet_v2_x0_5", classes, image_size=32, **flags)


def shapes_only(name):
    with torch.device("meta"):
        return build.build_model(name, 7, image_size=32)


def filled(model, start=1.0):
    """The state of a model with every floating-point tensor set to a value of its own."""
    state = model.state_dict()
    return {
        key: torch.full_like(v, start + i) if v.is_floating_point() else v.clone()
        for i, (key, v) in enumerate(state.items())
    }


# -- states --------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """What DDP and torch.compile do to the names of a state."""

    def __init__(self, module, name):
        super().__init__()
        self.add_module(name, module)


def test_saved_names_are_the_plain_models_and_tensors_contiguous(tmp_path):
    model = tiny().to(memory_format=torch.channels_last)
    wrapped = Wrapper(Wrapper(model, "_orig_mod"), "module")
    state = clean_state_dict(wrapped)
    assert state.keys() == model.state_dict().keys()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    read = load_weights(tmp_path)  # a run folder
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_load_state_knows_prefixes_on_both_sides(prefix):
    model = tiny()
    state = filled(model)
    load_state(model, {prefix + key: value for key, value in state.items()})
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    load_state(Wrapper(model, "_orig_mod"), {k: v + 1 for k, v in state.items()})
    assert all(torch.equal(value, state[key] + 1) for key, value in model.state_dict().items())


def test_a_state_that_does_not_fit_names_keys_and_changes_nothing():
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = filled(model)
    for key in [key for key in state if key.startswith("stage2.0")]:
        del state[key]
    state |= {"conv9.weight": torch.ones(1), "fc.weight": torch.ones(7, 3)}
    with pytest.raises(UserError) as error:
        load_state(model, state, "old.pth")
    said = str(error.value)
    assert said.startswith(
        "old.pth does not fit ShuffleNetV2: missing: stage2.0.branch1.0.weight, "
    )
    assert "more; unexpected: conv9.weight; another shape: fc.weight (7, 3) for (7, 1024)" in said
    assert "\n" not in said and len(said) < 300
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_older_files_lack_batch_counters_and_use_older_names():
    model = shapes_only("densenet121")
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    for word in ("norm", "conv"):
        for i in "12":
            old = {k.replace(f".{word}{i}.", f".{word}.{i}."): v for k, v in old.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    load_state(model, old)
    model = shapes_only("vit_b_16")
    old = {
        k.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v
        for k, v in model.state_dict().items()
    }
    assert old.keys() != model.state_dict().keys()
    load_state(model, old)


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
            load_weights(tmp_path / name)
        assert "\n" not in str(error.value)
    # And in torchvision's cache, whose files torch.hub would by default unpickle freely.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    torch.save({"fc.weight": Hostile(marker)}, cached)
    with pytest.raises(UserError, match="could not be loaded"):
        find_weights("IMAGENET1K_V1", "resnet18")
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
            load_weights(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_a_pth_file_of_tensors_is_read(tmp_path, nested):
    state = {"fc.weight": torch.arange(6.0).reshape(2, 3)}
    torch.save(state if nested is None else {nested: state, "epoch": 3}, tmp_path / "w.pth")
    assert torch.equal(load_weights(tmp_path / "w.pth")["fc.weight"], state["fc.weight"])


# -- into a model --------------------------------------------------------------------------------


def small(classes, head="linear", width=5):
    """A body and a head under the names of a network."""
    last = nn.Linear(width, classes) if head == "linear" else build.MlpHead(width, classes)
    return nn.Sequential(OrderedDict(body=nn.Linear(4, width), norm=nn.BatchNorm1d(width), fc=last))


def found(model, path="w.pth", **facts):
    """The filled state of a model, as `find_weights` gives it."""
    return Pretrained(filled(model), path, **facts)


def body_and_head(model):
    """Whether the body was loaded (all of it is filled), and whether the head was."""
    where, _ = build.head(model)
    loaded = {False: set(), True: set()}
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            loaded[key.startswith(f"{where}.")].add(bool((value == value.flatten()[0]).all()))
    assert loaded[False] == {True}
    (whole,) = loaded[True]
    return whole


LETTERS = list("abcdefg")
OTHERS = list("tuvwxyz")


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (dict(classes=7), ""),
        (dict(classes=5), "; head fc is new: 5 classes there, 7 here"),
        (dict(classes=5, head="mlp"), "; head fc is new: 5 classes there, 7 here"),
        (dict(classes=7, head="mlp"), "; head fc is new: another kind there"),
    ],
)
def test_a_head_that_does_not_fit_is_replaced_and_said(theirs, said):
    model = small(7)
    assert load_pretrained(model, found(small(**theirs))).text == f"weights w.pth{said}"
    assert body_and_head(model) is (not said)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (LETTERS, LETTERS, ""),
        (LETTERS, tuple(LETTERS), ""),
        (LETTERS, OTHERS, "; head fc is new: other classes"),
        (LETTERS, LETTERS[::-1], "; head fc is new: other classes"),
        (None, OTHERS, ""),
        (LETTERS, None, ""),
    ],
)
@pytest.mark.parametrize("head", build.HEADS)
def test_a_head_for_other_classes_is_replaced_and_said(head, theirs, ours, said):
    model = small(7, head=head)
    weights = found(small(7, head=head), classes=theirs)
    assert load_pretrained(model, weights, ours).text == f"weights w.pth{said}"
    assert body_and_head(model) is (not said)


def test_a_body_without_a_head():
    model, weights = small(7), found(small(7))
    for key in ("fc.weight", "fc.bias"):
        del weights.state[key]
    assert load_pretrained(model, weights).text == "weights w.pth; head fc is new: none there"
    assert not body_and_head(model)


def test_only_the_head_may_differ():
    with pytest.raises(UserError, match=r"w\.pth does not fit .*another shape: body.bias \(5,\)"):
        load_pretrained(small(7, width=6), found(small(7)))
    assert (
        load_pretrained(small(7), find_weights("none", "resnet18")).text == "no pretrained weights"
    )


def small_vit(pixels, classes=7):
    torch.manual_seed(pixels)
    return torchvision.models.VisionTransformer(
        image_size=pixels, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16,
        num_classes=classes,
    )  # fmt: skip


def test_position_embeddings_are_resized_and_said():
    theirs, ours = small_vit(56), small_vit(32)
    with torch.no_grad():  # a plane over the grid, which bicubic interpolation keeps
        grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 14)] * 2, indexing="ij"), -1)
        theirs.encoder.pos_embedding[0, 1:, :2] = grid.flatten(0, 1)
    weights = Pretrained(theirs.state_dict(), "w.pth")
    before = theirs.encoder.pos_embedding.clone()
    line = load_pretrained(ours, weights).text
    assert line == "weights w.pth; position embedding resized from 14×14 to 8×8"
    positions = ours.encoder.pos_embedding
    torch.testing.assert_close(positions[0, 0], before[0, 0])  # the class token's
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 8)] * 2, indexing="ij"), -1)
    torch.testing.assert_close(positions[0, 1:, :2], grid.flatten(0, 1), atol=0.02, rtol=0)
    corners = [positions[0, 1 + i].tolist() for i in (0, 7, 56, 63)]
    expected = [before[0, 1 + i].tolist() for i in (0, 13, 182, 195)]
    torch.testing.assert_close(torch.tensor(corners), torch.tensor(expected), atol=1e-5, rtol=0)
    assert torch.equal(theirs.encoder.pos_embedding, before)  # theirs stay
    assert (
        load_pretrained(small_vit(32), Pretrained(ours.state_dict(), "w.pth")).text
        == "weights w.pth"
    )


def test_position_embeddings_of_no_square_do_not_fit():
    weights = Pretrained(small_vit(56).state_dict(), "w.pth")
    weights.state["encoder.pos_embedding"] = torch.zeros(1, 12, 8)
    with pytest.raises(UserError, match=r"encoder.pos_embedding \(1, 12, 8\) for \(1, 65, 8\)"):
        load_pretrained(small_vit(32), weights)


# -- what torchvision publishes ------------------------------------------------------------------


def publish(monkeypatch, folder, weights, state):
    """Put a state where torchvision's cache has the file of these weights."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    file = folder / "hub/checkpoints" / Path(weights.url).name
    file.parent.mkdir(parents=True)
    torch.save(state, file)


def test_published_weights_come_from_torchvisions_cache(tmp_path, monkeypatch):
    weights = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1
    with_heads = torchvision.models.googlenet(num_classes=1000, init_weights=False)
    publish(monkeypatch, tmp_path, weights, filled(with_heads))
    # What torchvision's builder does there is said in the table of families.
    assert torchvision.models.googlenet(weights=weights).transform_input
    weights = find_weights("default", "googlenet")
    half = (0.5, 0.5, 0.5)
    assert weights.preprocessing == Preprocessing(224, 0.875, "bilinear", half, half)
    assert not [key for key in weights.state if key.startswith("aux")]
    model = build.build_model("googlenet", 7, image_size=224)
    said = load_pretrained(model, weights, LETTERS).text
    assert said == (
        "weights GoogLeNet_Weights.IMAGENET1K_V1; head fc is new: 1000 classes there, 7 here"
    )
    assert model.conv1.conv.weight.unique().item() == 1.0


def test_published_weights_know_all_about_themselves(tmp_path, monkeypatch):
    published = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    publish(monkeypatch, tmp_path, published, {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    for spec in ("default", "IMAGENET1K_V1"):
        weights = find_weights(spec, "resnet18")
        assert weights[1:3] == ("ResNet18_Weights.IMAGENET1K_V1", "standard")
        assert weights.classes == published.meta["categories"] and len(weights.classes) == 1000
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        assert weights.preprocessing == Preprocessing(224, 0.875, "bilinear", mean, std)
    assert find_weights("default", "resnet18", "standard").stem == "standard"
    with pytest.raises(UserError, match=r"--stem small: ResNet18.*has the standard stem"):
        find_weights("default", "resnet18", "small")


def test_every_published_preprocessing_is_understood(monkeypatch):
    """Sizes, colours and filter of all of torchvision's weights, against their own transforms."""
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *a, **k: {})
    seen = 0
    for name in torchvision.models.list_models(module=torchvision.models):
        for published in torchvision.models.get_model_weights(name):
            if not published.meta["categories"]:
                with pytest.raises(UserError, match=r"no classifier: take IMAGENET1K_V1$"):
                    find_weights(published.name, name)
                assert str(published) == "VGG16_Weights.IMAGENET1K_FEATURES"
                continue
            preprocessing, own = (
                find_weights(published.name, name).preprocessing,
                published.transforms(),
            )
            assert [preprocessing.size] == own.crop_size and [
                preprocessing.stored_size
            ] == own.resize_size
            assert FILTERS[preprocessing.interpolation] == pil_modes_mapping[own.interpolation]
            if name not in ("googlenet", "inception_v3"):
                assert (list(preprocessing.mean), list(preprocessing.std)) == (own.mean, own.std)
            seen += 1
    assert seen > 100


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="IMAGENET1K_V9, did you mean"):
        find_weights("IMAGENET1K_V9", "resnet50")

    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"ResNet18_Weights\.IMAGENET1K_V1.*unreachable") as error:
        find_weights("default", "resnet18")
    assert str(tmp_path / "hub/checkpoints/resnet18-f37072fd.pth") in str(error.value)


# -- folders and files ---------------------------------------------------------------------------

IMAGENET = {
    "input_size": [3, 224, 224],
    "crop_pct": 0.95,
    "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
LOOK = Preprocessing(224, 0.95, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def write_run(folder, config, state=None):
    folder.mkdir(exist_ok=True)
    tensors = state or {"x.weight": torch.ones(1)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    return str(folder)


def test_a_run_folder_says_how_it_was_trained(tmp_path):
    config = build.model_config(
        "resnet18", LETTERS, 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), stem="small", crop_pct=0.8,
        interpolation="bicubic", head="mlp",
    )  # fmt: skip
    folder = write_run(tmp_path / "run", config)
    for spec in (folder, f"{folder}/model.safetensors"):
        weights = find_weights(spec, "resnet18")
        preprocessing = Preprocessing(32, 0.8, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert weights[1:5] == (spec, "small", LETTERS, preprocessing)
        assert weights.recipes == ({"unknown": str(spec)},)  # a config.json without flags
        assert preprocessing.stored_size == 40
        assert weights.state.keys() == {"x.weight"}
    with pytest.raises(UserError, match=f"^{folder} holds a resnet18: add --model resnet18$"):
        find_weights(folder, "resnet50")


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ({}, ("standard", None, None)),
        ({"architecture": "resnet18"}, ("standard", None, None)),
        ({"label_names": ["a"], "stem": None}, ("standard", ["a"], None)),
        ({"label_names": {"0": "a"}, "pretrained_cfg": None}, ("standard", None, None)),
        ({"pretrained_cfg": IMAGENET}, ("standard", None, LOOK)),
        ({"pretrained_cfg": IMAGENET | {"mean": None}}, ("standard", None, None)),
        ({"pretrained_cfg": {"mean": [0, 0, 0]}}, ("standard", None, None)),
    ],
)
def test_what_a_foreign_config_leaves_out_is_not_known(tmp_path, config, known):
    folder = write_run(tmp_path / "theirs", config)
    assert find_weights(folder, "resnet18")[2:5] == known
    elsewhere = tmp_path / "theirs" / "step.safetensors"  # not what config.json is about
    (tmp_path / "theirs" / "model.safetensors").rename(elsewhere)
    assert find_weights(str(elsewhere), "resnet18")[2:5] == ("standard", None, None)


def test_timms_own_folder(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=7)
    labels = {"label_names": LETTERS}
    timm.models.save_for_hf(model, tmp_path, model_config=labels, safe_serialization=True)
    weights = find_weights(str(tmp_path), "resnet10t")
    cfg = model.pretrained_cfg
    preprocessing = (
        cfg["input_size"][-1],
        cfg["crop_pct"],
        cfg["interpolation"],
        cfg["mean"],
        cfg["std"],
        0,
    )
    assert weights[2:5] == ("standard", LETTERS, preprocessing)
    ours = build.build_model("resnet10t", 7, image_size=64)
    assert load_pretrained(ours, weights, LETTERS).text == f"weights {tmp_path}"
    assert torch.equal(ours.fc.weight, model.fc.weight)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{no", " is not JSON"),
        ("[1]", " is not a JSON object"),
        ({"pretrained_cfg": IMAGENET | {"crop_pct": 0}}, "no usable crop_pct: 0; "),
        ({"pretrained_cfg": IMAGENET | {"crop_pct": "all"}}, "no usable crop_pct: 'all'; "),
        ({"pretrained_cfg": IMAGENET | {"interpolation": "random"}}, "interpolation: 'random'"),
        ({"pretrained_cfg": IMAGENET | {"input_size": [3, 224, 256]}}, "no usable input_size"),
        ({"pretrained_cfg": IMAGENET | {"input_size": [1, 28, 28]}}, "no usable input_size"),
        ({"pretrained_cfg": IMAGENET | {"input_size": 224}}, "no usable input_size: 224; "),
        ({"pretrained_cfg": IMAGENET | {"mean": [0.5]}}, "no usable mean"),
        ({"pretrained_cfg": IMAGENET | {"std": [1, 1, 0]}}, "no usable std"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(tmp_path, config, said):
    folder = write_run(tmp_path / "theirs", config)
    with pytest.raises(UserError, match=f"theirs/config.json.*{said}") as error:
        find_weights(folder, "resnet18")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "convnext_tiny", "mobilenet_v2"])
@pytest.mark.parametrize("stem", ["small", "standard"])
def test_a_file_shows_its_stem_where_the_shapes_differ(tmp_path, name, stem):
    shown = name != "mobilenet_v2"  # 3×3 in both of its stems: only the stride differs
    key = f"{build.family_of(name).stem_conv}.weight"
    with torch.device("meta"):
        model = build.build_model(name, 7, image_size=64, stem=stem)
    state = {f"module.{key}": torch.zeros(model.state_dict()[key].shape)}
    torch.save(state, tmp_path / "w.pth")
    file = str(tmp_path / "w.pth")
    weights = find_weights(file, name)
    assert weights.stem == (stem if shown else "standard")
    assert weights[3:5] == (None, None) and weights.state.keys() == {key}
    assert find_weights(file, name, stem).stem == stem
    other = {"small": "standard", "standard": "small"}[stem]
    if shown:
        with pytest.raises(UserError, match=f"--stem {other}: {file} has the {stem} stem"):
            find_weights(file, name, other)
    else:
        assert find_weights(file, name, other).stem == other


def test_a_stem_that_a_family_lacks_is_refused_with_weights_too(tmp_path):
    folder = write_run(tmp_path / "run", {})
    asked = find_weights(folder, "vgg11", "small").stem
    with pytest.raises(UserError, match="--stem small"):
        build.resolve_stem("vgg11", asked, 32)
    assert find_weights("none", "resnet18", "small").stem is None
