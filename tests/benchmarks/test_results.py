"""docs/results.md is made from the measurements, and what other pages quote of them is in them."""

import json
import re
import shlex
import sys

import pytest

import smallruns

sys.path.append(str(smallruns.ROOT / "benchmarks"))  # last: it has a gradcam.py, too

import losses
import measure
import results

ROOT = smallruns.ROOT
MEASUREMENTS = {found["name"]: found for found in results.read()}
CURRENT = {found["name"]: found for found in results.newest(list(MEASUREMENTS.values()))}


def row(figure="a", n=3, **more):
    return {"figure": figure, "n": n, "min": 1.0, "median": 2.0, "max": 3.0, **more}


def measured(name="a", date="2026-01-01", **more):
    machine = {"processor": "X", "cores": 2, "bf16": False, "gpu": None}
    return {
        "name": name, "benchmark": "mix", "command": "python benchmarks/mix.py", "date": date,
        "machine": machine, "versions": {"torch": "2.15.0"}, "commit": None, "setting": "batch 4",
        "rows": [row()], "notes": [], **more,
    }  # fmt: skip


# ---------------------------------------------------------------- the files


def check(found):
    """A measurement has what the page needs, and its numbers can be."""
    assert set(results.KEYS) <= found.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]) and found["setting"]
    assert found["machine"].keys() == {"processor", "cores", "bf16", "gpu"}
    figures = [row["figure"] for row in found["rows"]]
    assert figures and len(set(figures)) == len(figures)
    for row in found["rows"]:
        assert row["n"] >= 1 and ("median" in row) != ("mean" in row), row
        low, high = row.get("interval", (results.middle(row),) * 2)
        assert low <= results.middle(row) <= high, row
        assert "min" in row or "sd" in row or "interval" in row, row
        if "min" in row:
            assert row["min"] <= results.middle(row) <= row["max"], row
        assert "at_most" not in row or "wanted" in row, row


def flags_of(file):
    """What a script may be given: its flags, and where it passes others on those of training."""
    text = file.read_text()
    sources = [text, (ROOT / "benchmarks" / "measure.py").read_text()]
    if "parse_known_args" in text or file.parent == ROOT:
        sources += [path.read_text() for path in (ROOT / "harness" / "cli").glob("*.py")]
    named = r'(?:"--|\badd\(\s*\w+,\s*")(\w+)"'
    return {flag for source in sources for flag in re.findall(named, source)}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_is_complete_and_its_command_exists(name):
    found = MEASUREMENTS[name]
    check(found)
    assert name.startswith(found["benchmark"].replace(".", "_") + f"-{found['date']}-")
    words = shlex.split(found["command"])
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        return
    script = next(word for word in words if word.endswith(".py"))
    here = f"benchmarks/{found['benchmark']}.py"
    assert script in (here, "benchmarks/bench.py", found["benchmark"])
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    assert "quick" not in given and not given - flags_of(ROOT / script)


def test_there_are_measurements_of_several_machines():
    machines = {results.machine_words(found["machine"]) for found in CURRENT.values()}
    assert len(CURRENT) > 30 and len(machines) > 3


@pytest.mark.parametrize("into", ["file", "folder"])
def test_a_benchmark_writes_a_measurement(into, tmp_path, monkeypatch, capsys):
    place = tmp_path / "a.json" if into == "file" else tmp_path
    words = ["losses.py", "--quick", "--rounds=1", "--json", str(place), "--note", "two others"]
    monkeypatch.setattr(sys, "argv", words)
    losses.main()
    (file,) = tmp_path.glob("*.json")
    (found,) = results.read(tmp_path)
    check(found)
    assert found["command"] == "python benchmarks/losses.py --quick --rounds=1"
    assert (found["notes"], found["benchmark"]) == (["two others"], "losses")
    assert into == "file" or file.name.startswith(f"losses-{found['date']}-")
    assert results.table(found["rows"]) in capsys.readouterr().out


def test_quick_figures_do_not_go_among_the_results(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["losses.py", "--quick", "--json"])
    with pytest.raises(SystemExit, match="mean nothing"):
        losses.main()


