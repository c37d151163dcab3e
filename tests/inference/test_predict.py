"""predict.py as a user runs it: right, complete, in order, the same on two processes."""

import csv
import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import faulty
import smallruns
from harness.errors import UserError
from harness.models.calibration import read_calibration
from harness.models.trained import load_model, read_trained
from tricks.augment import normalize_batch

TRAINING = smallruns.MEMBER | {"max_train_samples": None, "max_eval_samples": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [
        smallruns.train(root, run_name=name, **TRAINING | special)[0]
        for name, special in {"a": {}, "b": {"model": "test_resnet", "image_size": 24}}.items()
    ]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """130 digits in folders of their classes: three batches."""
    root, digits = tmp_path_factory.mktemp("photos"), load_digits()
    for k in range(130):
        folder = root / str(digits.target[k])
        folder.mkdir(exist_ok=True)
        Image.fromarray((digits.images[k] * 15).astype(np.uint8)).save(folder / f"{k:03}.png")
    return root


def predict(output_dir, *words, **flags):
    flags = {"output_dir": output_dir, "run_name": "p", "threads": 1, **flags}
    folder, status = smallruns.run("predict", [*map(str, words), *smallruns.words(flags)])
    assert status == 0
    return folder


def rows_of(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def expected(run, files):
    trained = read_trained(run)
    look, known = trained.preprocessing, read_calibration(trained)
    images = [Image.open(f).convert("RGB").resize((look.size,) * 2, Image.BILINEAR) for f in files]
    pixels = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = load_model(trained)(normalize_batch(pixels, look.mean, look.std)).double()
    return (logits / known["temperature"]).softmax(1), trained.classes


def test_calibrated_probabilities_in_order_and_scored_by_folders(runs, photos, tmp_path, capsys):
    folder = predict(tmp_path, runs[0], photos, mixed_precision="no")
    rows, said = rows_of(folder), capsys.readouterr().out
    files = sorted(photos.rglob("*.png"))
    assert [row["image"] for row in rows] == [str(file) for file in files]
    wanted, classes = expected(runs[0], files)
    for row, file, p in zip(rows, files, wanted, strict=True):
        assert row["true"] == file.parent.name and row["error"] == ""
        best = p.topk(5)
        assert [row[f"class_{k}"] for k in range(1, 6)] == [classes[k] for k in best.indices]
        got = [float(row[f"probability_{k}"]) for k in range(1, 6)]
        assert got == pytest.approx(best.values.tolist(), abs=1e-5)
    right = sum(row["class_1"] == row["true"] for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["accuracy"]["all"]["right"] == right > 60
    assert f"accuracy     {100 * right / 130:.2f} % of 130" in said
    assert "labels known: predictions are scored" in said and "temperature" in said
    assert Image.open(folder / "predictions.png").width > 300


@pytest.mark.slow
def test_two_runs_of_other_sizes_are_averaged(runs, photos, tmp_path):
    rows = rows_of(predict(tmp_path, *runs, photos, mixed_precision="no", top_k=10))
    files = sorted(photos.rglob("*.png"))
    mean = (expected(runs[0], files)[0] + expected(runs[1], files)[0]) / 2
    for row, p in zip(rows, mean, strict=True):
        assert float(row["probability_1"]) == pytest.approx(p.max().item(), abs=1e-5)
        total = sum(float(row[f"probability_{k}"]) for k in range(1, 11))
        assert total == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(runs, photos, tmp_path):
    words = [str(runs[0]), str(photos), "--tta=flip", "--run_name=p", "--threads=1"]
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        argv = [*words, f"--output_dir={out}"]
        faulty.start(out, processes=processes, script="predict", argv=argv).done()
        found.append((out / "p/predictions.csv").read_bytes())
    assert found[0] == found[1]


def test_what_cannot_be_read_is_named_and_the_rest_is_done(runs, photos, tmp_path, capsys):
    for name in ("a.jpg", "z.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"no image")
    some = sorted(photos.rglob("*.png"))[:3]
    folder = predict(tmp_path, runs[0], tmp_path / "in", *some)
    rows, said = rows_of(folder), capsys.readouterr().out
    assert [bool(row["error"]) for row in rows] == [True, True, False, False, False]
    assert rows[0]["class_1"] == "" and rows[2]["class_1"] != ""
    assert "unreadable   " in said and "a.jpg: not an image format Pillow knows" in said
    assert said.count(".png   ") == 3  # a line each
    with pytest.raises(UserError, match="none of the 2 images can be read"):
        predict(tmp_path, runs[0], tmp_path / "in")


@pytest.mark.slow
@pytest.mark.parametrize("sets", ["threshold", "adaptive"])
def test_sets_hold_the_class_as_often_as_asked(runs, photos, tmp_path, capsys, sets):
    folder = predict(tmp_path, runs[0], photos, coverage=0.9, sets=sets)
    summary = json.loads((folder / "summary.json").read_text())["sets"]
    # 130 images: two and a half standard deviations under 90 %
    assert summary["held"] > 0.83 and 0.8 < summary["mean_size"] < 6
    for row in rows_of(folder):
        assert row["set"] == "" or row["class_1"] == row["set"].split("|")[0]
    assert summary["empty"] == 0 or sets == "threshold"
    assert f"{sets} sets that hold the class of at least 0.9 of images like" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_abstaining_and_other_formats(runs, photos, tmp_path):
    import pyarrow.parquet

    folder = predict(tmp_path, runs[0], photos, min_probability=0.6, format="jsonl")
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert {row["abstain"] for row in rows} == {True, False}
    for row in rows:
        assert row["abstain"] == (row["probability_1"] < 0.6)
    folder = predict(tmp_path, runs[0], photos, min_probability=0.6, format="parquet")
    assert pyarrow.parquet.read_table(folder / "predictions.parquet").to_pylist() == rows
    assert not (folder / "predictions.jsonl").exists()


@pytest.mark.slow
def test_a_data_set_with_labels_and_one_without(runs, tmp_path, capsys):
    digits = load_digits()
    images = [Image.fromarray((d * 15).astype(np.uint8)) for d in digits.images[:70]]
    labels = datasets.ClassLabel(names=[str(k) for k in range(10)])
    features = datasets.Features({"picture": datasets.Image(), "label": labels})
    columns = {"picture": images, "label": digits.target[:70].tolist()}
    for name, values in (("labelled", columns["label"]), ("without", [-1] * 70)):
        data = datasets.Dataset.from_dict(columns | {"label": values}, features=features)
        (tmp_path / name).mkdir()
        data.to_parquet(tmp_path / name / "test-00000-of-00001.parquet")
        folder = predict(tmp_path, runs[0], dataset=tmp_path / name, split="test")
        rows = rows_of(folder)
        assert len(rows) == 70 and ("true" in rows[0]) == (name == "labelled")
    assert "labels not known" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--split tset: .*did you mean .*test"):
        predict(tmp_path, runs[0], dataset=tmp_path / "labelled", split="tset")


@pytest.mark.parametrize(
    ("words", "flags", "line"),
    [
        ([], {}, "give the folder of a trained run, then images"),
        (["photos"], {}, "is not the folder of a run"),
        (["run"], {}, "give images"),
        (["run", "photos", "nothing.jpg"], {}, "nothing.jpg: no such file or folder"),
        (["run", "empty"], {}, "no images in this folder"),
        (["run", "photos"], {"split": "test"}, "--split has no effect here"),
        (["run", "photos"], {"coverage": 0.9999}, "needs at least 9,999 held-out images"),
    ],
)
def test_what_cannot_be_done_is_one_line(runs, photos, tmp_path, words, flags, line):
    (tmp_path / "empty").mkdir()
    places = {"run": runs[0], "photos": photos, "empty": tmp_path / "empty"}
    with pytest.raises(UserError, match=line):
        predict(tmp_path / "out", *[places.get(word, word) for word in words], **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_stdout_that_ends_is_no_traceback(runs, photos, tmp_path):
    command = [sys.executable, str(smallruns.ROOT / "predict.py"), str(runs[0]), str(photos)]
    command += [f"--output_dir={tmp_path}", "--threads=1"]
    process = subprocess.Popen(
        f"{' '.join(command)} 2>{tmp_path}/err | head -n 1", shell=True, stdout=subprocess.PIPE
    )
    process.communicate(timeout=120)
    assert "Traceback" not in (tmp_path / "err").read_text()


@pytest.mark.slow
def test_load_run_gives_what_predict_gives(runs, photos, tmp_path):
    from harness import load_run

    model, preprocess, classes, temperature = load_run(runs[0])
    files = sorted(photos.rglob("*.png"))[:20]
    rows = rows_of(predict(tmp_path, runs[0], *files, mixed_precision="no"))
    for row, file in zip(rows, files, strict=True):
        for image in (file, open(file, "rb"), Image.open(file)):  # noqa: SIM115
            with torch.inference_mode():
                p = (model(preprocess(image)) / temperature).softmax(1)[0]
            assert classes[p.argmax()] == row["class_1"]
            assert float(p.max()) == pytest.approx(float(row["probability_1"]), abs=1e-4)


def test_a_report_of_other_flags_is_not_replaced_without_a_word(runs, photos, tmp_path, capsys):
    predict(tmp_path, runs[0], photos / "0")
    predict(tmp_path, runs[0], photos / "0", threads=2)  # computes the same
    assert "replaces" not in capsys.readouterr().out
    predict(tmp_path, runs[0], photos / "1", dry_run=True, top_k=2)
    predict(tmp_path, runs[0], photos / "1", top_k=2, run_name="q")
    lines = capsys.readouterr().out.splitlines()
    (note,) = [line for line in lines if "replaces" in line]
    assert note.startswith(f"note         replaces the report in {tmp_path / 'p'}, which was made ")
    assert "inputs " in note and note.endswith("top_k 5; another --run_name keeps both")


def test_images_of_a_data_set_can_be_handed_to_other_processes():
    import pickle

    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    from harness.inference.images import of_dataset

    cells = [{"bytes": b"first", "path": None}, {"bytes": b"second", "path": None}]
    dataset = Dataset.from_dict({"image": cells}, features=Features({"image": ImageFeature()}))
    images = of_dataset(dataset, "image", [1, 0], None, "here")
    assert pickle.loads(pickle.dumps(images)).read(0).read() == b"second"
