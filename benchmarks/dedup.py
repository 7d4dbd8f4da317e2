"""Near copies at scale: exact, how fast, how much memory; beside rapidfuzz alone, SemHash and a MinHash index.

Run: python benchmarks/dedup.py [exact] [large] [million] [peers] [--rows N] [--whole]
All of it without a name (10,000, 100,000, 1,000,000 and 10,000 rows). --rows gives another number to the parts that
are named. Brute force of more than 20,000 rows is timed on a sample of its blocks, unless --whole, which compares
the rows kept as well. Each measurement runs in a process of its own. The peers: make peers.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz import fuzz, process
from rapidfuzz.utils import default_process
from rich.console import Console
from rich.table import Table

from factory import blocking
from factory.blocking import Pairs
from factory.dedup import Item, alike, copies
from factory.seeds import Seed
from factory.teacher.phrases import BEFORE, reword

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "dedup"
PEERS = ROOT / "build" / "peers"
THRESHOLD = 90
SETS = ("realistic", "hard")
EDITS = (1, 2, 4, 8, 16)
ABC = "abcdefghijklmnopqrstuvwxyz"
BLOCK, SAMPLED = 1000, 10  # rows of a block of brute force; blocks that stand for all
CONSOLE = Console(width=140)


# -- rows ---------------------------------------------------------------------------------------


def core(rng: random.Random, bank: list[Any], seeds: list[str]) -> str:
    """An everyday question: a seed's, or what people of the topic bank say, alone or together."""
    topic, kind = rng.choice(bank), rng.random()
    if kind < 0.1:
        return rng.choice(seeds)
    if kind < 0.3:
        link = rng.choice(("since", "because of", "and", "with"))
        return f"{rng.choice(topic.say)} {link} the {rng.choice(topic.words)}"
    if kind < 0.5:
        other = rng.choice(rng.choice(bank).words)
        return f"{rng.choice(topic.say)}, and what about {rng.choice(topic.words)} and {other}"
    return ". ".join(rng.sample(topic.say, 2 if kind < 0.9 else 3))


def realistic(rng: random.Random, bank: list[Any], seeds: list[str]) -> str:
    """A question as the embedded teacher puts it: lengths and wording vary as those of real rows do."""
    seed = Seed("x", core(rng, bank, seeds), "made up", "CC0-1.0")
    return reword(seed, rng.choice(list(BEFORE)), rng)


def hard(rng: random.Random, bank: list[Any], seeds: list[str]) -> str:
    """A short question that shares most words with all others."""
    x, z, w = (rng.choice(rng.choice(bank).words) for _ in range(3))
    form = rng.choice((
        "what laptop should i buy for {x} {z} under {y}",
        "which laptop do i buy for {x} {z} under {y} dollars",
        "what laptop should i get for {x} {w} and {z} under {y}",
    ))  # fmt: skip
    return form.format(x=x, z=z, w=w, y=rng.randrange(200, 3000, 50))


def edited(text: str, edits: int, rng: random.Random) -> str:
    """`text` after so many insertions, deletions or exchanges of a letter."""
    for _ in range(edits):
        i, kind = rng.randrange(len(text)), rng.randrange(3)
        text = text[:i] + (rng.choice(ABC) if kind else "") + text[i + (kind != 1) :]
    return text


def sorted_words(text: str) -> str:
    """What is compared: token-sort ratio is the ratio of these."""
    return " ".join(sorted(default_process(text).split()))


