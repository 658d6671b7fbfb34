"""The sandbox: programs get their answer out, and nothing else gets in or out."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcts.verify.sandbox import Limits, Outcome, Sandbox, SandboxError
from tests.mcts.hostile_programs import HOSTILE, Hostile

ROOT = Path(__file__).resolve().parents[2]
SECRET = "the-secret-of-the-parent"


def can_isolate() -> str:
    try:
        Sandbox().require()
    except SandboxError as error:
        return str(error)
    return ""


MISSING = can_isolate()
isolated = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def living(space: int) -> list[int]:
    """Host pids of the processes in a PID namespace."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.stat(f"/proc/{entry}/ns/pid").st_ino == space:
                    found.append(int(entry))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


def children(pid: int) -> set[int]:
    """All processes that descend from one, itself left out."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry)] = int(fields[1])
    found = {pid}
    while True:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return found - {pid}
        found |= more


@pytest.fixture(scope="module")
def small() -> dict[tuple[int, bool], Sandbox]:
    """Sandboxes by the number of processes that they allow, and whether a program is to meet the clock in there."""
    return {
        (processes, quick): Sandbox(
            Limits(
                cpu_seconds=1 if quick else 10,
                wall_seconds=2.0 if quick else 100.0,
                memory_bytes=96 << 20,
                processes=processes,
                scratch_bytes=4 << 20,
                output_bytes=1 << 16,
            )
        )
        for processes in (1, 8)
        for quick in (True, False)
    }


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Secrets within reach of this process; yields what a program is told about where they are."""
    file = tmp_path / "secret.txt"
    file.write_text(SECRET)
    monkeypatch.setenv("SECRET", SECRET)
    name = f"secret-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0" + name)
        abstract.listen()
        port = server.getsockname()[1]
        yield f"SECRET_FILE, PARENT, PORT, SOCKET = {str(file)!r}, {os.getpid()}, {port}, {name!r}\n"
    assert file.read_text() == SECRET
    assert [path.name for path in tmp_path.iterdir()] == ["secret.txt"]


@isolated
@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.name)
def test_holds_against(case: Hostile, small: dict[tuple[int, bool], Sandbox], secrets: str) -> None:
    if platform.machine() != "x86_64" and ("syscall" in case.program or "32-bit" in case.name):
        pytest.skip("its numbers are those of x86_64")
    before = children(os.getpid())
    run = small[case.processes, Outcome.TIMEOUT in case.outcomes].run(secrets + case.program)
    assert run.outcome in case.outcomes, run
    for text in (run.stdout, run.stderr):
        assert b"ESCAPED" not in text, text[-2000:]
        assert SECRET.encode() not in text
        assert len(text) <= 1 << 16
    assert children(os.getpid()) == before
    if "\ud800" not in case.program:
        assert run.space is not None
        assert living(run.space) == []
    assert not Path("/dev/shm/full").exists()


def test_there_are_at_least_25_hostile_programs_with_names_of_their_own() -> None:
    assert len({case.name for case in HOSTILE}) == len(HOSTILE) >= 25
