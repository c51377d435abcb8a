"""Training and drawing from the decoder p(x | z_i, caption) (section 2.1 of the paper).

A text- and embedding-conditional diffusion model of small pictures. The picture's own CLIP
embedding is dropped 10 % of the time and the caption 50 %, separately, so that the same network
gives every conditional and unconditional prediction that classifier-free guidance needs. Captions
may be read through a frozen T5 instead of CLIP, as in Imagen (arXiv 2205.11487).
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from unclip import errors
from unclip.diffusion import gaussian, guidance, losses, schedule
from unclip.models import decoder as decoder_model
from unclip.tasks import base, keys
from unclip.tasks.arrays import to_float, unit
from unclip.tasks.clip import FrozenClip
from unclip.tasks.t5 import FrozenT5

T, NOISE, DROP_IMAGE, DROP_TEXT, DROPOUT = range(5)  # tags of a sample's random draws
EMBEDDINGS = ("image", "text")
THRESHOLDS = {
    "static": guidance.static_threshold,
    "dynamic": guidance.dynamic_threshold,
}
TEXT_ENCODERS = ("clip", "t5")


def needs(model: decoder_model.Decoder, text_encoder: str) -> tuple[str, ...]:
    """Which frozen parts a decoder reads its conditions through: "clip", "t5", both or none.

    Raises:
      ConfigError: an unknown text encoder, or one that cannot give what the model reads.
    """
    if text_encoder not in TEXT_ENCODERS:
        raise errors.unknown("text encoder", text_encoder, TEXT_ENCODERS)
    t5 = text_encoder == "t5"
    if t5 and (model.text_layers or model.use_z_t or not model.use_text_tokens):
        raise errors.ConfigError(
            "text_encoder 't5' gives hidden states and no z_t: expected arch.text_layers=0, "
            "arch.use_z_t=False, arch.use_text_tokens=True"
        )
    read = model.use_text_tokens and not model.text_layers and not t5
    clip = model.use_z_i or model.use_z_t or read
    return ("clip",) * clip + ("t5",) * t5


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DecoderTask(base.Pictures):
    """The decoder.

    Args:
      arch: keyword arguments of `models.decoder.Decoder`.
      clip, t5: the frozen networks that `needs` names, others None.
      text_encoder: what captions are read through, "clip" (also for a decoder with a text
        transformer of its own, whose tokens are CLIP's) or "t5".
      image_size: side of the pictures, pixels.
      noise_schedule: name of alpha_bar's schedule.
      parametrisation: what the network predicts, "eps" (paper), "x0" or "v".
      variance: "learned_range" (paper), "fixed_small" or "fixed_large".
      vlb_weight: weight of one term of L_vlb, in bits a dimension. 1 is Improved DDPM's 0.001 on
        the sum over 1,000 steps, of which a training sample sees one.
      min_snr: gamma of min-SNR weighting (arXiv 2303.09556), or None.
      embedding: "image" gives the network z_i of the picture (paper); "text" z_t of the caption in
        its place, the decoder without a prior that section 5.1 compares with.
      z_scale: 0 gives the network z_i as CLIP does, a number gives z_scale * z_i / |z_i|; must be
        that of a prior with `embedding="scale"`.
      image_drop, text_drop: fractions of training samples without z_i, without caption.
      stored: the input delivers z_i, and no picture is encoded.
      timesteps: see `base.Diffusion`.
      draw: settings of `sample`: steps, spacing, guidance, guidance_low, guidance_high,
        guidance_rescale, sampler, eta, threshold.
    """

    clip: FrozenClip | None = None
    t5: FrozenT5 | None = None
    text_encoder: str = "clip"
    image_size: int = 64
    noise_schedule: str = "cosine"
    parametrisation: str = "eps"
    variance: str = "learned_range"
    vlb_weight: float = 1.0
    min_snr: float | None = None
    embedding: str = "image"
    z_scale: float = 0.0
    image_drop: float = 0.1
    text_drop: float = 0.5
    stored: bool = False
    draw: Mapping[str, Any] | None = None

    stage = "decoder"
    splits_over_tensor = False
    network, presets = decoder_model.Decoder, decoder_model.PRESETS
    measures = ("drawn", "likelihood")
    draw_defaults = MappingProxyType(
        {
            "steps": 25,
            "spacing": "even",
            "guidance": 8.0,
            **base.GUIDANCE,
            "sampler": "ddpm",
            "eta": 0.0,
            "threshold": "static",
        }
    )
    draw_choices = MappingProxyType({"threshold": tuple(THRESHOLDS)})

    def __post_init__(self):
        model = self.network(**self.arch)
        names = needs(model, self.text_encoder)
        for name in names:
            if getattr(self, name) is None:
                raise errors.ConfigError(f"this decoder reads its conditions through a {name} part")
        gaussian.check(self.parametrisation, self.variance)
        if self.embedding not in EMBEDDINGS:
            raise errors.unknown("embedding", self.embedding, EMBEDDINGS)
        if self.stored and not (model.use_z_i and self.embedding == "image"):
            raise errors.ConfigError("stored embeddings: this decoder is not given z_i")
        clip, t5 = (getattr(self, name) if name in names else None for name in ("clip", "t5"))
        own_text = model.text_layers > 0
        self._set(
            model=model,
            frozen_names=names,
            clip=clip,
            t5=t5,
            vocabulary=clip.model.vocab_size if clip else model.vocab,
            context=model.text_context if own_text or t5 else clip.model.context,
            schedule=schedule.make(self.noise_schedule),
            # A model without a null of its own sees the empty caption instead of a dropped one.
            own_null=model.learned_null_text or own_text,
        )

    @classmethod
    def needs(cls, arch, settings):
        return needs(cls.network(**arch), settings.get("text_encoder") or "clip")

    @classmethod
    def z_scale_of(cls, settings):
        return float(settings.get("z_scale") or 0.0)

    @property
    def tokenizer(self):
        return self.t5.tokenizer if self.t5 else None

    @property
    def judge(self):
        return self.clip

    def init_frozen(self, name, key):
        return getattr(self, name).init(key)

    def batch_spec(self, batch_size: int):
        wanted = {}
        if self.model.use_z_i and self.embedding == "image":
            clip = self.clip.model
            wanted = {"z_i": clip.embed_dim} if self.stored else {"clip_image": clip.image_size}
        return base.spec(batch_size, image=self.image_size, tokens=self.context, **wanted)

    def init(self, key):
        size = self.image_size
        tokens = jnp.zeros((1, self.context), jnp.int32)
        z = jnp.zeros((1, self.clip.model.embed_dim)) if self.clip else None
        widths = [f.model.text_width for f in (self.clip,) if f]
        widths = [self.t5.model.width] if self.t5 else widths
        return self.model.init(
            key,
            jnp.zeros((1, size, size, 3)),
            jnp.zeros((1,), jnp.int32),
            z_i=z,
            z_t=z,
            text_hidden=jnp.zeros((*tokens.shape, *widths)) if widths else None,
            tokens=tokens,
            text_mask=tokens == 0,
        )["params"]

    def embed(self, frozen, batch):
        """z_i [B, D] of the batch, stored or from its pictures; None where it is not read.

        With `embedding="text"`, z_t of its captions.
        """
        if not self.model.use_z_i:
            return None
        if self.embedding == "text":
            return self.clip.text(frozen["clip"], batch["tokens"])[0]
        return batch["z_i"] if self.stored else self.clip.image(frozen["clip"], batch["clip_image"])

    def scaled(self, z_i):
        """z_i [B, D] as the network is given it."""
        return self.z_scale * unit(z_i) if self.z_scale and z_i is not None else z_i

    def empty(self, batch_size: int, context: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The empty caption: (tokens int32 [B, L], mask bool [B, L]), L = `context` of the task."""
        context = context or self.context
        if self.t5:
            return self.t5.empty(batch_size, context)
        tokens = np.zeros((batch_size, context), np.int32)
        tokens[:, :2] = self.vocabulary - 2, self.vocabulary - 1
        return tokens, np.broadcast_to(np.arange(context) < 2, tokens.shape)

    def text(self, frozen, tokens, mask, drop):
        """Caption conditions, rows of `drop` (bool [B]) replaced by the empty caption."""
        empty, empty_mask = self.empty(1, tokens.shape[1])
        tokens = jnp.where(drop[:, None], empty, tokens)
        mask = jnp.where(drop[:, None], empty_mask, mask)
        z_t, hidden = None, None
        if self.t5:
            hidden = self.t5.text(frozen["t5"], tokens, mask)
        elif self.clip:
            z_t, hidden = self.clip.text(frozen["clip"], tokens)
        return {"z_t": z_t, "text_hidden": hidden, "tokens": tokens, "text_mask": mask}

    def loss(self, params, frozen, batch, key, *, train):
        """L_hybrid = L_simple + vlb_weight * L_vlb (Improved DDPM, eq. 16), or L_simple alone."""
        sample_keys = keys.sample_keys(key, batch["sample"])
        x_0 = to_float(batch["image"])
        t, weight = self.timesteps_of(frozen, sample_keys, len(self.schedule), T, train=train)
        eps = keys.normal(sample_keys, x_0.shape[1:], NOISE)
        x_t = gaussian.q_sample(self.schedule, x_0, t, eps)
        drop_image = keys.bernoulli(sample_keys, self.image_drop if train else 0.0, DROP_IMAGE)
        drop_text = keys.bernoulli(sample_keys, self.text_drop if train else 0.0, DROP_TEXT)
        raw = self.model.apply(
            {"params": params},
            x_t,
            t,
            z_i=self.scaled(self.embed(frozen, batch)),
            **self.text(frozen, batch["tokens"], batch["text_mask"], drop_text),
            drop_image=drop_image,
            drop_text=drop_text if self.own_null else None,
            **keys.dropout(key, sample_keys, DROPOUT, train=train),
        )
        return diffusion_loss(
            self, raw.astype(jnp.float32), x_0, t, eps, batch["valid"], weight, train=train
        )

    def denoiser(self, params, frozen, conditions, sample_keys, draw):
        """See `base.Pictures`.

        Args:
          frozen: {name: parameters} of at least the parts in `frozen_names`.
          conditions: "z_i" [B, D], None or absent for a decoder without it; "tokens" int32 and
            "text_mask" bool [B, L] of the captions, L = `self.context`, CLIP's or T5's; optionally
            "drop_image" and "drop_text" bool [B], True = without z_i or without the caption, as
            training drops them and as guidance's unconditional half is. What guidance leads away
            from, in place of the dropped conditions: "negative_tokens" and "negative_text_mask"
            like the captions', "negative_z_i" [B, D].
        """
        tokens, mask = conditions["tokens"], conditions["text_mask"]
        nowhere = jnp.zeros(tokens.shape[0], bool)
        z_i, away = conditions.get("z_i"), conditions.get("negative_z_i")
        no_image = conditions.get("drop_image", nowhere)
        no_text = conditions.get("drop_text", nowhere)
        away_tokens, away_mask = tokens, mask
        negative = "negative_tokens" in conditions
        if negative:
            away_tokens, away_mask = conditions["negative_tokens"], conditions["negative_text_mask"]
        # Both at once: two passes of a text tower would be compiled twice.
        tokens, mask = jnp.concatenate([tokens, away_tokens]), jnp.concatenate([mask, away_mask])
        no_text = jnp.concatenate([no_text, nowhere if negative else ~nowhere])
        both = self.text(frozen, tokens, mask, no_text)
        if away is None:
            z_i, drop_image = guidance.twice(self.scaled(z_i)), ~nowhere
        else:
            z_i, drop_image = jnp.concatenate([self.scaled(z_i), self.scaled(away)]), nowhere
        no_image = jnp.concatenate([no_image, drop_image])

        def model_fn(x_t, t, drop):
            del drop  # the rows are conditioned and unconditioned already
            return self.model.apply(
                {"params": params},
                x_t,
                t,
                z_i=z_i,
                **both,
                drop_image=no_image,
                drop_text=no_text if self.own_null else None,
            )

        respaced = self.schedule.respace(draw["steps"], draw["spacing"])
        learned = self.variance == "learned_range"
        denoise = gaussian.make_denoise(
            self.guided(model_fn, draw, learned_variance=learned),
            respaced,
            parametrisation=self.parametrisation,
            variance=self.variance,
            clip=THRESHOLDS[draw["threshold"]](),
        )
        return denoise, respaced

    def predict(self):
        """`sample`: a picture for every caption and the z_i of its true picture; `bound`: what
        `losses.bits_per_dimension` gives of the true pictures, with both conditions and without
        guidance."""

        def sample(params, frozen, batch, key):
            sample_keys = keys.sample_keys(key, batch["sample"])
            conditions = {"z_i": self.embed(frozen, batch)}
            conditions |= {name: batch[name] for name in ("tokens", "text_mask")}
            drawn = self.sample(params, frozen, conditions, sample_keys)
            error = jnp.mean((drawn - to_float(batch["image"])) ** 2, axis=(1, 2, 3))
            return {"pictures": drawn, "mse": base.mean(error, batch["valid"])}

        def bound(params, frozen, batch, key):
            sample_keys = keys.sample_keys(key, batch["sample"])
            nowhere = jnp.zeros(batch["tokens"].shape[0], bool)
            conditions = self.text(frozen, batch["tokens"], batch["text_mask"], nowhere)
            conditions["z_i"] = self.scaled(self.embed(frozen, batch))
            denoise = gaussian.make_denoise(
                lambda x_t, t: self.model.apply({"params": params}, x_t, t, **conditions),
                self.schedule,
                parametrisation=self.parametrisation,
                variance=self.variance,
                clip=1.0,
            )
            pictures = to_float(batch["image"])
            return losses.bits_per_dimension(denoise, self.schedule, pictures, sample_keys)

        return {"sample": sample, "bound": bound}


def diffusion_loss(task, raw, x_0, t, eps, valid, weight=None, *, train):
    """The loss of a picture stage from the network's raw output, with its metrics.

    Args:
      weight: of every row's loss, from `base.Diffusion.timesteps_of`.

    Returns:
      (scalar, {"loss"; "mse", not weighted by min-SNR; with a learned variance "vlb" and, of
      held-out pictures, "bits_per_dim": the whole bound, of which each has one term, drawn at
      random, and L_T}).
    """
    options = {"parametrisation": task.parametrisation}
    learned = task.variance == "learned_range"
    if learned:
        total, simple, bound = losses.hybrid(
            task.schedule, x_0, t, eps, raw, vlb_weight=task.vlb_weight,
            min_snr_gamma=task.min_snr or None, **options,
        )  # fmt: skip
    else:
        mean = raw[..., : x_0.shape[-1]]
        simple = total = losses.l_simple(task.schedule, x_0, t, eps, mean, **options)
        if task.min_snr:
            snr = losses.min_snr_weight(task.schedule, t, gamma=task.min_snr, **options)
            total = snr * total
    rows = {"loss": total, "mse": simple} | ({"vlb": bound} if learned else {})
    if learned and not train:
        prior = losses.l_prior(task.schedule, x_0)
        rows["bits_per_dim"] = len(task.schedule) * bound + prior
    if weight is not None:
        rows = {name: weight * value for name, value in rows.items()}
    metrics = {name: base.mean(value, valid) for name, value in rows.items()}
    return metrics["loss"], metrics | task.told(t, total, valid, train=train)
