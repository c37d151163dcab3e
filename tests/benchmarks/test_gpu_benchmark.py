"""benchmarks/gpu.py runs on a CPU, with no other packages than a card's machine may have."""

import importlib
import io
import json
import re
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch

import smallruns
from harness.data.pixels import decode_image
from harness.data.preprocessing import Preprocessing
from harness.data.sources import load_data

FOLDER = smallruns.ROOT / "benchmarks"
sys.path.append(str(FOLDER))  # behind the scripts: there is a gradcam.py in it, too
gpu, one_file = map(importlib.import_module, ("gpu", "one_file"))
ALLOWED = ("torch", "torchvision", "accelerate", "safetensors", "numpy")


def needed(names):
    """These distributions and what they need themselves, extras left out."""
    found, todo = {}, list(names)
    while todo:
        name = todo.pop()
        try:
            there = distribution(name)
        except PackageNotFoundError:  # for another system or Python
            continue
        if there.metadata["Name"] in found:
            continue
        found[there.metadata["Name"]] = there
        for line in there.requires or ():
            requirement, _, condition = line.partition(";")
            if "extra" not in condition:
                todo.append(re.match(r"[\w.-]+", requirement)[0])
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The Python of an environment that has those packages and no others."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for there in needed(ALLOWED).values():
        for top in {Path(file).parts[0] for file in there.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(there.locate_file(top))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_it_runs_where_only_those_packages_are_and_says_what_did_not(bare_python, tmp_path):
    for name in ("datasets", "wandb", "timm", "matplotlib", "pytest"):
        there = subprocess.run([bare_python, "-c", f"import {name}"], capture_output=True)
        assert there.returncode, name
    parts = ["small bf16", "fast", "small bf16 deterministic", "small fp16", "airbench", "tests"]
    command = [bare_python, FOLDER / "gpu.py", "--quick", "--out", tmp_path, "--only", *parts]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    figures = {row["figure"]: row for row in found["rows"]}
    for words in ("train.py, images/s", "train.py / one synthetic batch", "over that without it"):
        assert any(figure.endswith(words) for figure in figures), words
    assert figures["fast recipe: accuracy, six views"]["n"] == 1
    assert all(r["min"] <= r["median"] <= r["max"] and r["n"] > 0 for r in found["rows"])
    if not torch.cuda.is_available():
        assert found["card"] == "CPU" and "needs a GPU" in found["not_run"]["small fp16"]
    assert found["not_run"]["airbench"] == "no --airbench FILE"
    assert found["not_run"]["tests"] == "not installed: pytest, datasets"
    table = (tmp_path / "gpu.md").read_text()
    assert table.startswith(f"# {found['card']}\n") and all(figure in table for figure in figures)


def test_a_packed_file_has_the_images_as_they_lie_in_the_folder(tmp_path):
    file = tmp_path / "images.npz"
    one_file.pack("digits", file)
    data, whole = one_file.load_packed(str(file), max_train_samples=20), load_data("digits")
    assert (len(data.train), len(data.test)) == (20, 360) and data.classes == whole.classes
    preprocessing = Preprocessing(16, 1.0, "bilinear", (), ())
    pixels = one_file.decode_packed(data, preprocessing, progress=False)["test"].stored
    cell = whole.test.dataset.with_format("arrow")[7:8][whole.image_column][0].as_py()
    assert np.array_equal(pixels[7], decode_image(io.BytesIO(cell["bytes"]), 16))
    assert data.test.labels.tolist() == whole.test.labels.tolist()


def test_parts_that_have_no_time_left_are_named(tmp_path, monkeypatch):
    words = ["gpu.py", "--quick", "--seconds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu.main() == 0
    not_run = json.loads((tmp_path / "gpu.json").read_text())["not_run"]
    assert set(not_run) == set(gpu.PARTS) and not_run["small bf16"] == "no time left"


def test_steps_are_timed_in_blocks_and_waits_counted_after_them(monkeypatch):
    def steps(run, batches, evaluate, spacing=0):
        yield from ((step, None) for step in range(9))

    monkeypatch.setattr(gpu.Run, "steps", steps)
    timed, found = gpu.timed_steps(warmup=2, blocks=2, block=2)
    assert [step for step, _ in timed(None, None, None)] == list(range(9))
    assert len(found["stamps"]) == 3  # before each block, and after the last
    assert len(found["waits"]) == (3 if torch.cuda.is_available() else 0)
