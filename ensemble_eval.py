"""Compare and combine trained networks: which combination is best, by how much, is it real?

accelerate launch ensemble_eval.py runs/a runs/b runs/c               report.md, with its pictures
accelerate launch ensemble_eval.py runs/a runs/b --tta flip           two views of every image
accelerate launch ensemble_eval.py runs/a runs/b --tta shift,crops:5  both against one view
accelerate launch ensemble_eval.py runs/a --tta random:8              one network, nine views
accelerate launch ensemble_eval.py runs/a runs/b --member_weights 0.7,0.3
accelerate launch ensemble_eval.py runs/fold1 runs/fold2 runs/fold3   a cross-validation by --fold
"""

from harness.cli import flags


def read_flags(argv=None):
    parser = flags.Parser(__doc__)
    flags.ensemble_flags(parser)
    flags.running_flags(parser, trains=False)
    flags.report_flags(parser, name="ensemble-RUN+RUN+…")
    return parser.read(argv)


if __name__ == "__main__":  # before torch is imported: --help and a mistyped flag answer at once
    args = read_flags()

import torch

from harness.data.options import SplitOptions
from harness.ensembles import combinations, comparison, crossvalidation, report
from harness.ensembles.crossvalidation import find_folds
from harness.ensembles.members import find_images, read_members, view_sets
from harness.ensembles.predictions import Predictions, progress
from harness.ensembles.soups import Soups, groups_of
from harness.errors import UserError
from harness.files import replace_file
from harness.launch import make_accelerator, script
from harness.models.calibration import keep_temperature
from harness.models.trained import load_model
from harness.processes import from_local_main, in_turn
from harness.reports import training as training_report
from harness.tracking import Tracking, TrackingOptions
from harness.training.folder import FolderOptions, claim_report, report_folder
from tricks.ensemble import average_logits, average_probabilities


def main(args):
    accelerator, machine = make_accelerator(args.mixed_precision, 1, args.threads, args.seed)

    # members, views, images: whatever can be refused is refused before any long work
    members = in_turn(accelerator, lambda: read_members(args.members))
    names = [member.name for member in members]
    folder_options = flags.pick(FolderOptions, args)
    folder = report_folder(folder_options, report.default_name(names), "ensemble_eval.py")
    weights = args.member_weights
    if weights and len(weights) != len(members):
        raise UserError(f"--member_weights has {len(weights)} for {len(members)} members")
    sizes = {member.preprocessing.size for member in members}
    split_options = flags.pick(SplitOptions, args)
    folds = from_local_main(accelerator, lambda: find_folds(members, split_options))
    if folds:
        return score_folds(args, accelerator, machine, folder, folds)
    views = view_sets(args.tta, sizes, args.seed)  # {kind: {size: views}}; the first is combined
    images = from_local_main(accelerator, lambda: find_images(members, split_options))
    groups = groups_of(members) if args.soup else []
    accelerator.print(report.plan(members, images, list(views), groups, machine))
    if args.dry_run:
        return

    # predictions: one forward pass for each member and view, or the file of an earlier pass
    splits = {"scored": images.scored} | ({"fitted": images.fitted} if images.fitted else {})
    labels = {role: torch.from_numpy(split.labels) for role, split in splits.items()}
    predictions = Predictions(
        accelerator, splits, images.image_column, args.seed, machine["device"], accelerator.print,
        args.verify_cache,
    )  # fmt: skip
    missing = []
    for member in members:
        all_views = [view for kind in views for view in views[kind][member.preprocessing.size]]
        missing.append(predictions.recall(member, all_views))
    models = [load_model(member) if m else None for member, m in zip(members, missing, strict=True)]
    with progress(accelerator, sum(map(predictions.count, missing))) as bar:
        for member, model, member_views in zip(members, models, missing, strict=True):
            if member_views:
                model.to(accelerator.device, memory_format=torch.channels_last)
                predictions.compute(member, model, member_views, bar)
                model.to("cpu")

    # combinations: from here on everything works on logits
    def member_logits(kind, role):
        return torch.stack(
            [predictions.logits(m, role, views[kind][m.preprocessing.size]) for m in members]
        )

    kind = next(iter(views))
    logits = {role: member_logits(kind, role) for role in splits}
    results = combinations.member_results(names, logits, labels, args.seed)
    soups = Soups(accelerator, members, images, predictions, views[kind], folder, args.seed)
    if len(members) > 1:
        results += combinations.combined_results(
            names, logits, labels, args.seed, average=args.average, weights=weights
        )
        singles = results[: len(members)]
        results += combinations.soup_results(groups, soups.logits, singles, labels, args.seed)
    if not accelerator.is_main_process:
        return
    if images.fitted:  # each member's own temperature, for predict.py and exports
        for member, fit_logits in zip(members, logits["fitted"], strict=True):
            keep_temperature(member, fit_logits, labels["fitted"], images.fitted.name)

    # comparison: intervals, tests, diversity, what views gain
    mean = average_logits if args.average == "logits" else average_probabilities
    predicted = {}
    for name in views:
        view_logits = member_logits(name, "scored")
        predicted[name] = dict(zip(names, view_logits.argmax(2), strict=True))
        predicted[name]["average"] = mean(view_logits).argmax(1)
    truth = labels["scored"]
    facts = {
        "name": folder.name,
        "source": images.source,
        "views": kind,
        "precision": machine["precision"],
        **comparison.facts(results, logits["scored"], truth, members, images, args.average),
        "view_gains": comparison.view_gains(predicted, truth),
        "cost": {
            "device": predictions.devices(),
            "images_per_second": predictions.speeds(members, views),
        },
    }

    # report: the answer first, pictures take a second
    print(report.answer(facts), flush=True)
    claim_report(folder, "ensemble_eval.py")
    report.write(folder, facts, predictions.samples("scored", members[0].preprocessing))
    replace_file(folder / "config.yaml", flags.to_yaml(flags.to_recipe(args)))
    soups.save_all(results)
    tracking = Tracking(
        accelerator, flags.pick(TrackingOptions, args), folder=folder, job_type="ensemble",
        tags=report.tags(members),
    )  # fmt: skip
    report.track(tracking, facts, folder)
    print(report.closing(folder, tracking.line))


