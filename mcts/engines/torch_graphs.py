"""Decode forwards on a GPU as CUDA graphs.

A decoded token needs a thousand small kernels, and launching them one by one takes Python several times as long as
the GPU needs to run them. A forward of given shape is captured once and then replayed as a whole. Its inputs, output
and every buffer it touches keep their addresses; weights may change in place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcts.engines.model import Policy
from mcts.engines.torch_fuse import Fusion

Index = npt.NDArray[np.int64]
Decode = Callable[[Tensor, Tensor, int], Tensor]
"""(tokens [k] int64, positions [k] int64, columns read) -> final hidden states [k, d]."""

_LOOKS_AT_POSITIONS = ("dynamic", "longrope")
"""Rotary positions whose angles depend on the longest position of a forward: the host has to read it."""


def can_capture(policy: Policy) -> bool:
    """Whether forwards of this model can be captured: the host reads no tensor within one."""
    rope = getattr(policy.model.config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {each.get("rope_type") for each in rope.values() if isinstance(each, dict)}
    return policy.device.type == "cuda" and not kinds & set(_LOOKS_AT_POSITIONS)


class Staged:
    """A buffer on the device that numbers from the host are copied into without waiting for the device."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._there = torch.zeros(size, dtype=dtype, device=device)
        self._here = torch.zeros(size, dtype=dtype, pin_memory=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fill(self, *columns: npt.NDArray[Any]) -> Tensor:
        """Arrays [k] one after the other, on the device [k * columns]."""
        self._copied.synchronize()  # the last copy may still read what is staged
        at = 0
        for column in columns:
            self._here[at : at + len(column)] = torch.from_numpy(column)
            at += len(column)
        there = self._there[:at]
        there.copy_(self._here[:at], non_blocking=True)
        self._copied.record()
        return there


def capture(work: Callable[[], Any], pool: Any) -> torch.cuda.CUDAGraph:
    """The kernels that `work` launches, to be replayed. Its results are to be copied into buffers that last: the
    memory of `pool` is shared by all that is captured with it, of which no two are replayed at once."""
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # compilers and libraries set themselves up in a first call, which cannot be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        work()
    return graph


@cache
def _side_stream() -> torch.cuda.Stream:
    """The one stream of all captures: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class DecodeGraphs:
    """`decode` captured for every shape that it is asked for, with `fusion` applied. `hidden` [rows, d] takes the
    results."""

    def __init__(self, decode: Decode, hidden: Tensor, fusion: Fusion | None) -> None:
        self._decode = decode
        self.hidden = hidden
        self._fusion = fusion
        self.pool = torch.cuda.graph_pool_handle()
        self._inputs = Staged(2 * len(hidden), torch.int64, hidden.device)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def run(self, tokens: Index, positions: Index, window: int) -> Tensor:
        """Hidden states [k, d]; they are overwritten by the next call."""
        k = len(tokens)
        inputs = self._inputs.fill(tokens, positions)
        graph = self._graphs.get((k, window))
        if graph is None:
            out = self.hidden[:k]
            with nullcontext() if self._fusion is None else self._fusion.applied():
                graph = capture(lambda: out.copy_(self._decode(inputs[:k], inputs[k:], window)), self.pool)
            self._graphs[k, window] = graph
        graph.replay()
        return self.hidden[:k]
