"""Captions from files, matched to pictures by name.

Text alignment (CLIP score, R-precision) needs the caption of every picture, and a list shifted by
one gives numbers that look right. So captions and pictures are matched by name only, and a caption
or picture without its counterpart is an error.
"""

import dataclasses
import os
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence

from unclip.errors import ConfigError, DataError
from unclip.input.samples import BadSample
from unclip.measure import caption_files
from unclip.measure.picture_set import PictureSet
from unclip.measure.pictures import EXTENSIONS

_SHOWN = 8


def read_captions(path: str | os.PathLike) -> dict[str, list[str]]:
    """{name: captions} of a file; a name may come several times, its captions keep their order.

    Args:
      path: a file as `caption_files` describes them.

    Raises:
      DataError: it cannot be read, or its rows are wrong. ConfigError: another kind of file.
    """
    found: dict[str, list[str]] = {}
    rows = caption_files.read(path)
    if isinstance(rows[0], caption_files.Image):
        rows = _of_images(path, rows)
    for row in rows:
        found.setdefault(row.name, []).extend(row.captions)
    return found


def _of_images(path, images: list[caption_files.Image]) -> list[caption_files.Row]:
    """Rows of the images that have captions, by their files' names."""
    images = [image for image in images if image.captions]
    bare = [str(image.id) for image in images if image.file is None]
    problems = [f"image {id} has no file name" for id in bare]
    problems += [
        f"image {image.id} ({image.file}): the caption is empty"
        for image in images
        if not all(text for _, text in image.captions)
    ]
    named = [image.file for image in images if image.file is not None]
    if len(set(named)) < len(named) and not problems:  # folders may share names
        images = [
            dataclasses.replace(image, file=posixpath.join(image.folder, image.file))
            for image in images
        ]
        problems += caption_files.twice("file names", [image.file for image in images])
    if not images:
        problems.append("none there")
    caption_files.refuse(path, problems)
    texts = [[text for _, text in image.captions] for image in images]
    return [caption_files.Row("", i.file, t) for i, t in zip(images, texts)]


def match(
    captions: Mapping[str, Sequence[str]], pictures: PictureSet, what: str
) -> list[list[str]]:
    """The captions of every picture, in the set's order.

    Names are compared as they are; else without the extension of a picture on either side, where
    no other picture or caption has that name too; and where no name of the whole list is found so,
    without folders, if names still differ then.

    Args:
      captions: {name: captions}; pictures: N of them; what: where the captions are from.

    Raises:
      ConfigError: a picture without caption or a caption without picture; names of both.
    """
    names = [pictures.name(i) for i in range(len(pictures))]
    given = {name: name for name in captions}
    found = _paired(names, given)
    if not any(found):
        base = [_base(name) for name in names]
        without = {_base(name): name for name in given}
        if len(without) == len(given) and len(set(base)) == len(base):
            found = _paired(base, without)
    spare = sorted(captions.keys() - set(found))
    bare = [name for name, caption in zip(names, found) if caption is None]
    if not bare and not spare:
        return [list(captions[name]) for name in found]
    unmatched = " and ".join(
        f"{len(some)} {kind} ({', '.join(some[:_SHOWN])}{', …' if len(some) > _SHOWN else ''})"
        for some, kind in ((bare, "pictures without caption"), (spare, "captions without picture"))
        if some
    )
    raise ConfigError(f"{what} and {pictures.source} do not match by name: {unmatched}")


def _paired(names: Sequence[str], given: Mapping[str, str]) -> list[str | None]:
    """For each name the value of `given` under it, or under its stem where that is unambiguous."""
    alone = {stem for stem, count in Counter(map(_stem, names)).items() if count == 1}
    stems = Counter(map(_stem, given))
    by_stem = {_stem(name): value for name, value in given.items() if stems[_stem(name)] == 1}
    return [
        given[name] if name in given
        else by_stem.get(_stem(name)) if _stem(name) in alone
        else None
        for name in names
    ]  # fmt: skip


def _stem(name: str) -> str:
    """A name without the extension of a picture; keys of shards may hold dots of their own."""
    stem, extension = os.path.splitext(name)
    return stem if extension.lower() in EXTENSIONS else name


def _base(name: str) -> str:
    """A name without its folders, which other systems divide by backslashes."""
    return posixpath.basename(name.replace("\\", "/"))


def own(pictures: PictureSet) -> list[list[str]] | None:
    """The captions that a set itself has, or None where no picture has one.

    Raises:
      ConfigError: some pictures have one and others not. DataError: one cannot be read.
    """
    try:
        found = [pictures.caption(i) for i in range(len(pictures))]
    except BadSample as error:
        reason = ": ".join(str(error).splitlines())
        raise DataError(f"{pictures.source}: a caption cannot be read: {reason}") from error
    if not any(found):
        return None
    bare = [pictures.name(i) for i, text in enumerate(found) if not text]
    if bare:
        more = ", …" if len(bare) > _SHOWN else ""
        raise ConfigError(
            f"{pictures.source}: {len(bare)} of {len(found)} pictures have no "
            f"caption: {', '.join(bare[:_SHOWN])}{more}"
        )
    return [[text] for text in found]