def score_folds(args, accelerator, machine, folder, folds):
    """Score a cross-validation: one report on all images, each predicted by the run without it."""
    crossvalidation.check_flags(args.given, args.tta)
    for fold in folds:
        accelerator.print(
            f"fold         {fold.number} of {len(folds)}: {fold.member.name}, "
            f"{len(fold.split):,} held-out images"
        )
    split = crossvalidation.joined(folds)
    accelerator.print(f"scored       {len(split):,} images, each by the run that held it out")
    if args.dry_run:
        return
    predictions = Predictions(
        accelerator, {f"fold {fold.number}": fold.split for fold in folds}, folds[0].image_column,
        args.seed, machine["device"], accelerator.print, args.verify_cache,
    )  # fmt: skip
    logits, samples = [], []
    for fold in folds:
        member, role = fold.member, f"fold {fold.number}"
        size = member.preprocessing.size
        views = next(iter(view_sets(args.tta, {size}, args.seed).values()))[size]
        missing = predictions.recall(member, views, [role])
        with progress(accelerator, predictions.count(missing)) as bar:
            if missing:
                model = load_model(member).to(accelerator.device, memory_format=torch.channels_last)
                predictions.compute(member, model, missing, bar)
        logits.append(predictions.logits(member, role, views))
        samples.append(predictions.samples(role, member.preprocessing))
    if not accelerator.is_main_process:
        return
    classes = folds[0].member.classes
    facts, all_samples = crossvalidation.facts(folder.name, folds, samples, logits, classes)
    claim_report(folder, "ensemble_eval.py")
    (folder / "accuracy.png").unlink(missing_ok=True)  # of an ensemble that this report replaces
    training_report.write(folder, facts, all_samples)
    replace_file(folder / "config.yaml", flags.to_yaml(flags.to_recipe(args)))
    print(f"\n{training_report.headline(facts)}\nreport       {folder}/report.md, mistakes.csv")


if __name__ == "__main__":
    with script("ensemble_eval.py"):
        main(args)
