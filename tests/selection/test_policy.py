"""Tests of PruningPolicy.of: the short spelling by arguments, a whole policy, and their combination."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_prune import FilterPruningCallback, Limits, NetAdaptCallback, PruningPolicy, SlimmingCallback


@pytest.mark.parametrize("callback", [FilterPruningCallback, NetAdaptCallback])
def test_an_empty_budget_is_refused_instead_of_a_training_without_cuts(callback: Any) -> None:
    with pytest.raises(ValueError, match="the budget is empty"):
        callback({})


def test_the_short_spelling_equals_the_policy_with_the_same_arguments() -> None:
    arguments: dict[str, Any] = {"limits": Limits(0.9), "exclude": ["head"], "channel_multiple": 8}
    assert PruningPolicy.of({"macs": 0.5}, **arguments) == PruningPolicy({"macs": 0.5}, **arguments)


def test_arguments_at_their_defaults_leave_the_defaults_of_the_policy() -> None:
    short = PruningPolicy.of({"macs": 0.5}, limits=None, exclude=(), channel_multiple=1, resources=None)
    assert short == PruningPolicy({"macs": 0.5})


def test_the_budget_is_copied() -> None:
    budget = {"macs": 0.5}
    policy = PruningPolicy.of(budget)
    budget["macs"] = 0.1
    assert policy.budget == {"macs": 0.5}


def test_a_whole_policy_is_returned_unchanged() -> None:
    policy = PruningPolicy({"macs": 0.5}, {"macs": 0.2}, Limits(0.6), ["head"], 4)
    assert PruningPolicy.of(policy) is policy
    assert PruningPolicy.of(policy, exclude=(), channel_multiple=1, limits=None, resources={}) is policy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limits": Limits()}, "^limits: set this in the PruningPolicy, not beside it"),
        ({"exclude": ["head"]}, "^exclude: set this in the PruningPolicy"),
        ({"channel_multiple": 8}, "^channel_multiple: set this"),
        ({"resources": {"energy": lambda graph: []}}, "^resources: set this"),
        ({"exclude": ["head"], "channel_multiple": 8}, "^channel_multiple, exclude: set this"),
    ],
)
@pytest.mark.parametrize("use", [PruningPolicy.of, FilterPruningCallback, SlimmingCallback, NetAdaptCallback])
def test_arguments_beside_a_whole_policy_are_refused(
    use: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        use(PruningPolicy({"macs": 0.5}), **arguments)


def test_default_limits_hold_where_no_limits_are_chosen() -> None:
    default = Limits(1.0)
    assert PruningPolicy.of({"macs": 0.5}, default).limits == default
    assert PruningPolicy.of({"macs": 0.5}, default, limits=None).limits == default
    assert PruningPolicy.of({"macs": 0.5}, default, limits=Limits(0.6)).limits == Limits(0.6)
    assert PruningPolicy.of({"macs": 0.5}).limits == Limits()
    assert PruningPolicy.of(PruningPolicy({"macs": 0.5}), default).limits == Limits()


def test_the_callback_with_a_whole_policy_has_the_policy_of_the_short_spelling() -> None:
    whole = FilterPruningCallback(PruningPolicy({"macs": 0.5}))
    assert whole.policy == FilterPruningCallback({"macs": 0.5}).policy
    assert whole.policy.amount == {"macs": 0.1}
    options: dict[str, Any] = {"limits": Limits(0.9), "exclude": ["head"]}
    detailed = FilterPruningCallback(PruningPolicy({"macs": 0.5}, {"macs": 0.2}, **options))
    assert detailed.policy == FilterPruningCallback({"macs": 0.5}, amount={"macs": 0.2}, **options).policy


def test_an_amount_beside_the_amount_of_a_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="amount: set this in the PruningPolicy, not beside it"):
        FilterPruningCallback(PruningPolicy({"macs": 0.5}, {"macs": 0.2}), amount={"macs": 0.1})
