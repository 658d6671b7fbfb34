"""Runs a function on every rank of a group of processes, to its end or as a call of a crew; for tests."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from selfplay.crew import Crew, Died
from selfplay.group import TorchGroup, open_door

HOST = "127.0.0.1"
DEADLINE = 300.0
"""Seconds after which a group that hangs fails its test."""


def _meet(rank: int, size: int, queue: Any, timeout: float, patience: float) -> TorchGroup:
    torch.set_num_threads(1)
    if rank == 0:
        door, where = open_door(HOST)
        for _ in range(size - 1):
            queue.put(where)
    else:
        door, where = None, queue.get(timeout=DEADLINE)
    return TorchGroup(rank, size, where, host=HOST, door=door, timeout=timeout, patience=patience)


def _rank(rank: int, size: int, queue: Any, work: Callable[..., Any], arguments: tuple[Any, ...], out: Path) -> None:
    group = _meet(rank, size, queue, DEADLINE / 2, DEADLINE / 2)
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


def _answer(
    pipe: Connection, rank: int, size: int, queue: Any, patience: float, work: Callable[..., Any], arguments: Any
) -> None:
    """Do the work and say what came of it; then stay, as an actor does, until it is ended."""
    group = _meet(rank, size, queue, 100 * DEADLINE, patience)
    try:
        pipe.send((work(group, *arguments), None))
    except Exception as error:  # noqa: BLE001 - the driver judges it
        pipe.send((None, error))
    pipe.recv()


def _relay(pipe: Connection, answer: Future[Any]) -> None:
    try:
        result, error = pipe.recv()
    except EOFError:
        result, error = None, Died("its process ended")
    answer.set_result(result) if error is None else answer.set_exception(error)


@contextmanager
def answering(
    size: int, work: Callable[..., Any], *arguments: Any, patience: float
) -> Iterator[tuple[Future[Any], list[Any]]]:
    """`work(group, *arguments)` as a call of a crew of `size` processes: its result to come, and the processes. A rank
    waits `patience` seconds for the tensors of another."""
    context = get_context("spawn")
    queue = context.Queue()
    processes, answers, relays, pipes = [], [], [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_answer, args=(theirs, rank, size, queue, patience, work, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)  # a rank ends when its pipe is closed
        answers.append(Future[Any]())
        processes.append(process)
        relays.append(Thread(target=_relay, args=(ours, answers[-1])))
        relays[-1].start()
    crew = Crew(lambda: [process.kill() for process in processes] and None, moment=0.5)
    try:
        yield crew.call(answers), processes
    finally:
        for process in processes:
            process.kill()
            process.join()
        for relay in relays:
            relay.join()
        crew.close()
