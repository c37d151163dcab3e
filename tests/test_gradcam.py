"""gradcam.py, end to end on a small trained run: its pictures, its files, what it refuses."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import smallruns
from harness.errors import UserError
from harness.explain import cams, sheets
from tricks.cam import CAM_METHODS

TRAINED = {
    "max_train_samples": 500, "batch_size": 20, "gradient_accumulation_steps": 1,
    "augment": "none", "mix_prob": 0, "random_erasing": 0, "ema_decay": 0, "dropout": None,
    "val_fraction": 0.2, "max_eval_samples": None, "run_name": "digits",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of timm's narrowest ResNet, at a size at which its last layer has 2 × 2 places."""
    folder, status = smallruns.train(
        tmp_path_factory.mktemp("trained"), image_size=64, epochs=3, mixed_precision="no", **TRAINED
    )
    assert status == 0
    return folder


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """Four times the time, for maps that are looked at number by number."""
    folder, status = smallruns.train(
        tmp_path_factory.mktemp("resnet18"), model="resnet18", image_size=16, epochs=1, **TRAINED
    )
    assert status == 0
    return folder


def explain(output_dir, *words, **flags):
    flags = {"output_dir": output_dir, "run_name": "cams", "report_to": "none", **flags}
    folder, status = smallruns.run("gradcam", [*map(str, words), *smallruns.words(flags)])
    assert status == 0
    report = json.loads((folder / "report.json").read_text())
    return folder, report, load_file(folder / "maps.safetensors")


