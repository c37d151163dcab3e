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
    flags.output_flags(parser, project="image-classification")
    return parser.read(argv)


if __name__ == "__main__":  # before torch is imported: --help and a mistyped flag answer at once
    args = read_flags()

import torch
import torch.nn.functional as F

from harness.counters import generator
from harness.data.batches import draw_mixing, make_views, mixes, scored_views, train_batches
from harness.data.stores import describe_prepared
from harness.launch import script
from harness.metrics import computed
from harness.models import build
from harness.models.heads import start_heads
from harness.models.weights import load_pretrained
from harness.pictures import save_train_batch
from harness.training import plan
from harness.training.imbalance import make_loss
from harness.training.opening import decode_images, open_run, report_writer
from harness.training.optimizers import make_groups, make_optimizer
from harness.training.run import Length, Run, check_batch
from harness.training.scoring import evaluate, evaluate_epoch
from tricks.ema import ModelEma
from tricks.label_smoothing import smooth_labels
from tricks.lr_groups import check_groups
from tricks.progressive import progressive_size, resize_batch
from tricks.schedule import set_lr


def main(args):
    # data: what is where, and later its pixels, decoded once; weights say how they want them
    opening = open_run(args, "train.py")
    accelerator, data, pretrained = opening.accelerator, opening.data, opening.pretrained
    preprocessing, device = opening.preprocessing, accelerator.device
    tta_views = scored_views(args.tta, preprocessing.size, args.seed)
    part = check_batch(args, accelerator.num_processes, len(data.train), mixes(args))
    per_epoch = len(data.train) // args.batch_size  # the images that don't fill a batch are left
    total = args.max_steps or args.epochs * per_epoch

    # model
    model = build.build_model(
        args.model,
        len(data.classes),
        image_size=preprocessing.size,
        stem=opening.stem,
        dropout=args.dropout,
    )
    initialised = build.initialise(model, args.init, generator(args.seed, "init"))
    loaded = load_pretrained(model, pretrained, data.classes, args.weights_by_order)
    if loaded.head_is_new and pretrained.state:
        initialised = start_heads(model, preprocessing.size, generator(args.seed, "head"))
    start_size = build.check_start_size(model, args.model, args.start_size, preprocessing.size)
    build.check_part(model, part, start_size)
    model.to(device, memory_format=torch.channels_last)

    # optimizer and schedule: the learning rate is a function of the step, nothing to save
    groups = make_groups(
        model, args.lr, args.head_lr, args.bias_lr, args.weight_decay, args.norm_weight_decay,
        muon=args.optimizer == "muon",
    )  # fmt: skip
    optimizer = make_optimizer(args, groups, accelerator, args.lr)
    check_groups(model, optimizer.param_groups)
    schedule = plan.SCHEDULES[args.schedule]
    warmup = min(round(args.warmup_epochs * len(data.train) / args.batch_size), total // 2)

    machine = opening.machine | {"weights": f"init {initialised}; {loaded.text}"}
    rows = {"prepared": plan.preprocessing_from(args, pretrained, data), "pixels": opening.pixels}
    rows |= {"lr": plan.rates(args, len(data.train), total, warmup)}
    accelerator.print(plan.describe_run(args, machine, data, model, preprocessing, total, rows))
    if args.dry_run:
        return
    splits = decode_images(opening, args, args.shard_store)
    if args.prepare_data:
        accelerator.print(f"prepared     {describe_prepared(data, splits)}")
        return

    # tricks
    views = make_views(args, preprocessing)

    def some(n):
        return views.evaluation(splits["train"].take(torch.arange(len(data.train))[:n], device)[0])

    if pretrained.state is None:
        build.whiten(model, some)
    ema = ModelEma(model, args.ema_decay) if args.ema_decay else None

    model, optimizer = accelerator.prepare(model, optimizer)
    run = Run(
        args, accelerator, opening.folder, model, optimizer, ema, Length(total, per_epoch),
        config=plan.result_config(args, data, preprocessing, opening.stem, "train", pretrained),
        identity=plan.identity(data, preprocessing, splits),
    )  # fmt: skip
    batches = train_batches(
        splits["train"], views, accelerator, batch_size=args.batch_size, seed=args.seed,
        accumulation=args.gradient_accumulation_steps, total_steps=total,
        imbalance=args.imbalance,
    )  # fmt: skip

    loss_of, shares = make_loss(
        args.imbalance, args.imbalance_tau, data.train.labels, len(data.classes), device
    )

    def epoch_scores():
        return evaluate_epoch(run, run.module, splits, views.evaluation)

    for step, batch in run.steps(batches, epoch_scores):
        set_lr(optimizer, schedule(step, total, warmup))
        size = progressive_size(step, total, start_size, preprocessing.size)
        mix = draw_mixing(
            args.mixup_alpha, args.cutmix_alpha, args.mix_prob, preprocessing.size,
            generator(args.seed, "mixing", step),
        )  # fmt: skip
        for part in batch:  # one, unless gradients are accumulated
            with accelerator.accumulate(model):
                targets = F.one_hot(part.labels, len(data.classes)).float()
                images, targets = mix(part.images, targets)
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

    def evaluate_result(role, views_of_each=None, whole=False):
        return evaluate(
            accelerator, run.module, splits[role], views.evaluation, views_of_each,
            run.asked_to_stop, metrics=computed(args), whole=whole,
        )  # fmt: skip

    summary = run.finish(
        lambda role: evaluate_result(role, whole=True),
        tta=tta_views and (lambda role: evaluate_result(role, tta_views)),
        report=report_writer(opening, splits, args.slice_by), before=opening.seconds,
    )  # fmt: skip
    accelerator.print(plan.closing(summary, opening.folder, run.record.tracking.line))


if __name__ == "__main__":
    with script("train.py"):
        main(args)
