"""z_i of whole collections of pictures, batch by batch."""

import warnings
from collections.abc import Iterator

import numpy as np

from unclip import errors
from unclip.cascade.pipeline import Pipeline
from unclip.input.decode.image import for_clip
from unclip.input.samples import BadSample, printable
from unclip.measure.picture_set import PictureSet


def embedded(model: Pipeline, pictures: PictureSet) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields (numbers, z_i float32 [b, D]), `model.batch_size` pictures at a time.

    A picture that cannot be read is left out with a warning that names it.

    Raises:
      DataError: no picture could be read.
    """
    side, count, bad = model.task("clip").model.image_size, 0, ""
    for start in range(0, len(pictures), model.batch_size):
        numbers, seen = [], []
        for i in range(start, min(start + model.batch_size, len(pictures))):
            try:
                seen.append(for_clip(pictures.read(i), side))
                numbers.append(i)
            except BadSample as error:
                bad = f"{printable(pictures.name(i))}: {error.message}"
                warnings.warn(f"left out: {bad}", stacklevel=2)
        if numbers:
            count += len(numbers)
            yield numbers, model.embed_image(np.stack(seen))
    if not count:
        raise errors.DataError(f"{pictures.source}: no picture could be read; the last was {bad}")
