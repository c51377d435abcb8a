"""CLIP of OpenAI, OpenCLIP and Hugging Face into a bundle, and a bundle's CLIP for transformers.

OpenAI and OpenCLIP name tensors alike and fuse queries, keys and values; transformers stores them
separately and gives the whole architecture in its config. A tower is under "vision" or "text" of
our parameters; a source with one tower gives a CLIP whose other tower has 0 layers.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from unclip import errors, files, tasks
from unclip.cascade import bundle
from unclip.files import tensors
from unclip.input.decode import text
from unclip.interop import layout, published, weights
from unclip.interop.layout import COPY, Rule, dense, norm
from unclip.models import clip as model
from unclip.models.transformer import unstack_blocks

# Buffers of transformers before 4.31, which hold only the numbers 0, 1, 2, ...
HF_IGNORE = (
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
)
MARKS = {
    "text": "text_model.embeddings.token_embedding.weight",
    "vision": "vision_model.embeddings.class_embedding",
}
# A source with one tower stores no temperature: OpenAI's CLIPs, like most, were trained up to this
# cap.
LOGIT_SCALE = np.float32(np.log(model.MAX_LOGIT_SCALE))
NO_VISION = dict(image_size=224, patch_size=14, vision_width=0, vision_layers=0, vision_heads=0)
MAX_LAYERS = 1000
NO_TEXT = dict(text_width=0, text_layers=0, text_heads=0)

# The defaults of transformers for fields that a config lacks (CLIPTextConfig, CLIPVisionConfig).
_HF_COMMON = dict(num_hidden_layers=12, hidden_act="quick_gelu", layer_norm_eps=1e-5)
_HF_TEXT = _HF_COMMON | dict(
    vocab_size=49408, hidden_size=512, intermediate_size=2048, num_attention_heads=8,
    max_position_embeddings=77, eos_token_id=49407,
)  # fmt: skip
_HF_VISION = _HF_COMMON | dict(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_channels=3,
    image_size=224, patch_size=32,
)  # fmt: skip
_PROJECTION_DIM = 512


def hf_arch(
    text_config: Mapping[str, Any] | None, vision_config: Mapping[str, Any] | None, embed_dim: int
) -> dict[str, Any]:
    """Keyword arguments of `models.clip.CLIP` from the configs of transformers' two towers.

    Args:
      text_config: of CLIPTextConfig, fields at their defaults may be left out; None = no tower.
      vision_config: of CLIPVisionConfig, likewise.
      embed_dim: D, the `projection_dim` that applies.

    Raises:
      ConfigError: an option that `models.clip.CLIP` does not have.
    """
    arch: dict[str, Any] = {"embed_dim": embed_dim, **NO_VISION, **NO_TEXT}
    activations = set()
    for side, given, defaults in (
        ("text", text_config, _HF_TEXT),
        ("vision", vision_config, _HF_VISION),
    ):
        if given is None:
            continue
        # A null is a default too: old files hold nulls for fields that later got one.
        config = defaults | {k: v for k, v in given.items() if v is not None}
        activations.add(config["hidden_act"])
        only(f"{side} layer_norm_eps", config["layer_norm_eps"], 1e-5)
        arch |= {
            f"{side}_width": config["hidden_size"],
            f"{side}_layers": config["num_hidden_layers"],
            f"{side}_heads": config["num_attention_heads"],
        }
        if side == "text":
            only("text intermediate_size", config["intermediate_size"], 4 * config["hidden_size"])
            # Old configs hold 2; transformers then takes the highest id for the end, as we do.
            end = number("vocab_size", config["vocab_size"]) - 1
            if config["eos_token_id"] not in (2, end):
                raise errors.ConfigError(
                    f"CLIP's eos_token_id is {config['eos_token_id']}; expected 2 or the last of "
                    f"the vocabulary, {end}"
                )
            arch["context"] = config["max_position_embeddings"]
            arch["vocab_size"] = config["vocab_size"]
        else:
            only("num_channels", config["num_channels"], 3)
            arch["image_size"] = square("image_size", config["image_size"])
            arch["patch_size"] = square("patch_size", config["patch_size"])
            if config["intermediate_size"] != 4 * config["hidden_size"]:
                arch["vision_mlp_width"] = config["intermediate_size"]
    if not activations <= {"quick_gelu", "gelu"} or len(activations) > 1:
        raise errors.ConfigError(
            f"CLIP's hidden_act is {' and '.join(sorted(activations))}; expected quick_gelu or "
            "gelu, one for both towers"
        )
    return checked(arch | {"activation": activations.pop()})


def hf_rules(arch: Mapping[str, Any]) -> list[Rule]:
    """The rules of transformers' CLIPModel; a model with one projected tower is a part of them."""
    rules = [Rule("logit_scale", "logit_scale", COPY)]
    if arch["vision_layers"]:
        at = "vision_model.embeddings."
        rules += [
            Rule("vision/class_token", f"{at}class_embedding", COPY),
            Rule("vision/patch/kernel", f"{at}patch_embedding.weight", layout.CONV),
            Rule("vision/position", f"{at}position_embedding.weight", COPY),
            *norm(
                "vision/ln_pre", "vision_model.pre_layrnorm"
            ),  # spelled like this in transformers
            *norm("vision/ln_post", "vision_model.post_layernorm"),
            *dense("vision/proj", "visual_projection", bias=False),
        ]
    if arch["text_layers"]:
        at = "text_model.embeddings."
        rules += [
            Rule("text/token/embedding", f"{at}token_embedding.weight", COPY),
            Rule("text/position", f"{at}position_embedding.weight", COPY),
            *norm("text/ln_final", "text_model.final_layer_norm"),
            *dense("text/proj", "text_projection", bias=False),
        ]
    for side in ("vision", "text"):
        for i in range(arch[f"{side}_layers"]):
            ours = f"{side}/transformer/block_{i}"
            theirs = f"{side}_model.encoder.layers.{i}"
            for name in ("q", "k", "v", "out"):
                rules += dense(f"{ours}/attn/{name}", f"{theirs}.self_attn.{name}_proj")
            rules += norm(f"{ours}/ln_1", f"{theirs}.layer_norm1")
            rules += norm(f"{ours}/ln_2", f"{theirs}.layer_norm2")
            rules += dense(f"{ours}/mlp/fc", f"{theirs}.mlp.fc1")
            rules += dense(f"{ours}/mlp/proj", f"{theirs}.mlp.fc2")
    return rules


