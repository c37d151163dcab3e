"""The README's commands and its Python run, and its paths exist."""

import re
import shlex
import subprocess

import pytest
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

import smallruns

README = (smallruns.ROOT / "README.md").read_text()
BASH = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]
SCRIPTS = {path.name for path in smallruns.ROOT.glob("*.py")}
LAUNCHES = [line for line in BASH if line.startswith("accelerate launch")]


def test_there_are_commands():
    assert len(LAUNCHES) >= 12
    others = {line for line in BASH if line not in LAUNCHES}
    makes = {"make demo", "make test", "make flowers", "make ablate", "make ensemble"}
    verify = "python -m harness.training.verify_resume 20 accelerate launch train.py"
    assert others == makes | {verify}  # tests/training/test_resume.py runs the last
    assert {parsed(line).training_script for line in LAUNCHES} == SCRIPTS


def parsed(line):
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser().parse_args(shlex.split(line)[2:])


def test_the_launcher_knows_every_command():
    from accelerate.commands.config.config_args import load_config_from_file

    for line in LAUNCHES:
        launch = parsed(line)
        assert launch.training_script in SCRIPTS
        if launch.config_file:
            load_config_from_file(str(smallruns.ROOT / launch.config_file))


COMMANDS = sorted(
    {(p.training_script, " ".join(p.training_script_args)) for p in map(parsed, LAUNCHES)}
)
# The longest of each script; the sweep runs the others
EVERY_RUN = {
    script: max((argv for name, argv in COMMANDS if name == script), key=len) for script in SCRIPTS
}


def commands(*scripts):
    """Parameters (script, argv) of all commands of these scripts."""
    chosen = [(script, argv) for script, argv in COMMANDS if script in scripts]
    assert len(chosen) > len(scripts)
    return [
        pytest.param(script, argv, marks=() if argv == EVERY_RUN[script] else pytest.mark.sweep)
        for script, argv in chosen
    ]


@pytest.mark.parametrize(("script", "argv"), commands("train.py", "finetune.py"))
def test_the_script_runs_with_the_flags_of_every_command(script, argv, tmp_path, monkeypatch):
    """Three steps of it, on data and a network that are at hand."""
    monkeypatch.chdir(smallruns.ROOT)
    more = {"stages": None} if script == "finetune.py" else {}
    more |= {"image_size": 32} if "fast" in argv else {}  # its images start at 20 px
    run = smallruns.finetune if script == "finetune.py" else smallruns.train
    _, status = run(tmp_path, argv=shlex.split(argv), max_steps=3, **more)
    assert status == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the runs and the photos that the commands name: three steps of training."""
    root = tmp_path_factory.mktemp("readme")
    folder, status = smallruns.train(root / "runs", max_steps=3, val_fraction=0.2, run_name="a")
    assert status == 0
    state = load_file(folder / "model.safetensors")
    for name in ("b", "c", "x", "digits"):
        copy = root / "runs" / name
        copy.mkdir()
        (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
        state["fc.bias"] += 0.1
        save_file(state, copy / "model.safetensors")
    for photo in ("photo.jpg", "folder/1.png", "more/2.png"):
        (root / photo).parent.mkdir(exist_ok=True)
        Image.effect_noise((300, 260), 80).save(root / photo)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("script", "argv"), commands("ensemble_eval.py", "gradcam.py"))
def test_a_report_is_made_by_every_command(script, argv, place, monkeypatch):
    monkeypatch.chdir(place)
    model = torchvision.models.resnet50(weights=None).state_dict()
    published = torchvision.models.ResNet50_Weights
    monkeypatch.setattr(published, "get_state_dict", lambda self, **_: model, raising=False)
    words = [{"cat": "3"}.get(word, word) for word in shlex.split(argv)]  # digits have no cat
    words += ["--report_to", "none", "--run_name", f"report-{script}"]
    folder, status = smallruns.run(script.removesuffix(".py"), words)
    assert status == 0 and (folder / "report.md").stat().st_size > 200


@pytest.mark.slow
@pytest.mark.parametrize(("script", "argv"), commands("predict.py", "export.py"))
def test_a_network_is_asked_and_exported_by_every_command(script, argv, place, monkeypatch):
    monkeypatch.chdir(place)
    words = [*shlex.split(argv), "--run_name", f"made-{script}"]
    folder, status = smallruns.run(script.removesuffix(".py"), words)
    assert status == 0
    made = {"predict.py": "predictions.csv", "export.py": "README.md"}[script]
    assert (folder / made).stat().st_size > 100


def test_make_ensemble_are_commands_of_the_readme():
    command = ["make", "-n", "-C", smallruns.ROOT, "ensemble"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(
        r"ensemble_eval.py \\\n\s+runs/digits-\w+ runs/digits-\w+ runs/digits-\w+", shown
    )


def test_make_demo_is_the_command_of_the_readme():
    shown = subprocess.run(
        ["make", "-n", "-C", smallruns.ROOT, "demo"], capture_output=True, text=True, check=True
    ).stdout
    assert (
        "accelerate launch --config_file accelerate_configs/cpu.yaml train.py "
        "--config recipes/digits.yaml" in shown
    )


def test_the_python_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(links) > 8
    headings = {
        "#" + re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    missing = [
        link for link in links if link not in headings and not (smallruns.ROOT / link).exists()
    ]
    assert not missing


def test_every_trick_has_a_row():
    files = {p.name for p in (smallruns.ROOT / "tricks").glob("*.py")} - {"__init__.py"}
    assert files and files == set(re.findall(r"\(tricks/(\w+\.py)\)", README))


def test_the_tree_of_files_is_what_a_run_writes():
    from harness.training.folder import WRITTEN_BY_RUN

    tree = README.split("runs/<name>/\n")[1].split("```")[0]
    named = set(re.findall(r"^  ([\w.]+)", tree, re.M))
    assert named == set(WRITTEN_BY_RUN) - {"tensorboard"}
