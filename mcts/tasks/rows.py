"""Problem files: rows out of JSON, one clear sentence for a bad one, and splits that never mix."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcts.registry import nearest
from mcts.tasks.base import TaskSettingError
from mcts.tasks.settings import TextSettings

SPLITS = ("train", "dev", "heldout")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "dev": "dev", "valid": "dev", "validation": "dev",
    "heldout": "heldout", "test": "heldout",
}  # fmt: skip
"""What a file's stem or a split column may say -> the split."""
SUFFIXES = (".jsonl", ".json")
_PLACE = re.compile(r"\{\{|\}\}|\{([^\W\d][\w .-]*)\}")
"""An escaped brace, or a named place of a template: letters of any script, digits, "_", "-", "." and blanks, the first
a letter or "_". Other braces (LaTeX has many) are plain text."""


class BadRow(TaskSettingError):
    """A row that cannot be used; names its file and number. Left out, and said, with `bad_rows: skip`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a file."""

    file: Path
    number: int
    """1 is the first line of a .jsonl file (blank lines count), or the first object of a .json array."""
    columns: Mapping[str, Any]

    def refuse(self, why: str) -> BadRow:
        return BadRow(f"row {self.number} of {self.file}: {why}")

    def text(self, spec: str) -> str:
        """The text of a column, or of a text with {column}s in it. Whole numbers lose their ".0". Raises BadRow where
        a column is not there, empty, or neither text nor a number."""
        if "{" in spec:
            return fill(spec, lambda name: self.text(name))
        value = self.value(spec)
        if isinstance(value, float) and math.isfinite(value):
            value = int(value) if value == int(value) else value
        elif isinstance(value, bool) or not isinstance(value, int | str):
            raise self.refuse(f"the field {spec!r} must be a text or a number, not {_shown(value)}")
        text = str(value)
        if not text.strip():
            raise self.refuse(f"the field {spec!r} is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise self.refuse(f"the field {spec!r} holds half a character (a lone surrogate)")
        return text

    def value(self, column: str) -> Any:
        if column not in self.columns:
            raise self.refuse(f"there is no field {column!r}{nearest(column, self.columns)}")
        return self.columns[column]

    def has(self, spec: str) -> bool:
        """Whether every column that `spec` needs is there and not null."""
        return all(self.columns.get(name) is not None for name in (places(spec) if "{" in spec else [spec]))


def fill(template: str, look_up: Any) -> str:
    """The template with each {name} replaced by `look_up(name)`, once: what is put in is not looked at again."""

    def put(match: re.Match[str]) -> str:
        name = match.group(1)
        return match.group(0)[0] if name is None else str(look_up(name))

    return _PLACE.sub(put, template)


def places(template: str) -> list[str]:
    """The names in a template, in order of first use."""
    return list(dict.fromkeys(match.group(1) for match in _PLACE.finditer(template) if match.group(1) is not None))


def read_rows(task: str, path: Path) -> list[Row | BadRow]:
    """The rows of a file; a line that is no JSON object comes as the BadRow to raise or to skip.

    Raises TaskSettingError: no such file, not text, no array (.json), or no rows at all.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise TaskSettingError(f"{task}: there is no file {path} (from {Path.cwd()}): correct its path") from error
    except UnicodeDecodeError as error:
        raise TaskSettingError(f"{task}: the file {path} is no text in UTF-8: save it as such") from error
    except OSError as error:
        raise TaskSettingError(f"{task}: the file {path} cannot be read: {error.strerror}") from error
    rows = list(_array(task, path, text) if path.suffix == ".json" else _lines(path, text))
    if not rows:
        raise TaskSettingError(f"{task}: {path} has no rows")
    return rows


def _lines(path: Path, text: str) -> Iterator[Row | BadRow]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: texts may hold U+2028
        if not line.strip():
            continue
        try:
            yield _row(path, number, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield BadRow(f"row {number} of {path}: not valid JSON ({_short(error)})")


def _array(task: str, path: Path, text: str) -> Iterator[Row | BadRow]:
    try:
        objects = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskSettingError(f"{task}: {path} is not valid JSON ({_short(error)})") from error
    if not isinstance(objects, list):
        raise TaskSettingError(f"{task}: {path} must hold one array of objects, not {_shown(objects)}")
    for number, found in enumerate(objects, start=1):
        yield _row(path, number, found)


def _row(path: Path, number: int, found: object) -> Row | BadRow:
    if isinstance(found, dict):
        return Row(path, number, found)
    return BadRow(f"row {number} of {path}: must be a JSON object, not {_shown(found)}")


def _shown(value: object) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


# --- splits ---


def normal(question: str) -> str:
    """What makes two questions the same: letters and digits in order, whatever the case and white space."""
    return " ".join(question.split()).casefold()


def fraction(question: str) -> float:
    """A fixed number in [0, 1) for a question, evenly spread: the same on every machine, whatever else is there."""
    digest = hashlib.sha256(normal(question).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


@dataclass(frozen=True, slots=True)
class Files:
    """Where the rows come from: a file per split, or one file for all of them."""

    by_split: Mapping[str, Path]
    single: Path | None


def find_files(task: str, settings: TextSettings) -> Files:
    """Resolve `path`, `train`, `dev`, `heldout`. Raises TaskSettingError: nothing given, or a folder without them."""
    named = {s: Path(p).expanduser() for s in SPLITS if (p := getattr(settings, s)) is not None}
    if settings.path is None:
        if not named:
            raise TaskSettingError(
                f"{task}: give path (a file, or a folder with train and test files), or train and heldout"
            )
        return Files(named, None)
    path = Path(settings.path).expanduser()
    if not path.is_dir():
        if "heldout" in named and "train" in named:
            raise TaskSettingError(f"{task}: give path or train and heldout, not all of them")
        return Files(named, path)
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        split = SPLIT_NAMES.get(file.stem)
        if split is not None and file.suffix in SUFFIXES:
            if split in found:
                raise TaskSettingError(f"{task}: {found[split]} and {file} are both {split}: name one as {split}")
            found[split] = file
    if not found:
        raise TaskSettingError(f"{task}: the folder {path} has no train.jsonl, dev.jsonl or test.jsonl (or .json)")
    return Files({**found, **named}, None)


def split_of(row: Row, question: str, split: str | None, files: Files, settings: TextSettings) -> str:
    """The split of a row: that of its file (`split`), that of its split field, or by hash."""
    if split is None and settings.split_field is not None:
        said = row.text(settings.split_field)
        found = SPLIT_NAMES.get(said.strip().lower())
        if found is None:
            raise row.refuse(f"the field {settings.split_field!r} must be train, dev or heldout, not {said!r}")
        return found
    where = fraction(question)
    if split is None:
        start = 0.0
        if "heldout" not in files.by_split:
            start = settings.heldout_share
            if where < start:
                return "heldout"
        if "dev" not in files.by_split and where < start + settings.dev_share:
            return "dev"
        return "train"
    if split == "train" and "dev" not in files.by_split and where < settings.dev_share:
        return "dev"
    return split


def limited(questions: Sequence[str], most: int | None) -> list[int]:
    """Indices of at most `most` questions, those of the lowest hash, in their old order."""
    if most is None or most >= len(questions):
        return list(range(len(questions)))
    return sorted(sorted(range(len(questions)), key=lambda k: (fraction(questions[k]), k))[:most])
