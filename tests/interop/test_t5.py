"""T5 folders into a part: strict, bit for bit, with a tokenizer from either kind of file."""

import json
import pathlib
import struct

import jax
import numpy as np
import pytest

from unclip import errors
from unclip.files import tensors
from unclip.input.decode.text import T5Tokenizer
from unclip.interop import layout
from unclip.interop import t5 as interop
from unclip.models import t5
from unclip.runtime.sharding import tree_paths

CONFIG = {
    "model_type": "t5",
    "vocab_size": 120,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_heads": 3,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-6,
}


def varint(value):
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece_model(extra=b"", model_type=1):
    """sentencepiece's ModelProto of a few pieces; "ab" is likelier than "a" and "b"."""
    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -2.0, 1)]
    pieces += [("▁ab", -3.0, 1), ("a", -4.0, 1), ("b", -4.5, 1), ("c", -5.0, 1), ("é", -6.0, 1)]
    out = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + (field(3, kind) if kind > 1 else b""))
        for text, score, kind in pieces
    )
    return out + field(2, field(3, model_type)) + field(3, field(1, b"identity")) + extra


@pytest.fixture
def folder(tmp_path):
    """(folder of a random T5, its parameters as ours)."""
    arch = interop.architecture(CONFIG, "it")
    model = t5.T5Encoder(**arch)
    tokens = np.ones((1, 2), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens > 0)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape)), shapes)
    theirs = layout.give(interop.rules(arch), params)
    tensors.write(tmp_path / "model.safetensors", theirs, {})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "spiece.model").write_bytes(piece_model())
    return tmp_path, params


def rewrite(folder: pathlib.Path, change):
    source = {n: t.read() for n, t in tensors.read(folder / "model.safetensors")[0].items()}
    change(source)
    tensors.write(folder / "model.safetensors", source, {})


def test_bit_for_bit(folder):
    path, params = folder
    part = interop.read([path], {})["t5"]
    assert part.kind == "t5" and part.arch["head_dim"] == 4 and part.arch["gated"]
    read = tree_paths(part.params)
    for name, want in tree_paths(params).items():
        assert isinstance(read[name], tensors.Lazy)
        np.testing.assert_array_equal(read[name].read(), want)
    assert bytes(part.extra["tokenizer"]).startswith(b"{")


def test_a_whole_t5_gives_its_encoder(folder):
    """A decoder, its output layer and torch's second name of the embedding are left out."""
    path, params = folder

    def whole(source):
        names = interop._decoder_names(CONFIG)
        assert "decoder.block.1.layer.1.EncDecAttention.o.weight" in names
        assert "decoder.block.1.layer.2.DenseReluDense.wi_1.weight" in names
        source |= {name: np.zeros(3, np.float32) for name in names}
        source["encoder.embed_tokens.weight"] = source["shared.weight"].copy()

    rewrite(path, whole)
    part = interop.read([path], {})["t5"]
    assert tree_paths(part.params).keys() == tree_paths(params).keys()
    rewrite(path, lambda source: source["encoder.embed_tokens.weight"].fill(1))
    with pytest.raises(errors.ConfigError, match="differ: expected one shared embedding"):
        interop.read([path], {})
    rewrite(path, lambda source: source.pop("shared.weight"))
    np.testing.assert_array_equal(interop.read([path], {})["t5"].params["token"]["embedding"], 1)


def test_strict(folder):
    path, _ = folder
    rewrite(
        path,
        lambda source: source.update(
            {
                "encoder.block.2.layer.0.layer_norm.weight": source.pop(
                    "encoder.final_layer_norm.weight"
                ),
                "encoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((8, 8), np.float32),
            }
        ),
    )
    with pytest.raises(layout.Mismatch) as caught:
        interop.read([path], {})
    said = str(caught.value)
    assert "missing  encoder.final_layer_norm.weight" in said
    assert "extra    encoder.block.2.layer.0.layer_norm.weight [8]" in said
    assert "SelfAttention.q.weight [8, 8]" in said and "attn/q/kernel [8, 12]" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "umt5"}, "'umt5' model, expected 't5' or 'mt5'"),
        ({"feed_forward_proj": "gated-silu"}, "did you mean 'gated-gelu'"),
        ({"d_kv": "4"}, "d_kv is '4', expected a positive number"),
    ],
)
def test_other_models(change, said):
    with pytest.raises(errors.ConfigError, match=said):
        interop.architecture(CONFIG | change, "it")


def test_pieces_become_ids():
    """By hand: the likeliest division into pieces; what no piece has is one unknown, id 2."""
    ours = T5Tokenizer(interop.from_sentencepiece(piece_model()))
    want = {
        "ab": [4, 1],
        "  ab\n ab ": [4, 4, 1],
        "aab": [3, 5, 5, 6, 1],
        "abab": [4, 5, 6, 1],
        "zz c": [3, 2, 3, 7, 1],
        "": [1],
        "é": [3, 8, 1],
        "c<extra_id_0>": [3, 7, 108, 1],
        "<extra_id_99>": [9, 1],
    }
    tokens, mask, cut = ours.encode(list(want), 8)
    assert [row[real].tolist() for row, real in zip(tokens, mask)] == list(want.values())
    assert cut == [None] * len(want)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (piece_model(model_type=2), "not a unigram model"),
        (piece_model()[:-3], "cut short"),
        (piece_model(extra=field(1, field(1, b"<0x41>") + field(3, 6))), "pieces of kind 6"),
        (piece_model(extra=field(3, field(3, 0))), "keeps spaces"),
        (b"", "no pieces"),
        (b"\xff" * 40, "the middle of a number"),
        (b"\x0b", "unknown kind 3"),
    ],
)
def test_files_that_are_no_t5_pieces(data, said):
    with pytest.raises(errors.DataError, match=said) as caught:
        interop.from_sentencepiece(data)
    assert "\n" not in str(caught.value)


def test_where_the_tokenizer_comes_from(folder, tmp_path_factory):
    path, _ = folder
    elsewhere = tmp_path_factory.mktemp("tokenizer")
    (path / "spiece.model").rename(elsewhere / "spiece.model")
    found = interop.read([path, elsewhere], {})["t5"].extra["tokenizer"]
    (path / "tokenizer.json").write_bytes(bytes(found))
    np.testing.assert_array_equal(interop.read([path], {})["t5"].extra["tokenizer"], found)
    (path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(errors.DataError, match=r"tokenizer\.json: the T5 tokenizer is damaged"):
        interop.read([path], {})
    (path / "tokenizer.json").unlink()
    assert interop.read([path], {})["t5"].extra == {}  # 120 ids: bytes, as ByT5
    (path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 400}))
    rewrite(path, lambda s: s.update({"shared.weight": np.zeros((400, 8), np.float32)}))
    with pytest.raises(errors.DataError, match=r"no tokenizer\.json and no spiece\.model"):
        interop.read([path], {})
    (path / "config.json").unlink()
    with pytest.raises(errors.DataError, match=r"no config\.json"):
        interop.read([path], {})
