"""Learners as actors: what two processes learn, errors as they were raised, and a rank that dies."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray

from selfplay.checkpoint import CheckpointError, path_of
from selfplay.cluster.learners import Learners
from selfplay.crew import CrewLost
from selfplay.errors import Interrupted, NonFiniteLoss
from selfplay.group import Group
from selfplay.trainer import Trainer
from tests.selfplay.groups import run_group
from tests.selfplay.places import held
from tests.selfplay.test_partial import Steps
from tests.selfplay.test_resume import ROOT
from tests.selfplay.tiny_run import tiny_config

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
DEADLINE = 300.0
CONFIG = tiny_config(
    "cluster={executor: ray, learners: 2, learner_cpus: 0.5, learner_threads: 1, save_seconds: 1.0e-9}",
    "learn.steps=40",
    "learn.replay=0.5",
)
"""Learning from worked examples alone, where no traces are given; its state is saved after every step."""


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": variables},
    )
    yield
    ray.shutdown()


@pytest.fixture
def learners(tmp_path: Path) -> Iterator[Learners]:
    found = Learners(CONFIG, held(tmp_path / "run"))
    yield found
    found.kill()


def get(call: Future[Any]) -> Any:
    return call.result(timeout=DEADLINE)


def digests(run: Path, iteration: int) -> list[str]:
    files = sorted(path_of(run / "checkpoints", iteration).rglob("*.safetensors"))
    assert len(files) == 2
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def learn_without_ray(group: Group, run: Path) -> dict[str, Any]:
    trainer = Trainer(CONFIG, held(run), group)
    trainer.warm_up(Steps())
    trainer.save(0, {})
    found = trainer.learn(1, [], Steps())
    trainer.save(1, {})
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    """Digests of the weights and the metrics of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("expected")
    first, second = run_group(2, folder, learn_without_ray, folder / "run")
    assert first == second
    return digests(folder / "run", 1), first


def test_actors_learn_what_two_processes_learn_although_they_are_killed(
    learners: Learners, tmp_path: Path, expected: tuple[list[str], dict[str, Any]]
) -> None:
    run = tmp_path / "run"
    get(learners.warm_up())
    assert get(learners.save(0, {"kept": 1})) == path_of(run / "checkpoints", 0)
    for rank in (1, 0):
        call = learners.learn(1, [])
        began = time.monotonic()
        while (learners.progress() or (0, 0, {}))[:2] not in ((10, 40), (20, 40), (30, 40)):
            assert time.monotonic() < began + DEADLINE
        os.kill(learners.process_ids()[rank], signal.SIGKILL)
        with pytest.raises(CrewLost, match=f"^learner {rank} died: "):
            get(call)
        learners.restart()
        get(learners.restore(path_of(run / "checkpoints", 0)))
    metrics = get(learners.learn(1, []))
    get(learners.save(1, {}))
    assert (digests(run, 1), metrics) == expected
    assert not (run / "checkpoints" / "partial").exists()


def test_errors_of_the_trainer_arrive_as_they_were_raised_and_kill_nobody(learners: Learners, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        get(learners.restore(tmp_path / "nowhere"))
    before = learners.process_ids()
    get(learners.warm_up())
    get(learners.save(0, {}))
    get(learners.rest())
    learners.stop()
    with pytest.raises(Interrupted):
        get(learners.learn(1, []))
    assert learners.process_ids() == before
    assert learners.alive


def test_a_loss_that_is_no_number_is_told_as_such(tmp_path: Path) -> None:
    wild = CONFIG.model_copy(update={"learn": CONFIG.learn.model_copy(update={"steps": 10, "lr_scale": 1e38})})
    learners = Learners(wild, held(tmp_path / "run"))
    try:
        get(learners.warm_up())
        with pytest.raises(NonFiniteLoss):
            get(learners.learn(1, []))
    finally:
        learners.kill()
