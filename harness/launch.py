"""The layer between `accelerate launch` and a script: device, threads, precision, exit status.

The launcher has traps, which are handled here for every script:
- without a GPU it sets OMP_NUM_THREADS=1, so training would run on one core;
- `--cpu --num_processes 2` (and MULTI_CPU) starts one process, silently;
- several processes without a GPU don't find each other without Accelerator(cpu=True);
- it exports mixed_precision "no" both where that was set and where nothing was.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import sys
import warnings

import psutil
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import GradientAccumulationPlugin, set_seed

from harness.console import printable, steady_output
from harness.environment import check_environment, is_true, refuse_kind
from harness.errors import UserError
from harness.processes import cores

# XLA is the launcher's word for TPUs. Where torch_xla, DeepSpeed and so on are not installed, the
# launcher itself ends before a script begins
UNSUPPORTED_TYPES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TPU")
FAILED_WRITES = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
)  # fmt: skip


_accumulation_steps = 1  # for the error about memory


def make_accelerator(
    mixed_precision="auto", gradient_accumulation_steps=1, threads=None, seed=0, deterministic=False
):
    """The Accelerator of this process, plus a dict of facts for the plan.

    mixed_precision: "auto", "no", "bf16" or "fp16". threads: intra-op CPU threads, None for all
    cores divided by the processes on this machine. deterministic: torch's deterministic algorithms,
    and an error where an operation has none. Raises UserError where training would run on
    fewer processes than were asked for.
    """
    global _accumulation_steps
    _accumulation_steps = gradient_accumulation_steps
    check_environment()
    _follow_launcher()
    world = int(os.environ.get("WORLD_SIZE", 1))
    settings = launcher_settings()
    if settings.get("distributed_type") in UNSUPPORTED_TYPES:
        refuse_kind(settings["distributed_type"], "distributed_type")
    processes = str(settings.get("num_processes", 1))
    if world == 1 and processes.isdecimal() and int(processes) > 1:
        raise UserError(
            f"the launcher was asked for {processes} processes but started one (as it "
            "does for --cpu and MULTI_CPU): use --config_file accelerate_configs/cpu_2proc.yaml, "
            "with --num_machines and --machine_rank behind it where there are several"
        )
    # With several processes the launcher does not export use_cpu
    cpu = (
        is_true("ACCELERATE_USE_CPU")
        or bool(settings.get("use_cpu"))
        or not torch.accelerator.is_available()
    )
    precision, origin = _precision(mixed_precision, settings, cpu)
    _check_device("cpu" if cpu else torch.accelerator.current_accelerator().type, precision, origin)
    threads = _set_threads(threads)
    if cpu:
        keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    torch.use_deterministic_algorithms(deterministic)
    _rejoin_after_restart(cpu)
    # torch says it of the argument that Accelerate hands on
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        # Not the argument, which ACCELERATE_GRADIENT_ACCUMULATION_STEPS would overrule
        gradient_accumulation_plugin=GradientAccumulationPlugin(gradient_accumulation_steps),
        # Buffers are averaged over the processes every step (Run.sync_step), not rank 0's taken
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.distributed_type in UNSUPPORTED_TYPES:  # torch_xla takes over by itself
        refuse_kind(accelerator.distributed_type.value, "what is installed")
    torch.set_num_threads(threads)  # Accelerate sets another number without OMP_NUM_THREADS
    if accelerator.num_processes != world:
        raise UserError(
            f"the launcher started {world} processes but they don't know of each other "
            f"(this one sees {accelerator.num_processes}): use one of accelerate_configs/"
        )
    set_seed(seed)
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic  # it chooses by measured speed
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    facts = {
        "precision": f"{precision} ({origin})",
        "device": _device_words(accelerator),
        "threads": threads,
        "processes": accelerator.num_processes,
    }
    return accelerator, facts


def _check_device(kind, precision, origin):
    """Raise UserError where this kind of device does not train, or not in this precision."""
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(
            f"{kind.upper()} devices are not supported (CUDA, MPS and CPUs are): with "
            "ACCELERATE_USE_CPU=true this trains on the CPU"
        )
    if precision == "fp16" and kind == "cpu":
        raise UserError(f"fp16 ({origin}) needs a GPU; on a CPU use bf16 or no")
    if precision != "no" and kind == "mps":
        raise UserError(f"{precision} ({origin}) is not supported on MPS; use --mixed_precision no")
    if precision == "bf16" and kind == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"bf16 ({origin}) is not supported by this device; use fp16 or no")


def _follow_launcher():
    """Get SIGTERM when the launcher dies (Linux), so that killing it ends the training."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        pr_set_pdeathsig = 1
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _rejoin_after_restart(cpu):
    """Form the process group of a job that torchrun has restarted (--max-restarts), on one machine.

    In torch 2.15 the processes find each other by the agent's store, which still has the addresses
    of the last attempt: some would wait there for ever. Here each attempt has keys of its own. On
    several machines the numbers of restarts may differ, so they are left to Accelerate.
    """
    env = os.environ
    restarts = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    agent_store = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    one_machine = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE") != "1"
    if restarts == "0" or not (agent_store and one_machine):
        return
    store, rank, world = next(torch.distributed.rendezvous("env://"))
    device = torch.device("cpu") if cpu else torch.accelerator.current_accelerator()
    torch.distributed.init_process_group(
        torch.distributed.get_default_backend_for_device(device),
        store=torch.distributed.PrefixStore(f"restart {restarts}", store),
        rank=rank,
        world_size=world,
    )


