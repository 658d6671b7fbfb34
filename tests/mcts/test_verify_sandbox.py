"""The sandbox: programs get their answer out, and nothing else gets in or out."""

from __future__ import annotations

import os
import platform
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcts.verify.sandbox import Limits, Outcome, Sandbox, SandboxError
from mcts.verify.sandbox_seccomp import filter_program
from tests.mcts.hostile_programs import HOSTILE, MISSING, Hostile

ROOT = Path(__file__).resolve().parents[2]
SECRET = "the-secret-of-the-parent"


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


# --- what a program is given and gives back ---


@isolated
def test_a_program_reads_its_input_and_its_output_comes_back() -> None:
    run = Sandbox().run("import sys\nprint(sys.stdin.read()[::-1], end='')\nprint('é', file=sys.stderr)", "añb")
    assert (run.outcome, run.exit_code) == (Outcome.OK, 0)
    assert run.stdout.decode() == "bña"
    assert run.stderr.decode() == "é\n"
    assert run.cpu_seconds > 0
    assert run.peak_bytes > 0


@isolated
def test_input_and_program_may_be_large_and_nothing_deadlocks() -> None:
    text = "x" * (3 << 20)
    run = Sandbox().run(f"# {'y' * 900_000}\nprint(len(input()))", text)
    assert run.stdout == b"%d\n" % len(text)
    unread = Sandbox().run("print('done')", text)
    assert unread.stdout == b"done\n"
    for program, given in (("#" * (2 << 20), ""), ("", "x" * (17 << 20))):
        assert Sandbox().run(program, given).outcome is Outcome.EXIT


@isolated
def test_the_standard_library_and_the_scratch_folder_are_at_hand() -> None:
    program = (
        "import collections, decimal, fractions, functools, heapq, itertools, json, math, re, random, hashlib, zlib\n"
        "import pathlib, tempfile, datetime, statistics, copy, sqlite3, dataclasses, enum, typing, bisect, string\n"
        "p = pathlib.Path('a/b'); p.mkdir(parents=True); (p / 'c').write_text('kept')\n"
        "with tempfile.TemporaryFile() as f: f.write(b'x')\n"
        "print((p / 'c').read_text(), math.gcd(6, 4), os.getcwd() if (os := __import__('os')) else '')"
    )
    run = Sandbox().run(program)
    assert run.stdout == b"kept 2 /scratch\n", run
    assert Sandbox().run("import os\nprint(os.listdir())").stdout == b"[]\n"


@isolated
def test_installed_packages_are_not_visible() -> None:
    for package in ("numpy", "pip", "pytest"):
        assert b"ModuleNotFoundError" in Sandbox().run(f"import {package}").stderr


@isolated
@pytest.mark.parametrize(
    ("program", "outcome", "code", "why"),
    [
        ("import sys; sys.exit(3)", Outcome.EXIT, 3, "status 3"),
        ("1 / 0", Outcome.EXIT, 1, "ZeroDivisionError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", Outcome.EXIT, -15, "signal 15"),
        ("def", Outcome.EXIT, 1, "SyntaxError"),
    ],
)
def test_how_it_ended_is_told(program: str, outcome: Outcome, code: int, why: str) -> None:
    run = Sandbox().run(program)
    assert (run.outcome, run.exit_code) == (outcome, code)
    assert why in run.why


@isolated
def test_processes_can_be_allowed_and_are_counted() -> None:
    program = (
        "import os\nmade = 0\nr, w = os.pipe()\nfor _ in range(50):\n"
        "    try: child = os.fork()\n    except OSError: continue\n"
        "    if child == 0:\n        os.close(w); os.read(r, 1); os._exit(0)\n    made += 1\nprint(made, flush=True)"
    )
    assert Sandbox(Limits(processes=6)).run(program).stdout == b"5\n"
    assert Sandbox(Limits(processes=1)).run(program).stdout == b"0\n"


@isolated
def test_the_same_program_says_the_same_twice() -> None:
    program = "print({str(k) for k in range(50)}, hash('a'))"
    assert Sandbox().run(program).stdout == Sandbox().run(program).stdout


@isolated
def test_runs_from_many_threads_do_not_mix() -> None:
    sandbox = Sandbox()
    answers: dict[int, bytes] = {}

    def work(k: int) -> None:
        answers[k] = sandbox.run("print(int(input()) ** 2)", str(k)).stdout

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {k: b"%d\n" % k**2 for k in range(8)}


@isolated
def test_no_descriptor_of_this_process_is_left_open() -> None:
    sandbox = Sandbox(Limits(cpu_seconds=1, wall_seconds=1.0, output_bytes=1000))
    sandbox.require()
    before = sorted(os.listdir("/proc/self/fd"))
    for program in ("print(1)", "while True: pass", "print('x' * 5000)", "1 / 0"):
        sandbox.run(program)
    assert sorted(os.listdir("/proc/self/fd")) == before


