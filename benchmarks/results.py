"""docs/results.md, made from the measurements in benchmarks/results/.

    python benchmarks/results.py        (or make results)

A measurement is a JSON file, as every benchmark writes it with --json:

    benchmark   its name, or train.py …   command   what was run, folders by their last name
    date        2026-11-26                machine   processor, cores, bf16 (natively?), gpu
    versions    of Python and packages    commit    of this repository, null where not known
    setting     what was measured         notes     why a goal is missed, what shared the machine
    rows        a figure each: its name, n, median (or mean), min and max (or sd, the standard
                deviation); perhaps `interval`, of 95 %, and `digits`, the decimals to show. Where
                something is wanted of it, `wanted`: at least that, or with `at_most` at most

On the page, a figure that a benchmark measured several times on one machine is the newest alone.
This file needs nothing but Python's own library.
"""

import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
KEYS = ("benchmark", "command", "date", "machine", "versions", "commit", "setting", "rows", "notes")

HEAD = """# Results

Made by `make results` from the files in [benchmarks/results](../benchmarks/results), which the
benchmarks write; not to be edited. What each benchmark compares, and what its figures mean, is in
[benchmarks/README.md](../benchmarks/README.md); how cost grows with batch, image, threads, data and
members in [GROWTH.md](../benchmarks/GROWTH.md).

- **median (min–max), n**: of n rounds, or of n trainings with different seeds; "mean" where it is
  one, perhaps with ± the standard deviation. "95 %" is a confidence interval.
- **ours / theirs**: both sides were measured in turns, in one run on one machine. Most machines
  were shared with other work, so ratios count, not seconds. A ratio is of speeds: above 1, ours is
  faster. Where something at most (≤) is wanted, and where steps, starts or memory are compared, it
  is of what both spend: below 1, ours spends less.
- **wanted, met**: what was aimed at, and whether the median (or mean) reaches it.
- FOLDER and the like in a command stand for files of your own. Where no commit is named, none was
  written down.
"""


def read(folder: Path = FOLDER) -> list[dict]:
    """The measurements of a folder, newest first, each with the name of its file."""
    files = sorted(folder.glob("*.json"))
    measurements = [{"name": file.stem, **json.loads(file.read_text("utf-8"))} for file in files]
    return sorted(measurements, key=lambda m: (m["date"], m["name"]), reverse=True)


def write(file: Path, measurement: dict) -> None:
    """JSON with a line a row and a line a note, so that a diff shows what changed."""
    lines = []
    for key, value in measurement.items():
        text = json.dumps(value, ensure_ascii=False)
        if key in ("rows", "notes") and value:
            items = (f"  {json.dumps(item, ensure_ascii=False)}" for item in value)
            text = "[\n" + ",\n".join(items) + "\n ]"
        lines.append(f' "{key}": {text}')
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


# ---------------------------------------------------------------- rows


def middle(row: dict) -> float:
    return row["median"] if "median" in row else row["mean"]


def met(row: dict) -> bool:
    return middle(row) <= row["wanted"] if row.get("at_most") else middle(row) >= row["wanted"]


def wanted(row: dict) -> str:
    return f"{'≤' if row.get('at_most') else '≥'} {row['wanted']:g}" if "wanted" in row else ""


def spread(row: dict) -> str:
    """`median (min–max)`, or `mean … (min–max)`; a single value stands alone."""
    size, digits = abs(middle(row)), row.get("digits")
    if digits is None:
        whole = size >= 100 or (row.get("min") == row.get("max") == 0)
        digits = 0 if whole else 1 if size >= 10 else 2 if size >= 0.1 else 3

    def shown(value):
        return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no -0.0

    def between(low, high):
        return f"{shown(low)}{' to ' if low < 0 else '–'}{shown(high)}"

    text = f"{'mean ' if 'mean' in row and row['n'] > 1 else ''}{shown(middle(row))}"
    text += f" ± {shown(row['sd'])}" if "sd" in row else ""
    text += f" ({between(row['min'], row['max'])})" if "min" in row and row["n"] > 1 else ""
    return text + (f", 95 %: {between(*row['interval'])}" if "interval" in row else "")


