"""DINOv2 from Meta's files and from Hugging Face folders (arXiv 2304.07193).

The network of the metric FD-DINOv2. Meta's `dinov2_vitl14_pretrain.pth` fuses queries, keys and
values; transformers stores them separately and gives the architecture in its config. The mask
token, which only training uses, is ignored.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unclip import errors, files
from unclip.cascade.bundle import Part
from unclip.files import tensors
from unclip.interop import layout, published, weights
from unclip.interop.layout import LINEAR, Rule, conv, dense, fused_dense, leading, norm
from unclip.models import dinov2 as model

MAX_LAYERS = 1000
HEAD_WIDTH = 64  # of every published DINOv2
MASK_TOKENS = ("mask_token", "embeddings.mask_token")
# Transformers' layout and Meta's.
MARKS = ("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight")
# transformers' defaults for fields that a config lacks (Dinov2Config, Dinov2WithRegistersConfig).
_HF_DEFAULTS = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, mlp_ratio=4, hidden_act="gelu",
    layer_norm_eps=1e-6, image_size=224, num_channels=3, qkv_bias=True, use_swiglu_ffn=False,
)  # fmt: skip
_HF_KINDS = {
    "dinov2": dict(patch_size=14, num_register_tokens=0),
    "dinov2_with_registers": dict(patch_size=16, num_register_tokens=4),
}


def read(paths: list[pathlib.Path], options: dict[str, Any]) -> dict[str, Part]:
    """{"dinov2": Part}, tensors unread.

    Args:
      paths: one Hugging Face folder (Dinov2Model, Dinov2WithRegistersModel), or one file in Meta's
        layout (`.pth`, `.safetensors`), whose heads are 64 wide.
      options: none apply.

    Returns:
      A part whose `interpolation` is that of the code it comes from: see
      `models.dinov2.INTERPOLATIONS`.

    Raises:
      ConfigError: another architecture, or tensors that do not fit (with their table).
      DataError: a file that is missing or damaged.
    """
    if options.get("preset"):
        raise errors.ConfigError("--preset: files of DINOv2 give their architecture")
    if len(paths) != 1:
        raise errors.ConfigError(f"given {len(paths)} paths; expected one file or folder")
    path = paths[0]
    file = weights.find(path) if path.is_dir() else path
    source = layout.unwrapped(weights.open_weights(file), MARKS, str(path))
    if path.is_dir():
        arch = hf_arch(files.read_object(path / "config.json"), str(path))
        rules = hf_rules(arch)
    else:
        arch = hub_arch(source, str(path))
        rules = hub_rules(arch)
    params = layout.take(rules, source, shapes(arch), what=str(path), ignore=MASK_TOKENS)
    extra = published.stamp(file, model.DINOv2(**arch), params, model.PRESETS)
    return {"dinov2": Part("dinov2", {"class": "DINOv2", **arch}, params, extra)}


def hf_arch(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Keyword arguments of `models.dinov2.DINOv2` from a config.json; `what` names it.

    Raises:
      ConfigError: another model, or an option that DINOv2 does not have here.
    """
    kind = config.get("model_type")
    if kind not in _HF_KINDS:
        raise errors.ConfigError(
            f"{what}: config.json describes model_type {kind!r}; expected {' or '.join(_HF_KINDS)}"
        )
    given = {name: value for name, value in config.items() if value is not None}
    config = _HF_DEFAULTS | _HF_KINDS[kind] | given
    for name in ("hidden_act", "layer_norm_eps", "num_channels", "qkv_bias"):
        if config[name] != _HF_DEFAULTS[name]:
            raise errors.ConfigError(
                f"{what}: DINOv2's {name} is {config[name]!r}; expected {_HF_DEFAULTS[name]!r}"
            )
    width, ratio = _size(what, "hidden_size", config["hidden_size"]), config["mlp_ratio"]
    if not isinstance(ratio, (int, float)) or not 0 < ratio < 100:
        raise errors.ConfigError(f"{what}: mlp_ratio is {ratio!r}; expected about 4")
    hidden = int(width * ratio)
    registers = config["num_register_tokens"] if kind == "dinov2_with_registers" else 0
    arch = {
        "width": width,
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "ffn": "swiglu" if config["use_swiglu_ffn"] else "mlp",
        "image_size": _square(what, "image_size", config["image_size"]),
        "patch_size": _square(what, "patch_size", config["patch_size"]),
        "registers": registers,
        "interpolation": "antialias" if kind == "dinov2_with_registers" else "transformers",
    }
    if ratio != 4:
        arch["mlp_width"] = model.swiglu_width(hidden) if config["use_swiglu_ffn"] else hidden
    return checked(arch, what)


