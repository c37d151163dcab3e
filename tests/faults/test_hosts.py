"""Two machines, made of two network namespaces: the same training, and a cut that ends."""

import datetime
import functools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml

import faulty
import smallruns
from harness import processes
from harness.errors import UserError
from harness.training.checkpoint import newest_valid

FLAGS = {
    "batch_size": 16, "gradient_accumulation_steps": 1, "epochs": 2, "logging_steps": 1,
    "checkpointing_steps": 4, "mixed_precision": "no",
}  # fmt: skip
TIMEOUT_S = 15


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """((namespace, address), …) of two hosts with a cable between them."""
    names = [f"host{k}-{os.getpid()}" for k in (1, 2)]
    addresses = ["10.77.0.1", "10.77.0.2"]
    try:
        made = [ip("netns", "add", name) for name in names]
    except FileNotFoundError:
        pytest.skip("no network namespaces: there is no ip (apt-get install iproute2)")
    if any(m.returncode for m in made):
        pytest.skip(f"no network namespaces can be made here: {made[0].stderr.strip()}")
    try:
        cable = ip("link", "add", "veth", "netns", names[0], "type", "veth", "peer", "name", "veth",
                   "netns", names[1])  # fmt: skip
        if cable.returncode:
            pytest.skip(f"no virtual cable can be made here: {cable.stderr.strip()}")
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth")
            for device in ("veth", "lo"):
                assert ip("-n", name, "link", "set", device, "up").returncode == 0
        yield tuple(zip(names, addresses, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    """The same on one host, by two processes."""
    return faulty.start(tmp_path_factory.mktemp("one"), processes=2, **FLAGS).done()


def test_two_hosts_train_as_one_and_resume(one_host, hosts, tmp_path):
    stopped = faulty.start(tmp_path, hosts=hosts, processes=2, stop_after=7, **FLAGS)
    stopped.done()
    resumed = faulty.start(
        tmp_path, hosts=hosts, processes=2, resume_from_checkpoint="auto", **FLAGS
    ).done()
    assert smallruns.digest(resumed) == smallruns.digest(one_host)
    assert json.loads((resumed / "summary.json").read_text())["processes"] == 2


def test_launched_with_multi_node_yaml(one_host, hosts, tmp_path):
    """As the README says: the same command on both, but for --machine_rank."""
    config = yaml.safe_load((smallruns.ROOT / "accelerate_configs/multi_node.yaml").read_text())
    config |= {"num_processes": 2, "main_process_ip": hosts[0][1], "use_cpu": True}
    config |= {"mixed_precision": "no"}
    del config["gpu_ids"]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    env = {**os.environ, "PYTHONPATH": str(smallruns.ROOT), "GLOO_SOCKET_IFNAME": "veth"}
    flags = smallruns.words({**smallruns.SMALL, **FLAGS, "output_dir": tmp_path})
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "accelerate.commands.launch",
             "--config_file", tmp_path / "two.yaml", "--machine_rank", str(rank),
             smallruns.ROOT / "train.py", *flags],
            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, (name, _) in enumerate(hosts)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=180)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert smallruns.digest(tmp_path / "run") == smallruns.digest(one_host)


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"dataset": "/mnt/b/photos"}, None),
        ({"dataset": "/mnt/b/photos", "content": {"train": [9, "other"]}}, "content"),
        ({"lr": 0.2}, "lr"),
    ],
)
def test_the_same_images_may_lie_elsewhere_on_another_machine(monkeypatch, changes, differs):
    identity = {"content": {"train": [9, "ab"]}, "dataset": "/mnt/a/photos", "lr": 0.1}

    def from_each(accelerator, work):
        host, first = work()
        del host
        there = {name: repr(value) for name, value in (identity | changes).items()}
        return [("a", first), ("b", {name: there[name] for name in first})]

    monkeypatch.setattr(processes, "from_each", from_each)
    two = SimpleNamespace(num_processes=2)
    if differs is None:
        processes.check_same(two, identity)
    else:
        with pytest.raises(UserError, match=f"process 1 on b has {differs} "):
            processes.check_same(two, identity)
    without = {name: value for name, value in identity.items() if name != "content"}
    with pytest.raises(UserError, match=r"process 1 on b has (dataset|lr) "):
        processes.check_same(two, without)


