"""The house: who may import whom, and that a trick stands alone."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRICKS = sorted(path for path in (ROOT / "tricks").glob("*.py") if path.stem != "__init__")
HARNESS = sorted((ROOT / "harness").rglob("*.py"))
SCRIPTS = {"train", "finetune", "ensemble_eval", "gradcam", "predict", "export"}
HIDING_OR_NAMELESS = {"datasets", "evaluate", "accelerate", "wandb", "utils", "common"}


def imported(path):
    """The modules that a file imports, with a leading dot where the import is relative."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_there_is_a_house():
    assert {"mixup", "cutmix", "ema", "schedule"} <= {path.stem for path in TRICKS}
    assert "errors" in {path.stem for path in HARNESS}


@pytest.mark.parametrize("path", TRICKS, ids=lambda path: path.stem)
def test_a_trick_imports_torch_and_the_standard_library_only(path):
    allowed = ({"torch", "torchvision"} | sys.stdlib_module_names) - {"argparse"}
    modules = list(imported(path))
    strays = {name for name in modules if name.split(".")[0] not in allowed}
    assert modules and not strays


def test_the_package_of_tricks_gathers_its_own_files_only():
    for name in imported(ROOT / "tricks" / "__init__.py"):
        assert name.startswith((".", "tricks.")), name


@pytest.mark.parametrize("path", HARNESS, ids=lambda path: path.stem)
def test_the_harness_imports_no_script(path):
    assert not {name for name in imported(path) if name.split(".")[0] in SCRIPTS}


# Who may import whom in the harness; a room may always import itself. "" is the ground floor.
ARROWS = {
    "": set(),
    "cli": {""},
    "data": {"", "cli"},
    "models": {"", "cli", "data"},
    "reports": {"", "cli", "data", "models"},
    "training": {"", "cli", "data", "models", "reports"},
    "ensembles": {"", "cli", "data", "models", "reports", "training"},
    "inference": {"", "cli", "data", "models", "reports", "ensembles"},
    "export": {"", "cli", "data", "models", "reports", "ensembles", "inference"},
    "explain": {"", "cli", "data", "models", "reports", "training"},
}


def room(module):
    """The room of harness.ROOM.MODULE, of a file by its path; "" for the ground floor."""
    parts = module.split(".")
    return parts[1] if parts[1] in ARROWS else ""


def harness_imports(path):
    """The modules of the harness that a file imports, in full: harness.ROOM.MODULE."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "harness":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                there = (ROOT / f"{full.replace('.', '/')}.py").exists()
                yield full if there else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "harness")


def test_every_room_is_known_and_lived_in():
    folders = {path.parent.name for path in HARNESS if path.parent.name != "harness"}
    assert folders == set(ARROWS) - {""}
    assert all(any((ROOT / "harness" / folder).glob("[a-z]*.py")) for folder in folders)


def test_tests_have_the_same_rooms():
    rooms = {file.parent.name for file in (ROOT / "tests").glob("*/test_*.py")}
    assert rooms - {"tricks", "benchmarks", "faults"} == set(ARROWS) - {""}
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest takes two files of one name for the same module"


@pytest.mark.parametrize("path", HARNESS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_arrows_between_rooms_run_one_way(path):
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    strays = {name for name in harness_imports(path) if room(name) not in {here, *ARROWS[here]}}
    own_door = path == ROOT / "harness" / "__init__.py"  # `load_run`, imported when it is called
    assert strays == ({"harness.inference.program"} if own_door else set())


# Functions of more statements, or signatures of more parameters, than the house allows, and why.
# Nothing is added here: what is long comes apart
LONG = {
    "make_together": "one protocol of several processes, read from top to bottom",
}
WIDE = {  # all by keyword
    "Views.__init__": "what is drawn for an image, a flag each",
    "decode_split": "how one split is decoded",
    "pack_split": "how one split is packed",
    "model_config": "what config.json says of a network, a key each",
}


def functions(path):
    """(name, node) of every function of a file, methods as Class.name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", [])
        for inner in body if isinstance(body, list) else ():  # of a lambda it is no list
            if isinstance(inner, ast.FunctionDef):
                start = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield f"{start}{inner.name}", inner


def statements(node):
    return sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1


def parameters(node):
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([arg for arg in named if arg.arg not in ("self", "cls")])


