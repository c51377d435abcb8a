"""T5 and ByT5 encoders in Hugging Face's layout, with their tokenizer, into a bundle's part `t5`.

The frozen text encoder of an Imagen-like decoder (arXiv 2205.11487, section 2.1). A folder of an
encoder or of a whole T5 is read; a whole model's decoder and output layer are left out, by name.
The tokenizer comes from `tokenizer.json`, or is made from the `spiece.model` that Google published
with version 1.1.
"""

import pathlib
import struct
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from unclip import errors, files
from unclip.cascade import bundle
from unclip.files.tensors import Lazy
from unclip.input.decode import text
from unclip.interop import layout, weights
from unclip.models import t5

BYTE_VOCABULARY = 384  # ByT5's embedding: 256 bytes, 3 special ids, 125 sentinels
EXTRA_IDS = 100
MARKS = ("shared.weight", "encoder.embed_tokens.weight")
# feed_forward_proj of their config -> (activation, gated)
FEED_FORWARD = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True)}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of sentencepiece's pieces
UNIGRAM = 1  # of its models


def read(paths: list[pathlib.Path], options: dict) -> dict[str, bundle.Part]:
    """{"t5": part} from a folder of T5EncoderModel or T5ForConditionalGeneration.

    Args:
      paths: a folder with config.json and weights; the tokenizer may lie in another folder.
      options: none are used: the files give the architecture.

    Raises:
      ConfigError: another architecture, or tensors that do not fit (with their table).
      DataError: a file that is missing, damaged or too large.
    """
    folder = next((p for p in paths if (p / "config.json").is_file()), None)
    if folder is None:
        raise errors.DataError(f"{paths[0]}: no config.json there; expected a T5 model's folder")
    config = files.read_object(folder / "config.json")
    arch = architecture(config, str(folder))
    encoder = t5.T5Encoder(**arch)
    source = layout.unwrapped(weights.open_weights(folder), MARKS, str(folder))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), bool)
    abstract = jax.eval_shape(encoder.init, jax.random.key(0), tokens, mask)["params"]
    name = "shared.weight" if "shared.weight" in source else "encoder.embed_tokens.weight"
    params = layout.take(
        rules(arch, name),
        source,
        abstract,
        what=str(folder),
        ignore=[*_copies(source, name), *_decoder_names(config)],
    )
    file = _tokenizer(paths, config, arch["vocab_size"])
    extra = {} if file is None else {"tokenizer": np.frombuffer(file, np.uint8)}
    return {"t5": bundle.Part("t5", arch, params, extra)}


def architecture(config: dict, what: str) -> dict:
    """Fields of `models.t5.T5Encoder` from their config.json.

    Raises:
      ConfigError: another kind of model, or values that are missing.
    """
    if config.get("model_type") not in ("t5", "mt5"):
        raise errors.ConfigError(
            f"{what} is a {config.get('model_type')!r} model, expected 't5' or 'mt5'"
        )
    feed_forward = config.get("feed_forward_proj", "relu")
    if feed_forward not in FEED_FORWARD:
        raise errors.unknown("T5 feed_forward_proj", feed_forward, FEED_FORWARD)
    activation, gated = FEED_FORWARD[feed_forward]
    named = {
        "vocab_size": ("vocab_size", None),
        "width": ("d_model", None),
        "layers": ("num_layers", None),
        "heads": ("num_heads", None),
        "head_dim": ("d_kv", None),
        "mlp_width": ("d_ff", None),
        "relative_buckets": ("relative_attention_num_buckets", 32),
        "relative_max": ("relative_attention_max_distance", 128),
    }
    arch = {"activation": activation, "gated": gated, "eps": config.get("layer_norm_epsilon", 1e-6)}
    for ours, (theirs, default) in named.items():
        value = config.get(theirs, default)
        if not isinstance(value, int) or value < 1:
            raise errors.ConfigError(f"{what}: {theirs} is {value!r}, expected a positive number")
        arch[ours] = value
    return arch


def rules(arch: dict, embedding: str = "shared.weight") -> list[layout.Rule]:
    """Where each leaf of a `T5Encoder` is in their checkpoint."""
    kernel = lambda ours, theirs: layout.dense(ours, theirs, bias=False)
    scale = lambda ours, theirs: [layout.Rule(f"{ours}/scale", f"{theirs}.weight", layout.COPY)]
    first = "encoder.block.0.layer.0.SelfAttention"
    out = [
        layout.Rule("token/embedding", embedding, layout.COPY),
        layout.Rule("bias/embedding", f"{first}.relative_attention_bias.weight", layout.COPY),
        *scale("norm", "encoder.final_layer_norm"),
    ]
    mlp = {"gate": "wi_0", "fc": "wi_1"} if arch["gated"] else {"fc": "wi"}
    for i in range(arch["layers"]):
        ours, attention, dense = f"block_{i}", *(f"encoder.block.{i}.layer.{k}" for k in (0, 1))
        out += scale(f"{ours}/ln_1", f"{attention}.layer_norm")
        out += scale(f"{ours}/ln_2", f"{dense}.layer_norm")
        for name, theirs in {"q": "q", "k": "k", "v": "v", "out": "o"}.items():
            out += kernel(f"{ours}/attn/{name}", f"{attention}.SelfAttention.{theirs}")
        for name, theirs in (mlp | {"proj": "wo"}).items():
            out += kernel(f"{ours}/mlp/{name}", f"{dense}.DenseReluDense.{theirs}")
    return out