def test_a_command_names_no_folder_of_this_machine(tmp_path):
    argv = ["/x/mix.py", "--data", str(tmp_path), f"--out={tmp_path}", "--json", "--note", "a b"]
    assert measure.command(argv) == (
        f"python benchmarks/mix.py --data {tmp_path.name} --out={tmp_path.name}"
    )
    recipe = ROOT / "recipes" / "digits.yaml"
    assert measure.without_folders(str(recipe)) == "recipes/digits.yaml"
    assert measure.without_folders("4") == "4" and measure.without_folders("/") == "/"


def test_a_file_is_named_by_benchmark_date_and_machine_and_never_replaced(tmp_path):
    made = measured(machine={"processor": "Intel(R) Xeon(R) CPU @ 2.80GHz", "gpu": None})
    assert measure.file_name(made, tmp_path) == "mix-2026-01-01-xeon.json"
    (tmp_path / "mix-2026-01-01-xeon.json").touch()
    assert measure.file_name(made, tmp_path) == "mix-2026-01-01-xeon-2.json"
    made["machine"] = {"processor": "x", "gpu": "NVIDIA H200"}
    assert measure.file_name(made, tmp_path) == "mix-2026-01-01-h200.json"


def test_what_is_written_is_read_again_a_line_a_row(tmp_path):
    made = measured(rows=[row("a"), row("b")], notes=["c"])
    del made["name"]
    results.write(tmp_path / "x.json", made)
    assert json.loads((tmp_path / "x.json").read_text()) == made
    lines = (tmp_path / "x.json").read_text().splitlines()
    assert sum('"figure"' in line for line in lines) == 2
    assert results.read(tmp_path) == [{"name": "x", **made}]


# ---------------------------------------------------------------- the page


def test_the_page_is_what_the_files_make():
    made = results.page(list(MEASUREMENTS.values()))
    assert made == results.PAGE.read_text("utf-8"), "run make results"


def test_the_newest_of_a_figure_counts_on_each_machine():
    older = measured("old", rows=[row("a"), row("b")])
    newer = measured("new", "2026-02-01", rows=[row("b")])
    other = measured("other", machine={**older["machine"], "cores": 4}, rows=[row("b")])
    kept = results.newest([newer, older, other])
    assert [(found["name"], [row["figure"] for row in found["rows"]]) for found in kept] == [
        ("new", ["b"]), ("old", ["a"]), ("other", ["b"])
    ]  # fmt: skip
    assert [found["name"] for found in results.newest([newer, measured(rows=[row("b")])])] == [
        "new"
    ]


def test_of_a_day_the_last_file_is_the_newest(tmp_path):
    for name in ("x", "x-2"):
        results.write(tmp_path / f"{name}.json", measured(name))
    assert [found["name"] for found in results.read(tmp_path)] == ["x-2", "x"]


def test_the_page_lists_what_was_missed():
    rows = [row("reached", wanted=2), row("missed", wanted=1.5, at_most=True)]
    text = results.page([measured(rows=rows, notes=["why"])])
    missed = text.partition("## Wanted and missed")[2].partition("\n## ")[0]
    assert "1 of 2:" in missed and "missed | 2.00 (1.00–3.00) | ≤ 1.5 |" in missed
    assert "reached" not in missed and "[mix](#a)" in missed and '<a id="a"></a>' in text
    assert "## X, 2 cores, without bf16" in text and "- why" in text
    assert "mixup and CutMix on a batch" in text  # the benchmark's docstring


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "2.00 (1.00–3.00)"),
        ({"n": 1}, "2.00"),
        ({"digits": 0}, "2 (1–3)"),
        ({"min": 0, "median": 0, "max": 0}, "0 (0–0)"),
        ({"min": -1.0}, "2.00 (-1.00 to 3.00)"),
        ({"median": 20.0, "max": 1234.0}, "20.0 (1.0–1,234.0)"),
        ({"min": -0.3, "median": -0.01, "digits": 1}, "0.0 (-0.3 to 3.0)"),
        ({"interval": [-1, 4]}, "2.00 (1.00–3.00), 95 %: -1.00 to 4.00"),
    ],
)
def test_a_row_shows_its_spread(changes, expected):
    assert results.spread(row(**changes)) == expected


