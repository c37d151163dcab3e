"""Ask trained networks about images: which class, how sure, and when to abstain.

accelerate launch predict.py runs/x photo.jpg photos/ 'more/*.png'    predictions.csv, a sheet
accelerate launch predict.py runs/x runs/y photos/ --tta flip         their average, two views
accelerate launch predict.py runs/x photos/ --coverage 0.95           sets with a guarantee
accelerate launch predict.py runs/x photos/ --min_probability 0.8     abstains under it
accelerate launch predict.py runs/x --dataset owner/name --split test
"""

from harness.cli import flags


def read_flags(argv=None):
    parser = flags.Parser(__doc__)
    flags.predict_flags(parser)
    flags.running_flags(parser, trains=False)
    flags.folder_flags(parser, name="predict-RUN+RUN+…")
    return parser.read(argv)


if __name__ == "__main__":  # before torch is imported: --help and a mistyped flag answer at once
    args = read_flags()

from harness.data.options import SplitOptions
from harness.ensembles.members import view_sets
from harness.ensembles.predictions import progress
from harness.ensembles.report import default_name
from harness.errors import UserError
from harness.files import replace_file
from harness.inference import report
from harness.inference.images import find_images, runs_and_paths
from harness.inference.probabilities import load_networks, probabilities_of
from harness.inference.sets import fit_sets
from harness.launch import make_accelerator, script
from harness.processes import from_local_main, in_turn
from harness.training.folder import FolderOptions, claim_report, report_folder


def main(args):
    accelerator, machine = make_accelerator(args.mixed_precision, 1, args.threads, args.seed)

    # networks and images: whatever can be refused is refused before any long work
    runs, paths = in_turn(accelerator, lambda: runs_and_paths(args.inputs or []))
    views = view_sets(args.tta, {run.preprocessing.size for run in runs}, args.seed)
    split_options = flags.pick(SplitOptions, args)
    images = from_local_main(accelerator, lambda: find_images(paths, split_options, runs[0]))
    name = default_name([run.name for run in runs]).replace("ensemble-", "predict-", 1)
    folder_options = flags.pick(FolderOptions, args)
    folder = report_folder(folder_options, name, "predict.py")
    networks = load_networks(runs, next(iter(views.values())), accelerator.device)

    def bar(count):
        return progress(accelerator, count)

    sets = None
    if args.coverage:
        sets = fit_sets(accelerator, networks, runs, args.sets, args.coverage, args.seed, bar)
    options = flags.pick(report.PredictionOptions, args)
    accelerator.print(report.plan(images, networks, sets, options, machine))
    if args.dry_run:
        return

    # probabilities: threads decode while the network computes; the top k of each image are kept
    keep = report.keeper(args.top_k, sets, images.labels)
    with bar(len(images)) as progress_bar:
        predictions, reasons = probabilities_of(accelerator, networks, images, keep, progress_bar)
    if len(reasons) == len(images):
        raise UserError(f"none of the {len(images):,} images can be read: {images.names[0]}: "
                        f"{reasons[0]}")  # fmt: skip
    if not accelerator.is_main_process:
        return

    # results: the answer first
    classes = runs[0].classes
    rows = list(report.rows_of(images, predictions, reasons, classes, options))
    summary = report.summarise(images, predictions, reasons, networks, sets, options)
    for line in report.lines_of(rows, options):
        print(line)
    claim_report(folder, "predict.py")
    report.write(folder, rows, images, predictions, classes, runs, options, summary)
    replace_file(folder / "config.yaml", flags.to_yaml(folder_options.recipe))
    print(report.closing(folder, summary, options))


if __name__ == "__main__":
    with script("predict.py"):
        main(args)
