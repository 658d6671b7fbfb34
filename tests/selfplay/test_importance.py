"""Imitated steps that other weights drew count by their importance ratio, and by nothing that is not known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mcts.engines.model import Policy
from mcts.tree import Tree
from mcts.types import Kind, Status, Step, Stop, Verdict
from selfplay.behavior import drawn_plainly
from selfplay.errors import UserError
from selfplay.executor import check_parts
from selfplay.forward import forward, token_logprobs
from selfplay.learner import Budget, Learner, LearnerSettings
from selfplay.objectives import AlphaZero, Models, Need, ObjectiveError, Sft, build_objective
from selfplay.objectives.loss import Totals
from selfplay.packing import chain, pack
from tests.selfplay.learning import FakeTrace, gradients, random_tree, tiny_policy
from tests.selfplay.tiny_run import tiny_config

PLAIN = {"temperature": 1.0, "top_p": 1.0}
LOG2 = math.log(2.0)


def logprobs_of(policy: Policy, tree: Tree, node: int) -> np.ndarray:
    ids = tree.prefix(node)
    found = token_logprobs(policy, [chain(ids, nll_weight=np.ones(len(ids)))], tokens=1000)[0]
    step = tree.steps[node]
    assert step is not None
    return found[len(ids) - len(step.token_ids) :]


def drawn(tree: Tree, node: int, logprobs: np.ndarray | None, behavior: np.ndarray | None = None) -> None:
    """Say how the step of `node` was drawn."""
    step = tree.steps[node]
    assert step is not None
    known = np.full(len(step.token_ids), np.nan, np.float32) if logprobs is None else logprobs
    tree.steps[node] = Step(step.text, step.token_ids, known, step.stop, step.value, behavior)


def own_tree(policy: Policy, seed: int = 0, nodes: int = 12) -> Tree:
    """A random tree whose steps the policy itself drew."""
    tree = random_tree(np.random.default_rng(seed), nodes)
    for node in range(1, len(tree)):
        drawn(tree, node, logprobs_of(policy, tree, node))
    return tree


def loss_of(policy: Policy, objective: Any, traces: list[FakeTrace], **limits: Any) -> tuple[Any, dict[str, Any]]:
    items = objective.prepare(traces, Models(policy, None, **{"max_length": 64, **limits}), np.random.default_rng(0))
    packed = pack(items)
    return objective.loss(forward(policy, packed), packed, Totals.of(items))


@pytest.mark.parametrize("cap", [1.0, 2.0])
@pytest.mark.parametrize("rule", ["step", "path"])
def test_on_policy_every_ratio_is_one_and_the_loss_that_of_imitation(rule: str, cap: float) -> None:
    policy = tiny_policy()
    traces = [FakeTrace(own_tree(policy, s), problem_id=str(s), settings=PLAIN) for s in range(4)]
    plain, weighed = Sft(), Sft(importance=rule, importance_cap=cap)
    wanted, _ = loss_of(policy, plain, traces)
    loss, parts = loss_of(policy, weighed, traces)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert float(parts["importance_ratio"]) == pytest.approx(1.0, abs=1e-4)
    ours = gradients(policy, lambda: loss_of(policy, weighed, traces)[0])
    theirs = gradients(policy, lambda: loss_of(policy, plain, traces)[0])
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)
    assert any(bool(g.any()) for g in ours.values())


def stale_tree(policy: Policy, moved: tuple[float, float, float]) -> tuple[Tree, list[float]]:
    """Prompt -> 1 -> {2 won, 3 won}; since it was drawn the steps' log-probabilities rose by `moved`. With their
    log-probabilities now."""
    tree = Tree(np.asarray([5, 6, 7], dtype=np.int32))
    for parent, ids in ((0, [8, 9]), (1, [10]), (1, [11, 12, 13])):
        ids = np.asarray(ids, dtype=np.int32)
        tree.add(parent, Step("w", ids, np.zeros(len(ids), np.float32), Stop.DELIMITER))
    for node in (2, 3):
        tree.close(node, Verdict(Status.CORRECT, 1.0))
    now = []
    for node, rise in zip((1, 2, 3), moved, strict=True):
        logprobs = logprobs_of(policy, tree, node)
        now.append(float(logprobs.sum()))
        drawn(tree, node, logprobs - np.float32(rise / len(logprobs)))
    return tree, now


# ratios 2, 1/4 and 8 of the steps; 2 x 1/4 and 2 x 8 of the paths; two wins pass step 1; 2 x 2 + 1 + 3 tokens
@pytest.mark.parametrize(
    ("rule", "cap", "weights", "ratio", "capped"),
    [
        ("step", 3.0, (2 * 2.0, 0.25, 3.0), (2.0 + 0.25 + 3.0) / 3, 1 / 3),
        ("step", 9.0, (2 * 2.0, 0.25, 8.0), (2.0 + 0.25 + 8.0) / 3, 0.0),
        ("step", 1.0, (2 * 1.0, 0.25, 1.0), (1.0 + 0.25 + 1.0) / 3, 2 / 3),
        ("path", 3.0, (0.5 + 3.0, 0.5, 3.0), (0.5 + 3.0) / 2, 1 / 2),
        ("path", 20.0, (0.5 + 16.0, 0.5, 16.0), (0.5 + 16.0) / 2, 0.0),
    ],
)
def test_hand_worked_ratios_of_steps_and_paths(
    rule: str, cap: float, weights: tuple[float, ...], ratio: float, capped: float
) -> None:
    policy = tiny_policy()
    tree, now = stale_tree(policy, (LOG2, -2 * LOG2, 3 * LOG2))
    objective = Sft(importance=rule, importance_cap=cap)
    loss, parts = loss_of(policy, objective, [FakeTrace(tree, settings=PLAIN)])
    wanted = -sum(w * logprob for w, logprob in zip(weights, now, strict=True)) / 8
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-4)
    assert float(parts["importance_ratio"]) == pytest.approx(ratio, rel=1e-4)
    assert float(parts["importance_capped"]) == pytest.approx(capped)


@pytest.mark.parametrize("rule", ["step", "path"])
def test_no_gradient_flows_through_a_ratio(rule: str) -> None:
    policy = tiny_policy()
    tree, _ = stale_tree(policy, (LOG2, -2 * LOG2, LOG2))
    trace = FakeTrace(tree, settings=PLAIN)
    objective = Sft(importance=rule, importance_cap=64.0)
    ours = gradients(policy, lambda: loss_of(policy, objective, [trace])[0])
    weights = {"step": (4.0, 0.25, 2.0), "path": (0.5 + 4.0, 0.5, 4.0)}[rule]

    def weighed() -> torch.Tensor:
        loss = torch.zeros(())
        for node, weight in zip((1, 2, 3), weights, strict=True):
            ids = tree.prefix(node)
            mask = np.zeros(len(ids), dtype=np.float32)
            mask[len(ids) - len(tree.steps[node].token_ids) :] = weight / 8  # type: ignore[union-attr]
            packed = pack([chain(ids, nll_weight=mask)])
            loss = loss - (packed.nll_weight * forward(policy, packed).logprobs).sum()
        return loss

    for name, gradient in gradients(policy, weighed).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rule", ["step", "path"])
def test_cutting_splitting_and_batching_change_no_ratio(rule: str) -> None:
    policy = tiny_policy()
    traces = [FakeTrace(own_tree(tiny_policy(seed=1), s, 20), problem_id=str(s), settings=PLAIN) for s in range(3)]
    objective = Sft(importance=rule, importance_cap=1.5)
    whole, parts = loss_of(policy, objective, traces)
    assert 0.0 < float(parts["importance_capped"]) < 1.0
    for limits in ({"tree_mask": False}, {"max_length": 24}):
        loss, found = loss_of(policy, objective, traces, **limits)
        assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-4)
        assert float(found["importance_ratio"]) == pytest.approx(float(parts["importance_ratio"]), rel=1e-4)
    items = objective.prepare(traces, Models(policy, None, max_length=64), np.random.default_rng(0))
    totals = Totals.of(items)
    summed = 0.0
    for batch in (items[:1], items[1:]):
        packed = pack(batch)
        summed += float(objective.loss(forward(policy, packed), packed, totals)[0].detach())
    assert summed == pytest.approx(float(whole.detach()), rel=1e-5)


def test_the_distribution_drawn_from_counts_where_it_was_another() -> None:
    policy = tiny_policy()
    tree, now = stale_tree(policy, (0.0, 0.0, 0.0))
    for node in (1, 2, 3):
        logprobs = logprobs_of(policy, tree, node)
        drawn(tree, node, logprobs, logprobs - np.float32(LOG2 / len(logprobs)))
    loss, _ = loss_of(policy, Sft(importance="step", importance_cap=4.0), [FakeTrace(tree, settings={"top_p": 0.5})])
    assert float(loss.detach()) == pytest.approx(-2 * (2 * now[0] + now[1] + now[2]) / 8, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "logprobs", "behavior"),
    [
        (PLAIN, None, None),
        ({"temperature": 0.7, "top_p": 1.0}, 0.0, None),
        ({"temperature": 1.0, "top_p": 0.9}, 0.0, None),
        ({**PLAIN, "strategy": {"temperature": 0.7}}, 0.0, None),
        (PLAIN, 0.0, math.nan),
    ],
)
def test_unknown_behavior_is_an_error_and_no_ratio_of_one(
    settings: dict[str, Any], logprobs: float | None, behavior: float | None
) -> None:
    policy = tiny_policy()
    tree, _ = stale_tree(policy, (0.0, 0.0, 0.0))
    drawn(
        tree,
        3,
        None if logprobs is None else np.full(3, logprobs, np.float32),
        None if behavior is None else np.full(3, behavior, np.float32),
    )
    trace = FakeTrace(tree, problem_id="p9", iteration=4, settings=settings)
    with pytest.raises(UserError, match=r"problem p9, iteration 4: node [13] has no behaviour log-probabilities"):
        loss_of(policy, Sft(importance="path"), [trace])
    assert loss_of(policy, Sft(), [trace])[1].keys() == {"nll"}  # who needs none asks for none


def test_rollouts_are_drawn_as_their_value_source_says() -> None:
    assert drawn_plainly(PLAIN, Kind.STEP)
    assert not drawn_plainly(PLAIN, Kind.ROLLOUT)  # greedy unless told
    assert drawn_plainly({**PLAIN, "value": {"name": "rollout", "temperature": 1.0}}, Kind.ROLLOUT)
    assert not drawn_plainly({**PLAIN, "strategy": {"temperature": 0.0}}, Kind.STEP)
    assert drawn_plainly({**PLAIN, "strategy": {"temperature": None}}, Kind.STEP)


def test_objectives_say_that_they_need_the_behavior() -> None:
    assert Sft(importance="step").needs == {Need.BEHAVIOR}
    assert AlphaZero(importance="path").needs == {Need.VALUE_HEAD}  # it imitates nothing
    assert AlphaZero(nll=0.5, importance="path").needs == {Need.VALUE_HEAD, Need.BEHAVIOR}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"importance": "tree"}, "none, step, path"),
        ({"importance": "step", "importance_cap": 0.5}, "at least 1"),
    ],
)
def test_a_bad_importance_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ObjectiveError, match=sentence):
        build_objective("sft", **settings)


def test_a_server_that_does_not_tell_its_odds_is_refused_before_anything_is_played() -> None:
    server = "engine={kind: server, server: {url: 'http://127.0.0.1:9', model: m, tokenizer: t}}"
    bent = "play.search.temperature=0.7"
    check_parts(tiny_config("learn.objective={name: sft, importance: step}", server))
    check_parts(tiny_config("learn.objective={name: sft}", server, bent))
    with pytest.raises(UserError, match=r"set play\.search\.temperature and top_p to 1"):
        check_parts(tiny_config("learn.objective={name: sft, importance: step}", server, bent))


def test_the_learner_reports_ratios_where_they_are_used_and_how_stale_its_traces_are() -> None:
    policy = tiny_policy()
    tree, _ = stale_tree(policy, (LOG2, LOG2, LOG2))
    traces = [
        FakeTrace(tree, problem_id=str(n), iteration=3, policy_version=version, settings=PLAIN)
        for n, version in enumerate((3, 2, 2, 0))
    ]
    settings = LearnerSettings(items_per_step=4, batch_tokens=128, max_length=64, threads=1)
    found = Learner(policy, Sft(importance="step", importance_cap=8.0), settings).learn(4, traces, Budget(steps=1))
    assert found["importance_ratio"] == pytest.approx(2.0, rel=1e-3)
    assert found["importance_capped"] == 0.0
    assert found["trained_staleness"] == (0 + 1 + 1 + 3) / 4
    plain = Learner(tiny_policy(), Sft(), settings).learn(4, traces, Budget(steps=1))
    assert "importance_ratio" not in plain
