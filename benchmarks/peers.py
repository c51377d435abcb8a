"""Train steps beside those of PyTorch's libraries, on one core of a CPU or on two.

    python benchmarks/peers.py --cores 1 --out benchmarks/results/peers_1.json
    python benchmarks/peers.py --cores 2 --out benchmarks/results/peers_2.json

Needs what `make parity` installs. Networks of equal size in float32 do the same work on the same
arrays: the loss, its gradient, AdamW. Both run in one process that is pinned to its cores, and take
turns (ours, theirs, ours, ...), so that other load of the machine affects both. Prints a JSON line
a row: parameters, the medians of a call's seconds, of CPU time and of the clock, and `ratio`, the
peer's CPU time divided by ours (`clock_ratio`: of the clock; read it on idle cores alone). --out
FILE.json keeps the ratios for docs/speed.md. --short: few small layers, which shows that all rows
run and nothing of their speed.
"""

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import record

ADAMW = {"learning_rate": 1e-4, "weight_decay": 1e-2}
EQUAL = 0.03  # how far two networks of equal size may differ in parameters


class Contender(NamedTuple):
    """One side of a row: a call does the work once and waits for it; ours calls `compiled`."""

    call: Callable[[], Any]
    parameters: int
    compiled: Any = None


class Sizes(NamedTuple):
    """What rows are measured at."""

    batch: int
    rows: int
    channels: int
    blocks: int
    width: int
    layers: int


FULL = Sizes(batch=4, rows=32, channels=48, blocks=3, width=512, layers=8)
SHORT = Sizes(batch=1, rows=2, channels=16, blocks=1, width=64, layers=1)


def _count(shapes: Sequence[Any]) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in shapes)


