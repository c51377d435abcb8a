"""Training and drawing from the two diffusion upsamplers (section 2.1, appendix C of the paper).

Each sees the low-resolution picture and nothing else. Training degrades that picture (Gaussian
blur for the first, BSR for the second) and works on random crops; drawing runs at full size.
Karlo has two networks for one upsampler: the second, fine-tuned, makes the last step of a draw.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from unclip import errors
from unclip.diffusion import gaussian, samplers, schedule
from unclip.input.decode import transforms
from unclip.models import upsampler as upsampler_model
from unclip.tasks import base, keys
from unclip.tasks.arrays import to_float
from unclip.tasks.decoder import DROPOUT, NOISE, T, diffusion_loss


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class UpsamplerTask(base.Diffusion):
    """One upsampler.

    Args:
      arch: keyword arguments of `models.upsampler.Upsampler`.
      image_size: side of the full picture it draws, pixels.
      factor: how many times larger it makes a side.
      crop: side of the training crops, pixels; 0 = whole pictures.
      t_below: training draws timesteps below this one; 0 = all. 1 is for a network that makes the
        last step alone (Karlo's second).
      draw: settings of `sample`: steps, spacing, sampler, eta.
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
    draw: Mapping[str, Any] | None = None

    stage = "upsampler"
    network, presets = upsampler_model.Upsampler, upsampler_model.PRESETS
    measures = ("drawn",)
    draw_defaults = MappingProxyType(
        {"steps": 27, "spacing": "even", "sampler": "ddim", "eta": 0.0}
    )

    def __post_init__(self):
        diffusion = schedule.make(self.noise_schedule)
        if not 0 <= self.t_below <= len(diffusion):
            raise errors.ConfigError(
                f"t_below is {self.t_below}: expected 0 (all timesteps) to {len(diffusion)}"
            )
        self._set(
            model=self.network(**self.arch),
            schedule=diffusion,
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
        dropout = keys.dropout(key, sample_keys, DROPOUT, train=train)
        raw = self.model.apply({"params": params}, x_t, t, low, **dropout)
        return diffusion_loss(
            self, raw.astype(jnp.float32), x_0, t, eps, batch["valid"], weight, train=train
        )

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
    ):
        """Draws pictures float32 [B, factor * h, factor * w, 3] in [-1, 1].

        Args:
          frozen: None, or {"last": parameters} of a second network of the same architecture, which
            makes the last step in place of the first (Karlo).
          conditions: {"low": float32 [B, h, w, 3] in [-1, 1]}.
          sample_keys: typed keys [B], one a picture; x_T, noise: as in `DecoderTask.sample`.
          draw: steps, spacing, sampler (static); eta (may be traced).
        """
        draw, low = {**self.draw, **(draw or {})}, conditions["low"]
        last_params = (frozen or {}).get("last")
        height, width = (side * self.factor for side in low.shape[1:3])
        respaced = self.schedule.respace(draw["steps"], draw["spacing"])

        def model_fn(x, t):
            network = lambda chosen: self.model.apply({"params": chosen}, x, t, low)
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
        if x_T is None:
            x_T = samplers.draw_noise(sample_keys, (height, width, 3))
        pictures = samplers.sample(
            denoise,
            respaced,
            x_T,
            sample_keys,
            sampler=draw["sampler"],
            eta=draw["eta"],
            noise=noise,
        )
        return jnp.clip(pictures, -1.0, 1.0)

    def predict(self):
        """`sample`: the batch's low-resolution pictures, drawn large."""

        def sample(params, frozen, batch, key):
            del frozen
            sample_keys = keys.sample_keys(key, batch["sample"])
            drawn = self.sample(params, None, {"low": to_float(batch["low"])}, sample_keys)
            error = jnp.mean((drawn - to_float(batch["image"])) ** 2, axis=(1, 2, 3))
            return {"pictures": drawn, "mse": base.mean(error, batch["valid"])}

        return {"sample": sample}
