"""Figures that are reported are right on cases worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.stats import auc, paired_bootstrap_ratio, pass_at_k, wilson


def test_wilson_equals_published_values() -> None:
    low, high = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
def test_pass_at_k_equals_the_share_of_subsets_with_a_win(correct: int, samples: int, k: int) -> None:
    correct = min(correct, samples)
    if k > samples:
        assert math.isnan(pass_at_k(samples, correct, k))
        return
    expected = 1 - math.comb(samples - correct, k) / math.comb(samples, k)
    assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_auc_equals_the_share_of_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    positive = [s for s, label in rows if label]
    negative = [s for s, label in rows if not label]
    got = auc([s for s, _ in rows], [label for _, label in rows])
    if not positive or not negative:
        assert math.isnan(got)
        return
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert got == pytest.approx(sum(pairs) / len(pairs))


def test_a_bootstrapped_ratio_of_equal_sides_is_one_and_a_double_cost_is_two() -> None:
    rng = np.random.default_rng(0)
    rows = [(float(t), float(w)) for t, w in zip(rng.integers(10, 90, 60), rng.random(60) < 0.7, strict=True)]
    assert paired_bootstrap_ratio(rows, rows, seed=1) == (1.0, 1.0, 1.0)
    figure, low, high = paired_bootstrap_ratio([(2 * t, w) for t, w in rows], rows, seed=1)
    assert (figure, low, high) == pytest.approx((2.0, 2.0, 2.0))
