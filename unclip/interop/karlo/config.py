"""Karlo's config files: how diffusers describes the networks of unCLIP, in both directions.

Karlo v1 alpha is stored as a `PriorTransformer`, a `UNet2DConditionModel` with its
`UnCLIPTextProjModel`, two `UNet2DModel` and three `UnCLIPScheduler`. The options of these classes
that our networks have too are translated, for any widths and depth. Every other option must have
the value it has in Karlo.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from unclip import errors, tasks
from unclip.cascade import bundle
from unclip.interop.karlo.classes import (
    DECODER,
    PRIOR,
    SCHEDULER,
    TEXT_PROJ,
    UPSAMPLER,
)
from unclip.models import decoder as decoder_model
from unclip.models import prior as prior_model
from unclip.models import unet
from unclip.models import upsampler as upsampler_model

KARLO_CLAMP = 10.0  # Karlo's own code; the scheduler_config.json of its diffusers folder says 5
MAX_LAYERS = 1000
MAX_LEVELS = 12
_DOWN = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}
_UP = {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True}
_UNET_FIELDS = (
    "channels", "multipliers", "blocks", "attention", "out_channels", "time_dim", "scale_shift",
    "groups", "dropout",
)  # fmt: skip
# Options of how a network is computed, which do not change its result.
_COMPUTE = ("dtype", "remat", "fold", "attention_impl", "parent", "name")
_PREDICTS = {"epsilon": "eps", "sample": "x0"}
_VARIANCES = {"fixed_small_log": "fixed_small", "learned_range": "learned_range"}


def prior_arch(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keyword arguments of `models.prior.DiffusionPrior`.

    Args:
      config: of a PriorTransformer; where: names it in messages.

    Raises:
      ConfigError: an option that the network does not have.
    """
    options = PRIOR.options(config, where)
    heads = _size(options, "num_attention_heads", where)
    head_dim = _size(options, "attention_head_dim", where)
    embed_dim = _size(options, "embedding_dim", where)
    for name, only in (
        ("time_embed_dim", heads * head_dim),
        ("embedding_proj_dim", embed_dim),
        ("clip_embed_dim", embed_dim),
    ):
        if options[name] not in (None, only):
            raise errors.ConfigError(f"{where}: {name}={options[name]!r}; expected {only}")
    return dict(
        embed_dim=embed_dim,
        context=_size(options, "num_embeddings", where),
        text_width=embed_dim,
        width=heads * head_dim,
        layers=_size(options, "num_layers", where, MAX_LAYERS),
        heads=heads,
        head_dim=head_dim,
        norm_in=_choice(options, "norm_in_type", {None: False, "layer": True}, where),
        dtype="float32",
    )


def decoder_arch(
    config: Mapping[str, Any], text_proj: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], int]:
    """Keyword arguments of `models.decoder.Decoder`, and the width of CLIP's embeddings.

    Args:
      config: of a UNet2DConditionModel; text_proj: of its UnCLIPTextProjModel.

    Raises:
      ConfigError: an option that the network does not have, or two configs that do not fit.
    """
    options = DECODER.options(config, where)
    arch = _unet_arch(options, where)
    arch |= dict(
        head_dim=_size(options, "attention_head_dim", where),
        context_dim=_size(options, "cross_attention_dim", where),
    )
    projection = TEXT_PROJ.options(text_proj, f"{where}'s text_proj")
    for name, wanted in (
        ("time_embed_dim", arch["time_dim"] or 4 * arch["channels"]),
        ("cross_attention_dim", arch["context_dim"]),
    ):
        if projection[name] != wanted:
            raise errors.ConfigError(
                f"{where}'s text_proj has {name}={projection[name]!r}; the decoder has {wanted}"
            )
    return arch, _size(projection, "clip_embeddings_dim", where)