def photo(path, size=(40, 30), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.mark.slow
def test_a_run_gives_a_sheet_of_right_and_wrong_images(resnet18, tmp_path):
    before = (resnet18 / "model.safetensors").read_bytes()
    folder, report, maps = explain(tmp_path, resnet18, layer="layer3")
    assert len(report["images"]) == 16 and report["layer"] == "layer3"
    right = [row["true"] == row["predicted"] for row in report["images"]]
    assert sum(right) >= 8 and not all(right)
    assert maps["gradcam/layer"].shape == (16, 1, 4, 4)
    heat = maps["gradcam/image"]
    assert heat.shape == (16, 1, 16, 16) and heat.min() >= 0 and heat.max() <= 1
    panels = sorted(path.name for path in (folder / "panels").iterdir())
    assert panels == [row["panel"] for row in report["images"]] and len(set(panels)) == 16
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width <= sheets.WIDEST and len(np.unique(np.asarray(sheet))) > 50
    text = (folder / "report.md").read_text()
    assert all(f"panels/{name}" in text for name in panels)
    assert (resnet18 / "model.safetensors").read_bytes() == before
    # again: the same numbers, and nothing of the first time is left
    _, again, maps2 = explain(tmp_path, resnet18, layer="layer3", max_images=4)
    assert len(list((folder / "panels").iterdir())) == 4
    sources = [row["source"] for row in report["images"]]
    place = [sources.index(row["source"]) for row in again["images"]]
    assert torch.equal(maps2["gradcam/layer"], maps["gradcam/layer"][place])


def test_the_maps_are_those_of_the_trick(run, tmp_path):
    from harness.data.pixels import decode_image
    from harness.data.sources import load_data
    from harness.models.trained import load_model, read_trained
    from tricks.cam import GradCam

    _, report, maps = explain(
        tmp_path, run, split="test", indices="14,3", layer="layer2", method="layercam,gradcam",
        target="7",
    )  # fmt: skip
    assert [row["source"] for row in report["images"]] == ["test 14", "test 3"]
    trained = read_trained(run)
    test = load_data("digits").test
    images = []
    for k in (14, 3):
        cell = test.dataset.with_format("arrow")[k : k + 1]["image"].to_pylist()[0]
        path = tmp_path / "one.png"
        path.write_bytes(cell["bytes"])
        pixels = torch.from_numpy(decode_image(path, 64)).float() / 255
        mean, std = (
            torch.tensor(v).view(3, 1, 1)
            for v in (trained.preprocessing.mean, trained.preprocessing.std)
        )
        images.append((pixels - mean) / std)
    with GradCam(load_model(trained), "layer2") as cam:
        seen = cam(torch.stack(images), torch.tensor([7, 7]), ("layercam", "gradcam"))
    for method in ("layercam", "gradcam"):
        assert torch.allclose(maps[f"{method}/layer"][:, 0], seen.maps[method], atol=1e-6)
    assert maps["classes"].tolist() == [[7], [7]]
    assert [row["true"] for row in report["images"]] == [str(test.labels[k]) for k in (14, 3)]


@pytest.mark.slow
def test_methods_and_classes_stand_side_by_side(run, tmp_path):
    folder, report, maps = explain(
        tmp_path, run, only="wrong", contrast=True, method=",".join(CAM_METHODS), layer="layer4",
        max_images=2, split="test",
    )  # fmt: skip
    assert {key.split("/")[0] for key in maps} == {*CAM_METHODS, "classes", "probabilities"}
    assert all(one.isfinite().all() for one in maps.values())
    for row in report["images"]:
        assert row["targets"] == [row["true"], row["predicted"]] and row["true"] != row["predicted"]
    with Image.open(folder / "panels" / report["images"][0]["panel"]) as panel:
        assert panel.width >= 13 * 128  # the image and six methods for two classes
    _, report, maps = explain(tmp_path, run, all_classes=True, indices="0", split="test")
    assert maps["gradcam/layer"].shape[:2] == (1, 10)
    assert report["images"][0]["targets"] == list("0123456789")
    _, report, _ = explain(tmp_path, run, only="right", max_images=5, target="true")
    assert all(row["true"] == row["predicted"] for row in report["images"])


@pytest.mark.slow
def test_checks_tell_maps_from_chance(resnet18, tmp_path, capsys):
    _, report, _ = explain(
        tmp_path, resnet18, check=True, layer="layer2", method="hirescam", only="right",
        split="test", max_images=8,
    )  # fmt: skip
    mean = report["checks"]["hirescam"]
    assert mean["insertion"] > mean["insertion_random"]
    assert abs(mean["randomised"]) < 0.9
    assert "deletion AUC" in capsys.readouterr().out
    assert all(row["checks"]["hirescam"].keys() >= {"deletion"} for row in report["images"])


@pytest.mark.slow
def test_the_heat_in_a_region_is_measured_where_the_data_has_one(run, tmp_path):
    import datasets

    from harness.data.sources import load_data

    stored = load_data("digits").train.dataset.select(range(200))
    width, height = stored[0]["image"].size
    boxes = [[0, 0, width, height / 2]] * 200
    with_boxes = stored.add_column("box", boxes)
    datasets.DatasetDict(train=with_boxes, test=with_boxes).save_to_disk(tmp_path / "data")
    _, report, maps = explain(
        tmp_path, run, dataset=tmp_path / "data", split="test", indices="5,6", check=True,
        region_column="box", layer="layer2",
    )  # fmt: skip
    for k, row in enumerate(report["images"]):
        found = row["checks"]["gradcam"]
        heat = maps["gradcam/image"][k, 0]
        assert found["region"] == pytest.approx(0.5, abs=0.01)
        share = (heat[:32].sum() / heat.sum()).item()
        assert found["heat_in_region"] == pytest.approx(share, abs=0.01)
    with pytest.raises(UserError, match='no such column, did you mean "box"'):
        explain(
            tmp_path, run, dataset=tmp_path / "data", split="test", check=True, region_column="boxx"
        )


def test_files_folders_and_patterns(run, tmp_path):
    (tmp_path / "photos").mkdir()
    a, b, c = (photo(tmp_path / "photos" / name) for name in ("a.png", "b.jpg", "c.png"))
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    found = cams.find_files([str(b), str(tmp_path / "photos"), str(tmp_path / "photos" / "*.png")])
    assert found == [b, a, c]
    _, report, _ = explain(tmp_path, run, "--images", tmp_path / "photos", target="3")
    assert [row["source"] for row in report["images"]] == [str(f) for f in (a, b, c)]
    assert all(row["true"] is None and row["targets"] == ["3"] for row in report["images"])


@pytest.mark.slow
def test_a_published_network_needs_no_run(tmp_path, monkeypatch):
    import torchvision

    model = torchvision.models.resnet18(weights=None)
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    monkeypatch.setattr(
        type(weights), "get_state_dict", lambda self, **_: model.state_dict(), raising=False
    )
    image = photo(tmp_path / "photo.jpg", (300, 260))
    _, report, maps = explain(tmp_path, "--images", image, model="resnet18")
    assert report["layer"] == "layer4" and report["map_size"] == [7, 7]
    assert report["images"][0]["predicted"] in weights.meta["categories"]
    assert maps["gradcam/image"].shape == (1, 1, 224, 224)


@pytest.mark.slow
def test_names_are_drawn_and_written_safely(run, tmp_path):
    long = "a name that is much longer than any panel of a sheet could ever be wide " * 3
    names = ["../../x", "a/b\\c", "纸 ☃", long, "", "CON", "a\0b", "é|ü", "7", "."]
    config = json.loads((run / "config.json").read_text())
    copy = tmp_path / "named"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    (copy / "config.json").write_text(json.dumps(config | {"label_names": names}))
    image = photo(tmp_path / "photo.png")
    for target in range(10):
        folder, report, _ = explain(tmp_path, copy, "--images", image, target=str(target))
        name = report["images"][0]["panel"]
        assert re.fullmatch(r"[\w.-]+", name) and len(name) < 100 and ".." not in name
        assert (folder / "panels" / name).exists()
    files = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert files == {"named", "photo.png", "cams"}


def test_no_heat_is_drawn_as_nothing(run, tmp_path, capsys):
    state = load_file(run / "model.safetensors")
    state["fc.weight"].zero_()
    copy = tmp_path / "zero"
    copy.mkdir()
    save_file(state, copy / "model.safetensors")
    (copy / "config.json").write_bytes((run / "config.json").read_bytes())
    _, report, maps = explain(tmp_path, copy, split="test", indices="0,1", layer="layer3")
    assert not maps["gradcam/image"].any()
    names = [row["predicted"] for row in report["images"]]
    assert [row["empty"] for row in report["images"]] == [[f"gradcam of {n}"] for n in names]
    assert f"gradcam of {names[0]} is zero everywhere" in capsys.readouterr().out
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    colour = sheets.colours("inferno")
    assert (sheets.overlay(pixels, np.zeros((2, 2)), colour, 0.6) == pixels).all()
    hot = sheets.overlay(pixels, np.ones((2, 2)), colour, 1.0)
    assert (hot == colour(np.ones((2, 2)))).all()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_2proc", pytest.param("cpu", marks=pytest.mark.sweep)])
def test_launched_processes_share_the_work(resnet18, tmp_path, config):
    """An odd number of images, and the maps of this process in the same order."""
    flags = {
        "report_to": "none", "max_images": 3, "threads": 1, "layer": "layer3",
        "method": "gradcam,eigencam", "check": True,
    }  # fmt: skip
    _, one, maps = explain(tmp_path, resnet18, **flags)
    launcher = ("--config_file", str(smallruns.ROOT / f"accelerate_configs/{config}.yaml"))
    done = smallruns.launch(
        tmp_path, script="gradcam.py", argv=[resnet18], launcher=launcher, run_name="launched",
        **flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    launched = json.loads((tmp_path / "launched" / "report.json").read_text())
    launched_maps = load_file(tmp_path / "launched" / "maps.safetensors")
    assert maps.keys() == launched_maps.keys()
    for key, heat in maps.items():
        assert torch.allclose(heat.float(), launched_maps[key].float(), atol=1e-5), key
    for ours, theirs in zip(one["images"], launched["images"], strict=True):
        assert ours["source"] == theirs["source"]
        for method, values in ours["checks"].items():
            assert values == pytest.approx(theirs["checks"][method], abs=2e-3)  # a near tie
    assert len(one["images"]) == 3


# -- what is refused -------------------------------------------------------------------------------


def refused(tmp_path, *words, **flags):
    with pytest.raises(UserError) as error:
        explain(tmp_path, *words, **flags)
    assert "\n" not in str(error.value) and not (tmp_path / "cams").exists()
    return str(error.value)


def test_what_does_not_fit_is_refused(run, tmp_path):
    assert "or --model" in refused(tmp_path)
    assert "or --model" in refused(tmp_path, run, model="resnet18")
    assert "needs --images" in refused(tmp_path, model="resnet18") or "could not be loaded" in (
        refused(tmp_path, model="resnet18")
    )
    assert 'did you mean "gradcam"' in refused(tmp_path, run, method="gradcamm")
    said = refused(tmp_path, run, layer="layer44", max_images=1)
    assert "no layer is named 'layer44'" in said and "layer4" in said
    assert 'no class is called "eleven"' in refused(tmp_path, run, target="eleven")
    assert "numbers are 0 to 9" in refused(tmp_path, run, target="10")
    assert "has 360 images" in refused(tmp_path, run, split="test", indices="1,360")
    assert 'did you mean "inferno"' in refused(tmp_path, run, colormap="infernoo")
    for name, flags in {
        "contrast": {"contrast": True, "all_classes": True},
        "weights": {"weights": "default"},
        "only": {"only": "wrong", "indices": "1"},
        "region_column": {"region_column": "box"},
        "target": {"target": "7", "contrast": True},
    }.items():
        assert f"--{name} has no effect" in refused(tmp_path, run, **flags)
    said = refused(tmp_path, run, "--images", photo(tmp_path / "x.png"), split="test")
    assert "--split has no effect" in said
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("")
    assert "gradcam.py did not write" in refused(tmp_path, run, run_name="taken")


@pytest.mark.slow
def test_bad_images_are_named(run, tmp_path, capsys):
    good = photo(tmp_path / "good.png")
    text = tmp_path / "text.png"
    text.write_text("this is no image")
    cut = tmp_path / "cut.jpg"
    photo(cut, (200, 200))
    cut.write_bytes(cut.read_bytes()[:2000])
    bomb = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(bomb)
    for bad, why in ((text, "not an image format"), (cut, "truncated"), (bomb, "pixels")):
        said = refused(tmp_path, run, "--images", good, bad)
        assert str(bad) in said and why in said, said
    _, report, _ = explain(tmp_path, run, "--images", text, good, cut, bomb, skip_bad=True)
    assert [row["source"] for row in report["images"]] == [str(good)]
    out = capsys.readouterr().out
    assert all(f"left out     {bad}" in out for bad in (text, cut, bomb))


def test_images_that_are_not_there_are_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images in this folder" in refused(tmp_path, run, "--images", tmp_path / "empty")
    assert "no such file" in refused(tmp_path, run, "--images", tmp_path / "no.png")
    assert "no file matches" in refused(tmp_path, run, "--images", str(tmp_path / "*.png"))
    (tmp_path / "text.png").write_text("no image")
    said = refused(tmp_path, run, "--images", tmp_path / "text.png", skip_bad=True)
    assert "none of the images" in said
    good = photo(tmp_path / "good.png")
    assert "true class" in refused(tmp_path, run, "--images", good, contrast=True)
    assert "true class" in refused(tmp_path, run, "--images", good, target="true")


def test_a_network_without_places_is_refused(run, tmp_path, monkeypatch):
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 10))
    monkeypatch.setattr(cams, "load_model", lambda trained: flat)
    said = refused(tmp_path, run, max_images=1)
    assert said.startswith("digits: ") and ("positions" in said or "spatial" in said)


