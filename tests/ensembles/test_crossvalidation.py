"""The runs of a cross-validation are scored as one, every image by the run that held it out."""

import json

import pytest
import torch

import smallruns
from harness.data.sources import load_data
from harness.data.stores import decode
from harness.ensembles import crossvalidation
from harness.errors import UserError
from harness.models.trained import load_model, read_trained
from tricks.augment import normalize_batch

FLAGS = smallruns.MEMBER | {
    "val_fraction": 0,
    "test_split": "none",
    "max_train_samples": 300,
    "max_eval_samples": None,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("folds")
    return [smallruns.train(root, run_name=f"f{k}", fold=f"{k}/3", **FLAGS)[0] for k in (1, 2, 3)]


@pytest.mark.slow
def test_every_image_is_scored_by_the_run_that_held_it_out(runs, tmp_path, capsys):
    folder = smallruns.ensemble(tmp_path, runs[2], runs[0], runs[1], mixed_precision="no")
    said = capsys.readouterr().out
    assert "fold         1 of 3: f1, 479 held-out images" in said
    assert "scored       1,437 images, each by the run that held it out" in said
    found = json.loads((folder / "report.json").read_text())
    assert found["scored"] == {"role": "out-of-fold", "split": "train", "images": 1437}
    rights = []
    for k, (run, row) in enumerate(zip(runs, found["folds"], strict=True), start=1):
        trained = read_trained(run)
        flags = {"max_train_samples": 300, "test_split": "none", "fold": f"{k}/3"}
        val = load_data("digits", **flags).val
        look = trained.preprocessing
        images = decode(val, "image", look).take(torch.arange(479), torch.device("cpu"))[0]
        with torch.inference_mode():
            logits = load_model(trained)(normalize_batch(images, look.mean, look.std))
        right = int((logits.argmax(1) == torch.from_numpy(val.labels)).sum())
        summary = json.loads((run / "summary.json").read_text())
        assert row["run"] == run.name and row["images"] == 479
        assert row["accuracy"] == right / 479 == summary["scores"]["val/acc"]
        rights.append(right)
    assert found["metrics"]["acc"] == sum(rights) / 1437
    text = (folder / "report.md").read_text()
    assert "| 2/3  | f2" in text and "Every image is scored by the run that held it out" in text


@pytest.mark.slow
def test_what_is_no_cross_validation_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match=r"needs each fold once: 2/3 is missing"):
        smallruns.ensemble(tmp_path, runs[0], runs[2], split="val")
    folder = smallruns.ensemble(tmp_path, runs[0], runs[2])  # of two folds, on test
    assert json.loads((folder / "report.json").read_text())["scored"]["role"] == "test"
    other, _ = smallruns.train(tmp_path, run_name="other", fold="2/3", **FLAGS | {"seed": 5})
    with pytest.raises(UserError, match="folds of different splits: seed is 42 in f1"):
        smallruns.ensemble(tmp_path, runs[0], other, runs[2])
    other, _ = smallruns.train(tmp_path, run_name="more", fold="1/2", **FLAGS)
    with pytest.raises(UserError, match="these runs are folds of 2 and of 3"):
        smallruns.ensemble(tmp_path, other, runs[1], runs[2])


@pytest.mark.parametrize(
    ("given", "tta", "words"),
    [
        ({"soup": "command line"}, "none", "--no_soup has no effect on the folds"),
        ({"average": "command line"}, "none", "--average has no effect on the folds"),
        ({}, "flip,shift", "--tta flip,shift: the folds of a cross-validation take one kind"),
    ],
)
def test_flags_of_combinations_are_refused(given, tta, words):
    crossvalidation.check_flags({"run_name": "command line"}, "flip")
    with pytest.raises(UserError, match=words):
        crossvalidation.check_flags(given, tta)
