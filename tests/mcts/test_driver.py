"""Promises of the driver: same results whatever else runs, exact books, loud but contained failures."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import pytest

from mcts.engines.scripted import ScriptedEngine
from mcts.rng import hash64
from mcts.search import Driver, Expand, Outcome, Replies, Search, SearchContext, Wave
from mcts.strategies import build
from mcts.tasks.base import TaskError
from mcts.tree import ROOT
from mcts.types import Ended, Problem, Request, SearchResult, Verdict
from tests.mcts.toy import ToyTask, World, fingerprint, problem, run_one


def searches(count: int = 6, budget: int = 150) -> list[Search]:
    kinds = [("mcts", {"leaves": 3}), ("best_of_n", {"n": 5}), ("index", {}), ("beam", {}), ("gumbel", {})]
    return [
        Search(problem(i % 3), build(name, **settings), budget, seed=i, learning=i % 2 == 0)  # type: ignore[arg-type]
        for i, (name, settings) in zip(range(count), itertools.cycle(kinds), strict=False)
    ]


def by_seed(results: list[SearchResult]) -> dict[int, tuple[object, ...]]:
    return {result.seed: fingerprint(result) for result in results}


@dataclass(frozen=True)
class Scripted:
    """A strategy made of fixed waves."""

    waves: tuple[tuple[Expand, ...], ...]
    name: ClassVar[str] = "fixed"

    def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]:
        for wave in self.waves:
            replies = yield list(wave)
            for wish, reply in zip(wave, replies, strict=True):
                for step in reply.steps if reply is not None else ():
                    ctx.add(wish.node, step)
        return Outcome(Ended.BUDGET, ctx.candidates[0] if ctx.candidates else None)


def recording(world: World, log: list[Request], **options: object) -> ScriptedEngine:
    engine = world.engine(**options)
    submit = engine.submit
    engine.submit = lambda request: (log.append(request), submit(request))[1]  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("options", [{}, {"per_poll": 1}, {"per_poll": 2, "shuffle": 7}, {"capacity": 500}])
def test_results_are_the_same_alone_together_and_in_another_order(options: dict[str, int]) -> None:
    task, world = ToyTask(), World(2)
    alone = by_seed([run_one(world.engine(), task, search) for search in searches()])
    together = list(Driver(world.engine(**options), task, max_open=4).run(searches()))
    reversed_order = list(Driver(world.engine(**options), task).run(searches()[::-1]))
    assert by_seed(together) == alone
    assert by_seed(reversed_order) == alone


def test_another_seed_gives_another_tree() -> None:
    a, b = (run_one(World().engine(), ToyTask(), Search(problem(), build("mcts"), 99, s)) for s in (1, 2))
    assert fingerprint(a) != fingerprint(b)


def test_every_request_has_its_own_seed_from_the_search_seed_and_its_ordinal() -> None:
    log: list[Request] = []
    run_one(recording(World(), log), ToyTask(), Search(problem(), build("mcts", leaves=2), 90, seed=5))
    assert [request.seed for request in log] == [hash64(5, i) for i in range(len(log))]
    assert len({request.id for request in log}) == len(log)


def test_a_request_carries_the_tokens_of_its_path_and_the_searchs_settings() -> None:
    log: list[Request] = []
    search = Search(problem(), build("mcts", expand=3), 90, seed=5, temperature=0.7, top_p=0.9)
    result = run_one(recording(World(), log), ToyTask(max_step_tokens=5), search)
    prefixes = {tuple(result.tree.prefix(node).tolist()) for node in range(len(result.tree))}
    assert all(tuple(request.prefix.tolist()) in prefixes for request in log)
    assert (log[0].n, log[0].max_tokens, log[0].temperature, log[0].top_p) == (3, 5, 0.7, 0.9)


def test_a_wish_overrides_temperature_and_shortens_but_never_lengthens_steps() -> None:
    log: list[Request] = []
    wave = (Expand(ROOT, 1, temperature=0.0, max_tokens=3), Expand(ROOT, 1, max_tokens=99))
    run_one(recording(World(), log), ToyTask(max_step_tokens=5), Search(problem(), Scripted((wave,)), 90, 1))
    assert [(r.temperature, r.max_tokens) for r in log] == [(0.0, 3), (1.0, 5)]


def test_usage_is_what_the_engine_really_did() -> None:
    engine, task = World(1).engine(), ToyTask()
    results = list(Driver(engine, task).run(searches()))
    assert sum(result.usage.sampled for result in results) == engine.sampled
    for result in results:
        assert result.tree.tokens + result.usage.discarded == result.usage.sampled <= 150
        assert result.usage.calls > 0
        assert result.usage.prompt > 0
        result.tree.check()


def test_a_wave_too_large_is_granted_in_part_and_the_rest_gets_none() -> None:
    seen: list[list[int | None]] = []

    @dataclass(frozen=True)
    class Asks:
        name: ClassVar[str] = "asks"

        def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]:  # noqa: ARG002
            replies = yield [Expand(ROOT, 2) for _ in range(4)]
            seen.append([None if reply is None else len(reply.steps) for reply in replies])
            return Outcome(Ended.STOPPED, None)

    run_one(World().engine(), ToyTask(max_step_tokens=6), Search(problem(), Asks(), 30, 1))
    assert seen == [[2, 2, None, None]]


def test_a_step_that_the_end_of_the_budget_cut_is_discarded_and_not_called_wrong() -> None:
    engine = ScriptedEngine(lambda _, __: {"a b c d yes": 1.0}, lambda _, __: 0.5)
    fixed = Scripted(((Expand(ROOT, 1),),))
    result = run_one(engine, ToyTask(max_step_tokens=6), Search(problem(), fixed, 4, 1))
    assert (result.usage.sampled, result.usage.discarded, len(result.tree)) == (4, 4, 1)


def test_a_step_as_long_as_a_step_may_be_is_lost_for_good() -> None:
    engine = ScriptedEngine(lambda _, __: {"a b c d yes": 1.0}, lambda _, __: 0.5)
    result = run_one(engine, ToyTask(max_step_tokens=3), Search(problem(), Scripted(((Expand(ROOT, 1),),)), 9, 1))
    assert result.tree.terminal == [False, True]
    assert result.tree.reward[1] == 0.0


def test_outside_learning_gold_is_asked_once_about_the_chosen_answer() -> None:
    task = ToyTask(checkable=False)
    result = run_one(World(1).engine(), task, Search(problem(), build("best_of_n", n=8), 400, 1))
    assert task.verified == 1
    assert result.chosen is not None
    assert result.answer == result.tree.answer[result.chosen]
    assert result.verdict is not None
    assert result.verdict.won == (result.answer == "yes")
    assert not result.oracle
    assert result.tree.verdict[result.chosen] is None


def test_in_learning_the_verdict_is_the_one_found_inside() -> None:
    task = ToyTask(checkable=False)
    result = run_one(World(1).engine(), task, Search(problem(), build("best_of_n", n=8), 400, 1, learning=True))
    assert result.chosen is not None
    assert result.verdict is result.tree.verdict[result.chosen]
    assert result.oracle


def test_choosing_by_gold_is_labelled_oracle() -> None:
    search = Search(problem(), build("best_of_n", n=16, pick="oracle"), 900, 1)
    result = run_one(World(1).engine(), ToyTask(checkable=False), search)
    assert result.oracle
    assert result.verdict is not None
    assert result.verdict.won


def test_the_result_names_what_determines_the_trace() -> None:
    search = Search(problem(), build("beam", n=8), 60, seed=3, temperature=0.5)
    settings = run_one(World().engine(), ToyTask(), search).settings
    assert settings["strategy"]["n"] == 8
    assert settings["value"] == {"name": "head"}
    assert (settings["engine"], settings["temperature"], settings["budget"]) == ("scripted", 0.5, 60)


def test_a_search_that_does_not_fit_now_waits_and_one_that_never_fits_fails() -> None:
    world, task = World(), ToyTask()
    engine = world.engine(capacity=200)
    driver = Driver(engine, task)
    for seed, budget in ((0, 150), (1, 150), (2, 400)):
        driver.submit(Search(problem(), build("best_of_n", n=4), budget, seed))
    results = {}
    while len(driver):
        for result in driver.poll():
            results[result.seed] = result
    assert results[0].ended is not Ended.FAILED
    assert results[1].ended is not Ended.FAILED
    assert results[2].ended is Ended.FAILED
    assert "does not fit" in str(results[2].error)


def test_an_engine_error_fails_its_search_only_and_keeps_the_books() -> None:
    engine = World().engine(fail=lambda request: "out of luck" if request.prefix[1] == one else None)
    one = engine.encode("problem 1 :")[1]
    results = {r.problem.id: r for r in Driver(engine, ToyTask()).run(searches(3))}
    failed = results["toy-1"]
    assert failed.ended is Ended.FAILED
    assert "out of luck" in str(failed.error)
    assert results["toy-0"].error is results["toy-2"].error is None


@pytest.mark.parametrize("method", ["check_step", "answer", "check"])
def test_a_task_error_fails_its_search_only(method: str) -> None:
    def broken(problem: Problem, *_: object) -> Verdict | None:
        if problem.id == "toy-1":
            raise TaskError("the numbers of this problem are missing")
        return None

    task = ToyTask()
    setattr(task, method, broken)
    results = {r.problem.id: r for r in Driver(World(4, wins=0.0).engine(), task).run(searches(3))}
    failed = results["toy-1"]
    assert failed.ended is Ended.FAILED
    assert failed.error == "the numbers of this problem are missing"
    assert failed.tree.tokens + failed.usage.discarded == failed.usage.sampled
    failed.tree.check()
    assert results["toy-0"].error is None


def test_a_strategy_that_never_gives_up_is_stopped_with_its_name() -> None:
    waves = tuple((Expand(ROOT, 1),) for _ in range(1000))
    result = run_one(World().engine(), ToyTask(), Search(problem(), Scripted(waves), 20, 1))
    assert result.ended is Ended.FAILED
    assert "'fixed' asks on" in str(result.error)
    assert result.usage.sampled == 20


def test_an_empty_wave_is_an_error() -> None:
    result = run_one(World().engine(), ToyTask(), Search(problem(), Scripted(((),)), 20, 1))
    assert "empty wave" in str(result.error)


def test_a_cancelled_search_answers_with_the_best_it_has_and_its_tokens_count() -> None:
    engine = World(1, wins=0.0).engine(per_poll=1)
    driver = Driver(engine, ToyTask())
    long = driver.submit(Search(problem(), build("best_of_n", until_win=True, n=0, batch=4), 10_000, 1))
    for _ in range(60):
        assert driver.poll() == []
    driver.cancel(long)
    results = []
    while len(driver):
        results += driver.poll()
    assert [result.ended for result in results] == [Ended.STOPPED]
    assert results[0].answer is not None
    assert results[0].usage.sampled == engine.sampled < 10_000


def test_a_search_cancelled_before_it_starts_samples_nothing() -> None:
    engine = World().engine()
    driver = Driver(engine, ToyTask())
    driver.cancel(driver.submit(Search(problem(), build("mcts"), 100, 1)))
    (result,) = driver.poll()
    assert (result.ended, engine.sampled) == (Ended.STOPPED, 0)


def test_a_search_past_its_deadline_stops() -> None:
    search = Search(problem(), build("best_of_n", until_win=True, n=0), 10**6, 1, seconds=0.0)
    assert run_one(World(wins=0.0).engine(), ToyTask(), search).ended is Ended.STOPPED


def test_run_reads_an_endless_stream_only_as_far_as_there_is_room() -> None:
    taken: list[int] = []

    def stream() -> Generator[Search, None, None]:
        for seed in itertools.count():
            taken.append(seed)
            yield Search(problem(), build("best_of_n", n=2), 40, seed)

    driver = Driver(World().engine(per_poll=1), ToyTask(), max_open=3)
    for done, _ in enumerate(driver.run(stream()), 1):
        assert len(taken) <= done + 3
        if done == 20:
            break


def test_chat_prompts_are_sent_through_the_engine() -> None:
    chat = Problem("c", ({"role": "user", "content": "problem 1 :"},), "yes")
    result = run_one(World().engine(), ToyTask(), Search(chat, build("greedy"), 40, 1))
    assert result.tree.prompt_text == "problem 1 :"
    assert len(result.tree) > 1
