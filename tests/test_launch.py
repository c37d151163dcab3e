"""Launching: real starts through `accelerate launch`, and the traps that are turned into a line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

from harness import launch
from harness.errors import RunStopped, UserError
from harness.launch import make_accelerator, script

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "accelerate_configs"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

PROBE = """
import json, os
import torch
from harness.launch import make_accelerator, script
with script("probe.py"):
    accelerator, words = make_accelerator()
    rank = torch.tensor([accelerator.process_index + 1.0])
    seen = {
        "sum": accelerator.reduce(rank, "sum").item(),
        "device": accelerator.device.type,
        "torch_threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "words": words,
    }
    # One write, so that the lines of two processes don't mix
    os.write(1, (json.dumps(seen) + "\\n").encode())
"""


# What a launcher exports to the first of two processes
TWO = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}


@pytest.fixture
def environment(tmp_path):
    """What a user's shell exports: nothing of a launcher, no accelerate config, no GPU."""
    launcher = ("ACCELERATE_", "OMP_", "MKL_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
    return {**clean, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


@pytest.fixture
def start(environment, tmp_path):
    """Run the probe by `accelerate launch` with these words, to its end."""
    (tmp_path / "probe.py").write_text(PROBE)

    def run(*words):
        launcher = Path(sys.executable).with_name("accelerate")
        command = [str(word) for word in (launcher, "launch", *words, tmp_path / "probe.py")]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
        )

    return run


@pytest.fixture
def probe(start):
    """What each process of such a start saw."""

    def run(*words):
        ended = start(*words)
        assert ended.returncode == 0 and ended.stdout, ended.stderr
        return [json.loads(line) for line in ended.stdout.splitlines()]

    return run


@pytest.fixture
def refused(start):
    """The line with which such a start is refused; no process may have gone on."""

    def run(*words):
        ended = start(*words)
        assert ended.returncode != 0 and ended.stdout == "", ended.stderr
        (line,) = [x for x in ended.stderr.splitlines() if x.startswith("probe.py: ")]
        # The one traceback is the launcher's own.
        assert ended.stderr.count("Traceback") == 1 and "exit status 2" in ended.stderr
        return line

    return run


# --- real starts ---


@pytest.mark.slow
def test_a_plain_launch_uses_every_core_and_the_precision_of_the_device(probe):
    (seen,) = probe()
    assert seen["torch_threads"] == seen["words"]["threads"] == CORES
    assert (seen["device"], seen["words"]["processes"]) == ("cpu", 1)
    assert seen["mixed_precision"] == ("bf16" if launch.computes_bf16(True) else "no")
    assert "auto: " in seen["words"]["precision"]


@pytest.mark.slow
def test_the_launchers_no_is_honoured(probe):
    """On the one process of cpu.yaml, so that this file is started with every day, too."""
    (seen,) = probe("--config_file", CONFIGS / "cpu.yaml", "--mixed_precision", "no")
    assert (seen["mixed_precision"], seen["words"]["precision"]) == ("no", "no (the launcher)")
    assert (seen["device"], seen["sum"], seen["words"]["processes"]) == ("cpu", 1, 1)


@pytest.mark.sweep
def test_the_launchers_no_is_honoured_without_a_file(probe):
    (seen,) = probe("--mixed_precision", "no")
    assert (seen["mixed_precision"], seen["words"]["precision"]) == ("no", "no (the launcher)")


@pytest.mark.sweep
def test_cpu_yaml_is_one_process(probe):
    (seen,) = probe("--config_file", CONFIGS / "cpu.yaml")
    assert (seen["device"], seen["sum"], seen["words"]["processes"]) == ("cpu", 1, 1)
    assert "auto: " in seen["words"]["precision"]


@pytest.mark.slow
def test_cpu_2proc_yaml_is_two_connected_processes(probe):
    seen = probe("--config_file", CONFIGS / "cpu_2proc.yaml", "--main_process_port", "0")
    assert len(seen) == 2
    for one in seen:
        assert (one["device"], one["sum"], one["words"]["processes"]) == ("cpu", 1 + 2, 2)
        assert one["torch_threads"] == max(1, CORES // 2)
        assert one["words"]["device"] == "CPU × 2 processes"


@pytest.mark.slow
def test_cpu_with_two_processes_is_refused(refused):
    line = refused("--cpu", "--num_processes", "2")
    assert "started one" in line and "accelerate_configs/cpu_2proc.yaml" in line


@pytest.mark.sweep
def test_multi_cpu_is_refused(refused, tmp_path):
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU",
              "num_processes": 2, "num_machines": 1, "use_cpu": True}  # fmt: skip
    (tmp_path / "multi_cpu.yaml").write_text(json.dumps(config))  # JSON is YAML
    assert "MULTI_CPU" in refused("--config_file", tmp_path / "multi_cpu.yaml")


# --- the same in this process, with an Accelerator that only notes what it was asked for ---


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """make_accelerator's words, as if started by this command line with these variables."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(launch, "_follow_launcher", lambda: None)  # pytest has another parent
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "default_config.yaml"))
    monkeypatch.setattr(launch, "computes_bf16", lambda cpu: True)
    for name in [*os.environ]:
        if name.startswith(("ACCELERATE_", "OMP_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_")):
            monkeypatch.delenv(name)

    def accelerator(cpu, mixed_precision, **_):
        device, kind = torch.device("cpu"), DistributedType.NO
        return SimpleNamespace(num_processes=1, device=device, distributed_type=kind)

    monkeypatch.setattr(launch, "Accelerator", accelerator)

    def run(command="python train.py", asked="auto", threads=None, **variables):
        parent = SimpleNamespace(cmdline=lambda: command.split())
        process = SimpleNamespace(parent=lambda: parent)
        monkeypatch.setattr(launch.psutil, "Process", lambda: process)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        return make_accelerator(asked, threads=threads)[1]

    yield run
    torch.set_num_threads(threads)


def test_the_environment_does_not_overrule_the_accumulation(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        accelerator, _ = make_accelerator("no", gradient_accumulation_steps=2, threads=1)
        assert accelerator.gradient_accumulation_steps == 2
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def test_processes_that_do_not_know_of_each_other_are_refused(shell):
    with pytest.raises(UserError, match=r"2 processes but they don't know of each other"):
        shell(**TWO)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OMP_NUM_THREADS": "4,2"}, ["OMP_NUM_THREADS is '4,2'", "a whole number"]),
        ({"OMP_NUM_THREADS": "9" * 5000}, ["OMP_NUM_THREADS", "(5000 characters)"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE is 'two'", "from 1"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE is '0'"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE is 2 but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"]),
        ({"LOCAL_RANK": "junk"}, ["LOCAL_RANK is 'junk'"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK is 0 but WORLD_SIZE, RANK"]),
        ({"LOCAL_WORLD_SIZE": "1.5"}, ["LOCAL_WORLD_SIZE is '1.5'"]),
        (TWO | {"RANK": "2"}, ["RANK is 2, of 2 processes"]),
        (TWO | {"LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 1}, ["LOCAL_RANK is 1, of 1 processes"]),
        (TWO | {"MASTER_PORT": "x"}, ["MASTER_PORT is 'x'", "65535"]),
        ({"RANK": "3"}, ["RANK is 3, of 1 processes"]),
        ({"PMI_RANK": "x"}, ["PMI_RANK is 'x'"]),
        ({"ACCELERATE_USE_CPU": "maybe"}, ["ACCELERATE_USE_CPU is 'maybe'", "true or false"]),
        ({"ACCELERATE_DEBUG_MODE": "2"}, ["ACCELERATE_DEBUG_MODE is '2'"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ["PRECISION is 'fp8'", "no, bf16, fp16"]),
        ({"ACCELERATE_TORCH_DEVICE": "gpu"}, ["ACCELERATE_TORCH_DEVICE is 'gpu'"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "x"}, ["ACCELERATE_DYNAMO_BACKEND is 'x'", "inductor"]),
        ({"ACCELERATE_DYNAMO_MODE": "fast"}, ["ACCELERATE_DYNAMO_MODE is 'fast'"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["FSDP (ACCELERATE_USE_FSDP)", "multi_gpu.yaml"]),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, ["DeepSpeed (ACCELERATE_USE_DEEPSPEED)"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["Megatron-LM"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_environment_that_cannot_be_read(shell, variables, words):
    with pytest.raises(UserError) as refused:
        shell(**variables)
    line = str(refused.value)
    assert "\n" not in line and len(line) < 400
    for word in words:
        assert word in line


def test_empty_variables_are_as_unset(shell):
    names = ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU")
    assert shell(**dict.fromkeys(names, ""))["processes"] == 1
    assert not set(names) & os.environ.keys()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TPU"])
def test_launchers_of_another_kind_are_refused(shell, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    Path("default_config.yaml").write_text(f"distributed_type: {kind}\n")
    said = {"ACCELERATE_MIXED_PRECISION": "no"}
    with pytest.raises(UserError, match=rf"{kind} \(distributed_type\).*multi_gpu\.yaml"):
        shell("python accelerate launch train.py", **said)
    assert shell("python accelerate launch --cpu train.py", **said)["processes"] == 1


@pytest.mark.parametrize(
    "variable", ["OMP_NUM_THREADS=4,2", "LOCAL_RANK=junk", "ACCELERATE_DYNAMO_BACKEND=junk"]
)
@pytest.mark.slow
def test_a_script_in_such_an_environment_says_one_line(environment, tmp_path, variable):
    name, _, value = variable.partition("=")
    (tmp_path / "probe.py").write_text(PROBE)
    command = [sys.executable, str(tmp_path / "probe.py")]
    environment |= {name: value}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("probe.py: the environment variable ")
    assert ended.stderr.count("\n") == 1 and f"{name} is {value!r}" in ended.stderr


@pytest.mark.slow
def test_fsdp_is_refused(start, tmp_path):
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP",
              "num_processes": 1, "num_machines": 1, "fsdp_config": {}}  # fmt: skip
    (tmp_path / "fsdp.yaml").write_text(json.dumps(config))
    ended = start("--config_file", tmp_path / "fsdp.yaml", "--main_process_port", "0")
    assert ended.returncode != 0 and ended.stdout == "" and ended.stderr.count("Traceback") == 1
    (line,) = [x for x in ended.stderr.splitlines() if x.startswith("probe.py: ")]
    assert "FSDP (ACCELERATE_USE_FSDP)" in line


@pytest.mark.parametrize(
    ("command", "precision"),
    [
        ("python accelerate launch train.py", "bf16 (auto"),
        ("python accelerate launch --mixed_precision no train.py", "no (the launcher"),
        ("python accelerate launch --mixed-precision=no train.py", "no (the launcher"),
        ("python -m accelerate.commands.launch --mixed_precision no x.py", "no (the launcher"),
        ("python lib/accelerate/commands/launch.py --mixed_precision no x", "no (the launcher"),
        ("python accelerate launch --config_file says_no.yaml train.py", "no (the launcher"),
        ("python accelerate launch --config_file=says_no.yaml train.py", "no (the launcher"),
        ("python accelerate launch --config_file silent.yaml train.py", "bf16 (auto"),
        ("python accelerate launch --config_file absent.yaml train.py", "bf16 (auto"),
        ("python accelerate launch --config_file null.yaml train.py", "bf16 (auto"),
        ("python accelerate launch train.py --mixed_precision no", "bf16 (auto"),
    ],
)
def test_a_no_that_was_said_and_one_that_was_not(shell, tmp_path, monkeypatch, command, precision):
    monkeypatch.chdir(tmp_path)
    Path("says_no.yaml").write_text("mixed_precision: 'no'\n")
    Path("silent.yaml").write_text("num_processes: 1\n")
    Path("null.yaml").write_text("mixed_precision:\n")  # to the launcher the same as silence
    assert shell(command, ACCELERATE_MIXED_PRECISION="no")["precision"].startswith(precision)


def test_the_default_config_may_say_no(shell, tmp_path):
    (tmp_path / "default_config.yaml").write_text("mixed_precision: 'no'\n")
    words = shell("python accelerate launch train.py", ACCELERATE_MIXED_PRECISION="no")
    assert words["precision"] == "no (the launcher)"
    elsewhere = "python accelerate launch --config_file other.yaml train.py"
    assert shell(elsewhere)["precision"].startswith("bf16 (auto")


def test_the_scripts_flag_wins_over_the_launcher(shell):
    assert shell(asked="no")["precision"] == "no (--mixed_precision)"
    words = shell(asked="no", ACCELERATE_MIXED_PRECISION="bf16")
    assert words["precision"] == "no (--mixed_precision)"
    assert shell(ACCELERATE_MIXED_PRECISION="bf16")["precision"] == "bf16 (the launcher)"
    with pytest.raises(UserError, match=r"fp16 \(the launcher\) needs a GPU"):
        shell(ACCELERATE_MIXED_PRECISION="fp16")  # Accelerate would quietly train in fp32


@pytest.mark.parametrize(
    ("threads", "variables", "expected"),
    [
        (None, {}, CORES),
        (None, {"OMP_NUM_THREADS": 1}, CORES),  # what the launcher exports when it is not told
        (None, {"OMP_NUM_THREADS": ""}, CORES),
        (None, {"OMP_NUM_THREADS": 2}, min(2, CORES)),
        (None, {"OMP_NUM_THREADS": 10_000}, CORES),  # the machine's, where this process has fewer
        (None, {"LOCAL_WORLD_SIZE": 2}, max(1, CORES // 2)),
        (None, {"LOCAL_WORLD_SIZE": 10_000}, 1),
        (5, {"OMP_NUM_THREADS": 3, "LOCAL_WORLD_SIZE": 2}, 5),
        (1, {}, 1),
    ],
)
def test_threads(shell, threads, variables, expected):
    assert shell(threads=threads, **variables)["threads"] == expected
    assert torch.get_num_threads() == expected


def test_the_seed_is_set(shell):
    shell()
    first = torch.rand(3)
    shell()
    assert torch.equal(torch.rand(3), first)


# --- how a script ends ---


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such\n  folder"), 2, "train.py: no such folder\n"),
        (RunStopped("loss is nan"), 1, "train.py: loss is nan\n"),
        (OSError(errno.ENOSPC, "No space left", "x.json"), 1, "train.py: x.json: No space left\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_how_a_script_ends(capsys, monkeypatch, error, status, line):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended, script("train.py"):
        raise error
    assert ended.value.code == status
    assert capsys.readouterr() == ("", line)


def test_a_programming_error_keeps_its_traceback():
    for error in (ZeroDivisionError, ValueError, FileNotFoundError):
        with pytest.raises(error), script("train.py"):
            raise error


def test_two_processes_say_it_once(capsys, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="2"), script("train.py"):
            raise UserError("once")
    assert capsys.readouterr().err == "train.py: once\n"


@pytest.mark.parametrize(
    ("kind", "precision", "line"),
    [
        ("xpu", "no", "XPU devices are not supported .*ACCELERATE_USE_CPU=true"),
        ("mps", "fp16", r"fp16 \(the launcher\) is not supported on MPS; use --mixed_precision no"),
        ("mps", "bf16", "bf16 .* is not supported on MPS"),
    ],
)
def test_a_device_that_does_not_train_so_is_refused_in_one_line(
    shell, monkeypatch, kind, precision, line
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    device = torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    with pytest.raises(UserError, match=line):
        shell(ACCELERATE_MIXED_PRECISION=precision)


def test_windows_is_refused_in_one_line_before_anything_is_read(monkeypatch, capsys):
    import train

    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as stop:
        train.read_flags(["--config", "not there.yaml"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(
        "Windows is not supported; WSL, which is a Linux, runs it\n"
    )
