"""FID's Inception as an extractor: weights from a file, and the three ways to show it a picture.

All tools use one network, but they resize pictures to its 299 pixels differently, and that alone
changes a FID by whole points (2104.11222). The mode is part of the extractor's id:

- "tf1": TensorFlow 1's bilinear resize of uint8, as FID's own graph does, TTUR, torch-fidelity and
  OpenAI's evaluator.
- "pytorch-fid": bilinear at half-pixel centres, without antialiasing, then 2x - 1.
- "clean": Pillow's antialiased bicubic of each channel in float32, neither rounded nor quantised,
  as clean-fid.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image

from unclip import errors
from unclip.cascade import bundle
from unclip.interop import formats, published
from unclip.models import bilinear
from unclip.models.inception import CLASSES, SIZE, SPATIAL_CHANNELS, Inception

# mode -> (name in the id, normalisation).
MODES = {
    "tf1": ("tf1bilinear.uint8", "tf"),
    "pytorch-fid": ("pytorch-bilinear.float", "pytorch-fid"),
    "clean": ("pil-bicubic.float", "tf"),
}
OUTPUTS = {
    "pool3": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits_unbiased": CLASSES,
    "logits": CLASSES,
}  # fmt: skip
HELP = (
    "get pt_inception-2015-12-05-6726825d.pth (from pytorch-fid's release fid_weights; its sha256 "
    "begins with 6726825d) or classify_image_graph_def.pb (in TensorFlow's "
    "inception-2015-12-05.tgz) and give that file, or the bundle that `unclip convert --from "
    "inception FILE --out BUNDLE` makes of it; the metric fd-clip needs neither"
)
# sha256 of the published state dict; by PyTorch's custom its name ends in the first 8 digits.
PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclasses.dataclass(frozen=True, eq=False)
class InceptionExtractor:
    """FID's Inception in one mode, as an `measure.features.Extractor`.

    Attributes:
      id: "inception2015." and how pictures are resized to 299 pixels; "inception2015-1a2b3c4d." and
        so on where the weights' file is not known to be the published one, by the beginning of
        `published.network_hash`.
      provenance: "weights_sha256" and "weights_source" of the file they came from,
        "weights_known" where that is the published state dict, and "mode".
      params: float32.
      mode: one of `MODES`.
      outputs: widths; "spatial" is [17, 17, 7] flattened.
    """

    id: str
    provenance: dict[str, Any]
    params: dict[str, Any]
    mode: str
    outputs: dict[str, int] = dataclasses.field(default_factory=lambda: dict(OUTPUTS))

    def prepare(self, picture: np.ndarray) -> dict[str, np.ndarray]:
        """What `apply` needs of a picture uint8 [H, W, 3]; of one shape for all pictures.

        Raises:
          ConfigError: another dtype or shape.
        """
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise errors.ConfigError(
                f"a picture of {picture.dtype}{list(picture.shape)}: expected uint8 [H, W, 3]"
            )
        if self.mode == "clean":
            return {"image": resize_clean(picture)}
        positions = bilinear.tf1_positions if self.mode == "tf1" else bilinear.torch_positions
        return bilinear.corners(picture, positions)

    def apply(self, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """{output: float32 [b, width]} of b prepared pictures."""
        images = batch["image"] if self.mode == "clean" else bilinear.mix(**batch)
        normalise = MODES[self.mode][1]
        found = Inception().apply({"params": params}, images, normalise=normalise)
        return {name: rows.reshape(len(rows), -1) for name, rows in found._asdict().items()}


def resize_clean(picture: np.ndarray, size: int = SIZE) -> np.ndarray:
    """clean-fid's resize: float32 [size, size, 3] in [0, 255] of uint8 [H, W, 3], on the host."""
    out = np.empty((size, size, 3), np.float32)
    for channel in range(3):
        plane = Image.fromarray(picture[:, :, channel].astype(np.float32))
        out[:, :, channel] = plane.resize((size, size), Image.Resampling.BICUBIC)
    return out.clip(0, 255, out=out)


def inception_extractor(path: str | os.PathLike, mode: str = "tf1") -> InceptionExtractor:
    """FID's Inception with the weights of a file.

    Args:
      path: a BUNDLE with the part "inception", or the published `.pth` or `.pb`.
      mode: one of `MODES`.

    Raises:
      ConfigError: an unknown mode, a bundle without Inception or with rounded weights, or tensors
        of another network.
      DataError: nothing there (the message says what to get), a damaged file, or one whose sha256
        is not what its name says.
    """
    if mode not in MODES:
        raise errors.unknown("Inception mode", mode, MODES)
    path = pathlib.Path(path)
    if not path.exists():
        raise errors.DataError(f"{path}: no such file or folder. For Inception's weights {HELP}")
    if path.is_dir():
        document = bundle.describe(path)
        if "inception" not in document["parts"]:
            raise errors.ConfigError(f"{path} holds no Inception: {HELP}")
        part = bundle.read(path, ["inception"], lazy=True).parts["inception"]
        stored = document["parts"]["inception"]["sha256"]
    else:
        part, stored = formats.read("inception", [path])["inception"], None
    source = str(part.settings.get("source", path.name))
    digest = str(part.settings.get("sha256", stored))
    known = digest == PUBLISHED
    if PUBLISHED[:8] in source and not known:
        raise errors.DataError(
            f"{path}: the sha256 of {source} begins with {digest[:8]}, not {PUBLISHED[:8]}: the "
            "file is damaged or another; fetch it again"
        )
    if any(leaf.dtype != np.float32 for leaf in jax.tree.leaves(part.params)):
        raise errors.ConfigError(
            f"{path} holds Inception's weights rounded to fewer bits, which moves every FID: "
            "convert them again in float32"
        )
    params = jax.tree.map(np.asarray, part.params)
    provenance = {
        "weights_sha256": digest, "weights_source": source, "weights_known": known, "mode": mode,
    }  # fmt: skip
    name = "inception2015"
    if not known:
        network = published.network_hash(Inception(), params)
        provenance["network_sha256"] = network
        name += f"-{network[:8]}"
    return InceptionExtractor(f"{name}.{MODES[mode][0]}", provenance, params, mode)
