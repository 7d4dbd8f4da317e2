"""`dmoe plan`: what a rebuild would do, before it is begun: stages, tokens, memory, hours, and what they cost.

Seconds are those that a stage took last (.dmoe/times.json, by `dmoe repro-all`), pace and memory those of the last
training on this base (.dmoe/paces.json). Where nothing was measured, they are told from the base's shape and the GPU's
data sheet, and it says so.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from factory.errors import UserError
from factory.paths import Home, Profile
from factory.schema import ROWS, read_rows
from factory.seeds import held_out, read_seeds
from factory.store import read_json
from factory.template import read_template
from factory.tokens import counter
from train.base import read_config

RANK = 16
FRAME = 9  # tokens that the chat template puts around a row
ASSUMED = 0.4  # of a GPU's peak, by 4N, where no training on this base has been measured
STATE = 16  # bytes a weight of the adapter: itself, its gradient, AdamW's two moments, in float32


@dataclass(frozen=True)
class Work:
    """What the trainings to come hold."""

    rows: int
    tokens: int  # of all epochs
    unbuilt: int  # experts counted from their seeds, as their rows are not built yet


@dataclass(frozen=True)
class Shape:
    """The base's size, and what training on it takes."""

    weights: int
    adapter: int  # weights of an adapter at rank 16
    base_bytes: int
    activation_bytes: int  # a token, kept for the way back

    def bytes_at(self, tokens: int) -> int:
        """Base, adapter with its optimizer, and the activations of a pass of `tokens`; no cache, no fragments."""
        return self.base_bytes + STATE * self.adapter + self.activation_bytes * tokens


def work(home: Home, profile: Profile, experts: Iterable[str]) -> Work:
    """Rows and tokens of the trainings of `experts`, counted with the base's tokenizer.

    Raises:
        UserError: the tokenizer cannot be had, or a template or seeds are broken.
    """
    count = counter(home, profile)
    rows = tokens = unbuilt = 0
    for expert in experts:
        template = read_template(home.template(expert))
        epochs = template.declaration.train.epochs * profile.train.epochs_factor
        built = home.dataset(expert, "train.parquet")
        if built.exists():
            lengths = [count(row["instruction"]) + count(row["output"]) for row in read_rows(built, ROWS, "")]
        else:
            unbuilt += 1
            seeds, reply = read_seeds(home.seeds(expert), template), round(statistics.mean(template.output.tokens))
            outside = held_out(seeds)
            inside = [count(seed.instruction) + reply for seed in seeds if seed.id not in outside]
            lengths = inside * template.declaration.generate.per_seed
        rows += len(lengths)
        tokens += round((sum(lengths) + FRAME * len(lengths)) * epochs)
    return Work(rows, tokens, unbuilt)


def shape(home: Home, profile: Profile) -> Shape | None:
    """From the base's configuration alone; None where that cannot be had."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        known = read_config(home, profile)
    except UserError:
        return None
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known))
    width = torch.finfo(getattr(torch, profile.train.dtype)).bits // 8
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    adapter = sum(RANK * (m.in_features + m.out_features) for m in linear)
    weights = sum(p.numel() for p in model.parameters())
    # what each linear layer gives is kept, and about as much again by norms, activation and attention
    return Shape(weights, adapter, weights * width, 2 * width * sum(m.out_features for m in linear))


@dataclass(frozen=True)
class Pace:
    """How fast trainings go, and where that is known from; None: not known."""

    tokens_per_second: float | None
    memory_gb: float | None
    source: str


def pace(home: Home, profile: Profile, base: Shape | None) -> Pace:
    """Measured by the last training on this base, else from the GPU's data sheet and the base's shape."""
    path = home.work / "paces.json"
    if path.exists() and (kept := read_json(path).get(profile.model)):
        return Pace(kept["tokens_per_second"], kept["memory_gb"], "measured by the last training on this base")
    if not base:
        return Pace(None, None, "the base is not here, and no training on it was measured")
    import torch

    from train.live import data_sheet

    memory = base.bytes_at(profile.train.tokens_per_pass) / 1e9
    top = data_sheet(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if not top:
        return Pace(None, memory, "from the base's shape; no training on it was measured, and no known GPU is here")
    return Pace(ASSUMED * top / (4 * base.weights), memory, f"not measured: {ASSUMED:.0%} of the GPU's peak by 4N")
