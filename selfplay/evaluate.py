"""Accuracy against tokens really spent, per strategy and budget, with intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mcts.strategies import build as build_strategy
from mcts.types import Problem
from selfplay.config import SearchConfig
from selfplay.errors import UserError
from selfplay.source import find_source, parse_search
from selfplay.stats import wilson
from selfplay.worker import Answered, EvaluationJob, evaluate_problems

DEFAULT_STRATEGIES = ("greedy", "sampler", "majority", "value", "beam", "mcts")
BUDGET_STEPS = (1, 4, 16, 64)
"""Default budgets, in worst-case solutions."""


@dataclass(frozen=True, slots=True)
class Line:
    """One strategy at one budget over all problems."""

    strategy: str
    budget: int
    problems: int
    won: int
    sampled: int
    seconds: float
    oracle: bool
    failed: int = 0
    """Searches that could not be done at all."""
    why: str | None = None
    """What the first of them said."""
    uncounted: int = 0
    """Tokens at most, on top of `sampled`, that a server drew and never told of."""

    def data(self) -> dict[str, Any]:
        low, high = wilson(self.won, self.problems)
        return {
            "strategy": self.strategy,
            "budget": self.budget,
            "problems": self.problems,
            "accuracy": self.won / self.problems,
            "low": low,
            "high": high,
            "tokens_per_problem": self.sampled / self.problems,
            "tokens_per_win": self.sampled / self.won if self.won else None,
            "uncounted_tokens": self.uncounted,
            "seconds": self.seconds,
            "oracle": self.oracle,
            "failed": self.failed,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """What `selfplay evaluate` prints and writes."""

    model: str
    lines: tuple[Line, ...]

    def data(self) -> dict[str, Any]:
        return {"model": self.model, "lines": [line.data() for line in self.lines]}

    def table(self) -> Table:
        table = Table(title=f"{self.model}: {self.lines[0].problems} problems", title_justify="left")
        for name in ("strategy", "budget", "won", "95% interval", "tokens", "per win", "seconds"):
            table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
        for line in self.lines:
            d = line.data()
            table.add_row(
                line.strategy + (" (oracle)" if line.oracle else ""),
                str(line.budget),
                f"{100 * d['accuracy']:.1f}%",
                f"{100 * d['low']:.1f} - {100 * d['high']:.1f}%",
                f"{d['tokens_per_problem']:.1f}",
                "-" if d["tokens_per_win"] is None else f"{d['tokens_per_win']:.0f}",
                f"{line.seconds:.1f}",
            )
        return table


def read_problems(path: Path) -> list[Problem]:
    """Problems from JSONL: `id` and `prompt`, optional `reference` and `meta`. Raises UserError naming the row."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read problems {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read problems {path}: it is no UTF-8 text") from error
    problems: list[Problem] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # or a whole number of 5,000 digits
            raise UserError(f"{path}, row {number}: not valid JSON ({error})") from error
        except RecursionError as error:
            raise UserError(f"{path}, row {number}: nested too deeply") from error
        if not isinstance(row, dict) or not {"id", "prompt"} <= row.keys():
            raise UserError(f"{path}, row {number}: a problem needs the fields id and prompt")
        if not isinstance(row["id"], str | int) or not isinstance(row["prompt"], str | list):
            raise UserError(f"{path}, row {number}: id must be text or a number, prompt text or chat messages")
        if not isinstance(row.get("meta"), dict | None):
            raise UserError(f"{path}, row {number}: meta must be an object")
        name = str(row["id"])
        if name in seen:
            raise UserError(f"{path}, row {number}: the id {name!r} is there twice")
        seen.add(name)
        prompt = row["prompt"] if isinstance(row["prompt"], str) else tuple(row["prompt"])
        problems.append(Problem(name, prompt, row.get("reference"), row.get("meta") or {}))
    if not problems:
        raise UserError(f"{path} holds no problems")
    return problems


def evaluate_model(
    model: str,
    *,
    task: str | None = None,
    problems: Path | None = None,
    strategies: Sequence[str] | None = None,
    budgets: Sequence[int] | None = None,
    limit: int | None = None,
    split: str = "heldout",
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Run every strategy at every budget over the same problems. A strategy that cannot use more than one chain
    (greedy) is run once."""
    source = find_source(model, task)
    kind = source.load_task()
    if split not in ("heldout", "dev"):
        raise UserError(f"split must be heldout or dev, not {split!r}")
    chosen = list(kind.problems(split)) if problems is None else read_problems(problems)
    chosen = chosen[:limit]
    engine = source.load_engine(kind)
    if problems is not None:
        for number, problem in enumerate(chosen, start=1):
            try:
                engine.encode(problem.prompt)
            except ValueError as error:
                raise UserError(f"{problems}, problem {number} ({problem.id}) cannot be encoded: {error}") from error
    worst = kind.max_steps * kind.max_step_tokens
    for strategy in strategies or DEFAULT_STRATEGIES:  # a typo in the last one must not cost the others' work
        search = parse_search(strategy, worst, source.config.play.search, kind)
        build_strategy(search.strategy.name, **search.strategy.settings)
    lines: list[Line] = []
    for strategy in strategies or DEFAULT_STRATEGIES:
        wanted = list(budgets or [worst * step for step in BUDGET_STEPS])
        if strategy == "greedy":  # one chain, whatever it may cost
            wanted = [worst]
        for budget in wanted:
            search = parse_search(strategy, budget, source.config.play.search, kind)
            answers, seconds = _run(engine, kind, chosen, search, seed, source.version)
            line = Line(
                strategy,
                budget,
                len(answers),
                sum(a.won for a in answers),
                sum(a.sampled for a in answers),
                seconds,
                any(a.oracle for a in answers),
                sum(a.failed is not None for a in answers),
                next((a.failed for a in answers if a.failed is not None), None),
                sum(a.uncounted for a in answers),
            )
            if line.failed == line.problems:
                raise UserError(f"{strategy}: no search could be done: {line.why}")
            if line.failed:
                progress(f"{strategy}: {line.failed} searches failed and count as not won: {line.why}")
            if line.uncounted:
                progress(f"{strategy}: up to {line.uncounted} more tokens in calls whose cost the server did not tell")
            lines.append(line)
            progress(f"{strategy} at {budget} tokens: {100 * line.won / line.problems:.1f}%")
    return Report(model, tuple(lines))


def _run(
    engine: Any, task: Any, problems: Sequence[Problem], search: SearchConfig, seed: int, version: int
) -> tuple[list[Answered], float]:
    import time

    began = time.perf_counter()
    job = EvaluationJob(tuple(problems), search, seed, version)
    answers = evaluate_problems(engine, task, job, max_open=512)
    return answers, time.perf_counter() - began
