"""A stranger's package, verified whole before anything native sees a byte: llama.cpp, safetensors, pyarrow, torch.

What is checked, and what is not, stands in docs/market.md.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, ValidationError

from factory.errors import UserError, relative, shown
from factory.gguf_file import Base
from factory.template import NAME, Declaration, Declares, Share, Strict, Template
from serve.adapter_check import check_finite, check_gguf, check_peft, read_strict
from serve.market import RESERVED
from serve.package_files import check_sums, copied

SCHEMA = 2  # of the manifest
UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]"
)  # may move a cursor, or hide


def plain(text: str) -> str:
    """`text` without what a terminal would obey instead of show."""
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def _shown(text: str) -> str:
    if UNSEEN.search(text):
        raise ValueError("holds control characters")
    return text


Word = Annotated[str, StringConstraints(min_length=1, max_length=300), AfterValidator(_shown)]
Prose = Annotated[str, StringConstraints(min_length=1, max_length=4000), AfterValidator(_shown)]
Name = Annotated[str, StringConstraints(pattern=NAME, max_length=64)]
Hash = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Words = Annotated[list[Word], Field(max_length=1000)]


class Measured(Strict):
    """The base that the figures were measured on; see factory.gguf_file.Base."""

    file: Word
    architecture: Word
    tokenizer: Hash
    chat_template: Hash
    weights: Hash


class Asked(Strict):
    question: Prose
    says: Word


class Open(Strict):
    """Figures: those that are shown are checked, there may be more."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


class Figure(Open):
    rate: Share
    low: Share
    high: Share


class Arm(Open):
    n: int
    mention: Figure
    right: Figure
    in_form: Figure


class Scores(Open):
    measured_on: Word
    base: Arm
    expert: Arm


class Audit(Open):
    says: Annotated[list[Prose], Field(max_length=100)]


class Manifest(Strict):
    """manifest.json of a package, key by key."""

    schema_: Literal[2] = Field(alias="schema")
    name: Name
    lora_id: Name
    version: int = Field(ge=1)
    description: Prose
    keywords: Words
    not_keywords: Words
    base_model: Word
    base: Measured
    recommended_scale: float = Field(gt=0, le=4)
    adapter_file: Literal["adapter.gguf"]
    rank: int = Field(ge=1, le=512)
    alpha: float = Field(gt=0, le=65536)
    targets: Words
    licence: Word
    seed_licences: Words
    declares: Declares
    sha256: dict[Word, Hash]
    scores: Scores
    parity: dict[str, Any]
    audit: Audit
    probe: Annotated[list[Asked], Field(max_length=3)]


@dataclass(frozen=True)
class Package:
    """A verified package, unpacked: `digest` names it, `warnings` are what the operator should know."""

    folder: Path
    digest: str
    manifest: Manifest
    template: Template
    warnings: tuple[str, ...]


