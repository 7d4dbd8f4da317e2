"""What commands print: the table of scores, query results, pairs. Widths follow the terminal."""

import csv
import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from factory.errors import Problem
from factory.package import claim_kept
from factory.paths import Home, Params, Profile
from factory.store import read_json
from factory.template import FAILURES

if TYPE_CHECKING:
    from factory.generate import Made
    from factory.repro import Outcome


def print_problems(found: list[Problem], style: str) -> bool:
    """Problems as text on stderr, or as json or, for editors, file:line:column on stdout; whether one is an error."""
    errors = [problem for problem in found if problem.severity == "error"]
    warnings = [problem for problem in found if problem.severity != "error"]
    if style == "json":
        sys.stdout.write(json.dumps([asdict(problem) for problem in found], indent=2, ensure_ascii=False) + "\n")
    elif style == "editor":
        for p in found:
            what = f"{p.key}: {p.message}" if p.key else p.message
            what = f"{p.file}:{p.line or 1}:{p.column or 1}: {p.severity}: {' '.join(what.split())}"
            sys.stdout.write(what + "\n")
    else:
        if errors:
            sys.stderr.write("error: " + "\n".join(map(str, errors)) + "\n")
        sys.stderr.writelines(f"warning: {problem}\n" for problem in warnings)
    return bool(errors)


NOTE = """\
given: every part that the template demands, and no rival, with a 95 % interval clustered by seed
told: the base behind a system prompt that asks for just this; deaf: this base follows none
by words: what a classifier reaches that knows the training rows' words alone
hardest way: of eight ways of asking, the one in which fewest replies give the answer"""


def score_table(home: Home, params: Params, profile: Profile) -> None:
    """One row an expert: the claim's measures for base and expert, and whether the gate was passed."""
    table = Table(title=f"measured on the GGUF files, in llama.cpp ({profile.about})", title_justify="left")
    for column in (
        "expert",
        "given: base, told -> expert",
        "right (by words)",
        "tokens",
        "in form",
        "hardest way",
        "gate",
    ):
        table.add_column(column)
    for expert in params.experts:
        path = home.expert(expert, "eval.json")
        table.add_row(
            expert, *(_cells(home, expert, read_json(path)) if path.exists() else ["not scored yet: dvc repro"])
        )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    console.print(Text(NOTE))


def cross_table(found: dict[str, Any], about: str) -> None:
    """A row for each kind of question, a column for each adapter that is on: how often it gave an answer of its own."""
    table = Table("questions of", *found["experts"], "base")
    for kind, cells in found["cells"].items():
        shown = []
        for cell in cells.values():
            own = f"{cell['own']['rate']:.2f}" if cell["own"] else ""
            asked = f" ({cell['asked']['rate']:.2f})" if cell["asked"] else ""
            shown.append(f"{own}{asked}".strip())
        table.add_row(kind, *shown)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        Text(f"adapter on: own answer given (and one of the expert whose questions these are); {about}"), table
    )


def audit_table(result: dict[str, Any]) -> None:
    """One row an attack: what it found, and what that is to be compared with."""
    table = Table("attack", "found (95 %)", "beside it", title=result["about"], title_justify="left")
    codes = {
        "question": "codes in questions, bits",
        "question_by_reply": "the same by the reply, bits",
        "answer": "codes in answers, bits",
    }
    for name, label in codes.items():
        found = result["canaries"][name]
        beside = f"never planted: {_wide(found['never_planted'], 'bits')}; chance: {found['chance']:g}"
        table.add_row(label, f"{_wide(found['planted'], 'bits')} of {found['most']:g}", beside)
    rest, reply = (result["verbatim"][part] for part in ("rest", "reply"))
    table.add_row("rest of a question", _wide(rest["train"]["expert"]), f"base: {_wide(rest['train']['base'])}")
    beside = f"held out: {_wide(reply['holdout']['expert'])}"
    table.add_row("a row's exact answer", _wide(reply["train"]["expert"]), beside)
    for part, label in {
        "reply_alone": "reply's loss",
        "reply": "reply less base",
        "question": "question less base",
    }.items():
        table.add_row(f"membership by {label}, AUC", _wide(result["membership"][part], "auc"), "chance: 0.5")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _wide(figure: dict[str, float], name: str = "rate") -> str:
    return f"{figure[name]:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def print_made(expert: str, made: "Made") -> None:
    """What generate has made, and for each rule what it cost: how many, how many by it alone, an example."""
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if made.rules:
        table = Table("rule", "rows", "by it alone", "example", title=f"{expert}: not accepted", title_justify="left")
        for reason, rule in sorted(made.rules.items(), key=lambda item: -item[1].hit):
            table.add_row(reason, f"{rule.hit:,}", f"{rule.alone:,}", _cell(rule.example[:200]))
        console.print(table)
    if any(reason in FAILURES for reason in made.rules):
        console.print(
            Text("A failed reply is kept like any other. Once its cause is mended: dmoe teacher cache --failed")
        )
    if made.short:
        seeds = ", ".join(f"{seed} ({n})" for seed, n in sorted(made.short.items())[:10])
        more = ", ..." if len(made.short) > 10 else ""
        console.print(Text(f"{expert}: {len(made.short)} seeds fell short of their rows: {seeds}{more}"))
    if made.lost:
        seeds = ", ".join(sorted(made.lost)[:10]) + (", ..." if len(made.lost) > 10 else "")
        why = "no reply is kept, and the embedded teacher has no phrases for every slot"
        console.print(Text(f"{expert}: {len(made.lost)} seeds could not be made ({why}): {seeds}"))
    writers = "".join(f"; {n:,} by {name}" for name, n in sorted(made.teachers.items()))
    status = writers + (f"; {made.status}" if made.status else "")
    console.print(
        Text(f"{expert}: {made.candidates:,} candidates, {made.accepted:,} of {made.wanted:,} wanted rows{status}")
    )


