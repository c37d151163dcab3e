"""Pictures: what stands in them, whatever the images, the names and the numbers are."""

import json
import math
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from harness import pictures
from harness.pictures import save_curves, save_train_batch

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def texts(monkeypatch):
    """What is written in the grid, in order, with the box it takes: (text, left, right, y)."""
    seen = []
    draw_text = pictures._draw_text

    def spy(draw, at, text):
        seen.append((text, at[0], at[0] + pictures._length(text), at[1]))
        draw_text(draw, at, text)

    monkeypatch.setattr(pictures, "_draw_text", spy)
    return seen


def one_hot(n, classes):
    return torch.eye(classes)[torch.arange(n) % classes]


@pytest.mark.parametrize(
    "n, shape, columns, tile",
    [
        (5, (3, 8, 8), 5, (128, 128)),
        (40, (3, 32, 32), 8, (128, 128)),
        (3, (1, 28, 20), 3, (140, 100)),
        (9, (3, 12, 48), 8, (36, 144)),
        (2, (3, 600, 300), 2, (256, 128)),
        (1, (3, 1, 300), 1, (1, 256)),
    ],
)
def test_grid_shows_every_image_enlarged(tmp_path, n, shape, columns, tile):
    # One grey level an image, all distinct: each must be there with just its own pixels.
    images = (20 + 5 * torch.arange(n)).view(n, 1, 1, 1).expand(n, *shape).to(torch.uint8)
    save_train_batch(tmp_path / "grid.png", images, one_hot(n, 10), CIFAR)
    seen = pixels(tmp_path / "grid.png")
    shown = min(n, 32)
    cell = max(tile[1], 128) + pictures.GAP
    assert seen.shape[1] == columns * cell + pictures.GAP
    for k in range(shown):
        x = pictures.GAP + (k % columns) * cell
        y = pictures.GAP + (k // columns) * (tile[0] + 2 * pictures.LINE + pictures.GAP)
        part = seen[y : y + tile[0], x : x + cell - pictures.GAP]
        assert (part == 20 + 5 * k).all(axis=2).sum() == tile[0] * tile[1]


def test_enlarged_pixels_stay_pixels(tmp_path):
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    save_train_batch(tmp_path / "a.png", image, one_hot(1, 10), CIFAR)
    part = pixels(tmp_path / "a.png")[pictures.GAP :, pictures.GAP :][:128:16, :128:16]
    assert (part == image[0].permute(1, 2, 0).numpy()).all()
    save_train_batch(tmp_path / "b.png", image.float() + 0.3, one_hot(1, 10), CIFAR)
    save_train_batch(tmp_path / "c.png", image.float() - 0.4, one_hot(1, 10).bfloat16(), CIFAR)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_soft_labels_under_the_pictures(tmp_path, texts):
    targets = torch.full((4, 10), 0.01)
    targets[0, 6] += 0.9
    targets[1, [6, 8]] += torch.tensor([0.65, 0.25])
    targets[2, [1, 0]] += torch.tensor([0.4, 0.5])
    targets[3] = 0.1  # smoothing of 1: nothing stands out
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    save_train_batch(tmp_path / "grid.png", images, targets, CIFAR)
    assert [text for text, *_ in texts] == [
        "frog",
        *("frog 66%", "ship 26%"),
        *("airplane 51%", "automobile 41%"),
        "airplane",
    ]
    texts.clear()
    save_train_batch(tmp_path / "grid.png", images[:1], torch.tensor([[0.3, 0.7]]), ["no", "yes"])
    assert [text for text, *_ in texts] == ["yes 70%", "no 30%"]


def test_text_stays_under_its_picture(tmp_path, texts):
    classes = ["x" * 200, "WWWWWWWWWWWWWWWWWWWWWW", "sternbergia of the western hills", "i" * 90]
    images = torch.zeros(32, 3, 8, 8, dtype=torch.uint8)
    save_train_batch(tmp_path / "grid.png", images, one_hot(32, 4), classes)
    assert len(texts) == 32
    for k, (text, left, right, _) in enumerate(texts):
        start = pictures.GAP + k % 8 * (128 + pictures.GAP)
        assert start <= left and right <= start + 128
        assert text.endswith("…")


def test_names_in_any_script(tmp_path, texts, monkeypatch):
    classes = ["花朵", "ромашка", "λουλούδι", "cat \U0001f431", "a\nb\tc", "", "\ud800", "é"]
    images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    save_train_batch(tmp_path / "grid.png", images, one_hot(8, 8), classes)  # this machine's fonts
    assert [text for text, *_ in texts][1:3] == ["ромашка", "λουλούδι"]
    texts.clear()
    # And on a machine that has no font but ours, so that the answer is known
    ours = pictures._fonts(False)
    monkeypatch.setattr(pictures, "_fonts", lambda with_system: ours)
    pictures._font_of.cache_clear()
    classes[3] = "cat 花"
    save_train_batch(tmp_path / "grid.png", images, one_hot(8, 8), classes)
    pictures._font_of.cache_clear()
    shown = [text for text, *_ in texts]
    assert shown == ["#0", "ромашка", "λουλούδι", "cat ?", "a b c", "#5", "#6", "é"]


def test_a_second_font_fills_in(monkeypatch):
    latin, greek = object(), object()
    fonts = {False: [(latin, {ord("a")})], True: [(latin, {ord("a")}), (greek, {ord("λ")})]}
    monkeypatch.setattr(pictures, "_fonts", fonts.get)
    pictures._font_of.cache_clear()
    assert pictures._runs("aaλλa") == [(latin, "aa"), (greek, "λλ"), (latin, "a")]
    pictures._font_of.cache_clear()


@pytest.fixture
def panels(monkeypatch):
    """The axes of the last figure drawn."""
    from matplotlib.figure import Figure

    seen = []
    savefig = Figure.savefig

    def spy(figure, *args, **kwargs):
        savefig(figure, *args, **kwargs)
        seen[:] = figure.axes

    monkeypatch.setattr(Figure, "savefig", spy)
    return seen


def lines(ax):
    """{key: its points}: a label is the key and the latest value."""
    return {
        line.get_label().split()[0]: list(zip(*line.get_data(), strict=True))
        for line in ax.lines
        if not line.get_label().startswith("_")
    }


def run_records(epochs=4, steps=5):
    records = []
    for s in range(1, epochs * steps + 1):
        record = {"step": s, "epoch": s / steps, "train/loss": 2 / s, "train/mixed_acc": 1 - 1 / s}
        records.append(record | {"train/lr": 0.1 * s, "train/grad_norm": 1.0})
        if s % steps == 0:
            scores = {f"{split}/acc{w}": s / 20 for split in ("val", "test") for w in ("", "_ema")}
            scores |= {f"{split}/loss{w}": 1 / s for split in ("val", "test") for w in ("", "_ema")}
            scores |= {"epoch/loss": 3 / s, "epoch/mixed_acc": 0.5}
            records.append({"step": s, "epoch": s // steps, **scores})
    return records


def test_curves_show_the_records(tmp_path, panels):
    records = run_records()
    save_curves(tmp_path / "curves.png", [json.loads(json.dumps(r)) for r in records])
    assert [ax.get_ylabel() for ax in panels] == ["loss", "accuracy", "learning rate"]
    drawn = lines(panels[0]) | lines(panels[1]) | lines(panels[2])
    assert drawn.keys() == {k for r in records for k in r} - {"step", "epoch", "train/grad_norm"}
    for key, points in drawn.items():
        assert points == [(r["epoch"], r[key]) for r in records if key in r]
    labels = [text.get_text() for text in panels[1].get_legend().get_texts()]
    assert "test/acc_ema  1" in labels and "train/mixed_acc  0.95" in labels


def test_curves_keep_everything_inside_and_apart(tmp_path, panels):
    records = run_records()
    records[0]["stage"], records[11]["stage"] = "head", "everything"
    save_curves(tmp_path / "curves.png", records)
    figure = panels[0].figure
    boxes = [ax.get_window_extent() for ax in panels]
    legends = [ax.get_legend().get_window_extent() for ax in panels]
    for k, legend in enumerate(legends):
        assert legend.y0 >= boxes[k].y1 - 1  # above its panel
        assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1 and legend.y1 <= figure.bbox.y1
        if k:
            assert legend.y1 <= boxes[k - 1].y0


def test_curves_of_groups_and_stages(tmp_path, panels):
    records = [
        {"step": 1, "epoch": 1.0, "stage": "head", "train/lr/head": 0.01, "train/lr/body": 0.0},
        {"step": 2, "epoch": 2.0, "train/lr/head": 0.01, "train/lr/body": 0.001},
        {"step": 3, "epoch": 3.0, "stage": "all", "train/lr/head": 0.005, "train/lr/body": 0.001},
    ]
    save_curves(tmp_path / "curves.png", records)
    assert lines(panels[2]).keys() == {"train/lr/head", "train/lr/body"}
    assert [text.get_text().strip() for text in panels[0].texts] == [
        "nothing recorded",
        "head",
        "all",
    ]
    starts = [line.get_xdata()[0] for line in panels[2].lines if line.get_linestyle() == ":"]
    assert starts == [0, 2.0]  # where the one before has ended


def test_a_group_has_no_line_in_a_stage_where_it_does_not_train(tmp_path, panels):
    """And the rates of the groups, factors of ten apart, are all to be seen."""
    place = [{"step": s, "epoch": float(s)} for s in (1, 2, 3)]
    head, body = "train/lr/fc", "train/lr/layer1"
    rates = [{head: 1e-3, body: 1e-6}, {head: 1e-3}, {body: 1e-6, head: 5e-4}]
    save_curves(tmp_path / "curves.png", [a | b for a, b in zip(place, rates, strict=True)])
    drawn = lines(panels[2])
    assert drawn.keys() == {head, body}
    assert [math.isnan(y) for _, y in drawn[body]] == [False, True, False]
    assert panels[2].get_yscale() == "log"
    low, high = panels[2].get_ylim()
    assert low < 1e-6 and high > 1e-3


@pytest.mark.parametrize("groups", [1, 2, 7, 8, 60])
def test_no_two_lines_of_a_panel_look_alike(tmp_path, panels, groups):
    keys = [f"train/lr/features.denseblock4.denselayer{n}" for n in range(groups)]
    records = run_records()
    for record in records:
        record.pop("train/lr", None)
        record |= {key: 1e-3 * 0.7**n for n, key in enumerate(keys)}
        record |= {f"{s}/top5{w}": 0.5 for s in ("val", "test") for w in ("", "_ema")}
    save_curves(tmp_path / "curves.png", records)
    for ax in panels:
        drawn = [line for line in ax.lines if len(line.get_xdata())]
        looks = {(line.get_color(), line.get_linestyle()) for line in drawn}
        assert len(looks) == len(drawn) > 0
        legend = ax.get_legend()
        assert len(legend.get_texts()) <= 9
        assert legend.get_window_extent().x1 <= ax.figure.bbox.x1
    named = [text.get_text().split()[0] for text in panels[-1].get_legend().get_texts()]
    assert {keys[0], keys[-1]} <= set(named)
    low, high = panels[-1].get_ylim()
    assert groups == 1 or low < 1e-3 * 0.7 ** (groups - 1) < high


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "epoch": 0.5, "train/loss": 1.0}],
        [{"step": 1, "epoch": 0.5, "train/loss": math.nan, "train/lr": 0.0}],
        [{"step": 1, "epoch": 0.5, "train/loss": math.inf}, {"epoch": 1, "train/loss": 1e30}],
        [{"step": 1, "epoch": 0, "val/acc": None}, {"step": 2, "epoch": 1, "val/acc": 0.0}],
    ],
)
def test_curves_of_odd_records(tmp_path, records):
    save_curves(tmp_path / "curves.png", records)
    assert pixels(tmp_path / "curves.png").shape == (990, 880, 3)


def test_nan_is_a_gap_and_the_label_the_last_number(tmp_path, panels):
    losses = [3.0, math.nan, 1.5, math.nan]
    records = [{"epoch": k, "train/loss": loss} for k, loss in enumerate(losses)]
    save_curves(tmp_path / "curves.png", records)
    (line,) = panels[0].lines
    assert line.get_label() == "train/loss  1.5"
    np.testing.assert_array_equal(line.get_ydata(), losses)


def test_a_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_curves(path, run_records())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
