"""z_i as discrete codes: principal components, quantised, and drawn one after another.

The arithmetic around the autoregressive prior's network (section 2.2 of the paper): PCA of the
embeddings, buckets of equal width along each component, the quantised dot product z_i . z_t, and
the draw of codes with cached keys and values.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip.errors import ConfigError
from unclip.models.prior_ar import ARPrior
from unclip.models.transformer import beside

RANGE_SIGMAS = 4.0  # a normal dimension leaves the buckets' range once in 16,000 values


class PCA(NamedTuple):
    """Principal components: `mean` [D], `components` [D, N] orthonormal columns by falling
    eigenvalue, `scale` [N] the standard deviation along each."""

    mean: np.ndarray
    components: np.ndarray
    scale: np.ndarray


def fit_pca(
    mean: np.ndarray,
    covariance: np.ndarray,
    *,
    dims: int | None = None,
    explained: float | None = None,
) -> PCA:
    """The leading principal components, float64.

    Args:
      mean: [D].
      covariance: [D, D], symmetric.
      dims: how many to keep (319 in the paper), or
      explained: keep the fewest whose eigenvalues sum to this share of the variance (0.99 loses at
        most 1 % of the mean-squared error).

    Returns:
      A `PCA`; each component's largest entry by magnitude is positive, so the fit has one answer.

    Raises:
      ConfigError: not exactly one of `dims` and `explained`, or one out of range.
    """
    size = len(mean)
    if (dims is None) == (explained is None):
        raise ConfigError(f"fit_pca was given dims={dims}, explained={explained}; expected one")
    if dims is not None and not 1 <= dims <= size:
        raise ConfigError(f"fit_pca was given dims={dims}; expected 1 to {size}")
    if explained is not None and not 0 < explained <= 1:
        raise ConfigError(f"fit_pca was given explained={explained}; expected over 0, at most 1")
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    if dims is None:
        share = np.cumsum(values) / values.sum()
        dims = min(int(np.searchsorted(share, explained - 1e-12)) + 1, size)
    vectors = vectors[:, :dims]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0)
    vectors = vectors * np.where(largest < 0, -1.0, 1.0)
    return PCA(np.asarray(mean, np.float64), vectors, np.sqrt(values[:dims]))


def encode(pca: PCA, z: jax.Array) -> jax.Array:
    """Coefficients float32 [..., N] of embeddings [..., D]."""
    mean = beside(jnp.asarray(pca.mean, jnp.float32), z)
    return (z - mean) @ jnp.asarray(pca.components, jnp.float32)


def decode(pca: PCA, coefficients: jax.Array) -> jax.Array:
    """Embeddings float32 [..., D] from coefficients [..., N]."""
    components = jnp.asarray(pca.components, jnp.float32)
    mean = beside(jnp.asarray(pca.mean, jnp.float32), coefficients)
    return coefficients @ components.T + mean


def _bucket_width(scale, buckets, range_sigmas):
    # A dimension without variance still needs a width to divide by.
    scale = jnp.maximum(jnp.asarray(scale, jnp.float32), 1e-12)
    return 2.0 * range_sigmas * scale / buckets


def quantise(
    coefficients: jax.Array,
    scale: jax.Array,
    buckets: int = 1024,
    range_sigmas: float = RANGE_SIGMAS,
) -> jax.Array:
    """Codes int32 [..., N] in 0..buckets-1 of coefficients [..., N].

    The buckets of dimension n cut +-range_sigmas * scale[n] into equal parts; values beyond fall
    into the end buckets.
    """
    width = beside(_bucket_width(scale, buckets, range_sigmas), coefficients)
    index = jnp.floor(coefficients / width + buckets / 2)
    return jnp.clip(index, 0, buckets - 1).astype(jnp.int32)


def dequantise(
    codes: jax.Array,
    scale: jax.Array,
    buckets: int = 1024,
    range_sigmas: float = RANGE_SIGMAS,
) -> jax.Array:
    """Bucket centres float32 [..., N] of codes int [..., N]; at most half a bucket off."""
    width = beside(_bucket_width(scale, buckets, range_sigmas), codes)
    return (codes.astype(jnp.float32) + 0.5 - buckets / 2) * width


def fit_dot_edges(dots: np.ndarray, buckets: int) -> np.ndarray:
    """Edges float64 [buckets - 1] that put equal shares of the training z_i . z_t in each bucket.

    Args:
      dots: [n] dot products of training pairs, normalised or not, but as at use.
      buckets: even, so that the upper half of the buckets is the upper half of the data.

    Raises:
      ConfigError: an odd number of buckets.
    """
    if buckets < 2 or buckets % 2:
        raise ConfigError(f"dot-product buckets: given {buckets}; expected an even number, 2 or up")
    return np.quantile(np.asarray(dots, np.float64), np.arange(1, buckets) / buckets)


def quantise_dot(dots: jax.Array, edges: jax.Array) -> jax.Array:
    """Bucket int32 [B] of dot products [B]; a value on an edge belongs to the bucket above it."""
    edges = jnp.asarray(edges, jnp.float32)
    return jnp.searchsorted(edges, dots.astype(jnp.float32), side="right").astype(jnp.int32)


def draw_dot(keys: jax.Array, buckets: int) -> jax.Array:
    """A bucket int32 [B] from the upper half, one for each typed key of `keys` [B]."""
    return jax.vmap(lambda key: jax.random.randint(key, (), buckets // 2, buckets))(keys)


def keep_top_p(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Logits [..., K] with all but the likeliest values of total probability >= top_p at -inf.

    1 keeps all of them, whatever the rounding of their sum.
    """
    order = jnp.sort(logits, axis=-1)[..., ::-1]
    before = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1) - jax.nn.softmax(order, axis=-1)
    # The likeliest always stays (top_p may be 0); the last value kept marks the threshold.
    kept = ((before < top_p) | (jnp.asarray(top_p) >= 1)).at[..., 0].set(True)
    threshold = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def sample(
    module: ARPrior,
    params: dict,
    keys: jax.Array,
    z_t: jax.Array,
    text_hidden: jax.Array,
    text_mask: jax.Array,
    *,
    drop: jax.Array | None = None,
    dot: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    top_p: jax.Array | float | None = None,
    guidance: jax.Array | float | None = None,
    uncond: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Draw codes one after another with cached keys and values; jittable (module is static).

    Row k depends on keys[k] and its own condition only, never on the other rows.

    Args:
      keys: typed PRNG keys [B].
      z_t, text_hidden, text_mask: as in `ARPrior.__call__`.
      drop: bool [B], rows whose condition is the learned null; None: none.
      dot: int32 [B] dot-product buckets; None draws them from the upper half.
      temperature: 0 takes the likeliest code; traced.
      top_p: keep the likeliest codes that make up this probability; None keeps all.
      guidance: classifier-free guidance w, logits = uncond + w (cond - uncond); None runs the
        conditional model alone.
      uncond: (z_t, text_hidden, text_mask) of the empty caption; None uses the learned null.

    Returns:
      int32 [B, N].

    Raises:
      ConfigError: guidance without `uncond` by a prior without a learned null.
    """
    batch = z_t.shape[0]
    if dot is None:
        # Codes use the key folded with 0..N-1; N is free for the dot token.
        dot_keys = jax.vmap(partial(jax.random.fold_in, data=module.codes))(keys)
        dot = draw_dot(dot_keys, module.dot_buckets)
    conditions = (z_t, text_hidden, text_mask)
    if guidance is not None:
        if uncond is None and not module.learned_null:
            raise ConfigError(
                "guidance was given to an AR prior with learned_null=False; expected uncond = "
                "(z_t, text_hidden, text_mask) of the empty caption"
            )
        other = conditions if uncond is None else uncond
        if module.learned_null:
            first = jnp.zeros(batch, bool) if drop is None else drop
            drop = jnp.concatenate([first, jnp.ones(batch, bool) if uncond is None else first])
        # The dot-product token is asked of both halves, so guidance sharpens the text alone.
        conditions = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), conditions, tuple(other))
        dot = jnp.concatenate([dot, dot])

    def draw(logits, n):
        if guidance is not None:
            cond, free = jnp.split(logits, 2)
            logits = free + guidance * (cond - free)
        cold = jnp.asarray(temperature, jnp.float32) <= 0
        warm = logits / jnp.where(cold, 1.0, temperature)
        if top_p is not None:
            warm = keep_top_p(warm, top_p)
        at = jax.vmap(partial(jax.random.fold_in, data=n))(keys)
        drawn = jax.vmap(jax.random.categorical)(at, warm)
        return jnp.where(cold, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)

    def body(carry, n):
        logits, cache = carry
        code = draw(logits, n)
        read = code if guidance is None else jnp.concatenate([code, code])
        return module.apply({"params": params}, read, n, cache, method="step"), code

    carry = module.apply({"params": params}, *conditions, dot, drop, method="prefill")
    (logits, _), codes = jax.lax.scan(body, carry, jnp.arange(module.codes - 1))
    return jnp.concatenate([codes.T, draw(logits, module.codes - 1)[:, None]], axis=1)
