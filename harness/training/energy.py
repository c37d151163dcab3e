"""Energy of a run by the machine's own counters: RAPL of the CPUs, NVML of NVIDIA's GPUs.

RAPL: https://www.kernel.org/doc/html/latest/power/powercap/powercap.html (often readable only
by root). NVML: nvmlDeviceGetTotalEnergyConsumption, https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from harness.processes import from_each

POWERCAP = Path("/sys/class/powercap")
SECONDS = 30  # between two readings of RAPL, whose counters wrap around within minutes


class EnergyMeter:
    """Joules since it was made, of all processes together.

    earlier_total: what `total` returned in the checkpoint that the run continues; None for a new
    run. A counter that some process can't read, or could not read earlier, is left out.
    """

    def __init__(self, accelerator, earlier_total=None, powercap=None):
        self.accelerator = accelerator
        zero = {"cpu": 0.0, "gpu": 0.0}
        self._earlier_total = zero if earlier_total is None else earlier_total
        packages = _packages(powercap or POWERCAP) if accelerator.is_local_main_process else None
        self._cpu = PackageCounters(packages) if packages else None
        self._gpu = _gpu_counter(accelerator.device)
        self._gpu_start = self._gpu() if self._gpu else None
        self._keys = list(self._earlier_total)
        self._keys = list(self.total())  # those that can be read

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
        readings = from_each(self.accelerator, self._of_process)
        keys = [key for key in self._keys if all(r[key] is not None for r in readings)]
        return {key: self._earlier_total[key] + sum(r[key] for r in readings) for key in keys}

    def close(self):
        if self._cpu:
            self._cpu.close()


class PackageCounters:
    """The sum of RAPL's counters of CPU packages; a thread reads them before they wrap around.

    packages: [(path of energy_uj, microjoules at which it starts again at zero)].
    """

    def __init__(self, packages, seconds=SECONDS):
        self._packages, self._sum, self._lock = packages, 0.0, threading.Lock()
        self._previous = [_microjoules(path) for path, _ in packages]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_reading, args=(seconds,), daemon=True)
        self._thread.start()

    def joules(self) -> float | None:
        """Joules since this was made; None after a counter could not be read."""
        with self._lock:
            values = [_microjoules(path) for path, _ in self._packages]
            if self._sum is None or None in values or None in self._previous:
                self._sum = None
                return None
            counters = zip(self._packages, self._previous, values, strict=True)
            for (_, limit), start, value in counters:
                self._sum += (value - start if value >= start else value + limit - start) / 1e6
            self._previous = values
            return self._sum

    def _keep_reading(self, seconds):
        while not self._closed.wait(seconds):
            self.joules()

    def close(self):
        self._closed.set()
        self._thread.join()


def _packages(powercap):
    """The readable counters of whole packages: intel-rapl:0 (AMD's too), not of their parts."""
    packages = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        limit = _microjoules(zone / "max_energy_range_uj")
        if zone.name.count(":") == 1 and limit and _microjoules(zone / "energy_uj") is not None:
            packages.append((zone / "energy_uj", limit))
    return packages


def _microjoules(path):
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _gpu_counter(device):
    """A function: () -> joules of this process's GPU since its driver started; or None."""
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
