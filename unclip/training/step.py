"""One update as a pure function: gradient, optimiser, moving average, skipped where not finite."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from unclip import tasks
from unclip.runtime import optim


def make_optimizer(config: ConfigDict, params) -> tuple[optax.GradientTransformation, Callable]:
    """(optax transformation, learning-rate function of the step) of a config.

    Args:
      params: the trained parameters, or their shapes.

    Raises:
      ConfigError: settings out of range, or patterns that match no parameter.
    """
    return optim.make_optimizer(params, total_steps=config.total_steps, **_settings(config))


def check_optimizer(config: ConfigDict) -> None:
    """What `make_optimizer` raises where no parameters are needed to see it."""
    settings = _settings(config)
    for pattern in ("freeze", "no_decay"):
        settings.pop(pattern, None)
    optim.check(total_steps=config.total_steps, **settings)


def _settings(config: ConfigDict) -> dict:
    settings = config.optim.to_dict()
    for name in ("sam_rho", "sam_rows"):
        settings.pop(name, None)
    return settings | {"clip_norm": settings["clip_norm"] or None}


def make_init(task: tasks.Task, tx: optax.GradientTransformation) -> Callable:
    """init(key, start=None) -> {"params", "ema", "opt", "step"}, to be jitted with out_shardings.

    A task that learns about its own training has a "memory" too.
    `start` holds parameters to begin with instead of random ones, same structure; an argument,
    since arrays that a function closes over become constants of its program.
    """

    def init(key, start=None):
        params = task.init(key) if start is None else start
        state = {"params": params, "ema": optim.ema_init(params), "opt": tx.init(params)}
        memory = task.memory()
        state |= {} if memory is None else {"memory": memory}
        return state | {"step": jnp.int32(0)}

    return init


def make_step(
    task: tasks.Task, tx: optax.GradientTransformation, learning_rate: Callable, config: ConfigDict
) -> Callable:
    """step(state, frozen, batch) -> (state, metrics): one update, pure, to be jitted.

    A step whose loss or gradient is not finite leaves parameters, moments and average as they
    were and reports `skipped` = 1.
    """
    rho, accumulate, seed, decay = (
        config.optim.sam_rho, config.accumulate, config.seed, config.ema,
    )  # fmt: skip
    sam = (rho, config.optim.get("sam_rows", 0))

    def step(state, frozen, batch):
        memory = state.get("memory")
        if memory is not None:
            frozen = {**(frozen or {}), "memory": memory}
        given = (state["params"], frozen, batch, jax.random.key(seed), accumulate)
        with jax.named_scope("gradient"):
            if rho:
                (loss, measured), grads = task.sharpness_aware(*given, *sam)
            else:
                (loss, measured), grads = task.value_and_grad(*given)
        memory, measured = task.remember(memory, measured, len(batch["valid"]))
        ok, norm = optim.all_finite(loss, grads)
        with jax.named_scope("optimiser"):
            updates, opt = tx.update(grads, state["opt"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        with jax.named_scope("moving_average"):
            ema = optim.ema_update(state["ema"], params, state["step"], decay)
        new = {"params": params, "ema": ema, "opt": opt}
        new |= {} if memory is None else {"memory": memory}
        new, skipped = optim.skip_nonfinite({name: state[name] for name in new}, new, ok)
        rate = learning_rate(optim.applied_steps(state["opt"]))
        measured = measured | {"grad_norm": norm, "learning_rate": rate, "skipped": skipped}
        return new | {"step": state["step"] + 1}, measured

    return step
