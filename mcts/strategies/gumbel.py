"""Gumbel search (Danihelka et al., ICLR 2022) where the candidates are draws of a language model."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from mcts.search import Expand, Outcome, Replies, SearchContext, Wave
from mcts.selection import UNSEEN, argmax, considered_visits, improved_policy, mixed_value
from mcts.strategies.mcts import final_answer, how_ended
from mcts.strategies.pick import choose, pick_rule
from mcts.strategies.tree_search import TreeSearch, Widening
from mcts.tree import ROOT


@dataclass(frozen=True, slots=True)
class Gumbel:
    """At each played node `m` candidates are drawn first and stay fixed; sequential halving shares the
    simulations among them; below, a step is chosen by the improved policy.

    The paper adds Gumbel noise to the logits of an enumerable policy because argmax(g + logits) *is* a draw
    from it, and then ranks by g + logits + sigma(q). Here the candidates were drawn by the model itself: the
    noise has done its work, and adding g or the logits again would count the policy twice. So candidates are
    ranked by sigma(q), that is by q. The guarantee carries over: the best of m draws by an exact q is worth at
    least what a single draw is worth on average. Under the prior rule `exact` they are drawn without replacement, as
    the paper's are.

    With `commit: never` no move is final: an episode that ended without a win is followed by another from the prompt,
    with one more candidate at each node that is played again. Finished subtrees are never entered again, and the first
    verified win or the end of the budget ends the search.
    """

    simulations: int = 32
    """Per move."""
    m: int = 8
    """Candidates: draws at each played node, draws from earlier moves included; repeated ones are merged. With
    `commit: never` unfinished ones."""
    commit: str = "visits"
    """visits: one episode. never: episodes until a win."""
    leaves: int = 1
    expand: int = 4
    widen: int = 1
    patience: int = 8
    width: float = 2.0
    power: float = 0.5
    c_visit: float = 50.0
    c_scale: float = 0.1
    """Scale of values against log-priors, in the choice of steps below and in the policy targets."""
    pick: str = "weighted"
    name: ClassVar[str] = "gumbel"

    def __post_init__(self) -> None:
        if min(self.simulations, self.m, self.leaves) < 1:
            raise ValueError(f"simulations, m and leaves must be at least 1: {self}")
        if self.commit not in ("visits", "never"):
            raise ValueError(f"commit must be 'visits' or 'never', not {self.commit!r}")
        pick_rule(self.pick)
        self.widening()

    def widening(self) -> Widening:
        return Widening(self.expand, self.widen, self.patience, self.width, self.power)

    def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]:
        never = self.commit == "never"
        search = TreeSearch(ctx, self.widening(), self._below, leaves=self.leaves, skip_done=never)
        if never:
            yield from self._search_on(ctx, search)
            chosen = choose(ctx, ctx.candidates, pick_rule(self.pick))
        else:
            end = yield from self._play(ctx, search)
            chosen = final_answer(ctx, search, end, self.pick)
        ctx.set_targets(c_visit=self.c_visit, c_scale=self.c_scale)
        return Outcome(how_ended(ctx, search), chosen, oracle=ctx.oracle)

    def _play(self, ctx: SearchContext, search: TreeSearch) -> Generator[Wave, Replies, int]:
        """One episode; the node that it came to."""
        tree = ctx.tree
        node = ROOT
        tree.played.append(node)
        while not tree.terminal[node]:
            candidates = yield from self._candidates(ctx, search, node)
            if not candidates:
                break
            halving = Halving(ctx, search, candidates, self.simulations)
            yield from search.simulate(halving, self.simulations)
            if ctx.spent or (ctx.wins and not ctx.learning):
                break
            node = halving.best()
            tree.played.append(node)
        return node

    def _search_on(self, ctx: SearchContext, search: TreeSearch) -> Generator[Wave, Replies, None]:
        """Episodes until a win, the end of the budget, or nothing is left to find. Every node played gets a draw, below
        it or at it, so there is an end."""
        played: dict[int, int] = {}
        node = ROOT
        while not (ctx.spent or ctx.wins or ROOT in search.done):
            if node in search.done:
                node = ROOT
            wanted = self.m + played.get(node, 0)
            played[node] = played.get(node, 0) + 1
            candidates = yield from self._unfinished(ctx, search, node, wanted)
            if not candidates:
                node = ROOT
                continue
            halving = Halving(ctx, search, candidates, self.simulations)
            yield from search.simulate(halving, self.simulations)
            node = halving.best()

    def _candidates(self, ctx: SearchContext, search: TreeSearch, node: int) -> Generator[Wave, Replies, list[int]]:
        """Draw at `node` until `m` draws were made there; the distinct steps, in order of creation."""
        tree = ctx.tree
        while not ctx.spent:
            missing = self.m - sum(tree.draws[arm] for arm in search.step_children(node))
            if missing < 1 or not search.is_open(node):
                break
            tree.fly(node, 1)
            # one by one where each draw leaves out the ones before
            yield from search.draw([Expand(node, 1 if search.exact else missing, new=True)])
        return search.step_children(node)[: self.m]

    def _unfinished(
        self, ctx: SearchContext, search: TreeSearch, node: int, wanted: int
    ) -> Generator[Wave, Replies, list[int]]:
        """Draw at `node` as often as unfinished steps are missing there, and no more: at the last step every draw ends
        a path. The unfinished steps, which may be none."""

        def unfinished() -> list[int]:
            return [arm for arm in search.step_children(node) if arm not in search.done]

        missing = wanted - len(unfinished())
        while missing > 0 and search.is_open(node) and not (ctx.spent or ctx.wins):
            n = 1 if search.exact else missing
            missing -= n
            ctx.tree.fly(node, 1)
            yield from search.draw([Expand(node, n, new=True)])
        return unfinished()

    def _below(self, search: TreeSearch, node: int, arms: list[int], unseen: float) -> int:
        """argmax pi'(a) - N(a) / (1 + sum N); a step not yet drawn has the value v_mix."""
        tree = search.tree
        visits = [tree.visits[arm] + tree.in_flight[arm] for arm in arms]
        q = [tree.value_sum[arm] / n if n else 0.0 for arm, n in zip(arms, visits, strict=True)]
        priors = [tree.prior[arm] for arm in arms]
        raw = tree.raw_value[node]
        filled = mixed_value(raw if raw == raw else tree.q(node), priors, visits, q)
        completed = [value if n else filled for value, n in zip(q, visits, strict=True)]
        most = max(visits)
        if unseen > 0.0:
            priors.append(unseen)
            completed.append(filled)
            visits.append(search.misses.get(node, 0))
        target = improved_policy(priors, completed, most, c_visit=self.c_visit, c_scale=self.c_scale)
        total = 1 + sum(visits)
        best = argmax([pi - n / total for pi, n in zip(target, visits, strict=True)])
        return arms[best] if best < len(arms) else UNSEEN


