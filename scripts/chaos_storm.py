"""One run on a cluster of its own, and the faults that hit it."""

from __future__ import annotations

import faulthandler
import heapq
import itertools
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from chaos_faults import KINDS, REPLACE_SECONDS, RESUME_SECONDS, Fault
from chaos_job import Job, Options
from chaos_sight import LEARNER, RAYLET, WORKER, Memory, Progress, Seen, look_around

from tests.cluster_net import QUICK_TO_NOTICE, Cluster, Node
from tests.spaces import Process

TURN_SECONDS = 0.25
LOOK_SECONDS = 1.0
MEMORY_SECONDS = 5.0
TERM_SLACK_SECONDS = 15.0
"""Granted to a driver beyond its grace time: this machine has two cores for a whole cluster."""
MOST_DEFECTS = 5
"""Drivers that may end without a fault that explains it before the storm gives the run up."""
STALL_SECONDS = 180.0
"""A turn of the storm's own loop that takes longer is a hang of the storm: it prints where it stands and exits."""


@dataclass(slots=True)
class Outcome:
    """What came of a storm."""

    seed: int
    faults: list[Fault]
    finished: bool
    seconds: float
    usual_gap: float
    """Median seconds between two steps of progress while no fault was open."""
    defects: list[str]
    """What no fault explains."""
    hung: str
    """What it waited for when patience ended; empty where it did not."""
    memory: dict[str, dict[str, float]] = field(default_factory=dict)

    def lost(self, fault: Fault) -> float | None:
        """Seconds from the fault to the next progress, minus the usual gap, never below zero."""
        return None if fault.progressed is None else max(0.0, fault.progressed - fault.at - self.usual_gap)


