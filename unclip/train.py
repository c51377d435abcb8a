"""`unclip train`: the one training loop, for CLIP, the priors, the decoder and the upsamplers.

    unclip train --config configs/decoder.py:emoji --config.clip=runs/clip --workdir runs/decoder

The workdir holds config.json, checkpoints/, metrics.jsonl, TensorBoard events and samples/. The
same command resumes: parameters, moments, moving average and data position are restored, and the
run ends with the same bits as one that was never interrupted. Stage settings follow Table 3 of
the paper where the config names its preset.
"""

import functools
import json
import os
import pathlib
import re
import time

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags

from unclip import cli, embeddings, errors, files, images, runs, stage, tasks
from unclip.evaluators import training
from unclip.input import stored
from unclip.models import t5 as t5_model
from unclip.models.unet import fold_params, unfold_params
from unclip.runtime import checkpoint, distributed, flops, metrics, progress, sharding

_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py:preset[,argument...]")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; the same folder resumes it")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT, for processes started by hand")
_PROCESSES = flags.DEFINE_integer("process_count", None, "how many processes, started by hand")
_PROCESS = flags.DEFINE_integer("process_id", None, "which process this is, started by hand")


# ============================================================ the run


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
    data, held_out = stage.collections(config)
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
        if stage.stores_embeddings(config):
            data, held_out = store_embeddings(config, clip, clip_name, data, held_out, mesh, folder)
        frozen = task.frozen()
        fingerprint = "streaming" if data is None else data.fingerprint

        abstract_params = jax.eval_shape(task.init, jax.random.key(0))
        tx, schedule = stage.make_optimizer(config, abstract_params)
        init = stage.make_init(task, tx)
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
        transform = stage.transform(config, task, "train")
        batches = stage.batches(config, data, transform, start=position, **rows)
        evaluators = training.make(config, task, frozen, data, held_out, mesh, rows, put)
        step_fn = jax.jit(
            stage.make_step(task, tx, schedule, config),
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
        )
        writer = metrics.MetricWriter(
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


class Loop:
    """The loop proper; its order is law: evaluate, save, next batch, step, log the step before."""

    def __init__(self, config, folder, saver, writer, evaluators, batches, bar, mesh):
        self.config, self.folder, self.saver, self.writer = config, folder, saver, writer
        self.evaluators, self.batches, self.bar, self.mesh = evaluators, batches, bar, mesh
        self.measured = set()  # (step, evaluator's prefix): what need not be measured again
        self.skipped = 0  # consecutive steps
        self.pending = None  # (step, metrics on the device) of the step before
        self.flops = None  # of one step
        self.data = None  # fingerprint of the collection
        self.loss = "?"
        self.clock, self.clock_step, self.paused = time.perf_counter(), None, 0.0

    def __call__(self, step_fn, state, frozen, first):
        config = self.config
        compiled = None
        self.recall(first)
        for step in range(first, config.total_steps):
            self.evaluate(state, step)
            self.save(state, step)
            if distributed.should_stop(step):
                self.stop(state, step)
            batch = sharding.put_batch(self.next_batch(state, step), self.mesh)
            if compiled is None:
                compiled = self.compile(step_fn, state, frozen, batch)
            state, measured = compiled(state, frozen, batch)
            self.log_pending()
            self.pending = (step + 1, measured)
            self.bar.update(1, loss=self.loss)
        self.log_pending()
        if config.total_steps >= first:  # a run that is over may lack its last evaluations
            if not self.evaluate(state, config.total_steps):
                self.stop(state, config.total_steps)
            self.save(state, config.total_steps, force=True)
        return state

    def next_batch(self, state, step):
        """The next batch; if the input fails, what was learned so far is saved first."""
        try:
            return next(self.batches)
        except errors.DataError:
            if distributed.process_count() == 1 and step:  # others may be well, and not save along
                self.log_pending()
                self.save(state, step, force=True)
                self.saver.wait()
            raise

    def stop(self, state, step):
        """Saves and leaves; an evaluation of this step that was cut short is done on resuming."""
        self.log_pending()
        self.save(state, step, force=True)
        self.saver.wait()
        raise errors.Stopped(
            f"asked to stop: saved step {step} of {self.config.total_steps}; "
            "the same command resumes"
        )

    def compile(self, step_fn, state, frozen, batch):
        start = time.perf_counter()
        compiled = step_fn.lower(state, frozen, batch).compile()
        seconds = time.perf_counter() - start
        self.writer.scalars(int(state["step"]), {"compile_seconds": seconds})
        self.clock, self.paused = time.perf_counter(), 0.0
        return compiled

    def recall(self, first):
        """Notes what metrics.jsonl already says of the step a run resumes from.

        A save follows the evaluations of its step, but a stop cuts them short; then those that
        left no line are due again.
        """
        if first == 0 or not self.evaluators:
            return
        names = self.writer.restored_names
        done = np.array([any(n.startswith(f"{e.prefix}/") for n in names) for e in self.evaluators])
        done = embeddings.gather(done)[: len(done)]  # process 0, which writes the file, knows
        self.measured = {(first, e.prefix) for e, was in zip(self.evaluators, done) if was}

    def evaluate(self, state, step) -> bool:
        """Runs the evaluators due at a step; False where a request to stop left some undone."""
        config = self.config
        pause = time.perf_counter()
        for evaluator in self.evaluators:
            every = config[f"{evaluator.schedule}_steps"]
            due = step == config.total_steps or (step and every and step % every == 0)
            if not due or (step, evaluator.prefix) in self.measured:
                continue
            if distributed.should_stop(step):
                return False
            # All or nothing: an evaluator that is interrupted gives no figures.
            results = list(evaluator.run(state, step))
            if not results and distributed.should_stop(step):
                return False
            found = {}
            for name, value in results:
                if isinstance(value, np.ndarray):
                    self.writer.images(step, name, value)
                    if distributed.is_main():
                        path = self.folder / "samples" / f"{step:07d}-{name}.png"
                        images.write_png(path, value, {"step": step, "stage": config.stage})
                else:
                    found[name] = value
            if found:
                self.writer.scalars(step, found)
        self.paused += time.perf_counter() - pause
        return True

    def save(self, state, step, force=False):
        if not (force or self.saver.due(step)):
            return
        self.log_pending()  # a kill right after the save must not lose this step's line
        pause = time.perf_counter()
        meta = {"stage": self.config.stage, "preset": self.config.preset, "data": self.data}
        self.saver.save(step, state, self.batches.position, meta, force=force)
        self.paused += time.perf_counter() - pause

    def log_pending(self):
        """Fetches the previous step's metrics, which by now are computed, and judges them."""
        if self.pending is None:
            return
        step, measured = self.pending
        self.pending = None
        measured = {name: float(value) for name, value in jax.device_get(measured).items()}
        self.skipped = self.skipped + 1 if measured["skipped"] else 0
        if self.skipped >= self.config.max_skipped_steps:
            self.writer.scalars(step, measured)
            self.saver.wait()
            latest = self.saver.latest()
            saved = "there is no checkpoint yet"
            if latest is not None:  # skipped steps change nothing, so whatever was saved is good
                saved = f"the last good state is {self.saver.directory / str(latest)}"
            raise errors.NumericsError(
                f"{self.skipped} steps in a row up to step {step} had a loss or gradient that is "
                f"not finite; {saved}"
            )
        if self.clock_step is None:  # the first step after compiling also fills caches
            self.clock, self.clock_step, self.paused = time.perf_counter(), step, 0.0
        if step % self.config.log_steps and step != self.config.total_steps:
            return
        seconds = time.perf_counter() - self.clock - self.paused
        steps = step - self.clock_step
        if steps > 0:
            measured["images_per_second"] = steps * self.config.batch_size / seconds
            used = flops.utilisation(self.flops, seconds / steps, jax.devices())
            if used is not None:
                measured["flop_utilisation"] = used
        counters = self.batches.counters().items()
        measured |= {f"input/{name}": count for name, count in counters if count}
        self.list_bad()
        self.writer.scalars(step, measured)
        self.loss = f"{measured['loss']:.4g}"
        self.clock, self.clock_step, self.paused = time.perf_counter(), step, 0.0

    def list_bad(self):
        """Appends the samples that could not be used to a file of this process."""
        found = self.batches.drain_bad()
        if found:
            path = self.folder / f"bad_samples-{distributed.process_index():05d}.jsonl"
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)


# ============================================================ pieces of the run


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
    elif stage.stores_embeddings(config):
        data, _ = store_embeddings(config, clip, name, data, None, mesh, folder)
        statistics = task.fit(data.pairs(config.statistics_examples))
    else:
        stream = embeddings.embed(
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
        given = stored.Store(config.embeddings)
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
            job = embeddings.Job(
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
            out.append(embeddings.embed_shards(job).attach(collection))
    return out


def on_host(tree):
    """A tree of arrays that lie on the mesh, whole and in this process's memory."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def main(argv):
    """Reads the flags and trains."""
    if len(argv) > 1:
        raise errors.ConfigError(f"unexpected argument {argv[1]!r}")
    if _CONFIG.value is None:
        raise errors.ConfigError("--config=configs/STAGE.py:PRESET is needed")
    if not _WORKDIR.value:
        raise errors.ConfigError("--workdir=FOLDER is needed")
    os.environ.setdefault("WDS_SECURE", "1")
    distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    cli.run_app(main)