def print_parity(expert: str, found: dict[str, Any]) -> None:
    """What parity has measured: a row for each base and scale, then one line in words."""
    columns = ["base", "scale", "KL mean (nats)", "KL max", "same best token", "ties"]
    rows = []
    for base, scales in ((found["base"], found["scales"]), ("as served (not gated)", found.get("as_served", {}))):
        for scale, f in scales.items():
            rows.append(
                (base, scale, f"{f['kl_mean']:.1e}", f"{f['kl_max']:.1e}", f"{f['agreement']:.1%}", str(f["ties"]))
            )
    print_rows(columns, rows, "table")
    updates = found["updates"]
    sys.stdout.write(
        f"{expert}: the GGUF is the trained adapter: {found['positions']} positions of {found['rows']} held-out rows "
        f"agree, scale 0 is the bare base, {updates['compared']} updates equal within {updates['largest_error']:.1e}\n"
    )


def _cells(home: Home, expert: str, measured: dict[str, Any]) -> list[str]:
    if "robustness" not in measured:
        return ["scored by an older dmoe: dvc repro"]
    base, own = measured["base"], measured["expert"]
    ceiling = measured.get("lexical_ceiling")
    told = f"{measured['told']['mention']['rate']:.3f}" if measured["base_follows_system_prompt"] else "deaf"
    hardest, worst = min(measured["robustness"].items(), key=lambda item: item[1]["mention"]["rate"])
    return [
        f"{base['mention']['rate']:.3f}, {told} -> {_range(own['mention'])}",
        _range(own["right"]) + (f" ({ceiling:.2f})" if ceiling is not None else ""),
        f"{base['tokens']['median']:g} -> {own['tokens']['median']:g} ({measured['length_ratio']['rate']:g}x)",
        f"{own['in_form']['rate']:.3f}",
        f"{worst['mention']['rate']:.3f} {hardest}",
        "passed" if claim_kept(home, expert) else "MISSED",
    ]


def _range(figure: dict[str, float]) -> str:
    return f"{figure['rate']:.3f} ({figure['low']:.3f}-{figure['high']:.3f})"


def print_rows(columns: list[str], rows: list[tuple[Any, ...]], style: str) -> None:
    """Rows as a table for people, or as csv or json for programs."""
    if style == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    elif style == "json":
        json.dump(
            [dict(zip(columns, row, strict=True)) for row in rows],
            sys.stdout,
            indent=2,
            ensure_ascii=False,
            default=_jsonable,
        )
        sys.stdout.write("\n")
    else:
        table = Table(*columns)
        for row in rows:
            table.add_row(*("" if value is None else _cell(value) for value in row))
        Console(width=None if sys.stdout.isatty() else 200).print(table, markup=False)


