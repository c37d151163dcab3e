"""Damaged and hostile files: told before anything is touched, and never executed."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import smallruns
from harness.errors import UserError
from harness.training.checkpoint import save_checkpoint

FLAGS = {"epochs": 1, "checkpointing_steps": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 4 steps with checkpoints 2 and 4, finished."""
    folder, status = smallruns.train(tmp_path_factory.mktemp("straight"), **FLAGS)
    assert status == 0
    return folder


@pytest.fixture
def copy(straight, tmp_path):
    """A copy of it that was stopped after its last checkpoint."""
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path / "run"


def resume(folder, **flags):
    flags = {"resume_from_checkpoint": "auto", **FLAGS, **flags}
    return smallruns.train(folder.parent, **flags)


def everything(folder):
    """sha256 of every file, to see that nothing was touched."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != ".lock"]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# --- accidents ---


def flip(path, older):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path, older: path.write_bytes(path.read_bytes()[:-7]),
    "one bit flipped": flip,
    "empty": lambda path, older: path.write_bytes(b""),
    "deleted": lambda path, older: path.unlink(),
    "swapped with an older one": lambda path, older: shutil.copy(older, path),
}
FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json",
         "manifest.json"]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_is_used_and_the_end_is_the_same(
    straight, copy, capsys, file, damage
):
    older, newest = sorted((copy / "checkpoints").iterdir())
    DAMAGE[damage](newest / file, older / file)
    folder, status = resume(copy)
    out = capsys.readouterr().out
    said = [line for line in out.splitlines() if "is damaged" in line]
    assert status == 0 and len(said) == 1 and str(newest) in said[0]
    assert "step 2 of 4" in out
    shutil.rmtree(folder / "checkpoints" / f"set-aside-{newest.name}", ignore_errors=True)
    assert smallruns.digest(folder) == smallruns.digest(straight)


@pytest.mark.everyday
def test_none_valid_is_refused_and_nothing_touched(copy):
    for folder in (copy / "checkpoints").iterdir():
        DAMAGE["one bit flipped"](folder / "optimizer.safetensors", None)
    before = everything(copy)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints .* verifies"):
        resume(copy)
    assert everything(copy) == before


# --- hostile pickles ---


class Hostile:
    """An object whose unpickling writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


NAMES = ["model.pt", "model.pth", "model.bin", "model.pkl", "pytorch_model.bin",
         "model.safetensors"]  # fmt: skip


@pytest.fixture
def hostile(tmp_path):
    """A function (path, zip archive or plain pickle) that writes one; fails if it was executed."""
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()  # it would
    marker.unlink()

    def write(path, archive):
        path.parent.mkdir(parents=True, exist_ok=True)
        if archive:
            torch.save({"fc.weight": Hostile(marker)}, path)
        else:
            path.write_bytes(pickle.dumps(Hostile(marker)))
        return path

    yield write
    assert not marker.exists()


