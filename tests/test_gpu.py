"""What only a GPU can show. One command checks all of it: python -m pytest tests/test_gpu.py"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import smallruns
from harness.data import jpegs
from harness.training import scoring
from harness.training.metrics_file import read_metrics
from harness.training.run import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture
def photo_jpegs():
    """(JPEGs of 500×375 px, boxes)."""
    files, boxes = [], [(0, 0, 375, 500), (10, 20, 224, 224), (100, 200, 90, 300)]
    for k in range(3):
        small = np.random.default_rng(k).integers(0, 256, (24, 32, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG")
        files.append(file.getvalue())
    return files, boxes


CONFIGS = smallruns.ROOT / "accelerate_configs"


@pytest.mark.parametrize("name", ["single_gpu", "single_gpu_fp16", "single_gpu_compile"])
def test_trains_and_resumes_under_the_config(tmp_path, name):
    launcher = ("--config_file", str(CONFIGS / f"{name}.yaml"))
    flags = {"model": "resnet18", "epochs": 10, "mixed_precision": "auto"}
    stopped = smallruns.launch(tmp_path, launcher=launcher, **flags, stop_after=21)
    assert stopped.returncode == 0, stopped.stdout
    done = smallruns.launch(tmp_path, launcher=launcher, **flags, resume_from_checkpoint="auto")
    assert done.returncode == 0, done.stdout
    assert "(the launcher)" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["device"].startswith("cuda") and summary["steps"] == 40
    losses = [r["epoch/loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")
              if "epoch/loss" in r]  # fmt: skip
    assert len(losses) == 10 and losses[-1] < losses[0]
    from safetensors.torch import load_file

    names = load_file(tmp_path / "run" / "model.safetensors").keys()
    assert not any("_orig_mod" in n or n.startswith("module.") for n in names)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_fast_recipe_resumes_bit_for_bit_with_deterministic_algorithms(tmp_path, precision):
    recipe = smallruns.ROOT / "recipes" / "cifar10_fast.yaml"
    words = {"config": recipe, "model": "fastnet", "start_size": 12, "deterministic": True}
    done = smallruns.verify_resume(tmp_path, 8, mixed_precision=precision, dropout=None, **words)
    assert done.returncode == 0 and "PASS: 8 steps" in done.stdout, done.stdout


@pytest.mark.parametrize("name", ["single_gpu", "single_gpu_fp16", "single_gpu_compile"])
def test_fine_tunes_in_stages_and_resumes_under_the_config(tmp_path, name):
    """Stopped in the second of three stages; the first trains on kept features."""
    launcher = ("--config_file", str(CONFIGS / f"{name}.yaml"))
    flags = {"script": "finetune.py", "model": "resnet18", "mixed_precision": "auto"}
    stopped = smallruns.launch(tmp_path, launcher=launcher, **flags, stop_after=6)
    assert stopped.returncode == 0, stopped.stdout
    done = smallruns.launch(tmp_path, launcher=launcher, **flags, resume_from_checkpoint="auto")
    assert done.returncode == 0, done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["device"].startswith("cuda") and summary["steps"] == 12
    losses = [r["train/loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")
              if "train/loss" in r]  # fmt: skip
    assert len(losses) == 4 and all(loss < 20 for loss in losses)


def test_kept_features_on_the_gpu_train_as_recomputed_ones(tmp_path):
    flags = {
        "stages": None, "strategy": "feature_extraction", "epochs": 3, "lr": 0.01,
        "augment": "none", "random_erasing": 0, "mix_prob": 0, "mixed_precision": "no",
    }  # fmt: skip
    final = []
    for views in (0, 1):
        folder, status = smallruns.finetune(tmp_path / str(views), views=views, **flags)
        assert status == 0
        final.append(json.loads((folder / "summary.json").read_text())["loss"])
    assert final[0] == pytest.approx(final[1], rel=1e-2)  # TF32


def test_augmentation_on_the_gpu_equals_the_cpus():
    from harness.cli.flags import AUGMENTS
    from harness.counters import generator
    from harness.data.batches import Views

    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    for word in AUGMENTS:
        views = Views(32, (0.5,) * 3, (0.25,) * 3, augment=word, padding=4, flip_prob=0.5,
                      erasing=0.25, ops=2, magnitude=9)  # fmt: skip
        draw = views.draw(64, generator(0, "views", 0))
        ours = views.train(images.cuda(), draw).cpu()
        differ = (ours - views.train(images, draw)).abs() > 1e-5
        assert differ.float().mean() < 0.02, word  # ties of rotated pixels, see autoaugment.py


def test_nvjpeg_decodes_what_the_cpu_decodes(photo_jpegs):
    files, boxes = photo_jpegs
    ours = torch.stack([
        jpegs.decode_crop(file, 500, 375, box, 224) for file, box in zip(files, boxes, strict=True)
    ])  # fmt: skip
    theirs = jpegs.decode_crops_on(torch.device("cuda"), files, boxes, 224).cpu()
    error = (ours.double() - theirs.double()).square().mean().sqrt()
    assert 20 * torch.log10(255 / error) > 35  # dB


def test_a_fused_update_is_withheld_on_the_device():
    weight = torch.nn.Parameter(torch.ones(4, device="cuda"))
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, fused=True)
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.found_inf = torch.ones((), device="cuda")
    optimizer.step()
    assert torch.equal(weight.detach().cpu(), torch.ones(4))


def refusing_waits(steps):
    """Run.steps, in whose steps a wait for the device is an error, from the second on.

    Not between them, where Run reads what it logs. The first may allocate.
    """

    def refusing(run, *args, **options):
        first = run.step
        for step, batch in steps(run, *args, **options):
            try:
                torch.cuda.set_sync_debug_mode("error" if step > first else "default")
                yield step, batch
            finally:
                torch.cuda.set_sync_debug_mode("default")

    return refusing


def refusing_until_read(evaluate):
    """scoring.evaluate, in whose batches a wait is an error: its sums are read once, at the end."""

    def refusing(*args, **options):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return evaluate(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return refusing


@pytest.mark.parametrize("precision", ["no", "bf16"])  # fp16's scaler reads a number in every step
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train", {"model": "resnet18", "tta": "random:2"}),
        ("train", {"model": "fastnet", "optimizer": "muon", "start_size": 12, "tta": "shift"}),
        ("train", {"model": "resnet18", "optimizer": "adamw", "nonfinite": "skip"}),
        ("finetune", {**smallruns.FINETUNE, "model": "resnet18"}),
    ],
    ids=["sgd", "muon", "adamw, skips", "finetune"],
)
def test_neither_a_step_nor_an_evaluation_waits(tmp_path, monkeypatch, script, flags, precision):
    def may_wait(function):
        def called(*args):
            torch.cuda.set_sync_debug_mode("default")
            return function(*args)

        return called

    monkeypatch.setattr(scoring, "_read_sums", may_wait(scoring._read_sums))
    monkeypatch.setattr("finetune.check_frozen", may_wait(finetune.check_frozen))
    monkeypatch.setattr(f"{script}.evaluate", refusing_until_read(scoring.evaluate))
    monkeypatch.setattr(Run, "steps", refusing_waits(Run.steps))
    flags = flags | {"mixed_precision": precision, "dropout": None, "logging_steps": 100}
    _, status = smallruns.train(tmp_path, script=script, **flags)
    assert status == 0


def test_a_wait_in_a_step_is_an_error_there(tmp_path, monkeypatch):
    """The test above can fail: `new_tensor`, which the step's guard had."""
    monkeypatch.setattr(torch.Tensor, "new_full", lambda x, _, value: x.new_tensor([value]))
    monkeypatch.setattr(Run, "steps", refusing_waits(Run.steps))
    with pytest.raises(RuntimeError, match="synchronizing"):
        smallruns.train(tmp_path, model="resnet18", mixed_precision="no", epochs=1)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_reports_are_made_on_the_gpu(tmp_path, precision):
    """Members in each precision; maps in fp32, equal to the CPU's."""
    flags = {"model": "resnet18", "epochs": 2, "dropout": None, "val_fraction": 0.2}
    for seed in (1, 2):
        smallruns.train(tmp_path, seed=seed, run_name=f"r{seed}", **flags)
    runs = [tmp_path / "r1", tmp_path / "r2"]
    folder = smallruns.ensemble(tmp_path, *runs, tta="flip", mixed_precision=precision)
    found = json.loads((folder / "report.json").read_text())
    names = {row["name"] for row in found["results"]}
    assert {"r1", "r2", "average", "vote", "weighted", "greedy"} < names
    assert not found["cost"]["device"].startswith("CPU")

    from harness.models.trained import load_model, read_trained
    from tricks.cam import GradCam

    words = [str(runs[0]), "--report_to=none", f"--output_dir={tmp_path}", "--run_name=cams"]
    _, status = smallruns.run("gradcam", [*words, "--layer=layer3", "--check"])
    assert status == 0
    images = torch.randn(4, 3, 16, 16)
    maps = []
    for device in ("cpu", "cuda"):
        with GradCam(load_model(read_trained(runs[0])).to(device), "layer3") as cam:
            maps.append(cam(images.to(device), torch.arange(4, device=device)).maps["gradcam"])
    torch.testing.assert_close(maps[1].cpu(), maps[0], rtol=0, atol=1e-2 * maps[0].max().item())
