"""Drawn as trained: without a condition, a stage sees what training showed it without one."""

import contextlib

import flax.linen as nn
import jax
import numpy as np
import pytest

from unclip import tasks
from unclip.models.decoder import Conditioner, Decoder
from unclip.models.prior import DiffusionPrior, EmbeddingInput, TextInput
from unclip.models.prior_ar import ARPrior
from unclip.models.t5 import T5Encoder
from unclip.tasks import keys

UNET = dict(channels=8, multipliers=(1,), blocks=1, head_dim=8, groups=4, time_dim=16)
UNET |= dict(attention=(True,), context_dim=8)
TEXT_ONLY = UNET | dict(use_z_i=False, use_z_t=False)
PRIOR = dict(embed_dim=8, context=8, width=16, layers=1, heads=2)
AR = PRIOR | dict(text_width=12, codes=4, buckets=16, dot_buckets=2)
T5 = dict(vocab_size=40, width=12, heads=2, head_dim=6, layers=1, mlp_width=16)
# Preset family -> (stage, kind, architecture of its kind at micro size, settings).
FAMILIES = {
    "emoji": ("decoder", "", UNET | dict(learned_null_text=True), {}),
    "karlo": ("decoder", "", UNET, {}),
    "paper": (
        "decoder",
        "",
        UNET | dict(use_z_t=False, text_layers=1, text_heads=2, text_context=8, vocab=40),
        {},
    ),
    "glide": (
        "decoder",
        "",
        TEXT_ONLY | dict(text_layers=1, text_heads=2, text_context=8, vocab=40),
        {},
    ),
    "imagen": (
        "decoder",
        "",
        TEXT_ONLY | dict(pool_text=True, learned_null_text=True, text_context=8),
        {"text_encoder": "t5"},
    ),
    "text": ("decoder", "", UNET | dict(learned_null_text=True), {"embedding": "text"}),
    "prior-karlo": ("prior", "", PRIOR | dict(text_width=12), {}),
    "prior-paper": ("prior", "", PRIOR | dict(vocab_size=40, learned_null=True), {}),
    "prior-ar": ("prior", "ar", AR, {}),
    "prior-ar-null": ("prior", "ar", AR | dict(learned_null=True), {}),
}
WATCHED = (Conditioner, TextInput, EmbeddingInput)
NETWORKS = (Decoder, DiffusionPrior, ARPrior)


@contextlib.contextmanager
def watching():
    """{module and place: what the last call made of the conditions}, from inside programs."""
    seen = {}

    def watch(next_function, args, kwargs, context):
        out = next_function(*args, **kwargs)
        module = context.module
        if isinstance(module, WATCHED) and context.method_name == "__call__":
            # The embedding of the prior's own x_t is no condition.
            name = "/".join(module.path)
            if name != "z_i":
                keep = lambda out: seen.__setitem__(name, jax.tree.map(np.asarray, out))
                jax.debug.callback(keep, out)
        return out

    with nn.intercept_methods(watch):
        yield seen
        jax.effects_barrier()


@pytest.fixture(scope="module")
def family(made):
    """family(name) -> (task, params, frozen)."""

    def make(name, **settings):
        stage, kind, arch, own = FAMILIES[name]
        settings = own | settings
        if settings.get("text_encoder") != "t5":
            return made(stage, kind, arch=arch, **settings)
        t5 = T5Encoder(**T5)
        task = tasks.make(stage, arch, {"image_size": 4} | settings, t5=T5)
        weights = {"t5": task.t5.init(jax.random.key(3))}
        task = tasks.make(stage, arch, {"image_size": 4} | settings, t5=T5, weights=weights)
        assert t5 == task.t5.model
        return task, task.init(jax.random.key(1)), task.frozen()

    return make


def conditions_of(task, frozen, batch):
    out = {name: batch[name] for name in ("tokens", "text_mask")}
    return out | ({"z_i": task.embed(frozen, batch)} if hasattr(task, "embed") else {})


QUICK = {("prior-paper", "text")}
CASES = [
    pytest.param(name, dropped, marks=() if (name, dropped) in QUICK else pytest.mark.slow)
    for dropped, names in (("text", FAMILIES), ("image", ("emoji", "karlo", "paper", "text")))
    for name in names
]


@pytest.mark.parametrize("name, dropped", CASES)
def test_a_dropped_condition_is_drawn_as_it_is_trained(family, batch_of, name, dropped):
    drops = {"text_drop": float(dropped == "text")}
    if FAMILIES[name][0] == "decoder":
        drops["image_drop"] = float(dropped == "image")
    task, params, frozen = family(name, **drops)
    batch, rows = batch_of(task, 2), 2
    with watching() as trained:
        jax.jit(lambda b: task.loss(params, frozen, b, jax.random.key(0), train=True)[0])(batch)
    conditions = conditions_of(task, frozen, batch) | {f"drop_{dropped}": np.ones(rows, bool)}
    sample_keys = keys.sample_keys(jax.random.key(1), batch["sample"])
    draw = {} if FAMILIES[name][1] == "ar" else {"steps": 1}
    draw |= {"candidates": 1} if FAMILIES[name][0] == "prior" else {}
    with watching() as drawn:
        jax.jit(lambda c: task.sample(params, frozen, c, sample_keys, draw=draw))(conditions)
    assert trained and trained.keys() == drawn.keys()
    first = lambda tree: jax.tree.map(lambda leaf: leaf[:rows], tree)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, first(drawn), trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emoji", "karlo", "prior-karlo", "prior-paper", "prior-ar-null"])
def test_without_the_caption_the_caption_does_not_matter(family, batch_of, name):
    task, params, frozen = family(name)
    batch, other = batch_of(task, 2), batch_of(task, 2, seed=7)
    sample_keys = keys.sample_keys(jax.random.key(1), batch["sample"])
    draw = {"guidance": 3.0} | ({"steps": 2} if "ar" not in name else {"temperature": 0.0})

    @jax.jit
    def run(conditions, drop):
        return task.sample(params, frozen, conditions | {"drop_text": drop}, sample_keys, draw=draw)

    mine = conditions_of(task, frozen, batch)
    theirs = mine | {name: other[name] for name in ("tokens", "text_mask")}
    without = np.ones(2, bool)
    if "ar" not in name:
        np.testing.assert_allclose(run(mine, without), run(theirs, without), rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(run(mine, ~without)) - run(mine, without)).max() > 1e-3
