"""The benchmarks of fine-tuning: names, tables of made-up runs, and one run of each for real."""

import json
import subprocess
import sys
from types import SimpleNamespace

import imagefolders
import pytest

import smallruns

sys.path.append(str(smallruns.ROOT / "benchmarks"))  # last: it has a gradcam.py, too

import finetune_peers
import imbalance
import results
import stores
import transfer

CELL = {"dataset": "flowers", "model": "resnet18", "size": 64, "epochs": 3, "strategy": "full"}


def made_up(folder, accuracy, **changes):
    """The two files that a finished run has."""
    record = {**CELL, "seed": 1, **changes}
    run = folder / transfer.run_name(record)
    run.mkdir(parents=True)
    (run / "cell.json").write_text(json.dumps(record))
    summary = {
        "split": "val", "accuracy": accuracy, "seconds": 9.6, "trained_parameters": 7,
        "strategy": "full",
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))


def test_every_record_has_a_folder_of_its_own_name():
    changes = [
        {}, {"seed": 2}, {"size": 128}, {"epochs": 10}, {"strategy": "staged"},
        {"strategy": "full:bn_mode=eval"}, {"strategy": "full:bn_mode=train"}, {"model": "vgg11"},
    ]  # fmt: skip
    names = [transfer.run_name({**CELL, "seed": 1, **change}) for change in changes]
    assert len(set(names)) == len(names)
    assert names[0].startswith("flowers-resnet18-64-3-full_") and names[0].endswith("-s1")
    assert all("/" not in name and ":" not in name for name in names)


def test_a_strategys_flags_go_to_its_runs_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["transfer.py", "--batch_size", "8"])
    args, passed_on = transfer.parse_args()
    flags = transfer.flags_of({**CELL, "seed": 1, "strategy": "full:lr=1e-3,bn_mode=eval"}, args,
                              passed_on)  # fmt: skip
    assert {"--strategy=full", "--lr=1e-3", "--bn_mode=eval", "--seed=1"} <= set(flags)
    assert flags[flags.index("--batch_size") + 1] == "8"
    plain = transfer.flags_of({**CELL, "seed": 1}, args, passed_on)
    assert not any(flag.startswith("--lr") for flag in plain)


def test_the_table_has_a_row_a_cell_empty_where_nothing_ran(tmp_path):
    made_up(tmp_path, 0.5)
    made_up(tmp_path, 0.7, seed=2)
    made_up(tmp_path, 0.9, size=128)
    text = transfer.show(tmp_path, [CELL, {**CELL, "strategy": "staged"}])
    assert text.splitlines()[2:] == [
        "| flowers | resnet18 | 64 | 3 | full | 60.0 (50.0–70.0), 2 | val | 10 |",
        "| flowers | resnet18 | 64 | 3 | staged |  |  |  |",
        "| flowers | resnet18 | 128 | 3 | full | 90.0 (90.0–90.0), 1 | val | 10 |",
    ]
    assert (tmp_path / "table.md").read_text() == text + "\n"
    records = json.loads((tmp_path / "results.json").read_text())
    assert sorted(record["accuracy"] for record in records) == [0.5, 0.7, 0.9]
    assert (tmp_path / "transfer.png").stat().st_size > 1000


def test_finished_runs_are_written_as_a_measurement(tmp_path, monkeypatch, capsys):
    made_up(tmp_path / "runs", 0.5)
    made_up(tmp_path / "runs", 0.7, seed=2)
    words = ["--show", f"--output_dir={tmp_path / 'runs'}", "--sizes=64", "--batch_size=8"]
    monkeypatch.setattr(sys, "argv", ["transfer.py", *words, "--json", str(tmp_path)])
    transfer.main()
    (found,) = results.read(tmp_path)
    accuracy, seconds = found["rows"]
    assert accuracy["figure"] == "flowers, resnet18, 64 px, 3 epochs, full: val accuracy, %"
    assert (accuracy["min"], accuracy["mean"], accuracy["max"]) == (50, 60, 70)
    assert seconds["median"] == 9.6 and seconds["n"] == 2
    assert found["setting"] == "flags of every run: --batch_size=8"
    assert "--show" in found["command"] and found["benchmark"] == "transfer"


