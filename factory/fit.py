"""Stage `fit`: an expert's own questions against everyday ones -> route.safetensors, what the router knows of it.

Reads datasets/<expert>/train.parquet, the template's `route`, seeds/everyday.txt and both encoders. Each expert is
fitted alone: who else will be installed beside it is not known. The everyday questions are reworded as the embedded
teacher rewords seeds, else `keep it brief` would be the mark of an expert.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from factory.embed import Encoder, Floats, unit
from factory.errors import UserError, relative
from factory.paths import Home
from factory.routing import BUCKETS, WORDS, Joint, Numbers, Routing, View, buckets, words, write_routing
from factory.schema import ROWS, read_rows
from factory.seeds import Seed
from factory.store import once, read_text
from factory.teacher.phrases import BEFORE, reword
from factory.template import Route, read_template

FOLDS = 3
SENSES = (  # a keyword as a mere word: the same for every expert, so that none takes all that names its subject
    "what rhymes with {}", "draw me a {}", "where does the word {} come from", "tell me a joke about {}",
    "is there a song called {}?", "How do you say {} in Japanese?", "Write four lines of verse on {}.",
    "crossword clue for {}", "who invented {}", "the history of {} in three sentences, for school",
)  # fmt: skip
MOST_CLASSES, FEWEST_CLASSES = 64, 6  # directions; an expert of one answer gets the lower number
STRENGTH = {WORDS: 20.0, "static": 3.0, "minilm": 50.0}  # the inverse of the penalty on large weights
TAKEN = {"precision": 0.003, "recall": 0.02}  # of everyday questions, taken for its own, at most
TAKEN_BY_MODEL = {"precision": 0.01, "recall": 0.02}  # by MiniLM: everyday.txt holds more hard ones than people ask
WORTH = {"precision": 10, "recall": 3}  # a share of them that is taken is as bad as so large a share of its own lost
LOST = {"precision": 0.02, "recall": 0.01}  # of its own questions that hold a keyword
FEWEST = 20  # questions with a keyword, from which a threshold for them can be told


@dataclass(frozen=True)
class Questions:
    """All that is fitted on: `texts`, of each its class (0: everyday) and the group that stays in one fold."""

    texts: list[str]
    classes: Numbers
    groups: Numbers
    common: tuple[int, int]  # where the everyday questions begin and end, which are the same for every expert


def fit(home: Home, expert: str, encoders: Sequence[Encoder]) -> Routing:
    """Fits and writes experts/<expert>/route.safetensors.

    Raises:
        UserError: the data are not built, or there are no everyday questions.
    """
    route = read_template(home.template(expert)).declaration.route
    rows = read_rows(home.dataset(expert, "train.parquet"), ROWS, f"dmoe build {expert}")
    asked = _questions(rows, route, everyday(home), encoders)
    own, hits = asked.classes > 0, np.array([_holds(text, route) for text in asked.texts])
    spaces: dict[str, Any] = {WORDS: _sparse(asked.texts)}
    spaces |= {one.name: _vectors(home, one, asked) for one in encoders}
    scores = {name: _unseen(name, space, asked) for name, space in spaces.items()}
    joints = {WORDS: _joint([scores[WORDS]], own, hits, route.prefer)}
    for one in encoders:
        joints[one.name] = _joint([scores[WORDS], scores[one.name]], own, hits, route.prefer, one)
    routing = Routing({name: _view(name, space, asked) for name, space in spaces.items()}, joints)
    write_routing(home.expert(expert, "route.safetensors"), routing)
    return routing


def everyday(home: Home) -> list[str]:
    """The questions of seeds/everyday.txt, one a line; lines that begin with # are remarks."""
    path = home.root / "seeds" / "everyday.txt"
    lines = [line.strip() for line in read_text(path).splitlines()]
    if len(found := [line for line in lines if line and line[0] != "#"]) < 100:
        raise UserError(f"{relative(path)}: holds {len(found)} questions; an expert is fitted against 100 or more")
    return found


def _reworded(texts: list[str], copies: int) -> list[str]:
    """Each text as it is and in `copies` voices, next to one another."""
    found = []
    for text in texts:
        rng = random.Random(text)
        voices = rng.sample(list(BEFORE), copies)
        found += [text, *(reword(Seed("", text, "", ""), voice, rng) for voice in voices)]
    return found


COPIES = 3


