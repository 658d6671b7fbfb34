"""One forward of a Hugging Face causal LM over many independent rows, with keys and values in our own buffers.

Two stores. `rows` [layers, 2, R, heads, C, D] holds what is being decoded: one contiguous sequence per row, so that
attention is two batched products. `arena` [slots, layers, 2, heads, D] holds what tree nodes share, one entry per
token; a path is copied from there into a row when a step starts (9 to 21 times cheaper than recomputing it), and
the new tokens are copied back when it ends.

The model's own modules run; only attention is ours, through transformers' attention interface. The cache object
stores new keys and values and hands a `RowKeys` on in place of a key tensor, which `attend` recognises.

On a CPU the row buffers are as long as the longest row and all of them is read. On a GPU they are as long as the
context from the start, since captured forwards (`torch_graphs`) hold their address, and a forward reads a window of
them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mcts.engines.model import Policy, cache_name
from mcts.engines.torch_fuse import Fusion
from mcts.engines.torch_graphs import DecodeGraphs, can_capture

log = logging.getLogger(__name__)

ATTENTION = "mcts_rows"
Index = npt.NDArray[np.int64]

_NATIVE_BMM = 400
"""Below this product of sizes torch's bmm takes another kernel on CPUs, whose last bit differs."""
MULTIPLE = 16
"""KV lengths are padded to multiples of this."""
_SHRINK = 64
"""Forwards after which buffers that are too long shrink."""
_WINDOW = 64
"""Fewest columns that a forward on a GPU reads."""


@dataclass(slots=True)
class RowKeys:
    """What one layer attends to: keys and values [B, heads, L, D] and an additive mask [B, 1, T, L]."""

    keys: Tensor
    values: Tensor
    mask: Tensor


def attend(
    module: Any,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries [B, Hq, T, D] in transformers' interface; sdpa where the cache is not ours."""
    if not isinstance(key, RowKeys):
        return cast(
            tuple[Tensor, Tensor | None],
            sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs),
        )
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise RuntimeError(f"its attention has a {name}")
    out = fused(query, key, scaling) if query.is_cuda else products(query, key, scaling)
    return out.transpose(1, 2), None


def fused(query: Tensor, to: RowKeys, scaling: float) -> Tensor:
    """Attention [B, Hq, T, D] by one kernel. The query heads that share a key head stand as so many queries of one
    head, so that nothing is repeated."""
    batch, query_heads, tokens, size = query.shape
    heads = to.keys.shape[1]
    groups = query_heads // heads
    mask = to.mask if tokens == 1 else to.mask.repeat(1, 1, groups, 1)
    grouped = query.reshape(batch, heads, groups * tokens, size)
    out = F.scaled_dot_product_attention(grouped, to.keys, to.values, attn_mask=mask, scale=scaling)
    return out.reshape(batch, query_heads, tokens, size)


