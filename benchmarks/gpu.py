"""What a card does: one command, under 10 minutes, gpu.json and gpu.md with the card's name.

    python benchmarks/one_file.py FOLDER images.npz               beforehand, where `datasets` is
    python benchmarks/gpu.py --images images.npz --out FOLDER   on the card; it fetches nothing
    python benchmarks/gpu.py --quick --out FOLDER               does it run? on a CPU, too

It needs torch, torchvision, accelerate, safetensors and numpy; with pytest and `datasets` it runs
tests/test_gpu.py as well. Each part is train.py itself, everything on, in a process of its own:

- images/s of its steps after a warm-up, evaluation and checkpoints not included, in blocks of
  steps, for each of which the device is waited for: n is the number of blocks. Then the same
  network in the same precision on ONE synthetic batch that lies on the device, with nothing but
  forward, backward and SGD.
- host waits a step: how often torch.cuda.set_sync_debug_mode sees the host wait for the device, in
  steps that log nothing. Reading an event two steps later is none. fp16's gradient scaler waits.
- the fast recipe to its end, with six views; airbench94 beside it (--airbench FILE of a clone).

What could not run (no fp16 on a CPU, no time left) is listed with the reason. gpu.json is written
after every part, so that nothing is lost where the card is taken away; it is a results file, as
results.py describes it, with what was not run, and what tests/test_gpu.py said, beside the rows.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import (
    ROOT,
    Row,
    machine,
    measurement,
    over,
    parser,
    read,
    synchronize,
    table,
    write_measurement,
)
from results import write as write_file

from harness.errors import UserError
from harness.models.build import build_model
from harness.training.folder import git_commit
from harness.training.run import Run

HERE = Path(__file__).resolve().parent
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_SECONDS = 25  # left, for a part to be begun
SMALL = {"model": "resnet18", "batch_size": 1024, "max_train_samples": 20_480}
LARGE = {"model": "resnet50", "image_size": 224, "batch_size": 256, "max_train_samples": 2_048}
SPEED = {"small": SMALL, "large": LARGE}
QUICK = {
    "small": {"model": "fastnet_small", "batch_size": 8, "max_train_samples": 100},
    "large": {"model": "shufflenet_v2_x0_5", "batch_size": 4, "image_size": 32,
              "max_train_samples": 100},
    "fast": {"model": "fastnet_small", "epochs": 1, "eval_epochs": 1, "batch_size": 50,
             "max_train_samples": 200, "max_eval_samples": 50, "threads": 1},
}  # fmt: skip
# In the order of what one would miss most
PARTS = {
    "small bf16": {"precision": "bf16"},
    "large bf16": {"precision": "bf16"},
    "fast": {"seed": 1},
    "small fp16": {"precision": "fp16"},
    "small bf16 deterministic": {"precision": "bf16", "deterministic": True},
    "large bf16 deterministic": {"precision": "bf16", "deterministic": True},
    "small bf16 compiled": {"precision": "bf16", "compiled": True},
    "airbench": {},
    "tests": {},
    "large bf16 compiled": {"precision": "bf16", "compiled": True},
    "large fp16": {"precision": "fp16"},
    "small no": {"precision": "no"},
    "fast, seed 2": {"seed": 2},
    "fast, seed 3": {"seed": 3},
}


# ---------------------------------------------------------------- in a part's own process


def timed_steps(warmup, blocks, block):
    """A stand-in for Run.steps that takes the time of blocks of steps, and the dict it fills.

    After `warmup` steps come blocks · block timed ones; the waits of the rest are counted.
    """
    steps, found = Run.steps, {"stamps": [], "waits": []}

    def timed(run, batches, evaluate, spacing=0):
        for step, batch in steps(run, batches, evaluate, spacing):
            done = step - warmup
            if 0 <= done <= blocks * block and done % block == 0:
                synchronize(DEVICE)
                found["stamps"].append(time.perf_counter())
            if done >= blocks * block:
                with counted_waits(found["waits"]):
                    yield step, batch
            else:
                yield step, batch

    return timed, found


@contextlib.contextmanager
def counted_waits(counts):
    """Append how often the host waited for a CUDA device in here."""
    if not ON_GPU:
        yield
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    counts.append(sum("called a synchronizing" in str(one.message) for one in seen))


def train_flags(images, flags, output):
    return [f"--dataset={images}", f"--output_dir={output}", "--report_to=none",
            *(f"--{name}={value}" for name, value in flags.items())]  # fmt: skip


def run_speed(images, output, kind, quick, precision, compiled=False, deterministic=False):
    """images/s of train.py, and of the bare loop, by block."""
    from one_file import train_on_packed

    warmup, blocks, block, counted = (1, 2, 1, 1) if quick else (30, 5, 10, 10)
    total = warmup + blocks * block + counted
    flags = {**SPEED[kind], **(QUICK[kind] if quick else {})}
    flags |= {"mixed_precision": precision, "max_steps": total, "max_eval_samples": 50}
    flags |= {"threads": 1} if quick else {}
    flags |= {"logging_steps": 10**6, "eval_epochs": 10**6, "checkpointing_steps": 10**6}
    if compiled:  # as the launcher says it; on a CPU without a compiler of its own
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "INDUCTOR" if ON_GPU else "EAGER"
    timed, found = timed_steps(warmup, blocks, block)
    Run.steps = timed
    train = train_on_packed()
    words = train_flags(images, flags, output) + (["--deterministic"] if deterministic else [])
    train.main(train.read_flags(words))
    stamps, images_a_block = found["stamps"], flags["batch_size"] * block
    ours = [images_a_block / (b - a) for a, b in pairwise(stamps)]
    setting = f"{flags['model']}, {flags.get('image_size', 32)} px, batch {flags['batch_size']}"
    result = {"setting": setting, "ours": ours, "waits": found["waits"]}
    if not deterministic:
        step = bare_step(flags, precision, compiled)
        result["bare"] = blocks_of(step, warmup, blocks, block, flags["batch_size"])
    if ON_GPU:
        result["memory"] = [torch.cuda.max_memory_allocated() / 2**30]
    return result


def bare_step(flags, precision, compiled):
    """A function that makes a step on one synthetic batch."""
    size, batch = flags.get("image_size", 32), flags["batch_size"]
    model = build_model(flags["model"], 10, image_size=size)
    model.to(DEVICE, memory_format=torch.channels_last)
    if compiled:
        model.compile(backend="inductor" if ON_GPU else "eager")
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True,
        fused=ON_GPU and precision != "fp16",
    )  # fmt: skip
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=DEVICE) % 10
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")

    def step():
        with torch.autocast(DEVICE.type, DTYPES.get(precision), enabled=precision in DTYPES):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def blocks_of(step, warmup, blocks, block, batch):
    """Images/s of each block of steps."""
    for _ in range(warmup):
        step()
    stamps = []
    for done in range(blocks * block + 1):
        if done % block == 0:
            synchronize(DEVICE)
            stamps.append(time.perf_counter())
        step()
    return [batch * block / (b - a) for a, b in pairwise(stamps)]


def run_fast(images, output, quick, seed):
    """The fast recipe to its end: seconds, as its summary has them, and accuracies."""
    from one_file import train_on_packed

    train = train_on_packed()
    flags = {"config": ROOT / "recipes" / "cifar10_fast.yaml", "seed": seed, "run_name": "fast"}
    flags |= QUICK["fast"] if quick else {}
    args = train.read_flags(train_flags(images, flags, output))
    train.main(args)
    summary = json.loads((Path(output) / "fast" / "summary.json").read_text())
    scores = summary["scores"]
    return {"seconds": [summary["seconds"]], "accuracy": [100 * scores["test/acc"]],
            "accuracy, six views": [100 * scores["test/acc_tta"]]}  # fmt: skip


def run_airbench(images, output, file):
    """airbench94_muon.py, the user's own copy, to its end on the same images; see fast.py."""
    from one_file import decode_packed, load_packed

    from harness.data.preprocessing import Preprocessing

    data, preprocessing = load_packed(images), Preprocessing(32, 1.0, "bilinear", (), ())
    splits, folder = decode_packed(data, preprocessing, progress=False), Path(output) / "cifar10"
    folder.mkdir()
    for name, split in splits.items():
        pixels = split.stored[split.rows].permute(0, 2, 3, 1).contiguous()
        stored = {"images": pixels, "labels": split.labels, "classes": data.classes}
        torch.save(stored, folder / f"{name}.pt")
    command = [sys.executable, str(HERE / "fast.py"), "--airbench", file, "--peer", "--full"]
    done = subprocess.run(command, cwd=output, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": [found["seconds"]], "accuracy, six views": [100 * found["accuracy"]]}


def run_tests(seconds):
    """How many of tests/test_gpu.py passed, failed and were skipped; which failed."""
    missing = [name for name in ("pytest", "datasets") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}")
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(ROOT / "tests" / "test_gpu.py")], cwd=ROOT,
                          capture_output=True, text=True, timeout=seconds)  # fmt: skip
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    return {"outcome": lines[-1], "failed": failed}


