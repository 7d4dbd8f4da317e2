"""`dmoe repro-all`: what `dvc repro --keep-going` does, in one process, stage by stage instead of expert by expert.

DVC says what is stale, removes its outputs, looks whether it has been made before, and records what was made; only no
shell is started for each command. So what the runs of one stage share stays in memory: imports, the base that adapters
are trained on, the teacher's server. A stage that fails holds back what reads from it, and no other expert. What
is made is recorded many stages at a time, as DVC writes all of dvc.lock for each: a kill loses at most what was made
in RECORD_SECONDS.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.errors import UserError
from factory.paths import Home
from factory.store import read_json, read_yaml, write_json

if TYPE_CHECKING:
    from dvc.repo import Repo

RECORD_SECONDS = 120.0
Run = Callable[[str], None]  # runs one stage for one expert; "" for a stage of no expert
Shared = Callable[[], AbstractContextManager[Run]]  # opens what all runs of one stage share
Tell = Callable[[str], None]


@dataclass
class Outcome:
    """Stages by name, `train@product`."""

    made: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)  # made before from the same inputs: DVC had the outputs
    failed: dict[str, str] = field(default_factory=dict)  # with the reason
    held_back: list[str] = field(default_factory=list)  # they read what a failed stage makes


def repro_all(home: Home, experts: Sequence[str], shared: dict[str, Shared], tell: Tell) -> Outcome:
    """Runs every stale stage of `experts`, stage after stage in the order of dvc.yaml.

    `shared` says for every stage how it is run. Ends as `dvc repro` would have: a later one finds nothing to do.
    """
    from dvc.repo import Repo

    outcome = Outcome()
    with Repo(str(home.root)) as repo:
        due = {stage.name.partition("@")[0] for stage in stale_stages(repo, [*experts, ""])}
        made = Made(repo)
        try:
            for name in read_yaml(home.root / "dvc.yaml")["stages"]:
                # to look again whether a stage is stale reads all of dvc.lock: a second, with fifty experts
                if name in due and (stages := _stale(repo, name, experts, outcome)):
                    with shared[name]() as run:
                        _run(home, name, stages, run, outcome, made, tell)
        finally:
            made.record()
    return outcome


def expert_of(stage: Any) -> str:
    """`product` of `train@product`; empty for a stage of no expert."""
    return str(stage.name.partition("@")[2])


@dataclass
class Made:
    """Stages that were run, recorded some at a time: for each record DVC reads and writes all of dvc.lock."""

    repo: "Repo"
    stages: list[Any] = field(default_factory=list)
    recorded: float = field(default_factory=time.monotonic)

    def add(self, stage: Any) -> None:
        self.stages.append(stage)
        if time.monotonic() - self.recorded > RECORD_SECONDS:
            self.record()

    def record(self) -> None:
        record(self.repo, self.stages)
        self.stages, self.recorded = [], time.monotonic()


def _stale(repo: "Repo", name: str, experts: Sequence[str], outcome: Outcome) -> list[Any]:
    """The stages of that name that DVC would run, and that read nothing of a stage that failed."""
    from dvc.repo import lock_repo
    from networkx import ancestors

    with lock_repo(repo):
        graph = repo.index.graph  # from a stage to those that it reads from
        barred = set().union(*(ancestors(graph, stage) for stage in graph if stage.name in outcome.failed))
        mine = [stage for stage in in_order(repo, [*experts, ""]) if stage.name.partition("@")[0] == name]
        outcome.held_back += [stage.name for stage in mine if stage in barred]
        return [stage for stage in mine if stage not in barred and stage.changed()]


def _run(home: Home, name: str, stages: list[Any], run: Run, outcome: Outcome, made: Made, tell: Tell) -> None:
    from dvc.exceptions import DvcException

    began = time.monotonic()
    for i, stage in enumerate(stages):
        try:
            if restored(made.repo, stage):
                outcome.restored.append(stage.name)
                made.add(stage)
                continue
            left = (time.monotonic() - began) / i * (len(stages) - i) if i else 0.0
            tell(f"{name} {i + 1} of {len(stages)}: {expert_of(stage)}" + (f", {left / 60:.0f} min left" if i else ""))
            before = time.monotonic()
            run(expert_of(stage))
            _keep_time(home, stage.name, time.monotonic() - before)
        except Exception as error:  # whatever it is, the other experts have nothing to do with it
            outcome.failed[stage.name] = str(error) if isinstance(error, (UserError, DvcException)) else repr(error)
            tell(f"failed: {stage.name}: {outcome.failed[stage.name]}")
            continue
        outcome.made.append(stage.name)
        made.add(stage)


def restored(repo: "Repo", stage: Any) -> bool:
    """Removes the outputs, as DVC does before a run. True: it had been run on the same inputs, and they are back."""
    from dvc.repo import lock_repo
    from dvc.stage.cache import RunCacheNotFoundError

    with lock_repo(repo):
        for dep in stage.deps:
            dep.get_hash()  # a key or a file that is missing is told while the outputs are still there
        stage.remove_outs(ignore_remove=False, force=False)
        try:
            repo.stage_cache.restore(stage)
        except RunCacheNotFoundError:
            return False
    return True


def record(repo: "Repo", stages: list[Any]) -> None:
    """Writes what `stages` have made into DVC's cache and dvc.lock: `dvc commit` of all of them at once."""
    from dvc.repo import lock_repo

    if not stages:
        return
    with lock_repo(repo):
        for stage in stages:
            stage.save()
            stage.commit()
        stages[0].dvcfile.dump_stages(stages, update_pipeline=False)


def stale(home: Home, experts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Stages of `experts` that would run, and those behind them, which run too where what they read is different."""
    from dvc.repo import Repo

    with Repo(str(home.root)) as repo:
        now, behind = _stale_and_behind(repo, [*experts, ""])
        return [stage.name for stage in now], [stage.name for stage in behind]


def stale_stages(repo: "Repo", experts: Sequence[str]) -> list[Any]:
    """Both at once, in the order in which they run."""
    now, behind = _stale_and_behind(repo, experts)
    return [stage for stage in in_order(repo, experts) if stage in now or stage in behind]


def in_order(repo: "Repo", experts: Sequence[str]) -> list[Any]:
    """All stages of `experts`, those of dvc.yaml one after the other, within one in the order of `experts`."""
    names = list(read_yaml(Path(repo.root_dir) / "dvc.yaml")["stages"])
    mine = [stage for stage in repo.index.stages if expert_of(stage) in experts]
    return sorted(mine, key=lambda s: (names.index(s.name.partition("@")[0]), experts.index(expert_of(s))))


def _stale_and_behind(repo: "Repo", experts: Sequence[str]) -> tuple[list[Any], list[Any]]:
    from dvc.repo import lock_repo
    from networkx import ancestors

    with lock_repo(repo):
        mine = in_order(repo, experts)
        now = [stage for stage in mine if stage.changed()]
        graph = repo.index.graph
        behind = set().union(*(ancestors(graph, stage) for stage in now)) - set(now)
        return now, [stage for stage in mine if stage in behind]


def times(home: Home) -> dict[str, float]:
    """Seconds that each stage took when it last ran here, by `train@product`."""
    path = home.work / "times.json"
    found: dict[str, float] = read_json(path) if path.exists() else {}
    return found


def _keep_time(home: Home, stage: str, seconds: float) -> None:
    write_json(home.work / "times.json", {**times(home), stage: round(seconds, 2)})
