"""Trees as training sequences: every token once, and a mask that lets it see its ancestors only.

The tokens of a tree stand in depth-first order, so the tokens below a token are the run that follows it, up to its
`exit`. Token i sees token j where j <= i < exit[j]: one comparison per batch builds the mask, and items that share a
row cannot see each other because every exit stays inside its item. A chain is the plain case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcts.types import Float32, Int32

NO_TOKEN = -1
"""`parent_token` of a first token."""

Int64 = npt.NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)


class PackingError(ValueError):
    """A sequence that cannot be packed; the message is one sentence that says what to do."""


_F = np.zeros(0, dtype=np.float32)
_I = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Ratios:
    """R runs of tokens whose likelihood is weighed by an importance ratio, U ratios. The runs of one ratio (a step, or
    the steps of a path) are multiplied: p(now) / p(when drawn), over all of them."""

    start: Int32  # [R] first token of a step
    end: Int32  # [R] one past its last
    unit: Int32  # [R] its ratio, 0 <= u < U
    behavior: Float32  # [R] nats, all its tokens together, under the distribution that they were drawn from
    weight: Float32  # [R] of -log p of each of its tokens

    @property
    def units(self) -> int:
        """U."""
        return int(self.unit[-1]) + 1 if len(self.unit) else 0


NO_RATIOS = Ratios(_I, _I, _I, _F, _F)


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One training sequence: a tree, a chain, or several segments of one tree that are trained together.

    T tokens, each after its parent; S spans (a node's tokens) in G sibling groups; V value labels. A token's
    log-probability comes from the hidden state of its parent token, so a first token can carry no policy loss.
    """

    token_ids: Int32  # [T]
    parent_token: Int32  # [T] index of the token before it on its path, NO_TOKEN at the first of a segment
    position: Int32  # [T] depth in tokens, 0 at the first
    exits: Int32  # [T] one past the last token below it: the tokens stand in depth-first order
    nll_weight: Float32  # [T] weight of -log p(token)
    sampled: Float32  # [T] weight of the token in the KL to the reference
    logprobs: Float32  # [T] nats as recorded when the token was drawn, NaN where unknown
    reference: Float32  # [T] nats under the reference model, NaN where not computed
    span_start: Int32  # [S] first token of a node in a sibling group
    span_end: Int32  # [S] one past its last token; a node's tokens are contiguous
    span_group: Int32  # [S] its group, 0 <= g < G
    span_target: Float32  # [S] target probability, summing to 1 over a group
    group_weight: Float32  # [G]
    value_token: Int32  # [V] token at which the value is read
    value_label: Float32  # [V] in [0, 1]
    value_weight: Float32  # [V]
    version: int = -1
    """Policy version that drew the tokens; -1: none of ours."""
    ratios: Ratios = NO_RATIOS
    """What importance ratios weigh; none unless an objective asks for them."""

    def __len__(self) -> int:
        return len(self.token_ids)


def chain(
    token_ids: npt.ArrayLike,
    *,
    nll_weight: npt.ArrayLike | None = None,
    value_token: npt.ArrayLike | None = None,
    value_label: npt.ArrayLike | None = None,
    value_weight: npt.ArrayLike | None = None,
    version: int = -1,
) -> Item:
    """A plain sequence. Without `nll_weight` it carries no policy loss; value labels weigh 1 unless told."""
    ids = np.asarray(token_ids, dtype=np.int32)
    parent, position, ends, none, unknown = _plain(len(ids))
    labels = _F if value_label is None else np.asarray(value_label, dtype=np.float32)
    return Item(
        token_ids=ids,
        parent_token=parent,
        position=position,
        exits=ends,
        nll_weight=none if nll_weight is None else np.asarray(nll_weight, dtype=np.float32),
        sampled=none,
        logprobs=unknown,
        reference=unknown,
        span_start=_I,
        span_end=_I,
        span_group=_I,
        span_target=_F,
        group_weight=_F,
        value_token=_I if value_token is None else np.asarray(value_token, dtype=np.int32),
        value_label=labels,
        value_weight=np.ones_like(labels) if value_weight is None else np.asarray(value_weight, dtype=np.float32),
        version=version,
    )