def run_part(name, args):
    """What a part found; called in its own process."""
    settings, (kind, *_) = PARTS[name], name.replace(",", "").split()
    with tempfile.TemporaryDirectory() as output:
        if kind in SPEED:
            return run_speed(args.images, output, kind, args.quick, **settings)
        if kind == "fast":
            return run_fast(args.images, output, args.quick, **settings)
        if kind == "airbench":
            return run_airbench(args.images, output, args.airbench)
        return run_tests(args.seconds)


# ---------------------------------------------------------------- all parts


def start_part(name, args, seconds):
    """Run a part in a process of its own: (what it found, None) or (None, why it did not run)."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name]
    command += ["--images", args.images, "--seconds", str(int(seconds))]
    command += ["--quick"] if args.quick else []
    command += ["--airbench", args.airbench] if args.airbench else []
    # Threads that spin make a busy machine slower by a factor of ten
    calm = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} if args.quick else {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | calm
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None, f"stopped after {seconds:.0f} s, no time was left"
        errors.seek(0)
        said = errors.read()
    lines = output.splitlines()
    if process.returncode or not lines:
        print(said[-3000:], file=sys.stderr)
        return None, f"failed: {(said.splitlines() or ['no output'])[-1]}"
    found = json.loads(lines[-1])
    return (None, found["not run"]) if "not run" in found else (found, None)


def rows_of(results):
    """The table's rows, from what the parts found."""
    rows = []
    for kind in SPEED:
        plain = results.get(f"{kind} bf16")
        for name, found in results.items():
            if name.split()[0] != kind:
                continue
            how = f"{found['setting']}, {name.removeprefix(f'{kind} ')}"
            rows.append(Row(f"{how}: train.py, images/s", found["ours"]))
            if "bare" in found:
                rows.append(Row(f"{how}: one synthetic batch, images/s", found["bare"]))
                ratios = over(found["ours"], found["bare"])
                rows.append(Row(f"{how}: train.py / one synthetic batch", ratios, 0.95))
            if found["waits"]:
                rows.append(waits_row(how, name, found["waits"]))
            if "memory" in found:
                rows.append(Row(f"{how}: most memory of tensors, GiB", found["memory"]))
            if plain and name == f"{kind} bf16 deterministic":
                cost = over(plain["ours"], found["ours"])
                rows.append(Row(f"{how}: time over that without it", cost))
            if plain and name == f"{kind} bf16 compiled":
                rows.append(
                    Row(f"{how}: speed over not compiled", over(found["ours"], plain["ours"]))
                )
    fast = [found for name, found in results.items() if name.startswith("fast")]
    for figure in fast[0] if fast else ():
        values = [value for found in fast for value in found[figure]]
        rows.append(Row(f"fast recipe: {figure}", values))
    for figure, values in results.get("airbench", {}).items():
        rows.append(Row(f"airbench94 on the same images: {figure}", values))
    return rows


