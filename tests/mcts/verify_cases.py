"""What a worker may be asked to do to itself: a stand-in for a verifier's `judge`, run by the pool's tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

STATE = {"cases": 0}


def warm() -> None:
    return None


def judge(case: dict[str, Any]) -> dict[str, Any]:
    action = case["do"]
    STATE["cases"] += 1
    if action == "spin":
        while True:
            pass
    if action == "spin in C":
        return {"final": bool(10 ** (10**10))}
    if action == "sleep":
        time.sleep(1000)
    if action == "allocate":
        return {"final": bool(bytearray(1 << 40))}
    if action == "swallow":
        try:
            blocks = [bytearray(1 << 20) for _ in range(1 << 20)]
        except MemoryError:
            blocks = []
        return {"final": bool(blocks)}
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise ValueError("what a judge must not do")
    if action == "print":
        print("noise between the frames", flush=True)
        os.write(1, b"more noise")
    if action == "look":
        return {
            "final": True,
            "modules": sorted({name.partition(".")[0] for name in sys.modules}),
            "threads": threading.active_count(),
            "cases": STATE["cases"],
            "pid": os.getpid(),
            "nursery": os.getppid(),
        }
    if action == "child":
        return {"final": True, "child": subprocess.Popen(["sleep", "1000"]).pid}
    return {"final": True, "echo": case.get("text")}