def test_a_hostile_file_is_not_run(run, tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    copy = tmp_path / "hostile"
    copy.mkdir()
    (copy / "config.json").write_bytes((run / "config.json").read_bytes())
    (copy / "model.safetensors").write_bytes(pickle.dumps(Hostile()))
    assert str(copy / "model.safetensors") in refused(tmp_path, copy)
    pth = tmp_path / "weights.pth"
    pth.write_bytes(pickle.dumps(Hostile()))
    good = photo(tmp_path / "good.png")
    said = refused(tmp_path, "--images", good, model="resnet18", weights=str(pth))
    assert str(pth) in said and not (tmp_path / "ran").exists()


def test_anybodys_file_of_a_timm_network_is_explained(tmp_path, capsys):
    """Its classes have no names, its cfg is that of timm's name, flags win."""
    import timm

    state = timm.create_model("test_vit", num_classes=3).state_dict()
    wrapped = {"state_dict": {f"model.{key}": value for key, value in state.items()}}
    torch.save(wrapped, tmp_path / "last.ckpt")
    flags = {"model": "timm/test_vit", "weights": str(tmp_path / "last.ckpt"), "mean": "0.1"}
    good = photo(tmp_path / "good.png")
    said = refused(tmp_path, "--images", good, **{**flags, "weights": "none"})
    assert "has nothing to show" in said
    _, report, _ = explain(tmp_path, "--images", good, target="2", **flags)
    assert report["images"][0]["predicted"] in "012"
    out = capsys.readouterr().out
    assert "timm-test_vit, 160 px, 3 classes; weights" in out and "its state_dict; images:" in out
    assert "timm's cfg of test_vit, whose weights they may be; --mean as given" in out


@pytest.mark.slow
def test_a_recipe_repeats_the_command(run, tmp_path):
    folder, report, _ = explain(tmp_path, run, indices="2,1", split="test", layer="layer3")
    again, status = smallruns.run(
        "gradcam", ["--config", str(folder / "config.yaml"), "--run_name", "again"]
    )
    assert status == 0
    assert json.loads((again / "report.json").read_text())["images"] == report["images"]


def test_weights_that_are_not_numbers_are_refused(run, tmp_path):
    state = load_file(run / "model.safetensors")
    state["layer1.0.conv1.weight"][0] = float("nan")
    copy = tmp_path / "nan"
    copy.mkdir()
    save_file(state, copy / "model.safetensors")
    (copy / "config.json").write_bytes((run / "config.json").read_bytes())
    assert "not finite" in refused(tmp_path, copy, split="test", indices="0,1")
    assert "not finite" in refused(tmp_path, copy)


@pytest.mark.slow
def test_of_all_classes_the_predicted_one_is_checked(run, tmp_path):
    flags = {"split": "test", "indices": "0,5", "check": True, "layer": "layer3"}
    _, one, _ = explain(tmp_path, run, **flags)
    _, every, _ = explain(tmp_path, run, all_classes=True, **flags)
    for a, b in zip(one["images"], every["images"], strict=True):
        assert a["checks"]["gradcam"] == pytest.approx(b["checks"]["gradcam"], abs=1e-5)
