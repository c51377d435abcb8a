"""What a config stands for: its task, optimiser, state, step, data, all without running anything.

`unclip train` runs these, `unclip doctor` and `unclip compile` look at their shapes. Settings
follow Table 3 of the paper where the config names its preset.
"""

import dataclasses
import json

import jax
from ml_collections import ConfigDict

from unclip import errors, tasks
from unclip.cascade import bundle, runs
from unclip.input.decode import text
from unclip.models import clip as clip_model
from unclip.models import decoder, prior, prior_ar, upsampler
from unclip.models import t5 as t5_model
from unclip.training import data as inputs

# Fields of an architecture that a run may choose anew: they leave the parameters as they are.
RUNTIME_FIELDS = {"attention_impl", "dtype", "dropout", "remat"}
# Settings of a task that fine-tuning chooses anew: they are about training alone.
TRAINING_SETTINGS = {"crop", "image_drop", "min_snr", "t_below", "text_drop", "vlb_weight"}


def needs(config: ConfigDict) -> tuple[str, ...]:
    """The frozen parts a config's stage reads: of "clip" and "t5"."""
    return tasks.needs(config.stage, config.arch.to_dict(), plain(config.task))


def clip_part(config: ConfigDict) -> bundle.Part | None:
    """The frozen CLIP of a prior or decoder config; parameters None for the preset's shapes.

    None where the stage reads none, as a decoder without z_i that has a text encoder of its own.

    Raises:
      ConfigError: the path holds no CLIP; DataError: it cannot be read.
    """
    if "clip" not in needs(config):
        return None
    if config.clip in ("", "random"):
        arch = {"dtype": config.arch.dtype} | clip_model.PRESETS[config.clip_preset]
        return bundle.Part("clip", arch, None)
    return runs.open_part(config.clip, "clip")


def t5_part(config: ConfigDict) -> bundle.Part | None:
    """The frozen T5 of a decoder config that reads captions through one, likewise.

    It computes in the config's dtype, whatever the part was saved with.
    """
    if "t5" not in needs(config):
        return None
    own = {"dtype": config.arch.dtype}
    if config.t5 in ("", "random"):
        if config.t5_preset not in t5_model.PRESETS:
            raise errors.unknown("t5_preset", config.t5_preset, t5_model.PRESETS)
        return bundle.Part("t5", own | t5_model.PRESETS[config.t5_preset], None)
    part = runs.open_part(config.t5, "t5")
    return dataclasses.replace(part, arch=part.arch | own)


def init_part(config: ConfigDict) -> str:
    """The name of the part of `init_from` that a run starts from."""
    if config.init_part:
        return config.init_part
    if config.stage != "upsampler":
        return config.stage
    if not runs.is_run(config.init_from):  # of a bundle's upsamplers, the one of our size
        parts = bundle.describe(config.init_from)["parts"]
        for name in sorted(n for n in parts if n.startswith("upsampler")):
            if parts[name]["settings"].get("image_size") == config.task.image_size:
                return name
    return "upsampler_0"


def follow_init(config: ConfigDict) -> None:
    """Gives a fine-tuning config the architecture and settings of its `init_from`, in place.

    What leaves the parameters' meaning alone stays the config's: `RUNTIME_FIELDS` and folding of
    the architecture, `TRAINING_SETTINGS` of the task.

    Raises:
      ConfigError: no `init_from`, or it holds no such part; DataError: it cannot be read.
    """
    if not config.follow_init:
        return
    if not config.init_from:
        raise errors.ConfigError(
            f"configs/{config.stage}.py:{config.preset} fine-tunes: --config.init_from=BUNDLE or "
            f"RUN (unclip convert makes one), or train anew with {config.preset},scratch"
        )
    arch, settings = runs.describe_part(config.init_from, init_part(config))
    module = {
        "clip": clip_model.CLIP,
        "prior": prior_ar.ARPrior if settings.get("kind") == "ar" else prior.DiffusionPrior,
        "decoder": decoder.Decoder,
        "upsampler": upsampler.Upsampler,
    }[config.stage]
    fields = {
        field.name: field.default
        for field in dataclasses.fields(module)
        if field.name not in ("parent", "name") and field.default is not dataclasses.MISSING
    }
    own = {n: v for n, v in config.arch.items() if n in RUNTIME_FIELDS | {"fold"}}
    whole = lambda value: tuple(value) if isinstance(value, list) else value
    fields |= {name: whole(value) for name, value in arch.items() if name != "class"} | own
    kept = {n: v for n, v in settings.items() if n not in TRAINING_SETTINGS}
    with config.unlocked():
        config.arch = ConfigDict(fields)
        config.task = ConfigDict(plain(config.task) | kept)


def make_task(
    config: ConfigDict, clip: bundle.Part | None, statistics=None, t5: bundle.Part | None = None
) -> tasks.Task:
    """The task a config describes.

    Args:
      clip: from `clip_part`; statistics: of the prior, arrays or shapes; t5: from `t5_part`.
    """
    parts = {}
    if clip is not None:
        parts = {"clip": clip.arch, "clip_params": clip.params}
    if t5 is not None:
        parts |= {"t5": t5.arch, "t5_params": t5.params}
    if config.stage == "prior":
        parts["statistics"] = statistics
    task = tasks.make(config.stage, config.arch.to_dict(), plain(config.task), **parts)
    if inputs.stores_embeddings(config):
        if config.stage == "decoder" and not (task.use_z_i and task.embedding == "image"):
            raise errors.ConfigError("stored embeddings: this decoder is not given z_i")
        task.stored = True
    if clip is not None:
        task.clip.fold = bool(config.arch.get("fold"))
    if t5 is not None:
        task.tokenizer = text.T5Tokenizer(t5.extra.get("tokenizer"))
    return task


def plain(config) -> dict:
    """A ConfigDict as JSON-able dicts."""
    return json.loads(config.to_json_best_effort()) if isinstance(config, ConfigDict) else config


def model_flops(
    config: ConfigDict, clip: bundle.Part | None, t5: bundle.Part | None = None
) -> float | None:
    """Floating-point operations one step needs, recomputation not counted.

    Counted on the unfolded model without rematerialisation, from its lowering alone: XLA counts
    the body of a loop once, so the folded program that runs would give too little.
    """
    with config.unlocked():
        config = config.copy_and_resolve_references()
        config.arch.fold, config.arch.remat = False, ""
    shapes = lambda part: (
        part and bundle.Part(part.kind, part.arch, jax.eval_shape(lambda tree: tree, part.params))
    )
    task = make_task(config, shapes(clip), t5=shapes(t5))
    if config.stage == "prior":
        task.statistics = task.shape_statistics()
    key = jax.random.key(0)
    loss = lambda p, f, b: task.loss(p, f, b, key, train=True)[0]
    lowered = jax.jit(jax.grad(loss)).lower(
        jax.eval_shape(task.init, key), task.frozen(), task.batch_spec(config.batch_size)
    )
    count = (lowered.cost_analysis() or {}).get("flops")
    return count and count * (2 if config.optim.sam_rho else 1)
