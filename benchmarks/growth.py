"""How cost grows: curves of train.py and ensemble_eval.py, and on paper what eight GPUs would take.

    python benchmarks/growth.py              writes GROWTH.md, .png and .json
    python benchmarks/growth.py --only data parts --keep     those anew, the rest as it was
    python benchmarks/growth.py --keep --only                page and plot anew from GROWTH.json
    python benchmarks/growth.py --quick --out /tmp/growth    does it run?

Each point is train.py as it is launched, its steady steps timed from outside (images/s, ResNet-18):

- batch, image, threads, processes: one thing varies, the rest is batch 128 at 32 px with the
  threads and the process of a plain launch. Sizes are measured at batch 32; above 64 px the stem
  is the standard one, which leaves a sixteenth of the pixels.
- data: 2,000 to 500,000 synthetic images, decoded beforehand: seconds of a second start to its
  first step, peak memory of the process, and how much of that no file is behind. The last must not
  grow: the memory map is file-backed, and only the pages in use need to be in memory.
- members: seconds of ensemble_eval.py with 1 to 4 members, of networks of one step.
- parts: what one core does a second in each part of the input at 224 px (decode, gather, draw,
  augment), and a GPU where there is one, for the calculation on paper.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import machine
from processes import (
    by_accelerate,
    encode,
    launch,
    smooth_noise,
    steady_speed,
    write_folder,
)

BATCH = 128
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
LABELS = {
    "batch": "images a step", "image": "px a side", "threads": "threads",
    "processes": "processes", "data": "train images", "members": "members",
}  # fmt: skip

# What the paper's machine is assumed to be and do. Public or assumed figures, not measured here.
FLOP = 24.3e9  # forward and backward of ResNet-50 at 224 px, an image; counted
AUGMENT_ON_HOST = "augment on all of the host's cores instead"
DECODE_ONCE = "decode on all of the host's cores, at the first start only"
ASSUMED = {
    "gpus": 8,
    "flops": 790e12,  # bf16 peak of an H100, a public figure
    "mfu": 0.1,  # assumed share of the peak that ResNet-50 reaches: 3,250 images/s a GPU
    "cores": 96,  # of the host
    "bus": 25e9,  # bytes/s from host to one GPU, assumed
    "allreduce": 200e9,  # bytes/s of one GPU's all-reduce over NVLink, assumed
    "gradient": 4 * 25.6e6,  # bytes of ResNet-50's gradients in fp32
    "batch": 2048,  # images of an optimizer step over all GPUs
    "images": 1_281_167,
    "gpu_bytes": 2.0e12,  # bytes/s that augmentation as whole batches moves on a GPU, assumed
    "touched": 3 * 256 * 256 * 60,  # bytes of memory traffic that augments one image, assumed
}


def on_paper(parts: dict[str, float], assumed: dict = ASSUMED) -> list[tuple[str, float, str]]:
    """(stage, images/s over the whole machine, from what) of ImageNet at 224 px on eight GPUs.

    parts: images/s of one core, as `measure_parts` gives them. Stages overlap (a thread gathers
    ahead, the device augments while the host queues), so the slowest one is the machine's speed.
    """
    a = assumed
    image = 3 * 256 * 256  # bytes of a stored image
    share = a["batch"] / a["gpus"]  # images of one GPU's step
    reduce_seconds = 2 * (a["gpus"] - 1) / a["gpus"] * a["gradient"] / a["allreduce"]
    on_gpu = parts.get("augment on a GPU")
    augment = on_gpu or a["gpu_bytes"] / a["touched"]
    computed = a["mfu"] * a["flops"] / FLOP
    return [
        ("draw, one thread a process", a["gpus"] * parts["draw"], "measured"),
        ("gather, one thread a process", a["gpus"] * parts["gather"], "measured"),
        ("host to GPU", a["gpus"] * a["bus"] / image, "assumed bus"),
        ("augment on the GPU", a["gpus"] * augment, "measured" if on_gpu else "assumed traffic"),
        ("forward and backward", a["gpus"] * computed, "FLOP counted, share assumed"),
        ("all-reduce, not overlapped", a["gpus"] * share / reduce_seconds, "assumed link"),
        (AUGMENT_ON_HOST, a["cores"] * parts["augment"], "measured; not how it is done"),
        (DECODE_ONCE, a["cores"] * parts["decode"], "measured"),
    ]


def paper_text(parts):
    stages = on_paper(parts)
    epoch = ASSUMED["images"]
    lines = ["| stage | images/s | an epoch, s | from |", "|---|---|---|---|"]
    for stage, speed, source in stages:
        lines.append(f"| {stage} | {speed:,.0f} | {epoch / speed:,.1f} | {source} |")
    running = [stage for stage in stages if stage[0] not in (AUGMENT_ON_HOST, DECODE_ONCE)]
    slowest = min(running, key=lambda stage: stage[1])
    lines += ["", f"The bottleneck is *{slowest[0]}*: {epoch / slowest[1]:,.0f} s an epoch, "
              f"{90 * epoch / slowest[1] / 3600:.1f} hours for 90. Assumed: "
              + ", ".join(f"{k} {v:g}" for k, v in ASSUMED.items()) + "."]  # fmt: skip
    return "\n".join(lines)


def steady(place, batch=BATCH, image=32, threads=None, processes=1, steps=5, cache=None):
    flags = {"dataset": place, "batch_size": batch, "image_size": image, "lr": 0.01}
    if threads:
        flags["threads"] = threads
    launcher = by_accelerate("cpu_2proc.yaml" if processes == 2 else None)
    return steady_speed(flags, cache, 2, steps, launcher)[0]


def sweep(name, temporary, cache, quick):
    """[(x, images/s)] of one curve of training."""
    count = 256 if quick else 4096
    place = f"{temporary}/{count}"
    if not Path(place).exists():
        noise, labels = smooth_noise(count), torch.arange(count) % 10
        write_folder(place, {"train": (noise, labels), "test": (noise[:128], labels[:128])})
    points = {
        "batch": [{"batch": b} for b in ((16, 32) if quick else (16, 32, 64, 128, 256, 512))],
        "image": [{"image": s, "batch": 32} for s in ((32,) if quick else (32, 64, 96, 128, 224))],
        "threads": [{"threads": t, "batch": 16 if quick else 128} for t in range(1, CPUS + 1)],
        "processes": [{"processes": p, "batch": 16 if quick else 128} for p in (1, 2)],
    }[name]
    steps = 2 if quick else 4
    found = []
    for point in points:
        speed = steady(place, cache=cache, steps=steps, **point)
        found.append({"x": point[name], "images/s": speed})
        print(f"{name} {point[name]}: {speed:,.1f} images/s", file=sys.stderr, flush=True)
    return found


def data_curve(temporary, cache, quick):
    """Start-up and memory against the number of images; the same few images over and over."""
    cells = encode(smooth_noise(1000))
    found = []
    for count in (1000, 2000) if quick else (2000, 20_000, 100_000, 500_000):
        folder = f"{temporary}/data{count}"
        many = [cells[k % len(cells)] for k in range(count)]
        write_folder(folder, {"train": (many, [k % 10 for k in range(count)])})
        flags = {"dataset": folder, "batch_size": 16, "stop_after": 3, "logging_steps": 1,
                 "test_split": "none"}  # fmt: skip
        for second in (False, True):  # the first decodes
            with tempfile.TemporaryDirectory() as output:
                seconds, _, scale = launch(flags, output, cache, [sys.executable], weigh=second)
        found.append({"x": count, "start, s": seconds[1], "PSS, MiB": scale.pss / 2**20,
                      "of it no file behind, MiB": scale.anonymous / 2**20})  # fmt: skip
        print(found[-1], file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    return found


def members_curve(temporary, quick):
    """Seconds of ensemble_eval.py against the number of members."""
    import ensemble

    found, count = [], 2 if quick else 4
    model = "shufflenet_v2_x0_5" if quick else "resnet18"
    runs = ensemble.make_runs([model] * count, "", temporary)
    limit = ["--max_eval_samples", "64" if quick else "1000"]
    for k in range(2, count + 1):
        ensemble.ours(runs[:k], temporary, limit)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            ensemble.ours(runs[:k], temporary, limit)
        found.append({"x": k, "seconds": time.perf_counter() - start})
    return found


def measure_parts(quick):
    """Images/s of one core in each part of the input, 256 px stored and 224 px seen."""
    from harness.counters import SampleStreams
    from harness.data.batches import Views
    from harness.data.pixels import decode_image, gather

    torch.set_num_threads(1)
    n, share = (8, 8) if quick else (64, ASSUMED["batch"] // ASSUMED["gpus"])
    noise = smooth_noise(4 * n, 256)
    cells = encode(noise[:n])
    views = Views(224, (0.5,) * 3, (0.25,) * 3, augment="randaugment", padding=0, flip_prob=0.5,
                  erasing=0.25, ops=2, magnitude=9, stored=256, crop_scale=0.08)  # fmt: skip
    rows = torch.randperm(len(noise))[:n]

    def draws(count):
        return views.draw(count, SampleStreams(0, "views", 0, places=torch.arange(count)))

    batch, draw = gather(noise, rows), draws(n)
    parts = {
        "decode": lambda: [decode_image(io.BytesIO(c["bytes"]), 256) for c in cells],
        "gather": lambda: gather(noise, rows),
        "draw": lambda: draws(share),
        "augment": lambda: views.train(batch, draw),
    }
    if torch.cuda.is_available():
        there = batch.cuda()
        parts["augment on a GPU"] = lambda: (views.train(there, draw), torch.cuda.synchronize())
    speeds = {}
    for name, work in parts.items():
        work()
        taken = []
        for _ in range(1 if quick else 5):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        count = share if name == "draw" else n
        speeds[name] = count / sorted(taken)[len(taken) // 2]
    torch.set_num_threads(CPUS)
    return speeds


PAGE = """# How cost grows

