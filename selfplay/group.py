"""Processes that learn together: what they tell each other, and that none of them waits for one that failed."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from selfplay.errors import Interrupted, NonFiniteLoss, UserError

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process of the group failed; that one has the cause."""


class Group(Protocol):
    """`size` processes, each calling the same methods in the same order. All of them block until all have called."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the group, in place: the same bits on every rank. The tensors' shapes
        and dtypes are the same on every rank."""
        ...

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks."""
        ...


class Alone:
    """A group of one: nobody to talk to."""

    rank = 0
    size = 1

    def sum(self, tensors: Sequence[Tensor]) -> None:
        pass

    def gather(self, text: str) -> list[str]:
        return [text]


class TorchGroup:
    """torch.distributed: gloo for tensors on CPU, nccl for those on GPUs. One per process, for its whole life."""

    def __init__(
        self, rank: int, size: int, address: str, port: int, *, door: socket.socket | None, timeout: float = 600.0
    ) -> None:
        """Wait until all `size` processes are there. They meet at `address`:`port`, where rank 0 listens: the socket
        that `open_door` gave it is its `door`.

        `timeout` in seconds is the longest that a rank waits for another; after that it raises RuntimeError.
        """
        import torch.distributed as dist

        self.rank = rank
        self.size = size
        limit = timedelta(seconds=timeout)
        listen = None if door is None else door.detach()
        meeting: Any = dist  # TCPStore has no stub
        store = meeting.TCPStore(address, port, size, is_master=rank == 0, timeout=limit, master_listen_fd=listen)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        # Texts travel on their own: an error can be told while others still wait for tensors.
        self._control = dist.new_group(backend="gloo", timeout=limit)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        import torch.distributed as dist

        for kind in sorted({(str(tensor.dtype), str(tensor.device)) for tensor in tensors}):
            mine = [tensor for tensor in tensors if (str(tensor.dtype), str(tensor.device)) == kind]
            flat = torch.cat([tensor.reshape(-1) for tensor in mine])
            dist.all_reduce(flat)
            pieces = torch.split(flat, [tensor.numel() for tensor in mine])
            for tensor, summed in zip(mine, pieces, strict=True):
                tensor.copy_(summed.view_as(tensor))

    def gather(self, text: str) -> list[str]:
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._control)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(found, padded, group=self._control)
        return [bytes(each[: int(size)].tolist()).decode() for each, size in zip(found, sizes, strict=True)]

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


def open_door() -> tuple[socket.socket, int]:
    """A socket that listens on a free port of every address of this machine, and that port; for rank 0."""
    door = socket.create_server(("", 0), backlog=128)
    return door, door.getsockname()[1]


TOLD: dict[str, type[Exception]] = {error.__name__: error for error in (NonFiniteLoss, UserError, Interrupted)}
"""Errors that are raised on the other ranks as what they are."""


def agree(group: Group, work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank; its results (plain JSON), in the order of ranks.

    Where it raises on one rank, it raises on all: there what happened, elsewhere that error again or PeerError. So
    `work` must not wait for other ranks itself.
    """
    if group.size == 1:
        return [work()]
    try:
        told = json.dumps({"result": work()})
    except Exception as error:
        group.gather(json.dumps({"error": type(error).__name__, "message": str(error)}))
        raise
    answers: list[dict[str, Any]] = [json.loads(answer) for answer in group.gather(told)]
    for rank, answer in enumerate(answers):
        if "error" in answer:
            if (known := TOLD.get(answer["error"])) is not None:
                raise known(answer["message"])
            raise PeerError(f"learner {rank} failed: {answer['error']}: {answer['message']}")
    return [answer["result"] for answer in answers]


def shares(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of `sizes` for each rank, so that their sums are nearly equal; a function of the arguments alone.

    The largest ones are given out first, each to the rank that has least."""
    given: list[list[int]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = min(range(ranks), key=lambda rank: (filled[rank], rank))
        given[least].append(index)
        filled[least] += sizes[index]
    return given
