"""No step and no evaluation of a script waits for the GPU, shown without one: see pretend_gpu."""

import functools
import sys

import pytest
import torch

import smallruns
from harness.data.batches import Views
from pretend_gpu import HostWait, pretended
from tricks.label_smoothing import smooth_labels

FLAGS = {"mixed_precision": "no", "dropout": None}
FINETUNE = {k: v for k, v in smallruns.FINETUNE.items() if k not in FLAGS}
RUNS = {
    "train": ("train", {}),
    "train, validation and other views": (
        "train",
        {"val_fraction": 0.2, "tta": "random:2", "crop_scale": 0.4, "augment": "trivialaugment",
         "optimizer": "adamw", "nonfinite": "skip"},
    ),
    "train, the fast recipe's parts": (
        "train",
        {"model": "fastnet_small", "optimizer": "muon", "flip": "alternating", "start_size": 12,
         "tta": "shift"},
    ),
    "finetune": ("finetune", FINETUNE),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flags"), RUNS.values(), ids=RUNS)
def test_neither_a_step_nor_an_evaluation_waits_for_the_gpu(tmp_path, monkeypatch, script, flags):
    with pretended(monkeypatch) as gpu:
        _, status = smallruns.train(tmp_path, script=script, **FLAGS, **flags)
    stages = 3 if script == "finetune" else 1
    assert status == 0 and gpu.steps == 12 - stages  # each stage's first may wait
    assert gpu.evaluations >= 2 * 3  # raw and averaged weights, three epochs


@pytest.mark.slow
def test_no_forward_pass_of_an_ensemble_waits_for_the_gpu(tmp_path, monkeypatch):
    for seed in (1, 2):
        smallruns.train(tmp_path, seed=seed, run_name=f"r{seed}", **smallruns.MEMBER)
    members = tmp_path / "r1", tmp_path / "r2"
    with pretended(monkeypatch) as gpu:
        smallruns.ensemble(tmp_path, *members, tta="shift,random:2", mixed_precision="no")
    assert gpu.evaluations >= 2


@pytest.mark.slow
def test_on_mps_nothing_is_copied_behind_the_hosts_back_and_no_thread_issues_work(
    tmp_path, monkeypatch
):
    with pretended(monkeypatch, "mps"):
        monkeypatch.setattr("harness.processes.threading", None)
        for name, (script, flags) in RUNS.items():
            _, status = smallruns.train(tmp_path / name, script=script, **FLAGS, **flags)
            assert status == 0


# --- each call that waits, planted in a step and in an evaluation ---

PLANTED = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().numpy(),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "if": lambda x: not x.sum() > 0,
    "print": lambda x: str(x),
    "equal": lambda x: torch.equal(x, x),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "torch.tensor": lambda x: torch.tensor([1.0], device=x.device),
    "torch.as_tensor": lambda x: torch.as_tensor([1.0], device=x.device),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave((x.flatten(1)[:, 0] > 0).long(), dim=0),
    "boolean index": lambda x: x[x > 0],
    "boolean index, set": lambda x: x.clone().__setitem__(x.flatten(1)[:, 0] > 0, x[:1]),
    "index in the host's memory": lambda x: x[torch.arange(2)],
    "to the device": lambda x: torch.arange(2).to(x.device),
    "to the host": lambda x: x.to("cpu"),
    "to the host, with no event": lambda x: x.to("cpu", non_blocking=True),
    "copy_ to the device": lambda x: x.new_empty(2).copy_(torch.zeros(2)),
    "copy_ to the host": lambda x: torch.zeros(()).copy_(x.sum()),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


def planting(function, found):
    """`function`, which afterwards makes each of those calls with the tensor it gives."""

    @functools.wraps(function)
    def planted(*args, **options):
        result = function(*args, **options)
        for name, call in PLANTED.items():
            try:
                call(result)
            except HostWait:
                found.add(name)
        return result

    return planted


@pytest.mark.slow
def test_each_call_that_waits_is_found_in_a_step_and_in_an_evaluation(tmp_path, monkeypatch):
    in_steps, in_evaluations = set(), set()
    with pretended(monkeypatch):
        monkeypatch.setattr("train.smooth_labels", planting(smooth_labels, in_steps))
        monkeypatch.setattr(Views, "evaluation", planting(Views.evaluation, in_evaluations))
        smallruns.train(tmp_path, epochs=1, **FLAGS)
    assert in_steps == in_evaluations == set(PLANTED)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["guard", "scoring"])
def test_what_was_mended_is_found_where_it_stood(tmp_path, monkeypatch, where):
    """new_full by new_tensor again, in one of the two places that had it."""
    new_full = torch.Tensor.new_full

    def as_it_was(tensor, size, value):
        file = sys._getframe(1).f_code.co_filename
        here = file.endswith(f"harness/training/{where}.py")
        return tensor.new_tensor([value] * len(size)) if here else new_full(tensor, size, value)

    with pretended(monkeypatch):
        monkeypatch.setattr(torch.Tensor, "new_full", as_it_was)
        with pytest.raises(HostWait, match="new_tensor onto the device"):
            smallruns.train(tmp_path, epochs=1, **FLAGS)
