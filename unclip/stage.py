"""What a config stands for: its task, optimiser, state, step, data, all without running anything.

`unclip train` runs these, `unclip doctor` and `unclip compile` look at their shapes. Settings
follow Table 3 of the paper where the config names its preset.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from unclip import bundle, errors, runs, tasks
from unclip.input import filters, order, shards, source, streaming, text, transforms
from unclip.input.storage import Storage
from unclip.models import clip as clip_model
from unclip.models import decoder, prior, prior_ar, upsampler
from unclip.models import t5 as t5_model
from unclip.runtime import optim

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
    if stores_embeddings(config):
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


def make_optimizer(config: ConfigDict, abstract_params):
    """(optax transformation, learning-rate function of the step) of a config."""
    settings = plain(config.optim)
    settings.pop("sam_rho")
    settings["clip_norm"] = settings["clip_norm"] or None
    return optim.make_optimizer(abstract_params, total_steps=config.total_steps, **settings)


def make_init(task: tasks.Task, tx: optax.GradientTransformation):
    """init(key, start=None) -> {"params", "ema", "opt", "step"}, to be jitted with out_shardings.

    `start` holds parameters to begin with instead of random ones, same structure; an argument,
    since arrays that a function closes over become constants of its program.
    """

    def init(key, start=None):
        params = task.init(key) if start is None else start
        state = {"params": params, "ema": optim.ema_init(params), "opt": tx.init(params)}
        return state | {"step": jnp.int32(0)}

    return init


def make_step(task: tasks.Task, tx: optax.GradientTransformation, schedule, config: ConfigDict):
    """step(state, frozen, batch) -> (state, metrics): one update, pure, to be jitted.

    A step whose loss or gradient is not finite leaves parameters, moments and average as they
    were and reports `skipped` = 1.
    """
    rho = config.optim.sam_rho
    # A loss that compares the rows of a batch (CLIP's) brings its own way to accumulate.
    exact = config.accumulate > 1 and hasattr(task, "accumulated_value_and_grad")

    def step(state, frozen, batch):
        key = jax.random.key(config.seed)

        def value_and_grad(params, rows):
            loss = lambda p: task.loss(p, frozen, rows, key, train=True)
            gradient = jax.value_and_grad(loss, has_aux=True)
            if exact:
                gradient = lambda p: task.accumulated_value_and_grad(
                    p, frozen, rows, key, config.accumulate
                )
            return optim.sam_gradient(gradient, params, rho) if rho else gradient(params)

        (loss, measured), grads = optim.accumulate(
            value_and_grad, 1 if exact else config.accumulate
        )(state["params"], batch)
        ok, norm = optim.all_finite(loss, grads)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optim.ema_update(state["ema"], params, state["step"], config.ema)
        new = {"params": params, "ema": ema, "opt": opt}
        new, skipped = optim.skip_nonfinite({name: state[name] for name in new}, new, ok)
        rate = schedule(state["step"])
        measured = measured | {"grad_norm": norm, "learning_rate": rate, "skipped": skipped}
        return new | {"step": state["step"] + 1}, measured

    return step


def transform(config: ConfigDict, task: tasks.Task, use: str):
    """The per-sample input transform that delivers the task's batch.

    Args:
      use: "train"; "held_out" (no random caption or crop, except that the loss of an upsampler is
        measured on crops); "sample" (whole pictures, as at drawing time).
    """
    if config.stage == "upsampler":
        return transforms.Upsampling(
            config.task.image_size,
            config.task.factor,
            crop=task.crop,
            degradation=config.input.degradation,
            probability=config.input.degradation_probability,
            train=use != "sample",
            margin=config.input.margin,
        )
    spec = task.batch_spec(1)
    side = lambda name: spec[name].shape[1] if name in spec else None
    tokenizer = getattr(task, "tokenizer", None)
    return transforms.ImageText(
        side("image"),
        spec["tokens"].shape[1],
        tokenizer and tokenizer.encode,
        clip_size=side("clip_image"),
        crop=config.input.crop if use == "train" else "center",
        captions=config.input.captions if use == "train" else config.input.captions[:1],
        margin=config.input.margin,
    )


def stores_embeddings(config: ConfigDict) -> bool:
    """Whether z_i of the training pictures is read, not computed in each step."""
    return bool(config.get("stored_embeddings") or config.get("embeddings"))


def storage(config: ConfigDict) -> Storage:
    """How the shards of a config are read; by whole blocks where their neighbours come next."""
    blocks = config.input.streaming or config.input.order == "streamed"
    size = int(config.input.cache_gib * 2**30)
    return Storage(config.input.cache, cache_bytes=size, whole_blocks=blocks)


def collections(config: ConfigDict):
    """(training collection or None, held-out collection or None) of a config.

    Streaming has no training collection: nobody knows what its shards hold.

    Raises:
      ConfigError: no training shards, or settings that do not go together.
      DataError: shards that are missing, unreadable or without complete samples.
    """
    given = config.input
    if not given.shards:
        raise errors.ConfigError("no training shards: --config.input.shards=\"('FILE.tar',)\"")
    if given.streaming and (given.where or given.weights or given.order != "global"):
        raise errors.ConfigError(
            "input.streaming draws shards at random: where, weights and order need indexed shards "
            "(unclip index)"
        )
    if given.streaming and stores_embeddings(config):
        raise errors.ConfigError("stored embeddings belong to indexed shards, not to streaming")
    found = []
    for patterns, where in (
        (() if given.streaming else given.shards, given.where),
        (given.held_out, given.held_out_where),
    ):
        collection = shards.index_shards(patterns, storage=storage(config)) if patterns else None
        narrowed = collection is not None and where
        found.append(collection.subset(where=where.to_dict()) if narrowed else collection)
    if found[0] is not None:
        check_order(config, found[0])
    return tuple(found)


def check_order(config: ConfigDict, data) -> None:
    """Raises ConfigError where order, weights or filters of a config do not fit its shards."""
    filters.Filters.parse(config.input.filters)
    weights = config.input.weights
    order.make_order(
        data.counts,
        config.seed,
        order=config.input.order,
        streams=config.input.streams,
        groups=data.groups if weights else None,
        weights=weights,
        batch_size=config.batch_size,
        window=config.input.window_examples,
    )


def batches(config: ConfigDict, data, transform, *, start: int = 0, **rows):
    """The training batches of a config from sample number `start` on.

    Args:
      data: the training collection, None for streaming.
      transform: from `transform`.
      rows: process_index, process_count, threads and workers of the input.

    Returns:
      `source.Batches` or `streaming.Stream`: an iterator with position, counters() and drain_bad().
    """
    given = config.input
    rows |= {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "start": start,
        "filters": filters.Filters.parse(given.filters),
        "max_bad_fraction": given.max_bad_fraction,
        "max_consecutive_bad": given.max_consecutive_bad,
    }
    if given.streaming:
        return streaming.make_stream(
            given.shards,
            transform,
            shuffle_samples=given.window_examples,
            storage=storage(config),
            **rows,
        )
    return source.make_source(
        data,
        transform,
        order=given.order,
        streams=given.streams,
        weights=given.weights,
        window=given.window_examples,
        **rows,
    )


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
