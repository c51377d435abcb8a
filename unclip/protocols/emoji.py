"""Captions and pictures of the emoji that training never saw (data/emoji, held-out shards).

188 pictures are far too few for a FID that can be compared with published ones, so numbers have
their N and this protocol's id in their names.
"""

from unclip import errors
from unclip.input.samples import BadSample
from unclip.measure.picture_set import PictureSet, Prepared
from unclip.measure.pictures import ShardPictures
from unclip.protocols import base

CAPTIONS = ("txt", "name")
SHIPPED = str(base.EMOJI / "held-out-*.tar")


class EmojiHeldOut(base.EvaluationProtocol):
    """Every held-out emoji once.

    Args:
      size: side at which pictures are compared; references are resized bicubically.
      caption: "txt" (name and keywords, as in training) or "name" (only the JSON's name).
      shards: the held-out shards; None: those of data/emoji.
      count: how many, the first ones; None: all.

    Raises:
      DataError: shards that are missing or damaged, or a picture without that caption.
    """

    def __init__(
        self,
        size: int = 64,
        caption: str = "txt",
        shards: str | None = None,
        count: int | None = None,
    ):
        if caption not in CAPTIONS:
            raise errors.unknown("caption of emoji-held-out", caption, CAPTIONS)
        if not 8 <= size <= 1024:
            raise errors.ConfigError(f"emoji-held-out: size {size}, expected 8 to 1024")
        pictures = ShardPictures(SHIPPED if shards is None else shards)
        if count is not None and not 1 <= count <= len(pictures):
            raise errors.ConfigError(
                f"emoji-held-out: count {count}, expected 1 to {len(pictures)}"
            )
        rows = range(count or len(pictures))
        keys = [pictures.name(row) for row in rows]
        prompts = [_caption(pictures, row, caption) for row in rows]
        part = "" if count in (None, len(pictures)) else f".first{count}"
        self._reference = Prepared(base.Chosen(pictures, rows, keys, prompts), size)
        name = "emoji-held-out"
        if shards is not None:
            shipped = ShardPictures(SHIPPED)
            sets = (pictures, shipped) if len(pictures) == len(shipped) else (pictures,)
            given, *known = (_content(one, rows, caption) for one in sets)
            marked = base.mark(given, *known or [""])
            name = f"held-out{marked}" if marked else name  # these may be no emoji at all
        super().__init__(
            f"{name}.{caption}{part}.size{size}",
            prompts,
            keys,
            size,
            {
                "shards_sha256": pictures.collection.fingerprint,
                "caption": caption,
                "source": pictures.source,
            },
        )

    def reference(self) -> PictureSet:
        """The held-out pictures at `size`."""
        return self._reference


def _content(pictures: ShardPictures, rows: range, caption: str) -> str:
    """The hash of what the rows are drawn from and compared with."""
    prompts = [_caption(pictures, row, caption) for row in rows]
    return base.content(prompts, base.Chosen(pictures, rows, prompts, prompts))


def _caption(pictures: ShardPictures, row: int, caption: str) -> str:
    try:
        if caption == "txt":
            text = pictures.caption(row)
        else:
            text = pictures.collection.meta(row).get("name")
    except BadSample as error:
        raise errors.DataError(f"{pictures.source}: {error}") from error
    if not isinstance(text, str) or not text.strip():
        raise errors.DataError(
            f"{pictures.source}: {pictures.name(row)} has no {caption} to be its caption"
        )
    return text.strip()
