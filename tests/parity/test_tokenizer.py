"""CLIP's tokenizer against transformers' `CLIPTokenizer`, fed from the same file of merges."""

import gzip
import json

import transformers

from unclip.input.decode.text import VOCABULARY, Tokenizer

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


def test_ids_equal_transformers(tmp_path):
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")
    merges = [line.split() for line in lines[1 : 49152 - 256 - 2 + 1]]
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = [b for b in range(256) if b not in shown]
    letters = [chr(b) for b in shown] + [chr(256 + i) for i in range(len(hidden))]
    words = letters + [w + "</w>" for w in letters] + ["".join(m) for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    pairs = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (tmp_path / "merges.txt").write_text("\n".join(pairs))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    tokens, mask, _ = Tokenizer().encode(CAPTIONS, 77)
    for row, real, caption in zip(tokens, mask, CAPTIONS):
        assert row[real].tolist() == theirs(caption)["input_ids"], caption
