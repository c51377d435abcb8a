"""Picture and caption of every sample of some shards, batches that never cross a shard.

Embedding is divided among processes and resumed by whole shards. For a row to have the same bits
in any case, it must have the same neighbours in its batch: every shard starts a new batch, and its
last batch is padded.
"""

from collections.abc import Sequence

import numpy as np

from unclip.input import captions as caption_sources
from unclip.input.decode import image
from unclip.input.samples import BadSample, Sample

REASON_BYTES = 32


class ShardBatches:
    """Some shards of a collection in whole batches, as a collection of its own.

    Reading never raises for a bad sample: it returns the `BadSample`, which `Pair` reports.

    Args:
      collection: with its samples in the order of the shards.
      shards: numbers of the shards to read, none of them empty.
      batch_size: every shard is padded to a multiple of it.

    Attributes:
      counts: int64 [shards], rows of each, with padding.
      samples: int64 [shards], rows of each, without padding.
    """

    def __init__(self, collection, shards: Sequence[int], batch_size: int):
        self.collection, self.shards = collection, list(shards)
        counts = np.asarray(collection.counts, np.int64)
        self.samples = counts[self.shards]
        self.counts = -(-self.samples // batch_size) * batch_size
        self.groups = np.array([0, self.counts.sum()], np.int64)
        self.shard_names = [collection.shard_names[number] for number in self.shards]
        self.fingerprint = collection.fingerprint
        self._first = (np.cumsum(counts) - counts)[self.shards]  # numbers in the collection
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def place(self, j: int) -> tuple[int, int]:
        """(which of `shards`, sample in it) of row j; of padding a sample beyond `samples`."""
        which = int(np.searchsorted(self._ends, j, "right"))
        return which, j - int(self._ends[which] - self.counts[which])

    def number(self, j: int) -> int:
        """The number in the collection of row j; of padding that of the shard's last sample."""
        which, sample = self.place(j)
        return int(self._first[which]) + min(sample, int(self.samples[which]) - 1)

    def locate(self, j: int) -> tuple[int, int]:
        """(which of `shards`, row of its index) of row j."""
        return self.place(j)[0], self.collection.locate(self.number(j))[1]

    def key(self, j: int) -> str:
        """The key of row j."""
        return self.collection.key(self.number(j))

    def read(self, j: int) -> Sample | BadSample:
        """Sample j, or why it cannot be read; padding is never read."""
        which, sample = self.place(j)
        if sample >= self.samples[which]:
            return BadSample("filling")
        try:
            return self.collection.read(int(self._first[which]) + sample)
        except BadSample as error:
            return error


class Pair:
    """Transform of what `ShardBatches` reads: the centre square and the first caption it has.

    Args:
      size: the picture's side S; context_length: L.
      captions: where captions come from, see `unclip.input.captions`: the first that a sample has.

    Returns (when called with a Sample or BadSample and a generator, which is not used):
      {"image" uint8 [S, S, 3], "tokens" int32 [L], "captioned" bool, "reason" uint8
      [REASON_BYTES]}; the reason is ASCII, all zeros for a good picture. The arrays of a bad
      picture or of a missing caption are zeros.

    Raises:
      ConfigError: another caption source.
    """

    def __init__(self, size: int, context_length: int, captions: Sequence[str] = ("txt",)):
        from unclip.input.decode.text import Tokenizer

        self.size, self.context_length = size, context_length
        self.captions = caption_sources.checked(captions)
        self.tokenise = Tokenizer().encode

    def __call__(
        self, sample: Sample | BadSample, _rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        arrays = {
            "image": np.zeros((self.size, self.size, 3), np.uint8),
            "tokens": np.zeros(self.context_length, np.int32),
            "captioned": np.bool_(False),
            "reason": np.zeros(REASON_BYTES, np.uint8),
        }
        try:
            if isinstance(sample, BadSample):
                raise sample
            decoded = image.decode(sample.image, target=self.size)
            arrays["image"] = image.resize_and_crop(decoded, self.size, crop="center")[0]
        except BadSample as error:
            reason = error.reason.encode("ascii", "replace")[:REASON_BYTES]
            arrays["reason"][: len(reason)] = np.frombuffer(reason, np.uint8)
            return arrays
        text = caption_sources.first(sample, self.captions)
        if text:
            arrays["tokens"] = np.asarray(
                self.tokenise([text], self.context_length)[0][0], np.int32
            )
            arrays["captioned"] = np.bool_(True)
        return arrays


def reason(code: np.ndarray) -> str:
    """The text of one "reason" row of `Pair`; "" for a good sample."""
    return code.tobytes().rstrip(b"\0").decode("ascii")
