"""A micro cascade that is not silent, for every mode."""

import jax
import numpy as np
import pytest

from unclip import UnCLIP
from unclip.cascade import bundle


@pytest.fixture(scope="package")
def parts(bundle_dir):
    """{name: Part} of the micro bundle, shaken: fresh U-Nets end in zeros."""
    found = bundle.read(bundle_dir).parts
    rng = np.random.default_rng(0)
    shake = lambda leaf: np.float32(leaf + 0.1 * rng.standard_normal(leaf.shape))
    for part in found.values():
        part.params = jax.tree.map(shake, part.params)
    return found


@pytest.fixture(scope="package")
def model(parts):
    return UnCLIP(parts, model_hash="0123456789", batch_size=4)


@pytest.fixture(scope="session")
def picture():
    """picture(seed) -> uint8 [40, 30, 3] of coarse random blocks."""

    def make(seed=0):
        blocks = np.random.default_rng(seed).integers(0, 256, (4, 3, 3), np.uint8)
        return blocks.repeat(10, axis=0).repeat(10, axis=1)

    return make
