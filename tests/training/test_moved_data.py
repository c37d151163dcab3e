"""A folder of images that is moved, or changed, between a stop and a resume; all four scripts."""

import pytest
from imagefolders import make

import faulty
import smallruns
from harness.errors import UserError

FLAGS = {
    "max_train_samples": None, "max_eval_samples": None, "epochs": 2, "batch_size": 8,
    "gradient_accumulation_steps": 1, "val_fraction": 0.25,
}  # fmt: skip


@pytest.fixture
def images(tmp_path):
    return make(tmp_path / "images", "ant/*16.png", "bee/x/*16.png", "test/*3.png", "a.txt")


def test_moving_the_images_changes_neither_pixels_nor_a_resume(tmp_path, images):
    whole, _ = smallruns.train(tmp_path / "whole", dataset=images, **FLAGS)
    smallruns.train(tmp_path / "part", dataset=images, stop_after=3, **FLAGS)
    moved = images.rename(tmp_path / "elsewhere")
    resumed, status = smallruns.train(
        tmp_path / "part", dataset=moved, resume_from_checkpoint="auto", **FLAGS
    )
    assert status == 0 and smallruns.digest(resumed) == smallruns.digest(whole)


def test_changed_images_are_named_by_their_split(tmp_path, images):
    smallruns.train(tmp_path, dataset=images, stop_after=3, **FLAGS)
    again = {"dataset": images, "resume_from_checkpoint": "auto", **FLAGS}
    (images / "ant" / "0.png").rename(images / "bee" / "new.png")
    with pytest.raises(UserError, match="split 'train' has as many images, but not the same ones"):
        smallruns.train(tmp_path, **again)
    (images / "bee" / "new.png").unlink()
    with pytest.raises(UserError, match="split 'train' has 1 fewer images"):
        smallruns.train(tmp_path, **again)


@pytest.mark.slow
def test_every_script_reads_the_same_folder(tmp_path, images, capsys):
    run, _ = smallruns.train(tmp_path, dataset=images, run_name="a", **FLAGS)
    plan = capsys.readouterr().out
    assert "2 from class folders: ant, bee; train images a class: least 12, median 12" in plan
    assert "3 images of test/, which are unlabelled" in plan and "1 .txt: not images" in plan
    tuned, _ = smallruns.finetune(
        tmp_path / "f", dataset=images, weights=run, run_name="b", **FLAGS
    )
    assert "left out     3 images of test/" in capsys.readouterr().out
    report = smallruns.ensemble(tmp_path / "e", run, tuned)
    assert (report / "report.md").exists()
    words = [run, "--output_dir", tmp_path / "g", "--report_to", "none", "--max_images", "2"]
    folder, status = smallruns.run("gradcam", [*map(str, words), "--run_name", "g"])
    assert status == 0 and (folder / "sheet.png").exists()
    words[1:1] = ["--images", images]
    folder, status = smallruns.run("gradcam", [*map(str, words), "--run_name", "h"])
    assert status == 0 and (folder / "sheet.png").exists()


def count_scans():
    from harness.data import stored

    real = stored.load_images

    def load_images(*args, **options):
        print("lists the images")
        return real(*args, **options)

    stored.load_images = load_images


@pytest.mark.slow
def test_one_of_two_processes_lists_the_images(tmp_path, images):
    run = faulty.start(
        tmp_path, fault=count_scans, processes=2, dataset=images, stop_after=2, **FLAGS
    )
    run.done()
    assert run.output().count("lists the images") == 1
    assert "2 from class folders: ant, bee" in run.output()


@pytest.mark.slow
def test_what_one_process_refuses_ends_both(tmp_path, images):
    (images / "bee" / "x" / "circle").symlink_to(images / "bee")
    run = faulty.start(tmp_path, processes=2, dataset=images, **FLAGS)
    assert run.wait() == [2, 2], run.output()
    assert run.output().count("is a link to a folder that it lies in") == 1


