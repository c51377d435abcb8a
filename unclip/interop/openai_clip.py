"""CLIP in the layout of OpenAI and OpenCLIP, into a bundle (arXiv 2103.00020).

Both name tensors alike and fuse queries, keys and values. From OpenAI's files everything follows
but the number of heads; from OpenCLIP's the activation does not either, which its
`open_clip_config.json` gives.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from unclip import errors, files
from unclip.cascade import bundle
from unclip.files import tensors
from unclip.interop import layout, weights
from unclip.interop.clip import checked, clip_part, number, only, square, stamped
from unclip.interop.layout import COPY, LINEAR, Rule, dense, norm
from unclip.models import clip as model

HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # of OpenCLIP's image towers; else 64
# A folder of the hub often holds the same model for transformers, under the usual names.
FILES = tuple(sorted(weights.FOLDER_FILES, key=lambda name: not name.startswith("open_clip")))
MARKS = ("visual.conv1.weight", "logit_scale")
# Numbers and masks beside the parameters, by the last part of their names.
NOT_TRAINED = ("input_resolution", "context_length", "vocab_size", "attn_mask")
# Tensors that only towers of another kind have, by the beginning of their names.
OTHER_TOWERS = {
    "visual.layer1.": "a ResNet image tower",
    "visual.trunk.": "a timm image tower",
    "visual.attn_pool.": "attentional pooling (CoCa)",
    "text_decoder.": "a text decoder (CoCa)",
    "text.cls_emb": "a class token in its text tower (CoCa)",
    "text.transformer.encoder.": "a Hugging Face text tower",
    "text.transformer.embeddings.": "a Hugging Face text tower",
    "text.text_projection.bias": "a text projection with a bias (SigLIP)",
}
# Options of open_clip_config.json that are read, or that have no effect on a trained model.
_READ = {
    "model_cfg": (
        "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale",
        "init_logit_bias", "nonscalar_logit_scale", "output_dict",
    ),
    "vision_cfg": (
        "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout",
        "attn_pooler_queries", "attn_pooler_heads", "output_tokens", "timm_model_pretrained",
        "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
    ),
    "text_cfg": (
        "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id",
        "eos_id", "output_tokens", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
    ),
}  # fmt: skip
# Every other option must be absent, off or one of these.
_USUAL = {
    ("vision_cfg", "pool_type"): "tok",
    ("vision_cfg", "pos_embed_type"): "learnable",
    ("text_cfg", "pool_type"): "argmax",
    ("text_cfg", "proj_type"): "linear",
    ("vision_cfg", "block_type"): "default",
    ("text_cfg", "block_type"): "default",
}


def read_openai(paths: list[pathlib.Path], options: dict) -> dict[str, bundle.Part]:
    """{"clip": part} from OpenAI's file: a TorchScript archive, a state dict or safetensors.

    Args:
      paths: one file.
      options: "preset" names one of `models.clip.PRESETS` for heads that are not 64 wide.

    Raises:
      ConfigError: a ResNet, another architecture, or tensors that do not fit (with their table).
      DataError: a file that cannot be read.
    """
    path = _one(paths)
    file = weights.find(path) if path.is_dir() else path
    source = _source(path, file)
    arch = shape_arch(source, str(path), {}) | {"activation": "quick_gelu"}
    arch = _preset(arch, options.get("preset"), str(path))
    part = clip_part(arch, openai_rules(arch), source, str(path), _ignored(source))
    return {"clip": stamped(part, file)}


def read_open_clip(paths: list[pathlib.Path], options: dict) -> dict[str, bundle.Part]:
    """{"clip": part} from an OpenCLIP checkpoint, or a folder with its `open_clip_config.json`.

    Args:
      paths: one file or folder. From a bare file neither the activation follows (GELU is assumed,
        which most of OpenCLIP's have) nor the heads (those that OpenCLIP uses with this width are
        assumed).
      options: "preset" names one of `models.clip.PRESETS`, whose heads and activation are used.

    Raises:
      ConfigError: a tower that is not OpenAI's ViT or text transformer, pictures normalised in
        another way, or tensors that do not fit (with their table).
      DataError: a file that cannot be read.
    """
    path = _one(paths)
    config = path / "open_clip_config.json"
    stated = open_clip_arch(files.read_object(config), str(config)) if config.is_file() else None
    file = weights.find(path, FILES) if path.is_dir() else path
    source = _source(path, file)
    arch = stated or shape_arch(source, str(path), HEAD_WIDTHS) | {"activation": "gelu"}
    arch = _preset(arch, options.get("preset"), str(path))
    if "logit_bias" in source:
        arch["logit_bias"] = True
    scale = source.get("logit_scale")
    scalar = layout.leading(1) if scale is not None and scale.ndim == 1 else COPY
    rules = openai_rules(arch, scalar)
    return {"clip": stamped(clip_part(arch, rules, source, str(path), _ignored(source)), file)}


def open_clip_arch(document: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Keyword arguments of `models.clip.CLIP` from an `open_clip_config.json`.

    Args:
      document: its content; `what` names it in messages.

    Raises:
      ConfigError: an option that `models.clip.CLIP` does not have.
    """
    config = document.get("model_cfg")
    sections = {"model_cfg": config}
    if isinstance(config, dict):
        sections |= {name: config.get(name) for name in ("vision_cfg", "text_cfg")}
    for section, given in sections.items():
        if not isinstance(given, dict):
            raise errors.ConfigError(f"{what} has no {section}")
        for name, value in given.items():
            usual = _USUAL.get((section, name))
            if name not in _READ[section] and value not in (None, False, {}, usual):
                raise errors.ConfigError(
                    f"{what}: {section} has {name} = {value!r}, which is not supported; expected "
                    "OpenAI's ViT and text transformer (no timm or Hugging Face tower, no CoCa)"
                )
    vision, text = sections["vision_cfg"], sections["text_cfg"]
    if isinstance(vision.get("layers"), list):
        raise errors.ConfigError(f"{what} describes a ResNet image tower, which is not supported")
    images = document.get("preprocess_cfg", {})
    for name, expected in (("mean", model.IMAGE_MEAN), ("std", model.IMAGE_STD)):
        given = images.get(name) or expected
        if len(given) != 3 or any(abs(a - b) > 1e-6 for a, b in zip(given, expected)):
            raise errors.ConfigError(
                f"{what}: pictures are normalised with {name} {given}; a bundle's CLIP takes "
                f"{list(expected)}"
            )
    ratio = vision.get("mlp_ratio", 4.0)
    if not isinstance(ratio, (int, float)) or not 0 < ratio < 100:
        raise errors.ConfigError(f"{what}: vision_cfg has mlp_ratio = {ratio!r}; expected about 4")
    only("text mlp_ratio", text.get("mlp_ratio", 4.0), 4.0)
    width = number("vision_cfg.width", vision.get("width", 768))
    head_width = number("vision_cfg.head_width", vision.get("head_width", 64))
    mlp_width = int(width * ratio)
    arch = {
        "embed_dim": config.get("embed_dim"),
        "image_size": square("image_size", vision.get("image_size", 224)),
        "patch_size": square("patch_size", vision.get("patch_size", 16)),
        "vision_width": width,
        "vision_layers": vision.get("layers", 12),
        "vision_heads": _heads(width, head_width, what),
        "text_width": text.get("width", 512),
        "text_layers": text.get("layers", 12),
        "text_heads": text.get("heads", 8),
        "context": text.get("context_length", 77),
        "vocab_size": text.get("vocab_size", 49408),
        "activation": "quick_gelu" if config.get("quick_gelu") else "gelu",
    }
    return checked(arch | ({} if mlp_width == 4 * width else {"vision_mlp_width": mlp_width}))


