"""The cluster that other tests stand on: addresses of its own, faults that are real, nothing left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster_net import QUICK_TO_NOTICE, ROOT, Cluster, Node
from tests.spaces import all_pids, namespaces_permitted, title_of

pytestmark = pytest.mark.cluster
namespaces = pytest.mark.skipif(not namespaces_permitted(), reason="needs the right to make namespaces")

SERVE = "import http.server as h; h.HTTPServer(('', 80), h.SimpleHTTPRequestHandler).serve_forever()"
ASK = "import socket, sys; socket.create_connection((sys.argv[1], 80), timeout=2).close()"


def until(true: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait for a state, with a generous deadline."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(0.05)


def answers(asking: Node, asked: Node) -> bool:
    return asking.run([sys.executable, "-c", ASK, asked.address]).returncode == 0


@namespaces
def test_a_cut_node_cannot_be_reached_until_it_is_healed(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=0) as cluster:
        one, two, three = (cluster.add_machine() for _ in range(3))
        assert len({one.address, two.address, three.address}) == 3
        for server in (two, three):
            server.popen([sys.executable, "-c", SERVE])
            until(lambda server=server: answers(one, server), "the server to answer")  # type: ignore[misc]
        cluster.cut(two)
        assert not answers(one, two)
        assert answers(one, three)
        assert two.processes(sys.executable)
        cluster.heal(two)
        until(lambda: answers(one, two), "the healed node to answer")


@namespaces
def test_killing_a_node_ends_all_of_its_processes_and_no_other(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=0) as cluster:
        one, two = cluster.add_machine(), cluster.add_machine()
        # one of them outlives its parent, as Ray's do
        script = "import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(600)"
        lonely = [one.popen([sys.executable, "-c", script]) for _ in range(2)]
        staying = two.popen([sys.executable, "-c", "import time; time.sleep(600)"])
        assert [process.wait(60) for process in lonely] == [0, 0]
        pids = one.pids()
        assert len(pids) == 2
        cluster.kill(one)
        assert one.pids() == []
        until(lambda: not any(title_of(pid) for pid in pids), "the node's processes to be gone")
        assert staying.poll() is None


@namespaces
def test_each_node_sees_a_private_folder_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "outside").touch()
    with Cluster(tmp_path / "cluster", nodes=0, private=[folder]) as cluster:
        one, two = cluster.add_machine(), cluster.add_machine()
        listed = ["ls", str(folder)]
        assert one.run(["touch", str(folder / "inside")]).returncode == 0
        assert one.run(["pwd"]).stdout == f"{ROOT}\n"
        assert one.run(listed).stdout == "inside\n"
        assert two.run(listed).stdout == ""
    assert [entry.name for entry in folder.iterdir()] == ["outside"]


@namespaces
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_cluster_whose_owner_is_killed_or_interrupted(tmp_path: Path, number: int) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from tests.cluster_net import Cluster
        with Cluster(Path(sys.argv[1]), nodes=0) as cluster:
            machine = cluster.add_machine()
            machine.popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]])
            print(*machine.pids(), flush=True)
            time.sleep(600)
        """)
    command = [sys.executable, "-c", script, str(tmp_path / "cluster")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout is not None
        (inside,) = map(int, owner.stdout.readline().split())
        assert "sleep(600)" in title_of(inside)
        os.kill(owner.pid, number)
    until(lambda: not [p for p in all_pids() if str(tmp_path) in title_of(p)], "the cluster's processes to be gone")


WHERE = textwrap.dedent("""
    import json, sys, time, ray
    ray.init(address=sys.argv[1], log_to_driver=False)
    wanted, deadline = set(sys.argv[2:]), time.monotonic() + 120
    while True:
        nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if set(nodes) == wanted or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    @ray.remote(num_cpus=1)
    def where():
        return ray.util.get_node_ip_address()
    on = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    tasks = [where.options(scheduling_strategy=on(node, soft=False)) for node in nodes.values()]
    print(json.dumps(ray.get([task.remote() for task in tasks])))
    """)


def at_work(cluster: Cluster) -> list[str]:
    """Addresses of the nodes on which a task was done, once those alive are all that Ray knows."""
    done = cluster.head.run(
        [sys.executable, "-c", WHERE, cluster.address, *(node.address for node in cluster.living)], timeout=240
    )
    assert done.returncode == 0, done.stdout
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return sorted(found)


@namespaces
def test_ray_works_on_every_node_and_on_one_that_joins_after_another_was_killed(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=2, environment=QUICK_TO_NOTICE) as cluster:
        assert at_work(cluster) == ["10.77.0.1", "10.77.0.2"]
        cluster.kill(cluster.nodes[1])
        cluster.add_node()
        assert at_work(cluster) == ["10.77.0.1", "10.77.0.3"]


def test_without_namespaces_two_ray_nodes_run_on_the_host_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.cluster_net.namespaces_permitted", lambda: False)
    with Cluster(tmp_path, nodes=2) as cluster:
        one, two = cluster.nodes
        assert one.pids()
        assert two.pids()
        assert not set(one.pids()) & set(two.pids())
        count = "import sys, ray; ray.init(address=sys.argv[1]); print('nodes', sum(n['Alive'] for n in ray.nodes()))"
        assert "nodes 2" in one.run([sys.executable, "-c", count, cluster.address]).stdout
        cluster.kill(two)
        assert two.space.pids() == []
        assert one.pids()
    assert one.space.pids() == []