def test_names_with_markup_and_controls_are_shown_letter_by_letter(tmp_path, capsys):
    odd = "<b>a|b</b>\x1b[2J\n# c"
    encoded = r"\<b\>a\|b\</b\>\\x1b\[2J\\n# c"  # a class's name may not hold a "/"
    odd, encoded = odd.replace("/", "\\"), encoded.replace("\\</b", r"\<\\b")
    images = make(tmp_path / "images", "_bee_/*16.png")
    make(images / odd, "*16.png")
    run, _ = smallruns.train(tmp_path, dataset=images, **FLAGS)
    plan = capsys.readouterr().out
    assert r"<b>a|b<\b>\x1b[2J\n# c" in plan and "\x1b" not in plan
    report = smallruns.ensemble(tmp_path / "e", run, split="val")
    text = (report / "report.md").read_text()
    assert encoded in text and r"\_bee\_" in text and "\x1b" not in text and "\n# c" not in text
    words = [run, "--output_dir", tmp_path / "g", "--report_to", "none", "--max_images", "8"]
    folder, _ = smallruns.run("gradcam", [*map(str, words), "--run_name", "g"])
    text = (folder / "report.md").read_text()
    assert encoded in text and "\x1b" not in text and "\n# c" not in text


TABLE = ["file_name,label", *(f"{k}.png,{'ab'[k % 2]}" for k in range(32))]
EVERY_LAYOUT = {
    "splits": (["train/ant/*16.png", "train/bee/*16.png", "test/ant/*3.png"], {}),
    "CLASS/SPLIT": (["ant/train/*16.png", "bee/train/*16.png", "ant/test/*2.png"], {}),
    "wrapped": (["archive/ant/*16.png", "archive/bee/x/*16.png"], {}),
    "every folder": (["dev/*16.png", "val/*16.png"], {"layout": "classes"}),
    "a table": (["images/*32.png", "metadata.csv"], {}),
    "Kaggle": (["train/*32.png", "test/*3.png", "train.csv"], {}),
    "a pattern": (
        ["train/ant*16.png", "train/bee*16.png", "test1/*3.png"], {"label_pattern": "/(ant|bee)"},
    ),
}  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_every_script_on_every_layout(tmp_path, name, capsys):
    paths, flags = EVERY_LAYOUT[name]
    images = make(tmp_path / "images", *paths)
    for table in images.glob("*.csv"):
        table.write_text("\n".join(TABLE))
    flags = {**FLAGS, "dataset": images, "epochs": 1, **flags}
    a, _ = smallruns.train(tmp_path, run_name="a", **flags)
    assert "train images a class: least 12, median 12, most 12" in capsys.readouterr().out
    b, _ = smallruns.finetune(tmp_path, weights=a, run_name="b", **flags)
    assert (smallruns.ensemble(tmp_path / "e", a, b) / "report.md").exists()
    words = [a, "--output_dir", tmp_path / "g", "--report_to", "none", "--max_images", "2"]
    folder, status = smallruns.run("gradcam", [*map(str, words), "--run_name", "g"])
    assert status == 0 and (folder / "sheet.png").exists()


def test_a_finished_run_is_not_that_of_other_images(tmp_path, images, capsys):
    flags = FLAGS | {"epochs": 1, "run_name": "run", "keep_checkpoints": "final"}
    _, status = smallruns.train(tmp_path, dataset=images, **flags)
    flags["resume_from_checkpoint"] = "auto"
    moved = images.rename(tmp_path / "elsewhere")
    _, status = smallruns.train(tmp_path, dataset=moved, **flags)
    assert status == 0 and "there is nothing to do" in capsys.readouterr().out
    (moved / "ant" / "0.png").unlink()
    with pytest.raises(UserError, match="elsewhere has other images: split 'train' has 1 fewer"):
        smallruns.train(tmp_path, dataset=moved, **flags)
