"""Anybody's file of weights: found by content, what was taken is said, objects are refused."""

import argparse
import re
import shlex
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import torchvision

from harness.errors import UserError
from harness.models import build
from harness.models.reading import load_weights, read_weights
from harness.models.weights import Pretrained, find_weights, load_pretrained, load_state

NAME = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return torchvision.models.get_model(NAME, num_classes=7).state_dict()


def other(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


def averaged(state):
    """As torch.optim.swa_utils.AveragedModel keeps it."""
    return {"n_averaged": torch.tensor(5), **prefixed(state, "module.")}


# What trainers write, and what is said of it
KINDS = {
    "examples.pth.tar": (
        lambda s: {"arch": NAME, "state_dict": prefixed(s, "module.")}, "its state_dict"
    ),
    "timm.pth.tar": (
        lambda s: {"state_dict": other(s), "state_dict_ema": s},
        "its state_dict_ema (averaged weights); also there: state_dict (",
    ),
    "references.bin": (lambda s: {"model": s, "epoch": 3, "lr": [0.1]}, "its model"),
    "references_ema.pt": (
        lambda s: {"model": other(s), "model_ema": averaged(s)},
        "its model_ema (averaged weights); also there: model (",
    ),
    "swa": (averaged, "averaged over 5 updates"),
    "lightning.ckpt": (lambda s: {"state_dict": prefixed(s, "model.")}, "its state_dict"),
    "compiled.pt": (lambda s: prefixed(s, "module._orig_mod."), ""),
    "wrapped.pt": (lambda s: {"net": prefixed(s, "backbone.model.")}, "its net"),
    "double.pth": (lambda s: {"model": {"model": s}}, "its model"),
    "own_word.pth": (lambda s: {"resnet": s, "epoch": 1}, "its resnet"),
    "plain.weights": (lambda s: s, ""),
    "loss_beside.ckpt": (
        lambda s: {"state_dict": {**prefixed(s, "model."), "criterion.weight": torch.ones(7)}},
        "its state_dict, the entries under model; not used: criterion.weight",
    ),
    "averaged_beside.ckpt": (
        lambda s: {"state_dict": {**prefixed(other(s), "model."), **prefixed(s, "model_ema.")}},
        "its state_dict, the entries under model_ema; not used: model.conv1.0.weight, ",
    ),
    "swa_beside.ckpt": (
        lambda s: {**prefixed(other(s), "net."), **prefixed(averaged(s), "ema_model.")},
        "the entries under ema_model.module; not used: ",
    ),
    "shadow.pt": (
        lambda s: {"model": other(s), "ema": {"decay": 0.9, "shadow": s}},
        "its ema (averaged weights)",
    ),
    "fsdp.pt": (
        lambda s: {k.replace("stage2.", "stage2._fsdp_wrapped_module."): v for k, v in s.items()},
        "",
    ),
    "counted.pt": (lambda s: {**s, "epoch": 3, "best": 0.5, "step": torch.tensor(7)}, ""),
}  # fmt: skip


@pytest.mark.parametrize("file", KINDS)
def test_a_state_is_found_by_content(state, tmp_path, file):
    make, words = KINDS[file]
    torch.save(make(state), tmp_path / file)
    found = find_weights(str(tmp_path / file), NAME)
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[key], value) for key, value in state.items())
    assert found.description.startswith(words)
    model = build.build_model(NAME, 7, image_size=32, stem="standard")
    loaded = load_pretrained(model, found)
    assert words in loaded.text and not loaded.head_is_new


def test_safetensors_under_any_name(state, tmp_path):
    safetensors.torch.save_file(prefixed(state, "model."), tmp_path / "weights.bin")
    assert find_weights(str(tmp_path / "weights.bin"), NAME).state.keys() == state.keys()


def test_a_prefix_of_the_network_itself_stays(tmp_path):
    """All of vgg's keys without its classifier begin with "features"."""
    vgg = torchvision.models.vgg11().state_dict()
    torch.save({k: v for k, v in vgg.items() if k.startswith("features")}, tmp_path / "vgg.pth")
    assert "features.0.weight" in find_weights(str(tmp_path / "vgg.pth"), "vgg11").state


def test_a_key_chooses_the_state(state, tmp_path):
    file = tmp_path / "last.pth"
    torch.save({"state_dict": state, "state_dict_ema": other(state), "nets": {"a": state}}, file)
    found = find_weights(f"{file}:state_dict", NAME)
    assert found.description == "its state_dict"
    assert torch.equal(found.state["fc.weight"], state["fc.weight"])
    assert read_weights(f"{file}:nets.a").state.keys() == state.keys()
    with pytest.raises(UserError, match="has no state_dic: there are state_dict, state_dict_ema"):
        read_weights(f"{file}:state_dic")
    torch.save({"student": state, "teacher": state}, file)
    with pytest.raises(UserError, match=r"several states: choose one, .*:KEY with student, teach"):
        read_weights(file)
    assert read_weights(f"{file}:teacher").description == "its teacher"


