"""Optimisation: AdamW with learning rate schedules and freezing, EMA, SAM, accumulation, skipping.

`PRESETS` holds the numbers of Table 3 of the paper (arXiv 2204.06125): every stage is trained with
Adam with decoupled weight decay (b1 = 0.9) and with exponential moving averages of the parameters;
its CLIP uses sharpness-aware minimisation. Everything here is a pure function on pytrees.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unclip.errors import ConfigError, unknown
from unclip.runtime.sharding import compile_pattern, near_paths, tree_paths

SCHEDULES = ("constant", "cosine", "rsqrt", "linear")

# Gains and biases, which in a folded stack of layers have two dimensions.
_GAIN_OR_BIAS = re.compile(r"(^|/)(bias|scale|logit_scale|logit_bias)$")

# Table 3 (iterations are `total_steps`); the paper gives no learning rate schedule, so the rate is
# constant after a warm-up of our choice. CLIP: learning rate and SAM rho from appendix C, the rest
# as in CLIP's own paper.
PRESETS: dict[str, dict[str, Any]] = {
    "clip": dict(
        learning_rate=3e-4,
        b1=0.9,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.2,
        schedule="cosine",
        sam_rho=0.1,
    ),
    "prior_ar": dict(
        learning_rate=1.6e-4,
        b1=0.9,
        b2=0.91,
        eps=1e-10,
        weight_decay=4e-2,
        ema_decay=0.999,
        total_steps=1_000_000,
        batch_size=4096,
    ),
    "prior": dict(
        learning_rate=1.1e-4,
        b1=0.9,
        b2=0.96,
        eps=1e-6,
        weight_decay=6e-2,
        ema_decay=0.9999,
        total_steps=600_000,
        batch_size=4096,
    ),
    "decoder": dict(
        learning_rate=1.2e-4,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        ema_decay=0.9999,
        total_steps=800_000,
        batch_size=2048,
    ),
    "upsampler_256": dict(
        learning_rate=1.2e-4,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        ema_decay=0.9999,
        total_steps=1_000_000,
        batch_size=1024,
    ),
    "upsampler_1024": dict(
        learning_rate=1e-4,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        ema_decay=0.9999,
        total_steps=1_000_000,
        batch_size=512,
    ),
}


def make_learning_rate(
    learning_rate: float,
    total_steps: int,
    *,
    schedule: str = "constant",
    warmup_steps: int = 0,
    end_fraction: float = 0.0,
) -> Callable[[Any], jax.Array]:
    """The learning rate of step t = 0, 1, …

    Over the warm-up it is learning_rate · (t + 1) / warmup_steps, so that no step has rate zero.
    After it, with p going from 0 to 1 over the remaining steps: "constant"; "cosine" and
    "linear" go down to end_fraction · learning_rate; "rsqrt" is
    learning_rate · sqrt(warmup_steps / (t + 1)).

    Args:
      learning_rate: the peak.
      total_steps: where p reaches 1.
      schedule: one of `SCHEDULES`.
      warmup_steps: 0 for none; "rsqrt" needs at least 1, since it is also its time scale.
      end_fraction: in [0, 1].

    Returns:
      step (int or int32 array) -> float32 scalar.

    Raises:
      ConfigError: an unknown learning rate schedule or a value out of range.
    """
    _raise(_wrong_rate(learning_rate, total_steps, schedule, warmup_steps, end_fraction))

    def rate(step):
        t = jnp.asarray(step, jnp.float32)
        p = jnp.clip((t - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        if schedule == "cosine":
            shape = end_fraction + (1 - end_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * p))
        elif schedule == "linear":
            shape = 1 - (1 - end_fraction) * p
        elif schedule == "rsqrt":
            shape = jnp.sqrt(warmup_steps / jnp.maximum(t + 1, warmup_steps))
        else:
            shape = jnp.ones_like(t)
        if warmup_steps:
            shape = jnp.where(t < warmup_steps, (t + 1) / warmup_steps, shape)
        return learning_rate * shape

    return rate


def _wrong_rate(
    learning_rate: float, total_steps: int, schedule: str, warmup_steps: int, end_fraction: float
) -> list[ConfigError]:
    wrong = []
    if not 0 <= learning_rate < math.inf:
        wrong.append(ConfigError(f"learning_rate is {learning_rate}, expected 0 or more"))
    if schedule not in SCHEDULES:
        wrong.append(unknown("learning rate schedule", schedule, SCHEDULES))
    if not 0 <= warmup_steps <= total_steps:
        wrong.append(
            ConfigError(f"warmup_steps is {warmup_steps}, expected 0 … total_steps={total_steps}")
        )
    if not 0 <= end_fraction <= 1:
        wrong.append(ConfigError(f"end_fraction is {end_fraction}, expected 0 … 1"))
    if schedule == "rsqrt" and warmup_steps == 0:
        wrong.append(
            ConfigError(
                "learning rate schedule 'rsqrt' needs warmup_steps > 0, which is also its time "
                "scale"
            )
        )
    return wrong


def _raise(wrong: Sequence[ConfigError]) -> None:
    if wrong:
        raise ConfigError("; ".join(error.message for error in wrong))


def check(
    *,
    learning_rate: float,
    total_steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    end_fraction: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> None:
    """Refuses settings of `make_optimizer` that no parameters are needed to judge.

    Raises:
      ConfigError: all that is out of range.
    """
    wrong = _wrong_rate(learning_rate, total_steps, schedule, warmup_steps, end_fraction)
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            wrong.append(ConfigError(f"{name} is {value}, expected 0 ≤ {name} < 1"))
    if not 0 < eps < math.inf:
        wrong.append(ConfigError(f"eps is {eps}, expected more than 0"))
    if not 0 <= weight_decay < math.inf:
        wrong.append(ConfigError(f"weight_decay is {weight_decay}, expected 0 or more"))
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        wrong.append(ConfigError(f"clip_norm is {clip_norm}, expected more than 0"))
    _raise(wrong)


def path_mask(tree: Any, patterns: Sequence[str], what: str = "pattern") -> Any:
    """A tree of bools: which leaves any of the path patterns is found in.

    Args:
      tree: any pytree.
      patterns: regular expressions found anywhere in a path; what: their name in errors.

    Raises:
      ConfigError: a pattern is not a regular expression, or matches nothing.
    """
    compiled = [compile_pattern(pattern) for pattern in patterns]
    paths = list(tree_paths(tree))
    for pattern in compiled:
        if not any(pattern.search(path) for path in paths):
            raise ConfigError(
                f"{what} {pattern.pattern!r} matches no parameter; near it: "
                + ", ".join(near_paths(pattern.pattern, paths))
            )
    return jax.tree.unflatten(
        jax.tree.structure(tree),
        [any(pattern.search(path) for pattern in compiled) for path in paths],
    )


def decay_mask(params: Any, no_decay: Sequence[str] = ()) -> Any:
    """A tree of bools: which parameters weight decay acts on.

    "All weights that are not gains or biases" (CLIP, arXiv 2103.00020, section 2.5; the unCLIP
    paper says nothing): kernels and the tables of tokens, positions and nulls. Vectors decay
    nowhere: a class token, a query or a null vector is added or put in like a bias.

    Args:
      no_decay: path patterns of further parameters that do not decay.

    Raises:
      ConfigError: a pattern matches nothing.
    """
    excluded = path_mask(params, no_decay, "no_decay")
    weights = [
        len(leaf.shape) > 1 and not _GAIN_OR_BIAS.search(path)
        for path, leaf in tree_paths(params).items()
    ]
    weights = jax.tree.unflatten(jax.tree.structure(params), weights)
    return jax.tree.map(lambda weight, out: weight and not out, weights, excluded)


def make_optimizer(
    params: Any,
    *,
    learning_rate: float,
    total_steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    end_fraction: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
    clip_norm: float | None = 1.0,
    freeze: Sequence[str] = (),
) -> tuple[optax.GradientTransformation, Callable[[Any], jax.Array]]:
    """AdamW: u = m̂ / (sqrt(v̂) + eps) + weight_decay · w; w ← w − rate(t) · u.

    Args:
      params: the parameter tree (arrays or ShapeDtypeStructs), for the masks.
      learning_rate, total_steps, schedule, warmup_steps, end_fraction: see `make_learning_rate`.
      b1, b2, eps: of Adam; both moments are bias-corrected.
      weight_decay: decoupled, scaled by the rate.
      no_decay: path patterns of parameters without decay, beside those of `decay_mask`.
      clip_norm: the gradient of all trained parameters is scaled to at most this norm; None: never.
      freeze: path patterns of parameters that are never updated and have no moments.

    Returns:
      (transformation, learning rate as a function of the step).

    Raises:
      ConfigError: a pattern matches nothing, everything is frozen, or a value out of range.
    """
    check(
        learning_rate=learning_rate,
        total_steps=total_steps,
        schedule=schedule,
        warmup_steps=warmup_steps,
        end_fraction=end_fraction,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
    )
    rate = make_learning_rate(
        learning_rate,
        total_steps,
        schedule=schedule,
        warmup_steps=warmup_steps,
        end_fraction=end_fraction,
    )
    steps = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)]
    if clip_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(clip_norm))
    if weight_decay:
        decayed = decay_mask(params, no_decay)
        keep = lambda tree: jax.tree.map(  # the tree that it meets lacks the frozen leaves
            lambda leaf, out: optax.MaskedNode() if isinstance(leaf, optax.MaskedNode) else out,
            tree,
            decayed,
            is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
        )
        steps.append(optax.add_decayed_weights(weight_decay, mask=keep))
    transformation = optax.chain(*steps, optax.scale_by_learning_rate(rate))
    if freeze:
        frozen = path_mask(params, freeze, "freeze")
        if all(jax.tree.leaves(frozen)):
            raise ConfigError(f"freeze={list(freeze)} leaves no parameter to train")
        transformation = optax.partition(
            {"train": transformation, "freeze": optax.set_to_zero()},
            jax.tree.map(lambda out: "freeze" if out else "train", frozen),
        )
    return transformation, rate


def applied_steps(opt: Any) -> jax.Array:
    """How many updates an optimiser's state of `make_optimizer` has seen, int32: where its learning
    rate is. Skipped steps are not among them."""
    counts = optax.tree.get_all_with_path(opt, "count")
    return counts[0][1]


def ema_init(params: Any) -> Any:
    """The average before the first step: a float32 copy of the parameters."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def ema_update(ema: Any, params: Any, step: Any, decay: float, *, warmup: bool = True) -> Any:
    """e ← d · e + (1 − d) · w in float32, d = min(decay, (1 + step) / (10 + step)).

    Args:
      ema: float32 tree.
      params: the parameters after the step, same structure.
      step: how many steps were taken before this one (int or int32 scalar).
      decay: Table 3: 0.999 or 0.9999.
      warmup: whether early averages forget faster; without it d = decay.
    """
    t = jnp.asarray(step, jnp.float32)
    d = jnp.minimum(decay, (1 + t) / (10 + t)) if warmup else jnp.float32(decay)
    return jax.tree.map(lambda e, p: e + (1 - d) * (p.astype(jnp.float32) - e), ema, params)


