"""`UnCLIP`: a trained cascade with every way to make or judge a picture as its method."""

from unclip.cascade.pipeline import Pipeline
from unclip.drawing import (
    interpolate,
    modes,
    reconstruct,
    text,
    text_diff,
    upsample,
    variations,
    zero_shot,
)


class UnCLIP(Pipeline):
    """A loaded cascade; see `cascade.pipeline.Pipeline` for its arguments and `load`."""

    generate = text.generate
    variations = variations.variations
    interpolate = interpolate.interpolate
    text_diff = text_diff.text_diff
    reconstruct = reconstruct.reconstruct
    upsample = upsample.upsample
    classify = zero_shot.classify
    search = zero_shot.search
    redraw = modes.redraw
