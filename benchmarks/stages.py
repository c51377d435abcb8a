"""Speed of every stage's train step on this machine's accelerator, with random data and weights.

    python benchmarks/stages.py --preset karlo --batch 16 --steps 10

Prints one JSON line a stage: images a second, the first step's seconds (compilation included),
peak memory of a device, and the model FLOPs reached of the chip's bf16 peak. Absolute times mean
something on an accelerator only; on a CPU this checks that the stages run. --out FILE.json keeps
the figures for docs/speed.md.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import record
from configs import clip, decoder, prior, upsampler
from unclip.runtime import flops, sharding
from unclip.training.plan import make_plan

CONFIGS = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler": upsampler}
CLIP_PRESETS = {"karlo": "ViT-L/14", "glide": "ViT-L/14", "paper": "ViT-H/16", "emoji": "emoji"}


def random_batch(spec: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of a task's spec: noise for pictures, one caption length, every row valid."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, leaf in spec.items():
        if leaf.dtype == np.uint8:
            out[name] = rng.integers(0, 256, leaf.shape, np.uint8)
        elif name == "tokens":
            out[name] = np.tile(np.r_[49406, np.full(6, 320), 49407], (leaf.shape[0], 1))
            out[name] = np.pad(out[name], ((0, 0), (0, leaf.shape[1] - 8))).astype(np.int32)
        elif name == "text_mask":
            out[name] = np.arange(leaf.shape[1])[None].repeat(leaf.shape[0], 0) < 8
        elif name == "sample":
            out[name] = np.stack([np.zeros(leaf.shape[0]), np.arange(leaf.shape[0])], 1)
            out[name] = out[name].astype(np.uint32)
        elif name == "valid":
            out[name] = np.ones(leaf.shape, bool)
        else:
            out[name] = rng.standard_normal(leaf.shape).astype(np.float32)
    return out


def measure(name: str, preset: str, batch_size: int, steps: int, overrides: dict) -> dict:
    """One stage: builds the exact train step, runs it, reports."""
    if name == "clip":
        preset = CLIP_PRESETS.get(preset, preset)
    config = CONFIGS[name].get_config(preset)
    config.batch_size = batch_size
    config.optim.warmup_steps, config.total_steps = 0, steps + 1
    config.follow_init = False
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    for field, value in overrides.items():
        config.arch[field] = value
    plan = make_plan(config, shapes_only=True)
    plan.check()
    frozen = {}
    for part, shapes in (plan.frozen_shapes or {}).items():
        where = sharding.shardings(shapes, plan.mesh, plan.rules)
        init = jax.jit(plan.task.init_frozen, static_argnums=0, out_shardings=where)
        frozen[part] = init(part, jax.random.key(1))
    state = plan.init(jax.random.key(0))
    step = plan.make_step()
    batch = sharding.put_batch(random_batch(plan.task.batch_spec(batch_size)), plan.mesh)
    frozen = frozen or None
    start = time.perf_counter()
    state, metrics = step(state, frozen, batch)
    loss = float(metrics["loss"])
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - start) / steps
    stats = jax.devices()[0].memory_stats() or {}
    needed = plan.flops()
    used = flops.utilisation(needed, seconds, jax.devices())
    return {
        "stage": name,
        "preset": preset,
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "batch": batch_size,
        "dtype": config.arch.dtype,
        "remat": config.arch.remat,
        "images_per_second": round(batch_size / seconds, 2),
        "seconds_per_step": round(seconds, 4),
        "first_step_seconds": round(first, 1),
        "peak_memory_gib": round(stats.get("peak_bytes_in_use", 0) / 2**30, 2) or None,
        "model_tflop_per_step": round(needed / 1e12, 3),
        "flop_utilisation": used and round(used, 3),
        "first_loss": round(loss, 4),
    }


def figures(found: dict) -> list[dict]:
    """What is kept of one stage's line; what this device does not tell is left out."""
    what = f"{found['stage']}, preset {found['preset']}, batch {found['batch']}, {found['dtype']}"
    kept = (
        ("images_per_second", "pictures a second", "/s", None),
        ("seconds_per_step", "a step", "s", None),
        ("first_step_seconds", "the first step, with compilation", "s", None),
        ("peak_memory_gib", "peak memory of a device", "GiB", None),
        ("flop_utilisation", "part of the peak that is used", "", "bfloat16 peak of the chip"),
    )
    return [
        record.figure(f"{what}: {text}", found[name], unit, against)
        for name, text, unit, against in kept
        if found[name] is not None
    ]


def main() -> None:
    """Reads the flags, prints a line a stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="emoji")
    parser.add_argument("--stages", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--remat", default=None, help="policy name, '' for none")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", help="FILE.json that keeps the figures")
    arguments = parser.parse_args()
    overrides = {"remat": arguments.remat, "dtype": arguments.dtype}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    kept = []
    for name in arguments.stages:
        found = measure(name, arguments.preset, arguments.batch, arguments.steps, overrides)
        print(json.dumps(found), flush=True)
        kept += figures(found)
    if arguments.out:
        record.write(arguments.out, kept, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
