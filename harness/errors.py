"""The errors that end a script with one line instead of a traceback."""


class UserError(ValueError):
    """A mistake in flags, data or files: says what is wrong and what to do. Exit status 2.

    The scripts print it without a traceback (`harness.launch.script`).
    """

    status = 2


class RunStopped(UserError):
    """The run itself cannot go on (a non-finite loss, a failed final save). Exit status 1."""

    status = 1
