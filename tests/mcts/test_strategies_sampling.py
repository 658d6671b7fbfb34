"""Best-of-n, greedy, beam and the picks among answers."""

from __future__ import annotations

import numpy as np
import pytest

from mcts.engines.scripted import ScriptedEngine
from mcts.search import Search
from mcts.strategies.beam import Beam
from mcts.strategies.best_of_n import BestOfN, Greedy
from mcts.strategies.pick import Pick, choose, pick_rule
from mcts.tree import ROOT
from mcts.types import Ended, SearchResult, Stop
from mcts.value import ConstantValue, RolloutValue
from tests.mcts.test_context import context, step
from tests.mcts.toy import ToyTask, World, fingerprint, problem, run_one


def run(
    strategy: object, world: World | ScriptedEngine, task: ToyTask | None = None, **options: object
) -> SearchResult:
    fields: dict[str, object] = {"budget": 3000, "seed": 1, **options}
    engine = world.engine() if isinstance(world, World) else world
    return run_one(engine, task or ToyTask(), Search(problem(), strategy, **fields))  # type: ignore[arg-type]


def ends(answers: list[str], values: list[float], *, checkable: bool = False):  # type: ignore[no-untyped-def]
    """A context with one finished path per answer, and their nodes."""
    ctx = context(task=ToyTask(checkable=checkable))
    nodes = []
    for index, (answer, value) in enumerate(zip(answers, values, strict=True)):
        made = step(f"{index} {answer}", 0.1, (10 + index, 0), Stop.EOS)
        node, _ = ctx.add(ROOT, made)
        ctx._estimates[node] = value
        nodes.append(node)
    return ctx, nodes


def test_majority_takes_the_answer_of_most_paths() -> None:
    ctx, nodes = ends(["a", "b", "b"], [0.9, 0.1, 0.1])
    assert choose(ctx, nodes, Pick.MAJORITY) == nodes[1]


def test_a_path_drawn_twice_has_two_votes() -> None:
    ctx, nodes = ends(["a", "b"], [0.5, 0.5])
    assert choose(ctx, [nodes[0], nodes[1], nodes[1]], Pick.MAJORITY) == nodes[1]


def test_value_takes_the_single_best_path() -> None:
    ctx, nodes = ends(["a", "b", "b"], [0.6, 0.5, 0.5])
    assert choose(ctx, nodes, Pick.VALUE) == nodes[0]


def test_weighted_adds_up_the_values_of_equal_answers() -> None:
    ctx, nodes = ends(["a", "b", "b"], [0.6, 0.5, 0.5])
    assert choose(ctx, nodes, Pick.WEIGHTED) == nodes[1]
    ctx, nodes = ends(["a", "b", "b"], [0.6, 0.2, 0.2])
    assert choose(ctx, nodes, Pick.WEIGHTED) == nodes[0]


def test_weighted_with_constant_values_is_majority() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        answers = [str(a) for a in rng.integers(0, 4, size=rng.integers(1, 9))]
        ctx, nodes = ends(answers, [0.4] * len(answers))
        assert choose(ctx, nodes, Pick.WEIGHTED) == choose(ctx, nodes, Pick.MAJORITY)


def test_ties_go_to_the_answer_reached_first() -> None:
    ctx, nodes = ends(["b", "a"], [0.5, 0.5])
    assert choose(ctx, nodes, Pick.MAJORITY) == nodes[0]


def test_a_verified_win_beats_every_vote_and_value() -> None:
    ctx, nodes = ends(["a", "a", "yes"], [0.9, 0.9, 0.1], checkable=True)
    for rule in Pick:
        assert choose(ctx, nodes, rule) == nodes[2]


def test_oracle_takes_what_gold_confirms_and_is_labelled() -> None:
    ctx, nodes = ends(["a", "a", "yes"], [0.9, 0.9, 0.1])
    assert choose(ctx, nodes, Pick.ORACLE) == nodes[2]
    assert ctx.oracle


def test_no_answer_means_no_choice() -> None:
    assert choose(context(), [], Pick.MAJORITY) is None


def test_an_unknown_pick_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="majority, value, weighted, oracle"):
        pick_rule("best")


def test_best_of_n_runs_exactly_n_chains_to_their_end() -> None:
    result = run(BestOfN(n=12), World(4, wins=0.0))
    tree = result.tree
    stops = [sum(tree.draws[n] for n in range(len(tree)) if tree.terminal[n])]
    assert stops == [12]
    assert sum(tree.draws[c] for c in tree.children[ROOT]) == 12
    assert result.ended is Ended.EXHAUSTED


def test_chains_are_independent_draws_from_the_policy() -> None:
    script = {"a yes": 0.5, "b no": 0.3, "c ;": 0.2}
    engine = ScriptedEngine(lambda _, steps: script if not steps else {"d no": 1.0})
    result = run(BestOfN(n=600), engine, learning=True, budget=10**5)
    draws = {result.tree.steps[c].text: result.tree.draws[c] / 600 for c in result.tree.children[ROOT]}  # type: ignore[union-attr]
    assert draws == pytest.approx(script, abs=0.1)  # five standard errors
    assert result.tree.q(ROOT) == pytest.approx(draws["a yes"])  # mean value = win rate seen