def test_a_prefix_chooses_one_of_several_networks(state, tmp_path):
    file = tmp_path / "two.pth"
    flat = {**prefixed(state, "module.student."), **prefixed(other(state), "module.teacher.")}
    torch.save(flat, file)
    with pytest.raises(
        UserError, match=r"several networks: choose one, .*:KEY with student, teach"
    ):
        find_weights(str(file), NAME)
    for key, expected in (("student", state), ("teacher", other(state))):
        found = find_weights(f"{file}:{key}", NAME).state
        assert found.keys() == state.keys()
        assert torch.equal(found["fc.weight"], expected["fc.weight"])
    with pytest.raises(UserError, match="names no state behind the colon"):
        find_weights(f"{file}:", NAME)
    torch.save({name.removeprefix("module."): value for name, value in flat.items()}, file)
    with pytest.raises(UserError, match="has no techer: there are student, teacher"):
        find_weights(f"{file}:techer", NAME)


def test_averages_of_the_parameters_alone_are_not_whole(state, tmp_path):
    """The line says what else the file has."""
    file = tmp_path / "shadow.pth"
    shadow = {name: value for name, value in state.items() if "running" not in name}
    torch.save({"model": state, "ema": {"decay": 0.99, "shadow": shadow}}, file)
    model = build.build_model(NAME, 7, image_size=32, stem="standard")
    words = rf"missing: .*running_mean.*also there: model \({file}:model\)$"
    with pytest.raises(UserError, match=words):
        load_pretrained(model, find_weights(str(file), NAME))
    assert not load_pretrained(model, find_weights(f"{file}:model", NAME)).head_is_new


ARGS = argparse.Namespace(lr=0.1)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (lambda s: {"model": s, "args": ARGS}, "argparse.Namespace"),
        (lambda s: {"state_dict": other(s), "state_dict_ema": s, "args": ARGS}, "Namespace"),
        (lambda s: {"net": s, "args": ARGS}, "Namespace"),
        (lambda s: {"model": {"model": s}, "args": ARGS}, "Namespace"),
        (lambda s: torchvision.models.get_model(NAME, num_classes=7), "ShuffleNetV2"),
    ],
)
def test_objects_are_refused_with_the_line_that_converts_them(state, tmp_path, content, what):
    file = tmp_path / "it's $HOME.pth"
    torch.save(content(state), file)
    with pytest.raises(UserError, match="nothing in it was run") as caught:
        load_weights(file)
    assert what in str(caught.value) and "\n" not in str(caught.value)
    command = str(caught.value).partition("If you trust its author, ")[2].rpartition(" writes ")[0]
    program, *rest = shlex.split(command)
    subprocess.run([sys.executable, *rest], check=True, cwd=tmp_path)
    assert program == "python"
    found = find_weights(str(file.with_suffix(".safetensors")), NAME).state
    assert found.keys() == state.keys()
    if isinstance(content(state), dict):
        assert torch.equal(found["fc.weight"], state["fc.weight"])


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.tensor([float("nan"), 0.0]), "not finite"),
        (torch.tensor([True, False]), "bool values"),
        (torch.tensor([1, 2]), "int64 values"),
        (torch.tensor([1j, 2]), "complex64 values"),
        (torch.tensor([1e300, 2], dtype=torch.float64), "not finite as float32"),
        (torch.tensor([1.0, 2]).to_sparse(), "stored sparsely: .to_dense() it before it is saved"),
        (torch.ones(2, device="meta"), "a shape and no values"),
        (torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2 values"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8 values"),
    ],
)
def test_what_can_t_be_weights_is_named(value, what):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    what = re.escape(what)
    with pytest.raises(
        UserError, match=f"^w.pth can't be weights: 0.bias (holds|is|has) .*{what}$"
    ):
        load_state(model, {"0.weight": torch.ones(2, 2), "0.bias": value}, "w.pth")
    load_state(model, {"0.weight": torch.ones(2, 2).half(), "0.bias": torch.ones(2).double()})


# -- by order ------------------------------------------------------------------------------------


def test_other_names_are_offered_by_order(state):
    """As efficientnet_lite0_pytorch names what timm calls otherwise."""
    theirs = {f"{n}.w": value for n, value in enumerate(state.values())}
    weights = Pretrained(theirs, "theirs.pth")
    model = build.build_model(NAME, 7, image_size=32, stem="standard")
    with pytest.raises(UserError, match=r"All shapes match in order .*: --weights_by_order"):
        load_pretrained(model, weights)
    loaded = load_pretrained(model, weights, by_order=True)
    assert loaded.text.endswith("loaded by order: shapes were checked, names were not")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    # Another number of classes, and no counters, as in older files
    old = {k: v for k, v in theirs.items() if v.ndim}
    model = build.build_model(NAME, 5, image_size=32, stem="standard")
    assert load_pretrained(model, Pretrained(old, "old.pth"), by_order=True).head_is_new
    # Other shapes are not offered
    with pytest.raises(UserError, match=r"--weights_by_order: x.pth has other shapes: 1 tensors"):
        load_pretrained(model, Pretrained({"a": torch.ones(1)}, "x.pth"), by_order=True)
    wrong = dict(reversed(theirs.items()))
    with pytest.raises(UserError) as caught:
        load_pretrained(model, Pretrained(wrong, "x.pth"))
    assert "by_order" not in str(caught.value)
    with pytest.raises(UserError, match="--weights_by_order: there are no --weights to give out"):
        load_pretrained(model, Pretrained(), by_order=True)
