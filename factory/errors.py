"""The one kind of error that a user sees: what is wrong, where, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend; shown as it is, never as a traceback."""


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong in one file: the place, the key, the value found and the cure.

    `line` and `column` count from 1; 0 means that there is none to tell. A "warning" fails nothing.
    """

    file: str
    line: int
    key: str
    message: str
    column: int = 0
    severity: str = "error"

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


class Problems(UserError):
    """All that is wrong in all files, at once, one line each."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(set(problems))
        super().__init__("\n".join(map(str, self.problems)))


def shown(value: object, limit: int = 60) -> str:
    """`value` as it may appear inside an error: quoted, on one line, not too long."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def meant(word: str, known: Iterable[str]) -> str:
    """A question that ends an error where `word` is nearly one of the `known`; else nothing."""
    from rapidfuzz import fuzz, process

    found = process.extractOne(word, list(known), scorer=fuzz.ratio, score_cutoff=65)
    return f"; did you mean {found[0]!r}?" if found else ""


def relative(path: Path) -> str:
    """`path` as a user would type it from where they stand."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
