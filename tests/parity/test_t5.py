"""T5's encoder and tokenizer against transformers, with random weights of both kinds of T5."""

import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from unclip.files.tensors import Lazy
from unclip.input.decode.text import T5Tokenizer
from unclip.interop import formats
from unclip.interop import t5 as interop
from unclip.models import t5
from unclip.tasks import arguments

CAPTIONS = [
    "a photo of a cat",
    "A Corgi playing a flame throwing trumpet, 4k!",
    "  two   spaces \t and\na new line  ",
    "naïve café über Straße",
    "ﬁne ½ x² ① Ａ　Ｂ full width",
    "I'M HERE, it's what y'all'd've wanted... isn't it?!",
    "日本語 한국어 العربية 👩🏽‍🚀",
    "",
    "zero\u200bwidth\u00a0space\u00adhyphen",
    "supercalifragilisticexpialidocious",
    "the end</s>of it <extra_id_3>",
]
WORDS = "a red fox runs over the blue field and the green hill while two cats play with one dog"


def their_encoder(gated, **changes):
    torch.manual_seed(3)
    config = transformers.T5Config(
        **{
            "vocab_size": 300,
            "d_model": 48,
            "d_kv": 16,
            "d_ff": 80,
            "num_heads": 4,
            "num_layers": 3,
            "feed_forward_proj": "gated-gelu" if gated else "relu",
        }
        | changes
    )
    model = transformers.T5EncoderModel(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layer_norm" in name:
                value.copy_(1 + 0.1 * torch.randn_like(value))
            elif "relative_attention_bias" in name:
                value.copy_(torch.randn_like(value))
            else:
                value.copy_(0.1 * torch.randn_like(value) * (5 if "shared" in name else 1))
    return model


def converted(model, folder):
    """Our model and parameters of theirs, through the files."""
    model.save_pretrained(folder)
    part = formats.read("t5", [folder])["t5"]
    return part.arch, loaded(part.params)


def loaded(tree):
    return {k: np.asarray(v) if isinstance(v, Lazy) else loaded(v) for k, v in tree.items()}


def rows(length):
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 300, (3, length))
    mask = np.arange(length) < np.array([[length], [length // 2], [1]])
    tokens = np.where(mask, tokens, 0)
    return tokens, mask


def hidden(model, tokens, mask):
    with torch.no_grad():
        out = model(torch.tensor(tokens), torch.tensor(mask, dtype=torch.long))
    return out.last_hidden_state.float().numpy()


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated"])
def test_hidden_states(gated, tmp_path, parity):
    """Every position, padding too; 150 tokens reach past the last bucket of distances."""
    model = their_encoder(gated).eval()
    arch, params = converted(model, tmp_path)
    tokens, mask = rows(150)
    want = hidden(model, tokens, mask)
    got = t5.T5Encoder(**arch).apply({"params": params}, tokens, mask)
    assert np.abs(want).max() > 1
    name = "T5 encoder, " + ("version 1.1 (gated GELU)" if gated else "version 1 (ReLU)")
    parity(name, "transformers", np.abs(got - want).max(), 1e-4)


def test_bfloat16(tmp_path, parity):
    """Our bfloat16 against their float32, in parts of the largest value."""
    model = their_encoder(True)
    arch, params = converted(model, tmp_path)
    tokens, mask = rows(24)
    want = hidden(model, tokens, mask)
    ours = t5.T5Encoder(**arguments(arch | {"dtype": "bfloat16"}))
    got = np.float32(ours.apply({"params": params}, tokens, mask))
    difference = np.abs(got - want).max() / np.abs(want).max()
    parity("T5 encoder in bfloat16, relative", "transformers", difference, 0.03)
    assert difference > 1e-4  # it did compute in bfloat16


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated"])
def test_a_whole_t5_gives_its_encoder(gated, tmp_path, parity):
    """Without its decoder and output layer; a torch file names the embedding twice."""
    config = their_encoder(gated).config
    config.num_decoder_layers = 2
    whole = transformers.T5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    tokens, mask = rows(9)
    differences = []
    for _ in range(2):
        part = formats.read("t5", [tmp_path])["t5"]
        got = t5.T5Encoder(**part.arch).apply({"params": loaded(part.params)}, tokens, mask)
        differences.append(np.abs(got - hidden(whole.encoder, tokens, mask)).max())
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    name = f"encoder of a whole T5 ({'gated GELU' if gated else 'ReLU'}), torch file too"
    parity(name, "transformers", max(differences), 1e-4)


def test_relative_positions_equal_theirs():
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    for count, furthest in ((32, 128), (16, 50)):
        want = T5Attention._relative_position_bucket(
            offset, bidirectional=True, num_buckets=count, max_distance=furthest
        )
        np.testing.assert_array_equal(t5.buckets(300, count, furthest), want.numpy())


def test_parameter_counts():
    """Every preset to the digit, on torch's device without memory."""
    import jax

    for name, fields in t5.PRESETS.items():
        if not name.startswith("t5"):
            continue
        config = transformers.T5Config(
            vocab_size=32128,
            d_model=fields["width"],
            d_ff=fields["mlp_width"],
            d_kv=fields["head_dim"],
            num_heads=fields["heads"],
            num_layers=fields["layers"],
            feed_forward_proj="gated-gelu" if fields["gated"] else "relu",
        )
        with torch.device("meta"):
            theirs = sum(p.numel() for p in transformers.T5EncoderModel(config).parameters())
        model = t5.T5Encoder(**fields, fold=True)
        shapes = jax.eval_shape(
            model.init, jax.random.key(0), np.zeros((1, 2), np.int32), np.ones((1, 2), bool)
        )
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == theirs, name


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory):
    """A small sentencepiece model with T5's special ids, as a file."""
    folder = tmp_path_factory.mktemp("pieces")
    rng = np.random.default_rng(0)
    words = WORDS.split()
    text = [" ".join(rng.choice(words, 6)) + rng.choice([".", "!", ", 42", ""]) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join([*text, *CAPTIONS * 3]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=160,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=0.98,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return folder / "spiece.model"


def test_ids_equal_sentencepiece_and_transformers(piece_model, tmp_path, parity):
    ours = T5Tokenizer(interop.from_sentencepiece(piece_model.read_bytes()))
    processor = sentencepiece.SentencePieceProcessor(str(piece_model))
    theirs = transformers.T5Tokenizer.from_pretrained(piece_model.parent)
    tokens, mask, cut = ours.encode(CAPTIONS, 128)
    assert cut == [None] * len(CAPTIONS)
    wrong = 0
    for row, real, caption in zip(tokens, mask, CAPTIONS):
        if "<" not in caption:
            assert row[real].tolist() == [*processor.encode(caption), 1], caption
            wrong += row[real].tolist() != theirs(caption)["input_ids"]
        assert not row[~real].any()
    parity("T5 tokenizer, captions with other ids", "transformers", wrong, 0)


def test_ids_of_a_tokenizer_json(piece_model, tmp_path):
    """A folder saved by transformers, as T5 is published: its file is kept, and cut as there."""
    theirs = transformers.T5Tokenizer.from_pretrained(piece_model.parent)
    theirs.save_pretrained(tmp_path)
    their_encoder(True).save_pretrained(tmp_path)
    part = formats.read("t5", [tmp_path])["t5"]
    ours = T5Tokenizer(part.extra["tokenizer"])
    for length in (6, 128):
        tokens, mask, _ = ours.encode(CAPTIONS, length)
        for row, real, caption in zip(tokens, mask, CAPTIONS):
            want = theirs(caption, truncation=True, max_length=length)["input_ids"]
            assert row[real].tolist() == want, caption


def test_bytes_equal_byt5():
    theirs = transformers.ByT5Tokenizer()
    tokens, mask, cut = T5Tokenizer().encode(CAPTIONS, 40)
    for row, real, caption in zip(tokens, mask, CAPTIONS):
        if "<" not in caption:  # there sentinels are read as such
            want = theirs(caption, truncation=True, max_length=40)["input_ids"]
            assert row[real].tolist() == want, caption
    assert cut[0] is None and cut[6] is not None
