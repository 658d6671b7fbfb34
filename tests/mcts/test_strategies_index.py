"""The index search and its treeless twin: the order of draws equals a brute-force choice."""

from __future__ import annotations

import numpy as np
import pytest

from mcts.engines.scripted import ScriptedEngine
from mcts.search import Search, SearchContext
from mcts.strategies.best_of_n import BestOfN
from mcts.strategies.index import Index, Queue
from mcts.strategies.redraw import Redraw
from mcts.tree import ROOT
from mcts.types import Ended, Request, SearchResult, Step, Stop
from mcts.value import HeadValue, RolloutValue
from tests.mcts.test_context import context
from tests.mcts.toy import ToyTask, World, problem, run_one


def run(
    strategy: object, world: World | ScriptedEngine, task: ToyTask | None = None, **options: object
) -> SearchResult:
    fields: dict[str, object] = {"budget": 2000, "seed": 1, **options}
    engine = world.engine() if isinstance(world, World) else world
    return run_one(engine, task or ToyTask(), Search(problem(), strategy, **fields))  # type: ignore[arg-type]


def step(text: str, p: float, value: float, stop: Stop = Stop.DELIMITER) -> Step:
    ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
    logprobs = np.zeros(len(ids), dtype=np.float32)
    logprobs[0] = np.log(p)
    return Step(text, ids, logprobs, stop, value)


def small(rule: str = "exact") -> tuple[SearchContext, Queue]:
    """Root (.6) with a (p .5, v .8), b (p .2, v .1), c (p .1, lost); 4 steps at most."""
    ctx = context(rule, value=HeadValue())
    ctx.tree.raw_value[ROOT] = 0.6
    queue = Queue(ctx, trust=0.95, kappa=2.0, patience=8)
    for made in (step("a ;", 0.5, 0.8), step("b ;", 0.2, 0.1), step("c no", 0.1, 0.9, Stop.EOS)):
        add(ctx, queue, ROOT, made)
    return ctx, queue


def add(ctx: SearchContext, queue: Queue, parent: int, made: Step) -> int:
    node, _ = ctx.add(parent, made)
    queue.add(node, ctx.value(node))
    queue.update(parent)
    return node


def test_gain_is_the_chance_that_the_win_lies_below_a_step_not_yet_drawn() -> None:
    # prior odds 1.5; a win lies below the rest (.2) or below a (.5, odds 4), b (.2, odds 1/9), c (lost)
    _, queue = small()
    unseen, seen = 0.2 * 1.5, 0.5 * 4.0 + 0.2 / 9.0
    assert queue.odds[ROOT] == pytest.approx(unseen + seen)
    assert queue.indices[ROOT] == pytest.approx(unseen / (1.0 + unseen + seen) / 4)
    assert queue.indices[1] == pytest.approx(0.8 / 3)


def test_after_lost_steps_alone_the_gain_is_bayes_rule() -> None:
    # P(win in the rest | not in what was drawn), the prior being .6 and half of the probability drawn in vain
    ctx = context("exact", value=HeadValue())
    ctx.tree.raw_value[ROOT] = 0.6
    queue = Queue(ctx, trust=0.95, kappa=2.0, patience=8)
    add(ctx, queue, ROOT, step("a no", 0.5, 0.9, Stop.EOS))
    assert queue.indices[ROOT] * 4 == pytest.approx(0.6 * 0.5 / (0.6 * 0.5 + 0.4))


def test_failures_below_a_promising_step_give_the_others_their_chance_back() -> None:
    ctx, queue = small()
    before = queue.indices[ROOT]
    add(ctx, queue, 1, step("e no", 0.9, 0.0, Stop.EOS))
    assert queue.indices[1] < 0.8 / 3
    assert queue.odds[1] == pytest.approx(0.1 * 4.0)
    assert queue.indices[ROOT] == pytest.approx(0.3 / (1.0 + 0.3 + 0.5 * 0.4 + 0.2 / 9.0) / 4)
    assert queue.indices[ROOT] > before


