"""What the router knows of one expert beyond its keywords: the file route.safetensors, and how a question is scored.

`dmoe fit` writes it when an expert is built; the router reads it from installed packages, which strangers made. For
every answer of the expert it holds a direction: what sets that answer's questions apart from everyday ones. There is
one set of them over words and parts of words, and one for each encoder. Their scores are joined by a few numbers,
fitted on questions that took no part in fitting the directions.
"""

import json
import re
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from factory.embed import Floats
from factory.errors import UserError, relative
from factory.store import whole

WORD = re.compile(r"\w+(?:'\w+)*")
WORDS = "words"  # the view that needs no encoder
BUCKETS = 8192  # words and parts of words are hashed into so many
FORMAT = 1
MOST_BYTES, MOST_ANSWERS, MOST_AXES, MOST_VIEWS = 16 << 20, 256, 4096, 4
LONGEST = 4000  # characters of a question that are read

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """An expert's directions in one space. A question's score there: the log of the sum of exp(direction + bias)."""

    weights: NDArray[np.float16]  # [answers, axes]
    bias: Floats  # [answers]
    centroid: Floats  # [axes] the mean of its own questions, length 1; of words: empty


@dataclass(frozen=True)
class Joint:
    """How the scores of words and of one encoder make one, and from where on it counts.

    score = words * (score by words) + meaning * (score by the encoder) + bias: log odds, where half of all are its own.
    """

    words: float
    meaning: float
    bias: float
    threshold: float
    threshold_hit: float  # where the question holds one of the keywords
    encoder: str = ""  # the encoder's name and SHA-256; empty for words alone
    digest: str = ""


@dataclass(frozen=True)
class Routing:
    """One expert's file: views and joints by the encoder's name, or `words`."""

    views: dict[str, View]
    joints: dict[str, Joint]


def words(text: str) -> tuple[str, ...]:
    """The words of a text, in lower case, without a possessive's ending; a hyphen parts words."""
    return tuple(word.removesuffix("'s") for word in WORD.findall(text.casefold().replace("\u2019", "'")))


def buckets(text: str) -> Numbers:
    """The hashes of its words, of neighbours, and of runs of three to five letters inside words: int64, each once."""
    own = words(text[:LONGEST])
    if not own:
        return np.zeros(0, np.int64)
    found = {_hash(f"{a} {b}") for a, b in zip(("<", *own), (*own, ">"), strict=True)}
    return np.fromiter(sorted(found.union(*map(_parts, own))), np.int64)


def _hash(part: str) -> int:
    return zlib.crc32(part.encode()) % BUCKETS


@lru_cache(maxsize=1 << 15)
def _parts(word: str) -> frozenset[int]:
    marked = f"<{word[:40]}>"
    runs = (marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1))
    return frozenset(map(_hash, (word, *runs)))


def write_routing(path: Path, routing: Routing) -> None:
    """Writes the file; equal routings give equal bytes."""
    from safetensors.numpy import save_file

    tensors = {  # contiguous: safetensors writes the bytes as they lie, a transposed matrix wrongly
        f"{name}.{part}": np.ascontiguousarray(value)
        for name, view in routing.views.items()
        for part, value in vars(view).items()
    }
    joints = {name: asdict(joint) for name, joint in sorted(routing.joints.items())}
    about = json.dumps({"format": FORMAT, "joints": joints}, sort_keys=True)
    with whole(path) as temporary:  # one key: safetensors writes several in no fixed order
        save_file(tensors, temporary, {"dmoe": about})


def read_routing(path: Path) -> Routing:
    """Reads a file that nobody vouches for.

    Raises:
        UserError: it is too large, damaged, of another format, or holds anything but finite numbers of the right shape.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES >> 20} MiB")
        return _read(path)
    except Exception as error:  # safetensors, json and numpy each have errors of their own for damaged files
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = "\n  then run: dmoe fit, or install the package again"
        raise UserError(f"{relative(path)}: is no routing of an expert: {what[:200]}{cure}") from None


def _read(path: Path) -> Routing:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        about: Any = json.loads((file.metadata() or {})["dmoe"])
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}, not {FORMAT}")
        joints = {str(name): _joint(value) for name, value in about["joints"].items()}
        expected = {f"{name}.{part}" for name in joints for part in ("weights", "bias", "centroid")}
        if WORDS not in joints or len(joints) > MOST_VIEWS or set(file.keys()) != expected:
            raise ValueError("its tensors are not those that it names")
        views = {name: _view(name, file) for name in joints}
    if len({len(view.bias) for view in views.values()}) > 1:
        raise ValueError("its views differ in how many answers they know")
    return Routing(views, joints)


def _joint(value: Any) -> Joint:
    joint = Joint(**value)
    for name, kind in Joint.__annotations__.items():
        number = getattr(joint, name)
        if not isinstance(number, kind) or (kind is float and not abs(number) < 1e6):
            raise ValueError(f"{name} cannot be {number!r:.40}")
    return joint


def _view(name: str, file: Any) -> View:
    axes = BUCKETS if name == WORDS else None
    shapes = {part: tuple(file.get_slice(f"{name}.{part}").get_shape()) for part in ("weights", "bias", "centroid")}
    answers, found = shapes["weights"] if len(shapes["weights"]) == 2 else (0, 0)
    sound = 0 < answers <= MOST_ANSWERS and (found == axes or (axes is None and 0 < found <= MOST_AXES))
    if not sound or shapes["bias"] != (answers,) or shapes["centroid"] != (0 if axes else found,):
        raise ValueError(f"{name} has the shapes {shapes}")
    weights, bias, centroid = (file.get_tensor(f"{name}.{part}") for part in ("weights", "bias", "centroid"))
    if (weights.dtype, bias.dtype, centroid.dtype) != (np.float16, np.float32, np.float32):
        raise ValueError(f"{name} is of the wrong kind of number")
    if not all(np.isfinite(part).all() for part in (weights, bias, centroid)):
        raise ValueError(f"{name} holds a number that is none")
    return View(weights, bias, centroid)
