"""`dmoe build-all --ray`: whole experts, generate to package, as tasks on a Ray cluster; recorded as by `dvc repro`.

DVC says here what is stale. Each stale expert is one task: it gets the files that the expert has, runs its stale
stages and those behind them in a folder of its own, and sends back what they made. That is put in its place and
recorded; a missed gate comes back as a stage that failed, with all that was made before it. A task whose node is lost
begins anew on another. Code, templates, seeds and small models travel with the job; a file too large for that (a 14B
base's GGUF) must lie at the same path on every node.
"""

import json
import os
import socket
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.errors import UserError
from factory.paths import Home
from factory.progress import Meter
from factory.repro import Outcome, Shared, Tell, expert_of, record, stale_stages
from factory.store import read_json, whole, write_json

LARGEST = 100_000_000  # bytes of a file that still travels
STAYS = (".git", ".dvc", ".dmoe", ".replies", "datasets", "experts", "docs", "tests", "benchmarks", "node_modules")
TRIES = 3  # after a lost node
REPLIES = ".dmoe/replies-of-bases"  # what the base said, for the next expert
Files = dict[str, bytes]  # by path from the checkout's root


@dataclass(frozen=True)
class Needs:
    """What Ray sets aside for one expert."""

    cpus: float
    gpus: float
    memory_gb: float


@dataclass(frozen=True)
class Job:
    """One expert's work: its stages, and the files that it has."""

    expert: str
    stages: dict[str, list[str]]  # in order, each with those of them that it reads from
    files: Files
    root: str  # of the checkout that asks
    environment: dict[str, str]  # the teacher's address and key: an argument, as Ray shows a job's variables to all


@dataclass(frozen=True)
class Built:
    """What came of it: the stages that were done, and those that failed, with the reason."""

    done: list[str]
    failed: dict[str, str]
    files: Files


# -- here -----------------------------------------------------------------------------------------


def build_all(home: Home, experts: Sequence[str], address: str, needs: Needs, tell: Tell) -> Outcome:
    """Builds every stale expert on the cluster at `address` ("local": one of this machine's own, for this run alone).

    Raises:
        UserError: Ray is not installed, or there is no cluster at that address.
    """
    from dvc.repo import Repo

    outcome = Outcome()
    with Repo(str(home.root)) as repo:
        work = {expert: stale_stages(repo, [expert]) for expert in experts}
        todo = deque(expert for expert in experts if work[expert])
        with connected(home, address) as ray, Meter("experts", len(todo)) as meter:
            task = ray.remote(
                num_cpus=needs.cpus, num_gpus=needs.gpus, memory=needs.memory_gb * 1e9, max_retries=TRIES
            )(run_line)
            running: dict[Any, str] = {}
            total, nodes = len(todo), len(ray.nodes())
            while todo or running:
                while todo and len(running) <= slots(ray, needs):  # one more than there is room for
                    expert = todo.popleft()
                    running[task.remote(job(home, repo, expert, work[expert]))] = expert
                ready, _ = ray.wait(list(running), timeout=1.0)
                for ref in ready:
                    take(home, repo, work[running[ref]], _result(ray, ref), outcome, tell)
                    del running[ref]
                alive = sum(node["Alive"] for node in ray.nodes())
                if alive < nodes:
                    tell(f"{nodes - alive} of {nodes} nodes lost; what ran there begins anew on another")
                nodes = alive
                meter.show(total - len(todo) - len(running), f"{alive} nodes; under way: {', '.join(running.values())}")
    return outcome


