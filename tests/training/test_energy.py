"""Energy of a run: counters that start again, GPUs, what can't be read, and resuming."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import smallruns
from harness.training import energy
from harness.training.energy import EnergyMeter, PackageCounters

ACCELERATOR = SimpleNamespace(
    num_processes=1, is_local_main_process=True, device=torch.device("cpu")
)


@pytest.fixture
def powercap(tmp_path):
    """Two packages, the part of one, and a zone that nobody may read."""
    for zone in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl:2"):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "max_energy_range_uj").write_text("1000000000\n")
        if zone != "intel-rapl:2":
            (tmp_path / zone / "energy_uj").write_text("5000000\n")
    return tmp_path


def put(powercap, package, joules):
    """At once, as the kernel does: a reader never meets an empty file."""
    file = powercap / f"intel-rapl:{package}" / "energy_uj"
    file.with_name("next").write_text(f"{int(joules * 1e6)}\n")
    file.with_name("next").replace(file)


def test_packages_are_added_up_and_may_start_again(powercap):
    meter = EnergyMeter(ACCELERATOR, powercap=powercap)
    assert meter.total() == {"cpu": 0}
    put(powercap, 0, 25)
    put(powercap, 1, 905)
    put(powercap, "0:0", 500)
    assert meter.total()["cpu"] == pytest.approx(20 + 900)
    put(powercap, 1, 5)  # after 1000
    assert meter.total()["cpu"] == pytest.approx(20 + 1000)
    meter.close()


def test_a_thread_reads_before_a_counter_has_gone_round(powercap):
    counters = PackageCounters([(powercap / "intel-rapl:0/energy_uj", 10**9)], seconds=0.01)
    expected = 0
    for joules, more in ((600, 595), (200, 600), (800, 600), (400, 600)):
        put(powercap, 0, joules)
        expected += more
        until = time.monotonic() + 60
        while counters._sum != pytest.approx(expected) and time.monotonic() < until:
            time.sleep(0.01)
    counters.close()
    assert counters.joules() == pytest.approx(expected)


def test_resumed_it_goes_on_and_what_was_not_known_stays_out(powercap):
    meter = EnergyMeter(ACCELERATOR, {"cpu": 100.0}, powercap)
    put(powercap, 0, 6)
    assert meter.total()["cpu"] == pytest.approx(101)
    assert EnergyMeter(ACCELERATOR, {}, powercap).total() == {}
    (powercap / "intel-rapl:1/energy_uj").unlink()  # in the middle
    assert meter.total() == {}


def test_without_counters_nothing_is_said(tmp_path):
    assert EnergyMeter(ACCELERATOR, powercap=tmp_path).total() == {}


def test_a_gpu_is_asked_for_by_its_identity(tmp_path, monkeypatch):
    millijoules = iter([7_000, 7_000, 7_000, 9_500])
    asked = []
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: next(millijoules),
    ))  # fmt: skip
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2-3")
    )
    accelerator = SimpleNamespace(**vars(ACCELERATOR) | {"device": torch.device("cuda:1")})
    meter = EnergyMeter(accelerator, powercap=tmp_path)
    assert meter.total() == {"gpu": 2.5} and asked == ["GPU-1-2-3"]


def test_a_runs_summary_and_card_have_it_over_a_stop(powercap, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", powercap)
    flags = smallruns.MEMBER | {"run_name": "measured", "checkpointing_steps": 2}
    put(powercap, 0, 10)

    smallruns.train(tmp_path, **flags, stop_after=2)
    put(powercap, 0, 50)
    folder, _ = smallruns.train(tmp_path, **flags, resume_from_checkpoint="auto")
    found = json.loads((folder / "summary.json").read_text())["energy"]
    assert found == {"cpu": 0.0}  # what others used while it was stopped is not its own
    assert "Energy of training" in (folder / "README.md").read_text()
