"""What a step keeps for its backward pass, and the remat policy that a chip's memory allows."""

import dataclasses
import itertools
import math

import jax

from unclip.models.transformer import REMAT_KINDS
from unclip.training.plan import Plan

POLICY = "nothing_saveable"
STACKED = "dots_saveable"  # of a folded transformer: docs/compile.md


def kept_bytes(plan: Plan, remat: str) -> int:
    """Bytes a device keeps between forward and backward pass of a microbatch, by JAX's trace.

    XLA keeps less where it computes something twice rather than store it. Parameters and inputs
    that the backward pass reads are in it, so compare two policies.

    Args:
      plan: one without problems.
      remat: as `config.arch.remat`.
    """
    task = dataclasses.replace(plan.task, arch={**plan.task.arch, "remat": remat or None})
    key = jax.random.key(0)
    rows = max(plan.config.batch_size // plan.config.accumulate, plan.ways)

    def backward(params, frozen, batch):
        loss = lambda p: task.loss(p, frozen, batch, key, train=True)
        return jax.vjp(loss, params, has_aux=True)[1]

    batch = plan.batch_shapes(rows)
    leaves = jax.tree.leaves(jax.eval_shape(backward, plan.params, plan.frozen_shapes, batch))
    size = lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize
    return sum(size(leaf) for leaf in leaves if hasattr(leaf.dtype, "itemsize")) // plan.ways


def propose(plan: Plan, spare: int, used: int = 0) -> str | None:
    """The `config.arch.remat` that recomputes the fewest kinds of blocks in the memory there is.

    Args:
      spare: bytes a device has for what is kept; used: of them, what is in use now.

    Returns:
      "" for nothing recomputed, a policy by kind (of a folded transformer at most what products
      give is kept), or one for all; None where that does not fit.
    """
    # What a fold keeps is stacked by layers, which costs more than to compute the cheap part again.
    cheap = {"text": STACKED} if plan.config.arch.fold else {}
    policy = lambda kinds: ",".join(
        f"{kind}={name}" for kind, name in (cheap | dict.fromkeys(kinds, POLICY)).items()
    )
    everything = kept_bytes(plan, policy(()))
    now = kept_bytes(plan, plan.config.arch.remat) if used else 0
    # What is in use is known, and the trace says how much more or less it would be.
    need = lambda kept: used + kept - now
    if need(everything) <= spare:
        return policy(())
    saved = {kind: everything - kept_bytes(plan, policy((kind,))) for kind in REMAT_KINDS}
    kinds = [kind for kind in REMAT_KINDS if saved[kind] > 0]
    for count in range(1, len(kinds)):
        sets = sorted(itertools.combinations(kinds, count), key=lambda s: sum(map(saved.get, s)))
        for chosen in sets:
            if need(everything - sum(map(saved.get, chosen))) <= spare:
                return policy(chosen)
    return POLICY if need(kept_bytes(plan, POLICY)) <= spare else None
