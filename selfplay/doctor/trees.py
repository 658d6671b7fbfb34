"""The invariants of the trees in a batch, over all nodes at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mcts.types import Kind, Status, Stop
from selfplay.doctor.findings import Fault
from selfplay.trace_stats import JUDGED

NOISE = 1e-4
"""What sums of float32 numbers, and log-probabilities of certain tokens, may be off by."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Nodes:
    """Columns over the nodes of all rows of a batch, one row's nodes after the other's; N in all."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        lists = batch.column("nodes")
        self.rows = batch.num_rows
        self.lengths: Ints = np.asarray(lists.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)  # [rows]
        self.starts: Ints = np.cumsum(self.lengths) - self.lengths  # [rows]
        self.row: Ints = np.repeat(np.arange(self.rows), self.lengths)  # [N]
        self.own: Ints = np.arange(len(self.row)) - self.starts[self.row]  # [N] place within the row
        self._flat = lists.flatten()

    def column(self, name: str) -> pa.Array:
        return self._flat.field(name)

    def ints(self, name: str) -> Ints:
        return np.asarray(self.column(name).to_numpy(zero_copy_only=False), dtype=np.int64)

    def floats(self, name: str) -> Floats:
        """NaN where null."""
        return np.asarray(self.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)

    def texts(self, name: str) -> npt.NDArray[Any]:
        """ "" where null."""
        return np.asarray(self.column(name).fill_null("").to_numpy(zero_copy_only=False), dtype="U")

    def fault(self, check: str, bad: Bools, what: str) -> Iterator[Fault]:
        """A fault of the rows that hold nodes marked in `bad` [N]; `what` may name the first {node}."""
        if bad.any():
            at = np.flatnonzero(bad)
            yield Fault(check, np.unique(self.row[at]).tolist(), what.format(node=int(self.own[at[0]])))


def structure_faults(nodes: Nodes) -> Iterator[Fault]:
    """Rows whose nodes are no tree at all; nothing else can be asked of them."""
    empty = np.flatnonzero(nodes.lengths == 0)
    if len(empty):
        yield Fault("tree", empty.tolist(), "has no nodes")
    parent, root = nodes.ints("parent"), nodes.own == 0
    fits = np.where(root, parent == -1, (parent >= 0) & (parent < nodes.own))
    yield from nodes.fault("tree", ~fits, "has node {node} before its parent, or without one")


def tree_faults(batch: pa.RecordBatch) -> Iterator[Fault]:
    """Everything that a tree promises of itself. Rows that are no trees are reported and left out of the rest."""
    nodes = Nodes(batch)
    broken = list(structure_faults(nodes))
    yield from broken
    lost = {row for fault in broken for row in fault.rows}
    if lost:
        kept = [row for row in range(batch.num_rows) if row not in lost]
        for fault in tree_faults(batch.take(pa.array(kept, pa.int64()))) if kept else ():
            yield fault._replace(rows=[kept[row] for row in fault.rows])
        return
    inner = nodes.own > 0
    parent = np.where(inner, nodes.ints("parent") + nodes.starts[nodes.row], 0)  # [N] global; 0 at roots, unused
    yield from _shape_faults(nodes, parent, inner)
    yield from _value_faults(nodes, parent, inner)
    yield from _verdict_faults(nodes)
    yield from _token_faults(nodes, batch, inner)


def _below(parent: Ints, inner: Bools, weights: Floats | Ints) -> Floats:
    """Per node the sum of `weights` over its children."""
    return np.bincount(parent[inner], weights=weights[inner], minlength=len(parent)).astype(np.float64)


def _shape_faults(nodes: Nodes, parent: Ints, inner: Bools) -> Iterator[Fault]:
    depth, visits, terminal = nodes.ints("depth"), nodes.ints("visits"), nodes.ints("terminal") > 0
    kind = nodes.texts("kind")
    expected = np.where(inner, depth[parent] + 1, 0)
    yield from nodes.fault("tree", depth != expected, "has node {node} at the wrong depth")
    childless = _below(parent, inner, np.ones(len(parent))) == 0
    yield from nodes.fault("tree", terminal & ~childless, "goes on below node {node}, which ended it")
    yield from nodes.fault("tree", nodes.ints("draws") < 1, "has node {node}, which was never drawn")
    yield from nodes.fault("tree", ~np.isin(kind, list(Kind)), "has node {node} of an unknown kind")
    stops = np.isin(nodes.texts("stop"), list(Stop)) | ~inner
    yield from nodes.fault("tree", ~stops, "has node {node}, of which nobody knows why it ended")
    below = _below(parent, inner, visits)
    yield from nodes.fault("visits", visits < below, "has node {node} with fewer visits than its children together")
    total = nodes.floats("value_sum")
    outside = ~((total >= -1e-9) & (total <= visits + 1e-9))
    yield from nodes.fault("values", outside, "has node {node} with a mean value outside [0, 1]")


def _value_faults(nodes: Nodes, parent: Ints, inner: Bools) -> Iterator[Fault]:
    for name in ("raw_value", "reward", "prior", "target"):
        column = nodes.floats(name)
        given = np.asarray(nodes.column(name).is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)
        outside = given & ~((column >= 0.0) & (column <= 1.0))
        yield from nodes.fault("values", outside, f"has node {{node}} with a {name} outside [0, 1]")
    step = inner & (nodes.texts("kind") == Kind.STEP.value)
    prior = np.nan_to_num(nodes.floats("prior"))
    over = _below(parent, step, prior) > 1.0 + NOISE
    yield from nodes.fault("priors", over, "has siblings below node {node} whose priors sum to more than 1")
    target = nodes.floats("target")
    aimed = inner & ~np.isnan(target)
    some = _below(parent, aimed, np.ones(len(parent))) > 0
    off = some & (np.abs(_below(parent, aimed, np.nan_to_num(target)) - 1.0) > NOISE)
    yield from nodes.fault("targets", off, "has siblings below node {node} whose targets do not sum to 1")


def _verdict_faults(nodes: Nodes) -> Iterator[Fault]:
    verdict, reward = nodes.texts("verdict"), nodes.floats("reward")
    terminal = nodes.ints("terminal") > 0
    given = verdict != ""
    yield from nodes.fault(
        "verdicts", given & ~np.isin(verdict, list(Status)), "has node {node} with a verdict unknown"
    )
    yield from nodes.fault("verdicts", given & ~terminal, "has node {node} judged although it is no end")
    judged = np.isin(verdict, JUDGED)
    alone = judged == np.isnan(reward)
    yield from nodes.fault("verdicts", alone, "has node {node} with a reward that no verdict gave, or the reverse")
    won = verdict == Status.CORRECT.value
    wrong = judged & (np.where(won, reward <= 0.0, reward >= 1.0))
    yield from nodes.fault("verdicts", wrong, "has node {node} with a reward against its verdict")


def _token_faults(nodes: Nodes, batch: pa.RecordBatch, inner: Bools) -> Iterator[Fault]:
    lengths = np.asarray(pc.list_value_length(nodes.column("token_ids")).to_numpy(zero_copy_only=False), dtype=np.int64)
    usage = batch.column("usage")
    sampled, discarded = (
        np.asarray(usage.field(name).to_numpy(zero_copy_only=False), dtype=np.int64)
        for name in ("sampled", "discarded")
    )
    kept = np.bincount(nodes.row[inner], weights=lengths[inner], minlength=nodes.rows).astype(np.int64)
    off = np.flatnonzero(kept + discarded != sampled)
    if len(off):
        at = int(off[0])
        said = f"counts {sampled[at]} sampled tokens, {kept[at]} in its tree and {discarded[at]} discarded"
        yield Fault("tokens", off.tolist(), said)
    for name in ("logprobs", "behavior_logprobs"):
        column = nodes.column(name)
        given = np.asarray(column.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)
        length = np.asarray(pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
        yield from nodes.fault(
            "logprobs", given & (length != lengths), f"has node {{node}} with other numbers of tokens and of {name}"
        )
        values = np.asarray(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float64)
        owner = np.repeat(np.arange(len(length)), np.where(given, length, 0))
        high = np.zeros(len(length), dtype=np.bool_)
        high[owner[values > NOISE]] = True
        yield from nodes.fault("logprobs", high, f"has node {{node}} with {name} above 0")
