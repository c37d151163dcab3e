"""Write tests/faults/golden/VERSION/: a checkpoint and a result of this version, to be kept.

.venv/bin/python tests/faults/make_golden.py 0.2

Once a release, and once a rule of drawing, never again for the same one: test_golden.py holds that
later versions read them. 0.2 is the first that draws by sample.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402

import smallruns  # noqa: E402
from harness.models import build  # noqa: E402
from harness.training.metrics_file import read_metrics  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "golden"
FLAGS = {
    "model": "resnet18", "image_size": 16, "epochs": 2, "threads": 1, "mixed_precision": "no",
    "checkpointing_steps": 4, "logging_steps": 1,
}  # fmt: skip


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
    with tiny():
        folder, status = smallruns.train(target, **FLAGS)
    assert status == 0
    summary = json.loads((folder / "summary.json").read_text())
    expected = {"losses": losses(folder), "scores": summary["scores"]}
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    for name in ("summary.json", "curves.png", "train_batch.png", ".lock"):
        (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    write(sys.argv[1])