def read_hf(paths: list[pathlib.Path], options: dict) -> dict[str, bundle.Part]:
    """{"clip": part} from folders of transformers.

    Args:
      paths: a CLIPModel's folder, or one or both of a CLIPTextModelWithProjection's and a
        CLIPVisionModelWithProjection's.
      options: none apply.

    Raises:
      ConfigError: another architecture, or tensors that do not fit (with their table).
      DataError: files that are missing or damaged.
    """
    if options.get("preset"):
        raise errors.ConfigError("--preset: transformers' config.json gives the architecture")
    configs, source, scaled, width = {}, {}, False, None
    for path in paths:
        found, embed_dim = hf_configs(files.read_object(path / "config.json"), str(path))
        again = configs.keys() & found.keys()
        if again or width not in (None, embed_dim):
            what = f"a second {min(again)} tower" if again else f"a projection to {embed_dim}"
            raise errors.ConfigError(f"{path} holds {what}; expected towers of one CLIP")
        configs, width, scaled = configs | found, embed_dim, scaled or len(found) == 2
        source |= layout.unwrapped(
            weights.open_weights(path), [MARKS[side] for side in found], str(path)
        )
    what = " and ".join(map(str, paths))
    part = hf_part(configs.get("text"), configs.get("vision"), width, source, what, scaled=scaled)
    return {"clip": stamped(part, weights.find(paths[0]) if len(paths) == 1 else None)}


def hf_configs(config: Mapping[str, Any], what: str) -> tuple[dict[str, dict], int]:
    """({"text": config, "vision": config}, D) of what a config.json describes, one or both.

    Raises:
      ConfigError: it does not describe a CLIP.
    """
    kind = config.get("model_type")
    embed_dim = config.get("projection_dim") or _PROJECTION_DIM
    if kind == "clip":
        # Early files hold a tower's options as text_config_dict, which then takes precedence.
        towers = {}
        for side in ("text", "vision"):
            given = (config.get(f"{side}_config_dict"), config.get(f"{side}_config"), {})
            towers[side] = next(options for options in given if options is not None)
            if not isinstance(towers[side], dict):
                raise errors.ConfigError(f"{what}: config.json has no readable {side}_config")
        return towers, embed_dim
    for side in ("text", "vision"):
        if kind == f"clip_{side}_model":
            return {side: dict(config)}, embed_dim
    raise errors.ConfigError(f"{what}: config.json describes model_type {kind!r}; expected 'clip'")


