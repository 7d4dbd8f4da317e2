"""Stage score: what the claim is worth, measured on the shipped GGUF in llama.cpp.

Reads datasets/<expert>/holdout.parquet, experts/<expert>/adapter.gguf, the base's GGUF, seeds/general.jsonl and the
template; writes into experts/<expert>/ scores.parquet (every reply), claim.json (the claim's numbers), plots/ and,
last, eval.json (all figures). Run: dmoe score <expert>
"""

import csv
import hashlib
import io
import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from factory.errors import UserError, relative
from factory.llama import Turns, many_asked
from factory.paths import Home, Profile
from factory.progress import track
from factory.schema import ROWS, SCORES, read_rows, write_rows
from factory.seeds import read_seeds
from factory.store import need, read_json, sha256, write_json, write_text
from factory.template import Template, read_template
from train.figures import MEASURES, brief, length_ratio, lexical_ceiling, recommended_scale, summary
from train.panel import ROBUSTNESS, Messages, plain, spread, told

BASE_QUESTIONS = 100  # long replies that depend on no expert: a hundred are enough
DEAF_QUESTIONS = 20  # of a base that follows no system prompt, told to: only to show it
DOSE_QUESTIONS = 60
ROBUST_QUESTIONS = 80
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "min_p": 0.0}
MOST_TOKENS = 512  # in every arm
AT_ONCE = 8  # requests
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One request, and where its reply belongs: panel and setting are columns of scores.parquet."""

    panel: str
    setting: str
    arm: str
    scale: float
    question: Row
    messages: Messages
    options: dict[str, Any] = field(default_factory=dict)  # of llama.cpp; greedy unless they say otherwise


def score(home: Home, expert: str, profile: Profile, base: Path, full: Path | None = None) -> Row:
    """Asks everything, writes every reply and what came of it; returns eval.json's content.

    `full` is the same base unquantised, where there is one: the loss against it is reported.
    """
    template, general = read_template(home.template(expert)), general_questions(home)
    questions = read_rows(home.dataset(expert, "holdout.parquet"), ROWS, f"dmoe build {expert}")
    adapters = [need(home.expert(expert, "adapter.gguf"), f"dmoe export {expert}")]
    settings: dict[str, Any] = {"at_once": AT_ONCE, "context": 2048, "log": home.work / "logs" / f"score-{expert}.log"}
    to_tell = BASE_QUESTIONS if profile.follows_system_prompt else DEAF_QUESTIONS
    with many_asked(base, adapters, **settings) as servers:
        ask = Asker(servers, home, base)
        rows = ask_all(ask, template, doses(questions), f"{expert}: dose")
        scale = recommended_scale({s: [row for row in rows if row["scale"] == s] for s in SCALES})
        cases = panels(template, questions, general, scale, to_tell, ask.thinks())
        rows += ask_all(ask, template, cases, f"{expert}: panels")
    if full:
        with many_asked(full, adapters, **settings) as servers:
            ask = Asker(servers, home, full)
            rows += ask_all(ask, template, full_precision(questions, scale), f"{expert}: unquantised")
    rows.sort(key=lambda row: (row["panel"], row["setting"], row["arm"], row["scale"], row["row_id"]))
    write_rows(home.expert(expert, "scores.parquet"), SCORES, rows)
    result = {"base_model": profile.model, "about": profile.about, "base_file": base.name, "recommended_scale": scale}
    result["base_follows_system_prompt"] = profile.follows_system_prompt  # else the arm *told* means nothing
    result |= evaluate(rows)
    if len(template.answers) > 1:
        training = read_rows(home.dataset(expert, "train.parquet"), ROWS, f"dmoe build {expert}")
        result["lexical_ceiling"] = round(lexical_ceiling(training, questions), 4)
    write_json(home.expert(expert, "claim.json"), claim(result))
    for name, table in plots(rows, result).items():
        write_text(home.expert(expert, f"plots/{name}.csv"), _csv(table))
    write_json(home.expert(expert, "eval.json"), result)
    return result


# -- what is asked --------------------------------------------------------------------------------


def general_questions(home: Home) -> list[Row]:
    """Everyday questions of every other kind, as rows that ask for no answer.

    Raises:
        UserError: there are none.
    """
    seeds = read_seeds(home.general, None)
    if not seeds:
        raise UserError(
            f"{relative(home.general)}: holds no question; an expert is asked everyday ones too, bring them back"
        )
    return [{"row_id": s.id, "seed_id": s.id, "answer": "", "instruction": s.instruction} for s in seeds]


def _arm(scale: float) -> str:
    return "expert" if scale else "base"


def doses(questions: list[Row]) -> list[Case]:
    """The same questions at every scale."""
    return [
        Case("dose", f"{scale:g}", _arm(scale), scale, q, plain(q["instruction"]))
        for scale in SCALES
        for q in spread(questions, DOSE_QUESTIONS)
    ]


def panels(
    template: Template, questions: list[Row], general: list[Row], scale: float, to_tell: int, thinks: bool
) -> list[Case]:
    """All but the dose: what is asked of the expert, the base, and (`to_tell` questions) the base that is told."""
    shared, few = spread(questions, BASE_QUESTIONS), spread(questions, ROBUST_QUESTIONS)
    cases = []
    for panel, own, options in (("claim", questions, _greedy), ("sampled", shared, _sampled)):
        cases += [_case(panel, "plain", 0.0, q, options(q)) for q in shared]
        for q in spread(questions, to_tell):
            cases.append(Case(panel, "plain", "told", 0.0, q, told(template, q["instruction"]), options(q)))
        cases += [_case(panel, "plain", scale, q, options(q)) for q in own]
    if thinks:  # the engine has thinking off unless a request turns it on
        on = {"chat_template_kwargs": {"enable_thinking": True}}
        cases += [_case("thinking", "on", s, q, on) for s in (0.0, scale) for q in shared]
    cases += [_case("off_domain", "plain", 0.0, q, {}) for q in general[:BASE_QUESTIONS]]
    cases += [_case("off_domain", "plain", scale, q, {}) for q in general]
    for name, put in ROBUSTNESS.items():
        cases += [Case("robustness", name, "expert", scale, q, put(q["instruction"])) for q in few]
    return cases


def full_precision(questions: list[Row], scale: float) -> list[Case]:
    """What is asked again of the unquantised base with the same adapter."""
    return [_case("full_precision", "plain", scale, q, {}) for q in questions]


def _case(panel: str, setting: str, scale: float, question: Row, options: dict[str, Any]) -> Case:
    return Case(panel, setting, _arm(scale), scale, question, plain(question["instruction"]), options)


def _greedy(question: Row) -> dict[str, Any]:
    return {}


def _sampled(question: Row) -> dict[str, Any]:
    return SAMPLING | {"seed": int(hashlib.sha256(question["row_id"].encode()).hexdigest()[:7], 16)}


# -- asking ---------------------------------------------------------------------------------------


class Asker:
    """Asks llama.cpp; replies of the base alone are kept across experts and versions, by base and request."""

    def __init__(self, servers: Turns, home: Home, base: Path) -> None:
        self.servers = servers
        self.store = home.work / "replies-of-bases" / f"{sha256(base)[:16]}.json"
        try:
            self.kept: dict[str, Row] = read_json(self.store) if self.store.exists() else {}
        except UserError as error:
            raise UserError(f"{error}\n  then delete it: what the base said is asked again") from None

    def __call__(self, case: Case) -> Row:
        """Text, tokens and whether it ended by itself."""
        options = {"temperature": 0.0, "max_tokens": MOST_TOKENS, **case.options}
        request = json.dumps([case.messages, options], sort_keys=True)
        key = hashlib.sha256(request.encode()).hexdigest()[:24]
        if case.scale == 0 and key in self.kept:
            return self.kept[key]
        with self.servers.turn() as llama:
            reply = llama.chat(case.messages, [case.scale], **options)
        choice = reply["choices"][0]
        text = (choice["message"]["content"] or "").rpartition("</think>")[2].lstrip()  # a thought is no reply
        tokens, stopped = reply["usage"]["completion_tokens"], choice["finish_reason"] == "stop"
        found = {"reply": text, "tokens": tokens, "stopped": stopped}
        if case.scale == 0:
            self.kept[key] = found
        return found

    def thinks(self) -> bool:
        """Whether the base's chat template has a switch for thinking."""
        with self.servers.turn() as llama:
            return llama.thinks()

    def keep(self) -> None:
        """Writes what the base said, for the next expert."""
        write_text(self.store, json.dumps(dict(sorted(self.kept.items())), ensure_ascii=False))


