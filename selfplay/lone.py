"""One problem in a process of its own, so that what ends the process is known and ends nothing else.

`python -m selfplay.lone` reads a pickled `Errand` from its parent, searches it and answers with one line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfplay.config import Config
from selfplay.errors import known_errors
from selfplay.fleet import Casualty, Part, Work
from selfplay.run_folder import RunError
from selfplay.store import Place
from selfplay.worker import Answered, EvaluationJob, Played, Worker

PR_SET_PDEATHSIG = 1
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that a process does not raise by going wrong. The kernel's out-of-memory killer sends SIGKILL too: its own
counter tells."""


@dataclass(frozen=True, slots=True)
class Errand:
    config: Config
    place: Place
    checkpoint: Path
    work: Work
    parent: int


def search_alone(errand: Errand, seconds: float) -> Part | Casualty:
    """Do the work of `errand`, which holds one problem, within `seconds`. Raises RunError for an error that the
    child told of in words: it is no fault of the problem."""
    killed_before = _memory_kills()
    command = [sys.executable, "-m", "selfplay.lone"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        said, complaint = child.communicate(pickle.dumps(errand), timeout=seconds)
    except subprocess.TimeoutExpired:
        return Casualty(f"no result within {seconds:.0f} s", own=True)
    finally:
        child.kill()
        child.wait()
    code = child.returncode
    if code == 0:
        answer = json.loads(said.splitlines()[-1])
        if "error" in answer:
            raise RunError(answer["error"])
        if isinstance(errand.work, EvaluationJob):
            return [Answered(**each) for each in answer["answers"]]
        return Played(errand.work, answer["pending"], answer["seconds"])
    if code < 0:
        name = signal.Signals(-code).name
        if -code == signal.SIGKILL and _memory_kills() > killed_before:
            return Casualty("killed for want of memory", own=True)
        return Casualty(f"ended by {name}", own=-code not in FROM_OUTSIDE)
    last = complaint.decode(errors="replace").strip().splitlines()[-1:]
    return Casualty(f"ended with exit code {code}: {''.join(last)[:200] or 'it said nothing'}", own=True)


def _memory_kills() -> int:
    """How many processes this machine's kernel has killed for memory."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing is left behind when the worker dies
    errand: Errand = pickle.load(sys.stdin.buffer)  # noqa: S301 - our own parent's, through a pipe
    if os.getppid() != errand.parent:
        sys.exit("the worker that asked has ended")
    try:
        worker = Worker(errand.config, errand.place)
        worker.load(errand.checkpoint, errand.work.policy_version)
        answer = _search(worker, errand.work)
    except known_errors() as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def _search(worker: Worker, work: Work) -> dict[str, Any]:
    if isinstance(work, EvaluationJob):
        return {"answers": [asdict(answered) for answered in worker.evaluate(work)]}
    worker.enqueue(work)
    played = worker.finish()
    return {"pending": played.pending, "seconds": played.seconds}


if __name__ == "__main__":
    main()
