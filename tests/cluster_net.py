"""A real Ray cluster on one machine: nodes with addresses of their own, which can be cut off, healed and killed.

    with Cluster(folder, nodes=2) as cluster:
        cluster.head.run([sys.executable, "-m", "selfplay", "launch", "...", "--address", cluster.address])

Each node is a network, mount and process namespace, joined to the others by a virtual cable to a switch that is a
namespace too: nothing is added to the machine's own network, no packet leaves it, and two clusters never meet. The
kernel ends a node's processes with the node's first one, and that one with the process that built the cluster, so
nothing is left over however that ends. (Therefore nodes are added by the main thread only: the kernel ends them
with the thread that started them.)

Where namespaces are not permitted, a node is `ray start` on this host under a port of its own: it can be killed, but
not cut off, and sees the same folders (`namespaced` says which).
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tests.spaces import ClusterError, Marked, Process, Space, checked, namespaces_permitted, title_of

ROOT = Path(__file__).resolve().parent.parent
RAY = (sys.executable, "-m", "ray.scripts.scripts")
NETWORK = "10.77.0"
SWITCH = f"{NETWORK}.254"
"""The switch's own address: a server that is not on any node runs there (`Cluster.switch`)."""
PORT, DASHBOARD_PORT = 6379, 8265
MIB = 1 << 20
START_SECONDS = 180.0
"""Deadline of `ray start`, which takes 8 to 16 seconds on a free machine."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "false",
    "RAY_prestart_worker_first_driver": "false",
    "RAY_memory_monitor_refresh_ms": "0",  # the machine's memory is shared with others
    "RAY_worker_niceness": "0",
}
QUICK_TO_NOTICE = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000"}
"""Ray takes a minute by itself to call a node dead that was cut off; with these, about ten seconds."""


class Node:
    """One machine of the cluster, as far as its processes can tell."""

    def __init__(self, name: str, address: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.address = address
        self.folder = folder
        """The node's logs, which outlive it."""
        self.alive = True
        self.connected = True
        self.space: Space | Marked = Space(name) if namespaces_permitted() else Marked()
        self._started: list[Process] = []
        self._environment = dict(environment) | getattr(self.space, "environment", {})
        folder.mkdir(parents=True)

    def popen(
        self,
        command: Sequence[str],
        *,
        stdout: int | IO[str] = subprocess.DEVNULL,
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> Process:
        """Start a command on this node, standard error with standard output."""
        outer = subprocess.Popen(
            [*self.space.enter(cwd), *command], stdout=stdout, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, cwd=cwd, env={**os.environ, **self._environment, **(environment or {})}, start_new_session=True,
        )  # fmt: skip
        process = Process(outer, nested=isinstance(self.space, Space))
        self._started = [p for p in self._started if p.poll() is None] + [process]
        return process

    def run(
        self, command: Sequence[str], *, timeout: float = 600.0, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this node to its end; `stdout` holds standard error too. Raises ClusterError when late."""
        with open(self.folder / f"run-{secrets.token_hex(4)}.log", "w+", encoding="utf-8") as file:
            process = self.popen(command, stdout=file, environment=environment)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise ClusterError(f"{self.name}: no end after {timeout} s of {command}; see {file.name}") from None
            finally:
                process.end()
            file.seek(0)
            return subprocess.CompletedProcess(list(command), code, file.read(), "")

    def pids(self) -> list[int]:
        """Ids of all its processes, on this machine."""
        return self.space.pids() if self.alive else []

    def kill(self) -> None:
        """SIGKILL all of them. The node does not come back."""
        self.alive = False
        self.space.kill()
        for process in self._started:
            process.end()

    def processes(self, title: str) -> list[int]:
        """Those whose command line starts with `title` (Ray names an actor's process ray::Class.method)."""
        return [pid for pid in self.pids() if title_of(pid).startswith(title)]


class Cluster:
    """N nodes, the first of which is Ray's head. `close` (or the end of the with block) ends them all."""

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 2,
        cpus: int = 2,
        dashboard: bool = False,
        private: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
        object_store_bytes: int = 150 * MIB,
    ) -> None:
        """`private`: folders of which every node sees an empty one of its own. `environment`: for Ray and for every
        command, beside ENVIRONMENT."""
        self.folder = folder
        self.namespaced = namespaces_permitted()
        self.nodes: list[Node] = []
        """In the order in which they came, dead ones included."""
        self._machines: list[Node] = []
        self._made = 0
        self._short: str | None = None
        self._private = private
        self._cpus = cpus
        self._dashboard = dashboard
        self._store = object_store_bytes
        self.environment = {**ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(32), **(environment or {})}
        """Of nodes yet to come."""
        if private and not self.namespaced:
            raise ClusterError("private folders need namespaces, which are not permitted here")
        self.port = PORT if self.namespaced else _free_port()
        self.dashboard_port = DASHBOARD_PORT if self.namespaced else _free_port()
        self.switch: Space | None = None
        try:
            if self.namespaced:
                self.switch = Space("switch")
                self._in_switch("ip", "link", "add", "hub", "type", "bridge")
                self._in_switch("ip", "address", "add", f"{SWITCH}/24", "dev", "hub")
                self._in_switch("ip", "link", "set", "hub", "up")
                self._in_switch("ip", "link", "set", "lo", "up")
            for _ in range(nodes):
                self.add_node()
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def living(self) -> list[Node]:
        return [node for node in self.nodes if node.alive]

    @property
    def address(self) -> str:
        """What `ray.init` takes on any node."""
        return f"{self.head.address}:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:{self.dashboard_port}"

    def add_node(self) -> Node:
        """A new node; it has joined when this returns. By the main thread only. Raises ClusterError."""
        node, starting = self.start_node()
        try:
            code = starting.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{node.name}: ray start takes longer than {START_SECONDS} s") from None
        if code != 0:
            raise ClusterError(f"{node.name}: ray start failed: {(node.folder / 'start.log').read_text()}")
        return node

    def start_node(self) -> tuple[Node, Process]:
        """A new node that is about to join: it has done so once the process returned ends with 0."""
        node = self._machine()
        self.nodes.append(node)
        command = [*RAY, "start", "--disable-usage-stats", f"--node-ip-address={node.address}", "--num-gpus=0"]
        command += [f"--num-cpus={self._cpus}", f"--object-store-memory={self._store}"]
        if node is self.head:
            command += ["--head", f"--port={self.port}", f"--include-dashboard={self._dashboard}"]
            command += [f"--dashboard-port={self.dashboard_port}", f"--dashboard-host={node.address}"]
            command += [] if self.namespaced else self._host_ports()
        else:
            command += [f"--address={self.address}"]
        with open(node.folder / "start.log", "w", encoding="utf-8") as file:
            return node, node.popen(command, stdout=file)

    def _host_ports(self) -> list[str]:
        """What several clusters on one host must not share."""
        self._short = tempfile.mkdtemp(prefix="ray-")  # Ray's sockets need a short path
        return [f"--temp-dir={self._short}", f"--ray-client-server-port={_free_port()}"]

    def add_machine(self) -> Node:
        """A machine on the same network without Ray, for a server that the nodes use."""
        machine = self._machine()
        self._machines.append(machine)
        return machine

    def _machine(self) -> Node:
        self._made += 1
        address = f"{NETWORK}.{self._made}" if self.namespaced else "127.0.0.1"
        node = Node(f"node-{self._made}", address, self.folder / f"node-{self._made}", self.environment)
        try:
            if self.namespaced:
                self._plug_in(node)
        except BaseException:
            node.space.kill()
            raise
        return node

    def _plug_in(self, node: Node) -> None:
        """Give the node its cable, its address and the folders that are its own."""
        assert isinstance(node.space, Space)
        self._in_switch("ip", "link", "add", _cable(node), "type", "veth", "peer", "name", "eth0",
                        "netns", str(node.space.first))  # fmt: skip
        self._in_switch("ip", "link", "set", _cable(node), "master", "hub", "up")
        ray = node.folder / "ray"
        ray.mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)
        for line in (
            ("ip", "address", "add", f"{node.address}/24", "dev", "eth0"),
            ("ip", "link", "set", "eth0", "up"),
            ("ip", "link", "set", "lo", "up"),
            ("ip", "route", "add", "default", "via", SWITCH),  # leads nowhere; programs ask it for their own address
            ("mount", "--bind", str(ray), "/tmp/ray"),  # a short path, for Ray's sockets
            ("mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", "/dev/shm"),
            *(("mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", str(folder)) for folder in self._private),
        ):
            checked([*node.space.enter(), *line], f"{node.name}: {' '.join(line)}")

    def _in_switch(self, *command: str) -> None:
        assert self.switch is not None
        checked([*self.switch.enter_network(), *command], " ".join(command))

    def cut(self, node: Node) -> None:
        """Pull the node's cable: packets are lost, connections hang, processes live on."""
        self._set_cable(node, "down")

    def heal(self, node: Node) -> None:
        self._set_cable(node, "up")

    def _set_cable(self, node: Node, state: str) -> None:
        if not self.namespaced:
            raise ClusterError("a node can only be cut off where namespaces are permitted")
        if node.alive:
            self._in_switch("ip", "link", "set", _cable(node), state)
        node.connected = state == "up"

    def kill(self, node: Node) -> None:
        """SIGKILL all of the node's processes, those of commands run on it included. It does not come back."""
        if node.alive:
            node.kill()

    def close(self) -> None:
        """End everything that this cluster started."""
        for node in [*self.nodes, *self._machines]:
            self.kill(node)
        if self.switch is not None:
            self.switch.kill()
            self.switch = None
        if self._short is not None:
            shutil.rmtree(self._short)
            self._short = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cable(node: Node) -> str:
    """The switch's end of the node's cable."""
    return f"to-{node.name}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def selfplay(*arguments: Any) -> list[str]:
    """The command line of `selfplay` for `Node.run`."""
    return [sys.executable, "-m", "selfplay", *map(str, arguments)]
