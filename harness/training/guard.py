"""The guard of a step: processes agree, non-finite numbers do no harm, signals are heeded.

Between the backward pass and the optimizer's update, `StepGuard.sync` averages loss, accuracy and
BatchNorm's statistics over the processes, and checks that they and the gradients are finite. Where
they are not, the update is withheld on every process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from harness.errors import UserError
from harness.training import state
from harness.training.optimizers import withholds_on_device

# On a GPU the check of step t is read while step t + 2 is queued, so that the host never waits for
# the device; the update itself was already withheld there (see `StepGuard.sync`).
GPU_LAG = 2

# Each signal as a number, such that the sum over the processes still tells which were received.
# GONE is not a signal but says that the run's folder was removed.
GONE = "gone"
STOP = {signal.SIGINT: 1.0, signal.SIGTERM: 1e6, GONE: 2.0**40}
# Batch systems send these before they kill, and an ssh connection when it closes
AS_SIGTERM = [
    getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGXCPU") if hasattr(signal, name)
]
STOP |= dict.fromkeys(AS_SIGTERM, STOP[signal.SIGTERM])


class Signals:
    """The first signal that this process received since `listen`: the run ends after the step."""

    def __init__(self):
        self.received = None  # a signal's number, or GONE
        self._handlers = {}

    def listen(self):
        self._handlers = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGINT, *AS_SIGTERM)
            if signal.getsignal(number) is not signal.SIG_IGN  # set by nohup
        }

    def number(self) -> float:
        """The number in STOP of the signal received, or 0.0."""
        return STOP.get(self.received, 0.0)

    def restore(self):
        """Restore the handlers that the signals had before `listen`."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.received is None:
            self.received, self._time = number, time.monotonic()
            line = f"{signal.Signals(number).name}: a checkpoint after this step, then the end\n"
            with contextlib.suppress(OSError):  # print is not safe in a signal handler
                os.write(1, line.encode())
        elif number == signal.SIGINT and time.monotonic() - self._time > 10:
            raise KeyboardInterrupt  # a launcher repeats a signal at once, a person later


class Check(NamedTuple):
    """What the processes agreed on in one step."""

    step: int  # counted from 0
    loss: float
    grad_norm: float
    stop: float  # the sum of the numbers in STOP of the signals to all processes
    finite: bool


