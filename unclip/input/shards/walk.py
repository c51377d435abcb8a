"""Walking a shard once: its members become complete samples, or are left out and counted.

Tars follow webdataset's rule for keys: the name up to the first dot of its last component is the
key (folders belong to it), the rest is the extension. Keys are closed at the end of their shard, so
one shard's picture can never meet another shard's caption, and a sample that is incomplete,
ambiguous or cut off is left out and counted. Nothing is ever extracted, unpickled or followed.
"""

import mimetypes
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from unclip.errors import DataError
from unclip.input import captions as caption_sources
from unclip.input.samples import (
    MAX_PICTURE_BYTES,
    MAX_TEXT_BYTES,
    PICTURES,
    BadSample,
    hidden,
    json_object,
    printable,
)
from unclip.input.shards import tar
from unclip.input.shards.index import ShardIndex, checksum

MAX_LISTED = 10_000  # faults of a shard that are listed; all are counted
MAX_MEMBERS = 1 << 22  # of one shard: a tar of empty members must not fill the memory
NOT_TARS = ("not-a-tar", "compressed")  # faults by which a whole file is not a shard
_PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")  # what other readers would unpickle
# Of members that nobody reads, those that say a sample was meant: README.md does not.
_MEANT = {*PICTURES, "avif", "heic", "heif", "jfif", "jpe", "jxl", "npy", "npz"}
_PIECE, _FULL_BLOCK = 1 << 20, 2 << 20  # bytes
_EXAMPLES = 5
_MAX_SHARD = tar.BLOCK << 32
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def walk_shard(
    name: str,
    read: tar.Read,
    size: int,
    identity: str = "",
    *,
    captions: Sequence[str] = caption_sources.STANDARD,
    checksums: bool = False,
    block: int = 8192,
) -> ShardIndex:
    """Indexes one shard.

    Args:
      name: the shard's file name.
      read: (offset, bytes) -> exactly those bytes of the shard; called with ascending offsets.
      size, identity: what `Storage.stat` says.
      captions: where captions come from, see `unclip.input.captions`.
      checksums: read every byte and keep a checksum of each sample; False: read only headers and
        JSON.
      block: the least number of bytes read at once: few from a local file, many from a remote one.

    Returns:
      Its `ShardIndex`. In `problems`: "no-picture", "unknown-extension", "dotted-key" (its name has
      a dot before the extension, so that its key ends there), "duplicate", "truncated",
      "too-many-bytes", "other-key" (see `_Walk.other_keys`) count samples; "refused-link",
      "refused-name", "refused-type", "refused-pickle" members; "shard-truncated",
      "shard-corrupt", "too-many-members", "not-a-tar", "compressed" shards. In `notes`:
      "not-adjacent" samples, whose members lie apart (other readers would split them), "renumbered"
      ones, whose JSON has another key, "ignored .EXTENSION" and "hidden" members, and
      "bytes-after-end" where more follows the end of the tar.

    Raises:
      DataError: it cannot be read.
    """
    if size > _MAX_SHARD:
        raise DataError(f"shard {name!r} has {size} bytes: expected at most {_MAX_SHARD}")
    window = _Window(read, size, max(block, _FULL_BLOCK) if checksums else block)
    shard = _Walk(name, window, captions, checksums)
    for count, member in enumerate(tar.walk(shard.read, size)):
        if count == MAX_MEMBERS:
            shard.tell("too-many-members", f"more than {MAX_MEMBERS}")
            break
        shard.add(member, size)
    return shard.index(size, identity)


class _Window:
    """Reads forwards through blocks of a shard."""

    def __init__(self, read: tar.Read, end: int, block: int):
        self._read, self._end, self._block = read, end, block
        self._start, self._data = 0, memoryview(b"")

    def __call__(self, offset: int, size: int) -> bytes:
        return bytes(self._view(offset, size))

    def _view(self, offset: int, size: int) -> memoryview:
        at = offset - self._start
        if at < 0 or at + size > len(self._data):
            if size > self._block:
                return memoryview(self._read(offset, size))
            self._data = memoryview(self._read(offset, min(self._block, self._end - offset)))
            self._start, at = offset, 0
        return self._data[at : at + size]

    def crc(self, offset: int, size: int) -> int:
        """crc32 of a range, read in pieces."""
        crc, end = 0, offset + size
        for at in range(offset, end, _PIECE):
            crc = zlib.crc32(self._view(at, min(_PIECE, end - at)), crc)
        return crc


