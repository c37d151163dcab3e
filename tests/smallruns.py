"""Small real runs for the tests: train.py in this process, or launched as a user would."""

import ast
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from accelerate.state import AcceleratorState, GradientState

import harness.cli.flags

ROOT = Path(__file__).resolve().parents[1]

# 200 digits at 16 px, 4 steps an epoch, everything on that draws or remembers anything, on timm's
# narrowest ResNet
SMALL = {
    "dataset": "digits",
    "model": "test_resnet",
    "image_size": 16,
    "max_train_samples": 200,
    "max_eval_samples": 100,
    "batch_size": 48,
    "epochs": 3,
    "lr": 0.1,
    "warmup_epochs": 1,
    "ema_decay": 0.9,
    "dropout": 0.2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 3,
    "threads": 1,
    "report_to": "none",
    "run_name": "run",
    "keep_checkpoints": "all",
}


def verify_resume(output_dir, steps, *, launcher=(), wait=True, env=(), **flags):
    """The command that starts train.py again and again; as `launch` otherwise."""
    module = ("-m", "harness.training.verify_resume", str(steps))
    return launch(output_dir, launcher=launcher, wait=wait, env=env, before=module, **flags)


def words(flags):
    """{"lr": 0.1, "overwrite": True} as command-line words."""
    out = []
    for name, value in flags.items():
        if isinstance(value, bool):
            out.append(f"--{'' if value else 'no_'}{name}")
        elif value is not None:
            out.append(f"--{name}={value}")
    return out


def build_parser(script="train.py"):
    """The parser that a script builds, made by the script's own lines."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    (function,) = (n for n in tree.body if getattr(n, "name", None) == "read_flags")
    *building, last = function.body
    assert ast.unparse(last) == "return parser.read(argv)"
    names = {"flags": harness.cli.flags, "__doc__": ast.get_docstring(tree)}
    exec(compile(ast.Module(building, type_ignores=[]), script, "exec"), names)
    return names["parser"]


# The same network in three stages: on kept features, on a part of it, on all of it
STAGES = """[
    {name: head, epochs: 1, train: {head: 0.01}, warmup_epochs: 0.5},
    {name: late, epochs: 1, train: {layer4: 0.001, head: 0.01}, mix_prob: 1, random_erasing: 0.25},
    {epochs: 1, train: {all: 0.002}, layer_decay: 0.8},
]"""
FINETUNE = {"weights": "none", "stages": STAGES, "lr": None, "epochs": None, "dropout": None}


def train(output_dir, *, argv=(), script="train", **flags):
    """Run a script's main in this process; returns (run folder, exit status).

    argv: words of a command line that come before the flags, which win.
    """
    return run(script, [*argv, *words({**SMALL, "output_dir": output_dir, **flags})])


def run(script, argv):
    """Run a script's main in this process; returns (its folder, exit status)."""
    script = importlib.import_module(script)
    args = script.read_flags(argv)
    args.threads = args.threads or 1
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        script.main(args)
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    return Path(args.output_dir) / args.run_name, status


def ensemble(output_dir, *members, **flags):
    """The same with ensemble_eval.py, on the folders of trained runs; returns its folder."""
    flags = {"report_to": "none", "run_name": "ensemble", "output_dir": output_dir, **flags}
    folder, status = run("ensemble_eval", [*map(str, members), *words(flags)])
    assert status == 0
    return folder


# An epoch of 20 steps, nothing that helps, and images held out
MEMBER = {
    "model": "fastnet_small", "image_size": 16, "max_train_samples": 500, "batch_size": 20,
    "epochs": 1, "mixed_precision": "no", "val_fraction": 0.2, "gradient_accumulation_steps": 1,
    "augment": "none", "mix_prob": 0,
    "random_erasing": 0, "ema_decay": 0, "dropout": None,
}  # fmt: skip


def members(root, **flags):
    """a and c: one architecture, c goes on from a. b: another, and other pixels. d: no held-out."""
    folders = {}
    for name, special in {
        "a": {},
        "b": {"model": "test_resnet", "image_size": 24},
        "c": {"weights": root / "a", "lr": 0.01, "warmup_epochs": 0},
        "d": {"val_fraction": 0, "seed": 1},
    }.items():
        folders[name], status = train(root, run_name=name, **MEMBER | special | flags)
        assert status == 0
    return SimpleNamespace(**folders)


def copies(runs, root):
    """Copies of those runs in another folder, without checkpoints and kept predictions."""
    left_out = shutil.ignore_patterns("checkpoints", "predictions")
    for name, folder in vars(runs).items():
        shutil.copytree(folder, root / name, ignore=left_out)
    return SimpleNamespace(**{name: root / name for name in vars(runs)})


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def finetune(output_dir, **flags):
    """The same with finetune.py, in stages."""
    return train(output_dir, script="finetune", **{**FINETUNE, **flags})


def launch(
    output_dir, *, launcher=(), script="train.py", wait=True, env=(), argv=(), before=(), **flags
):
    """Start the script through `accelerate launch`; returns CompletedProcess or Popen.

    argv: words that come before the flags, for a script that trains nothing. before: words of
    Python's before the whole command, for what starts it.
    """
    command = [*([sys.executable, *before] if before else []), sys.executable]
    command += ["-m", "accelerate.commands.launch", *launcher]
    own = ROOT / str(script)
    command += [str(own if own.exists() else script), *map(str, argv)]
    small = {} if argv else SMALL | (FINETUNE if script == "finetune.py" else {})
    command += words({**small, "output_dir": output_dir, **flags})
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "OMP_"))}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables |= {"PYTHONPATH": os.pathsep.join(paths), **dict(env)}
    process = subprocess.Popen(
        command, cwd=output_dir, env=variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if not wait:
        return process
    output, _ = process.communicate(timeout=240)
    return subprocess.CompletedProcess(command, process.returncode, output)


def two_machines(output_dir, machine, port, **flags):
    """`launch` as the only process of one of two machines, which have caches of their own."""
    env = {
        "RANK": machine, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
        "HF_DATASETS_CACHE": output_dir / f"cache{machine}", "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    variables = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    variables |= {name: str(value) for name, value in env.items()}
    given = words(SMALL | {"output_dir": output_dir} | flags)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *given],
        cwd=output_dir, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def digest(folder):
    """sha256 of all that a resumed run must share with the uninterrupted one, by file."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    files = [folder / "metrics.jsonl", *newest.glob("*.safetensors")]
    if (folder / "model.safetensors").exists():
        files.append(folder / "model.safetensors")
    return {newest.name: len(files)} | {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }


def wait_for_step(folder, step, process, seconds=120):
    """Block until metrics.jsonl has a record of at least `step`."""
    import time

    from harness.training.metrics_file import read_metrics

    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if any(r["step"] >= step for r in read_metrics(folder / "metrics.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached (exit status {process.poll()})")


SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
