"""The ablation: its statistics, its recipes, its table, and that it goes on where it was."""

import csv
import json
import sys

import pytest
import scipy.stats

import smallruns

sys.path.append(str(smallruns.ROOT / "benchmarks"))  # last: it has a gradcam.py, too

import ablate
import training_runs

from harness.cli.flags import pick, to_recipe, to_yaml
from harness.data.batches import Mixing
from train import read_flags

# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (30, 2.04227)]
)
def test_quantiles_are_those_of_the_printed_tables(df, expected):
    assert ablate.t_quantile(0.95, df) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 8, 17, 40])
def test_students_t_is_scipys(df):
    for t in (0.0, 0.3, 1.0, 2.5, 12.0):
        expected = 1 - 2 * scipy.stats.t.sf(t, df)
        assert ablate.t_coverage(t, df) == pytest.approx(expected, abs=1e-12)
    for coverage in (0.5, 0.95, 0.999):
        expected = scipy.stats.t.ppf((1 + coverage) / 2, df)
        assert ablate.t_quantile(coverage, df) == pytest.approx(expected, rel=1e-9)


def test_the_interval_is_scipys():
    values = [0.31, -0.2, 0.55, 1.07]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert ablate.t_interval(values) == pytest.approx(tuple(expected), rel=1e-9)


def summary(accuracy, seconds=100.0, **more):
    return {
        "accuracy": accuracy, "seconds": seconds, "split": "test", "epochs": 1.0, "weights": "raw",
        "data": {"splits": {"train": 200, "test": 400}},
        "device": "cpu", "processes": 1, "threads": 2, "precision": "no", **more,
    }  # fmt: skip


def test_a_row_is_compared_seed_by_seed():
    base = {0: summary(0.80), 1: summary(0.90, 200), 2: summary(0.70)}
    row = ablate.compare(base, {1: summary(0.92, 220), 0: summary(0.81, 130), 7: summary(0.5)})
    assert (row["n"], row["pairs"], row["seeds"]) == (3, 2, [1, 0, 7])
    assert row["accuracy"] == pytest.approx(74.3333, abs=1e-4)
    assert row["differences"] == pytest.approx([2.0, 1.0])
    assert row["difference"] == pytest.approx(1.5)
    # 1.5 ± 12.7062 · 0.707107 / √2
    assert (row["low"], row["high"]) == pytest.approx((-4.8531, 7.8531), abs=1e-4)
    assert not row["excludes_0"]
    assert (row["time"], row["time_min"], row["time_max"]) == pytest.approx((1.2, 1.1, 1.3))


@pytest.mark.parametrize(("by", "expected"), [(0.1, True), (-0.1, True), (0.0, False)])
def test_a_star_is_for_an_interval_without_0(by, expected):
    base = {seed: summary(0.5) for seed in range(3)}
    runs = {seed: summary(0.5 + by + 0.001 * (seed - 1)) for seed in range(3)}
    assert ablate.compare(base, runs)["excludes_0"] is expected


def test_one_seed_has_no_interval_and_no_nan():
    row = ablate.compare({4: summary(0.5)}, {4: summary(0.6)})
    assert row["difference"] == pytest.approx(10)
    assert row["sd"] is row["low"] is row["high"] is None and not row["excludes_0"]
    alone = ablate.compare({}, {4: summary(0.6)})
    assert alone["difference"] is alone["time"] is None


def test_times_of_different_machines_are_not_compared():
    row = ablate.compare({0: summary(0.5)}, {0: summary(0.5, device="cuda:0", threads=8)})
    assert row["pairs"] == 1 and row["time"] is None


# ---------------------------------------------------------------- recipes


def rows(*argv):
    args, _ = ablate.parse_args(list(argv))
    return ablate.recipes(args)


