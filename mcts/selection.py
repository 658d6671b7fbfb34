"""Pure functions over one node's children: which to visit, which to play, what the policy should learn.

One player, values in [0, 1], no sign flip. A child may be in flight: under virtual loss each simulation under
way counts as a visit that brought 0. Functions take plain lists: at the two to thirty children that a node of
a reasoning tree has, they beat numpy several times over.

PUCT: Silver et al. 2018 (AlphaZero). First-play urgency: KataGo, arXiv 1902.10565. Gumbel search, completed Q
and sequential halving: Danihelka et al., ICLR 2022, in the form of google-deepmind/mctx.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

Number = TypeVar("Number", int, float)
Lookup = Sequence[Number] | Mapping[int, Number]
"""A column of a tree, or the same for a few nodes only."""

C_BASE = 19652.0
UNSEEN = -1
"""The arm "a step not yet drawn" where an arm is named by its position among the children."""


def exploration(visits: int, c_init: float = 1.25, c_base: float = C_BASE) -> float:
    """AlphaZero's slowly growing exploration rate c(s) of a node with this many visits."""
    return math.log((1.0 + visits + c_base) / c_base) + c_init


def first_play_value(parent_q: float, visited_mass: float, reduction: float) -> float:
    """Value of an arm that was never tried: the parent's running mean minus reduction * sqrt(visited policy
    mass), not below 0."""
    return max(0.0, parent_q - reduction * math.sqrt(visited_mass))


def puct_scores(
    arms: Sequence[int],
    prior: Lookup[float],
    visits: Sequence[int],
    value_sum: Sequence[float],
    in_flight: Sequence[int],
    *,
    parent_q: float,
    c_init: float = 1.25,
    c_base: float = C_BASE,
    fpu_reduction: float = 0.2,
    unseen: float = 0.0,
    unseen_tries: int = 0,
) -> list[float]:
    """Q + c * P * sqrt(sum N) / (1 + N) for each arm, N with what is in flight, c = `exploration(sum N)`.
    Where nothing was visited yet the square root counts as 1, so that priors decide.

    `arms` are positions in the columns `prior`, `visits`, `value_sum`, `in_flight` (a tree's own, for speed).
    `parent_q`: the node's running mean, in [0, 1]. With `unseen` > 0 one more score follows, that of the arm
    "a step not yet drawn": prior `unseen`, tried in vain `unseen_tries` times in a row, valued by first-play
    urgency.
    """
    total = 0
    visited = 0.0
    for arm in arms:
        n = visits[arm]
        if n:
            visited += prior[arm]
        total += n + in_flight[arm]
    bonus = exploration(total, c_init, c_base) * math.sqrt(total or 1)
    urgency = -1.0  # computed where it is needed
    scores = []
    for arm in arms:
        n = visits[arm]
        count = n + in_flight[arm]
        if n:
            q = value_sum[arm] / count
        else:
            if urgency < 0.0:
                urgency = first_play_value(parent_q, min(1.0, visited), fpu_reduction)
            q = urgency / (1 + count)
        scores.append(q + bonus * prior[arm] / (1 + count))
    if unseen > 0.0:
        urgency = first_play_value(parent_q, min(1.0, visited), fpu_reduction)
        scores.append(urgency + bonus * unseen / (1 + unseen_tries))
    return scores


def uct_scores(
    visits: Sequence[int], value_sums: Sequence[float], in_flight: Sequence[int], *, c: float = math.sqrt(2.0)
) -> list[float]:
    """Q + c * sqrt(ln(sum N) / N) for each arm, N with what is in flight; infinite for an untried arm."""
    log_total = math.log(max(1, sum(visits) + sum(in_flight)))
    scores = []
    for n, value_sum, flying in zip(visits, value_sums, in_flight, strict=True):
        count = n + flying
        scores.append(value_sum / count + c * math.sqrt(log_total / count) if count else math.inf)
    return scores


def argmax(scores: Sequence[float]) -> int:
    """Position of the largest score; the first of equals. At least one score."""
    best, best_score = 0, scores[0]
    for index, score in enumerate(scores):
        if score > best_score:
            best, best_score = index, score
    return best


def dirichlet(rng: np.random.Generator, arms: int, alpha: float | None = None) -> list[float]:
    """Root noise over `arms` arms, summing to 1; alpha None: 10 / arms."""
    gammas = rng.standard_gamma(alpha if alpha is not None else 10.0 / arms, size=arms)
    total = float(gammas.sum())
    if total <= 0.0:  # every gamma underflowed (a tiny alpha): the limit is one arm at random
        only = int(rng.integers(arms))
        return [float(index == only) for index in range(arms)]
    return [float(g) / total for g in gammas]


