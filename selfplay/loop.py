"""One run: warm up, then play, learn, checkpoint, evaluate, and round again; resumable at every point.

What a phase does is a function of the config, the last checkpoint and the committed shards, so a killed run goes on
by doing the interrupted phase again: committed units are kept, everything else of that phase is repeated.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mcts.tasks import load_task
from mcts.types import Problem, SearchError
from selfplay import checkpoint as checkpoints
from selfplay.config import Config
from selfplay.errors import Interrupted, NonFiniteLoss
from selfplay.evaluation import Evaluation
from selfplay.executor import Executor, Learned
from selfplay.fleet import Evaluated
from selfplay.problems import SolveRates, draw_problems
from selfplay.repair import incomplete, replayable
from selfplay.retention import checkpoints_gone, delete_traces, resume_points
from selfplay.run_folder import RunFolder
from selfplay.shards import ReplayWindow, list_shards, shard_key, shard_path
from selfplay.stats import wilson
from selfplay.summary import PlaySummary, merge, summarise_shards
from selfplay.worker import Played, Unit, stream_seed, units_of

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Longest wait for something to happen before the loop looks around."""
COLLAPSE = 0.5
"""A dev score below this share of the best one so far, with intervals apart, is a collapse."""


@dataclass(frozen=True, slots=True)
class Event:
    """What the loop tells whoever watches: a phase's progress, or the metrics of a finished iteration."""

    phase: str
    iteration: int
    done: int = 0
    total: int = 0
    facts: dict[str, Any] | None = None


Watcher = Callable[[Event], None]


