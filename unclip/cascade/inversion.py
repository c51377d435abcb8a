"""From a picture back to the noise that the decoder would draw it from (section 3 of the paper)."""

import jax
import jax.numpy as jnp

from unclip.diffusion import gaussian, guidance, samplers
from unclip.tasks.decoder import THRESHOLDS, DecoderTask

ITERATIONS = 2  # network calls a step: see `samplers.ddim_invert`


def invert(task: DecoderTask, params, frozen, conditions, x_0: jax.Array, *, draw) -> jax.Array:
    """x_T float32 [B, S, S, 3] from which `task.sample` with DDIM and eta 0 leads back to x_0.

    Args:
      conditions, draw: as in `DecoderTask.sample`, eta and sampler apart.
      x_0: float32 [B, S, S, 3] in [-1, 1].
    """
    draw = {**task.draw, **draw}
    tokens, mask = conditions["tokens"], conditions["text_mask"]
    nowhere = jnp.zeros(tokens.shape[0], bool)
    no_image = conditions.get("drop_image", nowhere)
    no_text = conditions.get("drop_text", nowhere)
    conditional = task.text(frozen, tokens, mask, no_text)
    null = task.text(frozen, tokens, mask, ~nowhere)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), conditional, null)
    z_i = guidance.twice(task.scaled(conditions.get("z_i")))
    no_image, no_text = guidance.twice((no_image, no_text))

    def model_fn(x_t, t, drop):
        return task.model.apply(
            {"params": params},
            x_t,
            t,
            z_i=z_i,
            **both,
            drop_image=drop | no_image,
            drop_text=drop | no_text if task.own_null else None,
        )

    learned = task.variance == "learned_range"
    respaced = task.schedule.respace(draw["steps"], draw["spacing"])
    denoise = gaussian.make_denoise(
        guidance.with_guidance(model_fn, draw["guidance"], learned_variance=learned),
        respaced,
        parametrisation=task.parametrisation,
        variance=task.variance,
        clip=THRESHOLDS[draw["threshold"]](),
    )
    return samplers.ddim_invert(denoise, respaced, x_0, iterations=ITERATIONS)
