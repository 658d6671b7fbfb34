"""Solve one problem in front of the user: the steps as the search draws them, then the answer."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace
from typing import ClassVar

from rich.console import Console
from rich.markup import escape

from mcts.context import SearchContext, Strategy
from mcts.search import Driver
from mcts.tasks.base import TaskError
from mcts.tree import ROOT, Tree
from mcts.types import SearchResult, Status
from mcts.waves import Outcome, Replies, Wave
from selfplay.errors import UserError
from selfplay.inspect import render_tree
from selfplay.source import find_source, parse_search
from selfplay.worker import make_searches


class Watched:
    """A strategy that shows each new node of the tree as soon as it is there, and is otherwise the inner one."""

    name: ClassVar[str] = "watched"

    def __init__(self, inner: Strategy, console: Console) -> None:
        self.inner = inner
        self._console = console

    def run(self, ctx: SearchContext) -> Generator[Wave, Replies, Outcome]:
        strategy = self.inner.run(ctx)
        shown = 1
        replies: Replies | None = None
        while True:
            try:
                wave = next(strategy) if replies is None else strategy.send(replies)
            except StopIteration as stop:
                self._show(ctx.tree, shown)
                outcome: Outcome = stop.value
                return outcome
            shown = self._show(ctx.tree, shown)
            replies = yield wave

    def _show(self, tree: Tree, first: int) -> int:
        """Print the nodes from `first` on; the number of nodes."""
        for node in range(first, len(tree)):
            step = tree.steps[node]
            assert step is not None  # only the root has none
            indent = "  " * (tree.depth[node] - 1)
            below = "" if tree.parent[node] == ROOT else f" [dim](after {tree.parent[node]})[/dim]"
            note = "" if step.value != step.value else f" [cyan]value {step.value:.2f}[/cyan]"
            verdict = tree.verdict[node]
            if verdict is not None:
                note += f" [{'green' if verdict.won else 'red'}]{verdict.status.value}[/]"
            self._console.print(f"{indent}{node:>3}  {escape(step.text)}{below}{note}", highlight=False)
        return len(tree)


def solve_problem(
    model: str,
    problem: str,
    *,
    strategy: str,
    budget: int,
    task: str | None,
    seed: int,
    show_tree: bool,
    console: Console,
) -> bool:
    """Search, print, and say whether the answer passed the task's check. Raises UserError."""
    source = find_source(model, task)
    kind = source.load_task()
    try:
        asked = kind.read(problem)
    except TaskError as error:
        raise UserError(str(error)) from error  # what was typed, not what a search met
    settings = parse_search(strategy, budget, source.config.play.search, kind)
    (search,) = make_searches([asked], settings, [seed], learning=False)
    engine = source.load_engine(kind)
    console.print(f"[bold]{escape(problem)}[/bold]  {settings.strategy.name}, at most {budget} tokens", highlight=False)
    began = time.perf_counter()
    driver = Driver(engine, kind, max_open=1)
    (result,) = driver.run([replace(search, strategy=Watched(search.strategy, console))])
    _conclude(result, kind.joiner, time.perf_counter() - began, console)
    if show_tree:
        console.print(render_tree(result))
    return result.verdict is not None and result.verdict.won


def _conclude(result: SearchResult, joiner: str, seconds: float, console: Console) -> None:
    tree = result.tree
    cost = f"{result.usage.sampled} tokens sampled, {len(tree) - 1} steps in the tree, {seconds:.1f} s"
    if result.error is not None:
        console.print(f"[red]failed:[/red] {escape(result.error)}", highlight=False)
    elif result.chosen is None:
        console.print(f"[yellow]no answer[/yellow] (search ended: {result.ended.value}); {cost}", highlight=False)
    else:
        steps = [step.text for node in tree.path(result.chosen) if (step := tree.steps[node]) is not None]
        verdict = result.verdict
        if verdict is None or (verdict.status is Status.ERROR and result.problem.reference is None):
            says = "unverified"  # a question of the user's own has no gold answer
        else:
            says = verdict.status.value
        colour = "green" if verdict is not None and verdict.won else "yellow"
        console.print(f"\n[bold]{escape(joiner.join(steps))}[/bold]", highlight=False)
        console.print(f"answer {escape(str(result.answer))}: [{colour}]{says}[/]; {cost}", highlight=False)
