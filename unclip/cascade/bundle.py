"""A trained cascade on disk: what users pass around.

A bundle is a folder with `model.json` and one `<part>.safetensors` for each network of unCLIP
(arXiv 2204.06125, section 2): `clip`, the `prior` P(z_i | y), the `decoder` P(x | z_i, y) and its
two diffusion upsamplers (section 2.1). Beside these it can hold a `t5` text encoder, a second
network for the last step of the first upsampler (Karlo's `upsampler_0_last`), the `inception`
network of FID and the `dinov2` network of FD-DINOv2. Any part may be absent. A part file carries
its own architecture and settings in its header, so its sha256 covers everything that decides a
picture; `model.json` repeats them for people to read and records the sha256. Tensors are read by
safetensors alone: nothing here unpickles, and no path is taken from the files. Parts are written
tensor by tensor, and can be read so.

A prior and a decoder work in the embedding space of the CLIP (and the T5) that they were trained
with. `model.json` names that space: `space` of a CLIP or T5 is the hash of its parameters, and
`trained_with` of a stage holds the spaces it was trained in; `cascade.spaces` compares them.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from unclip import errors, files, tasks
from unclip.files import tensors
from unclip.runtime import sharding

FORMAT = 1
KINDS = (
    "clip",
    "t5",
    "prior",
    "decoder",
    "upsampler_0",
    "upsampler_0_last",
    "upsampler_1",
    "inception",
    "dinov2",
)
SPACES = ("clip", "t5")  # parts in whose embedding space others work
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MAX_JSON_BYTES = 16 << 20
# Files of a bundle, and those that `files.replacing` leaves of one when the process is killed.
_NAMES = "|".join(["model.json", *(f"{kind}.safetensors" for kind in KINDS)]).replace(".", r"\.")
_OWN = re.compile(rf"({_NAMES})|\.({_NAMES})\.[0-9a-f]+\.tmp")


@dataclasses.dataclass
class Part:
    """One network of the cascade, ready to be rebuilt.

    Attributes:
      kind: one of `KINDS`.
      arch: keyword arguments of the module, JSON-able, plus "class", its name. Lists come back as
        tuples, so that modules stay hashable.
      params: nested dict of arrays or `tensors.Lazy`, names without "/".
      extra: named arrays that are no parameters (e.g. the CLIP mean and standard deviation of z_i);
        kept in their own dtype.
      settings: JSON-able facts that sampling needs: diffusion schedule, parametrisation,
        image_size, context length. Lists come back as tuples.
      space: of a part of `SPACES`, the `tree_hash` of its parameters, before a cast by `write`;
        "" until `space` has computed it.
      trained_with: {part of `SPACES`: the space this part was trained in}, as far as it is known.
      mixed_spaces: where somebody let it be trained on in another space all the same, in words.
    """

    kind: str
    arch: dict[str, Any]
    params: dict[str, Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    space: str = ""
    trained_with: dict[str, str] = dataclasses.field(default_factory=dict)
    mixed_spaces: tuple[str, ...] = ()


def tree_hash(params) -> str:
    """sha256 (hex) of a parameter tree's names, shapes, dtypes and values; arrays on the host."""
    digest = hashlib.sha256()
    for path, leaf in sorted(sharding.tree_paths(params).items()):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(leaf.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def space(part: Part) -> str:
    """The embedding space of a part of `SPACES`: as recorded, or hashed here and kept.

    A bundle records it before it casts, so that a CLIP in bfloat16 is the CLIP it was made from.
    """
    if not part.space:
        part.space = tree_hash(part.params)
    return part.space


@dataclasses.dataclass
class Bundle:
    """What `read` returns: the parts asked for, free-form `meta`, and the model hash (10 hex)."""

    parts: dict[str, Part]
    meta: dict[str, Any]
    hash: str


def write(
    directory: str | os.PathLike,
    parts: Mapping[str, Part],
    meta: Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
) -> str:
    """Writes a bundle, part files first and `model.json` last, each atomically.

    A bundle that is there is replaced, with all of its files.

    Args:
      directory: the bundle's folder, made when missing; see `check_out`.
      parts: part by name; a name equals its part's `kind`.
      meta: JSON-able facts about the whole (name, licence, data, commit).
      dtype: cast floating parameters to "float32" or "bfloat16"; None keeps each as it is. `extra`
        is never cast: statistics stay in float32.

    Returns:
      The model hash, 10 hex digits.

    Raises:
      ConfigError: an unknown part or dtype, or content that is not JSON or not arrays.
      DataError: the folder cannot be written.
    """
    directory = pathlib.Path(directory)
    if dtype is not None and dtype not in DTYPES:
        raise errors.unknown("bundle dtype", dtype, DTYPES)
    meta = _checked_json("meta", dict(meta or {}))
    records = {}
    for name in sorted(parts):
        part = parts[name]
        if name not in KINDS:
            raise errors.unknown("bundle part", name, KINDS)
        if part.kind != name:
            raise errors.ConfigError(f"part {name!r} holds a {part.kind!r}: they must agree")
        content = dict(_flatten(f"{name}: params", part.params, "params/"))
        if dtype is not None:
            content = {path: _cast(array, DTYPES[dtype]) for path, array in content.items()}
        content |= _flatten(f"{name}: extra", part.extra, "extra/")
        described = {
            "arch": _checked_json(f"{name}: arch", part.arch),
            "settings": _checked_json(f"{name}: settings", part.settings),
        }
        header = {"unclip": _dumps({"kind": name, "format": FORMAT, **described})}
        path = directory / f"{name}.safetensors"
        tensors.write(path, content, header)
        records[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path), **described}
        # Not in the part's file: they decide no picture, and the model hash is of what does.
        lineage = {"trained_with": dict(part.trained_with), "mixed_spaces": list(part.mixed_spaces)}
        records[name] |= {field: value for field, value in lineage.items() if value}
        if name in SPACES:
            records[name]["space"] = space(part)
    model_hash = _model_hash(records)
    document = {"format": FORMAT, "hash": model_hash, "meta": meta, "parts": records}
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False)
    with files.replacing(directory / "model.json") as temporary:
        temporary.write_text(text + "\n", encoding="ascii")
    for path in directory.iterdir():
        if _OWN.fullmatch(path.name) and path.name not in _files(parts):
            try:
                path.unlink()
            except OSError as error:
                raise errors.DataError(
                    f"cannot remove {path}: {error.strerror or error}"
                ) from error
    return model_hash


