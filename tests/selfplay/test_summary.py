"""What an iteration's play amounts to: the same, read from shards or sent along with the units."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from selfplay import loop
from selfplay.executor import Done, InlineExecutor
from selfplay.run_folder import RunFolder
from selfplay.shards import list_shards, shard_path, write_pending
from selfplay.summary import PlaySummary, merge, summarise_shards
from selfplay.worker import Played
from tests.selfplay.tiny_run import tiny_config
from tests.selfplay.trace_samples import METADATA, rows_of


def test_the_summaries_of_shards_merge_into_the_summary_of_all(tmp_path: Path) -> None:
    shards = [shard_path(tmp_path, 1, part) for part in range(3)]
    for part, shard in enumerate(shards):
        write_pending(shard, rows_of(part + 2), METADATA)
    whole = summarise_shards(shards)
    assert whole.problem_ids
    assert merge(summarise_shards([shard]) for shard in shards) == whole
    assert merge([]) == PlaySummary()


def test_a_merged_summary_tells_of_the_first_failure() -> None:
    a, b = PlaySummary(failed=1, failure="first"), PlaySummary(failed=2, failure="second")
    assert merge([PlaySummary(), a, b]) == PlaySummary(failed=3, failure="first")


class Forgetful(InlineExecutor):
    """Its workers send no summary along, as those of lone problems."""

    def poll(self, seconds: float) -> list[Done]:
        return [
            Played(done.unit, done.pending, done.seconds) if isinstance(done, Played) else done
            for done in super().poll(seconds)
        ]


@pytest.mark.parametrize("kind", [InlineExecutor, Forgetful])
def test_a_driver_reads_only_those_shards_for_which_it_was_sent_no_summary(
    kind: type[InlineExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def reading(shards: Iterable[Path]) -> PlaySummary:
        read.extend(found := list(shards))
        return summarise_shards(found)

    monkeypatch.setattr(loop, "summarise_shards", reading)
    config = tiny_config("evaluate.samples=0", "iterations=1")
    run = RunFolder.create(tmp_path / "run", config)
    executor = kind(config, run.place)
    try:
        rows: list[dict[str, Any]] = loop.Loop(run, executor, lambda _: None).go()
    finally:
        executor.close()
        run.close()
    shards = list_shards(tmp_path / "run")
    assert len(shards) == 3
    assert read == ([] if kind is InlineExecutor else shards)
    said = summarise_shards(shards).metrics()
    assert {name: rows[-1][name] for name in said} == said
