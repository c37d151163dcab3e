"""Members of an ensemble: which images may judge them, their names, their views."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import smallruns
from harness.data.options import SplitOptions
from harness.data.sources import load_data, stored_rows
from harness.ensembles.comparison import notes
from harness.ensembles.members import COMBINATIONS, find_images, read_members, view_sets
from harness.ensembles.report import plan
from harness.ensembles.soups import from_different_starts
from harness.errors import UserError
from harness.models.trained import read_trained
from smallruns import edit_json

ASKED = SplitOptions()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return smallruns.members(tmp_path_factory.mktemp("members"), max_steps=1)


@pytest.fixture
def copies(runs, tmp_path):
    """The same runs in a folder that a test may damage."""
    return smallruns.copies(runs, tmp_path / "runs")


def test_nothing_is_fitted_on_images_that_a_member_was_trained_on(runs, copies):
    images = find_images(read_members([runs.a, runs.b]), ASKED)
    assert images.role == "test" and len(images.scored) == 360
    assert len(images.fitted) == 287  # all that --val_fraction 0.2 holds out
    # another seed holds out other images: those that neither trained on are left
    edit_json(copies.b / "config.json", lambda c: c["flags"].update(seed=7))
    fewer = find_images(read_members([copies.a, copies.b]), ASKED).fitted
    kept = {"val_fraction": 0.2, "max_train_samples": 500}
    trained = [load_data("digits", seed=seed, **kept).train for seed in (42, 7)]
    used = np.concatenate([stored_rows(split) for split in trained])
    held = [load_data("digits", seed=seed, **kept).val for seed in (42, 7)]
    held = np.concatenate([stored_rows(split) for split in held])
    assert sorted(fewer.rows) == sorted(set(held) - set(used)) and len(fewer) > 287
    assert (fewer.labels == load_data("digits").train.labels[fewer.rows]).all()


def test_a_few_images_are_too_few_to_fit_on(copies):
    """Members of other seeds, trained on all the others: next to nothing that neither has seen."""
    for name, seed in (("a", 42), ("b", 7)):
        flags = {"seed": seed, "val_fraction": 0.2, "max_train_samples": None}
        edit_json(
            getattr(copies, name) / "config.json", lambda c, flags=flags: c["flags"].update(flags)
        )
    members = read_members([copies.a, copies.b])
    assert find_images(members, ASKED).fitted is None  # 60 of 1,437; half of test is 180
    assert len(find_images(members[:1], ASKED).fitted) == 287
    val = find_images(members, SplitOptions(split="val"))
    assert 30 < len(val.scored) < 100


def test_what_a_network_came_from_has_been_seen_too(copies):
    """c went on from a, whose run is recorded; here a trained on everything."""
    images = find_images(read_members([copies.c]), ASKED)
    assert len(images.fitted) == 287
    config = json.loads((copies.c / "config.json").read_text())
    assert [one["val_fraction"] for one in config["ancestors"]] == [0.2]
    edit_json(copies.c / "config.json", lambda c: c["ancestors"][0].update(
        val_fraction=0.0, max_train_samples=None))  # fmt: skip
    assert find_images(read_members([copies.c]), ASKED).fitted is None
    edit_json(copies.c / "config.json", lambda c: c.update(ancestors=[{"unknown": "there.pth"}]))
    members = read_members([copies.c])
    assert find_images(members, ASKED).fitted is not None
    assert (
        "there.pth: what images that was trained on is not known"
        in notes(members, find_images(members, ASKED))[1]
    )


def test_no_scored_image_is_fitted_on(copies):
    """A member that took test for its validation; in either order."""
    edit_json(copies.b / "config.json", lambda c: c["flags"].update(
        val_fraction=0.0, val_split="test", test_split="none"))  # fmt: skip
    for order in ((copies.a, copies.b), (copies.b, copies.a)):
        images = find_images(read_members(order), ASKED)
        assert images.role == "test" and len(images.scored) == 360
        assert images.fitted is None or images.fitted.name == "train"


def test_a_test_split_that_training_did_without_is_scored(copies):
    edit_json(copies.a / "config.json", lambda c: c["flags"].update(test_split="none"))
    images = find_images(read_members([copies.a]), ASKED)
    assert images.role == "test" and len(images.scored) == 360


def test_val_is_scored_where_it_is_asked_for(runs):
    asked = SplitOptions(split="val")
    images = find_images(read_members([runs.a, runs.b]), asked)
    assert images.role == "val" and len(images.scored) == 287 and images.fitted is None
    with pytest.raises(UserError, match="val_fraction"):
        find_images(read_members([runs.d]), asked)


def test_a_member_trained_on_test_is_refused(copies):
    edit_json(copies.a / "config.json", lambda c: c["flags"].update(train_split="test"))
    edit_json(copies.a / "config.json", lambda c: c["flags"].update(test_split="train"))
    with pytest.raises(UserError, match="trained on split 'test'"):
        find_images(read_members([copies.d, copies.a]), ASKED)


def test_names_tell_members_apart(runs, copies):
    state = load_file(copies.a / "model.safetensors")
    state["fc.weight"] += 1
    save_file(state, copies.a / "model.safetensors")
    names = [member.name for member in read_members([runs.a, copies.a])]
    assert len(set(names)) == 2 and all(name.endswith("/a") for name in names)
    vote = copies.b.rename(copies.b.with_name("vote"))
    assert read_members([vote])[0].name.endswith("/vote")
    assert "vote" in COMBINATIONS and read_trained(vote).name == "vote"


def test_views_are_made_once_a_size():
    sets = view_sets("flip, crops:2", {16, 24}, seed=0)
    assert list(sets) == ["flip", "crops:2", "none"]
    assert [view.name for view in sets["flip"][24]] == ["centre", "centre, mirrored"]


def test_what_a_run_scored_itself_is_said_where_it_is_another_part(copies):
    """The runs were made with --max_eval_samples 100; here all 360 test images are scored."""
    edit_json(copies.b / "config.json", lambda c: c["data"]["splits"].update(test=360))
    members = read_members([copies.a, copies.b, copies.d])
    images = find_images(members, ASKED)
    assert images.whole == len(images.scored) == 360
    (note,) = [line for line in notes(members, images) if "own runs" in line]
    assert "these 360 test images (a, d on 100), here it is 360" in note
    cut = find_images(members, SplitOptions(max_eval_samples=100))
    (note,) = [line for line in notes(members, cut) if "own runs" in line]
    assert "360 test images (b on 360), here it is 100" in note
    machine = {"precision": "no", "device": "CPU", "threads": 1}
    assert "100 of 360 test images" in plan(members, cut, ["none"], [], machine)
    assert " 360 test images" in plan(members, images, ["none"], [], machine)
    val = find_images(members[:1], SplitOptions(split="val"))
    assert not [line for line in notes(members[:1], val) if "own runs" in line]


def test_which_members_come_from_different_starts(copies):
    a, b, c, d = read_members([copies.a, copies.b, copies.c, copies.d])
    assert not from_different_starts([a]) and not from_different_starts([a, c])
    assert from_different_starts([a, d]) and from_different_starts([a, c, d])
    named = [m._replace(config=m.config | {"flags": {"weights": "default"}}) for m in (b, d)]
    assert not from_different_starts(named)  # fine-tuned from what torchvision publishes
