"""accelerate_configs/: each loads, tells how to launch it, and says only where the work runs."""

import itertools
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*"))

# Where the work runs and in which numbers. What is trained, batch sizes and accumulation included,
# is the scripts' flags' to say.
ALLOWED = {
    "compute_environment", "distributed_type", "use_cpu", "gpu_ids",
    "num_processes", "num_machines", "machine_rank", "same_network",
    "main_process_ip", "main_process_port", "rdzv_backend",
    "mixed_precision", "dynamo_config",
}  # fmt: skip


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_there_are_configs():
    names = {path.name for path in CONFIGS}
    assert {"cpu.yaml", "cpu_2proc.yaml", "single_gpu.yaml", "multi_gpu.yaml"} <= names
    assert {path.suffix for path in CONFIGS} == {".yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_loads_it_as_it_is_written(path):
    loaded, written = load_config_from_file(str(path)), read(path)
    assert loaded.num_processes == written["num_processes"]
    assert loaded.mixed_precision == written.get("mixed_precision")
    assert loaded.distributed_type == written["distributed_type"]
    assert loaded.use_cpu is written["use_cpu"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_comment_says_how_to_launch_it(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    launches = [line for line in comment if "accelerate launch" in line]
    assert launches
    for line in launches:
        assert f"--config_file accelerate_configs/{path.name}" in line
        assert line.endswith("train.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_holds_topology_and_precision_only(path):
    config = read(path)
    assert not config.keys() - ALLOWED
    assert config.get("mixed_precision") in (None, "bf16", "fp16")
    assert config["distributed_type"] in ("NO", "MULTI_GPU")  # YAML's bare NO would be false
    assert (config["distributed_type"] == "MULTI_GPU") == (config["num_processes"] > 1)
    assert config["num_processes"] % config["num_machines"] == 0


def test_the_cpu_ones_are_those_that_use_the_cpu():
    on_cpu = {path.stem for path in CONFIGS if read(path)["use_cpu"]}
    assert on_cpu == {path.stem for path in CONFIGS if path.stem.startswith("cpu")} != set()
    for name in on_cpu:  # left to the script: bf16 where the CPU has it
        assert "mixed_precision" not in read(ROOT / f"accelerate_configs/{name}.yaml")
