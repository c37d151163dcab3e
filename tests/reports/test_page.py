"""report.html and README.md of a run's folder: whole, small, of one file, safe with any name."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import smallruns
from harness.models.trained import read_trained
from harness.reports.card import write_card
from harness.reports.classes import abstain_under
from harness.reports.page import FILE, write_page

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Every tag closed, every address a data: one, no script; the text of the page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tags, self.text = [], [], set(), ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(folder):
    file = folder / FILE
    assert file.stat().st_size < 3_000_000
    page = Page(file.read_text(encoding="utf-8"))
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object"}
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    flags = {"run_name": "squares", "slice_by": "brightness", "max_eval_samples": None}
    return smallruns.train(root, **smallruns.MEMBER | flags)[0]


def test_a_run_has_one_page_with_all_it_knows(run):
    page, report = page_of(run), json.loads((run / "report.json").read_text())
    for heading in ("Classes", "Slices", "Calibration", "Mistakes", "Training", "All flags"):
        assert heading in page.text
    assert len(page.addresses) == 4 + bool(report["wrong"])
    for row in report["by_class"]:
        assert f"{100 * row['accuracy']:.1f}" in page.text
    assert f"{100 * report['metrics']['acc']:.2f} % of 360 test images" in page.text
    assert "--seed" not in page.text and "batch_size" in page.text


def test_a_run_has_a_card_with_the_hubs_metadata(run):
    text = (run / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    report = json.loads((run / "report.json").read_text())
    (result,) = metadata["model-index"][0]["results"]
    scores = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert scores["accuracy"] == pytest.approx(report["metrics"]["acc"], abs=1e-6)
    assert str(smallruns.ROOT) not in text  # where the images lay is nobody's business
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == "digits"
    assert "license" not in metadata and metadata["pipeline_tag"] == "image-classification"
    assert f"predict.py {run}" in text and "--to onnx" in text and "## Limits" in text


def test_without_images_to_score_both_say_so(tmp_path):
    flags = smallruns.MEMBER | {"test_split": "none", "val_fraction": 0}
    folder, _ = smallruns.train(tmp_path, run_name="unscored", **flags)
    assert "It was not evaluated" in page_of(folder).text
    text = (folder / "README.md").read_text()
    assert "It was not evaluated" in text and "model-index" not in text


def test_gradcam_adds_its_maps_and_a_folder_of_an_older_version_is_left_alone(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / run.name))
    before = len(page_of(copy).addresses)
    words = [str(copy), "--max_images=2", f"--output_dir={tmp_path}", "--run_name=maps"]
    smallruns.run("gradcam", words)
    page = page_of(copy)
    assert len(page.addresses) == before + 1 and "Class activation maps" in page.text
    photo = tmp_path / "mine.png"  # somebody's photograph is no part of the run's report
    Image.new("RGB", (20, 20)).save(photo)
    page_before = (copy / FILE).read_bytes()
    smallruns.run("gradcam", [*words[:1], *words[2:], f"--images={photo}"])
    assert (copy / FILE).read_bytes() == page_before
    (copy / FILE).unlink()
    smallruns.run("gradcam", words)
    assert not (copy / FILE).exists()


def test_names_are_shown_letter_by_letter_and_large_pictures_stay_small(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / run.name))
    evil = "<script>alert(1)</script>" + "x" * 300
    report = json.loads((copy / "report.json").read_text())
    rows = [dict(report["by_class"][0], **{"class": f"{evil}{k}"}) for k in range(21_000)]
    report["by_class"] = rows
    (copy / "report.json").write_text(json.dumps(report))
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    for name in ("curves", "train_batch", "confusion", "reliability", "mistakes", "maps"):
        Image.fromarray(noise).save(copy / f"{name}.png")
    write_page(copy, read_trained(copy), copy / "maps.png")
    page = page_of(copy)
    assert "<script>alert(1)" in page.text and "The lowest 500 of" in page.text
    assert len(page.addresses) == 6


def test_a_row_of_a_table_stays_a_row_whatever_a_class_is_called(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / run.name))
    names = [
        "a|b",
        "R&lt;D",
        "~~x~~",
        "<b>",
        "$x$",
        "c\\",
        "\u202egpj.exe",
        "two\nlines",
        "\udcff",
        "|",
    ]
    report = json.loads((copy / "report.json").read_text())
    for row, name in zip(report["by_class"], names, strict=True):
        row["class"] = name
    report["most_confused"] = [{"classes": names[6:8], "errors": 2, "first_taken_for_second": 1,
                                "second_taken_for_first": 1}]  # fmt: skip
    (copy / "report.json").write_text(json.dumps(report))
    write_card(copy, read_trained(copy), None, "run")
    text = (copy / "README.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 12 and {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {8}
    shown = [r"a\|b", r"R\&lt;D", r"\~\~x\~\~", r"\<b\>", r"\$x\$", "c\\\\", r"\\u202egpj.exe",
             r"two\\nlines", r"\\udcff", r"\|"]  # fmt: skip
    assert {re.split(r"(?<!\\)\|", line)[1].strip() for line in table[2:]} == set(shown)
    write_page(copy, read_trained(copy))
    page = page_of(copy)
    assert "\u202e" not in text + page.text and r"\u202egpj.exe and two" in page.text
    assert "R&lt;D" in page.text  # as it is written, not as an entity


def test_a_folder_whose_name_is_no_unicode_gets_its_result(tmp_path):
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/it's \xff"))
    try:
        place.mkdir()
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    folder, status = smallruns.train(place, **smallruns.MEMBER | {"max_steps": 1, "run_name": "x"})
    assert status == 0 and page_of(folder).text and (folder / "summary.json").exists()
    command = (folder / "README.md").read_text().split("predict.py ")[1].split(" photo")[0]
    assert command == rf"$'{tmp_path}/it\x27s \xff/x'"
    shown = subprocess.run(
        ["bash", "-c", f"printf %s {command}"], stdout=subprocess.PIPE, check=True
    )
    assert shown.stdout == os.fsencode(folder)


def test_under_which_probability_to_abstain():
    rng = torch.Generator().manual_seed(0)
    probabilities = torch.rand(5000, generator=rng, dtype=torch.float64)
    right = torch.rand(5000, generator=rng) < probabilities**0.1
    found = abstain_under(probabilities, right, 0.95)
    answered = probabilities >= found["probability"]
    assert right[answered].double().mean() >= 0.95
    assert answered.double().mean() == pytest.approx(found["answered"])
    for lower in probabilities[~answered].sort().values[-200:].tolist():  # none would do as well
        assert right[probabilities >= lower].double().mean() < 0.95
    assert abstain_under(probabilities, torch.ones(5000, dtype=torch.bool)) is None
    assert abstain_under(probabilities, torch.zeros(5000, dtype=torch.bool)) is None
    equal = torch.full((100,), 0.7, dtype=torch.float64)  # can't be told apart: all or none
    assert abstain_under(equal, torch.arange(100) < 60) is None