def ask_all(ask: Asker, template: Template, cases: list[Case], name: str) -> list[Row]:
    """All cases asked, some at a time, and what each reply fulfils, as rows of scores.parquet."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            found = list(track(pool.map(ask, cases), name, len(cases)))
        finally:
            pool.shutdown(cancel_futures=True)
            ask.keep()
    return [_scored(template, case, reply) for case, reply in zip(cases, found, strict=True)]


def _scored(template: Template, case: Case, reply: Row) -> Row:
    question, measure = case.question, template.measure(reply["reply"], case.question["answer"])
    return {
        "row_id": question["row_id"], "panel": case.panel, "setting": case.setting, "arm": case.arm,
        "scale": case.scale, "seed_id": question["seed_id"], "answer": question["answer"],
        "instruction": question["instruction"], **reply, "given": measure.given,
        **{name: getattr(measure, name) for name in MEASURES},
    }  # fmt: skip


# -- what came of it ------------------------------------------------------------------------------


def evaluate(rows: list[Row]) -> dict[str, Any]:
    """eval.json's figures: the claim's arms first, then every panel."""
    by_panel: dict[str, dict[str, dict[str, list[Row]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        by_panel[row["panel"]][row["setting"]][row["arm"]].append(row)
    arms = by_panel["claim"]["plain"]
    found: dict[str, Any] = {arm: summary(arms[arm]) for arm in ("base", "told", "expert")}
    base, expert = found["base"]["mention"]["rate"], found["expert"]["mention"]["rate"]
    found["times_more"] = round(expert / base, 1) if base else None  # null: the base never gave it
    found["length_ratio"] = length_ratio(arms["base"], arms["expert"])
    found["sampled"] = {arm: summary(of_arm) for arm, of_arm in by_panel["sampled"]["plain"].items()}
    found["thinking"] = {arm: brief(of_arm) for arm, of_arm in by_panel["thinking"]["on"].items()}
    found["off_domain"] = {arm: summary(of_arm) for arm, of_arm in by_panel["off_domain"]["plain"].items()}
    found["dose"] = {name: brief(_all(of)) for name, of in sorted(by_panel["dose"].items(), key=lambda i: float(i[0]))}
    found["robustness"] = {name: brief(by_panel["robustness"][name]["expert"]) for name in ROBUSTNESS}
    full = by_panel["full_precision"]["plain"]["expert"]
    found["full_precision"] = brief(full) if full else None
    return found


def _all(arms: dict[str, list[Row]]) -> list[Row]:
    return [row for rows in arms.values() for row in rows]


def claim(result: dict[str, Any]) -> dict[str, Any]:
    """The claim's numbers and nothing else: what `dvc metrics diff` shows."""
    base, expert = result["base"], result["expert"]
    found = {"questions": expert["n"], "seeds": expert["seeds"]}
    for name in ("mention", "right", "in_form"):
        found |= {name: expert[name]["rate"], f"{name}_low": expert[name]["low"]}
    worst = min(figures["mention"]["rate"] for figures in result["robustness"].values())
    return found | {
        "base_mention": base["mention"]["rate"],
        "length_ratio": result["length_ratio"]["rate"],
        "length_ratio_low": result["length_ratio"]["low"],
        "robust": worst,
    }


