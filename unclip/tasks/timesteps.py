"""Loss-aware timesteps: those whose loss is large are trained on more often.

Importance sampling of Improved DDPM (arXiv 2102.09672, section 3.3): p_t proportional to the root
of the mean square of the last losses at t, every loss weighed by 1 / (T p_t), so that its mean is
that of uniform timesteps, only less noisy. Until every timestep was seen ten times p is uniform.

The paper keeps the last ten losses of each t. Here an average that forgets by a tenth a visit
stands for them: rows of one batch have no order among them, whatever the number of devices.
"""

import jax
import jax.numpy as jnp

VISITS = 10
UNIFORM = 1e-3  # of p: so much of it stays uniform, and no timestep is forgotten

Memory = dict[str, jax.Array]


def remember_nothing(steps: int) -> Memory:
    """{"mean_square", "visits": float32 [steps]} before the first loss."""
    return {name: jnp.zeros(steps, jnp.float32) for name in ("mean_square", "visits")}


def probabilities(memory: Memory) -> jax.Array:
    """p float32 [steps], adding up to 1."""
    steps = len(memory["visits"])
    root = jnp.sqrt(memory["mean_square"])
    aware = root / jnp.maximum(root.sum(), 1e-30)
    aware = (1 - UNIFORM) * aware + UNIFORM / steps
    known = (memory["visits"] >= VISITS).all() & (root.sum() > 0)
    return jnp.where(known, aware, 1 / steps)


def draw(p: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Timesteps by p from uniform numbers [B] in [0, 1): (t int32 [B], 1 / (T p_t) [B])."""
    edges = jnp.cumsum(p)
    t = jnp.searchsorted(edges, uniform * edges[-1], side="right")
    t = jnp.minimum(t, len(p) - 1).astype(jnp.int32)
    return t, 1 / (len(p) * p[t])


def seen(steps: int, t: jax.Array, loss: jax.Array, valid: jax.Array) -> Memory:
    """What a batch tells of every t: sums over its valid rows, float32 [steps], and its rows.

    Args:
      t: int32 [B]; loss: [B], unweighted; valid: bool [B].
    """
    zeros = jnp.zeros(steps, jnp.float32)
    square = jnp.where(valid, jax.lax.stop_gradient(loss).astype(jnp.float32) ** 2, 0.0)
    sums = {"square": zeros.at[t].add(square), "count": zeros.at[t].add(valid)}
    return sums | {"rows": jnp.float32(len(t))}


def remember(memory: Memory, told: Memory, rows: int) -> Memory:
    """The memory after a batch of `rows`; told: what `seen` gave, a mean over parts of it."""
    visits, count = memory["visits"], told["count"] * (rows / told["rows"])
    mean = told["square"] * (rows / told["rows"]) / jnp.maximum(count, 1)
    # A plain mean of the first ten, then one that forgets.
    share = jnp.where(
        visits + count <= VISITS,
        count / jnp.maximum(visits + count, 1),
        1 - (1 - 1 / VISITS) ** count,
    )
    mean_square = memory["mean_square"] + share * (mean - memory["mean_square"])
    return {"mean_square": mean_square, "visits": jnp.minimum(visits + count, VISITS)}
