"""The demo's pieces that need no training; `.ci/run` runs the whole of it with few steps."""

import numpy as np
import pytest

from configs import clip, decoder, prior, upsampler

CONFIGS = {"clip.py": clip, "prior.py": prior, "decoder.py": decoder, "upsampler.py": upsampler}


@pytest.fixture(scope="module")
def demo(script):
    return script("demo")


def test_squared_error_is_of_values_in_zero_to_one(demo):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 4, 4, 3), np.uint8)
    b = rng.integers(0, 256, (5, 4, 4, 3), np.uint8)
    found = demo.squared_error(a, b)
    assert found.shape == (3, 5)
    wanted = np.mean((a[2] / 255 - b[4] / 255) ** 2)
    np.testing.assert_allclose(found[2, 4], wanted, rtol=1e-12)
    assert demo.squared_error(a, a).diagonal().max() == 0


def test_the_trainings_of_the_demo_fit_together(demo):
    trainings = {job[0]: job for lane in demo.LANES for job in lane}
    assert set(trainings) == {"clip", "prior", "decoder", "upsampler_0", "upsampler_1"}
    configs = {}
    for name, config, *_ in trainings.values():
        file, _, arg = config.partition(":")
        configs[name] = CONFIGS[file].get_config(arg.format(theme="food"))
    side = configs["decoder"].task.image_size
    for name in ("upsampler_0", "upsampler_1"):
        assert configs[name].task.image_size == side * configs[name].task.factor
        side = configs[name].task.image_size
    assert configs["prior"].arch.embed_dim == configs["clip"].arch.embed_dim


def test_the_theme_has_enough_pictures_and_none_in_both_splits(demo):
    train, held_out = demo.truth("food", [16])
    assert 64 <= len(train) <= 128 and held_out
    assert not {row["key"] for row in train} & {row["key"] for row in held_out}
    assert len({row["name"] for row in train}) == len(train)
    assert all(row["pictures"][16].shape == (16, 16, 3) for row in train)
    # Hits are counted by the nearest picture, which must be able to tell every two apart.
    base = np.stack([row["pictures"][16] for row in train])
    errors = demo.squared_error(base, base)
    np.fill_diagonal(errors, np.inf)
    assert errors.min() > 1e-3
