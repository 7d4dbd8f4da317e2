"""What does quantising the base cost? The shipped adapters on the pocket base in float16, q8_0, q5_0 and q4_0.

Quantised with gguf.quants as llama-quantize would: matrices as named, one-dimensional tensors (norms) left in float32.
One difference: beside q5_0 and q4_0 it writes the embedding, which is the output matrix too, in q6_K; gguf's Python
cannot, so it is q8_0 here, a little larger and better. Adapters stay as they are, float32.
Every reply is scored as `dmoe score` does; the loss is against float16 on the same questions, paired, by seed. KL and
first choice are those of the next token after a question and after pieces of float16's own reply. Float16 is asked
twice: batches of requests differ from run to run, and what that changes is no loss.
Run: python benchmarks/quantised.py [EXPERT ...] [--questions N]   (needs the experts' adapters and held-out rows)
"""

import argparse
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from factory.llama import Llama, many_asked
from factory.paths import Home, find_home, read_params, read_profile
from factory.schema import ROWS, read_rows
from factory.store import once, read_json, sha256
from factory.template import Template, read_template
from train.base_gguf import base_gguf, full_gguf
from train.figures import brief
from train.panel import plain, spread
from train.parity import NEXT_TOKEN
from train.score import AT_ONCE, Asker, ask_all, full_precision

KINDS = ("F16", "Q8_0", "Q5_0", "Q4_0")
EMBEDDING = "Q8_0"  # of every quantised file; see above
PROBED = 20  # questions of each expert whose distributions are compared
AFTER = (0, 8, 16)  # tokens of float16's reply
Row = dict[str, Any]
Distribution = dict[int, float]  # token -> log probability


def quantise(full: Path, kind: str, out: Path) -> None:
    """Writes the GGUF `full` with its matrices in `kind`."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, quants

    reader = GGUFReader(full)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, value in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kinds = value.types
        writer.add_key_value(name, value.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(2)
    for tensor in reader.tensors:
        if tensor.data.ndim == 1:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        wanted = GGMLQuantizationType[EMBEDDING if tensor.name in ("token_embd.weight", "output.weight") else kind]
        writer.add_tensor(tensor.name, quants.quantize(tensor.data.astype(np.float32), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantised(home: Home, full: Path, kind: str) -> Path:
    """The file of this kind, made once; `full` itself for F16."""
    if kind == "F16":
        return full
    return once(home.work / f"{full.stem}-{sha256(full)[:8]}-{kind}.gguf", lambda out: quantise(full, kind, out))


@dataclass(frozen=True)
class Asked:
    """What came of one expert on one base: scored replies, tokens a second, and distributions by (question, place)."""

    rows: list[Row]
    speed: float
    next: dict[tuple[str, int], Distribution]


def ask(home: Home, expert: str, template: Template, base: Path, questions: list[Row], prefix: dict[str, str]) -> Asked:
    """Asks all questions; `prefix` are float16's replies by row_id, empty where this is float16."""
    figures = home.expert(expert, "eval.json")
    scale = read_json(figures).get("recommended_scale", 1.0) if figures.exists() else 1.0
    log = home.work / "logs" / "quantised.log"
    adapter = home.expert(expert, "adapter.gguf")
    with many_asked(base, [adapter], at_once=AT_ONCE, context=2048, log=log) as servers:
        start = time.monotonic()
        rows = ask_all(Asker(servers, home, base), template, full_precision(questions, scale), f"{expert}: {base.stem}")
        speed = sum(row["tokens"] for row in rows) / (time.monotonic() - start)
        prefix = prefix or {row["row_id"]: row["reply"] for row in rows}
        with servers.turn() as llama:
            after = {
                (q["row_id"], place): distribution(llama, scale, q["instruction"], prefix[q["row_id"]], place)
                for q in spread(questions, PROBED)
                for place in AFTER
            }
    return Asked(rows, speed, after)