def rows(kind: str, count: int) -> Path:
    """A file of `count` questions and the copies planted among them: a tenth, [row, its origin, edits]; made once."""
    from train.corpus import read_bank

    path = BUILD / f"{kind}-{count}.json"
    if path.exists():
        return path
    rng, bank = random.Random(1), read_bank(ROOT / "models" / "pocket" / "corpus")
    lines = [line for file in sorted((ROOT / "seeds").glob("*.jsonl")) for line in file.read_text().splitlines()]
    seeds = [json.loads(line)["instruction"] for line in lines]
    make = {"realistic": realistic, "hard": hard}[kind]
    texts, seen, origins, edits = [], set(), [], []
    while len(texts) < count:
        origin, n = rng.randrange(max(1, len(texts))), 0
        if len(texts) < count - count // 10:
            text = make(rng, bank, seeds)
        else:
            n = rng.choice(EDITS)
            text = edited(texts[origin], n, rng)
        if (normal := sorted_words(text)) not in seen:  # a second row of a text is no work for an index
            seen.add(normal)
            texts.append(text)
            origins += [origin] if n else []
            edits += [n] if n else []
    places = list(range(count))
    rng.shuffle(places)  # places[i]: which text stands at i
    at = {text: i for i, text in enumerate(places)}
    planted = [[at[count - count // 10 + i], at[o], n] for i, (o, n) in enumerate(zip(origins, edits, strict=True))]
    BUILD.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": [texts[i] for i in places], "planted": planted}))
    return path


def items_of(texts: list[str]) -> list[Item]:
    return [Item(str(i), "x", text, i % 4 == 0) for i, text in enumerate(texts)]


# -- what runs in processes of its own: pairs of row numbers with scores, and what it took ------------


def by_index(texts: list[str]) -> Pairs:
    return alike(items_of(texts), THRESHOLD)


def brute(texts: list[str]) -> Pairs:
    """All pairs by rapidfuzz alone on all cores, the symmetric half, in blocks."""
    found, _ = compared(texts, range(0, len(texts), BLOCK))
    return Pairs(*(np.concatenate(part) for part in zip(*found, strict=True)))


def compared(texts: list[str], starts: Any) -> tuple[list[Pairs], int]:
    """(pairs, how many were compared) of the blocks that begin at `starts`, each with itself and all before it."""
    normal = [sorted_words(text) for text in texts]
    found, count = [], 0
    for start in starts:
        block, before = normal[start : start + BLOCK], normal[: start + BLOCK]
        scores = process.cdist(
            block, before, scorer=fuzz.ratio, score_cutoff=THRESHOLD, dtype=np.float32, workers=-1
        )  # fmt: skip
        i, j = np.nonzero(scores >= THRESHOLD)
        keep = j < i + start
        found.append(Pairs(i[keep] + start, j[keep], scores[i[keep], j[keep]]))
        count += len(block) * len(before)
    return found, count


def minhash(texts: list[str]) -> Pairs:
    """datasketch: 128 permutations over runs of three letters, its index set to a Jaccard index of 0.7."""
    from datasketch import MinHash, MinHashLSH

    index, left, right = MinHashLSH(threshold=0.7, num_perm=128), [], []
    for i, text in enumerate(texts):
        plain = sorted_words(text)
        sketch = MinHash(num_perm=128)
        sketch.update_batch([plain[k : k + 3].encode() for k in range(max(1, len(plain) - 2))])
        for j in index.query(sketch):
            left.append(i)
            right.append(j)
        index.insert(i, sketch)
    return Pairs(np.array(left), np.array(right), np.zeros(len(left)))


def semhash(texts: list[str]) -> Pairs:
    """SemHash as it comes (cosine 0.9), on static embeddings distilled from all-MiniLM-L6-v2."""
    from model2vec import StaticModel
    from semhash import SemHash

    model = StaticModel.from_pretrained(str(PEERS / "static"))
    found = SemHash.from_records(records=texts, model=model).self_deduplicate(threshold=0.9)
    number: dict[str, int] = {}
    for i, text in enumerate(texts):
        number.setdefault(text, i)
    near = [(number[r.record], number[other]) for r in found.filtered for other in [r.duplicate_of] if other in number]
    return Pairs(np.array([i for i, _ in near]), np.array([j for _, j in near]), np.zeros(len(near)))


def kept(texts: list[str]) -> Pairs:
    """`copies` itself: the rows that fall, and the row that each falls to."""
    found = copies(items_of(texts), THRESHOLD)
    left, right = [int(i) for i in found], [int(copy.like) for copy in found.values()]
    return Pairs(np.array(left), np.array(right), np.array([copy.score for copy in found.values()]))


METHODS: dict[str, Callable[[list[str]], Pairs]] = {
    "index": by_index, "brute": brute, "kept": kept, "minhash": minhash, "semhash": semhash,
}  # fmt: skip


def child(method: str, path: Path) -> None:
    texts = json.loads(path.read_text())["rows"]
    began = time.perf_counter()
    few = 200 if len(texts) <= blocking.LOTS or method not in ("index", "kept") else blocking.LOTS + 1
    METHODS[method](texts[:few])  # imports, and numba's reading or compiling of its code, are off the clock: "first"
    first = time.perf_counter() - began
    wall, cpu = time.perf_counter(), time.process_time()
    pairs = METHODS[method](texts)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    np.savez(BUILD / f"{method}-{path.stem}.npz", *pairs)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"first": first, "wall": wall, "cpu": cpu, "memory": memory}))  # noqa: T201


def measured(method: str, path: Path) -> tuple[dict[str, float], Pairs]:
    """What `method` took on the rows of `path`, and its pairs."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{PEERS / 'dedup'}", "TQDM_DISABLE": "1"}
    words = [sys.executable, __file__, "--child", method, str(path)]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    arrays = np.load(BUILD / f"{method}-{path.stem}.npz")
    return json.loads(done.stdout.splitlines()[-1]), Pairs(*(arrays[name] for name in arrays.files))


# -- tables -------------------------------------------------------------------------------------


def as_set(pairs: Pairs) -> set[tuple[int, int]]:
    return {(min(i, j), max(i, j)) for i, j in zip(pairs.left.tolist(), pairs.right.tolist(), strict=True)}


def with_scores(pairs: Pairs) -> dict[tuple[int, int], float]:
    return {(min(i, j), max(i, j)): s for i, j, s in zip(*(part.astype(float).tolist() for part in pairs), strict=True)}


def took(figures: dict[str, float]) -> tuple[str, str, str]:
    return f"{figures['wall']:,.1f}", f"{figures['cpu']:,.1f}", f"{figures['memory']:,.0f}"


def exact(count: int) -> None:
    """The index's pairs against those of brute force, with their scores."""
    table = Table(
        "rows", "set", "pairs", "the same pairs and scores", "index: s", "CPU s", "MB", "brute: s", "CPU s", "MB"
    )
    for kind in SETS:
        path = rows(kind, count)
        (own, pairs), (other, truth) = measured("index", path), measured("brute", path)
        same = "yes" if with_scores(truth) == with_scores(pairs) else "NO"
        table.add_row(f"{count:,}", kind, f"{len(pairs.left):,}", same, *took(own), *took(other))
    CONSOLE.print(table)


