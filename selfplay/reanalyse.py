"""Reanalysis: stored trees scored again with newer weights, whole trees in packed forwards, into side files.

What depends on the weights is computed anew: log-probabilities, values, priors under the rule `exact`, and what follows
from them. What the search did stays: which steps were drawn how often, which were visited how often, verdicts and
rewards. So Q is what the same simulations would have backed up, and a target what the same tree would have taught.

- An evaluation that backed up the value head's value backs up the new one; rewards, rollouts and constants are no
  weights' and stay. Visits count: a node evaluated twice counts twice.
- A prior that is the step's own probability is so again. Where several tokenisations of one text were merged, the tree
  keeps the tokens of the first only, and the prior changes as that one's probability does.
- A target is computed anew only where our rule gives the stored one from the stored columns, so that targets that came
  about otherwise (a strategy of a user's own) are left alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mcts.policy import set_targets
from mcts.tree import NO_PARENT, ROOT, Tree
from mcts.types import Float32
from selfplay import checkpoint as checkpoints
from selfplay import heartbeat
from selfplay.errors import UserError
from selfplay.forward import check_logits, check_tree_mask, fit, scores
from selfplay.items import depth_first, from_tree
from selfplay.objectives.base import Models
from selfplay.packing import Item, PackingError
from selfplay.run_folder import RunFolder
from selfplay.shards import ShardError, iter_rows, iter_traces, list_shards, read_metadata, shard_key, write_pending
from selfplay.side_rows import KIND, SIDE_SCHEMA, side_path
from selfplay.store import Store, guard, local_copy
from selfplay.traces import Trace
from selfplay.tree_rows import Row, float32s, tree_of

log = logging.getLogger(__name__)

SAME = 1e-5
"""Largest difference between a stored target and the one that our rule gives for it to be ours: both are float32."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Newer weights, by version, and how forwards with them are cut."""

    models: Models
    version: int
    weights: str
    """Digest of the checkpoint's weights (`checkpoint.weights_digest`)."""
    threads: int = 1
    """Batches worked on at once; it changes no bit."""

    def rows(self, traces: Sequence[Trace]) -> list[Row]:
        """One side row per trace, in their order; the forwards are a function of the traces and the weights alone."""
        models = self.models
        plans = [self._plan(trace) for trace in traces]
        items = [plan for plan in plans if isinstance(plan, Item)]
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # sums in one order, whatever the machine
        try:
            found = iter(
                scores(models.policy, items, tokens=models.tokens, tree_mask=models.tree_mask, threads=self.threads)
            )
        finally:
            torch.set_num_threads(before)
        rows = []
        for trace, plan in zip(traces, plans, strict=True):
            logprobs, values = next(found) if isinstance(plan, Item) else _NOTHING
            error = plan if isinstance(plan, str) else None
            rows.append(
                {
                    "trace_id": trace.trace_id,
                    "policy_version": self.version,
                    "value_version": None if models.policy.head is None else self.version,
                    "error": error,
                    "nodes": None if error is not None else side_nodes(trace, logprobs, values),
                }
            )
        return rows

    def _plan(self, trace: Trace) -> Item | str | None:
        """The item to be scored, why there can be none, or None where there is nothing to score."""
        tree = trace.tree
        if len(tree) == 1 and math.isnan(tree.raw_value[ROOT]):
            return None
        labels = np.where(np.isnan(tree.raw_value), np.nan, 0.0).astype(np.float32)
        models = self.models
        try:
            item = from_tree(tree, values=labels, sampled=True)
            assert item is not None  # every node counts
            [fitted] = fit([item], models.max_length, row_length=models.row_length, tree_mask=models.tree_mask)
        except PackingError as error:
            return str(error)
        return fitted


_NOTHING = (np.zeros(0, np.float32), np.zeros(0, np.float32))


def side_nodes(trace: Trace, logprobs: Float32, values: Float32) -> list[Row]:
    """The nodes of a side row: log-probabilities of all drawn tokens and values of all nodes that have one in the
    shard (or none at all, without a value head), both in depth-first order."""
    old, new = trace.tree, tree_of(trace.nodes)
    own = _per_node(old, logprobs)
    known = ~np.isnan(old.raw_value)
    if len(values):
        at = [node for node in depth_first(old, np.ones(len(old), dtype=np.bool_)) if known[node]]
        for node, value in zip(at, values.tolist(), strict=True):
            new.raw_value[node] = value
    settings = trace.settings
    if _name(settings, "value") == "head":
        back_up(old, new)
    if settings.get("prior_rule") == "exact":
        _weigh(old, new, own)
    retarget(old, new, settings)
    prior, value, target = float32s(new.prior), float32s(new.raw_value), float32s(new.target)
    return [
        {
            "logprobs": None if fresh is None else float32s(fresh),
            "raw_value": value[node] if len(values) else None,
            "prior": prior[node],
            "value_sum": new.value_sum[node],
            "target": target[node],
        }
        for node, fresh in enumerate(own)
    ]


