"""Which part of a sample is its caption: what `input.captions` of a config means, for everyone.

A source is "txt", the text of KEY.txt or, where that is missing or empty, of the field `caption` of
KEY.json; or "json:FIELD", any field of KEY.json. A JSON value is a caption if it is a text that is
not blank, or a list with such texts. A sample has a caption if one of the sources gives one: that
decides which samples there are, in the index, while training and while embedding alike.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unclip.errors import ConfigError, unknown
from unclip.input.samples import Sample

STANDARD = ("txt", "json:name")  # the default of every command and config
STAND_IN = "caption"  # the field of KEY.json that takes the place of KEY.txt


def checked(sources: str | Iterable[str]) -> tuple[str, ...]:
    """The caption sources as a tuple, each once; a text is split at its commas.

    Raises:
      ConfigError: none, or others than "txt" and "json:FIELD".
    """
    given = sources.split(",") if isinstance(sources, str) else list(sources)
    given = [source.strip() if isinstance(source, str) else source for source in given]
    for source in given:
        named = isinstance(source, str) and source.startswith("json:") and source != "json:"
        if source != "txt" and not named:
            raise unknown("caption source", str(source), ["txt", "json:FIELD"])
    if not given:
        raise ConfigError("no caption sources: expected some of 'txt' and 'json:FIELD'")
    return tuple(dict.fromkeys(given))


def field(source: str) -> str:
    """The field of KEY.json in which a source is looked for."""
    return STAND_IN if source == "txt" else source.removeprefix("json:")


def texts(value: Any) -> list[str]:
    """The captions in a JSON value: it, or what its list holds, if that is text and not blank."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if not isinstance(value, list):
        return []
    return [text for text in value if isinstance(text, str) and text.strip()]


def value(sample: Sample, source: str) -> Any:
    """What a source gives of a sample: a caption, a list of them, or whatever is there."""
    return sample.text if source == "txt" else sample.meta.get(field(source))


def first(sample: Sample, sources: Sequence[str]) -> str:
    """The first caption of the first source that has one; "" for none."""
    return next((text for one in sources for text in texts(value(sample, one))), "")


def known(meta: Mapping[str, Any]) -> list[str]:
    """The sources of a JSON object that hold captions, for messages."""
    return [f"json:{name}" for name, found in meta.items() if texts(found)]


def wanted(sources: Sequence[str]) -> str:
    """What a sample needs beside its picture, for messages."""
    fields = " or ".join(repr(field(source)) for source in sources)
    return f"{'KEY.txt or ' * ('txt' in sources)}the field {fields} of KEY.json"
