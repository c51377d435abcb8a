"""Files that come with unclip: found in the checkout; tests/test_wheel.py finds them in a wheel."""

import pathlib

from unclip.files import shipped

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_checkout_has_its_own():
    assert ROOT == shipped.ROOT
    assert list(shipped.path("data", "emoji").glob("train-*.tar"))
