"""CLIP and DINOv2 as judges: the embeddings of pictures and captions that metrics compare.

CLIP score (2104.08718), CMMD (2401.09603) and Fréchet distances on CLIP or DINOv2 features
(2306.04675) use them. Each metric's published code prepares pictures in its own way, which changes
the number; these ways have names, which are part of the ids.

An extractor has `id`, `provenance`, `outputs`, `params`, `prepare` (a picture on the host, to one
fixed shape) and `apply` (a batch on the device); `measure.features.extract` runs it. Networks
are computed in float32, in whatever dtype they were stored or trained, unless asked otherwise.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unclip import errors, files, tasks
from unclip.cascade import bundle, runs
from unclip.input.decode.image import for_clip
from unclip.input.decode.text import EOT, Tokenizer
from unclip.interop import formats, published
from unclip.models import clip as clip_model
from unclip.models import dinov2 as dinov2_model
from unclip.tasks.arrays import to_float

HESSEL_PREFIX = "A photo depicts "  # CLIPScore's published code puts it before every caption
TRUNCATIONS = ("eot", "slice")
DINOV2_SIZE = 224
DTYPES = ("float32", "bfloat16")


def crop_then_resize(picture: np.ndarray, size: int) -> np.ndarray:
    """CMMD's resize: the largest centred square, then Pillow's bicubic; uint8 [size, size, 3]."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return squash(picture[top : top + side, left : left + side], size)


def squash(picture: np.ndarray, size: int) -> np.ndarray:
    """The whole picture made square by Pillow's bicubic filter; uint8 [size, size, 3]."""
    square = Image.fromarray(np.ascontiguousarray(picture))
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))


