"""Karlo's own checkpoint files, as Kakao Brain published them; read for `karlo`.

The networks are those of the diffusers folder, but the files hold only tensors: the architecture
follows from their shapes, except heads of 64 channels and norms of 32 groups, which are always
Karlo's. Queries, keys and values are stored as one
tensor, head after head: the 64 rows of a head's q, its k, its v, then the next head's.

    prior-ckpt-step=01000000-of-01000000.ckpt      prior, below "model."
    decoder-ckpt-step=01000000-of-01000000.ckpt    decoder and its conditions, below "model."
    improved-sr-ckpt-step=1.2M.ckpt                "model_first_steps." and "model_last_step."
    ViT-L-14.pt, ViT-L-14_stats.th                 OpenAI's CLIP; mean and deviation of its z_i
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from unclip import errors
from unclip.cascade import bundle
from unclip.files.tensors import Lazy
from unclip.interop import layout, openai_clip, weights
from unclip.interop.karlo.config import (
    KARLO_CLAMP,
    decoder_settings,
    multipliers,
    prior_settings,
    upsampler_settings,
)
from unclip.interop.karlo.networks import (
    check_widths,
    decoder_shapes,
    prior_shapes,
    upsampler_shapes,
)
from unclip.interop.layout import COPY, Rule, conv, conv1x1, dense, fused_dense, leading, norm
from unclip.models.prior import EXTRA_TOKENS

FILES = {
    "prior": "prior*.ckpt",
    "decoder": "decoder*.ckpt",
    "upsampler": "improved-sr*.ckpt",
    "statistics": "*_stats.th",
    "clip": "ViT-*.pt",
}
# Buffers that Karlo's modules compute when they are made (the causal mask, the empty caption's
# tokens and mask), and the statistics, which are read from their own file.
BUFFERS = ("causal_mask", "cf_token", "cf_mask", "clip_mean", "clip_std")
SR_MARK = "model_first_steps.time_embed.0.weight"
HEAD = 64
GROUPS = 32
DECODER_SIZE, UPSAMPLER_SIZE = 64, 256


def is_original(paths: list[pathlib.Path]) -> bool:
    """Whether paths are Karlo's own files, or folders that hold some, rather than diffusers'."""
    return any(_files(path) if path.is_dir() else path.is_file() for path in paths)


def read(paths: list[pathlib.Path]) -> dict[str, bundle.Part]:
    """The parts of Karlo, tensors unread; see `karlo.read`.

    Args:
      paths: folders that hold `FILES`, or such files.

    Raises:
      ConfigError: two files of one kind, the prior without its statistics, tensors not Karlo's.
      DataError: files that cannot be read.
    """
    found, parts = _find(paths), {}
    if "clip" in found:
        parts |= openai_clip.read_openai([found["clip"]], {})
    if "prior" in found:
        if "statistics" not in found:
            raise errors.ConfigError(
                f"{found['prior']}: expected ViT-L-14_stats.th with it, the mean and deviation of "
                "z_i that Karlo keeps in a file of their own"
            )
        parts["prior"] = _prior(found["prior"], found["statistics"])
    if "decoder" in found:
        parts["decoder"] = _decoder(found["decoder"])
    if "upsampler" in found:
        parts |= _upsamplers(found["upsampler"])
    check_widths(parts)
    return parts


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that are named as Karlo's."""
    named = {file for pattern in FILES.values() for file in folder.glob(pattern)}
    return sorted(file for file in named if file.is_file())


def _find(paths: list[pathlib.Path]) -> dict[str, pathlib.Path]:
    """The file of each kind."""
    found: dict[str, pathlib.Path] = {}
    for file in (f for path in paths for f in (_files(path) if path.is_dir() else [path])):
        kind = next((k for k, pattern in FILES.items() if file.match(pattern)), None)
        if kind is None:
            expected = ", ".join(FILES.values())
            raise errors.ConfigError(f"{file} is not named as Karlo's files are: {expected}")
        if kind in found:
            raise errors.ConfigError(f"{found[kind]} and {file}: expected one {FILES[kind]}")
        found[kind] = file
    return found


