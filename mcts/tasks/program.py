"""The model writes a Python function from examples of its inputs and outputs; ARC grids are the first such problems.

A file holds one problem per line, `{"task_id": ..., "train": [{"input": ..., "output": ...}], "test": [...]}`, with any
JSON values. The training pairs stand in the prompt and need no secret: `check` runs the program on them. The outputs of
the test pairs are gold: `verify` runs it on those.

A step is a line (or, with a blank line as delimiter, a block). A single step is never judged: whether a prefix of a
program can still become one is not to be told soundly (an open bracket, a `try` without its `except`, a string over
several lines), and a run costs more than the next line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mcts.tasks.arithmetic import whole_number
from mcts.tasks.base import Example, TaskError, TaskSettingError
from mcts.types import Problem, Verdict
from mcts.verify.sandbox_program import Pair, ProgramVerifier, are_pairs

SPLITS = ("train", "dev", "heldout")
PROMPT = """Write a Python function solve(x) that turns every input into its output.
Only the standard library is at hand.
{notes}
{examples}
{inputs}
Program:
"""
GRID_NOTE = "A grid is a list of rows, each row a list of whole numbers from 0 to 9 (colours)."
_FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_SOLVE = re.compile(r"^(?:def\s+solve\b|solve\s*=|from\b.*\bsolve\b|import\b.*\bsolve\b)", re.MULTILINE)


class Program:
    """Settings: the file, the splits, the shape of a step, and the limits of a program."""

    name = "program"
    joiner = ""

    def __init__(
        self,
        path: str | None = None,
        heldout_path: str | None = None,
        dev_share: float = 0.1,
        heldout_share: float = 0.2,
        seed: int = 0,
        max_prompt: int | None = None,
        show_test_inputs: bool = True,
        delimiter: str = "\n",
        max_steps: int = 48,
        max_step_tokens: int = 64,
        solutions: str | None = None,
        sandbox: str = "namespaces",
        cpu_seconds: int = 5,
        wall_seconds: float = 20.0,
        memory_mb: int = 256,
        output_kb: int = 256,
        cache: int = 4096,
        partial: float = 0.0,
    ) -> None:
        """Files are read when problems are asked for: a worker, which is sent its problems, needs no copy.
        path: JSON Lines, or a folder of .json files each named after its problem (as ARC publishes them).
        heldout_path: the held-out problems, else a share of `path` chosen by a hash of seed and id.
        max_prompt: problems whose prompt has more characters are left out of every split.
        solutions: JSON Lines of task_id and program, worked examples for the warm-up.
        sandbox and the limits: see `ProgramVerifier`."""
        name = self.name
        for key, share in (("dev_share", dev_share), ("heldout_share", heldout_share)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                raise TaskSettingError(f"{name}: {key} must be a number from 0 to below 1, not {share!r}")
        if dev_share + heldout_share >= 1:
            raise TaskSettingError(f"{name}: dev_share and heldout_share leave nothing to train on: lower them")
        if delimiter not in ("\n", "\n\n"):
            raise TaskSettingError(
                f"{name}: delimiter must be one newline (a line) or two (a block), not {delimiter!r}"
            )
        for key, text in (("path", path), ("heldout_path", heldout_path), ("solutions", solutions)):
            if text is not None and not isinstance(text, str):
                raise TaskSettingError(f"{name}: {key} must be the path of a file, not {text!r}")
        self.path, self.heldout_path, self.solutions = path, heldout_path, solutions
        self.files = tuple(file for file in (path, heldout_path, solutions) if file is not None)
        self.delimiter = delimiter
        self.max_steps = whole_number(name, "max_steps", max_steps, 1, 10**4)
        self.max_step_tokens = whole_number(name, "max_step_tokens", max_step_tokens, 1, 10**5)
        self.max_prompt = None if max_prompt is None else whole_number(name, "max_prompt", max_prompt, 1, 10**9)
        if not isinstance(show_test_inputs, bool):
            raise TaskSettingError(f"{name}: show_test_inputs must be true or false, not {show_test_inputs!r}")
        self.show_test_inputs = show_test_inputs
        self._shares = float(heldout_share), float(dev_share)
        self._seed = whole_number(name, "seed", seed, 0, 2**63 - 1)
        self.verifier = ProgramVerifier(sandbox, cpu_seconds, wall_seconds, memory_mb, output_kb, cache, partial)
        self._splits: dict[str, tuple[Problem, ...]] | None = None

    def vocabulary(self) -> list[str]:
        raise TaskSettingError(f"{self.name}: programs are open text, so no fresh model can be built: give model.path")

    # --- problems ---

    def problems(self, split: str) -> Sequence[Problem]:
        """In the order of the file. Raises TaskSettingError for an empty split, SandboxError where programs could not
        be run on this host: better now than in the middle of a search."""
        if split not in SPLITS:
            raise TaskSettingError(f"{self.name} has no split {split!r}: choose one of {', '.join(SPLITS)}")
        self.verifier.sandbox.require()
        if self._splits is None:
            self._splits = self._load()
        if not self._splits[split]:
            raise TaskSettingError(f"{self.name}: no problem is in the split {split!r}: raise its share or max_prompt")
        return self._splits[split]

    def _load(self) -> dict[str, tuple[Problem, ...]]:
        if self.path is None:
            raise TaskSettingError(f"{self.name}: give path, a JSON Lines file of problems or a folder of .json files")
        found: dict[str, list[Problem]] = {split: [] for split in SPLITS}
        seen: set[str] = set()
        for path, fixed in ((self.path, None), (self.heldout_path, "heldout")):
            for where, task_id, row in () if path is None else read_rows(path):
                if task_id in seen:
                    raise TaskSettingError(f"{where}: the id {task_id!r} is there twice: give every problem its own")
                seen.add(task_id)
                problem = self._problem(task_id, row["train"], row["test"])
                if self.max_prompt is None or len(str(problem.prompt)) <= self.max_prompt:
                    found[fixed or self.split_of(task_id)].append(problem)
        return {split: tuple(problems) for split, problems in found.items()}

    def split_of(self, task_id: str) -> str:
        """A function of seed and id alone: other rows of the file move nothing."""
        digest = hashlib.sha256(f"{self._seed}:{task_id}".encode()).digest()
        chance = int.from_bytes(digest[:8], "big") / 2**64
        heldout, dev = self._shares
        if self.heldout_path is not None:
            heldout = 0.0
        return "heldout" if chance < heldout else "dev" if chance < heldout + dev else "train"

    def _problem(self, task_id: str, train: Sequence[Pair], test: Sequence[Pair]) -> Problem:
        inputs = [pair["input"] for pair in test]
        return Problem(
            id=f"{self.name}-{task_id}",
            prompt=self._prompt(train, inputs),
            reference=json.dumps(list(test)) if test else None,
            meta={"task_id": task_id, "train": list(train), "test_inputs": inputs},
        )

    def _prompt(self, train: Sequence[Pair], inputs: Sequence[object]) -> str:
        grids = all(map(is_grid, [*inputs, *(pair[key] for pair in train for key in ("input", "output"))]))
        examples = [
            f"Example {k}\nInput:\n{render(pair['input'])}\nOutput:\n{render(pair['output'])}\n"
            for k, pair in enumerate(train, start=1)
        ]
        further = [f"A further input:\n{render(value)}\n" for value in inputs] if self.show_test_inputs else []
        notes = f"{GRID_NOTE}\n" if grids else ""
        return PROMPT.format(notes=notes, examples="\n".join(examples), inputs="\n".join(further))

    def read(self, text: str) -> Problem:
        """A JSON object with train and, where the gold outputs are known, test."""
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TaskError(
                f'{self.name}: write a problem as {{"train": [{{"input": ..., "output": ...}}]}}'
            ) from error
        if not isinstance(row, dict) or not are_pairs(row.get("train")):
            raise TaskError(f"{self.name}: a problem needs train, a list of pairs with input and output")
        test = row.get("test", [])
        if test and not are_pairs(test):
            raise TaskError(f"{self.name}: test must be a list of pairs with input and output")
        digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12]
        return self._problem(str(row.get("task_id", digest)), row["train"], test)

    def vary(self, problem: Problem, seed: int) -> Problem:
        """The training pairs in another order."""
        train = self._train(problem)
        order = np.random.default_rng(seed).permutation(len(train)).tolist()
        shuffled = [train[k] for k in order]
        return Problem(
            id=problem.id,
            prompt=self._prompt(shuffled, problem.meta["test_inputs"]),
            reference=problem.reference,
            meta={**problem.meta, "train": shuffled},
        )

    # --- judging ---

    def split_steps(self, text: str) -> list[str]:
        """Cut after each delimiter; a blank piece stays with the step before it (at the start, with the one after)."""
        steps: list[str] = []
        for piece in re.findall(rf".*?{self.delimiter}|.+\Z", text, re.DOTALL):
            if steps and (not piece.strip() or not steps[-1].strip()):
                steps[-1] += piece
            else:
                steps.append(piece)
        return steps

    def check_step(self, problem: Problem, steps: Sequence[str]) -> Verdict | None:  # noqa: ARG002 - the Task's signature
        """Always None; the head of this file says why."""
        return None

    def answer(self, problem: Problem, steps: Sequence[str]) -> str | None:  # noqa: ARG002 - the Task's signature
        """The last fenced block that names `solve`, else the whole text where that does; after a thinking block."""
        return program_in("".join(steps))

    def check(self, problem: Problem, answer: str) -> Verdict:
        """Run the program on the training pairs."""
        return self.verifier.judge(self._train(problem), answer)

    def verify(self, problem: Problem, answer: str) -> Verdict:
        """Run the program on the test pairs. Raises TaskError for a problem without."""
        if problem.reference is None:
            raise TaskError(f"problem {problem.id} has no test pairs: only its training pairs can be checked")
        return self.verifier.verify(problem.reference, answer)

    def _train(self, problem: Problem) -> Sequence[Pair]:
        train = problem.meta.get("train")
        if not are_pairs(train):
            raise TaskError(f"problem {problem.id} has no training pairs in its meta: read it with this task")
        pairs: Sequence[Pair] = train  # type: ignore[assignment]
        return pairs

    # --- warm-up ---

    def warmup(self, seed: int) -> Iterator[Example]:
        """The solutions of training problems in random order, over and over; none that fails its own problem."""
        if self.solutions is None:
            raise TaskSettingError(
                f"{self.name}: there are no worked examples: set warmup.steps to 0, or give solutions, a file of them"
            )
        known = {problem.meta["task_id"]: problem for problem in self.problems("train")}
        worked = []
        for where, row in _json_lines(Path(self.solutions)):
            text = row.get("program")
            if not isinstance(text, str) or not isinstance(row.get("task_id"), str):
                raise TaskSettingError(f"{where}: a solution needs task_id and program, two texts")
            problem = known.get(row["task_id"])
            if problem is None:
                continue  # of another split: it must not be learned from
            if not (self.check(problem, text).won and self.verify(problem, text).won):
                raise TaskSettingError(f"{where}: the program does not solve {row['task_id']}: mend or drop it")
            worked.append((problem, tuple(self.split_steps(text))))
        if not worked:
            raise TaskSettingError(f"{self.name}: {self.solutions} solves no training problem: give solutions that do")
        random = np.random.default_rng(seed)
        while True:
            for k in random.permutation(len(worked)).tolist():
                problem, steps = worked[k]
                yield Example(problem=problem, steps=steps, values=(1.0,) * (1 + len(steps)))


def is_grid(value: object) -> bool:
    """A non-empty list of non-empty rows of digits 0 to 9."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, list) and bool(row) for row in value)
        and all(type(cell) is int and 0 <= cell <= 9 for row in value for cell in row)
    )


