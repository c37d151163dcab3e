"""Energy of a run by the machine's own counters: RAPL of the CPUs, NVML of NVIDIA's GPUs.

RAPL: https://www.kernel.org/doc/html/latest/power/powercap/powercap.html (often readable by root
alone). NVML: nvmlDeviceGetTotalEnergyConsumption, https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from harness.processes import from_each

POWERCAP = Path("/sys/class/powercap")
SECONDS = 30  # between two readings of RAPL, whose counters start again after minutes


class EnergyMeter:
    """Joules since it was made, of all processes together.

    before: what `total` said in the checkpoint that the run goes on from; None for a new run. What
    some process can't read, or could not before, is left out.
    """

    def __init__(self, accelerator, before=None, powercap=None):
        self.accelerator = accelerator
        self._before = {"cpu": 0.0, "gpu": 0.0} if before is None else before
        packages = _packages(powercap or POWERCAP) if accelerator.is_local_main_process else None
        self._cpu = PackageCounters(packages) if packages else None
        self._gpu = _gpu_counter(accelerator.device)
        self._gpu_start = self._gpu() if self._gpu else None
        self._keys = list(self._before)  # first all that may be known, then what can be read
        self._keys = list(self.total())

    def _of_process(self):
        """{"cpu": joules, "gpu": joules} of this process; None for what it can't read."""
        cpu = self._cpu.joules() if self._cpu else None
        return {
            "cpu": cpu if self.accelerator.is_local_main_process else 0.0,
            "gpu": self._gpu() - self._gpu_start if self._gpu else None,
        }

    def total(self) -> dict:
        """{"cpu": joules, "gpu": joules} of the run, without what can't be read.

        To be called on all processes.
        """
        if not self._keys:
            return {}
        every = from_each(self.accelerator, self._of_process)
        readable = [key for key in self._keys if all(one[key] is not None for one in every)]
        return {key: self._before[key] + sum(one[key] for one in every) for key in readable}

    def close(self):
        if self._cpu:
            self._cpu.close()


class PackageCounters:
    """RAPL's counters of CPU packages added up; a thread reads them before they start again.

    packages: [(path of energy_uj, microjoules after which it starts again)].
    """

    def __init__(self, packages, seconds=SECONDS):
        self._packages, self._sum, self._lock = packages, 0.0, threading.Lock()
        self._last = [_microjoules(path) for path, _ in packages]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_reading, args=(seconds,), daemon=True)
        self._thread.start()

    def joules(self) -> float | None:
        """Since it was made; None once a counter could not be read."""
        with self._lock:
            now = [_microjoules(path) for path, _ in self._packages]
            if self._sum is None or None in now or None in self._last:
                self._sum = None
                return None
            for (_, most), last, value in zip(self._packages, self._last, now, strict=True):
                self._sum += (value - last if value >= last else value + most - last) / 1e6
            self._last = now
            return self._sum

    def _keep_reading(self, seconds):
        while not self._closed.wait(seconds):
            self.joules()

    def close(self):
        self._closed.set()
        self._thread.join()


def _packages(powercap):
    """The readable counters of whole packages: intel-rapl:0 (AMD's too), not their parts."""
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        most = _microjoules(zone / "max_energy_range_uj")
        if zone.name.count(":") == 1 and most and _microjoules(zone / "energy_uj") is not None:
            found.append((zone / "energy_uj", most))
    return found


def _microjoules(path):
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _gpu_counter(device):
    """A function that gives the joules of this process's GPU since its driver started, or None."""
    if device.type != "cuda":
        return None
    try:
        import pynvml  # nvidia-ml-py, which is optional

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

        def joules():
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000

        joules()
    except Exception:  # no package, no counter (before Volta), no right to read it
        return None
    return joules
