"""Stored trees scored with newer weights: equal to the naive loop, beside the shards, once."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcts.engines.model import Policy
from mcts.engines.torch_engine import TorchEngine
from mcts.policy import set_targets
from mcts.search import Driver, Search
from mcts.strategies import build
from mcts.tree import Tree
from mcts.types import Problem, SearchResult, Status, Verdict
from selfplay.objectives import Models
from selfplay.reanalyse import Scorer, back_up, fresh_traces, rescore, retarget, side_nodes
from selfplay.shards import ShardError, commit, iter_batches, iter_traces, shard_path, write_pending
from selfplay.side_rows import find_side, join, side_path
from selfplay.store import Fenced, Place, Store
from selfplay.traces import Trace, from_row, to_row
from selfplay.tree_rows import nodes_of, tree_of
from tests.mcts.toy import ToyTask, problem
from tests.models import make_policy
from tests.selfplay.learning import step
from tests.selfplay.trace_samples import METADATA, context

WORDS = ["problem", ":", ";", "yes", "no", "a", "b", *map(str, range(4))]
STRATEGIES = {
    "mcts": build("mcts", simulations=10),
    "harvest": build("mcts", commit="never", simulations=0, expand=1, c_visit=20.0, c_scale=0.2),
    "gumbel": build("gumbel", simulations=8, m=4),
    "index": build("index"),
    "best_of_n": build("best_of_n", n=4),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def policy_of(seed: int = 0) -> Policy:
    return make_policy(seed=seed, vocabulary=WORDS)


class Task(ToyTask):
    """A random model may end at once: that is no answer."""

    def answer(self, problem: Problem, steps: Sequence[str]) -> str | None:
        return super().answer(problem, steps) if steps[-1].strip() else None


def played(policy: Policy, strategy: str = "mcts", **settings: Any) -> list[SearchResult]:
    """Searches of a random model; their trees hold wins, losses, open ends, and answers that nobody judged."""
    engine = TorchEngine(policy, ";", rows=32, kv_slots=4096)
    searches = [
        Search(problem(i), STRATEGIES[strategy], 120, i, learning=i % 2 == 0, check_steps=False, **settings)
        for i in range(4)
    ]
    return sorted(Driver(engine, Task(max_steps=5, checkable=False)).run(searches), key=lambda result: result.seed)


def traces_of(results: list[SearchResult]) -> list[Trace]:
    return [from_row(to_row(result, context())) for result in results]


def scorer_of(policy: Policy, version: int = 7, *, tree_mask: bool = True, weights: str = "abc") -> Scorer:
    return Scorer(Models(policy, None, 300, 64, 40, tree_mask=tree_mask), version, weights)


def column(nodes: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.asarray([math.nan if node[name] is None else node[name] for node in nodes], dtype=np.float64)


@pytest.mark.parametrize("tree_mask", [True, False])
@pytest.mark.parametrize("rule", ["exact", "draws"])
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_the_weights_that_played_reproduce_the_trace(strategy: str, rule: str, tree_mask: bool) -> None:
    policy = policy_of()
    traces = traces_of(played(policy, strategy, prior_rule=rule))
    targets = 0
    for trace, side in zip(traces, scorer_of(policy, tree_mask=tree_mask).rows(traces), strict=True):
        assert side["trace_id"] == trace.trace_id
        assert (side["policy_version"], side["value_version"], side["error"]) == (7, 7, None)
        for name in ("raw_value", "prior", "value_sum", "target"):
            wanted = column(trace.nodes, name)
            tolerance = 1e-4 * np.maximum(1, column(trace.nodes, "visits")) if name == "value_sum" else 1e-4
            np.testing.assert_array_equal(np.isnan(column(side["nodes"], name)), np.isnan(wanted), err_msg=name)
            assert np.all(np.nan_to_num(np.abs(column(side["nodes"], name) - wanted)) < tolerance), name
        for stored, fresh in zip(trace.nodes[1:], side["nodes"][1:], strict=True):
            np.testing.assert_allclose(fresh["logprobs"], stored["logprobs"], atol=1e-4)
        assert side["nodes"][0]["logprobs"] is None
        targets += int((~np.isnan(column(side["nodes"], "target"))).sum())
    assert bool(targets) == (strategy != "best_of_n")


@torch.inference_mode()
def naive(policy: Policy, tree: Tree) -> tuple[list[np.ndarray | None], list[float]]:
    """Log-probabilities and value of every node, by one plain forward over each node's path."""
    assert policy.head is not None
    logprobs: list[np.ndarray | None] = []
    values = []
    for node, drawn in enumerate(tree.steps):
        ids = torch.from_numpy(tree.prefix(node).astype(np.int64))[None]
        hidden = policy.hidden(ids)[0]
        values.append(float(policy.head(hidden[-1])))
        size = 0 if drawn is None else len(drawn.token_ids)
        chosen = torch.log_softmax(policy.unembed(hidden), -1)[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
        logprobs.append(chosen[len(chosen) - size :] if size else None)
    return logprobs, values


@pytest.mark.parametrize("tree_mask", [True, False])
@pytest.mark.parametrize("strategy", ["mcts", "index"])
def test_newer_weights_equal_a_naive_loop_over_paths(strategy: str, tree_mask: bool) -> None:
    newer = policy_of(1)
    traces = traces_of(played(policy_of(0), strategy))
    moved = 0.0
    for trace, side in zip(traces, scorer_of(newer, tree_mask=tree_mask).rows(traces), strict=True):
        tree, wanted = trace.tree, tree_of(trace.nodes)
        logprobs, values = naive(newer, tree)
        parent = tree.parent

        def value(node: int, tree: Tree = tree, values: list[float] = values) -> float:
            """What the search would have backed up."""
            if not math.isnan(tree.reward[node]):
                return tree.reward[node]
            return values[tree.parent[node]] if math.isnan(tree.raw_value[node]) else values[node]

        wanted.value_sum = [0.0] * len(tree)
        for node in range(len(tree)):
            if not math.isnan(tree.raw_value[node]):
                wanted.raw_value[node] = values[node]
            if logprobs[node] is not None:
                wanted.prior[node] = float(np.exp(logprobs[node].sum()))  # type: ignore[union-attr]
                np.testing.assert_allclose(side["nodes"][node]["logprobs"], logprobs[node], atol=1e-4)
            evaluations = tree.visits[node] - sum(tree.visits[c] for c in tree.children[node])
            above = node
            while evaluations and above >= 0:
                wanted.value_sum[above] += evaluations * value(node)
                above = parent[above]
        wanted.target = [math.nan] * len(tree)
        set_targets(wanted)
        for name in ("raw_value", "prior", "value_sum", "target"):
            np.testing.assert_allclose(column(side["nodes"], name), column(nodes_of(wanted), name), atol=1e-3)
        moved += float(np.nansum(np.abs(column(side["nodes"], "target") - column(trace.nodes, "target"))))
    assert moved > 0.1


def small_tree() -> Tree:
    """Prompt -> 1 (head .5) -> {2 won, backed up twice; 3 ended without a verdict}; prompt -> 4 (head .25)."""
    tree = Tree(np.asarray([5], dtype=np.int32))
    for parent, prior in ((0, 0.5), (1, 0.5), (1, 0.25), (0, 0.25)):
        tree.add(parent, step([8]), prior=prior)
    tree.close(2, Verdict(Status.CORRECT, 1.0))
    tree.close(3, Verdict(Status.TIMEOUT, 0.0))
    tree.raw_value = [0.75, 0.5, math.nan, math.nan, 0.25]
    for node, value in ((1, 0.5), (2, 1.0), (2, 1.0), (3, 0.5), (4, 0.25)):
        tree.backup(node, value)
    return tree


def test_evaluations_by_the_head_are_backed_up_anew_and_rewards_stay() -> None:
    old, new = small_tree(), small_tree()
    new.raw_value = [0.75, 0.125, math.nan, math.nan, 1.0]
    back_up(old, new)
    # 1: .125 + two wins + .125 of its ending without a verdict; the prompt: all of it and node 4's 1
    assert new.value_sum == [3.25, 2.25, 2.0, 0.125, 1.0]
    assert new.visits == old.visits


def test_what_was_backed_up_otherwise_stays() -> None:
    old, new = small_tree(), small_tree()
    old.value_sum[4] += 0.5  # no value of the head: a discount, a bonus, a rollout
    old.value_sum[0] += 0.5
    new.raw_value = [0.0, 0.0, math.nan, math.nan, 0.0]
    back_up(old, new)
    assert new.value_sum == [2.75, 2.0, 2.0, 0.0, 0.75]


def trace_with(tree: Tree, **settings: Any) -> Trace:
    (result,) = played(policy_of())[:1]
    row = to_row(result, context())
    trace = from_row({**row, "nodes": nodes_of(tree)})
    trace.__dict__["settings"] = {**trace.settings, **settings}
    return trace


def test_a_constant_value_is_no_weights() -> None:
    tree = small_tree()
    values = np.zeros(3, dtype=np.float32)
    ids = np.full(4, -1.0, dtype=np.float32)
    for source, wanted in (("head", [2.0, 2.0, 2.0, 0.0, 0.0]), ("constant", tree.value_sum)):
        nodes = side_nodes(trace_with(tree, value={"name": source}), ids, values)
        assert [node["value_sum"] for node in nodes] == wanted


def test_a_step_of_several_tokenisations_keeps_their_shares() -> None:
    tree = Tree(np.asarray([5], dtype=np.int32))
    tree.add(0, step([8, 9], [math.log(0.5), math.log(0.5)]), prior=0.25)
    tree.add(0, step([10], [math.log(0.125)]), prior=0.25)  # its other spelling was drawn too
    fresh = np.log(np.asarray([0.5, 0.25, 0.25], dtype=np.float32))
    nodes = side_nodes(trace_with(tree), fresh, np.zeros(0, dtype=np.float32))
    assert [node["prior"] for node in nodes[1:]] == pytest.approx([0.125, 0.5], rel=1e-6)
    under_draws = side_nodes(trace_with(tree, prior_rule="draws"), fresh, np.zeros(0, dtype=np.float32))
    assert [node["prior"] for node in under_draws[1:]] == [0.25, 0.25]


def test_targets_of_another_rule_are_left_alone() -> None:
    old, new = small_tree(), small_tree()
    set_targets(old, c_visit=20.0)
    new.value_sum[2] = 0.0
    retarget(old, new, {"strategy": {"c_visit": 20.0}})
    assert not math.isnan(new.target[2])
    assert new.target[2] != old.target[2]
    retarget(old, new, {"strategy": {"c_visit": 50.0}})
    assert all(math.isnan(target) for target in new.target)


def store_of(run: Path) -> Store:
    """A store on a bare folder, as the driver that holds it would have it."""
    (run / "pending" / "epoch-00001").mkdir(parents=True, exist_ok=True)
    return Place(str(run), "run-1", 1).open()


def write_shard(run: Path, results: list[SearchResult], iteration: int = 1, part: int = 0) -> Path:
    pending, final = run / "pending" / "p.arrow", shard_path(run, iteration, part)
    write_pending(pending, [to_row(r, context(iteration=iteration)) for r in results], METADATA)
    commit(pending, final)
    return final


def test_a_side_file_is_made_once_and_joined_to_its_traces(tmp_path: Path) -> None:
    newer = policy_of(1)
    shard = write_shard(tmp_path, played(policy_of(0)))
    before = shard.read_bytes()
    assert find_side(shard, "latest") is None
    assert [t.trace_id for t in iter_traces(tmp_path, reanalysed="latest")] == [t.trace_id for t in iter_traces(shard)]
    with pytest.raises(ShardError, match="was not scored by checkpoint 7"):
        list(iter_traces(tmp_path, reanalysed=7))
    assert rescore(store_of(tmp_path), shard, scorer_of(newer)) is True
    side = side_path(shard, 7)
    assert side == tmp_path / "reanalysis" / "version=00007" / "iteration=00001" / "part-00000.arrow"
    content = side.read_bytes()
    assert rescore(store_of(tmp_path), shard, scorer_of(policy_of(2))) is False  # it is there: nothing is computed
    assert side.read_bytes() == content
    assert shard.read_bytes() == before
    assert list((tmp_path / "pending" / "epoch-00001").iterdir()) == []
    rescore(store_of(tmp_path), shard, scorer_of(policy_of(2), 12))
    stored = list(iter_traces(tmp_path))
    for version, wanted in ((7, newer), ("latest", policy_of(2))):
        rows = scorer_of(wanted).rows(stored)
        for trace, row, plain in zip(iter_traces(tmp_path, reanalysed=version), rows, stored, strict=True):  # type: ignore[arg-type]
            assert trace.value_version == (7 if version == 7 else 12)
            assert trace.policy_version == plain.policy_version
            for name in ("raw_value", "value_sum", "prior", "target"):
                np.testing.assert_array_equal(column(trace.nodes, name), column(row["nodes"], name))
            assert [n["visits"] for n in trace.nodes] == [n["visits"] for n in plain.nodes]


def test_a_joined_step_keeps_the_log_probabilities_of_its_drawing() -> None:
    newer = policy_of(1)
    for settings, kept in (({}, True), ({"top_p": 0.5}, False)):
        for trace, side in zip(t := traces_of(played(policy_of(0))), scorer_of(newer).rows(t), strict=True):
            plain = {**trace.row, "nodes": [{**n, "behavior_logprobs": None} for n in trace.nodes]}
            if settings:
                plain["settings"] = plain["settings"].replace('"top_p":1.0', '"top_p":0.5')
            for before, after in zip(trace.nodes[1:], from_row(join(plain, side)).nodes[1:], strict=True):
                assert after["logprobs"] != before["logprobs"]
                assert after["behavior_logprobs"] == (before["logprobs"] if kept else None)


def test_a_damaged_or_foreign_side_file_is_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, played(policy_of(0)))
    other = write_shard(tmp_path, played(policy_of(1), "gumbel"), part=1)
    rescore(store_of(tmp_path), shard, scorer_of(policy_of(1)))
    side = side_path(shard, 7)
    with pytest.raises(ShardError, match="made with other weights than those of checkpoint 7; delete it"):
        rescore(store_of(tmp_path), shard, scorer_of(policy_of(2), weights="xyz"))
    side_path(other, 7).write_bytes(side.read_bytes())
    with pytest.raises(ShardError, match=r"does not belong to shard .*part-00001"):
        list(iter_traces(other, reanalysed=7))
    flipped = bytearray(side.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    side.write_bytes(flipped)
    with pytest.raises(ShardError, match="damaged"):
        list(iter_traces(shard, reanalysed=7))


def test_of_two_that_score_a_shard_at_once_one_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shard(tmp_path, played(policy_of(0)))
    scorer, first, second = scorer_of(policy_of(1)), store_of(tmp_path), store_of(tmp_path)
    offer, faster = first.offer, []

    def overtaken(scratch: Path) -> str:
        faster.append(rescore(second, shard, scorer))
        return offer(scratch)

    monkeypatch.setattr(first, "offer", overtaken)
    assert rescore(first, shard, scorer) is False
    assert faster == [True]
    assert sum(batch.num_rows for batch in iter_batches(side_path(shard, 7))) == 4
    assert list((tmp_path / "pending" / "epoch-00001").iterdir()) == []


def test_a_stale_driver_writes_no_side_file(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, played(policy_of(0)))
    store = store_of(tmp_path)
    facts = {"id": store.place.run_id, "epoch": 2}
    (tmp_path / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    (tmp_path / "pending" / "epoch-00001").rename(tmp_path / "pending" / "epoch-00002")
    with pytest.raises(Fenced, match="was taken over by another driver"):
        rescore(store, shard, scorer_of(policy_of(1)))
    assert not side_path(shard, 7).exists()


def test_a_tree_that_cannot_be_scored_says_why_and_stays_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = played(policy_of(0))
    results[1].tree.context[2] = (1,)
    shard = write_shard(tmp_path, results)
    with caplog.at_level(logging.WARNING):
        rescore(store_of(tmp_path), shard, scorer_of(policy_of(1)))
    assert "1 of 4 traces could not be scored again: node 2 was conditioned" in caplog.text
    stored, joined = list(iter_traces(shard)), list(iter_traces(shard, reanalysed=7))
    assert joined[1].row == stored[1].row
    assert joined[0].row != stored[0].row


def test_only_traces_of_older_weights_are_scored_again(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path, played(policy_of(0)), iteration) for iteration in (1, 2)]
    same = list(fresh_traces(store_of(tmp_path), shards, scorer_of(policy_of(0), version=0)))
    assert [t.row for t in same] == [t.row for t in iter_traces(tmp_path)]
    assert not (tmp_path / "reanalysis").exists()
    fresh = list(fresh_traces(store_of(tmp_path), shards, scorer_of(policy_of(1), version=1)))
    assert [t.value_version for t in fresh] == [1] * 8
    assert all(side_path(shard, 1).exists() for shard in shards)


def test_threads_change_no_bit() -> None:
    traces = traces_of(played(policy_of(0)))
    one, two = (
        Scorer(Models(policy_of(1), None, 60, 64, 40), 7, "abc", threads=threads).rows(traces) for threads in (1, 2)
    )
    assert one == two
