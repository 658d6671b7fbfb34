"""A run's figures can be scraped from Ray's metrics port, with the run's id."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from typing import Any, ClassVar

import pytest

from selfplay.cluster import gauges as module
from selfplay.cluster.gauges import LIVE, RESEND_SECONDS, Gauges
from tests.selfplay.ray_nodes import PATIENCE_SECONDS, TOKEN, head_node
from tests.selfplay.test_resume import ROOT

DRIVER = """
import sys
import ray
from selfplay.cluster.gauges import LIVE, Gauges

ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
gauges = Gauges("run-7")
for i, name in enumerate(LIVE):
    gauges.set(name, i)
gauges.set_row({"iteration": 3, "heldout_pass1": 0.25, "kl": None, "rolled_back": True, "note": "text"})
print("set", flush=True)
for beat, line in enumerate(sys.stdin):  # a driver that beats, and sets nothing else any more
    gauges.set("restarts", 42)
"""


def scraped(url: str) -> dict[str, str]:
    """Values of our gauges by name, with the tag `run` as it stands there."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
    return dict(re.findall(r'^ray_selfplay_(\w+)\{[^}]*run="run-7"[^}]*\} (\S+)$', text, re.MULTILINE))


@pytest.mark.cluster
@pytest.mark.slow
def test_every_gauge_is_found_on_the_metrics_port() -> None:
    with (
        head_node(num_cpus=1) as cluster,
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, cluster.address], cwd=ROOT, env=cluster.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as driver,
    ):  # fmt: skip
        assert driver.stdout is not None
        assert driver.stdin is not None
        assert driver.stdout.readline() == "set\n"
        wanted = {*LIVE, "iteration", "heldout_pass1", "rolled_back"}  # kl was not computed
        found: dict[str, str] = {}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not wanted <= found.keys() and time.monotonic() < deadline:
            driver.stdin.write("beat\n")
            driver.stdin.flush()
            found = scraped(cluster.metrics)
            time.sleep(0.5)
        driver.stdin.close()
    assert found.keys() == wanted
    assert {name: float(found[name]) for name in ("restarts", "iteration", "heldout_pass1", "rolled_back")} == {
        "restarts": 42.0,
        "iteration": 3.0,
        "heldout_pass1": 0.25,
        "rolled_back": 1.0,
    }


class Recorded:
    """Stands for Ray's gauge."""

    sent: ClassVar[list[tuple[str, float]]] = []

    def __init__(self, name: str, **_: Any) -> None:
        self.name = name

    def set_default_tags(self, _: dict[str, str]) -> None: ...

    def set(self, value: float) -> None:
        self.sent.append((self.name.removeprefix("selfplay_"), value))


def test_values_that_are_set_once_are_sent_again_and_those_no_longer_computed_are_not(monkeypatch: Any) -> None:
    """A metrics agent forgets what nobody sends."""
    monkeypatch.setattr(module, "Gauge", Recorded)
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    gauges = Gauges("x")
    gauges.set_row({"iteration": 3, "kl": 0.5})
    gauges.set_row({"iteration": 4, "kl": None})
    gauges.set("restarts", 1)
    assert Recorded.sent == [("iteration", 3.0), ("kl", 0.5), ("iteration", 4.0), ("restarts", 1.0)]
    Recorded.sent.clear()
    clock[0] = RESEND_SECONDS + 1.0
    gauges.set("restarts", 2)
    assert Recorded.sent == [("restarts", 2.0), ("iteration", 4.0), ("restarts", 2.0)]


def test_a_name_that_prometheus_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="letters, digits and underscores only, not 'tokens/win'"):
        Gauges("x").set("tokens/win", 1.0)
