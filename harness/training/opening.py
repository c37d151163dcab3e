"""How a training script opens (processes, folder, data, first weights) and how it closes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator

from harness.cli import flags
from harness.console import one_line
from harness.counters import generator
from harness.data.options import DataOptions
from harness.data.preprocessing import Preprocessing, PreprocessingOptions
from harness.data.sources import Data
from harness.data.stores import (
    StoreOptions,
    choose_store,
    decode_splits,
    describe_prepared,
    identical_images,
)
from harness.errors import UserError
from harness.launch import make_accelerator
from harness.models import build, calibration
from harness.models.calibration import fit_calibration
from harness.models.heads import start_heads
from harness.models.names import find_model
from harness.models.trained import check_classes, read_trained
from harness.models.weights import find_weights, load_pretrained
from harness.processes import check_same, from_main, in_turn
from harness.reports import card, page
from harness.reports import training as report
from harness.reports.slices import check_slices
from harness.training import plan
from harness.training.folder import (
    FolderOptions,
    check_folder,
    default_name,
    is_finished,
    recipe_in,
)
from harness.training.imbalance import check_flags
from harness.training.run import Run, RunOptions
from harness.training.state import content_changes


@dataclass(frozen=True)
class ModelOptions:
    """The flags of the network and of its first weights."""

    model: str
    dropout: float
    weights_by_order: bool
    seed: int
    head: str = "linear"


class Opening(NamedTuple):
    """What a script knows before it makes a network."""

    script: str  # its file name
    model_options: ModelOptions
    store_options: StoreOptions
    run_options: RunOptions
    accelerator: Accelerator
    machine: dict[str, str]  # what the plan says of it, by row
    folder: Path
    data: Data
    pretrained: Any  # from harness.models.weights.find_weights
    preprocessing: Preprocessing
    rows: dict[str, str]  # of the plan, on where the preprocessing and the pixels come from
    stem: str  # as resolved
    setup_seconds: dict  # {"start": since this process began}; "decoding" once that is done


def make_network(opening, init):
    """(model, harness.models.weights.Loaded, the name of the initialisation of new weights).

    init: of `--init`, for the weights that `--weights` does not give. The model is on the device,
    channels_last.
    """
    options, size = opening.model_options, opening.preprocessing.size
    pretrained, classes = opening.pretrained, opening.data.classes
    model = build.build_model(
        options.model, len(classes), image_size=size, stem=opening.stem, dropout=options.dropout,
        head=options.head,
    )  # fmt: skip
    initialisation = build.initialise(model, init, generator(options.seed, "init"))
    loaded = load_pretrained(model, pretrained, classes, options.weights_by_order)
    if loaded.head_is_new and pretrained.state:
        initialisation = start_heads(model, size, generator(options.seed, "head"))
    model.to(opening.accelerator.device, memory_format=torch.channels_last)
    return model, loaded, initialisation


def decode_images(opening):
    """{role: Samples} of all splits; images of val and test that train holds, too, are printed.

    With `--prepare_data` the place and the size of what was stored are printed, too.
    """
    options = opening.store_options
    data, preprocessing, accelerator = opening.data, opening.preprocessing, opening.accelerator
    start = time.perf_counter()
    splits = decode_splits(
        data, preprocessing, accelerator, shard=options.shard_store, verify=options.verify_cache
    )
    if options.jpeg_decoder == "nvjpeg":
        splits["train"].stored.on_gpu = True
    if accelerator.is_main_process:
        for line in identical_images(data, preprocessing, splits):
            print(one_line(line), flush=True)
    opening.setup_seconds["decoding"] = time.perf_counter() - start
    if options.prepare_data:
        accelerator.print(f"prepared     {describe_prepared(data, splits)}")
    return splits


def start_run(opening, splits, model, optimizer, ema, length, identity=None):
    """The Run that trains `model`; it continues a checkpoint where `--resume_from_checkpoint` asks.

    splits: {role: Samples}. ema: a ModelEma or None. length: Length. identity: facts, besides those
    of the data, that a resumed run must share with the one it continues.
    """
    data, preprocessing, options = opening.data, opening.preprocessing, opening.model_options
    config = plan.result_config(
        options.model, options.dropout, data, preprocessing, opening.stem,
        opening.script.removesuffix(".py"), opening.pretrained, options.head,
    )  # fmt: skip
    return Run(
        opening.run_options, opening.accelerator, opening.folder, model, optimizer, ema, length,
        config=config, identity=plan.identity(data, preprocessing, splits) | (identity or {}),
    )  # fmt: skip


def finish_run(opening, run, splits, predict, facts=None, tta=None):
    """Write the result and its reports, and print the score and where they are.

    predict, facts and tta: of `Run.finish`.
    """
    options = opening.run_options
    write_reports = report_writer(opening, splits, options.slice_by)
    summary = run.finish(predict, facts, tta, write_reports, opening.setup_seconds)
    opening.accelerator.print(plan.closing(summary, opening.folder, run.record.tracking.line))


def report_writer(opening, splits, slice_by):
    """A function (role, logits, val_logits) that writes all reports into the finished run's folder.

    splits: {role: harness.data.stores.Samples}. slice_by: of the flag. The temperature is fitted to
    val_logits; they are None where val did not choose the weights, and then no temperature is
    fitted. Where nothing was scored, role and logits are None, and only README.md and report.html
    are written.
    """
    data, folder = opening.data, opening.folder

    def write(role, logits, val_logits):
        if role:
            write_scores(role, logits, val_logits)
        trained = read_trained(folder)
        card.write_card(folder, trained, calibration.read_calibration(trained), "run")
        page.write_page(folder, trained)

    def write_scores(role, logits, val_logits):
        temperature_fit = None
        if val_logits is not None:
            temperature_fit = fit_calibration(val_logits, splits["val"].labels, "val")
        (folder / calibration.FILE).unlink(missing_ok=True)
        if temperature_fit:
            calibration.write_calibration(folder, temperature_fit)
        facts = report.facts(
            folder.name, role, getattr(data, role), splits[role], data.image_column, data.classes,
            logits, slice_by, temperature_fit,
        )  # fmt: skip
        report.write(folder, facts, splits[role])
        if warning := report.nothing_learned(facts):
            print(f"note         {one_line(warning)}", flush=True)

    return write


def nothing_to_do(accelerator, folder):
    """Say so, and end the program: the folder's run is finished."""
    accelerator.print(f"finished     {folder} has its result already: there is nothing to do")
    raise SystemExit(0)


