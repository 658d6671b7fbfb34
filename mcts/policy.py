"""Distinct next steps with priors, and the policy targets made of them (DESIGN.md, decisions 4 and 6)."""

from __future__ import annotations

import math
from enum import StrEnum

from mcts.selection import improved_policy, mixed_value
from mcts.tree import Tree
from mcts.types import MIN_UNSEEN, Drawn, Kind, Step

__all__ = ["MIN_UNSEEN", "PriorRule", "Proposals", "drawn_step", "set_targets", "step_probability", "unseen_mass"]


class PriorRule(StrEnum):
    """How a step's prior is found: from its own probability, or from how often it was drawn."""

    EXACT = "exact"
    DRAWS = "draws"


def step_probability(step: Step) -> float:
    """Probability of the step's tokens under the policy at temperature 1."""
    return math.exp(min(0.0, sum(step.logprobs.tolist())))


def drawn_step(step: Step) -> Drawn:
    """The step as a request excludes it."""
    rest: list[float] = []
    total = 0.0
    for logprob in reversed(step.logprobs.tolist()):
        total += logprob
        rest.append(math.exp(min(0.0, total)))
    return Drawn(tuple(step.token_ids.tolist()), tuple(reversed(rest)))


def unseen_mass(tree: Tree, node: int) -> float:
    """Under the exact rule: probability that the next step is one not yet drawn at `node`, in [0, 1]."""
    prior, kind = tree.prior, tree.kind
    mass = 1.0
    for child in tree.children[node]:
        if kind[child] is Kind.STEP:
            mass -= prior[child]
    return mass if mass > 0.0 else 0.0


class Proposals:
    """The distinct steps drawn at each node of one tree.

    Two draws are the same step if they have the same text and ended for the same reason. The first one stays in
    the tree with its tokens; a repetition raises `draws`. Under `exact` another tokenisation of the same text
    adds its probability to the prior, once; under `draws` the priors of all siblings become draws / K.
    """

    def __init__(self, tree: Tree, rule: PriorRule) -> None:
        self.tree = tree
        self.rule = rule
        self._by_tokens: dict[tuple[int, bytes], int] = {}
        self._by_text: dict[tuple[int, str, str], int] = {}
        self._draws: dict[int, int] = {}
        self._steps: dict[int, list[Step]] = {}
        """Under `exact` the different token sequences drawn below a node, in order of their first draw."""
        self._drawn: dict[int, list[Drawn]] = {}
        """The same as requests exclude them, as far as they were asked for."""

    def drawn(self, parent: int) -> tuple[Drawn, ...]:
        """Under the exact rule: every token sequence drawn below `parent` so far, in order of its first draw."""
        steps = self._steps.get(parent)
        if steps is None:
            return ()
        known = self._drawn.setdefault(parent, [])
        known += [drawn_step(step) for step in steps[len(known) :]]
        return tuple(known)

    def add(self, parent: int, step: Step) -> tuple[int, bool]:
        """The node of `step` below `parent`, and whether it is new."""
        tree = self.tree
        tokens_key = (parent, step.token_ids.tobytes())
        node = self._by_tokens.get(tokens_key)
        new = False
        if node is None:
            text_key = (parent, step.stop.value, step.text)
            node = self._by_text.get(text_key)
            probability = step_probability(step) if self.rule is PriorRule.EXACT else math.nan
            if node is None:
                node = self._by_text[text_key] = tree.add(parent, step, prior=probability)
                new = True
            elif self.rule is PriorRule.EXACT:
                tree.prior[node] = min(1.0, tree.prior[node] + probability)
            self._by_tokens[tokens_key] = node
            if self.rule is PriorRule.EXACT:
                self._steps.setdefault(parent, []).append(step)
        if not new:
            tree.draws[node] += 1
        if self.rule is PriorRule.DRAWS:
            total = self._draws[parent] = self._draws.get(parent, 0) + 1
            for child in tree.children[parent]:
                if tree.kind[child] is Kind.STEP:
                    tree.prior[child] = tree.draws[child] / total
        return node, new


def set_targets(tree: Tree, *, c_visit: float = 50.0, c_scale: float = 0.1) -> None:
    """Fill `tree.target` at every node with at least two evaluated children: the completed-Q improved policy
    over the drawn children, their priors renormalised over themselves. NaN everywhere else."""
    for node in range(len(tree)):
        children = [c for c in tree.children[node] if tree.kind[c] is Kind.STEP]
        if len(children) < 2:
            continue
        visits = [tree.visits[c] for c in children]
        if sum(1 for n in visits if n) < 2:
            continue
        priors = [tree.prior[c] for c in children]
        q = [tree.q(c) for c in children]
        raw = tree.raw_value[node]
        own = raw if not math.isnan(raw) else tree.q(node)
        filled = mixed_value(own, priors, visits, q)
        completed = [value if n else filled for value, n in zip(q, visits, strict=True)]
        target = improved_policy(priors, completed, max(visits), c_visit=c_visit, c_scale=c_scale)
        for child, probability in zip(children, target, strict=True):
            tree.target[child] = probability
