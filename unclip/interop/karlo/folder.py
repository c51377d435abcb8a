"""Karlo in diffusers' folder layout, into a bundle and back: `--from karlo`, `--to diffusers`.

Karlo v1 alpha is a public unCLIP: CLIP ViT-L/14, a diffusion prior, a decoder of 64 x 64 pictures
whose conditions are in a module of their own, and an upsampler to 256 x 256 with a second network
for its last step. A folder holds one subfolder per network, whose `config.json` gives the
architecture, and one `scheduler_config.json` for each of the three diffusions.

Karlo's own checkpoint files are read by `karlo.original`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from unclip import errors, files, tasks
from unclip.cascade import bundle
from unclip.files import tensors
from unclip.input.decode import text
from unclip.interop import clip, layout, weights
from unclip.interop.karlo import config as karlo_config
from unclip.interop.karlo import networks as karlo_networks
from unclip.interop.karlo import original as karlo_original
from unclip.interop.karlo.classes import VERSION
from unclip.models.clip import CLIP
from unclip.models.transformer import unstack_blocks
from unclip.models.unet import unfold_params

PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")
UPSAMPLERS = {"upsampler_0": "super_res_first", "upsampler_0_last": "super_res_last"}
# The components of a pipeline, by subfolder: [library, class], as in its model_index.json.
COMPONENTS = {
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
    "prior": ("diffusers", "PriorTransformer"),
    "prior_scheduler": ("diffusers", "UnCLIPScheduler"),
    "text_proj": ("unclip", "UnCLIPTextProjModel"),
    "decoder": ("diffusers", "UNet2DConditionModel"),
    "decoder_scheduler": ("diffusers", "UnCLIPScheduler"),
    "super_res_first": ("diffusers", "UNet2DModel"),
    "super_res_last": ("diffusers", "UNet2DModel"),
    "super_res_scheduler": ("diffusers", "UnCLIPScheduler"),
}
# The pipeline that model_index.json names, by the components that it can do without.
_LACKS = {
    "UnCLIPPipeline": {"image_encoder", "feature_extractor"},
    "UnCLIPImageVariationPipeline": {"prior", "prior_scheduler"},
}


def read(paths: list[pathlib.Path], options: Mapping[str, Any]) -> dict[str, bundle.Part]:
    """The parts of Karlo, tensors unread.

    Args:
      paths: folders of UnCLIPPipeline or UnCLIPImageVariationPipeline, a network being taken from
        the first that has it; or Karlo's own checkpoints, their folder or the files.
      options: none apply.

    Returns:
      "clip", "prior", "decoder", "upsampler_0", "upsampler_0_last": those that are there.

    Raises:
      ConfigError: an architecture or noise schedule that ours do not have, or tensors that are not
        the architecture's (with their table).
      DataError: nothing there, or files that cannot be read.
    """
    if options.get("preset"):
        raise errors.ConfigError("--preset: Karlo's files give the architecture")
    if karlo_original.is_original(paths):
        return karlo_original.read(paths)
    for path in paths:
        if (path / "model_index.json").is_file():
            name = files.read_object(path / "model_index.json").get("_class_name")
            if name not in PIPELINES:
                raise errors.ConfigError(f"{path} is a {name}; expected {' or '.join(PIPELINES)}")
    found = {
        name: next((p / name for p in paths if (p / name / "config.json").is_file()), None)
        for name in COMPONENTS
    }
    if not any(found.values()):
        listed, expected = (", ".join(map(str, names)) for names in (paths, COMPONENTS))
        raise errors.DataError(f"{listed}: no Karlo there; expected subfolders {expected}")
    parts = {}
    towers = [found[name] for name in ("text_encoder", "image_encoder") if found[name]]
    if towers:
        parts |= clip.read_hf(towers, {})
    if found["prior"]:
        parts["prior"] = prior_part(found["prior"])
    if found["decoder"] or found["text_proj"]:
        parts["decoder"] = decoder_part(found["decoder"], found["text_proj"])
    if found["super_res_first"] or found["super_res_last"]:
        size = parts["decoder"].settings["image_size"] if "decoder" in parts else None
        parts |= upsampler_parts(found["super_res_first"], found["super_res_last"], size)
    karlo_networks.check_widths(parts)
    return parts


def prior_part(folder: pathlib.Path, schedule: str = "prior_scheduler") -> bundle.Part:
    """The prior of a folder prior/, with the folder of its noise schedule beside it.

    Raises:
      ConfigError: an option or noise schedule that ours does not have, or other tensors.
    """
    arch = karlo_config.prior_arch(*_config(folder))
    settings = karlo_config.prior_settings(*_scheduler(folder, schedule))
    params = layout.take(
        karlo_networks.prior_rules(arch["layers"]),
        _tensors(folder),
        karlo_networks.prior_shapes(arch),
        what=str(folder),
    )
    return bundle.Part("prior", arch, params, params.pop("statistics"), settings)


def decoder_part(folder: pathlib.Path | None, text_proj: pathlib.Path | None) -> bundle.Part:
    """The decoder of folders decoder/ and text_proj/, with the decoder_scheduler/ beside them.

    Raises:
      ConfigError: one of the two is missing, an option or noise schedule that ours does not have,
        or other tensors.
    """
    if folder is None or text_proj is None:
        absent = "decoder" if folder is None else "text_proj"
        raise errors.ConfigError(f"{folder or text_proj} without {absent}: a decoder is both")
    config, where = _config(folder)
    arch, embed_dim = karlo_config.decoder_arch(config, _config(text_proj)[0], where)
    size = karlo_config.image_size(config, where)
    found = _scheduler(folder, "decoder_scheduler")
    settings = karlo_config.decoder_settings(arch, size, *found)
    source = {f"decoder.{n}": tensor for n, tensor in _tensors(folder).items()}
    source |= {f"text_proj.{n}": tensor for n, tensor in _tensors(text_proj).items()}
    params = layout.take(
        karlo_networks.decoder_rules(len(arch["multipliers"]), arch["blocks"]),
        source,
        karlo_networks.decoder_shapes(arch, embed_dim, embed_dim),
        what=f"{folder} and {text_proj}",
    )
    return bundle.Part("decoder", arch, params, {}, settings)


def upsampler_parts(
    first: pathlib.Path | None, last: pathlib.Path | None, low: int | None
) -> dict[str, bundle.Part]:
    """The upsampler of a folder super_res_first/, and super_res_last/ for its last step if given.

    Args:
      low: side of the pictures it is given, pixels; None takes a quarter of its own.

    Raises:
      ConfigError: no first network, an option or noise schedule that ours does not have, or other
        tensors.
    """
    if first is None:
        raise errors.ConfigError(f"{last} without super_res_first: it makes the last step alone")
    config, where = _config(first)
    size = karlo_config.image_size(config, where)
    found, parts, shapes = _scheduler(first, "super_res_scheduler"), {}, {}
    for name, folder in zip(UPSAMPLERS, (first, last)):
        if folder is None:
            continue
        arch = karlo_config.upsampler_arch(*_config(folder))
        if "upsampler_0" not in parts or arch != parts["upsampler_0"].arch:
            shapes = karlo_networks.upsampler_shapes(arch)
        params = layout.take(
            karlo_networks.unet_rules(len(arch["multipliers"]), arch["blocks"]),
            _tensors(folder),
            shapes,
            what=str(folder),
        )
        settings = karlo_config.upsampler_settings(arch, size, low or size // 4, *found)
        parts[name] = bundle.Part(name, arch, params, {}, settings)
    return parts


def _config(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    """A network's config.json, and what to call it in messages."""
    path = folder / "config.json"
    return files.read_object(path), str(path)


