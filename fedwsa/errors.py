"""The two ways in which a run is refused or ends, each said to the user in a line or two without a traceback."""


class UsageError(ValueError):
    """What was asked for cannot be done; the message says what, where and what is allowed. Exit status 2."""


class RunError(RuntimeError):
    """A run that cannot go on; what it has written is kept. Exit status 1."""
