"""What one search knows: its problem, its tree, its budget, and how steps become nodes."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np

from mcts.budget import TokenBudget, Usage
from mcts.policy import PriorRule, Proposals, set_targets
from mcts.rng import generator
from mcts.tasks.base import Task
from mcts.tree import ROOT, Tree
from mcts.types import Drawn, Int32, Kind, Problem, SearchError, Status, Step, Stop, Verdict
from mcts.value import HeadValue, ValueSource
from mcts.waves import Outcome, Replies, Wave

_NOISE_STREAM = 1 << 63  # keeps the search's own random numbers apart from its requests'
_LENGTH = Verdict(Status.WRONG, 0.0, why="the step is longer than the longest step allowed")
_DEPTH = Verdict(Status.WRONG, 0.0, why="no answer within the largest number of steps")
_NO_ANSWER = Verdict(Status.UNPARSABLE, 0.0, why="the finished path holds no answer")


class Strategy(Protocol):
    """A search as a generator: it yields waves and receives replies, and knows no engine and no task. One
    strategy object serves many searches at once: what a search knows lives in its generator."""

    name: ClassVar[str]

    def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]: ...


@dataclass(frozen=True, slots=True)
class Search:
    """One search to be run: what the driver admits."""

    problem: Problem
    strategy: Strategy
    budget: int
    """Sampled tokens."""
    seed: int
    """Unsigned 64-bit."""
    learning: bool = False
    """Self-play: gold may judge terminals inside the search, and exploration noise is on."""
    temperature: float = 1.0
    top_p: float = 1.0
    prior_rule: str = "exact"
    """"exact" or "draws" (DESIGN.md, decision 4)."""
    check_steps: bool = True
    """Let `task.check_step` end a path as soon as one step is wrong."""
    value: ValueSource = field(default_factory=HeadValue)
    seconds: float | None = None
    """Wall-clock deadline counted from admission; a search past it answers with the best it has."""

    def __post_init__(self) -> None:
        if self.prior_rule not in [rule.value for rule in PriorRule]:
            raise ValueError(f"prior_rule must be 'exact' or 'draws', not {self.prior_rule!r}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"a seed must be an unsigned 64-bit number, not {self.seed}")
        if self.budget < 1:
            raise ValueError(f"a search needs a budget of at least one token, not {self.budget}")
        if self.temperature < 0.0 or not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"temperature {self.temperature} must be >= 0, top_p {self.top_p} in (0, 1]")


class SearchContext:
    """One search's state. Strategies read `tree`, `budget`, `rng` and call `add`, `value`, `evaluate`; they
    change visits and values through `tree.backup` and `tree.fly`."""

    def __init__(self, search: Search, task: Task, prompt_ids: Int32, prompt_text: str) -> None:
        self.problem = search.problem
        self.seed = search.seed
        self.learning = search.learning
        self.temperature = search.temperature
        self.prior_rule = PriorRule(search.prior_rule)
        self.source = search.value
        self.max_steps = task.max_steps
        self.max_step_tokens = task.max_step_tokens
        self.tree = Tree(prompt_ids, prompt_text)
        self.budget = TokenBudget(search.budget)
        self.usage = Usage()
        self.wins: list[int] = []
        """Terminal nodes with a CORRECT verdict, in order of creation."""
        self.candidates: list[int] = []
        """Terminal nodes with an answer, in order of creation."""
        self.spent = False
        """True once a wave got nothing because the budget was spent (or the search cancelled): time to answer."""
        self.oracle = False
        """True once gold said more than the task's own check."""
        self._task = task
        self._check_steps = search.check_steps
        self._proposals = Proposals(self.tree, self.prior_rule)
        self._prefixes: dict[int, Int32] = {ROOT: self.tree.prompt_ids}
        self._texts: dict[int, tuple[str, ...]] = {ROOT: ()}
        self._estimates: dict[int, float] = {}

    @cached_property
    def rng(self) -> np.random.Generator:
        """The search's own random numbers (noise, choice of moves): a function of its seed alone."""
        return generator(self.seed, _NOISE_STREAM)

    def add(self, parent: int, step: Step) -> tuple[int, bool]:
        """The node of `step` below `parent`, and whether it is new. A step whose text was drawn there before
        is merged into its node: draws + 1, its tokens count as discarded. A new node is closed at once if it
        is the end of a path (see `_judge`)."""
        node, new = self._proposals.add(parent, step)
        if new:
            self._judge(node, parent, step)
        else:
            self.usage.discarded += len(step.token_ids)
        return node, new

    def drawn(self, node: int) -> tuple[Drawn, ...]:
        """The steps that a request for a new one below `node` excludes; none under the prior rule `draws`, which
        counts repetitions."""
        return self._proposals.drawn(node)

    def add_rollout(self, parent: int, step: Step) -> int:
        """A node of kind `rollout` for `step`, never merged with another; closed like any other."""
        node = self.tree.add(parent, step, kind=Kind.ROLLOUT)
        self._judge(node, parent, step)
        return node

    def prefix(self, node: int) -> Int32:
        """Tokens from the prompt to the end of `node`, int32 [P]; built once per node from its parent's."""
        found = self._prefixes.get(node)
        if found is None:
            step = self.tree.steps[node]
            assert step is not None  # only the root has none, and it is there from the start
            found = np.concatenate((self.prefix(self.tree.parent[node]), step.token_ids), dtype=np.int32)
            self._prefixes[node] = found
        return found

    def texts(self, node: int) -> tuple[str, ...]:
        """Texts of the steps from the root to `node`."""
        found = self._texts.get(node)
        if found is None:
            step = self.tree.steps[node]
            assert step is not None  # as in `prefix`
            found = self._texts[node] = (*self.texts(self.tree.parent[node]), step.text)
        return found

    def value(self, node: int) -> float:
        """The reward where the node was judged, else the value source's estimate, in [0, 1]; a finished answer without
        verdict has that of the step before. Raises SearchError where there is none."""
        reward = self.tree.reward[node]
        if reward == reward:  # not NaN
            return reward
        value = self._estimates.get(node)
        if value is None:
            value = self.source.value(self, node)
        if math.isnan(value) and self.tree.terminal[node] and node != ROOT:
            # An answer that nobody may judge yet: engines forward no EOS, so the last step was not valued itself.
            value = self.value(self.tree.parent[node])
        if not 0.0 <= value <= 1.0:
            if math.isnan(value):
                raise SearchError(
                    f"value source {self.source.name!r} has no value for a node: this engine has no value "
                    "head, choose value constant or rollout"
                )
            raise SearchError(f"value source {self.source.name!r} gave {value}, which is not in [0, 1]")
        return value

    def evaluate(self, nodes: Sequence[int]) -> Generator[Wave, Replies, list[float]]:
        """Values of several nodes [len(nodes)]; a value source that draws does it in waves. NaN where the
        budget ended before a value was known; then `spent` is set."""
        if not self.source.immediate:
            tree = self.tree
            open_nodes = [n for n in nodes if math.isnan(tree.reward[n]) and n not in self._estimates]
            ended = [n for n in open_nodes if tree.terminal[n]]
            if ended:
                raise SearchError(
                    f"value source {self.source.name!r} cannot judge a finished answer that has no verdict"
                )
            values = yield from self.source.evaluate(self, open_nodes)
            self._estimates.update(zip(open_nodes, values, strict=True))
            # a completion that the end of the budget cut short leaves no value although its wave was granted
            self.spent = self.spent or any(math.isnan(value) for value in values)
            known = self._estimates
            return [tree.reward[n] if math.isnan(known.get(n, math.nan)) else known[n] for n in nodes]
        return [self.value(node) for node in nodes]

    def verify(self, node: int) -> Verdict:
        """Gold's verdict on a candidate, for strategies that choose by gold; marks the search as `oracle`."""
        answer = self.tree.answer[node]
        if answer is None:
            raise ValueError(f"node {node} has no answer to verify")
        self.oracle = True
        return self._task.verify(self.problem, answer)

    def set_targets(self, *, c_visit: float, c_scale: float) -> None:
        """Fill the tree's policy targets (DESIGN.md, decision 6)."""
        set_targets(self.tree, c_visit=c_visit, c_scale=c_scale)

    def _judge(self, node: int, parent: int, step: Step) -> None:
        """Close a node that ends its path. EOS: by its answer. A step cut at the longest length, or the last
        step allowed without EOS: wrong. A step that the task's own check refutes: that verdict."""
        tree = self.tree
        if step.stop is Stop.EOS:
            answer = self._task.answer(self.problem, (*self.texts(parent), step.text))
            verdict = _NO_ANSWER if answer is None else self._judge_answer(answer)
            tree.close(node, verdict, answer)
            if answer is not None:
                self.candidates.append(node)
                if verdict is not None and verdict.won:
                    self.wins.append(node)
            return
        if step.stop is Stop.LENGTH:
            tree.close(node, _LENGTH)
            return
        if self._check_steps:
            found = self._task.check_step(self.problem, (*self.texts(parent), step.text))
            if found is not None and found.status in (Status.WRONG, Status.UNPARSABLE):
                tree.close(node, found)
                return
        if tree.depth[node] >= self.max_steps:
            tree.close(node, _DEPTH)

    def _judge_answer(self, answer: str) -> Verdict | None:
        """The task's own check; in learning gold has the last word on what the check does not refute."""
        checked = self._task.check(self.problem, answer)
        if not self.learning or (checked is not None and not checked.won):
            return checked
        verdict = self._task.verify(self.problem, answer)
        if checked is None or not verdict.won:
            self.oracle = True
        return verdict
