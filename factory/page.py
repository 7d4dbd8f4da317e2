"""HTML pages that open from disk: one file each, no network, light and dark, wide and narrow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

PAGES = Path(__file__).parent / "pages"
TICKS = 6  # numbers along an axis: as many as a phone has room for
INSET = 0.04  # share of the axis before the first and behind the last point of a line


def render(name: str, /, **values: Any) -> str:
    """The page `factory/pages/<name>` with `values`; every value is escaped."""
    return _environment().get_template(name).render(**values)


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"histogram": histogram, "plane": plane}
    environment.filters["percent"] = percent
    environment.filters["thousands"] = "{:,}".format
    return environment


def percent(share: float) -> str:
    """A share of 1 with one decimal: 0.9962 is 99.6 %."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def histogram(
    series: dict[str, Sequence[float]], bins: int = 20, marks: dict[str, float] | None = None
) -> dict[str, Any]:
    """Counts of one or several series over common bins, as the `hist` macro of plots.html draws them.

    Bins begin at round numbers, and there are about `bins` of them; whole numbers get bins of whole numbers.
    `marks` are values to be marked by name; the axis reaches all of them.
    Returns: {low, high, step, most, top, series: {name: [count, ...]}, ticks and marks: [(place, name), ...]},
    a place being a share of the axis.
    """
    values = [value for one in series.values() for value in one]
    ends = [*values, *(marks or {}).values()] or [0.0, 1.0]
    whole = all(float(value).is_integer() for value in ends)
    step = _round_up((max(ends) - min(ends)) / bins or 1, whole)
    low = step * math.floor(min(ends) / step)
    count = math.floor((max(ends) - low) / step) + 1 if whole else math.ceil((max(ends) - low) / step) or 1
    counts = {name: [0] * count for name in series}
    for name, one in series.items():
        for value in one:
            counts[name][min(count - 1, int((value - low) / step))] += 1
    most = max((n for one in counts.values() for n in one), default=0)
    high = low + count * step

    def place(value: float) -> float:
        return (value - low + whole / 2) / (high - low)  # a whole number's bar stands over its own middle

    tick = max(step, _round_up((high - low) / TICKS, whole))
    first = math.ceil(low / tick)
    ticks = [tick * i for i in range(first, first + TICKS + 2) if place(tick * i) <= 1]
    return {
        "low": low, "high": high, "step": step, "most": most, "top": 2 * _round_up(most / 2 or 1, True),
        "series": counts, "ticks": [(place(value), f"{value:g}") for value in ticks],
        "marks": [(place(value), name) for name, value in (marks or {}).items()],
    }  # fmt: skip


def plane(
    series: dict[str, Sequence[tuple[float, float]]], top: float | None = None, marks: dict[str, float] | None = None
) -> dict[str, Any]:
    """Points of one or several series in a plane, as the `lines` macro of plots.html draws them.

    Args:
        series: name -> (x, y) in the order of x; no y is below 0.
        top: the y at the upper edge; without it a round number that no y exceeds.
        marks: values of x to be marked by name.
    Returns: {top, series: {name: [(across, up, x, y), ...]}, ticks and marks: [(across, name), ...]}; across and up
    are shares of the axes. Few values of x are their own ticks.
    """
    points = [point for one in series.values() for point in one] or [(0.0, 0.0)]
    across = sorted({x for x, _ in points})
    low, wide = across[0], across[-1] - across[0] or 1
    edge = top or 2 * _round_up(max(y for _, y in points) / 2 or 1, False)

    def place(x: float) -> float:
        return INSET + (1 - 2 * INSET) * (x - low) / wide

    ticks = across
    if len(across) > TICKS + 2:
        step = _round_up(wide / TICKS, all(float(x).is_integer() for x in across))
        ticks = [step * i for i in range(math.ceil(low / step), math.floor(across[-1] / step) + 1)]
    return {
        "top": edge,
        "series": {name: [(place(x), y / edge, x, y) for x, y in one] for name, one in series.items()},
        "ticks": [(place(x), f"{x:g}") for x in ticks],
        "marks": [(place(x), name) for name, x in (marks or {}).items()],
    }


def _round_up(value: float, whole: bool) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ... (or 0.1, 0.2, 0.5, ... where not `whole`)."""
    power = 10.0 ** math.floor(math.log10(value))
    found = next(n * power for n in (1, 2, 5, 10) if n * power >= value * (1 - 1e-9))
    return max(found, 1.0) if whole else found