class Loop:
    """Drives one run to its last iteration. `run` is open, `executor` ready; both are closed by the caller.

    With `play.max_staleness: 0` play, learning and evaluation alternate. With s above 0 the units of an iteration are
    handed out as soon as all iterations but the s + 1 before it were learned from, so workers play while the learner
    learns, with the newest weights there are; evaluations take their turn among the units. Which problems an
    iteration plays depends on what was known s + 1 iterations before it, never on timing.
    """

    def __init__(self, run: RunFolder, executor: Executor, watch: Watcher) -> None:
        self.run = run
        self.config: Config = run.config
        self.executor = executor
        self.watch = watch
        self.staleness = self.config.play.max_staleness
        task = load_task(self.config.task.name, **self.config.task.settings)
        self.task = task
        self.problems: Sequence[Problem] = task.problems("train")
        self.index = {p.id: i for i, p in enumerate(self.problems)}
        before = run.metrics()
        self.began = time.perf_counter() - (before[-1]["wall_seconds"] if before else 0.0)
        self.learner_at: int | None = None
        """Checkpoint whose weights and optimiser state the learner holds."""
        self.learned = 0
        """Newest checkpoint there is."""
        self.playing_with: int | None = None
        """Checkpoint whose weights new units are played with."""
        self.may_play = 0
        """Newest iteration that alternation allows to be played."""
        self.submitted = 0
        """Newest iteration whose units were handed out."""
        self.missing: dict[int, set[int]] = {}
        """Parts without a shard, of each iteration under way."""
        self.summaries: dict[tuple[int, int], PlaySummary] = {}
        """Of units that this driver committed, by iteration and part, until the iteration is learned from."""
        self.play_began: dict[int, float] = {}
        self.play_ended: dict[int, float] = {}
        self.evaluating: dict[int, Evaluation] = {}
        self.learning: Learned | None = None
        self.stopping = False

    def stop(self) -> bool:
        """Ask for an end that saves first: a learning phase saves its state, a checkpoint that is being written is
        finished, and `go` raises Interrupted; what was committed is safe anyway. False where nothing needs saving and
        this thread is at work itself, so that only an exception ends it soon."""
        if not self.executor.learning and self.executor.inline:
            return False
        self.stopping = True
        self.executor.stop()
        return True

    def go(self) -> list[dict[str, Any]]:
        """Run what is missing; the rows of metrics.jsonl."""
        last = checkpoints.latest(self.run.checkpoints)
        if last is None:
            self._warm_up()
            last = 0
        else:
            self.run.store.pull(checkpoints.name_of(last).as_posix())
            checkpoints.verify(self._checkpoint(last))
        self.learned = self.submitted = last
        done = {row["iteration"] for row in self.run.metrics()}
        for iteration in checkpoints.existing(self.run.checkpoints):
            if iteration not in done:
                self._evaluate(iteration)
        self._repair(last)
        for iteration in range(last + 1, self.config.iterations + 1):
            self._iterate(iteration)
        self._wait(lambda: not self.evaluating)
        return self.run.metrics()

    def _checkpoint(self, iteration: int) -> Path:
        return checkpoints.path_of(self.run.checkpoints, iteration)

    def _phase(self, phase: str, iteration: int) -> None:
        """A phase has begun: said to whoever watches, and in the heartbeat."""
        self._report(phase, iteration, 0, 0, {})

    def _report(self, phase: str, iteration: int, done: int, total: int, facts: dict[str, Any]) -> None:
        self.run.heartbeat(phase=phase, iteration=iteration, done=done, total=total, **self.executor.facts())
        if phase == "play":
            self.executor.show({"units_done": done, "units_total": total})
        self.watch(Event(phase, iteration, done, total, facts))

    def _wait(self, until: Callable[[], bool]) -> None:
        """See to whatever comes back, and to what may be played ahead, until something is the case."""
        while not until():
            if self.stopping and not self.executor.learning:
                raise Interrupted("asked to stop")
            self._play_ahead()
            for done in self.executor.poll(POLL_SECONDS):
                match done:
                    case Played():
                        self._commit(done)
                    case Evaluated():
                        self._answered(done)
                    case Learned():
                        self.learning = done

    def _learned(self) -> dict[str, Any] | None:
        """Wait for the learning phase under way; its metrics, None where its loss was not finite."""
        self.learning = None
        self._wait(lambda: self.learning is not None)
        assert self.learning is not None
        if isinstance(self.learning.error, NonFiniteLoss):
            return None
        if self.learning.error is not None:
            raise self.learning.error
        return self.learning.metrics

    def _warm_up(self) -> None:
        began = time.perf_counter()
        self.executor.warm_up(partial(self._report, "warm-up", 0))
        self._phase("warm-up", 0)
        metrics = self._learned()
        if metrics is None:
            raise NonFiniteLoss("the loss of the warm-up is not a finite number; lower learn.optimizer.lr")
        state = {
            "iteration": 0,
            "policy_version": 0,
            "rates": SolveRates.empty(len(self.problems)).to_state(),
            "metrics": metrics,
            "seconds": {"learn_seconds": time.perf_counter() - began},
        }
        self._save(0, state)
        self.learner_at = 0

    def _iterate(self, iteration: int) -> None:
        self._wait(lambda: len(self.evaluating) <= self.staleness)
        base = self._base(iteration)  # the newest weights play, and are learned on; after a rollback the last good ones
        self._publish(base, play=True)
        self.may_play = iteration
        self._phase("play", iteration)
        self._wait(partial(self._is_played, iteration))
        del self.missing[iteration]
        summary = self._summary(iteration)
        played = time.perf_counter()
        rates = SolveRates.from_state(checkpoints.read_state(self._checkpoint(iteration - 1))["rates"])
        rates.update(*summary.rates(self.index))
        base = self._base(iteration)
        metrics = self._learn(iteration, base)
        diverged = metrics is None
        if diverged:
            log.warning("iteration %d: the loss was not finite; the weights of checkpoint %d are kept", iteration, base)
            self.executor.restore(checkpoints.name_of(base))
        seconds = self.play_ended.pop(iteration) - self.play_began.pop(iteration)
        state = {
            "iteration": iteration,
            "policy_version": iteration,
            "base": base,
            "config_hash": self.config.hash(),
            "rates": rates.to_state(),
            "metrics": {
                **summary.metrics(),
                **(metrics or {}),
                "rolled_back": diverged or base != iteration - 1,
            },
            "seconds": {
                "play_seconds": seconds,
                "learn_seconds": time.perf_counter() - played,
                "tokens_per_second": summary.sampled / seconds if seconds else None,
                **self.executor.costs(),
            },
        }
        self._save(iteration, state)
        self.learner_at = self.learned = iteration
        self._evaluate(iteration)

    def _save(self, iteration: int, state: dict[str, Any]) -> None:
        """Have the learner write its checkpoint, and bring that here: the learner may be on another node."""
        self.executor.save(iteration, state)
        self.run.store.pull(checkpoints.name_of(iteration).as_posix())

    def _base(self, iteration: int) -> int:
        """The checkpoint that `iteration` starts from: the one before it, or the best on dev if that one collapsed."""
        rows = [row for row in self.run.metrics() if row["iteration"] < iteration]
        return last_good(rows, default=iteration - 1)

    def _publish(self, version: int, *, play: bool) -> None:
        """Make a checkpoint's weights known to the workers; with `play`, new units are played with them."""
        if self.playing_with != version:
            self.executor.publish(checkpoints.name_of(version), version, play=play)
            self.playing_with = version if play else self.playing_with

    def _play_ahead(self) -> None:
        """Hand out the units of all iterations that may be played now."""
        ahead = min(self.learned + 1 + self.staleness, self.config.iterations) if self.staleness else 0
        while self.playing_with is not None and self.submitted < max(self.may_play, ahead):
            self.submitted += 1
            self._submit(self.submitted, self.playing_with)

    def _submit(self, iteration: int, version: int) -> None:
        known = checkpoints.read_state(self._checkpoint(max(0, iteration - 1 - self.staleness)))
        units = list(self._units(iteration, SolveRates.from_state(known["rates"]), version))
        self.run.store.pull(f"traces/iteration={iteration:05d}")
        missing = [u for u in units if not shard_path(self.run.path, iteration, u.part).exists()]
        self.missing[iteration] = {unit.part for unit in missing}
        self.play_began[iteration] = self.play_ended[iteration] = time.perf_counter()
        for unit in missing:
            self.executor.submit(unit)

    def _units(self, iteration: int, rates: SolveRates, version: int) -> Iterator[Unit]:
        """The iteration's units: a function of the seed and of `rates`."""
        config = self.config.play
        if config.weighting == "uniform":
            weights = np.ones(len(self.problems))
        else:
            weights = rates.weights(config.weight_floor)
        picks = draw_problems(weights, config.problems, seed=self.config.seed, iteration=iteration)
        problems = [
            self.task.vary(p, stream_seed(self.config.seed, iteration, p.id))
            for p in map(self.problems.__getitem__, picks)
        ]
        return units_of(problems, size=config.unit, iteration=iteration, policy_version=version)

    def _repair(self, last: int) -> None:
        """Play those units again whose shards are missing though the next learning phase needs them, or would in a run
        that goes on: a damaged shard is deleted by hand. With `max_staleness: 0` they come out as they were."""
        rows = self.run.metrics()
        for iteration in incomplete(self.run.path, rows, first=last + 2 - self.config.learn.window, last=last):
            log.warning("iteration %d lacks traces; what is missing is played again", iteration)
            base = self._base(iteration)
            replayable(self.run.checkpoints, iteration, base, self.config.hash())
            self.executor.publish(checkpoints.name_of(base), base, play=True)
            self._submit(iteration, base)
            self._wait(partial(self._is_played, iteration))
            del self.missing[iteration], self.play_began[iteration], self.play_ended[iteration]
            self.summaries.clear()

    def _is_played(self, iteration: int) -> bool:
        return self.submitted >= iteration and not self.missing[iteration]

    def _commit(self, played: Played) -> None:
        iteration = played.unit.iteration
        name = shard_path(Path(), iteration, played.unit.part).as_posix()
        if self.run.store.commit(played.pending, name) and played.summary is not None:
            self.summaries[iteration, played.unit.part] = played.summary
        missing = self.missing[iteration]
        missing.remove(played.unit.part)
        self.play_ended[iteration] = time.perf_counter()
        total = math.ceil(self.config.play.problems / self.config.play.unit)
        if iteration == self.learned + 1:
            self._report("play", iteration, total - len(missing), total, {})

    def _summary(self, iteration: int) -> PlaySummary:
        shards = list_shards(self.run.path, first=iteration, last=iteration)
        known = {key: self.summaries.pop(key) for key in map(shard_key, shards) if key in self.summaries}
        summary = merge(known.get(shard_key(shard)) or summarise_shards([shard]) for shard in shards)
        if summary.failed == len(summary.problem_ids):
            raise SearchError(f"every search of iteration {iteration} failed: {summary.failure}")
        if summary.failed:
            log.warning("iteration %d: %d searches failed: %s", iteration, summary.failed, summary.failure)
        return summary

    def _learn(self, iteration: int, base: int) -> dict[str, Any] | None:
        """The metrics of a learning phase; None where its loss was not finite."""
        if self.learner_at != base:
            self.executor.restore(checkpoints.name_of(base))
            self.learner_at = base
        shards = ReplayWindow(self.run.path, self.config.learn.window).shards(last=iteration)
        names = [shard.relative_to(self.run.path) for shard in shards]
        self.executor.learn(iteration, names, partial(self._report, "learn", iteration))
        self._phase("learn", iteration)
        return self._learned()

    def _evaluate(self, iteration: int) -> None:
        """Begin to measure a checkpoint: greedy pass@1 on dev and held-out, pass@k beside it. Its row of metrics.jsonl
        follows once all answers are there and the rows before it are written."""
        config = self.config
        evaluation = Evaluation(self.task, config, iteration, time.perf_counter())
        self.evaluating[iteration] = evaluation
        if self.staleness and iteration == self.learned:
            self._publish(iteration, play=True)  # play that is ahead goes on with the newest weights at once
        if iteration % config.evaluate.every == 0 or iteration == config.iterations:
            self._phase("evaluate", iteration)
            self._publish(iteration, play=False)
            for job in evaluation.jobs:
                self.executor.submit(job)
        else:
            evaluation.waiting.clear()
        self._write_rows()

    def _answered(self, done: Evaluated) -> None:
        self.evaluating[done.job.policy_version].take(done)
        self._write_rows()

    def _write_rows(self) -> None:
        """The rows of all evaluations that are complete, oldest first."""
        while self.evaluating and not self.evaluating[oldest := min(self.evaluating)].waiting:
            self._row(oldest, self.evaluating.pop(oldest))

    def _row(self, iteration: int, evaluation: Evaluation) -> None:
        state = checkpoints.read_state(self._checkpoint(iteration))
        row: dict[str, Any] = {"iteration": iteration, "policy_version": iteration, **state["metrics"]}
        row |= evaluation.scores() | state["seconds"]
        row["evaluate_seconds"] = time.perf_counter() - evaluation.began
        row["wall_seconds"] = time.perf_counter() - self.began
        self.run.append_metrics(row)
        self.executor.show(row)
        self.watch(Event("iteration", iteration, facts=row))
        self._retain()

    def _retain(self) -> None:
        """Delete what the config does not keep."""
        keep, staleness, store = self.config.keep, self.config.play.max_staleness, self.run.store
        rows, numbers = self.run.metrics(), checkpoints.existing(self.run.checkpoints)
        needed = {
            last_good([row for row in rows if row["iteration"] <= point], default=point)
            for point in resume_points(numbers, staleness)
        }
        for number in checkpoints_gone(numbers, rows, keep, staleness=staleness, needed=needed):
            store.remove(checkpoints.name_of(number).as_posix())
        delete_traces(store, numbers, keep, window=self.config.learn.window, staleness=staleness)


def last_good(rows: Sequence[dict[str, Any]], *, default: int) -> int:
    """The newest checkpoint, unless its dev score collapsed: then the best one on dev so far.

    A collapse is a score below COLLAPSE times the best with Wilson intervals that do not touch.
    """
    scored = [row for row in rows if row.get("dev_pass1") is not None]
    if not scored:
        return default
    best = max(scored, key=lambda row: row["dev_pass1"])
    newest = scored[-1]
    if any(row.get("rolled_back") for row in rows if row["iteration"] > newest["iteration"]):
        return default  # it was answered already, and what came after is not scored yet
    if newest["dev_pass1"] >= COLLAPSE * best["dev_pass1"]:
        return default
    _, high = wilson(round(newest["dev_pass1"] * newest["dev_problems"]), newest["dev_problems"])
    low, _ = wilson(round(best["dev_pass1"] * best["dev_problems"]), best["dev_problems"])
    return int(best["iteration"]) if high < low else default