def waits_row(how, name, waits):
    figure = f"{how}: host waits a step"
    if "fp16" in name:
        return Row(f"{figure} (the gradient scaler's)", [float(n) for n in waits])
    return Row(figure, [float(n) for n in waits], 0, at_most=True)


def write(args, results, not_run, began):
    """gpu.json and gpu.md, complete after every part."""
    card = torch.cuda.get_device_name() if ON_GPU else "CPU"
    rows = rows_of(results)
    title = f"# {card}\n\n{machine()}; commit {git_commit()}; {time.time() - began:.0f} s"
    title += "\n\n**--quick: these figures mean nothing.**" if args.quick else ""
    text = f"{title}\n\n{table(rows)}\n"
    if "tests" in results:
        text += f"\ntests/test_gpu.py: {results['tests']['outcome']}\n"
        text += "".join(f"- {line}\n" for line in results["tests"]["failed"])
    text += "".join(f"\nnot run: {name}: {why}\n" for name, why in not_run.items())
    found = measurement(rows, f"images of {Path(args.images).name}", args.note)
    found |= {
        "card": card, "quick": args.quick, "seconds": time.time() - began,
        "tests": results.get("tests"), "not_run": not_run,
    }  # fmt: skip
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "gpu.json", found)
    (folder / "gpu.md").write_text(text)
    return text


