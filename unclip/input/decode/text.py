"""Captions to token ids: the byte-pair encoding of CLIP (arXiv 2103.00020, section 2.4), and T5's.

CLIP's text tower, the prior and the decoder all read `Tokenizer`'s tokens. The `tokenizers` library
does the merging; what OpenAI's tokenizer does before it (cleaning, lower case, the literal special
tokens) is done here, so that the ids are the same. `T5Tokenizer` is for a decoder that reads
captions through a frozen T5 (Imagen, arXiv 2205.11487).
"""

import gzip
import html
import os
import pathlib
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

from unclip.errors import ConfigError, DataError
from unclip.files import shipped

VOCABULARY = shipped.path("third_party", "clip-bpe", "bpe_simple_vocab_16e6.txt.gz")
VOCAB_SIZE = 49408
SOT, EOT, PAD = 49406, 49407, 0
CONTEXT_LENGTH = 77
T5_EOS = 1
MAX_TOKENIZER_BYTES = 64 << 20

_MERGES = 49152 - 256 - 2
_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL = re.compile(r"<\|startoftext\|>|<\|endoftext\|>")
_SPECIAL_ID = {"<|startoftext|>": SOT, "<|endoftext|>": EOT}

_ESCAPES = re.compile("\x1b\\[((?:\\d|;)*)([a-zA-Z])")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
_C1 = re.compile("[\x80-\x9f]")
_COMPATIBLE = re.compile("[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u3000\uff01-\uffef]+")
_TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    | {
        "\ufb00": "ff",
        "\ufb01": "fi",
        "\ufb02": "fl",
        "\ufb03": "ffi",
        "\ufb04": "ffl",
        "\ufb05": "\u017ft",
        "\ufb06": "st",
    }
)

# The same words where a text is ASCII and clean, as most captions are.
_ASCII_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", re.ASCII)
_MAX_REMEMBERED = 1 << 16  # words whose ids are kept, of at most this many characters:
_MAX_WORD = 32

# By vocabulary: word -> its ids and where in the word each starts.
_remembered: dict[pathlib.Path, dict[str, tuple[list[int], list[int]]]] = {}
_engines: dict[pathlib.Path | bytes, Engine] = {}
_engines_lock = threading.Lock()


def clean(text: str) -> str:
    """A caption as CLIP sees it: HTML unescaped, typography plain, one space, lower case.

    This covers what OpenAI's tokenizer asks of ftfy except one thing: text that was decoded with
    the wrong character set ("cafÃ©") is not repaired.

    >>> clean("  A\\n“Red”  &amp;amp; blue fox ")
    'a "red" & blue fox'
    """
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split()).lower()  # most captions: nothing below would change them
    text = _joined(text)
    if "<" not in text:
        text = html.unescape(text)
    text = _C1.sub(_windows_character, _ESCAPES.sub("", text))
    text = _COMPATIBLE.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
    text = text.translate(_TYPOGRAPHY)
    text = unicodedata.normalize("NFC", _CONTROLS.sub("", text))
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


