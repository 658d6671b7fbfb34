"""The learner learns, repeats itself bit for bit, and stops at the first number that is none."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from mcts.tasks.base import Example
from mcts.types import Problem
from selfplay.errors import NonFiniteLoss
from selfplay.forward import token_logprobs
from selfplay.learner import Budget, Learner, LearnerSettings
from selfplay.metrics import RunningAuc
from selfplay.objectives import AlphaZero, Sft
from selfplay.optimizers import Optimizer, OptimizerSettings, Schedule
from selfplay.packing import chain
from tests.selfplay.learning import FakeTrace, random_tree, tiny_policy


def settings(name="adamw", **changes) -> LearnerSettings:
    plain = {"items_per_step": 8, "batch_tokens": 128, "max_length": 64, "threads": 1}
    return LearnerSettings(OptimizerSettings(name, lr=3e-3, muon_lr=3e-3), **{**plain, **changes})


def traces(count=12, nodes=10):
    return [FakeTrace(random_tree(np.random.default_rng(s), nodes), problem_id=str(s)) for s in range(count)]


def examples():
    """Endless: the steps repeat the prompt's words, and the value says whether they did."""
    for i in itertools.count():
        a, b = 2 + i % 7, 9 + i % 5
        good = i % 3 != 0
        words = f"w{a} w{b}" if good else f"w{b} w{b}"
        yield Example(Problem(str(i), f"w{a} w{b}"), (words,), (math.nan, float(good)), imitate=good)


def weights(policy):
    return [p.detach().clone() for p in (*policy.model.parameters(), *policy.head.parameters())]


def test_warm_up_lowers_the_loss_and_ranks_by_value():
    policy = tiny_policy()
    learner = Learner(policy, AlphaZero(), settings(items_per_step=32))
    first = learner.learn(0, [], Budget(steps=3), fresh=examples(), fresh_share=1.0)
    learner.learn(0, [], Budget(steps=60), fresh=examples(), fresh_share=1.0)
    last = learner.learn(0, [], Budget(steps=3), fresh=examples(), fresh_share=1.0)
    assert last["policy_loss"] < 0.5 * first["policy_loss"]
    assert last["value_loss"] < 0.5 * first["value_loss"]
    assert last["value_auc"] > 0.95
    assert last["entropy"] > 0.0


