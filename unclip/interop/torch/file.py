"""Reads the tensors of PyTorch's files without PyTorch, and without running what is in them.

Most public weights (OpenAI's CLIP, Karlo's own checkpoints, FID's Inception) are torch files: a
pickle that describes tensors, beside raw storages. Unpickling runs any code a file names. Here a
small machine follows the pickle's instructions and builds plain values only: dicts, lists, tuples,
numbers, text and descriptions of tensors. Whatever else a pickle names (a Lightning checkpoint's
callbacks, hyper-parameters, optimisers) becomes an inert record; nothing is imported, looked up or
called. Sizes are limited and every tensor is checked against its storage and the file. Values are
read one tensor at a time, by seek and read.

Three layouts: the zip archive of torch 1.6 and later, the older stream of pickles, and TorchScript
archives, of which only `data.pkl` is read, never `code/`.
"""

import dataclasses
import io
import math
import os
import pathlib
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from unclip import errors, files
from unclip.files.tensors import Lazy
from unclip.interop.torch.pickle import (
    MAX_STEPS,
    Machine,
    Object,
    Tensor,
    storage_key,
)

MAX_PICKLE_BYTES = 64 << 20
MAX_DEPTH = 64
MAGIC = 0x1950A86A20F9469CFC6C  # of the stream layout
PROTOCOL = 1001


