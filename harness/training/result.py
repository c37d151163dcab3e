"""The result of a run: weights, those of the best epoch where val chooses, and the summary."""

from __future__ import annotations

import contextlib
import json
import math

import torch

from harness.files import DIGEST, replace_file, result_bytes
from harness.metrics import is_better
from harness.models.weights import clean_state_dict
from harness.training.folder import git_commit, versions
from harness.version import VERSION


class Result:
    """What the run would give if it ended now.

    recipe: all flags, for config.json. select_by: of the flag. config: what else config.json says.
    best: {"epoch", "step", "scores"} of the best epoch on val so far, and best_weights its
    weights; None without val. The run calls `write` after the checkpoint that holds the same.
    """

    def __init__(self, folder, recipe, select_by, config, module, ema):
        self.folder, self.recipe, self.select_by, self.config = folder, recipe, select_by, config
        self.module, self.ema = module, ema
        self.suffix, self.kind = ("_ema", "ema") if ema else ("", "raw")
        self.best, self.best_weights = None, None
        self._on_disk = None  # the `best` that model.safetensors is of, on the main process

    def averaged(self):
        """A context in which the model has the averaged weights, if there are any."""
        return self.ema.applied_to(self.module) if self.ema else contextlib.nullcontext()

    def current_weights(self):
        """{name: tensor in memory}: the averaged weights where there are any, else the model's."""
        with self.averaged():
            return {k: v.to("cpu", copy=True) for k, v in clean_state_dict(self.module).items()}

    def consider(self, epoch, step, scores) -> bool:
        """Keep the weights of this epoch if they are the best on val so far."""
        name = self.select_by
        key = f"val/{name}{self.suffix}"
        if key not in scores or not math.isfinite(scores[f"val/loss{self.suffix}"]):
            return False
        if self.best is not None and not is_better(name, scores[key], self.best["scores"][key]):
            return False
        self.best = {"epoch": epoch, "step": step, "scores": scores}
        self.best_weights = self.current_weights()
        return True

    def write(self, best, weights):
        """Write model.safetensors and config.json, unless those of this `best` are on the disk."""
        if best is not self._on_disk:
            data, digest = result_bytes(weights)
            config = self.config | {
                DIGEST: digest,
                "weights": self.kind,
                "flags": self.recipe,
                "version": VERSION,
                "versions": versions(),
            }
            replace_file(self.folder / "model.safetensors", data)
            replace_file(self.folder / "config.json", as_json(config))
        self._on_disk = best

    def summarise(self, accelerator, scores, facts):
        """The contents of summary.json. scores: {"SPLIT/METRIC": value}; facts: more of them."""
        split = self.scored_split(scores)
        return {
            "split": split,
            "accuracy": scores.get(f"{split}/acc{self.suffix}"),
            "loss": scores.get(f"{split}/loss{self.suffix}"),
            "weights": self.kind,
            "best_epoch": self.best and self.best["epoch"],
            "scores": scores,
            **facts,
            "data": self.config["data"],
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "git_commit": git_commit(),
        }

    def scored_split(self, scores):
        """Which split the result is judged on: test, else val; None where neither was scored."""
        return next((s for s in ("test", "val") if f"{s}/acc{self.suffix}" in scores), None)


def as_json(value) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
