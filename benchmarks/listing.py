"""Finding the images of a folder at a second start, against `datasets`' imagefolder.

    python benchmarks/listing.py                     21,000 small images, both
    python benchmarks/listing.py --files 1300000     that many empty files, ours alone

Each side is a whole second start of a new process, in CPU seconds (import of what it needs
included, and measured alone as well): ours lists the tree and makes the data set of paths, the
peer finds it in its cache. Wants the files' inodes: 1.3 million are made in a minute or two.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, Row, over, parser, read, report

CLASSES = 1000
IMPORT = "import datasets, torch; "
SIDES = {
    "import": IMPORT,
    "ours": IMPORT + "from harness.data.images import load_images; "
    "print(len(load_images({folder!r}).splits['train']))",
    "datasets": IMPORT + "print(len(datasets.load_dataset('imagefolder', data_dir={folder!r}, "
    "split='train')))",
}


def make(folder, files):
    """So many files in class folders: one image, copied, or empty files where there are many."""
    from PIL import Image

    image = folder / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    content = image.read_bytes() if files <= 100_000 else b""
    image.unlink()
    for k in range(files):
        place = folder / f"class{k % CLASSES:04d}"
        if k < CLASSES:
            place.mkdir()
        (place / f"{k:08d}.png").write_bytes(content)


def start(code, folder):
    """(CPU seconds, wall seconds) of a new process, and the peak memory of the largest so far."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code.format(folder=str(folder))],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - began, after.ru_maxrss / 2**20


def main():
    arg_parser = parser(__doc__, rounds=5)
    arg_parser.add_argument("--files", type=int, default=21_000, help="--quick: 1,000")
    args = read(arg_parser)
    files = 1_000 if args.quick else args.files
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        folder.mkdir()
        make(folder, files)
        if files > 100_000:
            for name in ("import", "ours"):
                cpu, wall, memory = start(SIDES[name], folder)
                print(f"{name:8} {files:,} files: {cpu:.1f} CPU s, {wall:.1f} s, {memory:.2f} GiB")
            return
        seconds = {name: [] for name in SIDES}
        for n in range(args.rounds + 1):  # the first fills the peer's cache and is not counted
            for name, code in SIDES.items():
                cpu, *_ = start(code, folder)
                if n:
                    seconds[name].append(cpu)
    bare = {
        name: [max(a - b, 1e-3) for a, b in zip(seconds[name], seconds["import"], strict=True)]
        for name in ("ours", "datasets")
    }
    rows = [
        Row("second start: CPU of imagefolder / ours", over(bare["datasets"], bare["ours"]), 1.0),
        Row("second start, ours: CPU s under import", bare["ours"], 1.0, at_most=True),
        Row("second start, imagefolder: CPU s", bare["datasets"]),
    ]
    report(args, rows, f"{files:,} files, CPU seconds of a new process less its imports")


if __name__ == "__main__":
    main()
