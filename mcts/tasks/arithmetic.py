"""What the number games share: the text format, its judges, warm-up, and an oracle for tests and diagnosis.

A problem reads `3 7 12 -> 33 :`, a solution `7 * 3 = 21 | 12 21 ;` and then `21 + 12 = 33`. Words are separated
by white space; step texts carry none at their ends, and " ".join(steps) is the solution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from mcts.tasks.base import Example, TaskError, TaskSettingError
from mcts.tasks.numbers import OPERATION_SIGNS, REVERSED, Int64, NumberTable, number_table
from mcts.tasks.plays import Float64, Reach, chances, count_plays, moves
from mcts.tasks.warmup import SYMBOLS, WarmupBatch, WarmupSettings, warmup_batches
from mcts.types import Problem, Verdict
from mcts.verify.exact import Rules, compose, judge_expression, judge_step, numbers_left, parse_number, unparsable

EXAMPLE_PLAYS = 512
"""Plays that `warmup` makes at once; without influence on the stream."""


def whole_number(task: str, name: str, value: object, least: int, most: int) -> int:
    """`value` as a checked int setting. Raises TaskSettingError in one sentence."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise TaskSettingError(f"{task}: {name} must be a whole number from {least} to {most}, not {value!r}")
    return value


def yes_or_no(task: str, **settings: object) -> None:
    """Check that settings are true or false. Raises TaskSettingError in one sentence."""
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise TaskSettingError(f"{task}: {name} must be true or false, not {value!r}")


