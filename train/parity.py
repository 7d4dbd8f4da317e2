"""Stage parity: is the GGUF that is shipped the adapter that was trained?

PEFT (torch, float32) and llama.cpp are given the same tokens, held-out rows of the expert, with the adapter at
scale 0, 0.5 and 1. Wanted: nearly the same distribution over the whole vocabulary after every prefix, the same best
token, at scale 0 exactly the bare base, and the same update of every weight.

- A base that is a local folder is compared as a float32 GGUF, in llama.cpp without its two roundings to float16
  (keys and values, flash attention): the limit is MOST_KL. The GGUF that is served is measured beside it, ungated.
- A base whose profile names a GGUF is compared as it is served. Its weights differ from torch's by quantisation,
  with the adapter or without, so what it shows at scale 0 is the measure: at the other scales it may show LOOSER
  times as much. A fault of the adapter could hide below that; the comparison of updates is as strict as ever.

Reads experts/<expert>/adapter and adapter.gguf, datasets/<expert>/holdout.parquet and the base; writes
experts/<expert>/parity.json, only if all of this holds. Run: dmoe parity <expert>
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.errors import UserError, relative
from factory.llama import Llama, running, threads_for
from factory.paths import Home, Profile, folder_revision
from factory.progress import track
from factory.schema import ROWS, read_rows
from factory.store import once, sha256, write_json
from train.adapter import load_adapter
from train.base import load_base, load_tokenizer
from train.base_gguf import base_gguf, export_base

if TYPE_CHECKING:
    import numpy as np

SCALES = (0.0, 0.5, 1.0)
MOST_ROWS, MOST_POSITIONS = 8, 6  # 48 positions of as many figures as there are tokens: seconds on the pocket base
MOST_KL = 1e-5  # nats, at the worst position; float32 sums in another order reach 1e-10
TIE = 1e-3  # two best logits that are closer may change places
LOOSER = 2  # times what a quantised base shows at scale 0; the pocket base as Q8_0 shows a quarter at 0.5, less at 1
MOST_BASE_KL = 0.5  # nats, mean, at scale 0: more than four bits a weight cost; the GGUF is of another base
NOTHING = -104.0  # float32 knows no probability below e^-104: llama.cpp writes 0 there, and its logarithm as -3.4e38
# Relative error of an update that a type of the GGUF's tensors explains; the last is for 8 bits.
MOST_ERROR = {"F32": 1e-6, "F16": 1e-3, "BF16": 1e-2}
MOST_ERROR_QUANTISED = 2e-2
# Written apart from export.py on purpose: a check that took its order of rows from there could not find it wrong.
# Architectures whose q and k rows llama.cpp wants in another order than transformers keeps them in.
PERMUTED = ("llama", "smollm3")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Passage:
    """The tokens of one row, and the lengths of the prefixes after which the next token's distribution is compared."""

    tokens: list[int]
    ends: list[int]


@dataclass(frozen=True)
class Update:
    """What one pair of matrices adds to a weight, in the GGUF beside PEFT."""

    name: str
    error: float  # ||GGUF - PEFT|| / ||PEFT||, Frobenius; 1 where the GGUF lacks it
    factor: float  # the GGUF's as a multiple of PEFT's, by least squares
    most: float  # the error that the GGUF's type explains

    @property
    def differs(self) -> bool:
        return not self.error <= self.most  # NaN differs


def parity(home: Home, expert: str, profile: Profile) -> Figures:
    """Compares PEFT and llama.cpp and writes parity.json; returns what it holds.

    Raises:
        UserError: what is missed, by name and amount, with the first tensor that differs; nothing is written.
    """
    adapter = home.expert(expert, "adapter.gguf")
    rows = read_rows(home.dataset(expert, "holdout.parquet"), ROWS, f"dmoe build {expert}")
    passages = choose(rows, load_tokenizer(home, profile))
    model, served = _peft(home, expert, profile), base_gguf(home, profile)
    updates = compare_updates(model, adapter)
    result: Figures = {
        "about": profile.about,
        "sha256": {name: sha256(home.expert(expert, name)) for name in ("adapter", "adapter.gguf")},
        "rows": len(passages),
        "positions": sum(len(p.ends) for p in passages),
        "updates": {"compared": len(updates), "largest_error": two_digits(max(u.error for u in updates))},
    }
    both = Both(expert, model, adapter, home.work / "logs" / f"parity-{expert}.log", profile.gguf is None)
    base = _float32_gguf(home, profile) if both.exact else served
    result |= {"base": "as float32" if both.exact else profile.gguf, **compare(both, passages, base)}
    if missed := judge(result, updates):
        raise UserError(f"{expert}: parity missed: {'; '.join(missed)}\n  {blame(updates, adapter)}")
    if both.exact:
        beside = in_both(both, passages[::2], served, "as served", exact=False)
        result["as_served"] = {f"{s:g}": figures(*pair, TIE) for s, pair in beside.items()}
    write_json(home.expert(expert, "parity.json"), result)
    return result


