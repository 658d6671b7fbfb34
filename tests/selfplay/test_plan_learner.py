"""The plan of a learner against what a real one holds."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mcts.tasks import load_task
from selfplay.learner import Budget, Learner, LearnerSettings
from selfplay.objectives import Sft, build_objective
from selfplay.optimizers import Optimizer, OptimizerSettings
from selfplay.packing import chain
from selfplay.phase import Phase
from selfplay.plan import _most, make_plan
from selfplay.plan_model import shape_of
from tests.models import FAMILIES, make_policy
from tests.selfplay.learning import FakeTrace, random_tree
from tests.selfplay.test_plan import bytes_of, config


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("family", FAMILIES)
def test_optimizer_and_gradients_are_those_after_a_real_step(tmp_path: Path, family: str, name: str) -> None:
    policy = make_policy(family)
    policy.model.save_pretrained(tmp_path)
    shape = shape_of(config(f"model.path={tmp_path}", f"learn.optimizer.name={name}"))
    optimizer = Optimizer(policy.model, policy.head, OptimizerSettings(name=name))
    optimizer.accumulate([torch.ones_like(p) for p in optimizer.parameters])
    assert shape.gradients == bytes_of(p.grad for p in optimizer.parameters)
    optimizer.step(1.0)
    states = [
        value
        for one in optimizer.state_dict().values()
        for state in one["state"].values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    assert shape.optimizer == bytes_of(states)


def test_the_learner_really_holds_no_more_than_two_sets_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    inner = Phase._batch

    def counted(self: Phase, *task: Any) -> Any:
        nonlocal most
        found = inner(self, *task)
        alive.append(weakref.ref(found.gradients[0]))
        most = max(most, sum(ref() is not None for ref in alive))
        return found

    monkeypatch.setattr(Phase, "_batch", counted)
    policy = make_policy("llama")
    settings = LearnerSettings(items_per_step=16, batch_tokens=64, threads=1, max_length=64)
    learner = Learner(policy, build_objective("sft"), settings)
    examples = load_task("countdown", numbers=3).warmup(0)
    learner.learn(0, [], Budget(steps=2), fresh=examples, fresh_share=1.0)
    assert len(alive) > 6, "several batches a step"
    assert most == 2


def test_what_the_learner_is_planned_to_hold_is_what_it_holds(tmp_path: Path) -> None:
    policy = make_policy("llama")
    policy.model.save_pretrained(tmp_path)
    shape = shape_of(config(f"model.path={tmp_path}"))
    learner = Learner(policy, build_objective("sft"), LearnerSettings())
    held = bytes_of(learner.policy.model.parameters()) + bytes_of(learner.policy.head.parameters())
    assert make_plan(config(f"model.path={tmp_path}")).loads[0].parts["weights"] == held
    assert shape.trainable + shape.head_parameters == sum(p.numel() for p in learner.optimizer.parameters)


def test_a_learner_is_planned_for_the_moment_that_takes_most() -> None:
    """Gradients of 10 and a trunk of 100: with few logits the later batches' backward passes take most (the sums so
    far beside the trunk), with many the loss of the first batch, with large gradients their two sets at the end."""
    shape = replace(shape_of(config()), gradients=10, edge=3)
    assert _most(shape, trunk=100, logits=1, low=2, sets=2) == (1, 100 + 10 + 3)
    assert _most(shape, trunk=100, logits=100, low=2, sets=2) == (0, 100 + 2200)
    assert _most(shape, trunk=100, logits=1, low=2, sets=1) == (0, 100 + 22)
    assert _most(replace(shape, gradients=1000), trunk=100, logits=1, low=2, sets=2) == (2, 3)


class Live(TorchDispatchMode):
    """Bytes of all tensors that are alive at once, at most."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.most = 0
        for tensor in known:
            self.see(tensor)

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return out


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("words", [100, 4000])
def test_a_learner_takes_at_its_peak_what_is_planned(tmp_path: Path, words: int, precision: str) -> None:
    """Within 15%, for a model that is mostly layers and for one that is mostly vocabulary."""
    policy = make_policy("qwen2", vocabulary=[f"w{i}" for i in range(words)], width=128, layers=4)
    policy.model.save_pretrained(tmp_path)
    settings = config(
        f"model.path={tmp_path}", "learn.batch_tokens=1024", "learn.items_per_step=24", "plan.item_tokens=128",
        "plan.prompt_tokens=32", f"learn.precision={precision}", "learn.optimizer={name: adamw}",
        "cluster.learner_threads=1",
    )  # fmt: skip
    weight = np.ones(128, dtype=np.float32)
    weight[:32] = 0.0
    rng = np.random.default_rng(0)
    items = [
        chain(rng.integers(3, words, 128), nll_weight=weight, value_token=[50, 100], value_label=[0.0, 1.0])
        for _ in range(24)
    ]

    class Given(Sft):
        def prepare(self, *_: Any) -> list[Any]:
            return items

    learner = Learner(
        policy,
        Given(value=0.5),
        LearnerSettings(
            OptimizerSettings("adamw"), items_per_step=24, batch_tokens=1024, max_length=256, threads=1,
            precision=precision, kernels=False,
        ),
    )  # fmt: skip
    assert policy.head is not None
    traces = [FakeTrace(random_tree(np.random.default_rng(0)), problem_id="0")]
    with Live([*policy.model.parameters(), *policy.head.parameters()]) as live:
        learner.learn(1, traces, Budget(steps=2))
    assert live.most == pytest.approx(make_plan(settings).loads[0].total, rel=0.15)
