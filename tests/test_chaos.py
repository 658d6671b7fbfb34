"""The chaos tool: what it calls progress, loss and damage, that it never waits for ever, and a short storm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfplay.config import parse_config
from selfplay.executor import InlineExecutor
from selfplay.loop import Loop
from selfplay.run_folder import RunFolder
from tests.cluster_net import ENVIRONMENT, ROOT
from tests.selfplay.tiny_run import CONFIG, tiny_config
from tests.spaces import namespaces_permitted


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("chaos") / "run"
    config = tiny_config("warmup.steps=2", "learn.steps=2")
    run = RunFolder.create(path, config)
    executor = InlineExecutor(config, run.place)
    Loop(run, executor, lambda _: None).go()
    executor.close()
    run.close("ended")
    return path


@pytest.fixture
def run(played: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(played, tmp_path / "run"))


def beat(run: Path, **facts: Any) -> None:
    run.mkdir(exist_ok=True)
    (run / "heartbeat.json").write_text(json.dumps(facts), encoding="utf-8")


def test_only_what_was_never_reached_before_is_progress(tmp_path: Path) -> None:
    from chaos_sight import Progress

    run = tmp_path / "run"
    progress = Progress(run)
    assert not progress.look()
    beat(run, phase="learn", iteration=2, done=3, total=9)
    assert progress.look()
    assert not progress.look()
    beat(run, phase="learn", iteration=2, done=0, total=9)  # a learner that begins again
    assert not progress.look()
    beat(run, phase="play", iteration=2, done=5, total=9)  # a beat without a commit
    assert not progress.look()
    beat(run, phase="learn", iteration=2, done=4, total=9)
    assert progress.look()
    shard = run / "traces" / "iteration=00003" / "part-00000.arrow"
    shard.parent.mkdir(parents=True)
    shard.touch()
    assert progress.look()
    (run / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    assert progress.look()
    assert not progress.look()


def test_seconds_lost_are_those_to_the_next_progress_beyond_the_usual_gap() -> None:
    from chaos_faults import Fault
    from chaos_storm import Outcome

    outcome = Outcome(0, [], True, 100.0, 2.0, [], "")
    fault = Fault("worker", 10.0, "play")
    assert outcome.lost(fault) is None
    fault.progressed = 17.0
    assert outcome.lost(fault) == 5.0
    fault.progressed = 11.0
    assert outcome.lost(fault) == 0.0


def test_a_fault_has_recovered_once_repaired_further_and_whole() -> None:
    from chaos_faults import Fault

    fault = Fault("node", 10.0, "play")
    for name in ("repaired", "progressed", "whole"):
        assert fault.open
        setattr(fault, name, 12.0)
    assert fault.recovered
    fault.stuck = "no progress"
    assert not fault.recovered
    assert not fault.open


def test_memory_that_grows_has_a_slope_and_flat_memory_none() -> None:
    from chaos_sight import Memory

    hours = [i / 60 for i in range(60)]
    memory = Memory({"driver": [(h * 3600, 5e8 + 1e7 * h) for h in hours], "worker": [(h * 3600, 4e8) for h in hours]})
    figures = memory.figures()
    assert figures["driver"]["slope_mb_per_hour"] == pytest.approx(10.0)
    assert figures["driver"]["last_quarter_mb"] > figures["driver"]["first_quarter_mb"]
    assert figures["worker"]["slope_mb_per_hour"] == pytest.approx(0.0, abs=1e-6)


def test_an_undamaged_run_has_every_unit_once_and_is_the_same_as_itself(played: Path) -> None:
    from chaos_check import finished_iterations, same_as, units_once

    assert finished_iterations(played) == 2
    assert units_once(played, tiny_config(), 2) == []
    assert same_as(played, played, 2) == []


def test_a_missing_and_a_doubled_unit_are_named(run: Path) -> None:
    from chaos_check import units_once

    folder = run / "traces" / "iteration=00002"
    (folder / "part-00001.arrow").rename(run / "kept.arrow")
    assert units_once(run, tiny_config(), 2) == [
        "iteration 2 has the units [0, 2], not 0 to 2",
        "iteration 2 has 16 rows, not 24",
    ]
    shutil.copy(folder / "part-00000.arrow", folder / "part-00001.arrow")
    (found,) = units_once(run, tiny_config(), 2)
    assert found.startswith("8 traces are there more than once")


def test_other_content_weights_and_metrics_are_named(run: Path, played: Path) -> None:
    from chaos_check import same_as

    folder = run / "traces" / "iteration=00001"
    shutil.copy(folder / "part-00001.arrow", folder / "part-00002.arrow")
    (weights,) = (run / "checkpoints" / "00002" / "policy").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(rows[1])
    row["solved"] = 7
    row["wall_seconds"] = 7  # may differ
    (run / "metrics.jsonl").write_text("\n".join([rows[0], json.dumps(row), rows[2]]) + "\n", encoding="utf-8")
    content, other_weights, metrics = same_as(run, played, 2)
    assert content == "iteration 1 has other content"
    assert other_weights.startswith("checkpoint 2 has other weights")
    assert metrics == "metrics of iteration 1 differ in solved"


@pytest.mark.slow
def test_the_undisturbed_run_ends_with_the_iteration_asked_for(tmp_path: Path) -> None:
    from chaos_check import finished_iterations, undisturbed

    source = tmp_path / "tiny.yaml"
    source.write_text(CONFIG, encoding="utf-8")
    folder = tmp_path / "undisturbed"
    small = ["warmup.steps=2", "learn.steps=2", "evaluate.samples=0", "iterations=40"]
    undisturbed(folder, source, small, 1)
    assert 1 <= finished_iterations(folder) < 40
    undisturbed(folder, source, small, 2)
    assert 2 <= finished_iterations(folder) < 40
    with pytest.raises(RuntimeError, match="exit code 2"):
        undisturbed(tmp_path / "wrong", source, ["iterations=none"], 1)


def test_an_unknown_kind_of_fault_is_refused_with_those_known() -> None:
    from chaos_storm import weights_of

    assert weights_of(["worker=4", "node"]) == {"worker": 4.0, "node": 1.0}
    with pytest.raises(ValueError, match="no kind of fault 'nod': choose among worker, learner"):
        weights_of(["nod"])


class Calm:
    """A storm without a cluster, as far as a fault needs one."""

    def __init__(self) -> None:
        import random

        self.random = random.Random(0)
        self.crew: list[Any] = []
        self.stopped: set[int] = set()
        self.repairs: list[Any] = []
        self.agenda: list[Any] = []

    def repaired(self, fault: Any) -> None:
        self.repairs.append(fault)

    def later(self, _: float, action: Any) -> None:
        self.agenda.append(action)


def test_a_silent_worker_is_stopped_and_goes_on_later() -> None:
    from chaos_faults import Fault, silent, worker
    from chaos_sight import WORKER, Seen, start_of

    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    storm: Any = Calm()
    fault = Fault("silent", 0.0, "play")
    assert silent(storm, fault) is None
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        node = type("Node", (), {"name": "here"})()
        start = start_of(process.pid)
        assert start is not None
        storm.crew = [Seen(node, process.pid, start - 1, WORKER, 1), Seen(node, process.pid, start, "other", 1)]
        assert worker(storm, fault) is None  # its number was given to another process since, or it is no worker
        storm.crew = [Seen(node, process.pid, start, f"{WORKER}.finish", 1)]
        assert "SIGSTOP" in str(silent(storm, fault))
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert state(process.pid) == "T"
        assert worker(storm, fault) is None
        storm.agenda[0]()
        os.waitid(os.P_PID, process.pid, os.WCONTINUED)
        assert storm.repairs == [fault]
        assert "SIGKILL" in str(worker(storm, fault))
        assert process.wait() == -signal.SIGKILL


def storm_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, **options: Any) -> Any:
    """A storm over a job of one's own: a Python command on a one-node cluster."""
    from chaos_job import Job, Options
    from chaos_storm import Storm

    def start(self: Any, node: Any) -> None:
        self.node = node
        self.starts += 1
        with open(self.log, "w", encoding="utf-8") as file:
            self._process = node.popen([sys.executable, "-c", job], stdout=file)

    monkeypatch.setattr(Job, "start", start)
    chosen: dict[str, Any] = {
        "config": parse_config(CONFIG), "source": tmp_path, "overrides": (), "nodes": 1, "every": 1.0, "faults": 0,
        "minutes": None, "kinds": {"worker": 1.0}, "patience": 300.0, "quick": True,
    }  # fmt: skip
    log = open(tmp_path / "chaos.log", "w", encoding="utf-8")  # noqa: SIM115 - closed with the test's process
    return Storm(Options(**(chosen | options)), tmp_path, 0, log), log