def test_a_plus_row_changes_its_own_flags_alone():
    ((base, *others),) = rows()
    assert base == ("basic", "basic", ablate.PLAIN)
    labels = ["no augmentation", *(f"+ {name}" for name in list(ablate.TRICKS)[2:])]
    assert [label for _, label, _ in others] == labels
    for name, _, flags in others:
        changed = {k: v for k, v in flags.items() if ablate.PLAIN[k] != v}
        assert changed == ablate.TRICKS[name.removeprefix("basic+")]


def test_a_config_cannot_take_the_effect_from_a_row(tmp_path):
    """recipes/cifar10_fast.yaml does not mix: its mixup row would be its base."""
    config = f"--config={smallruns.ROOT / 'recipes' / 'cifar10_fast.yaml'}"
    args, passed_on = ablate.parse_args(["--dataset=digits", config])
    ((base, *others),) = ablate.recipes(args)
    for name, _, flags in (base, *others):
        read = read_flags(ablate.command(args, flags, passed_on))
        assert pick(Mixing, read).mixes() == ("mixup" in name or "cutmix" in name), name


def test_a_minus_row_puts_back_the_plain_value():
    ((_, _, full), *others) = rows("--mode=minus")[0]
    assert full["augment"] == "randaugment" and full["ema_decay"] and full["mixup_alpha"]
    minus = {name: flags for name, _, flags in others}
    # Of the augmentations only the recipe's own can be taken away
    assert minus.keys() == {f"full-{n}" for n in (*ablate.FULL, "mixup", "cutmix")}
    assert minus["full-randaugment"] == full | {"augment": "basic"}
    assert minus["full-cutmix"] == full | {"cutmix_alpha": 0}
    assert minus["full-mixup+cutmix"] == full | {"mixup_alpha": 0, "cutmix_alpha": 0}