def check_images_of_result(folder, dataset, data):
    """UserError where a finished run was trained on other images than those of `dataset`.

    dataset: another path than the run's. config.json of older runs has no hash of the images, only
    how many there are.
    """
    trained = read_trained(folder)
    check_classes(trained, data.classes, dataset)
    old = trained.config.get("data")
    old, changes = old if isinstance(old, dict) else {}, ""
    if old.get("content") and data.content:
        changes = content_changes(old["content"], data.content)
    elif old.get("splits", plan.sizes(data)) != plan.sizes(data):
        changes = f"{old['splits']} then, {plan.sizes(data)} now"
    if changes:
        raise UserError(
            f"{folder} holds a finished run, and {dataset} has other images: {changes}. Give "
            "another --run_name, or replace it with --overwrite"
        )


def open_run(args, script) -> Opening:
    """Find everything that the flags name: mistakes are reported before anything is computed.

    args: the parsed flags. script: its file name. Raises UserError for what is not there.
    """
    stages, shard_store = getattr(args, "stages", None), getattr(args, "shard_store", False)
    check_flags(args.imbalance, stages, args.given, shard_store)
    accelerator, machine = make_accelerator(
        args.mixed_precision, args.gradient_accumulation_steps, args.threads, args.seed,
        args.deterministic,
    )  # fmt: skip
    name = default_name(args.dataset, args.model, args.seed)
    folder = check_folder(flags.pick(FolderOptions, args), name, script)
    finished, same_path = from_main(
        accelerator,
        lambda: (is_finished(folder), recipe_in(folder).get("dataset") == args.dataset),
    )
    finished = finished and args.resume_from_checkpoint == "auto" and not args.overwrite
    if finished and same_path:
        nothing_to_do(accelerator, folder)
    recipe, operational = flags.to_recipe(args), flags.named("operational")
    check_same(
        accelerator,
        {name: recipe[name] for name in recipe if name not in (*operational, "dataset")},
    )
    # a mistyped name is reported before a data set is looked for
    in_turn(accelerator, lambda: find_model(args.model))
    data = plan.load(args.dataset, flags.pick(DataOptions, args), accelerator)
    if finished:
        from_main(accelerator, lambda: check_images_of_result(folder, args.dataset, data))
        nothing_to_do(accelerator, folder)
    if "select_by" in args.given and data.val is None:
        raise UserError(
            f"--select_by {args.select_by} chooses the best epoch on validation images, and there "
            "are none: --val_fraction 0.1 holds some out"
        )
    eval_splits = [split for split in (data.val, data.test) if split is not None]
    in_turn(accelerator, lambda: check_slices(args.slice_by, eval_splits, data.image_column))
    pretrained = in_turn(accelerator, lambda: find_weights(args.weights, args.model, args.stem))
    preprocessing_options = flags.pick(PreprocessingOptions, args)
    preprocessing = plan.choose_preprocessing(
        preprocessing_options, args.image_size, args.crop_scale, data, pretrained
    )
    if args.jpeg_decoder == "nvjpeg" and accelerator.device.type != "cuda":
        raise UserError(f"--jpeg_decoder nvjpeg needs a CUDA GPU, this is {accelerator.device}")
    store = flags.pick(StoreOptions, args)
    preprocessing, pixels = from_main(accelerator, lambda: choose_store(store, data, preprocessing))
    # before a network is made: with different heads the processes would wait for ever
    facts = {"classes": data.classes, "split_sizes": plan.sizes(data), "dataset": args.dataset}
    check_same(accelerator, {**facts, **plan.data_identity(data, preprocessing)})
    rows = {
        "prepared": plan.preprocessing_from(preprocessing_options, pretrained, data),
        "pixels": pixels,
    }
    stem = build.resolve_stem(args.model, pretrained.stem or args.stem, preprocessing.size)
    seconds = {"start": time.time() - psutil.Process().create_time()}
    return Opening(
        script, flags.pick(ModelOptions, args), store, flags.pick(RunOptions, args), accelerator,
        machine, folder, data, pretrained, preprocessing, rows, stem, seconds,
    )  # fmt: skip
