"""The instructions of a pickle followed without unpickling: plain values and tensor descriptions.

The pickle of a torch file describes its tensors. Unpickling runs whatever code a file names. This
machine knows the instructions, the two containers and the few calls by which torch describes
tensors; everything else that a pickle names becomes an inert record. Nothing is imported, looked up
or called.
"""

import dataclasses
import pickletools
from typing import Any

import ml_dtypes
import numpy as np

MAX_STEPS = 5_000_000  # a large Lightning checkpoint has about 300 thousand
MAX_AXES = 32

DTYPES = {
    name: np.dtype(getattr(np, name, None) or getattr(ml_dtypes, name))
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
} | {"bool": np.dtype(np.bool_)}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "UntypedStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    # Types of quantised tensors, which are not read, but whose sizes give the places of the
    # storages behind them.
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
}
# Instructions that push the value they carry.
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
}
KEYS = (str, int, float, bool, bytes, type(None))


@dataclasses.dataclass(eq=False, slots=True)
class Global:
    """A name that a pickle refers to ("torch.FloatStorage"); never looked up."""

    path: str


@dataclasses.dataclass(eq=False, slots=True)
class Object:
    """An instance of an unknown class, and the state a pickle gives it."""

    kind: str
    state: Any = None


@dataclasses.dataclass(eq=False, slots=True)
class Storage:
    """A run of raw bytes in the file: `nbytes` from `begin` of the storage `key`."""

    key: str
    dtype: np.dtype
    nbytes: int
    begin: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def span(self) -> int:
        """Elements from the first to the last that the view touches."""
        if 0 in self.shape:
            return 0
        return 1 + sum((length - 1) * step for length, step in zip(self.shape, self.strides))


