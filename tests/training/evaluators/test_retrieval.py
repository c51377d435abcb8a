"""Zero-shot retrieval: ranks against plain loops, equals, chance, and any number of devices."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.runtime import distributed, sharding
from unclip.training.evaluators import passes, ranking
from unclip.training.evaluators.retrieval import Retrieval, retrieval

ROOT = pathlib.Path(__file__).parents[3]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_loops(z_i, z_t, picture, caption):
    """The figures in the words of the definition, a query and a candidate at a time."""
    similarity = np.float64(unit(z_i)) @ np.float64(unit(z_t)).T
    pairs = set(zip(picture.tolist(), caption.tolist()))
    first = lambda values: {v: values.tolist().index(v) for v in set(values.tolist())}
    pictures, captions = first(picture), first(caption)

    def rank(asked, table, right, score):
        order = sorted(table, key=lambda c: -score(asked, table[c]))
        return 1 + min(k for k, c in enumerate(order) if right(c))

    out = {}
    for name, ranks in (
        (
            "image_to_text",
            [
                rank(row, captions, lambda c, p=p: (p, c) in pairs, lambda i, j: similarity[i, j])
                for p, row in pictures.items()
            ],
        ),
        (
            "text_to_image",
            [
                rank(row, pictures, lambda p, c=c: (p, c) in pairs, lambda j, i: similarity[i, j])
                for c, row in captions.items()
            ],
        ),
    ):
        out |= {f"{name}_recall_{k}": np.mean([r <= k for r in ranks]) for k in (1, 5, 10)}
        out[f"{name}_median_rank"] = np.median(ranks)
    return out | {"pictures": len(pictures), "captions": len(captions)}


def test_equal_pictures_and_captions_are_one_candidate():
    """40 samples of 25 pictures and 30 captions; embeddings half right."""
    rng = np.random.default_rng(0)
    picture, caption = rng.integers(0, 25, 40), rng.integers(0, 30, 40)
    of_picture, of_caption = rng.standard_normal((2, 30, 8))
    z_i, z_t = of_picture[picture], of_caption[caption] + 0.7 * of_picture[picture]
    z_t = np.stack([z_t[caption.tolist().index(c)] for c in caption])  # equal texts embed equally
    got, want = retrieval(z_i, z_t, picture, caption), by_loops(z_i, z_t, picture, caption)
    assert got == pytest.approx(want)
    assert 0.1 < want["text_to_image_recall_1"] < want["text_to_image_recall_10"] < 1


def test_five_captions_a_picture_as_clip_benchmark_counts_them():
    """Recall at k there: any right one among the k highest of a row of scores."""
    rng = np.random.default_rng(1)
    picture, caption = np.repeat(np.arange(12), 5), rng.permutation(60)
    base = rng.standard_normal((12, 6))
    z_i, z_t = base[picture], base[picture] + 1.2 * rng.standard_normal((60, 6))
    got = retrieval(z_i, z_t, picture, caption)
    scores = unit(z_t) @ unit(base).T
    right = picture[:, None] == np.arange(12)[None]
    for k in (1, 5, 10):
        for name, score, hit in (
            ("text_to_image", scores, right),
            ("image_to_text", scores.T, right.T),
        ):
            top = np.argsort(-score, axis=1)[:, :k]
            want = np.take_along_axis(hit, top, 1).any(1).mean()
            assert got[f"{name}_recall_{k}"] == pytest.approx(want)
    assert (got["pictures"], got["captions"]) == (12, 60)


def test_a_wrong_pairing_is_chance_and_the_right_one_is_not():
    rng = np.random.default_rng(2)
    z, number = rng.standard_normal((200, 32)), np.arange(200)
    right = retrieval(z, 3 * z, number, number)
    assert right["image_to_text_recall_1"] == 1 and right["text_to_image_median_rank"] == 1
    wrong = retrieval(z, np.roll(z, 1, axis=0), number, number)
    for name in ("image_to_text", "text_to_image"):
        assert wrong[f"{name}_recall_1"] == 0
        assert wrong[f"{name}_recall_10"] == pytest.approx(10 / 200, abs=0.05)
        assert wrong[f"{name}_median_rank"] == pytest.approx(100, abs=20)


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan])
def test_a_collapsed_or_broken_model_finds_nothing(value):
    """Every candidate ties with the right one, or nothing can be compared."""
    z, number = np.full((20, 4), value), np.arange(20)
    got = retrieval(z, z, number, number)
    assert got["image_to_text_recall_10"] == 0 and got["text_to_image_median_rank"] == 20


def test_blocks_of_queries_change_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    queries, candidates = rng.standard_normal((2, 37, 5))
    number = np.arange(37)
    pairs = ranking.pairs_through(number, number, number)
    whole = ranking.ranks(queries, candidates, pairs)
    monkeypatch.setattr(ranking, "_BLOCK", 37 * 4)
    np.testing.assert_array_equal(ranking.ranks(queries, candidates, pairs), whole)


# ============================================================ as an evaluator


class Toy:
    """z_i from the picture's first row; z_t from the tokens, times a parameter."""

    def predict(self):
        return {
            "z_i": lambda p, f, b, key: b["image"][:, 0].reshape(len(b["image"]), -1) / 255.0,
            "z_t": lambda p, f, b, key: p["scale"] * f["table"][b["tokens"][:, 1]],
        }


