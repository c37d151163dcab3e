"""Start a script in a process of its own, with one fault in it.

A process is forked from one that has imported torch and the scripts already (multiprocessing's
forkserver), so that a start costs a second instead of eight and a run can be killed fifty times.
What is launched through `accelerate launch` or torchrun is in smallruns.launch.
"""

import ctypes
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Where a fault may be defined that a forked process has to import by its name, and the scripts
ROOMS = sorted({file.parent for file in HERE.glob("*/test_*.py")})
FOLDERS = [str(folder) for folder in (HERE, *ROOMS, HERE.parent)]
sys.path[:0] = [folder for folder in FOLDERS if folder not in sys.path]

import smallruns  # noqa: E402

PRELOAD = (  # what a run imports sooner or later, 3 seconds of it
    "train", "finetune", "datasets", "torchvision.models", "torchvision.transforms.v2",
    "torch._dynamo", "torch.optim", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "accelerate.tracking", "safetensors.torch", "pyarrow.parquet",
)  # fmt: skip


def context():
    """multiprocessing's forkserver, with what every start needs imported."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["faulty", *PRELOAD])
    known = os.environ.get("PYTHONPATH", "")
    if FOLDERS[1] not in known.split(os.pathsep):  # the server takes sys.path from here only
        os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [known])])
    return forks


class Started:
    """One script in `processes` connected processes (gloo, as torchrun would start them).

    fault: a function without arguments, called in every process before the script; it patches
    what is to break. script: "train" for its read_flags and main; "train.py" runs the file itself,
    to its last line, as Python does. hosts: (network namespace, address) of each process, where
    each is to be on a machine of its own. flags: of train.py, over smallruns.SMALL. What they print
    is in .output().
    """

    def __init__(
        self, output_dir, *, fault=None, processes=1, script="train", argv=None, env=(), cwd=None,
        hosts=(), **flags,
    ):  # fmt: skip
        base = smallruns.SMALL | (smallruns.FINETUNE if script.startswith("finetune") else {})
        if argv is None:
            argv = smallruns.words({**base, "output_dir": output_dir, **flags})
        self.folder = Path(output_dir) / (flags.get("run_name") or "run")
        self.log = Path(output_dir) / f"out-{time.monotonic_ns()}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.processes = []
        for rank in range(processes):
            variables = dict(env)
            if processes > 1:
                variables |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
                }  # fmt: skip
            if hosts:
                variables |= {
                    "MASTER_ADDR": hosts[0][1],
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "1",
                }
                variables |= {"NAMESPACE": hosts[rank][0], "GLOO_SOCKET_IFNAME": "veth"}
            arguments = (str(self.log), script, argv, variables, fault, cwd and str(cwd))
            process = context().Process(target=_inside, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, seconds=90):
        """Exit statuses, by rank (-9 for a SIGKILL); fails where one is still there after that."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, until - time.monotonic()))
        late = [process for process in self.processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"{len(late)} processes did not end in {seconds} s:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def done(self, seconds=90):
        """Wait, and fail unless all ended with 0; returns the run's folder."""
        statuses = self.wait(seconds)
        assert not any(statuses), f"exit statuses {statuses}:\n{self.output()}"
        return self.folder

    def send(self, number, rank=0):
        os.kill(self.processes[rank].pid, number)

    def wait_for(self, condition, seconds=90):
        """Block until condition() is true; fails where it ends first or takes too long."""
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until or self.processes[0].exitcode is not None:
                raise AssertionError(f"it did not come to that:\n{self.output()}")
            time.sleep(0.005)

    def said(self, words):
        return lambda: words in self.output()


def start(output_dir, **options):
    return Started(output_dir, **options)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _inside(log, script, argv, variables, fault, cwd):
    """What the new process does."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    # What pytest's process left in the environment at the start of the server is not the run's
    os.environ.update({"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", **variables})
    for name in [name for name, value in variables.items() if not value]:  # unset
        del os.environ[name]
    if cwd:
        os.chdir(cwd)
    if "NAMESPACE" in variables:
        enter(variables["NAMESPACE"])
    from harness.launch import script as ended

    try:
        if script.endswith(".py"):
            if fault:
                fault()
            sys.argv = [str(HERE.parent / script), *argv]
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            module = importlib.import_module(script)
            if fault:
                fault()
            with ended(f"{script}.py"):
                module.main(module.read_flags(argv))
    finally:
        sys.stdout.flush()


def enter(namespace):
    """Go over to a network namespace that `ip netns add` made."""
    with open(f"/run/netns/{namespace}") as file:
        clone_newnet = 0x40000000
        failed = ctypes.CDLL(None, use_errno=True).setns(file.fileno(), clone_newnet)
    assert not failed, os.strerror(ctypes.get_errno())


# --- faults that several tests share ---


def kill_here():
    os.kill(os.getpid(), signal.SIGKILL)


class Nth:
    """A stand-in for `function` that does `fault` at its n-th call, before or after calling it."""

    def __init__(self, function, n, fault, after=False):
        self.function, self.n, self.fault, self.after = function, n, fault, after
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        now = self.calls == self.n
        if now and not self.after:
            self.fault()
        result = self.function(*args, **kwargs)
        if now and self.after:
            self.fault()
        return result
