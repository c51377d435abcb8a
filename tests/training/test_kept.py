"""What is kept for the backward pass, by policy, and the policy that is proposed."""

import types

import pytest
from ml_collections import ConfigDict

from unclip.training import kept
from unclip.training.plan import make_plan

GIB = 2**30
# By kind: what all blocks of it keep beyond "nothing_saveable"; 5 are kept in any case.
KINDS = {"residual": 30, "attention": 6, "text": 25}


@pytest.fixture
def plan(monkeypatch):
    """A plan whose blocks keep `KINDS`; plan(remat) has that policy now, and may be folded."""

    def kept_bytes(plan, remat):
        named = dict(part.rpartition("=")[::2] for part in remat.split(",") if remat)
        gone = {kind for kind, policy in named.items() if policy == kept.POLICY}
        stacked = named.get("text") == kept.STACKED
        sizes = KINDS | ({"text": 15} if stacked else {})
        return GIB * (5 + sum(v for k, v in sizes.items() if not {k, ""} & gone))

    monkeypatch.setattr(kept, "kept_bytes", kept_bytes)
    return lambda remat, fold=False: types.SimpleNamespace(
        config=ConfigDict({"arch": {"remat": remat, "fold": fold}})
    )


@pytest.mark.parametrize(
    "spare, proposed",
    [
        (70, ""),
        (60, "attention=nothing_saveable"),
        (45, "text=nothing_saveable"),
        (36, "residual=nothing_saveable"),
        (35, "attention=nothing_saveable,text=nothing_saveable"),
        (11, "residual=nothing_saveable,text=nothing_saveable"),
        (8, "nothing_saveable"),
        (4, None),
    ],
)
def test_the_fewest_kinds_that_fit(plan, spare, proposed):
    assert kept.propose(plan(""), spare * GIB) == proposed


def test_what_is_in_use_corrects_the_trace(plan):
    """The trace says 5 now and 66 without remat; 3 are in use, so 64 would be."""
    now = plan(kept.POLICY)
    assert kept.propose(now, 64 * GIB, 3 * GIB) == ""
    assert kept.propose(now, 63 * GIB, 3 * GIB) == "attention=nothing_saveable"


def test_of_a_folded_transformer_products_are_kept_at_most(plan):
    folded = plan("", fold=True)
    assert kept.propose(folded, 56 * GIB) == "text=dots_saveable"
    assert kept.propose(folded, 50 * GIB) == "text=dots_saveable,attention=nothing_saveable"
    assert kept.propose(folded, 41 * GIB) == "text=nothing_saveable"
    assert kept.propose(folded, 8 * GIB) == "nothing_saveable"


@pytest.mark.slow
def test_less_is_kept_where_more_is_recomputed(tiny_config):
    plan = make_plan(tiny_config("decoder"), shapes_only=True)
    plan.check()
    everything, residual, nothing = (
        kept.kept_bytes(plan, remat) for remat in ("", "residual=full", "full")
    )
    assert nothing < residual < everything
    plan.config.batch_size *= 2
    assert kept.kept_bytes(plan, "") > 1.5 * everything
    plan.config.accumulate = 2
    assert kept.kept_bytes(plan, "") == everything
    assert not plan.task.arch["remat"], "the plan is left as it was"
