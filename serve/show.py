"""What a buyer reads before trusting a package: what is installed, the card, claimed figures, and what holds here."""

import random
from pathlib import Path

from factory.errors import UserError
from factory.schema import SCORES, read_rows
from factory.store import read_json, read_text
from serve.engine import Loaded, ask, started
from serve.market import Installed, market_experts
from serve.package_check import Figure, Manifest, Package, plain
from serve.signing import Signer, known_as, publisher

COLUMNS = ["name", "version", "state", "lora_id", "package", "signer", "chosen by auto"]
MOST_TOKENS = 512  # of a reply, as when the publisher measured
MEASURES = ("mention", "right", "in_form")


def listed(folder: Path) -> list[tuple[str, ...]]:
    """A row of COLUMNS for each installed expert, and for each that waits."""
    rows: list[tuple[str, ...]] = []
    for expert in market_experts(folder):
        package = expert.adapter.parent
        state = "next" if expert.name.endswith("@next") else "current"
        version, routed = (
            str(read_json(package / "manifest.json")["version"]),
            "yes" if expert.routed else "by name only",
        )
        rows.append(
            (expert.name, version, state, expert.lora_id, package.name[:12], str(signed(package, folder)), routed)
        )
    return rows


def signed(package: Path, folder: Path) -> Signer:
    """Whose an installed package is."""
    key = publisher(package)
    return Signer(key, known_as(folder / "trusted", key) if key else None)


def card(package: Path) -> str:
    """A verified package's card without the Hub's front matter, and without what a terminal would obey."""
    text = plain(read_text(package / "README.md"))
    return text.partition("\n---\n")[2].strip() if text.startswith("---\n") else text.strip()


def facts(manifest: Manifest) -> list[tuple[str, str]]:
    """(name, value) of what a package claims, from its manifest: a card is free text and may say anything."""
    expert, base, declares = manifest.scores.expert, manifest.scores.base, manifest.declares
    rates = [(f"{name}, base -> expert", _claim(getattr(base, name), getattr(expert, name))) for name in MEASURES]
    told = [
        ("name", f"{manifest.name} {manifest.version} ({manifest.lora_id})"),
        ("says of itself", manifest.description),
        ("base", f"{manifest.base_model} ({manifest.base.file})"),
        ("licence", manifest.licence),
        ("declares", f"interest: {declares.interest}; risk: {declares.domain_risk}; until {declares.valid_until}"),
        ("measured on", f"{manifest.scores.measured_on}; {expert.n} questions"),
        *rates,
        ("audit", "; ".join(manifest.audit.says)),
        ("all figures are", "claimed by the publisher; dmoe verify --rescore measures some of them here"),
    ]
    return [(name, plain(" ".join(text.split()))) for name, text in told]  # a new line could pass for one of ours


def _claim(base: Figure, expert: Figure) -> str:
    return f"{base.rate:.3f} -> {expert.rate:.3f} ({expert.low:.3f} to {expert.high:.3f})"


def rescore(package: Package, expert: Installed, base: Path, log: Path, number: int) -> list[tuple[str, ...]]:
    """Asks a random sample of the package's own held-out questions again, on this base: claimed beside found.

    Returns:
        Rows of (measure, claimed of all, claimed of these, found here).

    Raises:
        UserError: the scores are not what a package's are.
    """
    rows = read_rows(package.folder / "scores.parquet", SCORES, "get the package again")
    claim = [row for row in rows if row["panel"] == "claim" and row["arm"] == "expert"]
    if not claim or any(row["answer"] not in package.template.answers for row in claim):
        raise UserError("scores.parquet: holds no questions of this expert; ask the publisher")
    chosen = random.SystemRandom().sample(claim, min(number, len(claim)))
    with started(base, [expert], slots=1, log=log) as engine:
        replies = [_reply(engine, row["instruction"], expert.name) for row in chosen]
    pairs = list(zip(replies, chosen, strict=True))
    found = [vars(package.template.measure(text, row["answer"])) for text, row in pairs]
    table: list[tuple[str, ...]] = [
        (name, *(_mean([row[name] for row in part]) for part in (claim, chosen, found))) for name in MEASURES
    ]
    table.append(("word for word the same reply", "", "", _mean([text == row["reply"] for text, row in pairs])))
    return [*table, ("questions", str(len(claim)), str(len(chosen)), str(len(found)))]


def _reply(engine: Loaded, question: str, name: str) -> str:
    reply = ask(engine, [{"role": "user", "content": question}], name, temperature=0.0, max_tokens=MOST_TOKENS)
    return str(reply["choices"][0]["message"]["content"])


def _mean(values: list[bool]) -> str:
    return f"{sum(values) / len(values):.3f}"
