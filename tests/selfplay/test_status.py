"""`selfplay status` says where a run stands from its folder alone, also while the driver is dead or clocks disagree."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from selfplay.cli import app
from selfplay.run_folder import RunError
from selfplay.shards import shard_path
from selfplay.status import SILENT_SECONDS, read_status
from selfplay.store import holds_run
from tests.selfplay.trace_samples import small_run
from tests.selfplay.winning_run import CONFIG, UNITS, build

NOW = 1_800_000_000.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("status") / "run")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in its second iteration, of which one unit with three searches is committed."""
    folder = small_run(tmp_path / "run")
    (folder / "checkpoints").mkdir()
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"id": "abc", "epoch": 4, "packages": {"torch": "2.13"}}))
    rows = [
        {"iteration": 0, "policy_version": 0, "heldout_pass1": 0.25, "heldout_low": 0.2, "heldout_high": 0.3},
        {
            "iteration": 1,
            "policy_version": 1,
            "problems": 20,
            "solved": 0.15,
            "tokens_per_second": 50.0,
            "staleness": 0,
        },
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def beat(run: Path, **facts: Any) -> None:
    whole = {"time": NOW - 1, "phase": "play", "iteration": 2, "done": 1, "total": 3, "state": "running", **facts}
    (run / "heartbeat.json").write_text(json.dumps(whole))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_finished_run_is_said_to_have_ended(finished: Path) -> None:
    found = read_status(finished)
    assert (found.state, found.iteration, found.iterations) == ("ended", 2, 2)
    assert (found.units, found.units_total) == (UNITS, UNITS)
    assert found.searches == found.searches_before == 20
    assert found.wins > 0
    assert found.wins_before > 0
    assert found.heldout is not None
    assert found.heldout["iteration"] == found.checkpoint == 2


def test_the_running_iteration_is_counted_from_its_shards_and_earlier_ones_from_metrics(run: Path) -> None:
    beat(run)
    found = read_status(run, now=NOW)
    assert (found.state, found.phase, found.done, found.total) == ("running", "play", 1, 3)
    assert (found.units, found.units_total, found.wins, found.searches, found.sampled_tokens) == (1, 3, 2, 3, 280)
    assert (found.wins_before, found.searches_before) == (3, 20)
    assert (found.tokens_per_second, found.staleness, found.played_version) == (50.0, 0, 1)
    assert found.heldout == {"iteration": 0, "pass1": 0.25, "low": 0.2, "high": 0.3}


def test_what_the_driver_reports_is_shown(run: Path) -> None:
    beat(
        run,
        workers={"alive": 3, "wanted": 4},
        restarts=2,
        restarts_left=7,
        failed_problems=0,
        leases_lost=1,
        staleness=1,
        tokens_per_second=700.0,
        events=[{"time": NOW - 60, "line": "worker 3 died: its node left; 7 restarts left"}],
    )
    text = "\n".join(read_status(run, now=NOW).lines())
    for words in (
        "3 alive of 4 wanted, 2 restarts (7 left), 1 leases lost, 0 problems given up",
        "700 per second",
        "staleness 1",
        "2027-01-15 07:59:00 UTC worker 3 died: its node left; 7 restarts left",
    ):
        assert words in text


def test_what_nobody_said_is_a_dash(run: Path) -> None:
    text = "\n".join(read_status(run, now=NOW).lines())
    assert "- alive of - wanted, - restarts (- left), - leases lost, - problems given up" in text
    assert "no heartbeat" in text


def test_an_old_heartbeat_means_a_dead_driver_and_says_how_to_go_on(run: Path) -> None:
    beat(run, time=NOW - SILENT_SECONDS - 1, host="elsewhere", pid=7)
    found = read_status(run, now=NOW)
    assert found.state == "dead"
    assert found.says == f"driver dead since 2027-01-15 07:59:39 UTC; go on with: selfplay resume {run}"


def test_a_process_that_is_gone_is_dead_at_once_on_its_own_host(run: Path) -> None:
    beat(run, host=socket.gethostname(), pid=dead_pid())
    assert read_status(run, now=NOW).state == "dead"


def test_a_process_that_lives_and_does_not_beat_is_silent(run: Path) -> None:
    beat(run, time=NOW - 100, host=socket.gethostname(), pid=os.getpid())
    found = read_status(run, now=NOW)
    assert found.state == "silent"
    assert f"process {os.getpid()} lives on this host" in found.says


@pytest.mark.parametrize("state", ["interrupted", "failed"])
def test_a_run_that_stopped_says_so_however_old_its_heartbeat(run: Path, state: str) -> None:
    beat(run, time=NOW - 1e6, state=state)
    found = read_status(run, now=NOW)
    assert found.state == state
    assert found.says.startswith(f"{state} at 2027-01-03")
    assert f"selfplay resume {run}" in found.says


def test_a_heartbeat_from_a_clock_ahead_is_said_and_not_counted_backwards(run: Path) -> None:
    beat(run, time=NOW + 300, beat=17, host="elsewhere")
    found = read_status(run, now=NOW)
    assert found.state == "unknown"
    assert "300 s ahead of this machine's clock" in found.says
    assert "beat 17" in found.says
    text = "\n".join(found.lines())
    assert "-300" not in text
    assert "ahead of this machine's clock  (elsewhere" in text


def test_clocks_that_differ_by_less_than_a_second_are_not_mentioned(run: Path) -> None:
    beat(run, time=NOW + 0.5)
    found = read_status(run, now=NOW)
    assert found.state == "running"
    assert ", 0 s ago" in "\n".join(found.lines())


def test_a_damaged_shard_is_named_and_the_others_are_counted(run: Path) -> None:
    shutil.copy(shard_path(run, 2, 0), shard_path(run, 2, 1))
    shard_path(run, 2, 0).write_bytes(b"ARROW1")
    beat(run)
    found = read_status(run, now=NOW)
    assert (found.units, found.searches) == (1, 3)
    assert "part-00000.arrow cannot be read" in found.failures[-1]
    assert "look with `selfplay doctor`" in found.failures[-1]


def test_status_writes_nothing(run: Path) -> None:
    beat(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    read_status(run, now=NOW)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_in_object_storage_is_read_there(run: Path, s3_url: str) -> None:
    """Its files are uploaded as they lie; only what `status` reads is fetched."""
    import boto3

    beat(run, host="elsewhere")
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    for path in run.rglob("*"):
        if path.is_file():
            boto3.client("s3").upload_file(str(path), bucket, f"{prefix}/{path.relative_to(run).as_posix()}")
    found = read_status(s3_url, now=NOW)
    assert (found.run, found.state, found.units, found.wins, found.wins_before) == (s3_url, "running", 1, 2, 3)
    assert holds_run(s3_url)
    assert not holds_run(f"{s3_url}-other")


def test_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        read_status(tmp_path)
    with pytest.raises(RunError, match="holds no run"):
        read_status(tmp_path / "nowhere")


def test_a_damaged_document_is_one_sentence(run: Path) -> None:
    (run / "run.json").write_text("[")
    with pytest.raises(RunError, match=r"run.json is damaged"):
        read_status(run)


def test_a_torn_heartbeat_is_none(run: Path) -> None:
    (run / "heartbeat.json").write_text('{"time": 18')
    found = read_status(run, now=NOW)
    assert (found.state, found.as_of) == ("unknown", None)
    assert f"if no driver runs, go on with: selfplay resume {run}" in found.says


def test_the_commands_print_for_people_and_for_programs(finished: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["status", str(finished)])
    assert shown.exit_code == 0
    assert "ended at" in shown.stdout
    data = json.loads(runner.invoke(app, ["status", str(finished), "--json"]).stdout)
    assert (data["state"], data["units"]) == ("ended", UNITS)
    assert runner.invoke(app, ["doctor", str(finished)]).exit_code == 0


def test_the_doctor_exits_with_1_where_it_finds_something(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shard_path(run, 1, 0).unlink()
    runner = CliRunner()
    shown = runner.invoke(app, ["doctor", str(run)])
    assert shown.exit_code == 1
    assert shown.stdout.startswith("traces/iteration=00001: lacks part 0 of 3")
    as_json = runner.invoke(app, ["doctor", str(run), "--json"])
    assert as_json.exit_code == 1
    (finding,) = json.loads(as_json.stdout)["findings"]
    assert (finding["check"], finding["where"]) == ("units", "traces/iteration=00001")