class Halving:
    """Sequential halving over fixed candidates: each simulation goes to the candidate of highest mean value
    among those that were given exactly as many as the schedule asks."""

    def __init__(self, ctx: SearchContext, search: TreeSearch, candidates: list[int], simulations: int) -> None:
        self.ctx = ctx
        self.search = search
        self.given = dict.fromkeys(candidates, 0)
        self.schedule = considered_visits(len(candidates), simulations)
        self.position = 0
        self.named = candidates[0]

    def start(self) -> int:
        level = self.schedule[self.position]
        self.named = self._highest([arm for arm in self._left() if self.given[arm] == level] or self._left())
        return self.named

    def taken(self) -> None:
        self.given[self.named] += 1
        self.position += 1

    def over(self, left: float) -> bool:  # noqa: ARG002 - part of the protocol
        if self.search.skip_done:
            return bool(self.ctx.wins) or not self._left()
        if self.ctx.learning:
            return False
        return bool(self.ctx.wins) or all(candidate in self.search.done for candidate in self.given)

    def best(self) -> int:
        """The candidate to play: the one of highest mean value among those that were given the most. Finished ones only
        where there is no other, if the search never enters those again."""
        left = self._left() or list(self.given)
        most = max(self.given[arm] for arm in left)
        return self._highest([arm for arm in left if self.given[arm] == most])

    def _left(self) -> list[int]:
        """The candidates that may be visited."""
        if not self.search.skip_done:
            return list(self.given)
        return [arm for arm in self.given if arm not in self.search.done]

    def _highest(self, arms: list[int]) -> int:
        """The arm of highest mean value, the first of equals; one never evaluated comes last."""
        tree = self.search.tree
        return arms[argmax([tree.q(arm) if tree.visits[arm] else -1.0 for arm in arms])]
