"""Paths as people write them: at home, and several in a word."""

import os
from collections.abc import Mapping
from typing import Any


def expanded(value: Any) -> Any:
    """A path with `~` and `~NAME` at its beginning as the home folders they stand for.

    The shell does this for a word of its own, but not behind `--flag=` nor in quotes.

    Args:
      value: text or a path; or a list, tuple or mapping of them at any depth. Anything else, and
        text that does not begin so, is given back as it is.
    """
    if isinstance(value, str | os.PathLike):
        return os.path.expanduser(value) if os.fspath(value).startswith("~") else value
    if isinstance(value, list | tuple):
        return type(value)(map(expanded, value))
    if isinstance(value, Mapping):
        return {name: expanded(item) for name, item in value.items()}
    return value


def listed(text: str) -> list[str]:
    """The parts of a text between its commas, blanks around them left out.

    Commas in brackets of any kind are no separators: `a-{0,1}.tar,b.tar` is two parts.
    """
    found, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth <= 0:
            found.append("")
        else:
            found[-1] += sign
    return [part.strip() for part in found if part.strip()]
