"""A run from its config to its last step: what is measured first, restored and kept."""

import dataclasses
import json
import pathlib
import re
import sys
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from unclip import errors, files
from unclip.cascade import bundle, runs, spaces
from unclip.embeddings.job import Job, embed, embed_shards
from unclip.embeddings.store import Store
from unclip.files import paths
from unclip.models.unet import fold_params, unfold_params
from unclip.runtime import checkpoint, compiled, distributed, flops, optim, sharding
from unclip.runtime.collectives import on_host
from unclip.runtime.writer import MetricWriter
from unclip.training import data as inputs
from unclip.training import variance
from unclip.training.evaluators import choose
from unclip.training.loop import Loop
from unclip.training.plan import (
    Plan,
    as_json,
    changes,
    check_workdir,
    init_part,
    lineage,
    make_plan,
)

PARTIAL = "statistics-partial.safetensors"  # of a start that was asked to stop
VARIANCE_EXAMPLES = 8192  # of the training samples, that a prior's analytic variance is measured on


def train(config: ConfigDict, workdir: str) -> None:
    """Runs a config to `total_steps`, or resumes it there.

    Raises:
      ConfigError, DataError, NumericsError, Stopped: see `unclip.errors`.
    """
    workdir = paths.expanded(workdir)
    if config.compilation_cache:
        compiled.keep_at(paths.expanded(config.compilation_cache))
    plan = make_plan(config, workdir=workdir)
    plan.check()
    config, folder = plan.config, pathlib.Path(workdir)
    found = lineage(plan, folder)
    with checkpoint.Checkpointer(
        folder / "checkpoints", config.save_steps, config.keep, config.keep_every_steps or None
    ) as saver:
        if distributed.is_main():
            files.remove_strays(folder)
        latest = saver.latest()
        if latest is not None and latest > config.total_steps:
            return _say(f"nothing to do: {latest} of {config.total_steps} steps")
        prepared = Prepared(plan, folder)
        if distributed.is_main() and found["trained_with"]:
            runs.write_lineage(folder, found)
        task, data, held_out = prepared.task, prepared.data, prepared.held_out
        frozen = task.frozen()
        fingerprint = "streaming" if data is None else data.fingerprint
        state, position = restored(plan, saver, workdir, fingerprint)
        first = int(state["step"])

        rows = {
            "process_index": distributed.process_index(),
            "process_count": distributed.process_count(),
            "threads": config.input.threads,
            "workers": config.input.workers,
        }
        transform = task.transform("train", config.input)
        batches = inputs.batches(config, data, transform, start=position, **rows)
        evaluators = choose.make(plan, task, frozen, data, held_out, rows)
        writer = MetricWriter(
            folder,
            tensorboard=config.tensorboard,
            wandb={"project": config.wandb} if config.wandb else None,
            restored_step=first,
        )
        # Without a known peak there is nothing to compare the operations with.
        needed = plan.flops() if flops.chip_peak(jax.devices()[0]) else None
        with writer, batches:
            loop = Loop(
                plan,
                frozen,
                folder,
                saver,
                writer,
                batches,
                evaluators,
                fingerprint=fingerprint,
                needed_flops=needed,
            )
            loop.recall(first)
            done = f"{first} of {config.total_steps} steps"
            left = first == config.total_steps and loop.due(first)
            unmeasured = data is not None and prepared.unmeasured()
            if first < config.total_steps:
                unmeasured = data is not None and prepared.forget()
                print_parameters(plan)
                if first:
                    _say(*resumed_lines(plan, folder, first))
                # Only now can nothing refuse this start any more.
                write_config(config, folder)
            elif left:
                _say(f"{done}: measures {', '.join(evaluator.prefix for evaluator in left)}")
            elif unmeasured:
                _say(f"{done}: measures the prior's variance")
            else:
                return _say(f"nothing to do: {done}")
            state = loop.run(plan.make_step(task), state, first)
        saver.wait()
        if unmeasured:
            measure_variance(plan, prepared, state, rows)


