"""finetune.py as its user runs it: stages, resume in each, one and two processes, frozen bytes."""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

import faulty
import smallruns
from harness.models import build
from harness.models.reading import load_weights
from harness.models.weights import load_state
from harness.training.metrics_file import read_metrics
from harness.training.record import Record

TWO = ("--config_file", str(smallruns.ROOT / "accelerate_configs/cpu_2proc.yaml"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of three stages of four steps each, never stopped."""
    folder, status = smallruns.finetune(tmp_path_factory.mktemp("straight"))
    assert status == 0
    return folder


def losses(folder):
    return [r["train/loss"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r]


def raw_weights(folder, step):
    """All that a checkpoint has of the model, as one vector."""
    file = folder / f"checkpoints/step-{step:08d}/model.safetensors"
    return torch.cat([v.double().flatten() for v in safetensors.torch.load_file(file).values()])


# --- what a run is ---


def test_the_records_name_the_stages_and_the_rate_of_every_group(straight):
    records = [r for r in read_metrics(straight / "metrics.jsonl") if "train/loss" in r]
    stages = {r["step"]: r["stage"] for r in records}
    assert stages == {3: "1 head", 6: "2 late", 9: "3 everything", 12: "3 everything"}
    rates = {r["step"]: {k[9:] for k in r if k.startswith("train/lr")} for r in records}
    assert rates[3] == {"fc"} and rates[6] == {"layer4", "fc"}
    assert rates[9] == rates[12] == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"}
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["strategy"] == "staged"
    assert summary["trained_parameters"] == summary["parameters"]
    config = json.loads((straight / "config.json").read_text())
    assert config["job_type"] == "finetune" and config["head"] == "linear"
    assert {"curves.png", "train_batch.png"} <= {p.name for p in straight.iterdir()}


def test_the_result_is_rebuilt_from_its_config(straight):
    config = json.loads((straight / "config.json").read_text())
    model = build.rebuild_model(config)
    state = safetensors.torch.load_file(straight / "model.safetensors")
    assert model.load_state_dict(state, strict=True)


# --- frozen is frozen ---


@pytest.mark.parametrize("views", [0, 2])
def test_feature_extraction_changes_the_head_alone(tmp_path, views):
    """Bytes of weights and BatchNorm statistics, in the averaged weights too."""
    start, _ = smallruns.train(tmp_path / "start", max_steps=4, dropout=None)
    folder, status = smallruns.finetune(
        tmp_path, stages=None, strategy="feature_extraction", weights=start, epochs=2, views=views,
        lr=0.01, gradient_accumulation_steps=1,
    )  # fmt: skip
    assert status == 0
    before = safetensors.torch.load_file(start / "model.safetensors")
    after = safetensors.torch.load_file(folder / "model.safetensors")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"fc.weight", "fc.bias"}


def test_bn_mode_all_moves_the_statistics_of_frozen_parts(tmp_path):
    start, _ = smallruns.train(tmp_path / "start", max_steps=4, dropout=None)
    folder, _ = smallruns.finetune(
        tmp_path, stages=None, strategy="feature_extraction", weights=start, epochs=1, lr=0.01,
        bn_mode="all",
    )  # fmt: skip
    before = safetensors.torch.load_file(start / "model.safetensors")
    after = safetensors.torch.load_file(folder / "model.safetensors")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert "conv1.1.running_mean" in changed and "conv1.0.weight" not in changed


def test_kept_features_train_the_head_as_recomputed_ones_do(tmp_path):
    """Without augmentation both ways see the same, but for the last digits of other batch sizes."""
    flags = {
        "stages": None, "strategy": "feature_extraction", "epochs": 3, "lr": 0.01,
        "augment": "none", "random_erasing": 0, "mix_prob": 0, "mixed_precision": "no",
    }  # fmt: skip
    kept, _ = smallruns.finetune(tmp_path / "kept", views=1, **flags)
    plain, _ = smallruns.finetune(tmp_path / "plain", views=0, **flags)
    one, other = (
        [{k: v for k, v in r.items() if k != "stage"} for r in read_metrics(f / "metrics.jsonl")]
        for f in (kept, plain)
    )
    assert len(one) == len(other) > 6
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    weights = [safetensors.torch.load_file(f / "model.safetensors") for f in (kept, plain)]
    torch.testing.assert_close(weights[0]["fc.weight"], weights[1]["fc.weight"])


def test_an_mlp_head_trains_and_is_rebuilt(tmp_path):
    folder, status = smallruns.finetune(
        tmp_path, stages=None, strategy="feature_extraction", head="mlp", epochs=2, lr=0.01
    )
    assert status == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["head"] == "mlp"
    load_state(build.rebuild_model(config), load_weights(folder))


def test_published_weights_come_from_torchvisions_cache_with_their_preprocessing(
    tmp_path, monkeypatch, capsys
):
    """As a newcomer runs it offline: the file lies where torchvision would have put it."""
    from torchvision.models import ShuffleNet_V2_X0_5_Weights as Weights
    from torchvision.models import shufflenet_v2_x0_5

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = shufflenet_v2_x0_5()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    name = Path(Weights.DEFAULT.url).name
    torch.save(published.state_dict(), tmp_path / "hub/checkpoints" / name)
    folder, status = smallruns.finetune(
        tmp_path, stages=None, strategy="feature_extraction", weights="default", image_size=None,
        model="shufflenet_v2_x0_5",
        max_train_samples=60, max_eval_samples=20, epochs=1, lr=0.01,
    )  # fmt: skip
    assert status == 0
    out = capsys.readouterr().out
    assert "224×224 from 256×256 bilinear, 0.485±0.229" in out
    assert "head fc is new: 1000 classes there, 10 here" in out
    config = json.loads((folder / "config.json").read_text())
    assert config["stem"] == "standard"
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"] == [3, 224, 224] and cfg["crop_pct"] == 0.875
    after = safetensors.torch.load_file(folder / "model.safetensors")
    for key, value in published.state_dict().items():
        assert key.startswith("fc.") or torch.equal(after[key], value), key


# --- where a head starts ---

HEAD_ALONE = {
    "stages": None, "strategy": "feature_extraction", "gradient_accumulation_steps": 1,
    "mixed_precision": "no", "max_train_samples": 300,
}  # fmt: skip


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A network that was trained a little, on classes of other names: its head is no use."""
    folder, _ = smallruns.train(
        tmp_path_factory.mktemp("others"), epochs=4, dropout=None, max_train_samples=400
    )
    letters = list("abcdefghij")
    smallruns.edit_json(folder / "config.json", lambda config: config.update(label_names=letters))
    return folder


@pytest.mark.parametrize("views", [0, 2])
def test_feature_extraction_starts_from_the_probe(others, tmp_path, capsys, views):
    """A rate of nothing leaves it there."""
    folder, _ = smallruns.finetune(
        tmp_path, **HEAD_ALONE, max_steps=1, lr=1e-12, weights=others, views=views, ema_decay=0
    )
    out = capsys.readouterr().out
    (words,) = re.findall(r"probe +(.*) of 60 held-out train images: the head starts from it", out)
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{summary['probe']['accuracy']:.1%}" == words
    assert "what is new: a linear probe of the features" in out
    assert summary["accuracy"] > 0.5  # of another head's, drawn at random, a tenth


def test_an_mlp_head_can_t_start_from_the_probe(others, tmp_path, capsys):
    smallruns.finetune(tmp_path, **HEAD_ALONE, max_steps=1, weights=others, head="mlp")
    out = capsys.readouterr().out
    assert "what is new: init zero" in out and "probe  " not in out


@pytest.mark.parametrize("script", ["train", "finetune"])
def test_a_new_head_under_weights_starts_at_the_loss_of_a_guess(others, tmp_path, script):
    strategy = {"strategy": "full", "lr": 0.001} if script == "finetune" else {}
    folder, _ = smallruns.train(
        tmp_path, script=script, weights=others, max_steps=1, logging_steps=1, mix_prob=0,
        label_smoothing=0, mixed_precision="no", dropout=None, **strategy,
    )  # fmt: skip
    (loss,) = losses(folder)
    assert abs(loss - math.log(10)) < 0.15


def test_what_was_kept_is_freed_after_its_stage(tmp_path, monkeypatch):
    import finetune

    kept, train_stage = [], finetune.train_stage

    def train(args, run, stage, optimizer, splits, preprocessing, classes, known):
        kept.append(known)
        if known is None:
            assert kept[0] == {}
        train_stage(args, run, stage, optimizer, splits, preprocessing, classes, known)
        assert known is None or known

    monkeypatch.setattr(finetune, "train_stage", train)
    smallruns.finetune(tmp_path)
    assert [known is None for known in kept] == [False, True, True]


@pytest.mark.slow
def test_wandb_has_the_numbers_of_metrics_jsonl_and_the_job_type(tmp_path):
    from test_tracking import history, read_wandb

    folder, _ = smallruns.finetune(tmp_path, report_to="wandb", stages=smallruns.STAGES)
    (run,) = read_wandb(folder)
    ours = read_metrics(folder / "metrics.jsonl")
    theirs = [r for r in history(run) if "train/loss" in r or "epoch/loss" in r]
    assert theirs == ours and {r["stage"] for r in ours} == {"1 head", "2 late", "3 everything"}
    assert next(r["run"]["job_type"] for r in run if r["type"] == "run") == "finetune"


# --- resume ---


@pytest.mark.parametrize(
    "stop",
    [s if s in (2, 4, 10) else pytest.param(s, marks=pytest.mark.sweep) for s in range(1, 12)],
)
def test_stopping_after_any_step_of_any_stage_changes_nothing(
    straight, tmp_path, stop, monkeypatch
):
    """At the ends of stages too (4, 8), where the next one starts with other groups."""
    monkeypatch.setattr(Record, "draw_curves", lambda self, step: None)
    folder, status = smallruns.finetune(tmp_path, stop_after=stop)
    assert status == 0
    smallruns.finetune(tmp_path, resume_from_checkpoint="auto")
    assert smallruns.digest(folder) == smallruns.digest(straight)


# Two stages on kept features, of which the second is not augmented, and a head alone once more,
# when averaged and raw weights of what is frozen are no longer the same
HEADS = """[
    {epochs: 1, train: {head: 0.01}},
    {epochs: 1, train: {head: 0.01}, augment: none},
    {epochs: 1, train: {all: 0.002}},
    {epochs: 1, train: {head: 0.01}},
]"""


VARIANTS = {
    "test": {},
    "val": {"val_fraction": 0.2},
    "no ema": {"ema_decay": 0, "eval_epochs": 2, "checkpointing_steps": 3},
}


@pytest.fixture(scope="module")
def other_orders(tmp_path_factory):
    """{variant: a run that was never stopped}, made when it is asked for."""

    @functools.cache
    def of(variant):
        flags = {**VARIANTS[variant], "stages": HEADS, "mixed_precision": "no"}
        folder, status = smallruns.finetune(tmp_path_factory.mktemp("orders"), **flags)
        assert status == 0
        return folder, flags

    return of


# One stop inside each kind of stage, each variant of evaluation once; the sweep has them all
EVERY_RUN = {("test", "kept features"), ("val", "all of it"), ("no ema", "the head again")}
STOPS = {"kept features": (1, -1), "not augmented": (2, -1), "all of it": (3, 0),
         "the head again": (4, -1)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "stop"),
    [
        pytest.param(v, s, marks=() if (v, s) in EVERY_RUN else pytest.mark.sweep)
        for v in VARIANTS
        for s in STOPS
    ],
)
def test_other_orders_of_stages_resume_too(other_orders, tmp_path, variant, stop):
    folder, flags = other_orders(variant)
    epochs, more = STOPS[stop]
    step = epochs * (3 if "val_fraction" in flags else 4) + more
    smallruns.finetune(tmp_path, stop_after=step, **flags)
    stopped, _ = smallruns.finetune(tmp_path, resume_from_checkpoint="auto", **flags)
    assert smallruns.digest(stopped) == smallruns.digest(folder)


def test_the_accuracy_that_is_told_is_that_of_the_weights_that_are_kept(tmp_path):
    """With averaged weights, a backbone that has trained, and a head alone at the end."""
    folder, _ = smallruns.finetune(tmp_path, stages=HEADS, mixed_precision="no", lr=None)
    config = json.loads((folder / "config.json").read_text())
    model = build.rebuild_model(config).eval()
    load_state(model, load_weights(folder))
    from harness.data.sources import load_data
    from harness.data.stores import decode_splits
    from harness.models.trained import read_trained

    cfg = config["pretrained_cfg"]
    size = cfg["input_size"][-1]
    stored = round(size / cfg["crop_pct"])
    data = load_data("digits", max_eval_samples=100)
    images, labels = decode_splits(data, read_trained(folder).preprocessing)["test"].take(
        torch.arange(100), torch.device("cpu")
    )
    edge = (stored - size) // 2
    images = images[..., edge : edge + size, edge : edge + size] / 255
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = model((images - mean) / std)
    summary = json.loads((folder / "summary.json").read_text())
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert summary["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_frozen_part_that_moves_stops_the_run(tmp_path, monkeypatch):
    import finetune
    from harness.errors import RunStopped
    from harness.training import scoring

    evaluate = scoring.evaluate

    def disturb(accelerator, model, *rest, **options):
        for module in finetune_model:
            module.running_mean[0] += 1e-6
        return evaluate(accelerator, model, *rest, **options)

    finetune_model = []
    unfreeze = finetune.unfreeze

    def remember(model):
        finetune_model.append(model.conv1[1])
        unfreeze(model)

    monkeypatch.setattr(finetune, "unfreeze", remember)
    monkeypatch.setattr(scoring, "evaluate", disturb)
    with pytest.raises(RunStopped, match="stage 1 head: weights or buffers that are frozen"):
        smallruns.finetune(
            tmp_path, stages="[{epochs: 3, train: {head: 0.01}}]", views=0, mixed_precision="no"
        )


def test_other_stages_are_refused_at_resume(straight, tmp_path):
    from harness.errors import UserError

    smallruns.finetune(tmp_path, stop_after=6)
    with pytest.raises(UserError, match="stages"):
        smallruns.finetune(
            tmp_path, stages=smallruns.STAGES.replace("0.001", "0.002"),
            resume_from_checkpoint="auto",
        )  # fmt: skip


# --- processes ---


@pytest.mark.slow
def test_two_processes_train_every_stage_as_one_does(tmp_path):
    """BatchNorm in eval mode, so that the batch each process sees does not matter."""
    flags = {
        "bn_mode": "eval", "mixed_precision": "no", "logging_steps": 1,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    connected = {**flags, "script": "finetune", "processes": 2}
    (tmp_path / "two").mkdir()
    stopped = faulty.start(tmp_path / "again", stop_after=6, **connected)
    one, _ = smallruns.finetune(tmp_path / "one", **flags)
    done = smallruns.launch(tmp_path / "two", launcher=TWO, script="finetune.py", **flags)
    assert done.returncode == 0, done.stdout
    two = tmp_path / "two" / "run"
    assert len(losses(one)) == 12
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    ends = [raw_weights(f, 12) for f in (one, two)]
    moved = torch.linalg.vector_norm(ends[0] - raw_weights(one, 8))
    assert torch.linalg.vector_norm(ends[1] - ends[0]) < 0.02 * moved
    # Stopped in the second stage and resumed, both processes
    stopped.done()
    again = faulty.start(tmp_path / "again", resume_from_checkpoint="auto", **connected).done()
    assert smallruns.digest(again) == smallruns.digest(two)


@pytest.mark.slow
def test_two_processes_start_from_one_probe(others, tmp_path):
    """Each of them computes a part of the features, one of them fits."""
    flags = {**HEAD_ALONE, "epochs": 1, "logging_steps": 1, "weights": others, "lr": 0.001}
    one, _ = smallruns.finetune(tmp_path / "one", **flags)
    (tmp_path / "two").mkdir()
    done = smallruns.launch(tmp_path / "two", launcher=TWO, script="finetune.py", **flags)
    assert done.returncode == 0, done.stdout
    assert losses(tmp_path / "two" / "run") == pytest.approx(losses(one), abs=1e-4)


# --- auto, plan, errors ---


def test_auto_measures_chooses_and_trains(tmp_path, capsys):
    folder, status = smallruns.finetune(
        tmp_path, strategy="auto", stages=None, epochs=1, weights="none"
    )
    assert status == 0
    line = next(li for li in capsys.readouterr().out.splitlines() if li.startswith("strategy"))
    numbers = re.search(r"(\w+): .*\(probe accuracy ([\d.]+)%, skill over chance", line)
    assert numbers and numbers[1] in ("feature_extraction", "full")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["strategy"] == numbers[1]


def test_dry_run_prints_the_table_and_writes_nothing(tmp_path, capsys):
    _, status = smallruns.finetune(tmp_path, dry_run=True)
    assert status == 0 and not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    for word in ("stage 1 head", "stage 2 late", "(the rest)", "frozen", "as it is", "strategy"):
        assert word in out


class Hostile:
    """An object whose unpickling writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"stages": "[{epochs: 1, train: {layer9: 1}}]"}, "stage 1 layer9: .*layer9"),
        ({"stages": "[{epochs: 1, train: {maxpool: 1}}]"}, "stage 1 maxpool: .*maxpool"),
        ({"stages": "[{epochs: 1, train: {conv1: 1, conv1.0: 1}}]"}, "conv1.0.*conv1"),
        ({"weights": "torn.safetensors"}, r"torn\.safetensors can't be read"),
        ({"weights": "hostile.pth"}, r"hostile\.pth .*nothing in it was run"),
        ({"weights": "absent.pth"}, r"no weights at .*absent\.pth"),
        ({"weights": "other.pth"}, r"other\.pth does not fit .*another shape: conv5"),
        ({"weights": "run"}, "holds a resnet18: add --model resnet18"),
        ({"weights": "IMAGENET1K_V9"}, "no weights IMAGENET1K_V9"),
        ({"lr": 0.1}, "--lr has no effect with --strategy staged"),
        ({"model": "resnet18", "stages": None, "batch_size": 47}, "47"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, flags, said):
    from torchvision.models import shufflenet_v2_x1_0

    from harness.errors import UserError

    monkeypatch.chdir(tmp_path)
    Path("torn.safetensors").write_bytes(b"no")
    torch.save({"fc.weight": Hostile(tmp_path / "executed")}, "hostile.pth")
    torch.save(shufflenet_v2_x1_0(num_classes=10).state_dict(), "other.pth")
    Path("run").mkdir()
    Path("run/config.json").write_text('{"architecture": "resnet18"}')
    if "weights" in flags and not flags["weights"].startswith("IMAGENET"):
        flags = {"weights": f"./{flags['weights']}"}
    with pytest.raises(UserError, match=said) as error:
        smallruns.finetune(tmp_path / "out", **{"model": "shufflenet_v2_x0_5", **flags})
    assert "\n" not in str(error.value)
    assert not Path("out").exists() and not Path("executed").exists()


@pytest.mark.slow
def test_an_error_ends_the_script_with_its_line(tmp_path):
    stages = "[{epochs: 1, train: {layer9: 1}}]"
    run = faulty.start(tmp_path, script="finetune.py", stages=stages)
    assert run.wait() == [2]
    lines = [li for li in run.output().splitlines() if li.startswith("finetune.py:")]
    assert len(lines) == 1 and "layer9" in lines[0], run.output()


@pytest.mark.slow
def test_two_processes_say_an_error_once_and_end(tmp_path):
    """Weights are looked for by one process first: the other one must not wait for it for ever."""
    run = faulty.start(tmp_path, processes=2, script="finetune.py", weights="./absent.pth")
    assert run.wait() == [2, 2]
    assert run.output().count("finetune.py: no weights at absent.pth") == 1
    assert "[rank" not in run.output()


@pytest.mark.sweep
def test_two_launched_processes_say_an_error_once_and_end(tmp_path):
    done = smallruns.launch(tmp_path, launcher=TWO, script="finetune.py", weights="./absent.pth")
    assert done.returncode != 0
    own = done.stdout.split("ChildFailedError")[0]  # after it, the launcher tells of its own error
    assert own.count("finetune.py: no weights at absent.pth") == 1 and "[rank" not in own


@pytest.mark.slow
def test_timm_loads_a_fine_tuned_resnet_from_its_folder(tmp_path):
    timm = pytest.importorskip("timm")
    folder, status = smallruns.finetune(
        tmp_path, model="resnet18", stem="standard", image_size=32, max_steps=6,
        stages="[{epochs: 1, train: {head: 0.01}}, {epochs: 1, train: {layer4: 0.001, fc: 0.01}}]",
    )  # fmt: skip
    assert status == 0
    config = json.loads((folder / "config.json").read_text())
    ours = build.rebuild_model(config).eval()
    load_state(ours, load_weights(folder))
    theirs = timm.create_model(
        "resnet18", num_classes=10, checkpoint_path=str(folder / "model.safetensors")
    ).eval()
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images))
        torch.testing.assert_close(by_folder(images), ours(images))


def test_validation_on_what_the_weights_were_trained_on_is_said(tmp_path, capsys):
    flags = {"val_fraction": 0.3, "max_train_samples": None, "dry_run": True}
    start, _ = smallruns.train(
        tmp_path, run_name="start", epochs=1, max_steps=1, val_fraction=0.3, max_train_samples=None
    )
    for seed, said in ((7, True), (42, False)):
        capsys.readouterr()
        smallruns.finetune(tmp_path, weights=start, seed=seed, **flags)
        out = capsys.readouterr().out
        assert (f"of 100 val images were trained on by {start}" in out) == said, out


# --- what is frozen ---


def test_the_digest_of_what_is_frozen_is_taken_at_the_two_ends_of_a_stage(tmp_path, monkeypatch):
    digests = []
    monkeypatch.setattr("finetune.frozen_digest", lambda model: digests.append(model))
    _, status = smallruns.finetune(tmp_path, stages="[{epochs: 3, train: {head: 0.01}}]")
    assert status == 0 and len(digests) == 2
