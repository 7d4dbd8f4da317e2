"""Teachers: one protocol, requests in, replies out, in any order."""

from dataclasses import dataclass, field
from typing import Protocol

from factory.seeds import Seed


@dataclass(frozen=True)
class Request:
    """One request for variants of one seed; `number` counts a seed's requests from 0."""

    seed: Seed
    number: int


@dataclass(frozen=True)
class Variant:
    """How another person would ask, and the text of the slots; or why there is none."""

    instruction: str = ""
    slots: dict[str, str] = field(default_factory=dict)
    failure: str = ""  # one of template.FAILURES
    detail: str = ""


@dataclass(frozen=True)
class Reply:
    """What one request brought: as many variants, good or failed, as were asked for."""

    variants: list[Variant]
    key: str  # hash of all that the reply depends on
    text: str  # as the server sent it; "" from the embedded teacher
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class NoReply(Exception):
    """A request that brought nothing after every try; its text says why, without secrets."""


class Teacher(Protocol):
    """Writes paraphrases of seeds and fills slots.

    It is asked `spare` times for what is wanted at first, and `budget` times that at most.
    """

    name: str
    variants: int  # of one request
    spare: int
    budget: int

    async def reply(self, request: Request) -> Reply:
        """The reply to one request.

        Raises:
            NoReply: this request brought nothing; others may.
            UserError: no further request will bring anything.
        """

    def status(self) -> str:
        """What is going on, in a few words, for the line of progress."""