# How CLIP is shown a picture: uint8 [H, W, 3], size -> uint8 [size, size, 3].
PREPROCESSES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    # OpenAI's transform, through torchvision: Hessel's CLIP score.
    "openai": partial(for_clip, half="even"),
    # CLIPProcessor, whose crop can start a pixel earlier: torchmetrics' CLIP score.
    "transformers": partial(for_clip, half="down"),
    "cmmd": crop_then_resize,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
    """A network that maps pictures to embeddings, as an `measure.features.Extractor`.

    Attributes:
      id: names the network and how pictures are prepared; part of metric keys.
      provenance: JSON-able: "weights_sha256" and what it is of, "network_sha256"
        (`published.network_hash`), "source", "preprocess", "size", "dtype".
      outputs: {name: width} of what `apply` gives.
      params: parameters in float32.
      size: side of the pictures that the network is shown.
      resize: uint8 [H, W, 3], size -> uint8 [size, size, 3].
      forward: params, uint8 [b, size, size, 3] -> {name: float32 [b, width]}.
    """

    id: str
    provenance: dict[str, Any]
    outputs: dict[str, int]
    params: dict[str, Any]
    size: int
    resize: Callable[[np.ndarray, int], np.ndarray]
    forward: Callable[[Any, jax.Array], dict[str, jax.Array]]

    def prepare(self, picture: np.ndarray) -> dict[str, np.ndarray]:
        """{"image": uint8 [size, size, 3]} of a picture uint8 [H, W, 3], on the host.

        Raises:
          ConfigError: the picture has another shape or dtype.
        """
        picture = np.asarray(picture)
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise errors.ConfigError(
                f"a picture of {picture.dtype}{list(picture.shape)}; expected uint8 [H, W, 3]"
            )
        return {"image": self.resize(picture, self.size)}

    def apply(self, params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """{name: float32 [b, width]} of {"image": uint8 [b, size, size, 3]}; to be jitted."""
        # Features are compared across machines, so no accelerator may round float32 to bfloat16.
        with jax.default_matmul_precision("highest"):
            return self.forward(params, batch["image"])


def clip_extractor(
    path: str | os.PathLike, preprocess: str = "openai", *, dtype: str = "float32"
) -> Embedder:
    """The image tower of a CLIP; `apply` gives {"z_i": float32 [b, D]}, not normalised to length 1.

    Args:
      path: BUNDLE or RUN with a CLIP, or a Hugging Face or OpenCLIP folder with a config.
      preprocess: one of `PREPROCESSES`: "openai" and "transformers" resize the shorter side and
        crop the centre, "cmmd" crops the square first. All round to uint8, as the originals do.
      dtype: of the computation; "bfloat16" is faster and changes embeddings by about 1 %.

    Returns:
      An `Embedder` with an id like "clip.ViT-L-14.openai", or "clip.ViT-L-14-1a2b3c4d.openai" for
      weights that are not published ones: the beginning of their hash.

    Raises:
      ConfigError: no CLIP there, one without image tower, or an unknown name.
      DataError: a file that cannot be read.
    """
    if preprocess not in PREPROCESSES:
        raise errors.unknown("CLIP preprocess", preprocess, PREPROCESSES)
    model, params, provenance, name = _open_clip(path, "vision", dtype)

    def forward(params, images):
        pictures = clip_model.normalise(to_float(images))
        return {"z_i": model.apply({"params": params}, pictures, method="encode_image")}

    provenance |= {"preprocess": preprocess, "size": model.image_size}
    return Embedder(
        id=f"{name}.{preprocess}{_suffix(dtype)}",
        provenance=provenance,
        outputs={"z_i": model.embed_dim},
        params=params,
        size=model.image_size,
        resize=PREPROCESSES[preprocess],
        forward=forward,
    )


def dinov2_extractor(
    path: str | os.PathLike, *, interpolation: str | None = "hub", dtype: str = "float32"
) -> Embedder:
    """DINOv2's class token, {"cls": float32 [b, D]}, as FD-DINOv2 is published (arXiv 2306.04675).

    Pictures are squashed to 224 x 224 by Pillow's bicubic, rounded to uint8, and normalised by
    ImageNet's mean and deviation.

    Args:
      path: BUNDLE with a part "dinov2", or what `unclip convert --from dinov2` takes: a Hugging
        Face folder or the original `.pth` file.
      interpolation: how position embeddings of 518 px pictures are read at 224:
        "hub" as Meta's own code, which the published numbers were made with, or "transformers";
        None keeps what the part says. See `models.dinov2.INTERPOLATIONS`.
      dtype: of the computation.

    Returns:
      An `Embedder` with an id like "dinov2.ViT-L-14.bicubic224.hub"; with the beginning of the
      weights' hash, as `clip_extractor`'s, where they are not published ones.

    Raises:
      ConfigError: no DINOv2 there, or an unknown name.
      DataError: a file that cannot be read.
    """
    part, provenance = _open(path, "dinov2")
    arch = tasks.arguments(part.arch) | {"dtype": _dtype(dtype)}
    # For models with registers both codes interpolate positions in the same way.
    if interpolation is not None and not arch.get("registers"):
        arch["interpolation"] = interpolation
    model = dinov2_model.DINOv2(**arch)
    if model.interpolation not in dinov2_model.INTERPOLATIONS:
        raise errors.unknown("interpolation", model.interpolation, dinov2_model.INTERPOLATIONS)

    network = published.network_hash(model, part.params)
    name = published.name_of(part, network) or f"{dinov2_model.name_of(model)}-{network[:8]}"

    def forward(params, images):
        pictures = dinov2_model.normalise(images)
        return {"cls": model.apply({"params": params}, pictures)}

    how = {"preprocess": "bicubic224", "size": DINOV2_SIZE, "interpolation": model.interpolation}
    return Embedder(
        id=f"dinov2.{name}.bicubic224.{model.interpolation}{_suffix(dtype)}",
        provenance=provenance | {"network_sha256": network, "dtype": dtype} | how,
        outputs={"cls": model.width},
        params=_float32(part.params),
        size=DINOV2_SIZE,
        resize=squash,
        forward=forward,
    )


class CaptionEncoder:
    """The text tower of a CLIP.

    Args:
      path: as in `clip_extractor`.
      dtype: of the computation.

    Attributes:
      id: like "clip.ViT-L-14", see `clip_id`; provenance: JSON-able, as an `Embedder`'s; width: D.

    Raises:
      ConfigError: no CLIP there, or one without text tower; DataError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike, *, dtype: str = "float32"):
        self.model, self.params, self.provenance, name = _open_clip(path, "text", dtype)
        self.id = f"{name}{_suffix(dtype)}"
        self.width = self.model.embed_dim
        self._tokenizer = Tokenizer()

        def run(params, tokens):
            with jax.default_matmul_precision("highest"):
                return self.model.apply({"params": params}, tokens, method="encode_text")[0]

        self._run = jax.jit(run)

    def tokens(
        self, captions: Sequence[str], *, truncate: str = "eot", prefix: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [n, L], cut bool [n]): what CLIP reads, and which captions did not fit.

        Args:
          captions: n texts.
          truncate: how a text of more than L tokens is cut. "eot" makes the last token the end of
            text, as OpenAI's tokenizer does for CLIPScore; "slice" drops the end with the rest, as
            torchmetrics does: CLIP then reads such texts at their first token, which has no
              meaning.
          prefix: put before every caption, space included: `HESSEL_PREFIX`.

        Raises:
          ConfigError: an unknown truncation, or captions that are not a list of texts.
        """
        if truncate not in TRUNCATIONS:
            raise errors.unknown("truncation of captions", truncate, TRUNCATIONS)
        if isinstance(captions, str):
            raise errors.ConfigError("captions is one text; expected a list of texts")
        texts, length = [prefix + caption for caption in captions], self.model.context
        tokens, _, left_out = self._tokenizer.encode(texts, length)
        cut = np.array([rest is not None for rest in left_out], bool)
        if truncate == "slice" and cut.any():
            # One more position for the end of text; the positions before it hold the text.
            longer = [text for text, is_cut in zip(texts, cut) if is_cut]
            tokens[cut] = self._tokenizer.encode(longer, length + 1)[0][:, :length]
        return tokens, cut

    def encode(
        self,
        captions: Sequence[str],
        *,
        truncate: str = "eot",
        prefix: str = "",
        batch_size: int = 64,
    ) -> np.ndarray:
        """z_t float32 [n, D], not normalised; a row does not depend on the others.

        Args:
          captions, truncate, prefix: as in `tokens`.
          batch_size: captions at once; the last batch is padded.

        Raises:
          ConfigError: as `tokens`.
        """
        tokens, _ = self.tokens(captions, truncate=truncate, prefix=prefix)
        rows = []
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size]
            padded = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
            rows.append(np.asarray(self._run(self.params, padded))[: len(batch)])
        return np.concatenate(rows) if rows else np.zeros((0, self.width), np.float32)

    def cut(self, captions: Sequence[str], *, prefix: str = "") -> list[int]:
        """The numbers of the captions that do not fit, for warnings and provenance."""
        return [int(k) for k in np.flatnonzero(self.tokens(captions, prefix=prefix)[1])]


