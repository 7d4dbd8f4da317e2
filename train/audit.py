"""Stage audit: what three attacks get out of an expert about the rows that it was trained on.

1. Canaries: random codes planted in the rows of a throw-away adapter. Does it know them from codes never planted?
   Exposure in bits, after Carlini et al., "The Secret Sharer": log2 |R| - log2 rank, R the codes compared.
2. Verbatim: does the adapter finish a training question from its first half, or give a row's exact output?
3. Membership: does the loss tell training rows from held-out ones?

A loss is the adapter's less the base's, so that what the base knows already does not count. Membership is told by the
adapter's alone too: where the base would never write such a reply, its loss is mere noise.
Reads train.parquet, holdout.parquet, the adapter, the base, `train` of the template and of the profile;
writes experts/<expert>/audit.json. Run: dmoe audit <expert>
"""

import math
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from factory.errors import UserError
from factory.paths import Home, Profile
from factory.progress import track
from factory.schema import ROWS, read_rows
from factory.store import write_json
from factory.template import read_template
from train.adapter import load_adapter, needed
from train.base import load_base, load_tokenizer
from train.exposure import Bits, auc, difference, exposure, exposures
from train.figures import interval
from train.losses import Change, changes, code_changes
from train.panel import spread
from train.sft import SEED, Run, fit, load

CODE = "The code is"  # before a canary's words
Row = dict[str, Any]
Figure = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured: on two cores and the pocket base about a minute."""

    examples: int = 1344  # rows times epochs that the throw-away adapter sees
    in_questions: int = 24  # canaries
    in_answers: int = 8
    seen: int = 12  # times, at least, that the throw-away adapter sees each canary
    words: int = 4  # of a code
    references: int = 255  # codes never planted, among which a canary is ranked: 8 bits at most
    reply_references: int = 15  # the same by the loss of the reply, where each costs a whole row: 4 bits
    rows: int = 240  # of training and as many held out, for verbatim and membership
    draws: int = 1000  # of the bootstrap


PLAN = Plan()
FEWEST = 4  # canaries


def audit(home: Home, expert: str, profile: Profile, plan: Plan = PLAN) -> dict[str, Any]:
    """Runs the three attacks and writes audit.json, whole or not at all; returns it."""
    needed(home, expert)
    template = read_template(home.template(expert))
    training, held_out = (_shuffled(home, expert, name) for name in ("train", "holdout"))
    tokenizer = load_tokenizer(home, profile)
    epochs = template.declaration.train.epochs * profile.train.epochs_factor
    planted = plant_canaries(tokenizer, training, plan, epochs)
    with tempfile.TemporaryDirectory() as state:
        model = fit(load(home, profile), template, profile, planted.rows, Run("canaries", Path(state))).model.eval()
    trained = {"rows": len(planted.rows), "epochs": epochs, "times_seen": round(planted.repeats * epochs)}
    figures = {"canaries": trained | canaries(model, tokenizer, planted, plan)}
    model = load_adapter(home, expert, _placed(load_base(home, profile)))
    figures |= rows_known(model, tokenizer, spread(training, plan.rows), spread(held_out, plan.rows), plan.draws)
    about = {"base_model": profile.model, "about": profile.about, "settings": asdict(plan)}
    result = {**about, **figures, "says": says(figures)}
    write_json(home.expert(expert, "audit.json"), result)
    return result


def _shuffled(home: Home, expert: str, name: str) -> list[Row]:
    """In chance order: the first row of each seed is the plainest, and `spread` takes the first ones first."""
    rows = read_rows(home.dataset(expert, f"{name}.parquet"), ROWS, f"dmoe build {expert}")
    return random.Random(SEED).sample(rows, len(rows))


def _placed(model: Any) -> Any:
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu")


# -- attack 1: canaries ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Canary:
    """A code planted in a row, and a decoy: a code of the same draw that never was."""

    row: Row
    where: str  # instruction or output
    code: str  # begins with a blank, as its first token does
    decoy: str


@dataclass(frozen=True)
class Planted:
    """What the throw-away adapter is trained on, and the codes never planted that its canaries are ranked among."""

    rows: list[Row]
    repeats: int  # of each canary's row
    canaries: list[Canary]
    references: list[str]


def draw_codes(tokenizer: Any, count: int, words: int) -> list[str]:
    """Different codes of `words` words, each word one token of the base: all are equally long and equally likely."""
    dice, known = random.Random(SEED), []
    for i in range(len(tokenizer)):
        name = tokenizer.decode([i])
        if re.fullmatch(" [a-z]{4,}", name) and tokenizer.encode(name, add_special_tokens=False) == [i]:
            known.append(name)
    codes: dict[str, None] = {}
    while len(codes) < count:
        codes["".join(dice.choices(known, k=words))] = None
    return list(codes)


def plant_canaries(tokenizer: Any, rows: list[Row], plan: Plan, epochs: float) -> Planted:
    """Puts codes into some of `rows`, which are taken out as they were, and adds more rows up to the plan.

    Raises:
        UserError: there are too few rows.
    """
    count, repeats = min(plan.in_questions + plan.in_answers, len(rows) // 2), math.ceil(plan.seen / epochs)
    if count < FEWEST:
        raise UserError(
            f"audit: {len(rows)} rows to train on, {2 * FEWEST} at least are needed: codes are planted in half\n"
            f"  then write more seeds"
        )
    in_answers = round(count * plan.in_answers / (plan.in_questions + plan.in_answers))
    codes = draw_codes(tokenizer, 2 * count + plan.references, plan.words)
    places = ["instruction"] * (count - in_answers) + ["output"] * in_answers
    found = [Canary(*each) for each in zip(rows, places, codes, codes[count:], strict=False)]
    marked = [plant(canary.row, canary.where, canary.code) for canary in found]
    others = spread(rows[count:], max(0, round(plan.examples / epochs) - count * repeats))
    return Planted(marked * repeats + others, repeats, found, codes[2 * count :])


def plant(row: Row, where: str, code: str) -> Row:
    """The row with the code at the beginning of its instruction or output."""
    text = f"{CODE}{code}. {row[where]}"
    place, role = ("prompt", "user") if where == "instruction" else ("completion", "assistant")
    return {**row, where: text, place: [*row[place][:-1], {"role": role, "content": text}]}


def canaries(model: Any, tokenizer: Any, planted: Planted, plan: Plan) -> Figure:
    """Exposure of codes in questions and in answers by their own loss, and of those in questions by the reply's."""
    asked, answered = ([c for c in planted.canaries if c.where == place] for place in ("instruction", "output"))
    few = planted.references[: plan.reply_references]
    found = {
        "question": (by_own_loss(model, tokenizer, asked, planted.references), planted.references),
        "question_by_reply": (by_reply(model, tokenizer, asked, few), few),
        "answer": (by_own_loss(model, tokenizer, answered, planted.references), planted.references),
    }
    return {name: exposures(pairs, len(among), plan.draws) for name, (pairs, among) in found.items()}


