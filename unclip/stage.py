"""What a config stands for: its task, optimiser, state, step, data, all without running anything.

`unclip train` runs these, `unclip doctor` and `unclip compile` look at their shapes. Settings
follow Table 3 of the paper where the config names its preset.
"""

import json

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from unclip import bundle, errors, runs, tasks
from unclip.input import shards, source
from unclip.models import clip as clip_model
from unclip.runtime import optim


def clip_part(config: ConfigDict) -> bundle.Part | None:
    """The frozen CLIP of a prior or decoder config; parameters None for the preset's shapes.

    Raises:
      ConfigError: the path holds no CLIP; DataError: it cannot be read.
    """
    if config.stage not in tasks.NEEDS_CLIP:
        return None
    if config.clip in ("", "random"):
        arch = {"dtype": config.arch.dtype} | clip_model.PRESETS[config.clip_preset]
        return bundle.Part("clip", arch, None)
    return runs.open_part(config.clip, "clip")


def make_task(config: ConfigDict, clip: bundle.Part | None, statistics=None) -> tasks.Task:
    """The task a config describes.

    Args:
      clip: from `clip_part`; statistics: of the prior, arrays or shapes.
    """
    parts = {}
    if clip is not None:
        parts = {"clip": clip.arch, "clip_params": clip.params}
    if config.stage == "prior":
        parts["statistics"] = statistics
    task = tasks.make(
        config.stage, config.arch.to_dict(), plain(config.task), **parts
    )
    if config.get("stored_embeddings"):
        task.stored = True
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
        return source.Upsampling(
            config.task.image_size,
            config.task.factor,
            crop=task.crop,
            degradation=config.input.degradation,
            probability=config.input.degradation_probability,
            train=use != "sample",
        )
    spec = task.batch_spec(1)
    side = lambda name: spec[name].shape[1] if name in spec else None
    return source.ImageText(
        side("image"),
        spec["tokens"].shape[1],
        clip_size=side("clip_image"),
        crop=config.input.crop if use == "train" else "center",
        captions=config.input.captions if use == "train" else config.input.captions[:1],
    )


def collections(config: ConfigDict):
    """(training collection, held-out collection or None) of a config."""
    found = []
    for patterns, where in (
        (config.input.shards, config.input.where),
        (config.input.held_out, config.input.held_out_where),
    ):
        collection = shards.index_shards(patterns) if patterns else None
        found.append(collection.subset(where=where.to_dict()) if where else collection)
    train, held_out = found
    if train is None:
        raise errors.ConfigError("no training shards: --config.input.shards=\"('FILE.tar',)\"")
    return train, held_out


def model_flops(config: ConfigDict, clip: bundle.Part | None) -> float | None:
    """Floating-point operations one step needs, recomputation not counted.

    Counted on the unfolded model without rematerialisation, from its lowering alone: XLA counts
    the body of a loop once, so the folded program that runs would give too little.
    """
    with config.unlocked():
        config = config.copy_and_resolve_references()
        config.arch.fold, config.arch.remat = False, ""
    shapes = clip and bundle.Part(
        clip.kind, clip.arch, jax.eval_shape(lambda tree: tree, clip.params)
    )
    task = make_task(config, shapes)
    if config.stage == "prior":
        task.statistics = task.shape_statistics()
    key = jax.random.key(0)
    loss = lambda p, f, b: task.loss(p, f, b, key, train=True)[0]
    lowered = jax.jit(jax.grad(loss)).lower(
        jax.eval_shape(task.init, key), task.frozen(), task.batch_spec(config.batch_size)
    )
    count = (lowered.cost_analysis() or {}).get("flops")
    return count and count * (2 if config.optim.sam_rho else 1)
