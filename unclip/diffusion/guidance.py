"""Classifier-free guidance and the thresholds that keep it in range.

Decoder and prior can be guided because their conditions are dropped at random in training.
Guidance: Ho and Salimans (arXiv 2207.12598, eq. 6). Thresholds: Imagen (arXiv 2205.11487, section
2.3). Rescaling: arXiv 2305.08891, section 3.4. Guidance in an interval of noise levels alone: arXiv
2404.07724.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unclip import errors
from unclip.diffusion import gaussian


def classifier_free(
    cond: jax.Array, uncond: jax.Array, scale, *, rescale=None, learned_variance: bool = False
) -> jax.Array:
    """Guided raw output: uncond + scale (cond - uncond), arXiv 2207.12598 eq. 6, scale = 1 + w.

    Where the scale is 1 this is cond to the bit, whatever the rescaling.

    Args:
      cond: [B, ...], the network's output with its condition.
      uncond: [B, ...], without it.
      scale: guidance scale, a number, traced scalar or [B]; 1 is cond exactly, 0 is uncond.
      rescale: 0 to 1, a number or traced scalar: how far a row's guided output is brought back to
        the standard deviation of its cond (arXiv 2305.08891 eqs. 14-16), against pictures that
        guidance makes too bright; None leaves nothing of it in the program.
      learned_variance: whether the last half of the channels holds a variance, which is then
        taken from cond, because an extrapolated variance has no meaning.

    Returns:
      [B, ...], the shape of cond.

    Raises:
      ConfigError: the two shapes differ, or the channels of a learned variance are odd.
    """
    if cond.shape != uncond.shape:
        raise errors.ConfigError(
            f"guidance between outputs of shapes {cond.shape} and {uncond.shape}: expected equal"
        )
    extra = jnp.asarray(scale, cond.dtype) - 1
    if extra.ndim:
        extra = gaussian.expand(extra, cond)
    if learned_variance:
        cond, value = gaussian.split_variance(cond, cond.shape[-1] // 2)
        uncond, _ = gaussian.split_variance(uncond, uncond.shape[-1] // 2)
    guided = cond + extra * (cond - uncond)
    if rescale is not None:
        axes = tuple(range(1, cond.ndim))
        std = lambda a: jnp.std(a, axis=axes, keepdims=True)
        ratio = std(cond) / jnp.maximum(std(guided), 1e-8)
        rescaled = guided * (1 + jnp.asarray(rescale, cond.dtype) * (ratio - 1))
        guided = jnp.where(extra == 0, guided, rescaled)
    return jnp.concatenate([guided, value], axis=-1) if learned_variance else guided


def in_interval(scale, low, high, last: int) -> Callable[[jax.Array], jax.Array]:
    """A scale for `with_guidance` that is 1, no guidance, outside an interval of noise.

    Args:
      scale: inside the interval; low, high: its ends, which belong to it, as fractions of the
        trained timesteps, 0 (cleanest) to 1 (noisiest). Numbers or traced scalars.
      last: the greatest trained timestep.

    Returns:
      t int32 [B] -> scale float32 [B].
    """
    # The ends are compared as timesteps, where 1/10^4 of a step stands for their rounding.
    inside = lambda t: (t >= low * last - 1e-4) & (t <= high * last + 1e-4)
    return lambda t: jnp.where(inside(t), jnp.asarray(scale, jnp.float32), 1.0)


def twice(tree: Any) -> Any:
    """Every array [B, ...] of a pytree as [2B, ...]: the array twice, one after the other."""
    return jax.tree.map(lambda a: jnp.concatenate([a, a]), tree)


def with_guidance(
    model_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    scale,
    *,
    rescale=None,
    learned_variance: bool = False,
) -> gaussian.ModelFn:
    """A guided model_fn(x_t, t) for `gaussian.make_denoise`, one network call a step.

    The caller doubles the conditions, once, outside the sampling loop:

        conditions = twice(conditions)
        guided = with_guidance(lambda x, t, drop: net(x, t, *conditions, drop_text=drop), scale)

    Args:
      model_fn: (x_t [2B, ...], t [2B], drop bool [2B]) -> raw output [2B, ...]; drop is False for
        the first B rows and True for the last B, whose condition it must replace by the null one.
      scale: as in `classifier_free`, or a function of t that gives it (`in_interval`).
      rescale: as in `classifier_free`.
      learned_variance: as in `classifier_free`.
    """

    def guided(x_t: jax.Array, t: jax.Array) -> jax.Array:
        drop = jnp.arange(2 * x_t.shape[0]) >= x_t.shape[0]
        output = model_fn(*twice((x_t, t)), drop).astype(jnp.float32)
        cond, uncond = jnp.split(output, 2)
        now = scale(t) if callable(scale) else scale
        options = {"rescale": rescale, "learned_variance": learned_variance}
        return classifier_free(cond, uncond, now, **options)

    return guided


def static_threshold(limit: float = 1.0) -> Callable[[jax.Array], jax.Array]:
    """A clip for `make_denoise`: x_0 clamped to [-limit, limit].

    Raises:
      ConfigError: limit is not positive.
    """
    if not limit > 0:
        raise errors.ConfigError(f"static threshold {limit!r}: expected a positive number")
    return lambda x_0: jnp.clip(x_0, -limit, limit)


def dynamic_threshold(percentile: float = 0.995) -> Callable[[jax.Array], jax.Array]:
    """A clip for `make_denoise` that spares saturated pictures (Imagen section 2.3).

    Each picture is clamped to [-s, s] and divided by s, where s is the given quantile of its
    absolute values, at least 1: a picture inside [-1, 1] is not changed.

    Raises:
      ConfigError: percentile is not in (0, 1].
    """
    if not 0 < percentile <= 1:
        raise errors.ConfigError(f"dynamic threshold percentile {percentile!r}: expected (0, 1]")

    def threshold(x_0: jax.Array) -> jax.Array:
        level = jnp.quantile(jnp.abs(x_0).reshape(x_0.shape[0], -1), percentile, axis=1)
        s = gaussian.expand(jnp.maximum(level, 1.0), x_0)
        return jnp.clip(x_0, -s, s) / s

    return threshold
