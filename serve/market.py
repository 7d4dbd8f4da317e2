"""The experts that can be served: those of a checkout, and those installed under $DMOE_HOME. The disk is the truth.

    $DMOE_HOME/installed/<expert>/<sha256>/...     an unpacked package; <sha256> is of its SHA256SUMS
    $DMOE_HOME/installed/<expert>/state.json       which of them answers, which waits, which answered before
    $DMOE_HOME/trusted/<name>.pub                  publishers' keys
    $DMOE_HOME/incoming/                           what is being looked at; nothing is ever served from it

<expert> is the package's lora_id, or the name it was given by `install --as`. state.json is written last, whole or not
at all: a folder that it does not name does not exist.
"""

import fcntl
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from factory.errors import UserError, relative, shown
from factory.paths import Home
from factory.store import read_json, sha256, write_json

RESERVED = ("auto", "base")  # names of models that are no expert


@dataclass(frozen=True)
class Probe:
    """A question that shows whether an adapter is applied: only with it does the reply hold `says`."""

    question: str
    says: str


@dataclass(frozen=True)
class Installed:
    """One expert, ready to be loaded."""

    name: str  # what `model` is called in a request
    lora_id: str
    base_model: str
    adapter: Path
    scale: float  # recommended_scale: what "on" means
    keywords: list[str]
    not_keywords: list[str]
    digest: str = ""  # SHA-256 of `adapter`
    peft: Path | None = None  # the same adapter for transformers and vLLM
    routing: Path | None = None  # what the router knows of it beyond keywords: route.safetensors
    probes: tuple[Probe, ...] = ()
    routed: bool = True  # whether `auto` may choose it; else it is reached by name alone


KINDS: dict[str, type | tuple[type, ...]] = {
    "name": str, "lora_id": str, "base_model": str, "adapter_file": str, "recommended_scale": (int, float),
    "keywords": list, "not_keywords": list,
}  # fmt: skip


def installed(home: Home) -> list[Installed]:
    """Every expert with a manifest, in order of name: that order is the order of loading.

    Raises:
        UserError: there is none, or a manifest is wrong or names a missing adapter.
    """
    found = [read_manifest(path) for path in sorted(home.root.glob("experts/*/manifest.json"))]
    if not found:
        where = relative(home.root / "experts")
        raise UserError(f"{where}: holds no expert with a manifest.json\n  then run: dvc repro")
    names = [expert.name for expert in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"experts/*/manifest.json: name: {', '.join(twice)} is there twice; remove one folder")
    mixed = sorted({expert.base_model for expert in found})
    if len(mixed) > 1:
        bases = " and ".join(mixed)
        raise UserError(f"experts/*/manifest.json: base_model: {bases}; all must share one\n  then run: dvc repro")
    return found


def read_manifest(path: Path) -> Installed:
    """One manifest, checked as far as serving needs it.

    Raises:
        UserError: a key is missing or of the wrong kind, or the adapter is not there.
    """
    raw, where = read_json(path), relative(path)
    if not isinstance(raw, dict):
        raise UserError(f"{where}: must be a mapping of keys, not {shown(raw)}")
    for key, kind in KINDS.items():
        if not isinstance(raw.get(key), kind):
            what = f"cannot be {shown(raw[key])}" if key in raw else "is missing"
            raise UserError(f"{where}: {key}: {what}\n  then run: dvc repro")
    if raw["name"] in RESERVED:
        raise UserError(f"{where}: name: {raw['name']!r} is taken by the gateway itself; rename the expert")
    scale = float(raw["recommended_scale"])
    if not math.isfinite(scale) or scale == 0:
        raise UserError(f"{where}: recommended_scale: {scale} would serve the base, or nonsense\n  then run: dvc repro")
    return _ready(path, raw, scale)


def _ready(path: Path, raw: dict[str, Any], scale: float) -> Installed:
    adapter = path.parent / raw["adapter_file"]
    if not adapter.resolve().is_relative_to(path.parent.resolve()):
        raise UserError(f"{relative(path)}: adapter_file: {raw['adapter_file']!r} lies outside the expert's folder")
    if not adapter.is_file():
        raise UserError(
            f"{relative(adapter)}: there is no such file, but {relative(path)} names it\n  then run: dvc repro"
        )
    claimed, digest = raw.get("sha256", {}).get("adapter.gguf"), sha256(adapter)
    if claimed and claimed != digest:  # a gate was missed, or a build stopped half-way
        raise UserError(f"{relative(adapter)}: is not the file that {relative(path)} describes\n  then run: dvc repro")
    keywords, not_keywords = ([str(word) for word in raw[key]] for key in ("keywords", "not_keywords"))
    peft, routing = path.parent / "adapter", path.parent / "route.safetensors"
    probes = tuple(Probe(p["question"], p["says"]) for p in raw.get("probe", []))
    return Installed(
        raw["name"], raw["lora_id"], raw["base_model"], adapter, scale, keywords, not_keywords, digest=digest,
        probes=probes, peft=peft if peft.is_dir() else None, routing=routing if routing.is_file() else None,
    )  # fmt: skip


def served(home: Home | None, folder: Path) -> list[Installed]:
    """What a server serves: the checkout's experts, if there is a checkout, and the installed ones, which go first.

    Raises:
        UserError: there is none, or they are of several bases.
    """
    there = market_experts(folder)
    names = {expert.name for expert in there}
    if home and (not there or any(home.root.glob("experts/*/adapter.gguf"))):
        there += [expert for expert in installed(home) if expert.name not in names]
    if not there:
        raise UserError(f"{folder}: no expert is installed\n  then run: dmoe install PACKAGE")
    mixed = sorted({expert.base_model for expert in there})
    if len(mixed) > 1:
        raise UserError(f"the experts are of several bases, {' and '.join(mixed)}; remove some (dmoe list)")
    return there