@lru_cache(maxsize=1024)
def _plain(size: int) -> tuple[Int32, Int32, Int32, Float32, Float32]:
    """Parents, positions, exits, zeros and NaNs of a chain; shared between chains, hence read-only."""
    order = np.arange(size, dtype=np.int32)
    parts = (
        order - np.int32(1),
        order,
        np.full(size, size, dtype=np.int32),
        np.zeros(size, dtype=np.float32),
        np.full(size, np.nan, dtype=np.float32),
    )
    for part in parts:
        part.flags.writeable = False
    return parts


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A batch of rows, and where the losses of its items are read. M predicted tokens, S spans, G groups, V labels."""

    input_ids: Tensor  # [B, L] int64
    position_ids: Tensor  # [B, L] int64
    exits: Tensor  # [B, L] int64, one past the last token below each token, within its row
    read: Tensor  # [W] int64, flat indices of the hidden states that somebody reads, ascending
    source: Tensor  # [M] int64, index into `read` of the hidden state that predicts
    labels: Tensor  # [M] int64, the token ids predicted
    nll_weight: Tensor  # [M] float32
    sampled: Tensor  # [M] float32
    logprobs: Tensor  # [M] float32, recorded, NaN where unknown
    reference: Tensor  # [M] float32, NaN where not computed
    version: Tensor  # [M] int64, policy version that drew the token, -1: none of ours
    span_token: Tensor  # [K] int64, index into the M tokens, span after span
    token_span: Tensor  # [K] int64, the span of each of them
    span_group: Tensor  # [S] int64
    span_target: Tensor  # [S] float32
    group_weight: Tensor  # [G] float32
    value_source: Tensor  # [V] int64, index into `read` of the hidden state that the value head reads
    value_label: Tensor  # [V] float32
    value_weight: Tensor  # [V] float32
    ratio_token: Tensor  # [J] int64, index into the M tokens, run after run
    token_ratio: Tensor  # [J] int64, the run (0 <= r < R) of each of them
    ratio_unit: Tensor  # [R] int64, the ratio of each run
    ratio_behavior: Tensor  # [R] float32
    ratio_weight: Tensor  # [R] float32
    item_of: Tensor  # [M] int64, the item of each predicted token, in the order given to `pack`
    token_of: Tensor  # [M] int64, its index within the item
    tokens: int
    """Tokens of the items, padding left out."""
    units: int
    """U, importance ratios."""

    def to(self, device: torch.device) -> Packed:
        """The batch on `device`."""
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        held |= {name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)}
        return Packed(**held)

    def mask(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Additive attention mask [B, 1, L, L]: 0 where a token is seen, a very large negative number elsewhere.
        Padding sees itself only."""
        index = torch.arange(self.exits.shape[1], device=self.exits.device)
        seen = (self.exits[:, None, :] > index[:, None]) & (index[:, None] >= index)
        low = torch.finfo(dtype).min  # finite, so that no row can turn into NaN
        return torch.where(seen, 0.0, low).to(dtype)[:, None]


