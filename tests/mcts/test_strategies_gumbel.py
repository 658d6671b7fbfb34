"""Gumbel search over drawn candidates: it improves on the policy, and its schedule is the paper's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mcts.engines.scripted import ScriptedEngine
from mcts.rng import hash64
from mcts.search import Driver, Search
from mcts.strategies.gumbel import Gumbel, Halving
from mcts.strategies.tree_search import TreeSearch, Widening
from mcts.tree import ROOT
from mcts.types import Ended
from tests.mcts.test_context import context, step
from tests.mcts.toy import ToyTask, World, problem, run_one


def search(strategy: Gumbel, **options: object) -> Search:
    fields: dict[str, object] = {"budget": 4000, "seed": 1, "learning": True, **options}
    return Search(problem(), strategy, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("simulations", [2, 4, 16])
def test_the_played_move_improves_on_the_policy_when_values_are_exact(simulations: int) -> None:
    rng = np.random.default_rng(simulations)
    repeats = 80
    for bandit in range(6):
        p, q = rng.dirichlet([1.0] * 4), rng.random(4)
        script = {f"arm{i} ;": float(x) for i, x in enumerate(p / p.sum())}
        script = {text: x / math.fsum(script.values()) for text, x in script.items()}
        values = {(text,): float(x) for text, x in zip(script, q, strict=True)}
        engine = ScriptedEngine(
            lambda _, steps, script=script: script if not steps else {"stay no": 1.0},  # type: ignore[misc]
            lambda _, steps, values=values: values.get(steps[:1], 0.5),  # type: ignore[misc]
        )
        strategy = Gumbel(simulations=simulations, m=4, leaves=2)
        task = ToyTask(max_steps=3, checkable=False)
        searches = [search(strategy, seed=hash64(bandit, i), learning=False) for i in range(repeats)]
        gained = []
        for result in Driver(engine, task).run(searches):
            tree = result.tree
            gained.append(values[(tree.steps[tree.played[1]].text,)])  # type: ignore[union-attr]
        error = np.std(gained) / math.sqrt(repeats)
        assert np.mean(gained) >= np.dot(p, q) - 4 * error


def halving(values: list[float], simulations: int) -> tuple[Halving, TreeSearch]:
    ctx = context(learning=True)
    state = TreeSearch(ctx, Widening(), lambda *_: 0, leaves=1, skip_done=False)
    arms = [ctx.add(ROOT, step(f"a{i} ;", 0.1, (10 + i, 1)))[0] for i in range(len(values))]
    for arm, value in zip(arms, values, strict=True):
        ctx.tree.backup(arm, value)
    return Halving(ctx, state, arms, simulations), state


def test_sequential_halving_drops_the_candidates_of_lower_value() -> None:
    course, _ = halving([0.1, 0.9, 0.5, 0.7], 16)
    order = []
    for _ in range(16):
        order.append(course.start())
        course.taken()
    # 0000 1111 to all four, then 22 33 44 55 to the best two (nodes 2 and 4)
    assert sorted(order[:4]) == sorted(order[4:8]) == [1, 2, 3, 4]
    assert set(order[8:]) == {2, 4}
    assert course.best() == 2


def test_a_candidate_dropped_early_is_not_played_however_high_its_value() -> None:
    course, state = halving([0.4, 0.9, 0.5], 6)
    for arm, count in ((1, 3), (2, 1), (3, 3)):
        course.given[arm] = count
    assert course.best() == 3
    state.tree.backup(1, 1.0)
    assert course.best() == 1


def test_ties_go_to_the_candidate_drawn_first() -> None:
    course, _ = halving([0.5, 0.5], 2)
    assert course.best() == 1


def test_asking_where_to_start_does_not_use_up_a_simulation() -> None:
    course, _ = halving([0.1, 0.9], 4)
    assert course.start() == course.start() == 2


def test_candidates_are_draws_without_replacement_and_stay_fixed_while_they_are_searched() -> None:
    world = World(6, wins=0.0, depth=9)
    result = run_one(world.engine(), ToyTask(), search(Gumbel(simulations=24, m=3, patience=99)))
    tree = result.tree
    for node in tree.played[:-1]:
        drawn = sum(tree.draws[c] for c in tree.children[node])
        assert drawn >= 3 or sum(tree.prior[c] for c in tree.children[node]) > 1 - 1e-5
    assert [tree.draws[c] for c in tree.children[ROOT]] == [1, 1, 1]


def test_where_no_move_is_final_a_lost_episode_is_followed_by_others_until_a_win() -> None:
    """One episode of two candidates a node is often lost; every tree of this world that holds a win is won."""
    held = won = once = 0
    for seed in range(40):
        world = World(seed, wins=0.15)
        whole = run_one(world.engine(), ToyTask(), search(Gumbel(commit="never", m=99, expand=99), budget=10**5))
        held += bool(whole.tree.verdict and any(v is not None and v.won for v in whole.tree.verdict))
        few = {"simulations": 2, "m": 2, "expand": 1}
        found = run_one(world.engine(), ToyTask(), search(Gumbel(commit="never", **few), learning=False, budget=10**5))
        found.tree.check()
        won += found.ended is Ended.SOLVED
        once += run_one(world.engine(), ToyTask(), search(Gumbel(**few), learning=False)).ended is Ended.SOLVED
        assert found.ended in (Ended.SOLVED, Ended.EXHAUSTED)
    assert won == held
    assert once < won


def test_a_step_whose_every_end_loses_is_left_for_its_sibling_before_all_its_ends_are_drawn() -> None:
    """The value favours `a`, below which fifty answers are wrong; each visit draws two of them, not all."""
    ends = {f"{i} no": 0.02 for i in range(50)}
    engine = ScriptedEngine(
        lambda _, steps: {(): {"a ;": 0.5, "b ;": 0.5}, ("a ;",): ends}.get(steps, {"yes": 1.0}),
        lambda _, steps: 0.9 if steps[:1] == ("a ;",) else 0.5,
    )
    strategy = Gumbel(commit="never", m=2, simulations=1, expand=1)
    result = run_one(engine, ToyTask(max_steps=2), search(strategy, learning=False))
    assert result.ended is Ended.SOLVED
    assert len(result.tree) < 12


def test_a_finished_candidate_gets_no_more_simulations_where_no_move_is_final() -> None:
    ctx = context(learning=True)
    state = TreeSearch(ctx, Widening(), lambda *_: 0, leaves=1, skip_done=True)
    arms = [ctx.add(ROOT, step(f"a{i} ;", 0.1, (10 + i, 1)))[0] for i in range(2)]
    for arm, value in zip(arms, (0.9, 0.2), strict=True):
        ctx.tree.backup(arm, value)
    course = Halving(ctx, state, arms, 4)
    assert course.start() == arms[0]
    state.done.add(arms[0])
    assert course.start() == course.best() == arms[1]
    assert not course.over(1)
    state.done.add(arms[1])
    assert course.over(1)


def test_below_the_root_visits_follow_the_improved_policy() -> None:
    """argmax pi' - N / (1 + sum N) keeps N / sum N within one visit of a fixed pi'."""
    ctx = context()
    state = TreeSearch(ctx, Widening(), lambda *_: 0, leaves=1, skip_done=False)
    arms = [ctx.add(ROOT, step(f"a{i} ;", p, (10 + i, 1)))[0] for i, p in enumerate((0.6, 0.3, 0.1))]
    state.arms[ROOT] = arms
    for arm in arms:
        ctx.tree.backup(arm, 0.5)
    strategy = Gumbel()
    for _ in range(97):
        arm = strategy._below(state, ROOT, arms, 0.0)
        ctx.tree.backup(arm, 0.5)
    assert [ctx.tree.visits[arm] for arm in arms] == pytest.approx([60, 30, 10], abs=1)


def test_a_step_not_yet_drawn_competes_below_the_root() -> None:
    ctx = context()
    state = TreeSearch(ctx, Widening(), lambda *_: 0, leaves=1, skip_done=False)
    arm, _ = ctx.add(ROOT, step("a ;", 0.1, (10, 1)))
    ctx.tree.backup(arm, 0.0)
    assert Gumbel()._below(state, ROOT, [arm], 0.9) == -1


def test_episodes_end_at_a_terminal_and_carry_targets() -> None:
    results = [run_one(World(s).engine(), ToyTask(), search(Gumbel(leaves=3), seed=s)) for s in range(6)]
    for result in results:
        result.tree.check()
        assert result.tree.terminal[result.tree.played[-1]]
    assert any(not math.isnan(t) for result in results for t in result.tree.target)


@pytest.mark.parametrize("bad", [{"m": 0}, {"simulations": 0}, {"leaves": 0}, {"pick": "x"}, {"commit": "x"}])
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Gumbel(**bad)  # type: ignore[arg-type]