def add_noise(priors: Sequence[float], noise: Sequence[float], fraction: float) -> list[float]:
    """(1 - fraction) * prior + fraction * noise for each arm."""
    return [(1.0 - fraction) * p + fraction * x for p, x in zip(priors, noise, strict=True)]


def gumbel_top(rng: np.random.Generator, logits: Sequence[float], m: int) -> tuple[list[int], list[float]]:
    """The min(m, arms) arms of largest g + logit (a draw without replacement), best first, and every arm's
    Gumbel noise g."""
    noise = [float(g) for g in rng.gumbel(size=len(logits))]
    order = sorted(range(len(logits)), key=lambda a: -(noise[a] + logits[a]))
    return order[:m], noise


def considered_visits(m: int, n: int) -> list[int]:
    """Sequential halving of `n` simulations over `m` arms, int [n]: the t-th simulation goes to the best arm
    among those that had exactly this many visits. Phases halve the arms (never below two) and give each
    max(1, n // (ceil(log2 m) * arms)) visits; the sequence is cut at n. Example: m=4, n=16 gives
    0000 1111 22 33 44 55."""
    if m < 1 or n < 0:
        raise ValueError(f"sequential halving needs an arm and no negative simulations, not m={m}, n={n}")
    if m == 1:
        return list(range(n))
    phases = math.ceil(math.log2(m))
    visits = [0] * m
    sequence: list[int] = []
    arms = m
    while len(sequence) < n:
        for _ in range(max(1, n // (phases * arms))):
            sequence.extend(visits[:arms])
            for arm in range(arms):
                visits[arm] += 1
        arms = max(2, arms // 2)
    return sequence[:n]


def sigma(q: float, most_visits: int, *, c_visit: float = 50.0, c_scale: float = 0.1) -> float:
    """The monotone transform that puts a value on the scale of logits. Values are in [0, 1] already and are
    not rescaled per node: then the guarantee of policy improvement holds and is not only empirical."""
    return (c_visit + most_visits) * c_scale * q


def mixed_value(own: float, priors: Sequence[float], visits: Sequence[int], q: Sequence[float]) -> float:
    """v_mix: the value that completes Q for arms without a visit, from the node's own estimate and its visited
    children's prior-weighted mean. `own` where no child was visited."""
    total = sum(visits)
    if not total:
        return own
    mass = weighted = 0.0
    for prior, n, value in zip(priors, visits, q, strict=True):
        if n:
            mass += prior
            weighted += prior * value
    if mass <= 0.0:  # all visited priors underflowed: their plain mean
        seen = [value for n, value in zip(visits, q, strict=True) if n]
        mass, weighted = float(len(seen)), sum(seen)
    return (own + total * weighted / mass) / (1 + total)


def improved_policy(
    priors: Sequence[float],
    completed_q: Sequence[float],
    most_visits: int,
    *,
    c_visit: float = 50.0,
    c_scale: float = 0.1,
) -> list[float]:
    """softmax(log prior + sigma(completed Q)), summing to 1. Priors need not be normalised. Where all priors
    are 0 (underflow) they count as equal."""
    scale = (c_visit + most_visits) * c_scale
    largest = max(completed_q)
    weights = [p * math.exp(scale * (q - largest)) for p, q in zip(priors, completed_q, strict=True)]
    total = sum(weights)
    if total <= 0.0:
        weights = [math.exp(scale * (q - largest)) for q in completed_q]
        total = sum(weights)
    return [w / total for w in weights]


def visit_policy(visits: Sequence[int], temperature: float = 1.0) -> list[float]:
    """N^(1/temperature), normalised. Temperature 0: all on the most visited, the first of equals."""
    if temperature == 0.0:
        best = argmax([float(n) for n in visits])
        return [float(index == best) for index in range(len(visits))]
    most = max(visits)
    if most == 0:
        return [1.0 / len(visits)] * len(visits)
    weights = [(n / most) ** (1.0 / temperature) for n in visits]
    total = sum(weights)
    return [w / total for w in weights]


def draw(rng: np.random.Generator, probabilities: Sequence[float]) -> int:
    """A position drawn with these probabilities (which sum to 1)."""
    point = float(rng.random()) * sum(probabilities)
    for index, probability in enumerate(probabilities):
        point -= probability
        if point < 0.0:
            return index
    return max(index for index, probability in enumerate(probabilities) if probability > 0.0)
