"""Opening the weight files of other projects: safetensors, torch files, and folders of them.

Opening a file gives the names and shapes of all tensors; values are read only when they are used,
so that a cascade of 5 GB needs little memory.
"""

import pathlib
import re
from collections.abc import Sequence

from unclip import errors, files
from unclip.files import tensors
from unclip.interop.torch.file import open_torch

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".th")
# What a folder written by diffusers or transformers may hold; the first one found is read.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
# Weights of other frameworks, by what their files are called.
OTHERS = (".msgpack", ".h5", ".onnx", ".gguf", ".tflite", ".npz")


def open_weights(path: pathlib.Path) -> dict[str, tensors.Lazy]:
    """The tensors of a file, or of a folder laid out by transformers or diffusers, by name.

    Args:
      path: a `.safetensors` or torch file, or a folder, of which `find` chooses one.

    Raises:
      DataError: nothing there, or a file that cannot be read.
      ConfigError: a file of another kind, or a folder of several variants.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return open_weights(find(path))
    if not path.exists():
        raise errors.DataError(f"{path}: no such file")
    if path.suffix == ".json" and ".index." in path.name:
        return _sharded(path)
    if path.suffix == ".safetensors":
        return tensors.read(path)[0]
    if path.suffix in TORCH_SUFFIXES:
        return open_torch(path)
    expected = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise errors.ConfigError(f"{path}: expected a folder or a file ending in {expected}")


def find(folder: pathlib.Path, names: Sequence[str] = FOLDER_FILES) -> pathlib.Path:
    """The file of weights in a folder: the first of `names`, else their only variant.

    A variant is a file as transformers and diffusers name it for a precision or for training, such
    as `model.fp16.safetensors`.

    Raises:
      DataError: none of them. ConfigError: several variants, between which only you can choose.
    """
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is not None:
        return found
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    variants: dict[str, str] = {}
    for name in names:
        for file in there:
            variant = _variant(file, name)
            if variant is not None:
                variants.setdefault(variant, file)
    if len(variants) > 1:
        raise errors.ConfigError(
            f"{folder} holds several variants of its weights: {', '.join(variants.values())}; "
            "expected one: give a folder with only that file and the config"
        )
    for file in variants.values():
        return folder / file
    others = [name for name in there if name.endswith(OTHERS)]
    hint = f"; {', '.join(others)} is of another framework, which is not read" if others else ""
    raise errors.DataError(f"{folder} holds no weights: expected {' or '.join(names)}{hint}")


def _variant(file: str, name: str) -> str | None:
    """ "fp16" of model.fp16.safetensors or model.safetensors.index.fp16.json; None of others."""
    stem, *ends = name.split(".")
    for place in range(1, len(ends) + 1):
        pattern = [stem, *ends]
        pattern.insert(place, r"([A-Za-z][\w-]*)")
        match = re.fullmatch(r"\.".join(pattern), file)
        if match and match[1] not in ends and not re.search(r"-\d+-of-\d+$", match[1]):
            return match[1]
    return None


def _sharded(index: pathlib.Path) -> dict[str, tensors.Lazy]:
    """The tensors of several files, by an index {"weight_map": {tensor: file}}."""
    where = files.read_object(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(n, str) for n in where.values()):
        raise errors.DataError(f"{index} is damaged: it has no weight_map")
    out = {}
    for name in sorted(set(where.values())):
        if pathlib.PurePath(name).name != name:
            raise errors.DataError(f"{index} points outside its folder: {name!r}")
        held = open_weights(index.parent / name)
        absent = [t for t, file in where.items() if file == name and t not in held]
        if absent:
            raise errors.DataError(f"{index} places {absent[0]!r} in {name}, which lacks it")
        out |= {t: held[t] for t, file in where.items() if file == name}
    return out