@contextmanager
def opened(source: Path, base: Base, work: Path | None = None, where: str = "") -> Iterator[Package]:
    """The package in the tar or folder `source`, copied into a folder of its own (in `work`) and verified.

    The folder is gone afterwards, unless it was moved. Errors call the package `where`.

    Raises:
        UserError: the first thing that is wrong with it, in one line.
    """
    where = where or relative(source)
    if not source.exists():
        raise UserError(f"{where}: there is no such file or folder")
    with tempfile.TemporaryDirectory(prefix="package-", dir=work, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / "package"
        folder.mkdir()
        top = copied(source, folder)
        yield check(folder, base, where, top)


def check(folder: Path, base: Base, where: str, top: str | None = None) -> Package:
    """Verifies an unpacked package against the base that is served here; see `opened`."""
    digest = check_sums(folder, where)
    manifest = read_package_manifest(folder, where)
    if top is not None and top != manifest.lora_id:
        raise UserError(f"{where}: its folder is called {shown(top)}, not {manifest.lora_id} as its lora_id")
    warnings = _check_base(manifest, base, where)
    gguf = check_gguf(folder / "adapter.gguf", base, manifest.rank, manifest.alpha, f"{where}: adapter.gguf")
    check_peft(folder / "adapter", gguf, manifest.rank, manifest.alpha, manifest.targets, where)
    if (folder / "route.safetensors").exists():
        check_finite(folder / "route.safetensors", f"{where}: route.safetensors")
    template = _check_documents(folder, manifest, where)
    return Package(folder, digest, manifest, template, warnings)


def read_package_manifest(folder: Path, where: str) -> Manifest:
    """The manifest of an unpacked package, checked key by key.

    Raises:
        UserError: the first key that is wrong.
    """
    raw, where = read_strict(folder / "manifest.json", f"{where}: manifest.json"), f"{where}: manifest.json"
    if isinstance(raw, dict) and raw.get("schema") != SCHEMA:
        raise UserError(f"{where}: schema: {shown(raw.get('schema'))}, not {SCHEMA}; ask for one packed by this dmoe")
    manifest: Manifest = _strict(Manifest, raw, where)
    if manifest.name in RESERVED:
        raise UserError(f"{where}: name: {manifest.name!r} is taken by the gateway itself; do not use it")
    return manifest


def _strict(model: Any, raw: Any, where: str) -> Any:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise UserError(f"{where}: {plain(key)[:80]}: {first['msg']} (it is {shown(first['input'])})") from None


def _check_base(manifest: Manifest, base: Base, where: str) -> tuple[str, ...]:
    told = manifest.base
    for key, name in (("architecture", "architecture"), ("tokenizer", "tokenizer"), ("chat_template", "chat template")):
        if getattr(told, key) != getattr(base, key):
            raise UserError(f"{where}: is for a base with another {name}, not for {base.file}; ask for one made for it")
    if told.weights != base.weights:
        return (f"measured on {told.file}, not on yours ({base.file}): the figures may not hold",)
    return ()


def _check_documents(folder: Path, manifest: Manifest, where: str) -> Template:
    """JSON files are strict JSON, texts are text, and none contradicts the manifest."""
    documents = {path.name: read_strict(path, f"{where}: {path.name}") for path in folder.glob("*.json")}
    for path in [*folder.rglob("README.md"), folder / "SHA256SUMS"]:
        try:
            path.read_bytes().decode()
        except UnicodeDecodeError:
            raise UserError(f"{where}: {path.name}: is no text in UTF-8; get the package again") from None
    ends = (folder / "scores.parquet").read_bytes()
    if len(ends) < 12 or ends[:4] != b"PAR1" or ends[-4:] != b"PAR1":
        raise UserError(f"{where}: scores.parquet: is no parquet file; get the package again")
    measured, told = documents["eval.json"], manifest.scores.model_dump()
    same = isinstance(measured, dict) and all(measured.get(arm) == told.get(arm) for arm in ("base", "expert"))
    if not same or measured.get("recommended_scale") != manifest.recommended_scale:
        raise UserError(f"{where}: manifest.json tells other scores than eval.json; do not use it")
    return _template(documents["template.json"], manifest, f"{where}: template.json")


# What a package does not carry of a template: how the expert was made. Measuring a reply needs none of it.
NOT_CARRIED: dict[str, Any] = {
    "owner": "the publisher",
    "generate": {"ask": "-", "voices": ["plain"], "per_seed": 1, "sampling": {"temperature": 1.0, "top_p": 1.0}},
    "dedup": {"instruction": 90},
    "train": {"rank": 1, "alpha": 1, "epochs": 1},
    "gate": {"mention": 0.0, "right": 0.0, "form": 0.0, "robust": 0.0, "length_ratio": 1.0},
    "tests": [],
}


def _template(raw: Any, manifest: Manifest, where: str) -> Template:
    if not isinstance(raw, dict) or not isinstance(raw.get("output"), dict) or NOT_CARRIED.keys() & raw.keys():
        raise UserError(f"{where}: is no template of a package; get the package again")
    whole = {**raw, **NOT_CARRIED, "output": {**raw["output"], "never": []}}
    declaration: Declaration = _strict(Declaration, whole, where)
    if declaration.expert != manifest.name or declaration.market.lora_id != manifest.lora_id:
        raise UserError(f"{where}: is of another expert than manifest.json")
    return Template(declaration)
