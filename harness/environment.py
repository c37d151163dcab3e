"""The environment variables that launchers export, checked before anything reads them.

torch and Accelerate answer junk in them with a traceback, or wait for processes that don't exist.
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
# What cuts a network in pieces, or runs it by other means than torch's own operations
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}


def _whole(low, high=MOST_PROCESSES):
    def fits(text):
        try:
            return low <= int(text) <= high
        except ValueError:
            return False

    return fits, f"a whole number from {low} to {high}"


def _one_of(*words):
    return lambda text: text.lower() in words, f"one of {', '.join(words)}"


def _is_device(text):
    try:
        kind = torch.device(text).type
    except RuntimeError:
        return False
    here = torch.accelerator.current_accelerator(check_available=True)
    return kind == "cpu" or (here is not None and kind == here.type)


TRUTH = (lambda text: text.lower() in TRUE + FALSE, "true or false")

CHECKS = {  # name -> (whether its value can be read, what it has to be)
    "OMP_NUM_THREADS": _whole(0),
    "WORLD_SIZE": _whole(1),
    "LOCAL_WORLD_SIZE": _whole(1),
    "RANK": _whole(0),
    "LOCAL_RANK": _whole(-1),  # -1: one process
    "MASTER_PORT": _whole(0, 65535),
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
    **{f"{mpi}_SIZE": _whole(1) for mpi in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")},
    **{f"{mpi}_RANK": _whole(0) for mpi in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")},
}  # fmt: skip


def check_environment():
    """Raise UserError for a variable of a launcher that can't be read, names it and its value.

    What is set to nothing is taken out, for torch and Accelerate stumble over it.
    """
    env = os.environ
    for name, (fits, wanted) in CHECKS.items():
        if env.get(name) == "":
            del env[name]
        if name in env and not fits(env[name]):
            raise UserError(
                f"the environment variable {name} is {shortened(env[name])!r}: it has to be "
                f"{wanted}, or not set (unset {name})"
            )
    for name, what in UNSUPPORTED.items():
        if is_true(name):
            refuse_kind(what, name)
    _check_processes()


def _check_processes():
    """Raise UserError where the variables of several processes are incomplete or contradict."""
    env = os.environ
    world = int(env.get("WORLD_SIZE", 1))
    several = world > 1 or int(env.get("LOCAL_RANK", -1)) >= 0
    missing = [name for name in JOINED if name not in env]
    if several and missing:
        known = next(name for name in ("WORLD_SIZE", "LOCAL_RANK") if name in env)
        raise UserError(
            f"the environment variable {known} is {env[known]} but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: start with accelerate launch or "
            f"torchrun, or unset {known}"
        )
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        processes = int(env.get(size, world))
        if int(env.get(rank, 0)) >= processes:
            raise UserError(
                f"the environment variable {rank} is {env[rank]}, of {processes} processes "
                f"({size}): it has to be below"
            )


def is_true(name) -> bool:
    """Whether a variable says yes, in one of Accelerate's words."""
    return os.environ.get(name, "").lower() in TRUE


def refuse_kind(what, where):
    """Raise UserError for a kind of training that the scripts don't know."""
    raise UserError(
        f"the launcher asks for {what} ({where}), which these scripts don't support: every process "
        "holds the whole network. Use one of accelerate_configs/, multi_gpu.yaml for several GPUs"
    )