def _tensors(path: pathlib.Path, mark: str) -> dict[str, Lazy]:
    """The tensors of the prior's or decoder's file below "model.", also of one saved without it."""
    source = layout.unwrapped(weights.open_weights(path), (f"model.{mark}", mark), str(path))
    if mark not in source:
        return source
    return {n if n in BUFFERS else f"model.{n}": tensor for n, tensor in source.items()}


def _prior(path: pathlib.Path, statistics: pathlib.Path) -> bundle.Part:
    source = _tensors(path, "clip_img_proj.weight")
    get = lambda name, ndim: _shape(source, f"model.{name}", ndim, path)
    width, embed_dim = get("clip_img_proj.weight", 2)
    arch = dict(
        embed_dim=embed_dim,
        context=get("positional_embedding", 3)[1] - EXTRA_TOKENS,
        text_width=get("text_enc_proj.weight", 2)[1],
        width=width,
        layers=_count(source, "model.transformer.resblocks.{}.ln_1.weight"),
        heads=width // HEAD,
        head_dim=HEAD,
        norm_out="model.final_ln.weight" in source,
        dtype="float32",
    )
    found = {"parametrisation": "x0", "variance": "fixed_small", "clamp": KARLO_CLAMP}
    params = layout.take(
        prior_rules(arch["layers"]),
        {**source, **_statistics(statistics)},
        prior_shapes(arch),
        what=str(path),
        ignore=BUFFERS,
    )
    settings = prior_settings(found, str(path))
    return bundle.Part("prior", arch, params, params.pop("statistics"), settings)


def _statistics(path: pathlib.Path) -> dict[str, Lazy]:
    """{"statistics.mean", "statistics.std"} of a file with the pair, or both in one tensor."""
    held = list(weights.open_weights(path).values())
    if [len(t.shape) for t in held] == [1, 1]:
        pair = held
    elif [t.shape[:1] for t in held] == [(2,)] and len(held[0].shape) == 2:
        row = lambda n: held[0].map(lambda both: both[n], held[0].shape[1:])
        pair = [row(0), row(1)]
    else:
        raise errors.ConfigError(f"{path}: expected two vectors, the mean and deviation of z_i")
    return dict(zip(("statistics.mean", "statistics.std"), pair))


def _decoder(path: pathlib.Path) -> bundle.Part:
    source = _tensors(path, "clip_emb.weight")
    arch = _unet_arch(source, "model.", path)
    context_dim, text_width = _shape(source, "model.text_seq_proj.0.weight", 2, path)
    arch |= {"head_dim": HEAD, "context_dim": context_dim}
    found = {"parametrisation": "eps", "variance": "learned_range", "clamp": 1.0}
    settings = decoder_settings(arch, DECODER_SIZE, found, str(path))
    embed_dim = _shape(source, "model.clip_emb.weight", 2, path)[1]
    params = layout.take(
        [*text_proj_rules("model."), *unet_rules(arch, "unet", "model.")],
        source,
        decoder_shapes(arch, embed_dim, text_width),
        what=str(path),
        ignore=BUFFERS,
    )
    return bundle.Part("decoder", arch, params, {}, settings)


def _upsamplers(path: pathlib.Path) -> dict[str, bundle.Part]:
    source = layout.unwrapped(weights.open_weights(path), (SR_MARK,), str(path))
    rules, shapes, archs = [], {}, {}
    for name, prefix in (
        ("upsampler_0", "model_first_steps."),
        ("upsampler_0_last", "model_last_step."),
    ):
        archs[name] = _unet_arch(source, prefix, path)
        rules += unet_rules(archs[name], f"{name}/unet", prefix)
        same = next((n for n in shapes if archs[n] == archs[name]), None)
        shapes[name] = shapes[same] if same else upsampler_shapes(archs[name])
    params = layout.take(rules, source, shapes, what=str(path))
    found = {"parametrisation": "eps", "variance": "fixed_small", "clamp": 1.0}
    parts = {}
    for name, arch in archs.items():
        settings = upsampler_settings(arch, UPSAMPLER_SIZE, DECODER_SIZE, found, str(path))
        parts[name] = bundle.Part(name, arch, params[name], {}, settings)
    return parts


