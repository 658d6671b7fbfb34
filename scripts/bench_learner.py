"""How much faster a tree trains as one packed sequence than path by path, at equal gradients.

    python scripts/bench_learner.py [--threads 1] [--rounds 10] [--width 96] [--layers 3]

Prints one JSON line. Trees are random with the shape of Countdown searches; useful tokens are those of the trees, each
once. `tree` against `paths`: both run the same kernels, in batches of the same size; `paths_plain` runs the model's own
layers, as a trainer without tree support would. The ways take turns; times are process CPU time, the best and the
median round are given, `speedup` is that of the medians. `chains` is plain training on chains of 24 tokens, 16 of them
with loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from mcts.engines.model import Policy, load_policy
from mcts.engines.value_head import ValueHead
from mcts.tree import Tree
from mcts.types import Status, Step, Stop, Verdict
from selfplay.cutting import split_paths
from selfplay.forward import batches, check_kernels, fit, forward
from selfplay.fresh import build_fresh_model
from selfplay.items import ValueRule, from_tree, policy_groups, value_labels
from selfplay.objectives.loss import Coefficients, Totals, composite_loss
from selfplay.packing import Item, chain, pack

WORDS = 428
LOSS = Coefficients(policy=1.0, nll=1.0, value=0.5)
SHAPES = {
    "countdown3": {"prompt": 7, "tokens": 8, "nodes": 24, "depth": 2, "width": 6},
    "countdown4": {"prompt": 8, "tokens": 9, "nodes": 48, "depth": 3, "width": 5},
    "countdown5": {"prompt": 9, "tokens": 10, "nodes": 96, "depth": 4, "width": 4},
    "gsm8k": {"prompt": 64, "tokens": 24, "nodes": 32, "depth": 5, "width": 3},
}
"""In tokens and nodes. GSM8K: a question of 64 tokens without examples, five lines of 24 tokens as an answer."""


def tree_of(
    rng: np.random.Generator, *, prompt: int, tokens: int, nodes: int, depth: int, width: int, words: int = WORDS
) -> Tree:
    """A search tree with `nodes` steps of `tokens` tokens, at most `width` below a node, leaves at `depth`."""
    tree = Tree(rng.integers(2, words, prompt).astype(np.int32))
    while len(tree) <= nodes:
        node = 0  # a simulation: down at random to an open place
        while len(tree.children[node]) >= width or (tree.children[node] and rng.random() < 0.5):
            node = int(rng.choice(tree.children[node]))
            if tree.depth[node] == depth - 1 and len(tree.children[node]) >= width:
                break
        if len(tree.children[node]) < width and tree.depth[node] < depth:
            ids = rng.integers(2, words, tokens).astype(np.int32)
            child = tree.add(node, Step("", ids, np.full(tokens, -1.0, np.float32), Stop.DELIMITER), prior=0.1)
            tree.backup(child, float(rng.random()))
    for node in range(1, len(tree)):
        if tree.depth[node] == depth:
            won = rng.random() < 0.2
            tree.close(node, Verdict(Status.CORRECT if won else Status.WRONG, float(won)))
    for children in tree.children:
        if len(children) > 1:
            for child, share in zip(children, rng.dirichlet(np.ones(len(children))), strict=True):
                tree.target[child] = float(share)
    return tree


def train(policy: Policy, items: Sequence[Item], tokens: int, *, kernels: bool) -> None:
    totals = Totals.of(items)
    for batch in batches(items, tokens):
        packed = pack([items[i] for i in batch])
        loss, _ = composite_loss(forward(policy, packed, kernels=kernels), packed, totals, LOSS)
        torch.autograd.backward(loss)


def gradient(policy: Policy, items: Sequence[Item], tokens: int, *, kernels: bool) -> torch.Tensor:
    policy.model.zero_grad()
    train(policy, items, tokens, kernels=kernels)
    found = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    policy.model.zero_grad()
    return found


def rates(ways: dict[str, Callable[[], None]], useful: int, rounds: int) -> dict[str, dict[str, float]]:
    """Useful tokens per second of process CPU time, the ways taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            seconds[name].append(time.process_time() - began)
    return {
        name: {"best": round(useful / min(times)), "median": round(useful / statistics.median(times))}
        for name, times in seconds.items()
    }


def measure(policy: Policy, whole: list[Item], rounds: int, tokens: int, *, kernels: bool) -> dict[str, Any]:
    paths = [split_paths(item) for item in whole]
    trees = fit(whole, 4096, row_length=policy.model.config.hidden_size)
    ours, theirs = (gradient(policy, items, tokens, kernels=kernels) for items in (trees, paths))
    useful = sum(len(item) for item in whole)
    ways = {
        "tree": lambda: train(policy, trees, tokens, kernels=kernels),
        "paths": lambda: train(policy, paths, tokens, kernels=kernels),
        "paths_plain": lambda: train(policy, paths, tokens, kernels=False),
    }
    speed = rates(ways, useful, rounds)
    return {
        "tokens": useful,
        "tree_tokens": sum(len(item) for item in trees),
        "path_tokens": sum(len(item) for item in paths),
        "gradient_difference": float((ours - theirs).norm() / theirs.norm()),
        **speed,
        "speedup": round(speed["tree"]["median"] / speed["paths"]["median"], 2),
        "speedup_over_plain": round(speed["tree"]["median"] / speed["paths_plain"]["median"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("threads", 1), ("rounds", 10), ("width", 96), ("layers", 3), ("trees", 24), ("tokens", 1536)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        build_fresh_model(
            path, [f"w{i}" for i in range(WORDS)], {"width": arguments.width, "layers": arguments.layers}, 0
        )
        policy = load_policy(path)
    policy.head = ValueHead(arguments.width)
    kernels = check_kernels(policy)
    result: dict[str, Any] = {
        "bench": "learner",
        "threads": arguments.threads,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "kernels": kernels,
    }
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        trees = [tree_of(rng, **shape) for _ in range(arguments.trees)]
        items = [from_tree(t, wins=(), groups=policy_groups(t), values=value_labels(t, ValueRule.MEAN)) for t in trees]
        known = [item for item in items if item is not None]
        result[name] = measure(policy, known, arguments.rounds, arguments.tokens, kernels=kernels)
    weight = np.ones(24)
    weight[:8] = 0.0
    chains = [
        chain(rng.integers(2, WORDS, 24), nll_weight=weight, value_token=[7, 15, 23], value_label=[1.0, 1.0, 0.0])
        for _ in range(256)
    ]
    ways = {"chains": lambda: train(policy, chains, arguments.tokens, kernels=kernels)}
    if kernels:
        ways["chains_without_kernels"] = lambda: train(policy, chains, arguments.tokens, kernels=False)
    result |= rates(ways, 24 * len(chains), arguments.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
