"""Micro tasks of every stage, scrambled parameters (fresh ones ignore their input), and batches."""

import copy

import jax
import numpy as np
import pytest

from unclip import tasks

VOCABULARY = 40  # 38 starts a caption, 39 ends it
CLIP = dict(
    embed_dim=8,
    image_size=8,
    patch_size=4,
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    text_width=12,
    text_layers=1,
    text_heads=2,
    context=8,
    vocab_size=VOCABULARY,
)
UNET = dict(channels=8, multipliers=(1,), blocks=1, head_dim=8, groups=4, time_dim=16)
ARCH = {
    "clip": CLIP,
    "prior": dict(embed_dim=8, context=8, text_width=12, width=16, layers=1, heads=2, head_dim=8),
    "ar": dict(
        embed_dim=8,
        codes=4,
        buckets=16,
        context=8,
        text_width=12,
        width=32,
        layers=1,
        heads=2,
        dot_buckets=2,
    ),
    "decoder": UNET | dict(attention=(True,), context_dim=8, learned_null_text=True),
    "upsampler": UNET | dict(attention=(False,)),
}


def scrambled(params, seed=1):
    """Parameters moved off their initial values: zero-initialised layers let nothing through."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    leaves = [
        np.float32(np.asarray(leaf) + 0.2 * rng.standard_normal(leaf.shape)) for leaf in leaves
    ]
    return jax.tree.unflatten(structure, leaves)


def captions(rng, rows, length):
    """tokens int32 [rows, length], mask bool: start, one or more words, end, padding."""
    tokens = np.zeros((rows, length), np.int32)
    for row in tokens:
        words = rng.integers(1, length - 1)
        row[0], row[1 : 1 + words], row[1 + words] = 38, rng.integers(1, 38, words), 39
    return tokens, np.arange(length) <= np.argmax(tokens == 39, axis=1)[:, None]


@pytest.fixture(scope="session")
def batch_of():
    """batch_of(task, rows, seed=0, first=0): a random batch of the task's spec."""

    def make(task, rows, seed=0, first=0):
        rng = np.random.default_rng(seed)
        out = {}
        for name, leaf in task.batch_spec(rows).items():
            if leaf.dtype == np.uint8:
                out[name] = rng.integers(0, 256, leaf.shape, np.uint8)
            elif name == "z_i":
                out[name] = np.float32(rng.standard_normal(leaf.shape))
        if "tokens" in task.batch_spec(rows):
            length = task.batch_spec(rows)["tokens"].shape[1]
            out["tokens"], out["text_mask"] = captions(rng, rows, length)
        numbers = first + np.arange(rows)
        out["sample"] = np.stack([numbers >> 32, numbers & 0xFFFFFFFF], 1).astype(np.uint32)
        out["valid"] = np.ones(rows, bool)
        return out

    return make


@pytest.fixture(scope="session")
def clip_params():
    return scrambled(jax.jit(tasks.make("clip", CLIP, {}).init)(jax.random.key(0)))


def with_model(task, model):
    """The same task around another network, to see what that is given."""
    other = copy.copy(task)
    object.__setattr__(other, "model", model)
    return other


@pytest.fixture(scope="session", name="with_model")
def _with_model():
    return with_model


@pytest.fixture(scope="session")
def made(clip_params):
    """made(stage, kind="diffusion", arch=None, **settings) -> (task, params, frozen)."""
    params = {}

    def make(stage, kind="", arch=None, **settings):
        name = "ar" if kind == "ar" else stage
        parts, weights = {}, {}
        if stage in ("prior", "decoder"):
            parts, weights = {"clip": CLIP}, {"clip": clip_params}
        if stage == "prior":
            rng = np.random.default_rng(5)
            weights["statistics"] = {
                "mean": np.float32(rng.standard_normal(8)),
                "std": np.float32(rng.uniform(0.5, 2, 8)),
            }
            if kind == "ar":
                weights["statistics"] = {
                    "mean": np.zeros(8, np.float32),
                    "components": np.eye(8, 4, dtype=np.float32),
                    "scale": np.ones(4, np.float32),
                    "dot_edges": np.float32([-2.0]),
                }
            settings["kind"] = kind or "diffusion"
        if stage == "decoder":
            settings = {"image_size": 4} | settings
        if stage == "upsampler":
            settings = {"image_size": 8, "factor": 2} | settings
        task = tasks.make(stage, arch or ARCH[name], settings, weights=weights, **parts)
        # Parameters depend on the architecture alone, so they are made once for all settings.
        of = (name, repr(arch))
        if of not in params:
            params[of] = scrambled(jax.jit(task.init)(jax.random.key(1)))
        return task, params[of], task.frozen()

    return make
