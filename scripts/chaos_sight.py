"""What can be seen of a job from outside: how far its run folder has come, which processes work for it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.cluster_net import Node
from tests.spaces import Space, all_pids, title_of

WORKER, LEARNER = "ray::WorkerActor", "ray::LearnerActor"
"""How Ray titles the processes of the actors; a method's name may follow."""
RAYLET = "/raylet/raylet"
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class Progress:
    """How far a run has come. `look` reads its folder; only what no earlier look had reached counts as progress."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.units = 0
        """Committed shards."""
        self.rows = 0
        """Iterations with their row in metrics.jsonl."""
        self.learned = (-1, 0)
        """Iteration (0: the warm-up) and step that the learner has reached."""
        self.phase = "not started"

    def look(self) -> bool:
        """Whether the run is further than ever before: a unit, a step of learning or an iteration more."""
        before = (self.units, self.rows, self.learned)
        self.units = max(self.units, sum(1 for _ in self.run.glob("traces/iteration=*/part-*.arrow")))
        metrics = self.run / "metrics.jsonl"
        self.rows = max(self.rows, metrics.read_bytes().count(b"\n") if metrics.exists() else 0)
        beat = self._beat()
        if beat is not None:
            iteration, phase, done = int(beat.get("iteration", 0)), beat.get("phase"), int(beat.get("done") or 0)
            self.phase = f"iteration {iteration} {phase} {done}/{beat.get('total')}" if phase else "start-up"
            if phase in ("warm-up", "learn"):
                self.learned = max(self.learned, (iteration, done))
        return (self.units, self.rows, self.learned) != before

    def _beat(self) -> dict[str, object] | None:
        try:
            beat = json.loads((self.run / "heartbeat.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return beat if isinstance(beat, dict) else None


@dataclass(frozen=True, slots=True)
class Seen:
    """One process of one node. Two sightings are of the same process if pid and start agree."""

    node: Node
    pid: int
    start: int
    """In clock ticks since the machine was started."""
    title: str
    bytes: int
    """Resident memory."""

    @property
    def still_there(self) -> bool:
        return start_of(self.pid) == self.start


def start_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def look_around(nodes: Sequence[Node]) -> list[Seen]:
    """All processes of the nodes; one pass over the machine's process table where they are namespaces."""
    spaces = {node.space.id: node for node in nodes if isinstance(node.space, Space)}
    found = []
    if spaces:
        for pid in all_pids():
            try:
                node = spaces.get(os.readlink(f"/proc/{pid}/ns/pid"))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if node is not None:
                found.append((node, pid))
    found += [(node, pid) for node in nodes if not isinstance(node.space, Space) for pid in node.pids()]
    seen = []
    for node, pid in found:
        try:
            start = start_of(pid)
            size = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        except (FileNotFoundError, ProcessLookupError):
            continue
        if start is not None:
            seen.append(Seen(node, pid, start, title_of(pid), size))
    return seen


@dataclass(slots=True)
class Memory:
    """Resident memory of groups of processes over the run's time."""

    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Group -> (seconds since the run began, bytes), of processes older than SETTLED only."""

    SETTLED = 30.0
    """Seconds in which a process loads its libraries and its model, and grows."""

    def note(self, now: float, group: str, seen: Seen) -> None:
        age = float(Path("/proc/uptime").read_text().split()[0]) - seen.start / TICKS
        if age >= self.SETTLED:
            self.samples.setdefault(group, []).append((now, float(seen.bytes)))

    def figures(self) -> dict[str, dict[str, float]]:
        """Per group: median of the first and the last quarter of the run, the most, and the least-squares slope over
        the run's time. A process that replaces a dead one continues its group's line."""
        out = {}
        for group, samples in self.samples.items():
            at, size = np.array(samples).T
            quarter = (at.max() - at.min()) / 4
            slope = float(np.polyfit(at, size, 1)[0]) if np.ptp(at) > 0 else float("nan")
            out[group] = {
                "samples": len(at),
                "minutes": float(np.ptp(at)) / 60,
                "first_quarter_mb": float(np.median(size[at <= at.min() + quarter])) / 1e6,
                "last_quarter_mb": float(np.median(size[at >= at.max() - quarter])) / 1e6,
                "most_mb": float(size.max()) / 1e6,
                "slope_mb_per_hour": slope * 3600 / 1e6,
            }
        return out
