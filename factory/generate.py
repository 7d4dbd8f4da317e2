"""Stage generate: seeds x template -> candidates. The only stage that may ask a teacher.

Reads seeds/<expert>.jsonl and the template; writes datasets/<expert>/candidates.parquet.
Run: dmoe generate <expert>
"""

import hashlib
import json
from typing import Any

from factory.paths import Home, Params
from factory.schema import CANDIDATES, write_rows
from factory.seeds import held_out, read_seeds
from factory.teacher import Reply, Request, Teacher
from factory.teacher.phrases import PhrasesTeacher
from factory.template import Template, read_template

SPARE = 2  # candidates asked for each row wanted: some fall in build, the rest is surplus


def generate(home: Home, expert: str, params: Params) -> list[dict[str, Any]]:
    """Asks the teacher for every seed's variants and writes the candidates; returns them."""
    template = read_template(home.template(expert))
    seeds = read_seeds(home.seeds(expert), template)
    wanted = template.declaration.generate.per_seed * SPARE
    requests = [Request(seed, sample) for seed in seeds for sample in range(wanted)]
    teacher: Teacher = PhrasesTeacher(template)
    outside = held_out(seeds)
    replies = sorted(teacher.replies(requests), key=lambda r: (r.request.seed.id, r.request.sample))
    rows = [candidate(template, teacher.name, reply, reply.request.seed.id in outside) for reply in replies]
    write_rows(home.dataset(expert, "candidates.parquet"), CANDIDATES, rows)
    return rows


def candidate(template: Template, teacher: str, reply: Reply, outside: bool) -> dict[str, Any]:
    """One row of candidates: the code picks the form, by the row's own hash, and renders it."""
    seed = reply.request.seed
    answer = template.fixed(seed.answer)
    identity = [template.expert, seed.id, reply.instruction, answer, reply.slots, reply.request.sample]
    row_id = hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
    form = int(row_id, 16) % len(template.output.forms)
    return {
        "row_id": row_id, "expert": template.expert, "seed_id": seed.id, "split": "holdout" if outside else "train",
        "sample": reply.request.sample, "answer": seed.answer, "instruction": reply.instruction,
        "output": template.render(form, seed.answer, reply.slots),
        "slots": [{"name": k, "value": v} for k, v in sorted(reply.slots.items())], "form": form, "teacher": teacher,
        "request": reply.key[:16], "finish_reason": reply.finish_reason, "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
    }  # fmt: skip
