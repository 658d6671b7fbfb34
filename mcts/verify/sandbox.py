"""Runs Python programs that a model wrote, in namespaces of their own (docs/SANDBOX.md says how and what it needs).

A program sees the standard library, its standard input and an empty scratch folder in memory; no network, no other
file, no other process. Limits are on CPU seconds, wall seconds, memory, processes, files and output. When
`Sandbox.run` returns, nothing that the program started is alive.
"""

from __future__ import annotations

import os
import selectors
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path

from mcts.types import SettingError
from mcts.verify.sandbox_seccomp import ARCHITECTURES, filter_program

LAUNCHER = "import sys; sys.path.append(sys.argv[1]); import sandbox_launcher; sandbox_launcher.main(sys.argv[2:])"
"""Imported and not run as a script, so that its compiled code is kept (5 ms a start)."""
MAX_PROGRAM = 1 << 20
MAX_STDIN = 16 << 20
"""Longest program and standard input, in bytes."""
START_SECONDS = 30.0
"""Wall seconds that making the namespaces may take on a loaded machine; the program's clock starts after that."""
STOP_SECONDS = 10.0
"""Wall seconds that the kernel is given to take a killed sandbox down."""
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
PROBE = "print(input()[::-1])"


class SandboxError(SettingError):
    """The sandbox cannot be had as it was asked for; one sentence says what is missing and what to do."""


class Isolation(StrEnum):
    """What keeps a program in."""

    NAMESPACES = "namespaces"
    RLIMITS_ONLY = "rlimits_only"
    """Unsafe: limits and the system call filter only. The program reads and writes what its user can, and the clean-up
    after a kill of this process is left to the kernel. For machines of your own where nothing is worth stealing."""


