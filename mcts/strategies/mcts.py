"""PUCT tree search over reasoning steps, played move by move as AlphaZero does, or from the prompt only."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from mcts.search import Outcome, Replies, SearchContext, Wave
from mcts.selection import C_BASE, UNSEEN, add_noise, argmax, draw, puct_scores, visit_policy
from mcts.strategies.pick import choose, pick_rule
from mcts.strategies.tree_search import TreeSearch, Widening
from mcts.tree import ROOT
from mcts.types import Ended


class RootNoise:
    """Dirichlet noise at the played node. It is kept as one gamma variate per arm and normalised when used, so
    an arm that widening adds later gets its share without changing the others' draw."""

    def __init__(self, ctx: SearchContext, fraction: float, alpha: float | None) -> None:
        self.ctx = ctx
        self.fraction = fraction
        self.alpha = alpha
        self.node = UNSEEN
        self._shape = 1.0
        self._gammas: dict[int, float] = {}
        self._known: tuple[tuple[int, float, int], tuple[dict[int, float], float]] | None = None

    def at(self, node: int) -> None:
        """Fresh noise for this node; none anywhere else."""
        self.node = node
        self._gammas = {}
        self._known = None

    def priors(
        self, arms: list[int], prior: list[float], unseen: float, misses: int = 0
    ) -> tuple[dict[int, float], float]:
        """The noisy priors of the arms and of the arm "a step not yet drawn" (which gets none once closed).
        Worked out again only when a draw changed one of the arguments."""
        state = (len(arms), unseen, misses)
        if self._known is None or self._known[0] != state:
            self._known = (state, self._compute(arms, prior, unseen))
        return self._known[1]

    def _compute(self, arms: list[int], prior: list[float], unseen: float) -> tuple[dict[int, float], float]:
        keys = [*arms, UNSEEN] if unseen > 0.0 else arms
        if not self._gammas:
            self._shape = self.alpha if self.alpha is not None else 10.0 / len(keys)
        for key in keys:
            if key not in self._gammas:
                self._gammas[key] = float(self.ctx.rng.standard_gamma(self._shape))
        total = sum(self._gammas[key] for key in keys)
        noise = [self._gammas[key] / total if total > 0.0 else 1.0 / len(keys) for key in keys]
        clean = [prior[key] for key in arms] + [unseen] * (len(keys) - len(arms))
        noisy = dict(zip(keys, add_noise(clean, noise, self.fraction), strict=True))
        return noisy, noisy.get(UNSEEN, 0.0)


