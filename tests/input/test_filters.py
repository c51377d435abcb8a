"""Filters: what passes, what is rejected and by which word, and how a mistake is reported."""

import json
import math
import pickle

import pytest

from unclip.errors import ConfigError
from unclip.input.filters import Filters

META = {"similarity": 0.31, "punsafe": 0.1, "width": 512, "height": 256, "NSFW": "UNLIKELY"}


@pytest.mark.parametrize(
    "rules, reason",
    [
        ({"similarity": (0.31, None)}, ""),
        ({"similarity": (0.32, None)}, "low-similarity"),
        ({"punsafe": (None, 0.1)}, ""),
        ({"punsafe": (None, 0.09)}, "high-punsafe"),
        ({"width": (512, 512)}, ""),
        ({"width": (None, 511)}, "high-width"),
        ({"height": (257, None)}, "low-height"),
        ({"min_side": (256, None)}, ""),
        ({"min_side": (257, None)}, "low-min_side"),
        ({"aspect": (None, 2)}, ""),
        ({"aspect": (None, 1.99)}, "high-aspect"),
        ({"aspect": (2.01, None)}, "low-aspect"),
        ({"caption_words": (3, 3)}, ""),
        ({"caption_words": (4, None)}, "low-caption_words"),
        ({"caption_chars": (None, 11)}, ""),
        ({"caption_chars": (None, 10)}, "high-caption_chars"),
        ({"NSFW": ["UNLIKELY", "UNSURE"]}, ""),
        ({"NSFW": ["UNSURE"]}, "other-NSFW"),
        ({"pwatermark": (None, 0.5)}, "no-pwatermark"),
        ({"pwatermark?": (None, 0.5)}, ""),
        ({"language": ["en"]}, "no-language"),
        ({"language?": ["en"]}, ""),
        ({"punsafe?": (0.2, None)}, "low-punsafe"),
        ({"json:width": (None, 100)}, "high-json:width"),
        ({}, ""),
        (None, ""),
        ("", ""),
        (" similarity = 0.3: , aspect=:2,NSFW=UNSURE|UNLIKELY ", ""),
        ("similarity=0.2:0.3", "high-similarity"),
        ("pwatermark?=:0.5,punsafe=:0.05", "high-punsafe"),
        # The first rule decides.
        ({"similarity": (0.5, None), "width": (600, None)}, "low-similarity"),
    ],
)
def test_rules(rules, reason):
    filters = Filters.parse(rules)
    assert filters(META, "one red fox") == reason
    assert pickle.loads(pickle.dumps(filters))(META, "one red fox") == reason
    assert bool(filters) == bool(rules)


def test_sizes_of_the_original_stand_in_but_never_half_of_them():
    filters = Filters.parse({"min_side": (256, None)})
    assert filters({"original_width": 300, "original_height": 256}) == ""
    assert (
        filters({"width": 100, "height": 90, "original_width": 999, "original_height": 999})
        == "low-min_side"
    )
    assert (
        filters({"width": 300})
        == filters({"width": 300, "original_height": 300})
        == ("no-min_side")
    )
    for odd in (0, -3, None, "300", True, math.nan, [300]):
        assert filters({"width": 300, "height": odd}) == "no-min_side"


def test_values_that_are_no_numbers_are_missing():
    filters = Filters.parse({"similarity": (0.2, None)})
    for odd in ("0.3", True, None, [0.3], {}, math.nan, math.inf):
        assert filters({"similarity": odd}) == "no-similarity"
    assert filters(json.loads('{"similarity": NaN}')) == "no-similarity"
    assert filters({"similarity": 10**400}) == ""
    assert Filters.parse({"NSFW": ["UNSURE"]})({"NSFW": 3}) == "no-NSFW"


def test_json_is_judged_without_the_caption():
    filters = Filters.parse({"caption_words": (2, None), "similarity": (0.3, None)})
    assert filters.reads_json and filters.reads_caption
    assert filters({"similarity": 0.3}) == ""
    assert filters({"similarity": 0.3}, "fox") == "low-caption_words"
    assert filters({"similarity": 0.2}, "fox") == "low-similarity"
    only = Filters.parse({"caption_chars": (1, None)})
    assert only.reads_caption and not only.reads_json
    assert Filters.parse(only) is only


@pytest.mark.parametrize(
    "rules, words",
    [
        ({"caption_word": (1, 2)}, "'caption_words'"),
        ({"similarty": (0.2, None)}, "'similarity'"),
        ({"aspects": (None, 2)}, "'aspect'"),
        ({"similarity": 0.28}, "expected (low, high)"),
        ({"similarity": (0.3,)}, "expected"),
        ({"similarity": (None, None)}, "everything pass"),
        ({"similarity": (0.3, 0.2)}, "above"),
        ({"similarity": (True, None)}, "expected"),
        ({"similarity": (math.nan, None)}, "expected"),
        ({"similarity": {"low": 1}}, "expected"),
        ({"similarity": "high"}, "expected"),
        ({"similarity": []}, "expected"),
        ({"similarity": ("0.2", None)}, "expected"),
        ({"width": ["big"]}, "number"),
        ({"aspect": (None, 0.5)}, "longer side"),
        ({"caption_words?": (1, 2)}, "every caption"),
        ({"": (1, 2)}, "name"),
        ({"?": (1, 2)}, "name"),
        ("similarity", "FIELD=LOW:HIGH"),
        ("similarity=", "FIELD=LOW:HIGH"),
        ("a=1:,a=2:", "once"),
        ("a=x:2", "range of numbers"),
    ],
)
def test_mistakes_are_reported(rules, words):
    with pytest.raises(ConfigError) as error:
        Filters.parse(rules)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_close_name_can_be_meant():
    assert Filters.parse({"json:aspects": (None, 2)})({"aspects": 3}) == "high-json:aspects"