class _Walk:
    """What is known of a shard's samples so far."""

    def __init__(self, name: str, read: _Window, captions: Sequence[str], checksums: bool):
        self.name, self.read, self._checksums = name, read, checksums
        # key -> extension -> (offset, bytes, crc32)
        self._samples: dict[str, dict[str, tuple[int, int, int]]] = {}
        self._unusable: dict[str, str] = {}
        # source -> keys that have a caption there; those of KEY.txt are found at the end.
        self._captioned: dict[str, set[str]] = {source: set() for source in captions}
        # Keys, without their folders, that their JSON names too; key -> another that it names.
        self._own: set[str] = set()
        self._others: dict[str, str] = {}
        # Members that are not read: name without its last extension -> (key, name).
        self._ignored: dict[str, tuple[str, str]] = {}
        self._split: set[str] = set()
        self._last = ""
        self._problems, self._notes = Counter(), Counter()
        self._listed: list[tuple[str, str]] = []
        self._examples: dict[str, list[str]] = {}

    def tell(self, reason: str, what: str) -> None:
        """Counts a fault."""
        self._problems[reason] += 1
        self._example(reason, what)
        if len(self._listed) < MAX_LISTED:
            self._listed.append((reason, printable(what)))

    def _example(self, reason: str, what: str) -> None:
        found = self._examples.setdefault(reason, [])
        if len(found) < _EXAMPLES:
            found.append(printable(what))

    def add(self, member: tar.Member, end: int) -> None:
        """Takes one member of the tar's walk."""
        kind, name, offset, size = member
        if kind == "end":
            self._notes["bytes-after-end"] += self._anything_after(offset, end)
            return
        if (kind, name) == ("shard-corrupt", "byte 0"):
            zipped = self.read(0, 8).startswith(_COMPRESSED)
            self.tell(NOT_TARS[zipped], self.name)
            return
        if kind not in ("file", "cut"):
            self.tell(kind, name)
            return
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if hidden(name):
            self._notes["hidden"] += 1
            return
        if not (stem and dot):
            return
        key, extension = folder + slash + stem, extension.lower()
        if key != self._last and key in self._samples:
            self._split.add(key)
        self._last = key
        is_picture = extension in PICTURES
        if not is_picture and extension not in ("txt", "json"):
            if extension.rpartition(".")[2] in _PICKLES:
                self.tell("refused-pickle", name)
            else:
                self._ignore(extension)
                stem = name.rpartition(".")[0]
                known = self._ignored.get(stem)
                if known is None or (_meant(name) and not _meant(known[1])):
                    self._ignored[stem] = key, name
            return
        self._member(
            key, extension, kind, offset, size, MAX_PICTURE_BYTES if is_picture else MAX_TEXT_BYTES
        )

    def _anything_after(self, offset: int, end: int) -> bool:
        # Two zero blocks end a tar, and writers pad it to a record of 20 blocks. No reader reads
        # what was appended behind that.
        after = offset + 2 * tar.BLOCK
        return after < end and any(self.read(after, min(end - after, 20 * tar.BLOCK)))

    def _ignore(self, extension: str) -> None:
        note = f"ignored .{printable(extension)[:20]}"
        self._notes[note if note in self._notes or len(self._notes) < 20 else "ignored"] += 1

    def _member(self, key: str, extension: str, kind: str, offset: int, size: int, limit: int):
        spans = self._samples.setdefault(key, {})
        crc = 0
        if extension in spans:
            # Which picture belongs to which caption cannot be known: the key is dropped.
            self._unusable[key] = "duplicate"
        elif kind == "cut":
            self._unusable.setdefault(key, "truncated")
        elif size > limit:
            self._unusable.setdefault(key, "too-many-bytes")
        elif size:
            if extension == "json":
                data = self.read(offset, size)
                crc = zlib.crc32(data)
                self._look_into(key, data)
            elif self._checksums:
                crc = self.read.crc(offset, size)
        spans[extension] = (offset, size, crc)

    def _look_into(self, key: str, data: bytes) -> None:
        try:
            value = json_object(data, key)
        except BadSample:  # reported, and replaced, when the sample is read
            return
        for source, keys in self._captioned.items():
            if caption_sources.texts(value.get(caption_sources.field(source))):
                keys.add(key)
        claim = value.get("key")
        if isinstance(claim, str):
            claim, own = claim.rpartition("/")[2], key.rpartition("/")[2]
            if claim == own:
                self._own.add(own)
            else:
                self._others[key] = claim

    def other_keys(self) -> set[str]:
        """The keys whose JSON is another sample's: it names a key whose own JSON does so too.

        Collections that were filtered, merged, repeated or cropped and then numbered anew keep the
        keys they had in their JSON, and nothing is wrong with them. So it takes a shard whose JSON
        names the sample's own key but for a few, a tenth at most.
        """
        few = len(self._others) <= max(1, (len(self._own) + len(self._others)) // 10)
        strays = {key for key, claim in self._others.items() if few and claim in self._own}
        self._notes["renumbered"] += len(self._others) - len(strays)
        return strays

    def _without_picture(self, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(reason, what) of samples without a picture: of these keys, and of those of which no
        member is read."""
        names: dict[str, list[str]] = {key: [] for key in keys}
        for key, name in self._ignored.values():
            if key in names:
                names[key].append(name)
            elif key not in self._samples and _meant(name):
                names[key] = [name]
        for key, named in names.items():
            for name in [name for name in named if _meant(name)] or named[:1]:
                dotted = name.rpartition(".")[2].lower() in (*PICTURES, "txt", "json")
                yield "dotted-key" if dotted else "unknown-extension", name
            if not named:
                yield "no-picture", key

    def index(self, size: int, identity: str) -> ShardIndex:
        """The index of what was walked."""
        for key in self.other_keys():
            self._unusable.setdefault(key, "other-key")
        with_text, without, bare = [], [], []
        for key, members in self._samples.items():
            spans = {extension: span for extension, span in members.items() if span[1]}
            picture = next((spans[e] for e in PICTURES if e in spans), None)
            if reason := self._unusable.get(key):
                self.tell(reason, key)
                continue
            if picture is None:
                bare.append(key)
                continue
            row = (key, picture, spans.get("txt"), spans.get("json"))
            if row[2] and "txt" in self._captioned:
                self._captioned["txt"].add(key)
                with_text.append(row)
            elif any(key in keys for keys in self._captioned.values()):
                with_text.append(row)
            else:
                without.append(row)
                self._example("no-text", key)
        for reason, what in self._without_picture(bare):
            self.tell(reason, what)
        self._notes["not-adjacent"] += len(self._split)
        rows = with_text + without
        encoded = [row[0].encode("utf-8", "surrogateescape") for row in rows]
        return ShardIndex(
            self.name,
            size,
            self._table(rows, encoded),
            np.frombuffer(b"".join(encoded), np.uint8),
            len(with_text),
            identity=identity,
            captions={
                source: sum(row[0] in keys for row in with_text)
                for source, keys in self._captioned.items()
            },
            checksums=self._checksums,
            problems=self._problems,
            examples=self._examples,
            notes=+self._notes,
            listed=self._listed,
        )

    def _table(self, rows: list[tuple], keys: list[bytes]) -> np.ndarray:
        table = np.zeros((len(rows), 8), np.uint32)
        absent = (0, 0, 0)
        for column in range(3):
            spans = np.array([row[1 + column] or absent for row in rows], np.int64).reshape(-1, 3)
            table[:, 2 * column] = spans[:, 0] // tar.BLOCK
            table[:, 2 * column + 1] = spans[:, 1]
        table[:, 6] = np.cumsum([len(key) for key in keys], dtype=np.int64)
        if self._checksums:
            table[:, 7] = [checksum([part and part[2] for part in row[1:]]) for row in rows]
        return table


def _meant(name: str) -> bool:
    """Whether a member's name has an extension of pictures, films or sounds: 1.gif, 1.jpg.part."""
    extensions = name.rpartition("/")[2].lower().split(".")[1:]
    kind = mimetypes.guess_type(f"x.{extensions[-1]}")[0] or ""
    return kind.startswith(("image/", "video/", "audio/")) or not _MEANT.isdisjoint(extensions)
