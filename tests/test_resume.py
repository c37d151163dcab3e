"""Stop anywhere, resume, and get the uninterrupted run: bit for bit."""

import json
import shutil

import pytest
import yaml

import smallruns
from harness.errors import UserError

STEPS = 12


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The digests of the run that was never stopped."""
    folder, status = smallruns.train(tmp_path_factory.mktemp("straight"), checkpointing_steps=5)
    assert status == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    return folder


@pytest.mark.parametrize(
    "stop",
    [s if s in (1, 6, 8) else pytest.param(s, marks=pytest.mark.slow) for s in range(1, STEPS)],
)
def test_stopping_after_any_step_changes_nothing(straight, tmp_path, stop):
    _, status = smallruns.train(tmp_path, stop_after=stop)
    assert status == 0
    folder, status = smallruns.train(tmp_path, resume_from_checkpoint="auto", checkpointing_steps=5)
    assert status == 0
    assert smallruns.digest(folder) == smallruns.digest(straight)


def test_the_digest_sees_a_difference(straight, tmp_path):
    folder, _ = smallruns.train(tmp_path, seed=43)
    ours, theirs = smallruns.digest(folder), smallruns.digest(straight)
    assert ours.keys() == theirs.keys() and len(ours) == 6
    same = [name for name in ours if ours[name] == theirs[name]]
    assert same == ["step-00000012"]


def test_same_flags_same_bits_and_config_yaml_repeats_the_run(straight, tmp_path):
    recipe = straight / "config.yaml"
    folder, status = smallruns.train(tmp_path, config=recipe)
    assert status == 0
    assert smallruns.digest(folder) == smallruns.digest(straight)


def test_a_validation_split_chooses_the_epoch_also_across_a_resume(tmp_path):
    flags = {"val_fraction": 0.25, "batch_size": 24, "epochs": 4}
    whole, _ = smallruns.train(tmp_path / "a", **flags)
    smallruns.train(tmp_path / "b", **flags, stop_after=19)
    (tmp_path / "b" / "run" / "model.safetensors").unlink()  # the best so far: a checkpoint has it
    parts, _ = smallruns.train(tmp_path / "b", **flags, resume_from_checkpoint="auto")
    assert smallruns.digest(whole) == smallruns.digest(parts)
    summaries = [json.loads((f / "summary.json").read_text()) for f in (whole, parts)]
    assert summaries[0]["best_epoch"] == summaries[1]["best_epoch"]
    assert summaries[0]["scores"] == summaries[1]["scores"]
    assert summaries[0]["split"] == "test"
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    on_val = [r["val/acc_ema"] for r in records if "val/acc_ema" in r]
    assert summaries[0]["scores"]["val/acc_ema"] == max(on_val)  # of that epoch, not the last
    assert not any("test/acc" in r for r in records)  # test is scored once, at the end


def test_resuming_a_finished_run_says_the_same_result(straight):
    before = smallruns.digest(straight)
    summary = json.loads((straight / "summary.json").read_text())
    folder, status = smallruns.train(
        straight.parent, resume_from_checkpoint="auto", checkpointing_steps=5
    )
    assert status == 0
    assert smallruns.digest(folder) == before
    assert json.loads((folder / "summary.json").read_text())["scores"] == summary["scores"]


def test_another_flag_is_refused_by_name(straight):
    with pytest.raises(UserError, match=r"written with lr 0\.1, this command has 0\.2"):
        smallruns.train(straight.parent, resume_from_checkpoint="auto", lr=0.2)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(straight, tmp_path, capsys):
    smallruns.train(tmp_path, checkpointing_steps=3, stop_after=8)
    folder = tmp_path / "run"
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-5] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    capsys.readouterr()
    _, status = smallruns.train(tmp_path, resume_from_checkpoint="auto", checkpointing_steps=5)
    out = capsys.readouterr().out
    assert status == 0
    assert f"{newest} is damaged (optimizer.safetensors has another sha256" in out
    assert "step 6 of 12" in out
    assert smallruns.digest(folder) == smallruns.digest(straight)


def test_a_folder_that_holds_a_run_is_refused_and_overwrite_replaces_it(straight, tmp_path):
    smallruns.train(tmp_path, epochs=1)
    with pytest.raises(UserError, match="holds a run already"):
        smallruns.train(tmp_path, epochs=1)
    folder, status = smallruns.train(tmp_path, overwrite=True, checkpointing_steps=5)
    assert status == 0
    assert smallruns.digest(folder) == smallruns.digest(straight)
    assert yaml.safe_load((folder / "config.yaml").read_text())["epochs"] == 3


def test_a_checkpoint_of_other_data_is_refused(straight, tmp_path):
    checkpoint = sorted((straight / "checkpoints").iterdir())[-1]
    with pytest.raises(UserError, match="max_train_samples 200, this command has 150"):
        smallruns.train(tmp_path, max_train_samples=150, resume_from_checkpoint=checkpoint)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_path_into_another_runs_checkpoints_is_refused_where_a_run_stands(straight, tmp_path):
    smallruns.train(tmp_path, epochs=1)
    other = sorted((straight / "checkpoints").iterdir())[-1]
    before = smallruns.digest(tmp_path / "run")
    with pytest.raises(UserError, match="holds another run"):
        smallruns.train(tmp_path, resume_from_checkpoint=other)
    assert smallruns.digest(tmp_path / "run") == before


def test_resuming_an_older_checkpoint_by_name_sets_the_later_ones_aside(straight, tmp_path):
    smallruns.train(tmp_path, checkpointing_steps=3, max_checkpoints=9, stop_after=8)
    root = tmp_path / "run" / "checkpoints"
    older = root / "step-00000003"
    smallruns.train(tmp_path, resume_from_checkpoint=older, checkpointing_steps=99, stop_after=5)
    names = sorted(p.name for p in root.iterdir())
    assert names == ["set-aside-step-00000006", "set-aside-step-00000008",
                     "step-00000003", "step-00000005"]  # fmt: skip
    folder, _ = smallruns.train(tmp_path, resume_from_checkpoint="auto", checkpointing_steps=5)
    for late in root.glob("set-aside-*"):
        shutil.rmtree(late)
    assert smallruns.digest(folder) == smallruns.digest(straight)


def test_a_finished_run_without_its_checkpoints_is_not_thrown_away(tmp_path):
    folder, _ = smallruns.train(tmp_path, epochs=1)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="finished run without checkpoints"):
        smallruns.train(tmp_path, epochs=1, resume_from_checkpoint="auto")
    assert (folder / "model.safetensors").exists()
