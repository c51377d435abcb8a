"""Training and drawing from the priors p(z_i | caption) (section 2.2 of the paper).

Both priors see the caption through a frozen CLIP. The diffusion prior predicts the un-noised
embedding with a mean-squared error; the autoregressive prior predicts the quantised principal
components of the embedding. Classifier-free guidance comes from captions replaced by the empty one.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unclip import errors
from unclip.diffusion import gaussian, losses, samplers, schedule
from unclip.files.moments import Moments
from unclip.models import prior as prior_model
from unclip.models import prior_ar
from unclip.tasks import base, codes, keys
from unclip.tasks.arrays import unit
from unclip.tasks.clip import FrozenClip

EMBEDDINGS = ("whiten", "scale")
VARIANCES = ("fixed_small", "fixed_large", "analytic")
T, NOISE, DROP = range(3)  # tags of a sample's random draws
CONDITIONS = ("z_t", "text_hidden", "text_mask")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Conditioned(base.Stage):
    """What the two priors share: captions and pictures through the frozen CLIP.

    Args:
      arch: keyword arguments of the prior's network.
      clip: the frozen CLIP.
      text_drop: fraction of captions replaced by the empty one (paper: 10 %).
      stored: the input delivers z_i, and no picture is encoded.
      draw: settings of `sample`.
    """

    clip: FrozenClip
    text_drop: float = 0.1
    stored: bool = False
    draw: Mapping[str, Any] | None = None

    stage = "prior"
    measures = ("prior_quality",)
    frozen_names = ("clip", "statistics")

    @classmethod
    def needs(cls, arch, settings):
        return ("clip",)

    def _fitting(self, model):
        """`model`, if it fits the frozen CLIP.

        Raises:
          ConfigError: names the fields to set.
        """
        clip = self.clip.model
        wanted = {"embed_dim": clip.embed_dim}
        # A CLIP without that tower still serves variations, where no prior draws.
        own = model.vocab_size  # reads the tokens itself
        reads = bool(not own and model.text_width and clip.text_layers)
        if reads:
            wanted["text_width"] = clip.text_width
        wrong = [
            f"arch.{name} is {getattr(model, name)}, the CLIP has {value}: "
            f"--config.arch.{name}={value}"
            for name, value in wanted.items()
            if getattr(model, name) != value
        ]
        if reads and model.context > clip.context:
            wrong.append(
                f"arch.context is {model.context}, the CLIP reads {clip.context} tokens: "
                f"--config.arch.context={clip.context}"
            )
        if getattr(model, "codes", 0) > clip.embed_dim:
            wrong.append(
                f"arch.codes is {model.codes}, z_i has {clip.embed_dim} components: "
                f"--config.arch.codes={clip.embed_dim} at most"
            )
        if wrong:
            raise errors.ConfigError("the prior does not fit its CLIP: " + "; ".join(wrong))
        return model

    @property
    def context(self) -> int:
        """Of captions, tokens."""
        return self.model.context

    @property
    def reads_tokens(self) -> bool:
        """Whether the network reads the caption's tokens itself."""
        return bool(self.model.vocab_size)

    def init_frozen(self, name, key):
        if name == "statistics":
            return {
                name: jnp.ones(s.shape, s.dtype) for name, s in self.statistics_shapes().items()
            }
        return self.clip.init(key)

    def batch_spec(self, batch_size: int):
        clip = self.clip.model
        wanted = {"z_i": clip.embed_dim} if self.stored else {"image": clip.image_size}
        return base.spec(batch_size, tokens=self.context, **wanted)

    def image(self, frozen, batch):
        """z_i [B, D] of the batch, stored or from its pictures."""
        return batch["z_i"] if self.stored else self.clip.image(frozen["clip"], batch["image"])

    def conditions(self, frozen, tokens, mask, drop):
        """The caption as the prior sees it, rows of `drop` (bool [B]) replaced by the empty one.

        Returns:
          {"z_t" [B, D], "text_hidden" [B, L, W] or the tokens themselves, "text_mask" [B, L]}, and
          "drop_text" [B] for a model with a learned null of its own.
        """
        empty, empty_mask = self.clip.empty(1, tokens.shape[1])
        tokens = jnp.where(drop[:, None], empty, tokens)
        mask = jnp.where(drop[:, None], empty_mask, mask)
        z_t, hidden = self.clip.text(frozen["clip"], tokens)
        hidden = tokens if self.reads_tokens else hidden
        out = {"z_t": z_t, "text_hidden": hidden, "text_mask": mask}
        return out | {"drop_text": drop} if self.model.learned_null else out

    def with_and_without(self, frozen, given):
        """`conditions` of the captions that a draw is given, and of what guidance leads away from:
        "negative_tokens" and "negative_text_mask" where `given` has them, dropped captions where
        not. Read at once: two passes of the text tower would be compiled twice."""
        tokens, mask = given["tokens"], given["text_mask"]
        batch, negative = len(tokens), "negative_tokens" in given
        away = (
            (given["negative_tokens"], given["negative_text_mask"]) if negative else (tokens, mask)
        )
        tokens, mask = jnp.concatenate([tokens, away[0]]), jnp.concatenate([mask, away[1]])
        drop = given.get("drop_text", jnp.zeros(batch, bool))
        drop = jnp.concatenate([drop, jnp.full(batch, not negative)])
        both = self.conditions(frozen, tokens, mask, drop)
        return tuple(
            {n: a[rows] for n, a in both.items()} for rows in (np.s_[:batch], np.s_[batch:])
        )

    def predict(self):
        """`sample`: draws z_i for the captions and compares it with the pictures' own."""

        def sample(params, frozen, batch, key):
            sample_keys = keys.sample_keys(key, batch["sample"])
            captions = {name: batch[name] for name in ("tokens", "text_mask")}
            drawn = self.sample(params, frozen, captions, sample_keys)
            z_i = self.image(frozen, batch)
            similarity = unit(drawn) @ unit(z_i).T
            own = jnp.diagonal(similarity)
            better = ((similarity > own[:, None]) & batch["valid"][None, :]).sum(axis=1)
            return {
                "cosine": base.mean(own, batch["valid"]),
                "top_1": base.mean(better == 0, batch["valid"]),
            }

        return {"sample": sample}


