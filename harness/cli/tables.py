"""Tables of text, and names in Markdown."""

from __future__ import annotations

import re

from harness.console import one_line

MARKUP = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")


def facts(rows) -> str:
    """(name, text) pairs, one a line: the form in which every script prints its plan."""
    return "\n".join(f"{name:<12} {one_line(text)}" for name, text in rows)


def escaped(value):
    r"""A report with its strings and keys escaped, so that Markdown shows them literally.

    Names of classes and files may hold markup and control characters.

    >>> escaped({"<b>": ["golden_retriever", "a|b", "_x_", "R&D ~5 $"]})
    {'\\<b\\>': ['golden_retriever', 'a\\|b', '\\_x\\_', 'R\\&D \\~5 \\$']}
    """
    if isinstance(value, str):
        return MARKUP.sub(r"\\\g<0>", one_line(value))
    if isinstance(value, dict):
        return {escaped(key): escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(item) for item in value]
    return value


def table(header, rows) -> str:
    """A Markdown table whose columns line up, so that it serves a terminal too."""
    cells = [[re.sub(r"(?<!\\)\|", "/", str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]

    def line(row):
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
