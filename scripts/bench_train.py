"""Useful training tokens per second of whole trees against the same trees path by path, at equal gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch
from bench_learner import SHAPES, tree_of
from bench_play import episodes, mcts_search, run_searches
from bench_rows import Row
from bench_subject import Subject

from mcts.engines.model import Policy
from selfplay.config import SearchConfig
from selfplay.cutting import split_paths
from selfplay.forward import batches, check_kernels, fit, forward
from selfplay.items import ValueRule, from_tree, policy_groups, value_labels, winners
from selfplay.objectives.loss import Coefficients, Totals, composite_loss
from selfplay.packing import NO_TOKEN, Item, pack

LOSS = Coefficients(policy=1.0, nll=1.0, value=0.5)
LONGEST = 4096
"""Tokens of a row; a learner takes the engine's longest context."""


def items_of(subject: Subject, clock: Callable[[], float], search: SearchConfig, searches: int) -> list[Item]:
    """The training items of real search trees."""
    engine = subject.engine(clock)
    results = run_searches(subject, engine, search, subject.problems(searches))
    found = [
        from_tree(
            result.tree,
            wins=winners(result.tree),
            groups=policy_groups(result.tree),
            values=value_labels(result.tree, ValueRule.MEAN),
        )
        for result in results
    ]
    return [item for item in found if item is not None]


def train(
    policy: Policy, items: Sequence[Item], tokens: int, *, low: bool, kernels: bool = False, tree_mask: bool = True
) -> None:
    """Forward and backward over all items in batches of `tokens` tokens; gradients add up in the model."""
    totals = Totals.of(items)
    for batch in batches(items, tokens):
        packed = pack([items[i] for i in batch], share_rows=tree_mask)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            outputs = forward(policy, packed, tree_mask=tree_mask, kernels=kernels)
        loss, _ = composite_loss(outputs, packed, totals, LOSS)
        torch.autograd.backward(loss)


def gradient(policy: Policy, work: Callable[[], None]) -> torch.Tensor:
    policy.model.zero_grad()
    work()
    found = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    policy.model.zero_grad()
    return found


def measure(name: str, subject: Subject, clock: Callable[[], float], *, searches: int, rounds: int) -> list[Row]:
    """Trees of searches that stop at the first win, and of whole episodes, which are larger."""
    kinds = {"first win": mcts_search(subject.config), "episodes": episodes(subject.config)}
    return [
        _measure(f"tree training, {name}, {kind}", subject, items_of(subject, clock, search, searches), clock, rounds)
        for kind, search in kinds.items()
    ]


def measure_shape(shape: str, subject: Subject, clock: Callable[[], float], *, trees: int, rounds: int) -> Row:
    """Trees of random tokens in one of `bench_learner`'s shapes: the model's speed depends on the shape alone."""
    rng = np.random.default_rng(0)
    words = len(subject.task.vocabulary())
    drawn = [tree_of(rng, **SHAPES[shape], words=words) for _ in range(trees)]
    found = [
        from_tree(tree, wins=winners(tree), groups=policy_groups(tree), values=value_labels(tree, ValueRule.MEAN))
        for tree in drawn
    ]
    items = [item for item in found if item is not None]
    name = f"tree training, {shape}'s shape, {subject.parameters / 1e6:.1f}M parameters"
    return _measure(name, subject, items, clock, rounds)


def _measure(name: str, subject: Subject, trees: list[Item], clock: Callable[[], float], rounds: int) -> Row:
    """Trees as the config's learner trains them, against the faster of two ways to train their paths: packed like
    the trees, or one row per path under the model's own causal mask."""
    useful, paths = sum(map(len, trees)), [split_paths(item) for item in trees]
    policy = subject.policy(subject.config.model.attention)
    learn = subject.config.learn
    low, tokens = learn.precision != "float32", learn.batch_tokens
    kernels = not low and check_kernels(policy)
    trees = fit(trees, LONGEST, row_length=int(policy.model.config.hidden_size))
    exact = gradient(policy, lambda: train(policy, trees, tokens, low=False))
    by_path = gradient(policy, lambda: train(policy, paths, tokens, low=False))
    by_row = gradient(policy, lambda: train(policy, paths, tokens, low=False, tree_mask=False))
    ways: dict[str, Callable[[], None]] = {
        "trees": lambda: train(policy, trees, tokens, low=low, kernels=kernels),
        "paths, packed": lambda: train(policy, paths, tokens, low=low, kernels=kernels),
        "paths, a row each": lambda: train(policy, paths, tokens, low=low, tree_mask=False),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, work in ways.items():
            began = clock()
            work()
            if turn:  # the first turn warms up
                seconds[way].append(clock() - began)
    rates = {way: useful / median(spent) for way, spent in seconds.items()}
    baseline = max(list(rates)[1:], key=lambda way: rates[way])
    norm = exact.norm()
    return Row(
        name,
        rates["trees"],
        rates[baseline],
        "useful tokens/s",
        baseline,
        at_least=2.0,
        details={
            "trees": len(trees),
            "useful_tokens": useful,
            "path_tokens": sum(map(len, paths)),
            "tokens_saved": sum(map(len, paths)) / useful,
            "tokens_per_tree": useful / len(trees),
            "leaves_per_tree": float(np.mean([(item.parent_token == NO_TOKEN).sum() for item in paths])),
            "rates": rates,
            "precision": learn.precision,
            "kernels": kernels,
            "gradient_difference": max(float((g - exact).norm() / norm) for g in (by_path, by_row)),
        },
    )
