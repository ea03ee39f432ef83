"""Two replicas on Ray: shared results, and a replica that is killed under load."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest
from serving_helpers import wait_until

from unclip.serving.config import ServerConfig
from unclip.serving.replicas import ReplicaConfig, build, start

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")
requests = pytest.importorskip("requests")


def test_several_replicas_need_shared_storage():
    with pytest.raises(ValueError, match="storage"):
        build(ServerConfig(), ReplicaConfig(1, 2))
    for low, high in ((0, 1), (2, 1)):
        with pytest.raises(ValueError):
            ReplicaConfig(low, high)


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are found in /proc")
def test_a_killed_replica_leaves_no_request_without_an_answer(tiny_folder, tmp_path):
    from ray import serve

    port = free_port()
    results = str(tmp_path / "results")
    config = ServerConfig(models=(str(tiny_folder),), port=port, storage=results)
    memory = {"object_store_memory": 100 * 2**20}
    try:
        start(config, address="local", num_cpus=2, include_dashboard=False, **memory)
        serve.run(build(config, ReplicaConfig(2, 2, num_cpus=0.5)), name="unclip")
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: requests.get(f"{url}/readyz").status_code == 200, 240)
        answers, urls, stop = Counter(), [], threading.Event()

        def client():
            while not stop.is_set():
                body = {"prompt": "a red apple", "steps": 20}
                response = requests.post(f"{url}/v1/images/generations", json=body, timeout=60)
                answers[response.status_code] += 1
                if response.status_code == 200:
                    urls.append(response.json()["data"][0]["url"])

        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: answers[200] >= 20, 240)
        pids = replica_pids()
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        before = answers[200]
        wait_until(lambda: answers[200] >= before + 20, 240)
        stop.set()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert set(answers) == {200} and answers[200] > 40, dict(answers)
        statuses = Counter(requests.get(one).status_code for one in urls)
        assert statuses == {200: len(urls)}
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are found in /proc")
def test_replicas_spread_over_machines_with_the_load(tiny_folder, tmp_path):
    """Two nodes of a cluster with room for one replica each stand for two machines."""
    from ray import serve
    from ray.cluster_utils import Cluster

    port = free_port()
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    results = str(tmp_path / "results")
    models = (str(tiny_folder),)
    config = ServerConfig(models=models, port=port, storage=results, max_batch=1)
    stop = threading.Event()
    try:
        start(config, address=cluster.address)
        serve.run(build(config, ReplicaConfig(1, 2)), name="unclip")
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: requests.get(f"{url}/readyz").status_code == 200, 240)
        assert len(replica_nodes()) == 1
        statuses = Counter()

        def client():
            while not stop.is_set():
                body = {"prompt": "a red apple", "steps": 20}
                response = requests.post(f"{url}/v1/images/generations", json=body, timeout=300)
                statuses[response.status_code] += 1

        threads = [threading.Thread(target=client) for _ in range(6)]  # 2 are wanted per replica
        for thread in threads:
            thread.start()
        wait_until(lambda: len(set(replica_nodes())) == 2, 300)
        before = statuses[200]
        wait_until(lambda: statuses[200] >= before + 20, 240)
        assert set(statuses) == {200}
    finally:
        stop.set()
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def replica_nodes():
    """Return the node of each running replica."""
    from ray import serve

    details = serve.context._get_global_client().get_serve_details()
    replicas = details["applications"]["unclip"]["deployments"]["unclip"]["replicas"]
    return [one["node_id"] for one in replicas if one["state"] == "RUNNING"]


def replica_pids():
    """Return the processes of the replicas, by the titles that Ray gives them."""
    titles = {path.parent.name: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
    return [int(pid) for pid, title in titles.items() if title.startswith(b"ray::ServeReplica")]
