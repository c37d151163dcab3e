"""The environment variables that launchers export, checked before anything reads them.

For a wrong value torch and Accelerate give a traceback, or wait for processes that don't exist.
"""

from __future__ import annotations

import os

import torch

from harness.errors import UserError, shortened

TRUE = ("1", "true", "yes", "on", "y", "t")  # to Accelerate
FALSE = ("0", "false", "no", "off", "n", "f")
MOST_PROCESSES = 1_000_000
BACKENDS = ("no", "eager", "aot_eager", "inductor", "cudagraphs")  # of torch.compile
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
JOINED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What splits a network over processes, or does not run it by torch's own operations
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}


def _integer(low, high=MOST_PROCESSES):
    def fits(text):
        try:
            return low <= int(text) <= high
        except ValueError:
            return False

    return fits, f"a whole number from {low} to {high}"


def _one_of(*choices):
    return lambda text: text.lower() in choices, f"one of {', '.join(choices)}"


def _is_device(text):
    try:
        kind = torch.device(text).type
    except RuntimeError:
        return False
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return kind == "cpu" or (accelerator is not None and kind == accelerator.type)


TRUTH = (lambda text: text.lower() in TRUE + FALSE, "true or false")

CHECKS = {  # name -> (whether its value can be read, what it has to be)
    "OMP_NUM_THREADS": _integer(0),
    "WORLD_SIZE": _integer(1),
    "LOCAL_WORLD_SIZE": _integer(1),
    "RANK": _integer(0),
    "LOCAL_RANK": _integer(-1),  # -1: one process
    "MASTER_PORT": _integer(0, 65535),
    "FORK_LAUNCHED": TRUTH,
    "ACCELERATE_USE_CPU": TRUTH,
    "ACCELERATE_DEBUG_MODE": TRUTH,
    "ACCELERATE_CPU_AFFINITY": TRUTH,
    "ACCELERATE_MIXED_PRECISION": _one_of("no", "bf16", "fp16"),
    "ACCELERATE_TORCH_DEVICE": (_is_device, "a device of this machine: cpu, cuda:0"),
    "ACCELERATE_DYNAMO_BACKEND": _one_of(*BACKENDS),
    "ACCELERATE_DYNAMO_MODE": _one_of(*MODES),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": TRUTH,
    "ACCELERATE_DYNAMO_USE_DYNAMIC": TRUTH,
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": TRUTH,
    **dict.fromkeys(UNSUPPORTED, TRUTH),
    # mpirun's, which Accelerate reads on a CPU
    **{f"{mpi}_SIZE": _integer(1) for mpi in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")},
    **{f"{mpi}_RANK": _integer(0) for mpi in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")},
}  # fmt: skip


def check_environment():
    """Raise UserError, with its name and value, for a launcher's variable that can't be read.

    Empty variables are unset, as torch and Accelerate fail on them.
    """
    env = os.environ
    for name, (fits, requirement) in CHECKS.items():
        if env.get(name) == "":
            del env[name]
        if name in env and not fits(env[name]):
            raise UserError(
                f"the environment variable {name} is {shortened(env[name])!r}: it has to be "
                f"{requirement}, or not set (unset {name})"
            )
    for name, kind in UNSUPPORTED.items():
        if is_true(name):
            refuse_kind(kind, name)
    _check_processes()


def _check_processes():
    """Raise UserError where the variables of several processes are incomplete or contradictory."""
    env = os.environ
    world = int(env.get("WORLD_SIZE", 1))
    several = world > 1 or int(env.get("LOCAL_RANK", -1)) >= 0
    names = [name for name in JOINED if name not in env]
    if several and names:
        variable = next(name for name in ("WORLD_SIZE", "LOCAL_RANK") if name in env)
        raise UserError(
            f"the environment variable {variable} is {env[variable]} but {', '.join(names)} "
            f"{'is' if len(names) == 1 else 'are'} not set: start with accelerate launch or "
            f"torchrun, or unset {variable}"
        )
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        processes = int(env.get(size, world))
        if int(env.get(rank, 0)) >= processes:
            raise UserError(
                f"the environment variable {rank} is {env[rank]}, of {processes} processes "
                f"({size}): it has to be below"
            )


def is_true(name) -> bool:
    """Whether a variable is true, in one of Accelerate's spellings."""
    return os.environ.get(name, "").lower() in TRUE


def refuse_kind(kind, source):
    """Raise UserError for a kind of training that the scripts don't support."""
    raise UserError(
        f"the launcher asks for {kind} ({source}), which these scripts don't support: every "
        "process holds the whole network. Use one of accelerate_configs/, multi_gpu.yaml for "
        "several GPUs"
    )
