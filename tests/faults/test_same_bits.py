"""The same flags give the same bits: however often stopped, wherever started, by how many."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

import faulty
import smallruns
from harness.training.metrics_file import read_metrics

# 48 steps: augmentation, erasing, mixing, dropout, averages and accumulation are all on
LONG = {
    "batch_size": 16, "epochs": 4, "logging_steps": 5, "checkpointing_steps": 1,
    "max_checkpoints": 99,
}  # fmt: skip
STEPS = 48


def no_pictures():
    from harness.training.record import Record

    Record.draw_curves = lambda self, step: None


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that was never stopped, with the checkpoints of all its steps."""
    run = faulty.start(tmp_path_factory.mktemp("straight"), fault=no_pictures, **LONG)
    folder = run.done()
    assert len(list((folder / "checkpoints").iterdir())) == STEPS
    return folder


def bits(checkpoint):
    """sha256 of a checkpoint's tensors, and its counters but for the seconds."""
    counters = json.loads((checkpoint / "state.json").read_text())
    del counters["seconds"], counters["run_id"]  # W&B's name of the run
    if counters["unscored"]:
        del counters["unscored"]["images_per_second"]
    return counters, {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(checkpoint.glob("*.safetensors"))
    }


def one_step_a_start(output_dir):
    """A fault that is none: this process starts the script 48 times and never returns to it."""
    no_pictures()
    for step in range(1, STEPS + 1):
        flags = LONG | {"stop_after": step, "resume_from_checkpoint": "auto"}
        _, status = smallruns.train(output_dir, **flags)
        assert status == 0
    raise SystemExit(0)


def resume_from_each(straight, output_dir, steps):
    no_pictures()
    for step in steps:
        name = f"from-{step}"
        shutil.copytree(straight, output_dir / name, ignore=only(f"step-{step:08d}"))
        flags = LONG | {"run_name": name, "resume_from_checkpoint": "auto", "max_checkpoints": 2}
        _, status = smallruns.train(output_dir, **flags)
        assert status == 0
    raise SystemExit(0)


def only(checkpoint):
    def ignore(folder, names):
        others = [n for n in names if n.startswith("step-") and n != checkpoint]
        result = ("summary.json", "model.safetensors") if "checkpoints" in names else ()
        return [*others, *(n for n in names if n in result)]

    return ignore


def test_stopped_after_every_step_and_resumed_48_times(straight, tmp_path):
    run = faulty.start(tmp_path, fault=functools.partial(one_step_a_start, tmp_path), **LONG)
    folder = run.done(240)
    for step in range(1, STEPS + 1):
        name = f"checkpoints/step-{step:08d}"
        assert bits(folder / name) == bits(straight / name), f"step {step}"
    assert smallruns.digest(folder) == smallruns.digest(straight)


def test_resumed_once_and_trained_to_the_end(straight, tmp_path):
    """From steps all over an epoch: the 48 starts above never took a second step in one process."""
    halves = [range(2, STEPS, 10), range(6, STEPS + 1, 7)]  # two processes, each its own runs
    runs = [
        faulty.start(
            tmp_path / str(i), fault=functools.partial(resume_from_each, straight, tmp_path, half)
        )
        for i, half in enumerate(halves)
    ]
    for run in runs:
        run.wait(400)
        assert run.wait() == [0], run.output()
    expected = smallruns.digest(straight)
    for step in (*halves[0], *halves[1]):
        assert smallruns.digest(tmp_path / f"from-{step}") == expected, f"from step {step}"


@pytest.mark.everyday
@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(tmp_path):
    """BatchNorm, dropout, mixing and accumulation included."""
    whole = faulty.start(tmp_path / "a", processes=2)
    stopped = faulty.start(tmp_path / "b", processes=2, stop_after=7)
    whole = whole.done()
    stopped.done()
    resumed = faulty.start(tmp_path / "b", processes=2, resume_from_checkpoint="auto").done()
    assert smallruns.digest(resumed) == smallruns.digest(whole)


def test_the_decoders_threads_change_nothing(tmp_path):
    """Resumed on one core with an empty cache: the images are decoded anew, by one thread."""
    caches = [{"HF_DATASETS_CACHE": str(tmp_path / name)} for name in ("many", "one")]
    whole = faulty.start(tmp_path / "a", fault=another_cache, env=caches[0]).done()
    faulty.start(tmp_path / "b", fault=another_cache, env=caches[0], stop_after=5).done()
    resumed = faulty.start(
        tmp_path / "b", fault=one_core, env=caches[1], resume_from_checkpoint="auto"
    ).done()
    assert smallruns.digest(resumed) == smallruns.digest(whole)


