"""Next tokens of the rows of a batch, and first tokens below cached prefixes, from hidden states.

On a GPU both are captured (`torch_graphs`) for what most requests ask: any temperature, the whole vocabulary, nothing
excluded. The rest is launched kernel by kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcts.engines.model import Policy
from mcts.engines.sampling import Draws, Float64, Removed, Settings, draw, drawn
from mcts.engines.torch_graphs import DecodeGraphs, Staged, capture
from mcts.types import Float32

Index = npt.NDArray[np.int64]


class Drawer:
    """Draws for a batch of `rows`, captured where its forwards are (`graphs`). `starts`: most prefixes whose first
    tokens are drawn at once."""

    def __init__(self, policy: Policy, rows: int, starts: int, graphs: DecodeGraphs | None) -> None:
        self._policy = policy
        self._hidden: Tensor | None = None  # [rows, d] where forwards leave their result
        self._parents: Tensor | None = None  # [starts, d] hidden states of the prefixes
        self._next: _Captured | None = None
        self._first: _Captured | None = None
        if graphs is not None:
            self._hidden = graphs.hidden
            self._parents = graphs.hidden.new_zeros((starts, graphs.hidden.shape[1]))
            self._next = _Captured(policy, graphs.hidden, rows, graphs.pool, chosen=False)
            self._first = _Captured(policy, self._parents, rows, graphs.pool, chosen=True)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Logits float32 [k, V] of the hidden states [k, d] that a forward gave; None: `next` makes them itself."""
        return self._policy.unembed(hidden).float() if self._hidden is None else None

    def next(
        self, logits: Tensor | None, uniform: Float64, temperature: Float32, top_p: Float32, removed: Removed | None
    ) -> Draws:
        """The next token of each of k rows."""
        if self._next is not None and _common(top_p, removed):
            return self._next.run(uniform, temperature)
        if logits is None:
            assert self._hidden is not None
            logits = self._policy.unembed(self._hidden[: len(uniform)]).float()
        return draw(logits, uniform, temperature, top_p, removed)

    def first(self, hidden: Float32, owner: Index, settings: list[tuple[Settings, Removed | None]]) -> list[Draws]:
        """First tokens below the hidden states [starts, d] of prefixes: `owner` [n] is the prefix of each, `settings`
        cut them into parts of at most `rows`."""
        weight = self._policy.model.get_output_embeddings().weight
        states = torch.from_numpy(hidden).to(weight.device, weight.dtype)
        logits: Tensor | None = None
        if self._parents is not None:
            self._parents.copy_(states)
        found = []
        at = 0
        for (uniform, temperature, top_p), removed in settings:
            mine = owner[at : at + len(uniform)]
            at += len(uniform)
            if self._first is not None and _common(top_p, removed):
                found.append(self._first.run(uniform, temperature, mine))
                continue
            if logits is None:
                logits = self._policy.unembed(states).float()
            chosen = logits.index_select(0, torch.from_numpy(mine).to(logits.device))
            found.append(draw(chosen, uniform, temperature, top_p, removed))
        return found


def _common(top_p: Float32, removed: Removed | None) -> bool:
    """Whether draws are of the kind that is captured."""
    return removed is None and bool((top_p >= 1.0).all())


class _Captured:
    """Draws from the hidden states `source` [n, d], captured per count and for plain sampling and any temperature.
    `chosen`: each draw names the row of `source` that it is made from; otherwise the first k are."""

    def __init__(self, policy: Policy, source: Tensor, most: int, pool: Any, *, chosen: bool) -> None:
        self._policy = policy
        self._pool = pool
        self._source = source
        self._chosen = chosen
        self._inputs = Staged(3 * most, torch.float64, source.device)
        self._results = torch.zeros(3 * most, dtype=torch.float64, device=source.device)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    def run(self, uniform: Float64, temperature: Float32, owner: Index | None = None) -> Draws:
        k = len(uniform)
        plain = bool((temperature == 1.0).all())
        inputs = self._inputs.fill(uniform, temperature, np.zeros(k) if owner is None else owner)
        graph = self._graphs.get((k, plain))
        if graph is None:
            results = self._results[: 3 * k].view(3, k)
            graph = self._graphs[k, plain] = capture(
                lambda: results.copy_(self._draw(inputs.view(3, k), plain)), self._pool
            )
        graph.replay()
        tokens, logprobs, behavior = self._results[: 3 * k].view(3, k).cpu().numpy()
        return Draws(tokens.astype(np.int64), logprobs.astype(np.float32), behavior.astype(np.float32))

    def _draw(self, inputs: Tensor, plain: bool) -> Tensor:
        """Tokens, log-probabilities and behaviour's, float64 [3, k], from uniform numbers, temperatures and owners
        [3, k]."""
        uniform, temperature, owner = inputs
        if self._chosen:
            logits = self._policy.unembed(self._source).float().index_select(0, owner.long())
        else:
            logits = self._policy.unembed(self._source[: len(uniform)]).float()
        found = drawn(logits, uniform, None if plain else temperature.float(), None, None)
        return torch.stack([each.double() for each in found])
