"""Opening weight files: every layout of folder, and what is wrong with one."""

import json

import numpy as np
import pytest

from unclip import errors
from unclip.files import tensors
from unclip.interop import weights

A, B = np.arange(4, dtype=np.float32), np.ones((2, 2), np.float16)


@pytest.mark.parametrize("name", [n for n in weights.FOLDER_FILES if n.endswith(".safetensors")])
def test_a_folder_is_opened_by_the_file_it_holds(tmp_path, name):
    tensors.write(tmp_path / name, {"a": A})
    np.testing.assert_array_equal(weights.open_weights(tmp_path)["a"].read(), A)


def _shards(folder, where):
    tensors.write(folder / "model-1.safetensors", {"a": A})
    tensors.write(folder / "model-2.safetensors", {"b": B, "stray": A})
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def test_shards_are_one_mapping(tmp_path):
    _shards(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    found = weights.open_weights(tmp_path)
    assert found.keys() == {"a", "b"}
    np.testing.assert_array_equal(found["b"].read(), B)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"a": "model-2.safetensors"}, "places 'a' in model-2.safetensors, which lacks it"),
        ({"a": "../other.safetensors"}, "points outside its folder"),
        ({"a": "model-3.safetensors"}, "no such file"),
        ({"a": 3}, "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_a_wrong_index_is_one_line(tmp_path, where, message):
    _shards(tmp_path, where)
    with pytest.raises(errors.DataError, match=message):
        weights.open_weights(tmp_path)


def test_what_is_no_weight_file_is_reported(tmp_path):
    with pytest.raises(errors.DataError, match=r"holds no weights: expected model\.safetensors"):
        weights.open_weights(tmp_path)
    with pytest.raises(errors.DataError, match="no such file"):
        weights.open_weights(tmp_path / "x.safetensors")
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(errors.ConfigError, match=r"expected a folder or a file ending in \.safe"):
        weights.open_weights(tmp_path / "weights.onnx")
