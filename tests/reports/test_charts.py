"""Charts of an ensemble's report."""

import torch
from PIL import Image

from harness.reports import charts


def test_charts_take_any_names(tmp_path):
    names = ["a$\\x$b", "name_without_any_space_" * 5, "纸", ""]
    rows = [
        {"name": name, "kind": "member", "accuracy": 0.5, "interval": (0.4, 0.6)} for name in names
    ]
    charts.save_accuracies(tmp_path / "accuracy.png", rows, "$\\y$" + "long " * 40)
    matrix = torch.eye(4, dtype=torch.int64)
    charts.save_confusion(tmp_path / "confusion.png", matrix, names, "title")
    for picture in tmp_path.iterdir():
        assert Image.open(picture).width > 300
    many = [f"class {n}" for n in range(300)]
    charts.save_confusion(tmp_path / "many.png", torch.ones(300, 300).long(), many, "300 classes")
    assert Image.open(tmp_path / "many.png").width < 2000
