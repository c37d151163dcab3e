"""What is held out: by fraction, by fold, by whole groups, said in the plan, refused in words."""

import datasets
import numpy as np
import pytest
from PIL import Image

import smallruns
from harness.data.parts import grouped_parts, parse_fold, stratified_fold
from harness.data.sources import load_data
from harness.errors import UserError

LABELS = np.repeat([0, 1, 2], [60, 30, 10])


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Four images each of 30 patients, in folders, a file name and a table; of two classes."""
    root = tmp_path_factory.mktemp("patients") / "scans"
    lines = ["file,label,patient,site"]
    for patient in range(30):
        kind = "ill" if patient % 3 == 0 else "well"
        folder = root / "train" / kind / f"p{patient:02}"
        folder.mkdir(parents=True)
        for n in range(4):
            name = folder / f"patient{patient:02}_{n}.png"
            Image.new("L", (8, 8), 7 * patient + n).save(name)
            lines.append(f"{name.relative_to(root)},{kind},p{patient},{patient // 10}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


def groups_of(split):
    return {split.dataset["patient"][row] for row in split.rows}


def test_folds_share_out_every_sample_and_every_class():
    for folds in (2, 3, 7):
        parts = [stratified_fold(LABELS, k, folds, seed=4) for k in range(folds)]
        assert sorted(np.concatenate(parts)) == list(range(100))
        for part in parts:
            counts = np.bincount(LABELS[part], minlength=3)
            assert np.abs(counts - np.array([60, 30, 10]) / folds).max() < 1.01
    assert (stratified_fold(LABELS, 0, 5, 1) != stratified_fold(LABELS, 0, 5, 2)).any()


@pytest.mark.parametrize("shares", [[0.2, 0.8], [0.2] * 5, [0.5, 0.5]])
@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_together_and_classes_nearly_in_proportion(shares, seed):
    rng = np.random.default_rng(seed)
    groups = np.unique(rng.integers(0, 60, 600), return_inverse=True)[1]
    labels = rng.choice(4, 600, p=[0.5, 0.3, 0.15, 0.05])
    part = grouped_parts(labels, groups, shares, seed)
    assert np.array_equal(part, grouped_parts(labels, groups, shares, seed))
    for group in range(groups.max() + 1):
        assert len(set(part[groups == group])) == 1
    for k, share in enumerate(shares):
        assert (part == k).mean() == pytest.approx(share, abs=0.03)
        for label in range(4):
            got = ((part == k) & (labels == label)).sum() / (labels == label).sum()
            assert got == pytest.approx(share, abs=0.12)


def test_one_large_group_does_not_break_the_others():
    groups = np.array([0] * 300 + list(range(1, 101)))
    labels = np.tile([0, 1], 200)
    part = grouped_parts(labels, groups, [0.2, 0.8], seed=0)
    assert (part == 1)[:300].all() and 60 <= (part == 0).sum() <= 100


BY = {
    "a column": {"group_column": "patient"},
    "the folder": {"group_column": "folder"},
    "the name": {"group_pattern": "(patient[0-9]+)_"},
}


@pytest.mark.parametrize("options", BY.values(), ids=BY)
def test_no_group_is_on_two_sides(patients, options):
    data = load_data(str(patients), val_fraction=0.2, **options)
    assert not groups_of(data.train) & groups_of(data.val)
    assert len(data.val) == 24 and set(data.val.labels) == {0, 1}
    (note,) = [line for line in data.notes if line.startswith("held out by")]
    assert "6 of 30 groups, 24 of 120 images, no group on both sides" in note
    plain = load_data(str(patients), val_fraction=0.2)
    assert groups_of(plain.train) & groups_of(plain.val)


def test_folds_by_groups_are_a_partition(patients):
    every = []
    for k in range(1, 6):
        data = load_data(str(patients), fold=f"{k}/5", group_column="patient")
        assert not groups_of(data.train) & groups_of(data.val)
        assert sorted([*data.train.rows, *data.val.rows]) == list(range(120))
        every.append(data.val.rows)
    assert sorted(np.concatenate(every)) == list(range(120))


def test_images_without_a_value_are_groups_of_their_own(patients, tmp_path):
    table = (patients / "metadata.csv").read_text().splitlines()
    rows = [
        line if n % 5 != 1 else ",".join([*line.split(",")[:2], "", "0"])
        for n, line in enumerate(table)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    data = load_data(
        str(patients), labels=str(tmp_path / "labels.csv"), fold="1/4", group_column="patient"
    )
    with_value = [groups_of(split) - {None, ""} for split in (data.train, data.val)]
    assert not with_value[0] & with_value[1]


def test_nan_is_no_value(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string"),
                                  "subject": datasets.Value("float64")})  # fmt: skip
    columns = {
        "image": [Image.new("L", (8, 8), k) for k in range(60)],
        "label": ["ab"[k % 2] for k in range(60)],
        "subject": [float(k // 6) if k % 6 else float("nan") for k in range(60)],
    }
    data = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "data")
    data = load_data(str(tmp_path / "data"), val_fraction=0.2, group_column="subject")
    notes = "\n".join(data.notes)
    assert "of 20 groups" in notes and "10 images without subject: each is a group" in notes


def test_a_test_split_with_the_same_groups_is_warned_of(patients, tmp_path):
    root = tmp_path / "scans"
    for split, names in (("train", range(8)), ("test", range(6, 12))):
        for name in names:
            for kind in ("a", "b"):
                folder = root / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 9 * name).save(folder / f"video{name}_{kind}.png")
    data = load_data(str(root), group_pattern="(video[0-9]+)_")
    (note,) = [line for line in data.notes if "warning" in line]
    assert "are in split 'train' and in 'test', where they have 4 of 12 images" in note
    assert not [n for n in load_data(str(root)).notes if "warning" in n]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"group_column": "pateint"}, r"--group_column pateint: .*did you mean .*patient"),
        ({"group_pattern": ""}, "--group_pattern is empty: give it a value, or leave it out"),
        ({"label_pattern": ""}, "--label_pattern is empty"),
        ({"group_pattern": "([a-z"}, "is not a regular expression"),
        ({"group_pattern": "patient[0-9]"}, "has 0 groups in parentheses: it must have one"),
        ({"group_pattern": "(nobody)"}, r"\(nobody\) matches nothing in train/ill/"),
        ({"group_pattern": "(p)", "group_column": "patient"}, "give one of them"),
        ({"fold": "0/5"}, "--fold 0/5 is no fold: 1/5 is the first of five"),
        ({"fold": "6/5"}, "is no fold"),
        ({"fold": "1/1"}, "is no fold"),
        ({"fold": "1/5", "val_fraction": 0.1}, "--fold and --val_fraction both say"),
        ({"fold": "1/5", "group_column": "site"}, "there are only 3 groups"),
        ({"fold": "1/3", "group_column": "label"}, "there are only 2 groups"),
        (
            {"val_fraction": 0.5, "group_column": "label"},
            "its images are of 1 group:",
        ),
        ({"fold": "1/100"}, "leaves validation none of class"),
    ],
)
def test_what_cannot_be_had_is_said(patients, options, line):
    with pytest.raises(UserError, match=line):
        load_data(str(patients), **options)


def test_a_data_set_with_validation_images_is_not_split_again(tmp_path):
    for split in ("train", "val"):
        for kind in ("a", "b"):
            (tmp_path / split / kind).mkdir(parents=True)
            for n in range(4):
                Image.new("L", (8, 8), 9 * n).save(tmp_path / split / kind / f"{n}.png")
    with pytest.raises(UserError, match=r"--fold is 1/2, but .* leave --fold out"):
        load_data(str(tmp_path), fold="1/2")
    assert parse_fold("2/5") == (1, 5)


@pytest.mark.slow
def test_a_grouped_run_resumes_bit_for_bit(patients, tmp_path):
    flags = {"dataset": patients, "fold": "2/5", "group_column": "patient", "batch_size": 24,
             "max_train_samples": None, "max_eval_samples": None}  # fmt: skip
    whole, _ = smallruns.train(tmp_path / "whole", **flags)
    smallruns.train(tmp_path / "parts", stop_after=5, **flags)
    parts, _ = smallruns.train(tmp_path / "parts", resume_from_checkpoint="auto", **flags)
    assert smallruns.digest(parts) == smallruns.digest(whole)
    flags |= {"fold": "3/5", "resume_from_checkpoint": "auto"}
    with pytest.raises(UserError, match="was written with fold 2/5, this command has 3/5"):
        smallruns.train(tmp_path / "parts", **flags)