def pack(items: Sequence[Item], row_length: int | None = None, *, share_rows: bool = True, pad_id: int = 0) -> Packed:
    """Lay the items' segments into rows of `row_length` tokens, first fit by falling length.

    Without `row_length` a row is as long as the longest segment: chains of nearly equal length get a row each, as in a
    padded batch; without `share_rows` every segment gets one. Raises PackingError where a
    segment is longer than a row.
    """
    if not items:
        raise PackingError("there is nothing to pack; give at least one item")
    offset = np.cumsum([0, *map(len, items)])  # of each item among all tokens
    size = int(offset[-1])
    every = np.repeat(offset[:-1], np.diff(offset))
    parent = _join(items, "parent_token", np.int64)
    first = np.flatnonzero(parent == NO_TOKEN)
    lengths = np.diff(np.append(first, size))
    longest = int(lengths.max())
    length = longest if row_length is None else row_length
    if longest > length:
        raise PackingError(f"a segment of {longest} tokens does not fit a row of {length}; cut it or raise row_length")
    row, column = _first_fit(lengths, length) if share_rows else (np.arange(len(first)), np.zeros_like(first))
    rows = int(row.max()) + 1
    place = np.arange(size) + np.repeat(row * length + column - first, lengths)  # of each token in the batch
    ids = np.full(rows * length, pad_id, dtype=np.int64)
    positions = np.zeros(rows * length, dtype=np.int64)
    ends = np.tile(np.arange(1, length + 1, dtype=np.int64), rows)
    ids[place] = labels = _join(items, "token_ids", np.int64)
    positions[place] = _join(items, "position", np.int64)
    ends[place] = _join(items, "exits", np.int64) + every + np.repeat(column - first, lengths)
    parent += every  # those of first tokens are not used below

    def at(name: str, per_item: list[int]) -> Int64:
        """Token indices of an annotation among all tokens."""
        found: Int64 = _join(items, name, np.int64) + np.repeat(offset[:-1], per_item)
        return found

    spans = [len(item.span_start) for item in items]
    span_token, token_span = _runs_of(at("span_start", spans), at("span_end", spans))
    ratios = [item.ratios for item in items]
    runs = [len(ratio.start) for ratio in ratios]
    shift = np.repeat(offset[:-1], runs)
    ratio_token, token_ratio = _runs_of(
        _join(ratios, "start", np.int64) + shift, _join(ratios, "end", np.int64) + shift
    )
    units = np.cumsum([0, *(ratio.units for ratio in ratios)])
    nll, sampled = _join(items, "nll_weight", np.float32), _join(items, "sampled", np.float32)
    wanted = (nll != 0) | (sampled != 0)
    wanted[span_token] = True
    wanted[first] = False
    chosen = np.flatnonzero(wanted)
    groups = np.cumsum([0, *(len(item.group_weight) for item in items)])
    sources = place[parent[chosen]]
    values = place[at("value_token", [len(item.value_token) for item in items])]
    read, where = np.unique(np.concatenate([sources, values]), return_inverse=True)
    item_of = np.searchsorted(offset, chosen, side="right") - 1
    arrays = {
        "input_ids": ids.reshape(rows, length),
        "position_ids": positions.reshape(rows, length),
        "exits": ends.reshape(rows, length),
        "read": read,
        "source": where[: len(sources)],
        "labels": labels[chosen],
        "nll_weight": nll[chosen],
        "sampled": sampled[chosen],
        "logprobs": _join(items, "logprobs", np.float32)[chosen],
        "reference": _join(items, "reference", np.float32)[chosen],
        "version": np.asarray([item.version for item in items])[item_of],
        "span_token": (np.cumsum(wanted) - 1)[span_token],
        "token_span": token_span,
        "span_group": _join(items, "span_group", np.int64) + np.repeat(groups[:-1], spans),
        "span_target": _join(items, "span_target", np.float32),
        "group_weight": _join(items, "group_weight", np.float32),
        "value_source": where[len(sources) :],
        "value_label": _join(items, "value_label", np.float32),
        "value_weight": _join(items, "value_weight", np.float32),
        "ratio_token": (np.cumsum(wanted) - 1)[ratio_token],
        "token_ratio": token_ratio,
        "ratio_unit": _join(ratios, "unit", np.int64) + np.repeat(units[:-1], runs),
        "ratio_behavior": _join(ratios, "behavior", np.float32),
        "ratio_weight": _join(ratios, "weight", np.float32),
        "item_of": item_of,
        "token_of": chosen - offset[item_of],
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Packed(**tensors, tokens=size, units=int(units[-1]))


def _runs_of(start: Int64, end: Int64) -> tuple[Int64, Int64]:
    """The tokens of several runs, one run after the other, and the run of each of them."""
    sizes = end - start
    run = np.repeat(np.arange(len(sizes)), sizes)
    return np.arange(len(run)) + np.repeat(start - np.cumsum(sizes) + sizes, sizes), run


def _join(items: Sequence[object], name: str, dtype: type[Number]) -> npt.NDArray[Number]:
    """One field of all of them, end to end, as a new array."""
    return np.concatenate([getattr(item, name) for item in items]).astype(dtype)


def _first_fit(lengths: Int64, row_length: int) -> tuple[Int64, Int64]:
    """Row and first column of each segment, by falling length into the first row that has room."""
    row, column = np.zeros_like(lengths), np.zeros_like(lengths)
    shortest = int(lengths.min())
    used: list[int] = []
    roomy: list[int] = []
    for k in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[k])
        here = next((r for r in roomy if used[r] + size <= row_length), None)
        if here is None:
            here = len(used)
            used.append(0)
            roomy.append(here)
        row[k], column[k] = here, used[here]
        used[here] += size
        if used[here] + shortest > row_length:
            roomy.remove(here)
    return row, column