class Machine:
    """Follows pickles; `storages` are those found so far, by key."""

    def __init__(self):
        self.storages: dict[str, Storage] = {}
        self.steps = 0

    def run(self, stream) -> Any:
        """The value of one pickle; `stream` is then at its end."""
        self.stack, self.outer, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(stream):
            self._spend(1)
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("its pickle does not end")

    def _spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise ValueError(f"its pickle has more than {MAX_STEPS} instructions")

    def _to_mark(self) -> list:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _step(self, name: str, argument: Any) -> None:
        stack, push = self.stack, self.stack.append
        match name:
            case _ if name in VALUES:
                push(argument)
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "MARK":
                self.outer.append(stack)
                self.stack = []
            case "POP":
                if stack:
                    stack.pop()
                else:
                    self._to_mark()
            case "POP_MARK":
                self._to_mark()
            case "DUP":
                push(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_SET":
                push(Object("set"))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                items = tuple(stack[-count:])
                if len(items) < count:
                    raise IndexError
                stack[-count:] = [items]
            case "TUPLE" | "LIST" | "DICT" | "FROZENSET":
                items = self._to_mark()
                made = {"TUPLE": tuple, "LIST": list, "DICT": _pairs}.get(name)
                self.stack.append(made(items) if made else Object("frozenset"))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [stack.pop()] if name == "APPEND" else self._to_mark()
                if isinstance(self.stack[-1], list):
                    self.stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._to_mark()
                if isinstance(self.stack[-1], dict):
                    self.stack[-1].update(_pairs(items))
            case "GLOBAL":
                push(Global(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if not (isinstance(attribute, str) and isinstance(module, str)):
                    raise ValueError("its pickle names something by what is not text")
                push(Global(f"{module}.{attribute}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                push(self._call(function, arguments))
            case "NEWOBJ_EX":
                _, arguments, function = stack.pop(), stack.pop(), stack.pop()
                push(self._call(function, arguments))
            case "OBJ" | "INST":
                items = self._to_mark()
                kind = argument.replace(" ", ".", 1) if name == "INST" else _path(items[0])
                self.stack.append(Object(kind))
            case "BUILD":
                state = stack.pop()
                # Other values keep their content: an OrderedDict's state is only its attributes.
                if isinstance(stack[-1], Object):
                    stack[-1].state = state
            case "PERSID" | "BINPERSID":
                push(self._persistent(stack.pop() if name == "BINPERSID" else argument))
            case _:
                raise ValueError(f"its pickle uses {name}, which torch does not write")

    def _call(self, function: Any, arguments: Any) -> Any:
        """The few calls that describe tensors and their containers; any other is a record.

        A tensor with metadata (it is to be conjugated or negated) is one of the others.
        """
        path = _path(function)
        if not isinstance(arguments, tuple):
            return Object(path)
        match path, arguments:
            case "collections.OrderedDict", ():
                return {}
            case "collections.OrderedDict", ([*items],):
                self._spend(len(items))
                if all(isinstance(item, list | tuple) and len(item) == 2 for item in items):
                    return _pairs([half for item in items for half in item])
            case "torch.Size", ((*lengths,),):
                self._spend(len(lengths))
                return tuple(lengths)
            case "torch._utils._rebuild_tensor", (Storage() as data, at, size, stride):
                return _tensor(data, data.dtype, at, size, stride)
            case "torch._utils._rebuild_tensor_v2", (Storage() as data, at, size, stride, *_):
                if not any(arguments[6:7]):
                    return _tensor(data, data.dtype, at, size, stride)
            case (
                "torch._utils._rebuild_tensor_v3",
                (Storage() as data, at, size, stride, _, _, Global(name), *_),
            ):
                dtype = DTYPES.get(name.removeprefix("torch."))
                if dtype is not None and not any(arguments[7:8]):
                    return _tensor(data, dtype, at, size, stride)
            case (
                "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
                (value, *_),
            ):
                return value
            case "torch._tensor._rebuild_from_type_v2", (Global(inner), _, inside, _):
                if inner.startswith("torch._utils."):
                    return self._call(Global(inner), inside)
            case _, (value, *_) if path.startswith("torch.jit._pickle."):
                return value  # typed lists and dicts of TorchScript
        return Object(path)

    def _persistent(self, what: Any) -> Any:
        """A storage, by ("storage", type, key, place, elements[, view])."""
        match what:
            case ("module", kind, *_):
                return kind
            case ("storage" | b"storage", Global(path), key, _, int(length)) if length >= 0:
                view = None
            case ("storage" | b"storage", Global(path), key, _, int(length), view) if length >= 0:
                pass
            case _:
                raise ValueError("its pickle refers to something that is not a storage")
        module, _, name = path.rpartition(".")
        if module not in ("torch", "torch.cuda", "torch.storage") or name not in STORAGES:
            return Object(path)
        dtype = DTYPES[STORAGES[name]]
        storage = Storage(storage_key(key), dtype, length * dtype.itemsize)
        self.storages.setdefault(storage.key, storage)
        match view:
            case None:
                return storage
            case (_, int(begin), int(length)) if begin >= 0 and length >= 0:
                end = (begin + length) * dtype.itemsize
                if end <= storage.nbytes:
                    size = dtype.itemsize
                    return Storage(storage.key, dtype, length * size, begin * size)
        raise ValueError("a view of a storage reaches beyond it")


def _path(function: Any) -> str:
    return function.path if isinstance(function, Global) else "something unnamed"


def storage_key(key: Any) -> str:
    """A storage's key as text."""
    if isinstance(key, bytes):
        return key.decode("ascii")
    if isinstance(key, str) or (isinstance(key, int) and abs(key) < 1 << 64):
        return str(key)
    raise ValueError("a storage has no name")


def _pairs(items: list) -> dict:
    """[key, value, key, value, …] as a dict; a key that is not a plain value loses its name."""
    if len(items) % 2:
        raise ValueError("its pickle has a key without a value")
    # Nested values are never hashed, because their depth has no limit.
    keys = [k if type(k) in KEYS else Object("key") for k in items[::2]]
    return dict(zip(keys, items[1::2]))


def _tensor(storage: Storage, dtype: np.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
    if not (isinstance(size, list | tuple) and isinstance(stride, list | tuple)):
        raise ValueError("a tensor's shape is not a list")
    if len(size) != len(stride) or len(size) > MAX_AXES:
        raise ValueError(f"a tensor has {len(size)} axes and {len(stride)} strides")
    # bool is an int to isinstance.
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in (offset, *size, *stride)):
        raise ValueError("a tensor's shape, strides or offset are not sizes")
    tensor = Tensor(storage, dtype, offset, tuple(size), tuple(stride))
    if tensor.span() and (offset + tensor.span()) * dtype.itemsize > storage.nbytes:
        raise ValueError(
            f"a tensor of shape {list(size)} reaches beyond its storage of {storage.nbytes} bytes"
        )
    return tensor
