"""serve.yaml: how a server is run. Every key is always there; a wrong one is told with its line."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from factory.errors import Problems, UserError, relative
from factory.store import read_yaml
from factory.template import Strict, Text, problem_of
from serve.market import RESERVED, Installed

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Override(Strict):
    """What one expert's routing is here, whatever its package says. null leaves the package's own."""

    route: bool = Field(description="false: reached by name alone")
    keywords: list[Text] | None
    not_keywords: list[Text] | None


class Settings(Strict):
    """One server. Sizes in tokens, bytes and seconds, as their names say."""

    base: Text | None = Field(description="The base's GGUF; null: of the checkout's profile.")
    encoder: Text | None = Field(
        description="Of the router: a static table, or a folder of MiniLM (10 ms a question, and more often right: "
        "docs/routing.md); null: the table where there is one, else MiniLM, else words alone."
    )
    engine: Literal["xllamacpp", "llama-server", "vllm"]
    url: Text | None = Field(description="Of an engine that someone else started.")
    host: Text
    port: int = Field(ge=0, le=65535)
    slots: int = Field(ge=1, le=256, description="Requests that run at once, and prompts that are kept.")
    context: int = Field(ge=64, description="Tokens of one request, question and reply.")
    threads: int | None = Field(ge=1, description="Of the CPU; null leaves it to llama.cpp.")
    queue: int = Field(ge=1, description="Requests that may wait; one more gets 429.")
    wait_seconds: float = Field(gt=0, description="A request that has waited for so long gets 503.")
    body_bytes: int = Field(ge=1024)
    default_seconds: float = Field(gt=0, description="An adapter chosen by POST /lora-adapters is forgotten after.")
    probe_seconds: float | None = Field(gt=0, description="How often each expert is probed; null: never.")
    keys: dict[Text, Sha256] = Field(description="Client's name -> SHA-256 of its key; {}: no keys, loopback only.")
    admin: Sha256 | None = Field(description="SHA-256 of the key for install, promote and metrics.")
    log_text: bool = Field(description="Whether questions and replies are logged.")
    routes: dict[Text, Override]


DEFAULTS = Settings(
    base=None, encoder=None, engine="xllamacpp", url=None, host="127.0.0.1", port=8080, slots=8, context=2048,
    threads=None, queue=256, wait_seconds=120.0, body_bytes=1 << 20, default_seconds=900.0, probe_seconds=300.0,
    keys={}, admin=None, log_text=False, routes={},
)  # fmt: skip


def read_settings(path: Path) -> Settings:
    """serve.yaml, checked.

    Raises:
        Problems: all that is wrong in it, each with its line.
    """
    raw, file = read_yaml(path), relative(path)
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        known = list(Settings.model_fields)
        raise Problems([problem_of(file, raw, e, known) for e in error.errors()]) from None
    if settings.engine != "xllamacpp" and not settings.url:
        raise UserError(
            f"{file}: url: must name the {settings.engine} that is to be used, such as http://127.0.0.1:8081"
        )
    return settings


def settings_for(path: Path, host: str | None, port: int | None, required: bool) -> Settings:
    """The settings of a file, or the defaults where it is not there and need not be; host and port may be given.

    Raises:
        UserError: see read_settings.
    """
    settings = read_settings(path) if required or path.exists() else DEFAULTS
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = settings.model_copy(update=given)
    refuse_open(settings, relative(path))
    return settings


def refuse_open(settings: Settings, file: str) -> None:
    """Refuses to serve anyone on a network."""
    if settings.host not in ("127.0.0.1", "localhost", "::1") and not settings.keys:
        raise UserError(f"{file}: host: {settings.host} can be reached by others; add keys (dmoe key NAME makes one)")


def overridden(experts: list[Installed], routes: Mapping[str, Override]) -> list[Installed]:
    """The experts, routed as this server's settings say.

    Raises:
        UserError: an override of no expert.
    """
    names = {expert.name for expert in experts}
    if unknown := sorted(set(routes) - names - set(RESERVED)):
        raise UserError(f"serve.yaml: routes.{unknown[0]}: is no expert; there are {', '.join(sorted(names))}")
    return [_overridden(expert, routes.get(expert.name)) for expert in experts]


def _overridden(expert: Installed, override: Override | None) -> Installed:
    if override is None:
        return expert
    return replace(
        expert,
        routed=expert.routed and override.route,
        keywords=expert.keywords if override.keywords is None else override.keywords,
        not_keywords=expert.not_keywords if override.not_keywords is None else override.not_keywords,
    )