def refused(script, argv):
    with pytest.raises(UserError) as error:
        smallruns.run(script, [str(word) for word in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.everyday
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_is_not_executed_under_any_name(straight, tmp_path, hostile, name, archive):
    common = ["--report_to=none", "--run_name=x", f"--output_dir={tmp_path / 'out'}"]
    train = [*smallruns.words({**smallruns.SMALL, **FLAGS}), *common]
    file = hostile(tmp_path / "files" / name, archive)
    assert str(file) in refused("train", [*train, "--weights", file])
    assert str(file) in refused("train", [*train, "--resume_from_checkpoint", file])
    # in the place of a run's result, and of what a checkpoint lists
    run = tmp_path / "member"
    shutil.copytree(straight, run)
    (run / "model.safetensors").unlink()
    hostile(run / name, archive)
    assert str(run) in refused("train", [*train, "--weights", run])
    assert str(run) in refused("ensemble_eval", [run, straight, *common])
    assert str(run) in refused("gradcam", [run, *common])
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    hostile(checkpoint / name, archive)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    data = (checkpoint / name).read_bytes()
    listed = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"][name] = listed
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    said = refused("train", [*train, "--resume_from_checkpoint", checkpoint])
    assert str(checkpoint) in said
    assert not (tmp_path / "out" / "x").exists()


# --- tensors that do not fit ---


def rewrite(checkpoint, file, change):
    """A checkpoint again, whole by its manifest, with other tensors in one file."""
    tensors = {f.stem: load_file(f) for f in checkpoint.glob("*.safetensors")}
    counters = json.loads((checkpoint / "state.json").read_text())
    change(tensors[file])
    shutil.rmtree(checkpoint)
    save_checkpoint(checkpoint.parent, int(checkpoint.name[5:]), tensors, counters, keep=9)


def other_shape(tensors):
    name = next(k for k, v in tensors.items() if v.ndim)
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def other_dtype(tensors):
    name = next(k for k, v in tensors.items() if v.dtype == torch.float32)
    tensors[name] = tensors[name].double()


def missing(tensors):
    del tensors[next(k for k, v in tensors.items() if v.ndim > 1)]


def extra(tensors):
    tensors["backdoor.weight"] = torch.ones(3)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (file, change)
        for file in ("model", "ema", "optimizer")
        for change in (other_shape, other_dtype, extra, missing)
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_touched(copy, file, change, monkeypatch):
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    rewrite(newest, file, change)
    before, touched = everything(copy), []
    for name in ("load_state_dict",):
        real = getattr(torch.nn.Module, name)
        monkeypatch.setattr(
            torch.nn.Module, name, lambda *a, real=real, **k: touched.append(1) or real(*a, **k)
        )
    with pytest.raises(UserError, match=rf"{newest}.*{file}"):
        resume(copy)
    assert not touched and everything(copy) == before


@pytest.mark.parametrize("change", [other_shape, missing, extra])
def test_weights_that_do_not_fit_are_refused(straight, tmp_path, change):
    state_dict = load_file(straight / "model.safetensors")
    change(state_dict)
    save_file(state_dict, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors"):
        smallruns.train(tmp_path, weights=tmp_path / "other.safetensors", **FLAGS)
    assert not (tmp_path / "run").exists()


def read_by(script, folder, tmp_path):
    if script in ("train", "finetune"):
        flags = FLAGS | (smallruns.FINETUNE if script == "finetune" else {})
        flags |= {"weights": folder / "model.safetensors" if script == "train" else folder}
        return smallruns.train(tmp_path / "new", script=script, **flags, dry_run=True)
    words = [str(folder), "--report_to=none", f"--output_dir={tmp_path}", "--run_name=report"]
    return smallruns.run(script, words)


READERS = ["train", "finetune", "ensemble_eval", "gradcam"]


@pytest.mark.everyday
@pytest.mark.parametrize("script", READERS)
def test_a_result_in_which_a_bit_has_changed_is_refused_by_all_who_read_it(copy, tmp_path, script):
    flip(copy / "model.safetensors", None)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: its tensors"):
        read_by(script, copy, tmp_path)


@pytest.mark.parametrize("script", READERS)
def test_a_result_that_is_odd_is_used_with_a_note(copy, tmp_path, capsys, script):
    config = copy / "config.json"
    smallruns.edit_json(config, lambda content: content.update(tensors_sha256="0" * 64))
    read_by(script, copy, tmp_path / "a")
    assert "config.json is of an older result of the run" in capsys.readouterr().out
    save_file(load_file(copy / "model.safetensors"), copy / "model.safetensors")
    read_by(script, copy, tmp_path / "b")
    assert "not checked: written without a hash" in capsys.readouterr().out


# --- names that lead elsewhere ---


def test_a_linked_checkpoint_is_not_followed(straight, copy, tmp_path, capsys):
    """A folder elsewhere under a checkpoint's name is neither read nor pruned into."""
    elsewhere = tmp_path / "elsewhere"
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    newest.rename(elsewhere)
    newest.symlink_to(elsewhere)
    before = everything(elsewhere)
    folder, status = resume(copy)
    assert status == 0 and "step 2 of 4" in capsys.readouterr().out
    assert everything(elsewhere) == before
    assert smallruns.digest(folder)["metrics.jsonl"] == smallruns.digest(straight)["metrics.jsonl"]


def test_a_class_name_is_no_path(tmp_path):
    """Classes called like paths; all that a run and its reports write stays in their folder."""
    import datasets
    import numpy as np
    from PIL import Image

    names = ["../up", "/tmp/absolute-class", "a/b"]
    images = [Image.fromarray(np.full((16, 16, 3), 40 * k, np.uint8)) for k in range(6)] * 8
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    rows = {"image": images, "label": [k % 3 for k in range(48)]}
    data = datasets.Dataset.from_dict(rows, features=features)
    root = tmp_path / "root"
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "data")
    before = sorted(p for p in tmp_path.rglob("*"))
    flags = {**FLAGS, "dataset": tmp_path / "data", "max_train_samples": None, "batch_size": 24}
    folder, status = smallruns.train(root, **flags)
    common = ["--report_to=none", f"--output_dir={root}"]
    smallruns.run("ensemble_eval", [str(folder), "--run_name=e", *common])
    smallruns.run("gradcam", [str(folder), "--run_name=g", "--max_images=4", *common])
    assert status == 0
    after = {p for p in tmp_path.rglob("*")}
    outside = after - set(before) - {root, *root.rglob("*")}
    outside = {p for p in outside if ".arrow" not in p.name and "cache" not in p.name}
    assert not outside and not Path("/tmp/absolute-class").exists()


def test_a_state_that_is_no_state_is_one_line(copy):
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    tensors = {f.stem: load_file(f) for f in newest.glob("*.safetensors")}
    counters = json.loads((newest / "state.json").read_text())
    for broken in ({}, [], {**counters, "step": "many"}, {**counters, "identity": None},
                   {**counters, "interval": [1]}, {**counters, "step": -3},
                   {**counters, "threads": [0]}, {**counters, "nonfinite": 1}):  # fmt: skip
        shutil.rmtree(newest)
        save_checkpoint(newest.parent, 4, tensors, broken, keep=9)
        with pytest.raises(UserError):
            resume(copy)
