"""A finished run keeps its result and not its checkpoints, and is not begun again by mistake."""

import hashlib
import shutil

import pytest

import smallruns
from harness.errors import UserError
from harness.training import folder as run_folder

FLAGS = smallruns.MEMBER | {"keep_checkpoints": "final", "run_name": "run", "epochs": 1}
AUTO = {"resume_from_checkpoint": "auto"}


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


@pytest.fixture
def finished(tmp_path):
    folder, status = smallruns.train(tmp_path, **FLAGS)
    assert status == 0 and not (folder / "checkpoints").exists()
    return folder


def test_resumed_it_says_so_and_changes_nothing(finished, tmp_path, capsys):
    before = contents(finished)
    _, status = smallruns.train(tmp_path, **FLAGS, **AUTO)
    assert status == 0 and contents(finished) == before
    assert "has its result already: there is nothing to do" in capsys.readouterr().out
    # where it is written and what it tells may differ
    smallruns.train(tmp_path, **FLAGS | {"logging_steps": 3, "max_checkpoints": 5}, **AUTO)


def test_other_flags_are_another_run(finished, tmp_path):
    with pytest.raises(UserError, match=r"finished run with --epochs 1, this command has 2"):
        smallruns.train(tmp_path, **FLAGS | {"epochs": 2}, **AUTO)
    with pytest.raises(UserError, match="holds a finished run: replace it with --overwrite"):
        smallruns.train(tmp_path, **FLAGS)


def test_without_its_flags_it_is_not_known_for_this_run(finished, tmp_path):
    (finished / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config.yaml can't be read"):
        smallruns.train(tmp_path, **FLAGS | {"epochs": 2}, **AUTO)


def test_a_result_that_is_gone_is_not_made_up(finished, tmp_path):
    (finished / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"finished run, but model.safetensors is not there any m"):
        smallruns.train(tmp_path, **FLAGS, **AUTO)
    _, status = smallruns.train(tmp_path, **FLAGS, **AUTO, overwrite=True)
    assert status == 0 and (finished / "model.safetensors").exists()


def test_replaced_it_is_as_any_run(finished, tmp_path):
    smallruns.train(tmp_path, **FLAGS, overwrite=True, stop_after=2)
    assert (finished / "checkpoints").is_dir() and not run_folder.is_finished(finished)
    _, status = smallruns.train(tmp_path, **FLAGS, **AUTO)
    assert status == 0 and run_folder.is_finished(finished)


@pytest.mark.parametrize("after", [0, 1])
def test_killed_while_checkpoints_go(tmp_path, after, monkeypatch):
    flags = FLAGS | {"checkpointing_steps": 1}
    removed, real = [], run_folder._remove

    def remove(path):
        if len(removed) == after:
            raise KeyboardInterrupt
        removed.append(real(path))

    monkeypatch.setattr(run_folder, "_remove", remove)
    with pytest.raises(KeyboardInterrupt):
        smallruns.train(tmp_path, **flags)
    monkeypatch.undo()
    before = contents(tmp_path / "run")
    _, status = smallruns.train(tmp_path, **flags, **AUTO)
    assert status == 0 and contents(tmp_path / "run") == before


def test_a_run_that_goes_back_is_not_finished(tmp_path, capsys):
    flags = FLAGS | {"checkpointing_steps": 2, "max_checkpoints": 9}
    folder, _ = smallruns.train(tmp_path, **flags, stop_after=6)
    shutil.copytree(folder / "checkpoints", tmp_path / "kept")
    smallruns.train(tmp_path, **flags, **AUTO)
    before = contents(folder)
    shutil.copytree(tmp_path / "kept", folder / "checkpoints")
    older = folder / "checkpoints" / "step-00000004"
    smallruns.train(tmp_path, **flags, resume_from_checkpoint=older, stop_after=5)
    assert not run_folder.is_finished(folder)
    smallruns.train(tmp_path, **flags, **AUTO)
    after = contents(folder)
    weights = folder / "model.safetensors"
    assert run_folder.is_finished(folder) and after[weights] == before[weights]


def test_damage_is_one_line(finished, tmp_path):
    good = (finished / "config.yaml").read_bytes()
    for damage in (b"", b"a: ["):
        (finished / "config.yaml").write_bytes(damage)
        with pytest.raises(UserError, match="can't be read"):
            smallruns.train(tmp_path, **FLAGS, **AUTO)
    (finished / "config.yaml").write_bytes(good)
    (finished / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors"):
        smallruns.train(tmp_path, **FLAGS, **AUTO)


def test_what_can_not_be_removed_is_named(tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(run_folder, "_remove", refuse)
    folder, status = smallruns.train(tmp_path, **FLAGS)
    assert status == 0 and (folder / "summary.json").exists()
    assert "could not be removed: Operation not permitted" in capsys.readouterr().out


def test_what_no_run_wrote_stays(tmp_path):
    smallruns.train(tmp_path, **FLAGS, stop_after=2)
    (tmp_path / "run" / "checkpoints" / "notes.txt").write_text("mine")
    smallruns.train(tmp_path, **FLAGS, **AUTO)
    left = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert left == ["notes.txt"]