def test_the_base_and_variants_of_ones_own():
    plus, minus = rows(
        "--mode=both", "--base", "randaugment", "ema", "--tricks", "ema", "mixup",
        "--variant", "ema: --ema-decay 0.9", "--variant", "slow: --lr=0.01 --no_nesterov",
    )  # fmt: skip
    base = ablate.PLAIN | {"augment": "randaugment", "ema_decay": "0.9"}
    slow = {"lr": "0.01", "no_nesterov": None}
    assert [row[::2] for row in plus] == [
        ("randaugment+ema", base),
        ("randaugment+ema+mixup", base | {"mixup_alpha": 0.2}),
        ("randaugment+ema+slow", base | slow),
    ]
    full = minus[0][2]
    assert full["ema_decay"] == "0.9"
    assert [row[::2] for row in minus[1:]] == [
        ("full-ema", full | {"ema_decay": 0}),
        ("full-mixup", full | {"mixup_alpha": 0}),
        ("full+slow", full | slow),
    ]
    assert "--no_nesterov" in ablate.flag_words(plus[2][2])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tricks", "mixpu"], 'unknown trick "mixpu", did you mean "mixup"?'),
        (["--tricks", "basic"], "none of them changes basic"),
        (["--variant", "a"], 'wants "name: --flag value'),
        (["--variant", "a/b: --lr 1"], 'wants "name: --flag value'),
        (["--variant", "a: --lr 1 2"], 'wants "name: --flag value'),
        (["--ema-decay", "0.9"], "--ema_decay of every run is set by this script"),
        (["--run_name=x"], "--run_name of every run is set by this script"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(argv, message, tmp_path):
    with pytest.raises(SystemExit) as stop:
        ablate.main([*argv, f"--output_dir={tmp_path}"], finish=None)
    assert message in str(stop.value)


def test_a_mistyped_flag_stops_before_anything_has_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--variant", "a: --lrr 1", f"--output_dir={tmp_path}"], finish=None)
    assert stop.value.code == 2
    assert 'unknown flag --lrr, did you mean "--lr"?' in capsys.readouterr().err


# ---------------------------------------------------------------- runs, table, resuming

EFFECT = {"basic": 0.0, "basic+mixup": 0.02, "basic+ema": -0.05}
ARGV = ["--dataset=digits", "--seeds", "0", "1", "2", "--tricks", "mixup", "ema"]


class FakeRuns:
    """Instead of train.py: a finished run of a known accuracy; the n-th one is killed."""

    def __init__(self, killed=None):
        self.names, self.killed = [], killed

    def __call__(self, script, folder, words, config_file):
        assert script == "train.py" and config_file is None
        self.names.append(folder.name)
        args = read_flags(words)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_bytes(to_yaml(to_recipe(args)))
        (folder / "checkpoints").mkdir(exist_ok=True)
        if len(self.names) == self.killed:
            raise SystemExit("killed")
        name = folder.name.rpartition("-s")[0]
        accuracy = 0.8 + 0.01 * args.seed + EFFECT[name] + 0.001 * (args.seed == 2)
        weights = "ema" if args.ema_decay else "raw"
        done = summary(accuracy, 100 * (1 + args.seed) * (1 + EFFECT[name]), weights=weights)
        (folder / "summary.json").write_text(json.dumps(done))


def test_table_and_csv_of_known_runs(tmp_path):
    runs = FakeRuns()
    ablate.main([*ARGV, f"--output_dir={tmp_path}"], finish=runs)
    # The runs of a seed follow each other
    assert runs.names == [f"{name}-s{seed}" for seed in (0, 1, 2) for name in EFFECT]
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("resnet18, digits (200 train, 400 test), 1 epochs, 1 × cpu, 2 threads")
    assert "| basic | 81.03 ± 1.05 % (3) |  |  | 200 s |" in table
    assert "| + mixup | 83.03 ± 1.05 % (3) | +2.00 | – | × 1.02 (1.02–1.02)" in table
    # √(0.7603 · 0.2397 / 400) of the worst row; equal differences are no test
    assert "up to 2.13 points" in table and "leaves out 0" not in table
    assert "averaged weights where EMA is on" in table
    with open(tmp_path / "table.csv", newline="") as file:
        base, mixup, ema = csv.DictReader(file)
    assert base["recipe"] == base["base"] == mixup["base"] == "basic"
    assert mixup["flags"] == "--mixup_alpha=0.2" and ema["flags"] == "--ema_decay=0.999"
    assert float(ema["difference"]) == pytest.approx(-5)
    assert [float(a) for a in ema["accuracies"].split()] == pytest.approx([75, 76, 77.1])
    assert (tmp_path / "ablate.png").read_bytes()[1:4] == b"PNG"


def test_what_was_killed_goes_on_and_what_is_finished_stays(tmp_path, capsys):
    argv = [*ARGV, f"--output_dir={tmp_path}"]
    first = FakeRuns(killed=5)
    with pytest.raises(SystemExit, match="killed"):
        ablate.main(argv, finish=first)
    assert (tmp_path / "basic+mixup-s1" / "checkpoints").exists()
    table = (tmp_path / "table.md").read_text()  # mixup has one pair: no interval, and no nan
    assert "| + mixup | 82.00 % (1) | +2.00 | – | × 1.02 |" in table and "nan" not in table
    second = FakeRuns()
    ablate.main(argv, finish=second)
    assert second.names == ["basic+mixup-s1", "basic+ema-s1", *(f"{n}-s2" for n in EFFECT)]
    capsys.readouterr()
    ablate.main([*argv, "--show"], finish=None)
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()
    ablate.main([*argv, "--show", "--json", str(tmp_path / "ablate.json")], finish=None)
    rows = {
        row["figure"]: row for row in json.loads((tmp_path / "ablate.json").read_text())["rows"]
    }
    mixup = rows["+ mixup, difference to basic, points"]
    assert mixup["n"] == 3 and mixup["mean"] == pytest.approx(2)
    assert rows["basic: test accuracy, %"]["mean"] == pytest.approx(81.0333)
    assert rows["+ mixup: training time over that of basic"]["median"] == pytest.approx(1.02)


@pytest.mark.parametrize(
    ("more", "flag"),
    [
        (["--epochs=3"], "basic-s0 was run with epochs 30, this command has 3"),
        (["--batch_size=64"], "basic-s0 was run with batch_size 128, this command has 64"),
        (["--variant", "ema: --ema_decay 0.9"], "basic+ema-s0 was run with ema_decay 0.999"),
    ],
)
def test_runs_of_other_flags_are_not_mixed(tmp_path, more, flag):
    argv = [*ARGV, f"--output_dir={tmp_path}"]
    with pytest.raises(SystemExit):
        ablate.main(argv, finish=FakeRuns(killed=3))
    with pytest.raises(SystemExit) as stop:
        ablate.main([*argv, *more], finish=None)
    assert flag in str(stop.value)


def test_a_data_set_without_a_scored_split_is_named(tmp_path):
    def finish(script, folder, words, config_file):
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary(None)))

    with pytest.raises(SystemExit, match="has no accuracy: digits has no test split"):
        ablate.main([*ARGV, f"--output_dir={tmp_path}"], finish=finish)


