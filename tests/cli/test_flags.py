"""Flags: recipes, ranges, one-line errors, and that every flag of a script is read somewhere."""

import ast
import importlib
import re
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass

import pytest
import yaml

from harness.cli import flags
from harness.cli.parser import ELSEWHERE, UNNEEDED
from harness.data.options import DataOptions
from harness.data.pixels import FILTERS
from harness.explain import cams
from smallruns import ROOT, build_parser

RECIPES = sorted(p for p in (ROOT / "recipes").glob("*.yaml") if p.stem != "sweep")  # W&B's


SCRIPTS = sorted(p.name for p in ROOT.glob("*.py"))
TRAINING = {"train.py", "finetune.py"}
OPENING = ROOT / "harness/training/opening.py"  # the first half of both
# What the flags that a function is given are called there, but in DataOptions' functions
OPTIONS = {
    "options", "self", "defaults", "stage_options", "map_options", "network_options",
    "picture_options", "store",
}  # fmt: skip


def declared(parser):
    return {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}


@pytest.fixture
def parser():
    return build_parser()


@pytest.fixture
def read_recipe(parser, tmp_path):
    """Read a recipe of this text, and the command line after it."""

    def read(text, *argv):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return parser.read(["--config", str(path), *argv])

    return read


@pytest.fixture
def refused(capsys):
    """The one line with which a call ends the script, exit status 2."""

    def call(read, *args):
        with pytest.raises(SystemExit) as ended:
            read(*args)
        assert ended.value.code == 2
        out, line = capsys.readouterr()
        assert out == "" and line.count("\n") == 1
        return line

    return call


# --- recipes ---


def test_a_recipe_sets_flags(read_recipe):
    args = read_recipe("lr: 0.3\nbatch-size: 32\nmodel: resnet50\nnesterov: false\nlabel_column:\n")
    assert (args.lr, args.batch_size, args.model, args.nesterov) == (0.3, 32, "resnet50", False)
    assert args.label_column is None and args.momentum == 0.9


def test_a_recipe_may_be_empty(read_recipe, parser):
    assert read_recipe("# nothing\n").given == parser.read([]).given == {}


def test_yaml_takes_1e_3_for_a_word_and_we_for_a_number(read_recipe):
    assert yaml.safe_load("lr: 1e-3") == {"lr": "1e-3"}
    assert read_recipe("lr: 1e-3\nweight_decay: 5e-4").lr == 1e-3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize: 32", ['unknown flag "batchsize"', 'did you mean "batch_size"?']),
        ("config: other.yaml", ["config is for the command line alone"]),
        ("help: true", ["help is for the command line alone: take it out of the recipe"]),
        ("7: 8", ['unknown flag "7"']),
        ("no_nesterov: true", ['unknown flag "no_nesterov"', '"nesterov"']),
        ("lr: fast", ["--lr", "'fast'"]),
        ("lr: -0.1", ["--lr", "-0.1 is not a number above 0"]),
        ("epochs: 1.5", ["--epochs", "1.5"]),
        ("optimizer: adam", ["--optimizer", '"adam"', 'did you mean "adamw"?']),
        ("run_name: a/b", ["--run_name", "a/b"]),
        ("lr: [0.1, 0.2]", ["lr", "[0.1, 0.2]", "not one value"]),
        ("lr: {a: 1}", ["lr", "not one value"]),
        ("epochs: true", ["epochs", "True", "not one value"]),
        ("flip_prob: off", ["flip_prob", "not one value", "write 0"]),
        ("nesterov: 1", ["nesterov", "not true or false"]),
        ("nesterov: 'no'", ["nesterov", "not true or false"]),
        ("- lr\n- 0.1", ["lines of `flag: value`"]),
        ("lr", ["lines of `flag: value`"]),
        ("lr: [1", ["is not YAML"]),
        ("lr: !!python/object/apply:os.getcwd []", ["is not YAML"]),
    ],
)
def test_a_bad_recipe_is_named_in_one_line(read_recipe, refused, text, words):
    line = refused(read_recipe, text)
    for word in ["mine.yaml: ", *words]:
        assert word in line


def test_a_recipe_that_cannot_be_read(parser, refused, tmp_path):
    line = refused(parser.read, ["--config", str(tmp_path / "absent.yaml")])
    assert "absent.yaml: cannot read the recipe: No such file" in line
    assert "cannot read" in refused(parser.read, ["--config", str(tmp_path)])
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert "is not YAML" in refused(parser.read, [f"--config={tmp_path}/picture.yaml"])


def test_an_error_on_the_command_line_is_not_blamed_on_the_recipe(read_recipe, refused):
    line = refused(read_recipe, "lr: 0.3", "--epochs=0")
    assert "mine.yaml" not in line and "--epochs: 0 is not a whole number at least 1" in line