def hf_part(
    text_config: Mapping[str, Any] | None,
    vision_config: Mapping[str, Any] | None,
    embed_dim: int,
    source: Mapping[str, tensors.Lazy],
    what: str,
    *,
    scaled: bool = False,
) -> bundle.Part:
    """A CLIP part from transformers' tensors; configs and errors as in `hf_arch`.

    Args:
      source: the tensors of a CLIPModel, or of one or both towers' own models together.
      what: names the source in messages.
      scaled: the source holds the temperature, as a CLIPModel does.
    """
    arch = hf_arch(text_config, vision_config, embed_dim)
    constants = {} if scaled else {"logit_scale": LOGIT_SCALE}
    return clip_part(arch, hf_rules(arch), source, what, HF_IGNORE, constants)


def clip_part(
    arch: dict[str, Any],
    rules: list[Rule],
    source: Mapping[str, tensors.Lazy],
    what: str,
    ignore: Iterable[str] = (),
    constants: Mapping[str, np.ndarray] | None = None,
) -> bundle.Part:
    """A CLIP part: `layout.take` for an architecture, with the settings of the stage."""
    taken = layout.take(rules, source, shapes(arch), what=what, ignore=ignore, constants=constants)
    loss = "sigmoid" if arch.get("logit_bias") else "softmax"
    return bundle.Part("clip", arch, taken, settings={"loss": loss})


def stamped(part: bundle.Part, file: pathlib.Path | None) -> bundle.Part:
    """A CLIP part that says so where its file is a published one."""
    module = model.CLIP(**tasks.arguments(part.arch))
    if file is not None:
        part.extra |= published.stamp(file, module, part.params, model.PRESETS)
    return part


