"""The autoregressive prior: z_i as a sequence of discrete codes (arXiv 2204.06125 section 2.2).

Image embeddings are reduced by PCA (the paper keeps 319 of 1,024 dimensions and loses less than 1 %
of the mean-squared error), ordered by falling eigenvalue, and each dimension is quantised into
1,024 buckets. A causal transformer predicts the codes one after another behind the prefix

    [encoded text (L), z_t, a token for the quantised dot product z_i . z_t]

At sampling time that token is drawn from the upper half of its training distribution. The paper
gives the code model's size (Table 3, "latent decoder": context 384, width 1664, 24 layers, 26
heads) and leaves the layout open. Chosen here: the text enters as CLIP's hidden states (77 tokens;
with z_t, the dot token and 318 codes read that is 397 positions), one bucket embedding is shared by
all dimensions and a learned position tells them apart, one output matrix likewise, and buckets are
of equal width over +-`range_sigmas` standard deviations.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip.errors import ConfigError, DataError
from unclip.models.prior import EmbeddingInput, TextInput
from unclip.models.transformer import LayerNorm, Transformer, causal_mask

RANGE_SIGMAS = 4.0  # a normal dimension leaves the buckets' range once in 16,000 values

PRESETS: dict[str, dict] = {
    "paper": dict(
        embed_dim=1024,
        codes=319,
        buckets=1024,
        context=77,
        text_width=1024,
        width=1664,
        layers=24,
        heads=26,
    ),
    "emoji": dict(
        embed_dim=128,
        codes=48,
        buckets=128,
        context=32,
        text_width=128,
        width=192,
        layers=4,
        heads=4,
    ),
}


@dataclass
class StreamingCovariance:
    """Mean and covariance of vectors seen in batches, float64, by pairwise updates (Chan et al.).

    Exact to rounding whatever the batches, and two of them merge, so that each process can see its
    own part of the data.
    """

    dim: int
    count: int = 0
    mean: np.ndarray = field(default=None)
    scatter: np.ndarray = field(default=None)

    def __post_init__(self):
        if self.mean is None:
            self.mean = np.zeros(self.dim)
            self.scatter = np.zeros((self.dim, self.dim))

    def update(self, batch: Any) -> "StreamingCovariance":
        """Add the rows of `batch` [n, dim]; returns self.

        Raises:
          DataError: another width, or a value that is not finite.
        """
        batch = np.asarray(batch, np.float64)
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise DataError(f"embeddings have shape {batch.shape}; expected [n, {self.dim}]")
        if not np.isfinite(batch).all():
            raise DataError("embeddings hold NaN or infinity; expected finite values")
        if len(batch):
            mean = batch.mean(0)
            centred = batch - mean
            self.merge(StreamingCovariance(self.dim, len(batch), mean, centred.T @ centred))
        return self

    def merge(self, other: "StreamingCovariance") -> "StreamingCovariance":
        """Take in what `other` has seen; returns self."""
        total = self.count + other.count
        if other.count:
            shift = other.mean - self.mean
            self.scatter = self.scatter + other.scatter
            self.scatter += np.outer(shift, shift) * (self.count * other.count / total)
            self.mean = self.mean + shift * (other.count / total)
            self.count = total
        return self

    @property
    def covariance(self) -> np.ndarray:
        """float64 [dim, dim], divided by count - 1 (as `np.cov`).

        Raises:
          DataError: fewer than two vectors were seen.
        """
        if self.count < 2:
            raise DataError(f"{self.count} embeddings were seen; a covariance needs at least 2")
        return self.scatter / (self.count - 1)


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
    return (z - jnp.asarray(pca.mean, jnp.float32)) @ jnp.asarray(pca.components, jnp.float32)


def decode(pca: PCA, coefficients: jax.Array) -> jax.Array:
    """Embeddings float32 [..., D] from coefficients [..., N]."""
    components = jnp.asarray(pca.components, jnp.float32)
    return coefficients @ components.T + jnp.asarray(pca.mean, jnp.float32)


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
    width = _bucket_width(scale, buckets, range_sigmas)
    index = jnp.floor(coefficients / width + buckets / 2)
    return jnp.clip(index, 0, buckets - 1).astype(jnp.int32)


def dequantise(
    codes: jax.Array,
    scale: jax.Array,
    buckets: int = 1024,
    range_sigmas: float = RANGE_SIGMAS,
) -> jax.Array:
    """Bucket centres float32 [..., N] of codes int [..., N]; at most half a bucket off."""
    width = _bucket_width(scale, buckets, range_sigmas)
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


class ARPrior(nn.Module):
    """The causal transformer over [text, z_t, dot token, codes].

    Fields: `codes` is the number N of quantised dimensions, `dot_buckets` the number of dot-product
    buckets (even); `learned_null` as in `prior.DiffusionPrior`. Parameters: `text/…`, `z_t/…`,
    `dot`, `code` (embeddings), `position` [context + 1 + N, width], `transformer/…`, `norm_out`,
    `out`.
    """

    embed_dim: int
    codes: int
    buckets: int
    context: int
    text_width: int
    width: int
    layers: int
    heads: int
    dot_buckets: int = 16
    activation: str = "gelu"
    learned_null: bool = False
    dtype: Any = jnp.float32
    remat: str | None = None
    fold: bool = False
    attention_impl: str = "xla"

    def setup(self):
        small = nn.initializers.normal(0.02)
        embed = partial(nn.Embed, features=self.width, dtype=self.dtype, embedding_init=small)
        self.text = TextInput(
            self.context,
            self.width,
            self.text_width,
            learned_null=self.learned_null,
            dtype=self.dtype,
        )
        self.z_t = EmbeddingInput(self.width, self.learned_null, self.dtype)
        self.dot = embed(self.dot_buckets)
        self.code = embed(self.buckets)
        shape = (self.length, self.width)
        self.position = self.param("position", nn.initializers.normal(0.01), shape, jnp.float32)
        self.transformer = Transformer(
            self.width,
            self.layers,
            self.heads,
            activation=self.activation,
            dtype=self.dtype,
            remat=self.remat,
            fold=self.fold,
            attention_impl=self.attention_impl,
        )
        self.norm_out = LayerNorm(dtype=self.dtype)
        self.out = nn.Dense(self.buckets, dtype=self.dtype, kernel_init=small)

    @property
    def prefix(self) -> int:
        """Tokens before the first code: the text, z_t and the dot product."""
        return self.context + 2

    @property
    def length(self) -> int:
        """Tokens in all; the last code is predicted and never read."""
        return self.prefix + self.codes - 1

    def _prefix(self, z_t, text_hidden, text_mask, dot, drop_text):
        """The prefix [B, prefix, width] and the key mask bool [B, length]."""
        if z_t.shape[-1] != self.embed_dim:
            raise ConfigError(
                f"the prior was given z_t of shape {z_t.shape}; expected [B, {self.embed_dim}]"
            )
        text, mask = self.text(text_hidden, text_mask, drop_text)
        x = jnp.concatenate([text, self.z_t(z_t, drop_text), self.dot(dot)[:, None]], axis=1)
        rest = self.length - self.context
        return x, jnp.pad(mask, ((0, 0), (0, rest)), constant_values=True)

    def _logits(self, x):
        return self.out(self.norm_out(x)).astype(jnp.float32)

    def __call__(self, codes, z_t, text_hidden, text_mask, dot, drop_text=None):
        """Teacher-forced logits: those of code n see the prefix and codes 0..n-1.

        Args:
          codes: int32 [B, N] in 0..buckets-1.
          z_t: float [B, embed_dim], unnormalised.
          text_hidden: float [B, context, text_width].
          text_mask: bool [B, context], True = a real token; None = all.
          dot: int32 [B] in 0..dot_buckets-1.
          drop_text: bool [B], rows whose text and z_t become the learned null.

        Returns:
          float32 [B, N, buckets].

        Raises:
          ConfigError: shapes that do not fit.
        """
        if codes.shape[1] != self.codes:
            raise ConfigError(
                f"the prior was given codes of shape {codes.shape}; expected [B, {self.codes}]"
            )
        x, mask = self._prefix(z_t, text_hidden, text_mask, dot, drop_text)
        x = jnp.concatenate([x, self.code(codes[:, :-1])], axis=1)
        x = x + self.position.astype(x.dtype)
        x = self.transformer(x, causal_mask(self.length) & mask[:, None, None])
        return self._logits(x[:, self.prefix - 1 :])

    def prefill(self, z_t, text_hidden, text_mask, dot, drop_text=None):
        """Read the prefix; arguments as in `__call__`.

        Returns:
          (logits float32 [B, buckets] of code 0, the cache that `step` continues: a pytree).
        """
        x, mask = self._prefix(z_t, text_hidden, text_mask, dot, drop_text)
        x = x + self.position[: self.prefix].astype(x.dtype)
        # The keys of codes not read yet lie after every prefix position, so causality hides them.
        causal = causal_mask(self.length)[:, :, : self.prefix]
        cache = self.transformer.init_cache(x.shape[0], self.length)
        x, cache = self.transformer(x, causal & mask[:, None, None], cache, 0)
        return self._logits(x[:, -1]), {"attention": cache, "mask": mask}

    def step(self, code, n, cache):
        """Read code n, int32 [B], and give the logits of code n + 1.

        Args:
          code: int32 [B].
          n: int32 scalar in 0..N-2.
          cache: what `prefill` or the last `step` returned.

        Returns:
          (logits float32 [B, buckets], cache).
        """
        at = self.prefix + n
        x = self.code(code)[:, None]
        x = x + jax.lax.dynamic_slice_in_dim(self.position, at, 1).astype(x.dtype)
        seen = cache["mask"] & (jnp.arange(self.length) <= at)
        x, attention = self.transformer(x, seen[:, None, None], cache["attention"], at)
        return self._logits(x[:, 0]), {"attention": attention, "mask": cache["mask"]}


def keep_top_p(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Logits [..., K] with all but the likeliest values of total probability >= top_p at -inf."""
    order = jnp.sort(logits, axis=-1)[..., ::-1]
    before = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1) - jax.nn.softmax(order, axis=-1)
    # The likeliest always stays (top_p may be 0); the last value kept marks the threshold.
    kept = (before < top_p).at[..., 0].set(True)
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
    conditions, drop = (z_t, text_hidden, text_mask), None
    if guidance is not None:
        if uncond is None and not module.learned_null:
            raise ConfigError(
                "guidance was given to an AR prior with learned_null=False; expected uncond = "
                "(z_t, text_hidden, text_mask) of the empty caption"
            )
        other = conditions if uncond is None else uncond
        if uncond is None:
            drop = jnp.arange(2 * batch) >= batch
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
