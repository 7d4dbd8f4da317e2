"""One progress bar for all that takes long: how far, how fast, how long still."""

from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

T = TypeVar("T")


def track(items: Iterable[T], name: str, total: int) -> Iterator[T]:
    """Yields `items` and shows on stderr how many of `total` are done and the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total)
        for item in items:
            yield item
            bar.advance(task)


class Meter:
    """A progress bar of what is wanted, with a line of further figures below it, on stderr."""

    def __init__(self, name: str, wanted: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns: tuple[Any, ...] = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        # The line stands below the bar: beside it, it would be cut in a narrow terminal.
        self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
        self._line = Progress(TextColumn("  {task.description}"), console=self._bar.console)
        self._wanted = self._bar.add_task(name, total=wanted)
        self._figures = self._line.add_task("")

    def __enter__(self) -> Self:
        from rich.console import Group
        from rich.live import Live

        self._live = Live(Group(self._bar, self._line), console=self._bar.console, refresh_per_second=4)
        self._live.start()
        return self

    def show(self, done: int, figures: str) -> None:
        """Shows how many are done, and `figures`."""
        self._bar.update(self._wanted, completed=done)
        self._line.update(self._figures, description=figures)

    def __exit__(self, *_: object) -> None:
        self._live.stop()
