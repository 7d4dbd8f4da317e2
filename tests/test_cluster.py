"""`dmoe build-all --ray` on a cluster of several nodes in one machine: as a serial build, a node lost or not."""

import shutil
import threading
import time

import pytest
from lines import dvc, made, make_line

from factory.cluster import Needs, build_all
from factory.errors import UserError
from factory.store import read_yaml

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]
NEEDS = Needs(cpus=1, gpus=0, memory_gb=0.5)
EXPERTS = {"red": 0.0, "blue": 0.0, "green": 0.0, "white": 0.0, "black": 0.0}


@pytest.fixture(scope="module")
def line(home, tiny_base, tmp_path_factory):
    """Five experts up to their GGUF; `green` has too few seeds."""
    root = tmp_path_factory.mktemp("line") / "checkout"
    line = make_line(home, tiny_base, root, EXPERTS, ("generate", "build", "train", "export"))
    seeds = line.seeds("green")
    seeds.write_text("".join(seeds.read_text().splitlines(keepends=True)[:3]))
    return line


@pytest.fixture(scope="module")
def one_by_one(line, tmp_path_factory):
    root = tmp_path_factory.mktemp("one") / "checkout"
    shutil.copytree(line.root, root)
    dvc(root, "repro", "--keep-going")
    return root


@pytest.fixture
def cluster(monkeypatch):
    """A head without room, and two nodes with room for one expert each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster
    cluster.shutdown()


@pytest.mark.parametrize("lost", [False, True], ids=["no node lost", "a node lost half-way"])
def test_a_cluster_builds_what_dvc_builds_one_by_one(line, one_by_one, cluster, lost, tmp_path, monkeypatch):
    """Files, dvc.lock, the fault of one; a lost node costs only what ran on it."""
    from factory.paths import Home

    root = tmp_path / "checkout"
    shutil.copytree(line.root, root)
    monkeypatch.chdir(root)
    killer = threading.Thread(target=lose, args=(cluster, root), daemon=True)
    if lost:
        killer.start()
    outcome = build_all(Home(root), list(EXPERTS), cluster.address, NEEDS, print)
    assert not killer.is_alive()  # the node was gone before all was done
    assert list(outcome.failed) == ["generate@green"] and "write 4 at least" in outcome.failed["generate@green"]
    assert outcome.held_back == ["build@green", "train@green", "export@green"]
    assert made(root) == made(one_by_one)
    assert read_yaml(root / "dvc.lock") == read_yaml(one_by_one / "dvc.lock")
    _, told = dvc(root, "repro", "--keep-going")
    assert told.count("Running stage") == 1 and "Running stage 'generate@green'" in told


def lose(cluster, root):
    """Kills a node once the first expert is there: by then both have begun the next."""
    while not list(root.glob("experts/*/adapter.gguf")):
        time.sleep(0.2)
    cluster.remove_node(cluster.workers[0], allow_graceful=False)


def test_no_cluster_at_an_address_is_one_line(line):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"--ray 127.0.0.1:1: (?s:.*)then check it with: ray status"):
        build_all(line, list(EXPERTS), "127.0.0.1:1", NEEDS, print)