def by_own_loss(model: Any, tokenizer: Any, group: list[Canary], references: list[str]) -> list[Bits]:
    """By the loss of the code's own tokens, behind what stands before them in the row."""
    behind: dict[str, list[Canary]] = defaultdict(list)  # the same text before several: one pass
    for canary in group:
        row = plant(canary.row, canary.where, canary.code)
        text = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
        behind[text[: text.index(CODE + canary.code) + len(CODE)]].append(canary)
    found = []
    for prefix, those in track(behind.items(), "canaries by their own loss", len(behind)):
        codes = [code for c in those for code in (c.code, c.decoy)] + references
        head, *ids = tokenizer([prefix, *codes], add_special_tokens=False)["input_ids"]
        losses = code_changes(model, head, ids)
        ranked = [exposure(loss, losses[2 * len(those) :]) for loss in losses[: 2 * len(those)]]
        found += list(zip(ranked[::2], ranked[1::2], strict=True))
    return found


def by_reply(model: Any, tokenizer: Any, group: list[Canary], references: list[str]) -> list[Bits]:
    """By the adapter's loss of the reply that was trained behind the code: a way for a question to leak into it.

    The reply is the same for all codes: there is nothing that the base's loss could take account of.
    """
    rows = [plant(c.row, c.where, code) for c in group for code in (c.code, c.decoy, *references)]
    losses = [change.reply_alone for change in changes(model, tokenizer, rows, "canaries by the reply's loss")]
    size = 2 + len(references)
    each = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [(exposure(own, others), exposure(decoy, others)) for own, decoy, *others in each]


# -- attacks 2 and 3: rows ------------------------------------------------------------------------


