"""`selfplay grade`: a verdict with its reason per row, the totals, and one sentence for everything that is wrong."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from selfplay import cli
from tests.mcts.hostile_programs import MISSING

ROWS = [
    {"gold": "#### 18", "prediction": r"so it is \boxed{18}", "expected": True},
    {"gold": "18", "prediction": "17"},
    {"gold": "18", "prediction": "<think>18", "expected": True},
    {"gold": "18", "prediction": r"\boxed{18} but also \boxed{19}", "expected": False},
    {"gold": "18", "prediction": "many"},
]


def grade(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["selfplay", "grade", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    return path


def test_rows_get_a_status_and_a_reason_and_totals_follow(
    file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = grade(capfd, monkeypatch, file, "--verifier", "number")
    lines = out.splitlines()
    assert code == 0
    assert [line.split("\t")[1] for line in lines[:-1]] == [
        "correct",
        "wrong",
        "unparsable",
        "unparsable",
        "unparsable",
    ]
    assert "the thinking block is not closed  (not as expected)" in lines[2]
    assert "several boxes differ" in lines[3]
    assert lines[-1] == "rows 5, correct 1, wrong 1, unparsable 3, timeout 0, error 0, agree 2, judged 3"


def test_json_holds_every_row_and_the_totals(
    file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = grade(capfd, monkeypatch, file, "--verifier", "number", "--json")
    report = json.loads(out)
    assert [row["row"] for row in report["rows"]] == [1, 2, 3, 4, 5]
    assert report["rows"][0]["rule"] == "boxed"
    assert report["rows"][1]["rule"] == "whole"
    assert report["totals"]["agree"] == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"gold": "1"}', "row 2 of .*: the field 'prediction' is missing"),
        ('{"gold": "1", "prediction": 1}', "row 2 of .*: the field 'prediction' must be text"),
        ("[1, 2]", "row 2 of .* is no object"),
        ("{", "row 2 of .* is no JSON"),
        ('{"gold": "1", "prediction": "1", "expected": "yes"}', "row 2 of .*'expected' must be true or false"),
    ],
)
def test_a_bad_row_is_named_by_its_number(
    tmp_path: Path, text: str, sentence: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"gold": "1", "prediction": "1"}\n' + text, encoding="utf-8")
    code, out, err = grade(capfd, monkeypatch, path, "--verifier", "number")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert re.search(sentence, err)


def test_a_missing_file_and_an_unknown_verifier_are_one_sentence(
    file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = grade(capfd, monkeypatch, file.with_name("nowhere"), "--verifier", "number")
    assert code == 2
    assert "No such file" in err
    code, _, err = grade(capfd, monkeypatch, file, "--verifier", "nmber")
    assert code == 2
    assert "there is no verifier 'nmber': did you mean 'number'?" in err


def test_a_program_is_judged_whatever_markers_gold_or_its_text_hold(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if MISSING:
        pytest.skip(MISSING)
    gold = json.dumps([{"input": "the answer is 5", "output": "#### 7"}])
    program = "#### it returns a constant\ndef solve(text):\n    return '#### 7'\n"
    rows = [program, f"<think>hm</think>So:\n```python\n{program}```\n#### done", f"<think>{program}", "return 7"]
    path = tmp_path / "programs.jsonl"
    path.write_text("\n".join(json.dumps({"gold": gold, "prediction": row}) for row in rows), encoding="utf-8")
    code, out, _ = grade(capfd, monkeypatch, path, "--verifier", "program", "--json")
    found = [(row["status"], row["rule"]) for row in json.loads(out)["rows"]]
    assert code == 0
    assert found == [("correct", "program"), ("correct", "program"), ("unparsable", ""), ("unparsable", "")]