@dataclass(frozen=True, slots=True)
class Mcts:
    """PUCT with progressive widening (DESIGN.md, decisions 4 and 5).

    `commit: visits` plays an episode: search at the current node, play a step, keep its subtree, until a
    terminal. `commit: never` searches from the prompt only and never enters a finished subtree again.
    Outside learning, and with `commit: never`, the search stops at the first verified win.
    """

    simulations: int = 32
    """Per move; with `commit: never` in all, 0 for as many as the budget pays."""
    commit: str = "visits"
    """visits or never."""
    leaves: int = 1
    """Simulations under way at a time, kept apart by virtual loss."""
    expand: int = 4
    widen: int = 1
    patience: int = 8
    width: float = 2.0
    power: float = 0.5
    c_init: float = 1.25
    c_base: float = C_BASE
    fpu_reduction: float = 0.2
    noise: float = 0.25
    """Fraction of root noise, in learning only."""
    noise_alpha: float | None = None
    """None: 10 / arms."""
    move_temperature: float = 1.0
    """Of the choice of a move in learning, over visits; outside learning the most visited is played."""
    pick: str = "weighted"
    """Choice among answers where no win was verified and no path was played to its end."""
    c_visit: float = 50.0
    c_scale: float = 0.1
    """Scale of values in the policy targets."""
    name: ClassVar[str] = "mcts"

    def __post_init__(self) -> None:
        if self.commit not in ("visits", "never"):
            raise ValueError(f"commit must be 'visits' or 'never', not {self.commit!r}; for Gumbel: strategy gumbel")
        if self.simulations < (1 if self.commit == "visits" else 0) or self.leaves < 1:
            raise ValueError(f"simulations and leaves must be at least 1: {self}")
        if not 0.0 <= self.noise <= 1.0 or self.move_temperature < 0.0:
            raise ValueError(f"noise must lie in [0, 1] and move_temperature be >= 0: {self}")
        if self.noise_alpha is not None and self.noise_alpha <= 0.0:
            raise ValueError(f"noise_alpha must be above 0, or null for 10 / arms: {self}")
        if self.c_base <= 0.0 or min(self.c_init, self.c_visit, self.c_scale) < 0.0:
            raise ValueError(f"c_base must be above 0, and c_init, c_visit and c_scale at least 0: {self}")
        pick_rule(self.pick)
        self.widening()

    def widening(self) -> Widening:
        return Widening(self.expand, self.widen, self.patience, self.width, self.power)

    def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]:
        noise = RootNoise(ctx, self.noise, self.noise_alpha)

        def select(search: TreeSearch, node: int, arms: list[int], unseen: float) -> int:
            tree = search.tree
            prior: list[float] | dict[int, float] = tree.prior
            if node == noise.node:
                prior, unseen = noise.priors(arms, tree.prior, unseen, search.misses.get(node, 0))
            scores = puct_scores(
                arms,
                prior,
                tree.visits,
                tree.value_sum,
                tree.in_flight,
                parent_q=tree.value_sum[node] / tree.visits[node] if tree.visits[node] else 0.0,
                c_init=self.c_init,
                c_base=self.c_base,
                fpu_reduction=self.fpu_reduction,
                unseen=unseen,
                unseen_tries=search.misses.get(node, 0),
            )
            best = argmax(scores)
            return arms[best] if best < len(arms) else UNSEEN

        never = self.commit == "never"
        search = TreeSearch(ctx, self.widening(), select, leaves=self.leaves, skip_done=never)
        if never:
            chosen, ended = yield from self._search_once(ctx, search)
        else:
            chosen, ended = yield from self._play(ctx, search, noise)
        ctx.set_targets(c_visit=self.c_visit, c_scale=self.c_scale)
        return Outcome(ended, chosen, oracle=ctx.oracle)

    def _search_once(
        self, ctx: SearchContext, search: TreeSearch
    ) -> Generator[Wave, Replies, tuple[int | None, Ended]]:
        yield from search.simulate(FromNode(ctx, search, ROOT, stop_at_win=True), self.simulations or math.inf)
        return choose(ctx, ctx.candidates, pick_rule(self.pick)), how_ended(ctx, search)

    def _play(
        self, ctx: SearchContext, search: TreeSearch, noise: RootNoise
    ) -> Generator[Wave, Replies, tuple[int | None, Ended]]:
        tree = ctx.tree
        node = ROOT
        tree.played.append(node)
        while not tree.terminal[node]:
            if ctx.learning and self.noise > 0.0:
                noise.at(node)
            course = FromNode(ctx, search, node, stop_at_win=not ctx.learning)
            yield from search.simulate(course, self.simulations)
            arms = search.step_children(node)
            if ctx.spent or (ctx.wins and not ctx.learning) or not arms:
                break
            if ctx.learning:
                visits = [tree.visits[arm] for arm in arms]
                node = arms[draw(ctx.rng, visit_policy(visits, self.move_temperature))]
            else:
                node = best_move(search, arms)
            tree.played.append(node)
        return final_answer(ctx, search, node, self.pick), how_ended(ctx, search)


class FromNode:
    """Every simulation starts at one node. With `stop_at_win` it is over at the first verified win, when
    nothing is left to find below, and when no other step can overtake the most visited one."""

    def __init__(self, ctx: SearchContext, search: TreeSearch, node: int, *, stop_at_win: bool) -> None:
        self.ctx = ctx
        self.search = search
        self.node = node
        self.stop_at_win = stop_at_win

    def start(self) -> int:
        return self.node

    def taken(self) -> None:
        pass

    def over(self, left: float) -> bool:
        if not self.stop_at_win:
            return False
        return bool(self.ctx.wins) or self.node in self.search.done or self._beyond_reach(left)

    def _beyond_reach(self, left: float) -> bool:
        """One simulation adds at most as many visits below a step as an expansion draws."""
        if math.isinf(left):
            return False
        tree, widening = self.search.tree, self.search.widening
        visits = sorted((tree.visits[arm] for arm in self.search.step_children(self.node)), reverse=True)
        if not visits:
            return False
        second = visits[1] if len(visits) > 1 else 0
        return visits[0] - second > left * max(widening.expand, widening.widen)


def best_move(search: TreeSearch, arms: list[int]) -> int:
    """The step to play outside learning: one proven to win before the most visited one."""
    tree = search.tree
    for arm in arms:
        verdict = tree.verdict[arm]
        if verdict is not None and verdict.won:
            return arm
    return max(arms, key=lambda arm: (tree.visits[arm], tree.q(arm), -arm))


def final_answer(ctx: SearchContext, search: TreeSearch, node: int, pick: str) -> int | None:
    """What an episode that came as far as `node` answers: a verified win (the played one before others), else
    the end of the most visited path, else the pick among all candidates."""
    if node in ctx.wins:
        return node
    if ctx.wins:
        return ctx.wins[0]
    end = search.best_terminal(node)
    return end if end is not None else choose(ctx, ctx.candidates, pick_rule(pick))


def how_ended(ctx: SearchContext, search: TreeSearch) -> Ended:
    """SOLVED with a verified win; BUDGET where tokens ran out; STOPPED where a simulation limit ended a search
    that could have gone on; EXHAUSTED where there was nothing left to do."""
    if ctx.wins:
        return Ended.SOLVED
    if ctx.spent:
        return Ended.BUDGET
    if ctx.tree.played or ROOT in search.done:
        return Ended.EXHAUSTED
    return Ended.STOPPED
