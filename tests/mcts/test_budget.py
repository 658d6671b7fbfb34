"""Promises of the token budget: it is never exceeded and shrinks a wave in a fixed order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcts.budget import Grant, TokenBudget, Usage


def test_a_wave_that_fits_is_granted_whole() -> None:
    budget = TokenBudget(100)
    assert budget.grant(3, 4, 8) == Grant(3, 4, 8)
    assert budget.remaining == 4


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (96, Grant(3, 4, 8)),
        (95, Grant(2, 4, 8)),
        (63, Grant(1, 4, 8)),
        (31, Grant(1, 3, 8)),
        (8, Grant(1, 1, 8)),
        (7, Grant(1, 1, 7)),
        (1, Grant(1, 1, 1)),
    ],
)
def test_leaves_shrink_first_then_n_then_length(limit: int, expected: Grant) -> None:
    assert TokenBudget(limit).grant(3, 4, 8) == expected


def test_nothing_is_granted_when_all_is_reserved() -> None:
    budget = TokenBudget(8)
    budget.grant(1, 1, 8)
    assert budget.grant(1, 1, 1) == Grant(0, 0, 0)


def test_what_was_not_sampled_comes_back() -> None:
    budget = TokenBudget(8)
    budget.grant(1, 1, 8)
    budget.charge(8, 3)
    assert (budget.spent, budget.remaining) == (3, 5)


@pytest.mark.parametrize(("reserved", "sampled"), [(8, 9), (9, 1), (8, -1)])
def test_charging_more_than_was_granted_is_an_error(reserved: int, sampled: int) -> None:
    budget = TokenBudget(10)
    budget.grant(1, 1, 8)
    with pytest.raises(ValueError, match="charged"):
        budget.charge(reserved, sampled)


def test_bad_limits_and_waves_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TokenBudget(0)
    with pytest.raises(ValueError, match="at least one leaf"):
        TokenBudget(5).grant(1, 0, 5)


@settings(deadline=None)
@given(
    limit=st.integers(1, 500),
    waves=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.floats(0, 1)), max_size=30),
)
def test_spent_and_reserved_never_exceed_the_limit(limit: int, waves: list[tuple[int, int, int, float]]) -> None:
    budget = TokenBudget(limit)
    open_grants: list[int] = []
    for leaves, n, length, share in waves:
        free = budget.remaining
        grant = budget.grant(leaves, n, length)
        assert (grant.tokens > 0) == (free > 0)
        assert grant.leaves <= leaves
        assert grant.n <= n
        assert grant.max_tokens <= length
        assert 0 <= budget.spent + budget.reserved <= limit
        open_grants.append(grant.tokens)
        if share > 0.5:
            reserved = open_grants.pop(0)
            budget.charge(reserved, int(reserved * share))
    assert budget.reserved == sum(open_grants)


def test_usage_adds_field_by_field() -> None:
    usage = Usage(1, 2, 3, 4, 5, 6)
    usage.add(Usage(10, 20, 30, 40, 50, 60))
    assert usage == Usage(11, 22, 33, 44, 55, 66)
