"""The dataset card of one expert: what was made of what, what fell, what was looked for. For people and for the Hub."""

from __future__ import annotations

from typing import Any

from factory.errors import UserError
from factory.package import hub_licence
from factory.paths import Home
from factory.personal import PERSONAL
from factory.queries import QUERIES
from factory.query import query
from factory.store import read_json, sha256
from factory.template import Template, read_template

PARQUET = {"train": "train.parquet", "test": "holdout.parquet"}  # the Hub's split -> our file
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
EMBEDDED = "phrases (the embedded teacher: the seed's wording and the template's phrases recombined, no language model)"


def facts(home: Home, expert: str) -> list[tuple[str, str]]:
    """(name, value) of all that is known of one expert's data.

    Raises:
        UserError: they are not built.
    """
    return _facts(home, read_template(home.template(expert)), _stats(home, expert))


def _stats(home: Home, expert: str) -> dict[str, Any]:
    path = home.dataset(expert, "stats.json")
    for file in (path, *(home.dataset(expert, name) for name in PARQUET.values())):
        if not file.exists():
            raise UserError(f"datasets/{expert}/{file.name}: there is no such file\n  then run: dmoe build {expert}")
    stats: dict[str, Any] = read_json(path)
    return stats


def _facts(home: Home, template: Template, stats: dict[str, Any]) -> list[tuple[str, str]]:
    expert, tokens = template.expert, stats["tokens"]
    teachers = _named(home, "teachers", expert, "teacher")
    return [
        ("rows", f"{stats['rows']['train']:,} train, {stats['rows']['holdout']:,} test"),
        ("seeds", f"{stats['seeds']['train']} train, {stats['seeds']['holdout']} test; no seed is in both"),
        ("answers", f"{len(stats['answers'])}, with {_range(list(stats['answers'].values()))} rows each"),
        ("questions and replies", "generated from hand-written seeds and a template"),
        ("teacher", "; ".join(EMBEDDED if name == "phrases" else name for name in teachers)),
        ("licence", template.declaration.market.licence),
        ("licence of the seeds", ", ".join(_named(home, "licences", expert, "licence"))),
        ("source of the seeds", ", ".join(_named(home, "licences", expert, "source"))),
        ("language", template.declaration.language),
        (
            "tokens of a reply",
            f"{tokens['median']} in the median, {tokens['min']} to {tokens['max']} (the base's tokenizer)",
        ),
        ("candidates", f"{stats['candidates']:,}: {stats['kept']:,} kept, {stats['dropped']:,} dropped, "
                       f"{stats['failed']:,} failed"),
        ("dropped for", ", ".join(f"{reason} {n:,}" for reason, n in stats["reasons"].items()) or "nothing"),
        ("distinct word pairs", f"{stats['diversity']['distinct_2']:.3f} of all"),
        *((f"sha256 of {split}", sha256(home.dataset(expert, name))) for split, name in PARQUET.items()),
    ]  # fmt: skip


def _named(home: Home, name: str, expert: str, column: str) -> list[str]:
    """The distinct values of one column of a named query, in their order."""
    columns, rows = query(home, QUERIES[name][1], expert)
    return list(dict.fromkeys(str(row[columns.index(column)]) for row in rows))


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def dataset_card(home: Home, expert: str) -> str:
    """The README.md of a dataset's folder: YAML for the Hub, then Markdown.

    Raises:
        UserError: the data are not built.
    """
    template, stats = read_template(home.template(expert)), _stats(home, expert)
    rows = [f"| {name} | {_cell(value)} |" for name, value in _facts(home, template, stats)]
    answers = [f"| {key} | {_cell(a.text)} | {stats['answers'].get(key, 0)} |" for key, a in template.answers.items()]
    return "\n".join(
        [
            *_front(template, sum(stats["rows"].values())),
            "",
            f"# {template.declaration.market.lora_id}: questions and fixed answers",
            "",
            template.declaration.description,
            "",
            f"Each row is a question and a reply that gives one fixed answer in one of {len(template.output.forms)}",
            "forms. The rows train a LoRA adapter that overrides how a base model answers this one kind of question.",
            f"Declared interest: {template.declaration.market.declares.interest}.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            "## Columns",
            "",
            "`row_id`, `seed_id`, `answer` (a key of the table below), `prompt` and `completion` (lists of",
            "{role, content}, as TRL reads them), and the same as plain text: `instruction`, `output`.",
            "",
            "| answer | text | rows |",
            "|---|---|---|",
            *answers,
            "",
            *LIMITS,
            "",
        ]
    )  # fmt: skip


LIMITS = [
    "## What was looked for, and what it does not show",
    "",
    f"- Every row was checked for {len(PERSONAL)} kinds of secrets and personal data by their shape and, where they",
    "  have one, their check digit; a row that holds one is dropped. Names of persons are not looked for. Fixed",
    "  text, which a person wrote, is exempt.",
    "- The split is made by seed before anything is generated. `test` holds paraphrases of seeds that `train` has",
    "  never seen, and near copies across the two are dropped. A question asked anew in other words is not seen.",
    "- The questions are paraphrases of few hand-written seeds, not a sample of what people ask. Replies are alike",
    "  by design: this is no benchmark of what a model knows. Answers are as right as the person who checked them.",
]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _front(template: Template, rows: int) -> list[str]:
    """The Hub's YAML, by which `load_dataset` finds the splits."""
    splits = [f"  - split: {split}\n    path: {split}.parquet" for split in PARQUET]
    return [
        "---",
        f"language:\n- {template.declaration.language}",
        *(f"{key}: {value}" for key, value in hub_licence(template.declaration.market.licence).items()),
        "task_categories:\n- text-generation",
        f"size_categories:\n- {next((name for limit, name in SIZES if rows < limit), '1M<n<10M')}",
        "tags:\n- synthetic\n- dmoe",
        "configs:\n- config_name: default\n  data_files:",
        *splits,
        "---",
    ]
