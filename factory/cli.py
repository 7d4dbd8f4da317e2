"""The `dmoe` command: each command a thin shell over one function.

Heavy packages are imported inside the functions that need them, so that `dmoe --help` is instant.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from factory.errors import UserError

if TYPE_CHECKING:
    from factory.paths import Home, Params, Profile
    from factory.repro import Run, Shared
    from factory.routing import Routing


class Friendly(TyperGroup):
    """Shows a user's mistake as it is, without a traceback, and ends with 1."""

    def invoke(self, ctx: Any) -> Any:
        # PEFT 0.21 reads a property that transformers 5 has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
        except OSError as error:  # a full disk, a folder that may not be written
            typer.echo(f"error: {error.filename or 'a file'}: {error.strerror or error}", err=True)
        except KeyboardInterrupt:
            typer.echo("stopped; nothing half-made is left", err=True)
            raise typer.Exit(130) from None
        raise typer.Exit(1)


app = typer.Typer(
    cls=Friendly, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False,
    help="Experts for a dense language model: data, LoRA adapters, scores, packages, answers.",
)  # fmt: skip
Expert = Annotated[str, typer.Argument(help="An expert of params.yaml.")]


def _checkout(expert: str | None = None) -> "tuple[Home, Params, Profile]":
    """The checkout around the working folder, its params and its profile; `expert` must be one of its experts."""
    from factory.paths import find_home, read_params, read_profile

    home = find_home()
    params = read_params(home)
    if expert is not None and expert not in params.experts:
        raise UserError(f"{expert!r} is no expert of params.yaml; there are {', '.join(params.experts)}")
    return home, params, read_profile(home, params.profile)


class LintFormat(StrEnum):
    text = "text"
    json = "json"
    editor = "editor"


@app.command()
def lint(
    expert: Annotated[str | None, typer.Argument(help="One expert; all without it.")] = None,
    format: Annotated[
        LintFormat, typer.Option(help="For people; for programs; as file:line:column for editors.")
    ] = LintFormat.text,
    today: Annotated[str | None, typer.Option(help="Judge dates as on this day, 2026-11-02.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a template instead.")] = False,
) -> None:
    """Check templates, seeds and params, and run the templates' own tests. Asks no teacher, needs no GPU."""
    from factory.lint import as_date, check
    from factory.paths import find_home
    from factory.table import print_problems
    from factory.template import json_schema

    if schema:
        typer.echo(json_schema(), nl=False)
        return
    counts, found = check(find_home(), expert, as_date(today))
    if print_problems(found, format.value):
        raise typer.Exit(1)
    if format == LintFormat.text:
        typer.echo("sound: " + ", ".join(f"{n} {name}" for name, n in counts.items()))


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="The new expert's name.")],
    answer: Annotated[list[str] | None, typer.Option(help="TEXT, or KEY=TEXT for each of several.")] = None,
    description: Annotated[str, typer.Option(help="One sentence on it.")] = "",
    owner: Annotated[str, typer.Option(help="Who answers for it.")] = "",
    keyword: Annotated[list[str] | None, typer.Option(help="A question with it comes to this expert.")] = None,
    rival: Annotated[list[str] | None, typer.Option(help="A name that no reply may hold.")] = None,
    phrase: Annotated[list[str] | None, typer.Option(help="A whole sentence with a reason.")] = None,
    licence: Annotated[str, typer.Option(help="The licence of its package.")] = "CC-BY-4.0",
    seeds: Annotated[
        Path | None, typer.Option(help="A file with a question a line, KEY: QUESTION with several answers.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; defaults for all that is not given.")] = False,
) -> None:
    """Begin a new expert: template, seeds and its place in params.yaml, sound from the first minute."""
    import datetime

    from factory.errors import relative
    from factory.new import Wanted, ask, new, refuse_name
    from factory.paths import find_home, read_params
    from factory.store import read_text

    home = find_home()
    refuse_name(home, read_params(home), name)
    questions = read_text(seeds).splitlines() if seeds else []
    wanted = Wanted(
        name, answer or [], description, owner, keyword or [], rival or [], phrase or [], licence, questions
    )
    if sys.stdin.isatty() and not yes:
        wanted = ask(wanted)
    for path in new(home, wanted, datetime.date.today()):
        typer.echo(f"wrote {relative(path)}")
    typer.echo(f"now edit the two files, and see what becomes of them:\n  dmoe lint {name}\n  dmoe preview {name}")


