"""A learning phase cut short goes on from the state that it saved, to the same bits as if never interrupted."""

from __future__ import annotations

import logging
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from selfplay import checkpoint
from selfplay.config import Config
from selfplay.errors import Interrupted
from selfplay.group import Group
from selfplay.shards import list_shards
from selfplay.trainer import Trainer
from tests.selfplay.groups import run_group
from tests.selfplay.places import held, save
from tests.selfplay.test_resume import outcome, run_child, undisturbed  # noqa: F401
from tests.selfplay.tiny_run import CONFIG, SAVED, tiny_config

LONGER = ("warmup.steps=23", "learn.steps=14", "learn.replay=0.25", "warmup.negative_share=0.5")
KINDS = {
    "adamw": (),
    "muon": ("learn.optimizer={name: muon}",),
    "kl": ("learn.objective={name: alphazero, kl: 0.1, nll: 1.0}",),
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with traces."""
    run = tmp_path_factory.mktemp("played") / "run"
    done = run_child("never", run)
    assert done.returncode == 0, done.stderr
    return run


class Steps:
    """The steps that a phase reported; asks for a stop at one of them."""

    def __init__(self, trainer: Trainer | None = None, stop_at: int = 0) -> None:
        self.seen: list[int] = []
        self.trainer = trainer
        self.stop_at = stop_at

    def __call__(self, done: int, total: int, facts: dict[str, Any]) -> None:  # noqa: ARG002
        self.seen.append(done)
        if self.trainer is not None and done == self.stop_at:
            self.trainer.stop()


def phase(trainer: Trainer, run: Path, what: str, steps: Steps, shards: Sequence[Path] | None = None) -> dict[str, Any]:
    if what == "warm-up":
        return trainer.warm_up(steps)
    trainer.restore(checkpoint.path_of(run / "checkpoints", 0))
    return trainer.learn(1, list_shards(run, first=1, last=1) if shards is None else shards, steps)


def everything(trainer: Trainer) -> dict[str, Any]:
    learner = trainer.learner
    assert learner.policy.head is not None
    state = learner.state_dict()
    tensors = {
        f"{name} {key} {what}": value
        for name, optimizer in state.items()
        for key, entries in optimizer["state"].items()
        for what, value in entries.items()
    }
    return {**learner.policy.model.state_dict(), **learner.policy.head.state_dict(), **tensors}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def config_of(kind: str, *more: str) -> Config:
    return tiny_config(*LONGER, *KINDS[kind], *more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["warm-up", "learn"])
def test_a_phase_asked_to_stop_saves_and_goes_on_to_the_same_bits(
    what: str, kind: str, played: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(played, run)
    if kind == "muon":  # a checkpoint of that optimiser
        first = Trainer(config_of(kind), held(run))
        first.warm_up(Steps())
        first.save(0, {})
    through = Trainer(config_of(kind), held(run))
    expected = phase(through, run, what, Steps())

    stopped = Trainer(config_of(kind), held(run))
    with pytest.raises(Interrupted, match="after 11 steps"):
        phase(stopped, run, what, Steps(stopped, stop_at=10))
    again, steps = Trainer(config_of(kind), held(run)), Steps()
    found = phase(again, run, what, steps)
    assert 10 not in steps.seen  # it did not begin again
    assert found == expected
    assert same(everything(again), everything(through))
    again.save(1, {})
    assert not (run / "checkpoints" / "partial").exists()


def test_a_stop_after_the_last_step_leaves_nothing_to_interrupt(played: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(played, run)
    trainer = Trainer(config_of("adamw"), held(run))
    steps = Steps(trainer, stop_at=14)
    assert phase(trainer, run, "learn", steps)["steps"] == 14.0
    assert not (run / "checkpoints" / "partial").exists()


@pytest.mark.parametrize("reason", ["other traces", "other weights", "other config", "other group", "damaged"])
def test_a_saved_state_of_another_phase_is_ignored_and_said_so(
    reason: str, played: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(played, run)
    stopped = Trainer(config_of("adamw"), held(run))
    with pytest.raises(Interrupted):
        phase(stopped, run, "learn", Steps(stopped, stop_at=10))
    config, shards = config_of("adamw"), list_shards(run, first=1, last=1)
    if reason == "other traces":
        shards = shards[:-1]
    elif reason == "other weights":
        other = Trainer(config_of("adamw"), held(run))
        other.restore(checkpoint.path_of(run / "checkpoints", 1))
        save(run / "checkpoints", 0, other.learner.policy, other.learner.state_dict(), {})
    elif reason == "other config":
        config = config_of("adamw", "learn.lr_scale=0.5")
    elif reason == "other group":
        config = config_of("adamw", "cluster={executor: ray, learners: 2}")
    else:
        (run / "checkpoints" / "partial" / "00001" / "optimizer.pt").write_bytes(b"no")
    again, steps = Trainer(config, held(run)), Steps()
    with caplog.at_level(logging.WARNING):
        phase(again, run, "learn", steps, shards)
    assert steps.seen == [10, 14]
    (record,) = [record for record in caplog.records if "begins again" in record.message]
    assert record.message.startswith("learning of iteration 1 begins again: ")


def test_a_phase_saves_as_often_as_the_config_says(played: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(played, run)
    saved = []
    monkeypatch.setattr(Trainer, "save_partial", lambda *arguments: saved.append(arguments[2]["counts"]["steps"]))
    phase(Trainer(config_of("adamw"), held(run)), run, "learn", Steps())
    assert saved == []
    phase(Trainer(config_of("adamw", "cluster.save_seconds=1e-9"), held(run)), run, "learn", Steps())
    assert saved == list(range(1, 14))  # after the last step there is nothing to save


@pytest.mark.parametrize("moment", SAVED)
def test_a_run_killed_within_a_saved_phase_resumes_to_the_same_end(
    moment: str,
    tmp_path: Path,
    undisturbed: dict[str, Any],  # noqa: F811
) -> None:
    config = tmp_path / "often.yaml"
    config.write_text(CONFIG.replace("learner_threads: 1", "learner_threads: 1, save_seconds: 1.0e-9"))
    run = tmp_path / "run"
    killed = run_child(moment, run, config)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.existing(run / "checkpoints" / "partial") == [SAVED.index(moment)]
    resumed = run_child("never", run)
    assert resumed.returncode == 0, resumed.stderr
    assert "begins again" not in resumed.stderr
    assert outcome(run) == undisturbed
    assert not (run / "checkpoints" / "partial").exists()


def stopped_group(group: Group, run: Path) -> list[Any]:
    """A group in which one rank alone is asked to stop, and one that goes on where it stopped: metrics, steps seen."""
    config = config_of("adamw", "cluster={executor: ray, learners: 2}")
    stopped = Trainer(config, held(run), group)
    try:
        phase(stopped, run, "learn", Steps(stopped, stop_at=10 * group.rank))
    except Interrupted:
        again, steps = Trainer(config, held(run), group), Steps()
        found = phase(again, run, "learn", steps)
        through = Trainer(config, held(run), group)
        through.store.remove("checkpoints/partial") if group.rank == 0 else None
        group.gather("")
        expected = phase(through, run, "learn", Steps())
        return [found == expected, same(everything(again), everything(through)), steps.seen]
    return []


def test_a_group_stopped_by_one_of_its_ranks_goes_on_to_the_same_bits(played: Path, tmp_path: Path) -> None:
    shutil.copytree(played, tmp_path / "run")
    held(tmp_path / "run")
    assert run_group(2, tmp_path, stopped_group, tmp_path / "run") == [[True, True, [14]]] * 2
