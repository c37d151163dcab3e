"""The README's commands and its Python run, and its paths exist."""

import re
import shlex
import subprocess

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

import smallruns

README = smallruns.ROOT / "README.md"
PAGES = {path.name: path.read_text() for path in [README, *(smallruns.ROOT / "docs").glob("*.md")]}
SCRIPTS = {path.name for path in smallruns.ROOT.glob("*.py")}
MAKES = {f"make {name}" for name in ("demo", "test", "flowers", "ablate", "ensemble")}
OTHERS = {  # tests/training/test_resume.py runs the first
    "python -m harness.training.verify_resume 20 accelerate launch train.py",
    "wandb sweep recipes/sweep.yaml",
    "wandb agent OWNER/PROJECT/ID",
}


def lines_of(text):
    """The commands in a page's blocks of bash."""
    return [
        line.split("  #")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
        for line in block.splitlines()
        if line.strip()
    ]


def words_of(line):
    """(script, its words, the launcher's config file or None) of a command; None for another."""
    from accelerate.commands.launch import launch_command_parser

    words = shlex.split(line)
    if words[0] == "python" and words[1] in SCRIPTS:
        return words[1], words[2:], None
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        return launch.training_script, launch.training_script_args, launch.config_file
    return None


def test_every_command_is_known():
    for name, text in PAGES.items():
        for line in lines_of(text):
            assert words_of(line) or line in MAKES | OTHERS, f"{name}: {line}"
    scripts = {found[0] for line in lines_of(PAGES["README.md"]) if (found := words_of(line))}
    assert scripts == SCRIPTS


def test_the_launcher_knows_every_command():
    from accelerate.commands.config.config_args import load_config_from_file

    for text in PAGES.values():
        for script, _, config_file in filter(None, map(words_of, lines_of(text))):
            assert script in SCRIPTS
            if config_file:
                load_config_from_file(str(smallruns.ROOT / config_file))


def commands(*scripts):
    """Parameters (script, argv) of these scripts' commands; those of docs/ in the sweep."""
    found = {}
    for name in ["README.md", *sorted(PAGES)]:
        for script, words, _ in filter(None, map(words_of, lines_of(PAGES[name]))):
            if script in scripts:
                found.setdefault((script, shlex.join(words)), name)
    assert len(found) > len(scripts)
    return [
        pytest.param(script, argv, marks=() if name == "README.md" else pytest.mark.sweep)
        for (script, argv), name in found.items()
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
    torch.manual_seed(0)
    torchvisions = {"model": "resnet18", "stem": "standard", "dropout": None}
    smallruns.train(root / "runs", max_steps=3, run_name="photos", **torchvisions)
    for name in ("b", "c", "x", "digits"):
        copy = root / "runs" / name
        copy.mkdir()
        (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
        state["fc.bias"] += 0.1
        save_file(state, copy / "model.safetensors")
    for photo in ("photo.jpg", "new.jpg", "folder/1.png", "more/2.png"):
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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "README.md" else pytest.mark.sweep) for name in PAGES],
)
def test_the_python_runs(name, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for block in re.findall(r"```python\n(.*?)```", PAGES[name], re.S):
        exec(compile(block, name, "exec"), {})


def test_a_run_is_read_alike_without_this_repository(place, monkeypatch, capsys):
    """The blocks for timm and torchvision alone: the same class and probability as by the first."""
    monkeypatch.chdir(place)
    blocks = re.findall(r"```python\n(.*?)```", PAGES["PREDICT.md"], re.S)
    (timms, torchvisions) = (b for b in blocks if "runs/photos" in b and "load_run" not in b)
    answers = []
    for block in (timms, torchvisions):
        exec(compile(block, "PREDICT.md", "exec"), {})
        name, probability = capsys.readouterr().out.split()
        answers.append((name, pytest.approx(float(probability), abs=2e-2)))
    assert answers[0] == answers[1]


def test_linked_files_exist():
    missing = []
    for name, text in PAGES.items():
        folder = smallruns.ROOT if name == "README.md" else smallruns.ROOT / "docs"
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            target = folder / path if path else folder / name
            there = target.exists() and (not anchor or anchor in headings(target.read_text()))
            missing += [] if there else [f"{name}: {link}"]
    assert not missing


def headings(text):
    """What a link can name after its #: headings, and ids as those of docs/results.md."""
    return set(re.findall(r'<a id="([\w.-]+)">', text)) | {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }


def test_every_trick_has_a_row():
    files = {p.name for p in (smallruns.ROOT / "tricks").glob("*.py")} - {"__init__.py"}
    for page in ("README.md", "TRICKS.md"):
        assert files and files == set(re.findall(r"tricks/(\w+\.py)\)", PAGES[page]))


def test_the_front_page_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 180


def test_the_tree_of_files_is_what_a_run_writes():
    from harness.training.folder import WRITTEN_BY_RUN

    tree = PAGES["TRAIN.md"].split("runs/<name>/\n")[1].split("```")[0]
    named = set(re.findall(r"^  ([\w.]+)", tree, re.M))
    assert named == set(WRITTEN_BY_RUN) - {"tensorboard"}


def test_the_chinese_page_has_the_same_commands():
    chinese = (smallruns.ROOT / "README.zh.md").read_text()
    assert len(chinese.splitlines()) <= 80
    english = PAGES["README.md"].split("## One GPU")[0]
    assert lines_of(chinese) == lines_of(english)
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", chinese):
        assert (smallruns.ROOT / path).exists()


def test_the_version_is_the_same_everywhere():
    from harness.version import VERSION

    assert f"version: {VERSION}\n" in (smallruns.ROOT / "CITATION.cff").read_text()
    assert f"\n## {VERSION}\n" in (smallruns.ROOT / "CHANGELOG.md").read_text()
