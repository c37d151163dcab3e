"""Recipes, numbers, config.json and environments that were accepted, and then crashed or hung.

Each is refused in one line, at once, before any work. test_fuzz.py makes up others.
"""

import copy
import json
import time

import pytest
import safetensors.torch
import torch

from harness.cli import bounds, flags
from harness.errors import UserError
from harness.models import build
from harness.models.trained import read_trained
from harness.models.weights import find_weights
from smallruns import build_parser

pytestmark = pytest.mark.everyday
OF_CONFIG_JSON = {"num_classes", "crop_pct", "mean", "std"}
SCRIPTS = (
    "train.py", "finetune.py", "ensemble_eval.py", "gradcam.py", "predict.py", "export.py",
)  # fmt: skip


@pytest.fixture
def refused(capsys):
    """The line with which a script ends that reads these words, in less than a second of work."""

    def read(*argv, script="train.py"):
        start = time.process_time()
        with pytest.raises(SystemExit) as ended:
            build_parser(script).read([str(word) for word in argv])
        assert time.process_time() - start < 1
        assert ended.value.code == 2
        out, line = capsys.readouterr()
        assert out == "" and line.count("\n") == 1 and len(line) < 500
        return line

    return read


# --- recipes ---


def bomb(levels):
    """YAML of a few lines whose value has 9 ** levels words."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"lr: [*a{levels - 1}]"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 0.1\nepochs: 3\nlr: 0.2", ['"lr" is there twice', "line 3"]),
        ("batch_size: 32\nbatch-size: 64", ["batch-size: this flag is there twice"]),
        ("stages: [{epochs: 1, train: {head: 1, head: 2}}]", ['"head" is there twice']),
        ("run_name: &name x\ngroup: *name", ["aliases are not read", "line 2"]),
        (bomb(12), ["aliases are not read"]),
        ("<<: {lr: 0.1}", ['unknown flag "<<"']),
        ("batch_size: " + "9" * 5000, ["--batch_size: ", "(5002 characters)"]),
        ("epochs: " + "9" * 4000, ["--epochs: ", "(4000 characters)", "at most 1000000"]),
        ("x" * 1000 + ": 1", ["unknown flag", "characters)"]),
        ("lr: " + "[" * 20_000, ["more than 10 levels"]),
        ("lr: " + "{a: " * 20_000, ["more than 10 levels"]),
        ("- " * 20_000, ["more than 10 levels"]),
        ("lr: [" + "1, " * 5_000 + "]", ["not one value", "characters)"]),
        ("# " + "x" * 600_000, ["longer than 500000 characters"]),
        ("warmup_epochs: 1:30:00", ["--warmup_epochs", "1:30:00"]),
        ("batch_size: 1_000", ["--batch_size", "whole number", "1_000"]),
        ("batch_size: ٣٢", ["--batch_size", "whole number", "٣٢"]),
        ("lr: 1_0.5", ["--lr", "number", "1_0.5"]),
        ("stages: [{epochs: 1_0, train: {head: 0.1}}]", ["epochs", "1_0", "whole number"]),
        ("batch_size: 0x10", ["--batch_size", "0x10"]),
        ("lr: !!float 1", ["tags are not read"]),
        ("[a, b]: 1", ["a key is one word"]),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)
def test_a_recipe_is_refused_at_once(refused, tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    script = "finetune.py" if "stages" in text else "train.py"
    line = refused("--config", tmp_path / "mine.yaml", script=script)
    for word in ["mine.yaml: ", *words]:
        assert word in line


@pytest.mark.parametrize(
    "text", ["[" * 20_000, "9" * 5000, bomb(12), "[{epochs: 1, train: {head: 1e300}}]"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_stages_on_the_command_line_are_refused_at_once(refused, text):
    assert "--stages: " in refused(f"--stages={text}", script="finetune.py")


def test_a_number_is_what_was_written(tmp_path):
    """YAML 1.1 makes 8, 5400, 20240101 and 1.1 of these."""
    (tmp_path / "mine.yaml").write_text(
        "batch_size: 010\nrun_name: 1:30:00\ngroup: 2024-01-01\nproject: 1.10\nlr: 1e-3\n"
    )
    args = build_parser().read(["--config", str(tmp_path / "mine.yaml")])
    assert (args.batch_size, args.run_name, args.group) == (10, "1:30:00", "2024-01-01")
    assert (args.project, args.lr) == ("1.10", 0.001)


# --- numbers ---


def test_every_number_has_an_upper_bound(refused):
    """In each script; the line names the flag, the value and the bound."""
    tried = set()
    for script in SCRIPTS:
        for action in build_parser(script)._actions:
            no_numbers = (None, flags.run_name, flags.words_of, flags.metric_names)
            if action.type in no_numbers or action.dest == "stages":
                continue
            tried.add(action.dest)
            for value in ("1" + "0" * 30, "9" * 400):
                line = refused(f"--{action.dest}={value}", script=script)
                assert f"--{action.dest}: {value[:31]}" in line and "at most" in line
    assert set(bounds.BOUNDS) - OF_CONFIG_JSON <= tried
    assert tried - set(bounds.BOUNDS) == set()


@pytest.mark.parametrize(
    "word",
    [
        "threads=1000000", "lr=1e300", "head_lr=1e300", "warmup_epochs=1e308", "weight_decay=1e300",
        "mixup_alpha=1e-320", "cutmix_alpha=1e308", "crop_padding=100000", "crop_scale=1e-320",
        "image_size=10000", "start_size=10000", "randaugment_ops=100000", "epochs=1000000000",
    ],
)  # fmt: skip
def test_numbers_that_crashed_or_never_ended(refused, word):
    name, value = word.split("=")
    line = refused(f"--{word}")
    assert f"--{name}: {value} is not " in line and "at most " in line


def test_off_stays_off():
    words = ["mixup_alpha", "cutmix_alpha", "crop_scale", "crop_padding", "clip_grad_norm"]
    args = vars(build_parser().read([f"--{name}=0" for name in words]))
    assert [args[name] for name in words] == [0] * len(words)


def test_a_name_of_256_bytes(refused, tmp_path):
    longest = "é" * 127 + "x"
    (tmp_path / build_parser().read([f"--run_name={longest}"]).run_name).mkdir()
    line = refused(f"--run_name={longest}x")
    assert "--run_name: " in line and "longer than 255 bytes" in line


# --- config.json ---

CONFIG = {
    **build.model_config("fastnet_small", "ab", 16, (0.5,) * 3, (0.2,) * 3, stem="standard"),
    "library": "own", "flags": {"seed": 1, "val_fraction": 0.2}, "data": {"source": "x"},
    "ancestors": [{"seed": 1}],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """The folder of a run whose config.json has this text."""

    def write(text):
        (tmp_path / "config.json").write_text(text)
        safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
        return tmp_path

    return write


def test_this_config_can_be_read(folder):
    trained = read_trained(folder(json.dumps(CONFIG)))
    assert trained.preprocessing.stored_size == 16 and build.rebuild_model(trained.config)
    assert find_weights(str(trained.folder), "fastnet_small").classes == ["a", "b"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("pretrained_cfg.crop_pct", 1e-320, ["1e-320", "at least 0.25"]),
        ("pretrained_cfg.input_size", [3, 10**6, 10**6], ["1000000", "at most 4096"]),
        ("pretrained_cfg.std", [1e-320, 1, 1], ["1e-320", "at least 0.001"]),
        ("pretrained_cfg.mean", [0.5, 0.5, "0.5"], ["'0.5'", "three numbers"]),
        ("pretrained_cfg.mean", [123.7, 116.3, 103.5], ["123.7", "[0, 1]: divide by 255"]),
        ("pretrained_cfg.std", [58.4, 57.1, 57.4], ["58.4", "[0, 1]: divide by 255"]),
        ("stem", {}, ["{}", "small, standard"]),
        ("head", [], ["[]", "linear, mlp"]),
        ("architecture", {"a": 1}, ["{'a': 1}", "text"]),
        ("dropout", -1, ["-1", "at least 0"]),
        ("num_classes", 10**9, ["1000000000", "at most 1000000"]),
        ("num_classes", 3, ["num_classes is 3", "label_names has 2"]),
        ("flags.seed", 1e300, ["flags: seed is 1e+300"]),
        ("flags.val_fraction", "x" * 5000, ["flags: val_fraction", "(5002 characters)"]),
        ("flags.labels", ["a"], ["flags: labels is ['a']", "text"]),
        ("data.source", 3, ["data: source is 3"]),
        ("ancestors", [{"max_train_samples": -1}], ["ancestors: max_train_samples is -1"]),
    ],
)
def test_a_config_json_out_of_bounds(folder, key, value, words):
    """As the result of a run and as the weights of another."""
    config = copy.deepcopy(CONFIG)
    *path, last = key.split(".")
    place = config[path[0]] if path else config
    place[last] = value
    path = folder(json.dumps(config))
    with pytest.raises(UserError) as ended:
        read_trained(path)
    line = str(ended.value)
    assert line.startswith(str(path / "config.json")) and last in line and len(line) < 400
    assert "\n" not in line and not [word for word in words if word not in line]
    if "label_names has 2" not in words:  # as weights, that is the head's
        with pytest.raises(UserError, match=last):
            find_weights(str(path), "fastnet_small")


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 200_000, '{"a": ' + "[" * 30 + "]" * 30 + "}", "[" * 20_000,
     '{"num_classes": ' + "9" * 5000 + "}", " " * 17 * 2**20],
    ids=lambda text: text[:20].strip(),
)  # fmt: skip
def test_a_config_json_too_deep_or_too_large(folder, text):
    path, start = folder(text), time.process_time()
    with pytest.raises(UserError, match=r"config.json is not JSON \(") as ended:
        read_trained(path)
    assert time.process_time() - start < 1 and len(str(ended.value)) < 400