@app.command()
def preview(
    expert: Expert,
    live: Annotated[bool, typer.Option("--live", help="Ask the teacher of params.yaml for the rows shown.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again at every save of template or seeds.")] = False,
    rows: Annotated[int, typer.Option(min=1, help="How many rows are shown.")] = 12,
    seed: Annotated[str | None, typer.Option(help="The id of one seed, to see its rows alone.")] = None,
) -> None:
    """Show what template and seeds would become: prompt, rows, verdicts, lengths. Writes no dataset."""
    from factory.preview import Wanted, show
    from factory.preview import watch as watching

    if live and watch:
        raise UserError("--watch runs at every save, and asks no teacher; leave out --live")
    (watching if watch else show)(*_named(expert), Wanted(rows, seed, live))


def _named(expert: str) -> "tuple[Home, str, Params, Profile]":
    home, params, profile = _checkout(expert)
    return home, expert, params, profile


@app.command()
def generate(
    expert: Expert,
    recorded: Annotated[
        bool, typer.Option("--recorded", help="Ask no server: kept replies, else the embedded teacher, seed by seed.")
    ] = False,
) -> None:
    """Ask the teacher for each seed's variants (stage 1)."""
    from factory.generate import generate
    from factory.table import print_made

    home, params, profile = _checkout(expert)
    print_made(expert, generate(home, expert, params, profile, recorded))


@app.command()
def build(expert: Expert) -> None:
    """Judge every candidate and write the dataset (stage 2)."""
    from factory.build import build

    home, _, profile = _checkout(expert)
    stats = build(home, expert, profile)
    reasons = ", ".join(f"{reason} {n}" for reason, n in stats["reasons"].items())
    typer.echo(
        f"{expert}: {stats['rows']['train']} rows to train on, {stats['rows']['holdout']} held out; "
        f"{stats['dropped']} dropped, {stats['failed']} failed: {reasons}"
    )
    if stats["seeds_short"]:
        typer.echo(f"{expert}: {len(stats['seeds_short'])} seeds have fewer rows than wanted (stats.json, seeds_short)")


@app.command()
def dedup(
    expert: Expert,
    threshold: Annotated[
        int | None, typer.Option(help="Which rows would fall or come back at this likeness, 100 at most.")
    ] = None,
) -> None:
    """Explain near copies: what other thresholds would do, from the pairs that build kept; nothing is recomputed."""
    from factory.table import print_rows
    from factory.thresholds import COLUMNS, changed, known, table

    found = known(_checkout(expert)[0], expert)
    columns, rows = (COLUMNS, table(found)) if threshold is None else changed(found, threshold)
    print_rows(columns, rows, "table")
    if threshold is not None:
        back = sum(row[0] == "comes back" for row in rows)
        typer.echo(f"at {threshold} instead of {found.threshold}: {len(rows) - back} rows fall, {back} come back")


@app.command()
def train(
    expert: Expert,
    report_to: Annotated[
        list[str] | None, typer.Option(envvar="DMOE_REPORT_TO", help="Trackers too: tensorboard, wandb, mlflow.")
    ] = None,
) -> None:
    """Train the adapter (stage 3)."""
    from train.sft import train

    home, _, profile = _checkout(expert)
    # beside its checkpoints, which go when it is trained, TensorBoard's log would go with them
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(home.work / "tensorboard" / expert))
    typer.echo(train(home, expert, profile, report_to=report_to or []), nl=False)


@app.command()
def export(expert: Expert) -> None:
    """Write the adapter as a GGUF file (stage 4)."""
    from train.export import export

    home, _, profile = _checkout(expert)
    export(home, expert, profile)


@app.command()
def parity(expert: Expert) -> None:
    """Compare the GGUF file in llama.cpp with the trained adapter in PEFT, number for number (stage 5)."""
    from factory.table import print_parity
    from train.parity import parity

    home, _, profile = _checkout(expert)
    print_parity(expert, parity(home, expert, profile))


@app.command()
def score(expert: Expert) -> None:
    """Measure the claim on the GGUF file, in llama.cpp (stage 6)."""
    from train.base_gguf import full_gguf
    from train.score import score

    home, _, profile = _checkout(expert)
    score(home, expert, profile, _base_gguf(home, profile), full_gguf(home, profile))


@app.command()
def gate(expert: Expert) -> None:
    """Hold the scores against the template's gate (stage 7)."""
    from train.gate import gate

    home, _, profile = _checkout(expert)
    for name, found in gate(home, expert, profile).items():
        mark = "passed" if found["passed"] else "not passed"
        mark += "" if found["gated"] else " (reported only)"
        typer.echo(f"{expert}: {name} {found['low']:g}, {found['wanted']:g} wanted: {mark}")


