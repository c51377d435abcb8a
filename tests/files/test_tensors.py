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
