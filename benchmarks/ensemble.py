"""What the evaluation of an ensemble costs: ours against bare passes and the usual evaluations.

    python benchmarks/ensemble.py --runs runs/a runs/b runs/c
    python benchmarks/ensemble.py --data FOLDER    on networks of one step: the time is the same

In turns, each in this process and on the same images, for as many rounds as asked for:

- ours: all of ensemble_eval.py --tta flip: decoded images found, predictions of every member in two
  views for the scored and the fitted images, all combinations, the comparison, the report. Without
  soups, which are more networks than the members.
- bare: as many forward passes on one synthetic batch that lies on the device, in the same
  precision, channels_last, inference mode; nothing else.
- plain: an evaluation of the usual kind for each member, of the same images: PIL transforms in a
  DataLoader of two workers, fp32, NCHW, an image's and its mirror image's softmax averaged.

Then, each a process of its own: ensemble_eval.py where predictions are kept, imports included.
The runs are copied, their kept predictions stay as they are.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from measure import ROOT, Row, data_flag, parser, read, report
from PIL import Image
from processes import folder_of, launch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import ensemble_eval
from harness.data.options import SplitOptions
from harness.ensembles.members import find_images, read_members
from harness.launch import make_accelerator
from harness.models.trained import load_model
from harness.training.scoring import BATCH, BATCH_PIXELS

SIDES = ("bare", "ours", "plain", "kept")
ASKED = ["--tta", "flip", "--no_soup", "--report_to", "none"]


class Encoded(Dataset):
    """The images of a split as files, decoded and transformed one by one."""

    def __init__(self, split, column, preprocessing):
        rows = split.dataset.select(split.rows).select_columns(column)
        self.rows, self.column, self.labels = rows.with_format("arrow"), column, split.labels
        self.transform = transforms.Compose([
            transforms.Resize(preprocessing.stored_size), transforms.CenterCrop(preprocessing.size),
            transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std),
        ])  # fmt: skip

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, k):
        encoded = self.rows[k : k + 1][self.column].to_pylist()[0]["bytes"]
        return self.transform(Image.open(io.BytesIO(encoded)).convert("RGB")), self.labels[k]


def ours(folders, output, limit):
    for folder in folders:
        shutil.rmtree(folder / "predictions", ignore_errors=True)
    words = [*ASKED, "--output_dir", output, *limit]
    args = ensemble_eval.read_flags([*map(str, folders), *words, "--run_name", "report"])
    AcceleratorState._reset_state(True)
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        ensemble_eval.main(args)
    return time.perf_counter() - began


@torch.inference_mode()
def bare(accelerator, members, models, splits):
    began = time.perf_counter()
    for member, model in zip(members, models, strict=True):
        size = member.preprocessing.size
        most = min(max(BATCH_PIXELS // member.preprocessing.stored_size**2, BATCH[0]), BATCH[1])
        batch = torch.randn(most, 3, size, size, device=accelerator.device)
        batch = batch.to(memory_format=torch.channels_last)
        for split in splits:
            for start in range(0, len(split), most):
                for _ in range(2):
                    with accelerator.autocast():
                        model(batch[: len(split) - start])
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def plain(device, members, models, splits, column):
    began = time.perf_counter()
    for member, model in zip(members, models, strict=True):
        for split in splits:
            right = 0
            images = Encoded(split, column, member.preprocessing)
            for batch, labels in DataLoader(images, 128, num_workers=2):
                batch = batch.to(device)
                both = model(batch).softmax(1) + model(batch.flip(-1)).softmax(1)
                right += (both.argmax(1).cpu() == labels).sum().item()
    return time.perf_counter() - began


def kept(folders, output, limit):
    """Seconds until the answer is on the terminal, and to the end of the process."""
    words = [*ASKED, "--output_dir", output, *limit]
    command = [sys.executable, str(ROOT / "ensemble_eval.py"), *map(str, folders[:2]), *words]
    began, answered = time.perf_counter(), None
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=dict(os.environ), **pipes) as process:
        for line in process.stdout:
            if line.startswith("best "):
                answered = time.perf_counter() - began
    assert process.returncode == 0 and answered
    return answered, time.perf_counter() - began


def make_runs(models, data, temporary):
    """Folders of networks that were trained for one step on `data`, a tenth of it held out.

    The same tenth of each, or else a new pair of members is fitted on other images than the three.
    """
    folders, cache = [], os.environ["HF_DATASETS_CACHE"]
    data, _ = folder_of(data, temporary, count=4000)
    for number, model in enumerate(models):
        flags = {"dataset": data, "model": model, "val_fraction": 0.1, "max_steps": 1,
                 "lr": 0.01 * (number + 1), "batch_size": 32, "max_eval_samples": 32}  # fmt: skip
        output = Path(temporary) / "trained" / f"{model}-{number}"
        output.mkdir(parents=True)
        _, folder, _ = launch(flags, str(output), cache, [sys.executable])
        folders.append(folder.rename(output / output.name))
    return folders


def read_args():
    arg_parser = parser(__doc__, rounds=5)
    data_flag(arg_parser)
    arg_parser.add_argument("--runs", nargs="+", help="folders of trained runs; unset: --models")
    arg_parser.add_argument("--models", nargs="+", default=["resnet18", "resnet18", "resnet18"])
    arg_parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    arg_parser.add_argument("--max_eval_samples", type=int, help="a quicker look")
    args = read(arg_parser)
    if args.quick:
        args.max_eval_samples, args.models = 64, ["shufflenet_v2_x0_5"] * 2
    return args


def main():
    args = read_args()
    limit = ["--max_eval_samples", str(args.max_eval_samples)] if args.max_eval_samples else []
    accelerator, words = make_accelerator()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("HF_DATASETS_CACHE", f"{temporary}/cache")
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        runs = args.runs or make_runs(args.models, args.data, temporary)
        folders = [Path(temporary) / "runs" / Path(run).name for run in runs]
        for run, folder in zip(runs, folders, strict=True):
            leave = shutil.ignore_patterns("predictions", "checkpoints", "wandb")
            shutil.copytree(run, folder, ignore=leave)
        members = read_members(folders)
        images = find_images(members, SplitOptions(max_eval_samples=args.max_eval_samples))
        splits = [split for split in (images.scored, images.fitted) if split]
        fast = [load_model(m).to(accelerator.device, memory_format=torch.channels_last)
                for m in members]  # fmt: skip
        usual = [load_model(member).to(accelerator.device) for member in members]
        rounds = []
        ours(folders, temporary, limit)  # decodes what is not decoded yet
        for number in range(args.rounds):
            seconds = {}
            if "bare" in args.sides:
                seconds["bare"] = bare(accelerator, members, fast, splits)
            if "ours" in args.sides:
                seconds["ours"] = ours(folders, temporary, limit)
            if "plain" in args.sides:
                column = images.image_column
                seconds["plain"] = plain(accelerator.device, members, usual, splits, column)
            if "kept" in args.sides:
                seconds["answer"], seconds["kept"] = kept(folders, temporary, limit)
            rounds.append(seconds)
            line = json.dumps({k: round(v, 2) for k, v in seconds.items()})
            print(number + 1, line, file=sys.stderr, flush=True)
    new_pair = "kept predictions, a new pair of members"
    figures = {  # at most, or the usual evaluations' at least
        "ensemble: ours / bare forward passes": (lambda r: r["ours"] / r["bare"], 1.1),
        "ensemble: usual evaluations / ours": (lambda r: r["plain"] / r["ours"], 2.5),
        f"{new_pair}, to the answer, s": (lambda r: r["answer"], 5),
        f"{new_pair}, to the end of the process, s": (lambda r: r["kept"], None),
    }
    rows = []
    for name, (figure, wanted) in figures.items():
        with contextlib.suppress(KeyError):  # of a side that was left out
            values = [figure(r) for r in rounds]
            rows.append(Row(name, values, wanted, at_most="usual" not in name))
    setting = (
        f"{words['device']}, {words['precision']}, {sum(map(len, splits)):,} images, members: "
    )
    report(args, rows, setting + ", ".join(m.config["architecture"] for m in members))


if __name__ == "__main__":
    main()
