"""Write tests/faults/golden/VERSION/: a checkpoint and a result of this version, to be kept.

.venv/bin/python tests/faults/make_golden.py 0.2
.venv/bin/python tests/faults/make_golden.py 0.3-packed     with photographs of its own, packed

Once a release, and once a rule of drawing, never again for the same one: test_golden.py holds that
later versions read them. 0.2 is the first that draws by sample.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import smallruns  # noqa: E402
from harness.models import build  # noqa: E402
from harness.training.metrics_file import read_metrics  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "golden"
FLAGS = {
    "model": "resnet18", "image_size": 16, "epochs": 2, "threads": 1, "mixed_precision": "no",
    "checkpointing_steps": 4, "logging_steps": 1,
}  # fmt: skip
PACKED = {"image_size": 32, "crop_scale": 0.3, "batch_size": 8, "max_train_samples": None,
          "max_eval_samples": None, "pixels": "packed"}  # fmt: skip


def flags_of(version):
    """The flags of a version's run: on the digits, or on the photographs beside it."""
    photos = version / "photos"
    return FLAGS | ({"dataset": photos, **PACKED} if photos.is_dir() else {})


def make_photos(folder):
    """Two classes, 32 train and 8 test JPEGs of two sizes; kept, as encoders differ."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for name, size in (("wide", (96, 56)), ("tall", (48, 100))):
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                small = rng.integers(0, 256, (5, 7, 3), np.uint8)
                image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
                image.save(folder / split / name / f"{k}.jpg", quality=70)


class Tiny(torch.nn.Module):
    """2,000 parameters of every kind: a real network's files would be a hundred times as large."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(8)
        self.layer1 = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc = torch.nn.Linear(16, num_classes)

    def forward(self, images):
        images = torch.relu(self.bn1(self.conv1(images)))
        return self.fc(torch.relu(self.layer1(images)).mean((2, 3)))


@contextlib.contextmanager
def tiny():
    """Every model that is built is a Tiny."""
    real, build.build_model = build.build_model, lambda name, num_classes, **_: Tiny(num_classes)
    try:
        yield
    finally:
        build.build_model = real


def losses(folder):
    records = read_metrics(folder / "metrics.jsonl")
    return {str(r["step"]): r["train/loss"] for r in records if "train/loss" in r}


def write(version):
    target = GOLDEN / version
    shutil.rmtree(target, ignore_errors=True)
    if version.endswith("packed"):
        make_photos(target / "photos")
    with tiny():
        folder, status = smallruns.train(target, **flags_of(target))
    assert status == 0
    summary = json.loads((folder / "summary.json").read_text())
    expected = {"losses": losses(folder), "scores": summary["scores"]}
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    kept = {"checkpoints", "config.json", "config.yaml", "metrics.jsonl", "model.safetensors"}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


if __name__ == "__main__":
    write(sys.argv[1])