def large(count: int, whole: bool) -> None:
    """The rows that fall, and how much longer brute force takes."""
    table = Table(
        "rows",
        "set",
        "fall",
        "warm-up: s",
        "copies: s",
        "CPU s",
        "MB",
        "brute force: s",
        "times faster",
        "the same rows, scores",
    )
    for kind in SETS:
        path = rows(kind, count)
        figures, pairs = measured("kept", path)
        if whole or count <= 20000:
            other, truth = measured("brute", path)
            seconds, about, same = other["wall"], "", "yes" if same_fall(path, truth, pairs) else "NO"
        else:
            texts, wall = json.loads(path.read_text())["rows"], time.perf_counter()
            starts = [(2 * k + 1) * count // (2 * SAMPLED) // BLOCK * BLOCK for k in range(SAMPLED)]
            _, compared_ = compared(texts, starts)
            seconds = (time.perf_counter() - wall) * count * (count + BLOCK) / 2 / compared_
            about, same = "about ", "not compared: --whole"
        ratio = f"{about}{seconds / figures['wall']:.0f}"
        table.add_row(
            f"{count:,}",
            kind,
            f"{len(pairs.left):,}",
            f"{figures['first']:.1f}",
            *took(figures),
            f"{about}{seconds:,.0f}",
            ratio,
            same,
        )
    CONSOLE.print(table)


def same_fall(path: Path, truth: Pairs, found: Pairs) -> bool:
    """Whether a plain greedy pass over *all* pairs lets the same rows fall to the same rows at the same scores."""
    count = len(json.loads(path.read_text())["rows"])
    order = sorted(range(count), key=lambda i: i % 4 != 0)
    near: dict[int, list[tuple[int, float]]] = {}
    for i, j, score in zip(*(part.tolist() for part in truth), strict=True):
        near.setdefault(i, []).append((j, score))
        near.setdefault(j, []).append((i, score))
    stay: dict[int, int] = {}
    fallen = {}
    for i in order:
        best = max(((score, -stay[j], j) for j, score in near.get(i, ()) if j in stay), default=None)
        if best:
            fallen[i] = (best[2], best[0])
        else:
            stay[i] = len(stay)
    return fallen == {i: (j, score) for i, j, score in zip(*(part.tolist() for part in found), strict=True)}


def million(count: int) -> None:
    table = Table("rows", "set", "fall", "warm-up: s", "copies: s", "CPU s", "MB")
    for kind in SETS:
        figures, pairs = measured("kept", rows(kind, count))
        table.add_row(f"{count:,}", kind, f"{len(pairs.left):,}", f"{figures['first']:.1f}", *took(figures))
        CONSOLE.print(table)


WHO = {"brute": "rapidfuzz", "index": "dmoe", "semhash": "SemHash", "minhash": "MinHash"}


def peers(count: int) -> None:
    """The same rows by others: of the true pairs how many are missed, of those told how many are none; planted ones."""
    if not (PEERS / "static").exists():
        CONSOLE.print("peers: SKIPPED, they are not installed; run: make peers")
        return
    columns = ["rows", "set", "who", "s", "CPU s", "MB", "pairs", "missed", "wrong"]
    table = Table(*columns, *(f"{n} edits" for n in EDITS))
    for kind in SETS:
        path = rows(kind, count)
        planted = json.loads(path.read_text())["planted"]
        truth: set[tuple[int, int]] = set()
        for who, name in {
            "brute": "rapidfuzz alone",
            "index": "dmoe",
            "semhash": "SemHash",
            "minhash": "MinHash LSH",
        }.items():
            figures, pairs = measured(who, path)
            found = as_set(pairs)
            truth = truth or found
            shares = []
            for n in EDITS:
                mine = {(min(i, j), max(i, j)) for i, j, edits in planted if edits == n}
                shares.append(f"{len(mine & found):,}/{len(mine):,}")
            missed, wrong = len(truth - found), len(found - truth)
            table.add_row(
                f"{count:,}", kind, name, *took(figures), f"{len(found):,}", f"{missed:,}", f"{wrong:,}", *shares
            )
    CONSOLE.print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[[], "exact", "large", "million", "peers"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--child", nargs=2)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child[0], Path(asked.child[1]))
        return
    parts = asked.parts or ["exact", "large", "million", "peers"]
    if "exact" in parts:
        exact(asked.rows or 10_000)
    if "large" in parts:
        large(asked.rows or 100_000, asked.whole)
    if "million" in parts:
        million(asked.rows or 1_000_000)
    if "peers" in parts:
        peers(asked.rows or 10_000)


if __name__ == "__main__":
    main()
