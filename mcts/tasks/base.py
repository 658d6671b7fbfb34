"""What a kind of problem must say of itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mcts.types import Problem, SearchError, SettingError, Verdict


class TaskError(SearchError):
    """A task that cannot judge a problem (its data are broken): the search fails, the others go on."""


class TaskSettingError(TaskError, SettingError):
    """No such task or setting, or a value that the task refuses: a user's to mend before anything runs."""


@dataclass(frozen=True, slots=True)
class Example:
    """A worked example for warm-up: the steps of one solution attempt with a value label for each prefix."""

    problem: Problem
    steps: tuple[str, ...]
    """Texts as the policy would write them, delimiter included, EOS left out."""
    values: tuple[float, ...]
    """Value labels in [0, 1], one for the prompt and one per step: [1 + len(steps)]. NaN: no label."""
    imitate: bool = True
    """False: the value head learns from it, the policy does not (a negative)."""
    finished: bool = True
    """True: EOS follows the last step."""


class Task(Protocol):
    """One kind of problem. `check*` need no gold answer and may guide a search anywhere; `verify` compares with
    gold and is called inside a search only in self-play (DESIGN.md, decision 3).

    A task may also have `files`, a list of the files and folders that it reads when problems are asked for: `--dry-run`
    names those that are missing."""

    name: str
    delimiter: str
    """Text that ends a step (its tokens are part of the step)."""
    joiner: str
    """What stands between two steps' texts: a space for whole-word tokenizers, whose decoding drops it; else ""."""
    max_steps: int
    """Steps of the longest solution; a path that reaches it without an answer is lost."""
    max_step_tokens: int

    def vocabulary(self) -> list[str]:
        """Every word that a prompt or a legal step can hold, for a fresh whole-word model. Tasks whose texts are open
        raise TaskSettingError saying to give a model instead."""
        ...

    def problems(self, split: str) -> Sequence[Problem]:
        """All problems of a split: "train", "dev" or "heldout". Fixed order; ids unique over all splits."""
        ...

    def read(self, text: str) -> Problem:
        """A problem as a user types it. Raises TaskError with one sentence that says how to write it."""
        ...

    def vary(self, problem: Problem, seed: int) -> Problem:
        """The same problem in other words (for Countdown: its numbers in another order), a function of `seed`; itself
        where there is only one way to say it. Id and gold answer stay."""
        ...

    def split_steps(self, text: str) -> list[str]:
        """Cut a solution text into steps; `joiner`.join of the result is the text."""
        ...

    def check_step(self, problem: Problem, steps: Sequence[str]) -> Verdict | None:
        """Judge the last of `steps`, the earlier ones being fine. None: nothing to say against it.
        A WRONG or UNPARSABLE verdict ends the path."""
        ...

    def answer(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The answer that finished `steps` give, None where there is none."""
        ...

    def check(self, problem: Problem, answer: str) -> Verdict | None:
        """Judge an answer without gold. None: this task cannot tell."""
        ...

    def verify(self, problem: Problem, answer: str) -> Verdict:
        """Judge an answer against gold."""
        ...

    def warmup(self, seed: int) -> Iterator[Example]:
        """An endless stream of worked examples made from the rules alone, a function of `seed`; on training
        material only. Tasks without one raise ValueError saying what to give instead."""
        ...
