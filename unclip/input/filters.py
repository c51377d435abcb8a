"""Which samples are fit to train on, by their JSON fields and their caption's length.

Collections made by img2dataset carry what is needed in each sample's JSON: sizes, the CLIP
similarity of picture and caption, probabilities of unsafe content. A `Filters` turns one sample's
JSON and caption, and nothing else, into "" or a short reason, so that every process makes the same
choice and draws the same replacement for a rejected sample.
"""

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unclip.errors import ConfigError

CAPTION = {"caption_words": lambda text: len(text.split()), "caption_chars": len}
SIZES = ("width", "height", "aspect", "min_side")
_USUAL = (*SIZES, *CAPTION, "similarity", "punsafe", "pwatermark", "aesthetic")
_HELP = "expected (low, high), None for an open end, or a list of allowed strings"


class _Rule(NamedTuple):
    field: str
    low: float | None
    high: float | None
    allowed: frozenset[str] | None
    optional: bool

    def reason(self, value: Any) -> str:
        """ "" if the value passes; an absent value, or one of another type, counts as missing."""
        if self.allowed is not None:
            if not isinstance(value, str):
                return "" if self.optional else f"no-{self.field}"
            return "" if value in self.allowed else f"other-{self.field}"
        if not _is_number(value):
            return "" if self.optional else f"no-{self.field}"
        if self.low is not None and value < self.low:
            return f"low-{self.field}"
        return f"high-{self.field}" if self.high is not None and value > self.high else ""


class Filters:
    """Rules that a sample must pass; `Filters.parse` makes one. Truthy if there is any rule.

    Attributes:
      reads_json, reads_caption: whether any rule needs the JSON, or the caption.
    """

    def __init__(self, rules: Sequence[_Rule] = ()):
        self._json = tuple(rule for rule in rules if rule.field not in CAPTION)
        self._caption = tuple(rule for rule in rules if rule.field in CAPTION)
        self.reads_json, self.reads_caption = bool(self._json), bool(self._caption)

    @classmethod
    def parse(cls, given: "Mapping[str, Any] | str | Filters | None") -> "Filters":
        """Checks and compiles rules.

        Args:
          given: field -> (low, high), both ends included and None for an open one, or -> a list of
            allowed strings. The same as text, to be given on a command line:
            "similarity=0.28:,min_side?=256:,aspect=:2,NSFW=UNLIKELY|UNSURE".

        Fields: "width", "height" and "min_side" (the shorter) in pixels and "aspect" (longer by
        shorter, at least 1), from the JSON's width and height or original_width and
        original_height; "caption_words" and "caption_chars" of the caption; any other name is a
        JSON field with a number, such as "similarity" or "punsafe". A sample without the field is
        rejected as "no-FIELD"; a rule for "FIELD?" lets it pass. "json:FIELD" is a JSON field
        whatever its name looks like.

        Raises:
          ConfigError: what is not a rule, or a name close to a known one.
        """
        if isinstance(given, Filters):
            return given
        if isinstance(given, str):
            given = _read(given)
        return cls([_rule(str(name), bounds) for name, bounds in (given or {}).items()])

    def __bool__(self) -> bool:
        return self.reads_json or self.reads_caption

    def __call__(self, meta: Mapping[str, Any], text: str | None = None) -> str:
        """ "" for a sample that passes, else why not, e.g. "low-similarity" or "no-width".

        Args:
          meta: the sample's JSON object.
          text: the caption chosen for it; None leaves the rules on captions out.
        """
        for rule in self._json:
            if reason := rule.reason(_value(rule.field, meta)):
                return reason
        for rule in self._caption if text is not None else ():
            if reason := rule.reason(CAPTION[rule.field](text)):
                return reason
        return ""


def _value(field: str, meta: Mapping[str, Any]) -> Any:
    if field not in SIZES:
        return meta.get(field.removeprefix("json:"))
    for prefix in ("", "original_"):
        width, height = meta.get(f"{prefix}width"), meta.get(f"{prefix}height")
        if _is_number(width) and _is_number(height) and min(width, height) > 0:
            return {
                "width": width,
                "height": height,
                "min_side": min(width, height),
                "aspect": max(width, height) / min(width, height),
            }[field]
    return None


def _is_number(value: Any) -> bool:
    """Whether it is a finite number and not a bool; JSON written by Python may hold NaN."""
    return (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
    )


def _rule(name: str, bounds: Any) -> _Rule:
    field, optional = name.removesuffix("?"), name.endswith("?")
    if not field.removeprefix("json:"):
        raise ConfigError(f"filter {name!r}: expected a field's name")
    near = difflib.get_close_matches(field, _USUAL, n=2, cutoff=0.8)
    if field not in _USUAL and near and not field.startswith("json:"):
        raise ConfigError(
            f"filter {field!r}: did you mean {' or '.join(map(repr, near))}? For a "
            f"JSON field of that very name write 'json:{field}'"
        )
    if optional and field in CAPTION:
        raise ConfigError(f"filter {name!r}: every caption has a length; write {field!r}")
    if isinstance(bounds, str | Mapping) or not isinstance(bounds, Sequence):
        raise ConfigError(f"filter {name!r}: {_HELP}, not {bounds!r}")
    if bounds and all(isinstance(value, str) for value in bounds):
        if field in (*SIZES, *CAPTION):
            raise ConfigError(f"filter {name!r} is of a number: expected (low, high)")
        return _Rule(field, None, None, frozenset(bounds), optional)
    if len(bounds) != 2 or not all(end is None or _is_number(end) for end in bounds):
        raise ConfigError(f"filter {name!r}: {_HELP}, not {bounds!r}")
    low, high = bounds
    if low is None and high is None:
        raise ConfigError(f"filter {name!r}: both ends are open, so it lets everything pass")
    if low is not None and high is not None and low > high:
        raise ConfigError(f"filter {name!r}: low {low} is above high {high}")
    if field == "aspect" and high is not None and high < 1:
        raise ConfigError(
            f"filter 'aspect': {high} rejects everything; it is the longer side by "
            "the shorter, at least 1"
        )
    return _Rule(field, low, high, None, optional)


def _read(text: str) -> dict[str, Any]:
    """ "FIELD=LOW:HIGH,FIELD=WORD|WORD" -> a mapping that `_rule` judges."""
    rules = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value or name in rules:
            raise ConfigError(
                f"filter {part!r}: expected FIELD=LOW:HIGH, either end left out, or "
                "FIELD=WORD|WORD, each field once"
            )
        low, colon, high = value.partition(":")
        if not colon:
            rules[name] = value.split("|")
            continue
        try:
            rules[name] = tuple(float(end) if end.strip() else None for end in (low, high))
        except ValueError:
            raise ConfigError(
                f"filter {part!r}: {value!r} is not a range of numbers LOW:HIGH"
            ) from None
    return rules