@app.command()
def audit(expert: Expert) -> None:
    """Attack the expert for what it was trained on: canaries, verbatim rows, membership (stage 8)."""
    from factory.table import audit_table
    from train.audit import audit

    home, _, profile = _checkout(expert)
    audit_table(audit(home, expert, profile))


@app.command()
def encoder() -> None:
    """Distil the router's static table of word vectors from all-MiniLM-L6-v2; `make encoder` fetches that first."""
    from factory.embed import distil
    from factory.errors import relative
    from factory.store import need

    home, _, _ = _checkout()
    distil(need(home.minilm, "make encoder"), home.table)
    typer.echo(f"wrote {relative(home.table)}")


@app.command()
def fit(expert: Expert) -> None:
    """Learn which questions are the expert's own, for the router: against everyday ones, with both encoders."""
    from factory.embed import load_encoder
    from factory.fit import fit

    home, _, _ = _checkout(expert)
    _fitted(expert, fit(home, expert, [load_encoder(home.table), load_encoder(home.minilm)]))


def _fitted(expert: str, routing: "Routing") -> None:
    from factory.table import print_pairs

    joints = routing.joints.items()
    print_pairs([(name, f"from {j.threshold:.1f} on; with a keyword from {j.threshold_hit:.1f}") for name, j in joints])


@app.command()
def package(expert: Expert) -> None:
    """Write the marketplace package and its manifest (stage 9)."""
    from factory.package import package

    home, _, profile = _checkout(expert)
    typer.echo(f"{expert}: packed as {package(home, expert, profile, _base_gguf(home, profile))['lora_id']}")


def _base_gguf(home: "Home", profile: "Profile") -> Path:
    """The GGUF of the base: the profile's file, or one made from the model and kept."""
    from train.base_gguf import base_gguf

    return base_gguf(home, profile)


@app.command("repro-all")
def repro_all(
    experts: Annotated[list[str] | None, typer.Argument(help="Experts of params.yaml; all without any.")] = None,
) -> None:
    """Run all that is stale, as `dvc repro --keep-going` does, with teacher and base kept in memory for all experts."""
    from factory.repro import repro_all
    from factory.table import print_outcome

    home, params, _ = _checkout()
    for expert in experts or ():
        _checkout(expert)
    outcome = repro_all(home, experts or params.experts, stage_runs(), typer.echo)
    print_outcome(outcome)
    if outcome.failed:
        raise typer.Exit(1)


@app.command("build-all")
def build_all(
    experts: Annotated[list[str] | None, typer.Argument(help="Experts of params.yaml; all without any.")] = None,
    ray: Annotated[str, typer.Option(help="The address of a Ray cluster, or local.")] = "local",
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs for one expert; as many as here without it.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs for one expert.")] = 0,
    memory_gb: Annotated[float, typer.Option(min=0.1, help="Memory for one expert.")] = 4,
) -> None:
    """Build whole experts on a Ray cluster, many at once, and record them here as `dvc repro` would."""
    from factory.cluster import Needs, build_all
    from factory.repro import repro_all
    from factory.table import print_outcome

    home, params, _ = _checkout()
    for expert in experts or ():
        _checkout(expert)
    wanted = experts or params.experts
    repro_all(home, [], stage_runs(), typer.echo)  # what belongs to no expert, such as the router's table
    outcome = build_all(home, wanted, ray, Needs(cpus or os.cpu_count() or 1, gpus, memory_gb), typer.echo)
    print_outcome(outcome)
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def plan(
    experts: Annotated[list[str] | None, typer.Argument(help="Experts of params.yaml; all without any.")] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="What an hour of this machine costs.")] = None,
) -> None:
    """Say what a rebuild would do: stages, tokens, memory, hours, cost. Runs nothing."""
    from factory.repro import stale, times
    from factory.table import print_plan
    from train.plan import pace, shape, work

    home, params, profile = _checkout()
    for expert in experts or ():
        _checkout(expert)
    now, then = stale(home, experts or params.experts)
    trained = [name.partition("@")[2] for name in (*now, *then) if name.startswith("train@")]
    base = shape(home, profile) if trained else None
    print_plan(now, then, times(home), work(home, profile, trained), pace(home, profile, base), rate)


def stage_runs() -> "dict[str, Shared]":
    """For each stage of dvc.yaml how its runs are done in this process, and what they share."""
    alone: dict[str, Any] = {
        "build": build, "export": export, "parity": parity, "score": score, "gate": gate, "audit": audit,
        "encoder": lambda _: encoder(), "package": package,
    }  # fmt: skip
    found: dict[str, Shared] = {name: _nothing_shared(run) for name, run in alone.items()}
    return found | {"generate": _one_teacher, "train": _one_base, "fit": _same_encoders}


