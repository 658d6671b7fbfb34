"""What every strategy promises, over random scripted trees; and the registry."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcts.search import Search, Strategy
from mcts.strategies import REGISTRY, build
from mcts.tree import ROOT
from mcts.types import Ended
from mcts.value import ConstantValue, HeadValue, RolloutValue, ValueSource
from tests.mcts.toy import ToyTask, World, problem, run_one

STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("mcts", {"simulations": 12}),
    ("mcts", {"commit": "never", "simulations": 0, "leaves": 4}),
    ("gumbel", {"simulations": 8, "m": 4, "leaves": 2}),
    ("gumbel", {"commit": "never", "simulations": 4, "m": 3, "leaves": 2}),
    ("best_of_n", {"n": 6}),
    ("best_of_n", {"n": 0, "until_win": True, "batch": 2}),
    ("beam", {"n": 6, "m": 3}),
    ("index", {"leaves": 3, "expand": 2}),
    ("redraw", {"batch": 2}),
    ("greedy", {}),
]


@settings(max_examples=150, deadline=None)
@given(
    chosen=st.sampled_from(STRATEGIES),
    world=st.builds(
        World, st.integers(0, 10**6), st.sampled_from([0.0, 0.2]), st.sampled_from([0.1, 0.4]), st.integers(1, 5)
    ),
    budget=st.integers(1, 300),
    seed=st.integers(0, 2**64 - 1),
    learning=st.booleans(),
    checkable=st.booleans(),
    rule=st.sampled_from(["exact", "draws"]),
    value=st.sampled_from([HeadValue(), ConstantValue(), RolloutValue()]),
    longest=st.integers(2, 8),
)
def test_books_balance_and_budgets_hold(
    chosen: tuple[str, dict[str, Any]], world: World, budget: int, seed: int, learning: bool, checkable: bool,
    rule: str, value: ValueSource, longest: int,
) -> None:  # fmt: skip
    engine, task = world.engine(), ToyTask(checkable=checkable, max_step_tokens=longest)
    strategy = build(chosen[0], **chosen[1])
    result = run_one(
        engine, task,
        Search(problem(), strategy, budget, seed, learning=learning, prior_rule=rule, value=value),
    )  # fmt: skip
    tree, usage = result.tree, result.usage
    tree.check()
    assert usage.sampled == engine.sampled <= budget
    assert tree.tokens + usage.discarded == usage.sampled
    if isinstance(value, RolloutValue) and not checkable and not learning:
        assert result.ended is not Ended.FAILED or "rollout" in str(result.error)
    else:
        assert result.error is None
    if not learning:
        assert task.verified <= 1
    for node in range(1, len(tree)):
        parent = tree.parent[node]
        assert tree.kind[node] == "rollout" or 0.0 < tree.prior[node] <= 1.0
        assert sum(p for c in tree.children[parent] if (p := tree.prior[c]) == p) <= 1.0 + 1e-5
    if result.chosen is not None:
        assert tree.terminal[result.chosen]
        assert result.chosen in result.candidates
        assert result.answer is not None
    if result.ended is Ended.SOLVED:
        assert result.verdict is not None
        assert result.verdict.won
    if result.ended is Ended.BUDGET:
        assert usage.sampled == budget
    assert tree.played == [] or tree.played[0] == ROOT


@pytest.mark.parametrize(("name", "options"), STRATEGIES)
def test_every_strategy_answers_when_the_budget_ends_within_its_rollouts(name: str, options: dict[str, Any]) -> None:
    strategy, world = build(name, **options), World(3, wins=0.1, finish=0.1)
    for budget in range(1, 60, 2):
        search = Search(problem(), strategy, budget, 1, value=RolloutValue(n=2, temperature=1.0))
        result = run_one(world.engine(), ToyTask(), search)
        assert result.error is None
        result.tree.check()


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_registered_strategy_is_built_by_its_name(name: str) -> None:
    assert build(name).name == name


def test_a_strategy_of_ones_own_plugs_in_by_its_dotted_path() -> None:
    for path in ("mcts.strategies.beam.Beam", "mcts.strategies.beam:Beam"):
        made: Any = build(path, n=8)
        assert (made.name, made.n) == ("beam", 8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mtcs", {}, "unknown strategy 'mtcs': did you mean 'mcts'"),
        ("zzz", {}, "choose one of beam, best_of_n"),
        ("mcts", {"simulation": 3}, "no setting 'simulation': did you mean 'simulations'"),
        ("no.such.module.Thing", {}, "cannot be imported"),
        ("mcts.strategies.beam.Bean", {}, "cannot be imported"),
        ("mcts.strategies.nearest", {}, "not a class"),
        ("mcts", {"simulations": -1}, "simulations"),
    ],
)
def test_what_is_misspelt_is_named_with_the_nearest_known(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


def test_settings_are_part_of_the_result() -> None:
    strategy: Strategy = build("gumbel", m=3)
    result = run_one(World().engine(), ToyTask(), Search(problem(), strategy, 50, 1))
    assert result.settings["strategy"]["m"] == 3
