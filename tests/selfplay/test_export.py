"""Exports: rows worked out by hand from hand-made trees, files that `datasets` loads, and the head as a model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from mcts.types import Kind, SearchResult, Status, Stop, Verdict
from selfplay import cli
from selfplay.export import ExportError, export_path, find_joiner
from tests.models import make_policy
from tests.selfplay.trace_samples import lost_search, random_search, shard, step, won_search

Row = dict[str, Any]
PROMPT = "3 7 12 -> 33 :"
GOOD, BAD = " 7 * 3 = 21 | 12 21 ;", " 12 - 3 = 9 | 7 9 ;"
WIN, LOSS = " 21 + 12 = 33", " 7 + 9 = 16"
FORMATS = ("sft", "preference", "stepwise", "prm")


def chat_search(problem: str = "q0") -> SearchResult:
    """`won_search` asked as a chat."""
    won = won_search(problem)
    messages = ({"role": "system", "content": "Reach it."}, {"role": "user", "content": PROMPT})
    return replace(won, problem=replace(won.problem, prompt=messages))


def exported(tmp_path: Path, form: str, results: Sequence[SearchResult], **settings: Any) -> list[Row]:
    """The rows of a JSONL export."""
    out = tmp_path / "out" / f"{form}.jsonl"
    export_path(shard(tmp_path / "run", results), form, out, **settings)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_sft_rows_are_the_verified_wins_as_the_policy_wrote_them(tmp_path: Path) -> None:
    assert exported(tmp_path, "sft", [won_search(), lost_search()]) == [{"prompt": PROMPT, "completion": GOOD + WIN}]


def test_a_preference_pair_is_the_best_sibling_against_the_worst_after_the_path_to_them(tmp_path: Path) -> None:
    assert exported(tmp_path, "preference", [won_search()]) == [{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}]
    result = won_search()
    tree = result.tree
    for text, won in (("12 + 21 = 33", True), ("21 - 12 = 9", False), ("12 * 21 = 252", False)):
        node = tree.add(1, step(text, 0.5, Stop.EOS), prior=0.1)
        tree.close(node, Verdict(Status.CORRECT if won else Status.WRONG, float(won), "9"), "9")
    below = [row for row in exported(tmp_path / "deep", "preference", [result], gap=1.0) if row["prompt"] != PROMPT]
    assert below == [{"prompt": PROMPT + GOOD, "chosen": WIN, "rejected": " 21 - 12 = 9"}]


def test_the_gap_is_the_least_difference_that_makes_a_pair(tmp_path: Path) -> None:
    """The search backed up 0.75 and 1.0 at the good step, 0.25 and 0.0 at the bad one: 0.875 against 0.125."""
    assert len(exported(tmp_path / "a", "preference", [won_search()], gap=0.75, value="search")) == 1
    with pytest.raises(ExportError, match="lower --gap"):
        exported(tmp_path / "b", "preference", [won_search()], gap=0.76, value="search")


def test_steps_are_labelled_by_the_verified_wins_below_them(tmp_path: Path) -> None:
    rows = exported(tmp_path, "stepwise", [won_search()])
    assert rows == [
        {"prompt": PROMPT, "completions": [GOOD.strip(), WIN.strip()], "labels": [True, True]},
        {"prompt": PROMPT, "completions": [BAD.strip(), LOSS.strip()], "labels": [False, False]},
    ]


def test_a_step_that_only_a_timeout_hangs_below_is_not_judged(tmp_path: Path) -> None:
    result = won_search()
    tree = result.tree
    open_end = tree.add(1, step("21 - 12 = 9 | 9 ;", 0.5), prior=0.1)
    late = tree.add(open_end, step("9 + 9 = 18", 0.5, Stop.EOS), prior=0.1)
    tree.close(late, Verdict(Status.TIMEOUT, 0.0, "18"), "18")
    assert len(exported(tmp_path, "stepwise", [result, lost_search(status=Status.ERROR)])) == 2
    with pytest.raises(ExportError, match="none has a finished path with a verdict"):
        exported(tmp_path / "none", "stepwise", [lost_search(status=Status.TIMEOUT)])


def test_prm_values_are_the_share_of_drawn_chains_that_won(tmp_path: Path) -> None:
    """A second end below the good step, drawn three times and lost: one win in four chains."""
    result = won_search()
    node = result.tree.add(1, step("21 - 12 = 9", 0.5, Stop.EOS), prior=0.1, draws=3)
    result.tree.close(node, Verdict(Status.WRONG, 0.0, "9"), "9")
    rows = {row["completions"][-1]: row["values"] for row in exported(tmp_path, "prm", [result])}
    assert rows == {WIN: [0.25, 1.0], " 21 - 12 = 9": [0.25, 0.0], LOSS: [0.0, 0.0]}
    found = exported(tmp_path / "q", "prm", [won_search()], value="search")
    assert [row["values"] for row in found] == [[0.875, 1.0], [0.125, 0.0]]


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_conditioned_on_other_nodes_is_left_out_with_all_below_it(tmp_path: Path, form: str) -> None:
    result = won_search()
    result.tree.context[1] = (2,)
    rest = json.dumps(exported(tmp_path, form, [result, won_search("q1")]))
    assert rest.count("21 + 12 = 33") == (0 if form == "preference" else 1), "the second search's own row"
    result.tree.context[1], result.tree.kind[1] = None, Kind.REVISION
    with pytest.raises(ExportError):
        exported(tmp_path / "sft", "sft", [result])


def test_a_chat_stays_messages_and_its_pairs_share_the_beginning(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Reach it."}, {"role": "user", "content": PROMPT}]

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = exported(tmp_path / "a", "sft", [chat_search()])
    assert rows == [{"prompt": prompt, "completion": said((GOOD + WIN)[1:])}]
    result = chat_search()
    node = result.tree.add(1, step("21 - 12 = 9", 0.5, Stop.EOS), prior=0.1)
    result.tree.close(node, Verdict(Status.WRONG, 0.0, "9"), "9")
    pair = exported(tmp_path / "b", "preference", [result])[1]
    assert pair == {
        "prompt": prompt,
        "chosen": said((GOOD + WIN)[1:]),
        "rejected": said((GOOD + " 21 - 12 = 9")[1:]),
    }


def test_a_chat_becomes_text_through_its_tokenizer_special_tokens_included(tmp_path: Path) -> None:
    policy = make_policy()
    policy.tokenizer.save_pretrained(tmp_path / "tokenizer")
    result = chat_search()
    result.tree.prompt_ids = np.array([1, 6, 1], dtype=np.int32)
    rows = exported(tmp_path / "a", "stepwise", [result], tokenizer=tmp_path / "tokenizer")
    assert rows[0]["prompt"] == policy.tokenizer.decode([1, 6, 1])
    assert "<eos>" in rows[0]["prompt"]
    with pytest.raises(ExportError, match="give --tokenizer"):
        exported(tmp_path / "b", "prm", [result])


def test_one_file_holds_text_or_chats_and_not_both(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="filter with --where"):
        exported(tmp_path, "sft", [chat_search(), won_search()])
    assert not list((tmp_path / "out").iterdir())


def test_equal_rows_are_written_once_and_counted(tmp_path: Path) -> None:
    out = tmp_path / "out" / "data.jsonl"
    found = export_path(shard(tmp_path, [won_search("a"), won_search("b"), lost_search()]), "sft", out)
    assert (found.rows, found.repeated, found.traces, found.given, found.problems) == (1, 1, 3, 2, 1)
    assert len(out.read_text().splitlines()) == 1


def test_the_filter_is_that_of_inspect(tmp_path: Path) -> None:
    results = [won_search("a", sampled=40), lost_search(sampled=200)]
    assert len(exported(tmp_path / "a", "stepwise", results)) == 3
    assert len(exported(tmp_path / "b", "stepwise", results, where="not won and sampled > 100")) == 1
    with pytest.raises(ExportError, match="no trace matches"):
        exported(tmp_path / "c", "stepwise", results, where="sampled > 1000")
    assert not (tmp_path / "c" / "out").exists()


def test_what_stands_between_steps_is_read_off_a_won_trace_before_the_task_is_asked(tmp_path: Path) -> None:
    won = shard(tmp_path / "won", [lost_search(), won_search()], joiner="\n\n", task="their.own.Task")
    assert find_joiner(won, "their.own.Task") == "\n\n"
    lost = shard(tmp_path / "lost", [lost_search()])
    assert find_joiner(lost, "countdown") == " "
    strange = shard(tmp_path / "strange", [lost_search()], task="their.own.Task")
    with pytest.raises(ExportError, match="give it as --joiner"):
        export_path(strange, "prm", tmp_path / "prm.jsonl")
    export_path(strange, "prm", tmp_path / "prm.jsonl", joiner="")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("chat", [False, True])
def test_datasets_loads_every_format_from_both_kinds_of_file_and_the_card(
    tmp_path: Path, form: str, chat: bool
) -> None:
    from datasets import load_dataset

    make_policy().tokenizer.save_pretrained(tmp_path / "tokenizer")
    traces = shard(tmp_path, [(chat_search if chat else won_search)()])
    for suffix, kind in ((".parquet", "parquet"), (".jsonl", "json")):
        out = tmp_path / suffix[1:] / f"data{suffix}"
        made = export_path(traces, form, out, tokenizer=tmp_path / "tokenizer")
        rows = load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache")).to_list()
        assert len(rows) == made.rows
        if suffix == ".parquet":
            parquet = rows
        else:
            assert rows == parquet == [json.loads(line) for line in out.read_text().splitlines()]
    # a folder with its card, as the hub would hold it
    folder = load_dataset(str(tmp_path / "parquet"), form, split="train", cache_dir=str(tmp_path / "cache"))
    assert folder.to_list() == parquet


def test_the_card_says_how_the_rows_were_made_and_counts_them(tmp_path: Path) -> None:
    out = tmp_path / "out" / "data.parquet"
    export_path(shard(tmp_path, [won_search(), lost_search()]), "stepwise", out, where="sampled > 0")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["configs"] == [{"config_name": "stepwise", "data_files": "data.parquet"}]
    assert "trl" in header["tags"]
    for part in ("run-1", "sampled > 0", "| rows | 3 |", "| steps labelled true | 2 |", "| steps labelled false | 4 |"):
        assert part in card
    assert pyarrow.parquet.read_metadata(out).num_rows == 3
    first = card
    out.unlink()
    export_path(tmp_path, "stepwise", out, where="sampled > 0")
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == first, "the same export, the same card"


def test_nothing_that_is_there_is_overwritten(tmp_path: Path) -> None:
    traces = shard(tmp_path, [won_search()])
    out = tmp_path / "out" / "sft.parquet"
    export_path(traces, "sft", out)
    with pytest.raises(ExportError, match="exists already"):
        export_path(traces, "sft", out)
    with pytest.raises(ExportError, match=r"folder of its own, such as --out .*/out/prm/prm\.parquet"):
        export_path(traces, "prm", tmp_path / "out" / "prm.parquet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "dpo"}, "choose one of sft, preference"),
        ({"gap": 0.0}, "above 0"),
        ({"gap": math.nan}, "above 0"),
        ({"value": "best"}, "choose one of verified, search"),
        ({"out": "rows.csv"}, "parquet or .jsonl"),
        ({"path": "empty"}, "no traces below"),
    ],
)
def test_a_wrong_setting_is_one_sentence(tmp_path: Path, changes: Row, message: str) -> None:
    (tmp_path / "empty").mkdir()
    settings: Row = {"path": shard(tmp_path, [won_search()]), "form": "sft", "out": "rows.jsonl", **changes}
    path, form, out = settings.pop("path"), settings.pop("form"), settings.pop("out")
    with pytest.raises(ExportError, match=message):
        export_path(tmp_path / path, form, tmp_path / out, **settings)


def test_any_tree_the_store_holds_can_be_exported(tmp_path: Path) -> None:
    """Odd text, nulls, contexts: every row of every format has the columns and lengths of its schema."""
    texts = [r for r in (random_search(seed, 30) for seed in range(60)) if isinstance(r.problem.prompt, str)]
    traces = shard(tmp_path, texts)
    for form in FORMATS:
        for suffix in (".parquet", ".jsonl"):
            for value in ("verified", "search"):
                out = tmp_path / f"{form}{suffix}{value}" / f"rows{suffix}"
                assert export_path(traces, form, out, value=value, joiner="", gap=0.01).rows > 0


def test_the_command_writes_a_file_and_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = shard(tmp_path, [won_search()])
    out = tmp_path / "o" / "sft.jsonl"
    monkeypatch.setattr("sys.argv", ["selfplay", "export", str(traces), "--format", "sft", "--out", str(out), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["rows"] == 1
    for extra, message in (
        ([], "exists already"),
        (["--approximate"], "is for prm-model"),
        (["--format", "prm-model", "--where", "won"], "leave it out"),
    ):
        monkeypatch.setattr(
            "sys.argv", ["selfplay", "export", str(traces), "--format", "sft", "--out", str(out), *extra]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