def measure_variance(plan: Plan, prepared: "Prepared", state: dict, rows: dict) -> None:
    """Adds what only a trained prior has to the statistics of its run; once, at its end.

    Raises:
      Stopped: asked to stop; the same command measures again.
    """
    path, task, data = prepared.folder / runs.STATISTICS, prepared.task, prepared.data
    count = min(len(data), VARIANCE_EXAMPLES)
    batches = lambda: choose.passes_over(plan, task, rows, data, count, "held_out")
    seed = plan.config.seed
    found = variance.x0_error(task, task.frozen(), state["ema"], batches, plan.mesh, count, seed)
    if found is None:
        raise errors.Stopped("asked to stop while the prior's variance was measured")
    if distributed.is_main():
        kept = runs.read_prior_statistics(path)
        runs.write_prior_statistics(path, kept | {"x0_error": found}, prepared.clip_hash)
    distributed.barrier("variance", 600)


def _say(*lines: str) -> None:
    """Prints to standard error, in one process of the job."""
    if distributed.is_main():
        print(*lines, sep="\n", file=sys.stderr)


def resumed_lines(plan: Plan, folder: pathlib.Path, first: int) -> list[str]:
    """What a resume tells: where it goes on, what of the config is new, what jumps by that.

    Args:
      folder: the workdir, with the config of the start before; first: the step to go on from.
    """
    config = plan.config
    lines = [f"resumed at step {first} of {config.total_steps}"]
    try:
        old = runs.run_config(folder)
    except errors.DataError:  # lost or damaged: a checkpoint is enough to go on
        return lines
    changed = changes(old, as_json(config))
    if changed:
        shown = [f"{name} {was!r} -> {now!r}" for name, (was, now) in changed.items()]
        lines.append("changed since the start before: " + ", ".join(shown))
    try:
        was = old["optim"]
        fields = {name: was[name] for name in ("schedule", "warmup_steps", "end_fraction")}
        rate = optim.make_learning_rate(was["learning_rate"], old["total_steps"], **fields)
    except (errors.ConfigError, KeyError, TypeError):  # of another version
        return lines
    before, now = float(rate(first)), float(plan.learning_rate(first))
    if abs(now - before) > 1e-6 * max(now, before):
        peak = config.optim.learning_rate
        part = f", {now / peak:.0%} of its peak" if peak else ""
        lines.append(f"the learning rate jumps: {before:.3g} -> {now:.3g}{part}")
    return lines


def write_config(config: ConfigDict, folder: pathlib.Path) -> None:
    """config.json of the run; a workdir of another stage or architecture is refused.

    Raises:
      ConfigError: the folder holds a different model's run; DataError: it cannot be written.
    """
    check_workdir(config, folder)
    if distributed.is_main():
        with files.replacing(folder / "config.json") as path:
            kept = as_json(config)
            kept.pop("known", None)  # of the preset, no setting of this run
            path.write_text(json.dumps(kept, indent=1, sort_keys=True))


def print_parameters(plan: Plan) -> None:
    """Prints what is trained, by branch, and what is frozen beside it: counts of parameters."""
    sizes: dict[str, int] = {}
    for path, leaf in sharding.tree_paths(plan.params).items():
        branch = "/".join([plan.config.stage, path.split("/")[0]])
        sizes[branch] = sizes.get(branch, 0) + leaf.size
    for name, tree in (plan.frozen_shapes or {}).items():
        sizes[f"{name} (frozen)"] = sum(leaf.size for leaf in jax.tree.leaves(tree))
    trained = sum(leaf.size for leaf in jax.tree.leaves(plan.params))
    width = max(map(len, sizes))
    lines = [f"  {name:<{width}}  {count:>14,}" for name, count in sizes.items()]
    _say(*lines, f"{trained:,} trained parameters")


def restored(
    plan: Plan, saver: checkpoint.Checkpointer, workdir: str, fingerprint: str
) -> tuple[dict, int]:
    """(state on the mesh, samples seen): of the latest checkpoint, or a fresh start."""
    if saver.latest() is None:
        start = initial_params(plan.config, plan.params)
        start = start and plan.put(start)
        return plan.init(jax.random.key(plan.config.seed), start), plan.config.skip_examples
    shapes = sharding.abstract(plan.state, plan.shardings)
    state, position, meta = saver.restore(None, shapes)
    if meta.get("data") not in (None, fingerprint):
        logging.warning("%s resumes with other shards than it began with", workdir)
    # What earlier starts left out is in the position already.
    return state, position + max(plan.config.skip_examples - meta.get("skip_examples", 0), 0)