def test_a_batch_changes_how_many_are_under_way_not_how_many_there_are() -> None:
    result = run(BestOfN(n=7, batch=3), World(4, wins=0.0))
    assert sum(result.tree.draws[c] for c in result.tree.children[ROOT]) == 7


@pytest.mark.parametrize("batch", [1, 3])
def test_until_win_stops_at_the_first_verified_win(batch: int) -> None:
    result = run(BestOfN(n=0, until_win=True, batch=batch), World(4, wins=0.2))
    tree = result.tree
    assert result.ended is Ended.SOLVED
    assert result.chosen is not None
    assert tree.reward[result.chosen] == 1.0
    assert sum(r == 1.0 for r in tree.reward) <= batch
    assert len(tree) - 1 - result.chosen < batch


def test_until_win_without_a_win_ends_with_its_chains_or_its_budget() -> None:
    hopeless = World(4, wins=0.0)
    assert run(BestOfN(n=5, until_win=True), hopeless).ended is Ended.EXHAUSTED
    spent = run(BestOfN(n=0, until_win=True), hopeless, budget=100)
    assert (spent.ended, spent.usage.sampled) == (Ended.BUDGET, 100)


def test_a_tight_budget_finishes_some_chains_rather_than_none() -> None:
    result = run(BestOfN(n=16), World(9, wins=0.0, finish=0.0), budget=60)
    assert result.ended is Ended.BUDGET
    assert any(result.tree.terminal)


def test_greedy_is_one_chain_at_temperature_zero() -> None:
    world = World(6)
    result = run(Greedy(), world, seed=1)
    assert fingerprint(result) == fingerprint(run(Greedy(), world, seed=2))
    assert fingerprint(result) == fingerprint(run(BestOfN(n=1, temperature=0.0), world))
    first = world.script(problem().prompt, ())
    assert result.tree.steps[1].text == max(first, key=first.__getitem__)  # type: ignore[union-attr]


def test_beam_keeps_the_n_over_m_best_at_each_depth() -> None:
    world = World(3, wins=0.0, finish=0.0)
    result = run(Beam(n=8, m=4), world)
    tree = result.tree
    for depth in range(1, ToyTask().max_steps - 1):
        layer = [n for n in range(len(tree)) if tree.depth[n] == depth and not tree.terminal[n]]
        kept = [n for n in layer if tree.children[n]]
        assert len(kept) == min(2, len(layer))
        dropped = set(layer) - set(kept)
        assert all(tree.raw_value[a] >= tree.raw_value[b] for a in kept for b in dropped)


def test_beam_with_m_one_is_independent_chains() -> None:
    """Where no two chains share a step, the trees are the same bit by bit."""
    wide = {f"w{i} ;": 1 / 64 for i in range(64)}
    for seed in range(20):
        engine = ScriptedEngine(lambda _, steps: wide if not steps else {"x no": 0.5, "y maybe": 0.5}, lambda *_: 0.5)
        beam = run(Beam(n=4, m=1), engine, seed=seed).tree
        chains = run(BestOfN(n=4), engine, seed=seed).tree
        if max(chains.draws) == 1:
            assert [s and s.text for s in beam.steps] == [s and s.text for s in chains.steps]
            break
    else:
        pytest.fail("no seed without a repeated step")


def test_beam_with_m_equal_n_follows_the_single_best_step() -> None:
    tree = run(Beam(n=6, m=6), World(3, wins=0.0, finish=0.0)).tree
    inner = [n for n in range(len(tree)) if tree.children[n]]
    assert len({tree.depth[n] for n in inner}) == len(inner)


def test_beam_stops_at_a_win_unless_told_to_finish() -> None:
    world = World(5, wins=0.5)
    stopped, finished = run(Beam(n=8, m=2), world), run(Beam(n=8, m=2, stop_at_win=False), world)
    assert stopped.ended is finished.ended is Ended.SOLVED
    assert stopped.usage.sampled < finished.usage.sampled


def test_beam_works_with_rollouts_and_with_constant_values() -> None:
    for value in (RolloutValue(), ConstantValue()):
        result = run(Beam(n=4, m=2), World(4, wins=0.0), value=value)
        assert result.error is None
        result.tree.check()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: BestOfN(n=0),
        lambda: BestOfN(pick="x"),
        lambda: BestOfN(temperature=-1.0),
        lambda: Beam(n=6, m=4),
        lambda: Beam(pick="x"),
        lambda: Beam(temperature=-0.1),
    ],
)
def test_bad_settings_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"best_of_n|beam|pick|temperature"):
        bad()  # type: ignore[operator]
