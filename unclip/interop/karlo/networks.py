"""The networks of Karlo: their trees of shapes, and the names that diffusers gives to each leaf.

The prior is a `PriorTransformer`, the decoder a `UNet2DConditionModel` with an
`UnCLIPTextProjModel`, each upsampler a `UNet2DModel`. Rules are for `layout`; a rule whose leaf an
architecture does not have is not used.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unclip import errors, tasks
from unclip.cascade import bundle
from unclip.interop.layout import COPY, Rule, conv, dense, leading, norm
from unclip.models import decoder as decoder_model
from unclip.models import prior as prior_model
from unclip.models import upsampler as upsampler_model
from unclip.models.clip import CLIP

# A tensor that only the network itself has, by the name of its folder.
MARKS = {
    "prior": "proj_in.weight",
    "decoder": "conv_in.weight",
    "text_proj": "clip_image_embeddings_project_to_time_embeddings.weight",
    "super_res_first": "conv_in.weight",
    "super_res_last": "conv_in.weight",
}


def _shapes(module, *args, **kwargs) -> dict[str, Any]:
    """The shapes of a module's parameters, nothing allocated."""
    init = functools.partial(module.init, **kwargs)
    return jax.eval_shape(init, jax.random.key(0), *args)["params"]


def prior_shapes(arch: Mapping[str, Any]) -> dict[str, Any]:
    """Our prior's tree of shapes, and "statistics": {"mean", "std"} of z_i, [D] each."""
    module = prior_model.DiffusionPrior(**tasks.arguments(arch))
    z, t = jnp.zeros((1, module.embed_dim)), jnp.zeros((1,), jnp.int32)
    hidden = jnp.zeros((1, module.context, module.text_width))
    statistic = jax.ShapeDtypeStruct((module.embed_dim,), jnp.float32)
    statistics = {"mean": statistic, "std": statistic}
    return _shapes(module, z, t, z, hidden, None) | {"statistics": statistics}


def decoder_shapes(arch: Mapping[str, Any], embed_dim: int, text_width: int) -> dict[str, Any]:
    """Our decoder's tree of shapes."""
    module = decoder_model.Decoder(**tasks.arguments(arch))
    side = 2 ** (len(module.multipliers) - 1)
    z, t = jnp.zeros((1, embed_dim)), jnp.zeros((1,), jnp.int32)
    hidden, mask = jnp.zeros((1, 1, text_width)), jnp.ones((1, 1), bool)
    conditions = dict(z_i=z, z_t=z, text_hidden=hidden, tokens=None, text_mask=mask)
    return _shapes(module, jnp.zeros((1, side, side, 3)), t, **conditions)


def upsampler_shapes(arch: Mapping[str, Any]) -> dict[str, Any]:
    """Our upsampler's tree of shapes."""
    module = upsampler_model.Upsampler(**tasks.arguments(arch))
    side = 2 ** (len(module.multipliers) - 1)
    x, low = jnp.zeros((1, side, side, 3)), jnp.zeros((1, 1, 1, 3))
    return _shapes(module, x, jnp.zeros((1,), jnp.int32), low)


def check_widths(parts: Mapping[str, bundle.Part]) -> None:
    """Refuses (ConfigError) a prior or decoder whose inputs have other widths than CLIP's
    outputs."""
    if "clip" not in parts:
        return
    clip = CLIP(**tasks.arguments(parts["clip"].arch))
    reads = {}
    if "prior" in parts:
        prior = prior_model.DiffusionPrior(**tasks.arguments(parts["prior"].arch))
        reads["prior"] = (prior.embed_dim, prior.text_width, prior.context)
    if "decoder" in parts:
        params = parts["decoder"].params["text_proj"]
        widths = (params[name]["kernel"].shape[0] for name in ("image_time", "text_tokens"))
        reads["decoder"] = (*widths, clip.context)
    for name, (embed_dim, text_width, context) in reads.items():
        text = (clip.text_width, clip.context) if clip.text_layers else (text_width, context)
        if (embed_dim, text_width, context) != (clip.embed_dim, *text):
            raise errors.ConfigError(
                f"the {name} reads embeddings of {embed_dim}, hidden states of {text_width} and "
                f"{context} tokens; CLIP gives {clip.embed_dim}, {text[0]} and {text[1]}"
            )


