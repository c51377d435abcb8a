"""Caption sources: what they are, what counts as a caption, which comes first."""

import pytest

from unclip.errors import ConfigError
from unclip.input import captions
from unclip.input.samples import Sample


def test_sources_are_checked_and_each_counts_once():
    assert captions.checked("txt, json:a b") == ("txt", "json:a b")
    assert captions.checked(["json:x", "txt", "json:x"]) == ("json:x", "txt")
    for wrong in ((), ["jsn:x"], ["json:"], ["caption"], [5], "json:x,", "TXT"):
        with pytest.raises(ConfigError, match="caption source"):
            captions.checked(wrong)


@pytest.mark.parametrize(
    "value, expected",
    [
        ("a", ["a"]),
        (["a", " ", "", None, 5, "b"], ["a", "b"]),
        ([["a"]], []),
        (" \n", []),
        (None, []),
        (5, []),
        ({"a": "b"}, []),
    ],
)
def test_texts_and_lists_of_texts_are_captions(value, expected):
    assert captions.texts(value) == expected
    assert captions.known({"x": value}) == (["json:x"] if expected else [])


def test_the_first_that_a_sample_has():
    sample = Sample("k", b"", "text", {"alt": [" ", "one", "two"], "name": "name", "odd": [3]})
    assert captions.first(sample, ("txt", "json:alt")) == "text"
    assert captions.first(sample, ("json:odd", "json:alt", "txt")) == "one"
    assert captions.first(sample._replace(text=" "), ("txt", "json:name")) == "name"
    assert captions.first(sample, ("json:odd", "json:none")) == ""


def test_what_is_expected_is_said():
    assert captions.wanted(captions.STANDARD) == (
        "KEY.txt or the field 'caption' or 'name' of KEY.json"
    )
    assert captions.wanted(("json:TEXT",)) == "the field 'TEXT' of KEY.json"
