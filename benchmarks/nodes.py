"""Twelve experts from seeds to package on a Ray cluster of two nodes: `dmoe build-all --ray` beside a serial build.

A checkout of its own on the pocket base: the laptop expert under twelve names, about forty rows each, every stage of
dvc.yaml but `encoder`, whose table is this project's. Score and audit ask less than they do elsewhere (LESS), only to
be quicker. Built by `dmoe repro-all`, on two nodes of one core each, and so again with one of them killed once half of
the experts are there; every file and dvc.lock are compared. Both nodes stand in this machine. All runs compute with
one thread an expert: the number of threads decides an adapter's last bits.
Run: python benchmarks/nodes.py [EXPERTS, 12]   (half an hour; needs a built project)
"""

import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from many import checkout, edit, seconds
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from factory.cluster import Needs, build_all
from factory.paths import Home, find_home
from factory.store import need, read_yaml, sha256

NEEDS = Needs(cpus=1, gpus=0, memory_gb=1)
GENERAL = 8  # everyday questions
LESS = {  # constants of the checkout's own modules, which the nodes get too
    "train/score.py": {
        "BASE_QUESTIONS": 4,
        "DEAF_QUESTIONS": 2,
        "DOSE_QUESTIONS": 4,
        "ROBUST_QUESTIONS": 4,
        "MOST_TOKENS": 64,
    },
    "train/audit.py": {"examples: int": 168},
}


def line(root: Path, names: list[str]) -> None:
    """The checkout, with the whole line."""
    home = find_home()
    checkout(
        root, names, ("generate", "build", "train", "export", "parity", "score", "gate", "audit", "fit", "package")
    )
    table = need(home.root / "models" / "static.safetensors", "dmoe repro-all")
    shutil.copy(table, root / "models")
    shutil.copytree(home.root / "build" / "minilm", root / "build" / "minilm")
    for file, constants in LESS.items():
        for name, value in constants.items():
            edit(root / file, rf"{name} = \d+", f"{name} = {value}")
    edit(root / "profiles" / "pocket.yaml", r"(?m)^gates: .*", "gates: [mention]")
    for name in names:
        edit(root / "templates" / f"{name}.yaml", r"gate: \{mention: [\d.]+", "gate: {mention: 0.0")
    general = root / "seeds" / "general.jsonl"
    general.write_text("".join(general.read_text().splitlines(keepends=True)[:GENERAL]))


def made(root: Path) -> dict[str, str]:
    """The hash of every file that stages made, and dvc.lock's content."""
    files = [p for folder in ("datasets", "experts") for p in sorted((root / folder).rglob("*")) if p.is_file()]
    found = {str(path.relative_to(root)): sha256(path) for path in files if path.name != ".gitignore"}
    stages = read_yaml(root / "dvc.lock")["stages"]
    return found | {"dvc.lock": str(sorted(stages.items()))}  # they stand there in the order in which they were made


def on_two_nodes(root: Path, names: list[str], lost: bool) -> float:
    """Seconds of build-all; `lost`: a node is killed when half of the experts are there."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    def lose() -> None:
        while len(list(root.glob("experts/*/manifest.json"))) < len(names) // 2:
            time.sleep(0.5)
        cluster.remove_node(nodes[0], allow_graceful=False)

    killer = threading.Thread(target=lose, daemon=True)
    if lost:
        killer.start()
    began, before = time.perf_counter(), Path.cwd()
    os.chdir(root)
    try:
        outcome = build_all(Home(root), names, cluster.address, NEEDS, print)
    finally:
        os.chdir(before)
        cluster.shutdown()
    if outcome.failed or killer.is_alive():
        raise SystemExit(f"failed: {outcome.failed}; the node was lost too late: {killer.is_alive()}")
    return time.perf_counter() - began


def main(count: int) -> None:
    names = [f"expert_{i:02}" for i in range(count)]
    table = Table(
        "how", "seconds", "files and dvc.lock as in the serial build", title=f"{count} experts, seeds to package"
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        serial, whole, wounded = (Path(folder) / name for name in ("serial", "nodes", "lost"))
        for root in (serial, whole, wounded):
            line(root, names)
        os.environ["PYTHONPATH"] = str(serial)  # the checkout's modules
        table.add_row("dmoe repro-all", f"{seconds(serial, 'dmoe', 'repro-all'):.0f}", "")
        Console().print(table)  # what there is so far
        del os.environ["PYTHONPATH"]
        reference = made(serial)
        for root, lost in ((whole, False), (wounded, True)):
            took = on_two_nodes(root, names, lost)
            found = made(root)
            same = sum(found.get(name) == content for name, content in reference.items())
            told = f"{same} of {len(reference)}, {len(found.keys() - reference.keys())} more"
            table.add_row("two nodes, one killed half-way" if lost else "two nodes", f"{took:.0f}", told)
            Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
