"""A run's figures as Ray metrics, which every node's metrics port offers to Prometheus.

Ray puts `ray_` before a name: the gauge of `heldout_pass1` is scraped as `ray_selfplay_heldout_pass1{run="..."}`. A
node's metrics agent forgets a gauge that nobody sets for half a minute, and columns of metrics.jsonl are set once per
iteration; so all are sent again with whatever is set, every few seconds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, Final

from ray.util.metrics import Gauge

PREFIX: Final = "selfplay_"
LIVE: Final = {
    "units_done": "units committed in the running iteration",
    "units_total": "units of an iteration",
    "tokens_per_second": "tokens sampled per second of play",
    "workers_alive": "workers that play",
    "workers_wanted": "workers that the config and the cluster's size ask for",
    "restarts": "dead actors replaced since this driver began",
    "leases_lost": "units taken from a worker and given to another since this driver began",
    "staleness": "versions that play runs ahead of learning",
    "broadcast_seconds": "seconds until every node had the newest weights",
    "broadcast_bytes": "bytes of the newest weights' broadcast",
}
"""What changes within an iteration. All other gauges are columns of metrics.jsonl, set once per iteration."""


RESEND_SECONDS: Final = 10.0


class Gauges:
    """The gauges of one run, made when first set. Needs a process that is connected to Ray, and a call of `set` every
    few seconds (the driver's heartbeat) to keep them alive."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}
        self._sent = time.monotonic()

    def set(self, name: str, value: float | None) -> None:
        """Set the gauge of a column or live fact; with None, "not computed", it is left out and fades. Raises
        ValueError for a name that Prometheus does not take."""
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name):
            raise ValueError(f"a gauge's name holds letters, digits and underscores only, not {name!r}")
        if value is None:
            self._values.pop(name, None)
            return
        if name not in self._gauges:
            says = LIVE.get(name, f"column {name} of metrics.jsonl")
            gauge = Gauge(PREFIX + name, description=says, tag_keys=("run",))
            gauge.set_default_tags({"run": self._run_id})
            self._gauges[name] = gauge
        self._values[name] = float(value)
        self._gauges[name].set(float(value))
        if time.monotonic() - self._sent > RESEND_SECONDS:
            self._sent = time.monotonic()
            for known, last in self._values.items():
                self._gauges[known].set(last)

    def set_row(self, row: Mapping[str, Any]) -> None:
        """Set every number of a row of metrics.jsonl."""
        for name, value in row.items():
            if value is None or isinstance(value, int | float):
                self.set(name, value)
