"""What a stage of the cascade must offer so that one loop can train it, and shared pieces."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

Tree = Any


class Task(Protocol):
    """One stage: pure functions of (params, frozen, batch, key); no jit, no sharding, no I/O."""

    stage: str

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the input must deliver, by name."""

    def init(self, key: jax.Array) -> Tree:
        """Fresh parameters, float32; call under `eval_shape` or `jit(..., out_shardings=...)`."""

    def frozen(self) -> Tree | None:
        """Trees that are loaded, sharded and never updated (CLIP, statistics), or None."""

    def loss(self, params, frozen, batch, key, *, train: bool):
        """(scalar float32, {name: scalar}): means over the rows with `batch["valid"]`."""

    def predict(self) -> dict:
        """{name: fn(params, frozen, batch, key)}: what evaluators may call."""


def spec(
    batch_size: int,
    *,
    image: int | None = None,
    clip_image: int | None = None,
    low: int | None = None,
    tokens: int | None = None,
    z_i: int | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a stage: pictures uint8 [B, S, S, 3] by side, tokens by context length."""
    out = {}
    for name, side in (("image", image), ("clip_image", clip_image), ("low", low)):
        if side:
            out[name] = jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.uint8)
    if tokens:
        out["tokens"] = jax.ShapeDtypeStruct((batch_size, tokens), jnp.int32)
        out["text_mask"] = jax.ShapeDtypeStruct((batch_size, tokens), jnp.bool_)
    if z_i:
        out["z_i"] = jax.ShapeDtypeStruct((batch_size, z_i), jnp.float32)
    out["sample"] = jax.ShapeDtypeStruct((batch_size, 2), jnp.uint32)
    out["valid"] = jax.ShapeDtypeStruct((batch_size,), jnp.bool_)
    return out


def zeros(batch_spec: dict) -> dict[str, jax.Array]:
    """A batch of zeros with the given spec, to trace a model with."""
    return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in batch_spec.items()}


def mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of `values` [B] over the rows where `valid`, float32; 0 when there is none."""
    values = jnp.where(valid, values.astype(jnp.float32), 0.0)
    return values.sum() / jnp.maximum(valid.sum(), 1)
