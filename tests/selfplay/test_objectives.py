"""What trees teach: targets, labels, wins; and what they must not teach."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mcts.policy import set_targets
from mcts.tasks.base import Example
from mcts.tree import Tree
from mcts.types import Problem, Status, Verdict
from selfplay.forward import forward, token_logprobs
from selfplay.items import ExampleEncoder, ValueRule, from_tree, policy_groups, value_labels
from selfplay.objectives import AlphaZero, Models, Need, ObjectiveError, Sft, build_objective
from selfplay.objectives.loss import Totals, k3
from selfplay.objectives.wins import pick_wins
from selfplay.packing import chain, pack
from tests.selfplay.learning import EOS, FakeTrace, gradients, random_tree, step, tiny_policy

WON, LOST = Verdict(Status.CORRECT, 1.0), Verdict(Status.WRONG, 0.0)


def policy_logprob(policy, tree: Tree, node: int) -> np.ndarray:
    ids = tree.prefix(node)
    found = token_logprobs(policy, [chain(ids, nll_weight=np.ones(len(ids)))], tokens=1000)[0]
    return found[len(ids) - len(tree.steps[node].token_ids) :]


def searched_tree(policy, value: float | None = 0.5, *, draws: bool = False) -> Tree:
    """A prompt with three steps drawn from the policy, priors under the given rule, every child of the same value
    (None: of different ones)."""
    tree = Tree(np.asarray([5, 6, 7], dtype=np.int32))
    for node, ids in enumerate(([8, 9], [10], [11, 12, 13]), start=1):
        tree.add(0, step(ids), draws=node)
        logprobs = policy_logprob(policy, tree, node)
        tree.steps[node] = step(ids, logprobs)
        tree.prior[node] = node / 6 if draws else float(np.exp(logprobs.sum()))
    for node in (1, 2, 3):
        tree.backup(node, 0.25 * node if value is None else value)
    set_targets(tree)
    return tree


def learned(policy, objective, traces):
    models = Models(policy, policy, tokens=1000, max_length=64)
    items = objective.prepare(traces, models, np.random.default_rng(0))
    packed = pack(items)
    loss, parts = objective.loss(forward(policy, packed), packed, Totals.of(items))
    return items, loss, parts


@pytest.mark.parametrize("rule", ["exact", "draws"])
def test_equal_child_values_give_zero_policy_gradient(rule):
    policy = tiny_policy()
    objective = AlphaZero(value=0.0)
    for value, moves in ((0.5, False), (None, True)):
        tree = searched_tree(policy, value, draws=rule == "draws")
        trace = FakeTrace(tree, settings={"prior_rule": rule})
        found = gradients(policy, lambda trace=trace: learned(policy, objective, [trace])[1])
        largest = max(float(g.abs().max()) for g in found.values())
        assert (largest > 1e-2) if moves else (largest < 1e-5)


def test_a_lone_step_teaches_the_policy_nothing():
    policy = tiny_policy()
    tree = Tree(np.asarray([5, 6, 7], dtype=np.int32))
    node = tree.add(0, step([8, 9]), prior=0.2)
    tree.target[node] = 1.0
    tree.close(node, LOST)
    tree.backup(node, 0.0)
    assert policy_groups(tree) == []
    items, _, parts = learned(policy, AlphaZero(), [FakeTrace(tree)])
    assert len(items) == 1
    assert set(parts) == {"value_loss"}


def test_a_node_needs_two_visited_children():
    tree = random_tree(np.random.default_rng(0), 3)
    tree = Tree(np.asarray([5], dtype=np.int32))
    for target in (0.25, 0.75):
        tree.target[tree.add(0, step([8]), prior=0.5)] = target
    tree.backup(1, 0.5)
    assert policy_groups(tree) == []
    tree.backup(2, 0.5)
    [(children, target)] = policy_groups(tree)
    assert children == [1, 2]
    assert target.tolist() == [0.25, 0.75]


def test_cross_entropy_is_that_of_the_policy_renormalised_over_the_siblings():
    policy = tiny_policy()
    tree = searched_tree(policy, None)
    _, loss, parts = learned(policy, AlphaZero(value=0.0), [FakeTrace(tree)])
    sums = np.asarray([tree.steps[n].logprobs.sum() for n in (1, 2, 3)], dtype=np.float64)
    shares = sums - np.log(np.exp(sums).sum())
    wanted = -float((np.asarray(tree.target[1:]) * shares).sum())
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-4)
    assert float(parts["target_kl"]) == pytest.approx(
        wanted + float((np.asarray(tree.target[1:]) * np.log(tree.target[1:])).sum()), rel=1e-3
    )


def test_alphazero_with_imitation_alone_equals_sft():
    policy = tiny_policy()
    traces = [FakeTrace(random_tree(np.random.default_rng(s), 12), problem_id=str(s)) for s in range(4)]
    for settings in ({"value": 0.0}, {"value": 0.5, "value_label": "max"}):
        ours = gradients(policy, lambda s=settings: learned(policy, AlphaZero(policy=0.0, nll=1.0, **s), traces)[1])
        theirs = gradients(policy, lambda s=settings: learned(policy, Sft(**s), traces)[1])
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert any(bool(g.any()) for g in ours.values())


def test_sft_is_the_mean_negative_log_likelihood_of_the_winning_paths():
    policy = tiny_policy()
    tree = searched_tree(policy)
    tree.close(1, WON)
    tree.close(2, LOST)
    tree.close(3, WON)
    _, loss, _ = learned(policy, Sft(), [FakeTrace(tree)])
    wanted = -np.concatenate([tree.steps[1].logprobs, tree.steps[3].logprobs]).mean()
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-5)


def test_a_problem_gives_at_most_so_many_distinct_wins_per_round():
    def trace(iteration, problem, *endings):
        tree = Tree(np.asarray([5], dtype=np.int32))
        for ids in endings:
            tree.close(tree.add(0, step(ids)), WON)
        return FakeTrace(tree, problem_id=problem, iteration=iteration)

    traces = [trace(1, "a", [8], [9]), trace(1, "a", [8], [10]), trace(2, "a", [8]), trace(1, "b", [8])]
    picked = pick_wins(traces, 2, np.random.default_rng(0))
    assert [len(wins) for wins in picked[2:]] == [1, 1]
    assert sum(len(wins) for wins in picked[:2]) == 2
    everything = pick_wins(traces, 9, np.random.default_rng(0))
    assert everything == [[1, 2], [2], [1], [1]]  # [8] was found twice in round 1 and counts once


def labelled_tree() -> Tree:
    """Prompt -> 1 -> {2 won, 3 lost, drawn three times}; prompt -> 4 unfinished; prompt -> 5 timed out."""
    tree = Tree(np.asarray([5], dtype=np.int32))
    tree.add(0, step([8]))
    tree.add(1, step([9]))
    tree.add(1, step([10]), draws=3)
    tree.add(0, step([11]))
    tree.add(0, step([12]))
    tree.close(2, WON)
    tree.close(3, LOST)
    tree.close(5, Verdict(Status.TIMEOUT, 0.0))
    return tree


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (ValueRule.MEAN, [0.25, 0.25, 1.0, 0.0, math.nan, math.nan]),
        (ValueRule.MAX, [1.0, 1.0, 1.0, 0.0, math.nan, math.nan]),
        (ValueRule.OUTCOME, [0.0, 0.0, math.nan, 0.0, math.nan, math.nan]),
    ],
)
def test_value_labels_say_what_came_of_a_node(rule, wanted):
    np.testing.assert_array_equal(value_labels(labelled_tree(), rule, path=[0, 1, 3]), np.float32(wanted))


def test_value_labels_mix_in_the_searchs_own_value():
    tree = labelled_tree()
    tree.backup(1, 0.75)
    labels = value_labels(tree, ValueRule.MEAN, mix=0.5)
    np.testing.assert_allclose(labels[:4], [0.5, 0.5, 1.0, 0.0])


def test_values_are_read_at_the_last_token_of_prompt_and_steps():
    tree = Tree(np.asarray([5, 6, 7], dtype=np.int32))
    tree.close(tree.add(0, step([8, 9])), WON)
    item = from_tree(tree, values=value_labels(tree, ValueRule.MEAN))
    assert item is not None
    assert item.value_token.tolist() == [2, 4]
    assert item.value_label.tolist() == [1.0, 1.0]


def example(**changes) -> Example:
    plain = Example(Problem("p", "w5 w6"), ("w7 w8", "w9"), (0.5, math.nan, 1.0))
    return replace(plain, **changes)


def test_an_example_is_imitated_on_its_steps_and_its_eos_and_labelled_at_their_ends():
    policy = tiny_policy()
    encode = ExampleEncoder(policy.tokenizer)
    [item] = encode([example()])
    assert item.token_ids.tolist() == [5, 6, 7, 8, 9, EOS]
    assert item.nll_weight.tolist() == [0, 0, 1, 1, 1, 1]
    assert item.value_token.tolist() == [1, 5]
    assert item.value_label.tolist() == [0.5, 1.0]
    [negative, unfinished] = encode([example(imitate=False), example(finished=False)])
    assert not negative.nll_weight.any()
    assert unfinished.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert unfinished.value_token.tolist() == [1, 4]


def test_kl_is_zero_at_the_reference_and_its_gradient_points_back():
    policy, other = tiny_policy(seed=0), tiny_policy(seed=1)
    traces = [FakeTrace(random_tree(np.random.default_rng(7), 8))]
    objective = AlphaZero(policy=0.0, value=0.0, kl=1.0)
    same = objective.prepare(traces, Models(policy, policy, max_length=64), np.random.default_rng(0))
    apart = objective.prepare(traces, Models(policy, other, max_length=64), np.random.default_rng(0))
    found = []
    for items in (same, apart):
        packed = pack(items)
        found.append(float(objective.loss(forward(policy, packed), packed, Totals.of(items))[1]["kl"]))
    assert found[0] == pytest.approx(0.0, abs=1e-5)
    assert found[1] > 0.1


def test_k3_averages_to_the_kl_under_the_policys_own_draws():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    mean = (p * k3(p.log(), q.log())).sum()
    assert mean.item() == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_objectives_say_what_they_need():
    assert AlphaZero().needs == {Need.VALUE_HEAD}
    assert AlphaZero(value=0.0, kl=0.1).needs == {Need.REFERENCE}
    assert Sft().needs == frozenset()


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("alphazerro", {}, "did you mean alphazero"),
        ("alphazero", {"valu": 1.0}, "did you mean value"),
        ("alphazero", {"nll": -1.0}, "must not be negative"),
        ("alphazero", {"value_label": "median"}, "outcome, mean, max"),
        ("sft", {"max_wins": 0}, "at least 1"),
        ("selfplay.nowhere.Thing", {}, "cannot be imported"),
    ],
)
def test_a_bad_objective_is_refused_in_one_sentence(name, settings, sentence):
    with pytest.raises(ObjectiveError, match=sentence):
        build_objective(name, **settings)


def test_an_objective_of_ones_own_plugs_in_by_dotted_path():
    assert build_objective("selfplay.objectives.sft.Sft", value=0.25) == Sft(value=0.25)