@isolated
@pytest.mark.parametrize("victim", ["starter", "launcher"])
def test_when_the_starter_or_the_launcher_is_killed_everything_inside_dies(victim: str) -> None:
    code = (
        "from mcts.verify.sandbox import Limits, Sandbox\n"
        "sandbox = Sandbox(Limits(wall_seconds=1000.0, processes=4)); sandbox.require(); print('up', flush=True)\n"
        "print(sandbox.run('import os, time\\nos.fork()\\ntime.sleep(1000)').outcome)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"up\n"
        while len(inside := children(starter.pid)) < 4:  # launcher, init, the program and its child
            assert starter.poll() is None
            time.sleep(0.01)
        handles = [os.pidfd_open(pid) for pid in inside]
        (launcher,) = [pid for pid in inside if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(starter.pid)]
        os.kill(starter.pid if victim == "starter" else launcher, signal.SIGKILL)
        for handle in handles:
            assert select.select([handle], [], [], 60.0)[0], "it outlived the one who started it"
            os.close(handle)
    finally:
        starter.kill()
        starter.communicate()


# --- what the host must give ---

INSIDE = """
import sys
from mcts.verify.sandbox import Sandbox, SandboxError
for isolation in ("namespaces", "rlimits_only"):
    try:
        program = "import os; print(6 * 7, os.getpid() == 2, os.path.exists('/etc/passwd'))"
        run = Sandbox(isolation=isolation).run(program)
        print(run.outcome, run.stdout.decode(), run.why)
    except SandboxError as error:
        print("refused:", error)
"""


def in_user_namespace(*command: str) -> str:
    run = subprocess.run(["unshare", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@isolated
def test_it_works_for_a_user_who_is_not_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("this is such a user: all other tests tell")
    text = in_user_namespace("--user", "--map-user=1000", "--map-group=1000", sys.executable, "-c", INSIDE)
    assert "ok 42 True False" in text


@isolated
def test_where_namespaces_are_missing_it_says_so_and_runs_nothing_unless_told_to() -> None:
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" -c "$1"'
    text = in_user_namespace("--user", "--map-root-user", "sh", "-c", script, sys.executable, INSIDE)
    first, second = text.split("\n")[:2]
    assert first.startswith("refused: sandbox: this host lacks user namespaces (")
    assert first.endswith("set sandbox to rlimits_only to run the model's programs without isolation (unsafe)")
    assert second == "ok 42 False True"


def test_a_host_that_is_not_linux_or_has_no_filter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="lacks a system call filter for this machine"):
        Sandbox().run("print(1)")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="lacks Linux"):
        Sandbox().require()


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SandboxError, match="isolation must be one of namespaces, rlimits_only"):
        Sandbox(isolation="none")
    with pytest.raises(SandboxError, match="set processes to 1"):
        Sandbox(Limits(processes=2), "rlimits_only")
    for settings in ({"cpu_seconds": 0}, {"cpu_seconds": 1.5}, {"memory_bytes": 1}, {"processes": True}):
        with pytest.raises(SandboxError, match=next(iter(settings))):
            Limits(**settings)  # type: ignore[arg-type]


# --- without namespaces ---


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("while True: pass", Outcome.TIMEOUT),
        ("import time\ntime.sleep(1000)", Outcome.TIMEOUT),
        ("bytearray(1 << 30)", Outcome.MEMORY),
        ("while True: print('x' * 1000)", Outcome.OUTPUT),
        ("import os\nos.fork()", Outcome.EXIT),
        ("import os\nos.setsid()", Outcome.EXIT),
        ("import os\nos.kill(os.getppid(), 9)", Outcome.EXIT),
        ("import socket\nsocket.socket()", Outcome.EXIT),
    ],
)
def test_limits_hold_without_namespaces_too(program: str, outcome: Outcome) -> None:
    if not sys.platform.startswith("linux") or filter_program(processes=False, signals=False) is None:
        pytest.skip("no system call filter for this machine")
    before = children(os.getpid())
    run = Sandbox(Limits(cpu_seconds=1, wall_seconds=3.0, output_bytes=1 << 16), "rlimits_only").run(program)
    assert run.outcome is outcome, run
    assert children(os.getpid()) == before


def test_no_process_outside_is_signalled_through_a_pipe_without_namespaces() -> None:
    if not sys.platform.startswith("linux") or filter_program(processes=False, signals=False) is None:
        pytest.skip("no system call filter for this machine")
    with subprocess.Popen(["sleep", "1000"]) as victim:
        program = (
            "import fcntl, os\nr, w = os.pipe()\n"
            f"for command, value in ((10, 9), (8, {victim.pid}), (4, os.O_ASYNC)):\n"
            "    try: fcntl.fcntl(r, command, value)\n    except OSError as error: print(error.errno)\n"
            "os.write(w, b'x')"
        )
        run = Sandbox(Limits(cpu_seconds=1), "rlimits_only").run(program)
        time.sleep(0.2)
        alive = victim.poll() is None
        victim.kill()
    assert alive, run
    assert run.stdout == b"38\n38\n"


def test_filters_are_made_for_both_machines_and_only_those() -> None:
    sizes = set()
    for machine in ("x86_64", "aarch64"):
        for processes in (False, True):
            program = filter_program(processes=processes, signals=True, machine=machine)
            assert program is not None
            assert len(program) % 8 == 0
            assert len(program) // 8 <= 4096  # BPF_MAXINSNS
            sizes.add(len(program))
    assert len(sizes) == 4
    assert filter_program(processes=False, signals=False, machine="riscv64") is None