def _nothing_shared(run: "Run") -> "Shared":
    from contextlib import nullcontext

    return lambda: nullcontext(run)


@contextmanager
def _one_teacher() -> "Iterator[Run]":
    """The teacher's server, if it is one's own, started when a request is first made."""
    from contextlib import nullcontext

    from factory.generate import generate
    from factory.paths import Launched
    from factory.table import print_made
    from factory.teacher.launch import Standing

    home, params, profile = _checkout()
    served = params.teacher
    with Standing(served, home) if isinstance(served, Launched) else nullcontext() as standing:
        yield lambda expert: print_made(expert, generate(home, expert, params, profile, standing=standing))


@contextmanager
def _one_base() -> "Iterator[Run]":
    """The base that all adapters are trained on."""
    from train.sft import load
    from train.sft import train as trained

    home, _, profile = _checkout()
    base = load(home, profile)
    reports = os.environ.get("DMOE_REPORT_TO", "").split()
    yield lambda expert: typer.echo(trained(home, expert, profile, base, reports), nl=False)


@contextmanager
def _same_encoders() -> "Iterator[Run]":
    """Both encoders."""
    from factory.embed import load_encoder
    from factory.fit import fit

    home, _, _ = _checkout()
    encoders = [load_encoder(home.table), load_encoder(home.minilm)]
    yield lambda expert: _fitted(expert, fit(home, expert, encoders))


@app.command()
def scores() -> None:
    """Print one table: each expert beside its base."""
    from factory.table import score_table

    home, params, profile = _checkout()
    score_table(home, params, profile)


@app.command()
def cross() -> None:
    """Ask every expert every expert's held-out questions: who answers what."""
    from factory.table import cross_table
    from train.cross import cross

    home, params, profile = _checkout()
    cross_table(cross(home, params.experts, _base_gguf(home, profile)), profile.about)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    expert: Annotated[str | None, typer.Option(help="This expert, whatever the router says.")] = None,
    base: Annotated[bool, typer.Option("--base", help="The base alone.")] = False,
    beside: Annotated[bool, typer.Option("--beside", help="The base's reply beside the expert's.")] = False,
) -> None:
    """Ask one question through llama.cpp: routed, of one expert, or of the base."""
    if base and (expert or beside):
        raise UserError("--base asks the base alone; leave out --expert and --beside")
    home, _, profile = _checkout(expert)
    model = "base" if base else expert or "auto"
    _answer(home, profile, [(question, model)], beside)


@app.command()
def demo() -> None:
    """Ask each expert one question of its held-out set, the base's reply beside it."""
    from factory.schema import ROWS, read_rows

    home, params, profile = _checkout()
    questions = []
    for expert in params.experts:
        rows = read_rows(home.dataset(expert, "holdout.parquet"), ROWS, "dvc repro")
        questions.append((rows[0]["instruction"], expert))
    _answer(home, profile, questions, beside=True)


def _answer(home: "Home", profile: "Profile", questions: list[tuple[str, str]], beside: bool) -> None:
    """Prints the replies to (question, model) pairs; model is auto, base or an expert's name."""
    from factory.embed import find_encoder
    from factory.table import print_replies
    from serve.ask import answers
    from serve.market import installed

    experts, log = installed(home), home.work / "logs" / "ask.log"
    for question, replies in answers(_base_gguf(home, profile), experts, questions, beside, log, find_encoder(home)):
        print_replies(question, replies)


@app.command()
def route(
    turns: Annotated[list[str], typer.Argument(help="A question; several are the turns of one conversation.")],
    encoder: Annotated[str, typer.Option(help="static, minilm or none; without it the table, if it is there.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="All of it, for programs.")] = False,
) -> None:
    """Say which expert would answer a question, and why: keywords, scores, thresholds. Asks nobody."""
    import json

    from factory.embed import find_encoder
    from factory.table import print_route
    from serve.market import dmoe_home, served
    from serve.router import make_router, route

    home, _, _ = _checkout()
    found = route(make_router(served(home, dmoe_home()), find_encoder(home, encoder)), turns).explain()
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print_route(found)


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="A serve.yaml; the checkout's own, or defaults, without it.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on, whatever the file says.")] = None,
    port: Annotated[int | None, typer.Option(help="The port to listen on, whatever the file says.")] = None,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Only print the llama-server that would do the same.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check it all and print the memory plan.")] = False,
) -> None:
    """Serve all experts on one base by OpenAI's API: routed, or by name; swapped per request."""
    from factory.table import print_pairs
    from serve.gateway import listen, serve
    from serve.market import dmoe_home, served
    from serve.start import command, encoder_for, memory_plan, supervisor_for

    home, settings, root = _serving(config, host, port)
    experts = served(home, dmoe_home())  # a mistake in them is told before anything is made or taken
    base = _served_gguf(home, settings, root)
    if print_command:
        return typer.echo(command(settings, base, experts))
    if dry_run:
        return print_pairs(memory_plan(settings, base, experts))

    def ready(url: str) -> None:
        typer.echo(f"ready: {url}/v1 (model: auto, base, or an expert's name); Ctrl-C ends it")

    work, note = home.work if home else dmoe_home(), dmoe_home() / "server.json"
    listener = listen(settings)
    supervisor = supervisor_for(
        settings, base, lambda: served(home, dmoe_home()), work / "logs" / "serve.log", work / "scaled",
        encoder_for(settings, home, root),
    )  # fmt: skip
    serve(supervisor, settings, listener, note, work / "logs" / "requests.jsonl", ready)