class Outcome(StrEnum):
    """How a program ended."""

    OK = "ok"
    """It exited with status 0."""
    EXIT = "exit"
    """It exited with another status, or died by a signal of its own making."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT = "output"
    """It wrote more than the limit."""
    ERROR = "error"
    """It could not be run, or something outside killed it: nothing is known about it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    cpu_seconds: int = 5
    """Of each process; one more for a program that catches SIGXCPU."""
    wall_seconds: float = 20.0
    """A backstop, measured from the program's start."""
    memory_bytes: int = 256 << 20
    """Address space of each process."""
    processes: int = 1
    """Processes and threads at once. 1: the calls that make them do not exist. All of them together may use `processes`
    times the memory and the CPU seconds."""
    scratch_bytes: int = 16 << 20
    """Of all files in the scratch folder; it counts as memory of the machine."""
    output_bytes: int = 1 << 20
    """Of standard output and of standard error, each."""

    def __post_init__(self) -> None:
        least = {"cpu_seconds": 1, "wall_seconds": 0.001, "memory_bytes": 64 << 20, "scratch_bytes": 4096}
        for field in fields(self):
            value, low = getattr(self, field.name), least.get(field.name, 1)
            kinds = (int, float) if field.name == "wall_seconds" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value < 1 << 40:
                raise SandboxError(f"sandbox: {field.name} must be a number of at least {low}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Run:
    """What is known of one run."""

    outcome: Outcome
    stdout: bytes
    stderr: bytes
    """At most `output_bytes` of each."""
    why: str = ""
    exit_code: int | None = None
    """Negative: the signal that killed it."""
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    """Largest resident size of one process."""
    space: int | None = None
    """Inode of the PID namespace that it ran in."""


class Sandbox:
    """Runs programs under fixed limits. Safe to call from many threads."""

    def __init__(self, limits: Limits | None = None, isolation: str = Isolation.NAMESPACES) -> None:
        """The interpreter is the one that runs this process, without its installed packages.

        Raises SandboxError where `isolation` is no such word. What the host lacks is found at the first `run`, or by
        `require`."""
        try:
            self.isolation = Isolation(isolation)
        except ValueError as error:
            words = ", ".join(Isolation)
            raise SandboxError(f"sandbox: isolation must be one of {words}, not {isolation!r}") from error
        self.limits = limits or Limits()
        if self.isolation is Isolation.RLIMITS_ONLY and self.limits.processes > 1:
            raise SandboxError("sandbox: rlimits_only cannot count processes: set processes to 1, or use namespaces")
        self._python = os.path.realpath(str(getattr(sys, "_base_executable", sys.executable)))
        isolated = self.isolation is Isolation.NAMESPACES
        self._filter = filter_program(processes=self.limits.processes > 1, signals=isolated)
        self._binds = _visible(self._python)
        self._lock = threading.Lock()
        self._missing: str | None = None

    def require(self) -> None:
        """Raise SandboxError, naming what is missing, unless a program really runs in here; asked of the host once."""
        with self._lock:
            if self._missing is None:
                self._missing = self._probe()
            if self._missing:
                raise SandboxError(self._missing)

    def _probe(self) -> str:
        """What is missing, in one sentence; empty where nothing is."""
        if not sys.platform.startswith("linux"):
            lacking = "Linux"
        elif self._filter is None:
            lacking = f"a system call filter for this machine (there are {' and '.join(ARCHITECTURES)})"
        else:
            run = self._run(PROBE.encode(), b"abc\n")
            if run.outcome is Outcome.OK and run.stdout == b"cba\n":
                return ""
            lacking = run.why or run.stderr.decode("utf-8", "replace").strip() or run.outcome
        if self.isolation is Isolation.RLIMITS_ONLY:
            return f"sandbox: this host cannot even limit programs, it lacks {lacking}: run them on another host"
        return (
            f"sandbox: this host lacks {lacking}: allow it, or set sandbox to {Isolation.RLIMITS_ONLY} to run the "
            "model's programs without isolation (unsafe)"
        )

    def run(self, program: str, stdin: str = "") -> Run:
        """Run a program to its end or its limits. Raises SandboxError where the host lacks something.

        A run that met the wall clock before its CPU limit, or could not be started, is tried once more: a loaded
        machine is no fault of the program.
        """
        self.require()
        try:
            text, given = program.encode(), stdin.encode()
        except UnicodeEncodeError:
            return Run(Outcome.EXIT, b"", b"", "the program or its input is no valid Unicode text")
        if len(text) > MAX_PROGRAM or len(given) > MAX_STDIN:
            return Run(Outcome.EXIT, b"", b"", "the program or its input is too long")
        run = self._run(text, given)
        if run.outcome is Outcome.ERROR or (run.outcome is Outcome.TIMEOUT and run.exit_code is None):
            run = self._run(text, given)
        return run

    def _run(self, program: bytes, stdin: bytes) -> Run:
        if self.isolation is Isolation.NAMESPACES:
            return self._watch(program, stdin, "")
        with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
            return self._watch(program, stdin, folder)

    def _watch(self, program: bytes, stdin: bytes, folder: str) -> Run:
        assert self._filter is not None
        limits = self.limits
        control, theirs = os.pipe()
        given = os.memfd_create("sandbox")
        try:
            with open(given, "wb", closefd=False) as file:
                file.write(struct.pack("=3Q", len(self._filter), len(program), len(stdin)))
                file.writelines((self._filter, program, stdin))
            os.lseek(given, 0, os.SEEK_SET)
            numbers = (
                theirs,
                os.getpid(),
                limits.cpu_seconds,
                limits.memory_bytes,
                limits.processes,
                limits.scratch_bytes,
            )
            words = [*map(str, numbers), folder, self._python, *self._binds]
            launcher = subprocess.Popen(
                [self._python, "-I", "-S", "-c", LAUNCHER, str(Path(__file__).parent), *words],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(theirs,),
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            os.close(control)
            return Run(Outcome.ERROR, b"", b"", f"a process to start it ({error.strerror})")
        finally:
            os.close(theirs)
            os.close(given)
        watch = _Watch(launcher, control, limits)
        try:
            watch.follow()
        finally:
            watch.stop()
        return watch.result()


class _Watch:
    """One launcher: reads its pipes until it has ended or has to be stopped."""

    def __init__(self, launcher: subprocess.Popen[bytes], control: int, limits: Limits) -> None:
        assert launcher.stdout is not None
        assert launcher.stderr is not None
        self.launcher = launcher
        self.limits = limits
        self.control = control
        self.texts = {
            launcher.stdout.fileno(): bytearray(),
            launcher.stderr.fileno(): bytearray(),
            control: bytearray(),
        }
        self.started: float | None = None
        self.stopped: Outcome | None = None
        self.ended = False

    def follow(self) -> None:
        """Returns when the program has ended, or with `stopped` set when it broke a limit."""
        begun = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for descriptor in self.texts:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            while not self.ended:
                now = time.monotonic()
                left = (
                    begun + START_SECONDS if self.started is None else self.started + self.limits.wall_seconds
                ) - now
                if left <= 0:
                    self.stopped = Outcome.ERROR if self.started is None else Outcome.TIMEOUT
                    return
                for key, _ in selector.select(left):
                    self._read(key.fd, selector.unregister)
                    if self.stopped:
                        return

    def _read(self, descriptor: int, forget: Callable[[int], object]) -> None:
        held = self.texts[descriptor]
        try:
            part = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return
        if not part:
            forget(descriptor)
            self.ended = self.ended or descriptor == self.control
        elif descriptor == self.control:
            held += part
            if self.started is None and b"go\n" in held:
                self.started = time.monotonic()
        else:
            room = self.limits.output_bytes - len(held)
            held += part[:room]
            if len(part) > room:
                self.stopped = Outcome.OUTPUT

    def stop(self) -> None:
        """Returns when the launcher is gone, and with it the namespace; then what is left in the pipes is read."""
        if not self.ended:
            self.launcher.send_signal(signal.SIGTERM)
        try:
            self.launcher.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            self.launcher.wait()
        for descriptor in self.texts:
            while True:
                before = len(self.texts[descriptor])
                self._read(descriptor, lambda _: None)
                if len(self.texts[descriptor]) == before:
                    break
        for pipe in (self.launcher.stdout, self.launcher.stderr):
            assert pipe is not None
            pipe.close()
        os.close(self.control)

    def result(self) -> Run:
        stdout, stderr, control = map(bytes, self.texts.values())
        words = dict(line.partition(" ")[::2] for line in control.decode("utf-8", "replace").splitlines())
        space = int(words["space"]) if "space" in words else None
        if "exit" not in words:
            if self.stopped is None or self.started is None:
                outcome, why = Outcome.ERROR, words.get("failed", "") or "a start in time, or a launcher left alive"
            elif self.stopped is Outcome.OUTPUT:
                outcome, why = Outcome.OUTPUT, f"it wrote more than {self.limits.output_bytes} bytes"
            else:
                outcome, why = self.stopped, f"it ran for more than {self.limits.wall_seconds:g} wall seconds"
            if "failed" in words:
                outcome, why = Outcome.ERROR, words["failed"]
            return Run(outcome, stdout, stderr, why, space=space)
        status, seconds, peak = words["exit"].split()
        code, cpu = int(status), float(seconds)
        outcome, why = self._judge(code, cpu, stderr)
        if "failed" in words:
            outcome, why = Outcome.ERROR, words["failed"]
        return Run(outcome, stdout, stderr, why, code, cpu, int(peak) << 10, space)

    def _judge(self, code: int, cpu: float, stderr: bytes) -> tuple[Outcome, str]:
        if self.stopped is Outcome.OUTPUT:
            return Outcome.OUTPUT, f"it wrote more than {self.limits.output_bytes} bytes"
        if code == 0:
            return Outcome.OK, ""
        # the kernel counts ticks, the usage is measured: on a busy machine the two are some way apart
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= self.limits.cpu_seconds / 2):
            return Outcome.TIMEOUT, f"it used its {self.limits.cpu_seconds} CPU seconds"
        if code == -signal.SIGKILL:
            return Outcome.ERROR, "it was killed: by itself, or because the machine has no memory left"
        last = stderr.rstrip().rpartition(b"\n")[2]
        if last.startswith(b"MemoryError"):
            return Outcome.MEMORY, f"it needed more than {self.limits.memory_bytes} bytes"
        if code < 0:
            return Outcome.EXIT, f"it died by signal {-code}"
        return Outcome.EXIT, f"it exited with status {code}: {last[-200:].decode('utf-8', 'replace')}".rstrip(": ")


def _visible(python: str) -> list[str]:
    """Paths of the host that a program may read: system libraries, the interpreter and its standard library."""
    prefix = sys.base_prefix
    paths = [*LIBRARIES, python]
    for folder in (sysconfig.get_path("stdlib"), f"{prefix}/lib/python{sys.version_info[0]}.{sys.version_info[1]}"):
        if folder and os.path.isdir(folder):
            paths.append(os.path.realpath(folder))
    paths += [str(path) for path in sorted(Path(prefix, "lib").glob("libpython*.so*")) if path.is_file()]
    found: list[str] = []
    for path in dict.fromkeys(paths):
        if os.path.exists(path) and not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found
