"""The upsamplers p(x | x_low), 64 -> 256 -> 1024 (Table 3 of arXiv 2204.06125; SR3, 2104.07636).

An ADM U-Net without attention whose input channels are the noised picture and the low-resolution
one resampled to the same size. It has no caption and no guidance. Without attention it is fully
convolutional, so it can be trained on crops and run at the full size.

Parameters: `unet/…`, as `unet.UNet` names them; Karlo's have 691,579,523 per net.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip.errors import ConfigError
from unclip.models.transformer import timestep_embedding
from unclip.models.unet import UNet, unet_fields


def upsample(low, size):
    """Bicubic resampling, antialiased when it shrinks: what Karlo feeds its upsampler.

    Keys' kernel with a = -0.5, weights renormalised at the border, half-pixel centres: the same as
    Pillow's BICUBIC and torch's `interpolate(mode="bicubic", antialias=True)`. (torch without
    antialias uses a = -0.75, which gives another picture.)

    Args:
      low: float [B, h, w, C].
      size: (H, W), or one int for both.

    Returns:
      [B, H, W, C] in low's dtype. Bicubic overshoots: values may leave low's range slightly.
    """
    height, width = (size, size) if isinstance(size, int) else size
    shape = (low.shape[0], height, width, low.shape[-1])
    return jax.image.resize(low, shape, method="cubic", antialias=True)


class _Level(nn.Module):
    """Noise level -> what is added to the time embedding; zeros in a fresh network."""

    channels: int
    features: int

    @nn.compact
    def __call__(self, level):
        """int32 [B] -> float32 [B, features]."""
        h = nn.silu(nn.Dense(self.features, name="fc_1")(timestep_embedding(level, self.channels)))
        return nn.Dense(self.features, kernel_init=nn.initializers.zeros, name="fc_2")(h)


class Upsampler(UNet):
    """The fields of `UNet`, with attention off and the time embedding added (Karlo's "default").

    add_low: the upsampled low-resolution picture is added to the first three output channels, so
      that a network that predicts x_0 learns only what bicubic upsampling lacks. Off in the
      published models, which predict the noise.
    noise_level: the network is told how much noise the small picture bears, by an embedding added
      to the timestep's (Cascaded Diffusion, arXiv 2106.15282, section 4.2; Imagen, arXiv
      2205.11487, section 2.3). Off in the published models. Its parameters: `level/{fc_1, fc_2}`.
    """

    attention: tuple[bool, ...] = (False, False, False, False)
    mid_attention: bool = False
    out_channels: int = 3
    scale_shift: bool = False
    add_low: bool = False
    noise_level: bool = False

    @nn.compact
    def __call__(self, x_t, t, low, level=None, *, dropout_keys=None):
        """Predict the noise of x_t, given the small picture.

        Args:
          x_t: float [B, H, W, 3].
          t: int32 [B], original timesteps 0..999.
          low: float [B, h, w, 3] in [-1, 1]; h × w may be anything up to H × W.
          level: with `noise_level`, int32 [B], the timestep 0..999 whose noise `low` bears; None
            is 0, a clean picture.
          dropout_keys: None or typed keys [B], one a sample: dropout on, see `UNet`.

        Returns:
          float32 [B, H, W, out_channels].

        Raises:
          ConfigError: low is larger than x_t, shapes do not fit the fields, or a level for a
            network without.
        """
        if low.shape[0] != x_t.shape[0] or any(a > b for a, b in zip(low.shape, x_t.shape)):
            raise ConfigError(
                f"low of shape {tuple(low.shape)} for x_t of shape {tuple(x_t.shape)}: expected "
                "the same batch and at most its height and width"
            )
        if level is not None and not self.noise_level:
            raise ConfigError("a noise level for an upsampler without arch.noise_level")
        low = upsample(low.astype(jnp.float32), x_t.shape[1:3])
        x = jnp.concatenate([x_t, low], axis=-1)
        emb = None
        if self.noise_level:
            level = jnp.zeros_like(t) if level is None else level
            emb = _Level(self.channels, self.time_dim or 4 * self.channels, name="level")(level)
        out = UNet(**unet_fields(self), name="unet")(x, t, emb, dropout_keys=dropout_keys)
        return out.at[..., : low.shape[-1]].add(low) if self.add_low else out


_KARLO = dict(
    channels=320,
    multipliers=(1, 2, 3, 4),
    blocks=3,
    attention=(False, False, False, False),
    mid_attention=False,
    out_channels=3,
    scale_shift=False,
)

PRESETS = {
    "karlo": _KARLO,  # 64 -> 256, both of its nets
    "paper-256": _KARLO | dict(dropout=0.1),
    "paper-1024": _KARLO
    | dict(channels=192, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(False,) * 6)
    | dict(scale_shift=True),
    # 16 -> 64 and 64 -> 256 on a CPU: the picture enters as 2 × 2 and 4 × 4 patches.
    "emoji-64": dict(
        channels=32,
        multipliers=(1, 2),
        blocks=1,
        attention=(False, False),
        groups=8,
        time_dim=128,
        scale_shift=True,
        norm="rms",
        patch=2,
        add_low=True,
    ),
    "emoji-256": dict(
        channels=24,
        multipliers=(1, 2, 3),
        blocks=1,
        attention=(False, False, False),
        groups=8,
        time_dim=96,
        scale_shift=True,
        norm="rms",
        patch=4,
        add_low=True,
    ),
}
