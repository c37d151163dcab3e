"""Fine-tune a pretrained image classifier.

accelerate launch finetune.py                                   Flowers102, ResNet-50, in stages
accelerate launch finetune.py --strategy feature_extraction     a new head on the frozen network
accelerate launch finetune.py --strategy auto --dataset path/to/folder
accelerate launch finetune.py --model resnet18 --weights runs/x --dataset cifar100
accelerate launch finetune.py --dry_run                         what trains when, at which rate
accelerate launch finetune.py --resume_from_checkpoint auto     continue in the middle of a stage
"""

from harness.cli import flags


def read_flags(argv=None):
    parser = flags.Parser(__doc__)
    flags.data_flags(parser, dataset="flowers102")
    flags.model_flags(parser, model="resnet50")
    flags.transfer_flags(parser)
    flags.optimization_flags(parser)
    flags.augmentation_flags(parser)
    flags.running_flags(parser)
    flags.output_flags(parser)
    parser.set_defaults(
        weights="default", epochs=None, batch_size=32, optimizer="adamw", lr=None,
        weight_decay=0.01, warmup_epochs=1.0, ema_decay=0.99, crop_scale=0.35, random_erasing=0.0,
        mix_prob=0.0, logging_steps=10,
    )  # fmt: skip
    return parser.read(argv)


if __name__ == "__main__":  # before torch is imported: --help and a mistyped flag answer at once
    args = read_flags()

import math

import torch
import torch.nn.functional as F

from harness.counters import generator
from harness.data.batches import draw_mixing, make_views, row_order, train_batches
from harness.launch import script
from harness.models import build
from harness.models.trained import seen_before
from harness.pictures import SHOWN, save_train_batch
from harness.processes import from_local_main
from harness.training import features, plan
from harness.training import stages as staging
from harness.training.imbalance import make_loss
from harness.training.opening import decode_images, finish_run, make_network, open_run, start_run
from harness.training.optimizers import OptimizerOptions, make_optimizer
from harness.training.probe import can_start_from_probe, fit_probe, start_from_probe
from harness.training.run import Length, check_batch
from harness.training.scoring import evaluate_epoch, evaluate_result
from tricks.ema import ModelEma
from tricks.freeze import frozen_digest, unfreeze
from tricks.label_smoothing import smooth_labels
from tricks.lr_groups import check_groups
from tricks.schedule import set_lr, warmup_cosine


def main(args):
    # data, and how the weights want to see it
    opening = open_run(args, "finetune.py")
    accelerator, data, pretrained = opening.accelerator, opening.data, opening.pretrained
    preprocessing = opening.preprocessing
    batch_settings = args.batch_size, args.gradient_accumulation_steps, accelerator.num_processes
    check_batch(*batch_settings, len(data.train), mixing=False)
    per_epoch = len(data.train) // args.batch_size
    stage_defaults = flags.pick(staging.StageOptions, args)
    views = make_views(stage_defaults, preprocessing)

    # model: a new head on loaded weights
    init = "own" if args.init == "auto" and pretrained.state else args.init
    model, loaded, initialisation = make_network(opening, init)

    # strategy: a list of stages, each a function of the optimizer step
    def fit(all_images):
        return fit_probe(
            accelerator, model, splits, views, len(data.classes), args.seed, feature_cache,
            all_images,
        )  # fmt: skip

    strategy, reason = args.strategy, "as asked"
    splits, probe, feature_cache = None, None, {}  # made when they are first needed
    from_probe = args.strategy in ("auto", "feature_extraction") and loaded.head_is_new
    from_probe = from_probe and can_start_from_probe(model, preprocessing.size)
    if strategy == "auto":
        splits = decode_images(opening)
        probe = fit(all_images=False)
        strategy, reason = staging.choose_strategy(
            probe.accuracy, len(data.classes), len(data.train)
        )
    blocks = build.blocks(model, args.model)
    stages = staging.make_stages(
        flags.pick(staging.StrategyOptions, args), stage_defaults, strategy, model, blocks,
        per_epoch, pretrained.state is not None,
    )  # fmt: skip
    total = stages[-1].end
    for stage in stages:
        microbatch_size = check_batch(*batch_settings, len(data.train), stage.options.mixes())
    build.check_microbatch(model, microbatch_size, preprocessing.size)
    cached_stages = features.cacheable_stages(stages, model, preprocessing.size)
    idle = staging.idle_flags(args.given, strategy)
    reason += f"; {', '.join(idle)} not used" if idle else ""

    initialisation = "a linear probe of the features" if from_probe else f"init {initialisation}"
    machine = opening.machine | {"weights": f"{loaded.text}; what is new: {initialisation}"}
    rows = opening.rows | {
        "strategy": f"{strategy}: {reason}",
        "lr": f"{args.optimizer}: see the stages",
    }
    if overlap := from_local_main(accelerator, lambda: seen_before(pretrained.recipes, data)):
        rows["note"] = (
            f"{overlap:,} of {len(data.val):,} val images were trained on by {args.weights}: the "
            "same --seed and --val_fraction hold out the same images"
        )
    accelerator.print(plan.describe_run(args, machine, data, model, preprocessing, total, rows))
    accelerator.print(staging.table(model, stages, per_epoch, cached_stages))
    if args.dry_run:
        return
    splits = splits or decode_images(opening)
    if args.prepare_data:
        return
    if from_probe:
        probe = probe or fit(all_images=bool(cached_stages))
        start_from_probe(model, probe)
        accelerator.print(f"probe        {probe.text}: the head starts from it")
    ema = ModelEma(model, args.ema_decay) if args.ema_decay else None

    # one optimizer for all stages: each gives it other groups
    unfreeze(model)
    optimizer = make_optimizer(
        flags.pick(OptimizerOptions, args), model.parameters(), accelerator, lr=1.0
    )
    optimizer = accelerator.prepare(optimizer)
    identity = {
        "strategy": strategy,
        "stages": [[s.name, s.rates, s.start, s.end, s.options.bn_mode] for s in stages],
    }  # fmt: skip
    run = start_run(opening, splits, model, optimizer, ema, Length(total, per_epoch), identity)

    for stage in stages:
        if stage.name not in cached_stages:
            feature_cache.clear()  # no later stage wants the features
        if run.step < stage.end or (run.step == stage.end and run.unscored):
            cache = feature_cache if stage.name in cached_stages else None
            train_stage(args, run, stage, optimizer, splits, preprocessing, data.classes, cache)

    def predict(role):
        return evaluate_result(run, splits[role], views.evaluation)

    facts = {
        "strategy": strategy,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": staging.trained_parameters(model, stages),
        **({"probe": {"accuracy": probe.accuracy, "of": probe.source}} if probe else {}),
    }
    finish_run(opening, run, splits, predict, facts)


