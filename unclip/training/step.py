"""One update as a pure function: gradient, optimiser, moving average, skipped where not finite."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from unclip import tasks
from unclip.runtime import optim


def make_optimizer(config: ConfigDict, abstract_params):
    """(optax transformation, learning-rate function of the step) of a config."""
    settings = config.optim.to_dict()
    settings.pop("sam_rho")
    settings["clip_norm"] = settings["clip_norm"] or None
    return optim.make_optimizer(abstract_params, total_steps=config.total_steps, **settings)


def make_init(task: tasks.Task, tx: optax.GradientTransformation):
    """init(key, start=None) -> {"params", "ema", "opt", "step"}, to be jitted with out_shardings.

    `start` holds parameters to begin with instead of random ones, same structure; an argument,
    since arrays that a function closes over become constants of its program.
    """

    def init(key, start=None):
        params = task.init(key) if start is None else start
        state = {"params": params, "ema": optim.ema_init(params), "opt": tx.init(params)}
        return state | {"step": jnp.int32(0)}

    return init


def make_step(task: tasks.Task, tx: optax.GradientTransformation, schedule, config: ConfigDict):
    """step(state, frozen, batch) -> (state, metrics): one update, pure, to be jitted.

    A step whose loss or gradient is not finite leaves parameters, moments and average as they
    were and reports `skipped` = 1.
    """
    rho = config.optim.sam_rho
    # A loss that compares the rows of a batch (CLIP's) brings its own way to accumulate.
    exact = config.accumulate > 1 and hasattr(task, "accumulated_value_and_grad")

    def step(state, frozen, batch):
        key = jax.random.key(config.seed)

        def value_and_grad(params, rows):
            loss = lambda p: task.loss(p, frozen, rows, key, train=True)
            gradient = jax.value_and_grad(loss, has_aux=True)
            if exact:
                gradient = lambda p: task.accumulated_value_and_grad(
                    p, frozen, rows, key, config.accumulate
                )
            return optim.sam_gradient(gradient, params, rho) if rho else gradient(params)

        (loss, measured), grads = optim.accumulate(
            value_and_grad, 1 if exact else config.accumulate
        )(state["params"], batch)
        ok, norm = optim.all_finite(loss, grads)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optim.ema_update(state["ema"], params, state["step"], config.ema)
        new = {"params": params, "ema": ema, "opt": opt}
        new, skipped = optim.skip_nonfinite({name: state[name] for name in new}, new, ok)
        rate = schedule(state["step"])
        measured = measured | {"grad_norm": norm, "learning_rate": rate, "skipped": skipped}
        return new | {"step": state["step"] + 1}, measured

    return step