def table(rows: list[dict]) -> str:
    """A Markdown table; the last two columns only where something is wanted."""
    goals = any("wanted" in row for row in rows)
    lines = ["| figure | median (min–max) | n |", "|---|---|---|"]
    if goals:
        lines = [f"{lines[0]} wanted | met |", f"{lines[1]}---|---|"]
    for row in rows:
        line = f"| {row['figure']} | {spread(row)} | {row['n']} |"
        if goals:
            answer = "" if "wanted" not in row else "yes" if met(row) else "**no**"
            line += f" {wanted(row)} | {answer} |"
        lines.append(line)
    return "\n".join(lines)


# ---------------------------------------------------------------- page


def machine_words(machine: dict) -> str:
    bf16 = "with bf16" if machine["bf16"] else "without bf16"
    if machine["gpu"]:
        return f"{machine['gpu']}, {bf16}, and {machine['cores']} cores of {machine['processor']}"
    return f"{machine['processor']}, {machine['cores']} cores, {bf16}"


def newest(measurements: list[dict]) -> list[dict]:
    """The measurements without rows that a newer one has, and without those left empty by that."""
    figures, current = set(), []
    for measurement in measurements:
        place = (machine_words(measurement["machine"]), measurement["benchmark"])
        rows = [row for row in measurement["rows"] if (*place, row["figure"]) not in figures]
        figures |= {(*place, row["figure"]) for row in rows}
        current += [{**measurement, "rows": rows}] if rows else []
    return current


def missed_table(measurements: list[dict]) -> str:
    lines = ["| figure | measured | wanted | machine |", "|---|---|---|---|"]
    for measurement in measurements:
        for row in measurement["rows"]:
            if "wanted" in row and not met(row):
                figure = f"[{measurement['benchmark']}](#{measurement['name']}): {row['figure']}"
                cells = [figure, spread(row), wanted(row), machine_words(measurement["machine"])]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def purpose(benchmark: str) -> str:
    """The first line of the docstring of a benchmark, or of a script as train.py."""
    file = ROOT / (benchmark if benchmark.endswith(".py") else f"benchmarks/{benchmark}.py")
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]


def section(measurement: dict) -> str:
    """The part of the page on one measurement: command, versions, table, notes."""
    versions = ", ".join(f"{name} {number}" for name, number in measurement["versions"].items())
    versions = versions or "versions not written down"
    commit = f"; commit {measurement['commit']}" if measurement["commit"] else ""
    lines = [
        f'<a id="{measurement["name"]}"></a>{measurement["date"]}; {versions}{commit}', "",
        f"```\n{measurement['command']}\n```", "", measurement["setting"], "",
        table(measurement["rows"]),
    ]  # fmt: skip
    notes = "\n".join(f"- {note}" for note in measurement["notes"])
    return "\n".join([*lines, "", notes, ""] if notes else [*lines, ""])


def page(measurements: list[dict]) -> str:
    current = newest(measurements)
    machines = dict.fromkeys(machine_words(measurement["machine"]) for measurement in current)
    goals = [row for measurement in current for row in measurement["rows"] if "wanted" in row]
    failed = sum(not met(row) for row in goals)
    lines = [HEAD, "## Wanted and missed", "", f"{failed} of {len(goals)}:", ""]
    lines += [missed_table(current), ""]
    for machine in machines:
        lines += [f"## {machine[0].upper()}{machine[1:]}", ""]
        of_machine = [m for m in current if machine_words(m["machine"]) == machine]
        for benchmark in dict.fromkeys(m["benchmark"] for m in of_machine):
            lines += [f"### {benchmark}", "", purpose(benchmark), ""]
            lines += [section(m) for m in of_machine if m["benchmark"] == benchmark]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(read()), "utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(read())} measurements")
