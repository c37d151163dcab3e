"""export.py: what is written answers as the run does, from the image's file to its probability."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import smallruns
from harness.errors import UserError
from harness.export import graphs, hub
from harness.models.calibration import read_calibration
from harness.models.trained import load_model, read_trained

pytestmark = pytest.mark.slow  # the exporters take seconds to import

# A crop, bicubic, photographs that are no squares: what resizing can get wrong
TRAINING = smallruns.MEMBER | {
    "model": "resnet18", "stem": "standard", "image_size": 32, "crop_pct": 0.8,
    "interpolation": "bicubic", "max_train_samples": 200, "max_eval_samples": None,
    "mean": "0.5,0.4,0.3", "std": "0.2,0.3,0.4",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return smallruns.train(root, run_name="digits", **TRAINING)[0]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)
    file = tmp_path_factory.mktemp("photo") / "photo.jpg"
    Image.fromarray(small).resize((130, 90), Image.BICUBIC).save(file, quality=95)
    return file


def export(output_dir, run, **flags):
    flags = {"output_dir": output_dir, "run_name": "e", "threads": 1, **flags}
    folder, status = smallruns.run("export", [str(run), *smallruns.words(flags)])
    assert status == 0
    return folder


def expected(run, photo, tmp_path):
    """(class, probability) by predict.py."""
    words = [str(run), str(photo), f"--output_dir={tmp_path}", "--run_name=p", "--threads=1",
             "--mixed_precision=no", "--format=jsonl"]  # fmt: skip
    folder, _ = smallruns.run("predict", words)
    row = json.loads((folder / "predictions.jsonl").read_text())
    return row["class_1"], row["probability_1"]


def card_says(folder, photo):
    """What the Python of the card prints for the photo, in a process that knows nothing of us."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[-1]
    code = code.replace('"photo.jpg"', repr(str(photo)))
    code = code.replace(f"local-dir:{folder.name}", f"local-dir:{folder}")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    name, probability = done.stdout.split()
    return name, float(probability)


@pytest.mark.parametrize("kind", ["onnx", "torch", "timm"])
def test_the_lines_of_the_card_give_what_predict_gives(run, photo, tmp_path, kind, capsys):
    folder = export(tmp_path, run, to=kind)
    assert "checked on   360 test images" in capsys.readouterr().out
    name, probability = card_says(folder, photo)
    wanted = expected(run, photo, tmp_path)
    temperature = read_calibration(read_trained(run))["temperature"]
    assert temperature != 1
    assert name == wanted[0]
    assert probability == pytest.approx(wanted[1], abs=2e-3)
    if kind == "timm":  # the run's own card ends with the same lines, for the run's own folder
        assert card_says(run, photo) == pytest.approx((name, probability))
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n") and "pipeline_tag: image-classification" in text
    assert "model-index" in text and "of 360 test images are right" in text


def test_the_graph_takes_any_number_of_images_and_knows_its_classes(run, tmp_path):
    import onnx

    folder = export(tmp_path, run, to="onnx")
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    trained = read_trained(run)
    look, known = trained.preprocessing, read_calibration(trained)
    classifier = graphs.Classifier(load_model(trained), look.mean, look.std, known["temperature"])
    ours = graphs.run_module(classifier.eval(), [pixels])
    for sizes in ([5], [1, 4], [2, 2, 1]):
        theirs = graphs.run_onnx(folder / "model.onnx", pixels.split(sizes))
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    told = {p.key: p.value for p in onnx.load(folder / "model.onnx").metadata_props}
    assert json.loads(told["classes"]) == trained.classes
    assert json.loads(told["preprocessing"])["center_crop"] == 32
    assert sum(json.loads(told["sample_output"])) == pytest.approx(1, abs=1e-4)


def test_small_precisions_are_judged_and_refused_where_they_lose_too_much(run, tmp_path, capsys):
    folder = export(tmp_path, run, to="onnx", precision="int8", max_accuracy_drop=100)
    assert "int8         accuracy " in capsys.readouterr().out
    small = (folder / "model.onnx").stat().st_size
    folder = export(tmp_path, run, to="onnx", precision="fp16")
    assert (folder / "model.onnx").stat().st_size > 1.5 * small
    before = (folder / "model.onnx").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "write_int8", lambda fp32, path, _: scrambled(fp32, path))
        with pytest.raises(UserError, match=r"int8 loses \d+.\d+ points, over .* not written"):
            export(tmp_path, run, to="onnx", precision="int8")
    assert (folder / "model.onnx").read_bytes() == before
    assert not [p for p in folder.iterdir() if "writing" in p.name]


def scrambled(fp32, path):
    """The graph with its last weights turned round: nearly every image gets another class."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(fp32)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(("fc.weight", "fc.bias")):
            array = numpy_helper.to_array(tensor)[::-1].copy()
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)


def test_an_export_that_answers_otherwise_is_not_written(run, tmp_path, monkeypatch):
    real = graphs.run_onnx
    monkeypatch.setattr(graphs, "run_onnx", lambda *a: real(*a).roll(1, 1))
    with pytest.raises(UserError, match="gives other answers than the run's network: not written"):
        export(tmp_path, run, to="onnx")
    assert not (tmp_path / "e/model.onnx").exists()


def test_where_the_data_set_is_gone_made_up_images_check_it(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    smallruns.edit_json(copy / "config.json", lambda c: c["flags"].update(dataset="/gone"))
    smallruns.edit_json(copy / "config.json", lambda c: c["data"].update(source="/gone"))
    smallruns.edit_json(copy / "config.json", lambda c: c.update(dataset="/gone"))
    export(tmp_path, copy, to="torch")
    assert "checked on   64 made-up images: " in capsys.readouterr().out


def test_the_hub_gets_these_files_and_is_compared(run, tmp_path, monkeypatch):
    import huggingface_hub

    calls, stored = [], {}

    class Api:
        def create_repo(self, name, **words):
            calls.append((name, words["private"]))

        def upload_folder(self, repo_id, folder_path, allow_patterns, **_):
            for file in allow_patterns:
                target = tmp_path / f"hub-{file}"
                shutil.copyfile(f"{folder_path}/{file}", target)
                stored[file] = str(target)
            return SimpleNamespace(oid="abc")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda name, file, revision: stored[file]
    )
    folder = export(tmp_path, run, to="hub", push="me/digits")
    assert calls == [("me/digits", True)] and set(stored) == set(hub.FILES)
    (tmp_path / "hub-config.json").write_text("{}")
    monkeypatch.setattr(
        Api, "upload_folder", lambda self, **_: SimpleNamespace(oid="abc"), raising=True
    )
    with pytest.raises(UserError, match=r"on the Hub has another config\.json than was sent"):
        hub.push(folder, "me/digits")
    monkeypatch.setattr(Api, "create_repo", lambda self, *_, **__: 1 / 0)
    with pytest.raises(UserError, match="did not take me/digits: division by zero; the folder is"):
        hub.push(folder, "me/digits")
    with pytest.raises(UserError, match="a model on the Hub is called owner/name"):
        hub.push(folder, "digits")
    assert "--push OWNER/NAME" in hub.push(folder, None)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"precision": "int8", "to": "torch"}, "--precision int8 has no effect with --to torch"),
        ({"push": "a/b", "to": "timm"}, "--push has no effect with --to timm"),
    ],
)
def test_flags_without_effect_are_refused(run, tmp_path, flags, line):
    with pytest.raises(UserError, match=line):
        export(tmp_path, run, **flags)


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs onnxruntime: pip install onnxruntime"):
        graphs.need("onnx", "onnxruntime")
