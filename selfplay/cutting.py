"""Training sequences cut to length or split into their paths; every loss stays with the first copy of its token."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from mcts.types import Float32, Int32
from selfplay.packing import NO_TOKEN, Int64, Item, PackingError


def find_exits(parent_token: Int32) -> Int32:
    """One past the last token below each token, int32 [T]; the tokens must stand in depth-first order.

    Raises PackingError where they do not.
    """
    size = len(parent_token)
    ends = np.full(size, size, dtype=np.int32)
    path: list[int] = []
    for token, parent in enumerate(parent_token.tolist()):
        while path and path[-1] != parent:
            ends[path.pop()] = token
        if parent != NO_TOKEN and not path:
            raise PackingError(f"token {token} stands out of depth-first order after its parent {parent}")
        path.append(token)
    return ends


def segments(item: Item) -> Int64:
    """Where the segments of an item start, and its end: int64 [K + 1]."""
    return np.append(np.flatnonzero(item.parent_token == NO_TOKEN), len(item)).astype(np.int64)


def select(item: Item, source: Int64, parent_token: Int32, home: Int64) -> Item:
    """The item whose token k is a copy of token `source[k]`; losses move to the copy `home[t]` of token t."""

    def spread(values: Float32, empty: float) -> Float32:
        moved = np.full(len(source), empty, dtype=np.float32)
        moved[home] = values
        return moved

    return replace(
        item,
        token_ids=item.token_ids[source],
        parent_token=parent_token,
        position=item.position[source],
        exits=find_exits(parent_token),
        nll_weight=spread(item.nll_weight, 0.0),
        sampled=spread(item.sampled, 0.0),
        logprobs=spread(item.logprobs, np.nan),
        reference=spread(item.reference, np.nan),
        span_start=home[item.span_start].astype(np.int32),
        span_end=(home[item.span_end - 1] + 1).astype(np.int32),
        value_token=home[item.value_token].astype(np.int32),
        ratios=replace(
            item.ratios,
            start=home[item.ratios.start].astype(np.int32),
            end=(home[item.ratios.end - 1] + 1).astype(np.int32),
        ),
    )


def _paths(item: Item) -> list[list[int]]:
    """The tokens of every root-to-leaf path, in order of the leaves."""
    parent = item.parent_token.tolist()
    leaf = np.ones(len(item), dtype=np.bool_)
    leaf[item.parent_token[item.parent_token != NO_TOKEN]] = False
    found = []
    for token in np.flatnonzero(leaf).tolist():
        path = []
        while token != NO_TOKEN:
            path.append(token)
            token = parent[token]
        found.append(path[::-1])
    return found


def split_paths(item: Item) -> Item:
    """Every root-to-leaf path as a segment of its own, each loss on the first copy of its token only."""
    return _rebuild(item, _paths(item))


def _rebuild(item: Item, pieces: list[list[int]]) -> Item:
    """The item with one segment per piece; a piece holds tokens in depth-first order, with all their ancestors."""
    source = np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])
    home = np.full(len(item), -1, dtype=np.int64)
    parents = np.empty(len(source), dtype=np.int32)
    at = 0
    for piece in pieces:
        here = np.asarray(piece, dtype=np.int64)
        copy = np.full(len(item), NO_TOKEN, dtype=np.int32)
        copy[here] = np.arange(at, at + len(here), dtype=np.int32)
        above = item.parent_token[here]
        parents[at : at + len(here)] = np.where(above == NO_TOKEN, NO_TOKEN, copy[above])
        fresh = here[home[here] < 0]
        home[fresh] = copy[fresh]
        at += len(here)
    return select(item, source, parents, home)


def cut(item: Item, limit: int) -> Item:
    """The item with every segment at most `limit` tokens long: subtrees with the paths that lead to them.

    Tokens of such a path are copied and carry no loss twice. A node is cut only between its tokens' runs, so its
    losses stay whole. Raises PackingError where a single path is longer than `limit`.
    """
    if len(item) <= limit:
        return item
    bounds = segments(item)
    if int(np.diff(bounds).max()) <= limit:
        return item
    longest = int(item.position.max()) + 1
    if longest > limit:
        raise PackingError(f"a path of {longest} tokens is over the limit of {limit}; raise the learner's max_length")
    pieces: list[list[int]] = []
    for first, last in pairwise(bounds.tolist()):
        if last - first <= limit:
            pieces.append(list(range(first, last)))
        else:
            pieces.extend(_cut_segment(item, first, last, limit))
    return _rebuild(item, pieces)


def _cut_segment(item: Item, first: int, last: int, limit: int) -> list[list[int]]:
    parent = item.parent_token.tolist()
    starts = _runs(item, first, last)
    pieces: list[list[int]] = []
    piece: list[int] = []
    for start, end in zip(starts, [*starts[1:], last], strict=True):
        if len(piece) + end - start > limit:
            pieces.append(piece)
            path = []
            token = parent[start]
            while token != NO_TOKEN:
                path.append(token)
                token = parent[token]
            piece = path[::-1]
        piece.extend(range(start, end))  # its ancestors are in the piece: it holds a stretch of depth-first order
    pieces.append(piece)
    return pieces


def _runs(item: Item, first: int, last: int) -> list[int]:
    """First tokens of the runs without a fork inside, nodes of sibling groups kept whole."""
    here = np.arange(first, last)
    children = np.bincount(item.parent_token[first:last] + 1, minlength=len(item) + 1)[1:]
    breaks = item.parent_token[first:last] != here - 1
    breaks[1:] |= children[first : last - 1] > 1
    breaks[0] = True
    for start, end in zip(item.span_start.tolist(), item.span_end.tolist(), strict=True):
        if first <= start < last:
            breaks[start - first] = True
            breaks[start - first + 1 : end - first] = False
    return [int(t) for t in here[breaks]]