def upsampler_arch(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keyword arguments of `models.upsampler.Upsampler` from those of a UNet2DModel.

    Raises:
      ConfigError: an option that the network does not have.
    """
    arch = _unet_arch(UPSAMPLER.options(config, where), where)
    if any(arch["attention"]):
        raise errors.ConfigError(f"{where}: down_block_types with attention: not supported")
    return arch | {"mid_attention": False}


def _unet_arch(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of `models.unet.UNet` that both of diffusers' U-Nets give."""
    name = "block_out_channels"
    widths = [_size({name: w}, name, where) for w in _list(options, name, where)]
    channels = widths[0]
    down, up = (
        [_choice({kind: given}, kind, known, where) for given in _list(options, kind, where)]
        for kind, known in (("down_block_types", _DOWN), ("up_block_types", _UP))
    )
    if down != up[::-1] or len(down) != len(widths):
        raise errors.ConfigError(
            f"{where}: down_block_types, up_block_types and block_out_channels; expected one per "
            "level, and attention on the way up where there is attention on the way down"
        )
    time_dim = options["time_embedding_dim"]
    shift = {"default": False, "scale_shift": True}
    return dict(
        channels=channels,
        multipliers=multipliers(widths),
        blocks=_size(options, "layers_per_block", where, MAX_LAYERS),
        attention=tuple(down),
        out_channels=_choice(options, "out_channels", {3: 3, 6: 6}, where),
        time_dim=time_dim and _size(options, "time_embedding_dim", where),
        scale_shift=_choice(options, "resnet_time_scale_shift", shift, where),
        groups=_size(options, "norm_num_groups", where),
        norm_eps=_number(options, "norm_eps", where),
        dropout=_number(options, "dropout", where),
        dtype="float32",
    )


def multipliers(widths: Sequence[int]) -> tuple[float, ...]:
    """`models.unet.UNet.multipliers` of the levels' widths: whole numbers where they are."""
    first = widths[0]
    return tuple(width / first if width % first else width // first for width in widths)


def scheduler(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """{"parametrisation", "variance", "clamp"} of an UnCLIPScheduler's config; clamp 0.0: off.

    Raises:
      ConfigError: another scheduler, or an option that `unclip.diffusion` does not have.
    """
    options = SCHEDULER.options(config, where)
    clamp = _number(options, "clip_sample_range", where) if options["clip_sample"] else 0.0
    return {
        "parametrisation": _choice(options, "prediction_type", _PREDICTS, where),
        "variance": _choice(options, "variance_type", _VARIANCES, where),
        "clamp": clamp,
    }


def prior_settings(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a prior part; `found` is what `scheduler` gave.

    Raises:
      ConfigError: a prior that does not predict z_i itself with the fixed variance.
    """
    expected = {"parametrisation": "x0", "variance": "fixed_small"}
    if found | expected != dict(found):
        raise errors.ConfigError(
            f"{where}: expected prediction_type 'sample' and variance_type 'fixed_small_log'"
        )
    return {
        "kind": "diffusion",
        "noise_schedule": "cosine",
        "embedding": "whiten",
        "clamp": found["clamp"],
        "text_drop": 0.2,
        "draw": {"steps": 25, "guidance": 4.0, "sampler": "ddpm", "eta": 0.0, "candidates": 1},
    }


def decoder_settings(
    arch: Mapping[str, Any], image_size: int, found: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The settings of a decoder part; the fractions of dropped conditions are Karlo's.

    Args:
      arch: of the network; found: what `scheduler` gave for `where`.

    Raises:
      ConfigError: a noise schedule that does not fit the network.
    """
    draw = {"steps": 25, "guidance": 8.0, "sampler": "ddpm", "eta": 0.0, "threshold": "static"}
    return {
        "image_size": image_size,
        **_picture_settings(arch, found, where),
        "z_scale": 0.0,
        "image_drop": 0.1,
        "text_drop": 0.3,
        "draw": draw,
    }


def upsampler_settings(
    arch: Mapping[str, Any], image_size: int, low: int, found: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The settings of an upsampler from `low` to `image_size` pixels; else as `decoder_settings`.

    Raises:
      ConfigError: also sizes that do not divide.
    """
    if image_size % low:
        raise errors.ConfigError(
            f"super_res_first draws {image_size} pixels, the decoder {low}: expected a multiple"
        )
    return {
        "image_size": image_size,
        "factor": image_size // low,
        "crop": image_size // 4,
        **_picture_settings(arch, found, where),
        "draw": {"steps": 7, "sampler": "ddpm", "eta": 0.0},
    }


def _picture_settings(arch, found, where):
    if found["clamp"] != 1.0:
        raise errors.ConfigError(
            f"{where}: clips x_0 to {found['clamp'] or 'nothing'}; pictures are clipped to 1.0"
        )
    if (found["variance"] == "learned_range") != (arch["out_channels"] == 6):
        raise errors.ConfigError(
            f"{where}: variance {found['variance']} for a network of {arch['out_channels']} "
            "channels; expected learned_range with 6, fixed_small_log with 3"
        )
    names = ("parametrisation", "variance")
    return {"noise_schedule": "cosine", "vlb_weight": 1.0, "min_snr": 0.0} | {
        n: found[n] for n in names
    }


def image_size(config: Mapping[str, Any], where: str) -> int:
    """Side in pixels of the pictures a U-Net draws."""
    return _size({"sample_size": None} | dict(config), "sample_size", where)


def prior_config(part: bundle.Part) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json of a PriorTransformer, and of its scheduler.

    Raises:
      ConfigError: a field or setting that they do not have.
    """
    expected = {"kind": "diffusion", "noise_schedule": "cosine", "embedding": "whiten"}
    _check_settings(part, PRIOR.name, expected)
    module = prior_model.DiffusionPrior(**tasks.arguments(part.arch))
    translated = ("embed_dim", "context", "width", "layers", "heads", "head_dim", "norm_in")
    _check_fields(module, PRIOR.name, (*translated, "text_width"))
    if module.text_width != module.embed_dim:
        raise errors.ConfigError(
            f"the prior has text_width={module.text_width}, embed_dim={module.embed_dim}: "
            f"{PRIOR.name} has one width for both"
        )
    config = PRIOR.config(
        num_attention_heads=module.heads,
        attention_head_dim=module.width // module.heads,
        num_layers=module.layers,
        embedding_dim=module.embed_dim,
        num_embeddings=module.context,
        norm_in_type="layer" if module.norm_in else None,
    )
    clamp = part.settings.get("clamp", KARLO_CLAMP)
    schedule = SCHEDULER.config(
        prediction_type="sample", clip_sample=bool(clamp), clip_sample_range=float(clamp or 1.0)
    )
    return config, schedule


def decoder_config(
    part: bundle.Part,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The config.json of a UNet2DConditionModel, its UnCLIPTextProjModel and their scheduler.

    Raises:
      ConfigError: a field or setting that they do not have.
    """
    module = decoder_model.Decoder(**tasks.arguments(part.arch))
    # Without a text transformer of its own, the fields of one have no meaning.
    unused = ("text_heads", "text_context", "vocab")
    _check_fields(module, DECODER.name, (*_UNET_FIELDS, "head_dim", "context_dim", *unused))
    params = part.params["text_proj"]
    embed_dim, text_width = (
        params[name]["kernel"].shape[0] for name in ("image_time", "text_tokens")
    )
    if text_width != embed_dim:
        raise errors.ConfigError(
            f"the decoder reads hidden states of {text_width} and embeddings of {embed_dim}: "
            f"{TEXT_PROJ.name} has one width for both"
        )
    _check_settings(part, DECODER.name, {"noise_schedule": "cosine", "z_scale": 0.0})
    config = DECODER.config(
        **_unet_config(module, part),
        down_block_types=_block_types(_DOWN, module.attention),
        up_block_types=_block_types(_UP, module.attention[::-1]),
        attention_head_dim=module.head_dim,
        cross_attention_dim=module.context_dim,
    )
    text_proj = TEXT_PROJ.config(
        clip_embeddings_dim=embed_dim,
        time_embed_dim=module.time_dim or 4 * module.channels,
        cross_attention_dim=module.context_dim,
    )
    return config, text_proj, _picture_schedule(part)


def upsampler_config(part: bundle.Part) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json of a UNet2DModel, and of its scheduler.

    Raises:
      ConfigError: a field or setting that they do not have.
    """
    module = upsampler_model.Upsampler(**tasks.arguments(part.arch))
    _check_fields(module, UPSAMPLER.name, (*_UNET_FIELDS, "norm_eps", "head_dim"))
    if any(module.attention):
        raise errors.ConfigError(f"the {part.kind} has attention; in Karlo's layout it has none")
    _check_settings(part, UPSAMPLER.name, {"noise_schedule": "cosine"})
    config = UPSAMPLER.config(
        **_unet_config(module, part),
        down_block_types=_block_types(_DOWN, module.attention),
        up_block_types=_block_types(_UP, module.attention),
        norm_eps=module.norm_eps,
    )
    return config, _picture_schedule(part)


def _unet_config(module: unet.UNet, part: bundle.Part) -> dict[str, Any]:
    if module.multipliers[0] != 1:
        raise errors.ConfigError(
            f"the {part.kind} has multipliers={module.multipliers}; diffusers' begin with 1"
        )
    return dict(
        sample_size=part.settings["image_size"],
        block_out_channels=module.widths(),
        layers_per_block=module.blocks,
        out_channels=module.out_channels,
        time_embedding_dim=module.time_dim,
        resnet_time_scale_shift="scale_shift" if module.scale_shift else "default",
        norm_num_groups=module.groups,
        dropout=module.dropout,
    )


def _picture_schedule(part: bundle.Part) -> dict[str, Any]:
    predicts, variances = ({v: k for k, v in t.items()} for t in (_PREDICTS, _VARIANCES))
    usual = "learned_range" if part.kind == "decoder" else "fixed_small"
    given = {"parametrisation": "eps", "variance": usual} | part.settings
    where = f"the {part.kind}'s settings"
    return SCHEDULER.config(
        prediction_type=_choice(given, "parametrisation", predicts, where),
        variance_type=_choice(given, "variance", variances, where),
    )


def _block_types(names: Mapping[str, bool], attention: Sequence[bool]) -> list[str]:
    by_attention = {attends: name for name, attends in names.items()}
    return [by_attention[attends] for attends in attention]


def _check_fields(module: Any, name: str, translated: Collection[str]) -> None:
    """Refuses a field of ours, not at its default, for which a class of diffusers has no option."""
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name not in (*translated, *_COMPUTE) and value != field.default:
            raise errors.ConfigError(
                f"{type(module).__name__} has {field.name}={value!r}: {name} in diffusers has no "
                f"such option; expected {field.default!r}"
            )


def _check_settings(part: bundle.Part, name: str, expected: Mapping[str, Any]) -> None:
    draw = part.settings.get("draw", {})
    given = {"threshold": draw.get("threshold", "static")} | tasks.current_names(part.settings)
    for key, value in ({"threshold": "static"} | expected).items():
        if given.get(key, value) != value:
            raise errors.ConfigError(
                f"the {part.kind} has {key}={given[key]!r}: {name} and UnCLIPScheduler in "
                f"diffusers have only {value!r}"
            )


def _size(options: Mapping[str, Any], name: str, where: str, most: int = 1 << 20) -> int:
    """A whole number above zero; also from a list of equal ones, one per level."""
    value = options[name]
    if isinstance(value, (list, tuple)) and len(set(map(repr, value))) == 1:
        value = value[0]
    if type(value) is not int or not 1 <= value <= most:
        raise errors.ConfigError(
            f"{where}: {name}={options[name]!r}; expected one whole number, 1 to {most}"
        )
    return value


def _number(options: Mapping[str, Any], name: str, where: str) -> float:
    value = options[name]
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise errors.ConfigError(f"{where}: {name}={value!r}; expected a number from 0")
    return float(value)


def _list(options: Mapping[str, Any], name: str, where: str) -> Sequence[Any]:
    values = options[name]
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= MAX_LEVELS:
        raise errors.ConfigError(f"{where}: {name}={values!r}; expected a list, one per level")
    return values


def _choice(options: Mapping[str, Any], name: str, choices: Mapping[Any, Any], where: str) -> Any:
    value = options[name]
    if isinstance(value, (list, dict)) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise errors.ConfigError(f"{where}: {name}={value!r}; expected one of {expected}")
    return choices[value]