def test_under_the_rule_draws_shares_are_counts_and_kappa_draws_stand_for_the_unseen() -> None:
    _, queue = small("draws")
    unseen, seen = 2.0 / 5.0 * 1.5, 1.0 / 5.0 * (4.0 + 1.0 / 9.0)
    assert queue.indices[ROOT] == pytest.approx(unseen / (1.0 + unseen + seen) / 4)


def test_values_are_believed_up_to_trust_only() -> None:
    ctx, queue = small()
    node = add(ctx, queue, 1, step("f ;", 0.5, 1.0))
    assert queue.indices[node] == pytest.approx(0.95 / 2)
    node = add(ctx, queue, 1, step("g ;", 0.4, 0.0))
    assert queue.indices[node] == pytest.approx(0.05 / 2)


def test_deeper_nodes_of_equal_value_come_first() -> None:
    ctx, queue = small()
    deeper = add(ctx, queue, 2, step("e ;", 0.5, 0.8))
    assert queue.best(2) == [deeper, 1]


def test_terminal_and_closed_nodes_are_never_drawn_at() -> None:
    _, queue = small()
    for _ in range(8):
        queue.drawn(1, new=False)
    queue.update(1)
    assert 3 not in queue.indices
    assert sorted(queue.best(9)) == [ROOT, 2]


@pytest.mark.parametrize("rule", ["exact", "draws"])
@pytest.mark.parametrize("seed", range(6))
def test_every_draw_is_at_the_best_node_by_brute_force(rule: str, seed: int) -> None:
    world, task = World(seed, wins=0.0, finish=0.15), ToyTask()
    strategy = Index(patience=3)
    engine = world.engine()
    log: list[Request] = []
    submit = engine.submit
    engine.submit = lambda request: (log.append(request), submit(request))[1]  # type: ignore[method-assign]
    result = run(strategy, engine, task, seed=seed, prior_rule=rule, budget=400)
    assert len(log) > 5

    # replay: rebuild the tree draw by draw and work all indices out anew from the definition
    replay_engine = world.engine()
    prompt = replay_engine.encode(problem().prompt)
    replay_engine.open(log[0].search, prompt, 10**6)
    search = Search(problem(), strategy, 400, seed, prior_rule=rule)
    ctx = SearchContext(search, task, prompt, problem().prompt)
    tree = ctx.tree
    missed: dict[int, int] = {}

    def own(node: int) -> float:
        value = min(max(ctx.value(node), 1 - strategy.trust), strategy.trust)
        return 0.0 if tree.terminal[node] else value / (1 - value)

    def shares(node: int) -> tuple[float, list[float]]:
        if rule == "exact":
            priors = [tree.prior[c] for c in tree.children[node]]
            return max(0.0, 1 - sum(priors)), priors
        total = strategy.kappa + sum(tree.draws[c] for c in tree.children[node])
        return strategy.kappa / total, [tree.draws[c] / total for c in tree.children[node]]

    def odds(node: int) -> float:
        left, drawn = shares(node)
        return left * own(node) + sum(s * odds(c) for s, c in zip(drawn, tree.children[node], strict=True))

    for number, request in enumerate(log):
        best, best_index = ROOT, -1.0
        for node in range(len(tree)):
            left, _ = shares(node)
            if number == 0 or tree.terminal[node] or left <= 1e-6 or missed.get(node, 0) >= 3:
                continue
            index = left * own(node) / (1 + odds(node)) / (ctx.max_steps - tree.depth[node])
            if index > best_index * (1 + 1e-9):
                best, best_index = node, index
        assert request.prefix.tolist() == ctx.prefix(best).tolist()
        replay_engine.submit(request)
        (reply,) = replay_engine.poll()
        tree.raw_value[ROOT] = reply.prefix_value if best == ROOT else tree.raw_value[ROOT]
        for made in reply.steps:
            if made.stop is not Stop.LENGTH:
                _, new = ctx.add(best, made)
                missed[best] = 0 if new else missed.get(best, 0) + 1
    assert [s and s.text for s in ctx.tree.steps] == [s and s.text for s in result.tree.steps]


