"""The Inception score on distributions whose score is known, and both tools' ways to split."""

import numpy as np
import pytest
import scipy.special

from unclip.errors import ConfigError, NumericsError
from unclip.measure import inception_score


def plain(logits):
    """exp of the mean Kullback-Leibler divergence, from probabilities."""
    p = scipy.special.softmax(logits, axis=1)
    return np.exp(np.mean([scipy.special.rel_entr(row, p.mean(axis=0)).sum() for row in p]))


def test_known_scores():
    same = np.tile(np.random.default_rng(0).normal(size=7), (30, 1))
    assert inception_score.inception_score(same) == pytest.approx((1, 0), abs=1e-12)
    # Sure of each picture, all six classes alike: the score is their number.
    sure = np.tile(40.0 * np.eye(6), (5, 1))
    assert inception_score.inception_score(sure, splits=1) == pytest.approx((6, 0), abs=1e-9)
    # Probabilities that vanish in float64 are not log 0.
    assert inception_score.openai(1e5 * sure) == pytest.approx((6, 0), abs=1e-9)
    # No picture moves by a constant added to its logits.
    moved = sure + np.random.default_rng(0).normal(size=(30, 1)) * 100
    assert inception_score.openai(moved) == pytest.approx((6, 0), abs=1e-9)


def test_torch_fidelitys_order_and_remainder():
    """23 rows in 5 parts: 4, 5, 4, 5, 5 rows of the shuffled set, none dropped."""
    logits = np.random.default_rng(1).normal(size=(23, 9)) * 2
    order = np.random.RandomState(2020).permutation(23)
    parts = np.split(logits[order], [4, 9, 13, 18])
    scores = [plain(part) for part in parts]
    measured = inception_score.inception_score(logits, splits=5)
    assert measured == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    other = inception_score.inception_score(logits, splits=5, seed=1)
    assert other != pytest.approx(measured, rel=1e-4)


def test_openais_order_and_remainder():
    """12 rows by 5, in the given order: parts of 5, 5 and 2, each with the same weight."""
    logits = np.random.default_rng(2).normal(size=(12, 9)) * 2
    scores = [plain(logits[:5]), plain(logits[5:10]), plain(logits[10:])]
    measured = inception_score.openai(logits, split_size=5)
    assert measured == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    assert inception_score.openai(logits)[0] == pytest.approx(plain(logits), rel=1e-12)


def test_float32_logits_are_measured_in_float64():
    logits = (np.random.default_rng(3).normal(size=(40, 50)) * 3).astype(np.float32)
    wanted = inception_score.inception_score(logits.astype(np.float64))
    assert inception_score.inception_score(logits) == wanted


def test_bad_input():
    logits = np.zeros((9, 3))
    with pytest.raises(ConfigError, match=r"9 logits given; at least 10 .* 10 splits"):
        inception_score.inception_score(logits)
    with pytest.raises(ConfigError, match="splits is 0"):
        inception_score.inception_score(logits, splits=0)
    with pytest.raises(ConfigError, match="split_size is 0"):
        inception_score.openai(logits, split_size=0)
    with pytest.raises(ConfigError, match="1 logits given"):
        inception_score.openai(logits[:1])
    logits[4, 1] = np.inf
    with pytest.raises(NumericsError, match=r"1 of 9 logits .* row 4"):
        inception_score.openai(logits)
