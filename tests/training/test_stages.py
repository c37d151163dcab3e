"""Stages: who trains when at which rate, on every family; what is refused; the choice of auto."""

import pytest
import torch
import torchvision
import yaml
from torch import nn

import smallruns
from harness.cli import flags
from harness.errors import UserError
from harness.models import build
from harness.training import stages
from tricks.lr_groups import check_groups

# A small member of every family, and a place in its middle
FAMILIES = {
    "resnet18": "layer3",
    "vgg11_bn": "features.11",
    "densenet121": "features.denseblock3",
    "mobilenet_v3_small": "features.6",
    "efficientnet_b0": "features.4",
    "convnext_tiny": "features.5",
    "vit_b_32": "encoder.layers.encoder_layer_7",
    "swin_t": "features.5",
    "regnet_y_400mf": "trunk_output.block3",
    "shufflenet_v2_x0_5": "stage3",
    "mnasnet0_5": "layers.10",
    "googlenet": "inception4b",
}


def parse(*argv):
    return smallruns.build_parser("finetune.py").read([*argv, "--model", "resnet18"])


def on_meta(name, classes=7):
    """(the model, its blocks); regnet's constructor draws, which it can't on the meta device."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=classes)
    return model, build.blocks(model, name)


def options_of(args):
    return flags.pick(stages.StrategyOptions, args), flags.pick(stages.StageOptions, args)


def make(args, strategy="staged", name="resnet18", per_epoch=10, pretrained=False):
    model, blocks = on_meta(name)
    made = stages.make_stages(*options_of(args), strategy, model, blocks, per_epoch, pretrained)
    return made, model, blocks


@pytest.mark.parametrize(
    ("asked", "pretrained", "mode"),
    [("auto", True, "eval"), ("auto", False, "train"), ("train", True, "train"),
     ("all", True, "all"), ("eval", False, "eval")],
)  # fmt: skip
def test_batchnorm_of_pretrained_networks_keeps_its_statistics_unless_asked(
    asked, pretrained, mode
):
    made, model, _ = make(parse(f"--bn_mode={asked}"), pretrained=pretrained)
    assert {stage.options.bn_mode for stage in made} == {mode}
    adapts = {
        "eval": (set(), set()), "train": ({"layer4"}, {"layer1", "layer4"}),
        "all": ({"layer1", "layer4"}, {"layer1", "layer4"}),
    }[mode]  # fmt: skip
    for stage, expected in zip(made[1:], adapts, strict=True):
        stages.apply_stage(model, stage)
        parts = {"layer1": model.layer1, "layer4": model.layer4}
        norms = {name: part[0].bn1.training for name, part in parts.items()}
        assert {name for name, training in norms.items() if training} == expected


def test_a_stage_of_its_own_mind_about_batchnorm():
    text = "--stages=[{epochs: 1, train: {head: 1}}, {epochs: 1, train: {all: 1}, bn_mode: train}]"
    made, _, _ = make(parse(text), pretrained=True)
    assert [stage.options.bn_mode for stage in made] == ["eval", "train"]


def as_yaml(*train, **more):
    return "--stages=" + yaml.safe_dump([{"epochs": 1, "train": t, **more} for t in train])


# --- every family ---


@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_stages_cover_every_family(name):
    made, model, blocks = make(parse(), name=name)
    assert [(s.start, s.end) for s in made] == [(0, 50), (50, 150), (150, 300)]
    trained = []
    for stage in made:
        groups = stages.apply_stage(model, stage)
        check_groups(model, groups)
        trained.append({n for n, p in model.named_parameters() if p.requires_grad})
    head = blocks[-1][0]
    assert trained[0] == {n for n, _ in model.named_parameters() if n.startswith(f"{head}.")}
    assert trained[0] < trained[1] < trained[2] == {n for n, _ in model.named_parameters()}
    assert not any(n in trained[1] for n, _ in list(model.named_parameters())[:2])
    # Never faster towards the stem
    depth = [made[2].rates[block[0]] for block in blocks]
    assert depth == sorted(depth) and depth[0] == 1e-6 and depth[-1] == 5e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stage_by_prefix_trains_what_is_under_it(name):
    made, model, blocks = make(parse(as_yaml({FAMILIES[name]: 1e-4, "head": 1e-3})), name=name)
    stages.apply_stage(model, made[0])
    head = blocks[-1][0]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    under = (f"{FAMILIES[name]}.", f"{head}.")
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(under)}
    assert any(n.startswith(under[0]) for n in trained)


def test_resnet50_has_the_rates_of_the_recipe():
    recipe = smallruns.ROOT / "recipes/flowers102_resnet50.yaml"
    args = smallruns.build_parser("finetune.py").read(["--config", str(recipe)])
    from_recipe, _, _ = make(args, name="resnet50")
    by_default, _, _ = make(parse(), name="resnet50")
    assert len(from_recipe) == 3
    for written, default in zip(from_recipe, by_default, strict=True):
        assert written.rates == default.rates
        assert (written.name, written.start, written.end) == (
            default.name, default.start, default.end,
        )  # fmt: skip
    assert from_recipe[0].rates == {"fc": 1e-3}
    assert from_recipe[1].rates == {"layer4": 1e-4, "fc": 1e-3}
    assert from_recipe[2].rates == {
        "conv1": 1e-6, "bn1": 1e-6, "layer1": 1e-5, "layer2": 1e-5, "layer3": 5e-5,
        "layer4": 1e-4, "fc": 5e-4,
    }  # fmt: skip


# --- rates and steps ---


def test_layer_decay_counts_the_blocks_up_to_the_head():
    (stage,), _, _ = make(parse("--strategy=full", "--lr=1", "--layer_decay=0.5"), "full")
    assert stage.rates == {
        "conv1": 2**-5, "bn1": 2**-5, "layer1": 2**-4, "layer2": 2**-3, "layer3": 2**-2,
        "layer4": 0.5, "fc": 1.0,
    }  # fmt: skip
    args = parse(as_yaml({"layer3.1": 1, "head": 1}, layer_decay=0.5))
    assert make(args)[0][0].rates == {"layer3.1": 0.25, "fc": 1.0}
    args = parse(as_yaml({"features": 1.0, "head": 1.0}, layer_decay=0.5))
    (stage,), _, blocks = make(args, name="convnext_tiny")
    assert len(stage.rates) > 5 and stage.rates[blocks[-2][0]] == 0.5


def test_epochs_and_max_steps_are_shared_out_in_proportion():
    three = as_yaml({"fc": 1}, {"layer4": 1}, {"all": 1}, warmup_epochs=0.3)
    bounds = lambda *argv: [(s.start, s.end) for s in make(parse(three, *argv))[0]]  # noqa: E731
    assert bounds() == [(0, 10), (10, 20), (20, 30)]
    assert bounds("--epochs=6") == [(0, 20), (20, 40), (40, 60)]
    assert bounds("--max_steps=9") == [(0, 3), (3, 6), (6, 9)]
    assert bounds("--max_steps=2") == [(0, 1), (1, 2)]  # the second has no step, and is left out
    made = make(parse(three))[0]
    assert [s.warmup for s in made] == [3, 3, 3]
    assert [s.warmup for s in make(parse(three, "--max_steps=9"))[0]] == [1, 1, 1]


def test_a_stage_has_its_own_augmentation_and_leaves_the_others():
    text = "--stages=[{epochs: 1, train: {fc: 1}, augment: none, mix_prob: 1}, " \
        "{epochs: 1, train: {all: 1}}]"  # fmt: skip
    first, second = make(parse(text, "--augment=basic"))[0]
    assert (first.options.augment, first.options.mix_prob) == ("none", 1.0)
    assert (second.options.augment, second.options.mix_prob) == ("basic", 0.0)
    assert first.name == "1 fc" and second.name == "2 everything"


def test_the_table_says_what_is_frozen_and_what_batchnorm_does():
    made, model, _ = make(parse("--weight_decay=0.02"))
    lines = stages.table(model, made, 10, cached_stages=[made[0].name]).splitlines()
    heads = [line for line in lines if line.startswith("stage")]
    assert len(heads) == 3 and "features kept: 2 views" in heads[0]
    assert "features" not in heads[1] and heads[1].endswith("smoothing 0.1")
    assert "steps 50 to 150, warm-up 10" in heads[1]
    first = lines[1 : lines.index(heads[1])]
    total = sum(p.numel() for p in model.parameters())
    assert first[1].split() == ["fc", f"{512 * 7:,}", "0.001", "0.02", "trained", "-"]
    assert first[2].split()[:2] == ["fc", "(norm,"] and "trained" in first[2]
    assert first[-1].split() == ["(the", "rest)", f"{total - 512 * 7 - 7:,}", "frozen", "as", "it",
                                 "is"]  # fmt: skip
    second = lines[lines.index(heads[1]) : lines.index(heads[2])]
    assert any(line.split()[0] == "layer4" and line.endswith("adapts") for line in second)
    numbers = sum(int(line[35:47].replace(",", "")) for line in second[2:])
    assert numbers == total  # every parameter is in one row
    assert not any("frozen" in line for line in lines[lines.index(heads[2]) :])


# --- the optimizer's groups ---


def test_what_trains_on_keeps_its_moments_and_the_rest_loses_them():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = model
    optimizer = torch.optim.AdamW(model.parameters(), 1.0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = optimizer.state[second.weight]["exp_avg"]
    stages.set_groups(optimizer, [{"params": list(second.parameters()), "lr": 0.5, "name": "b"}])
    assert optimizer.state[second.weight]["exp_avg"] is before
    assert first.weight not in optimizer.state and len(optimizer.state) == 2
    assert [g["lr"] for g in optimizer.param_groups] == [0.5]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


# --- auto ---


@pytest.mark.parametrize(
    ("accuracy", "classes", "images", "strategy"),
    [
        (0.985, 102, 1000, "feature_extraction"),
        (0.40, 102, 1000, "full"),
        (0.982 + 1e-9, 10, 1000, "feature_extraction"),  # skill over chance of 0.98
        (0.98, 10, 1000, "full"),
        (0.985, 2, 1000, "full"),  # of two classes half is chance: skill 0.97
        (0.99 + 1e-9, 2, 1000, "feature_extraction"),
        (0.2, 2, 1000, "full"),
        (0.95, 2, 99, "feature_extraction"),  # a handful of images: 0.85 is good enough
        (0.95, 2, 100, "full"),
        (0.9, 2, 40, "full"),
    ],
)
def test_auto_follows_the_probes_skill_and_says_its_numbers(accuracy, classes, images, strategy):
    chosen, reason = stages.choose_strategy(accuracy, classes, images)
    assert chosen == strategy
    assert f"{accuracy:.1%}" in reason and "skill over chance" in reason
    assert (f"with {images} train images" in reason) == (images < 100)


def test_what_auto_has_no_use_for_is_known_once_it_has_chosen():
    args = parse("--strategy=auto", "--lr=0.1", "--layer_decay=0.5")
    assert list(stages.idle_flags(args.given, "staged")) == ["--lr"]
    assert list(stages.idle_flags(args.given, "feature_extraction")) == ["--layer_decay"]
    assert make(args, "staged")[0] and not stages.idle_flags(args.given, "full")


# --- bad input ---


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (as_yaml({"layr4": 1}), r"stage 1 layr4: .*layr4.*did you mean.*layer4"),
        (as_yaml({"head": 1}, {"layer4": 1, "layer4.0": 1}), "stage 2 .*layer4.0.*layer4"),
        (as_yaml({"all": 1, "head": 1}), "stage 1 .*fc"),
        (as_yaml({"head": 1, "fc": 1}), "stage 1 .*fc"),
        (as_yaml({"relu": 1}), "stage 1 relu: .*relu"),
    ],
)
def test_a_prefix_that_does_not_work_is_named_with_its_stage(argv, said):
    with pytest.raises(UserError, match=said) as error:
        make(parse(argv))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lr=0.1"], "--lr has no effect with --strategy staged"),
        (["--strategy=full", as_yaml({"fc": 1})], "--stages has no effect with --strategy full"),
        (["--strategy=feature_extraction", "--layer_decay=0.5"], "--layer_decay has no effect"),
        (["--strategy=full", "--views=1"], "--views has no effect"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(argv, said):
    args = parse(*argv)
    with pytest.raises(UserError, match=said):
        make(args, args.strategy)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "wants a list of stages"),
        ("{epochs: 1}", "wants a list of stages"),
        ("[3]", "stage 1: wants lines of"),
        ("[{epochs: 1}]", "stage 1: train missing"),
        ("[{train: {fc: 1}}]", "stage 1: epochs missing"),
        ("[{epochs: 1, train: {}}]", "stage 1: train: wants lines"),
        ("[{epochs: 1, train: fc}]", "stage 1: train: wants lines"),
        ("[{epochs: 0, train: {fc: 1}}]", "stage 1: epochs: 0 is not a whole number at least 1"),
        ("[{epochs: 1.5, train: {fc: 1}}]", 'epochs: "1.5" is not a whole number'),
        ("[{epochs: 1, train: {fc: -1}}]", "stage 1: fc: -1 is not a number above 0"),
        ("[{epochs: 1, train: {fc: fast}}]", 'fc: "fast" is not a number'),
        ("[{epochs: 1, trian: {fc: 1}}]", 'unknown key "trian", did you mean "train"'),
        ("[{epochs: 1, train: {fc: 1}, mix_prob: 2}]", "mix_prob"),
        ("[{epochs: 1, train: {fc: 1}, augment: rand}]", "randaugment"),
        ("[{epochs: 1", "not YAML"),
    ],
)
def test_stages_that_are_none_are_one_line(text, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(f"--stages={text}")
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def test_a_recipe_holds_stages_and_its_errors_name_the_file(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("stages:\n- {epochs: 2, train: {fc: 1e-3}, warmup_epochs: 0.5}\n")
    args = parse(f"--config={recipe}")
    assert args.stages == [{"epochs": 2, "train": {"fc": 1e-3}, "warmup_epochs": 0.5}]
    # config.yaml of a run is such a recipe
    recipe.write_text(yaml.safe_dump(flags.to_recipe(args)))
    assert parse(f"--config={recipe}").stages == args.stages
    recipe.write_text("stages:\n- {epochs: 2, train: {fc: 1e-3}, augment: nothing}\n")
    with pytest.raises(SystemExit):
        parse(f"--config={recipe}")
    line = capsys.readouterr().err
    assert f"{recipe}: stage 1: " in line and line.count("\n") == 1
