"""Damaged ArrayRecord files, and any bytes in sound ones, read as a prepared data set."""

import io
import json
import pathlib
import tempfile
import time

import numpy as np
from PIL import Image
from table import Row

from unclip.errors import DataError
from unclip.input.samples import BadSample, Sample
from unclip.input.tfds import prepared, records

SAMPLES = 8


class Made:
    """Pictures and captions in memory."""

    fingerprint = "made"

    def __init__(self):
        rng = np.random.default_rng(0)
        self.samples = []
        for i in range(SAMPLES):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "PNG")
            self.samples.append(Sample(f"{i}", file.getvalue(), f"number {i}", {"n": i}))

    def __len__(self):
        return SAMPLES

    def read(self, i):
        """Sample i."""
        return self.samples[i]


def run(scale):
    """Each fault: was every sample of the file as it had been written, or refused with a reason?"""
    made, rows = Made(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        records.write_array_record(made, folder, name="made", split="train")
        path = next(folder.glob("made-train*"))
        whole = path.read_bytes()
        used = whole.rindex(made.samples[-1].image) + len(made.samples[-1].image)
        writer = prepared.array_record().ArrayRecordWriter
        example = prepared.example_type()
        plain = [_serialised(example, sample) for sample in made.samples]

        def flip(rng):
            data = bytearray(whole)
            # Half of them where the records are: most of a small file is padding.
            data[rng.integers(used if rng.random() < 0.5 else len(data))] ^= 1 << rng.integers(8)
            path.write_bytes(data)

        def overwrite(rng):
            data, at = bytearray(whole), rng.integers(used)
            data[at : at + 64] = rng.bytes(64)
            path.write_bytes(data[: len(whole)])

        def cut(rng):
            path.write_bytes(whole[: rng.integers(len(whole))])

        def mutate(rng):
            path.unlink()
            out = writer(str(path), "group_size:1,uncompressed")
            for record in plain:
                data = bytearray(record)
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
                out.write(bytes(data[: rng.integers(len(data) // 2, 2 * len(data))]))
            out.close()

        for name, fault, exact, count in (
            ("ArrayRecord file, one bit flipped", flip, True, 1000),
            ("ArrayRecord file, 64 bytes overwritten", overwrite, True, 1000),
            ("ArrayRecord file, cut off", cut, True, 1000),
            ("ArrayRecord file, sound, of mutated examples", mutate, False, 250),
        ):
            rows.append(_tried(name, fault, made, folder, exact, max(2, round(count * scale))))
    return rows


def _serialised(example_type, sample):
    example = example_type()
    for name, value in (
        ("image", sample.image),
        ("caption", sample.text.encode()),
        ("key", sample.key.encode()),
        ("json", json.dumps(sample.meta).encode()),
    ):
        example.features.feature[name].bytes_list.value.append(value)
    return example.SerializeToString()


def _tried(name, fault, made, folder, exact, files):
    rng, start = np.random.default_rng(0), time.monotonic()
    good = refused = wrong = 0
    for _ in range(files):
        fault(rng)
        found = records.RecordCollection(f"tfds:{folder}:train")
        for i in range(SAMPLES):
            try:
                sample = found.read(i)
                # A mutated example is sound as far as the file knows; its picture is judged later.
                sound = sample == made.samples[i] if exact else isinstance(sample.image, bytes)
                good, wrong = good + sound, wrong + (not sound)
            except (BadSample, DataError) as error:
                one_line = "\n" not in str(error)
                refused, wrong = refused + one_line, wrong + (not one_line)
            except Exception:  # any other exception is the fault that is searched for
                wrong += 1
    return Row(name, files * SAMPLES, good, refused, wrong, time.monotonic() - start)
