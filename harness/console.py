"""Printing that never stops the training: a line reaches the terminal, or is lost.

A terminal without UTF-8, a closed output (>&-), a pipe whose reader has gone (| head), a full disk
behind a log: training goes on. Control characters, which names of classes or files may contain,
are shown as \\x1b and the like.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys

CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text) -> str:
    r"""The text with control characters and lone surrogates written out.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    text = CONTROLS.sub(lambda match: ascii(match[0])[1:-1], str(text))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text) -> str:
    r"""The text as `printable` gives it, with line ends and tabs written out too.

    >>> one_line("two\nlines")
    'two\\nlines'
    """
    return printable(re.sub(r"[\t\n\r]", lambda match: ascii(match[0])[1:-1], str(text)))


class Output:
    """A text stream in front of another: `write` and `flush` never raise an OSError."""

    def __init__(self, stream, controls=True):
        self._stream, self._controls = stream, controls

    def write(self, text):
        printable_text = printable(text) if self._controls else text
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(printable_text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self):
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name):
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_output():
    """Put an `Output` in front of stdout and stderr while the block runs."""
    originals = sys.stdout, sys.stderr
    streams = [stream or open(os.devnull, "w") for stream in originals]  # noqa: SIM115
    # A progress bar moves the cursor of stderr by control characters
    sys.stdout, sys.stderr = Output(streams[0]), Output(streams[1], controls=False)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = originals
        _discard_unwritable(streams)


def _discard_unwritable(streams):
    """Discard output that can't be written: otherwise Python ends with exit status 120."""
    for stream in streams:
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def words_of(text) -> list[str]:
    """The items of a list with commas, each once.

    >>> words_of("acc, loss,acc")
    ['acc', 'loss']
    """
    return list(dict.fromkeys(item.strip() for item in text.split(",")))
