"""The figures of the audit, from losses alone: exposure in bits, differences of rates, AUC, with 95 % intervals."""

import math
from collections.abc import Sequence
from typing import Any

SEED = 17
Bits = tuple[float, float]  # the exposure of a planted code, and of its decoy
Scores = list[tuple[str, float]]  # (seed, score)


def exposure(own: float, others: Sequence[float]) -> float:
    """log2 |R| - log2 rank in bits; R is `own` and the `others`, rank 1 the lowest loss, a tie half a rank."""
    rank = 1 + sum(loss < own for loss in others) + sum(loss == own for loss in others) / 2
    return math.log2(len(others) + 1) - math.log2(rank)


def exposures(found: list[Bits], references: int, draws: int) -> dict[str, Any]:
    """Mean bits of planted codes and of decoys; the most there is, and what codes get whose rank is chance."""
    n = references + 1
    planted, decoys = (mean_of(bits, draws) for bits in zip(*found, strict=True))
    chance = math.log2(n) - math.lgamma(n + 1) / math.log(2) / n  # the mean over all ranks
    most = {"most": round(math.log2(n), 2), "chance": round(chance, 2)}
    return {"n": len(found), **most, "planted": planted, "never_planted": decoys}


def difference(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """a - b of two rates with their intervals, by Newcombe: honest where one of them is 0 or 1."""
    low = math.hypot(a["rate"] - a["low"], b["high"] - b["rate"])
    high = math.hypot(a["high"] - a["rate"], b["rate"] - b["low"])
    point = a["rate"] - b["rate"]
    return {"rate": round(point, 4), "low": round(point - low, 4), "high": round(point + high, 4)}


def mean_of(values: Sequence[float], draws: int) -> dict[str, float]:
    """Mean and 95 % bootstrap interval of independent values, in bits."""
    import numpy as np

    held = np.array(values)
    means = held[np.random.default_rng(SEED).integers(0, len(held), (draws, len(held)))].mean(1)
    return _figure("bits", float(held.mean()), means, 2)


def auc(members: Scores, others: Scores, draws: int) -> dict[str, float]:
    """How often a member's score is below another's, ties half, with a 95 % bootstrap interval clustered by seed."""
    import numpy as np

    kinds = [sorted({seed for seed, _ in scores}) for scores in (members, others)]
    wins, pairs = np.zeros((2, len(kinds[0]), len(kinds[1])))
    where = [{seed: i for i, seed in enumerate(kind)} for kind in kinds]
    for seed, score in members:
        for other, its in others:
            i, j = where[0][seed], where[1][other]
            wins[i, j] += (score < its) + (score == its) / 2
            pairs[i, j] += 1
    dice = np.random.default_rng(SEED)
    times = [dice.multinomial(len(kind), np.full(len(kind), 1 / len(kind)), draws) for kind in kinds]
    drawn = [np.einsum("di,ij,dj->d", times[0], table, times[1], optimize=True) for table in (wins, pairs)]
    return _figure("auc", float(wins.sum() / pairs.sum()), drawn[0] / drawn[1], 4)


def _figure(name: str, point: float, drawn: Any, digits: int) -> dict[str, float]:
    import numpy as np

    low, high = np.quantile(drawn, (0.025, 0.975))
    return {name: round(point, digits), "low": round(float(low), digits), "high": round(float(high), digits)}
