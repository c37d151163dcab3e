"""Export a trained network to one file or folder that is checked and includes preprocessing.

accelerate launch export.py runs/x --to onnx                     pixels in, probabilities out
accelerate launch export.py runs/x --to onnx --precision int8    a quarter of the size, judged
accelerate launch export.py runs/x --to torch                    torch.export, .pt2
accelerate launch export.py runs/x --to timm                     for timm.create_model
accelerate launch export.py runs/x --to hub --push owner/name    with its card, private
"""

from harness.cli import flags


def read_flags(argv=None):
    parser = flags.Parser(__doc__)
    flags.export_flags(parser)
    flags.running_flags(parser, precision=False, trains=False)
    flags.folder_flags(parser, name="export-RUN-KIND")
    return parser.read(argv)


if __name__ == "__main__":  # before torch is imported: --help and a mistyped flag answer at once
    args = read_flags()

import os

import torch

from harness.errors import UserError
from harness.export import folders, graphs, hub
from harness.export.images import check_images
from harness.files import replace_file
from harness.launch import make_accelerator, script
from harness.models.calibration import read_calibration
from harness.models.trained import load_model, read_trained
from harness.processes import only_process
from harness.reports.card import write_card
from harness.training.folder import FolderOptions, claim_report, report_folder

WRITTEN = {"onnx": ["model.onnx"], "torch": ["model.pt2"],
           "timm": ["model.safetensors", "config.json"]}  # fmt: skip
WRITTEN["hub"] = WRITTEN["timm"]


def main(args):
    accelerator, _ = make_accelerator("no", 1, args.threads, args.seed)
    only_process(accelerator, "export.py")

    # whatever can be refused is refused before any work
    if not args.run:
        raise UserError("give the folder of a trained run: export.py runs/x --to onnx")
    if args.precision != "fp32" and args.to != "onnx":
        raise UserError(f"--precision {args.precision} has no effect with --to {args.to}")
    if args.push and args.to != "hub":
        raise UserError(f"--push has no effect with --to {args.to}")
    if args.to == "onnx":
        graphs.need("onnx", "onnxscript", "onnxruntime")
    trained = read_trained(args.run)
    folder_options = flags.pick(FolderOptions, args)
    folder = report_folder(folder_options, f"export-{trained.name}-{args.to}", "export.py")
    calibration = read_calibration(trained)
    temperature = calibration["temperature"] if calibration else 1.0
    images = check_images(trained, args.dataset, args.seed, args.precision == "int8")
    print(f"network      {trained.name}: {trained.config['architecture']}, "
          f"{trained.preprocessing.size} px, {len(trained.classes):,} classes, temperature "
          f"{temperature:.3f}{'' if calibration else ' (no calibration.json)'}")  # fmt: skip
    print(f"checked on   {images.source}")
    if args.dry_run:
        return

    # the run's own answers, in fp32
    preprocessing = trained.preprocessing
    classifier = graphs.Classifier(
        load_model(trained), preprocessing.mean, preprocessing.std, temperature
    ).eval()
    expected = graphs.run_module(classifier, images.batches)
    claim_report(folder, "export.py")
    if args.to in ("onnx", "torch"):
        metadata = graphs.metadata_of(trained, temperature, images.batches[0][0], expected[0])
        write_graph(args, trained, classifier, images, expected, folder, metadata)
    else:
        pixels = images.batches[0]
        with torch.inference_mode():
            logits = classifier.model(pixels.float() * classifier.factor - classifier.shift)
        distance = folders.write_timm(trained, folder, logits, pixels)
        print(f"timm         loads the folder; its logits differ by at most {distance:.1e}")

    # the card, and the Hub
    write_card(folder, trained, calibration, args.to, args.license)
    replace_file(folder / "config.yaml", flags.to_yaml(folder_options.recipe))
    for name in set(WRITTEN["onnx"] + WRITTEN["torch"] + WRITTEN["timm"]) - set(WRITTEN[args.to]):
        (folder / name).unlink(missing_ok=True)  # of an earlier export of another kind
    print(f"exported     {folder}/{', '.join(sorted(p.name for p in folder.glob('[!.]*')))}")
    if args.to == "hub":
        print(hub.push(folder, args.push, args.private))


def write_graph(args, trained, classifier, images, expected, folder, metadata):
    """Write model.onnx or model.pt2, after checking that it answers as the run's network does."""
    preprocessing, size = trained.preprocessing, trained.preprocessing.size
    final = folder / ("model.onnx" if args.to == "onnx" else "model.pt2")
    unchecked = folder / f".{final.stem}.writing{final.suffix}"
    temporary = [unchecked]
    try:
        if args.to == "torch":
            graphs.write_torch(classifier, size, unchecked, metadata)
            probabilities = graphs.run_torch(unchecked, images.batches)
        else:
            graphs.write_onnx(classifier, size, unchecked, metadata)
            probabilities = graphs.run_onnx(unchecked, images.batches)
        distance, changes = graphs.differences(probabilities, expected)
        print(f"fp32         probabilities differ by at most {distance:.1e}; {changes} of "
              f"{len(expected):,} images get another class")  # fmt: skip
        if not distance <= graphs.TOLERANCE or changes:
            raise UserError("the export gives other answers than the run's network: not written")
        if args.precision == "fp16":
            half = graphs.Classifier(
                load_model(trained),
                preprocessing.mean,
                preprocessing.std,
                classifier.temperature,
                torch.float16,
            )
            graphs.write_onnx(half.eval(), size, unchecked, metadata)
        elif args.precision == "int8":
            temporary.append(folder / ".fp32.writing.onnx")
            os.replace(unchecked, temporary[-1])
            graphs.write_int8(temporary[-1], unchecked, images.calibration)
        if args.precision != "fp32":
            images.check_drop(
                graphs.run_onnx(unchecked, images.batches),
                expected,
                args.precision,
                args.max_accuracy_drop,
            )
        os.replace(unchecked, final)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)


if __name__ == "__main__":
    with script("export.py"):
        main(args)