Written by `python benchmarks/growth.py`, which says how each point is measured. Each is a single
run of a few steps (n = 1): a trend, not a figure to quote.

{machine}

![curves]({picture})

{curves}

## On paper: ImageNet at 224 px on eight GPUs

Images/s of the whole machine if this stage were alone. Stages overlap, so the slowest is the
machine's speed. "Measured" is a core (or GPU) of {measured}; all else is assumed.

{paper}
"""


def markdown(found, picture):
    lines = []
    for name, points in found["curves"].items():
        keys = [key for key in points[0] if key != "x"]
        lines += ["", f"| {LABELS[name]} | {' | '.join(keys)} |", "|---" * (1 + len(keys)) + "|"]
        for point in points:
            values = " | ".join(f"{point[key]:,.1f}" for key in keys)
            lines.append(f"| {point['x']:,} | {values} |")
    paper = ["| 256 px stored, 224 px seen, one core | images/s |", "|---|---|"]
    if "parts" in found:
        paper += [f"| {name} | {speed:,.0f} |" for name, speed in found["parts"].items()]
        paper += ["", paper_text(found["parts"])]
    measured = found.get("parts_machine", "the machine above")
    return PAGE.format(machine=found["machine"], picture=picture, measured=measured,
                       curves="\n".join(lines).strip(), paper="\n".join(paper))  # fmt: skip


def draw_curves(found, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = found["curves"]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (name, points) in zip(axes.flat, curves.items(), strict=False):
        keys = [key for key in points[0] if key != "x"]
        places = [p["x"] for p in points]
        for key in keys:
            values = [p[key] for p in points]
            if key == "start, s":  # beside memory it would be a line along the axis
                for x, value in zip(places, values, strict=True):
                    axis.annotate(f"start {value:.1f} s", (x, 0), (0, 6), ha="center", fontsize=8,
                                  textcoords="offset points")  # fmt: skip
            else:
                axis.plot(places, values, "o-", label=key)
        shown = [key for key in keys if key != "start, s"]
        axis.set_ylim(0, 1.12 * max(p[key] for p in points for key in shown))
        if name in ("batch", "data"):
            axis.set_xscale("log")
            axis.margins(x=0.12)
        axis.set_xticks(places, [f"{x:,}" for x in places])
        axis.minorticks_off()
        axis.set(xlabel=LABELS[name], ylabel=shown[0] if len(shown) == 1 else "MiB")
        if name == "image":
            axis.axvline(64.5, color="#999999", linewidth=1, linestyle=":")
            axis.text(67, 0, "standard stem →", fontsize=8, color="#555555", va="bottom")
        if len(shown) > 1:
            axis.legend(frameon=False, loc=(0.05, 0.25))
    for axis in axes.flat[len(curves) :]:
        axis.remove()
    figure.savefig(file, dpi=110)


def main():
    kinds = [*LABELS, "parts"]
    arg_parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg_parser.add_argument(
        "--only", nargs="*", choices=kinds, default=kinds, help="some of the curves"
    )
    arg_parser.add_argument("--keep", action="store_true", help="the rest as OUT.json has it")
    arg_parser.add_argument("--out", type=Path, default=Path(__file__).with_name("GROWTH"),
                      help="writes OUT.md, OUT.png and OUT.json")  # fmt: skip
    arg_parser.add_argument("--quick", action="store_true", help="does it run?")
    args = arg_parser.parse_args()
    kept = args.out.with_suffix(".json")
    found = json.loads(kept.read_text()) if args.keep else {"curves": {}}
    found.setdefault("machine", machine())
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_DATASETS_CACHE"] = cache = f"{temporary}/cache"
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        for kind in args.only:
            if kind == "parts":
                found["parts"], found["parts_machine"] = measure_parts(args.quick), machine()
            elif kind == "data":
                found["curves"][kind] = data_curve(temporary, cache, args.quick)
            elif kind == "members":
                found["curves"][kind] = members_curve(temporary, args.quick)
            else:
                found["curves"][kind] = sweep(kind, temporary, cache, args.quick)
            kept.write_text(json.dumps(found, indent=1))
    picture = args.out.with_suffix(".png")
    draw_curves(found, picture)
    page = markdown(found, picture.name)
    args.out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
