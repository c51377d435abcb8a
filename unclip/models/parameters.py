"""A parameter that exists is taken without tracing what would initialise it.

Flax compares the shape of every parameter it is given with what the layer asks for, and traces the
layer's initialiser to learn that. In a U-Net this is a third of all tracing, so of most of what
a start costs once its programs are kept. Every layer of Flax and of ours says the shape, as the
first argument of the initialiser; it is compared here, and anything else is left to Flax.
"""

import functools
from typing import Any

import numpy as np
from flax import errors
from flax.core import meta, scope


def take_without_tracing() -> None:
    """Makes Flax do so in this process; a second call does nothing."""
    original = scope.Scope.param
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def param(self, name: str, init_fn, *init_args, unbox: bool = True, **init_kwargs) -> Any:
        shape = init_args[0] if init_args else None
        known = isinstance(shape, tuple) and all(isinstance(side, int) for side in shape)
        if not (known and unbox and self.has_variable("params", name)):
            return original(self, name, init_fn, *init_args, unbox=unbox, **init_kwargs)
        self.reserve(name, "params")
        value = meta.unbox(self.get_variable("params", name))
        if np.shape(value) != shape:
            raise errors.ScopeParamShapeError(name, self.path_text, np.shape(value), shape)
        return value

    scope.Scope.param = param
