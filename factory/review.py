"""`dmoe review`: a page on this machine alone for writing an expert's template and seeds.

It writes those two files and nothing else, whole or not at all, and never over a change that it has not shown.
What comes from the browser is believed only with this run's token, from the page itself, at a loopback address.
"""

import difflib
import hashlib
import json
import secrets
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapidfuzz import fuzz, process
from rapidfuzz.utils import default_process

from factory.checks import Counter
from factory.edits import append, remove
from factory.errors import Problem, Problems, UserError, relative
from factory.lint import check_texts
from factory.page import PAGES, render
from factory.paths import Home, Params, Profile
from factory.preview import Row, preview
from factory.seeds import Seed, held_out, parse_seeds
from factory.store import read_json, read_text, write_text
from factory.template import Template, find_any, parse_template
from factory.tokens import counter

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LARGEST_BODY = 8 << 20  # bytes
SAMPLE = 20  # seeds whose rows are shown first
ALIKE = 8  # similar rows shown
SHOWN = ("row_id", "seed_id", "sample", "split", "answer", "instruction", "output", "slots", "verdict", "reasons",
         "detail", "like", "score", "tokens")  # fmt: skip
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
Texts = dict[str, str]  # "template" and "seeds": what the two files hold, or would


@dataclass(frozen=True)
class Desk:
    """What every request works with."""

    home: Home
    params: Params
    count: Counter
    token: str
    rows: Callable[[str, str, str, bool], list[Row]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", lru_cache(6)(self._rows))

    def paths(self, expert: str) -> dict[str, Path]:
        return {"template": self.home.template(expert), "seeds": self.home.seeds(expert)}

    def read(self, expert: str, texts: Texts) -> tuple[Template, list[Seed]]:
        template = parse_template(texts["template"], self.home.template(expert))
        return template, parse_seeds(texts["seeds"], self.home.seeds(expert), template)

    def problems(self, expert: str, texts: Texts) -> list[Problem]:
        return check_texts(self.home, self.params, self.count, expert, texts["template"], texts["seeds"])

    def _rows(self, expert: str, template: str, seeds: str, all_: bool) -> list[Row]:
        compiled, read = self.read(expert, {"template": template, "seeds": seeds})
        step = max(1, len(read) // SAMPLE)
        return preview(compiled, read, self.count, only=None if all_ else {seed.id for seed in read[::step]})


def files(desk: Desk, expert: str, body: Any) -> Any:
    """Both files as they are on disk, each with its hash; what one cannot be read is an error."""
    found = {}
    for name, path in desk.paths(expert).items():
        text = read_text(path) if path.exists() else ""
        found[name] = {"text": text, "sha": _sha(text), "path": path.relative_to(desk.home.root).as_posix()}
    return found


def hashes(desk: Desk, expert: str, body: Any) -> Any:
    """The hash of each file on disk, so that the page notices a change underneath."""
    return {name: _sha(read_text(path) if path.exists() else "") for name, path in desk.paths(expert).items()}


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check(desk: Desk, expert: str, body: Any) -> Any:
    """What is wrong with the texts, which seeds are held out, and what an answer may be."""
    texts = _texts(body)
    names = {relative(path): name for name, path in desk.paths(expert).items()}
    found = desk.problems(expert, texts)
    problems = [
        {"file": names.get(p.file, "template"), "line": p.line, "column": p.column, "key": p.key, "message": p.message,
         "severity": p.severity} for p in found
    ]  # fmt: skip
    answers, per_seed = [], 0
    with suppress(Problems):
        template = parse_template(texts["template"], desk.home.template(expert))
        answers, per_seed = list(template.answers), template.declaration.generate.per_seed
    only = answers[0] if len(answers) == 1 else ""
    held = held_out(_loose_seeds(texts["seeds"], only))
    return {"problems": problems, "held": sorted(held), "answers": answers, "per_seed": per_seed}


def _loose_seeds(text: str, answer: str) -> list[Seed]:
    """Seeds as far as they can be read, so that the held-out marks stay while something is wrong elsewhere."""
    found = []
    for line in text.split("\n"):
        with suppress(ValueError, AttributeError, TypeError):
            entry = json.loads(line)
            found.append(Seed(str(entry["id"]), "", "", "", str(entry.get("answer") or answer))) if "id" in entry else 0
    return found


def rows(desk: Desk, expert: str, body: Any) -> Any:
    """The rows of the texts, each with its verdict: of a sample of the seeds, or of all; null if there are none."""
    texts = _texts(body)
    try:
        found = desk.rows(expert, texts["template"], texts["seeds"], bool(body.get("all")))
    except UserError:  # `check` says what is wrong
        return {"rows": None, "all": False}
    return {"rows": [{key: row[key] for key in SHOWN} for row in found], "all": bool(body.get("all"))}


def similar(desk: Desk, expert: str, body: Any) -> Any:
    """The rows of the same answer whose questions are most alike, by dedup's own measure."""
    texts = _texts(body)
    template, _ = desk.read(expert, texts)
    every = desk.rows(expert, texts["template"], texts["seeds"], True)
    row = _row(every, body)
    others = [r for r in every if r["answer"] == row["answer"] and r["row_id"] != row["row_id"]]
    near = process.extract(
        row["instruction"], [r["instruction"] for r in others], scorer=fuzz.token_sort_ratio,
        processor=default_process, limit=ALIKE,
    )  # fmt: skip
    alike = [{**{key: others[i][key] for key in SHOWN}, "likeness": round(score, 1)} for _, score, i in near]
    return {"threshold": template.declaration.dedup.instruction, "rows": alike}


def _row(every: list[Row], body: Any) -> Row:
    for row in every:
        if row["row_id"] == body.get("row_id"):
            return row
    raise UserError("this row is not made any more: the texts have changed since; choose another")


def choices(desk: Desk, expert: str, body: Any) -> Any:
    """What can be done so that a row goes: each an edit of the texts, shown before it is made."""
    texts = _texts(body)
    template, _ = desk.read(expert, texts)
    every = desk.rows(expert, texts["template"], texts["seeds"], True)
    row, phrase = _row(every, body), " ".join(str(body.get("phrase") or "").split())
    found = [_never(template, texts, row, phrase)] if phrase else []
    found += [_slot(template, texts, row, s["name"], s["value"]) for s in row["slots"]]
    found.append(_seed(texts, row))
    kept = [r for r in every if r["verdict"] == "keep"]
    before = set(desk.problems(expert, texts))
    return [_shown(desk, expert, texts, choice, kept, before) for choice in found]


@dataclass(frozen=True)
class Choice:
    """One way to be rid of a row; `refused` says why it is none."""

    title: str
    why: str
    texts: Texts
    hits: Callable[[Row], bool]
    refused: str = ""


def _shown(desk: Desk, expert: str, texts: Texts, choice: Choice, kept: list[Row], before: set[Any]) -> Any:
    gone = [r["output"] for r in kept if choice.hits(r)]
    shown = {"title": choice.title, "why": choice.why, "refused": choice.refused, "gone": len(gone)}
    if choice.refused:
        return shown
    after = desk.problems(expert, choice.texts)
    known = {(p.file, p.key, p.message) for p in before}
    new = [str(p) for p in after if (p.file, p.key, p.message) not in known]
    return shown | {
        "texts": choice.texts, "examples": gone[:3], "problems": new, "diff": _diff(desk, expert, texts, choice.texts)
    }  # fmt: skip


def _seed(texts: Texts, row: Row) -> Choice:
    lines = texts["seeds"].split("\n")
    left = [line for line in lines if row["seed_id"] not in line or _id(line) != row["seed_id"]]
    why = "The seed goes, and all its variants with it. No test can prove that a seed is not there, so none is written."
    return Choice(
        f"Remove the seed {row['seed_id']}", why, texts | {"seeds": "\n".join(left)},
        lambda r: bool(r["seed_id"] == row["seed_id"]),
    )  # fmt: skip


def _id(line: str) -> str:
    with suppress(ValueError, AttributeError):
        return str(json.loads(line).get("id"))
    return ""


def _slot(template: Template, texts: Texts, row: Row, slot: str, value: str) -> Choice:
    title = f"Remove “{value}” from slot {slot}"
    place = next((p for p, text, _ in _sources(template) if p[2:3] == (slot,) and text == value), None)

    def hits(r: Row) -> bool:
        return r["answer"] == row["answer"] and {"name": slot, "value": value} in r["slots"]

    why = "No reply is made with this phrase any more; the embedded teacher draws the phrases of other rows anew."
    try:
        if place is None:
            raise UserError(f"slot {slot} has no such phrase: it is the teacher's own; use “never say”")
        edited = remove(texts["template"], place)
        if template.output.slots[slot].ask is None:
            edited = append(edited, ("tests",), _case(template, row, f"“{value}” is no {slot} any more", "form"))
            why += " The slot is closed, so a test proves it."
        else:
            why += " A teacher that writes may still say it, so no test can prove it: “never say” would."
        return Choice(title, why, {"template": edited, "seeds": _free(texts["seeds"], slot, value)}, hits)
    except UserError as error:
        return Choice(title, "", texts, hits, f"{error}" if place is None else "it is the slot's only phrase")


def _free(text: str, slot: str, value: str) -> str:
    """Seeds text in which no seed fixes `slot` to `value`; the other lines stay as they are."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        with suppress(ValueError, AttributeError):
            seed = json.loads(line)
            if seed.get("slots", {}).get(slot) == value:
                del seed["slots"][slot]
                if not seed["slots"]:
                    del seed["slots"]
                lines[number] = json.dumps(seed, ensure_ascii=False) + ("\r" if line.endswith("\r") else "")
    return "\n".join(lines)


Place = tuple[str | int, ...]


def _sources(template: Template) -> list[tuple[Place, str, str]]:
    """Every phrase and form: where it stands, its text, and the same with the fixed text of its answers filled in."""
    found: list[tuple[Place, str, str]] = []
    for name, slot in template.output.slots.items():
        groups = slot.phrases.items() if isinstance(slot.phrases, dict) else [("", slot.phrases or [])]
        for answer, phrases in groups:
            where: Place = ("output", "slots", name, "phrases", *([answer] if answer else []))
            found += [((*where, i), text, text) for i, text in enumerate(phrases)]
    blank = dict.fromkeys(template.output.slots, "|")
    for i, form in enumerate(template.output.forms):
        filled = "\n".join(template.render(i, answer, blank) for answer in template.answers)
        found.append((("output", "forms", i), form, filled))
    return found


def _never(template: Template, texts: Texts, row: Row, phrase: str) -> Choice:
    """`phrase` into output.never, a test that proves it, and out of whatever would contradict it."""
    title = f"Never say “{phrase}”"

    def hits(r: Row) -> bool:
        return find_any([phrase], r["output"]) is not None

    if find_any(template.output.never, phrase):
        return Choice(title, "", texts, hits, "output.never has it already")
    for answer in template.answers:
        for part in (*template.fixed(answer).values(), *template.musts(answer)):
            if find_any([phrase], part):
                return Choice(title, "", texts, hits, f"it stands in “{part}”, the fixed text of answer {answer}")
    said = [(place, text) for place, text, filled in _sources(template) if find_any([phrase], filled)]
    try:
        edited, seeds = texts["template"], texts["seeds"]
        for place, text in sorted(said, key=lambda found: (str(found[0][:-1]), -int(found[0][-1]))):
            edited = remove(edited, place)
            seeds = _free(seeds, str(place[2]), text) if place[1] == "slots" else seeds
        edited = append(edited, ("output", "never"), phrase)
        output = row["output"] if hits(row) else f"{row['output']} {phrase}."
        case = _case(template, row | {"output": output}, f"never says “{phrase}”", "hedge")
        edited = append(edited, ("tests",), case)
    except UserError:
        listed = "; ".join(f"{'.'.join(map(str, place))}: “{text}”" for place, text in said)
        return Choice(title, "", texts, hits, f"it stands in what would then be left empty ({listed}): edit that first")
    why = "A reply that says it is dropped, whoever wrote it, and a test proves that."
    if said:
        title += " and remove what says it"
        listed = "; ".join(f"“{text}” ({'.'.join(map(str, place[:-1]))})" for place, text in said)
        why += f" The template says it itself, and would contradict itself: so this is removed too: {listed}."
    return Choice(title, why, {"template": edited, "seeds": seeds}, hits)


def _case(template: Template, row: Row, name: str, reason: str) -> dict[str, Any]:
    given = {"instruction": row["instruction"], "output": row["output"]}
    if len(template.answers) > 1:
        given["answer"] = row["answer"]
    return {"name": name, "given": given, "expect": {"verdict": "drop", "reason": reason}}


def _diff(desk: Desk, expert: str, old: Texts, new: Texts) -> str:
    found: list[str] = []
    for name, path in desk.paths(expert).items():
        file, was, now = path.relative_to(desk.home.root).as_posix(), old[name].split("\n"), new[name].split("\n")
        found += difflib.unified_diff(was, now, f"a/{file}", f"b/{file}", lineterm="")
    return "\n".join(found)


def diff(desk: Desk, expert: str, body: Any) -> Any:
    """The texts against the last commit and against the disk, and the commands that would commit them."""
    texts, paths = _texts(body), desk.paths(expert)
    disk = {name: read_text(path) if path.exists() else "" for name, path in paths.items()}
    names = [path.relative_to(desk.home.root).as_posix() for path in paths.values()]
    head = {name: _committed(desk.home.root, file) for name, file in zip(paths, names, strict=True)}
    changed = [file for name, file in zip(paths, names, strict=True) if texts[name] != head[name]]
    commands = [f"git add {' '.join(changed)}", f'git commit -m "{expert}: reviewed"'] if changed else []
    return {
        "head": _diff(desk, expert, {n: t or "" for n, t in head.items()}, texts),
        "disk": _diff(desk, expert, disk, texts), "commands": commands,
        "new": [file for name, file in zip(paths, names, strict=True) if head[name] is None],
    }  # fmt: skip


def _committed(root: Path, file: str) -> str | None:
    """A file's text in the last commit; None where there is none."""
    try:
        done = subprocess.run(["git", "show", f"HEAD:./{file}"], cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode("utf-8-sig", "replace")


def save(desk: Desk, expert: str, body: Any) -> Any:
    """Writes the texts that differ from the disk, unless a file is no longer what the page has loaded."""
    texts, base, disk = _texts(body), body.get("base") or {}, files(desk, expert, body)
    if moved := [name for name in texts if base.get(name) != disk[name]["sha"]]:
        return {"moved": moved, "disk": disk}
    for name, path in desk.paths(expert).items():
        if texts[name] != disk[name]["text"]:
            write_text(path, texts[name])
    return {"moved": [], "disk": files(desk, expert, body)}


def _texts(body: Any) -> Texts:
    texts = {name: body.get(name) if isinstance(body, dict) else None for name in ("template", "seeds")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{name}: must be a text")
        with suppress(UnicodeEncodeError):
            text.encode()
            continue
        raise UserError(f"{name}: holds half of a character, which no file can hold; remove it")
    return texts  # type: ignore[return-value]


WORK = {f.__name__: f for f in (files, hashes, check, rows, similar, choices, diff, save)}


def app(desk: Desk) -> "Starlette":
    """The page and its few functions, each `POST /api/<function>/<expert>` with the token in a header."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    async def page(request: "Request") -> "Response":
        nonce = secrets.token_urlsafe()
        policy = f"default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; connect-src 'self'; "
        policy += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        headers = HEADERS | {"Content-Security-Policy": policy}
        return HTMLResponse(render("review/index.html", nonce=nonce), headers=headers)

    async def style(request: "Request") -> "Response":
        return HTMLResponse(read_text(PAGES / "style.css"), media_type="text/css", headers=HEADERS)

    async def work(request: "Request") -> "Response":
        if refusal := _refusal(desk, request):
            return JSONResponse({"error": refusal}, 403, HEADERS)
        function, expert = WORK.get(request.path_params["name"]), request.path_params["expert"]
        if function is None or expert not in desk.params.experts:
            return JSONResponse({"error": f"{expert!r} is no expert of params.yaml"}, 404, HEADERS)
        raw = b""
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > LARGEST_BODY:
                return JSONResponse({"error": "the texts are too large"}, 413, HEADERS)
        try:
            body = json.loads(raw or b"{}")
            if await request.is_disconnected():  # typed on meanwhile: nobody waits for this answer
                return JSONResponse({"error": "stale"}, 409, HEADERS)
            return JSONResponse(await run_in_threadpool(function, desk, expert, body), headers=HEADERS)
        except (UserError, ValueError) as error:
            return JSONResponse({"error": str(error)}, 400, HEADERS)

    async def experts(request: "Request") -> "Response":
        if refusal := _refusal(desk, request):
            return JSONResponse({"error": refusal}, 403, HEADERS)
        schema = desk.home.root / "docs" / "template.schema.json"  # its keys are offered while one types
        known = {"experts": desk.params.experts, "root": str(desk.home.root)}
        return JSONResponse(known | {"schema": read_json(schema) if schema.exists() else None}, headers=HEADERS)

    routes = [
        Route("/", page), Route("/style.css", style), Route("/api/experts", experts, methods=["POST"]),
        Route("/api/{name}/{expert}", work, methods=["POST"]),
        Mount("/static", StaticFiles(directory=PAGES / "review")),
    ]  # fmt: skip
    hosts = Middleware(
        TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]
    )  # else a foreign name leads here
    return Starlette(routes=routes, middleware=[hosts])


def _refusal(desk: Desk, request: "Request") -> str:
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{request.headers['host']}":
        return "this page is not the one that dmoe review has opened"
    if not secrets.compare_digest(request.headers.get("x-dmoe-token", "").encode(), desk.token.encode()):
        return "open the address that dmoe review printed: it holds this run's token"
    return ""


def review(home: Home, params: Params, profile: Profile, ready: Callable[[str], None], port: int, expert: str) -> None:
    """Serves the page until Ctrl-C; `ready` is told its address, token included.

    Raises:
        UserError: the port is taken.
    """
    import uvicorn

    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise UserError(f"port {port} cannot be used: {error.strerror}; choose another with --port") from None
    desk = Desk(home, params, counter(home, profile), secrets.token_urlsafe(16))
    with listener:
        config = uvicorn.Config(app(desk), log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        ready(f"http://127.0.0.1:{listener.getsockname()[1]}/#{desk.token}/{expert}")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
