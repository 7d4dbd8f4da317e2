"""HTML pages that open from disk: one file each, no network, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

PAGES = Path(__file__).parent / "pages"


def render(name: str, **values: Any) -> str:
    """The page `factory/pages/<name>` with `values`; every value is escaped."""
    return _environment().get_template(name).render(**values)


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["histogram"] = histogram
    return environment


def histogram(series: dict[str, Sequence[float]], bins: int = 20) -> dict[str, Any]:
    """Counts of one or several series over common bins of equal width, as the `plots.html` macro draws them.

    Returns: {low, high, most, series: {name: [count, ...]}}; all series share `low` and `high`.
    """
    values = [value for one in series.values() for value in one]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    width = (high - low) / bins or 1.0
    counts = {name: [0] * bins for name in series}
    for name, one in series.items():
        for value in one:
            counts[name][min(bins - 1, int((value - low) / width))] += 1
    most = max((n for one in counts.values() for n in one), default=0)
    return {"low": low, "high": high, "most": most, "series": counts}
