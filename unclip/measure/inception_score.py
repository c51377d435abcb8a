"""The Inception score: how sure a classifier is of each picture, and how varied its classes are.

exp(mean over pictures of KL(p(y|x) ‖ p(y))), 1606.03498. It uses no real pictures, so it does not
replace FID. Everything is float64. The logits are Inception's 1008 without the bias, as in both
tools that are followed here.
"""

import itertools

import numpy as np

from unclip.errors import ConfigError
from unclip.measure.rows import checked


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """The score as torch-fidelity measures it: shuffled, then cut into `splits` parts.

    The order is `RandomState(seed).permutation(N)`; part i holds rows ⌊i N / splits⌋ up to
    ⌊(i + 1) N / splits⌋, so that every row counts and sizes differ by one at most.

    Args:
      logits: [N, classes], before the softmax.

    Returns:
      (mean, standard deviation) over the parts; the mean lies in [1, classes].

    Raises:
      ConfigError: fewer rows than splits, or fewer than 1 split.
      NumericsError: NaN or infinite logits.
    """
    if splits < 1:
        raise ConfigError(f"splits is {splits}; expected at least 1")
    logits = checked(logits, "logits", least=max(splits, 2), why=f"for {splits} splits")
    count = len(logits)
    shuffled = logits[np.random.RandomState(seed).permutation(count)]
    return _over_parts(shuffled, [i * count // splits for i in range(splits + 1)])


def openai(logits: np.ndarray, split_size: int = 5000) -> tuple[float, float]:
    """The score as OpenAI's evaluator measures it: parts of `split_size` rows in the given order.

    The last part may be smaller and counts as much as the others. That tool prints only the mean.

    Args:
      logits: [N, classes], before the softmax.

    Returns:
      (mean, standard deviation) over the parts.

    Raises:
      ConfigError: fewer than 2 rows, or a split_size below 1.
      NumericsError: NaN or infinite logits.
    """
    if split_size < 1:
        raise ConfigError(f"split_size is {split_size}; expected at least 1")
    logits = checked(logits, "logits")
    return _over_parts(logits, [*range(0, len(logits), split_size), len(logits)])


def _over_parts(logits, edges):
    scores = [_score(logits[a:b]) for a, b in itertools.pairwise(edges)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits):
    logits = logits.astype(np.float64)
    log_p = logits - _log_sum(logits, axis=1)
    # In logarithms the probability of a class that is never predicted is very small, but never log
    # 0.
    log_marginal = _log_sum(log_p, axis=0) - np.log(len(logits))
    return np.exp((np.exp(log_p) * (log_p - log_marginal)).sum(axis=1).mean())


def _log_sum(x, axis):
    """log Σ exp x along an axis, which is kept with length 1."""
    top = x.max(axis=axis, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True))
