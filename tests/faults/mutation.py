"""Mutated pictures, captions and JSON through the whole source: each is used unchanged or named."""

import io
import json
import pathlib
import random
import tarfile
import tempfile
import time
from unittest import mock

import numpy as np
from PIL import Image
from table import Row

from unclip.input.decode import image, jpeg
from unclip.input.decode.transforms import ImageText
from unclip.input.order import generator
from unclip.input.samples import BadSample, Sample
from unclip.input.shards.collection import open_shards
from unclip.input.source import make_eval_source

BATCH, SIZE, TOKENS = 32, 16, 24
KINDS = ("jpg", "progressive", "grey", "png", "palette", "webp", "txt", "json")
A_SHARD = 500


def run(scale: float) -> list[Row]:
    """10,000 samples with one mutated member each; then JPEGs by both decoders."""
    count = max(len(KINDS) * 4, round(10_000 * scale))
    members = {f"{k:06d}": _mutated(KINDS[k % len(KINDS)], random.Random(k)) for k in range(count)}
    with tempfile.TemporaryDirectory() as folder:
        rows = [_through_source(pathlib.Path(folder), members)]
    mutated = [found["jpg"] for found in members.values() if "jpg" in found]
    headers = [_header_mutated(random.Random(k)) for k in range(count)]
    return [
        *rows,
        _both_decoders("mutated jpeg, libjpeg-turbo against Pillow", mutated),
        _both_decoders("mutated jpeg header, likewise", headers),
    ]


def tokenise(texts, length):
    """A byte a token."""
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts):
        codes = list(text.encode("utf-8", "surrogatepass"))[:length]
        row[: len(codes)] = codes
    return tokens, tokens > 0


TRANSFORM = ImageText(SIZE, TOKENS, tokenise, captions=("txt", "json:caption"), max_pixels=1 << 20)


def _picture(kind, rng):
    noise = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 90, (48, 56, 3), np.uint8)
    y, x = np.mgrid[0:48, 0:56]
    noise += np.stack([3 * x, 3 * y, x + y], -1).astype(np.uint8)
    picture, file = Image.fromarray(noise), io.BytesIO()
    if kind == "png":
        picture.save(file, "PNG")
    elif kind == "palette":
        picture.quantize(16).save(file, "PNG")
    elif kind == "webp":
        picture.save(file, "WEBP", lossless=rng.random() < 0.5, method=0)
    else:
        picture = picture.convert("L") if kind == "grey" else picture
        picture.save(file, "JPEG", quality=90, progressive=kind == "progressive")
    return file.getvalue()


