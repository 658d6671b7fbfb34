"""Processes apart from the rest of this machine: in namespaces of their own, or marked where that is not permitted."""

from __future__ import annotations

import functools
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

KINDS = ("--net", "--mount", "--pid", "--uts")
FIRST = """
import signal, socket, sys
socket.sethostname(sys.argv[1])
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries orphans
print("up", flush=True)
while True:
    signal.pause()
"""
"""A namespace's first process: lives until it is killed."""


class ClusterError(RuntimeError):
    """A cluster, or a part of one, that could not be built or commanded."""


@functools.cache
def namespaces_permitted() -> bool:
    """Whether this process may build nodes with addresses of their own."""
    command = ["unshare", *KINDS, "--fork", "--mount-proc", "ip", "link", "add", "type", "bridge"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def title_of(pid: int) -> str:
    """A process's command line; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def send(pid: int, number: int) -> bool:
    """Send a signal; whether the process was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def checked(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{what} failed: {done.stderr.strip() or done.stdout.strip()}")


class Process:
    """A command under way on a node. `pid` is its id on this machine, whatever the node calls it."""

    def __init__(self, outer: subprocess.Popen[str], *, nested: bool) -> None:
        self.outer = outer
        self.pid = outer.pid
        while nested and outer.poll() is None:
            if inner := children_of(outer.pid):
                self.pid = inner[0]
                break
            time.sleep(0.005)

    def poll(self) -> int | None:
        return self.outer.poll()

    def wait(self, timeout: float) -> int:
        return self.outer.wait(timeout)

    def send(self, number: int) -> None:
        if self.poll() is None:
            send(self.pid, number)

    def end(self) -> int:
        self.send(signal.SIGKILL)
        return self.outer.wait()


class Space:
    """Namespaces of network, mounts, processes and host name that live as long as their first process."""

    def __init__(self, name: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *KINDS, "--fork", "--mount-proc", "--kill-child"]
        command += [sys.executable, "-S", "-c", FIRST, name]
        pipe = subprocess.PIPE
        self._outer = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        assert self._outer.stdout is not None
        if self._outer.stdout.readline() != "up\n":
            raise ClusterError(f"a namespace could not be made: {self._outer.communicate()[1]}")
        (self.first,) = children_of(self._outer.pid)
        self.id = os.readlink(f"/proc/{self.first}/ns/pid")

    def enter(self, cwd: Path = Path("/")) -> list[str]:
        """What to put before a command."""
        return ["nsenter", "--target", str(self.first), *KINDS, f"--wdns={cwd}", "--"]

    def enter_network(self) -> list[str]:
        """The same for a command that sees the processes and folders of this machine."""
        return ["nsenter", "--target", str(self.first), "--net", "--"]

    def pids(self) -> list[int]:
        """All processes inside but the first."""
        return [pid for pid in all_pids() if pid != self.first and self._holds(pid)]

    def _holds(self, pid: int) -> bool:
        try:
            return os.readlink(f"/proc/{pid}/ns/pid") == self.id
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False

    def kill(self) -> None:
        """SIGKILL everything inside, at one stroke."""
        send(self.first, signal.SIGKILL)
        self._outer.communicate()


class Marked:
    """Processes of this host that carry a mark in their environment: the stand-in for a Space."""

    def __init__(self) -> None:
        self._mark = secrets.token_hex(8)
        self.environment = {"CLUSTER_NET_NODE": self._mark}

    def enter(self, _: Path = Path("/")) -> list[str]:
        return []

    def pids(self) -> list[int]:
        return [pid for pid in all_pids() if self._holds(pid)]

    def _holds(self, pid: int) -> bool:
        try:
            return f"CLUSTER_NET_NODE={self._mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False

    def kill(self) -> None:
        """SIGKILL one after the other until none is left."""
        while found := self.pids():
            for pid in found:
                send(pid, signal.SIGKILL)
            time.sleep(0.02)


def all_pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