def openai_rules(arch: Mapping[str, Any], scalar: layout.Transform = COPY) -> list[Rule]:
    """The rules of OpenAI's and OpenCLIP's CLIP; `scalar` is how the temperature is stored."""
    rules = [
        Rule("logit_scale", "logit_scale", scalar),
        Rule("logit_bias", "logit_bias", scalar),
        Rule("vision/class_token", "visual.class_embedding", COPY),
        Rule("vision/patch/kernel", "visual.conv1.weight", layout.CONV),
        Rule("vision/position", "visual.positional_embedding", COPY),
        Rule("vision/proj/kernel", "visual.proj", COPY),
        Rule("text/token/embedding", "token_embedding.weight", COPY),
        Rule("text/position", "positional_embedding", COPY),
        Rule("text/proj/kernel", "text_projection", COPY),
        *norm("vision/ln_pre", "visual.ln_pre"),
        *norm("vision/ln_post", "visual.ln_post"),
        *norm("text/ln_final", "ln_final"),
    ]
    for side, prefix in (("vision", "visual."), ("text", "")):
        for i in range(arch[f"{side}_layers"]):
            ours = f"{side}/transformer/block_{i}"
            theirs = f"{prefix}transformer.resblocks.{i}"
            for part, name in enumerate("qkv"):
                at, weight = f"{ours}/attn/{name}", layout.rows(part, 3, LINEAR)
                rules.append(Rule(f"{at}/kernel", f"{theirs}.attn.in_proj_weight", weight))
                bias = layout.rows(part, 3)
                rules.append(Rule(f"{at}/bias", f"{theirs}.attn.in_proj_bias", bias))
            rules += dense(f"{ours}/attn/out", f"{theirs}.attn.out_proj")
            rules += norm(f"{ours}/ln_1", f"{theirs}.ln_1")
            rules += norm(f"{ours}/ln_2", f"{theirs}.ln_2")
            rules += dense(f"{ours}/mlp/fc", f"{theirs}.mlp.c_fc")
            rules += dense(f"{ours}/mlp/proj", f"{theirs}.mlp.c_proj")
    return rules


