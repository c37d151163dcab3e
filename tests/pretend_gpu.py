"""A GPU that is not there: scripts run on a CPU as they would on one, and what waits is refused.

Tensors that would lie on the GPU carry a mark. What is computed from a marked tensor is marked, and
so is what is made with `device=` that GPU or moved there; each of them says that its device is
`cuda`, so a script takes the paths it takes on a card. All of it is computed on the CPU. A call
that takes tensors from both memories, which fails on a card, fails here.

While `PretendGpu.armed` is true, HostWait is raised wherever the host would wait for the device,
except in the functions of `MAY_WAIT`. What torch does inside its own functions (its optimizers, the
backward pass) is not seen, and fp16 is not pretended, whose gradient scaler reads a number from the
device in every step: tests/test_gpu.py looks at these on a card.

A pretended `mps` refuses what is known to be corrupt or to crash there, armed or not: copies with
non_blocking (https://github.com/pytorch/pytorch/issues/139550), a second thread
(https://github.com/pytorch/pytorch/issues/197805), and float64, which it has not.
"""

import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode

from harness.ensembles.predictions import Predictions
from harness.training import scoring
from harness.training.run import Run

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

# Where the host may wait: not in a step, or once for many.
MAY_WAIT = {
    ("harness/training/run.py", "_log_interval"): "every --logging_steps",
    ("harness/training/run.py", "_end_epoch"): "once an epoch",
    ("harness/training/run.py", "_start_checkpoint"): "a checkpoint",
    ("harness/training/result.py", "current_weights"): "once an epoch, where it is the best so far",
    ("harness/training/checkpoint.py", "start"): "a checkpoint",
    ("harness/training/scoring.py", "_read_sums"): "once an evaluation",
    ("harness/ensembles/predictions.py", "_read_times"): "once a member and split",
    ("harness/ensembles/predictions.py", "_read_logits"): "once a member and split",
    ("harness/training/scoring.py", "_read_logits"): "once a split, for the report or a metric",
    ("finetune.py", "check_frozen"): "once a stage",
    ("tricks/freeze.py", "frozen_digest"): "twice a stage",
}
# And a copy to the host that nothing waits for: it is read under an event, GPU_LAG steps later
DELAYED_COPY = ("harness/training/guard.py", "sync")

READS = {
    "item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__",
    "__complex__", "__contains__", "__repr__", "__format__", "is_nonzero", "equal", "allclose",
}  # fmt: skip
# What has as many elements as the values say
SHAPES = {
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",
    "_unique2", "nonzero_static",
}  # fmt: skip
COPIES = {"tensor", "as_tensor", "asarray", "new_tensor"}  # from the host's memory, at once
INDEXES = {"__getitem__", "__setitem__", "index_put", "index_put_"}
MIXES = {"to", "copy_", "_has_compatible_shallow_copy_type"}  # may have both


class HostWait(AssertionError):
    """The host would wait for the GPU here."""


