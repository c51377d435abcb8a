"""Held-out loss and sample grids: what they average, what they show, and when they give up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip.runtime import distributed, sharding
from unclip.tasks import base, keys
from unclip.training.evaluators.held_out import HeldOutLoss
from unclip.training.evaluators.samples import Samples


class Toy:
    """Loss = scale x picture's mean + the sample's own noise; draws the picture's negative."""

    def loss(self, params, frozen, batch, key, *, train):
        assert not train
        own = batch["image"].astype(jnp.float32).mean((1, 2, 3)) * params["scale"]
        noise = keys.normal(keys.sample_keys(key, batch["sample"]), (), 0)
        loss = base.mean(own + noise, batch["valid"])
        return loss, {"loss": loss, "scale": params["scale"] * frozen["one"]}

    def predict(self):
        return {
            "sample": lambda params, frozen, batch, key: {
                "pictures": 1 - batch["image"] / 127.5,
                "mse": base.mean(
                    batch["image"].astype(jnp.float32).mean((1, 2, 3)), batch["valid"]
                ),
            }
        }


FROZEN = {"one": np.float32(1)}
STATE = {"params": {"scale": jnp.float32(9)}, "ema": {"scale": jnp.float32(2)}}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": -1})


@pytest.fixture(scope="module")
def passes():
    """Two batches of eight, eleven samples valid."""
    rng = np.random.default_rng(0)
    out = []
    for first in (0, 8):
        numbers = first + np.arange(8)
        out.append(
            {
                "image": rng.integers(0, 256, (8, 4, 4, 3), np.uint8),
                "sample": np.stack([np.zeros(8), numbers], 1).astype(np.uint32),
                "valid": numbers < 11,
            }
        )
    return out


def test_the_mean_is_over_valid_samples_of_all_batches(mesh, passes):
    evaluator = HeldOutLoss(Toy(), FROZEN, lambda: passes, mesh, seed=5)
    got = dict(evaluator.run(STATE, 1))
    image, sample, valid = (
        np.concatenate([b[k] for b in passes]) for k in ("image", "sample", "valid")
    )
    noise = np.asarray(keys.normal(keys.sample_keys(jax.random.key(5), sample), (), 0))
    want = (np.float64(image).mean((1, 2, 3)) * 2 + noise)[valid].mean()  # the average's scale
    assert got == {"held_out/loss": pytest.approx(want, rel=1e-6), "held_out/scale": 2.0}
    assert dict(evaluator.run(STATE, 99)) == got  # the same figure at every step


def test_no_sample_gives_no_number(mesh):
    assert list(HeldOutLoss(Toy(), FROZEN, lambda: [], mesh).run(STATE, 1)) == []


def test_a_request_to_stop_ends_the_pass(mesh, passes, monkeypatch):
    monkeypatch.setattr(distributed, "should_stop", lambda step=None: True)
    seen = []
    count = lambda: (seen.append(1) or batch for batch in passes)
    assert list(HeldOutLoss(Toy(), FROZEN, count, mesh).run(STATE, 1)) == []
    assert len(seen) == 1


def test_samples_stand_beside_the_true_pictures(mesh, passes):
    batch = passes[1]
    got = dict(Samples(Toy(), FROZEN, batch, mesh, name="held_out").run(STATE, 1))
    valid = batch["image"][batch["valid"]]  # three of eight: paddings are not shown
    assert got["samples_held_out/mse"] == pytest.approx(valid.mean(), rel=1e-5)
    grid = got["samples_held_out"]
    assert grid.dtype == np.uint8
    for k in range(3):
        drawn, true = (tile(grid, 2 * k + i) for i in (0, 1))
        np.testing.assert_array_equal(true, valid[k])
        np.testing.assert_array_equal(drawn, 255 - valid[k])


def tile(grid, place, side=4, gap=2):
    """Picture `place` of a grid's first row."""
    left = gap + place * (side + gap)
    return grid[gap : gap + side, left : left + side]


def test_an_upsampler_shows_the_small_picture_too(mesh, passes):
    low = passes[0]["image"][:, ::2, ::2]
    grid = dict(Samples(Toy(), FROZEN, passes[0] | {"low": low}, mesh).run(STATE, 1))
    assert grid["samples_train"].shape[1] >= 12 * 4  # four triples a row


def test_a_task_that_draws_nothing(mesh, passes):
    class Silent(Toy):
        def predict(self):
            return {}

    assert list(Samples(Silent(), FROZEN, passes[0], mesh).run(STATE, 1)) == []
