"""Which evaluators a training run has: what its task can be judged by, and what its config asks.

All are judged by their loss on pictures that training never sees; CLIP also by zero-shot retrieval,
a prior by the embeddings it draws, a decoder or upsampler by its pictures.
"""

from collections.abc import Callable
from typing import Any

from unclip import errors, tasks
from unclip.cascade import runs
from unclip.input import source
from unclip.measure import features
from unclip.models import clip as clip_model
from unclip.tasks import FrozenClip, Task
from unclip.training.evaluators import drawn
from unclip.training.evaluators.held_out import HeldOutLoss
from unclip.training.evaluators.likelihood import Likelihood
from unclip.training.evaluators.passes import Evaluator
from unclip.training.evaluators.prior_quality import PriorQuality
from unclip.training.evaluators.retrieval import Retrieval
from unclip.training.evaluators.samples import Samples
from unclip.training.plan import Plan

TOWERS = {"vision", "text"}
FID_MODE = "tf1"  # the resize behind the published figures


def make(
    plan: Plan, task: Task, frozen: Any, data: Any, held_out: Any, rows: dict
) -> list[Evaluator]:
    """The evaluators of a run, in the order they are to be run.

    Args:
      plan: of the run; task, frozen: with its weights on the mesh.
      data, held_out: the two collections; either may be None.
      rows: process_index, process_count and threads of the input.

    Raises:
      ConfigError, DataError: `metric_clip` or `metric_inception` is not what it should be.
    """
    config, mesh, found = plan.config, plan.mesh, []
    one_pass = lambda *how: passes_over(plan, task, rows, *how)
    if held_out is not None and config.eval_examples:
        batches = lambda: one_pass(held_out, config.eval_examples, "held_out")
        found.append(HeldOutLoss(task, frozen, batches, mesh, seed=config.seed))
    if held_out is not None and config.metric_examples:
        held = lambda *how, count=config.metric_examples: one_pass(held_out, count, *how)
        measures = (MEASURES[name](plan, task, frozen, held) for name in task.measures)
        found += filter(None, measures)
    if config.sample_examples and "sample" in task.predict():
        for name, collection in (("train", data), ("held_out", held_out)):
            if collection is not None:
                with one_pass(collection, config.sample_examples, "sample") as batches:
                    found.append(
                        Samples(task, frozen, next(batches), mesh, seed=config.seed, name=name)
                    )
    return found


def passes_over(
    plan: Plan,
    task: Task,
    rows: dict,
    collection: Any,
    limit: int,
    use: str,
    also: Callable = lambda transform: transform,
) -> Any:
    """One pass over the first `limit` samples of a collection, as batches for an evaluator.

    Args:
      rows: process_index, process_count and threads of the input; others are not read.
      use: of `Task.transform`; also: wraps the transform.
    """
    rows = {name: rows[name] for name in ("process_index", "process_count", "threads")}
    limited = collection.subset(count=min(limit, len(collection)))
    return source.make_eval_source(
        limited,
        also(task.transform(use, plan.config.input)),
        **rows,
        batch_size=min(plan.config.batch_size, -(-len(limited) // plan.ways) * plan.ways),
    )


def _retrieval(plan: Plan, task: Task, frozen: Any, held: Callable) -> Evaluator:
    return Retrieval(task, frozen, lambda: held("held_out"), plan.mesh)


def _prior_quality(plan: Plan, task: Task, frozen: Any, held: Callable) -> Evaluator:
    pairs = lambda: held("held_out")
    return PriorQuality(task, frozen, pairs, plan.mesh, seed=plan.config.seed)


def _drawn(plan: Plan, task: Task, frozen: Any, held: Callable) -> Evaluator:
    config = plan.config
    clip = judge(plan, task, frozen)
    network = None
    if config.metric_inception:
        network = features.inception_extractor(config.metric_inception, FID_MODE)
    also = lambda transform: transform
    if clip is not None:
        also = lambda transform: drawn.WithCaption(
            transform, clip[0].model.context, config.input.captions
        )
    whole = lambda: held("sample", also)
    return drawn.Drawn(
        task, frozen, whole, plan.mesh, clip=clip, inception=network, seed=config.seed
    )


def _likelihood(plan: Plan, task: Task, frozen: Any, held: Callable) -> Evaluator | None:
    count = plan.config.get("metric_bits_examples")
    if not count:
        return None
    pictures = lambda: held("held_out", count=count)
    return Likelihood(task, frozen, pictures, plan.mesh, seed=plan.config.seed)


# What a task's `measures` name; None where the config does not ask for it.
MEASURES = {
    "retrieval": _retrieval,
    "prior_quality": _prior_quality,
    "drawn": _drawn,
    "likelihood": _likelihood,
}


def judge(plan: Plan, task: Task, frozen: Any) -> tuple[FrozenClip, dict] | None:
    """The CLIP that drawn pictures are judged by: `metric_clip`, else the task's own, else None.

    Raises:
      ConfigError: `metric_clip` holds no CLIP, or only one tower; DataError: it cannot be read.
    """
    path = plan.config.metric_clip
    if path:
        part = runs.open_part(path, "clip")
        missing = TOWERS - set(part.params)
        if missing:
            raise errors.ConfigError(
                f"metric_clip {path}: its CLIP has no {min(missing)} tower; both are needed"
            )
        clip = FrozenClip(clip_model.CLIP(**tasks.arguments(part.arch)))
        return clip, plan.put(part.params)
    if task.judge is None or TOWERS - set(frozen["clip"]):
        return None
    return task.judge, frozen["clip"]
