"""Evaluation protocols: which captions are drawn, what they are compared with, who judges.

A protocol is a caption list, a set of real pictures, a size and a judge. Its `id` is part of the
name of every number measured under it, so that numbers of two protocols are never compared by
accident.

`make("emoji-held-out", size=64)` opens one; `base.EvaluationProtocol` says what it can do.
"""

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from unclip import errors

if TYPE_CHECKING:
    from unclip.protocols.base import EvaluationProtocol

# Name -> module and class or function that makes it; its keyword arguments are the settings.
NAMES = {
    "coco2014val-30k": ("coco", "coco2014val_30k"),
    "emoji-held-out": ("emoji", "EmojiHeldOut"),
    "scenes": ("composition", "Scenes"),
    "scenes-withheld": ("composition", "withheld_scenes"),
    "typographic": ("typographic", "Typographic"),
    "reconstruction": ("reconstruction", "Reconstruction"),
    "geneval": ("exports", "GenEval"),
    "t2i-compbench": ("exports", "T2ICompBench"),
}
WITH_FILE = ("geneval", "t2i-compbench")  # these need a prompt file: geneval:FILE


def make(name: str, **settings: Any) -> "EvaluationProtocol":
    """A protocol by its name.

    Args:
      name: one of `NAMES`; "geneval:FILE" and "t2i-compbench:FILE" name their prompt file.
      settings: see docs/protocols.md; None, "" and, where the default is None, 0 leave a setting
        to the protocol.

    Raises:
      ConfigError: an unknown name or setting, or a value out of range.
      DataError: its files are missing or damaged.
    """
    kind, colon, file = name.partition(":")
    if kind not in NAMES:
        raise errors.unknown("protocol", kind, NAMES)
    if colon and not (file and kind in WITH_FILE):
        expected = f"{kind}:FILE" if kind in WITH_FILE else kind
        raise errors.ConfigError(f"protocol {name!r}: expected {expected}")
    module, function = NAMES[kind]
    maker = getattr(importlib.import_module(f"unclip.protocols.{module}"), function)
    known = inspect.signature(maker).parameters
    given = {**settings, "prompts": file} if colon else settings
    for setting in given:
        if setting not in known:
            raise errors.unknown(f"setting of protocol {kind}", setting, known)
    given = {setting: value for setting, value in given.items() if value not in (None, "")}
    # A config field has a type, so there 0 stands for None: the protocol's own choice.
    given = {k: v for k, v in given.items() if v != 0 or known[k].default is not None}
    if kind in WITH_FILE and "prompts" not in given:
        raise errors.ConfigError(f"protocol {kind!r} needs its prompts: expected {kind}:FILE")
    return maker(**given)