def _questions(rows: list[Any], route: Route, others: list[str], encoders: Sequence[Encoder]) -> Questions:
    own = [row["instruction"] for row in rows]
    seeds = {seed: i for i, seed in enumerate(dict.fromkeys(row["seed_id"] for row in rows))}
    answers = {answer: i for i, answer in enumerate(dict.fromkeys(row["answer"] for row in rows), 1)}
    vectors = encoders[0].encode(own) if encoders else _sparse(own)
    classes = np.array([answers[row["answer"]] for row in rows])
    if not 1 < len(answers) <= MOST_CLASSES:
        classes = _clusters(vectors, min(MOST_CLASSES, FEWEST_CLASSES if len(answers) == 1 else len(answers), len(own)))
    senses = [sense.format(keyword) for keyword in route.keywords for sense in SENSES]
    examples, everyday = _reworded(route.examples, COPIES), _reworded(others, COPIES) + senses
    if examples:  # each stands with the rows that it is most like
        likeness = (encoders[0].encode(examples) if encoders else _sparse(examples)) @ vectors.T
        classes = np.append(classes, classes[np.asarray(likeness.argmax(axis=1)).ravel()])
    texts = own + examples + everyday
    told = range(len(texts) - len(rows))  # a text and its rewordings stay together, and so do the senses of a keyword
    groups = [seeds[row["seed_id"]] for row in rows] + [len(seeds) + i // (COPIES + 1) for i in told]
    common = (len(own) + len(examples), len(texts) - len(senses))
    return Questions(texts, np.append(classes, np.zeros(len(everyday), np.int64)), np.array(groups), common)


def _clusters(vectors: Any, count: int) -> Numbers:
    from sklearn.cluster import KMeans

    return np.asarray(KMeans(count, n_init=1, random_state=0).fit_predict(vectors) + 1, dtype=np.int64)


def _holds(text: str, route: Route) -> bool:
    spoken = f" {' '.join(words(text))} "
    return any(f" {' '.join(words(keyword))} " in spoken for keyword in route.keywords)


def _sparse(texts: list[str]) -> Any:
    """One row a text, of length 1, as the router weighs words: float32 [texts, BUCKETS], sparse."""
    from scipy.sparse import csr_matrix

    found = [buckets(text) for text in texts]
    ends = np.cumsum([0, *map(len, found)])
    values = np.concatenate([np.full(len(one), max(len(one), 1) ** -0.5, np.float32) for one in found])
    return csr_matrix((values, np.concatenate(found), ends), shape=(len(texts), BUCKETS))


def _vectors(home: Home, encoder: Encoder, asked: Questions) -> Floats:
    """The texts' vectors; those of everyday questions are the same for every expert, and kept."""
    first, last = asked.common
    common = asked.texts[first:last]
    name = f"everyday-{_digest(common)[:12]}-{encoder.digest[:12]}.npy"

    def make(path: Path) -> None:
        with path.open("wb") as stream:
            np.save(stream, encoder.encode(common))

    kept: Floats = np.load(once(home.work / name, make))
    return np.concatenate([encoder.encode(asked.texts[:first]), kept, encoder.encode(asked.texts[last:])])


def _digest(texts: list[str]) -> str:
    import hashlib

    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


# -- directions -----------------------------------------------------------------------------------


def _fitted(name: str, space: Any, classes: Numbers) -> Any:
    """Softmax over everyday and the expert's classes; both sides weigh the same."""
    from sklearn.linear_model import LogisticRegression

    own = classes > 0
    weights = np.where(own, (~own).sum() / own.sum(), 1.0)
    model = LogisticRegression(C=STRENGTH.get(name, 20.0), max_iter=60, tol=1e-3)
    return _quietly(lambda: model.fit(space, classes, sample_weight=weights))


def _quietly(run: Callable[[], Any]) -> Any:
    """Sixty steps are enough for what is measured; that the optimum is not reached is no news."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return run()


def _directions(model: Any) -> tuple[Any, Any]:
    """(weights [classes, axes], bias [classes]) against the everyday class."""
    if len(model.coef_) == 1:
        return model.coef_, model.intercept_
    return model.coef_[1:] - model.coef_[0], model.intercept_[1:] - model.intercept_[0]


def _scored(model: Any, space: Any) -> NDArray[np.float64]:
    weights, bias = _directions(model)
    return np.asarray(np.logaddexp.reduce(space @ weights.T + bias, axis=1))


def _unseen(name: str, space: Any, asked: Questions) -> NDArray[np.float64]:
    """The score of every question by directions that were fitted without its group."""
    from sklearn.model_selection import GroupKFold

    found = np.zeros(len(asked.classes))
    folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
    for fitted, left in folds.split(space, asked.classes, asked.groups):
        found[left] = _scored(_fitted(name, space[fitted], asked.classes[fitted]), space[left])
    return found


def _view(name: str, space: Any, asked: Questions) -> View:
    weights, bias = _directions(_fitted(name, space, asked.classes))
    centroid = np.zeros(0, np.float32)
    if name != WORDS:
        centroid = unit(space[asked.classes > 0].mean(axis=0, keepdims=True))[0]
    return View(weights.astype(np.float16), bias.astype(np.float32), centroid)


def _threshold(own: NDArray[np.float64], others: NDArray[np.float64], most: float, worth: float) -> float:
    """Where `most` of the others are taken; higher where more of those can be spared than its own are lost by it."""
    lowest = float(np.quantile(others, 1 - most))
    if len(own) < FEWEST:
        return lowest
    at = np.unique(np.concatenate([own, others]))
    lost = np.searchsorted(np.sort(own), at) / len(own)
    taken = 1 - np.searchsorted(np.sort(others), at) / len(others)
    return max(lowest, float(at[np.argmax(lost >= worth * taken)]))


def _joint(
    scores: list[NDArray[np.float64]], own: NDArray[np.bool_], hits: NDArray[np.bool_], prefer: str,
    encoder: Encoder | None = None,
) -> Joint:  # fmt: skip
    from sklearn.linear_model import LogisticRegression

    space = np.stack(scores, axis=1)
    model = LogisticRegression(class_weight="balanced").fit(space, own)
    score = model.decision_function(space)
    most = (TAKEN_BY_MODEL if encoder and encoder.name == "minilm" else TAKEN)[prefer]
    threshold = _threshold(score[own & ~hits], score[~own & ~hits], most, WORTH[prefer])
    held = score[own & hits]
    lowest = float(np.quantile(held, LOST[prefer])) if len(held) >= FEWEST else threshold - 2
    by_words, by_meaning = [*map(float, model.coef_[0]), 0.0][:2]
    name, digest = (encoder.name, encoder.digest) if encoder else ("", "")
    return Joint(by_words, by_meaning, float(model.intercept_[0]), threshold, min(threshold, lowest), name, digest)
