"""The tables: for each its columns (pyarrow) and the rules its rows must keep (pandera)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.errors import UserError, relative
from factory.store import read_parquet, whole, write_parquet
from factory.template import FAILURES, REASONS

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP = 4096  # rows that are checked and written at a time

MESSAGES = "messages"  # TRL's conversational form: a list of {role, content}


@dataclass(frozen=True)
class Table:
    """One kind of parquet file: columns with their kinds, and the rules of some."""

    name: str
    columns: dict[str, str]
    unique: str | None = "row_id"
    among: dict[str, tuple[str, ...]] = field(default_factory=dict)
    at_least: dict[str, int] = field(default_factory=dict)

    def arrow(self) -> pa.Schema:
        """The pyarrow schema, every column required."""
        import pyarrow as pa

        message = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
        kinds = {
            "text": pa.string(),
            "int": pa.int32(),
            "float": pa.float64(),
            "bool": pa.bool_(),
            "texts": pa.list_(pa.string()),
            MESSAGES: pa.list_(message),
            "slots": pa.list_(pa.struct([pa.field("name", pa.string()), pa.field("value", pa.string())])),
        }
        return pa.schema([pa.field(name, kinds[kind], nullable=False) for name, kind in self.columns.items()])

    def rules(self) -> Any:
        """The pandera schema."""
        import pandera.pandas as pandera

        plain = {"text": str, "int": "int32", "float": "float64", "bool": bool}
        columns = {
            name: pandera.Column(
                plain.get(kind, object), self._checks(name, kind), nullable=False, unique=name == self.unique
            )
            for name, kind in self.columns.items()
        }
        return pandera.DataFrameSchema(columns, strict=True, ordered=True)

    def _checks(self, name: str, kind: str) -> list[Any]:
        import pandera.pandas as pandera

        checks = []
        if name in self.among and kind == "texts":
            allowed = set(self.among[name])
            checks.append(
                pandera.Check(lambda value: set(value) <= allowed, element_wise=True, name=f"among {allowed}")
            )
        elif name in self.among:
            checks.append(pandera.Check.isin(self.among[name]))
        if name in self.at_least:
            checks.append(pandera.Check.ge(self.at_least[name]))
        return checks


SPLITS = ("train", "holdout")
CANDIDATES = Table(
    "candidates",
    {
        "row_id": "text",
        "expert": "text",
        "seed_id": "text",
        "split": "text",
        "sample": "int",
        "answer": "text",
        "instruction": "text",
        "output": "text",
        "slots": "slots",
        "form": "int",
        "failure": "text",
        "failure_detail": "text",
        "teacher": "text",
        "request": "text",
        "reply": "text",
        "finish_reason": "text",
        "prompt_tokens": "int",
        "completion_tokens": "int",
    },
    among={"split": SPLITS, "failure": ("", *FAILURES)},
    at_least={"sample": 0, "form": 0},
)
VERDICTS = Table(
    "verdicts",
    {
        "row_id": "text",
        "verdict": "text",
        "reasons": "texts",
        "detail": "text",
        "like": "text",
        "score": "float",
        "tokens": "int",
    },
    among={"verdict": ("keep", "drop", "fail"), "reasons": REASONS},
    at_least={"tokens": 0},
)
PAIRS = Table(
    "pairs",
    {"row_id": "text", "like": "text", "score": "float"},
    unique=None,
    at_least={"score": 0},
)
ROWS = Table(
    "rows",
    {
        "row_id": "text",
        "seed_id": "text",
        "answer": "text",
        "prompt": MESSAGES,
        "completion": MESSAGES,
        "instruction": "text",
        "output": "text",
    },
)
SCORES = Table(
    "scores",
    {
        "row_id": "text",
        "panel": "text",
        "setting": "text",
        "arm": "text",
        "scale": "float",
        "seed_id": "text",
        "answer": "text",
        "instruction": "text",
        "reply": "text",
        "tokens": "int",
        "stopped": "bool",
        "given": "text",
        "named": "bool",
        "mention": "bool",
        "right": "bool",
        "in_form": "bool",
    },
    unique=None,
    among={
        "panel": ("claim", "sampled", "thinking", "off_domain", "dose", "robustness", "full_precision"),
        "arm": ("base", "told", "expert"),
    },
    at_least={"tokens": 0, "scale": 0},
)


def write_rows(path: Path, table: Table, rows: list[dict[str, Any]]) -> None:
    """Writes `rows` as one parquet file, after the rules have been checked.

    Raises:
        UserError: a row breaks a rule; nothing is written.
    """
    write_parquet(path, _made(path, table, rows))


@contextmanager
def writing(path: Path, table: Table) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yields a function that adds rows to one parquet file, which appears when the block ends well.

    Its bytes do not depend on how the rows came in portions, and no more than a row group is in memory.

    Raises:
        UserError: a row breaks a rule, within its row group or by a value that must be unique.
    """
    import pyarrow.parquet as pq

    waiting: list[dict[str, Any]] = []
    seen: set[str] = set()

    def put(rows: list[dict[str, Any]]) -> None:
        made = _made(path, table, rows)
        if table.unique:
            values = made.column(table.unique).to_pylist()
            if twice := next((value for value in values if value in seen), None):
                raise UserError(f"{relative(path)}: {table.unique} {twice!r} is there twice")
            seen.update(values)
        file.write_table(made)

    def write(rows: list[dict[str, Any]]) -> None:
        waiting.extend(rows)
        while len(waiting) >= ROW_GROUP:
            put(waiting[:ROW_GROUP])
            del waiting[:ROW_GROUP]

    with whole(path) as temporary, pq.ParquetWriter(temporary, table.arrow(), compression="zstd") as file:
        yield write
        put(waiting)


def _made(path: Path, table: Table, rows: list[dict[str, Any]]) -> pa.Table:
    import pyarrow as pa

    try:
        made = pa.Table.from_pylist(rows, schema=table.arrow())
    except (pa.ArrowException, TypeError) as error:
        raise UserError(f"{relative(path)}: a value is not of its column's kind in {table.name}: {error}") from None
    _validate(path, table, made)
    return made


def read_rows(path: Path, table: Table, made_by: str) -> list[dict[str, Any]]:
    """All rows of one parquet file, checked against the rules of its table.

    Raises:
        UserError: the file is missing, damaged, or breaks a rule; it names `made_by`, the command that makes it.
    """
    made = read_parquet(path, made_by)
    if made.schema.names != list(table.columns):
        raise UserError(f"{relative(path)}: is not a table of {table.name}\n  then run: {made_by}")
    _validate(path, table, made)
    rows: list[dict[str, Any]] = made.to_pylist()
    return rows


def _validate(path: Path, table: Table, made: pa.Table) -> None:
    from pandera.errors import SchemaErrors

    try:
        table.rules().validate(made.to_pandas(), lazy=True)
    except SchemaErrors as error:
        first = error.failure_cases.iloc[0]
        value = getattr(first["failure_case"], "item", lambda: first["failure_case"])()  # numpy's number as a plain one
        raise UserError(
            f"{relative(path)}: {len(error.failure_cases)} values break the rules of {table.name}; "
            f"the first: {first['column']} = {value!r} ({first['check']})"
        ) from None