def _per_node(tree: Tree, logprobs: Float32) -> list[Float32 | None]:
    """The log-probabilities of each node's tokens; None at the prompt."""
    own: list[Float32 | None] = [None] * len(tree)
    at = 0
    for node in depth_first(tree, np.ones(len(tree), dtype=np.bool_)):
        step = tree.steps[node]
        if step is not None:
            own[node] = logprobs[at : at + len(step.token_ids)]
            at += len(step.token_ids)
    return own


def back_up(old: Tree, new: Tree) -> None:
    """Fill `new.value_sum` with what the evaluations of `old` add up to under the values of `new`."""
    for node in range(len(old) - 1, -1, -1):
        below = old.children[node]
        evaluations = old.visits[node] - sum(old.visits[c] for c in below)
        own = old.value_sum[node] - sum(old.value_sum[c] for c in below)
        if evaluations and math.isnan(old.reward[node]):
            then = _estimate(old, node)
            if abs(own - evaluations * then) <= SAME * evaluations:  # else it was not the head's value
                own = evaluations * _estimate(new, node)
        new.value_sum[node] = own + sum(new.value_sum[c] for c in below)


def _estimate(tree: Tree, node: int) -> float:
    """The head's value of a node without reward; a finished answer without verdict has that of the step before, as in
    `SearchContext.value`."""
    while math.isnan(tree.raw_value[node]) and tree.terminal[node] and tree.parent[node] != NO_PARENT:
        node = tree.parent[node]
    return tree.raw_value[node]


def _weigh(old: Tree, new: Tree, own: Sequence[Float32 | None]) -> None:
    """Priors under the rule `exact`: the step's own probability."""
    for node, step in enumerate(old.steps):
        fresh = own[node]
        if step is None or fresh is None or math.isnan(old.prior[node]) or np.isnan(step.logprobs).any():
            continue
        before, now = (min(0.0, sum(logprobs.tolist())) for logprobs in (step.logprobs, fresh))
        prior = old.prior[node]
        alone = prior == 0.0 or abs(math.log(prior) - before) < SAME  # 0: too small for its width
        new.prior[node] = math.exp(now if alone else min(0.0, math.log(prior) + now - before))


def retarget(old: Tree, new: Tree, settings: Mapping[str, Any]) -> None:
    """Fill `new.target` by the rule of the trace's settings; NaN throughout where the stored targets are not its."""
    strategy = settings.get("strategy")
    given = strategy if isinstance(strategy, Mapping) else {}
    scale = {name: float(given[name]) for name in ("c_visit", "c_scale") if name in given}
    stored = old.target
    old.target = [math.nan] * len(old)
    set_targets(old, **scale)
    ours = np.allclose(old.target, stored, rtol=0.0, atol=SAME, equal_nan=True)
    old.target = stored
    new.target = [math.nan] * len(new)
    if ours:
        set_targets(new, **scale)


def _name(settings: Mapping[str, Any], section: str) -> str | None:
    found = settings.get(section)
    return found.get("name") if isinstance(found, Mapping) else None


def rescore(store: Store, shard: Path, scorer: Scorer) -> bool:
    """Make the side file of a committed shard of a run by the scorer's weights; False where it was there already.

    Two processes may do so at once: one of them commits. Raises ShardError for a damaged shard or side file, and for a
    side file of this version by other weights; RunError where the run cannot be written.
    """
    final = side_path(shard, scorer.version)
    name = final.relative_to(store.root).as_posix()
    made = False
    if not store.pull(name).exists():
        told = read_metadata(shard)
        rows = scorer.rows(list(iter_traces(shard)))
        failed = [row["error"] for row in rows if row["error"] is not None]
        if failed:
            log.warning("%s: %d of %d traces could not be scored again: %s", shard, len(failed), len(rows), failed[0])
        metadata = {key: told[key] for key in ("run_id", "config_hash")}
        metadata |= {"kind": KIND, "version": str(scorer.version), "weights": scorer.weights}
        scratch = store.scratch(name)
        with guard(store):
            write_pending(scratch, rows, metadata, columns=SIDE_SCHEMA, make_folder=False)
        made = store.commit(store.offer(scratch), name)
    if read_metadata(store.pull(name)).get("weights") != scorer.weights:
        raise ShardError(f"{final} was made with other weights than those of checkpoint {scorer.version}; delete it")
    return made