def _copies(source: dict[str, Lazy], name: str) -> list[str]:
    """Further names of the embedding, as torch files have them, checked to be equal to it."""
    copy = "encoder.embed_tokens.weight"
    if name == copy or copy not in source or name not in source:
        return []
    same = source[copy].shape == source[name].shape
    if not same or not np.array_equal(source[copy].read(), source[name].read()):
        raise errors.ConfigError(f"{copy} and {name} differ: expected one shared embedding")
    return [copy]


def _decoder_names(config: dict) -> list[str]:
    """Every tensor of a whole T5 that its encoder does not have."""
    gated = FEED_FORWARD[config.get("feed_forward_proj", "relu")][1]
    layers = config.get("num_decoder_layers") or config["num_layers"]
    names = ["lm_head.weight", "decoder.embed_tokens.weight", "decoder.final_layer_norm.weight"]
    for i in range(layers):
        block = f"decoder.block.{i}.layer"
        names += [f"{block}.{k}.layer_norm.weight" for k in range(3)]
        for k, kind in enumerate(("SelfAttention", "EncDecAttention")):
            names += [f"{block}.{k}.{kind}.{part}.weight" for part in "qkvo"]
        for part in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
            names.append(f"{block}.2.DenseReluDense.{part}.weight")
    for k, kind in enumerate(("SelfAttention", "EncDecAttention")):  # the second only in old files
        names.append(f"decoder.block.0.layer.{k}.{kind}.relative_attention_bias.weight")
    return names


# ============================================================ tokenizers


def _tokenizer(paths: list[pathlib.Path], config: dict, vocabulary: int) -> bytes | None:
    """The content of a tokenizer.json; None for a model that reads bytes."""
    for name, make in (("tokenizer.json", lambda data: data), ("spiece.model", from_sentencepiece)):
        path = next((p / name for p in paths if (p / name).is_file()), None)
        if path is None:
            continue
        if path.stat().st_size > text.MAX_TOKENIZER_BYTES:
            raise errors.DataError(f"{path} is larger than {text.MAX_TOKENIZER_BYTES} bytes")
        try:
            data = path.read_bytes()
            what = files.mistaken(data[:512])
            if what is not None:
                raise errors.DataError(f"it is {what}")
            file = make(data)
            tokens, mask, _ = text.T5Tokenizer(file).encode(["a red fox"], 32)
        except errors.DataError as error:
            raise errors.DataError(f"{path}: {error}") from error
        except OSError as error:
            raise errors.DataError(f"cannot read {path}: {error.strerror or error}") from error
        if tokens[mask].max() >= vocabulary:
            raise errors.ConfigError(
                f"{path} gives ids up to {tokens[mask].max()}, the model has {vocabulary} of them"
            )
        return file
    if vocabulary <= BYTE_VOCABULARY or config.get("tokenizer_class") == "ByT5Tokenizer":
        return None
    raise errors.DataError(
        f"{paths[0]} has no tokenizer.json and no spiece.model: give the folder that holds one too"
    )


def from_sentencepiece(data: bytes) -> bytes:
    """A `tokenizer.json` that gives the ids of a sentencepiece unigram model, as T5 uses it.

    T5's hundred sentinels follow the model's own pieces, the last one first.

    Raises:
      DataError: not such a model, or one of a kind that T5 does not use (byte pieces, other
        algorithms).
    """
    try:
        pieces, charsmap = _unigram(data)
        engine = _engine(pieces, charsmap)
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise errors.DataError(f"no sentencepiece model of T5: {error}") from error
    return engine.to_str().encode("utf-8")


def _engine(pieces: list[tuple[str, float, int]], charsmap: bytes) -> Engine:
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(EXTRA_IDS))]
    vocabulary = [(piece, score) for piece, score, _ in pieces] + [(s, 0.0) for s in sentinels]
    unknown = [i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"{len(unknown)} unknown pieces, expected one")
    engine = Engine(models.Unigram(vocabulary, unk_id=unknown[0], byte_fallback=False))
    if charsmap:
        engine.normalizer = normalizers.Precompiled(charsmap)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    control = [piece for piece, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    added = [AddedToken(name, normalized=False, special=True) for name in control + sentinels]
    engine.add_special_tokens(added)
    engine.add_tokens([AddedToken(p, normalized=False) for p, _, k in pieces if k == USER_DEFINED])
    return engine


def _unigram(data: bytes) -> tuple[list[tuple[str, float, int]], bytes]:
    """The pieces (text, log probability, kind) and the normaliser's table of a ModelProto."""
    pieces, charsmap = [], b""
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))
            pieces.append((bytes(piece[1]).decode("utf-8"), score, piece.get(3, NORMAL)))
        elif field == 2 and dict(_fields(value)).get(3, UNIGRAM) != UNIGRAM:
            raise ValueError("it is not a unigram model")
        elif field == 3:
            normaliser = dict(_fields(value))
            charsmap = bytes(normaliser.get(2, b""))
            # The dummy prefix and the removal of extra spaces, which are on by default.
            if not (normaliser.get(3, 1) and normaliser.get(4, 1)):
                raise ValueError("it keeps spaces as they are, which T5's do not")
    if not pieces:
        raise ValueError("it has no pieces")
    odd = {kind for _, _, kind in pieces} - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED}
    if odd:
        raise ValueError(f"it has pieces of kind {min(odd)}, which T5's have not")
    return pieces, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a protocol buffer message: varints as int, all else as bytes."""
    data, at = memoryview(data), 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("it ends in the middle of a number")
            byte, at = data[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"it holds a field of unknown kind {kind}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, data[at : at + size]
        at += size