def test_index_stops_at_the_first_verified_win() -> None:
    results = [run(Index(leaves=2), World(seed, wins=0.3)) for seed in range(8)]
    assert Ended.SOLVED in {result.ended for result in results}
    for result in results:
        result.tree.check()
        assert sum(r == 1.0 for r in result.tree.reward) <= 2
        assert (result.ended is Ended.SOLVED) == (result.verdict is not None and result.verdict.won)


def test_index_ends_when_every_step_is_drawn() -> None:
    engine = ScriptedEngine(lambda _, __: {"a no": 0.5, "b no": 0.5}, lambda *_: 0.5)
    result = run(Index(patience=99), engine)
    assert (result.ended, len(result.tree)) == (Ended.EXHAUSTED, 3)


def test_with_perfect_values_index_needs_fewer_tokens_than_sampling() -> None:
    def script(_: str, steps: tuple[str, ...]) -> dict[str, float]:
        if len(steps) == 3:
            return {("z yes" if all(s == "a ;" for s in steps) else "z no"): 1.0}
        return {"a ;": 0.2, "b ;": 0.4, "c ;": 0.4}

    def value(_: str, steps: tuple[str, ...]) -> float:
        return 0.2 ** (3 - min(3, len(steps))) if all(s in ("a ;", "z yes") for s in steps) else 0.0

    totals = {}
    for strategy in (Index(patience=1000), BestOfN(n=0, until_win=True)):
        engine = ScriptedEngine(script, value)
        results = [run(strategy, engine, seed=s, budget=50_000) for s in range(15)]
        assert all(result.ended is Ended.SOLVED for result in results)
        totals[strategy.name] = sum(result.usage.sampled for result in results)
    assert totals["index"] * 3 < totals["best_of_n"]


def test_index_and_redraw_work_with_rollouts() -> None:
    for strategy in (Index(), Redraw()):
        result = run(strategy, World(4, wins=0.0), value=RolloutValue())
        assert result.error is None
        result.tree.check()


def poor_and_good(log: list[int], share: float = 0.5) -> ScriptedEngine:
    """Two steps of value 0.1 and 0.9; then the end."""
    first = {"poor ;": 1.0 - share, "good ;": share}
    engine = ScriptedEngine(
        lambda _, steps: first if not steps else {"end no": 1.0},
        lambda _, steps: 0.5 if not steps else (0.9 if steps[0] == "good ;" else 0.1),
    )
    submit = engine.submit
    engine.submit = lambda request: (log.append(len(request.prefix)), submit(request))[1]  # type: ignore[method-assign]
    return engine


def test_redraw_goes_on_at_once_from_a_good_step_and_redraws_a_poor_one() -> None:
    log: list[int] = []
    result = run(Redraw(redraws=50, n=10), poor_and_good(log), ToyTask(checkable=False))
    played = [n for n in range(len(result.tree)) if result.tree.children[n] and n != ROOT]
    assert [result.tree.steps[n].text for n in played] == ["good ;"]  # type: ignore[union-attr]


def test_redraw_goes_on_from_the_best_after_so_many_redraws() -> None:
    log: list[int] = []
    run(Redraw(redraws=3, n=1), poor_and_good(log, share=1e-9), ToyTask(checkable=False))
    assert log == [3] * 4 + [5] * 4  # one draw and three redraws at the prompt, and again below it


def test_redraw_threshold_is_relative_to_the_base_rate() -> None:
    log: list[int] = []
    run(Redraw(ratio=0.5, base=0.1, redraws=50, n=1), poor_and_good(log, share=1e-9), ToyTask(checkable=False))
    assert log == [3, 5]


def test_redraw_starts_a_lost_chain_again_until_a_win() -> None:
    result = run(Redraw(batch=2), World(1, wins=0.3))
    assert result.ended is Ended.SOLVED
    result.tree.check()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Index(expand=0),
        lambda: Index(kappa=0.0),
        lambda: Index(trust=1.0),
        lambda: Redraw(batch=0),
        lambda: Redraw(base=2.0),
    ],
)
def test_bad_settings_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"must|needs|base rate"):
        bad()  # type: ignore[operator]