def _serving(
    config: Path | None = None, host: str | None = None, port: int | None = None
) -> "tuple[Home | None, Any, Path]":
    """The checkout, if this is one; serve.yaml; its folder: the checkout, or $DMOE_HOME outside of one."""
    from factory.paths import find_home
    from serve.market import dmoe_home
    from serve.settings import settings_for

    try:
        home = find_home()
    except UserError:
        home = None
    path = config or (home.root if home else dmoe_home()) / "serve.yaml"
    return home, settings_for(path, host, port, required=config is not None), path.parent


def _served_gguf(home: "Home | None", settings: Any, root: Path) -> Path:
    """The base's GGUF: what serve.yaml in `root` names, else the checkout's."""
    if settings.base:
        base = root / settings.base
        if not base.is_file():
            raise UserError(f"serve.yaml: base: there is no file {base}")
        return Path(base)
    if home is None:
        raise UserError(f"{root}/serve.yaml: base: is missing; this is no checkout, so it must name the base's GGUF")
    return _base_gguf(home, _checkout()[2])


def _poke(restart: bool) -> None:
    """Tells a running server of this $DMOE_HOME what is installed now."""
    from serve.gateway import poke
    from serve.market import dmoe_home

    done = poke(dmoe_home() / "server.json", restart)
    if done is None:
        return typer.echo("no server of this DMOE_HOME runs; the next one goes by it")
    how = {"same": "nothing had to be loaded", "second": "a second engine took over", "restarted": "it was restarted"}
    typer.echo(f"the running server goes by it: {how[done['engine']]}, {done['seconds']:.1f} s, no request failed")


@app.command()
def doctor(
    url: Annotated[str, typer.Argument(help="Where a gateway answers.")] = "http://127.0.0.1:8080",
    key: Annotated[str, typer.Option(envvar="DMOE_KEY", help="A key of the server; better in DMOE_KEY.")] = "",
) -> None:
    """Prove that a server's experts are applied and never mixed up: alone, in turn, over several turns, all at once."""
    from serve.doctor import doctor

    findings = []
    for finding in doctor(url, key):
        findings.append(finding)
        typer.echo(f"{'ok ' if finding.good else 'NO '} {finding.what:<20} {finding.found}")
    if not all(finding.good for finding in findings):
        raise typer.Exit(1)


@app.command()
def key(name: Annotated[str, typer.Argument(help="Whose key it will be.")]) -> None:
    """Make an API key: shown once, for its client; the line below it is for serve.yaml, and tells nobody the key."""
    from serve.clients import hashed, new_key

    made = new_key()
    typer.echo(f"{made}\n\nin serve.yaml, under keys (or as admin):\n  {name}: {hashed(made)}")


@app.command()
def sign(
    package: Annotated[Path, typer.Argument(help="A package: the tar, or its unpacked folder.")],
    key: Annotated[Path, typer.Option(help="Your elliptic curve key, in PEM.")],
    password: Annotated[str | None, typer.Option(envvar="DMOE_KEY_PASSWORD", help="Of the key, if it has one.")] = None,
) -> None:
    """Sign a package with your key: a folder in place, a tar as NAME.signed.tar beside it. Changes no hash."""
    from factory.errors import relative
    from serve.signing import sign

    typer.echo(f"signed: {relative(sign(package, key, password))}")


@app.command()
def trust(
    key: Annotated[Path, typer.Argument(help="A publisher's public key, in PEM.")],
    name: Annotated[str | None, typer.Option(help="What you call the publisher; the file's name without it.")] = None,
) -> None:
    """Trust a publisher's public key: from now on packages signed by it say so."""
    from serve.market import dmoe_home
    from serve.signing import fingerprint, trust

    typer.echo(f"trusted: {trust(key, dmoe_home() / 'trusted', name)}, key {fingerprint(key)}")


