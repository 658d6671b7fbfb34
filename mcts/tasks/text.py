"""What the tasks with problems from files share: reading, splits, prompts, steps, answers, worked examples."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mcts.registry import nearest
from mcts.tasks.base import Example, TaskError, TaskSettingError
from mcts.tasks.prompts import Prompts, Shot
from mcts.tasks.rows import SPLITS, BadRow, Row, find_files, limited, normal, places, read_rows, split_of
from mcts.tasks.settings import TextSettings, text_settings
from mcts.tasks.steps import after_thinking, split_text
from mcts.tasks.worked import Worked, apart, drop_repeats, is_number, one_way, worked_examples, wrong_number
from mcts.types import Problem, Status, Verdict
from mcts.verify import load_verifier
from mcts.verify.extract import KINDS, extract

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Data:
    """All rows of a task, by split, in the order of their files."""

    splits: Mapping[str, tuple[Worked, ...]]
    shots: tuple[Shot, ...]
    notes: tuple[str, ...]


class TextTask:
    """A task whose problems are texts in files (a `Task`); see `TextSettings` for what it can be told.

    Files are read when problems are first asked for, so a worker on another machine, which is sent its problems,
    needs no copy of them. Gold answers are in `Problem.reference` and nowhere else. `check` and `check_step` say
    nothing: what is right cannot be told without gold.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings in which the task differs from `TextSettings`."""
    roles: ClassVar[tuple[str, ...]] = ("id", "question", "answer", "solution")
    """What `fields` may name."""
    joiner = ""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.settings: TextSettings = text_settings(name, self.defaults, settings)
        self.delimiter = self.settings.delimiter
        self.max_steps = self.settings.max_steps
        self.max_step_tokens = self.settings.max_step_tokens
        for role in self.settings.fields:
            if role not in self.roles:
                raise TaskSettingError(f"{name}: fields has no role {role!r}{nearest(role, self.roles)}")
        if "{answer}" not in self.settings.final:
            raise TaskSettingError(f"{name}: final must hold {{answer}}, not {self.settings.final!r}")
        if self.settings.kind not in KINDS:
            raise TaskSettingError(f"{name}: kind must be one of {', '.join(KINDS)}, not {self.settings.kind!r}")
        self._files = find_files(name, self.settings)
        self._prompts = Prompts(name, self.settings)
        self._check_hidden()
        self._verifier = load_verifier(**self.settings.verifier)
        self._data: Data | None = None
        self._problems: dict[str, tuple[Problem, ...]] = {}

    # --- what a kind of problem may say differently ---

    def gold(self, row: Row) -> str:
        """The gold answer of a row."""
        return self.canonical(row.text(self._role("answer")).strip())

    def solution(self, row: Row) -> str | None:
        """The worked solution of a row without outer white space; None where it has none."""
        spec = self.settings.fields.get("solution")
        return row.text(spec).strip() if spec is not None and row.has(spec) else None

    def known(self, row: Row) -> Mapping[str, str]:
        """Texts that the template may name beside the row's columns."""
        return {"question": row.text(self._role("question")).strip()}

    def meta(self, row: Row) -> dict[str, Any]:
        """JSON-able facts of a row; never its gold answer or solution."""
        return {"row": row.number}

    def canonical(self, answer: str) -> str:
        """One way to write an answer, so that a majority counts 1,000 and 1000.0 together: plain numbers lose
        thousands commas, a plus sign and zeros behind the decimal point. Anything else stays."""
        return one_way(answer.strip())

    def another_answer(self, worked: Worked, random: np.random.Generator) -> str | None:
        """A wrong answer for certain, None where there is none: a number of the problem's own that is not gold, and
        only where gold is a plain number."""
        return wrong_number(worked.answer, f"{worked.question} {worked.solution or ''}", random)

    def differ(self, first: str, second: str) -> bool:
        """Whether two gold answers are certainly not the same: plain numbers well apart."""
        return is_number(first) and is_number(second) and apart(first, second)

    # --- problems ---

    def vocabulary(self) -> list[str]:
        raise TaskSettingError(f"{self.name}: its texts are open, so no fresh model can be built: give model.path")

    def problems(self, split: str) -> Sequence[Problem]:
        """In the order of the file. Id: the row's own, or task-file-row. Raises TaskSettingError for an empty split."""
        if split not in SPLITS:
            raise TaskSettingError(f"{self.name} has no split {split!r}: choose one of {', '.join(SPLITS)}")
        if split not in self._problems:
            data = self._load()
            if not data.splits[split]:
                raise TaskSettingError(
                    f"{self.name}: there is no problem in the split {split!r}: give it a file, or a larger share"
                )
            self._problems[split] = tuple(self._problem(worked, data.shots) for worked in data.splits[split])
        return self._problems[split]

    def typed(self, problem: Problem) -> str:
        """What a user would type to have `read` make this prompt. Raises TaskError for a problem of another task."""
        found = (w.typed for rows in self._load().splits.values() for w in rows if w.id == problem.id)
        text = next(found, None)
        if text is None:
            raise TaskError(f"{self.name} has no problem {problem.id}")
        return text

    @property
    def files(self) -> tuple[str, ...]:
        """Where the problems are read from."""
        single = [] if self._files.single is None else [self._files.single]
        return tuple(map(str, [*self._files.by_split.values(), *single]))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out of the files, one sentence each."""
        return self._load().notes

    def read(self, text: str) -> Problem:
        """The question; or a JSON object with the columns, where the template needs more than a question."""
        if not text.strip():
            raise TaskError(f"{self.name}: the problem is empty: type its question")
        wanted = self._columns()
        if wanted:
            try:
                columns = json.loads(text)
            except (ValueError, RecursionError):
                columns = None
            if not isinstance(columns, dict):
                raise TaskError(
                    f"{self.name}: write the problem as a JSON object with the fields {', '.join(wanted)} of a row"
                )
            row = Row(Path("the problem"), 1, columns)
            known = self.known(row)
            asked = self._prompts.asked(lambda name: known[name] if name in known else row.text(name))
        else:
            asked = self._prompts.asked(lambda _: text.strip())
        digest = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return Problem(f"{self.name}-asked-{digest}", self._prompts.render(asked, self._shots()))

    def vary(self, problem: Problem, seed: int) -> Problem:  # noqa: ARG002
        """Itself: a question is asked in one way."""
        return problem

    def _problem(self, worked: Worked, shots: Sequence[Shot]) -> Problem:
        return Problem(worked.id, self._prompts.render(worked.asked, shots), worked.answer, worked.meta)

    def _columns(self) -> list[str]:
        """The columns that a prompt is made of, where it is made of more than a question; else empty."""
        names = places(self._prompts.template)
        if set(names) <= {"question"}:
            return []
        specs = [self._role(name) if name in self.roles else name for name in names]
        columns = [column for spec in specs for column in self._parts(spec)]
        return list(dict.fromkeys(columns))

    def _check_hidden(self) -> None:
        """Raise TaskSettingError where every column that gold or a solution is made of is shown in the prompt. A column
        named solution that no field calls so may be shown: a solution to be judged, for example."""
        names = [
            self._role(name) if name in ("question", "options") else name for name in places(self.settings.template)
        ]
        shown = {column for name in names for column in self._parts(name)}
        for role in ("answer", "solution"):
            spec = self._role(role)
            if (role == "answer" or role in self.settings.fields) and shown.issuperset(self._parts(spec)):
                raise TaskSettingError(
                    f"{self.name}: the prompt shows the {role} ({spec}): take it out of template, or of fields.question"
                )

    @staticmethod
    def _parts(spec: str) -> list[str]:
        """The columns that a field is made of."""
        return places(spec) if "{" in spec else [spec]

    def _role(self, role: str) -> str:
        return self.settings.fields.get(role, role)

    def _worked(self, row: Row, label: str, taken: dict[str, Row]) -> Worked:
        """The row as the task sees it. `label` stands for its file in the id; `taken`: ids so far, added to."""
        known = self.known(row)
        question = known["question"]
        spec = self.settings.fields.get("id")
        id = f"{self.name}-{label}-{row.number:05d}" if spec is None else row.text(spec).strip()
        if normal(id) == normal(question):
            raise row.refuse("the id is the question itself: name another field as fields.id, or leave it out")
        if id in taken:
            other = taken[id]
            raise row.refuse(f"the id {id!r} is that of row {other.number} of {other.file} already")
        answer = self.gold(row)
        stated = self.final(answer)
        said = None if "\n" in answer else self.answer_in(stated)
        if said != answer:
            shown = stated if len(stated) <= 80 else stated[:77] + "..."
            kind = self.settings.kind
            what = f"no answer of kind {kind!r}" if said is None else f"another answer ({said[:80]!r})"
            raise row.refuse(f"{what} is read back from {shown!r}: correct it, `kind` or `final`")
        worked = Worked(
            id=id,
            question=question,
            asked=self._prompts.asked(lambda name: known[name] if name in known else row.text(name)),
            typed=json.dumps({c: row.columns[c] for c in columns}) if (columns := self._columns()) else question,
            answer=answer,
            solution=self.solution(row),
            meta=self.meta(row),
        )
        taken[id] = row
        return worked

    def _load(self) -> Data:
        if self._data is None:
            self._data = self._read()
            for note in self._data.notes:
                log.warning("%s: %s", self.name, note)
        return self._data

    def _read(self) -> Data:
        settings, files = self.settings, self._files
        sources: list[tuple[str | None, Path]] = [*files.by_split.items()]
        sources += [] if files.single is None else [(None, files.single)]
        stems = [path.stem for _, path in sources]
        splits: dict[str, list[Worked]] = {split: [] for split in SPLITS}
        taken: dict[str, Row] = {}
        bad: list[BadRow] = []
        for split, path in sources:
            label = path.stem if stems.count(path.stem) == 1 else split or "all"
            for row in read_rows(self.name, path):
                try:
                    if isinstance(row, BadRow):
                        raise row
                    worked = self._worked(row, label, taken)
                    splits[split_of(row, worked.question, split, files, settings)].append(worked)
                except BadRow as refusal:
                    if settings.bad_rows == "error":
                        raise TaskSettingError(f"{self.name}: {refusal}") from refusal
                    bad.append(refusal)
        notes = []
        if bad:
            notes.append(f"{len(bad)} rows left out that cannot be used, the first: {bad[0]}")
        notes += drop_repeats(splits)
        shots, used = self._pick_shots(splits)
        splits["train"] = [w for w in splits["train"] if normal(w.question) not in used]
        kept = {}
        for split in SPLITS:
            rows = splits[split]
            chosen = limited([w.question for w in rows], getattr(settings, f"{split}_problems"))
            kept[split] = tuple(rows[k] for k in chosen)
        return Data(kept, shots, tuple(notes))

    # --- worked examples ---

    def _pick_shots(self, splits: Mapping[str, Sequence[Worked]]) -> tuple[tuple[Shot, ...], set[str]]:
        """The prompt's examples and the questions that they use up."""
        wanted = self.settings.few_shot
        if isinstance(wanted, tuple):
            return self._given_shots(wanted, splits)
        if wanted == 0:
            return (), set()
        rows = [w for w in splits["train"] if self.worked_steps(w)]
        if len(rows) <= wanted:
            raise TaskSettingError(
                f"{self.name}: few_shot asks for {wanted} worked training rows and only {len(rows)} have a solution of "
                f"at most {self.max_steps} steps: lower it, or write the examples into few_shot"
            )
        picks = np.random.default_rng([self.settings.seed, 0x5407]).choice(len(rows), wanted, replace=False).tolist()
        shots = tuple(Shot(rows[k].asked, "".join(self.worked_steps(rows[k]))) for k in picks)
        return shots, {normal(rows[k].question) for k in picks}

    def _given_shots(
        self, given: Sequence[Mapping[str, Any]], splits: Mapping[str, Sequence[Worked]]
    ) -> tuple[tuple[Shot, ...], set[str]]:
        shots = []
        asked = {normal(w.question): split for split in ("dev", "heldout") for w in splits[split]}
        used = set()
        for number, columns in enumerate(given, start=1):
            row = Row(Path("few_shot"), number, columns)
            try:
                worked = self._worked(row, "few_shot", {})
            except BadRow as refusal:
                raise TaskSettingError(f"{self.name}: {refusal}") from refusal
            split = asked.get(normal(worked.question))
            if split is not None:
                raise TaskSettingError(
                    f"{self.name}: few_shot example {number} gives away a problem of {split}: change it"
                )
            steps = self.worked_steps(worked) or [self.final(worked.answer)]
            shots.append(Shot(worked.asked, "".join(steps)))
            used.add(normal(worked.question))
        return tuple(shots), used

    def _shots(self) -> Sequence[Shot]:
        """The prompt's examples; reads the files only where they come from there."""
        return self._load().shots if self.settings.few_shot else ()

    def final(self, answer: str) -> str:
        """The last step of a worked solution."""
        return self.settings.final.replace("{answer}", answer)

    def worked_steps(self, worked: Worked) -> list[str]:
        """The solution as steps, each but the last ending in the delimiter; its last one states the answer behind a
        marker (added where the solution does not). Empty: no solution, one of more than `max_steps` steps, or one that
        names another answer than gold."""
        if worked.solution is None:
            return []
        said = self.answer_in(worked.solution)
        steps = self.split_steps(worked.solution)
        if said != worked.answer:
            steps = self.split_steps(worked.solution + self.delimiter + self.final(worked.answer))
            if self.answer_in("".join(steps)) != worked.answer:
                return []
        return steps if len(steps) <= self.max_steps else []

    def warmup(self, seed: int) -> Iterator[Example]:
        """Worked training rows in random order, for ever, each followed by its `negatives`.

        Labels: 1 after every step of a worked solution. A negative is, with equal chance, the same steps with a wrong
        final answer (0 after the last step alone), or the steps of this row under the question of another one whose
        answer is another (0 after every step). The prompt has no label: a question is neither won nor lost. Where gold
        is no plain number (or letter), two answers may be the same thing written differently: no negatives there.
        Raises TaskSettingError where no training row has a solution.
        """
        data = self._load()
        rows = [(w, steps) for w in data.splits["train"] if (steps := self.worked_steps(w))]
        if not rows:
            raise TaskSettingError(
                f"{self.name}: no training row has a worked solution of at most {self.max_steps} steps: set "
                "warmup.steps: 0 and learn.replay: 0 and give a model that can already answer, or name fields.solution"
            )
        return worked_examples(self, rows, lambda worked: self._problem(worked, data.shots), seed)

    # --- judging ---

    def split_steps(self, text: str) -> list[str]:
        return split_text(text, self.delimiter)

    def check_step(self, problem: Problem, steps: Sequence[str]) -> Verdict | None:  # noqa: ARG002
        return None

    def answer_in(self, text: str) -> str | None:
        """The answer that a text states behind its final answer marker, after any thinking block; None where it states
        none, or several that differ."""
        rest = after_thinking(text, self.settings.thinking)
        found = None if rest is None else extract(rest, self.settings.kind)
        return None if found is None else self.canonical(found.answer)

    def answer(self, problem: Problem, steps: Sequence[str]) -> str | None:  # noqa: ARG002
        return self.answer_in("".join(steps))

    def check(self, problem: Problem, answer: str) -> Verdict | None:  # noqa: ARG002
        return None

    def verify(self, problem: Problem, answer: str) -> Verdict:
        """The verifier's verdict against the reference; `error` for a problem that has none (a user's own question)."""
        if problem.reference is None:
            return Verdict(Status.ERROR, 0.0, answer, "the problem has no gold answer to compare with")
        return self._verifier.verify(problem.reference, answer)