@pytest.mark.parametrize(
    ("first", "then", "processes"), [(2, 1, 1), (1, 2, 1), (2, 3, 1), (2, 1, 2)]
)
def test_another_number_of_threads_changes_nothing(tmp_path, first, then, processes):
    """The run goes on with the number that it began with, and says so."""
    case = {"processes": processes, "epochs": 2}
    whole = faulty.start(tmp_path / "a", **case, threads=first).done()
    faulty.start(tmp_path / "b", **case, threads=first, stop_after=7).done()
    resumed = faulty.start(tmp_path / "b", **case, threads=then, resume_from_checkpoint="auto")
    assert smallruns.digest(resumed.done()) == smallruns.digest(whole)
    assert f"threads      {first} as before, not {then}" in resumed.output()
    assert json.loads((resumed.folder / "summary.json").read_text())["threads"] == first


def test_another_number_of_threads_does_give_other_bits(tmp_path):
    """Else the test above would prove nothing."""
    one, two = (faulty.start(tmp_path / str(n), epochs=2, threads=n).done() for n in (1, 2))
    assert smallruns.digest(one) != smallruns.digest(two)


def another_cache():
    import datasets

    datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]


def one_core():
    another_cache()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


# --- another number of processes ---

# Without BatchNorm, whose statistics depend on how the batch is cut; without dropout, which is
# drawn by each process for itself.
PLAIN = {
    "model": "squeezenet1_1", "image_size": 32, "dropout": 0, "mixed_precision": "no", "lr": 0.02,
    "logging_steps": 1, "epochs": 3, "gradient_accumulation_steps": 1, "max_train_samples": 100,
    "batch_size": 24,
}  # fmt: skip


def note_images(folder):
    """Write down the sha256 of every augmented image, by step; two processes into one file."""
    import train
    from harness.data.batches import Views
    from harness.training.run import Run

    now, real_train, real_sync = [], Views.train, Run.sync_step

    def augmented(self, images, draw):
        images = real_train(self, images, draw)
        now.extend(hashlib.sha256(i.numpy().tobytes()).hexdigest() for i in images)
        return images

    def sync(self, norm):
        with open(folder / "images.jsonl", "a") as file:
            file.write(json.dumps([self.step, sorted(now)]) + "\n")
        now.clear()
        real_sync(self, norm)

    Views.train, Run.sync_step = augmented, sync
    assert train.make_views


def seen(folder):
    steps = {}
    for line in (folder / "images.jsonl").read_text().splitlines():
        step, images = json.loads(line)
        steps.setdefault(step, []).extend(images)
    return {step: sorted(images) for step, images in steps.items()}


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_sees_the_same_images(tmp_path, first, then):
    def go(name, processes, **more):
        (tmp_path / name).mkdir(exist_ok=True)
        fault = functools.partial(note_images, tmp_path / name)
        return faulty.start(
            tmp_path / name, fault=fault, processes=processes, **PLAIN, **more
        ).done()

    whole = go("whole", first)
    go("parts", first, stop_after=6)
    parts = go("parts", then, resume_from_checkpoint="auto")
    assert seen(tmp_path / "whole") == seen(tmp_path / "parts")
    assert sorted(seen(tmp_path / "parts")) == list(range(12))
    ours, theirs = (read_metrics(f / "metrics.jsonl") for f in (parts, whole))
    ours, theirs = ([r for r in records if "train/lr" in r] for records in (ours, theirs))
    assert [r["train/lr"] for r in ours] == [r["train/lr"] for r in theirs]
    assert len(ours) == 12
    for a, b in zip(ours[6:11], theirs[6:11], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-3)


def test_511_images_are_scored_once_each_by_two_processes(tmp_path):
    """The same weights, 511 held out images: the same sums, whoever shares the work."""
    weights = faulty.start(tmp_path / "w", **PLAIN).done() / "model.safetensors"
    held_out = {
        **PLAIN, "weights": weights, "max_train_samples": None, "val_fraction": 511 / 1437,
        "max_eval_samples": None, "max_steps": 1, "lr": 1e-30, "epochs": None,
    }  # fmt: skip
    found = []
    for processes in (1, 2):
        folder = faulty.start(tmp_path / str(processes), processes=processes, **held_out).done()
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["data"]["splits"]["val"] == 511
        found.append(summary["scores"])
    assert found[0] == found[1]
    assert (found[0]["val/acc"] * 511) == pytest.approx(round(found[0]["val/acc"] * 511))


def test_the_directory_and_the_hash_seed_change_nothing(tmp_path):
    folders = []
    for name, seed in (("a", "1"), ("b", "2")):
        (tmp_path / name / "elsewhere").mkdir(parents=True)
        flags = smallruns.SMALL | {"output_dir": tmp_path / name, "epochs": 1}
        command = [sys.executable, smallruns.ROOT / "train.py", *smallruns.words(flags)]
        cwd = tmp_path / name / "elsewhere" if name == "a" else tmp_path
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(command, cwd=cwd, env=env, check=True, capture_output=True, timeout=120)
        folders.append(tmp_path / name / "run")
    third = faulty.start(tmp_path / "c", cwd=tmp_path, epochs=1).done()  # forked, no new Python
    assert smallruns.digest(folders[0]) == smallruns.digest(folders[1]) == smallruns.digest(third)
    other = faulty.start(tmp_path / "d", epochs=1, seed=43).done()
    assert smallruns.digest(other) != smallruns.digest(third)