def test_the_command_line_wins_over_the_recipe_over_the_defaults(read_recipe, tmp_path):
    text = "lr: 0.3\nepochs: 7\nnesterov: false\nmomentum: 0.9\nseed: 1"
    args = read_recipe(text, "--epochs", "9", "--nesterov", "--seed", "42")
    assert (args.lr, args.epochs, args.nesterov, args.seed) == (0.3, 9, True, 42)
    # What ends at its default is not "given", whoever said it.
    assert args.given == {"lr": str(tmp_path / "mine.yaml"), "epochs": "command line"}


# --- the command line ---


def test_dashes_and_underscores_are_one(parser):
    args = parser.read(["--batch-size", "32", "--run-name=my-run", "--no-nesterov", "--dry-run"])
    assert (args.batch_size, args.run_name, args.nesterov, args.dry_run) == (
        32,
        "my-run",
        False,
        True,
    )
    assert parser.read(["--no_nesterov", "--nesterov"]).nesterov


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learningrate", "1"], ["unknown flag --learningrate"]),
        (["--batchsize=32"], ["unknown flag --batchsize", 'did you mean "--batch_size"?']),
        (["--batch", "32"], ["unknown flag --batch,"]),  # no abbreviations
        (["--no_lr"], ["unknown flag --no_lr"]),
        (["resnet50"], ["unexpected word resnet50"]),
        (["--model"], ["--model: expected one argument"]),
        (["--augment", "autoagument"], ['"autoagument"', 'did you mean "autoaugment"?']),
        (["--stem", ""], ["--stem", '""']),
        (["--checkpointing_steps", "0"], ["--checkpointing_steps", "at least 1"]),
        (["--checkpointing_steps", "epochs"], ["--checkpointing_steps", "epoch or whole number"]),
    ],
)
def test_a_mistyped_command_line_is_named_in_one_line(parser, refused, argv, words):
    line = refused(parser.read, argv)
    for word in words:
        assert word in line


def test_an_image_behind_a_run_is_told_its_flag(refused):
    parser = flags.Parser("gradcam.py")
    flags.cam_flags(parser)
    assert "as --images new.jpg" in refused(parser.read, ["runs/photos", "new.jpg"])


@pytest.mark.parametrize(
    ("flag", "low", "high"),  # the ends that are allowed, and what lies just outside
    [
        ("batch_size", (1, 0), None),
        ("gradient_accumulation_steps", (1, 0), None),
        ("epochs", (1, 0), None),
        ("max_steps", (1, 0), None),
        ("lr", (1e-30, 0), None),
        ("momentum", (0, -0.1), (0.9999, 1)),
        ("weight_decay", (0, -1e-9), None),
        ("warmup_epochs", (0, -1), None),
        ("clip_grad_norm", (0, -1), None),
        ("ema_decay", (0, -0.1), (0.999999, 1)),
        ("label_smoothing", (0, -0.1), (0.99, 1)),
        ("dropout", (0, -0.1), (0.99, 1)),
        ("flip_prob", (0, -0.1), (1, 1.1)),
        ("random_erasing", (0, -0.1), (1, 1.1)),
        ("mix_prob", (0, -0.1), (1, 1.1)),
        ("mixup_alpha", (0, -1), None),
        ("cutmix_alpha", (0, -1), None),
        ("crop_padding", (0, -1), None),
        ("randaugment_magnitude", (0, -1), (30, 31)),
        ("val_fraction", (0, -0.1), (0.9, 1)),
        ("seed", (0, -1), (2**32 - 1, 2**32)),
        ("threads", (1, 0), None),
        ("max_checkpoints", (2, 1), None),
    ],
)
def test_ranges(parser, refused, flag, low, high):
    for allowed, outside in filter(None, (low, high)):
        assert getattr(parser.read([f"--{flag}={allowed}"]), flag) == allowed
        assert f"--{flag}: {outside} is not" in refused(parser.read, [f"--{flag}={outside}"])


NO_NUMBERS = (None, flags.run_name, flags.words_of, flags.metric_names)


def test_no_number_may_be_nan_infinite_or_a_word(parser, refused):
    numbers = [n for n, a in declared(parser).items() if a.type not in NO_NUMBERS]
    assert len(numbers) > 20
    for name in numbers:
        for value in ("nan", "inf", "-inf", "x", "", "[1]"):
            assert f"--{name}: " in refused(parser.read, [f"--{name}={value}"])


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "../up", "/tmp/x", "..\\up", "a\0b"])
def test_a_run_name_stays_in_the_output_folder(parser, refused, name):
    assert "is not a folder name" in refused(parser.read, [f"--run_name={name}"])


