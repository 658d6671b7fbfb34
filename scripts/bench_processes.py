"""CPU seconds and memory of processes, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of living processes so far."""
    total = 0
    for pid in pids:
        fields = _stat(pid)
        total += int(fields[11]) + int(fields[12]) if fields else 0
    return total / TICKS


def resident_bytes(pid: int) -> int:
    """0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name: state, parent, ...; none where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(pid: int) -> list[int]:
    """All living processes below one."""
    parents = {int(p.name): _stat(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit()}
    below = [pid]
    for one in below:
        below += [child for child, fields in parents.items() if fields and int(fields[1]) == one]
    return below[1:]


def title(pid: int) -> str:
    """Command line of a process, or "" where it has ended. Ray names an actor's process ray::Class.method."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def ray_processes() -> list[int]:
    """Raylet and GCS of the Ray that this process started."""
    return [pid for pid in descendants(os.getpid()) if any(n in title(pid) for n in ("/raylet ", "/gcs_server "))]


def waiting_seconds(pids: Iterable[int]) -> float:
    """How long the threads of living processes were ready to run so far while others had the processors."""
    total = 0
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                total += int(path.read_text(encoding="ascii").split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # the thread ended while we looked
    return total / 1e9