def products(query: Tensor, to: RowKeys, scaling: float) -> Tensor:
    """Attention [B, Hq, T, D] by two batched products, whose bits do not depend on the batch."""
    batch, query_heads, tokens, size = query.shape
    heads, length = to.keys.shape[1:3]
    groups = query_heads // heads
    keys, values = (side.view(batch * heads, length, size) for side in (to.keys, to.values))
    scores = torch.bmm((query * scaling).reshape(batch * heads, groups * tokens, size), keys.transpose(1, 2)).view(
        batch, heads, groups, tokens, -1
    )
    weights = torch.softmax(scores.add_(to.mask[:, :, None]), -1, dtype=torch.float32).to(query.dtype)
    out = torch.bmm(weights.view(batch * heads, groups * tokens, -1), values)
    return out.view(batch, query_heads, tokens, size)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class RowCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """The row buffers, seen by the model as its cache. `aim_*` says where the next forward's keys and values go."""

    def __init__(self, layers: int, rows: int, heads: int, size: int, capacity: int, like: Tensor) -> None:
        super().__init__(layers=[])
        self.num_layers, self.num_rows, self.heads, self.size = layers, rows, heads, size
        self.capacity = capacity
        """Positions per row. All of them are read by every forward: with gaps between the rows the products over
        them take three times as long, so the buffers are kept as short as the longest row allows."""
        self.kv = like.new_zeros((layers, 2, rows, heads, capacity, size))
        self.calls = 0
        """Layers served since the last `aim_*`."""
        self._batch = self._window = 0
        self._chunk: tuple[Tensor, int, int] | None = None
        self._index = torch.empty(0, dtype=torch.int64)
        self.mask = torch.empty(0)

    def resize(self, capacity: int) -> None:
        """Give every row `capacity` positions, keeping what fits."""
        old, kept = self.kv, min(capacity, self.capacity)
        self.kv = old.new_zeros((*old.shape[:4], capacity, self.size))
        self.kv[:, :, :, :, :kept] = old[:, :, :, :, :kept]
        self.capacity = capacity

    def aim_decode(self, positions: Tensor, window: int) -> None:
        """The first len(positions) rows take one token each: row i writes column `positions[i]` and sees the columns
        up to it. The first `window` columns are read."""
        k = len(positions)
        first = torch.arange(k * self.heads, device=positions.device) * self.capacity
        self._index = first.view(k, self.heads).add_(positions[:, None]).view(-1)
        seen = torch.arange(window, device=positions.device) <= positions[:, None]
        mask = torch.full((k, window), float("-inf"), dtype=self.kv.dtype, device=positions.device)
        self.mask = mask.masked_fill_(seen, 0.0).view(k, 1, 1, window)
        self._batch, self._window, self._chunk, self.calls = k, window, None, 0

    def aim_chunk(self, rows: Tensor, start: int, tokens: int) -> None:
        """The given rows take `tokens` tokens each at columns `start` and on, and see all before them."""
        end = start + tokens
        hidden = torch.ones((tokens, end), dtype=torch.bool, device=rows.device).triu_(start + 1)
        mask = torch.zeros((tokens, end), dtype=self.kv.dtype, device=rows.device)
        self.mask = mask.masked_fill_(hidden, float("-inf")).expand(len(rows), 1, tokens, end)
        self._batch, self._chunk, self.calls = len(rows), (rows, start, end), 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[RowKeys, None]:
        """Store a layer's new keys and values [B, heads, T, D]; what it may attend to."""
        self.calls += 1
        views = []
        for store, new in zip(self.kv[layer_idx], (key_states, value_states), strict=True):
            if self._chunk is None:
                store.view(-1, self.size).index_copy_(0, self._index, new.reshape(-1, self.size))
                seen = store[: self._batch, :, : self._window]
            else:
                rows, start, end = self._chunk
                store[rows, :, start:end] = new
                seen = store[rows, :, :end]
            views.append(seen)
        return RowKeys(views[0], views[1], self.mask), None

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (transformers' signature)
        """0: positions and masks are always given."""
        return 0


class Forward:
    """The forwards of one policy: `decode` (a token per row), `prefill` (a chunk per row), and KV copies. `fuse`:
    on a GPU, small kernels of captured forwards are compiled into few (`torch_fuse`)."""

    def __init__(
        self,
        policy: Policy,
        layers: int,
        heads: int,
        size: int,
        rows: int,
        slots: int,
        context: int,
        *,
        fuse: bool = False,
    ) -> None:
        like: Tensor = policy.model.get_input_embeddings().weight
        self.policy = policy
        self.device = like.device
        self.min_length = -(-_NATIVE_BMM // size // MULTIPLE) * MULTIPLE
        self.fixed = self.device.type == "cuda"
        """Whether rows have room for the context from the start, and a forward reads a window of them."""
        capacity = self.padded(context) if self.fixed else self.min_length
        self.cache = RowCache(layers, rows, heads, size, capacity, like.detach())
        self._roomy = 0
        self.graphs: DecodeGraphs | None = None
        """Captured forwards; None: they are launched kernel by kernel."""
        if self.fixed and not can_capture(policy):
            log.warning(
                "the angles of %s depend on the longest position of a forward: its forwards are launched kernel by "
                "kernel, several times slower than captured ones",
                type(policy.model).__name__,
            )
        elif self.fixed:
            width = int(policy.model.config.hidden_size)
            fusion = Fusion(policy) if fuse else None
            self.graphs = DecodeGraphs(self._decode, like.detach().new_empty((rows, width)), fusion)
        self.arena = like.detach().new_empty((slots, layers * 2 * heads, size))
        self._cache_name = cache_name(policy.model)
        self._offsets: Tensor | None = None  # [layers * 2 * heads] of the entries of an arena row in the row buffers
        self._offsets_for = 0

    def padded(self, length: int) -> int:
        """The KV length that rows of at most `length` positions need."""
        return max(self.min_length, -(-length // MULTIPLE) * MULTIPLE)

    def fit(self, length: int) -> None:
        """Make rows hold `length` tokens. On a CPU, buffers grow at once (an eighth more where they are long) and
        shrink when they were too long for many forwards."""
        if self.fixed:
            return
        capacity = self.cache.capacity
        if length > capacity:
            self.cache.resize(self.padded(length + length // 8))
            self._roomy = 0
        elif self.padded(length + length // 8) < capacity:
            self._roomy += 1
            if self._roomy > _SHRINK:
                self.cache.resize(self.padded(length + length // 8))
                self._roomy = 0
        else:
            self._roomy = 0

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device, torch.int64)

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states [B, T, d] of tokens [B, T] where the cache was aimed."""
        return self.policy.hidden(
            tokens,
            attention_mask=self.cache.mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache_name: self.cache},
        )

    def decode(self, tokens: Index, positions: Index) -> Tensor:
        """Forward tokens[i] at positions[i] in row i, for the first k rows; hidden states [k, d]."""
        window = self._window(int(positions.max()) + 1) if self.fixed else self.cache.capacity
        if self.graphs is not None:
            return self.graphs.run(tokens, positions, window)
        return self._decode(self._tensor(tokens), self._tensor(positions), window)

    def _window(self, length: int) -> int:
        """How many columns a forward reads whose rows are at most `length` long: one of few lengths, as every length
        is captured anew."""
        window = _WINDOW
        while window < length:
            window = window * 3 // 2 if window & (window - 1) == 0 else window * 4 // 3
        return min(window, self.cache.capacity)

    def _decode(self, tokens: Tensor, positions: Tensor, window: int) -> Tensor:
        """`decode` for int64 tensors [k] on the device."""
        self.cache.aim_decode(positions, window)
        return self._run(tokens[:, None], positions[:, None])[:, 0]

    def prefill(self, tokens: Index, rows: Index, start: int) -> None:
        """Forward a chunk [B, T] of consecutive tokens at positions `start` and on, into the given rows."""
        batch, chunk = tokens.shape
        self.cache.aim_chunk(self._tensor(rows), start, chunk)
        positions = torch.arange(start, start + chunk, device=self.device).expand(batch, chunk)
        self._run(self._tensor(tokens), positions)

    def _index(self, rows: Index, columns: Index) -> Tensor:
        """Where the entries of an arena row lie in the row buffers, int64 [T * layers * 2 * heads]."""
        cache = self.cache
        stride = cache.heads * cache.capacity
        if self._offsets is None or self._offsets_for != cache.capacity:
            planes = np.arange(cache.num_layers * 2)[:, None] * (cache.num_rows * stride)
            self._offsets = self._tensor((planes + np.arange(cache.heads) * cache.capacity).reshape(-1))
            self._offsets_for = cache.capacity
        return (self._tensor(rows * stride + columns)[:, None] + self._offsets).view(-1)

    def gather(self, slots: Index, rows: Index, columns: Index) -> None:
        """Copy arena slot slots[i] to column columns[i] of row rows[i]."""
        taken = self.arena.index_select(0, self._tensor(slots))
        flat = self.cache.kv.view(-1, self.cache.size)
        flat.index_copy_(0, self._index(rows, columns), taken.view(-1, self.cache.size))

    def store(self, rows: Index, columns: Index, slots: Index) -> None:
        """Copy column columns[i] of row rows[i] to arena slot slots[i]."""
        flat = self.cache.kv.view(-1, self.cache.size)
        taken = flat.index_select(0, self._index(rows, columns))
        self.arena.index_copy_(0, self._tensor(slots), taken.view(len(slots), -1, self.cache.size))

    def move(self, source: int, target: int) -> None:
        """Copy the whole of row `source` to row `target`."""
        self.cache.kv[:, :, target] = self.cache.kv[:, :, source]