class StepGuard:
    """What stands between the backward pass and the update.

    module: unwrapped; optimizer: torch's; ema: a ModelEma or None. skip: whether a non-finite step
    is undone, so that training can go on. accumulation: microbatches of a step on each process.

    interval, epoch: float32 (4,) on the device, sums of `state.SUMS` over the steps since they
    were last zeroed, and the number of those steps.
    """

    def __init__(self, accelerator, module, optimizer, ema, skip, accumulation):
        self.accelerator, self.module, self.optimizer = accelerator, module, optimizer
        self.ema, self.skip, self.accumulation = ema, skip, accumulation
        sums = torch.zeros(len(state.SUMS) + 1, device=accelerator.device)
        self.interval, self.epoch = sums, sums.clone()
        self._step_means = sums.new_zeros(2)  # loss and accuracy of the step under way
        self._unread = deque()
        self._buffers = [buffer for buffer in module.buffers() if buffer.numel()]
        self._norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        self._statistics = [
            b for m in self._norms for b in (m.running_mean, m.running_var) if b is not None
        ]

    def begin_step(self):
        if self.skip:
            self._buffers_before = state.copy_by_kind(self._buffers)

    def end_step(self):
        """To be called after the update of the weights and of their averages."""
        if self.skip and self.ema and self._nonfinite is not None:
            state.put_back(self.ema.tensors().values(), self._averages_before, self._nonfinite)

    def count(self, loss, mixed_acc):
        """Add one microbatch: its mean loss and mean accuracy, tensors on the device."""
        means = torch.stack([loss.detach().float(), mixed_acc.detach().float()])
        self._step_means += means / self.accumulation

    def sync(self, step, grad_norm, stop):
        """Agree with the other processes on one step; `checks` yields the outcome.

        Loss, accuracy and BatchNorm's running statistics are averaged over the processes. A
        non-finite loss or gradient anywhere withholds the update on every process. stop: a number
        in STOP or 0.0; its sum over the processes is a signal to all.
        """
        # new_full writes on the device; new_tensor would copy from the host, and wait for the copy
        stop = self._step_means.new_full((1,), stop)
        vector = torch.cat([self._step_means, grad_norm.detach().float().reshape(1), stop])
        self._step_means = torch.zeros_like(self._step_means)
        if self.accelerator.num_processes > 1:
            vector = self._average_over_processes(vector)
        scaler = self.accelerator.scaler
        finite = torch.isfinite(vector[:1] if scaler else vector[:-1]).all()
        if self._statistics:  # an activation that overflows may leave the loss finite
            norms = torch._foreach_norm(self._statistics)
            finite = finite & torch.isfinite(torch.stack(norms)).all()
        # fp16 gradients overflow now and then; the scaler skips those updates
        counted = vector[:-1].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * finite
        for sums in (self.interval, self.epoch):
            sums[:-1] += counted
            sums[-1] += finite
        on_device = withholds_on_device(self.optimizer, vector.device) and not scaler
        if on_device:  # the optimizer leaves out the update where this is 1, without a host sync
            self.optimizer.found_inf = (~finite).float()
        if self.skip:
            self._withhold(~finite, on_device)
        host = torch.cat([vector, finite.float().reshape(1)])
        event = None
        if host.device.type == "cuda":
            host = host.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._unread.append((step, host, event))
        self.lag = GPU_LAG if event and (on_device or scaler) else 0

    def checks(self, lag):
        """Yield a Check of every step since the last call, but not of the latest `lag` steps."""
        while len(self._unread) > lag:
            step, host, event = self._unread.popleft()
            if event:
                event.synchronize()
            loss, _, norm, stop, finite = host.tolist()
            yield Check(step, loss, norm, stop, bool(finite))

    def check_gradients(self):
        """Raise UserError, with several processes, for trained parameters without a gradient."""
        if self.accelerator.num_processes == 1:
            return
        parameters = self.module.named_parameters()
        unused = [name for name, p in parameters if p.requires_grad and p.grad is None]
        if unused:
            raise UserError(
                f"{len(unused)} parameters take no part in the loss ({', '.join(unused[:3])}): "
                "data-parallel training would wait for their gradients; use one process"
            )

    def _withhold(self, nonfinite, on_device):
        """Undo a step that is not finite. nonfinite: a 0-d boolean on the device.

        BatchNorm's running statistics, and all other buffers that the forward pass changes, are
        put back at once; the averaged weights in `end_step`, when the script has updated them.
        """
        # A fused SGD whose first update is withheld would leave its momentum uninitialised
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        has_state = all(self.optimizer.state.get(p) for p in parameters if p.grad is not None)
        on_host = not (on_device and has_state)
        self._nonfinite = None if on_host and not nonfinite else nonfinite
        if self._nonfinite is None:
            return
        state.put_back(self._buffers, self._buffers_before, nonfinite)
        if self.ema:
            self._averages_before = state.copy_by_kind(self.ema.tensors().values())
        if on_host:
            self.optimizer.zero_grad()  # an optimizer skips parameters without a gradient

    def _average_over_processes(self, vector):
        """The mean of `vector` over the processes; of its last number, the stop signal, the sum."""
        moving = [m for m in self._norms if m.training]  # frozen ones must not change by a bit
        buffers = [b for m in moving for b in (m.running_mean, m.running_var) if b is not None]
        flat = torch.cat([vector, *(b.float().flatten() for b in buffers)])
        torch.distributed.all_reduce(flat)
        stop = flat[len(vector) - 1].clone()
        flat /= self.accelerator.num_processes
        state.write_back(buffers, flat[len(vector) :])
        return torch.cat([flat[: len(vector) - 1], stop.reshape(1)])