def _shape(source: Mapping[str, Lazy], name: str, ndim: int, path: pathlib.Path) -> tuple[int, ...]:
    """The shape of a tensor from which part of the architecture follows."""
    if name not in source or len(source[name].shape) != ndim:
        raise errors.ConfigError(
            f"{path} has no tensor {name} of {ndim} dimensions: no checkpoint of Karlo's"
        )
    return source[name].shape


def _count(source: Mapping[str, Lazy], name: str) -> int:
    """How many of a numbered tensor there are, from 0 without a gap."""
    n = 0
    while name.format(n) in source:
        n += 1
    return n


def _unet_arch(source: Mapping[str, Lazy], prefix: str, path: pathlib.Path) -> dict[str, Any]:
    """The fields of `models.unet.UNet` that follow from the shapes of a network below `prefix`.

    The levels follow from the upward half: each level but the finest ends in a block that
    upsamples, which is in the same entry as the level's last residual block.
    """
    get = lambda name, ndim: _shape(source, prefix + name, ndim, path)
    out = f"{prefix}output_blocks.{{}}"
    count = _count(source, f"{out}.0.in_layers.0.weight")
    ends = [
        n for n in range(count)
        if any(f"{out.format(n)}.{k}.in_layers.0.weight" in source for k in (1, 2))
    ]  # fmt: skip
    blocks = ends[0] if ends else count - 1
    firsts = range(0, count, blocks + 1)[::-1]  # of a level, finest first
    time_dim, channels = get("time_embed.0.weight", 2)
    widths = [get(f"output_blocks.{n}.0.out_layers.3.weight", 4)[0] for n in firsts]
    if not widths or widths[0] != channels:
        raise errors.ConfigError(f"{path}: widths {widths}; expected them to begin with {channels}")
    return dict(
        channels=channels,
        multipliers=multipliers(widths),
        blocks=blocks,
        attention=tuple(f"{out.format(n)}.1.qkv.weight" in source for n in firsts),
        mid_attention=f"{prefix}middle_block.1.qkv.weight" in source,
        out_channels=get("out.2.weight", 4)[0],
        time_dim=None if time_dim == 4 * channels else time_dim,
        scale_shift=get("middle_block.0.emb_layers.1.weight", 2)[0] == 2 * widths[-1],
        groups=GROUPS,
        dtype="float32",
    )


def prior_rules(layers: int) -> list[Rule]:
    """The rules of Karlo's PriorTransformer of `layers` blocks, and of its statistics."""
    rules = [
        *dense("text/proj", "model.text_enc_proj"),
        *dense("z_t/proj", "model.text_emb_proj"),
        *dense("z_i/proj", "model.clip_img_proj"),
        *dense("time_in", "model.time_embed.0"),
        *dense("time_out", "model.time_embed.2"),
        Rule("query", "model.prd_emb", leading(2)),
        Rule("position", "model.positional_embedding", leading(1)),
        *norm("norm_out", "model.final_ln"),
        *dense("out", "model.out_proj"),
        Rule("statistics/mean", "statistics.mean", COPY),
        Rule("statistics/std", "statistics.std", COPY),
    ]
    for i in range(layers):
        ours, theirs = f"transformer/block_{i}", f"model.transformer.resblocks.{i}"
        rules += norm(f"{ours}/ln_1", f"{theirs}.ln_1")
        rules += fused_dense(
            [f"{ours}/attn/{name}" for name in "qkv"], f"{theirs}.attn.c_qkv", chunk=HEAD
        )
        rules += dense(f"{ours}/attn/out", f"{theirs}.attn.c_proj")
        rules += norm(f"{ours}/ln_2", f"{theirs}.ln_2")
        rules += dense(f"{ours}/mlp/fc", f"{theirs}.mlp.c_fc")
        rules += dense(f"{ours}/mlp/proj", f"{theirs}.mlp.c_proj")
    return rules


