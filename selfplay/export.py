"""Traces for other trainers: `selfplay export` to Parquet or JSONL in TRL's columns, with a dataset card beside it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Protocol

import pyarrow as pa
from pyarrow import parquet

from mcts.tasks import TASKS
from selfplay.errors import UserError
from selfplay.export_card import CARD, card_text, owns_card
from selfplay.export_rows import COLUMNS, ROWS, VALUES, RowSettings, TraceText, read_joiner
from selfplay.shards import iter_rows, iter_traces, list_shards, read_metadata
from selfplay.traces import CHAT, from_row
from selfplay.tree_rows import Row
from selfplay.where import Predicate, parse_where

FORMATS: Final = tuple(ROWS)
_GROUP: Final = 1024
"""Rows of a Parquet row group, and of what is held in memory."""
_MESSAGES: Final = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class ExportError(UserError):
    """Nothing to export, or nowhere to put it; the message is one sentence that says what to do."""


@dataclass(slots=True)
class Export:
    """What was exported and how: what the card states."""

    format: str
    file: str
    """Name of the file, without its folder."""
    settings: RowSettings
    where: str | None
    rows: int = 0
    traces: int = 0
    """Traces that the filter admitted."""
    given: int = 0
    """Of those, the traces that gave at least one row, repeated rows included."""
    repeated: int = 0
    """Rows left out because an equal one was there already."""
    problems: int = 0
    """Problems that gave a row."""
    chat: bool = False
    tasks: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    """Ids of the runs that the shards name."""
    labels: dict[str, int] = field(default_factory=dict)
    """stepwise: how many steps are labelled true and false."""
    joiners: dict[str, str] = field(default_factory=dict)
    """Per task, what stands before a step."""
    sha256: str = ""
    """Of the file."""

    def data(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "file": self.file,
            "rows": self.rows,
            "traces": self.traces,
            "traces_with_rows": self.given,
            "repeated": self.repeated,
            "problems": self.problems,
            "chat": self.chat,
            "tasks": self.tasks,
            "runs": self.runs,
            "where": self.where,
            "gap": self.settings.gap,
            "value": self.settings.value,
            **({"labels": self.labels} if self.labels else {}),
            "sha256": self.sha256,
        }


def export_path(
    path: Path,
    form: str,
    out: Path,
    *,
    where: str | None = None,
    gap: float = 0.5,
    value: str = "verified",
    joiner: str | None = None,
    tokenizer: Path | None = None,
) -> Export:
    """Write the traces below `path` (a run, a folder of shards, one shard) to `out` (.parquet or .jsonl) in `form`, one
    of FORMATS, and `README.md` beside it. Equal rows are written once; order is that of the shards.

    `where` filters traces as `inspect` does; `gap` and `value`: see RowSettings; `joiner`: what the task puts between
    two steps, None to read it off a won trace or the task; `tokenizer`: folder of the tokenizer that sent chat prompts,
    which stepwise and prm rows hold as text, None for the run's. The files appear when they are whole.

    Raises ExportError: a wrong setting, nothing to export, `out` exists, or another dataset's card is in the way.
    """
    _check(path, form, out, gap, value)
    predicate = parse_where(where) if where is not None else None
    export = Export(form, out.name, RowSettings(gap, value), where)
    export.runs = sorted({read_metadata(shard)["run_id"] for shard in list_shards(path)})
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        _write(temporary, out.suffix, _rows(path, predicate, export, joiner, tokenizer), export)
        if not export.rows:
            raise ExportError(_empty(export))
        export.sha256 = _sha256(temporary)
        (out.parent / CARD).write_text(card_text(export.data(), export.joiners), encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    finally:
        temporary.unlink(missing_ok=True)
    return export


def _check(path: Path, form: str, out: Path, gap: float, value: str) -> None:
    if form not in ROWS:
        raise ExportError(f"there is no format {form!r}; choose one of {', '.join(FORMATS)}, prm-model")
    if value not in VALUES:
        raise ExportError(f"there is no value {value!r}; choose one of {', '.join(VALUES)}")
    if not 0.0 < gap <= 1.0:
        raise ExportError(f"the gap between siblings must be above 0 and at most 1, not {gap}")
    if out.suffix not in (".parquet", ".jsonl"):
        raise ExportError(f"{out} names no format; let it end in .parquet or .jsonl")
    if out.exists():
        raise ExportError(f"{out} exists already; move it away or choose another --out")
    card = out.parent / CARD
    if card.exists() and not owns_card(card.read_text(encoding="utf-8", errors="replace"), out.name):
        own = out.parent / form / out.name
        raise ExportError(f"{card} describes something else; export into a folder of its own, such as --out {own}")
    home = next(folder for folder in out.absolute().parents if folder.exists())
    if not home.is_dir():
        raise ExportError(f"cannot write {out}: {home} is no folder; choose another --out")
    if not path.exists():
        raise ExportError(f"{path} does not exist; give a run folder, a folder of shards or one shard")
    if not list_shards(path):
        raise ExportError(f"no traces below {path} yet; wait for the first unit of the run, or check the path")


def _empty(export: Export) -> str:
    if not export.traces:
        return f"no trace matches {export.where!r}; loosen --where" if export.where else "there are no traces to export"
    hint = {
        "sft": "none of them won",
        "preference": f"no two siblings are {export.settings.gap} apart in value; lower --gap",
        "stepwise": "none has a finished path with a verdict",
        "prm": "none has a step with a value; try --value search",
    }[export.format]
    return f"{export.traces} traces give no {export.format} row: {hint}"


def _rows(
    path: Path, where: Predicate | None, export: Export, joiner: str | None, tokenizer: Path | None
) -> Iterator[Row]:
    """Distinct rows, counted in `export`."""
    decode: Callable[[list[int]], str] | None = None
    seen: set[bytes] = set()
    problems: set[str] = set()
    labels: Counter[bool] = Counter()
    for number, row in enumerate(iter_rows(path, where, COLUMNS)):
        trace = from_row(row)
        export.traces += 1
        if trace.task not in export.joiners:
            export.joiners[trace.task] = find_joiner(path, trace.task) if joiner is None else joiner
            export.tasks = sorted(export.joiners)
        if decode is None and export.format in ("stepwise", "prm") and trace.settings.get(CHAT):
            decode = _decoder(path if tokenizer is None else tokenizer)
        text = TraceText(trace, export.joiners[trace.task], decode)
        if number and text.chat != export.chat:
            raise ExportError(
                "some prompts are chat messages and some are text; one file holds one kind, so filter with --where "
                "(for example on task)"
            )
        export.chat = text.chat
        given = False
        for made in ROWS[export.format](text, export.settings):
            given = True
            key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).digest()
            if key in seen:
                export.repeated += 1
                continue
            seen.add(key)
            problems.add(trace.problem_id)
            if export.format == "stepwise":
                labels.update(made["labels"])
            export.rows += 1
            yield made
        export.given += given
    export.problems = len(problems)
    if labels:
        export.labels = {"true": labels[True], "false": labels[False]}


def _decoder(path: Path) -> Callable[[list[int]], str]:
    """Token ids to text, special tokens kept, by the tokenizer of a run or in a folder."""
    from mcts.engines.model import read_tokenizer
    from selfplay.source import find_source

    folder = find_source(str(path)).policy if (path / "run.json").exists() else path
    if not (folder / "tokenizer_config.json").is_file():
        raise ExportError(f"chat prompts become text through their tokenizer, and {folder} has none; give --tokenizer")
    tokenizer = read_tokenizer(folder)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def find_joiner(path: Path, task: str) -> str:
    """What `task` puts between two steps: read off the first won trace below `path` that tells, else what the task's
    class says. Raises ExportError where neither does."""
    same = Predicate("task", ("task",), lambda row: row["task"] == task)
    for trace in iter_traces(path, same, ["solution", "path", "nodes.parent", "nodes.text"]):
        found = read_joiner(trace)
        if found is not None:
            return found
    module, _, name = TASKS.get(task, task).rpartition(".")
    try:
        stated = getattr(getattr(importlib.import_module(module), name), "joiner", None) if module else None
    except (ImportError, AttributeError):
        stated = None
    if not isinstance(stated, str):
        raise ExportError(f"the traces do not tell what task {task} puts between two steps; give it as --joiner")
    return stated


class _Writer(Protocol):
    def add(self, rows: list[Row]) -> None: ...

    def close(self) -> None: ...


class _Jsonl:
    def __init__(self, path: Path) -> None:
        self._file: IO[str] = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by close

    def add(self, rows: list[Row]) -> None:
        self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = parquet.ParquetWriter(path, schema, compression="zstd")

    def add(self, rows: list[Row]) -> None:
        self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _write(path: Path, suffix: str, rows: Iterator[Row], export: Export) -> None:
    writer: _Writer | None = None
    try:
        group: list[Row] = []
        for row in rows:
            if writer is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                writer = _Jsonl(path) if suffix == ".jsonl" else _Parquet(path, schema(export.format, export.chat))
            group.append(row)
            if len(group) == _GROUP:
                writer.add(group)
                group = []
        if writer is not None and group:
            writer.add(group)
    finally:
        if writer is not None:
            writer.close()


def schema(form: str, chat: bool) -> pa.Schema:
    """Arrow schema of a format; messages are lists of {role, content}."""
    words = _MESSAGES if chat else pa.string()
    return pa.schema(
        {
            "sft": [("prompt", words), ("completion", words)],
            "preference": [("prompt", words), ("chosen", words), ("rejected", words)],
            "stepwise": [
                ("prompt", pa.string()),
                ("completions", pa.list_(pa.string())),
                ("labels", pa.list_(pa.bool_())),
            ],
            "prm": [
                ("prompt", pa.string()),
                ("completions", pa.list_(pa.string())),
                ("values", pa.list_(pa.float64())),
            ],
        }[form]
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