class PretendGpu(TorchFunctionMode):
    """The mode under which a script runs; see the top of this file. device: what is pretended."""

    def __init__(self, device="cuda"):
        super().__init__()
        self.device = torch.device(device, 0)
        self.armed = False
        self.steps = self.evaluations = 0  # that ran while armed
        self._recorded = 0  # events

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name in ("__get__", "__set__", "__delete__"):
            return self._attribute(func, name, args)
        if func is torch.device or name == "_parse_to":  # (of Module.to): nothing is moved
            return func(*args, **kwargs)
        tensors = list(_tensors((args, kwargs)))
        here = [t for t in tensors if is_marked(t)]
        target = self._target(name, args, kwargs)
        if name == "pin_memory":
            return args[0].clone()
        if kwargs.pop("pin_memory", False):
            return func(*args, **kwargs)
        if here or target == self.device:
            self._check(name, args, kwargs, tensors, here, target)
        args, kwargs = self._on_cpu((args, kwargs))
        result = func(*args, **kwargs)
        marked = target == self.device or (target is None and bool(here))
        if name == "copy_":
            return result
        moved = name in ("to", "cpu", "cuda", "contiguous") and bool(here) != marked
        if moved and any(result is t for t in tensors):  # a copy where there are two memories
            result = result.clone()
        if marked:
            for tensor in _tensors(result):
                tensor.on_pretend_gpu = True
                if self.device.type == "mps" and tensor.dtype == torch.float64:
                    raise AssertionError(f"{name} in float64 on MPS, which has none")
        return result

    def _attribute(self, func, name, args):
        what = func.__self__.__name__
        if name == "__get__" and what in ("device", "is_cuda", "is_cpu") and is_marked(args[0]):
            cuda = self.device.type == "cuda"
            return {"device": self.device, "is_cuda": cuda, "is_cpu": False}[what]
        result = func(*args)
        source = args[1] if name == "__set__" else args[0]
        if isinstance(source, torch.Tensor) and is_marked(source):
            for tensor in _tensors(args[0] if name == "__set__" else result):
                tensor.on_pretend_gpu = True
        return result

    def _check(self, name, args, kwargs, tensors, here, target):
        """Raise HostWait for a call that would wait. here: those of its tensors on the GPU."""
        flags = [word for word in args[1:] if isinstance(word, bool)]
        non_blocking = kwargs.get("non_blocking", bool(flags and flags[0]))
        hosts = [t for t in tensors if not is_marked(t) and t.ndim]
        if self.device.type == "mps" and non_blocking and name in ("to", "copy_"):
            raise AssertionError(f"{name} with non_blocking on MPS")
        if name in READS | SHAPES and here:
            self.wait(name)
        elif name == "where" and len(args) == 1 and here:
            self.wait("where of one argument")
        elif name == "repeat_interleave" and "output_size" not in kwargs:
            self.wait(name)
        elif name in COPIES and (target == self.device or (here and target is None)):
            self.wait(f"{name} onto the device")
        elif name in INDEXES and here:
            index = list(_tensors(args[1]))
            if any(t.dtype in (torch.bool, torch.uint8) and t.ndim for t in index):
                self.wait("a boolean index")
            elif hosts:
                self.wait("an index, or values, in the host's memory")
        elif name == "to" and target == self.device and not here and not non_blocking:
            self.wait("to without non_blocking")
        elif name == "to" and target == CPU and here:
            self.wait("to the host", delayed=non_blocking)
        elif name == "copy_" and is_marked(args[0]) != is_marked(args[1]) and not non_blocking:
            self.wait("copy_ without non_blocking")
        elif here and hosts and target is None and name not in MIXES | COPIES:
            names = ", ".join(str(tuple(t.shape)) for t in hosts)
            raise AssertionError(f"{name} of tensors on the GPU and in the host's memory: {names}")

    def wait(self, what, delayed=False):
        """The host waits: HostWait, unless whoever calls may. delayed: for an event only."""
        place = _caller()
        may = place in MAY_WAIT or (delayed and place == DELAYED_COPY)
        if self.armed and not may and self.device.type == "cuda":  # elsewhere it may wait
            raise HostWait(f"{what}, in {place[1]} ({place[0]})")

    def synchronize(self, device=None):
        """In the place of torch.cuda.synchronize."""
        self.wait("synchronize")

    def event(self, **options):
        """In the place of torch.cuda.Event."""
        return _Event(self)

    def pool(self, max_workers):
        """In the place of ThreadPoolExecutor, as a mode is a thread's own."""
        if self.device.type == "mps":
            raise AssertionError("a second thread issues work on MPS")
        return ThreadPoolExecutor(max_workers, initializer=self.__enter__)

    def _device(self, value):
        """The device that a value names, without the number of a CPU, or None."""
        if isinstance(value, torch.Tensor):
            return self.device if is_marked(value) else CPU
        if isinstance(value, str):
            try:
                value = torch.device(value)
            except RuntimeError:  # it is another word
                return None
        if isinstance(value, torch.device):
            return self.device if value.type == self.device.type else torch.device(value.type)
        return None

    def _target(self, name, args, kwargs):
        """Where the result is asked to be; None for where the arguments are."""
        if kwargs.get("device") is not None:
            return self._device(kwargs["device"])
        if name in ("cpu", "cuda"):
            return self.device if name == "cuda" else CPU
        if name in ("to", "type_as") and len(args) > 1:
            return self._device(args[1])
        return None

    def _on_cpu(self, value):
        """The same arguments with the CPU in the place of the GPU."""
        if isinstance(value, (torch.device, str)) and self._device(value) == self.device:
            return CPU
        if isinstance(value, dict):
            return {key: self._on_cpu(one) for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._on_cpu(one) for one in value)
        return value


