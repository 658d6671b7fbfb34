"""SIGTERM, as Slurm and Kubernetes send it: saved within the grace time, a proper exit code, and resume goes on."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfplay.signals import Grace, Stopped, graceful
from tests.selfplay.test_resume import ENVIRONMENT, ROOT, outcome
from tests.selfplay.tiny_run import CONFIG

LONG = CONFIG.replace("learn: {steps: 4,", "learn: {steps: 60,")


def launch(config: Path, run: Path) -> list[str]:
    return [sys.executable, "-m", "selfplay", "launch", str(config), "--run-dir", str(run)]


def stop_at(moment: str, number: int, config: Path, run: Path) -> subprocess.Popen[str]:
    """Launch, and send the signal when the line of `moment` appears."""
    with subprocess.Popen(
        launch(config, run), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(moment):
                process.send_signal(number)
                break
        process.stdout.read()
    return process


def assert_stops_and_goes_on(tmp_path: Path, text: str, number: int, code: int) -> None:
    config = tmp_path / "long.yaml"
    config.write_text(LONG, encoding="utf-8")
    done = subprocess.run(
        launch(config, tmp_path / "whole"), cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    config.write_text(text, encoding="utf-8")
    stopped = stop_at("iteration 1 learn", number, config, tmp_path / "run")
    assert stopped.returncode == code
    assert (tmp_path / "run" / "checkpoints" / "partial" / "00001" / "state.json").is_file()
    resume = [sys.executable, "-m", "selfplay", "resume", str(tmp_path / "run")]
    resumed = subprocess.run(resume, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_learning_phase_that_is_stopped_is_saved_and_goes_on_where_it_was(
    tmp_path: Path, number: int, code: int
) -> None:
    assert_stops_and_goes_on(tmp_path, LONG, number, code)


@pytest.mark.cluster
@pytest.mark.slow
def test_learners_on_ray_save_what_they_have_when_the_driver_is_stopped(tmp_path: Path) -> None:
    text = LONG.replace("executor: inline", "executor: ray, workers: 1")
    assert_stops_and_goes_on(tmp_path, text, signal.SIGTERM, 143)


class Work:
    def __init__(self, busy: bool) -> None:
        self.busy = busy
        self.asked = 0

    def stop(self) -> bool:
        self.asked += 1
        return self.busy


def interrupted(work: Work, grace: Grace) -> None:
    """SIGTERM, then a long wait that only an exception ends."""
    try:
        with graceful(work, grace):
            signal.raise_signal(signal.SIGTERM)
            while True:
                signal.pause()
    finally:
        grace.over()


def test_what_has_nothing_to_save_ends_at_once() -> None:
    with pytest.raises(Stopped) as caught:
        interrupted(Work(busy=False), Grace(60.0))
    assert caught.value.number == signal.SIGTERM


def test_a_second_signal_ends_at_once() -> None:
    work, grace = Work(busy=True), Grace(60.0)
    with graceful(work, grace):
        signal.raise_signal(signal.SIGINT)
        assert (grace.asked, work.asked) == (signal.SIGINT, 1)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
    grace.over()


def test_work_is_interrupted_before_the_grace_time_ends() -> None:
    with pytest.raises(Stopped) as caught:
        interrupted(Work(busy=True), Grace(0.1))
    assert caught.value.number == signal.SIGTERM


def test_a_process_that_hangs_where_no_exception_reaches_it_ends_with_the_grace_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    grace = Grace(0.05, leave=left.put)
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        grace.begin(signal.SIGTERM)
        assert left.get(timeout=60.0) == 143
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert "the grace time is over" in capsys.readouterr().err


def test_the_signals_are_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with graceful(Work(busy=True), Grace(60.0)):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
