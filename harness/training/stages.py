"""The stages of a fine-tune: what trains when, at which rate, and the table that says so.

Every strategy is a list of stages, and a stage is a pure function of the optimizer step: nothing
of it is saved, and a run that resumes in the middle of one builds it again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from torch.nn.modules.batchnorm import _BatchNorm

from harness.data.batches import BatchOptions
from harness.errors import UserError
from harness.training.plan import augmentation
from tricks.freeze import freeze_except
from tricks.lr_groups import layer_decay_rates, prefix_groups

# Peak learning rates where the flags name none (AdamW)
HEAD_LR, FULL_LR, FULL_DECAY = 1e-3, 5e-4, 0.75
PROBE_LR = 5e-3  # of the head, where nothing else ever trains
EPOCHS = {"feature_extraction": 30, "full": 30}  # staged: 5 + 10 + 15
STEM_LR = 1e-6
NORM_MODES = {"eval": "eval", "train": "auto", "all": "train"}  # --bn_mode -> freeze_except's mode
STAGED_LR = (1e-5, 1e-5, 5e-5, 1e-4)  # of the quarters of the network, from the stem to the head

# How `auto` chooses. Where the skill of the probe is at least this, training every layer gains at
# most 2 points, at fifteen to fifty times the cost; below it, full fine-tuning won with 5 to 500
# images a class. With a handful of images it loses points where the probe does well
# (docs/results.md, finetune_peers and transfer)
GOOD_PROBE = 0.98
FEW, GOOD_FOR_FEW = 100, 0.85  # train images, and the skill that is enough with fewer


@dataclass(frozen=True)
class StageOptions(BatchOptions):
    """The flags that a stage may set for itself."""

    layer_decay: float | None  # None: FULL_DECAY with strategy "full", else 1
    bn_mode: str
    views: int
    warmup_epochs: float
    weight_decay: float  # these two are always the run's
    norm_weight_decay: float


@dataclass(frozen=True)
class StrategyOptions:
    """The flags that decide the stages of a fine-tune. `given`: see Parser.read."""

    strategy: str
    stages: list[dict] | None
    lr: float | None
    epochs: float | None
    max_steps: int | None
    given: dict


class Stage(NamedTuple):
    """Some epochs in which the same part of the network trains at the same rates."""

    name: str
    rates: dict[str, float]  # module or parameter prefix -> peak learning rate
    options: StageOptions  # the run's, overruled by the stage's own
    start: int  # the first optimizer step
    end: int  # the one after the last
    warmup: int  # steps


def choose_strategy(accuracy, classes, images):
    """(strategy, reason): the head alone where the probe does well, else every layer.

    accuracy: of a linear probe on frozen features, on images it was not fitted to. What counts is
    its skill, (accuracy - chance) / (1 - chance). images: of train.
    """
    chance = 1 / classes
    skill = max(0.0, (accuracy - chance) / (1 - chance))
    threshold = GOOD_FOR_FEW if images < FEW else GOOD_PROBE
    numbers = f"probe accuracy {accuracy:.1%}, skill over chance {skill:.3f}"
    note = f" with {images} train images" if images < FEW else ""
    if skill >= threshold:
        reason = f"the frozen features tell the classes apart ({numbers} ≥ {threshold}{note})"
        return "feature_extraction", reason
    return "full", (
        f"the frozen features leave something to learn ({numbers} < {threshold}{note}; --strategy "
        "feature_extraction takes seconds and ends near the probe's accuracy)"
    )


def make_stages(options, defaults, strategy, model, blocks, per_epoch, pretrained):
    """The stages of a run, but for those without a step.

    options: StrategyOptions. defaults: the StageOptions of a stage without its own. strategy: as
    resolved. blocks: from harness.models.build. per_epoch: optimizer steps. pretrained: whether the
    network has weights of another training, whose BatchNorm statistics `--bn_mode auto` keeps.
    --epochs and --max_steps are shared out over the stages in proportion to their own epochs.

    Raises UserError for flags that the strategy has no use for, and, naming the stage, for a
    prefix that matches nothing or lies under another one. Leaves the model in the last stage.
    """
    idle = idle_flags(options.given, strategy)
    if idle and options.strategy != "auto":  # with auto it is no mistake: the plan says it
        flag, reason = next(iter(idle.items()))
        raise UserError(f"{flag} has no effect with --strategy {strategy}: {reason}")
    if strategy == "staged":
        settings = options.stages or default_stages(blocks)
    else:
        rates = {"head": PROBE_LR} if strategy == "feature_extraction" else {"all": FULL_LR}
        rates = {prefix: options.lr or rate for prefix, rate in rates.items()}
        settings = [{"epochs": options.epochs or EPOCHS[strategy], "train": rates}]
    decay = defaults.layer_decay or (FULL_DECAY if strategy == "full" else 1.0)
    defaults = replace(defaults, layer_decay=decay)

    all_epochs = sum(setting["epochs"] for setting in settings)
    total = options.max_steps or (options.epochs or all_epochs) * per_epoch
    stages, epochs = [], 0
    for n, setting in enumerate(settings, start=1):
        stage_flags = {f.name: setting[f.name] for f in fields(StageOptions) if f.name in setting}
        stage_options = replace(defaults, **stage_flags)
        if stage_options.bn_mode == "auto":
            stage_options = replace(stage_options, bn_mode="eval" if pretrained else "train")
        name = f"{n} {setting.get('name') or _name(setting['train'])}"
        start, epochs = round(total * epochs / all_epochs), epochs + setting["epochs"]
        end = round(total * epochs / all_epochs)
        try:
            rates = _rates(setting["train"], stage_options.layer_decay, blocks)
            warmup = min(round(stage_options.warmup_epochs * per_epoch), (end - start) // 2)
            stage = Stage(name, rates, stage_options, start, end, warmup)
            apply_stage(model, stage)
        except ValueError as error:
            raise UserError(f"stage {name}: {error}") from None
        if end > start:
            stages.append(stage)
    return stages


def default_stages(blocks):
    """Three stages: the head; the last blocks, too; everything, slower towards the stem.

    For ResNets: fc 1e-3; layer4 1e-4 and fc 1e-3; conv1 and bn1 1e-6, layer1 and layer2 1e-5,
    layer3 5e-5, layer4 1e-4, fc 5e-4. In other families the quarters of the network stand for the
    four layers.
    """
    stem, *body, _ = blocks
    quarters = [3 - 4 * (len(body) - 1 - k) // len(body) for k in range(len(body))]
    late_blocks = [block for block, quarter in zip(body, quarters, strict=True) if quarter == 3]
    late_rates = {prefix: STAGED_LR[3] for block in late_blocks for prefix in block}
    everything = {prefix: STEM_LR for prefix in stem} | {
        prefix: STAGED_LR[quarter]
        for block, quarter in zip(body, quarters, strict=True)
        for prefix in block
    }
    ends = (late_blocks[0][0], late_blocks[-1][-1]) if late_blocks else ("body",)
    late_name = " to ".join(dict.fromkeys(ends))
    return [
        {"name": "head", "epochs": 5, "train": {"head": HEAD_LR}},
        {"name": f"{late_name}, head", "epochs": 10, "train": {**late_rates, "head": HEAD_LR}},
        {"name": "everything", "epochs": 15, "train": {**everything, "head": HEAD_LR / 2}},
    ]


def apply_stage(model, stage):
    """Freeze and unfreeze for a stage; returns the optimizer's groups (see prefix_groups)."""
    options = stage.options
    freeze_except(model, list(stage.rates), NORM_MODES[options.bn_mode])
    return prefix_groups(model, stage.rates, options.weight_decay, options.norm_weight_decay)