def ours(model: Any, loss: Callable, arrays: Sequence, *, train: bool = True) -> Contender:
    """A network of ours, its weights random.

    Args:
      model: a linen module that takes `arrays`.
      loss: (what the module gives, *arrays) -> scalar.
      arrays: the batch.
      train: an update by AdamW; else the network's result alone.
    """
    import jax
    import optax

    from unclip.runtime import optim

    arrays = [jax.numpy.asarray(array) for array in arrays]
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arrays)["params"]
    rng = np.random.default_rng(0)  # its own start would take longer to compile than the step
    small = lambda leaf: 0.05 * rng.standard_normal(leaf.shape, np.float32)
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(small(leaf)), shapes)
    count = _count(jax.tree.leaves(params))
    apply = lambda params, arrays: model.apply({"params": params}, *arrays)
    if not train:
        forward = jax.jit(apply).lower(params, arrays).compile()
        call = lambda: jax.block_until_ready(forward(params, arrays))
        return Contender(call, count, forward)
    tx, _ = optim.make_optimizer(params, total_steps=1000, clip_norm=None, **ADAMW)

    def step(params, opt, arrays):
        grads = jax.grad(lambda params: loss(apply(params, arrays), *arrays))(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    state = params, jax.jit(tx.init)(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state, arrays).compile()

    def call():
        nonlocal state
        state = jax.block_until_ready(compiled(*state, arrays))

    return Contender(call, count, compiled)


def theirs(net: Any, loss: Callable, *, train: bool = True) -> Contender:
    """A network of PyTorch's; loss: () -> scalar tensor, or its result where `train` is False."""
    import torch

    count = _count(list(net.parameters()))
    if not train:
        return Contender(torch.no_grad()(loss), count)
    adamw = torch.optim.AdamW(
        net.parameters(), lr=ADAMW["learning_rate"], weight_decay=ADAMW["weight_decay"]
    )

    def call():
        adamw.zero_grad(set_to_none=True)
        loss().backward()
        adamw.step()

    return Contender(call, count)


def _tensors(*arrays):
    import torch

    return [torch.from_numpy(np.array(array)) for array in arrays]


def _noised(sizes: Sizes) -> list[np.ndarray]:
    """x, t, embedding and context of a batch of 64-pixel pictures."""
    rng, wide = np.random.default_rng(0), 4 * sizes.channels
    normal = lambda *shape: rng.standard_normal((sizes.batch, *shape), np.float32)
    t = rng.integers(0, 1000, sizes.batch, np.int32)
    return [normal(64, 64, 3), t, normal(wide), normal(81, wide)]


@functools.cache  # two rows compare the same step
def _unet(sizes: Sizes, *, train: bool = True) -> Contender:
    from unclip.models.unet import UNet

    model = UNet(
        channels=sizes.channels,
        multipliers=(1, 2, 3, 4),
        blocks=sizes.blocks,
        attention=(False, True, True, True),
        head_dim=sizes.channels,
        groups=16,
        out_channels=6,
    )
    return ours(model, lambda y, *_: (y * y).mean(), _noised(sizes), train=train)


def _diffusers_unet(sizes: Sizes, *, train: bool = True) -> Contender:
    import diffusers

    c = sizes.channels
    attending = ["SimpleCrossAttnDownBlock2D"] * 3, ["SimpleCrossAttnUpBlock2D"] * 3
    net = diffusers.UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        layers_per_block=sizes.blocks,
        block_out_channels=(c, 2 * c, 3 * c, 4 * c),
        cross_attention_dim=4 * c,
        attention_head_dim=c,
        norm_num_groups=16,
        down_block_types=("ResnetDownsampleBlock2D", *attending[0]),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*attending[1], "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    x, t, emb, context = _tensors(*_noised(sizes))
    x = x.permute(0, 3, 1, 2).contiguous()
    result = lambda: net(x, t, context, class_labels=emb).sample
    return theirs(net, (lambda: (result() ** 2).mean()) if train else result, train=train)


def _dalle2_unet(sizes: Sizes) -> Contender:
    from tests.parity import peers

    x, t, emb, context = _tensors(*_noised(sizes))
    x, context = x.permute(0, 3, 1, 2).contiguous(), context[:, :77]  # 4 more are its own
    net = peers.dalle2_pytorch().Unet(
        sizes.channels,
        dim_mults=(1, 2, 3, 4),
        num_resnet_blocks=sizes.blocks,
        self_attn=(False, True, True, True),
        attn_heads=4,
        attn_dim_head=sizes.channels,
        image_embed_dim=emb.shape[-1],
        text_embed_dim=context.shape[-1],
        cond_dim=8 * sizes.channels // 3,  # as wide as makes it equally large
        cond_on_image_embeds=True,
        cond_on_text_encodings=True,
        max_text_len=context.shape[1],
        channels_out=6,
    )
    return theirs(net, lambda: (net(x, t, image_embed=emb, text_encodings=context) ** 2).mean())


def _embeddings(sizes: Sizes) -> list[np.ndarray]:
    """z_i, z_t and the text's hidden states."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((sizes.rows, *shape, sizes.width), np.float32)
    z_i, z_t = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (normal(), normal()))
    return [z_i, z_t, normal(77)]


def _prior(sizes: Sizes) -> Contender:
    import flax.linen as nn
    import jax

    from unclip.diffusion import gaussian, schedule
    from unclip.models.prior import DiffusionPrior

    width, noise = sizes.width, schedule.make("cosine")

    class Noised(nn.Module):
        """What the prior makes of z_i at random timesteps, and z_i as it should be."""

        @nn.compact
        def __call__(self, z_i, z_t, hidden, key):
            z_i = z_i * width**0.5
            ours, theirs = jax.random.split(key)
            t = jax.random.randint(ours, z_i.shape[:1], 0, len(noise))
            x_t = gaussian.q_sample(noise, z_i, t, jax.random.normal(theirs, z_i.shape))
            prior = DiffusionPrior(
                embed_dim=width,
                context=77,
                text_width=width,
                width=width,
                layers=sizes.layers,
                heads=width // 64,
                head_dim=64,
            )
            mask = jax.numpy.ones(hidden.shape[:2], bool)
            return prior(x_t, t, z_t, hidden, mask) - z_i

    arrays = [*_embeddings(sizes), jax.random.key(1)]
    return ours(Noised(), lambda error, *_: (error * error).mean(), arrays)


def _dalle2_prior(sizes: Sizes) -> Contender:
    from tests.parity import peers

    dalle2 = peers.dalle2_pytorch()
    # Its feed-forward has a gate: narrower layers, as many and as large.
    net = dalle2.DiffusionPriorNetwork(
        dim=sizes.width,
        depth=sizes.layers,
        dim_head=64,
        heads=sizes.width // 64,
        ff_mult=3.125,
        max_text_len=77,
    )
    prior = dalle2.DiffusionPrior(net, image_embed_dim=sizes.width)
    z_i, z_t, hidden = _tensors(*_embeddings(sizes))
    # It scales z_i in place.
    loss = lambda: prior(text_embed=z_t, image_embed=z_i.clone(), text_encodings=hidden)
    return theirs(prior, loss)


def _pairs(sizes: Sizes) -> list[np.ndarray]:
    """Pictures of 64 pixels and captions of 77 tokens."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((sizes.rows, 64, 64, 3), np.float32)
    tokens = rng.integers(1, 49406, (sizes.rows, 77), np.int32)
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    return [images, tokens]


def _clip(sizes: Sizes) -> Contender:
    import jax

    from unclip.models.clip import CLIP
    from unclip.tasks.arrays import unit
    from unclip.tasks.clip import softmax_loss

    width, layers = sizes.width // 2, sizes.layers * 3 // 4 or 1
    model = CLIP(
        embed_dim=width,
        image_size=64,
        patch_size=8,
        vision_width=width,
        vision_layers=layers,
        vision_heads=max(width // 64, 1),
        text_width=width,
        text_layers=layers,
        text_heads=max(width // 64, 1),
    )

    def loss(embedded, *_):
        z_i, z_t, scale = embedded
        valid = jax.numpy.ones(len(z_i), bool)
        return softmax_loss(scale * unit(z_i) @ unit(z_t).T, valid).mean()

    return ours(model, loss, _pairs(sizes))


def _transformers_clip(sizes: Sizes) -> Contender:
    import transformers

    width, layers = sizes.width // 2, sizes.layers * 3 // 4 or 1
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "projection_dim": width,
        "hidden_act": "quick_gelu",
    }
    ids = {"bos_token_id": 49406, "eos_token_id": 49407}
    config = transformers.CLIPConfig(
        text_config=tower | ids | {"vocab_size": 49408, "max_position_embeddings": 77},
        vision_config=tower | {"image_size": 64, "patch_size": 8},
        projection_dim=width,
    )
    net = transformers.CLIPModel(config)
    images, tokens = _tensors(*_pairs(sizes))
    images, tokens = images.permute(0, 3, 1, 2).contiguous(), tokens.long()
    loss = lambda: net(input_ids=tokens, pixel_values=images, return_loss=True).loss
    return theirs(net, loss)


# What a row is called in --rows: (what is measured, against whom, ours, theirs).
ROWS: dict[str, tuple[str, str, Callable, Callable]] = {
    "unet-forward": (
        "U-Net, 64 px, {batch} rows: forward",
        "diffusers",
        lambda sizes: _unet(sizes, train=False),
        lambda sizes: _diffusers_unet(sizes, train=False),
    ),
    "unet-step": ("U-Net, 64 px, {batch} rows: a step", "diffusers", _unet, _diffusers_unet),
    "unet-step-dalle2": (
        "U-Net, 64 px, {batch} rows: a step",
        "DALLE2-pytorch",
        _unet,
        _dalle2_unet,
    ),
    "prior-step": (
        "diffusion prior, {rows} rows: a step",
        "DALLE2-pytorch",
        _prior,
        _dalle2_prior,
    ),
    "clip-step": ("CLIP, {rows} rows: a step", "transformers", _clip, _transformers_clip),
}


def by_turns(
    pair: Sequence[Callable[[], Any]], turns: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Medians of a call's seconds: for each of two, (of the process's CPU time, of the clock).

    Both are called once before, which compiles them.
    """
    for call in pair:
        call()
    taken = ([], [])
    for _ in range(turns):
        for call, times in zip(pair, taken, strict=True):
            clock, used = time.perf_counter(), time.process_time()
            call()
            times.append((time.process_time() - used, time.perf_counter() - clock))
    return tuple(tuple(map(statistics.median, zip(*times, strict=True))) for times in taken)


def measure(name: str, sizes: Sizes, turns: int) -> dict:
    """One row.

    Raises:
      SystemExit: a full row's networks are not of equal size.
    """
    what, against, *makers = ROWS[name]
    mine, other = (make(sizes) for make in makers)
    away = other.parameters / mine.parameters - 1
    if sizes is FULL and abs(away) > EQUAL:
        sys.exit(
            f"{name}: {against} has {other.parameters:,} parameters, ours {mine.parameters:,}; "
            f"expected within {EQUAL:.0%}"
        )
    (cpu, clock), (other_cpu, other_clock) = by_turns((mine.call, other.call), turns)
    return {
        "row": name,
        "figure": what.format(batch=sizes.batch, rows=sizes.rows),
        "against": against,
        "parameters": mine.parameters,
        "their_parameters": other.parameters,
        "cpu_seconds": round(cpu, 4),
        "their_cpu_seconds": round(other_cpu, 4),
        "ratio": round(other_cpu / cpu, 3),
        "clock_ratio": round(other_clock / clock, 3),
    }


def figures(found: dict, cores: int) -> list[dict]:
    """What is kept of a row: the ratio of CPU time, and that of the clock where cores share."""
    what = f"{found['figure']}, {found['parameters'] / 1e6:.1f} M parameters, float32, "
    what += f"{cores} core{'s' * (cores > 1)}"
    kept = [record.figure(f"{what}: CPU time", found["ratio"], "×", found["against"])]
    if cores > 1:
        kept.append(
            record.figure(f"{what}: by the clock", found["clock_ratio"], "×", found["against"])
        )
    return kept


def _missing() -> list[str]:
    wanted = ("torch", "diffusers", "transformers")
    found = [name for name in wanted if importlib.util.find_spec(name) is None]
    folders = ("dalle2-pytorch-1.15.6", "torchvision-0.28.0")
    where = record.ROOT / ".cache" / "peers"
    return found + [f".cache/peers/{name}" for name in folders if not (where / name).is_dir()]


def main() -> None:
    """Pins the process, then measures row after row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, default=1, choices=(1, 2))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--profile", action="store_true", help="no peers: our ten dearest operations"
    )
    parser.add_argument("--short", action="store_true", help="small layers, one turn")
    parser.add_argument("--out", help="FILE.json that keeps the ratios")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    wrong = []
    if given.turns < 1:
        wrong.append(f"--turns is {given.turns}, expected 1 or more")
    if given.cores > len(cores):
        wrong.append(f"--cores is {given.cores}, this process may use {len(cores)}")
    if given.out and (given.short or given.profile):
        wrong.append("--short and --profile measure nothing that --out could keep")
    if missing := _missing():
        wrong.append(f"{', '.join(missing)} is missing: `make parity` installs it")
    if wrong:
        print("; ".join(wrong), file=sys.stderr)
        sys.exit(78)
    # Before JAX and PyTorch count their threads.
    os.sched_setaffinity(0, cores[: given.cores])
    os.environ["JAX_PLATFORMS"] = "cpu"
    import torch

    torch.set_num_threads(given.cores)
    sizes, turns = (SHORT, 1) if given.short else (FULL, given.turns)
    kept = []
    for name in given.rows:
        if given.profile:
            from benchmarks import operations

            call, _, compiled = ROWS[name][2](sizes)
            call()
            print(f"{name}:\n{operations.table(operations.profile(compiled, call))}", flush=True)
            continue
        found = measure(name, sizes, turns)
        print(json.dumps({"cores": given.cores, **found}), flush=True)
        kept += figures(found, given.cores)
    if given.out:
        record.write(given.out, kept, device="cpu")


if __name__ == "__main__":
    main()
