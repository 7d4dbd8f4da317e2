"""`dmoe teacher check` and `dmoe teacher cache`: the teacher's server, and the replies that were paid for."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from factory.errors import UserError
from factory.generate import of_seed, server_of
from factory.paths import Home, Params, Phrases, Profile
from factory.seeds import read_seeds
from factory.store import read_parquet
from factory.teacher.cache import Cache
from factory.template import read_template
from factory.tokens import counter

if TYPE_CHECKING:
    from factory.teacher.probe import Finding


def unasked(home: Home, params: Params, profile: Profile, cache: Cache) -> tuple[set[str], int]:
    """The keys of all kept replies that no expert's generate would use as its files stand, and their tokens.

    Raises:
        UserError: the teacher is the embedded one, under which nothing at all is asked for.
    """
    if isinstance(params.teacher, Phrases):
        raise UserError(
            "params.yaml: teacher.kind is phrases, which asks for no reply at all; all would be removed\n"
            "  then name the teacher whose replies you want to keep, and run it again"
        )
    from factory.teacher.chat import ChatTeacher

    kept, count, served = cache.keys(), counter(home, profile), params.teacher

    async def used(expert: str) -> set[str]:
        template = read_template(home.template(expert))
        teacher = ChatTeacher(template, served, cache, None)
        for seed in read_seeds(home.seeds(expert), template):
            await of_seed(template, seed, teacher, count, outside=False)
        return teacher.used

    for expert in params.experts:
        for key in asyncio.run(used(expert)):
            kept.pop(key, None)
    return set(kept), sum(kept.values())


def forget_failed(home: Home, params: Params, cache: Cache) -> int:
    """Forgets the replies of which nothing could be used, so that they are asked for again; returns how many.

    The candidates files that hold them go too (`dvc repro` makes them anew); what was good in them is kept.
    """
    from factory.teacher.chat import remember

    gone = 0
    for expert in params.experts:
        path = home.dataset(expert, "candidates.parquet")
        if path.exists() and (keys := useless(path)):
            remember(path, cache)
            cache.remove(keys)
            path.unlink()
            gone += len(keys)
    return gone


def useless(candidates: Path) -> set[str]:
    """The keys of replies in a candidates file of which not one variant could be used."""
    table = read_parquet(candidates, "dvc repro")
    if not {"request", "failure"} <= set(table.schema.names):
        return set()  # of an older form, which had no failures
    pairs = list(zip(table["request"].to_pylist(), table["failure"].to_pylist(), strict=True))
    return {key for key, _ in pairs} - {key for key, failure in pairs if not failure}


def check_teacher(home: Home, expert: str, params: Params) -> "list[Finding]":
    """What can be told about the server of params.yaml, with real requests of `expert`; their replies are kept.

    Raises:
        UserError: the teacher is the embedded one, or the server does not answer.
    """
    if isinstance(params.teacher, Phrases):
        raise UserError("params.yaml: teacher.kind is phrases, the embedded teacher: there is no server to check")
    from factory.teacher.chat import ChatTeacher
    from factory.teacher.probe import probe

    served, template = params.teacher, read_template(home.template(expert))
    seeds = read_seeds(home.seeds(expert), template)

    async def run() -> "list[Finding]":
        with Cache(home.replies) as cache:
            return await probe(served, server_of(home, served), ChatTeacher(template, served, cache, None), seeds)

    return asyncio.run(run())