def test_functions_are_short_and_signatures_narrow():
    long, wide = set(), set()
    for path in HARNESS:
        for name, node in functions(path):
            long |= {name} if statements(node) > 40 else set()
            wide |= {name} if parameters(node) > 9 else set()
    assert long == set(LONG)
    assert wide == set(WIDE)


WHOLE_FLAGS = {
    "open_run": "it is the first half of both training scripts",
    "describe_run": "the plan tells every flag that is not at its default",
}


def test_all_flags_at_once_stay_in_the_scripts():
    """Below them a function takes those that it needs: see harness.cli.flags.pick."""
    taking = {
        name
        for path in HARNESS
        for name, node in functions(path)
        if "args" in {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
        if path.parent.name != "cli"
    }
    assert taking == set(WHOLE_FLAGS)


def test_a_scripts_main_is_read_in_one_sitting():
    for script in SCRIPTS:
        for name, node in functions(ROOT / f"{script}.py"):
            assert statements(node) <= (70 if name == "main" else 50), f"{script}.py: {name}"


def test_train_and_finetune_share_few_lines():
    """Of finetune.py's lines of code, imports included, under 25 % are train.py's, too."""
    lines = {}
    for script in ("train", "finetune"):
        text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        docstrings = {
            number
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node)
            for number in range(node.body[0].lineno, node.body[0].end_lineno + 1)
        }
        lines[script] = Counter(
            line.strip()
            for number, line in enumerate(text.splitlines(), start=1)
            if number not in docstrings and line.strip() and not line.strip().startswith("#")
        )
    shared = (lines["train"] & lines["finetune"]).total()
    assert 10 < shared < 0.25 * lines["finetune"].total()


def test_no_package_imports_anothers_private_name():
    for path in [*HARNESS, *(ROOT / f"{script}.py" for script in SCRIPTS)]:
        own = room(".".join(path.relative_to(ROOT).with_suffix("").parts)) if "harness" in (
            path.parts
        ) else "script"  # fmt: skip
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harness"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private or room(node.module) == own, (path, private)


def test_an_arrow_that_runs_back_is_seen(tmp_path):
    file = tmp_path / "views.py"
    file.write_text("from harness.models import weights\nimport harness.training.run\n")
    assert {room(name) for name in harness_imports(file)} == {"models", "training"}


def test_no_module_hides_a_package_or_is_a_drawer():
    folders = ["tricks", "harness", "tests", "benchmarks", "data"]
    modules = list(ROOT.glob("*.py"))
    for folder in folders:
        modules += (ROOT / folder).rglob("*.py")
    assert len(modules) > len(TRICKS)
    names = {path.stem for path in modules} | {path.parent.name for path in modules}
    assert not names & HIDING_OR_NAMELESS


@pytest.mark.parametrize("path", TRICKS, ids=lambda path: path.stem)
def test_every_public_name_of_a_trick_has_an_example_that_runs(path):
    module = importlib.import_module(f"tricks.{path.stem}")
    examples = {
        found.name.removeprefix(f"{module.__name__}."): found
        for found in doctest.DocTestFinder(exclude_empty=True).find(module)
        if found.examples
    }
    public = {name: getattr(module, name) for name in module.__all__}
    need_one = {
        name
        for name, item in public.items()
        if not isinstance(item, types.GenericAlias)  # an alias, which Python 3.10 takes for a class
        and (inspect.isfunction(item) or (inspect.isclass(item) and not issubclass(item, tuple)))
    }
    assert need_one and not need_one - examples.keys()

    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    for example in examples.values():
        report = []
        runner.run(example, out=report.append)
        assert not runner.failures, "".join(report)


def test_a_copied_trick_works_alone(tmp_path):
    """Each file, copied into an empty folder of its own, imports in a fresh interpreter."""
    for path in TRICKS:
        folder = tmp_path / path.stem
        folder.mkdir()
        (folder / f"alone_{path.name}").write_bytes(path.read_bytes())
    program = """
import importlib, pathlib, sys
for file in sorted(pathlib.Path.cwd().glob("*/alone_*.py")):
    sys.path.insert(0, str(file.parent))
    module = importlib.import_module(file.stem)
    assert all(hasattr(module, name) for name in module.__all__), file
    sys.path.pop(0)
    print(file.stem)
assert not {"tricks", "harness"} & sys.modules.keys()
"""
    run = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == sorted(f"alone_{path.stem}" for path in TRICKS)
