"""MS-COCO 2014, 30,000 captions of the validation set, zero-shot, at 256 pixels.

As in table 2 of arXiv 2204.06125. Papers differ in which captions, pictures and crop they use, so
numbers can be compared only under one id. Here: one caption for each of `count` images; images and
captions are picked by SHA-256 of the seed and the image's id, so the list is the same on every
machine and a shorter list is the beginning of a longer one; references are the same images, centre
square resized with antialiasing. A fixed list, such as T2IBenchmark's, is used unchanged.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip import errors
from unclip.measure import caption_files
from unclip.measure.picture_set import PictureSet, Prepared
from unclip.measure.pictures import ShardPictures, TfdsPictures, open_pictures
from unclip.protocols import base

COUNT = 30_000
IMAGES = 40_504  # in val2014; Karpathy's restval + val + test are the same images
KARPATHY = "tfds:coco_captions:restval+val+test"
FOLDER = "val2014"  # of the images in Karpathy's file
IDS = tuple(dict.fromkeys(("image_id", "cocoid", *caption_files.NAMES)))
FILTERS = ("bicubic", "box")
_SHOWN = 5
_NUMBER = re.compile(r"(\d{1,12})(?:\.\w+)?$")


class Coco(base.EvaluationProtocol):
    """A caption list and, where pictures are given, the same images as references.

    The id names the captions by their hash; whose pictures they are compared with is in the keys.
    """

    named = ("captions", "size")

    def __init__(
        self,
        id: str,
        captions: Mapping[int, str],
        size: int,
        provenance: dict,
        reference: PictureSet | None,
    ):
        keys = [f"{image:012d}" for image in captions]
        super().__init__(id, list(captions.values()), keys, size, provenance)
        self._reference = reference

    def reference(self) -> PictureSet | None:
        """The images of the captions at `size`, or None where no pictures were given."""
        return self._reference


def coco2014val_30k(
    annotations: str | None = None,
    captions: str | None = None,
    pictures: str | None = None,
    count: int | None = None,
    seed: int = 0,
    size: int = 256,
    filter: str = "bicubic",
    allow_missing: bool = False,
) -> Coco:
    """The protocol, from the files that are given.

    Args:
      annotations: COCO's captions_val2014.json, or Karpathy's dataset_coco.json.
      captions: a fixed list in place of a picked one: .csv, .tsv or .jsonl with an image (one of
        `IDS`; a file name's last number is the image's id) and a caption, see
        `measure.caption_files`.
      pictures: the images: a folder, webdataset shards (keys or a JSON field image_id say which),
        or "tfds:coco_captions:restval+val+test". Without annotations and list, captions come from
        here too. None: no references (a statistics file can take their place).
      count: images to pick, 30,000; of a fixed list: how many it must hold.
      seed: by which captions and images are picked.
      size: side of the references; filter: "bicubic" or "box", how they are resized.
      allow_missing: leave out captions whose picture is missing (they are listed in the provenance,
        and the id says how many) instead of an error.

    Raises:
      ConfigError: no source of captions, or a value out of range.
      DataError: files that cannot be read; images that occur twice or are missing; too few.
    """
    if annotations and captions:
        raise errors.ConfigError("coco2014val-30k: annotations or a list of captions, not both")
    if not (annotations or captions or pictures):
        raise errors.ConfigError(
            "coco2014val-30k needs captions: annotations=captions_val2014.json, captions=LIST, or "
            f"pictures={KARPATHY}"
        )
    if seed < 0 or not 8 <= size <= 4096 or (count is not None and count < 1):
        raise errors.ConfigError(
            f"coco2014val-30k: seed {seed}, size {size}, count {count}: expected a seed of 0 or "
            "more, 8 to 4096 pixels and at least 1 image"
        )
    if filter not in FILTERS:
        raise errors.unknown("filter of coco2014val-30k", filter, FILTERS)
    opened = open_pictures(pictures) if pictures else None
    numbers = {} if opened is None else _image_numbers(opened)
    if captions:
        chosen = read_list(captions)
        if count is not None and count != len(chosen):
            raise errors.DataError(f"{captions} has {len(chosen)} captions, expected {count}")
        source, made = {"list": os.path.basename(captions)}, "list-{sha}"
    else:
        if annotations:
            every, source = read_annotations(annotations), os.path.basename(annotations)
        else:
            every, source = _own_captions(opened, numbers), opened.source
        chosen = pick(every, count or COUNT, seed)
        total = "" if len(every) == IMAGES else f".of{len(every)}"
        source = {"captions": source, "seed": seed, "images": len(every)}
        made = f"one-per-image.seed{seed}{total}.captions-{{sha}}"
    missing = [] if opened is None else [image for image in chosen if image not in numbers]
    if missing and (not allow_missing or len(missing) == len(chosen)):
        names = ", ".join(f"{image:012d}" for image in missing[:_SHOWN])
        raise errors.DataError(
            f"{pictures} lacks {len(missing)} of {len(chosen)} pictures: {names}"
            f"{', …' if len(missing) > _SHOWN else ''}; allow_missing leaves their captions out"
        )
    for image in missing:
        del chosen[image]
    keys, prompts = [f"{image:012d}" for image in chosen], list(chosen.values())
    made = made.format(sha=base.captions_hash(keys, prompts)[:8])
    reference = None
    if opened is not None:
        base_set = base.Chosen(opened, [numbers[image] for image in chosen], keys, prompts)
        reference = Prepared(base_set, size, filter)
    if isinstance(opened, TfdsPictures):
        made += ".tfds-" + pictures.rpartition(":")[2]
    wanted = len(chosen) + len(missing)
    name = "30k" if wanted == COUNT else str(wanted)
    id = (
        f"coco2014val-{name}.{made}{f'.missing{len(missing)}' if missing else ''}"
        f".crop{size}{'' if filter == 'bicubic' else '-' + filter}"
    )
    provenance = source | {
        "pictures": pictures,
        "filter": filter,
        "missing": [f"{image:012d}" for image in missing],
    }
    return Coco(id, chosen, size, provenance, reference)


def pick(captions: Mapping[int, list[str]], count: int, seed: int) -> dict[int, str]:
    """{image: caption} of `count` images, one caption each, in an order by hash.

    Images are ordered by the SHA-256 of "SEED/IMAGE" and the first are taken; of k captions, that
    of number SHA-256("SEED/IMAGE/caption") modulo k (first 8 bytes, big-endian).

    Raises:
      DataError: fewer images than asked for.
    """
    if count > len(captions):
        raise errors.DataError(f"{len(captions)} images have captions, {count} were asked for")
    digest = lambda text: hashlib.sha256(text.encode()).digest()
    order = sorted(captions, key=lambda image: digest(f"{seed}/{image}"))
    number = lambda image: int.from_bytes(digest(f"{seed}/{image}/caption")[:8], "big")
    return {image: captions[image][number(image) % len(captions[image])] for image in order[:count]}


def read_annotations(path: str | os.PathLike) -> dict[int, list[str]]:
    """{image id: captions in the order of their ids} of COCO's captions_*.json, or Karpathy's.

    White space inside a caption becomes one space; a caption of white space alone is left out. Of
    Karpathy's file, which holds training images too, those of val2014 are taken.

    Raises:
      DataError: unreadable, another layout, an id that comes twice, a caption of no image.
    """
    images = caption_files.read_images(path)
    if any(image.folder for image in images):
        images = [image for image in images if image.folder == FOLDER]
        if not images:
            raise errors.DataError(f"captions {path}: no image has the filepath {FOLDER!r}")
    caption_files.refuse(
        path,
        [
            f"image {image.id!r} ({image.file}): expected a number as its id"
            for image in images
            if not isinstance(image.id, int)
        ],
    )
    found = {}
    for image in images:
        captions = image.captions
        if all(isinstance(id, int) for id, _ in captions):
            captions = sorted(captions)
        texts = [text for _, text in captions if text]
        found |= {image.id: texts} if texts else {}
    return found


def read_list(path: str | os.PathLike) -> dict[int, str]:
    """{image id: caption} of a fixed list, in its order.

    Raises:
      ConfigError: another kind of file. DataError: unreadable, rows that are wrong, an image twice.
    """
    rows = caption_files.read_rows(path, IDS, (".csv", ".tsv", ".jsonl"))
    numbers = [_NUMBER.search(row.name) for row in rows]
    problems = [
        f"{row.where}: expected an image that ends in its number, given {row.name[:60]!r}"
        for row, number in zip(rows, numbers)
        if not number
    ]
    problems += [
        f"{row.where}: {len(row.captions)} captions; expected one"
        for row in rows
        if len(row.captions) > 1
    ]
    pairs = [(int(number[1]), row) for number, row in zip(numbers, rows) if number]
    problems += caption_files.twice("image ids", [image for image, _ in pairs])
    caption_files.refuse(path, problems)
    return {image: _text(row.captions[0]) for image, row in pairs}


# ============================================================ pictures by their image ids


def _image_numbers(pictures: PictureSet) -> dict[int, int]:
    """{image id: number in the set}; without pictures that have no number in their name."""
    found = [(_image_id(pictures, i), i) for i in range(len(pictures))]
    found = [(image, i) for image, i in found if image is not None]
    problems = caption_files.twice("picture ids", [image for image, _ in found])
    if problems:
        raise errors.DataError(f"{pictures.source}: {problems[0]}")
    return dict(found)


def _image_id(pictures: PictureSet, i: int) -> int | None:
    fields: Mapping[str, Any] = {}
    if isinstance(pictures, TfdsPictures):
        fields = {"image_id": pictures.record(i).get("image/id")}
    elif isinstance(pictures, ShardPictures):
        fields = pictures.collection.meta(i)  # keys may be running numbers
    value = next((fields[key] for key in ("image_id", "cocoid") if key in fields), None)
    match = _NUMBER.search(pictures.name(i) if value is None else str(value))
    return int(match[1]) if match else None


def _own_captions(pictures: PictureSet, numbers: Mapping[int, int]) -> dict[int, list[str]]:
    """{image id: captions} that a set itself has."""
    found = {}
    for image, i in numbers.items():
        texts = [pictures.caption(i)]
        if isinstance(pictures, TfdsPictures):
            texts = _tfds_captions(pictures.record(i).get("captions"))
        found[image] = [text for text in map(_text, texts) if text]
    found = {image: texts for image, texts in found.items() if texts}
    if not found:
        raise errors.DataError(f"{pictures.source} has no captions: give annotations or a list")
    return found


def _tfds_captions(value: Any) -> list[str]:
    """The texts of tfds' feature `captions`, by their ids: columns, or a list of rows."""
    if isinstance(value, Mapping):
        texts = value.get("text", ())
        rows = list(zip(value.get("id", range(len(texts))), texts))
    else:
        rows = [(row.get("id", n), row.get("text")) for n, row in enumerate(value or ())]
    return [text for _, text in sorted(rows, key=lambda row: int(row[0]))]


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return " ".join(value.split()) if isinstance(value, str) else ""
