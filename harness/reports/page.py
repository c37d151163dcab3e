"""report.html of a run's folder: one file that contains its pictures and needs no network.

It is made from the folder's report.json, summary.json, config.json and pictures.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

from harness.console import printable
from harness.errors import shortened
from harness.files import replace_file
from harness.metrics import METRICS
from harness.reports.card import read_reports
from harness.reports.sections import energy, interval, percent
from harness.reports.training import headline

FILE = "report.html"
MOST_ROWS = 500  # classes in the table, the lowest accuracies first
MOST_BYTES = 320_000  # of a picture: six of them in base64 stay under the 3 MB of a report
WIDEST = 1600  # pixels of a picture
TEMPLATE = Path(__file__).with_name("page.html.jinja")
CHARTS = (
    ("curves", "Training"),
    ("train_batch", "Images as the network saw them in its first batch"),
    ("confusion", "Confusion matrix"),
    ("reliability", "Reliability"),
    ("mistakes", "The mistakes it is surest of"),
)


def write_page(folder, run, maps=None):
    """Write report.html. run: harness.models.trained.Trained, of the same folder.

    maps: the path of a picture of class activation maps, or None.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        finalize=_shown,
    )  # fmt: skip
    summary, report = read_reports(run.folder)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    pictures = {name: _embedded(folder / f"{name}.png") for name, _ in CHARTS}
    if maps:
        pictures["maps"] = _embedded(maps)
    values = report.get("metrics") or {}
    rows = sorted(
        report.get("by_class") or [],
        key=lambda row: 2.0 if row["accuracy"] is None else row["accuracy"],
    )
    text = template.render(
        name=run.name, config=run.config, flags=run.config.get("flags") or {},
        size=run.preprocessing.size, classes=run.classes, summary=summary, report=report,
        headline=headline(report) if report else "It was not evaluated: no images were held out.",
        metrics=[
            (metric.title, metric.text.format(values[key]))
            for key, metric in sorted(METRICS.items(), key=lambda item: item[0] != "acc")
            if values.get(key) is not None and not (key == "top5" and len(run.classes) <= 5)
        ],
        rows=rows[:MOST_ROWS], titles=dict(CHARTS), pictures=pictures, percent=percent,
        interval=interval, shortened=shortened, energy=energy,
    )  # fmt: skip
    replace_file(folder / FILE, text.encode())


def _shown(value):
    """A value of the template; of text what would steer the browser, as U+202E, is written out."""
    is_markup = hasattr(value, "__html__")
    return printable(value) if isinstance(value, str) and not is_markup else value


def _embedded(path):
    """A picture as a data: address, shrunk where it is large; None where there is none."""
    if not path.exists():
        return None
    data, kind, side = path.read_bytes(), "png", WIDEST
    if len(data) > MOST_BYTES:
        from PIL import Image

        with Image.open(io.BytesIO(data)) as picture:
            picture = picture.convert("RGB")
    while len(data) > MOST_BYTES:
        picture.thumbnail((side, 4 * side))
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=80)
        data, kind, side = buffer.getvalue(), "webp", side * 3 // 4
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