def clip_id(part: bundle.Part) -> str:
    """What keys call a CLIP: "clip.ViT-L-14" for published weights of that name.

    Others have the beginning of their hash behind the name of their architecture, such as
    "clip.ViT-L-14-1a2b3c4d": a CLIP trained here is not OpenAI's, whatever its size.
    """
    return _identified(part)[1]


def _identified(part: bundle.Part) -> tuple[str, str]:
    """(`published.network_hash`, id) of a CLIP."""
    model = clip_model.CLIP(**tasks.arguments(part.arch))
    network = published.network_hash(model, part.params)
    return network, f"clip.{published.name_of(part, network) or clip_name(model, network)}"


def clip_name(model: clip_model.CLIP, network: str = "") -> str:
    """An architecture's name in ids: its preset's ("ViT-L-14"), or "64px8-w128-l4-d128" by sizes.

    Args:
      network: its `published.network_hash`, of which the beginning is put behind the name.
    """
    return f"{_sizes(model)}-{network[:8]}" if network else _sizes(model)


def _sizes(model: clip_model.CLIP) -> str:
    for name, preset in clip_model.PRESETS.items():
        fields = {"vision_mlp_width": None} | preset
        if all(getattr(model, field) == value for field, value in fields.items()):
            return name.replace("/", "-")
    tower = "vision" if model.vision_layers else "text"
    width, layers = (getattr(model, f"{tower}_{field}") for field in ("width", "layers"))
    return f"{model.image_size}px{model.patch_size}-w{width}-l{layers}-d{model.embed_dim}"