def state(scale=1.0):
    return {"params": {"scale": jnp.float32(-scale)}, "ema": {"scale": jnp.float32(scale)}}


@pytest.fixture(scope="module")
def samples():
    """21 samples in three batches of eight; rows 3 and 12 repeat pictures or captions."""
    rng = np.random.default_rng(4)
    image = rng.integers(0, 256, (24, 2, 4, 3), np.uint8)
    tokens = np.stack([np.full(24, 30), np.arange(24)], 1).astype(np.int32)
    image[12], tokens[3] = image[5], tokens[2]
    table = np.float32(image[:, 0].reshape(24, -1) / 255 + 0.3 * rng.standard_normal((24, 12)))
    valid = np.arange(24) < 22
    valid[7] = False  # a bad sample in the middle
    batches = [
        {"image": image[s], "tokens": tokens[s], "valid": valid[s]}
        for s in (slice(0, 8), slice(8, 16), slice(16, 24))
    ]
    return batches, {"table": table}


@pytest.mark.parametrize("devices", [1, 8])
def test_every_valid_sample_counts_once_on_any_mesh(samples, devices):
    batches, frozen = samples
    mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
    evaluator = Retrieval(Toy(), frozen, lambda: (batch for batch in batches), mesh)
    got = dict(evaluator.run(state(), 5))
    image, tokens, valid = (
        np.concatenate([b[k] for b in batches]) for k in ("image", "tokens", "valid")
    )
    z_i, z_t = image[:, 0].reshape(24, -1) / 255, frozen["table"][tokens[:, 1]]
    picture = np.where(np.arange(24) == 12, 5, np.arange(24))
    want = by_loops(z_i[valid], z_t[valid], picture[valid], tokens[valid, 1])
    assert got == pytest.approx({f"retrieval/{k}": v for k, v in want.items()})
    assert got["retrieval/pictures"] == got["retrieval/captions"] == 20
    assert evaluator.interval == "metric"


def test_a_request_to_stop_gives_no_figures(samples, monkeypatch):
    mesh = sharding.make_mesh({"data": -1})
    monkeypatch.setattr(distributed, "should_stop", lambda step=None: True)
    seen = []
    batches = lambda: (seen.append(1) or batch for batch in samples[0])
    assert list(Retrieval(Toy(), samples[1], batches, mesh).run(state(), 1)) == []
    assert len(seen) == 1


