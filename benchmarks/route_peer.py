"""Runs inside build/peers/router: aurelio's semantic-router on the rows and vectors that benchmarks/route.py wrote."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from semantic_router import Route
from semantic_router.encoders import DenseEncoder
from semantic_router.routers import SemanticRouter

WORK = Path(sys.argv[1])
ASKED = json.loads((WORK / "asked.json").read_text())
VECTORS = dict(zip(ASKED["texts"], np.load(WORK / "vectors.npy"), strict=True))


class Kept(DenseEncoder):
    """all-MiniLM-L6-v2's vectors, computed before."""

    name: str = "minilm"
    score_threshold: float = 0.5  # its own default for this model

    def __call__(self, docs: list[Any]) -> list[list[float]]:
        return [VECTORS[doc].tolist() for doc in docs]


def answers(router: SemanticRouter) -> dict[str, str]:
    return {text: router(text).name or "base" for text in ASKED["asked"]}


routes = [Route(name=name, utterances=rows) for name, rows in ASKED["routes"].items()]
router = SemanticRouter(encoder=Kept(), routes=routes, auto_sync="local")
found = {"threshold 0.5": answers(router)}
texts = [text for rows in ASKED["routes"].values() for text in rows[::5]] + ASKED["everyday"]
labels = [name for name, rows in ASKED["routes"].items() for _ in rows[::5]] + [None] * len(ASKED["everyday"])
router.fit(X=texts, y=labels, max_iter=200)
found["its fit"] = answers(router)
(WORK / "answers.json").write_text(json.dumps(found))
