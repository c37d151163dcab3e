"""report.md, report.json and mistakes.csv of a run: right, complete, in the user's words."""

import csv
import json

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from PIL import Image

import smallruns
from harness.data.sources import load_data
from harness.data.stores import Samples
from harness.errors import UserError
from harness.models.calibration import read_calibration
from harness.models.trained import read_trained
from harness.reports import training as report
from harness.reports.slices import _groups


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gray squares of two classes, 30 dark and 3 bright, with a table that names their origin."""
    root = tmp_path_factory.mktemp("report") / "squares"
    root.mkdir()
    lines = ["file,class,origin,age"]
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for n in range(33):
            bright = n >= 30
            value = int(rng.integers(180, 220) if bright else rng.integers(20, 90))
            name = f"{split}/{n}.png"
            (root / split).mkdir(exist_ok=True)
            size = (20 + n, 20) if split == "test" else (20, 20)
            Image.new("L", size, value).save(root / name)
            lines.append(f"{name},{'bright' if bright else 'dark'},{'ab'[n % 2]},{n}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


def made(folder, logits=None, **options):
    data = load_data(str(folder))
    labels = torch.from_numpy(data.test.labels)
    pixels = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    samples = Samples(pixels, torch.arange(len(labels)), labels)
    if logits is None:
        rng = torch.Generator().manual_seed(1)
        logits = torch.randn(len(labels), 2, generator=rng)
    args = ("run", "test", data.test, samples, data.image_column, data.classes)
    return data, samples, logits, report.facts(*args, logits, **options)


def test_scores_by_class_are_scikit_learns(folder):
    data, samples, logits, found = made(folder)
    true, predicted = samples.labels.numpy(), logits.argmax(1).numpy()
    precision, recall, f1, support = reference.precision_recall_fscore_support(true, predicted)
    for k, row in enumerate(found["by_class"]):
        assert row["class"] == data.classes[k] and row["images"] == support[k]
        wanted = {"accuracy": recall[k], "precision": precision[k], "f1": f1[k]}
        assert {key: row[key] for key in wanted} == pytest.approx(wanted)
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    assert found["confusion"] == reference.confusion_matrix(true, predicted).tolist()
    assert found["metrics"]["acc"] == reference.accuracy_score(true, predicted)
    assert found["metrics"]["balanced_acc"] == pytest.approx(recall.mean())


def test_mistakes_are_all_there_the_surest_first_with_their_files(folder, tmp_path):
    _, samples, logits, found = made(folder)
    report.write(tmp_path, found, samples)
    rows = list(csv.DictReader((tmp_path / "mistakes.csv").open()))
    wrong = (logits.argmax(1) != samples.labels).nonzero().flatten().tolist()
    assert len(rows) == len(wrong) == json.loads((tmp_path / "report.json").read_text())["wrong"]
    assert [float(r["probability"]) for r in rows] == sorted(
        (float(r["probability"]) for r in rows), reverse=True
    )
    for row in rows:
        assert row["path"] == str(folder / "test" / row["path"].split("/")[-1])
        with Image.open(row["path"]) as image:
            value = np.asarray(image).mean()
        assert row["true"] == ("bright" if value > 128 else "dark") != row["predicted"]
    text = (tmp_path / "report.md").read_text()
    assert rows[0]["path"] in text and f"{len(wrong)} images are wrong" in text
    for name in ("confusion", "reliability", "mistakes"):
        assert Image.open(tmp_path / f"{name}.png").width > 300


def test_a_network_that_always_says_the_largest_class_has_learned_nothing(folder, tmp_path):
    """Accuracy 91 %, and the report says what it is worth."""
    logits = torch.tensor([[0.0, 5.0]]).repeat(33, 1)
    data, samples, _, found = made(folder, logits)
    assert data.classes == ["bright", "dark"]
    report.write(tmp_path, found, samples)
    text = (tmp_path / "report.md").read_text()
    assert "90.91 % of 33 test images are right" in text
    assert "balanced accuracy 50.00 %" in text
    assert "Always answering dark would be right on 90.91 %" in text
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["by_class"][0]["precision"] is None  # nothing was taken for bright
    right = made(folder, torch.nn.functional.one_hot(samples.labels, 2) * 9.0)[-1]
    assert "always" not in report.headline(right)
    report.write(tmp_path, right, samples)
    assert not (tmp_path / "mistakes.png").exists()  # of before
    assert "All images are right" in (tmp_path / "report.md").read_text()


def test_slices_are_the_accuracies_of_groups_the_lowest_first(folder, tmp_path):
    names = ["origin", "age", "brightness", "aspect", "size"]
    data, samples, logits, found = made(folder, slice_by=names)
    right = (logits.argmax(1) == samples.labels).numpy()
    origin = np.array(data.test.dataset["origin"])[data.test.rows]
    rows = {row["group"]: row for row in found["slices"]["origin"]}
    assert {*rows} == {"a", "b"}
    for group, row in rows.items():
        assert row["images"] == (origin == group).sum()
        assert row["accuracy"] == right[origin == group].mean()
    for name in names:
        rows = found["slices"][name]
        assert sum(row["images"] for row in rows) == 33
        assert [row["accuracy"] for row in rows] == sorted(row["accuracy"] for row in rows)
    assert len(found["slices"]["age"]) == len(found["slices"]["aspect"]) == 4  # quarters
    assert [row["group"] for row in found["slices"]["size"]] == ["20.0"]
    report.write(tmp_path, found, samples)
    assert "| origin | images | accuracy %" in (tmp_path / "report.md").read_text()


def test_groups_of_any_values():
    assert {k: v.tolist() for k, v in _groups(["a", None, "a", True]).items()} == {
        "a": [0, 2], "none": [1], "True": [3],
    }  # fmt: skip
    many = [*range(100), None]
    assert [len(v) for v in _groups(many).values()] == [25, 25, 25, 25, 1]
    assert len(_groups([0.0] * 90 + list(range(1, 20)))) >= 2  # quarters that are one


def test_a_thousand_classes_stay_readable(tmp_path):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(3000, 1000, generator=rng)
    labels = torch.randint(0, 1000, (3000,), generator=rng)
    samples = Samples(torch.zeros(1, 3, 8, 8, dtype=torch.uint8).expand(3000, -1, -1, -1),
                      torch.arange(3000), labels)  # fmt: skip
    data = load_data("digits")
    split = data.train.__class__("test", data.train.dataset, np.zeros(3000, int), labels.numpy())
    classes = [f"class {k}" for k in range(1000)]
    found = report.facts("run", "test", split, samples, data.image_column, classes, logits)
    report.write(tmp_path, found, samples)
    assert len((tmp_path / "report.md").read_text()) < 20_000
    assert "The lowest 60 of 1,000 classes" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.json").stat().st_size < 1_000_000
    assert len(json.loads((tmp_path / "report.json").read_text())["by_class"]) == 1000


def test_classes_that_a_mean_leaves_out_are_named(folder, tmp_path, capsys):
    lines = (folder / "metadata.csv").read_text().splitlines()
    kept = [line for line in lines if not (line.startswith("test/3") and ",bright," in line)]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(kept) + "\n")
    flags = {"dataset": folder, "labels": table, "batch_size": 8, "max_train_samples": None}
    smallruns.train(tmp_path / "out", metrics="auroc", dry_run=True, **flags)
    said = capsys.readouterr().out
    assert "auroc leaves out 1 of 2 classes, which have no image in 'test': bright" in said
    data, samples, logits, _ = made(folder)
    dark = samples.labels == 1
    some = Samples(samples.stored, samples.rows[dark], samples.labels[dark])
    split = data.test.__class__("test", data.test.dataset, data.test.rows[dark.numpy()],
                                data.test.labels[dark.numpy()])  # fmt: skip
    found = report.facts("run", "test", split, some, data.image_column, data.classes, logits[dark])
    report.write(tmp_path, found, some)
    assert "without images, so left out: 1 of 2, bright." in (tmp_path / "report.md").read_text()
    assert found["metrics"]["auroc"] is None


def test_a_slice_that_is_not_there_is_named_before_any_work(folder, tmp_path):
    flags = {"dataset": folder, "batch_size": 8, "max_train_samples": None}
    with pytest.raises(UserError, match=r"--slice_by orign: .*did you mean .*origin.*brightness"):
        smallruns.train(tmp_path, slice_by="orign", **flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("val", [0, 0.3])
def test_a_run_writes_the_report_of_its_result(tmp_path, val):
    for name in ("train", "finetune"):
        run, _ = smallruns.train(tmp_path, script=name, run_name=name, val_fraction=val,
                                 overwrite=True, **({} if name == "train" else
                                 smallruns.FINETUNE))  # fmt: skip
        summary = json.loads((run / "summary.json").read_text())
        found = json.loads((run / "report.json").read_text())
        assert found["scored"]["role"] == "test" and found["scored"]["images"] == 100
        assert found["metrics"]["acc"] == summary["accuracy"]
        assert found["metrics"]["loss"] == pytest.approx(summary["loss"], rel=0.02)
        calibration = run / "calibration.json"
        assert calibration.exists() == bool(val)
        if val:
            facts = json.loads(calibration.read_text())
            trained = read_trained(run)
            assert read_calibration(trained) == facts and facts["source"] == "val"
            assert facts["ece_after"] <= facts["ece_before"] + 0.02
            assert facts["images"] == 100 and "after the temperature" in found["reliability"]
            assert read_calibration(trained._replace(sha256="0")) is None
            text = (run / "report.md").read_text()
            assert f"The temperature, {facts['temperature']:.3f}, was fitted on 100 val" in text
            calibration.write_text('{"temperature": 0}')
            with pytest.raises(UserError, match="holds no temperature"):
                read_calibration(trained)
