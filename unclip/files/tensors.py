"""Named tensors on disk, one at a time: safetensors files that may be larger than the memory.

`write` holds one tensor in memory and `read` none until it is used, so converting or copying a
model needs the memory of its largest tensor only. What is written is byte for byte what
`safetensors` would write.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from unclip import errors, files

# In safetensors' own order: wider types come first in a file, so that every tensor is aligned.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


class Lazy:
    """A tensor that is read from its file each time it is used, and not kept.

    Attributes:
      shape: tuple of ints; dtype: numpy dtype. Both are known without reading.
    """

    def __init__(self, shape: Iterable[int], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._read = tuple(shape), np.dtype(dtype), read

    def read(self) -> np.ndarray:
        """The values, of the shape and dtype announced."""
        array = self._read()
        if array.shape != self.shape or array.dtype != self.dtype:
            raise errors.DataError(
                f"a tensor announced as {self.dtype}{list(self.shape)} was read as "
                f"{array.dtype}{list(array.shape)}"
            )
        return array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.read(), dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, row: int) -> "Lazy":
        """A row of the first axis, lazily: one layer of a stack."""
        if not 0 <= row < self.shape[0]:
            raise IndexError(row)
        return self.map(lambda array: array[row], self.shape[1:])

    def map(self, function: Callable[[np.ndarray], np.ndarray], shape=None, dtype=None) -> "Lazy":
        """The result of `function` on this tensor, lazily; shape and dtype default to its own."""
        return Lazy(
            self.shape if shape is None else shape,
            self.dtype if dtype is None else dtype,
            lambda: function(self.read()),
        )


def read(path: str | os.PathLike) -> tuple[dict[str, Lazy], dict[str, str]]:
    """The tensors of a safetensors file by name, unread, and the file's metadata.

    Raises:
      DataError: the file cannot be read or is not a safetensors file; also when a tensor is read.
    """
    path = pathlib.Path(path)

    def opened(use):
        # Opened anew for each tensor: a mapping that stays open keeps every page it has read in the
        # process's resident memory.
        try:
            with safetensors.safe_open(path, framework="np") as file:
                return use(file)
        except OSError as error:
            raise errors.DataError(f"cannot read {path}: {error.strerror or error}") from error
        except (safetensors.SafetensorError, ValueError) as error:
            raise errors.DataError(f"{path} {_what_is_wrong(path, error)}") from error

    def index(file):
        found = {}
        for name in file.keys():  # noqa: SIM118 not a dict
            piece = file.get_slice(name)
            kind = piece.get_dtype()
            if kind not in DTYPES:
                raise errors.DataError(f"{path}: tensor {name!r} has type {kind}: not supported")
            tensor = lambda name=name: opened(lambda file: file.get_tensor(name))
            found[name] = Lazy(piece.get_shape(), DTYPES[kind], tensor)
        return found, dict(file.metadata() or {})

    return opened(index)


def _what_is_wrong(path: pathlib.Path, error: Exception) -> str:
    """Why a file could not be read as safetensors, as far as its beginning tells."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
            what = files.mistaken(head)
            if head.startswith((b"PK\x03\x04", b"\x80")):
                what = "a torch file: end its name in .bin or .pt"
            elif head.startswith(b"{"):
                what = "a JSON text"
            if what is not None:
                return f"is no safetensors file: it is {what}"
            length = int.from_bytes(head[:8], "little")
            if size < 8 or head[8:9] not in (b"{", b"") or length > MAX_HEADER_BYTES:
                return f"is damaged: {error}"
            wanted = 8 + length
            if wanted <= size:
                file.seek(8)
                header = json.loads(file.read(length))
                ends = [t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"]
                wanted += max(ends, default=0)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return f"is damaged: {error}"
    if size < wanted:
        return f"is damaged: cut short, {size} of {wanted} bytes: fetch it again"
    return f"is damaged: {error}"


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, atomically, holding one tensor in memory at a time.

    Args:
      path: of the file; its folder is made when missing.
      tensors: arrays (numpy, jax) or `Lazy`, by name.
      metadata: strings for the header.

    Raises:
      ConfigError: a dtype that safetensors does not have.
      DataError: the disk is full or the file cannot be written.
    """
    kinds = {}
    for name, tensor in tensors.items():
        if np.dtype(tensor.dtype) not in _NAMES:
            raise errors.ConfigError(f"tensor {name!r} has dtype {tensor.dtype}: not storable")
        kinds[name] = _NAMES[np.dtype(tensor.dtype)]
    order = sorted(tensors, key=lambda name: (-_RANK[kinds[name]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + int(np.prod(tensor.shape)) * DTYPES[kinds[name]].itemsize
        header[name] = {
            "dtype": kinds[name], "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            # Also fetches jax arrays; dense C order, and 0-d arrays stay 0-d.
            array = np.asarray(tensors[name], order="C")
            file.write(memoryview(array.reshape(-1).view(np.uint8)))
            del array