def test_a_mean_says_so():
    seeds = measure.Row("a", [89.0, 90.0, 94.0], 91, mean=True, digits=1).summary()
    assert results.spread(seeds) == "mean 91.0 (89.0–94.0)" and results.met(seeds)
    assert results.spread({"figure": "a", "n": 3, "mean": 9.0, "sd": 0.5}) == "mean 9.00 ± 0.50"


# ---------------------------------------------------------------- what other pages quote

LINK = r"\]\((?:docs/|\.\./docs/)?results\.md#([\w.-]+)\)"
NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w]|\.\d)"


def numbers_of(names):
    """Every number of the rows of these measurements that stand on the page, and of their notes."""
    keys = ("n", "min", "median", "mean", "max", "sd")
    for name in names:
        words = list(CURRENT[name]["notes"])
        for row in CURRENT[name]["rows"]:
            yield from (abs(row[key]) for key in keys if key in row)
            yield from map(abs, row.get("interval", ()))
            words.append(row["figure"])
        yield from (float(word.replace(",", "")) for word in re.findall(NUMBER, "\n".join(words)))


def unknown(text, names, pattern=NUMBER):
    """The numbers of a text that are none of these measurements, rounded as the text does."""
    text = re.sub(r"\]\([^)]*\)|`[^`]*`", " ", text)  # links, code
    there = list(numbers_of(names))
    for word in re.findall(pattern, text):
        value, digits = float(word.replace(",", "")), len(word.partition(".")[2])
        if not any(abs(value - number) <= 0.5000001 * 10**-digits for number in there):
            yield word


def table_rows(text, heading):
    """The rows of the table under a heading, as lists of cells."""
    lines = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    assert len(rows) > 5
    return rows[2:]


@pytest.mark.parametrize("heading", ["What was measured", "The tricks"])
def test_every_figure_of_the_front_page_was_measured(heading):
    checked = 0
    for cells in table_rows((ROOT / "README.md").read_text(), heading):
        figures = "|".join(cells[1:] if heading == "What was measured" else cells[2:])
        names = re.findall(LINK, "|".join(cells))
        plain = re.sub(r"\]\([^)]*\)", "", figures)
        assert names or not re.search(NUMBER, plain), f"no link to docs/results.md: {plain}"
        assert set(names) <= CURRENT.keys(), names
        sizes = r"(?<![\w.])(?:\d+ views|\d+ epochs|\d+:1|H200)"  # no measurements
        assert not list(unknown(re.sub(sizes, "", figures), names)), cells
        checked += bool(names)
    assert checked >= 5


PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "benchmarks/README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_a_paragraph_that_links_to_results_takes_its_figures_from_there(page):
    """Numbers with a decimal point; also those of the table that follows the paragraph.

    A row of a table that links to results is a paragraph of its own.
    """
    if page == results.PAGE:
        return
    decimal = r"(?<![\w.])\d[\d,]*\.\d+(?![\w]|\.\d)"
    blocks = re.split(r"\n\s*\n", page.read_text())
    for block, following in zip(blocks, [*blocks[1:], ""], strict=True):
        table = block.lstrip().startswith("|")
        follows = "" if table or not following.lstrip().startswith("|") else following
        for text in block.splitlines() if table else [block]:
            names = re.findall(LINK, text)
            assert set(names) <= CURRENT.keys(), names
            assert not names or not list(unknown(text + follows, names, decimal)), text


def test_a_number_that_is_in_no_measurement_is_seen():
    name, found = next((k, v) for k, v in CURRENT.items() if v["benchmark"] == "photos")
    known = results.spread(found["rows"][0])
    assert not list(unknown(known, [name]))
    assert list(unknown(f"{known} 77.77", [name])) == ["77.77"]