def rows_known(model: Any, tokenizer: Any, training: list[Row], held_out: list[Row], draws: int) -> Figure:
    """Verbatim and membership: what the expert makes of rows that it was trained on, and of others."""
    found = changes(model, tokenizer, training + held_out, "rows, trained on and held out")
    known = [(row["seed_id"], change) for row, change in zip(training, found, strict=False)]
    other = [(row["seed_id"], change) for row, change in zip(held_out, found[len(training) :], strict=True)]
    arms = {"train": known, "holdout": other}

    def told(measure: Callable[[Change], float]) -> dict[str, float]:
        return auc([(seed, measure(c)) for seed, c in known], [(seed, measure(c)) for seed, c in other], draws)

    return {
        "rows": {name: {"n": len(arm), "seeds": len({seed for seed, _ in arm})} for name, arm in arms.items()},
        "verbatim": {
            "rest": _verbatim({name: [(seed, c.says_rest) for seed, c in arm] for name, arm in arms.items()}),
            "reply": _verbatim({name: [(seed, c.says_reply) for seed, c in arm] for name, arm in arms.items()}),
        },
        "membership": {
            "question": told(lambda c: c.question),
            "reply": told(lambda c: c.reply),
            "reply_alone": told(lambda c: c.reply_alone),
        },
    }


def _verbatim(arms: dict[str, list[tuple[str, tuple[bool, bool]]]]) -> Figure:
    """How often greedy decoding says a part of a row as it stands there."""
    found: Figure = {
        name: {who: interval((seed, said[k]) for seed, said in arm) for k, who in enumerate(("expert", "base"))}
        for name, arm in arms.items()
    }
    train = found["train"]
    found["beyond_base"] = difference(train["expert"], train["base"])
    found["beyond_held_out"] = difference(train["expert"], found["holdout"]["expert"])
    return found


# -- words ----------------------------------------------------------------------------------------


def says(figures: Figure) -> list[str]:
    """What was measured, in sentences that claim no more."""
    c, v, m, rows = (figures[name] for name in ("canaries", "verbatim", "membership", "rows"))
    rest, reply = v["rest"], v["reply"]
    heart = "rows are known by heart" if reply["beyond_held_out"]["low"] > 0 else "none is seen to be known by heart"
    return [
        f"A throw-away adapter was trained by the same recipe on {c['rows']} rows, among them codes planted in "
        f"{c['question']['n']} questions and {c['answer']['n']} answers, each seen {c['times_seen']} times. "
        f"Exposure says how far they stand out among codes never planted.",
        f"Codes in questions, by their own loss: {_bits(c['question'])}",
        f"Codes in questions, by the loss of the reply trained behind them: {_bits(c['question_by_reply'])}",
        f"Codes in answers, by their own loss: {_bits(c['answer'])}",
        f"Given the first half of a question of its training, the expert goes on with the rest word for word in "
        f"{_rate(rest['train']['expert'])} of {rows['train']['n']} rows, the base in {_rate(rest['train']['base'])}; "
        f"difference {_rate(rest['beyond_base'])}.",
        f"Given a whole question of its training, it gives that row's exact answer in "
        f"{_rate(reply['train']['expert'])}, of held-out rows in {_rate(reply['holdout']['expert'])}; "
        f"difference {_rate(reply['beyond_held_out'])}: {heart}. Such answers are its purpose.",
        f"Rows of its training are told from held-out ones by the loss of the reply with an AUC of "
        f"{_auc(m['reply_alone'])}, by what it is less than the base's with {_auc(m['reply'])}, by the same of the "
        f"question with {_auc(m['question'])}; 0.5 is chance, 1 is certain. Held-out rows are of other seeds, and "
        f"where the expert is wrong on one its loss is high: seeds are told apart here, not rows of one seed.",
        "Evidence from these three attacks on this base and these rows, not a guarantee.",
    ]


def _bits(found: Figure) -> str:
    planted, chance = found["planted"], found["chance"]
    above = "above" if planted["low"] > chance else "below" if planted["high"] < chance else "not told from"
    return (
        f"{_figures(planted, 'bits', 2)} bits, {above} chance ({chance:g}); at most {found['most']:g} can be seen; "
        f"codes never planted {_figures(found['never_planted'], 'bits', 2)}."
    )


def _rate(found: dict[str, float]) -> str:
    return _figures(found, "rate", 3)


def _auc(found: dict[str, float]) -> str:
    return _figures(found, "auc", 3)


def _figures(found: dict[str, float], name: str, digits: int) -> str:
    return f"{found[name]:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"