def shape_arch(
    source: Mapping[str, tensors.Lazy], what: str, head_widths: Mapping[int, int]
) -> dict[str, Any]:
    """Keyword arguments of `models.clip.CLIP` that follow from shapes: all but the activation.

    Args:
      head_widths: width of an image tower's heads by its own width, where that is not 64.

    Raises:
      ConfigError: tensors that no CLIP of this layout has.
    """
    try:
        width, _, patch_size, _ = source["visual.conv1.weight"].shape
        positions, _ = source["visual.positional_embedding"].shape
        context, text_width = source["positional_embedding"].shape
        vocab_size, _ = source["token_embedding.weight"].shape
        _, embed_dim = source["text_projection"].shape
        mlp_width, _ = source["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape
    except KeyError as error:
        raise errors.ConfigError(
            f"{what} is not a CLIP of OpenAI's layout: it has no tensor {error}"
        ) from error
    except ValueError as error:
        raise errors.ConfigError(f"{what} is not a CLIP of OpenAI's layout: {error}") from error
    block = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.")
    depth = {"visual.": 0, None: 0}
    for match in filter(None, map(block.match, source)):
        depth[match[1]] = max(depth[match[1]], int(match[2]) + 1)
    arch = {
        "embed_dim": embed_dim,
        "image_size": patch_size * math.isqrt(positions - 1),
        "patch_size": patch_size,
        "vision_width": width,
        "vision_layers": depth["visual."],
        "vision_heads": _heads(width, head_widths.get(width, 64), what),
        "text_width": text_width,
        "text_layers": depth[None],
        "text_heads": _heads(text_width, 64, what),
        "context": context,
        "vocab_size": vocab_size,
    }
    return checked(arch | ({} if mlp_width == 4 * width else {"vision_mlp_width": mlp_width}))


def _heads(width: int, head_width: int, what: str) -> int:
    if width % head_width:
        raise errors.ConfigError(
            f"{what}: a tower of width {width} does not divide into heads of {head_width}"
        )
    return width // head_width


def _preset(arch: dict[str, Any], name: str | None, what: str) -> dict[str, Any]:
    """`arch` with the heads and the activation of a preset, whose other sizes must be equal."""
    if name is None:
        return arch
    if name not in model.PRESETS:
        raise errors.unknown("CLIP preset", name, model.PRESETS)
    preset = model.PRESETS[name]
    free = {"vision_heads", "text_heads", "activation"}
    for field in sorted((preset.keys() | arch.keys()) - free):
        default = getattr(model.CLIP, field, None)
        own, named = arch.get(field, default), preset.get(field, default)
        if own != named:
            raise errors.ConfigError(f"{what} has {field} {own}, preset {name!r} has {named}")
    return arch | {field: preset[field] for field in free}


def _source(path: pathlib.Path, weights_file: pathlib.Path) -> dict[str, tensors.Lazy]:
    """The tensors of a file under OpenAI's names, without prefixes of wrappers and "text."."""
    source = layout.unwrapped(weights.open_weights(weights_file), MARKS, str(path))
    for beginning, what in OTHER_TOWERS.items():
        if any(name.startswith(beginning) for name in source):
            raise errors.ConfigError(
                f"{path} has {what}, which is not supported; expected OpenAI's ViT and text "
                "transformer"
            )
    return {name.removeprefix("text."): tensor for name, tensor in source.items()}


def _ignored(source: Mapping[str, tensors.Lazy]) -> list[str]:
    return [name for name in source if name.rpartition(".")[2] in NOT_TRAINED]


def _one(paths: list[pathlib.Path]) -> pathlib.Path:
    if len(paths) != 1:
        raise errors.ConfigError(f"given {len(paths)} paths; expected one file or folder")
    return paths[0]
