"""What each released version wrote is read by this one (made by make_golden.py).

Checkpoints that were drawn by another rule are refused; results are read always.
"""

import contextlib
import json
import shutil
from types import SimpleNamespace

import make_golden
import pytest
import torch

import smallruns
from harness.data import stores
from harness.data.sources import load_data
from harness.data.stores import decode_splits
from harness.errors import UserError
from harness.models.trained import load_model, read_trained
from harness.training.scoring import evaluate
from harness.training.state import check_state
from tricks.augment import normalize_batch

VERSIONS = sorted(path for path in make_golden.GOLDEN.iterdir() if path.is_dir())
BY_BATCH = ["0.1"]  # whose checkpoints are of an older rule of drawing


def test_there_are_some_and_they_are_small():
    assert VERSIONS
    for version in VERSIONS:
        assert sum(f.stat().st_size for f in version.rglob("*") if f.is_file()) < 150_000


@pytest.mark.everyday
@pytest.mark.parametrize(
    "version", [v for v in VERSIONS if v.name not in BY_BATCH], ids=lambda path: path.name
)
def test_a_checkpoint_goes_on(version, tmp_path, monkeypatch):
    shutil.copytree(version / "run", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    expected = json.loads((version / "expected.json").read_text())["losses"]
    flags = make_golden.flags_of(version)
    state = json.loads((version / "run/checkpoints/step-00000004/state.json").read_text())
    if packed := state["identity"].get("store"):  # another release of simplejpeg would be refused
        monkeypatch.setattr(stores, "decoder", lambda *_: packed["decoder"])
    with make_golden.tiny():
        folder, status = smallruns.train(tmp_path, **flags, resume_from_checkpoint="auto")
    assert status == 0
    found = make_golden.losses(folder)
    assert found.keys() == expected.keys() and len(found) == 8
    for step in ("1", "2", "3", "4", "5"):  # the first four were in the folder
        assert found[step] == pytest.approx(expected[step], abs=1e-6), step


@pytest.mark.everyday
@pytest.mark.parametrize("asked", ["auto", "path"])
@pytest.mark.parametrize("version", BY_BATCH)
def test_a_checkpoint_of_an_older_rule_is_refused(version, asked, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(make_golden.GOLDEN / version / "run", folder)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    checkpoint = folder / "checkpoints" / "step-00000004"
    with make_golden.tiny(), pytest.raises(UserError) as refused:
        smallruns.train(
            tmp_path, **make_golden.FLAGS,
            resume_from_checkpoint="auto" if asked == "auto" else checkpoint,
        )  # fmt: skip
    assert str(refused.value) == (
        f"{checkpoint} was written with augmentation drawn by batch, this version draws it by "
        "sample: commit b75d8de is the last that continues it, or give another --run_name to start "
        "anew"
    )
    after = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}
    assert after == before


def test_a_checkpoint_of_a_rule_that_is_not_known_yet_is_refused():
    state = make_golden.GOLDEN / "0.2/run/checkpoints/step-00000004/state.json"
    saved = json.loads(state.read_text())
    assert (
        check_state("there", saved)
        == {"unscored": None, "energy": {}, "evaluation_seconds": 0.0} | saved
    )
    with pytest.raises(UserError, match=r"by moonlight, .* draws it by sample: a newer version"):
        check_state("there", {**saved, "draws": "by moonlight"})
    with pytest.raises(UserError, match="no usable draws"):
        check_state("there", {**saved, "draws": 7})


@pytest.mark.everyday
@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_a_result_scores_the_same(version):
    with make_golden.tiny():
        trained = read_trained(version / "run")
        model = load_model(trained)
    photos = version / "photos"
    data = load_data(str(photos)) if photos.is_dir() else load_data("digits", max_eval_samples=100)
    splits = decode_splits(data, trained.preprocessing, progress=False)
    alone = SimpleNamespace(
        device=torch.device("cpu"), process_index=0, num_processes=1,
        autocast=contextlib.nullcontext, reduce=lambda sums, how: sums,
    )  # fmt: skip
    scores = evaluate(
        alone, model, splits["test"],
        lambda x: normalize_batch(x, trained.preprocessing.mean, trained.preprocessing.std),
    )  # fmt: skip
    expected = json.loads((version / "expected.json").read_text())["scores"]
    assert scores["acc"] == expected["test/acc_ema"]
    assert scores["loss"] == pytest.approx(expected["test/loss_ema"], abs=1e-6)