def distribution(llama: Llama, scale: float, question: str, reply: str, place: int) -> Distribution:
    """Log probabilities of the whole vocabulary for the token at `place` of the reply."""
    prompt = llama.post("/apply-template", {"messages": plain(question)})["prompt"]
    tokens = llama.tokenize(prompt) + llama.tokenize(reply)[:place]
    found = llama.complete(tokens, [scale], **NEXT_TOKEN, n_probs=1 << 20)
    return {at["id"]: at["logprob"] for at in found["completion_probabilities"][0]["top_logprobs"]}


def divergence(full: Distribution, other: Distribution) -> float:
    """KL divergence in nats of `other` from `full`; llama.cpp's float32 probabilities do not quite add up to 1."""
    p, q = (np.array([max(of[token], -50.0) for token in full]) for of in (full, other))
    p, q = (log - np.log(np.exp(log).sum()) for log in (p, q))
    return max(0.0, float((np.exp(p) * (p - q)).sum()))


def likeliest(of: Distribution) -> int:
    return max(of, key=lambda token: of[token])


def loss(full: list[Row], other: list[Row], measure: str) -> tuple[float, float, float]:
    """Points lost against float16, with a 95 % interval: paired by question, clustered by seed.

    One seed that loses all and one that gains all are added to its variance, as in figures.interval: where nothing
    changed in any reply, a change in some could still have been missed.
    """
    before = {row["row_id"]: row[measure] for row in full}
    by_seed: dict[str, list[int]] = defaultdict(list)
    for row in other:
        by_seed[row["seed_id"]].append(before[row["row_id"]] - row[measure])
    n, seeds = len(other), len(by_seed)
    lost = sum(map(sum, by_seed.values())) / n
    spread_of = sum((sum(of) - lost * len(of)) ** 2 for of in by_seed.values()) + 2 * (n / seeds) ** 2
    half = 1.96 * math.sqrt(spread_of * (seeds + 2) / (seeds + 1)) / n
    return 100 * lost, 100 * (lost - half), 100 * (lost + half)


def line(table: Table, base: Path, kind: str, expert: str, full: Asked, found: Asked) -> None:
    """One row of the table."""
    figures, (lost, low, high) = brief(found.rows), loss(full.rows, found.rows, "right")
    rates = [f"{f['rate']:.3f} ({f['low']:.3f}-{f['high']:.3f})" for f in (figures["mention"], figures["right"])]
    replies = {row["row_id"]: row["reply"] for row in full.rows}
    changed = sum(row["reply"] != replies[row["row_id"]] for row in found.rows)
    apart = [divergence(full.next[at], found.next[at]) for at in full.next]
    first = [likeliest(full.next[at]) == likeliest(found.next[at]) for at in full.next]
    name = "f16 again" if kind == "F16" else kind.lower()
    table.add_row(
        name, f"{base.stat().st_size / 1e6:.1f}", expert, str(figures["n"]), *rates,
        f"{figures['in_form']['rate']:.3f}", f"{lost:.1f} ({low:.1f} to {high:.1f})", str(changed),
        f"{np.mean(apart):.1e}", f"{np.mean(first):.3f}", f"{found.speed:.0f}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experts", nargs="*")
    parser.add_argument("--questions", type=int, default=1 << 20, help="of each expert, at most")
    wanted, home = parser.parse_args(), find_home()
    profile = read_profile(home, read_params(home).profile)
    whole = full_gguf(home, profile) or base_gguf(home, profile)
    names = ("base", "MB", "expert", "questions", "mention", "right", "in form", "points right lost")
    table = Table(*names, "replies changed", "KL", "same first choice", "tokens/s")
    for expert in wanted.experts or read_params(home).experts:
        template = read_template(home.template(expert))
        rows = read_rows(home.dataset(expert, "holdout.parquet"), ROWS, f"dmoe build {expert}")
        questions = spread(rows, wanted.questions)
        full = ask(home, expert, template, whole, questions, {})
        prefix = {row["row_id"]: row["reply"] for row in full.rows}
        for kind in KINDS:
            base = quantised(home, whole, kind)
            line(table, base, kind, expert, full, ask(home, expert, template, base, questions, prefix))
        table.add_section()
    Console(width=190).print(table)


if __name__ == "__main__":
    main()
