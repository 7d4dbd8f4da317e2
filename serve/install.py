"""`dmoe install`: fetch, verify, ask whose it is and what traffic it would take, and only then put it in its place.

A package that is refused leaves nothing behind. A kill at any time leaves what was installed as it was; the rest of
it lies in incoming/, which the next install empties.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from factory.embed import Encoder
from factory.errors import UserError, shown
from factory.gguf_file import Base
from factory.paths import Home
from factory.seeds import read_seeds
from factory.store import read_json, read_text
from factory.template import NAME
from serve.fetch import fetched
from serve.market import RESERVED, Installed, State, locked, market_experts, read_manifest, read_state, write_state
from serve.package_check import Package, opened
from serve.router import Router, make_router, route
from serve.signing import Signer, publisher, signer

MOST_TAKEN = 0.01  # of others' traffic; a newcomer that takes more is reached by name alone


@dataclass(frozen=True)
class Taken:
    """What share of some questions a newcomer would take: `of` says whose questions, `number` how many."""

    of: str
    number: int
    share: float


@dataclass(frozen=True)
class Done:
    """What came of an install: `state` is "current" (answers now), "next" (waits) or "there" (was there already)."""

    name: str
    expert: str  # the folder's name: lora_id, or what --as says
    digest: str
    state: str
    signed: Signer
    warnings: tuple[str, ...]
    taken: tuple[Taken, ...]
    routed: bool


def install(
    source: str,
    folder: Path,
    base: Base,
    asked: dict[str, list[str]],
    *,
    checkout: Sequence[Installed] = (),
    name: str | None = None,
    routed: bool = False,
    encoder: Encoder | None = None,
) -> Done:
    """Installs a package; the first of its kind answers at once, an upgrade waits as NAME@next.

    Args:
        source: a tar, a folder, https://... or hf://OWNER/NAME[@REVISION].
        folder: $DMOE_HOME.
        base: what is served here.
        asked: questions of others, by whose they are; see `taken`.
        checkout: experts that are served beside the installed ones.
        name: what it is called here, instead of the package's own name.
        routed: let `auto` choose it whatever traffic it takes.
        encoder: with which the server's router reads questions.

    Raises:
        UserError: the package is not sound, not for this base, or its name is taken.
    """
    if name is not None and (not re.fullmatch(NAME, name) or name in RESERVED or len(name) > 64):
        raise UserError(f"--as: {shown(name)} is no name for an expert: a-z, 0-9 and _ only, not auto, not base")
    with _incoming(folder) as incoming, opened(fetched(source, incoming), base, incoming, source) as package:
        signed = signer(package.folder, folder / "trusted", source)
        manifest = package.manifest
        expert = folder / "installed" / (name or manifest.lora_id)
        called = name or manifest.name
        others = [*checkout, *market_experts(folder)]
        _refuse_name(called, expert, others, source)
        _refuse_successor(expert, package, signed, source)
        newcomer = replace(read_manifest(package.folder / "manifest.json"), name=called, lora_id=expert.name)
        found = taken(newcomer, others, asked, encoder)
        routed = routed or all(part.share <= MOST_TAKEN for part in found)
        state = _put(package, expert, routed)
        return Done(called, expert.name, package.digest, state, signed, package.warnings, found, routed)


@contextmanager
def _incoming(folder: Path) -> Iterator[Path]:
    """An empty folder for what is looked at, of which nothing stays; what a kill left in it goes first."""
    with locked(folder):
        incoming = folder / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        try:
            yield incoming
        finally:
            shutil.rmtree(incoming, ignore_errors=True)


def _put(package: Package, expert: Path, routed: bool) -> str:
    """The rename, then the state: between the two the package is there and no expert yet."""
    state = read_state(expert)
    if package.digest in (state.current, state.next):
        return "there"
    target = expert / package.digest
    if package.digest != state.previous:
        shutil.rmtree(target, ignore_errors=True)  # of a killed install
        expert.mkdir(parents=True, exist_ok=True)
        package.folder.rename(target)
    if state.current is None:
        write_state(expert, State(current=package.digest, routed=routed))
        return "current"
    previous = None if state.previous == package.digest else state.previous
    write_state(expert, replace(state, next=package.digest, next_routed=routed, previous=previous))
    return "next"


def _refuse_name(called: str, expert: Path, others: Sequence[Installed], source: str) -> None:
    for other in others:
        ours = other.adapter.is_relative_to(expert)
        if other.name.removesuffix("@next") == called and not ours:
            raise UserError(f"{called!r} is another expert here already\n  then run: dmoe install {source} --as NAME")


def _refuse_successor(expert: Path, package: Package, signed: Signer, source: str) -> None:
    """An expert is upgraded by the same lora_id alone and, if it was signed, by its own publisher alone."""
    current, cure = read_state(expert).current, f"\n  then run: dmoe install {source} --as NAME"
    if current is None:
        return
    lora_id, key = read_json(expert / current / "manifest.json")["lora_id"], publisher(expert / current)
    if lora_id != package.manifest.lora_id:
        raise UserError(f"{expert.name!r} is installed already, and is another expert ({lora_id}){cure}")
    if key and key != signed.key:
        who = "another publisher" if signed.key else "an unsigned package"
        raise UserError(f"{expert.name}: was signed by key {key[:12]}, and this is of {who}{cure}")


# -- what traffic a newcomer would take ---------------------------------------------------------------


def taken(
    newcomer: Installed, others: Sequence[Installed], asked: dict[str, list[str]], encoder: Encoder | None = None
) -> tuple[Taken, ...]:
    """The share of each group of questions that `newcomer` takes from others, or from the base."""
    before = make_router(others, encoder)
    after = make_router([*(other for other in others if other.name != newcomer.name), newcomer], encoder)
    groups = {of: questions for of, questions in asked.items() if of != newcomer.name and questions}
    return tuple(Taken(of, len(qs), share(before, after, newcomer.name, qs)) for of, qs in groups.items())


def share(before: Router, after: Router, name: str, questions: Sequence[str]) -> float:
    """The share of `questions` that `name` takes from who answered `before`: for itself, or for nobody by a tie."""
    answered = [(route(before, q).expert, route(after, q).expert) for q in questions]
    return sum(old not in (name, new) for old, new in answered) / len(questions)


def asked_of_others(home: Home | None, folder: Path) -> dict[str, list[str]]:
    """Whose questions -> the questions: everyday ones, the seeds of the checkout's experts, and what packages tell."""
    asked = {"everyday questions": [seed.instruction for seed in read_seeds(home.general, None)]} if home else {}
    for expert in in_checkout(home) if home else []:
        assert home is not None
        lines = read_text(home.seeds(expert.name)).splitlines() if home.seeds(expert.name).exists() else []
        asked[expert.name] = [json.loads(line)["instruction"] for line in lines if line.strip()]
    for expert in market_experts(folder):
        template = read_json(expert.adapter.parent / "template.json")
        asked[expert.name] = [*template["route"]["examples"], *(probe.question for probe in expert.probes)]
    return asked


def in_checkout(home: Home) -> list[Installed]:
    """The checkout's own experts, as far as they are built."""
    built = [path.parent for path in sorted(home.root.glob("experts/*/adapter.gguf"))]
    return [read_manifest(folder / "manifest.json") for folder in built if (folder / "manifest.json").exists()]