def train_stage(args, run, stage, optimizer, splits, preprocessing, classes, feature_cache):
    """Train one stage: on images or, where there is a feature_cache, a head on kept features.

    feature_cache: a dict of the features kept so far, to which this adds; or None.
    """
    accelerator, options, model = run.accelerator, stage.options, run.module
    run.record.stage = stage.name
    staging.set_groups(optimizer.optimizer, staging.apply_stage(model, stage))
    check_groups(model, optimizer.param_groups)
    digest = frozen_digest(model)
    views, network, trained_names = make_views(options, preprocessing), model, None
    is_cached = feature_cache is not None
    if is_cached:
        if run.wants_picture():
            view = min(1, options.views - 1)
            number = min(args.batch_size, SHOWN)
            rows = row_order(splits["train"].labels, args.seed, 0, options.imbalance)[:number]
            images, labels = features.view_batch(splits["train"], views, rows, view, args.seed)
            targets = F.one_hot(labels, len(classes))
            save_train_batch(run.picture, views.to_pixels(images), targets, classes)
        network = features.cut_at_head(model).tail
        splits = run.interruptible(lambda: features.extract_splits(
            accelerator, model, splits, views, options.views, args.seed, feature_cache,
            run.asked_to_stop,
        ))  # fmt: skip
        views = features.CachedViews(options.views)
        trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
    # DDP notes at wrapping which parameters require a gradient, so every stage wraps anew. It wraps
    # a new Sequential, because Accelerate does not prepare the same module a second time
    wrapper = accelerator.prepare(torch.nn.Sequential(network))
    batches = train_batches(
        splits["train"], views, accelerator, batch_size=args.batch_size, seed=args.seed,
        accumulation=args.gradient_accumulation_steps, total_steps=stage.end,
        imbalance=options.imbalance,
    )  # fmt: skip

    loss_of, shares = make_loss(options, splits["train"].labels, len(classes), accelerator.device)

    def epoch_scores():
        return evaluate_epoch(run, network, splits, views.evaluation)

    for step, batch in run.steps(batches, epoch_scores, spacing=30 if is_cached else 0):
        set_lr(optimizer, warmup_cosine(step - stage.start, stage.end - stage.start, stage.warmup))
        mix = draw_mixing(options, preprocessing.size, generator(args.seed, "mixing", step))
        for microbatch in batch:  # one, unless gradients are accumulated
            with accelerator.accumulate(wrapper):
                targets = F.one_hot(microbatch.labels, len(classes)).float()
                images, targets = mix(microbatch.images, targets)
                logits = wrapper(images)
                loss = loss_of(logits, smooth_labels(targets, options.label_smoothing, shares))
                accelerator.backward(loss)
            # how much of its target each prediction hits: accuracy weighted by λ
            run.count(loss, targets.gather(1, logits.argmax(1, keepdim=True)).mean())
            if not is_cached and run.wants_picture():
                save_train_batch(run.picture, views.to_pixels(images), targets, classes)
        norm = accelerator.clip_grad_norm_(network.parameters(), args.clip_grad_norm or math.inf)
        # a non-finite number on any process: all stop, or skip, before the update
        run.sync_step(norm)
        optimizer.step()
        optimizer.zero_grad()
        if run.ema and not accelerator.optimizer_step_was_skipped:
            run.ema.update(model, step, trained_names)
        if step + 1 == stage.end:
            check_frozen(run, stage, digest)
    accelerator._models.clear()  # the wrapper's buckets of gradients can go


def check_frozen(run, stage, digest):
    """Stop at the end of a stage, before its last checkpoint, if frozen weights have changed.

    digest: of what is frozen, at the stage's start. On a GPU it takes as long as some steps.
    """
    changed = torch.tensor(
        float(frozen_digest(run.module) != digest), device=run.accelerator.device
    )
    if run.accelerator.reduce(changed, "sum").item():
        run.fail(f"stage {stage.name}: weights or buffers that are frozen have changed")


if __name__ == "__main__":
    with script("finetune.py"):
        main(args)
