"""Encoders: a text -> one vector of length 1, by all-MiniLM-L6-v2 or by a static table distilled from it.

The model's last layer says what a text is about; the two before it still tell how that is said (`Hats have got too
big for me`). Its vector is the mean over the tokens in each of the three, and of the last the highest and the lowest on
each axis, all five measured from where plain sentences lie: docs/routing.md has what they bring.

The table is a file with a row for each token, written by `dmoe encoder`: MiniLM's view of the token alone, reduced to
256 axes in order of spread, and shorter the commoner the token. A text is its tokens' mean, and on each axis the
highest and the lowest of them, which one telling word can set: NumPy and a tokenizer, no model. The weights are
all-MiniLM-L6-v2's, or distilled from it (sentence-transformers, Apache-2.0).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from factory.errors import UserError, relative, shown
from factory.paths import Home
from factory.store import sha256, whole

Floats = NDArray[np.float32]

CURE = "\n  then run: make encoder, and for the table: dvc repro encoder"
AXES = 256
MOST_TOKENS = 256  # of a text that are read
LAYERS = 3  # of the model, counted from the last
PLAIN = (  # about everything and nothing: what all texts share lies in their middle
    "What time is it?", "My brother is coming on Sunday.", "how do i fix this", "Write a short letter to a friend.",
    "I have been waiting for two hours and nobody came.", "Which one would you take?", "thanks, that helped",
    "Explain it to me as if I were ten.", "We went to the lake and it rained.", "is it normal that it makes a noise",
    "Where can I buy good bread?", "She told me that she would call back, but she never did.",
    "Name three rivers in Africa.", "What does this word mean?", "it stopped working yesterday",
    "Give me an idea for a present.",
)  # fmt: skip
COMMON = 3e-4  # tokens more frequent than this weigh less than half (Arora 2017: a / (a + p), p by Zipf's law)


@dataclass(frozen=True)
class Encoder:
    """A way to turn texts into vectors; `digest` tells whether two are the same."""

    name: str
    digest: str  # SHA-256 of its weights, and of how it reads them
    encode: Callable[[Sequence[str]], Floats]  # n texts -> float32 [n, axes] of length 1; 0 where nothing is read
    telling: tuple[int, int] = (0, 64)  # from and to: axes that tell most by themselves, for a first look at thousands
    kept: int = 16  # experts that such a look leaves


def find_encoder(home: Home, name: str = "") -> Encoder | None:
    """The encoder called `static`, `minilm` or `none`; without a name the table, else the model, else none.

    The table comes first because it answers in a tenth of a millisecond and needs no torch; the model is nearer right.
    """
    if name not in ("", "none", "static", "minilm"):
        raise UserError(f"{shown(name)} is no encoder; there are static, minilm and none")
    places = {"static": home.table, "minilm": home.minilm}
    if name in places:
        return load_encoder(places[name])
    found = [path for path in places.values() if path.exists()] if not name else []
    return load_encoder(found[0]) if found else None


def load_encoder(path: Path) -> Encoder:
    """The encoder at `path`: a sentence-transformers folder that pools by mean, or a table's file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not path.exists():
        raise UserError(f"{relative(path)}: there is no encoder{CURE}")
    try:
        return _model(path) if path.is_dir() else _table(path)
    except UserError:
        raise
    except Exception as error:  # what a damaged file makes safetensors, tokenizers or transformers say
        raise UserError(f"{relative(path)}: is no encoder: {str(error).splitlines()[0]}{CURE}") from None


