"""Processes that learn together: what they tell each other, and that none of them waits for one that failed."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from selfplay.errors import Interrupted, NonFiniteLoss, UserError, known_errors

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process of the group failed; that one has the cause."""


class GroupLost(RuntimeError):
    """Another process of the group is gone or silent; this group is of no use any more."""


class GroupBroken(RuntimeError):
    """This process failed where the others could not be told: they wait for it, and the group is of no use any more."""

    def __init__(self, rank: int, what: str) -> None:
        super().__init__(rank, what)
        self.rank = rank
        self.what = what

    def __str__(self) -> str:
        return f"learner {self.rank} failed: {self.what}"


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
        self,
        rank: int,
        size: int,
        where: tuple[str, int],
        *,
        host: str,
        door: socket.socket | None,
        timeout: float,
        patience: float,
    ) -> None:
        """Wait until all `size` processes are there. They meet at `where` (address, port), at the `door` that rank 0
        opened there; `host` is this process's own address.

        In seconds, `timeout` is the longest that a rank waits for another to come or to say something, `patience` the
        longest that it waits for its tensors; then it raises GroupLost.
        """
        import torch.distributed as dist

        self.rank = rank
        self.size = size
        limit = timedelta(seconds=timeout)
        listen = None if door is None else door.detach()
        meeting: Any = dist  # TCPStore has no stub
        with losses():
            for library in ("GLOO", "NCCL"):  # they would take what the host's name resolves to
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface_of(host))
            store = meeting.TCPStore(*where, size, is_master=rank == 0, timeout=limit, master_listen_fd=listen)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            patient = timedelta(seconds=patience)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patient)
            # Texts travel on their own: an error can be told while others still wait for tensors.
            self._control = dist.new_group(backend="gloo", timeout=limit)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        import torch.distributed as dist

        for kind in sorted({(str(tensor.dtype), str(tensor.device)) for tensor in tensors}):
            mine = [tensor for tensor in tensors if (str(tensor.dtype), str(tensor.device)) == kind]
            flat = torch.cat([tensor.reshape(-1) for tensor in mine])
            with losses():
                dist.all_reduce(flat)
            pieces = torch.split(flat, [tensor.numel() for tensor in mine])
            for tensor, summed in zip(mine, pieces, strict=True):
                tensor.copy_(summed.view_as(tensor))

    def gather(self, text: str) -> list[str]:
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with losses():
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self._control)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        with losses():
            dist.all_gather(found, padded, group=self._control)
        return [bytes(each[: int(size)].tolist()).decode() for each, size in zip(found, sizes, strict=True)]

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


@contextmanager
def losses() -> Iterator[None]:
    """What torch.distributed raises when others are gone is raised as GroupLost."""
    try:
        yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise GroupLost(str(error)) from error


def _is_loss(error: Exception) -> bool:
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return True
    signs = ("gloo", "Gloo", "NCCL", "Connection", "timed out")  # gloo has no error of its own
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextmanager
def unheard(group: Group) -> Iterator[None]:
    """Around work in which the ranks wait for each other's tensors: one that fails there cannot tell the others.

    Its error is raised as GroupBroken, and what torch.distributed raises when others are gone as GroupLost. Errors that
    the others know, and those that are meant for users, are raised as they are.
    """
    try:
        yield
    except Exception as error:
        if group.size == 1 or isinstance(error, GroupLost | GroupBroken) or getattr(error, "told", False):
            raise
        if isinstance(error, known_errors()):
            tell_nobody(error)
            raise
        if _is_loss(error):
            raise GroupLost(str(error)) from error
        raise GroupBroken(group.rank, described(error)) from error


def open_door(host: str) -> tuple[socket.socket, tuple[str, int]]:
    """A socket that listens on a free port of this machine's address `host`, and where that is; for rank 0."""
    door = socket.create_server((host, 0), backlog=128)
    return door, (host, door.getsockname()[1])


def interface_of(address: str) -> str:
    """The network interface that has an IPv4 address of this machine. Raises GroupLost where none has."""
    query = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(any_socket.fileno(), query, struct.pack("256s", name.encode()))
            except OSError:
                continue  # an interface without an address
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    raise GroupLost(f"no network interface here has the address {address}: let Ray use one of this machine's own")


TOLD: dict[str, type[Exception]] = {error.__name__: error for error in (NonFiniteLoss, UserError, Interrupted)}
"""Errors that are raised on the other ranks as what they are."""


def agree(group: Group, work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank; its results (plain JSON), in the order of ranks.

    Where it raises on one rank, it raises on all: there what happened, elsewhere that error again or PeerError. While
    it goes on, ranks may only wait for each other in `agree` itself, or where none of them can raise.
    """
    if group.size == 1:
        return [work()]
    try:
        told = json.dumps({"result": work()})
    except (GroupLost, GroupBroken):
        raise
    except Exception as error:
        if not getattr(error, "told", False):
            _tell(group, error)
        tell_nobody(error)
        raise
    answers: list[dict[str, Any]] = [json.loads(answer) for answer in group.gather(told)]
    for rank, answer in enumerate(answers):
        if "error" in answer:
            known = TOLD.get(answer["error"])
            found = f"learner {rank} failed: {answer['error']}: {answer['message']}"
            raise tell_nobody(PeerError(found) if known is None else known(answer["message"]))
    return [answer["result"] for answer in answers]


def _tell(group: Group, error: Exception) -> None:
    try:
        group.gather(json.dumps({"error": type(error).__name__, "message": str(error)}))
    except GroupLost:
        raise GroupBroken(group.rank, described(error)) from error  # its own error says more than that the others left


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def tell_nobody(error: Exception) -> Exception:
    """An `agree` further out passes this error on without telling the others: they know, or could not listen."""
    error.told = True  # type: ignore[attr-defined]
    return error


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
