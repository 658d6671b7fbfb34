"""`inspect` on a run whose trees newer weights scored again, and on the side files themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfplay.export import export_path
from selfplay.inspect import InspectError, inspect_path
from selfplay.shards import ShardError, commit, iter_rows, list_shards, shard_path, write_pending
from selfplay.side_rows import KIND, SIDE_SCHEMA, join, side_path
from selfplay.tree_rows import Row
from tests.selfplay.test_damage import flip
from tests.selfplay.test_inspect import shown
from tests.selfplay.trace_samples import METADATA, small_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "run")


def side_of(row: Row, version: int, value: float) -> Row:
    names = ("logprobs", "prior", "value_sum", "target")
    nodes = [{**{name: node[name] for name in names}, "raw_value": value} for node in row["nodes"]]
    ids = {"trace_id": row["trace_id"], "policy_version": version, "value_version": version}
    return {**ids, "error": None, "nodes": nodes}


def score(shard: Path, version: int = 7, value: float = 0.5, change: Callable[[list[Row]], Any] = len) -> list[Row]:
    """Write a side file in which each node has `value`, changed; its rows."""
    rows = [side_of(row, version, value) for row in iter_rows(shard)]
    change(rows)
    facts = {**METADATA, "kind": KIND, "version": str(version), "weights": "abc"}
    write_pending(side_path(shard, version), rows, facts, columns=SIDE_SCHEMA)
    return rows


def by_place(rows: list[Row]) -> None:
    """Another value at each node; at one of them the shard's."""
    for row in rows:
        for place, node in enumerate(row["nodes"]):
            node["raw_value"] = None if place == 2 else 0.125 * place


def test_the_figures_by_newer_weights_are_those_of_traces_that_hold_their_values(run: Path, tmp_path: Path) -> None:
    first, second = list_shards(run)
    score(first, 4)
    rows = score(first, 7, change=by_place)  # the newest counts
    before, after = inspect_path(run).data["summary"]
    assert before["newer"] == {"versions": [7], "searches": 3, "value": before["newer"]["value"]}
    assert after["newer"] is None
    joined = [join(*pair) for pair in zip(iter_rows(first), rows, strict=True)]
    write_pending(tmp_path / "pending.arrow", joined, METADATA)
    commit(tmp_path / "pending.arrow", shard_path(tmp_path / "joined", 1, 0))
    wanted = inspect_path(tmp_path / "joined").data["summary"][0]["value"]
    assert before["newer"]["value"] == wanted != before["value"]
    score(second, 8)
    assert inspect_path(second).data["summary"][0]["newer"]["versions"] == [8]


def test_the_filter_admits_rows_as_played(run: Path) -> None:
    score(list_shards(run)[0])
    (row,) = inspect_path(run, where="won and iteration == 1").data["summary"]
    assert row["newer"]["searches"] == 1


def test_what_newer_weights_did_not_value_is_left_out(run: Path) -> None:
    first, second = list_shards(run)
    score(first, change=lambda rows: rows[0].update(nodes=None, error="too long"))
    score(second, change=lambda rows: [row.update(value_version=None) for row in rows])
    before, after = inspect_path(run).data["summary"]
    assert (before["newer"]["searches"], after["newer"]) == (2, None)


def test_the_table_is_shown_where_there_are_side_files(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "newer weights" not in shown(inspect_path(run))
    shard = list_shards(run)[0]
    score(shard)
    assert "Value by newer weights" in shown(inspect_path(run))
    monkeypatch.chdir(shard.parent)
    assert "Value by newer weights" in shown(inspect_path(Path(shard.name)))


def test_side_files_themselves_are_said_to_hold_no_traces(run: Path, tmp_path: Path) -> None:
    score(list_shards(run)[0])
    side = side_path(list_shards(run)[0], 7)
    shutil.copy(side, tmp_path / "mine.arrow")
    says = r"\.arrow holds no traces, only what newer weights say of some .*; give the run: `selfplay inspect`"
    for path in (run / KIND, side.parent, side, tmp_path / "mine.arrow"):
        for options in ({}, {"trace": "a"}, {"sample": 1}, {"where": "won"}):
            with pytest.raises(ShardError, match=says):
                inspect_path(path, **options)  # type: ignore[arg-type]
        with pytest.raises(ShardError, match=says):
            export_path(path, "sft", tmp_path / "out.jsonl")


def test_side_files_whose_traces_are_gone_are_no_traces(run: Path) -> None:
    score(list_shards(run)[0])
    shutil.rmtree(run / "traces")
    with pytest.raises(InspectError, match="no traces below"):
        inspect_path(run)


def test_a_damaged_or_foreign_side_file_is_named(run: Path) -> None:
    first, second = list_shards(run)
    score(first)
    side_path(second, 7).parent.mkdir()
    shutil.copy(side_path(first, 7), side_path(second, 7))
    with pytest.raises(ShardError, match=r"iteration=00002/part-00000\.arrow does not belong to its shard"):
        inspect_path(run)
    score(second, change=lambda rows: rows[0]["nodes"].pop())
    with pytest.raises(ShardError, match=r"does not belong to its shard \(a tree has another number of nodes there\)"):
        inspect_path(run)
    flip(side_path(first, 7))
    with pytest.raises(ShardError, match=r"damaged.*or delete it and `selfplay reanalyse` makes it again"):
        inspect_path(run)
