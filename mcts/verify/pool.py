"""Killable workers: a few nursery processes, shared by all threads that ask."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcts.verify.nursery import read_frame, write_frame

START_SECONDS = 120.0
"""Longest that a nursery may take to load; a machine under load is slow."""
GRACE_SECONDS = 10.0
"""How much later than its own wall clock a nursery must have answered."""
PACKAGES = str(Path(__file__).resolve().parents[2])


class PoolError(RuntimeError):
    """The workers cannot be started; the message says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one case may use."""

    cpu_seconds: float = 5.0
    wall_seconds: float = 60.0
    """A backstop for a machine that is so loaded that CPU seconds do not pass."""
    memory_bytes: int = 1 << 30
    """Address space, that of the libraries included."""


class Pool:
    """Judges cases with `module.judge` in processes of their own. Nothing starts before the first case; at most
    `workers` cases are judged at a time, further callers wait (their clocks stand still). Safe to call from any thread;
    after a fork the child gets workers of its own."""

    def __init__(self, module: str, workers: int, limits: Limits) -> None:
        self._module = module
        self._workers = workers
        self._limits = limits
        self._reset()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._slots = threading.BoundedSemaphore(self._workers)
        self._lock = threading.Lock()
        self._idle: list[_Nursery] = []
        self._closer = weakref.finalize(self, _close_all, self._idle)

    def judge(self, case: dict[str, Any]) -> dict[str, Any]:
        """The reply of a nursery (`mcts.verify.nursery`), `end` in {judged, cpu, wall, memory, died}. A case that ran
        out of wall time or whose worker died gets one more try. Raises PoolError where no worker can start."""
        if os.getpid() != self._owner:
            self._closer.detach()
            self._reset()
        with self._slots:
            reply = self._once(case)
            if reply["end"] in ("wall", "died"):
                reply = self._once(case)
        return reply

    def _once(self, case: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            nursery = self._idle.pop() if self._idle else None
        nursery = nursery or _Nursery(self._module)
        try:
            reply = nursery.ask(case, self._limits)
        except BaseException:
            nursery.kill()
            raise
        if nursery.alive:
            with self._lock:
                self._idle.append(nursery)
        return reply

    def close(self) -> None:
        """End all idle workers. A later case starts new ones."""
        with self._lock:
            _close_all(self._idle)

    def process_ids(self) -> list[int]:
        """The nurseries that wait for a case."""
        with self._lock:
            return [nursery.process.pid for nursery in self._idle]


def _close_all(nurseries: list[_Nursery]) -> None:
    while nurseries:
        nurseries.pop().kill()


class _Nursery:
    """One running nursery process."""

    def __init__(self, module: str) -> None:
        path = os.environ.get("PYTHONPATH")
        fixed = {
            "PYTHONPATH": PACKAGES + (os.pathsep + path if path else ""),
            "PYTHONHASHSEED": "0",  # the order of sets, hence of what a library tries first, is the same each time
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",  # no threads: the nursery forks
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mcts.verify.nursery", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # an interrupt at the terminal is the parent's to handle
            env=os.environ | fixed,
        )
        self.alive = True
        self._owner = os.getpid()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._to, self._from = self.process.stdin.fileno(), self.process.stdout.fileno()
        try:
            first = read_frame(self._from, time.monotonic() + START_SECONDS)
        except TimeoutError:
            first = {"end": "failed", "why": f"not up after {START_SECONDS:.0f} seconds"}
        if first is None or first["end"] != "ready":
            self.kill()
            why = "it ended at once" if first is None else first["why"]
            raise PoolError(f"a worker for verification cannot start: {why}")

    def ask(self, case: dict[str, Any], limits: Limits) -> dict[str, Any]:
        request = {
            "case": case,
            "cpu": limits.cpu_seconds,
            "wall": limits.wall_seconds,
            "memory": limits.memory_bytes,
        }
        try:
            write_frame(self._to, request)
            reply = read_frame(self._from, time.monotonic() + 2 * limits.wall_seconds + GRACE_SECONDS)
        except TimeoutError:
            self.kill()
            return {"end": "wall", "why": "no answer", "seconds": 0.0}
        except BrokenPipeError:
            reply = None
        if reply is None:
            self.kill()
            return {"end": "died", "why": f"exit code {self.process.returncode}", "seconds": 0.0}
        return reply

    def kill(self) -> None:
        """End the process now; its child dies with it."""
        self.alive = False
        if os.getpid() != self._owner:
            return  # a fork of the owner: not its process to end
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
