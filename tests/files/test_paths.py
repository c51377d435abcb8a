"""Home folders and lists in one word."""

import pathlib

import pytest

from unclip.files import paths


def test_home_at_any_depth(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = {"a": ("~/x", ["~", "a/~b"]), "n": 3, "path": pathlib.Path("~/p")}
    assert paths.expanded(given) == {
        "a": ("/home/me/x", ["/home/me", "a/~b"]),
        "n": 3,
        "path": "/home/me/p",
    }
    assert paths.expanded("~nobody-of-this-name/x") == "~nobody-of-this-name/x"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{0,1}.tar, b.tar,", ["a-{0,1}.tar", "b.tar"]),
        ("tfds:x:train[:10%]+test,y", ["tfds:x:train[:10%]+test", "y"]),
        (" ", []),
    ],
)
def test_listed(text, parts):
    assert paths.listed(text) == parts