def test_a_driver_that_was_asked_to_end_and_dies_with_its_node_counts_as_repaired_once_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chaos_faults import Fault

    storm, log = storm_of(tmp_path, monkeypatch, "")
    with log:
        node = SimpleNamespace(name="node-2", connected=True)
        storm.cluster = SimpleNamespace(living=[node], start_node=lambda: (node, None))
        storm.job = SimpleNamespace(
            running=True, starts=1, node=node, end=lambda: None, send=lambda _: None, start=lambda _: None
        )
        fault = Fault("term", 0.0, "learn")
        storm.ask_to_end(fault)
        storm.job.running = False
        storm.replace_later(None, then_resume=True)
        for _, _, action in sorted(storm._agenda):
            action()
    assert fault.repaired is not None
    assert not fault.stuck


@pytest.mark.cluster
def test_a_job_that_hangs_is_given_up_and_what_it_waited_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storm, log = storm_of(
        tmp_path, monkeypatch, "import time; print('waiting for Godot', flush=True); time.sleep(600)", patience=3.0
    )
    with log:
        outcome = storm.go()
    assert not outcome.finished
    assert outcome.hung.startswith("no progress for 3 s at not started; driver 1 runs")
    assert "waiting for Godot" in outcome.hung
    assert "waiting for Godot" in (tmp_path / "chaos.log").read_text(encoding="utf-8")


@pytest.mark.cluster
def test_a_driver_that_no_fault_has_ended_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos_storm.MOST_DEFECTS", 1)
    storm, log = storm_of(tmp_path, monkeypatch, "raise SystemExit('out of cheese')")
    with log:
        outcome = storm.go()
    assert not outcome.finished
    assert not outcome.hung
    assert [text for text in outcome.defects if "exit code 1: out of cheese" in text] == outcome.defects
    assert len(outcome.defects) == 2


@pytest.mark.cluster
@pytest.mark.slow
def test_a_job_gets_over_faults_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    kinds = ["worker", "driver", "silent", "node"] + ["cut"] * namespaces_permitted()
    command = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--out", str(tmp_path / "out"), "--seed", "1"]
    command += ["--faults", "6", "--runs", "1", "--every", "6", "--iterations", "3", "--kinds", *kinds]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (total,) = (
        row for row in json.loads((tmp_path / "out" / "chaos.json").read_text())["table"] if row["kind"] == "all"
    )
    assert total["recovered"] == total["faults"] >= 3
