"""Where the right candidate stands when all are sorted by cosine: recall at k and median rank.

Zero-shot retrieval is how CLIP (arXiv 2103.00020, section 3.1.4) is judged, and the same question
asked of a drawn z_i says how much of its caption the prior (arXiv 2204.06125, section 2.2) kept.
"""

import numpy as np

from unclip.tasks.arrays import unit

RECALLS = (1, 5, 10)
_BLOCK = 1 << 24  # similarities at a time


def pairs_through(query_key: np.ndarray, sample_key: np.ndarray, sample_candidate: np.ndarray):
    """Every (query, candidate) for which some sample joins the query's key and the candidate.

    A caption that several pictures have, and a picture in several samples, make several candidates
    right for one query.

    Args:
      query_key: int [Q], e.g. which caption a query is; sample_key: int [N], which caption a sample
        has; sample_candidate: int [N], which candidate the sample's picture is.

    Returns:
      (queries int [P], candidates int [P]), no pair twice.
    """
    links = np.unique(np.stack([sample_key, sample_candidate], 1), axis=0)
    first = np.searchsorted(links[:, 0], query_key, "left")
    count = np.searchsorted(links[:, 0], query_key, "right") - first
    queries = np.repeat(np.arange(len(query_key)), count)
    within = np.arange(len(queries)) - np.repeat(np.cumsum(count) - count, count)
    return queries, links[np.repeat(first, count) + within, 1]


def ranks(queries: np.ndarray, candidates: np.ndarray, pairs) -> np.ndarray:
    """The rank of the best right candidate of every query, 1 the nearest.

    Only wrong candidates are counted before it, so one hit among several right ones is a hit at k
    exactly where `rank <= k`. A tie counts against the query, or a model that gives every caption
    the same embedding would be perfect; so does what is not finite.

    Args:
      queries: [Q, D]; candidates: [C, D]; any length, cosines are compared.
      pairs: from `pairs_through`; every query has at least one.

    Returns:
      int64 [Q], in 1 ... C.
    """
    queries, candidates = (unit(np.asarray(z, np.float32)) for z in (queries, candidates))
    out = np.empty(len(queries), np.int64)
    rows = max(1, _BLOCK // len(candidates))
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ candidates.T
        here = (pairs[0] >= start) & (pairs[0] < start + rows)
        row, column = pairs[0][here] - start, pairs[1][here]
        best = np.full(len(similarity), -np.inf, np.float32)
        np.fmax.at(best, row, similarity[row, column])
        ahead = ~(similarity < best[:, None])
        ahead[row, column] = False
        out[start : start + rows] = 1 + ahead.sum(1)
    return out


def summary(rank: np.ndarray) -> dict[str, float]:
    """{"recall_1", "recall_5", "recall_10" in [0, 1], "median_rank"} of ranks int [Q]."""
    found = {f"recall_{k}": float(np.mean(rank <= k)) for k in RECALLS}
    return found | {"median_rank": float(np.median(rank))}
