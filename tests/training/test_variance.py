"""The analytic variance: measured once when a prior's training ends, kept, and drawn with."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip import UnCLIP
from unclip.cascade import runs
from unclip.cascade.bundle import Part
from unclip.training import start, variance

pytestmark = pytest.mark.usefixtures("cheap_runs")


class Prior:
    """Says for every timestep that its error is that timestep's number."""

    schedule = np.zeros(50)

    def x0_error(self, params, frozen, batch, t, key):
        return t.astype(jnp.float32)


def test_every_timestep_is_met_and_keeps_its_own_error():
    from unclip.runtime import sharding

    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    numbers = np.arange(8, dtype=np.uint32)
    sample = np.stack([np.zeros_like(numbers), numbers], 1)

    def batches():
        yield {"sample": sample, "valid": np.ones(8, bool)}

    got = variance.x0_error(Prior(), {}, {}, batches, mesh, 8, 0)
    np.testing.assert_array_equal(got, np.arange(50))


@pytest.mark.slow
def test_a_run_measures_once_and_its_part_draws_with_it(tiny_config, run_of, tmp_path):
    changes = {"clip": run_of("clip"), "task.variance": "analytic"}
    start.train(tiny_config("prior", changes), str(tmp_path / "prior"))
    file = pathlib.Path(tmp_path / "prior" / runs.STATISTICS)
    measured = runs.read_prior_statistics(file)["x0_error"]
    assert measured.shape == (1000,) and (measured > 0).all() and np.ptp(measured) > 0
    written = file.stat().st_mtime_ns
    start.train(tiny_config("prior", changes), str(tmp_path / "prior"))
    assert file.stat().st_mtime_ns == written
    # Trained on, it is another network.
    start.train(tiny_config("prior", changes | {"total_steps": 3}), str(tmp_path / "prior"))
    again = runs.read_prior_statistics(file)["x0_error"]
    assert (again > 0).all() and not np.array_equal(again, measured)

    prior = runs.open_part(tmp_path / "prior", "prior")
    parts = {"clip": runs.open_part(run_of("clip"), "clip"), "prior": prior}
    draw = lambda part: UnCLIP(parts | {"prior": part}).draw_prior(["a red dot"], [0], candidates=1)
    plain = {n: v for n, v in prior.extra.items() if n != "x0_error"}
    small = dataclasses.replace(prior, settings=prior.settings | {"variance": "fixed_small"})
    assert isinstance(prior, Part) and np.abs(draw(prior) - draw(small)).max() > 1e-4
    # What was not measured is nothing: the posterior's variance alone.
    unmeasured = dataclasses.replace(prior, extra=plain)
    np.testing.assert_allclose(draw(unmeasured), draw(small), rtol=1e-4, atol=1e-5)
