"""Feature rows [N, D] of N pictures: the checks that every metric of a set of pictures makes
first."""

import numpy as np

from unclip.errors import ConfigError, NumericsError
from unclip.tasks.arrays import unit


def checked(rows: np.ndarray, name: str, *, least: int = 2, why: str = "") -> np.ndarray:
    """`rows` as an array of floats, or an error that says why it cannot be measured.

    Args:
      rows: [N, D], any real dtype; integers become float64, floats stay what they are.
      name: what they are, for the message: "real features".
      least: the fewest rows allowed; why: what needs that many.

    Raises:
      ConfigError: not a matrix, or fewer than `least` rows.
      NumericsError: NaN or infinite entries; names the first such row.
    """
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ConfigError(f"{name} have shape {rows.shape}; expected [pictures, width]")
    if len(rows) < least:
        raise ConfigError(
            f"{len(rows)} {name} given; at least {least} are needed{why and ' ' + why}"
        )
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(np.float64)
    # A sum is finite unless an entry is not, or it overflows; a test without a mask of N·D flags.
    if not np.isfinite(rows.sum(axis=1, dtype=np.float64)).all():
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise NumericsError(
                f"{len(bad)} of {len(rows)} {name} hold NaN or infinity; the first is row {bad[0]}"
            )
    return rows


def same_width(first: np.ndarray, second: np.ndarray, names: str) -> None:
    """Raises ConfigError where the two sets of rows are not of the same extractor's width."""
    if first.shape[1] != second.shape[1]:
        raise ConfigError(
            f"{names} are {first.shape[1]} and {second.shape[1]} wide; "
            "both must come from the same extractor"
        )


def checked_unit(rows: np.ndarray, name: str, *, least: int = 2) -> np.ndarray:
    """Embeddings [N, D] scaled to length 1, in float64.

    Raises:
      ConfigError: as `checked`.
      NumericsError: NaN, infinity, or a row of zeros, which has no direction.
    """
    rows = checked(rows, name, least=least).astype(np.float64)
    nowhere = np.flatnonzero(~rows.any(axis=1))
    if len(nowhere):
        raise NumericsError(f"row {nowhere[0]} of the {name} is all zero and has no direction")
    return unit(rows)
