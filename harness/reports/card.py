"""The model card, README.md, of a run's folder and of its exports: facts about it, and its use.

Its metadata are the Hub's: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from harness.cli.tables import escaped
from harness.console import printable
from harness.errors import UserError
from harness.files import has_file, replace_file
from harness.reports.sections import class_table, energy, interval, percent

SPLITS = {"val": "validation", "test": "test"}  # as the Hub calls them
MIXING = ("mixup_alpha", "cutmix_alpha")
SHOWN_FLAGS = (
    "weights", "strategy", "epochs", "batch_size", "optimizer", "lr", "augment", "mixup_alpha",
    "cutmix_alpha", "label_smoothing", "imbalance", "ema_decay", "seed",
)  # fmt: skip


def read_reports(folder):
    """(summary.json, report.json) of a run's folder, {} for a missing one.

    Raises UserError for a damaged file.
    """
    reports = []
    for file in (folder / "summary.json", folder / "report.json"):
        try:
            reports.append(json.loads(file.read_bytes()) if has_file(file) else {})
        except ValueError:
            raise UserError(f"{file} is damaged: it is not JSON") from None
    return reports


def write_card(folder, run, fitted, kind, licence=None):
    """Write README.md: the Hub's metadata, how it was trained and on what, its scores, its use.

    run: harness.models.trained.Trained. fitted: of calibration.json, or None. kind: of
    export.py's --to, or "run" for the card in the run's own folder. licence: None leaves it out.
    """
    summary, report = read_reports(run.folder)
    metadata, report = _metadata(run, kind, licence, report), escaped(report)
    sections = [
        f"---\n{metadata}\n---",
        f"# {escaped(run.name)}",
        f"A {run.config['architecture']} that tells {len(run.classes):,} classes apart, "
        f"for images of {run.preprocessing.size} px.",
        _score_text(report),
        "## Training",
        _recipe_text(run, summary),
        "## Classes",
        class_table(report["by_class"])
        if report.get("by_class")
        else ", ".join(escaped(run.classes)),
        "## Limits",
        *_limits(report, fitted),
        "## Use",
        _use(folder, run, kind, fitted["temperature"] if fitted else 1.0),
    ]
    # A folder's name need not be Unicode
    text = printable("\n\n".join(section for section in sections if section) + "\n")
    replace_file(folder / "README.md", text.encode())


def _metadata(run, kind, licence, report):
    """The YAML at the top."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset, on_hub = _dataset(run)
    weights = str((run.config.get("flags") or {}).get("weights") or "none")
    results = [
        EvalResult(
            task_type="image-classification", dataset_type="image-folder", dataset_name=dataset,
            dataset_split=SPLITS.get(report["scored"]["role"], report["scored"]["split"]),
            metric_type=name,
            metric_value=round(report["metrics"][key], 6),
        )
        for name, key in (("accuracy", "acc"), ("f1", "macro_f1"))
        if (report.get("metrics") or {}).get(key) is not None
    ]  # fmt: skip
    library = {"onnx": "onnx", "torch": "pytorch"}.get(kind, "timm")
    if kind == "run" and not loads_in_timm(run.config):
        library = "pytorch"
    return ModelCardData(
        library_name=library, pipeline_tag="image-classification",
        tags=["image-classification", library], license=licence,
        datasets=[dataset] if on_hub else None,
        base_model=weights.removeprefix("hf-hub:") if weights.startswith("hf-hub:") else None,
        model_name=run.name if results else None, eval_results=results or None,
    ).to_yaml()  # fmt: skip


def _dataset(run):
    """(the data set's name, whether it is an id of the Hub); a folder is named without its path."""
    name = str(run.config.get("dataset") or "unknown")
    source = str((run.config.get("data") or {}).get("source") or "")
    if Path(source).is_absolute() or name.startswith((".", "/", "~")):
        return Path(source).name or Path(name).name, False
    return name, "/" in name


def _score_text(report):
    if not report:
        return "It was not evaluated: no images were held out."
    metrics, scored = report["metrics"], report["scored"]
    selection_note = ", by which the epoch was chosen," if scored["role"] == "val" else ""
    return (
        f"**{percent(metrics['acc'])} %** of {scored['images']:,} {scored['role']} images"
        f"{selection_note} are right (95 % interval {interval(report['interval'])}); "
        f"balanced accuracy {percent(metrics['balanced_acc'])} %, "
        f"macro F1 {percent(metrics['macro_f1'])} %."
    )


def _recipe_text(run, summary):
    flags = run.config.get("flags") or {}
    text = f"On {escaped(_dataset(run)[0])}"
    if splits := (run.config.get("data") or {}).get("splits"):
        text += f", {splits.get('train', 0):,} images"
    if summary.get("steps"):
        text += f", {summary['steps']:,} steps, {summary['seconds']:,.0f} s"
    idle = () if flags.get("mix_prob", 1) else MIXING
    values = ", ".join(
        f"`{key} {flags[key]}`"
        for key in SHOWN_FLAGS
        if flags.get(key) is not None and key not in idle
    )
    return f"{text}. {values}.{_energy_text(summary.get('energy'))}"


