"""A run as a folder for timm and the Hub: weights, config.json in timm's words, a model card."""

from __future__ import annotations

import json
import shutil

import torch

from harness.errors import UserError
from harness.export.graphs import how_to_prepare
from harness.files import replace_file
from harness.models.trained import where
from harness.reports.sections import class_table, interval, percent
from tricks.augment import normalize_batch


def write_timm(trained, folder, logits, pixels):
    """model.safetensors and config.json, which timm loads and answers alike; UserError if not.

    logits: of the run's network in fp32 for pixels, uint8 (n, 3, S, S).
    """
    import timm

    config = json.loads((trained.folder / "config.json").read_text())
    kept = ("architecture", "num_classes", "label_names", "pretrained_cfg", "model_args")
    config = {name: config[name] for name in kept if name in config}
    config["num_features"] = None
    config["label_descriptions"] = {name: name for name in trained.classes}
    shutil.copyfile(trained.folder / "model.safetensors", folder / "model.safetensors")
    replace_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        config["num_features"] = model.num_features
        replace_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        preprocessing = trained.preprocessing
        with torch.inference_mode():
            theirs = model(normalize_batch(pixels, preprocessing.mean, preprocessing.std))
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"timm can't load {trained.config['architecture']} from this run: {why} (networks of "
            "timm, and torchvision's ResNets with their standard stem and a linear head, it can)"
        ) from None
    off = (theirs - logits).abs().max().item()
    if not off < 1e-3:
        raise UserError(f"timm's network answers otherwise: a logit differs by {off:.2g}")
    return off


def write_card(folder, trained, fitted, kind, summary, report, licence=None):
    """README.md: the Hub's metadata, what it was trained on and how, scores, how to use it.

    fitted: of calibration.json, or None. kind: of --to. summary and report: of the run, {} where
    they are gone.
    """
    from huggingface_hub import EvalResult, ModelCardData

    scored = report.get("scored") or {}
    metrics = report.get("metrics") or {}
    dataset = trained.config.get("dataset") or "unknown"
    on_hub = "/" in dataset and not dataset.startswith((".", "/"))
    results = [
        EvalResult(
            task_type="image-classification", dataset_type="image-folder",
            dataset_name=str(dataset), dataset_split=scored.get("split"), metric_type=name,
            metric_value=round(metrics[key], 6),
        )
        for name, key in (("accuracy", "acc"), ("f1", "macro_f1"))
        if metrics.get(key) is not None
    ]  # fmt: skip
    data = ModelCardData(
        library_name="timm" if kind in ("timm", "hub") else kind,
        pipeline_tag="image-classification", tags=["image-classification", kind],
        license=licence, datasets=[dataset] if on_hub else None,
        base_model=_base_model(trained), model_name=trained.name if results else None,
        eval_results=results or None,
    )  # fmt: skip
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {trained.name}",
        f"A {trained.config['architecture']} that tells {len(trained.classes):,} classes apart, "
        f"for images of {trained.preprocessing.size} px.",
        _score_words(scored, metrics, report),
        "## Training",
        _recipe_words(trained, summary),
        "## Classes",
        class_table(report["by_class"]) if report.get("by_class") else ", ".join(trained.classes),
        "## Limits",
        *_limits(report, fitted),
        "## Use",
        USE[kind].format(
            prepare=how_to_prepare(trained.preprocessing), folder=folder.name,
            mean=list(trained.preprocessing.mean), std=list(trained.preprocessing.std),
        ),
    ]  # fmt: skip
    replace_file(folder / "README.md", ("\n\n".join(p for p in parts if p) + "\n").encode())


def _base_model(trained):
    weights = str((trained.config.get("flags") or {}).get("weights") or "none")
    return weights.removeprefix("hf-hub:") if weights.startswith("hf-hub:") else None


def _score_words(scored, metrics, report):
    if not scored:
        return ""
    return (
        f"**{percent(metrics['acc'])} %** of {scored['images']:,} {scored['role']} images are "
        f"right (95 % interval {interval(report['interval'])}); balanced accuracy "
        f"{percent(metrics['balanced_acc'])} %, macro F1 {percent(metrics['macro_f1'])} %."
    )


def _recipe_words(trained, summary):
    flags = trained.config.get("flags") or {}
    place = where(trained.recipes[0]) or trained.config.get("dataset")
    words = f"On {place}"
    if splits := (trained.config.get("data") or {}).get("splits"):
        words += f", {splits.get('train', 0):,} images"
    if summary.get("steps"):
        words += f", {summary['steps']:,} steps, {summary['seconds']:,.0f} s"
    keys = (
        "weights", "strategy", "epochs", "batch_size", "optimizer", "lr", "augment", "mixup_alpha",
        "cutmix_alpha", "label_smoothing", "imbalance", "ema_decay", "seed",
    )  # fmt: skip
    said = ", ".join(f"`{key} {flags[key]}`" for key in keys if flags.get(key) is not None)
    return f"{words}. {said}."


def _limits(report, fitted):
    pairs = report.get("most_confused") or []
    if pairs:
        named = ", ".join(" and ".join(pair["classes"]) for pair in pairs[:3])
        yield f"It confuses {named} most often."
    if fitted:
        yield (
            f"Its logits are divided by a temperature of {fitted['temperature']:.3f}, fitted on "
            f"{fitted['images']:,} held-out images: expected calibration error "
            f"{percent(fitted['ece_before'])} % before and {percent(fitted['ece_after'])} % after."
        )
    else:
        yield "Its probabilities are not calibrated: no images were held out for it."
    yield "Images unlike those it was trained on get an answer, too; it may be wrong and sure."


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
    probabilities = network((pixels / 255 - mean) / std).softmax(1)[0]
classes = network.pretrained_cfg["label_names"]
print(classes[probabilities.argmax()], float(probabilities.max()))
```""",
}
USE["hub"] = USE["timm"]