def set_groups(optimizer, groups):
    """Give a torch optimizer other groups. Parameters that train on keep their moments."""
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)
    for parameter in [p for p in optimizer.state if id(p) not in trained]:
        del optimizer.state[parameter]


def table(model, stages, per_epoch, cached_stages):
    """What trains when, a row for each of the optimizer's groups and one for what is frozen.

    cached_stages: names of those that train on kept features. Leaves the model in the last stage.
    """
    rows = []
    for stage in stages:
        groups = apply_stage(model, stage)
        draws, views = augmentation(stage.options), stage.options.views
        if stage.name in cached_stages:
            other_views = f", the others {draws}" if views > 1 else ""
            draws = f"features kept: {views} views an image, the first as it is{other_views}"
        rows.append(
            f"stage {stage.name}: {(stage.end - stage.start) / per_epoch:.4g} epochs, steps "
            f"{stage.start:,} to {stage.end:,}, warm-up {stage.warmup:,}; {draws}"
        )
        rows.append(_row("group", "parameters", "lr", "decay", "", "BatchNorm"))
        for group in groups:
            count = sum(p.numel() for p in group["params"])
            mode = _norm_mode(model, [group["label"]])
            lr, decay = f"{group['lr']:.3g}", f"{group['weight_decay']:.3g}"
            rows.append(_row(group["name"], f"{count:,}", lr, decay, "trained", mode))
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        if frozen:
            mode = _norm_mode(model, stage.rates, outside=True)
            rows.append(_row("(the rest)", f"{frozen:,}", "", "", "frozen", mode))
    return "\n".join(rows)


