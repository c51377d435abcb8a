"""CLIP's tokenizer against published ids and a plain re-implementation."""

import concurrent.futures
import copy
import gzip
import itertools
import pickle

import numpy as np
import pytest
import tokenizers

from unclip.errors import ConfigError, DataError
from unclip.input.decode import text as text_module
from unclip.input.decode.text import (
    EOT,
    SOT,
    VOCABULARY,
    T5Tokenizer,
    Tokenizer,
    clean,
)

CAPTIONS = [
    "a photo of a cat",
    "a corgi playing a flame throwing trumpet",
    "I'M HERE, it's what y'all'd've wanted... isn't it?!",
    "naïve café über Straße, ΑΒΓ Привет",
    "日本語 한국어 العربية",
    "👩🏽‍🚀 flies to 🇯🇵 with ❤️",
    "1234567 ½ 3.14 x² __init__ --flag #42",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "emoji:😀😀😀 end",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


@pytest.fixture(scope="module")
def tables():
    """Vocabulary and merge ranks, built here from the file alone."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    symbols = {b: chr(b) for b in shown}
    symbols |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}
    words = list(symbols.values())
    words += [w + "</w>" for w in words] + ["".join(m) for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return (
        {w: i for i, w in enumerate(words)},
        {m: i for i, m in enumerate(merges)},
        symbols,
        merges,
    )


def ids(tokenizer, text, length=77):
    tokens, mask, _ = tokenizer.encode([text], length)
    return tokens[0][mask[0]].tolist()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("hello world", [3306, 1002]),
        ("", []),
        (" \n\t ", []),
    ],
)
def test_published_ids(tokenizer, text, expected):
    assert ids(tokenizer, text) == [SOT, *expected, EOT]


def test_shapes_padding_and_mask(tokenizer):
    tokens, mask, truncated = tokenizer.encode(["a photo of a cat", "hello world", ""], 8)
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape == mask.shape == (3, 8)
    assert tokens[1].tolist() == [SOT, 3306, 1002, EOT, 0, 0, 0, 0]
    assert mask.sum(axis=1).tolist() == [7, 4, 2]
    assert truncated == [None, None, None]
    assert tokenizer.encode([], 8)[0].shape == (0, 8)


def test_equals_plain_byte_pair_encoding(tokenizer, tables):
    """Words are given, so that this oracle shares neither word pattern nor merging with ours."""
    vocabulary, ranks, symbols, _ = tables

    def merge(word):
        parts = [symbols[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: ranks.get(pair, 10**9))
            if best not in ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                merged.append("".join(parts[i : i + step]))
                i += step
            parts = merged
        return [vocabulary[part] for part in parts]

    cases = [
        ("It's 42 Naïve foxes!!! can't-stop", "it 's 4 2 naïve foxes !!! can 't - stop"),
        ("they'll we've x'd 'tis", "they 'll we 've x 'd 't is"),
        ("日本 🦊🦊, ½", "日本 🦊🦊, ½"),
        ("antidisestablishmentarianism", "antidisestablishmentarianism"),
    ]
    for text, words in cases:
        assert ids(tokenizer, text)[1:-1] == [i for word in words.split() for i in merge(word)]


@pytest.mark.parametrize(
    "given, expected",
    [
        ("  Two   WORDS\n\there ", "two words here"),
        ("salt &amp;amp; pepper &lt;3", "salt & pepper <3"),
        ("“quoted” and ‘don’t’", "\"quoted\" and 'don't'"),
        ("ﬁne ﬂour", "fine flour"),
        ("ＦＵＬＬ　ｗｉｄｔｈ", "full width"),
        ("cafe\u0301", "café"),
        ("a\x00b\x1b[31mred\x1b[0m\ufeff", "abred"),
        ("\ud83d\ude00 \ud800", "😀 \ufffd"),
        ("it\x92s", "it's"),
        ("İ", "i\u0307"),
    ],
)
def test_clean(given, expected):
    assert clean(given) == expected


def test_literal_special_tokens_as_in_clip(tokenizer):
    """They count after a word or a space; punctuation before them swallows the bracket."""
    assert ids(tokenizer, "<|endoftext|>") == [SOT, EOT, EOT]
    assert ids(tokenizer, "cat<|ENDOFTEXT|> cat") == [SOT, 2368, EOT, 2368, EOT]
    swallowed = ids(tokenizer, "!<|endoftext|>")
    assert EOT not in swallowed[1:-1]
    assert tokenizer.decode(swallowed) == "!<| endoftext |>"


def test_truncation_reports_what_was_lost(tokenizer):
    text = "A red fox jumps over the lazy dog"
    tokens, mask, truncated = tokenizer.encode([text, "fits"], 6)
    assert truncated == ["over the lazy dog", None]
    assert tokens[0, 0] == SOT and tokens[0, -1] == EOT and mask[0].all()
    whole = ids(tokenizer, text)
    assert tokens[0, :5].tolist() == whole[:5]
    # Kept and lost tokens together are the whole text.
    assert whole[1:5] + ids(tokenizer, truncated[0])[1:-1] == whole[1:-1]
    exact = len(whole)
    assert tokenizer.encode([text], exact)[2] == [None]
    assert tokenizer.encode([text], exact - 1)[2] == ["dog"]
    assert tokenizer.encode(["cat <|endoftext|> dog bird"], 4)[2] == ["dog bird"]
    assert tokenizer.encode(["日本語のテキスト"], 2)[2] == ["日本語のテキスト"]


def test_cut_warning_is_one_line(tokenizer):
    assert tokenizer.cut_warning("a red fox", 5) is None
    line = tokenizer.cut_warning("a red fox\nin the snow", 6)
    assert line == 'prompt has 6 tokens, 4 fit: kept "… a red fox in", cut "the snow"'
    long = tokenizer.cut_warning("word " * 300)
    assert "75 fit" in long and "\n" not in long and len(long) < 200


def test_decode(tokenizer):
    tokens, _, _ = tokenizer.encode(CAPTIONS, 77)
    for row in tokens:
        text = tokenizer.decode(row)
        end = row.tolist().index(EOT) + 1
        assert ids(tokenizer, text) == row[:end].tolist()
    assert tokenizer.decode(tokens[0]) == "a photo of a cat"
    assert tokenizer.decode([320, 2368]) == "a cat"
    assert tokenizer.decode([SOT, EOT]) == ""
    with pytest.raises(ConfigError, match="49408"):
        tokenizer.decode([49408])


def test_pickles_small_and_is_thread_safe(monkeypatch):
    monkeypatch.setattr(text_module, "_engines", {})
    shared = Tokenizer()
    assert len(pickle.dumps(shared)) < 1000 and not text_module._engines
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda text: shared.encode([text], 32)[0][0], CAPTIONS * 4))
    # A deep copy goes through the same reduction as a pickle.
    again = copy.deepcopy(shared).encode(CAPTIONS * 4, 32)[0]
    assert np.array_equal(np.stack(rows), again) and len(text_module._engines) == 1


def test_errors_name_what_is_wrong(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="one string"):
        tokenizer.encode("a cat", 8)
    with pytest.raises(ConfigError, match="context_length is 1"):
        tokenizer.encode(["a cat"], 1)
    with pytest.raises(ConfigError, match="bytes"):
        tokenizer.encode([b"a cat"], 8)
    with pytest.raises(DataError, match="absent"):
        Tokenizer(tmp_path / "absent.gz").encode(["x"], 8)
    damaged = tmp_path / "damaged.gz"
    damaged.write_bytes(VOCABULARY.read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged"):
        Tokenizer(damaged).encode(["x"], 8)
    damaged.write_bytes(gzip.compress(b"#version\na b\n"))
    with pytest.raises(DataError, match="merges"):
        Tokenizer(damaged).encode(["x"], 8)


def test_t5_bytes():
    """ByT5: id = byte + 3, end of sequence 1; a text that is too long ends all the same."""
    tokenizer = T5Tokenizer()
    tokens, mask, cut = tokenizer.encode(["aé", "", "abcdefg"], 6)
    assert tokens.tolist() == [
        [100, 198, 172, 1, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [100, 101, 102, 103, 104, 1],
    ]
    assert tokens.dtype == np.int32 and mask.dtype == bool
    np.testing.assert_array_equal(mask, tokens > 0)
    assert cut == [None, None, "fg"]
    assert tokenizer.cut_warning("a red fox", 9) == (
        'prompt has 9 tokens, 8 fit: kept "… a red fo", cut "x"'
    )
    assert tokenizer.cut_warning("a red fox", 10) is None


def word_tokenizer(words, eos=1):
    """A tokenizer.json of whole words, with its own idea of padding and length."""
    names = {word: 2 + i for i, word in enumerate(words)} | {"<pad>": 0, "</s>": eos}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<pad>"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    engine.enable_truncation(2)
    engine.enable_padding(length=9)
    return engine.to_str().encode()


def test_t5_tokenizer_of_a_file():
    file = word_tokenizer(["A", "a", "red", "fox,"])
    ours = T5Tokenizer(np.frombuffer(file, np.uint8))  # as a bundle keeps it
    tokens, mask, cut = ours.encode(["A red  fox,", "a", "a a a a red"], 5)
    assert tokens.tolist() == [[2, 4, 5, 1, 0], [3, 1, 0, 0, 0], [3, 3, 3, 3, 1]]
    assert cut == [None, None, "red"]
    assert mask.sum(1).tolist() == [4, 2, 5]
    copy = pickle.loads(pickle.dumps(ours))
    np.testing.assert_array_equal(copy.encode(["A red fox,"], 5)[0][0], tokens[0])


def test_t5_slips():
    with pytest.raises(DataError, match="the T5 tokenizer is damaged"):
        T5Tokenizer(b"{}").encode(["a"], 4)
    with pytest.raises(DataError, match="gives '</s>' the id 9, T5's is 1"):
        T5Tokenizer(word_tokenizer(["a"], eos=9)).encode(["a"], 4)
    with pytest.raises(ConfigError, match="is one string"):
        T5Tokenizer().encode("a", 4)
    with pytest.raises(ConfigError, match="context_length is 0"):
        T5Tokenizer().encode(["a"], 0)
    assert T5Tokenizer().encode(["\ud83d"], 9)[0][0, :3].tolist() == [242, 194, 192]  # U+FFFD
