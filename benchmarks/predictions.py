"""predict.py's way from files to probabilities, against its two halves alone.

    python benchmarks/predictions.py --images FOLDER

FOLDER: of image files. Every side sees the same files: decoding alone (all threads, as predict.py
decodes), forward passes alone (on pixels that are decoded already, in the same batches), and the
whole. On a CPU both halves want the same cores, so their sum is what can be had; with a GPU it is
the larger of the two. The network is a run's, or without --run one of random weights.
"""

import contextlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measure import Row, over, parser, read, report, seconds_in_turns

from harness.data.listing import find_files
from harness.data.making import threads
from harness.inference import probabilities
from harness.inference.images import Images
from harness.inference.probabilities import BATCH, Network, probabilities_of
from harness.launch import make_accelerator
from harness.models.trained import load_model, read_trained
from tricks.tta import tta_views


def random_run(folder, name, size):
    """The folder of a run whose network has learned nothing."""
    import json

    from safetensors.torch import save_file

    from harness.models import build

    model = build.build_model(name, 10, image_size=size, stem="standard")
    classes = [str(k) for k in range(10)]
    config = build.model_config(name, classes, size, (0.5,) * 3, (0.2,) * 3, stem="standard")
    (folder / "config.json").write_text(json.dumps(config | {"crop_pct": 0.875}))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def main():
    arg_parser = parser(__doc__, rounds=5)
    arg_parser.add_argument("--images", required=True, help="a folder of image files")
    arg_parser.add_argument(
        "--run", help="folder of a trained run; unset: --model with random weights"
    )
    arg_parser.add_argument("--model", default="resnet18")
    arg_parser.add_argument("--size", type=int, default=224)
    arg_parser.add_argument("--most", type=int, default=2000, help="files")
    args = read(arg_parser)
    files = find_files([args.images])[: 100 if args.quick else args.most]
    images = Images([str(file) for file in files], files.__getitem__, None, "")
    accelerator, machine = make_accelerator("auto", 1, None, 0)
    with tempfile.TemporaryDirectory() as folder:
        run = read_trained(args.run or random_run(Path(folder), args.model, args.size))
        model = load_model(run).to(accelerator.device, memory_format=torch.channels_last)
    preprocessing = run.preprocessing
    network = Network(run, model, tta_views("none", preprocessing.size), 1.0, True)

    def decode():
        with ThreadPoolExecutor(threads()) as pool:
            return list(
                pool.map(
                    lambda k: probabilities.decode_one(images, k, [preprocessing]),
                    range(len(images)),
                )
            )

    pixels = torch.stack([found[0] for found in decode()])

    def forward():
        for index in torch.arange(len(pixels)).split(BATCH):
            probabilities.forward(accelerator, [network], {preprocessing: pixels[index]}, index)

    def whole():
        bar = type("Bar", (), {"total": len(images), "n": 0, "update": lambda self, n: None})()
        probabilities_of(accelerator, [network], images, lambda index, _: list(index), bar)

    sides = {"decoding": decode, "forward": forward, "whole": whole}
    with contextlib.redirect_stdout(None):
        taken = seconds_in_turns(sides, args.rounds)
    halves = zip(taken["decoding"], taken["forward"], strict=True)
    alone = [a + b if accelerator.device.type == "cpu" else max(a, b) for a, b in halves]
    what = "their sum" if accelerator.device.type == "cpu" else "the larger"
    network = f"{run.config['architecture']} at {preprocessing.size} px, {machine['precision']}"
    rows = [
        Row(f"{network}: predict.py / decoding and forward passes alone, {what}",
            over(taken["whole"], alone), 1.1, at_most=True),
        Row(f"{network}: images/s of predict.py", [len(images) / s for s in taken["whole"]]),
        Row(f"{network}: images/s of decoding alone", [len(images) / s for s in taken["decoding"]]),
        Row(f"{network}: images/s of forward passes alone",
            [len(images) / s for s in taken["forward"]]),
    ]  # fmt: skip
    report(args, rows, f"{machine['device']}, {len(images):,} files")


if __name__ == "__main__":
    main()
