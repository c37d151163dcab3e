"""Every message that docs/TROUBLESHOOTING.md quotes still stands in the code."""

import ast
import re

import pytest

import smallruns

PAGE = (smallruns.ROOT / "docs" / "TROUBLESHOOTING.md").read_text()
# An item begins with its message, alone on its line; … are values
QUOTES = re.findall(r"^- `(.+)`$", PAGE, re.M)


def text_of(node):
    """The text of a string in the code, with … for what it puts in; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [text_of(node.left) or "…", text_of(node.right) or "…"]
        return "".join(sides) if sides != ["…", "…"] else None
    return None


def texts():
    """Every string of the scripts and the harness, each in one line."""
    files = [*smallruns.ROOT.glob("*.py"), *(smallruns.ROOT / "harness").rglob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            text = text_of(node)
            if text and len(text.split()) > 2:
                yield " ".join(text.split())


TEXTS = set(texts())


def stands_in_the_code(quote):
    """Whether one string has all the fixed words of a quote, in their order."""
    fixed = [" ".join(part.split()).strip(" ,:;.") for part in quote.split("…")]
    pattern = re.compile(".*?".join(re.escape(part) for part in fixed if part))
    return any(pattern.search(text) for text in TEXTS)


def test_as_many_messages_as_there_are_items():
    assert len(QUOTES) == len(set(QUOTES)) == len(re.findall(r"^- ", PAGE, re.M)) >= 25


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_stands_in_the_code(quote):
    words = re.findall(r"[\w&-]+", quote.replace("…", " "))
    assert len(words) >= 2, "too few words to know the message by"
    assert stands_in_the_code(quote)


@pytest.mark.parametrize(
    "quote", ["… holds a finished run: remove it", "no class folders … directly inside"]
)
def test_another_message_does_not(quote):
    assert not stands_in_the_code(quote)


def test_every_flag_on_the_page_is_one():
    source = (smallruns.ROOT / "harness" / "cli" / "flags.py").read_text()
    known = set(re.findall(r'add\(\s*\w+,\s*"(\w+)"', source)) | {"config"}
    launchers = {"cpu", "config_file"}
    named = set(re.findall(r"--(\w+)", PAGE))
    assert named and not named - known - launchers
