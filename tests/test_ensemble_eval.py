"""ensemble_eval.py, end to end on small trained runs: its report, its files, what it refuses."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import smallruns
from harness.ensembles import predictions
from harness.ensembles import report as words
from harness.ensembles.members import read_members
from harness.ensembles.soups import failed_soups
from harness.errors import UserError
from harness.training.folder import WRITTEN_BY_RUN
from smallruns import edit_json


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return smallruns.members(tmp_path_factory.mktemp("members"))


@pytest.fixture
def copies(runs, tmp_path):
    """The same runs in a folder that a test may damage."""
    return smallruns.copies(runs, tmp_path / "runs")


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def row(report, name):
    (found,) = [row for row in report["results"] if row["name"] == name]
    return found


def forbid_forward(monkeypatch):
    def refuse(*_):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(predictions.Predictions, "_forward", refuse)


# -- the report ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return smallruns.ensemble(folder, runs.a, runs.b, runs.c, tta="shift,random:2")


def test_a_report_has_all_its_parts(report):
    found = report_of(report)
    names = [row["name"] for row in found["results"]]
    assert names == [
        "a", "b", "c", "average", "vote", "weighted", "greedy", "uniform soup", "greedy soup",
        names[-1],
    ]  # fmt: skip
    control = row(found, names[-1])
    assert control["kind"] == "control" and names[-1][1:] == ", as a soup of one"
    text = (report / "report.md").read_text()
    for word in [*names, "McNemar", "validation images", "At least one member", "most confused"]:
        assert word in text
    for picture in ("accuracy", "reliability", "confusion", "mistakes"):
        with Image.open(report / f"{picture}.png") as image:
            assert min(image.size) > 100 and len(np.unique(np.asarray(image))) > 3
    assert "predictions" in WRITTEN_BY_RUN  # so that --overwrite of a run takes them along


def test_members_have_the_accuracy_that_training_saw(runs, tmp_path):
    """Through another path: other batches, views and sums. Training scored 100 of the images."""
    folder = smallruns.ensemble(
        tmp_path, runs.a, runs.b, max_eval_samples=100, mixed_precision="no"
    )
    found = report_of(folder)
    assert found["scored"]["images"] == 100
    for name in ("a", "b"):
        summary = json.loads((getattr(runs, name) / "summary.json").read_text())
        assert row(found, name)["accuracy"] == summary["accuracy"]
        assert row(found, name)["nll"] == pytest.approx(summary["loss"], abs=1e-5)


def test_combinations_are_those_of_the_kept_logits(runs, report):
    """Average and vote by hand from the files; each view's file holds its logits."""
    found = report_of(report)
    assert found["views"] == "shift"
    labels = _labels()
    shares = {"centre": 0.25, "centre-mirrored": 0.25, "down-right": 0.125, "up-left": 0.125}
    shares |= {"down-right-mirrored": 0.125, "up-left-mirrored": 0.125}
    probabilities = []
    for name in ("a", "b", "c"):
        logits = {}
        for file in (getattr(runs, name) / "predictions").glob("scored-*.safetensors"):
            if len(load_file(file)["logits"]) != 360:  # those of another test
                continue
            logits[file.stem.removeprefix("scored-").rpartition("-")[0]] = load_file(file)["logits"]
        logits = {view: logits[view] for view in shares}
        assert {tuple(one.shape) for one in logits.values()} == {(360, 10)}
        each = sum(share * logits[view].double().softmax(1) for view, share in shares.items())
        probabilities.append(each)
        accuracy = (each.argmax(1) == labels).double().mean().item()
        assert row(found, name)["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    mean = torch.stack(probabilities).mean(0)
    average = (mean.argmax(1) == labels).double().mean().item()
    assert row(found, "average")["accuracy"] == pytest.approx(average, abs=1e-9)
    votes = torch.stack([p.argmax(1) for p in probabilities])
    majority = votes.mode(0)
    clear = (votes == majority.values).sum(0) > 1
    assert row(found, "vote")["ties"] == int((~clear).sum())
    best = max(row(found, name)["accuracy"] for name in "abc")
    gain = row(found, "average")["against"]["gain"]
    assert gain == pytest.approx(average - best, abs=1e-9)


def _labels():
    from harness.data.sources import load_data

    return torch.from_numpy(load_data("digits").test.labels)


def test_views_have_their_gain_and_cost(report):
    found = report_of(report)
    kinds = {(row["views"], row["of"]) for row in found["view_gains"]}
    assert kinds == {(k, n) for k in ("shift", "random:2", "none")
                     for n in ("a", "b", "c", "average")}  # fmt: skip
    speeds = found["cost"]["images_per_second"]
    assert speeds["none"]["a"] > speeds["shift"]["a"] > 0
    assert speeds["none"]["average"] < min(speeds["none"][n] for n in "abc")
    for one in found["view_gains"]:
        low, high = one["interval"]
        assert low <= one["gain"] <= high
        assert one["views"] != "none" or one["gain"] == 0


@pytest.mark.slow
def test_a_soup_is_a_network_of_its_own(runs, report, tmp_path):
    """Its folder is a run's: as a member it has the soup's accuracy."""
    found = report_of(report)
    soup = row(found, "uniform soup")
    assert soup["passes"] == 1 and soup["soup"] == [[0, 2]]
    folder = report / "uniform_soup"
    config = json.loads((folder / "config.json").read_text())
    assert config["members"] == ["a", "c"] and len(config["ancestors"]) == 3  # c came from a
    state, a, c = (load_file(f / "model.safetensors") for f in (folder, runs.a, runs.c))
    assert torch.allclose(state["fc.weight"], (a["fc.weight"] + c["fc.weight"]) / 2, atol=1e-6)
    again = report_of(smallruns.ensemble(tmp_path, folder, runs.b, tta="shift"))
    assert row(again, "uniform_soup")["accuracy"] == soup["accuracy"]
    assert again["fitted"]["images"] == found["fitted"]["images"]  # its parts' held-out images


@pytest.mark.slow
def test_given_weights_and_logits(runs, tmp_path):
    folder = smallruns.ensemble(
        tmp_path, runs.a, runs.b, member_weights="3,0", average="logits", soup=False
    )
    found = report_of(folder)
    assert row(found, "weighted")["weights"] == [{"a": 1.0, "b": 0.0}]
    assert row(found, "weighted")["accuracy"] == row(found, "a")["accuracy"]
    assert row(found, "weighted")["passes"] == 1
    assert row(found, "average")["of"] == "logits"
    # what it wrote repeats it
    again, status = smallruns.run(
        "ensemble_eval", ["--config", str(folder / "config.yaml"), "--run_name", "again"]
    )
    assert status == 0
    repeated = report_of(again)
    assert repeated["results"] == found["results"]


@pytest.mark.slow
def test_one_member_is_scored_alone(runs, tmp_path):
    found = report_of(smallruns.ensemble(tmp_path, runs.b, tta="flip"))
    assert [row["name"] for row in found["results"]] == ["b"]
    assert found["best"] == "b"
    gains = [r for r in found["view_gains"] if r["views"] == "flip"]
    assert {r["of"] for r in gains} == {"b", "average"}


@pytest.mark.slow
def test_without_held_out_images_the_test_split_is_cross_fitted(copies, tmp_path):
    edit_json(copies.d / "config.json", lambda c: c["flags"].update(max_train_samples=None))
    folder = smallruns.ensemble(tmp_path, copies.a, copies.d)
    found = report_of(folder)
    assert found["fitted"] is None
    assert "cross-fitted on the test images" in (folder / "report.md").read_text()
    assert len(row(found, "weighted")["weights"]) == 2
    assert len(row(found, "a")["temperature"]) == 2


# -- kept predictions ------------------------------------------------------------------------------


@pytest.mark.slow
def test_kept_predictions_are_reused_and_only_where_they_hold(runs, copies, tmp_path, monkeypatch):
    first = report_of(smallruns.ensemble(tmp_path, copies.a, copies.b, soup=False))
    forward, passes = predictions.Predictions._forward, []

    def counted(self, network, model, samples, views, bar):
        passes.append((network.name, len(samples.labels), [view.name for view in views]))
        return forward(self, network, model, samples, views, bar)

    monkeypatch.setattr(predictions.Predictions, "_forward", counted)

    def passes_of(**flags):
        passes.clear()
        found = report_of(smallruns.ensemble(tmp_path, copies.a, copies.b, soup=False, **flags))
        return list(passes), found

    seen, again = passes_of()
    assert seen == [] and again["results"] == first["results"]
    # another combination of the same members needs none either
    assert passes_of(average="logits")[0] == []
    # another view: that one alone, for both splits
    views = ["centre, mirrored"]
    assert passes_of(tta="flip")[0] == [(m, n, views) for m in "ab" for n in (360, 287)]
    # other images
    assert {n for _, n, _ in passes_of(max_eval_samples=50)[0]} == {50}
    # other random views
    assert len(passes_of(tta="random:1")[0]) == 4
    assert len(passes_of(tta="random:1", seed=1)[0]) == 4
    assert passes_of(tta="random:1", seed=1)[0] == []
    # damaged files: cut short, one bit flipped, another's
    for damage in (
        lambda file: file.write_bytes(file.read_bytes()[:-7]),
        lambda file: file.write_bytes(file.read_bytes()[:-7] + b"1234567"),
        lambda file: shutil.copy(next((copies.b / "predictions").glob("scored-centre-[0-9a-f]*")),
                                 file),
    ):  # fmt: skip
        (file,) = [
            f for f in (copies.a / "predictions").glob("scored-centre-*")
            if load_file(f)["logits"].shape[0] == 360 and "mirrored" not in f.name
        ]  # fmt: skip
        damage(file)
        seen, again = passes_of()
        assert seen == [("a", 360, ["centre"])] and again["results"] == first["results"]
    # other weights
    state = load_file(copies.a / "model.safetensors")
    state["fc.weight"] += 0.01
    save_file(state, copies.a / "model.safetensors")
    assert {(m, n) for m, n, _ in passes_of()[0]} == {("a", 360), ("a", 287)}


def test_another_column_is_another_order():
    from harness.data.sources import load_data

    test = load_data("digits").test
    assert predictions._order_digest(test, "image") == predictions._order_digest(test, "image")
    assert predictions._order_digest(test, "image") != predictions._order_digest(test, "other")


def test_a_folder_that_cannot_be_written_to_keeps_nothing_and_says_so(copies, tmp_path, capsys):
    (copies.a / "predictions").write_text("a file where the folder should be")
    smallruns.ensemble(tmp_path, copies.a)
    assert capsys.readouterr().out.count("predictions of a are not kept") == 1


# -- launched, as a user would -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_2proc", pytest.param("cpu", marks=pytest.mark.sweep)])
def test_launched_processes_give_the_report_of_this_one(copies, tmp_path, config):
    """Soups, cross-fitting and views included; another folder, so that nothing is kept."""
    edit_json(copies.d / "config.json", lambda c: c["flags"].update(max_train_samples=None))
    members = (copies.a, copies.c, copies.d)
    one = report_of(smallruns.ensemble(tmp_path, *members, tta="flip"))
    for member in members:
        shutil.rmtree(member / "predictions")
    launcher = ("--config_file", str(smallruns.ROOT / f"accelerate_configs/{config}.yaml"))
    done = smallruns.launch(
        tmp_path, script="ensemble_eval.py", argv=members, launcher=launcher, tta="flip",
        threads=1, run_name="launched", report_to="none",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    launched = report_of(tmp_path / "launched")
    assert one["scored"] == launched["scored"] and one["scored"]["images"] == 360
    for key in ("results", "diversity", "confusion", "mistakes", "view_gains", "reliability"):
        assert one[key] == launched[key], key


# -- what is refused -------------------------------------------------------------------------------


def refused(members, tmp_path, **flags):
    with pytest.raises(UserError) as error:
        smallruns.ensemble(tmp_path, *members, **flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ensemble").exists()
    return str(error.value)


def test_what_is_no_run_is_refused(runs, copies, tmp_path):
    assert "give the folders" in refused([], tmp_path)
    assert "no such folder" in refused([runs.a, tmp_path / "nothing"], tmp_path)
    assert "is a file" in refused([runs.a / "config.json"], tmp_path)
    (tmp_path / "empty").mkdir()
    assert "is not the folder of a run" in refused([tmp_path / "empty"], tmp_path)
    (copies.a / "model.safetensors").unlink()
    (copies.a / "checkpoints").mkdir()
    assert "has not finished" in refused([copies.a, copies.b], tmp_path)
    (copies.b / "config.json").write_text("{")
    assert "is not JSON" in refused([copies.b], tmp_path)
    edit_json(copies.c / "config.json", lambda c: c.pop("pretrained_cfg"))
    assert "how images are prepared" in refused([copies.c], tmp_path)


def test_members_that_do_not_belong_together_are_refused(runs, copies, tmp_path):
    assert "twice" in refused([runs.a, runs.a.parent / "." / "a"], tmp_path)
    assert "hold the same weights" in refused([runs.a, copies.a], tmp_path)
    edit_json(copies.b / "config.json", lambda c: c["label_names"].reverse())
    said = refused([runs.a, copies.b], tmp_path)
    assert "another order: class 0 is '9' there, '0' here" in said
    edit_json(copies.c / "config.json", lambda c: c["label_names"].pop())
    assert "label_names has 9" in refused([runs.a, copies.c], tmp_path)
    edit_json(copies.d / "config.json", lambda c: c.update(label_names=list("012345678x")))
    assert "only there: 'x'; only here: '9'" in refused([runs.a, copies.d], tmp_path)
    assert "x" in refused([copies.d], tmp_path)  # nor does the data set have it
    edit_json(copies.a / "config.json", lambda c: c["data"].update(source=str(tmp_path / "gone")))
    edit_json(copies.a / "config.json", lambda c: c.update(dataset="elsewhere/data"))
    assert "elsewhere/data" in refused([copies.a], tmp_path)


def test_damaged_weights_stop_the_run_before_any_forward_pass(runs, copies, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        forbid_forward(patched)
        file = copies.b / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert "model.safetensors is damaged" in refused([copies.a, copies.b], tmp_path)

        class Hostile:
            def __reduce__(self):
                return open, (str(tmp_path / "ran"), "w")

        file.write_bytes(pickle.dumps(Hostile()))
        assert str(file) in refused([copies.a, copies.b], tmp_path)
        assert not (tmp_path / "ran").exists()
        file.write_bytes(whole)
        state = load_file(file)
        del state["fc.weight"]
        save_file(state, file)
        assert "missing: fc.weight" in refused([copies.a, copies.b], tmp_path)
        edit_json(copies.c / "config.json", lambda c: c.update(architecture="resnet19"))
        assert "resnet19" in refused([copies.c], tmp_path)
    state = load_file(copies.d / "model.safetensors")
    state["fc.weight"][3] = float("nan")
    save_file(state, copies.d / "model.safetensors")
    said = refused([copies.d], tmp_path)
    assert f"{copies.d}/model.safetensors can't be weights: fc.weight holds values that" in said
    state["fc.weight"][3] = 3e38  # a number, but not what comes of it
    save_file(state, copies.d / "model.safetensors")
    said = refused([copies.d], tmp_path)
    assert "not finite for 360 of 360 scored images" in said and str(copies.d) in said


def test_flags_that_do_not_fit_are_refused(runs, tmp_path):
    assert "has 3 for 2 members" in refused([runs.a, runs.b], tmp_path, member_weights="1,1,1")
    assert "did you mean 'flip'" in refused([runs.a], tmp_path, tta="flop")
    assert "crops are 1 to 5" in refused([runs.a], tmp_path, tta="none,crops:7")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    assert "ensemble_eval.py did not write" in refused([runs.a], tmp_path, run_name="taken")


@pytest.mark.parametrize("words", ["1,-1", "0,0", "a", "1,nan"])
def test_weights_that_are_none_are_refused(words, capsys):
    import ensemble_eval

    with pytest.raises(SystemExit) as stop:
        ensemble_eval.read_flags(["runs/a", "--member_weights", words])
    assert stop.value.code == 2 and "--member_weights" in capsys.readouterr().err


def test_members_and_flags_may_stand_in_any_order():
    import ensemble_eval

    args = ensemble_eval.read_flags(["a", "--tta", "flip", "b", "--seed=1", "c"])
    assert args.members == ["a", "b", "c"] and args.tta == "flip" and args.seed == 1


# -- its words -------------------------------------------------------------------------------------


def test_the_outcome_says_what_it_is(report):
    found = report_of(report)
    best = row(found, found["best"])
    assert best["kind"] == "combination"
    best["against"] |= {"gain": -0.32, "p_holm": 0.0, "member": "a"}
    assert "32.00 points below the best member a" in words.headline(found)
    best["against"] |= {"gain": 0.0, "p_holm": 1.0}
    assert "chance is not ruled out" in words.headline(found)


def test_a_soup_of_one_start_says_nothing_of_it(report):
    assert report_of(report)["failed_soups"] == []


def test_a_soup_of_different_starts_says_why_it_guesses(runs, report):
    """Made-up rows: small fastnets start as nearly the same network from every seed."""
    members = read_members([runs.a, runs.d, runs.c])
    labels = torch.arange(100) % 10

    def lines(soup, number=1):
        rows = [
            {"name": "a", "accuracy": 0.9},
            {"name": "d", "accuracy": 0.8},
            {"name": "c", "accuracy": 0.8},
        ]
        rows.append({"name": "uniform soup", "accuracy": soup, "soup": [[0, number]]})
        return failed_soups(rows, members, labels)

    (line,) = lines(0.12)
    assert line.startswith("uniform soup is far under its members: a, d come from different starts")
    assert lines(0.44) and not lines(0.46) and not lines(0.12, number=2)
    found = {**report_of(report), "failed_soups": [line]}
    assert line in words.answer(found).splitlines() and f"Note: {line}." in words.markdown(found)


def test_the_plan_says_that_different_starts_rarely_average(runs, tmp_path, capsys):
    smallruns.ensemble(tmp_path, runs.a, runs.d, runs.c, dry_run=True)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("soup ")]
    assert line.endswith("a + d + c: from different starts, which rarely average; --no_soup saves "
                         "the passes")  # fmt: skip