def _joined(text: str) -> str:
    """A text whose surrogate halves, which JSON may hold, are joined; a lone one becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _windows_character(match: re.Match) -> str:
    """The Windows-1252 character that a C1 control character almost always was meant to be."""
    return bytes([ord(match[0])]).decode("cp1252", "ignore") or match[0]


class Tokenizer:
    """CLIP's tokenizer: 49,408 ids, SOT 49406, EOT 49407, padding 0.

    Cheap to make and to pickle, and safe to share between threads: the vocabulary is read on
    first use and kept once in each process.

    Args:
      vocabulary: the gzipped list of merges that OpenAI published; third_party/clip-bpe by default.
    """

    def __init__(self, vocabulary: str | os.PathLike = VOCABULARY):
        self.vocabulary = pathlib.Path(vocabulary)

    def encode(
        self, texts: Sequence[str], context_length: int = CONTEXT_LENGTH
    ) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
        """Tokens of `texts`: SOT, the text, EOT, then padding.

        Args:
          texts: n captions; an empty one is SOT EOT.
          context_length: L, at least 2. A longer text is cut and its last token made EOT.

        Returns:
          tokens int32 [n, L]; mask bool [n, L], True from SOT to EOT inclusive; and for each text
          None, or the (cleaned) text from the first token that did not fit.

        Raises:
          ConfigError: `texts` is one string or holds something else, or L is below 2.
          DataError: the vocabulary is missing or damaged.
        """
        if context_length < 2:
            raise ConfigError(f"context_length is {context_length}, expected at least 2 (SOT, EOT)")
        found = self._tokens(_checked(texts))
        return _rows(found, len(texts), context_length, [SOT], [EOT])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of one row of tokens: from SOT, if it begins with it, to the first EOT.

        Bytes that are not valid UTF-8, as a cut text can end in, become U+FFFD.

        Raises:
          ConfigError: an id is outside 0 … 49407.
        """
        engine = self._engine()
        words = []
        for position, number in enumerate(map(int, ids)):
            if number == EOT:
                break
            if number == SOT and position == 0:
                continue
            if not 0 <= number < VOCAB_SIZE:
                raise ConfigError(f"token id {number} is unknown, expected 0 to {VOCAB_SIZE - 1}")
            words.append(engine.id_to_token(number))
        values = {character: byte for byte, character in _byte_characters().items()}
        content = "".join(words).replace("</w>", " ")
        # The space is the one character that is not itself an encoded byte.
        raw = bytes(32 if character == " " else values[character] for character in content)
        return raw.decode("utf-8", "replace").strip()

    def cut_warning(self, prompt: str, context_length: int = CONTEXT_LENGTH) -> str | None:
        """One line on where a prompt is cut, or None where it fits.

        >>> Tokenizer().cut_warning("a red fox in the snow", 6)
        'prompt has 6 tokens, 4 fit: kept "… a red fox in", cut "the snow"'
        """
        [found] = self._tokens(_checked([prompt]))
        return _cut(*found, context_length - 2)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `vocab.json` and `merges.txt`, as other libraries' CLIP tokenizers read them.

        Raises:
          DataError: the vocabulary cannot be used.
        """
        self._engine().model.save(os.fspath(folder))

    def _tokens(self, texts: Sequence[str]) -> Iterator[tuple[str, list[int], list[int]]]:
        """For each text: the cleaned text, its ids, and where in the text each id starts."""
        engine, words = self._engine(), _remembered.setdefault(self.vocabulary, {})
        for text in map(clean, texts):
            ids, starts = [], []
            if "<|" not in text:
                if text.isascii():
                    for match in _ASCII_WORDS.finditer(text):
                        found, offsets = words.get(match[0]) or self._word(match[0], words)
                        ids += found
                        starts += [match.start() + offset for offset in offsets]
                else:
                    encoding = engine.encode(text, add_special_tokens=False)
                    ids, starts = encoding.ids, [start for start, _ in encoding.offsets]
                yield text, ids, starts
                continue
            for start, piece in _split_special(text):
                if piece in _SPECIAL_ID:
                    ids.append(_SPECIAL_ID[piece])
                    starts.append(start)
                else:
                    encoding = engine.encode(piece, add_special_tokens=False)
                    ids += encoding.ids
                    starts += [start + offset for offset, _ in encoding.offsets]
            yield text, ids, starts

    def _word(self, word: str, words: dict) -> tuple[list[int], list[int]]:
        """Ids of a word and where in it each starts; kept, because merging costs the most."""
        encoding = self._engine().encode(word, add_special_tokens=False)
        found = encoding.ids, [start for start, _ in encoding.offsets]
        if len(word) <= _MAX_WORD:
            if len(words) >= _MAX_REMEMBERED:
                words.clear()
            words[word] = found
        return found

    def _engine(self) -> Engine:
        """The shared merging engine of this process for this vocabulary."""
        with _engines_lock:
            if self.vocabulary not in _engines:
                _engines[self.vocabulary] = _build(self.vocabulary)
            return _engines[self.vocabulary]


class T5Tokenizer:
    """T5's tokenizer: end of sequence 1, padding 0, no token before the text.

    Captions are not cleaned (case and punctuation count); the file's own normalisation is applied.
    Cheap to pickle, and safe to share between threads.

    Args:
      file: the content of a `tokenizer.json` (a bundle's T5 part keeps it as extra "tokenizer",
        uint8 [n]); None reads bytes, as ByT5 does (arXiv 2105.13626): id = byte + 3.

    Raises:
      ConfigError: the file is larger than any tokenizer's.
    """

    def __init__(self, file: bytes | np.ndarray | None = None):
        self.file = None if file is None else bytes(file)
        if self.file is not None and len(self.file) > MAX_TOKENIZER_BYTES:
            raise ConfigError(
                f"a tokenizer of {len(self.file)} bytes, expected at most {MAX_TOKENIZER_BYTES}"
            )

    def encode(
        self, texts: Sequence[str], context_length: int
    ) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
        """Tokens of `texts`: the text, end of sequence, then padding.

        Args:
          texts: n captions; an empty one is the end of sequence alone.
          context_length: L, at least 1 (Imagen: 128). A longer text is cut to make room for its
            end.

        Returns:
          tokens int32 [n, L]; mask bool [n, L], True up to the end inclusive; and for each text
          None, or the text from the first token that did not fit.

        Raises:
          ConfigError: `texts` is one string or holds something else, or L is below 1.
          DataError: the file is not T5's or is damaged.
        """
        if context_length < 1:
            raise ConfigError(f"context_length is {context_length}, expected at least 1")
        found = self._tokens(_checked(texts))
        return _rows(found, len(texts), context_length, [], [T5_EOS])

    def cut_warning(self, prompt: str, context_length: int) -> str | None:
        """One line on where a prompt is cut, or None where it fits; see `Tokenizer`."""
        [found] = self._tokens(_checked([prompt]))
        return _cut(*found, context_length - 1)

    def _tokens(self, texts: Sequence[str]) -> Iterator[tuple[str, list[int], list[int]]]:
        texts = [_joined(text) for text in texts]
        if self.file is None:
            for text in texts:
                pieces = [character.encode() for character in text]
                ids = [byte + 3 for piece in pieces for byte in piece]
                yield text, ids, [k for k, piece in enumerate(pieces) for _ in piece]
            return
        for text, encoding in zip(
            texts, self._engine().encode_batch(texts, add_special_tokens=False)
        ):
            yield text, encoding.ids, [start for start, _ in encoding.offsets]

    def _engine(self) -> Engine:
        with _engines_lock:
            if self.file not in _engines:
                _engines[self.file] = _read(self.file)
            return _engines[self.file]


def _checked(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise ConfigError("texts is one string, expected a list of strings: [text]")
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(f"a text is {type(text).__name__} ({text!r:.40}), expected str")
    return texts


def _rows(found, count: int, length: int, before: list[int], after: list[int]):
    """(tokens, mask, truncated) of `encode` from what `_tokens` gives; padding is 0."""
    tokens, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    truncated, room = [], length - len(before) - len(after)
    for row, (text, ids, starts) in enumerate(found):
        kept = [*before, *ids[:room], *after]
        tokens[row, : len(kept)] = kept
        mask[row, : len(kept)] = True
        truncated.append(text[starts[room] :] if len(ids) > room else None)
    return tokens, mask, truncated


def _cut(text: str, ids: list[int], starts: list[int], room: int) -> str | None:
    """One line on where a text is cut to `room` tokens; None where all of it fits."""
    if len(ids) <= room:
        return None
    kept, cut = text[: starts[room]].rstrip(), text[starts[room] :]
    shown = cut if len(cut) <= 60 else cut[:59] + "…"
    return f'prompt has {len(ids)} tokens, {room} fit: kept "… {kept[-40:]}", cut "{shown}"'


def _split_special(text: str) -> Iterator[tuple[int, str]]:
    """(start, piece) of a text around its literal special tokens.

    A special token right after punctuation is not recognised: there CLIP's word pattern has already
    taken "<|" as part of the run of punctuation.
    """
    done = 0
    for match in _SPECIAL.finditer(text):
        before = text[match.start() - 1 : match.start()]
        if (
            before.isspace()
            or unicodedata.category(before or "L")[0] in "LN"
            or (match.start() == done)
        ):
            if match.start() > done:
                yield done, text[done : match.start()]
            yield match.start(), match[0]
            done = match.end()
    if done < len(text):
        yield done, text[done:]


def _byte_characters() -> dict[int, str]:
    """Byte -> the printable character that stands for it, in the order of the vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _read(file: bytes) -> Engine:
    """The engine of a `tokenizer.json`; raises DataError where it cannot be T5's."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        engine = Engine.from_str(file.decode("utf-8"))
    except Exception as error:
        if type(error) not in (Exception, UnicodeDecodeError):  # tokenizers raises plain Exceptions
            raise
        raise DataError(f"the T5 tokenizer is damaged: {error}") from error
    if engine.token_to_id("</s>") != T5_EOS:
        raise DataError(
            f"the tokenizer gives '</s>' the id {engine.token_to_id('</s>')}, T5's is {T5_EOS}"
        )
    engine.no_truncation()
    engine.no_padding()
    return engine


def _build(path: pathlib.Path) -> Engine:
    """The engine for a list of merges; raises DataError where the file cannot be used."""
    # The input has worker threads or processes of its own; more threads below them would only
    # compete for the same cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except FileNotFoundError as error:
        raise DataError(
            f"CLIP's vocabulary is not at {path}; unclip comes with it, so install unclip again or "
            "pass Tokenizer(vocabulary=…)"
        ) from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"CLIP's vocabulary {path} cannot be read: {error}") from error
    # The first line is a version; the merges beyond those counted here are not used by CLIP.
    merges = [tuple(line.split()) for line in lines[1 : 1 + _MERGES]]
    if len(merges) != _MERGES or any(len(pair) != 2 for pair in merges):
        raise DataError(f"{path} holds {len(merges)} merges of two parts, expected {_MERGES}")
    characters = list(_byte_characters().values())
    words = [*characters, *(c + "</w>" for c in characters), *map("".join, merges), *_SPECIAL_ID]
    vocabulary = {word: number for number, word in enumerate(words)}
    engine = Engine(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return engine
