"""One forward pass over packed items: the log-probabilities and values that losses are made of."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mcts.types import Float32
from selfplay import llama_kernels
from selfplay.cutting import cut, select, split_paths
from selfplay.errors import UserError
from selfplay.packing import Item, Packed, chain, pack

if TYPE_CHECKING:
    from mcts.engines.model import Policy

log = logging.getLogger(__name__)

TREE_TOLERANCE = 1e-3
"""Largest difference in nats between a tree's log-probabilities and its paths' for which the model is trusted."""
LOW_TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.5}
"""The same for models whose weights are in few bits; see `check_tree_mask`."""

PATHS_PER_ROW = 3
"""Shorter rows would mostly hold copies."""


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """What a forward over a `Packed` gives; M predicted tokens, V value labels."""

    logprobs: Tensor  # [M] float32, nats
    value_logits: Tensor | None  # [V] float32; their sigmoid is the value. None: the policy has no value head
    entropy: Tensor | None  # [M] float32, nats, without gradient; None where not asked for


def forward(
    policy: Policy, packed: Packed, *, tree_mask: bool = True, kernels: bool = False, entropy: bool = False
) -> Outputs:
    """Run the policy over a batch on its device; gradients flow as the caller's grad mode says.

    The language-model head is applied to the hidden states that predict something, and to no other. Without
    `tree_mask` the model uses its own causal mask and positions; then every row must be one plain chain. `kernels`:
    by `llama_kernels`, for a model that `check_kernels` approved.
    """
    if (whole := getattr(policy, "whole", None)) is not None:  # a ShardedPolicy
        return Outputs(*whole(packed, tree_mask, entropy))
    if kernels:
        mask = packed.mask(policy.model.dtype)
        hidden = llama_kernels.hidden_states(policy.model, packed.input_ids, packed.position_ids, mask, packed.read)
    else:
        inputs: dict[str, Tensor] = {}
        if tree_mask:
            inputs = {"attention_mask": packed.mask(policy.model.dtype), "position_ids": packed.position_ids}
        every = policy.hidden(packed.input_ids, use_cache=False, **inputs)
        hidden = every.reshape(-1, every.shape[-1]).index_select(0, packed.read)
    logits = policy.unembed(hidden.index_select(0, packed.source)).float()
    logprobs = -F.cross_entropy(logits, packed.labels, reduction="none")
    spread = None
    if entropy:
        with torch.no_grad():
            shares = logits.log_softmax(-1)
            spread = -(shares.exp() * shares).sum(-1)
    values = None
    if policy.head is not None:
        values = policy.head.logits(hidden.index_select(0, packed.value_source)).float()
    return Outputs(logprobs, values, spread)


def batches(items: Sequence[Item], tokens: int) -> Iterator[list[int]]:
    """Indices of the items in batches of at most `tokens` tokens (a larger item stands alone), longest first:
    neighbours in length share a batch, so that little is padded, and batches are of nearly equal size, so that they
    can be worked on side by side. The order does not depend on anything else."""
    order = sorted(range(len(items)), key=lambda i: (-len(items[i]), i))
    total = sum(len(item) for item in items)
    goal = total / max(1, math.ceil(total / tokens))
    batch: list[int] = []
    filled = 0
    for index in order:
        size = len(items[index])
        if batch and (filled + size > tokens or filled + size / 2 > goal):
            yield batch
            batch, filled = [], 0
        batch.append(index)
        filled += size
    if batch:
        yield batch


def fit(items: Sequence[Item], max_length: int, *, row_length: int | None = None, tree_mask: bool = True) -> list[Item]:
    """Items as the model can take them: cut to `max_length` tokens, or one segment per path without a tree mask.

    Trees are cut to `row_length` already where that is at least PATHS_PER_ROW of their longest paths: attention over
    a long row costs more than the copies of a path, and the gradients are the same.
    """
    fitted = []
    for item in items:
        item = item if tree_mask else split_paths(item)
        limit = max_length
        if row_length is not None and len(item) > row_length:
            limit = min(max_length, max(row_length, PATHS_PER_ROW * (int(item.position.max()) + 1)))
        fitted.append(cut(item, limit))
    return fitted


@torch.no_grad()
def token_logprobs(policy: Policy, items: Sequence[Item], *, tokens: int, tree_mask: bool = True) -> list[Float32]:
    """Log-probability of every predicted token, float32 [T] per item, NaN elsewhere. Items must fit (see `fit`)."""
    found = [np.full(len(item), np.nan, dtype=np.float32) for item in items]
    for batch in batches(items, tokens):
        packed = pack([items[i] for i in batch], share_rows=tree_mask).to(policy.device)
        values = forward(policy, packed, tree_mask=tree_mask).logprobs.cpu().numpy()
        for number, index in enumerate(batch):
            here = packed.item_of.cpu().numpy() == number
            found[index][packed.token_of.cpu().numpy()[here]] = values[here]
    return found


def scores(
    policy: Policy, items: Sequence[Item], *, tokens: int, tree_mask: bool = True, threads: int = 1
) -> list[tuple[Float32, Float32]]:
    """Per item the log-probabilities of its predicted tokens (nats) and the values at its labelled ones (none without a
    value head), in the order of the item before it was made to fit: a token's loss stays with its first copy, and the
    copies stand in depth-first order. `threads` batches are worked on at once; it changes no bit."""

    def work(batch: list[int]) -> list[tuple[Float32, Float32]]:
        packed = pack([items[i] for i in batch], share_rows=tree_mask).to(policy.device)
        with torch.no_grad():  # of the thread
            outputs = forward(policy, packed, tree_mask=tree_mask)
        logprobs = outputs.logprobs.cpu().numpy()
        starts = np.searchsorted(packed.item_of.cpu().numpy(), range(1, len(batch)))
        labels = np.cumsum([len(items[i].value_token) for i in batch])[:-1]
        if outputs.value_logits is None:
            values = [np.zeros(0, dtype=np.float32)] * len(batch)
        else:
            values = np.split(outputs.value_logits.sigmoid().cpu().numpy(), labels)
        return list(zip(np.split(logprobs, starts), values, strict=True))

    found: list[tuple[Float32, Float32]] = [(np.zeros(0, np.float32),) * 2] * len(items)
    order = list(batches(items, tokens))
    with ThreadPoolExecutor(threads) as pool:
        for batch, each in zip(order, pool.map(work, order), strict=True):
            for index, pair in zip(batch, each, strict=True):
                found[index] = pair
    return found


def check_tree_mask(policy: Policy, *, max_length: int, seed: int = 0) -> bool:
    """Whether the model computes a tree as it computes the tree's paths; a model that does not is trained per path.

    Compares a small random tree under the tree mask with its paths under the model's own mask. Models with a window
    shorter than `max_length` fail: the tree mask would lift the window. In float16 and bfloat16 the tolerance is
    wide, so the difference must also be less than a quarter of what a model that ignores the tree would show.
    """
    config: Any = policy.model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < max_length:
        log.warning("the model attends over a window of %d tokens: it is trained per path, not per tree", window)
        return False
    rng = np.random.default_rng(seed)
    tree = _random_tree(rng, int(config.vocab_size))
    paths = split_paths(tree)
    try:
        packed = token_logprobs(policy, [tree], tokens=len(tree))[0]
        plain = token_logprobs(policy, [paths], tokens=len(paths), tree_mask=False)[0]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        log.warning("the model takes no tree mask (%s): it is trained per path, not per tree", error)
        return False
    expected = plain[np.isfinite(plain)]
    gap = float(np.abs(packed[np.isfinite(packed)] - expected).max())
    limit = TREE_TOLERANCE
    if policy.model.dtype in LOW_TOLERANCE:
        ignorant = chain(tree.token_ids, nll_weight=tree.nll_weight)
        found = token_logprobs(policy, [ignorant], tokens=len(tree), tree_mask=False)[0]
        limit = min(LOW_TOLERANCE[policy.model.dtype], float(np.abs(found[np.isfinite(found)] - expected).max()) / 4)
    if gap <= limit:
        return True
    log.warning("under a tree mask the model's log-probabilities are off by %.3g nats: it is trained per path", gap)
    return False


@torch.no_grad()
def check_logits(policy: Policy) -> None:
    """Raise UserError unless the model's logits are its output layer's of its last hidden states: all that is learned
    is computed so."""
    ids = torch.arange(4, device=policy.device)[None] % int(policy.model.config.vocab_size)
    expected = policy.model(input_ids=ids, use_cache=False).logits.float()
    gap = float((policy.unembed(policy.hidden(ids, use_cache=False)).float() - expected).abs().max())
    limit = LOW_TOLERANCE.get(policy.model.dtype, TREE_TOLERANCE) * max(1.0, float(expected.abs().max()))
    if not gap <= limit:
        name = type(policy.model).__name__
        raise UserError(
            f"{name} changes its logits in a way that is not known here (off by {gap:.2g}): use another model"
        )


def checkpoint_layers(policy: Policy) -> None:
    """Recompute the model's layers in the backward pass instead of keeping what they computed. Raises UserError where
    the model cannot."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model: Any = policy.model
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no gradient checkpointing: set model.gradient_checkpointing: false"
        )
    # No random numbers are drawn (dropout is off), so none need be drawn again.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # < 5.24
    enable({"use_reentrant": False, "preserve_rng_state": False})
    for layer in layers:
        layer.training = True  # of the layer alone: its parts stay in evaluation mode, without dropout


