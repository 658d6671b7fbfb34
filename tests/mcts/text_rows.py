"""Small problem files for the tests of the text tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
"""Public data, where this machine has it."""


def write(path: Path, rows: Sequence[Any]) -> str:
    """The rows as JSON Lines; a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Word problems whose answers all differ: two steps and an answer each."""
    return [
        {
            "question": f"Ann has {k} nuts and finds {k + 3} more. How many has she?",
            "answer": f"She finds {k} + 3 = <<{k}+3={k + 3}>>{k + 3} nuts.\n"
            f"She has {k} + {k + 3} = <<{k}+{k + 3}={2 * k + 3}>>{2 * k + 3} nuts.\n#### {2 * k + 3}",
        }
        for k in range(start, start + count)
    ]


def plain(count: int, start: int = 0) -> list[dict[str, Any]]:
    """The same with the answer in a column of its own."""
    rows = []
    for row in sums(count, start):
        working, _, number = row["answer"].partition("\n#### ")
        rows.append({"question": row["question"], "working": working, "answer": int(number)})
    return rows


def gsm8k_folder(folder: Path, train: int = 40, test: int = 10) -> str:
    write(folder / "train.jsonl", sums(train))
    write(folder / "test.jsonl", sums(test, start=1000))
    return str(folder)