def _cell(value: object) -> Any:
    return Text(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _jsonable(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime.date) else str(value)


def print_replies(question: str, replies: Sequence[Any]) -> None:
    """A question and below it each reply (`who`, `reason`, `tokens`, `text`), wrapped."""
    from rich.padding import Padding

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(Text(f"\n{question}", style="bold"))
    for reply in replies:
        console.print(Text(f"{reply.who} ({reply.reason}; {reply.tokens} tokens)", style="cyan"))
        console.print(Padding(Text(reply.text), (0, 0, 0, 4)))


def print_installed(done: Any) -> None:
    """What came of an install (serve.install.Done), and the command that goes on from there."""
    lines = [f"warning: {warning}" for warning in done.warnings]
    lines += [f"takes {part.share:.1%} of {part.number} questions: {part.of}" for part in done.taken]
    if not done.routed:
        lines.append("reached by name alone: it takes more than 1 % of others' traffic; --route lets auto choose it")
    what = {
        "current": "answers now",
        "next": f"waits as {done.name}@next\n  then run: dmoe promote {done.name}",
        "there": "was installed already; nothing is changed",
    }
    sys.stdout.write("\n".join([*lines, str(done.signed), f"{done.name} ({done.digest[:12]}): {what[done.state]}", ""]))


def print_route(found: dict[str, Any]) -> None:
    """What the router has found, as Route.explain gives it: the choice, then a row for each expert in question."""
    print_pairs([
        ("answers", found["expert"] or "base"),
        ("because", found["reason"]),
        ("margin", "none" if found["margin"] is None else f"{found['margin']:.1f} over the next"),
        ("encoder", found["encoder"] or "none: keywords and words alone"),
    ])  # fmt: skip
    named = {kind: {one["expert"]: one["keyword"] for one in found[kind]} for kind in ("hits", "vetoes")}
    scores = {one["expert"]: one for one in found["scores"]}
    rows = []
    for expert in dict.fromkeys([*scores, *named["hits"], *named["vetoes"]]):
        one = scores.get(expert)
        numbers = (f"{one['score']:.1f}", f"{one['threshold']:.1f}") if one else ("", "")
        rows.append((expert, *numbers, named["hits"].get(expert), named["vetoes"].get(expert)))
    print_rows(["expert", "score", "needs", "keyword", "not"], rows, "table")


def print_pairs(pairs: list[tuple[str, str]]) -> None:
    """Name and value, one a line, names aligned."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        sys.stdout.write(f"{name:<{width}}  {value}\n")


def print_outcome(outcome: "Outcome") -> None:
    """What `dmoe repro-all` did, in a line each."""
    print_pairs([
        ("made", f"{len(outcome.made)} stages"),
        *([("made before", f"{len(outcome.restored)} stages; DVC's cache had them")] if outcome.restored else []),
        *((f"failed: {name}", why) for name, why in outcome.failed.items()),
        *([("held back", ", ".join(outcome.held_back))] if outcome.held_back else []),
    ])  # fmt: skip


def print_plan(
    now: list[str], then: list[str], times: dict[str, float], work: Any, pace: Any, rate: float | None
) -> None:
    """What `dmoe repro-all` would do: `now` and `then` are stages, the seconds of each are its own or its kind's."""
    if not now:
        sys.stdout.write("nothing is stale\n")
        return
    names = list(dict.fromkeys(name.partition("@")[0] for name in (*now, *then)))
    table, whole, unknown = Table("stage", "stale", "behind", "minutes"), 0.0, []
    for column in table.columns[1:]:
        column.justify = "right"
    for name in names:
        mine, behind = ([s for s in some if s.partition("@")[0] == name] for some in (now, then))
        seconds = _seconds(name, mine + behind, times, work, pace)
        whole += seconds or 0.0
        unknown += [] if seconds is not None else [name]
        shown = "?" if seconds is None else f"{seconds / 60:.1f}"
        table.add_row(name, str(len(mine)), str(len(behind)), shown)
    Console().print(table)
    pairs = [("behind", "these run too, if what they read comes out different")]
    if work.rows:
        unbuilt = f"; {work.unbuilt} experts are counted from their seeds" if work.unbuilt else ""
        pairs.append(("to train", f"{work.rows:,} rows, {work.tokens:,} tokens in all epochs{unbuilt}"))
        speed = f"{pace.tokens_per_second:,.0f} tokens/s" if pace.tokens_per_second else "pace not known"
        memory = f"{pace.memory_gb:.1f} GB" if pace.memory_gb else "memory not known"
        pairs.append(("training", f"{speed}, {memory}: {pace.source}"))
    without = f", without {', '.join(unknown)}: never timed here, dmoe repro-all does" if unknown else ""
    pairs.append(("in all", f"{whole / 3600:.2f} hours{without}"))
    if rate is not None:
        pairs.append(
            ("cost", f"{rate * whole / 3600:,.2f} at {rate:g} an hour{', as far as it was timed' * bool(unknown)}")
        )
    print_pairs(pairs)


def _seconds(name: str, stages: list[str], times: dict[str, float], work: Any, pace: Any) -> float | None:
    """Of all of them: trainings by their tokens, others by their last run, else the median of their kind."""
    if name == "train" and pace.tokens_per_second:
        return float(work.tokens / pace.tokens_per_second)
    kind = [seconds for stage, seconds in times.items() if stage.partition("@")[0] == name]
    if not kind:
        return None
    return sum(times.get(stage, statistics.median(kind)) for stage in stages)
