"""Transforms: one stored sample and its random numbers -> the arrays a stage trains on.

On the input's side, stages differ only in these: `ImageText` is for CLIP, prior and decoder,
`Upsampling` for the two upsamplers.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from unclip.errors import ConfigError, unknown
from unclip.input import captions as caption_sources
from unclip.input.decode import degradation as degradations
from unclip.input.decode import image as pictures
from unclip.input.samples import BadSample, Sample

# Characters of a caption that are tokenised: far more than any context holds. Tokenising a whole
# megabyte would take a second.
_MAX_CHARACTERS = 1 << 14


class ImageText:
    """Transform to a square picture and its tokens, for CLIP, the prior and the decoder.

    Args:
      size: the picture's side S; None: no picture is decoded, for stored embeddings.
      context_length: L.
      tokenise: (texts, L) -> (int32 [n, L], bool [n, L], …); None: unclip's own tokenizer.
      crop: "center" or "random" square of the picture.
      fraction: the crop's side as a part of the shorter side.
      clip_size: also deliver the same crop at this side, for a CLIP that sees more than `size`.
      captions: where captions come from, see `unclip.input.captions`; of several captions one is
        drawn by the sample's number.
      draw_caption: False: the first caption that the sample has, as evaluation takes it.
      with_crop: adds "crop".
      max_bytes, max_pixels, min_side, margin: see `image.decode`.

    Returns (when called with a Sample and a generator):
      "image" uint8 [S, S, 3], "tokens" int32 [L], "text_mask" bool [L]; with `clip_size` C also
      "clip_image" uint8 [C, C, 3]; with `with_crop` also "crop" float32 [4]: left, upper, right,
      lower as parts of width and height; from `WithEmbeddings` also "z_i" float32 [D].

    Raises:
      BadSample: "empty-text", "caption" (not a string) or what `decode` finds.
    """

    def __init__(
        self,
        size: int | None,
        context_length: int,
        tokenise: Callable | None = None,
        *,
        clip_size: int | None = None,
        crop: str = "center",
        fraction: float = 1.0,
        captions: Sequence[str] = ("txt",),
        draw_caption: bool = True,
        with_crop: bool = False,
        max_bytes: int = 64 << 20,
        max_pixels: int = 1 << 26,
        min_side: int = 1,
        margin: float = 2.0,
    ):
        pictures.crop_box(1, 1, crop="center", fraction=fraction)
        if crop not in ("center", "random"):
            raise unknown("crop", crop, ["center", "random"])
        if tokenise is None:
            from unclip.input.decode.text import Tokenizer

            tokenise = Tokenizer().encode
        self.size, self.context_length, self.tokenise = size, context_length, tokenise
        self.clip_size = clip_size
        self.crop, self.fraction = crop, fraction
        self.captions, self.draw_caption = caption_sources.checked(captions), draw_caption
        # A JPEG is decoded no smaller than the crop needs, rather than the whole picture.
        self.target = size and math.ceil(max(size, clip_size or 0) / fraction)
        self.with_crop = with_crop
        self.limits = _limits(max_bytes, max_pixels, min_side, margin)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = self.caption(sample, rng)
        tokens, mask = self.tokenise([text[:_MAX_CHARACTERS]], self.context_length)[:2]
        arrays = {"tokens": np.asarray(tokens[0], np.int32), "text_mask": np.asarray(mask[0], bool)}
        if isinstance(sample.meta.get("z_i"), np.ndarray):  # not a field of the JSON
            arrays["z_i"] = sample.meta["z_i"]
        if self.size is None:
            return arrays
        decoded = pictures.decode(sample.image, target=self.target, **self.limits)
        arrays["image"], box = pictures.resize_and_crop(
            decoded, self.size, crop=self.crop, fraction=self.fraction, rng=rng
        )
        if self.clip_size:
            arrays["clip_image"] = pictures.resize_box(decoded, self.clip_size, box)
        if self.with_crop:
            height, width = decoded.shape[:2]
            arrays["crop"] = np.array(box, np.float32) / np.float32([width, height] * 2)
        return arrays

    def caption(self, sample: Sample, rng: np.random.Generator) -> str:
        """One of the sample's captions that are not blank."""
        found = [caption_sources.value(sample, source) for source in self.captions]
        texts = [text for one in found for text in caption_sources.texts(one)]
        if not texts:
            inside = [text for one in found for text in (one if isinstance(one, list) else [one])]
            odd = any(text is not None and not isinstance(text, str) for text in inside)
            raise BadSample("caption" if odd else "empty-text", f"no caption in {self.captions}")
        several = len(found) > 1 or isinstance(found[0], list)
        return texts[int(rng.integers(len(texts)))] if several and self.draw_caption else texts[0]


def _limits(max_bytes: int, max_pixels: int, min_side: int, margin: float) -> dict[str, float]:
    """Arguments of `image.decode`."""
    if not 1 <= margin <= 8:
        raise ConfigError(f"decoding margin {margin}: expected 1 to 8")
    return {
        "max_bytes": max_bytes,
        "max_pixels": max_pixels,
        "min_side": min_side,
        "margin": margin,
    }


class Upsampling:
    """Transform to a picture and its degraded, smaller version, for the upsamplers.

    The picture's middle square is resized to `size`, of which random crops are taken (appendix C of
    arXiv 2204.06125: a quarter of the side). A crop is degraded and becomes the small picture.

    Args:
      size: side of the full target, 256 or 1024 in the paper.
      factor: 4 in the paper.
      crop: side c of the training crop; None: the full picture. A multiple of `factor`.
      degradation: of `degradation.KINDS`: "blur" (first upsampler), "bsr" (second), "bsrgan" or
        "none".
      probability: of degrading a sample; the others are downsampled by area. arXiv 2204.06125
        corrupts "the conditioning images", so 1; Cascaded Diffusion Models (arXiv 2106.15282) blurs
        half of them, so that the network also sees clean ones, which a decoder's are.
      train: False gives the full picture and clean conditioning, as at sampling time.

    Returns (when called with a Sample and a generator):
      "image" uint8 [c, c, 3], "low" uint8 [c/factor, c/factor, 3].

    Raises:
      BadPicture: what `decode` finds.
    """

    def __init__(
        self,
        size: int,
        factor: int = 4,
        *,
        crop: int | None = None,
        degradation: str = "none",
        probability: float = 1.0,
        train: bool = True,
        max_bytes: int = 64 << 20,
        max_pixels: int = 1 << 26,
        min_side: int = 1,
        margin: float = 2.0,
    ):
        degradations.check(degradation)
        crop = size if crop is None or not train else crop
        if factor < 1 or not 0 < crop <= size or crop % factor:
            raise ConfigError(
                f"crop {crop} of {size} by factor {factor}: expected a multiple of "
                "the factor that is at most the size"
            )
        self.size, self.factor, self.crop, self.train = size, factor, crop, train
        if not 0 <= probability <= 1:
            raise ConfigError(f"degradation probability {probability}: expected 0 to 1")
        self.degradation = degradation if train else "none"
        self.probability = probability
        self.limits = _limits(max_bytes, max_pixels, min_side, margin)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        decoded = pictures.decode(sample.image, target=self.size, **self.limits)
        image, _ = pictures.resize_and_crop(decoded, self.size)
        left, upper = (int(n) for n in rng.integers(self.size - self.crop + 1, size=2))
        image = image[upper : upper + self.crop, left : left + self.crop]
        kind = self.degradation if rng.random() < self.probability else "none"
        low = degradations.degrade(kind, image, self.factor, rng)
        return {"image": np.ascontiguousarray(image), "low": low}
