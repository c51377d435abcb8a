"""A run from its config to its last step: what is measured first, restored and kept."""

import functools
import json
import pathlib
import re

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from unclip import errors, files, tasks
from unclip.cascade import runs
from unclip.embeddings.job import Job, embed, embed_shards
from unclip.embeddings.store import Store
from unclip.models import t5 as t5_model
from unclip.models.unet import fold_params, unfold_params
from unclip.runtime import checkpoint, distributed, flops, progress, sharding
from unclip.runtime.collectives import on_host
from unclip.runtime.writer import MetricWriter
from unclip.training import data as inputs
from unclip.training import plan as stage
from unclip.training import step as step_of
from unclip.training.evaluators import choose
from unclip.training.loop import Loop


def train(config: ConfigDict, workdir: str) -> None:
    """Runs a config to `total_steps`, or resumes it there.

    Raises:
      ConfigError, DataError, NumericsError, Stopped: see `unclip.errors`.
    """
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    stage.follow_init(config)
    mesh = sharding.make_mesh(stage.plain(config.mesh))
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate
    if config.batch_size % ways:
        raise errors.ConfigError(
            f"batch_size {config.batch_size} is not a multiple of {ways} "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} x accumulate "
            f"{config.accumulate})"
        )
    folder = pathlib.Path(workdir)
    data, held_out = inputs.collections(config)
    clip, t5 = stage.clip_part(config), stage.t5_part(config)
    for part in (clip, t5):
        if part is not None and part.params is None and config[part.kind] != "random":
            raise errors.ConfigError(
                f"the {config.stage} needs a trained {part.kind.upper()}: "
                f"--config.{part.kind}=RUN or BUNDLE (or =random, for benchmarks)"
            )

    with checkpoint.Checkpointer(
        folder / "checkpoints", save_every_steps=config.save_steps, keep=config.keep
    ) as saver:
        write_config(config, folder)
        rules = sharding.PRESETS.get(config.sharding, config.sharding)
        if isinstance(rules, str):
            raise errors.unknown("sharding", rules, sharding.PRESETS)
        put = functools.partial(place, mesh=mesh, rules=rules)
        clip_name = ""
        if clip is not None:
            if clip.params is None:
                random = tasks.ClipTask(tasks.arguments(clip.arch)).init(jax.random.key(0))
                clip.params = jax.device_get(random)
            clip_name = runs.tree_hash(clip.params)
            clip.params = put(clip.params)
        if t5 is not None:
            if t5.params is None:
                random = tasks.FrozenT5(t5_model.T5Encoder(**tasks.arguments(t5.arch))).init
                t5.params = jax.device_get(jax.jit(random)(jax.random.key(0)))
            t5.params = put(t5.params)
        statistics = None
        if config.stage == "prior":
            statistics = fit_statistics(config, clip, clip_name, data, mesh, folder)
        task = stage.make_task(config, clip, statistics and put(statistics), t5)
        if inputs.stores_embeddings(config):
            data, held_out = store_embeddings(config, clip, clip_name, data, held_out, mesh, folder)
        frozen = task.frozen()
        fingerprint = "streaming" if data is None else data.fingerprint

        abstract_params = jax.eval_shape(task.init, jax.random.key(0))
        tx, schedule = step_of.make_optimizer(config, abstract_params)
        init = step_of.make_init(task, tx)
        abstract = jax.eval_shape(init, jax.random.key(0))
        shardings = sharding.shardings(abstract, mesh, rules)
        position = 0
        if saver.latest() is None:
            start = initial_params(config, abstract_params)
            start = start and put(start)
            state = jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed), start)
            del start
        else:
            state, position, meta = saver.restore(None, sharding.abstract(abstract, shardings))
            logging.info("resumed %s at step %d", workdir, int(state["step"]))
            if meta.get("data") not in (None, fingerprint):
                logging.warning("%s goes on with other shards than it began with", workdir)
        first = int(state["step"])

        rows = {
            "process_index": distributed.process_index(),
            "process_count": distributed.process_count(),
            "threads": config.input.threads,
            "workers": config.input.workers,
        }
        transform = inputs.transform(config, task, "train")
        batches = inputs.batches(config, data, transform, start=position, **rows)
        evaluators = choose.make(config, task, frozen, data, held_out, mesh, rows, put)
        step_fn = jax.jit(
            step_of.make_step(task, tx, schedule, config),
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
        )
        writer = MetricWriter(
            folder,
            tensorboard=config.tensorboard,
            wandb={"project": config.wandb} if config.wandb else None,
            restored_step=first,
        )
        bar = progress.progress(config.total_steps, config.stage, initial=first)
        with writer, batches, bar:
            run = Loop(config, folder, saver, writer, evaluators, batches, bar, mesh)
            run.data = fingerprint
            if flops.chip_peak(jax.devices()[0]):  # counting traces the model: for nothing on a CPU
                run.flops = stage.model_flops(config, clip, t5)
            try:
                state = run(step_fn, state, frozen, first)
            finally:
                run.list_bad()
        saver.wait()


