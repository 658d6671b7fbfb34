"""How drawn steps become nodes: merging, priors, ends of paths, and who may call something a win."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from mcts.context import Search, SearchContext
from mcts.strategies.best_of_n import BestOfN
from mcts.tree import ROOT
from mcts.types import Problem, SearchError, Status, Step, Stop, Verdict
from mcts.value import ConstantValue, HeadValue, RolloutValue, ValueSource
from tests.mcts.toy import ToyTask, problem


def context(
    rule: str = "exact", *, learning: bool = False, task: ToyTask | None = None, check_steps: bool = True,
    value: ValueSource | None = None,
) -> SearchContext:  # fmt: skip
    search = Search(problem(), BestOfN(), 100, seed=1, learning=learning, prior_rule=rule,
                    check_steps=check_steps, value=value or ConstantValue())  # fmt: skip
    return SearchContext(search, task or ToyTask(), np.array([1, 2], dtype=np.int32), "q :")


def step(text: str, p: float = 0.5, tokens: Sequence[int] = (5, 6), stop: Stop = Stop.DELIMITER) -> Step:
    logprobs = np.full(len(tokens), math.log(p) / len(tokens), dtype=np.float32)
    return Step(text, np.array(tokens, dtype=np.int32), logprobs, stop, 0.4)


def test_exact_prior_is_the_steps_own_probability() -> None:
    ctx = context()
    node, new = ctx.add(ROOT, step("a ;", 0.3))
    assert new
    assert ctx.tree.prior[node] == pytest.approx(0.3, abs=1e-6)


def test_a_repeated_step_only_raises_draws_and_is_discarded() -> None:
    ctx = context()
    first, _ = ctx.add(ROOT, step("a ;", 0.3))
    again, new = ctx.add(ROOT, step("a ;", 0.3))
    assert (again, new) == (first, False)
    assert ctx.tree.draws[first] == 2
    assert ctx.tree.prior[first] == pytest.approx(0.3, abs=1e-6)
    assert ctx.usage.discarded == 2


def test_another_tokenisation_of_a_text_adds_its_probability_once() -> None:
    ctx = context()
    node, _ = ctx.add(ROOT, step("a ;", 0.3, (5, 6)))
    for _ in range(2):
        assert ctx.add(ROOT, step("a ;", 0.2, (7, 8, 9))) == (node, False)
    assert ctx.tree.prior[node] == pytest.approx(0.5, abs=1e-6)
    assert ctx.tree.steps[node].token_ids.tolist() == [5, 6]  # type: ignore[union-attr]
    assert ctx.usage.discarded == 6


def test_the_same_text_with_another_end_is_another_step() -> None:
    ctx = context()
    a, _ = ctx.add(ROOT, step("a", tokens=(5, 0), stop=Stop.EOS))
    b, _ = ctx.add(ROOT, step("a", tokens=(5,), stop=Stop.LENGTH))
    assert a != b


def test_the_same_text_below_another_node_is_another_step() -> None:
    ctx = context()
    a, _ = ctx.add(ROOT, step("a ;"))
    b, new = ctx.add(a, step("a ;"))
    assert new
    assert b != a


def test_draw_priors_are_shares_of_all_draws_of_the_siblings() -> None:
    ctx = context("draws")
    for text in ("a ;", "b ;", "a ;", "a ;"):
        ctx.add(ROOT, step(text, tokens=(ord(text[0]), 3)))
    assert ctx.tree.prior[1:] == [0.75, 0.25]


def test_eos_closes_a_path_by_its_answer() -> None:
    ctx = context()
    won, _ = ctx.add(ROOT, step("x yes", tokens=(5, 0), stop=Stop.EOS))
    lost, _ = ctx.add(ROOT, step("x no", tokens=(6, 0), stop=Stop.EOS))
    assert ctx.tree.terminal[1:] == [True, True]
    assert (ctx.wins, ctx.candidates) == ([won], [won, lost])
    assert (ctx.value(won), ctx.value(lost)) == (1.0, 0.0)


def test_a_finished_path_without_an_answer_is_unparsable_and_no_candidate() -> None:
    ctx = context()
    node, _ = ctx.add(ROOT, step("nothing", tokens=(5, 0), stop=Stop.EOS))
    verdict = ctx.tree.verdict[node]
    assert verdict is not None
    assert verdict.status is Status.UNPARSABLE
    assert ctx.tree.reward[node] == 0.0
    assert ctx.candidates == []


def test_a_step_cut_at_the_longest_length_is_lost() -> None:
    ctx = context()
    node, _ = ctx.add(ROOT, step("a b c", tokens=(1, 2, 3), stop=Stop.LENGTH))
    assert ctx.tree.terminal[node]
    assert ctx.tree.reward[node] == 0.0


def test_a_path_at_the_largest_number_of_steps_is_lost() -> None:
    ctx = context(task=ToyTask(max_steps=2))
    a, _ = ctx.add(ROOT, step("a ;"))
    assert not ctx.tree.terminal[a]
    b, _ = ctx.add(a, step("b ;"))
    assert ctx.tree.terminal[b]
    assert ctx.tree.reward[b] == 0.0


def test_a_refuted_step_ends_its_path_only_where_steps_are_checked() -> None:
    assert context().tree.terminal == [False]
    strict, lax = context(), context(check_steps=False)
    assert strict.tree.terminal[strict.add(ROOT, step("bad ;"))[0]]
    assert not lax.tree.terminal[lax.add(ROOT, step("bad ;"))[0]]


def test_an_answer_that_nothing_may_judge_keeps_the_values_estimate() -> None:
    ctx = context(task=ToyTask(checkable=False), value=ConstantValue(0.3))
    node, _ = ctx.add(ROOT, step("x yes", tokens=(5, 0), stop=Stop.EOS))
    assert ctx.tree.terminal[node]
    assert ctx.tree.verdict[node] is None
    assert math.isnan(ctx.tree.reward[node])
    assert ctx.value(node) == 0.3
    assert ctx.candidates == [node]
    assert not ctx.oracle


def test_outside_learning_gold_is_never_asked_inside_a_search() -> None:
    task = ToyTask(checkable=False)
    context(task=task).add(ROOT, step("x yes", tokens=(5, 0), stop=Stop.EOS))
    assert task.verified == 0


def test_in_learning_gold_judges_what_the_check_cannot_and_this_is_labelled() -> None:
    ctx = context(task=ToyTask(checkable=False), learning=True)
    node, _ = ctx.add(ROOT, step("x yes", tokens=(5, 0), stop=Stop.EOS))
    assert ctx.wins == [node]
    assert ctx.oracle


def test_in_learning_gold_overrules_a_check_that_is_too_kind() -> None:
    class Kind(ToyTask):
        def check(self, problem: object, answer: str) -> Verdict | None:  # noqa: ARG002
            return Verdict(Status.CORRECT, 1.0)

    ctx = context(task=Kind(), learning=True)
    node, _ = ctx.add(ROOT, step("x no", tokens=(5, 0), stop=Stop.EOS))
    assert ctx.tree.reward[node] == 0.0
    assert ctx.oracle


def test_a_check_that_agrees_with_gold_is_no_oracle() -> None:
    ctx = context(learning=True)
    ctx.add(ROOT, step("x yes", tokens=(5, 0), stop=Stop.EOS))
    assert not ctx.oracle


def test_asking_gold_to_choose_is_labelled() -> None:
    ctx = context(task=ToyTask(checkable=False))
    node, _ = ctx.add(ROOT, step("x yes", tokens=(5, 0), stop=Stop.EOS))
    assert ctx.verify(node).won
    assert ctx.oracle


def test_a_missing_value_head_is_named() -> None:
    ctx = context(value=HeadValue())
    bare = step("a ;")
    node, _ = ctx.add(ROOT, Step(bare.text, bare.token_ids, bare.logprobs, bare.stop))
    with pytest.raises(SearchError, match="no value head"):
        ctx.value(node)


def test_rollouts_are_nodes_of_their_own_kind_and_never_merge() -> None:
    ctx = context(value=RolloutValue())
    a, b = ctx.add_rollout(ROOT, step("a ;")), ctx.add_rollout(ROOT, step("a ;"))
    assert a != b
    assert ctx.usage.discarded == 0
    assert ctx.add(ROOT, step("a ;")) == (3, True)


def test_prefixes_are_built_once_and_match_the_tree() -> None:
    ctx = context()
    a, _ = ctx.add(ROOT, step("a ;", tokens=(5, 6)))
    b, _ = ctx.add(a, step("b ;", tokens=(7,)))
    assert ctx.prefix(b).tolist() == ctx.tree.prefix(b).tolist() == [1, 2, 5, 6, 7]
    assert ctx.prefix(b) is ctx.prefix(b)
    assert ctx.prefix(b).dtype == np.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [({"budget": 0}, "budget"), ({"seed": -1}, "seed"), ({"prior_rule": "exakt"}, "prior_rule"),
     ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p")],
)  # fmt: skip
def test_bad_search_settings_are_refused_with_their_name(change: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {"problem": problem(), "strategy": BestOfN(), "budget": 10, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        Search(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [lambda: ConstantValue(1.5), lambda: RolloutValue(n=0)])
def test_bad_value_settings_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"must lie|need"):
        bad()  # type: ignore[operator]


def test_a_finished_answer_that_nobody_judged_has_the_value_of_the_step_before() -> None:
    class Silent(ToyTask):
        def check(self, problem: Problem, answer: str) -> None:  # type: ignore[override]  # noqa: ARG002
            return None

    ctx = context(task=Silent(), value=HeadValue(), check_steps=False)
    before, _ = ctx.add(ROOT, step("a ;"))
    ids = np.array([7, 0], dtype=np.int32)
    node, _ = ctx.add(before, Step("b", ids, np.zeros(2, dtype=np.float32), Stop.EOS))  # EOS is not forwarded: no value
    ctx.tree.close(node, None, "b")
    assert math.isnan(ctx.tree.reward[node])
    assert ctx.value(node) == ctx.value(before) == pytest.approx(0.4)