@dataclass(frozen=True)
class Both:
    """The trained adapter in PEFT and the shipped one in llama.cpp."""

    expert: str
    model: Any  # PeftModel, float32
    adapter: Path  # GGUF
    log: Path
    exact: bool  # the base is a folder, and is compared as float32


def compare(both: Both, passages: list[Passage], base: Path) -> Figures:
    """Both on `passages` at all scales, and each at scale 0 beside its own bare base."""
    pairs = in_both(both, passages, base, "in both", both.exact)
    peft, cpp = pairs[0.0]
    limits = {"kl_mean": MOST_KL, "kl_max": MOST_KL, "tie": TIE} if both.exact else loosened(peft, cpp)
    with running(base, slots=1, threads=threads_for(base), exact=both.exact, log=both.log) as llama:
        bare = measured(llama, passages, [], peft.shape[1], f"{both.expert}: bare base")
    with both.model.disable_adapter():
        off = _log_probabilities(both.model, passages)
    return {
        "limits": limits,
        "scales": {f"{s:g}": figures(*pair, limits["tie"]) for s, pair in pairs.items()},
        "identical_at_0": bool((bare == cpp).all() and (off == peft).all()),
    }


def in_both(
    both: Both, passages: list[Passage], base: Path, name: str, exact: bool
) -> "dict[float, tuple[np.ndarray, np.ndarray]]":
    """Scale -> log-probabilities of PEFT and of llama.cpp on `base`, float64 [positions, vocabulary] each."""
    pairs = {}
    with running(base, [both.adapter], slots=1, threads=threads_for(base), exact=exact, log=both.log) as llama:
        for scale in SCALES:
            peft = reference(both.model, passages, scale)
            label = f"{both.expert}: {name}, scale {scale:g}"
            pairs[scale] = peft, measured(llama, passages, [scale], peft.shape[1], label)
    return pairs


def judge(result: Figures, updates: list[Update]) -> list[str]:
    """What is missed, by name and amount; empty if nothing is."""
    missed, limits = [], result["limits"]
    for scale, found in result["scales"].items():
        for name in ("kl_mean", "kl_max"):
            if not found[name] <= limits[name]:
                missed.append(f"{name} {found[name]:g} nats at scale {scale}, at most {limits[name]:g} wanted")
        if found["agreement"] < 1:
            missed.append(f"the same best token at {found['agreement']:.1%} of positions at scale {scale}, all wanted")
    if not result["identical_at_0"]:
        missed.append("at scale 0 not the bare base, bit for bit")
    if not (base := result["scales"]["0"]["kl_mean"]) <= MOST_BASE_KL:
        missed.append(f"the bare base's GGUF is {base:g} nats from its weights, at most {MOST_BASE_KL:g} wanted")
    differing = [u for u in updates if u.differs]
    return missed + ([f"{len(differing)} of {len(updates)} updates differ"] if differing else [])


# -- the same tokens, through both ----------------------------------------------------------------


def choose(rows: list[dict[str, Any]], tokenizer: Any) -> list[Passage]:
    """At most MOST_ROWS rows, each of another seed, lowest row_id first; positions spread over the completion."""
    by_seed: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: str(row["row_id"])):
        by_seed.setdefault(row["seed_id"], row)
    return [_passage(row, tokenizer) for row in list(by_seed.values())[:MOST_ROWS]]


