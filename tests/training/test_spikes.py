"""The spike guard against its formula, written independently."""

import numpy as np
import pytest

from unclip.training import spikes


def test_threshold_is_of_median_and_mad():
    rng = np.random.default_rng(0)
    losses = rng.normal(2.0, 0.3, 100)
    guard = spikes.SpikeGuard(8.0)
    for loss in losses:
        guard.see(loss, 1.0)
    middle = np.median(losses)
    limit = middle + 8 * 1.4826 * np.median(np.abs(losses - middle))
    said = guard.see(limit + 1e-6, 1.0)
    assert said == f"loss {limit:.4g}, the median before is {middle:.4g}"
    assert guard.see(limit + 1e-6, 1.0), "a spike does not widen the range"
    assert not guard.see(limit - 1e-6, 1.0)


def test_gradient_norms_are_judged_by_their_logarithm():
    guard = spikes.SpikeGuard(10.0)
    for norm in np.exp(np.random.default_rng(0).normal(0, 0.5, 64)):
        assert not guard.see(1.0, norm)
    assert not guard.see(1.0, 40.0)
    assert "grad_norm 1e+04, the median before is" in guard.see(1.0, 1e4)


def test_too_few_steps_and_a_factor_of_zero_judge_nothing():
    for factor, steps in ((10.0, spikes.LEAST - 1), (0.0, 100)):
        guard = spikes.SpikeGuard(factor)
        assert not any(guard.see(1.0, 1.0) for _ in range(steps))
        assert not guard.see(1e9, 1e9)


def test_a_new_height_that_stays_becomes_the_usual_one():
    guard = spikes.SpikeGuard(10.0)
    for _ in range(64):
        guard.see(1.0, 1.0)
    told = [bool(guard.see(9.0, 1.0)) for _ in range(2 * spikes.WINDOW)]
    assert told == [True] * (spikes.WINDOW - 1) + [False] * (spikes.WINDOW + 1)


@pytest.mark.parametrize("loss", [0.0, -3.0])
def test_losses_without_spread_or_below_zero(loss):
    guard = spikes.SpikeGuard(10.0)
    for _ in range(64):
        assert not guard.see(loss, 0.0)
    assert not guard.see(loss, 0.0)
