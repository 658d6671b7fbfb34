"""A toy world for tests of strategies: random trees of steps with known probabilities, values and wins."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mcts.engines.scripted import ScriptedEngine
from mcts.rng import uniform
from mcts.search import Driver, Search
from mcts.tasks.base import Example
from mcts.types import Problem, SearchResult, Status, Verdict


@dataclass
class ToyTask:
    """The answer is the last word of the last step; it is right if it equals the reference. `checkable` says
    whether this shows without gold. A step with the word `bad` is refuted by `check_step`."""

    max_steps: int = 4
    max_step_tokens: int = 6
    checkable: bool = True
    name: str = "toy"
    delimiter: str = ";"
    verified: int = 0

    def problems(self, split: str) -> Sequence[Problem]:  # noqa: ARG002
        return [problem(index) for index in range(4)]

    def split_steps(self, text: str) -> list[str]:
        return [text]

    def check_step(self, problem: Problem, steps: Sequence[str]) -> Verdict | None:  # noqa: ARG002
        if "bad" in steps[-1].split():
            return Verdict(Status.WRONG, 0.0, why="a bad step")
        return None

    def answer(self, problem: Problem, steps: Sequence[str]) -> str | None:  # noqa: ARG002
        last = steps[-1].split()[-1]
        return None if last == "nothing" else last

    def check(self, problem: Problem, answer: str) -> Verdict | None:
        return self._judge(problem, answer) if self.checkable else None

    def verify(self, problem: Problem, answer: str) -> Verdict:
        self.verified += 1
        return self._judge(problem, answer)

    def warmup(self, seed: int) -> Iterator[Example]:
        raise ValueError(f"toy has no warm-up ({seed})")

    def _judge(self, problem: Problem, answer: str) -> Verdict:
        won = answer == problem.reference
        return Verdict(Status.CORRECT if won else Status.WRONG, float(won), extracted=answer)


def problem(index: int = 0) -> Problem:
    return Problem(id=f"toy-{index}", prompt=f"problem {index} :", reference="yes")


@dataclass(frozen=True)
class World:
    """A random tree of steps, a function of `seed`: 2 to 5 next steps of 1 to 4 words, some of which finish."""

    seed: int = 0
    wins: float = 0.3
    """Chance that a finished path answers yes."""
    finish: float = 0.3
    depth: int = 4
    """Every path finishes by then."""

    def script(self, prompt: str, steps: tuple[str, ...]) -> dict[str, float]:
        key = zlib.crc32(" ".join((prompt, *steps)).encode())
        weights: dict[str, float] = {}
        for index in range(2 + int(4 * uniform(self.seed, key, 0))):
            words = [f"w{index}", "x", "y", "z"][: 1 + int(4 * uniform(self.seed, key, 1, index))]
            last = len(steps) + 1 >= self.depth or uniform(self.seed, key, 2, index) < self.finish
            if last:
                won = uniform(self.seed, key, 3, index) < self.wins
                words.append("yes" if won else ("no", "maybe", "nothing")[index % 3])
            elif uniform(self.seed, key, 4, index) < 0.1:
                words += ["bad", ";"]
            else:
                words.append(";")
            weights[" ".join(words)] = 0.05 + uniform(self.seed, key, 5, index)
        total = math.fsum(weights.values())
        return {text: w / total for text, w in weights.items()}

    def value(self, prompt: str, steps: tuple[str, ...]) -> float:
        return uniform(self.seed, zlib.crc32(" ".join((prompt, *steps)).encode()), 6)

    def engine(self, **options: object) -> ScriptedEngine:
        return ScriptedEngine(self.script, self.value, **options)  # type: ignore[arg-type]


def run_one(engine: ScriptedEngine, task: ToyTask, search: Search) -> SearchResult:
    (result,) = Driver(engine, task).run([search])
    return result


def fingerprint(result: SearchResult) -> tuple[object, ...]:
    """Everything of a result but the columns that may depend on timing."""
    tree = result.tree
    columns = {name: [repr(x) for x in array.tolist()] for name, array in tree.arrays().items()}
    steps = [None if s is None else (s.text, s.token_ids.tolist(), s.logprobs.tolist()) for s in tree.steps]
    usage = (result.usage.sampled, result.usage.discarded)
    return (result.problem.id, result.answer, result.ended, result.chosen, result.candidates, usage, columns,
            repr(steps), tuple(tree.played))  # fmt: skip