def check_kernels(policy: Policy, *, seed: int = 0) -> bool:
    """Whether `llama_kernels` computes this model: log-probabilities and gradients of a small random tree agree with
    the model's own. Models of another kind are not tried."""
    if not llama_kernels.supports(policy.model):
        return False
    packed = pack([_random_tree(np.random.default_rng(seed), int(policy.model.config.vocab_size))])
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    found = []
    for kernels in (False, True):
        logprobs = forward(policy, packed, kernels=kernels).logprobs
        found.append([logprobs.detach(), *torch.autograd.grad(logprobs.sum(), parameters, allow_unused=True)])
    for plain, ours in zip(*found, strict=True):
        if plain is None or ours is None:
            agree = plain is ours
        else:
            agree = bool((plain - ours).abs().max() <= TREE_TOLERANCE * plain.abs().max().clamp(min=1e-6))
        if not agree:
            log.warning("the fast kernels do not agree with this model: it is trained with its own, more slowly")
            return False
    return True


def _random_tree(rng: np.random.Generator, vocab: int) -> Item:
    """Four tokens of prompt and three steps of three tokens, twice forked: 4 + 3 x (1 + 2 + 4) tokens."""
    parents = [-1, 0, 1, 2]
    ends = [3]
    starts: list[int] = []

    def grow(above: int, depth: int) -> None:
        at = len(parents)
        starts.append(at)
        parents.extend([above, at, at + 1])
        ends.append(at + 2)
        for _ in range(2 if depth < 2 else 0):
            grow(at + 2, depth + 1)

    grow(3, 0)
    size = len(parents)
    parent = np.asarray(parents, dtype=np.int32)
    position = np.zeros(size, dtype=np.int32)
    for token in range(1, size):
        position[token] = position[parent[token]] + 1
    weight = np.ones(size, dtype=np.float32)
    weight[0] = 0.0
    plain = chain(rng.integers(0, vocab, size), nll_weight=weight)
    order = np.arange(size)
    return replace(select(plain, order, parent, order), position=position)