def initial_params(config: ConfigDict, abstract_params):
    """Parameters of `init_from`, checked leaf by leaf and in the model's dtypes, or None."""
    if not config.init_from:
        return None
    part = runs.open_part(config.init_from, init_part(config))
    params = part.params
    if bool(part.arch.get("fold", False)) != config.arch.fold:
        params = fold_params(params) if config.arch.fold else unfold_params(params)
    table = checkpoint.difference(sharding.tree_paths(params), sharding.tree_paths(abstract_params))
    if table:
        raise errors.ConfigError(f"init_from {config.init_from} is another model:", table)
    # A bundle may hold half precision; training keeps float32.
    return jax.tree.map(lambda leaf, new: leaf.astype(new.dtype), params, abstract_params)


# ============================================================ before the first step


class Prepared:
    """A plan with what its first step needs: frozen parts on the mesh, statistics, embeddings.

    Statistics and embeddings are measured once and kept in the workdir.

    Attributes:
      task: the plan's, with its weights on the mesh.
      data, held_out: the plan's collections, with embeddings attached where the config stores them.
    """

    def __init__(self, plan: Plan, folder: pathlib.Path):
        self.plan, self.config, self.folder = plan, plan.config, folder
        self.data, self.held_out = plan.data, plan.held_out
        weights, self.clip_hash = {}, ""
        for name, part in plan.parts.items():
            if part.params is None:
                init = jax.jit(
                    plan.task.init_frozen, static_argnums=0, compiler_options=compiled.options()
                )
                tree = jax.device_get(init(name, jax.random.key(0)))
                part = dataclasses.replace(part, params=tree)
            if name == "clip":
                self.clip_hash = bundle.space(part)
            weights[name] = plan.put(part.params)
        self.weights = weights
        statistics = plan.task.statistics_shapes() and self.statistics()
        if statistics:
            weights["statistics"] = plan.put(statistics)
        self.task = dataclasses.replace(plan.task, weights=weights)
        if inputs.stores_embeddings(self.config):
            self.data, self.held_out = self.with_embeddings(self.data, self.held_out)

    def statistics(self) -> dict[str, np.ndarray]:
        """What the task needs to know of z_i.

        A run that starts from another one keeps that one's, in whose space its parameters live.

        Raises:
          ConfigError: statistics of another CLIP or another model, or nothing to measure them on.
        """
        config, path = self.config, self.folder / runs.STATISTICS
        if path.exists():
            mixed = config.get(spaces.FLAG)
            kept = runs.read_prior_statistics(path, None if mixed else self.clip_hash)
            return {**self.plan.task.unmeasured, **kept}
        statistics = runs.statistics_of(config.init_from) if config.init_from else {}
        if statistics:
            wanted = self.plan.task.statistics_shapes()
            # What only a trained network has is measured anew, at the end.
            statistics = {n: v for n, v in statistics.items() if n in wanted}
            statistics |= self.plan.task.unmeasured
            shapes = lambda tree: {name: tuple(leaf.shape) for name, leaf in tree.items()}
            expected = shapes(self.plan.task.statistics_shapes())
            if shapes(statistics) != expected:
                raise errors.ConfigError(
                    f"init_from {config.init_from} has statistics {shapes(statistics)}, this "
                    f"{config.stage} needs {expected}"
                )
        elif self.data is None:
            raise errors.ConfigError(
                f"a {config.stage}'s statistics are measured on indexed shards: unclip index them, "
                "or give --config.init_from=RUN or BUNDLE with statistics"
            )
        else:
            statistics = self.fit()
        if distributed.is_main():
            runs.write_prior_statistics(path, statistics, self.clip_hash)
            (self.folder / PARTIAL).unlink(missing_ok=True)
        distributed.barrier("statistics", 600)
        return statistics

    def fit(self) -> dict[str, np.ndarray]:
        """The task's statistics of the training samples; goes on where an earlier start stopped.

        Raises:
          Stopped: asked to stop; what was added up is kept.
        """
        path, space = self.folder / PARTIAL, self.clip_hash + self.data.fingerprint
        sums = runs.read_partial(path, space)
        sums |= {name: [array] for name, array in sums.items() if name == "dots"}
        try:
            return self.plan.task.fit(self.pairs(sums), sums)
        except errors.Stopped:
            if distributed.is_main():
                whole = lambda x: np.concatenate(x) if isinstance(x, list) else np.asarray(x)
                runs.write_prior_statistics(path, {n: whole(x) for n, x in sums.items()}, space)
            distributed.barrier("statistics in part", 600)
            raise

    def unmeasured(self) -> bool:
        """Whether the statistics lack what only a trained network has."""
        names = self.plan.task.unmeasured
        kept = runs.read_prior_statistics(self.folder / runs.STATISTICS) if names else {}
        return any(not np.any(kept.get(name, 0)) for name in names)

    def forget(self) -> bool:
        """Marks what only a trained network has as not measured, as it is trained on.

        Returns:
          Whether there is such a thing.
        """
        zeros, path = self.plan.task.unmeasured, self.folder / runs.STATISTICS
        if zeros and distributed.is_main():
            kept = runs.read_prior_statistics(path)
            runs.write_prior_statistics(path, kept | zeros, self.clip_hash)
        return bool(zeros)

    def pairs(self, sums: dict[str, Any]):
        """Batches of (z_i, z_t) [b, D] of the training samples.

        Args:
          sums: "seen": how many samples were looked at already; it is kept up to date.
        """
        config, limit = self.config, self.config.statistics_examples
        if inputs.stores_embeddings(config):
            data, _ = self.with_embeddings(self.data, None)
            yield from data.pairs(limit)
            return
        stream = embed(
            self.clip.arch,
            self.weights["clip"],
            self.data,
            self.plan.mesh,
            batch_size=config.batch_size,
            captions=config.input.captions,
            limit=limit,
            start=int(sums.setdefault("seen", 0)),
            threads=config.input.threads,
        )
        for z_i, z_t, valid in stream:
            yield z_i[valid], z_t[valid]
            sums["seen"] += len(valid)
            if distributed.should_stop():
                raise errors.Stopped(
                    f"asked to stop: {sums['seen']} samples are embedded for the statistics; the "
                    "same command goes on"
                )

    @property
    def clip(self) -> bundle.Part:
        """The frozen CLIP."""
        return self.plan.parts["clip"]

    def with_embeddings(self, *collections: Any) -> list:
        """The collections with z_i of every picture attached, as `unclip embed` writes them.

        Training pictures take those of `config.embeddings` where it is given. Everything else is
        embedded once and kept in the workdir, in a folder named by collection and CLIP.

        Raises:
          ConfigError: embeddings of another CLIP.
          DataError: `config.embeddings` lacks some of the training shards.
        """
        config = self.config
        given = None
        if config.get("embeddings"):
            given = Store(config.embeddings)
            given.check_clip(self.clip_hash)
        out = []
        for collection in collections:
            if collection is None:
                out.append(None)
            elif given and (collection is self.plan.data or not given.missing(collection)):
                out.append(given.attach(collection))
            else:
                out.append(embed_shards(self.job(collection)).attach(collection))
        return out

    def job(self, collection: Any) -> Job:
        """Embeds a collection into the workdir."""
        config, captions = self.config, self.config.input.captions
        words = (collection.fingerprint[:12], self.clip_hash[:12], *captions)
        return Job(
            self.clip.arch,
            on_host(self.weights["clip"]),
            self.clip_hash,
            collection,
            self.folder / "embeddings" / re.sub(r"[^\w-]+", "-", "-".join(words)),
            batch_size=-(-config.batch_size // distributed.process_count()),
            captions=captions,
            threads=config.input.threads,
            devices=[d for d in self.plan.mesh.devices.flat if d in jax.local_devices()],
        )
