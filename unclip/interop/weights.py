"""Opening the weight files of other projects: safetensors, torch files, and folders of them.

Opening a file gives the names and shapes of all tensors; values are read only when they are used,
so that a cascade of 5 GB needs little memory.
"""

import pathlib

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


def open_weights(path: pathlib.Path) -> dict[str, tensors.Lazy]:
    """The tensors of a file, or of a folder laid out by transformers or diffusers, by name.

    Args:
      path: a `.safetensors` or torch file, or a folder that holds one of `FOLDER_FILES`.

    Raises:
      DataError: nothing there, or a file that cannot be read.
      ConfigError: a file of another kind.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if found is None:
            raise errors.DataError(f"{path} holds no weights: expected {' or '.join(FOLDER_FILES)}")
        return open_weights(found)
    if not path.exists():
        raise errors.DataError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return _sharded(path)
    if path.suffix == ".safetensors":
        return tensors.read(path)[0]
    if path.suffix in TORCH_SUFFIXES:
        return open_torch(path)
    expected = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise errors.ConfigError(f"{path}: expected a folder or a file ending in {expected}")


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
