"""A run that learns from reanalysed traces repeats itself, whatever was left of an interrupted phase; the command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from selfplay import cli
from selfplay.config import ConfigError
from selfplay.doctor import examine
from selfplay.executor import InlineExecutor
from selfplay.loop import Loop
from selfplay.reanalyse import reanalyse_path
from selfplay.run_folder import RunFolder, read_metrics
from selfplay.s3 import Bucket
from selfplay.shards import iter_traces, list_shards
from selfplay.side_rows import side_path
from selfplay.store import local_copy, whole_copy
from tests.selfplay.tiny_run import tiny_config

SETTINGS = ("learn.objective={name: alphazero, value_mix: 0.5}", "learn.window=2")


def go(run: RunFolder) -> None:
    executor = InlineExecutor(run.config, run.place)
    try:
        Loop(run, executor, lambda _: None).go()
    finally:
        executor.close()
        run.close("ended")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    path = tmp_path_factory.mktemp("reanalysed") / "run"
    go(RunFolder.create(path, tiny_config(*SETTINGS, "learn.reanalyse=true")))
    return path


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob(pattern)) if p.is_file()}


def test_the_window_is_scored_by_the_weights_that_learn_and_how_stale_it_was_is_told(run: Path) -> None:
    first = list_shards(run, first=1, last=1)
    assert sorted(contents(run / "reanalysis", "*")) == [
        str(side_path(s, 1).relative_to(run / "reanalysis")) for s in first
    ]
    assert [row.get("trained_staleness") for row in read_metrics(run)] == [None, 0.0, 0.5]
    assert list((run / "pending").iterdir()) == []


def test_reanalysis_changes_what_is_learned(run: Path, tmp_path: Path) -> None:
    go(RunFolder.create(tmp_path / "plain", tiny_config(*SETTINGS)))
    weights = [contents(path / "checkpoints", "*.safetensors") for path in (run, tmp_path / "plain")]
    assert [name for name in weights[0] if weights[0][name] != weights[1][name]] == [
        "00002/policy/model.safetensors",
        "00002/value_head.safetensors",
    ]


@pytest.mark.parametrize("kept", ["all", "some", "none"])
def test_a_phase_done_again_gives_the_same_bits_whatever_was_left_of_it(run: Path, tmp_path: Path, kept: str) -> None:
    killed = tmp_path / "run"
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "checkpoints" / "00002")
    lines = (killed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (killed / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    sides = sorted((killed / "reanalysis").rglob("*.arrow"))
    for side in {"all": [], "some": sides[1:], "none": sides}[kept]:
        side.unlink()
    (killed / "pending" / "torn.arrow").write_bytes(b"half")
    go(RunFolder.open(killed))
    for folder, pattern in (("checkpoints", "*.safetensors"), ("reanalysis", "*.arrow")):
        assert contents(killed / folder, pattern) == contents(run / folder, pattern)
    assert list((killed / "pending").iterdir()) == []


def test_reanalysis_under_a_sharded_model_is_refused() -> None:
    sharded = "cluster={executor: ray, learners: 2, sharding: fsdp2}"
    tiny_config(sharded)
    with pytest.raises(ConfigError, match=r"leave out learn\.reanalyse or the sharding"):
        tiny_config(sharded, "learn.reanalyse=true")


def test_the_command_scores_a_run_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["selfplay", "reanalyse", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    code, out, err = command(copy, "--json", "--last", 1)
    assert code == 0, err
    report = json.loads(out)
    assert (report["version"], report["shards"], report["made"]) == (2, 3, 3)
    assert err.splitlines()[-1] == "3 of 3 shards"
    assert json.loads(command(copy, "--json")[1])["made"] == 3  # those of iteration 1
    assert "made: 0" in command(copy)[1]
    assert json.loads((copy / "heartbeat.json").read_text(encoding="utf-8"))["state"] == "ended"
    assert {trace.value_version for trace in iter_traces(copy, reanalysed="latest")} == {2}
    assert {trace.value_version for trace in iter_traces(copy, reanalysed=2)} == {2}
    assert reanalyse_path(copy, checkpoint=1).made == 3  # the phase left the other half
    first = reanalyse_path(copy, checkpoint=0)
    assert (first.shards, first.made, first.newer) == (3, 3, 3)  # version 1 played iteration 2
    assert list(examine(copy)) == []
    code, _, err = command(copy, "--checkpoint", 9)
    assert (code, err) == (2, f"error: {copy} has no checkpoint 9; it keeps 0, 1, 2\n")
    code, _, err = command(tmp_path)
    assert (code, err) == (
        2,
        f"error: {tmp_path} holds no run (no run.json); give the folder that `selfplay launch` named\n",
    )


def test_a_run_in_object_storage_is_scored_there(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go(RunFolder.create(s3_url, tiny_config("iterations=1", "evaluate.samples=0")))

    def command(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["selfplay", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr()

    assert json.loads(command("reanalyse", s3_url, "--json")[0])["made"] == 3
    names = [found.key for found in Bucket(s3_url).list("reanalysis/")]
    assert names == [f"reanalysis/version=00001/iteration=00001/part-{part:05d}.arrow" for part in range(3)]
    (row,) = json.loads(command("inspect", s3_url, "--json")[0])["summary"]
    assert (row["newer"]["versions"], row["newer"]["searches"]) == ([1], row["searches"])
    assert "holds no traces, only what newer weights say" in command("inspect", f"{s3_url}/reanalysis")[1]
    monkeypatch.setenv("SELFPLAY_CACHE", str(local_copy(s3_url, "run.json").parent / "other-node"))
    assert list(examine(whole_copy(s3_url))) == []


def test_the_command_and_the_phase_write_the_same_bytes(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "reanalysis")
    reanalyse_path(copy, checkpoint=1)
    wanted = contents(run / "reanalysis", "*.arrow")
    assert wanted.items() <= contents(copy / "reanalysis", "*.arrow").items()
