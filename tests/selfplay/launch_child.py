"""Launches into URL-0, URL-1, ..., each killed before one more write than the one before, until one is not killed.
`python -m tests.selfplay.launch_child URL`; prints how many were."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from typing import Any

from selfplay import s3, store_disk, store_s3  # noqa: F401 - loaded once, before the children
from selfplay.run_folder import RunFolder
from selfplay.store import is_remote
from tests.selfplay.tiny_run import tiny_config

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Countdown:
    """Kills this process before its write number `left`, from 0."""

    def __init__(self, left: int) -> None:
        self.left = left

    def write(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def arrange_disk(root: str, countdown: Countdown) -> None:
    def heard(event: str, args: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir") or (
            event == "open" and (set(args[1] or "") & set("wxa+") or (args[2] or 0) & WRITING)
        )
        if writes and str(args[0]).startswith(root):
            countdown.write()

    sys.addaudithook(heard)


def arrange_s3(countdown: Countdown) -> None:
    for name in ("put", "upload", "delete"):
        real = getattr(s3.Bucket, name)

        def call(*args: Any, real: Any = real, **how: Any) -> Any:
            countdown.write()
            return real(*args, **how)

        setattr(s3.Bucket, name, call)


def launch(url: str, writes: int) -> None:
    countdown = Countdown(writes)
    arrange_s3(countdown) if is_remote(url) else arrange_disk(url, countdown)
    RunFolder.create(url, tiny_config("seed=5"))
    os._exit(0)


def main(url: str) -> None:
    for number in itertools.count():
        child = os.fork()
        if not child:
            launch(f"{url}-{number}", number)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            print(number)
            return
        if status != -signal.SIGKILL:
            sys.exit(f"launch {number} ended with {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
