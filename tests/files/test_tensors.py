"""Tensor files: the bytes of safetensors itself, one tensor in memory at a time."""

import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from unclip import errors
from unclip.files import tensors


def _every_kind():
    random = np.random.default_rng(0)
    kinds = [kind for kind in tensors.DTYPES.values() if kind.itemsize > 1 or kind.kind in "bui"]
    found = {f"t{i}": random.integers(0, 2, (3, 2)).astype(kind) for i, kind in enumerate(kinds)}
    return found | {"scalar": np.array(2.5, np.float32), "none": np.zeros((0, 3), np.float32)}


@pytest.mark.parametrize("metadata", [None, {"unclip": '{"a": "ü"}'}])
def test_bytes_are_those_of_safetensors(tmp_path, metadata):
    want = _every_kind()
    safetensors.numpy.save_file(want, tmp_path / "theirs", metadata=metadata)
    tensors.write(tmp_path / "ours", want, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    got, header = tensors.read(tmp_path / "ours")
    assert header == (metadata or {})
    for name, array in want.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype)
        assert got[name].read().tobytes() == array.tobytes()


def test_transposed_arrays_are_written_in_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors.write(tmp_path / "f", {"a": array.T})
    np.testing.assert_array_equal(tensors.read(tmp_path / "f")[0]["a"].read(), array.T)


def test_a_tensor_must_be_what_it_announced():
    lazy = tensors.Lazy((2,), np.float32, lambda: np.zeros(3, np.float32))
    with pytest.raises(errors.DataError, match=r"announced as float32\[2\].*float32\[3\]"):
        lazy.read()


def test_damage_is_reported(tmp_path):
    path = tmp_path / "f"
    with pytest.raises(errors.DataError, match="cannot read"):
        tensors.read(path)
    tensors.write(path, {"a": np.zeros(100, np.float32)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(errors.DataError, match="is damaged"):
        tensors.read(path)
    with pytest.raises(errors.ConfigError, match="complex64"):
        tensors.write(path, {"a": np.zeros(1, np.complex64)})


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n", "Git LFS"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\xef\xbb\xbf\n<!doctype HTML>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML answer"),
        (b'{"error": "Repository not found"}', "a JSON text"),
        (b"PK\x03\x04" + bytes(30), "a torch file: end its name in .bin"),
        (b"\x80\x02}q\x00.", "a torch file"),
        (b"", "empty, 0 bytes"),
        (bytes(4096), "nothing but zeros"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(errors.DataError, match=f"f is no safetensors file: it is .*{message}"):
        tensors.read(tmp_path / "f")


def test_a_file_cut_short_says_how_much_is_missing(tmp_path):
    path = tmp_path / "f"
    tensors.write(path, {"a": np.zeros(100, np.float32), "b": np.zeros(3, np.int8)})
    whole = path.read_bytes()
    for left in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:left])
        with pytest.raises(errors.DataError, match=f"cut short, {left} of {len(whole)} bytes"):
            tensors.read(path)
    path.write_bytes(whole[:30])  # in its header
    with pytest.raises(errors.DataError, match="cut short, 30 of"):
        tensors.read(path)
    for left in (*range(1, 30), 60):  # wherever it ends, in a line
        path.write_bytes(whole[:left])
        with pytest.raises(errors.DataError):
            tensors.read(path)


_COPY = """
import pathlib, resource, sys
import ml_dtypes, numpy as np
from unclip.files import tensors
source, target = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found, _ = tensors.read(source)
half = {k: v.map(lambda a: a.astype(ml_dtypes.bfloat16), dtype=ml_dtypes.bfloat16)
        for k, v in found.items()}
tensors.write(target, half)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_file_is_copied_in_little_memory(tmp_path):
    count, each = 32, 2**23  # 32 tensors of 8 MiB
    zeros = tensors.Lazy((each // 4,), np.float32, lambda: np.zeros(each // 4, np.float32))
    tensors.write(tmp_path / "big", {f"t{i}": zeros for i in range(count)})
    command = [sys.executable, "-c", _COPY, str(tmp_path / "big"), str(tmp_path / "copy")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (tmp_path / "copy").stat().st_size > count * each // 2
    assert grown * 1024 < 8 * each, f"{grown} KiB for tensors of {each // 1024} KiB"