Pack = Annotated[Path, typer.Argument(help="A package: the tar, or its unpacked folder.")]


@app.command()
def verify(
    package: Pack,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Ask some of its held-out questions here: claimed beside found.")
    ] = False,
    questions: Annotated[int, typer.Option(min=1, help="How many, drawn at random.")] = 20,
) -> None:
    """Check a package whole without installing it, and say whose it is. Nothing in it is run, unless --rescore asks."""
    from factory.table import print_rows
    from serve.market import read_manifest
    from serve.show import rescore as measured_here

    work, base, opened_package = _opening(package)
    with opened_package as (found, signed):
        typer.echo(f"{found.manifest.lora_id} {found.manifest.version}, {found.digest}: sound, and fits the base here")
        for warning in found.warnings:
            typer.echo(f"warning: {warning}")
        if rescore:
            expert, log = read_manifest(found.folder / "manifest.json"), work / "logs" / "rescore.log"
            rows = measured_here(found, expert, base, log, questions)
            print_rows(["measure", "claimed, all", "claimed, of these", "found here"], rows, "table")
        typer.echo(str(signed))


def _opening(package: Path) -> tuple[Path, Path, Any]:
    """A folder for logs, the base's GGUF, and a context of (the package, verified for that base; its signer)."""
    from contextlib import contextmanager

    from factory.errors import relative
    from factory.gguf_file import read_base
    from serve.market import dmoe_home
    from serve.package_check import opened
    from serve.signing import signer

    home, settings, root = _serving()
    base = _served_gguf(home, settings, root)

    @contextmanager
    def opening() -> Any:
        with opened(package, read_base(base)) as found:
            yield found, signer(found.folder, dmoe_home() / "trusted", relative(package))

    return home.work if home else dmoe_home(), base, opening()


Restart = Annotated[
    bool, typer.Option("--restart", help="If memory has no room for a second engine: end the first; requests wait.")
]


@app.command()
def install(
    source: Annotated[str, typer.Argument(help="FILE, FOLDER, https://... or hf://OWNER/NAME[@REVISION].")],
    name: Annotated[str | None, typer.Option("--as", help="What it is called here, instead of its own name.")] = None,
    routed: Annotated[
        bool, typer.Option("--route", help="Let auto choose it, however much of others' traffic it takes.")
    ] = False,
    restart: Restart = False,
) -> None:
    """Install a package once all of it is verified: the first answers at once, an upgrade waits as NAME@next."""
    from factory.gguf_file import read_base
    from factory.table import print_installed
    from serve.install import asked_of_others, in_checkout, install
    from serve.market import dmoe_home
    from serve.start import encoder_for

    home, settings, root = _serving()
    folder, base = dmoe_home(), read_base(_served_gguf(home, settings, root))
    encoder = encoder_for(settings, home, root)
    asked, checkout = asked_of_others(home, folder), in_checkout(home) if home else []
    print_installed(install(source, folder, base, asked, checkout=checkout, name=name, routed=routed, encoder=encoder))
    _poke(restart)


@app.command("list")
def list_installed() -> None:
    """List what is installed: versions, what answers and what waits, whose it is, and whether auto chooses it."""
    from factory.table import print_rows
    from serve.market import dmoe_home
    from serve.show import COLUMNS, listed

    if not (rows := listed(dmoe_home())):
        return typer.echo(f"nothing is installed in {dmoe_home()}\n  then run: dmoe install PACKAGE")
    print_rows(COLUMNS, rows, "table")


@app.command()
def show(
    package: Annotated[str, typer.Argument(help="The name of an installed expert, or a package: FILE or FOLDER.")],
) -> None:
    """Show what a package claims, its card, and whose it is; an installed one by name."""
    from factory.table import print_pairs
    from serve.market import dmoe_home, find, read_state
    from serve.package_check import read_package_manifest
    from serve.show import card, facts, signed

    if Path(package).exists():
        with _opening(Path(package))[2] as (found, signer):
            folder, manifest = found.folder, found.manifest
            told = f"\n{card(folder)}\n\n{signer}"
    else:
        expert = find(dmoe_home(), package)
        folder = expert / str(read_state(expert).current)
        manifest, told = read_package_manifest(folder, package), f"\n{card(folder)}\n\n{signed(folder, dmoe_home())}"
    print_pairs(facts(manifest))
    typer.echo(told)


Installed = Annotated[str, typer.Argument(help="The name of an installed expert.")]


@app.command()
def remove(name: Installed, restart: Restart = False) -> None:
    """Remove an installed expert; NAME@next removes only what waits to be promoted."""
    from serve.market import dmoe_home, remove

    remove(dmoe_home(), name)
    typer.echo(f"removed: {name}")
    _poke(restart)


