"""Measuring a checkpoint: what counts as a wrong answer, what is none, and the same answers however a job is cut."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from mcts.tasks import load_task
from mcts.types import SearchError
from selfplay.checkpoint import path_of
from selfplay.config import Config
from selfplay.evaluation import Evaluation
from selfplay.fleet import Casualty, Evaluated
from selfplay.lone import Errand, search_alone
from selfplay.trainer import Trainer
from selfplay.worker import Answered, EvaluationJob, Worker
from tests.selfplay.deadly import kills
from tests.selfplay.fake_fleet import answer_of
from tests.selfplay.places import held
from tests.selfplay.test_partial import Steps
from tests.selfplay.tiny_run import tiny_config

COUNTDOWN = "task={name: countdown, numbers: 3, heldout_problems: 24, dev_problems: 16}"
DEADLY = "task={name: tests.selfplay.deadly.Deadly, splits: [heldout]}"
DEADLINE = 120.0


def evaluation(config: Config, given_up: Collection[int] = (), failed: str | None = None) -> Evaluation:
    """An evaluation whose every problem is solved, but those of each split at the places `given_up`."""
    found = Evaluation(load_task(config.task.name, **config.task.settings), config, 3, 0.0)
    place = dict.fromkeys(("heldout", "dev", "samples"), 0)
    for job in found.jobs:
        answers = []
        for problem in job.problems:
            kind = job.part.split("-")[0]
            answers.append(answer_of(problem, "it kills" if place[kind] in given_up else None))
            place[kind] += 1
        if failed is not None:
            answers[0] = replace(answers[0], failed=failed)
        found.take(Evaluated(job, answers))
    assert not found.waiting
    return found


def test_a_problem_that_was_given_up_is_counted_and_counts_as_not_solved() -> None:
    undisturbed = evaluation(tiny_config()).scores()
    assert (undisturbed["heldout_failed"], undisturbed["dev_failed"]) == (0, 0)
    scores = evaluation(tiny_config(), given_up=(1, 9, 20)).scores()
    assert (scores["heldout_failed"], scores["dev_failed"]) == (3, 2)
    assert (scores["heldout_problems"], scores["dev_problems"]) == (24, 16)
    assert scores["heldout_pass1"] == 21 / 24
    assert scores["dev_pass1"] == 14 / 16
    assert scores["heldout_sampled_pass1"] == 21 / 24
    assert scores.keys() == undisturbed.keys()


def test_searches_that_could_not_be_done_are_no_wrong_answers() -> None:
    with pytest.raises(SearchError, match="1 searches of the evaluation could not be done: the server is gone"):
        evaluation(tiny_config(), failed="the server is gone")


def test_no_score_is_made_of_problems_that_were_all_given_up() -> None:
    with pytest.raises(SearchError, match="every held-out problem had to be given up, the first one because it kills"):
        evaluation(tiny_config(), given_up=range(24)).scores()


def worker_of(run: Path, task: str) -> tuple[Worker, Errand]:
    """A worker on a fresh policy, and an errand on the same without its work."""
    place, config = held(run), tiny_config(task, "warmup.steps=0")
    trainer = Trainer(config, place)
    trainer.warm_up(Steps())
    trainer.save(0, {})
    saved = path_of(run / "checkpoints", 0)
    worker = Worker(config, place)
    worker.load(saved, 0)
    return worker, Errand(config, place, saved, EvaluationJob((), config.play.search, 0, 0), os.getpid())


def same(answers: list[Answered]) -> list[Answered]:
    return [replace(answer, seconds=0.0) for answer in answers]


def test_answers_are_the_same_in_one_job_in_its_parts_and_alone_in_a_process(tmp_path: Path) -> None:
    worker, errand = worker_of(tmp_path / "run", COUNTDOWN)
    jobs = Evaluation(worker.task, worker.config, 0, 0.0).jobs
    for job in (jobs[0], jobs[-1]):  # greedy, sampled
        parts = [replace(job, problems=job.problems[first:last]) for first, last in ((0, 3), (3, 7), (7, 8))]
        expected = same(worker.evaluate(job))
        assert same([answer for part in parts for answer in worker.evaluate(part)]) == expected
    alone = search_alone(replace(errand, work=parts[-1]), DEADLINE)
    assert isinstance(alone, list)
    assert same(alone) == expected[7:]


def test_an_evaluated_problem_that_ends_its_process_is_a_casualty_and_recorded_as_given_up(tmp_path: Path) -> None:
    worker, errand = worker_of(tmp_path / "run", DEADLY)
    job = Evaluation(worker.task, worker.config, 0, 0.0).jobs[0]
    deadly = next(problem for problem in worker.task.problems("heldout") if kills(problem))
    job = replace(job, problems=(deadly,), search=worker.config.play.search)
    found = search_alone(replace(errand, work=job), DEADLINE)
    assert found == Casualty("ended by SIGSEGV", own=True)
    recorded = worker.record(job, found.reason)
    assert isinstance(recorded, list)
    assert [(a.problem_id, a.won, a.given_up, a.failed) for a in recorded] == [(deadly.id, False, True, found.reason)]
