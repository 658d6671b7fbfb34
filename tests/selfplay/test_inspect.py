"""What a person or a program is told about a run's traces."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mcts.budget import Usage
from mcts.tree import Tree
from mcts.types import Ended, Problem, SearchResult, Status, Stop, Verdict
from selfplay.inspect import InspectError, Inspection, inspect_path, render_tree
from selfplay.schema import batch_of
from selfplay.shards import ShardError, commit, list_shards, shard_path, write_pending
from selfplay.stats import auc
from selfplay.summary import summarise_shards
from selfplay.trace_stats import BINS, TraceStats, nodes_of_batch, outcomes
from selfplay.traces import to_row
from selfplay.where import WhereError
from tests.selfplay.trace_samples import METADATA, context, lost_search, random_search, small_run, step, won_search


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path)


def shown(inspection: Inspection, width: int = 200) -> str:
    """The view as a terminal without colours shows it; the data must be plain JSON."""
    json.dumps(inspection.data, allow_nan=False)
    out = io.StringIO()
    Console(file=out, width=width).print(inspection.renderable)
    return out.getvalue()


def test_summary_counts_each_iteration(run: Path) -> None:
    first, second = inspect_path(run).data["summary"]
    assert first["iteration"] == 1
    assert (first["searches"], first["problems"], first["solved"], first["wins"]) == (3, 3, 1, 1)
    assert first["sampled_tokens"] == first["tokens_per_win"] == 440
    assert first["verdicts"] == {"correct": 1, "timeout": 1, "wrong": 1}
    assert first["ended"] == {"budget": 2, "solved": 1}
    assert first["nodes"] == pytest.approx(11 / 3)
    assert first["depth"] == 2
    assert first["branching"] == pytest.approx(8 / 7)  # 4 + 2 + 2 steps below 3 + 2 + 2 nodes
    assert first["repeat_draws"] == pytest.approx(2 / 10)
    assert (second["solved"], second["wins"], second["tokens_per_win"]) == (2, 2, 140)


def test_tokens_that_a_server_never_told_of_are_shown_beside_those_sampled(run: Path) -> None:
    assert "uncounted" not in shown(inspect_path(run))
    result = replace(won_search("q2"), usage=Usage(sampled=40, calls=4, uncounted_calls=2, uncounted_tokens=96))
    write_pending(run / "pending" / "3.arrow", [to_row(result, context(iteration=3))], METADATA)
    commit(run / "pending" / "3.arrow", shard_path(run, 3, 0))
    found = inspect_path(run)
    rows = [(row["uncounted_calls"], row["uncounted_tokens"]) for row in found.data["summary"]]
    assert rows == [(0, 0), (0, 0), (2, 96)]
    assert "uncounted" in shown(found)
    assert "≤ 96" in shown(found)
    said = summarise_shards(list_shards(run)).metrics()
    assert (said["uncounted_calls"], said["uncounted_tokens"]) == (2, 96)


def test_value_figures_compare_the_raw_value_with_the_outcome_below(run: Path) -> None:
    value = inspect_path(run).data["summary"][0]["value"]
    # valued inner nodes: .75 above a win, .25 and .5 above a loss; the third tree's timeout says nothing
    assert value["nodes"] == 3
    assert value["brier"] == pytest.approx((0.25**2 + 0.25**2 + 0.5**2) / 3)
    assert value["ece"] == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    assert value["auc"] == 1.0
    assert value["auc_by_depth"] == {1: 1.0}


def naive_outcome(row: dict[str, Any], node: int) -> tuple[float, bool]:
    """`outcomes` by walking every descendant."""
    below = {node}
    for n, other in enumerate(row["nodes"]):
        if other["parent"] in below:
            below.add(n)
    ends = [row["nodes"][n] for n in below if row["nodes"][n]["terminal"]]
    judged = [n for n in ends if n["verdict"] in ("correct", "wrong", "unparsable")]
    weight = sum(n["draws"] for n in judged)
    mean = sum(n["draws"] * n["reward"] for n in judged) / weight if weight else math.nan
    return mean, any(n["verdict"] == "correct" for n in ends)


def test_figures_of_random_trees_equal_those_of_a_naive_count() -> None:
    rows = [to_row(random_search(i, 25), context(iteration=i % 2)) for i in range(40)]
    batch = batch_of(rows)
    mean, won = outcomes(nodes_of_batch(batch))
    naive = [naive_outcome(row, n) for row in rows for n in range(len(row["nodes"]))]
    np.testing.assert_allclose(mean, [m for m, _ in naive])
    assert won.tolist() == [w for _, w in naive]

    stats = TraceStats()
    stats.add(batch.slice(0, 13))
    stats.add(batch.slice(13))
    for iteration, figures in enumerate(stats.rows()):
        valued = []
        for row in rows[iteration::2]:
            parents = {node["parent"] for node in row["nodes"]}
            for n, node in enumerate(row["nodes"]):
                outcome = naive_outcome(row, n)
                if n in parents and node["raw_value"] is not None and not math.isnan(outcome[0]):
                    valued.append((node["depth"], node["raw_value"], *outcome))
        value = figures["value"]
        assert value["nodes"] == len(valued) > 20
        assert value["brier"] == pytest.approx(sum((v - m) ** 2 for _, v, m, _ in valued) / len(valued))
        gaps = [sum(v - m for _, v, m, _ in valued if int(v * BINS) == b) for b in range(BINS)]
        assert value["ece"] == pytest.approx(sum(map(abs, gaps)) / len(valued))
        for depth, figure in value["auc_by_depth"].items():
            here = [(v, w) for d, v, _, w in valued if d == depth]
            expected = auc([v for v, _ in here], [w for _, w in here])
            assert figure == pytest.approx(expected) or (figure is None and math.isnan(expected))
        steps = sum(len(row["nodes"]) - 1 for row in rows[iteration::2])
        inner = sum(len({n["parent"] for n in row["nodes"]} - {-1}) for row in rows[iteration::2])
        assert figures["branching"] == pytest.approx(steps / inner)


def test_figures_that_cannot_be_computed_are_null(tmp_path: Path) -> None:
    empty = Tree(np.arange(2, dtype=np.int32), "prompt")
    failed = SearchResult(
        Problem("p", "prompt"), "mcts", {}, empty, (), None, None, None, Usage(), 0, 0, Ended.FAILED, error="died"
    )
    write_pending(tmp_path / "a.arrow", [to_row(failed, context())], METADATA)
    (row,) = inspect_path(tmp_path / "a.arrow").data["summary"]
    assert (row["tokens_per_win"], row["branching"], row["repeat_draws"]) == (None, None, None)
    assert row["value"] == {"nodes": 0, "brier": None, "ece": None, "auc": None, "auc_by_depth": {}}
    assert row["verdicts"] == {"none": 1}
    assert "died" in shown(inspect_path(tmp_path, trace=""))


def test_a_run_a_folder_and_a_shard_can_be_inspected(run: Path) -> None:
    assert inspect_path(run).data == inspect_path(run / "traces").data
    assert inspect_path(run / "traces" / "iteration=00002").data["matching"] == 3
    assert inspect_path(list_shards(run)[0]).data["matching"] == 3


def test_the_list_is_filtered_sorted_and_cut(run: Path) -> None:
    def problems(**options: Any) -> list[tuple[str, int]]:
        return [(t["problem_id"], t["sampled"]) for t in inspect_path(run, **options).data["traces"]]

    assert len(problems()) == 6
    assert problems(limit=2) == [("q0", 40), ("p0", 200)]
    assert problems(limit=0) == []
    assert problems(where="won and sampled < 60") == [("q0", 40), ("q0", 20)]
    assert problems(where="won", sort="sampled") == [("q0", 20), ("q0", 40), ("q1", 60)]
    assert problems(where="won", sort="-sampled", limit=2) == [("q1", 60), ("q0", 40)]
    assert problems(where="won", sort="-sampled", limit=None) == [("q1", 60), ("q0", 40), ("q0", 20)]
    assert problems(sort="solution")[0][0].startswith("q")
    assert problems(sort="-solution")[-1][0].startswith("p")  # null stays last
    assert problems(sort="-nodes", limit=1)[0][0].startswith("q")
    assert problems(sort="meta.target", limit=1)
    assert problems(sort="settings.nothing", limit=1)
    assert problems(where="sampled > 10000") == []


def test_the_filter_holds_for_the_summary_too(run: Path) -> None:
    found = inspect_path(run, where="not won")
    assert [row["wins"] for row in found.data["summary"]] == [0, 0]
    assert found.data["matching"] == 3
    assert "Traces, 3 of 3" in shown(found)


def test_a_trace_is_drawn_as_a_tree_with_the_chosen_path_marked(run: Path) -> None:
    listed = inspect_path(run, where="won").data["traces"][0]
    found = inspect_path(run, trace=listed["trace_id"][:12])
    assert found.data["trace"]["trace_id"] == listed["trace_id"]
    assert found.data["trace"]["meta"]["target"] == 33
    assert found.data["trace"]["seed"] == 2**64 - 1
    assert found.data["trace"]["nodes"][1]["q"] == 0.875
    lines = shown(found).splitlines()
    tree = lines[next(i for i, line in enumerate(lines) if line.startswith("*")) :]
    assert [line.rstrip() for line in tree] == [
        "* 3 7 12 -> 33 :  visits 4 · raw - · q 0.50",
        "├── * 7 * 3 = 21 | 12 21 ;  visits 2 · prior 0.50 · raw 0.75 · q 0.88 · draws 3 · target 0.75",
        "│   └── * 21 + 12 = 33  visits 1 · prior 0.50 · raw 0.88 · q 1.00  correct (33)",
        "└──   12 - 3 = 9 | 7 9 ;  visits 2 · prior 0.25 · raw 0.25 · q 0.12 · target 0.25",
        "    └──   7 + 9 = 16  visits 1 · prior 0.50 · raw 0.12 · q 0.00  wrong (16)",
    ]


def test_a_search_that_was_just_run_is_drawn_alike(run: Path) -> None:
    listed = inspect_path(run, where="won").data["traces"][0]
    stored = shown(inspect_path(run, trace=listed["trace_id"]))
    fresh = shown(Inspection({}, render_tree(won_search())))
    assert stored.endswith(fresh)


def test_a_narrow_terminal_loses_no_verdict(run: Path) -> None:
    listed = inspect_path(run, where="won").data["traces"][0]
    narrow = shown(inspect_path(run, trace=listed["trace_id"]), width=40)
    assert "correct" in narrow
    assert "wrong" in narrow


def test_figures_fit_a_terminal_of_80_columns(tmp_path: Path) -> None:
    rows = [to_row(won_search(f"problem-{i}", sampled=10**6), context(iteration=12)) for i in range(3)]
    write_pending(tmp_path / "a.arrow", rows, METADATA)
    text = shown(inspect_path(tmp_path), width=80)
    for word in (
        "iter ",
        "tokens/win",
        "1000000",
        "3000000",
        "33.3%",
        "AUC by depth",
        "correct",
        rows[0]["trace_id"][:10],
    ):
        assert word in text


def test_text_of_a_model_cannot_drive_the_terminal(tmp_path: Path) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07[red]markup[/red]\r\u202eback\nline"
    tree = Tree(np.arange(2, dtype=np.int32), hostile)
    node = tree.add(0, step(hostile, 0.5, Stop.EOS))
    tree.close(node, Verdict(Status.CORRECT, 1.0, hostile), hostile)
    tree.backup(node, 1.0)
    result = SearchResult(
        Problem(hostile, hostile, hostile),
        hostile,
        {"x": hostile},
        tree,
        (node,),
        node,
        hostile,
        Verdict(Status.CORRECT, 1.0),
        Usage(),
        0,
        0,
        Ended.SOLVED,
        error=hostile,
    )
    write_pending(tmp_path / "a.arrow", [to_row(result, context())], METADATA)
    for options in ({}, {"trace": ""}, {"sample": 1}):
        text = shown(inspect_path(tmp_path, **options))  # type: ignore[arg-type]
        assert not set(text) & {"\x1b", "\x07", "\r", "\u202e"}
        assert "\\x1b[2J" in text
    assert "[red]" in text


def test_a_sample_shows_random_wins_in_full(run: Path) -> None:
    found = inspect_path(run, sample=10)
    assert found.data["wins"] == 3
    assert len(found.data["samples"]) == 3
    assert all(trace["verdict"] == "correct" for trace in found.data["samples"])
    text = shown(inspect_path(run, sample=1, seed=1))
    assert "7 * 3 = 21 | 12 21 ;" in text
    assert "21 + 12 = 33" in text
    assert "12 - 3" not in text
    picked = [inspect_path(run, sample=1, seed=s).data["samples"][0]["trace_id"] for s in range(30)]
    assert len(set(picked)) == 3
    assert picked[4] == inspect_path(run, sample=1, seed=4).data["samples"][0]["trace_id"]
    only = inspect_path(run, sample=5, where="problem_id == 'q1' or sampled == 200").data["samples"]
    assert [trace["problem_id"] for trace in only] == ["q1"]


def test_the_same_search_in_two_shards_is_one_trace(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pending(tmp_path / f"{name}.arrow", [to_row(won_search(), context())], METADATA)
    assert inspect_path(tmp_path, trace="").data["trace"]["problem_id"] == "q0"
    assert len(inspect_path(tmp_path, sample=5).data["samples"]) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trace": "zzz"}, InspectError, "no trace below"),
        ({"trace": ""}, InspectError, "5 traces|6 traces"),
        ({"sample": -1}, InspectError, "at least one win"),
        ({"sample": 1, "trace": "a"}, InspectError, "not for both"),
        ({"sample": 1, "where": "sampled > 999"}, InspectError, "no search below .* won among"),
        ({"limit": -1}, InspectError, "must not be negative"),
        ({"sort": "smapled"}, WhereError, "did you mean sampled"),
        ({"where": "won ="}, WhereError, "character 5"),
    ],
)
def test_what_cannot_be_shown_is_said(run: Path, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        inspect_path(run, **options)


def test_an_empty_or_damaged_store_is_said(tmp_path: Path) -> None:
    with pytest.raises(InspectError, match="no traces below"):
        inspect_path(tmp_path)
    with pytest.raises(ShardError, match="does not exist"):
        inspect_path(tmp_path / "absent")
    small_run(tmp_path)
    shard = list_shards(tmp_path)[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ShardError, match="damaged"):
        inspect_path(tmp_path)


def test_losses_alone_are_no_wins(tmp_path: Path) -> None:
    write_pending(tmp_path / "a.arrow", [to_row(lost_search(), context())], METADATA)
    with pytest.raises(InspectError, match="won"):
        inspect_path(tmp_path, sample=1)