@pytest.mark.parametrize("name", ["mine", "...", "a b", "-x", "émile", "x" * 200, "a\nb"])
def test_other_run_names_are_one_folder(parser, name, tmp_path):
    assert parser.read([f"--run_name={name}"]).run_name == name
    (tmp_path / name).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name]


# --- config.yaml ---

WORDS = ["no", "null", "~", "true", "007", "1e-3", "1_000", "0x10", "12:30", "2024-01-01", "a: b",
         "x #y", " x ", "'q\"", "{a}", "[b]", "*c", "ünï ₂", "- d", "%", "=", "a\nb"]  # fmt: skip


@pytest.mark.parametrize(
    "argv",
    [
        [],
        [
            "--lr=1e-7",
            "--weight_decay=0.1234567890123456789",
            "--ema_decay=0.999999",
            "--dropout=0",
        ],
        ["--no_nesterov", "--dry_run", "--overwrite", "--log_model", "--checkpointing_steps=7"],
        ["--mixed_precision=no", "--augment=none", "--max_steps=5", "--crop_padding=0"],
        *([f"--run_name={word}", f"--dataset={word}", f"--group={word}"] for word in WORDS),
    ],
    ids=lambda argv: " ".join(argv)[:30] or "defaults",
)
def test_config_yaml_repeats_the_flags_exactly(parser, read_recipe, argv):
    args = parser.read(argv)
    again = read_recipe(flags.to_yaml(flags.to_recipe(args)).decode())
    assert flags.to_recipe(again) == flags.to_recipe(args)
    # in their order, too: the name of a stage without one lists its modules
    assert flags.to_yaml(flags.to_recipe(again)) == flags.to_yaml(flags.to_recipe(args))
    assert [type(v) for v in flags.to_recipe(again).values()] == [
        type(v) for v in flags.to_recipe(args).values()
    ]
    assert again.given.keys() == args.given.keys() - set(flags.named("one_command"))
    assert flags.to_recipe(args).keys() == declared(parser).keys() - set(flags.named("one_command"))


# --- the script ---


