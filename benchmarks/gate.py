"""How often does a gate at 0.80 let an expert through that is right in 0.78, and how often one that deserves it?

Answers are drawn in seeds of several questions, correlated within a seed (beta-binomial); each draw is judged by the
project's own interval, by Wilson's over all questions as if each stood alone, and by the bare rate. Then how often
the interval holds the true rate, 95 % wanted.
Run: python benchmarks/gate.py [DRAWS A CELL, 2000]   (half a minute)
"""

import sys
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.table import Table

from factory.progress import track
from train.figures import interval, wilson

SHAPES = ((85, 5), (98, 4), (104, 4), (40, 10))  # held-out seeds x questions of each
CORRELATION = 0.3
GATES = {0.80: (0.78, 0.85, 0.88, 0.90, 0.95), 0.95: (0.93, 0.95, 0.97, 0.98, 0.99)}  # wanted -> true rates
MOST_PASSED = 0.05  # of experts that do not keep the claim


def drawn(rate: float, seeds: int, questions: int, draws: int) -> np.ndarray:
    """Right answers of each seed, int [draws, seeds]: beta-binomial with intraclass correlation CORRELATION."""
    rng = np.random.default_rng([round(1000 * rate), seeds, questions])
    spread = (1 - CORRELATION) / CORRELATION
    return rng.binomial(questions, rng.beta(rate * spread, (1 - rate) * spread, (draws, seeds)))


def outcomes(right: np.ndarray, questions: int) -> Iterator[tuple[str, bool]]:
    """One draw's (seed, right or not) pairs, as `interval` takes them."""
    for seed, count in enumerate(right.tolist()):
        for i in range(questions):
            yield str(seed), i < count


def cell(wanted: float, rate: float, seeds: int, questions: int, draws: int) -> dict[str, float]:
    """Shares of the draws: which way passes the gate, and which interval holds the true rate."""
    counts = drawn(rate, seeds, questions, draws)
    ours = np.array([list(interval(outcomes(right, questions)).values()) for right in counts])  # [draws, 3]
    low, high = ours[:, 1], ours[:, 2]
    alone = np.array([wilson(float(r), seeds * questions) for r in counts.mean(1) / questions])
    return {
        "ours": (low >= wanted).mean(),
        "alone": (alone[:, 0] >= wanted).mean(),
        "rate": (ours[:, 0] >= wanted).mean(),
        "holds": ((low <= rate) & (rate <= high)).mean(),
        "above": (low > rate).mean(),
        "alone holds": ((alone[:, 0] <= rate) & (rate <= alone[:, 1])).mean(),
    }


def main() -> None:
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    caption = f"{draws:,} draws a cell. Of experts below their gate {MOST_PASSED:.0%} may pass (red: more)."
    table = Table(
        "gate", "true rate", "seeds x questions", title=f"correlation within seeds {CORRELATION}", caption=caption
    )
    passed, holds = ("passed: lower end, by seed", "lower end, as if alone", "rate alone"), "interval holds the truth"
    for name in (*passed, holds, "lies above it", "as if alone: holds"):
        table.add_column(name)
    cells = [(gate, rate, *shape) for gate, rates in GATES.items() for rate in rates for shape in SHAPES]
    for gate, rate, seeds, questions in track(cells, "gate", len(cells)):
        found = cell(gate, rate, seeds, questions, draws)
        bad = rate < gate and found["ours"] > MOST_PASSED
        figures = [f"{share:.3f}" for share in found.values()]
        table.add_row(f"{gate:.2f}", f"{rate:.2f}", f"{seeds} x {questions}", *figures, style="red" if bad else None)
        if (seeds, questions) == SHAPES[-1]:
            table.add_section()
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
