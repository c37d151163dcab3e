"""Soups of members: networks of their averaged weights, and the predictions of those."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import combinations

import torch

from harness.counters import generator
from harness.data.stores import decode
from harness.ensembles.predictions import progress
from harness.files import file_name, replace_file, result_bytes
from harness.models.reading import load_weights
from harness.models.trained import load_model
from harness.models.weights import clean_state_dict
from tricks.augment import normalize_batch
from tricks.soup import recompute_batch_norm, uniform_soup
from tricks.tta import tta_views

BATCH, BATCHES = 256, 16  # training images that BatchNorm's statistics are measured on, at most


def groups_of(members) -> list[list[int]]:
    """The numbers of members whose weights can be averaged, for each architecture of several."""
    groups = {}
    for number, member in enumerate(members):
        groups.setdefault(member.kind, []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def from_different_starts(members) -> bool:
    """Whether some two of these share no weights that both went on from: their mean is no network.

    (Wortsman 2022: what was fine-tuned from the same weights can be averaged. Networks from
    different random weights can't.)
    """
    return any(not _share_a_start(a, b) for a, b in combinations(members, 2))


def _share_a_start(a, b):
    given = {(member.config.get("flags") or {}).get("weights", "none") for member in (a, b)}
    (own, *before), (others_own, *before_other) = a.recipes, b.recipes
    went_on = own in before_other or others_own in before
    named = len(given) == 1 and given != {"none"}
    return named or went_on or any(recipe in before_other for recipe in before)


def failed_soups(results, members, labels) -> list[str]:
    """A line for each uniform soup of different starts that has lost most of what its members know.

    results: rows of harness.ensembles.comparison.compare. labels: int64 (n,), of what was scored.
    """
    chance = (labels.bincount().max() / len(labels)).item()
    lines = []
    for row in results:
        chosen = row.get("soup", [[]])[0]
        if not row["name"].startswith("uniform soup") or len(chosen) < 2:
            continue
        worst = min(results[number]["accuracy"] for number in chosen)
        parts = [members[number] for number in chosen]
        lost = row["accuracy"] - chance < (worst - chance) / 2
        if lost and worst > chance and from_different_starts(parts):
            lines.append(
                f"{row['name']} is far under its members: {', '.join(p.name for p in parts)} come "
                "from different starts, and the mean of such weights is no network; --no_soup "
                "saves the passes"
            )
    return lines


class Soups:
    """Logits of soups of these members, with BatchNorm's statistics measured again.

    A soup of one member is possible, for comparison: the member's own BatchNorm statistics are of
    augmented images.

    images: harness.ensembles.members.Images. views: those of the combinations. folder: the
    report's, where the soups' predictions are stored, too.
    """

    def __init__(self, accelerator, members, images, predictions, views, folder, seed):
        self.accelerator, self.members, self.images = accelerator, members, images
        self.predictions, self.views, self.folder, self.seed = predictions, views, folder, seed
        self._models = {}  # only the latest soup
        self._train = {}  # decoded training images by preprocessing

    def logits(self, numbers, role, all_views):
        """Logits (n, classes) of a soup, averaged over all views, or else of one view."""
        soup = self._soup(numbers)
        views = (
            self.views[soup.preprocessing.size]
            if all_views
            else tta_views("none", soup.preprocessing.size)
        )
        pairs = self.predictions.recall(soup, views, [role])
        if pairs:
            with progress(self.accelerator, self.predictions.count(pairs)) as bar:
                self.predictions.compute(soup, self._model(numbers), pairs, bar)
        return self.predictions.logits(soup, role, views)

    def save_all(self, results):
        """Write the soups of several members among the results, and remove those of older reports.

        A soup whose members differ between the two halves is left out: the accuracy in the report
        is that of neither.
        """
        soup_folders = []
        for result in results:
            fits = result.details.get("soup", [])
            if fits and len(fits[0]) > 1 and all(numbers == fits[0] for numbers in fits):
                soup_folders.append(self.save(result.name, fits[0]))
        for config_file in self.folder.glob("*soup*/config.json"):
            if config_file.parent not in soup_folders:
                shutil.rmtree(config_file.parent)

    def save(self, name, numbers):
        """Write a soup as the folder of a run, for gradcam.py or another ensemble; returns it."""
        folder = self.folder / file_name(name)
        soup = self._soup(numbers)
        members = [self.members[number] for number in numbers]
        config = soup.config | {
            "weights": "soup",
            "members": [member.name for member in members],
            "ancestors": [recipe for member in members for recipe in member.recipes],
            "soup_sha256": soup.sha256,  # a hash of its members and its training images
        }
        text = (json.dumps(config, indent=2) + "\n").encode()
        config_file, weights_file = folder / "config.json", folder / "model.safetensors"
        complete = weights_file.exists() and config_file.exists()
        if not complete or config_file.read_bytes() != text:
            folder.mkdir(parents=True, exist_ok=True)
            weights, _ = result_bytes(clean_state_dict(self._model(numbers)))
            replace_file(weights_file, weights)
            replace_file(config_file, text)
        return folder

    def _soup(self, numbers):
        members = [self.members[number] for number in numbers]
        train = self.images.train
        images = f"{train.dataset._fingerprint} {self.images.image_column}"
        digest = hashlib.sha256(images.encode() + train.rows.tobytes())
        weights = [member.sha256 for member in members]
        digest.update(repr([BATCH, BATCHES, self.seed, *weights]).encode())
        name = f"soup of {', '.join(member.name for member in members)}"
        return members[0]._replace(name=name, folder=self.folder, sha256=digest.hexdigest())

    def _model(self, numbers):
        key = tuple(numbers)
        if key not in self._models:
            first_member = self.members[numbers[0]]
            state = uniform_soup([load_weights(self.members[n].folder) for n in numbers])
            model = load_model(first_member, state)
            model.to(self.accelerator.device, memory_format=torch.channels_last)
            with self.accelerator.autocast():
                recompute_batch_norm(model, self._batches(first_member.preprocessing))
            self._models.clear()
            self._models[key] = model
        return self._models[key]

    def _batches(self, preprocessing):
        """Training images as in evaluation, in batches of one size; the same on every process."""
        if preprocessing not in self._train:
            self._train[preprocessing] = decode(
                self.images.train, self.images.image_column, preprocessing, self.accelerator
            )
        samples = self._train[preprocessing]
        total = len(samples.labels)
        order = torch.randperm(total, generator=generator(self.seed, "soup"))
        size = min(BATCH, total)
        (view,) = tta_views("none", preprocessing.size)
        for start in range(0, min(total // size, BATCHES) * size, size):
            index = order[start : start + size].sort().values
            images, _ = samples.take(index, self.accelerator.device)
            yield normalize_batch(view.apply(images, index), preprocessing.mean, preprocessing.std)