def sam_gradient(
    value_and_grad_fn: Callable, params: Any, rho: float, *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    """The gradient of sharpness-aware minimisation (arXiv 2010.01412, equations 2 and 3).

    g = ∇L(w); the result is ∇L at w + rho · g / ‖g‖₂. Costs two gradients. The paper's CLIP uses
    rho = 0.1.

    Args:
      value_and_grad_fn: (params, *args, **kwargs) -> (value, grads), value may be (loss, aux).
      params: w.
      rho: the radius, ≥ 0.

    Returns:
      (value at w, gradient at the perturbed point).
    """
    value, grads = value_and_grad_fn(params, *args, **kwargs)
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    scale = rho / jnp.maximum(norm, 1e-12)
    there = jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), params, grads)
    _, grads = value_and_grad_fn(there, *args, **kwargs)
    return value, grads


def groups(batch: Any, rows: int) -> Any:
    """Every array [B, ...] of a batch as [B / rows, rows, ...], neighbours together.

    Raises:
      ConfigError: the batch does not divide.
    """

    def split(leaf):
        if leaf.shape[0] % rows:
            raise ConfigError(
                f"a batch of {leaf.shape[0]} does not divide into groups of sam_rows={rows}"
            )
        return leaf.reshape(leaf.shape[0] // rows, rows, *leaf.shape[1:])

    return jax.tree.map(split, batch)


def accumulate(value_and_grad_fn: Callable, microbatches: int) -> Callable:
    """The same function, evaluated over slices of the batch one after another.

    Values and gradients are averaged in float32, so a loss that is a mean over samples gives the
    full batch's gradient; one that compares samples with each other (CLIP's) does not.

    Args:
      value_and_grad_fn: (params, batch, *args) -> (value, grads); value is a scalar or a pytree of
        scalars such as (loss, metrics).
      microbatches: how many slices; slice i holds rows i, i + n, …, which keeps every device's rows
        on that device.

    Returns:
      A function with the same arguments and results, value and grads in float32.

    Raises (when traced):
      ConfigError: the batch does not divide.
    """
    if microbatches < 1:
        raise ConfigError(f"microbatches is {microbatches}, expected at least 1")
    if microbatches == 1:
        return value_and_grad_fn

    def split(leaf):
        if leaf.shape[0] % microbatches:
            raise ConfigError(
                f"a batch of {leaf.shape[0]} does not divide into {microbatches} microbatches"
            )
        rows = leaf.reshape(leaf.shape[0] // microbatches, microbatches, *leaf.shape[1:])
        return jnp.swapaxes(rows, 0, 1)

    def function(params, batch, *args):
        slices = jax.tree.map(split, batch)
        one = jax.eval_shape(value_and_grad_fn, params, jax.tree.map(lambda x: x[0], slices), *args)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), one)

        def body(total, batch_slice):
            result = value_and_grad_fn(params, batch_slice, *args)
            return jax.tree.map(lambda t, r: t + r.astype(jnp.float32), total, result), None

        total, _ = jax.lax.scan(body, zeros, slices)
        return jax.tree.map(lambda leaf: leaf / microbatches, total)

    return function


def all_finite(loss: jax.Array, grads: Any) -> tuple[jax.Array, jax.Array]:
    """(ok, norm): whether loss and gradient are finite, and the gradient's global float32 norm.

    A norm that overflows counts as non-finite too: clipping by it would give zero or NaN.
    """
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    return jnp.isfinite(loss) & jnp.isfinite(norm), norm


def skip_nonfinite(old: Any, new: Any, ok: jax.Array) -> tuple[Any, jax.Array]:
    """`new` where ok, else `old` bit for bit, on every leaf.

    Give it parameters, optimiser state and average together, but not the step counter, which must
    advance so that the next batch is another one.

    Returns:
      (tree, int32 scalar: 1 if the step was skipped).
    """
    tree = jax.tree.map(lambda o, n: jnp.where(ok, n, o), old, new)
    return tree, jnp.where(ok, 0, 1).astype(jnp.int32)