def _open_clip(path: str | os.PathLike, tower: str, dtype: str):
    """(model, parameters of one tower, provenance, id) of the CLIP at a path."""
    part, provenance = _open(path, "clip")
    arch = tasks.arguments(part.arch) | {"dtype": _dtype(dtype), "remat": None}
    model = clip_model.CLIP(**arch | {"attention_impl": "xla"})
    if not getattr(model, f"{tower}_layers"):
        what = {"vision": "image", "text": "text"}[tower]
        raise errors.ConfigError(f"{path}: this CLIP has no {what} tower, which is needed here")
    if tower == "text" and model.vocab_size <= EOT:
        raise errors.ConfigError(
            f"{path}: this CLIP reads {model.vocab_size} tokens; its tokenizer makes {EOT + 1}"
        )
    kept = {name: tree for name, tree in part.params.items() if name in (tower, "logit_scale")}
    if model.logit_bias:
        kept["logit_bias"] = part.params["logit_bias"]
    network, id = _identified(part)
    return model, _float32(kept), provenance | {"network_sha256": network, "dtype": dtype}, id


def _open(path: str | os.PathLike, kind: str) -> tuple[bundle.Part, dict[str, Any]]:
    """The part at a path, tensors in memory, and its provenance."""
    path = pathlib.Path(path)
    if (path / "model.json").is_file():
        part = bundle.read_part(path, kind)
        digest, of = bundle.describe(path)["parts"][kind]["sha256"], "file of the bundle's part"
    else:
        part = _open_foreign(path, kind) or runs.open_part(path, kind)
        part.params = jax.tree.map(np.asarray, part.params)
        digest, of = bundle.tree_hash(part.params), "parameters"
    return part, {"weights_sha256": digest, "weights_sha256_of": of, "source": path.name}


def _open_foreign(path: pathlib.Path, kind: str) -> bundle.Part | None:
    """The part in another project's files; None for a path that may be a RUN."""
    if not path.exists():
        raise errors.DataError(f"{path}: no such file or folder")
    if kind == "dinov2":
        return formats.read("dinov2", [path])[kind]
    if path.is_file():
        raise errors.ConfigError(
            f"{path}: a CLIP's file does not give its whole architecture; convert it to a bundle "
            "first (unclip convert --from openai-clip|open-clip FILE --out BUNDLE)"
        )
    if (path / "open_clip_config.json").is_file():
        return formats.read("open-clip", [path])[kind]
    config = path / "config.json"
    if config.is_file() and "model_type" in files.read_object(config):
        return formats.read("hf-clip", [path])[kind]
    return None


def _float32(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters as float32 on the host: files may hold float16 or bfloat16."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32, copy=False), params)


def _dtype(name: str):
    if name not in DTYPES:
        raise errors.unknown("dtype of an evaluation", name, DTYPES)
    return jnp.dtype(name)


def _suffix(dtype: str) -> str:
    return "" if dtype == "float32" else f".{dtype}"
