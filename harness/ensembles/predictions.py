"""Logits of trained networks: one forward pass a network and view, stored for the next time.

They are in `predictions/` in the folder of the run, one file a split and view. A file's name holds
a hash of all that decides the logits: the weights, the images and their order, how they are
prepared, the view, the precision. The files may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from harness.data.stores import decode
from harness.errors import UserError
from harness.files import replace_file, to_bytes
from harness.processes import check_same, from_main
from harness.training.scoring import batch_starts
from tricks.augment import normalize_batch
from tricks.tta import average_views

FORMAT = 1  # part of the hash: raise it whenever the same network would give other logits


class Predictions:
    """The logits of networks for some splits, read from files or computed.

    splits: {role: harness.data.sources.Split}. seed: of random views. device: its name, in words.
    say: a function that prints a line. verify_cache: see harness.data.cache.decode_split.
    """

    def __init__(
        self, accelerator, splits, image_column, seed, device, say, verify_cache=False
    ):  # fmt: skip
        self.accelerator, self.splits, self.verify_cache = accelerator, splits, verify_cache
        self.image_column, self.seed, self.device, self.say = image_column, seed, device, say
        check_same(
            accelerator, {f"{role} images": _rows_digest(split) for role, split in splits.items()}
        )
        self._orders = {role: _order_digest(split, image_column) for role, split in splits.items()}
        self._samples = {}  # (role, size, interpolation) -> harness.data.stores.Samples
        self._logits = {}  # (sha256 of the weights, role, name of the view) -> (n, classes)
        self._costs = {}  # the same -> (seconds an image, on which device)
        self._unkept = set()

    def recall(self, network, views, roles=None) -> list:
        """Read the files of a models.trained.Trained; returns the (role, View) pairs without one.

        roles: None for all. The main process reads the files and sends them to the others.
        """
        views = {view.name: view for view in views}.values()  # sets may share views
        pairs = [
            (role, view)
            for role in roles or self.splits
            for view in views
            if (network.sha256, role, view.name) not in self._logits
        ]
        check_same(self.accelerator, {f"weights of {network.name}": network.sha256})
        entries = from_main(
            self.accelerator, lambda: [self._read(network, *pair) for pair in pairs]
        )
        for (role, view), entry in zip(pairs, entries, strict=True):
            if entry:
                self._keep(network, role, view, *entry)
        return [pair for pair, entry in zip(pairs, entries, strict=True) if not entry]

    def count(self, pairs) -> int:
        """Images × views of the pairs that `recall` returned."""
        return sum(len(self.splits[role]) for role, _ in pairs)

    def compute(self, network, model, pairs, bar):
        """Forward passes for the pairs that `recall` returned, and their files.

        model: the network's, in eval mode on the device. bar: from `progress`. Raises UserError
        for logits that are not finite.
        """
        for role in self.splits:
            views = [view for view_role, view in pairs if view_role == role]
            if not views:
                continue
            samples = self.samples(role, network.preprocessing)
            bar.set_description(f"{network.name}, {role}, {len(views)} views")
            logits, times = self._forward(network, model, samples, views, bar)
            for view, view_logits, seconds in zip(views, logits, times, strict=True):
                bad_images = int((~view_logits.isfinite()).any(1).sum())
                if bad_images:
                    raise UserError(
                        f"{network.folder} gives logits that are not finite for {bad_images} of "
                        f"{len(view_logits)} {role} images: its weights are damaged, or the "
                        f"precision ({self.accelerator.mixed_precision}) is too low"
                    )
                self._keep(network, role, view, view_logits, seconds, self.device)
                if self.accelerator.is_main_process:
                    self._write(network, role, view, view_logits, seconds)

    def logits(self, network, role, views):
        """Float64 (n, classes); for several views, the logarithm of the mean probabilities."""
        view_logits = [self._logits[network.sha256, role, view.name] for view in views]
        if len(view_logits) == 1:
            return view_logits[0].double()
        return average_views(torch.stack(view_logits), [view.weight for view in views])

    def speeds(self, networks, sets) -> dict:
        """{kind: {name: images/s}} for all views of a kind, of each network and of the "average".

        Measured when the passes were made. sets: {kind: {size: views}}.
        """
        speeds = {}
        for kind, views in sets.items():
            seconds = {
                network.name: sum(
                    self._costs[network.sha256, "scored", view.name][0]
                    for view in views[network.preprocessing.size]
                )
                for network in networks
            }
            seconds["average"] = sum(seconds.values())
            speeds[kind] = {name: 1 / duration for name, duration in seconds.items()}
        return speeds

    def devices(self) -> str:
        """The devices on which the forward passes for the scored images ran."""
        return " and ".join(sorted({device for _, device in self._costs.values()}))

    def samples(self, role, preprocessing):
        """The decoded images of a split, prepared for a network up to the crop."""
        key = (
            role,
            preprocessing.stored_size,
            preprocessing.interpolation,
            preprocessing.packed_side,
        )
        if preprocessing.packed_side:  # then only the pixels inside the crop are stored
            key += (preprocessing.size,)
        if key not in self._samples:
            self._samples[key] = decode(
                self.splits[role],
                self.image_column,
                preprocessing,
                self.accelerator,
                verify=self.verify_cache,
            )
        return self._samples[key]

    @torch.inference_mode()
    def _forward(self, network, model, samples, views, bar):
        """Logits (views, n, classes), float32 on the CPU, and seconds an image for each view.

        The batches are fixed and dealt to the processes. The first one is a warm-up: it is timed
        only if there is no other.
        """
        accelerator, total = self.accelerator, len(samples.labels)
        times = []  # of each batch: how many images, and when each view started and ended
        starts, preprocessing = batch_starts(samples), network.preprocessing
        shape = (len(views), total, len(network.classes))
        logits = torch.zeros(shape, device=accelerator.device)
        for k in range(accelerator.process_index, len(starts), accelerator.num_processes):
            index = torch.arange(starts[k], min(starts[k] + starts.step, total))
            images, _ = samples.take(index, accelerator.device)
            times.append((len(index), []))
            for number, view in enumerate(views):
                start = _timestamp(accelerator.device)
                inputs = normalize_batch(
                    view.apply(images, index), preprocessing.mean, preprocessing.std
                )
                with accelerator.autocast():
                    output = model(inputs)
                logits[number, starts[k] : starts[k] + len(index)] = output.float()
                times[-1][1].append((start, _timestamp(accelerator.device)))
            count = len(index) * len(views) * accelerator.num_processes
            bar.update(min(count, bar.total - bar.n))
        seconds = _read_times(times, accelerator.device)
        timings = seconds[1:] or seconds or [[0.0] * len(views)]  # a process may have had no batch
        means = [
            sum(column) / len(timings) / accelerator.num_processes
            for column in zip(*timings, strict=True)
        ]
        return _read_logits(accelerator, logits), means

    def _keep(self, network, role, view, logits, seconds, device):
        self._logits[network.sha256, role, view.name] = logits
        self._costs[network.sha256, role, view.name] = (seconds, device)

    # ---------------------------------------------------------------- files

    def _key(self, network, role, view):
        return {
            "format": FORMAT,
            "weights": network.sha256,
            "images": self._orders[role],
            "look": network.preprocessing.as_list(),
            "view": view.name,
            "seed": self.seed if view.name.startswith("random") else None,
            "precision": self.accelerator.mixed_precision,
        }

    def _file(self, network, role, view):
        digest = hashlib.sha256(json.dumps(self._key(network, role, view)).encode()).hexdigest()
        name = re.sub(r"\W+", "-", f"{role} {view.name}")
        return network.folder / "predictions" / f"{name}-{digest[:16]}.safetensors"

    def _read(self, network, role, view):
        """(logits, seconds an image, device) from an undamaged file with this key; else None."""
        try:
            with safe_open(self._file(network, role, view), framework="pt") as file:
                about = json.loads(file.metadata()["predictions"])
                logits = file.get_tensor("logits")
            shape = (len(self.splits[role]), len(network.classes))
            matches = about["key"] == self._key(network, role, view) and logits.shape == shape
            if matches and about["sha256"] == _digest(logits):
                return logits, float(about["seconds"]), str(about["device"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            pass  # no such file, or a damaged one: the logits are computed again
        return None

    def _write(self, network, role, view, logits, seconds):
        about = {
            "key": self._key(network, role, view), "sha256": _digest(logits), "seconds": seconds,
            "device": self.device,
        }  # fmt: skip
        file = self._file(network, role, view)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, to_bytes({"logits": logits}, {"predictions": json.dumps(about)}))
        except OSError as error:
            if network.folder not in self._unkept:
                self.say(f"predictions of {network.name} are not kept: {error.strerror or error}")
            self._unkept.add(network.folder)


def _read_logits(accelerator, logits):
    """Those of all processes, on the CPU: the only wait for the device, but for `_read_times`.

    Each sample's are zero on all processes but one, so the sum is exact.
    """
    return accelerator.reduce(logits, "sum").cpu()


def _timestamp(device):
    """The time: an event on a CUDA device, without waiting for it, else the host's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _read_times(times, device):
    """Seconds an image of each batch, one a view; waits for the device, once for all."""
    if device.type != "cuda":
        return [[(end - start) / n for start, end in views] for n, views in times]
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) / 1000 / n for start, end in views] for n, views in times]


def progress(accelerator, images):
    """A bar over images × views, on one process of each machine."""
    return tqdm(
        total=images, unit=" images", unit_scale=True, delay=1, leave=False, dynamic_ncols=True,
        disable=not (accelerator.is_local_main_process and sys.stderr.isatty()),
    )  # fmt: skip


def _order_digest(split, column):
    """A hash of the images and their order: the data set, the column, the rows and the labels."""
    digest = hashlib.sha256(f"{split.dataset._fingerprint} {column}".encode())
    digest.update(split.rows.tobytes() + split.labels.tobytes())
    return digest.hexdigest()


def _rows_digest(split):
    """The same wherever the data set lies: the number of images, and a hash of rows and labels."""
    return [len(split), hashlib.sha256(split.rows.tobytes() + split.labels.tobytes()).hexdigest()]


def _digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