def noise(file):
    """A packed file of smooth noise, to see whether everything runs."""
    from one_file import write_packed
    from PIL import Image
    from processes import smooth_noise

    splits = {}
    for name, count in (("train", 400), ("test", 100)):
        images = []
        for pixels in smooth_noise(count).permute(0, 2, 3, 1).numpy():
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "JPEG")
            images.append(encoded.getvalue())
        splits[name] = images, [k % 10 for k in range(count)]
    write_packed(file, list("abcdefghij"), splits)


def read_args():
    arg_parser = parser(__doc__, rounds=1)
    arg_parser.add_argument("--images", help="a file that one_file.py wrote; --quick makes its own")
    arg_parser.add_argument("--out", default=".", help="folder of gpu.json and gpu.md")
    arg_parser.add_argument("--airbench", help="airbench94_muon.py of a clone, to run beside ours")
    arg_parser.add_argument("--seconds", type=float, default=560, help="to stop after")
    arg_parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                      help=f"some of: {', '.join(PARTS)}")  # fmt: skip
    arg_parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return arg_parser, read(arg_parser)


def main():
    arg_parser, args = read_args()
    if args.part:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                found = run_part(args.part, args)
        except UserError as error:
            found = {"not run": str(error)}
        print(json.dumps(found))
        return 0
    if not args.images and not args.quick:
        arg_parser.error("--images is needed: make it with one_file.py, or see --quick")
    began, results, not_run = time.time(), {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        if not args.images:
            args.images = f"{temporary}/images.npz"
            noise(args.images)
        args.images = str(Path(args.images).resolve())
        args.airbench = args.airbench and str(Path(args.airbench).resolve())
        for name in args.only:
            left = args.seconds - (time.time() - began)
            if name == "airbench" and not args.airbench:
                not_run[name] = "no --airbench FILE"
            elif left < LEAST_SECONDS:
                not_run[name] = "no time left"
            else:
                found, why = start_part(name, args, left)
                if found:
                    results[name] = found
                else:
                    not_run[name] = why
            print(f"{time.time() - began:4.0f} s  {name}  {not_run.get(name, 'done')}", flush=True)
            text = write(args, results, not_run, began)
    print(f"\n{text}")
    write_measurement(args, rows_of(results), f"images of {Path(args.images).name}")
    return int(any(why.startswith("failed") for why in not_run.values()))


if __name__ == "__main__":
    sys.exit(main())
