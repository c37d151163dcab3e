"""recipes/sweep.yaml: what W&B's agent starts, run as it starts it."""

import yaml

import smallruns

SWEEP = yaml.safe_load((smallruns.ROOT / "recipes" / "sweep.yaml").read_text())


def trial(number):
    """The command line of a trial, as the agent writes it."""
    words = []
    for name, about in SWEEP["parameters"].items():
        values = about.get("values") or [about.get("value", about.get("min"))]
        value = values[number % len(values)]
        words.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return words


def test_two_trials_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    folders = []
    for number, run in enumerate(("abc123", "def456")):
        monkeypatch.setenv("WANDB_RUN_ID", run)
        flags = {"output_dir": tmp_path, "model": "test_resnet", "max_train_samples": 200,
                 "max_steps": 2, "report_to": "none"}  # fmt: skip
        recipe = f"--config={smallruns.ROOT}/recipes/digits.yaml"
        smallruns.run("train", [recipe, *trial(number), *smallruns.words(flags)])
        folders.append(tmp_path / f"digits-{run}")
    assert all((folder / "summary.json").exists() for folder in folders)
    assert SWEEP["metric"]["name"] in (folders[0] / "metrics.jsonl").read_text()
    nesterov = ["nesterov: false" in (folder / "config.yaml").read_text() for folder in folders]
    assert nesterov == [False, True] or nesterov == [True, False]