def _passage(row: dict[str, Any], tokenizer: Any) -> Passage:
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    tokens = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
    ends = range(len(prompt), len(tokens))
    count = min(MOST_POSITIONS, len(ends))
    return Passage(list(tokens), [ends[i * len(ends) // count] for i in range(count)])


def _peft(home: Home, expert: str, profile: Profile) -> Any:
    """Base and adapter in float32 whatever the profile trains in: the reference must not round."""
    base = load_base(home, replace(profile, train=profile.train.model_copy(update={"dtype": "float32"})))
    return load_adapter(home, expert, base)


def reference(model: Any, passages: list[Passage], scale: float) -> "np.ndarray":
    """PEFT's log-probabilities with the adapter at `scale`: float64 [positions, vocabulary]."""
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model, scale):
        return _log_probabilities(model, passages)


def _log_probabilities(model: Any, passages: list[Passage]) -> "np.ndarray":
    import numpy as np
    import torch

    rows = []
    with torch.no_grad():
        for passage in passages:
            logits = model(torch.tensor([passage.tokens])).logits[0, [end - 1 for end in passage.ends]]
            rows.append(torch.log_softmax(logits.double(), -1).numpy())
    return np.concatenate(rows)


# Asks llama.cpp, with n_probs, for the next token's probabilities and lets it say one token. Which one is forced, and
# leaves the probabilities as they are: after half a letter (the first byte of several) it would wait for the rest and
# report none.
NEXT_TOKEN: dict[str, Any] = {"n_predict": 1, "temperature": 0, "logit_bias": [["a", 1e4]]}


def measured(llama: Llama, passages: list[Passage], scales: list[float], size: int, name: str) -> "np.ndarray":
    """llama.cpp's log-probabilities at these adapter scales: float64 [positions, size]; needs a server of one slot.

    Raises:
        UserError: its vocabulary is not the base's.
    """
    import numpy as np

    found = np.empty((sum(len(p.ends) for p in passages), size))
    gc.freeze()  # else torch's million objects are walked again for the thousands of every reply: half the time
    for row, reply in zip(found, track(_replies(llama, passages, scales, size), name, len(found)), strict=True):
        top = reply["completion_probabilities"][0]["top_logprobs"]
        tokens = np.array([entry["id"] for entry in top])
        if len(tokens) != size:
            many = f"more than {size}" if len(tokens) > size else len(tokens)
            raise UserError(f"llama.cpp's base has {many} tokens, torch's {size}; the GGUF is of another base")
        row[tokens] = np.maximum(np.array([entry["logprob"] for entry in top], float), NOTHING)
    gc.unfreeze()
    # llama.cpp's probabilities are float32 and do not quite add up to 1, which would stand in the divergence.
    return np.asarray(found - np.log(np.exp(found).sum(1, keepdims=True)))


def _replies(llama: Llama, passages: list[Passage], scales: list[float], size: int) -> Iterator[Figures]:
    for passage in passages:
        for before, end in pairwise([0, *passage.ends]):
            # A passage's first prefix is computed from nothing: no key or value of another scale is ever used again.
            yield llama.complete(passage.tokens[:end], scales, **NEXT_TOKEN, n_probs=size + 1, cache_prompt=before > 0)


def figures(peft: "np.ndarray", cpp: "np.ndarray", tie: float) -> Figures:
    """Kullback-Leibler divergence (nats) of llama.cpp from PEFT, and how often their best token is the same.

    Args:
        peft, cpp: log-probabilities, float64 [positions, vocabulary].
        tie: positions where PEFT's two best logits are closer are left out of `agreement`, and counted as `ties`.
    """
    import numpy as np

    divergence = np.maximum((np.exp(peft) * (peft - cpp)).sum(1), 0.0)
    best = np.partition(peft, -2)[:, -2:]
    clear = best[:, 1] - best[:, 0] >= tie
    same = (peft.argmax(1) == cpp.argmax(1))[clear]
    return {
        "kl_mean": two_digits(divergence.mean()),
        "kl_max": two_digits(divergence.max()),
        "agreement": round(float(same.mean()), 4) if clear.any() else 1.0,
        "ties": int((~clear).sum()),
    }


def loosened(peft: "np.ndarray", cpp: "np.ndarray") -> Figures:
    """The limits for a quantised base, from what it shows with its adapter at scale 0."""
    import numpy as np

    shown = figures(peft, cpp, TIE)
    best = peft.argsort(1)[:, -2:]
    moved = np.abs(np.take_along_axis(peft - cpp, best, 1)).max()
    limits = {name: two_digits(max(MOST_KL, LOOSER * shown[name])) for name in ("kl_mean", "kl_max")}
    return {**limits, "tie": two_digits(max(TIE, LOOSER * float(moved)))}


def two_digits(value: float) -> float:
    """Rounded so that a file in git does not change with the last bits of a machine."""
    return float(f"{value:.1e}")


def _float32_gguf(home: Home, profile: Profile) -> Path:
    folder = profile.model_path(home)
    assert folder  # base_gguf has refused a hub base without a GGUF
    path = home.work / f"base-{folder_revision(folder)}-float32.gguf"
    return once(path, lambda temporary: export_base(folder, temporary, matrices="F32"))


# -- the update of every weight -------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """What is added to one weight is B A."""

    a: "np.ndarray"  # [rank, in]
    b: "np.ndarray"  # [out, rank], its scale multiplied in
    most: float = 0.0  # the relative error that the types of both explain


def compare_updates(model: Any, file: Path) -> list[Update]:
    """The update of each weight in the GGUF beside PEFT's, in the model's order; then what PEFT does not have.

    Raises:
        UserError: the GGUF cannot be read, or PEFT trains a module that has no name in it.
    """
    architecture, pairs = read_pairs(file)
    config, found = model.config.get_text_config(), []
    names = _names(architecture, config.num_hidden_layers)
    for module, layer in _lora_layers(model):
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UserError(f"{relative(file)}: {module} has no name in a GGUF of {architecture}")
        a, b = (side["default"].weight.detach().numpy() for side in (layer.lora_A, layer.lora_B))
        if architecture in PERMUTED:
            b = interleaved(b, name, config)
        found.append(_update(name, pairs.pop(name, None), Pair(a, b * layer.scaling["default"])))
    return found + [Update(name, float("inf"), float("inf"), 0.0) for name in pairs]


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora.layer import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model.").replace("language_model.", ""), module


def read_pairs(file: Path) -> tuple[str, dict[str, Pair]]:
    """The architecture of a GGUF adapter, and its pairs by the name of their weight, float32, scaled by its alpha.

    Raises:
        UserError: the file is damaged, or no adapter.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{relative(file)}: is no GGUF adapter ({error})\n  then run: dmoe export") from None
    alpha = reader.fields.get("adapter.lora.alpha")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    pairs = {}
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        a, b = (tensors.get(f"{name}.lora_{side}") for side in "ab")
        if a and b:  # half a pair is missing as a whole
            pairs[name] = _pair(a, b, float(alpha.contents()) if alpha else 0.0)
    return architecture, pairs


def _pair(a: Any, b: Any, alpha: float) -> Pair:
    from gguf.quants import dequantize

    values = [dequantize(side.data, side.tensor_type) for side in (a, b)]
    scale = alpha / values[1].shape[1] if alpha else 1.0  # as llama.cpp reads it: no alpha, or 0, is scale 1
    most = max(MOST_ERROR.get(side.tensor_type.name, MOST_ERROR_QUANTISED) for side in (a, b))
    return Pair(values[0], values[1] * scale, most)


def _names(architecture: str, layers: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    return get_tensor_name_map(next(a for a, name in MODEL_ARCH_NAMES.items() if name == architecture), layers)


def interleaved(b: "np.ndarray", name: str, config: Any) -> "np.ndarray":
    """The rows of a q or k matrix, from a head's two halves (transformers) to pairs of rows (llama.cpp)."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    return b.reshape(heads, 2, len(b) // heads // 2, -1).swapaxes(1, 2).reshape(b.shape) if heads else b


def _update(name: str, found: Pair | None, wanted: Pair) -> Update:
    """Compares B A with B A, neither of them ever made whole: of a 14B model one is hundreds of megabytes."""
    import numpy as np

    if found is None:
        return Update(name, 1.0, 0.0, 0.0)
    if found.a.shape[1] != wanted.a.shape[1] or len(found.b) != len(wanted.b):
        return Update(name, float("inf"), float("inf"), found.most)
    size = _inner(wanted, wanted) or np.finfo(float).tiny  # an adapter that was never trained: B is 0
    rest = Pair(np.concatenate([found.a, wanted.a]), np.concatenate([found.b, -wanted.b], 1))
    error = np.sqrt(np.maximum(_inner(rest, rest), 0.0) / size)
    return Update(name, float(error), _inner(found, wanted) / size, found.most)


def _inner(left: Pair, right: Pair) -> float:
    """The inner product of two updates: the trace of (B A)^T (D C), by the small matrices B^T D and A C^T."""
    a, b, c, d = (side.astype(float) for side in (left.a, left.b, right.a, right.b))
    return float(((b.T @ d) * (a @ c.T)).sum())


def blame(updates: list[Update], file: Path) -> str:
    """The first tensor that differs, in words; or that none does, and what is left."""
    where, differing = relative(file), [u for u in updates if u.differs]
    if not differing:
        return f"{where}: all {len(updates)} updates are PEFT's: look at llama.cpp's version and at the base's GGUF"
    first = differing[0]
    if first.error == float("inf"):
        text = "is not in PEFT's adapter, or has another shape there"
    elif not first.factor:
        text = "is missing, or zero"
    else:
        text = f"its update differs by {first.error:.2g} of its size"
    factors = [u.factor for u in differing]
    if len(differing) == len(updates) and max(factors) - min(factors) < 1e-3 * abs(first.factor):
        text += f"; every update is {first.factor:.4g} times PEFT's: look at adapter.lora.alpha and the rank's scaling"
    return f"{where}: first tensor that differs: {first.name}: {text}"