class Storm:
    """Builds the cluster, starts the job, disturbs it and watches, all in one thread, turn by turn."""

    def __init__(self, options: Options, folder: Path, seed: int, log: IO[str]) -> None:
        self.options = options
        self.seed = seed
        self.random = random.Random(seed)
        self.run = folder / "run"
        self.stopped: set[int] = set()
        """Processes under SIGSTOP."""
        self.joining: list[tuple[Node, Process, Fault | None]] = []
        self.faults: list[Fault] = []
        self.crew: list[Seen] = []
        """All processes of the cluster, at the last look."""
        self._folder = folder
        self._log = log
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._progress = Progress(self.run)
        self._memory = Memory()
        self._gaps: list[float] = []
        self._defects: list[str] = []
        self._ending: Fault | None = None
        """The fault that asked the driver to end."""
        self._excuse: Fault | None = None
        """The fault because of which the driver may end."""
        self._began = time.monotonic()
        self._wanted = options.config.cluster.workers

    # what faults use

    def now(self) -> float:
        return time.monotonic() - self._began

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now() + seconds, next(self._order), action))

    @property
    def interrupted(self) -> bool:
        """Whether the last end of driver or learner is not overcome yet. Another one now would only show that a job
        makes no progress if it is interrupted faster than it starts."""
        return any(fault.interrupts and fault.progressed is None for fault in self.faults)

    def spare_nodes(self) -> list[Node]:
        """Nodes that may be lost: joined, connected, not the head, and another one beside them."""
        joining = [node for node, _, _ in self.joining]
        usable = [node for node in self.cluster.living if node not in joining and node.connected]
        if len(usable) < 3:
            return []
        kept = [self.cluster.head, *([self.job.node] if self.interrupted else [])]
        return [node for node in usable if node not in kept]

    def repaired(self, fault: Fault) -> None:
        fault.repaired = self.now()

    def resume_later(self, fault: Fault | None) -> None:
        def resume() -> None:
            if not self.job.running:
                joining = [node for node, _, _ in self.joining]
                usable = [node for node in self.cluster.living if node.connected and node not in joining]
                self.job.start(self.random.choice(usable))
                self.say(f"driver {self.job.starts} resumes on {self.job.node.name}")
            self._excuse = self._ending = None
            if fault is not None:
                self.repaired(fault)

        self.later(self.random.uniform(*RESUME_SECONDS), resume)

    def replace_later(self, fault: Fault | None, *, then_resume: bool) -> None:
        """A new node in a moment, and a driver where the old one had it."""

        def join() -> None:
            node, starting = self.cluster.start_node()
            self.joining.append((node, starting, fault))

        if then_resume:
            self.job.end()
            self.resume_later(self._ending)  # it may have been asked to end, and was not through with it
        self.later(self.random.uniform(*REPLACE_SECONDS), join)

    def ask_to_end(self, fault: Fault) -> None:
        self._ending = fault
        asked = self.job.starts
        allowed = self.options.config.cluster.grace_seconds + TERM_SLACK_SECONDS
        self.job.send(signal.SIGTERM)

        def insist() -> None:
            if self._ending is fault and self.job.running and self.job.starts == asked:
                fault.stuck = f"the driver did not exit within {allowed:.0f} s of SIGTERM"
                self.say(fault.stuck)
                self.job.end()
                self.resume_later(fault)

        self.later(allowed, insist)

    def driver_may_end(self, fault: Fault) -> None:
        """Until a while after the repair."""
        self._excuse = fault

    def no_longer_may_end(self, fault: Fault) -> None:
        if self._excuse is fault:
            self._excuse = None

    # the storm

    def say(self, text: str) -> None:
        line = f"[{self.now():7.1f} s] {text}"
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()

    def go(self) -> Outcome:
        """The whole storm; the cluster is gone when it returns."""
        options = self.options
        environment = QUICK_TO_NOTICE if options.quick else {}
        self.say(f"a cluster of {options.nodes} nodes is being built, seed {self.seed}")
        with Cluster(self._folder / "cluster", nodes=options.nodes, environment=environment) as self.cluster:
            self.job = Job(self.cluster, self.run, options)
            self._began = time.monotonic()
            self.job.start(self.random.choice(self.cluster.living))
            self.say(f"driver 1 on {self.job.node.name}")
            try:
                hung, finished = self._watch()
            finally:
                faulthandler.cancel_dump_traceback_later()
            usual = statistics.median(self._gaps) if self._gaps else 0.0
            return Outcome(
                self.seed, self.faults, finished, self.now(), usual, self._defects, hung, self._memory.figures()
            )

    def _watch(self) -> tuple[str, bool]:
        options = self.options
        last_progress, looked, remembered = 0.0, -LOOK_SECONDS, 0.0
        next_fault = self._pause()
        closing = False
        while True:
            faulthandler.dump_traceback_later(STALL_SECONDS, exit=True, file=sys.__stderr__)
            now = self.now()
            while self._agenda and self._agenda[0][0] <= now:
                heapq.heappop(self._agenda)[2]()
            self._see_joining()
            if now - looked >= LOOK_SECONDS:
                looked, self.crew = now, look_around(self.cluster.living)
                self._replace_lost_nodes()
            if now - remembered >= MEMORY_SECONDS:
                remembered = now
                self._remember(now)
            if self._progress.look():
                if not any(fault.open for fault in self.faults):
                    self._gaps.append(now - last_progress)
                last_progress = now
                for fault in self.faults:
                    if fault.progressed is None:
                        fault.progressed = now
            if (code := self.job.exit_code()) is not None and self._has_ended(code, closing):
                self._close_faults(now)
                return "", True
            if len(self._defects) > MOST_DEFECTS:
                return "", False
            self._see_whole(now)
            if now - last_progress > options.patience:
                return self._what_it_waited_for(now - last_progress), False
            if options.minutes is not None and now > 60 * options.minutes and not closing:
                if not any(fault.open for fault in self.faults):
                    closing = True
                    self.say("time is up: SIGTERM")
                    self.job.send(signal.SIGTERM)
            elif now >= next_fault and not closing and len(self.faults) < options.faults and self._progress.rows:
                self._strike(now)
                next_fault = now + self._pause()
            time.sleep(TURN_SECONDS)

    def _pause(self) -> float:
        return self.random.uniform(0.5, 1.5) * self.options.every

    def _strike(self, now: float) -> None:
        """One fault, of a kind drawn by weight among those that can happen now, rather one that was rare so far."""
        done = Counter(fault.kind for fault in self.faults)
        left = {kind: weight / (1 + done[kind]) ** 2 for kind, weight in self.options.kinds.items()}
        while left:
            (kind,) = self.random.choices(list(left), weights=list(left.values()))
            fault = Fault(kind, now, self._progress.phase)
            detail = KINDS[kind](self, fault)
            if detail is not None:
                fault.detail = detail
                self.faults.append(fault)
                self.say(f"fault {len(self.faults)}: {detail}, during {fault.phase}")
                return
            del left[kind]

    def _see_joining(self) -> None:
        for entry in list(self.joining):
            node, starting, fault = entry
            code = starting.poll()
            if code is None:
                continue
            self.joining.remove(entry)
            if code == 0:
                self.say(f"{node.name} has joined")
                if fault is not None:
                    self.repaired(fault)
            else:
                self.say(f"{node.name} could not join: {(node.folder / 'start.log').read_text()[-500:]}")
                self.cluster.kill(node)
                self.replace_later(fault, then_resume=False)

    def _replace_lost_nodes(self) -> None:
        """A node that Ray gave up while it was cut off ends its raylet; as a service manager would, start it anew."""
        joining = [node for node, _, _ in self.joining]
        with_raylet = {p.node for p in self.crew if RAYLET in p.title}
        for node in self.cluster.living:
            if node.connected and node not in joining and node not in with_raylet and node is not self.cluster.head:
                with_driver = self.job.running and self.job.node is node
                self.say(f"{node.name} has lost its raylet{', driver included' if with_driver else ''}")
                self.cluster.kill(node)
                self.replace_later(None, then_resume=with_driver)

    def _remember(self, now: float) -> None:
        for seen in self.crew:
            if seen.pid == self.job.pid:
                self._memory.note(now, "driver", seen)
            for group, title in (("worker", WORKER), ("learner", LEARNER)):
                if seen.title.startswith(title):
                    self._memory.note(now, group, seen)
            if seen.node is self.cluster.head and "/gcs/gcs_server" in seen.title:
                self._memory.note(now, "Ray's GCS", seen)

    def _see_whole(self, now: float) -> None:
        alive = sum(p.title.startswith(WORKER) and p.pid not in self.stopped and p.still_there for p in self.crew)
        for fault in self.faults:
            enough = alive >= self._wanted if isinstance(self._wanted, int) else alive > 0
            if fault.whole is None and fault.repaired is not None and self.job.running and enough:
                fault.whole = now

    def _close_faults(self, now: float) -> None:
        """The run is at its end: whatever was open has not kept it from there."""
        for fault in self.faults:
            fault.repaired = fault.repaired or now
            fault.progressed = fault.progressed or now
            fault.whole = fault.whole or now

    def _has_ended(self, code: int, closing: bool) -> bool:
        """A driver has ended by itself: whether that is the end of the storm."""
        if closing or (code == 0 and self._progress.rows > self.options.config.iterations):
            self.say(f"driver {self.job.starts} has ended with exit code {code}")
            return True
        explained = self._ending or self._excuse
        why = "as asked" if self._ending else "cut off" if self._excuse else "for no reason known to the storm"
        self.say(f"driver {self.job.starts} has ended with exit code {code}, {why}:\n{self.job.last_lines()}")
        if explained is None:
            self._defects.append(f"driver {self.job.starts} ended with exit code {code}: {self.job.last_lines(3)}")
        self.resume_later(self._ending)
        return False

    def _what_it_waited_for(self, seconds: float) -> str:
        waiting = [fault.waits_for for fault in self.faults if fault.open]
        for fault in self.faults:
            if fault.open:
                fault.stuck = f"no progress for {seconds:.0f} s"
        titles = sorted(f"{p.node.name} {p.title[:60]}" for p in self.crew if p.title.startswith("ray::"))
        text = f"no progress for {seconds:.0f} s at {self._progress.phase}; driver {self.job.starts} "
        text += f"{'runs' if self.job.running else 'does not run'}; open: {'; '.join(waiting) or 'nothing'}; "
        text += f"actors: {titles}; the driver's last lines:\n{self.job.last_lines()}"
        self.say(text)
        return text


def weights_of(kinds: Sequence[str]) -> dict[str, float]:
    """`worker=4` or `worker` each. Raises ValueError."""
    weights: dict[str, Any] = {}
    for text in kinds:
        name, _, weight = text.partition("=")
        if name not in KINDS:
            raise ValueError(f"no kind of fault {name!r}: choose among {', '.join(KINDS)}")
        weights[name] = float(weight or 1)
    return weights