def trained_parameters(model, stages):
    """How many parameters are trained in any of the stages."""
    names = set()
    for stage in stages:
        apply_stage(model, stage)
        names |= {name for name, p in model.named_parameters() if p.requires_grad}
    return sum(p.numel() for name, p in model.named_parameters() if name in names)


def _row(name, count, lr, decay, state, norm):
    return f"  {name:<32} {count:>12} {lr:>9} {decay:>7}  {state:<8} {norm}".rstrip()


def _norm_mode(model, prefixes, outside=False):
    """How the BatchNorm layers under some prefixes (or outside of them) behave, in a word."""
    modes = {
        module.training
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and outside != any(_under(name, p) for p in prefixes)
    }
    texts = {frozenset(): "-", frozenset({True}): "adapts", frozenset({False}): "as it is"}
    return texts.get(frozenset(modes), "mixed")


def idle_flags(flag_names, strategy):
    """{flag: reason} of those among some flags that have no effect with this strategy."""
    idle = {
        "staged": {"lr": "its stages have their own (train: {module: lr})"},
        "feature_extraction": {
            "stages": "it has one, the head's", "layer_decay": "only the head trains",
        },
        "full": {"stages": "it has one, everything", "views": "no head trains alone"},
    }  # fmt: skip
    reasons = idle[strategy].items()
    return {f"--{name}": reason for name, reason in reasons if name in flag_names}


def _rates(train, decay, blocks):
    """{prefix: peak rate}, with "head" and "all" resolved and the layer decay applied."""
    factors = layer_decay_rates([block[0] for block in blocks], 1.0, decay)
    block_factors = {prefix: factors[block[0]] for block in blocks for prefix in block}
    rates = {}
    entries = [
        (name, module, rate)
        for name, rate in train.items()
        for module in (blocks[-1] if name == "head" else [name])
    ]
    for name, module, rate in entries:
        prefixes = [p for p in block_factors if module == "all" or _under(p, module)]
        if module != "all" and (not prefixes or decay == 1):
            prefixes = [module]
        for prefix in prefixes:
            if prefix in rates:
                raise ValueError(f"{prefix} is in it twice: {name} covers it too")
            # A prefix of no block is a mistake, which freeze_except reports
            factor = next((f for p, f in block_factors.items() if _under(prefix, p)), 1.0)
            rates[prefix] = rate * factor
    return rates


def _name(train):
    names = ["everything" if name == "all" else name for name in train]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}"


def _under(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")
