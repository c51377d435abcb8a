"""A parameter that exists is not initialised again, and one of another shape is still refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

import unclip.models  # noqa: F401

calls = []


def counted(key, shape, dtype=jnp.float32):
    calls.append(shape)
    return jax.random.normal(key, shape, dtype)


def test_parameters_are_taken_as_they_are():
    model = nn.Dense(3, kernel_init=counted, bias_init=counted)
    x = np.ones((2, 4), np.float32)
    variables = model.init(jax.random.key(0), x)
    assert calls == [(4, 3), (3,)]
    y = model.apply(variables, x)
    assert len(calls) == 2  # Flax alone would call both again
    kernel, bias = (np.asarray(variables["params"][name]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(y, x @ kernel + bias, rtol=1e-5)
    with pytest.raises(ScopeParamShapeError, match=r"kernel.*\(5, 3\).*\(4, 3\)"):
        model.apply(variables, np.ones((2, 5), np.float32))
    with pytest.raises(ScopeParamNotFoundError, match="bias"):
        model.apply({"params": {"kernel": kernel}}, x)


def test_an_initialiser_without_a_shape_is_left_to_flax():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param("odd", lambda key: jnp.zeros(2))

    assert Odd().apply({"params": {"odd": jnp.ones(2)}}).tolist() == [1, 1]
    with pytest.raises(ScopeParamShapeError):
        Odd().apply({"params": {"odd": jnp.ones(3)}})
