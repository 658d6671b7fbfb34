"""The executor on Ray: a supervised fleet of workers, and the learners, driven from one thread."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

from selfplay.cluster.gauges import Gauges
from selfplay.cluster.learners import Learners
from selfplay.cluster.nodes import Nodes, connect
from selfplay.cluster.proof import prove
from selfplay.cluster.weights import Weights, publish
from selfplay.cluster.workers import RayFleet
from selfplay.config import Config
from selfplay.crew import CrewLost
from selfplay.errors import Interrupted, NonFiniteLoss
from selfplay.executor import Done, Learned, Progress
from selfplay.fleet import Evaluated
from selfplay.pieces import Complete
from selfplay.run_folder import RunError
from selfplay.store import Place, on_this_node
from selfplay.supervisor import Supervisor
from selfplay.units import join
from selfplay.worker import EvaluationJob, Unit

log = logging.getLogger(__name__)
PROGRESS_SECONDS = 0.5
LEARNERS_PATIENCE = 4.0
"""Learners may be silent for so many times `silence_seconds`: loading a model takes them a while."""
MOST_SAID = 300
"""Characters of what a learner failed with that are shown."""
EVENTS_KEPT = 20
"""Lines about what failed that `status` shows."""


class RayExecutor:
    """Workers and learners as actors of a Ray of its own, or of a cluster that it joins. `fleet` and `learners` are
    what manages them."""

    inline = False

    def __init__(
        self,
        config: Config,
        place: Place,
        *,
        fleet: Callable[[Config, Place, Nodes], RayFleet] = RayFleet,
        learners: Callable[[Config, Place], Learners] = Learners,
    ) -> None:
        self._config = config
        self._place = place
        self._store = place.open()
        self._lately: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        connect(config)
        self._nodes = Nodes(config)
        prove(self._nodes, self._store)
        self._fleet = fleet(config, place, self._nodes)
        cluster = config.cluster
        self._supervisor = Supervisor(
            self._fleet,
            time.monotonic,
            restarts=cluster.restarts,
            lease_seconds=cluster.lease_seconds,
            silence_seconds=cluster.silence_seconds,
            deaths_alone=cluster.deaths_alone,
            note=self._note,
        )
        self._gauges = Gauges(place.run_id)
        self._published: dict[int, Weights] = {}
        self._learners = learners(config, place)
        self._at: Path | None = None
        """Checkpoint that the learners begin from after a restart; None: from the config."""
        self._phase: Callable[[], Future[Any]] | None = None
        self._call: Future[Any] | None = None
        self._progress: Progress | None = None
        self._asked = 0.0
        self._started = time.monotonic()
        self._heard: float | None = None
        """When the learners last gave a sign of life; None: not since they were started, which may wait for room."""
        self._stopping = False

    @property
    def learning(self) -> bool:
        return self._phase is not None

    def _tell(self, line: str) -> None:
        log.warning(line)
        self._note(line)

    def _note(self, line: str) -> None:
        self._lately.append({"time": time.time(), "line": line})

    def publish(self, checkpoint: Path, version: int, *, play: bool) -> None:
        if version not in self._published:
            checkpoint = on_this_node(self._store, checkpoint)
            if self._config.engine.kind == "server":  # a server reads the folder itself
                weights = Weights(version, self._place.run_id, 0, (), checkpoint)
            else:
                weights = publish(checkpoint, version, self._place.run_id)
            self._fleet.publish(weights)
            self._published = {version: weights}
        if play:
            self._supervisor.version = version

    def submit(self, work: Unit | EvaluationJob) -> None:
        self._supervisor.submit(work)

    def warm_up(self, progress: Progress) -> None:
        self._begin(lambda: self._learners.warm_up(), progress)

    def learn(self, iteration: int, shards: Sequence[Path], progress: Progress) -> None:
        self._begin(lambda: self._learners.learn(iteration, shards), progress)

    def _begin(self, phase: Callable[[], Future[Any]], progress: Progress) -> None:
        if self._config.cluster.by_turns:
            self._fleet.rest()
        if self._heard is not None:
            self._heard = time.monotonic()
        self._phase, self._progress = phase, progress
        self._start()

    def _start(self) -> None:
        """Call the learners; `poll` wakes when the answer is there."""
        assert self._phase is not None
        self._call = self._phase()
        self._call.add_done_callback(self._fleet.wake)

    def poll(self, seconds: float) -> list[Done]:
        done: list[Done] = []
        if self._stopping and self._call is not None:
            self._stopping = False
            self._learners.stop()
        for found in self._supervisor.poll(0.0 if self._learning_is_done() else min(seconds, PROGRESS_SECONDS)):
            match found:
                case Complete():
                    done.append(join(self._store, self._config, found))
                case Evaluated():
                    done.append(found)
        strays, self._supervisor.strays[:] = list(self._supervisor.strays), []
        for stray in strays:
            self._store.remove(stray)
        if self._learning_is_done():
            learned = self._take_learned()
            if learned is not None:
                done.append(learned)
        elif self._call is not None:
            self._show_progress()
        return done

    def _learning_is_done(self) -> bool:
        return self._call is not None and self._call.done()

    def _take_learned(self) -> Learned | None:
        """What came of the phase; None where the learners were lost and it was begun again."""
        call, self._call = self._call, None
        assert call is not None
        try:
            return Learned(call.result())
        except (NonFiniteLoss, Interrupted) as error:
            self._phase = None
            return Learned({}, error)
        except CrewLost as error:
            self._revive(error)
            self._start()
            return None

    def _revive(self, error: Exception) -> None:
        """Learners anew, on the checkpoint that the lost ones began from; within the budget of restarts."""
        cause = str(error).splitlines()[0][:MOST_SAID]
        self._supervisor.spend_restart(f"the learners are lost again and again, the last time because {cause}")
        self._supervisor.counts.restarts += 1
        self._tell(
            f"learners lost ({cause}); they start again from "
            f"{'the beginning' if self._at is None else f'checkpoint {self._at.name}'} or what the phase saved since; "
            f"{self._supervisor.restarts_left} restarts left"
        )
        self._learners.restart()
        self._heard, self._started = None, time.monotonic()
        if (at := self._at) is not None:
            self._answer(lambda: self._learners.restore(at))

    def _answer(self, call: Callable[[], Future[Any]], before: Callable[[], Future[Any]] | None = None) -> Any:
        """The result of a learner call, made again where the learners are lost under it: after `before`, where it needs
        what they learned since their checkpoint."""
        while True:
            try:
                return call().result()
            except CrewLost as error:
                self._revive(error)
                if before is not None:
                    self._answer(before)

    def _show_progress(self) -> None:
        now = time.monotonic()
        if self._progress is None or now - self._asked < PROGRESS_SECONDS:
            return
        self._asked = now
        found = self._learners.progress()
        if found is not None:
            self._heard = time.monotonic()
            self._progress(*found)
        elif self._heard is None:
            if now - self._started > self._config.cluster.silence_seconds:
                self._started = math.inf  # said once
                self._tell("the learners have not come up yet: they wait for room, or load a large model")
        elif now - self._heard > LEARNERS_PATIENCE * self._config.cluster.silence_seconds:
            self._revive(RunError(f"no sign of life for {now - self._heard:.0f} s"))
            self._start()

    def restore(self, checkpoint: Path) -> None:
        self._at = checkpoint
        self._answer(lambda: self._learners.restore(checkpoint))

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        """A learner that dies before its weights are saved takes them along: the phase is done again then."""
        path: Path = self._answer(lambda: self._learners.save(iteration, state), before=self._phase)
        self._at = Path("checkpoints") / path.name
        self._phase = None
        if self._config.cluster.by_turns:
            self._learners.rest()
        return path

    def stop(self) -> None:
        self._stopping = True

    def facts(self) -> dict[str, Any]:
        counts, alive, wanted = self._supervisor.counts, self._supervisor.alive, self._fleet.wanted()
        self._gauges.set("workers_alive", alive)
        self._gauges.set("workers_wanted", wanted)
        self._gauges.set("restarts", counts.restarts)
        self._gauges.set("lease_losses", counts.leases_lost)
        return {
            "workers": {"alive": alive, "wanted": wanted},
            "restarts": counts.restarts,
            "restarts_left": self._supervisor.restarts_left,
            "leases_lost": counts.leases_lost,
            "failed_problems": counts.failed_problems,
            "events": list(self._lately),
        }

    def costs(self) -> dict[str, float]:
        fetched, self._fleet.fetched[:] = list(self._fleet.fetched), []
        return {
            "broadcast_bytes": float(sum(one.bytes for one in fetched)),
            "broadcast_seconds": max((one.seconds for one in fetched), default=0.0),
        }

    def show(self, figures: Mapping[str, Any]) -> None:
        self._gauges.set_row(figures)

    def close(self) -> None:
        self._fleet.close()
        self._learners.kill()
        ray.shutdown()