def _tensors(folder: pathlib.Path) -> dict[str, tensors.Lazy]:
    """A network's tensors under their own names."""
    mark = karlo_networks.MARKS[folder.name]
    return layout.unwrapped(weights.open_weights(folder), (mark,), str(folder))


def _scheduler(folder: pathlib.Path, name: str) -> tuple[dict[str, Any], str]:
    """A noise schedule's config beside a network's folder, and what to call it in messages."""
    path = folder.parent / name / "scheduler_config.json"
    return karlo_config.scheduler(files.read_object(path), str(path)), str(path)


def write(parts: Mapping[str, bundle.Part], out: pathlib.Path) -> None:
    """Writes the parts as folders that diffusers and transformers open, and their index.

    A tower that CLIP lacks and parts that are missing are left out; an upsampler with one network
    is written as both. `model_index.json` is written when the parts make a whole pipeline. This
    layout does not store CLIP's temperature, the steps and guidance of a draw, and settings that
    only training reads.

    Args:
      parts: arrays or `tensors.Lazy`.
      out: the folder, made when missing.

    Raises:
      ConfigError: a part, field or setting that the layout has no place for.
      DataError: the folder cannot be written.
    """
    strangers = parts.keys() - {"clip", "prior", "decoder", *UPSAMPLERS}
    if strangers or not parts:
        listed = ", ".join(sorted(strangers)) or "nothing"
        raise errors.ConfigError(
            f"Karlo's layout has clip, prior, decoder, upsampler_0; it has no place for {listed}"
        )
    # All is checked before anything is written.
    folders: dict[str, tuple[Any, Any]] = {}
    for name, describe in (("clip", _clip), ("prior", _prior), ("decoder", _decoder)):
        if name in parts:
            folders |= describe(parts[name])
    folders |= _upsamplers(parts)
    karlo_networks.check_widths(parts)
    for name, (config, content) in folders.items():
        if name == "tokenizer":
            clip.write_tokenizer(out / name, "!", content)
        elif name.endswith("scheduler"):
            clip.write_json(out / name / "scheduler_config.json", config)
        elif name == "feature_extractor":
            clip.write_json(out / name / "preprocessor_config.json", config)
        else:
            file = "model" if name.endswith("encoder") else "diffusion_pytorch_model"
            tensors.write(out / name / f"{file}.safetensors", content, {"format": "pt"})
            clip.write_json(out / name / "config.json", config)
    for pipeline, lacks in _LACKS.items():
        if COMPONENTS.keys() - folders.keys() <= lacks:
            index = {name: list(COMPONENTS[name]) for name in COMPONENTS if name in folders}
            header = {"_class_name": pipeline, "_diffusers_version": VERSION}
            clip.write_json(out / "model_index.json", header | index)
            return