def _files(parts: Iterable[str]) -> set[str]:
    return {"model.json", *(f"{name}.safetensors" for name in parts)}


def check_out(directory: str | os.PathLike) -> None:
    """Refuses a folder for a new bundle that holds something else.

    A folder that is missing or empty is taken, and one with a bundle, which `write` replaces: a
    whole one, beside which other files may lie, or the files of one that was cut short.

    Raises:
      ConfigError: names some of what is there. DataError: it cannot be read, or is a file.
    """
    directory = pathlib.Path(directory)
    try:
        there = sorted(path.name for path in directory.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise errors.DataError(f"cannot write {directory}: {error.strerror or error}") from error
    others = [name for name in there if not _OWN.fullmatch(name)]
    if "model.json" in there:
        describe(directory)  # a file of that name may be anybody's
        others = ["config.json"] if "config.json" in others else []  # a run stays a run
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise errors.ConfigError(
            f"{directory} holds something else than a bundle ({', '.join(others[:3])}{more}): "
            "give another --out, or an empty folder"
        )


def describe(directory: str | os.PathLike) -> dict[str, Any]:
    """The checked content of `model.json`, tensors untouched: {"format", "hash", "meta", "parts"}.

    Raises:
      ConfigError: the bundle was written by a newer format.
      DataError: no bundle there, or `model.json` is not one.
    """
    path = pathlib.Path(directory) / "model.json"
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise errors.DataError(f"{path} is larger than {MAX_JSON_BYTES} bytes: no bundle")
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise errors.DataError(f"{directory} is no bundle: it has no model.json") from error
    except OSError as error:
        raise errors.DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise errors.DataError(f"{path} is damaged: {error}") from error
    version = document.get("format") if isinstance(document, dict) else None
    if not isinstance(version, int):
        raise errors.DataError(f"{path} is no bundle: it has no format number")
    if version > FORMAT:
        raise errors.ConfigError(
            f"{path} has bundle format {version}, this unclip reads up to {FORMAT}: upgrade unclip"
        )
    records = document.get("parts")
    if not isinstance(records, dict) or not all(map(_is_record, records.items())):
        raise errors.DataError(f"{path} is damaged: its list of parts is not valid")
    if document.get("hash") != _model_hash(records):
        raise errors.DataError(f"{path} is damaged: its hash does not cover the listed parts")
    if not isinstance(document.setdefault("meta", {}), dict):
        raise errors.DataError(f"{path} is damaged: its meta is not an object")
    return document


def read(
    directory: str | os.PathLike,
    names: Iterable[str] | None = None,
    *,
    verify: bool = True,
    lazy: bool = False,
) -> Bundle:
    """Reads a bundle, or only the parts named.

    Args:
      directory: the bundle's folder.
      names: parts to read; None reads every one present. Other files are not opened.
      verify: compare each file's sha256 with the recorded one. Sizes are compared in any case.
      lazy: leave the tensors on disk, as `tensors.Lazy`.

    Returns:
      The parts with numpy arrays (bfloat16 as `ml_dtypes.bfloat16`), the meta and the model hash.

    Raises:
      ConfigError: a part that is absent (the message lists those present), or a newer format.
      DataError: a file that is missing, cut short, changed or no safetensors.
    """
    document = describe(directory)
    present = [kind for kind in KINDS if kind in document["parts"]]
    parts = {}
    for name in present if names is None else names:
        if name not in KINDS:
            raise errors.unknown("bundle part", name, KINDS)
        if name not in present:
            listed = ", ".join(present) or "nothing"
            raise errors.ConfigError(f"{directory} has no part {name!r}: it holds {listed}")
        part = _read_part(pathlib.Path(directory), name, document["parts"][name], verify)
        if not lazy:
            part.params, part.extra = _loaded(part.params), _loaded(part.extra)
        parts[name] = part
    return Bundle(parts, document["meta"], document["hash"])


def read_part(directory: str | os.PathLike, name: str, *, verify: bool = True) -> Part:
    """Reads one part; arguments and errors as in `read`."""
    return read(directory, [name], verify=verify).parts[name]


def _read_part(directory: pathlib.Path, name: str, record: dict, verify: bool) -> Part:
    path = directory / f"{name}.safetensors"
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            raise errors.DataError(
                f"{path} has {size} bytes where model.json records {record['bytes']}: "
                "the copy is incomplete or another file"
            )
        if verify and _sha256(path) != record["sha256"]:
            raise errors.DataError(f"{path} differs from the sha256 in model.json: fetch it again")
        flat, metadata = tensors.read(path)
        header = json.loads(metadata.get("unclip", "null"))
    except OSError as error:
        raise errors.DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise errors.DataError(f"{path} is damaged: {error}") from error
    if not isinstance(header, dict) or header.get("kind") != name:
        raise errors.DataError(f"{path} does not describe itself as a {name!r} part of a bundle")
    for field in ("arch", "settings"):
        if header.get(field) != record[field]:
            raise errors.DataError(
                f"{path} and model.json disagree on {field!r}: the bundle was edited by hand; "
                "write it again"
            )
    trees = {"params": {}, "extra": {}}
    for key, array in flat.items():
        *parents, leaf = key.split("/")
        if not parents or parents[0] not in trees:
            raise errors.DataError(f"{path} holds an unexpected tensor {key!r}")
        node = trees
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise errors.DataError(f"{path} holds tensor {key!r} below another tensor")
        if leaf in node:
            raise errors.DataError(f"{path} holds tensor {key!r} above another tensor")
        node[leaf] = array
    return Part(
        kind=name,
        arch=_tuples(header["arch"]),
        params=trees["params"],
        extra=trees["extra"],
        settings=tasks.current_names(_tuples(header["settings"])),
        space=record.get("space", ""),
        trained_with=dict(record.get("trained_with", {})),
        mixed_spaces=tuple(record.get("mixed_spaces", ())),
    )


def _loaded(tree: dict) -> dict:
    return {k: _loaded(v) if isinstance(v, dict) else v.read() for k, v in tree.items()}


def _flatten(what: str, tree: Mapping, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key or not key:
            raise errors.ConfigError(f"{what}: a tensor's name is text without /, got {key!r}")
        path = prefix + key
        if isinstance(value, Mapping):
            yield from _flatten(what, value, path + "/")
            continue
        if not hasattr(value, "shape"):
            value = np.asarray(value)
        if np.dtype(value.dtype).hasobject or np.dtype(value.dtype).kind in "USmM":
            raise errors.ConfigError(f"{what}: {path} is {type(value).__name__}, expected an array")
        yield path, value


def _cast(array: Any, dtype: np.dtype) -> Any:
    if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
        return array
    return tensors.Lazy(array.shape, dtype, lambda: np.asarray(array).astype(dtype))


def _checked_json(what: str, value: Any) -> Any:
    try:
        return json.loads(_dumps(value))
    except (TypeError, ValueError) as error:
        raise errors.ConfigError(f"{what} cannot be written as JSON: {error}") from error


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _is_record(item: tuple[str, Any]) -> bool:
    name, record = item
    texts = lambda values: all(isinstance(value, str) for value in values)
    return (
        name in KINDS
        and isinstance(record, dict)
        and isinstance(record.get("bytes"), int)
        and isinstance(record.get("sha256"), str)
        and isinstance(record.get("arch"), dict)
        and isinstance(record.get("settings"), dict)
        and isinstance(record.get("space", ""), str)
        and isinstance(record.get("trained_with", {}), dict)
        and texts(record.get("trained_with", {}).values())
        and isinstance(record.get("mixed_spaces", []), list)
        and texts(record.get("mixed_spaces", []))
    )


def _model_hash(records: Mapping[str, Mapping]) -> str:
    lines = "".join(f"{name} {records[name]['sha256']}\n" for name in sorted(records))
    return hashlib.sha256(lines.encode("ascii", "replace")).hexdigest()[:10]


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
