"""Decode forwards on a GPU as CUDA graphs.

A decoded token needs a thousand small kernels, and launching them one by one takes Python several times as long as
the GPU needs to run them. A forward of given shape is captured once and then replayed as a whole. Its inputs, output
and every buffer it touches keep their addresses; weights may change in place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

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


class DecodeGraphs:
    """`decode` captured for every shape that it is asked for, with `fusion` applied. `hidden` [rows, d] takes the
    results."""

    def __init__(self, decode: Decode, hidden: Tensor, fusion: Fusion | None) -> None:
        self._decode = decode
        self._hidden = hidden
        self._fusion = fusion
        rows = len(hidden)
        self._inputs = torch.zeros(2 * rows, dtype=torch.int64, device=hidden.device)
        self._staged = torch.zeros(2 * rows, dtype=torch.int64, pin_memory=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def run(self, tokens: Index, positions: Index, window: int) -> Tensor:
        """Hidden states [k, d]; they are overwritten by the next call."""
        k = len(tokens)
        self._copied.synchronize()  # the last copy may still read what is staged
        self._staged[:k] = torch.from_numpy(tokens)
        self._staged[k : 2 * k] = torch.from_numpy(positions)
        self._inputs[: 2 * k].copy_(self._staged[: 2 * k], non_blocking=True)
        self._copied.record()
        graph = self._graphs.get((k, window))
        if graph is None:
            graph = self._graphs[k, window] = self._capture(k, window)
        graph.replay()
        return self._hidden[:k]

    def _capture(self, k: int, window: int) -> torch.cuda.CUDAGraph:
        tokens, positions = self._inputs[:k], self._inputs[k : 2 * k]
        graph = torch.cuda.CUDAGraph()
        with nullcontext() if self._fusion is None else self._fusion.applied():
            # Compilers and libraries set themselves up in a first call, which cannot be captured.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._decode(tokens, positions, window)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self._pool):
                self._hidden[:k].copy_(self._decode(tokens, positions, window))
        return graph
