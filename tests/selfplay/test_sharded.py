"""A model spread over processes learns what it learns in one, and is saved as if it had never been spread."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selfplay import checkpoint
from selfplay.errors import NonFiniteLoss, UserError
from selfplay.group import Alone, Group
from selfplay.learner import Budget, Learner, LearnerSettings
from selfplay.objectives import AlphaZero, Sft
from selfplay.optimizers import OptimizerSettings
from selfplay.trainer import Trainer
from tests.selfplay.groups import run_group
from tests.selfplay.learning import FakeTrace, random_tree, tiny_policy
from tests.selfplay.places import held
from tests.selfplay.test_group import CASES, learn
from tests.selfplay.test_learner import examples
from tests.selfplay.test_partial import Steps
from tests.selfplay.tiny_run import tiny_config

pytestmark = pytest.mark.slow
SHARDED = {
    **{name: case for name, case in CASES.items() if name != "muon"},
    "recomputed layers": {"recompute": True},
    "recomputed layers of gpt2": {"recompute": True, "family": "gpt2"},
}


def learn_all(group: Group, shard_on: str | None) -> dict[str, dict[str, Any]]:
    return {name: learn(case, group, steps=1, shard_on=shard_on) for name, case in SHARDED.items()}


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    return learn_all(Alone(), None)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Three ranks, over which nothing divides evenly: neither weights nor batches."""
    found: list[dict[str, dict[str, Any]]] = run_group(3, tmp_path_factory.mktemp("spread"), learn_all, "cpu")
    return found[0]


@pytest.mark.parametrize("name", SHARDED)
def test_gradients_and_a_step_of_a_sharded_policy_are_those_of_a_whole_one(
    name: str, spread: dict[str, dict[str, Any]], single: dict[str, dict[str, Any]]
) -> None:
    found, expected = spread[name], single[name]
    for what in ("gradients", "weights"):
        for ours, theirs in zip(found[what], expected[what], strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, nan_ok=True)
    assert found["optimizer"]["adamw"]["state"].keys() == expected["optimizer"]["adamw"]["state"].keys()


def poisoned(group: Group) -> list[str]:
    seen = []
    settings = LearnerSettings(items_per_step=8, batch_tokens=16, threads=1, shard_on="cpu")
    policy = tiny_policy()
    with torch.no_grad():
        policy.head.outer.weight.fill_(math.nan)  # type: ignore[union-attr]
    learner = Learner(policy, Sft(value=0.5), settings, group=group)
    try:
        learner.learn(1, [], Budget(steps=2), fresh=examples(), fresh_share=1.0)
    except NonFiniteLoss as error:
        seen.append(str(error))
    muon = LearnerSettings(OptimizerSettings("muon"), shard_on="cpu")
    try:
        Learner(tiny_policy(), Sft(), muon, group=group)
    except UserError as error:
        seen.append(str(error))
    # one loss without values between two with: the head and its moments stay as they were
    learner = Learner(tiny_policy(), AlphaZero(), LearnerSettings(threads=1, shard_on="cpu"), group=group)
    traces = [FakeTrace(random_tree(np.random.default_rng(s)), problem_id=str(s)) for s in range(4)]
    learner.learn(1, traces, Budget(steps=1))
    head = [p.detach().full_tensor() for p in learner.policy.head.parameters()]  # type: ignore
    learner.objective = AlphaZero(value=0.0)
    learner.learn(2, traces, Budget(steps=1))
    after = [p.detach().full_tensor() for p in learner.policy.head.parameters()]  # type: ignore
    seen.append(str(all(torch.equal(a, b) for a, b in zip(head, after, strict=True))))
    return seen


def test_bad_losses_and_optimisers_are_refused_and_what_is_not_reached_is_not_stepped(tmp_path: Path) -> None:
    first, second = run_group(2, tmp_path, poisoned)
    assert first == second
    assert first[0] == "the loss is not a finite number; lower the learning rate"
    assert first[1].startswith("muon needs whole matrices")
    assert first[2] == "True"


def config(sharding: str, learners: int) -> Any:
    cluster = f"cluster={{executor: ray, learners: {learners}, sharding: {sharding}, save_seconds: 1.0e-9}}"
    return tiny_config(cluster, "learn.replay=0.5", "learn.objective={name: alphazero, kl: 0.1}")


def life(group: Group, run: Path, sharding: str) -> list[dict[str, Any]]:
    """Warm-up, a checkpoint, a phase from that checkpoint, another checkpoint."""
    trainer = Trainer(config(sharding, group.size), held(run), group)
    found = [trainer.warm_up(Steps())]
    trainer.save(0, {})
    return [*found, *go_on(group, run, sharding)]


def go_on(group: Group, run: Path, sharding: str) -> list[dict[str, Any]]:
    trainer = Trainer(config(sharding, group.size), held(run), group)
    trainer.restore(checkpoint.path_of(run / "checkpoints", 0))
    found = trainer.learn(1, [], Steps())
    trainer.save(1, {})
    return [found]


def loaded(run: Path, number: int) -> dict[str, torch.Tensor]:
    policy, optimizer, _ = checkpoint.load(checkpoint.path_of(run / "checkpoints", number))
    assert optimizer is not None
    assert policy.head is not None
    state = optimizer["adamw"]["state"]
    moments = {f"{key} {name}": value for key, entry in state.items() for name, value in entry.items()}
    return {**policy.model.state_dict(), **policy.head.state_dict(), **moments}


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n].float(), b[n].float(), rtol=1e-3, atol=1e-4) for n in a)


def test_checkpoints_are_those_of_a_run_that_is_not_sharded_and_it_may_go_on_either_way(tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    life(Alone(), whole, "none")
    run_group(2, tmp_path, life, sharded, "fsdp2")
    names = [sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) for run in (whole, sharded)]
    assert names[0] == names[1]
    for number in (0, 1):
        assert close(loaded(whole, number), loaded(sharded, number))
    go_on(Alone(), sharded, "none")  # sharded before, alone now
    assert close(loaded(whole, 1), loaded(sharded, 1))
    run_group(2, tmp_path, go_on, whole, "fsdp2")  # and the other way round
    assert close(loaded(whole, 1), loaded(sharded, 1))
