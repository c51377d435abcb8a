"""The ADM U-Net that denoises pictures: the decoder and both upsamplers.

unCLIP's decoder is GLIDE's (2112.10741), whose U-Net is that of Dhariwal & Nichol (2105.05233):
residual blocks that read the timestep, resampling inside residual blocks, and
attention whose single softmax runs over the context (caption, image embedding) and the picture's
own positions together. The layout, and so every parameter count, equals the published one.

Parameters, level 0 being the finest:

    time/{fc_1, fc_2}  conv_in  norm_out  conv_out
    down_{i}/res_{j}/{norm_1, conv_1, time, norm_2, conv_2[, skip]}
    down_{i}/attn_{j}/{norm, q, k, v[, context_k, context_v], out}
    down_{i}/downsample/…      a residual block; the coarsest level has none
    mid/{res_0[, attn_0], res_1}
    up_{i}/res_{j}, up_{i}/attn_{j}, up_{i}/upsample   the finest level has no upsample

With `fold` the runs of equal blocks of a level become `fold_{first}_{last}/{res[, attn]}` with a
leading axis, so that compile time does not grow with depth; `fold_params` and `unfold_params`
translate whole parameter trees.
"""

import dataclasses
import re
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from unclip.errors import ConfigError, unknown
from unclip.models.transformer import (
    _platform,
    attention,
    gather_dtype,
    keep_rows,
    over_rows,
    recomputed,
    stack_blocks,
    timestep_embedding,
    unstack_blocks,
)

NORMS = ("group", "rms")


class Style(NamedTuple):
    """The fields of `UNet` that all of its blocks share."""

    head_dim: int
    scale_shift: bool
    norm: str
    groups: int
    norm_eps: float
    dropout: float
    dtype: Any
    remat: str | None
    fold: bool
    attention_impl: str


class Reads(NamedTuple):
    """What every block reads beside the picture; None where a net has no such thing.

    Attributes:
      emb: float32 [B, E], the time embedding after SiLU.
      context: [B, T, D]; mask: bool [B, T], False where a context token is to be ignored.
      dropout_keys: typed keys [B], one a sample; None switches dropout off.
    """

    emb: jax.Array
    context: jax.Array | None
    mask: jax.Array | None
    dropout_keys: jax.Array | None


class Dropout(nn.Module):
    """Dropout by sample: what a row loses depends on its own key and the layer, not on the batch.

    A gradient is then the same for any order, number of devices and accumulation.
    """

    rate: float

    @nn.compact
    def __call__(self, x, keys):
        """x [B, ...]; keys: typed [B], or None, which leaves x as it is."""
        if keys is None or not self.rate:
            return x
        layer = jax.random.bits(self.make_rng("dropout"))
        keep = lambda key: jax.random.bernoulli(
            jax.random.fold_in(key, layer), 1 - self.rate, x.shape[1:]
        )
        return jnp.where(jax.vmap(keep)(keys), x / (1 - self.rate), jnp.zeros_like(x))