class _Event:
    """An event that the device has passed once two more were recorded after it."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu._recorded += 1
        self.number = self.gpu._recorded

    def synchronize(self):
        if self.gpu._recorded - self.number < 2:
            frame = sys._getframe(3)  # who reads the checks
            if frame.f_code.co_name == "sync_step":
                self.gpu.wait("the event of a step that is under way")

    def elapsed_time(self, other):
        return float(other.number - self.number)


def is_marked(tensor):
    return getattr(tensor, "on_pretend_gpu", False)


@contextlib.contextmanager
def pretended(monkeypatch, device="cuda"):
    """A PretendGpu that the scripts, run in this process, take for theirs.

    It is armed from the second step of a run on (the first may allocate, and draws a picture), and
    in every evaluation.
    """
    gpu = PretendGpu(device)
    precision = torch.get_float32_matmul_precision()
    benchmark = torch.backends.cudnn.benchmark
    by_device = torch._C._group_tensors_by_device_and_dtype

    def grouped(tensors, *rest):
        on_gpu = any(is_marked(t) for group in tensors for t in group if t is not None)
        found = by_device(tensors, *rest)
        return {(gpu.device, key[1]): v for key, v in found.items()} if on_gpu else found

    monkeypatch.setattr(Accelerator, "device", property(lambda self: gpu.device))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a pretended GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    pretend_streams(monkeypatch)
    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
    monkeypatch.setattr("harness.data.batches.ThreadPoolExecutor", gpu.pool)
    monkeypatch.setattr(scoring, "evaluate", _armed(gpu, scoring.evaluate))
    monkeypatch.setattr(Predictions, "_forward", _armed(gpu, Predictions._forward))
    monkeypatch.setattr(Run, "steps", _armed_steps(gpu, Run.steps))
    try:
        with gpu:
            yield gpu
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark


def pretend_streams(monkeypatch):
    """CUDA's streams where there are none: one after the other."""
    stream = SimpleNamespace(record_event=lambda: None, wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


def _armed(gpu, evaluate):
    def armed(*args, **options):
        before, gpu.armed = gpu.armed, True
        try:
            return evaluate(*args, **options)
        finally:
            gpu.armed = before
            gpu.evaluations += 1

    return armed


def _armed_steps(gpu, steps):
    def armed(run, *args, **options):
        first = run.step
        try:
            for step, batch in steps(run, *args, **options):
                gpu.armed = step > first
                gpu.steps += gpu.armed
                yield step, batch  # and what Run does after it
        finally:
            gpu.armed = False

    return armed


def _tensors(value):
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _caller():
    """(file, function) of this project, or of a test, that called into torch."""
    frame = sys._getframe(1)
    while frame:
        file = Path(frame.f_code.co_filename)
        own = file == Path(__file__) or frame.f_code.co_name.startswith("<")  # a comprehension
        if not own and file.is_relative_to(ROOT) and ".venv" not in file.parts:
            return file.relative_to(ROOT).as_posix(), frame.f_code.co_name
        frame = frame.f_back
    return "?", threading.current_thread().name
