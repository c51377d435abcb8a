"""Random keys that belong to a sample, not to a row, a host or a step.

Noise, timestep and condition dropout of a training sample are functions of (seed, global sample
number) alone, so that the losses are the same for any number of devices and processes.
"""

import jax
import jax.numpy as jnp


def sample_keys(key: jax.Array, sample: jax.Array) -> jax.Array:
    """One key a sample.

    Args:
      key: typed PRNG key, scalar.
      sample: uint32 [B, 2], the (high, low) words of the global sample numbers.

    Returns:
      Typed PRNG keys [B].
    """
    return jax.vmap(lambda s: jax.random.fold_in(jax.random.fold_in(key, s[0]), s[1]))(sample)


def normal(keys: jax.Array, shape: tuple[int, ...], tag: int) -> jax.Array:
    """Standard normal float32 [B, *shape], row k from `keys[k]` and `tag` alone."""
    draw = lambda k: jax.random.normal(jax.random.fold_in(k, tag), shape, jnp.float32)
    return jax.vmap(draw)(keys)


def integers(keys: jax.Array, below: int, tag: int) -> jax.Array:
    """Uniform int32 [B] in [0, below)."""
    return jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(k, tag), (), 0, below))(keys)


def uniform(keys: jax.Array, tag: int) -> jax.Array:
    """Uniform float32 [B] in [0, 1)."""
    return jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, tag)))(keys)


def bernoulli(keys: jax.Array, probability: float, tag: int) -> jax.Array:
    """Bool [B], True with the given probability."""
    return jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, tag), probability))(keys)


def dropout(key: jax.Array, keys: jax.Array, tag: int, *, train: bool) -> dict:
    """What a network's `apply` takes for dropout by sample; {} where it is off.

    Args:
      key: scalar, tells the layers apart; keys: typed keys [B], one a sample.
    """
    return {"dropout_keys": fold(keys, tag), "rngs": {"dropout": key}} if train else {}


def fold(keys: jax.Array, tag: int) -> jax.Array:
    """Keys [B] for another purpose, row k from `keys[k]` and `tag` alone."""
    return jax.vmap(lambda k: jax.random.fold_in(k, tag))(keys)