# Each of the following returns {subfolder: (its config, its tensors)} of a part.


def _clip(part: bundle.Part) -> dict[str, tuple[Any, Any]]:
    module = CLIP(**tasks.arguments(part.arch))
    if module.activation not in ("gelu", "quick_gelu"):
        raise errors.ConfigError(f"CLIP has activation {module.activation!r}; no CLIPModel has")
    if module.text_layers and module.vocab_size != text.VOCAB_SIZE:
        raise errors.ConfigError(
            f"CLIP has a vocabulary of {module.vocab_size}; the tokenizer has {text.VOCAB_SIZE}"
        )
    config, params, out = clip.hf_config(module), unstack_blocks(part.params), {}
    for side, folder in (("text", "text_encoder"), ("vision", "image_encoder")):
        if not getattr(module, f"{side}_layers"):
            continue
        content = layout.give(clip.hf_rules(vars(module)), {side: params[side]})
        about = {"architectures": [COMPONENTS[folder][1]], "torch_dtype": _dtype(content)}
        out[folder] = (config[f"{side}_config"] | about, content)
    if module.text_layers:
        out["tokenizer"] = (None, module.context)
    if module.vision_layers:
        out["feature_extractor"] = (clip.image_processor(module.image_size), None)
    return out


def _prior(part: bundle.Part) -> dict[str, tuple[Any, Any]]:
    config, schedule = karlo_config.prior_config(part)
    params = unstack_blocks(part.params) | {"statistics": part.extra}
    content = layout.give(karlo_networks.prior_rules(config["num_layers"]), params)
    return {"prior": (config, content), "prior_scheduler": (schedule, None)}


def _decoder(part: bundle.Part) -> dict[str, tuple[Any, Any]]:
    config, text_proj, schedule = karlo_config.decoder_config(part)
    levels, blocks = len(config["block_out_channels"]), config["layers_per_block"]
    rules = karlo_networks.decoder_rules(levels, blocks)
    content = layout.give(rules, unfold_params(part.params))
    return {
        "decoder": (config, layout.prefixed(content, "decoder.")),
        "text_proj": (text_proj, layout.prefixed(content, "text_proj.")),
        "decoder_scheduler": (schedule, None),
    }


def _upsamplers(parts: Mapping[str, bundle.Part]) -> dict[str, tuple[Any, Any]]:
    if "upsampler_0" not in parts:
        if "upsampler_0_last" in parts:
            raise errors.ConfigError("upsampler_0_last without upsampler_0: it makes a last step")
        return {}
    out = {}
    for name, folder in UPSAMPLERS.items():
        part = parts.get(name, parts["upsampler_0"])
        config, schedule = karlo_config.upsampler_config(part)
        levels, blocks = len(config["block_out_channels"]), config["layers_per_block"]
        rules = karlo_networks.unet_rules(levels, blocks)
        out[folder] = (config, layout.give(rules, unfold_params(part.params)))
        out.setdefault("super_res_scheduler", (schedule, None))
    return out


def _dtype(content: Mapping[str, tensors.Lazy]) -> str:
    return next(iter(content.values())).dtype.name