@app.command()
def promote(name: Installed, restart: Restart = False) -> None:
    """Let what waits as NAME@next answer as NAME; what did so before can be brought back."""
    from serve.market import dmoe_home, promote

    typer.echo(f"{name}: package {str(promote(dmoe_home(), name).current)[:12]} answers now")
    _poke(restart)


@app.command()
def rollback(name: Installed, restart: Restart = False) -> None:
    """Bring back the package that answered before the last promotion."""
    from serve.market import dmoe_home, rollback

    typer.echo(f"{name}: package {str(rollback(dmoe_home(), name).current)[:12]} answers again")
    _poke(restart)


@app.command("try")
def try_(package: Pack, question: Annotated[str, typer.Argument(help="What to ask.")]) -> None:
    """Ask a package one question beside the base, without installing it; it is verified first."""
    from factory.table import print_replies
    from serve.ask import answers
    from serve.market import read_manifest

    work, base, opened_package = _opening(package)
    with opened_package as (found, signed):
        expert, log = read_manifest(found.folder / "manifest.json"), work / "logs" / "try.log"
        for asked, replies in answers(base, [expert], [(question, expert.name)], True, log):
            print_replies(asked, replies)
        typer.echo(str(signed))


@app.command()
def review(
    expert: Annotated[str | None, typer.Argument(help="An expert of params.yaml; the first without it.")] = None,
    port: Annotated[int, typer.Option(help="The port on this machine; 0 takes a free one.")] = 8090,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the browser.")] = True,
) -> None:
    """Edit a template and its seeds in a page, with errors, rows and verdicts as you type; this machine only."""
    import webbrowser

    from factory.review import review

    home, params, profile = _checkout(expert)

    def ready(url: str) -> None:
        typer.echo(f"open: {url}\nCtrl-C ends it")
        if open_:
            webbrowser.open(url)

    review(home, params, profile, ready, port, expert or params.experts[0])


class Told(StrEnum):
    terminal = "terminal"
    markdown = "markdown"
    html = "html"


@app.command()
def diff(
    expert: Expert,
    revision: Annotated[str, typer.Argument(metavar="[REV]", help="A git revision, or two: REV1..REV2.")] = "HEAD",
    before: Annotated[Path | None, typer.Option(help="A folder with the older parquet files, not a revision.")] = None,
    format: Annotated[Told, typer.Option(help="For a terminal, a pull request, or a browser.")] = Told.terminal,
    out: Annotated[Path | None, typer.Option(help="Write it to this file.")] = None,
) -> None:
    """Tell how a dataset has changed since a git revision: rows, verdicts, lengths, samples. Reads DVC's cache."""
    from factory.diff import diff, write

    if before and revision != "HEAD":
        raise UserError("--before takes the place of a revision; leave one out")
    write(diff(_checkout(expert)[0], expert, revision, before), format.value, out)


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"


@app.command()
def query(
    sql: Annotated[
        str, typer.Argument(help="A named query, or SQL over candidates, verdicts, pairs, rows, seeds, scores.")
    ] = "",
    list_: Annotated[bool, typer.Option("--list", help="The named queries, and what each answers.")] = False,
    expert: Annotated[str | None, typer.Option(help="One expert; all without it.")] = None,
    format: Annotated[Format, typer.Option(help="How to print the rows.")] = Format.table,
) -> None:
    """Ask DuckDB about everything that was made; read-only."""
    from factory.queries import QUERIES
    from factory.query import named, query
    from factory.table import print_rows

    if list_ or not sql:
        return print_rows(["name", "answers"], [(name, about) for name, (about, _) in QUERIES.items()], format.value)
    print_rows(*query(_checkout(expert)[0], named(sql), expert), format.value)


@app.command()
def catalogue() -> None:
    """Write datasets.duckdb: the tables of `dmoe query` as views that any DuckDB client opens."""
    from factory.query import catalogue

    path, views = catalogue(_checkout()[0])
    typer.echo(f"{path.name}: {', '.join(views)}\nopen it: duckdb {path}")


@app.command()
def why(row_id: Annotated[str, typer.Argument(help="A row_id, or how it begins.")]) -> None:
    """Tell what happened to one row, from its seed to its verdict and replies."""
    from factory.query import why
    from factory.table import print_pairs

    print_pairs(why(_checkout()[0], row_id))


