"""From a picture back to the noise that the decoder would draw it from (section 3 of the paper)."""

import jax
import jax.numpy as jnp

from unclip.diffusion import gaussian, guidance, samplers
from unclip.tasks.decoder import THRESHOLDS, DecoderTask


def invert(
    task: DecoderTask,
    params,
    frozen,
    conditions,
    x_0: jax.Array,
    sample_keys: jax.Array,
    *,
    draw,
    iterations: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """The x_T from which `task.sample` by "ddim" with eta 0 leads back to pictures.

    Args:
      conditions, draw: as in `DecoderTask.sample`, eta and sampler apart.
      x_0: float32 [B, S, S, 3] in [-1, 1].
      sample_keys: typed keys [B], those of the draw.
      iterations: see `samplers.ddim_invert`.

    Returns:
      (x_T float32 [B, S, S, 3], error float32 [B]: root mean square of what the draw gives minus
      x_0).
    """
    del sample_keys
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
    x_T = samplers.ddim_invert(denoise, respaced, x_0, iterations=iterations)
    back = samplers.sample(denoise, respaced, x_T, None, sampler="ddim", eta=0.0)
    error = (jnp.clip(back, -1.0, 1.0) - x_0) ** 2
    return x_T, jnp.sqrt(error.mean(axis=(1, 2, 3)))