def unit(vectors: Floats) -> Floats:
    """Rows scaled to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-9), dtype=np.float32)


def _length(vector: Floats) -> float:
    return float(np.sqrt(np.dot(vector, vector)))  # a third of what numpy.linalg.norm takes


def _table(path: Path) -> Encoder:
    from safetensors import safe_open
    from tokenizers import Tokenizer

    with safe_open(path, "np") as file:
        table, tokenizer = file.get_tensor("table"), Tokenizer.from_str(file.metadata()["tokenizer"])
    if table.ndim != 2 or len(table) != tokenizer.get_vocab_size():
        raise ValueError(f"{table.shape} is no row for each token")
    tokenizer.enable_truncation(MOST_TOKENS)

    def encode(texts: Sequence[str]) -> Floats:
        found = np.zeros((len(texts), 3 * table.shape[1]), np.float32)
        for i, text in enumerate(texts):
            if ids := tokenizer.encode(text, add_special_tokens=False).ids:
                rows = table[ids].astype(np.float32)
                mean, ends = rows.sum(axis=0), np.concatenate([rows.max(axis=0), rows.min(axis=0)])
                found[i] = np.concatenate([mean / max(_length(mean), 1e-9), ends / max(_length(ends), 1e-9)])
        return unit(found)

    return Encoder("static", sha256(path), encode)


def _model(folder: Path) -> Encoder:
    import hashlib

    pools = _pools(folder)
    centre = pools(PLAIN).mean(axis=0)  # [pools, hidden]
    about = f"{sha256(folder / 'model.safetensors')} {LAYERS} {PLAIN}"

    def encode(texts: Sequence[str]) -> Floats:
        found = pools(texts) - centre
        lengths = np.linalg.norm(found, axis=2, keepdims=True)
        return unit((found / np.maximum(lengths, 1e-9)).reshape(len(texts), -1))

    hidden = centre.shape[1]
    last = ((LAYERS - 1) * hidden, LAYERS * hidden)
    return Encoder("minilm", hashlib.sha256(about.encode()).hexdigest(), encode, last, 256)


def _pools(folder: Path) -> Callable[[Sequence[str]], Floats]:
    """n texts -> [n, pools, hidden]: the tokens' mean in each of the last layers, then the last one's two extremes."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()

    def pools(texts: Sequence[str]) -> Floats:
        found = np.zeros((len(texts), LAYERS + 2, model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike in length: little padding
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            batch = tokenizer(
                [texts[i] for i in part], padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
            )
            with torch.inference_mode():
                layers = model(**batch, output_hidden_states=True).hidden_states[-LAYERS:]
            mask = batch["attention_mask"][..., None]
            means = [(layer * mask).sum(1) / mask.sum(1) for layer in layers]
            ends = [
                layers[-1].masked_fill(mask == 0, -torch.inf).amax(1),
                layers[-1].masked_fill(mask == 0, torch.inf).amin(1),
            ]
            found[part] = torch.stack([*means, *ends], 1).numpy()
        return found

    return pools


def distil(folder: Path, path: Path) -> None:
    """Writes the static table of the sentence-transformers model in `folder` to `path`."""
    from safetensors.numpy import save_file

    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    vectors = _token_vectors(folder, len(tokens))
    centred = vectors - vectors.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
    axes = axes[:, ::-1][:, :AXES]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), range(AXES)])  # else the sign is the library's whim
    ranks = np.arange(1, len(tokens) + 1)  # the vocabulary is in order of frequency, after 1,996 that are no words
    frequency = 1 / np.maximum(ranks - 1995, 1) / np.log(len(ranks))
    table = centred @ axes * (COMMON / (COMMON + frequency))[:, None]
    table /= np.sqrt(np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9))  # else a rare token drowns others
    special = [i for token, i in tokens.items() if token.startswith("[") and token.endswith("]")]
    table[special] = 0
    about = {"tokenizer": _plain_tokenizer(folder)}  # one key: safetensors writes several in no fixed order
    with whole(path) as temporary:
        save_file({"table": np.ascontiguousarray(table, np.float16)}, temporary, about)


def _plain_tokenizer(folder: Path) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return str(tokenizer.to_str())


def _token_vectors(folder: Path, count: int) -> Floats:
    """What the model makes of each token alone, between its two marks: float32 [count, hidden]."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    ids = torch.arange(count)
    marks = [torch.full_like(ids, mark) for mark in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    rows: Any = torch.stack([marks[0], ids, marks[1]], 1)
    with torch.inference_mode():
        parts = [model(input_ids=part).last_hidden_state.mean(1) for part in rows.split(1024)]
    return np.asarray(torch.cat(parts).numpy(), dtype=np.float32)