def test_no_sample_gives_no_figures(samples):
    mesh = sharding.make_mesh({"data": -1})
    nothing = [samples[0][0] | {"valid": np.zeros(8, bool)}]
    for batches in ([], nothing):
        evaluator = Retrieval(Toy(), samples[1], lambda b=batches: (x for x in b), mesh)
        assert list(evaluator.run(state(), 1)) == []


def test_rows_are_equal_where_their_bytes_are():
    rows = np.arange(12, dtype=np.int32).reshape(4, 3)
    rows[3] = rows[1]
    _, number = np.unique(passes.digests(rows), axis=0, return_inverse=True)
    number = number.reshape(-1)
    assert number[3] == number[1] and len(set(number.tolist())) == 3


WORKER = """
import json, sys
from unclip.runtime import distributed, sharding
if sys.argv[1]:
    distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax, jax.numpy as jnp, numpy as np
from unclip.training.evaluators.prior_quality import PriorQuality
from unclip.training.evaluators.retrieval import Retrieval
from unclip.input import source
from unclip.input.decode import transforms
from unclip.input.shards.collection import open_shards
from tests.training.evaluators.test_retrieval import Words
collection = open_shards((sys.argv[3],)).subset(count=21)
transform = transforms.ImageText(4, 8, Words())
batches = lambda: source.make_eval_source(
    collection, transform, batch_size=8, threads=1,
    process_index=distributed.process_index(), process_count=distributed.process_count())
mesh = sharding.make_mesh({"data": -1})
from tests.training.evaluators.test_retrieval import Pixels
task = Pixels()
frozen = {"clip": {"w": np.float32(np.random.default_rng(0).standard_normal((48, 8)))}}
state = {"ema": {"b": jnp.float32(0.5)}}
out = dict(Retrieval(task, frozen, batches, mesh).run(state, 1))
out |= dict(PriorQuality(task, frozen, batches, mesh, seed=3).run(state, 1))
print("figures", json.dumps(out, sort_keys=True), flush=True)
"""


class Words:
    """A tokenizer of letters, without a vocabulary file."""

    def __call__(self, texts, length):
        codes = np.zeros((len(texts), length), np.int32)
        for row, text in zip(codes, texts):
            letters = [ord(c) for c in text[-length:]]
            row[: len(letters)] = letters
        return codes, codes > 0


class Pixels:
    """A task of every kind at once: embeddings are projected pixels, draws are noisy texts."""

    stored = False

    def __init__(self):
        self.clip = self

    def project(self, frozen, rows):
        return rows.reshape(len(rows), -1).astype(jnp.float32) @ frozen["clip"]["w"]

    def image(self, frozen, batch):
        return self.project(frozen, batch["image"]) / 255

    def text(self, clip, tokens):
        return (tokens.astype(jnp.float32) @ clip["w"][:8], None)

    def sample(self, params, frozen, conditions, sample_keys):
        noise = jax.vmap(lambda k: jax.random.normal(k, (8,)))(sample_keys)
        return self.text(frozen["clip"], conditions["tokens"])[0] / 100 + params["b"] * noise

    def predict(self):
        return {
            "z_i": lambda p, f, b, key: self.image(f, b),
            "z_t": lambda p, f, b, key: self.text(f["clip"], b["tokens"])[0],
        }


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(shards):
    """Each process reads its own rows; the figures are of all of them, in the same order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    def start(address, index, devices):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(index), shards["train"]],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    workers = [start(address, 0, 2), start(address, 1, 2), start("", 0, 1)]
    try:
        said = [worker.communicate(timeout=100) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    figures = []
    for out, err in said:
        lines = [line for line in out.splitlines() if line.startswith("figures ")]
        assert lines, err[-3000:]
        figures.append(json.loads(lines[0].removeprefix("figures ")))
    assert figures[0] == figures[1]
    assert figures[0] == pytest.approx(figures[2], rel=1e-5, abs=1e-6)
    assert figures[0]["retrieval/captions"] == 21