def text_proj_rules(prefix: str) -> list[Rule]:
    """The rules of what turns the decoder's conditions into its U-Net's inputs."""
    return [
        Rule("text_proj/null_image", f"{prefix}cf_param", COPY),
        *dense("text_proj/image_time", f"{prefix}clip_emb"),
        *dense("text_proj/image_tokens", f"{prefix}clip_tok_proj"),
        *dense("text_proj/text_time", f"{prefix}text_feat_proj"),
        *dense("text_proj/text_tokens", f"{prefix}text_seq_proj.0"),
        *norm("text_proj/text_norm", f"{prefix}text_seq_proj.1"),
    ]


def unet_rules(arch: Mapping[str, Any], ours: str, prefix: str) -> list[Rule]:
    """The rules of a U-Net: `ours` is its place in our tree, `prefix` begins their names."""
    levels, blocks = len(arch["multipliers"]), arch["blocks"]
    middle = f"{prefix}middle_block"
    rules = [
        *dense(f"{ours}/time/fc_1", f"{prefix}time_embed.0"),
        *dense(f"{ours}/time/fc_2", f"{prefix}time_embed.2"),
        *conv(f"{ours}/conv_in", f"{prefix}input_blocks.0.0"),
        *norm(f"{ours}/norm_out", f"{prefix}out.0"),
        *conv(f"{ours}/conv_out", f"{prefix}out.2"),
        *_res(f"{ours}/mid/res_0", f"{middle}.0"),
        *_attention(f"{ours}/mid/attn_0", f"{middle}.1"),
        *_res(f"{ours}/mid/res_1", f"{middle}.{2 if arch['mid_attention'] else 1}"),
    ]
    n = 1  # entries are numbered consecutively, on the way down including those that resample
    for i in range(levels):
        for j in range(blocks):
            rules += _block(f"{ours}/down_{i}", j, f"{prefix}input_blocks.{n}")
            n += 1
        if i < levels - 1:
            rules += _res(f"{ours}/down_{i}/downsample", f"{prefix}input_blocks.{n}.0")
            n += 1
    n = 0
    for i in reversed(range(levels)):
        for j in range(blocks + 1):
            rules += _block(f"{ours}/up_{i}", j, f"{prefix}output_blocks.{n}")
            n += 1
        last = 2 if arch["attention"][i] else 1
        rules += _res(f"{ours}/up_{i}/upsample", f"{prefix}output_blocks.{n - 1}.{last}")
    return rules


def _block(level: str, j: int, theirs: str) -> list[Rule]:
    return _res(f"{level}/res_{j}", f"{theirs}.0") + _attention(f"{level}/attn_{j}", f"{theirs}.1")


def _res(ours: str, theirs: str) -> list[Rule]:
    return [
        *norm(f"{ours}/norm_1", f"{theirs}.in_layers.0"),
        *conv(f"{ours}/conv_1", f"{theirs}.in_layers.2"),
        *dense(f"{ours}/time", f"{theirs}.emb_layers.1"),
        *norm(f"{ours}/norm_2", f"{theirs}.out_layers.0"),
        *conv(f"{ours}/conv_2", f"{theirs}.out_layers.3"),
        *conv(f"{ours}/skip", f"{theirs}.skip_connection"),
    ]


def _attention(ours: str, theirs: str) -> list[Rule]:
    """Convolutions of kernel size 1 over the positions, [out, in, 1]."""
    fused = lambda names, theirs: fused_dense(
        [f"{ours}/{name}" for name in names], theirs, then=conv1x1(1), chunk=HEAD
    )
    return [
        *norm(f"{ours}/norm", f"{theirs}.norm"),
        *fused(("q", "k", "v"), f"{theirs}.qkv"),
        *fused(("context_k", "context_v"), f"{theirs}.encoder_kv"),
        Rule(f"{ours}/out/kernel", f"{theirs}.proj_out.weight", conv1x1(1)),
        Rule(f"{ours}/out/bias", f"{theirs}.proj_out.bias", COPY),
    ]
