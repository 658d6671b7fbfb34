"""What a tree, or a worked example, teaches: the annotations that make it a training item."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mcts.engines.prompt_ids import chat_ids
from mcts.tasks.base import Example
from mcts.tree import NO_PARENT, ROOT, Tree
from mcts.types import Float32, Int32, Kind, Message, Status, Step
from selfplay.packing import NO_TOKEN, Item, PackingError, Ratios, chain

Encode = Callable[[str | Sequence[Message]], Int32]
"""A prompt as the engine sends it: token ids int32 [P]."""


class RatioRun(NamedTuple):
    """A step whose likelihood an importance ratio weighs (`packing.Ratios`)."""

    node: int
    unit: int
    """Its ratio, counted from 0; runs are in ascending order of it."""
    behavior: float
    """Nats of its tokens together, when they were drawn."""
    weight: float


class ValueRule(StrEnum):
    """Where a node's value label comes from. Nodes without the evidence carry none."""

    OUTCOME = "outcome"
    """Reward of the chosen answer, on the nodes of its path (AlphaZero's z)."""
    MEAN = "mean"
    """Mean reward of the finished chains below, each counted as often as it was drawn."""
    MAX = "max"
    """Best reward below: 1 where a verified win hangs below."""


def decided(tree: Tree, node: int) -> bool:
    """Whether `node` is terminal with a verdict that says something of the answer: TIMEOUT and ERROR do not."""
    verdict = tree.verdict[node]
    return verdict is not None and verdict.status not in (Status.TIMEOUT, Status.ERROR)


def winners(tree: Tree) -> list[int]:
    """Terminal nodes with a verified win, in order of creation."""
    return [n for n, verdict in enumerate(tree.verdict) if verdict is not None and verdict.won]


def value_labels(tree: Tree, rule: ValueRule, *, path: Sequence[int] = (), mix: float = 0.0) -> Float32:
    """Value labels, float32 [N] in [0, 1], NaN where there is none.

    `path` is the chosen path (used by `outcome`), `mix` the share of the search's own mean value Q at visited
    nodes; a node without evidence from `rule` stays unlabelled whatever its Q.
    """
    if not 0.0 <= mix <= 1.0:
        raise ValueError(f"the share of Q in value labels must lie in [0, 1], not {mix}")
    size = len(tree)
    labels = np.full(size, np.nan)
    if rule is ValueRule.OUTCOME:
        if path and decided(tree, path[-1]):
            labels[list(path)] = tree.reward[path[-1]]
    else:
        weight, total = np.zeros(size), np.zeros(size)
        best = np.full(size, -math.inf)
        for node in range(size - 1, -1, -1):
            if decided(tree, node):
                weight[node] += tree.draws[node]
                total[node] += tree.draws[node] * tree.reward[node]
                best[node] = max(best[node], tree.reward[node])
            parent = tree.parent[node]
            if parent != NO_PARENT:
                weight[parent] += weight[node]
                total[parent] += total[node]
                best[parent] = max(best[parent], best[node])
        known = weight > 0
        labels[known] = best[known] if rule is ValueRule.MAX else total[known] / weight[known]
    if mix:
        for node in range(size):
            if tree.visits[node] and not math.isnan(labels[node]):
                labels[node] = (1.0 - mix) * labels[node] + mix * tree.q(node)
    return labels.astype(np.float32)


def policy_groups(tree: Tree, prior_rule: str = "exact") -> list[tuple[list[int], Float32]]:
    """(children, target [n]) of every node with a policy target; targets sum to 1 over the drawn siblings.

    A node needs two children with a target that were visited (DESIGN.md, decision 6). Under `draws` a prior is a
    frequency and no probability of the policy, so a target is taken as what it says beyond its prior: it becomes
    p x target / prior with p the recorded probability of the step. Equal values then leave p itself, under either rule.
    """
    groups = []
    for children in tree.children:
        drawn = [c for c in children if tree.kind[c] is Kind.STEP and not math.isnan(tree.target[c])]
        if sum(1 for c in drawn if tree.visits[c]) < 2:
            continue
        target = np.asarray([tree.target[c] for c in drawn], dtype=np.float64)
        if prior_rule == "draws":
            target = _reweighted(tree, drawn, target)
        total = target.sum()
        if total <= 0.0:
            raise PackingError(f"the policy targets of nodes {drawn} sum to {total}; they must be positive")
        groups.append((drawn, (target / total).astype(np.float32)))
    return groups