def write_config(config: ConfigDict, folder: pathlib.Path) -> None:
    """config.json of the run; a workdir of another stage or architecture is refused.

    A folder where nothing was saved yet may still become another run.

    Raises:
      ConfigError: the folder holds a different model's run; DataError: it cannot be written.
    """
    new = stage.plain(config)
    if runs.is_run(folder) and checkpoint.steps(folder / "checkpoints"):
        old = runs.run_config(folder)
        changed = _changed(old["arch"], new["arch"])
        if old["stage"] != new["stage"]:
            changed = f"stage was {old['stage']}, now {new['stage']}"
        if changed:
            raise errors.ConfigError(
                f"{folder} holds a run of another model ({changed}); choose another --workdir"
            )
    if distributed.is_main():
        with files.replacing(folder / "config.json") as path:
            path.write_text(json.dumps(new, indent=1, sort_keys=True))


def _changed(old: dict, new: dict) -> str:
    """The fields in which two architectures have other parameters, in words; "" for none."""
    names = sorted((old.keys() | new.keys()) - stage.RUNTIME_FIELDS)
    differ = [name for name in names if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)}, now {new.get(name)}" for name in differ)


def place(tree, *, mesh, rules):
    """A host tree on the mesh, by the rules for parameters."""
    where = sharding.shardings(tree, mesh, rules)
    return jax.tree.map(jax.device_put, tree, where)


def initial_params(config: ConfigDict, abstract_params):
    """Parameters of `init_from`, checked leaf by leaf and in the model's dtypes, or None."""
    if not config.init_from:
        return None
    part = runs.open_part(config.init_from, stage.init_part(config))
    params = part.params
    if bool(part.arch.get("fold", False)) != config.arch.fold:
        params = fold_params(params) if config.arch.fold else unfold_params(params)
    table = checkpoint.difference(sharding.tree_paths(params), sharding.tree_paths(abstract_params))
    if table:
        raise errors.ConfigError(f"init_from {config.init_from} is another model:", table)
    # A bundle may hold half precision; training keeps float32.
    return jax.tree.map(lambda leaf, new: leaf.astype(new.dtype), params, abstract_params)


def fit_statistics(config, clip, name, data, mesh, folder) -> dict[str, np.ndarray]:
    """What the prior needs to know of z_i, measured once and kept in the workdir.

    A run that starts from another prior keeps that prior's, in whose space its parameters live.

    Args:
      name: `runs.tree_hash` of the frozen CLIP; statistics of another one are refused.
    """
    path = folder / runs.STATISTICS
    if path.exists():
        return runs.read_statistics(path, name)
    task = stage.make_task(config, clip)
    statistics = runs.statistics_of(config.init_from) if config.init_from else {}
    if statistics:
        shapes = lambda tree: {name: tuple(leaf.shape) for name, leaf in tree.items()}
        expected = shapes(task.shape_statistics())
        if shapes(statistics) != expected:
            raise errors.ConfigError(
                f"init_from {config.init_from} has statistics {shapes(statistics)}, this prior "
                f"needs {expected}"
            )
    elif data is None:
        raise errors.ConfigError(
            "a prior's statistics are measured on indexed shards: unclip index them, or give "
            "--config.init_from=RUN or BUNDLE with statistics"
        )
    elif inputs.stores_embeddings(config):
        data, _ = store_embeddings(config, clip, name, data, None, mesh, folder)
        statistics = task.fit(data.pairs(config.statistics_examples))
    else:
        stream = embed(
            clip.arch,
            clip.params,
            data,
            mesh,
            batch_size=config.batch_size,
            captions=config.input.captions[:1],
            limit=config.statistics_examples,
            threads=config.input.threads,
        )
        statistics = task.fit((z_i[valid], z_t[valid]) for z_i, z_t, valid in stream)
    if distributed.is_main():
        runs.write_statistics(path, statistics, name)
    distributed.barrier("statistics", 600)
    return statistics


def store_embeddings(config, clip, name, data, held_out, mesh, folder):
    """The collections with z_i of every picture attached, as `unclip embed` writes them.

    Training pictures take those of `config.embeddings` where it is given. Everything else is
    embedded once and kept in the workdir, in a folder named by collection and CLIP.

    Raises:
      ConfigError: a random crop, or embeddings of another CLIP.
      DataError: `config.embeddings` lacks some of the training shards.
    """
    if config.input.crop != "center":
        raise errors.ConfigError("stored embeddings need input.crop='center': one z_i a picture")
    given = None
    if config.get("embeddings"):
        given = Store(config.embeddings)
        given.check_clip(name)
    out = []
    for collection in (data, held_out):
        if collection is None:
            out.append(None)
        elif given and (collection is data or not given.missing(collection)):
            out.append(given.attach(collection))
        else:
            words = (collection.fingerprint[:12], name[:12], config.input.captions[0])
            place = folder / "embeddings" / re.sub(r"[^\w-]+", "-", "-".join(words))
            job = Job(
                clip.arch,
                on_host(clip.params),
                name,
                collection,
                place,
                batch_size=-(-config.batch_size // distributed.process_count()),
                captions=config.input.captions[:1],
                threads=config.input.threads,
                devices=[d for d in mesh.devices.flat if d in jax.local_devices()],
            )
            out.append(embed_shards(job).attach(collection))
    return out