class Norm(nn.Module):
    """Normalisation with float32 statistics and, optionally, the time embedding's scale and shift.

    kind "group": GroupNorm over (H, W, C / groups), as published. kind "rms": each pixel divided by
    the root mean square of its channels; this depends on the pixel alone, so a net trained on crops
    has the same statistics at full size, and spatially sharded pictures need no communication.

    Everything is combined into one multiplier and one offset per channel, so the picture itself is
    read only twice (statistics, then multiply-add), for any number of scales.
    """

    style: Style

    @nn.compact
    def __call__(self, x, film=None):
        """x [B, H, W, C]; film None or (scale, shift) each [B, C] -> [B, H, W, C] in `dtype`."""
        batch, channels, eps = x.shape[0], x.shape[-1], self.style.norm_eps
        scale = self.param("scale", nn.initializers.ones, (channels,))
        x = x.astype(jnp.float32)
        if self.style.norm == "rms":
            x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
            multiplier, offset = jnp.broadcast_to(scale, (batch, channels)), 0.0
        else:
            bias = self.param("bias", nn.initializers.zeros, (channels,))
            groups = self.style.groups
            if channels % groups:
                raise ConfigError(
                    f"groups={groups} does not divide a layer of {channels} channels: expected a "
                    "divisor of channels × every multiplier and of their concatenations"
                )
            # Per channel over the picture first: NHWC memory is then read in order, once.
            moments = jnp.stack([x.mean((1, 2)), (x * x).mean((1, 2))])
            mean, square = moments.reshape(2, batch, groups, -1).mean(-1)
            inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + eps)
            mean, inverse = (jnp.repeat(v, channels // groups, axis=1) for v in (mean, inverse))
            multiplier = inverse * scale[None]
            offset = bias[None] - mean * multiplier
        if film is not None:
            factor, shift = (v.astype(jnp.float32) for v in film)
            multiplier, offset = multiplier * (1 + factor), offset * (1 + factor) + shift
        y = x * multiplier[:, None, None]
        if isinstance(offset, jax.Array):
            y = y + offset[:, None, None]
        return y.astype(self.style.dtype)


def _conv(style, features, kernel, name, zero=False):
    init = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
    return nn.Conv(
        features,
        (kernel, kernel),
        kernel_init=init,
        dtype=style.dtype,
        promote_dtype=gather_dtype,
        name=name,
    )


def _dense(style, features, name, **options):
    options |= {"promote_dtype": gather_dtype, "dot_general": over_rows}
    return nn.Dense(features, dtype=style.dtype, name=name, **options)


def _sum_2x2(x):
    """The sum of 2×2 positions, [B, H, W, C] -> [B, H/2, W/2, C], for CPUs: four slices are added.

    XLA's reduction over two axes goes number by number there.
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    return x[:, :, 0, :, 0] + x[:, :, 0, :, 1] + x[:, :, 1, :, 0] + x[:, :, 1, :, 1]


def downsample(x):
    """Mean over 2×2: [B, H, W, C] -> [B, H/2, W/2, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample_nearest(x):
    """Each pixel four times: [B, H, W, C] -> [B, 2H, 2W, C]."""
    return (_repeat_on_cpu if _platform(x) == "cpu" else _repeat)(x)


def _repeat(x):
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


_repeat_on_cpu = jax.custom_vjp(_repeat)
_repeat_on_cpu.defvjp(lambda x: (_repeat(x), None), lambda _, dy: (_sum_2x2(dy),))


class ResBlock(nn.Module):
    """BigGAN residual block (2105.05233 section 3), resampling before its first convolution."""

    style: Style
    features: int
    resample: str | None = None

    @nn.compact
    def __call__(self, x, reads):
        """x [B, H, W, C] and `Reads` -> [B, H', W', features]."""
        style = self.style
        h = nn.silu(Norm(style, name="norm_1")(x))
        if self.resample is not None:
            resample = downsample if self.resample == "down" else upsample_nearest
            x, h = resample(x), resample(h)
        h = keep_rows(_conv(style, self.features, 3, "conv_1")(h))
        width = self.features * (2 if style.scale_shift else 1)
        time = _dense(style._replace(dtype=jnp.float32), width, "time")(reads.emb)
        if style.scale_shift:
            h = Norm(style, name="norm_2")(h, film=jnp.split(time, 2, axis=-1))
        else:
            h = Norm(style, name="norm_2")(h + time[:, None, None])
        h = Dropout(style.dropout, name="dropout")(nn.silu(h), reads.dropout_keys)
        h = _conv(style, self.features, 3, "conv_2", zero=True)(h)
        if x.shape[-1] != self.features:
            x = _conv(style, self.features, 1, "skip")(x)
        return keep_rows(x + h)


class AttentionBlock(nn.Module):
    """Attention of the picture's positions on [context, themselves], one softmax over both."""

    style: Style

    @nn.compact
    def __call__(self, x, reads):
        """x [B, H, W, C] and `Reads` -> [B, H, W, C]."""
        style, (batch, height, width, channels) = self.style, x.shape
        if channels % style.head_dim:
            raise ConfigError(
                f"head_dim={style.head_dim} does not divide an attention layer of {channels} "
                "channels"
            )
        positions = height * width

        def heads(y):
            return y.reshape(batch, y.shape[1], channels // style.head_dim, style.head_dim)

        dense = lambda name, tokens: _dense(style, channels, name)(tokens)
        tokens = Norm(style, name="norm")(x).reshape(batch, positions, channels)
        q, k, v = (dense(name, tokens) for name in ("q", "k", "v"))
        mask = None
        if reads.context is not None:  # before heads are told apart: less is moved on TPUs
            k = jnp.concatenate([dense("context_k", reads.context), k], axis=1)
            v = jnp.concatenate([dense("context_v", reads.context), v], axis=1)
            if reads.mask is not None:
                mask = jnp.pad(reads.mask, ((0, 0), (0, positions)), constant_values=True)
                mask = mask[:, None, None, :]
        y = attention(heads(q), heads(k), heads(v), mask, impl=style.attention_impl)
        y = y.reshape(x.shape)
        y = checkpoint_name(y, "attention")
        zeros = nn.initializers.zeros
        y = _dense(style, channels, "out", kernel_init=zeros)(y)
        return keep_rows(x + y)


def _blocks(style, scanned=False):
    """ResBlock and AttentionBlock, recomputed in the backward pass where `remat` says so."""
    # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward.
    wrap = partial(recomputed, remat=style.remat, prevent_cse=not scanned)
    return wrap(ResBlock, kind="residual"), wrap(AttentionBlock, kind="attention")


class _Step(nn.Module):
    """The body of a folded run: concatenate the skip if there is one, residual block, attention."""

    style: Style
    features: int
    attention: bool

    @nn.compact
    def __call__(self, x, skip, reads):
        res, attn = _blocks(self.style, scanned=True)
        down = skip is None
        x = x if down else jnp.concatenate([x, skip], axis=-1)
        x = res(self.style, self.features, name="res")(x, reads)
        if self.attention:
            x = attn(self.style, name="attn")(x, reads)
        return x, x if down else None


class Level(nn.Module):
    """All blocks of one resolution, going down (`skips` None) or up.

    Down returns (x, skips for the up path); up consumes the last `blocks` of `skips`.
    """

    style: Style
    features: int
    blocks: int
    attention: bool
    resample: str | None

    @nn.compact
    def __call__(self, x, skips, reads):
        res, attn = _blocks(self.style)
        inputs = [None] * self.blocks if skips is None else list(skips[::-1][: self.blocks])
        outputs, first = [], 0
        while first < self.blocks:
            last = self._run_end(x, inputs, first)
            if last > first:
                down = inputs[first] is None
                step = nn.scan(
                    _Step,
                    variable_axes={"params": 0},
                    split_rngs={"params": True, "dropout": True},
                    in_axes=(nn.broadcast if down else 0, nn.broadcast),
                    length=last - first + 1,
                )(self.style, self.features, self.attention, name=f"fold_{first}_{last}")
                stacked = None if down else jnp.stack(inputs[first : last + 1])
                x, ys = step(x, stacked, reads)
                outputs += list(ys) if down else []
            else:
                skip = inputs[first]
                x = x if skip is None else jnp.concatenate([x, skip], axis=-1)
                x = res(self.style, self.features, name=f"res_{first}")(x, reads)
                if self.attention:
                    x = attn(self.style, name=f"attn_{first}")(x, reads)
                outputs.append(x)
            first = last + 1
        if self.resample is not None:
            name = f"{self.resample}sample"
            x = res(self.style, self.features, self.resample, name=name)(x, reads)
            outputs.append(x)
        return x, outputs

    def _run_end(self, x, inputs, first):
        """Last block of the run of equal blocks that starts at `first`: `features` in and out."""
        if not self.style.fold or x.shape[-1] != self.features:
            return first
        last = first - 1
        for skip in inputs[first:]:
            if skip is not None and skip.shape[-1] != self.features:
                break
            last += 1
        return max(last, first)


class _Mid(nn.Module):
    """Two residual blocks at the coarsest resolution, attention between them if asked for."""

    style: Style
    features: int
    attention: bool

    @nn.compact
    def __call__(self, x, reads):
        res, attn = _blocks(self.style)
        x = res(self.style, self.features, name="res_0")(x, reads)
        if self.attention:
            x = attn(self.style, name="attn_0")(x, reads)
        return res(self.style, self.features, name="res_1")(x, reads)


class _Time(nn.Module):
    """Timestep -> embedding, float32 (bfloat16 has too few digits for t): sinusoid, two layers."""

    channels: int
    features: int

    @nn.compact
    def __call__(self, t):
        h = timestep_embedding(t, self.channels)
        h = nn.silu(nn.Dense(self.features, name="fc_1")(h))
        return nn.Dense(self.features, name="fc_2")(h)


def space_to_depth(x, patch):
    """[B, H, W, C] -> [B, H/patch, W/patch, patch·patch·C], each patch row by row."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x, patch):
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * patch, w * patch, c // patch**2)


class UNet(nn.Module):
    """ADM U-Net. A fresh one returns zeros: every output layer starts at zero.

    Fields:
      channels, multipliers: width of level i is channels × multipliers[i], a whole number though
        the multiplier may not be; each level halves H, W.
      blocks: residual blocks per level going down; one more going up.
      attention: one bool per level, finest first: attention after each of its residual blocks.
      mid_attention: attention between the two middle blocks.
      out_channels: 3, or 6 when the variance is learned (2102.09672): (eps ‖ v).
      head_dim: channels per head.
      time_dim: width of the time embedding; None is 4 × channels.
      scale_shift: the time embedding scales and shifts the second norm, rather than being added.
      norm, groups, norm_eps: "group" or "rms"; see `Norm`.
      dropout: rate before each second convolution, active where dropout_keys are given.
      patch: pictures enter and leave as patch×patch blocks folded into channels; published: 1.
      dtype: compute type; parameters, statistics, softmax, the time embedding with its scales and
        shifts, the last convolution and the result are float32.
      remat: what blocks recompute, as `transformer.remat_policy` reads it, or None.
      fold: scan over runs of equal blocks; see the module docstring. Not for CPUs, where XLA's
        convolutions are many times slower inside a loop.
      attention_impl: "xla", "fused" or "cudnn", see `transformer.attention`.
    """

    channels: int = 320
    multipliers: tuple[float, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[bool, ...] = (False, True, True, True)
    mid_attention: bool = True
    out_channels: int = 6
    head_dim: int = 64
    time_dim: int | None = None
    scale_shift: bool = True
    norm: str = "group"
    groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    patch: int = 1
    dtype: Any = jnp.float32
    remat: str | None = None
    fold: bool = False
    attention_impl: str = "xla"

    @nn.compact
    def __call__(self, x, t, emb=None, context=None, context_mask=None, *, dropout_keys=None):
        """Denoise.

        Args:
          x: float [B, H, W, C]; H and W multiples of patch × 2**(levels − 1).
          t: int32 [B], original timesteps 0..999.
          emb: None or float [B, time_dim], added to the time embedding.
          context: None or float [B, T, D], tokens every attention layer also sees.
          context_mask: None or bool [B, T], False where a context token is to be ignored.
          dropout_keys: typed keys [B], one a sample, that dropout's noise belongs to (with an rng
            "dropout", which tells the layers apart); None: no dropout.

        Returns:
          float32 [B, H, W, out_channels].

        Raises:
          ConfigError: fields that do not fit each other or the input.
        """
        self._check(x, emb)
        style = Style(
            *(self.head_dim, self.scale_shift, self.norm, self.groups, self.norm_eps),
            *(self.dropout, self.dtype, self.remat, self.fold, self.attention_impl),
        )
        time_dim = self.time_dim or 4 * self.channels
        time = _Time(self.channels, time_dim, name="time")(t)
        emb = nn.silu(time if emb is None else time + emb.astype(jnp.float32))
        if context is not None:
            context = context.astype(self.dtype)
        reads = Reads(emb, context, context_mask, dropout_keys)

        x = space_to_depth(x, self.patch) if self.patch > 1 else x
        widths = self.widths()
        x = _conv(style, widths[0], 3, "conv_in")(x.astype(self.dtype))
        skips, top = [x], len(self.multipliers) - 1
        for i, width in enumerate(widths):
            resample = "down" if i < top else None
            level = Level(style, width, self.blocks, self.attention[i], resample, name=f"down_{i}")
            x, outputs = level(x, None, reads)
            skips += outputs
        x = _Mid(style, widths[-1], self.mid_attention, name="mid")(x, reads)
        for i, width in reversed(list(enumerate(widths))):
            blocks, resample = self.blocks + 1, "up" if i > 0 else None
            level = Level(style, width, blocks, self.attention[i], resample, name=f"up_{i}")
            x, _ = level(x, skips, reads)
            skips = skips[:-blocks]
        full = style._replace(dtype=jnp.float32)
        x = nn.silu(Norm(full, name="norm_out")(x))
        x = _conv(full, self.out_channels * self.patch**2, 3, "conv_out", zero=True)(x)
        x = depth_to_space(x, self.patch) if self.patch > 1 else x
        return x

    def widths(self) -> list[int]:
        """The width of every level, finest first."""
        return [round(self.channels * m) for m in self.multipliers]

    def _check(self, x, emb):
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        if len(self.attention) != len(self.multipliers):
            raise ConfigError(
                f"attention={self.attention} names {len(self.attention)} levels, multipliers="
                f"{self.multipliers} has {len(self.multipliers)}: give one bool per level"
            )
        unit = self.patch * 2 ** (len(self.multipliers) - 1)
        if x.ndim != 4 or x.shape[1] % unit or x.shape[2] % unit:
            raise ConfigError(
                f"picture of shape {tuple(x.shape)}: expected [B, H, W, C] with H and W "
                f"multiples of {unit} (patch × 2^(levels − 1))"
            )
        time_dim = self.time_dim or 4 * self.channels
        if emb is not None and emb.shape[-1] != time_dim:
            raise ConfigError(f"emb of width {emb.shape[-1]}: the time embedding has {time_dim}")


def unet_fields(module):
    """The values of `UNet`'s own fields on a module that extends it, as its keyword arguments."""
    fields = (f.name for f in dataclasses.fields(UNet) if f.name not in ("parent", "name"))
    return {name: getattr(module, name) for name in fields}


def fold_params(params):
    """The parameters of a `fold=False` tree in the form of a `fold=True` model.

    Works on the U-Net's own tree or any tree that holds one (a Decoder's with its text transformer,
    an EMA's) and gives back a new nested dict; numpy arrays stay numpy. `unfold_params` inverts it.
    """
    return stack_blocks(_rewrite(params, _fold_level))


def unfold_params(params):
    """The parameters of a `fold=True` tree in the form of a `fold=False` model."""
    return unstack_blocks(_rewrite(params, _unfold_level))


def _rewrite(tree, level):
    if not isinstance(tree, dict):
        return tree
    return {
        k: level(v, up=k.startswith("up_")) if re.fullmatch(r"(down|up)_\d+", k)
        else _rewrite(v, level)
        for k, v in tree.items()
    }  # fmt: skip


def _fold_level(level, *, up):
    blocks = sum(k.startswith("res_") for k in level)
    kinds = ("res", "attn") if "attn_0" in level else ("res",)

    def equal(j):  # the block's input, and its skip going up, are as wide as its output
        given, features = level[f"res_{j}"]["conv_1"]["kernel"].shape[-2:]
        return given == features * (2 if up else 1)

    out = {k: v for k, v in level.items() if not re.fullmatch(r"(res|attn)_\d+", k)}
    first = 0
    while first < blocks:
        last = first
        while equal(first) and last + 1 < blocks and equal(last + 1):
            last += 1
        members = {kind: [level[f"{kind}_{j}"] for j in range(first, last + 1)] for kind in kinds}
        if last > first:
            stacks = {kind: jax.tree.map(_stack, *trees) for kind, trees in members.items()}
            out[f"fold_{first}_{last}"] = stacks
        else:
            out |= {f"{kind}_{first}": trees[0] for kind, trees in members.items()}
        first = last + 1
    return out


def _stack(*leaves):
    return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)


def _unfold_level(level, *, up):
    out = {}
    for key, value in level.items():
        run = re.fullmatch(r"fold_(\d+)_(\d+)", key)
        if run is None:
            out[key] = value
            continue
        first, last = map(int, run.groups())
        for kind, stacked in value.items():
            for n, j in enumerate(range(first, last + 1)):
                out[f"{kind}_{j}"] = jax.tree.map(lambda leaf, n=n: leaf[n], stacked)
    return out
