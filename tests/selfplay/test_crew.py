"""A process that fails alone: its own cause reaches the driver at once, and those that wait for it are ended."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfplay.crew import Crew, CrewLost, Died, judge
from selfplay.errors import NonFiniteLoss, UserError
from selfplay.group import Group, GroupBroken, GroupLost, PeerError, agree
from selfplay.learner import Budget, Learner, LearnerSettings
from selfplay.objectives import AlphaZero
from tests.selfplay.groups import DEADLINE, answering, run_group
from tests.selfplay.learning import FakeTrace, random_tree, tiny_policy

CAUSE = "RuntimeError: the card fell off the bus"


def learn(group: Group, shard_on: str | None, spoil: Callable[[Learner, list[int]], None]) -> dict[str, float]:
    """Four steps; rank 1's learner is spoilt, which is also given the steps that were made."""
    settings = LearnerSettings(items_per_step=4, batch_tokens=64, threads=1, shard_on=shard_on)
    learner = Learner(tiny_policy(), AlphaZero(), settings, group=group)
    traces = [FakeTrace(random_tree(np.random.default_rng(s)), problem_id=str(s)) for s in range(8)]
    steps: list[int] = []
    if group.rank == 1:
        spoil(learner, steps)
    return learner.learn(1, traces, Budget(steps=4), progress=lambda done, _: steps.append(done))


def in_a_layer(learner: Learner, steps: list[int]) -> None:
    """The second layer fails in step 2, between two of its parts."""

    def fail(*_: Any) -> None:
        if steps == [1]:
            raise RuntimeError("the card fell off the bus")

    learner.policy.model.model.layers[1].mlp.register_forward_pre_hook(fail)


def before_the_sum(learner: Learner, steps: list[int]) -> None:
    """The gradients of step 2, which the others are adding up already, cannot be had."""
    gradients = learner.optimizer.gradients

    def fail(reached: Any) -> Any:
        if steps == [1]:
            raise RuntimeError("the card fell off the bus")
        return gradients(reached)

    learner.optimizer.gradients = fail  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("shard_on", "spoil"), [("cpu", in_a_layer), pytest.param(None, before_the_sum, marks=pytest.mark.slow)]
)
def test_an_error_of_one_rank_ends_those_that_wait_for_its_tensors_and_says_what_it_was(
    shard_on: str | None, spoil: Callable[[Learner, list[int]], None]
) -> None:
    with answering(2, learn, shard_on, spoil, patience=100 * DEADLINE) as (result, processes):
        with pytest.raises(CrewLost) as caught:
            result.result(timeout=DEADLINE)
        assert str(caught.value) == f"learner 1 failed: {CAUSE}"
        for process in processes:
            process.join(DEADLINE)
            assert process.exitcode == -signal.SIGKILL


def never_comes(group: Group) -> None:
    """Rank 1 waits for a word, and rank 0 for its tensors."""
    if group.rank:
        group.gather("here")
    import torch

    group.sum([torch.ones(3)])


def test_a_rank_whose_tensors_do_not_come_is_waited_for_no_longer_than_said() -> None:
    with answering(2, never_comes, patience=0.5) as (result, processes):
        with pytest.raises(CrewLost, match=r"^learner 0 lost the others: .*Timed out"):
            result.result(timeout=DEADLINE)
        for process in processes:
            process.join(DEADLINE)
            assert process.exitcode == -signal.SIGKILL


def left_alone(group: Group) -> str:
    group.gather("here")
    if group.rank == 0:
        os._exit(0)

    def fail() -> None:
        raise KeyError("a bug")

    try:
        agree(group, fail)
    except GroupBroken as error:
        return str(error)
    return "it was told"


def test_an_error_that_nobody_is_left_to_hear_is_not_forgotten(tmp_path: Path) -> None:
    (tmp_path / "rank0-of-2").write_bytes(pickle.dumps("gone"))
    assert run_group(2, tmp_path, left_alone) == ["gone", "learner 1 failed: KeyError: 'a bug'"]


def broken(rank: int, what: str = CAUSE) -> GroupBroken:
    return GroupBroken(rank, what)


@pytest.mark.parametrize(
    ("news", "error"),
    [
        ({1: broken(1)}, f"learner 1 failed: {CAUSE}"),
        ({0: broken(0), 1: broken(1)}, f"learner 0 failed: {CAUSE}; learner 1 failed: {CAUSE}"),
        ({0: GroupLost("closed"), 1: broken(1), 2: GroupLost("closed")}, f"learner 1 failed: {CAUSE}"),
        ({0: GroupLost("closed"), 1: Died("killed")}, "learner 1 died: killed"),
        ({0: Died("aborted"), 2: broken(2)}, f"learner 2 failed: {CAUSE}; learner 0 died: aborted"),
        ({2: GroupLost("late")}, "learner 2 lost the others: late"),
    ],
)  # fmt: skip
def test_the_cause_is_told_and_not_its_consequences(news: dict[int, Exception], error: str) -> None:
    found, lost = judge(news, size=3, waiting=3 - len(news))
    assert (type(found), str(found), lost) == (CrewLost, error, True)


def test_what_every_rank_fails_with_is_no_loss_that_another_group_would_mend() -> None:
    news = {rank: broken(rank) for rank in range(3)}
    assert judge(news, size=3, waiting=0) == (news[0], True)
    assert isinstance(judge({**news, 2: broken(2, "KeyError: 'another'")}, size=3, waiting=0)[0], CrewLost)


@pytest.mark.parametrize("known", [NonFiniteLoss("no number"), UserError("a bad word"), PeerError("learner 1 failed")])
def test_an_error_that_all_know_is_raised_as_it_is_and_loses_nobody(known: Exception) -> None:
    assert judge({0: known, 1: UserError("mine"), 2: known}, size=3, waiting=0) == (known, False)
    assert judge({1: known}, size=3, waiting=2) == (known, True)  # the others never heard of it


def asked(count: int) -> list[Future[Any]]:
    return [Future() for _ in range(count)]


def test_a_call_is_done_with_the_answer_of_the_first_rank() -> None:
    ended: list[str] = []
    crew = Crew(lambda: ended.append("ended"))
    first, second = asked(2), asked(2)
    results = [crew.call(first), crew.call(second)]
    first[0].set_result(3)
    assert results[0].result(timeout=DEADLINE) == 3
    second[0].set_result(4)
    assert results[1].result(timeout=DEADLINE) == 4
    for answer in (first[1], second[1]):
        answer.set_result(None)
    crew.close()
    assert crew.lost is None
    assert not ended


def test_a_death_that_no_call_waits_for_fails_the_next_one() -> None:
    ended: list[str] = []
    crew = Crew(lambda: ended.append("ended"), moment=0.0)
    joining, learning = asked(2), asked(2)
    crew.call(joining)
    result = crew.call(learning)
    joining[1].set_exception(Died("killed"))
    for call in (result, crew.call(asked(2))):
        with pytest.raises(CrewLost, match=r"^learner 1 died: killed$"):
            call.result(timeout=DEADLINE)
    crew.close()
    assert ended == ["ended"]
