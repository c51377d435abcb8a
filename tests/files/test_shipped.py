"""Files that come with unclip: found in the checkout; tests/test_wheel.py finds them in a wheel."""

import pathlib

import pytest

from unclip import errors
from unclip.files import shipped

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_checkout_has_its_own():
    assert ROOT == shipped.ROOT
    assert list(shipped.path("data", "emoji").glob("train-*.tar"))


def test_the_configs_have_names():
    assert shipped.configs() == ["clip", "decoder", "evaluate", "prior", "upsampler"]


@pytest.mark.parametrize("value", ["clip", "configs/clip.py", "./configs/clip.py"])
def test_a_name_finds_its_file_anywhere(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find_config(value) == str(ROOT / "configs" / "clip.py")
    assert shipped.find_config(f"{value}:a:b") == f"{ROOT / 'configs' / 'clip.py'}:a:b"


@pytest.mark.parametrize("value", ["clip", "configs/clip.py", "mine.py:x"])
def test_a_file_that_exists_is_taken(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / value.partition(":")[0]
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert shipped.find_config(value) == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("decodr:karlo", "no config 'decodr'; did you mean decoder?"),
        ("", "no config ''; valid: clip, decoder, "),
        ("common", "no config 'common'"),
        ("other/clip.py", "no config file 'other/clip.py'; did you mean clip?"),
        ("mien.py", "no config file 'mien.py'; did you mean mine.py?"),
    ],
)
def test_what_there_is_not(value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    with pytest.raises(errors.ConfigError) as raised:
        shipped.find_config(value)
    assert message in str(raised.value)
