"""Files within limits, and files that appear whole."""

import os

import pytest

from unclip import errors, files


def test_json_is_an_object_of_limited_size(tmp_path):
    path = tmp_path / "config.json"
    files.write_object(path, {"a": 1})
    assert files.read_object(path) == {"a": 1}
    with pytest.raises(errors.DataError, match="larger than 4 bytes"):
        files.read_object(path, 4)
    for text, message in (
        ("[1]", "expected a JSON object"),
        ("{", "no JSON"),
        ("\xff", "no JSON"),
        ("[" * 100_000, "no JSON"),
    ):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(errors.DataError, match=message):
            files.read_object(path)
    with pytest.raises(errors.DataError, match=r"cannot read .*: No such file"):
        files.read_object(tmp_path / "none.json")


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    files.write_object(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_object(path, {"a": float("nan")})
    assert files.read_object(path) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_strays_of_killed_jobs_go_and_others_stay(tmp_path):
    names = (".a.json.0123456789ab.tmp", ".b.json.ba9876543210.tmp", ".c.tmp", "d.0123456789ab.tmp")
    for name in names:
        (tmp_path / name).write_text("")
        if not name.startswith(".b"):
            os.utime(tmp_path / name, (0, 0))
    files.remove_strays(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])