def fresh_traces(store: Store, shards: Sequence[Path], scorer: Scorer) -> Iterator[Trace]:
    """The traces of `shards`; those that other weights played are scored again first, shard by shard."""
    for shard in shards:
        traces = list(iter_traces(shard))
        if all(trace.policy_version == scorer.version for trace in traces):
            yield from traces
        else:
            rescore(store, shard, scorer)
            yield from iter_traces(shard, reanalysed=scorer.version)


@dataclass(frozen=True, slots=True)
class Report:
    """What `reanalyse_run` did."""

    version: int
    shards: int
    """With a side file by that version now."""
    made: int
    """Of them, made by this call."""
    newer: int
    """Left out: newer weights had played them."""
    seconds: float


Progress = Callable[[int, int], None]
"""Called with the shards done and their number."""


def reanalyse_path(
    path: Path | str, *, checkpoint: int | None = None, last: int | None = None, progress: Progress | None = None
) -> Report:
    """`reanalyse_run` on a run that no driver holds, in a folder or at a URL; what its last driver said of itself is
    said again."""
    home = local_copy(path, heartbeat.FILE) / heartbeat.FILE
    told = heartbeat.parse(home.read_text(encoding="utf-8") if home.exists() else None)
    run = RunFolder.open(path)
    try:
        return reanalyse_run(run, checkpoint=checkpoint, last=last, progress=progress)
    finally:
        state = told.pop("state", "interrupted")
        run.heartbeat(**{name: fact for name, fact in told.items() if name not in heartbeat.OWN})
        run.close("interrupted" if state == "running" else state)


def reanalyse_run(
    run: RunFolder,
    *,
    checkpoint: int | None = None,
    last: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Score a run's committed shards again with the weights of a checkpoint, the newest by default; those of the `last`
    iterations only, where given, and none that newer weights played. Raises UserError, ShardError, CheckpointError,
    RunError."""
    began = time.perf_counter()
    config = run.config
    for name in ("checkpoints", "traces"):
        run.store.pull(name)
    version = checkpoints.latest(run.checkpoints) if checkpoint is None else checkpoint
    if version is None:
        raise UserError(f"{run.path} has no checkpoint yet; `selfplay resume` it first")
    if version not in (kept := checkpoints.existing(run.checkpoints)):
        raise UserError(f"{run.path} has no checkpoint {version}; it keeps {', '.join(map(str, kept))}")
    shards = list_shards(run.path)
    if last is not None and shards:
        newest = shard_key(shards[-1])[0]
        shards = list_shards(run.path, first=newest - last + 1)
    found, shards = len(shards), [shard for shard in shards if not _is_newer(shard, version)]
    folder = checkpoints.path_of(run.checkpoints, version)
    model = config.model
    policy, _, _ = checkpoints.load(folder, device=model.device, dtype=model.dtype, attn=model.attention, merge=False)
    policy.model.eval()
    check_logits(policy)
    longest = config.engine.max_context
    models = Models(
        policy,
        None,
        config.learn.batch_tokens,
        longest,
        int(policy.model.config.hidden_size),
        tree_mask=check_tree_mask(policy, max_length=longest),
    )
    threads = config.cluster.learner_threads if policy.device.type == "cpu" else 1
    scorer = Scorer(models, version, checkpoints.weights_digest(folder), threads)
    made = 0
    for done, shard in enumerate(shards, start=1):
        made += rescore(run.store, shard, scorer)
        if progress is not None:
            progress(done, len(shards))
    return Report(version, len(shards), made, found - len(shards), time.perf_counter() - began)


def _is_newer(shard: Path, version: int) -> bool:
    """Whether newer weights than this version played a shard; an iteration is played by an older one."""
    if shard_key(shard)[0] <= version + 1:
        return False
    return any(row["policy_version"] > version for row in iter_rows(shard, columns=["policy_version"]))
