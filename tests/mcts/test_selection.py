"""Each rule of selection on hand-made nodes, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcts.rng import generator, hash64, uniform
from mcts.selection import (
    add_noise,
    argmax,
    considered_visits,
    dirichlet,
    draw,
    exploration,
    first_play_value,
    gumbel_top,
    improved_policy,
    mixed_value,
    puct_scores,
    sigma,
    uct_scores,
    visit_policy,
)


def puct(prior: list[float], visits: list[int], sums: list[float], flying: list[int] | None = None, **kw: float):
    kw.setdefault("parent_q", 0.5)
    return puct_scores(range(len(prior)), prior, visits, sums, flying or [0] * len(prior), **kw)  # type: ignore[arg-type]


def test_exploration_is_alphazeros_formula() -> None:
    assert exploration(0) == pytest.approx(1.25 + math.log(19653 / 19652))
    assert exploration(19651) == pytest.approx(1.25 + math.log(2.0))


def test_puct_is_q_plus_prior_times_root_of_visits() -> None:
    c = exploration(4)
    scores = puct([0.6, 0.4], [3, 1], [1.5, 0.9])
    assert scores == pytest.approx([0.5 + c * 0.6 * 2 / 4, 0.9 + c * 0.4 * 2 / 2])


def test_puct_with_no_visit_at_all_follows_the_priors() -> None:
    assert argmax(puct([0.2, 0.5, 0.3], [0, 0, 0], [0.0, 0.0, 0.0])) == 1


def test_unvisited_arm_gets_parents_mean_less_root_of_visited_mass() -> None:
    scores = puct([0.64, 0.36], [1, 0], [1.0, 0.0], parent_q=0.7, fpu_reduction=0.5, c_init=0.0, c_base=1e18)
    assert scores == pytest.approx([1.0, 0.7 - 0.5 * 0.8])


def test_first_play_value_never_falls_below_a_loss() -> None:
    assert first_play_value(0.1, 1.0, 0.5) == 0.0


def test_virtual_loss_counts_as_a_visit_that_brought_nothing() -> None:
    flying = puct([0.5, 0.5], [2, 2], [2.0, 1.0], [2, 0])
    lost = puct([0.5, 0.5], [4, 2], [2.0, 1.0])
    assert flying == pytest.approx(lost)


def test_virtual_loss_moves_the_next_simulation_elsewhere() -> None:
    assert argmax(puct([0.5, 0.5], [1, 1], [0.6, 0.5])) == 0
    assert argmax(puct([0.5, 0.5], [1, 1], [0.6, 0.5], [1, 0])) == 1


def test_unseen_arm_is_scored_by_its_prior_and_first_play_value() -> None:
    scores = puct([0.3], [4], [2.0], parent_q=0.5, fpu_reduction=0.2, unseen=0.7, unseen_tries=1)
    c = exploration(4)
    assert scores[1] == pytest.approx(0.5 - 0.2 * math.sqrt(0.3) + c * 0.7 * 2 / 2)


def test_closed_unseen_arm_has_no_score() -> None:
    assert len(puct([0.3], [4], [2.0], unseen=0.0)) == 1


def test_uct_tries_every_arm_first() -> None:
    assert uct_scores([1, 0], [1.0, 0.0], [0, 0])[1] == math.inf


def test_uct_formula() -> None:
    assert uct_scores([3, 1], [1.5, 0.9], [0, 0], c=2.0) == pytest.approx(
        [0.5 + 2 * math.sqrt(math.log(4) / 3), 0.9 + 2 * math.sqrt(math.log(4))]
    )


def test_argmax_takes_the_first_of_equals() -> None:
    assert argmax([1.0, 2.0, 2.0]) == 1


@settings(deadline=None)
@given(arms=st.integers(1, 30), seed=st.integers(0, 2**32), alpha=st.sampled_from([None, 0.03, 0.3, 1e-4]))
def test_dirichlet_noise_sums_to_one(arms: int, seed: int, alpha: float | None) -> None:
    noise = dirichlet(generator(seed), arms, alpha)
    assert len(noise) == arms
    assert sum(noise) == pytest.approx(1.0)
    noisy = add_noise([1.0 / arms] * arms, noise, 0.25)
    assert sum(noisy) == pytest.approx(1.0)
    assert min(noisy) >= 0.75 / arms - 1e-12


def test_gumbel_top_draws_without_replacement_by_the_policy() -> None:
    p = [0.5, 0.3, 0.2]
    rng = generator(1)
    firsts = [0, 0, 0]
    for _ in range(3000):
        top, noise = gumbel_top(rng, [math.log(x) for x in p], 2)
        assert len(set(top)) == 2
        assert noise[top[0]] + math.log(p[top[0]]) >= noise[top[1]] + math.log(p[top[1]])
        firsts[top[0]] += 1
    # standard error .009; 5 of them
    assert [f / 3000 for f in firsts] == pytest.approx(p, abs=0.046)


@pytest.mark.parametrize(
    ("m", "n", "expected"),
    [
        (4, 16, "0000111122334455"),
        (16, 16, "0000000000000000"),
        (1, 5, "01234"),
        (2, 6, "001122"),
        (4, 3, "000"),
        (3, 8, "00011223"),
        (8, 24, "000000001111222233445566"),
    ],
)
def test_sequential_halving_schedule(m: int, n: int, expected: str) -> None:
    assert "".join(map(str, considered_visits(m, n))) == expected


@settings(deadline=None)
@given(m=st.integers(1, 32), n=st.integers(0, 200))
def test_sequential_halving_gives_all_simulations_and_never_skips_a_level(m: int, n: int) -> None:
    sequence = considered_visits(m, n)
    assert len(sequence) == n
    given_visits = [0] * m
    for level in sequence:
        arm = given_visits.index(level)  # an arm with exactly that many visits always exists
        given_visits[arm] += 1


def test_v_mix_by_hand() -> None:
    # (v + sumN * (sum p q / sum p over visited)) / (1 + sumN) = (.5 + 4 * ((.6*.2 + .3*.8) / .9)) / 5
    assert mixed_value(0.5, [0.6, 0.3, 0.1], [3, 1, 0], [0.2, 0.8, math.nan]) == pytest.approx(0.42)


def test_v_mix_without_a_visit_is_the_nodes_own_value() -> None:
    assert mixed_value(0.3, [0.5, 0.5], [0, 0], [math.nan, math.nan]) == 0.3


def test_sigma_scales_with_the_most_visits() -> None:
    assert sigma(0.5, 10) == pytest.approx(3.0)


def test_improved_policy_by_hand() -> None:
    # logits log .5, log .5; sigma = 60 * .1 * q = 6 q
    target = improved_policy([0.5, 0.5], [0.5, 0.25], 10)
    assert target[0] / target[1] == pytest.approx(math.exp(1.5))


def test_equal_values_leave_the_policy_as_it_is() -> None:
    assert improved_policy([0.2, 0.3], [0.7, 0.7], 5) == pytest.approx([0.4, 0.6])


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12), visits=st.integers(0, 500))
def test_improved_policy_is_a_distribution(rows: list[tuple[float, float]], visits: int) -> None:
    target = improved_policy([p for p, _ in rows], [q for _, q in rows], visits)
    assert sum(target) == pytest.approx(1.0)
    assert min(target) >= 0.0


def test_improved_policy_improves_on_every_bandit_with_exact_values() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        p, q = rng.dirichlet([1.0] * 4), rng.random(4)
        target = improved_policy(p.tolist(), q.tolist(), int(rng.integers(0, 50)))
        assert np.dot(target, q) >= np.dot(p, q) - 1e-12


def test_visit_policy_temperatures() -> None:
    assert visit_policy([3, 1]) == pytest.approx([0.75, 0.25])
    assert visit_policy([3, 1], 0.5) == pytest.approx([0.9, 0.1])
    assert visit_policy([1, 3, 3], 0.0) == [0.0, 1.0, 0.0]
    assert visit_policy([0, 0]) == [0.5, 0.5]


def test_draw_never_takes_what_has_probability_zero() -> None:
    rng = generator(3)
    assert {draw(rng, [0.0, 1.0, 0.0]) for _ in range(200)} == {1}


def test_random_numbers_are_functions_of_their_key() -> None:
    assert hash64(1, 2) == hash64(1, 2) != hash64(2, 1)
    assert generator(5).random() == generator(5).random() != generator(6).random()
    mean = sum(uniform(7, i) for i in range(4000)) / 4000
    assert mean == pytest.approx(0.5, abs=0.023)  # five standard errors