def _mutate(data, rng):
    """One to three bit flips, cuts, exchanged, repeated, blanked or inserted runs of bytes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(data) + 1), rng.randint(1, 16)
        way = rng.randrange(7)
        if way <= 1 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif way == 2:
            del data[at : None if rng.random() < 0.3 else at + length]
        elif way == 3:
            other = rng.randrange(len(data) + 1)
            one, two = bytes(data[at : at + length]), bytes(data[other : other + length])
            data[at : at + length], data[other : other + length] = two, one
        elif way == 4:
            data[at:at] = rng.randbytes(length)
        elif way == 5:
            data[at:at] = data[at : at + length]
        else:
            data[at : at + length] = rng.choice((b"\0", b"\xff")) * len(data[at : at + length])
    return bytes(data)


def _mutated(kind, rng):
    """{extension: bytes} of a sample whose `kind` of member is mutated."""
    extension = {"palette": "png", "progressive": "jpg", "grey": "jpg"}.get(kind, kind)
    picture = extension if extension in ("jpg", "png", "webp") else "png"
    text = f"a caption, number {rng.randrange(1000)} “é”"
    meta = {"caption": f"another {rng.randrange(1000)}", "width": 56, "similarity": 0.3}
    found = {
        picture: _picture(kind if picture == extension else "png", rng),
        "txt": text.encode(),
        "json": json.dumps(meta).encode(),
    }
    return found | {extension: _mutate(found[extension], rng)}


def _expected(key, members, g):
    """The arrays of a sample straight from its members; None where it is bad."""
    try:
        picture = next(data for name, data in members.items() if name in ("jpg", "png", "webp"))
        text = members["txt"].decode("utf-8-sig") if members["txt"] else ""
        meta = json.loads(members["json"]) if members["json"] else {}
        if not isinstance(meta, dict):
            return None
        caption = meta.get("caption")
        text = text if members["txt"] else caption if isinstance(caption, str) else ""
        return TRANSFORM(Sample(key, picture, text, meta), generator(0, g))
    except (ValueError, RecursionError, BadSample):
        return None


def _through_source(folder, members):
    began, keys = time.monotonic(), list(members)
    for first in range(0, len(keys), A_SHARD):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for key in keys[first : first + A_SHARD]:
                for extension, data in members[key].items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    collection = open_shards(str(folder / "*.tar"))
    left_out = len(keys) - len(collection)
    wrong = int(left_out != sum(collection.problems.values()))
    good, listed, position = 0, {}, 0
    with make_eval_source(
        collection, TRANSFORM, batch_size=BATCH, threads=2, max_attempts=200
    ) as batches:
        for batch in batches:
            for row in range(BATCH):
                g = position + row
                if g >= len(collection):
                    wrong += int(batch["valid"][row])
                    continue
                key = collection.key(g)
                expected = _expected(key, members[key], g)
                wrong += int(bool(batch["valid"][row]) != (expected is not None))
                if expected is not None and batch["valid"][row]:
                    good += 1
                    wrong += any(not np.array_equal(batch[n][row], expected[n]) for n in expected)
            position += BATCH
            listed |= {bad["sample"]: bad for bad in batches.drain_bad()}
        wrong += abs(batches.seen - len(collection)) + abs(batches.bad - len(listed))
    wrong += abs(good + len(listed) - len(collection))
    wrong += sum(not bad["reason"] or not bad["key"] for bad in listed.values())
    reasons = sorted({bad["reason"] for bad in listed.values()} | set(collection.problems))
    return Row(
        "mutated picture, caption or json",
        len(keys),
        good,
        left_out + len(listed),
        wrong,
        time.monotonic() - began,
        ", ".join(reasons),
    )


def _header_mutated(rng):
    """A JPEG with Exif, a colour profile or other segments, mutated before its first scan."""
    data, exif = _picture(rng.choice(("jpg", "progressive", "grey")), rng), Image.Exif()
    exif[271] = "maker"
    noise = rng.randbytes(30)
    segments = {
        0xE0: b"JFXX\0" + noise,
        0xE1: exif.tobytes(),
        0xE2: b"ICC_PROFILE\0\1\1" + noise,
        0xED: b"Photoshop 3.0\0008BIM" + noise,
        0xEE: b"Adobe" + noise,
        0xFE: noise,
    }
    for marker in rng.sample(list(segments), 2):
        body = segments[marker][: rng.randint(4, 60)]
        data = (
            data[:2] + bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body + data[2:]
        )
    at = data.index(b"\xff\xda") + 14
    return data[:2] + _mutate(data[2:at], rng) + data[at:]


def _both_decoders(fault, jpegs):
    """Whether simplejpeg is installed changes neither which JPEGs are good nor their bits."""
    began, good, wrong, quick = time.monotonic(), 0, 0, 0
    for number, data in enumerate(jpegs):
        target = (None, 8, 16)[number % 3]
        with mock.patch.object(jpeg, "decode_plain", return_value=None):
            by_pillow = _decoded(data, target)
        both, header = _decoded(data, target), jpeg.read_header(data)
        wrong += not np.array_equal(both, by_pillow)
        good += not isinstance(both, str)
        quick += bool(header and jpeg.decode_plain(data, header, None) is not None)
    return Row(
        fault,
        len(jpegs),
        good,
        len(jpegs) - good,
        wrong,
        time.monotonic() - began,
        f"{quick} by libjpeg-turbo alone, strict",
    )


def _decoded(data, target):
    try:
        return image.decode(data, target=target, max_pixels=1 << 20)
    except image.BadPicture as error:
        return error.reason