def test_stores_are_compared_seed_by_seed(tmp_path, monkeypatch, capsys):
    for store, seed, hits in (("packed", 1, 0.9), ("packed", 2, 0.8), ("decoded", 1, 0.7)):
        run = tmp_path / "runs" / f"64px-0.35-{store}-seed{seed}"
        run.mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps({"accuracy": hits}))
    words = ["--show", f"--output_dir={tmp_path / 'runs'}", "--sizes=64", "--scales=0.35"]
    words += ["--seeds", "1", "2", "--dataset=x/flowers", "--model=vgg11"]
    monkeypatch.setattr(sys, "argv", ["stores.py", *words, "--json", str(tmp_path)])
    stores.main()
    (found,) = results.read(tmp_path)
    cell = "flowers, vgg11, 64 px, crops from 35%, "
    assert [(row["figure"], row["n"], row["mean"]) for row in found["rows"]] == [
        (f"{cell}packed: accuracy, %", 2, 85),
        (f"{cell}decoded: accuracy, %", 1, 70),
        (f"{cell}packed minus decoded, points", 1, 20),
    ]


def test_uneven_classes_are_compared_with_the_run_of_the_same_seed(tmp_path):
    for kind, seed, balanced in (("none", 1, 0.5), ("none", 2, 0.6), ("sqrt", 2, 0.7)):
        cell = {"images": "a", "ratio": 10, "kind": kind, "seed": seed, "train": 99,
                "balanced": balanced, "as_train": 0.8, "seconds": 3.0}  # fmt: skip
        cell |= {"after": [balanced, 0.7]} if kind == "none" else {}
        (tmp_path / f"{kind}{seed}").mkdir()
        (tmp_path / f"{kind}{seed}" / "cell.json").write_text(json.dumps(cell))
    rows = {row.figure: row.summary() for row in imbalance.rows_of(tmp_path)}
    assert rows["a, 10:1, sqrt: gain over none, points"]["mean"] == pytest.approx(10)
    assert rows["a, 10:1, none: balanced accuracy, %"]["mean"] == pytest.approx(55)
    assert "a, 10:1, none: gain over none, points" not in rows
    assert rows["a, 10:1, sqrt: training, s"]["median"] == 3
    assert imbalance.table(tmp_path).splitlines()[2:] == [
        "| a | 10:1 | 99 | none | 55.0 (50.0 to 60.0) | +0.0 (+0.0 to +0.0) | "
        "80.0 (80.0 to 80.0) | 2 | 3 |",
        "| a | 10:1 | 99 | sqrt | 70.0 (70.0 to 70.0) | +10.0 (+10.0 to +10.0) | "
        "80.0 (80.0 to 80.0) | 1 | 3 |",
        "| a | 10:1 | 99 | after training | 55.0 (50.0 to 60.0) | +0.0 (+0.0 to +0.0) | "
        "70.0 (70.0 to 70.0) | 2 | 3 |",
    ]


def test_sides_stand_in_one_order_with_their_spread(tmp_path):
    for side, seed, hits, seconds in (("timm", 1, 0.5, 9.0), ("full", 1, 0.9, 3.0),
                                      ("full", 2, 0.7, 5.0)):  # fmt: skip
        facts = {"side": side, "size": 64, "epochs": 2, "seed": seed, "accuracy": hits}
        (tmp_path / f"{side}-64-2-s{seed}.json").write_text(
            json.dumps(facts | {"seconds": seconds})
        )
    assert finetune_peers.table(tmp_path).splitlines()[2:] == [
        "| 64 | 2 | full | 80.0 (70.0–90.0), 2 | 4 (3–5) |",
        "| 64 | 2 | timm | 50.0 (50.0–50.0), 1 | 9 (9–9) |",
    ]
    args = SimpleNamespace(output_dir=tmp_path, dataset="x/flowers", model="vgg11")
    full, seconds, *_ = (row.summary() for row in finetune_peers.rows_of(args))
    assert full["figure"] == "flowers, vgg11, 64 px, 2 epochs, full: test accuracy, %"
    assert full["mean"] == pytest.approx(80) and seconds["median"] == 4


@pytest.mark.slow
def test_a_cell_is_run_once(tmp_path):
    images = [
        f"{split}/{name}/*{n}.png" for split, n in (("train", 4), ("test", 2)) for name in "ab"
    ]
    imagefolders.make(tmp_path / "images", *images)
    command = [
        sys.executable, smallruns.ROOT / "benchmarks" / "transfer.py", "--dataset",
        tmp_path / "images", "--model", "resnet18", "--weights", "none", "--sizes", "16",
        "--epochs", "1", "--strategies", "full:lr=0.01", "--seeds", "3", "--output_dir",
        tmp_path / "runs", "--batch_size", "4", "--report_to", "none", "--config_file",
        smallruns.ROOT / "accelerate_configs" / "cpu.yaml",
    ]  # fmt: skip
    first, second = (
        subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
        for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "1 of 1: images-resnet18-16-1-full_" in first.stdout
    assert "1 of 1" not in second.stdout and second.stdout.strip() in first.stdout