class _Bounded:
    """A file for `pickletools`, from which pickles of limited size are read."""

    def __init__(self, file):
        self.file, self.left = file, MAX_PICKLE_BYTES

    def _take(self, data: bytes) -> bytes:
        self.left -= len(data)
        return data

    def _limit(self, count: int) -> int:
        if count > self.left:
            raise ValueError(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes")
        return count

    def read(self, count: int) -> bytes:
        return self._take(self.file.read(self._limit(count)))

    def readline(self) -> bytes:
        return self._take(self.file.readline(min(self.left, 1 << 20)))


@dataclasses.dataclass
class _Content:
    """A file as parsed.

    Attributes:
      tree: the value of its pickle.
      place: storage key -> (position in the file, bytes).
      swapped: storages are in the other byte order than this machine's.
    """

    path: pathlib.Path
    size: int
    tree: Any
    place: Callable[[str], tuple[int, int]]
    swapped: bool = False


def open_torch(path: str | os.PathLike) -> dict[str, Lazy]:
    """The tensors of a torch file by name, unread.

    Args:
      path: what `torch.save` wrote (either layout) or a TorchScript archive.

    Returns:
      Names as in the file, nested ones joined by "." (list items by number); those of a
      {"state_dict": …} stand without that prefix and without the file's other content. A bare
      tensor is named "". bfloat16 and float8 are those of `ml_dtypes`. Parameters of TorchScript
      modules have the names of their state dict; so have its 0-d attributes.

    Raises:
      DataError: not a torch file, a damaged one, or one without tensors; when a tensor is read, a
        file that has changed since.
    """
    content, tree = _load(pathlib.Path(path)), None
    wrapped = content.tree.get("state_dict") if isinstance(content.tree, dict) else None
    with _damage(content.path):
        for tree in (wrapped, content.tree):
            found = _named(content, tree)
            if found:
                return found
    hint = ""
    if isinstance(tree, Object):
        hint = f": it is a whole {tree.kind} object; save its state_dict() instead"
    raise errors.DataError(f"{path} holds no tensors{hint}")


def scalars(path: str | os.PathLike) -> dict[str, bool | int | float | str]:
    """The plain values of a torch file by name, nested ones joined by ".".

    A TorchScript archive of CLIP has its `input_resolution` and `context_length` among them, a
    Lightning checkpoint its `epoch`. Arguments and errors as in `open_torch`, but a file without
    values is not an error.
    """
    content = _load(pathlib.Path(path))
    with _damage(content.path):
        plain = (bool, int, float, str)
        return {name: leaf for name, leaf in _leaves(content.tree) if type(leaf) in plain}


class _damage:
    """Turns whatever a damaged or hostile file raises into one line that names the file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError):
            raise errors.DataError(f"cannot read {self.path}: {error.strerror or error}") from error
        if isinstance(error, IndexError | KeyError):
            message = f"{self.path} is damaged: its pickle takes what is not there"
            raise errors.DataError(message) from error
        known = (ValueError, TypeError, EOFError, OverflowError, NotImplementedError)
        if isinstance(error, (*known, struct.error, zlib.error, zipfile.BadZipFile)):
            line = str(error).partition("\n")[0][:200]
            raise errors.DataError(f"{self.path} is damaged: {line}") from error


def _load(path: pathlib.Path) -> _Content:
    with _damage(path), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(512)
        file.seek(0)
        if head.startswith(b"PK\x03\x04"):
            return _load_zip(path, file, size)
        if head.startswith(b"\x80"):
            return _load_stream(path, file, size)
        what = files.mistaken(head)
        if head[8:10] == b'{"':
            what = "a safetensors file: end its name in .safetensors"
        if head[257:262] == b"ustar":
            what = "a tar archive (torch before 0.2 wrote such): save it again with a newer torch"
        raise errors.DataError(f"{path} is not a torch file: it is {what or 'of an unknown kind'}")


def _load_zip(path: pathlib.Path, file, size: int) -> _Content:
    archive = zipfile.ZipFile(file)
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise errors.DataError(
            f"{path} is not a torch file: it is a zip archive without a data.pkl"
        )
    prefix = pickles[0].removesuffix("data.pkl")

    def content(name: str, limit: int) -> bytes:
        if entries[name].flag_bits & 1:
            raise ValueError(f"{name} is encrypted")
        with archive.open(entries[name]) as record:
            data = record.read(limit + 1)
        if len(data) > limit:
            raise ValueError(f"{name} is larger than {limit} bytes")
        return data

    machine = Machine()
    tree = machine.run(io.BytesIO(content(pickles[0], MAX_PICKLE_BYTES)))
    order = b"little"
    if f"{prefix}byteorder" in entries:
        order = content(f"{prefix}byteorder", 16)
        if order not in (b"little", b"big"):
            raise ValueError("its byte order is neither little nor big")

    def place(key: str) -> tuple[int, int]:
        entry = entries.get(f"{prefix}data/{key}")
        if entry is None:
            raise ValueError(f"its storage {key} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(f"its storage {key} is compressed, which torch does not do")
        with open(path, "rb") as again:
            again.seek(entry.header_offset)
            header = again.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise ValueError(f"its storage {key} is not where it should be")
        # The entry's own header may be longer than the directory says: torch aligns storages.
        return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:])), entry.file_size

    return _Content(path, size, tree, place, order.decode() != sys.byteorder)


def _load_stream(path: pathlib.Path, file, size: int) -> _Content:
    machine, stream = Machine(), _Bounded(file)
    if machine.run(stream) != MAGIC:
        raise errors.DataError(f"{path} is not a torch file: a plain pickle, which is never read")
    if machine.run(stream) != PROTOCOL:
        raise ValueError("its protocol is unknown")
    machine.run(stream)  # facts about the machine that wrote it; storages are always little-endian
    tree, keys = machine.run(stream), machine.run(stream)
    if not isinstance(keys, list):
        raise ValueError("its list of storages is missing")
    places = {}
    for key in map(storage_key, keys):
        storage = machine.storages.get(key)
        counted = file.read(8)
        if storage is None:
            raise ValueError(f"its storage {key} is described nowhere")
        if len(counted) < 8:
            raise ValueError(f"its storage {key} is cut off")
        if int.from_bytes(counted, "little") * storage.dtype.itemsize != storage.nbytes:
            raise ValueError(f"its storage {key} is not as long as its pickle says")
        places[key] = (file.tell(), storage.nbytes)
        file.seek(storage.nbytes, os.SEEK_CUR)
    return _Content(path, size, tree, places.__getitem__, sys.byteorder != "little")


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """(name, leaf) of what is nested in dicts, lists, tuples and TorchScript modules."""
    spent = 0

    def walk(value, name, inside):
        nonlocal spent
        if isinstance(value, Object) and value.kind.startswith("__torch__."):
            value = value.state
        if not isinstance(value, dict | list | tuple):
            yield name, value
            return
        if id(value) in inside:
            return
        if len(inside) == MAX_DEPTH:
            raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            child = None
            if isinstance(key, str) or (type(key) is int and abs(key) < 1 << 63):
                child = f"{name}.{key}" if name else str(key)
            # A few instructions can nest lists so often that no walk would end, or repeat a long
            # name so often that the memory is full.
            spent += 1 + len(child or "") // 64
            if spent > MAX_STEPS:
                raise ValueError(f"it holds more than {MAX_STEPS} values")
            if child is not None:
                yield from walk(item, child, (*inside, id(value)))

    return walk(tree, "", ())


def _named(content: _Content, tree: Any) -> dict[str, Lazy]:
    """The tensors in a tree, each checked against the file."""
    found, places = {}, {}
    for name, leaf in _leaves(tree):
        if isinstance(leaf, Object) and leaf.kind.startswith("torch.") and "_rebuild" in leaf.kind:
            raise ValueError(f"tensor {name!r} is of a kind that is not read ({leaf.kind})")
        if not isinstance(leaf, Tensor):
            continue
        key = leaf.storage.key
        if key not in places:
            places[key] = content.place(key)
        start, nbytes = places[key]
        if start + nbytes > content.size or leaf.storage.begin + leaf.storage.nbytes > nbytes:
            raise ValueError(f"storage {key} of tensor {name!r} is cut off")
        # A stride of zero repeats values that are stored once.
        if math.prod(leaf.shape) * leaf.dtype.itemsize > max(content.size, 1 << 26):
            raise ValueError(f"tensor {name!r} of shape {list(leaf.shape)} is larger than the file")
        if name in found:
            raise ValueError(f"two tensors are named {name!r}")
        found[name] = Lazy(leaf.shape, leaf.dtype, _reader(content, leaf, start))
    return found


def _reader(content: _Content, tensor: Tensor, start: int) -> Callable[[], np.ndarray]:
    dtype = tensor.dtype
    begin = start + tensor.storage.begin + tensor.offset * dtype.itemsize

    def read() -> np.ndarray:
        with _damage(content.path):
            raw = np.empty(tensor.span() * dtype.itemsize, np.uint8)
            if raw.size == 0:
                return np.empty(tensor.shape, dtype)
            with open(content.path, "rb") as file:
                file.seek(begin)
                if file.readinto(raw) != raw.size:
                    raise ValueError("it became shorter while it was read")
            if content.swapped:
                unit = dtype.itemsize // (2 if dtype.kind == "c" else 1)
                raw = raw.view(f"u{unit}").byteswap()
            # Along an axis of length 1 the stride may be any number.
            steps = [s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.strides)]
            strides = [step * dtype.itemsize for step in steps]
            array = np.ndarray(tensor.shape, dtype, raw, 0, strides)
            return array if array.flags.c_contiguous else array.copy(order="C")

    return read
