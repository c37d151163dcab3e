"""Networks of timm through all scripts: fine-tuned, resumed, combined, explained, read by timm."""

import json

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants

import smallruns
from harness.models.names import find_model
from harness.models.reading import load_weights
from harness.training.metrics_file import read_metrics

# Small ones of each kind, as models of the Hub whose config.json says how they were made
NETWORKS = {
    "resnet": ("resnet10t", {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 24]}),
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 3, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
    ),
    "beit": ("beit_base_patch16_224", {"embed_dim": 24, "depth": 3, "num_heads": 2}),
    "deit": ("deit_tiny_distilled_patch16_224", {"embed_dim": 24, "depth": 3, "num_heads": 2}),
    "eva": ("eva02_tiny_patch14_224", {"embed_dim": 24, "depth": 3, "num_heads": 2}),
}
EVERY_RUN = {"swin", "deit", "eva"}  # the sweep has the others
FLAGS = {
    "image_size": None, "epochs": 3, "max_train_samples": 96, "max_eval_samples": None,
    "batch_size": 24, "weights": "default", "lr": None, "gradient_accumulation_steps": 1,
    "mix_prob": 0.5, "val_fraction": 0.25, "dropout": None, "mixed_precision": "no",
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put a small network of a kind into the Hub's cache; returns what --model calls it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    find_model.cache_clear()

    def publish(kind):
        name, arguments = NETWORKS[kind]
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5, **arguments)
        folder = tmp_path / f"hub/models--small--{kind}"
        (folder / "snapshots/1").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("1")
        safetensors.torch.save_file(model.state_dict(), folder / "snapshots/1/model.safetensors")
        size = 56 if name.endswith("14_224") else 64
        cfg = {
            "input_size": [3, size, size], "interpolation": "bilinear", "crop_pct": 0.875,
            "mean": [0.4] * 3, "std": [0.3] * 3, "num_classes": 5,
        }  # fmt: skip
        config = {"architecture": name, "num_classes": 5, "pretrained_cfg": cfg}
        config |= {"label_names": list("abcde"), "model_args": arguments}
        (folder / "snapshots/1/config.json").write_text(json.dumps(config))
        return f"hf-hub:small/{kind}"

    return publish


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k in EVERY_RUN else pytest.mark.sweep) for k in NETWORKS],
)
def test_a_network_goes_through_all_scripts(hub, tmp_path, capsys, kind):
    flags = {**FLAGS, "model": hub(kind), "output_dir": tmp_path / "runs"}
    stages = (
        "[{epochs: 1, train: {head: 0.01}}, {epochs: 2, train: {all: 0.002}, layer_decay: 0.8}]"
    )
    straight, status = smallruns.finetune(**flags, stages=stages)
    assert status == 0
    out = capsys.readouterr().out
    assert f"{NETWORKS[kind][0]} (timm)" in out and "what is new: init zero" in out
    assert "64×64" in out or "56×56" in out
    losses = [
        r["train/loss"] for r in read_metrics(straight / "metrics.jsonl") if "train/loss" in r
    ]
    assert abs(losses[0] - 2.303) < 0.15

    # stopped in the second stage and resumed, bit for bit, averaged weights too
    again = {**flags, "output_dir": tmp_path / "again", "stages": stages}
    smallruns.finetune(**again, stop_after=5)
    resumed, _ = smallruns.finetune(**again, resume_from_checkpoint="auto")
    assert smallruns.digest(resumed) == smallruns.digest(straight)

    # read by timm, by its own loader
    theirs = timm.create_model(f"local-dir:{straight}", pretrained=True).eval()
    state = load_weights(straight)
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
    assert theirs.state_dict().keys() == state.keys()

    # by the other scripts: the same accuracy, and maps that are not empty
    other, _ = smallruns.finetune(
        **flags, run_name="other", strategy="full", stages=None, max_steps=2
    )
    folder = smallruns.ensemble(tmp_path, straight, other)
    report = json.loads((folder / "report.json").read_text())
    summary = json.loads((straight / "summary.json").read_text())
    (member,) = [row for row in report["results"] if row["name"] == "run"]
    assert member["accuracy"] == pytest.approx(summary["accuracy"], abs=0.01)
    maps, status = smallruns.run(
        "gradcam",
        [str(straight), *smallruns.words({"output_dir": tmp_path, "report_to": "none",
         "run_name": "maps", "indices": "0,1", "split": "test"})],
    )  # fmt: skip
    assert status == 0 and len(json.loads((maps / "report.json").read_text())["images"]) == 2