class ArithmeticTask(ABC):
    """Combine every number once by + - * / and reach the target (a `Task`, but for its problems)."""

    delimiter = ";"
    joiner = " "

    def __init__(
        self,
        *,
        name: str,
        count: int,
        low: int,
        high: int,
        rules: Rules,
        answer_rules: Rules | None,
        warmup: WarmupSettings,
    ) -> None:
        """rules: of the steps, and of the numbers that have a word. answer_rules: of the operations in an answer."""
        self.name = name
        self.count = count
        self.low, self.high = low, high
        self.rules = rules
        self.answer_rules = answer_rules
        self.max_steps = count - 1
        self.max_step_tokens = count + 6
        self.warmup_settings = warmup
        self.table: NumberTable = number_table(
            rules,
            count=count,
            low=low,
            high=high,
            target_low=warmup.target_low,
            target_high=warmup.target_high,
        )
        self._index = {word: k for k, word in enumerate(self.table.words)}
        self._words = np.array(self.vocabulary(), dtype=np.object_)

    def vocabulary(self) -> list[str]:
        """Every word that a prompt or a legal play towards a target can hold: numbers ascending, then symbols."""
        return [*self.table.words, *SYMBOLS]

    @abstractmethod
    def training_sets(self) -> Int64:
        """Number sets that training may see under any target, int64 [S, count], each row ascending."""

    # --- judging ---

    def split_steps(self, text: str) -> list[str]:
        """Steps without outer white space; " ".join of them is the text (with single spaces)."""
        steps, words = [], []
        for word in text.split():
            words.append(word)
            if word == self.delimiter:
                steps.append(" ".join(words))
                words = []
        return [*steps, " ".join(words)] if words else steps

    def _numbers(self, problem: Problem) -> Sequence[int]:
        numbers: Sequence[int] = self._facts(problem)["numbers"]
        return numbers

    def _facts(self, problem: Problem) -> Mapping[str, Any]:
        """Meta with numbers and target; read from the prompt where a problem of the user's own has none."""
        if "numbers" in problem.meta and "target" in problem.meta:
            return problem.meta
        if not isinstance(problem.prompt, str):
            raise TaskError(f"problem {problem.id} needs numbers and target in its meta, or a prompt of plain text")
        return self.read(problem.prompt).meta

    def _left(self, problem: Problem, steps: Sequence[str]) -> list[str] | None:
        return numbers_left(steps[-1]) if steps else list(map(str, self._numbers(problem)))

    def check_step(self, problem: Problem, steps: Sequence[str]) -> Verdict | None:
        """Judge the last of `steps`. The numbers left are read from the step before, which was judged already."""
        left = self._left(problem, steps[:-1])
        if left is None:
            return unparsable("the step before is no step")
        return judge_step(steps[-1], left, self.rules)

    def answer(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The expression that the steps amount to, like `(7 * 3) + 12`; None where they are unfinished."""
        return compose(steps, list(map(str, self._numbers(problem))))

    def check(self, problem: Problem, answer: str) -> Verdict:
        facts = self._facts(problem)
        return judge_expression(answer, facts["numbers"], facts["target"], self.answer_rules)

    def verify(self, problem: Problem, answer: str) -> Verdict:
        """The same as `check`: the numbers and the target say all."""
        return self.check(problem, answer)

    # --- warm-up ---

    def warmup_batches(self, seed: int, plays: int = EXAMPLE_PLAYS) -> Iterator[WarmupBatch]:
        """The examples of `warmup(seed)` as arrays, `plays` * (1 + negatives) at a time."""
        sets = self.table.index(self.training_sets())
        share = self._chances if self.warmup_settings.counted else None
        return warmup_batches(self.table, sets, self.warmup_settings, seed, plays, share)

    @cached_property
    def _chances(self) -> Float64:
        """Of the training sets: each learning phase asks, and five numbers take seconds."""
        settings = self.warmup_settings
        return chances(self.table, self.table.index(self.training_sets()), settings.target_low, settings.target_high)

    def warmup(self, seed: int) -> Iterator[Example]:
        """Random legal plays under the target that they reached, each followed by its negatives."""
        for batch in self.warmup_batches(seed):
            stops = (batch.ends + 1).tolist()
            spans = list(pairwise(stops))
            rows: list[list[str]] = self._words[batch.words].tolist()
            for words, values, imitate in zip(rows, batch.values.tolist(), batch.imitate.tolist(), strict=True):
                numbers = list(map(int, words[: self.count]))
                yield Example(
                    problem=self.problem(numbers, int(words[self.count + 1])),
                    steps=tuple([" ".join(words[a:b]) for a, b in spans]),
                    values=tuple(values),
                    imitate=imitate,
                )

    # --- problems ---

    def problem(self, numbers: Sequence[int], target: int, **facts: object) -> Problem:
        """The problem with its numbers in the given order; `facts` are added to its meta."""
        return Problem(
            id=f"{self.name}-{'-'.join(map(str, sorted(numbers)))}-{target}",
            prompt=f"{' '.join(map(str, numbers))} -> {target} :",
            meta={"numbers": list(numbers), "target": target, **facts},
        )

    def vary(self, problem: Problem, seed: int) -> Problem:
        """The numbers in another order."""
        numbers = np.random.default_rng(seed).permutation(self._numbers(problem)).tolist()
        target = self._facts(problem)["target"]
        prompt = f"{' '.join(map(str, numbers))} -> {target} :"
        return replace(problem, prompt=prompt, meta={**problem.meta, "numbers": numbers})

    def read(self, text: str) -> Problem:
        """`3 7 12 -> 33`, with or without the closing `:`. Raises TaskError."""
        words = text.split()
        if words[-1:] == [":"]:
            words.pop()
        values = [parse_number(word) for word in words[: self.count] + words[self.count + 1 :]]
        fine = len(words) == self.count + 2 and words[self.count] == "->"
        numbers = [value[0] for value in values if value is not None and value[1] == 1]
        if not fine or len(numbers) != self.count + 1:
            example = " ".join(map(str, range(self.low, self.low + self.count)))
            raise TaskError(
                f"a problem of {self.name} is {self.count} whole numbers, an arrow and a target, like "
                f'"{example} -> {self.warmup_settings.target_low}"'
            )
        *numbers, target = numbers
        for number in numbers:
            whole_number(self.name, "a number", number, self.low, self.high)
        whole_number(self.name, "the target", target, self.warmup_settings.target_low, self.warmup_settings.target_high)
        return self.problem(numbers, target)

    def make_problems(
        self,
        sets: Int64,
        reach: Reach,
        *,
        random: np.random.Generator,
        limit: int | None,
        shuffle: bool = True,
    ) -> list[Problem]:
        """Problems of `sets` [S, n] at every target that `reach` shows reachable, numbers in random order.

        Shuffled, so that a smaller limit gives a prefix of the same list. Meta says how many plays win
        (`solutions`, None where not enumerated) and the chance that a random play does (`share`).
        """
        rows, targets = np.nonzero(reach.share > 0)
        order = random.permutation(len(rows)) if shuffle else np.arange(len(rows))
        numbers = random.permuted(sets[rows[order]], axis=1)[:limit]
        rows, targets = rows[order][:limit], targets[order][:limit]
        shares = reach.share[rows, targets].tolist()
        solutions = [None] * len(rows) if reach.plays is None else reach.plays[rows, targets].tolist()
        return [
            self.problem(drawn, target, solutions=found, share=round(share, 9))
            for drawn, target, found, share in zip(
                numbers.tolist(), (targets + reach.target_low).tolist(), solutions, shares, strict=True
            )
        ]

    # --- oracle ---

    def winning_share(self, problem: Problem, steps: Sequence[str]) -> float:
        """Chance that uniformly random legal play wins after `steps` (all judged fine); 0: lost for certain.

        Exact, by playing everything out: milliseconds up to four numbers left, seconds for six. Not for a search
        that is to be measured: for tests, and to measure a value head against.
        """
        left = self._left(problem, steps)
        target: int = self._facts(problem)["target"]
        if left is None or any(word not in self._index for word in left):
            return 0.0
        if len(left) == 1:
            return float(left[0] == str(target))
        return float(self._shares(np.array([[self._index[word] for word in left]]), target)[0])

    def _shares(self, states: Int64, target: int) -> Float64:
        return count_plays(self.table, states, target, target).share[:, 0]

    def solve(self, problem: Problem) -> tuple[str, ...] | None:
        """The steps of a solution, at each step the move after which random play wins most; None without one."""
        target: int = self._facts(problem)["target"]
        state = [self._index[str(number)] for number in self._numbers(problem)]
        steps: list[str] = []
        words = self.table.words
        while len(state) > 1:
            larger, smaller, results = moves(self.table, np.array([state]))
            found: list[tuple[int, int, int, list[int]]] = []
            for kind, pair in np.argwhere(results[0] >= 0).tolist():
                a, b = int(larger[0, pair]), int(smaller[0, pair])
                rest = list(state)
                rest.remove(a)
                rest.remove(b)
                found.append((kind, a, b, [*rest, int(results[0, kind, pair])]))
            after = np.array([rest for *_, rest in found], dtype=np.int64).reshape(len(found), len(state) - 1)
            shares = self._shares(after, target) if len(state) > 2 else self.table.whole[after[:, 0]] == target
            if not shares.any():
                return None
            kind, a, b, state = found[int(shares.argmax())]
            first, second = (b, a) if kind == REVERSED else (a, b)
            text = f"{words[first]} {OPERATION_SIGNS[kind]} {words[second]} = {words[state[-1]]}"
            if len(state) > 1:
                text += f" | {' '.join(words[k] for k in state)} {self.delimiter}"
            steps.append(text)
        return tuple(steps)
