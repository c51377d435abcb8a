"""Which evaluators a training run has: what its stage can be judged by, and what its config asks.

CLIP is judged by zero-shot retrieval, a prior by the embeddings it draws, a decoder or upsampler by
its pictures; all by their loss on pictures that training never sees (arXiv 2204.06125, sections 2
and 5).
"""

from collections.abc import Callable

import jax

from unclip import errors, tasks
from unclip.cascade import runs
from unclip.input import source
from unclip.measure import features
from unclip.models import clip as clip_model
from unclip.tasks.clip import FrozenClip
from unclip.training import data as inputs
from unclip.training.evaluators import drawn
from unclip.training.evaluators.held_out import HeldOutLoss
from unclip.training.evaluators.passes import Evaluator
from unclip.training.evaluators.prior_quality import PriorQuality
from unclip.training.evaluators.retrieval import Retrieval
from unclip.training.evaluators.samples import Samples

TOWERS = {"vision", "text"}
FID_MODE = "tf1"  # the resize behind the published figures


def make(
    config, task, frozen, data, held_out, mesh: jax.sharding.Mesh, rows: dict, put: Callable
) -> list[Evaluator]:
    """The evaluators of a run, in the order they are to be run.

    Args:
      config: a stage's config, see docs/training.md; task, frozen: of that stage.
      data, held_out: the two collections; held_out may be None.
      rows: process_index, process_count and threads of the input.
      put: puts a tree of parameters on the mesh.

    Raises:
      ConfigError, DataError: `metric_clip` or `metric_inception` is not what it should be.
    """
    found: list[Evaluator] = []
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = {name: rows[name] for name in ("process_index", "process_count", "threads")}

    def one_pass(collection, limit, use, also=lambda transform: transform):
        limited = collection.subset(count=min(limit, len(collection)))
        return source.make_eval_source(
            limited,
            also(inputs.transform(config, task, use)),
            **rows,
            batch_size=min(config.batch_size, -(-len(limited) // ways) * ways),
        )

    if held_out is not None and config.eval_examples:
        batches = lambda: one_pass(held_out, config.eval_examples, "held_out")
        found.append(HeldOutLoss(task, frozen, batches, mesh, seed=config.seed))
    if held_out is not None and config.metric_examples:
        found += _metrics(
            config,
            task,
            frozen,
            mesh,
            put,
            lambda *how: one_pass(held_out, config.metric_examples, *how),
        )
    if config.sample_examples and "sample" in task.predict():
        for name, collection in (("train", data), ("held_out", held_out)):
            if collection is not None:
                with one_pass(collection, config.sample_examples, "sample") as batches:
                    found.append(
                        Samples(task, frozen, next(batches), mesh, seed=config.seed, name=name)
                    )
    return found


def _metrics(config, task, frozen, mesh, put, one_pass) -> list[Evaluator]:
    """What a stage is judged by besides its loss."""
    pairs = lambda: one_pass("held_out")
    if config.stage == "clip":
        return [Retrieval(task, frozen, pairs, mesh)]
    if config.stage == "prior":
        return [PriorQuality(task, frozen, pairs, mesh, seed=config.seed)]
    clip = judge(config, task, frozen, put)
    network = None
    if config.metric_inception:
        network = features.inception_extractor(config.metric_inception, FID_MODE)
    also = lambda transform: transform
    if clip is not None:
        also = lambda transform: drawn.WithCaption(
            transform, clip[0].model.context, config.input.captions[:1]
        )
    whole = lambda: one_pass("sample", also)
    return [drawn.Drawn(task, frozen, whole, mesh, clip=clip, inception=network, seed=config.seed)]


def judge(config, task, frozen, put) -> tuple[FrozenClip, dict] | None:
    """The CLIP that drawn pictures are judged by: `metric_clip`, else the stage's own, else None.

    Raises:
      ConfigError: `metric_clip` holds no CLIP, or only one tower; DataError: it cannot be read.
    """
    if config.metric_clip:
        part = runs.open_part(config.metric_clip, "clip")
        missing = TOWERS - set(part.params)
        if missing:
            raise errors.ConfigError(
                f"metric_clip {config.metric_clip}: its CLIP has no {min(missing)} tower; both "
                "are needed"
            )
        return FrozenClip(clip_model.CLIP(**tasks.arguments(part.arch))), put(part.params)
    own = getattr(task, "clip", None)
    if own is None or TOWERS - set(frozen["clip"]):
        return None
    return own, frozen["clip"]
