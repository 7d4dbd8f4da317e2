"""Who answers which question, and how long the router takes to say so. Needs built experts: dvc repro

    python benchmarks/route.py               # all parts
    python benchmarks/route.py right         # accuracy, abstention and false activations, by router; the peer beside it
    python benchmarks/route.py turns         # conversations
    python benchmarks/route.py speed         # us a query at 3 and 10,000 experts, and what the first look misses

Questions: the held-out rows of every expert; seeds/general.jsonl; what people say of home and leisure in the pocket
base's topic bank (2,170 phrases that nothing was fitted on or tuned by); the hand-made ones of tests/routes.yaml.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path = [path for path in sys.path if path != str(Path(__file__).parent)]  # in which serve.py would be `serve`

from factory.embed import Encoder, Floats, find_encoder, unit  # noqa: E402
from factory.paths import Home, read_params  # noqa: E402
from factory.routing import BUCKETS, WORDS, Joint, Routing, View, words  # noqa: E402
from factory.schema import ROWS, read_rows  # noqa: E402
from factory.seeds import read_seeds  # noqa: E402
from factory.store import read_yaml  # noqa: E402
from factory.template import read_template  # noqa: E402
from serve.market import Installed  # noqa: E402
from serve.router import Router, make_router, over, route  # noqa: E402

ROOT = Path(__file__).parents[1]
HOME = Home(ROOT)
PEER = ROOT / "build" / "peers" / "router" / "bin" / "python"
WORK = ROOT / "build" / "route"
CONSOLE = Console(width=150)
Sets = dict[str, list[tuple[str, str]]]  # name -> (question, who should answer; "base")


def experts() -> list[Installed]:
    """The experts of params.yaml as the router sees them; their adapters are not needed."""
    found = []
    for name in read_params(HOME).experts:
        asked = read_template(HOME.template(name)).declaration.route
        file = HOME.expert(name, "route.safetensors")
        found.append(Installed(name, name, "", file, 1.0, asked.keywords, asked.not_keywords, routing=file))
    return found


def questions() -> Sets:
    hard = read_yaml(ROOT / "tests" / "routes.yaml")["hard"]
    found: Sets = {}
    for expert in read_params(HOME).experts:
        rows = read_rows(HOME.dataset(expert, "holdout.parquet"), ROWS, "dvc repro")
        found[expert] = [(row["instruction"], expert) for row in rows]
    found["general"] = [(seed.instruction, "base") for seed in read_seeds(HOME.general, None)]
    bank = [read_yaml(ROOT / "models" / "pocket" / "corpus" / f"{name}.yaml") for name in ("home", "life")]
    found["bank"] = [(text, "base") for topics in bank for topic in topics for text in topic["say"]]
    found["hard, no expert's"] = [(text, "base") for text in hard["base"]]
    found["hard, an expert's"] = [(text, name) for name in hard if name != "base" for text in hard[name]]
    return found


def remembering(encoder: Encoder) -> Encoder:
    """The same encoder, which embeds all questions at once: a model is many times quicker so."""
    kept: dict[str, Floats] = {}

    def encode(texts: Sequence[str]) -> Floats:
        if missing := [text for text in dict.fromkeys(texts) if text not in kept]:
            kept.update(zip(missing, encoder.encode(missing), strict=True))
        return np.stack([kept[text] for text in texts])

    return replace(encoder, encode=encode)


# -- right --------------------------------------------------------------------------------------------


def shares(sets: Sets, choose: Callable[[str], str]) -> list[str]:
    """Per set how many are right, then over held-out and general together; and held-out ones sent to another expert."""
    right = {name: [choose(text) == want for text, want in pairs] for name, pairs in sets.items()}
    chosen = [(choose(text), want) for pairs in sets.values() for text, want in pairs if want != "base"]
    wrong = np.mean([found not in ("base", want) for found, want in chosen])
    core = [one for name, ones in right.items() if name != "bank" and not name.startswith("hard") for one in ones]
    false = [f"{1 - np.mean(right[name]):.2%}" for name in ("general", "bank")]
    domains = [f"{np.mean(ones):.3f}" for name, ones in right.items() if name not in ("general", "bank")]
    return [f"{np.mean(core):.3f}", *false, f"{wrong:.2%}", *domains]


def right() -> None:
    sets, known = questions(), experts()
    columns = ["router", "accuracy", "false: general", "false: bank", "wrong expert"]
    columns += [name for name in sets if name not in ("general", "bank")]
    table = Table(*columns, title="held-out rows and general.jsonl (accuracy); each set's share that is right")
    minilm = remembering(find_encoder(HOME, "minilm") or sys.exit("run: make encoder"))
    minilm.encode([text for pairs in sets.values() for text, _ in pairs])
    routers = {
        "keywords": make_router([replace(one, routing=None) for one in known]),
        "and words": make_router(known),
        "and static table": make_router(known, find_encoder(HOME, "static")),
        "and MiniLM": make_router(known, minilm),
    }
    for name, router in routers.items():
        table.add_row(name, *shares(sets, lambda text, r=router: route(r, text).expert or "base"))  # type: ignore[misc]
    for name, row in peer(sets, minilm):
        table.add_row(name, *row)
    CONSOLE.print(table)


def peer(sets: Sets, minilm: Encoder) -> list[tuple[str, list[str]]]:
    """aurelio's semantic-router over the same training rows and vectors, as it comes and with fitted thresholds."""
    if not PEER.exists():
        return [("semantic-router: SKIPPED, not installed; run: make peers", [])]
    from factory.fit import everyday

    WORK.mkdir(parents=True, exist_ok=True)
    train = {one: read_rows(HOME.dataset(one, "train.parquet"), ROWS, "dvc repro") for one in read_params(HOME).experts}
    routes = {name: [row["instruction"] for row in rows] for name, rows in train.items()}
    asked = [text for pairs in sets.values() for text, _ in pairs]
    other = everyday(HOME)
    texts = list(dict.fromkeys([*asked, *other, *(text for own in routes.values() for text in own)]))
    np.save(WORK / "vectors.npy", minilm.encode(texts))
    (WORK / "asked.json").write_text(json.dumps({"texts": texts, "routes": routes, "asked": asked, "everyday": other}))
    done = subprocess.run(
        [str(PEER), str(ROOT / "benchmarks" / "route_peer.py"), str(WORK)], capture_output=True, text=True
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return [(f"semantic-router: FAILED: {why[:80]}", [])]
    found = json.loads((WORK / "answers.json").read_text())
    return [(f"semantic-router, {name}", shares(sets, lambda t, a=answers: a[t])) for name, answers in found.items()]


# -- turns --------------------------------------------------------------------------------------------


def turns() -> None:
    told, known = read_yaml(ROOT / "tests" / "routes.yaml"), experts()
    table = Table("router", "stays", "changes", "wrong")
    for name in ("none", "static", "minilm"):
        router = make_router(known, find_encoder(HOME, name))
        cells, wrong = [], []
        for kind in ("stays", "changes"):
            missed = [one for one in told[kind] if (route(router, one["turns"]).expert or "base") != one["now"]]
            cells.append(f"{len(told[kind]) - len(missed)}/{len(told[kind])}")
            wrong += [one["turns"][-1] for one in missed]
        table.add_row(name, *cells, "; ".join(wrong))
    CONSOLE.print(table)


# -- speed --------------------------------------------------------------------------------------------


def crowd(count: int, encoder: Encoder, rng: np.random.Generator) -> tuple[dict[str, list[str]], dict[str, Routing]]:
    """Made-up experts: two keywords of nonsense; four directions near the meaning of four topics of the bank each."""
    files = sorted((ROOT / "models" / "pocket" / "corpus").glob("*.yaml"))
    topics = [unit(encoder.encode(topic["say"]).mean(axis=0)[None])[0] for file in files for topic in read_yaml(file)]
    means, axes = np.stack(topics), len(topics[0])
    pool = rng.normal(0, 0.3, (64, BUCKETS)).astype(np.float16)
    keywords, known = {}, {}
    for i in range(count):
        near = means[rng.integers(len(means), size=4)] + rng.normal(0, 0.5 * axes**-0.5, (4, axes))
        by_words = pool[i % 60 : i % 60 + 4]
        views = {
            WORDS: View(by_words, np.full(4, -3, np.float32), np.zeros(0, np.float32)),
            encoder.name: View(
                (20 * near).astype(np.float16),
                np.full(4, -9, np.float32),
                unit(near.mean(0)[None].astype(np.float32))[0],
            ),
        }
        joint = Joint(0.8, 0.5, 0.0, 3.0, 0.0, encoder.name, encoder.digest)
        known[f"e{i}"] = Routing(views, {WORDS: replace(joint, encoder="", digest=""), encoder.name: joint})
        keywords[f"e{i}"] = [f"zq{i}", f"zq{rng.integers(count)} {'abcdefgh'[i % 8]}"]
    return keywords, known


def many(count: int, encoder: Encoder | None, meaning: bool) -> Router:
    """The real experts among so many made-up ones."""
    from factory.routing import read_routing

    real, space = experts(), encoder or find_encoder(HOME, "static")
    assert space is not None
    keywords, known = crowd(count - len(real) if count > len(real) else 0, space, np.random.default_rng(1))
    wanted = {words(word): [name] for name, own in keywords.items() for word in own}
    for one in real:
        for word in one.keywords:
            wanted.setdefault(words(word), []).append(one.name)
        if one.routing:
            known[one.name] = read_routing(one.routing)
    vetoed = {words(word): [one.name] for one in real for word in one.not_keywords}
    return over(wanted, vetoed, known if meaning else {}, encoder)


def per_query(router: Router, texts: list[str]) -> str:
    for text in texts[:50]:
        route(router, text)
    took = []
    for text in texts:
        began = time.perf_counter()
        route(router, text)
        took.append(time.perf_counter() - began)
    return f"{np.median(took) * 1e6:,.0f} ({np.quantile(took, 0.99) * 1e6:,.0f})"


def speed() -> None:
    texts = [text for pairs in questions().values() for text, _ in pairs]
    texts = [texts[i] for i in np.random.default_rng(0).integers(len(texts), size=1000)]
    static = find_encoder(HOME, "static")
    table = Table("us a query: median (99 %)", "3 experts", "10,000 experts")
    rows = {"keywords": (None, False), "and words": (None, True), "and static table": (static, True)}
    for name, (encoder, meaning) in rows.items():
        cells = [
            per_query(many(n, encoder, meaning), texts if n == 3 or encoder or not meaning else texts[:60])
            for n in (3, 10_000)
        ]
        table.add_row(name, *cells)
    minilm = find_encoder(HOME, "minilm") or sys.exit("run: make encoder")
    table.add_row("and MiniLM", *(per_query(many(n, minilm, True), texts[:100]) for n in (3, 10_000)))
    CONSOLE.print(table)
    for encoder in (static, remembering(minilm)):
        first_look(encoder)


def first_look(encoder: Encoder | None) -> None:
    """How often the right expert is among the few that are looked at closely."""
    from serve.router import _nearest

    router = many(10_000, encoder, True)
    assert encoder is not None and router.fitted is not None and router.rows is not None
    for name, pairs in questions().items():
        if name in router.rows:
            encoder.encode([text for text, _ in pairs])
            none = np.zeros(0, np.int64)
            seen = [router.rows[name] in _nearest(router.fitted, encoder, text, none)[0] for text, _ in pairs]
            told = f"{name}, {encoder.name}: among the {encoder.kept} looked at closely, of 10,000"
            CONSOLE.print(f"{told}: {np.mean(seen):.3f} of its held-out rows")


def main() -> None:
    parser = argparse.ArgumentParser()
    parts = {"right": right, "turns": turns, "speed": speed}
    parser.add_argument("parts", nargs="*", choices=[[], *parts])
    for name in parser.parse_args().parts or parts:
        parts[name]()


if __name__ == "__main__":
    main()
