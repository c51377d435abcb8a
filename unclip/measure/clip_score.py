"""How well pictures fit their captions by CLIP: CLIP score under each of its names, R-precision.

All start from the cosine of z_i and z_t. Tools differ in what they compute from it and in the
prefix before the caption, which is added where captions are encoded. Embeddings are normalised
here, in float64.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from unclip.errors import ConfigError
from unclip.measure.rows import checked_unit, same_width

WEIGHT = 2.5  # Hessel's w, which spreads ViT-B/32's cosines over [0, 1]
BLOCK = 256  # pictures compared with all captions at a time


def cosine(z_i: np.ndarray, z_t: np.ndarray) -> np.ndarray:
    """The cosine of each picture with its caption: what T2I-CompBench calls CLIP score.

    Args:
      z_i: [N, D] image embeddings; z_t: [N, D] embeddings of their captions, in the same order.

    Returns:
      float64 [N] in [−1, 1].

    Raises:
      ConfigError: no rows, or counts or widths that differ.
      NumericsError: NaN, infinite or all-zero embeddings.
    """
    return _product(*_pairs(z_i, z_t))


def hessel(z_i: np.ndarray, z_t: np.ndarray) -> np.ndarray:
    """CLIP-S of 2104.08718: 2.5 · max(cosine, 0) of each picture; its mean is the score.

    The published numbers are of ViT-B/32 and captions behind "A photo depicts ".

    Args, Raises: as `cosine`.

    Returns:
      float64 [N] in [0, 2.5].
    """
    return WEIGHT * np.maximum(cosine(z_i, z_t), 0.0)


def ref_clip_score(
    z_i: np.ndarray, z_t: np.ndarray, references: Sequence[np.ndarray]
) -> np.ndarray:
    """RefCLIP-S of 2104.08718: harmonic mean of CLIP-S and the caption's best reference.

    Args:
      z_i, z_t: as `cosine`.
      references: for each picture the embeddings [R, D], R at least 1, of its reference captions.

    Returns:
      float64 [N]; 0 where the cosine with the picture or with every reference is 0 or less.

    Raises:
      ConfigError, NumericsError: as `cosine`, and for references that are missing.
    """
    z_i, z_t = _pairs(z_i, z_t)
    if len(references) != len(z_t):
        raise ConfigError(f"{len(references)} sets of references for {len(z_t)} captions")
    best = np.empty(len(z_t))
    for i, (own, others) in enumerate(zip(z_t, references, strict=True)):
        others = checked_unit(others, f"references of caption {i}", least=1)
        same_width(own[None], others, "captions and references")
        best[i] = max((others @ own).max(), 0.0)
    score = WEIGHT * np.maximum(_product(z_i, z_t), 0.0)
    both = score + best
    return np.divide(2 * score * best, both, out=np.zeros_like(both), where=both > 0)


def torchmetrics(z_i: np.ndarray, z_t: np.ndarray) -> float:
    """CLIP score as torchmetrics computes it: max(mean of 100 · cosine, 0), no prefix.

    Args, Raises: as `cosine`.
    """
    return max(float(100 * cosine(z_i, z_t).mean()), 0.0)


def r_precision(
    z_i: np.ndarray,
    z_t: np.ndarray,
    candidates: int = 100,
    seed: int = 0,
    *,
    captions: Sequence[Hashable] | None = None,
) -> float:
    """CLIP-R-precision at R = 1: how often a picture's own caption is the nearest of `candidates`.

    The candidates are the picture's own caption and `candidates` − 1 others, drawn by the seed
    from the distinct captions of the set; a second picture's equal caption is not a distractor. A
    tie is a miss. Chance is 1 / candidates, so the count is part of the metric's name.

    Args:
      z_i, z_t: as `cosine`.
      captions: N captions, to find equal ones; None: captions are equal if their embeddings are.

    Returns:
      the share of hits, in [0, 1].

    Raises:
      ConfigError: as `cosine`; fewer than 2 candidates, or more than there are distinct captions.
      NumericsError: as `cosine`.
    """
    z_i, z_t = _pairs(z_i, z_t)
    if captions is not None and len(captions) != len(z_t):
        raise ConfigError(f"{len(captions)} captions for {len(z_t)} of their embeddings")
    names = [row.tobytes() for row in z_t] if captions is None else captions
    number = {}  # of each distinct caption, in order of appearance
    own = np.array([number.setdefault(name, len(number)) for name in names])
    distinct = z_t[np.unique(own, return_index=True)[1]]
    if not 2 <= candidates <= len(distinct):
        raise ConfigError(
            f"{candidates} candidates asked for; the set has {len(distinct)} distinct captions, "
            "so expected 2 to that many"
        )
    generator = np.random.default_rng(seed)
    hits = 0
    for at in range(0, len(z_i), BLOCK):
        for cosines, mine in zip(
            z_i[at : at + BLOCK] @ distinct.T, own[at : at + BLOCK], strict=True
        ):
            others = generator.choice(len(distinct) - 1, candidates - 1, replace=False)
            others += others >= mine  # skips the picture's own caption
            hits += cosines[mine] > cosines[others].max()
    return float(hits / len(z_i))


def _pairs(z_i, z_t):
    z_i, z_t = checked_unit(z_i, "z_i", least=1), checked_unit(z_t, "z_t", least=1)
    if len(z_i) != len(z_t):
        raise ConfigError(f"{len(z_i)} pictures and {len(z_t)} captions; expected one caption each")
    same_width(z_i, z_t, "z_i and z_t")
    return z_i, z_t


def _product(z_i, z_t):
    return np.einsum("nd,nd->n", z_i, z_t)
