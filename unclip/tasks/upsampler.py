"""Training and drawing from the two diffusion upsamplers (section 2.1, appendix C of the paper).

Each sees the low-resolution picture and nothing else. Training degrades that picture (Gaussian
blur for the first, BSR for the second) and works on random crops; drawing runs at full size.
Karlo has two networks for one upsampler: the second, fine-tuned, makes the last step of a draw.
"""

import jax
import jax.numpy as jnp

from unclip import errors
from unclip.diffusion import gaussian, samplers, schedule
from unclip.models import upsampler as upsampler_model
from unclip.tasks import base, keys
from unclip.tasks.clip import to_float
from unclip.tasks.decoder import NOISE, T, diffusion_loss


class UpsamplerTask:
    """One upsampler.

    Args:
      arch: keyword arguments of `models.upsampler.Upsampler`.
      image_size: side of the full picture it draws, pixels.
      factor: how many times larger it makes a side.
      crop: side of the training crops, pixels.
      t_below: training draws timesteps below this one; 0 = all. 1 is for a network that makes the
        last step alone (Karlo's second).
      draw: defaults of `sample`: steps, sampler, eta.
      Other arguments as in `DecoderTask`.
    """

    stage = "upsampler"

    def __init__(
        self,
        arch: dict,
        *,
        image_size: int,
        factor: int = 4,
        crop: int | None = None,
        noise: str = "cosine",
        parametrisation: str = "eps",
        variance: str = "fixed_small",
        vlb_weight: float = 1.0,
        min_snr: float | None = None,
        t_below: int = 0,
        draw: dict | None = None,
    ):
        self.model = upsampler_model.Upsampler(**arch)
        self.image_size, self.factor, self.crop = image_size, factor, crop or image_size
        self.schedule = schedule.make(noise)
        self.parametrisation, self.variance = parametrisation, variance
        self.vlb_weight, self.min_snr = vlb_weight, min_snr
        if not 0 <= t_below <= len(self.schedule):
            raise errors.ConfigError(
                f"t_below is {t_below}: expected 0 (all timesteps) to {len(self.schedule)}"
            )
        self.t_below = t_below or len(self.schedule)
        self.draw = {"steps": 27, "sampler": "ddim", "eta": 0.0} | (draw or {})

    def batch_spec(self, batch_size: int):
        return base.spec(batch_size, image=self.crop, low=self.crop // self.factor)

    def init(self, key):
        x = jnp.zeros((1, self.crop, self.crop, 3))
        low = jnp.zeros((1, self.crop // self.factor, self.crop // self.factor, 3))
        return self.model.init(key, x, jnp.zeros((1,), jnp.int32), low)["params"]

    def frozen(self):
        return None

    def loss(self, params, frozen, batch, key, *, train):
        """L_simple (or the hybrid, when the variance is learned) on degraded crops."""
        del frozen
        sample_keys = keys.sample_keys(key, batch["sample"])
        x_0, low = to_float(batch["image"]), to_float(batch["low"])
        t = keys.integers(sample_keys, self.t_below, T)
        eps = keys.normal(sample_keys, x_0.shape[1:], NOISE)
        x_t = gaussian.q_sample(self.schedule, x_0, t, eps)
        rngs = {"dropout": keys.batch_key(key, batch["sample"])} if train else None
        raw = self.model.apply({"params": params}, x_t, t, low, train=train, rngs=rngs)
        return diffusion_loss(self, raw.astype(jnp.float32), x_0, t, eps, batch["valid"])

    def sample(self, params, low, sample_keys, *, last_params=None, x_T=None, noise=None, **draw):
        """Draws pictures float32 [B, factor * h, factor * w, 3] in [-1, 1].

        Args:
          low: float32 [B, h, w, 3] in [-1, 1]; sample_keys: typed keys [B], one a picture.
          last_params: parameters of a second network of the same architecture, which makes the
            last step in place of the first (Karlo); None = one network for all.
          x_T, noise: as in `DecoderTask.sample`.
          draw: steps, sampler (static); eta (may be traced).
        """
        draw = self.draw | draw
        height, width = (side * self.factor for side in low.shape[1:3])
        respaced = self.schedule.respace(draw["steps"])

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
            drawn = self.sample(
                params, to_float(batch["low"]), keys.sample_keys(key, batch["sample"])
            )
            error = jnp.mean((drawn - to_float(batch["image"])) ** 2, axis=(1, 2, 3))
            return {"pictures": drawn, "mse": base.mean(error, batch["valid"])}

        return {"sample": sample}