def launcher_settings():
    """The settings in the launcher's config file and on its command line: {name: value}.

    Its environment variables do not tell settings from defaults.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return {}  # started by python or torchrun
    try:
        argv = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return {}
    options = {}
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = argument.partition("=")
        if name.startswith("--"):
            options[name[2:].replace("-", "_")] = value or following
        elif argument.endswith(".py") and os.path.basename(argument) != "launch.py":
            break  # the script; its own flags follow
    file_settings = {}
    with (
        contextlib.suppress(OSError, ValueError, yaml.YAMLError),
        open(options.get("config_file", default_config_file), encoding="utf-8") as file,
    ):
        file_settings = yaml.safe_load(file)
    file_settings = file_settings if isinstance(file_settings, dict) else {}
    if "multi_gpu" in options or "cpu" in options:  # then the launcher ignores the file's
        file_settings.pop("distributed_type", None)
    names = ("mixed_precision", "num_processes", "use_cpu", "distributed_type")
    settings = {**file_settings, **options}
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _precision(flag, settings, cpu):
    """(precision, where it comes from)."""
    if flag != "auto":
        return flag, "--mixed_precision"
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launcher != "no" or "mixed_precision" in settings:
        return launcher, "the launcher"
    if computes_bf16(cpu):
        return "bf16", "auto: this device computes it natively"
    return "no", "auto: this device has no native bf16"


def computes_bf16(cpu):
    """Whether this device (the processor, with cpu) computes bf16 natively."""
    if not cpu and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not cpu:
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def _set_threads(threads):
    """Give each process on this machine its share of the cores, or a smaller OMP_NUM_THREADS.

    A value of 1 does not count: the launcher exports it where no number was set.
    """
    if threads is None:
        env_threads = int(os.environ.get("OMP_NUM_THREADS", 0) or 0)
        share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        threads = max(1, min(env_threads, share) if env_threads > 1 else share)
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory():
    """Let malloc keep what a step frees for the next one (glibc).

    By default it gives large activations back to the system, which hands out zeroed pages at the
    next step: 70,000 page faults a step of ResNet-18 at batch 128. Without them training is 1.17
    times as fast in bf16, at 1.03 times the peak memory (benchmarks/malloc.py).
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_threshold, 2**31 - 1)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 2**28)


def _device_words(accelerator):
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    n = accelerator.num_processes
    return f"{name} × {n} processes" if n > 1 else name


@contextlib.contextmanager
def script(name):
    """Run a script's main: one line for a user's mistake or a full disk, the process group closed.

    Exit status 2 for UserError, 1 for RunStopped; SystemExit (143, 130 after a signal) passes.
    """
    with steady_output(), _errors_in_one_line(name):
        yield


@contextlib.contextmanager
def _errors_in_one_line(name):
    try:
        yield
    except UserError as error:
        _print_once(f"{name}: {printable(' '.join(str(error).split()))}")
        raise SystemExit(error.status) from None
    except torch.OutOfMemoryError as error:
        steps = 2 * _accumulation_steps
        _print_once(
            f"{name}: out of memory on the device ({str(error).partition('.')[0]}): "
            f"--gradient_accumulation_steps {steps} computes the same batch in smaller parts, and "
            "may be given to a resumed run, too"
        )
        raise SystemExit(1) from None
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        _print_once(f"{name}: --deterministic: {str(error).partition(',')[0]}")
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in FAILED_WRITES:
            raise
        _print_once(f"{name}: {error.filename or 'writing'}: {error.strerror}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            with contextlib.suppress(RuntimeError, ValueError):
                torch.distributed.destroy_process_group()


def _print_once(line):
    """Print once on each machine: a folder may be missing on the second one only."""
    rank = os.environ.get("LOCAL_RANK", "")
    if not rank.isdecimal() or int(rank) == 0:  # its value may be the mistake
        print(line, file=sys.stderr, flush=True)
