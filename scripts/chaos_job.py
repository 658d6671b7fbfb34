"""The job that a storm disturbs: what it is, and its driver on one of the nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selfplay.config import Config
from tests.cluster_net import Cluster, Node, selfplay
from tests.spaces import Process


@dataclass(frozen=True, slots=True)
class Options:
    config: Config
    source: Path
    overrides: tuple[str, ...]
    nodes: int
    every: float
    """Seconds between two faults, on average."""
    faults: int
    """Most faults of this run."""
    minutes: float | None
    """After so long the driver is asked to end; None: the run goes to its end."""
    kinds: dict[str, float]
    """Kind -> weight."""
    patience: float
    """Seconds without progress after which the run counts as hung."""
    quick: bool
    """Let Ray notice a dead node in about ten seconds instead of a minute."""


class Job:
    """The driver, on one of the nodes."""

    def __init__(self, cluster: Cluster, run: Path, options: Options) -> None:
        self._cluster = cluster
        self._run = run
        self._options = options
        self._process: Process | None = None
        self.node = cluster.head
        self.starts = 0

    def start(self, node: Node) -> None:
        """Launch, or resume where there is a run already."""
        self.node = node
        self.starts += 1
        if (self._run / "run.json").exists():
            command = selfplay("resume", self._run)
        else:
            address = f"cluster.address={self._cluster.address}"
            source, overrides = self._options.source, self._options.overrides
            command = selfplay("launch", source, "--run-dir", self._run, *overrides, address)
        with open(self.log, "w", encoding="utf-8") as file:
            self._process = node.popen(command, stdout=file)

    @property
    def log(self) -> Path:
        return self._run.with_name(f"driver-{self.starts:03d}.log")

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self.running and self._process is not None else None

    def send(self, number: int) -> None:
        if self._process is not None:
            self._process.send(number)

    def end(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def exit_code(self) -> int | None:
        """Of a driver that has ended by itself since the last call; None otherwise."""
        if self._process is None or self._process.poll() is None:
            return None
        code = self._process.wait(0)
        self._process = None
        return code

    def last_lines(self, count: int = 12) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