def render(value: object) -> str:
    """A grid as rows of digits with spaces between, anything else as JSON."""
    if is_grid(value):
        rows: list[list[int]] = value  # type: ignore[assignment]
        return "\n".join(" ".join(map(str, row)) for row in rows)
    return json.dumps(value)


def program_in(text: str) -> str | None:
    """The program in a finished text, None where there is none (or a thinking block was never closed)."""
    _, closed, rest = text.rpartition("</think>")
    text = rest if closed else text
    if "<think>" in text:
        return None
    blocks = [block for block in _FENCE.findall(text) if _SOLVE.search(block)]
    if blocks:
        return str(blocks[-1])
    return text if _SOLVE.search(text) else None


def read_rows(path: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(where, id, row) of a JSON Lines file or of a folder of .json files, in the order of the lines or names.

    Raises TaskSettingError in one sentence: no such file, or the first row that cannot be used."""
    folder = Path(path)
    if folder.is_dir():
        rows = [(str(file), {"task_id": file.stem, **_parse(str(file), _read(file))}) for file in _files(folder)]
    else:
        rows = list(_json_lines(folder))
    if not rows:
        raise TaskSettingError(f"program: {path} holds no problem")
    for where, row in rows:
        task_id = row.get("task_id", row.get("id"))
        if not isinstance(task_id, str) or not task_id:
            raise TaskSettingError(f"{where}: a problem needs task_id, a text")
        for key in ("train", "test"):
            if not are_pairs(row.get(key)):
                raise TaskSettingError(f"{where}: {key} must be a list of pairs with input and output")
        yield where, task_id, row


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {path}"
            yield where, _parse(where, line)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TaskSettingError(f"program: there is no file {path}: give its path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TaskSettingError(f"program: the file {path} cannot be read as text: {error}") from error


def _parse(where: str, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskSettingError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise TaskSettingError(f"{where} must be a JSON object")
    return row