def _energy_text(joules_by_device):
    """joules_by_device: {"cpu": joules, "gpu": joules}, or None where no counter could be read."""
    if not joules_by_device:
        return ""
    names = {"cpu": "its CPU packages", "gpu": "the GPUs of this run"}
    texts = [f"{energy(joules)} by {names[key]}" for key, joules in joules_by_device.items()]
    return f" Energy of training, including other programs on these devices: {' and '.join(texts)}."


def _limits(report, fitted):
    pairs = report.get("most_confused") or []
    if pairs:
        pairs_text = ", ".join(" and ".join(pair["classes"]) for pair in pairs[:3])
        yield f"It confuses {pairs_text} most often."
    if fitted:
        yield (
            f"Its logits are divided by a temperature of {fitted['temperature']:.3f}, fitted on "
            f"{fitted['images']:,} held-out images: expected calibration error "
            f"{percent(fitted['ece_before'])} % before and {percent(fitted['ece_after'])} % after."
        )
    else:
        yield "Its probabilities are not calibrated: no images were held out for that."
    if abstain := report.get("abstain"):
        yield (
            f"Abstain under a probability of {abstain['probability']:.2f}: then "
            f"{percent(abstain['accuracy'], 0)} % of the answers are right, and "
            f"{percent(abstain['answered'], 0)} % of these images get one."
        )
    yield "Images unlike those it was trained on get an answer, too; it may be wrong and confident."


def loads_in_timm(config) -> bool:
    """Whether timm can load the folder of a run with this config.json without an export."""
    if config.get("head") != "linear":
        return False
    resnet = config["architecture"].startswith(("resnet", "resnext", "wide_resnet"))
    return config.get("library") == "timm" or (resnet and config.get("stem") == "standard")


def _use(folder, run, kind, temperature):
    preprocessing = run.preprocessing
    if kind == "run" and loads_in_timm(run.config):
        kind = "run, timm"
    return USE[kind].format(
        prepare=how_to_prepare(preprocessing), folder=folder.name, path=_quoted(folder),
        mean=list(preprocessing.mean), std=list(preprocessing.std), temperature=temperature,
    )  # fmt: skip


def _quoted(path):
    """A path as a word of bash; one that is not printable by its bytes, $'…'."""
    if printable(path) == str(path):
        return shlex.quote(str(path))
    plain = set(range(32, 127)) - set(b"\\'")
    return "$'" + "".join(chr(b) if b in plain else f"\\x{b:02x}" for b in os.fsencode(path)) + "'"


HOW_TO_PREPARE = """\
import numpy as np
from PIL import Image, ImageOps

def pixels_of(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    side = min(image.size)  # the largest square in the middle
    left, top = (image.width - side) / 2, (image.height - side) / 2
    image = image.resize(({stored}, {stored}), Image.Resampling.{filter},
                         box=(left, top, left + side, top + side))
    edge = round(({stored} - {size}) / 2)
    image = image.crop((edge, edge, edge + {size}, edge + {size}))
    return np.asarray(image).transpose(2, 0, 1)[None]  # uint8 (1, 3, {size}, {size})
"""


def how_to_prepare(preprocessing) -> str:
    """Python that makes the graph's input of an image file, with Pillow and numpy alone."""
    return HOW_TO_PREPARE.format(
        stored=preprocessing.stored_size, size=preprocessing.size,
        filter=preprocessing.interpolation.upper(),
    )  # fmt: skip


USE = {
    "onnx": """```python
{prepare}
import json, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
probabilities = session.run(None, {{"pixels": pixels_of("photo.jpg")}})[0][0]
print(classes[probabilities.argmax()], probabilities.max())
```""",
    "torch": """```python
{prepare}
import json, torch
extra = {{"metadata.json": ""}}
network = torch.export.load("model.pt2", extra_files=extra).module()
classes = json.loads(json.loads(extra["metadata.json"])["classes"])
with torch.inference_mode():
    probabilities = network(torch.from_numpy(pixels_of("photo.jpg")))[0]
print(classes[probabilities.argmax()], float(probabilities.max()))
```""",
    "timm": """```python
{prepare}
import timm, torch
network = timm.create_model("local-dir:{folder}", pretrained=True).eval()
mean, std = (torch.tensor(v).view(3, 1, 1) for v in ({mean}, {std}))
pixels = torch.from_numpy(pixels_of("photo.jpg"))
with torch.inference_mode():
    logits = network((pixels / 255 - mean) / std)
probabilities = (logits / {temperature}).softmax(1)[0]
classes = network.pretrained_cfg["label_names"]
print(classes[probabilities.argmax()], float(probabilities.max()))
```""",
}
USE["hub"] = USE["timm"]
USE["run"] = """```bash
accelerate launch predict.py {path} photo.jpg a/folder    # predictions.csv: classes, probabilities
accelerate launch export.py {path} --to onnx             # one file for onnxruntime, as below
accelerate launch export.py {path} --to timm             # a folder for timm.create_model
```

With ONNX, in the folder that export.py names:

""" + USE["onnx"]
# For a run's folder that timm can load without an export
USE["run, timm"] = USE["run"] + "\n\nWith timm, in the folder above this one:\n\n" + USE["timm"]