def _reweighted(tree: Tree, drawn: list[int], target: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    recorded = np.asarray([float(_step(tree, c).logprobs.sum()) for c in drawn])
    prior = np.asarray([tree.prior[c] for c in drawn])
    if not (np.isfinite(recorded).all() and (prior > 0).all()):
        raise PackingError(
            f"nodes {drawn} lack log-probabilities or priors, which targets under the prior rule 'draws' need"
        )
    return target / prior * np.exp(recorded - recorded.max())


def _step(tree: Tree, node: int) -> Step:
    step = tree.steps[node]
    if step is None:
        raise PackingError(f"node {node} has no step")
    return step


def from_tree(
    tree: Tree,
    *,
    wins: Collection[int] = (),
    groups: Sequence[tuple[Sequence[int], Float32]] = (),
    values: Float32 | None = None,
    sampled: bool = False,
    version: int = -1,
    ratios: Sequence[RatioRun] = (),
) -> Item | None:
    """The item of a tree; None where it would carry no loss.

    `wins`: terminal nodes whose paths are imitated; a token shared by several of them weighs as often. `groups`:
    sibling groups as `policy_groups` gives them. `values`: labels [N], NaN for none, read at each node's last token,
    the prompt's included. `sampled`: every drawn token counts for the KL. `ratios`: steps of imitated paths whose
    likelihood is weighed by an importance ratio. Branches that carry no loss are left out.
    Raises PackingError for nodes that were conditioned on other nodes than their ancestors.
    """
    size = len(tree)
    imitated = np.zeros(size, dtype=np.float32)
    for win in wins:
        imitated[tree.path(win)] += 1.0
    imitated[ROOT] = 0.0
    needed = (imitated > 0) | sampled
    for children, _ in groups:
        needed[list(children)] = True
    if values is not None:
        needed |= ~np.isnan(values)
    if not needed.any():
        return None
    for node in range(size - 1, 0, -1):
        if needed[node]:
            needed[tree.parent[node]] = True
    order = depth_first(tree, needed)
    start = np.zeros(size, dtype=np.int32)
    end = np.zeros(size, dtype=np.int32)
    ids, logprobs = [], []
    parents: list[int] = []
    positions: list[int] = []
    at = 0
    for node in order:
        if tree.context[node] is not None:
            raise PackingError(f"node {node} was conditioned on nodes beside its path; such trees cannot be trained on")
        step = tree.steps[node]
        tokens = tree.prompt_ids if step is None else step.token_ids
        count = len(tokens)
        if not count:
            raise PackingError(f"node {node} has no tokens; a prompt and every step need at least one")
        above = NO_TOKEN if node == ROOT else int(end[tree.parent[node]]) - 1
        first = 0 if node == ROOT else positions[above] + 1
        ids.append(tokens)
        parents.extend([above, *range(at, at + count - 1)])
        positions.extend(range(first, first + count))
        logprobs.append(np.full(count, np.nan, dtype=np.float32) if step is None else step.logprobs)
        start[node], end[node] = at, at + count
        at += count
    lengths = [int(end[n] - start[n]) for n in order]
    below = end.copy()
    for node in reversed(order[1:]):
        below[tree.parent[node]] = max(below[tree.parent[node]], below[node])
    members = [c for children, _ in groups for c in children]
    labelled = [] if values is None else [n for n in order if not np.isnan(values[n])]
    drawn = np.full(at, float(sampled), dtype=np.float32)
    drawn[: end[ROOT]] = 0.0
    return Item(
        token_ids=np.concatenate(ids).astype(np.int32),
        parent_token=np.asarray(parents, dtype=np.int32),
        position=np.asarray(positions, dtype=np.int32),
        exits=np.repeat(below[order], lengths),
        nll_weight=np.repeat(imitated[order], lengths),
        sampled=drawn,
        logprobs=np.concatenate(logprobs).astype(np.float32),
        reference=np.full(at, np.nan, dtype=np.float32),
        span_start=start[members],
        span_end=end[members],
        span_group=np.repeat(np.arange(len(groups)), [len(c) for c, _ in groups]).astype(np.int32),
        span_target=np.concatenate([np.zeros(0, dtype=np.float32), *(t for _, t in groups)]).astype(np.float32),
        group_weight=np.ones(len(groups), dtype=np.float32),
        value_token=(end[labelled] - 1).astype(np.int32),
        value_label=np.zeros(0, dtype=np.float32) if values is None else values[labelled].astype(np.float32),
        value_weight=np.ones(len(labelled), dtype=np.float32),
        version=version,
        ratios=_ratios(ratios, start, end),
    )


def _ratios(runs: Sequence[RatioRun], start: Int32, end: Int32) -> Ratios:
    nodes = [run.node for run in runs]
    return Ratios(
        start=start[nodes],
        end=end[nodes],
        unit=np.asarray([run.unit for run in runs], dtype=np.int32),
        behavior=np.asarray([run.behavior for run in runs], dtype=np.float32),
        weight=np.asarray([run.weight for run in runs], dtype=np.float32),
    )


def depth_first(tree: Tree, needed: npt.NDArray[np.bool_]) -> list[int]:
    """The needed nodes [N] in the order in which an item holds their tokens; with a node its ancestors are needed."""
    order: list[int] = []
    waiting = [ROOT]
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting.extend(c for c in reversed(tree.children[node]) if needed[c])
    return order


class ExampleEncoder:
    """Worked examples -> items: steps are encoded one by one, as the policy would have drawn them.

    `encode_prompt` turns a prompt into the ids that the engine would send; without it, texts are encoded plainly and
    messages by the chat template. The ids of recent texts are kept (at most `cache`): warm-up texts repeat a lot.
    `turn_end`: the token that ends a finished example after chat messages; None: the tokenizer's EOS, as after text.
    """

    def __init__(
        self,
        tokenizer: Any,
        encode_prompt: Encode | None = None,
        *,
        cache: int = 20_000,
        turn_end: int | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise PackingError("the tokenizer has no end-of-sequence token; set eos_token to train on worked examples")
        self._tokenizer = tokenizer
        self._encode_prompt = encode_prompt
        self._eos = int(tokenizer.eos_token_id)
        self._turn_end = self._eos if turn_end is None else turn_end
        self._steps: dict[str, list[int]] = {}
        self._prompts: dict[str, list[int]] = {}
        self._cache = cache

    def __call__(self, examples: Sequence[Example]) -> list[Item]:
        """One chain each: loss on the steps (EOS included) where `imitate`, value labels at the last token of the
        prompt and of each step; the last step of a finished example ends with EOS."""
        self._remember(self._steps, [s for e in examples for s in e.steps], special=False)
        if self._encode_prompt is None:
            texts = [e.problem.prompt for e in examples if isinstance(e.problem.prompt, str)]
            self._remember(self._prompts, texts, special=True)
        return [self._item(example) for example in examples]

    def _remember(self, known: dict[str, list[int]], texts: list[str], *, special: bool) -> None:
        fresh = [t for t in dict.fromkeys(texts) if t not in known]
        if len(known) + len(fresh) > self._cache:
            known.clear()
            fresh = list(dict.fromkeys(texts))
        if fresh:
            found = self._tokenizer(fresh, add_special_tokens=special, return_attention_mask=False)["input_ids"]
            known.update(zip(fresh, found, strict=True))

    def _prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        if self._encode_prompt is not None:
            ids: list[int] = self._encode_prompt(prompt).tolist()
            return ids
        if isinstance(prompt, str):
            return self._prompts[prompt]
        return chat_ids(self._tokenizer, prompt)

    def _item(self, example: Example) -> Item:
        if len(example.values) != len(example.steps) + 1:
            raise PackingError(
                f"example {example.problem.id} has {len(example.steps)} steps and {len(example.values)} value labels; "
                "it needs one for the prompt and one per step"
            )
        ids = list(self._prompt(example.problem.prompt))
        prompt = len(ids)
        ends = [prompt - 1]
        for text in example.steps:
            ids += self._steps[text]
            ends.append(len(ids) - 1)
        if example.finished:
            ids.append(self._eos if isinstance(example.problem.prompt, str) else self._turn_end)
            if example.steps:
                ends[-1] += 1
        labelled = [k for k, value in enumerate(example.values) if not math.isnan(value)]
        return chain(
            ids,
            nll_weight=_steps_only(prompt, len(ids)) if example.imitate else None,
            value_token=[ends[k] for k in labelled],
            value_label=[example.values[k] for k in labelled],
        )


@lru_cache(maxsize=4096)
def _steps_only(prompt: int, size: int) -> Float32:
    """Weight 0 on the prompt and 1 after it; shared, hence read-only."""
    weight = np.ones(size, dtype=np.float32)
    weight[:prompt] = 0.0
    weight.flags.writeable = False
    return weight
