"""The experts that can be served, as their manifests describe them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.errors import UserError, relative, shown
from factory.paths import Home
from factory.store import read_json, sha256

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
        raw["name"], raw["lora_id"], raw["base_model"], adapter, scale, keywords, not_keywords,
        digest=digest, probes=probes, peft=peft if peft.is_dir() else None,
        routing=routing if routing.is_file() else None,
    )  # fmt: skip
