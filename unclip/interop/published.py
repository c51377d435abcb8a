"""Which weights are published ones: by the sha256 of their files, and of what a network computes.

A number's key names the network that judged. A name such as "ViT-B-32" says which weights only
where they are those that everyone knows; a file is recognised by its sha256 when it is read, and
the part keeps, beside that, the hash of the parameters themselves, so that the name is lost when
they are rounded or trained further.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip.cascade.bundle import Part
from unclip.models.transformer import unstack_blocks
from unclip.runtime.sharding import tree_paths

# sha256 of a file -> the preset that its weights are of, and by which keys name them.
FILES = {
    # OpenAI's own files.
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B/16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L/14@336",
    # The same for transformers: pytorch_model.bin, of ViT-L/14 also model.safetensors.
    "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f": "ViT-B/32",
    "f1a17cdbe0f36fec524f5cafb1c261ea3bbbc13e346e0f74fc9eb0460dedd0d3": "ViT-L/14",
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb": "ViT-L/14",
    "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801": "ViT-L/14@336",
    # OpenCLIP's CLIP-ViT-H-14-laion2B-s32B-b79K, open_clip_pytorch_model.bin.
    "9a78ef8e8c73fd0df621682e7a8e8eb36c6916cb3c16b291a082ecd52ab79cc4": "ViT-H/14",
    # Meta's dinov2_vitl14_pretrain.pth.
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428": "ViT-L/14",
}
_KEPT = "published"  # the name among a part's extra arrays: sha256 of the file, then `network_hash`
# Fields of how a network is computed, which no exact computation depends on, and of how it is read.
_COMPUTE = (
    "dtype", "remat", "fold", "attention_impl", "interpolation", "parent", "name",
)  # fmt: skip


def network_hash(module: Any, params: Mapping[str, Any]) -> str:
    """sha256 (hex) of a network: its fields, and its parameters' float32 values by path.

    Equal for the same weights in any container, dtype that holds them exactly, or layout of blocks.

    Args:
      module: a linen module; params: nested dict of arrays or `tensors.Lazy`, read one at a time.
    """
    fields = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.name not in _COMPUTE
    }
    digest = hashlib.sha256(json.dumps([type(module).__name__, fields], sort_keys=True).encode())
    for path, leaf in sorted(tree_paths(unstack_blocks(dict(params))).items()):
        values = np.ascontiguousarray(np.asarray(leaf).astype(np.float32, copy=False))
        digest.update(f"{path} {np.shape(leaf)}\n".encode())
        digest.update(values.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def stamp(
    path: pathlib.Path,
    module: Any,
    params: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
) -> dict[str, np.ndarray]:
    """What a part keeps of the file it was read from: {} unless that is a published one.

    Args:
      module: the network as it was read. Published weights in another architecture, such as with
        another activation, are not the published network.
      presets: the fields of the architectures that `FILES` names.
    """
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    fields = presets.get(FILES.get(found, ""))
    if fields is None or any(getattr(module, name) != value for name, value in fields.items()):
        return {}
    both = bytes.fromhex(found + network_hash(module, params))
    return {_KEPT: np.frombuffer(both, np.uint8)}


def name_of(part: Part, network: str) -> str | None:
    """The name of a part's weights where they are published ones and unchanged since; else None.

    Args:
      network: `network_hash` of the part as it is now.
    """
    kept = np.asarray(part.extra.get(_KEPT, np.zeros(0, np.uint8))).tobytes().hex()
    name = FILES.get(kept[:64]) if kept[64:] == network else None
    return name and name.replace("/", "-")
