"""Send a run to a Ray cluster as a job, and follow its log.

The job is one command line that holds the whole resolved config, so nothing of this machine has to be on the cluster
but the package itself: installed there, or brought by a runtime environment (`--runtime-env`).
"""

from __future__ import annotations

import asyncio
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from selfplay.config import NO_YAML, Config
from selfplay.errors import UserError
from selfplay.run_folder import RunError

OWN_PYTHON = ("pip", "uv", "conda", "container", "image_uri")
"""Parts of a runtime environment that come with a Python of their own, which an absolute path would pass by."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""How long Ray waits between SIGTERM and SIGKILL when a job is stopped; 3 s unless the job's environment says more."""
MORE_SECONDS = 10
"""Beyond the run's own grace, for Python to exit."""
RETRIES = 60
"""Times that a broken log connection is made again, a second apart, before we give up following."""
OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Environment variables that Ray's client prefers to the address that it is given."""


class Ended(NamedTuple):
    """How following a job ended."""

    exit_code: int
    says: str


def check_run_dir(run_dir: str | None) -> str:
    """The run folder as every node of a cluster can find it. Raises UserError for one that depends on where a process
    happens to run."""
    if run_dir is None or not (run_dir.startswith("s3://") or Path(run_dir).is_absolute()):
        given = "a run sent to a cluster needs --run-dir" if run_dir is None else f"--run-dir {run_dir} is relative"
        raise UserError(
            f"{given}: give an absolute path on a disk that every node mounts, or an s3:// address, so that all nodes "
            "and a later `selfplay resume` mean the same folder"
        )
    return run_dir


def read_runtime_env(file: Path | None) -> dict[str, Any]:
    """A Ray runtime environment from a YAML or JSON file; empty without one. Raises UserError."""
    if file is None:
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --runtime-env {file}: {error.strerror}") from error
    except NO_YAML as error:
        raise UserError(f"--runtime-env {file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UserError(f"--runtime-env {file} must hold a mapping such as {{pip: [mcts-selfplay]}}")
    return found


def job_environment(runtime_env: dict[str, Any], config: Config) -> dict[str, Any]:
    """`runtime_env` with what lets the driver save before Ray kills it."""
    wait = str(math.ceil(config.cluster.grace_seconds) + MORE_SECONDS)
    return {**runtime_env, "env_vars": {STOP_WAIT: wait, **(runtime_env.get("env_vars") or {})}}


def entrypoint(config: Config, run_dir: str, python: str | None, runtime_env: dict[str, Any]) -> str:
    """The job's shell command: launch the run, or continue it where the folder holds it already.

    `exec` makes the driver the process that Ray signals. `python` None: this interpreter's path, or the runtime
    environment's own.
    """
    if python is None:
        python = "python" if any(runtime_env.get(part) for part in OWN_PYTHON) else sys.executable
    text = config.to_yaml()
    mark = "CONFIG"
    while mark in text:
        mark += "_"
    command = [python, "-m", "selfplay", "launch", "/dev/stdin", "--run-dir", run_dir, "--or-resume"]
    return f"exec {shlex.join([*command, '--address', 'auto'])} <<'{mark}'\n{text}{mark}\n"


def connect(dashboard: str) -> JobSubmissionClient:
    """A client of the cluster's job server. Raises UserError for an address that cannot be, RunError for one where
    nobody answers."""
    for name in OVERRIDING:
        if os.environ.get(name, dashboard) != dashboard:
            raise UserError(
                f"{name}={os.environ[name]} is set and Ray would take it for --submit {dashboard}; unset it"
            )
    if "://" not in dashboard:
        dashboard = f"http://{dashboard}"
    if not dashboard.startswith(("http://", "https://")):
        raise UserError(f"--submit takes the dashboard's address, such as http://head:8265, not {dashboard}")
    try:
        return JobSubmissionClient(dashboard)
    except ConnectionError as error:
        raise RunError(
            f"no Ray dashboard answers at {dashboard}: start the cluster with its dashboard (pip install "
            "'ray[default]'), or mend the address or the port forwarding"
        ) from error
    except AuthenticationError as error:
        raise RunError(
            f"the cluster at {dashboard} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise RunError(f"{dashboard} is no Ray dashboard that can be used: {_line(error)}") from error


def submit(client: JobSubmissionClient, command: str, runtime_env: dict[str, Any], run_dir: str) -> str:
    """Send the job; its id. Raises RunError where the cluster refuses it."""
    try:
        job: str = client.submit_job(entrypoint=command, runtime_env=runtime_env, metadata={"selfplay_run": run_dir})
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise RunError(f"the cluster refused the job: {_line(error)}") from error
    return job


def follow(client: JobSubmissionClient, job: str) -> Ended:
    """Print the job's log until it ends; its exit code. KeyboardInterrupt leaves the job running."""
    log = _Log()
    for _ in range(RETRIES):
        try:
            asyncio.run(log.show(client, job))
            info = client.get_job_info(job)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:  # those of requests are OSErrors
            trouble = _line(error)
        else:
            if info.status.is_terminal():
                return _ended(info)
            trouble = "the log ended before the job"
        print(f"the connection to the job's log broke ({trouble}); trying again", file=sys.stderr)
        asyncio.run(asyncio.sleep(1.0))
    raise RunError(f"the log of job {job} cannot be followed ({trouble}); the job itself may well go on")


class _Log:
    """What of a job's log was printed; every connection sends it from its beginning."""

    def __init__(self) -> None:
        self.shown = 0

    async def show(self, client: JobSubmissionClient, job: str) -> None:
        """Print what is new until the connection ends."""
        seen = 0
        async for text in client.tail_job_logs(job):
            print(text[max(0, self.shown - seen) :], end="", flush=True)
            seen += len(text)
            self.shown = max(self.shown, seen)


def _ended(info: Any) -> Ended:
    if info.status is JobStatus.SUCCEEDED:
        return Ended(0, "the job is done")
    if info.status is JobStatus.STOPPED:
        return Ended(130, "the job was stopped; what it had committed is kept")
    code = info.driver_exit_code
    said = f"exit code {code}" if code is not None else _line(info.message or "no reason given")
    return Ended(code if code else 1, f"the job failed: {said}")


def _line(error: object) -> str:
    """The first lines of an error that may hold a server's whole traceback, as one."""
    text = str(error).split("Traceback (most recent call last)")[0]
    return " ".join(text.split())[:400].rstrip(".")


def run_as_job(
    config: Config, dashboard: str, run_dir: str | None, *, python: str | None = None, runtime_env: Path | None = None
) -> int:
    """Submit, say how to attach again, follow; the exit code for the command. Raises UserError and RunError."""
    folder = check_run_dir(run_dir)
    if config.cluster.executor == "inline":
        raise UserError("executor: inline is one process and joins no cluster: add cluster.executor=ray to --submit")
    given = read_runtime_env(runtime_env)
    environment = job_environment(given, config)
    client = connect(dashboard)
    job = submit(client, entrypoint(config, folder, python, given), environment, folder)
    print(f"job {job} is sent to {dashboard}")
    ways = [
        ("follow it again", f"ray job logs --follow {job} --address {dashboard}"),
        ("stop it", f"ray job stop {job} --address {dashboard}"),
        ("where it stands", f"selfplay status {folder}"),
    ]
    for what, command in ways:
        print(f"  {what + ':':<17} {command}", flush=True)
    try:
        ended = follow(client, job)
    except KeyboardInterrupt:
        print(f"\ndetached; job {job} goes on. Follow it again: {ways[0][1]}", file=sys.stderr)
        return 130
    print(ended.says, file=sys.stderr)
    return ended.exit_code
