"""Runs inside build/peers/router: aurelio's semantic-router on the rows and vectors that benchmarks/route.py wrote.

Three uses of it: its own calibration, and a threshold that lets as many everyday questions through as one expert of
ours does (both on a fifth of the training rows that is then not in its index); the everyday questions as a route.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from semantic_router import IndexedRouter, Route
from semantic_router.encoders import DenseEncoder

WORK = Path(sys.argv[1])
ASKED = json.loads((WORK / "asked.json").read_text())
VECTORS = dict(zip(ASKED["texts"], np.load(WORK / "vectors.npy").tolist(), strict=True))
LET_THROUGH = 0.003


class Kept(DenseEncoder):
    """all-MiniLM-L6-v2's vectors, computed before."""

    def __call__(self, docs: list[Any]) -> list[list[float]]:
        return [VECTORS[doc] for doc in docs]


def router(rows: dict[str, list[str]]) -> IndexedRouter:
    return IndexedRouter(Kept(name="minilm"), [Route(name=name, utterances=texts) for name, texts in rows.items()])


def answers(chooser: IndexedRouter, threshold: float | None) -> dict[str, str]:
    found = {text: chooser(text, threshold=threshold).name or "base" for text in ASKED["asked"]}
    return {text: "base" if name == "everyday" else name for text, name in found.items()}


rows, everyday = ASKED["routes"], ASKED["everyday"]
four = router({name: [text for i, text in enumerate(texts) if i % 5] for name, texts in rows.items()})
above = [four(text).confidence for text in everyday]
found = {"a threshold like ours": answers(four, float(np.quantile(above, 1 - LET_THROUGH)))}
left = {name: texts[::5] for name, texts in rows.items()}
labels = [name for name, texts in left.items() for _ in texts] + [None] * len(everyday)
four.fit([text for texts in left.values() for text in texts] + everyday, labels)
found["its calibration, p from 0.5"] = answers(four, 0.5)
found["everyday as a route"] = answers(router(rows | {"everyday": everyday}), None)
(WORK / "answers.json").write_text(json.dumps(found))
