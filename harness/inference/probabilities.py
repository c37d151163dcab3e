"""Probabilities of images: threads read and decode while the network computes.

The images are cut into fixed batches by index and shared out to the processes in turn, so that the
probabilities do not depend on how many processes share the work. Images that can't be read are
reported, and do not stop the others.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from harness.data.cache import reason_of_image
from harness.data.making import threads
from harness.data.stores import evaluation_image
from harness.errors import UserError
from harness.models.calibration import read_calibration
from harness.models.trained import load_model
from harness.processes import check_same, from_each
from tricks.augment import normalize_batch
from tricks.tta import average_views, tta_views

BATCH = 64  # images
AHEAD = 2  # batches that are decoded while one is computed


class Network(NamedTuple):
    """A run's network on the device, in eval mode, and what its probabilities are divided by."""

    trained: object  # harness.models.trained.Trained
    model: object
    views: list  # of tricks.tta
    temperature: float  # of calibration.json; 1.0 without one
    calibrated: bool


def load_networks(runs, view_sets, device) -> list[Network]:
    """The Network of each run. runs: Trained. view_sets: {pixels a side: views}."""
    networks = []
    for run in runs:
        calibration = read_calibration(run)
        model = load_model(run).to(device, memory_format=torch.channels_last)
        networks.append(
            Network(
                run, model, view_sets[run.preprocessing.size],
                calibration["temperature"] if calibration else 1.0, calibration is not None,
            )
        )  # fmt: skip
    return networks


def probabilities_of(accelerator, networks, images, keep, bar):
    """(what `keep` returns for every image, in order; {number: reason} of unreadable images).

    networks: their calibrated probabilities are averaged. images: harness.inference.images.Images.
    keep: a function (numbers (k,), probabilities float32 (k, classes) on the CPU) -> a list of k
    objects. They should be small, as each goes to every process. Unreadable images have None.
    """
    names = [Path(name).name for name in images.names]  # folders may lie elsewhere on each machine
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    weights = [network.trained.sha256 for network in networks]
    check_same(accelerator, {"images": [len(names), digest], "weights": weights})
    starts = range(0, len(images), BATCH)
    batches = range(accelerator.process_index, len(starts), accelerator.num_processes)
    preprocessings = list(dict.fromkeys(network.trained.preprocessing for network in networks))
    results, reasons = {}, {}
    with ThreadPoolExecutor(threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) as pool:

        def begin(batch):
            numbers = range(starts[batch], min(starts[batch] + BATCH, len(images)))
            return [(k, pool.submit(decode_one, images, k, preprocessings)) for k in numbers]

        queue = iter(batches)
        ahead = deque(begin(batch) for batch in islice(queue, AHEAD))
        while ahead:
            jobs = ahead.popleft()
            ahead.extend(begin(batch) for batch in islice(queue, 1))
            outcomes = {k: job.result() for k, job in jobs}  # pixels, or why there are none
            reasons |= {k: outcome for k, outcome in outcomes.items() if isinstance(outcome, str)}
            numbers = [k for k, outcome in outcomes.items() if not isinstance(outcome, str)]
            if numbers:
                stacks = {
                    preprocessing: torch.stack([outcomes[k][n] for k in numbers])
                    for n, preprocessing in enumerate(preprocessings)
                }
                index = torch.tensor(numbers)
                mean = forward(accelerator, networks, stacks, index)
                results |= dict(zip(numbers, keep(index, mean), strict=True))
            bar.update(min(len(jobs) * accelerator.num_processes, bar.total - bar.n))
    shares = from_each(accelerator, lambda: (results, reasons))
    results = {k: result for share, _ in shares for k, result in share.items()}
    reasons = {k: reason for _, share in shares for k, reason in share.items()}
    assert len(results) + len(reasons) == len(images), "an image was left out without a word"
    return [results.get(k) for k in range(len(images))], dict(sorted(reasons.items()))


def decode_one(images, k, preprocessings):
    """The pixels of one image for each Preprocessing, or the reason why it can't be read."""
    try:
        file = images.read(k)
        data = file.read() if hasattr(file, "read") else Path(file).read_bytes()
        return [
            evaluation_image(io.BytesIO(data), preprocessing, images.bit_depth)
            for preprocessing in preprocessings
        ]
    except Exception as error:
        return reason_of_image(error)


@torch.inference_mode()
def forward(accelerator, networks, stacks, index):
    """The networks' mean probabilities, float32 (k, classes) on the CPU."""
    total = 0
    for network in networks:
        preprocessing = network.trained.preprocessing
        pixels = stacks[preprocessing].to(accelerator.device)
        logits = []
        for view in network.views:
            inputs = view.apply(pixels, index)
            inputs = normalize_batch(inputs, preprocessing.mean, preprocessing.std)
            with accelerator.autocast():
                logits.append(network.model(inputs).float().cpu())
        merged = logits[0].double()
        if len(logits) > 1:
            weights = [view.weight for view in network.views]
            merged = average_views(torch.stack(logits), weights, check=False).double()
        total = total + (merged / network.temperature).softmax(1)
    return (total / len(networks)).float()


def evaluation_pixels_of(images, preprocessing):
    """(uint8 (n, 3, S, S), what the network sees; the numbers of the images that can be read)."""
    (view,) = tta_views("none", preprocessing.size)
    with ThreadPoolExecutor(threads()) as pool:
        outcomes = pool.map(lambda k: decode_one(images, k, [preprocessing]), range(len(images)))
        pixels = {
            k: decoded[0] for k, decoded in enumerate(outcomes) if not isinstance(decoded, str)
        }
    if not pixels:
        raise UserError("none of the held-out images can be read")
    numbers = list(pixels)
    stack = torch.stack(list(pixels.values()))
    return view.apply(stack, torch.tensor(numbers)).contiguous(), numbers
