"""Several processes learn as one: the same gradients and figures, the same bits on every rank, and nobody hangs."""

from __future__ import annotations

import math
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcts.engines.model import Policy
from selfplay import lora
from selfplay.config import LoraConfig
from selfplay.errors import NonFiniteLoss, UserError
from selfplay.group import Alone, Group, GroupLost, PeerError, agree, shares
from selfplay.learner import Budget, Learner, LearnerSettings
from selfplay.objectives import AlphaZero, Sft
from selfplay.optimizers import OptimizerSettings
from selfplay.sharded import complete
from tests.models import make_policy
from tests.selfplay.groups import run_group
from tests.selfplay.learning import FakeTrace, random_tree, tiny_policy
from tests.selfplay.test_learner import examples

SIZES = [2, pytest.param(3, marks=pytest.mark.slow)]
CASES: dict[str, dict[str, Any]] = {
    "trees": {},
    "trees of gpt2": {"family": "gpt2"},
    "paths": {"tree_mask": False, "family": "gpt2"},
    "chains": {"objective": Sft()},
    "one batch for all": {"tokens": 10_000},
    "mixture": {"share": 0.25, "threads": 2},
    "worked examples alone": {"share": 1.0, "traces": 0},
    "kl": {"objective": AlphaZero(nll=0.5, kl=0.1)},
    "lora": {"lora": True},
    "value head alone": {"frozen": True},
    "muon": {"optimizer": "muon"},
}


def policy_of(case: dict[str, Any], seed: int = 0) -> Policy:
    policy = make_policy(case.get("family", "llama"), seed=seed, scale=2.0)
    if case.get("lora"):
        lora.add(policy, "base", LoraConfig(rank=4, alpha=8.0), seed=1)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    if case.get("frozen"):
        lora.freeze(policy)
    return policy


def learn(case: dict[str, Any], group: Group, steps: int = 1, shard_on: str | None = None) -> dict[str, Any]:
    """Gradients of the first step, weights after the last, and the metrics; those of `shard_on` complete on rank 0."""
    policy = policy_of(case)
    settings = LearnerSettings(
        OptimizerSettings(case.get("optimizer", "adamw"), lr=3e-3),
        items_per_step=8,
        batch_tokens=case.get("tokens", 128),
        max_length=64,
        threads=case.get("threads", 1),
        shard_on=shard_on,
        gradient_checkpointing=case.get("recompute", False),
    )
    objective = case.get("objective", AlphaZero(nll=0.5))
    learner = Learner(policy, objective, settings, reference=policy_of(case, seed=5), group=group)
    if "tree_mask" in case:
        learner.tree_mask = False
        learner.models = replace(learner.models, tree_mask=False)
    rng = np.random.default_rng(1)
    count = case.get("traces", 12)
    traces = [FakeTrace(random_tree(rng, int(rng.integers(4, 14))), problem_id=str(i)) for i in range(count)]
    for trace in traces:
        trace.path = [0, 1]
    gradients: list[torch.Tensor | None] = []
    clip = learner.optimizer.clip

    def keep() -> float:
        if not gradients:
            found = (None if p.grad is None else p.grad.clone() for p in learner.optimizer.parameters)
            gradients.extend(complete(list(found), keep=True))
        return clip()

    learner.optimizer.clip = keep  # type: ignore[method-assign]
    fresh = {"fresh": _words(), "fresh_share": case["share"]} if "share" in case else {}
    metrics = learner.learn(1, traces, Budget(steps=steps), version=0, **fresh)
    assert any(gradient is not None for gradient in gradients)
    return {
        "gradients": gradients,
        "metrics": metrics,
        "weights": complete([p.detach().clone() for p in learner.optimizer.parameters], keep=True),
        "optimizer": complete(learner.optimizer.state_dict(), keep=True),
    }


def _words() -> Any:
    """`examples` in the words of this tokenizer."""
    for example in examples():
        yield type(example)(
            type(example.problem)(example.problem.id, example.problem.prompt.replace("w", "")),
            tuple(step.replace("w", "") for step in example.steps),
            *[getattr(example, name) for name in list(example.__dataclass_fields__)[2:]],
        )


def learn_all(group: Group) -> dict[str, dict[str, Any]]:
    return {name: learn(case, group, steps=3) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    return learn_all(Alone())


@pytest.fixture(scope="module", params=SIZES)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_group(request.param, tmp_path_factory.mktemp("together"), learn_all)


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_figures_of_a_group_are_those_of_one_process(
    name: str, together: list[dict[str, Any]], single: dict[str, dict[str, Any]]
) -> None:
    expected = single[name]
    for found in (rank[name] for rank in together):
        for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
        assert found["metrics"].keys() == expected["metrics"].keys()
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, nan_ok=True)
        assert not math.isnan(found["metrics"]["grad_norm"])


