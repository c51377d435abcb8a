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


VARIANTS = (
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bf16.safetensors",
    "diffusion_pytorch_model.non_ema.safetensors",
    "open_clip_model.fp32.safetensors",
)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_only_variant_is_read(tmp_path, name):
    if name.endswith(".json"):
        tensors.write(tmp_path / "model.fp16-00001-of-00001.safetensors", {"a": B})
        index = {"weight_map": {"a": "model.fp16-00001-of-00001.safetensors"}}
        (tmp_path / name).write_text(json.dumps(index))
    else:
        tensors.write(tmp_path / name, {"a": B})
    np.testing.assert_array_equal(weights.open_weights(tmp_path)["a"].read(), B)
    # The file without a variant goes before, whichever others there are.
    tensors.write(tmp_path / "model.safetensors", {"a": A})
    tensors.write(tmp_path / "model.other.safetensors", {"a": B})
    np.testing.assert_array_equal(weights.open_weights(tmp_path)["a"].read(), A)


def test_of_several_variants_none_is_guessed(tmp_path):
    for name in ("model.fp16.safetensors", "pytorch_model.fp16.bin"):
        tensors.write(tmp_path / name, {"a": B})
    assert weights.find(tmp_path).name == "model.fp16.safetensors"  # one variant in two formats
    tensors.write(tmp_path / "model.non_ema.safetensors", {"a": B})
    with pytest.raises(
        errors.ConfigError, match=r"variants .*: model\.fp16\.safetensors, model\.non_ema"
    ):
        weights.open_weights(tmp_path)


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
    (tmp_path / "flax_model.msgpack").write_bytes(b"")
    with pytest.raises(errors.DataError, match=r"flax_model\.msgpack is of another framework"):
        weights.open_weights(tmp_path)
    with pytest.raises(errors.DataError, match="no such file"):
        weights.open_weights(tmp_path / "x.safetensors")
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(errors.ConfigError, match=r"expected a folder or a file ending in \.safe"):
        weights.open_weights(tmp_path / "weights.onnx")
