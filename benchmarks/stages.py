"""Speed of every stage's train step on this machine's accelerator, with random data and weights.

    python benchmarks/stages.py --preset karlo --batch 16 --steps 10

Prints one JSON line a stage: images a second, the first step's seconds (compilation included),
peak memory of a device, and the model FLOPs reached of the chip's bf16 peak. Absolute times mean
something on an accelerator only; on a CPU this checks that the stages run. --out FILE.json keeps
the figures for docs/speed.md. --profile prints a step's ten dearest operations after each line.
A T5 has random weights too: `--stages decoder --preset imagen --t5_preset t5-v1_1-base`.
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
from unclip.errors import ConfigError
from unclip.input.decode.text import Tokenizer
from unclip.runtime import flops, sharding
from unclip.training.plan import make_plan

CONFIGS = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler": upsampler}
CLIP_PRESETS = {"karlo": "ViT-L/14", "glide": "ViT-L/14", "paper": "ViT-H/16", "emoji": "emoji"}


def random_batch(spec: dict, tokenizer=None, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of a task's spec: noise for pictures, one caption, every row valid.

    tokenizer: the task's own, None for CLIP's.
    """
    rng = np.random.default_rng(seed)
    out = {}
    for name, leaf in spec.items():
        if leaf.dtype == np.uint8:
            out[name] = rng.integers(0, 256, leaf.shape, np.uint8)
        elif name in ("tokens", "text_mask"):
            texts = ["a photograph of a red fox"] * leaf.shape[0]
            tokens, mask, _ = (tokenizer or Tokenizer()).encode(texts, leaf.shape[1])
            out[name] = tokens if name == "tokens" else mask
        elif name == "sample":
            out[name] = np.stack([np.zeros(leaf.shape[0]), np.arange(leaf.shape[0])], 1)
            out[name] = out[name].astype(np.uint32)
        elif name == "valid":
            out[name] = np.ones(leaf.shape, bool)
        else:
            out[name] = rng.standard_normal(leaf.shape).astype(np.float32)
    return out


def preset_of(name: str, preset: str) -> str:
    """A stage's preset, with its config's other arguments, for the cascade's."""
    first, comma, rest = preset.partition(",")
    return (CLIP_PRESETS.get(first, first) if name == "clip" else first) + comma + rest


def read_config(name: str, given: argparse.Namespace):
    """The config of a stage as the flags want it.

    Raises:
      ConfigError: a preset that the stage does not have, or a field that its config has not.
    """
    config = CONFIGS[name].get_config(preset_of(name, given.preset))
    config.batch_size = given.batch
    config.optim.warmup_steps, config.total_steps = 0, given.steps + 1
    config.follow_init = False
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    if given.remat is not None:
        config.arch.remat = given.remat
    if given.dtype is not None:
        config.arch.dtype = given.dtype
    if given.t5_preset is not None and "t5_preset" in config:
        config.t5_preset = given.t5_preset
    return config


def measure(name: str, preset: str, config, steps: int, profile: bool) -> tuple[dict, str]:
    """One stage: builds the exact train step, runs it; what it took, and a profile's lines."""
    batch_size = config.batch_size
    plan = make_plan(config, shapes_only=True)
    plan.check()
    frozen = {}
    for part, shapes in (plan.frozen_shapes or {}).items():
        where = sharding.shardings(shapes, plan.mesh, plan.rules)
        init = jax.jit(plan.task.init_frozen, static_argnums=0, out_shardings=where)
        frozen[part] = init(part, jax.random.key(1))
    state = plan.init(jax.random.key(0))
    step = plan.make_step()
    batch = random_batch(plan.task.batch_spec(batch_size), plan.task.tokenizer)
    batch = sharding.put_batch(batch, plan.mesh)
    frozen = frozen or None
    start = time.perf_counter()
    step = step.lower(state, frozen, batch).compile()
    state, metrics = step(state, frozen, batch)
    loss = float(metrics["loss"])
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - start) / steps
    operations = _profile(step, state, frozen, batch) if profile else ""
    stats = jax.devices()[0].memory_stats() or {}
    needed = plan.flops()
    used = flops.utilisation(needed, seconds, jax.devices())
    found = {
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
    return found, operations


def _profile(step, state, frozen, batch) -> str:
    from benchmarks import operations

    def call():
        nonlocal state
        state = jax.block_until_ready(step(state, frozen, batch)[0])

    return operations.table(operations.profile(step, call))


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
    parser.add_argument("--t5_preset", default=None, help="size of the T5 that a decoder reads")
    parser.add_argument("--profile", action="store_true", help="print the dearest operations")
    parser.add_argument("--out", help="FILE.json that keeps the figures")
    arguments = parser.parse_args()
    configs, wrong = {}, []
    for name in arguments.stages:
        try:
            configs[name] = read_config(name, arguments)
        except ConfigError as error:
            wrong.append(f"{name}: {error.message}")
    if wrong:
        print("; ".join(wrong), file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    kept = []
    for name, config in configs.items():
        preset = preset_of(name, arguments.preset)
        found, operations = measure(name, preset, config, arguments.steps, arguments.profile)
        print("\n".join(filter(None, [json.dumps(found), operations])), flush=True)
        kept += figures(found)
    if arguments.out:
        record.write(arguments.out, kept, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
