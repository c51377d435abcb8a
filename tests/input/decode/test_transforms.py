"""What a sample becomes: the caption that is chosen, and how small its picture is decoded."""

import io
import json
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from unclip.errors import ConfigError
from unclip.input.decode import image, transforms
from unclip.input.decode.transforms import ImageText, Upsampling
from unclip.input.order import generator
from unclip.input.samples import BadSample, Sample
from unclip.input.shards.collection import open_shards
from unclip.input.source import make_source


def tokenise(texts, length):
    """A byte a token."""
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts):
        codes = list(text.encode())[:length]
        row[: len(codes)] = codes
    return tokens, tokens > 0


def jpeg(side=64):
    y, x = np.mgrid[0:side, 0:side]
    file = io.BytesIO()
    Image.fromarray(np.stack([x, y, x + y], -1).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def chosen(transform, sample, count=64):
    return [transform.caption(sample, generator(0, g)) for g in range(count)]


def test_a_list_of_captions_gives_one_by_the_samples_number():
    sample = Sample("k", b"", "text", {"five": list("abcde"), "one": "z", "odd": ["x", 3, " "]})
    five = ImageText(8, 4, tokenise, captions=("json:five",))
    assert set(chosen(five, sample)) == set("abcde")
    assert chosen(five, sample) == chosen(five, sample)
    both = ImageText(8, 4, tokenise, captions=("txt", "json:five"))
    counts = {text: chosen(both, sample, 600).count(text) for text in ("text", *"abcde")}
    assert sum(counts.values()) == 600 and min(counts.values()) > 60  # each one of six
    assert set(chosen(ImageText(8, 4, tokenise, captions=("json:odd",)), sample)) == {"x"}
    # One source with one caption draws nothing: crops stay what they were.
    rng = generator(0, 1)
    ImageText(8, 4, tokenise, captions=("json:one",)).caption(sample, rng)
    assert rng.random() == generator(0, 1).random()


@pytest.mark.parametrize(
    "value, reason",
    [
        ([], "empty-text"),
        (["", "  "], "empty-text"),
        ([3, None], "caption"),
        (["", []], "caption"),
        ({"a": "b"}, "caption"),
        (None, "empty-text"),
        ([["a"]], "caption"),
    ],
)
def test_lists_without_a_caption(value, reason):
    with pytest.raises(BadSample) as error:
        ImageText(8, 4, tokenise, captions=("json:c",)).caption(
            Sample("k", b"", "text", {"c": value}), generator(0, 0)
        )
    assert error.value.reason == reason


def test_lists_of_captions_through_the_source(tmp_path):
    texts = [f"caption {k}" for k in range(5)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in "ab":
            meta = json.dumps({"captions": texts}).encode()
            for extension, data in (("jpg", jpeg()), ("txt", b"first"), ("json", meta)):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    transform = ImageText(8, 12, tokenise, captions=("json:captions",))
    rows = []
    for threads in (1, 3):
        with make_source(
            open_shards(str(tmp_path / "a.tar")), transform, batch_size=16, seed=1, threads=threads
        ) as batches:
            rows.append(
                [
                    bytes(row[row > 0].astype(np.uint8)).decode()
                    for _ in range(3)
                    for row in next(batches)["tokens"]
                ]
            )
    assert rows[0] == rows[1] and set(rows[0]) == set(texts)


@pytest.mark.parametrize("margin, side", [(1.0, 16), (2.0, 32), (2.1, 64), (4.0, 64)])
def test_margin_says_how_small_a_jpeg_is_decoded(margin, side, monkeypatch):
    sides, decode, ours = [], image.decode, threading.get_ident()

    def record(*args, **options):
        found = decode(*args, **options)
        if threading.get_ident() == ours:  # a thread of another test may still be decoding
            sides.append(len(found))
        return found

    monkeypatch.setattr(image, "decode", record)
    sample = Sample("k", jpeg(), "text", {})
    made = ImageText(16, 4, tokenise, margin=margin)(sample, generator(0, 0))
    assert made["image"].shape == (16, 16, 3)
    made = Upsampling(16, 4, margin=margin)(sample, generator(0, 0))
    assert made["image"].shape == (16, 16, 3) and sides == [side, side]
    with pytest.raises(ConfigError, match="margin"):
        ImageText(16, 4, tokenise, margin=0.5)


def test_the_crop_and_clips_side_decide_how_small_too():
    assert ImageText(16, 4, tokenise, fraction=0.3).target == 54
    assert ImageText(16, 4, tokenise, clip_size=24).target == 24
    assert ImageText(None, 4, tokenise).target is None


def test_no_more_of_a_caption_is_tokenised_than_counts():
    lengths = []

    def record(texts, length):
        lengths.append(len(texts[0]))
        return tokenise(texts, length)

    transform = ImageText(None, 4, record)
    for length in (3, transforms._MAX_CHARACTERS + 1, 1 << 20):
        transform(Sample("k", b"", "x" * length, {}), generator(0, 0))
    assert lengths == [3, transforms._MAX_CHARACTERS, transforms._MAX_CHARACTERS]