def _moments(width: int, batches: Iterable[np.ndarray], sums: dict | None = None) -> Moments:
    """Sums over batches of embeddings [b, width].

    Args:
      sums: of batches before these, or empty; kept up to date batch by batch.

    Raises:
      DataError: fewer than two rows in all.
    """
    moments, sums = Moments(width), {} if sums is None else sums
    if "count" in sums:
        moments.count = int(sums["count"])
        moments.total, moments.outer = sums["total"], sums["outer"]
    for rows in batches:
        moments.add(rows)
        sums |= {"count": moments.count, "total": moments.total, "outer": moments.outer}
    if moments.count < 2:
        raise errors.DataError(
            f"{moments.count} embeddings were seen; a covariance needs at least 2"
        )
    return moments


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DiffusionPriorTask(_Conditioned, base.Diffusion):
    """The diffusion prior; its statistics are {"mean": [D], "std": [D]} of z_i.

    With an analytic variance they also hold "x0_error" [T], what the trained network is off at
    every timestep, which is 0 until it was measured.

    Args:
      noise_schedule: name of alpha_bar's schedule.
      embedding: "whiten" diffuses (z_i - mean) / std, "scale" diffuses `scale` * z_i / |z_i|.
      clamp: sampling clamps the predicted x_0 to +-clamp (Karlo 10, its diffusers port 5); 0 or
        None is off.
      variance: of sampling: "fixed_small" (Karlo), "fixed_large" or "analytic" (paper), see
        `gaussian.with_analytic_variance`.
      timesteps: see `base.Diffusion`.
      draw: settings of `sample`: steps, spacing, guidance, guidance_low, guidance_high,
        guidance_rescale, sampler, eta, candidates.
      Other arguments: see `_Conditioned`.
    """

    noise_schedule: str = "cosine"
    embedding: str = "whiten"
    scale: float = 17.2
    clamp: float | None = 10.0
    variance: str = "fixed_small"

    network, presets = prior_model.DiffusionPrior, prior_model.PRESETS
    draw_defaults = MappingProxyType(
        {
            "steps": 25,
            "spacing": "even",
            "guidance": 4.0,
            **base.GUIDANCE,
            "sampler": "ddpm",
            "eta": 0.0,
            "candidates": 2,
        }
    )

    def __post_init__(self):
        if self.embedding not in EMBEDDINGS:
            raise errors.unknown("embedding", self.embedding, EMBEDDINGS)
        if self.variance not in VARIANCES:
            raise errors.unknown("variance", self.variance, VARIANCES)
        self._set(
            model=self._fitting(self.network(**self.arch)),
            schedule=schedule.make(self.noise_schedule),
            clamp=self.clamp or None,
        )

    @classmethod
    def z_scale_of(cls, settings):
        scaled = settings.get("embedding") == "scale"
        return float(settings.get("scale", cls.scale)) if scaled else 0.0

    def init(self, key):
        model, clip = self.model, self.clip.model
        z = jnp.zeros((1, model.embed_dim))
        tokens = jnp.zeros((1, self.context), jnp.int32)
        hidden = tokens if model.vocab_size else jnp.zeros((*tokens.shape, clip.text_width))
        mask = tokens == 0
        return model.init(key, z, jnp.zeros((1,), jnp.int32), z, hidden, mask)["params"]

    def fit(self, embeddings, sums=None):
        """Mean and standard deviation of z_i, float32 [D], from (z_i, z_t) batches [b, D]."""
        moments = _moments(self.clip.model.embed_dim, (z_i for z_i, _ in embeddings), sums)
        std = np.sqrt(np.maximum(np.diag(moments.covariance()), 1e-12))
        return {"mean": np.float32(moments.mean()), "std": np.float32(std)} | self.unmeasured

    @property
    def unmeasured(self):
        if self.variance != "analytic":
            return {}
        return {"x0_error": np.zeros(len(self.schedule), np.float32)}

    def statistics_shapes(self):
        """The shapes `fit` would give, for planning without data."""
        leaf = jax.ShapeDtypeStruct((self.model.embed_dim,), jnp.float32)
        shapes = {"mean": leaf, "std": leaf}
        return shapes | jax.eval_shape(lambda: jax.tree.map(jnp.asarray, self.unmeasured))

    def encode(self, frozen, z_i):
        """z_i to the space the diffusion runs in, [B, D]."""
        if self.embedding == "scale":
            return self.scale * unit(z_i)
        mean, std = (frozen["statistics"][name][None] for name in ("mean", "std"))
        return (z_i - mean) / std

    def decode(self, frozen, x_0):
        """The inverse of `encode`; a unit vector when embeddings are scaled."""
        if self.embedding == "scale":
            return unit(x_0)
        mean, std = (frozen["statistics"][name][None] for name in ("mean", "std"))
        return x_0 * std + mean

    def loss(self, params, frozen, batch, key, *, train):
        """L_prior = E |f(z_i^(t), t, y) - z_i|^2 in the space of `encode` (paper, section 2.2)."""
        sample_keys = keys.sample_keys(key, batch["sample"])
        x_0 = self.encode(frozen, self.image(frozen, batch))
        t, weight = self.timesteps_of(frozen, sample_keys, len(self.schedule), T, train=train)
        eps = keys.normal(sample_keys, x_0.shape[1:], NOISE)
        x_t = gaussian.q_sample(self.schedule, x_0, t, eps)
        drop = keys.bernoulli(sample_keys, self.text_drop if train else 0.0, DROP)
        conditions = self.conditions(frozen, batch["tokens"], batch["text_mask"], drop)
        predicted = self.model.apply({"params": params}, x_t, t, **conditions)
        predicted = predicted.astype(jnp.float32)
        squared = losses.l_simple(self.schedule, x_0, t, eps, predicted, parametrisation="x0")
        loss = base.mean(squared if weight is None else weight * squared, batch["valid"])
        cosine = jnp.sum(unit(self.decode(frozen, predicted)) * unit(self.decode(frozen, x_0)), -1)
        metrics = {"loss": loss, "cosine": base.mean(cosine, batch["valid"])}
        return loss, metrics | self.told(t, squared, batch["valid"], train=train)

    def x0_error(self, params, frozen, batch, t, key):
        """Mean squared error of x_0 a dimension, [B], at timesteps t int32 [B]."""
        sample_keys = keys.sample_keys(key, batch["sample"])
        x_0 = self.encode(frozen, self.image(frozen, batch))
        eps = keys.normal(sample_keys, x_0.shape[1:], NOISE)
        x_t = gaussian.q_sample(self.schedule, x_0, t, eps)
        captions = batch["tokens"], batch["text_mask"], jnp.zeros(len(t), bool)
        conditions = self.conditions(frozen, *captions)
        predicted = self.model.apply({"params": params}, x_t, t, **conditions)
        predicted = predicted.astype(jnp.float32)
        return losses.l_simple(self.schedule, x_0, t, eps, predicted, parametrisation="x0")

    def sample(
        self,
        params,
        frozen,
        conditions,
        sample_keys,
        *,
        draw=None,
        x_T=None,
        noise=None,
        tell=None,
        tell_every=1,
    ):
        """Draws z_i for captions: `candidates` each, the better dot product with z_t is kept.

        Args:
          conditions: "tokens" int32 and "text_mask" bool [B, L]; optionally "drop_text" bool [B],
            True = without the caption, as training drops it and as guidance's unconditional half
            is; "negative_tokens", "negative_text_mask": the caption that guidance leads away from,
            in place of the dropped one. sample_keys: typed keys [B], one a picture.
          draw: settings in place of the task's own; those that `cascade.pipeline.TRACED` names may
            be traced.
          x_T: optional starting noise [candidates * B, D].
          noise: seam for parity tests, [steps, candidates * B, D] standard normal.
          tell, tell_every: see `samplers.sample`; of the first candidate, in the space that
            `encode` leads to.

        Returns:
          z_i float32 [B, D], in CLIP's own scale.
        """
        draw = {**self.draw, **(draw or {})}
        batch, candidates = conditions["tokens"].shape[0], draw["candidates"]
        conditional, null = self.with_and_without(frozen, conditions)
        every = jnp.concatenate([keys.fold(sample_keys, c) for c in range(candidates)])

        both = jax.tree.map(
            lambda a, b: jnp.concatenate([a] * candidates + [b] * candidates),
            conditional,
            null,
        )

        def model_fn(x_t, t, drop):
            del drop  # the rows of `both` are conditioned and unconditioned already
            return self.model.apply({"params": params}, x_t, t, **both)

        respaced = self.schedule.respace(draw["steps"], draw["spacing"])
        denoise = gaussian.make_denoise(
            self.guided(model_fn, draw),
            respaced,
            parametrisation="x0",
            variance="fixed_small" if self.variance == "analytic" else self.variance,
            clip=self.clamp,
        )
        if self.variance == "analytic":
            error = frozen["statistics"]["x0_error"]
            denoise = gaussian.with_analytic_variance(denoise, respaced, error)
        if x_T is None:
            x_T = samplers.draw_noise(every, (self.model.embed_dim,))
        z = samplers.sample(
            denoise,
            respaced,
            x_T,
            every,
            sampler=draw["sampler"],
            eta=draw["eta"],
            noise=noise,
            tell=tell,
            tell_every=tell_every,
        )
        z = self.decode(frozen, z).reshape(candidates, batch, -1)
        score = jnp.sum(unit(z) * unit(conditional["z_t"])[None], axis=-1)
        best = jnp.argmax(score, axis=0)
        return jnp.take_along_axis(z, best[None, :, None], axis=0)[0]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ARPriorTask(_Conditioned):
    """The autoregressive prior: z_i as `codes` quantised principal components, most telling first.

    Args:
      range_sigmas: the buckets of a component span +- this many standard deviations.
      draw: settings of `sample`: guidance, temperature, top_p, candidates.
      Other arguments: see `_Conditioned`.
    """

    range_sigmas: float = codes.RANGE_SIGMAS

    network, presets = prior_ar.ARPrior, prior_ar.PRESETS
    draw_defaults = MappingProxyType(
        {"guidance": 1.0, "temperature": 1.0, "top_p": 1.0, "candidates": 1}
    )

    def __post_init__(self):
        self._set(model=self._fitting(self.network(**self.arch)))

    def init(self, key):
        model, clip = self.model, self.clip.model
        tokens = jnp.zeros((1, self.context), jnp.int32)
        return model.init(
            key,
            jnp.zeros((1, model.codes), jnp.int32),
            jnp.zeros((1, clip.embed_dim)),
            tokens if self.reads_tokens else jnp.zeros((*tokens.shape, clip.text_width)),
            tokens == 0,
            jnp.zeros((1,), jnp.int32),
        )["params"]

    def fit(self, embeddings, sums=None):
        """PCA of z_i and quantile edges of z_i . z_t (unit vectors), from (z_i, z_t) batches."""
        sums = {} if sums is None else sums
        dots = sums.setdefault("dots", [])

        def rows():
            for z_i, z_t in embeddings:
                norms = np.linalg.norm(z_i, axis=-1) * np.linalg.norm(z_t, axis=-1)
                dots.append(np.sum(z_i * z_t, axis=-1) / np.maximum(norms, 1e-8))
                yield z_i

        moments = _moments(self.clip.model.embed_dim, rows(), sums)
        pca = codes.fit_pca(moments.mean(), moments.covariance(), dims=self.model.codes)
        edges = codes.fit_dot_edges(np.concatenate(dots), self.model.dot_buckets)
        return {
            "mean": np.float32(pca.mean),
            "components": np.float32(pca.components),
            "scale": np.float32(pca.scale),
            "dot_edges": np.float32(edges),
        }

    def statistics_shapes(self):
        d, n = self.clip.model.embed_dim, self.model.codes
        shapes = {"mean": (d,), "components": (d, n), "scale": (n,)}
        shapes["dot_edges"] = (self.model.dot_buckets - 1,)
        return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}

    def _pca(self, frozen):
        s = frozen["statistics"]
        return codes.PCA(s["mean"], s["components"], s["scale"])

    def loss(self, params, frozen, batch, key, *, train):
        """Mean cross-entropy a code, in nats."""
        sample_keys = keys.sample_keys(key, batch["sample"])
        pca, z_i = self._pca(frozen), self.image(frozen, batch)
        read = codes.quantise(
            codes.encode(pca, z_i), pca.scale, self.model.buckets, self.range_sigmas
        )
        drop = keys.bernoulli(sample_keys, self.text_drop if train else 0.0, DROP)
        conditions = self.conditions(frozen, batch["tokens"], batch["text_mask"], drop)
        z_t = self.clip.text(frozen["clip"], batch["tokens"])[0]
        dot = codes.quantise_dot(
            jnp.sum(unit(z_i) * unit(z_t), -1), frozen["statistics"]["dot_edges"]
        )
        logits = self.model.apply({"params": params}, read, **conditions, dot=dot)
        cross = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), read)
        loss = base.mean(cross.mean(axis=1), batch["valid"])
        hit = jnp.mean(jnp.argmax(logits, -1) == read, axis=1)
        return loss, {"loss": loss, "accuracy": base.mean(hit, batch["valid"])}

    def sample(
        self,
        params,
        frozen,
        conditions,
        sample_keys,
        *,
        draw=None,
        x_T=None,
        noise=None,
        tell=None,
        tell_every=1,
    ):
        """Draws z_i float32 [B, D] for captions [B, L]; see `DiffusionPriorTask.sample`."""
        if x_T is not None or noise is not None:
            raise errors.ConfigError("the autoregressive prior draws codes; it takes no noise")
        del tell, tell_every  # its codes come one after another, and show nothing before the last
        draw = {**self.draw, **(draw or {})}
        pca = self._pca(frozen)
        conditional, null = self.with_and_without(frozen, conditions)
        has_null = self.model.learned_null and "negative_tokens" not in conditions
        drawn = []
        for candidate in range(draw["candidates"]):
            one = codes.sample(
                self.model,
                params,
                keys.fold(sample_keys, candidate),
                *(conditional[name] for name in CONDITIONS),
                drop=conditional.get("drop_text"),
                uncond=None if has_null else tuple(null[c] for c in CONDITIONS),
                temperature=draw["temperature"],
                top_p=draw["top_p"],
                guidance=draw["guidance"],
            )
            coefficients = codes.dequantise(one, pca.scale, self.model.buckets, self.range_sigmas)
            drawn.append(codes.decode(pca, coefficients))
        z = jnp.stack(drawn)
        best = jnp.argmax(jnp.sum(unit(z) * unit(conditional["z_t"])[None], -1), axis=0)
        return jnp.take_along_axis(z, best[None, :, None], axis=0)[0]
