"""Runs a function on every rank of a group of processes; for tests."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from selfplay.group import TorchGroup, open_door

HOST = "127.0.0.1"
DEADLINE = 300.0
"""Seconds after which a group that hangs fails its test."""


def _rank(rank: int, size: int, queue: Any, work: Callable[..., Any], arguments: tuple[Any, ...], out: Path) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        door, where = open_door(HOST)
        for _ in range(size - 1):
            queue.put(where)
    else:
        door, where = None, queue.get(timeout=DEADLINE)
    group = TorchGroup(rank, size, where, host=HOST, door=door, timeout=DEADLINE / 2)
    out.write_bytes(pickle.dumps(work(group, *arguments)))
    group.close()


def run_group(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(group, *arguments)` in `size` processes; what each returned."""
    context = get_context("spawn")
    queue = context.Queue()
    outs = [folder / f"rank{rank}-of-{size}" for rank in range(size)]
    processes = [
        context.Process(target=_rank, args=(rank, size, queue, work, arguments, out)) for rank, out in enumerate(outs)
    ]
    for process in processes:
        process.start()
    waiting: dict[Any, Any] = {process.sentinel: process for process in processes}
    try:
        while waiting:
            ended = wait(list(waiting), timeout=DEADLINE)
            assert ended, "the group hangs"
            for sentinel in ended:
                process = waiting.pop(sentinel)
                process.join()
                assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [pickle.loads(out.read_bytes()) for out in outs]  # noqa: S301
