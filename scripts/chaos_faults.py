"""The faults: what a cluster does to a long job. Each is a function of the storm that says what it did, or None where
it cannot happen just now (no such process, no node to spare)."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaos_sight import LEARNER, WORKER, Seen

from tests.spaces import send

if TYPE_CHECKING:
    from chaos_storm import Storm

RESUME_SECONDS = (0.0, 3.0)
"""After a driver's death, before somebody resumes."""
CUT_SECONDS = (2.0, 30.0)
"""From a hiccup to well beyond the time in which a node is called dead."""
SILENT_SECONDS = (2.0, 25.0)
"""From a pause that is borne to one after which the worker is given up."""
AFTERMATH_SECONDS = 60.0
"""After a cut was healed, in which a driver may still end because of it."""
REPLACE_SECONDS = (0.0, 5.0)
"""After a node's death, before the next one is started."""


@dataclass(slots=True)
class Fault:
    """One fault and what came of it. Times in seconds since the storm began."""

    kind: str
    at: float
    phase: str
    """What the run was doing."""
    detail: str = ""
    interrupts: bool = False
    """Whether it ended the driver or the learner, which then have to come up again before anything goes on."""
    repaired: float | None = None
    """When the storm had done its own part: healed, continued, resumed, put a new node there."""
    progressed: float | None = None
    """When the run first was further than at the fault."""
    whole: float | None = None
    """When, after the repair, as many workers were alive as the config asks for."""
    stuck: str = ""
    """Why it counts as not recovered."""

    @property
    def open(self) -> bool:
        return not self.stuck and (self.repaired is None or self.progressed is None or self.whole is None)

    @property
    def recovered(self) -> bool:
        return not self.stuck and not self.open

    @property
    def waits_for(self) -> str:
        waiting = [("repair", self.repaired), ("progress", self.progressed), ("all workers", self.whole)]
        return f"{self.kind} ({self.detail}) waits for " + ", ".join(name for name, at in waiting if at is None)


def _one(storm: Storm, title: str) -> Seen | None:
    """A random process of that title on a node that can be reached and is not stopped."""
    there = [p for p in storm.crew if p.title.startswith(title) and p.still_there and p.pid not in storm.stopped]
    return storm.random.choice(there) if there else None


def _kill_one(storm: Storm, fault: Fault, title: str) -> str | None:
    chosen = _one(storm, title)
    if chosen is None or not send(chosen.pid, signal.SIGKILL):
        return None
    storm.repaired(fault)
    return f"SIGKILL {chosen.title} {chosen.pid} on {chosen.node.name}"


def worker(storm: Storm, fault: Fault) -> str | None:
    return _kill_one(storm, fault, WORKER)


def learner(storm: Storm, fault: Fault) -> str | None:
    if storm.interrupted:
        return None
    fault.interrupts = True
    return _kill_one(storm, fault, LEARNER)


def driver(storm: Storm, fault: Fault) -> str | None:
    """SIGKILL, then resume, perhaps on another node."""
    if not storm.job.running or storm.interrupted:
        return None
    fault.interrupts = True
    storm.job.end()
    storm.resume_later(fault)
    return f"SIGKILL driver on {storm.job.node.name}"


def term(storm: Storm, fault: Fault) -> str | None:
    """SIGTERM: the driver saves and exits within its grace time; then resume."""
    if not storm.job.running or storm.interrupted:
        return None
    fault.interrupts = True
    storm.ask_to_end(fault)
    return f"SIGTERM driver on {storm.job.node.name}"


def node(storm: Storm, fault: Fault) -> str | None:
    """A whole node dies; a new one joins. Never the head: without it there is no Ray."""
    spare = storm.spare_nodes()
    if not spare or storm.joining:
        return None
    chosen = storm.random.choice(spare)
    with_driver = fault.interrupts = storm.job.running and storm.job.node is chosen
    storm.cluster.kill(chosen)
    storm.replace_later(fault, then_resume=with_driver)
    return f"SIGKILL all of {chosen.name}{', driver included' if with_driver else ''}"


def cut(storm: Storm, fault: Fault) -> str | None:
    """A node's network goes and comes back."""
    spare = storm.spare_nodes()
    if not spare or not storm.cluster.namespaced:
        return None
    chosen, seconds = storm.random.choice(spare), storm.random.uniform(*CUT_SECONDS)
    storm.cluster.cut(chosen)
    if storm.job.running and storm.job.node is chosen:
        fault.interrupts = True
        storm.driver_may_end(fault)

    def heal() -> None:
        storm.cluster.heal(chosen)
        storm.repaired(fault)
        storm.later(AFTERMATH_SECONDS, lambda: storm.no_longer_may_end(fault))

    storm.later(seconds, heal)
    return f"{chosen.name} cut off for {seconds:.0f} s"


def silent(storm: Storm, fault: Fault) -> str | None:
    """A worker that neither works nor dies, for a while."""
    chosen, seconds = _one(storm, WORKER), storm.random.uniform(*SILENT_SECONDS)
    if chosen is None or not send(chosen.pid, signal.SIGSTOP):
        return None
    storm.stopped.add(chosen.pid)

    def go_on() -> None:
        storm.stopped.discard(chosen.pid)
        if chosen.still_there:
            send(chosen.pid, signal.SIGCONT)
        storm.repaired(fault)

    storm.later(seconds, go_on)
    return f"SIGSTOP {chosen.title} {chosen.pid} on {chosen.node.name} for {seconds:.0f} s"


KINDS: dict[str, Callable[[Storm, Fault], str | None]] = {
    "worker": worker,
    "learner": learner,
    "driver": driver,
    "term": term,
    "node": node,
    "cut": cut,
    "silent": silent,
}
