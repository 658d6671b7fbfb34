"""Problems are drawn by weight, the same way each time."""

import json

import numpy as np

from selfplay.problems import SolveRates, draw_problems


def test_a_problem_won_sometimes_outweighs_the_always_and_the_never_solved() -> None:
    rates = SolveRates.empty(4)
    rates.update(np.array([0, 1, 2]), np.array([32.0, 8.0, 0.0]), np.array([32.0, 32.0, 64.0]))
    always, sometimes, never, unseen = rates.weights(0.01)
    assert sometimes > 4 * always
    assert sometimes > 4 * never
    assert unseen > always


def test_no_weight_falls_below_the_floor() -> None:
    rates = SolveRates.empty(1)
    rates.update(np.array([0]), np.array([1000.0]), np.array([1000.0]))
    assert rates.weights(0.2)[0] == 0.2


def test_state_survives_json() -> None:
    rates = SolveRates.empty(5)
    rates.update(np.array([1, 4]), np.array([1.0, 2.0]), np.array([3.0, 2.0]))
    back = SolveRates.from_state(json.loads(json.dumps(rates.to_state())))
    assert np.array_equal(back.wins, rates.wins)
    assert np.array_equal(back.chains, rates.chains)


def test_the_past_of_a_replayed_problem_is_halved() -> None:
    rates = SolveRates.empty(1)
    for _ in range(2):
        rates.update(np.array([0]), np.array([4.0]), np.array([8.0]))
    assert (rates.wins[0], rates.chains[0]) == (6.0, 12.0)


def test_drawing_is_a_function_of_seed_and_iteration_and_repeats_nothing() -> None:
    weights = np.ones(100)
    first = draw_problems(weights, 30, seed=1, iteration=2)
    assert np.array_equal(first, draw_problems(weights, 30, seed=1, iteration=2))
    assert not np.array_equal(first, draw_problems(weights, 30, seed=1, iteration=3))
    assert len(set(first.tolist())) == 30
    assert np.array_equal(draw_problems(weights, 1000, seed=1, iteration=2), np.arange(100))


def test_chance_follows_weight() -> None:
    weights = np.array([1.0] * 50 + [9.0] * 50)
    heavy = sum((draw_problems(weights, 10, seed=s, iteration=0) >= 50).mean() for s in range(200)) / 200
    assert 0.85 < heavy < 0.93  # a little under .9: drawn without putting back