def standing_on(script):
    """The script's file and the files of the harness that it imports, directly or not."""
    todo, found = [ROOT / script], []
    while todo:
        path = todo.pop()
        if path in found or not path.exists():
            continue
        found.append(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harness"):
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
                todo += [ROOT / f"{name.replace('.', '/')}.py" for name in names]
    return found


PARTS_OF_OPTIONS = ("Augmentation", "Mixing")


def option_classes():
    """{name: fields} of the frozen dataclasses that scripts pick flags for."""
    classes = {}
    for path in sorted((ROOT / "harness").rglob("*.py")):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name, kind in vars(module).items():
            if is_dataclass(kind) and (name.endswith("Options") or name in PARTS_OF_OPTIONS):
                classes[name] = [field.name for field in fields(kind)]
    return classes


def attributes(paths, owners, context=ast.Load):
    """Names NAME in `OWNER.NAME` and `x.OWNER.NAME` of some files; of any of these owners."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, context):
                owner = getattr(node.value, "id", None) or getattr(node.value, "attr", None)
                names |= {node.attr} if owner in owners else set()
    return names


def read_as_options(files):
    """Names of flags that functions below the scripts read of what was picked for them."""
    names = attributes(files, OPTIONS) | {option.name for option in fields(DataOptions)}
    return names | {*cams.OF_WEIGHTS, *cams.OF_SPLITS, "target"}  # check_flags goes by their names


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_none_is_written(script):
    names = declared(build_parser(script)).keys()
    files = [ROOT / script, *([OPENING] if script in TRAINING else [])]
    read = attributes(files, {"args"})
    classes, text = option_classes(), "".join(file.read_text() for file in files)
    picked = {kind for kind in classes if re.search(rf"\b{kind}\b", text)}
    assert len(picked) > (6 if script in TRAINING else 0) or script == "inspect_data.py"
    below = read_as_options(standing_on(script))
    read |= {name for kind in picked for name in classes[kind] if name in below}
    assert not names - read, "declared, but never read"
    of_args = attributes(files, {"args"})
    assert not of_args - names - {"given"}, "read, but not declared"
    assert not attributes(standing_on(script), {"args"}, (ast.Store, ast.Del))


def test_what_is_picked_is_flags_and_is_read():
    """Every field of an option class is a flag of some script, and some file reads it."""
    flag_names = {name for script in SCRIPTS for name in declared(build_parser(script))}
    read = read_as_options([*ROOT.glob("*.py"), *(ROOT / "harness").rglob("*.py")])
    classes = option_classes()
    assert len(classes) > 12
    for kind, names in classes.items():
        assert not set(names) - flag_names - {"given", "recipe"}, kind
        assert not set(names) - read, kind


def test_what_a_resumed_run_may_change_is_flags(parser):
    assert set(flags.named("operational")) - {"config"} <= declared(parser).keys()


def test_the_filters_are_pillows():
    assert set(flags.FILTERS) <= set(FILTERS)


def test_colours_are_three_numbers_or_one_for_all(parser, refused, read_recipe):
    assert parser.read(["--mean", "0.5", "--std=0.1,0.2,0.3"]).mean == [0.5, 0.5, 0.5]
    args = read_recipe("std: [0.1, 0.2, 0.3]")
    assert args.std == [0.1, 0.2, 0.3]
    assert "one number or three" in refused(parser.read, ["--mean=0.1,0.2"])
    assert "--std" in refused(parser.read, ["--std=0"])
    for word in ("--mean=123.675,116.28,103.53", "--std=58.395,57.12,57.375"):
        assert "pixels are in [0, 1]: divide by 255" in refused(parser.read, [word])


def test_every_flag_has_help_that_shows_its_default(parser):
    text = " ".join(parser.format_help().split())
    assert all(action.help for action in declared(parser).values())
    assert "peak learning rate (default: 0.1)" in text
    assert (
        "Nesterov momentum of sgd and muon (default: on)" in text and "(default: False)" not in text
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once_without_torch(script):
    """Within 1.5 s on a quiet machine; a busy one gets three times that."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / script), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 3 * 1.5
    assert f"accelerate launch {script}" in run.stdout and "--output_dir" in run.stdout
    assert len(run.stdout.splitlines()) <= 100  # two screens
    everything = subprocess.run([*command, "all"], capture_output=True, text=True, check=True)
    for name in declared(build_parser(script)):
        assert f"--{name}" in everything.stdout or name in ("run", "members", "inputs")

    program = """
import runpy, sys
sys.argv = [sys.argv[1], "--lerning_rate", "1"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    print(ended.code, "torch" in sys.modules, "numpy" in sys.modules)
"""
    command = [sys.executable, "-c", program, str(ROOT / script)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.stdout == "2 False False\n", run.stderr
    assert "unknown flag --lerning_rate" in run.stderr


# --- the recipes ---


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    """With the script whose defaults it starts from: finetune.py's have stages."""
    script = "finetune.py" if "stages" in yaml.safe_load(path.read_text()) else "train.py"
    args = build_parser(script).read(["--config", str(path)])
    assert set(args.given.values()) <= {str(path)}  # one of them repeats the defaults


def test_there_are_recipes():
    assert {"digits", "cifar10_fast", "cifar10_resnet18", "flowers102_resnet50"} <= {
        p.stem for p in RECIPES
    }


@pytest.mark.parametrize(
    ("script", "recipe"), [("train.py", "cifar10_resnet18"), ("finetune.py", "flowers102_resnet50")]
)
def test_a_recipe_that_says_so_is_the_defaults(script, recipe):
    """Stages have no default as flags: test_stages.py compares what comes of them."""
    path = ROOT / f"recipes/{recipe}.yaml"
    args = build_parser(script).read(["--config", str(path)])
    assert set(args.given) == ({"stages"} if script == "finetune.py" else set())
    assert len(yaml.safe_load(path.read_text())) > 13


def test_an_unquoted_no_in_a_recipe_is_the_word(read_recipe):
    assert read_recipe("mixed_precision: no").mixed_precision == "no"  # YAML reads it as false


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--learning_rate=1", "here it is --lr"), ("--bs", "here it is --batch_size"),
        ("--num-epochs=3", "here it is --epochs"), ("--arch", "here it is --model"),
        ("--pretrained", "here it is --weights"), ("--workers=4", "there are no loader workers"),
        ("--momentun=1", 'did you mean "--momentum"'),
    ],
)  # fmt: skip
def test_flags_of_other_trainers_are_refused_with_the_right_one(parser, capsys, word, hint):
    with pytest.raises(SystemExit):
        parser.read([word])
    assert hint in capsys.readouterr().err


def test_every_flag_that_a_hint_names_exists():
    known = declared(build_parser("train.py")).keys() | declared(build_parser("finetune.py")).keys()
    assert set(ELSEWHERE.values()) <= known
    assert not set(ELSEWHERE) & known and not set(UNNEEDED) & known


def test_a_switch_takes_true_and_false(parser, capsys):
    assert parser.read(["--nesterov=false"]).nesterov is False
    assert parser.read(["--overwrite=True"]).overwrite is True
    with pytest.raises(SystemExit):
        parser.read(["--nesterov=2"])
    assert '"2" is not true or false' in capsys.readouterr().err


def test_a_recipe_is_found_beside_the_scripts(parser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parser.read(["--config", "recipes/digits.yaml"]).run_name == "digits"