@contextmanager
def connected(home: Home, address: str) -> Iterator[Any]:
    """Ray's module, connected for as long as the block lasts.

    Raises:
        UserError: it is not installed, or nobody answers at `address`.
    """
    try:
        import ray
    except ImportError:
        raise UserError("ray is not installed\n  then run: uv pip install -e '.[cluster]'") from None
    large = [p for p in (home.root / "models").rglob("*") if p.is_file() and p.stat().st_size > LARGEST]
    leave = [*STAYS, ".venv*", "build/peers", *(str(path.relative_to(home.root)) for path in large)]
    environment = {"working_dir": str(home.root), "excludes": leave}
    try:
        if address not in ("local", "auto"):  # Ray itself would wait for minutes
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, runtime_env=environment, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: {error}\n  then check it with: ray status --address {address}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def slots(ray: Any, needs: Needs) -> int:
    """How many experts the cluster, as it is now, has room for at once; at least one."""
    there, wanted = ray.cluster_resources(), {"CPU": needs.cpus, "GPU": needs.gpus}
    return max(1, min(int(there.get(name, 0) // count) for name, count in wanted.items() if count))


def job(home: Home, repo: Any, expert: str, stages: list[Any]) -> Job:
    """An expert's job: without what its stages are to make, but for what DVC leaves in place (`persist`)."""
    made = [out for stage in stages for out in stage.outs if not out.persist]
    left_out = tuple(f"{Path(out.fs_path).relative_to(home.root)}" for out in made)
    files = {
        name: content
        for name, content in read_files(home.root, expert).items()
        if not any(name == out or name.startswith(f"{out}/") for out in left_out)
    }
    told = {name: value for name, value in os.environ.items() if name.startswith("DMOE_")}
    reads = {stage: set(repo.index.graph.successors(stage)) for stage in stages}
    order = {kind(stage): [kind(other) for other in stages if other in reads[stage]] for stage in stages}
    return Job(expert, order, files, str(home.root), told)


def kind(stage: Any) -> str:
    """`train` of `train@product`."""
    return str(stage.name.partition("@")[0])


def _result(ray: Any, ref: Any) -> Built:
    try:
        found: Built = ray.get(ref)
    except ray.exceptions.RayError as error:  # lost more than TRIES times, or killed for want of memory
        return Built([], {"": str(error).strip().splitlines()[0]}, {})
    return found


def take(home: Home, repo: Any, stages: list[Any], built: Built, outcome: Outcome, tell: Tell) -> None:
    """Puts what came back in its place and records the stages that made it."""
    from dvc.repo import lock_repo

    with lock_repo(repo):
        for stage in stages if built.files else ():
            stage.remove_outs(ignore_remove=False, force=False)
    replies = {name: content for name, content in built.files.items() if name.startswith(REPLIES)}
    for name, content in replies.items():
        path = home.root / name
        write_json(path, {**(read_json(path) if path.exists() else {}), **json.loads(content)})
    write_files(home.root, {name: content for name, content in built.files.items() if name not in replies})
    done = [stage for stage in stages if kind(stage) in built.done]
    record(repo, done)
    outcome.made += [stage.name for stage in done]
    expert = expert_of(stages[0])
    for name, why in built.failed.items():
        outcome.failed[f"{name}@{expert}" if name else expert] = why
        tell(f"failed: {f'{name} of ' if name else ''}{expert}: {why}")
    outcome.held_back += [stage.name for stage in stages if kind(stage) not in (*built.done, *built.failed)]


# -- on a node ------------------------------------------------------------------------------------


def run_line(job: Job) -> Built:
    """Runs the stages of one expert on this node, in a folder of its own, but for those behind one that fails."""
    from factory.cli import stage_runs

    os.environ.update(job.environment)
    runs: dict[str, Shared] = stage_runs()
    done: list[str] = []
    failed: dict[str, str] = {}
    with workplace(job) as root:
        for name, read in job.stages.items():
            if not set(read) <= set(done):
                continue
            try:
                with runs[name]() as run:
                    run(job.expert)
            except Exception as error:  # told where it was asked for: a node's trace would say nothing there
                failed[name] = str(error) if isinstance(error, UserError) else repr(error)
            else:
                done.append(name)
        return Built(done, failed, read_files(root, job.expert))


@contextmanager
def workplace(job: Job) -> Iterator[Path]:
    """A checkout for one expert, in which the process stands: what is only read is linked, the rest is its own."""
    shipped, asked = Path.cwd(), Path(job.root)
    with tempfile.TemporaryDirectory(prefix=f"dmoe-{job.expert}-") as folder:
        root = Path(folder)
        (root / "models").mkdir()
        link(shipped, root)
        link(shipped / "models", root / "models")
        link(asked / "models", root / "models")  # what was too large to travel
        write_files(root, job.files)
        os.chdir(root)
        try:
            yield root
        finally:
            os.chdir(shipped)


def link(source: Path, target: Path) -> None:
    """Links everything in `source` that is not in `target` yet."""
    for path in source.iterdir() if source.is_dir() else ():
        if path.name not in STAYS and not (target / path.name).exists():
            (target / path.name).symlink_to(path)


def read_files(root: Path, expert: str) -> Files:
    """All files of an expert under datasets/ and experts/, and the base's kept replies."""
    folders = (root / "datasets" / expert, root / "experts" / expert, root / REPLIES)
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths if path.name != ".gitignore"}


def write_files(root: Path, files: Files) -> None:
    """Each whole or not at all."""
    for name, content in files.items():
        with whole(root / name) as temporary:
            temporary.write_bytes(content)
