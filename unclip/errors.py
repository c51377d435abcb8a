"""The errors a user can meet, each with its documented exit code.

Every verb catches `UnclipError`, prints its one line and exits with its code; anything else is a
defect of unclip and keeps its traceback. Exit codes: 0 done, 70 numerics, 74 input or output,
75 stopped and resumable, 78 configuration.
"""

import difflib
from collections.abc import Iterable


class UnclipError(Exception):
    """A failure with a one-line message for the user and an exit code for the scheduler.

    Attributes:
      message: the line; table: further lines, where the failure is a list of differences.
    """

    exit_code = 1

    def __init__(self, message: str = "", table: str = ""):
        super().__init__(f"{message}\n{table}" if table else message)
        self.message, self.table = message, table


class ConfigError(UnclipError):
    """What was asked for cannot be done: an unknown name, a bad value, parts that do not fit."""

    exit_code = 78


class DataError(UnclipError):
    """Something could not be read or written: shards, pictures, checkpoints, disk."""

    exit_code = 74


class Damaged(DataError):
    """What was written once is proven to be other than it was."""


class NumericsError(UnclipError):
    """Training met non-finite numbers and did not recover."""

    exit_code = 70


class Stopped(UnclipError):
    """The job was asked to stop, saved its state and can be resumed by the same command."""

    exit_code = 75


def unknown(kind: str, given: str, choices: Iterable[str]) -> ConfigError:
    """A `ConfigError` that names the nearest valid choices.

    Args:
      kind: what is being named, e.g. "preset" or "sampler".
      given: what the user wrote.
      choices: every valid name.
    """
    choices = sorted(map(str, choices))
    near = difflib.get_close_matches(str(given), choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return ConfigError(f"unknown {kind} {given!r}: {hint}valid: {', '.join(choices)}")
