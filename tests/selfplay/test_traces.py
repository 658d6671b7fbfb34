"""A search and its row say the same."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcts.tree import COLUMNS, Tree
from mcts.types import Problem, SearchResult
from selfplay.shards import iter_rows, iter_traces, write_pending
from selfplay.traces import Trace, from_row, to_row, trace_id
from selfplay.tree_rows import clean, tree_of
from tests.selfplay.trace_samples import METADATA, context, lost_search, random_search, won_search


def same_tree(left: Tree, right: Tree) -> None:
    """Equal but for what the format does not hold (a verdict's `why`, moves played)."""
    for name, dtype in COLUMNS.items():
        np.testing.assert_array_equal(
            np.asarray(getattr(left, name), dtype), np.asarray(getattr(right, name), dtype), err_msg=name
        )
    np.testing.assert_array_equal(left.prompt_ids, right.prompt_ids)
    assert clean(left.prompt_text) == right.prompt_text
    assert left.children == right.children
    assert left.kind == right.kind
    assert left.context == right.context
    assert [a and clean(a) for a in left.answer] == right.answer
    assert [v and v.status for v in left.verdict] == [v and v.status for v in right.verdict]
    for a, b in zip(left.steps[1:], right.steps[1:], strict=True):
        assert a is not None
        assert b is not None
        assert (clean(a.text), a.stop) == (b.text, b.stop)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert (a.behavior_logprobs is None) == (b.behavior_logprobs is None)
        assert b.token_ids.dtype == np.int32
        assert b.logprobs.dtype == np.float32
        np.testing.assert_equal(np.float32(a.value), np.float32(b.value))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 25)), min_size=1, max_size=4))
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, shapes: Any) -> None:
    results = [random_search(seed, size) for seed, size in shapes]
    rows = [to_row(r, context(group="g", value_version=3)) for r in results]
    path = tmp_path_factory.mktemp("shard") / "a.arrow"
    write_pending(path, rows, METADATA)
    assert list(iter_rows(path)) == rows
    for result, trace in zip(results, iter_traces(path), strict=True):
        same_tree(result.tree, trace.tree)
        trace.tree.check()
        back = trace.to_result()
        assert to_row(back, context(group="g", value_version=3)) == trace.row
        same = ("strategy", "usage", "seed", "policy_version", "ended", "oracle", "error", "seconds")
        assert [getattr(back, n) for n in same] == [getattr(result, n) for n in same]
        assert back.candidates == result.candidates
        assert back.problem.meta == result.problem.meta


def test_never_computed_is_null_in_a_row_and_nan_in_a_tree() -> None:
    result = won_search()
    result.tree.prior[1] = math.nan
    node = to_row(result, context())["nodes"]
    assert node[0]["raw_value"] is None
    assert node[1]["prior"] is None
    assert node[1]["reward"] is None
    assert node[1]["logprobs"] == [-0.5] * 9
    assert node[0]["logprobs"] is None
    tree = tree_of(node)
    assert math.isnan(tree.prior[1])
    assert math.isnan(tree.raw_value[0])


def test_log_probabilities_that_an_engine_cannot_give_are_null() -> None:
    result = won_search()
    step = result.tree.steps[1]
    assert step is not None
    step.logprobs[:] = math.nan
    row = to_row(result, context())
    assert row["nodes"][1]["logprobs"] is None
    assert np.isnan(Trace(row).tree.steps[1].logprobs).all()  # type: ignore[union-attr]


def test_id_follows_from_settings_seed_iteration_problem_and_attempt_and_nothing_else() -> None:
    base = to_row(won_search(), context())["trace_id"]
    other = to_row(won_search(sampled=99, seconds=9.0), context(split="dev", group="g"))["trace_id"]
    assert base == other == trace_id("c0ffee", 2**64 - 1, 1, "q0", 0)
    changed = [
        to_row(won_search(), context(config_hash="d")),
        to_row(won_search(), context(seed=1)),
        to_row(won_search(), context(iteration=2)),
        to_row(won_search("q1"), context()),
        to_row(won_search(), context(attempt=1)),
    ]
    assert len({base, *(row["trace_id"] for row in changed)}) == 6
    assert trace_id("a", 1, 2, "3", 4) != trace_id("a", 12, 3, "", 4)


def test_solution_is_the_text_of_a_verified_win_only() -> None:
    row = to_row(won_search(), context(joiner=" "))
    assert row["solution"] == "7 * 3 = 21 | 12 21 ; 21 + 12 = 33"
    assert row["path"] == [0, 1, 3]
    assert to_row(won_search(), context())["solution"] == "7 * 3 = 21 | 12 21 ;21 + 12 = 33"
    row = to_row(lost_search(), context(joiner=" "))
    assert row["solution"] is None
    assert row["path"] == [0, 1, 2]


def test_path_holds_the_moves_played_where_nothing_was_chosen() -> None:
    result = dataclasses.replace(lost_search(), chosen=None, answer=None, verdict=None)
    assert to_row(result, context())["path"] == []
    result.tree.played = [0, 1]
    row = to_row(result, context())
    assert row["path"] == [0, 1]
    assert (row["verdict"], row["reward"], row["solution"]) == (None, None, None)


def test_a_seed_keeps_all_its_64_bits() -> None:
    row = to_row(won_search(), context())
    assert row["seed"] == -1
    assert from_row(row).seed == 2**64 - 1


def test_chat_prompts_and_the_oracle_mark_survive() -> None:
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    plain = won_search()
    chat = dataclasses.replace(plain, problem=Problem("q0", messages), oracle=True)
    back = from_row(to_row(chat, context())).to_result()
    assert back.problem.prompt == messages
    assert back.oracle
    looks_like_chat = dataclasses.replace(plain, problem=Problem("q0", '[{"role":"user"}]'))
    back = from_row(to_row(looks_like_chat, context())).to_result()
    assert back.problem.prompt == '[{"role":"user"}]'
    assert not back.oracle


def test_text_that_no_file_can_hold_is_marked_instead_of_lost() -> None:
    result = dataclasses.replace(won_search(), answer="3\ud8003")
    assert to_row(result, context())["answer"] == "3\ufffd3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: dataclasses.replace(r, settings={"temperature": math.nan}), "plain JSON"),
        (lambda r: dataclasses.replace(r, settings={"task": object()}), "plain JSON"),
        (lambda r: _short_logprobs(r), "node 1 has 9 tokens and 2 log-probabilities"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_row(change(won_search()), context())


def _short_logprobs(result: SearchResult) -> SearchResult:
    step = result.tree.steps[1]
    assert step is not None
    result.tree.steps[1] = dataclasses.replace(step, logprobs=step.logprobs[:2])
    return result


@pytest.mark.parametrize("parent", [-1, 3, 99])
def test_nodes_that_are_no_tree_are_refused(parent: int) -> None:
    nodes = to_row(won_search(), context())["nodes"]
    nodes[3]["parent"] = parent
    with pytest.raises(ValueError, match="node 3 has parent"):
        tree_of(nodes)


def test_a_column_that_was_not_read_is_named(tmp_path: Path) -> None:
    write_pending(tmp_path / "a.arrow", [to_row(won_search(), context())], METADATA)
    (trace,) = iter_traces(tmp_path / "a.arrow", columns=["trace_id"])
    assert trace.trace_id
    for name in ("prompt", "meta", "won", "tree", "seed", "usage"):
        with pytest.raises(KeyError, match="was not read"):
            getattr(trace, name)
