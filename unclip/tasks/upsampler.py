"""Training and drawing from the two diffusion upsamplers (section 2.1, appendix C of the paper).

Each sees the low-resolution picture and nothing else. Training degrades that picture (Gaussian
blur for the first, BSR for the second) and works on random crops; drawing runs at full size.
Karlo has two networks for one upsampler: the second, fine-tuned, makes the last step of a draw.

As an option the small picture also bears noise of a random level, which the network is told
(conditioning augmentation of Cascaded Diffusion, arXiv 2106.15282, section 4.2, and Imagen, arXiv
2205.11487, section 2.3): level s is timestep s * (steps - 1) of the stage's own noise schedule.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from unclip import errors
from unclip.diffusion import gaussian, schedule
from unclip.input.decode import transforms
from unclip.models import upsampler as upsampler_model
from unclip.tasks import base, keys
from unclip.tasks.arrays import to_float
from unclip.tasks.decoder import DROPOUT, NOISE, T, diffusion_loss

LEVEL, LOW_NOISE = 5, 6  # tags of a sample's random draws, beside the decoder's


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class UpsamplerTask(base.Pictures):
    """One upsampler.

    Args:
      arch: keyword arguments of `models.upsampler.Upsampler`.
      image_size: side of the full picture it draws, pixels.
      factor: how many times larger it makes a side.
      crop: side of the training crops, pixels; 0 = whole pictures.
      t_below: training draws timesteps below this one; 0 = all. 1 is for a network that makes the
        last step alone (Karlo's second).
      noise_level: training gives the small picture noise of a level uniform in 0 to this one, at
        most 1; 0 = off. Needs `arch.noise_level`.
      draw: settings of `sample`: steps, spacing, sampler, eta, noise_level.
      Other arguments as in `DecoderTask`.
    """

    image_size: int
    factor: int = 4
    crop: int = 0
    noise_schedule: str = "cosine"
    parametrisation: str = "eps"
    variance: str = "fixed_small"
    vlb_weight: float = 1.0
    min_snr: float | None = None
    t_below: int = 0
    noise_level: float = 0.0
    draw: Mapping[str, Any] | None = None

    stage = "upsampler"
    splits_over_tensor = False
    network, presets = upsampler_model.Upsampler, upsampler_model.PRESETS
    measures = ("drawn",)
    draw_defaults = MappingProxyType(
        {"steps": 27, "spacing": "even", "sampler": "ddim", "eta": 0.0, "noise_level": 0.0}
    )

    def __post_init__(self):
        gaussian.check(self.parametrisation, self.variance)
        diffusion = schedule.make(self.noise_schedule)
        if not 0 <= self.t_below <= len(diffusion):
            raise errors.ConfigError(
                f"t_below is {self.t_below}: expected 0 (all timesteps) to {len(diffusion)}"
            )
        model = self.network(**self.arch)
        if not 0 <= self.noise_level <= 1:
            raise errors.ConfigError(f"noise_level is {self.noise_level}: expected 0 (off) to 1")
        if self.noise_level and not model.noise_level:
            raise errors.ConfigError(
                f"noise_level {self.noise_level} needs a network that is told: "
                "arch.noise_level=True"
            )
        self._set(
            model=model,
            schedule=diffusion,
            reads_level=model.noise_level,
            crop=self.crop or self.image_size,
            t_below=self.t_below or len(diffusion),
        )

    @classmethod
    def part_name(cls, settings, parts):
        """Of a bundle's upsamplers, the one of our size."""
        for name in sorted(name for name in parts if name.startswith(cls.stage)):
            if parts[name].get("image_size") == settings["image_size"]:
                return name
        return f"{cls.stage}_0"

    def whole(self):
        return dataclasses.replace(self, crop=self.image_size)

    def transform(self, use, settings):
        return transforms.Upsampling(
            self.image_size,
            self.factor,
            crop=self.crop,
            degradation=settings["degradation"],
            probability=settings["degradation_probability"],
            train=use != "sample",
            margin=settings["margin"],
        )

    @property
    def trained_steps(self) -> int:
        return self.t_below

    def batch_spec(self, batch_size: int):
        return base.spec(batch_size, image=self.crop, low=self.crop // self.factor)

    def init(self, key):
        x = jnp.zeros((1, self.crop, self.crop, 3))
        low = jnp.zeros((1, self.crop // self.factor, self.crop // self.factor, 3))
        return self.model.init(key, x, jnp.zeros((1,), jnp.int32), low)["params"]

    def loss(self, params, frozen, batch, key, *, train):
        """L_simple (or the hybrid, when the variance is learned) on degraded crops."""
        sample_keys = keys.sample_keys(key, batch["sample"])
        x_0, low = to_float(batch["image"]), to_float(batch["low"])
        t, weight = self.timesteps_of(frozen, sample_keys, self.t_below, T, train=train)
        eps = keys.normal(sample_keys, x_0.shape[1:], NOISE)
        x_t = gaussian.q_sample(self.schedule, x_0, t, eps)
        told = ()
        if self.reads_level:
            level = keys.integers(sample_keys, self._timestep(self.noise_level) + 1, LEVEL)
            low, told = self._noised(low, level, sample_keys), (level,)
        dropout = keys.dropout(key, sample_keys, DROPOUT, train=train)
        raw = self.model.apply({"params": params}, x_t, t, low, *told, **dropout)
        return diffusion_loss(
            self, raw.astype(jnp.float32), x_0, t, eps, batch["valid"], weight, train=train
        )

    def _timestep(self, level):
        """The timestep of a noise level, int32; both may be traced."""
        return jnp.int32(jnp.round(level * (len(self.schedule) - 1)))

    def _noised(self, low, level, sample_keys):
        """`low` [B, h, w, 3] with the noise of timestep `level`, int32 [B]; clean where it is 0."""
        eps = keys.normal(sample_keys, low.shape[1:], LOW_NOISE)
        noised = gaussian.q_sample(self.schedule, low, level, eps)
        return jnp.where(level[:, None, None, None] > 0, noised, low)

    def checked_draw(self, given, name=None):
        draw = super().checked_draw(given, name)
        level = draw["noise_level"]
        if not isinstance(level, int | float) or not 0 <= level <= self.noise_level:
            trained = f"levels 0 to {self.noise_level:g}" if self.noise_level else "no noise"
            raise errors.ConfigError(
                f"{name or self.stage}: noise_level {level!r}: its small pictures were trained "
                f"with {trained}"
            )
        return draw

    def shape(self, conditions):
        height, width = (side * self.factor for side in conditions["low"].shape[1:3])
        return (height, width, 3)

    def denoiser(self, params, frozen, conditions, sample_keys, draw):
        """See `base.Pictures`.

        Args:
          frozen: None, or {"last": parameters} of a second network of the same architecture, which
            makes the last step in place of the first (Karlo).
          conditions: {"low": float32 [B, h, w, 3] in [-1, 1]}; the pictures are [B, factor * h,
            factor * w, 3].
          sample_keys, draw: the small picture gets noise of level draw["noise_level"], from the
            picture's own key.
        """
        low, last_params = conditions["low"], (frozen or {}).get("last")
        respaced = self.schedule.respace(draw["steps"], draw["spacing"])
        told = ()
        if self.reads_level:
            level = jnp.full(low.shape[0], self._timestep(draw["noise_level"]))
            low = self._noised(low, level, keys.fold(sample_keys, LOW_NOISE))
            told = (level,)

        def model_fn(x, t):
            network = lambda chosen: self.model.apply({"params": chosen}, x, t, low, *told)
            if last_params is None:
                return network(params)
            first, last = (lambda: network(params)), (lambda: network(last_params))
            return jax.lax.cond(respaced.is_first(t[0]), last, first)

        denoise = gaussian.make_denoise(
            model_fn,
            respaced,
            parametrisation=self.parametrisation,
            variance=self.variance,
            clip=1.0,
        )
        return denoise, respaced

    def predict(self):
        """`sample`: the batch's low-resolution pictures, drawn large."""

        def sample(params, frozen, batch, key):
            del frozen
            sample_keys = keys.sample_keys(key, batch["sample"])
            drawn = self.sample(params, None, {"low": to_float(batch["low"])}, sample_keys)
            error = jnp.mean((drawn - to_float(batch["image"])) ** 2, axis=(1, 2, 3))
            return {"pictures": drawn, "mse": base.mean(error, batch["valid"])}

        return {"sample": sample}
