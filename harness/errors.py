"""The errors that end a script with one line instead of a traceback."""

import difflib


class UserError(ValueError):
    """A mistake in flags, data or files: says what is wrong and what to do. Exit status 2.

    The scripts print it without a traceback (`harness.launch.script`).
    """

    status = 2


class RunStopped(UserError):
    """The run itself cannot go on (a non-finite loss, a failed final save). Exit status 1."""

    status = 1


class StopAsked(Exception):
    """A signal came during long work, which all processes have stopped."""

    def __init__(self, sum_of_signals):
        super().__init__("a signal")
        self.sum_of_signals = sum_of_signals  # see harness.training.guard.STOP


def nearest(name, names):
    """`, did you mean "x"?` for the closest of `names`, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(k) for k in names], n=1, cutoff=0.5)
    return f', did you mean "{match[0]}"?' if match else ""


def shortened(text, limit=60):
    """The text, or its start and its length where it is longer than `limit` characters.

    >>> shortened("9" * 5000, limit=5)
    '99999… (5000 characters)'
    """
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def first_line(error):
    """The start of the first line of an error's message; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def reason_of(error):
    """The kind of an error and the start of its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