def prior_rules(layers: int) -> list[Rule]:
    """The rules of a PriorTransformer of `layers` blocks."""
    rules = [
        *dense("text/proj", "encoder_hidden_states_proj"),
        *dense("z_t/proj", "embedding_proj"),
        *dense("z_i/proj", "proj_in"),
        *dense("time_in", "time_embedding.linear_1"),
        *dense("time_out", "time_embedding.linear_2"),
        Rule("query", "prd_embedding", leading(2)),
        Rule("position", "positional_embedding", leading(1)),
        *norm("norm_in", "norm_in"),
        *norm("norm_out", "norm_out"),
        *dense("out", "proj_to_clip_embeddings"),
        Rule("statistics/mean", "clip_mean", leading(1)),
        Rule("statistics/std", "clip_std", leading(1)),
    ]
    for i in range(layers):
        ours, theirs = f"transformer/block_{i}", f"transformer_blocks.{i}"
        rules += norm(f"{ours}/ln_1", f"{theirs}.norm1")
        for name, their_name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
            rules += dense(f"{ours}/attn/{name}", f"{theirs}.attn1.{their_name}")
        rules += norm(f"{ours}/ln_2", f"{theirs}.norm3")
        rules += dense(f"{ours}/mlp/fc", f"{theirs}.ff.net.0.proj")
        rules += dense(f"{ours}/mlp/proj", f"{theirs}.ff.net.2")
    return rules


def decoder_rules(levels: int, blocks: int) -> list[Rule]:
    """The rules of a decoder; their names begin with "decoder." and "text_proj."."""
    null = "learned_classifier_free_guidance_embeddings"
    rules = [
        Rule("text_proj/null_image", null, COPY),
        *dense("text_proj/image_time", "clip_image_embeddings_project_to_time_embeddings"),
        *dense("text_proj/image_tokens", "clip_extra_context_tokens_proj"),
        *dense("text_proj/text_time", "embedding_proj"),
        *dense("text_proj/text_tokens", "encoder_hidden_states_proj"),
        *norm("text_proj/text_norm", "text_encoder_hidden_states_norm"),
    ]
    rules = [Rule(r.ours, f"text_proj.{r.theirs}", r.transform) for r in rules]
    unet = unet_rules(levels, blocks)
    return rules + [Rule(r.ours, f"decoder.{r.theirs}", r.transform) for r in unet]


def unet_rules(levels: int, blocks: int) -> list[Rule]:
    """The rules of both U-Nets: attention and shortcuts wherever a level may have them."""
    rules = [
        *dense("unet/time/fc_1", "time_embedding.linear_1"),
        *dense("unet/time/fc_2", "time_embedding.linear_2"),
        *conv("unet/conv_in", "conv_in"),
        *norm("unet/norm_out", "conv_norm_out"),
        *conv("unet/conv_out", "conv_out"),
        *_res("unet/mid/res_0", "mid_block.resnets.0"),
        *_attention("unet/mid/attn_0", "mid_block.attentions.0"),
        *_res("unet/mid/res_1", "mid_block.resnets.1"),
    ]
    for i in range(levels):
        # diffusers numbers the upward levels from the coarsest, we from the finest.
        for ours, theirs, count, resample in (
            (f"unet/down_{i}", f"down_blocks.{i}", blocks, "downsample"),
            (f"unet/up_{i}", f"up_blocks.{levels - 1 - i}", blocks + 1, "upsample"),
        ):
            for j in range(count):
                rules += _res(f"{ours}/res_{j}", f"{theirs}.resnets.{j}")
                rules += _attention(f"{ours}/attn_{j}", f"{theirs}.attentions.{j}")
            rules += _res(f"{ours}/{resample}", f"{theirs}.{resample}rs.0")
    return rules


def _res(ours: str, theirs: str) -> list[Rule]:
    return [
        *norm(f"{ours}/norm_1", f"{theirs}.norm1"),
        *conv(f"{ours}/conv_1", f"{theirs}.conv1"),
        *dense(f"{ours}/time", f"{theirs}.time_emb_proj"),
        *norm(f"{ours}/norm_2", f"{theirs}.norm2"),
        *conv(f"{ours}/conv_2", f"{theirs}.conv2"),
        *conv(f"{ours}/skip", f"{theirs}.conv_shortcut"),
    ]


def _attention(ours: str, theirs: str) -> list[Rule]:
    rules = norm(f"{ours}/norm", f"{theirs}.group_norm")
    for name, their_name in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("context_k", "add_k_proj"),
        ("context_v", "add_v_proj"),
        ("out", "to_out.0"),
    ):
        rules += dense(f"{ours}/{name}", f"{theirs}.{their_name}")
    return rules
