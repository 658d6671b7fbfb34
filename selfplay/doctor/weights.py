"""The checkpoints: there, whole, and loadable, one in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mcts.engines.model import DamagedModel
from selfplay import checkpoint as checkpoints
from selfplay.doctor.documents import Documents
from selfplay.doctor.findings import RESTORE, Finding
from selfplay.loop import last_good

_NAME = re.compile(r"\d{5,}")


def checkpoint_faults(documents: Documents, note: Callable[[str], None]) -> Iterator[Finding]:
    """Which checkpoint is missing, damaged or cannot be loaded."""
    folder = documents.run / "checkpoints"
    numbers = checkpoints.existing(folder)
    staleness = max((known.play.max_staleness for known in documents.configs), default=0)
    yield from _missing(folder, numbers, documents)
    for number in numbers:
        note(f"checkpoint {number}")
        path = checkpoints.path_of(folder, number)
        where = f"checkpoints/{path.name}"
        try:
            state = checkpoints.load(path, merge=False)[2]
        except (checkpoints.CheckpointError, DamagedModel) as error:
            yield Finding("checkpoint", where, _what(error), f"{RESTORE}, or delete it and go on from the one before")
            continue
        for name in ("iteration", "policy_version"):
            if state.get(name) != number:
                yield Finding("checkpoint", where, f"says {name} {state.get(name)}", f"move it away, {RESTORE}")
        base = state.get("base")
        good = {documents.good(known) for known in range(max(1, number - staleness), number + 1)} if number else {0}
        if base is not None and base != number - 1 and base not in good:
            what = f"was learned from checkpoint {base}, and the one to go on from was {max(good)}"
            yield Finding("versions", where, what, RESTORE)


def _missing(folder: Path, numbers: list[int], documents: Documents) -> Iterator[Finding]:
    """Checkpoints that retention never deletes: the first, the newest, the last good one, the best on dev."""
    rows = documents.metrics
    last = max((row["iteration"] for row in rows), default=-1)
    if last < 0:
        return
    needed = {0: "the first", last: "the newest", last_good(rows, default=last): "the last good one"}
    scored = [row for row in rows if row.get("dev_pass1") is not None]
    if scored:
        needed.setdefault(int(max(scored, key=lambda row: row["dev_pass1"])["iteration"]), "the best on dev")
    for number, why in sorted(needed.items()):
        if number not in numbers:
            what = f"is missing or has no state.json, and it is {why} of this run"
            before = any(other < number for other in numbers)
            cure = f"{RESTORE}, or resume from the one before" if number == last and before else RESTORE
            yield Finding("checkpoint", f"checkpoints/{number:05d}", what, cure)
    newest = max([*numbers, last])
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _NAME.fullmatch(entry.name) and int(entry.name) > newest:
            what = "has no state.json, so it does not exist for resume"
            yield Finding("checkpoint", f"checkpoints/{entry.name}", what, f"{RESTORE}, or delete it")


def _what(error: Exception) -> str:
    """What is wrong, without the cure that the finding gives itself."""
    text = " ".join(str(error).split())
    return text.partition("; ")[0]