@pytest.mark.slow
def test_a_failing_run_shows_its_command_and_last_lines(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("print('so it goes')\nraise SystemExit(3)\n")
    with pytest.raises(SystemExit) as stop:
        training_runs.finish_run(script, tmp_path / "runs" / "a", ["--lr=1"])
    assert f"{script} --lr=1 --output_dir={tmp_path}/runs --run_name=a" in stop.value.code
    assert "ended with 1" in stop.value.code and "a.log" in stop.value.code
    assert stop.value.code.endswith("so it goes")  # and not the launcher's own traceback


def in_this_process(script, folder, words, config_file):
    own = [f"--output_dir={folder.parent}", f"--run_name={folder.name}"]
    _, status = smallruns.run("train", [*words, *own, "--resume_from_checkpoint=auto"])
    assert status == 0


@pytest.mark.slow
def test_an_ablation_of_the_digits(tmp_path, capsys):
    """The real thing at toy size: base and mixup, two seeds, stopped once, and then complete."""
    own = {
        "dataset",
        "model",
        "epochs",
        "run_name",
        "warmup_epochs",
        "ema_decay",
        "keep_checkpoints",
    }
    flags = {k: v for k, v in smallruns.SMALL.items() if k not in own}
    argv = [
        "--dataset=digits", f"--model={smallruns.SMALL['model']}", "--epochs=1", "--seeds", "0",
        "1", "--tricks", "mixup", f"--output_dir={tmp_path}", *smallruns.words(flags),
    ]  # fmt: skip

    def finish(script, folder, words, config_file):
        """One run is launched as a user's is; the others save the start-up, and stop."""
        if folder.name == "basic+mixup-s0":
            training_runs.finish_run(script, folder, words, config_file)
        else:
            in_this_process(script, folder, [*words, "--stop_after=2"], config_file)

    ablate.main(argv, finish=finish)
    assert len(list(tmp_path.glob("*/checkpoints/step-*"))) == 3
    ablate.main(argv, finish=in_this_process)
    assert capsys.readouterr().out.count("step-00000002, step 2 of 4") == 3
    with open(tmp_path / "table.csv", newline="") as file:
        base, mixup = csv.DictReader(file)
    assert (base["n"], mixup["pairs"], mixup["seeds"]) == ("2", "2", "0 1")
    for row in (base, mixup):
        for seed, accuracy in zip("01", row["accuracies"].split(), strict=True):
            made = json.loads((tmp_path / f"{row['recipe']}-s{seed}" / "summary.json").read_text())
            assert float(accuracy) == pytest.approx(100 * made["accuracy"])
            assert made["data"]["splits"]["test"] == 100
    difference = float(mixup["accuracy"]) - float(base["accuracy"])
    assert float(mixup["difference"]) == pytest.approx(difference)
    assert float(mixup["low"]) <= difference <= float(mixup["high"])
    config = json.loads((tmp_path / "basic+mixup-s1" / "config.json").read_text())["flags"]
    assert (config["mixup_alpha"], config["cutmix_alpha"], config["augment"]) == (0.2, 0, "basic")
    ablate.main(argv, finish=None)
