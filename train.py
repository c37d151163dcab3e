"""Train an image classifier from scratch.

accelerate launch train.py                                        CIFAR-10, ResNet-18, 100 epochs
accelerate launch train.py --config recipes/digits.yaml           ten seconds on a laptop
accelerate launch --config_file accelerate_configs/multi_gpu.yaml train.py
accelerate launch train.py --dataset path/to/folder --model resnet50 --epochs 50
accelerate launch train.py --resume_from_checkpoint auto          continue, bit for bit
"""

from harness.cli import flags


def read_flags(argv=None):
    parser = flags.Parser(__doc__)
    flags.shard_flag(flags.data_flags(parser, dataset="cifar10"))
    flags.model_flags(parser, model="resnet18")
    flags.speed_flags(flags.optimization_flags(parser, (*flags.OPTIMIZERS, "muon")))
    flags.augmentation_flags(parser)
    flags.running_flags(parser)
    flags.output_flags(parser)
    return parser.read(argv)


if __name__ == "__main__":  # before torch is imported: --help and a mistyped flag answer at once
    args = read_flags()

import torch
import torch.nn.functional as F

from harness.counters import generator
from harness.data.batches import (
    BatchOptions,
    draw_mixing,
    make_views,
    scored_views,
    train_batches,
)
from harness.launch import script
from harness.models import build
from harness.pictures import save_train_batch
from harness.training import plan
from harness.training.imbalance import make_loss
from harness.training.opening import decode_images, finish_run, make_network, open_run, start_run
from harness.training.optimizers import OptimizerOptions, make_groups, make_optimizer
from harness.training.run import Length, check_batch
from harness.training.scoring import evaluate_epoch, evaluate_result
from tricks.ema import ModelEma
from tricks.label_smoothing import smooth_labels
from tricks.lr_groups import check_groups
from tricks.progressive import progressive_size, resize_batch
from tricks.schedule import set_lr


def main(args):
    # data: which images there are; their pixels are decoded later, once, as the weights want them
    opening = open_run(args, "train.py")
    accelerator, data, pretrained = opening.accelerator, opening.data, opening.pretrained
    preprocessing, device = opening.preprocessing, accelerator.device
    tta_views = scored_views(args.tta, preprocessing.size, args.seed)
    batch_options = flags.pick(BatchOptions, args)
    microbatch_size = check_batch(
        args.batch_size, args.gradient_accumulation_steps, accelerator.num_processes,
        len(data.train), batch_options.mixes(),
    )  # fmt: skip
    per_epoch = len(data.train) // args.batch_size  # images that don't fill a batch are left out
    total = args.max_steps or args.epochs * per_epoch

    # model
    model, loaded, initialisation = make_network(opening, args.init)
    start_size = build.check_start_size(model, args.model, args.start_size, preprocessing.size)
    build.check_microbatch(model, microbatch_size, start_size)

    # optimizer and schedule: the learning rate is a function of the step, nothing to save
    optimizer_options = flags.pick(OptimizerOptions, args)
    groups = make_groups(model, optimizer_options)
    optimizer = make_optimizer(optimizer_options, groups, accelerator, args.lr)
    check_groups(model, optimizer.param_groups)
    schedule = plan.SCHEDULES[args.schedule]
    steps_per_epoch = len(data.train) / args.batch_size
    warmup = min(round(args.warmup_epochs * steps_per_epoch), total // 2)

    machine = opening.machine | {"weights": f"init {initialisation}; {loaded.text}"}
    rows = opening.rows | {"lr": plan.rates(optimizer_options, steps_per_epoch, total, warmup)}
    accelerator.print(plan.describe_run(args, machine, data, model, preprocessing, total, rows))
    if args.dry_run:
        return
    splits = decode_images(opening)
    if args.prepare_data:
        return

    # tricks
    views = make_views(batch_options, preprocessing)

    def train_images(n):
        return views.evaluation(splits["train"].take(torch.arange(len(data.train))[:n], device)[0])

    if pretrained.state is None:
        build.whiten(model, train_images)
    ema = ModelEma(model, args.ema_decay) if args.ema_decay else None

    model, optimizer = accelerator.prepare(model, optimizer)
    run = start_run(opening, splits, model, optimizer, ema, Length(total, per_epoch))
    batches = train_batches(
        splits["train"], views, accelerator, batch_size=args.batch_size, seed=args.seed,
        accumulation=args.gradient_accumulation_steps, total_steps=total,
        imbalance=args.imbalance,
    )  # fmt: skip

    loss_of, shares = make_loss(batch_options, data.train.labels, len(data.classes), device)

    def epoch_scores():
        return evaluate_epoch(run, run.module, splits, views.evaluation)

    for step, batch in run.steps(batches, epoch_scores):
        set_lr(optimizer, schedule(step, total, warmup))
        size = progressive_size(step, total, start_size, preprocessing.size)
        mix = draw_mixing(batch_options, preprocessing.size, generator(args.seed, "mixing", step))
        for microbatch in batch:  # one, unless gradients are accumulated
            with accelerator.accumulate(model):
                targets = F.one_hot(microbatch.labels, len(data.classes)).float()
                images, targets = mix(microbatch.images, targets)
                logits = model(resize_batch(images, size))
                loss = loss_of(logits, smooth_labels(targets, args.label_smoothing, shares))
                accelerator.backward(loss)
            # how much of its target each prediction hits: accuracy weighted by λ
            run.count(loss, targets.gather(1, logits.argmax(1, keepdim=True)).mean())
            if run.wants_picture():
                save_train_batch(run.picture, views.to_pixels(images), targets, data.classes)
        norm = accelerator.clip_grad_norm_(model.parameters(), args.clip_grad_norm or float("inf"))
        # a non-finite number on any process: all stop, or skip, before the update
        run.sync_step(norm)
        optimizer.step()
        optimizer.zero_grad()
        if ema and not accelerator.optimizer_step_was_skipped:
            ema.update(run.module, step)

    def predict(role, tta_views=None):
        return evaluate_result(run, splits[role], views.evaluation, tta_views)

    tta = tta_views and (lambda role: predict(role, tta_views)[0])
    finish_run(opening, run, splits, predict, tta=tta)


if __name__ == "__main__":
    with script("train.py"):
        main(args)
