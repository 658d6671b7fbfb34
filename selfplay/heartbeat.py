"""Signs of life of a run's driver: what it says of itself every two seconds, and how another host reads them."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from selfplay.store import Fenced, RunError, Store

log = logging.getLogger(__name__)

FILE = "heartbeat.json"
BEAT_SECONDS = 2.0
WATCHED_BEATS = 4
"""So many beats without a new count, and the driver on another host is taken for dead."""

OWN = frozenset({"time", "host", "pid", "epoch", "beat", "state"})
"""Facts that every beat has; others are what `note` was given."""

State = Literal["running", "ended", "interrupted", "failed"]


class Heartbeat:
    """Writes heartbeat.json from a thread of its own, so that it beats within long phases too.

    Fields: `time` (seconds since 1970 by this host's clock), `host`, `pid`, `epoch`, `beat` (a counter), `state`, and
    what `note` was given. A beat that cannot be written is logged, not raised: the next real write says it better.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._facts: dict[str, Any] = {}
        self._beat = 0
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._fenced: Fenced | None = None
        self._quiet = False
        self._write("running")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def note(self, **facts: Any) -> None:
        """Facts of the next beats, beside those noted before; None removes one. Raises Fenced where a beat found the
        run taken over."""
        if self._fenced is not None:
            raise self._fenced
        with self._guard:
            self._facts = {k: v for k, v in {**self._facts, **facts}.items() if v is not None}

    def stop(self, state: State) -> None:
        """The last beat."""
        self._stop.set()
        self._thread.join()
        self._write(state)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS) and self._fenced is None:
            self._write("running")

    def _write(self, state: State) -> None:
        self._beat += 1
        with self._guard:
            facts = dict(self._facts)
        facts |= {
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "epoch": self._store.place.epoch,
            "beat": self._beat,
            "state": state,
        }
        try:
            self._store.put(FILE, json.dumps(facts), sync=False)
            self._quiet = False
        except Fenced as error:
            self._fenced = error
        except RunError as error:
            if not self._quiet:
                log.warning("no sign of life could be written: %s", error)
            self._quiet = True


def refuse_living(
    read: Callable[[str], str | None], run: str, *, locked: bool, wait: Callable[[float], object] = time.sleep
) -> None:
    """Raise RunError where the run's last driver still beats.

    Its counter is watched by this host's own patience alone; the clocks of two hosts are never compared. A driver that
    said that it ended needs no watching, nor one on this host, where a lock (`locked`) or its process id tells.
    """
    first = parse(read(FILE))
    if first.get("state", "running") != "running" or first.get("host") is None:
        return
    if first["host"] == socket.gethostname() and (locked or not _exists(first.get("pid"))):
        return
    for _ in range(2 * WATCHED_BEATS):
        wait(BEAT_SECONDS / 2)
        now = parse(read(FILE))
        if (now.get("epoch"), now.get("beat")) != (first.get("epoch"), first.get("beat")):
            raise RunError(
                f"{run} is in use by process {now.get('pid')} on {now.get('host')}, which still gives signs of life; "
                "stop that one first"
            )


def _exists(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def parse(text: str | None) -> dict[str, Any]:
    """A heartbeat's facts; none where it is missing or torn (it may be, after a power cut)."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
