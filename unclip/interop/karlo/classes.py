"""The classes of diffusers that Karlo's folder names, each with all its options.

Options that our networks have too may have any value; every other one must have the value it has in
Karlo. `karlo.config` translates options into ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from unclip import errors
from unclip.models.decoder import IMAGE_TOKENS
from unclip.models.prior import EXTRA_TOKENS

VERSION = "0.37.1"  # the newest diffusers that opens Karlo's folder as a whole
_SAME = {"swish": "silu"}


@dataclasses.dataclass(frozen=True)
class Format:
    """One class of diffusers.

    Attributes:
      name: of the class.
      defaults: every option, with the value it has where a file does not give it.
      required: options that have no counterpart of ours, with the only value that is read.
    """

    name: str
    defaults: dict[str, Any]
    required: dict[str, Any]

    def options(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A config file's options, those it leaves out included.

        Raises:
          ConfigError: of another class, or an option that our networks do not have.
        """
        name = config.get("_class_name", self.name)
        if name != self.name:
            raise errors.ConfigError(f"{where} is a {name}; expected {self.name}")
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        options = self.defaults | given
        for key, value in options.items():
            if key in self.defaults and key not in self.required:
                continue
            wanted = self.required.get(key)
            value = _SAME.get(value, value) if isinstance(value, str) else value
            # None, False and 0 all mean that an option is off, also one that is unknown here.
            if (value or None) != (wanted or None):
                raise errors.ConfigError(
                    f"{where}: {key}={value!r} is not supported; expected {wanted!r}"
                )
        return options

    def config(self, **options: Any) -> dict[str, Any]:
        """A whole config file with the options given."""
        header = {"_class_name": self.name, "_diffusers_version": VERSION}
        return header | self.defaults | self.required | options


PRIOR = Format(
    "PriorTransformer",
    dict(
        num_attention_heads=32, attention_head_dim=64, num_layers=20, embedding_dim=768,
        num_embeddings=77, additional_embeddings=4, dropout=0.0, time_embed_act_fn="silu",
        norm_in_type=None, embedding_proj_norm_type=None, encoder_hid_proj_type="linear",
        added_emb_type="prd", time_embed_dim=None, embedding_proj_dim=None, clip_embed_dim=None,
    ),
    dict(
        additional_embeddings=EXTRA_TOKENS, dropout=0.0, time_embed_act_fn="silu",
        embedding_proj_norm_type=None, encoder_hid_proj_type="linear", added_emb_type="prd",
    ),
)  # fmt: skip

TEXT_PROJ = Format(
    "UnCLIPTextProjModel",
    dict(
        clip_extra_context_tokens=4, clip_embeddings_dim=768, time_embed_dim=None,
        cross_attention_dim=None,
    ),
    dict(clip_extra_context_tokens=IMAGE_TOKENS),
)  # fmt: skip

_UNET = dict(
    sample_size=None, center_input_sample=False, flip_sin_to_cos=True, freq_shift=0,
    layers_per_block=2, downsample_padding=1, mid_block_scale_factor=1, dropout=0.0, act_fn="silu",
    norm_num_groups=32, norm_eps=1e-5, attention_head_dim=8, resnet_time_scale_shift="default",
    time_embedding_type="positional", time_embedding_dim=None, class_embed_type=None,
    num_class_embeds=None,
)  # fmt: skip
_UNET_REQUIRED = dict(
    center_input_sample=False, flip_sin_to_cos=True, freq_shift=0, mid_block_scale_factor=1,
    act_fn="silu", time_embedding_type="positional", num_class_embeds=None,
)  # fmt: skip

DECODER = Format(
    "UNet2DConditionModel",
    _UNET
    | dict(
        in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3), only_cross_attention=False,
        cross_attention_dim=1280, transformer_layers_per_block=1,
        reverse_transformer_layers_per_block=None, encoder_hid_dim=None, encoder_hid_dim_type=None,
        num_attention_heads=None, dual_cross_attention=False, use_linear_projection=False,
        addition_embed_type=None, addition_time_embed_dim=None, upcast_attention=False,
        resnet_skip_time_act=False, resnet_out_scale_factor=1.0, time_embedding_act_fn=None,
        timestep_post_act=None, time_cond_proj_dim=None, conv_in_kernel=3, conv_out_kernel=3,
        projection_class_embeddings_input_dim=None, attention_type="default",
        class_embeddings_concat=False, mid_block_only_cross_attention=None,
        cross_attention_norm=None, addition_embed_type_num_heads=64,
    ),
    # The epsilon of attention's norms is not an option of these blocks: it is always 1e-5.
    _UNET_REQUIRED
    | dict(
        in_channels=3, mid_block_type="UNetMidBlock2DSimpleCrossAttn", norm_eps=1e-5,
        only_cross_attention=False, encoder_hid_dim=None, encoder_hid_dim_type=None,
        num_attention_heads=None, class_embed_type="identity", addition_embed_type=None,
        addition_time_embed_dim=None, resnet_skip_time_act=False, resnet_out_scale_factor=1.0,
        time_embedding_act_fn=None, timestep_post_act=None, time_cond_proj_dim=None,
        conv_in_kernel=3, conv_out_kernel=3, projection_class_embeddings_input_dim=None,
        class_embeddings_concat=False, mid_block_only_cross_attention=None,
        cross_attention_norm=None,
    ),
)  # fmt: skip

UPSAMPLER = Format(
    "UNet2DModel",
    _UNET
    | dict(
        in_channels=3, out_channels=3, block_out_channels=(224, 448, 672, 896),
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2D", up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
        downsample_type="conv", upsample_type="conv", attn_norm_num_groups=None, add_attention=True,
        num_train_timesteps=None,
    ),
    _UNET_REQUIRED
    | dict(
        in_channels=6, mid_block_type="UNetMidBlock2D", add_attention=False, class_embed_type=None,
    ),
)  # fmt: skip

SCHEDULER = Format(
    "UnCLIPScheduler",
    dict(
        num_train_timesteps=1000, variance_type="fixed_small_log", clip_sample=True,
        clip_sample_range=1.0, prediction_type="epsilon", beta_schedule="squaredcos_cap_v2",
    ),
    dict(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2"),
)  # fmt: skip