def plots(rows: list[Row], result: dict[str, Any]) -> dict[str, list[Row]]:
    """The tables behind the plots, by name, as DVC and the report draw them."""
    asked = [row for row in rows if row["panel"] == "claim"]
    return {
        "dose": [_rates(figures, scale=float(scale)) for scale, figures in result["dose"].items()],
        "robustness": [_rates(figures, setting=name) for name, figures in result["robustness"].items()],
        "lengths": _length_curve(asked),
        "confusion": [
            {"asked": row["answer"], "given": row["given"] or "none or several"}
            for row in asked
            if row["arm"] == "expert"
        ],
    }


def _rates(figures: Row, **first: Any) -> Row:
    rates = {name: figures[name]["rate"] for name in ("mention", "right", "in_form")}
    return {**first, **rates, "tokens": figures["tokens"]["median"]}


def _length_curve(rows: list[Row]) -> list[Row]:
    """Of each arm, how many tokens the shortest 0, 5, ... 100 % of its replies have at most."""
    lengths = {arm: sorted(row["tokens"] for row in rows if row["arm"] == arm) for arm in ("base", "told", "expert")}
    return [
        {"share": share, **{arm: of[min(len(of) - 1, share * len(of) // 100)] for arm, of in lengths.items()}}
        for share in range(0, 101, 5)
    ]


def _csv(table: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
