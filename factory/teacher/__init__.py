"""Teachers: one protocol, requests in, replies out, in any order."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from factory.seeds import Seed


@dataclass(frozen=True)
class Request:
    """One wanted variant of one seed; `sample` counts a seed's variants from 0."""

    seed: Seed
    sample: int


@dataclass(frozen=True)
class Reply:
    """One variant: how another person would ask, and the text of the slots."""

    request: Request
    instruction: str
    slots: dict[str, str]
    key: str  # hash of all that the reply depends on
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Teacher(Protocol):
    """Writes paraphrases of seeds and fills slots."""

    name: str

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """One reply for each request, in any order."""