def hub_arch(source: Mapping[str, tensors.Lazy], what: str) -> dict[str, Any]:
    """Keyword arguments of `models.dinov2.DINOv2` from the shapes in Meta's layout.

    Raises:
      ConfigError: tensors that no DINOv2 has.
    """
    blocks = [re.match(r"blocks\.(\d+)\.norm1\.weight$", name) for name in source]
    swiglu = "blocks.0.mlp.w12.weight" in source
    try:
        width, _, patch_size, _ = source["patch_embed.proj.weight"].shape
        _, positions, _ = source["pos_embed"].shape
        last = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
        _, hidden = source[last].shape
        registers = source["register_tokens"].shape[1] if "register_tokens" in source else 0
    except KeyError as error:
        raise errors.ConfigError(
            f"{what} is no DINOv2 of Meta's layout: it has no tensor {error}"
        ) from error
    except (ValueError, IndexError) as error:
        raise errors.ConfigError(f"{what} is no DINOv2 of Meta's layout: {error}") from error
    usual = model.swiglu_width(4 * width) if swiglu else 4 * width
    arch = {
        "width": width,
        "layers": len(list(filter(None, blocks))),
        "heads": max(width // HEAD_WIDTH, 1),
        "ffn": "swiglu" if swiglu else "mlp",
        "image_size": patch_size * math.isqrt(max(positions - 1, 0)),
        "patch_size": patch_size,
        "registers": registers,
        "interpolation": "antialias" if registers else "hub",
    }
    return checked(arch | ({} if hidden == usual else {"mlp_width": hidden}), what)


def checked(arch: dict[str, Any], what: str) -> dict[str, Any]:
    """`arch`, or ConfigError where a size cannot be that of a network."""
    for field in ("width", "layers", "heads", "image_size", "patch_size"):
        _size(what, field, arch[field])
    if arch["registers"]:
        _size(what, "num_register_tokens", arch["registers"])
    uneven = arch["width"] % arch["heads"] or arch["image_size"] % arch["patch_size"]
    if uneven or arch["layers"] > MAX_LAYERS:
        raise errors.ConfigError(
            f"{what}: {arch['layers']} blocks of width {arch['width']} in {arch['heads']} heads, "
            f"pictures of {arch['image_size']} px in patches of {arch['patch_size']}; expected "
            f"sizes that divide evenly and at most {MAX_LAYERS} blocks"
        )
    return arch


def _size(what: str, field: str, given: Any) -> int:
    """Refuses (ConfigError) what is not a size of a network."""
    if not isinstance(given, int) or not 1 <= given <= 1_000_000:
        raise errors.ConfigError(f"{what}: {field} is {given!r}; expected a whole number above 0")
    return given


def _square(what: str, field: str, given: Any) -> int:
    """A number, or that of a pair of equal numbers; ConfigError where they differ."""
    pair = given if isinstance(given, (list, tuple)) else [given]
    if not 1 <= len(pair) <= 2 or pair[0] != pair[-1]:
        raise errors.ConfigError(f"{what}: {field} is {given!r}; expected a square")
    return _size(what, field, pair[0])


def shapes(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of shapes of a DINOv2's parameters."""
    network = model.DINOv2(**arch)
    pictures = jax.ShapeDtypeStruct((1, network.image_size, network.image_size, 3), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), pictures)["params"]


def hf_rules(arch: Mapping[str, Any]) -> list[Rule]:
    """The rules of transformers' Dinov2Model and Dinov2WithRegistersModel."""
    at = "embeddings"
    rules = [
        Rule("class_token", f"{at}.cls_token", leading(2)),
        Rule("position", f"{at}.position_embeddings", leading(1)),
        Rule("registers", f"{at}.register_tokens", leading(1)),
        *conv("patch", f"{at}.patch_embeddings.projection"),
        *norm("ln_final", "layernorm"),
    ]
    for i in range(arch["layers"]):
        ours, theirs = f"block_{i}", f"encoder.layer.{i}"
        for name, word in (("q", "query"), ("k", "key"), ("v", "value")):
            rules += dense(f"{ours}/attn/{name}", f"{theirs}.attention.attention.{word}")
        rules += dense(f"{ours}/attn/out", f"{theirs}.attention.output.dense")
        rules += _block(ours, theirs, "layer_scale{}.lambda1", "weights_in", "weights_out")
    return rules


def hub_rules(arch: Mapping[str, Any]) -> list[Rule]:
    """The rules of Meta's files."""
    rules = [
        Rule("class_token", "cls_token", leading(2)),
        Rule("position", "pos_embed", leading(1)),
        Rule("registers", "register_tokens", leading(1)),
        *conv("patch", "patch_embed.proj"),
        *norm("ln_final", "norm"),
    ]
    for i in range(arch["layers"]):
        ours, theirs = f"block_{i}", f"blocks.{i}"
        rules += fused_dense([f"{ours}/attn/{name}" for name in "qkv"], f"{theirs}.attn.qkv")
        rules += dense(f"{ours}/attn/out", f"{theirs}.attn.proj")
        rules += _block(ours, theirs, "ls{}.gamma", "w12", "w3")
    return rules


def _block(ours: str, theirs: str, scale: str, fused: str, last: str) -> list[Rule]:
    """The rules that both layouts share: norms, scales, MLP, or SwiGLU with gate and up as one."""
    rules = fused_dense(
        [f"{ours}/mlp/gate", f"{ours}/mlp/up"], f"{theirs}.mlp.{fused}", then=LINEAR
    )
    rules += dense(f"{ours}/mlp/down", f"{theirs}.mlp.{last}")
    rules += dense(f"{ours}/mlp/fc", f"{theirs}.mlp.fc1")
    rules += dense(f"{ours}/mlp/proj", f"{theirs}.mlp.fc2")
    for side in (1, 2):
        rules += norm(f"{ours}/ln_{side}", f"{theirs}.norm{side}")
        rules.append(Rule(f"{ours}/scale_{side}", f"{theirs}.{scale.format(side)}", layout.COPY))
    return rules
