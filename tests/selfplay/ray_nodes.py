"""A Ray cluster of this machine's own for tests: `ray start` on loopback and free ports, ended by its process ids.

Nothing here touches another Ray of the machine: no `ray stop`, a temporary folder and ports of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.selfplay.test_resume import ENVIRONMENT

HOST = "127.0.0.1"
TOKEN = "a token for tests only"
PATIENCE_SECONDS = 180.0


class Cluster(NamedTuple):
    """A head node that runs."""

    address: str
    dashboard: str
    metrics: str
    """URL where the node's metrics are scraped."""
    environment: dict[str, str]
    """What a process needs to join or to submit."""
    head: int
    """Process id of `ray start --block`."""


def free_ports(n: int) -> list[int]:
    """Different free ports of loopback."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, those that died meanwhile left out."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
    below = [pid]
    for one in below:
        below += [child for child, parent in parents.items() if parent == one]
    return below[1:]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything below it, by process id."""
    family = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it went with its parent


@contextmanager
def head_node(num_cpus: int = 3) -> Iterator[Cluster]:
    """A head with dashboard and job server."""
    port, dashboard, agent, agent_rpc, client, metrics = free_ports(6)
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths must be short
    environment = {**ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--node-ip-address={HOST}",
        f"--port={port}", "--include-dashboard=true", f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_rpc}",
        f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", f"--temp-dir={folder}",
        f"--num-cpus={num_cpus}", "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    log = Path(folder) / "start.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://{HOST}:{dashboard}"
        _await_dashboard(url, process, log)
        yield Cluster(f"{HOST}:{port}", url, f"http://{HOST}:{metrics}/metrics", environment, process.pid)
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _await_dashboard(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll until jobs can be submitted."""
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError:  # URLError included: not there yet
            time.sleep(0.2)
    raise AssertionError(f"the head did not start:\n{log.read_text()}")
