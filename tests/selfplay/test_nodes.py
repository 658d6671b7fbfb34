"""One run over several nodes with addresses of their own: it plays what one process plays, or says why it cannot."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster_net import QUICK_TO_NOTICE, Cluster, selfplay
from tests.selfplay.test_resume import outcome, run_child
from tests.selfplay.tiny_run import CONFIG
from tests.spaces import Process, namespaces_permitted

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(not namespaces_permitted(), reason="needs the right to make namespaces"),
]
WORKER = "ray::WorkerActor"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    """The tiny run with two workers."""
    path = folder / "two-workers.yaml"
    path.write_text(CONFIG.replace("executor: inline", "executor: ray, workers: 2"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def inline(folder: Path) -> dict[str, Any]:
    """What one process gives."""
    done = run_child("never", folder / "inline")
    assert done.returncode == 0, done.stderr
    return outcome(folder / "inline")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder / "cluster", nodes=2, dashboard=True) as nodes:
        yield nodes


def follow(process: Process, log: Path, until: Callable[[], bool], what: str, seconds: float = 400.0) -> None:
    """Wait for a state of a run while its driver lives."""
    deadline = time.monotonic() + seconds
    while not until():
        said = log.read_text(encoding="utf-8")
        assert process.poll() is None, said
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {said}"
        time.sleep(0.05)


def test_a_run_launched_by_address_uses_both_nodes_and_gives_what_one_process_gives(
    cluster: Cluster, config: Path, folder: Path, inline: dict[str, Any]
) -> None:
    run, log = folder / "address", folder / "address.log"
    with open(log, "w", encoding="utf-8") as file:
        driver = cluster.head.popen(
            selfplay("launch", config, "--run-dir", run, "--address", cluster.address), stdout=file
        )
    one, two = cluster.nodes
    follow(driver, log, lambda: len(one.processes(WORKER)) == len(two.processes(WORKER)) == 1, "a worker on each node")
    assert driver.wait(400) == 0, log.read_text(encoding="utf-8")
    assert outcome(run) == inline


def test_a_run_submitted_from_a_machine_outside_the_cluster_gives_what_one_process_gives(
    cluster: Cluster, config: Path, folder: Path, inline: dict[str, Any]
) -> None:
    run, laptop = folder / "submitted", cluster.add_machine()
    done = laptop.run(selfplay("launch", config, "--run-dir", run, "--submit", cluster.dashboard), timeout=600)
    assert done.returncode == 0, done.stdout
    assert outcome(run) == inline


def test_a_run_whose_driver_was_killed_is_resumed_from_another_node(
    cluster: Cluster, config: Path, folder: Path, inline: dict[str, Any]
) -> None:
    run, log = folder / "moved", folder / "moved.log"
    one, two = cluster.nodes
    with open(log, "w", encoding="utf-8") as file:
        driver = one.popen(selfplay("launch", config, "--run-dir", run, "--address", cluster.address), stdout=file)
    follow(driver, log, lambda: any(run.glob("traces/iteration=00001/part-*")), "a committed unit")
    assert driver.end() == -signal.SIGKILL
    resumed = two.run(selfplay("resume", run), timeout=600)
    assert resumed.returncode == 0, resumed.stdout
    assert outcome(run) == inline


S3_SERVER = """
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
from tests.s3_server import one_at_a_time
server = make_server("0.0.0.0", 5000, one_at_a_time(DomainDispatcherApplication(create_backend_app)), threaded=True)
print("up", flush=True)
server.serve_forever()
"""
MAKE_BUCKET = "import boto3; boto3.client('s3').create_bucket(Bucket='runs')"
SUMMARY = """
import json, sys
from selfplay.store import local_copy
from tests.selfplay.test_nodes import kept
print(json.dumps(kept(local_copy(sys.argv[1]))))
"""


def kept(run: Path) -> dict[str, Any]:
    """`outcome` without pending files, which a mirror does not have."""
    (run / "pending").mkdir(exist_ok=True)
    return {name: value for name, value in outcome(run).items() if name != "pending"}


@pytest.mark.long
def test_a_run_in_object_storage_on_nodes_that_share_no_folder_gives_what_one_process_gives(
    folder: Path, config: Path, inline: dict[str, Any]
) -> None:
    cache = folder / "cache"
    cache.mkdir()
    with Cluster(folder / "strangers", nodes=0, private=[cache]) as cluster:
        server, log = cluster.add_machine(), folder / "s3.log"
        cluster.environment |= {
            "AWS_ENDPOINT_URL": f"http://{server.address}:5000",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "SELFPLAY_CACHE": str(cache),
        }
        with open(log, "w", encoding="utf-8") as file:
            serving = server.popen([sys.executable, "-c", S3_SERVER], stdout=file)
        follow(serving, log, lambda: "up" in log.read_text(encoding="utf-8"), "the S3 service")
        one, two = cluster.add_node(), cluster.add_node()
        made = one.run([sys.executable, "-c", MAKE_BUCKET])
        assert made.returncode == 0, made.stdout
        command = selfplay("launch", config, "--run-dir", "s3://runs/first", "--address", cluster.address)
        done = one.run(command, timeout=600)
        assert done.returncode == 0, done.stdout
        for node in (one, two):
            assert node.run(["ls", str(cache)]).stdout, f"{node.name} had no mirror: nothing was done there"
        read = two.run([sys.executable, "-c", SUMMARY, "s3://runs/first"])
        assert read.returncode == 0, read.stdout
        assert json.loads(read.stdout.splitlines()[-1]) == {k: v for k, v in inline.items() if k != "pending"}
    assert list(cache.iterdir()) == []


def test_a_launch_is_refused_where_a_node_does_not_see_the_run_folder(folder: Path, config: Path) -> None:
    runs = folder / "not-shared"
    runs.mkdir()
    with Cluster(folder / "apart", nodes=2, private=[runs]) as apart:
        command = selfplay("launch", config, "--run-dir", runs / "run", "--address", apart.address)
        done = apart.head.run(command, timeout=400)
        assert done.returncode == 1, done.stdout
        last = done.stdout.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert apart.nodes[1].address in last
        assert str(runs / "run") in last
        assert "Traceback" not in done.stdout


@pytest.mark.long
def test_a_launch_is_not_refused_because_of_a_node_that_has_just_died(
    folder: Path, config: Path, inline: dict[str, Any]
) -> None:
    with Cluster(folder / "dying", nodes=3, environment=QUICK_TO_NOTICE) as cluster:
        cluster.kill(cluster.nodes[1])
        run = folder / "after-a-death"
        done = cluster.head.run(selfplay("launch", config, "--run-dir", run, f"cluster.address={cluster.address}"))
        assert done.returncode == 0, done.stdout
    assert outcome(run) == inline