# -- what is installed ------------------------------------------------------------------------------


def dmoe_home() -> Path:
    """Where packages are installed: $DMOE_HOME, else ~/.dmoe."""
    return Path(os.environ.get("DMOE_HOME") or "~/.dmoe").expanduser().absolute()


@dataclass(frozen=True)
class State:
    """One expert's state.json: packages by their SHA-256, and whether `auto` may choose each."""

    current: str | None = None  # answers by the expert's name
    next: str | None = None  # answers by NAME@next, until it is promoted
    previous: str | None = None  # what rollback brings back
    routed: bool = True
    next_routed: bool = True
    previous_routed: bool = True


def read_state(expert: Path) -> State:
    """The state of one installed expert, by its folder; an empty one where there is none.

    Raises:
        UserError: the file is not what this program writes.
    """
    path = expert / "state.json"
    if not path.exists():
        return State()
    raw = read_json(path)
    try:
        state = State(**raw)
    except TypeError:
        raise UserError(f"{relative(path)}: holds other keys than {', '.join(asdict(State()))}") from None
    for name in ("current", "next", "previous"):
        digest = getattr(state, name)
        if digest is not None and not (isinstance(digest, str) and len(digest) == 64 and digest.isalnum()):
            raise UserError(
                f"{relative(path)}: {name}: {shown(digest)} is no SHA-256\n  then run: dmoe remove {expert.name}"
            )
    return state


def write_state(expert: Path, state: State) -> None:
    """Makes `state` the truth, then removes the packages that it no longer names."""
    write_json(expert / "state.json", asdict(state))
    for folder in expert.iterdir():
        if folder.is_dir() and folder.name not in (state.current, state.next, state.previous):
            shutil.rmtree(folder, ignore_errors=True)


def market_experts(folder: Path) -> list[Installed]:
    """All installed experts in order of name; what waits to be promoted is `NAME@next`, reached by name alone.

    Raises:
        UserError: a package on the disk is not what was installed, with the command that removes it.
    """
    found = []
    for path in sorted(folder.glob("installed/*/state.json")):
        state = read_state(path.parent)
        if state.current:
            found.append(_installed(path.parent, state.current, "", state.routed))
        if state.next:
            found.append(_installed(path.parent, state.next, "@next", False))
    return found


def _installed(expert: Path, digest: str, suffix: str, routed: bool) -> Installed:
    try:
        found = read_manifest(expert / digest / "manifest.json")
    except UserError as error:
        raise UserError(f"{str(error).splitlines()[0]}\n  then run: dmoe remove {expert.name}") from None
    called = _called(expert, {"name": found.name, "lora_id": found.lora_id})
    return replace(found, name=called + suffix, lora_id=expert.name, routed=routed)


def _called(expert: Path, manifest: dict[str, Any]) -> str:
    """An expert's name here: its folder's, where `install --as` chose that, else its own."""
    return str(manifest["name"]) if expert.name == manifest["lora_id"] else expert.name


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone with what is installed: one program at a time changes it. Readers need no lock.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; name another with DMOE_HOME") from None
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def find(folder: Path, name: str) -> Path:
    """The folder of an installed expert, by its name or its lora_id.

    Raises:
        UserError: there is none.
    """
    known: dict[str, Path] = {}
    for path in sorted(folder.glob("installed/*/state.json")):
        manifest = path.parent / str(read_state(path.parent).current) / "manifest.json"
        if path.parent.name == name or not manifest.exists():
            known[path.parent.name] = path.parent
        else:
            known[_called(path.parent, read_json(manifest))] = path.parent
    if name not in known:
        raise UserError(f"{shown(name)} is not installed; there are {', '.join(sorted(known)) or 'none'}")
    return known[name]


def promote(folder: Path, name: str) -> State:
    """What waits as NAME@next answers as NAME from now on; what did so before can be brought back by `rollback`.

    Raises:
        UserError: nothing waits.
    """
    with locked(folder):
        expert = find(folder, name)
        old = read_state(expert)
        if old.next is None:
            raise UserError(f"{name}: nothing waits to be promoted\n  then run: dmoe install PACKAGE")
        new = State(old.next, None, old.current, old.next_routed, True, old.routed)
        write_state(expert, new)
        return new


def rollback(folder: Path, name: str) -> State:
    """The package that answered before answers again; done twice, it changes nothing.

    Raises:
        UserError: there was none before.
    """
    with locked(folder):
        expert = find(folder, name)
        old = read_state(expert)
        if old.previous is None:
            raise UserError(f"{name}: there is no earlier package to go back to")
        new = replace(
            old, current=old.previous, previous=old.current, routed=old.previous_routed, previous_routed=old.routed
        )
        write_state(expert, new)
        return new


def remove(folder: Path, name: str) -> None:
    """Removes all packages of an installed expert, or the one that waits as NAME@next; a damaged one by its lora_id.

    Raises:
        UserError: it is not installed.
    """
    with locked(folder):
        called, waits, _ = name.partition("@next")
        by_id = [path for path in folder.glob("installed/*") if path.name == called]
        expert = by_id[0] if by_id else find(folder, called)
        if waits:
            return write_state(expert, replace(read_state(expert), next=None))
        (expert / "state.json").unlink(missing_ok=True)  # first: from here on it does not exist
        shutil.rmtree(expert)
