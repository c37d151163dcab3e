"""The benchmarks run, and their arithmetic holds; what they find is no matter of a test."""

import importlib
import subprocess
import sys

import pytest

import smallruns

FOLDER = smallruns.ROOT / "benchmarks"
sys.path.append(str(FOLDER))  # last: it has a gradcam.py, too
growth, measure, results = map(importlib.import_module, ("growth", "measure", "results"))
Row = measure.Row


def test_a_row_is_met_at_its_bound_and_not_beyond():
    assert Row("x", [0.9, 2.0, 9.0], 2.0).met()
    assert not Row("x", [0.9, 1.9, 9.0], 2.0).met()
    assert Row("x", [0.1, 0.3, 9.0], 0.3, at_most=True).met()
    assert not Row("x", [0.1, 0.4, 0.2, 0.5], 0.29, at_most=True).met()


def test_the_table_says_what_was_wanted_and_whether_it_was_met():
    rows = [Row("a", [3.0, 1.0, 2.0], 1.5), Row("b", [3.0], 1.5, at_most=True), Row("c", [7.0])]
    assert measure.table(rows).splitlines()[2:] == [
        "| a | 2.00 (1.00–3.00) | 3 | ≥ 1.5 | yes |",
        "| b | 3.00 | 1 | ≤ 1.5 | **no** |",
        "| c | 7.00 | 1 |  |  |",
    ]


def test_sides_take_turns_after_a_round_that_warms_up():
    seen = []
    sides = {name: lambda name=name: seen.append(name) for name in "ab"}
    taken = measure.seconds_in_turns(sides, rounds=2)
    assert "".join(seen) == "baabba"
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}


def test_on_paper_every_process_draws_and_gathers_its_part():
    parts = {"draw": 1000.0, "gather": 2000.0, "augment": 10.0, "decode": 10.0}
    stages = {stage: speed for stage, speed, _ in growth.on_paper(parts)}
    assert stages["draw, one thread a process"] == 8000
    assert stages["gather, one thread a process"] == 16000
    assert "The bottleneck is *draw, one thread a process*" in growth.paper_text(parts)
    measured = dict(parts, **{"augment on a GPU": 100.0})
    stages = {stage: speed for stage, speed, _ in growth.on_paper(measured)}
    assert stages["augment on the GPU"] == 800


@pytest.mark.parametrize(
    ("parts", "figures"),
    [
        pytest.param(["mix"], 1, marks=pytest.mark.slow),
        pytest.param(["ema", "mix", "draws", "bookkeeping", "resume"], 20, marks=pytest.mark.sweep),
    ],
    ids=["one part", "several parts"],
)
def test_benchmarks_give_rows(tmp_path, parts, figures):
    command = [sys.executable, str(FOLDER / "bench.py"), "--quick", "--only", *parts]
    done = subprocess.run(
        [*command, "--json", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    files = {found["benchmark"]: found for found in results.read(tmp_path)}
    assert files.keys() == set(parts)
    rows = [row for found in files.values() for row in found["rows"]]
    assert len(rows) >= figures and all(row["min"] > 0 for row in rows)
    assert all(row["figure"] in done.stdout.split("## All")[1] for row in rows)