@pytest.mark.parametrize("name", CASES)
def test_every_rank_ends_with_the_same_bits(name: str, together: list[dict[str, Any]]) -> None:
    first, *others = (rank[name] for rank in together)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], other["weights"], strict=True))
        assert str(first["metrics"]) == str(other["metrics"])


def test_a_group_repeats_itself_bit_for_bit(tmp_path: Path) -> None:
    first, second = run_group(2, tmp_path, twice)[0]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert str(first["metrics"]) == str(second["metrics"])


def twice(group: Group) -> list[dict[str, Any]]:
    return [learn(CASES["mixture"], group, steps=3) for _ in range(2)]


def failing(group: Group) -> list[str]:
    """One rank's error, as every rank sees it: of work, of a loss and of a gradient that are no numbers."""
    seen = []

    def wrong() -> None:
        if group.rank == 1:
            raise UserError("a bad word")

    def odd() -> None:
        if group.rank == 1:
            raise KeyError("a bug")

    def nested() -> None:
        agree(group, lambda: None)
        if group.rank == 1:
            raise KeyError("between")
        agree(group, lambda: None)

    for work in (wrong, odd, nested):
        try:
            agree(group, work)
        except (UserError, KeyError, PeerError) as error:
            seen.append(f"{type(error).__name__}: {error}")
    policy = tiny_policy()
    learner = Learner(policy, Sft(), LearnerSettings(items_per_step=8, batch_tokens=16, threads=1), group=group)
    if group.rank == 1:
        with torch.no_grad():
            policy.model.lm_head.weight.fill_(math.nan)
    body = [p for name, p in policy.model.named_parameters() if "lm_head" not in name]
    before = [p.detach().clone() for p in body]
    try:
        learner.learn(1, [], Budget(steps=2), fresh=examples(), fresh_share=1.0)
    except NonFiniteLoss as error:
        seen.append(f"NonFiniteLoss: {error}")
    seen.append(f"unchanged: {all(torch.equal(a, b) for a, b in zip(before, body, strict=True))}")
    seen.append(f"no gradient: {all(p.grad is None for p in learner.optimizer.parameters)}")
    return seen


def test_an_error_of_one_rank_is_raised_on_all_and_nobody_hangs(tmp_path: Path) -> None:
    zero, one = run_group(2, tmp_path, failing)
    assert zero == [
        "UserError: a bad word",
        "PeerError: learner 1 failed: KeyError: 'a bug'",
        "PeerError: learner 1 failed: KeyError: 'between'",
        "NonFiniteLoss: the loss is not a finite number; lower the learning rate",
        "unchanged: True",
        "no gradient: True",
    ]
    assert one == [zero[0], "KeyError: 'a bug'", "KeyError: 'between'", *zero[3:]]


def dying(group: Group) -> str:
    """Rank 2 is killed while the others wait for it."""
    if group.rank == 2:
        os._exit(0)
    try:
        group.sum([torch.ones(3)]) if group.rank else group.gather("there?")
    except GroupLost as error:
        return type(error).__name__
    return "all is well"


def test_those_who_live_on_learn_that_one_died(tmp_path: Path) -> None:
    (tmp_path / "rank2-of-3").write_bytes(pickle.dumps("dead"))
    assert run_group(3, tmp_path, dying) == ["GroupLost", "GroupLost", "dead"]


def exchange(group: Group) -> Any:
    texts = group.gather("ä" * (group.rank * 1000) + "end")
    rng = np.random.default_rng(group.rank)
    tensors = [
        torch.tensor(rng.normal(size=shape)).to(dtype)
        for shape in ((3, 5), (7,), ())
        for dtype in (torch.float32, torch.float64)
    ]
    before = [tensor.clone() for tensor in tensors]
    group.sum(tensors)
    return texts, before, tensors


def test_texts_and_sums_are_the_same_everywhere(tmp_path: Path) -> None:
    found = run_group(3, tmp_path, exchange)
    assert [texts for texts, _, _ in found] == 3 * [["ä" * (rank * 1000) + "end" for rank in range(3)]]
    for number, summed in enumerate(found[0][2]):
        assert all(torch.equal(summed, rank[2][number]) for rank in found)
        torch.testing.assert_close(summed, sum(rank[1][number] for rank in found))


def test_work_is_shared_by_tokens_and_nothing_is_left_out() -> None:
    rng = np.random.default_rng(0)
    for ranks in (1, 2, 3, 5):
        for count in (0, 1, 2, 7, 40):
            sizes = rng.integers(1, 2000, count).tolist()
            given = shares(sizes, ranks)
            assert sorted(index for each in given for index in each) == list(range(count))
            sums = [sum(sizes[i] for i in each) for each in given]
            if count:
                assert max(sums) - min(sums) <= max(sizes)
    assert shares([5, 9, 5, 9], 2) == [[1, 0], [3, 2]]