def impatient(timeout_s=TIMEOUT_S):
    """A collective that nobody answers ends after timeout_s."""
    from accelerate import InitProcessGroupKwargs

    from harness import launch

    accelerator = launch.Accelerator

    def with_timeout(*args, kwargs_handlers=(), **options):
        kept = [h for h in kwargs_handlers if not isinstance(h, InitProcessGroupKwargs)]
        timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout_s))
        return accelerator(*args, kwargs_handlers=[*kept, timeout], **options)

    launch.Accelerator = with_timeout


def slow_and_impatient(seconds=0.3):
    """Steps take a while, too."""
    import train

    real = train.draw_mixing

    def draw_mixing(*args):
        time.sleep(seconds)
        return real(*args)

    train.draw_mixing = draw_mixing
    impatient()


def decodes_for_long():
    """Longer than a collective may take, and then the test has seen what it wants."""
    from harness import processes
    from harness.data import cache

    decode = cache._decode_part

    def slow(part, job, *others):
        share = decode(part, job, *others)
        if job.progress:
            time.sleep(12)
        return share

    cache._decode_part, processes.ASK_SECONDS = slow, 1
    cache.DECODE_VERSION = os.getppid()  # nothing is there yet
    impatient(6)


def test_the_others_wait_for_a_long_decoding(tmp_path):
    """At 10 minutes NCCL would end them all."""
    run = faulty.start(tmp_path, processes=2, fault=decodes_for_long, **FLAGS | {"stop_after": 1})
    run.done()


def kill(run, hosts):
    run.send(signal.SIGKILL, rank=1)


def cut(run, hosts):
    ip("-n", hosts[1][0], "link", "set", "veth", "down")


@pytest.mark.parametrize("what", [kill, cut])
def test_a_host_that_is_lost_ends_the_other_and_both_resume(one_host, hosts, tmp_path, what):
    run = faulty.start(tmp_path, hosts=hosts, processes=2, fault=slow_and_impatient, **FLAGS)
    checkpoint = run.folder / "checkpoints" / "step-00000008"
    run.wait_for(checkpoint.exists)
    begin = time.monotonic()
    what(run, hosts)
    statuses = run.wait(TIMEOUT_S + 30)
    assert all(statuses), f"{statuses}\n{run.output()}"
    assert time.monotonic() - begin < TIMEOUT_S + 20
    found = newest_valid(run.folder / "checkpoints", functools.partial(pytest.fail))
    assert found[2]["step"] >= 8
    ip("-n", hosts[1][0], "link", "set", "veth", "up")
    resumed = faulty.start(
        tmp_path, hosts=hosts, processes=2, resume_from_checkpoint="auto", **FLAGS
    ).done()
    assert smallruns.digest(resumed) == smallruns.digest(one_host)


def test_the_slurm_script_says_what_multi_node_yaml_needs(tmp_path):
    """With stand-ins for scontrol, srun and accelerate: each node's command, flags with spaces."""
    tools = {
        "scontrol": "printf 'node1\\nnode2\\n'",
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'printf "%s|" "$@"; echo',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]",
           "SLURM_NNODES": "2"}  # fmt: skip
    done = subprocess.run(
        ["bash", smallruns.ROOT / "slurm/train.sh", "--run_name", "two words"],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = [
        "launch|--config_file|accelerate_configs/multi_node.yaml|--num_machines|2|"
        f"--num_processes|16|--machine_rank|{rank}|--main_process_ip|node1|train.py|"
        "--resume_from_checkpoint|auto|--run_name|two words|"
        for rank in (0, 1)
    ]
    assert done.stdout.splitlines() == expected