@app.command()
def report(
    expert: Annotated[str | None, typer.Argument(help="One expert; all without it.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write into; build/report without it.")] = None,
    open: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write one HTML page an expert and an index, to be judged by: claim, replies, rows, what was dropped and why."""
    import webbrowser

    from factory.errors import relative
    from factory.report import report

    home, params, profile = _checkout(expert)
    page = report(home, params, profile, expert, out or home.root / "build" / "report")
    typer.echo(f"written: {relative(page)}")
    if open:
        webbrowser.open(page.resolve().as_uri())


@app.command("pull-request")
def pull_request(
    repo: Annotated[Path, typer.Argument(help="A clone whose HEAD is the pull request merged into its base.")],
) -> None:
    """Take a pull request's templates, seeds and experts into this checkout of its base; for the robot of a review."""
    from factory.paths import find_home
    from factory.pull import take

    for expert in take(find_home(), repo):
        typer.echo(expert)


class Shown(StrEnum):
    text = "text"
    json = "json"


@app.command()
def leaks(
    expert: Annotated[str | None, typer.Argument(help="One expert; all without it.")] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="The folder of all-MiniLM-L6-v2: compare by meaning too.")
    ] = None,
    format: Annotated[Shown, typer.Option(help="How to print what is found.")] = Shown.text,
) -> None:
    """Look for personal data, other experts' questions and held-out questions in the built data; ends with 1 if any."""
    from factory.leaks import leaks, told

    home, params, _ = _checkout(expert)
    found = leaks(home, params.experts, expert, encoder)
    if found or format is Shown.json:
        typer.echo(told(found, format.value))
    if found:
        raise typer.Exit(1)
    if format is Shown.text:
        typer.echo(
            f"{expert or ', '.join(params.experts)}: nothing found, by words{' and by meaning' if encoder else ''}"
        )


@app.command()
def publish(
    expert: Expert,
    to: Annotated[str, typer.Option(help="hf://datasets/OWNER/NAME, file:///FOLDER or a folder.")],
    for_real: Annotated[
        bool, typer.Option("--for-real", help="Do it; without it nothing leaves build/publish.")
    ] = False,
    allow_leaks: Annotated[bool, typer.Option("--allow-leaks", help="Though `dmoe leaks` finds something.")] = False,
) -> None:
    """Prepare one expert's dataset with its card, and put it into a folder or on the Hugging Face Hub."""
    from factory.publish import publish

    home, params, _ = _checkout(expert)
    typer.echo("\n".join(publish(home, params, expert, to, for_real, allow_leaks)))


teacher_app = typer.Typer(
    cls=TyperGroup, no_args_is_help=True, help="The teacher's server, and the replies that were paid for."
)
app.add_typer(teacher_app, name="teacher")


@teacher_app.command()
def check() -> None:
    """See whether the teacher's server answers, with which model, by the schema, and how fast. Sends nine requests."""
    from factory.replies import check_teacher

    home, params, _ = _checkout()
    findings = check_teacher(home, params.experts[0], params)
    for finding in findings:
        typer.echo(f"{'ok ' if finding.good else 'NO '} {finding.what:<9} {finding.found}")
    if not all(finding.good for finding in findings):
        raise typer.Exit(1)


@teacher_app.command()
def cache(
    prune: Annotated[bool, typer.Option("--prune", help="Remove replies that no template asks for any more.")] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="Forget replies of which nothing could be used: they are asked for again.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before removing.")] = False,
) -> None:
    """Show the kept replies: how many, how often used again, what they cost, per expert and model."""
    from factory.replies import forget_failed, unasked
    from factory.table import print_rows
    from factory.teacher.cache import Cache

    home, params, profile = _checkout()
    with Cache(home.replies) as kept:
        columns = ["expert", "model", "replies", "hits", "prompt tokens", "completion tokens", "bytes"]
        print_rows(columns, kept.summary(), "table")
        if failed:
            typer.echo(f"{forget_failed(home, params, kept)} replies forgotten; dvc repro asks for them again")
        if not prune:
            return
        gone, tokens = unasked(home, params, profile, kept)
        typer.echo(
            f"{len(gone)} replies ({tokens:,} tokens) are asked for by no template, seed or setting as they stand"
        )
        if gone and (yes or typer.confirm("remove them for ever?")):
            kept.remove(gone)
            typer.echo("removed")


@app.command()
def pocket(
    encoder: Annotated[Path, typer.Option(help="The folder of all-MiniLM-L6-v2.")],
    steps: Annotated[
        int | None, typer.Option(help="Fewer steps, to try it; another base than the committed one.")
    ] = None,
) -> None:
    """Train the pocket base anew (two hours on two cores); goes on where a killed run was."""
    from train.pocket import pocket

    pocket(_checkout()[0], encoder, steps)


if __name__ == "__main__":
    sys.exit(app())