def test_a_model_in_bfloat16_learns_with_a_value_head_in_float32():
    policy = tiny_policy()
    policy.model.to(torch.bfloat16)
    learner = Learner(policy, AlphaZero(), settings(items_per_step=32))
    first = learner.learn(0, [], Budget(steps=3), fresh=examples(), fresh_share=1.0)
    learner.learn(0, [], Budget(steps=60), fresh=examples(), fresh_share=1.0)
    last = learner.learn(0, [], Budget(steps=3), fresh=examples(), fresh_share=1.0)
    assert last["policy_loss"] < 0.8 * first["policy_loss"]
    assert last["value_loss"] < 0.8 * first["value_loss"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_loss_of_a_small_set_falls(name):
    policy = tiny_policy()
    learner = Learner(policy, Sft(value=0.5), settings(name))
    first = learner.learn(1, traces(), Budget(epochs=1.0))
    for _ in range(12):
        last = learner.learn(1, traces(), Budget(epochs=2.0))
    assert last["policy_loss"] < 0.6 * first["policy_loss"]


def test_alphazero_moves_the_policy_towards_its_targets():
    policy = tiny_policy()
    learner = Learner(policy, AlphaZero(), settings())
    first = learner.learn(1, traces(), Budget(epochs=1.0))
    for _ in range(10):
        last = learner.learn(1, traces(), Budget(epochs=2.0))
    assert last["target_kl"] < 0.5 * first["target_kl"]
    assert last["value_loss"] < first["value_loss"]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_inputs_give_the_same_weights_bit_for_bit(threads):
    found = []
    for _ in range(2):
        policy = tiny_policy()
        learner = Learner(policy, AlphaZero(nll=0.5), settings(threads=threads))
        metrics = learner.learn(3, traces(), Budget(steps=5), fresh=examples(), fresh_share=0.25, version=0)
        found.append((weights(policy), metrics))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == pytest.approx(found[1][1], rel=0.0, abs=0.0, nan_ok=True)


def test_the_order_of_items_depends_on_iteration_purpose_and_seed():
    def first_step(iteration=1, purpose="learn", seed=0):
        policy = tiny_policy()
        learner = Learner(policy, Sft(value=0.5), settings(seed=seed, items_per_step=2))
        return learner.learn(iteration, traces(), Budget(steps=1), purpose=purpose)["grad_norm"]

    plain = first_step()
    assert first_step() == plain
    assert first_step(iteration=2) != plain
    assert first_step(purpose="again") != plain
    assert first_step(seed=1) != plain


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learning_goes_on_from_a_saved_state_as_if_never_interrupted(name):
    def phase(learner, iteration):
        learner.learn(iteration, traces(), Budget(steps=3))

    through = tiny_policy()
    learner = Learner(through, AlphaZero(), settings(name))
    phase(learner, 1)
    stopped = copy.deepcopy((through.model.state_dict(), through.head.state_dict(), learner.state_dict()))
    phase(learner, 2)
    resumed = tiny_policy(seed=5)
    resumed.model.load_state_dict(stopped[0])
    resumed.head.load_state_dict(stopped[1])
    again = Learner(resumed, AlphaZero(), settings(name))
    again.load_state_dict(stopped[2])
    phase(again, 2)
    assert all(torch.equal(a, b) for a, b in zip(weights(through), weights(resumed), strict=True))


def test_the_loss_does_not_depend_on_how_a_step_is_cut_into_batches_and_rows():
    found = []
    for tokens, row in ((32, 16), (10_000, 64)):
        policy = tiny_policy()
        learner = Learner(policy, AlphaZero(nll=0.5), settings(batch_tokens=tokens, row_length=row))
        metrics = learner.learn(1, traces(), Budget(steps=1), fresh=examples(), fresh_share=0.25)
        found.append([metrics[k] for k in ("grad_norm", "policy_loss", "value_loss", "nll", "replay_nll")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_traces_and_worked_examples_are_mixed_by_their_shares():
    def gradient(share, trace_items):
        policy = tiny_policy()
        learner = Learner(policy, Sft(value=0.5), settings(items_per_step=8))
        kept = []
        clip = learner.optimizer.clip

        def keep():
            kept.append(torch.cat([p.grad.flatten() for p in policy.model.model.layers.parameters()]))
            return clip()

        learner.optimizer.clip = keep
        size = len(trace_items) + round(share * 8) if share < 1.0 else 2
        fresh = examples() if share else None
        learner.learn(1, trace_items, Budget(steps=1), fresh=fresh, fresh_share=share, items_per_step=size)
        return kept[0]

    six = traces(6)
    both, ours, theirs = gradient(0.25, six), gradient(0.0, six), gradient(1.0, [])
    torch.testing.assert_close(both, 0.75 * ours + 0.25 * theirs, rtol=1e-4, atol=1e-6)


def test_a_model_in_training_mode_learns_without_dropout():
    policy = tiny_policy("gpt2")
    policy.model.train()
    assert Learner(policy, Sft(), settings()).tree_mask
    assert not policy.model.training


def test_a_model_without_tree_mask_learns_the_same_path_by_path(monkeypatch):
    norms = []
    for fits in (True, False):
        monkeypatch.setattr("selfplay.learner.check_tree_mask", lambda *_, fits=fits, **__: fits)
        learner = Learner(tiny_policy(), AlphaZero(nll=0.5), settings())
        assert learner.tree_mask is fits
        norms.append(learner.learn(1, traces(), Budget(steps=1))["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_loss_that_is_no_number_stops_before_the_weights_change():
    policy = tiny_policy()
    learner = Learner(policy, Sft(value=0.5), settings())
    with torch.no_grad():
        policy.model.lm_head.weight[3, 3] = math.nan
    before = weights(policy)
    with pytest.raises(NonFiniteLoss, match="lower the learning rate"):
        learner.learn(1, traces(), Budget(steps=1))
    assert all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(before, weights(policy), strict=True))
    assert all(p.grad is None for p in policy.model.parameters())


def test_logprob_gap_is_measured_against_tokens_of_the_same_version_before_the_first_step():
    policy = tiny_policy()
    many = traces(8)
    for tree in (trace.tree for trace in many):
        for node in range(1, len(tree)):
            ids = tree.prefix(node)
            [found] = token_logprobs(policy, [chain(ids, nll_weight=np.ones(len(ids)))], tokens=1000)
            own = tree.steps[node].logprobs
            own[:] = found[len(ids) - len(own) :] + 0.125
    learner = Learner(policy, AlphaZero(), settings())
    gap = learner.learn(1, many, Budget(steps=2), version=0)["logprob_gap"]
    assert gap == pytest.approx(0.125, abs=1e-4)
    assert math.isnan(learner.learn(1, many, Budget(steps=2), version=7)["logprob_gap"])


def test_budgets_end_a_phase_by_steps_tokens_or_epochs():
    learner = Learner(tiny_policy(), Sft(value=0.5), settings())
    assert learner.learn(1, traces(), Budget(steps=3))["steps"] == 3
    by_tokens = learner.learn(1, traces(), Budget(tokens=500))
    assert 500 <= by_tokens["tokens"] < 500 + 8 * 60
    assert learner.learn(1, traces(), Budget(epochs=2.0))["epochs"] == pytest.approx(2.0, abs=8 / 12)
    assert learner.learn(1, [], Budget(steps=3))["steps"] == 0
    with pytest.raises(ValueError, match="give steps, tokens or epochs"):
        Budget()


def test_a_finite_stream_of_examples_ends_the_phase():
    learner = Learner(tiny_policy(), Sft(), settings())
    stream = itertools.islice(examples(), 20)
    metrics = learner.learn(0, [], Budget(steps=100), fresh=stream, fresh_share=1.0)
    assert metrics["steps"] == 3


def test_the_learner_refuses_what_it_lacks():
    with pytest.raises(ValueError, match="reference model"):
        Learner(tiny_policy(), AlphaZero(kl=0.1), settings())
    with pytest.raises(ValueError, match="value head"):
        Learner(tiny_policy(head=False), AlphaZero(), settings())
    with pytest.raises(ValueError, match="stream"):
        Learner(tiny_policy(), Sft(), settings()).learn(0, [], Budget(steps=1), fresh_share=0.5)


def test_the_schedule_rises_holds_and_falls():
    rising = Schedule(warmup_steps=4)
    assert [rising.scale(s) for s in (0, 1, 3, 100)] == [0.25, 0.5, 1.0, 1.0]
    falling = Schedule(total_steps=10, final_scale=0.5, offset=5)
    assert [falling.scale(s) for s in (0, 5, 50)] == [0.75, 0.5, 0.5]


def test_muon_takes_the_hidden_matrices_and_nothing_else():
    policy = tiny_policy()
    optimizer = Optimizer(policy.model, policy.head, OptimizerSettings("muon"))
    names = {id(p): n for n, p in policy.model.named_parameters()}
    muon = [names[id(p)] for p in optimizer._optimizers["muon"].param_groups[0]["params"]]
    assert muon
    assert all(".layers." in n and n.endswith("_proj.weight") for n in muon)
    with pytest.raises(ValueError, match="adamw or muon"):
        Optimizer(policy.model, None, OptimizerSettings("sgd"))


def test_auc_equals_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    predictions, labels = rng.random(200), rng.random(200) < 0.4
    auc = RunningAuc()
    auc.add(torch.from_numpy(predictions[:90]), torch.from_numpy(labels[:90]))
    auc.add(torch.from_numpy(predictions[90:]), torch.from_numpy(labels[90:]))
    wanted = (predictions[labels][:, None] > predictions[~labels]).mean()
    assert auc.value() == pytest.approx(wanted, abs=2e-3)
    assert math.isnan(RunningAuc().value())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_learner_at_rest_leaves_nothing_big_on_its_device_and_wakes_up_as_it_was(name):
    found = []
    for rests in (False, True):
        learner = Learner(tiny_policy(), AlphaZero(kl=0.1), settings(name), reference=tiny_policy(seed=1))
        learner.learn(1, traces(), Budget(steps=2))
        if rests:
            learner.move("cpu")  # stands for any device: identities and values stay
        learner.learn(2, traces(), Budget(steps=2))
        found.append(weights(learner.policy))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    learner.move("meta")
    modules = [m for policy in (learner.policy, learner.reference) for m in (policy.model, policy.head)]
    state = [
        entry
        for optimizer in learner.state_dict().values()
        for entries in optimizer["state"].values()
        for entry in entries.values()
        if torch.is_tensor(entry) and entry.ndim
    ]
    assert len(state) >= len(learner.optimizer.parameters)
    tensors = [*state, *(t for module in modules for t in (*module.parameters(), *module.buffers()))]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