def shapes(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of shapes of a CLIP's parameters."""
    return jax.eval_shape(tasks.ClipTask(dict(arch)).init, jax.random.key(0))


def checked(arch: dict[str, Any]) -> dict[str, Any]:
    """`arch`, or ConfigError where a size cannot be that of a network."""
    for field, value in arch.items():
        absent = arch.get(f"{field.partition('_')[0]}_layers") == 0
        if field == "activation" or absent:
            continue
        if number(field, value) > MAX_LAYERS and field.endswith("_layers"):
            raise errors.ConfigError(f"CLIP's {field} is {value}; expected at most {MAX_LAYERS}")
    return arch


def only(what: str, given: Any, expected: Any) -> None:
    """Refuses (ConfigError) any other value of an option that has only one here."""
    if given != expected:
        raise errors.ConfigError(f"CLIP's {what} is {given}; expected {expected}")


def number(what: str, given: Any) -> int:
    """Refuses (ConfigError) what is not a size of a network: a whole number of 1 to a million."""
    if not isinstance(given, int) or not 1 <= given <= 1_000_000:
        raise errors.ConfigError(f"CLIP's {what} is {given!r}; expected a whole number")
    return given


def square(what: str, given: Any) -> int:
    """A number, or that of a pair of equal numbers; ConfigError where they differ."""
    pair = given if isinstance(given, (list, tuple)) else [given]
    if len(pair) > 2 or any(side != pair[0] for side in pair):
        raise errors.ConfigError(f"CLIP's {what} is {given}; expected a square")
    return number(what, pair[0])


def write_hf(parts: Mapping[str, bundle.Part], out: pathlib.Path) -> None:
    """Writes the folder of transformers' CLIPModel and CLIPProcessor.

    Raises:
      ConfigError: no CLIP, one with a single tower, or one that CLIPModel cannot hold.
      DataError: the folder cannot be written.
    """
    if "clip" not in parts:
        have = ", ".join(parts) or "nothing"
        raise errors.ConfigError(f"hf-clip needs the part 'clip'; this bundle has {have}")
    part = parts["clip"]
    clip = model.CLIP(**tasks.arguments(part.arch))
    for side in ("vision", "text"):
        if not getattr(clip, f"{side}_layers"):
            raise errors.ConfigError(
                f"this CLIP has no {side} tower, which CLIPModel needs: convert both towers' "
                "folders into one bundle first"
            )
    if clip.logit_bias or clip.activation not in ("gelu", "quick_gelu"):
        what = "a logit_bias" if clip.logit_bias else f"activation {clip.activation}"
        raise errors.ConfigError(f"this CLIP has {what}, which CLIPModel does not")
    if clip.vocab_size != text.VOCAB_SIZE:
        raise errors.ConfigError(
            f"this CLIP has {clip.vocab_size} words; the tokenizer to go with it {text.VOCAB_SIZE}"
        )
    params = unstack_blocks(part.params)
    arch = {"vision_layers": clip.vision_layers, "text_layers": clip.text_layers}
    given = layout.give(hf_rules(arch), params)
    kinds = {tensor.dtype.name for tensor in given.values()}
    dtype = kinds.pop() if len(kinds) == 1 else "float32"  # OpenAI's files mix two
    write_tokenizer(out, "<|endoftext|>", clip.context)
    tensors.write(out / "model.safetensors", given, {"format": "pt"})
    write_json(out / "preprocessor_config.json", image_processor(clip.image_size))
    write_json(out / "config.json", hf_config(clip) | {"torch_dtype": dtype})


def hf_config(clip: model.CLIP) -> dict[str, Any]:
    """The config.json of transformers' CLIPModel for a CLIP with both towers."""
    common = dict(
        projection_dim=clip.embed_dim, hidden_act=clip.activation, layer_norm_eps=1e-5,
        attention_dropout=0.0,
    )  # fmt: skip
    text_config = common | dict(
        model_type="clip_text_model",
        vocab_size=clip.vocab_size,
        hidden_size=clip.text_width,
        intermediate_size=4 * clip.text_width,
        num_hidden_layers=clip.text_layers,
        num_attention_heads=clip.text_heads,
        max_position_embeddings=clip.context,
        bos_token_id=clip.vocab_size - 2,
        eos_token_id=clip.vocab_size - 1,
    )
    vision_config = common | dict(
        model_type="clip_vision_model",
        hidden_size=clip.vision_width,
        intermediate_size=clip.vision_mlp_width or 4 * clip.vision_width,
        num_hidden_layers=clip.vision_layers,
        num_attention_heads=clip.vision_heads,
        image_size=clip.image_size,
        patch_size=clip.patch_size,
        num_channels=3,
    )
    return dict(
        architectures=["CLIPModel"],
        model_type="clip",
        projection_dim=clip.embed_dim,
        logit_scale_init_value=2.6592,
        text_config=text_config,
        vision_config=vision_config,
    )


def image_processor(size: int) -> dict[str, Any]:
    """The preprocessor_config.json of transformers' CLIPImageProcessor for pictures of a size."""
    return dict(
        image_processor_type="CLIPImageProcessor",
        processor_class="CLIPProcessor",
        do_convert_rgb=True,
        do_resize=True,
        size={"shortest_edge": size},
        resample=3,  # bicubic
        do_center_crop=True,
        crop_size={"height": size, "width": size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(model.IMAGE_MEAN),
        image_std=list(model.IMAGE_STD),
    )


def write_tokenizer(folder: pathlib.Path, pad_token: str, context: int = 77) -> None:
    """Writes CLIP's tokenizer as transformers' CLIPTokenizer reads it, fast or slow.

    Args:
      folder: made when missing.
      pad_token: "<|endoftext|>" as OpenAI's on the hub, "!" (id 0) as Karlo's and Kandinsky's.
      context: tokens of a text, start and end included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text.Tokenizer().save(folder)
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = dict(bos_token=start, eos_token=end, unk_token=end, pad_token=pad_token)
    write_json(folder / "special_tokens_map.json", special)
    about = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=context,
        do_lower_case=True,
        add_prefix_space=False,
        errors="replace",
    )
    write_json(folder / "tokenizer_config.json", about | special)


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, keys sorted, atomically."""
    with files.replacing(path) as temporary:
        document = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        temporary.write_text(document + "\n", encoding="utf-8")
