"""A process that judges each case in a fresh child of its own: run as `python -m mcts.verify.nursery MODULE`.

It loads MODULE once (its `judge(case) -> verdict` on JSON objects, and `warm()`), then answers requests on stdin one by
one. Each is judged in a fork, so that no case can see, slow or poison another, and starting one costs milliseconds. The
child's clock starts with its work: CPU seconds by a profiling timer and RLIMIT_CPU (which the kernel enforces even
inside one long C call), memory by RLIMIT_AS, and a wall clock as a backstop. When stdin closes because the parent ended
or died, the child is killed and this process ends; when this process is killed, the kernel kills the child.

Frames both ways: 4 bytes of length, big-endian, then JSON. Request: {"case": {...}, "cpu": seconds, "wall": seconds,
"memory": bytes}. Reply: {"end": "judged", "verdict": {...}} or {"end": "cpu" | "wall" | "memory" | "died", "why": ...};
both with "seconds", the CPU time spent. The first frame is {"end": "ready"} or {"end": "failed", "why": text}.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import os
import resource
import select
import signal
import struct
import sys
import time
from types import ModuleType
from typing import Any

MAX_FRAME = 1 << 20
"""Longest request or reply, in bytes."""
_PR_SET_PDEATHSIG = 1


def write_frame(descriptor: int, message: dict[str, Any]) -> None:
    """Write one message. Raises BrokenPipeError where nobody reads."""
    body = json.dumps(message).encode()
    data = struct.pack(">I", len(body)) + body
    while data:
        data = data[os.write(descriptor, data) :]


def read_frame(descriptor: int, deadline: float = math.inf) -> dict[str, Any] | None:
    """Read one message; None at the end of the stream. Raises TimeoutError when time.monotonic() passes `deadline`."""
    header = _read(descriptor, 4, deadline)
    if header is None:
        return None
    (length,) = struct.unpack(">I", header)
    body = _read(descriptor, length, deadline) if length <= MAX_FRAME else None
    if body is None:
        return None
    message: dict[str, Any] = json.loads(body)
    return message


def _read(descriptor: int, count: int, deadline: float) -> bytes | None:
    data = b""
    while len(data) < count:
        if deadline < math.inf and not _readable(descriptor, deadline):
            raise TimeoutError
        piece = os.read(descriptor, count - len(data))
        if not piece:
            return None
        data += piece
    return data


def _readable(descriptor: int, deadline: float) -> bool:
    poll = select.poll()  # select() fails on descriptors above 1023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def main() -> None:
    stdin, stdout = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)  # what a library prints must not get between the frames
    try:
        module = importlib.import_module(sys.argv[1])
        module.warm()
    except Exception as error:  # noqa: BLE001 - whatever it was, the parent has to say it
        write_frame(stdout, {"end": "failed", "why": f"{type(error).__name__}: {error}"})
        return
    gc.collect()
    gc.freeze()
    write_frame(stdout, {"end": "ready"})
    while (request := read_frame(stdin)) is not None:
        reply = _in_child(module, request, stdin, stdout)
        if reply is None:
            return
        write_frame(stdout, reply)


def _in_child(module: ModuleType, request: dict[str, Any], stdin: int, stdout: int) -> dict[str, Any] | None:
    """Judge one case in a fork; None if the parent is gone."""
    reader, writer = os.pipe()
    mine = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(stdin)
        os.close(stdout)
        _run(module, request, writer, mine)
    os.close(writer)
    reply: dict[str, Any] | None = None
    ended = ""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    poll.register(stdin, 0)  # its end only: a second request waits
    ready = poll.poll(request["wall"] * 1000)
    if not ready:
        ended = "wall"
    elif any(descriptor == reader for descriptor, _ in ready):
        try:
            reply = read_frame(reader, time.monotonic() + request["wall"])
        except TimeoutError:
            ended = "wall"
    else:
        ended = "orphan"
    if ended:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status, used = os.wait4(child, 0)
    if ended == "orphan":
        return None
    if reply is None:
        reply = {"end": ended or _end(status), "why": _why(status)}
    return reply | {"seconds": used.ru_utime + used.ru_stime}


def _end(status: int) -> str:
    over = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU)
    return "cpu" if over else "died"


def _why(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def _run(module: ModuleType, request: dict[str, Any], writer: int, parent: int) -> None:
    """In the child: set the limits, judge, answer, end."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        cpu = math.ceil(request["cpu"])
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu + 1, cpu + 2))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, request["cpu"])
        try:
            reply = {"end": "judged", "verdict": module.judge(request["case"])}
            if not reply["verdict"].get("final") and _peak() > 0.8 * request["memory"]:
                reply = {"end": "memory", "why": "close to the limit"}  # a library may have swallowed a MemoryError
        except MemoryError:
            reply = {"end": "memory", "why": "out of memory"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(writer, reply)
        code = 0
    finally:
        os._exit(code)


def _peak() -> int:
    """Largest virtual memory so far, in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmPeak:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
